"""Times launches against their alternatives on a GPU: python -m kernels.tune [--json FILE]

kernels/launch.py was chosen by what the compiler makes of each launch. Here the bfloat16 entries for a Hopper run against
other tiles, all else as it is, on 27 pairs with layers of their own. The first row of each kernel is the table's. A
launch that does not compile, or needs too much shared memory, is named and left out.
"""

import argparse
from typing import NamedTuple

import torch

from kernels import bench, launch
from kernels.launch import Launch
from kernels.timing import Results, own_stream, time_calls


class Question(NamedTuple):
    """A launch, the operation of the bench that it is part of, and what it is timed against."""

    kernel: str
    operation: str
    others: list[Launch]


QUESTIONS = [
    Question("forward", "forward", [Launch(128, 256, 64, 8, 3), Launch(128, 128, 64, 8, 4), Launch(64, 256, 64, 4, 3)]),
    Question("input", "backward", [Launch(128, 128, 64, 8, 3), Launch(128, 128, 64, 8, 4)]),
    Question("weight", "backward", [Launch(128, 128, 64, 8, 3), Launch(128, 128, 64, 8, 4)]),
    Question("logits", "loss", [Launch(128, 128, 64, 8, 4), Launch(128, 256, 64, 8, 3)]),
    Question("gradient_stored", "loss", [Launch(128, 128, 64, 8, 3), Launch(128, 256, 64, 8, 3)]),
]


def ask(results, question, shape, impl, seconds):
    """One row of each of the launches."""
    table = launch.TABLE["hopper", 2]
    own = table[question.kernel]
    for tile in [own, *question.others]:
        where = {"kernel": question.kernel, "operation": question.operation, "batch": shape.batch, "launch": list(tile)}
        table[question.kernel] = tile
        try:
            calls = bench.operations(shape, *bench.ours(impl))[question.operation]
            times = time_calls(shape.device, calls, seconds)
        except Exception as error:
            results.leave_out(f"{where}: {type(error).__name__}: {str(error)[:80]}")
            continue
        finally:
            table[question.kernel] = own
        results.add(where | times)
        print(f"{question.kernel:16} B={shape.batch:<6} {str(list(tile)):22} {times['p50_ms']:9.3f} ms, graph "
              f"{times['graph_p50_ms']} ms", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--json", metavar="FILE", help="write all rows, device, versions and commit")
    parser.add_argument("--pairs", type=int, default=27 if cuda else 2)
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 4096, 16384] if cuda else [32])
    args = parser.parse_args()
    name, device, impl, dtype = "CPU", "cpu", "torch", torch.float32
    if cuda:
        name, device, impl, dtype = torch.cuda.get_device_name(), "cuda", "triton", torch.bfloat16
    else:
        print("no GPU: timing plain torch, which has no launches to choose")
    if cuda and launch.chip(torch.device(device)) != "hopper":
        raise SystemExit(f"{name}: the alternatives are of a Hopper")
    results = Results(args.json, bench.about(name, args, (0.0, 0.0)))
    with own_stream(device):
        for batch in args.batch:
            shape = bench.Shape(args.pairs, batch, "design", dtype, device, "each")
            for question in QUESTIONS:
                ask(results, question, shape, impl, seconds=0.3 if cuda else 0.0)


if __name__ == "__main__":
    main()
