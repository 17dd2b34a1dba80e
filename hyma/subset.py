"""A subset of a corpus to embed first: `--rows N --seed S`, and the whole corpus that it stands for."""

import hashlib
from collections import Counter, defaultdict

from hyma.pictures import Picture
from hyma.scan import check_not_all_bad, row_fault, sort_rows
from vlm import BadInput

# Flags that must be the same for the whole corpus, so that it has the same rows and takes over the vectors of the subset.
SAME_OPTIONS = ("data", "image_column", "caption_column", "weights", "allow_bad", "templates", "dtype", "precision", "compile")


def take_subset(corpus, count, seed):
    """The corpus with at most `count` of its rows, in their order; a smaller subset is part of every larger one.

    A hash of the seed and of the picture's path says when a picture's turn comes, so that neither the order of the rows
    nor rows that are added change it. A picture brings all its rows.
    """
    rows_of_image = defaultdict(list)
    drawn_from = set()
    for number, row in enumerate(corpus.rows):
        rows_of_image[row["image"]].append(number)
        if not row_fault(row):
            drawn_from.add(row["image"])
    chosen = []
    for image in sorted(drawn_from, key=lambda image: turn_of(image, seed)):
        if len(chosen) + len(rows_of_image[image]) > count:
            break
        chosen += rows_of_image[image]
    if not chosen:
        raise BadInput(f"--rows {count}: the first picture has more captions than that; draw more rows")
    return corpus._replace(rows=[corpus.rows[number] for number in sorted(chosen)])


def turn_of(image, seed):
    """What pictures are sorted by to be drawn."""
    return hashlib.sha256(f"{seed}:{image}".encode(errors="surrogateescape")).digest()


def foresee(corpus):
    """The rows that the corpus will have if every picture can be used and no two are copies: its rows.

    Where a split is made from the pictures' bytes, their paths stand for these, so its sizes are expectations. Raises
    BadInput as `sort_rows` does, and if no row can be used whatever the pictures are, before an encoder is loaded.
    """
    pictures = {}
    for row in corpus.rows:
        if not row_fault(row):
            image = row["image"]
            digest = hashlib.sha256(image.encode()).hexdigest()
            pictures[image] = Picture(None, image, digest)
    rows, quarantine, _ = sort_rows(corpus, pictures)
    check_not_all_bad(corpus, quarantine)
    return rows


def typed_options(parser, flags):
    """{flag: its values} of those of SAME_OPTIONS that are not the defaults: what embed.py needs to be given again."""
    options = {}
    for name in SAME_OPTIONS:
        value = getattr(flags, name)
        if value != parser.get_default(name):
            values = value if isinstance(value, list) else [] if value is True else [value]
            options[f"--{name.replace('_', '-')}"] = [str(one) for one in values]
    return options


def describe_whole(rows):
    """What the manifest of a subset records of the whole corpus: how many rows, pictures, and rows of each split."""
    splits = Counter(row.get("split", "none") for row in rows)
    return {"rows": len(rows), "pictures": len({row["image"] for row in rows}), "splits": dict(splits)}
