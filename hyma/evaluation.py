"""The result of an evaluation: how well each method chooses, by the true scores, and that as tables.

P pairs, S seeds of a method, R bootstrap resamples. True scores are the oracle's, 0 to 1; regret and gaps are in points.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from hyma.embeddings import unique
from hyma.methods import SelectionMethod
from hyma.metrics import INTERVAL, METRICS, best_pairs, bootstrap_scores, fidelity, true_scores
from hyma.pair_names import pair_name


class Estimate(NamedTuple):
    """One metric of a method's preference: its mean over the seeds, and what to compare that with."""

    value: float
    low: float  # 95 % bootstrap interval, over rows and seeds
    high: float
    random: float  # what a random order has


class OwnConnectors(NamedTuple):
    """How good a run's own connectors are compared with the oracle's, in points, the mean over its seeds. None of a selector."""

    own_score: float | None = None  # of the pair that it chose
    gap_all: float | None = None  # own score minus the oracle's, mean of all pairs
    gap_top_third: float | None = None  # mean of the truly best third


class MethodResult(NamedTuple):
    """How well a method chooses on a task."""

    task: str
    method: str
    kind: str  # "run" or "selector"
    seeds: int  # 0 of a selector
    chosen: list  # indices of the pairs that it ranks first, of every seed
    fidelity: dict  # metric, a key of METRICS -> Estimate
    own: OwnConnectors
    gain: list  # [low, high]: the 95 % interval of how many points the chosen pairs are above the mean of all pairs


class Comparison(NamedTuple):
    """The true score of a pair minus that of the chosen one, in points, and what follows from its interval."""

    difference: float
    low: float  # 95 % bootstrap interval, over rows and seeds
    high: float
    verdict: str  # of VERDICTS


CHOSEN, BETTER, ALIKE, WORSE = VERDICTS = "chosen", "better", "cannot be told apart", "worse"


class EvaluationResult(NamedTuple):
    """All that a report is made from."""

    pairs: list  # [P] (image, text)
    methods: list  # of SelectionMethod
    oracle: SelectionMethod  # whose connectors have the true scores
    primary: SelectionMethod  # whose choice is the answer
    chosen: int  # the index of that pair
    tasks: list  # of TaskScores, the headline's first
    resamples: int  # R
    seed_weights: dict  # method -> [R, S] weights of its seeds in each resample
    method_results: list  # for each of `tasks`, [MethodResult] of the methods
    costs: dict  # method -> Cost
    spectra: dict  # (image, text) -> canonical correlations, largest first; empty without selectors
    warnings: list  # lines

    @property
    def headline(self):
        """The TaskScores that the answer is about."""
        return self.tasks[0]

    def pair_name(self, k):
        return pair_name(self.pairs[k])

    def true_scores(self, task):
        """[P], 0 to 1."""
        return true_scores(task, self.oracle)

    def bootstrap_scores(self, task):
        """[R, P], 0 to 1."""
        return bootstrap_scores(task, self.oracle, self.seed_weights)


# --------------------------------------------------------------------------------------------- how well methods choose


def evaluate_methods(task, methods, oracle, seed_weights):
    """[MethodResult]: how well each method's preference finds the truly best pairs of a task, and, of a run, how its own
    connectors compare with the oracle's.

    task: TaskScores. seed_weights: {method: [R, S]}. A metric is the mean over the method's seeds; its 95 % interval is
    over resamples of the task's rows and of the seeds of oracle and method.
    """
    truth = true_scores(task, oracle)  # [P]
    resampled = bootstrap_scores(task, oracle, seed_weights)  # [R, P]
    results = []
    for method in methods:
        own = OwnConnectors()
        if method.runs:
            own = compare_connectors(task.scores[method.name], method.preferences, truth)
        chosen = []
        for preference in method.preferences:
            chosen += best_pairs(preference)
        result = MethodResult(
            task=task.name,
            method=method.name,
            kind="run" if method.runs else "selector",
            seeds=len(method.runs),
            chosen=unique(chosen),
            fidelity=estimate_fidelity(truth, resampled, method.preferences, seed_weights[method.name]),
            own=own,
            gain=gain_over_all(resampled, method.preferences, seed_weights[method.name]),
        )
        results.append(result)
    return results


def estimate_fidelity(truth, resampled, preferences, seed_weights):
    """{metric: Estimate}. truth [P], resampled [R, P]: true scores. preferences [S, P]. seed_weights [R, S]."""
    of_truth = []  # [S] {metric: [1]}
    of_resamples = []  # [S] {metric: [R]}
    for preference in preferences:
        of_truth.append(fidelity(truth[None], preference))
        of_resamples.append(fidelity(resampled, preference))
    of_random_order = fidelity(truth[None], np.zeros(len(truth)))
    estimates = {}
    for metric in METRICS:
        value = np.mean([seed[metric][0] for seed in of_truth])
        by_seed = np.stack([seed[metric] for seed in of_resamples], axis=1)  # [R, S]
        low, high = np.percentile((seed_weights * by_seed).sum(1), INTERVAL)
        estimates[metric] = Estimate(value, low, high, of_random_order[metric][0])
    return estimates


def gain_over_all(resampled, preferences, seed_weights):
    """[low, high]: the 95 % interval of how many points the chosen pairs are above the mean of all pairs. Both have the
    same resampled rows and seeds. Arguments as for `estimate_fidelity`."""
    gains = []  # [S] [R]
    for preference in preferences:
        chosen = best_pairs(preference)
        gains.append(100 * (resampled[:, chosen].mean(1) - resampled.mean(1)))
    return np.percentile((seed_weights * np.stack(gains, axis=1)).sum(1), INTERVAL).tolist()


def compare_connectors(scores, preferences, truth):
    """The OwnConnectors of a run. scores [S, P], 0 to 1. preferences [S, P]. truth [P], 0 to 1."""
    gap = scores.mean(0) - truth  # [P]
    best_third = best_first(truth)[: math.ceil(len(truth) / 3)]
    first = preferences == preferences.max(1, keepdims=True)  # [S, P]; ties for the first place share it
    of_choice = (scores * first / first.sum(1, keepdims=True)).sum(1)  # [S]
    return OwnConnectors(100 * of_choice.mean(), (100 * gap).mean(), (100 * gap)[best_third].mean())


def compare_pairs(result, task):
    """[P] a Comparison of every pair with the chosen one. Both have the same resampled pictures and seeds, so that what
    makes all pairs' scores higher or lower at once does not count as noise."""
    truth = 100 * result.true_scores(task)  # [P]
    resampled = 100 * result.bootstrap_scores(task)  # [R, P]
    chosen = result.chosen
    differences = truth - truth[chosen]  # [P]
    low, high = np.percentile(resampled - resampled[:, [chosen]], INTERVAL, axis=0)  # [P]
    comparisons = []
    for k, difference in enumerate(differences):
        if k == chosen:
            verdict = CHOSEN
        elif low[k] > 0:
            verdict = BETTER
        elif high[k] < 0:
            verdict = WORSE
        else:
            verdict = ALIKE
        comparisons.append(Comparison(difference, low[k], high[k], verdict))
    return comparisons


def compared_with_random(result):
    """What a MethodResult's choice is compared with a random one: "better than", "worse than" or "not told from"."""
    low, high = result.gain
    if low > 0:
        return "better than"
    return "worse than" if high < 0 else "not told from"


def best_first(truth):
    """The indices of the pairs, truly best first. truth: [P]."""
    return np.argsort(-truth, kind="stable").tolist()


# ----------------------------------------------------------------------------------------------------------- as tables


def ranking_rows(result):
    """ranking.csv: a row for each task and pair, truly best first: true score in points, its interval, every method's rank,
    the score of every run's own connector, and the Comparison with the chosen pair."""
    ranks = {}
    for method in result.methods:
        ranks[f"rank by {method.name}"] = rankdata(-method.preferences.mean(0))
    rows = []
    for task in result.tasks:
        truth = 100 * result.true_scores(task)  # [P]
        low, high = np.percentile(100 * result.bootstrap_scores(task), INTERVAL, axis=0)  # [P]
        columns = {"true_rank": rankdata(-truth), "true_score": truth, "low": low, "high": high} | ranks
        for name, scores in task.scores.items():
            columns[f"score of {name}"] = 100 * scores.mean(0)  # [P]
        comparisons = compare_pairs(result, task)
        for k in best_first(truth):
            image, text = result.pairs[k]
            row = {"task": task.name, "image": image, "text": text}
            for name, values in columns.items():
                row[name] = round(values[k], 3)
            each = comparisons[k]
            row["minus_chosen"] = round(each.difference, 3)
            row["minus_chosen_low"] = round(each.low, 3)
            row["minus_chosen_high"] = round(each.high, 3)
            row["verdict"] = each.verdict
            rows.append(row)
    return rows


def method_rows(result):
    """selectors.csv: a row for each task and method, runs and selectors alike, with every metric and cost."""
    rows = []
    for method_results in result.method_results:
        for each in method_results:
            row = {
                "task": each.task,
                "method": each.method,
                "kind": each.kind,
                "seeds": each.seeds,
                "chosen": " ".join(map(result.pair_name, each.chosen)),
            }
            for metric, estimate in each.fidelity.items():
                row[metric] = estimate.value
                row[f"{metric}_low"] = estimate.low
                row[f"{metric}_high"] = estimate.high
                row[f"{metric}_random"] = estimate.random
            row |= each.own._asdict() | result.costs[each.method]._asdict()
            rows.append({key: rounded(value) for key, value in row.items()})
    return rows


def rounded(value):
    """A float, numpy's too, to six decimals; any other value as it is."""
    return round(float(value), 6) if isinstance(value, float) else value
