"""Your own captioned images as rows: tables and folders. The standard sets are in `hyma/standard_sets.py`.

A row is a dict with these keys; the first two are always there:

    image       path of the picture, from the corpus's root
    caption     text
    label       class, for zero-shot classification
    split       train, val or test
    question, answer, choices    of a multiple-choice question; the choices are a list
    fault       why the row cannot be used, if the reader already knows

To add a kind of table, extend TABLE_SUFFIXES and `read_records`; to add a layout of folders, extend `read_folder`.
"""

import csv
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from vlm import BadInput, open_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}
TABLE_STEMS = ("captions", "metadata", "chat", "blip_laion_cc_sbu_558k")  # where a folder holds several, the first
UNNAMED_STEMS = (*TABLE_STEMS, "train", "data", "dataset", "rows")  # these tables are named after their folder

# Of the columns that a table has, the first one of each list is read.
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "filepath", "file", "path", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "blip_caption", "conversations")
LABEL_COLUMNS = ("label", "class", "category")
QUESTION_COLUMNS = ("question", "answer", "choices")

SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}


class Corpus(NamedTuple):
    """All rows of a data source, before any picture is opened."""

    root: Path  # the folder that image paths start from
    dataset: str  # short name: of the embedding folder, by default
    rows: list[dict]  # as above
    protocol: str | None = None  # of a standard set: which files were read, and how; reported with every score


def read_corpus(data, image_column=None, caption_column=None):
    """The Corpus of a table or a folder. A table with questions needs no captions."""
    if not data.exists():
        raise BadInput(f"--data {data}: no such file or folder")
    table = find_table(data) if data.is_dir() else data
    if table is None:
        return Corpus(data, data.resolve().name, read_folder(data))
    records = read_table(table)
    if not records:
        raise BadInput(f"--data {table}: has no rows")
    if lacks_captions(records[0], caption_column):
        caption_column = "caption"
        for record in records:
            record["caption"] = f"{record['question']} {record['answer']}"
    columns = choose_columns(table, records[0], image_column, caption_column)
    rows = [make_row(record, columns) for record in records]
    name = table.resolve().parent.name if table.stem in UNNAMED_STEMS else table.stem
    return Corpus(find_root(table, rows), name, rows)


# ------------------------------------------------------------------------------------------------------------ tables


def find_table(folder):
    """The table of a folder, or None if it holds none."""
    if (folder / "manifest.json").exists():
        raise BadInput(f"--data {folder}: is a folder of embeddings; embed.py needs the images and captions themselves")
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    for stem in TABLE_STEMS:
        for table in tables:
            if table.stem == stem:
                return table
    if len(tables) > 1:
        found = ", ".join(table.name for table in tables)
        raise BadInput(f"--data {folder}: holds several tables ({found}); name one of them")
    return tables[0] if tables else None


def read_table(path):
    """The records of a table, as dicts."""
    try:
        records = read_records(path)
    except BadInput:
        raise
    except Exception as error:  # json, csv and arrow raise types of their own
        raise BadInput(f"--data {path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise BadInput(f"--data {path}: expected a list of records such as {{'image': 'a.jpg', 'caption': 'a dog'}}")
    return records


def read_records(path):
    """What a table holds, as its suffix says. Raises whatever the readers raise."""
    match path.suffix.lower():
        case ".csv":
            return read_csv(path)
        case ".tsv":
            return read_csv(path, delimiter="\t")
        case ".jsonl":
            with open(path, encoding="utf-8-sig") as file:
                return [json.loads(line) for line in file if line.strip()]
        case ".json":
            return json.loads(path.read_text(encoding="utf-8-sig"))
        case ".parquet":
            try:
                import pyarrow.parquet as parquet
            except ImportError:
                raise BadInput(f"--data {path}: parquet files need pyarrow: pip install pyarrow") from None
            return parquet.read_table(path).to_pylist()
        case _:
            raise BadInput(f"--data {path}: expected {' '.join(sorted(TABLE_SUFFIXES))} or a folder")


def read_csv(path, **dialect):
    """The records of a text table with a header."""
    csv.field_size_limit(2**27)
    # A byte that is not UTF-8 must cost its own row and not the file: the scan finds it again and rejects the row.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file, **dialect))


def lacks_captions(record, caption_column):
    """Whether a table has questions and no captions: then question and answer together are the caption."""
    if any(column in record for column in (caption_column, *CAPTION_COLUMNS)):
        return False
    return all(column in record for column in QUESTION_COLUMNS)


def choose_columns(path, record, image_column, caption_column):
    """Which column of the table each part of a row comes from: {part: column}, by the table's first record."""
    columns = {
        "image": pick_column(path, "image", image_column, record, IMAGE_COLUMNS),
        "caption": pick_column(path, "caption", caption_column, record, CAPTION_COLUMNS),
    }
    label = first_column(LABEL_COLUMNS, record)
    if label is not None:
        columns["label"] = label
    for part in ("split", *QUESTION_COLUMNS):
        if part in record:
            columns[part] = part
    return columns


def pick_column(path, part, asked, record, known):
    """The column that the flag asks for, else the first known one. Raises BadInput where there is none."""
    if asked and asked not in record:
        raise BadInput(f"--{part}-column {asked}: {path} has the columns {', '.join(map(str, record))}")
    column = asked or first_column(known, record)
    if column is None:
        raise BadInput(
            f"--data {path}: no {part} column among {', '.join(map(str, record))}; name it with --{part}-column"
        )
    return column


def first_column(known, record):
    """The first of the known columns that the record has, or None."""
    for column in known:
        if column in record:
            return column
    return None


def make_row(record, columns):
    """The row of a table's record."""
    row = {part: record.get(column) for part, column in columns.items()}
    if columns["caption"] == "conversations":
        row["caption"] = first_answer(row["caption"])
    choices = row.get("choices")
    if isinstance(choices, str) and choices.strip():  # a .csv holds the list as JSON
        try:
            row["choices"] = json.loads(choices)
        except ValueError:
            row["fault"] = "choices are not a JSON list"
    # csv puts fields without a column under None: half of a caption, cut at its comma.
    if None in record:
        row["fault"] = "more fields than columns; a caption with a comma needs quotes"
    return row


def first_answer(conversation):
    """The caption of a LLaVA conversation: the first thing that the model is to answer, or None."""
    for turn in conversation or []:
        if turn.get("from") == "gpt":
            return turn.get("value")
    return None


def find_root(table, rows):
    """The folder that the table's image paths start from: its own, or, as in LLaVA's layout, images/ beside it."""
    images = table.parent / "images"
    if images.is_dir() and not any((table.parent / str(row["image"])).is_file() for row in rows[:100]):
        return images
    return table.parent


# ----------------------------------------------------------------------------------------------------------- folders


def read_folder(root):
    """Rows of a folder without a table: a.jpg with a.txt, or pictures in folders named after their classes."""
    images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not images:
        raise BadInput(f"--data {root}: holds no table ({' '.join(sorted(TABLE_SUFFIXES))}) and no pictures")
    if any(path.with_suffix(".txt").is_file() for path in images):
        return read_text_files(root, images)
    if any(path.parent == root for path in images):
        raise BadInput(
            f"--data {root}: pictures need a caption each: a.txt beside a.jpg, a table, or folders named after classes"
        )
    return read_class_folders(root, images)


def read_text_files(root, images):
    """Rows of a.jpg and a.txt. A picture without a text gets an empty caption, and so a place in the quarantine."""
    rows = []
    for path in images:
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="surrogateescape") if text.is_file() else ""
        rows.append({"image": str(path.relative_to(root)), "caption": caption})
    return rows


def read_class_folders(root, images):
    """Rows of an ImageFolder tree, <class>/a.jpg or <split>/<class>/a.jpg: the classes are captions and labels."""
    paths = [path.relative_to(root) for path in images]
    has_splits = all(path.parts[0] in SPLIT_FOLDERS and len(path.parts) > 2 for path in paths)
    rows = []
    for path in paths:
        label = path.parts[1] if has_splits else path.parts[0]
        row = {"image": str(path), "caption": label.replace("_", " "), "label": label}
        if has_splits:
            row["split"] = path.parts[0]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- which rows are used


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
    path = root / str(row["image"])
    try:
        open_image(path)
    except FileNotFoundError:
        return "missing file"
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them raise
        reason = str(error).replace(str(path), "file")
        return f"unreadable image: {reason.splitlines()[0]}"
    return None


def usable_row(key, row):
    """The row as rows.jsonl holds it."""
    found = {"key": key, "image": str(row["image"]), "caption": " ".join(row["caption"].split())}
    for part in ("label", "split"):
        if row.get(part) not in (None, ""):
            found[part] = str(row[part])
    for part in QUESTION_COLUMNS:
        if row.get(part):
            found[part] = row[part]
    return found


# ----------------------------------------------------------------------------------------------------------- choices


def draw_distractors(key, pool, right, count):
    """Wrong choices: `count` items of the list `pool` that are not in the set `right`, or all of them, if fewer.

    The items of `pool` must all differ. The draw depends on `key` alone: every version of every library draws the same.
    """
    most = min(count, len(pool) - len(right.intersection(pool)))
    drawn = {}  # a dict and not a set: in the order drawn
    turn = 0
    while len(drawn) < most:
        digest = hashlib.sha256(f"{key}:{turn}".encode()).digest()
        item = pool[int.from_bytes(digest[:8]) % len(pool)]
        if item not in right:
            drawn[item] = None
        turn += 1
    return list(drawn)
