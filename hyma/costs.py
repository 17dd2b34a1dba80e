"""What things cost: FLOPs of everything, one counter, and the ledger that compares methods."""

import numpy as np
import torch

import vlm
from hyma.embeddings import split_rows, unique


def flop_counter():
    """Entered, it counts the FLOPs of torch's own products and factorisations, 2 a multiply-add: .get_total_flops(). The
    kernels' it does not see."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    return FlopCounterMode(display=False, custom_mapping=FACTORISATIONS)


FACTORISATIONS = {  # of D x D unless said otherwise (Golub and Van Loan, sections 4.2, 5.2, 8.3 and 8.6)
    torch.ops.aten.linalg_cholesky_ex: lambda x, *_, **__: x[-1] ** 3 // 3,
    torch.ops.aten.cholesky_solve: lambda y, x, *_, **__: 2 * x[-1] ** 2 * y[-1],
    torch.ops.aten.linalg_solve_triangular: lambda x, y, *_, **__: x[-1] ** 2 * y[-1],
    torch.ops.aten.linalg_qr: lambda x, *_, **__: 4 * x[-1] ** 2 * x[-2] - 4 * x[-1] ** 3 // 3,  # n x k, forming Q
    torch.ops.aten._linalg_eigh: lambda x, *_, **__: 9 * x[-1] ** 3,
    torch.ops.aten._linalg_svd: lambda x, *_, **__: 22 * min(x) ** 3,
}


def connector_flops(batch_size, shapes):
    """Of a connector with layers [(out, in)] on a batch, forward and backward, 2 a multiply-add.

    The first layer's inputs are frozen embeddings, which get no gradient.
    """
    return batch_size * sum((4 if depth == 0 else 6) * out * into for depth, (out, into) in enumerate(shapes))


def logit_flops(batch_size, dims):
    """Of the similarities of a batch with itself, for pictures of these widths, forward and backward."""
    return sum(4 * batch_size**2 * dim for dim in dims)


def procrustes_flops(image_dim, text_dim):
    """Products, eigenvectors (9 n^3) and singular vectors (22 n^3; Golub and Van Loan, sections 8.3 and 8.6)."""
    narrow, wide = sorted((image_dim, text_dim))
    products = 4 * narrow * image_dim * text_dim + 2 * narrow**2 * (image_dim + text_dim) + 2 * narrow**3
    return products + 22 * narrow**3 + (9 * wide**3 if wide > narrow else 0)


FREE = {"flops": 0, "seconds": 0.0, "rows": 0}  # what it costs to look at names, or at nothing


# Forward cost of the registered encoders in GFLOP, 2 a multiply-add: of a picture, counted by FlopCounterMode on the
# pinned timm models; of a token, twice the weights of the transformer's blocks (12 layers width^2).
PICTURE_GFLOP = {
    "vit_s16": 9.197, "deit_s16": 9.197, "deit3_s16": 9.197, "vit_b16": 35.13, "deit_b16": 35.13, "deit3-ft_b16": 35.13,
    "vit_l16": 123.1, "deit3-ft_l16": 382.1, "eva2-ft_l16": 723.5, "efflite0": 0.768, "efflite1": 1.198,
    "efflite2": 1.717, "control": 3.627,
}  # fmt: skip

TOKEN_GFLOP = {"minilm_l6": 0.0212, "minilm": 0.0425, "mpnet": 0.170, "roberta": 0.604}

TOKENS_A_WORD = 1.4

COSTS = (
    "flops", "seconds", "pair_samples", "flops_equal_batch", "flops_equal_updates", "updates_low", "updates_high",
    "batch_size", "rows_embedded", "embedding_flops", "flops_with_embedding",
)  # fmt: skip


def ledger(method, data, pairs, reference):
    """What a method cost, the mean over its seeds: FLOPs as run, at the batch size of the reference (a trained run's
    ledger), and at its updates too; seconds, pair-samples, updates of a pair, rows embedded (rows x encoders), and the
    FLOPs with those of embedding. None where it is not known: of connectors alone, or of an encoder's forward pass.

    Embedding counts rows to train on and to choose by, or a selector's few, for each encoder.
    """
    names, row = unique(name for pair in pairs for name in pair), dict.fromkeys(COSTS)
    if method.runs and not method.trained:
        return row
    if method.runs:
        first = method.runs[0]
        used = sum(len(rows) for rows in split_rows(data, first.seed, first.flags.get("rows")))
        each = [run_costs(run, data, reference) for run in method.runs]
        row |= {key: float(np.mean([costs[key] for costs in each])) for key in each[0]}
        updates = [count for run in method.runs for count in run.ledger["updates_per_pair"].values()]
        row |= {"updates_low": min(updates), "updates_high": max(updates), "batch_size": first.ledger["batch_size"]}
    else:
        spent, row["seconds"], used = method.cost.values()
        row |= dict.fromkeys(("flops", "flops_equal_batch", "flops_equal_updates"), spent)
        row |= {"pair_samples": used * len(pairs), "updates_low": 0, "updates_high": 0}
    embedding = embedding_flops(data, names, used)
    with_embedding = None if embedding is None else row["flops"] + embedding
    row |= {"rows_embedded": used * len(names), "embedding_flops": embedding, "flops_with_embedding": with_embedding}
    return row


def run_costs(run, data, reference):
    """What a run's FLOPs would be at another batch size: those of the logits go with the batch, and what the `mlp`
    generator spends on predicting goes with the steps; the rest goes with the samples."""
    costs = {key: run.ledger[key] for key in ("flops", "seconds", "pair_samples")}
    if run.flags.get("closed_form"):
        return costs | {"flops_equal_batch": costs["flops"], "flops_equal_updates": costs["flops"]}
    batches = reference["batch_size"] / run.ledger["batch_size"]
    equal_batch = costs["flops"] + run.ledger["logit_flops"] * (batches - 1)
    if run.flags.get("generator") == "mlp":
        predicting = costs["flops"] - run.ledger["logit_flops"]
        for image, text in run.ranks:
            widths = [data.encoders[text].dim] + [vlm.HIDDEN_DIM] * run.hidden_layers + [data.encoders[image].dim]
            samples = run.ledger["batch_size"] * run.ledger["updates_per_pair"][f"{image}:{text}"]
            predicting -= connector_flops(samples, list(zip(widths[1:], widths)))
        equal_batch += predicting * (1 / batches - 1)
    # At one batch size, updates go with samples; a pair that is only predicted has none, and needs none.
    samples = [
        each["pair_samples"] / sum(map(bool, each["updates_per_pair"].values())) for each in (reference, run.ledger)
    ]
    return costs | {"flops_equal_batch": equal_batch, "flops_equal_updates": equal_batch * samples[0] / samples[1]}


def embedding_flops(data, names, rows):
    """Of `rows` rows through every encoder, or None if the cost of one is not known."""
    total = 0
    for name in names:
        encoder, known = data.encoders[name], vlm.ENCODERS.get(name)
        per = (PICTURE_GFLOP if encoder.kind == "image" else TOKEN_GFLOP).get(name)
        if per is None or known.spec != encoder.spec or (encoder.kind == "text" and not data.rows):
            return None
        if encoder.kind == "text":
            words = sum(len(row["caption"].split()) for row in data.rows) / len(data.rows)
            per *= 2 + TOKENS_A_WORD * words
        total += rows * per * 1e9
    return int(total)


def times(cost, base, key):
    """How many times as much, or None where it is not known."""
    return cost[key] / base[key] if cost[key] is not None and base[key] else None
