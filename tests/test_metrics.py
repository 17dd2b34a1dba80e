"""hyma/metrics.py: retrieval, ranking fidelity, bootstrap and shrinkage, against libraries and cases by hand."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import CPU, Rows
from sklearn.metrics import ndcg_score

from hyma.embeddings import Embeddings
from hyma.metrics import Retrieval, fidelity, resample
from hyma.ranking import expected_recall, rank_pairs

# ------------------------------------------------------------------------------------------------------------ retrieval


@pytest.mark.parametrize("one_matrix", [True, False])
def test_recalls_against_brute_force(one_matrix):
    """By one matrix of similarities for both directions, or by one for each."""
    random = torch.Generator().manual_seed(0)
    rows = [{"image": str(k // 2), "caption": "the same" if k in (3, 8) else str(k)} for k in range(40)]
    data = Rows(rows)
    retrieval = Retrieval(data, torch.arange(40), CPU)
    retrieval.one_matrix = one_matrix
    image = F.normalize(torch.randn(20, 8, generator=random), dim=1).repeat_interleave(2, 0)
    text = image + 0.7 * torch.randn(40, 8, generator=random)
    text[8] = text[3]
    scores = F.normalize(text, dim=1).double() @ image.double().T
    expected = []
    for by_text in (True, False):
        query, target = ("caption", "image") if by_text else ("image", "caption")
        hits = {}
        for r, row in enumerate(rows):
            best = {}  # the score of every different candidate
            for c, candidate in enumerate(rows):
                best[candidate[target]] = (scores[r, c] if by_text else scores[c, r]).item()
            right = {candidate[target] for candidate in rows if candidate[query] == row[query]}
            order = sorted(best, key=best.get, reverse=True)
            hits[row[query]] = min(order.index(name) for name in right)
        expected += [sum(rank < k for rank in hits.values()) / len(hits) for k in (1, 5, 10)]
    assert retrieval.recalls(text, image) == pytest.approx(expected)


@pytest.mark.parametrize("block", [1, 2**23])
def test_one_matrix_ranks_as_two_do_with_distractors(block, monkeypatch):
    """Fewer queries than candidates, several captions a picture, captions of several pictures, a vector that is not finite."""
    monkeypatch.setattr("hyma.metrics.SCORES_BYTES", block)
    random = torch.Generator().manual_seed(0)
    rows = [{"image": str(k // 3), "caption": str(k % 85)} for k in range(90)]
    retrieval = Retrieval(Rows(rows), torch.arange(60), CPU, torch.arange(60, 90))
    image = F.normalize(torch.randn(30, 8, generator=random), dim=1).repeat_interleave(3, 0)
    text = (image + torch.randn(90, 8, generator=random))[torch.arange(90) % 85]
    text[7] = torch.nan
    assert retrieval.one_matrix
    by_one = retrieval.ranks(text, image)
    retrieval.one_matrix = False
    by_two = retrieval.ranks(text, image)
    assert [len(ranks) for ranks in by_one] == [60, 20]
    assert all(map(torch.equal, by_one, by_two))


@pytest.mark.parametrize("one_matrix", [True, False])
def test_captions_of_a_picture_that_have_one_vector_are_both_right(one_matrix):
    """As "Dog 0" and "dog 0" have by an encoder without capitals. Ties with captions of other pictures count against it still."""
    rows = [{"image": f"{k}", "caption": f"{dog} {k}"} for k in range(4) for dog in ("Dog", "dog", "dog")]  # one row twice
    retrieval = Retrieval(Rows(rows), torch.arange(12), CPU)
    retrieval.one_matrix = one_matrix
    image = torch.eye(4).repeat_interleave(3, 0)
    assert retrieval.right_candidates("image").tolist() == [2] * 4 and retrieval.right_candidates("caption").tolist() == [1] * 8
    assert retrieval.recalls(image, image) == [1.0] * 6
    alike = image.clone()
    alike[3:6] = image[:3]  # the captions of picture 1 are as those of picture 0
    assert [ranks.tolist() for ranks in retrieval.ranks(alike, image)] == [[0, 0, 3, 3, 0, 0, 0, 0], [2, 6, 0, 0]]


def test_a_collapsed_connector_scores_nothing():
    data = Rows([{"image": str(k), "caption": str(k)} for k in range(30)])
    retrieval = Retrieval(data, torch.arange(30), CPU)
    assert retrieval.recalls(torch.ones(30, 4), F.normalize(torch.randn(30, 4), dim=1))[3:] == [0, 0, 0]
    assert retrieval.chance == pytest.approx([1 / 30, 5 / 30, 10 / 30])
    text = F.normalize(torch.randn(30, 4), dim=1)
    assert retrieval.recalls(text, text) == [1.0] * 6


def test_ranking_shows_ties():
    recalls = {"a:t": [0.1, 0.2, 0.3] * 2, "b:t": [0.2, 0.3, 0.5] * 2, "c:t": [0.1, 0.2, 0.3] * 2, "d:t": [0.0] * 6}
    ranked = rank_pairs(recalls)
    assert [(row["image"], row["rank"]) for row in ranked] == [("b", 1), ("a", 2), ("c", 2), ("d", 4)]


def test_what_ranks_follows_validation_as_far_as_it_is_not_noise():
    def recalls(scores):
        return {f"a{k}:t": [0, score, 2 * score] * 2 for k, score in enumerate(scores)}

    scores, folds = [0.5, 0.41, 0.3, 0.22, 0.1], [0.4, 0.5, 0.3, 0.2, 0.1]
    exact = {f"a{k}:t": [score] * 3 for k, score in enumerate(folds)}  # folds that agree: no noise, validation alone
    found = expected_recall(recalls(scores), exact, 1.0)
    assert list(found.values()) == pytest.approx(scores)
    random = torch.Generator().manual_seed(0)
    noisy = {
        k: [score + e for e in (0.3 * torch.randn(3, generator=random)).tolist()] for k, score in zip(exact, folds)
    }
    mean = torch.tensor([sum(v) / 3 for v in noisy.values()], dtype=torch.float64)
    design = torch.stack([torch.ones(5, dtype=torch.float64), mean], dim=1)
    direct = torch.tensor(scores, dtype=torch.float64)
    line = design @ torch.linalg.lstsq(design, direct[:, None]).solution[:, 0]
    found = expected_recall(recalls(scores), noisy, 2.0)  # noise above the residuals: one part in 1 + 2 * 3 is kept
    assert list(found.values()) == pytest.approx((line + (direct - line) / 7).tolist(), abs=1e-6)
    tied = expected_recall(recalls([0.5] * 5), noisy, 2.0)  # of ten rows: a tie, to the digit
    assert set(tied.values()) == {0.5}
    assert expected_recall(recalls(scores[:3]), exact, 1.0) == {}  # too few to regress
    assert expected_recall(recalls(scores), {}, 1.0) == {}


# ----------------------------------------------------------------------------------------------------- ranking fidelity


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


# ------------------------------------------------------------------------------------------------------------ bootstrap


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


def test_a_connector_that_gives_nan_ranks_last(planted):
    """A NaN loses every comparison: counted as a score that is no lower, it would be the best of all."""
    data = Embeddings(planted)
    retrieval = Retrieval(data, torch.arange(50), CPU)
    images = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert retrieval.recalls(images, images) == [1.0] * 6
    assert retrieval.recalls(torch.full((50, 8), torch.nan), images) == [0.0] * 6
    broken = images.clone()
    broken[7] = torch.nan
    found = retrieval.recalls(broken, images)  # one broken text is found by nobody, and is in everybody's way
    assert found[0] == 49 / 50 and found[3] == 0.0 and found[4] == 49 / 50
