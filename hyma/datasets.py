"""Captioned images to rows: tables, folders, and standard sets from their published files."""

import csv
import functools
import hashlib
import json
import os
from collections import Counter, defaultdict

import vlm
from vlm import BadInput

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}

TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}

TABLE_STEMS = ("captions", "metadata", "chat", "blip_laion_cc_sbu_558k")  # where a folder holds several, the first

IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "file", "path", "img")

CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "blip_caption", "conversations")

LABEL_COLUMNS = ("label", "class", "category")

QUESTION_COLUMNS = ("question", "answer", "choices")


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
        choices = sorted([answer, *draw_distractors(number, pool, set(answers), 3)])
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


def draw_distractors(key, pool, right, count):
    """`count` of the different items of the list `pool` that are not in the set `right` (all, if there are fewer),
    drawn by `key` alone: the same ones with every version of everything."""
    drawn, turn, most = {}, 0, min(count, len(pool) - len(right.intersection(pool)))
    while len(drawn) < most:
        item = pool[int.from_bytes(hashlib.sha256(f"{key}:{turn}".encode()).digest()[:8]) % len(pool)]
        if item not in right:
            drawn[item] = None
        turn += 1
    return list(drawn)
