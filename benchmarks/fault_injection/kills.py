"""SIGKILL at every write of a stage and at random moments: typed again, the stage ends with the undisturbed result.

Most commands are forks of a server, so that a kill costs little; a few are processes of their own, killed at any moment
from their first import on.
"""

import random
import shutil
import signal

from fault_injection.counts import Counts, try_cases
from fault_injection.results import difference, leftovers, run_well, undisturbed


def kills(bench, stage, asked, writes=None, real=0):
    """Kills a stage at every write (or at so many of them) and, `asked` times, at random moments.

    real: of processes of their own, so many more.
    """
    expected = undisturbed(bench, stage)
    moments = []
    for place, count in enumerate(expected.writes):
        moments += [("write", place, k) for k in range(1, count + 1)]
    if writes is not None:
        moments = random.Random(bench.seed).sample(moments, min(writes, len(moments)))
    moments += [("random", k, 0) for k in range(asked)]
    moments += [("real", k, 0) for k in range(real)]
    real_seconds = time_real_process(bench, stage) if real else None

    def check(case, events):
        return kill_case(bench, stage, expected, case, events, real_seconds)

    counts = Counts(asked)
    try_cases({str(case): case for case in moments}, check, counts, bench.workers)
    counts.more = {"writes": sum(expected.writes), "not_compared": expected.differs, "kills": counts.events["kill"]}
    return counts


def time_real_process(bench, stage):
    """Seconds of a stage's first command in a process of its own, imports included."""
    folder = bench.fresh_folder(f"{stage.name}-real")
    return run_well(bench, stage.commands[0], folder, {"real": True}).seconds


def kill_case(bench, stage, expected, case, events, real_seconds=None):
    """Kills one command of a stage, then types it again until it has finished. Returns a problem or None.

    real_seconds: how long a command takes in a process of its own.
    """
    kind, place, k = case
    draw = random.Random(f"{bench.seed} {stage.name} {case}")
    folder = bench.fresh_folder(f"{stage.name}-{kind}-{place}-{k}")
    disturbed = place if kind == "write" else draw.randrange(len(stage.commands))
    hook = {"often": True} if draw.random() < 0.5 else {}
    for number, command in enumerate(stage.commands):
        ended = []
        if number == disturbed and kind == "write":
            ended.append(bench.runner.run(command, folder, {"kill_at": k}))
        elif number == disturbed and kind == "real":
            moment = draw.uniform(0, 1.05) * real_seconds
            ended.append(bench.runner.kill_after(command, folder, moment, {"real": True}))
        elif number == disturbed:
            for _ in range(draw.choice((1, 1, 2, 3))):  # the command that resumes is killed, too
                moment = draw.uniform(0, 1.05) * expected.seconds[number]
                ended.append(bench.runner.kill_after(command, folder, moment, hook))
        for done in ended:
            if done.code == -signal.SIGKILL:
                events.append("kill")
            elif done.code != 0:
                return f"after a kill: {done.last}"
        if problem := finish_command(bench, command, folder):
            return problem
    return compare_and_remove(expected, stage, folder)


def finish_command(bench, command, folder):
    """Types a command again, which must finish. Returns a problem or None."""
    done = bench.runner.run(command, folder)
    if done.code is None:
        return f"{command[0]} typed again hangs"
    if done.code != 0 or "Traceback" in done.err:
        return f"{command[0]} typed again ends with {done.code}: {done.last[:300]}"
    return None


def compare_and_remove(expected, stage, folder):
    """Compares a result with the undisturbed one, and keeps it only if it differs. Returns a problem or None."""
    problem = difference(expected, folder / stage.result) or leftovers(folder)
    if problem is None:
        shutil.rmtree(folder)
    return problem
