"""The bench times the same computation everywhere, and writes what it measured."""

import json
import sys

import pytest
import torch

from kernels import baselines, bench

COMPOSITIONS = {
    "dense": (baselines.dense_connector, baselines.loop_loss),
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
    shown, files, path = bench.record, [], tmp_path / "rows.json"  # files: what was on disk after each row
    monkeypatch.setitem(bench.WIDTHS, "design", ([6, 10], [4, 4, 9]))
    monkeypatch.setattr(bench, "HEAD_OUTPUTS", 64)
    monkeypatch.setattr(bench, "record", lambda results, row: (shown(results, row), files.append(path.read_text())))
    monkeypatch.setattr(bench, "roofline", lambda *args: (1e12, 1e10))
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--batch", "16", "--json", str(path)])
    bench.main()
    assert "no GPU" in capsys.readouterr().out
    assert [len(json.loads(text)["rows"]) for text in files] == list(range(1, len(files) + 1))
    result = json.loads(path.read_text())
    assert {"device", "torch", "triton", "commit", "arguments", "clocks", "tflops", "gb_per_s", "rows"} <= result.keys()
    for row in result["rows"]:
        assert {"p50_ms", "graph_p50_ms", "clocks", "roof_percent"} <= row.keys()
    found = {(r["operation"], r["impl"]) for r in result["rows"]}
    for operation in ("forward", "backward", "loss", "step"):
        assert {(operation, name) for name in ("torch", "loop", "padded", "strong")} <= found
        assert ("dense" in {impl for o, impl in found if o == operation}) == (operation != "loss")
    assert {
        ("adamw_outer", "torch"),
        ("adamw_outer", "strong"),
        ("true_rank", "torch"),
        ("true_rank", "whole"),
    } <= found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU asks at full size")
def test_launches_are_timed_against_their_alternatives(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from kernels import launch, tune

    before = dict(launch.TABLE["hopper", 2])
    monkeypatch.setitem(bench.WIDTHS, "design", ([6, 10], [4, 4, 9]))
    monkeypatch.setattr(sys, "argv", ["tune", "--batch", "16", "--json", str(tmp_path / "rows.json")])
    tune.main()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == sum(1 + len(question.others) for question in tune.QUESTIONS)
    first = {}
    for row in rows:
        first.setdefault(row["kernel"], tuple(row["launch"]))
    assert first == {name: tuple(before[name]) for name in first}
    assert launch.TABLE["hopper", 2] == before
