"""The embedding folder as it is made: an unfinished manifest, the shards of each encoder, and the seal.

embeddings/<dataset>/manifest.partial.json    written after the scan; gets a record for each encoder that is finished
                     .shards/<encoder>/       its shards, <first row>.pt, until they are joined to <encoder>.pt
                     manifest.json            manifest.partial.json, renamed last: the seal

So a folder with a manifest.json alone is always complete. To add encoders to a sealed folder, a new manifest.partial.json
starts from the old manifest.json. Who writes holds the folder's lock.
"""

import os
import shutil
import time

import torch

from hyma.embeddings import has_unit_rows
from hyma.files import CHECKPOINT_SECONDS, lock_folder, make_folder, save_tensors, sha256_file, write_json
from vlm import BadInput, load_tensors, read_json

# ------------------------------------------------------------------------------------------------------ the manifest


def read_manifest(folder):
    """The unfinished manifest, else the one that seals the folder, else None."""
    for name in ("manifest.partial.json", "manifest.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return None


def write_manifest(folder, manifest):
    """Writes the unfinished manifest."""
    write_json(folder / "manifest.partial.json", manifest)


def add_to_manifest(folder, name, record):
    """Adds the record of a finished encoder to the unfinished manifest."""
    manifest = read_manifest(folder)
    manifest["encoders"][name] = record
    write_manifest(folder, manifest)


def seal_folder(folder):
    """Makes the unfinished manifest the folder's manifest. There is none if another process has sealed the folder."""
    if (folder / "manifest.partial.json").is_file():
        os.replace(folder / "manifest.partial.json", folder / "manifest.json")


# -------------------------------------------------------------------------------------------------------- the shards


def open_shards(folder, plan):
    """Makes the folder of an encoder's shards: empty, unless it holds shards that were made by the same plan."""
    plan_file = folder / "plan.json"
    make_folder(folder.parent)
    if folder.is_dir() and not (plan_file.is_file() and read_json(plan_file) == plan):
        print(f"{folder.name}: an earlier run made shards with other weights or flags; starting over")
        shutil.rmtree(folder)
    if not folder.is_dir():
        make_folder(folder)
        write_json(plan_file, plan)


def shard_path(folder, start):
    """The file of the shard whose first row is `start`."""
    return folder / f"{start:09d}.pt"


class PartialShard:
    """The batches of a shard so far, saved by the clock and when a signal asks for it: a shard can take minutes."""

    def __init__(self, path, signals):
        self.path, self.signals = path.with_suffix(".partial.pt"), signals
        self.saved = time.monotonic()

    def load(self):
        """The vectors [pictures, dim] of the first pictures, [] where there are none."""
        try:
            return [load_tensors(self.path)] if self.path.is_file() else []
        except BadInput:  # damaged: they are made again
            return []

    def save_when_due(self, vectors):
        if self.signals.arrived() or time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
            save_tensors(torch.cat(vectors), self.path)
            self.saved = time.monotonic()
            self.signals.leave_if_asked()

    def remove(self):
        self.path.unlink(missing_ok=True)


def is_sound_shard(path, shape, dtype):
    """Whether a shard can be read and holds unit vectors of that shape; what cannot be used is made again."""
    try:
        vectors = load_tensors(path) if path.is_file() else None
    except BadInput:
        return False
    return torch.is_tensor(vectors) and vectors.dtype == dtype and has_unit_rows(vectors, shape)


def sound_record(out, name):
    """The manifest's record of an encoder that is done, None if it has none or if its file is not what was recorded."""
    with lock_folder(out, wait=True):
        manifest = read_manifest(out)
        record = manifest["encoders"].get(name)  # by now another process may have made it
        if record is None:
            return None
        path = out / f"{name}.pt"
        if path.is_file() and sha256_file(path) == record["file_sha256"]:
            return record
        print(f"{path}: is missing or is not what was embedded (sha256); embedding it again")
        manifest["encoders"][name] = None  # its place among the others is kept
        write_manifest(out, manifest)
        return None
