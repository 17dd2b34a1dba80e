"""The kernels of symmetric InfoNCE of every pair, with no B x B matrix in float32 and no online maximum.

For one pair, with unit images y, u_i = z_i / |z_i| and s = scale u @ y.T, let r_i and c_j be the log-sum-exp of row i
and column j WITHOUT the diagonal, r'_i and c'_j with it:

    loss      = 1/2B sum_i softplus(r_i - s_ii) + softplus(c_i - s_ii)
    dL/du_i   = scale/2B (sum over j != i of G_ij y_j - d_i y_i)
    G_ij      = exp(s_ij - r'_i) + exp(s_ij - c'_j)
    d_i       = sigmoid(r_i - s_ii) + sigmoid(c_i - s_ii)
    dL/dz_i   = (dL/du_i - u_i (u_i . dL/du_i)) / |z_i|

The diagonal is apart: s_ii is a float32 dot product, and d_i is never "1 - p", which loses every digit once training
converges. u never exists: 1 / |z_i| scales the rows of the product z @ y.T. Logarithms are to base 2 inside.

    positives   1/|z_i| and s_ii                                            one pass over z
    logits      s by tiles; log-sum-exp of each tile's rows and columns (partials, no atomics) and, for bfloat16,
                E = exp(s), diagonal zero, in bfloat16
    reduce      partials to r, c, softplus and d
    gradient    G @ y with G = E (exp(-r') + exp(-c')) formed in registers

Logits are bounded by the scale, so that up to a scale of about 80 exp(s) needs no maximum taken off (BOUNDED). Where E
is not stored, `logits` runs twice: first for r and c alone, then for G itself, stripe by stripe. A stripe is one row of
tiles of one pair. Only when counts of correct matches are asked for are the best logits of rows and columns taken
(COUNTS). kernels/contrastive.py decides and launches. Letters: P pairs, B batch, D width of a pair.
"""

import triton
import triton.language as tl

from kernels.launch import field

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e9)  # stands in for the best of nothing, so that no infinity meets another
SHAPES = ["first_pair", "m_first", "m_count", "group", "pairs", "m_tiles", "n_tiles", "d_tiles"]  # one kernel for all
STATS, STORE, WEIGHTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what `logits` is run for


@triton.jit
def positives_kernel(
    z_ptr, y_ptr, inverse_ptr, positive_ptr, pairs_ptr, batch, z_stride, y_stride, scale, smallest,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """1/|z_i| (0 for a row of zeros) and the positive logit s_ii in units of ln 2."""
    pair = tl.program_id(1)
    z_col, y_col = field(pairs_ptr + pair * 3, 0, ALIGNED), field(pairs_ptr + pair * 3, 1, ALIGNED)
    width = field(pairs_ptr + pair * 3, 2, ALIGNED)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    squares, dots = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for d in range(0, width, BLOCK_N):
        cols = d + tl.arange(0, BLOCK_N)
        mask = (rows < batch)[:, None] & (cols < width)[None, :]
        z = tl.load(z_ptr + rows[:, None] * z_stride + (z_col + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + rows[:, None] * y_stride + (y_col + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(z * z, 1)  # [BLOCK_M]
        dots += tl.sum(z * y, 1)
    at = pair.to(tl.int64) * batch + rows
    inverse = tl.where(squares > smallest, 1.0 / tl.sqrt(tl.maximum(squares, smallest)), 0.0)
    tl.store(inverse_ptr + at, inverse, mask=rows < batch)
    tl.store(positive_ptr + at, dots * inverse * (scale * LOG2E), mask=rows < batch)


@triton.jit(do_not_specialize=SHAPES)
def logits_kernel(
    z_ptr, y_ptr, inverse_ptr, pairs_ptr, row_lse_ptr, row_best_ptr, col_lse_ptr, col_best_ptr, match_ptr,
    out_ptr, first_pair, m_first, m_count, group, batch, z_stride, y_stride, n_tiles, scale, gain,
    MODE: tl.constexpr, BOUNDED: tl.constexpr, COUNTS: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of logits. A stripe is one row of tiles of one pair; a launch takes m_count stripes of several pairs.

    STATS and STORE write partials [tiles, group, B]; WEIGHTS reads row_lse and col_lse [P, B] and writes gain * G.
    """
    pid = tl.program_id(0).to(tl.int64)
    stripe, n = pid // n_tiles, pid % n_tiles
    pair, m = first_pair + stripe // m_count, m_first + stripe % m_count
    z_col, y_col = field(pairs_ptr + pair * 3, 0, ALIGNED), field(pairs_ptr + pair * 3, 1, ALIGNED)
    width = field(pairs_ptr + pair * 3, 2, ALIGNED)
    # Scalars in int64 lead to the tile, int32 stays within it: 64 columns a thread leave few registers for offsets.
    rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m0, n0 = m * BLOCK_M, n * BLOCK_N
    row_mask, col_mask = rows < (batch - m0).to(tl.int32), cols < (batch - n0).to(tl.int32)
    own = rows[:, None] - cols[None, :] == (n0 - m0).to(tl.int32)
    z_ptrs = z_ptr + m0 * z_stride + z_col + rows[:, None] * z_stride + depth[None, :]
    y_ptrs = y_ptr + n0 * y_stride + y_col + cols[None, :] * y_stride + depth[:, None]

    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        k_mask = depth < width - k
        z = tl.load(z_ptrs + k, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        y = tl.load(y_ptrs + k, mask=k_mask[:, None] & col_mask[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        if WIDEN:
            z, y = z.to(tl.float32), y.to(tl.float32)
        s = tl.dot(z, y, s, input_precision=PRECISION)

    by_row, by_col = pair * batch + m0 + rows, pair * batch + n0 + cols
    inverse = tl.load(inverse_ptr + by_row, mask=row_mask, other=0.0)
    s *= (inverse * (scale * LOG2E))[:, None]
    inside = row_mask[:, None] & col_mask[None, :] & ~own
    out_width = n_tiles * BLOCK_N
    out_ptrs = out_ptr + stripe * BLOCK_M * out_width + n0 + rows[:, None] * out_width + cols[None, :]

    if MODE == WEIGHTS:
        row_lse = tl.load(row_lse_ptr + by_row, mask=row_mask, other=0.0)
        col_lse = tl.load(col_lse_ptr + by_col, mask=col_mask, other=0.0)
        weights = tl.exp2(s - row_lse[:, None]) + tl.exp2(s - col_lse[None, :])
        tl.store(out_ptrs, (tl.where(inside, weights, 0.0) * gain).to(out_ptr.dtype.element_ty))
    else:
        row_part = (n * group + pair - first_pair) * batch + m0 + rows
        col_part = (m * group + pair - first_pair) * batch + n0 + cols
        if COUNTS:
            match = tl.sum(tl.where(own, s, 0.0), 1)  # by the product its rivals come from
            owner = row_mask & (m0 + rows >= n0) & (m0 + rows < n0 + BLOCK_N)
            tl.store(match_ptr + by_row, match, mask=owner)
        s = tl.where(inside, s, -float("inf"))
        if COUNTS or not BOUNDED:
            row_best, col_best = tl.maximum(tl.max(s, 1), LOWEST), tl.maximum(tl.max(s, 0), LOWEST)
        if COUNTS:
            tl.store(row_best_ptr + row_part, row_best, mask=row_mask)
            tl.store(col_best_ptr + col_part, col_best, mask=col_mask)
        if BOUNDED:
            e = tl.exp2(s)
            if MODE == STORE:
                tl.store(out_ptrs, e.to(out_ptr.dtype.element_ty))
            row_lse, col_lse = tl.log2(tl.sum(e, 1)), tl.log2(tl.sum(e, 0))
        else:
            row_lse = row_best + tl.log2(tl.sum(tl.exp2(s - row_best[:, None]), 1))
            col_lse = col_best + tl.log2(tl.sum(tl.exp2(s - col_best[None, :]), 0))
        tl.store(row_lse_ptr + row_part, row_lse, mask=row_mask)
        tl.store(col_lse_ptr + col_part, col_lse, mask=col_mask)


@triton.jit
def sum_partials(lse_ptr, at, tiles, step, mask, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Log-sum-exp of all tiles' partials for one block of rows or columns: BLOCK_T tiles at a time."""
    top, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        here = lse_ptr + tile.to(tl.int64)[:, None] * step + at[None, :]
        lse = tl.load(here, mask=(tile < tiles)[:, None] & mask[None, :], other=LOWEST)  # [BLOCK_T, BLOCK_M]
        higher = tl.maximum(top, tl.max(lse, 0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(lse - higher[None, :]), 0)
        top = higher
    return top + tl.log2(total)


@triton.jit
def best_of_partials(best_ptr, at, tiles, step, mask, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """The largest of all tiles' partials for one block of rows or columns."""
    best = tl.full([BLOCK_M], LOWEST, tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        here = best_ptr + tile.to(tl.int64)[:, None] * step + at[None, :]
        of_tiles = tl.load(here, mask=(tile < tiles)[:, None] & mask[None, :], other=LOWEST)  # [BLOCK_T, BLOCK_M]
        best = tl.maximum(best, tl.max(of_tiles, 0))
    return best


@triton.jit
def softplus_and_sigmoid(x):
    """Of x in units of ln 2; softplus keeps its digits where exp(x) is tiny."""
    small = tl.exp2(-tl.abs(x))
    log1p = tl.where(small < 1e-2, small * (1 - small * (0.5 - small * (1 / 3 - small * 0.25))), tl.log(1 + small))
    return tl.maximum(x, 0.0) / LOG2E + log1p, tl.where(x > 0, 1.0, small) / (1 + small)


@triton.jit
def log2_of_sum(a, b):
    """log2(2^a + 2^b). The larger is never taken off and put on again, which would cost the smaller its digits."""
    return tl.maximum(a, b) + tl.log2(1 + tl.exp2(-tl.abs(a - b)))


@triton.jit(do_not_specialize=SHAPES)
def reduce_kernel(
    row_lse_ptr, row_best_ptr, col_lse_ptr, col_best_ptr, match_ptr, positive_ptr,
    loss_ptr, slope_ptr, full_row_ptr, full_col_ptr, correct_ptr, first_pair, group, batch, pairs, m_tiles, n_tiles,
    COUNTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Partials [tiles, group, B] to the loss, d, r' and c' of each row, and with COUNTS its hits, all [P, B]."""
    local = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < batch
    part, step = local * batch + rows, group.to(tl.int64) * batch
    at = (first_pair + local) * batch + rows
    row_lse = sum_partials(row_lse_ptr, part, n_tiles, step, mask, BLOCK_T, BLOCK_M)
    col_lse = sum_partials(col_lse_ptr, part, m_tiles, step, mask, BLOCK_T, BLOCK_M)
    positive = tl.load(positive_ptr + at, mask=mask, other=0.0)
    row_loss, row_slope = softplus_and_sigmoid(row_lse - positive)
    col_loss, col_slope = softplus_and_sigmoid(col_lse - positive)
    tl.store(loss_ptr + at, row_loss + col_loss, mask=mask)
    tl.store(slope_ptr + at, row_slope + col_slope, mask=mask)
    tl.store(full_row_ptr + at, log2_of_sum(row_lse, positive), mask=mask)
    tl.store(full_col_ptr + at, log2_of_sum(col_lse, positive), mask=mask)
    if COUNTS:
        match = tl.load(match_ptr + at, mask=mask, other=0.0)
        row_best = best_of_partials(row_best_ptr, part, n_tiles, step, mask, BLOCK_T, BLOCK_M)
        col_best = best_of_partials(col_best_ptr, part, m_tiles, step, mask, BLOCK_T, BLOCK_M)
        tl.store(correct_ptr + at, (match > row_best).to(tl.int8), mask=mask)  # a tie is no match
        tl.store(correct_ptr + pairs.to(tl.int64) * batch + at, (match > col_best).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=SHAPES)
def gradient_kernel(
    weights_ptr, y_ptr, slope_ptr, full_row_ptr, full_col_ptr, pairs_ptr, du_ptr,
    first_pair, m_first, m_count, batch, z_stride, y_stride, n_tiles, d_tiles, factor, gain,
    STORED: tl.constexpr, LOGIT_N: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dL/du of one tile of one stripe.

    The product is taken transposed, y.T @ G.T: G, made in registers, is then the second operand, which tensor cores read
    from shared memory. As the first operand it would stay in registers, and each product would wait for the one before.
    """
    pid = tl.program_id(0).to(tl.int64)
    stripe, tile = pid // d_tiles, pid % d_tiles
    pair, m = first_pair + stripe // m_count, m_first + stripe % m_count
    z_col, y_col = field(pairs_ptr + pair * 3, 0, ALIGNED), field(pairs_ptr + pair * 3, 1, ALIGNED)
    width = field(pairs_ptr + pair * 3, 2, ALIGNED)
    m0, d0 = m * BLOCK_M, tile * BLOCK_N
    if d0 < width:
        rows, cols, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        row_mask, col_mask = rows < (batch - m0).to(tl.int32), cols < (width - d0).to(tl.int32)
        by_row, by_col = pair * batch + m0 + rows, pair * batch + depth
        stride = n_tiles * LOGIT_N
        weights_ptrs = weights_ptr + stripe * BLOCK_M * stride + rows[:, None] * stride + depth[None, :]
        y_ptrs = y_ptr + y_col + d0 + depth[:, None] * y_stride + cols[None, :]
        y_step = tl.full([1, 1], BLOCK_K, tl.int64) * y_stride
        if STORED:
            scale_row = tl.exp2(-tl.load(full_row_ptr + by_row, mask=row_mask, other=0.0))

        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for j in range(0, batch, BLOCK_K):
            j_mask = depth < batch - j
            w = tl.load(weights_ptrs + j)  # [BLOCK_M, BLOCK_K], zero outside the batch and on the diagonal
            y = tl.load(y_ptrs, mask=j_mask[:, None] & col_mask[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
            if STORED:
                scale_col = tl.exp2(-tl.load(full_col_ptr + by_col + j, mask=j_mask, other=0.0))
                w = (w.to(tl.float32) * (scale_row[:, None] + scale_col[None, :])).to(y.dtype)
            if WIDEN:
                w, y = w.to(tl.float32), y.to(tl.float32)
            acc = tl.dot(tl.trans(y), tl.trans(w), acc, input_precision=PRECISION)
            y_ptrs += y_step

        mask = row_mask[:, None] & col_mask[None, :]
        slope = tl.load(slope_ptr + by_row, mask=row_mask, other=0.0) * factor
        own_ptrs = y_ptr + m0 * y_stride + y_col + d0 + rows[:, None] * y_stride + cols[None, :]
        own = tl.load(own_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        du = tl.trans(acc) * (factor / gain) - slope[:, None] * own
        du_ptrs = du_ptr + m0 * z_stride + z_col + d0 + rows[:, None] * z_stride + cols[None, :]
        tl.store(du_ptrs, du, mask=mask)  # float32: most of it is radial and goes in the backward pass


@triton.jit
def clip_bwd_kernel(
    du_ptr, z_ptr, inverse_ptr, dloss_ptr, dz_ptr, pairs_ptr, batch, z_stride,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = dloss (du - u (u . du)) / |z|: a first loop over the width for u . du, a second, out of cache, for dz."""
    pair = tl.program_id(1)
    z_col, width = field(pairs_ptr + pair * 3, 0, ALIGNED), field(pairs_ptr + pair * 3, 2, ALIGNED)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < batch
    inverse = tl.load(inverse_ptr + pair.to(tl.int64) * batch + rows, mask=row_mask, other=0.0)
    outer = tl.load(dloss_ptr + pair).to(tl.float32) * inverse
    radial = tl.zeros([BLOCK_M], tl.float32)
    for d in range(0, width, BLOCK_N):
        cols = d + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < width)[None, :]
        offsets = rows[:, None] * z_stride + (z_col + cols)[None, :]
        du = tl.load(du_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        u = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        radial += tl.sum(du * u, 1)
    for d in range(0, width, BLOCK_N):
        cols = d + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < width)[None, :]
        offsets = rows[:, None] * z_stride + (z_col + cols)[None, :]
        du = tl.load(du_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        u = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * inverse[:, None]
        dz = (du - u * radial[:, None]) * outer[:, None]
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
