"""What things cost, in FLOPs, 2 per multiply-add: a layer, the logits, a step; and the ledgers that compare methods.

To change what counts as a FLOP, or the formula of a step, change this file alone. A generator lists the layers that a
step runs, by shape (`Generator.flops`); a closed form is counted while it runs (`flop_counter`). A trainer adds up what
its steps cost and writes the sums as coefficients (`hyma.runs.write_results`); here they are multiplied, so code that
compares runs does not depend on how they were trained.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from vlm import HIDDEN_DIM

# --------------------------------------------------------------------------------------------------- counted by torch

# What torch's own counter does not count; factorisations are of D x D unless a comment says otherwise (Golub and Van Loan,
# sections 4.2, 5.2, 8.3 and 8.6).
EXTRA_FLOP_FORMULAS = {
    torch.ops.aten.linalg_cholesky_ex: lambda x, *_, **__: x[-1] ** 3 // 3,
    torch.ops.aten.cholesky_solve: lambda y, x, *_, **__: 2 * x[-1] ** 2 * y[-1],
    torch.ops.aten.linalg_solve_triangular: lambda x, y, *_, **__: x[-1] ** 2 * y[-1],
    torch.ops.aten.linalg_qr: lambda x, *_, **__: 4 * x[-1] ** 2 * x[-2] - 4 * x[-1] ** 3 // 3,  # n x k, forming Q
    torch.ops.aten._linalg_eigh: lambda x, *_, **__: 9 * x[-1] ** 3,
    torch.ops.aten._linalg_svd: lambda x, *_, **__: 22 * min(x) ** 3,
    # softmax(q k^T) v of heads [..., n, d], as torch counts it on a GPU: 4 n^2 d per head
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        2 * math.prod(q) * k[-2] + 2 * math.prod(q[:-1]) * k[-2] * v[-1]
    ),
}


def flop_counter():
    """Entered, it counts the FLOPs of torch's own products and factorisations: .get_total_flops(). It does not see those
    of the kernels: `step_flops` has the formulas."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    return FlopCounterMode(display=False, custom_mapping=EXTRA_FLOP_FORMULAS)


# ------------------------------------------------------------------------------------- the formulas of a training step


def linear_flops(rows, shape, weight_gradient=True, input_gradient=True):
    """FLOPs of one linear layer with a weight [out, in] on inputs [rows, in], forward and backward.

    2 rows out in for each of up to three matrix products: the outputs, the weight's gradient where the weight is trained,
    and the input's gradient where anything before the layer is trained.
    """
    out, into = shape
    products = 1 + weight_gradient + input_gradient
    return products * 2 * rows * out * into


def connector_shapes(text_dim, hidden_layers, image_dim):
    """[(out, in)] of a connector's layers, the first layer first."""
    dims = [text_dim] + [HIDDEN_DIM] * hidden_layers + [image_dim]
    return list(zip(dims[1:], dims))


def connector_flops(batch_size, shapes):
    """FLOPs of a trained connector with layers [(out, in)] on a batch. The first layer's inputs are frozen embeddings, which
    get no gradient."""
    total = 0
    for depth, shape in enumerate(shapes):
        total += linear_flops(batch_size, shape, input_gradient=depth > 0)
    return total


def logit_flops(batch_size, dims):
    """FLOPs of the logits [B, B] of each pair, forward and backward: 4 B^2 D. dims: the width D of each pair's image vectors,
    which are frozen and get no gradient."""
    total = 0
    for dim in dims:
        total += linear_flops(batch_size, (batch_size, dim), weight_gradient=False)
    return total


def step_flops(generator, batch_size, pairs, dims):
    """FLOPs of one step of these pairs, {"flops": all, "step_flops", "logit_flops"}: what a ledger adds up.

    flops       = of the connectors on the batch + of predicting their weights + of the logits
    step_flops  = of predicting the weights: grow with the number of steps, at any batch size
    logit_flops = grow with the batch size at equal samples

    The optimiser's update is elementwise and is not counted. generator: its `flops` gives the first two. dims: {image
    encoder: width of its vectors in the loss}.
    """
    of_connectors, of_predicting = generator.flops(batch_size, pairs)
    image_dims = [dims[image] for image, _ in pairs]
    of_logits = logit_flops(batch_size, image_dims)
    total = of_connectors + of_predicting + of_logits
    return {"flops": total, "step_flops": of_predicting, "logit_flops": of_logits}


def validation_flops(generator, retrieval, pairs, dims):
    """About the FLOPs of validating these pairs on a Retrieval: their connectors forward, a third of the products of a step, and
    the similarities. generator, dims: as for `step_flops`."""
    of_connectors, _ = generator.flops(len(retrieval.rows), pairs)
    of_similarities = 0
    for image, _ in pairs:
        of_similarities += 2 * retrieval.similarities * dims[image]
    return of_connectors // 3 + of_similarities


# ------------------------------------------------------------------------------------------------- comparing methods


class Cost(NamedTuple):
    """What a method cost, the mean over its seeds. None where it is not known: of connectors alone, or of an encoder
    whose forward pass was never counted."""

    flops: float | None = None  # as run
    seconds: float | None = None
    pair_samples: float | None = None  # rows, over all updates of all pairs
    flops_equal_batch: float | None = None  # at the batch size of the run that it is compared with
    flops_equal_updates: float | None = None  # and at as many updates per trained pair as that run has
    updates_low: int | None = None  # the fewest of any pair
    updates_high: int | None = None
    batch_size: int | None = None
    rows_embedded: int | None = None  # rows times encoders: to train on and to choose by, or a selector's few
    embedding_flops: int | None = None
    flops_with_embedding: float | None = None


NO_COST = {"flops": 0, "seconds": 0.0, "rows": 0}  # of a choice by widths alone, or of a random one


def cost_of_runs(runs, data, names, reference, different):
    """The Cost of a method's runs, one per seed. names: the encoders. reference: the ledger to compare with. different: of the
    rows that a run has used (`count_different`)."""
    values = {}  # name of a Cost's number -> that of each run
    updates = []  # of every pair of every run
    for run in runs:
        for key, value in scale_ledger(run.ledger, reference).items():
            values.setdefault(key, []).append(value)
        updates += run.ledger["updates_per_pair"].values()
    means = {key: float(np.mean(of_runs)) for key, of_runs in values.items()}
    cost = Cost(**means, updates_low=min(updates), updates_high=max(updates), batch_size=runs[0].ledger["batch_size"])
    return with_embedding(cost, data, names, runs[0].rows, different)


def cost_of_selector(spent, data, names, pair_count):
    """The Cost of a selector that trains nothing. spent: {"flops", "seconds", "rows"}, a row for each of its pictures."""
    flops, rows = spent["flops"], spent["rows"]
    cost = Cost(
        flops=flops,
        seconds=spent["seconds"],
        pair_samples=rows * pair_count,
        flops_equal_batch=flops,
        flops_equal_updates=flops,
        updates_low=0,
        updates_high=0,
    )
    return with_embedding(cost, data, names, rows, {"image": rows, "text": rows})


def trained_by_batches(ledger):
    """Whether a run's cost depends on a batch size: a closed form's does not."""
    return ledger["flops"] > ledger["start_flops"]


def scale_ledger(ledger, reference):
    """What a run's FLOPs would be at the batch size of the reference, and at its updates of each trained pair too.

    At equal samples, those of the logits grow with the batch, and those that go with the steps shrink with it:

        equal_batch   = flops + logit_flops (b - 1) + step_flops (1 / b - 1),   b = reference batch / own batch
        equal_updates = start_flops + (equal_batch - start_flops) r,
        r             = reference samples per trained pair / own samples per trained pair
    """
    flops = ledger["flops"]
    costs = {key: ledger[key] for key in ("flops", "seconds", "pair_samples")}
    if not trained_by_batches(ledger):
        return costs | {"flops_equal_batch": flops, "flops_equal_updates": flops}
    batches = reference["batch_size"] / ledger["batch_size"]
    equal_batch = flops + ledger["logit_flops"] * (batches - 1)
    equal_batch += ledger["step_flops"] * (1 / batches - 1)
    start = ledger["start_flops"]  # is paid once
    equal_updates = start + (equal_batch - start) * samples_per_pair(reference) / samples_per_pair(ledger)
    return costs | {"flops_equal_batch": equal_batch, "flops_equal_updates": equal_updates}


def samples_per_pair(ledger):
    """Of the trained pairs: one that is only predicted has none, and needs none."""
    trained = sum(count > 0 for count in ledger["updates_per_pair"].values())
    return ledger["pair_samples"] / trained


def with_embedding(cost, data, names, rows, different):
    """The cost with that of embedding `rows` rows by every encoder of `names`. different: as for `embedding_flops`."""
    embedding = embedding_flops(data, names, different)
    total = None if embedding is None else cost.flops + embedding
    return cost._replace(rows_embedded=rows * len(names), embedding_flops=embedding, flops_with_embedding=total)


def count_different(data, rows=None):
    """{"image", "text": how many different pictures and captions} of these rows of an embedding folder [n], by default of all."""
    numbers = range(data.row_count) if rows is None else rows.tolist()
    if not data.rows:
        return {"image": len(numbers), "text": len(numbers)}
    return {"image": len({data.rows[i]["image"] for i in numbers}), "text": len({data.rows[i]["caption"] for i in numbers})}


def count_in_proportion(data, rows):
    """The same of so many rows, of which as many are different as of all in the folder."""
    return {kind: count * rows / data.row_count for kind, count in count_different(data).items()}


def embedding_flops(data, names, different):
    """Of so many pictures and captions, each once, through every encoder, by the manifest, or None if it lacks an encoder's FLOPs
    per row. different: {"image", "text": how many}."""
    total = 0
    for name in names:
        record = data.record(name)
        if "flops_per_row" not in record:
            return None
        total += different[data.encoders[name].kind] * record["flops_per_row"]
    return round(total)


def cost_ratio(cost, base, key):
    """One Cost divided by another, or None where it is not known."""
    value, reference = getattr(cost, key), getattr(base, key)
    return value / reference if value is not None and reference else None
