"""Every shipped launch compiles for an A100 and an H100 as kernels/aot.json has it, without a GPU (kernels/aot.py)."""

import json

import pytest
import torch

import kernels

pytest.importorskip("triton")
if kernels.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton  # noqa: E402

from kernels import aot  # noqa: E402

TABLES = json.loads(aot.TABLE.read_text())
PER_PROGRAM_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of shared memory
ELEMENTWISE = ("positives_kernel", "reduce_kernel", "clip_bwd_kernel")  # no products
# At bfloat16 on a Hopper two programs share a multiprocessor, so that one multiplies while the other stores.
TWICE = ("linear_fwd_kernel", "logits_kernel MODE=1 BOUNDED=1 COUNTS=0", "STORED=1", "adamw_outer_kernel")


@pytest.mark.parametrize("arch, dtype, tf32", aot.CASES)
def test_compiles_as_the_table_has_it(arch, dtype, tf32):
    """float16 shares bfloat16's launches and instructions, so it is not compiled again."""
    compiled = aot.compile_all((arch, dtype, tf32))
    for one in compiled:
        check(one.name, one._asdict())
        assert one.shared <= PER_PROGRAM_BYTES[arch], one
        if not any(name in one.name for name in ELEMENTWISE) and (dtype != torch.float32 or tf32):
            wanted = "wgmma" if arch == 90 else "mma"
            assert one.products and all(product.startswith(wanted) for product in one.products), one
    table = TABLES.get(triton.__version__)
    if table is None:
        pytest.skip(f"clean, but no table of Triton {triton.__version__}: python -m kernels.aot --write")
    for name, row in aot.table_of(compiled).items():
        assert table["launches"][name] == row, name


@pytest.mark.parametrize("version", TABLES)
def test_table_is_of_these_kernels_and_clean(version):
    """Also of the versions of Triton that are not installed here."""
    table = TABLES[version]
    update = f"pip install --no-deps --target DIR triton=={version}; PYTHONPATH=DIR python -m kernels.aot --write"
    assert table["digest"] == aot.digest(), f"the kernels have changed: {update}"
    for name, row in table["launches"].items():
        check(name, row)
        if "sm_90 bf16" in name and any(kernel in name for kernel in TWICE):
            assert row["programs"] >= 2, name


def check(name, row):
    """No spilled registers, and no tensor-core instruction that waits for the one before it."""
    assert row["spilled"] == 0 and not row["warnings"], (name, row)


def test_warnings_and_spills_of_the_assembler_are_read(monkeypatch):
    """What ptxas of Triton 3.6 said of the gradient whose first operand was made in registers, and of one that spilled."""
    said = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in the function 'gradient_kernel'\n"
        "ptxas info    : Function properties for gradient_kernel\n"
        "    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    read = aot.read_assembler(said)
    assert (read.registers, read.spilled) == (255, 40)
    assert len(read.warnings) == 1 and read.warnings[0].startswith("C7515 Potential Performance Loss")
    assert aot.programs_on(90, 255, 100_000, 8) == 1 and aot.programs_on(90, 128, 100_000, 8) == 2
    assert aot.programs_on(80, 128, 100_000, 8) == 1  # shared memory for one
