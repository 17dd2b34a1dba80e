"""The run folder: created, resumed, written and read; its connectors and their cards.

    runs/<name>/config.json      every flag, what the method is, versions, device, commit; written first
                metrics.jsonl    a line each time that the pairs are validated
                checkpoint.pt    all that a resumed run needs
                connectors/      <image>_mlp<C>_<text>.pt and, of the same stem, a .json card that says what made it
                ranking.csv      the pairs, best first
                ledger.json      what it cost; written last: a folder without it is not finished

Whoever reads a run knows neither trainers nor their flags: what they need to know is in `config.json` under names of
its own (`create_run`) and in the ledger (`write_results`).
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import vlm
from hyma.files import lock_folder, provenance, save_tensors, write_csv, write_json
from vlm import BadInput, read_json

# ---------------------------------------------------------------------------------------------- created and resumed


def create_run(out, flags, identity, about, device, wait=False):
    """Makes the folder of a new run and writes its config.json. Returns the lock that keeps other processes out.

    flags: {name: value} as typed. identity: what a resumed run must find again, {"pairs": [...], "embeddings": {encoder:
    sha256 of its file}} and whatever else decides the result. about: {"method": a name for tables, "recipe": the flags
    that make the method (runs that share it differ in their seed alone), "full_grid": whether every pair was trained from
    nothing, with the whole budget, on all rows, "hidden_layers", "rows": how many were used to train and to choose,
    "starts_from": another run whose cost is not in this one's, "seed"}.
    """
    if (out / "config.json").exists():
        raise BadInput(f"--out {out}: holds a run already; choose another, or go on with it: --resume --out {out}")
    (out / "connectors").mkdir(parents=True, exist_ok=True)
    lock = lock_folder(out, wait)
    config = {"script": Path(sys.argv[0]).name, "flags": flags} | identity | about | provenance(device)
    write_json(out / "config.json", config)
    return lock


def reopen_run(out, config, identity, wait=False):
    """Locks the folder of an interrupted run. Raises BadInput if its pairs or embeddings are no longer the same."""
    for key, value in identity.items():
        if config[key] != value:
            data = config["flags"]["data"]
            raise BadInput(f"--resume: the embeddings in {data} are no longer those that {out} was started with")
    return lock_folder(out, wait)


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
    """Writes connectors and cards, ranking.csv and, last, ledger.json. Returns the connectors' paths, best first.

    ranking: the rows of `rank_pairs`. connector_of("image:text"): its layers and what its card is to record. state: what
    a checkpoint holds: step, updates (of each pair), flops, start_flops, step_flops, logit_flops, seconds, peak_bytes,
    trainable_parameters.
    """
    paths = []
    for row in ranking:
        layers, about = connector_of(f"{row['image']}:{row['text']}")
        paths.append(save_connector(out, data, layers, row, about))
    write_csv(out / "ranking.csv", ranking)
    updates = state["updates"]
    ledger = {
        "pairs": sum(count > 0 for count in updates.values()),  # a pair may be predicted untrained
        "steps": state["step"],
        "batch_size": batch_size,
        "pair_samples": batch_size * sum(updates.values()),
        "updates_per_pair": updates,
        "flops": state["flops"],
        # What the FLOPs would be at another batch size follows from these; the rest goes with the samples.
        "start_flops": state["start_flops"],  # before the first step, whatever the batch size
        "step_flops": state["step_flops"],  # go with the number of steps
        "logit_flops": state["logit_flops"],  # go with the batch size at equal samples
        "seconds": round(state["seconds"], 3),
        "peak_bytes": state["peak_bytes"],
        "trainable_parameters": state["trainable_parameters"],
    }
    write_json(out / "ledger.json", ledger)
    return paths


def save_connector(out, data, layers, row, about):
    """Writes one pair's connector and, beside it, the `.json` card that says what made it.

    layers: [(weight [out, in], bias [out])]. row: the pair's row of ranking.csv. about: whatever else to record.
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
        "dataset": data.manifest["dataset"] if data.manifest else data.folder.name,
        "embeddings_sha256": data.fingerprint([image.name, text.name]),
        "weights_sha256": {encoder.name: data.weights_sha256(encoder.name) for encoder in (image, text)},
    }
    path = Path(out) / "connectors" / vlm.connector_name(image.name, hidden_layers, text.name)
    save_tensors(state, path)
    write_json(path.with_suffix(".json"), card | row | about)
    return path


# ------------------------------------------------------------------------------------------------------------ read


class Run(NamedTuple):
    """A finished run folder, or a folder of connectors alone, as published: that has no ledger and ranks no pair."""

    folder: Path
    method: str  # a name for tables and figures
    recipe: dict  # what makes the method: runs that share it differ in their seed alone
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
    return folder / "connectors" if (folder / "connectors").is_dir() else folder


def read_run(folder) -> Run:
    """Reads a run folder. Raises BadInput if it is none, is unfinished or lacks a connector."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
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
        if not (folder / "ledger.json").is_file():
            command = f"python {config['script']} --resume --out {folder}"
            raise BadInput(f"{folder}: is not finished (no ledger.json); rerun to resume: {command}")
        run = run._replace(ledger=read_ledger(folder), ranks=read_ranks(folder))
        for pair in run.ranks:
            run.ledger["updates_per_pair"][":".join(pair)]
    except BadInput:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder}: is damaged ({type(error).__name__}: {error}); make the run again") from None
    for pair in run.ranks:
        if not run.connector(*pair).is_file():
            raise BadInput(f"{run.connector(*pair)}: no such file, but {folder}/ranking.csv ranks {':'.join(pair)}")
    return run


def read_ledger(folder):
    """ledger.json, whose numbers are numbers."""
    ledger = read_json(folder / "ledger.json")
    for key in ("batch_size", "pair_samples", "flops", "start_flops", "step_flops", "logit_flops", "seconds"):
        float(ledger[key])
    return ledger


def read_ranks(folder):
    """{(image, text): rank} of ranking.csv."""
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        ranks = {(row["image"], row["text"]): int(row["rank"]) for row in csv.DictReader(file)}
    if not ranks:
        raise KeyError("ranking.csv ranks nothing")
    return ranks


def read_connectors(folder) -> Run:
    """A folder of connectors and nothing else. Its pairs share a rank, as nothing says how they were chosen."""
    names = [vlm.read_connector(path)[:3] for path in sorted(connectors_folder(folder).glob("*_mlp?_*.pt"))]
    if not names:
        raise BadInput(
            f"{folder}: holds no run (no config.json) and no connectors; make a run with train_hyma.py or train_grid.py"
        )
    depths = sorted({hidden_layers for _, hidden_layers, _ in names})
    if len(depths) > 1:
        raise BadInput(f"{folder}: holds connectors of {depths} hidden layers; keep one kind a folder")
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
