"""Which rows train, which choose and which test: names of splits, the split that embed.py makes, the one that is read.

A split is a name, `train`, `val` or `test`, in `rows.jsonl`. Rows train the connectors; val chooses among them; test is
read once, by evaluate.py.
"""

import math
import re
from collections import Counter, defaultdict

import torch

from hyma.embeddings import Embeddings, unique
from hyma.seeds import seeded_generator
from vlm import BadInput

SPELLINGS = {
    # restval: Karpathy's COCO, whose authors train on it
    "train": ("train", "training", "trn", "restval", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "minival"),
    "test": (
        *("test", "testing", "tst", "holdout", "heldout", "evaluation", "testmini", "testdev", "devtest", "valtest"),
        *("publictest", "privatetest"),  # of a contest
    ),
}
SPLIT_OF = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}
PICTURE_WORD = re.compile(r"images?|imgs?|pictures?|pics?|photos?|jpe?gs?|pngs?", re.I)

LEFT_OUT = "left out"  # the split of rows of an adopted folder that cannot be used, but whose vectors are there
IN_TWO_SPLITS = "in two splits"  # how the reason of a row begins that is left out for its picture's sake
HELD_OUT = 0.1  # of the pictures, for each of val and test
MOST_HELD_OUT = 5000


def known_split(name):
    """train, val or test for a name as people write it (Train, val2014, test-images, testA, train_val), None for any other."""
    plain = re.sub(r"(?<=[a-z])[A-Z]$", "", str(name).strip()).casefold()
    plain = re.sub(r"[-_ ]?(\d{1,4}|images|imgs|set|split|data)$", "", plain)
    return SPLIT_OF.get(re.sub(r"[-_ ]", "", plain))


def has_test_rows(rows):
    """Whether some rows are marked as test rows, in any spelling."""
    return any(known_split(row.get("split")) == "test" for row in rows)


def split_of_pictures(name):
    """The split that a folder of pictures is named after and nothing else: test/, images_test/, train_img/. None if it is not."""
    words = [word for word in re.split(r"[-_.= ]", name) if not PICTURE_WORD.fullmatch(word)]
    return known_split("_".join(words))


def split_of_words(name):
    """The split that a word of a table's name is, or of its folder's: train.csv, cc3m-validation-0000.tar,
    captions_val2017.json, test_unseen/, split=test/.

    None if there is none, or if train is one of two: test_dev and val_test are to test on.
    """
    found = {known_split(name)} - {None} or set(map(known_split, re.split(r"[-_.= ]", name))) - {None}
    if found == {"val", "test"}:
        return "test"
    return found.pop() if len(found) == 1 else None


# ----------------------------------------------------------------------------------------- the split that embed.py makes


def give_splits(rows, digests, source):
    """Writes the split of every row. Returns (lines that say what was done, {row number: why it must not be used}).

    rows: dicts that may have a `split`, as their source spells it. digests: of each row's picture. source: the name of
    the rows, for messages.

    Rows keep the split that they come with, and a row without one trains where others have one. Where training rows
    have no val beside them, pictures are set aside from them to choose by, and, if there is no test either, to test on:
    data that come with train and val keep just these. A row whose picture is held out elsewhere does
    not count, else that picture would be trained on. Raises BadInput if no row's split has a known name.
    """
    lines = read_names(rows, source)
    refused = refuse_held_out(rows, digests)
    used = []
    digests_used = []
    for number, (row, digest) in enumerate(zip(rows, digests)):
        if number not in refused:
            used.append(row)
            digests_used.append(digest)
    lines += set_aside(used, digests_used)
    return lines, refused


def read_names(rows, source):
    """Replaces the splits' names by train, val and test; those of unknown names stay. Returns lines about them."""
    unknown = Counter()
    unnamed = 0
    known = False
    for row in rows:
        name = row.get("split")
        if name in (None, ""):
            unnamed += 1
        elif known_split(name):
            row["split"] = known_split(name)
            known = True
        else:
            unknown[str(name)] += 1
    parts = [f"{name!r} ({count:,} rows)" for name, count in unknown.most_common(5)]
    counts = ", ".join(parts)
    if unknown and not known:
        raise BadInput(
            f"{source}: the splits are named {counts}, and none of these is train, val or test; rename them, or leave the split "
            "column out to have the rows split by picture"
        )
    lines = []
    if unknown:
        lines.append(
            f"splits of unknown names are used neither to train, to choose nor to test: {counts}; known: {spellings()}"
        )
    if known and unnamed:
        lines.append("1 row has no split and trains" if unnamed == 1 else f"{unnamed:,} rows have no split and train")
    for row in rows:
        if row.get("split") in (None, ""):
            row["split"] = "train"
    return lines


def spellings():
    """The known names of splits, for a message."""
    return "; ".join(map(" ".join, SPELLINGS.values()))


def refuse_held_out(rows, digests):
    """{row number: reason} of the training rows whose picture is in val or test, and the val rows whose is in test."""
    splits_of_picture = defaultdict(set)
    for row, digest in zip(rows, digests):
        splits_of_picture[digest].add(row["split"])
    refused = {}
    for number, (row, digest) in enumerate(zip(rows, digests)):
        others = splits_of_picture[digest]
        held_out = None
        if row["split"] in ("train", "val") and "test" in others:
            held_out = "test"
        elif row["split"] == "train" and "val" in others:
            held_out = "val"
        if held_out:
            refused[number] = f"{IN_TWO_SPLITS}: the same picture is in {held_out}, and this row is in {row['split']}"
    return refused


def set_aside(rows, digests):
    """Moves training rows to val, where it is empty, and then to test: all rows of a picture together.

    The digest of a picture alone says where it belongs, so that the split stays as it is when rows are in another order or are
    added; where there are more pictures than MOST_HELD_OUT for each, added ones take the places of others. Returns lines about
    what was moved.
    """
    found = {row["split"] for row in rows}
    if "train" not in found or "val" in found:
        return []
    training = set()
    for row, digest in zip(rows, digests):
        if row["split"] == "train":
            training.add(digest)
    least = 1 if len(training) < 10 else 2  # of one picture any other is as good
    most = min(MOST_HELD_OUT, max(least, len(training) // 5))
    moved = {}
    for split, first in (("val", HELD_OUT), ("test", 0)):
        left = training.difference(moved)
        if split not in found and len(left) > 1:
            chosen = draw_held_out(left, first, least)
            moved |= dict.fromkeys(chosen[:most], split)
    for row, digest in zip(rows, digests):
        if row["split"] == "train":
            row["split"] = moved.get(digest, "train")
    counts = Counter(moved.values())
    if not counts:
        return []
    parts = [f"{split} {counts[split]:,}" for split in ("val", "test") if counts[split]]
    return [f"set aside by picture content from {len(training):,} training pictures: {', '.join(parts)}"]


def draw_held_out(digests, first, least):
    """The pictures whose place is from `first` to `first + HELD_OUT`; where these are too few, then those that are next."""
    inside = []
    outside = []
    for digest in digests:
        place = place_of(digest)
        if first <= place < first + HELD_OUT:
            inside.append((place, digest))
        else:
            outside.append((place < first, place, digest))
    chosen = sorted(inside) + sorted(outside)[: max(0, least - len(inside))]
    return [digest for *_, digest in chosen]


def place_of(digest):
    """A number from 0 to 1 for a picture, spread evenly, from the digest of its bytes alone."""
    return int(digest[:13], 16) / 16**13


# ---------------------------------------------------------------------------------------- the split of an embedding folder


def split_rows(data: Embeddings, seed=0, count=None, fraction=0.1, most=5000):
    """Row numbers to train on and to choose by: (train [n], validation [m]).

    count: only so many rows, both kinds in proportion, drawn by the seed; a smaller draw is part of every larger one.

    The `split` of the rows decides where there is one: train, or none, is trained on; val chooses; test and any other
    name is left alone. Otherwise a tenth of the pictures, or `most`, is set aside, all captions of a picture together,
    so that no validation picture is trained on. Raises BadInput if there is nothing to train on or to choose by.
    """
    splits = [row.get("split") for row in data.rows] if data.rows else []
    if any(splits):
        train, validation = split_by_column(splits)
    else:
        train, validation = split_by_picture(data, seed, fraction, most)
    for kind, rows in (("train", train), ("val", validation)):
        if len(rows) == 0:
            raise BadInput(no_rows_to(kind, data, splits))
    share = (count or math.inf) / (len(train) + len(validation))
    if share < 1:
        random = seeded_generator("part of the rows", seed)
        train = draw_share(train, share, random)
        validation = draw_share(validation, share, random)
    return train.sort().values, validation.sort().values


def split_by_column(splits):
    """(train, validation) by the values of the split column."""
    train = []
    validation = []
    for i, split in enumerate(splits):
        if split in (None, "") or known_split(split) == "train":
            train.append(i)
        elif known_split(split) == "val":
            validation.append(i)
    return torch.tensor(train, dtype=torch.int64), torch.tensor(validation, dtype=torch.int64)


def no_rows_to(kind, data, splits):
    """Why nothing can be trained or chosen, in a line."""
    purpose = {"train": "train on", "val": "choose by"}[kind]
    if not any(splits):
        return f"{data.folder}: one picture leaves no {kind} rows to {purpose}; at least two pictures are needed"
    counts = Counter(map(str, splits))
    parts = []
    for split, count in counts.items():
        parts.append(f"{split} {count:,}")
    return (
        f"{data.folder}/rows.jsonl: there are no {kind} rows to {purpose} among its splits ({', '.join(parts)} rows); embed more "
        "pictures, or a table with train and val rows, into a new --out"
    )


def split_by_picture(data, seed, fraction, most):
    """(train, validation): `fraction` of the pictures, or `most`, with all their captions, are for validation."""
    pictures = [row["image"] for row in data.rows] if data.rows else list(range(data.row_count))
    different = unique(pictures)
    count = min(most, max(1, round(fraction * len(different))))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {different[i] for i in order[:count]}
    train = []
    validation = []
    for i, picture in enumerate(pictures):
        if picture in held_out:
            validation.append(i)
        else:
            train.append(i)
    return torch.tensor(train, dtype=torch.int64), torch.tensor(validation, dtype=torch.int64)


def draw_share(rows, share, random):
    """That share of the rows, one at least, drawn by the generator."""
    order = torch.randperm(len(rows), generator=random)
    return rows[order[: max(1, int(share * len(rows)))]]
