"""What both trainers share: data, the schedule, the loss of a step, validation. What they print is in `hyma/printed_ranking.py`.

A generator is whatever gives the connectors of pairs: the hypernetworks of train_hyma.py, the free connectors of
train_grid.py. Its protocol is `Generator`, below; what a hypernetwork has besides is in `hyma.hypernetworks`.
"""

import math
import os
from typing import Protocol

import torch
from torch import Tensor

from hyma import ranks
from hyma.casting import cast_layers
from hyma.costs import step_flops
from hyma.embeddings import SAMPLE
from hyma.machine import provenance
from hyma.merging import open_embeddings
from hyma.metrics import Retrieval, mean_recalls
from hyma.pair_names import choose_pairs, pair_name, pair_of_name
from hyma.pairs import group_by_text, images_of, texts_of
from hyma.runs import create_run, interrupted_run, reopen_run, run_of_same_command
from hyma.settled import leader, leads_since
from hyma.splits import split_rows
from hyma.training_flags import recorded_flags
from kernels import Layer, Share, adamw_numbers, clip_loss, connector_mlp
from vlm import BadInput

LEAST_CANDIDATES = 2000  # of a validation


class Generator(Protocol):
    """What gives the connectors of pairs: all that the loss of a step, validation and export use. An nn.Module."""

    def forward(self, features: dict[str, Tensor], pairs) -> tuple[list[Tensor], list[Layer]]:
        """What `connector_mlp` takes for these pairs: inputs, and the layers that end in their image encoders' vectors as the
        store has them. features: {text encoder: unit vectors [B, D_t], float32}, of the pairs' text encoders."""

    def predict(self, image: str, text: str) -> list[tuple[Tensor, Tensor]]:
        """The pair's connector as it is exported: (weight [out, in], bias [out]) of each layer."""

    def flops(self, batch_size: int, pairs) -> tuple[int, int]:
        """FLOPs of one step of these pairs without its logits, a sum over the layers that it runs (`costs.linear_flops`): (of the
        connectors on the batch, which grow with the samples; of predicting their weights, which grow with the steps)."""


# ------------------------------------------------------------------------------------------------- data and run folder


def open_data(flags, out, typed, resumed_config):
    """(the embedding folder, the pairs) of the flags. A run that goes on keeps its pairs where --pairs stands for more by now, as
    encoders were embedded since. out: the run folder, None if it is not named. Others: see `open_run_folder`."""
    data = open_embeddings(flags.data or SAMPLE)
    pairs = choose_pairs(data, flags.pairs)
    if getattr(flags, "add_encoder", None):  # they follow from the run that it is added to
        return data, pairs
    names = resumed_config["pairs"] if resumed_config else ranks.from_first(lambda: pairs_of_started(out, typed))
    started_with = list(map(pair_of_name, names))
    if started_with and set(started_with) < set(pairs):
        print(
            f"pairs: {data.folder} has {len(pairs) - len(started_with)} more by now; "
            "this run keeps those that it was started with"
        )
        return data, started_with
    return data, pairs


def pairs_of_started(out, typed):
    """The names of the pairs of the run that the same command has started, [] if there is none."""
    out = out or interrupted_run(typed)
    config = run_of_same_command(out, typed) if out else None
    return config["pairs"] if config else []


def split_for_training(data, seed, count):
    """Indices of the rows to train on and to choose by (`split_rows`). Prints how many there are."""
    train_rows, val_rows = split_rows(data, seed, count)
    sample = " (the sample)" if data.folder == SAMPLE else ""
    print(
        f"data: {os.path.relpath(data.folder)}{sample}: {len(train_rows)} training and {len(val_rows)} validation rows"
    )
    return train_rows, val_rows


def validation_retrieval(data, train_rows, val_rows, device):
    """The Retrieval that chooses: its queries are the validation rows; training rows, evenly spaced, are distractors beside
    them if the validation rows are fewer than LEAST_CANDIDATES. A training row with a validation row's picture or caption
    is none: it would be a right answer that was trained on."""
    missing = max(0, LEAST_CANDIDATES - len(val_rows))
    others = train_rows
    if data.rows and missing:
        held_out = {data.rows[i][part] for i in val_rows.tolist() for part in ("image", "caption")}
        others = [
            i for i in train_rows.tolist() if held_out.isdisjoint((data.rows[i]["image"], data.rows[i]["caption"]))
        ]
        others = torch.tensor(others, dtype=train_rows.dtype)
    count = min(len(others), missing)
    distractors = others[torch.arange(count) * len(others) // max(1, count)]
    return Retrieval(data, val_rows, device, distractors)


def what_must_match(data, pairs, encoders):
    """What a run that is resumed must find as it was (`create_run`). pairs: those that it trains. encoders: all that it reads."""
    return {
        "pairs": [pair_name(pair) for pair in pairs],
        "embeddings": data.fingerprint(encoders),
        "split": data.split_sha256(),
    }


def open_run_folder(flags, typed, resumed_config, must_match, run_info, device):
    """Makes the run folder or, where the same command made it before, checks that its data are still the same. Returns the lock
    of the folder, which is the first rank's. resumed_config: config.json of the run that --resume names, else None. Other
    arguments: see `create_run`."""
    if ranks.count() > 1:
        here = provenance(device)
        code = {"versions of packages": here["versions"], "code": here["commit"]}
        ranks.check_same({"flags": recorded_flags(flags)} | must_match | code)
    if not ranks.is_first():
        return None
    resumed_config = resumed_config or run_of_same_command(flags.out, typed)
    if resumed_config:
        return reopen_run(flags.out, resumed_config, must_match)
    return create_run(flags.out, recorded_flags(flags), typed, must_match, run_info, device)


def check_ranks_share(flags, pairs):
    """Raises BadInput if there are more ranks than what they share. pairs: all that are trained."""
    count = ranks.count()
    if flags.split == "pairs" and count > len(pairs):
        raise BadInput(f"torchrun: {count} processes for {len(pairs)} pairs; start fewer, or give --split rows")
    if flags.split == "rows" and ranks.rows_per_rank(flags.batch_size) * (count - 1) >= flags.batch_size:
        raise BadInput(f"--batch-size {flags.batch_size}: too few rows for {count} processes; start fewer")


def resumed_line(out, step, steps):
    """The line that is printed for a run that was started before."""
    if step == steps:
        return f"{out}: is finished; nothing is left to train"
    return f"resumed: {out} at step {step} of {steps}"


# --------------------------------------------------------------------------------------------------------- the schedule


def learning_rate(step, steps, peak, warmup_steps):
    """Linear warm-up, then half a cosine to zero: peak / 2 * (1 + cos(pi * share of the steps after the warm-up))."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


class Schedule:
    """What AdamW needs of each step in numbers, its rate among them, on the device: copied there many steps at a time, so that
    a step copies none."""

    BLOCK = 4096  # steps
    RATE = 1  # which of a step's numbers is the rate

    def __init__(self, steps, peak, warmup_steps, weight_decay, device):
        self.steps, self.peak, self.warmup_steps = steps, peak, warmup_steps
        self.weight_decay, self.device = weight_decay, device
        self.dtype = torch.float64 if device.type == "cpu" else torch.float32  # as the kernels of AdamW have it
        self.first = None  # step of the block
        self.block = None  # [steps of the block, 5]

    def rate(self, step):
        """The learning rate of a step."""
        return learning_rate(step, self.steps, self.peak, self.warmup_steps)

    def numbers(self, step):
        """`kernels.adamw_numbers` of a step: [5]."""
        first = step - step % self.BLOCK
        if first != self.first:
            block = []
            for k in range(first, min(first + self.BLOCK, self.steps)):
                block.append(adamw_numbers(k + 1, self.rate(k), weight_decay=self.weight_decay))
            self.first, self.block = first, torch.tensor(block, dtype=self.dtype, device=self.device)
        return self.block[step - first]


def build_adamw(parameters, flags):
    """The optimiser of both trainers; with --graph a CUDA graph can record it."""
    return torch.optim.AdamW(parameters, weight_decay=flags.weight_decay, fused=True, capturable=flags.graph)


def update_weights(optimizer, numbers):
    """AdamW's update of the weights that have a gradient, at the rate of the step's numbers (`Schedule`). The gradients go:
    nothing but weights and moments outlives a step."""
    for group in optimizer.param_groups:
        group["lr"] = numbers[Schedule.RATE]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def moments_of(optimizer):
    """What AdamW keeps of each weight, as a checkpoint has it: not its options, as a run may go on with --graph or without."""
    return {"state": optimizer.state_dict()["state"]}


def load_moments(optimizer, moments):
    """Sets it to what `moments_of` gave in an earlier process."""
    optimizer.load_state_dict({"state": moments["state"], "param_groups": optimizer.state_dict()["param_groups"]})


def choose_matmul_precision(precision):
    """Float32 products on a GPU are rounded to TF32, or are not. To call once what needs float32 has been computed."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def training_dtype(precision):
    """The dtype of a step's matrix products."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


# ------------------------------------------------------------------------------------------------ the loss of a step


def pair_losses(generator, store, rows, pairs, dtype, logit_scale, split=None):
    """Symmetric InfoNCE of each pair on a batch of rows: [P], float32 (arXiv 2507.10015, section 3).

    The mean of both cross entropies of logit_scale * cosine(connector(text), image), the batch's other rows being the
    negatives. store: its `take(encoder, rows, dtype)` gives unit vectors of texts [B, D_t], and of images unit vectors
    [B, D_i] or shorter ones, coordinates along orthonormal axes of that space (`project_images`). split: "rows" where each rank
    has its share of the texts; the losses of all ranks add up to that of the batch.

    To try another loss, replace `clip_loss` by any autograd code on z, which is not normalised, and the image vectors:
    z.split(widths of the pairs' images, dim=1) is a pair's [B, D_p] each. The fast path of this one is in
    kernels/reference.py and kernels/contrastive*.py. With `share`, which only --split rows has, z has the rows of the images from
    share.first on, and a loss is this rank's part of a sum; one that knows no share must refuse it.
    """
    own, share = rows, None
    if split == "rows" and ranks.count() > 1:
        size = ranks.rows_per_rank(len(rows))
        first = ranks.number() * size
        own = rows[first : first + size]  # [b]
        share = Share(first, ranks.gather_tensors)
    features = {}
    for text in texts_of(pairs):
        features[text] = store.take(text, own)  # [B, D_t], or of a share [b, D_t]
    inputs, layers = generator(features, pairs)
    inputs = [x.to(dtype) for x in inputs]  # not before: texts differ little from their mean, which a generator takes away
    z, sumsq = connector_mlp(inputs, cast_layers(layers, dtype))  # [B, sum D_p] not normalised, [P, B] squared lengths

    image_names = images_of(pairs)
    image_vectors = []  # of each image encoder, [B, D_i]
    for image in image_names:
        image_vectors.append(store.take(image, rows, dtype))
    image_of_pair = [image_names.index(image) for image, _ in pairs]
    losses, _ = clip_loss(z, image_vectors, image_of_pair, logit_scale, sumsq=sumsq, share=share)  # [P]
    return losses


def losses_on_ranks(generator, store, rows, pairs, own, dtype, flags):
    """`pair_losses` [P] of a step's pairs, of which this rank has those of `own`; of the others they are 0. What all ranks have
    adds up to the losses, when `StepLosses` reads them."""
    if own == pairs:
        return pair_losses(generator, store, rows, pairs, dtype, flags.logit_scale, flags.split)
    losses = torch.zeros(len(pairs), device=rows.device)
    if own:
        places = [place for place, pair in enumerate(pairs) if pair in own]
        losses[places] = pair_losses(generator, store, rows, own, dtype, flags.logit_scale)
    return losses


def count_step(state, generator, store, batch_size, pairs):
    """Adds to a trainer's state that a step of these pairs was taken, and what it cost."""
    for key, flops in step_flops(generator, batch_size, pairs, store.dims).items():
        state[key] += flops
    state["flops"] += store.projection_flops(batch_size, images_of(pairs))
    for pair in pairs:
        state["updates"][pair_name(pair)] += 1
    state["step"] += 1


class StepLosses:
    """The losses of the last steps, which stay on the device: reading them makes the host wait for it."""

    READ_EVERY = 16  # steps

    def __init__(self, means):
        """means: a list that gets the mean loss of each step, a number, once it is read."""
        self.means = means
        self.unread = []  # (step, its pairs, their losses [P], the mean of these)

    def add(self, step, pairs, losses):
        """Keeps the losses [P] of a step. Returns whether it was time to read them."""
        losses = losses.detach()
        self.unread.append((step, pairs, losses, losses.mean()))
        if len(self.unread) < self.READ_EVERY:
            return False
        self.read()
        return True

    def read(self):
        """Reads what has not been read. Raises BadInput at the first loss that is not finite: every update since is lost, and
        so nothing may be saved before this."""
        if ranks.count() > 1 and self.unread:
            self.add_up_ranks()
        for step, pairs, losses, mean in self.unread:
            mean = mean.item()
            if not math.isfinite(mean):
                worst = losses.isfinite().long().argmin().item()
                raise BadInput(
                    f"step {step}: the loss of {pair_name(pairs[worst])} is {losses[worst].item()}; what was saved before is "
                    "kept; try a lower --lr"
                )
            self.means.append(mean)
        self.unread.clear()

    def add_up_ranks(self):
        """Makes what this rank has of the losses all that the ranks have."""
        steps, pairs, losses, _ = zip(*self.unread)
        whole = ranks.sum_over_ranks(torch.cat(losses)).split([len(of_step) for of_step in losses])
        self.unread = list(zip(steps, pairs, whole, [of_step.mean() for of_step in whole]))


def check_weights(weights, step):
    """Raises BadInput if an update has made weights that are not finite: to call before they are saved. weights: a state_dict."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BadInput(
                f"step {step}: the update made {name} not finite; what was saved before is kept; try a lower --lr"
            )


def separate_layers(features, pairs, connectors):
    """What `connector_mlp` takes for pairs with weights of their own, which share nothing.

    features: {text encoder: [B, D_t]}. connectors: for each pair, (weight [out, in], bias [out]) of each layer. The wiring
    of a layer is (index of its input, index of its weight) for each pair: a first layer takes its text encoder's batch,
    every other what the layer before it gives for the same pair.
    """
    text_names = list(features)
    layers = []
    for depth, pairs_layers in enumerate(zip(*connectors)):
        weights, biases = zip(*pairs_layers)
        wiring = []
        for p, (_, text) in enumerate(pairs):
            source = text_names.index(text) if depth == 0 else p
            wiring.append((source, p))
        layers.append(Layer(list(weights), list(biases), wiring))
    return list(features.values()), layers


# ------------------------------------------------------------------------------------------------------ validation


@torch.no_grad()
def validate(generator, store, retrieval, pairs):
    """{"image:text": R@1, R@5, R@10 of text to image, then of image to text} on the validation rows, in the pairs' order."""
    recalls = dict.fromkeys(map(pair_name, pairs))
    for text, group in group_by_text(pairs).items():  # a text encoder at a time bounds the memory
        features = {text: store.take(text, retrieval.rows)}  # [n, D_t]
        z, _ = connector_mlp(*generator(features, group))  # [n, sum D_p]
        widths = [store.dims[image] for image, _ in group]
        for pair, outputs in zip(group, z.split(widths, dim=1)):  # outputs [n, D_p]
            if not outputs.isfinite().all():
                raise BadInput(
                    f"the last update made the connector of {pair_name(pair)} give numbers that are not finite; what was "
                    "saved before is kept; try a lower --lr"
                )
            image, _ = pair
            recalls[pair_name(pair)] = retrieval.recalls(outputs, store.take(image, retrieval.rows))
    return recalls


def validate_on_ranks(generator, store, retrieval, pairs, own):
    """`validate`, of these pairs each rank its own: all ranks have the recalls of all."""
    recalls = validate(generator, store, retrieval, own)
    if ranks.count() == 1:
        return recalls
    table = torch.zeros(len(pairs), 6, dtype=torch.float64)  # [P, 6]
    for k, pair in enumerate(pairs):
        if pair in own:
            table[k] = torch.tensor(recalls[pair_name(pair)], dtype=torch.float64)
    return dict(zip(map(pair_name, pairs), ranks.sum_over_ranks(table).tolist()))


def mean_recall10(recalls):
    """{"image:text": six recalls} to the number that chooses the best state: mean R@10 of both directions and all pairs."""
    total = 0
    for six in recalls.values():
        total += mean_recalls(six)[2]
    return total / len(recalls)


def progress_line(state):
    """What a progress bar shows beside steps a second and the time left: the last loss that was read, the mean R@10 of the
    last validation, its best pair and since which step that leads."""
    shown = {}
    if state["losses"]:
        shown["loss"] = f"{state['losses'][-1]:.3f}"
    if state["metrics"]:
        line = state["metrics"][-1]
        best, score = leader(line["recalls"])
        shown.setdefault("loss", f"{line['loss']:.3f}")
        shown["val_R10"] = f"{line['val_recall10']:.1%}"
        shown["best"] = f"{best} {score:.1%} since step {leads_since(state['metrics'])}"
    return shown


def metrics_line(state, epoch, lr, val_recall10, recalls):
    """A line of metrics.jsonl, of the state at a validation: its loss is the mean over the steps since the one before."""
    return {
        "epoch": epoch,
        "step": state["step"],
        "loss": sum(state["losses"]) / len(state["losses"]),
        "lr": lr,
        "val_recall10": val_recall10,
        "seconds": state["seconds"],
        "recalls": recalls,
    }
