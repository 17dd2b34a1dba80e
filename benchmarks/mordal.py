"""A search as Mordal makes it (arXiv 2502.00241), on embeddings: clusters, halving on their medoids, learning curves.

Encoders that are alike by CKA are a cluster; the one that is most like the others is its medoid. Successive halving among
the pairs of medoids finds the best pairs of clusters. All pairs of these clusters are trained over short schedules, and a
line through the logarithms of error and of epochs predicts each one's error at the end of the whole schedule. The pair with
the smallest is trained to the end. How many clusters are kept and how short the schedules are is ours.
"""

import math
import time

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from training_runs import ranked_pairs, val_recall10

from hyma.alignment import linear_cka
from hyma.costs import flop_counter
from hyma.embeddings import Embeddings, RowStore
from hyma.pair_names import pair_name
from hyma.selectors import centred_features, selector_rows, warm_up_counter
from hyma.splits import split_rows

ROWS = 2000  # that CKA is measured on
KEPT = 2  # pairs of clusters whose pairs are trained
SHARES = (0.1, 0.2)  # of the whole schedule: the short ones


def search(data, train, epochs):
    """Searches the pairs of an embedding folder.

    data: the folder. train(name, *options): trains a run of train_grid.py, if it is missing, and returns its folder. epochs: of
    the whole schedule. Returns (run folders, the last one of the chosen pair alone; {"image:text": preference, higher is
    better}; {"flops", "seconds"} of clustering).
    """
    clusters, cost = cluster_encoders(data)

    # The best pairs of clusters, by their medoids.
    members = {}  # pair of medoids -> all pairs of their two clusters
    for image, of_image in clusters["image"].items():
        for text, of_text in clusters["text"].items():
            members[pair_name((image, text))] = [pair_name((one, other)) for one in of_image for other in of_text]
    halving = train("medoids", "--halving", "--pairs", *members)
    preference = {}
    candidates = []
    for place, medoids in enumerate(ranked_pairs(halving)):
        for pair in members[medoids]:
            preference[pair] = -1 - place
        if place < KEPT:
            candidates += members[medoids]

    # The best of their pairs, by learning curves.
    runs = [halving]
    lengths = sorted({max(1, round(share * epochs)) for share in SHARES})
    errors = {pair: [] for pair in candidates}
    for length in lengths:
        options = ("--epochs", length, "--warmup-steps", round(20 * length / epochs), "--pairs", *candidates)
        runs.append(train(f"{length}-epochs", *options))
        for pair, recall10 in val_recall10(runs[-1]).items():
            errors[pair].append(1 - recall10)
    for pair in candidates:
        preference[pair] = 1 - extrapolate(lengths, errors[pair], epochs)
    chosen = max(preference, key=preference.get)
    runs.append(train("chosen", "--pairs", chosen))
    return runs, preference, cost


def extrapolate(lengths, errors, epochs):
    """The error at `epochs`, by the line through log(error) over log(length)."""
    if len(lengths) == 1:
        return errors[0]
    slope, intercept = np.polyfit(np.log(lengths), np.log(np.maximum(errors, 1e-6)), 1)
    return math.exp(intercept + slope * math.log(epochs))


def cluster_encoders(data):
    """({"image", "text": {medoid: members}}, {"flops", "seconds"}) of an embedding folder, by CKA on training rows."""
    data = Embeddings(data)
    warm_up_counter()
    started = time.perf_counter()
    rows = selector_rows(data, split_rows(data, 0)[0], ROWS)
    clusters = {}
    with flop_counter() as counter:
        for kind in ("image", "text"):
            names = data.names(kind)
            features = centred_features(RowStore(data, names, torch.device("cpu")), names, rows)
            pairs = [(one, other) for one in names for other in names]
            alike = np.array(list(linear_cka(features, pairs).values())).reshape(len(names), len(names))
            clusters[kind] = cluster(names, alike)
    return clusters, {"flops": counter.get_total_flops(), "seconds": time.perf_counter() - started}


def cluster(names, alike):
    """{medoid: members}: about as many clusters as the root of the number of encoders, by average linkage.

    alike [N, N]: CKA of every two encoders.
    """
    if len(names) == 1:
        return {names[0]: names}
    distances = squareform(1 - (alike + alike.T) / 2, checks=False).clip(min=0)  # rounding: two of the same are more than alike
    numbers = fcluster(linkage(distances, "average"), math.ceil(len(names) ** 0.5), "maxclust")  # [N]
    clusters = {}
    for number in np.unique(numbers):
        members = np.flatnonzero(numbers == number)
        medoid = members[alike[np.ix_(members, members)].sum(1).argmax()]
        clusters[names[medoid]] = [names[member] for member in members]
    return clusters
