"""Ways to choose a pair that train nothing."""

import functools
import itertools
import math
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from hyma.closed_form import regularised
from hyma.costs import FREE, flop_counter
from hyma.embeddings import RowStore, unique
from hyma.metrics import Retrieval
from vlm import BadInput


class Method(NamedTuple):
    """A way of choosing a pair: a run of one or more seeds, or a selector."""

    name: str
    orders: np.ndarray  # [S, P] a row a seed: higher is better, equals are ties
    runs: list  # [S] the seeds' runs; none of a selector
    cost: dict  # of a selector: flops, seconds, rows

    @property
    def trained(self):
        return bool(self.runs and self.runs[0].ledger)


NEIGHBOURS = 10  # of the mutual nearest neighbours

COMPONENTS = 100  # leading principal components that canonical correlations are taken between

STRENGTH = 0.1  # ridge probe's regularisation, in mean eigenvalues of the text Gram matrix

KEPT, POWER = 100, 8  # relative representations: anchors that a row keeps, and the exponent of its similarities


def selector_rows(data, rows, count):
    """`count` of the training rows in random order, each picture once: a second caption would be its own neighbour."""
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if data.rows:
        rows = torch.tensor(list({data.rows[i]["image"]: i for i in rows.tolist()}.values()))
    if len(rows) < 50:
        raise BadInput(f"{data.folder}: selectors need 50 training pictures; it has {len(rows)}; use --selector-rows 0")
    return rows[:count]


def linear_cka(features, pairs):
    """Centred kernel alignment of linear kernels (Kornblith et al., arXiv 1905.00414, eq. 4): 0 to 1."""
    own = {name: (x.T @ x).norm() for name, x in features.items()}
    return {(i, t): ((features[i].T @ features[t]).norm() ** 2 / (own[i] * own[t])).item() for i, t in pairs}


def debiased_cka(features, pairs):
    """The same with the unbiased estimate of HSIC (Song et al., JMLR 2012, eq. 5; Nguyen et al., arXiv 2010.15327), which
    does not grow with the widths: about 0 for unrelated sides. No [n, n] kernel is formed."""

    def hsic(x, y):
        n = len(x)
        x_diagonal, y_diagonal = x.square().sum(1), y.square().sum(1)  # [n]
        x_rows, y_rows = x @ x.sum(0) - x_diagonal, y @ y.sum(0) - y_diagonal  # [n] kernels' row sums, diagonals zero
        trace = (x.T @ y).square().sum() - x_diagonal @ y_diagonal
        rest = x_rows.sum() * y_rows.sum() / ((n - 1) * (n - 2)) - 2 * (x_rows @ y_rows) / (n - 2)
        return (trace + rest) / (n * (n - 3))

    own = {name: hsic(x, x).clamp(min=1e-30).sqrt() for name, x in features.items()}
    return {(i, t): (hsic(features[i], features[t]) / (own[i] * own[t])).item() for i, t in pairs}


def mutual_neighbours(features, pairs):
    """Share of a row's 10 nearest rows by picture that are also among its 10 nearest by caption (Huh et al., arXiv
    2405.07987, section 2), by cosine of centred vectors."""
    nearest = {}
    for name, x in features.items():
        x = F.normalize(x, dim=1)
        found = []
        for block in torch.arange(len(x), device=x.device).split(2048):
            scores = x[block] @ x.T  # [block, n]
            scores[torch.arange(len(block), device=x.device), block] = -math.inf
            found.append(scores.topk(NEIGHBOURS, dim=1).indices)
        nearest[name] = torch.cat(found)  # [n, 10]
    shared = {(i, t): (nearest[i][:, :, None] == nearest[t][:, None]).sum().item() for i, t in pairs}
    return {(i, t): count / nearest[i].numel() for (i, t), count in shared.items()}


def canonical_correlations(features, pairs, spectra=None):
    """Mean squared canonical correlation between the leading principal components of both sides, as many on each side
    (Raghu et al., arXiv 1706.05806). spectra: a dict that gets each pair's correlations, largest first."""
    axes, count = {}, min(COMPONENTS, len(next(iter(features.values()))) // 5, *(x.shape[1] for x in features.values()))
    for name, x in features.items():
        values, vectors = torch.linalg.eigh(x.T @ x)
        kept = values[-count:] > 1e-6 * values[-1]  # of a side with fewer dimensions than that, the others are zero
        axes[name] = x @ vectors[:, -count:] * (kept / values[-count:].clamp(min=1e-12).sqrt())  # [n, count]
    found = {(i, t): torch.linalg.svdvals(axes[i].T @ axes[t]).clamp(max=1) for i, t in pairs}
    if spectra is not None:
        spectra |= {pair: values.tolist() for pair, values in found.items()}
    return {pair: values.square().mean().item() for pair, values in found.items()}


def ridge_probe(features, pairs, held_out):
    """R@10, both directions, of ridge regression from captions to pictures, on the fifth of the rows it has not seen."""
    cut, factors = len(next(iter(features.values()))) - len(held_out.rows), {}
    for text in unique(text for _, text in pairs):
        x = features[text][:cut]
        factors[text] = torch.linalg.cholesky(regularised(x.T @ x, STRENGTH))
    values = {}
    for image, text in pairs:
        weight = torch.cholesky_solve(features[text][:cut].T @ features[image][:cut], factors[text])  # [D_t, D_i]
        values[image, text] = recall10(held_out, features[text][cut:] @ weight, features[image][cut:])
    return values


def relative_representations(features, pairs, held_out):
    """R@10, both directions, of rows described by their similarities to the other rows' pictures, or captions (ASIF,
    Norelli et al., arXiv 2210.01738): the largest kept, raised to a power."""
    cut, described = len(next(iter(features.values()))) - len(held_out.rows), {}
    for name, x in features.items():
        x = F.normalize(x, dim=1)
        scores = (x[cut:] @ x[:cut].T).clamp(min=0)  # [held out, anchors]
        least = scores.topk(min(KEPT, cut), dim=1).values[:, -1:]
        described[name] = torch.where(scores >= least, scores, 0) ** POWER
    return {(i, t): recall10(held_out, described[t], described[i]) for i, t in pairs}


def recall10(held_out, texts, images):
    found = held_out.recalls(texts.cpu(), F.normalize(images.cpu(), dim=1))  # torch's own products, which are counted
    return (found[2] + found[5]) / 2


def run_selectors(data, pairs, rows, device):
    """Every selector on the same rows: [Method], {pair: canonical correlations}, and lines on encoders that are alike."""
    names = unique(name for pair in pairs for name in pair)
    store = RowStore(data, names, device)
    features = {name: store.take(name, rows) for name in names}  # [n, D]
    features = {name: x - x.mean(0) for name, x in features.items()}
    held_out = Retrieval(data, rows[len(rows) - len(rows) // 5 :], torch.device("cpu"))
    spectra, methods = {}, []
    asked = {
        "linear CKA": linear_cka,
        "debiased CKA": debiased_cka,
        "mutual k-NN": mutual_neighbours,
        "canonical correlations": functools.partial(canonical_correlations, spectra=spectra),
        "ridge probe R@10": functools.partial(ridge_probe, held_out=held_out),
        "relative representations R@10": functools.partial(relative_representations, held_out=held_out),
    }
    with flop_counter():
        torch.ones(1, 1) @ torch.ones(1, 1)  # the counter's own start takes a second, which is no selector's
    for name, selector in tqdm(asked.items(), desc="selectors"):
        started = time.perf_counter()
        with flop_counter() as counter:
            values = selector(features, pairs)
        cost = {"flops": counter.get_total_flops(), "seconds": time.perf_counter() - started, "rows": len(rows)}
        methods.append(Method(name, np.array([[values[pair] for pair in pairs]]).round(9), [], cost))
    # Parameter counts are not in the manifest; among models of a family the wider is the larger.
    widths = np.array([[data.encoders[image].dim + data.encoders[text].dim for image, text in pairs]], dtype=float)
    methods.append(Method("largest (sum of widths)", widths, [], FREE))
    return methods, spectra, find_duplicates(data, features)


def find_duplicates(data, features):
    """A line for every two encoders of a kind whose embeddings are the same file, or the same up to a rotation."""
    digests, lines = data.fingerprint(features), []
    for kind in ("image", "text"):
        names = [name for name in data.names(kind) if name in features]
        alike = linear_cka({name: features[name] for name in names}, list(itertools.combinations(names, 2)))
        for (one, two), cka in alike.items():
            if cka > 0.9999:
                how = (
                    f"alike up to a rotation (linear CKA {cka:.6f})"
                    if digests[one] != digests[two]
                    else "the same file"
                )
                said = "their pairs tie, and agreement looks better than it is"
                lines.append(f"{one} and {two} are duplicates: {how}; {said}")
    return lines
