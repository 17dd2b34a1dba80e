"""Your own captioned pictures as rows: tables and folders. The standard sets are in `hyma/standard_sets.py`.

A row is a dict with these keys; the first two are always there:

    image       path of the picture, from the corpus's root
    caption     text
    label       class, for zero-shot classification
    split       train, val or test, as the source spells it
    question, answer, choices    of a multiple-choice question; the choices are a list
    fault       why the row cannot be used, if the reader already knows

Which files of a folder are read is found in `hyma/corpus_files.py`; what the folders around a table say, in
`hyma/table_folders.py`. To add a kind of file, extend TABLE_SUFFIXES there and `read_records` here; to add a layout of
folders, extend `read_folder`.
"""

import json
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
from hyma.corpus_files import (
    ARCHIVE_SUFFIXES,
    TABLE_STEMS,
    TABLE_SUFFIXES,
    find_tables,
    is_pattern,
    is_tar,
    list_files,
    match_files,
    names_from,
    sort_files,
    table_suffix,
    tables_passed_over,
)
from hyma.picture_folders import CAPTION_SUFFIXES, find_caption_files, read_class_folders, read_text_files
from hyma.pictures import IMAGE_SUFFIXES, find_file, is_file
from hyma.remote import find_remote, list_remote, local_path, open_source
from hyma.table_folders import (
    Place,
    check_not_shared,
    find_root,
    lists_beside,
    prefix_images,
    split_of_each_folder,
    split_of_lists,
    splits_of_tables,
    unread_lists,
)
from hyma.tables import Table, read_json_table, read_text, read_text_table
from hyma.tars import read_tar
from vlm import BadInput, check_regular

UNNAMED_STEMS = (*TABLE_STEMS, "train", "data", "dataset", "rows")  # these tables are named after their folder
SEVERAL_NUMBERS = re.compile(r"\s*[-+.\d][-+.\de]*([\s,;]+[-+.\d][-+.\de]*){3,}\s*")  # four at least: those of a box


class Corpus(NamedTuple):
    """All rows of a data source, before any picture is opened."""

    root: Path  # the folder that image paths start from
    dataset: str  # short name: of the embedding folder, by default
    rows: list[dict]  # as above
    protocol: str | None = None  # of a standard set: which files were read, and how; reported with every score
    source: str = ""  # what was read, for messages
    notes: tuple[str, ...] = ()  # what had to be found out about it, a line each
    lists: tuple[Path, ...] = ()  # of splits, that were read beside its tables


def read_corpus(data, image_column=None, caption_column=None):
    """The Corpus of a table or a folder. A table with questions needs no captions."""
    corpus = read_source(local_path(data), Asked(image_column, caption_column))
    captions = [row["caption"] for row in corpus.rows if row["caption"] and "fault" not in row]
    if captions and all(map(SEVERAL_NUMBERS.fullmatch, captions)):
        raise BadInput(
            f"--data {data}: its captions are nothing but numbers, as those of boxes are ({captions[0].strip()[:60]}); give texts in "
            "words, or name their column with --caption-column"
        )
    return corpus


def read_source(data, asked):
    """The Corpus of what --data names."""
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
    saved = find_saved_dataset(data)
    if saved:
        return read_tables(data, saved, asked)
    notes = []
    files = [path for path in sorted(data.iterdir()) if is_file(path)]
    tables = find_tables(data, files)
    if not tables:
        files, notes = list_files(data)
        tables = find_tables(data, files)
    corpus = read_files_of_folder(data, files, tables, asked)
    return corpus._replace(notes=(*notes, *corpus.notes))


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


def read_remote(data, asked):
    """The Corpus of a table or a folder behind a URL."""
    files = list_remote(data)
    if files == [data]:
        return read_tables(data.parent, files, asked)
    own = [path for path in files if path.parent == data]
    tables = find_tables(data, own)
    if tables:
        return read_files_of_folder(data, own, tables, asked)
    return read_files_of_folder(data, files, find_tables(data, files), asked)


def read_files_of_folder(root, files, tables, asked):
    """The Corpus of a folder: of the tables found among its files, else of its pictures. Tables that are not read are named."""
    if not tables:
        return read_folder(root, files, asked)
    corpus = read_tables(root, tables, asked)
    passed_over = [path for path in tables_passed_over(root, files, tables) if path not in corpus.lists]
    if not passed_over:
        return corpus
    names = {path.name for path in tables}
    for path in passed_over:
        if path.parent == root or path.name in names:
            check_adds_nothing(root, path, corpus, asked)
    return corpus._replace(notes=(*corpus.notes, f"not read: {names_from(root, passed_over)}"))


def check_adds_nothing(root, table, corpus, asked):
    """Raises BadInput if a table that is not read has captions of pictures that are there and that the corpus lacks."""
    try:
        other = read_tables(root, [table], asked)
    except (BadInput, OSError):  # no table of pictures and captions
        return
    images = {os.path.normpath(corpus.root / row["image"]) for row in corpus.rows}
    for row in other.rows:
        image = row["image"]
        if image and "fault" not in row and os.path.normpath(other.root / image) not in images and find_file(other.root, image):
            raise BadInput(
                f"--data {root}: may mean {corpus.source} or {names_from(root, [table])}, which has captions of other pictures "
                f"({image}); name one of them, or write one table of both"
            )


# ------------------------------------------------------------------------------------------------------------ tables


class Asked(NamedTuple):
    """The columns that flags name, None for those that are found."""

    image: str | None = None
    caption: str | None = None

    def is_known(self, name, part=None):
        """Whether a column is asked for, or has a name that is read, as any part of a row or as this one."""
        asked = [self.image] if part == "image" else [self.image, self.caption]
        plain = str(name).strip().casefold()
        return any(each and plain == each.strip().casefold() for each in asked) or is_known(name, part)

    def is_caption(self, name):
        """Whether a column holds captions: the one that is asked for, else any of such a name."""
        return name == self.caption if self.caption else is_known(name, "caption")


def read_tables(root, paths, asked):
    """The Corpus of one or several tables."""
    rows = []
    paths_of_note = {}  # how tables were understood -> those that were
    several = len(paths) > 1
    splits, notes = splits_of_tables(root, paths)
    without_split = []
    lists = []  # that may be of splits, beside tables without any
    lists_read = []
    empty = []
    places = []
    folder = root
    for path in tqdm(paths, desc="tables", unit="file", disable=len(paths) < 10):
        table = read_table(path, asked)
        if not table.records and several:  # Spark writes such parts
            empty.append(path)
            continue
        if not table.records:
            raise BadInput(f"--data {path}: has no rows")
        if len(table.faults) == len(table.records):
            raise BadInput(f"--data {path}: no row can be read; the first: {table.faults[0]}")
        columns = choose_columns(path, table.records, asked.image, asked.caption, several, several and splits[path] is not None)
        found = rows_of_table(path, table, columns)
        notes += type_labels(path, found, table.class_names.get(columns.label))
        note = f"{columns}{'; ' + table.note if table.note else ''}"
        has_splits = any(row.get("split") for row in found)  # an empty column says nothing
        if splits[path] and not has_splits:
            if split_of_each_folder(found):  # COCO's val2014/ holds pictures that Karpathy's authors train on
                note += "; the folders of its pictures say no splits, as it is named after one"
            for row in found if several else ():  # one table alone is divided as any other
                row["split"] = splits[path]
        elif not has_splits:
            of_lists, used = split_of_lists(path, found)
            lists_read += used
            of_rows = of_lists or split_of_each_folder(found)
            for number, split in of_rows.items():
                found[number]["split"] = split
            if of_rows:
                note += "; splits of the lists beside it" if of_lists else "; splits of its pictures' folders"
            elif any(splits.values()):
                without_split.append(path)
            else:
                lists += lists_beside(path)
        folder = find_root(path, found, root, splits[path])
        if folder != path.parent:
            note += f"; pictures in {os.path.relpath(folder, root)}"
        paths_of_note.setdefault(note, []).append(path)
        if several:
            prefix_images(found, os.path.relpath(folder, root))
        if not has_splits:
            places.append(Place(path, splits[path], folder, slice(len(rows), len(rows) + len(found))))
        rows += found
    check_not_shared(places, rows)
    understood = [f"{names_from(root, like)}: {note}" for note, like in paths_of_note.items()]
    if empty:
        notes.append(f"{names_from(root, empty)}: without rows")
    if not rows:
        raise BadInput(f"--data {root}: its {len(paths):,} tables have no rows")
    if without_split:
        notes.append(f"{names_from(root, without_split)}: named after no split, as other tables are, so that their rows train")
    notes += unread_lists(root, lists, rows)
    stem = paths[0].name[: -len(table_suffix(paths[0]))]
    if several or is_part(stem):
        name = root.resolve().name
    else:
        name = paths[0].resolve().parent.name if stem in UNNAMED_STEMS else stem
    source = names_from(root, paths)
    return Corpus(root if several else folder, name, rows, None, source, (*understood, *notes), tuple(lists_read))


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
        records, faults = token_records(read_text(path))
        return Table(records, faults, note="Flickr's captions")
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


# ----------------------------------------------------------------------------------------------------------- folders


def read_json_files(root, files, pictures, asked):
    """The Table of pictures that have a .json of their name, as img2dataset writes it; no records if there are no captions."""
    path_of_json = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".json"}

    def read_record(picture):
        """The fields of its .json that are read, None if it is no object."""
        path = path_of_json.get(picture.with_suffix(""))
        try:
            value = json.loads(read_text(path)) if path else {}
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        return {name: part for name, part in value.items() if asked.is_known(name) and not asked.is_known(name, "image")}

    described = [picture for picture in pictures if picture.with_suffix("") in path_of_json]
    some = map(read_record, described[:: max(1, len(described) // 20)])
    if not any(value and asked.is_caption(name) for record in some for name, value in (record or {}).items()):
        return Table([])
    records = []
    faults = {}
    for picture in pictures:
        record = read_record(picture)
        if record is None:
            faults[len(records)] = "its .json is no object"
        records.append({"image": str(picture.relative_to(root))} | (record or {}))
    return Table(records, faults)


def read_folder(root, files, asked):
    """The Corpus of a folder without a table: a.jpg with a.txt or a.json, or pictures in folders named after their classes."""
    pictures, notes = sort_files(root, files)
    captions = find_caption_files(files, pictures)
    read = set(captions.values())
    if captions:
        rows, how = read_text_files(root, pictures, captions)
    elif (table := read_json_files(root, files, pictures, asked)).records:
        columns = choose_columns(root, table.records, None, asked.caption)
        rows = rows_of_table(root, table, columns)
        for number, split in split_of_each_folder(rows).items():
            rows[number]["split"] = split
        how = f"{root}: the .json files beside the pictures: {columns}"
        notes += type_labels(root / "*.json", rows, None)
    elif all(path.parent == root for path in pictures):
        raise BadInput(
            f"--data {root}: pictures need a caption each: a.txt beside a.jpg, a table, or folders named after classes"
        )
    else:
        rows, how = read_class_folders(root, pictures)
        unread = Counter(path.suffix.lower() for path in files if path.suffix.lower() in (*CAPTION_SUFFIXES, ".json"))
        if unread:
            how += f"; not read, as they are named after no picture: {named([f'{count:,} {kind}' for kind, count in unread.items()])}"
    described = {path.with_suffix("") for path in pictures}
    lists = [path for path in files if path.with_suffix("") not in described and path not in read]
    return Corpus(root, root.resolve().name, rows, None, str(root), (*notes, how, *unread_lists(root, lists, rows)))
