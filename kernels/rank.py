"""The rank of each query's true match, without the N x M scores.

    rank_i = |{j != match_i : q_i . t_j >= q_i . t_match_i}|

Scores are compared with the match's score, which comes out of the very same product: a program gathers the matches of
its rows as if they were one more block of targets and keeps the diagonal. Equal targets therefore score exactly alike,
and count against the match. The targets are split over a few programs, whose counts are added at the end.

Letters: N queries, M targets, D their width.
"""

import torch
import triton
import triton.language as tl

from kernels import launch

PROGRAMS = 512  # about four for each multiprocessor of a large GPU


@triton.jit
def scores(q_ptrs, t_ptrs, row_mask, target_mask, width, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        k_mask = depth < width - k
        q = tl.load(q_ptrs + k + depth[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [M, K]
        t = tl.load(t_ptrs + k + depth[:, None], mask=k_mask[:, None] & target_mask[None, :], other=0.0)  # [K, N]
        if WIDEN:
            q, t = q.to(tl.float32), t.to(tl.float32)
        acc = tl.dot(q, t, acc, input_precision=PRECISION)
    return acc


@triton.jit
def true_rank_kernel(
    q_ptr, t_ptr, match_ptr, rank_ptr, n_queries, n_targets, width, span,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Counts of one block of queries over the targets [split * span, (split + 1) * span), to rank [splits, N]."""
    split = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, BLOCK)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + local
    row_mask = rows < n_queries
    match = tl.load(match_ptr + rows, mask=row_mask, other=0)
    q_ptrs = q_ptr + rows[:, None] * width
    own = scores(q_ptrs, t_ptr + match[None, :] * width, row_mask, row_mask, width,
                 WIDEN, PRECISION, BLOCK, BLOCK, BLOCK_K)  # fmt: skip
    own = tl.sum(tl.where(local[:, None] == local[None, :], own, 0.0), 1)  # [BLOCK]
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, span, BLOCK):
        targets = split * span + start + local
        target_mask = targets < n_targets
        s = scores(q_ptrs, t_ptr + targets[None, :] * width, row_mask, target_mask, width,
                   WIDEN, PRECISION, BLOCK, BLOCK, BLOCK_K)  # fmt: skip
        ahead = ~(s < own[:, None]) & (targets[None, :] != match[:, None]) & target_mask[None, :]
        rank += tl.sum(ahead.to(tl.int32), 1)
    tl.store(rank_ptr + split * n_queries + rows, rank, mask=row_mask)


@torch.compiler.disable
def true_rank(queries, targets, match, block_bytes):
    """The Triton path of `kernels.true_rank`."""
    queries, targets, match = queries.contiguous(), targets.contiguous(), match.contiguous()
    tile = launch.choose("rank", queries)
    n_queries, n_targets = len(queries), len(targets)
    q_tiles, t_tiles = triton.cdiv(n_queries, tile.m), triton.cdiv(n_targets, tile.m)
    splits = min(t_tiles, triton.cdiv(PROGRAMS, q_tiles))
    span = triton.cdiv(t_tiles, splits) * tile.m
    splits = triton.cdiv(n_targets, span)
    ranks = torch.empty(splits, n_queries, dtype=torch.int32, device=queries.device)
    launch.run(
        true_rank_kernel, (q_tiles, splits), queries, targets, match, ranks, n_queries, n_targets, queries.shape[1],
        span, launch=tile, WIDEN=launch.widen(queries), PRECISION=launch.precision(queries),
        BLOCK=tile.m, BLOCK_K=tile.k,
    )  # fmt: skip
    return ranks.sum(0, dtype=torch.int64)
