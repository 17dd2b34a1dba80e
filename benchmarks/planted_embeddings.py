"""Synthetic embeddings whose true order of pairs is known: encoders that see the same factors through graded noise.

Every row has FACTORS factors u, independent normal numbers. A text encoder shows u, an image encoder u + |u|, so that a
connector needs a hidden layer to see all of it. Each encoder shows its factors along directions of its own, with noise in
all of its space:

    x = factors @ directions + noise,    noise of the standard deviation sqrt(1 / r^2 - 1) in every direction

r is the encoder's clarity: the correlation of a factor with its reading from x. Of a pair the readings correlate by the
product of both clarities, so the order of these products is the true order of the pairs.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hyma.embeddings import hash_keys
from hyma.files import save_tensors, sha256_file, write_json, write_jsonl
from hyma.seeds import seeded_generator

FACTORS = 48
WIDTHS = (384, 768, 1024)  # of the paper's encoders, as many of each
BEST, WORST = 0.9, 0.45  # product of both clarities, of the best pair and of the worst
BLOCK = 16384  # rows made at a time


class PlantedEncoder(NamedTuple):
    name: str
    kind: str  # "image" or "text"
    dim: int
    clarity: float  # r


def planted_encoders(image_count, text_count):
    """The encoders of image_count x text_count pairs, the clearest of each kind first.

    The logarithms of the pairs' products are evenly spaced: each step between image encoders is as large as all steps
    between text encoders and one more.
    """
    step = math.log(BEST / WORST) / (image_count * text_count - 1)  # between two pairs that follow each other
    encoders = []
    for kind, count, stride in (("image", image_count, text_count), ("text", text_count, 1)):
        for k in range(count):
            clarity = math.sqrt(BEST) * math.exp(-step * stride * k)
            encoders.append(PlantedEncoder(f"{kind}{k}", kind, WIDTHS[k % len(WIDTHS)], clarity))
    return encoders


def true_order(encoders):
    """["image:text"], best first."""
    products = {}
    for image in encoders:
        for text in encoders:
            if (image.kind, text.kind) == ("image", "text"):
                products[f"{image.name}:{text.name}"] = image.clarity * text.clarity
    return sorted(products, key=products.get, reverse=True)


def write_planted_embeddings(folder, encoders, row_count):
    """A sealed embedding folder, in 16 bits."""
    folder.mkdir(parents=True)
    rows = []
    for k in range(row_count):
        rows.append({"key": f"{k}", "image": f"{k}.png", "caption": f"caption {k}"})
    keys_sha256 = hash_keys(rows)
    records = {}
    for encoder in encoders:
        path = folder / f"{encoder.name}.pt"
        save_tensors(planted_vectors(encoder, row_count), path)
        records[encoder.name] = {
            "kind": encoder.kind,
            "spec": f"planted, clarity {encoder.clarity:.4f}",
            "dim": encoder.dim,
            "rows": row_count,
            "keys_sha256": keys_sha256,
            "file_sha256": sha256_file(path),
        }
    write_jsonl(folder / "rows.jsonl", rows)
    manifest = {"format_version": 1, "dataset": folder.name, "rows": row_count, "keys_sha256": keys_sha256}
    write_json(folder / "manifest.json", manifest | {"encoders": records})


def directions_of(encoder):
    """What an encoder shows each factor along: [FACTORS, dim], orthonormal."""
    random = seeded_generator("directions", encoder.name)
    return torch.linalg.qr(torch.randn(encoder.dim, FACTORS, generator=random)).Q.T


def planted_vectors(encoder, row_count):
    """Unit vectors [rows, dim], float16. A row is the same however many there are, but for the last block's noise."""
    directions = directions_of(encoder)
    noise = math.sqrt(1 / encoder.clarity**2 - 1)
    vectors = torch.empty(row_count, encoder.dim, dtype=torch.float16)
    for start in range(0, row_count, BLOCK):
        u = torch.randn(BLOCK, FACTORS, generator=seeded_generator("factors", start))
        if encoder.kind == "image":
            # |u| has the variance 1 - 2 / pi, and no correlation with u
            u = (u + u.abs() - math.sqrt(2 / math.pi)) / math.sqrt(2 - 2 / math.pi)
        count = min(BLOCK, row_count - start)
        random = seeded_generator("noise", encoder.name, start)
        x = u[:count] @ directions + noise * torch.randn(count, encoder.dim, generator=random)
        vectors[start : start + count] = F.normalize(x, dim=1)
    return vectors
