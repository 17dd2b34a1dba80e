"""Benchmark: what a search costs over pairs, rows, batch sizes and depths, up to the size of the paper's.

    python benchmarks/search.py                        # every part that benchmarks/search.json has not yet: hours
    python benchmarks/search.py --part pairs rows      # these parts alone
    python benchmarks/search.py --threads 2 --part full       # 27 pairs x 558,128 rows x 10 epochs: needs 11 GB of disk

Data are synthetic and the true order of the pairs is planted in them (planted_embeddings.py), so that a search is also
checked: does it find the best pair, and how does its ranking correlate with the true order? Each run is a process of its
own; the results are written after each, and a part that is started again goes on where it was. Seconds of a grid search
are computed from those of a few of its steps, as the record says.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planted_embeddings import planted_encoders, true_order, write_planted_embeddings

from hyma.files import run_script, write_json
from hyma.pair_names import pair_name
from hyma.runs import read_run
from vlm import BadInput, read_json

ROOT = Path(__file__).resolve().parent.parent
ALL_ROWS = 558_128  # of the paper's corpus
VALIDATION_ROWS = 5_000  # of these, as `split_rows` sets them aside
GRID_ROWS = 20_000  # of the shorter run of grid search, whose steps cost what those on all rows do


class Search(NamedTuple):
    """A run that is measured."""

    images: int
    texts: int
    rows: int
    flags: tuple = ()
    script: str = "train_hyma.py"

    def name(self):
        return " ".join([self.script, f"{self.images}x{self.texts} pairs, {self.rows} rows", *self.flags])


PARTS = {
    "pairs": [Search(images, texts, 20_000) for images, texts in ((4, 2), (9, 3), (12, 9), (20, 15))],
    "rows": [Search(9, 3, rows) for rows in (10_000, 30_000, 100_000)],
    "batch": [
        Search(9, 3, 100_000, ("--epochs", "2", "--refine-steps", "0", "--batch-size", size))
        for size in ("512", "2048", "8192", "16384")
    ],
    "depth": [Search(9, 3, 20_000, ("--connector", depth)) for depth in ("mlp0", "mlp1", "mlp2")],
    "precision": [Search(9, 3, 100_000, ("--precision", precision)) for precision in ("fp32", "bf16")],
    "grid": [Search(9, 3, GRID_ROWS, ("--epochs", "1"), "train_grid.py")],
    "full": [Search(9, 3, ALL_ROWS, ("--precision", "bf16")), Search(9, 3, ALL_ROWS)],
}


def main():
    flags = parse_flags()
    results = read_json(flags.json) if flags.json.exists() else {}
    for part in flags.part:
        for search in PARTS[part]:
            if search.name() in results.get(part, {}):
                continue
            record = measure(search, flags.work, flags.threads)
            results.setdefault(part, {})[search.name()] = record
            write_json(flags.json, results)
            print_record(search, record)
        shutil.rmtree(flags.work, ignore_errors=not flags.work.exists())


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured (default: all)")
    add("--threads", type=int, default=2, help="of the processor (default: %(default)s)")
    about = "embeddings and runs, removed after each part (default: %(default)s)"
    add("--work", type=Path, default=ROOT / "embeddings" / "search", help=about)
    add("--json", type=Path, default=ROOT / "benchmarks" / "search.json", help="results (default: %(default)s)")
    return parser.parse_args()


def measure(search, work, threads):
    """Makes the embeddings, unless the last search left the same ones, trains, and returns the record."""
    encoders = planted_encoders(search.images, search.texts)
    data = work / f"{search.images}x{search.texts}-{search.rows}"
    if not (data / "manifest.json").is_file():
        shutil.rmtree(work, ignore_errors=True)  # those of another size: disk is limited
        write_planted_embeddings(data, encoders, search.rows)
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    record = work / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "timed_run.py"), str(record), search.script]
    command += [*search.flags, "--data", str(data), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise BadInput(f"{search.name()}: has failed, see above; what was measured before is in the results")
    return describe(search, read_json(record), read_run(out), true_order(encoders), threads)


def describe(search, record, run, order, threads):
    """The record of a finished run. record: of timed_run.py. order: of the pairs, the true one."""
    found = list(map(pair_name, run.ranks))  # best first
    places = [order.index(pair) for pair in found]
    parts = record["parts"]
    seconds = sum(part["seconds"] for part in parts.values())
    cpu_seconds = sum(part["cpu_seconds"] for part in parts.values())
    checks = 0
    for part in ("cross-validation", "validation"):
        checks += parts.get(part, {"cpu_seconds": 0})["cpu_seconds"]
    steps = run.ledger["steps"]
    result = {
        "pairs": len(found),
        "rows": search.rows,
        "steps": steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_bytes": record["peak_bytes"],
        "flops": run.ledger["flops"],
        "parts": parts,
        "share_of_checks": round(checks / cpu_seconds, 4),  # of the CPU seconds: cross-validation and validation
        "place_of_the_first": places[0],  # in the true order, 0 the best
        "spearman": round(float(spearmanr(range(len(places)), places).statistic), 4),
        "threads": threads,
        "load_average": os.getloadavg()[0],  # with other work on the machine, its clock says little
        "versions": run.config["versions"],
        "device": run.config["device"],
        "commit": run.config["commit"],
    }
    if search.script == "train_grid.py":
        all_steps = 10 * ((ALL_ROWS - VALIDATION_ROWS) // run.ledger["batch_size"])
        of_step = parts["steps"]["cpu_seconds"] / steps
        result["computed"] = f"{all_steps} steps on all rows at {of_step:.2f} CPU seconds, from {steps} measured ones"
        result["cpu_seconds_on_all_rows"] = round(all_steps * of_step)
    return result


def print_record(search, record):
    print(
        f"{search.name()}: {record['seconds']:.0f} s, {record['cpu_seconds']:.0f} CPU s, "
        f"{record['peak_bytes'] / 1e9:.1f} GB, first pair {record['place_of_the_first'] + 1} of {record['pairs']}, "
        f"Spearman {record['spearman']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    run_script(main)
