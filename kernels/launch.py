"""What every launcher shares: the launch table, precision, packing, and index tables on the device."""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import SECTOR, interpreted


class Launch(NamedTuple):
    """Tile of one program: M and N its output, K the depth of a step of its inner loop."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# Not yet measured on a GPU: chosen so that nothing spills, products on Hopper use wgmma and do not wait for one another,
# and shared memory fits (227 KiB on Hopper, 99 KiB for "ampere", which is every older chip). kernels/aot.json has what
# the compiler makes of each, and tests/test_kernels_aot.py holds it.
# "logits" and both "gradient" share M, and their K divides the logits' N: a stripe is one row of tiles of either.
TABLE = {
    ("hopper", 2): {
        "forward": Launch(128, 128, 64, 8, 3),
        "input": Launch(128, 256, 64, 8, 3),
        "weight": Launch(128, 256, 64, 8, 3),
        "logits": Launch(128, 128, 64, 8, 3),
        "gradient": Launch(128, 128, 64, 8, 3),
        "gradient_stored": Launch(128, 128, 64, 4, 3),
        "adamw": Launch(64, 64, 64, 8, 2),
        "rank": Launch(128, 128, 64, 8, 3),
    },
    ("hopper", 4): {
        "forward": Launch(128, 256, 32, 8, 3),
        "input": Launch(128, 128, 32, 8, 3),
        "weight": Launch(128, 128, 32, 8, 3),
        "logits": Launch(128, 128, 32, 8, 3),
        "gradient": Launch(128, 128, 32, 8, 3),
        "gradient_stored": Launch(128, 128, 32, 8, 3),
        "adamw": Launch(64, 32, 32, 4, 2),
        "rank": Launch(64, 64, 32, 4, 3),
    },
    ("ampere", 2): {
        "forward": Launch(128, 128, 32, 8, 3),
        "input": Launch(128, 128, 32, 8, 3),
        "weight": Launch(128, 128, 32, 8, 3),
        "logits": Launch(128, 128, 32, 8, 3),
        "gradient": Launch(128, 128, 32, 8, 3),
        "gradient_stored": Launch(128, 128, 32, 8, 3),
        "adamw": Launch(64, 64, 64, 8, 2),
        "rank": Launch(128, 128, 32, 8, 3),
    },
    ("ampere", 4): {
        "forward": Launch(128, 128, 16, 8, 3),
        "input": Launch(128, 128, 16, 8, 3),
        "weight": Launch(128, 128, 16, 8, 3),
        "logits": Launch(128, 128, 16, 8, 3),
        "gradient": Launch(128, 128, 16, 8, 3),
        "gradient_stored": Launch(128, 128, 16, 8, 3),
        "adamw": Launch(64, 64, 16, 8, 2),
        "rank": Launch(64, 64, 32, 4, 3),
    },
}
INTERPRETER = Launch(32, 64, 32, 1, 1)  # small, so that modest tests still cross the borders of tiles


def choose(kernel, tensor):
    """The launch of a kernel for tensors like this one."""
    generation, size = chip(tensor.device), tensor.element_size()
    if generation is None:
        return INTERPRETER
    if size == 4 and precision(tensor) == "ieee":  # which no tensor core multiplies, on no chip
        generation = "ampere"
    return TABLE[generation, size][kernel]


@lru_cache
def chip(device):
    if interpreted():
        return None
    return "hopper" if torch.cuda.get_device_capability(device) >= (9, 0) else "ampere"


def run(kernel, grid, *args, launch, **meta):
    """The one place that launches: the ahead-of-time tests replace it to see every launch."""
    if capturing(args[0].device):
        keep_tables(args)
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **meta, num_warps=launch.num_warps, num_stages=launch.num_stages)


def precision(tensor):
    """How tl.dot treats float32: as torch's own matrix products do."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and tensor.dtype == torch.float32 else "ieee"


def widen(tensor):
    """Whether to upcast after a load: Triton's interpreter multiplies the bits of bfloat16 as integers."""
    return interpreted() and tensor.dtype == torch.bfloat16


def starts(sizes):
    """Where each of consecutive blocks begins."""
    return [0, *accumulate(sizes)][:-1]


def aligned(*sizes):
    """Whether all are multiples that load as vectors. Others still work, slower, and may spill."""
    return all(size % SECTOR == 0 for size in sizes)


def side_by_side(tensors):
    """[B, D_0 + D_1 + ...]: a copy of the batch, small next to the products made of it."""
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def end_to_end(tensors):
    """All elements in one flat tensor: in place where they already follow each other in memory, else a copy."""
    tensors = [t.detach() for t in tensors]
    ends = [t.data_ptr() + t.numel() * t.element_size() for t in tensors]
    follow = all(end == t.data_ptr() for end, t in zip(ends, tensors[1:]))
    one_storage = len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    if follow and one_storage and all(t.is_contiguous() for t in tensors):
        return tensors[0].as_strided([sum(t.numel() for t in tensors)], [1])
    return torch.cat([t.reshape(-1) for t in tensors])


captured_tables = {}  # by where they lie: a CUDA graph reads them whenever it is replayed, so they are never freed


def keep_tables(args):
    """Keeps the tables among the arguments of a launch, whichever cache they come from."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.dtype == torch.int64:
            captured_tables[arg.data_ptr()] = arg


@lru_cache(maxsize=256)
def table(rows, device):
    """A tuple of equally long tuples of integers as an int64 tensor on the device, copied without a wait."""
    # The copy would be part of the graph, and each replay would read memory of the host that is gone.
    if capturing(device):
        raise RuntimeError(
            "kernels: run the same step once before a CUDA graph captures it, so that its tables are uploaded"
        )
    host = torch.tensor(rows, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def capturing(device):
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@triton.jit
def field(ptr, i, ALIGNED: tl.constexpr):
    """Entry i of a table row; ALIGNED promises a multiple of 16."""
    value = tl.load(ptr + i)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def grouped(pid, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tile (m, n) of a program: GROUP row tiles advance together over the columns, so both operands stay in L2."""
    per_group = GROUP * n_tiles
    first = (pid // per_group) * GROUP
    size = tl.minimum(m_tiles - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size
