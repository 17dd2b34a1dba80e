"""Trains every encoder pair's connector by itself, ranks the pairs, writes the connectors: the oracle and the baseline.

    python train_grid.py --pairs all                                  # the embedded sample
    python train_grid.py --data embeddings/my --seeds 0 1 2 --out runs/grid       # runs/grid-s0, -s1 and -s2
    python train_grid.py --data embeddings/my --shard 0/4 --out runs/grid         # and 1/4, 2/4, 3/4 elsewhere
    python train_grid.py --budget-of runs/hyma                        # as many FLOPs as that run has spent
    python train_grid.py --halving                                    # gives up the worse half of the pairs, repeatedly
    python train_grid.py --closed-form whitened                       # no training at all; also ridge, procrustes
    python train_grid.py --from runs/hyma --pairs vit_l16:mpnet --epochs 2 --lr 3e-4    # refines that run's connector
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

import vlm
from hyma.closed_form import PICTURE_RIDGE, RIDGE, covariance, mean_of, perpendicular, procrustes, regularised
from hyma.costs import connector_flops, logit_flops, procrustes_flops
from hyma.embeddings import RowStore, random_of, split_rows, unique
from hyma.files import peak_bytes, run_script, save_tensors, write_jsonl
from hyma.metrics import Retrieval, rank_pairs
from hyma.runs import create_run, find_run, resume_flags, write_results
from hyma.training import (
    add_training_flags,
    check_training_flags,
    draw_rows,
    learning_rate,
    open_data,
    own_layers,
    pair_losses,
    print_results,
    settle_training_flags,
    split_for_training,
    validate,
)
from vlm import HIDDEN_DIM, BadInput


def parse_flags():
    """[(flags, configuration)]: one run, or the resumed ones of several seeds. The configuration of a new run is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser, "grid")
    add, budget = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="of weights and batches; several: a run each, OUT-s<seed>")
    add("--from", metavar="RUN", help="start from that run's connectors (default: from random weights)")
    add("--pairs-per-pass", type=int, help="pairs trained at a time, to bound memory (default: all)")
    add("--shard", metavar="I/N", help="every N-th pair from the I-th on, into OUT-shard-I-of-N; the last one merges")
    budget(
        "--budget-of", "--budget", metavar="RUN", default="full", help="spend that run's FLOPs (default: %(default)s)"
    )
    budget("--halving", action="store_true", help="successive halving of the pairs by their validation scores")
    budget("--closed-form", choices=["ridge", "whitened", "procrustes"], help="a linear connector, untrained")
    flags = parser.parse_args()
    if not flags.resume:
        check_training_flags(flags, "pairs_per_pass")
        if len(set(flags.seeds)) < len(flags.seeds) or min(flags.seeds) < 0:
            raise BadInput(f"--seeds {' '.join(map(str, flags.seeds))}: must be different and not negative")
        if flags.shard and not flags.out:
            raise BadInput(f"--shard {flags.shard}: needs --out, the same for all shards")
        if flags.closed_form and getattr(flags, "from"):
            raise BadInput(f"--from {getattr(flags, 'from')}: contradicts --closed-form, which starts from nothing")
        if flags.halving and (flags.shard or flags.pairs_per_pass):
            raise BadInput(
                "--halving: compares all pairs as it goes, so neither --shard nor --pairs-per-pass goes with it"
            )
        return [(flags, None)]
    out = find_run(flags.out)
    if flags.out is None:  # the newest of several seeds stands for all of them
        out = out.with_name(re.sub(r"-s\d+$", "", out.name))
    whole = out.with_name(out.name + shard_suffix(flags))
    name = re.escape(out.name) + r"-s\d+" + shard_suffix(flags)
    several = sorted(path.parent for path in out.parent.glob("*/config.json") if re.fullmatch(name, path.parent.name))
    folders = [whole] if (whole / "config.json").is_file() or not several else several
    return [resume_flags(parser, folder) for folder in folders]


def shard_of(flags):
    """(i, n) of --shard i/n; (0, 1) without."""
    parts = re.fullmatch(r"(\d+)/(\d+)", flags.shard or "0/1")
    if not parts or not int(parts[1]) < int(parts[2]):
        raise BadInput(f"--shard {flags.shard}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(parts[1]), int(parts[2])


def shard_suffix(flags):
    return "-shard-{}-of-{}".format(*shard_of(flags)) if flags.shard else ""


# -------------------------------------------------------------------------------------------------- free weights


class Connectors(nn.Module):
    """A connector of its own for each pair, started from nothing but the seed and the pair's name, or from the run
    folder `source`."""

    def __init__(self, pairs, dims, hidden_layers, seed, source=None):
        super().__init__()
        self.pairs, self.layers = list(pairs), nn.ModuleList()
        for image, text in pairs:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(random_of("weights", seed, image, text).initial_seed())
                widths = [dims[text]] + [HIDDEN_DIM] * hidden_layers + [dims[image]]
                self.layers.append(nn.ModuleList(nn.Linear(*shape) for shape in zip(widths, widths[1:])))
            if source:
                for parameter, tensor in zip(
                    self.layers[-1].parameters(), start_of(source, image, text, hidden_layers)
                ):
                    parameter.data.copy_(tensor)

    def of(self, pair):
        """The pair's connector: [(weight [out, in], bias [out])] per layer."""
        return [(layer.weight, layer.bias) for layer in self.layers[self.pairs.index(pair)]]

    def forward(self, features, pairs):
        """features: {text: [B, D_t]}. Returns what `connector_mlp` takes: inputs, and the layers of these pairs."""
        return own_layers(features, pairs, [self.of(pair) for pair in pairs])


def start_of(source, image, text, hidden_layers):
    """The pair's tensors in the run folder `source`: weight, bias, and so on, layer after layer."""
    path = Path(source, "connectors", vlm.connector_name(image, hidden_layers, text))
    return vlm.read_connector(path)[3].values()


def clip_each(connectors, pairs, clip_norm):
    """Bounds the gradient norm of each pair by itself, so that none feels its neighbours."""
    for pair in pairs:
        nn.utils.clip_grad_norm_([tensor for layer in connectors.of(pair) for tensor in layer], clip_norm)


def step_flops(flags, pairs, dims):
    """Of one update of these pairs: connectors and logits, forward and backward, 2 a multiply-add."""
    total = 0
    for image, text in pairs:
        widths = [dims[text]] + [HIDDEN_DIM] * int(flags.connector[-1]) + [dims[image]]
        total += connector_flops(flags.batch_size, zip(widths[1:], widths))
    return total + logit_flops(flags.batch_size, [dims[image] for image, _ in pairs])


# ------------------------------------------------------------------------------------------------------- training


def plan_steps(flags, pairs, dims, row_count):
    """How many updates the schedule has: the epochs', or what the FLOPs of another run pay for."""
    if flags.budget_of == "full":
        return flags.epochs * (row_count // flags.batch_size)
    ledger = vlm.read_json(Path(flags.budget_of) / "ledger.json")
    flops = ledger.get("flops") if isinstance(ledger, dict) else None
    if not isinstance(flops, (int, float)) or flops <= 0:
        raise BadInput(f"--budget-of {flags.budget_of}: its ledger.json has no flops above zero")
    return max(1, round(flops / step_flops(flags, pairs, dims)))


def halving_rungs(pair_count, steps):
    """{step: pairs that go on from there}: half of them each time, at 1/2^r, ..., 1/4, 1/2 of the schedule, until one
    is left, so that every rung costs about as much as training one pair for half the schedule."""
    rungs, doublings = {}, math.ceil(math.log2(pair_count))
    if 2**doublings > steps:
        raise BadInput(f"--halving: {steps} steps are too few to halve {pair_count} pairs; give more --epochs")
    for k in range(doublings):
        pair_count = math.ceil(pair_count / 2)
        rungs[steps >> (doublings - k)] = pair_count
    return rungs


def new_state(pairs):
    """All that training changes beside the tensors. best: {pair: its best recalls, with the layers that reached them}."""
    costs = {"flops": 0, "logit_flops": 0, "seconds": 0.0, "peak_bytes": 0}
    return {"step": 0, "updates": {":".join(pair): 0 for pair in pairs}, "metrics": [], "best": {}} | costs


def score(six):
    """What pairs and states are chosen by: R@10, then R@5, then R@1, each the mean of both directions."""
    return tuple((six[k] + six[k + 3]) / 2 for k in (2, 1, 0))


def mean_recall10(recalls):
    """{"image:text": six recalls} to the number that a run is watched by."""
    return sum(score(six)[0] for six in recalls.values()) / len(recalls)


def keep_best(state, name, six, layers, about):
    """Keeps these layers, [(weight, bias)], as the pair's if none before scored as high. about: for the card."""
    if name not in state["best"] or score(six) > score(state["best"][name]["recalls"]):
        layers = [(weight.detach().cpu().clone(), bias.detach().cpu().clone()) for weight, bias in layers]
        state["best"][name] = {"recalls": six, "layers": layers, "about": about}


def train(flags, seed, pairs, steps, store, retrieval, train_rows, saved, checkpoint):
    """Trains these pairs over the whole schedule. `checkpoint(state, tensors)` saves; `saved` is what it saved last."""
    connectors = Connectors(pairs, store.dims, int(flags.connector[-1]), seed, getattr(flags, "from")).to(store.device)
    optimizer = torch.optim.AdamW(connectors.parameters(), weight_decay=flags.weight_decay, fused=True)
    state = new_state(pairs)
    if "state" in saved:
        connectors.load_state_dict(saved["connectors"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"resumed: {flags.out} at step {state['step']} of {steps}")

    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    steps_per_epoch = len(train_rows) // flags.batch_size
    period = steps_per_epoch * max(1, steps // steps_per_epoch // 5)  # steps between two looks, each with a checkpoint
    warmup_steps = min(flags.warmup_steps, flags.warmup_steps * steps // (flags.epochs * steps_per_epoch))
    rungs = halving_rungs(len(pairs), steps) if flags.halving else {}
    alive = [pair for pair in pairs if state["updates"][":".join(pair)] == state["step"]]
    alive = best_of(alive, state, rungs.get(state["step"], len(alive)))
    started, losses_seen = time.perf_counter() - state["seconds"], []
    with tqdm(total=steps, initial=state["step"], desc=f"train {len(pairs)} pairs", unit="step") as progress:
        for step in range(state["step"], steps):
            rows = draw_rows(step, seed, train_rows, flags.batch_size)  # [B]
            losses = pair_losses(connectors, store, rows, alive, dtype, flags.logit_scale)  # [P]
            if not losses.isfinite().all():
                bad = losses.isfinite().long().argmin().item()
                said = f"the loss of {':'.join(alive[bad])} is {losses[bad].item()}"
                raise BadInput(f"step {step}: {said}; stopped before the update; try a lower --lr")
            optimizer.zero_grad(set_to_none=True)  # a pair given up has no gradient, and AdamW passes it by
            losses.sum().backward()  # the sum, so that each pair has its own gradient
            clip_each(connectors, alive, flags.clip_norm)
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, steps, flags.lr, warmup_steps)
            optimizer.step()
            losses_seen.append(losses.mean().item())
            for pair in alive:
                state["updates"][":".join(pair)] += 1
            state["flops"] += step_flops(flags, alive, store.dims)
            state["logit_flops"] += logit_flops(flags.batch_size, [store.dims[image] for image, _ in alive])
            progress.update()
            if (step + 1) % period and step + 1 < steps and step + 1 not in rungs:
                continue

            recalls, epoch = validate(connectors, store, retrieval, alive), round((step + 1) / steps_per_epoch, 3)
            about = {"logit_scale": flags.logit_scale, "seed": seed, "epoch": epoch}
            for pair in alive:
                keep_best(state, ":".join(pair), recalls[":".join(pair)], connectors.of(pair), about)
            line = {"epoch": epoch, "step": step + 1, "loss": sum(losses_seen) / len(losses_seen), "lr": lr}
            line |= {"val_recall10": mean_recall10(recalls)}
            state["step"], state["seconds"], losses_seen = step + 1, time.perf_counter() - started, []
            state["peak_bytes"] = max(state["peak_bytes"], peak_bytes(store.device))
            state["metrics"].append(line | {"seconds": state["seconds"], "recalls": recalls})
            progress.set_postfix(loss=f"{line['loss']:.3f}", val_R10=f"{line['val_recall10']:.1%}", pairs=len(alive))
            checkpoint(state, {"connectors": connectors.state_dict(), "optimizer": optimizer.state_dict()})
            alive = best_of(alive, state, rungs.get(step + 1, len(alive)))
    return state


def best_of(pairs, state, count):
    """The `count` pairs with the best scores so far, in their old order; equals go on in that order."""
    if count >= len(pairs):
        return pairs
    kept = sorted(pairs, key=lambda pair: score(state["best"][":".join(pair)]["recalls"]), reverse=True)[:count]
    return [pair for pair in pairs if pair in kept]


def merge_states(states, pairs):
    """One state of several that went through the same steps with different pairs: costs are added up."""
    whole = new_state(pairs) | {"step": states[0]["step"], "peak_bytes": max(state["peak_bytes"] for state in states)}
    whole |= {key: sum(state[key] for state in states) for key in ("flops", "logit_flops", "seconds")}
    for key in ("updates", "best"):
        found = {name: value for state in states for name, value in state[key].items()}
        whole[key] = {":".join(pair): found[":".join(pair)] for pair in pairs}
    for lines in zip(*(state["metrics"] for state in states)):
        shares = [(line, len(line["recalls"]) / sum(len(other["recalls"]) for other in lines)) for line in lines]
        line = dict(lines[0])
        for key in {"loss", "val_recall10"} & line.keys():  # a closed form has no loss
            line[key] = sum(other[key] * share for other, share in shares)
        line["seconds"] = sum(other["seconds"] for other in lines)
        line["recalls"] = {name: six for other in lines for name, six in other["recalls"].items()}
        whole["metrics"].append(line)
    return whole


# ---------------------------------------------------------------------------------------------------- closed forms


def solve(flags, pairs, store, retrieval, rows):
    """A linear map from text to image, both centred on the training rows, in float64: ridge regression, the same with the
    pictures whitened too (C_yy^-1 C_yx C_xx^-1, what train_hyma.py starts from), or orthogonal Procrustes.

    An mlp0 file can centre the texts (its bias does) but not the pictures. A map whose outputs are perpendicular to the
    pictures' mean scores a picture as if the mean had been subtracted, but for its length: so the mean's direction is
    taken out of the outputs, and the file needs nothing else.
    """
    state, started, count = new_state(pairs), time.perf_counter(), len(rows)
    means = {name: mean_of(store, name, rows) for name in unique(name for pair in pairs for name in pair)}
    for text in unique(text for _, text in pairs):
        gram = covariance(store, text, text, rows, means)  # [D_t, D_t]
        wide = len(gram)
        state["flops"] += 2 * count * wide**2
        if flags.closed_form != "procrustes":
            factors = {a: torch.linalg.cholesky(regularised(gram, a)) for a in RIDGE}
            state["flops"] += len(RIDGE) * wide**3 // 3
        texts = store.take(text, retrieval.rows)
        for image in (image for image, other in pairs if other == text):
            cross = covariance(store, image, text, rows, means)  # [D_i, D_t]
            state["flops"] += 2 * count * cross.numel()
            if flags.closed_form != "ridge":
                image_gram = covariance(store, image, image, rows, means)  # [D_i, D_i]
                state["flops"] += 2 * count * len(cross) ** 2
            if flags.closed_form == "procrustes":
                maps = {None: procrustes(cross, image_gram, gram)}
                state["flops"] += procrustes_flops(*cross.shape)
            else:
                maps = {a: torch.cholesky_solve(cross.T, factor).T for a, factor in factors.items()}
                state["flops"] += len(RIDGE) * 2 * wide * cross.numel()
            if flags.closed_form == "whitened":
                factor = torch.linalg.cholesky(regularised(image_gram, PICTURE_RIDGE))
                maps = {a: torch.cholesky_solve(weight, factor) for a, weight in maps.items()}
                state["flops"] += len(cross) ** 3 // 3 + len(RIDGE) * 2 * len(cross) * cross.numel()
            name, pictures = f"{image}:{text}", store.take(image, retrieval.rows)
            for strength, weight in maps.items():
                weight = perpendicular(weight, means[image])
                bias = -weight @ means[text]
                six = retrieval.recalls(F.linear(texts, weight.float(), bias.float()), pictures)
                about = {"closed_form": flags.closed_form, "regularisation": strength}
                keep_best(state, name, six, [(weight.float(), bias.float())], about)
            state["updates"][name] = 1
    state["step"], state["seconds"] = 1, time.perf_counter() - started
    state["peak_bytes"] = peak_bytes(store.device)
    recalls = {name: best["recalls"] for name, best in state["best"].items()}
    line = {"epoch": 1, "step": 1, "val_recall10": mean_recall10(recalls), "seconds": state["seconds"]}
    state["metrics"].append(line | {"recalls": recalls})
    return state


# ----------------------------------------------------------------------------------------------------------- main


def main():
    runs = parse_flags()
    flags, config = runs[0]
    device = vlm.pick_device(flags.device)
    data, all_pairs = open_data(flags)
    index, count = shard_of(flags)
    pairs = all_pairs[index::count]
    if not pairs:
        raise BadInput(f"--shard {flags.shard}: there are only {len(all_pairs)} pairs")
    images, texts = unique(image for image, _ in pairs), unique(text for _, text in pairs)
    if config is None:
        row_count = len(split_rows(data, flags.seeds[0], flags.rows)[0])
        settle_training_flags(flags, "grid", device, row_count)
        flags.connector = "mlp0" if flags.closed_form else flags.connector
        runs = [(argparse.Namespace(**vars(flags) | {"out": run_folder(flags, seed)}), None) for seed in flags.seeds]
        for pair in all_pairs if getattr(flags, "from") else []:
            start_of(getattr(flags, "from"), *pair, int(flags.connector[-1]))
        steps = plan_steps(flags, all_pairs, {name: encoder.dim for name, encoder in data.encoders.items()}, row_count)
        if flags.halving:
            halving_rungs(len(pairs), steps)
    store = RowStore(data, images + texts, device)
    embeddings = data.fingerprint(images + texts)
    torch.set_float32_matmul_precision("high" if flags.precision == "tf32" else "highest")

    opened = []  # every seed's folder before the first trains, so that --resume finds them all
    for (own_flags, config), seed in zip(runs, flags.seeds):
        about = {"pairs": [":".join(pair) for pair in pairs], "embeddings": embeddings}
        about |= {"seed": config["seed"], "steps": config["steps"]} if config else {"seed": seed, "steps": steps}
        opened.append((own_flags, about, create_run(own_flags, config, about, device)))
    for flags, about, _ in opened:
        encoders = f"{len(images)} image and {len(texts)} text encoders"
        print(f"run: {flags.out}, seed {about['seed']}, {len(pairs)} pairs of {encoders}")
        train_rows, val_rows = split_for_training(data, about["seed"], flags.rows)
        retrieval = Retrieval(data, val_rows, device)
        state = run_groups(flags, about, pairs, store, retrieval, train_rows)
        export(flags, data, state, retrieval, len(train_rows))
        if flags.shard:
            merge_shards(flags, about, data, all_pairs, retrieval, len(train_rows), device)


def run_folder(flags, seed):
    several = f"-s{seed}" if len(flags.seeds) > 1 else ""
    return flags.out.with_name(flags.out.name + several + shard_suffix(flags))


def run_groups(flags, about, pairs, store, retrieval, train_rows):
    """Trains the pairs, --pairs-per-pass at a time, or solves them. What is finished stays in the checkpoint."""
    path = flags.out / "checkpoint.pt"
    saved = vlm.load_tensors(path) if path.is_file() else {"done": []}
    done, size = saved["done"], flags.pairs_per_pass or len(pairs)
    if flags.closed_form and not done:
        done.append(solve(flags, pairs, store, retrieval, train_rows))

    def checkpoint(state, tensors):
        save_tensors({"done": done, "state": state} | tensors, path)
        write_jsonl(flags.out / "metrics.jsonl", [line for each in [*done, state] for line in each["metrics"]])

    while sum(len(state["updates"]) for state in done) < len(pairs):
        group = pairs[size * len(done) :][:size]
        steps, seed = about["steps"], about["seed"]
        done.append(train(flags, seed, group, steps, store, retrieval, train_rows, saved, checkpoint))
        saved = {}
    save_tensors({"done": done}, path)
    return merge_states(done, pairs)


def export(flags, data, state, retrieval, row_count):
    """Writes each pair's best connector, ranking.csv, ledger.json and metrics.jsonl, and prints the ranking."""
    best, updates = state["best"], state["updates"]
    state["trainable_parameters"] = sum(t.numel() for pair in best.values() for layer in pair["layers"] for t in layer)
    write_jsonl(flags.out / "metrics.jsonl", state["metrics"])

    def connector_of(pair):
        return best[pair]["layers"], best[pair]["about"] | {"updates": updates[pair]}

    recalls = {pair: best[pair]["recalls"] for pair in best}
    ranked = rank_pairs(recalls, before=updates)  # halving: fewer updates, given up sooner
    paths = write_results(
        flags.out, data, ranked, connector_of, row_count if flags.closed_form else flags.batch_size, state
    )
    made = flags.closed_form or ("halving of the grid, " if flags.halving else "grid, ") + flags.connector
    if flags.halving:
        whole = max(updates.values()) * len(updates)
        made += f", {sum(updates.values()) / whole:.0%} of the full grid's updates"
    print_results(ranked, recalls, retrieval, made, state, paths[0])


def merge_shards(flags, about, data, pairs, retrieval, row_count, device):
    """Writes OUT from the n folders OUT-shard-i-of-n, once all of them are finished; else says which are not."""
    suffix, (_, count) = shard_suffix(flags), shard_of(flags)
    out = flags.out.with_name(flags.out.name.removesuffix(suffix))
    shards = [out.with_name(f"{out.name}-shard-{k}-of-{count}") for k in range(count)]
    missing = [shard.name for shard in shards if not (shard / "ledger.json").is_file()]
    if missing:
        print(f"\n{out} will hold all {len(pairs)} pairs once these are finished: {', '.join(missing)}")
        return
    configs = [vlm.read_json(shard / "config.json") for shard in shards]
    for shard, config in zip(shards, configs):
        ours = configs[0]["flags"] | {"shard": None, "out": None, "device": None}
        if config["flags"] | {"shard": None, "out": None, "device": None} != ours or config["steps"] != about["steps"]:
            raise BadInput(f"{shard}: was started with other flags than {shards[0]}; not merged into {out}")
    flags = argparse.Namespace(**vars(flags) | {"out": out, "shard": None})
    whole = {"pairs": [":".join(pair) for pair in pairs], "seed": about["seed"], "steps": about["steps"]}
    whole["embeddings"] = {name: digest for config in configs for name, digest in config["embeddings"].items()}
    config = vlm.read_json(out / "config.json") if (out / "config.json").is_file() else None
    lock = create_run(flags, config, whole, device, wait=True)  # noqa: F841  another shard may be merging
    if (out / "ledger.json").is_file():
        return
    states = [vlm.load_tensors(shard / "checkpoint.pt")["done"] for shard in shards]
    state = merge_states([state for done in states for state in done], pairs)
    save_tensors({"done": [state]}, out / "checkpoint.pt")
    print(f"\nall {count} shards are finished; merged into {out}")
    export(flags, data, state, retrieval, row_count)


if __name__ == "__main__":
    run_script(main)
