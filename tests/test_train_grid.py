"""train_grid.py by its command line: the run folder, pairs by themselves, resume, budgets, closed forms, faults."""

import argparse
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    QUICK,
    count_lines,
    kill_when,
    make_embedding_folder,
    read_connectors,
    read_ledger,
    read_ranking,
    recall10,
    unit_vectors,
)
from torch.utils.flop_counter import FlopCounterMode

import vlm
from hyma.closed_form import IMAGE_NOISE_ROWS
from hyma.costs import logit_flops
from hyma.embeddings import Embeddings, RowStore
from hyma.files import read_jsonl, write_json, write_jsonl
from hyma.free_connectors import FreeConnectors
from hyma.grid_state import keep_best, merge_states, new_state
from hyma.halving import halving_rungs, surviving_pairs
from hyma.splits import split_rows
from hyma.training import validation_retrieval
from hyma.unicon import RANK
from kernels import clip_loss, connector_mlp
from train_grid import plan_steps

LEDGER = [
    "pairs",
    "steps",
    "batch_size",
    "pair_samples",
    "updates_per_pair",
    "flops",
    "start_flops",
    "step_flops",
    "logit_flops",
    "seconds",
    "peak_bytes",
    "trainable_parameters",
]


def assert_same(one, two, exactly=False):
    """The connectors of `one` are those of `two`, which may hold more."""
    one, two = read_connectors(one), read_connectors(two)
    tolerance = {"atol": 0, "rtol": 0} if exactly else {"atol": 1e-5, "rtol": 1e-4}
    assert one and one.keys() <= two.keys()
    for name, state in one.items():
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, two[name][key], **tolerance)


# ------------------------------------------------------------------------------------------------------- the run folder


def test_a_run_folder_holds_what_other_programs_rely_on(run, planted, tmp_path):
    result = run("train_grid.py", "--data", planted, "--out", "runs/x", *QUICK, "--connector", "mlp1", "--epochs", "2")
    assert result.code == 0, result.err
    out = tmp_path / "runs" / "x"
    rows, config = read_ranking(out), vlm.read_json(out / "config.json")
    assert list(rows[0]) == ["image", "text", "val_recall1", "val_recall5", "val_recall10", "rank"]
    assert len(rows) == 6
    assert {r["image"] for r in rows[:2]} == {"efflite1"} and {r["image"] for r in rows[-2:]} == {"control"}
    assert config["script"] == "train_grid.py" and config["seed"] == 0 and config["flags"]["batch_size"] == 128
    assert (config["method"], config["hidden_layers"], config["full_grid"]) == ("grid mlp1", 1, True)
    assert config["rows"] == {"train": 810, "val": 90} and config["starts_from"] is None
    steps, cost = 2 * (810 // 128), read_ledger(out)
    assert list(cost) == LEDGER and cost["pairs"] == 6 and cost["steps"] == steps
    assert cost["updates_per_pair"] == dict.fromkeys(config["pairs"], steps) and cost["pair_samples"] == 128 * steps * 6
    free = [(t + 1) * 1024 + 1025 * i for i in (1280, 1280, 512) for t in (384, 768)]
    assert cost["trainable_parameters"] == sum(free) and cost["peak_bytes"] > 1e6
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2] and metrics[1]["loss"] < metrics[0]["loss"]
    data = Embeddings(planted)
    retrieval = validation_retrieval(data, *split_rows(data), CPU)
    for row in rows:  # the exported files alone give the scores of the ranking: each pair's own best
        image, _, text, state = vlm.read_connector(out / "connectors" / f"{row['image']}_mlp1_{row['text']}.pt")
        store = RowStore(data, [image, text], CPU)
        hidden = F.relu(F.linear(store.take(text, retrieval.rows), state["0.weight"], state["0.bias"]))
        mapped = F.linear(hidden, state["2.weight"], state["2.bias"])
        six = retrieval.recalls(mapped, store.take(image, retrieval.rows))
        assert recall10(six) == pytest.approx(float(row["val_recall10"]), abs=0.01)
        best = max(sum(line["recalls"][f"{image}:{text}"][2::3]) / 2 for line in metrics)
        assert best == pytest.approx(float(row["val_recall10"]), abs=1e-5)


def test_a_pair_trains_as_it_would_alone(run, planted, tmp_path):
    """Among all the others, in passes of two, and with nobody else: the same connector. Clipping is active."""
    flags = ("--data", planted, *QUICK, "--clip-norm", "0.05")
    for out, more in (("all", ()), ("two", ("--pairs-per-pass", "4")), ("alone", ("--pairs", "efflite0:mpnet"))):
        result = run("train_grid.py", *flags, *more, "--out", out)
        assert result.code == 0, result.err
    assert_same(tmp_path / "alone", tmp_path / "all")
    assert_same(tmp_path / "two", tmp_path / "all")
    whole, passes = read_ledger(tmp_path / "all"), read_ledger(tmp_path / "two")
    for key in ("flops", "updates_per_pair", "steps", "pair_samples", "trainable_parameters"):
        assert whole[key] == passes[key]
    lines = [read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("all", "two")]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-4)
    assert [line["recalls"].keys() for line in lines[0]] == [line["recalls"].keys() for line in lines[1]]


def assert_same_run(whole, other):
    assert_same(whole, other, exactly=True)
    assert (whole / "ranking.csv").read_bytes() == (other / "ranking.csv").read_bytes()
    for key in ("flops", "updates_per_pair", "steps"):
        assert read_ledger(whole)[key] == read_ledger(other)[key]


def test_kill_and_resume_give_the_same_bits(run, spawn, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--epochs", "6", "--pairs-per-pass", "1", "--pairs", "eff*:minilm_l6")
    assert run("train_grid.py", *flags, "--out", "whole").code == 0
    process = spawn("train_grid.py", *flags, "--out", "killed")
    kill_when(process, lambda: count_lines(tmp_path / "killed" / "metrics.jsonl") >= 3)
    assert not (tmp_path / "killed" / "ledger.json").exists()
    result = run("train_grid.py", "--resume", "--out", "killed")
    assert result.code == 0 and "resumed" in result.out, result.err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("validations", [1, 2])
def test_halving_resumes_with_the_pairs_it_had(run, planted, tmp_path, monkeypatch, validations):
    """Stopped between a checkpoint and the next step: the first validation ends a rung, the second does not."""
    flags = ("--data", planted, *QUICK, "--pairs", "*:minilm_l6", "--halving")
    # 18 steps, and validations at 4, 6, 9, 12 and 18.
    assert run("train_grid.py", *flags, "--out", "whole").code == 0
    write, calls = write_jsonl, []

    def stop(path, rows):
        calls.append(path)
        if len(calls) == validations:
            raise KeyboardInterrupt
        write(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr("hyma.files.write_jsonl", stop)
        assert run("train_grid.py", *flags, "--out", "stopped").code == 130
    result = run("train_grid.py", "--resume", "--out", "stopped")
    assert result.code == 0 and "resumed" in result.out, result.err
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_several_seeds_are_a_run_each(run, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--pairs", "efflite1:mpnet", "--epochs", "1")
    result = run("train_grid.py", *flags, "--seeds", "0", "1", "--out", "runs/x")
    assert result.code == 0, result.err
    assert run("train_grid.py", *flags, "--seeds", "1", "--out", "one").code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["x-s0", "x-s1"]
    assert_same(tmp_path / "one", tmp_path / "runs/x-s1", exactly=True)
    assert not torch.equal(
        *(read_connectors(tmp_path / f"runs/x-s{s}")["efflite1_mlp0_mpnet.pt"]["weight"] for s in (0, 1))
    )
    for again in (("--out", "runs/x"), ()):  # all of them, by their common name or as the newest
        result = run("train_grid.py", "--resume", *again)
        assert result.code == 0 and "runs/x-s0" in result.out and "runs/x-s1" in result.out, result.err


def test_several_seeds_without_a_name_go_on_in_their_folders(run, run_until_results, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--pairs", "efflite1:mpnet", "--epochs", "1", "--seeds", "0", "1")
    run_until_results("train_grid.py", *flags)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name[-3:] for folder in folders] == ["-s0", "-s1"]
    result = run("train_grid.py", *flags)
    assert result.code == 0 and f"{folders[0].name}: is finished" in result.out, result.err
    assert sorted((tmp_path / "runs").iterdir()) == folders
    assert all((folder / "ledger.json").is_file() for folder in folders)


@pytest.mark.parametrize("script", ["train_grid.py", "train_hyma.py"])
@pytest.mark.parametrize("named", [True, False])
def test_a_run_goes_on_though_an_encoder_was_embedded_since(run, run_until_results, planted, tmp_path, script, named):
    """Its pairs are those that it was started with, and its bits those of a run that was not interrupted."""
    shutil.copytree(planted, tmp_path / "data")
    (tmp_path / "data" / "efflite0.pt").rename(tmp_path / "efflite0.pt")
    flags = ("--data", "data", *QUICK, "--epochs", "1")
    assert run(script, *flags, "--out", "whole").code == 0
    place = ("--out", "x") if named else ()
    run_until_results(script, *flags, *place)

    (tmp_path / "efflite0.pt").rename(tmp_path / "data" / "efflite0.pt")
    result = run(script, *flags, *place)
    assert result.code == 0 and "data has 2 more by now" in result.out, result.err
    (out,) = [tmp_path / "x"] if named else (tmp_path / "runs").iterdir()
    assert_same_run(tmp_path / "whole", out)


# ------------------------------------------------------------------------------------------- halving, refining, budgets


def test_halving_finds_the_planted_best_for_less(run, planted, tmp_path):
    result = run("train_grid.py", "--data", planted, *QUICK, "--epochs", "12", "--halving", "--out", "x")
    assert result.code == 0 and "of the full grid's updates" in result.out, result.err
    rows, cost = read_ranking(tmp_path / "x"), read_ledger(tmp_path / "x")
    updates = [cost["updates_per_pair"][f"{row['image']}:{row['text']}"] for row in rows]
    assert rows[0]["image"] == "efflite1" and updates == sorted(updates, reverse=True)
    ranks = [int(row["rank"]) for row in rows]
    assert sorted(updates) == [9, 9, 9, 18, 36, 72] and ranks[:4] == [1, 2, 3, 4] and ranks == sorted(ranks)
    assert cost["pair_samples"] == 128 * sum(updates) and len(read_connectors(tmp_path / "x")) == 6
    lines = read_jsonl(tmp_path / "x" / "metrics.jsonl")
    assert len(lines[0]["recalls"]) == 6 and len(lines[-1]["recalls"]) == 1


def test_refining_a_runs_connectors(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK)
    assert run("train_grid.py", *flags, "--epochs", "1", "--out", "start").code == 0
    pair, still = ("--pairs", "efflite1:mpnet"), ("--epochs", "1", "--lr", "1e-9", "--warmup-steps", "0")
    assert run("train_grid.py", *flags, *still, *pair, "--from", "start", "--out", "same").code == 0
    before, after = (read_connectors(tmp_path / out)["efflite1_mlp0_mpnet.pt"] for out in ("start", "same"))
    for key in before:
        torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=1e-3)
    more = ("--epochs", "2", "--pairs", "efflite0:mpnet", "--from", "start", "--out", "more")
    assert run("train_grid.py", *flags, *more).code == 0
    one, two = (read_connectors(tmp_path / out)["efflite0_mlp0_mpnet.pt"]["weight"] for out in ("start", "more"))
    assert not torch.equal(one, two)
    other = ("--connector", "mlp1", "--out", "z", *pair)
    refused("train_grid.py", *flags, *other, "--from", "start", says=["has no connector efflite1_mlp1_mpnet.pt", "--pairs"])
    refused("train_grid.py", *flags, "--out", "z", "--closed-form", "ridge", "--from", "start", says="--closed-form")
    assert not (tmp_path / "z").exists()


def test_training_further_keeps_what_was_better(run, planted, tmp_path):
    """A rate far too high makes the connector worse: that which it started from is handed over, and a line says so."""
    flags = ("--data", planted, *QUICK, "--pairs", "efflite0:mpnet")
    assert run("train_grid.py", *flags, "--lr", "1e-2", "--out", "x").code == 0
    result = run("train_grid.py", "--from", "x", "--pairs", "efflite0:mpnet", "--lr", "30", "--epochs", "1", "--out", "y")
    assert result.code == 0 and "as they were in x, since training made them no better: efflite0:mpnet" in result.out, result.err
    one, two = [read_connectors(tmp_path / out)["efflite0_mlp0_mpnet.pt"] for out in ("x", "y")]
    assert all(map(torch.equal, one.values(), two.values()))


def test_resuming_takes_no_separate_runs_for_seeds_of_one(run, run_until_results, refused, planted, tmp_path):
    """Runs that their user has named like seeds; and a command of several seeds of which one was not begun."""
    flags = ("--data", planted, *QUICK)
    assert run("train_grid.py", *flags, "--seeds", "0", "--out", "runs/exp-s0").code == 0
    run_until_results("train_grid.py", *flags, "--seeds", "1", "--out", "runs/exp-s1")
    result = run("train_grid.py", "--resume")
    assert result.code == 0 and "exp-s0" not in result.out and (tmp_path / "runs/exp-s1/ledger.json").is_file(), result.err
    run_until_results("train_grid.py", *flags, "--seeds", "0", "1", "--out", "z")
    shutil.rmtree(tmp_path / "z-s1")
    refused("train_grid.py", "--resume", "--out", "z", says=["z-s1 is not there", "type the command that has started z-s0 again"])
    refused("train_grid.py", *flags, "--seeds", "0", "1", "--out", ".", says="--out .: has no name")


def test_connectors_as_published_are_trained_further(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK)
    assert run("train_grid.py", *flags, "--pairs", "efflite0:*", "--out", "x").code == 0
    (tmp_path / "x" / "connectors").rename(tmp_path / "pub")
    assert run("train_grid.py", "--from", "pub", *flags, "--pairs", "efflite0:mpnet", "--out", "y").code == 0
    refused("train_grid.py", "--from", "pub", *flags, "--out", "z", says=["--from pub: has no connector", "--pairs"])
    (tmp_path / "w").mkdir()
    (tmp_path / "pub").rename(tmp_path / "w" / "connectors")  # somebody's own, which a run would overwrite
    refused("train_grid.py", *flags, "--out", "w", says="--out w: is a folder with other files in it (connectors)")
    refused("train_grid.py", "--data", planted, "--closed-form", "ridge", "--connector", "mlp2", says="--connector mlp2: contradicts")


def test_the_budget_of_another_run(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--pairs", "efflite1:*")
    assert run("train_grid.py", *flags, "--out", "paid", "--budget", "full").code == 0
    paid, steps = read_ledger(tmp_path / "paid")["flops"], read_ledger(tmp_path / "paid")["steps"]
    write_json(tmp_path / "paid" / "ledger.json", read_ledger(tmp_path / "paid") | {"flops": paid * 0.4})
    assert run("train_grid.py", *flags, "--out", "x", "--budget-of", "paid").code == 0
    assert 0 <= paid * 0.4 - read_ledger(tmp_path / "x")["flops"] < paid / steps  # no more, and not a step less
    assert read_jsonl(tmp_path / "x" / "metrics.jsonl")[-1]["lr"] < 1e-3  # the cosine ends with the budget
    refused("train_grid.py", *flags, "--out", "y", "--budget-of", "nowhere", says="nowhere/ledger.json")
    refused("train_grid.py", *flags, "--out", "y", "--budget-of", "paid", "--halving", says="not allowed with")


def test_the_rungs_of_halving():
    """Half of the pairs each time, so that every rung costs about as much as one pair for half the schedule."""
    assert halving_rungs(6, 72) == {9: 3, 18: 2, 36: 1}
    assert halving_rungs(1, 10) == {}
    with pytest.raises(vlm.BadInput, match="6 steps are too few to halve 27 pairs"):
        halving_rungs(27, 6)


def test_the_best_half_survives_a_rung():
    """In the pairs' old order; of equals, the first. A pair that was dropped has fewer updates than steps have passed."""
    pairs = [("a", "t"), ("b", "t"), ("c", "t"), ("d", "t")]
    state = new_state(pairs)
    assert surviving_pairs(pairs, state, {4: 2}) == pairs
    state["step"] = 4
    for pair, recall in zip(pairs, (0.1, 0.5, 0.3, 0.3)):
        state["updates"][":".join(pair)] = 4
        state["best"][":".join(pair)] = {"recalls": [0, 0, recall, 0, 0, recall]}
    assert surviving_pairs(pairs, state, {}) == pairs
    assert surviving_pairs(pairs, state, {4: 2}) == [pairs[1], pairs[2]]
    state["step"] = state["updates"]["b:t"] = state["updates"]["c:t"] = 5
    assert surviving_pairs(pairs, state, {4: 2}) == [pairs[1], pairs[2]]


def test_states_of_groups_are_merged_in_the_pairs_order():
    pairs = [("a", "t"), ("b", "t"), ("c", "t")]
    groups = [new_state([pairs[2]]), new_state(pairs[:2])]
    for state, loss in zip(groups, (3.0, 6.0)):
        names = list(state["updates"])
        recalls = {name: [0.5] * 6 for name in names}
        layers = [(torch.ones(2, 3), torch.zeros(2))]
        for name in names:
            keep_best(state, name, recalls[name], layers, {"seed": 0})
            state["updates"][name] = 7
        line = {"epoch": 1, "step": 7, "loss": loss, "val_recall10": 0.5, "seconds": 2.0, "recalls": recalls}
        state |= {"step": 7, "flops": 10, "seconds": 2.0, "peak_bytes": loss, "metrics": [line]}
    whole = merge_states(groups, pairs)
    assert list(whole["updates"]) == list(whole["best"]) == ["a:t", "b:t", "c:t"]
    assert (whole["step"], whole["flops"], whole["seconds"], whole["peak_bytes"]) == (7, 20, 4.0, 6.0)
    (line,) = whole["metrics"]
    assert (
        line["loss"] == pytest.approx(5.0) and line["seconds"] == 4.0 and line["recalls"].keys() == set(whole["best"])
    )


# --------------------------------------------------------------------------------------------------------- closed forms


def centred(planted, image, text):
    data = Embeddings(planted)
    train, _ = split_rows(data)
    store = RowStore(data, [image, text], CPU)
    x, y = (store.take(name, train).double() for name in (text, image))
    return x - x.mean(0), y - y.mean(0), x.mean(0), F.normalize(y.mean(0), dim=0)


def test_ridge_against_least_squares(run, planted, tmp_path):
    result = run("train_grid.py", "--data", planted, "--closed-form", "ridge", "--out", "x", "--device", "cpu")
    assert result.code == 0, result.err
    rows = read_ranking(tmp_path / "x")
    assert {r["image"] for r in rows[-2:]} == {"control"} and float(rows[0]["val_recall10"]) > 0.9
    for row in (rows[0], rows[-1]):
        path = tmp_path / "x" / "connectors" / f"{row['image']}_mlp0_{row['text']}.pt"
        image, _, text, state = vlm.read_connector(path)
        x, y, mean, direction = centred(planted, image, text)
        strength = vlm.read_json(path.with_suffix(".json"))["regularisation"] * x.square().sum() / x.shape[1]
        rows_below = strength.sqrt() * torch.eye(x.shape[1]).double()  # ridge is least squares with these added
        y = y - (y @ direction)[:, None] * direction
        solution = torch.linalg.lstsq(torch.cat([x, rows_below]), torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])]))
        torch.testing.assert_close(state["weight"].double(), solution.solution.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state["bias"].double(), -solution.solution.T @ mean, atol=1e-5, rtol=1e-4)
    cost = read_ledger(tmp_path / "x")
    assert list(cost) == LEDGER and cost["steps"] == 1 and cost["pair_samples"] == 6 * 810 and cost["flops"] > 1e9
    assert set(read_connectors(tmp_path / "x")) == {f"{row['image']}_mlp0_{row['text']}.pt" for row in rows}


def test_whitened_maps_against_their_formula(run, planted, tmp_path):
    result = run("train_grid.py", "--data", planted, "--closed-form", "whitened", "--out", "x", "--device", "cpu")
    assert result.code == 0, result.err
    rows = read_ranking(tmp_path / "x")
    assert {r["image"] for r in rows[-2:]} == {"control"} and float(rows[0]["val_recall10"]) > 0.9
    path = tmp_path / "x" / "connectors" / f"{rows[0]['image']}_mlp0_{rows[0]['text']}.pt"
    image, _, text, state = vlm.read_connector(path)
    x, y, mean, direction = centred(planted, image, text)
    strengths = vlm.read_json(path.with_suffix(".json"))["regularisation"], IMAGE_NOISE_ROWS / len(x)
    inverses = [
        (a.T @ a + s * a.square().mean() * len(a) * torch.eye(a.shape[1])).inverse() for a, s in zip((x, y), strengths)
    ]
    weight = inverses[1] @ y.T @ x @ inverses[0]
    weight -= direction[:, None] * (direction @ weight)
    torch.testing.assert_close(state["weight"].double(), weight, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(state["bias"].double(), -weight @ mean, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("kind", ["procrustes", "unicon"])
def test_maps_that_are_rotations(run, planted, tmp_path, kind):
    result = run("train_grid.py", "--data", planted, "--closed-form", kind, "--out", "x", "--device", "cpu")
    assert result.code == 0, result.err
    assert {row["image"] for row in read_ranking(tmp_path / "x")[-2:]} == {"control"}
    for state in read_connectors(tmp_path / "x").values():
        lengths = torch.linalg.svdvals(state["weight"])
        kept = (lengths > 0.5).sum()  # one direction at most is lost, the pictures' mean
        assert min(*state["weight"].shape, RANK if kind == "unicon" else math.inf) - kept <= 1
        torch.testing.assert_close(lengths[1 : kept - 1], torch.ones(kept - 2), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("connector", ["mlp0", "mlp1", "mlp2"])
def test_flops_of_a_step_against_torch(connector, tmp_path):
    dims, pairs = {"a": 48, "b": 32, "t": 24, "u": 40}, [("a", "u"), ("b", "t"), ("a", "t")]
    generator = FreeConnectors(pairs, dims, int(connector[-1]), 0)
    features = {text: torch.randn(64, dims[text]) for text in ("u", "t")}
    images = [F.normalize(torch.randn(64, dims[image]), dim=1) for image in ("a", "b")]
    with FlopCounterMode(display=False) as counter:
        z, sumsq = connector_mlp(*generator(features, pairs))
        losses, _ = clip_loss(z, images, [0, 1, 0], 20.0, sumsq=sumsq)
        losses.sum().backward()
    of_samples, of_steps = generator.flops(64, pairs)
    of_logits = logit_flops(64, [dims[image] for image, _ in pairs])
    assert of_steps == 0
    assert counter.get_total_flops() == pytest.approx(of_samples + of_logits, rel=0.02)

    # The steps that another run's FLOPs pay for are counted in the same way, before there are any weights.
    write_json(tmp_path / "ledger.json", {"flops": 7 * (of_samples + of_logits)})
    flags = argparse.Namespace(budget_of=tmp_path, batch_size=64, connector=connector)
    assert plan_steps(flags, pairs, dims, 1000) == 7
    write_json(tmp_path / "ledger.json", {"flops": 7 * (of_samples + of_logits) - 1})
    assert plan_steps(flags, pairs, dims, 1000) == 6


def test_free_weights_depend_on_the_seed_and_the_pair_alone():
    dims, pair = {"a": 48, "b": 32, "t": 24}, ("a", "t")
    alone = FreeConnectors([pair], dims, 1, 0).predict(*pair)
    among = FreeConnectors([("b", "t"), pair], dims, 1, 0).predict(*pair)
    other = FreeConnectors([pair], dims, 1, 1).predict(*pair)
    for (weight, bias), (same_weight, same_bias), (other_weight, _) in zip(alone, among, other):
        assert torch.equal(weight, same_weight) and torch.equal(bias, same_bias)
        assert not torch.equal(weight, other_weight)


# --------------------------------------------------------------------------------------------------------------- faults


def test_bad_input_is_refused_in_one_line(run, refused, planted, tmp_path):
    base = ("--data", planted, "--device", "cpu")
    refused("train_grid.py", *base, "--pairs", "vit_l16:mpnet", says=["vit_l16:mpnet", "efflite1"])
    refused("train_grid.py", *base, "--batch-size", "900", says=["--batch-size 900", "810"])
    refused("train_grid.py", *base, "--pairs-per-pass", "0", says="--pairs-per-pass 0")
    refused("train_grid.py", *base, "--lr", "-1", says="--lr -1")
    refused("train_grid.py", *base, "--seeds", "1", "1", says="--seeds 1 1")
    refused("train_grid.py", *base, "--halving", "--pairs-per-pass", "2", says="--halving")
    refused("train_grid.py", *base, *QUICK, "--halving", "--epochs", "1", says="6 steps are too few")
    refused("train_grid.py", "--resume", says="no run in runs/")
    assert not (tmp_path / "runs").exists()
    assert run("train_grid.py", *base, "--closed-form", "ridge", "--out", "x").code == 0
    refused("train_grid.py", *base, "--closed-form", "whitened", "--out", "x", says=["holds a run already", "ridge"])
    refused("train_grid.py", "--resume", "--out", "x", "--lr", "1", says="contradicts")
    refused("train_hyma.py", "--resume", "--out", "x", says="was not made by train_hyma.py")


def test_a_loss_that_is_not_finite_saves_nothing_of_it(refused, planted, tmp_path):
    flags = ("--lr", "1e30", "--warmup-steps", "0", "--clip-norm", "1e9")
    refused("train_grid.py", "--data", planted, "--out", "x", *QUICK, *flags, says=["the loss of", "nan", "--lr"])
    assert not read_connectors(tmp_path / "x")


def test_from_takes_the_data_and_the_split_of_its_run(run, refused, planted, tmp_path):
    """Without --data it is the run's and not the sample's; another seed would choose by rows that the run trained on."""
    flags = ("--data", planted, "--seed", "3", "--epochs", "2", "--batch-size", "128", "--device", "cpu")
    assert run("train_hyma.py", *flags, "--connector", "mlp0", "--out", "x").code == 0
    refine = ("--from", "x", "--pairs", "efflite1:mpnet", "--epochs", "1", "--device", "cpu")
    result = run("train_grid.py", *refine, "--out", "y")
    assert result.code == 0 and "y, seed 3, 1 pairs" in result.out and "810 training" in result.out, result.err
    config = vlm.read_json(tmp_path / "y" / "config.json")
    assert config["flags"]["data"] == str(planted) and config["flags"]["batch_size"] == 128
    assert config["hidden_layers"] == 0 and config["starts_from"] == "x"
    refused(
        "train_grid.py",
        *refine,
        "--seeds",
        "1",
        "--out",
        "z",
        says=["--seeds 1", "no split column", "x was trained on"],
    )
    shutil.copytree(planted, tmp_path / "other")
    torch.save(torch.load(planted / "mpnet.pt", weights_only=True).flip(0), tmp_path / "other" / "mpnet.pt")
    refused("train_grid.py", *refine, "--data", "other", "--out", "z", says=["another mpnet.pt", "sha256"])
    config = vlm.read_json(tmp_path / "x" / "config.json")
    for part in ("seed", "flags", "embeddings"):
        write_json(tmp_path / "x" / "config.json", config | {part: []})
        refused("train_grid.py", *refine, "--out", "z", says="x/config.json: is no configuration of a run")


def test_a_run_meets_no_other_split_of_its_rows(run, refused, tmp_path):
    """Else rows that it was trained on would choose or test, and nothing would say so."""
    vectors = {
        "efflite0": unit_vectors(120, 1280),
        "efflite1": unit_vectors(120, 1280),
        "mpnet": unit_vectors(120, 768),
    }
    for name, order in (("e", ("train", "val", "test")), ("other", ("test", "train", "val"))):
        make_embedding_folder(tmp_path / name, [{"split": order[k % 3]} for k in range(120)], **vectors)
    pair, flags = ("--pairs", "efflite0:mpnet"), ("--device", "cpu", "--out", "x")
    grid = ("--epochs", "1", "--batch-size", "16")
    assert run("train_hyma.py", "--data", "e", *grid, *pair, "--connector", "mlp0", *flags).code == 0
    refused(
        "train_grid.py", "--from", "x", "--data", "other", *pair, "--out", "y", says=["another split than other has"]
    )
    refused("evaluate.py", "x", "--data", "other", says=["x: was trained with another split"])
    added = ("--from", "x", "--add-encoder", "efflite1", "--data", "other", "--out", "z")
    refused("train_hyma.py", *added, says="another split than other has")
    for file in ("rows.jsonl", "manifest.json"):
        shutil.copy(tmp_path / "other" / file, tmp_path / "e" / file)
    refused("train_hyma.py", "--resume", "--out", "x", says="the splits in e are no longer those")


def test_a_budget_that_is_no_number_is_refused(run, refused, planted, tmp_path):
    flags = ("--data", planted, "--budget-of", "x", "--device", "cpu")
    (tmp_path / "x").mkdir()
    for text, message in (('{"flops": NaN}', "no flops"), ('{"flops": 1e300}', "is it damaged"), ("[]", "JSON object")):
        (tmp_path / "x" / "ledger.json").write_text(text)
        refused("train_grid.py", *flags, says=message)
