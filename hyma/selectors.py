"""Ways to choose a pair that train nothing.

A selector is a function of features, {encoder: [n, D] float32, centred}, and pairs, [(image, text)], that returns
{pair: score}, the higher the better. To add one, write the function and add its line to the table in `run_selectors`.
They are in `alignment.py`, `gromov_wasserstein.py` and `probes.py`.
"""

import functools
import itertools
import time

import numpy as np
import torch
from tqdm import tqdm

from hyma.alignment import calibrated_cka, canonical_correlations, debiased_cka, linear_cka, mutual_neighbours
from hyma.costs import NO_COST, flop_counter
from hyma.embeddings import RowStore, unique
from hyma.gromov_wasserstein import gromov_wasserstein
from hyma.methods import SelectionMethod
from hyma.metrics import Retrieval
from hyma.probes import relative_representations, ridge_probe

LEAST_ROWS = 50  # that selectors can tell pairs apart on
CONSTANT = 1e-6  # numbers of unit vectors that differ by less differ by rounding


def run_selectors(data, pairs, rows, device):
    """Runs every selector on the same rows.

    data: the embedding folder. rows [n]: the result of `selector_rows`. Returns ([SelectionMethod], {pair: its canonical
    correlations, largest first}, lines of warning about encoders that are duplicates).
    """
    names = unique(itertools.chain.from_iterable(pairs))
    features = centred_features(RowStore(data, names, device), names, rows)
    # On the CPU, where ranks come from torch's own products, which the counter sees.
    held_out = Retrieval(data, rows[len(rows) - len(rows) // 5 :], torch.device("cpu"))
    spectra = {}
    selectors = {
        "linear CKA": linear_cka,
        "calibrated CKA": calibrated_cka,
        "debiased CKA": debiased_cka,
        "mutual k-NN": mutual_neighbours,
        "canonical correlations": functools.partial(canonical_correlations, spectra=spectra),
        "Gromov-Wasserstein": gromov_wasserstein,
        "ridge probe R@10": functools.partial(ridge_probe, held_out=held_out),
        "relative representations R@10": functools.partial(relative_representations, held_out=held_out),
    }
    methods = []
    warm_up_counter()
    for name, selector in tqdm(selectors.items(), desc="selectors"):
        started = time.perf_counter()
        with flop_counter() as counter:
            scores = selector(features, pairs)
        seconds = time.perf_counter() - started
        preference = np.array([[scores[pair] for pair in pairs]]).round(9)  # [1, P]
        cost = {"flops": counter.get_total_flops(), "seconds": seconds, "rows": len(rows)}
        methods.append(SelectionMethod(name, preference, [], cost))
    methods.append(SelectionMethod("largest (sum of widths)", sum_of_widths(data, pairs), [], NO_COST))
    return methods, spectra, find_duplicates(data, features)


def selector_rows(data, rows, count):
    """`count` of the training rows in random order, each picture once: a second caption would be its own neighbour."""
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if data.rows:
        row_of_picture = {}
        for i in rows.tolist():
            row_of_picture[data.rows[i]["image"]] = i
        rows = torch.tensor(list(row_of_picture.values()))
    return rows[:count]


def centred_features(store, names, rows):
    """{encoder: [n, D] float32, of unit vectors minus their mean}. Of an encoder that gives all rows one vector: zeros, as
    rounding is all that the mean leaves, and no selector can make anything of that."""
    features = {}
    for name in names:
        x = store.take(name, rows)  # [n, D]
        centred = x - x.mean(0)
        is_constant = centred.abs().max() < CONSTANT
        features[name] = torch.zeros_like(x) if is_constant else centred
    return features


def warm_up_counter():
    """Enters the counter once: its first use takes a second, which is no selector's cost."""
    with flop_counter():
        torch.ones(1, 1) @ torch.ones(1, 1)


# ----------------------------------------------------------------------------------------------------- names alone


def sum_of_widths(data, pairs):
    """[1, P]: the larger encoders first. Parameter counts are not in the manifest; of a model family, the wider is the
    larger."""
    widths = [data.encoders[image].dim + data.encoders[text].dim for image, text in pairs]
    return np.array([widths], dtype=float)


def find_duplicates(data, features):
    """A line for every two encoders of a kind whose embeddings are the same file, or the same up to a rotation."""
    digests = data.fingerprint(features)
    lines = []
    for kind in ("image", "text"):
        own = {name: features[name] for name in data.names(kind) if name in features}
        for (one, two), cka in linear_cka(own, list(itertools.combinations(own, 2))).items():
            if cka <= 0.9999:
                continue
            same_file = digests[one] == digests[two]
            how = "the same file" if same_file else f"alike up to a rotation (linear CKA {cka:.6f})"
            consequence = "their pairs tie, and agreement looks better than it is"
            lines.append(f"{one} and {two} are duplicates: {how}; {consequence}")
    return lines
