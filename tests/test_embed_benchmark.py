"""The benchmark of embed.py, small; and that the memory of a pass grows by no more than what it knows of each row."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE

from vlm import read_json

# By its path: embed.py is also the name of a script of ours.
spec = importlib.util.spec_from_file_location("embed_benchmark", ROOT / "benchmarks" / "embed.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

ROW_BYTES = 4000  # of a row in memory: path, caption, digest and split, several times, and the lists that hold them


def test_a_measured_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ENCODERS", {"control": None})
    monkeypatch.setattr(benchmark, "COUNTS", (1,))
    monkeypatch.setattr(sys, "argv", sys.argv)
    flags = argparse.Namespace(data=SAMPLE / "captions.csv", weights=tmp_path, rows=16, rounds=1, workers=0)
    (result,) = benchmark.measure_speed(flags)
    (row,) = result["table"]
    assert row["encoders"] == 1 and row["pass_rows_per_cpu_second"] > 0
    ratio = row["pass_by_models_and_one_decoding"]["cpu"]
    seconds = result["rounds"][0]
    parts = seconds["models"]["control"]["cpu"] + seconds["decoding"][1]["cpu"]
    assert ratio == pytest.approx(seconds["one_pass"][1]["cpu"] / parts, rel=0.02)


PRINT_PEAKS = """
import runpy, sys, threading, time
from pathlib import Path

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, 1024 * int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
for data, out in {runs!r}:
    command = ["embed.py", "--encoder", "a=random:test_vit", "b=random:test_resnet", "--dtype", "float32"]
    sys.argv = [*command, "--device", "cpu", "--workers", "0", "--shard-rows", "256", "--data", data, "--out", out]
    runpy.run_path("embed.py", run_name="__main__")
    print("peak", peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_grows_by_what_is_known_of_each_row_and_no_more(tmp_path):
    """Neither pixels (100 kB a row and encoder) nor vectors (2 kB a row) stay in memory. The first run prepares."""
    counts = (1300, 1300, 3300)
    runs = []
    for number, count in enumerate(counts):
        archive = benchmark.write_small_pictures(tmp_path / f"{number}.tar", count)
        runs.append((str(archive), str(tmp_path / f"e{number}")))
    code = PRINT_PEAKS.format(runs=runs)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # beside other work, two threads on so small encoders wait for each other
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "e2" / "manifest.json")["rows"] == 3300
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    assert (peaks[2] - peaks[1]) / (counts[2] - counts[1]) < ROW_BYTES, peaks
