"""Numbers that judge: retrieval ranks, ranking fidelity, bootstrap intervals, and shrinkage."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

from kernels import true_rank


class Retrieval:
    """Recall@k of caption to picture and picture to caption, on fixed rows.

    A picture with several captions stands once among the pictures, a caption of several pictures once among the
    captions; any of its own counts as found. A tie counts against the match, so that constant vectors score zero.
    `chance`: what a random order scores, for k = 1, 5, 10.
    """

    ks = (1, 5, 10)

    def __init__(self, data, rows, device):
        self.rows = rows  # [n]
        self.first, self.place, chances = {}, {}, []
        for part, other in (("image", "caption"), ("caption", "image")):
            names = [data.rows[i][part] for i in rows.tolist()] if data.rows else rows.tolist()
            position = {name: k for k, name in enumerate(dict.fromkeys(names))}
            place = torch.tensor([position[name] for name in names])  # [n], which picture (caption) a row has
            first = torch.full((len(position),), len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
            self.first[part], self.place[part] = first.to(device), place.to(device)
            owned = place.bincount().double()  # [queries], how many candidates are right
            count = len(rows) if not data.rows else len({data.rows[i][other] for i in rows.tolist()})
            missed = [torch.ones_like(owned)]
            for k in range(max(self.ks)):  # none right among the first k + 1 of a random order of all candidates
                missed.append(missed[-1] * ((count - owned - k) / max(1, count - k)).clamp(0, 1))
            chances.append([1 - missed[k].mean().item() for k in self.ks])
        self.chance = [sum(pair) / 2 for pair in zip(*chances)]

    def ranks(self, text, image):
        """How many candidates come before a query's first right one: of each caption among the pictures [captions], of
        each picture among the captions [pictures].

        text [n, D]: of the rows, of any length. image [n, D]: unit vectors, or their coordinates along orthonormal axes.
        """
        vectors = {"caption": F.normalize(text, dim=1), "image": image}
        own = torch.einsum("nd,nd->n", vectors["caption"], vectors["image"]).nan_to_num()  # [n]
        found = []
        for query, target in (("caption", "image"), ("image", "caption")):
            place, worst = self.place[query], torch.full_like(self.first[query], len(own))
            best = own.new_full(worst.shape, -torch.inf).scatter_reduce(0, place, own, "amax")  # [queries]
            rows = torch.arange(len(own), device=own.device).where(own == best[place], len(own))
            rows = worst.scatter_reduce(0, place, rows, "amin")  # [queries], where a query's nearest right one is
            found.append(true_rank(vectors[query][rows], vectors[target][self.first[target]], self.place[target][rows]))
        return found

    def recalls(self, text, image):
        """R@1, 5, 10 of text to image, then of image to text. Arguments as for `ranks`."""
        return [(ranks < k).double().mean().item() for ranks in self.ranks(text, image) for k in self.ks]


def rank_pairs(recalls, before=None):
    """{"image:text": six recalls} to the rows of ranking.csv, best first by R@10, R@5, R@1; equals share a rank.

    before: {"image:text": number}, what comes before the recalls: the more the better.
    """
    table = []
    for pair, six in recalls.items():
        image, _, text = pair.partition(":")
        means = [round((six[k] + six[k + 3]) / 2, 6) for k in range(3)]  # of both directions
        table.append({"image": image, "text": text} | {f"val_recall{k}": mean for k, mean in zip(Retrieval.ks, means)})

    def value(row):
        recall = row["val_recall10"], row["val_recall5"], row["val_recall1"]
        return (before or {}).get(f"{row['image']}:{row['text']}", 0), *recall

    table.sort(key=value, reverse=True)
    for row in table:
        row["rank"] = 1 + sum(value(other) > value(row) for other in table)
    return table


def expected(recalls, judged, scale):
    """{"image:text": R@10} that ranks the pairs: validation, drawn towards what a start scores on training rows that it has
    not seen, as far as their difference can be chance (Fay and Herriot, JASA 1979; Ybarra and Lohr, Biometrika 2008).

    A few hundred validation rows cannot tell good pairs apart; training rows are more, but say nothing of what training
    adds. So validation is regressed on them over the pairs, and of a pair's residual as much is kept as is not noise.
    recalls: {pair: six}. judged: {pair: R@10 a fold}; that folds disagree on a pair is the noise. scale: rows of a fold a
    validation row. Empty with fewer than four pairs, or one that was not judged.
    """
    if len(recalls) < 4 or not recalls.keys() <= judged.keys():
        return {}
    direct = torch.tensor([(six[2] + six[5]) / 2 for six in recalls.values()], dtype=torch.float64)  # [P]
    folds = torch.tensor([judged[pair] for pair in recalls], dtype=torch.float64)  # [P, K]
    pairs, k = folds.shape
    score = folds.mean(1) - folds.mean()
    noise = (folds - folds.mean(0) - score[:, None]).square().sum() / ((pairs - 1) * (k - 1))  # variance of one fold's
    fit = direct.mean() + score * (score @ direct) / score.square().sum().clamp(min=1e-12)
    spread = (direct - fit).square().sum() / (pairs - 2)
    kept = 1 - noise * scale / torch.maximum(spread, noise * (scale + 1 / k)).clamp(min=1e-12)
    found = (fit + kept * (direct - fit)).tolist()
    return {pair: round(value, 6) for pair, value in zip(recalls, found)}  # rounding errors rank nobody


class Judged(NamedTuple):
    """The scores of every run's connectors on a task, or on the mean of several."""

    name: str
    kind: str
    protocol: str
    counted: str  # how many pictures or questions
    chance: float
    scores: dict  # method -> [S, P], 0 to 1
    resampled: dict  # method -> [S, R, P], the same resample of the task's pictures for every pair


def resample(units, times, name):
    """Means of [S, P, U] over `times` draws of U units with replacement, the same ones for all: {method: [S, R, P]}.
    They follow from the task's name, so that every report on it has the same ones."""
    count, random = next(iter(units.values())).shape[-1], np.random.default_rng(list(name.encode()))
    found = {name: [] for name in units}
    for start in range(0, times, 100):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(100, times - start))  # [100, U]
        for name, values in units.items():
            found[name].append(np.einsum("ru,spu->srp", drawn, values, optimize=True) / count)
    return {name: np.concatenate(parts, axis=1).round(9) for name, parts in found.items()}


def draw_seeds(methods, times):
    """{method: [R, S]}: the weights of a method's seeds in each resample, drawn with replacement."""
    random = np.random.default_rng(1)
    counts = {method.name: max(1, len(method.runs)) for method in methods}
    return {name: random.multinomial(s, np.full(s, 1 / s), size=times) / s for name, s in counts.items()}


METRICS = {
    "regret": "regret, points", "top1": "top-1 hit", "recall3": "recall@3", "ndcg1": "NDCG@1", "ndcg3": "NDCG@3",
    "ndcg5": "NDCG@5", "ndcg": "NDCG, all", "spearman": "Spearman", "tau": "Kendall tau-b",
}  # fmt: skip


def fidelity(truth, order):
    """How well an order of P pairs finds the best by true scores. truth: [R, P], 0 to 1; order: [P], higher is better,
    equals are ties. Returns {metric: [R]}, every one the expectation over a random breaking of the order's ties:

    regret: the best true score minus that of the pair chosen, in points. top1: whether that pair is a best one.
    recall3: share of the first three that score no less than the third best. ndcg1, 3, 5 and ndcg (all): gain = true
    score minus the worst pair's, discount 1 / log2(1 + place). spearman: of average ranks. tau: Kendall's tau-b. An
    order that ties everything is a random order; its spearman and tau are 0.
    """
    count = truth.shape[1]
    before = (order > order[:, None]).sum(1)  # [P] how many come before a pair
    ties = (order == order[:, None]).sum(1)  # [P] how many share its place, itself included
    first, three = (((k - before) / ties).clip(0, 1) for k in (1, 3))  # [P] chance to be among the first k
    ranked = np.sort(truth, axis=1)[:, ::-1]
    best, third, worst = ranked[:, :1], ranked[:, [min(3, count) - 1]], ranked[:, -1:]
    found = {
        "regret": 100 * (best[:, 0] - truth @ first),
        "top1": (truth == best) @ first,
        "recall3": (truth >= third) @ three / min(3, count),
    }
    for name, k in (("ndcg1", 1), ("ndcg3", 3), ("ndcg5", 5), ("ndcg", count)):
        discounts = np.where(np.arange(count) < k, 1 / np.log2(np.arange(count) + 2), 0)
        expected = np.array([discounts[b : b + t].mean() for b, t in zip(before, ties)])  # [P]
        gained, ideal = (truth - worst) @ expected, (ranked - worst) @ discounts
        found[name] = np.where(ideal > 0, gained / np.where(ideal > 0, ideal, 1), 1.0)
    ranks, own = rankdata(truth, axis=1) - (count + 1) / 2, rankdata(order) - (count + 1) / 2
    found["spearman"] = ratio(ranks @ own, (ranks**2).sum(1) * (own**2).sum())
    own = np.sign(order - order[:, None])  # [P, P]
    taus = []
    for part in np.array_split(truth, math.ceil(truth.size * count / 1e7)):  # [R, P, P] a few at a time
        signs = np.sign(part[:, None] - part[:, :, None])
        taus.append(ratio((signs * own).sum((1, 2)), (signs**2).sum((1, 2)) * (own**2).sum()))
    return found | {"tau": np.concatenate(taus)}


def ratio(product, squares):
    return np.where(squares > 0, product / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)


def truth_of(judged, oracle):
    """The true score of every pair [P], 0 to 1: the mean over the oracle's seeds."""
    return judged.scores[oracle.name].mean(0).round(9)


def truth_again(judged, oracle, drawn):
    """Its resamples, over rows and seeds: [R, P]."""
    return np.einsum("rs,srp->rp", drawn[oracle.name], judged.resampled[oracle.name]).round(9)


def chosen_pairs(order):
    """Numbers of the pairs tied for the first place."""
    return np.flatnonzero(order == order.max()).tolist()
