"""Runs the real scripts in forks of a server that has imported torch already: a start costs milliseconds.

A hook {"real": True} starts a Python of its own instead, as a shell does: it imports everything, which takes seconds.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from fault_injection.kill_points import install_hook

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 600  # after which a command hangs; the machine may be loaded
# What the scripts import. torch._dynamo is imported by the counter of FLOPs.
PRELOADED = ["torch", "torch._dynamo", "timm", "sentence_transformers", "matplotlib.pyplot", "jinja2", "scipy.stats"]
PRELOADED += ["PIL.Image", "tqdm", "hyma.records", "hyma.report", "hyma.tasks", "hyma.selectors", "hyma.training"]
PRELOADED += ["hyma.hypernetworks", "hyma.standard_sets", "hyma.scan", "hyma.runs", "faults"]
PRELOADED += ["torch.utils.flop_counter", "matplotlib.backends.backend_agg", "transformers.generation.utils"]


class Done(NamedTuple):
    """How a command ended."""

    code: int | None  # exit status, negative for a signal, None for a hang
    out: str
    err: str
    seconds: float

    @property
    def last(self):
        """The last line on stderr."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""


class Started(NamedTuple):
    """A command that runs."""

    process: multiprocessing.Process
    logs: Path  # .out and .err hold what it prints
    begin: float


class Runner:
    """Starts commands in folders and waits for them. Threads may share a Runner."""

    def __init__(self):
        # The server of Python 3.11 and 3.12 does not take over sys.path: without this our own modules are not preloaded.
        os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'benchmarks'}"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        # multiprocessing reads an exit status from a pipe, once; starting a process looks at all others, too. Of two
        # threads that read the same one at the same time, one would find nothing and take 255 for the status.
        self.polling = threading.Lock()

    def fork(self, target, arguments):
        """A process that runs target(*arguments)."""
        process = self.context.Process(target=target, args=arguments)
        with self.polling:
            process.start()
        return process

    def exit_status(self, process, seconds=0):
        """The exit status of a process that ends within so many seconds, otherwise None."""
        wait([process.sentinel], seconds)
        with self.polling:
            return process.exitcode

    def end(self, process):
        process.kill()
        wait([process.sentinel])

    def start(self, command, folder, hook=None):
        logs = Path(folder).with_name(Path(folder).name + ".log")
        for path in log_files(logs):
            path.unlink(missing_ok=True)
        process = self.fork(run_command, (list(command), str(folder), str(logs), hook))
        return Started(process, logs, time.monotonic())

    def finish(self, started, seconds=SECONDS):
        """Waits for a command, which is killed if it takes longer. Returns Done."""
        code = self.exit_status(started.process, seconds)
        if code is None:
            self.end(started.process)
        out, err = log_files(started.logs)
        if code is not None and code >= 0 and not err.exists():
            raise RuntimeError("a process has not even begun")
        return Done(code, read_log(out), read_log(err), time.monotonic() - started.begin)

    def run(self, command, folder, hook=None, seconds=SECONDS):
        return self.finish(self.start(command, folder, hook), seconds)

    def kill_after(self, command, folder, seconds, hook=None):
        """Starts a command and kills it after that many seconds, if it still runs."""
        started = self.start(command, folder, hook)
        if self.exit_status(started.process, seconds) is None:
            self.end(started.process)
        return self.finish(started)


def log_files(logs):
    """What a command prints on stdout and on stderr."""
    return Path(f"{logs}.out"), Path(f"{logs}.err")


def read_log(path):
    return path.read_text(errors="replace") if path.exists() else ""


def run_command(command, folder, logs, hook):
    """Runs a script as __main__ in this process, which is a fresh fork. hook: see `install_hook`."""
    import hyma.before_main  # not in the process that forks, whose signals it would change

    for number, path in enumerate(log_files(logs), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    signal.signal(signal.SIGINT, hyma.before_main.leave)  # a shell ignores it for what runs in the background
    script, *arguments = map(str, command)
    if hook and hook.get("real"):
        start_python(script, arguments)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the machine, which a kill would leave behind
    sys.argv = [str(ROOT / script), *arguments]
    sys.path[0] = str(ROOT)
    report = install_hook(hook or {})
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    finally:
        report()
        sys.stdout.flush()
        sys.stderr.flush()


def start_python(script, arguments):
    """Becomes a Python that runs a script, or a module of ours, in this process' place."""
    os.environ["OMP_NUM_THREADS"] = "1"
    what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    os.execv(sys.executable, [sys.executable, *what, *arguments])
