"""A corpus in parts while it is embedded: who works on a part, what was found of its pictures, its vectors so far.

embeddings/<dataset>/.shards/plan.json                    what the parts are of; another plan starts over
                             .pictures/000001024.jsonl    what was found of each picture of a part, a line each
                             .captions/000001024.lock     held by the process that embeds the part
                             <encoder>/plan.json          what the encoder's vectors depend on
                             <encoder>/000001024.vectors  its vectors so far, a batch after the other

Vectors and lines are appended after every batch, so that a kill costs one batch. What it has cut off is dropped. So is what
was made of other rows or by another plan, as a process that was started with other flags may still write.
"""

import json
import os
import shutil
import struct
import zlib

import numpy as np
import torch

from hyma.files import make_folder, take_lock, write_json
from hyma.pictures import Picture
from vlm import BadInput, read_json

HEAD = struct.Struct("<II")  # before each batch of vectors: how many they are, and a checksum


class VectorFormat:
    """How the vectors of an encoder lie in a file. plan: all that they depend on."""

    def __init__(self, dim, dtype, plan):
        self.dim, self.dtype = dim, dtype
        self.row_bytes = dim * dtype.itemsize
        self.plan = json.dumps(plan, sort_keys=True)

    def read(self, path):
        """The batches of vectors, [n, dim] each, that are whole in a file, up to the first that is not."""
        data = path.read_bytes() if path.is_file() else b""
        batches = []
        position = 0
        while len(data) >= position + HEAD.size:
            count, checksum = HEAD.unpack_from(data, position)
            vectors = data[position + HEAD.size : position + self.size_of(count)]
            if len(data) < position + self.size_of(count) or self.checksum(path, position, vectors) != checksum:
                break
            position += self.size_of(count)
            values = torch.from_numpy(np.frombuffer(bytearray(vectors), np.uint8)).view(self.dtype)
            batches.append(values.view(count, self.dim))
        return batches

    def append(self, path, vectors, position):
        """Writes a batch of vectors [n, dim] at a position of a file, and drops what there was behind it. Returns its end."""
        data = vectors.to(self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with open(path, "ab") as file:
            file.truncate(position)
            file.write(HEAD.pack(len(vectors), self.checksum(path, position, data)) + data)
        return position + self.size_of(len(vectors))

    def checksum(self, path, position, data):
        """The CRC-32 of a batch's bytes, of its place and of the plan."""
        return zlib.crc32(data, zlib.crc32(f"{path.name} {position} {self.plan}".encode()))

    def size_of(self, count):
        """The bytes of a batch in a file."""
        return HEAD.size + count * self.row_bytes

    def count(self, path):
        """How many vectors a file has, about, by its size."""
        return path.stat().st_size // self.row_bytes if path.is_file() else 0


class Shard:
    """A part of the corpus's pictures or captions, and what there is of it on disk."""

    def __init__(self, folder, kind, start, items, batch_size):
        self.folder, self.kind, self.start, self.items, self.batch_size = folder, kind, start, items, batch_size
        self.journal = folder / f".{kind}" / f"{start:09d}.jsonl"
        self.lock = None
        self.found = {}  # {image: Picture} of a part of pictures, as far as they were read
        self.missing = {}  # {start of a batch: names of the encoders that lack it}
        self.ends = {}  # {encoder: bytes of its file that are kept}

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
        counts = []  # how many vectors each batch has, as far as its pictures were read
        for start in starts:
            batch = self.batch(start)
            if self.kind == "pictures" and not all(image in self.found for image in batch):
                break
            counts.append(len(batch) if self.kind == "captions" else self.count_usable(batch))
        self.missing = {start: [] for start in starts[len(counts) :]}
        for name, vector_format in formats.items():
            done = 0
            self.ends[name] = 0
            for vectors, count in zip(vector_format.read(self.vector_file(name)), counts):
                if len(vectors) != count:
                    break
                done += 1
                self.ends[name] += vector_format.size_of(count)
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
        self.ends[name] = self.formats[name].append(self.vector_file(name), vectors, self.ends[name])

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
        """The vectors [n, dim] of an encoder: of the usable pictures, or of all captions."""
        return torch.cat(vector_format.read(self.vector_file(name)))


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
    """Makes the folder of all shards, or of an encoder's: empty, unless it holds shards of the same plan. Returns whether it
    began anew. Raises BadInput if another process is at work by another plan."""
    make_folder(folder)
    plan_file = folder / "plan.json"
    if plan_file.is_file() and read_json(plan_file) == plan:
        return False
    began = any(folder.iterdir())
    if began and has_claims(folder if folder.name == ".shards" else folder.parent):
        raise BadInput(
            f"{folder}: another process embeds there by another plan: other data, weights or flags, or another version of torch, "
            "timm or sentence-transformers; give all the same, or choose another --out"
        )
    shutil.rmtree(folder)
    make_folder(folder)
    write_json(plan_file, plan)
    return began


def holds_vectors(folder):
    """Whether an earlier run has left anything that took time: more than the head of a batch of which no picture could
    be used."""
    return any(path.stat().st_size > HEAD.size for path in folder.glob("*/*.vectors"))


def has_claims(folder):
    """Whether a process is at work on one of the shards."""
    for path in folder.glob(".*/*.lock"):
        with open(path, "rb") as file:
            try:
                take_lock(file, wait=False)
            except OSError:
                return True
    return False


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
