"""What the benchmarks ask of training runs: that one is made, its ranking, what its results depend on, and how sure a
difference of regrets is."""

import csv
import subprocess

import numpy as np

from hyma.metrics import INTERVAL, fidelity, resample
from hyma.pair_names import name_of_row

RESAMPLES = 2000  # behind the interval of a difference of regrets
# `resample` takes its random seed from the bytes of a name; this one is seed 0, which the committed intervals were drawn
# with.
SEED_ZERO = "\0"


def run_quietly(command):
    """Runs a command without its output. Ends with its last line if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])


def val_recall10(folder):
    """{"image:text": R@10 on the validation rows}, in the order of the run's ranking, best first."""
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        return {name_of_row(row): float(row["val_recall10"]) for row in csv.DictReader(file)}


def ranked_pairs(folder):
    """["image:text"], best first."""
    return list(val_recall10(folder))


def describe_machine(config):
    """What the results depend on, as the first run has recorded it."""
    return {key: config[key] for key in ("versions", "device", "commit", "started")}


def earlier_is_higher(order, pairs):
    """[P]: a number for each of the pairs, the higher the earlier it comes in the order, as `fidelity` takes it."""
    return np.array([-order.index(pair) for pair in pairs])


def excess_intervals(orders, grid_orders, grid_hits):
    """{"regret": [low, high], "spearman": the same}: the 95 % interval, over resamples of the test pictures, of

        mean over runs of value(run | all grids) - mean over grids g of value(g | the grids but g)

    where the value is the regret in points or Spearman's correlation: what the test pictures can say of the runs' choice
    against grid search's own.

    orders, grid_orders: the pairs of each run and of each grid search, best first. grid_hits [S, P, pictures]: 0 to 1, of the
    grids' connectors, their pairs in the order of grid_orders[0].
    """
    pairs = grid_orders[0]
    scores = resample({"grid": grid_hits}, RESAMPLES, SEED_ZERO)["grid"]  # [S, P, pictures] to [S, R, P]
    of_runs, of_grids = [], []
    for order in orders:
        of_runs.append(fidelity(scores.mean(0), earlier_is_higher(order, pairs)))
    for k, order in enumerate(grid_orders):
        others = np.delete(scores, k, axis=0)
        of_grids.append(fidelity(others.mean(0), earlier_is_higher(order, pairs)))
    intervals = {}
    for key, digits in (("regret", 2), ("spearman", 3)):
        means = [np.mean([values[key] for values in found], axis=0) for found in (of_runs, of_grids)]  # 2 x [R]
        intervals[key] = np.percentile(means[0] - means[1], INTERVAL).round(digits).tolist()
    return intervals
