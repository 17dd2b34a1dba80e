"""The pairs of encoders of a run, (image, text): which are trained, scored and exported, and which a step draws."""

import itertools
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from hyma.embeddings import unique
from hyma.pair_names import choose_pairs, pair_name, pair_of_name
from hyma.runs import Checkpoints, check_same_split
from hyma.seeds import seeded_generator
from vlm import BadInput, read_json


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
    """The Pairs of --pairs, --predict and --add-encoder."""
    if flags.add_encoder:
        return arrange_added_encoder(flags.add_encoder, Path(flags.from_run), data)
    image_names, text_names = images_of(trained), texts_of(trained)
    untrained = []
    for pair in choose_pairs(data, flags.predict, "--predict") if flags.predict else []:
        if pair in trained:
            continue
        for name in pair:
            if name not in image_names + text_names:
                raise BadInput(f"--predict {pair_name(pair)}: {name} must be in a pair that is trained")
        untrained.append(pair)
    return Pairs(trained, untrained, trained + untrained, image_names, text_names, None)


def arrange_added_encoder(name, run, data):
    """The Pairs of an encoder that is added to a finished run, whose own pairs stay as they are."""
    if not (run / "ledger.json").is_file():
        raise BadInput(f"--from {run}: is not finished; rerun to resume: python train_hyma.py --resume --out {run}")
    saved = Checkpoints(run).load("state")
    base_state = saved["state"]
    if not {"refined", "fold_recalls"} <= base_state.keys():
        raise BadInput(f"--from {run}: was made by an earlier version of train_hyma.py; make the run again")
    base_state.setdefault("fold_pairs", len(base_state["fold_recalls"]))  # of an earlier version
    if "refinement" in saved:
        base_state["refined"] |= saved["refinement"]["state"]["best"]
    base_pairs = list(map(pair_of_name, base_state["best"]["recalls"]))
    image_names, text_names = images_of(base_pairs), texts_of(base_pairs)
    if name not in data.encoders:
        raise BadInput(f"--add-encoder {name}: not in {data.folder}; embed it with: python embed.py --encoder {name}")
    if name in image_names + text_names:
        raise BadInput(f"--add-encoder {name}: is in {run} already")
    config = read_json(run / "config.json")
    check_same_split(f"--from {run}", config, data)
    trained_on = config["embeddings"]
    for encoder, digest in data.fingerprint(image_names + text_names).items():
        if digest != trained_on[encoder]:
            raise BadInput(f"--from {run}: its embeddings in {data.folder} have changed since")
    if data.encoders[name].kind == "image":
        added = list(itertools.product([name], text_names))
        image_names = [*image_names, name]
    else:
        added = list(itertools.product(image_names, [name]))
        text_names = [*text_names, name]
    return Pairs(added, base_pairs, added, image_names, text_names, base_state)
