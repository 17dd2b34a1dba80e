"""hyma/training.py: what both trainers share: flags, schedule, batches, the loss of a step, validation."""

import argparse
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU

from hyma.batches import BLOCK_ROWS, WINDOW_ROWS, Batches, draw_rows, epoch_order
from hyma.casting import cast_layers
from hyma.embeddings import Embeddings, RowStore
from hyma.hypernetworks import FactoredHypernetwork
from hyma.metrics import Retrieval
from hyma.printed_ranking import half_interval, print_ranking
from hyma.settled import is_settled
from hyma.splits import split_rows
from hyma.training import (
    StepLosses,
    check_weights,
    learning_rate,
    mean_recall10,
    pair_losses,
    progress_line,
    separate_layers,
    training_dtype,
    validate,
)
from hyma.training_flags import recipe_of
from kernels import Layer
from vlm import BadInput

# ---------------------------------------------------------------------------------------------------------------- flags


def flags_of(**flags):
    given = {"lr": 0.1, "connector": "mlp0", "budget_of": "full", "from_run": None, "seed": 0, "out": "x", "data": "d"}
    return argparse.Namespace(**given | flags)


def test_runs_that_differ_in_their_seed_alone_share_a_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_grid.py"])
    recipe = recipe_of(flags_of())
    assert recipe == {"script": "train_grid.py", "lr": 0.1, "connector": "mlp0", "budget_of": "full"}
    assert recipe_of(flags_of(seed=1, out="y", data="elsewhere", device="cuda")) == recipe
    assert recipe_of(flags_of(lr=0.2)) != recipe and recipe_of(flags_of(rows=100)) != recipe
    monkeypatch.setattr(sys, "argv", ["train_hyma.py"])
    assert recipe_of(flags_of()) != recipe


def test_a_recipe_forgets_which_seeds_run_it_takes_budget_or_connectors_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_grid.py"])
    budgets = [recipe_of(flags_of(budget_of=name)) for name in ("runs/hyma", "runs/hyma-1")]
    assert budgets[0] == budgets[1] != recipe_of(flags_of())
    starts = [recipe_of(flags_of(from_run=name)) for name in ("runs/hyma", "runs/hyma-1")]
    assert starts[0] == starts[1] != recipe_of(flags_of())


# ------------------------------------------------------------------------------------------------- schedule and batches


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate(step, 120, 0.4, 20) for step in range(120)]
    assert rates[0] == pytest.approx(0.4 / 20) and rates[19] == rates[20] == pytest.approx(0.4)
    assert rates[70] == pytest.approx(0.2) and 0 < rates[119] < 1e-3
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert learning_rate(0, 10, 0.4, 0) == pytest.approx(0.4)


def test_rows_are_dealt_once_an_epoch():
    rows = torch.arange(100, 203)
    seen = torch.cat([draw_rows(step, 3, rows, 10) for step in range(10)])
    assert len(seen.unique()) == 100 and not torch.equal(seen[:10], torch.arange(100, 110))
    assert torch.equal(draw_rows(14, 3, rows, 10), draw_rows(14, 3, rows, 10))
    assert not torch.equal(draw_rows(14, 3, rows, 10), draw_rows(4, 3, rows, 10))


def test_seeds_draw_other_rows():
    """A whole run of them: torch's CPU generator takes 32 bits of a seed alone."""
    rows = torch.arange(100)
    dealt = [torch.cat([draw_rows(step, seed, rows, 10) for step in range(20)]) for seed in range(20)]
    assert len({tuple(each.tolist()) for each in dealt}) == 20


def test_many_rows_are_dealt_in_shuffled_blocks():
    """Each once an epoch, and those of a window from few blocks, so that a disk reads them in one go."""
    rows = torch.arange(3 * WINDOW_ROWS + 1000)
    steps = len(rows) // 512
    dealt = [draw_rows(step, 0, rows, 512) for step in range(2 * steps)]
    for epoch in (dealt[:steps], dealt[steps:]):
        assert len(torch.cat(epoch).unique()) == steps * 512
        window = torch.cat(epoch[: WINDOW_ROWS // 512])
        blocks = (window // BLOCK_ROWS).unique()
        assert len(blocks) <= WINDOW_ROWS // BLOCK_ROWS + 1 and blocks.diff().max() > 1
        assert epoch[0].diff().abs().median() > BLOCK_ROWS  # and not in their order
    assert not torch.equal(dealt[0], dealt[steps])


@pytest.mark.parametrize("batch_size", [100, 7])
def test_rows_that_do_not_fit_are_read_ahead_to_the_same_batches(planted, monkeypatch, batch_size):
    """Windows of 256 rows, over two epochs, and once more from the middle of one, as a resumed run has them."""
    monkeypatch.setattr("hyma.batches.WINDOW_ROWS", 256)
    monkeypatch.setattr("hyma.batches.BLOCK_ROWS", 32)
    epoch_order.cache_clear()
    data, rows, names = Embeddings(planted), torch.arange(10, 860), ["efflite0", "mpnet"]
    resident = RowStore(data, names, CPU)
    monkeypatch.setattr("hyma.embeddings.bytes_for_files", lambda: 1000)
    streamed = RowStore(data, names, CPU)
    assert resident.is_resident and not streamed.is_resident
    steps = 2 * (850 // batch_size)
    for first in (0, steps // 3):
        one, two = Batches(resident, 3, rows, batch_size), Batches(streamed, 3, rows, batch_size)
        for step in range(first, steps):
            of_one, of_two = one.rows_of(step), two.rows_of(step)
            assert torch.equal(of_one, of_two) and torch.equal(of_one, draw_rows(step, 3, rows, batch_size))
            for name in names:
                assert torch.equal(resident.take(name, of_one), streamed.take(name, of_two))
            assert streamed.window["mpnet"].shape[0] <= 256
        streamed.tensors = {}  # a step takes nothing from the files
        streamed.take("mpnet", of_two)
        with pytest.raises(KeyError):
            streamed.take("mpnet", of_two.clone())
        streamed = RowStore(data, names, CPU)
    epoch_order.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_taken_a_part_at_a_time_to_the_same_bits(planted, monkeypatch, dtype):
    store, rows = RowStore(Embeddings(planted), ["efflite0"], CPU), torch.arange(850).flip(0)
    whole = store.take("efflite0", rows, dtype)
    assert whole.dtype == dtype and torch.equal(whole, F.normalize(store.tensors["efflite0"][rows].float(), dim=1).to(dtype))
    monkeypatch.setattr("hyma.embeddings.ROWS_AT_ONCE", 100)
    assert torch.equal(store.take("efflite0", rows, dtype), whole)
    assert store.take("efflite0", rows[:0], dtype).shape == (0, whole.shape[1])


# --------------------------------------------------------------------------------------------------- the loss of a step


class SeparateConnectors(torch.nn.Module):
    """A generator by the protocol: random connectors that share nothing."""

    def __init__(self, dims, pairs, hidden_layers):
        super().__init__()
        self.pairs, self.layers = pairs, torch.nn.ModuleList()
        for image, text in pairs:
            widths = [dims[text]] + [48] * hidden_layers + [dims[image]]
            self.layers.append(torch.nn.ModuleList(torch.nn.Linear(*each) for each in zip(widths, widths[1:])))

    def predict(self, image, text):
        return [(layer.weight, layer.bias) for layer in self.layers[self.pairs.index((image, text))]]

    def forward(self, features, pairs):
        return separate_layers(features, pairs, [self.predict(*pair) for pair in pairs])


def through(layers, x):
    """A connector in plain torch."""
    for k, (weight, bias) in enumerate(layers):
        x = F.linear(x, weight, bias)
        if k < len(layers) - 1:
            x = F.relu(x)
    return x


@pytest.fixture
def small(planted):
    """A RowStore of the planted rows, pairs of its encoders, and connectors for them."""
    torch.manual_seed(0)
    data = Embeddings(planted)
    store = RowStore(data, ["efflite1", "control", "minilm_l6", "mpnet"], CPU)
    pairs = [("efflite1", "mpnet"), ("control", "minilm_l6"), ("efflite1", "minilm_l6")]
    return data, store, pairs, SeparateConnectors(store.dims, pairs, hidden_layers=1)


def test_the_loss_is_symmetric_info_nce(small):
    """The mean of both cross entropies of the scaled cosines, written out, and its gradient."""
    _, store, pairs, generator = small
    rows = torch.arange(40)
    losses = pair_losses(generator, store, rows, pairs, torch.float32, 20.0)
    expected = []
    for image, text in pairs:
        mapped = F.normalize(through(generator.predict(image, text), store.take(text, rows)), dim=1)
        logits = 20 * mapped @ store.take(image, rows).T
        right = torch.arange(40)
        expected.append((F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2)
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)

    found = torch.autograd.grad(losses.sum(), list(generator.parameters()))
    gradients = torch.autograd.grad(sum(expected), list(generator.parameters()))
    for one, two in zip(found, gradients):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_not_finite_names_its_pair():
    pairs = [("a", "t"), ("b", "t")]
    means = []
    losses = StepLosses(means)
    losses.add(6, pairs, torch.tensor([1.0, 3.0]))
    assert means == []  # nothing has waited for the device
    losses.read()
    assert means == [2.0]
    losses.add(7, pairs, torch.tensor([1.0, torch.inf]))
    losses.add(8, pairs, torch.tensor([torch.nan, torch.nan]))
    with pytest.raises(BadInput, match="step 7: the loss of b:t is inf; what was saved before is kept"):
        losses.read()
    for step in range(StepLosses.READ_EVERY - 3):
        losses.add(step, pairs, torch.zeros(2))
    with pytest.raises(BadInput, match="step 7"):
        losses.add(9, pairs, torch.zeros(2))


def test_weights_that_are_not_finite_are_not_saved():
    check_weights({"a": torch.ones(3)}, 7)
    with pytest.raises(BadInput, match="step 7: the update made b not finite; what was saved before is kept"):
        check_weights({"a": torch.ones(3), "b": torch.tensor([1.0, torch.inf])}, 7)


def test_lower_precision_has_nearly_the_same_loss(small):
    _, store, pairs, generator = small
    rows = torch.arange(40)
    dtypes = [training_dtype(name) for name in ("fp32", "tf32", "bf16")]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
    fp32, _, bf16 = (pair_losses(generator, store, rows, pairs, dtype, 20.0) for dtype in dtypes)
    assert bf16.dtype == torch.float32
    torch.testing.assert_close(bf16, fp32, atol=0, rtol=0.02)


def test_lower_precision_keeps_what_little_texts_differ(small):
    """They are centred in float32: of texts near their mean, bfloat16 would keep a few bits of the difference."""

    class TextsNearTheirMean:
        def __init__(self, store):
            self.store, self.dims = store, store.dims
            self.mean = F.normalize(torch.randn(store.dims["mpnet"]), dim=0)

        def take(self, name, rows, dtype=torch.float32):
            x = self.store.take(name, rows, dtype)
            return self.mean + 0.02 * x if name == "mpnet" else x

    _, store, _, _ = small
    store = TextsNearTheirMean(store)
    images, texts = {"efflite1": store.dims["efflite1"]}, {"mpnet": store.dims["mpnet"]}
    generator = FactoredHypernetwork(images, texts, hidden_layers=1, rank=images["efflite1"])
    generator.mean_of("mpnet").copy_(store.mean)
    generator.scale = 50 * generator.scale
    rows, pairs = torch.arange(40), [("efflite1", "mpnet")]
    fp32, bf16 = (pair_losses(generator, store, rows, pairs, dtype, 100.0) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(bf16, fp32, atol=0, rtol=0.002)


def test_weights_are_cast_together_and_so_are_their_gradients():
    """As by .to(dtype) of each; a frozen weight, of a run that --add-encoder adds to, has no gradient."""
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=random, requires_grad=True) for shape in ((5, 3), (5,), (2, 5), (2,))]
    tensors[1].requires_grad_(False)
    layers = [Layer([tensors[0]], [tensors[1]], [(0, 0)]), Layer([tensors[2]], [tensors[3]], [(0, 0)])]
    assert cast_layers(layers, torch.float32) is layers

    cast = []
    for layer in cast_layers(layers, torch.bfloat16):
        cast += [*layer.weights, *layer.biases]
    factors = [torch.randn(tensor.shape, generator=random).bfloat16() for tensor in tensors]
    total = sum((tensor * factor).float().sum() for tensor, factor in zip(cast, factors))
    assert all(torch.equal(one, tensor.to(torch.bfloat16)) for one, tensor in zip(cast, tensors))
    assert [one.requires_grad for one in cast] == [True, False, True, True]
    total.backward()
    assert tensors[1].grad is None
    for k in (0, 2, 3):
        assert tensors[k].grad.dtype == torch.float32 and torch.equal(tensors[k].grad, factors[k].float())


def test_validation_is_the_recall_of_each_pairs_connector(small):
    data, store, pairs, generator = small
    retrieval = Retrieval(data, split_rows(data)[1], CPU)
    recalls = validate(generator, store, retrieval, pairs)
    assert list(recalls) == [":".join(pair) for pair in pairs]
    for image, text in pairs:
        mapped = through(generator.predict(image, text), store.take(text, retrieval.rows))
        six = retrieval.recalls(mapped.detach(), store.take(image, retrieval.rows))
        assert recalls[f"{image}:{text}"] == pytest.approx(six, abs=0.012)  # one row of ninety
    assert mean_recall10({"a:t": [0, 0, 0.2, 0, 0, 0.4], "b:t": [0, 0, 0.5, 0, 0, 0.7]}) == pytest.approx(0.45)


# ------------------------------------------------------------------------------------------------------ what is printed


@pytest.mark.parametrize("score", ["val_recall10", "expected_recall"])
def test_the_ranking_leads_with_the_score_that_ranks_and_brackets_what_chance_can_explain(planted, capfd, score):
    """900 pictures: points of 2.2 and 7.8 below the first."""
    retrieval = Retrieval(Embeddings(planted), torch.arange(900), CPU)
    ranking, recalls = [], {}
    for rank, (image, recall) in enumerate((("first", 0.5), ("second", 0.478), ("third", 0.422)), 1):
        row = {"image": image, "text": "t", "rank": rank, "val_recall10": recall}
        ranking.append(row | {score: recall})
        recalls[f"{image}:t"] = [0.1, 0.2, recall] * 2
    print_ranking(ranking, recalls, retrieval)
    out = capfd.readouterr().out
    lines = [line for line in out.splitlines() if " t " in line]
    assert [line[0] for line in lines] == ["┌", "└", " "]
    assert [line[1:].split()[:2] for line in lines] == [["1", "50.0"], ["2", "47.8"], ["3", "42.2"]]
    assert "± 3.3" in lines[0] and ("expected" in out) == (score == "expected_recall")
    assert "The 2 pairs in the bracket cannot be told apart on 900 validation pictures." in out


def test_a_recall_of_none_or_of_all_is_as_uncertain_as_few_queries_are():
    """Wilson's interval at 0 and 1; elsewhere the usual one."""
    wilson = 1.96**2 / (33 + 1.96**2)
    assert half_interval(0, 33) == pytest.approx(wilson) and half_interval(1, 33) == pytest.approx(wilson)
    assert half_interval(0.25, 373) == pytest.approx(1.96 * (0.25 * 0.75 / 373) ** 0.5)
    assert 0 < half_interval(1, 1) <= 1


def validation(step, **scores):
    """A line of metrics.jsonl. scores: R@10 of each pair, from text to image; the other direction has 0.1 less."""
    recalls = {f"{image}:t": [0, 0, score, 0, 0, score - 0.1] for image, score in scores.items()}
    return {"step": step, "loss": 2.5, "val_recall10": 0.3, "recalls": recalls}


def test_the_progress_shows_the_loss_the_best_pair_and_how_long_it_has_led():
    state = {"losses": [], "metrics": []}
    assert progress_line(state) == {}
    state["losses"] = [4.0, 3.0]
    assert progress_line(state) == {"loss": "3.000"}
    for line in (validation(10, a=0.2, b=0.1), validation(20, a=0.2, b=0.4), validation(30, a=0.3, b=0.4)):
        state["metrics"].append(line)
    state["losses"] = []
    assert progress_line(state) == {"loss": "2.500", "val_R10": "30.0%", "best": "b:t 35.0% since step 20"}
    state["metrics"].append(validation(40, a=0.3, b=0.2))
    assert progress_line(state)["best"] == "a:t 25.0% since step 40"


def test_a_ranking_settles_when_three_validations_agree():
    def settled(metrics):
        return is_settled(metrics, metrics[0]["recalls"])

    alike = [
        validation(10, a=0.2, b=0.3, c=0.4),
        validation(20, a=0.3, b=0.4, c=0.5),
        validation(30, a=0.1, b=0.3, c=0.6),
    ]
    assert settled(alike) and not settled(alike[:2])
    assert not settled([*alike, validation(40, a=0.3, b=0.2, c=0.6)])  # the same pair leads, others change places
    assert not settled([*alike, validation(40, a=0.7, b=0.6, c=0.5)])
    others = [validation(10, a=0.9, b=0.3, c=0.4), validation(20, a=0.3, b=0.4, c=0.5), *alike[2:]]
    assert not settled(others) and settled([*others, *alike[2:]])
    assert not settled([validation(step, a=0.2, b=0.2) for step in (10, 20, 30)])  # nothing tells them apart
    assert settled([validation(step, a=0.2) for step in (10, 20, 30)])
    base = {f"base{k}": 0.5 + 0.01 * k for k in range(27)}  # of a run that encoders are added to: their order is settled
    turned = [validation(10 * k, a=(0.1, 0.3)[k % 2], b=0.2, c=(0.3, 0.1)[k % 2], **base) for k in range(1, 4)]
    assert settled(turned) and not is_settled(turned, ["a:t", "b:t", "c:t"])
