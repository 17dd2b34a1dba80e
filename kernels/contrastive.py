"""Symmetric InfoNCE of every pair: what is launched when, and the autograd function.

The mathematics and the kernels are in kernels/contrastive_kernels.py. The gradient is made in the forward pass, pairs
in groups, one launch of each kernel for a group, in one of two ways:

    stored      bfloat16, where the logits are bounded: one run of `logits` leaves E = exp(logits) in bfloat16 for
                `gradient`. Two products in all.
    recomputed  any scale, float32, float16, and batches whose E exceeds the budget: `logits` for the sums, then again
                for the weights themselves, as many stripes at a time as the budget holds. Three products, no limits.

Letters: P pairs, B batch, D width of a pair.
"""

import math

import torch
import triton

from kernels import launch
from kernels.contrastive_kernels import (
    STATS,
    STORE,
    WEIGHTS,
    clip_bwd_kernel,
    gradient_kernel,
    logits_kernel,
    positives_kernel,
    reduce_kernel,
)
from kernels.reference import EPS, refuse_second_derivative

BITS = 125.0  # exp(s), its sum over a batch, and the inverse of that sum are normal float32 and bfloat16 numbers: 2^126
L2_BYTES = 40 * 2**20  # a group's E stays in a Hopper's cache between the two products that use it
ROWS = launch.Launch(16, 256, 0, 4, 1)  # positives and backward: a few rows at a time, in passes over their width
REDUCE = launch.Launch(32, 16, 0, 4, 1)  # rows, and tiles of partials at a time


class Problem:
    """The tensors and tables that every launch of one loss shares."""

    def __init__(self, z, images, image_of_pair, scale, counts):
        self.z, self.y, self.scale, self.device = z.contiguous(), launch.side_by_side(images), scale, z.device
        self.counts = counts
        self.batch, self.pairs = z.shape[0], len(image_of_pair)
        self.widths = [images[i].shape[1] for i in image_of_pair]
        y_cols = launch.starts([y.shape[1] for y in images])
        rows = zip(launch.starts(self.widths), (y_cols[i] for i in image_of_pair), self.widths)
        self.table = launch.table(tuple(rows), z.device)  # (z column, y column, width) of each pair
        self.aligned = launch.aligned(*(y.shape[1] for y in images))
        self.tile = launch.choose("logits", z)
        self.m_tiles, self.n_tiles = triton.cdiv(self.batch, self.tile.m), triton.cdiv(self.batch, self.tile.n)
        self.products = dict(ALIGNED=self.aligned, WIDEN=launch.widen(z), PRECISION=launch.precision(z))
        self.bounded = scale / math.log(2) + math.log2(self.batch) <= BITS
        self.inverse, self.positive, self.losses, self.slope, self.row_lse, self.col_lse = (
            self.empty(self.pairs, self.batch) for _ in range(6)
        )  # each [P, B]
        if counts:
            self.match = self.empty(self.pairs, self.batch)
            self.correct = self.empty(2, self.pairs, self.batch, dtype=torch.int8)
        else:  # a kernel is given a pointer, and leaves it alone
            self.match = self.correct = self.losses

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=self.device)


def positives(p):
    """Fills p.inverse, 1 / |z_i|, and p.positive, s_ii: [P, B] each."""
    launch.run(
        positives_kernel, (triton.cdiv(p.batch, ROWS.m), p.pairs), p.z, p.y,
        p.inverse, p.positive, p.table, p.batch, p.z.stride(0), p.y.stride(0), p.scale, EPS**2, launch=ROWS,
        ALIGNED=p.aligned, BLOCK_M=ROWS.m, BLOCK_N=ROWS.n,
    )  # fmt: skip


def logits(p, mode, pairs, stripes, group, partials, out, gain=1.0):
    """Logits of these pairs, a range, and stripes, a range too.

    STATS and STORE fill partials (`partials_of`), of `group` pairs, and STORE also `out` with E. WEIGHTS takes the log-sum-exp of
    rows and columns as partials and fills `out` with gain * G. out: [pairs * stripes * tile.m, n_tiles * tile.n].
    """
    launch.run(
        logits_kernel, (len(pairs) * len(stripes) * p.n_tiles,), p.z, p.y, p.inverse, p.table, *partials, p.match, out,
        pairs.start, stripes.start, len(stripes), group, p.batch, p.z.stride(0), p.y.stride(0), p.n_tiles,
        p.scale, gain, launch=p.tile, MODE=mode.value, BOUNDED=p.bounded, COUNTS=p.counts, **p.products,
        BLOCK_M=p.tile.m, BLOCK_N=p.tile.n, BLOCK_K=p.tile.k,
    )  # fmt: skip


def reduce(p, pairs, partials):
    """Partials of these pairs to p.losses, p.slope (d_i), p.row_lse and p.col_lse [P, B]; with counts to p.correct, too."""
    launch.run(
        reduce_kernel, (triton.cdiv(p.batch, REDUCE.m), len(pairs)), *partials, p.match, p.positive,
        p.losses, p.slope, p.row_lse, p.col_lse, p.correct, pairs.start, len(pairs), p.batch, p.pairs,
        p.m_tiles, p.n_tiles, launch=REDUCE, COUNTS=p.counts, BLOCK_M=REDUCE.m, BLOCK_T=REDUCE.n,
    )  # fmt: skip


def gradient(p, pairs, stripes, weights, du, stored, gain=1.0):
    """Fills the rows of du [B, sum D], dL/du, of these stripes and the columns of these pairs.

    weights: what `logits` left, E where `stored`, else gain * G.
    """
    tile = launch.choose("gradient_stored" if stored else "gradient", p.z)
    assert tile.m == p.tile.m, "a stripe is one row of tiles of the logits, and of the gradient"
    assert p.tile.n % tile.k == 0, (
        "the gradient steps through whole tiles of logits, which are written beyond the batch"
    )
    d_tiles = triton.cdiv(max(p.widths), tile.n)
    launch.run(
        gradient_kernel, (len(pairs) * len(stripes) * d_tiles,), weights, p.y, p.slope, p.row_lse, p.col_lse,
        p.table, du, pairs.start, stripes.start, len(stripes), p.batch, p.z.stride(0), p.y.stride(0), p.n_tiles,
        d_tiles, p.scale / (2 * p.batch), gain, launch=tile, STORED=stored, LOGIT_N=p.tile.n, **p.products,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip


def groups(count, size):
    """range(count) in ranges of at most `size`."""
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def clip_fwd(p, budget_bytes, needs_grad):
    """Fills p.losses, p.inverse and, with counts, p.correct; returns dL/du [B, sum D] if it is needed."""
    z, tile, all_stripes = p.z, p.tile, range(p.m_tiles)
    stripe_bytes = tile.m * p.n_tiles * tile.n * z.element_size()
    partial_bytes = (2 if p.counts else 1) * (p.m_tiles + p.n_tiles) * p.batch * 4
    pair_bytes = p.m_tiles * stripe_bytes + partial_bytes
    stored = needs_grad and z.dtype == torch.bfloat16 and p.bounded and pair_bytes <= budget_bytes
    each = min(budget_bytes, L2_BYTES) // pair_bytes if stored else budget_bytes // partial_bytes
    each = min(p.pairs, max(1, each))

    du = p.empty(*z.shape) if needs_grad else None
    partials = partials_of(p, each)
    stripes = each * p.m_tiles if stored else 0
    weights = z.new_empty(stripes * tile.m, p.n_tiles * tile.n)
    positives(p)
    for pairs in groups(p.pairs, each):
        logits(p, STORE if stored else STATS, pairs, all_stripes, len(pairs), partials, weights)
        reduce(p, pairs, partials)
        if stored:
            gradient(p, pairs, all_stripes, weights, du, stored)
    if stored or not needs_grad:
        return du

    del partials
    count = triton.cdiv(p.m_tiles, 2) if z.dtype == torch.float32 else p.m_tiles  # no float32 matrix is ever whole
    count = max(1, min(count, budget_bytes // stripe_bytes))
    each = min(p.pairs, max(1, budget_bytes // (count * stripe_bytes)))
    weights = z.new_empty(each * count * tile.m, p.n_tiles * tile.n)
    gain = 4096.0 if z.dtype == torch.float16 else 1.0  # G <= 2 into the middle of float16's range
    lse = (p.row_lse, p.row_lse, p.col_lse, p.col_lse)  # WEIGHTS reads the first and the third
    for pairs in groups(p.pairs, each):
        for stripes in groups(p.m_tiles, count):
            logits(p, WEIGHTS, pairs, stripes, 1, lse, weights, gain)
            gradient(p, pairs, stripes, weights, du, stored, gain)
    return du


def partials_of(p, each):
    """Log-sum-exp and best of each tile's rows, then of its columns, for so many pairs: [tiles, pairs, B] each. Without
    counts the bests are never written: the log-sum-exp stands in for them."""
    of_rows, of_columns = p.empty(p.n_tiles, each, p.batch), p.empty(p.m_tiles, each, p.batch)
    if not p.counts:
        return of_rows, of_rows, of_columns, of_columns
    return of_rows, torch.empty_like(of_rows), of_columns, torch.empty_like(of_columns)


class ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, images, image_of_pair, scale, budget_bytes, counts):
        p = Problem(z, images, image_of_pair, float(scale), counts)
        du = clip_fwd(p, budget_bytes, ctx.needs_input_grad[0])
        ctx.save_for_backward(du, p.z, p.inverse, p.table)
        ctx.aligned = p.aligned
        loss = p.losses.sum(1) / (2 * p.batch)  # [P]
        if not counts:
            return loss, None
        correct = p.correct.sum(2).T.contiguous()  # [P, 2]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, dloss, _):
        refuse_second_derivative("clip_loss")
        du, z, inverse, table = ctx.saved_tensors
        (pairs, batch), dz = inverse.shape, torch.empty_like(z)
        launch.run(
            clip_bwd_kernel, (triton.cdiv(batch, ROWS.m), pairs), du, z, inverse, dloss.contiguous(), dz, table,
            batch, z.stride(0), launch=ROWS, ALIGNED=ctx.aligned, BLOCK_M=ROWS.m, BLOCK_N=ROWS.n,
        )  # fmt: skip
        return dz, *[None] * 5


@torch.compiler.disable
def clip_loss(z, images, image_of_pair, logit_scale, sumsq, budget_bytes, counts):
    """The Triton path of `kernels.clip_loss`. It has no use for sumsq: `positives` reads z in any case."""
    return ClipLoss.apply(z, images, image_of_pair, logit_scale, budget_bytes, counts)
