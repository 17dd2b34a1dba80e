"""Trains one hypernetwork that predicts the connector of every encoder pair, ranks the pairs, writes the connectors.

    python train_hyma.py --pairs all                                  # the embedded sample, ten seconds on two cores
    python train_hyma.py --pairs all --data embeddings/my             # your embeddings, made by embed.py
    python train_hyma.py --pairs "vit_*:mpnet" deit_b16:roberta --data embeddings/my --out runs/few
    python train_hyma.py --rows 1000 --data embeddings/my             # a first choice from a few rows
    python train_hyma.py --add-encoder vit_l16 --from runs/few        # trains only the new encoder's part
    python train_hyma.py --resume                                     # the newest run, after an interruption
    torchrun --nproc-per-node 4 train_hyma.py --data embeddings/my    # four processes, a GPU each where there are GPUs

Every step draws a mini-batch of rows and a few pairs of one text encoder, lets the hypernetwork predict those pairs'
connectors, and descends their mean symmetric InfoNCE loss (arXiv 2507.10015, section 3). Two hypernetworks: `factored`
(default) predicts a pair's weights from parts shared by all pairs of its text encoder and of its image encoder; `mlp`
is the paper's, an MLP from a pair code and a layer code to that layer's weights. `factored` starts from a closed form,
which is also cross-validated on training rows; the ranking combines these scores with those of the validation rows.
The pair that ranks first is handed over, so its connector is then trained further by itself.
On a random part of a corpus (embed.py --rows) it also predicts every pair's score on all rows, and prints which encoders
to embed these with (prediction.csv).
The processes of torchrun share each step's pairs, or its rows (--split rows), and add up their gradients.
Writes runs/<name>/: connectors/, ranking.csv, ledger.json, metrics.jsonl, config.json, checkpoint.pt.
"""

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import math
import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from hyma import closed_form, ranks
from hyma.adding import arrange_added_encoder, cards_of_base, check_same_as_base, flags_of_base, load_base_parts
from hyma.batches import Batches
from hyma.costs import flop_counter, step_flops, validation_flops
from hyma.embeddings import Embeddings, RowStore
from hyma.files import write_jsonl
from hyma.graphs import check_graph, record_steps
from hyma.grid_state import COSTS
from hyma.hypernetworks import HYPERNETWORKS, build_hypernetwork
from hyma.machine import peak_bytes
from hyma.metrics import Retrieval, mean_recalls
from hyma.pair_names import name_of_row, pair_name, pair_of_name
from hyma.pairs import Pairs, arrange_pairs, count_sets, draw_pairs, group_by_text, images_of
from hyma.printed_ranking import print_results
from hyma.ranking import expected_recall, rank_pairs, recall_columns
from hyma.refinement import refine, refinement_steps
from hyma.runs import Checkpoints, find_run, is_finished, write_results
from hyma.settled import is_settled
from hyma.shortlist import advise
from hyma.signals import Signals
from hyma.training import (
    Schedule,
    StepLosses,
    build_adamw,
    check_ranks_share,
    check_weights,
    choose_matmul_precision,
    count_step,
    load_moments,
    losses_on_ranks,
    mean_recall10,
    metrics_line,
    moments_of,
    open_data,
    open_run_folder,
    progress_line,
    resumed_line,
    split_for_training,
    training_dtype,
    update_weights,
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
from kernels import adamw_outer, outer_grad_norm_sq
from vlm import BadInput, pick_device, read_json

VALIDATIONS = 2  # per run, each of all pairs and with a checkpoint: at the end and, if it costs little, half way
MOST_SHARE = 1 / 20  # of the FLOPs of the steps, for these together
VALIDATIONS_TO_STOP = 10  # with --stop-when-stable


def parse_flags():
    """(flags, config.json of the run that --resume names, else None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_training_flags(parser, "hyma")
    add("--predict", nargs="+", default=[], metavar="IMAGE:TEXT", help="pairs to predict, score and export untrained")
    about = "how weights are predicted (default: %(default)s)"
    add("--generator", choices=list(HYPERNETWORKS), default="factored", help=about)
    add("--width", type=int, help="hidden width of the mlp generator; the paper's is 512 (default: 128)")
    add(
        "--rank",
        type=int,
        help="axes of each image encoder's space that factored works in (default: 256; from 3,072 rows 384, from 16,384 512)",
    )
    add(
        "--pairs-per-step",
        type=int,
        help="pairs per step, of one text encoder (default: a third of its pairs; from 32,768 rows, half; mlp: all)",
    )
    add("--lr", type=float, help="peak learning rate (default: factored 1e-3 on 16,384 rows, less on fewer, up to 2e-3 on more; mlp 1e-3)")
    about = "steps that the pair ranked first is trained further by itself, at four times --lr (default: half the schedule or fewer, "
    about += "from 32,768 rows a third; 0: none)"
    add("--refine-steps", type=int, metavar="N", help=about)
    about = "end the search once three of its ten validations rank the pairs alike (default: train every epoch)"
    add("--stop-when-stable", action="store_true", help=about)
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
        kept = flags_of_base(flags.from_run)
        flags = parse_with_defaults(parser, kept)
        check_same_as_base(flags, kept)
    check_training_flags(flags, "width", "rank", "pairs_per_step")
    check_seeds("--seed", [flags.seed])
    if flags.refine_steps is not None and flags.refine_steps < 0:
        raise BadInput(f"--refine-steps {flags.refine_steps}: must not be negative")
    for name in ("width", "rank"):
        value = getattr(flags, name)
        if value is not None and name != HYPERNETWORKS[flags.generator].size:
            raise BadInput(f"--{name} {value}: contradicts --generator {flags.generator}, which has none")
    return flags, None


def resolve_flags(flags, device, row_count, pairs):
    """A copy of the flags with numbers for those whose default depends on the data, so that config.json holds them."""
    kind, epochs = HYPERNETWORKS[flags.generator], flags.epochs
    flags = resolve_training_flags(flags, "hyma", device, row_count)
    if epochs is None:
        flags.epochs = math.ceil(flags.epochs * kind.share_of_epochs(row_count, hidden_layers_of(flags)))
    default_pairs_per_step = len(pairs.image_names) * kind.share_of_images(row_count)
    if flags.add_encoder:  # of the pairs that a whole run has per step, the added encoder's share
        share_of_pairs = Fraction(len(pairs.trained), len(pairs.trained + pairs.untrained))
        default_pairs_per_step = max(1, math.floor(default_pairs_per_step * share_of_pairs))
    most = max(map(len, group_by_text(pairs.trained).values()))  # a step has the pairs of one text encoder
    flags.pairs_per_step = min(flags.pairs_per_step or math.ceil(default_pairs_per_step), most)
    for name, default in kind.defaults.items():
        value = getattr(flags, name) or (default(row_count) if callable(default) else default)
        setattr(flags, name, value)
    if flags.rank:
        flags.rank = min(flags.rank, row_count)
    if flags.refine_steps is None:
        steps = flags.epochs * (row_count // flags.batch_size)
        flags.refine_steps = refinement_steps(steps, len(pairs.trained + pairs.untrained), row_count)
    return flags


# -------------------------------------------------------------------------------------------- what is trained, and on what


class Inputs(NamedTuple):
    """What a run trains on and chooses by."""

    data: Embeddings
    pairs: Pairs
    train_rows: Tensor  # indices
    val_rows: Tensor
    vectors: RowStore
    retrieval: Retrieval  # of the validation rows


class Learner(NamedTuple):
    """A hypernetwork and what trains it."""

    generator: nn.Module
    optimizer: torch.optim.Optimizer
    moments: list  # of `head`, [] where every gradient is formed (`Hypernetwork.outer_moments`)
    schedule: Schedule


def open_inputs(flags, typed, resumed_config, device):
    """(the Inputs of the flags, the flags with numbers for all that follows from these). Others: see `open_run_folder`."""
    data, chosen_pairs = open_data(flags, flags.out, typed, resumed_config)
    if flags.add_encoder:
        pairs = arrange_added_encoder(flags.add_encoder, Path(flags.from_run), data)
    else:
        pairs = arrange_pairs(flags, data, chosen_pairs)
    train_rows, val_rows = split_for_training(data, flags.seed, flags.rows)
    flags = resolve_flags(flags, device, len(train_rows), pairs)
    check_ranks_share(flags, pairs.trained)
    encoders = f"{len(pairs.image_names)} image and {len(pairs.text_names)} text encoders"
    per_step = "1 pair" if flags.pairs_per_step == 1 else f"{flags.pairs_per_step} pairs"
    print(f"pairs: {len(pairs.trained)} of {encoders}, {per_step} per step")
    if flags.split == "pairs" and flags.pairs_per_step < ranks.count():
        print(f"{ranks.count()} processes: more than pairs per step; more work at --split rows or a larger --pairs-per-step")
    vectors = RowStore(data, pairs.image_names + pairs.text_names, device)
    retrieval = validation_retrieval(data, train_rows, val_rows, device)
    return Inputs(data, pairs, train_rows, val_rows, vectors, retrieval), flags


def lock_run_folder(flags, typed, resumed_config, inputs, device):
    """`open_run_folder` of these inputs."""
    data, pairs, train_rows, val_rows, *_ = inputs
    must_match = what_must_match(data, pairs.trained, pairs.image_names + pairs.text_names)
    run_info = describe_run(flags, f"hyma {flags.generator}", False, train_rows, val_rows) | {"seed": flags.seed}
    return open_run_folder(flags, typed, resumed_config, must_match, run_info, device)


def build_learner(flags, inputs, device):
    """The Learner at random weights, but for the parts of the run that an encoder is added to."""
    torch.manual_seed(flags.seed)
    pairs, dims = inputs.pairs, inputs.vectors.dims
    image_dims = {name: dims[name] for name in pairs.image_names}
    text_dims = {name: dims[name] for name in pairs.text_names}
    generator = build_hypernetwork(flags, image_dims, text_dims).to(device)
    if pairs.base_state:
        load_base_parts(generator, pairs.base_state)
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    steps = flags.epochs * (len(inputs.train_rows) // flags.batch_size)
    schedule = Schedule(steps, flags.lr, flags.warmup_steps, flags.weight_decay, device)
    return Learner(generator, build_adamw(parameters, flags), generator.outer_moments(), schedule)


# --------------------------------------------------------------------------------------------------- where training starts


def new_state(pairs):
    """All that the loop changes besides the tensors, as a checkpoint stores it. FLOPs as `write_results` has them."""
    return {
        "step": 0,
        "flops": 0,
        "start_flops": 0,
        "step_flops": 0,
        "logit_flops": 0,
        "seconds": 0.0,
        "updates": {pair_name(pair): 0 for pair in pairs.untrained + pairs.trained},
        "fold_recalls": {},  # cross-validated scores of the closed form, see `cross_validate`
        "fold_rows": 0,  # of one fold
        "fold_pairs": pairs.base_state["fold_pairs"] if pairs.base_state else len(pairs.scored),  # by which folds have their sizes
        "losses": [],  # of the steps since the last validation
        "metrics": [],  # lines of metrics.jsonl
        "best": None,  # the best validation: score, epoch, recalls, weights
        "settled_at": None,  # the step at which --stop-when-stable has ended the search
        "refined": pairs.base_state["refined"] if pairs.base_state else {},  # connectors of the base run, see `refine`
        "of_base": cards_of_base(pairs.base_state) if pairs.base_state else {},  # what their cards say, as they stay what they are
    }


def start_from_closed_form(generator, store, folds, data, pairs, added):
    """Starts the parts of all encoders, or of the added one. Returns the cross-validated scores of the scored pairs
    (`cross_validate`)."""
    image_names = images_of(pairs.scored)
    # The texts of an added encoder do not span the shared space: it stays that of the base run.
    spanned_by = [text for text in generator.text_names if text != added]
    space = closed_form.make_shared_space(
        store, folds, image_names, generator.text_names, generator.shared_width, spanned_by
    )
    if added:
        generator.initialise_added_encoder(added, space)
    else:
        generator.initialise_from_closed_form(space)
    return closed_form.cross_validate(space, folds, data, pairs.scored)


def start_training(flags, inputs, generator):
    """(the state before the first step, the store that the loop trains on): the generator's parts are set to the closed form,
    or stay the random weights that they are. What that costs is in the state. The first rank does it for all."""
    data, pairs, train_rows, _, vectors, _ = inputs
    state = new_state(pairs)
    with flop_counter() as counter:
        if generator.starts_from_closed_form and ranks.is_first():
            folds = closed_form.fold_rows(data, train_rows, flags.seed, state["fold_pairs"], generator.held_out_rows)
            state["fold_recalls"] = start_from_closed_form(generator, vectors, folds, data, pairs, flags.add_encoder)
            state["fold_rows"] = len(folds[0])
        generator.load_state_dict(ranks.from_first(generator.state_dict))
        store = project_store(flags, inputs, generator)
    if pairs.base_state:
        state["fold_recalls"] |= pairs.base_state["fold_recalls"]
    state["start_flops"] = state["flops"] = counter.get_total_flops()
    return ranks.from_first(lambda: state), store


def resume_training(flags, inputs, learner, saved):
    """The same where a checkpoint was saved: (its state, the store). Its tensors are loaded."""
    if saved["state"].keys() != new_state(inputs.pairs).keys():
        raise BadInput(f"--resume: {flags.out} was started by an earlier version of train_hyma.py; start it again")
    generator, optimizer, moments, _ = learner
    generator.load_state_dict(saved["generator"])
    load_moments(optimizer, saved["optimizer"])
    for moment, saved_moment in zip(moments, saved["moments"]):
        moment.copy_(saved_moment)
    return saved["state"], project_store(flags, inputs, generator)


def project_store(flags, inputs, generator):
    """The store with image vectors in the space that the generator's connectors end in, k coordinates for D."""
    rows = torch.cat([inputs.train_rows, inputs.val_rows])
    return generator.project_images(inputs.vectors, images_of(inputs.pairs.scored), rows, training_dtype(flags.precision))


# ------------------------------------------------------------------------------------------------------------- training


def train(flags, inputs, learner, store, state, checkpoints, started):
    """Trains from the state on to the end of the schedule, or until the ranking has settled (--stop-when-stable). state["best"]
    has the weights that validate best. started: the time at which the run would have begun without interruptions."""
    pairs, retrieval = inputs.pairs, inputs.retrieval
    generator, optimizer, moments, schedule = learner
    dtype = training_dtype(flags.precision)
    choose_matmul_precision(flags.precision)
    validations = count_validations(flags, generator, retrieval, pairs, schedule.steps, store.dims)
    validation_period = math.ceil(flags.epochs / validations) * (schedule.steps // flags.epochs)
    take_step = partial(train_step, generator, optimizer, moments, store, dtype, flags)
    if flags.graph:
        take_step = record_steps(take_step, inputs.vectors, count_sets(pairs.trained, flags.pairs_per_step))

    batches = Batches(inputs.vectors, flags.seed, inputs.train_rows, flags.batch_size)
    step_losses = StepLosses(state["losses"])
    progress = tqdm(total=schedule.steps, initial=state["step"], desc="train", unit="step", postfix=progress_line(state))
    with progress, Signals() as signals:
        for step in range(state["step"], state["settled_at"] or schedule.steps):
            # A batch of rows and of pairs, and the step that they make.
            rows = batches.rows_of(step)  # [B]
            batch_pairs = draw_pairs(step, flags.seed, pairs.trained, flags.pairs_per_step)
            if flags.graph:
                batch_pairs = sorted(batch_pairs)  # a graph for each set, in whichever order it is drawn
            losses = take_step(batch_pairs, rows, schedule.numbers(step))  # [P]
            if step_losses.add(step, batch_pairs, losses):
                progress.set_postfix(progress_line(state), refresh=False)

            count_step(state, generator, store, flags.batch_size, batch_pairs)
            state["seconds"] = time.perf_counter() - started
            progress.update()

            # A checkpoint is saved after a validation, after a minute without one, and on a signal.
            is_validation = (step + 1) % validation_period == 0 or step + 1 == schedule.steps
            if not is_validation:
                if signals.arrived_anywhere(step, checkpoints.due()):
                    step_losses.read()
                    save_checkpoint(checkpoints, learner, state)
                    signals.leave_if_asked()
                continue
            step_losses.read()
            recalls = validate_on_ranks(generator, store, retrieval, pairs.scored, ranks.share(pairs.scored))
            state["seconds"] = time.perf_counter() - started
            for message in note_validation(flags, inputs, learner, state, recalls):
                progress.write(message)
            progress.set_postfix(progress_line(state))
            signals.arrived_anywhere()
            save_checkpoint(checkpoints, learner, state)
            if ranks.is_first():
                write_jsonl(flags.out / "metrics.jsonl", state["metrics"])
            signals.leave_if_asked()
            if state["settled_at"]:
                break
    batches.close()


def count_validations(flags, generator, retrieval, pairs, steps, dims):
    """How often a run of so many steps validates all pairs. dims: {encoder: width of its vectors in the loss}."""
    if flags.stop_when_stable:
        return VALIDATIONS_TO_STOP
    pairs_of_step = draw_pairs(0, flags.seed, pairs.trained, flags.pairs_per_step)
    of_steps = steps * step_flops(generator, flags.batch_size, pairs_of_step, dims)["flops"]
    of_one = validation_flops(generator, retrieval, pairs.scored, dims)
    return max(1, min(VALIDATIONS, int(MOST_SHARE * of_steps / of_one)))


def train_step(generator, optimizer, moments, store, dtype, flags, pairs, rows, numbers):
    """One step of these pairs on a batch of rows [B]: their connectors, their mean loss, the update. Returns their losses [P].
    A CUDA graph can record it (`hyma.graphs`). numbers [5]: of the step (`Schedule`)."""
    mine = ranks.share(pairs) if flags.split == "pairs" else pairs
    losses = losses_on_ranks(generator, store, rows, pairs, mine, dtype, flags)
    if mine:
        losses.mean().backward()
    sum_gradients_of_step(generator, moments, mine, pairs, flags.split)
    clip_and_update(generator, optimizer, moments, numbers, flags)
    return losses.detach()


def sum_gradients_of_step(generator, moments, mine, batch_pairs, split):
    """Makes the gradients of this rank's pairs, or rows, those of the whole step. mine: this rank's of the step's pairs.
    moments: see `clip_and_update`."""
    ranks.sum_gradients(list(generator.parameters()))
    if ranks.count() == 1 or not moments:
        return
    if split == "rows":  # the gradient of the outputs is a sum over rows, and the inputs are the same on all ranks
        grad_out, inputs = generator.outer
        generator.outer = ranks.sum_over_ranks(grad_out), inputs
        return
    factors = generator.outer
    if not mine:
        size, width = generator.head.shape
        factors = generator.head.new_zeros(0, size), generator.head.new_zeros(0, width)
    most_rows = math.ceil(len(batch_pairs) / ranks.count()) * (generator.hidden_layers + 1)  # of a rank, a row for each layer
    generator.outer = tuple(ranks.gather_rows(factor, most_rows) for factor in factors)


def clip_and_update(generator, optimizer, moments, numbers, flags):
    """One AdamW step, clipped by one global gradient norm, which includes the gradient of `head` that is never formed.

    moments: of `head`, [] where every gradient is formed (`Hypernetwork.outer_moments`). numbers [5]: of this step (`Schedule`).
    """
    parameters = [parameter for parameter in generator.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if moments:
        grad_out, inputs = generator.outer
        norm = (norm.double() ** 2 + outer_grad_norm_sq(grad_out, inputs)).sqrt().float()
    nn.utils.clip_grads_with_norm_(parameters, flags.clip_norm, norm)
    update_weights(optimizer, numbers)
    if moments:
        clip = (flags.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        decay = flags.weight_decay
        adamw_outer(generator.head, *moments, grad_out, inputs, numbers=numbers, weight_decay=decay, clip=clip)


def note_validation(flags, inputs, learner, state, recalls):
    """Adds a validation to the state: these weights if they are the best so far, a line of metrics.jsonl, and whether the ranking
    has settled (--stop-when-stable). recalls: of `validate`. Returns what there is to say, lines."""
    pairs, steps = inputs.pairs, learner.schedule.steps
    of_trained = {pair_name(pair): recalls[pair_name(pair)] for pair in pairs.trained}  # pairs of --predict choose nothing
    score = mean_recall10(of_trained)
    if pairs.base_state:
        recalls = pairs.base_state["best"]["recalls"] | recalls
    epoch = round(state["step"] / steps * flags.epochs)
    collapse = keep_best(state, learner.generator, score, epoch, recalls, inputs.retrieval.chance[2])
    messages = [collapse] if collapse else []
    rate = learner.schedule.rate(state["step"] - 1)
    state["metrics"].append(metrics_line(state, epoch, rate, score, recalls))
    state["losses"].clear()
    left = steps - state["step"]
    if flags.stop_when_stable and left and is_settled(state["metrics"], of_trained):
        state["settled_at"] = state["step"]
        messages.append(f"epoch {epoch}: the ranking has settled; {left} of {steps} steps are left out")
    return messages


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


def save_checkpoint(checkpoints, learner, state, **more):
    """Saves all that a run needs to resume, if its weights are sound. All ranks call it; the first writes."""
    generator, optimizer, moments, _ = learner
    check_weights(generator.state_dict(), state["step"])
    if ranks.is_first():
        tensors = {"generator": generator.state_dict(), "optimizer": moments_of(optimizer), "moments": moments}
        checkpoints.save(tensors | {"state": state} | more)
    ranks.wait()  # a rank that ends before the first has saved would end it too


# ------------------------------------------------------------------------------------------------- what is handed over


def refine_chosen(flags, inputs, learner, state, chosen, checkpoints, saved):
    """Trains the chosen pair further by itself. Returns the state of `refine`, whose cost is in the run's too; None if there is
    nothing to train. saved: the refinement of the checkpoint, else None."""
    name = pair_name(chosen)
    if not flags.refine_steps or name in state["refined"]:
        return None

    def save_refinement(refinement, force):
        if force or checkpoints.due():
            check_weights(refinement["connectors"], refinement["state"]["step"])
            save_checkpoint(checkpoints, learner, state, refinement=refinement)

    recalls = state["best"]["recalls"][name]
    parts = learner.generator, recalls, inputs.vectors, inputs.retrieval, inputs.train_rows
    refined = refine(flags, chosen, *parts, saved, save_refinement)
    for key in COSTS:
        state[key] += refined[key]
    state["step"] += refined["step"]
    state["updates"][name] += refined["step"]
    return refined


def rank_best(state, retrieval):
    """The rows of ranking.csv for the best state, best pair first, with the score that is expected of each pair if there is
    one (`expected_recall`)."""
    recalls = state["best"]["recalls"]
    rows_ratio = state["fold_rows"] / retrieval.query_rows
    expected = expected_recall(recalls, state["fold_recalls"], rows_ratio)
    ranking = rank_pairs(recalls, before=expected)
    if expected:
        for row in ranking:
            row["expected_recall"] = expected[name_of_row(row)]
    return ranking


def export(flags, inputs, generator, state, ranking, refined):
    """Writes the connectors of the generator, which has the best weights by now, and in place of the chosen pair's the
    refined one; ranking.csv and ledger.json. Prints the ranking. refined: the state of `refine`, or None."""
    best, retrieval = state["best"], inputs.retrieval
    write_jsonl(flags.out / "metrics.jsonl", state["metrics"])
    state["trainable_parameters"] = count_trainable(generator)
    refined_pairs = state["refined"] | (refined["best"] if refined else {})

    def connector_of(name):
        card_info = {
            "generator": flags.generator,
            "logit_scale": flags.logit_scale,
            "seed": flags.seed,
            "epoch": best["epoch"],
            "updates": state["updates"][name],
            "val_rows": retrieval.query_rows,
            "val_candidates": len(retrieval.rows),
        }
        card_info |= state["of_base"].get(name, {})
        if name in refined_pairs:  # its card has its own recalls; those of the predicted connector have ranked it
            pair_best = refined_pairs[name]
            return pair_best["layers"], card_info | recall_columns(pair_best["recalls"]) | pair_best["about"]
        return generator.predict(*pair_of_name(name)), card_info

    paths = write_results(flags.out, inputs.data, ranking, connector_of, flags.batch_size, state)
    description = f"{flags.generator} {flags.connector}, epoch {best['epoch']} of {flags.epochs}"
    print_results(ranking, best["recalls"], retrieval, description, state, paths[0])
    for name, pair_best in refined_pairs.items():
        before, after = mean_recalls(best["recalls"][name]), mean_recalls(pair_best["recalls"])
        changes = (
            f"R@1 {100 * before[0]:.1f} -> {100 * after[0]:.1f}, R@10 {100 * before[2]:.1f} -> {100 * after[2]:.1f}"
        )
        print(f"refined: {name}, {pair_best['about']['refinement_steps']} steps by itself: {changes}")


def count_trainable(generator):
    """How many numbers of the generator are trained."""
    count = 0
    for parameter in generator.parameters():
        if parameter.requires_grad:
            count += parameter.numel()
    for first_moment in generator.outer_moments()[:1]:  # as large as the weight that it belongs to
        count += first_moment.numel()
    return count


def main():
    flags, resumed_config = parse_flags()
    typed = recorded_flags(flags)
    device = pick_device(ranks.rank_device(flags.device))
    check_graph(flags.graph, device)

    # The data: rows to train on and to choose by, and the pairs. The hypernetwork and its optimiser.
    inputs, flags = open_inputs(flags, typed, resumed_config, device)
    lock = lock_run_folder(flags, typed, resumed_config, inputs, device)  # noqa: F841  held until the end
    learner = build_learner(flags, inputs, device)

    # Training starts at the closed form, at random weights, or at a checkpoint.
    checkpoints = Checkpoints(flags.out)
    started = time.perf_counter()
    saved = ranks.from_first(lambda: checkpoints.load("generator", "optimizer", "moments", "state"))
    was_finished = saved and is_finished(flags.out)  # also where the base run has refined the chosen pair
    refinement = saved.get("refinement") if saved else None
    if saved:
        state, store = resume_training(flags, inputs, learner, saved)
        done = state["step"] + (refinement["state"]["step"] if refinement else 0)
        print(resumed_line(flags.out, done, done if was_finished else learner.schedule.steps + flags.refine_steps))
    else:
        state, store = start_training(flags, inputs, learner.generator)
    started -= state["seconds"]  # as if the seconds before an interruption had passed in this process
    train(flags, inputs, learner, store, state, checkpoints, started)
    if not ranks.leave():  # what follows is the first rank's
        return

    # The pair that ranks first is trained further by itself, and all connectors are written.
    learner.generator.load_state_dict(state["best"]["weights"])
    ranking = rank_best(state, inputs.retrieval)
    chosen = pair_of_name(name_of_row(ranking[0]))
    refined = refine_chosen(flags, inputs, learner, state, chosen, checkpoints, refinement)
    # Of a finished run, the memory of the process that trained.
    state["peak_bytes"] = read_json(flags.out / "ledger.json")["peak_bytes"] if was_finished else peak_bytes(device)
    export(flags, inputs, learner.generator, state, ranking, refined)

    # Of a part of a corpus: which encoders are worth embedding all of it with.
    pairs = inputs.pairs.trained + inputs.pairs.untrained
    advise(flags.out, inputs.data, inputs.vectors, pairs, inputs.train_rows, inputs.val_rows, flags.seed)


if __name__ == "__main__":
    ranks.run_on_ranks(main)
