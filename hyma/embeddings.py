"""The embedding folder: opened, checked and split; rows taken from it on a device; its manifest written and sealed.

embeddings/<dataset>/<encoder>.pt        one tensor [rows, dim] of unit vectors, in row order: the published format
                     rows.jsonl          what each row is: key, image, caption, and label, split, question if any
                     quarantine.jsonl    rows that could not be used, with the reason
                     manifest.json       seals the folder: row count, hash of the rows, sha256 of each file
"""

import fnmatch
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

from hyma.files import CHECKPOINT_SECONDS, lock_folder, make_folder, read_jsonl, save_tensors, sha256_file, write_json
from hyma.splits import known_split
from vlm import ENCODERS, BadInput, EmbeddingDataset, Encoder, is_encoder_name, load_tensors, read_json

FORMAT_VERSION = 1
SAMPLE = Path(__file__).parent.parent / "sample" / "embeddings"
MAKE_AGAIN = "run embed.py again into a new --out"


class Embeddings:
    """An embedding folder, opened and checked: `<encoder>.pt` files, `manifest.json`, `rows.jsonl`.

    A folder without a manifest (the published form) is accepted if its files have equal row counts.
    `rows` is a list of {key, image, caption, label?, split?}, None where unknown. `encoders`: short name -> Encoder.
    Raises BadInput for a folder that is unsealed, or whose rows are not those it was sealed with.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BadInput(f"{folder}: no such embedding folder; make one with: python embed.py --out {folder}")
        if (self.folder / "manifest.json").is_file():
            self._open_sealed()
        elif (self.folder / "rows.jsonl").exists() or (self.folder / "manifest.partial.json").exists():
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
            raise BadInput(f"{self.folder}: holds no embeddings; make some with: python embed.py --out {self.folder}")
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
        for start in range(0, self.row_count, 65536):
            norms = embeddings[start : start + 65536].float().norm(dim=1)  # [rows]; NaN and Inf survive the sum
            bad = (~(norms.isfinite() & (norms > 0))).nonzero()
            if len(bad):
                row = start + bad[0].item()
                raise BadInput(f"{path}: row {row} is zero, NaN or infinite; {MAKE_AGAIN}")
        if self.manifest and sha256_file(path) != self.manifest["encoders"][name]["file_sha256"]:
            raise BadInput(f"{path}: differs from the file that was sealed (sha256); {MAKE_AGAIN}")
        return embeddings

    def fingerprint(self, names):
        """What a run's embeddings are recognised by later: {encoder: sha256 of its file}."""
        digests = {}
        for name in names:
            digests[name] = self.record(name).get("file_sha256") or sha256_file(self.folder / f"{name}.pt")
        return digests

    def record(self, name):
        """What the manifest records of an encoder of the folder: {} without a manifest."""
        return self.manifest["encoders"][name] if self.manifest else {}

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


def first_difference(settings, others):
    """(name, value, other value) of the first setting that both have and that differs, or None.

    A setting that one of them lacks is no difference: later versions of the libraries record more of them.
    """
    if not isinstance(settings, dict) or not isinstance(others, dict):
        return None
    for name, value in settings.items():
        if name not in others:
            continue
        other = others[name]
        if isinstance(value, dict) and isinstance(other, dict):
            inner = first_difference(value, other)
            if inner:
                return (f"{name} {inner[0]}", *inner[1:])
        elif value != other:
            return name, value, other
    return None


def is_row(row):
    """Whether a line of rows.jsonl has what every row has, and nothing in it is of another kind than text."""
    for part in ("key", "image", "caption"):
        if not isinstance(row.get(part), str):
            return False
    return all(isinstance(row.get(part, ""), str) for part in ("label", "split", "question", "answer"))


class RowStore:
    """The embeddings of several encoders, on the device if half its memory holds them, to take batches of rows from."""

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
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
            for name, tensor in self.tensors.items():
                self.tensors[name] = tensor.to(device)

    def take(self, name, rows):
        """Unit vectors [len(rows), dim], float32, on the device."""
        tensor = self.tensors[name]
        return F.normalize(tensor[rows.to(tensor.device)].to(self.device).float(), dim=1)


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


def split_rows(data: Embeddings, seed=0, count=None, fraction=0.1, most=5000):
    """Row numbers to train on and to choose by: (train [n], validation [m]).

    count: only so many rows, both kinds in proportion, drawn by the seed; a smaller draw is part of every larger one.

    The `split` of the rows decides where there is one: train, or none, is trained on; val chooses; test and any other
    name is left alone. Otherwise a tenth of the pictures, or `most`, is set aside, all captions of a picture together,
    so that no validation picture is trained on. Raises BadInput if there is nothing to train on or to choose by.
    """
    splits = [row.get("split") for row in data.rows] if data.rows else []
    if any(splits):
        train, validation = split_by_column(splits)
    else:
        train, validation = split_by_picture(data, seed, fraction, most)
    for kind, rows in (("train", train), ("val", validation)):
        if len(rows) == 0:
            raise BadInput(no_rows_to(kind, data, splits))
    share = (count or math.inf) / (len(train) + len(validation))
    if share < 1:
        random = seeded_generator("part of the rows", seed)
        train = draw_share(train, share, random)
        validation = draw_share(validation, share, random)
    return train.sort().values, validation.sort().values


def split_by_column(splits):
    """(train, validation) by the values of the split column."""
    train = []
    validation = []
    for i, split in enumerate(splits):
        if split in (None, "") or known_split(split) == "train":
            train.append(i)
        elif known_split(split) == "val":
            validation.append(i)
    return torch.tensor(train, dtype=torch.int64), torch.tensor(validation, dtype=torch.int64)


def no_rows_to(kind, data, splits):
    """Why nothing can be trained or chosen, in a line."""
    purpose = {"train": "train on", "val": "choose by"}[kind]
    if not any(splits):
        return f"{data.folder}: one picture leaves no {kind} rows to {purpose}; at least two pictures are needed"
    counts = Counter(map(str, splits))
    parts = [f"{split} {count:,}" for split, count in counts.items()]
    return (
        f"{data.folder}/rows.jsonl: there are no {kind} rows to {purpose} among its splits ({', '.join(parts)} rows); embed more "
        "pictures, or a table with train and val rows, into a new --out"
    )


def split_by_picture(data, seed, fraction, most):
    """(train, validation): `fraction` of the pictures, or `most`, with all their captions, are for validation."""
    pictures = [row["image"] for row in data.rows] if data.rows else list(range(data.row_count))
    different = unique(pictures)
    count = min(most, max(1, round(fraction * len(different))))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {different[i] for i in order[:count]}
    train = []
    validation = []
    for i, picture in enumerate(pictures):
        if picture in held_out:
            validation.append(i)
        else:
            train.append(i)
    return torch.tensor(train, dtype=torch.int64), torch.tensor(validation, dtype=torch.int64)


def draw_share(rows, share, random):
    """That share of the rows, one at least, drawn by the generator."""
    order = torch.randperm(len(rows), generator=random)
    return rows[order[: max(1, int(share * len(rows)))]]


def choose_pairs(data: Embeddings, patterns, flag="--pairs"):
    """The (image, text) pairs that `--pairs` asks for: `all`, `vit_l16:mpnet`, wildcards like `vit_*:*`, several."""
    images, texts = data.names("image"), data.names("text")
    pairs = [(image, text) for image in images for text in texts]
    if not pairs:
        raise BadInput(
            f"{data.folder}: holds {len(images)} image and {len(texts)} text encoders; one of each is needed at least"
        )
    chosen = set()
    for pattern in patterns:
        wildcard = "*:*" if pattern == "all" else pattern
        matched = {pair for pair in pairs if fnmatch.fnmatchcase(":".join(pair), wildcard)}
        if not matched:
            known = f"images {', '.join(images)}; texts {', '.join(texts)}"
            raise BadInput(f"{flag} {pattern}: no such pair in {data.folder}, which has {known}")
        chosen |= matched
    return [pair for pair in pairs if pair in chosen]


def unique(names):
    """The different names, in the order in which they first occur."""
    return list(dict.fromkeys(names))


def seeded_generator(*parts):
    """A generator for just these parts. torch seeds its CPU generator with 32 bits, so they are hashed, not packed."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


# ------------------------------------------------------------------------------------------------------- the sealing

# embed.py writes manifest.partial.json after the scan and adds a record to it for each encoder that it has finished.
# Renamed to manifest.json it seals the folder, so that a folder with a manifest.json alone is always complete. To add
# encoders to a sealed folder, a new manifest.partial.json starts from the old manifest.json. Writers hold the lock.


def row_keys(images):
    """The key of each row: its image path, and for every further caption of that picture `path#2`, `path#3`, ..."""
    captions = Counter()
    keys = []
    for image in images:
        captions[image] += 1
        keys.append(image if captions[image] == 1 else f"{image}#{captions[image]}")
    return keys


def read_manifest(folder):
    """The unfinished manifest, else the one that seals the folder, else None."""
    for name in ("manifest.partial.json", "manifest.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return None


def write_manifest(folder, manifest):
    """Writes the unfinished manifest."""
    write_json(folder / "manifest.partial.json", manifest)


def add_to_manifest(folder, name, record):
    """Adds the record of a finished encoder to the unfinished manifest."""
    manifest = read_manifest(folder)
    manifest["encoders"][name] = record
    write_manifest(folder, manifest)


def seal_folder(folder):
    """Makes the unfinished manifest the folder's manifest. There is none if another process has sealed the folder."""
    if (folder / "manifest.partial.json").is_file():
        os.replace(folder / "manifest.partial.json", folder / "manifest.json")


def open_shards(folder, plan):
    """Makes the folder of an encoder's shards: empty, unless it holds shards that were made by the same plan."""
    plan_file = folder / "plan.json"
    make_folder(folder.parent)
    if folder.is_dir() and not (plan_file.is_file() and read_json(plan_file) == plan):
        print(f"{folder.name}: an earlier run made shards with other weights or flags; starting over")
        shutil.rmtree(folder)
    if not folder.is_dir():
        make_folder(folder)
        write_json(plan_file, plan)


def shard_path(folder, start):
    """The file of the shard whose first row is `start`."""
    return folder / f"{start:09d}.pt"


class PartialShard:
    """The batches of a shard so far, saved by the clock and when a signal asks for it: a shard can take minutes."""

    def __init__(self, path, signals):
        self.path, self.signals = path.with_suffix(".partial.pt"), signals
        self.saved = time.monotonic()

    def load(self):
        """The vectors [pictures, dim] of the first pictures, [] where there are none."""
        try:
            return [load_tensors(self.path)] if self.path.is_file() else []
        except BadInput:  # damaged: they are made again
            return []

    def save_when_due(self, vectors):
        if self.signals.arrived() or time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
            save_tensors(torch.cat(vectors), self.path)
            self.saved = time.monotonic()
            self.signals.leave_if_asked()

    def remove(self):
        self.path.unlink(missing_ok=True)


def is_sound_shard(path, shape, dtype):
    """Whether a shard can be read and holds unit vectors of that shape; what cannot be used is made again."""
    try:
        vectors = load_tensors(path) if path.is_file() else None
    except BadInput:
        return False
    return torch.is_tensor(vectors) and vectors.dtype == dtype and has_unit_rows(vectors, shape)


def has_unit_rows(vectors, shape):
    """Whether vectors [rows, dim] have that shape and each row the length 1, as far as its dtype can tell."""
    if tuple(vectors.shape) != tuple(shape):
        return False
    return bool(((vectors.float().norm(dim=1) - 1).abs() < 1e-2).all())


def sound_record(out, name):
    """The manifest's record of an encoder that is done, None if it has none or if its file is not what was recorded."""
    with lock_folder(out, wait=True):
        manifest = read_manifest(out)
        record = manifest["encoders"].get(name)  # by now another process may have made it
        if record is None:
            return None
        path = out / f"{name}.pt"
        if path.is_file() and sha256_file(path) == record["file_sha256"]:
            return record
        print(f"{path}: is missing or is not what was embedded (sha256); embedding it again")
        manifest["encoders"][name] = None  # its place among the others is kept
        write_manifest(out, manifest)
        return None
