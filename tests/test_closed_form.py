"""hyma/closed_form.py and unicon.py: maps and cross-validation against formulas in float64 and against libraries."""

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, recall10
from torch.utils.flop_counter import FlopCounterMode

from hyma import unicon
from hyma.closed_form import (
    IMAGE_NOISE_ROWS,
    MOST_COSINES,
    TEXT_NOISE_ROWS,
    CentredRows,
    fold_rows,
    gram_matrix,
    image_map,
    leading_coordinates,
    whitened_map,
)
from hyma.costs import flop_counter
from hyma.embeddings import Embeddings
from hyma.fitted_connectors import RIDGE_CHOICES, procrustes_map, ridge_factors, ridge_maps, whitened_maps
from hyma.metrics import Retrieval
from hyma.splits import split_rows
from hyma.training import validate

# ----------------------------------------------------------------------------------------------------------------- maps


def inverse(rows, strength, without=None):
    """Of a Gram matrix that `strength` times its mean eigenvalue has been added to."""
    gram = rows.T @ rows
    if without is not None:
        gram = gram - without.T @ without
    return torch.linalg.inv(gram + strength * gram.trace() / len(gram) * torch.eye(len(gram)))


def without_direction(weight, mean):
    direction = F.normalize(mean.double(), dim=0)
    return weight - torch.outer(direction, direction) @ weight


def correlated_rows():
    """Texts [500, 24] and pictures [500, 40], centred."""
    torch.manual_seed(0)
    x, y = torch.randn(500, 24), torch.randn(500, 40)
    y[:, :24] += 0.5 * x
    return x - x.mean(0), y - y.mean(0)


@pytest.mark.parametrize("width", [1, 256, 513, 1280])
def test_a_gram_matrix_against_float64(width):
    rows = torch.randn(60, width, generator=torch.Generator().manual_seed(0))
    with flop_counter() as counter:
        gram = gram_matrix(rows)
    torch.testing.assert_close(gram.double(), rows.double().T @ rows.double(), atol=1e-4, rtol=1e-5)
    assert torch.equal(gram, gram.T)
    assert counter.get_total_flops() < (0.7 if width > 512 else 1.01) * 2 * 60 * width**2


def test_the_whitened_map_against_float64():
    """C_yy^-1 C_yx C_xx^-1."""
    x, y = correlated_rows()
    texts, pictures = CentredRows(x + 3, TEXT_NOISE_ROWS), CentredRows(y, IMAGE_NOISE_ROWS)
    torch.testing.assert_close(texts.mean, x.mean(0) + 3)
    a, b = x.double(), y.double()
    expected = inverse(b, IMAGE_NOISE_ROWS / 500) @ b.T @ a @ inverse(a, TEXT_NOISE_ROWS / 500)
    expected = without_direction(expected, pictures.mean)
    found = whitened_map(pictures.rows.T @ texts.rows, texts, pictures)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


def test_a_covariance_without_some_rows_against_float64():
    x, _ = correlated_rows()
    texts = CentredRows(x + 3, TEXT_NOISE_ROWS)
    found = texts.solve_without(texts.rows[:99], torch.eye(24)).double()
    torch.testing.assert_close(found, inverse(x[99:].double(), TEXT_NOISE_ROWS / 500), rtol=1e-4, atol=1e-9)


def test_a_loud_direction_that_no_text_predicts_does_not_lead_the_whitened_map():
    """Ridge regression follows the directions in which pictures differ most, whatever the texts say."""
    x, y = correlated_rows()
    texts = CentredRows(x + 3, TEXT_NOISE_ROWS)
    y[:, 39] = 30 * torch.randn(500) + x[:, 0]
    pictures = CentredRows(y, IMAGE_NOISE_ROWS)
    products = pictures.rows.T @ texts.rows
    ridge = texts.solve(products.T).T
    whitened = whitened_map(products, texts, pictures)
    shares = [weight[39].norm() / weight.norm() for weight in (ridge, whitened)]
    assert shares[1] < shares[0] / 3


def test_ridge_and_whitened_maps_for_every_strength():
    x, y = (rows.double() for rows in correlated_rows())
    cross = y.T @ x
    factors = ridge_factors(x.T @ x)
    ridge, whitened = ridge_maps(cross, factors), whitened_maps(cross, factors, y.T @ y, 500)
    assert tuple(ridge) == tuple(whitened) == RIDGE_CHOICES
    for strength in RIDGE_CHOICES:
        expected = cross @ inverse(x, strength)
        torch.testing.assert_close(ridge[strength], expected)
        torch.testing.assert_close(whitened[strength], inverse(y, IMAGE_NOISE_ROWS / 500) @ expected)


@pytest.mark.parametrize("rank", [8, 24, 30])
def test_a_map_along_axes_is_the_whitened_map_cut_to_its_leading_directions(rank):
    """With as many axes as the map has directions, or more, nothing is lost."""
    x, y = correlated_rows()
    texts, pictures = CentredRows(x + 3, TEXT_NOISE_ROWS), CentredRows(y, IMAGE_NOISE_ROWS)
    product = pictures.rows.T @ texts.rows
    found = image_map(product, texts, pictures, rank)
    assert found.axes.shape == (40, rank) and found.weight.shape == (rank, 24)
    torch.testing.assert_close(found.axes.T @ found.axes, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, -found.weight @ texts.mean, atol=1e-5, rtol=1e-5)
    lengths = (texts.rows @ found.weight.T).norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1)
    outputs = texts.rows @ whitened_map(product, texts, pictures).T
    cosine = F.cosine_similarity((texts.rows @ (found.axes @ found.weight).T).flatten(), outputs.flatten(), dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4) if rank >= 24 else cosine.item() > 0.6


def test_procrustes_recovers_a_rotation():
    random = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=random).double())
    x = torch.randn(200, 16, generator=random).double()
    y = x @ rotation.T
    torch.testing.assert_close(procrustes_map(y.T @ x, y.T @ y, x.T @ x), rotation)


def test_flops_of_procrustes_by_hand():
    """The matrix products as torch counts them; the factorisations by their textbook costs."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(99, 24, generator=random).double(), torch.randn(99, 48, generator=random).double()
    cross, image_gram, text_gram = y.T @ x, y.T @ y, x.T @ x
    with FlopCounterMode(display=False) as products:
        procrustes_map(cross, image_gram, text_gram)
    with flop_counter() as counter:
        procrustes_map(cross, image_gram, text_gram)
    # axes.T cross [24 x 48 x 24], times the text axes, left right, axes times that, times the text axes back.
    by_hand = 2 * (24 * 48 * 24 + 24**3 + 24**3 + 48 * 24 * 24 + 48 * 24 * 24)
    assert products.get_total_flops() == by_hand
    assert counter.get_total_flops() == by_hand + 22 * 24**3 + 9 * 48**3


def infonce_gradient(y, x, left, right, own_weight):
    """Minus the gradient of InfoNCE at temperature 1 with respect to the similarities, by torch."""
    scores = (F.normalize(y @ left, dim=1) @ F.normalize(x @ right, dim=1).T).requires_grad_()
    target = torch.arange(len(x))
    negative = (scores.logsumexp(1) + scores.logsumexp(0)).mean() / 2
    positive = scores[target, target].mean()
    (own_weight * positive - negative).backward()
    return scores.grad


def test_unicon_weighs_rows_by_the_gradient_of_infonce(monkeypatch):
    monkeypatch.setattr(unicon, "BLOCK", 7)  # rows come in several blocks, the last one shorter
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 24, generator=random), torch.randn(50, 48, generator=random)
    left, right = torch.randn(48, 16, generator=random), torch.randn(24, 16, generator=random)
    found = unicon.weighted_agreement(x, y, x @ right, y @ left)
    torch.testing.assert_close(found, y.T @ infonce_gradient(y, x, left, right, 2) @ x, atol=1e-4, rtol=1e-4)


def test_unicon_finds_what_texts_and_pictures_share():
    """Of equal lengths in all directions, and blind to directions in which nothing is shared."""
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 16, generator=random)
    axes, _ = torch.linalg.qr(torch.randn(200, 16, generator=random))
    y = shared @ axes.T + 0.1 * torch.randn(400, 200, generator=random)
    x = torch.cat([shared, 0.3 * torch.randn(400, 150, generator=random)], dim=1)
    weight = unicon.unicon_map(x, y)
    torch.testing.assert_close(torch.linalg.svdvals(weight)[: unicon.RANK], torch.ones(unicon.RANK), atol=1e-4, rtol=0)
    assert F.cosine_similarity(x @ weight.T, y).mean() > 0.5 > F.cosine_similarity(x.flip(0) @ weight.T, y).mean() + 0.4


# ----------------------------------------------------------------------------------------------------- cross-validation


def test_cross_validation_never_sees_the_fold_that_it_scores(initialise):
    """Against inverses in float64: each fold by the map of all other rows, among the rows of all folds."""
    found = initialise(0)
    data, folds, generator = found.data, found.folds, found.generator
    sizes = [len(fold) for fold in folds]
    means, centred = {}, {}
    for name in found.store.dims:
        rows = found.store.take(name, torch.cat(folds))
        means[name] = rows.mean(0)
        centred[name] = rows - means[name]
    s = leading_coordinates([centred[text] for text in generator.text_names], generator.shared_width)
    x, s, y = (rows.double() for rows in (centred["mpnet"], s - s.mean(0), centred["efflite1"]))
    of_texts, of_images = TEXT_NOISE_ROWS / len(x), IMAGE_NOISE_ROWS / len(x)

    outputs = []
    places = torch.arange(len(x)).split(sizes)
    for place in places[:-1]:
        others = torch.cat([other for other in places if other is not place])
        to_s = inverse(x, of_texts, without=x[place]) @ x[others].T @ s[others]
        weight = inverse(y, of_images, without=y[place]) @ y[others].T @ s[others]
        weight = without_direction(weight, means["efflite1"]) @ inverse(s, of_texts, without=s[place])
        outputs.append(x[place] @ to_s @ weight.T)
    held_out = torch.cat(folds[:-1])
    ranks = Retrieval(data, held_out, CPU).ranks(torch.cat(outputs), y[: len(held_out)])
    for fold in range(len(sizes) - 1):
        of_fold = slice(sum(sizes[:fold]), sum(sizes[: fold + 1]))  # each row has a picture and a caption of its own
        expected = sum((r[of_fold] < k).double().mean().item() for r in ranks for k in (1, 5, 10)) / 6
        assert found.cv_recalls["efflite1:mpnet"][fold] == pytest.approx(expected, abs=0.015)


def test_cross_validation_of_shuffled_pictures_is_at_chance(initialise):
    """Though the closed form itself fits its own rows far above chance."""
    found = initialise(0, shuffled=True)
    retrieval = Retrieval(found.data, torch.cat(found.folds[:-1]), CPU)
    values = [value for folds in found.cv_recalls.values() for value in folds]
    assert sum(values) / len(values) < 1.5 * sum(retrieval.chance) / 3
    targets = found.generator.project_images(found.store, ["efflite1"], found.rows, torch.float32)
    six = validate(found.generator, targets, retrieval, [("efflite1", "mpnet")])["efflite1:mpnet"]
    assert recall10(six) > 3 * retrieval.chance[2]


def test_folds_keep_a_pictures_captions_together(planted):
    data = Embeddings(planted)
    rows, _ = split_rows(data)
    data.rows = [{"image": f"picture {k // 3}"} for k in range(data.row_count)]
    folds = fold_rows(data, rows, seed=0)
    assert [len(fold) for fold in folds] == pytest.approx([405, 405, 0], abs=5)
    assert torch.equal(torch.cat(folds).sort().values, rows)
    pictures = [{data.rows[i]["image"] for i in fold.tolist()} for fold in folds]
    assert sum(map(len, pictures)) == len(set().union(*pictures))
    again, other = (fold_rows(data, rows, seed=seed) for seed in (0, 1))
    assert all(map(torch.equal, folds, again)) and not all(a.tolist() == b.tolist() for a, b in zip(folds, other))
    assert [len(fold) for fold in fold_rows(data, rows[:4], seed=0)] == [3, 1, 0]
    for pair_count, most, held_out in (
        (1, 540, 270),
        (MOST_COSINES // 810**2, 2048, 405),  # as pairs' cosines add up
        (3000, 2048, 203),
        (MOST_COSINES, 2048, 3),
    ):
        folds = fold_rows(data, rows, 0, pair_count, most)
        assert [len(fold) for fold in folds[:2]] == pytest.approx([held_out, held_out], abs=8)
        assert sum(map(len, folds)) == len(rows)


def test_shared_axes_come_from_a_part_of_many_rows():
    """Where a few directions have all the variance, every fourth of 20,000 rows finds them as well as all rows do."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 6, generator=random) @ torch.randn(6, 40, generator=random)
    with flop_counter() as counter:
        s = leading_coordinates([rows], 6)
    assert counter.get_total_flops() < 2.5 * (2 * 20_000 * 40 * 6)  # of what the coordinates take; all rows take 5.8
    kept = s @ torch.linalg.lstsq(s, rows).solution
    torch.testing.assert_close(kept, rows, atol=1e-3, rtol=1e-3)


def test_rows_that_are_all_the_same_have_maps_without_nan():
    """A constant encoder, one caption for all: their covariance is zero, and so are their maps."""
    same, varied = torch.ones(40, 6), torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    constant, other = CentredRows(same, 0.3), CentredRows(varied, 3.0)
    axes = leading_coordinates([constant.rows], 4)
    assert torch.equal(axes, torch.zeros(40, 4))
    found = whitened_map(other.rows.T @ constant.rows, constant, other)
    assert torch.equal(found, torch.zeros(8, 6))
    shared = CentredRows(axes, 0.3)
    mapped = image_map(other.rows.T @ shared.rows, shared, other, rank=3)
    assert all(part.isfinite().all() for part in mapped)
