"""train_hyma.py by its command line: the run folder, kill and resume, hypernetworks, added encoders, faults."""

import argparse
import math
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from helpers import (
    CPU,
    count_lines,
    kill_when,
    make_embedding_folder,
    read_connectors,
    read_ledger,
    read_ranking,
    recall10,
)

import vlm
from hyma.costs import step_flops, validation_flops
from hyma.embeddings import Embeddings, RowStore
from hyma.files import read_jsonl, save_tensors
from hyma.hypernetworks import FactoredHypernetwork, MlpHypernetwork
from hyma.pair_names import choose_pairs, name_of_row
from hyma.pairs import draw_pairs
from hyma.splits import split_rows
from hyma.training import Schedule, validation_retrieval
from kernels import connector_mlp
from train_hyma import clip_and_update, count_validations, keep_best

QUICK = ("--epochs", "6", "--batch-size", "128", "--warmup-steps", "5", "--device", "cpu")


def assert_same_connectors(one, two):
    one, two = read_connectors(one), read_connectors(two)
    assert one and one.keys() == two.keys()
    for name in one:
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name


# ------------------------------------------------------------------------------------------------------- the run folder


def test_a_run_folder_holds_what_other_programs_rely_on(run, planted, tmp_path):
    result = run("train_hyma.py", "--pairs", "all", "--data", planted, "--out", "runs/x", *QUICK)
    assert result.code == 0, result.err
    out = tmp_path / "runs" / "x"
    rows = read_ranking(out)
    columns = ["image", "text", "val_recall1", "val_recall5", "val_recall10", "rank", "expected_recall"]
    assert list(rows[0]) == columns
    found = [float(row["expected_recall"]) for row in rows]
    assert found == sorted(found, reverse=True) and "expected" in result.out
    assert len(rows) == 6 and [int(r["rank"]) for r in rows] == sorted(int(r["rank"]) for r in rows)
    assert {r["image"] for r in rows[:2]} == {"efflite1"} and {r["image"] for r in rows[-2:]} == {"control"}
    assert float(rows[0]["val_recall10"]) > 0.9 > 0.3 > float(rows[-1]["val_recall10"])

    config, ledger = vlm.read_json(out / "config.json"), read_ledger(out)
    assert config["flags"]["batch_size"] == 128 and config["flags"]["pairs_per_step"] == 1  # a third of three
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"device", "commit", "embeddings", "pairs"} <= set(config)
    assert (config["method"], config["hidden_layers"], config["seed"]) == ("hyma factored mlp1", 1, 0)
    assert config["rows"] == {"train": 810, "val": 90} and config["starts_from"] is None and not config["full_grid"]
    assert config["recipe"]["generator"] == "factored" and "seed" not in config["recipe"]
    steps = 6 * (810 // 128)
    refinement = config["flags"]["refine_steps"]
    assert refinement == steps * 6 // 50  # of six pairs, a fiftieth of what all take
    assert ledger["pairs"] == 6 and ledger["steps"] == steps + refinement and ledger["batch_size"] == 128
    chosen = name_of_row(rows[0])
    assert ledger["updates_per_pair"] == {
        pair: steps // 6 + (refinement if pair == chosen else 0) for pair in config["pairs"]
    }
    assert ledger["pair_samples"] == 128 * (steps + refinement)
    assert ledger["seconds"] > 0 and ledger["peak_bytes"] > 1e6 and ledger["flops"] > 1e9
    assert ledger["trainable_parameters"] == (384 + 1) * 1024 + (768 + 1) * 1024 + (1024 + 1) * 3 * 256
    assert 0 < ledger["start_flops"] < ledger["flops"] and ledger["step_flops"] == 0 < ledger["logit_flops"]
    assert "embed.py" not in result.out and not (out / "prediction.csv").exists()  # nothing says that there are more rows
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [6] and metrics[0]["loss"] < math.log(128) / 2  # of constant scores, log(128)

    best = out / "connectors" / f"{rows[0]['image']}_mlp1_{rows[0]['text']}.pt"
    assert f"best connector: runs/x/connectors/{best.name}" in result.out
    assert "get_vlm_from_checkpoint('runs/x/connectors/" in result.out
    assert "90 validation rows among 900 rows" in result.out and "chance at 1 / 5 / 10: 0.1 / 0.6 / 1.1" in result.out
    data = Embeddings(planted)
    retrieval = validation_retrieval(data, *split_rows(data), CPU)
    for row in rows[1:]:  # the exported files alone give the scores of the ranking; the first is refined since
        image, text = row["image"], row["text"]
        path = out / "connectors" / f"{image}_mlp1_{text}.pt"
        connector = vlm.load_connector(path, data.encoders[image].dim, data.encoders[text].dim)
        store = RowStore(data, [image, text], CPU)
        mapped = vlm.map_text(connector, store.take(text, retrieval.rows))
        six = retrieval.recalls(mapped, store.take(image, retrieval.rows))
        assert recall10(six) == pytest.approx(float(row["val_recall10"]), abs=0.01)
        card = vlm.read_json(path.with_suffix(".json"))
        assert card["image_encoder"] == vlm.ENCODERS[image].spec and card["val_recall10"] == float(row["val_recall10"])


@pytest.mark.parametrize("flags", [(), ("--generator", "mlp", "--width", "4", "--connector", "mlp0")])
def test_kill_and_resume_give_the_same_bits(run, spawn, planted, tmp_path, flags):
    flags = ("--data", planted, *QUICK, *flags, "--pairs", "*:minilm_l6", "--stop-when-stable")  # a validation an epoch
    assert run("train_hyma.py", *flags, "--out", "whole").code == 0
    config, metrics = tmp_path / "killed" / "config.json", tmp_path / "killed" / "metrics.jsonl"
    for validations in (0, 1, 2):
        again = ("--resume",) if validations else flags
        process = spawn("train_hyma.py", *again, "--out", "killed")
        kill_when(process, lambda least=validations: config.exists() and count_lines(metrics) >= least)
    result = run("train_hyma.py", "--resume", "--out", "killed")
    assert result.code == 0, result.err
    assert_same_connectors(tmp_path / "whole", tmp_path / "killed")
    assert (tmp_path / "whole" / "ranking.csv").read_bytes() == (tmp_path / "killed" / "ranking.csv").read_bytes()
    ledgers = [read_ledger(tmp_path / name) for name in ("whole", "killed")]
    assert ledgers[0]["updates_per_pair"] == ledgers[1]["updates_per_pair"]
    assert ledgers[0]["flops"] == ledgers[1]["flops"]


def test_resume_of_a_finished_run_and_contradictions(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--epochs", "1")
    assert run("train_hyma.py", *flags).code == 0
    (made,) = (tmp_path / "runs").iterdir()
    before = (made / "ranking.csv").read_bytes()
    again = run("train_hyma.py", "--resume")  # the newest
    assert again.code == 0 and f"{made.relative_to(tmp_path)}" in again.out
    assert (made / "ranking.csv").read_bytes() == before
    refused("train_hyma.py", "--resume", "--out", made, "--seed", "5", says=["--seed 5", "contradicts"])
    refused("train_hyma.py", "--resume", "--out", "nowhere", says="holds no run")
    refused("train_hyma.py", *flags, "--out", made, says="holds a run already")
    whole = (made / "checkpoint.pt").read_bytes()
    (made / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    refused("train_hyma.py", "--resume", "--out", made, says="checkpoint.pt")


@pytest.mark.parametrize("refine_steps", ["0", "4"])
def test_a_finished_run_costs_no_more_when_its_command_is_typed_again(run, planted, tmp_path, monkeypatch, refine_steps):
    flags = ("--data", planted, *QUICK, "--epochs", "1", "--pairs", "efflite0:*", "--refine-steps", refine_steps)
    assert run("train_hyma.py", *flags, "--out", "x").code == 0
    ledger = (tmp_path / "x" / "ledger.json").read_bytes()
    monkeypatch.setattr("hyma.machine.peak_bytes", lambda device: 1)  # another process's
    again = run("train_hyma.py", *flags, "--out", "x")
    assert again.code == 0 and "is finished" in again.out, again.err
    assert (tmp_path / "x" / "ledger.json").read_bytes() == ledger


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
    rows = read_ranking(tmp_path / "x")
    assert rows[-1]["image"] == "control" and float(rows[0]["val_recall10"]) > 0.3
    assert len(read_connectors(tmp_path / "x")) == 3
    for path in (tmp_path / "x" / "connectors").glob("*.pt"):
        vlm.read_connector(path)


def test_lower_precision_trains_alike(run, planted, tmp_path):
    for precision in ("fp32", "bf16"):
        flags = ("--epochs", "2", "--pairs", "efflite1:mpnet", "--precision", precision)
        assert run("train_hyma.py", "--data", planted, "--out", precision, *QUICK, *flags).code == 0
    # Twelve steps are validated once.
    (fp32,), (bf16,) = ([line["loss"] for line in read_jsonl(tmp_path / p / "metrics.jsonl")] for p in ("fp32", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.02)


def test_a_pair_that_was_never_trained_is_predicted(run, planted, tmp_path):
    """Both encoders of efflite0:mpnet are seen, in other pairs."""
    flags = ("--pairs", "efflite1:*", "efflite0:minilm_l6", "--predict", "efflite0:*")
    result = run("train_hyma.py", "--data", planted, "--out", "x", *QUICK, *flags)
    assert result.code == 0, result.err
    ledger = read_ledger(tmp_path / "x")
    assert ledger["pairs"] == 3 and ledger["updates_per_pair"]["efflite0:mpnet"] == 0
    scores = {(r["image"], r["text"]): float(r["val_recall10"]) for r in read_ranking(tmp_path / "x")}
    assert scores["efflite0", "mpnet"] > 0.15 and (tmp_path / "x" / "connectors" / "efflite0_mlp1_mpnet.pt").exists()


def test_bad_input_is_refused_in_one_line(run, refused, planted, tmp_path):
    base = ("--data", planted, "--device", "cpu")
    refused("train_hyma.py", *base, "--width", "8", says=["--width 8", "contradicts"])
    refused("train_hyma.py", *base, "--rank", "8", "--generator", "mlp", says=["--rank 8", "contradicts"])
    predict = ("--pairs", "efflite0:*", "--predict", "control:mpnet")
    refused("train_hyma.py", *base, *predict, says="control must be in a pair")
    refused("train_hyma.py", *base, "--pairs", "vit_l16:mpnet", says=["vit_l16:mpnet", "efflite1", "minilm_l6"])
    refused("train_hyma.py", *base, "--batch-size", "900", says=["--batch-size 900", "810"])
    refused("train_hyma.py", *base, "--batch-size", "0", says="--batch-size 0")
    refused("train_hyma.py", *base, "--batch-size", "1", says="--batch-size 1")
    refused("train_hyma.py", *base, "--rows", "1", says="--rows 1: leaves one row")
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


def test_a_loss_that_is_not_finite_saves_nothing_of_it(refused, planted, tmp_path):
    flags = ("--lr", "1e30", "--warmup-steps", "0", "--epochs", "3", "--clip-norm", "1e9")
    refused("train_hyma.py", "--data", planted, "--out", "x", *QUICK, *flags, says=["the loss of", "nan", "--lr"])
    assert not read_connectors(tmp_path / "x")


def test_collapse_to_chance_is_reported(run, planted):
    result = run("train_hyma.py", "--data", planted, "--out", "x", *QUICK, "--lr", "1e-9", "--pairs", "control:*")
    assert result.code == 0 and "All pairs are at chance" in result.out
    state = {"best": {"score": 0.3, "epoch": 4}}
    line = keep_best(state, None, 0.019, 8, {}, chance=0.01)
    assert line == "epoch 8: collapsed to chance, R@10 1.9%; epoch 4 is kept" and state["best"]["epoch"] == 4
    assert keep_best(state, None, 0.021, 8, {}, chance=0.01) is None


def test_a_settled_ranking_ends_the_search(run, planted, tmp_path):
    """The planted order is clear from the first validation on, so the third of ten is the last; what follows is as always."""
    flags = ("--data", planted, *QUICK, "--epochs", "10", "--pairs", "*:minilm_l6", "--stop-when-stable")
    result = run("train_hyma.py", *flags, "--out", "x")
    assert result.code == 0 and "the ranking has settled; 42 of 60 steps are left out" in result.out + result.err
    ledger, metrics = read_ledger(tmp_path / "x"), read_jsonl(tmp_path / "x" / "metrics.jsonl")
    refinement = vlm.read_json(tmp_path / "x" / "config.json")["flags"]["refine_steps"]
    assert ledger["settled_at"] == 18 and ledger["steps"] == 18 + refinement and len(metrics) == 3
    for name in ("ledger.json", "ranking.csv"):
        (tmp_path / "x" / name).unlink()
    again = run("train_hyma.py", *flags, "--out", "x")  # from its last checkpoint, which is of the refinement
    assert again.code == 0 and read_ledger(tmp_path / "x")["steps"] == ledger["steps"]


@pytest.mark.parametrize("generator", [FactoredHypernetwork, MlpHypernetwork])
def test_a_run_is_also_validated_half_way_where_that_costs_little(planted, generator):
    data = Embeddings(planted)
    scored = choose_pairs(data, ["all"])
    dims = RowStore(data, data.names("image") + data.names("text"), CPU).dims
    made = generator({name: dims[name] for name in data.names("image")}, {name: dims[name] for name in data.names("text")}, 1, 64)
    retrieval = validation_retrieval(data, *split_rows(data), CPU)
    flags = argparse.Namespace(stop_when_stable=False, seed=0, pairs_per_step=2, batch_size=128)
    pairs = argparse.Namespace(trained=scored, scored=scored)

    def count(steps):
        return count_validations(flags, made, retrieval, pairs, steps, dims)

    of_step = step_flops(made, 128, draw_pairs(0, 0, scored, 2), dims)["flops"]
    least = math.ceil(2 * 20 * validation_flops(made, retrieval, scored, dims) / of_step)
    assert (count(1), count(least - 1), count(least), count(100 * least)) == (1, 1, 2, 2) and least > 100
    flags.stop_when_stable = True
    assert count(1) == 10


def test_projecting_each_batch_is_a_cost(run, planted, tmp_path, monkeypatch):
    """Where the coordinates of all rows do not fit in memory, every step makes those of its own; the bits are the same."""
    flags = ("--data", planted, *QUICK, "--epochs", "2", "--rank", "64", "--refine-steps", "2")
    assert run("train_hyma.py", *flags, "--out", "kept").code == 0
    monkeypatch.setattr("hyma.projected_store.bytes_for_copies", lambda device: 0)
    assert run("train_hyma.py", *flags, "--out", "made").code == 0
    assert_same_connectors(tmp_path / "kept", tmp_path / "made")
    kept, made = read_ledger(tmp_path / "kept"), read_ledger(tmp_path / "made")
    dims = {name: encoder.dim for name, encoder in Embeddings(planted).encoders.items()}
    of_steps = 0
    for pair, updates in made["updates_per_pair"].items():
        of_steps += updates * 2 * 128 * dims[pair.split(":")[0]] * 64
    assert (made["flops"] - made["start_flops"]) - (kept["flops"] - kept["start_flops"]) == of_steps > 0
    assert made["start_flops"] < kept["start_flops"]


# ------------------------------------------------------------------------------------------------------- added encoders


def test_an_encoder_is_added_to_a_finished_run(run, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--pairs", "efflite0:*", "control:*", "--seed", "1")
    assert run("train_hyma.py", *flags, "--out", "x").code == 0
    add = ("--add-encoder", "efflite1", "--from", "x")
    result = run("train_hyma.py", *add, "--out", "y")
    assert result.code == 0 and "2 of 3 image and 2 text encoders, 1 pair per step" in result.out, result.err
    rows, before, after = read_ranking(tmp_path / "y"), read_connectors(tmp_path / "x"), read_connectors(tmp_path / "y")
    assert len(rows) == 6 and {row["image"] for row in rows[:2]} == {"efflite1"}
    assert float(rows[1]["val_recall10"]) > 0.8  # the planted best, though only its own part was trained
    for name, state in before.items():
        assert all(torch.equal(state[key], after[name][key]) for key in state), name
    assert run("train_hyma.py", "--data", planted, *QUICK, "--seed", "1", "--out", "all").code == 0
    cost, whole = (read_ledger(tmp_path / out) for out in ("y", "all"))
    assert cost["pairs"] == 2 and cost["flops"] < 0.65 * whole["flops"]  # 0.42 of the pictures' widths, all texts' sums
    assert cost["trainable_parameters"] == (1024 + 1) * 256
    config = vlm.read_json(tmp_path / "y" / "config.json")
    assert config["flags"]["seed"] == 1 and config["flags"]["batch_size"] == 128
    assert config["pairs"] == ["efflite1:minilm_l6", "efflite1:mpnet"]
    again = run("train_hyma.py", *add, "--out", "z")
    assert again.code == 0 and (tmp_path / "z/ranking.csv").read_bytes() == (tmp_path / "y/ranking.csv").read_bytes()

    assert run("train_hyma.py", "--data", planted, *QUICK, "--pairs", "*:minilm_l6", "--out", "one").code == 0
    text = run("train_hyma.py", "--add-encoder", "mpnet", "--from", "one", "--out", "two")
    assert text.code == 0 and len(read_ranking(tmp_path / "two")) == 6, text.err
    refused("train_hyma.py", "--add-encoder", "efflite1", says="--from")
    refused("train_hyma.py", *add, "--out", "y", "--lr", "0.1", says=["holds a run already", "--lr 0.000222"])
    for flag, value in (("--connector", "mlp2"), ("--rank", "64"), ("--seed", "2"), ("--rows", "300")):
        refused("train_hyma.py", *add, flag, value, "--out", "z2", says=[f"{flag} {value}: contradicts --from x", "leave it out"])
    refused("train_hyma.py", "--add-encoder", "control", "--from", "x", says=["control", "x already"])
    refused("train_hyma.py", "--add-encoder", "vit_l16", "--from", "x", says=["vit_l16", "embed.py"])
    refused("train_hyma.py", "--add-encoder", "efflite1", "--from", "nowhere", says="--from nowhere: holds no run")
    (tmp_path / "x" / "config.json").write_text('{"script": "train_hyma.py"}')
    refused("train_hyma.py", *add, says="--from x: no run of train_hyma.py")


def test_a_run_of_an_earlier_version_is_neither_resumed_nor_added_to(run, refused, planted, tmp_path):
    """Whose state has no scores of folds by the name that they have today: without them another pair might rank first."""
    flags = ("--data", planted, *QUICK, "--pairs", "efflite0:*", "control:*", "--out", "x")
    assert run("train_hyma.py", *flags).code == 0
    path = tmp_path / "x" / "checkpoint.pt"
    saved = vlm.load_tensors(path)
    saved["state"]["fold_recall10"] = saved["state"].pop("fold_recalls")
    save_tensors(saved, path)
    refused("train_hyma.py", "--add-encoder", "efflite1", "--from", "x", says="was made by an earlier version")
    (tmp_path / "x" / "ledger.json").unlink()
    refused("train_hyma.py", *flags, says="was started by an earlier version")


def test_an_added_encoder_resumes_to_the_same_bits(run, refused, run_until_results, planted, tmp_path):
    assert run("train_hyma.py", "--data", planted, *QUICK, "--pairs", "efflite0:*", "--out", "x").code == 0
    add = ("--add-encoder", "efflite1", "--from", "x")
    assert run("train_hyma.py", *add, "--out", "whole").code == 0
    run_until_results("train_hyma.py", *add, "--out", "part")
    result = run("train_hyma.py", "--resume", "--out", "part")
    assert result.code == 0 and "part: is finished; nothing is left to train" in result.out, result.err
    assert "more by now" not in result.out
    assert_same_connectors(tmp_path / "whole", tmp_path / "part")
    # What was kept of the base run says what made it, whatever flags its encoder is added with.
    assert run("train_hyma.py", *add, "--logit-scale", "50", "--out", "other").code == 0
    for text in ("mpnet", "minilm_l6"):
        cards = [vlm.read_json(tmp_path / out / "connectors" / f"efflite0_mlp1_{text}.json") for out in ("x", "other")]
        assert [cards[0][key] for key in ("updates", "logit_scale", "epoch")] == [cards[1][key] for key in ("updates", "logit_scale", "epoch")]
    refused("train_hyma.py", *add, "--pairs", "efflite1:mpnet", "--out", "z", says="--pairs efflite1:mpnet: contradicts --add-encoder")
    (tmp_path / "x" / "checkpoint.pt").unlink()
    refused("train_hyma.py", *add, "--out", "z", says="--from x: has no checkpoint.pt any more")


# ------------------------------------------------------------------------------------------------------------- few rows


def test_few_rows_shrink_the_batch(run, refused, planted, tmp_path):
    result = run("train_hyma.py", "--data", planted, "--rows", "200", "--epochs", "30", "--out", "x")
    assert result.code == 0 and "180 training and 20 validation rows" in result.out, result.err
    assert read_ranking(tmp_path / "x")[0]["image"] == "efflite1"
    config = vlm.read_json(tmp_path / "x" / "config.json")
    assert config["flags"]["batch_size"] == 180 and config["rows"] == {"train": 180, "val": 20}
    base = ("--data", planted)
    refused("train_hyma.py", *base, "--rows", "0", says="--rows 0")
    refused("train_hyma.py", *base, "--rows", "200", "--batch-size", "190", says=["--batch-size 190", "180"])


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "images, texts, each", [(9, 3, 3), (9, 3, 9), (9, 3, 4), (4, 2, 4), (2, 5, 3), (1, 1, 1), (7, 7, 5)]
)
def test_every_pair_gets_its_share(images, texts, each):
    pairs = [(f"i{i}", f"t{t}") for i in range(images) for t in range(texts)]
    round_length = texts * math.ceil(images / each)
    counts = Counter()
    for step in range(3 * round_length):
        chosen = draw_pairs(step, 0, pairs, each)
        assert 1 <= len(chosen) <= each and len(set(chosen)) == len(chosen)
        assert len({text for _, text in chosen}) == 1  # whose part is then run once
        counts.update(chosen)
    assert set(counts) == set(pairs) and set(counts.values()) == {3}
    assert draw_pairs(1, 0, pairs, each) == draw_pairs(1, 0, pairs, each)


def test_seeds_draw_other_pairs():
    """A whole run of them: torch's CPU generator takes 32 bits of a seed alone."""
    pairs = [(f"i{i}", f"t{t}") for i in range(9) for t in range(3)]
    drawn = [[draw_pairs(step, seed, pairs, 3) for step in range(18)] for seed in range(20)]
    assert len({str(each) for each in drawn}) == 20


def test_the_never_formed_gradient_takes_part_in_clipping():
    """One update of the mlp generator against autograd with the head as an ordinary parameter, clipping active."""
    torch.manual_seed(0)
    generator = MlpHypernetwork({"a": 48}, {"t": 24}, 1, 8)
    twin = MlpHypernetwork({"a": 48}, {"t": 24}, 1, 8)
    twin.load_state_dict(generator.state_dict())
    head = torch.nn.Parameter(twin.head.clone())
    features = {"t": torch.randn(16, 24)}
    flags = argparse.Namespace(clip_norm=0.01, weight_decay=0.1)
    schedule = Schedule(100, 0.01, 3, flags.weight_decay, CPU)
    optimizer = torch.optim.AdamW(generator.parameters(), weight_decay=0.1)
    plain = torch.optim.AdamW([*twin.parameters(), head], lr=0.01, weight_decay=0.1)
    moments = [torch.zeros_like(generator.head) for _ in range(2)]
    for step in range(3):
        optimizer.zero_grad()
        connector_mlp(*generator(features, [("a", "t")]))[0].square().mean().backward()
        clip_and_update(generator, optimizer, moments, schedule.numbers(step), flags)

        plain.zero_grad()
        plain.param_groups[0]["lr"] = schedule.rate(step)
        twin.head = head.detach()
        connector_mlp(*twin(features, [("a", "t")]))[0].square().mean().backward()
        head.grad = twin.outer[0].T @ twin.outer[1]
        torch.nn.utils.clip_grad_norm_([*twin.parameters(), head], 0.01)
        plain.step()
    torch.testing.assert_close(generator.head, head.detach(), atol=1e-6, rtol=1e-5)
    for one, two in zip(generator.parameters(), twin.parameters()):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the sample


def test_the_main_job_on_the_sample(run, tmp_path):
    """Real embeddings of real pictures: every pretrained pair above the control, in a fraction of the default's steps."""
    result = run("train_hyma.py", "--pairs", "all", "--out", "x", "--epochs", "20", "--device", "cpu")
    assert result.code == 0, result.err
    assert "sample/embeddings (the sample): 1893 training and 373 validation rows" in result.out
    rows = read_ranking(tmp_path / "x")
    assert len(rows) == 8 and [row["image"] for row in rows[-2:]] == ["control", "control"]
    assert float(rows[5]["val_recall10"]) > 1.5 * float(rows[6]["val_recall10"])


def test_the_main_job_takes_little_memory(spawn, tmp_path):
    """In a process of its own: this one has held what every test before took. 1.1 GB, of which torch itself takes 0.5."""
    process = spawn("train_hyma.py", "--pairs", "all", "--out", "x", "--epochs", "2", "--device", "cpu")
    assert process.wait(timeout=300) == 0
    assert read_ledger(tmp_path / "x")["peak_bytes"] < 2e9


# ------------------------------------------------------------------------------------------------- interruptions


def wait_until(process, condition, seconds=120):
    """Waits for a condition, or until the process has ended."""
    until = time.time() + seconds
    while process.poll() is None and time.time() < until and not condition():
        time.sleep(0.01)
    assert process.poll() is None and condition()


def test_a_terminated_run_resumes_by_the_same_command_to_the_same_bits(run, spawn, planted, tmp_path, monkeypatch):
    """SIGUSR1 saves and continues; SIGTERM saves and leaves with 143; the same command resumes it, with or without --out."""
    flags = ("--data", planted, *QUICK, "--epochs", "40", "--pairs", "*:minilm_l6")  # so many have a validation half way
    assert run("train_hyma.py", *flags, "--out", "whole").code == 0
    for out in (("--out", "stopped"), ()):
        folder = tmp_path / "stopped" if out else None
        process = spawn("train_hyma.py", *flags, *out)
        if folder is None:
            wait_until(process, lambda: list((tmp_path / "runs").glob("*/metrics.jsonl")))
            (folder,) = (tmp_path / "runs").iterdir()
        wait_until(process, lambda where=folder: (where / "metrics.jsonl").exists())
        before = (folder / "checkpoint.pt").stat().st_mtime_ns
        process.send_signal(signal.SIGUSR1)
        wait_until(process, lambda where=folder, then=before: (where / "checkpoint.pt").stat().st_mtime_ns > then)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143 and not (folder / "ledger.json").exists()
        result = run("train_hyma.py", *flags, *out)
        assert result.code == 0 and f"resumed: {folder.relative_to(tmp_path)} at step" in result.out, result.err
        assert_same_connectors(tmp_path / "whole", folder)
        same = [read_jsonl(run_folder / "metrics.jsonl") for run_folder in (tmp_path / "whole", folder)]
        for one, two in zip(*same):
            assert {**one, "seconds": 0} == {**two, "seconds": 0}
    finished = run("train_hyma.py", *flags, "--out", "stopped")
    assert finished.code == 0 and "stopped: is finished" in finished.out


def test_a_damaged_checkpoint_has_a_predecessor(run, run_until_results, refused, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--pairs", "*:minilm_l6")
    assert run("train_hyma.py", *flags, "--out", "whole").code == 0
    run_until_results("train_hyma.py", *flags, "--out", "damaged")
    newest, previous = (tmp_path / "damaged" / name for name in ("checkpoint.pt", "checkpoint.previous.pt"))
    newest.write_bytes(newest.read_bytes()[:5000])
    (tmp_path / "damaged" / "metrics.jsonl").unlink()
    result = run("train_hyma.py", "--resume", "--out", "damaged")
    assert result.code == 0 and "checkpoint.pt" in result.err and "taking the one before it" in result.err
    assert_same_connectors(tmp_path / "whole", tmp_path / "damaged")
    assert len(read_jsonl(tmp_path / "damaged" / "metrics.jsonl")) == len(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) == 1
    assert newest.exists() and not previous.exists()  # a finished run needs one
    for path in (newest, previous):
        torch.save({}, path)
    refused("train_hyma.py", "--resume", "--out", "damaged", says=["is no checkpoint of this script", "another --out"])


def test_the_last_update_is_checked(refused, planted, tmp_path):
    """One step whose update overflows: its loss was finite, and there is no next one to notice."""
    flags = ("--lr", "1e38", "--warmup-steps", "0", "--epochs", "1", "--batch-size", "810", "--device", "cpu")
    for script in ("train_hyma.py", "train_grid.py"):
        out = script.removesuffix(".py")
        refused(script, "--data", planted, *flags, "--out", out, says=["not finite", "--lr"])
        assert not list((tmp_path / out / "connectors").iterdir())


@pytest.mark.parametrize("kind", ["one caption", "a constant encoder", "five rows"])
def test_degenerate_data_end_with_a_ranking_or_one_line(run, tmp_path, kind):
    random = torch.Generator().manual_seed(0)
    count = 5 if kind == "five rows" else 60
    vectors = {
        "efflite0": torch.randn(count, 1280, generator=random),
        "efflite1": torch.randn(count, 1280, generator=random),
        "mpnet": torch.randn(count, 768, generator=random),
        "minilm_l6": torch.randn(count, 384, generator=random),
    }
    if kind == "a constant encoder":
        vectors["efflite0"] = torch.ones(count, 1280)
    rows = [{"caption": "a caption"} for _ in range(count)] if kind == "one caption" else [{} for _ in range(count)]
    folder = make_embedding_folder(tmp_path / "e", rows, **vectors)
    for script, more in (
        ("train_hyma.py", ()),
        ("train_grid.py", ()),
        ("train_grid.py", ("--closed-form", "whitened")),
    ):
        result = run(
            script, "--data", folder, "--epochs", "2", "--device", "cpu", "--out", f"{script}{len(more)}", *more
        )
        assert "Traceback" not in result.err
        assert "ranking on" in result.out if result.code == 0 else result.err.splitlines()[-1].startswith(script)


def test_a_run_is_not_written_among_other_files(refused, planted, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    refused("train_hyma.py", "--data", planted, *QUICK, "--out", "home", says=["--out home", "letter.txt", "new one"])
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]
    refused("train_hyma.py", "--data", planted, *QUICK, "--out", ".", says="choose a new one")
    refused("train_hyma.py", "--data", planted, *QUICK, "--seed", str(2**64), says=f"--seed {2**64}")
    refused("train_hyma.py", "--data", planted, *QUICK, "--weight-decay", "nan", says="--weight-decay")
    refused("train_hyma.py", "--data", planted, "--device", "meta", says="--device meta")
