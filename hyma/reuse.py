"""Vectors that another embedding folder holds already: `--reuse FOLDER` takes them instead of embedding again."""

import torch

from hyma.embeddings import Embeddings


class ReusedVectors:
    """The vectors of one encoder, found by the digest of a picture or by the words of a caption."""

    def __init__(self):
        self.sources = []  # (vectors [rows, dim], {digest or caption: row})

    def add(self, folder, data, name, kind):
        """Takes in the rows of an embedding folder."""
        column = "image_sha256" if kind == "image" else "caption"
        rows = {}
        for number, row in enumerate(data.rows):
            if column in row:
                rows.setdefault(row[column], number)
        self.sources.append((data.load(name), rows))

    def known(self):
        """All digests or captions that are known."""
        return set().union(*(rows for _, rows in self.sources))

    def find(self, key):
        """The vector [dim], None if it is not known."""
        for vectors, rows in self.sources:
            if key in rows:
                return vectors[rows[key]]
        return None


def open_reused(folders, encoders):
    """{encoder: ReusedVectors} of sealed embedding folders. An encoder that is another there is named and not reused."""
    reused = {encoder.name: ReusedVectors() for encoder in encoders}
    for folder in folders:
        data = Embeddings(folder)
        for encoder in encoders:
            if data.rows is None or encoder.name not in data.encoders:
                continue
            here, there = identity(encoder.plan), identity(data.record(encoder.name))
            other = [part for part in here if here[part] != there[part]]
            if other:
                print(f"{folder}: its {encoder.name} is not reused: another {' and '.join(other)}")
            else:
                reused[encoder.name].add(folder, data, encoder.name, encoder.kind)
    return reused


def network_of(record):
    """{what makes an encoder the one it is: its value}, by a manifest's record or by a plan."""
    found = {part: record.get(part) for part in ("kind", "weights_sha256", "dim", "transform")}
    if record["kind"] == "image":  # timm has models of equal tensors that compute otherwise: CLIP's, with two kinds of GELU
        found["architecture"] = record.get("full_name", "").partition(".")[0]  # without the tag, which names weights
    return found


def identity(record):
    """The same, and what else must be the same for its vectors to be the same."""
    numbers = {"precision": record.get("precision", "float32")}
    return network_of(record) | numbers | {part: record.get(part) for part in ("dtype", "compiled")}


def known_to_all(reused, encoders):
    """The digests of the pictures whose vectors all of these encoders have already."""
    sets = [reused[encoder.name].known() for encoder in encoders]
    return set.intersection(*sets) if sets else set()


def fill_in(reused, keys, encode):
    """Vectors [n, dim], one for each key: those that are known, and encode(numbers of the others) for the rest."""
    found = [reused.find(key) for key in keys]
    unknown = [number for number, vector in enumerate(found) if vector is None]
    if len(unknown) == len(keys):
        return encode(unknown)
    if unknown:
        for number, vector in zip(unknown, encode(unknown)):
            found[number] = vector
    dtype = next(vectors.dtype for vectors, _ in reused.sources)
    return torch.stack([vector.to(dtype) for vector in found])
