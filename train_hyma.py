"""Trains one hypernetwork that predicts the connector of every encoder pair, ranks the pairs, writes the connectors.

    python train_hyma.py --pairs all                                  # the embedded sample, ten seconds on two cores
    python train_hyma.py --pairs all --data embeddings/my             # your embeddings, made by embed.py
    python train_hyma.py --pairs "vit_*:mpnet" deit_b16:roberta --data embeddings/my --out runs/few
    python train_hyma.py --rows 1000 --data embeddings/my             # a first choice from a few rows
    python train_hyma.py --add-encoder vit_l16 --from runs/few        # trains only the new encoder's part
    python train_hyma.py --resume                                     # the newest run, after an interruption

Every step draws a mini-batch of rows and a few pairs of one text encoder, lets the hypernetwork predict those pairs'
connectors, and descends their mean symmetric InfoNCE loss (arXiv 2507.10015, section 3). Two hypernetworks: `factored`
(default) predicts a pair's weights from parts shared by all pairs of its text encoder and of its image encoder; `mlp`
is the paper's, an MLP from a pair code and a layer code to that layer's weights. `factored` starts from a closed form,
which is also cross-validated on training rows; the ranking combines these scores with those of the validation rows.
Writes runs/<name>/: connectors/, ranking.csv, ledger.json, metrics.jsonl, config.json, checkpoint.pt.
"""

import argparse
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from tqdm import tqdm

from hyma import closed_form
from hyma.costs import flop_counter, step_flops
from hyma.embeddings import RowStore, choose_pairs, seeded_generator, unique
from hyma.files import Signals, peak_bytes, run_script, write_jsonl
from hyma.hypernetworks import build_hypernetwork
from hyma.metrics import Retrieval, expected_recall10, pair_name, rank_pairs
from hyma.runs import Checkpoints, find_run, run_of_same_command, write_results
from hyma.training import (
    add_training_flags,
    check_seeds,
    check_training_flags,
    draw_rows,
    hidden_layers_of,
    learning_rate,
    mean_recall10,
    open_data,
    open_run_folder,
    pair_losses,
    parse_resumed_flags,
    parse_with_defaults,
    print_results,
    recipe_of,
    recorded_flags,
    resolve_training_flags,
    resumed_line,
    split_for_training,
    training_dtype,
    validate,
)
from kernels import adamw_outer, outer_grad_norm_sq
from vlm import BadInput, pick_device, read_json

# Defaults that differ between the two hypernetworks; None: the flag belongs to the other. factored starts from a closed
# form and only refines it, so its rate is low, and a third of the image encoders per step is enough.
DEFAULTS = {
    "factored": {"lr": 1e-4, "rank": 256, "width": None, "share_of_images": Fraction(1, 3)},
    "mlp": {"lr": 1e-3, "rank": None, "width": 128, "share_of_images": 1},
}
VALIDATIONS = 4  # per run, each of all pairs and with a checkpoint; one costs as much as several steps


def parse_flags():
    """(flags, config.json of the run that --resume names, else None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_training_flags(parser, "hyma")
    add("--predict", nargs="+", default=[], metavar="IMAGE:TEXT", help="pairs to predict, score and export untrained")
    about = "how weights are predicted (default: %(default)s)"
    add("--generator", choices=list(DEFAULTS), default="factored", help=about)
    add("--width", type=int, help="hidden width of the mlp generator; the paper's is 512 (default: 128)")
    add("--rank", type=int, help="axes of each image encoder's space that factored works in (default: 256)")
    add(
        "--pairs-per-step",
        type=int,
        help="pairs per step, of one text encoder (default: a third of its pairs; mlp: all)",
    )
    add("--lr", type=float, help="peak learning rate (default: factored 1e-4, mlp 1e-3)")
    add("--add-encoder", metavar="NAME", help="train only this encoder's part and add it to the finished run in --from")
    add("--from", dest="from_run", metavar="RUN", help="the run that --add-encoder adds to; its flags are used")
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed of weights, batches, pairs, folds, of --rows and of a split (default: %(default)s)",
    )
    flags = parser.parse_args()
    if bool(flags.add_encoder) != bool(flags.from_run):
        raise BadInput("--add-encoder NAME and --from RUN go together")
    if flags.resume:
        return parse_resumed_flags(parser, find_run(flags.out))
    if flags.add_encoder:
        flags = parse_with_defaults(parser, flags_to_keep(flags.from_run))
    check_training_flags(flags, "width", "rank", "pairs_per_step")
    check_seeds("--seed", [flags.seed])
    for name in ("width", "rank"):
        value = getattr(flags, name)
        if value is not None and DEFAULTS[flags.generator][name] is None:
            raise BadInput(f"--{name} {value}: contradicts --generator {flags.generator}, which has none")
    return flags, None


def flags_to_keep(run):
    """The flags of the run in --from that hold for the encoder that is added to it."""
    config = read_json(Path(run) / "config.json")
    if config.get("script") != "train_hyma.py" or config["flags"]["generator"] != "factored":
        raise BadInput(f"--from {run}: no run of train_hyma.py with --generator factored")
    own = ("out", "pairs", "predict", "add_encoder", "from", "pairs_per_step")
    return {name: value for name, value in config["flags"].items() if name not in own}


def resolve_flags(flags, device, row_count, image_names, pairs, untrained):
    """A copy of the flags with numbers for those whose default depends on the data, so that config.json holds them."""
    flags = resolve_training_flags(flags, "hyma", device, row_count)
    defaults = DEFAULTS[flags.generator]
    default_pairs_per_step = math.ceil(len(image_names) * defaults["share_of_images"])
    if flags.add_encoder:  # of the pairs that a whole run has per step, the added encoder's share
        share_of_pairs = Fraction(len(pairs), len(pairs + untrained))
        default_pairs_per_step = max(1, math.floor(len(image_names) * defaults["share_of_images"] * share_of_pairs))
    flags.pairs_per_step = min(flags.pairs_per_step or default_pairs_per_step, len(pairs))
    flags.width = flags.width or defaults["width"]
    if defaults["rank"]:
        flags.rank = min(flags.rank or defaults["rank"], row_count)
    flags.lr = flags.lr or defaults["lr"]
    return flags


# ------------------------------------------------------------------------------------------------------------- pairs


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
    predicted = choose_pairs(data, flags.predict, "--predict") if flags.predict else []
    untrained = [pair for pair in predicted if pair not in trained]
    image_names = unique(image for image, _ in trained)
    text_names = unique(text for _, text in trained)
    for image, text in untrained:
        if image not in image_names or text not in text_names:
            name = text if image in image_names else image
            raise BadInput(f"--predict {image}:{text}: {name} must be in a pair that is trained")
    return Pairs(trained, untrained, trained + untrained, image_names, text_names, None)


def arrange_added_encoder(name, run, data):
    """The Pairs of an encoder that is added to a finished run, whose own pairs stay as they are."""
    if not (run / "ledger.json").is_file():
        raise BadInput(f"--from {run}: is not finished; rerun to resume: python train_hyma.py --resume --out {run}")
    base_state = Checkpoints(run).load("state")["state"]
    if "fold_recall10" not in base_state:
        raise BadInput(f"--from {run}: was made by an earlier version of train_hyma.py; make the run again")
    old = [tuple(pair.split(":")) for pair in base_state["best"]["recalls"]]
    if name not in data.encoders:
        raise BadInput(f"--add-encoder {name}: not in {data.folder}; embed it with: python embed.py --encoder {name}")
    if any(name in pair for pair in old):
        raise BadInput(f"--add-encoder {name}: is in {run} already")
    names = unique(part for pair in old for part in pair)
    trained_on = read_json(run / "config.json")["embeddings"]
    if data.fingerprint(names) != {part: trained_on[part] for part in names}:
        raise BadInput(f"--from {run}: its embeddings in {data.folder} have changed since")
    image_names = unique(image for image, _ in old)
    text_names = unique(text for _, text in old)
    if data.encoders[name].kind == "image":
        added = [(name, text) for text in text_names]
        image_names = [*image_names, name]
    else:
        added = [(image, name) for image in image_names]
        text_names = [*text_names, name]
    return Pairs(added, old, added, image_names, text_names, base_state)


def draw_pairs(step, seed, pairs, pairs_per_step):
    """The pairs of a step, a pure function of (seed, step).

    A round is as many steps as it takes to draw every pair once. The pairs of a step have the same text encoder, whose part
    of the connectors is then computed once for all of them.
    """
    groups = [[pair for pair in pairs if pair[1] == text] for text in unique(text for _, text in pairs)]
    steps_per_round = sum(math.ceil(len(group) / pairs_per_step) for group in groups)
    round_index, place = divmod(step, steps_per_round)
    random = seeded_generator("pairs", seed, round_index)
    steps = []  # of the round, the pairs of each
    for group in groups:
        order = torch.randperm(len(group), generator=random)
        shuffled = [group[k] for k in order]
        steps += [shuffled[start : start + pairs_per_step] for start in range(0, len(group), pairs_per_step)]
    order = torch.randperm(len(steps), generator=random)
    return steps[order[place]]


# ---------------------------------------------------------------------------------------------------------- training


def new_state(pairs):
    """All that the loop changes besides the tensors, as a checkpoint stores it."""
    return {
        "step": 0,
        "flops": 0,
        "start_flops": 0,  # see `write_results`
        "step_flops": 0,
        "logit_flops": 0,
        "seconds": 0.0,
        "updates": {pair_name(pair): 0 for pair in pairs.untrained + pairs.trained},
        "fold_recall10": {},  # cross-validated scores of the closed form, see `cross_validate`
        "fold_rows": 0,  # of one fold
        "losses": [],  # of the steps since the last validation
        "metrics": [],
        "best": None,  # the best validation: score, epoch, recalls, weights
    }


def load_base_parts(generator, base_state):
    """Loads the parts of the run that --add-encoder adds to, and freezes them: only the new encoder's part is trained."""
    missing = generator.load_state_dict(base_state["best"]["weights"], strict=False).missing_keys
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in missing)


def start_from_closed_form(generator, store, folds, data, pairs, added):
    """Starts the parts of all encoders, or of the added one. Returns the cross-validated scores of the scored pairs
    (`cross_validate`)."""
    image_names = unique(image for image, _ in pairs.scored)
    # The texts of an added encoder do not span the shared space: it stays that of the base run.
    spanned_by = [text for text in generator.text_names if text != added]
    width = generator.shared_width
    space = closed_form.make_shared_space(store, folds, image_names, generator.text_names, width, spanned_by)
    if added:
        generator.initialise_added_encoder(added, space)
    else:
        generator.initialise_from_closed_form(space)
    return closed_form.cross_validate(space, folds, data, pairs.scored)


class Start(NamedTuple):
    """Where the loop starts. It trains on `store`."""

    state: dict
    moments: list  # of `Hypernetwork.outer_moments`
    store: object  # see `Hypernetwork.project_images`


def start_training(flags, generator, optimizer, checkpoints, store, data, pairs, train_rows, val_rows):
    """The Start at a checkpoint, at the closed form, or at the random weights that the generator has by now."""
    state = new_state(pairs)
    moments = generator.outer_moments()
    counter = flop_counter()  # entering it again sets it to zero
    saved = checkpoints.load("generator", "optimizer", "moments", "state")
    if saved:
        generator.load_state_dict(saved["generator"])
        optimizer.load_state_dict(saved["optimizer"])
        moments = [moment.to(store.device) for moment in saved["moments"]]
        state |= saved["state"]
    elif generator.starts_from_closed_form:
        folds = closed_form.fold_rows(data, train_rows, val_rows, flags.seed)
        with counter:
            state["fold_recall10"] = start_from_closed_form(generator, store, folds, data, pairs, flags.add_encoder)
        state["start_flops"] = counter.get_total_flops()
        state["fold_rows"] = len(folds[0])
        if pairs.base_state:
            state["fold_recall10"] |= pairs.base_state["fold_recall10"]

    # From here on image vectors are k coordinates, not D.
    with counter:
        image_names = unique(image for image, _ in pairs.scored)
        store = generator.project_images(store, image_names, torch.cat([train_rows, val_rows]))
    if state["step"] == 0:  # a checkpoint's costs have it already
        state["start_flops"] += counter.get_total_flops()
        state["flops"] = state["start_flops"]
    return Start(state, moments, store)


def update(generator, optimizer, moments, count, lr, flags):
    """One AdamW step, clipped by one global gradient norm, which includes the gradient of `head` that is never formed.

    moments: of `head`, [] where every gradient is formed (`Hypernetwork.outer_moments`). count: of updates, this one included.
    """
    parameters = [p for p in generator.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if moments:
        grad_out, inputs = generator.outer
        norm = (norm.double() ** 2 + outer_grad_norm_sq(grad_out, inputs)).sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, flags.clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    if moments:
        clip = (flags.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        decay = flags.weight_decay
        adamw_outer(generator.head, *moments, grad_out, inputs, step=count, lr=lr, weight_decay=decay, clip=clip)


def main():
    flags, resumed_config = parse_flags()
    typed = recorded_flags(flags)
    device = pick_device(flags.device)

    # The data: rows to train on and to choose by, and the pairs.
    data, chosen_pairs = open_data(flags)
    pairs = arrange_pairs(flags, data, chosen_pairs)
    train_rows, val_rows = split_for_training(data, flags.seed, flags.rows)
    flags = resolve_flags(flags, device, len(train_rows), pairs.image_names, pairs.trained, pairs.untrained)
    encoders = f"{len(pairs.image_names)} image and {len(pairs.text_names)} text encoders"
    per_step = "1 pair" if flags.pairs_per_step == 1 else f"{flags.pairs_per_step} pairs"
    print(f"pairs: {len(pairs.trained)} of {encoders}, {per_step} per step")
    store = RowStore(data, pairs.image_names + pairs.text_names, device)
    retrieval = Retrieval(data, val_rows, device)
    must_match = {
        "pairs": [pair_name(pair) for pair in pairs.trained],
        "embeddings": data.fingerprint(pairs.image_names + pairs.text_names),
    }
    run_info = describe_run(flags, len(train_rows), len(val_rows))
    resumed_config = resumed_config or run_of_same_command(flags.out, typed)
    lock = open_run_folder(flags, typed, resumed_config, must_match, run_info, device)  # noqa: F841  held until the end

    # The hypernetwork and its optimiser.
    torch.manual_seed(flags.seed)
    image_dims = {name: store.dims[name] for name in pairs.image_names}
    text_dims = {name: store.dims[name] for name in pairs.text_names}
    generator = build_hypernetwork(flags, image_dims, text_dims).to(device)
    if pairs.base_state:
        load_base_parts(generator, pairs.base_state)
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=flags.weight_decay, fused=True)

    # Where training starts.
    steps_per_epoch = len(train_rows) // flags.batch_size
    steps = flags.epochs * steps_per_epoch
    validation_period = math.ceil(flags.epochs / VALIDATIONS) * steps_per_epoch
    checkpoints = Checkpoints(flags.out)
    started = time.perf_counter()
    state, moments, store = start_training(
        flags, generator, optimizer, checkpoints, store, data, pairs, train_rows, val_rows
    )
    if state["step"]:
        print(resumed_line(flags.out, state["step"], steps))
    started -= state["seconds"]  # as if the seconds before an interruption had passed in this process
    dtype = training_dtype(flags.precision)
    # Not before: the closed form needs float32.
    torch.set_float32_matmul_precision("high" if flags.precision == "tf32" else "highest")

    progress = tqdm(total=steps, initial=state["step"], desc="train", unit="step")
    with progress, Signals() as signals:
        for step in range(state["step"], steps):
            # A batch of rows and of pairs, their connectors, their mean loss.
            rows = draw_rows(step, flags.seed, train_rows, flags.batch_size)  # [B]
            batch_pairs = draw_pairs(step, flags.seed, pairs.trained, flags.pairs_per_step)
            losses = pair_losses(generator, store, rows, batch_pairs, dtype, flags.logit_scale)  # [P]
            loss = losses.mean()
            state["losses"].append(loss.item())
            if not math.isfinite(state["losses"][-1]):
                bad = pair_name(batch_pairs[losses.isfinite().long().argmin().item()])
                raise BadInput(
                    f"step {step}: the loss of {bad} is {state['losses'][-1]}; stopped before the update; try a lower --lr"
                )

            # The update.
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            lr = learning_rate(step, steps, flags.lr, flags.warmup_steps)
            update(generator, optimizer, moments, step + 1, lr, flags)

            # What it cost.
            for key, flops in step_flops(generator, flags.batch_size, batch_pairs, store.dims).items():
                state[key] += flops
            for pair in batch_pairs:
                state["updates"][pair_name(pair)] += 1
            state["step"] = step + 1
            state["seconds"] = time.perf_counter() - started
            progress.update()

            # Validation: the best state is kept. A checkpoint is saved then, after a minute without one, and on a signal.
            is_validation = (step + 1) % validation_period == 0 or step + 1 == steps
            if not is_validation:
                if checkpoints.due() or signals.arrived():
                    checkpoints.save(checkpoint_of(generator, optimizer, moments, state))
                    signals.leave_if_asked()
                continue
            recalls = dict(pairs.base_state["best"]["recalls"]) if pairs.base_state else {}
            recalls |= validate(generator, store, retrieval, pairs.scored)
            score = mean_recall10({pair_name(pair): recalls[pair_name(pair)] for pair in pairs.trained})
            epoch = round((step + 1) / steps * flags.epochs)
            if message := keep_best(state, generator, score, epoch, recalls, retrieval.chance[2]):
                progress.write(message)
            state["seconds"] = time.perf_counter() - started
            line = {"epoch": epoch, "step": step + 1, "loss": sum(state["losses"]) / len(state["losses"]), "lr": lr}
            line |= {"val_recall10": score, "seconds": state["seconds"], "recalls": recalls}
            state["metrics"].append(line)
            state["losses"] = []
            progress.set_postfix(loss=f"{line['loss']:.3f}", val_R10=f"{score:.1%}")
            checkpoints.save(checkpoint_of(generator, optimizer, moments, state))
            write_jsonl(flags.out / "metrics.jsonl", state["metrics"])
            signals.leave_if_asked()

    state["peak_bytes"] = peak_bytes(device)
    export(flags, data, generator, state, retrieval)


def describe_run(flags, train_count, val_count):
    """The run_info of `create_run`."""
    hidden_layers = hidden_layers_of(flags)
    method = f"hyma {flags.generator} mlp{hidden_layers}"
    if flags.from_run:
        method += f", from {Path(flags.from_run).name}"
    if flags.rows:
        method += f", {flags.rows} rows"
    return {
        "method": method,
        "recipe": recipe_of(flags),
        "full_grid": False,
        "hidden_layers": hidden_layers,
        "rows": {"train": train_count, "val": val_count},
        "starts_from": flags.from_run,
        "seed": flags.seed,
    }


def checkpoint_of(generator, optimizer, moments, state):
    """All that a run needs to resume."""
    return {
        "generator": generator.state_dict(),
        "optimizer": optimizer.state_dict(),
        "moments": moments,
        "state": state,
    }


def keep_best(state, generator, score, epoch, recalls, chance):
    """Keeps these weights if none before scored as high. Returns a line if they have collapsed to chance, else None."""
    best = state["best"]
    if best is None or score > best["score"]:
        weights = {name: tensor.cpu().clone() for name, tensor in generator.state_dict().items()}
        state["best"] = {"score": score, "epoch": epoch, "recalls": recalls, "weights": weights}
        return None
    if score < 2 * chance < best["score"]:
        return f"epoch {epoch}: collapsed to chance, R@10 {score:.1%}; epoch {best['epoch']} is kept"
    return None


def export(flags, data, generator, state, retrieval):
    """Writes the best state's connectors, ranking.csv and ledger.json, and prints the ranking."""
    best = state["best"]
    write_jsonl(flags.out / "metrics.jsonl", state["metrics"])
    generator.load_state_dict(best["weights"])
    trained = [tensor for tensor in generator.parameters() if tensor.requires_grad]
    trained += generator.outer_moments()[:1]  # as large as the weight that they belong to
    state["trainable_parameters"] = sum(tensor.numel() for tensor in trained)

    expected = expected_recall10(best["recalls"], state["fold_recall10"], state["fold_rows"] / len(retrieval.rows))
    ranking = rank_pairs(best["recalls"], before=expected)
    for row in ranking if expected else []:
        row["expected_recall10"] = expected[f"{row['image']}:{row['text']}"]

    card_info = {"generator": flags.generator, "logit_scale": flags.logit_scale, "seed": flags.seed}
    card_info["epoch"] = best["epoch"]

    def connector_of(pair):
        return generator.predict(*pair.split(":")), card_info | {"updates": state["updates"][pair]}

    paths = write_results(flags.out, data, ranking, connector_of, flags.batch_size, state)
    description = f"{flags.generator} {flags.connector}, epoch {best['epoch']} of {flags.epochs}"
    print_results(ranking, best["recalls"], retrieval, description, state, paths[0])


if __name__ == "__main__":
    run_script(main)
