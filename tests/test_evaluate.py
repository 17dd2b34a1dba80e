"""evaluate.py's other half: ranking fidelity, selectors, ledger and report, against libraries and cases by hand."""

import csv
import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import ROOT, SAMPLE
from sklearn.linear_model import Ridge
from sklearn.metrics import ndcg_score
from sklearn.neighbors import NearestNeighbors
from test_evaluate_tasks import folder_of
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import vlm
from hyma.costs import PICTURE_GFLOP, TOKEN_GFLOP, embedding_flops, flop_counter, run_costs
from hyma.embeddings import Embeddings
from hyma.files import read_jsonl, sha256_file, write_json
from hyma.metrics import Retrieval, TaskScores, draw_seed_weights, fidelity, resample
from hyma.runs import read_run
from hyma.selectors import (
    Method,
    canonical_correlations,
    debiased_cka,
    linear_cka,
    mutual_neighbours,
    relative_representations,
    ridge_probe,
    selector_rows,
)

QUICK = ("--connector", "mlp0", "--epochs", "3", "--batch-size", "128", "--warmup-steps", "3", "--device", "cpu")
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- ranking fidelity


@pytest.mark.parametrize("count, ties", [(2, False), (4, True), (9, False), (27, True)])
def test_fidelity_against_libraries(count, ties):
    random = np.random.default_rng(count)
    truth, order = random.random((20, count)), random.random(count)
    if ties:
        truth, order = truth.round(1), np.array([0.0, 0.5, 1.0, 2.0])[random.integers(4, size=count)]
        order[0] = 3
    found = fidelity(truth, order)
    for k, row in enumerate(truth):
        gain = (row - row.min())[None]
        for name, top in (("ndcg3", 3), ("ndcg5", 5), ("ndcg", None), ("ndcg1", 1)):
            assert found[name][k] == pytest.approx(ndcg_score(gain, order[None], k=top)), name
        assert found["spearman"][k] == pytest.approx(scipy.stats.spearmanr(row, order).statistic)
        assert found["tau"][k] == pytest.approx(scipy.stats.kendalltau(row, order, variant="b").statistic)
        assert found["regret"][k] == pytest.approx(100 * (row.max() - row[order.argmax()])) or ties


def test_fidelity_by_hand():
    truth = np.array([[0.5, 0.4, 0.3, 0.1]])
    found = fidelity(truth, np.array([2.0, 3.0, 1.0, 0.0]))  # the second first, the best second
    assert found["regret"][0] == pytest.approx(10) and found["top1"][0] == 0 and found["recall3"][0] == 1
    assert found["ndcg1"][0] == pytest.approx(0.3 / 0.4) and found["tau"][0] == pytest.approx(4 / 6)
    assert found["ndcg3"][0] == pytest.approx((0.3 + 0.4 / np.log2(3) + 0.1) / (0.4 + 0.3 / np.log2(3) + 0.1))
    tied = fidelity(truth, np.array([1.0, 1.0, 0.0, 0.0]))  # either of two first, either of two last
    assert tied["regret"][0] == pytest.approx(5) and tied["top1"][0] == 0.5
    assert tied["recall3"][0] == pytest.approx((1 + 1 + 0.5) / 3)
    both = fidelity(np.array([[0.5, 0.5, 0.1, 0.0]]), np.array([0.0, 1.0, 0.0, 0.0]))
    assert both["regret"][0] == 0 and both["top1"][0] == 1  # two are truly best, and one of them was chosen
    flat = fidelity(np.full((1, 4), 0.2), np.arange(4.0))
    assert (flat["regret"][0], flat["top1"][0], flat["ndcg"][0], flat["spearman"][0]) == (0, 1, 1, 0)


def test_a_tie_is_the_mean_of_its_orders():
    """A constant order is the expectation over all 120 permutations; a partial tie that over its own."""
    truth = np.array([[0.51, 0.33, 0.33, 0.2, 0.05]])
    orders = [np.array(order, dtype=float) for order in itertools.permutations(range(5))]
    for tied in (np.zeros(5), np.array([1.0, 0, 2, 1, 1])):
        ways = [o for o in orders if all(o[i] < o[j] for i in range(5) for j in range(5) if tied[i] < tied[j])]
        assert len(ways) == (120 if not tied.any() else 6)
        found = fidelity(truth, tied)
        for name in ("regret", "top1", "recall3", "ndcg1", "ndcg3", "ndcg5", "ndcg"):
            assert found[name][0] == pytest.approx(np.mean([fidelity(truth, way)[name][0] for way in ways]))
    random = fidelity(truth, np.zeros(5))
    assert random["top1"][0] == pytest.approx(1 / 5) and random["recall3"][0] == pytest.approx(3 / 5)
    assert random["regret"][0] == pytest.approx(100 * (0.51 - truth.mean())) and random["tau"][0] == 0


def test_bootstrap_draws_rows_alike_for_all_pairs():
    random = np.random.default_rng(0)
    units = (random.random((1, 1, 400)) < 0.3).astype(float)
    both = np.concatenate([units, units, 1 - units], axis=1)  # [1, 3, 400]
    drawn = resample({"a": both, "b": units}, 2000, "folder")
    assert drawn["a"].shape == (1, 2000, 3)
    assert (drawn["a"][0, :, 0] == drawn["a"][0, :, 1]).all() and (drawn["a"][0, :, :1] == drawn["b"][0]).all()
    assert drawn["a"][0, :, 0] + drawn["a"][0, :, 2] == pytest.approx(1)
    p = units.mean()
    assert drawn["b"].mean() == pytest.approx(p, abs=0.003)
    assert drawn["b"].std() == pytest.approx((p * (1 - p) / 400) ** 0.5, rel=0.05)
    other = resample({"b": units}, 2000, "elsewhere")
    assert abs(np.corrcoef(other["b"].ravel(), drawn["b"].ravel())[0, 1]) < 0.1


def test_intervals_are_over_seeds_too():
    """Two seeds whose truths disagree, without any noise of rows: every mixture of them is within the interval."""
    values = np.array([[[1.0] * 50, [0.0] * 50], [[0.0] * 50, [0.5] * 50]])  # [2 seeds, 2 pairs, 50 rows]
    orders = np.array([[1.0, 0.0], [0.0, 1.0]])
    oracle = Method("oracle", orders, [None, None], {})
    judged = TaskScores("t", "", "", "", 0.0, {"oracle": values.mean(-1)}, resample({"oracle": values}, 400, ""))
    second = Method("second", orders[1:], [], {})
    row, other = evaluate.judge(judged, [oracle, second], oracle, draw_seed_weights([oracle, second], 400))
    assert row["regret"] == pytest.approx(12.5)  # truth 0.5 and 0.25; one seed chooses each
    # A seed drawn twice chooses rightly by its own truth, but not one who always takes the second pair.
    assert (row["regret_low"], row["regret_high"]) == (0, 12.5) and row["regret_random"] == pytest.approx(12.5)
    assert (other["regret"], other["regret_low"], other["regret_high"]) == (25, 0, 100)
    assert row["own_score"] == pytest.approx(75) and row["gap_all"] == 0


# ------------------------------------------------------------------------------------------------------- selectors


def features(rows=300, seed=0, noise=(0.3, 3.0), dims=(48, 40), text_dim=24):
    """Two image sides and a text side that share a latent vector, the second noisier; centred."""
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, 12, generator=random)
    sides = {
        "t": latent @ torch.randn(12, text_dim, generator=random) + 0.3 * torch.randn(rows, text_dim, generator=random)
    }
    for name, level, dim in zip(("clear", "noisy"), noise, dims):
        sides[name] = latent @ torch.randn(12, dim, generator=random) + level * torch.randn(rows, dim, generator=random)
    return {name: x - x.mean(0) for name, x in sides.items()}


PAIRS = [("clear", "t"), ("noisy", "t")]


def held_out(planted, rows):
    return Retrieval(Embeddings(planted), torch.arange(rows), CPU)


def test_cka_by_its_definition():
    """From [n, n] kernels, centred, and by the unbiased estimate with its sums written out."""
    sides = features(120)
    linear, debiased = linear_cka(sides, PAIRS), debiased_cka(sides, PAIRS)
    n, kernels = 120, {name: (x @ x.T).double() for name, x in sides.items()}
    centring = torch.eye(n).double() - 1 / n

    def hsic(k, q):
        return (k @ centring @ q @ centring).trace()

    def unbiased(k, q):
        k, q = k - k.diag().diag(), q - q.diag().diag()
        cross = k.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (k @ q).sum() / (n - 2)
        return ((k @ q).trace() + cross) / (n * (n - 3))

    for image, text in PAIRS:
        k, q = kernels[image], kernels[text]
        for found, of in ((linear, hsic), (debiased, unbiased)):
            assert found[image, text] == pytest.approx((of(k, q) / (of(k, k) * of(q, q)).sqrt()).item(), rel=1e-4)


def test_debiased_cka_does_not_grow_with_the_width():
    x, y = (torch.randn(200, 900, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    sides = {"a": x - x.mean(0), "t": y - y.mean(0)}
    assert linear_cka(sides, [("a", "t")])["a", "t"] > 0.7
    assert abs(debiased_cka(sides, [("a", "t")])["a", "t"]) < 0.03


def test_neighbours_against_sklearn():
    sides = features(150)
    found = mutual_neighbours(sides, PAIRS)
    search = NearestNeighbors(n_neighbors=11, metric="cosine")
    nearest = {name: search.fit(x).kneighbors(x, return_distance=False)[:, 1:] for name, x in sides.items()}
    for image, text in PAIRS:
        shared = [len(set(a) & set(b)) / 10 for a, b in zip(nearest[image].tolist(), nearest[text].tolist())]
        assert found[image, text] == pytest.approx(np.mean(shared), abs=1e-3)


def test_canonical_correlations_against_scipy():
    """They are the cosines of the angles between the two sides' leading principal subspaces."""
    sides, spectra = features(200), {}
    found = canonical_correlations(sides, PAIRS, spectra)
    axes = {name: torch.linalg.svd(x, full_matrices=False).U[:, :24].numpy() for name, x in sides.items()}
    for image, text in PAIRS:
        cosines = np.cos(scipy.linalg.subspace_angles(axes[image], axes[text]))
        assert spectra[image, text] == pytest.approx(sorted(cosines, reverse=True), abs=1e-3)
        assert found[image, text] == pytest.approx((cosines**2).mean(), abs=1e-3)


def test_ridge_probe_against_sklearn(planted):
    sides, probed = features(300, noise=(0.3, 30)), held_out(planted, 60)
    found = ridge_probe(sides, PAIRS, probed)
    for image, text in PAIRS:
        x, y = sides[text], sides[image]
        strength = 0.1 * (x[:240].T @ x[:240]).trace().item() / x.shape[1]
        model = Ridge(alpha=strength, fit_intercept=False, solver="cholesky").fit(x[:240], y[:240])
        scores = F.normalize(torch.tensor(model.predict(x[240:])).float(), dim=1) @ F.normalize(y[240:], dim=1).T
        own = scores.diag()
        recalls = [((scores >= own[:, None]).sum(1) <= 10), ((scores >= own[None]).sum(0) <= 10)]
        assert found[image, text] == pytest.approx(torch.stack(recalls).double().mean().item())
    assert found["clear", "t"] > 0.95 and found["noisy", "t"] < 0.8


def test_relative_representations_need_no_shared_space(planted):
    """Sides turned and scaled by themselves are described alike, and only their own anchors tell them apart."""
    sides, probed = features(300), held_out(planted, 60)
    turned = {name: 3 * x @ torch.linalg.qr(torch.randn(x.shape[1], x.shape[1])).Q for name, x in sides.items()}
    before, after = (relative_representations(each, PAIRS, probed) for each in (sides, turned))
    assert before["clear", "t"] > 0.9 > before["noisy", "t"] > 0.2
    assert after == pytest.approx(before, abs=0.02)


def selectors(probed):
    return {
        "linear": linear_cka,
        "debiased": debiased_cka,
        "neighbours": mutual_neighbours,
        "canonical": canonical_correlations,
        "ridge": lambda sides, pairs: ridge_probe(sides, pairs, probed),
        "relative": lambda sides, pairs: relative_representations(sides, pairs, probed),
    }


GRAMS = 2 * 300 * (48**2 + 40**2 + 24**2 + 48 * 24 + 40 * 24)  # 300 rows; 48, 40 and 24 dimensions
PROBED = 2 * 2 * 60**2 + 2 * 60  # of a dimension: 60 captions against 60 pictures and back, and each with its own
FLOPS = {
    "linear": GRAMS,
    "debiased": GRAMS,
    "neighbours": 2 * 300**2 * (48 + 40 + 24),
    "canonical": 2 * 300 * (48**2 + 40**2 + 24**2) + 9 * (48**3 + 40**3 + 24**3)
    + 2 * 300 * 24 * (48 + 40 + 24) + 2 * (2 * 300 * 24**2 + 22 * 24**3),
    "ridge": 2 * 240 * 24**2 + 24**3 // 3 + (2 * 240 * 24 + 2 * 24**2 + 2 * 60 * 24 + PROBED) * (48 + 40),
    "relative": 2 * 60 * 240 * (48 + 40 + 24) + 2 * PROBED * 240,
}  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "debiased", "neighbours", "canonical", "ridge", "relative"])
def test_flops_of_selectors_by_hand(name, planted):
    sides, selector = features(300), selectors(held_out(planted, 60))[name]
    with flop_counter() as counter:
        selector(sides, PAIRS)
    assert counter.get_total_flops() == FLOPS[name]


@pytest.mark.parametrize("name", ["debiased", "neighbours", "canonical", "ridge", "relative"])
def test_shuffled_captions_leave_selectors_at_chance(name, planted):
    sides, selector = features(500, noise=(0.3, 0.6)), selectors(held_out(planted, 100))[name]
    together = selector(sides, PAIRS)
    sides["t"] = sides["t"][torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    found = selector(sides, PAIRS)
    chance = {"debiased": 0.0, "neighbours": 10 / 499, "canonical": 24 / 500, "ridge": 0.1, "relative": 0.1}[name]
    for pair in PAIRS:
        assert abs(found[pair] - chance) < 0.06 and together[pair] > chance + 0.2, (pair, found, together)


def test_selector_rows_have_each_picture_once(tmp_path):
    rows = [{"image": f"{k // 3}.png"} for k in range(300)]
    data = Embeddings(folder_of(tmp_path / "e", rows))
    drawn = selector_rows(data, torch.arange(30, 300), 60)
    assert len(drawn) == 60 == len({i // 3 for i in drawn.tolist()}) and drawn.min() >= 30
    with pytest.raises(vlm.BadInput, match="50 training pictures; it has 20"):
        selector_rows(data, torch.arange(60), 60)


# ---------------------------------------------------------------------------------------------------------- ledger


@pytest.mark.parametrize("kind", ["grid", "factored", "mlp"])
def test_flops_at_another_batch_size_are_those_of_a_run_there(run, planted, tmp_path, kind):
    script = "train_grid.py" if kind == "grid" else "train_hyma.py"
    extra = () if kind == "grid" else ("--generator", kind, "--pairs-per-step", "6")
    extra += ("--width", "8") if kind == "mlp" else ()
    runs, data = {}, Embeddings(planted)
    for batch in (128, 64):
        flags = (*QUICK, "--epochs", "1", "--batch-size", str(batch), "--out", f"b{batch}", *extra)
        assert run(script, "--data", planted, *flags).code == 0
        runs[batch] = read_run(tmp_path / f"b{batch}")
    assert runs[128].ledger["pair_samples"] == runs[64].ledger["pair_samples"]
    costs = run_costs(runs[128], data, runs[64].ledger)
    assert costs["flops_equal_batch"] == pytest.approx(runs[64].ledger["flops"], rel=1e-9)
    assert costs["flops"] > 1.05 * costs["flops_equal_batch"] or kind != "grid"
    half = runs[64].ledger | {"pair_samples": runs[64].ledger["pair_samples"] / 2}
    assert run_costs(runs[128], data, half)["flops_equal_updates"] == costs["flops_equal_batch"] / 2


def test_the_cost_of_embedding(tmp_path):
    import timm

    for name in ("vit_s16", "deit3-ft_l16", "efflite0", "control"):
        with torch.device("meta"):
            model = timm.create_model(vlm.ENCODERS[name].spec.rpartition(":")[2], num_classes=0).eval()
            pixels = torch.empty(1, *timm.data.resolve_model_data_config(model)["input_size"])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixels)
        assert PICTURE_GFLOP[name] * 1e9 == pytest.approx(counter.get_total_flops(), rel=1e-3), name
    for name, (layers, width) in {"minilm": (12, 384), "mpnet": (12, 768), "roberta": (24, 1024)}.items():
        assert TOKEN_GFLOP[name] * 1e9 == pytest.approx(2 * layers * 12 * width**2, rel=2e-3)
    sides = {"efflite0": torch.eye(1280)[:4], "minilm_l6": torch.eye(384)[:4], "mpnet": torch.eye(768)[:4]}
    data = Embeddings(folder_of(tmp_path / "e", [{"caption": "one two three four five"}] * 4, **sides))
    one_row = 1e9 * (0.768 + (2 + 1.4 * 5) * 0.0212)
    assert embedding_flops(data, ["efflite0", "minilm_l6"], 10) == pytest.approx(10 * one_row)
    data.encoders["mpnet"] = data.encoders["mpnet"]._replace(spec="another")
    assert embedding_flops(data, ["efflite0", "mpnet"], 10) is None


# ------------------------------------------------------------------------------------------------------ whole report


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A sealed folder whose rows share a latent vector: efflite1 best by construction, efflite0 noisier, control noise."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(1300, 24, generator=random)
    splits = ["test"] * 400 + ["val"] * 100 + ["train"] * 800
    levels = {
        "efflite1": (1280, 4),
        "efflite0": (1280, 10),
        "control": (512, 50),
        "minilm_l6": (384, 1),
        "mpnet": (768, 1),
    }
    sides = {
        name: latent @ torch.randn(24, dim, generator=random) / 5 + noise * torch.randn(1300, dim, generator=random)
        for name, (dim, noise) in levels.items()
    }
    return folder_of(tmp_path_factory.mktemp("graded") / "e", [{"split": split} for split in splits], **sides)


@pytest.fixture(scope="module")
def runs(graded, tmp_path_factory):
    """Runs on the graded embeddings: grid, halving, ridge and hyma."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {"grid": ["train_grid.py"], "halving": ["train_grid.py", "--halving"], "hyma": ["train_hyma.py"]}
    commands["ridge"] = ["train_grid.py", "--closed-form", "ridge"]
    code = "import runpy, sys\nfor line in {!r}:\n    sys.argv = line\n    runpy.run_path(line[0], run_name='__main__')"
    lines = [
        [str(ROOT / script), *more, "--data", str(graded), *QUICK, "--out", str(folder / name)]
        for name, (script, *more) in commands.items()
    ]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code.format(lines)  # one process: torch is loaded once
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_planted_best_pair_is_found(run, runs, tmp_path):
    names = [runs / name for name in ("hyma", "halving", "ridge", "grid")]
    result = run("evaluate.py", *names, "--bootstrap", "200", "--out", "report")
    assert result.code == 0, result.err
    out = tmp_path / "report"
    assert re.search(r"\nStitch efflite1 with \w+ \(mlp0\), the choice of hyma", result.out)
    assert "warning" not in result.out and "400 pictures" in result.out
    found = vlm.read_json(out / "results.json")
    assert found["answer"] in result.out and found["oracle"] == "grid mlp0" and len(found["results"]) == 4 * 6
    first = found["results"][0]
    assert list(first)[:5] == ["dataset", "model", "pretrained", "task", "metrics"]
    assert first["task"] == "zeroshot_retrieval" and "image_retrieval_recall@5" in first["metrics"]

    rows = {row["method"]: row for row in read_csv(out / "selectors.csv")}
    assert list(rows) == [row["method"] for row in found["methods"]] and len(rows) == 4 + 7 + 1
    for name, row in rows.items():
        assert float(row["regret_low"]) <= float(row["regret"]) + 1e-9 and float(row["regret_random"]) > 30
        if "largest" not in name and name != "random order":
            assert "efflite1" in row["chosen"] and "control" not in row["chosen"], name
            # Only the picture's encoder is planted: of the two texts, either may be first.
            assert float(row["regret"]) < float(row["regret_random"]) / 4 and float(row["spearman"]) > 0.5, name
    assert rows["random order"]["regret"] == rows["random order"]["regret_random"]
    assert float(rows["largest (sum of widths)"]["regret"]) > 20  # efflite0 is as wide
    assert float(rows["grid mlp0"]["gap_all"]) == 0 and rows["linear CKA"]["own_score"] == ""
    assert float(rows["linear CKA"]["flops"]) < float(rows["halving mlp0"]["flops"]) < float(rows["grid mlp0"]["flops"])

    table = read_csv(out / "ranking.csv")
    assert [row["image"] for row in table] == ["efflite1"] * 2 + ["efflite0"] * 2 + ["control"] * 2
    ours = next(
        r
        for r in found["results"]
        if r["method"] == "grid mlp0" and r["model"] == f"{table[0]['image']}_mlp0_{table[0]['text']}"
    )
    mean = sum(ours["metrics"][f"{way}_retrieval_recall@10"] for way in ("image", "text")) / 2
    assert float(table[0]["true_score"]) == pytest.approx(100 * mean, abs=1e-3)

    page = (out / "report.html").read_text()
    assert not re.search(r"<script|<link|src=\"(?!data:)|url\(|https?://", page)  # all of it is inside
    for name in re.findall(r'href="([^"]+)"', page):
        assert (out / name).stat().st_size > 50, name
    names = {path.name for path in out.iterdir()}
    assert names == set(found["files"]) and len([name for name in names if name.endswith(".png")]) >= 7
    assert {name[:-4] for name in names if name.endswith(".png")} <= {
        name[:-4] for name in names if name.endswith(".csv")
    }
    (out / "mine.csv").write_text("a user's own")

    again = run("evaluate.py", runs / "hyma", "--oracle", runs / "grid", "--selector-rows", "0", "--out", "report")
    assert again.code == 0 and "hyma factored mlp0" in again.out and "CKA" not in again.out
    left = {path.name for path in out.iterdir()}
    assert (
        left == {*vlm.read_json(out / "results.json")["files"], "mine.csv"} and "canonical-correlations.png" not in left
    )


def test_the_newest_run_alone(run, runs, planted, tmp_path):
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


def test_seeds_are_one_method_and_labels_differ(runs, planted):
    hyma, grid = read_run(runs / "hyma"), read_run(runs / "grid")
    pairs = list(grid.ranks)

    def like(run, folder, seed, **flags):
        config = run.config | {"flags": run.flags | flags}
        return run._replace(folder=run.folder.with_name(folder), seed=seed, config=config)

    several = [hyma, like(hyma, "h1", 1), grid, like(grid, "g1", 1), like(grid, "g2", 1, lr=0.5), like(grid, "g3", 0)]
    several += [like(grid, "b", 0, budget_of="runs/hyma"), like(grid, "b1", 1, budget_of="runs/hyma-1")]
    methods = evaluate.group_runs(several, pairs)
    assert [len(method.runs) for method in methods] == [2, 2, 1, 1, 2]
    names = [method.name for method in methods]
    assert len(set(names)) == 5 and names[0] == "hyma factored mlp0" and names[4] == "grid mlp0, FLOPs of hyma"
    assert names[1:4] == [f"grid mlp0 ({runs / name})" for name in ("grid", "g2", "g3")]
    assert methods[0].orders.shape == (2, 6) and methods[0].orders.max() == -1


def test_shuffled_captions_are_at_chance(run, graded, tmp_path):
    order = torch.randperm(1300, generator=torch.Generator().manual_seed(5))
    sides = {path.stem: torch.load(path, weights_only=True) for path in graded.glob("*.pt")}
    sides |= {name: sides[name][order] for name in ("minilm_l6", "mpnet")}
    folder = folder_of(tmp_path / "shuffled", read_jsonl(graded / "rows.jsonl"), **sides)
    assert run("train_grid.py", "--data", folder, "--closed-form", "ridge", "--out", "x", "--device", "cpu").code == 0
    result = run("evaluate.py", "x")
    assert result.code == 0 and "do captions and pictures belong together?" in result.out, result.err
    for row in read_csv(tmp_path / "report" / "ranking.csv"):
        assert abs(float(row["true_score"]) - 100 * 10 / 400) < 2.5


@pytest.mark.parametrize("how", ["file", "rotation"])
def test_duplicate_encoders_are_noticed(run, planted, tmp_path, how):
    folder = tmp_path / "twice"
    shutil.copytree(planted, folder)
    x = torch.load(folder / "efflite1.pt", weights_only=True)
    if how == "rotation":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x = (x.float() @ torch.linalg.qr(torch.randn(1280, 1280)).Q).half()
        torch.save(x, folder / "efflite0.pt")
    else:
        shutil.copy(folder / "efflite1.pt", folder / "efflite0.pt")
    assert run("train_grid.py", "--data", folder, "--closed-form", "ridge", "--out", "x", "--device", "cpu").code == 0
    result = run("evaluate.py", "x", "--bootstrap", "10")
    lines = [line for line in result.out.splitlines() if "duplicates" in line]
    assert len(lines) == 1 and "efflite1" in lines[0] and "efflite0" in lines[0] and "control" not in lines[0]
    assert ("the same file" if how == "file" else "up to a rotation") in lines[0]
    assert "duplicates" in (tmp_path / "report" / "report.html").read_text()


def test_gallery_and_hostile_captions(run, tmp_path):
    """Pictures that are there are shown; those that are not are named; a caption is never markup."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 24, generator=random)
    sides = {
        name: latent @ torch.randn(24, dim, generator=random) for name, dim in (("efflite0", 1280), ("minilm_l6", 384))
    }
    splits = ["test" if k % 3 == 0 else "val" if k % 3 == 1 else "train" for k in range(300)]
    rows = [{"caption": f"<script>alert({k})</script> & co", "split": split} for k, split in enumerate(splits)]
    folder = folder_of(tmp_path / "e", rows, **sides)
    write_json(folder / "manifest.json", vlm.read_json(folder / "manifest.json") | {"root": "."})
    picture = sorted((SAMPLE / "images").rglob("*.webp"))[0]
    flags = ("--data", folder, "--closed-form", "ridge", "--batch-size", "64", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    assert run("evaluate.py", "x").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(" in page and "pictures are not to be had" in page
    assert "data:image/jpeg" not in page
    for k in range(0, 300, 3):
        shutil.copy(picture, folder / f"{k}.png")  # told by its bytes, not its name
    assert run("evaluate.py", "x").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 6 * 5 and "not to be had" not in page
    found = read_csv(tmp_path / "report" / "gallery.csv")
    assert len(found) == 30 and sum(row["right"] == "True" for row in found) >= 5  # a linear map finds its own


def test_the_demo_reuses_finished_runs(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "DEMO", {"demo-ridge": ["train_grid.py", "--closed-form", "ridge"]})
    assert [str(path) for path in evaluate.run_demo(CPU)] == ["runs/demo-ridge"]
    assert read_run("runs/demo-ridge").flags["closed_form"] == "ridge"
    capfd.readouterr()
    evaluate.run_demo(CPU)
    assert not capfd.readouterr().out
    monkeypatch.setattr(evaluate, "DEMO", {"demo-x": ["train_grid.py", "--epochs", "-1"]})
    with pytest.raises(vlm.BadInput, match="train_grid.py ended with status 1"):
        evaluate.run_demo(CPU)


# ------------------------------------------------------------------------------------------------ runs of every kind


def test_a_run_on_some_rows_is_no_oracle_and_embeds_less(run, graded, runs, tmp_path):
    """--rows and --from: neither run is taken for the full grid, and what each leaves out of its cost is said."""
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
    pairs += ("--pairs-per-step", "3")  # a text encoder a step, of two
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


def test_retrieval_leads_and_the_others_stand_beside_it():
    """Labels make two tasks; neither weighs in the headline, and the sentence is about retrieval."""
    judged = [
        TaskScores(f"{name} {kind}", kind, "", "9 pictures", 0.1, {"m": np.full((1, 2), value)}, {"m": np.ones((1, 3, 2))})
        for name, kind, value in (
            ("a", "zeroshot", 0.1),
            ("a", "retrieval", 0.2),
            ("b", "vqa", 0.3),
            ("b", "retrieval", 0.4),
        )
    ]
    found = evaluate.headline_first(judged)
    assert [each.name for each in found] == [
        "the mean of a retrieval and b retrieval", "a retrieval", "b retrieval", "a zeroshot", "b vqa"
    ]  # fmt: skip
    assert found[0].scores["m"].tolist() == [[0.3, 0.3]] and found[0].kind == "retrieval"
    assert [each.name for each in evaluate.headline_first(judged[:2])] == ["a retrieval", "a zeroshot"]
    assert evaluate.headline_first(judged[:1]) == judged[:1]


def test_connectors_alone(run, refused, runs, graded, tmp_path):
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
    refused("evaluate.py", bare, "--task", f"own={graded}", says="connectors of [0, 1] hidden layers; keep one kind")
    (tmp_path / "empty").mkdir()
    refused("evaluate.py", "empty", says="empty: holds no run")


def test_training_rows_never_judge(run, planted, tmp_path):
    """The runs' own folder named as a task, without a test split: its validation rows, as without --task."""
    assert run("train_grid.py", "--data", planted, "--closed-form", "ridge", "--out", "x", "--device", "cpu").code == 0
    result = run("evaluate.py", "x", "--task", f"own={planted}", "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0 and "has no test split" in result.out and "90 pictures" in result.out, result.err


def test_a_connector_that_is_not_finite_is_named(run, refused, runs, tmp_path):
    broken = changed(runs, tmp_path / "broken", "hyma")
    path = broken / "connectors" / "efflite1_mlp0_mpnet.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"bias": state["bias"] * torch.nan}, path)
    refused("evaluate.py", broken, says=["efflite1_mlp0_mpnet.pt", "not finite"])


# ------------------------------------------------------------------------------------------------------- bad input


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


def test_runs_that_cannot_be_judged(refused, runs, planted, tmp_path):
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


def test_embeddings_that_changed(refused, runs, graded, tmp_path):
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


def test_oracles_that_cannot_judge(run, refused, runs, graded, tmp_path):
    few = ("--data", graded, *QUICK, "--epochs", "1", "--pairs", "efflite1:*", "--out", "few")
    assert run("train_grid.py", *few).code == 0
    refused("evaluate.py", runs / "hyma", "--oracle", "few", says=["few: has no ", "4 pairs missing of 6"])
    refused("evaluate.py", runs / "hyma", "few", says=["few: has no "])
    refused(
        "evaluate.py", runs / "hyma", "--oracle", runs / "grid", runs / "halving", says="must be seeds of one method"
    )
    assert run("evaluate.py", "few", "--oracle", runs / "grid", "--bootstrap", "10").code == 0  # more pairs do no harm


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
    together = run("evaluate.py", other, runs / "grid", *flags)  # not told apart, they are two seeds of one oracle
    assert "truth: grid mlp0, seeds: 2" in together.out


def test_without_a_test_split(run, refused, planted, tmp_path):
    """The rows that chose also judge, which is said; of two seeds, neither's rows are left to judge both."""
    flags = ("--data", planted, "--closed-form", "ridge", "--device", "cpu", "--seeds", "0", "1", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    result = run("evaluate.py", "x-s1", "--bootstrap", "10", "--selector-rows", "0")
    assert result.code == 0 and "has no test split" in result.out and "90 pictures" in result.out, result.err
    recalls = [float(row["true_score"]) for row in read_csv(tmp_path / "report" / "ranking.csv")]
    chosen_by = [100 * float(row["val_recall10"]) for row in read_csv(tmp_path / "x-s1" / "ranking.csv")]
    assert recalls == pytest.approx(chosen_by, abs=1e-3)  # seed 1's own validation rows
    refused("evaluate.py", "x-s0", "x-s1", says=["no split column", "seeds 0 and 1", "--task"])


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
def test_bad_flags(refused, flags, says):
    refused("evaluate.py", "run", *flags, says=says)
