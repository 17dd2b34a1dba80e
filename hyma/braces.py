"""Names of many files in one: shards/{000..099}.tar, {train,val}.csv, as webdataset and shells write them."""

import re

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000  # names


def expand_braces(text):
    """The names that a pattern stands for, in order: [text] itself where it has no braces with a range or a comma."""
    for braces in BRACES.finditer(text):
        inner = braces[1]
        if found := RANGE.fullmatch(inner):
            parts = numbers_of(found[1], found[2])
        elif "," in inner:
            parts = inner.split(",")
        else:
            continue
        names = []
        for part in parts:
            names += expand_braces(text[: braces.start()] + part + text[braces.end() :])
            if len(names) > MOST:
                return [text]
        return names
    return [text]


def numbers_of(first, last):
    """The numbers from first to last, written with as many digits as these have where one begins with a zero."""
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    step = 1 if int(first) <= int(last) else -1
    for number in range(int(first), int(last) + step, step):
        yield f"{number:0{width}d}" if width else str(number)
