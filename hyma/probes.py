"""Retrieval without training: a connector that takes seconds, scored on rows that it has not seen.

Each probe is a selector (`hyma.selectors`) that needs the held-out rows too.
"""

import torch
import torch.nn.functional as F

from hyma.closed_form import regularised
from hyma.embeddings import unique
from hyma.metrics import mean_recalls

STRENGTH = 0.1  # ridge probe's regularisation, in mean eigenvalues of the text Gram matrix
ANCHORS_KEPT = 100  # relative representations: similarities to anchors that a row keeps
POWER = 8  # and their exponent


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
