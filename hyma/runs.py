"""The run folder: created, resumed, written and read; its connectors and their cards.

    runs/<name>/config.json      every flag, what the method is, versions, device, commit; written first
                metrics.jsonl    a line each time that the pairs are validated
                checkpoint.pt    all that a resumed run needs; until the run is finished, the one before it is kept too
                connectors/      <image>_mlp<C>_<text>.pt and, of the same stem, a .json card that says what made it
                ranking.csv      the pairs, best first
                ledger.json      what it cost; written last: a folder without it is not finished

Code that reads a run knows neither trainers nor their flags: what it needs is in `config.json` under keys of its own
(`create_run`) and in the ledger (`write_results`).
"""

import csv
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import vlm
from hyma.files import CHECKPOINT_SECONDS, lock_folder, make_folder, save_tensors, write_csv, write_json
from hyma.machine import provenance
from hyma.pair_names import name_of_row, pair_name
from vlm import BadInput, load_tensors, read_json

HIGHEST_COST = 1e40  # FLOPs beyond which a ledger is damaged: all computers of the world need longer than they last

# ---------------------------------------------------------------------------------------------- created and resumed


def create_run(out, flags, typed, must_match, run_info, device):
    """Makes the folder of a new run and writes its config.json. Returns the lock that keeps other processes out.

    flags: {name: value}, resolved. typed: the same before that, by which the same command is recognised.
    must_match: what a resumed run must find unchanged, {"pairs": [...], "embeddings": {encoder: sha256 of its file},
    "split": which row is in which} and whatever else decides the result.
    run_info: {"method": a name for tables, "recipe": the flags that define the method (runs that share it differ in their
    seed alone), "full_grid": whether every pair was trained from nothing, with the whole budget, on all rows,
    "hidden_layers", "rows": how many were used to train and to choose, "starts_from": another run whose cost is not in
    this one's, "seed"}.
    """
    if (out / "config.json").exists():
        raise BadInput(f"--out {out}: holds a run already; choose another, or resume it: --resume --out {out}")
    check_run_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out)
    make_folder(out / "connectors")
    config = (
        {"script": Path(sys.argv[0]).name, "flags": flags, "typed": typed} | must_match | run_info | provenance(device)
    )
    write_json(out / "config.json", config)
    return lock


def check_run_folder(out):
    """Raises BadInput for a folder that holds other files than a run's: a home, a repository, the root of the disk."""
    if not out.is_dir():
        return
    for path in sorted(out.iterdir()):
        is_new = path.name == "connectors" and path.is_dir() and not any(path.iterdir())
        if not (is_new or path.name == ".lock" or path.name.endswith(".tmp")):
            raise BadInput(f"--out {out}: is a folder with other files in it ({path.name}); choose a new one")


def reopen_run(out, resumed_config, must_match):
    """Locks the folder of an interrupted run. Raises BadInput if its pairs or embeddings are no longer the same."""
    for key, value in must_match.items():
        if key == "split" and key not in resumed_config:  # of an earlier version
            continue
        if resumed_config.get(key) != value:
            data = resumed_config["flags"]["data"]
            what = "splits" if key == "split" else key
            raise BadInput(f"--resume: the {what} in {data} are no longer those that {out} was started with")
    return lock_folder(out)


def check_same_split(what, config, data):
    """Raises BadInput if the run of this configuration was trained with another split of the rows than `data` has. `what`
    begins the message. A run of an earlier version has recorded none."""
    if config.get("split", data.split_sha256()) != data.split_sha256():
        raise BadInput(
            f"{what}: was trained with another split than {data.folder} has: rows that choose or test now may have trained it"
        )


def run_of_same_command(out, typed):
    """The configuration of the run in `out` if the same command made it, None if there is no run.

    Raises BadInput for a run of another command, naming the first flag that differs.
    """
    if not is_run(out):
        return None
    config = read_json(out / "config.json")
    if config.get("script") != Path(sys.argv[0]).name:
        raise BadInput(f"--out {out}: holds a run already, of {config.get('script')}; choose another")
    for name, value in config.get("typed", {"out": None}).items():
        if typed.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            made = f"without {flag}" if value is None else f"with {flag} {value} and not {typed.get(name)}"
            raise BadInput(
                f"--out {out}: holds a run already, made {made}; choose another, or resume it: --resume --out {out}"
            )
    return config


def interrupted_run(typed):
    """The newest folder in runs/ that this same command has left unfinished, or None. Prints which cannot be read."""
    configs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in configs:
        try:
            config = read_json(path)
        except BadInput as error:
            print(f"{error}; this is taken for another run", file=sys.stderr)
            continue
        same = config.get("script") == Path(sys.argv[0]).name and config.get("typed") == typed
        if same and not is_finished(path.parent):
            return path.parent
    return None


def is_run(folder):
    """Whether a folder is a run's, finished or not."""
    return (folder / "config.json").is_file()


def with_seed(out, seed):
    """The run folder of one of several seeds: runs/x-s1 for runs/x."""
    return out.with_name(f"{out.name}-s{seed}")


def without_seed(out):
    """The folder that the run folders of several seeds are named after: runs/x for runs/x-s1."""
    return out.with_name(re.sub(r"-s\d+$", "", out.name))


class Checkpoints:
    """The last two checkpoints of an unfinished run's folder: where the newer one is damaged, the older one is used."""

    def __init__(self, folder):
        self.newest = folder / "checkpoint.pt"
        self.previous = folder / "checkpoint.previous.pt"
        self.next = folder / "checkpoint.next.pt"  # complete, and about to become the newest
        self.saved = time.monotonic()

    def load(self, *keys):
        """The newest checkpoint that can be read and has these keys, or None if there is none. Prints which are damaged."""
        damaged = None
        for path in (self.next, self.newest, self.previous):
            if not path.exists():
                continue
            try:
                found = load_tensors(path)
                if not isinstance(found, dict) or not found.keys() >= set(keys):
                    raise BadInput(f"{path}: is no checkpoint of this script")
                if path == self.next:  # saving it was interrupted before its last step
                    self.finish_saving()
                return found
            except BadInput as error:
                damaged = str(error)
                print(f"{damaged}; taking the one before it", file=sys.stderr)
        if damaged:
            raise BadInput(f"{damaged}; there is no other checkpoint: start the run again in another --out")
        return None

    def due(self):
        """Whether the last one was saved so long ago that much work would be lost."""
        return time.monotonic() - self.saved >= CHECKPOINT_SECONDS

    def save(self, value):
        """Writes the next checkpoint whole, then renames: the newest becomes the previous one."""
        save_tensors(value, self.next)
        self.finish_saving()
        self.saved = time.monotonic()

    def finish_saving(self):
        """The two renames of `save`, also after an interruption between writing and renaming."""
        if self.newest.exists():
            os.replace(self.newest, self.previous)
        os.replace(self.next, self.newest)

    def drop_previous(self):
        """Of a finished run, which has its results: this takes as much space as the newest."""
        self.previous.unlink(missing_ok=True)


def is_finished(folder):
    """Whether a run folder has the ledger, which is written last."""
    return (folder / "ledger.json").is_file()


def find_run(out=None):
    """The run folder to resume: `out`, or the newest in runs/."""
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if out is None and not runs:
        raise BadInput("--resume: there is no run in runs/; name one with --out")
    return out or runs[-1].parent


def newest_finished_run():
    """The folder in runs/ that was finished last."""
    finished = sorted(Path("runs").glob("*/ledger.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise BadInput("runs/ holds no finished run; make one: python train_hyma.py --pairs all, or see --demo")
    return finished[-1].parent


# --------------------------------------------------------------------------------------------------------- written


def write_results(out, data, ranking, connector_of, batch_size, state):
    """Writes connectors and cards, ranking.csv and, last, ledger.json; drops the checkpoint before the last. Returns the
    connectors' paths, best first.

    ranking: the rows of `rank_pairs`. connector_of("image:text"): its layers and what its card is to record. state: what
    a checkpoint holds: step, updates (of each pair), flops, start_flops, step_flops, logit_flops, seconds, peak_bytes,
    trainable_parameters.
    """
    paths = []
    for row in ranking:
        layers, card_info = connector_of(name_of_row(row))
        paths.append(save_connector(out, data, layers, row, card_info))
    write_csv(out / "ranking.csv", ranking)
    updates = state["updates"]
    ledger = {
        "pairs": sum(count > 0 for count in updates.values()),  # a pair may be predicted untrained
        "steps": state["step"],
        "batch_size": batch_size,
        "pair_samples": batch_size * sum(updates.values()),
        "updates_per_pair": updates,
        "flops": state["flops"],
        # What the FLOPs would be at another batch size follows from these; the rest grows with the samples.
        "start_flops": state["start_flops"],  # before the first step, at any batch size
        "step_flops": state["step_flops"],  # grow with the number of steps
        "logit_flops": state["logit_flops"],  # grow with the batch size at equal samples
        "seconds": round(state["seconds"], 3),
        "peak_bytes": state["peak_bytes"],
        "trainable_parameters": state["trainable_parameters"],
    }
    if state.get("settled_at"):
        ledger["settled_at"] = state["settled_at"]  # the step at which the search has ended, its ranking being settled
    write_json(out / "ledger.json", ledger)
    Checkpoints(out).drop_previous()
    return paths


def save_connector(out, data, layers, row, card_info):
    """Writes one pair's connector and, in the same folder, its `.json` card: what it was trained on, and how.

    layers: [(weight [out, in], bias [out])]. row: the pair's row of ranking.csv. card_info: what else to record.
    """
    image, text = data.encoders[row["image"]], data.encoders[row["text"]]
    hidden_layers = len(layers) - 1
    state = {}
    for key, (weight, bias) in zip(vlm.connector_keys(hidden_layers), layers):
        state[key + "weight"] = weight.detach().float().cpu().clone()
        state[key + "bias"] = bias.detach().float().cpu().clone()
    card = {
        "image_encoder": image.spec,
        "text_encoder": text.spec,
        "maps": f"unit vectors of {text.name} [{text.dim}] to the space of {image.name} [{image.dim}]; normalise after",
        "hidden_layers": hidden_layers,
        "activation": "relu",
        "dataset": data.dataset,
        "embeddings_sha256": data.fingerprint([image.name, text.name]),
        "weights_sha256": {encoder.name: data.weights_sha256(encoder.name) for encoder in (image, text)},
        "settings": {encoder.name: data.record(encoder.name).get("transform") for encoder in (image, text)},
    }
    path = Path(out) / "connectors" / vlm.connector_name(image.name, hidden_layers, text.name)
    save_tensors(state, path)
    write_json(path.with_suffix(".json"), card | row | card_info)
    return path


# ------------------------------------------------------------------------------------------------------------ read


class Run(NamedTuple):
    """A finished run folder, or a folder of connectors alone, as published: that has no ledger, and its pairs share rank 1."""

    folder: Path
    method: str  # a name for tables and figures
    recipe: dict  # what defines the method: runs that share it differ in their seed alone
    seed: int
    hidden_layers: int
    ranks: dict  # (image, text) -> rank in ranking.csv, 1 the best; equals share a rank
    embeddings: dict  # encoder -> sha256 of the embedding file that it was trained on; none of connectors alone
    ledger: dict | None  # ledger.json
    config: dict  # config.json as it is, for the record
    data: str | None = None  # the embedding folder that it was trained on
    rows: int = 0  # how many of its rows it used, to train and to choose by
    full_grid: bool = False  # every pair trained from nothing, with the whole budget, on all rows
    starts_from: str | None = None  # a run whose cost is not in this one's

    def connector(self, image, text):
        """The path of a pair's connector."""
        return connectors_folder(self.folder) / vlm.connector_name(image, self.hidden_layers, text)


def connectors_folder(folder):
    """Where the connectors are: in a run folder's connectors/, or, of connectors alone, in the folder itself."""
    return folder / "connectors" if (folder / "connectors").is_dir() else folder


def read_run(folder) -> Run:
    """Reads a run folder. Raises BadInput if it holds no run, is unfinished or lacks a connector."""
    folder = Path(folder)
    if not is_run(folder):
        return read_connectors(folder)
    config = read_json(folder / "config.json")
    if "method" not in config and "flags" in config:
        raise BadInput(f"{folder}: was made by an earlier version of this program; make the run again")
    try:
        run = Run(
            folder=folder,
            method=config["method"],
            recipe=config["recipe"],
            seed=config["seed"],
            hidden_layers=config["hidden_layers"],
            ranks={},
            embeddings=dict(config["embeddings"]),
            ledger=None,
            config=config,
            data=config["flags"]["data"],
            rows=sum(config["rows"].values()),
            full_grid=config["full_grid"],
            starts_from=config["starts_from"],
        )
        if not is_finished(folder):
            command = f"python {config['script']} --resume --out {folder}"
            raise BadInput(f"{folder}: is not finished (no ledger.json); rerun to resume: {command}")
        run = run._replace(ledger=read_ledger(folder), ranks=read_ranks(folder))
        for pair in run.ranks:
            run.ledger["updates_per_pair"][pair_name(pair)]  # or a KeyError says which is missing
    except BadInput:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"{folder}: is damaged ({type(error).__name__}: {error}); make the run again") from None
    for pair in run.ranks:
        if not run.connector(*pair).is_file():
            raise BadInput(f"{run.connector(*pair)}: no such file, but {folder}/ranking.csv ranks {pair_name(pair)}")
    return run


def read_ledger(folder):
    """ledger.json, after checking that its costs are numbers that a run can have."""
    ledger = read_json(folder / "ledger.json")
    for key in ("batch_size", "pair_samples", "flops", "start_flops", "step_flops", "logit_flops", "seconds"):
        if not 0 <= float(ledger[key]) < HIGHEST_COST:
            raise ValueError(f"{key} of ledger.json is {ledger[key]}")
    return ledger


def read_ranks(folder):
    """{(image, text): rank} of ranking.csv."""
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        ranks = {(row["image"], row["text"]): int(row["rank"]) for row in csv.DictReader(file)}
    if not ranks:
        raise KeyError("ranking.csv ranks nothing")
    return ranks


def read_connectors(folder) -> Run:
    """A folder of connectors and nothing else. Its pairs share a rank, as nothing says which were chosen."""
    names = [vlm.read_connector(path)[:3] for path in sorted(connectors_folder(folder).glob("*_mlp?_*.pt"))]
    if not names:
        raise BadInput(
            f"{folder}: holds no run (no config.json) and no connectors; make a run with train_hyma.py or train_grid.py"
        )
    depths = sorted({hidden_layers for _, hidden_layers, _ in names})
    if len(depths) > 1:
        raise BadInput(
            f"{folder}: holds connectors of {depths} hidden layers; keep connectors of one depth in a folder"
        )
    return Run(
        folder=folder,
        method=f"connectors in {folder}",
        recipe={"connector": f"mlp{depths[0]}"},
        seed=0,
        hidden_layers=depths[0],
        ranks={(image, text): 1 for image, _, text in names},
        embeddings={},
        ledger=None,
        config={"script": None, "flags": {"connector": f"mlp{depths[0]}"}, "embeddings": {}},
    )
