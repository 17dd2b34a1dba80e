"""The bench times the same computation everywhere, and writes what it measured."""

import json
import sys

import pytest
import torch

from kernels import baselines, bench

COMPOSITIONS = {
    "loop": (baselines.loop_connector, baselines.loop_loss),
    "padded": (baselines.padded_connector, baselines.padded_loss),
    "strong": (baselines.strong_connector, baselines.strong_loss),
}


@pytest.mark.parametrize("generator", ["factored", "each"])
def test_all_contenders_compute_the_same_step(generator, monkeypatch):
    monkeypatch.setitem(bench.WIDTHS, "tiny", ([6, 10], [4, 4, 9]))
    shape = bench.Shape(6, 21, "tiny", torch.float32, "cpu", generator, sets=1)
    calls = {name: bench.operations(shape, *pair) for name, pair in COMPOSITIONS.items()}
    ours = bench.operations(shape, *bench.ours("torch"))["step"][0]()
    for call in calls.values():
        for a, b in zip(ours, call["step"][0]()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the whole bench, which a GPU runs at full size")
def test_bench_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.WIDTHS, "design", ([6, 10], [4, 4, 9]))
    monkeypatch.setattr(bench, "HEAD_OUTPUTS", 64)
    monkeypatch.setattr(bench, "roofline", lambda *args: (1e12, 1e10))
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--batch", "16", "--json", str(tmp_path / "rows.json")])
    bench.main()
    assert "no GPU" in capsys.readouterr().out
    result = json.loads((tmp_path / "rows.json").read_text())
    assert {"device", "torch", "triton", "commit", "arguments", "tflops", "gb_per_s", "rows"} <= result.keys()
    found = {(r["operation"], r["impl"]) for r in result["rows"]}
    for operation in ("forward", "backward", "loss", "step"):
        assert {(operation, name) for name in ("torch", "loop", "padded", "strong")} <= found
    assert {
        ("adamw_outer", "torch"),
        ("adamw_outer", "strong"),
        ("true_rank", "torch"),
        ("true_rank", "whole"),
    } <= found
