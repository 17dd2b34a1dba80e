"""Connectors without training: covariances, whitened maps, ridge regression, Procrustes, cross-validation."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hyma.embeddings import random_of, unique
from hyma.metrics import Retrieval
from vlm import BadInput

PICTURE_RIDGE = 3.0  # regularisation of the pictures' Gram matrix in a whitened map, in mean eigenvalues


def regularised(gram, strength):
    """A Gram matrix [D, D] with `strength` times its mean eigenvalue added to its diagonal."""
    return gram + strength * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram)


def perpendicular(weight, mean):
    """A map [D, m] without the direction of the mean [D] in its outputs: it scores pictures as if they were centred."""
    direction = F.normalize(mean, dim=0)
    return weight - direction[:, None] * (direction @ weight)


START_RMS = 0.1  # of the hidden units at the start: smaller, and training moves the text parts more


class Covariance:
    """Rows [n, D], centred, and their Gram matrix [D, D]. strength: of its regularisation, in mean eigenvalues."""

    def __init__(self, rows, strength):
        self.mean, self.strength = rows.mean(0), strength
        self.rows = rows - self.mean
        self.gram = self.rows.T @ self.rows
        self.factor = torch.linalg.cholesky(regularised(self.gram, strength))

    def solve(self, product):
        """The regularised inverse times product [D, m]: of rows.T @ outputs, ridge regression."""
        return torch.cholesky_solve(product, self.factor)

    def solve_without(self, rows, product):
        """The same without some of the rows."""
        gram = regularised(self.gram - rows.T @ rows, self.strength)
        return torch.cholesky_solve(product, torch.linalg.cholesky(gram))


def whitened(product, inputs, outputs):
    """C_yy^-1 C_yx C_xx^-1 [out, in] of the Covariances of inputs x and outputs y, and their product C_yx.

    To first order in the correlation this is the bilinear score of Gaussian vectors that InfoNCE looks for, log p(x, y) /
    p(x) p(y) (van den Oord et al., arXiv 1807.03748, section 2.3). Ridge regression lacks the first factor: it follows the
    directions in which pictures differ most.
    """
    return perpendicular(outputs.solve(inputs.solve(product.T).T), outputs.mean)


def leading_axes(texts, m):
    """Coordinates s [n, m] along the principal axes of several encoders' texts [n, D_t], side by side."""
    beside = torch.cat([x / x.norm() for x in texts], dim=1)  # [n, sum D_t]
    count = min(m, *beside.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        s = beside @ torch.pca_lowrank(beside, count, center=False, niter=1)[2]  # [n, count]
    s = s[:, torch.arange(m) % count]  # few narrow texts: axes stand twice
    return s * (START_RMS * s.numel() ** 0.5 / s.norm())


def cross_validate(sides, shared, products, folds, data, pairs):
    """R@10 of a start on rows it has not seen, mean of both directions: {"image:text": a value for each of the folds but the
    last, by the start of all other rows}.

    products: {encoder: those of its rows with the shared axes, [folds, D, m]}. Only the pictures' Gram matrix keeps the
    fold: it knows of no text, and its strong regularisation leaves a fold little weight.
    """
    sizes, told, found = [len(fold) for fold in folds], {}, {":".join(pair): [] for pair in pairs}
    retrievals = [Retrieval(data, fold, shared.mean.device) for fold in folds[:-1]]

    def by_fold(name):
        """Rows [h, D], their s [h, m], and the product of all other rows with theirs [D, m]."""
        rest = products[name].sum(0) - products[name]
        return zip(sides[name].rows.split(sizes)[:-1], shared.rows.split(sizes), rest)

    for text in unique(text for _, text in pairs):
        told[text] = []  # [h, m] a fold: C_ss^-1 times the s that the text predicts
        for x, s, product in by_fold(text):
            predicted = x @ sides[text].solve_without(x, product)
            told[text].append(shared.solve_without(s, predicted.T).T)
    for image in tqdm(unique(image for image, _ in pairs), desc="cross-validate", unit="encoder"):
        for k, (y, _, product) in enumerate(by_fold(image)):
            weight = perpendicular(sides[image].solve(product), sides[image].mean)  # [D, m]
            root = torch.linalg.cholesky(regularised(weight.T @ weight, 1e-4))  # lengths of outputs need no basis
            pictures = torch.linalg.solve_triangular(root, (y @ weight).T, upper=False).T  # [h, m]
            for text in (text for other, text in pairs if other == image):
                six = retrievals[k].recalls(told[text][k] @ root, pictures)
                found[f"{image}:{text}"].append((six[2] + six[5]) / 2)
    return found


def fold_rows(data, rows, val_rows, seed):
    """At most 16,384 of the training rows: three folds, each about as large as the validation rows, and last the rest. All
    captions of a picture are in one."""
    rows = rows[:: math.ceil(len(rows) / 16384)]
    pictures = [data.rows[i]["image"] for i in rows.tolist()] if data.rows else rows.tolist()
    place = {name: k for k, name in enumerate(unique(pictures))}
    if len(place) < 2:
        raise BadInput(f"{data.folder}: one picture alone is left to train on; two are the least")
    count = min(len(place), max(3, round(len(rows) / len(val_rows))))
    fold_of = torch.randperm(len(place), generator=random_of("folds", seed)) * count // len(place)  # [pictures]
    fold_of = fold_of[torch.tensor([place[name] for name in pictures])]  # [n]
    return [rows[fold_of == k] for k in range(min(3, count))] + [rows[fold_of >= 3]]


RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # regularisation to choose from, in mean eigenvalues of the text Gram matrix


def mean_of(store, name, rows, block=8192):
    return sum(store.take(name, part).double().sum(0) for part in rows.split(block)) / len(rows)  # [D]


def covariance(store, left, right, rows, means, block=8192):
    """Sum over the rows of (left - its mean) (right - its mean)^T: [D_left, D_right], float64."""
    total = 0
    for part in rows.split(block):
        one, two = ((store.take(name, part).double() - means[name]) for name in (left, right))
        total = total + one.T @ two
    return total


def procrustes(cross, image_gram, text_gram):
    """The orthogonal map [D_i, D_t] that takes the texts nearest to the pictures, within the leading principal
    components of the wider side, as many as the narrower has dimensions."""
    count = min(cross.shape)
    image_axes, text_axes = (
        torch.linalg.eigh(gram).eigenvectors[:, -count:] if len(gram) > count else torch.eye(count).to(gram)
        for gram in (image_gram, text_gram)
    )  # [D, count]
    left, _, right = torch.linalg.svd(image_axes.T @ cross @ text_axes)
    return image_axes @ (left @ right) @ text_axes.T
