"""evaluate.py by its command line: the answer, the oracle, costs beside it, runs of every kind, faults."""

import re
import shutil

import numpy as np
import pytest
import torch
from helpers import CPU, QUICK, make_embedding_folder, read_csv, tasks_of, unit_vectors, write_csv

import evaluate
import vlm
from hyma.embeddings import hash_keys
from hyma.evaluation import evaluate_methods, gain_over_all
from hyma.files import read_jsonl, sha256_file, write_json, write_jsonl
from hyma.methods import SelectionMethod, group_runs
from hyma.metrics import TaskScores, draw_seed_weights, resample
from hyma.runs import read_run
from hyma.scoring import headline_first
from hyma.task_inputs import image_inputs, text_inputs
from hyma.tasks import score

# ------------------------------------------------------------------------------------------------------------ the whole


def test_a_planted_best_pair_is_found(evaluation):
    out = evaluation.out
    assert re.search(r"\nStitch efflite1 with \w+ \(mlp0\), the choice of hyma", out)
    assert "warning" not in out and "400 pictures" in out
    found = vlm.read_json(evaluation.folder / "results.json")
    assert found["answer"] in out and found["oracle"] == "grid mlp0" and len(found["results"]) == 4 * 6
    first = found["results"][0]
    assert list(first)[:5] == ["dataset", "model", "pretrained", "task", "metrics"]
    assert first["task"] == "zeroshot_retrieval" and "image_retrieval_recall@5" in first["metrics"]


def test_every_way_of_choosing_finds_the_planted_encoder(evaluation):
    rows = {row["method"]: row for row in read_csv(evaluation.folder / "selectors.csv")}
    assert len(rows) == 4 + 9 + 1
    for name, row in rows.items():
        assert float(row["regret_low"]) <= float(row["regret"]) + 1e-9 and float(row["regret_random"]) > 30
        # Gromov-Wasserstein uses no pairs, and noise in its pictures hardly changes it.
        if "largest" not in name and name not in ("random order", "Gromov-Wasserstein"):
            assert "efflite1" in row["chosen"] and "control" not in row["chosen"], name
            # Only the picture's encoder is planted: of the two texts, either may be first.
            assert float(row["regret"]) < float(row["regret_random"]) / 4 and float(row["spearman"]) > 0.5, name
    assert rows["random order"]["regret"] == rows["random order"]["regret_random"]
    assert float(rows["largest (sum of widths)"]["regret"]) > 20  # efflite0 is as wide
    assert float(rows["grid mlp0"]["gap_all"]) == 0 and rows["linear CKA"]["own_score"] == ""
    flops = [float(rows[name]["flops"]) for name in ("linear CKA", "halving mlp0", "grid mlp0")]
    assert flops == sorted(flops)


def test_the_true_score_is_what_the_oracles_connector_scores(evaluation):
    table = read_csv(evaluation.folder / "ranking.csv")
    assert [row["image"] for row in table] == ["efflite1"] * 2 + ["efflite0"] * 2 + ["control"] * 2
    records = vlm.read_json(evaluation.folder / "results.json")["results"]
    model = f"{table[0]['image']}_mlp0_{table[0]['text']}"
    (ours,) = (record for record in records if record["method"] == "grid mlp0" and record["model"] == model)
    mean = sum(ours["metrics"][f"{way}_retrieval_recall@10"] for way in ("image", "text")) / 2
    assert float(table[0]["true_score"]) == pytest.approx(100 * mean, abs=1e-3)


def test_a_pairs_score_has_passed_through_the_loader_that_users_call(evaluation, runs, graded):
    """Each score of the grid again, by `load_connector` and the task alone."""
    (task,) = tasks_of(graded).values()
    records = vlm.read_json(evaluation.folder / "results.json")["results"]
    for record in (each for each in records if each["method"] == "grid mlp0"):
        connector = vlm.load_connector(runs / "grid" / "connectors" / f"{record['model']}.pt")
        found = score(task, text_inputs(task, record["text"]), image_inputs(task, record["image"]), connector)
        assert found.metrics == pytest.approx(record["metrics"])


def test_the_newest_run_alone_is_its_own_truth(run, runs, planted, tmp_path):
    """No arguments: the newest run, which is its own truth, and says so."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(runs / "ridge", tmp_path / "runs" / "old")
    shutil.copytree(runs / "hyma", tmp_path / "runs" / "new")
    (tmp_path / "runs" / "new" / "ledger.json").touch()
    result = run("evaluate.py")
    assert result.code == 0 and "choice of hyma factored mlp0" in result.out and "ridge mlp0" not in result.out, (
        result.err
    )
    assert "warning: no oracle" in result.out and (tmp_path / "report" / "report.html").is_file()


def test_the_demo_reuses_finished_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "DEMO", {"demo-ridge": ["train_grid.py", "--closed-form", "ridge"]})
    assert [str(path) for path in evaluate.run_demo(CPU)] == ["runs/demo-ridge"]
    assert read_run("runs/demo-ridge").config["flags"]["closed_form"] == "ridge"
    capfd.readouterr()
    evaluate.run_demo(CPU)
    assert not capfd.readouterr().out
    monkeypatch.setattr(evaluate, "DEMO", {"demo-x": ["train_grid.py", "--epochs", "-1"]})
    with pytest.raises(vlm.BadInput, match="train_grid.py ended with status 1"):
        evaluate.run_demo(CPU)


def test_shuffled_captions_are_at_chance(run, graded, tmp_path):
    order = torch.randperm(1300, generator=torch.Generator().manual_seed(5))
    vectors = {path.stem: torch.load(path, weights_only=True) for path in graded.glob("*.pt")}
    vectors |= {name: vectors[name][order] for name in ("minilm_l6", "mpnet")}
    folder = make_embedding_folder(tmp_path / "shuffled", read_jsonl(graded / "rows.jsonl"), **vectors)
    assert run("train_grid.py", "--data", folder, "--closed-form", "ridge", "--out", "x", "--device", "cpu").code == 0
    result = run("evaluate.py", "x")
    assert result.code == 0 and "do captions and pictures belong together?" in result.out, result.err
    for row in read_csv(tmp_path / "report" / "ranking.csv"):
        assert abs(float(row["true_score"]) - 100 * 10 / 400) < 2.5


# ------------------------------------------------------------------------------------------- runs, seeds and the oracle


def test_intervals_are_over_seeds_too():
    """Two seeds whose truths disagree, without any noise of rows: every mixture of them is within the interval."""
    values = np.array([[[1.0] * 50, [0.0] * 50], [[0.0] * 50, [0.5] * 50]])  # [2 seeds, 2 pairs, 50 rows]
    orders = np.array([[1.0, 0.0], [0.0, 1.0]])
    oracle = SelectionMethod("oracle", orders, [None, None], {})
    scores = TaskScores("t", "", "", "", 0.0, {"oracle": values.mean(-1)}, resample({"oracle": values}, 400, ""))
    second = SelectionMethod("second", orders[1:], [], {})
    seed_weights = draw_seed_weights([oracle, second], 400)
    both, other = evaluate_methods(scores, [oracle, second], oracle, seed_weights)
    regret = both.fidelity["regret"]
    assert regret.value == pytest.approx(12.5)  # truth 0.5 and 0.25; one seed chooses each
    # A seed drawn twice chooses rightly by its own truth, but not one who always takes the second pair.
    assert (regret.low, regret.high) == (0, 12.5) and regret.random == pytest.approx(12.5)
    regret = other.fidelity["regret"]
    assert (regret.value, regret.low, regret.high) == (25, 0, 100)
    assert both.own.own_score == pytest.approx(75) and both.own.gap_all == 0


def test_seeds_are_one_method_and_names_differ(runs):
    hyma, grid = read_run(runs / "hyma"), read_run(runs / "grid")
    pairs = list(grid.ranks)

    def like(run, folder, seed, method=None, **flags):
        folder, recipe = run.folder.with_name(folder), run.recipe | flags
        return run._replace(folder=folder, seed=seed, recipe=recipe, method=method or run.method)

    several = [
        hyma,
        like(hyma, "h1", 1),
        grid,
        like(grid, "g1", 1),
        like(grid, "g2", 1, lr=0.5),
        like(grid, "g3", 0),
        like(grid, "b", 0, "grid mlp0, FLOPs of hyma", budget_of="a run"),
        like(grid, "b1", 1, "grid mlp0, FLOPs of hyma-1", budget_of="a run"),
    ]
    methods = group_runs(several, pairs)
    assert [len(method.runs) for method in methods] == [2, 2, 1, 1, 2]
    names = [method.name for method in methods]
    assert len(set(names)) == 5 and names[0] == "hyma factored mlp0" and names[4] == "grid mlp0, FLOPs of hyma"
    assert names[1:4] == [f"grid mlp0 ({runs / name})" for name in ("grid", "g2", "g3")]
    assert methods[0].preferences.shape == (2, 6) and methods[0].preferences.max() == -1


def test_another_seed_is_the_noise_floor(run, runs, tmp_path):
    """A seed named as the oracle is the truth for another seed of the same grid, which stands beside it."""
    other = changed(runs, tmp_path / "other", "grid", config={"seed": 7})
    flags = ("--bootstrap", "10", "--selector-rows", "0")
    result = run("evaluate.py", other, "--oracle", runs / "grid", *flags)
    assert result.code == 0 and f"choice of grid mlp0 ({other})" in result.out and "no oracle" not in result.out, (
        result.err
    )
    rows = read_csv(tmp_path / "report" / "selectors.csv")
    assert [row["method"] for row in rows] == [f"grid mlp0 ({other})", f"grid mlp0 ({runs / 'grid'})", "random order"]
    together = run("evaluate.py", other, runs / "grid", *flags)  # named alike, they are two seeds of one oracle
    assert "truth: grid mlp0, seeds: 2" in together.out


def test_a_choice_that_is_no_better_than_random_is_reported_as_plainly_as_a_good_one(run, runs, tmp_path):
    """A run whose ranking is upside down: a sentence in the terminal, and a cell where a good choice has one."""
    wrong = changed(runs, tmp_path / "wrong", "hyma")
    rows = read_csv(wrong / "ranking.csv")
    upside_down = []
    for row, other in zip(rows, reversed(rows)):
        upside_down.append(row | {"image": other["image"], "text": other["text"]})
    write_csv(wrong / "ranking.csv", upside_down)
    result = run("evaluate.py", wrong, "--oracle", runs / "grid", "--bootstrap", "20", "--selector-rows", "0")
    assert result.code == 0, result.err
    row = read_csv(tmp_path / "report" / "selectors.csv")[0]
    (line,) = [line for line in result.out.splitlines() if line.startswith("Stitch control")]
    regret = f"{float(row['regret']):.2f} points"
    assert f"On e retrieval the choice is worse than a random one: its regret is {regret}" in line
    assert "are better on 400 pictures than control with" in line
    page = (tmp_path / "report" / "report.html").read_text()
    assert re.search(r'<td class="bad">worse than\s+random</td>', page) and line.split(". ")[1] in page


def test_connectors_alone_are_not_scored_on_rows_that_trained_them(run, refused, runs, graded, tmp_path):
    """Their cards say on which embeddings they were trained, by which encoders, and with which settings."""
    alone, data = tmp_path / "alone", tmp_path / "e"
    shutil.copytree(runs / "grid" / "connectors", alone)
    shutil.copytree(graded, data)
    manifest, rows = vlm.read_json(data / "manifest.json"), read_jsonl(data / "rows.jsonl")
    flags = (alone, "--task", f"own={data}", "--bootstrap", "10")

    def seal(**more):
        write_jsonl(data / "rows.jsonl", rows)
        manifest.update(keys_sha256=hash_keys(rows), **more)
        for record in manifest["encoders"].values():
            record["keys_sha256"] = manifest["keys_sha256"]
        write_json(data / "manifest.json", manifest)

    seal(test_set_aside=True)  # by embed.py: of a folder that they have not seen, all rows would count
    result = run("evaluate.py", *flags)
    assert result.code == 0 and "own retrieval, 400 pictures" in result.out and "trained on rows" not in result.out, result.err
    assert "its regret is" not in result.out and "random one" not in result.out  # the truth itself has chosen
    assert "What the choice loses" not in (tmp_path / "report" / "report.html").read_text()

    for row in rows:
        row["split"] = "train" if row["split"] == "test" else row["split"]
    seal()
    result = run("evaluate.py", *flags)
    assert result.code == 0 and "warning: e: the connectors were trained on rows of it" in result.out.replace(str(data), "e")

    path = next(alone.glob("efflite0_*.json"))
    manifest["encoders"]["efflite0"]["weights_sha256"] = "1" * 64
    seal()
    write_json(path, vlm.read_json(path) | {"weights_sha256": {"efflite0": "2" * 64}})
    refused("evaluate.py", *flags, says=[path.stem, "was trained on other weights of efflite0"])


def test_a_report_overwrites_no_run(refused, run, runs, tmp_path):
    copy = changed(runs, tmp_path / "copy", "grid")
    before = (copy / "ranking.csv").read_bytes()
    refused("evaluate.py", copy, "--out", copy, says=[f"--out {copy}: holds other files", "name a new folder"])
    assert (copy / "ranking.csv").read_bytes() == before


def test_names_that_mean_nothing_here_are_refused(refused, runs):
    refused("evaluate.py", runs / "grid", "--weights", "mpnett=/nowhere", says="--weights mpnett: is none of the encoders here, which are")


def test_a_path_with_dollar_signs_and_few_rows(run, runs, graded, tmp_path):
    """matplotlib would read the one as mathematics; the others are too few for selectors, which costs the report nothing."""
    assert run("train_grid.py", "--data", graded, *QUICK, "--batch-size", "32", "--rows", "50", "--out", "a$x_{/$r").code == 0
    result = run("evaluate.py", "a$x_{/$r", "--bootstrap", "10")
    assert result.code == 0 and "warning: no selectors: they need 50 training pictures, and" in result.out, result.err


def test_a_choice_that_finds_the_best_pair_is_no_random_one():
    """Though the bound of its regret, a maximum of noisy scores, lies above a random choice's."""
    resampled = 0.5 + torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).numpy() * 0.01
    resampled[:, 0] += 0.05
    ones = np.ones((400, 1))
    low, high = gain_over_all(resampled, np.array([[6, 5, 4, 3, 2, 1]]), ones)
    assert 1 < low < 4.2 < high
    low, high = gain_over_all(resampled, np.array([[1, 6, 5, 4, 3, 2]]), ones)
    assert low < 0 < high + 2
    assert gain_over_all(resampled, np.zeros((1, 6)), ones) == pytest.approx([0, 0], abs=1e-9)  # a tie of all


def test_the_ways_of_choosing_are_printed_with_the_least_regret_first(evaluation):
    table = evaluation.out.partition("regret, points (95 %)")[2].partition("\n\n")[0]
    regrets = [float(line.split()[0]) for line in table.splitlines()[1:]]
    assert len(regrets) == 14 and regrets == sorted(regrets)


def test_a_run_on_some_rows_is_no_oracle_and_embeds_less(run, graded, runs, tmp_path):
    """--rows and --from: neither run is taken for the full grid, and what each leaves out of its cost is reported."""
    flags = ("--data", graded, *QUICK, "--batch-size", "64")
    assert run("train_grid.py", *flags, "--rows", "300", "--out", "few").code == 0
    assert run("train_grid.py", *flags, "--from", runs / "hyma", "--out", "refined").code == 0
    result = run("evaluate.py", "few", "refined", "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0 and "warning: no oracle" in result.out, result.err
    assert "warning: grid mlp0, from hyma: starts from another run's connectors" in result.out
    rows = {row["method"]: row for row in read_csv(tmp_path / "report" / "selectors.csv")}
    assert rows["grid mlp0, 300 rows"]["rows_embedded"] == str((266 + 33) * 5)  # in proportion; 5 encoders
    assert rows["grid mlp0, from hyma"]["rows_embedded"] == str(900 * 5)


def test_predicted_pairs_need_no_updates(run, planted, tmp_path):
    """Five of six pairs trained: at as many updates of those as the grid's, the run costs what it cost."""
    flags = ("--data", planted, *QUICK)
    pairs = ("--pairs", "efflite?:*", "control:mpnet", "--predict", "control:*")
    pairs += ("--pairs-per-step", "3", "--refine-steps", "0")  # a text encoder a step, of two
    assert run("train_hyma.py", *flags, *pairs, "--epochs", "8", "--out", "some").code == 0
    assert run("train_grid.py", *flags, "--epochs", "4", "--out", "grid").code == 0
    result = run("evaluate.py", "some", "grid", "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0 and "truth: grid" in result.out, result.err
    row = read_csv(tmp_path / "report" / "selectors.csv")[0]
    assert row["updates_low"] == "0" and row["flops_equal_updates"] == row["flops_equal_batch"]


def test_costs_beside_a_closed_form_are_at_a_trained_runs_batch(run, runs, tmp_path):
    """A closed form's one step on all rows is no batch size, even where the closed form is the truth."""
    flags = ("--bootstrap", "10", "--selector-rows", "0")
    assert run("evaluate.py", runs / "hyma", "--oracle", runs / "ridge", *flags).code == 0
    row = read_csv(tmp_path / "report" / "selectors.csv")[0]
    assert row["flops"] == row["flops_equal_batch"] == row["flops_equal_updates"]


def test_connectors_alone_are_scored_without_costs(run, refused, runs, graded, tmp_path):
    """As published: scored, and a truth for others, but no choice by validation rows, no costs and no selectors."""
    bare = tmp_path / "published"
    bare.mkdir()
    for path in (runs / "grid" / "connectors").glob("*.pt"):
        shutil.copy(path, bare)
    refused("evaluate.py", bare, says=["published: holds connectors alone", "--task NAME=FOLDER"])
    result = run("evaluate.py", bare, "--task", f"own={graded}", "--bootstrap", "10")
    assert result.code == 0 and "(mlp0), the best of connectors in published" in result.out.replace(
        str(tmp_path) + "/", ""
    )
    assert "own retrieval, 400 pictures" in result.out and "TFLOP in" not in result.out and "CKA" not in result.out
    beside = run("evaluate.py", runs / "hyma", "--oracle", bare, "--bootstrap", "10")
    assert beside.code == 0 and "choice of hyma" in beside.out and "truth: connectors in" in beside.out, beside.err
    names = (read_run(bare), read_run(runs / "grid"))
    assert [set(each.ranks) for each in names] == [set(names[1].ranks)] * 2
    shutil.copy(bare / "efflite1_mlp0_mpnet.pt", bare / "efflite1_mlp1_mpnet.pt")
    refused("evaluate.py", bare, "--task", f"own={graded}", says="efflite1_mlp1_mpnet.pt: expected the keys")
    deeper = vlm.init_modality_connector(768, [1024], 1280)
    torch.save(deeper.state_dict(), bare / "efflite1_mlp1_mpnet.pt")
    refused(
        "evaluate.py",
        bare,
        "--task",
        f"own={graded}",
        says="connectors of [0, 1] hidden layers; keep connectors of one depth",
    )
    (tmp_path / "empty").mkdir()
    refused("evaluate.py", "empty", says="empty: holds no run")


# ------------------------------------------------------------------------------------------------------- tasks and rows


def test_retrieval_leads_and_the_others_stand_beside_it():
    """Labels make two tasks; neither weighs in the headline, and the sentence is about retrieval."""
    scores = [
        TaskScores(
            f"{name} {kind}", kind, "", "9 pictures", 0.1, {"m": np.full((1, 2), value)}, {"m": np.ones((1, 3, 2))}
        )
        for name, kind, value in (
            ("a", "zeroshot", 0.1),
            ("a", "retrieval", 0.2),
            ("b", "vqa", 0.3),
            ("b", "retrieval", 0.4),
        )
    ]
    found = headline_first(scores)
    assert [each.name for each in found] == [
        "the mean of a retrieval and b retrieval", "a retrieval", "b retrieval", "a zeroshot", "b vqa"
    ]  # fmt: skip
    assert found[0].scores["m"].tolist() == [[0.3, 0.3]] and found[0].kind == "retrieval"
    assert [each.name for each in headline_first(scores[:2])] == ["a retrieval", "a zeroshot"]
    assert headline_first(scores[:1]) == scores[:1]


def test_training_rows_are_never_scored(run, planted, tmp_path):
    """The runs' own folder named as a task, without a test split: its validation rows, as without --task."""
    assert run("train_grid.py", "--data", planted, "--closed-form", "ridge", "--out", "x", "--device", "cpu").code == 0
    result = run("evaluate.py", "x", "--task", f"own={planted}", "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0 and "has no test split" in result.out and "90 pictures" in result.out, result.err


def test_a_task_that_shows_training_pictures_says_so(run, tmp_path):
    """One folder holds pictures of the validation and test rows alone, another 20 of the training rows too."""
    vectors = {"efflite1": unit_vectors(60, 1280), "mpnet": unit_vectors(60, 768, seed=1)}
    splits = ["train"] * 40 + ["val"] * 10 + ["test"] * 10
    rows = [{"split": split, "image_sha256": str(k)} for k, split in enumerate(splits)]
    data = make_embedding_folder(tmp_path / "e", rows, **vectors)
    other = make_embedding_folder(tmp_path / "other", [{"image_sha256": str(k + 20)} for k in range(20, 80)], **vectors)
    seen = make_embedding_folder(tmp_path / "seen", [{"image_sha256": str(k)} for k in range(20, 80)], **vectors)
    flags = ("--data", data, "--closed-form", "ridge", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    tasks = ("--task", f"own={data}", "--task", f"other={other}", "--task", f"seen={seen}")
    result = run("evaluate.py", "x", *tasks, "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0, result.err
    said = "seen: 20 of its 60 pictures are among those that the runs were trained on"
    assert said in result.out and result.out.count("were trained on") == 1, result.out
    for name in ("other", "seen"):
        assert f"{name}: 10 of its 60 pictures are among those that chose the runs' connectors" in result.out


def test_without_a_test_split_the_validation_rows_are_scored(run, refused, planted, tmp_path):
    """The rows that chose also score, which is reported; of two seeds, neither's rows are left to score both."""
    flags = ("--data", planted, "--closed-form", "ridge", "--device", "cpu", "--seeds", "0", "1", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    result = run("evaluate.py", "x-s1", "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0 and "has no test split" in result.out and "90 pictures" in result.out, result.err
    recalls = [float(row["true_score"]) for row in read_csv(tmp_path / "report" / "ranking.csv")]
    chosen_by = [100 * float(row["val_recall10"]) for row in read_csv(tmp_path / "x-s1" / "ranking.csv")]
    # Seed 1's own validation rows, here without the training rows that stand among their candidates when they choose.
    assert all(recall >= chosen - 1e-3 for recall, chosen in zip(recalls, chosen_by)) and recalls[0] == 100
    refused("evaluate.py", "x-s0", "x-s1", says=["no split column", "seeds 0 and 1", "--task"])


# ------------------------------------------------------------------------------------------------------------ bad input


def changed(runs, folder, name, **files):
    """A copy of a run with JSON files changed; None removes one."""
    shutil.copytree(runs / name, folder)
    for file, change in files.items():
        path = folder / f"{file}.json"
        if change is None:
            path.unlink()
        else:
            write_json(path, vlm.read_json(path) | change)
    return folder


def test_runs_that_cannot_be_evaluated_are_refused(refused, runs, planted, tmp_path):
    refused("evaluate.py", says=["no finished run", "--demo"])
    refused("evaluate.py", "nowhere", says=["nowhere: holds no run", "train_hyma.py"])
    unfinished = changed(runs, tmp_path / "unfinished", "hyma", ledger=None)
    refused("evaluate.py", unfinished, says=["not finished", "train_hyma.py --resume --out"])
    damaged = changed(runs, tmp_path / "damaged", "hyma", ledger={"flops": None})
    refused("evaluate.py", damaged, says=["damaged", "make the run again"])
    config = vlm.read_json(runs / "hyma" / "config.json")
    elsewhere = changed(runs, tmp_path / "elsewhere", "hyma", config={"flags": config["flags"] | {"data": "far/away"}})
    refused("evaluate.py", elsewhere, says=["far/away: no such folder from here", "--data FOLDER"])
    lacking = changed(runs, tmp_path / "lacking", "hyma")
    (lacking / "connectors" / "efflite1_mlp0_mpnet.pt").unlink()
    refused("evaluate.py", lacking, says=["efflite1_mlp0_mpnet.pt: no such file", "efflite1:mpnet"])
    cut = changed(runs, tmp_path / "cut", "hyma")
    path = cut / "connectors" / "efflite1_mlp0_mpnet.pt"
    path.write_bytes(path.read_bytes()[:1000])
    refused("evaluate.py", cut, says=["efflite1_mlp0_mpnet.pt", "cannot be read"])


def test_a_connector_that_is_not_finite_is_named(run, refused, runs, tmp_path):
    broken = changed(runs, tmp_path / "broken", "hyma")
    path = broken / "connectors" / "efflite1_mlp0_mpnet.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"bias": state["bias"] * torch.nan}, path)
    refused("evaluate.py", broken, says=["efflite1_mlp0_mpnet.pt", "not finite"])


def test_embeddings_that_changed_are_refused(refused, runs, graded, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(graded, folder)
    torch.save(torch.load(folder / "mpnet.pt", weights_only=True).flip(0), folder / "mpnet.pt")
    refused(
        "evaluate.py", runs / "hyma", "--data", folder, says=["moved/mpnet.pt: differs from the file that was sealed"]
    )
    manifest = vlm.read_json(folder / "manifest.json")
    manifest["encoders"]["mpnet"]["file_sha256"] = sha256_file(folder / "mpnet.pt")
    write_json(folder / "manifest.json", manifest)
    refused("evaluate.py", runs / "hyma", "--data", folder, says=["moved/mpnet.pt: is not what", "sha256"])
    manifest["encoders"].pop("mpnet")
    write_json(folder / "manifest.json", manifest)
    refused("evaluate.py", runs / "hyma", "--data", folder, says=["has no mpnet", "--data"])
    config = vlm.read_json(runs / "grid" / "config.json")
    other = changed(runs, tmp_path / "other", "grid", config={"embeddings": config["embeddings"] | {"mpnet": "0" * 64}})
    refused("evaluate.py", runs / "hyma", other, says=["another mpnet.pt"])


def test_oracles_that_cannot_be_the_truth_are_refused(run, refused, runs, graded, tmp_path):
    few = ("--data", graded, *QUICK, "--epochs", "1", "--pairs", "efflite1:*", "--out", "few")
    assert run("train_grid.py", *few).code == 0
    refused("evaluate.py", runs / "hyma", "--oracle", "few", says=["few: has no ", "4 pairs missing of 6"])
    result = run("evaluate.py", "few", "--oracle", runs / "grid", "--bootstrap", "10", "--selector-rows", "0")
    assert "has 6 pairs, of which 2 are compared; its cost is that of all 6" in result.out, result.err
    assert "TFLOP in" in result.out and "times the FLOPs of" not in result.out
    refused("evaluate.py", runs / "hyma", "few", says=["few: has no "])
    refused(
        "evaluate.py", runs / "hyma", "--oracle", runs / "grid", runs / "halving", says="must be seeds of one method"
    )
    assert run("evaluate.py", "few", "--oracle", runs / "grid", "--bootstrap", "10").code == 0  # more pairs do no harm


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--bootstrap", "0"), "--bootstrap 0"),
        (("--selector-rows", "10"), "--selector-rows 10"),
        (("--task", "coco"), "--task coco: expected NAME=FOLDER"),
        (("--task", "a=b", "--task", "a=c"), "--task: a name is given twice"),
        (("--weights", "mpnet"), "--weights mpnet: expected NAME=PATH"),
        (("--demo",), "--demo: makes its own runs"),
    ],
)
def test_bad_flags_are_named(refused, flags, says):
    refused("evaluate.py", "run", *flags, says=says)
