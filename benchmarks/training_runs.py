"""What the benchmarks ask of a training run: whether it is finished, its ranking, and what its results depend on."""

import csv

from hyma.pair_names import name_of_row


def is_finished(folder):
    return (folder / "ledger.json").is_file()


def val_recall10(folder):
    """{"image:text": R@10 on the validation rows}, in the order of the run's ranking, best first."""
    with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
        return {name_of_row(row): float(row["val_recall10"]) for row in csv.DictReader(file)}


def ranked_pairs(folder):
    """["image:text"], best first."""
    return list(val_recall10(folder))


def describe_machine(config):
    """What the results depend on, as the first run has recorded it."""
    return {key: config[key] for key in ("versions", "device", "commit", "started")}
