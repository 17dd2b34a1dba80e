"""What both trainers share: flags, the schedule, batches, the loss of a step, validation, what is printed at the end.

A generator is whatever gives the connectors of pairs: the hypernetworks of train_hyma.py, the free weights of
train_grid.py. Its protocol is `Generator`, below; what a hypernetwork has besides is in `hyma.hypernetworks`.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hyma.embeddings import SAMPLE, Embeddings, choose_pairs, seeded_generator, split_rows, unique
from hyma.metrics import mean_recalls, pair_name
from hyma.runs import create_run, interrupted_run, reopen_run
from kernels import Layer, clip_loss, connector_mlp
from vlm import BadInput, read_json


class Generator(Protocol):
    """What gives the connectors of pairs: all that the loss of a step, validation and export use. An nn.Module."""

    def forward(self, features: dict[str, Tensor], pairs) -> tuple[list[Tensor], list[Layer]]:
        """What `connector_mlp` takes for these pairs. features: {text encoder: [B, D_t]}."""

    def predict(self, image: str, text: str) -> list[tuple[Tensor, Tensor]]:
        """The pair's connector as it is exported: (weight [out, in], bias [out]) of each layer."""

    def flops(self, batch_size: int, pairs) -> tuple[int, int]:
        """FLOPs of one step of these pairs without its logits, a sum over the layers that it runs (`costs.linear_flops`): (of the
        connectors on the batch, which grow with the samples; of predicting their weights, which grow with the steps)."""


# ------------------------------------------------------------------------------------------------------------- flags


def add_training_flags(parser, name):
    """The flags that mean the same to every trainer. Runs go to runs/<name>-... by default."""
    add = parser.add_argument
    about = "all, vit_l16:mpnet, wildcards, or several of these (default: all)"
    add("--pairs", nargs="+", default=["all"], metavar="IMAGE:TEXT", help=about)
    add("--data", type=Path, help="embedding folder (default: the sample's)")
    add("--out", type=Path, help=f"run folder (default: runs/{name}-<date>-<time>)")
    add(
        "--resume",
        action="store_true",
        help="resume the run in --out, or the newest, with the flags it was started with",
    )
    about = "hidden layers of 1024 (default: %(default)s)"
    add("--connector", choices=["mlp0", "mlp1", "mlp2"], default="mlp1", help=about)
    add("--epochs", type=int, help="passes over the training rows (default: 10, or as many as make 100 steps)")
    add("--rows", type=int, help="use only N rows of the folder, drawn by the seed (default: all)", metavar="N")
    add("--batch-size", type=int, help="rows per step (default: 512, or all there are)")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up; a cosine follows (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's (default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--logit-scale", type=float, default=20.0, help="factor on the cosines, 1 to 150 (default: %(default)s)")
    about = "of the matrix products (default: tf32 on CUDA, else fp32)"
    add("--precision", choices=["fp32", "tf32", "bf16"], help=about)
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")


def check_training_flags(flags, *positive):
    """Raises BadInput for a number out of its range. `positive`: further flags that must be above zero."""
    for name in ("rows", "epochs", "batch_size", "lr", "clip_norm", *positive):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
    if not 1 <= flags.logit_scale <= 150:
        raise BadInput(f"--logit-scale {flags.logit_scale}: must be from 1 to 150")
    if flags.warmup_steps < 0 or not 0 <= flags.weight_decay < math.inf:
        raise BadInput("--warmup-steps and --weight-decay must not be negative")
    if flags.batch_size == 1:
        raise BadInput("--batch-size 1: a contrastive loss needs at least two rows")


def hidden_layers_of(flags):
    """How many hidden layers --connector mlp0, mlp1 or mlp2 has."""
    return int(flags.connector[-1])


def check_seeds(flag, seeds):
    """Raises BadInput for a seed that torch cannot take."""
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise BadInput(f"{flag} {seed}: must be from 0 to 2^63 - 1")


def resolve_training_flags(flags, name, device, row_count):
    """A copy of the flags with values for those whose default depends on data and device, so that config.json has them."""
    typed = recorded_flags(flags)
    flags = argparse.Namespace(**vars(flags))
    flags.data = flags.data or SAMPLE
    flags.batch_size = flags.batch_size or max(2, min(512, row_count))
    if row_count < flags.batch_size:
        raise BadInput(f"--batch-size {flags.batch_size}: {flags.data} has only {row_count} training rows")
    if flags.out is None:
        flags.out = interrupted_run(typed) or Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    flags.epochs = flags.epochs or max(10, math.ceil(100 / (row_count // flags.batch_size)))
    flags.precision = flags.precision or ("tf32" if device.type == "cuda" else "fp32")
    return flags


# {name in the namespace: name on the command line and in config.json}; `from` cannot be a Python name.
RECORDED_NAMES = {"from_run": "from"}


def recorded_flags(flags):
    """{name: value} of the flags, as config.json holds them."""
    recorded = {}
    for name, value in vars(flags).items():
        if name != "resume":
            recorded[RECORDED_NAMES.get(name, name)] = str(value) if isinstance(value, Path) else value
    return recorded


def parse_with_defaults(parser, recorded):
    """The flags, with the recorded ones of another run as defaults, which a flag that is typed now replaces."""
    names = {recorded_name: name for name, recorded_name in RECORDED_NAMES.items()}
    parser.set_defaults(**{names.get(name, name): value for name, value in recorded.items()})
    flags = parser.parse_args()
    flags.data = Path(flags.data)
    return flags


def parse_resumed_flags(parser, out):
    """(flags, config.json) of the run in `out`; flags typed now may not contradict them."""
    if not (out / "config.json").is_file():
        raise BadInput(f"--resume: {out} holds no run (no config.json)")
    config = read_json(out / "config.json")
    script = Path(sys.argv[0]).name
    if config.get("script") != script:
        raise BadInput(f"--resume: {out} was not made by {script}")
    if "method" not in config:
        raise BadInput(f"--resume: {out} was started by an earlier version of {script}; start it again")
    flags = parse_with_defaults(parser, config["flags"])
    flags.out = out
    now = recorded_flags(flags)
    for name, value in config["flags"].items():
        if name != "out" and now[name] != value:
            raise BadInput(f"--{name.replace('_', '-')} {now[name]}: contradicts {out}, which was started with {value}")
    return flags, config


# Flags that may differ between runs of one method: places, data, pairs, hardware, memory, seed.
NOT_PART_OF_METHOD = {"seed", "seeds", "out", "data", "device", "precision", "shard", "pairs", "pairs_per_pass"}


def recipe_of(flags):
    """The flags that define the method; runs that share them differ in their seed alone."""
    recipe = {"script": Path(sys.argv[0]).name}
    for name, value in recorded_flags(flags).items():
        if value and name not in NOT_PART_OF_METHOD:
            recipe[name] = value
    for name in ("budget_of", "from"):
        if recipe.get(name, "full") != "full":
            recipe[name] = "a run"  # each seed's run may name another
    return recipe


# ------------------------------------------------------------------------------------------------- data and run folder


def open_data(flags):
    """(the embedding folder, the pairs) of the flags."""
    data = Embeddings(flags.data or SAMPLE)
    return data, choose_pairs(data, flags.pairs)


def split_for_training(data, seed, count):
    """Indices of the rows to train on and to choose by (`split_rows`). Prints how many there are."""
    train_rows, val_rows = split_rows(data, seed, count)
    sample = " (the sample)" if data.folder == SAMPLE else ""
    print(
        f"data: {os.path.relpath(data.folder)}{sample}: {len(train_rows)} training and {len(val_rows)} validation rows"
    )
    return train_rows, val_rows


def open_run_folder(flags, typed, resumed_config, must_match, run_info, device, wait=False):
    """Makes the run folder or, where `resumed_config` holds its config.json, checks that the run is still the same. Returns the
    lock of the folder. Other arguments: see `create_run`."""
    if resumed_config is not None:
        return reopen_run(flags.out, resumed_config, must_match, wait)
    return create_run(flags.out, recorded_flags(flags), typed, must_match, run_info, device, wait)


def resumed_line(out, step, steps):
    """The line that is printed for a run that was started before."""
    if step == steps:
        return f"{out}: is finished; nothing is left to train"
    return f"resumed: {out} at step {step} of {steps}"


# ---------------------------------------------------------------------------------------------- schedule and batches


def learning_rate(step, steps, peak, warmup_steps):
    """Linear warm-up, then half a cosine to zero: peak / 2 * (1 + cos(pi * share of the steps after the warm-up))."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def draw_rows(step, seed, rows, batch_size):
    """The rows of a step, a pure function of (seed, step). Each epoch is a new order of all rows, cut into batches; what is
    left after the last whole batch is dropped."""
    epoch, place = divmod(step, len(rows) // batch_size)
    order = torch.randperm(len(rows), generator=seeded_generator("rows", seed, epoch))
    return rows[order[place * batch_size : (place + 1) * batch_size]]  # [B]


def training_dtype(precision):
    """The dtype of a step's matrix products."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


# ------------------------------------------------------------------------------------------------ the loss of a step


def pair_losses(generator, store, rows, pairs, dtype, logit_scale):
    """Symmetric InfoNCE of each pair on a batch of rows: [P], float32 (arXiv 2507.10015, section 3).

    The mean of both cross entropies of logit_scale * cosine(connector(text), image), the batch's other rows being the
    negatives. store: its `take(encoder, rows)` gives unit vectors of texts [B, D_t], and of images unit vectors [B, D_i] or
    shorter ones, coordinates along orthonormal axes of that space (`project_images`).

    To try another loss, replace `clip_loss` by any autograd code on z, which is not normalised, and the image vectors:
    z.split(widths of the pairs' images, dim=1) is a pair's [B, D_p] each. The fast path of this one is in
    kernels/reference.py and kernels/contrastive*.py.
    """
    text_names = unique(text for _, text in pairs)
    image_names = unique(image for image, _ in pairs)
    features = {name: store.take(name, rows).to(dtype) for name in text_names}  # each [B, D_t]
    inputs, layers = generator(features, pairs)
    layers = [cast_layer(layer, dtype) for layer in layers]
    z, sumsq = connector_mlp(inputs, layers)  # [B, sum D_p] not normalised, [P, B] squared lengths
    image_vectors = [store.take(name, rows).to(dtype) for name in image_names]  # each [B, D_i]
    image_of_pair = [image_names.index(image) for image, _ in pairs]
    losses, _ = clip_loss(z, image_vectors, image_of_pair, logit_scale, sumsq=sumsq)
    return losses


def cast_layer(layer, dtype):
    """The layer with its weights and biases in this dtype."""
    weights = [weight.to(dtype) for weight in layer.weights]
    biases = [bias.to(dtype) for bias in layer.biases]
    return Layer(weights, biases, layer.wiring)


def separate_layers(features, pairs, connectors):
    """What `connector_mlp` takes for pairs with weights of their own, which share nothing.

    features: {text encoder: [B, D_t]}. connectors: [(weight, bias)] per layer, for each pair.
    """
    text_names = list(features)
    layers = []
    for depth in range(len(connectors[0])):
        weights = [connector[depth][0] for connector in connectors]
        biases = [connector[depth][1] for connector in connectors]
        if depth == 0:
            wiring = [(text_names.index(text), p) for p, (_, text) in enumerate(pairs)]
        else:
            wiring = [(p, p) for p in range(len(pairs))]
        layers.append(Layer(weights, biases, wiring))
    return list(features.values()), layers


# --------------------------------------------------------------------------------------- validation and what is printed


@torch.no_grad()
def validate(generator, store, retrieval, pairs):
    """{"image:text": R@1, R@5, R@10 of text to image, then of image to text} on the validation rows, in the pairs' order."""
    recalls = {pair_name(pair): None for pair in pairs}
    for text in unique(text for _, text in pairs):  # a text encoder at a time bounds the memory
        group = [pair for pair in pairs if pair[1] == text]
        features = {text: store.take(text, retrieval.rows)}  # [n, D_t]
        z, _ = connector_mlp(*generator(features, group))  # [n, sum D_p]
        mapped = z.split([store.dims[image] for image, _ in group], dim=1)
        for (image, _), outputs in zip(group, mapped):
            if not outputs.isfinite().all():
                raise BadInput(
                    f"the last update made the connector of {image}:{text} give numbers that are not finite; what was saved "
                    "before is kept; try a lower --lr"
                )
            recalls[f"{image}:{text}"] = retrieval.recalls(outputs, store.take(image, retrieval.rows))
    return recalls


def mean_recall10(recalls):
    """{"image:text": six recalls} to the number that chooses the best state: mean R@10 of both directions and all pairs."""
    return sum(mean_recalls(six)[2] for six in recalls.values()) / len(recalls)


def print_ranking(ranking, recalls, retrieval):
    """The rows of `rank_pairs` as a table: recalls in per cent, both directions, against chance."""
    chance = " / ".join(f"{100 * value:.1f}" for value in retrieval.chance)
    wide = max(len(row["image"]) for row in ranking)
    narrow = max(len(row["text"]) for row in ranking)
    has_expected = "expected_recall10" in ranking[0]
    print(f"\nranking on {len(retrieval.rows)} validation rows, recall in % (chance at 1 / 5 / 10: {chance})")
    heading = f"{'':{wide + narrow + 8}}text -> image        image -> text        mean"
    columns = f"rank  {'image':{wide}}  {'text':{narrow}}" + "   R@1   R@5  R@10" * 2 + "   R@10"
    print(heading + "  expected" * has_expected)
    print(columns + "      R@10" * has_expected)
    for row in ranking:
        line = f"{row['rank']:4}  {row['image']:{wide}}  {row['text']:{narrow}}"
        for value in recalls[f"{row['image']}:{row['text']}"]:
            line += f"{100 * value:6.1f}"
        line += f"{100 * row['val_recall10']:7.1f}"
        if has_expected:
            line += f"{100 * row['expected_recall10']:10.1f}"
        print(line)


def print_results(ranking, recalls, retrieval, description, state, best):
    """The ranking, what it cost, and the best connector, ready to load. description: how it was trained, in a few words."""
    print_ranking(ranking, recalls, retrieval)
    if sum(row["val_recall10"] for row in ranking) < 2 * len(ranking) * retrieval.chance[2]:
        print(
            "All pairs are at chance. A lower --lr or more --epochs may help; do captions and images belong together?"
        )
    updates = state["updates"].values()
    teraflop = state["flops"] / 1e12
    print(
        f"{description}: {teraflop:.2f} TFLOP in {state['seconds']:.0f} s, {min(updates)} to {max(updates)} updates per pair"
    )
    print(f"\nbest connector: {best}")
    print(f"load it: from vlm import get_vlm_from_checkpoint; vlm = get_vlm_from_checkpoint({str(best)!r})")
