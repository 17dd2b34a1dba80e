"""Random inputs for every reader: each ends in a value, or in BadInput with one line, within time and memory."""

import base64
import json
import os
import random
import resource
import signal
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from fault_injection.counts import Counts
from fault_injection.processes import ROOT
from fault_injection.readers import Readers
from vlm import BadInput

SECONDS = 10  # of CPU time for one input
STUCK_SECONDS = 180  # without an input being finished: it waits, or the alarm cannot reach the reader
MEMORY = 3 * 2**30  # beyond what the process has at first
CHUNK = 5000  # inputs of one process


def fuzz(bench, asked):
    """Reads so many random inputs. One that ends its process is named, and the others go on without it."""
    counts = Counts(asked)
    peaks = []

    def read_share(first):
        return fuzz_share(bench, first, list(range(first, asked, bench.workers)))

    with ThreadPoolExecutor(bench.workers) as pool:
        for share in pool.map(read_share, range(bench.workers)):
            for failure in share.failures:
                counts.add(failure["number"], failure["problem"])
                counts.failed[-1]["input"] = failure.get("input")
            counts.add("", None, share.tried - len(share.failures))
            for ended in share.ended:
                counts.events.update(ended["outcomes"])
                peaks.append(ended["peak_bytes"])
    by_kind = {}
    for key, count in sorted(counts.events.items()):
        kind, outcome = key.split()
        by_kind.setdefault(kind.removeprefix("read_"), {})[outcome] = count
    counts.more = {"seed": bench.seed, "outcomes": by_kind, "peak_bytes": max(peaks, default=None)}
    return counts


class Share(NamedTuple):
    """What one worker has found."""

    failures: list
    ended: list  # of each process that reached its end: outcomes and memory
    tried: int


def fuzz_share(bench, place, numbers):
    """Reads the inputs of these numbers in processes, one after the other. Returns a Share."""
    failures, ended, tried = [], [], 0
    while numbers:
        chunk = numbers[:CHUNK]
        folder = bench.fresh_folder(f"fuzz-{place}")
        at_work = bench.runner.context.Value("q", -1)
        arguments = (str(folder), str(bench.inputs), bench.seed, chunk, at_work)
        process = bench.runner.fork(read_inputs, arguments)
        status = wait_while_it_advances(bench.runner, process, at_work)
        path = folder / "failures.jsonl"
        if path.exists():
            failures += [json.loads(line) for line in path.read_text().splitlines()]
        if status == 0:
            ended.append(json.loads((folder / "outcomes.json").read_text()))
            done = len(chunk)
        elif at_work.value < 0:
            raise RuntimeError(f"the fuzzing process ended with {status} before its first input")
        else:
            ending = "hangs" if status is None else f"ends its process with {status}"
            failures.append({"number": at_work.value, "problem": f"input {ending}"})
            done = chunk.index(at_work.value) + 1
        tried += done
        numbers = numbers[done:]
    return Share(failures, ended, tried)


def wait_while_it_advances(runner, process, at_work):
    """The exit status of a process, or None if one input took so long that the process was killed."""
    last = None
    while (status := runner.exit_status(process, STUCK_SECONDS)) is None:
        if at_work.value == last:
            runner.end(process)
            return None
        last = at_work.value
    return status


def read_inputs(folder, inputs, seed, numbers, at_work):
    """Reads the inputs of these numbers, and writes what failed to <folder>/failures.jsonl. at_work: the number now."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    os.chdir(folder)
    readers = Readers(folder, inputs)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, raise_hang)
    outcomes = Counter()
    with open(Path(folder) / "failures.jsonl", "w") as failures:
        for number in numbers:
            at_work.value = number
            kind = readers.kinds[number % len(readers.kinds)]
            outcome, problem = read_one(readers, kind, random.Random(f"{seed} {number}"))
            outcomes[f"{kind} {outcome}"] += 1
            if problem:
                shown = base64.b64encode(readers.input[:3000]).decode()
                failures.write(json.dumps({"number": number, "problem": f"{kind}: {problem}", "input": shown}) + "\n")
                failures.flush()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    (Path(folder) / "outcomes.json").write_text(json.dumps({"outcomes": outcomes, "peak_bytes": peak}))


class Hang(BaseException):
    """An input takes too long."""


def raise_hang(*_):
    raise Hang


def read_one(readers, kind, draw):
    """Makes and reads one input. Returns (outcome, problem or None)."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # not the clock's: the machine may be loaded
    try:
        getattr(readers, kind)(draw)
        return "value", None
    except BadInput as error:
        several = len(str(error).splitlines()) != 1
        return "refused", "a message of several lines" if several else None
    except Hang:
        return "failed", f"takes more than {SECONDS} s"
    except BaseException as error:
        return "failed", f"{type(error).__name__} at {place_of(error)}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def place_of(error):
    """The last line of our own code that an error went through, the harness's left out."""
    place = "the harness"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "fault_injection" not in path.parts:
            place = f"{path.name}:{frame.lineno}"
    return place
