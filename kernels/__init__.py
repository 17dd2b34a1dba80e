"""Every pair of a stitched vision-language model in one pass: connectors, contrastive loss, optimiser, ranks.

Each function has one plain-torch version (kernels/reference.py: the specification and the CPU path) and one set of
Triton kernels (the file named after it). `impl` chooses: None takes Triton for CUDA tensors and torch for all others;
"torch" and "triton" insist. Insisting on Triton where it cannot run raises RuntimeError; None falls back to torch with
one printed line. Every argument is checked before any launch: a bad device, dtype, shape or index raises ValueError
naming the argument. Float64 is for checking and runs in torch only.

Letters: P pairs, B batch rows, D_t and D_i the widths of text and image encoders, D_p the image width of pair p.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dense, reference

__all__ = [
    "Layer",
    "Share",
    "connector_mlp",
    "clip_loss",
    "adamw_numbers",
    "adamw_outer",
    "padded_rows",
    "outer_grad_norm_sq",
    "true_rank",
    "triton_runs",
]

SECTOR = 16  # rows that begin on multiples of so many numbers are read as vectors


class Layer(NamedTuple):
    """One layer of every pair's connector. Its outputs are input @ weight.T + bias, one per entry of `wiring`."""

    weights: Sequence[Tensor]  # W_k [out_k, in_k], ragged
    biases: Sequence[Tensor]  # b_k [out_k]
    wiring: Sequence[tuple[int, int]]  # (input, weight) of each output; inputs and weights may be shared


class Share(NamedTuple):
    """The rows of a batch that are this process's, where several share it."""

    first: int  # place of the first of them in the batch
    gather: Callable[[Tensor], Tensor]  # this process's tensor to those of all, of one shape: [processes, ...]


def connector_mlp(features: Sequence[Tensor], layers: Sequence[Layer], *, impl=None) -> tuple[Tensor, Tensor | None]:
    """All connectors at once. features: [B, D_t] per text encoder, never expanded over the pairs that share them.

    Layer 0's inputs are the features, layer l's the outputs of layer l - 1; ReLU after every layer but the last, whose
    outputs are the pairs in order. Returns z [B, sum D_p], pair after pair, NOT normalised, and what `clip_loss` takes as
    sumsq: from plain torch [P, B] float32, the sum of squares of each pair's row, and None from the kernels, whose loss has
    no use for it. sumsq carries no gradient: `clip_loss` differentiates through the normalisation itself. Gradients flow to
    weights, biases and those features that ask for one.

    Predicted connectors: wiring (text of p, p), then (p, p). Factored: (t, t), then (text of p, image of p): few inputs, of
    which impl=None makes one product of torch's each, and impl="triton" a ragged launch all the same.
    """
    _check_connector(features, layers)
    tensors = [*features, *(t for layer in layers for t in (*layer.weights, *layer.biases))]
    if _use_triton(impl, tensors):
        if impl is None and dense.is_dense(features, layers):
            run = dense.connector_mlp
        else:
            from kernels.connector import connector_mlp as run
    else:
        run = reference.connector_mlp
    return run(features, layers)


def clip_loss(
    z: Tensor,
    images: Sequence[Tensor],
    image_of_pair: Sequence[int],
    logit_scale,
    *,
    sumsq: Tensor | None = None,
    counts: bool = False,
    share: Share | None = None,
    budget_bytes: int = 2**30,
    impl=None,
) -> tuple[Tensor, Tensor | None]:
    """Symmetric InfoNCE of every pair: the mean of both cross entropies of logit_scale * z^_p @ images.T.

    z [B, sum D_p] as `connector_mlp` returns it, normalised here; images: unit rows [B, D_i] per image encoder, or shorter
    rows, such as coordinates of unit vectors along orthonormal axes, no gradient; image_of_pair: P indices into images;
    logit_scale: a float from 1 to 150, or for impl="torch" a 0-dim tensor, which may require a gradient. sumsq [P, B] saves
    plain torch a pass over z. Scratch memory stays within budget_bytes (or one row of tiles of logits). Returns loss
    [P] float32 and, with counts, correct [P, 2] int64: how many texts rank their own image first, and how many images
    their own text; a tie is not first. Without counts, which cost the kernels a search for the best of each row and
    column, correct is None. A row of zeros has finite loss and gradient. The gradient itself cannot be differentiated.

    share: z and sumsq have the rows from share.first on alone, and other processes call this with the others of the same
    images and pairs. Then loss is this process's part of the sum that the loss is, and the gradient of z is that of the
    whole. Each process has the logits of its own rows; for each pair they exchange two numbers a row. In plain torch alone,
    and without counts.
    """
    _check_clip_loss(z, images, image_of_pair, sumsq, budget_bytes, share)
    if share and (counts or impl == "triton"):
        raise ValueError("share: has neither counts nor Triton kernels")
    run_triton = not share and _use_triton(impl, [z, *images])
    if isinstance(logit_scale, Tensor):
        if run_triton or logit_scale.dim():
            raise ValueError("logit_scale: a tensor must be 0-dim and needs impl='torch'; pass a float")
    elif not (math.isfinite(logit_scale) and 1 <= logit_scale <= 150):
        raise ValueError(f"logit_scale: {logit_scale} is not between 1 and 150")
    args = z, images, tuple(image_of_pair), logit_scale, sumsq, budget_bytes, counts
    if run_triton:
        from kernels.contrastive import clip_loss as run

        return run(*args)
    return reference.clip_loss(*args, share)


def adamw_outer(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_out: Tensor,
    inputs: Tensor,
    *,
    step: int | None = None,
    lr: float | None = None,
    numbers: Tensor | None = None,
    betas=(0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    impl=None,
) -> None:
    """One step of torch.optim.AdamW, in place, on a weight [O, K] whose gradient is clip * grad_out.T @ inputs.

    weight, exp_avg and exp_avg_sq share dtype and device, and so do the factors, which may be shorter than the weight. The
    kernel needs all three contiguous, or all three from `padded_rows`.
    grad_out [R, O] and inputs [R, K] are all there is of the gradient: it never exists in memory. step counts from 1.
    numbers: in place of step and lr, `adamw_numbers` of the same betas and weight_decay as a tensor on the same device, so that
    a CUDA graph that has recorded this can be replayed at another step and rate.
    clip is a 0-dim float32 tensor on the same device, for instance min(1, limit / sqrt(outer_grad_norm_sq + rest)).
    """
    _check_adamw(weight, exp_avg, exp_avg_sq, grad_out, inputs, step, lr, numbers, clip)
    if numbers is None:
        numbers = adamw_numbers(step, lr, betas, weight_decay)
    if _use_triton(impl, [weight, exp_avg, exp_avg_sq, grad_out, inputs]):
        from kernels.adamw import adamw_outer as run
    else:
        run = reference.adamw_outer
    with torch.no_grad():
        run(weight, exp_avg, exp_avg_sq, grad_out, inputs, numbers, betas, eps, weight_decay, clip)


def adamw_numbers(step: int, lr: float, betas=(0.9, 0.999), weight_decay: float = 0.0) -> tuple[float, ...]:
    """What AdamW needs of a step, which counts from 1: (step, lr, 1 - lr * weight_decay, lr / (1 - beta1^step),
    sqrt(1 - beta2^step)). The differences are made here, in float64: in float32 those of the first steps have few digits."""
    beta1, beta2 = betas
    return float(step), lr, 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5


def padded_rows(matrix: Tensor) -> Tensor:
    """The matrix in rows that begin on multiples of 16 numbers, with zeros between them: how `adamw_outer` reads a weight and its
    moments fastest whose K is no such multiple. A copy of the same shape, or the matrix itself if it lies so already."""
    if has_padded_rows(matrix):
        return matrix
    rows, columns = matrix.shape
    whole = matrix.new_zeros(rows, padded_length(columns))
    whole[:, :columns] = matrix
    return whole[:, :columns]


def has_padded_rows(matrix):
    """Whether it lies in memory as `padded_rows` leaves it, the padding of the last row included."""
    length = padded_length(matrix.shape[1])
    end = (matrix.storage_offset() + len(matrix) * length) * matrix.element_size()
    return matrix.stride() == (length, 1) and end <= matrix.untyped_storage().nbytes()


def padded_length(columns):
    """The next multiple of 16."""
    return -(-columns // SECTOR) * SECTOR


def outer_grad_norm_sq(grad_out: Tensor, inputs: Tensor) -> Tensor:
    """||grad_out.T @ inputs||_F^2 as a 0-dim float64 tensor, from two R x R Gram matrices instead of O x K numbers."""
    _check_matrix("grad_out", grad_out)
    _check_matrix("inputs", inputs, rows=grad_out.shape[0], like=grad_out)
    with torch.no_grad():
        return reference.outer_grad_norm_sq(grad_out, inputs)


def true_rank(queries: Tensor, targets: Tensor, match: Tensor, *, block_bytes: int = 2**28, impl=None) -> Tensor:
    """How many targets other than its match a query does not score lower: [N] int64, 0 for a perfect query.

    queries [N, D], targets [M, D], match [N] int64 in 0..M-1. Ties count against the match, and so do scores that are
    NaN, so that a collapsed or broken connector ranks last and not first. The N x M scores are never held; torch holds
    blocks of block_bytes.
    """
    _check_matrix("queries", queries)
    _check_matrix("targets", targets, columns=queries.shape[1], like=queries)
    if match.shape != queries.shape[:1] or match.dtype != torch.int64 or match.device != queries.device:
        raise ValueError(f"match: needs int64 [{queries.shape[0]}] on {queries.device}")
    if block_bytes < 1:
        raise ValueError(f"block_bytes: {block_bytes} is not positive")
    if _use_triton(impl, [queries, targets]):
        from kernels.rank import true_rank as run
    else:
        run = reference.true_rank
    with torch.no_grad():
        return run(queries, targets, match, block_bytes)


# ------------------------------------------------------------------------------------------------ choice


@cache
def triton_runs() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def can_use_triton() -> bool:
    """Whether there are a GPU and Triton here; says so, once, if not."""
    lacking = [name for name, here in (("GPU", torch.cuda.is_available()), ("Triton", triton_runs())) if not here]
    if lacking:
        print(f"kernels: no {' and no '.join(lacking)} here, using plain torch", file=sys.stderr)
    return not lacking


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _use_triton(impl, tensors) -> bool:
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"impl: {impl!r} is not None, 'torch' or 'triton'")
    on_cuda = all(t.is_cuda for t in tensors)
    shorter = all(t.dtype != torch.float64 for t in tensors)
    if impl == "triton":
        if not (on_cuda or interpreted()):
            raise RuntimeError("impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1)")
        if not shorter:
            raise ValueError("impl='triton' has no float64 kernels")
        if not triton_runs():
            raise RuntimeError("impl='triton' needs Triton, which is not installed")
        return True
    return impl is None and can_use_triton() and on_cuda and shorter


# ------------------------------------------------------------------------------------------------ checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_matrix(name, tensor, rows=None, columns=None, like=None):
    if not isinstance(tensor, Tensor) or tensor.dim() != 2:
        raise ValueError(f"{name}: needs a 2-dim tensor")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {tensor.dtype} is not float32, bfloat16, float16 or float64")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is empty")
    if rows not in (None, tensor.shape[0]) or columns not in (None, tensor.shape[1]):
        wanted = [rows or "any", columns or "any"]
        raise ValueError(f"{name}: shape {list(tensor.shape)} does not fit, needs {wanted}")
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, not {like.dtype} on {like.device}")


def _check_connector(features, layers):
    if not len(features):
        raise ValueError("features: none given")
    if not len(layers):
        raise ValueError("layers: none given")
    _check_matrix("features[0]", features[0])
    batch, like = features[0].shape[0], features[0]
    for i, x in enumerate(features):
        _check_matrix(f"features[{i}]", x, rows=batch, like=like)
    widths = [x.shape[1] for x in features]
    for depth, (weights, biases, wiring) in enumerate(layers):
        if len(weights) != len(biases):
            raise ValueError(f"layers[{depth}].biases: {len(biases)} for {len(weights)} weights")
        for k, (w, b) in enumerate(zip(weights, biases)):
            _check_matrix(f"layers[{depth}].weights[{k}]", w, like=like)
            if b.shape != w.shape[:1] or b.dtype != w.dtype or b.device != w.device:
                raise ValueError(f"layers[{depth}].biases[{k}]: needs {w.dtype} [{w.shape[0]}] on {w.device}")
        if not len(wiring):
            raise ValueError(f"layers[{depth}].wiring: empty")
        for o, (a, k) in enumerate(wiring):
            if not (0 <= a < len(widths) and 0 <= k < len(weights)):
                raise ValueError(f"layers[{depth}].wiring[{o}]: ({a}, {k}) is out of range")
            if weights[k].shape[1] != widths[a]:
                raise ValueError(
                    f"layers[{depth}].wiring[{o}]: weight {k} takes {weights[k].shape[1]}, not {widths[a]}"
                )
        widths = [weights[k].shape[0] for _, k in wiring]


def _check_clip_loss(z, images, image_of_pair, sumsq, budget_bytes, share):
    _check_matrix("z", z)
    if not len(images):
        raise ValueError("images: none given")
    batch = images[0].shape[0] if share else z.shape[0]
    if share and not 0 <= share.first <= batch - z.shape[0]:
        raise ValueError(f"share: rows {share.first} to {share.first + z.shape[0]} of {batch}")
    for i, y in enumerate(images):
        _check_matrix(f"images[{i}]", y, rows=batch, like=z)
        if y.requires_grad:
            raise ValueError(f"images[{i}]: asks for a gradient, which frozen images have none of")
    if not len(image_of_pair) or not all(0 <= i < len(images) for i in image_of_pair):
        raise ValueError(f"image_of_pair: needs indices from 0 to {len(images) - 1}")
    width = sum(images[i].shape[1] for i in image_of_pair)
    if z.shape[1] != width:
        raise ValueError(f"z: {z.shape[1]} columns, but the pairs' images have {width}")
    if sumsq is not None and (sumsq.shape != (len(image_of_pair), z.shape[0]) or sumsq.device != z.device):
        raise ValueError(f"sumsq: needs [{len(image_of_pair)}, {z.shape[0]}] on {z.device}")
    if budget_bytes < 1:
        raise ValueError(f"budget_bytes: {budget_bytes} is not positive")


def _check_adamw(weight, exp_avg, exp_avg_sq, grad_out, inputs, step, lr, numbers, clip):
    _check_matrix("weight", weight)
    rows, columns = weight.shape
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_matrix(name, state, rows=rows, columns=columns, like=weight)
    _check_matrix("grad_out", grad_out, columns=rows)
    if grad_out.device != weight.device:
        raise ValueError(f"grad_out: on {grad_out.device}, not {weight.device}")
    _check_matrix("inputs", inputs, rows=grad_out.shape[0], columns=columns, like=grad_out)
    if numbers is None:
        if step is None or lr is None:
            raise ValueError("step: is needed with lr, or numbers in place of both")
        if step < 1:
            raise ValueError(f"step: {step}, but the first step is 1")
    elif step is not None or lr is not None:
        raise ValueError("numbers: stand in place of step and lr")
    elif numbers.shape != (5,) or not numbers.is_floating_point() or numbers.device != weight.device:
        raise ValueError(f"numbers: needs a tensor of the five of adamw_numbers on {weight.device}")
    if clip is not None and (clip.dim() or clip.dtype != torch.float32 or clip.device != weight.device):
        raise ValueError(f"clip: needs a 0-dim float32 tensor on {weight.device}")
