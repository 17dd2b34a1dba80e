"""The ladder of corpus sizes: Mordal's search on planted encoders, and what is measured of runs that are there."""

import argparse
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from helpers import ROOT, make_embedding_folder, write_csv

import vlm

sys.path.insert(0, str(ROOT / "benchmarks"))

import icons
import ladder
import mordal

from hyma.embeddings import Embeddings


def test_icons_of_coloured_and_of_monochrome_sets(tmp_path):
    """A coloured set has each drawing once, without skin tones; a monochrome set one icon for each caption."""
    sets = {"inks": (True, "MIT"), "lines": (False, "MIT"), "closed": (False, "CC BY-NC 4.0")}
    names = {
        "inks": {"red-car": "a", "red-car-2": "a", "wave": "b", "wave-dark-skin-tone": "c"},
        "lines": {"car-bold": "d", "car-outline": "e", "car-side-24": "f", "q": "g"},
        "closed": {"boat": "h"},
    }
    files = {"collections": {name: {"palette": hue, "license": {"title": title}} for name, (hue, title) in sets.items()}}
    for name, bodies in names.items():
        files[f"json/{name}"] = {"icons": {icon: {"body": body} for icon, body in bodies.items()}, "height": 24}
    package = tmp_path / "icons.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name, value in files.items():
            text = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    coloured, monochrome = icons.read_icons(package, True), icons.read_icons(package, False)
    assert [(icon.path, icon.caption) for icon in coloured] == [
        ("icons/inks/red-car.png", "red car"),
        ("icons/inks/wave.png", "wave"),
    ]
    assert [(icon.path, icon.caption) for icon in monochrome] == [
        ("icons/lines/car-bold.png", "car"),
        ("icons/lines/car-side-24.png", "car side"),
    ]
    assert 'viewBox="0 0 16 24"' in coloured[0].svg


def test_no_row_of_a_rung_has_a_picture_that_another_part_holds_out(tmp_path, monkeypatch):
    """c has the picture of the test row a, h that of the validation row f, g that of i, which tests the fresh rung."""
    pictures = {"c": "a", "h": "f", "g": "i"}
    splits = {"a": "test", "f": "val"}
    parts = []
    for name, keys in (("part-0", "abd"), ("part-1", "cefg"), ("part-2", "hi")):
        rows = []
        for key in keys:
            split = splits.get(key, "train")
            rows.append({"key": key, "split": split, "image_sha256": pictures.get(key, key)})
        vectors = torch.eye(9, 1280)[[ord(key) - ord("a") for key in keys]]
        parts.append(make_embedding_folder(tmp_path / name, rows, efflite0=vectors))
    monkeypatch.setattr(ladder, "make_part", lambda flags, index, corpus: parts[index])
    monkeypatch.setattr(icons, "TEST_ROWS", 1)
    flags = argparse.Namespace(work=tmp_path)
    for make, rung, keys in (
        (ladder.make_rung, 2, "abd"),
        (ladder.make_rung, 4, "abdef"),
        (ladder.make_rung, 6, "abdefgi"),
        (ladder.make_rung_of_fresh_rows, 3, "cefi"),
    ):
        data = Embeddings(make(flags, rung))
        assert "".join(row["key"] for row in data.rows) == keys
        assert data.load("efflite0").argmax(dim=1).tolist() == [ord(key) - ord("a") for key in keys]


def test_clusters_are_families_and_a_medoid_is_most_like_its_family(tmp_path):
    random = torch.Generator().manual_seed(0)
    one, other, some, more = torch.randn(4, 200, 16, generator=random)
    vectors = {}
    for name, latent in (
        ("efflite0", one + 0.7 * some),
        ("efflite1", one),
        ("efflite2", one + 0.7 * more),
        ("control", other),
        ("mpnet", one),
        ("minilm_l6", other),
    ):
        dim = vlm.ENCODERS[name].dim
        vectors[name] = latent @ torch.randn(16, dim, generator=random)
    families = make_embedding_folder(
        tmp_path / "families", [{"split": "train"}] * 180 + [{"split": "val"}] * 20, **vectors
    )
    clusters, cost = mordal.cluster_encoders(families)
    assert clusters["image"] == {"efflite1": ["efflite0", "efflite1", "efflite2"], "control": ["control"]}
    assert sorted(clusters["text"]) == ["minilm_l6", "mpnet"] and cost["flops"] > 0


def test_encoders_that_see_the_same_are_one_cluster():
    """As in colour and in grey on monochrome icons, where rounding has put a CKA above 1."""
    alike = np.array([[1, 1 + 2e-7, 0.2], [1 + 2e-7, 1, 0.2], [0.2, 0.2, 1]])
    clusters = mordal.cluster(["colour", "grey", "control"], alike)
    assert sorted(clusters.values()) == [["colour", "grey"], ["control"]]


def test_a_learning_curve_is_a_line_in_logarithms():
    errors = [0.8 * length**-0.3 for length in (1, 2)]
    assert mordal.extrapolate([1, 2], errors, 10) == pytest.approx(0.8 * 10**-0.3)
    assert mordal.extrapolate([3], [0.4], 10) == 0.4


def test_search_trains_what_it_cannot_rule_out(tmp_path, monkeypatch):
    """efflite2:mpnet learns slowly and would win in the end; the control's pairs are ruled out by their medoids."""
    images = {"efflite1": ["efflite0", "efflite1", "efflite2"], "control": ["control"]}
    clusters = {"image": images, "text": {"mpnet": ["mpnet"], "minilm_l6": ["minilm_l6"]}}
    monkeypatch.setattr(mordal, "cluster_encoders", lambda data: (clusters, {"flops": 1, "seconds": 1}))
    monkeypatch.setattr(mordal, "KEPT", 1)
    trained = {}

    def train(name, *options):
        pairs = list(options[options.index("--pairs") + 1 :])
        length = options[options.index("--epochs") + 1] if "--epochs" in options else 10
        slope = {"efflite2:mpnet": 0.5}
        errors = {pair: (0.9 if "efflite" in pair and "mpnet" in pair else 0.99) for pair in pairs}
        rows = []
        for pair, error in sorted(errors.items(), key=lambda item: item[1]):
            image, text = pair.split(":")
            rows.append({"image": image, "text": text, "val_recall10": 1 - error * length ** -slope.get(pair, 0.1)})
        folder = tmp_path / name
        folder.mkdir()
        write_csv(folder / "ranking.csv", rows)
        trained[name] = pairs
        return folder

    runs, preference, _ = mordal.search(None, train, epochs=20)
    assert [run.name for run in runs] == ["medoids", "2-epochs", "4-epochs", "chosen"]
    assert set(trained["medoids"]) == {"efflite1:mpnet", "efflite1:minilm_l6", "control:mpnet", "control:minilm_l6"}
    assert set(trained["2-epochs"]) == {"efflite0:mpnet", "efflite1:mpnet", "efflite2:mpnet"}
    assert trained["chosen"] == ["efflite2:mpnet"] and len(preference) == 8
    assert preference["efflite2:mpnet"] == pytest.approx(1 - 0.9 * 20**-0.5)
    assert min(preference[pair] for pair in trained["2-epochs"]) > max(
        preference[pair] for pair in preference if pair not in trained["2-epochs"]
    )


def test_a_choice_against_grid_search_by_hand():
    truth = {"a:t": (5.0, 30.0), "b:t": (9.0, 20.0), "c:t": (1.0, 10.0)}
    preference = {"a:t": 1, "b:t": 3, "c:t": 2}
    found = ladder.compare_choice(
        preference, (8.0, 29.0), truth, {"flops": 1, "seconds": 3}, {"flops": 10, "seconds": 6}
    )
    assert found == pytest.approx(
        {
            "flops": 0.1,
            "seconds": 0.5,
            "chosen": "b:t",
            "regret": 10,
            "spearman": -0.5,
            "delivered R@1": 3,
            "delivered R@10": -1,
        }
    )


def test_a_run_judged_by_several_truths_by_hand():
    found = ladder.mean_of([{"best": "a:t", "chosen": "b:t", "regret": 1.0}, {"best": "b:t", "chosen": "b:t", "regret": 0.0}])
    assert found == {"best": "a:t or b:t", "chosen": "b:t", "regret": 0.5}


def test_all_results_together_by_hand(capsys):
    one = dict.fromkeys(ladder.COLUMNS, 1.0)
    results = {
        "2000 mlp1": {"summary": {"hyma": one | {"regret": 0.5, "spearman": 0.2}, "grid": one}},
        "6000 mlp1": {"summary": {"hyma": one | {"regret": 2.0}, "grid": one}},
        "19800 mlp1": {"summary": {"hyma": one}},
    }
    for result in results.values():
        result["hyma"] = [one | {"regret": regret} for regret in (0.5, 0.5, 2.0)]
        result["grid"] = [one | {"regret": regret} for regret in (0.1, 0.4, 2.5)]
    ladder.print_together(results)
    _, header, hyma, grid, counts, hyma_runs, grid_runs, interval = capsys.readouterr().out.splitlines()
    assert header.startswith("mean of 2") and hyma.split()[1:] == ["1.000", "1.250", "0.600", "1.000", "1.000"]
    assert set(grid.split()[1:]) == {"1.000"}
    assert counts.endswith("of 2: regret 1, spearman 1, delivered R@10 2, delivered R@1 2")
    assert hyma_runs.endswith("of 6: regret 4, spearman 6, delivered R@10 6, delivered R@1 6")
    assert grid_runs.endswith("of 6: regret 4, spearman 6, delivered R@10 6, delivered R@1 6")
    assert interval.endswith("over rungs: -0.50 to 1.00")


def test_runs_that_are_there_are_measured(runs, graded, tmp_path, monkeypatch, capsys):
    """Nothing is trained, and what is missing is left out: grid search's other rates, UniCon, Mordal's search."""
    work = tmp_path / "work"
    (work / "runs-900").mkdir(parents=True)
    (work / "rung-900").symlink_to(graded)
    names = {"grid": "mlp0-grid-3e-3-s0", "hyma": "mlp0-hyma-s0", "halving": "mlp0-halving-s0", "ridge": "ridge-s0"}
    for name, folder in names.items():
        (work / "runs-900" / folder).symlink_to(runs / name)
    flags = ["--rungs", "900", "--connectors", "mlp0", "--measure", "--work", work, "--json", tmp_path / "x.json"]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *map(str, flags)])
    ladder.main()
    result = json.loads((tmp_path / "x.json").read_text())["900 mlp0"]
    summary = result["summary"]
    assert set(result) >= {"hyma", "halving", "ridge"} and not {"grid", "mordal", "unicon", "equal FLOPs"} & set(result)
    for method in ("hyma", "halving", "ridge"):
        run = result[method][0]
        assert run["flops"] == pytest.approx(
            vlm.read_json(runs / method / "ledger.json")["flops"]
            / vlm.read_json(runs / "grid" / "ledger.json")["flops"]
        )
        best = max(result["true scores"].values(), key=lambda scores: scores[1])
        assert run["chosen"] in result["true scores"] and run["delivered R@10"] > -best[1]
    assert 0 < summary["linear CKA"]["flops"] < 1 and summary["Gromov-Wasserstein"]["regret"] >= 0
    assert "delivered R@1" in summary["hyma"] and "delivered R@1" not in summary["linear CKA"]
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("  ")[0]: line.split() for line in lines}
    assert float(table["hyma"][-1]) == pytest.approx(summary["hyma"]["delivered R@1"], abs=6e-4)
    assert np.isfinite(float(table["calibrated CKA"][-1]))
