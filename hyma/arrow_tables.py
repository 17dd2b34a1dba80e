"""Parquet and arrow files to records: paths of pictures, or the pictures themselves, as the datasets library saves them.

A picture in a cell becomes the address of the cell (`hyma/packed.py`) and is not read here.
"""

import json
from collections import defaultdict
from pathlib import Path

from hyma.columns import KEY_COLUMN, NUMBERED_CAPTION, QUESTION_COLUMNS
from hyma.packed import cell_address, import_arrow, only_item, open_arrow
from hyma.remote import open_file
from hyma.splits import known_split
from hyma.tables import Table
from vlm import BadInput, read_json

ROWS_AT_ONCE = 256  # of a table, in memory: each may hold a picture where these have to be read


def read_parquet(path, is_known) -> Table:
    """The Table of a parquet file: its known columns, or all of them where none is known."""
    arrow = import_arrow(path)
    file = arrow.parquet.ParquetFile(open_file(path), pre_buffer=False)
    names = choose_names(file.schema_arrow, is_known)
    names += [name for name in names_between_splits(file.metadata) if name not in names]
    records = []
    for group in range(file.num_row_groups):
        # The bytes of pictures are most of a file; where its statistics say that no cell is empty, they are left alone.
        full = []
        for name in names:
            if holds_only_pictures(file.schema_arrow.field(name).type, arrow) and not count_empty(file, group, name):
                full.append(name)
        others = [name for name in names if name not in full]
        first = len(records)
        if others:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=others):
                records += make_records(path, batch, len(records), is_known)
        else:
            records += [{} for _ in range(file.metadata.row_group(group).num_rows)]
        for row in range(first, len(records)):
            for name in full:
                records[row][name] = f"{path.name}/{cell_address(name, row)}"
    return Table(records, class_names=class_names(file.schema_arrow))


def read_arrow(path, is_known) -> Table:
    """The Table of an arrow file, which is mapped."""
    table = open_arrow(path)
    names = choose_names(table.schema, is_known)
    names += [name for name in names_of_splits(table.slice(0, ROWS_AT_ONCE)) if name not in names]
    records = []
    for batch in table.select(names).to_batches(ROWS_AT_ONCE):
        records += make_records(path, batch, len(records), is_known)
    return Table(records, class_names=class_names(table.schema))


def choose_names(schema, is_known):
    """The columns that are read: the known ones, or all, for a message to name, where none of them is a picture's or a text."""
    known = []
    has_text = False
    for name in schema.names:
        plain = name.strip().casefold()
        is_numbered = NUMBERED_CAPTION.fullmatch(plain)
        if is_known(name) or plain == KEY_COLUMN or is_numbered:
            known.append(name)
        has_text |= bool(is_known(name, "caption") or is_numbered or plain in QUESTION_COLUMNS)
    return known if has_text and any(is_known(name, "image") for name in known) else schema.names


def names_between_splits(metadata):
    """The columns of a parquet file that may hold splits under any name: by its own statistics their least and greatest texts are
    splits. So no cell of another column is read, which may be a long one."""
    ends = defaultdict(set)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.statistics is not None and column.statistics.has_min_max:
                ends[column.path_in_schema] |= {column.statistics.min, column.statistics.max}
    return [name for name, texts in ends.items() if all(isinstance(text, str) and known_split(text) for text in texts)]


def names_of_splits(table):
    """The columns of an arrow table, its first rows, that hold splits and nothing else."""
    found = []
    for field in table.schema:
        if str(field.type).startswith(("string", "large_string", "dictionary<values=string")):
            texts = set(table[field.name].to_pylist()) - {None, ""}
            if texts and all(map(known_split, texts)):
                found.append(field.name)
    return found


def holds_only_pictures(kind, arrow):
    """Whether a column is of the form of the datasets library for pictures, {bytes, path}.

    A column of plain bytes may also hold texts, or, as in old versions of some writers, paths.
    """
    return arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def count_empty(file, group, name):
    """How many cells of a column of {bytes, path} have no bytes, by the file's own statistics; all if it has none."""
    metadata = file.metadata.row_group(group)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema == f"{name}.bytes":
            statistics = column.statistics
            if statistics is not None and statistics.has_null_count:
                return statistics.null_count
    return metadata.num_rows


def make_records(path, batch, first, is_known):
    """The records of a batch, whose first row is `first` in the file. A picture becomes its address. Bytes in a column of captions are
    a text, and cost their own row where they are not UTF-8."""
    records = [{} for _ in range(batch.num_rows)]
    for name, column in zip(batch.schema.names, batch.columns):
        is_text = is_known(name, "caption") and not is_known(name, "image")
        for number, cell in enumerate(column):
            value = cell.as_py()
            if not is_text and is_picture(only_item(value)):
                value = f"{path.name}/{cell_address(name, first + number)}"
            elif isinstance(value, bytes):
                value = value.decode(errors="surrogateescape")
            records[number][name] = value
    return records


def is_picture(value):
    """Whether a cell holds the bytes of a picture, as bytes or as {bytes, path}.

    Some writers store texts as bytes: what is UTF-8 without control characters is a text.
    """
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    if not isinstance(value, bytes):
        return False
    try:
        return "\0" in value.decode()
    except UnicodeDecodeError:
        return True


def class_names(schema):
    """{column: names} of the columns that the datasets library has marked as numbers of classes."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = {}
        for column, feature in features.items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                names[column] = feature["names"]
        return names
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


# -------------------------------------------------------------------------------- a folder of the datasets library


def find_saved_dataset(folder):
    """The arrow files of a folder that `save_to_disk` wrote, of all its splits, in their order; [] if it is no such folder."""
    splits = folder / "dataset_dict.json"
    if not splits.is_file():
        return list_parts(folder)
    parts = []
    for name in read_json(splits).get("splits", []):
        if Path(str(name)).name != name:
            raise BadInput(f"--data {splits}: names the split {name!r}, which is no folder beside it")
        parts += list_parts(folder / name)
    return parts


def list_parts(folder):
    """The arrow files of one split."""
    path = folder / "state.json"
    files = read_json(path).get("_data_files") if path.is_file() else None
    if not isinstance(files, list):
        return []
    if read_json(path).get("_indices_data_files"):
        raise BadInput(f"--data {folder}: chooses its rows by a list beside them; save it again after .flatten_indices()")
    parts = []
    for file in files:
        name = file.get("filename") if isinstance(file, dict) else file
        if Path(str(name)).name != name or not (folder / name).is_file():
            raise BadInput(f"--data {path}: names {name!r}, which is no file beside it")
        parts.append(folder / name)
    return parts
