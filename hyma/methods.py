"""Ways to choose a pair: runs, whose seeds are one method, and selectors, which train nothing. And whose scores are true."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from vlm import BadInput


class SelectionMethod(NamedTuple):
    """A way to choose a pair: a run of one or more seeds, or a selector. S seeds (1 of a selector), P pairs."""

    name: str
    preferences: np.ndarray  # [S, P] one row per seed: higher is better, equals are ties
    runs: list  # [S] a Run of each seed; none of a selector
    cost: dict  # of a selector: {"flops", "seconds", "rows"}; empty of runs, whose ledgers have it

    @property
    def trained(self):
        """Whether it is a run with a ledger: neither a selector nor connectors alone."""
        return bool(self.runs and self.runs[0].ledger)


def group_runs(runs, pairs, oracle_folders=()):
    """The runs as [SelectionMethod]: runs that differ only in their seed are one method.

    A seed that --oracle names and one that it does not name are two methods. Methods of the same label have their folders
    in their names. oracle_folders: the folders of --oracle, as str(run.folder) has them.
    """
    groups = []
    for run in runs:
        for group in groups:
            if is_other_seed(run, group, oracle_folders):
                group.append(run)
                break
        else:
            groups.append([run])
    labels = Counter(group[0].method for group in groups)
    methods = []
    for group in groups:
        first = group[0]
        name = f"{first.method} ({first.folder})" if labels[first.method] > 1 else first.method
        preferences = np.empty((len(group), len(pairs)))  # [S, P]
        for seed, run in enumerate(group):
            preferences[seed] = [-run.ranks[pair] for pair in pairs]
        methods.append(SelectionMethod(name, preferences, group, {}))
    return methods


def is_other_seed(run, group, oracle_folders):
    """Whether a run is another seed of the method of these runs."""
    same_recipe = run.recipe == group[0].recipe
    same_role = (str(run.folder) in oracle_folders) == (str(group[0].folder) in oracle_folders)
    return same_recipe and same_role and run.seed not in [other.seed for other in group]


def choose_oracle(methods, oracle_folders):
    """(the method whose connectors have the true scores, the method whose choice is the answer, warnings).

    oracle_folders: those of --oracle. Without them the oracle is a full grid, one with connectors as deep as the first
    run's if there is one; without a full grid it is the first run itself. Raises BadInput if --oracle names runs of
    several methods.
    """
    oracles = []
    others = []
    for method in methods:
        (oracles if can_be_oracle(method, oracle_folders) else others).append(method)
    if len(oracles) > 1 and oracle_folders:
        folders = " ".join(sorted(oracle_folders))
        raise BadInput(f"--oracle {folders}: must be seeds of one method, the same flags otherwise")
    primary = (others or methods)[0]
    if oracles:
        return first_of_depth(oracles, primary.runs[0].hidden_layers), primary, []
    if primary.trained:
        refined = any(run.config["flags"].get("refine_steps") for run in primary.runs)
        favoured = ", and of which the chosen pair's was trained further than the others" if refined else ""
        warning = (
            f"no oracle: the truth is {primary.name}'s own connectors, which cannot show what it has missed{favoured}; add "
            "the runs of train_grid.py with its whole budget, or name others with --oracle"
        )
    else:
        warning = f"{primary.name}: only the evaluated rows rank these connectors, so the best one's score is too high"
    return primary, primary, [warning]


def can_be_oracle(method, oracle_folders):
    """Whether --oracle names all runs of a method or, without --oracle, whether they are full grids."""
    for run in method.runs:
        named = str(run.folder) in oracle_folders if oracle_folders else run.full_grid
        if not named:
            return False
    return True


def first_of_depth(methods, hidden_layers):
    """The first method whose connectors have so many hidden layers, or, if none has, the first."""
    for method in methods:
        if method.runs[0].hidden_layers == hidden_layers:
            return method
    return methods[0]
