"""Runs a trainer as its command line would, and records what each part of it took: benchmarks/search.py starts this.

    python benchmarks/timed_run.py RECORD.json train_hyma.py --data embeddings/my --out runs/x

Parts are the functions of PARTS, each with all that it calls; what is left is "steps". Seconds are of the clock and of the
processor, which other work on the machine lengthens less. Memory is what the process holds itself (RssAnon of Linux): the
pages of mapped files, which the system drops where it needs room, are not counted.
"""

import runpy
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hyma.closed_form
import hyma.embeddings
import hyma.hypernetworks
import hyma.refinement
import hyma.runs
import hyma.splits
import hyma.training
from hyma.files import write_json

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "open": [(hyma.embeddings.Embeddings, "__init__"), (hyma.embeddings.RowStore, "__init__")],
    "start": [
        (hyma.closed_form, "make_shared_space"),
        (hyma.hypernetworks.FactoredHypernetwork, "initialise_from_closed_form"),
        (hyma.hypernetworks.FactoredHypernetwork, "project_images"),
    ],
    "cross-validation": [(hyma.closed_form, "cross_validate")],
    "validation": [(hyma.training, "validate")],
    "refinement": [(hyma.refinement, "refine")],
    "export": [(hyma.runs, "write_results")],
}


class Clock:
    """Seconds of parts. A part that runs within another counts for itself alone."""

    def __init__(self):
        self.running = []  # the parts that have begun, the innermost last
        self.seconds = {}  # part -> [of the clock, of the processor]
        self.last = self.now()

    def now(self):
        return time.perf_counter(), time.process_time()

    def switch(self):
        """Gives the seconds since the last switch to the innermost part."""
        now = self.now()
        part = self.running[-1] if self.running else "steps"
        total = self.seconds.setdefault(part, [0.0, 0.0])
        for k in range(2):
            total[k] += now[k] - self.last[k]
        self.last = now

    def time(self, owner, name, part):
        """Replaces a function of a module or class by one that is timed as this part."""
        function = getattr(owner, name)

        def timed(*arguments, **named):
            self.switch()
            self.running.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self.switch()
                self.running.pop()

        setattr(owner, name, timed)


class PeakMemory(threading.Thread):
    """The most bytes that this process has held itself, looked at ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self):
        while True:
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, 1024 * int(status.partition("RssAnon:")[2].split()[0]))
            time.sleep(0.1)


def main():
    record, script, *flags = sys.argv[1:]
    clock = Clock()
    for part, functions in PARTS.items():
        for owner, name in functions:
            clock.time(owner, name, part)
    hyma.refinement.validate = hyma.training.validate  # imported by its name before it was timed
    memory = PeakMemory()
    memory.start()
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
    clock.switch()
    parts = {}
    for part, (of_clock, of_processor) in clock.seconds.items():
        parts[part] = {"seconds": round(of_clock, 2), "cpu_seconds": round(of_processor, 2)}
    write_json(Path(record), {"parts": parts, "peak_bytes": memory.bytes})


if __name__ == "__main__":
    main()
