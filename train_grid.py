"""Trains every encoder pair's connector by itself, ranks the pairs, writes the connectors: the oracle and the baseline.

    python train_grid.py --pairs all                                  # the embedded sample
    python train_grid.py --data embeddings/my --seeds 0 1 2 --out runs/grid       # runs/grid-s0, -s1 and -s2
    python train_grid.py --budget-of runs/hyma                        # as many FLOPs as that run has spent
    python train_grid.py --halving                                    # drops the worse half of the pairs, repeatedly
    python train_grid.py --closed-form whitened                       # no training; also ridge, procrustes, unicon
    python train_grid.py --from runs/hyma --pairs vit_l16:mpnet --epochs 2 --lr 3e-4    # trains that run's connector further
    python train_grid.py --resume                                     # the newest run, after an interruption
    torchrun --nproc-per-node 4 train_grid.py --out runs/grid         # four processes, a GPU each where there are GPUs

All pairs go through the kernels in one pass, on the batches that train_hyma.py draws for the same seed, each with its
own loss, its own gradient norm and its own best state: a pair trains exactly as it would alone. The processes of
torchrun share the pairs, or each step's rows (--split rows). Writes what train_hyma.py writes: connectors/, ranking.csv,
ledger.json, metrics.jsonl, config.json, checkpoint.pt.
"""

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from hyma import ranks
from hyma.batches import Batches
from hyma.columns import named
from hyma.costs import step_flops
from hyma.embeddings import RowStore
from hyma.files import write_jsonl
from hyma.fitted_connectors import fit_connectors
from hyma.free_connectors import FreeConnectors, train_step
from hyma.graphs import check_graph, record_steps
from hyma.grid_state import gather_best_layers, keep_best, merge_states, new_state
from hyma.halving import halving_rungs, surviving_pairs
from hyma.machine import peak_bytes
from hyma.pair_names import pair_name
from hyma.pairs import images_of, texts_of
from hyma.printed_ranking import print_results
from hyma.ranking import rank_pairs
from hyma.runs import Checkpoints, find_run, is_run, with_seed, without_seed, write_results
from hyma.signals import Signals
from hyma.splits import split_rows
from hyma.starting_run import check_same_data, flags_to_keep, read_starting_connector
from hyma.training import (
    Schedule,
    StepLosses,
    build_adamw,
    check_ranks_share,
    check_weights,
    choose_matmul_precision,
    count_step,
    mean_recall10,
    metrics_line,
    open_data,
    open_run_folder,
    progress_line,
    resumed_line,
    split_for_training,
    training_dtype,
    validate_on_ranks,
    validation_retrieval,
    what_must_match,
)
from hyma.training_flags import (
    add_training_flags,
    check_seeds,
    check_training_flags,
    describe_run,
    hidden_layers_of,
    parse_resumed_flags,
    parse_with_defaults,
    recorded_flags,
    resolve_training_flags,
)
from vlm import BadInput, pick_device, read_json

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
    budget = parser.add_mutually_exclusive_group().add_argument
    about = "spend that run's FLOPs (default: %(default)s)"
    budget("--budget-of", "--budget", metavar="RUN", default="full", help=about)
    budget("--halving", action="store_true", help="successive halving of the pairs by their validation scores")
    kinds = ["ridge", "whitened", "procrustes", "unicon"]
    budget("--closed-form", choices=kinds, help="a linear connector, untrained")
    flags = parser.parse_args()
    if flags.resume:
        return [parse_resumed_flags(parser, folder) for folder in folders_to_resume(flags)]
    if flags.from_run:
        flags = parse_with_defaults(parser, flags_to_keep(flags.from_run, flags.data))
    check_training_flags(flags, "pairs_per_pass")
    if len(set(flags.seeds)) < len(flags.seeds) or min(flags.seeds) < 0:
        raise BadInput(f"--seeds {' '.join(map(str, flags.seeds))}: must be different and not negative")
    check_seeds("--seeds", flags.seeds)
    if len(flags.seeds) > 1 and flags.out and not flags.out.name:
        raise BadInput(f"--out {flags.out}: has no name for the runs of several seeds to be named after; name a folder")
    if flags.closed_form and flags.from_run:
        raise BadInput(f"--from {flags.from_run}: contradicts --closed-form, which trains nothing")
    if flags.closed_form and flags.connector == "mlp2":
        raise BadInput("--connector mlp2: contradicts --closed-form, whose connectors are linear")
    if flags.halving and flags.pairs_per_pass:
        raise BadInput("--halving: compares all pairs while it trains, so --pairs-per-pass cannot be used with it")
    return [(flags, None)]


def folders_to_resume(flags):
    """The run folder of --out, or of the newest run; of a command with several seeds, those of all."""
    out = find_run(flags.out)
    if is_run(out):
        return [out] if flags.out else folders_of_command(out)
    of_seeds = [path.parent for path in out.parent.glob("*/config.json") if without_seed(path.parent) == out]
    if of_seeds:
        return folders_of_command(max(of_seeds, key=lambda folder: (folder / "config.json").stat().st_mtime))
    return [out]  # no run, as `parse_resumed_flags` says


def folders_of_command(run):
    """The run folders of the command that has made this one: those of its seeds, if it had several."""
    config = read_json(run / "config.json")
    seeds = config.get("flags", {}).get("seeds", [])
    if len(seeds) < 2 or run != with_seed(without_seed(run), config.get("seed")):
        return [run]
    folders = [with_seed(without_seed(run), seed) for seed in seeds]
    for folder in folders:
        if not is_run(folder):
            raise BadInput(f"--resume: {folder} is not there; type the command that has started {run} again")
    return folders


def run_folder(flags, seed):
    """The folder of a seed's run."""
    return with_seed(flags.out, seed) if len(flags.seeds) > 1 else flags.out


# ---------------------------------------------------------------------------------------------------------- training


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
    steps = max(1, int(budget / flops))
    if steps > MOST_STEPS:
        raise BadInput(
            f"--budget-of {flags.budget_of}: its {budget:.3g} FLOPs would be {steps:.3g} steps; is it damaged?"
        )
    return steps


def train(flags, seed, steps, pairs, store, retrieval, train_rows, checkpoints, saved):
    """Trains these pairs over the whole schedule of so many steps. Returns their state (`grid_state.new_state`).

    store: a RowStore. retrieval: Retrieval of the validation rows. train_rows [n]: row numbers. saved: the last checkpoint,
    {"done": states of the groups before this one} and, where this one was interrupted, its state and tensors.
    Every rank has the whole state, but for the best layers of other ranks' pairs, which are the first's when it saves.
    """
    own = ranks.share(pairs) if flags.split == "pairs" else pairs
    connectors = FreeConnectors(own, store.dims, hidden_layers_of(flags), seed, flags.from_run).to(store.device)
    parameters = {"params": list(connectors.parameters())}  # may be empty: of few pairs a rank has none
    optimizer = build_adamw([parameters], flags)
    state = new_state(pairs)

    # Where training starts: at random weights, at the connectors of --from, or at a checkpoint.
    if "state" in saved:
        connectors.load_tensors(optimizer, saved["pairs"])
        state = saved["state"]
        print(resumed_line(flags.out, state["step"], steps))

    # The schedule.
    dtype = training_dtype(flags.precision)
    steps_per_epoch = len(train_rows) // flags.batch_size
    validation_period = steps_per_epoch * max(1, steps // steps_per_epoch // VALIDATIONS)
    # Where a budget makes the schedule shorter than the epochs, the warm-up is as much shorter.
    warmup_steps = min(flags.warmup_steps, flags.warmup_steps * steps // (flags.epochs * steps_per_epoch))
    if flags.from_run:  # a few epochs more may be a few steps
        warmup_steps = min(warmup_steps, steps // 4)
    schedule = Schedule(steps, flags.lr, warmup_steps, flags.weight_decay, store.device)
    rungs = halving_rungs(len(pairs), steps) if flags.halving else {}
    surviving = surviving_pairs(pairs, state, rungs)
    mine = [pair for pair in surviving if pair in own]
    started = time.perf_counter() - state["seconds"]  # as if all had passed in this process

    if flags.from_run and not state["best"]:  # training may make a connector worse: that which it starts from counts, too
        scored = mine if flags.split == "pairs" else ranks.share(surviving)
        recalls = validate_on_ranks(connectors, store, retrieval, surviving, scored)
        card_info = {"logit_scale": flags.logit_scale, "seed": seed, "epoch": 0}
        for pair in surviving:
            layers = connectors.predict(*pair) if pair in own else []
            keep_best(state, pair_name(pair), recalls[pair_name(pair)], layers, card_info)

    batches = Batches(store, seed, train_rows, flags.batch_size)
    step_losses = StepLosses(state["losses"])

    def save_checkpoint():
        step_losses.read()
        check_weights(connectors.state_dict(), state["step"])
        (state["peak_bytes"],) = ranks.largest(max(state["peak_bytes"], peak_bytes(store.device)))
        tensors = connectors.tensors(optimizer)
        if flags.split == "pairs":
            gather_best_layers(state, own)
            for of_rank in ranks.gather(tensors):
                tensors |= of_rank
        if ranks.is_first():
            checkpoints.save({"done": saved["done"], "state": state, "pairs": tensors})
            lines = []
            for of_group in [*saved["done"], state]:
                lines += of_group["metrics"]
            write_jsonl(flags.out / "metrics.jsonl", lines)
        ranks.wait()  # a rank that ends before the first has saved would end it too

    take_step = partial(train_step, connectors, optimizer, store, dtype, flags)
    if flags.graph:
        take_step = record_steps(take_step, store, sets=1 + len(rungs))

    shown = progress_line(state)
    progress = tqdm(total=steps, initial=state["step"], desc=f"train {len(pairs)} pairs", unit="step", postfix=shown)
    with progress, Signals() as signals:
        for step in range(state["step"], steps):
            # A batch of rows, and a step of every pair's connector.
            rows = batches.rows_of(step)  # [B]
            losses = take_step(surviving, rows, schedule.numbers(step))  # [P]
            if step_losses.add(step, surviving, losses):
                progress.set_postfix(progress_line(state), refresh=False)

            count_step(state, connectors, store, flags.batch_size, surviving)
            state["seconds"] = time.perf_counter() - started
            progress.update()

            # Validation: each pair's best state is kept, and halving drops half of the pairs. A checkpoint is saved then,
            # after a minute without one, and on a signal.
            is_validation = (step + 1) % validation_period == 0 or step + 1 == steps or step + 1 in rungs
            if not is_validation:
                if signals.arrived_anywhere(step, checkpoints.due()):
                    save_checkpoint()
                    signals.leave_if_asked()
                continue
            step_losses.read()
            scored = mine if flags.split == "pairs" else ranks.share(surviving)
            recalls = validate_on_ranks(connectors, store, retrieval, surviving, scored)
            epoch = round((step + 1) / steps_per_epoch, 3)
            card_info = {"logit_scale": flags.logit_scale, "seed": seed, "epoch": epoch}
            for pair in surviving:
                layers = connectors.predict(*pair) if pair in own else []
                keep_best(state, pair_name(pair), recalls[pair_name(pair)], layers, card_info)
            state["seconds"] = time.perf_counter() - started
            line = metrics_line(state, epoch, schedule.rate(step), mean_recall10(recalls), recalls)
            state["metrics"].append(line)
            state["losses"].clear()
            progress.set_postfix(progress_line(state))
            signals.arrived_anywhere()
            save_checkpoint()
            signals.leave_if_asked()
            surviving = surviving_pairs(pairs, state, rungs)
            mine = [pair for pair in surviving if pair in own]
    batches.close()
    return state


# -------------------------------------------------------------------------------------------------------------- main


def main():
    runs = parse_flags()
    flags, resumed_config = runs[0]
    typed = recorded_flags(flags)
    device = pick_device(ranks.rank_device(flags.device))
    check_graph(flags.graph, device)

    first = run_folder(flags, flags.seeds[0]) if flags.out else None
    data, pairs = open_data(flags, first, typed, resumed_config)
    image_names, text_names = images_of(pairs), texts_of(pairs)
    steps = None
    if resumed_config is None:
        runs, steps = plan_runs(flags, data, pairs, device)
        flags = runs[0][0]
    check_ranks_share(flags, pairs)
    store = RowStore(data, image_names + text_names, device)
    choose_matmul_precision(flags.precision)

    opened = []  # every seed's folder before the first trains, so that --resume finds them all
    seeds = flags.seeds
    for (flags, resumed_config), seed in zip(runs, seeds):
        must_match = what_must_match(data, pairs, image_names + text_names)
        if resumed_config:
            must_match |= {"seed": resumed_config["seed"], "steps": resumed_config["steps"]}
        else:
            must_match |= {"seed": seed, "steps": steps}
        run_info = describe_grid(flags, data, must_match["seed"])
        lock = open_run_folder(flags, typed, resumed_config, must_match, run_info, device)
        opened.append((flags, must_match, lock))
    for flags, must_match, _ in opened:
        seed, steps = must_match["seed"], must_match["steps"]
        encoders = f"{len(image_names)} image and {len(text_names)} text encoders"
        print(f"run: {flags.out}, seed {seed}, {len(pairs)} pairs of {encoders}")
        train_rows, val_rows = split_for_training(data, seed, flags.rows)
        retrieval = validation_retrieval(data, train_rows, val_rows, device)
        state = run_groups(flags, seed, steps, pairs, store, retrieval, train_rows)
        if ranks.is_first():
            export(flags, data, state, retrieval, len(train_rows))


def plan_runs(flags, data, pairs, device):
    """([(flags, None)] of each seed, with numbers for those whose default depends on the data; how many steps)."""
    row_count = min(len(split_rows(data, seed, flags.rows)[0]) for seed in flags.seeds)  # seeds may split the rows otherwise
    flags = resolve_training_flags(flags, "grid", device, row_count)
    if flags.rows and flags.rows >= sum(map(len, split_rows(data, flags.seeds[0]))):
        flags.rows = None  # all that there are, as without the flag
    if flags.closed_form:
        flags.connector = "mlp0"
    if flags.from_run:  # checked before anything is trained
        check_same_data(flags.from_run, data, pairs, flags.seeds)
        for pair in pairs:
            read_starting_connector(flags.from_run, *pair, hidden_layers_of(flags))
    dims = {name: encoder.dim for name, encoder in data.encoders.items()}
    steps = plan_steps(flags, pairs, dims, row_count)
    if flags.halving:
        halving_rungs(len(pairs), steps)  # or says that the steps are too few
    runs = []
    for seed in flags.seeds:
        own = argparse.Namespace(**vars(flags))
        own.out = run_folder(flags, seed)
        runs.append((own, None))
    return runs, steps


def describe_grid(flags, data, seed):
    """The run_info of `create_run`."""
    kind = flags.closed_form or ("halving" if flags.halving else "grid")
    is_part = flags.halving or flags.closed_form or flags.from_run or flags.rows or flags.budget_of != "full"
    train_rows, val_rows = split_rows(data, seed, flags.rows)
    return describe_run(flags, kind, not is_part, train_rows, val_rows)


def run_groups(flags, seed, steps, pairs, store, retrieval, train_rows):
    """Trains the pairs, --pairs-per-pass at a time, or fits their closed forms. Returns the state of all; arguments as for
    `train`. The checkpoint keeps finished groups."""
    checkpoints = Checkpoints(flags.out)
    saved = ranks.from_first(lambda: checkpoints.load("done")) or {"done": []}
    if "state" in saved and "pairs" not in saved:
        raise BadInput(f"--resume: {flags.out} was started by an earlier version of train_grid.py; start it again")
    done = saved["done"]  # the states of the groups that are finished
    finished = sum(len(state["updates"]) for state in done)
    if finished == len(pairs):
        print(resumed_line(flags.out, steps, steps))
        return merge_states(done, pairs)
    if flags.closed_form:  # nothing that ranks would share
        done.append(ranks.from_first(lambda: fit_connectors(flags.closed_form, pairs, store, retrieval, train_rows)))
        finished = len(pairs)
    group_size = flags.pairs_per_pass or len(pairs)
    for start in range(finished, len(pairs), group_size):
        group = pairs[start : start + group_size]
        done.append(train(flags, seed, steps, group, store, retrieval, train_rows, checkpoints, saved))
        saved = {"done": done}
    if ranks.is_first():
        checkpoints.save({"done": done})
    return merge_states(done, pairs)


def export(flags, data, state, retrieval, row_count):
    """Writes each pair's best connector, ranking.csv, ledger.json and metrics.jsonl, and prints the ranking."""
    best, updates = state["best"], state["updates"]
    state["trainable_parameters"] = 0
    for of_pair in best.values():
        for weight, bias in of_pair["layers"]:
            state["trainable_parameters"] += weight.numel() + bias.numel()
    write_jsonl(flags.out / "metrics.jsonl", state["metrics"])

    def connector_of(name):
        card_info = {"updates": updates[name], "val_rows": retrieval.query_rows, "val_candidates": len(retrieval.rows)}
        return best[name]["layers"], best[name]["about"] | card_info

    recalls = {name: best[name]["recalls"] for name in best}
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
    as_before = [name for name in best if flags.from_run and best[name]["about"].get("epoch") == 0]
    if as_before:
        some = named(as_before)
        print(f"as they were in {flags.from_run}, since training made them no better: {some}; a lower --lr may")


if __name__ == "__main__":
    ranks.run_on_ranks(main)
