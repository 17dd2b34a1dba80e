"""The flags of both trainers: added, checked, resolved against the data, recorded in config.json, resumed from there."""

import argparse
import math
import sys
import time
from pathlib import Path

from hyma import ranks
from hyma.embeddings import SAMPLE
from hyma.merging import Folders, as_folders
from hyma.runs import interrupted_run, is_run, without_seed
from vlm import BadInput, read_json


def add_training_flags(parser, name):
    """The flags that mean the same to every trainer. Runs go to runs/<name>-... by default."""
    add = parser.add_argument
    about = "all, vit_l16:mpnet, wildcards, or several of these (default: all)"
    add("--pairs", nargs="+", default=["all"], metavar="IMAGE:TEXT", help=about)
    about = "embedding folder, or several that hold encoders of the same rows (default: the sample's)"
    add("--data", nargs="+", type=Path, action=Folders, metavar="FOLDER", help=about)
    add("--out", type=Path, help=f"run folder (default: runs/{name}-<date>-<time>)")
    add(
        "--resume",
        action="store_true",
        help="resume the run in --out, or the newest, with the flags it was started with",
    )
    about = "hidden layers of 1024 (default: %(default)s)"
    add("--connector", choices=["mlp0", "mlp1", "mlp2"], default="mlp1", help=about)
    default = "10, or as many as make 100 steps"
    if name == "hyma":
        default = "as many as grid search's, 10 or what makes 100 steps; below 16,384 rows fewer, to a half; mlp0: half of these"
    add("--epochs", type=int, help=f"passes over the training rows (default: {default})")
    add("--rows", type=int, help="use only N rows of the folder, drawn by the seed (default: all)", metavar="N")
    add("--batch-size", type=int, help="rows per step (default: 512, or all there are)")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up; a cosine follows (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's (default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add(
        "--logit-scale",
        type=float,
        help="factor on the cosines, 1 to 150 (default: 20; from 2,000 rows more, at most 60)",
    )
    about = "of the matrix products (default: tf32 on CUDA, else fp32)"
    add("--precision", choices=["fp32", "tf32", "bf16"], help=about)
    about = "what the processes of torchrun share: a step's pairs, or its rows (default: %(default)s)"
    add("--split", choices=["pairs", "rows"], default="pairs", help=about)
    about = "replay each step as a CUDA graph (a GPU, one process; not yet measured)"
    add("--graph", action="store_true", help=about)
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")


def check_training_flags(flags, *positive):
    """Raises BadInput for a number out of its range. `positive`: further flags that must be above zero."""
    for name in ("rows", "epochs", "batch_size", "lr", "clip_norm", *positive):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
    if flags.logit_scale is not None and not 1 <= flags.logit_scale <= 150:
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
    if row_count < 2:
        source = f"--rows {flags.rows}" if flags.rows else " ".join(map(str, as_folders(flags.data)))
        raise BadInput(f"{source}: leaves one row to train on, and a contrastive loss needs at least two")
    if row_count < flags.batch_size:
        folders = " ".join(map(str, as_folders(flags.data)))
        raise BadInput(f"--batch-size {flags.batch_size}: {folders} has only {row_count} training rows")
    if flags.out is None:
        new = Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
        flags.out = Path(ranks.from_first(lambda: str(interrupted_run(typed) or new)))
        if len(getattr(flags, "seeds", [])) > 1:  # a folder each, of which the interrupted one is one
            flags.out = without_seed(flags.out)
    flags.epochs = flags.epochs or max(10, math.ceil(100 / (row_count // flags.batch_size)))
    flags.logit_scale = flags.logit_scale or logit_scale_of(row_count)
    flags.precision = flags.precision or ("tf32" if device.type == "cuda" else "fp32")
    return flags


def logit_scale_of(row_count):
    """The factor on the cosines: 20 up to 2,000 training rows, from there on it grows with their square root, to
    60, the largest that was measured (NOTES.md). The more rows, the finer the differences that connectors can learn."""
    return min(60.0, max(20.0, round(20 * math.sqrt(row_count / 2000), 1)))


# {name in the namespace: name on the command line and in config.json}; `from` cannot be a Python name.
RECORDED_NAMES = {"from_run": "from"}


def recorded_flags(flags):
    """{name: value} of the flags, as config.json holds them: without those that may differ where a run is resumed."""
    recorded = {}
    for name, value in vars(flags).items():
        if name not in ("resume", "split", "graph"):
            recorded[RECORDED_NAMES.get(name, name)] = as_recorded(value)
    return recorded


def as_recorded(value):
    """A flag's value as JSON has it: paths are texts."""
    if isinstance(value, tuple):
        return list(map(as_recorded, value))
    return str(value) if isinstance(value, Path) else value


def parse_with_defaults(parser, recorded):
    """The flags, with the recorded ones of another run as defaults, which a flag that is typed now replaces."""
    defaults = dict(recorded)
    for name, recorded_name in RECORDED_NAMES.items():
        if recorded_name in defaults:
            defaults[name] = defaults.pop(recorded_name)
    parser.set_defaults(**defaults)
    flags = parser.parse_args()
    folders = as_folders(flags.data)
    flags.data = folders[0] if len(folders) == 1 else tuple(folders)
    return flags


def parse_resumed_flags(parser, out):
    """(flags, config.json) of the run in `out`; flags typed now may not contradict them."""
    if not is_run(out):
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


# -------------------------------------------------------------------------------------- what a run says about its method

# Flags that may differ between runs of one method: places, data, pairs, hardware, memory, seed.
NOT_PART_OF_METHOD = {"seed", "seeds", "out", "data", "device", "precision", "pairs", "pairs_per_pass"}


def describe_run(flags, kind, full_grid, train_rows, val_rows):
    """The run_info of `create_run` but for the seed. kind: the first words of the method's name."""
    hidden_layers = hidden_layers_of(flags)
    method = f"{kind} mlp{hidden_layers}"
    budget_of = getattr(flags, "budget_of", "full")
    if budget_of != "full":
        method += f", FLOPs of {Path(budget_of).name}"
    if flags.from_run:
        method += f", from {Path(flags.from_run).name}"
    if flags.rows:
        method += f", {flags.rows} rows"
    return {
        "method": method,
        "recipe": recipe_of(flags),
        "full_grid": full_grid,
        "hidden_layers": hidden_layers,
        "rows": {"train": len(train_rows), "val": len(val_rows)},
        "starts_from": flags.from_run,
    }


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
