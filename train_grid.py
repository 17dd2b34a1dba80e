"""Trains every encoder pair's connector by itself, ranks the pairs, writes the connectors: the oracle and the baseline.

    python train_grid.py --pairs all                                  # the embedded sample
    python train_grid.py --data embeddings/my --seeds 0 1 2 --out runs/grid       # runs/grid-s0, -s1 and -s2
    python train_grid.py --data embeddings/my --shard 0/4 --out runs/grid         # and 1/4, 2/4, 3/4 elsewhere
    python train_grid.py --budget-of runs/hyma                        # as many FLOPs as that run has spent
    python train_grid.py --halving                                    # drops the worse half of the pairs, repeatedly
    python train_grid.py --closed-form whitened                       # no training at all; also ridge, procrustes
    python train_grid.py --from runs/hyma --pairs vit_l16:mpnet --epochs 2 --lr 3e-4    # trains that run's connector further
    python train_grid.py --resume                                     # the newest run, after an interruption

All pairs go through the kernels in one pass, on the batches that train_hyma.py draws for the same seed, each with its
own loss, its own gradient norm and its own best state: a pair trains exactly as it would alone. Writes what
train_hyma.py writes: connectors/, ranking.csv, ledger.json, metrics.jsonl, config.json, checkpoint.pt. Whichever of
the n runs of --shard i/n ends last also writes OUT: every pair's ranking and connectors, the costs added up.
"""

import argparse
import math
import re
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from hyma import closed_form
from hyma.costs import connector_flops, connector_shapes, flop_counter, step_flops
from hyma.embeddings import RowStore, seeded_generator, split_rows, unique
from hyma.files import Signals, peak_bytes, run_script, write_jsonl
from hyma.metrics import Retrieval, mean_recalls, pair_name, rank_pairs
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
    separate_layers,
    split_for_training,
    training_dtype,
    validate,
)
from vlm import BadInput, connector_name, pick_device, read_connector, read_json

VALIDATIONS = 5  # per run, about so many, each with a checkpoint
MOST_STEPS = 10**8  # of a --budget-of: more would be a damaged ledger


def parse_flags():
    """[(flags, config.json of a run that --resume names, else None)]: one, or one per seed of several resumed runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, "grid")
    add = parser.add_argument
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="random seed of weights, batches, of --rows and of a split; several: one run each, OUT-s<seed>",
    )
    about = "start from that run's connectors, with its data, split and loss settings (default: random weights)"
    add("--from", dest="from_run", metavar="RUN", help=about)
    add("--pairs-per-pass", type=int, help="pairs trained at a time, to bound memory (default: all)")
    add("--shard", metavar="I/N", help="every N-th pair from the I-th on, into OUT-shard-I-of-N; the last one merges")
    budget = parser.add_mutually_exclusive_group().add_argument
    about = "spend that run's FLOPs (default: %(default)s)"
    budget("--budget-of", "--budget", metavar="RUN", default="full", help=about)
    budget("--halving", action="store_true", help="successive halving of the pairs by their validation scores")
    budget("--closed-form", choices=["ridge", "whitened", "procrustes"], help="a linear connector, untrained")
    flags = parser.parse_args()
    if flags.resume:
        return [parse_resumed_flags(parser, folder) for folder in folders_to_resume(flags)]
    if flags.from_run:
        flags = parse_with_defaults(parser, flags_to_keep(flags.from_run, flags.data))
    check_training_flags(flags, "pairs_per_pass")
    if len(set(flags.seeds)) < len(flags.seeds) or min(flags.seeds) < 0:
        raise BadInput(f"--seeds {' '.join(map(str, flags.seeds))}: must be different and not negative")
    check_seeds("--seeds", flags.seeds)
    if flags.shard and not flags.out:
        raise BadInput(f"--shard {flags.shard}: needs --out, the same for all shards")
    if flags.closed_form and flags.from_run:
        raise BadInput(f"--from {flags.from_run}: contradicts --closed-form, which trains nothing")
    if flags.halving and (flags.shard or flags.pairs_per_pass):
        raise BadInput(
            "--halving: compares all pairs while it trains, so neither --shard nor --pairs-per-pass can be used with it"
        )
    return [(flags, None)]


def flags_to_keep(run, data):
    """The flags of the run in --from that are kept: its data, its split and its loss settings."""
    path = Path(run) / "config.json"
    if not path.is_file():
        if data is None:
            raise BadInput(
                f"--from {run}: has no config.json; name the data that its connectors were trained on: --data"
            )
        return {}
    config = read_json(path)
    kept = ("data", "rows", "connector", "batch_size", "logit_scale", "weight_decay", "clip_norm", "precision")
    return {name: config["flags"][name] for name in kept} | {"seeds": [config["seed"]]}


def check_same_data(run, data, pairs, seeds):
    """Raises BadInput if the run in --from was trained on other embeddings of these pairs' encoders than `data` holds, or
    if a seed would choose by rows that the run was trained on."""
    path = Path(run) / "config.json"
    if not path.is_file():
        return
    config = read_json(path)
    for name in unique(name for pair in pairs for name in pair):
        trained_on = config["embeddings"].get(name)
        if trained_on and data.fingerprint([name])[name] != trained_on:
            raise BadInput(f"--from {run}: was trained on another {name}.pt than {data.folder} holds (sha256)")
    has_split = any(row.get("split") for row in data.rows or [])
    if not has_split and set(seeds) != {config["seed"]}:
        raise BadInput(
            f"--seeds {' '.join(map(str, seeds))}: {data.folder} has no split column, so another seed than {config['seed']} "
            f"would choose by rows that {run} was trained on"
        )


def folders_to_resume(flags):
    """The run folder of --out, or of the newest run; of several seeds, those of all."""
    out = find_run(flags.out)
    if flags.out is None:  # of several seeds, the newest run's name without its seed
        out = out.with_name(re.sub(r"-s\d+$", "", out.name))
    whole = out.with_name(out.name + shard_suffix(flags))
    name = re.escape(out.name) + r"-s\d+" + shard_suffix(flags)
    folders = sorted(path.parent for path in out.parent.glob("*/config.json"))
    of_seeds = [folder for folder in folders if re.fullmatch(name, folder.name)]
    if (whole / "config.json").is_file() or not of_seeds:
        return [whole]
    return of_seeds


def shard_of(flags):
    """(i, n) of --shard i/n; (0, 1) without."""
    parts = re.fullmatch(r"(\d+)/(\d+)", flags.shard or "0/1")
    if not parts or not int(parts[1]) < int(parts[2]):
        raise BadInput(f"--shard {flags.shard}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(parts[1]), int(parts[2])


def shard_suffix(flags):
    return "-shard-{}-of-{}".format(*shard_of(flags)) if flags.shard else ""


def run_folder(flags, seed):
    of_seed = f"-s{seed}" if len(flags.seeds) > 1 else ""
    return flags.out.with_name(flags.out.name + of_seed + shard_suffix(flags))


# ------------------------------------------------------------------------------------------------------ free weights


class FreeConnectors(nn.Module):
    """A connector of its own for each pair (the protocol of `hyma.training.Generator`), started from random weights, which
    depend on the seed and the pair's name alone, or from the run folder `source`."""

    def __init__(self, pairs, dims, hidden_layers, seed, source=None):
        super().__init__()
        self.pairs, self.layers = list(pairs), nn.ModuleList()
        for image, text in pairs:
            shapes = connector_shapes(dims[text], hidden_layers, dims[image])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded_generator("weights", seed, image, text).initial_seed())
                self.layers.append(nn.ModuleList(nn.Linear(into, out) for out, into in shapes))
            if source:
                tensors = connector_of_run(source, image, text, hidden_layers)
                for parameter, tensor in zip(self.layers[-1].parameters(), tensors):
                    parameter.data.copy_(tensor)

    def predict(self, image, text):
        """The pair's connector: [(weight [out, in], bias [out])] per layer."""
        return [(layer.weight, layer.bias) for layer in self.layers[self.pairs.index((image, text))]]

    def forward(self, features, pairs):
        """features: {text: [B, D_t]}. Returns what `connector_mlp` takes: inputs, and the layers of these pairs."""
        return separate_layers(features, pairs, [self.predict(*pair) for pair in pairs])

    def flops(self, batch_size, pairs):
        """(of the connectors, 0: nothing is predicted)."""
        total = 0
        for pair in pairs:
            shapes = [weight.shape for weight, _ in self.predict(*pair)]
            total += connector_flops(batch_size, shapes)
        return total, 0


def connector_of_run(run, image, text, hidden_layers):
    """The pair's tensors in a run folder: weight, bias, and so on, layer after layer."""
    path = Path(run, "connectors", connector_name(image, hidden_layers, text))
    return read_connector(path)[3].values()


def clip_each(connectors, pairs, clip_norm):
    """Bounds the gradient norm of each pair by itself, so that no pair depends on the others."""
    for pair in pairs:
        tensors = [tensor for layer in connectors.predict(*pair) for tensor in layer]
        nn.utils.clip_grad_norm_(tensors, clip_norm)


# ---------------------------------------------------------------------------------------------------------- schedule


def plan_steps(flags, pairs, dims, row_count):
    """How many steps the schedule has: those of the epochs, or as many as the FLOPs of another run allow."""
    if flags.budget_of == "full":
        return flags.epochs * (row_count // flags.batch_size)
    budget = read_json(Path(flags.budget_of) / "ledger.json").get("flops")
    if not isinstance(budget, (int, float)) or not 0 < budget < math.inf:
        raise BadInput(f"--budget-of {flags.budget_of}: its ledger.json has no flops above zero")
    with torch.device("meta"):  # shapes alone
        connectors = FreeConnectors(pairs, dims, hidden_layers_of(flags), seed=0)
    flops = step_flops(connectors, flags.batch_size, pairs, dims)["flops"]
    steps = max(1, round(budget / flops))
    if steps > MOST_STEPS:
        raise BadInput(
            f"--budget-of {flags.budget_of}: its {budget:.3g} FLOPs would be {steps:.3g} steps; is it damaged?"
        )
    return steps


def halving_rungs(pair_count, steps):
    """{step: how many pairs are trained from there on}: half of them each time, at 1/2^r, ..., 1/4, 1/2 of the schedule,
    until one is left, so that every rung costs about as much as training one pair for half the schedule."""
    rungs, doublings = {}, math.ceil(math.log2(pair_count))
    if 2**doublings > steps:
        raise BadInput(f"--halving: {steps} steps are too few to halve {pair_count} pairs; give more --epochs")
    for k in range(doublings):
        pair_count = math.ceil(pair_count / 2)
        rungs[steps >> (doublings - k)] = pair_count
    return rungs


def selection_key(six):
    """Pairs and states are compared by this: R@10, then R@5, then R@1, each the mean of both directions."""
    return tuple(reversed(mean_recalls(six)))


def surviving_pairs(pairs, state, count):
    """The `count` pairs with the best scores so far, in their old order; of equals, the first."""
    if count >= len(pairs):
        return pairs
    kept = sorted(pairs, key=lambda pair: selection_key(state["best"][pair_name(pair)]["recalls"]), reverse=True)[
        :count
    ]
    return [pair for pair in pairs if pair in kept]


# ------------------------------------------------------------------------------------------------------------- state

COSTS = ("flops", "start_flops", "step_flops", "logit_flops", "seconds")  # summed over groups of pairs


def new_state(pairs):
    """All that training changes besides the tensors. best: {pair: its best recalls, with the layers that reached them}."""
    updates = {pair_name(pair): 0 for pair in pairs}
    return {"step": 0, "updates": updates, "losses": [], "metrics": [], "best": {}, "peak_bytes": 0} | dict.fromkeys(
        COSTS, 0
    )


def keep_best(state, name, six, layers, card_info):
    """Keeps these layers, [(weight, bias)], as the pair's if none before scored as high. card_info: for its card."""
    if name not in state["best"] or selection_key(six) > selection_key(state["best"][name]["recalls"]):
        layers = [(weight.detach().cpu().clone(), bias.detach().cpu().clone()) for weight, bias in layers]
        state["best"][name] = {"recalls": six, "layers": layers, "about": card_info}


def merge_states(states, pairs):
    """One state of several that went through the same steps with different pairs: costs are added up."""
    whole = new_state(pairs)
    whole["step"] = states[0]["step"]
    whole["peak_bytes"] = max(state["peak_bytes"] for state in states)
    for key in COSTS:
        whole[key] = sum(state[key] for state in states)
    for key in ("updates", "best"):
        found = {}
        for state in states:
            found |= state[key]
        whole[key] = {pair_name(pair): found[pair_name(pair)] for pair in pairs}
    for lines in zip(*(state["metrics"] for state in states)):
        whole["metrics"].append(merge_lines(lines))
    return whole


def merge_lines(lines):
    """One line of metrics.jsonl of several with different pairs: means over the pairs, seconds added up."""
    merged = dict(lines[0])
    merged["recalls"] = {}
    for line in lines:
        merged["recalls"] |= line["recalls"]
    pair_count = len(merged["recalls"])
    for key in {"loss", "val_recall10"} & merged.keys():  # a closed form has no loss
        merged[key] = sum(line[key] * (len(line["recalls"]) / pair_count) for line in lines)
    merged["seconds"] = sum(line["seconds"] for line in lines)
    return merged


# ---------------------------------------------------------------------------------------------------------- training


def train(flags, must_match, pairs, store, retrieval, train_rows, checkpoints, saved):
    """Trains these pairs over the whole schedule. Returns their state. saved: the last checkpoint, {"done": states of the
    groups before this one} and, where this one was interrupted, its state and tensors."""
    seed, steps = must_match["seed"], must_match["steps"]
    connectors = FreeConnectors(pairs, store.dims, hidden_layers_of(flags), seed, flags.from_run).to(store.device)
    optimizer = torch.optim.AdamW(connectors.parameters(), weight_decay=flags.weight_decay, fused=True)
    state = new_state(pairs)
    if "state" in saved:
        connectors.load_state_dict(saved["connectors"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(resumed_line(flags.out, state["step"], steps))

    dtype = training_dtype(flags.precision)
    steps_per_epoch = len(train_rows) // flags.batch_size
    validation_period = steps_per_epoch * max(1, steps // steps_per_epoch // VALIDATIONS)
    # Where a budget makes the schedule shorter than the epochs, the warm-up is as much shorter.
    warmup_steps = min(flags.warmup_steps, flags.warmup_steps * steps // (flags.epochs * steps_per_epoch))
    rungs = halving_rungs(len(pairs), steps) if flags.halving else {}
    # Halving: the pairs that are still trained. A dropped pair has fewer updates than steps have passed; if the checkpoint
    # was saved right at a rung, the rung is still to be applied.
    surviving = [pair for pair in pairs if state["updates"][pair_name(pair)] == state["step"]]
    surviving = surviving_pairs(surviving, state, rungs.get(state["step"], len(surviving)))
    started = time.perf_counter() - state["seconds"]  # as if all had passed in this process

    def save_checkpoint():
        tensors = {"connectors": connectors.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoints.save({"done": saved["done"], "state": state} | tensors)
        lines = [line for group in [*saved["done"], state] for line in group["metrics"]]
        write_jsonl(flags.out / "metrics.jsonl", lines)

    progress = tqdm(total=steps, initial=state["step"], desc=f"train {len(pairs)} pairs", unit="step")
    with progress, Signals() as signals:
        for step in range(state["step"], steps):
            # A batch of rows, every pair's connector, a loss each.
            rows = draw_rows(step, seed, train_rows, flags.batch_size)  # [B]
            losses = pair_losses(connectors, store, rows, surviving, dtype, flags.logit_scale)  # [P]
            if not losses.isfinite().all():
                bad = losses.isfinite().long().argmin().item()
                raise BadInput(
                    f"step {step}: the loss of {pair_name(surviving[bad])} is {losses[bad].item()}; stopped before the update; "
                    "try a lower --lr"
                )

            # The update: each pair under its own gradient norm.
            optimizer.zero_grad(set_to_none=True)  # a dropped pair has no gradient, and AdamW skips it
            losses.sum().backward()  # the sum, so that each pair has its own gradient
            clip_each(connectors, surviving, flags.clip_norm)
            lr = learning_rate(step, steps, flags.lr, warmup_steps)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            state["losses"].append(losses.mean().item())

            # What it cost.
            for key, flops in step_flops(connectors, flags.batch_size, surviving, store.dims).items():
                state[key] += flops
            for pair in surviving:
                state["updates"][pair_name(pair)] += 1
            state["step"] = step + 1
            state["seconds"] = time.perf_counter() - started
            state["peak_bytes"] = max(state["peak_bytes"], peak_bytes(store.device))
            progress.update()

            # Validation: each pair's best state is kept, and halving drops half of the pairs. A checkpoint is saved then,
            # after a minute without one, and on a signal.
            is_validation = (step + 1) % validation_period == 0 or step + 1 == steps or step + 1 in rungs
            if not is_validation:
                if checkpoints.due() or signals.arrived():
                    save_checkpoint()
                    signals.leave_if_asked()
                continue
            recalls = validate(connectors, store, retrieval, surviving)
            epoch = round((step + 1) / steps_per_epoch, 3)
            card_info = {"logit_scale": flags.logit_scale, "seed": seed, "epoch": epoch}
            for pair in surviving:
                keep_best(state, pair_name(pair), recalls[pair_name(pair)], connectors.predict(*pair), card_info)
            state["seconds"] = time.perf_counter() - started
            line = {"epoch": epoch, "step": step + 1, "loss": sum(state["losses"]) / len(state["losses"]), "lr": lr}
            line |= {"val_recall10": mean_recall10(recalls), "seconds": state["seconds"], "recalls": recalls}
            state["metrics"].append(line)
            state["losses"] = []
            progress.set_postfix(
                loss=f"{line['loss']:.3f}", val_R10=f"{line['val_recall10']:.1%}", pairs=len(surviving)
            )
            save_checkpoint()
            signals.leave_if_asked()
            surviving = surviving_pairs(surviving, state, rungs.get(step + 1, len(surviving)))
    return state


def fit_closed_forms(flags, pairs, store, retrieval, rows):
    """A closed form of every pair, in float64, its strength chosen by validation. Returns a state like `train`'s.

    The bias of a linear connector can centre the texts, but nothing in the file can centre the pictures. A map whose outputs
    are perpendicular to the pictures' mean scores a picture as if the mean had been subtracted, but for its length, so the
    mean's direction is removed from the outputs.
    """
    state, started, counter = new_state(pairs), time.perf_counter(), flop_counter()
    means = {name: closed_form.mean_of(store, name, rows) for name in unique(name for pair in pairs for name in pair)}
    for text in unique(text for _, text in pairs):
        with counter:
            text_gram = closed_form.cross_covariance(store, text, text, rows, means)  # [D_t, D_t]
            factors = None if flags.closed_form == "procrustes" else closed_form.ridge_factors(text_gram)
        state["flops"] += counter.get_total_flops()
        texts = store.take(text, retrieval.rows)  # [n, D_t]
        for image in (image for image, other in pairs if other == text):
            with counter:
                maps = closed_form_maps(flags.closed_form, store, image, text, rows, means, text_gram, factors)
            state["flops"] += counter.get_total_flops()
            name, pictures = f"{image}:{text}", store.take(image, retrieval.rows)  # [n, D_i]
            for strength, weight in maps.items():
                weight = closed_form.without_mean_direction(weight, means[image])
                bias = -weight @ means[text]
                six = retrieval.recalls(F.linear(texts, weight.float(), bias.float()), pictures)
                card_info = {"closed_form": flags.closed_form, "regularisation": strength}
                keep_best(state, name, six, [(weight.float(), bias.float())], card_info)
            state["updates"][name] = 1
    state["start_flops"] = state["flops"]
    state["step"] = 1
    state["seconds"] = time.perf_counter() - started
    state["peak_bytes"] = peak_bytes(store.device)
    recalls = {name: best["recalls"] for name, best in state["best"].items()}
    line = {"epoch": 1, "step": 1, "val_recall10": mean_recall10(recalls), "seconds": state["seconds"]}
    state["metrics"].append(line | {"recalls": recalls})
    return state


def closed_form_maps(kind, store, image, text, rows, means, text_gram, factors):
    """{strength: map [D_i, D_t]} of a pair; Procrustes has no strength."""
    cross = closed_form.cross_covariance(store, image, text, rows, means)  # [D_i, D_t]
    if kind == "ridge":
        return closed_form.ridge_maps(cross, factors)
    image_gram = closed_form.cross_covariance(store, image, image, rows, means)  # [D_i, D_i]
    if kind == "whitened":
        return closed_form.whitened_maps(cross, factors, image_gram)
    return {None: closed_form.procrustes_map(cross, image_gram, text_gram)}


# -------------------------------------------------------------------------------------------------------------- main


def main():
    runs = parse_flags()
    flags, resumed_config = runs[0]
    typed = recorded_flags(flags)
    device = pick_device(flags.device)

    # The data, and this shard's pairs of it.
    data, all_pairs = open_data(flags)
    index, count = shard_of(flags)
    pairs = all_pairs[index::count]
    if not pairs:
        raise BadInput(f"--shard {flags.shard}: there are only {len(all_pairs)} pairs")
    image_names = unique(image for image, _ in pairs)
    text_names = unique(text for _, text in pairs)
    steps = None
    if resumed_config is None:
        runs, steps = plan_runs(flags, data, all_pairs, pairs, device)
        flags = runs[0][0]
    store = RowStore(data, image_names + text_names, device)
    embeddings = data.fingerprint(image_names + text_names)
    torch.set_float32_matmul_precision("high" if flags.precision == "tf32" else "highest")

    opened = []  # every seed's folder before the first trains, so that --resume finds them all
    seeds = flags.seeds
    for (flags, resumed_config), seed in zip(runs, seeds):
        must_match = {"pairs": [pair_name(pair) for pair in pairs], "embeddings": embeddings}
        if resumed_config:
            must_match |= {"seed": resumed_config["seed"], "steps": resumed_config["steps"]}
        else:
            must_match |= {"seed": seed, "steps": steps}
        run_info = describe_run(flags, data, must_match["seed"])
        resumed_config = resumed_config or run_of_same_command(flags.out, typed)
        lock = open_run_folder(flags, typed, resumed_config, must_match, run_info, device)
        opened.append((flags, must_match, lock))
    for flags, must_match, _ in opened:
        encoders = f"{len(image_names)} image and {len(text_names)} text encoders"
        print(f"run: {flags.out}, seed {must_match['seed']}, {len(pairs)} pairs of {encoders}")
        train_rows, val_rows = split_for_training(data, must_match["seed"], flags.rows)
        retrieval = Retrieval(data, val_rows, device)
        state = run_groups(flags, must_match, pairs, store, retrieval, train_rows)
        export(flags, data, state, retrieval, len(train_rows))
        if flags.shard:
            merge_shards(flags, must_match, data, all_pairs, retrieval, len(train_rows), device)


def plan_runs(flags, data, all_pairs, pairs, device):
    """([(flags, None)] of each seed, with numbers for those whose default depends on the data; how many steps)."""
    row_count = len(split_rows(data, flags.seeds[0], flags.rows)[0])
    flags = resolve_training_flags(flags, "grid", device, row_count)
    if flags.closed_form:
        flags.connector = "mlp0"
    if flags.from_run:  # checked before anything is trained
        check_same_data(flags.from_run, data, all_pairs, flags.seeds)
        for pair in all_pairs:
            connector_of_run(flags.from_run, *pair, hidden_layers_of(flags))
    dims = {name: encoder.dim for name, encoder in data.encoders.items()}
    steps = plan_steps(flags, all_pairs, dims, row_count)
    if flags.halving:
        halving_rungs(len(pairs), steps)
    runs = []
    for seed in flags.seeds:
        own = argparse.Namespace(**vars(flags))
        own.out = run_folder(flags, seed)
        runs.append((own, None))
    return runs, steps


def describe_run(flags, data, seed):
    """The run_info of `create_run`."""
    hidden_layers = hidden_layers_of(flags)
    method = flags.closed_form or ("halving" if flags.halving else "grid")
    method += f" mlp{hidden_layers}"
    if flags.budget_of != "full":
        method += f", FLOPs of {Path(flags.budget_of).name}"
    if flags.from_run:
        method += f", from {Path(flags.from_run).name}"
    if flags.rows:
        method += f", {flags.rows} rows"
    train_rows, val_rows = split_rows(data, seed, flags.rows)
    is_part = flags.halving or flags.closed_form or flags.from_run or flags.rows
    return {
        "method": method,
        "recipe": recipe_of(flags),
        "full_grid": flags.budget_of == "full" and not is_part,
        "hidden_layers": hidden_layers,
        "rows": {"train": len(train_rows), "val": len(val_rows)},
        "starts_from": flags.from_run,
    }


def run_groups(flags, must_match, pairs, store, retrieval, train_rows):
    """Trains the pairs, --pairs-per-pass at a time, or fits their closed forms. The checkpoint keeps finished groups."""
    checkpoints = Checkpoints(flags.out)
    saved = checkpoints.load("done") or {"done": []}
    done = saved["done"]  # the states of the groups that are finished
    if sum(len(state["updates"]) for state in done) == len(pairs):
        print(resumed_line(flags.out, must_match["steps"], must_match["steps"]))
        return merge_states(done, pairs)
    if flags.closed_form:
        done.append(fit_closed_forms(flags, pairs, store, retrieval, train_rows))
    size = flags.pairs_per_pass or len(pairs)
    while sum(len(state["updates"]) for state in done) < len(pairs):
        group = pairs[size * len(done) :][:size]
        done.append(train(flags, must_match, group, store, retrieval, train_rows, checkpoints, saved))
        saved = {"done": done}
    checkpoints.save({"done": done})
    return merge_states(done, pairs)


def export(flags, data, state, retrieval, row_count):
    """Writes each pair's best connector, ranking.csv, ledger.json and metrics.jsonl, and prints the ranking."""
    best, updates = state["best"], state["updates"]
    tensors = [tensor for pair in best.values() for layer in pair["layers"] for tensor in layer]
    state["trainable_parameters"] = sum(tensor.numel() for tensor in tensors)
    write_jsonl(flags.out / "metrics.jsonl", state["metrics"])

    def connector_of(pair):
        return best[pair]["layers"], best[pair]["about"] | {"updates": updates[pair]}

    recalls = {pair: best[pair]["recalls"] for pair in best}
    ranking = rank_pairs(recalls, before=updates)  # halving: pairs with fewer updates were dropped sooner
    batch_size = row_count if flags.closed_form else flags.batch_size
    paths = write_results(flags.out, data, ranking, connector_of, batch_size, state)
    if flags.closed_form:
        description = flags.closed_form
    elif flags.halving:
        share = sum(updates.values()) / (max(updates.values()) * len(updates))
        description = f"halving of the grid, {flags.connector}, {share:.0%} of the full grid's updates"
    else:
        description = f"grid, {flags.connector}"
    print_results(ranking, recalls, retrieval, description, state, paths[0])


def merge_shards(flags, must_match, data, pairs, retrieval, row_count, device):
    """Writes OUT from the n folders OUT-shard-i-of-n, once all of them are finished; else prints which are not."""
    suffix, (_, count) = shard_suffix(flags), shard_of(flags)
    out = flags.out.with_name(flags.out.name.removesuffix(suffix))
    shards = [out.with_name(f"{out.name}-shard-{k}-of-{count}") for k in range(count)]
    missing = [shard.name for shard in shards if not (shard / "ledger.json").is_file()]
    if missing:
        print(f"\n{out} will hold all {len(pairs)} pairs once these are finished: {', '.join(missing)}")
        return
    configs = [read_json(shard / "config.json") for shard in shards]
    not_compared = {"shard": None, "out": None, "device": None}
    for shard, config in zip(shards, configs):
        same_flags = config["flags"] | not_compared == configs[0]["flags"] | not_compared
        if not same_flags or config["steps"] != must_match["steps"]:
            raise BadInput(f"{shard}: was started with other flags than {shards[0]}; not merged into {out}")
    flags = argparse.Namespace(**vars(flags) | {"out": out, "shard": None})
    embeddings = {}
    for config in configs:
        embeddings |= config["embeddings"]
    must_match = must_match | {"pairs": [pair_name(pair) for pair in pairs], "embeddings": embeddings}
    resumed_config = read_json(out / "config.json") if (out / "config.json").is_file() else None
    run_info = describe_run(flags, data, must_match["seed"])
    typed = recorded_flags(flags)
    # Another shard may be merging, so this waits for its turn.
    lock = open_run_folder(flags, typed, resumed_config, must_match, run_info, device, wait=True)  # noqa: F841
    if (out / "ledger.json").is_file():
        return
    states = []
    for shard in shards:
        states += Checkpoints(shard).load("done")["done"]
    state = merge_states(states, pairs)
    Checkpoints(out).save({"done": [state]})
    print(f"\nall {count} shards are finished; merged into {out}")
    export(flags, data, state, retrieval, row_count)


if __name__ == "__main__":
    run_script(main)
