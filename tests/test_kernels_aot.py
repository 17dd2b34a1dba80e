"""Every shipped launch, compiled ahead of time for sm_80 and sm_90 without a GPU.

The launchers run on CPU tensors at the design's widths with the launch itself replaced by a recorder; each recorded
kernel, with the very arguments and specialisation a GPU would see, is compiled and its resources are read back.
`python tests/test_kernels_aot.py [part of a kernel's name]` prints the table.
"""

import os
import re
import subprocess
import tempfile

import pytest
import torch

import kernels

pytest.importorskip("triton")
if kernels.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import adamw, connector, contrastive, launch, rank  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one program may use: A100, H100 and H200
GENERATION = {80: "ampere", 90: "hopper"}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int8: "i8",
         torch.int32: "i32"}  # fmt: skip
BATCH, TEXT, IMAGE = 1008, [384, 768], [384, 768, 1024]


def steps(dtype):
    """One training step and one ranking, at the design's widths and for every mode of the loss."""
    x = [torch.zeros(BATCH, d, dtype=dtype, requires_grad=True) for d in TEXT]
    weights = [torch.zeros(1024, d, dtype=dtype, requires_grad=True) for d in TEXT]
    outs = [torch.zeros(d, 1024, dtype=dtype, requires_grad=True) for d in IMAGE]
    biases = [[torch.zeros(len(w), dtype=dtype, requires_grad=True) for w in ws] for ws in (weights, outs)]
    layers = [
        kernels.Layer(weights, biases[0], [(0, 0), (1, 1)]),
        kernels.Layer(outs, biases[1], [(t, i) for t in range(2) for i in range(3)]),
    ]
    z, sumsq = connector.connector_mlp(x, layers)
    z.backward(torch.zeros_like(z))
    z, y = z.detach().requires_grad_(), [torch.zeros(BATCH, d, dtype=dtype) for d in IMAGE]
    for scale, given in ((20.0, sumsq), (150.0, None)):
        loss, _ = contrastive.clip_loss(z, y, (0, 1, 2) * 2, scale, given, 2**30)
        loss.sum().backward()
    head = [torch.zeros(1008, 1024) for _ in range(3)]
    for clip in (None, torch.ones(())):
        args = torch.zeros(54, 1008, dtype=dtype), torch.zeros(54, 1024, dtype=dtype)
        adamw.adamw_outer(*head, *args, 3, 1e-3, (0.9, 0.999), 1e-8, 0.01, clip)
    rank.true_rank(y[1], y[1], torch.zeros(BATCH, dtype=torch.int64), 2**20)


def record(arch, dtype, tf32):
    """(kernel, source, launch) of every different launch of `steps`."""
    found = {}

    def recorder(kernel, grid, *args, launch, **meta):
        constants, signature, attributes = {}, {}, {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, [*args, *meta.values()])):
            if name in meta:
                name, value = kernel.arg_names[i], meta[kernel.arg_names[i]]
            special = not kernel.params[i].do_not_specialize
            if name in meta or (special and isinstance(value, int) and value == 1):
                constants[i,], signature[name] = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[i,] = [["tt.divisibility", 16]]  # what torch's CUDA allocator returns
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if special and value % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        key = kernel.__name__, str(signature), str(constants), str(attributes)
        found[key] = kernel, ASTSource(kernel, signature, constants, attributes), launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", recorder)
        patch.setattr(launch, "chip", lambda device: GENERATION[arch])
        patch.setattr(launch, "precision", lambda tensor: "tf32" if tf32 else "ieee")
        steps(dtype)
    return list(found.values())


def compile(arch, source, config):
    """Registers, bytes of stack (where spilled registers go), shared memory and tensor-core instructions."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    products = sorted(set(re.findall(r"((?:wgmma\.mma_async|mma)\.sync\S*?\.m\d+n\d+k\d+)", done.asm["ptx"])))
    return {"registers": registers, "spilled": stack + local, "shared": done.metadata.shared, "products": products}


CASES = [(arch, dtype, tf32) for arch in (80, 90)
         for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))]  # fmt: skip
ELEMENTWISE = ("positives_kernel", "reduce_kernel", "clip_bwd_kernel")


@pytest.mark.parametrize("arch, dtype, tf32", CASES)
def test_compiles_without_spills_onto_tensor_cores(arch, dtype, tf32):
    """float16 shares bfloat16's launches and instructions, so it is not compiled again."""
    for kernel, source, config in record(arch, dtype, tf32):
        report, name = compile(arch, source, config), kernel.__name__
        assert report["spilled"] == 0, (name, config, report)
        assert report["shared"] <= SHARED_BYTES[arch], (name, config, report)
        if name not in ELEMENTWISE and (dtype != torch.float32 or tf32):
            wanted = "wgmma" if arch == 90 else "mma"
            assert report["products"] and all(p.startswith(wanted) for p in report["products"]), (name, config, report)


if __name__ == "__main__":
    import sys

    only = sys.argv[1] if len(sys.argv) > 1 else ""  # part of a kernel's name
    for arch, dtype, tf32 in [*CASES, (80, torch.float16, False), (90, torch.float16, False)]:
        for kernel, source, config in record(arch, dtype, tf32):
            if only not in kernel.__name__:
                continue
            r = compile(arch, source, config)
            kind = "tf32" if tf32 else TYPES[dtype]
            flags = [f"{k}={source.constants[i,]}" for i, k in enumerate(kernel.arg_names)
                     if (i,) in source.constants and k in ("RELU", "MASK", "MODE", "STORED", "HAS_CLIP")]  # fmt: skip
            tile = f"{config.m}x{config.n}x{config.k} w{config.num_warps} s{config.num_stages}"
            products = ", ".join(re.sub(r"\.sync\.aligned|_async", "", s) for s in r["products"])
            print(f"sm_{arch} {kind:5} {kernel.__name__:20} {' '.join(flags):10} {tile:20} {r['registers']:4} regs "
                  f"{r['spilled']:5} spilled {r['shared']:7} shared  {products}", flush=True)  # fmt: skip
