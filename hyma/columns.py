"""What the columns of a table mean: which holds the picture, the captions, the label; a record as rows.

To add a name that people give to a column, extend the lists below.
"""

import ast
import io
import json
import math
import re
import tokenize
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from hyma.pictures import IMAGE_SUFFIXES, why_no_path
from hyma.splits import known_split
from hyma.tables import read_text
from vlm import BadInput

# Of the columns that a table has, the first of each list that is filled is read. Upper and lower case are the same.
IMAGE_COLUMNS = (
    *("image", "image_bytes", "image_path", "file_name", "filename", "filepath", "file_path", "file", "path", "img"),
    *("img_path", "image_name", "image_file", "images", "jpg", "png", "webp", "bytes"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "title", "sentence", "sentences", "description", "blip_caption", "conversations"),
    *("messages", "raw", "alt_text", "alt", "comment"),
)
CONVERSATION_COLUMNS = ("conversations", "messages")  # of CAPTION_COLUMNS: their captions are answers
LABEL_COLUMNS = ("class_name", "label_name", "label", "class", "category")  # names before what may be numbers
# Of splits: the first by its name, these others by their values, too, and one of any other name if its values are nothing else.
SPLIT_COLUMNS = ("split", "partition", "subset", "set", "set_name", "data_set", "data_split", "dataset_split", "fold")
SPLIT_FLAGS = {"is_train": ("test", "train"), "is_test": ("train", "test")}  # what false and what true says
TRUTH = {"false": 0, "0": 0, "0.0": 0, "true": 1, "1": 1, "1.0": 1}
KEY_COLUMN = "key"  # of img2dataset's tables, which name no file: the picture's name without its ending
QUESTION_COLUMNS = ("question", "answer", "choices")
COLUMNS = {"image": IMAGE_COLUMNS, "caption": CAPTION_COLUMNS, "label": LABEL_COLUMNS}
KNOWN_COLUMNS = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, *LABEL_COLUMNS, *QUESTION_COLUMNS, *SPLIT_COLUMNS, *SPLIT_FLAGS}
NUMBERED_CAPTION = re.compile(r"(caption|text|sentence|description|comment|raw)[ _-]?\d+")

CLASS_FILES = ("classes.txt", "labels.txt")  # beside a table: the names of its numbers, one a line

# What other programs write for a cell that holds nothing. A table cannot tell it from a caption of this one word, which
# is rarer, so that it counts as empty in every kind of table; the summary counts such captions apart from empty cells.
PLACEHOLDERS = ("nan", "NaN", "None", "null", "NULL", "<NA>")
TEXT_ONLY = "conversation without a picture"  # LLaVA's mixes have them by design: left out, but not faults


class RowFault(Exception):
    """Why a record makes no row."""


class Columns(NamedTuple):
    """Which columns of a table the parts of a row come from."""

    image: str | None  # None: img2dataset's table, which names no file but its key
    captions: list[str]  # several: a row each
    label: str | None
    split: str | None
    questions: dict[str, str]  # question, answer, choices: those that there are

    def __str__(self):
        parts = [f"image {self.image or 'key'!r}"]
        parts.append(f"caption {' '.join(map(repr, self.captions)) or 'from question and answer'}")
        if self.label:
            parts.append(f"label {self.label!r}")
        if self.split:
            parts.append(f"split {self.split!r}")
        return ", ".join(parts)


def is_known(name, part=None):
    """Whether a column has a name that is read, as any part of a row or as this one."""
    name = str(name).strip().casefold()
    return name in (COLUMNS[part] if part else KNOWN_COLUMNS)


def choose_columns(path, records, image_column, caption_column, is_part=False, is_of_split=False):
    """The Columns of a table, decided over all its records. is_part: whether it is one of several tables; is_of_split: and named
    after a split. Raises BadInput where there is no picture or no caption."""
    names = {}  # as they are compared -> as they are written
    filled = set()
    for record in records:
        for name, value in record.items():
            plain = str(name).strip().casefold()
            names.setdefault(plain, name)
            is_address = plain in IMAGE_COLUMNS and isinstance(value, str) and why_no_path(value)  # a URL: others may hold a path
            if value is not None and value != "" and not is_address:
                filled.add(plain)
    if not any(map(is_known, names)) and not (image_column or caption_column):
        explain_unknown(path, list(names.values()))

    def pick(part, asked):
        if asked:
            if asked.strip().casefold() not in names:
                raise BadInput(f"--{part}-column {asked}: {path} has the columns {named(names.values(), 20)}")
            return names[asked.strip().casefold()]
        for here in (filled, names):
            for name in COLUMNS[part]:
                if name in here:
                    return names[name]
        return None

    image = pick("image", image_column)
    if image is None and not (KEY_COLUMN in names and path.with_suffix("").is_dir()):
        raise BadInput(f"--data {path}: {no_column('image', names)}")
    questions = {part: names[part] for part in QUESTION_COLUMNS if part in names}
    caption = pick("caption", caption_column)
    captions = [caption] if caption is not None else []
    if not caption_column:
        captions += [name for plain, name in names.items() if NUMBERED_CAPTION.fullmatch(plain)]
    if not captions and len(questions) < 3:
        without = "; or, if it has no captions, take it out of the folder or give the other tables alone" if is_part else ""
        raise BadInput(f"--data {path}: {no_column('caption', names)}{without}")
    label = pick("label", None)
    unread = [name for name in names.values() if name not in (image, *captions, label, *questions.values())]
    return Columns(image, captions, label, choose_split(path, records, unread, is_part, is_of_split), questions)


def choose_split(path, records, unread, is_part, is_of_split):
    """The column of splits among those that hold nothing else of a row, or None. A table's own name counts before a column that
    only its values tell. Raises BadInput where two columns may be it and differ."""
    of_name = {plain_name(name): name for name in reversed(unread)}
    for plain in SPLIT_COLUMNS:
        if plain in of_name and holds_splits(records, of_name[plain], is_part):
            return of_name[plain]
    found = [] if is_of_split else [name for name in unread if holds_splits(records, name, is_part)]
    for other in found[1:]:
        for record in records:
            first, second = (known_split(split_value(record, name)) for name in (found[0], other))
            if first != second:
                raise BadInput(
                    f"--data {path}: its columns {found[0]!r} and {other!r} both name splits and differ ({first}, {second}); "
                    "name the one that counts split"
                )
    return found[0] if found else of_name.get("split")


def plain_name(column):
    """A column's name as those of splits are compared."""
    return re.sub(r"[ -]", "_", str(column).strip().casefold())


def split_value(record, column):
    """A record's value in a column of splits; of is_train and is_test, the split that it says."""
    value = record.get(column)
    flag = TRUTH.get(str(value).strip().casefold()) if plain_name(column) in SPLIT_FLAGS else None
    return value if flag is None else SPLIT_FLAGS[plain_name(column)][flag]


def holds_splits(records, column, is_part):
    """Whether a column holds splits, by its name and its values.

    One that is called split does if it holds anything; one of SPLIT_COLUMNS if it names two splits at least; one of any other
    name if it names two, and nothing else. In one of several tables, which may have the rows of a split each, one is enough, with
    nothing else.
    """
    is_named = plain_name(column) in SPLIT_COLUMNS
    splits = {}  # of each value
    for record in records:
        value = split_value(record, column)
        is_single = isinstance(value, str | int | float)
        if is_empty(value) or (is_single and value in splits):
            continue
        split = known_split(value) if is_single else None
        if split is None and not is_named:
            return False
        if is_single:
            splits[value] = split
    if plain_name(column) == "split":
        return bool(splits)
    known = set(splits.values())
    return len(known - {None}) > 1 or (is_part and bool(known) and None not in known)


def no_column(part, names):
    return f"no {part} column among {named(names.values(), 20)}; name it with --{part}-column"


def explain_unknown(path, names):
    """Raises BadInput for a table of which no column is known: its header is missing, or names what we cannot guess."""
    for name in map(str, names):
        if Path(name).suffix.lower() in IMAGE_SUFFIXES or why_no_path(name):
            raise BadInput(
                f"--data {path}: its first line should name the columns and names {name}; put image,caption there"
            )
    raise BadInput(
        f"--data {path}: {no_column('image', dict(enumerate(names)))}, and the caption with --caption-column"
    )


# --------------------------------------------------------------------------------------------------------- a record as rows


def make_rows(record, columns, fault=None):
    """The rows of a record: one for each of its captions, or one with the reason why there is none."""
    row = {"image": "", "caption": None}
    try:
        if columns.image is None:
            row["image"] = as_text(record.get(KEY_COLUMN))
        else:
            row["image"] = picture_path(record.get(columns.image))
        if fault:
            raise RowFault(fault)
        if not row["image"]:
            raise RowFault(TEXT_ONLY if any(map(is_conversation, columns.captions)) else "no image path")
        if columns.label is not None:
            row["label"] = record.get(columns.label)
        if columns.split is not None:
            row["split"] = as_text(split_value(record, columns.split))
        if columns.questions:
            row |= read_question(record, columns.questions)
        if columns.captions:
            captions = read_captions(record, columns.captions)
        else:
            captions = [f"{row['question']} {row['answer']}"]
    except RowFault as error:
        return [row | {"fault": str(error)}]
    return [row | {"caption": caption} for caption in captions]


def readable_label(label):
    """A label as words: red_fox is "red fox"."""
    return label.replace("_", " ")


def is_nan(value):
    return isinstance(value, float) and math.isnan(value)


def is_empty(value):
    """Whether a cell holds nothing."""
    if is_nan(value):
        return True
    return value is None or (isinstance(value, str) and value.strip() in ("", *PLACEHOLDERS))


def as_text(value):
    """A cell as text: numbers are text, an empty cell is "". Raises RowFault for what holds several values."""
    return "" if is_empty(value) else as_written(value)


def as_written(value):
    """A cell as text, "none" and "nan" too, as these may be answers to a question."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise RowFault(f"not a text: {type(value).__name__} {str(value)[:40]}")
    return str(value)


def picture_path(value):
    """The path of a record's picture. Raises RowFault if there are several."""
    if isinstance(value, list):
        if len(value) > 1:
            raise RowFault(f"several pictures in one row: {len(value)}")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("path") or value.get("file_name")
    return as_text(value)


def caption_fault(text):
    """Why a text is no caption, or None."""
    if not text.strip():
        return "empty caption"
    if text.strip() in PLACEHOLDERS:
        return f"placeholder for a missing caption: {text.strip()}"
    return None


def read_captions(record, columns):
    """The captions of a record, one at least. Raises RowFault if it has none."""
    captions = []
    faults = []
    for column in columns:
        value = record.get(column)
        if is_conversation(column):
            value = first_answer(value)
        for caption in as_list(value):
            if isinstance(caption, dict):  # Karpathy's sentences
                caption = caption.get("raw") or caption.get("caption") or caption.get("text")
            text = "" if is_nan(caption) else as_written(caption)
            fault = caption_fault(text)
            if fault:
                faults.append(fault)
            else:
                captions.append(text)
    if not captions:
        raise RowFault(faults[0] if faults else "empty caption")
    return captions


def as_list(value):
    """A cell's values: of a list, or of a text that is a list as JSON, numpy or Python writes it, without its empty items."""
    if isinstance(value, list):
        return value
    plain = value.strip() if isinstance(value, str) else ""
    if plain[:1] + plain[-1:] in ("[]", "()"):
        for read in (json.loads, read_strings, ast.literal_eval, read_python):
            try:
                values = read(plain)
            except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
                continue
            if isinstance(values, list | tuple):
                items = [item for item in values if item is not None and not is_nan(item)]
                if all(isinstance(item, str | dict) for item in items):
                    return items
    return [value]


def read_python(text):
    """The value of a text that pandas has written, with nan for an empty item. Raises ValueError, SyntaxError, TokenError."""
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        tokens.append((token.type, "None" if token.string == "nan" else token.string))
    return ast.literal_eval(tokenize.untokenize(tokens).strip())


def read_strings(text):
    """The strings of an array, between which numpy writes no comma: Python would take them for one. Raises ValueError if there
    is anything else in it, RowFault if numpy has left some out."""
    values = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING:
            values.append(ast.literal_eval(token.string))
        elif token.string == "..." and values:
            raise RowFault("numpy has left captions out (...); write the list as JSON")
        elif token.string.strip() not in ("", "[", "]"):
            raise ValueError(f"no array of strings: {token.string}")
    return values


def is_conversation(column):
    return column.casefold() in CONVERSATION_COLUMNS


def first_answer(turns):
    """The caption of a conversation, LLaVA's or another's: the first thing that the model is to answer."""
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise RowFault("broken conversation: not a list of turns") from None
    if is_empty(turns):
        raise RowFault("empty caption: a conversation without turns")
    if not isinstance(turns, list):
        raise RowFault("broken conversation: not a list of turns")
    for turn in turns:
        if isinstance(turn, list) and len(turn) == 2:
            speaker, text = turn
        elif isinstance(turn, dict):
            speaker = turn.get("from") or turn.get("role")
            text = turn.get("value") or turn.get("content") or turn.get("text")
        else:
            raise RowFault(f"broken conversation: a turn is {type(turn).__name__}")
        if str(speaker).casefold() in ("gpt", "assistant", "model", "bot"):
            if isinstance(text, list):  # content in parts
                text = " ".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
            return text
    raise RowFault("empty caption: no answer in the conversation")


def read_question(record, columns):
    """The question, answer and choices of a record. Raises RowFault unless the three are there and fit."""
    if len(columns) < 3:
        return {}
    question = as_written(record.get(columns["question"])).strip()
    answer = as_written(record.get(columns["answer"])).strip()
    choices = record.get(columns["choices"])
    if not question:
        raise RowFault("no question")
    if not answer:
        raise RowFault("no answer")
    if isinstance(choices, str) and choices.strip():  # a .csv holds the list as JSON
        try:
            choices = json.loads(choices)
        except (ValueError, RecursionError):
            choices = None
    if not isinstance(choices, list) or not choices:
        raise RowFault("choices are not a JSON list")
    choices = [as_written(choice).strip() for choice in choices]
    if answer not in choices:
        raise RowFault(f"answer not among the choices: {answer[:40]!r}")
    return {"question": question, "answer": answer, "choices": choices}


# ------------------------------------------------------------------------------------------------------------ labels


def type_labels(table, rows, names):
    """Makes the rows' labels texts: numbers become the set's own names, and what is no label goes. Returns lines.

    names: what the numbers stand for, from the table itself; None: from a file of CLASS_FILES beside it, if there is one.
    """
    names = dict(enumerate(names)) if names else read_class_file(table.parent)
    left_out = defaultdict(Counter)  # reason -> labels
    unnamed = f"are numbers without names (write these to {CLASS_FILES[0]} beside the table, a line each)"
    for row in rows:
        label = row.get("label")
        number = as_number(label)
        name = None
        if names and number in names:
            name = names[number]
        elif number is not None:
            left_out["are numbers that have no name" if names else unnamed][number] += 1
        elif isinstance(label, list | dict):
            left_out["are lists"][json.dumps(label, default=str)] += 1
        elif is_empty(label):
            pass
        elif is_fraction(label):
            left_out["are fractions, which name no class"][label] += 1
        else:
            name = str(label)
        if name is None:
            row.pop("label", None)
        else:
            row["label"] = name
    lines = []
    for reason, labels in left_out.items():
        shown = named([str(label)[:40] for label in labels])
        lines.append(f"{table.name}: {sum(labels.values()):,} labels {reason}, and are left out: {shown}")
    return lines


def as_number(label):
    """The integer that a label is or spells (3, 3.0, "3", true), or None."""
    if isinstance(label, bool | int):
        return int(label)
    if isinstance(label, float | Decimal):
        return int(label) if math.isfinite(label) and label == int(label) else None
    if isinstance(label, str) and re.fullmatch(r"\s*[+-]?\d{1,9}(\.0+)?\s*", label):
        return int(float(label))
    return None


def is_fraction(label):
    """Whether a label that is no integer is or spells a number all the same: a rating, say."""
    if isinstance(label, str):
        return re.fullmatch(r"\s*[+-]?\d*\.\d+\s*", label) is not None
    return isinstance(label, float | Decimal)


def read_class_file(folder):
    """{number: name} of a file of names: a name a line, counted from 0, or `number name` lines. None without a file."""
    for file in CLASS_FILES:
        if (folder / file).is_file():
            return read_class_names(read_text(folder / file))
    return None


def read_class_names(text):
    """{number: name} of the lines of a class file."""
    lines = list(filter(None, map(str.strip, text.splitlines())))
    names = {}
    for line in lines:
        numbered = re.fullmatch(r"(\d+)\s+(.+)", line)
        if not numbered:
            return dict(enumerate(lines))
        names[int(numbered[1])] = numbered[2]
    return names


def named(names, most=5):
    """Some names for a message, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    lines = [" ".join(str(name).split()) for name in list(names)[:most]]
    return ", ".join(lines) + more
