"""The pairs of encoders of a run, (image, text): which are trained, scored and exported, and which a step draws."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from hyma.embeddings import unique
from hyma.pair_names import choose_pairs, pair_name
from hyma.seeds import seeded_generator
from vlm import BadInput


def images_of(pairs):
    """The image encoders of pairs, in the order in which they first stand."""
    return unique(image for image, _ in pairs)


def texts_of(pairs):
    """The text encoders of pairs, in the order in which they first stand."""
    return unique(text for _, text in pairs)


def group_by_text(pairs):
    """{text encoder: its pairs}, both in the pairs' order."""
    groups = {}
    for image, text in pairs:
        groups.setdefault(text, []).append((image, text))
    return groups


def draw_pairs(step, seed, pairs, pairs_per_step):
    """The pairs of a step, a pure function of (seed, step).

    A round is as many steps as it takes to draw every pair once. The pairs of a step have the same text encoder, whose part
    of the connectors is then computed once for all of them.
    """
    steps_per_round = 0
    for group in group_by_text(pairs).values():
        steps_per_round += math.ceil(len(group) / pairs_per_step)
    round_index, place = divmod(step, steps_per_round)
    return draw_round(round_index, seed, tuple(pairs), pairs_per_step)[place]


def count_sets(pairs, pairs_per_step):
    """How many different sets of pairs a step can have."""
    count = 0
    for group in group_by_text(pairs).values():
        sizes = {min(pairs_per_step, len(group)), len(group) % pairs_per_step}  # the last of a round is what is left
        for size in sizes - {0}:
            count += math.comb(len(group), size)
    return count


@lru_cache(maxsize=1)
def draw_round(round_index, seed, pairs, pairs_per_step):
    """The pairs of each step of a round."""
    groups = group_by_text(pairs).values()
    random = seeded_generator("pairs", seed, round_index)
    steps = []
    for group in groups:
        order = torch.randperm(len(group), generator=random)
        shuffled = [group[k] for k in order.tolist()]
        for start in range(0, len(group), pairs_per_step):
            steps.append(shuffled[start : start + pairs_per_step])
    order = torch.randperm(len(steps), generator=random)
    return [steps[k] for k in order.tolist()]


# ----------------------------------------------------------------------------------------- the pairs of train_hyma.py


class Pairs(NamedTuple):
    """What a run trains, scores and exports. Pairs are (image, text)."""

    trained: list
    untrained: list  # exported too: predicted by --predict, or of the run that --add-encoder adds to
    scored: list  # validated and cross-validated
    image_names: list  # encoders; an added one comes last, so that the base run's parts keep their places
    text_names: list
    base_state: dict | None  # the state of the run that --add-encoder adds to


def arrange_pairs(flags, data, trained):
    """The Pairs of --pairs and --predict. trained: those of --pairs."""
    image_names, text_names = images_of(trained), texts_of(trained)
    untrained = []
    for pair in choose_pairs(data, flags.predict, "--predict") if flags.predict else []:
        if pair in trained:
            continue
        others = [name for name in pair if name not in image_names + text_names]
        if others and pair_name(pair) in flags.predict:  # of a wildcard, those that can be: the folder may have others
            raise BadInput(f"--predict {pair_name(pair)}: {others[0]} must be in a pair that is trained")
        if not others:
            untrained.append(pair)
    return Pairs(trained, untrained, trained + untrained, image_names, text_names, None)
