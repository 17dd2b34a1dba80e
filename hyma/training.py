"""What both trainers share: flags, schedule, batches, the loss of a step, validation."""

import math
import os
import time
from pathlib import Path

import torch

from hyma.embeddings import SAMPLE, Embeddings, choose_pairs, random_of, split_rows, unique
from kernels import Layer, clip_loss, connector_mlp
from vlm import BadInput


def print_ranking(table, recalls, retrieval):
    """The rows of `rank_pairs` as a table: recalls in per cent, both directions, against chance."""
    chance = " / ".join(f"{100 * c:.1f}" for c in retrieval.chance)
    wide, narrow = (max(len(row[part]) for row in table) for part in ("image", "text"))
    print(f"\nranking on {len(retrieval.rows)} validation rows, recall in % (chance at 1 / 5 / 10: {chance})")
    more = "expected_recall10" in table[0]
    print(f"{'':{wide + narrow + 8}}text -> image        image -> text        mean" + "  expected" * more)
    print(f"rank  {'image':{wide}}  {'text':{narrow}}" + "   R@1   R@5  R@10" * 2 + "   R@10" + "      R@10" * more)
    for row in table:
        six = "".join(f"{100 * value:6.1f}" for value in recalls[f"{row['image']}:{row['text']}"])
        six += f"{100 * row['val_recall10']:7.1f}" + (f"{100 * row['expected_recall10']:10.1f}" if more else "")
        print(f"{row['rank']:4}  {row['image']:{wide}}  {row['text']:{narrow}}{six}")


def add_training_flags(parser, name):
    """The flags that mean the same to every trainer. Runs go to runs/<name>-... by default."""
    add = parser.add_argument
    add(
        "--pairs",
        nargs="+",
        default=["all"],
        metavar="IMAGE:TEXT",
        help="all, vit_l16:mpnet, wildcards, several (default: all)",
    )
    add("--data", type=Path, help="embedding folder (default: the sample's)")
    add("--out", type=Path, help=f"run folder (default: runs/{name}-<date>-<time>)")
    add("--resume", action="store_true", help="go on with the run in --out, or with the newest; its flags are kept")
    add(
        "--connector",
        choices=["mlp0", "mlp1", "mlp2"],
        default="mlp1",
        help="hidden layers of 1024 (default: %(default)s)",
    )
    add("--epochs", type=int, help="passes over the training rows (default: 10, or what makes 100 steps)")
    add("--rows", type=int, help="choose from so many rows of the folder, drawn by the seed (default: all)")
    add("--batch-size", type=int, help="rows a step (default: 512, or all there are)")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up; a cosine follows (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's (default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--logit-scale", type=float, default=20.0, help="factor on the cosines, 1 to 150 (default: %(default)s)")
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="of the matrix products (default: tf32 on CUDA, else fp32)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")


def check_training_flags(flags, *positive):
    """Raises BadInput for a number out of its range. `positive`: further flags that must be above zero."""
    for name in ("rows", "epochs", "batch_size", "lr", "clip_norm", *positive):
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
    if not 1 <= flags.logit_scale <= 150:
        raise BadInput(f"--logit-scale {flags.logit_scale}: must be from 1 to 150")
    if flags.warmup_steps < 0 or flags.weight_decay < 0:
        raise BadInput("--warmup-steps and --weight-decay must not be negative")
    if flags.batch_size == 1:
        raise BadInput("--batch-size 1: a contrastive loss needs two rows at least")


def settle_training_flags(flags, name, device, row_count):
    """Puts values in the place of those flags whose default depends on data and device, so that config.json has them."""
    flags.data = flags.data or SAMPLE
    flags.batch_size = flags.batch_size or max(2, min(512, row_count))
    if row_count < flags.batch_size:
        raise BadInput(f"--batch-size {flags.batch_size}: {flags.data} has only {row_count} training rows")
    flags.out = flags.out or Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    flags.epochs = flags.epochs or max(10, math.ceil(100 / (row_count // flags.batch_size)))
    flags.precision = flags.precision or ("tf32" if device.type == "cuda" else "fp32")


def open_data(flags):
    """The embedding folder and the pairs that the flags ask for."""
    data = Embeddings(flags.data or SAMPLE)
    return data, choose_pairs(data, flags.pairs)


def split_for_training(data, seed, count):
    """Row numbers to train on and to choose by (`split_rows`), and a line that says how many."""
    train_rows, val_rows = split_rows(data, seed, count)
    sample = " (the sample)" if data.folder == SAMPLE else ""
    print(
        f"data: {os.path.relpath(data.folder)}{sample}: {len(train_rows)} training and {len(val_rows)} validation rows"
    )
    return train_rows, val_rows


def draw_rows(step, seed, rows, batch_size):
    """The batch of a step, a pure function of (seed, step): each epoch deals the rows out once, the rest sits out."""
    epoch, place = divmod(step, len(rows) // batch_size)
    order = torch.randperm(len(rows), generator=random_of("rows", seed, epoch))
    return rows[order[place * batch_size : (place + 1) * batch_size]]  # [B]


def learning_rate(step, steps, peak, warmup_steps):
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def own_layers(features, pairs, weights):
    """What `connector_mlp` takes, for pairs with weights of their own: [[(weight, bias)] per layer] per pair."""
    texts, layers = list(features), []
    for depth in range(len(weights[0])):
        wiring = [(texts.index(text) if depth == 0 else p, p) for p, (_, text) in enumerate(pairs)]
        layers.append(Layer([w[depth][0] for w in weights], [w[depth][1] for w in weights], wiring))
    return list(features.values()), layers


def pair_losses(generator, store, rows, pairs, dtype, logit_scale):
    """Symmetric InfoNCE of each pair on a batch of rows: [P], float32."""
    texts, images = unique(text for _, text in pairs), unique(image for image, _ in pairs)
    inputs, layers = generator({text: store.take(text, rows).to(dtype) for text in texts}, pairs)
    layers = [Layer([w.to(dtype) for w in ws], [b.to(dtype) for b in bs], wiring) for ws, bs, wiring in layers]
    z, sumsq = connector_mlp(inputs, layers)  # [B, sum D_p], [P, B]
    targets = [store.take(image, rows).to(dtype) for image in images]  # each [B, D_i]
    losses, _ = clip_loss(z, targets, [images.index(image) for image, _ in pairs], logit_scale, sumsq=sumsq)
    return losses


@torch.no_grad()
def validate(generator, store, retrieval, pairs):
    """{"image:text": R@1, R@5, R@10 of text to image, then of image to text} on the validation rows."""
    recalls = {}
    for text in unique(text for _, text in pairs):  # a text encoder at a time bounds the memory
        group = [pair for pair in pairs if pair[1] == text]
        z, _ = connector_mlp(*generator({text: store.take(text, retrieval.rows)}, group))
        for (image, _), mapped in zip(group, z.split([store.dims[image] for image, _ in group], dim=1)):
            recalls[f"{image}:{text}"] = retrieval.recalls(mapped, store.take(image, retrieval.rows))
    return {":".join(pair): recalls[":".join(pair)] for pair in pairs}


def print_results(ranked, recalls, retrieval, made, state, best):
    """The ranking, what it cost, and the best connector, ready to load. made: a few words on how it was trained."""
    print_ranking(ranked, recalls, retrieval)
    if sum(row["val_recall10"] for row in ranked) < 2 * len(ranked) * retrieval.chance[2]:
        print(
            "All pairs are at chance. A lower --lr or more --epochs may help; do captions and images belong together?"
        )
    least, most = min(state["updates"].values()), max(state["updates"].values())
    cost = f"{state['flops'] / 1e12:.2f} TFLOP in {state['seconds']:.0f} s, {least} to {most} updates a pair"
    print(f"{made}: {cost}")
    print(f"\nbest connector: {best}")
    print(f"load it: from vlm import get_vlm_from_checkpoint; vlm = get_vlm_from_checkpoint({str(best)!r})")
