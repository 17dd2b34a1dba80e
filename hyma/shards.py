"""--shard I/N of train_grid.py: every N-th pair from the I-th on, in a run folder of its own, and what merges them."""

import re
from typing import NamedTuple

from hyma.runs import Checkpoints
from vlm import BadInput, read_json

NOT_COMPARED = {"shard": None, "out": None, "device": None}  # flags in which shards of one run may differ


def shard_of(flags):
    """(i, n) of --shard i/n; (0, 1) without."""
    parts = re.fullmatch(r"(\d+)/(\d+)", flags.shard or "0/1")
    if not parts or not int(parts[1]) < int(parts[2]):
        raise BadInput(f"--shard {flags.shard}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(parts[1]), int(parts[2])


def shard_suffix(flags):
    """What the name of the shard's run folder ends in; "" without --shard."""
    if not flags.shard:
        return ""
    index, count = shard_of(flags)
    return f"-shard-{index}-of-{count}"


def shard_folders(out, count):
    """The run folders of all n shards of the run in `out`."""
    return [out.with_name(f"{out.name}-shard-{index}-of-{count}") for index in range(count)]


class Shards(NamedTuple):
    """What the finished shards of a run have in their folders."""

    states: list  # see `grid_state.merge_states`
    embeddings: dict  # encoder -> sha256 of its file


def read_shards(folders, out, steps):
    """The Shards in these run folders. Raises BadInput if they were not started with the same flags, for as many steps."""
    shards = Shards([], {})
    first_flags = read_json(folders[0] / "config.json")["flags"] | NOT_COMPARED
    for folder in folders:
        config = read_json(folder / "config.json")
        if config["flags"] | NOT_COMPARED != first_flags or config["steps"] != steps:
            raise BadInput(f"{folder}: was started with other flags than {folders[0]}; not merged into {out}")
        shards.embeddings.update(config["embeddings"])
    for folder in folders:
        shards.states.extend(Checkpoints(folder).load("done")["done"])
    return shards
