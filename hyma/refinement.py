"""The connector that is handed over, trained further by itself.

A search trains all pairs as far as it takes to rank them; only the pair that it chooses has to be trained to the end. That
pair's predicted connector becomes one that shares no weights, and has a schedule of its own. It still ends in coordinates
along the axes that the search works in: in the image encoder's whole space, several times as wide, training costs twice as
much and delivers no more (NOTES.md). Weights between the predicted ones and the last ones are better than either (Wortsman et
al., arXiv 2109.01903), so these are tried too. Of all its states the one with the largest sum of recalls is kept (R@1, 5 and
10 of both directions, "rsum").
"""

import math
import time
from functools import partial

import torch
from tqdm import tqdm

from hyma.batches import Batches
from hyma.costs import flop_counter
from hyma.free_connectors import FreeConnectors, train_step
from hyma.graphs import record_steps
from hyma.grid_state import keep_best, new_state
from hyma.pair_names import pair_name
from hyma.signals import Signals
from hyma.training import (
    Schedule,
    StepLosses,
    build_adamw,
    count_step,
    load_moments,
    moments_of,
    training_dtype,
    validate,
)
from vlm import BadInput

VALIDATIONS = 4  # of the pair, at equal distances
MOST_SHARE = 1 / 50  # of the updates that training every pair over the whole schedule takes
RATE = 4  # times that of the search: weights in between gain from going further
SHARES = (0.25, 0.5, 0.75)  # of the way from the predicted to the last weights


def refinement_steps(steps, pair_count, row_count):
    """Half of a schedule of `steps`, from 32,768 training rows on a third, or fewer where the pairs are so few that this is much
    of what a grid search costs."""
    of_schedule = steps // 2 if row_count < 32768 else steps // 3
    return min(of_schedule, int(MOST_SHARE * steps * pair_count))


def refine(flags, pair, generator, recalls, vectors, retrieval, train_rows, saved, save_checkpoint):
    """Trains the pair's connector for flags.refine_steps. Returns a state (`hyma.grid_state`), whose `best` has the layers,
    as they are exported, that score best on the validation rows, the predicted ones among them.

    generator: the Hypernetwork that has predicted it. recalls: the six recalls of that. vectors: a RowStore. saved: what
    save_checkpoint was last given by an interrupted run, else None. save_checkpoint(refinement, force): saves it now, or
    only if it is time to.
    """
    if saved and saved.get("is_finished"):  # by an earlier start of the same command
        return saved["state"]
    pairs, name = [pair], pair_name(pair)
    image, _ = pair
    dtype = training_dtype(flags.precision)
    started = time.perf_counter()
    with flop_counter() as counter:
        rows = torch.cat([train_rows, retrieval.rows]).unique()  # the distractors of a validation are training rows
        store = generator.project_images(vectors, [image], rows, dtype)
    layers = generator.predict_projected(*pair)
    connectors = FreeConnectors(pairs, store.dims, len(layers) - 1, flags.seed).to(store.device)
    optimizer = build_adamw(connectors.parameters(), flags)
    if saved:
        shapes = {name: tensor.shape for name, tensor in connectors.state_dict().items()}
        if {name: tensor.shape for name, tensor in saved["connectors"].items()} != shapes:
            raise BadInput(f"--resume: {flags.out} was started by an earlier version of train_hyma.py; start it again")
        connectors.load_state_dict(saved["connectors"])
        load_moments(optimizer, saved["optimizer"])
        state = saved["state"]
    else:
        connectors.load(pair, layers)
        state = new_state(pairs)
        state["start_flops"] = state["flops"] = counter.get_total_flops()
        keep_best(state, name, recalls, generator.lift(image, layers), {"refinement_steps": 0}, key=sum)
    steps = flags.refine_steps
    warmup_steps = min(flags.warmup_steps, steps // 4)
    schedule = Schedule(steps, RATE * flags.lr, warmup_steps, flags.weight_decay, store.device)
    validation_period = math.ceil(steps / VALIDATIONS)
    started -= state["seconds"]  # as if all had passed in this process

    def checkpoint():
        return {"state": state, "connectors": connectors.state_dict(), "optimizer": moments_of(optimizer)}

    take_step = partial(train_step, connectors, optimizer, store, dtype, flags)
    if flags.graph:
        take_step = record_steps(take_step, vectors, sets=1)

    batches = Batches(vectors, f"{flags.seed}, refinement", train_rows, flags.batch_size)
    step_losses = StepLosses([])

    progress = tqdm(total=steps, initial=state["step"], desc=f"refine {name}", unit="step")
    with progress, Signals() as signals:
        for step in range(state["step"], steps):
            rows = batches.rows_of(step)  # [B]
            losses = take_step(pairs, rows, schedule.numbers(step))  # [1]
            step_losses.add(step, pairs, losses)

            count_step(state, connectors, store, flags.batch_size, pairs)
            progress.update()

            is_validation = (step + 1) % validation_period == 0 or step + 1 == steps
            if is_validation:
                step_losses.read()
                six = validate(connectors, store, retrieval, pairs)[name]
                trained = generator.lift(image, connectors.predict(*pair))
                keep_best(state, name, six, trained, {"refinement_steps": step + 1}, key=sum)
            state["seconds"] = time.perf_counter() - started
            save_checkpoint(checkpoint(), force=signals.arrived())
            signals.leave_if_asked()
    batches.close()
    try_weights_between(state, connectors, pair, generator, store, retrieval)
    state["seconds"] = time.perf_counter() - started
    save_checkpoint(checkpoint() | {"is_finished": True}, force=True)
    return state


def try_weights_between(state, connectors, pair, generator, store, retrieval):
    """Keeps weights between those that the generator predicts and those of the connectors if they score better. The connectors
    stay as they are."""
    predicted = generator.predict_projected(*pair)
    last = [(weight.detach().clone(), bias.detach().clone()) for weight, bias in connectors.predict(*pair)]
    for share in SHARES:
        between = []
        for (weight, bias), (last_weight, last_bias) in zip(predicted, last):
            between.append((torch.lerp(weight, last_weight, share), torch.lerp(bias, last_bias, share)))
        connectors.load(pair, between)
        six = validate(connectors, store, retrieval, [pair])[pair_name(pair)]
        about = {"refinement_steps": state["step"], "refinement_share": share}
        keep_best(state, pair_name(pair), six, generator.lift(pair[0], between), about, key=sum)
    connectors.load(pair, last)
