"""Embeddings that other programs made, checked and sealed: `embed.py --adopt FOLDER`.

What can be known of vectors without their encoders is checked: numbers, widths, lengths, row counts, repeated rows, and
whether the rows of the encoders belong together (`hyma/row_order.py`). With the pictures and captions, some rows are also
embedded again. manifest.json records what was verified, and what could not be.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vlm
from hyma.columns import named
from hyma.datasets import Asked, Corpus, read_corpus, read_tables
from hyma.embeddings import FORMAT_VERSION, hash_keys
from hyma.files import lock_folder, save_tensors, sha256_file, write_json, write_jsonl
from hyma.row_order import compare_rows
from hyma.scan import plain_caption, row_fault, row_keys
from hyma.splits import LEFT_OUT, give_splits, has_test_rows
from hyma.vector_files import find_vectors, is_in_place, part_number
from hyma.verifying import reembed
from hyma.weights import why_not_opened
from vlm import BadInput

UNIT = 1e-2  # how far a length may be from 1: of what was stored in 16 bits


class Adopted(NamedTuple):
    """What is known of the vectors of an encoder."""

    encoder: vlm.Encoder
    is_unit: bool  # whether every row has the length 1
    row_hashes: torch.Tensor  # [rows] int64, equal where rows are


def adopt_folder(folder, out, data, asked, encoders, weights, device):
    """Checks a folder's vectors, seals them in `out` (None: where they are) and prints what was found.

    data: a source of their pictures and captions, or None. asked: the Asked columns of it. encoders: the Encoders that
    flags name, for files of other names than the registry's. weights: {encoder: file or folder}.
    """
    if (folder / "manifest.json").exists():
        raise BadInput(f"--adopt {folder}: is sealed already; check it with --verify {folder}")
    named_encoders = {encoder.name: encoder for encoder in encoders}
    found = find_vectors(folder, {**vlm.ENCODERS, **named_encoders})
    out = out or folder
    with lock_folder(make_out(out), wait=False):
        if out != folder and any(out.glob("*.pt")):
            raise BadInput(f"--out {out}: holds embeddings already; choose another")
        check_counts(found)
        adopted = {}
        for name, vectors in found.items():
            adopted[name] = check_vectors(vectors, find_encoder(vectors, named_encoders))
            describe(vectors, adopted[name])
        check_places(found, adopted, folder, out)
        verified = ["every row is finite and not zero", "the files have equal row counts"]
        unverified = []
        compare_files(found, adopted)
        compare_order(found, adopted, verified, unverified)
        corpus = find_rows(folder, data, asked, next(iter(found.values())).rows, unverified)
        rows = make_rows(corpus, unverified) if corpus else None
        records = reembed_all(found, adopted, corpus, rows, weights, device, verified, unverified)
        write_folder(folder, out, found, adopted, corpus, rows, records, verified, unverified)
    for line in verified:
        print(f"verified: {line}")
    for line in unverified:
        print(f"NOT verified: {line}")
    print(f"{out}: sealed. Next: python train_hyma.py --data {out} --pairs all")


def make_out(out):
    out.mkdir(parents=True, exist_ok=True)
    return out


# ------------------------------------------------------------------------------------------------------------ the files


def find_encoder(vectors, named_encoders):
    """The Encoder of a file. Raises BadInput if nobody says which, or if the width is not its."""
    name = vectors.name
    encoder = named_encoders.get(name) or vlm.ENCODERS.get(name)
    if encoder is None:
        raise BadInput(f"{vectors.paths[0]}: which model made it? Name it: --encoder {name}=SPEC")
    if vectors.kind not in (None, encoder.kind):
        raise BadInput(f"{vectors.paths[0]}: lies among the {vectors.kind} embeddings, and {encoder.spec} is of {encoder.kind}")
    if encoder.dim not in (None, vectors.dim):
        raise BadInput(f"{vectors.paths[0]}: has vectors of width {vectors.dim}; {name} gives {encoder.dim}")
    return encoder


def check_counts(found):
    """Raises BadInput if the files differ in their row counts."""
    first = next(iter(found.values()))
    for vectors in found.values():
        if vectors.rows != first.rows:
            raise BadInput(
                f"{first.paths[0]}: holds {first.rows:,} rows of {first.name}, and {vectors.paths[0]} {vectors.rows:,} of "
                f"{vectors.name}; they are not of the same corpus"
            )


def check_vectors(vectors, encoder) -> Adopted:
    """Reads every row. Raises BadInput, naming the first, if one is zero or not finite."""
    is_unit = True
    hashes = []
    factors = torch.randint(-(2**62), 2**62, (vectors.dim,), generator=torch.Generator().manual_seed(0)) | 1  # [dim]
    for start, block in vectors.blocks():
        norms = block.norm(dim=1)  # [n]; NaN and Inf survive the sum
        bad = (~(norms.isfinite() & (norms > 0))).nonzero()
        if len(bad):
            raise BadInput(f"{vectors.paths[0]}: row {start + int(bad[0]):,} of {vectors.name} is zero, NaN or infinite")
        is_unit = is_unit and bool(((norms - 1).abs() < UNIT).all())
        hashes.append((block.view(torch.int32).long() * factors).sum(dim=1))
    return Adopted(encoder, is_unit, torch.cat(hashes))


def describe(vectors, adopted):
    """Prints a line about an encoder's vectors."""
    repeated = vectors.rows - len(adopted.row_hashes.unique())
    files = named([str(path.name) for path in vectors.paths], 3)
    length = "unit length" if adopted.is_unit else "not of unit length"
    print(
        f"{adopted.encoder.name}: {files}: {vectors.rows:,} x {vectors.dim} {vectors.dtype}, {length}, {repeated:,} rows "
        f"repeat an earlier one ({adopted.encoder.kind}, {adopted.encoder.spec})"
    )


def check_places(found, adopted, folder, out):
    """Raises BadInput if files would have to be written among those of somebody else."""
    for name, vectors in found.items():
        if out == folder and not (is_in_place(vectors, out) and adopted[name].is_unit):
            reason = "is no .pt" if not is_in_place(vectors, out) else "is not of unit length"
            raise BadInput(
                f"{vectors.paths[0]}: {reason}, so that {name}.pt has to be written; say where: --out FOLDER"
            )


def compare_files(found, adopted):
    """Raises BadInput if two encoders have the same vectors: one of them is misnamed."""
    names = list(found)
    for number, name in enumerate(names):
        for other in names[:number]:
            if adopted[name].row_hashes.equal(adopted[other].row_hashes):
                raise BadInput(
                    f"{found[name].paths[0]}: holds the vectors of {found[other].paths[0]}; one of them is misnamed"
                )


def compare_order(found, adopted, verified, unverified):
    """Compares the rows of all encoders with those of the first image encoder. Raises BadInput where they are shifted."""
    names = sorted(found, key=lambda name: (adopted[name].encoder.kind, adopted[name].encoder.spec.startswith("random:")))
    first, *others = names
    together = []
    for name in others:
        stretches = compare_rows(found[first], found[name])
        shifted = [stretch for stretch in stretches if stretch.shift]
        fitting = [stretch for stretch in stretches if stretch.shift == 0]
        if shifted:
            raise BadInput(
                f"{found[name].paths[0]}: near row {shifted[0].start:,} its rows are those of {found[first].paths[0]} shifted "
                f"by {shifted[0].shift:+}: a row is missing in one of them, or is there twice"
            )
        if stretches and len(fitting) == len(stretches):
            together.append(name)
        elif not stretches:
            unverified.append(f"whether the rows of {name} are those of {first}: there are too few to tell")
        else:
            missed = next(stretch.start for stretch in stretches if stretch.shift is None)
            unverified.append(
                f"whether the rows of {name} are those of {first}: their similarities agree in {len(fitting)} of "
                f"{len(stretches)} stretches, and not near row {missed:,}"
            )
    if together:
        verified.append(f"the rows of {', '.join(together)} are those of {first}, by the similarities between them")


# ------------------------------------------------------------------------------------------------------------- the rows


def find_rows(folder, data, asked, count, unverified) -> Corpus | None:
    """The corpus that the rows are of: that of --data, else of clip-retrieval's metadata/, else None."""
    corpus = None
    if data is not None:
        corpus = read_corpus(data, *asked)
    elif (folder / "metadata").is_dir():
        tables = sorted((folder / "metadata").glob("*.parquet"), key=part_number)
        try:
            corpus = read_tables(folder / "metadata", tables, Asked(*asked)) if tables else None
        except BadInput as error:
            unverified.append(f"what the rows are: {error}")
    if corpus is None:
        unverified.append("which picture and caption each row is: give them with --data")
        return None
    for note in corpus.notes:
        print(note)
    if len(corpus.rows) != count:
        raise BadInput(
            f"{corpus.source}: has {len(corpus.rows):,} rows, and the embeddings have {count:,}; --data must be the very table "
            "that was embedded, in its order"
        )
    return corpus


def make_rows(corpus, unverified):
    """The rows as rows.jsonl holds them. Rows that cannot be used keep their place, in a split of their own."""
    faults = [row_fault(row) for row in corpus.rows]
    usable = [dict(row) for row, fault in zip(corpus.rows, faults) if not fault]
    if not usable:
        raise BadInput(f"{corpus.source}: no row can be used; the first: {faults[0]}")
    digests = [hashlib.sha256(row["image"].encode()).hexdigest() for row in usable]
    lines, held_out = give_splits(usable, digests, corpus.source)
    for number in held_out:
        usable[number]["split"] = LEFT_OUT
    for line in lines:
        print(f"{corpus.source}: {line}")
    images = [row["image"] or f"row {number}" for number, row in enumerate(corpus.rows, start=1)]
    rows = []
    remaining = iter(usable)
    for key, source, fault in zip(row_keys(images), corpus.rows, faults):
        row = {"key": key, "image": source["image"], "caption": "", "split": LEFT_OUT} if fault else next(remaining)
        made = {"key": key, "image": row["image"], "caption": plain_caption(row)}
        for part in ("label", "split", "question", "answer", "choices"):
            if row.get(part) not in (None, ""):
                made[part] = row[part]
        rows.append(made)
    left_out = len(rows) - len(usable) + len(held_out)
    if left_out:
        unverified.append(f"{left_out:,} rows cannot be used and are in the split {LEFT_OUT!r}; the first: {first_of(faults)}")
    return rows


def first_of(reasons):
    """The first reason that there is."""
    return next(filter(None, reasons), "its picture is in two splits")


def reembed_all(found, adopted, corpus, rows, weights, device, verified, unverified):
    """{encoder: what its record gains}, after embedding some rows of each again. Raises BadInput if they differ."""
    gained = {}
    usable = [number for number, row in enumerate(rows or []) if row.get("split") != LEFT_OUT]
    for name, vectors in found.items():
        if not usable:
            unverified.append(f"that {name} is {adopted[name].encoder.spec}: no row could be embedded again")
            continue
        spec = adopted[name].encoder
        try:
            encoder = vlm.build_encoder(spec, device, weights.get(name))
            result = reembed(encoder, rows, usable, corpus.root, vectors.block)
        except BadInput as error:
            if name in weights:
                raise
            unverified.append(f"that {name} is {spec.spec}: {why_not_opened(error)}")
            continue
        if not result.agrees():
            raise BadInput(f"{vectors.paths[0]}: is not {spec.spec} of the rows of {corpus.source}: {result}")
        verified.append(f"{name} is {spec.spec}: {result}")
        gained[name] = {
            "full_name": encoder.full_name,
            "weights_sha256": vlm.weights_digest(encoder.model),
            "transform": encoder.config,
        }
    return gained


# ------------------------------------------------------------------------------------------------------------- the seal


def write_folder(folder, out, found, adopted, corpus, rows, gained, verified, unverified):
    """Writes what an embedding folder holds, manifest.json last."""
    count = next(iter(found.values())).rows
    keys_sha256 = hash_keys(rows) if rows else None
    records = {}
    for name, vectors in found.items():
        path = out / f"{name}.pt"
        if not (out == folder and is_in_place(vectors, out)):
            save_tensors(as_stored(vectors), path)
        encoder = adopted[name].encoder
        records[name] = {
            "kind": encoder.kind,
            "spec": encoder.spec,
            "dim": vectors.dim,
            "rows": count,
            "keys_sha256": keys_sha256,
            **gained.get(name, {}),
            "file_sha256": sha256_file(path),
        }
    if rows:
        write_jsonl(out / "rows.jsonl", rows)
    manifest = {
        "format_version": FORMAT_VERSION,
        "dataset": corpus.dataset if corpus else Path(folder).resolve().name,
        "rows": count,
        "keys_sha256": keys_sha256,
        "adopted": {"verified": verified, "not_verified": unverified},
        "encoders": records,
    }
    if corpus:
        manifest["root"] = os.path.relpath(corpus.root, out)
        if has_test_rows(rows) and not has_test_rows(corpus.rows):
            manifest["test_set_aside"] = True
    write_json(out / "manifest.json", manifest)


def as_stored(vectors):
    """All vectors [rows, dim] of unit length, in 16 bits if they were stored in 16, else in 32."""
    dtype = torch.float16 if vectors.dtype == "float16" else torch.float32
    stored = torch.empty(vectors.rows, vectors.dim, dtype=dtype)
    for start, block in vectors.blocks():
        stored[start : start + len(block)] = F.normalize(block, dim=1).to(dtype)
    return stored
