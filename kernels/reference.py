"""Plain torch: the specification of every kernel, and the CPU path.

Letters: P pairs, B batch rows, D width of a pair's image space, R rows of an outer-product gradient, O x K the shape
of a weight, N queries, M targets. Matrix products run in the dtype of the inputs; everything around them in float32
(float64 for float64 inputs, which is how the tests make their truth).
"""

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

EPS = 1e-12  # a row of this norm or less counts as zero: it stays zero and gets no gradient


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def connector_mlp(features, layers):
    """ReLU between layers, none after the last; an output o of a layer is input @ weight.T + bias."""
    activations = features
    for depth, layer in enumerate(layers):
        outputs = [F.linear(activations[a], layer.weights[k], layer.biases[k]) for a, k in layer.wiring]
        activations = outputs if depth == len(layers) - 1 else [F.relu(y) for y in outputs]  # each [B, D]
    sumsq = torch.stack([row_dot(y.detach(), y.detach()) for y in activations])  # [P, B]
    return torch.cat(activations, dim=1), sumsq


def refuse_second_derivative(name):
    """In a backward pass that is itself to be differentiated: the gradient was not made by autograd and would count as a
    constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: its gradient cannot be differentiated again, which create_graph=True asks for")


def row_dot(a, b):
    dtype = accumulator(a.dtype)
    return torch.linalg.vecdot(a.to(dtype), b.to(dtype))  # [B]


def clip_loss(z, images, image_of_pair, logit_scale, sumsq, budget_bytes, counts, share=None):
    loss, correct = ClipLoss.apply(z, torch.as_tensor(logit_scale), images, image_of_pair, sumsq, budget_bytes, share)
    return loss, correct if counts else None


class ClipLoss(torch.autograd.Function):
    """Symmetric InfoNCE of normalised z against images, unit or shorter rows, the gradient made in the forward pass.

    With s = scale z^ y.T, and r_i, c_j the log-sum-exp of row i and column j of s WITHOUT the diagonal,

        loss   = 1/2B sum_i softplus(r_i - s_ii) + softplus(c_i - s_ii)
        dL/ds  = 1/2B (exp(s - r') + exp(s - c'))             off the diagonal, r' and c' with the diagonal
        dL/ds_ii = -1/2B (sigmoid(r_i - s_ii) + sigmoid(c_i - s_ii))

    The diagonal is never "1 - p": that difference loses every digit once training converges.

    Of a share of the rows i all terms are known but c_j, which sums over the rows of all processes.
    """

    @staticmethod
    def forward(ctx, z, scale, images, image_of_pair, sumsq, budget_bytes, share):
        dtype, batch = accumulator(z.dtype), images[0].shape[0]
        widths = [images[i].shape[1] for i in image_of_pair]
        loss = torch.empty(len(widths), dtype=dtype, device=z.device)  # [P]
        dscale = torch.zeros_like(loss)  # [P]
        correct = torch.empty(len(widths), 2, dtype=torch.int64, device=z.device)
        needs_grad = any(ctx.needs_input_grad)
        dz = torch.empty_like(z, memory_format=torch.contiguous_format) if needs_grad else z
        # A block of logits costs about four arrays of its size while it is worked on.
        rows = min(batch, max(1, budget_bytes // (4 * batch * loss.element_size())))
        for p, (x, dx) in enumerate(zip(z.split(widths, 1), dz.split(widths, 1))):
            y = images[image_of_pair[p]]
            squares = row_dot(x, x) if sumsq is None else sumsq[p].to(dtype)
            inverse = torch.where(squares > EPS**2, squares.rsqrt(), 0)[:, None]  # [B, 1]
            unit = x * inverse  # [B, D], in the accumulator's dtype
            loss[p], correct[p], gradient = _one_pair(unit, y, scale.to(dtype), rows, needs_grad, share)
            if needs_grad:
                radial = row_dot(unit, gradient)[:, None]  # [B, 1]
                gradient.addcmul_(unit, radial, value=-1)
                torch.mul(gradient, inverse, out=dx) if dx.dtype == dtype else dx.copy_(gradient * inverse)
                dscale[p] = radial.sum() / scale
        ctx.save_for_backward(dz, dscale.to(scale.dtype))
        ctx.widths = widths
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, dloss, _):
        refuse_second_derivative("clip_loss")
        dz, dscale = ctx.saved_tensors
        grad = torch.empty_like(dz) if ctx.needs_input_grad[0] else None  # [B, sum D]
        if grad is not None:
            for into, d, g in zip(grad.split(ctx.widths, 1), dz.split(ctx.widths, 1), dloss.to(dz.dtype)):
                torch.mul(d, g, out=into)
        return grad, (dloss @ dscale.to(dloss)).to(dscale) if ctx.needs_input_grad[1] else None, *[None] * 5


def _one_pair(unit, y, scale, rows, needs_grad, share):
    """Loss, counts and dL/dunit of one pair, through blocks of `rows` rows of the logits. unit [b, D]: of a share, or all B."""
    (count, _), batch = unit.shape, y.shape[0]
    starts = range(0, count, rows)
    first = share.first if share else 0
    mine = slice(first, first + count)
    left, wide = unit.to(y.dtype), y[mine].to(unit.dtype)  # the same tensors, unless the inputs are 16-bit
    positive = row_dot(unit, wide) * scale  # [b]

    def block(start):
        """Exponentials [rows, B] relative to the best of each row and of each column, and both bests."""
        s = (left[start : start + rows] @ y.T).to(unit.dtype).mul_(scale)
        own = s.diagonal(first + start)
        match = own.clone()  # from the same product as its rivals, so that equal candidates tie
        own.fill_(-1e9)
        row_best, col_best = s.amax(1), s.amax(0)
        return (s - row_best[:, None]).exp_(), s.sub_(col_best).exp_(), row_best, col_best, match

    row_lse, row_best, match = (torch.empty_like(positive) for _ in range(3))
    col_lse, col_best = (positive.new_full((batch,), -1e9) for _ in range(2))
    for start in starts:
        by_row, by_col, best, best_col, own = block(start)
        stripe = slice(start, start + rows)
        row_lse[stripe], row_best[stripe], match[stripe] = best + by_row.sum(1).log_(), best, own
        col_lse = torch.logaddexp(col_lse, best_col + by_col.sum(0).log_())
        col_best = torch.maximum(col_best, best_col)
    all_positive = positive  # [B]
    if share:
        col_lse, all_positive = of_all_rows(col_lse, positive, share)
    correct = torch.stack([(match > row_best).sum(), (match > col_best[mine]).sum()])  # a tie is no match
    loss = (F.softplus(row_lse - positive) + F.softplus(col_lse[mine] - positive)).sum() / (2 * batch)
    if not needs_grad:
        return loss, correct, None

    diagonal = torch.sigmoid(row_lse - positive) + torch.sigmoid(col_lse[mine] - positive)  # [b]
    row_lse, col_lse = torch.logaddexp(row_lse, positive), torch.logaddexp(col_lse, all_positive)
    gradient = torch.empty_like(wide)
    for start in starts:
        stripe = slice(start, start + rows)
        if rows < count:
            by_row, by_col, best, best_col, _ = block(start)
        by_row.mul_((best - row_lse[stripe]).exp_()[:, None])
        g = by_row.addcmul_(by_col, (best_col - col_lse).exp_())  # [rows, B]
        if g.dtype == y.dtype:
            torch.mm(g, y, out=gradient[stripe])
        else:
            gradient[stripe] = g.to(y.dtype) @ y
    return loss, correct, gradient.addcmul_(diagonal[:, None], wide, value=-1).mul_(scale / (2 * batch))


def of_all_rows(col_lse, positive, share):
    """Of the logits of all processes: the log-sum-exp of each column and the diagonal, [B] each. col_lse [B]: over this
    process's rows. positive [b]: their part of the diagonal."""
    padded = torch.zeros_like(col_lse)
    padded[share.first : share.first + len(positive)] = positive
    lses, positives = share.gather(torch.stack([col_lse, padded])).unbind(1)  # [processes, B] each
    return lses.logsumexp(0), positives.sum(0)


def adamw_outer(weight, exp_avg, exp_avg_sq, grad_out, inputs, numbers, betas, eps, weight_decay, clip):
    """torch.optim.AdamW on row blocks of the weight, each with its own slice of the outer product."""
    rows = max(1, 2**21 // weight.shape[1])  # a few MB at a time
    step, lr = numbers[:2]
    before = torch.as_tensor(step, dtype=torch.float32, device=weight.device) - 1
    options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    for start in range(0, weight.shape[0], rows):
        w, m, v = ([t[start : start + rows]] for t in (weight, exp_avg, exp_avg_sq))
        g = (grad_out[:, start : start + rows].T @ inputs).to(weight.dtype)  # [rows, K]
        if clip is not None:
            g.mul_(clip)
        adamw(w, [g], m, v, [], [before.clone()], fused=True, amsgrad=False, maximize=False, **options)


def outer_grad_norm_sq(grad_out, inputs):
    """||A.T B||_F^2 = sum of (A A.T) * (B B.T), both R x R."""
    return (gram(grad_out) * gram(inputs)).sum()


def gram(a, block=2**16):
    """a @ a.T in float64, which makes products of float32 or shorter numbers exact."""
    return sum((b := a[:, start : start + block].double()) @ b.T for start in range(0, a.shape[1], block))


def true_rank(queries, targets, match, block_bytes):
    """How many targets other than the match do not score lower: a tie counts against the match, and so does a NaN."""
    scores_dtype = accumulator(queries.dtype)
    rows = max(1, block_bytes // (targets.shape[0] * torch.finfo(scores_dtype).bits // 8))
    ranks = []
    for start in range(0, queries.shape[0], rows):
        scores = (queries[start : start + rows] @ targets.T).to(scores_dtype)  # [rows, M]
        own = scores.gather(1, match[start : start + rows, None])  # [rows, 1]
        ranks.append((~(scores < own)).sum(1) - 1)
    return torch.cat(ranks) if ranks else match.new_empty(0)
