"""The run folder: made, resumed, written and read; its connectors and their cards."""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import vlm
from hyma.files import lock_folder, provenance, save_tensors, write_csv, write_json
from vlm import BadInput, connector_name, read_json


def save_connector(out, data, layers, ranked, about):
    """Writes one pair's connector and, beside it, the `.json` card that says what made it.

    layers: [(weight [out, in], bias [out])]. ranked: the pair's row of ranking.csv. about: whatever else to record.
    """
    image, text = data.encoders[ranked["image"]], data.encoders[ranked["text"]]
    keys = [""] if len(layers) == 1 else [f"{2 * k}." for k in range(len(layers))]
    state = {}
    for key, (weight, bias) in zip(keys, layers):
        state[key + "weight"] = weight.detach().float().cpu().clone()
        state[key + "bias"] = bias.detach().float().cpu().clone()
    card = {
        "image_encoder": image.spec,
        "text_encoder": text.spec,
        "maps": f"unit vectors of {text.name} [{text.dim}] to the space of {image.name} [{image.dim}]; normalise after",
        "hidden_layers": len(layers) - 1,
        "activation": "relu",
        "dataset": data.manifest["dataset"] if data.manifest else data.folder.name,
        "embeddings_sha256": data.fingerprint([image.name, text.name]),
    }
    path = Path(out) / "connectors" / connector_name(image.name, len(layers) - 1, text.name)
    save_tensors(state, path)
    write_json(path.with_suffix(".json"), card | ranked | about)
    return path


def find_run(out=None):
    """The run folder to go on with: `out`, or the newest in runs/."""
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if out is None and not runs:
        raise BadInput("--resume: there is no run in runs/; name one with --out")
    return out or runs[-1].parent


def resume_flags(parser, out):
    """The flags and the configuration of the run in `out`; flags given now may not contradict them."""
    if not (out / "config.json").is_file():
        raise BadInput(f"--resume: {out} holds no run (no config.json)")
    config = read_json(out / "config.json")
    if config.get("script") != Path(sys.argv[0]).name:
        raise BadInput(f"--resume: {out} was not made by {Path(sys.argv[0]).name}")
    parser.set_defaults(**config["flags"])
    flags = parser.parse_args()  # again, so that what is given now shows against what the run was started with
    flags.data, flags.out = Path(flags.data), out
    for name, value in config["flags"].items():
        now = getattr(flags, name)
        if name != "out" and (str(now) if isinstance(now, Path) else now) != value:
            raise BadInput(f"--{name.replace('_', '-')} {now}: contradicts {out}, which was started with {value}")
    return flags, config


def create_run(flags, config, identity, device, wait=False):
    """Makes the run folder, or, for a resumed run, sees that it is of the same pairs and embeddings. Locks it."""
    out = flags.out
    if config is None:
        if (out / "config.json").exists():
            raise BadInput(f"--out {out}: holds a run already; choose another, or go on with it: --resume --out {out}")
        (out / "connectors").mkdir(parents=True, exist_ok=True)
    elif any(config[key] != value for key, value in identity.items()):
        raise BadInput(f"--resume: the embeddings in {flags.data} are no longer those that {out} was started with")
    lock = lock_folder(out, wait)
    if config is None:
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in vars(flags).items() if name != "resume"}
        about = {"script": Path(sys.argv[0]).name, "flags": plain} | identity | provenance(device)
        write_json(out / "config.json", about)
    return lock


def write_results(out, data, ranked, connector_of, batch_size, state):
    """Writes connectors and cards, ranking.csv and, last, ledger.json. Returns the connectors' paths, best first.

    ranked: the rows of `rank_pairs`. connector_of("image:text"): its layers and what its card is to record. state: what
    a checkpoint holds: step, updates (of each pair), flops, logit_flops, seconds, peak_bytes, trainable_parameters.
    """
    paths = []
    for row in ranked:
        layers, about = connector_of(f"{row['image']}:{row['text']}")
        paths.append(save_connector(out, data, layers, row, about))
    write_csv(out / "ranking.csv", ranked)
    ledger = {
        "pairs": sum(count > 0 for count in state["updates"].values()),  # a pair may be predicted untrained
        "steps": state["step"],
        "batch_size": batch_size,
        "pair_samples": batch_size * sum(state["updates"].values()),
        "updates_per_pair": state["updates"],
        "flops": state["flops"],
        "logit_flops": state["logit_flops"],  # of those, what grows with the batch at equal samples
        "seconds": round(state["seconds"], 3),
        "peak_bytes": state["peak_bytes"],
        "trainable_parameters": state["trainable_parameters"],
    }
    write_json(out / "ledger.json", ledger)
    return paths


class Run(NamedTuple):
    """A finished run folder, or a folder of connectors alone, as published: that has no ledger and ranks no pair."""

    folder: Path
    config: dict
    ledger: dict | None
    ranks: dict  # (image, text) -> rank in ranking.csv, 1 the best; equals share a rank
    seed: int
    hidden_layers: int

    @property
    def flags(self):
        return self.config["flags"]

    def connector(self, image, text):
        """The path of a pair's connector."""
        return connectors_folder(self.folder) / vlm.connector_name(image, self.hidden_layers, text)


def connectors_folder(folder):
    return folder / "connectors" if (folder / "connectors").is_dir() else folder


def read_run(folder) -> Run:
    """Reads a run folder. Raises BadInput if it is none, is unfinished or lacks a connector."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return open_connectors(folder)
    config = vlm.read_json(folder / "config.json")
    try:
        script, seed = config["script"], config.get("seed", config["flags"].get("seed", 0))
        hidden_layers = int(config["flags"]["connector"][-1])
        config["embeddings"].items()
        if not (folder / "ledger.json").is_file():
            said = f"is not finished (no ledger.json); go on: python {script} --resume --out {folder}"
            raise BadInput(f"{folder}: {said}")
        ledger = vlm.read_json(folder / "ledger.json")
        for key in ("batch_size", "pair_samples", "flops", "logit_flops", "seconds"):
            float(ledger[key])
        with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
            ranks = {(row["image"], row["text"]): int(row["rank"]) for row in csv.DictReader(file)}
        for pair in ranks:
            ledger["updates_per_pair"][":".join(pair)]
        if not ranks:
            raise KeyError("ranking.csv ranks nothing")
    except BadInput:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder}: is damaged ({type(error).__name__}: {error}); make the run again") from None
    run = Run(folder, config, ledger, ranks, seed, hidden_layers)
    for pair in ranks:
        if not run.connector(*pair).is_file():
            raise BadInput(f"{run.connector(*pair)}: no such file, but {folder}/ranking.csv ranks {':'.join(pair)}")
    return run


def open_connectors(folder) -> Run:
    """A folder of connectors and nothing else. Its pairs share a rank, as nothing says how they were chosen."""
    names = [vlm.read_connector(path)[:3] for path in sorted(connectors_folder(folder).glob("*_mlp?_*.pt"))]
    if not names:
        said = "holds no run (no config.json) and no connectors; make a run with train_hyma.py or train_grid.py"
        raise BadInput(f"{folder}: {said}")
    depths = sorted({hidden_layers for _, hidden_layers, _ in names})
    if len(depths) > 1:
        raise BadInput(f"{folder}: holds connectors of {depths} hidden layers; keep one kind a folder")
    config = {"script": None, "flags": {"connector": f"mlp{depths[0]}"}, "embeddings": {}}
    return Run(folder, config, None, {(image, text): 1 for image, _, text in names}, 0, depths[0])


def is_full_grid(run):
    """Whether it is an oracle: every pair trained from nothing, with the whole budget, on all rows."""
    less = any(run.flags.get(name) for name in ("halving", "closed_form", "from", "rows"))
    return run.config["script"] == "train_grid.py" and run.flags.get("budget_of") == "full" and not less


# What does not make a run another method's: where it is, what it ran on, its seed.
INCIDENTAL = {"seed", "seeds", "out", "data", "device", "precision", "shard", "pairs", "pairs_per_pass", "resume"}


def recipe(run):
    """The flags that make the method; runs that share them differ in their seed alone."""
    kept = {name: value for name, value in run.flags.items() if value and name not in INCIDENTAL}
    for name in ("budget_of", "from"):
        if kept.get(name, "full") != "full":
            kept[name] = "a run"  # of several seeds' runs, each has another's
    return {"script": run.config["script"]} | kept


def method_label(run):
    flags = run.flags
    if not run.ledger:
        return f"connectors in {run.folder}"
    if run.config["script"] == "train_hyma.py":
        name = f"hyma {flags.get('generator')}"
    else:
        name = flags.get("closed_form") or ("halving" if flags.get("halving") else "grid")
    name += f" mlp{run.hidden_layers}"
    name += f", FLOPs of {Path(flags['budget_of']).name}" if flags.get("budget_of", "full") != "full" else ""
    name += f", from {Path(flags['from']).name}" if flags.get("from") else ""
    return name + (f", {flags['rows']} rows" if flags.get("rows") else "")


def newest_run():
    finished = sorted(Path("runs").glob("*/ledger.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise BadInput("runs/ holds no finished run; make one: python train_hyma.py --pairs all, or see --demo")
    return finished[-1].parent
