"""Ways to choose a pair that train nothing.

A selector is a function of features, {encoder: [n, D] float32, centred}, and pairs, [(image, text)], that returns
{pair: score}, the higher the better. To add one, write the function and add its line to the table in `run_selectors`.
"""

import functools
import itertools
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from hyma.closed_form import regularised
from hyma.costs import NO_COST, flop_counter
from hyma.embeddings import RowStore, unique
from hyma.methods import SelectionMethod
from hyma.metrics import Retrieval, mean_recalls
from vlm import BadInput

CONSTANT = 1e-6  # numbers of unit vectors that differ by less differ by rounding
NEIGHBOURS = 10  # of the mutual nearest neighbours
COMPONENTS = 100  # leading principal components that canonical correlations are taken between
STRENGTH = 0.1  # ridge probe's regularisation, in mean eigenvalues of the text Gram matrix
ANCHORS_KEPT = 100  # relative representations: similarities to anchors that a row keeps
POWER = 8  # and their exponent


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
        "debiased CKA": debiased_cka,
        "mutual k-NN": mutual_neighbours,
        "canonical correlations": functools.partial(canonical_correlations, spectra=spectra),
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
    if len(rows) < 50:
        raise BadInput(f"{data.folder}: selectors need 50 training pictures; it has {len(rows)}; use --selector-rows 0")
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


# --------------------------------------------------------------------------------------- agreement of two embeddings


def linear_cka(features, pairs):
    """Centred kernel alignment of linear kernels (Kornblith et al., arXiv 1905.00414, eq. 4): 0 to 1.

    CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms.
    """
    own = {}
    for name, x in features.items():
        own[name] = (x.T @ x).norm()
    scores = {}
    for image, text in pairs:
        cross = features[image].T @ features[text]  # [D_i, D_t]
        scores[image, text] = (cross.norm() ** 2 / (own[image] * own[text]).clamp(min=1e-30)).item()
    return scores


def debiased_cka(features, pairs):
    """HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with the unbiased estimate of HSIC (Nguyen et al., arXiv 2010.15327),
    which does not grow with the widths: about 0 for unrelated embeddings, at most 1."""
    own = {}
    for name, x in features.items():
        own[name] = unbiased_hsic(x, x).clamp(min=1e-30).sqrt()
    scores = {}
    for image, text in pairs:
        cross = unbiased_hsic(features[image], features[text])
        scores[image, text] = (cross / (own[image] * own[text])).item()
    return scores


def unbiased_hsic(x, y):
    """The unbiased estimate of HSIC with linear kernels (Song et al., JMLR 2012, eq. 5).

    With K and L the kernels x x^T and y y^T, their diagonals set to zero:

        (tr(K L) + (1^T K 1)(1^T L 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1^T K L 1) / (n (n - 3))

    x [n, D_x], y [n, D_y]. The [n, n] kernels are never formed.
    """
    n = len(x)
    x_diagonal, y_diagonal = x.square().sum(1), y.square().sum(1)  # [n]
    x_row_sums = x @ x.sum(0) - x_diagonal  # [n] K 1
    y_row_sums = y @ y.sum(0) - y_diagonal  # [n] L 1
    trace = (x.T @ y).square().sum() - x_diagonal @ y_diagonal
    rest = x_row_sums.sum() * y_row_sums.sum() / ((n - 1) * (n - 2)) - 2 * (x_row_sums @ y_row_sums) / (n - 2)
    return (trace + rest) / (n * (n - 3))


def mutual_neighbours(features, pairs):
    """Share of a row's 10 nearest rows by picture that are also among its 10 nearest by caption (Huh et al., arXiv
    2405.07987, section 2), by cosine of centred vectors."""
    nearest = {}  # encoder -> [n, 10]
    for name, x in features.items():
        nearest[name] = nearest_rows(F.normalize(x, dim=1))
    scores = {}
    for image, text in pairs:
        shared = nearest[image][:, :, None] == nearest[text][:, None]  # [n, 10, 10]
        scores[image, text] = shared.sum().item() / nearest[image].numel()
    return scores


def nearest_rows(x):
    """The indices of each unit vector's nearest others [n, 10]. x: [n, D]."""
    nearest = []
    for block in torch.arange(len(x), device=x.device).split(2048):
        scores = x[block] @ x.T  # [block, n]
        scores[torch.arange(len(block), device=x.device), block] = -math.inf  # a row is not its own neighbour
        nearest.append(scores.topk(NEIGHBOURS, dim=1).indices)
    return torch.cat(nearest)


def canonical_correlations(features, pairs, spectra=None):
    """Mean squared canonical correlation between the leading principal components of pictures and of captions, as many of
    each (Raghu et al., arXiv 1706.05806): 0 to 1.

    They are the singular values of U_x^T U_y, U the rows' coordinates along principal axes, whitened. spectra: a dict
    that gets each pair's correlations, largest first.
    """
    row_count = len(next(iter(features.values())))
    count = min(COMPONENTS, row_count // 5, *(x.shape[1] for x in features.values()))
    whitened = {}  # encoder -> [n, count]
    for name, x in features.items():
        whitened[name] = whitened_components(x, count)
    scores = {}
    for image, text in pairs:
        correlations = torch.linalg.svdvals(whitened[image].T @ whitened[text]).clamp(max=1)  # [count]
        scores[image, text] = correlations.square().mean().item()
        if spectra is not None:
            spectra[image, text] = correlations.tolist()
    return scores


def whitened_components(x, count):
    """Coordinates [n, count] of centred rows [n, D] along their leading principal axes, each of unit length; zero where
    the rows have fewer dimensions than that."""
    values, vectors = torch.linalg.eigh(x.T @ x)
    kept = values[-count:] > 1e-6 * values[-1]
    return x @ vectors[:, -count:] * (kept / values[-count:].clamp(min=1e-12).sqrt())


# -------------------------------------------------------------------------------------- retrieval without training


def ridge_probe(features, pairs, held_out):
    """R@10, mean of both directions, of ridge regression from captions to pictures.

    held_out: Retrieval of the last rows of the features, which the regression does not see.
    """
    cut = first_held_out(features, held_out)
    factors = {}
    for text in unique(text for _, text in pairs):
        x = features[text][:cut]
        factors[text] = torch.linalg.cholesky(regularised(x.T @ x, STRENGTH))
    scores = {}
    for image, text in pairs:
        product = features[text][:cut].T @ features[image][:cut]  # [D_t, D_i]
        weight = torch.cholesky_solve(product, factors[text])  # [D_t, D_i]
        scores[image, text] = recall10(held_out, features[text][cut:] @ weight, features[image][cut:])
    return scores


def relative_representations(features, pairs, held_out):
    """R@10, mean of both directions, of rows described by their similarities to the other rows' pictures, or captions
    (ASIF, Norelli et al., arXiv 2210.01738): the largest are kept and raised to a power.

    held_out: Retrieval of the last rows of the features; all other rows are the anchors.
    """
    cut = first_held_out(features, held_out)
    relative = {}
    for name, x in features.items():
        x = F.normalize(x, dim=1)
        scores = (x[cut:] @ x[:cut].T).clamp(min=0)  # [held out, anchors]
        least = scores.topk(min(ANCHORS_KEPT, cut), dim=1).values[:, -1:]
        relative[name] = torch.where(scores >= least, scores, 0) ** POWER
    recalls = {}
    for image, text in pairs:
        recalls[image, text] = recall10(held_out, relative[text], relative[image])
    return recalls


def first_held_out(features, held_out):
    """The place of the first held-out row in the features."""
    return len(next(iter(features.values()))) - len(held_out.rows)


def recall10(held_out, texts, images):
    """Mean of both directions' R@10. texts, images: [held out, D]."""
    six = held_out.recalls(texts.cpu(), F.normalize(images.cpu(), dim=1))
    return mean_recalls(six)[2]


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
