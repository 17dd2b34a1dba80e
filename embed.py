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
import csv
import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import vlm
from vlm import BadInput

SAMPLE = Path(__file__).parent / "sample" / "captions.csv"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}
TABLE_STEMS = ("captions", "metadata", "chat", "blip_laion_cc_sbu_558k")  # where a folder holds several, the first
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "file", "path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "blip_caption", "conversations")
LABEL_COLUMNS = ("label", "class", "category")
QUESTION_COLUMNS = ("question", "answer", "choices")
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


def read_corpus(data, image_column=None, caption_column=None):
    """All rows of a corpus before any is checked: (root folder, dataset name, rows).

    A row has image, caption and, where there are such columns, label, split, question, answer, choices (a list; JSON
    in a .csv). A table with questions needs no captions.
    """
    if not data.exists():
        raise BadInput(f"--data {data}: no such file or folder")
    if data.is_dir():
        if (data / "manifest.json").exists():
            raise BadInput(
                f"--data {data}: is a folder of embeddings; embed.py needs the images and captions themselves"
            )
        tables = [path for path in sorted(data.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
        ranked = [path for stem in TABLE_STEMS for path in tables if path.stem == stem]
        if len(tables) > 1 and not ranked:
            raise BadInput(
                f"--data {data}: holds several tables ({', '.join(p.name for p in tables)}); name one of them"
            )
        if not tables:
            return data, data.resolve().name, read_folder(data)
        data = (ranked or tables)[0]
    records = read_table(data)
    if not records:
        raise BadInput(f"--data {data}: has no rows")
    questions = [column for column in QUESTION_COLUMNS if column in records[0]]
    if len(questions) == len(QUESTION_COLUMNS) and not {caption_column, *CAPTION_COLUMNS} & records[0].keys():
        caption_column = "caption"
        records = [{**record, "caption": f"{record['question']} {record['answer']}"} for record in records]
    columns = {
        "image": pick_column(data, "image", image_column, records[0], IMAGE_COLUMNS),
        "caption": pick_column(data, "caption", caption_column, records[0], CAPTION_COLUMNS),
        "label": next((column for column in LABEL_COLUMNS if column in records[0]), None),
        "split": "split" if "split" in records[0] else None,
        **dict(zip(questions, questions)),
    }
    rows = [{part: record.get(column) for part, column in columns.items() if column} for record in records]
    for row, record in zip(rows, records):
        if columns["caption"] == "conversations":  # LLaVA: what the model is to answer is the caption
            row["caption"] = next(
                (turn.get("value") for turn in row["caption"] or [] if turn.get("from") == "gpt"), None
            )
        if isinstance(row.get("choices"), str) and row["choices"].strip():
            try:
                row["choices"] = json.loads(row["choices"])
            except ValueError:
                row["fault"] = "choices are not a JSON list"
        if None in record:  # csv keeps under None what has no column: half a caption, cut at its comma
            row["fault"] = "more fields than columns; a caption with a comma needs quotes"
    root = data.parent
    if not any((root / str(row["image"])).is_file() for row in rows[:100]) and (root / "images").is_dir():
        root = root / "images"  # LLaVA's layout: the table, and the pictures in a folder beside it
    generic = data.stem in TABLE_STEMS + ("train", "data", "dataset", "rows")
    return root, data.resolve().parent.name if generic else data.stem, rows


def read_table(path):
    """The records of a CSV, TSV, JSONL, JSON or parquet file, as dicts."""
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv":
                return read_csv(path, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            case ".jsonl":
                with open(path, encoding="utf-8-sig") as file:
                    records = [json.loads(line) for line in file if line.strip()]
            case ".json":
                records = json.loads(path.read_text(encoding="utf-8-sig"))
            case ".parquet":
                try:
                    import pyarrow.parquet as parquet
                except ImportError:
                    raise BadInput(f"--data {path}: parquet files need pyarrow: pip install pyarrow") from None
                records = parquet.read_table(path).to_pylist()
            case _:
                raise BadInput(f"--data {path}: expected {' '.join(sorted(TABLE_SUFFIXES))} or a folder")
    except BadInput:
        raise
    except Exception as error:  # json, csv and arrow raise types of their own
        raise BadInput(f"--data {path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise BadInput(f"--data {path}: expected a list of records such as {{'image': 'a.jpg', 'caption': 'a dog'}}")
    return records


def read_csv(path, **dialect):
    csv.field_size_limit(2**27)
    # a byte that is not UTF-8 must cost its own row and not the file: it is found again in the scan
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file, **dialect))


def pick_column(path, part, asked, record, known):
    if asked and asked not in record:
        raise BadInput(f"--{part}-column {asked}: {path} has the columns {', '.join(map(str, record))}")
    column = asked or next((column for column in known if column in record), None)
    if column is None:
        raise BadInput(
            f"--data {path}: no {part} column among {', '.join(map(str, record))}; name it with --{part}-column"
        )
    return column


def read_folder(root):
    """Rows of a folder of a.jpg + a.txt, or of an ImageFolder tree, whose class names become captions and labels."""
    images = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not images:
        raise BadInput(f"--data {root}: holds no table ({' '.join(sorted(TABLE_SUFFIXES))}) and no pictures")
    paths = [path.relative_to(root) for path in images]
    if any(path.with_suffix(".txt").is_file() for path in images):
        captions = (path.with_suffix(".txt") for path in images)
        return [
            {
                "image": str(path),
                "caption": text.read_text(encoding="utf-8", errors="surrogateescape") if text.is_file() else "",
            }
            for path, text in zip(paths, captions)
        ]
    if any(len(path.parts) == 1 for path in paths):
        raise BadInput(
            f"--data {root}: pictures need a caption each: a.txt beside a.jpg, a table, or folders named after classes"
        )
    splits = {path.parts[0] for path in paths} <= {"train", "val", "valid", "validation", "test"} and all(
        len(path.parts) > 2 for path in paths
    )
    rows = []
    for path in paths:
        split, label = path.parts[:2] if splits else (None, path.parts[0])
        rows.append(
            {"image": str(path), "caption": label.replace("_", " "), "label": label}
            | ({"split": split} if splits else {})
        )
    return rows


# ------------------------------------------------------------------- standard sets, from their published files

# A reader takes (the folder with a set's files, the embedding folder) and returns (root folder, rows, what was read in
# words: the `protocol` of every score on it). All rows are marked `test`, so that nothing is ever trained on them.


def read_imagenet(data, out):
    """val/<WordNet id>/*.JPEG, or those folders themselves. Class names: torchvision's, which are all different."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    names = dict(zip(ImageNetInfo().label_names(), ResNet50_Weights.DEFAULT.meta["categories"]))
    root = data / "val" if (data / "val").is_dir() else data
    folders = sorted(folder for folder in root.glob("n*") if folder.name in names)
    if not folders:
        raise BadInput(f"--data {data}: expected the validation pictures there, as val/n01440764/*.JPEG and so on")
    rows = [
        {"image": f"{folder.name}/{path.name}", "caption": names[folder.name], "label": names[folder.name]}
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    return root, rows, "ImageNet-1k validation, torchvision's class names"


def read_cifar(data, out, name):
    """The python version's batches, which torchvision checks (MD5) before it unpickles; its pictures become PNG files."""
    from torchvision import datasets

    try:
        found = getattr(datasets, name)(data, train=False, download=False)
    except RuntimeError:
        files = "cifar-10-batches-py" if name == "CIFAR10" else "cifar-100-python"
        raise BadInput(f"--data {data}: expected {files}/ there, whole, as unpacked from the published file") from None
    root, unfinished = out / "images", out / ".images"
    if not root.is_dir():
        unfinished.mkdir(exist_ok=True)
        for k, (image, _) in enumerate(found):
            image.save(unfinished / f"{k:05d}.png")
        os.replace(unfinished, root)
    labels = [found.classes[target] for target in found.targets]
    rows = [{"image": f"{k:05d}.png", "caption": s.replace("_", " "), "label": s} for k, s in enumerate(labels)]
    return root, rows, f"CIFAR-{name[5:]} test"


def read_coco(data, out):
    """annotations/captions_val2017.json and val2017/. Some pictures have six or seven captions: the first five count."""
    table = vlm.read_json(published(data, "annotations/captions_val2017.json"))
    captions = defaultdict(list)
    for note in sorted(table["annotations"], key=lambda note: note["id"]):
        captions[note["image_id"]].append(note["caption"])
    rows = [
        {"image": image["file_name"], "caption": caption}
        for image in table["images"]
        for caption in captions[image["id"]][:5]
    ]
    return published(data, "val2017"), rows, "MSCOCO captions val2017, the first 5 captions of a picture"


def read_flickr(data, out, name):
    """Karpathy's dataset_<name>.json, else a table of captions, which knows his split only if it has that column."""
    tables = (
        f"dataset_{name}.json",
        f"{name.replace('flickr', 'flickr_annotations_')}.csv",
        "captions.txt",
        "results.csv",
    )
    table = published(data, *tables)
    folders = "Images", "images", "Flicker8k_Dataset", "flickr30k-images", "flickr30k_images", "Flickr8k_Dataset"
    root, split = published(data, *folders), f"{name}, Karpathy's test split"
    if table.suffix == ".json":
        images = [image for image in vlm.read_json(table)["images"] if image["split"] == "test"]
        captions = [(image["filename"], sentence["raw"]) for image in images for sentence in image["sentences"]]
    elif table.name not in ("captions.txt", "results.csv"):
        images = [record for record in read_csv(table) if record["split"] == "test"]
        captions = [(image["filename"], caption) for image in images for caption in json.loads(image["raw"])]
    else:
        split = f"{name}, the full set and NOT Karpathy's 1,000 test pictures ({table.name} has no split)"
        if table.name == "captions.txt":  # captions with a comma are quoted
            captions = [(r["image"], None if None in r else r["caption"]) for r in read_csv(table)]
        else:
            records = read_csv(table, delimiter="|", skipinitialspace=True, quoting=csv.QUOTE_NONE)
            captions = [(record["image_name"], record["comment"]) for record in records]  # None where a bar is missing
    return root, [{"image": image, "caption": caption} for image, caption in captions], split


def read_okvqa(data, out):
    """The v1.1 questions and annotations of val2014, and the pictures in val2014/."""
    questions = vlm.read_json(published(data, "OpenEnded_mscoco_val2014_questions.json"))["questions"]
    answers = {
        note["question_id"]: [answer["answer"] for answer in note["answers"]]
        for note in vlm.read_json(published(data, "mscoco_val2014_annotations.json"))["annotations"]
    }
    asked = [
        (q["question_id"], f"COCO_val2014_{q['image_id']:012d}.jpg", q["question"], answers[q["question_id"]])
        for q in questions
    ]
    return published(data, "val2014"), multiple_choice(asked), f"OK-VQA val2014, {CHOICES}"


def read_textvqa(data, out):
    """TextVQA_0.5.1_val.json, and the pictures in train_images/, where its validation pictures are too."""
    notes = vlm.read_json(published(data, "TextVQA_0.5.1_val.json"))["data"]
    asked = [(q["question_id"], f"{q['image_id']}.jpg", q["question"], q["answers"]) for q in notes]
    return published(data, "train_images"), multiple_choice(asked), f"TextVQA 0.5.1 val, {CHOICES}"


CHOICES = "most frequent answer among 3 such answers to other questions with the same first word"


def multiple_choice(asked):
    """Rows of [(question id, image, question, answers of all who were asked)].

    The open question becomes one of four choices: its most frequent answer, and three that are the most frequent ones
    of other questions which begin with the same word (of any, where those are too few), none of which anybody gave to
    this question. Drawn by the question's id alone.
    """
    best = [Counter(answers).most_common(1)[0][0] for _, _, _, answers in asked]
    pools = defaultdict(dict)
    for (_, _, question, _), answer in zip(asked, best):
        pools[question.lower().split()[0]][answer] = pools[None][answer] = None
    rows = []
    for (number, image, question, answers), answer in zip(asked, best):
        pool = pools[question.lower().split()[0]]
        pool = list(pool if len(pool.keys() - answers) >= 3 else pools[None])
        choices = sorted([answer, *vlm.draw_distractors(number, pool, set(answers), 3)])
        row = {"image": image, "caption": f"{question} {answer}", "question": question, "answer": answer}
        rows.append(row | {"choices": choices})
    return rows


def published(data, *names):
    """The first of these files or folders that is in a standard set's folder."""
    for name in names:
        if (data / name).exists():
            return data / name
    raise BadInput(f"--data {data}: expected {' or '.join(names)} there")


STANDARD_SETS = {
    "imagenet1k": read_imagenet,
    "cifar10": functools.partial(read_cifar, name="CIFAR10"),
    "cifar100": functools.partial(read_cifar, name="CIFAR100"),
    "coco": read_coco,
    "flickr8k": functools.partial(read_flickr, name="flickr8k"),
    "flickr30k": functools.partial(read_flickr, name="flickr30k"),
    "okvqa": read_okvqa,
    "textvqa": read_textvqa,
}


def read_standard_set(name, data, out):
    """(root folder, name, rows, protocol) of a standard set. Raises BadInput for a file that is missing or not its."""
    try:
        root, rows, protocol = STANDARD_SETS[name](data, out)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"--data {name}:{data}: not as published: {type(error).__name__}: {error}") from None
    if not rows:
        raise BadInput(f"--data {name}:{data}: its files hold no row of this set")
    return root, name, [row | {"split": "test"} for row in rows], protocol


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
        kept = vlm.read_jsonl(out / "rows.jsonl")
        if vlm.hash_keys(kept) != manifest["keys_sha256"]:
            raise BadInput(f"{out}/rows.jsonl: has changed since the scan; choose another --out")
        return root, kept, manifest
    if any(out.glob("*.pt")):
        raise BadInput(f"{out}: holds embeddings without a manifest.json; choose another --out")
    kept, quarantine = scan(root, rows, listing, out / ".scan.jsonl", flags.workers)
    vlm.write_jsonl(out / "quarantine.jsonl", quarantine)
    vlm.write_jsonl(out / "rows.jsonl", kept)
    manifest = {
        "format_version": vlm.FORMAT_VERSION,
        "dataset": dataset,
        **({"protocol": protocol} if protocol else {}),
        "root": os.path.relpath(root, out),
        "source_sha256": listing,
        "rows": len(kept),
        "keys_sha256": vlm.hash_keys(kept),
        "quarantined": len(quarantine),
        "encoders": {},
    }
    vlm.write_json(out / "manifest.partial.json", manifest)
    (out / ".scan.jsonl").unlink()
    return root, kept, manifest


def read_manifest(out):
    """The manifest in the making, else the one that seals the folder, else None."""
    found = [out / name for name in ("manifest.partial.json", "manifest.json") if (out / name).is_file()]
    return vlm.read_json(found[0]) if found else None


def scan(root, rows, listing, journal, workers):
    """Decodes every picture once: (rows that can be used, [{key, reason}] of the others).

    The journal holds one verdict a line, in row order, so that an interrupted scan goes on where it was.
    """
    reasons = []
    if journal.is_file():
        lines = journal.read_text().split("\n")[:-1]  # a line without its end was cut off
        if lines and json.loads(lines[0]) == listing:
            reasons = [json.loads(line) for line in lines[1:]]
    vlm.write_jsonl(journal, [listing, *reasons])
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
            vlm.save_tensors(vectors.to(DTYPES[flags.dtype]), path)
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
    with vlm.lock_folder(out, wait=True):
        if folder.is_dir() and (not (folder / "plan.json").is_file() or vlm.read_json(folder / "plan.json") != made_by):
            print(f"{wanted.name}: an earlier run's shards were made with other weights or flags; starting again")
            shutil.rmtree(folder)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            vlm.write_json(folder / "plan.json", made_by)
    try:
        embed_shards(wanted.name, encoder, rows, root, folder, flags)
    except FileNotFoundError:
        if folder.is_dir():
            raise
        print(f"{wanted.name}: another process came to the end first")

    shards = [shard_path(folder, start) for start in range(0, len(rows), flags.shard_rows)]
    with vlm.lock_folder(out, wait=True):
        if (record := read_manifest(out)["encoders"].get(wanted.name)) is not None:
            return record  # another process came to the end first
        if not all(shard.is_file() for shard in shards):
            return None
        vlm.save_tensors(torch.cat([vlm.load_tensors(shard) for shard in shards]), out / f"{wanted.name}.pt")
        record = plan | {"file_sha256": vlm.sha256_file(out / f"{wanted.name}.pt")}
        if wanted.kind == "text":
            record["truncated_captions"] = count_truncated(encoder, rows)
        manifest = read_manifest(out)
        manifest["encoders"][wanted.name] = record
        vlm.write_json(out / "manifest.partial.json", manifest)
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
    with vlm.lock_folder(out, wait=True):
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
    with vlm.lock_folder(out, wait=True):
        if (out / "manifest.partial.json").is_file():
            os.replace(out / "manifest.partial.json", out / "manifest.json")
    follows = (
        f"evaluate.py RUN --task {out.name}={out}" if flags.standard_set else f"train_hyma.py --data {out} --pairs all"
    )
    print(f"{out}: sealed. Next: python {follows}")


if __name__ == "__main__":
    vlm.run_script(main)
