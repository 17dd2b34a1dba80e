"""Benchmark: what a search of 300 pairs costs against one of 27 on the same rows, and does it choose as well?

    python benchmarks/ladder.py --rungs 2000              # once: icons, embeddings, the runs of 27 pairs
    python benchmarks/many_pairs.py

The pairs are of thirty image and ten text encoders, among them the ladder's nine and three (ladder_encoders.py). The truth is how
connectors do on the ladder's test icons: the search's own, and those of grid search at the ladder's best rate. Grid search's own
choices are judged by the mean of its other seeds, and the search's by the same truths, each in turn.
Writes benchmarks/many_pairs.json, for each number of pairs a list over random seeds of the search and of grid search. CPU only.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ladder
import ladder_encoders
from choose_early import test_scores
from training_runs import describe_machine, ranked_pairs

from hyma.embeddings import Embeddings
from hyma.files import read_jsonl, run_script, write_csv, write_json
from hyma.pair_names import choose_pairs
from hyma.runs import read_run

ROOT = Path(__file__).resolve().parent.parent
RATE = "1e-2"  # of grid search, its best on the ladder's 2,000 rows
PAIRS_PER_PASS = 30  # of grid search: the states of 300 pairs would be 7 GB


def main():
    flags = parse_flags()
    results = {}
    for data in (ladder.make_rung(flags, flags.rung), make_rung_of_many(flags)):
        trainer = ladder.Trainer(flags, data, "mlp1")
        runs = [trainer.hyma(seed) for seed in range(flags.seeds)]
        grids = [train_grid(trainer, seed) for seed in range(flags.grid_seeds)]
        pair_count = len(ranked_pairs(runs[0]))
        results[f"{pair_count} pairs"], results[f"{pair_count} pairs, grid search"] = measure(data, runs, grids)
    few, _, many, _ = results.values()
    for key in ("flops", "seconds"):
        cost = [np.mean([of_seed[key] for of_seed in of_seeds]) for of_seeds in (few, many)]
        results[f"ratio of {key}"] = round(cost[1] / cost[0], 3)
    results["about"] = describe_machine(read_run(runs[0]).config)
    write_json(flags.json, results)
    for name, value in results.items():
        print(f"{name}: {value}")


def train_grid(trainer, seed):
    """The folder of grid search's run of a seed."""
    name = f"mlp1-grid-{RATE}-s{seed}"
    options = "--lr", RATE, "--seeds", seed, "--pairs-per-pass", PAIRS_PER_PASS
    return trainer.train("train_grid.py", name, *trainer.depth(), *options)


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rung", type=int, default=2000, help="training and validation rows (default: %(default)s)")
    add("--seeds", type=int, default=3, help="random seeds: how many, from 0 (default: %(default)s)")
    add("--grid-seeds", type=int, default=2, help="of grid search, half an hour each (default: %(default)s)")
    add("--measure", action="store_true", help="train nothing")
    add("--work", type=Path, default=Path("embeddings/ladder"), help="the ladder's (default: %(default)s)")
    add("--weights", type=Path, default=ROOT / "weights", help="encoder weights, made if missing")
    add("--json", type=Path, default=ROOT / "benchmarks" / "many_pairs.json", help="results (default: %(default)s)")
    return parser.parse_args()


def make_rung_of_many(flags):
    """The embedding folder of the rung's rows by many encoders, embedded in one pass if it is missing."""
    out = flags.work / f"rung-{flags.rung}-many"
    if not (out / "manifest.json").exists():
        table = flags.work / f"icons-{flags.rung}-many.csv"
        rows = read_jsonl(ladder.make_rung(flags, flags.rung) / "rows.jsonl")
        write_csv(table, [{key: row[key] for key in ("image", "caption", "split")} for row in rows])
        ladder_encoders.embed(table, out, flags.weights, ladder_encoders.MANY)
    return out


def measure(folder, runs, grids):
    """What runs of the search cost, and their choices by the test scores of their own connectors, of which the chosen pair's is
    refined, and by those of grid search. The same of grid search's runs, each judged by the others.
    """
    data = Embeddings(folder)
    pairs = choose_pairs(data, ["all"])
    test_rows = torch.tensor([i for i, row in enumerate(data.rows) if row["split"] == "test"])
    grid_scores = [test_scores(grid, data, pairs, test_rows) for grid in grids]
    of_search, of_grid = [], []
    others = [ladder.mean_scores(grid_scores[:k] + grid_scores[k + 1 :]) for k in range(len(grids)) if len(grids) > 1]
    for run in runs:
        by_each = [judge(run, scores, ", grid search") for scores in others or grid_scores]  # as grid search itself is judged
        of_search.append(cost_of(run) | judge(run, test_scores(run, data, pairs, test_rows), "") | ladder.mean_of(by_each))
    for k, grid in enumerate(grids):
        of_grid.append(cost_of(grid) | (judge(grid, others[k], ", other seeds") if others else {}))
    return of_search, of_grid


def cost_of(run):
    """A finished run's number of pairs, cost and choice."""
    order, ledger = ranked_pairs(run), read_run(run).ledger
    return {"pairs": len(order), "flops": ledger["flops"], "seconds": ledger["seconds"], "chosen": order[0]}


def judge(run, scores, of):
    """A run's ranking by the scores {"image:text": (R@1, R@10)} of connectors. of: ends the keys."""
    order = ranked_pairs(run)
    recall10 = np.array([scores[pair][1] for pair in order])  # [P], best-ranked pair first
    return {
        f"best{of}": order[recall10.argmax()],
        f"recall10 of the chosen{of}": round(float(recall10[0]), 3),
        f"regret{of}": round(float(recall10.max() - recall10[0]), 3),
        f"spearman{of}": round(float(spearmanr(-np.arange(len(order)), recall10).statistic), 4),
    }


if __name__ == "__main__":
    run_script(main)
