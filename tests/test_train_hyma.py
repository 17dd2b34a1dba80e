"""train_hyma.py by its command line: the run folder, kill and resume, generators, faults, and the arithmetic."""

import csv
import json
import math
import re
import runpy
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import vlm
from hyma.closed_form import PICTURE_RIDGE, Covariance, fold_rows, leading_axes, whitened
from hyma.costs import FACTORISATIONS
from hyma.embeddings import Embeddings, RowStore, split_rows
from hyma.files import read_jsonl
from hyma.metrics import Retrieval, expected
from hyma.training import draw_rows, validate
from kernels import clip_loss, connector_mlp

QUICK = ("--epochs", "6", "--batch-size", "128", "--warmup-steps", "5", "--device", "cpu")


@pytest.fixture(scope="session")
def script():
    """train_hyma.py's own names, for its arithmetic."""
    return type(
        "script",
        (),
        {
            k: staticmethod(v) if callable(v) and not isinstance(v, type) else v
            for k, v in runpy.run_path(str(ROOT / "train_hyma.py")).items()
        },
    )


def ranking(folder):
    with open(folder / "ranking.csv", newline="") as file:
        return list(csv.DictReader(file))


def connectors(folder):
    return {path.name: torch.load(path, weights_only=True) for path in (folder / "connectors").glob("*.pt")}


def same_connectors(one, two):
    one, two = connectors(one), connectors(two)
    return one.keys() == two.keys() and all(torch.equal(one[n][k], two[n][k]) for n in one for k in one[n])


def test_run_folder(run, planted, tmp_path):
    result = run("train_hyma.py", "--pairs", "all", "--data", planted, "--out", "runs/x", *QUICK)
    assert result.code == 0, result.err
    out = tmp_path / "runs" / "x"
    rows = ranking(out)
    columns = ["image", "text", "val_recall1", "val_recall5", "val_recall10", "rank", "expected_recall10"]
    assert list(rows[0]) == columns
    found = [float(row["expected_recall10"]) for row in rows]
    assert found == sorted(found, reverse=True) and "expected" in result.out
    assert len(rows) == 6 and [int(r["rank"]) for r in rows] == sorted(int(r["rank"]) for r in rows)
    assert {r["image"] for r in rows[:2]} == {"efflite1"} and {r["image"] for r in rows[-2:]} == {"control"}
    assert float(rows[0]["val_recall10"]) > 0.9 > 0.3 > float(rows[-1]["val_recall10"])

    config, ledger = vlm.read_json(out / "config.json"), vlm.read_json(out / "ledger.json")
    assert (
        config["flags"]["batch_size"] == 128
        and config["flags"]["pairs_per_step"] == 1  # a third of three
        and config["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert {"device", "commit", "embeddings", "pairs"} <= set(config)
    steps = 6 * (810 // 128)
    assert ledger["pairs"] == 6 and ledger["steps"] == steps and ledger["batch_size"] == 128
    assert ledger["updates_per_pair"] == {pair: steps // 6 for pair in config["pairs"]}
    assert ledger["pair_samples"] == 128 * steps
    assert (
        ledger["seconds"] > 0
        and ledger["peak_bytes"] > 1e6
        and ledger["flops"] > 1e9
        and ledger["trainable_parameters"] == (384 + 1) * 1024 + (768 + 1) * 1024 + (1024 + 1) * 3 * 256
    )
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [2, 4, 6] and metrics[-1]["loss"] < metrics[0]["loss"]

    best = out / "connectors" / f"{rows[0]['image']}_mlp1_{rows[0]['text']}.pt"
    assert (
        f"best connector: runs/x/connectors/{best.name}" in result.out
        and "get_vlm_from_checkpoint('runs/x/connectors/" in result.out
    )
    assert "chance at 1 / 5 / 10: 1.1 / 5.6 / 11.1" in result.out
    data = Embeddings(planted)
    _, validation = split_rows(data)
    for row in rows:  # the exported files alone give the scores of the ranking
        path = out / "connectors" / f"{row['image']}_mlp1_{row['text']}.pt"
        image, hidden, text, state = vlm.read_connector(path)
        connector = vlm.init_modality_connector(data.encoders[text].dim, [1024], data.encoders[image].dim)
        connector.load_state_dict(state)
        store = RowStore(data, [image, text], torch.device("cpu"))
        with torch.no_grad():
            six = Retrieval(data, validation, torch.device("cpu")).recalls(
                connector(store.take(text, validation)), store.take(image, validation)
            )
        assert (six[2] + six[5]) / 2 == pytest.approx(float(row["val_recall10"]), abs=0.01)
        card = vlm.read_json(path.with_suffix(".json"))
        assert card["image_encoder"] == vlm.ENCODERS[image].spec and card["val_recall10"] == float(row["val_recall10"])


@pytest.mark.parametrize("flags", [(), ("--generator", "mlp", "--width", "4", "--connector", "mlp0")])
def test_kill_and_resume_give_the_same_bits(run, spawn, planted, tmp_path, flags):
    flags = ("--data", planted, *QUICK, *flags, "--pairs", "*:minilm_l6")
    assert run("train_hyma.py", *flags, "--out", "whole").code == 0
    for epochs in (0, 2, 4):
        process = spawn("train_hyma.py", *(flags if epochs == 0 else ["--resume"]), "--out", "killed")
        until = time.time() + 120
        while process.poll() is None and time.time() < until:
            metrics = tmp_path / "killed" / "metrics.jsonl"
            if (tmp_path / "killed" / "config.json").exists() and (
                not epochs or metrics.exists() and len(metrics.read_text().splitlines()) >= epochs
            ):
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run("train_hyma.py", "--resume", "--out", "killed")
    assert result.code == 0, result.err
    assert same_connectors(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole" / "ranking.csv").read_bytes() == (tmp_path / "killed" / "ranking.csv").read_bytes()
    ledgers = [vlm.read_json(tmp_path / name / "ledger.json") for name in ("whole", "killed")]
    assert (
        ledgers[0]["updates_per_pair"] == ledgers[1]["updates_per_pair"] and ledgers[0]["flops"] == ledgers[1]["flops"]
    )


def test_resume_of_a_finished_run_and_contradictions(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--epochs", "1")
    assert run("train_hyma.py", *flags).code == 0
    (made,) = (tmp_path / "runs").iterdir()
    before = made / "ranking.csv"
    before = before.read_bytes()
    again = run("train_hyma.py", "--resume")  # the newest
    assert (
        again.code == 0
        and f"{made.relative_to(tmp_path)}" in again.out
        and (made / "ranking.csv").read_bytes() == before
    )
    refused("train_hyma.py", "--resume", "--out", made, "--seed", "5", says=["--seed 5", "contradicts"])
    refused("train_hyma.py", "--resume", "--out", "nowhere", says="holds no run")
    refused("train_hyma.py", *flags, "--out", made, says="holds a run already")
    whole = (made / "checkpoint.pt").read_bytes()
    (made / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    refused("train_hyma.py", "--resume", "--out", made, says="checkpoint.pt")


def test_resume_refuses_other_embeddings(run, refused, planted, tmp_path):
    shutil.copytree(planted, tmp_path / "data")
    assert run("train_hyma.py", "--data", "data", *QUICK, "--epochs", "1", "--out", "x").code == 0
    torch.save(torch.load(planted / "mpnet.pt", weights_only=True).flip(0), tmp_path / "data" / "mpnet.pt")
    refused("train_hyma.py", "--resume", "--out", "x", says="no longer those")


@pytest.mark.parametrize("generator", ["factored", "mlp"])
@pytest.mark.parametrize("connector", ["mlp0", "mlp1", "mlp2"])
def test_generators_learn_at_every_depth(run, planted, tmp_path, generator, connector):
    flags = ["--generator", generator, "--connector", connector, "--pairs", "efflite1:*", "control:mpnet"]
    flags += ["--width", "16"] if generator == "mlp" else []
    result = run("train_hyma.py", "--data", planted, "--out", "x", *QUICK, *flags)
    assert result.code == 0, result.err
    rows = ranking(tmp_path / "x")
    assert rows[-1]["image"] == "control" and float(rows[0]["val_recall10"]) > 0.3
    assert len(connectors(tmp_path / "x")) == 3
    for path in (tmp_path / "x" / "connectors").glob("*.pt"):
        vlm.read_connector(path)


def test_lower_precision_trains_alike(run, planted, tmp_path):
    for precision in ("fp32", "bf16"):
        assert (
            run(
                "train_hyma.py",
                "--data",
                planted,
                "--out",
                precision,
                *QUICK,
                "--epochs",
                "2",
                "--pairs",
                "efflite1:mpnet",
                "--precision",
                precision,
            ).code
            == 0
        )
    fp32, bf16 = (read_jsonl(tmp_path / p / "metrics.jsonl")[-1]["loss"] for p in ("fp32", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.02)


def test_the_whitened_map_against_float64(script):
    """C_yy^-1 C_yx C_xx^-1, and where it matters: a loud direction that no text tells must not lead."""
    torch.manual_seed(0)
    x, y = torch.randn(500, 24), torch.randn(500, 40)
    y[:, :24] += 0.5 * x
    x, y = x - x.mean(0), y - y.mean(0)
    a, b = x.double(), y.double()
    gram_x, gram_y = a.T @ a, b.T @ b
    gram_x += script.SHARED_RIDGE * gram_x.trace() / 24 * torch.eye(24)
    gram_y += PICTURE_RIDGE * gram_y.trace() / 40 * torch.eye(40)
    expected = torch.linalg.inv(gram_y) @ b.T @ a @ torch.linalg.inv(gram_x)
    texts, pictures = Covariance(x + 3, script.SHARED_RIDGE), Covariance(y, PICTURE_RIDGE)
    found = whitened(pictures.rows.T @ texts.rows, texts, pictures)
    across = F.normalize(pictures.mean.double(), dim=0)
    expected -= torch.outer(across, across) @ expected
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(texts.mean, x.mean(0) + 3)
    rest = a[99:].T @ a[99:]
    rest += script.SHARED_RIDGE * rest.trace() / 24 * torch.eye(24)
    left_out = texts.solve_without(texts.rows[:99], torch.eye(24)).double()
    torch.testing.assert_close(left_out, torch.linalg.inv(rest), rtol=1e-4, atol=1e-9)

    y[:, 39] = 30 * torch.randn(500) + x[:, 0]
    pictures = Covariance(y, PICTURE_RIDGE)
    products = pictures.rows.T @ texts.rows
    ridge = texts.solve(products.T).T
    loud = [weight[39].norm() / weight.norm() for weight in (ridge, whitened(products, texts, pictures))]
    assert loud[1] < loud[0] / 3


@pytest.fixture
def started(script, planted):
    """Builds a generator of some depth and starts it, on some pictures: everything that main has by then."""

    def start(hidden_layers, shuffled=False):
        data, cpu = Embeddings(planted), torch.device("cpu")
        images, texts = data.names("image"), data.names("text")
        store, (rows, val_rows) = RowStore(data, images + texts, cpu), split_rows(data)
        for image in images if shuffled else []:
            order = torch.randperm(data.row_count, generator=torch.Generator().manual_seed(1))
            store.tensors[image] = store.tensors[image][order]
        torch.manual_seed(0)
        widths = [{name: store.dims[name] for name in names} for names in (images, texts)]
        generator, folds = script.Factored(*widths, hidden_layers, 64), fold_rows(data, rows, val_rows, 0)
        judged = script.start(generator, store, folds, data, [(i, t) for i in images for t in texts])
        return data, store, rows, val_rows, generator, folds, judged

    return start


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_the_start_is_a_linear_map_that_already_ranks(script, started, hidden_layers):
    """relu(s) - relu(-s) = s at every depth, and the planted encoder leads before any step."""
    data, store, rows, val_rows, generator, _, judged = started(hidden_layers)
    cpu, images, texts = torch.device("cpu"), data.names("image"), data.names("text")
    retrieval, scores = Retrieval(data, val_rows, cpu), {}
    for image in images:
        for text in texts:
            layers = generator.predict(image, text)
            connector = vlm.init_modality_connector(store.dims[text], [1024] * hidden_layers, store.dims[image])
            connector.load_state_dict(dict(zip(connector.state_dict(), (t for layer in layers for t in layer))))
            with torch.no_grad():
                a, b = store.take(text, rows[:50]), store.take(text, rows[50:100])
                middle = (connector(a) + connector(b)) / 2
                torch.testing.assert_close(
                    connector((a + b) / 2), middle, rtol=0, atol=1e-3 * middle.abs().max().item()
                )
                found = retrieval.recalls(connector(store.take(text, val_rows)), store.take(image, val_rows))
            scores[image, text] = (found[2] + found[5]) / 2
    best = sorted(scores, key=scores.get, reverse=True)
    assert {image for image, _ in best[:2]} == {"efflite1"} and scores[best[0]] > 0.8
    for (image, text), score in scores.items():  # rows the start has not seen, twice
        assert sum(judged[f"{image}:{text}"]) / 3 == pytest.approx(score, abs=0.1)
    for axes in generator.axes:
        torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), rtol=0, atol=1e-4)


def test_cross_validation_is_blind_to_the_fold_it_judges(script, started):
    """Against inverses in float64; and pictures dealt out anew are at chance, though a start fits its own rows far above."""
    data, store, _, _, generator, folds, found = started(0)
    first, every = len(folds[0]), {name: store.take(name, torch.cat(folds)) for name in store.dims}
    means = {name: rows.mean(0) for name, rows in every.items()}
    every = {name: rows - means[name] for name, rows in every.items()}
    s = leading_axes([every[text] for text in generator.texts], generator.shared)
    x, s, y = (rows.double() for rows in (every["mpnet"], s - s.mean(0), every["efflite1"]))

    def inverse(rows, strength, without):
        gram = rows.T @ rows - without.T @ without
        return torch.linalg.inv(gram + strength * gram.trace() / len(gram) * torch.eye(len(gram)))

    to_s = inverse(x, script.TEXT_RIDGE, x[:first]) @ x[first:].T @ s[first:]
    weight = inverse(y, PICTURE_RIDGE, y[:0]) @ y[first:].T @ s[first:]
    across = F.normalize(means["efflite1"].double(), dim=0)
    weight = (weight - torch.outer(across, across) @ weight) @ inverse(s, script.SHARED_RIDGE, s[:first])
    retrieval = Retrieval(data, folds[0], torch.device("cpu"))
    six = retrieval.recalls(x[:first] @ to_s @ weight.T, y[:first])
    assert found["efflite1:mpnet"][0] == pytest.approx((six[2] + six[5]) / 2, abs=0.015)

    data, store, rows, _, generator, folds, found = started(0, shuffled=True)
    assert sum(map(sum, found.values())) / sum(map(len, found.values())) < 1.5 * retrieval.chance[2]
    own, seen = script.InAxes(store, generator, ["efflite1"], rows), Retrieval(data, folds[0], torch.device("cpu"))
    six = validate(generator, own, seen, [("efflite1", "mpnet")])["efflite1:mpnet"]
    assert (six[2] + six[5]) / 2 > 3 * retrieval.chance[2]


def test_every_matrix_product_of_the_start_is_counted(script, started):
    """What torch's counter and the script's factorisations do not know, they do not count."""
    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(op.overloadpacket)
            return op(*args, **(kwargs or {}))

    with Seen():
        started(1)
    heavy = {op for op in seen if re.search("mm|linalg|cholesky|triangular|qr|svd|eig|einsum", str(op))}
    norms = {torch.ops.aten.linalg_vector_norm, torch.ops.aten._linalg_check_errors}
    assert len(heavy) >= 5 and heavy <= {*FACTORISATIONS, *flop_registry, *norms}


def test_folds_keep_a_pictures_captions_together(script, planted):
    data = Embeddings(planted)
    rows, val_rows = split_rows(data)
    data.rows = [{"image": f"picture {k // 3}"} for k in range(data.row_count)]
    folds = fold_rows(data, rows, val_rows, seed=0)
    assert [len(fold) for fold in folds] == pytest.approx([90, 90, 90, 540], abs=5)
    assert torch.equal(torch.cat(folds).sort().values, rows)
    pictures = [{data.rows[i]["image"] for i in fold.tolist()} for fold in folds]
    assert sum(map(len, pictures)) == len(set().union(*pictures))
    again, other = (fold_rows(data, rows, val_rows, seed=seed) for seed in (0, 1))
    assert all(map(torch.equal, folds, again)) and not all(a.tolist() == b.tolist() for a, b in zip(folds, other))
    assert [len(fold) for fold in fold_rows(data, rows[:4], val_rows, seed=0)] == [3, 1, 0]


def test_what_ranks_follows_validation_as_far_as_it_is_not_noise(script):
    def recalls(scores):
        return {f"a{k}:t": [0, 0, score, 0, 0, score] for k, score in enumerate(scores)}

    scores, folds = [0.5, 0.41, 0.3, 0.22, 0.1], [0.4, 0.5, 0.3, 0.2, 0.1]
    exact = {f"a{k}:t": [score] * 3 for k, score in enumerate(folds)}  # folds that agree: no noise, validation alone
    found = expected(recalls(scores), exact, 1.0)
    assert list(found.values()) == pytest.approx(scores)
    random = torch.Generator().manual_seed(0)
    noisy = {
        k: [score + e for e in (0.3 * torch.randn(3, generator=random)).tolist()] for k, score in zip(exact, folds)
    }
    mean = torch.tensor([sum(v) / 3 for v in noisy.values()], dtype=torch.float64)
    design = torch.stack([torch.ones(5, dtype=torch.float64), mean], dim=1)
    direct = torch.tensor(scores, dtype=torch.float64)
    line = design @ torch.linalg.lstsq(design, direct[:, None]).solution[:, 0]
    found = expected(recalls(scores), noisy, 2.0)  # noise above the residuals: one part in 1 + 2 * 3 is kept
    assert list(found.values()) == pytest.approx((line + (direct - line) / 7).tolist(), abs=1e-6)
    tied = expected(recalls([1.0] * 5), noisy, 2.0)  # R@10 of ten rows: a tie, to the digit
    assert set(tied.values()) == {1.0}
    assert expected(recalls(scores[:3]), exact, 1.0) == {} == expected(recalls(scores), {}, 1.0)


def test_a_pair_that_was_never_trained_is_predicted(run, planted, tmp_path):
    """Both encoders of efflite0:mpnet are seen, in other pairs."""
    flags = ("--pairs", "efflite1:*", "efflite0:minilm_l6", "--predict", "efflite0:*")
    result = run("train_hyma.py", "--data", planted, "--out", "x", *QUICK, *flags)
    assert result.code == 0, result.err
    ledger = vlm.read_json(tmp_path / "x" / "ledger.json")
    assert ledger["pairs"] == 3 and ledger["updates_per_pair"]["efflite0:mpnet"] == 0
    scores = {(r["image"], r["text"]): float(r["val_recall10"]) for r in ranking(tmp_path / "x")}
    assert scores["efflite0", "mpnet"] > 0.3 and (tmp_path / "x" / "connectors" / "efflite0_mlp1_mpnet.pt").exists()


def test_bad_input(run, refused, planted, tmp_path):
    base = ("--data", planted, "--device", "cpu")
    refused("train_hyma.py", *base, "--width", "8", says=["--width 8", "contradicts"])
    refused("train_hyma.py", *base, "--rank", "8", "--generator", "mlp", says=["--rank 8", "contradicts"])
    refused(
        "train_hyma.py", *base, "--pairs", "efflite0:*", "--predict", "control:mpnet", says="control must be in a pair"
    )
    refused("train_hyma.py", *base, "--pairs", "vit_l16:mpnet", says=["vit_l16:mpnet", "efflite1", "minilm_l6"])
    refused("train_hyma.py", *base, "--batch-size", "900", says=["--batch-size 900", "810"])
    refused("train_hyma.py", *base, "--batch-size", "0", says="--batch-size 0")
    refused("train_hyma.py", *base, "--batch-size", "1", says="--batch-size 1")
    refused("train_hyma.py", *base, "--logit-scale", "0.5", says="--logit-scale")
    refused("train_hyma.py", *base, "--epochs", "-1", says="--epochs -1")
    refused("train_hyma.py", "--data", "nowhere", says="no such embedding folder")
    refused("train_hyma.py", "--resume", says="no run in runs/")
    (tmp_path / "text").mkdir()
    shutil.copy(planted / "mpnet.pt", tmp_path / "text")
    refused("train_hyma.py", "--data", "text", says="0 image and 1 text encoders")
    if not torch.cuda.is_available():
        refused("train_hyma.py", "--data", planted, "--device", "cuda", says="no GPU")
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(refused, planted, tmp_path):
    flags = ("--lr", "1e30", "--warmup-steps", "0", "--epochs", "3", "--clip-norm", "1e9")
    refused("train_hyma.py", "--data", planted, "--out", "x", *QUICK, *flags, says=["the loss of", "nan", "--lr"])
    assert not connectors(tmp_path / "x")


def test_collapse_to_chance_is_said(run, planted, tmp_path):
    result = run("train_hyma.py", "--data", planted, "--out", "x", *QUICK, "--lr", "1e-9", "--pairs", "control:*")
    assert result.code == 0 and "All pairs are at chance" in result.out
    result = run(
        "train_hyma.py",
        "--data",
        planted,
        "--out",
        "y",
        *QUICK,
        "--warmup-steps",
        "40",
        "--epochs",
        "12",
        "--lr",
        "30",
        "--pairs",
        "efflite1:*",
    )
    said = "collapsed to chance" in result.out + result.err
    scores = [m["val_recall10"] for m in read_jsonl(tmp_path / "y" / "metrics.jsonl")]
    assert said == any(score < 2 * 10 / 90 < max(scores[: k + 1]) for k, score in enumerate(scores))
    assert float(ranking(tmp_path / "y")[0]["val_recall10"]) >= max(scores)


def test_an_encoder_joins_a_finished_run(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--pairs", "efflite0:*", "control:*", "--seed", "1")
    assert run("train_hyma.py", *flags, "--out", "x").code == 0
    add = ("--add-encoder", "efflite1", "--from", "x")
    result = run("train_hyma.py", *add, "--out", "y")
    assert result.code == 0 and "2 of 3 image and 2 text encoders, 1 a step" in result.out, result.err
    rows, before, after = ranking(tmp_path / "y"), connectors(tmp_path / "x"), connectors(tmp_path / "y")
    assert len(rows) == 6 and {row["image"] for row in rows[:2]} == {"efflite1"}
    assert float(rows[1]["val_recall10"]) > 0.8  # the planted best, though only its own part was trained
    for name, state in before.items():
        assert all(torch.equal(state[key], after[name][key]) for key in state), name
    assert run("train_hyma.py", "--data", planted, *QUICK, "--seed", "1", "--out", "all").code == 0
    cost, whole = (vlm.read_json(tmp_path / out / "ledger.json") for out in ("y", "all"))
    assert cost["pairs"] == 2 and cost["flops"] < 0.65 * whole["flops"]  # 0.42 of the pictures' widths, all texts' sums
    assert cost["trainable_parameters"] == (1024 + 1) * 256
    config = vlm.read_json(tmp_path / "y" / "config.json")
    assert config["flags"]["seed"] == 1 and config["flags"]["batch_size"] == 128
    assert config["pairs"] == ["efflite1:minilm_l6", "efflite1:mpnet"]
    again = run("train_hyma.py", *add, "--out", "z")
    assert again.code == 0 and (tmp_path / "z/ranking.csv").read_bytes() == (tmp_path / "y/ranking.csv").read_bytes()

    assert run("train_hyma.py", "--data", planted, *QUICK, "--pairs", "*:minilm_l6", "--out", "one").code == 0
    text = run("train_hyma.py", "--add-encoder", "mpnet", "--from", "one", "--out", "two")
    assert text.code == 0 and len(ranking(tmp_path / "two")) == 6, text.err
    refused("train_hyma.py", "--add-encoder", "efflite1", says="--from")
    refused("train_hyma.py", *add, "--out", "y", says="holds a run already")
    refused("train_hyma.py", "--add-encoder", "control", "--from", "x", says=["control", "x already"])
    refused("train_hyma.py", "--add-encoder", "vit_l16", "--from", "x", says=["vit_l16", "embed.py"])
    refused("train_hyma.py", "--add-encoder", "efflite1", "--from", "nowhere", says="nowhere")


def test_an_added_encoder_resumes_to_the_same_bits(run, planted, tmp_path):
    assert run("train_hyma.py", "--data", planted, *QUICK, "--pairs", "efflite0:*", "--out", "x").code == 0
    add = ("--add-encoder", "efflite1", "--from", "x")
    assert run("train_hyma.py", *add, "--out", "whole").code == 0
    assert run("train_hyma.py", *add, "--out", "part").code == 0
    (tmp_path / "part/checkpoint.pt").unlink()  # as if stopped before the first look
    result = run("train_hyma.py", "--resume", "--out", "part")
    assert result.code == 0, result.err
    for name, state in connectors(tmp_path / "whole").items():
        assert all(torch.equal(state[key], connectors(tmp_path / "part")[name][key]) for key in state)


def test_few_rows(run, refused, planted, tmp_path):
    """A smaller draw is part of a larger one, no training row becomes a validation row, few rows shrink the batch."""
    data = Embeddings(planted)
    whole, some, few = (split_rows(data, 3, count) for count in (None, 400, 100))
    for part in (0, 1):
        assert set(few[part].tolist()) < set(some[part].tolist()) < set(whole[part].tolist())
    assert (len(some[0]), len(some[1]), len(few[0]), len(few[1])) == (360, 40, 90, 10)
    result = run("train_hyma.py", "--data", planted, "--rows", "200", "--epochs", "30", "--out", "x")
    assert result.code == 0 and "180 training and 20 validation rows" in result.out, result.err
    assert ranking(tmp_path / "x")[0]["image"] == "efflite1"
    assert vlm.read_json(tmp_path / "x" / "config.json")["flags"]["batch_size"] == 180
    refused("train_hyma.py", "--data", planted, "--rows", "0", says="--rows 0")
    refused(
        "train_hyma.py", "--data", planted, "--rows", "200", "--batch-size", "190", says=["--batch-size 190", "180"]
    )


# -------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "images, texts, each", [(9, 3, 3), (9, 3, 9), (9, 3, 4), (4, 2, 4), (2, 5, 3), (1, 1, 1), (7, 7, 5)]
)
def test_every_pair_gets_its_share(script, images, texts, each):
    pairs = [(f"i{i}", f"t{t}") for i in range(images) for t in range(texts)]
    round_length = texts * math.ceil(images / each)
    counts = Counter()
    for step in range(3 * round_length):
        chosen = script.draw_pairs(step, 0, pairs, each)
        assert 1 <= len(chosen) <= each and len(set(chosen)) == len(chosen)
        assert len({text for _, text in chosen}) == 1  # whose part is then run once
        counts.update(chosen)
    assert set(counts) == set(pairs) and set(counts.values()) == {3}
    assert script.draw_pairs(1, 0, pairs, each) == script.draw_pairs(1, 0, pairs, each)


def test_seeds_draw_other_rows_and_other_pairs(script):
    """Whole runs of both: torch's CPU generator looks at 32 bits of a seed alone."""
    rows, pairs = torch.arange(100), [(f"i{i}", f"t{t}") for i in range(9) for t in range(3)]
    dealt = {tuple(torch.cat([draw_rows(k, seed, rows, 10) for k in range(20)]).tolist()) for seed in range(20)}
    drawn = {tuple(map(tuple, (script.draw_pairs(k, seed, pairs, 3) for k in range(18)))) for seed in range(20)}
    assert len(dealt) == len(drawn) == 20


def test_rows_are_dealt_once_an_epoch(script):
    rows = torch.arange(100, 203)
    seen = torch.cat([draw_rows(step, 3, rows, 10) for step in range(10)])
    assert len(seen.unique()) == 100 and not torch.equal(seen[:10], torch.arange(100, 110))
    assert torch.equal(draw_rows(14, 3, rows, 10), draw_rows(14, 3, rows, 10))
    assert not torch.equal(draw_rows(14, 3, rows, 10), draw_rows(4, 3, rows, 10))


def generators(script, hidden_layers):
    images, texts = {"a": 48, "b": 32}, {"t": 24, "u": 40}
    for build in (script.Factored, script.PaperMLP):
        torch.manual_seed(0)
        yield build(images, texts, hidden_layers, 8)


def in_axes(generator, hidden_layers):
    """Random orthonormal axes and means for a factored generator; {image: axes [D, k]} of either."""
    if not hasattr(generator, "axes"):
        return {image: torch.eye(dim) for image, dim in generator.image_dims.items()}
    for axes, mean in zip(generator.axes, generator.means):
        axes.copy_(torch.linalg.qr(torch.randn(axes.shape)).Q)
        mean.copy_(torch.randn(mean.shape))
    return dict(zip(generator.images, generator.axes))


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_export_is_the_function_that_was_trained(script, hidden_layers):
    """The exported layers of any pair, through torch alone, against the generator's own pass over all pairs."""
    features = {"t": torch.randn(5, 24), "u": torch.randn(5, 40)}
    pairs = [("a", "u"), ("b", "t"), ("b", "u")]  # a:t is never asked for and has a connector as well
    for generator in generators(script, hidden_layers):
        axes = in_axes(generator, hidden_layers)
        z, _ = connector_mlp(*generator(features, pairs))
        for (image, text), mapped in zip(pairs, z.split([axes[image].shape[1] for image, _ in pairs], dim=1)):
            x, mapped = features[text], mapped @ axes[image].T
            layers = generator.predict(image, text)
            for k, (weight, bias) in enumerate(layers):
                x = F.linear(x, weight, bias) if k == len(layers) - 1 else F.relu(F.linear(x, weight, bias))
            torch.testing.assert_close(mapped, x, atol=1e-5, rtol=1e-4)
        assert [tuple(w.shape) for w, _ in generator.predict("a", "t")][-1][0] == 48


@pytest.mark.parametrize("frozen", [None, "text_parts", "image_parts"])  # as when an encoder joins
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_flops_against_torch(script, hidden_layers, frozen):
    features = {"t": torch.randn(64, 24), "u": torch.randn(64, 40)}
    images = {"a": F.normalize(torch.randn(64, 48), dim=1), "b": F.normalize(torch.randn(64, 32), dim=1)}
    pairs = [("a", "u"), ("b", "t"), ("a", "t")]
    for generator in generators(script, hidden_layers):
        axes = in_axes(generator, hidden_layers)
        if frozen and not hasattr(generator, frozen):
            continue
        if frozen:
            getattr(generator, frozen).requires_grad_(False)
        targets = [images[image] @ axes[image] for image in images]
        with FlopCounterMode(display=False) as counter:
            z, sumsq = connector_mlp(*generator(features, pairs))
            losses, _ = clip_loss(z, targets, [0, 1, 0], 20.0, sumsq=sumsq)
            losses.mean().backward()
            if hasattr(generator, "outer"):
                generator.outer[0].T @ generator.outer[1]
        closed_form = generator.flops(64, pairs) + sum(4 * 64**2 * axes[image].shape[1] for image, _ in pairs)
        assert counter.get_total_flops() == pytest.approx(closed_form, rel=0.02)


def test_the_never_formed_gradient_takes_part_in_clipping(script):
    """One update of the mlp generator against autograd with the head as an ordinary parameter, clipping active."""
    torch.manual_seed(0)
    generator = script.PaperMLP({"a": 48}, {"t": 24}, 1, 8)
    twin = script.PaperMLP({"a": 48}, {"t": 24}, 1, 8)
    twin.load_state_dict(generator.state_dict())
    head = torch.nn.Parameter(twin.head.clone())
    features = {"t": torch.randn(16, 24)}
    flags = type("flags", (), {"clip_norm": 0.01, "weight_decay": 0.1})
    optimizer = torch.optim.AdamW(generator.parameters(), weight_decay=0.1)
    plain = torch.optim.AdamW([*twin.parameters(), head], lr=0.01, weight_decay=0.1)
    moments = [torch.zeros_like(generator.head) for _ in range(2)]
    for step in range(3):
        optimizer.zero_grad()
        connector_mlp(*generator(features, [("a", "t")]))[0].square().mean().backward()
        script.update(generator, optimizer, moments, step + 1, 0.01, flags)

        plain.zero_grad()
        twin.head = head.detach()
        connector_mlp(*twin(features, [("a", "t")]))[0].square().mean().backward()
        head.grad = twin.outer[0].T @ twin.outer[1]
        torch.nn.utils.clip_grad_norm_([*twin.parameters(), head], 0.01)
        plain.step()
    torch.testing.assert_close(generator.head, head.detach(), atol=1e-6, rtol=1e-5)
    for one, two in zip(generator.parameters(), twin.parameters()):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- the sample


def test_the_main_job_on_the_sample(run, tmp_path):
    """Real embeddings of real pictures: every pretrained pair above the control, in a fraction of the default's steps."""
    result = run("train_hyma.py", "--pairs", "all", "--out", "x", "--epochs", "20", "--device", "cpu")
    assert result.code == 0, result.err
    assert "sample/embeddings (the sample): 1893 training and 373 validation rows" in result.out
    rows = ranking(tmp_path / "x")
    assert len(rows) == 8 and [row["image"] for row in rows[-2:]] == ["control", "control"]
    assert float(rows[5]["val_recall10"]) > 1.5 * float(rows[6]["val_recall10"])
    assert json.loads((tmp_path / "x" / "ledger.json").read_text())["peak_bytes"] < 4e9
