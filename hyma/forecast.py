"""What a pass will take: pictures, encoders, minutes and bytes, from a short measurement before it begins."""

import os
import sys

import torch

from hyma.decoding import PictureReader, seconds_of_decoding
from hyma.embedding_work import process_count
from hyma.scan import counted
from hyma.working_encoders import seconds_of, transforms_of

MEASURED = 8  # pictures and captions that are measured, on a CPU
WORTH_MEASURING = 50  # fewer are done before a forecast is of use


def announce(work, parts, encoders, flags):
    """Prints how much there is to do and about how long it takes here, by a small measurement."""
    if int(os.environ.get("RANK", 0)) > 0:  # the first of torchrun's processes does
        return
    images = [image for shard in parts.pictures for image in shard.items]
    captions = [caption for shard in parts.captions for caption in shard.items]
    seconds = 0.0
    size = 0
    for encoder in encoders:
        shards, items = (parts.pictures, images) if encoder.kind == "image" else (parts.captions, captions)
        left = len(items) - sum(encoder.format.count(shard.vector_file(encoder.name)) for shard in shards)
        size += encoder.format.row_bytes * len(work.corpus.rows)
        if left >= WORTH_MEASURING:
            seconds += left * measure(encoder, captions, parts.plan["batch_size"], left)
            encoder.seconds = 0.0
    line = f"{counted(len(images), 'picture')}, {counted(len(encoders), 'encoder')}"
    if seconds:
        reader = PictureReader(work.corpus.root, transforms_of(encoders))
        seconds += len(images) * seconds_of_decoding(reader, images[:MEASURED]) / max(1, flags.workers)
        line += f", about {in_words(seconds / process_count(flags))} on this machine"
    print(f"{line}, {size_in_words(size)}", file=sys.stderr)


def measure(encoder, captions, batch_size, left):
    """The seconds that one picture, or one caption of these, takes in an encoder, from a few of those that are left."""
    count = few_of(left) if encoder.model.device.type == "cpu" else batch_size
    if encoder.kind == "image":
        return seconds_of(encoder.encode, torch.zeros(count, *encoder.model.config["input_size"])) / count
    spaced = captions[:: max(1, len(captions) // count)][:count]
    return seconds_of(encoder.encode, spaced) / len(spaced)


def few_of(left):
    """How many are measured: with the preparing pass, a twenty-fifth of what is left at most."""
    return min(MEASURED, left // WORTH_MEASURING)


def in_words(seconds):
    """A duration: "9 s", "9 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def size_in_words(size):
    """A size in bytes: "24 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{max(1, round(size / 1e3))} kB"
