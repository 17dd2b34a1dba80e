"""A pair of encoders is (image, text); its name is "image:text", on the command line, in files and in tables.

Names of encoders hold no colon (`vlm.is_encoder_name`), so that a name means one pair.
"""

import fnmatch
import itertools

from vlm import BadInput


def pair_name(pair):
    """("image", "text") as "image:text"."""
    return ":".join(pair)


def pair_of_name(name):
    """("image", "text") of "image:text"."""
    image, _, text = name.partition(":")
    return image, text


def name_of_row(row):
    """The name of the pair in a row of ranking.csv."""
    return pair_name((row["image"], row["text"]))


def choose_pairs(data, patterns, flag="--pairs"):
    """The (image, text) pairs that `--pairs` asks for: `all`, `vit_l16:mpnet`, wildcards like `vit_*:*`, several.

    data: the embedding folder, whose order the pairs have. Raises BadInput for a pattern that no pair's name matches.
    """
    images, texts = data.names("image"), data.names("text")
    pairs = list(itertools.product(images, texts))
    if not pairs:
        raise BadInput(
            f"{data.folder}: holds {len(images)} image and {len(texts)} text encoders; one of each is needed at least"
        )
    chosen = set()
    for pattern in patterns:
        wildcard = "*:*" if pattern == "all" else pattern
        matched = {pair for pair in pairs if fnmatch.fnmatchcase(pair_name(pair), wildcard)}
        if not matched:
            known = f"images {', '.join(images)}; texts {', '.join(texts)}"
            raise BadInput(f"{flag} {pattern}: no such pair in {data.folder}, which has {known}")
        chosen |= matched
    return [pair for pair in pairs if pair in chosen]
