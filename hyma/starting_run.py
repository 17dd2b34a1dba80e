"""The run in --from of train_grid.py: the flags that are kept of it, what must be the same, and the connectors to start from."""

from pathlib import Path

from hyma.pairs import images_of, texts_of
from hyma.runs import check_same_split, connectors_folder
from vlm import BadInput, connector_name, read_connector, read_json

KEPT_FLAGS = ("data", "rows", "connector", "batch_size", "logit_scale", "weight_decay", "clip_norm", "precision")


def flags_to_keep(run, data):
    """{flag: value} that are kept of the run: its data, its split and its loss settings. A flag that is typed replaces one.

    run: its folder; of connectors alone, as published, nothing is kept. data: the value of --data, or None. Raises BadInput
    if neither names the data.
    """
    config = read_config(run)
    if config is None:
        if data is None:
            raise BadInput(
                f"--from {run}: has no config.json; name the data that its connectors were trained on: --data"
            )
        return {}
    kept = {"seeds": [config["seed"]]}
    for name in KEPT_FLAGS:
        kept[name] = config["flags"][name]
    return kept


def read_config(run):
    """The configuration of the run in a folder, None of connectors alone. Raises BadInput if it lacks what is needed of it."""
    path = Path(run) / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    flags = config.get("flags")
    is_whole = isinstance(flags, dict) and flags.keys() >= set(KEPT_FLAGS)
    if not (is_whole and isinstance(config.get("seed"), int) and isinstance(config.get("embeddings"), dict)):
        raise BadInput(f"{path}: is no configuration of a run by this version; make the run again")
    return config


def check_same_data(run, data, pairs, seeds):
    """Raises BadInput if the run was trained on other embeddings of these pairs' encoders than `data` holds, or if a seed
    would choose by rows that the run was trained on."""
    config = read_config(run)
    if config is None:
        return
    for name, digest in data.fingerprint(images_of(pairs) + texts_of(pairs)).items():
        if config["embeddings"].get(name, digest) != digest:
            raise BadInput(f"--from {run}: was trained on another {name}.pt than {data.folder} holds (sha256)")
    check_same_split(f"--from {run}", config, data)
    if data.split_sha256() is None and set(seeds) != {config["seed"]}:
        raise BadInput(
            f"--seeds {' '.join(map(str, seeds))}: {data.folder} has no split column, so another seed than {config['seed']} "
            f"would choose by rows that {run} was trained on"
        )


def read_starting_connector(run, image, text, hidden_layers):
    """The tensors of the run's connector of a pair: weight [out, in], bias [out], and so on, layer after layer."""
    path = connectors_folder(Path(run)) / connector_name(image, hidden_layers, text)
    if not path.is_file():
        raise BadInput(f"--from {run}: has no connector {path.name}; name the pairs that it has: --pairs")
    return read_connector(path)[3].values()
