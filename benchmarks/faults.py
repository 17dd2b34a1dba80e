"""The long run of faults: kills, signals, damaged files, fuzzed inputs, the list of known faults. Unattended, on a CPU.

    python benchmarks/faults.py                                   # everything; half an hour on two quiet cores
    python benchmarks/faults.py --kills 10 --fuzz 2000            # the same, smaller
    python benchmarks/faults.py --only kills-grid fuzz            # these parts alone
    python benchmarks/faults.py --again                           # parts that are in the JSON already, too

| part | what is done | what must hold |
|---|---|---|
| kills-STAGE | SIGKILL at every write and at random moments, of imports too | the command typed again ends with the same bits |
| signals-STAGE | SIGTERM, SIGINT, SIGXCPU, SIGUSR1 at random moments | its exit status; again the same bits |
| damage-FOLDER | a file is cut, flipped, replaced, removed | one line that names it, or an undisturbed result |
| fuzz | random files, tables, flags, pictures | a value, or BadInput with one line |
| list | every known fault | what the list says |

Nothing may hang, show a traceback or touch a file outside its work folder. The counts of a part go to
benchmarks/faults.json as soon as it is finished; a part that is there already, of the same commit and size, is left out.

Everything random follows from --seed: a failure is named by its case, which alone makes it again.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_injection.damage import damage, targets
from fault_injection.fuzz import fuzz
from fault_injection.kills import kills
from fault_injection.known_faults import FAULTS, known_faults
from fault_injection.signals import signals
from fault_injection.stages import open_bench

from hyma.files import write_json
from hyma.machine import provenance


def main():
    flags = parse_flags()
    work = flags.work or Path(tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = open_bench(work.resolve(), flags.seed, flags.workers)
    record = json.loads(flags.json.read_text()) if flags.json.exists() else {"parts": {}}
    made = provenance("cpu")
    for part, (size, run) in plan_parts(bench, flags, record["parts"]).items():
        asked = {"commit": made["commit"], "seed": flags.seed, "size": size}
        if not flags.again and is_there(record["parts"].get(part), asked):
            print(f"{part}: is there already")
            continue
        begin = time.monotonic()
        counts = run()
        seconds = round(time.monotonic() - begin, 1)
        found = asked | {"seconds": seconds} | counts.record()
        record["parts"][part] = without_paths(found, bench.work)
        record["made"] = made
        record["counts"] = add_up(record["parts"])
        write_json(flags.json, record)
        print_counts(part, counts, seconds)
    if flags.work is None:
        shutil.rmtree(work, ignore_errors=True)


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100, help="of a stage, at random moments (default: %(default)s)")
    add("--real", type=int, default=5, help="kills of a stage in processes of their own (default: %(default)s)")
    add("--signals", type=int, default=25, help="of each of four kinds, of a stage (default: %(default)s)")
    add("--fuzz", type=int, default=100_000, help="generated inputs (default: %(default)s)")
    add("--sample", type=int, help="only so many writes of a stage, and damages of a part (default: all)")
    add("--only", nargs="+", metavar="PART", help="these parts, or those that begin so (default: all)")
    add("--again", action="store_true", help="parts that the JSON holds already, too")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="cases at a time (default: %(default)s)")
    add("--work", type=Path, help="folder of inputs and of cases that failed (default: a temporary one)")
    add("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="counts (default: %(default)s)")
    return parser.parse_args()


def plan_parts(bench, flags, parts_so_far):
    """{part: (its size, what gives its Counts)}. parts_so_far: what has run, which the list refers to."""
    parts = {}
    for part in targets(bench):
        parts[part] = flags.sample, partial(damage, bench, part, flags.sample)
    parts["fuzz"] = flags.fuzz, partial(fuzz, bench, flags.fuzz)
    for stage in bench.stages.values():
        parts[f"signals-{stage.name}"] = flags.signals, partial(signals, bench, stage, flags.signals)
    for stage in bench.stages.values():
        size = [flags.kills, flags.sample, flags.real]
        parts[f"kills-{stage.name}"] = size, partial(kills, bench, stage, *size)
    parts["list"] = len(FAULTS), partial(known_faults, bench, parts_so_far)
    if not flags.only:
        return parts
    return {part: plan for part, plan in parts.items() if part.startswith(tuple(flags.only))}


def is_there(earlier, asked):
    """Whether a part has run already, at this commit and size."""
    return earlier is not None and asked.items() <= earlier.items()


def without_paths(record, work):
    """The record without the paths of this machine."""
    return json.loads(json.dumps(record).replace(str(work), "WORK"))


def add_up(parts):
    """{kind of part: tried, held, not held}."""
    totals = {}
    for part, counts in parts.items():
        total = totals.setdefault(part.partition("-")[0], {})
        for key in ("tried", "held", "not_held", "kills"):
            if key in counts:
                total[key] = total.get(key, 0) + counts[key]
    return totals


def print_counts(part, counts, seconds):
    print(f"{part}: {counts.tried} tried, {counts.held} held, {len(counts.failed)} not, {seconds:.0f} s", flush=True)
    for problem, count in list(counts.kinds().items())[:15]:
        print(f"  {count} x {problem}", flush=True)


if __name__ == "__main__":
    main()
