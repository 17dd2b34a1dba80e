"""Embeds captioned pictures once per frozen encoder: pictures + captions -> embeddings/<dataset>/.

    python embed.py --encoder vit_l16 minilm mpnet                    # the sample's pictures, registered encoders
    python embed.py --encoder all --data my/captions.csv              # your pictures, the paper's nine and three
    python embed.py --encoder dino=timm:vit_small_patch14_dinov2.lvd142m --data my/captions.csv
    python embed.py --encoder all --data coco:/data/coco              # a standard set, from its published files
    python embed.py --encoder control --out embeddings/try            # needs no network, a minute on a CPU

One scan fixes the rows before the first encoder runs, and prints what it understood of them. A picture that cannot be
read or a row without a caption goes to quarantine.jsonl with the reason, and no encoder embeds it; if many rows are bad,
the scan stops (--allow-bad). What programs write for an empty cell, such as nan or null, is no caption either. Rows
without a split are split here, by their pictures' bytes: train 80 %, val and test 10 % each, at most 5,000.

Each encoder then writes `<encoder>.pt`, one tensor [rows, dim] of unit vectors in row order, shard by shard. Rerun an
interrupted command to resume at the first missing shard; the files get the same bytes. manifest.json is written last
and seals the folder.
"""

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import fnmatch
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import vlm
from hyma.costs import flop_counter
from hyma.datasets import read_corpus
from hyma.embeddings import FORMAT_VERSION, has_unit_rows, hash_keys
from hyma.files import lock_folder, read_jsonl, run_script, save_tensors, sha256_file, write_jsonl
from hyma.folder_jobs import add_folder_flags, run_folder_job
from hyma.packed import picture_bytes
from hyma.scan import check_bad, describe_quarantine, describe_rows, printable, scan_corpus, sort_rows
from hyma.sealing import (
    PartialShard,
    add_to_manifest,
    is_sound_shard,
    open_shards,
    read_manifest,
    seal_folder,
    shard_path,
    sound_record,
    write_manifest,
)
from hyma.signals import Signals
from hyma.splits import known_split
from hyma.standard_sets import STANDARD_SETS, parse_standard_set, read_standard_set
from vlm import BadInput

SAMPLE = Path(__file__).parent / "sample" / "captions.csv"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
COUNTED_CAPTIONS = 64  # at most, for the mean FLOPs of a caption


# ------------------------------------------------------------------------------------------------------------- flags


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--encoder",
        nargs="+",
        metavar="NAME",
        help="short names, wildcards, all | images | texts (the paper's), timm or sentence-transformers names, NAME=SPEC",
    )
    add(
        "--data",
        type=Path,
        default=SAMPLE,
        help="table of image and caption (.csv .tsv .jsonl .parquet .arrow), .tar of samples, LLaVA's, COCO's or Karpathy's "
        f".json, a folder, or NAME:FOLDER of a standard set's files: {' '.join(STANDARD_SETS)} (default: the sample)",
    )
    add("--out", type=Path, help="embedding folder (default: embeddings/<dataset>)")
    add("--image-column", help="column of the image path (default: the first known name)")
    add("--caption-column", help="column of the caption (default: the first known name)")
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="local file or folder of an encoder's weights, instead of the hub",
    )
    add(
        "--allow-bad",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="stop if more of the rows than this cannot be used (default: %(default)s)",
    )
    add("--batch-size", type=int, default=64, help="rows in a forward pass (default: %(default)s)")
    add("--shard-rows", type=int, default=1024, help="rows in a shard, the unit of saving (default: %(default)s)")
    add(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="embed only shards I, I+N, I+2N, ..., so that N processes can share one --out (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float16", help="number format of the stored vectors (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="threads that read pictures (default: %(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    add_folder_flags(parser)
    return parser.parse_args()


def resolve_flags(flags):
    """A copy of the flags, checked, with what they stand for: encoders, weights, data, standard_set, shard, device."""
    standard_set, data = parse_standard_set(flags.data) or (None, flags.data)
    for name in ("batch_size", "shard_rows", "workers"):
        if getattr(flags, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if not 0 <= flags.allow_bad <= 1:
        raise BadInput(f"--allow-bad {flags.allow_bad}: expected a share of the rows, from 0 to 1")
    if flags.shard_rows % flags.batch_size:
        raise BadInput(f"--shard-rows {flags.shard_rows}: must be a multiple of --batch-size {flags.batch_size}")
    index, _, count = flags.shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise BadInput(f"--shard {flags.shard}: expected I/N with 0 <= I < N, such as 0/4")
    if not flags.encoder:
        raise BadInput("--encoder: name the encoders to embed with, or all")
    encoders = choose_encoders(flags.encoder)
    resolved = {
        "encoders": encoders,
        "weights": match_weights(flags.weights, encoders),
        "standard_set": standard_set,
        "data": data,
        "shard": (int(index), int(count)),
        "device": vlm.pick_device(flags.device),
    }
    return argparse.Namespace(**vars(flags) | resolved)


def choose_encoders(names):
    """The encoders that `--encoder` asks for, each once, in the order asked."""
    groups = {"all": vlm.PAPER_ENCODERS, "images": paper_encoders("image"), "texts": paper_encoders("text")}
    chosen = {}
    for name in names:
        found = groups.get(name) or [vlm.ENCODERS[known] for known in fnmatch.filter(vlm.ENCODERS, name)]
        if not found and "*" in name:
            raise BadInput(f"--encoder {name}: matches none of {', '.join(vlm.ENCODERS)}")
        for encoder in found or [vlm.find_encoder(name)]:
            if chosen.setdefault(encoder.name, encoder) != encoder:
                raise BadInput(f"--encoder {name}: two different encoders are named {encoder.name}; use NAME=SPEC")
    return list(chosen.values())


def paper_encoders(kind):
    """The paper's image or text encoders."""
    return [encoder for encoder in vlm.PAPER_ENCODERS if encoder.kind == kind]


def match_weights(items, encoders):
    """{short name: path} of `--weights NAME=PATH ...`."""
    names = {encoder.name for encoder in encoders}
    weights = {}
    for item in items:
        name, _, path = item.partition("=")
        if name not in names or not path:
            raise BadInput(f"--weights {name}: expected NAME=PATH, NAME being an encoder of --encoder")
        weights[name] = path
    return weights


# ------------------------------------------------------------------------------------- the scan: which rows are used


class FixedRows(NamedTuple):
    """The rows of an embedding folder: every encoder embeds these, in this order."""

    out: Path  # the embedding folder
    root: Path  # the folder that image paths start from
    rows: list[dict]  # as in rows.jsonl
    keys_sha256: str  # of `hash_keys`: what the rows are recognised by
    quarantined: int  # rows that cannot be used


def open_folder(flags):
    """Reads the data source and makes the embedding folder, or resumes in it: its FixedRows."""
    if flags.standard_set:
        name = flags.standard_set
    else:
        corpus = read_corpus(flags.data, flags.image_column, flags.caption_column)
        name = corpus.dataset
    out = flags.out or Path("embeddings") / name
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, wait=True):
        if flags.standard_set:  # its pictures may have to be unpacked into the folder
            corpus = read_standard_set(flags.standard_set, flags.data, out)
        for note in corpus.notes:
            print(printable(note))
        fixed = fix_rows(corpus, out, flags)
    print(describe_rows(corpus.source, fixed.rows))
    if fixed.quarantined:
        print(describe_quarantine(out, len(corpus.rows)))
    return fixed


def fix_rows(corpus, out, flags):
    """The rows that an earlier run has fixed, or those that a scan of every picture finds usable.

    Until the folder is sealed, the pictures that were refused are scanned again: they may have been repaired.
    """
    source_sha256 = hashlib.sha256(json.dumps(corpus.rows, default=str).encode()).hexdigest()
    journal = out / ".scan.jsonl"  # of the scan; deleted when the folder is sealed
    fixed = read_fixed_rows(corpus, out, source_sha256, flags.data)
    scans_again = fixed and fixed.quarantined and journal.is_file()
    if fixed and not scans_again:
        return fixed

    pictures = scan_corpus(corpus, source_sha256, journal, flags.workers)
    rows, quarantine, lines = sort_rows(corpus, pictures)
    if fixed and rows == fixed.rows:
        return fixed
    if fixed:
        embedded = ", ".join(read_manifest(out)["encoders"])
        if embedded:
            print(
                f"{out}: pictures that the scan refused can be used now, but {embedded} is embedded without them; choose "
                "another --out to use them"
            )
            return fixed
        print(f"{out}: pictures that the scan refused can be used now")
    write_jsonl(out / "quarantine.jsonl", quarantine)
    check_bad(corpus, quarantine, out, flags.allow_bad)
    for line in lines:
        print(printable(f"{corpus.source}: {line}"))
    write_jsonl(out / "rows.jsonl", rows)
    manifest = new_manifest(corpus, out, rows, len(quarantine), source_sha256)
    write_manifest(out, manifest)
    return FixedRows(out, corpus.root, rows, manifest["keys_sha256"], len(quarantine))


def read_fixed_rows(corpus, out, source_sha256, data):
    """The FixedRows of an earlier run, or None. Raises BadInput if the data source holds other rows now.

    source_sha256: of all rows of the source, the unusable ones too.
    """
    manifest = read_manifest(out)
    if not manifest:
        if any(out.glob("*.pt")):
            raise BadInput(f"{out}: holds embeddings without a manifest.json; choose another --out")
        return None
    if manifest.get("source_sha256") != source_sha256:
        raise BadInput(f"{out}: holds embeddings of other rows than {data} has now; choose another --out")
    rows = read_jsonl(out / "rows.jsonl")
    if hash_keys(rows) != manifest["keys_sha256"]:
        raise BadInput(f"{out}/rows.jsonl: has changed since the scan; choose another --out")
    return FixedRows(out, corpus.root, rows, manifest["keys_sha256"], manifest["quarantined"])


def new_manifest(corpus, out, rows, quarantined, source_sha256):
    """The manifest of a folder whose rows are fixed and which holds no embeddings yet."""
    manifest = {"format_version": FORMAT_VERSION, "dataset": corpus.dataset}
    if corpus.protocol:
        left_out = f", {quarantined:,} rows left out" if quarantined else ""
        manifest["protocol"] = corpus.protocol + left_out
    if has_test_rows(rows) and not has_test_rows(corpus.rows):
        manifest["test_set_aside"] = True
    return manifest | {
        "root": os.path.relpath(corpus.root, out),
        "source_sha256": source_sha256,
        "rows": len(rows),
        "keys_sha256": hash_keys(rows),
        "quarantined": quarantined,
        "encoders": {},
    }


def has_test_rows(rows):
    """Whether some rows are marked as test rows, in any spelling."""
    return any(known_split(row.get("split")) == "test" for row in rows)


# --------------------------------------------------------------------------------------------------------- embedding


def build_encoder(wanted, flags):
    """The encoder with its weights. Raises BadInput if they cannot be had or are another model's."""
    build = vlm.ImageEncoder if wanted.kind == "image" else vlm.TextEncoder
    encoder = build(f"{wanted.name}={wanted.spec}", flags.device, flags.weights.get(wanted.name))
    if wanted.dim not in (None, encoder.embed_dim):
        raise BadInput(f"{wanted.name}: gives vectors of width {encoder.embed_dim}; the registry says {wanted.dim}")
    return encoder


def embed_encoder(wanted, encoder, fixed, flags):
    """Makes `<encoder>.pt`. Returns its manifest record, or None if other processes have not finished their shards."""
    plan = make_plan(wanted, encoder, fixed, flags)
    folder = fixed.out / ".shards" / wanted.name
    with lock_folder(fixed.out, wait=True):
        open_shards(folder, plan | {"shard_rows": flags.shard_rows})
    try:
        embed_shards(wanted.name, encoder, folder, fixed, flags)
    except FileNotFoundError:
        if folder.is_dir():
            raise
        print(f"{wanted.name}: another process finished first")
    with lock_folder(fixed.out, wait=True):
        return join_shards(wanted.name, encoder, folder, plan, fixed, flags.shard_rows)


def make_plan(wanted, encoder, fixed, flags):
    """All that the bytes of an embedding file depend on. Shards that were made by another plan are made again."""
    plan = {
        "kind": wanted.kind,
        "spec": wanted.spec,
        "full_name": encoder.full_name,
        "weights_sha256": vlm.weights_digest(encoder.model),
        "dim": encoder.embed_dim,
        "dtype": flags.dtype,
        "transform": encoder.config,
        "batch_size": flags.batch_size,
        "rows": len(fixed.rows),
        "keys_sha256": fixed.keys_sha256,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "sentence-transformers")},
    }
    return json.loads(json.dumps(plan))  # tuples become lists, as in the plan that is read back from a file


def embed_shards(name, encoder, folder, fixed, flags):
    """Writes those shards of one encoder that are this process's to write and do not exist yet."""
    rows = fixed.rows
    shard_index, shard_count = flags.shard
    starts = range(0, len(rows), flags.shard_rows)[shard_index::shard_count]
    total = 0
    done = 0
    missing = []
    for start in starts:
        part = rows[start : start + flags.shard_rows]
        total += len(part)
        if is_sound_shard(shard_path(folder, start), (len(part), encoder.embed_dim), DTYPES[flags.dtype]):
            done += len(part)
        else:
            missing.append((start, part))
    with (
        tqdm(total=total, initial=done, desc=name, unit="row") as progress,
        ThreadPoolExecutor(flags.workers) as pool,
        Signals() as signals,
    ):
        for start, part in missing:
            if isinstance(encoder, vlm.ImageEncoder):
                partial = PartialShard(shard_path(folder, start), signals)
                shown = progress.n
                vectors = embed_images(encoder, fixed.root, part, flags.batch_size, pool, partial, progress)
                progress.update(shown - progress.n)  # pictures were counted, and a shard counts rows
            else:
                vectors = encoder.encode_text([row["caption"] for row in part], flags.batch_size).cpu()
            off_length = ~((vectors.norm(dim=1) - 1).abs() < 1e-3)  # [rows]; also true for NaN
            if off_length.any():
                bad = part[int(off_length.nonzero()[0])]
                raise BadInput(
                    f"{name}: the vector of row {bad['key']} is zero or not a number; are its weights sound?"
                )
            save_tensors(vectors.to(DTYPES[flags.dtype]), shard_path(folder, start))
            progress.update(len(part))
            signals.leave_if_asked()


def embed_images(encoder, root, rows, batch_size, pool, partial, progress):
    """Unit vectors [rows, dim] of the rows' pictures. A picture with several captions is encoded once."""
    digests = {row["image"]: row.get("image_sha256") for row in rows}  # as the scan read the pictures
    images = list(digests)

    def read_ahead(start):
        futures = []
        for image in images[start : start + batch_size]:
            futures.append(pool.submit(load_pixels, encoder, root / image, digests[image]))
        return futures

    vectors = partial.load()  # of batches that are done
    done = sum(map(len, vectors))
    ahead = read_ahead(done)
    while ahead:
        pixels = torch.stack([future.result() for future in ahead])  # [B, 3, H, W]
        done += len(pixels)
        ahead = read_ahead(done)  # the threads read the next batch while the encoder works on this one
        vectors.append(encoder.encode_image(pixels).cpu())  # [B, dim]
        progress.update(len(pixels))
        if ahead:
            partial.save_when_due(vectors)
    partial.remove()
    place_of_image = dict(zip(images, range(len(images))))
    places = [place_of_image[row["image"]] for row in rows]
    return torch.cat(vectors)[places]


def load_pixels(encoder, path, sha256):
    """Pixels [3, H, W] of a picture that the scan could read, whose bytes are still those of the scan."""
    try:
        data = picture_bytes(path)
        pixels = encoder.transform(vlm.open_image(io.BytesIO(data)))
    except Exception as error:  # nothing else may take its place: the rows are fixed
        raise BadInput(f"{path}: was readable in the scan and is not now ({error}); restore it") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise BadInput(f"{path}: is not the picture that the scan read (sha256); restore it, or choose another --out")
    return pixels


def join_shards(name, encoder, folder, plan, fixed, shard_rows):
    """Joins an encoder's shards to `<encoder>.pt` and adds its record to the manifest, once all shards are there."""
    record = read_manifest(fixed.out)["encoders"].get(name)
    if record is not None:  # another process finished first
        return record
    shards = [shard_path(folder, start) for start in range(0, len(fixed.rows), shard_rows)]
    if not all(map(Path.is_file, shards)):
        return None
    path = fixed.out / f"{name}.pt"
    vectors = torch.cat(list(map(vlm.load_tensors, shards)))  # [rows, dim]
    if not has_unit_rows(vectors, (len(fixed.rows), encoder.embed_dim)):
        raise BadInput(f"{folder}: its shards are damaged; run the same command again to make the bad ones anew")
    save_tensors(vectors, path)
    record = dict(plan)
    flops = count_flops(name, encoder, fixed.rows)
    if flops is not None:
        record["flops_per_row"] = flops
    record["file_sha256"] = sha256_file(path)
    if isinstance(encoder, vlm.TextEncoder):
        record["truncated_captions"] = count_truncated(encoder, fixed.rows)
    add_to_manifest(fixed.out, name, record)
    return record


def count_flops(name, encoder, rows):
    """FLOPs of one row's forward pass, 2 a multiply-add, or None where they cannot be counted.

    An image encoder is given one picture of its input size; a text encoder's number is the mean over captions that are
    spaced evenly over the rows, each encoded alone and so without padding.
    """
    try:
        with flop_counter() as counter:
            if isinstance(encoder, vlm.ImageEncoder):
                passes = 1
                encoder.encode_image(torch.zeros(1, *encoder.config["input_size"]))
            else:
                passes = min(COUNTED_CAPTIONS, len(rows))
                for i in range(passes):
                    encoder.encode_text(rows[i * len(rows) // passes]["caption"])
        return round(counter.get_total_flops() / passes) or None
    except Exception as error:  # the count is a statistic: it must not cost the embeddings
        print(f"{name}: the FLOPs of a row could not be counted ({type(error).__name__})")
        return None


def count_truncated(encoder, rows):
    """How many captions are longer than the text encoder reads, None where it cannot be counted."""
    captions = [row["caption"] for row in rows]
    try:
        limit = encoder.model.max_seq_length
        if not limit:
            return 0
        tokens = encoder.model.tokenizer(captions, truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > limit for ids in tokens)
    except Exception:  # models without transformers' tokenizer; a statistic must not cost the embeddings
        return None


def main():
    flags = parse_flags()
    if run_folder_job(flags, None if flags.data is SAMPLE else flags.data):
        return
    flags = resolve_flags(flags)
    fixed = open_folder(flags)
    out = fixed.out
    print(f"{out}: {len(fixed.rows)} rows; {fixed.quarantined} more are in quarantine.jsonl")
    repeated = len(fixed.rows) - len({row["caption"] for row in fixed.rows})
    if repeated:
        print(f"{out}: {repeated} captions repeat an earlier one; training treats each as a mismatch of the other")

    unfinished, failures = [], []
    for wanted in flags.encoders:
        record = sound_record(out, wanted.name)
        if record is None:
            try:
                encoder = build_encoder(wanted, flags)
            except BadInput as error:  # the others are embedded all the same
                failures.append(error)
                print(f"{wanted.name}: left out: {error}")
                continue
            record = embed_encoder(wanted, encoder, fixed, flags)
        elif record["spec"] != wanted.spec:
            raise BadInput(f"{out}: {wanted.name} stands for {record['spec']} there; give {wanted.spec} another NAME")
        if record is None:
            unfinished.append(wanted.name)
            continue
        shutil.rmtree(out / ".shards" / wanted.name, ignore_errors=True)
        truncated = f", {record['truncated_captions']} captions truncated" if record.get("truncated_captions") else ""
        print(f"{wanted.name}: {record['full_name']}, {record['rows']} x {record['dim']} {record['dtype']}{truncated}")

    if failures:
        if len(failures) == 1:
            raise failures[0]
        if all(isinstance(failure, vlm.MissingWeights) for failure in failures):
            raise vlm.join_missing(failures)
        raise BadInput(f"{len(failures)} encoders could not be loaded, for the reasons above; the first: {failures[0]}")
    if unfinished:
        print(f"{out}: not sealed: other --shard processes have not finished their shards of {', '.join(unfinished)}")
        return
    with lock_folder(out, wait=True):
        seal_folder(out)
        (out / ".scan.jsonl").unlink(missing_ok=True)
    if flags.standard_set:
        following = f"evaluate.py RUN --task {out.name}={out}"
    else:
        following = f"train_hyma.py --data {out} --pairs all"
    print(f"{out}: sealed. Next: python {following}")


if __name__ == "__main__":
    run_script(main)
