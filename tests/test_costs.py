"""hyma/costs.py: FLOPs by hand and against torch's counter, and the ledger that compares runs."""

import re

import pytest
import torch
from helpers import CPU, QUICK, make_embedding_folder, read_ledger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vlm
from hyma.costs import (
    EXTRA_FLOP_FORMULAS,
    NO_COST,
    Cost,
    connector_flops,
    cost_of_runs,
    cost_of_selector,
    cost_ratio,
    count_different,
    count_in_proportion,
    embedding_flops,
    flop_counter,
    linear_flops,
    logit_flops,
    scale_ledger,
    step_flops,
    trained_by_batches,
    validation_flops,
)
from hyma.embeddings import Embeddings, RowStore
from hyma.files import write_json
from hyma.hypernetworks import FactoredHypernetwork
from hyma.pair_names import choose_pairs
from hyma.runs import read_run
from hyma.splits import split_rows
from hyma.training import validate, validation_retrieval

# ------------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_flops_of_a_connector_against_torch(hidden_layers):
    """The texts are frozen embeddings: the first layer's inputs get no gradient."""
    connector = vlm.init_modality_connector(24, [40] * hidden_layers, 32)
    shapes = [parameter.shape for name, parameter in connector.named_parameters() if name.endswith("weight")]
    with FlopCounterMode(display=False) as counter:
        connector(torch.randn(64, 24)).sum().backward()
    assert counter.get_total_flops() == connector_flops(64, shapes)


def test_flops_of_logits_against_torch():
    texts = torch.randn(64, 24, requires_grad=True)
    images = torch.randn(64, 24)
    with FlopCounterMode(display=False) as counter:
        (texts @ images.T).square().sum().backward()
    assert counter.get_total_flops() == logit_flops(64, [24])
    assert logit_flops(64, [24, 32]) == 4 * 64**2 * (24 + 32)


@pytest.mark.parametrize("hidden_layers", [0, 1])
def test_flops_of_a_validation_against_torch(planted, hidden_layers):
    """Nearly: a text encoder's first layer has two products in a step and not three."""
    data = Embeddings(planted)
    pairs = choose_pairs(data, ["all"])
    store = RowStore(data, data.names("image") + data.names("text"), CPU)
    dims = ({name: store.dims[name] for name in data.names(kind)} for kind in ("image", "text"))
    generator = FactoredHypernetwork(*dims, hidden_layers, 2000)
    retrieval = validation_retrieval(data, *split_rows(data), CPU)
    with flop_counter() as counter:
        validate(generator, store, retrieval, pairs)
    ratio = validation_flops(generator, retrieval, pairs, store.dims) / counter.get_total_flops()
    assert 0.8 < ratio < 1.01


@pytest.mark.parametrize("weight_gradient", [False, True])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_flops_of_a_linear_layer_against_torch(weight_gradient, input_gradient):
    """A product forward, one for the weight's gradient, one for the input's."""
    weight = torch.randn(40, 24, requires_grad=weight_gradient)
    inputs = torch.randn(64, 24, requires_grad=input_gradient)
    with FlopCounterMode(display=False) as counter:
        outputs = inputs @ weight.T
        if outputs.requires_grad:
            outputs.sum().backward()
    assert counter.get_total_flops() == linear_flops(64, weight.shape, weight_gradient, input_gradient)


def test_flops_of_a_step_are_of_connectors_prediction_and_logits():
    class Fixed:
        def flops(self, batch_size, pairs):
            return 1000 * len(pairs), 7

    flops = step_flops(Fixed(), 64, [("a", "t"), ("b", "t")], {"a": 24, "b": 32, "t": 48})
    of_logits = 4 * 64**2 * (24 + 32)
    assert flops == {"flops": 2007 + of_logits, "step_flops": 7, "logit_flops": of_logits}


def test_flops_of_factorisations_by_hand():
    """torch's own counter knows none of them. Golub and Van Loan, sections 4.2, 5.2, 8.3 and 8.6."""
    x = torch.randn(30, 12)
    gram = x.T @ x + torch.eye(12)
    factor = torch.linalg.cholesky(gram)
    expected = {
        lambda: torch.linalg.cholesky(gram): 12**3 // 3,
        lambda: torch.cholesky_solve(torch.ones(12, 5), factor): 2 * 12**2 * 5,
        lambda: torch.linalg.solve_triangular(factor, torch.ones(12, 5), upper=False): 12**2 * 5,
        lambda: torch.linalg.qr(x): 4 * 12**2 * 30 - 4 * 12**3 // 3,
        lambda: torch.linalg.eigh(gram): 9 * 12**3,
        lambda: torch.linalg.svd(x): 22 * 12**3,
    }
    for call, flops in expected.items():
        with flop_counter() as counter:
            call()
        assert counter.get_total_flops() == flops


def test_flops_of_attention_on_a_cpu():
    q, k, v = (torch.randn(2, 3, 10, 8) for _ in range(3))
    with flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 3 * 4 * 10**2 * 8


def test_every_matrix_product_of_the_closed_form_is_counted(initialise):
    """What neither torch's counter nor EXTRA_FLOP_FORMULAS knows would be missing in the ledger."""
    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(op.overloadpacket)
            return op(*args, **(kwargs or {}))

    with Seen():
        initialise(1)
    heavy = {op for op in seen if re.search("mm|linalg|cholesky|triangular|[^s]qr|svd|eig|einsum", str(op))}
    norms = {torch.ops.aten.linalg_vector_norm, torch.ops.aten._linalg_check_errors}
    assert len(heavy) >= 5 and heavy <= {*EXTRA_FLOP_FORMULAS, *flop_registry, *norms}


# ------------------------------------------------------------------------------------------------------- comparing runs


@pytest.mark.parametrize("kind", ["grid", "factored", "mlp"])
def test_flops_at_another_batch_size_are_those_of_a_run_there(run, planted, tmp_path, kind):
    if kind == "grid":
        command = ("train_grid.py",)
    else:
        command = ("train_hyma.py", "--generator", kind, "--pairs-per-step", "6", "--refine-steps", "0")
    if kind == "mlp":
        command += ("--width", "8")
    ledgers = {}
    for batch in (128, 64):
        flags = (*QUICK, "--epochs", "1", "--batch-size", str(batch), "--out", f"b{batch}")
        assert run(*command, "--data", planted, *flags).code == 0
        ledgers[batch] = read_run(tmp_path / f"b{batch}").ledger
    assert ledgers[128]["pair_samples"] == ledgers[64]["pair_samples"]
    costs = scale_ledger(ledgers[128], ledgers[64])
    assert costs["flops_equal_batch"] == pytest.approx(ledgers[64]["flops"], rel=1e-9)
    assert costs["flops"] > 1.05 * costs["flops_equal_batch"] or kind != "grid"
    half = ledgers[64] | {"pair_samples": ledgers[64]["pair_samples"] / 2}
    start = ledgers[128]["start_flops"]  # is paid once
    expected = start + (costs["flops_equal_batch"] - start) / 2
    assert scale_ledger(ledgers[128], half)["flops_equal_updates"] == pytest.approx(expected)


def test_a_ledger_scaled_by_hand():
    ledger = {
        "flops": 1000.0,
        "start_flops": 100,
        "step_flops": 200,
        "logit_flops": 300,
        "seconds": 2.0,
        "batch_size": 64,
        "pair_samples": 1280,
        "updates_per_pair": {"a:t": 20, "b:t": 0},  # one is trained, one is only predicted
    }
    reference = {"batch_size": 32, "pair_samples": 3840, "updates_per_pair": {"a:t": 60, "b:t": 60}}
    costs = scale_ledger(ledger, reference)
    assert costs["flops_equal_batch"] == 1000 + 300 * (0.5 - 1) + 200 * (2 - 1)
    assert costs["flops_equal_updates"] == 100 + (costs["flops_equal_batch"] - 100) * 1920 / 1280
    assert (costs["flops"], costs["seconds"], costs["pair_samples"]) == (1000, 2, 1280)

    closed_form = ledger | {"start_flops": 1000.0, "step_flops": 0, "logit_flops": 0}
    assert trained_by_batches(ledger) and not trained_by_batches(closed_form)
    costs = scale_ledger(closed_form, reference)
    assert costs["flops_equal_batch"] == costs["flops_equal_updates"] == 1000


def test_the_ledgers_of_all_kinds_of_runs_say_what_goes_with_what(runs):
    ledgers = {name: read_ledger(runs / name) for name in ("grid", "halving", "hyma", "ridge")}
    for name, ledger in ledgers.items():
        assert trained_by_batches(ledger) == (name != "ridge")
        rest = ledger["start_flops"] + ledger["step_flops"] + ledger["logit_flops"]
        assert rest < ledger["flops"] or name == "ridge"
    assert ledgers["grid"]["start_flops"] == 0 < ledgers["hyma"]["start_flops"]
    assert ledgers["ridge"]["start_flops"] == ledgers["ridge"]["flops"]


def test_the_cost_of_several_seeds_is_their_mean(runs, graded):
    data = Embeddings(graded)
    grid = read_run(runs / "grid")
    dearer = grid._replace(ledger=grid.ledger | {"flops": 3 * grid.ledger["flops"], "seconds": 5.0})
    cost = cost_of_runs([grid, dearer], data, ["efflite1", "mpnet"], grid.ledger, count_different(data))
    assert cost.flops == pytest.approx(2 * grid.ledger["flops"])
    assert cost.seconds == pytest.approx((grid.ledger["seconds"] + 5) / 2)
    assert cost.batch_size == 128 and cost.updates_low == cost.updates_high == grid.ledger["steps"]
    assert cost.rows_embedded == 2 * 900 and cost.embedding_flops is None


def test_the_cost_of_a_selector(graded):
    data = Embeddings(graded)
    cost = cost_of_selector({"flops": 7e9, "seconds": 0.5, "rows": 200}, data, ["efflite1", "mpnet"], pair_count=6)
    assert cost.flops == cost.flops_equal_batch == cost.flops_equal_updates == 7e9
    assert cost.pair_samples == 1200 and cost.rows_embedded == 400 and cost.updates_high == 0
    assert cost_of_selector(NO_COST, data, [], 6).flops == 0


def test_times_is_none_where_a_cost_is_not_known():
    assert cost_ratio(Cost(flops=1.0), Cost(flops=4.0), "flops") == 0.25
    assert cost_ratio(Cost(), Cost(flops=4.0), "flops") is None
    assert cost_ratio(Cost(flops=1.0), Cost(), "flops") is None
    assert cost_ratio(Cost(flops=1.0), Cost(flops=0.0), "flops") is None


def test_the_cost_of_embedding_is_in_the_manifest(tmp_path, planted):
    vectors = {name: torch.eye(vlm.ENCODERS[name].dim)[:4] for name in ("efflite0", "minilm_l6", "mpnet")}
    folder = make_embedding_folder(tmp_path / "e", [{}] * 4, **vectors)
    manifest = vlm.read_json(folder / "manifest.json")
    manifest["encoders"]["efflite0"]["flops_per_row"] = 768_000_000
    manifest["encoders"]["minilm_l6"]["flops_per_row"] = 190_000_000
    write_json(folder / "manifest.json", manifest)
    data = Embeddings(folder)
    ten = count_in_proportion(data, 10)
    assert embedding_flops(data, ["efflite0", "minilm_l6"], ten) == 10 * (768_000_000 + 190_000_000)
    assert embedding_flops(data, ["efflite0", "mpnet"], ten) is None  # nobody has counted mpnet's
    for row, image in zip(data.rows, "aaab"):
        row["image"] = image
    ten = count_in_proportion(data, 10)
    assert embedding_flops(data, ["efflite0", "minilm_l6"], ten) == 5 * 768_000_000 + 10 * 190_000_000  # a picture once
    assert count_different(data, torch.tensor([0, 1, 3])) == {"image": 2, "text": 3} and count_different(data)["image"] == 2
    # A selector's rows have a picture each, however many captions the pictures have.
    cost = cost_of_selector({"flops": 0, "seconds": 0.0, "rows": 2}, data, ["efflite0"], 1)
    assert cost.embedding_flops == 2 * 768_000_000
    for row in data.rows:
        row["image"] = row["caption"]
    spent = {"flops": 5, "seconds": 0.0, "rows": 10}
    cost = cost_of_selector(spent, data, ["efflite0", "minilm_l6"], 1)
    assert cost.embedding_flops == 9_580_000_000 and cost.flops_with_embedding == 9_580_000_005
    assert cost_of_selector(spent, data, ["efflite0", "mpnet"], 1).flops_with_embedding is None
    assert embedding_flops(Embeddings(planted), ["efflite0"], count_different(Embeddings(planted))) is None  # published files have no manifest
