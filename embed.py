"""Embeds captioned images once per frozen encoder: images + captions -> embeddings/<dataset>/.

    python embed.py --encoder vit_l16 minilm mpnet                    # the sample's pictures, registered encoders
    python embed.py --encoder all --data my/captions.csv              # your pictures, the paper's nine and three
    python embed.py --encoder dino=timm:vit_small_patch14_dinov2.lvd142m --data my/captions.csv
    python embed.py --encoder all --data coco:/data/coco              # a standard set, from its published files
    python embed.py --encoder control --out embeddings/try            # needs no network, a minute on a CPU

One scan fixes the rows before the first encoder runs: a picture that cannot be read or a row without a caption goes to
quarantine.jsonl with the reason and is missing for every encoder alike. Each encoder then writes `<encoder>.pt`, one
tensor [rows, dim] of unit vectors in row order, shard by shard: an interrupted run, started again, goes on with the
first missing shard and ends with the same bytes. manifest.json is written last and seals the folder.
"""

import argparse
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import vlm
from hyma.datasets import QUESTION_COLUMNS, STANDARD_SETS, read_corpus, read_standard_set
from hyma.embeddings import FORMAT_VERSION, hash_keys, read_manifest
from hyma.files import lock_folder, read_jsonl, run_script, save_tensors, sha256_file, write_json, write_jsonl
from vlm import BadInput

SAMPLE = Path(__file__).parent / "sample" / "captions.csv"
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--encoder",
        nargs="+",
        required=True,
        metavar="NAME",
        help="short names, wildcards, all | images | texts (the paper's), timm or sentence-transformers names, NAME=SPEC",
    )
    add(
        "--data",
        type=Path,
        default=SAMPLE,
        help="table of image path and caption (.csv .tsv .jsonl .parquet), LLaVA .json, a folder, or NAME:FOLDER of a "
        f"standard set's files: {' '.join(STANDARD_SETS)} (default: the sample)",
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
    add("--batch-size", type=int, default=64, help="rows an encoder takes at once (default: %(default)s)")
    add("--shard-rows", type=int, default=1024, help="rows between two saves (default: %(default)s)")
    add(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="do every N-th shard from I on: one of N processes on one --out (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float16", help="of the stored vectors (default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="threads that read pictures (default: %(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    flags = parser.parse_args()
    standard_set, _, folder = str(flags.data).partition(":")
    flags.standard_set = standard_set if folder and standard_set in STANDARD_SETS else None
    if flags.standard_set:
        flags.data = Path(folder)
        if not flags.data.is_dir():
            raise BadInput(f"--data {standard_set}:{folder}: no such folder")
    for name in ("batch_size", "shard_rows", "workers"):
        if getattr(flags, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1")
    if flags.shard_rows % flags.batch_size:
        raise BadInput(f"--shard-rows {flags.shard_rows}: must be a multiple of --batch-size {flags.batch_size}")
    index, _, count = flags.shard.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise BadInput(f"--shard {flags.shard}: expected I/N with 0 <= I < N, such as 0/4")
    flags.shard = int(index), int(count)
    return flags


def choose_encoders(names):
    """The encoders that `--encoder` asks for, each once, in the order asked."""
    groups = {
        "all": vlm.PAPER_ENCODERS,
        "images": [encoder for encoder in vlm.PAPER_ENCODERS if encoder.kind == "image"],
        "texts": [encoder for encoder in vlm.PAPER_ENCODERS if encoder.kind == "text"],
    }
    chosen = {}
    for name in names:
        found = groups.get(name) or [vlm.ENCODERS[n] for n in fnmatch.filter(vlm.ENCODERS, name)]
        if not found and "*" in name:
            raise BadInput(f"--encoder {name}: matches none of {', '.join(vlm.ENCODERS)}")
        for encoder in found or [vlm.find_encoder(name)]:
            if chosen.setdefault(encoder.name, encoder) != encoder:
                raise BadInput(f"--encoder {name}: two different encoders are named {encoder.name}; use NAME=SPEC")
    return list(chosen.values())


# ------------------------------------------------------------------------------- which rows: a table or a folder


# ------------------------------------------------------------------- standard sets, from their published files

# A reader takes (the folder with a set's files, the embedding folder) and returns (root folder, rows, what was read in
# words: the `protocol` of every score on it). All rows are marked `test`, so that nothing is ever trained on them.


# ---------------------------------------------------------------------------- the scan: which rows can be used


def fix_rows(flags, out):
    """The folder's rows and its manifest so far: what an earlier run has fixed, or a scan of every picture now."""
    if flags.standard_set:
        root, dataset, rows, protocol = read_standard_set(flags.standard_set, flags.data, out)
    else:
        (root, dataset, rows), protocol = read_corpus(flags.data, flags.image_column, flags.caption_column), None
    listing = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    if manifest := read_manifest(out):
        if manifest.get("source_sha256") != listing:
            raise BadInput(f"{out}: holds embeddings of other rows than {flags.data} has now; choose another --out")
        kept = read_jsonl(out / "rows.jsonl")
        if hash_keys(kept) != manifest["keys_sha256"]:
            raise BadInput(f"{out}/rows.jsonl: has changed since the scan; choose another --out")
        return root, kept, manifest
    if any(out.glob("*.pt")):
        raise BadInput(f"{out}: holds embeddings without a manifest.json; choose another --out")
    kept, quarantine = scan(root, rows, listing, out / ".scan.jsonl", flags.workers)
    write_jsonl(out / "quarantine.jsonl", quarantine)
    write_jsonl(out / "rows.jsonl", kept)
    manifest = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        **({"protocol": protocol} if protocol else {}),
        "root": os.path.relpath(root, out),
        "source_sha256": listing,
        "rows": len(kept),
        "keys_sha256": hash_keys(kept),
        "quarantined": len(quarantine),
        "encoders": {},
    }
    write_json(out / "manifest.partial.json", manifest)
    (out / ".scan.jsonl").unlink()
    return root, kept, manifest


def scan(root, rows, listing, journal, workers):
    """Decodes every picture once: (rows that can be used, [{key, reason}] of the others).

    The journal holds one verdict a line, in row order, so that an interrupted scan goes on where it was.
    """
    reasons = []
    if journal.is_file():
        lines = journal.read_text().split("\n")[:-1]  # a line without its end was cut off
        if lines and json.loads(lines[0]) == listing:
            reasons = [json.loads(line) for line in lines[1:]]
    write_jsonl(journal, [listing, *reasons])
    bar = tqdm(total=len(rows), initial=len(reasons), desc="scan", unit="row")
    with bar as progress, open(journal, "a") as file, ThreadPoolExecutor(workers) as pool:
        for start in range(len(reasons), len(rows), 256):
            verdicts = list(pool.map(lambda row: why_unusable(root, row), rows[start : start + 256]))
            file.writelines(json.dumps(verdict) + "\n" for verdict in verdicts)
            file.flush()
            reasons += verdicts
            progress.update(len(verdicts))

    kept, quarantine, seen = [], [], {}
    for row, reason in zip(rows, reasons):
        image = str(row["image"])
        seen[image] = seen.get(image, 0) + 1
        key = image if seen[image] == 1 else f"{image}#{seen[image]}"  # one more caption of the same picture
        if reason:
            quarantine.append({"key": key.encode(errors="replace").decode(), "reason": reason})
        else:
            parts = {part: str(row[part]) for part in ("label", "split") if row.get(part) not in (None, "")}
            parts |= {part: row[part] for part in QUESTION_COLUMNS if row.get(part)}
            kept.append({"key": key, "image": image, "caption": " ".join(row["caption"].split()), **parts})
    if not kept:
        raise BadInput(
            f"--data {root}: no row can be used; the first, {quarantine[0]['key']}: {quarantine[0]['reason']}"
        )
    return kept, quarantine


def why_unusable(root, row):
    """The reason why a row cannot be used, or None."""
    if "fault" in row:
        return row["fault"]
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        return "empty caption"
    try:
        f"{row['image']} {row['caption']}".encode()
    except UnicodeEncodeError:
        return "not UTF-8"
    if not row["image"]:
        return "no image path"
    try:
        vlm.open_image(root / str(row["image"]))
    except FileNotFoundError:
        return "missing file"
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        return f"unreadable image: {str(error).replace(str(root / str(row['image'])), 'file').splitlines()[0]}"
    return None


# ------------------------------------------------------------------------------------------------- the embedding


def embed_images(encoder, root, rows, batch_size, pool):
    """Unit vectors [rows, dim] of the rows' pictures; the captions of one picture share one pass."""

    def load(image):
        try:
            return encoder.transform(vlm.open_image(root / image))
        except Exception as error:  # it could be read in the scan: never put anything else in its place
            raise BadInput(f"{root / image}: was readable in the scan and is not now ({error}); restore it") from None

    images = list(dict.fromkeys(row["image"] for row in rows))
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    vectors, ahead = [], [pool.submit(load, image) for image in batches[0]]
    for batch in [*batches[1:], []]:  # the threads read the next batch while the encoder works on this one
        pixels, ahead = torch.stack([future.result() for future in ahead]), [pool.submit(load, i) for i in batch]
        vectors.append(encoder.encode_image(pixels).cpu())  # [B, dim]
    place = {image: i for i, image in enumerate(images)}
    return torch.cat(vectors)[[place[row["image"]] for row in rows]]


def embed_shards(name, encoder, rows, root, folder, flags):
    """Writes those shards of one encoder that are this process's to write and not yet there."""
    index, count = flags.shard
    starts = list(range(0, len(rows), flags.shard_rows))[index::count]
    shards = {shard_path(folder, start): rows[start : start + flags.shard_rows] for start in starts}
    todo = {path: part for path, part in shards.items() if not path.is_file()}
    total, done = sum(map(len, shards.values())), sum(len(part) for path, part in shards.items() if path not in todo)
    bar = tqdm(total=total, initial=done, desc=name, unit="row")
    with bar as progress, ThreadPoolExecutor(flags.workers) as pool:
        for path, part in todo.items():
            if isinstance(encoder, vlm.ImageEncoder):
                vectors = embed_images(encoder, root, part, flags.batch_size, pool)  # [rows, dim]
            else:
                vectors = encoder.encode_text([row["caption"] for row in part], flags.batch_size).cpu()
            if len(bad := (~((vectors.norm(dim=1) - 1).abs() < 1e-3)).nonzero()):
                raise BadInput(
                    f"{name}: the vector of row {part[bad[0]]['key']} is zero or not a number; are its weights sound?"
                )
            save_tensors(vectors.to(DTYPES[flags.dtype]), path)
            progress.update(len(part))


def shard_path(folder, start):
    return folder / f"{start:09d}.pt"


def count_truncated(encoder, rows):
    """How many captions are longer than the text encoder reads."""
    limit, tokenizer = encoder.model.max_seq_length, encoder.model.tokenizer
    tokens = tokenizer([row["caption"] for row in rows], truncation=False, verbose=False)["input_ids"]
    return sum(len(ids) > limit for ids in tokens) if limit else 0


def embed_encoder(wanted, weights, root, rows, keys_sha256, flags, out):
    """Makes `<encoder>.pt`. Returns its manifest record, or None while other processes still owe shards."""
    build = vlm.ImageEncoder if wanted.kind == "image" else vlm.TextEncoder
    encoder = build(f"{wanted.name}={wanted.spec}", flags.device, weights)
    if wanted.dim not in (None, encoder.embed_dim):
        raise BadInput(f"{wanted.name}: gives vectors of width {encoder.embed_dim}; the registry says {wanted.dim}")
    plan = {
        "kind": wanted.kind,
        "spec": wanted.spec,
        "full_name": encoder.full_name,
        "weights_sha256": vlm.weights_digest(encoder.model),
        "dim": encoder.embed_dim,
        "dtype": flags.dtype,
        "transform": encoder.config,
        "batch_size": flags.batch_size,
        "rows": len(rows),
        "keys_sha256": keys_sha256,
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "timm", "sentence-transformers")},
    }
    plan = json.loads(json.dumps(plan))  # as it will be when read back: tuples have become lists
    folder, made_by = out / ".shards" / wanted.name, plan | {"shard_rows": flags.shard_rows}
    with lock_folder(out, wait=True):
        if folder.is_dir() and (not (folder / "plan.json").is_file() or vlm.read_json(folder / "plan.json") != made_by):
            print(f"{wanted.name}: an earlier run's shards were made with other weights or flags; starting again")
            shutil.rmtree(folder)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            write_json(folder / "plan.json", made_by)
    try:
        embed_shards(wanted.name, encoder, rows, root, folder, flags)
    except FileNotFoundError:
        if folder.is_dir():
            raise
        print(f"{wanted.name}: another process came to the end first")

    shards = [shard_path(folder, start) for start in range(0, len(rows), flags.shard_rows)]
    with lock_folder(out, wait=True):
        if (record := read_manifest(out)["encoders"].get(wanted.name)) is not None:
            return record  # another process came to the end first
        if not all(shard.is_file() for shard in shards):
            return None
        save_tensors(torch.cat([vlm.load_tensors(shard) for shard in shards]), out / f"{wanted.name}.pt")
        record = plan | {"file_sha256": sha256_file(out / f"{wanted.name}.pt")}
        if wanted.kind == "text":
            record["truncated_captions"] = count_truncated(encoder, rows)
        manifest = read_manifest(out)
        manifest["encoders"][wanted.name] = record
        write_json(out / "manifest.partial.json", manifest)
        return record


def main():
    flags = parse_flags()
    encoders = choose_encoders(flags.encoder)
    weights = dict(item.partition("=")[::2] for item in flags.weights)
    for name, path in weights.items():
        if name not in {encoder.name for encoder in encoders} or not path:
            raise BadInput(f"--weights {name}: expected NAME=PATH, NAME being an encoder of --encoder")
    flags.device = vlm.pick_device(flags.device)
    name = flags.standard_set or read_corpus(flags.data, flags.image_column, flags.caption_column)[1]
    out = flags.out or Path("embeddings") / name
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, wait=True):
        root, rows, manifest = fix_rows(flags, out)
    repeated = len(rows) - len({row["caption"] for row in rows})
    print(f"{out}: {len(rows)} rows; {manifest['quarantined']} more are in quarantine.jsonl")
    if repeated:
        print(f"{out}: {repeated} captions repeat an earlier one; training takes each for a mismatch of the other")

    missing = []
    for wanted in encoders:
        record = read_manifest(out)["encoders"].get(wanted.name)  # by now another process may have made it
        if record is None:
            record = embed_encoder(wanted, weights.get(wanted.name), root, rows, manifest["keys_sha256"], flags, out)
        elif record["spec"] != wanted.spec:
            raise BadInput(f"{out}: {wanted.name} stands for {record['spec']} there; give {wanted.spec} another NAME")
        if record is None:
            missing.append(wanted.name)
            continue
        shutil.rmtree(out / ".shards" / wanted.name, ignore_errors=True)
        cut = f", {record['truncated_captions']} captions read in part" if record.get("truncated_captions") else ""
        print(f"{wanted.name}: {record['full_name']}, {record['rows']} x {record['dim']} {record['dtype']}{cut}")

    if missing:
        print(f"{out}: not sealed: other --shard processes still owe parts of {', '.join(missing)}")
        return
    with lock_folder(out, wait=True):
        if (out / "manifest.partial.json").is_file():
            os.replace(out / "manifest.partial.json", out / "manifest.json")
    follows = (
        f"evaluate.py RUN --task {out.name}={out}" if flags.standard_set else f"train_hyma.py --data {out} --pairs all"
    )
    print(f"{out}: sealed. Next: python {follows}")


if __name__ == "__main__":
    run_script(main)
