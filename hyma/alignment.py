"""How alike two embeddings of the same rows are: agreement of pictures and captions, before anything is trained.

Each measure is a selector (`hyma.selectors`): a function of features, {encoder: [n, D] float32, centred}, and pairs,
[(image, text)], that returns {pair: score}.
"""

import math

import torch
import torch.nn.functional as F

NEIGHBOURS = 10  # of the mutual nearest neighbours
COMPONENTS = 100  # leading principal components that canonical correlations are taken between


def linear_cka(features, pairs):
    """Centred kernel alignment of linear kernels (Kornblith et al., arXiv 1905.00414, eq. 4): 0 to 1.

        CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms

    On few rows it mostly ranks encoders by how many dimensions their rows fill: white noise of 1,280 dimensions comes
    before most real pairs (NOTES.md).
    """
    norms = gram_norms(features)
    scores = {}
    for image, text in pairs:
        cross = features[image].T @ features[text]  # [D_i, D_t]
        scores[image, text] = (cross.norm() ** 2 / (norms[image] * norms[text]).clamp(min=1e-30)).item()
    return scores


def gram_norms(features):
    """{encoder: |X^T X|}."""
    norms = {}
    for name, x in features.items():
        norms[name] = (x.T @ x).norm()
    return norms


def calibrated_cka(features, pairs):
    """Linear CKA above what it is for unrelated rows, as a share of the most it could be above (after arXiv 2602.14486): about
    0 for unrelated embeddings, at most 1.

        (|X^T Y|^2 - N) / (|X^T X| |Y^T Y| - N),   N = |X|^2 |Y|^2 / (n - 1)

    N is the exact mean of |X^T P Y|^2 over all permutations P of the captions, X and Y being centred.
    """
    norms = gram_norms(features)
    scores = {}
    for image, text in pairs:
        x, y = features[image], features[text]
        null = x.square().sum() * y.square().sum() / (len(x) - 1)
        above = (x.T @ y).norm() ** 2 - null
        most_above = (norms[image] * norms[text] - null).clamp(min=1e-30)
        scores[image, text] = (above / most_above).item()
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
