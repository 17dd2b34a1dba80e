"""Every pair's connector in one launch per layer and direction.

A layer is a list of outputs. Output o reads input a(o) and weight k(o), either of which other outputs may share:

    y_o   = act(x_a(o) @ W_k(o).T + b_k(o))              act = ReLU, or nothing on the last layer
    dW_k  = sum over o with k(o) = k of dy_o.T @ x_a(o)     db_k likewise the column sums of dy_o
    dx_a  = [x_a > 0] * sum over o with a(o) = a of dy_o @ W_k(o)

where dy is the gradient before the activation: the mask of a layer's ReLU is applied by the dx of the layer above.
All inputs of a layer stand side by side in one matrix [B, columns], all outputs in another, all weights end to end.
A tile table tells each program its columns, so ragged widths need no padding and no search. The sums over outputs are
loops inside one program: one writer for each number, no atomics, the same bits every time.

Letters: B batch, N width of an output, K width of an input, P outputs of the last layer (the pairs).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import launch
from kernels.launch import field, grouped
from kernels.reference import refuse_second_derivative

GROUP = 8


@triton.jit(do_not_specialize=["m_tiles", "n_tiles"])
def linear_fwd_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, tiles_ptr, batch, x_stride, y_stride, m_tiles, n_tiles,
    RELU: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = act(x @ W.T + b) for one tile."""
    m, t = grouped(tl.program_id(0), m_tiles, n_tiles, GROUP)
    tile = tiles_ptr + t * 7
    x_col, width_in, w_start = field(tile, 0, ALIGNED), field(tile, 1, ALIGNED), field(tile, 2, ALIGNED)
    y_col, width_out, n0 = field(tile, 3, ALIGNED), field(tile, 4, ALIGNED), field(tile, 5, ALIGNED)
    bias_start = field(tile, 6, False)
    rows = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask, col_mask = rows < batch, cols < width_out
    x_ptrs = x_ptr + rows[:, None] * x_stride + (x_col + depth)[None, :]
    w_ptrs = w_ptr + w_start + cols[None, :] * width_in + depth[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width_in, BLOCK_K):
        k_mask = depth < width_in - k
        x = tl.load(x_ptrs + k, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_ptrs + k, mask=k_mask[:, None] & col_mask[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    acc += tl.load(bias_ptr + bias_start + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0)
    y_ptrs = y_ptr + rows[:, None] * y_stride + (y_col + cols)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit(do_not_specialize=["m_tiles", "n_tiles"])
def linear_dx_kernel(
    dy_ptr, w_ptr, x_ptr, dx_ptr, tiles_ptr, users_ptr, batch, x_stride, y_stride, m_tiles, n_tiles,
    MASK: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx of one tile: all outputs that read this input, and the ReLU that made it."""
    m, t = grouped(tl.program_id(0), m_tiles, n_tiles, GROUP)
    tile = tiles_ptr + t * 5
    x_col, width_in, n0 = field(tile, 0, ALIGNED), field(tile, 1, ALIGNED), field(tile, 2, ALIGNED)
    first, last = field(tile, 3, False), field(tile, 4, False)
    rows = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = n0 + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask, col_mask = rows < batch, cols < width_in

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for user in range(first, last):
        y_col, width_out = field(users_ptr + user * 3, 0, ALIGNED), field(users_ptr + user * 3, 1, ALIGNED)
        w_start = field(users_ptr + user * 3, 2, ALIGNED)
        dy_ptrs = dy_ptr + rows[:, None] * y_stride + (y_col + depth)[None, :]
        w_ptrs = w_ptr + w_start + depth[:, None] * width_in + cols[None, :]
        for k in range(0, width_out, BLOCK_K):
            k_mask = depth < width_out - k
            dy = tl.load(dy_ptrs + k, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            w_mask = k_mask[:, None] & col_mask[None, :]
            w = tl.load(w_ptrs + k * width_in, mask=w_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
            if WIDEN:
                dy, w = dy.to(tl.float32), w.to(tl.float32)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)

    offsets = rows[:, None] * x_stride + (x_col + cols)[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if MASK:
        acc = tl.where(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) > 0, acc, 0.0)
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_dw_kernel(
    dy_ptr, x_ptr, dw_ptr, dbias_ptr, tiles_ptr, users_ptr, batch, x_stride, y_stride,
    ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dW of one tile over the whole batch and all outputs that share the weight; the first column of tiles adds db."""
    tile = tiles_ptr + tl.program_id(0) * 8
    w_start, bias_start = field(tile, 0, ALIGNED), field(tile, 1, False)
    width_out, width_in = field(tile, 2, ALIGNED), field(tile, 3, ALIGNED)
    n0, k0 = field(tile, 4, ALIGNED), field(tile, 5, ALIGNED)
    first, last = field(tile, 6, False), field(tile, 7, False)
    outs = n0 + tl.arange(0, BLOCK_M)
    ins = k0 + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    out_mask, in_mask = outs < width_out, ins < width_in

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for user in range(first, last):
        x_col, y_col = field(users_ptr + user * 2, 0, ALIGNED), field(users_ptr + user * 2, 1, ALIGNED)
        for b in range(0, batch, BLOCK_K):
            rows = b + depth
            b_mask = rows < batch
            dy = tl.load(
                dy_ptr + rows[None, :] * y_stride + (y_col + outs)[:, None],
                mask=out_mask[:, None] & b_mask[None, :], other=0.0,
            )  # [BLOCK_M, BLOCK_K]  # fmt: skip
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + (x_col + ins)[None, :],
                mask=b_mask[:, None] & in_mask[None, :], other=0.0,
            )  # [BLOCK_K, BLOCK_N]  # fmt: skip
            if WIDEN:
                dy, x = dy.to(tl.float32), x.to(tl.float32)
            acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    offsets = w_start + outs.to(tl.int64)[:, None] * width_in + ins[None, :]
    tl.store(dw_ptr + offsets, acc.to(dw_ptr.dtype.element_ty), mask=out_mask[:, None] & in_mask[None, :])

    if k0 == 0:  # a second, cheaper loop: sums inside the first would break its pipeline
        sums = tl.zeros([BLOCK_M], tl.float32)
        for user in range(first, last):
            y_col = field(users_ptr + user * 2, 1, ALIGNED)
            for b in range(0, batch, BLOCK_K):
                rows = b + depth
                dy = tl.load(
                    dy_ptr + rows[:, None] * y_stride + (y_col + outs)[None, :],
                    mask=(rows < batch)[:, None] & out_mask[None, :], other=0.0,
                )  # [BLOCK_K, BLOCK_M]  # fmt: skip
                sums += tl.sum(dy.to(tl.float32), 0)
        tl.store(dbias_ptr + bias_start + outs, sums.to(dbias_ptr.dtype.element_ty), mask=out_mask)


class Plan:
    """Where everything of one layer lies, and the tile tables made of it, which the next step finds ready.

    A column is that of the matrix in which all inputs, or all outputs, stand side by side; a start is a place in the
    flat tensor of all weights, or of all biases.
    """

    def __init__(self, widths_in, shapes, wiring):
        """widths_in: of each input. shapes: (N, K) of each weight. wiring: (input, weight) of each output."""
        self.widths_in, self.shapes, self.wiring = widths_in, shapes, wiring
        self.weight_sizes = [n * k for n, k in shapes]
        self.bias_sizes = [n for n, _ in shapes]
        self.widths_out = tuple(self.bias_sizes[k] for _, k in wiring)
        self.x_cols, self.y_cols = launch.starts(widths_in), launch.starts(self.widths_out)
        self.w_starts = launch.starts(self.weight_sizes)
        self.bias_starts = launch.starts(self.bias_sizes)
        self.aligned = launch.aligned(*widths_in, *self.widths_out)

    def users(self, position):
        """The outputs grouped by input (position 0) or weight (1), [(output, its input, its weight)], and (begin, end) of each
        group in that list."""
        groups = [[] for _ in (self.widths_in, self.shapes)[position]]
        for output, wire in enumerate(self.wiring):
            groups[wire[position]].append((output, *wire))
        users = []
        spans = []
        for group in groups:
            spans.append((len(users), len(users) + len(group)))
            users += group
        return users, spans

    @lru_cache(maxsize=8)  # noqa: B019 - plans live as long as the cache of `plan`
    def fwd_tiles(self, tile, device):
        """The tiles of all outputs."""
        tiles = []
        for o, (a, k) in enumerate(self.wiring):
            for n0 in range(0, self.widths_out[o], tile.n):
                tiles.append((self.x_cols[a], self.widths_in[a], self.w_starts[k], self.y_cols[o], self.widths_out[o],
                              n0, self.bias_starts[k]))  # fmt: skip
        return launch.table(tuple(tiles), device)

    @lru_cache(maxsize=8)  # noqa: B019
    def dx_tiles(self, tile, device):
        """The tiles of all inputs, and the outputs that read each input."""
        users, spans = self.users(0)
        readers = []
        for o, _, k in users:
            readers.append((self.y_cols[o], self.widths_out[o], self.w_starts[k]))
        tiles = []
        for a, width in enumerate(self.widths_in):
            for n0 in range(0, width, tile.n):
                tiles.append((self.x_cols[a], width, n0, *spans[a]))
        return launch.table(tuple(tiles), device), launch.table(tuple(readers), device)

    @lru_cache(maxsize=8)  # noqa: B019
    def dw_tiles(self, tile, device):
        """The tiles of all weights, and the outputs that share each weight."""
        users, spans = self.users(1)
        sharers = []
        for o, a, _ in users:
            sharers.append((self.x_cols[a], self.y_cols[o]))
        tiles = []
        for k, (wide, deep) in enumerate(self.shapes):
            for n0 in range(0, wide, tile.m):
                for k0 in range(0, deep, tile.n):
                    tiles.append((self.w_starts[k], self.bias_starts[k], wide, deep, n0, k0, *spans[k]))
        return launch.table(tuple(tiles), device), launch.table(tuple(sharers) or ((0, 0),), device)


plan_of = lru_cache(maxsize=64)(Plan)


def linear_fwd(plan, x, weights, biases, relu):
    """y [B, columns]."""
    tile, batch = launch.choose("forward", x), x.shape[0]
    tiles = plan.fwd_tiles(tile, x.device)
    y = x.new_empty(batch, sum(plan.widths_out))
    m_tiles = triton.cdiv(batch, tile.m)
    launch.run(
        linear_fwd_kernel, (m_tiles * len(tiles),), x, weights, biases, y, tiles,
        batch, x.stride(0), y.stride(0), m_tiles, len(tiles), launch=tile, RELU=relu,
        ALIGNED=plan.aligned, WIDEN=launch.widen(x), PRECISION=launch.precision(x),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP,
    )  # fmt: skip
    return y


def linear_dx(plan, dy, weights, x, relu):
    """dx [B, columns], masked by x > 0 where x came out of a ReLU."""
    tile, batch = launch.choose("input", dy), dy.shape[0]
    tiles, users = plan.dx_tiles(tile, dy.device)
    dx, m_tiles = torch.empty_like(x), triton.cdiv(batch, tile.m)
    launch.run(
        linear_dx_kernel, (m_tiles * len(tiles),), dy, weights, x, dx, tiles, users,
        batch, x.stride(0), dy.stride(0), m_tiles, len(tiles), launch=tile, MASK=relu,
        ALIGNED=plan.aligned, WIDEN=launch.widen(dy), PRECISION=launch.precision(dy),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP,
    )  # fmt: skip
    return dx


def linear_dw(plan, dy, x, weights, biases):
    """dW and db, end to end as the weights and biases are."""
    tile = launch.choose("weight", dy)
    tiles, users = plan.dw_tiles(tile, dy.device)
    dw, dbias = torch.empty_like(weights), torch.empty_like(biases)
    launch.run(
        linear_dw_kernel, (len(tiles),), dy, x, dw, dbias, tiles, users,
        x.shape[0], x.stride(0), dy.stride(0), launch=tile,
        ALIGNED=plan.aligned, WIDEN=launch.widen(dy), PRECISION=launch.precision(dy),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
    return dw, dbias


class ConnectorMLP(torch.autograd.Function):
    """Arguments after the structure: all features, then each layer's weights and its biases."""

    @staticmethod
    def forward(ctx, wirings, counts, *tensors):
        """wirings: of each layer. counts: of the features, then of the weights of each layer."""
        features, rest = tensors[: counts[0]], tensors[counts[0] :]
        x = launch.side_by_side(features)
        widths = tuple(feature.shape[1] for feature in features)
        ctx.plans, saved = [], []
        for depth, (wiring, count) in enumerate(zip(wirings, counts[1:])):
            weights, biases, rest = rest[:count], rest[count : 2 * count], rest[2 * count :]
            shapes = tuple(tuple(weight.shape) for weight in weights)
            plan, last = plan_of(widths, shapes, wiring), depth == len(wirings) - 1
            packed = launch.end_to_end(weights), launch.end_to_end(biases)
            saved += [x, *packed]
            x = linear_fwd(plan, x, *packed, relu=not last)
            widths = plan.widths_out
            ctx.plans.append(plan)
        ctx.save_for_backward(*saved)
        return x

    @staticmethod
    def backward(ctx, dy):
        refuse_second_derivative("connector_mlp")
        dy, saved, grads, needs = dy.contiguous(), ctx.saved_tensors, [], list(ctx.needs_input_grad[2:])
        for depth in reversed(range(len(ctx.plans))):
            plan, (x, weights, biases) = ctx.plans[depth], saved[3 * depth : 3 * depth + 3]
            count = 2 * len(plan.shapes)
            own, needs = needs[-count:], needs[:-count]
            grads = layer_gradients(plan, dy, x, weights, biases, own) + grads
            if not any(needs):  # nothing below asks for a gradient
                return None, None, *[None] * len(needs), *grads
            dy = linear_dx(plan, dy, weights, x, relu=depth > 0)
        return None, None, *dy.split(ctx.plans[0].widths_in, dim=1), *grads


def layer_gradients(plan, dy, x, weights, biases, needs):
    """The gradients of a layer's weights, then of its biases; None where needs, a bool of each, asks for none."""
    if not any(needs):
        return [None] * len(needs)
    dw, dbias = linear_dw(plan, dy, x, weights, biases)
    grads = []
    for part, shape in zip(dw.split(plan.weight_sizes), plan.shapes):
        grads.append(part.view(shape))
    grads += dbias.split(plan.bias_sizes)
    return [grad if need else None for grad, need in zip(grads, needs)]


@torch.compiler.disable
def connector_mlp(features, layers):
    """The Triton path of `kernels.connector_mlp`."""
    wirings = []
    counts = [len(features)]
    tensors = list(features)
    for layer in layers:
        wirings.append(tuple((int(a), int(k)) for a, k in layer.wiring))
        counts.append(len(layer.weights))
        tensors += [*layer.weights, *layer.biases]
    return ConnectorMLP.apply(wirings, counts, *tensors), None
