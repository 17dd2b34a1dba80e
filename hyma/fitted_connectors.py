"""A linear connector of each pair by a closed form: what train_grid.py --closed-form writes. Nothing is trained."""

import time

import torch.nn.functional as F

from hyma import closed_form
from hyma.costs import flop_counter
from hyma.grid_state import keep_best, new_state
from hyma.machine import peak_bytes
from hyma.pair_names import pair_name
from hyma.pairs import group_by_text, images_of, texts_of
from hyma.training import mean_recall10
from hyma.unicon import unicon_map


def fit_connectors(kind, pairs, store, retrieval, rows):
    """Fits every pair's map in float64, its strength chosen by validation. Returns the state as after training
    (`grid_state.new_state`), with one step and one update of each pair.

    kind: ridge, whitened, procrustes or unicon. store: a RowStore. retrieval: Retrieval of the validation rows. rows [n]: to fit on.

    The bias of a linear connector can centre the texts, but nothing in the file can centre the pictures. A map whose outputs
    are perpendicular to the pictures' mean scores a picture as if the mean had been subtracted, but for its length, so the
    mean's direction is removed from the outputs.
    """
    state = new_state(pairs)
    started = time.perf_counter()
    covariances = closed_form.Covariances(store, rows, images_of(pairs) + texts_of(pairs))
    for text, group in group_by_text(pairs).items():
        texts = store.take(text, retrieval.rows)  # [n, D_t]
        with flop_counter() as counter:
            text_gram = covariances.between(text, text) if kind != "unicon" else None  # [D_t, D_t]
            factors = closed_form.ridge_factors(text_gram) if kind in ("ridge", "whitened") else {}
        state["flops"] += counter.get_total_flops()
        for image, _ in group:
            pair = pair_name((image, text))
            images = store.take(image, retrieval.rows)  # [n, D_i]
            with flop_counter() as counter:
                if kind == "unicon":
                    centred = [(store.take(name, rows) - covariances.means[name]).float() for name in (text, image)]
                    maps = {None: unicon_map(*centred).double()}
                else:
                    maps = closed_form.maps_of_pair(kind, covariances, image, text, text_gram, factors)
            state["flops"] += counter.get_total_flops()
            for strength, weight in maps.items():  # weight [D_i, D_t], float64
                weight = closed_form.without_mean_direction(weight, covariances.means[image])
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
