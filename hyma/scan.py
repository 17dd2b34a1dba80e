"""Which rows of a corpus can be used, by what was found of their pictures, and lines that say what they are."""

import math
from collections import Counter
from typing import NamedTuple

from hyma.columns import QUESTION_COLUMNS, TEXT_ONLY, named
from hyma.corpus_files import is_archive
from hyma.embeddings import unique
from hyma.files import read_jsonl
from hyma.pictures import Picture
from hyma.remote import find_remote
from hyma.splits import IN_TWO_SPLITS, SPELLINGS, give_splits
from vlm import BadInput

LEFT_OUT = (TEXT_ONLY, IN_TWO_SPLITS)  # reasons that are no faults


class UsableRow(NamedTuple):
    """A row of the corpus whose picture can be decoded."""

    number: int  # of the row in the corpus
    row: dict  # a copy, whose split may still be changed
    picture: Picture


def sort_rows(corpus, pictures):
    """(rows that can be used, [{key, reason}] of the others, lines about their splits).

    Rows of equal pictures, in one file or in copies, are given the image of the first: it is one picture.
    """
    usable = []
    reasons = {}  # row's number -> why it cannot be used
    image_of_digest = {}
    for number, row in enumerate(corpus.rows):
        reason = row_fault(row) or pictures[row["image"]].reason
        if reason:
            reasons[number] = reason
            continue
        picture = pictures[row["image"]]
        image = image_of_digest.setdefault(picture.sha256, picture.image)
        usable.append(UsableRow(number, dict(row), picture._replace(image=image)))

    lines = []
    if usable:
        rows = [found.row for found in usable]
        digests = [found.picture.sha256 for found in usable]
        lines, held_out = give_splits(rows, digests, corpus.source)
        for place, reason in held_out.items():
            reasons[usable[place].number] = reason

    images = []
    for number, row in enumerate(corpus.rows, start=1):
        images.append(row["image"] or f"row {number}")
    for found in usable:
        images[found.number] = found.picture.image
    keys = row_keys(images)
    rows = []
    for found in usable:
        if found.number not in reasons:
            rows.append(usable_row(keys[found.number], found.row, found.picture))
    quarantine = []
    for number in sorted(reasons):
        # What is not UTF-8 cannot be written as it is.
        quarantine.append({"key": printable(keys[number][:300]), "reason": printable(reasons[number])})
    return rows, quarantine, lines


def row_keys(images):
    """The key of each row: its image path, and for every further caption of that picture `path#2`, `path#3`, ..."""
    captions = Counter()
    keys = []
    for image in images:
        captions[image] += 1
        keys.append(image if captions[image] == 1 else f"{image}#{captions[image]}")
    return keys


def row_fault(row):
    """The reason why a row cannot be used, whatever its picture is, or None."""
    if "fault" in row:
        return row["fault"]
    if not isinstance(row["caption"], str) or not row["caption"].strip():
        return "empty caption"
    texts = [row.get(part, "") for part in ("image", "caption", "label", "split", "question", "answer")]
    texts += row.get("choices", [])
    try:
        "".join(map(str, texts)).encode()
    except UnicodeEncodeError:
        return "not UTF-8 (save the table as UTF-8)"
    if not row["image"]:
        return "no image path"
    return None


def plain_caption(row):
    """The caption of a row as rows.jsonl has it."""
    return " ".join(row["caption"].split())


def usable_row(key, row, picture):
    """The row as rows.jsonl holds it. picture: the `Picture` that was found."""
    found = {"key": key, "image": picture.image, "caption": plain_caption(row)}
    for part in ("label", "split"):
        if row.get(part) not in (None, ""):
            found[part] = str(row[part])
    for part in QUESTION_COLUMNS:
        if row.get(part):
            found[part] = row[part]
    found["image_sha256"] = picture.sha256
    return found


def check_bad(corpus, quarantine, out, allow_bad):
    """Raises BadInput if more of the rows are bad than the share that is allowed.

    Rows that are left out by design, which carry no fault, do not count.
    """
    check_not_all_bad(corpus, quarantine)
    total = len(corpus.rows)
    counts = count_reasons(quarantine)
    bad = sum(count for reason, count in counts.items() if reason not in LEFT_OUT)
    if bad > most_bad(total, allow_bad):
        enough = math.floor(100 * bad / total + 1) / 100  # rounded up, and never to what 0.29 * 100 falls short of
        raise BadInput(
            f"{corpus.source}: {bad:,} of {total:,} rows ({bad / total:.1%}) cannot be used: {in_words(counts)}; "
            f"{out}/quarantine.jsonl names each. Repair them and run the same command again, or allow it: --allow-bad "
            f"{enough:g}"
        )


def check_not_all_bad(corpus, quarantine):
    """Raises BadInput if no row is left."""
    if len(quarantine) == len(corpus.rows):
        first = quarantine[0]
        advice = advise_missing(corpus.root) if first["reason"] == "missing file" else ""
        raise BadInput(f"--data {corpus.root}: no row can be used; the first, {first['key']}: {first['reason']}{advice}")


def advise_missing(root):
    """What to do about pictures that are not where their table says, for a message."""
    archives = [] if find_remote(root) else [path.name for path in sorted(root.iterdir()) if is_archive(path)]
    if archives:
        return f"; the pictures may be in {named(archives)}: unpack it"
    return "; write the folder that it is in into its path"


def count_rows(rows):
    """({image: rows that need it}, how many rows cannot be used, whatever their pictures are)."""
    rows_of_image = Counter()
    bad = 0
    for row in rows:
        fault = row_fault(row)
        if fault:
            bad += fault not in LEFT_OUT
        else:
            rows_of_image[row["image"]] += 1
    return rows_of_image, bad


def most_bad(total, allow_bad):
    """How many of the rows may be bad if that share is allowed. One bad row alone never stops a corpus."""
    return max(1, allow_bad * total)


def count_reasons(quarantine):
    """{kind of reason: rows}, the most frequent first. A reason's kind stands before its colon."""
    counts = Counter(row["reason"].partition(":")[0] for row in quarantine)
    return dict(counts.most_common())


def in_words(counts):
    """Counts of reasons in words: "missing file (8), unreadable image (4)"."""
    parts = [f"{reason} ({count:,})" for reason, count in counts.items()]
    return named(parts, 8)


def describe_rows(source, rows):
    """A line that says what the rows are: pictures, captions, splits, labels."""
    captions = Counter()  # of each picture
    split_of_picture = {}
    classes = set()
    for row in rows:
        captions[row["image"]] += 1
        split_of_picture[row["image"]] = row.get("split")
        if row.get("label"):
            classes.add(row["label"])
    least, most = min(captions.values()), max(captions.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    labels = f"{len(classes):,} ({named(sorted(classes))})" if classes else "none"
    return printable(
        f"{source}: {counted(len(captions), 'picture')}, {counted(len(rows), 'caption')} ({each} a picture), splits "
        f"{describe_splits(split_of_picture.values())}, labels {labels}"
    )


def describe_splits(splits):
    """How many pictures each split has, train first: "train 40, val 5", or "none"."""
    counts = Counter(filter(None, splits))
    parts = []
    for split in unique([*SPELLINGS, *counts]):
        if counts[split]:
            parts.append(f"{split} {counts[split]:,}")
    return ", ".join(parts) or "none"


def describe_quarantine(out, total):
    """A line that says which of the source's rows, so many in total, are left out."""
    quarantine = read_jsonl(out / "quarantine.jsonl")
    counts = in_words(count_reasons(quarantine))
    return f"left out: {len(quarantine):,} of {counted(total, 'row')}: {counts}; {out}/quarantine.jsonl names each"


def counted(number, noun):
    """A number and its noun: "1 picture", "2,000 pictures"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text):
    """A text as one line in UTF-8, whatever names it holds."""
    return " ".join(text.encode(errors="replace").decode().split("\n"))
