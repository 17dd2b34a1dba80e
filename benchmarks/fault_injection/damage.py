"""Damages each file of a folder in each way: what reads it names it in one line, or its result is as undisturbed."""

import hashlib
import os
import random
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fault_injection.counts import Counts, try_cases
from fault_injection.results import Undisturbed, difference, different_files, run_well, snapshot
from fault_injection.stages import SHORT

# ------------------------------------------------------------------------------------------------ ways to damage a file


def cut_to(share):
    def damage(path, elsewhere):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def flip_bit(path, elsewhere):
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def replace_by(data):
    def damage(path, elsewhere):
        path.write_bytes(data)

    return damage


def remove(path, elsewhere):
    path.unlink()


def become_folder(path, elsewhere):
    path.unlink()
    path.mkdir()


def become_pipe(path, elsewhere):
    path.unlink()
    os.mkfifo(path)


def become_link(path, elsewhere):
    """The file itself lies outside, and a link is in its place."""
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def become_dangling_link(path, elsewhere):
    path.unlink()
    path.symlink_to(elsewhere / "nothing")


# {name: damage(path, a folder outside)}
DAMAGES = {
    "cut to 0 %": cut_to(0),
    "cut to 30 %": cut_to(0.3),
    "cut to 90 %": cut_to(0.9),
    "cut to 99.9 %": cut_to(0.999),
    "a byte flipped": flip_bit,
    "garbage": replace_by(bytes(range(256)) * 8),
    "a JSON list": replace_by(b"[1, 2]\n"),
    "an empty JSON object": replace_by(b"{}\n"),
    "nested JSON": replace_by(b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n"),
    "a folder": become_folder,
    "a pipe": become_pipe,
    "a link to elsewhere": become_link,
    "a dangling link": become_dangling_link,
    "missing": remove,
}


# ------------------------------------------------------------------------------------ what is damaged, and who reads it


class Reader(NamedTuple):
    """A command that reads what is damaged, and the folder of its result."""

    name: str
    command: list
    result: str


class Target(NamedTuple):
    """A folder to damage, the files of it, and who reads it."""

    original: Callable  # gives the undamaged folder
    name: str  # of its copy in a case
    files: list[str]
    readers: list[Reader]


class Case(NamedTuple):
    """One file damaged in one way, and one command that reads it."""

    file: str
    kind: str
    reader: Reader


def targets(bench):
    """{part: Target}."""
    stages = bench.stages
    cpu = ("--device", "cpu")
    report = ("--bootstrap", 20, "--out", "new", *cpu)
    train = ["train_hyma.py", "--data", "data", *SHORT, "--rank", 8, "--out", "new"]
    refine = ["train_grid.py", "--from", "r", *SHORT, "--epochs", 1, "--out", "new"]
    budget = ["train_grid.py", "--budget-of", "r", "--data", bench.inputs / "embeddings", *SHORT, "--out", "new"]
    score_data = ["evaluate.py", bench.inputs / "runs" / "hyma", "--data", "data", *report]
    return {
        "damage-run": Target(
            lambda: stage_result(bench, "hyma"),
            "r",
            [
                "config.json",
                "metrics.jsonl",
                "checkpoint.pt",
                "ranking.csv",
                "ledger.json",
                "connectors/i1_mlp0_t1.pt",
                "connectors/i1_mlp0_t1.json",
            ],
            [
                Reader("typed again", stages["hyma"].commands[0], "r"),
                Reader("--from", refine, "new"),
                Reader("--budget-of", budget, "new"),
                Reader("evaluate", ["evaluate.py", "r", *report], "new"),
            ],
        ),
        "damage-embeddings": Target(
            lambda: bench.inputs / "embeddings",
            "data",
            ["manifest.json", "rows.jsonl", "i1.pt", "t2.pt"],
            [Reader("train", train, "new"), Reader("evaluate", score_data, "new")],
        ),
        "damage-embedded": Target(
            lambda: stage_result(bench, "embed"),
            "e",
            ["manifest.json", "rows.jsonl", "quarantine.jsonl", "tiny.pt", "words.pt"],
            [Reader("typed again", stages["embed"].commands[0], "e")],
        ),
        "damage-report": Target(
            lambda: stage_result(bench, "evaluate"),
            "report",
            ["results.json", "ranking.csv", "selectors.csv", "loss.csv", "report.html"],
            [
                Reader("redrawn", ["hyma.report", "report"], "report"),
                Reader("evaluate", stages["evaluate"].commands[0], "report"),
            ],
        ),
    }


def stage_result(bench, name):
    """The result of an undisturbed stage, made once."""
    stage = bench.stages[name]
    folder = bench.work / "made" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        for command in stage.commands:
            run_well(bench, command, folder)
    return folder / stage.result


# ------------------------------------------------------------------------------------------------------------ the cases


def damage(bench, part, limit=None):
    """Damages each file in each way, and runs every command that reads it. limit: only so many cases, drawn."""
    target = targets(bench)[part]
    expected = {reader.name: undamaged(bench, part, target, reader) for reader in target.readers}
    cases = []
    for file in target.files:
        for kind in DAMAGES:
            cases += [Case(file, kind, reader) for reader in target.readers]
    if limit is not None:
        cases = random.Random(bench.seed).sample(cases, min(limit, len(cases)))
    named = {f"{target.name}/{case.file}, {case.kind}, {case.reader.name}": case for case in cases}

    def check(case, events):
        return damage_case(bench, part, target, expected[case.reader.name], case, events)

    counts = Counts(len(cases))
    try_cases(named, check, counts, bench.workers)
    not_compared = {name: found.differs for name, found in expected.items()}
    counts.more = {"not_compared": not_compared, "ended": dict(counts.events)}
    return counts


def undamaged(bench, part, target, reader):
    """What a reader makes of the undamaged folder, twice."""
    snapshots = []
    for turn in range(2):
        folder = bench.fresh_folder(f"{part}-{reader.name}-{turn}/work")
        shutil.copytree(target.original(), folder / target.name)
        run_well(bench, reader.command, folder)
        snapshots.append(snapshot(folder / reader.result))
    return Undisturbed(snapshots[0], different_files(*snapshots), [], [])


def damage_case(bench, part, target, expected, case, events):
    """Damages one file and runs one command. Returns a problem or None."""
    file, kind, reader = case
    slug = hashlib.sha256(f"{file} {kind} {reader.name}".encode()).hexdigest()[:12]
    top = bench.fresh_folder(f"{part}-{slug}")
    folder, elsewhere = top / "work", top / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(target.original(), folder / target.name)
    path = folder / target.name / file
    DAMAGES[kind](path, elsewhere)

    outside, damaged = everything(elsewhere), contents(path)
    done = bench.runner.run(reader.command, folder)
    if everything(elsewhere) != outside:
        return "a file outside was changed"
    result = folder / reader.result
    # A damaged file that the command neither needs nor writes stays as it is; all others must be as undisturbed.
    untouched = path if contents(path) == damaged and result in path.parents else None
    problem = damage_problem(done, f"{target.name}/{file}", expected, result, untouched)
    if problem is None:
        events.append("one line" if done.code else "undisturbed result")
        shutil.rmtree(top)
    return problem


def everything(folder):
    """{path: bytes} of all that lies in a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def contents(path):
    """What is at a path: its type and bytes."""
    if path.is_symlink():
        return "link", os.readlink(path)
    if not path.exists():
        return "nothing", None
    mode = path.stat().st_mode
    return stat.S_IFMT(mode), path.read_bytes() if stat.S_ISREG(mode) else None


def damage_problem(done, file, expected, result, untouched):
    """What is wrong with how a command ended on a damaged file, or None."""
    if done.code is None:
        return "hangs"
    if "Traceback" in done.err:
        return f"traceback: {done.last[:200]}"
    if done.code == 0:
        found = difference(expected, result, untouched)
        return f"exit status 0, but {found}" if found else None
    script, _, message = done.last.partition(": ")
    if not message:
        return f"exit status {done.code}, no line: {done.last[:200]}"
    name, stem, folder = Path(file).name, Path(file).stem, Path(file).parts[0]
    if name not in message and not re.search(rf"\b({re.escape(stem)}\b|{folder}[/:])", message):
        return f"names no file: {done.last[:200]}"
    return None
