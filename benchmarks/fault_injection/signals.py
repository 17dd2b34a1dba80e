"""Signals at random moments: each has its exit status, and the command typed again ends with the undisturbed result."""

import contextlib
import os
import random
import signal
import time

from fault_injection.counts import Counts, try_cases
from fault_injection.kills import compare_and_remove, finish_command
from fault_injection.results import undisturbed

STATUSES = {"SIGTERM": 143, "SIGINT": 130, "SIGXCPU": 152, "SIGUSR1": 0}  # as a shell shows them


def signals(bench, stage, asked):
    """Sends each signal `asked` times at random moments after the script has begun."""
    expected = undisturbed(bench, stage)
    cases = {}
    for name in STATUSES:
        for k in range(asked):
            cases[str((name, k))] = (name, k)

    def check(case, events):
        return signal_case(bench, stage, expected, case, events)

    counts = Counts(len(cases))
    try_cases(cases, check, counts, bench.workers)
    counts.more = {"ended_by": dict(counts.events), "not_compared": expected.differs}
    return counts


def signal_case(bench, stage, expected, case, events):
    """Sends one signal to one command of a stage, then types it again. Returns a problem or None."""
    name, k = case
    draw = random.Random(f"{bench.seed} {stage.name} {case}")
    folder = bench.fresh_folder(f"{stage.name}-{name}-{k}")
    disturbed = draw.randrange(len(stage.commands))
    for number, command in enumerate(stage.commands):
        if number == disturbed:
            moment = draw.uniform(0, 1) * expected.seconds[number]
            done = send_signal(bench.runner, command, folder, name, moment)
            if problem := wrong_end(done, name):
                return f"{name}: {problem}"
            events.append(f"{name} {shell_status(done.code)}")
        if problem := finish_command(bench, command, folder):
            return f"{name}: {problem}"
    return compare_and_remove(expected, stage, folder)


def send_signal(runner, command, folder, name, moment):
    """Starts a command and sends it a signal so many seconds after its main has begun, unless it has ended."""
    begun = folder.with_name(folder.name + ".begun")
    begun.unlink(missing_ok=True)
    started = runner.start(command, folder, {"begun": begun})
    while not begun.exists() and runner.exit_status(started.process) is None:
        time.sleep(0.001)
    if runner.exit_status(started.process, moment) is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.kill(started.process.pid, getattr(signal, name))
    return runner.finish(started)


def wrong_end(done, name):
    """What is wrong with how a command ended after a signal, or None. It may have finished before it noticed."""
    if done.code is None:
        return "hangs"
    if shell_status(done.code) not in (0, STATUSES[name]):
        return f"exit status {shell_status(done.code)}, expected {STATUSES[name]}: {done.last[:200]}"
    if "Traceback" in done.err:
        return f"traceback: {done.last[:200]}"
    return None


def shell_status(code):
    """An exit status as a shell shows it: 128 and the signal's number, if one ended the process."""
    return code if code >= 0 else 128 - code
