"""Your own captioned pictures as rows: tables and folders. The standard sets are in `hyma/standard_sets.py`.

A row is a dict with these keys; the first two are always there:

    image       path of the picture, from the corpus's root
    caption     text
    label       class, for zero-shot classification
    split       train, val or test, as the source spells it
    question, answer, choices    of a multiple-choice question; the choices are a list
    fault       why the row cannot be used, if the reader already knows

To add a kind of file, extend TABLE_SUFFIXES and `read_records`; to add a layout of folders, extend `read_folder`.
"""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from hyma.annotations import is_token_file, token_records
from hyma.arrow_tables import find_saved_dataset, read_arrow, read_parquet
from hyma.braces import expand_braces
from hyma.columns import choose_columns, is_known, make_rows, named, type_labels
from hyma.inflating import METHODS
from hyma.picture_folders import (
    CAPTION_SUFFIXES,
    find_caption_files,
    read_class_folders,
    read_text_files,
    split_of_folders,
)
from hyma.pictures import IMAGE_SUFFIXES, OTHER_SUFFIXES, find_file, holds_picture, is_file
from hyma.remote import find_remote, list_remote, local_path, open_file, open_source
from hyma.splits import known_split, split_of_words
from hyma.tables import Table, choose_delimiter, read_json_table, read_text, read_text_table
from hyma.tars import read_tar
from vlm import BadInput, check_regular

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow", ".tar")
SHARD_SUFFIXES = (".parquet", ".arrow")  # of which a corpus has many files
TAR_SUFFIXES = (".tar", *METHODS)
ARCHIVE_SUFFIXES = (".zip", ".gz", ".tgz", ".zst", ".7z", ".rar")
TABLE_STEMS = ("captions", "metadata", "chat", "blip_laion_cc_sbu_558k")  # where a folder holds several, the first
UNNAMED_STEMS = (*TABLE_STEMS, "train", "data", "dataset", "rows")  # these tables are named after their folder

ANNOTATION_FOLDER = re.compile(r"annotations?|captions?|(.*_)?text", re.I)  # in which a table lies beside its pictures
HIDDEN = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found")


class Corpus(NamedTuple):
    """All rows of a data source, before any picture is opened."""

    root: Path  # the folder that image paths start from
    dataset: str  # short name: of the embedding folder, by default
    rows: list[dict]  # as above
    protocol: str | None = None  # of a standard set: which files were read, and how; reported with every score
    source: str = ""  # what was read, for messages
    notes: tuple[str, ...] = ()  # what had to be found out about it, a line each


def read_corpus(data, image_column=None, caption_column=None):
    """The Corpus of a table or a folder. A table with questions needs no captions."""
    asked = Asked(image_column, caption_column)
    data = local_path(data)
    if is_pattern(data):
        return read_files(data, asked)
    if open_source(data):
        return read_remote(data, asked)
    if not data.exists():
        raise BadInput(f"--data {data}: no such file or folder")
    if data.is_file():
        return read_tables(data.parent, [data], asked)
    if not data.is_dir():
        raise BadInput(f"--data {data}: is no regular file and no folder")
    if (data / "manifest.json").exists():
        raise BadInput(f"--data {data}: is a folder of embeddings; embed.py needs the images and captions themselves")
    notes = []
    tables = find_saved_dataset(data) or find_tables(data, [path for path in sorted(data.iterdir()) if is_file(path)])
    if not tables:
        files, notes = list_files(data)
        tables = find_tables(data, files)
    if tables:
        corpus = read_tables(data, tables, asked)
    else:
        corpus = read_folder(data, files)
    return corpus._replace(notes=(*notes, *corpus.notes))


def is_pattern(data):
    """Whether a path stands for several files, by braces or by a *, and is none itself."""
    return ("*" in str(data) or len(expand_braces(str(data))) > 1) and not data.exists()


def read_files(pattern, asked):
    """The Corpus of the tables that a pattern names."""
    paths = [Path(text) for text in expand_braces(str(pattern))]
    files = []
    for path in paths:
        if "*" in path.name:
            files += match_files(path)
        elif open_source(path) or path.is_file():
            files.append(path)
        else:
            raise BadInput(f"--data: {path}: no such file; the pattern names {len(paths):,}, from {paths[0]} to {paths[-1]}")
    root = Path(os.path.commonpath([path.parent for path in files]))
    return read_tables(root, files, asked)


def match_files(pattern):
    """The files of a folder whose names have the form of a path's name, in which * is, sorted."""
    folder = pattern.parent
    if open_source(folder):
        files = list_remote(folder, pattern)
    else:
        files = sorted(path for path in folder.glob(pattern.name) if path.is_file())
    if not files:
        raise BadInput(f"--data {pattern}: matches no file")
    return files


def read_remote(data, asked):
    """The Corpus of a table or a folder behind a URL."""
    files = list_remote(data)
    if files == [data]:
        return read_tables(data.parent, files, asked)
    tables = find_tables(data, [path for path in files if path.parent == data]) or find_tables(data, files)
    return read_tables(data, tables, asked) if tables else read_folder(data, files)


# ----------------------------------------------------------------------------------------------- which files are read


def list_files(root):
    """(all files below a folder, sorted; lines about what was passed over). Hidden files and folders are not there.

    Links to folders are followed, each folder once: a link that leads back is a loop and is passed over.
    """
    files = []
    links = []
    seen = set()

    def list_folder(folder):
        seen.add(os.path.realpath(folder))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name.casefold() in HIDDEN:
                continue
            path = Path(entry.path)
            is_link = entry.is_symlink()
            if not is_link and entry.is_dir():
                list_folder(path)
            elif os.path.isdir(path):
                links.append(path)
            # a link that leads nowhere is a picture that is missing
            elif os.path.isfile(path) or (is_link and path.suffix.lower() in IMAGE_SUFFIXES):
                files.append(path)

    list_folder(root)
    passed_over = []
    while links:
        link = links.pop(0)
        if os.path.realpath(link) in seen:
            passed_over.append(str(link.relative_to(root)))
        else:
            list_folder(link)
    notes = []
    if passed_over:
        notes.append(f"links to folders that are read already: {named(passed_over)}")
    return sorted(files), notes


def find_tables(root, files):
    """The tables that a folder's rows are read from, or none: its own, else those below it.

    Of several, those named in TABLE_STEMS; else those named after splits; else all parts of one table.
    """
    found = list_tables(files)
    own = []
    known = []
    for path in found:
        if path.parent == root:
            own.append(path)
        if path.stem in TABLE_STEMS or path.stem.startswith("captions_"):  # COCO's, beside its boxes
            known.append(path)
    for stem in TABLE_STEMS:
        for path in own:
            if path.stem == stem:
                return [path]
    tables = own or known or found
    if are_one_corpus(tables):
        return tables
    raise BadInput(f"--data {root}: holds several tables ({names_from(root, tables)}); name one of them")


def list_tables(files):
    """The files that are tables, without those about a picture or an archive: img2dataset writes one beside each."""
    described = set()  # files whose table of the same name is about them, without their suffixes
    folders_of_archives = set()
    for path in files:
        if is_tar(path):
            described.add(path.with_name(path.name[: -len(table_suffix(path))]))
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            described.add(path.with_suffix(""))
        if is_tar(path):
            folders_of_archives.add(path.parent)
    tables = []
    for path in files:
        suffix = path.suffix.lower()
        is_about_others = path.with_suffix("") in described or path.stem.endswith("_stats")
        lists_archives = suffix == ".json" and path.parent in folders_of_archives  # webdataset's own
        if is_tar(path):
            tables.append(path)
        elif is_about_others or lists_archives:
            continue
        elif suffix in TABLE_SUFFIXES or is_token_file(path) or is_text_list(path):
            tables.append(path)
    return tables


def table_suffix(path):
    """The ending of a file's name, small: of a compressed tar, both parts."""
    for suffix in TAR_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    return path.suffix.lower()


def is_tar(path):
    return table_suffix(path) in TAR_SUFFIXES


def is_text_list(path):
    """Whether a .txt file is a table with a header, as Flickr8k's captions.txt is."""
    if path.suffix.lower() != ".txt" or path.stem not in TABLE_STEMS:
        return False
    with open_file(path) as file:
        header = file.readline().decode(errors="replace")
    names = header.split(choose_delimiter(header, ",", is_known))
    return any(is_known(name, "image") for name in names) and any(is_known(name, "caption") for name in names)


def are_one_corpus(tables):
    """Whether tables are read together: each in a folder of its own, all named after splits, or all shards of one kind."""
    folders = {path.parent for path in tables}
    if len(tables) < 2 or len(folders) == len(tables):
        return True
    suffixes = {table_suffix(path) for path in tables}
    if len(suffixes) == 1 and suffixes.issubset((*SHARD_SUFFIXES, *TAR_SUFFIXES)):
        return True
    return all(split_of_words(path.stem) or path.stem in TABLE_STEMS for path in tables)


def names_from(root, paths):
    """Paths as they are named from the root, for a message."""
    return named([path.relative_to(root) for path in paths])


# ------------------------------------------------------------------------------------------------------------ tables


class Asked(NamedTuple):
    """The columns that flags name, None for those that are found."""

    image: str | None = None
    caption: str | None = None

    def is_known(self, name, part=None):
        """Whether a column is asked for, or has a name that is read, as any part of a row or as this one."""
        asked = [self.image] if part == "image" else [self.image, self.caption]
        return name in asked or is_known(name, part)


def read_tables(root, paths, asked):
    """The Corpus of one or several tables."""
    rows = []
    paths_of_note = {}  # how tables were understood -> those that were
    notes = []
    several = len(paths) > 1
    splits = splits_of_tables(root, paths) if several else {}
    without_split = []
    in_other_split = {}  # table whose pictures were found in the folder of another split -> (the folder, its rows from, to)
    folder = root
    for path in tqdm(paths, desc="tables", unit="file", disable=len(paths) < 10):
        table = read_table(path, asked)
        if not table.records:
            raise BadInput(f"--data {path}: has no rows")
        if len(table.faults) == len(table.records):
            raise BadInput(f"--data {path}: no row can be read; the first: {table.faults[0]}")
        columns = choose_columns(path, table.records, asked.image, asked.caption)
        found = rows_of_table(path, table, columns)
        notes += type_labels(path, found, table.class_names.get(columns.label))
        note = f"{columns}{'; ' + table.note if table.note else ''}"
        if splits.get(path) and not columns.split:
            for row in found:
                row["split"] = splits[path]
        elif not any("split" in row for row in found):
            if split_by_folders(found):
                note += "; splits of its pictures' folders"
            elif any(splits.values()):
                without_split.append(path)
        folder = find_root(path, found, root)
        if splits.get(path) and known_split(folder.name) not in (None, splits[path]):
            in_other_split[path] = (folder, len(rows), len(rows) + len(found))
        if folder != path.parent:
            note += f"; pictures in {os.path.relpath(folder, root)}"
        paths_of_note.setdefault(note, []).append(path)
        if several:
            prefix_images(found, os.path.relpath(folder, root))
        rows += found
    for path, place in in_other_split.items():
        check_not_shared(path, rows, *place)
    understood = [f"{names_from(root, like)}: {note}" for note, like in paths_of_note.items()]
    if without_split:
        notes.append(f"{names_from(root, without_split)}: named after no split, as other tables are, so that their rows train")
    stem = paths[0].name[: -len(table_suffix(paths[0]))]
    if several or is_part(stem):
        name = root.resolve().name
    else:
        name = paths[0].resolve().parent.name if stem in UNNAMED_STEMS else stem
    source = names_from(root, paths)
    return Corpus(root if several else folder, name, rows, None, source, (*understood, *notes))


def is_part(stem):
    """Whether a file is named as a part of a table: 00000, train-00000-of-00004."""
    return re.fullmatch(r"(.*-)?\d{3,}(-of-\d+)?", stem) is not None


def read_table(path, asked) -> Table:
    """The Table of a file. Raises BadInput, one line, if it cannot be read at all."""
    if not find_remote(path):
        check_regular(path)
    try:
        return read_records(path, asked)
    except (BadInput, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # Arrow's word for a damaged file
            raise BadInput(f"--data {path}: cannot be read: {error}") from None
        raise
    except (RecursionError, Exception) as error:  # json, csv and arrow raise types of their own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--data {path}: cannot be read: {line}") from None


def read_records(path, asked):
    """The Table of a file, by its kind."""
    match path.suffix.lower():
        case ".jsonl" | ".json":
            return read_json_table(path, asked.is_known)
        case ".parquet":
            return read_parquet(path, asked.is_known)
        case ".arrow":
            return read_arrow(path, asked.is_known)
    if is_tar(path):
        return read_tar(path, asked)
    if is_token_file(path):
        records, faults, note = token_records(path, read_text(path))
        return Table(records, faults, note=note)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return read_text_table(path, asked.is_known)
    if path.suffix.lower() in ARCHIVE_SUFFIXES:
        raise BadInput(f"--data {path}: is an archive; unpack it, and give what is in it (a folder or a table)")
    raise BadInput(f"--data {path}: expected {' '.join(sorted(TABLE_SUFFIXES))} or a folder")


def rows_of_table(path, table, columns):
    """The rows of a table's records, those that cannot be used too."""
    rows = []
    for number, record in enumerate(table.records):
        rows += make_rows(record, columns, table.faults.get(number))
    if columns.image is None:
        name_by_key(path, rows)
    return rows


def name_by_key(table, rows):
    """Gives rows of img2dataset's table, NNNNN.parquet, the pictures of the folder NNNNN that have their keys."""
    folder = table.with_suffix("")
    file_of_key = {}
    for path in folder.iterdir():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            file_of_key[path.stem] = path.name
    for row in rows:
        key = row["image"]
        row["image"] = f"{folder.name}/{file_of_key.get(key, key + '.jpg')}"


def find_root(table, rows, root):
    """The folder that a table's image paths start from: where most of its pictures are.

    Its own, or, as in LLaVA's layout, images/ beside it; the same of the folder that --data names. Where none of these has
    any, another folder beside the table. Raises BadInput if several of these have some.
    """
    few = 4 if find_remote(table) else 500  # over a network each takes a while
    some = rows[:: max(1, len(rows) // few)]
    images = [row["image"] for row in some if row["image"]]

    def count_there(folder):
        return sum(find_file(folder, image) is not None for image in images)

    usual = []
    for base in (table.parent, root):
        usual += [base, base / "images", base / "Images"]
    best = max(usual, key=count_there)  # the first of equals
    if count_there(best):
        return best
    holding = [folder for folder in folders_beside(table, root) if count_there(folder)]
    split = split_of_path(table.relative_to(root))
    of_split = [folder for folder in holding if split and known_split(folder.name) == split]  # train/ of train.csv
    holding = of_split or holding
    if len(holding) > 1:
        raise BadInput(
            f"--data {table}: its pictures may be those of {named(holding)}; write the folder into the paths of its pictures"
        )
    return holding[0] if holding else table.parent


def check_not_shared(table, rows, folder, start, end):
    """Raises BadInput if another table has a picture of a table whose own were found in the folder of another split: 0.jpg of val.csv
    in train/, which train.csv means. rows: of all tables; the table's are those from start to end."""
    others = {row["image"] for row in rows[:start] + rows[end:]}
    for row in rows[start:end]:
        if row["image"] in others:
            raise BadInput(
                f"--data {table}: its {row['image']} is in another table too, and {folder} is named after another split; bring its own "
                "pictures, or write their folder into their paths"
            )


def folders_beside(table, root):
    """The folders, at most 100, in which the pictures of a table may be: in its own, and in that around annotations/."""
    around = {table.parent, root}
    if ANNOTATION_FOLDER.fullmatch(table.parent.name):
        around.add(table.parent.parent)
    folders = []
    for base in [] if find_remote(table) else sorted(around):
        for folder in sorted(base.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder.name.casefold() not in HIDDEN:
                folders.append(folder)
    return folders[:100]


def prefix_images(rows, folder):
    """Lets the paths of a table below the corpus's root start from the root."""
    for row in rows:
        image = row["image"]
        if folder != "." and image and not re.match(r"[A-Za-z]+:|~|/", image):
            row["image"] = f"{folder}/{image}"


def splits_of_tables(root, paths):
    """{table: the split that its folders or its name say it is of, None where they do not}.

    Of a saved DatasetDict the folders are the splits, whatever their names: rows of an unknown split are not trained on.
    """
    splits = {path: split_of_path(path.relative_to(root)) for path in paths}
    if any(splits.values()) and (root / "dataset_dict.json").is_file():
        for path in paths:
            splits[path] = splits[path] or path.relative_to(root).parts[0]
    return splits


def split_of_path(path):
    """The split that a table's path says it is of, None if it does not. A folder that is named after a split and nothing else
    counts first, then a word of the table's name, then one of a folder's."""
    folders = path.parent.parts
    for split in (split_of_folders(folders), split_of_words(path.stem), *map(split_of_words, folders)):
        if split:
            return split
    return None


def split_by_folders(rows):
    """Gives rows the split that the folder of their picture is named after, if all have one and these are different. Returns
    whether they have."""
    with_picture = [row for row in rows if row["image"]]
    splits = [split_of_folders(Path(row["image"]).parent.parts) for row in with_picture]
    if None in splits or len(set(splits)) < 2:
        return False
    for row, split in zip(with_picture, splits):
        row["split"] = split
    return True


# ----------------------------------------------------------------------------------------------------------- folders


def read_folder(root, files):
    """The Corpus of a folder without a table: a.jpg with a.txt, or pictures in folders named after their classes."""
    pictures, notes = sort_files(root, files)
    captions = find_caption_files(files, pictures)
    if captions:
        rows, how = read_text_files(root, pictures, captions)
    elif all(path.parent == root for path in pictures):
        raise BadInput(
            f"--data {root}: pictures need a caption each: a.txt beside a.jpg, a table, or folders named after classes"
        )
    else:
        rows, how = read_class_folders(root, pictures)
    return Corpus(root, root.resolve().name, rows, None, str(root), (*notes, how))


def sort_files(root, files):
    """(a folder's pictures, lines about the files that are none). Raises BadInput if there are no pictures."""
    pictures = []
    archives = []
    others = Counter()
    for path in files:
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES or suffix in OTHER_SUFFIXES:
            pictures.append(path)
        elif suffix in CAPTION_SUFFIXES or suffix in TABLE_SUFFIXES or is_tar(path):
            continue
        elif holds_picture(path):
            pictures.append(path)
        else:
            others[suffix or "without a suffix"] += 1
        if suffix in ARCHIVE_SUFFIXES:
            archives.append(path.name)
    if not pictures and archives:
        raise BadInput(
            f"--data {root}: holds archives ({named(archives)}); unpack them, and give the folder with what was in"
        )
    if not pictures:
        raise BadInput(f"--data {root}: holds no table ({' '.join(sorted(TABLE_SUFFIXES))}) and no pictures")
    if not others:
        return pictures, []
    counts = [f"{count:,} {kind}" for kind, count in others.items()]
    return pictures, [f"passed over, no pictures: {named(counts)}"]


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
