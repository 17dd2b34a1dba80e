"""A corpus in parts while it is embedded: who works on a part, what was found of its pictures, its vectors so far.

embeddings/<dataset>/.shards/plan.json                    what the parts are of; another plan starts over
                             .pictures/000001024.jsonl    what was found of each picture of a part, a line each
                             .captions/000001024.lock     held by the process that embeds the part
                             <encoder>/plan.json          what the encoder's vectors depend on
                             <encoder>/000001024.vectors  its vectors so far, one after the other without a header

Vectors and lines are appended after every batch, so that a kill costs one batch. What it has cut off is dropped.
"""

import bisect
import json
import os
import shutil

import torch

from hyma.files import make_folder, take_lock, write_json
from hyma.pictures import Picture
from vlm import read_json

CHECKED_AT_ONCE = 65536  # vectors


class VectorFormat:
    """How the vectors of an encoder lie in a file."""

    def __init__(self, dim, dtype):
        self.dim, self.dtype = dim, dtype
        self.row_bytes = dim * dtype.itemsize

    def read(self, path):
        """The vectors [n, dim] of a file that are whole and of unit length, up to the first that is not."""
        count = self.count(path)
        if count == 0:
            return torch.empty(0, self.dim, dtype=self.dtype)
        vectors = torch.from_file(str(path), size=count * self.dim, dtype=self.dtype).view(count, self.dim)
        for start in range(0, count, CHECKED_AT_ONCE):
            part = vectors[start : start + CHECKED_AT_ONCE].float()
            bad = (~((part.norm(dim=1) - 1).abs() < 1e-2)).nonzero()  # NaN too
            if len(bad):
                return vectors[: start + int(bad[0])]
        return vectors

    def count(self, path):
        """How many vectors a file has, as far as its size says so."""
        return path.stat().st_size // self.row_bytes if path.is_file() else 0

    def append(self, path, vectors, count):
        """Adds vectors [n, dim] to the first `count` of a file."""
        data = vectors.to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with open(path, "ab") as file:
            file.truncate(count * self.row_bytes)
            file.write(data)


class Shard:
    """A part of the corpus's pictures or captions, and what there is of it on disk."""

    def __init__(self, folder, kind, start, items, batch_size):
        self.folder, self.kind, self.start, self.items, self.batch_size = folder, kind, start, items, batch_size
        self.journal = folder / f".{kind}" / f"{start:09d}.jsonl"
        self.lock = None
        self.found = {}  # {image: Picture} of a part of pictures, as far as they were read
        self.missing = {}  # {start of a batch: names of the encoders that lack it}
        self.counts = {}  # {encoder: vectors that are on disk}

    def claim(self, formats, wait=False):
        """Takes the shard for this process: True if there is something to do in it, False if not, None if another
        process has it.

        formats: {encoder: VectorFormat}. wait: until the process that has it is done, or gone.
        """
        if not self.take(wait):
            return None
        if self.look(formats):
            return True
        self.release()
        return False

    def take(self, wait):
        """Locks the shard. Returns whether this process has it now."""
        path = self.folder / f".{self.kind}" / f"{self.start:09d}.lock"
        try:
            self.lock = open(path, "ab")  # noqa: SIM115
            take_lock(self.lock, wait)
        except FileNotFoundError:  # another process has sealed the folder
            return False
        except OSError:
            self.release()
            return False
        if path.is_file():
            return True
        self.release()  # sealed while this process waited
        return False

    def release(self):
        """Lets other processes have the shard."""
        self.lock.close()
        self.lock = None

    def forget(self):
        """Removes what was found of the pictures, and all vectors of them."""
        self.journal.unlink(missing_ok=True)
        for plan in self.folder.glob("*/plan.json"):
            if read_json(plan)["kind"] == "image":
                self.vector_file(plan.parent.name).unlink(missing_ok=True)

    def look(self, formats):
        """Reads what is on disk. Returns the batches that are missing: {start: names of encoders}."""
        self.formats = formats
        starts = range(0, len(self.items), self.batch_size)
        if self.kind == "pictures":
            self.found = read_journal(self.journal)
        ends = []  # how many vectors there are after each batch, as far as its pictures were read
        usable = 0
        for start in starts:
            batch = self.batch(start)
            if self.kind == "pictures" and not all(image in self.found for image in batch):
                break
            usable += len(batch) if self.kind == "captions" else self.count_usable(batch)
            ends.append(usable)
        self.missing = {}
        if len(ends) < len(starts):
            self.missing = {start: [] for start in starts[len(ends) :]}
        for name, vector_format in formats.items():
            count = len(vector_format.read(self.vector_file(name)))
            done = bisect.bisect_right(ends, count)
            self.counts[name] = ends[done - 1] if done else 0
            for start in starts[done:]:
                self.missing.setdefault(start, []).append(name)
        self.missing = dict(sorted(self.missing.items()))
        return self.missing

    def batch(self, start):
        """The items of a batch."""
        return self.items[start : start + self.batch_size]

    def count_usable(self, images):
        return sum(self.found[image].reason is None for image in images)

    def vector_file(self, name):
        return self.folder / name / f"{self.start:09d}.vectors"

    def add_vectors(self, name, vectors):
        """Appends an encoder's vectors [n, dim] of the next batch."""
        self.formats[name].append(self.vector_file(name), vectors, self.counts[name])
        self.counts[name] += len(vectors)

    def finish_batch(self, start, pictures=()):
        """Notes that a batch is done. pictures: [(image, Picture)] of a batch of pictures. The last one ends the claim."""
        lines = []
        for image, picture in pictures:
            if image not in self.found:
                lines.append(json.dumps([image, *picture]) + "\n")
                self.found[image] = picture
        if lines:
            append_lines(self.journal, lines)
        del self.missing[start]
        if not self.missing:
            for name in self.formats:
                flush(self.vector_file(name))
            self.release()

    def vectors(self, name, vector_format):
        """The vectors [n, dim] of an encoder, mapped from its file: of the usable pictures, or of all captions as sorted."""
        return vector_format.read(self.vector_file(name))


def append_lines(path, lines):
    """Adds lines to a journal. A line that a kill has cut off stays alone and is dropped when the journal is read."""
    with open(path, "ab+") as file:
        if file.tell() and not ends_with_newline(file):
            lines = ["\n", *lines]
        file.write("".join(lines).encode())


def ends_with_newline(file):
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def read_journal(path):
    """{image: Picture} of a journal: of the lines that are whole."""
    pictures = {}
    if not path.is_file():
        return pictures
    for line in path.read_text(errors="replace").split("\n"):
        try:
            image, *found = json.loads(line)
            picture = Picture(*found)
            if picture.reason or (picture.image and picture.sha256):
                pictures[image] = picture
        except (ValueError, TypeError, RecursionError):
            continue
    return pictures


def flush(path):
    """Brings a finished file to the disk, so that it survives a power cut, too."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


# -------------------------------------------------------------------------------------------------- the unfinished folder


def open_shard_folder(folder, plan):
    """Makes the folder of the shards: empty, unless it holds shards of the same plan. Returns whether it began anew."""
    make_folder(folder)
    plan_file = folder / "plan.json"
    if plan_file.is_file() and read_json(plan_file) == plan:
        return False
    began = any(folder.iterdir())
    shutil.rmtree(folder)
    make_folder(folder)
    write_json(plan_file, plan)
    return began


def make_shards(folder, kind, items, shard_rows, batch_size):
    """The Shards of a list of pictures or captions."""
    make_folder(folder / f".{kind}")
    shards = []
    for start in range(0, len(items), shard_rows):
        shards.append(Shard(folder, kind, start, items[start : start + shard_rows], batch_size))
    return shards


def remove_shards(folder, encoders):
    """Removes the shards of these encoders, and what all share once there is no other encoder's."""
    for encoder in encoders:
        shutil.rmtree(folder / encoder.name, ignore_errors=True)
    if not any(folder.glob("*/plan.json")):
        shutil.rmtree(folder, ignore_errors=True)
