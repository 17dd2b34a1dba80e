"""Table files as records: text tables and JSON. What their columns mean is in `hyma/columns.py`.

A row of a file that cannot be read costs itself and no other row.
"""

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

from hyma.annotations import published_records
from hyma.pictures import IMAGE_SUFFIXES
from hyma.remote import read_bytes
from hyma.splits import known_split
from vlm import BadInput

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


class Table(NamedTuple):
    """The rows of a file."""

    records: list[dict]  # column -> value; empty where there is a fault
    faults: dict[int, str] = {}  # record's number -> why it cannot be used
    class_names: dict[str, list[str]] = {}  # column of numbers -> the names that they stand for
    note: str = ""  # how it was read, where that had to be found out


def read_text(path):
    """The text of a file: UTF-16 where it begins with the mark of that, else UTF-8.

    A byte that is not UTF-8 must cost its own row and not the file: it is kept as a surrogate, and the row is refused.
    """
    data = read_bytes(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if data[:2].count(0) == 1:
        raise BadInput(f"--data {path}: looks like UTF-16 without its mark; save it as UTF-8")
    return data.decode("utf-8-sig", errors="surrogateescape")


# ------------------------------------------------------------------------------------------------------- text tables


def read_text_table(path, is_known):
    """The Table of a text table with a header."""
    lines = list(io.StringIO(read_text(path), newline=""))
    if lines and re.fullmatch(r"\ufeff?sep=.\s*", lines[0]):  # a line for Excel alone
        lines = lines[1:]
    if not lines:
        return Table([])
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = choose_delimiter(lines[0], usual, is_known)
    note = "" if delimiter == usual else f"separated by {DELIMITERS[delimiter]}"
    names, *rows = read_rows(lines, delimiter, is_known)
    columns = number_repeated(name.strip() for name in names)
    records = []
    faults = {}
    for fields in rows:
        fault = None
        if isinstance(fields, Unclosed):
            fields = fields.fields
            if len(fields) != len(columns):
                fault = "a quotation mark is opened and not closed"
        while len(fields) > len(columns) and not fields[-1]:
            fields = fields[:-1]
        if fault is None and len(fields) > len(columns):
            fault = "more fields than columns; a caption with a comma needs quotes"
        if fault:
            faults[len(records)] = fault
        records.append(dict(zip(columns, fields)))
    return Table(records, faults, note=note)


def choose_delimiter(header, usual, is_known):
    """What separates the columns: that which makes the most known names of the header, else the usual one."""
    best = usual
    most = 0
    for delimiter in (usual, *DELIMITERS):
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        known = sum(map(is_known, names))
        if known > most:
            best, most = delimiter, known
    return best


def number_repeated(names):
    """The names, with _2, _3 ... after those that occur again."""
    counts = {}
    numbered = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        numbered.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return numbered


class Unclosed(NamedTuple):
    """A line that is no row by the rules of quotation: its fields as they stand."""

    fields: list[str]


def read_rows(lines, delimiter, is_known):
    """The rows of a text table, as lists of fields; an Unclosed where a quotation mark opens a field and does not end it.

    csv's strict reading finds such a field, unless the next mark happens to stand at the end of a field: then the field
    has swallowed whole lines of the table, which are recognised by the picture that each of them begins with.
    """
    csv.field_size_limit(2**27)
    first = next(csv.reader(lines[:1], delimiter=delimiter), [])
    known = [place for place, name in enumerate(first) if is_known(name.strip(), "image")]
    image_place = known[0] if known else 0
    rows = []
    start = 0
    while start < len(lines):
        following = (lines[number] for number in range(start, len(lines)))
        reader = csv.reader(following, delimiter=delimiter, strict=True)
        base = start
        try:
            for fields in reader:
                end = base + reader.line_num
                if holds_rows(lines[start + 1 : end], fields, len(first), image_place, delimiter):
                    break
                if fields:
                    rows.append(fields)
                start = end
        except csv.Error:
            pass
        if start < len(lines):
            rows.append(Unclosed(lines[start].rstrip("\r\n").split(delimiter)))
            start += 1
    return rows


def holds_rows(lines, fields, width, image_place, delimiter):
    """Whether one of a field's further lines reads as a row of the table: as many fields, a picture of the same kind."""
    if not lines or len(fields) <= image_place:
        return False
    own = fields[image_place]
    kind = Path(own).suffix.lower()
    kinds = IMAGE_SUFFIXES if kind in IMAGE_SUFFIXES else (kind,)
    for line in lines:
        cells = line.rstrip("\r\n").split(delimiter)
        if len(cells) < width:
            continue
        cell = cells[image_place].strip('"')
        if cell and (" " not in cell or " " in own) and Path(cell).suffix.lower() in kinds:
            return True
    return False


# -------------------------------------------------------------------------------------------------------------- JSON


def read_json_table(path, is_known):
    """The Table of a JSON file: lines of objects, a list of them, a dict of them, or a dict that wraps one list."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=read_object)
    except ValueError as error:
        if path.suffix.lower() == ".json" and not starts_with_object_line(text):
            raise BadInput(f"--data {path}: is not JSON: {error}") from None
        return read_json_lines(text)
    if isinstance(value, Repeated):
        raise BadInput(f"--data {path}: {value.fault}")
    if isinstance(value, dict):
        value, note = published_records(path, value) or unwrap(path, value, is_known)
    else:
        note = ""
    if not isinstance(value, list):
        raise BadInput(f"--data {path}: expected a list of records such as {{'image': 'a.jpg', 'caption': 'a dog'}}")
    faults = {}
    records = []
    for number, record in enumerate(value):
        if isinstance(record, Repeated):
            faults[number] = record.fault
        if not isinstance(record, dict):
            faults[number] = f"not an object: {kind_of(record)}"
        records.append(record if isinstance(record, dict) else {})
    return Table(records, faults, note=note)


class Repeated(dict):
    """An object that gives a name two different values, of which JSON's readers keep the last."""

    fault = ""  # why it cannot be used


def read_object(pairs):
    """The dict of a JSON object's (name, value) pairs."""
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    for name, value in pairs:
        if values[name] != value:
            repeated = Repeated(values)
            repeated.fault = f"a name with two values: {name!r}"
            return repeated
    return values


def starts_with_object_line(text):
    """Whether the first line is an object by itself, as in JSON lines."""
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except ValueError:
        return False


def read_json_lines(text):
    """The Table of lines that are an object each."""
    records = []
    faults = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=read_object)
        except (ValueError, RecursionError):
            record = None
            faults[len(records)] = f"not JSON: line {number}"
        if isinstance(record, Repeated):
            faults[len(records)] = record.fault
        if record is not None and not isinstance(record, dict):
            faults[len(records)] = f"not an object: line {number} is {kind_of(record)}"
        records.append(record if isinstance(record, dict) else {})
    return Table(records, faults)


def unwrap(path, value, is_known):
    """(the list of records in a dict, how it was found)."""
    if any(is_known(name, "image") and not isinstance(part, list) for name, part in value.items()):
        return [value], ""
    if value and all(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in value):
        records = [(part if isinstance(part, dict) else {"caption": part}) | {"image": name} for name, part in value.items()]
        return records, "a dict whose names are the pictures"
    lists = {name: part for name, part in value.items() if isinstance(part, list) and part}
    if len(lists) == 1:
        name, records = next(iter(lists.items()))
        return records, f"the list {name!r}"
    if len(lists) > 1:
        found = ", ".join(list(lists)[:6])
        if all(map(known_split, lists)):
            return [with_split(record, name) for name, part in lists.items() for record in part], "a list for each split"
        raise BadInput(
            f"--data {path}: holds several lists ({found}); write one list of records with image and caption, or, for a "
            "standard set's own files, use --data NAME:FOLDER"
        )
    if value and all(isinstance(part, dict) for part in value.values()):
        return list(value.values()), "a dict of records"
    return None, ""


def with_split(record, split):
    """A record of the list that a split has for itself."""
    return {"split": split} | record if isinstance(record, dict) else record


def kind_of(value):
    """What a JSON value is, in words."""
    words = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return words.get(type(value), "nothing")
