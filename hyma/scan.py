"""The scan of a corpus: every picture decoded once, the rows that can be used, and lines that say what they are."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from hyma.columns import TEXT_ONLY, named
from hyma.datasets import row_fault, usable_row
from hyma.embeddings import row_keys, unique
from hyma.files import read_jsonl, write_jsonl
from hyma.pictures import Picture, scan_picture
from hyma.splits import IN_TWO_SPLITS, SPELLINGS, give_splits
from vlm import BadInput

SCANNED_AT_ONCE = 256  # pictures between two writes of the scan's journal
LEFT_OUT = (TEXT_ONLY, IN_TWO_SPLITS)  # reasons that are no faults


def scan_corpus(corpus, listing, journal, workers):
    """Decodes every picture once: {image as the rows name it: Picture}.

    The journal holds the hash of the rows, then a picture a line, so that an interrupted scan can be resumed. Pictures
    that were refused are looked at again.
    """
    pictures = read_journal(journal, listing)
    write_jsonl(journal, [listing, *([image, *picture] for image, picture in pictures.items())])
    images = unique(row["image"] for row in corpus.rows if not row_fault(row))
    missing = [image for image in images if image not in pictures or pictures[image].reason]
    with (
        tqdm(total=len(images), initial=len(images) - len(missing), desc="scan", unit="picture") as progress,
        open(journal, "a") as file,
        ThreadPoolExecutor(workers) as pool,
    ):
        for start in range(0, len(missing), SCANNED_AT_ONCE):
            part = missing[start : start + SCANNED_AT_ONCE]
            found = list(pool.map(lambda image: scan_picture(corpus.root, image), part))
            file.writelines(json.dumps([image, *picture]) + "\n" for image, picture in zip(part, found))
            file.flush()
            pictures |= zip(part, found)
            progress.update(len(found))
    return pictures


def read_journal(journal, listing):
    """The pictures that an earlier scan of the same rows has found so far: none if its journal is damaged."""
    if not journal.is_file():
        return {}
    try:
        first, *lines = journal.read_text(errors="replace").split("\n")[:-1]  # a line without its end was cut off
        if json.loads(first) != listing:
            return {}
        return {image: Picture(*picture) for image, *picture in map(json.loads, lines)}
    except (ValueError, TypeError, RecursionError):
        return {}


def sort_rows(corpus, pictures):
    """(rows that can be used, [{key, reason}] of the others, lines about their splits).

    Rows of equal pictures, in one file or in copies, are given the image of the first: it is one picture.
    """
    used = []
    reasons = {}  # row's number -> why it cannot be used
    image_of_digest = {}
    for number, row in enumerate(corpus.rows):
        reason = row_fault(row)
        picture = None if reason else pictures[row["image"]]
        if reason or picture.reason:
            reasons[number] = reason or picture.reason
            continue
        image = image_of_digest.setdefault(picture.sha256, picture.image)
        used.append((number, dict(row), picture._replace(image=image)))

    sha256_of = {id(row): picture.sha256 for _, row, picture in used}
    lines = []
    if used:
        lines, held_out = give_splits([row for _, row, _ in used], lambda row: sha256_of[id(row)], corpus.source)
        reasons |= {used[place][0]: reason for place, reason in held_out.items()}
    images = [row["image"] or f"row {number}" for number, row in enumerate(corpus.rows, start=1)]
    for number, _, picture in used:
        images[number] = picture.image
    keys = row_keys(images)
    rows = [usable_row(keys[number], row, picture) for number, row, picture in used if number not in reasons]
    quarantine = []
    for number in sorted(reasons):
        # What is not UTF-8 cannot be written as it is.
        quarantine.append({"key": printable(keys[number][:300]), "reason": printable(reasons[number])})
    return rows, quarantine, lines


def check_bad(corpus, quarantine, out, allow_bad):
    """Raises BadInput if more of the rows are bad than the share that is allowed. One bad row alone never stops a corpus.

    Rows that are left out by design, which carry no fault, do not count.
    """
    total = len(corpus.rows)
    counts = count_reasons(quarantine)
    if len(quarantine) == total:
        first = quarantine[0]
        raise BadInput(f"--data {corpus.root}: no row can be used; the first, {first['key']}: {first['reason']}")
    bad = sum(count for reason, count in counts.items() if reason not in LEFT_OUT)
    if bad > max(1, allow_bad * total):
        raise BadInput(
            f"{corpus.source}: {bad:,} of {total:,} rows ({bad / total:.1%}) cannot be used: {in_words(counts)}; "
            f"{out}/quarantine.jsonl names each. Mend them and run the same command again, or allow it: --allow-bad "
            f"{math.ceil(100 * bad / total) / 100:g}"
        )


def count_reasons(quarantine):
    """{kind of reason: rows}, the most frequent first. A reason's kind stands before its colon."""
    return dict(Counter(row["reason"].partition(":")[0] for row in quarantine).most_common())


def in_words(counts):
    """Counts of reasons in words: "missing file (8), unreadable image (4)"."""
    parts = [f"{reason} ({count:,})" for reason, count in counts.items()]
    return named(parts, 8)


def describe_rows(source, rows):
    """A line that says what the rows are: pictures, captions, splits, labels."""
    captions = Counter(row["image"] for row in rows)  # of each picture
    least, most = min(captions.values()), max(captions.values())
    each = f"{least}" if least == most else f"{least} to {most}"
    split_of_picture = {row["image"]: row.get("split") for row in rows}
    counts = Counter(split_of_picture.values())
    order = unique(split for split in (*SPELLINGS, *counts) if split and counts[split])
    splits = ", ".join(f"{split} {counts[split]:,}" for split in order) or "none"
    classes = unique(row["label"] for row in rows if row.get("label"))
    labels = f"{len(classes):,} ({named(sorted(classes))})" if classes else "none"
    pictures = counted(len(captions), "picture")
    return printable(
        f"{source}: {pictures}, {counted(len(rows), 'caption')} ({each} a picture), splits {splits}, labels {labels}"
    )


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
