"""What each pair will score on a whole corpus, predicted from a random part of it by the learning curves of closed forms.

On a part, the closed form that training starts from is fitted to a quarter, half and all of some rows, and scored on other
rows, which stay the same. Between these sizes the odds of a hit follow a power of the rows,

    s / (1 - s) = c n^b,   that is   logit s_pj = a_p + b ln(n_j / N),

for pair p at n_j rows, with N the training rows of the whole corpus: a_p is the logit of its score there. A pair has a level
of its own, which the largest n_j gives, and all share the exponent b: a few hundred rows cannot tell exponents apart, and
those of single pairs predict worse. Also the one that all pairs measure on a part is too high, as curves flatten, so it is
drawn towards one that was measured up to a whole corpus, and what may still be wrong is drawn at random,

    b = EXPONENT + KEPT (measured - EXPONENT) + e + e_p,

e for all pairs alike. Pictures are resampled, alike for all pairs and sizes, so that the noise of the scores has its
correlations. How often a pair is the best of such a draw is the probability that it is the best.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import betabinom
from tqdm import tqdm

from hyma.closed_form import IMAGE_NOISE_ROWS, TEXT_NOISE_ROWS, CentredRows, leading_coordinates, whitened_map
from hyma.metrics import INTERVAL, Retrieval, number_names
from hyma.pairs import images_of, texts_of
from hyma.seeds import seeded_generator
from hyma.training import LEAST_CANDIDATES

SHARES = (1 / 4, 1 / 2, 1)  # of the rows that the other fold leaves to fit on
FOLDS = 2
MOST_ROWS = 8192  # of a part, which bounds the time
WIDTH = 256  # of the space that the texts share
DRAWS = 2000
# Measured on icons from 500 to 18,000 rows, which needed exponents from 0.37 to 0.48 for a part's measured 0.39 to 0.55;
# Clip art needed 0.33 to 0.43 for 0.55 to 0.67; both had been seen when these were set (NOTES.md).
EXPONENT = 0.4
KEPT = 0.25
SHARED_ERROR = 0.07  # standard deviation of e
PAIR_ERROR = 0.02  # standard deviation of e_p
PRIOR = 0.5  # Jeffreys's, of the share of candidates that come before the right one


class Prediction(NamedTuple):
    """R@10 of P pairs on a whole corpus, 0 to 1, as if among `candidates` rows."""

    pairs: list
    target_rows: int  # training rows of the whole corpus
    candidates: int
    sizes: np.ndarray  # [J] training rows of the curve's points
    curve: np.ndarray  # [J, P] R@10 there
    expected: np.ndarray  # [P] on the whole corpus
    interval: np.ndarray  # [2, P] the ends of the 95 % interval
    draws: np.ndarray  # [draws, P] logits of the score on the whole corpus

    def best(self):
        """Which pair is the best of each draw: [draws]."""
        return self.draws.argmax(1)


# ------------------------------------------------------------------------------------------------ the curves' points


class LearningCurves(NamedTuple):
    """What the closed forms of P pairs score at J sizes on the same n rows."""

    sizes: np.ndarray  # [J] training rows
    hits: np.ndarray  # [J, P, n], whose means are 0 to 1
    group: np.ndarray  # [n] the group of rows that it belongs to


def learning_curves(store, data, pairs, rows, seed, candidates):
    """The LearningCurves of the pairs, which are grouped by image encoder, on these rows of a part.

    A hit is the chance that the row's caption finds its picture among the first ten of so many candidate rows, and its picture
    a caption, the mean of both.
    """
    if len(rows) > MOST_ROWS:
        rows = rows[torch.arange(MOST_ROWS) * len(rows) // MOST_ROWS]
    group = groups_of_rows(data, rows)  # [n]
    group_count = int(group.max()) + 1
    order = torch.randperm(group_count, generator=seeded_generator("prediction", seed))
    fold = (order * FOLDS // group_count)[group]  # [n]
    hits = torch.zeros(len(SHARES), len(pairs), len(rows), dtype=torch.float64)
    sizes = np.zeros(len(SHARES))
    progress = tqdm(total=FOLDS * len(SHARES), desc="predict", unit="fit")
    for k in range(FOLDS):
        held_out = rows[fold == k]
        others = rows[fold != k]
        others = others[torch.randperm(len(others), generator=seeded_generator("pool", seed, k))]
        retrieval = Retrieval(data, held_out, store.device)
        chances = chances_of_hits(retrieval, candidates)
        for j, share in enumerate(SHARES):
            train_rows = others[: max(2, int(share * len(others)))]
            sizes[j] += len(train_rows) / FOLDS
            for p, scores in enumerate(held_out_scores(store, pairs, train_rows, held_out)):
                hits[j, p, fold == k] = hits_of_rows(retrieval, scores, chances)
            progress.update()
    progress.close()
    return LearningCurves(sizes, hits.numpy(), group.numpy())


def groups_of_rows(data, rows):
    """[n]: rows with the same number must be in one fold. They share a picture; or a caption, if no held-out row of the data
    shares its caption with a training row. A fold is then as new to the map as the data's own held-out rows are."""
    if not data.rows:
        return torch.arange(len(rows))
    numbers, _ = number_names([data.rows[i]["image"] for i in rows.tolist()])
    if not splits_share_captions(data):
        captions, _ = number_names([data.rows[i]["caption"] for i in rows.tolist()])
        ends = (numbers.numpy(), int(numbers.max()) + 1 + captions.numpy())  # a row's picture and caption
        count = int(ends[1].max()) + 1
        edges = coo_array((np.ones(len(rows)), ends), shape=(count, count))
        component = connected_components(edges, directed=False)[1]  # of each picture and caption
        numbers, _ = number_names(component[ends[0]].tolist())
    return numbers


def splits_share_captions(data):
    """Whether some caption is in two splits, or the data have no splits."""
    split_of_caption = {}
    for row in data.rows:
        split = row.get("split")
        if split_of_caption.setdefault(row["caption"], split) != split or split is None:
            return True
    return False


def held_out_scores(store, pairs, train_rows, held_out):
    """For each of the pairs, which are grouped by image encoder, the scores [h, h] of the texts of rows with the pictures of
    rows, by the closed form of the training rows: ridge regression from a text to the space that texts share, and from there
    the whitened map to the picture (`hyma.closed_form`)."""
    texts = {name: CentredRows(store.take(name, train_rows), TEXT_NOISE_ROWS) for name in texts_of(pairs)}
    coordinates = leading_coordinates([centred.rows for centred in texts.values()], WIDTH)  # s [n, m]
    shared = CentredRows(coordinates, TEXT_NOISE_ROWS)
    predicted = {}
    for name, centred in texts.items():
        to_shared = centred.solve(centred.rows.T @ shared.rows)  # [D_t, m]
        predicted[name] = (store.take(name, held_out) - centred.mean) @ to_shared  # [h, m]
    for image in images_of(pairs):
        pictures = CentredRows(store.take(image, train_rows), IMAGE_NOISE_ROWS)
        weight = whitened_map(pictures.rows.T @ shared.rows, shared, pictures)  # W [D, m]
        candidates = store.take(image, held_out) @ weight  # [h, m], so that y . W s = (y W) . s
        gram = weight.T @ weight  # [m, m]
        for text in [text for other, text in pairs if other == image]:
            s = predicted[text]
            squares = ((s @ gram) * s).sum(1)  # [h] squared lengths of the outputs W s
            yield s @ candidates.T / squares.clamp(min=1e-30).sqrt()[:, None]


def hits_of_rows(retrieval, scores, chances):
    """[h]: of each row, the chance of a hit, the mean of both directions. A picture of several rows, or a caption, is divided
    among them: the mean is that of all pictures and of all captions. chances: the `chances_of_hits` of the retrieval."""
    scores = scores[retrieval.first["caption"]][:, retrieval.first["image"]]  # [captions, pictures]
    total = 0
    for query, ranks in zip(("caption", "image"), retrieval.ranks_of_scores(scores)):
        chance, right = chances[query]  # [m, targets], [queries]
        place = retrieval.place[query].cpu()  # [h]
        rows = place.bincount()  # [queries], of each
        share = len(place) / (len(rows) * rows)  # [queries]
        total = total + (chance[right, ranks.cpu()] * share)[place]
    return total / 2


def chances_of_hits(retrieval, candidates):
    """{"caption", "image": (chance [m, targets], right [queries])}: the chance that a query finds a right one among the first ten
    of so many candidate rows, by how many right ones it has and how many of the retrieval's own candidates come before the first.

    With r of c wrong ones before the first right one, the share of all that come before it is Beta(r + 1/2, c - r + 1/2), so that
    how many of other candidates do is beta-binomial. Scores of small and of large parts can then be compared. Of so many rows, as
    many pictures and captions are different as of the retrieval's.
    """
    chances = {}
    for query, target in (("caption", "image"), ("image", "caption")):
        right = retrieval.right_candidates(query)  # [queries]
        targets = len(retrieval.first[target])
        count = round(candidates * targets / len(retrieval.rows))
        chance = torch.zeros(int(right.max()) + 1, targets, dtype=torch.float64)
        counts = np.arange(10)[:, None]
        for m in right.unique().tolist():
            wrong = targets - m  # c
            before = np.arange(wrong + 1)  # r
            shares = betabinom.pmf(counts, max(0, count - m), before + PRIOR, wrong - before + PRIOR)  # [10, c + 1]
            chance[m, : wrong + 1] = torch.from_numpy(shares.sum(0))
        chances[query] = chance, right
    return chances


# ----------------------------------------------------------------------------------------------- to the whole corpus


def extrapolate(curves, pairs, target_rows, candidates):
    """The Prediction from LearningCurves, by the formula at the top of this file."""
    sizes, pair_count, row_count = curves.hits.shape
    random = np.random.default_rng(0)
    group_count = curves.group.max() + 1
    weights = random.multinomial(group_count, np.full(group_count, 1 / group_count), size=DRAWS)[:, curves.group]
    weights = weights / weights.sum(1, keepdims=True)  # [draws, n]
    resampled = weights @ curves.hits.reshape(sizes * pair_count, row_count).T
    resampled = logit(resampled).reshape(DRAWS, sizes, pair_count)
    scores = curves.hits.mean(2)  # [J, P]

    x = np.log(curves.sizes / target_rows)  # [J]
    error = SHARED_ERROR * random.standard_normal((DRAWS, 1))
    error = error + PAIR_ERROR * random.standard_normal((DRAWS, pair_count))
    exponent = shared_exponent(x, resampled)[:, None] + error  # b [draws, P]
    draws = resampled[:, -1] - x[-1] * exponent
    expected = logit(scores[-1]) - x[-1] * shared_exponent(x, logit(scores))
    interval = np.percentile(draws, INTERVAL, axis=0)
    return Prediction(
        pairs, target_rows, candidates, curves.sizes, scores, odds_to_share(expected), odds_to_share(interval), draws
    )


def shared_exponent(x, logits):
    """The b of all pairs, without errors. What a part measures is the slope of the mean of logits [..., J, P] on x [J]."""
    centred = x - x.mean()
    measured = logits.mean(-1) @ centred / (centred @ centred)
    return EXPONENT + KEPT * (measured - EXPONENT)


def logit(share):
    """The logarithm of the odds of a share, which is kept from 0 and 1."""
    share = np.clip(share, 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share))


def odds_to_share(logits):
    """The inverse of `logit`."""
    return 1 / (1 + np.exp(-logits))


def predict(store, data, pairs, rows, training_rows, validation_rows, seed):
    """The Prediction for a whole corpus that has so many training and validation rows. pairs: grouped by image encoder. rows: of
    the part, to fit and to score on."""
    candidates = max(LEAST_CANDIDATES, validation_rows)
    curves = learning_curves(store, data, pairs, rows, seed, candidates)
    return extrapolate(curves, pairs, training_rows, candidates)
