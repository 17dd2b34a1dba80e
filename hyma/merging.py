"""Several embedding folders of equal rows, opened as one: published embeddings come in four, by width and by modality."""

import argparse
import sys
from pathlib import Path

from hyma.embeddings import Embeddings
from vlm import BadInput


class Folders(argparse.Action):
    """A flag that takes one folder, as a Path, or several, as a tuple of them."""

    def __call__(self, parser, flags, values, option=None):
        setattr(flags, self.dest, values[0] if len(values) == 1 else tuple(values))


def as_folders(data):
    """The folders of what `Folders` makes, or of what config.json has of it: a path, or several."""
    if isinstance(data, str | Path):
        return [Path(data)]
    return [Path(folder) for folder in data]


def open_embeddings(data) -> Embeddings:
    """The Embeddings of one folder, or of several as one. Raises BadInput if their rows differ."""
    folders = as_folders(data)
    return Embeddings(folders[0]) if len(folders) == 1 else MergedEmbeddings(folders)


class MergedEmbeddings(Embeddings):
    """Embedding folders as one: each encoder is in one of them. Rows and manifest are those of the first that has them.

    `folder` is that one too. `folders` are all.
    """

    def __init__(self, folders):
        self.folders = [Path(folder) for folder in folders]
        parts = [Embeddings(folder) for folder in self.folders]
        first = next((part for part in parts if part.rows), parts[0])
        self.folder, self.rows, self.dataset, self.row_count = first.folder, first.rows, first.dataset, first.row_count
        self.manifest = first.manifest
        self.parts = parts
        self.part_of = {}  # encoder -> the folder that it is in
        self.encoders = {}
        for part in parts:
            check_equal_rows(first, part)
            for name, encoder in part.encoders.items():
                if name in self.part_of:
                    raise BadInput(f"--data: {self.part_of[name].folder} and {part.folder} both hold {name}; leave one out")
                self.part_of[name] = part
                self.encoders[name] = encoder
        images, texts = self.names("image"), self.names("text")
        print(
            f"{len(parts)} folders merged: {self.row_count} rows, {len(images)} image and {len(texts)} text encoders",
            file=sys.stderr,
        )

    def load(self, name):
        return self.part_of[name].load(name)

    def fingerprint(self, names):
        digests = {}
        for name in names:
            digests |= self.part_of[name].fingerprint([name])
        return digests

    def record(self, name):
        return self.part_of[name].record(name)

    def manifests(self):
        return [part.manifest for part in self.parts if part.manifest]

    def folder_of(self, name):
        return self.part_of[name].folder if name in self.part_of else self.folder


def check_equal_rows(one, other):
    """Raises BadInput if two folders hold other rows, naming the first that differs where both know their rows."""
    if one.row_count != other.row_count:
        raise BadInput(
            f"--data: {one.folder} has {one.row_count:,} rows and {other.folder} has {other.row_count:,}; folders are merged "
            "only if they hold the same rows"
        )
    if one.rows is None or other.rows is None:
        if other is not one and other.manifest:  # without a manifest Embeddings has printed it
            print(f"{other.folder}: has no rows.jsonl; the order of its rows cannot be checked", file=sys.stderr)
        return
    for number, (row, another) in enumerate(zip(one.rows, other.rows), start=1):
        for part in ("key", "caption", "split", "image_sha256"):
            if row.get(part) != another.get(part):
                raise BadInput(
                    f"--data: {one.folder} and {other.folder} differ in the {part} of row {number}: {row.get(part)!r} and "
                    f"{another.get(part)!r}; folders are merged only if they hold the same rows"
                )
