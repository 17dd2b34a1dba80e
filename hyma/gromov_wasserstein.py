"""The Gromov-Wasserstein distance between pictures and captions: how alike the shapes of two clouds of points are.

It compares distances within the pictures with distances within the captions, and matches the two clouds as well as it
can. It never uses which caption belongs to which picture, so it measures less than the selectors that do.
"""

import torch
import torch.nn.functional as F

ROWS = 200  # of each encoder: a coupling has ROWS x ROWS entries
ENTROPY = 0.3  # how far a coupling is smoothed: times the distances' deviations within pictures and within captions
UPDATES = 20  # of the coupling
SCALINGS = 20  # of its rows and columns, within an update


def gromov_wasserstein(features, pairs):
    """Minus the entropic Gromov-Wasserstein distance of each pair (Peyré, Cuturi and Solomon, ICML 2016; as a selector
    arXiv 2605.01325).

    With C and D the distances [m, m] within the first m pictures and captions, and T a coupling, all of whose rows and
    columns have the sum 1 / m:

        GW = min_T sum_ijkl (C_ik - D_jl)^2 T_ij T_kl = mean(C^2) + mean(D^2) - 2 max_T <C T D, T>

    Each update of T is the coupling nearest to exp(4 C T D / e), e = ENTROPY std(C) std(D), the exponential of minus the
    gradient: what the gradient has beside C T D depends on a row or on a column alone, and cancels. T starts uniform, so
    that no rows are matched beforehand. All pairs are updated together.
    """
    distances = {}
    for name, x in features.items():
        distances[name] = relative_distances(x[:ROWS])
    of_images = torch.stack([distances[image] for image, _ in pairs])  # C [P, m, m]
    of_texts = torch.stack([distances[text] for _, text in pairs])  # D [P, m, m]
    deviations = of_images.std((1, 2), keepdim=True) * of_texts.std((1, 2), keepdim=True)  # [P, 1, 1]
    entropy = ENTROPY * deviations.clamp(min=1e-9)
    coupling = torch.full_like(of_images, 1 / of_images[0].numel())  # T [P, m, m]
    for _ in range(UPDATES):
        coupling = nearest_coupling(4 * (of_images @ coupling @ of_texts) / entropy)
    matched = (of_images @ coupling @ of_texts * coupling).sum((1, 2))  # [P] <C T D, T>
    cost = of_images.square().mean((1, 2)) + of_texts.square().mean((1, 2)) - 2 * matched
    return dict(zip(pairs, (-cost).tolist()))


def relative_distances(x):
    """Cosine distances [m, m] within rows [m, D], divided by their mean; float64."""
    x = F.normalize(x.double(), dim=1)
    distances = 1 - x @ x.T
    return distances / distances.mean()


def nearest_coupling(logits):
    """The coupling diag(u) exp(logits) diag(v) [P, m, m] with uniform marginals, by Sinkhorn's scalings (Knight, 2008).

    logits: [P, m, m].
    """
    count = logits.shape[1]
    # What is taken from a row or a column, a scaling gives back: no row and no column may underflow as a whole.
    logits = logits - logits.amax(2, keepdim=True)
    kernel = (logits - logits.amax(1, keepdim=True)).exp()
    right = torch.ones_like(kernel[:, 0, :, None])  # v [P, m, 1]
    for _ in range(SCALINGS):
        left = 1 / count / (kernel @ right)  # u [P, m, 1]
        right = 1 / count / (kernel.mT @ left)
    return left * kernel * right.mT
