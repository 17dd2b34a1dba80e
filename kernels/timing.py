"""How the bench measures: calls one by one, and replayed as CUDA graphs; the GPU's clocks; rows that are safe once written.

A call by itself pays for its launches, as a training loop does that waits for each step; a replayed graph takes the
GPU's time alone. Both rotate over sets of inputs which together exceed the cache.
"""

import json
import os
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import torch

CACHE_BYTES = 2**27  # twice the L2 cache of an H100 or H200: sets of inputs are as large together
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"


class Results:
    """Rows and what they were measured on. The file is whole again after every row, so that a time limit loses none."""

    def __init__(self, path, about):
        """path: of a JSON file, or None for none. about: a dictionary, its first entries."""
        self.path, self.about, self.rows, self.left_out = path and Path(path), about, [], []

    def add(self, row):
        self.rows.append(row)
        self.write()

    def leave_out(self, what):
        """Notes and prints what could not be measured, and why."""
        print(what, flush=True)
        self.left_out.append(what)
        self.write()

    def write(self):
        if self.path:
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.about | {"rows": self.rows, "left_out": self.left_out}, indent=1) + "\n")
            os.replace(partial, self.path)


def time_calls(device, calls, seconds):
    """{"p20_ms", "p50_ms", "p80_ms"} of calls that wait for each other, {"graph_p50_ms"} of their graphs or {"no_graph": why},
    "peak_mib" above what was there before, and "clocks" right after."""
    if device != "cuda":
        times = time_one_by_one(calls, seconds)
        return percentiles(times) | {"graph_p50_ms": None, "peak_mib": None, "clocks": None}
    calls[0]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for call in calls:
        call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    found = percentiles(time_events(calls, seconds))
    try:
        replays = [capture(call).replay for call in calls]
        found["graph_p50_ms"] = percentiles(time_events(replays, seconds))["p50_ms"]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it waits for the GPU, or copies from unpinned memory
        found |= {"graph_p50_ms": None, "no_graph": str(error).splitlines()[0][:120]}
    return found | {"peak_mib": peak, "clocks": clocks()}


def own_stream(device):
    """A context in which to make and time calls. A graph is not captured on a GPU's default stream, and autograd takes a backward
    pass to the stream of its forward pass, so that all has to happen on one other stream."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


def capture(call):
    """A CUDA graph of a call that has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph


def time_events(calls, seconds):
    """Milliseconds of the GPU's own clock, of one call after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    times = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 100):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        calls[len(times) % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def time_one_by_one(calls, seconds):
    """Milliseconds of the host's clock."""
    calls[0]()
    times = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 100):
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def percentiles(times):
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def clocks():
    """What nvidia-smi says of the first GPU, such as "1980 MHz, 2619 MHz, 512.30 W, 52, 0x0000000000000004", or None."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def sets_beyond_cache(device, set_bytes):
    """How many sets of inputs of so many bytes outgrow the cache; two do on a CPU, where nothing is claimed."""
    if device != "cuda":
        return 2
    return min(32, max(2, -(-CACHE_BYTES // set_bytes)))
