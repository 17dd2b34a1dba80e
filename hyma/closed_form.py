"""The closed form that training starts from: whitened maps through a space that all texts share, and their cross-validation.

A generator takes the maps in (`FactoredHypernetwork.initialise_from_closed_form`). Those of single pairs, which are connectors
as they are, are in `hyma/fitted_connectors.py`. Notation: x text vectors, y image vectors, s coordinates of the shared space,
each centred; C_yx = sum of y x^T over the rows [D_i, D_t].
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hyma.metrics import Retrieval, number_names
from hyma.pair_names import pair_name
from hyma.pairs import images_of, texts_of
from hyma.seeds import seeded_generator
from vlm import BadInput

# A Gram matrix is regularised as if so many rows of isotropic noise stood among its rows, each as long as those are on
# average: few rows need it, many can do without. Chosen on 1,800 to 17,000 icons, shown on clip art (NOTES.md).
TEXT_NOISE_ROWS = 1000  # beside texts, and beside the shared space's coordinates
IMAGE_NOISE_ROWS = 4000  # beside images, in a whitened map
FOLDS = 2  # that cross-validation leaves out, one at a time
HELD_OUT_ROWS = 2048  # of these folds together
MOST_COSINES = 2**29  # of all pairs: as each adds its own, more than 128 pairs (512 of mlp0) have fewer rows in the folds
MOST_START_ROWS = 32768  # of the training rows, which bounds the memory of the start
AXES_ROWS_STEP, LEAST_AXES_ROWS = 4, 2048  # of the start's rows, those that the shared axes are found on
SHARED_RMS = 0.1  # of the shared space's coordinates: smaller ones let training move the text parts more


def gram_matrix(rows):
    """rows.T @ rows [D, D] of rows [n, D]. As it is symmetric, only one of the two blocks beside the diagonal is computed."""
    width = rows.shape[1]
    if width <= 256:
        return rows.T @ rows
    left, right = rows[:, : width // 2], rows[:, width // 2 :]
    cross = left.T @ right
    return torch.cat([torch.cat([gram_matrix(left), cross], 1), torch.cat([cross.T, gram_matrix(right)], 1)])


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


class CentredRows:
    """Rows [n, D] minus their mean, and their Gram matrix [D, D], the unnormalised covariance.

    rows: are centred in place. noise_rows: how many rows of isotropic noise the Gram matrix is regularised by.
    """

    def __init__(self, rows, noise_rows):
        self.mean = rows.mean(0)  # [D]
        self.strength = noise_rows / len(rows)
        self.rows = rows.sub_(self.mean)  # [n, D]
        self.gram = gram_matrix(self.rows)  # [D, D]
        self.factor = torch.linalg.cholesky(regularised(self.gram, self.strength))  # [D, D], lower

    def solve(self, cross):
        """The regularised inverse of the Gram matrix times `cross` [D, m]. With cross = rows.T @ outputs this is ridge
        regression from the rows to the outputs."""
        return torch.cholesky_solve(cross, self.factor)

    def solve_without(self, rows, cross):
        """The same as if `rows` [h, D], some of its own, had not been among them."""
        gram = regularised(self.gram - gram_matrix(rows), self.strength)
        return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))


def whitened_map(cross, inputs, outputs):
    """C_yy^-1 C_yx C_xx^-1 [out, in], without the direction of the outputs' mean (`without_mean_direction`).

    cross: C_yx, outputs.T @ inputs. inputs, outputs: the CentredRows x and y.

    To first order in the correlation this is the optimal bilinear score of Gaussian vectors under InfoNCE, log p(x, y) /
    p(x) p(y) (van den Oord et al., arXiv 1807.03748, section 2.3). Ridge regression lacks the first factor: it follows the
    directions in which pictures differ most.
    """
    weight = outputs.solve(inputs.solve(cross.T).T)
    return without_mean_direction(weight, outputs.mean)


def principal_axes(gram, count):
    """The leading eigenvectors [D, count] of a Gram matrix; of all D, the axes themselves."""
    if len(gram) == count:
        return torch.eye(count).to(gram)
    return torch.linalg.eigh(gram).eigenvectors[:, -count:]


# ------------------------------------------------------------------------------- all encoders through a shared space


class SharedSpace(NamedTuple):
    """Rows in each encoder's own space and in one that all text encoders share, where row i has the coordinates s [n, m].

    Sums over rows are kept fold by fold, so that cross-validation can leave one out.
    """

    encoders: dict  # encoder -> CentredRows of its rows
    shared: CentredRows  # of s
    cross_of_folds: dict  # encoder -> its rows.T @ s, [folds, D, m]
    sizes: list  # rows of each fold

    def cross(self, name):
        """An encoder's rows.T @ s over all folds: [D, m]."""
        return self.cross_of_folds[name].sum(0)


def make_shared_space(store, folds, image_names, text_names, width, spanned_by):
    """The SharedSpace of these encoders on the rows of the folds. `width` principal axes of the texts of the encoders
    `spanned_by` span it."""
    rows = torch.cat(folds)
    sizes = [len(fold) for fold in folds]
    encoders = {}
    for name in tqdm(image_names + text_names, desc="start", unit="encoder"):
        noise_rows = IMAGE_NOISE_ROWS if name in image_names else TEXT_NOISE_ROWS
        encoders[name] = CentredRows(store.take(name, rows), noise_rows)
    coordinates = leading_coordinates([encoders[name].rows for name in spanned_by], width)  # [n, width]
    shared = CentredRows(coordinates, TEXT_NOISE_ROWS)
    cross_of_folds = {}
    for name, centred in encoders.items():
        of_folds = []
        for x, s in zip(centred.rows.split(sizes), shared.rows.split(sizes)):
            of_folds.append(x.T @ s)  # [D, m]
        cross_of_folds[name] = torch.stack(of_folds)
    return SharedSpace(encoders, shared, cross_of_folds, sizes)


def leading_coordinates(text_rows, width):
    """Coordinates s [n, width] along the principal axes of the concatenated texts of several encoders, each [n, D_t] and
    scaled to the same norm. Their root mean square is SHARED_RMS. Every AXES_ROWS_STEP-th row finds the axes, so that they cost
    no more than the coordinates; of few rows, more of them."""
    scaled = [x / at_least_tiny(x.norm()) for x in text_rows]
    concatenated = torch.cat(scaled, dim=1)  # [n, sum D_t]
    some = concatenated[:: max(1, min(AXES_ROWS_STEP, len(concatenated) // LEAST_AXES_ROWS))]
    count = min(width, *some.shape)
    with torch.random.fork_rng(devices=[]):  # pca_lowrank draws random directions: the same ones for every seed
        torch.manual_seed(0)
        axes = torch.pca_lowrank(some, count, center=False, niter=1)[2]  # [sum D_t, count]
    s = (concatenated @ axes)[:, torch.arange(width) % count]  # few narrow texts: axes are repeated
    return s * (SHARED_RMS * s.numel() ** 0.5 / at_least_tiny(s.norm()))


def at_least_tiny(norm):
    """A norm to divide by: zeros, of texts that are all the same, stay zeros."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.5)


class ImageMap(NamedTuple):
    """From s to an image encoder's pictures: axes @ (weight @ (s - mean))."""

    axes: torch.Tensor  # [D, k] orthonormal
    weight: torch.Tensor  # [k, m]
    bias: torch.Tensor  # [k], -weight @ mean


def image_map(cross, shared, pictures, rank):
    """The whitened map from s to pictures along k = `rank` axes of theirs, its outputs of unit length in the mean.

    cross: pictures.T @ s [D, m]. shared, pictures: CentredRows. The axes are the leading directions of the outputs W s, the
    left singular vectors of W L with C_ss = L L^T; where all of the pictures' space fits, its own axes; where all outputs
    fit, any basis of them and of as much more as makes k columns.
    """
    weight = whitened_map(cross, shared, pictures)  # W [D, m]
    if len(weight) == rank:
        axes = torch.eye(rank).to(weight)  # which need no product
    elif min(weight.shape) > rank:
        spread = torch.linalg.cholesky(regularised(shared.gram, 1e-4))  # L [m, m]
        outputs = weight @ spread  # [D, m]
        axes = torch.linalg.qr(outputs @ principal_axes(gram_matrix(outputs), rank)).Q  # [D, k]
    else:
        filled = torch.cat([weight, torch.eye(len(weight), rank).to(weight)], dim=1)  # [D, m + k]
        axes = torch.linalg.qr(filled[:, :rank]).Q  # [D, k]
    weight = axes.T @ weight  # [k, m]
    weight /= at_least_tiny((shared.rows @ weight.T).norm(dim=1).mean())
    return ImageMap(axes, weight, -weight @ shared.mean)


# ----------------------------------------------------------------------------------------------------- cross-validation


def fold_rows(data, rows, seed, pair_count=1, held_out_rows=HELD_OUT_ROWS):
    """[rows of each of FOLDS folds, rows of none of them]: at most MOST_START_ROWS of the training rows, evenly spaced. The
    folds have `held_out_rows` together, fewer for many pairs (MOST_COSINES), or all there are, and all captions of a picture
    are in one."""
    if len(rows) > MOST_START_ROWS:
        rows = rows[torch.arange(MOST_START_ROWS) * len(rows) // MOST_START_ROWS]
    images = rows.tolist()  # what tells images apart: where the folder has no rows.jsonl, each row has its own
    if data.rows:
        images = [data.rows[i]["image"] for i in images]
    place, first = number_names(images)  # [n], [images]
    image_count = len(first)
    if image_count < 2:
        raise BadInput(f"{data.folder}: only one picture is left to train on; at least two are needed")
    held_out_rows = min(held_out_rows, math.isqrt(MOST_COSINES // pair_count))
    fold_count = min(image_count, max(FOLDS, round(FOLDS * len(rows) / held_out_rows)))
    order = torch.randperm(image_count, generator=seeded_generator("folds", seed))
    fold_of_image = order * fold_count // image_count  # [images]
    fold_of_row = fold_of_image[place]  # [n]
    folds = [rows[fold_of_row == k] for k in range(min(FOLDS, fold_count))]
    return [*folds, rows[fold_of_row >= FOLDS]]


def cross_validate(space, folds, data, pairs):
    """The mean of R@1, R@5, R@10 of the closed form on rows it has not seen, of both directions: {"image:text": a value for
    each of the folds but the last, by the maps of all other rows}. Candidates are the rows of all these folds, each text
    mapped without its own fold: nothing here may be chosen with all rows, as the axes of `image_map` are.

    space: the SharedSpace of the folds.
    """
    retrieval = Retrieval(data, torch.cat(folds[:-1]), space.shared.mean.device)
    fold_of_row = torch.repeat_interleave(torch.arange(len(folds) - 1), torch.tensor(space.sizes[:-1]))  # [h]
    is_first_of_caption = torch.zeros(len(fold_of_row), dtype=torch.bool)
    is_first_of_caption[retrieval.first["caption"].cpu()] = True
    mapped = {}
    for text in texts_of(pairs):
        mapped[text] = []  # of each fold, [its captions, m]
        for outputs, is_first in zip(map_held_out_texts(space, text), is_first_of_caption.split(space.sizes[:-1])):
            mapped[text].append(outputs[is_first])
    recalls = {}
    for image in tqdm(images_of(pairs), desc="cross-validate", unit="encoder"):
        centred = space.encoders[image]
        vectors = centred.rows[retrieval.first["image"]]  # [images, D]
        texts = [text for other, text in pairs if other == image]
        cosines = {text: [] for text in texts}  # of each fold's captions with all images, [captions of the fold, images]
        for k, (y, _, cross) in enumerate(held_out(space, image)):
            weight = without_mean_direction(centred.solve_without(y, cross), centred.mean)  # [D, m]
            projected = (vectors @ weight).T  # [m, images]
            gram = gram_matrix(weight)  # [m, m]: s^T gram s is the squared length of weight @ s, which is never formed
            for text in texts:
                s = mapped[text][k]
                lengths = torch.linalg.vecdot(s @ gram, s).clamp(min=0).sqrt()  # [captions of the fold]
                cosines[text].append((s / at_least_tiny(lengths)[:, None]) @ projected)
        for text in texts:
            scores = torch.cat(cosines[text])  # [captions, images]
            recalls[pair_name((image, text))] = recall_of_folds(retrieval, scores, fold_of_row.to(scores.device))
    return {pair_name(pair): recalls[pair_name(pair)] for pair in pairs}


def recall_of_folds(retrieval, scores, fold_of_row):
    """[mean of R@1, R@5, R@10 of the queries of each fold, both directions]. scores [captions, images]: of the candidates of
    `retrieval`. fold_of_row [n]. A query is of the fold of its first row."""
    fold_count = int(fold_of_row.max()) + 1
    total = 0
    for query, ranks in zip(("caption", "image"), retrieval.ranks_of_scores(scores)):
        fold = fold_of_row[retrieval.first[query]]
        found = sum((ranks < k).double() for k in retrieval.ks) / len(retrieval.ks)  # [queries], 0 to 1
        hits = torch.bincount(fold, found, minlength=fold_count)
        total = total + hits / torch.bincount(fold, minlength=fold_count).clamp(min=1)
    return (total / 2).tolist()


def held_out(space, name):
    """For each fold but the last: its rows [h, D] of an encoder, their s [h, m], and rows.T @ s of all other rows [D, m]."""
    others = space.cross(name) - space.cross_of_folds[name]  # [folds, D, m]
    return zip(space.encoders[name].rows.split(space.sizes)[:-1], space.shared.rows.split(space.sizes), others)


def map_held_out_texts(space, text):
    """[[h, m] for each fold but the last]: C_ss^-1 times the s that ridge regression predicts from a text it has not seen."""
    centred, mapped = space.encoders[text], []
    for x, s, cross in held_out(space, text):
        predicted = x @ centred.solve_without(x, cross)  # [h, m]
        mapped.append(space.shared.solve_without(s, predicted.T).T)
    return mapped
