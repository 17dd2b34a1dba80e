"""Embeddings compared with their encoders: a few rows drawn at random, embedded again. `embed.py --verify FOLDER`."""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vlm
from hyma.embeddings import Embeddings
from hyma.files import sha256_file
from hyma.packed import open_picture, picture_bytes
from hyma.seeds import seeded_generator
from hyma.weights import open_recorded, recorded_encoder, why_not_opened
from vlm import BadInput

ROWS = 16  # embedded again, of each encoder
LEAST_COSINE = 0.99  # of the same row: other libraries' transforms stay above, another picture below
ROWS_AT_ONCE = 65536  # searched for a vector that is not where it should be


class Reembedded(NamedTuple):
    """Stored vectors beside those that the encoder gives now."""

    rows: list[int]  # their numbers
    cosines: list[float]
    elsewhere: list[int | None]  # of a row that differs: where its vector stands instead, None if nowhere

    def agrees(self):
        return min(self.cosines) >= LEAST_COSINE

    def __str__(self):
        mean = sum(self.cosines) / len(self.cosines)
        text = f"{len(self.rows)} rows embedded again: cosine {min(self.cosines):.4f} at least, {mean:.4f} in the mean"
        for row, cosine, found in zip(self.rows, self.cosines, self.elsewhere):
            if cosine < LEAST_COSINE:
                place = "nowhere in the file" if found is None else f"in row {found:,}"
                return f"{text}; row {row:,} differs: its vector is {place}"
        return text


def reembed(encoder, rows, usable, root, stored) -> Reembedded:
    """Embeds some rows again.

    encoder: an ImageEncoder or TextEncoder. rows: those of the folder. usable: the numbers of those that have a picture and
    a caption. root: where the pictures are. stored: a function from the first and the last row to their vectors [n, dim].
    Raises BadInput if a picture is not what it was.
    """
    order = torch.randperm(len(usable), generator=seeded_generator("rows to verify", 0))
    drawn = sorted(usable[i] for i in order[:ROWS].tolist())
    if isinstance(encoder, vlm.ImageEncoder):
        pixels = []
        for number in drawn:
            pixels.append(encoder.transform(open_row_picture(root, rows[number])))
        vectors = encoder.encode_image(torch.stack(pixels))
    else:
        vectors = encoder.encode_text([rows[number]["caption"] for number in drawn])
    vectors = F.normalize(vectors.float().cpu(), dim=1)  # [count, dim]
    own = torch.cat([stored(number, number + 1) for number in drawn]).float()
    cosines = (F.normalize(own, dim=1) * vectors).sum(1)  # [count]
    elsewhere = [None] * len(drawn)
    if cosines.min() < LEAST_COSINE:
        elsewhere = find_vectors_elsewhere(vectors, len(rows), stored)
    return Reembedded(drawn, cosines.tolist(), elsewhere)


def open_row_picture(root, row):
    """The PIL image of a row. Raises BadInput if it is missing or, where the row knows its digest, another."""
    path = root / row["image"]
    try:
        digest = hashlib.sha256(picture_bytes(path)).hexdigest()
        if row.get("image_sha256") in (None, digest):
            return open_picture(path)
    except Exception as error:  # Pillow raises errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: cannot be read: {reason[:160]}") from None
    raise BadInput(f"{path}: is not the picture that was embedded (sha256)")


def find_vectors_elsewhere(vectors, row_count, stored):
    """The row whose stored vector is nearest to each of the vectors [n, dim], None where none is near."""
    best = torch.full((len(vectors),), -1.0)
    places = torch.zeros(len(vectors), dtype=torch.int64)
    for start in range(0, row_count, ROWS_AT_ONCE):
        block = F.normalize(stored(start, min(start + ROWS_AT_ONCE, row_count)).float(), dim=1)
        nearest = (vectors @ block.T).max(dim=1)
        nearer = nearest.values > best
        best = torch.where(nearer, nearest.values, best)
        places = torch.where(nearer, nearest.indices + start, places)
    return [int(place) if cosine >= LEAST_COSINE else None for place, cosine in zip(places, best)]


# ----------------------------------------------------------------------------------------------------------- --verify


def verify_folder(folder, names, weights, device):
    """Prints what holds of an embedding folder. Raises BadInput if a file or a row is not what it should be.

    names: of the encoders, [] for all. weights: {encoder: file or folder}.
    """
    data = Embeddings(folder)
    unknown = [name for name in names if name not in data.encoders]
    if unknown:
        raise BadInput(f"--encoder {unknown[0]}: {folder} has {', '.join(data.encoders)}")
    problems = []
    unverified = []
    for name in names or data.encoders:
        try:
            data.load(name)  # checks shape, numbers and, where there is a manifest, the digest
        except BadInput as error:
            problems.append(str(error))
            print(f"{name}: {error}")
            continue
        sha256 = data.record(name).get("file_sha256")
        digest = f"sha256 {sha256[:12]}... as sealed" if sha256 else f"sha256 {sha256_file(folder / f'{name}.pt')[:12]}..."
        found = why_not = None
        if not data.rows:
            why_not = "the folder does not say what its rows are"
        else:
            try:
                found = reembed_encoder(data, name, weights.get(name), device)
            except BadInput as error:
                if name in weights:
                    raise
                why_not = why_not_opened(error)
        if found is None:
            unverified.append(name)
            print(f"{name}: {digest}; NOT embedded again: {why_not}")
            continue
        print(f"{name}: {digest}; {found}")
        if not found.agrees():
            problems.append(f"{name}: {found}")
    if problems:
        raise BadInput(f"--verify {folder}: {len(problems)} of {len(names or data.encoders)} encoders differ; {problems[0]}")
    left = f"; not embedded again: {', '.join(unverified)}" if unverified else ""
    print(f"{folder}: {data.row_count:,} rows, {len(names or data.encoders)} files are sound{left}")


def reembed_encoder(data, name, weights, device):
    """The Reembedded rows of an encoder of an open folder. Raises BadInput if its weights or pictures are not to be had."""
    root = data.root
    encoder = open_recorded(recorded_encoder(name, data), weights, device)
    vectors = data.load(name)
    usable = [number for number, row in enumerate(data.rows) if row["caption"]]
    return reembed(encoder, data.rows, usable, root, lambda start, end: vectors[start:end])
