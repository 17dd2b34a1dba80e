"""AdamW for a weight whose gradient is an outer product of few rows: g = clip * dy.T @ x never exists in memory.

    m <- beta1 m + (1 - beta1) g                  v <- beta2 v + (1 - beta2) g^2
    w <- w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The last layer of a hypernetwork has O = half a million outputs and K = 1000 inputs, but only R = pairs x layers rows
make its gradient. A program makes its tile of g with one product of R deep and uses it at once: w, m and v are read and
written once, six passes over [O, K] instead of ten, which is all the time this takes.

The numbers that change with the step come from the host, or from a tensor: a CUDA graph repeats its launches with the same
arguments, and finds other numbers in the tensor.

Rows of w, m and v that begin on multiples of 16 numbers (`kernels.padded_rows`) are read 128 bits at a time, others
number by number: the paper's K is 513, its hidden units and a bias.

Letters: R rows of the gradient, O x K the shape of the weight.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import has_padded_rows, launch, padded_length


@triton.jit(do_not_specialize=["numbers_ptr"])  # rows of a table, which begin anywhere
def adamw_outer_kernel(
    w_ptr, m_ptr, v_ptr, dy_ptr, x_ptr, clip_ptr, numbers_ptr, r_size, o_size, k_size, k_stride, k_tiles,
    decay, step_size, rest1, beta2, rest2, root2, eps,
    HAS_CLIP: tl.constexpr, HAS_NUMBERS: tl.constexpr, PADDED: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of w, m and v. Programs of one row of tiles follow each other and share dy.

    Rows of w, m, v and x are k_stride long, of which the first k_size numbers are theirs. What pads w, m and v is read along
    and never written. A mask that ends within 16 numbers breaks up accesses, so only the last tile of a row stores by one.
    """
    pid = tl.program_id(0).to(tl.int64)
    k_tile = pid % k_tiles
    outs = (pid // k_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    ins = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    out_mask, in_mask = outs < o_size, ins < k_stride

    # Before the product: the loads are under way while it is made, and their registers are not on top of its own.
    at = outs[:, None] * k_stride + ins[None, :]
    mask = out_mask[:, None] & in_mask[None, :]
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_O, BLOCK_K]
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)

    g = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    for r in range(0, r_size, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R).to(tl.int64)
        r_mask = rows < r_size
        dy = tl.load(
            dy_ptr + rows[None, :] * o_size + outs[:, None], mask=out_mask[:, None] & r_mask[None, :], other=0.0
        )  # [BLOCK_O, BLOCK_R]
        x = tl.load(
            x_ptr + rows[:, None] * k_stride + ins[None, :], mask=r_mask[:, None] & in_mask[None, :], other=0.0
        )  # [BLOCK_R, BLOCK_K]
        if WIDEN:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        g = tl.dot(dy, x, g, input_precision=PRECISION)
    if HAS_CLIP:
        g *= tl.load(clip_ptr)
    if HAS_NUMBERS:
        decay, step_size, root2 = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)

    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w = w * decay - step_size * m / (tl.sqrt(v) / root2 + eps)
    if PADDED:
        if k_tile == k_tiles - 1:
            store(w_ptr, m_ptr, v_ptr, at, w, m, v, out_mask[:, None] & (ins < k_size)[None, :])
        else:
            store(w_ptr, m_ptr, v_ptr, at, w, m, v, mask)
    else:
        store(w_ptr, m_ptr, v_ptr, at, w, m, v, mask)


@triton.jit
def store(w_ptr, m_ptr, v_ptr, at, w, m, v, mask):
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=mask)


@torch.compiler.disable
def adamw_outer(weight, exp_avg, exp_avg_sq, grad_out, inputs, numbers, betas, eps, weight_decay, clip):
    """The Triton path of `kernels.adamw_outer`."""
    (beta1, beta2), (o_size, k_size) = betas, weight.shape
    k_stride = row_length(weight, exp_avg, exp_avg_sq)
    grad_out = grad_out.contiguous()
    inputs = F.pad(inputs, (0, k_stride - k_size)) if k_stride > k_size else inputs.contiguous()  # [R, k_stride]
    on_device = isinstance(numbers, torch.Tensor)
    numbers_ptr, decay, step_size, root2 = (numbers.float(), 0.0, 0.0, 0.0) if on_device else (inputs, *numbers[2:])
    tile = launch.choose("adamw", inputs)
    k_tiles = triton.cdiv(k_stride, tile.n)
    launch.run(
        adamw_outer_kernel, (triton.cdiv(o_size, tile.m) * k_tiles,), weight, exp_avg, exp_avg_sq, grad_out, inputs,
        inputs if clip is None else clip, numbers_ptr, len(inputs), o_size, k_size, k_stride, k_tiles,
        decay, step_size, 1 - beta1, beta2, 1 - beta2, root2, eps, launch=tile,
        HAS_CLIP=clip is not None, HAS_NUMBERS=on_device, PADDED=k_stride != k_size,
        WIDEN=launch.widen(inputs), PRECISION=launch.precision(inputs),
        BLOCK_O=tile.m, BLOCK_K=tile.n, BLOCK_R=tile.k,
    )  # fmt: skip


def row_length(weight, exp_avg, exp_avg_sq):
    """How many numbers lie between the beginnings of two rows: K, or more in tensors of `kernels.padded_rows`."""
    named = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if all(tensor.is_contiguous() for tensor in named.values()):
        return weight.shape[1]
    if all(has_padded_rows(tensor) for tensor in named.values()):
        return padded_length(weight.shape[1])
    for name, tensor in named.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: is updated in place, so it needs to be contiguous, or all three from padded_rows"
            )
