"""Connectors without training: covariances, whitened maps, ridge regression, Procrustes, cross-validation.

Functions take statistics of rows and return maps; who needs a connector, or a generator to start from, loads them.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hyma.embeddings import seeded_generator, unique
from hyma.metrics import Retrieval, mean_recalls
from vlm import BadInput

# Regularisation is in mean eigenvalues of the Gram matrix that it is added to.
TEXT_RIDGE = SHARED_RIDGE = 0.3  # of texts and of the shared axes, where a hypernetwork starts
PICTURE_RIDGE = 3.0  # of pictures in a whitened map
RIDGE_CHOICES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of texts, where validation chooses for each pair
SHARED_RMS = 0.1  # of the shared axes' coordinates: smaller, and training moves the text parts more


def regularised(gram, strength):
    """A Gram matrix [D, D] with `strength` times its mean eigenvalue added to its diagonal.

    The mean eigenvalue of rows that are all the same is zero: what is added then is just enough to invert.
    """
    smallest = torch.finfo(gram.dtype).tiny ** 0.5
    return gram + (strength * gram.trace() / len(gram)).clamp(min=smallest) * torch.eye(len(gram)).to(gram)


def without_mean_direction(weight, mean):
    """A map [D, m] without the direction of the mean [D] in its outputs: it scores pictures as if they were centred."""
    direction = F.normalize(mean, dim=0)
    return weight - direction[:, None] * (direction @ weight)


class Covariance:
    """Rows [n, D], centred, and their Gram matrix [D, D]. strength: of its regularisation, in mean eigenvalues."""

    def __init__(self, rows, strength):
        self.mean = rows.mean(0)
        self.strength = strength
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


def whitened_map(product, inputs, outputs):
    """C_yy^-1 C_yx C_xx^-1 [out, in] of the Covariances of inputs x and outputs y, and their product C_yx.

    To first order in the correlation this is the bilinear score of Gaussian vectors that InfoNCE looks for, log p(x, y) /
    p(x) p(y) (van den Oord et al., arXiv 1807.03748, section 2.3). Ridge regression lacks the first factor: it follows the
    directions in which pictures differ most.
    """
    weight = outputs.solve(inputs.solve(product.T).T)
    return without_mean_direction(weight, outputs.mean)


# --------------------------------------------------------------- one text, one image: maps in float64, untrained runs


def mean_of(store, name, rows, block=8192):
    """The mean vector [D] of an encoder's rows, float64."""
    return sum(store.take(name, part).double().sum(0) for part in rows.split(block)) / len(rows)


def cross_covariance(store, left, right, rows, means, block=8192):
    """Sum over the rows of (left - its mean) (right - its mean)^T: [D_left, D_right], float64."""
    total = 0
    for part in rows.split(block):
        centred_left = store.take(left, part).double() - means[left]
        centred_right = store.take(right, part).double() - means[right]
        total = total + centred_left.T @ centred_right
    return total


def ridge_factors(text_gram):
    """{strength: Cholesky factor of the regularised Gram matrix}, for `ridge_maps` and `whitened_maps`."""
    return {strength: torch.linalg.cholesky(regularised(text_gram, strength)) for strength in RIDGE_CHOICES}


def ridge_maps(cross, factors):
    """Ridge regression {strength: C_yx C_xx^-1 [D_i, D_t]}. cross: C_yx."""
    return {strength: torch.cholesky_solve(cross.T, factor).T for strength, factor in factors.items()}


def whitened_maps(cross, factors, image_gram):
    """The same with the pictures whitened too, {strength: C_yy^-1 C_yx C_xx^-1 [D_i, D_t]}; see `whitened_map`."""
    image_factor = torch.linalg.cholesky(regularised(image_gram, PICTURE_RIDGE))
    maps = ridge_maps(cross, factors)
    return {strength: torch.cholesky_solve(weight, image_factor) for strength, weight in maps.items()}


def procrustes_map(cross, image_gram, text_gram):
    """The orthogonal map [D_i, D_t] that takes the texts nearest to the pictures, within the leading principal
    components of the wider side, as many as the narrower has dimensions."""
    count = min(cross.shape)
    image_axes = principal_axes(image_gram, count)
    text_axes = principal_axes(text_gram, count)
    left, _, right = torch.linalg.svd(image_axes.T @ cross @ text_axes)
    return image_axes @ (left @ right) @ text_axes.T


def principal_axes(gram, count):
    """The leading eigenvectors [D, count] of a Gram matrix; of all D, the axes themselves."""
    if len(gram) == count:
        return torch.eye(count).to(gram)
    return torch.linalg.eigh(gram).eigenvectors[:, -count:]


# ------------------------------------------------------------- all encoders through shared axes: where training starts


class SharedAxes(NamedTuple):
    """Encoders' rows beside coordinates s [n, m] that all text encoders share, fold by fold."""

    covariances: dict  # encoder -> Covariance of its rows
    shared: Covariance  # of s
    products: dict  # encoder -> its rows.T @ s, [folds, D, m]
    sizes: list  # rows of each fold

    def product(self, name):
        """An encoder's rows.T @ s over all folds: [D, m]."""
        return self.products[name].sum(0)


def share_axes(store, folds, images, texts, width, axes_of):
    """The SharedAxes of these encoders on the rows of the folds, with `width` axes made from the texts of `axes_of`."""
    rows = torch.cat(folds)
    sizes = [len(fold) for fold in folds]
    covariances = {}
    for name in tqdm(images + texts, desc="start", unit="encoder"):
        strength = PICTURE_RIDGE if name in images else TEXT_RIDGE
        covariances[name] = Covariance(store.take(name, rows), strength)
    shared = Covariance(leading_axes([covariances[text].rows for text in axes_of], width), SHARED_RIDGE)
    products = {}
    for name, covariance in covariances.items():
        by_fold = zip(covariance.rows.split(sizes), shared.rows.split(sizes))
        products[name] = torch.stack([x.T @ s for x, s in by_fold])
    return SharedAxes(covariances, shared, products, sizes)


def leading_axes(texts, width):
    """Coordinates s [n, width] along the principal axes of several encoders' texts [n, D_t], side by side."""
    beside = torch.cat([x / at_least_tiny(x.norm()) for x in texts], dim=1)  # [n, sum D_t]
    count = min(width, *beside.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        axes = torch.pca_lowrank(beside, count, center=False, niter=1)[2]  # [sum D_t, count]
    s = (beside @ axes)[:, torch.arange(width) % count]  # few narrow texts: axes stand twice
    return s * (SHARED_RMS * s.numel() ** 0.5 / at_least_tiny(s.norm()))


def at_least_tiny(norm):
    """A norm to divide by: zeros, of texts that are all the same, stay zeros."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.5)


class ImageMap(NamedTuple):
    """From s to an image encoder's pictures: axes @ (weight @ (s - mean))."""

    axes: torch.Tensor  # [D, k] orthonormal
    weight: torch.Tensor  # [k, m]
    bias: torch.Tensor  # [k], -weight @ mean


def image_map(product, shared, pictures, rank):
    """The whitened map from s to pictures along `rank` axes of theirs, its outputs of unit length in the mean.

    product: pictures.T @ s [D, m]. shared, pictures: Covariances. The axes are the leading directions of the outputs, or,
    where all of these fit, any basis of them and of as much more as makes `rank` columns.
    """
    weight = whitened_map(product, shared, pictures)  # [D, m]
    if min(weight.shape) > rank:
        spread = torch.linalg.cholesky(regularised(shared.gram, 1e-4))
        axes = torch.svd_lowrank(weight @ spread, rank, niter=2)[0]
    else:
        filled = torch.cat([weight, torch.eye(len(weight), rank).to(weight)], dim=1)
        axes = torch.linalg.qr(filled[:, :rank]).Q
    weight = axes.T @ weight
    weight /= at_least_tiny((shared.rows @ weight.T).norm(dim=1).mean())
    return ImageMap(axes, weight, -weight @ shared.mean)


# ----------------------------------------------------------------------------------------------------- cross-validation


def fold_rows(data, rows, val_rows, seed):
    """At most 16,384 of the training rows: three folds, each about as large as the validation rows, and last the rest. All
    captions of a picture are in one."""
    rows = rows[:: math.ceil(len(rows) / 16384)]
    pictures = [data.rows[i]["image"] for i in rows.tolist()] if data.rows else rows.tolist()
    number = {name: k for k, name in enumerate(unique(pictures))}
    if len(number) < 2:
        raise BadInput(f"{data.folder}: one picture alone is left to train on; two are the least")
    count = min(len(number), max(3, round(len(rows) / len(val_rows))))
    order = torch.randperm(len(number), generator=seeded_generator("folds", seed))
    fold_of_picture = order * count // len(number)  # [pictures]
    fold_of = fold_of_picture[torch.tensor([number[name] for name in pictures])]  # [n]
    folds = [rows[fold_of == k] for k in range(min(3, count))]
    return [*folds, rows[fold_of >= 3]]


def cross_validate(axes, folds, data, pairs):
    """R@10 of the closed form on rows it has not seen, mean of both directions: {"image:text": a value for each of the
    folds but the last, by the maps of all other rows}.

    axes: the SharedAxes of the folds. Only the pictures' Gram matrix keeps the fold: it knows of no text, and its strong
    regularisation leaves a fold little weight.
    """
    retrievals = [Retrieval(data, fold, axes.shared.mean.device) for fold in folds[:-1]]
    mapped = {text: map_left_out_texts(axes, text) for text in unique(text for _, text in pairs)}  # [h, m] a fold
    recall10 = {":".join(pair): [] for pair in pairs}
    for image in tqdm(unique(image for image, _ in pairs), desc="cross-validate", unit="encoder"):
        pictures = axes.covariances[image]
        for k, (y, _, product) in enumerate(left_out(axes, image)):
            weight = without_mean_direction(pictures.solve(product), pictures.mean)  # [D, m]
            # Along the columns of `root` outputs have the lengths and products that they have in the pictures' space.
            root = torch.linalg.cholesky(regularised(weight.T @ weight, 1e-4))  # [m, m]
            candidates = torch.linalg.solve_triangular(root, (y @ weight).T, upper=False).T  # [h, m]
            for text in (text for other, text in pairs if other == image):
                six = retrievals[k].recalls(mapped[text][k] @ root, candidates)
                recall10[f"{image}:{text}"].append(mean_recalls(six)[2])
    return recall10


def left_out(axes, name):
    """For each fold but the last: its rows [h, D] of an encoder, their s [h, m], and the product of all other rows with
    theirs [D, m]."""
    others = axes.product(name) - axes.products[name]  # [folds, D, m]
    return zip(axes.covariances[name].rows.split(axes.sizes)[:-1], axes.shared.rows.split(axes.sizes), others)


def map_left_out_texts(axes, text):
    """[[h, m] for each fold but the last]: C_ss^-1 times the s that ridge regression predicts from a text it has not seen."""
    covariance, mapped = axes.covariances[text], []
    for x, s, product in left_out(axes, text):
        predicted = x @ covariance.solve_without(x, product)  # [h, m]
        mapped.append(axes.shared.solve_without(s, predicted.T).T)
    return mapped
