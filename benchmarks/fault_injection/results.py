"""What a stage's result is, exactly: two results that differ in nothing but times have the same snapshot."""

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch

from vlm import load_tensors

VOLATILE = {"seconds", "started", "peak_bytes", "versions", "made", "commit"}  # what equal results may differ in


class Undisturbed(NamedTuple):
    """What commands make when nothing disturbs them."""

    snapshot: dict
    differs: list  # files that differ between two undisturbed runs, which nothing can be compared with
    seconds: list  # of each command
    writes: list  # of each command, how many


def undisturbed(bench, stage):
    """Runs a stage twice, the second time with its writes counted."""
    first = bench.fresh_folder(f"{stage.name}-undisturbed-0")
    second = bench.fresh_folder(f"{stage.name}-undisturbed-1")
    count = second.with_name(second.name + ".count")
    seconds, writes = [], []
    for command in stage.commands:
        seconds.append(run_well(bench, command, first).seconds)
        run_well(bench, command, second, {"count": count})
        writes.append(int(count.read_text()))
    one, other = snapshot(first / stage.result), snapshot(second / stage.result)
    return Undisturbed(one, different_files(one, other), seconds, writes)


def run_well(bench, command, folder, hook=None):
    done = bench.runner.run(command, folder, hook)
    if done.code != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.err}")
    return done


def different_files(one, other):
    """Names of the files that two snapshots have not in common."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def difference(expected, folder, without=None):
    """What of a result differs from the undisturbed one, or None. without: a file that is not compared."""
    found = snapshot(folder, without)
    left_out = {*expected.differs}
    if without:
        left_out.add(str(without.relative_to(folder)))
    for name in different_files(found, expected.snapshot):
        if name in left_out:
            continue
        if name not in found:
            return f"{name} is missing"
        return f"{name} differs" if name in expected.snapshot else f"{name} is too many"
    return None


def snapshot(folder, without=None):
    """{path in the folder: digest of what it says, without times}, without locks and the checkpoint before the last."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name in (".lock", "checkpoint.previous.pt") or is_left_over(path) or path == without:
            continue
        name = str(path.relative_to(folder))
        if path.is_file() and not path.is_symlink():
            found[name] = digest(path)
        elif not path.is_dir():
            found[name] = "link or no file"
    return found


def is_left_over(path):
    """Whether a file is of no use once a command has finished."""
    return path.suffix == ".tmp" or path.name == "checkpoint.next.pt"


def leftovers(folder):
    """Names a file of no use that nobody has removed, or None."""
    for path in folder.rglob("*"):
        if is_left_over(path) or (path.name == ".shards" and any(path.iterdir())):
            return f"the same bits, but left over: {path.relative_to(folder)}"
    return None


def digest(path):
    try:
        data = meaning(path)
    except ValueError:  # what a damage has left is no JSON
        data = path.read_bytes()
    return hashlib.sha256(data).hexdigest()


def meaning(path):
    """The bytes of a file, or of what it says without times."""
    if path.name == "checkpoint.pt":
        return repr(plain(load_tensors(path))).encode()
    if path.suffix == ".json":
        return json.dumps(plain(json.loads(path.read_text()))).encode()
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        return json.dumps([plain(json.loads(line)) for line in lines]).encode()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        for row in rows:
            for column in list(row):
                if "seconds" in str(column):
                    del row[column]
        return repr(rows).encode()
    if path.suffix == ".html":  # its tables show the selectors' seconds with one decimal
        return re.sub(rb"<td>\d+\.\d</td>", b"<td></td>", path.read_bytes())
    return path.read_bytes()


def plain(value):
    """A value without what is volatile; tensors as digests."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if torch.is_tensor(value):
        return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return value
