"""What things cost: FLOPs of everything, 2 per multiply-add, one counter, and the ledger that compares methods.

A trainer writes what its run cost as coefficients (`hyma.runs.write_results`); here they are multiplied, so code that
compares runs does not depend on how they were trained.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from vlm import HIDDEN_DIM

# ----------------------------------------------------------------------------------------------------------- counting

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
    """Entered, it counts the FLOPs of torch's own products and factorisations: .get_total_flops(). The kernels' it does
    not see: `connector_flops` and `logit_flops` are theirs."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    return FlopCounterMode(display=False, custom_mapping=EXTRA_FLOP_FORMULAS)


def connector_shapes(text_dim, hidden_layers, image_dim):
    """[(out, in)] of a connector's layers, the first layer first."""
    dims = [text_dim] + [HIDDEN_DIM] * hidden_layers + [image_dim]
    return list(zip(dims[1:], dims))


def connector_flops(batch_size, shapes):
    """Of a connector with layers [(out, in)] on a batch, forward and backward: 4 B out in for the first layer, whose
    inputs are frozen embeddings and get no gradient, 6 B out in for every other."""
    total = 0
    for depth, (out, into) in enumerate(shapes):
        total += (4 if depth == 0 else 6) * out * into
    return batch_size * total


def logit_flops(batch_size, dims):
    """Of the similarities of a batch with itself, for image vectors of these widths D, forward and backward: 4 B^2 D each."""
    return sum(4 * batch_size**2 * dim for dim in dims)


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


def cost_of_runs(runs, data, names, reference):
    """The Cost of a method's runs, one per seed. names: the encoders. reference: the ledger to compare with."""
    each = [scale_ledger(run.ledger, reference) for run in runs]
    means = {key: float(np.mean([costs[key] for costs in each])) for key in each[0]}
    updates = [count for run in runs for count in run.ledger["updates_per_pair"].values()]
    cost = Cost(**means, updates_low=min(updates), updates_high=max(updates), batch_size=runs[0].ledger["batch_size"])
    return with_embedding(cost, data, names, runs[0].rows)


def cost_of_selector(spent, data, names, pair_count):
    """The Cost of a selector that trains nothing. spent: {"flops", "seconds", "rows"}."""
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
    return with_embedding(cost, data, names, rows)


def trained_by_batches(ledger):
    """Whether a run's cost depends on a batch size: a closed form's does not."""
    return ledger["flops"] > ledger["start_flops"]


def scale_ledger(ledger, reference):
    """What a run's FLOPs would be at the batch size of the reference, and at its updates of each trained pair too.

    At equal samples, those of the logits grow with the batch, and those that go with the steps shrink with it:

        equal_batch   = flops + logit_flops (b - 1) + step_flops (1 / b - 1),   b = reference batch / own batch
        equal_updates = equal_batch * reference samples per trained pair / own samples per trained pair
    """
    flops = ledger["flops"]
    costs = {key: ledger[key] for key in ("flops", "seconds", "pair_samples")}
    if not trained_by_batches(ledger):
        return costs | {"flops_equal_batch": flops, "flops_equal_updates": flops}
    batches = reference["batch_size"] / ledger["batch_size"]
    equal_batch = flops + ledger["logit_flops"] * (batches - 1)
    equal_batch += ledger["step_flops"] * (1 / batches - 1)
    equal_updates = equal_batch * samples_per_pair(reference) / samples_per_pair(ledger)
    return costs | {"flops_equal_batch": equal_batch, "flops_equal_updates": equal_updates}


def samples_per_pair(ledger):
    """Of the trained pairs: one that is only predicted has none, and needs none."""
    trained = sum(count > 0 for count in ledger["updates_per_pair"].values())
    return ledger["pair_samples"] / trained


def with_embedding(cost, data, names, rows):
    """The cost with that of `rows` rows through every encoder of `names`."""
    embedding = embedding_flops(data, names, rows)
    total = None if embedding is None else cost.flops + embedding
    return cost._replace(rows_embedded=rows * len(names), embedding_flops=embedding, flops_with_embedding=total)


def embedding_flops(data, names, rows):
    """Of `rows` rows through every encoder, by the manifest, or None if it lacks an encoder's FLOPs per row."""
    total = 0
    for name in names:
        record = data.manifest["encoders"][name] if data.manifest else {}
        if "flops_per_row" not in record:
            return None
        total += rows * record["flops_per_row"]
    return int(total)


def cost_ratio(cost, base, key):
    """One Cost divided by another, or None where it is not known."""
    value, reference = getattr(cost, key), getattr(base, key)
    return value / reference if value is not None and reference else None
