"""Compiles every shipped launch for an A100 (sm_80) and an H100 (sm_90), without a GPU, and reads what it takes.

    python -m kernels.aot                    # a line for each launch
    python -m kernels.aot logits             # of the kernels with this in their name
    python -m kernels.aot --write            # all, and kernels/aot.json takes down what this version of Triton makes of them
    PYTHONPATH=DIR python -m kernels.aot --write    # of another version: pip install --no-deps --target DIR triton==3.6.0

The launchers run on CPU tensors at the design's widths, with the launch itself replaced by a recorder; each recorded
kernel is compiled with the arguments and the specialisation that a GPU would see. ptxas, the assembler in Triton's
wheel, then names its registers, its spills and, in a warning C75xx, tensor-core instructions of which each waits for
the one before.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import adamw, connector, contrastive, contrastive_kernels, launch, rank

TABLE = Path(__file__).with_name("aot.json")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int8: "i8",
         torch.int32: "i32"}  # fmt: skip
CASES = []  # (arch, dtype, whether float32 products run as tf32)
for arch in (80, 90):
    CASES += [(arch, torch.bfloat16, False), (arch, torch.float32, True), (arch, torch.float32, False)]
GENERATION = {80: "ampere", 90: "hopper"}

# Of one multiprocessor of an A100 and of an H100 or H200.
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_SHARED_BYTES = 1024  # of each program
REGISTERS = 65536
WARPS = 64

BATCH, TEXT, IMAGE = 1008, [384, 768], [384, 768, 1024]
HEAD_WIDTHS = [1024, 513]  # inputs of a hypernetwork's last layer: a round number, and the paper's 512 with a bias


class Assembled(NamedTuple):
    """What ptxas says of a kernel."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread
    warnings: list[str]  # such as "C7515 Potential Performance Loss: ..."


class Compiled(NamedTuple):
    """What one launch takes on one chip."""

    name: str  # the chip, the dtype, the kernel and what it is compiled for
    tile: launch.Launch
    registers: int  # of a thread
    programs: int  # that run on a multiprocessor at once
    shared: int  # bytes of a program
    spilled: int  # bytes of a thread
    products: list[str]  # tensor-core instructions
    warnings: list[str]  # "C7515: ..." of ptxas


# --------------------------------------------------------------------------------------------- what is launched


def steps(dtype):
    """One training step and one ranking, at the design's widths and in every mode of the loss."""
    features = [torch.zeros(BATCH, d, dtype=dtype, requires_grad=True) for d in TEXT]
    first = layer([(1024, d) for d in TEXT], [(0, 0), (1, 1)], dtype)
    last = layer([(d, 1024) for d in IMAGE], [(t, i) for t in range(2) for i in range(3)], dtype)
    z, _ = connector.connector_mlp(features, [first, last])
    z.backward(torch.zeros_like(z))

    z = z.detach().requires_grad_()
    images = [torch.zeros(BATCH, d, dtype=dtype) for d in IMAGE]
    for scale in (20.0, 150.0):
        for counts in (False, True):
            loss, _ = contrastive.clip_loss(z, images, (0, 1, 2) * 2, scale, None, 2**30, counts)
            loss.sum().backward()

    for width in HEAD_WIDTHS:
        head = [kernels.padded_rows(torch.zeros(1008, width)) for _ in range(3)]
        for clip in (None, torch.ones(())):
            factors = torch.zeros(54, 1008, dtype=dtype), torch.zeros(54, width, dtype=dtype)
            numbers = kernels.adamw_numbers(3, 1e-3)
            for given in (numbers, torch.tensor(numbers)):
                adamw.adamw_outer(*head, *factors, given, (0.9, 0.999), 1e-8, 0.01, clip)
    rank.true_rank(images[1], images[1], torch.zeros(BATCH, dtype=torch.int64), 2**20)


def layer(shapes, wiring, dtype):
    weights = [torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    biases = [torch.zeros(rows, dtype=dtype, requires_grad=True) for rows, _ in shapes]
    return kernels.Layer(weights, biases, wiring)


def record(arch, dtype, tf32):
    """(kernel, source, launch) of every different launch of `steps`."""
    found = {}

    def recorder(kernel, grid, *args, launch, **meta):
        values = dict(zip(kernel.arg_names, args)) | meta
        constants, signature, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            value, special = values[name], not kernel.params[i].do_not_specialize
            if name in meta or (special and isinstance(value, int) and value == 1):
                constants[i,], signature[name] = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if special:
                    attributes[i,] = [["tt.divisibility", 16]]  # what torch's CUDA allocator returns
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if special and value % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        key = kernel.__name__, str(signature), str(constants), str(attributes), launch
        found[key] = kernel, ASTSource(kernel, signature, constants, attributes), launch

    replaced = {
        "run": recorder,
        "chip": lambda device: GENERATION[arch],
        "precision": lambda tensor: "tf32" if tf32 else "ieee",
    }
    with replace(launch, replaced):
        steps(dtype)
    return list(found.values())


@contextmanager
def replace(module, attributes):
    """The module with other attributes."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


# ------------------------------------------------------------------------------------------------ what it takes


def compile(arch, dtype, tf32, kernel, source, tile):
    """Compiled of one recorded launch."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assembled = read_assembler(assemble(arch, done.asm["ptx"]))
    products = re.findall(r"((?:wgmma\.mma_async|mma)\.sync\S*?\.m\d+n\d+k\d+)", done.asm["ptx"])
    shared = done.metadata.shared
    return Compiled(
        name_of(arch, dtype, tf32, kernel, source),
        tile,
        assembled.registers,
        programs_on(arch, assembled.registers, shared, tile.num_warps),
        shared,
        assembled.spilled,
        sorted(set(products)),
        assembled.warnings,
    )


def read_assembler(said):
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill)", said)))
    warnings = {f"{code}{about}" for code, about in re.findall(r"\((C75\d\d)\)([^\n]*)", said)}
    return Assembled(registers, spilled, sorted(warnings))


def assemble(arch, ptx):
    """What ptxas prints of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = "sm_90a" if arch == 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={name}", file, "-o", os.devnull]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stdout}")
    return done.stdout


def name_of(arch, dtype, tf32, kernel, source):
    """Such as "sm_90 bf16 linear_fwd_kernel RELU SUMSQ=0"."""
    parts = [f"sm_{arch}", "tf32" if tf32 else TYPES[dtype], kernel.__name__]
    for i, name in enumerate(kernel.arg_names):
        value = source.constants.get((i,))
        if isinstance(value, int) and not name.startswith(("BLOCK", "GROUP", "WIDEN", "LOGIT")):
            parts.append(f"{name}={int(value)}")
    return " ".join(parts)


def programs_on(arch, registers, shared, warps):
    """How many programs run on a multiprocessor at once."""
    of_a_warp = -(-registers // 8) * 8 * 32  # registers are allotted in eights
    return min(
        REGISTERS // (of_a_warp * warps),
        SHARED_BYTES[arch] // (shared + RESERVED_SHARED_BYTES),
        WARPS // warps,
    )


def compile_all(case, only=""):
    """Compiled of every launch of a case, of the kernels with `only` in their name."""
    found = []
    for kernel, source, tile in record(*case):
        if only in kernel.__name__:
            found.append(compile(*case, kernel, source, tile))
    return found


# --------------------------------------------------------------------------------------------------- the table


def digest():
    """Changes with what is compiled: the kernels, their launches and the steps that are recorded, comments aside."""
    hashed = hashlib.sha256()
    for module in (adamw, connector, contrastive, contrastive_kernels, launch, rank):
        for line in Path(module.__file__).read_text().splitlines():
            code = re.sub(r"\s*# .*", "", line)
            hashed.update(code.encode())
    return hashed.hexdigest()[:16]


def table_of(compiled):
    """{name: what it takes}. Where several launches share a name, because they differ in what their arguments are multiples of,
    the one with most registers stands for them."""
    table = {}
    for one in sorted(compiled, key=lambda one: (one.spilled, len(one.warnings), one.registers)):
        table[one.name] = {
            "registers": one.registers,
            "programs": one.programs,
            "spilled": one.spilled,
            "warnings": [warning[:5] for warning in one.warnings],
        }
    return table


def write(compiled, compiled_from):
    """Adds what this version of Triton says to the table. compiled_from: the `digest` before."""
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables[triton.__version__] = {"digest": compiled_from, "launches": table_of(compiled)}
    text = json.dumps(dict(sorted(tables.items())), indent=1)
    text = re.sub(
        r"\{\s+(\"registers.*?)\s+\}", lambda row: "{" + re.sub(r"\s+", " ", row[1]) + "}", text, flags=re.DOTALL
    )
    TABLE.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="part of a kernel's name")
    parser.add_argument("--write", action="store_true", help="write the table, of all kernels")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write takes all kernels")
    print(f"Triton {triton.__version__}")
    compiled, compiled_from = [], digest()
    for case in CASES:
        for one in compile_all(case, args.only):
            compiled.append(one)
            print(line_of(one), flush=True)
    if args.write:
        write(compiled, compiled_from)


def line_of(one):
    tile = f"{one.tile.m}x{one.tile.n}x{one.tile.k} w{one.tile.num_warps} s{one.tile.num_stages}"
    products = ", ".join(re.sub(r"\.sync\.aligned|_async", "", product) for product in one.products)
    warnings = " ".join(warning.split(":")[0][:5] for warning in one.warnings)
    return (f"{one.name:70} {tile:18} {one.registers:4} registers {one.programs:2} programs {one.spilled:5} spilled "
            f"{one.shared:7} shared {warnings} {products}")  # fmt: skip


if __name__ == "__main__":
    main()
