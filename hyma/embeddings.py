"""The embedding folder as it is read: opened, checked against its seal, and rows taken from it on a device.

embeddings/<dataset>/<encoder>.pt        one tensor [rows, dim] of unit vectors, in row order: the published format
                     rows.jsonl          what each row is: key, image, caption, and label, split, question if any
                     quarantine.jsonl    rows that could not be used, with the reason
                     manifest.json       seals the folder: row count, hash of the rows, sha256 of each file

How it is made is in `hyma/sealing.py`, which of its rows train and which choose in `hyma/splits.py`.
"""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from hyma.files import read_jsonl, sha256_file
from hyma.machine import bytes_for_copies, bytes_for_files
from vlm import ENCODERS, BadInput, EmbeddingDataset, Encoder, first_difference, is_encoder_name, read_json, trained_on

FORMAT_VERSION = 1
SAMPLE = Path(__file__).parent.parent / "sample" / "embeddings"
ROWS_AT_ONCE = 4096  # to normalise or project: memory for so many is used again, for all rows it would be new pages each time
MAKE_AGAIN = "run embed.py again into a new --out"


class Embeddings:
    """An embedding folder, opened and checked: `<encoder>.pt` files, `manifest.json`, `rows.jsonl`.

    A folder without a manifest (the published form) is accepted if its files have equal row counts.
    `rows` is a list of {key, image, caption, label?, split?}, None where unknown. `encoders`: short name -> Encoder.
    Raises BadInput for a folder that is unsealed, or whose rows are not those it was sealed with.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folders = [self.folder]  # several where `hyma/merging.py` takes them as one
        self.digests = {}  # encoder -> sha256 of its file, once it is known
        if not self.folder.is_dir():
            raise BadInput(
                f"{folder}: no such embedding folder; make one with: python embed.py --encoder NAME --data TABLE --out {folder}"
            )
        if (self.folder / "manifest.json").is_file():
            self._open_sealed()
        elif any((self.folder / name).exists() for name in ("rows.jsonl", "manifest.partial.json", ".shards")):
            raise BadInput(
                f"{folder}: is not sealed (no manifest.json); run the same embed.py command again to finish it"
            )
        else:
            self._open_bare()

    def _open_sealed(self):
        path = self.folder / "manifest.json"
        self.manifest = read_json(path)
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise BadInput(f"{path}: format version {version}; this program reads {FORMAT_VERSION}")
        try:
            self.row_count, keys_sha256 = self.manifest["rows"], self.manifest["keys_sha256"]
            self.dataset = str(self.manifest["dataset"])
            if not self.dataset.isprintable():
                raise BadInput(f"{path}: its dataset's name {self.dataset!r} has control characters; give it another")
            self.encoders = {}
            for name, record in self.manifest["encoders"].items():
                if not is_encoder_name(name):
                    raise BadInput(f"{path}: {name!r} is no name of an encoder: use letters, digits, '.', '_' and '-'")
                self.encoders[name] = Encoder(name, record["kind"], record["spec"], record["dim"])
                bytes.fromhex(record["file_sha256"])
                if record["kind"] not in ("image", "text"):
                    raise BadInput(f"{path}: {name} is of the kind {record['kind']!r}, which is neither image nor text")
                if (record["rows"], record["keys_sha256"]) != (self.row_count, keys_sha256):
                    raise BadInput(f"{path}: {name} was embedded from other rows than the folder's; {MAKE_AGAIN}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{path}: is damaged ({error} is missing or wrong); {MAKE_AGAIN}") from None
        if keys_sha256 is None:  # adopted, and nobody knows what its rows are
            self.rows = None
            return
        path = self.folder / "rows.jsonl"
        self.rows = read_jsonl(path)
        if len(self.rows) != self.row_count:
            raise BadInput(f"{path}: has {len(self.rows)} rows; the manifest was sealed with {self.row_count}")
        if hash_keys(self.rows) != keys_sha256:
            raise BadInput(f"{path}: the rows or their order have changed since the folder was sealed; {MAKE_AGAIN}")
        for number, row in enumerate(self.rows, start=1):
            if not is_row(row):
                raise BadInput(f"{path}: line {number}: is no row with key, image and caption; {MAKE_AGAIN}")

    def _open_bare(self):
        files = {path.stem: EmbeddingDataset(path) for path in sorted(self.folder.glob("*.pt"))}
        if not files:
            raise BadInput(
                f"{self.folder}: holds no embeddings; "
                f"make some with: python embed.py --encoder NAME --data TABLE --out {self.folder}"
            )
        self.encoders = {}
        first = next(iter(files))
        self.row_count = len(files[first])
        for name, file in files.items():
            if name not in ENCODERS:
                known = ", ".join(ENCODERS)
                raise BadInput(
                    f"{self.folder}/{name}.pt: without a manifest.json only registered encoders are known ({known})"
                )
            self.encoders[name] = ENCODERS[name]._replace(dim=ENCODERS[name].dim or file.embed_dim)
        for name, file in files.items():
            if len(file) != self.row_count:
                raise BadInput(
                    f"{self.folder}: {first}.pt has {self.row_count} rows and {name}.pt has {len(file)}; they are not of "
                    "the same corpus"
                )
        print(
            f"{self.folder}: no manifest.json; the row counts agree ({self.row_count}), the order of the rows cannot be "
            "checked",
            file=sys.stderr,
        )
        self.rows, self.manifest, self.dataset = None, None, self.folder.name

    @property
    def root(self):
        """The folder that the rows' pictures lie in."""
        return self.folder / (self.manifest or {}).get("root", ".")

    def names(self, kind):
        """Short names of the folder's image or text encoders, in the manifest's order."""
        return [name for name, encoder in self.encoders.items() if encoder.kind == kind]

    def load(self, name):
        """The embeddings of one encoder, [rows, dim], as stored (memory-mapped), after checking every byte."""
        path = self.folder / f"{name}.pt"
        embeddings = EmbeddingDataset(path).embeddings
        expected = (self.row_count, self.encoders[name].dim)
        if tuple(embeddings.shape) != expected:
            raise BadInput(f"{path}: has shape {tuple(embeddings.shape)}; expected {expected}")
        with ThreadPoolExecutor(1) as other:  # both read the file together, so it comes from the disk once
            digest = other.submit(sha256_file, path)
            row = first_bad_row(embeddings)
            self.digests[name] = digest.result()
        if row is not None:
            raise BadInput(f"{path}: row {row} is zero, NaN or infinite; {MAKE_AGAIN}")
        if self.manifest and self.digests[name] != self.manifest["encoders"][name]["file_sha256"]:
            raise BadInput(f"{path}: differs from the file that was sealed (sha256); {MAKE_AGAIN}")
        return embeddings

    def fingerprint(self, names):
        """What a run's embeddings are recognised by later: {encoder: sha256 of its file}."""
        digests = {}
        for name in names:
            if name not in self.digests:
                self.digests[name] = self.record(name).get("file_sha256") or sha256_file(self.folder / f"{name}.pt")
            digests[name] = self.digests[name]
        return digests

    def split_sha256(self):
        """What a run's split is recognised by later; None where rows have no split and a run's seed decides."""
        splits = [row.get("split") for row in self.rows or []]
        return hashlib.sha256(json.dumps(splits).encode()).hexdigest() if any(splits) else None

    def record(self, name):
        """What the manifest records of an encoder of the folder: {} without a manifest."""
        return self.manifest["encoders"][name] if self.manifest else {}

    def manifests(self):
        """The manifests of all folders that are opened here; none of a published folder."""
        return [self.manifest] if self.manifest else []

    def folder_of(self, name):
        """The folder that an encoder's file is in, and its prompts: one of several where these are opened as one."""
        return self.folder

    def weights_sha256(self, name):
        """The digest of the weights that an encoder's embeddings were made with, None where it is not known."""
        return self.record(name).get("weights_sha256")


def check_same_encoder(name, data, other):
    """Raises BadInput if two embedding folders hold vectors of an encoder that differs: in its weights, or in a setting.

    A text model's settings are its longest sequence, prompts and pooling, an image model's its input size and crop. The
    dtype is none of them: it rounds the vectors, and does not move them. other: None for a folder alone.
    """
    if not other or name not in data.encoders or name not in other.encoders:
        return
    own, others = data.weights_sha256(name), other.weights_sha256(name)
    if own and others and own != others:
        raise BadInput(f"{data.folder}: its {name} has other weights than {other.folder}'s; embed one of them again")
    difference = first_difference(data.record(name).get("transform"), other.record(name).get("transform"))
    if difference:
        setting, here, there = difference
        raise BadInput(
            f"{data.folder}: its {name} was embedded with {setting} {here}, and {other.folder}'s with {setting} {there}; "
            "embed one of them again"
        )


def check_trained_on(path, name, data):
    """Raises BadInput if a connector's card says that it was trained on another encoder of this name than the embedding
    folder has vectors of: on other weights, or with another setting."""
    digest, settings = trained_on(path, name)
    if digest and data.weights_sha256(name) not in (None, digest):
        raise BadInput(f"{path}: was trained on other weights of {name} than {data.folder} was made with")
    difference = first_difference(settings, data.record(name).get("transform"))
    if difference:
        setting, then, now = difference
        raise BadInput(
            f"{path}: was trained on vectors that {name} made with {setting} {then}; {data.folder} has them with {now}"
        )


def is_row(row):
    """Whether a line of rows.jsonl has what every row has, and nothing in it is of another kind than text that can be written."""
    for part in ("key", "image", "caption"):
        if not is_text(row.get(part)):
            return False
    return all(is_text(row.get(part, "")) for part in ("label", "split", "question", "answer"))


def is_text(value):
    """Whether a value is text in whole characters: JSON can hold the half of one."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def first_bad_row(vectors):
    """The number of the first row of vectors [rows, dim] that is zero, NaN or infinite, None if there is none."""
    start = 0
    for block in vectors.split(2048):  # stays in the processor's cache
        block = block.float()
        squares = torch.linalg.vecdot(block, block)  # [rows]; NaN and Inf survive the sum
        bad = (~(squares.isfinite() & (squares > 0))).nonzero()
        if len(bad):
            return start + bad[0].item()
        start += len(block)
    return None


def has_unit_rows(vectors, shape):
    """Whether vectors [rows, dim] have that shape and each row the length 1, as far as its dtype can tell."""
    if tuple(vectors.shape) != tuple(shape):
        return False
    return bool(((vectors.float().norm(dim=1) - 1).abs() < 1e-2).all())


class RowStore:
    """The embeddings of several encoders, to take batches of rows from.

    Resident where they fit: on a GPU a copy of them, on a CPU the mapped files in the system's page cache. Where they do not,
    `Batches` reads the rows of many steps at a time into a window, and a step takes its rows from there.
    """

    def __init__(self, data, names, device):
        self.device = device
        self.tensors = {}
        self.dims = {}
        size = 0
        for name in names:
            tensor = data.load(name)
            self.tensors[name] = tensor
            self.dims[name] = tensor.shape[1]
            size += tensor.nbytes
        on_gpu = device.type == "cuda"
        self.is_resident = size < (bytes_for_copies(device) if on_gpu else bytes_for_files())
        if on_gpu and self.is_resident:
            for name, tensor in self.tensors.items():
                self.tensors[name] = tensor.to(device)
        self.window = {}  # encoder -> [rows of the window, dim], on the device
        self.batch = None  # the rows of the step that the window is used for
        self.places = None  # where these are in the window

    def projection_flops(self, row_count, images):
        """Of taking so many rows: none, as vectors are taken as they are."""
        return 0

    def take(self, name, rows, dtype=torch.float32):
        """Unit vectors [len(rows), dim], on the device. They are of unit length before they are rounded to dtype."""
        if rows is self.batch and name in self.window:
            tensor, rows = self.window[name], self.places
        else:
            tensor = self.tensors[name]
        vectors = torch.empty(len(rows), tensor.shape[1], device=self.device)
        for part, unit in zip(rows.to(tensor.device).split(ROWS_AT_ONCE), vectors.split(ROWS_AT_ONCE)):
            F.normalize(tensor.index_select(0, part).to(self.device).float(), dim=1, out=unit)
        return vectors.to(dtype)


def hash_keys(rows) -> str:
    """sha256 over the ordered rows: what each row is (key) and what it says (caption, label, split, a question).

    The picture, by its path and by the digest of its bytes, is part of it in every row that has the digest; rows of
    earlier versions have none.
    """
    digest = hashlib.sha256()
    for row in rows:
        parts = [str(row.get(part, "")) for part in ("key", "caption", "label", "split")]
        parts += [row[part] for part in ("question", "answer", "choices") if part in row]
        if "image_sha256" in row:
            parts += [row["image"], row["image_sha256"]]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def unique(names):
    """The different names, in the order in which they first occur."""
    return list(dict.fromkeys(names))
