"""How good connectors and choices are: retrieval ranks, bootstrap intervals, ranking fidelity."""

import math
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata

from kernels import true_rank

INTERVAL = (2.5, 97.5)  # the percentiles that bound a 95 % interval
SCORES_BYTES = 2**23  # of similarities at a time, which stay in the cache: a third less time than all at once
ONE_MATRIX_BYTES = 2**28  # of all similarities of a search, which both directions then share


# --------------------------------------------------------------------------------------------------------- retrieval


class Retrieval:
    """Recall@k of caption to picture and picture to caption, on fixed rows.

    Other rows may join as distractors: candidates, but no queries. Which of two connectors recalls more depends on how many
    candidates there are, so a few validation rows alone say little about a search among thousands (NOTES.md).
    A picture with several captions is once among the pictures, a caption of several pictures once among the
    captions; any of its own counts as found. CLIP_benchmark merges pictures and no captions: with `merge_captions` False
    a caption of two pictures is there twice, and each has one right picture. A tie with a wrong candidate counts against the
    match, so that constant vectors score zero; one with another right candidate does not: captions that differ in capitals
    alone have one vector by many encoders.
    `chance`: what a random order scores, for k = 1, 5, 10, the mean of both directions.
    """

    ks = (1, 5, 10)

    def __init__(self, data, rows, device, distractors=(), merge_captions=True):
        """data: the embedding folder. rows, distractors: indices of its rows, `self.rows` [n] in this order. device: of the
        embeddings to score."""
        self.query_rows = len(rows)
        rows = self.rows = torch.cat([rows, torch.as_tensor(distractors, dtype=rows.dtype)])
        self.queries = {}  # {"image", "caption"}: how many of the candidates, the first ones, are queries
        self.place = {}  # {"image", "caption"}: [n], which picture (caption) of the candidates a row has
        self.first = {}  # {"image", "caption"}: [candidates], the first row that has it
        for part in ("image", "caption"):
            names = rows.tolist()  # without a table, every row is a picture and a caption of its own
            if data.rows and (part == "image" or merge_captions):
                names = [data.rows[i][part] for i in names]
            place, first = number_names(names)
            self.queries[part] = int(place[: self.query_rows].max()) + 1
            self.place[part], self.first[part] = place.to(device), first.to(device)
        captions, images = len(self.first["caption"]), len(self.first["image"])
        _, first_of_pair = number_names((self.place["caption"] * images + self.place["image"]).tolist())
        self.is_different = torch.zeros(len(rows), dtype=torch.bool, device=device)  # [n], from rows before it with both parts
        self.is_different[first_of_pair.to(device)] = True
        products = self.queries["caption"] * images + self.queries["image"] * captions  # of both directions by themselves
        size = 4 * captions * images
        self.one_matrix = torch.device(device).type == "cpu" and captions * images < products and size <= ONE_MATRIX_BYTES
        self.similarities = min(captions * images, products)  # that both directions take at least
        to_text = self.random_recalls("image", "caption")
        to_image = self.random_recalls("caption", "image")
        self.chance = ((np.array(to_text) + np.array(to_image)) / 2).tolist()

    def random_recalls(self, query, target):
        """What a random order of the candidates scores, for each k.

        A query with m right candidates of c misses them all in the first k with the chance of drawing k of the others,
        prod_{j < k} (c - m - j) / (c - j).
        """
        right = self.right_candidates(query).double()
        count = len(self.first[target])
        missed = [torch.ones_like(right)]
        for j in range(max(self.ks)):
            missed.append(missed[-1] * ((count - right - j) / max(1, count - j)).clamp(0, 1))
        return [1 - missed[k].mean().item() for k in self.ks]

    def right_candidates(self, query):
        """[queries]: how many different right candidates each one has."""
        return self.place[query][self.is_different].cpu().bincount()[: self.queries[query]]

    def ranks(self, text, image):
        """How many candidates come before a query's first right one: of each caption among the pictures [captions], of
        each picture among the captions [pictures].

        text [n, D]: of the rows, of any length. image [n, D]: unit vectors, or their coordinates along orthonormal axes.
        """
        vectors = {"caption": F.normalize(text, dim=1), "image": image}
        candidates = {}  # [candidates, D]
        for part in vectors:
            candidates[part] = vectors[part][self.first[part]]
        if self.one_matrix:
            return self.ranks_of_scores(candidates["caption"] @ candidates["image"].T)
        own = torch.einsum("nd,nd->n", vectors["caption"], vectors["image"])  # [n]
        found = []
        for query, target in (("caption", "image"), ("image", "caption")):
            match = self.place[target][self.nearest_right_rows(own, query)]  # [queries]
            queries = candidates[query][: self.queries[query]]
            ranks = true_rank(queries, candidates[target], match, block_bytes=SCORES_BYTES)
            found.append(self.without_right_ties(ranks, own, query))
        return found

    def ranks_of_scores(self, scores):
        """The same of similarities [captions, images] of all candidates: both directions share one product."""
        own = scores[self.place["caption"], self.place["image"]]  # [n]
        of_captions = own[self.nearest_right_rows(own, "caption")]  # [queries]
        of_images = own[self.nearest_right_rows(own, "image")]  # [queries]
        caption_ranks = []
        image_ranks = torch.full_like(of_images, -1, dtype=torch.int64)  # a query's own is counted, too
        rows = max(1, SCORES_BYTES // (4 * scores.shape[1]))
        for block, matches in zip_longest(scores.split(rows), of_captions.split(rows), fillvalue=of_captions[:0]):
            before = ~(block[: len(matches)] < matches[:, None])  # a tie and a NaN count against the match
            caption_ranks.append(before.sum(1) - 1)
            image_ranks += (~(block[:, : len(of_images)] < of_images)).sum(0)
        ranks = {"caption": torch.cat(caption_ranks), "image": image_ranks}
        return [self.without_right_ties(ranks[query], own, query) for query in ranks]

    def nearest_right_rows(self, own, query):
        """[queries]: of the rows that a query has, the first of those whose picture and caption are nearest. own: a row's
        similarity of picture and caption [n]."""
        own = own.nan_to_num(nan=-torch.inf)
        place, count = self.place[query], len(own)
        rows = torch.arange(count, device=own.device).where(own == self.best_of(own, query)[place], count)  # [n]
        nearest = torch.full_like(self.first[query], count).scatter_reduce(0, place, rows, "amin")
        return nearest[: self.queries[query]]

    def best_of(self, own, query):
        """[candidates]: the largest similarity of each one's rows."""
        best = own.new_full(self.first[query].shape, -torch.inf)
        return best.scatter_reduce(0, self.place[query], own, "amax")

    def without_right_ties(self, ranks, own, query):
        """The ranks [queries] without the other right candidates that are as near as the first: those before it by a tie."""
        place = self.place[query]
        is_best = self.is_different & (own == self.best_of(own.nan_to_num(nan=-torch.inf), query)[place])  # [n], no NaN is
        tied = torch.zeros_like(self.first[query]).index_add(0, place, is_best.long())  # [candidates]
        return (ranks - (tied[: len(ranks)] - 1).clamp(min=0)).clamp(min=0)

    def recalls(self, text, image):
        """R@1, 5, 10 of text to image, then of image to text. Arguments as for `ranks`."""
        recalls = []
        for ranks in self.ranks(text, image):
            for k in self.ks:
                recalls.append((ranks < k).double().mean().item())
        return recalls


def number_names(names):
    """The different names, numbered as they come: (number of each name [n], first place of each number [different])."""
    number = {}
    place, first = [], []
    for row, name in enumerate(names):
        if name not in number:
            number[name] = len(number)
            first.append(row)
        place.append(number[name])
    return torch.tensor(place), torch.tensor(first)


def mean_recalls(six):
    """Six recalls, R@1, 5, 10 of text to image and of image to text, to the means of both directions (R@1, R@5, R@10)."""
    return tuple((six[k] + six[k + 3]) / 2 for k in range(3))


# --------------------------------------------------------------------------------------- true scores and their bootstrap


class TaskScores(NamedTuple):
    """The scores of every run's connectors on a task, or on the mean of several. S seeds, R resamples, P pairs."""

    name: str
    kind: str  # "retrieval", "zeroshot" or "vqa"
    protocol: str
    counted: str  # how many pictures or questions
    chance: float  # what guessing scores
    scores: dict  # method -> [S, P], 0 to 1
    resampled: dict  # method -> [S, R, P], the same resample of the task's pictures for every pair


def resample(units, times, name):
    """Means of [S, P, U] over `times` draws of U units with replacement, the same ones for all: {method: [S, R, P]}.
    They follow from the task's name, so that every report on it has the same ones."""
    count = next(iter(units.values())).shape[-1]
    random = np.random.default_rng(list(name.encode()))
    parts = {}
    for start in range(0, times, 100):  # a hundred at a time bounds the memory
        draws = random.multinomial(count, np.full(count, 1 / count), size=min(100, times - start))  # [100, U]
        for method, values in units.items():
            means = np.einsum("ru,spu->srp", draws, values, optimize=True) / count  # [S, 100, P]
            parts.setdefault(method, []).append(means)
    resampled = {}
    for method, means in parts.items():
        resampled[method] = np.concatenate(means, axis=1).round(9)
    return resampled


def draw_seed_weights(methods, times):
    """{method: [R, S]}: the weights of a method's seeds in each resample, drawn with replacement."""
    random = np.random.default_rng(1)
    weights = {}
    for method in methods:
        seeds = max(1, len(method.runs))
        weights[method.name] = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=times) / seeds
    return weights


def true_scores(task, oracle):
    """The true score of every pair [P], 0 to 1: the mean over the oracle's seeds."""
    return task.scores[oracle.name].mean(0).round(9)


def bootstrap_scores(task, oracle, seed_weights):
    """The true score of every pair in each resample, over rows and over the oracle's seeds: [R, P], 0 to 1."""
    return np.einsum("rs,srp->rp", seed_weights[oracle.name], task.resampled[oracle.name]).round(9)


# -------------------------------------------------------------------------------------------------- ranking fidelity

METRICS = {
    "regret": "regret, points", "top1": "top-1 hit", "recall3": "recall@3", "ndcg1": "NDCG@1", "ndcg3": "NDCG@3",
    "ndcg5": "NDCG@5", "ndcg": "NDCG, all", "spearman": "Spearman", "tau": "Kendall tau-b",
}  # fmt: skip


def fidelity(truth, preference):
    """How well a preference among P pairs finds the best by true scores. truth: [R, P], 0 to 1; preference: [P], higher is
    better, equals are ties. Returns {metric: [R]}, every one the expectation over a random breaking of its ties:

    regret: the best true score minus that of the pair chosen, in points. top1: whether that pair is a best one.
    recall3: share of the first three that score no less than the third best. ndcg1, 3, 5 and ndcg (all): gain = true
    score minus the worst pair's, discount 1 / log2(1 + place). spearman: of average ranks. tau: Kendall's tau-b. A
    preference that ties everything is a random order; its spearman and tau are 0.
    """
    count = truth.shape[1]
    before = (preference > preference[:, None]).sum(1)  # [P] how many come before a pair
    ties = (preference == preference[:, None]).sum(1)  # [P] how many share its place, itself included
    is_first = ((1 - before) / ties).clip(0, 1)  # [P] chance to be the first
    is_in_three = ((3 - before) / ties).clip(0, 1)  # [P] chance to be among the first three
    ranked = np.sort(truth, axis=1)[:, ::-1]  # [R, P] best first
    best = ranked[:, :1]
    third = ranked[:, [min(3, count) - 1]]
    found = {
        "regret": 100 * (best[:, 0] - truth @ is_first),
        "top1": (truth == best) @ is_first,
        "recall3": (truth >= third) @ is_in_three / min(3, count),
    }
    for name, k in (("ndcg1", 1), ("ndcg3", 3), ("ndcg5", 5), ("ndcg", count)):
        found[name] = ndcg(truth, ranked, before, ties, k)

    ranks = rankdata(truth, axis=1) - (count + 1) / 2  # [R, P] centred
    own = rankdata(preference) - (count + 1) / 2  # [P]
    found["spearman"] = correlation(ranks @ own, (ranks**2).sum(1) * (own**2).sum())
    found["tau"] = kendall_tau(truth, preference)
    return found


def ndcg(truth, ranked, before, ties, k):
    """NDCG@k [R] of a preference in which `before` [P] pairs come before a pair and `ties` [P] share its place."""
    count = truth.shape[1]
    discounts = np.where(np.arange(count) < k, 1 / np.log2(np.arange(count) + 2), 0)  # [P] by place
    expected = np.empty(count)  # [P] a pair's discount, the mean over the places that it shares
    for pair in range(count):
        expected[pair] = discounts[before[pair] : before[pair] + ties[pair]].mean()
    worst = ranked[:, -1:]
    gained = (truth - worst) @ expected
    ideal = (ranked - worst) @ discounts
    return np.where(ideal > 0, gained / np.where(ideal > 0, ideal, 1), 1.0)


def kendall_tau(truth, preference):
    """Kendall's tau-b [R] of a preference [P] with true scores [R, P]."""
    own = np.sign(preference - preference[:, None])  # [P, P]
    taus = []
    for part in np.array_split(truth, math.ceil(truth.size * truth.shape[1] / 1e7)):  # a few resamples at a time
        signs = np.sign(part[:, None] - part[:, :, None])  # [R, P, P]
        taus.append(correlation((signs * own).sum((1, 2)), (signs**2).sum((1, 2)) * (own**2).sum()))
    return np.concatenate(taus)


def correlation(product, squares):
    """product / sqrt(squares), and 0 where one of the two does not vary."""
    return np.where(squares > 0, product / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)


def best_pairs(preference):
    """Indices of the pairs tied for the first place."""
    return np.flatnonzero(preference == preference.max()).tolist()
