"""What the benchmarks ask of a training run: whether it is finished, and what its results depend on."""

import torch


def is_finished(folder):
    return (folder / "ledger.json").is_file()


def describe_machine(config):
    """What the results depend on, as the first run has recorded it."""
    about = {key: config[key] for key in ("versions", "device", "commit", "started")}
    return about | {"threads": torch.get_num_threads()}
