"""Pictures to pixels in worker processes: each file is read, checked, hashed and decoded once, and transformed for all.

The batches come in the order of the shards, whatever the number of workers, with the same bits.
"""

import signal
import time
from collections import deque
from typing import NamedTuple

import torch

from hyma import remote
from hyma.pass_shards import Shard
from hyma.pictures import Picture, read_picture
from vlm import BadInput

PICTURES_AT_ONCE = 16  # that a worker hands over: what is read ahead is bounded by it
PICTURES_PER_WORKER = 256  # at least: to start a process takes as long as to decode 25 photos, or 180 of the sample's pictures


class Batch(NamedTuple):
    """Pictures of a shard that go through the encoders together."""

    shard: Shard
    start: int  # of the batch in the shard
    pictures: list[tuple[str, Picture]]  # what was found of each, under the name that the rows have for it
    decoded: list[str]  # digests of those that have pixels, in order
    pixels: dict[str, torch.Tensor]  # transform -> [B, 3, H, W] of those

    def usable(self):
        """The digests of the pictures that can be used, in order."""
        return [picture.sha256 for _, picture in self.pictures if not picture.reason]


class PictureReader(torch.utils.data.Dataset):
    """What a worker does with a few pictures.

    transforms: {name: function from a PIL picture to pixels [3, H, W]}. known: digests of pictures whose pixels nobody
    needs.
    """

    def __init__(self, root, transforms, known=frozenset()):
        self.root, self.transforms, self.known = root, transforms, known
        self.sources = frozenset(remote.ROOTS)  # for workers that begin with no memory of this process

    def __getitem__(self, images):
        """(what was found of each, digests of those with pixels, {transform: pixels}), or the message of a BadInput."""
        remote.ROOTS.update(self.sources)
        pictures = []
        decoded = []
        pixels = {name: [] for name in self.transforms}
        for image in images:
            try:
                picture, rgb = read_picture(self.root, image, self.known)
            except BadInput as error:  # a worker's exception would come with its traceback
                return str(error)
            pictures.append((image, picture))
            if rgb is not None:
                decoded.append(picture.sha256)
                for name, transform in self.transforms.items():
                    pixels[name].append(transform(rgb))
        return pictures, decoded, {name: torch.stack(each) for name, each in pixels.items() if each}


def read_batches(reader, shards, workers, pinned=False):
    """The Batches that the shards miss, one after the other.

    shards: claimed, best one by one as they are asked for. workers: processes that read ahead, 0 for none. pinned: puts
    pixels where a GPU fetches them while it works.
    """
    asked = deque()  # (shard, start, whether it is the batch's last part) of what is being read, in order

    def parts():
        for shard in shards:
            for start in list(shard.missing):
                images = shard.batch(start)
                for first in range(0, len(images), PICTURES_AT_ONCE):
                    asked.append((shard, start, first + PICTURES_AT_ONCE >= len(images)))
                    yield images[first : first + PICTURES_AT_ONCE]

    loader = torch.utils.data.DataLoader(
        reader,
        batch_size=None,
        sampler=parts(),
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),
    )
    read = []
    for part in alive(loader):
        if isinstance(part, str):
            raise BadInput(part)
        shard, start, is_last = asked.popleft()
        read.append(part)
        if is_last:
            yield whole_batch(shard, start, read, pinned)
            read = []


def alive(loader):
    """What a loader yields. Raises BadInput if one of its processes was killed."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise BadInput(
            "a process that reads pictures was killed, for want of memory perhaps; what was saved is kept: run the same command "
            "again with fewer --workers, or with --workers 0"
        ) from None


def seconds_of_decoding(reader, images):
    """The seconds that one of these pictures takes to be read and transformed, in one process."""
    began = time.monotonic()
    reader[images]
    return (time.monotonic() - began) / len(images)


def whole_batch(shard, start, parts, pinned):
    """The Batch of its parts."""
    pictures = []
    decoded = []
    pixels = {}
    for found, digests, tensors in parts:
        pictures += found
        decoded += digests
        for name, tensor in tensors.items():
            pixels.setdefault(name, []).append(tensor)
    for name, each in pixels.items():
        pixels[name] = torch.cat(each).pin_memory() if pinned else torch.cat(each)
    return Batch(shard, start, pictures, decoded, pixels)


def as_it_is(part):
    return part


def leave_signals(_):
    """A worker ends when its process says so: Ctrl-C and a scheduler's signals go to all of a group, and are that one's."""
    for number in (signal.SIGINT, signal.SIGXCPU, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def worth_starting(workers, pictures):
    """How many of the workers are worth starting for so many pictures."""
    return min(workers, pictures // PICTURES_PER_WORKER)
