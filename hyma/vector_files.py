"""Files of vectors that other programs wrote, of which blocks of rows are read: .pt, .npy and .safetensors.

    <encoder>.pt, <encoder>.safetensors           one tensor [rows, dim]; of .safetensors also several, named after encoders
    <encoder>.npy, or <encoder>_0.npy and so on   one array, or its parts
    img_emb/, text_emb/                           clip-retrieval's layout: parts of one encoder, or a folder for each

A file's name becomes the encoder's only if it can be one. Nothing in them is run, and none is read whole.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from vlm import BadInput, EmbeddingDataset, check_regular, is_encoder_name

BLOCK = 16384  # rows that are in memory at once
KIND_OF_FOLDER = {"img_emb": "image", "text_emb": "text"}  # clip-retrieval's
PART = re.compile(r"(?P<name>.+)_(?P<number>\d+)")


class Vectors:
    """The vectors of one encoder, [rows, dim], in one file or in several parts."""

    def __init__(self, name, kind=None):
        self.name, self.kind = name, kind  # kind: image or text, None where the files do not say
        self.paths = []
        self.parts = []  # what gives rows by a slice
        self.rows = 0
        self.dim = None
        self.dtype = None

    def add(self, path, part, shape, dtype):
        """Adds the next part. Raises BadInput if it is no matrix of the width of the others."""
        if len(shape) != 2 or 0 in shape or self.dim not in (None, shape[1]):
            width = f"[rows, {self.dim}]" if self.dim else "[rows, dim]"
            raise BadInput(f"{path}: has the shape {list(shape)}; expected {width}")
        if not re.fullmatch(r"(float|bfloat)\d+", dtype):
            raise BadInput(f"{path}: holds {dtype}; expected floating-point numbers")
        self.paths.append(path)
        self.parts.append((self.rows, shape[0], part))
        self.rows += shape[0]
        self.dim, self.dtype = shape[1], dtype

    def block(self, start, end):
        """The rows from `start` to `end` as float32 [end - start, dim]."""
        found = []
        for first, count, part in self.parts:
            low, high = max(start, first), min(end, first + count)
            if low < high:
                rows = part[low - first : high - first]
                found.append(rows.float() if torch.is_tensor(rows) else torch.from_numpy(rows.astype(np.float32)))
        return torch.cat(found)

    def blocks(self):
        """(first row, float32 [n, dim]) of all rows, a block at a time."""
        for start in range(0, self.rows, BLOCK):
            yield start, self.block(start, min(start + BLOCK, self.rows))

    def take(self, rows):
        """The rows of these numbers as float32 [n, dim]."""
        return torch.cat([self.block(row, row + 1) for row in rows])


def find_vectors(folder, names):
    """{encoder: Vectors} of all files of vectors in a folder. names: of encoders that are known, where a name is in doubt."""
    paths = defaultdict(list)  # (name, kind) -> files
    for place, kind in KIND_OF_FOLDER.items():
        for path in sorted((folder / place).rglob("*.npy")):
            name = place if path.parent.name == place else path.parent.name
            paths[name, kind].append(path)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".pt", ".npy"):
            part = PART.fullmatch(path.stem) if path.suffix == ".npy" and path.stem not in names else None
            paths[part["name"] if part else path.stem, None].append(path)
    found = {}
    for (name, kind), files in paths.items():
        vectors = Vectors(check_name(name, files[0]), kind)
        for path in sorted(files, key=part_number):
            add_file(vectors, path)
        add_vectors(found, vectors)
    for path in sorted(folder.glob("*.safetensors")):
        for vectors in open_safetensors(path):
            add_vectors(found, vectors)
    if not found:
        raise BadInput(f"{folder}: holds no .pt, .npy or .safetensors file of vectors, and no img_emb/ or text_emb/")
    return found


def add_vectors(found, vectors):
    """Adds the Vectors of an encoder to those found. Raises BadInput if there are some of its name."""
    other = found.setdefault(vectors.name, vectors)
    if other is not vectors:
        raise BadInput(f"{vectors.paths[0]}: {other.paths[0].name} holds vectors of {vectors.name} too; leave one out")


def check_name(name, path):
    """The name, if it can be an encoder's. Raises BadInput if it cannot."""
    if not is_encoder_name(name):
        raise BadInput(f"{path}: {name!r} is no name of an encoder: use letters, digits, '.', '_' and '-'")
    return name


def part_number(path):
    """What the parts of an array are sorted by."""
    part = PART.fullmatch(path.stem)
    return (int(part["number"]), path.name) if part else (0, path.name)


def add_file(vectors, path):
    """Adds a .pt or .npy file."""
    if path.suffix == ".pt":
        tensor = EmbeddingDataset(path).embeddings
        vectors.add(path, tensor, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return
    try:
        check_regular(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # cut, or of objects, which would have to be unpickled; numpy raises errors of many types
        raise BadInput(f"{path}: cannot be read as an array of numbers: {str(error)[:160]}") from None
    vectors.add(path, array, array.shape, array.dtype.name)


def open_safetensors(path):
    """The Vectors of a .safetensors file: of its one tensor, named after the file, or of several, each by its own name."""
    from safetensors import SafetensorError, safe_open

    found = []
    try:
        check_regular(path)
        file = safe_open(path, "pt")
        names = list(file.keys())
        for name in names:
            part = file.get_slice(name)
            vectors = Vectors(check_name(path.stem if len(names) == 1 else name, path))
            vectors.add(path, part, tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
            found.append(vectors)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read as safetensors: {str(error)[:160]}") from None
    return found


DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # safetensors' names


def is_in_place(vectors, folder):
    """Whether the Vectors are already what an embedding folder holds: <encoder>.pt in it."""
    return len(vectors.paths) == 1 and vectors.paths[0] == Path(folder) / f"{vectors.name}.pt"
