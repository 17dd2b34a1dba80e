"""A linear connector of each pair by a closed form: what train_grid.py --closed-form writes. Nothing is trained.

Maps are found in float64, of one text and one image encoder at a time. Notation as in `hyma/closed_form.py`: x text vectors,
y image vectors, each centred; C_yx = sum of y x^T over the rows [D_i, D_t].
"""

import time

import torch
import torch.nn.functional as F

from hyma.closed_form import IMAGE_NOISE_ROWS, principal_axes, regularised, without_mean_direction
from hyma.costs import flop_counter
from hyma.grid_state import keep_best, new_state
from hyma.machine import peak_bytes
from hyma.pair_names import pair_name
from hyma.pairs import group_by_text, images_of, texts_of
from hyma.training import mean_recall10
from hyma.unicon import unicon_map

RIDGE_CHOICES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # strengths for texts, of which validation chooses for each pair


def fit_connectors(kind, pairs, store, retrieval, rows):
    """Fits every pair's map in float64, its strength chosen by validation. Returns the state as after training
    (`grid_state.new_state`), with one step and one update of each pair.

    kind: ridge, whitened, procrustes or unicon. store: a RowStore. retrieval: Retrieval of the validation rows. rows
    [n]: to fit on.

    The bias of a linear connector can centre the texts, but nothing in the file can centre the pictures. A map whose outputs
    are perpendicular to the pictures' mean scores a picture as if the mean had been subtracted, but for its length, so the
    mean's direction is removed from the outputs.
    """
    state = new_state(pairs)
    started = time.perf_counter()
    covariances = Covariances(store, rows, images_of(pairs) + texts_of(pairs))
    for text, group in group_by_text(pairs).items():
        texts = store.take(text, retrieval.rows)  # [n, D_t]
        with flop_counter() as counter:
            text_gram = covariances.between(text, text) if kind != "unicon" else None  # [D_t, D_t]
            factors = ridge_factors(text_gram) if kind in ("ridge", "whitened") else {}
        state["flops"] += counter.get_total_flops()
        for image, _ in group:
            pair = pair_name((image, text))
            images = store.take(image, retrieval.rows)  # [n, D_i]
            with flop_counter() as counter:
                if kind == "unicon":
                    centred = [(store.take(name, rows) - covariances.means[name]).float() for name in (text, image)]
                    maps = {None: unicon_map(*centred).double()}
                else:
                    maps = maps_of_pair(kind, covariances, image, text, text_gram, factors)
            state["flops"] += counter.get_total_flops()
            for strength, weight in maps.items():  # weight [D_i, D_t], float64
                weight = without_mean_direction(weight, covariances.means[image])
                bias = (-weight @ covariances.means[text]).float()  # [D_i]
                weight = weight.float()
                six = retrieval.recalls(F.linear(texts, weight, bias), images)
                card_info = {"closed_form": kind, "regularisation": strength}
                keep_best(state, pair, six, [(weight, bias)], card_info)
            state["updates"][pair] = 1
    state["start_flops"] = state["flops"]
    state["step"] = 1
    state["seconds"] = time.perf_counter() - started
    state["peak_bytes"] = peak_bytes(store.device)
    recalls = {name: best["recalls"] for name, best in state["best"].items()}
    line = {
        "epoch": 1,
        "step": 1,
        "val_recall10": mean_recall10(recalls),
        "seconds": state["seconds"],
        "recalls": recalls,
    }
    state["metrics"].append(line)
    return state


# ------------------------------------------------------------------------------------------------------ maps of a pair


class Covariances:
    """Means [D] and sums of products [D_left, D_right] of encoders' vectors over fixed rows, float64, unnormalised."""

    def __init__(self, store, rows, names, block=8192):
        """names: the encoders. block: rows taken at a time, which bounds the memory."""
        self.store = store
        self.row_count = len(rows)
        self.blocks = rows.split(block)
        self.means = {}  # encoder -> [D]
        for name in names:
            total = 0
            for part in self.blocks:
                total = total + store.take(name, part).double().sum(0)
            self.means[name] = total / len(rows)

    def between(self, left, right):
        """Sum over the rows of (left - its mean) (right - its mean)^T: [D_left, D_right]."""
        total = 0
        for part in self.blocks:
            centred_left = self.store.take(left, part).double() - self.means[left]  # [block, D_left]
            centred_right = self.store.take(right, part).double() - self.means[right]  # [block, D_right]
            total = total + centred_left.T @ centred_right
        return total


def maps_of_pair(kind, covariances, image, text, text_gram, factors):
    """{strength: map [D_i, D_t]} of a pair, from texts to pictures; Procrustes has no strength.

    kind: ridge, whitened or procrustes. text_gram: C_xx [D_t, D_t]. factors: its `ridge_factors`; Procrustes needs none.
    """
    cross = covariances.between(image, text)  # C_yx [D_i, D_t]
    if kind == "ridge":
        return ridge_maps(cross, factors)
    image_gram = covariances.between(image, image)  # C_yy [D_i, D_i]
    if kind == "whitened":
        return whitened_maps(cross, factors, image_gram, covariances.row_count)
    return {None: procrustes_map(cross, image_gram, text_gram)}


def ridge_factors(text_gram):
    """{strength: Cholesky factor [D_t, D_t] of the regularised Gram matrix}, for `ridge_maps` and `whitened_maps`."""
    factors = {}
    for strength in RIDGE_CHOICES:
        factors[strength] = torch.linalg.cholesky(regularised(text_gram, strength))
    return factors


def ridge_maps(cross, factors):
    """Ridge regression {strength: C_yx C_xx^-1 [D_i, D_t]}. cross: C_yx."""
    maps = {}
    for strength, factor in factors.items():
        maps[strength] = torch.cholesky_solve(cross.T, factor).T
    return maps


def whitened_maps(cross, factors, image_gram, row_count):
    """The same with the pictures whitened too, {strength: C_yy^-1 C_yx C_xx^-1 [D_i, D_t]}; see `closed_form.whitened_map`, which
    also takes the direction of the outputs' mean away."""
    image_strength = IMAGE_NOISE_ROWS / row_count
    image_factor = torch.linalg.cholesky(regularised(image_gram, image_strength))  # [D_i, D_i]
    maps = ridge_maps(cross, factors)
    for strength, weight in maps.items():
        maps[strength] = torch.cholesky_solve(weight, image_factor)
    return maps


def procrustes_map(cross, image_gram, text_gram):
    """The orthogonal map [D_i, D_t] that brings texts nearest to their pictures (Schoenemann, Psychometrika 1966).

    U V^T, where U S V^T is the singular value decomposition of C_yx, in coordinates [k] along the k leading principal axes
    of both spaces, k being the smaller of their widths.
    """
    k = min(cross.shape)
    image_axes = principal_axes(image_gram, k)  # [D_i, k]
    text_axes = principal_axes(text_gram, k)  # [D_t, k]
    left, _, right = torch.linalg.svd(image_axes.T @ cross @ text_axes)  # U [k, k], V^T [k, k]
    return image_axes @ (left @ right) @ text_axes.T
