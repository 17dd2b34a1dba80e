"""Two and three processes of torchrun against one: equal results, a rank that is killed, a signal, and errors that are
printed once.

A process takes seconds to load torch, so each run under torchrun tests several things: it is stopped where pairs are
shared and goes on where rows are, or the reverse.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, count_lines, read_connectors, read_ledger, read_ranking

from hyma.files import read_jsonl

PATIENCE = 1800  # seconds, of a machine on which much else runs
FLAGS = ("--epochs", "8", "--batch-size", "128", "--warmup-steps", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of torchrun: with another number of threads the closed form starts from another rounding, which
    turns axes that are as good as equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchrun(tmp_path, planted):
    """torchrun("train_grid.py", ...): a process that has started two others, in tmp_path, on the planted embeddings."""
    started = []

    def torchrun(script, *arguments, processes=2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(ROOT / script), "--data", str(planted), *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, **streams))
        return started[-1]

    yield torchrun
    for process in started:
        process.terminate()  # which ends those that it has started too
        process.wait(timeout=PATIENCE)


def workers(process):
    """The process ids of what torchrun has started, the first rank first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children))


def after_validations(folder, count, seconds=PATIENCE):
    """Returns once a run that is in progress has validated so often."""
    until = time.time() + seconds
    while count_lines(folder / "metrics.jsonl") < count:
        assert time.time() < until and not (folder / "ledger.json").exists()
        time.sleep(0.01)


def own_lines(text, script):
    """The lines that the script has printed, and not torchrun."""
    return [line for line in text.splitlines() if line.startswith(f"{script}: ")]


def assert_equal_to_rounding(one, two):
    """The weights differ by little of their size, the scores by at most one of the queries."""
    connectors, others = read_connectors(one), read_connectors(two)
    assert connectors.keys() == others.keys()
    for name, state in connectors.items():
        for key, tensor in state.items():
            assert (others[name][key] - tensor).norm() <= 1e-2 * tensor.norm(), (name, key)
    for line, other in zip(read_jsonl(one / "metrics.jsonl"), read_jsonl(two / "metrics.jsonl"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3) and line["step"] == other["step"]
    ranking = {row["image"] + row["text"]: float(row["val_recall10"]) for row in read_ranking(two)}
    for row in read_ranking(one):
        assert float(row["val_recall10"]) == pytest.approx(ranking[row["image"] + row["text"]], abs=0.012)
    for key in ("pairs", "steps", "pair_samples", "updates_per_pair", "flops", "trainable_parameters"):
        assert read_ledger(one)[key] == read_ledger(two)[key]


def test_a_grid_whose_rank_is_killed_goes_on_with_one_process_or_with_shared_rows(run, torchrun, planted, tmp_path):
    """Pairs depend on nothing but themselves: shared out, each has the bits that it has in one process."""
    flags = ("--connector", "mlp0", "--pairs-per-pass", "5", *FLAGS)  # passes of five pairs and of one
    assert run("train_grid.py", "--data", planted, *flags, "--out", "whole").code == 0
    process = torchrun("train_grid.py", *flags, "--out", "killed")
    after_validations(tmp_path / "killed", 2)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and not (tmp_path / "killed" / "ledger.json").exists()
    assert len(own_lines(err, "train_grid.py")) <= 1  # none where torchrun was faster
    shutil.copytree(tmp_path / "killed", tmp_path / "rows")

    result = run("train_grid.py", "--resume", "--out", "killed")
    assert result.code == 0 and "resumed: killed" in result.out, result.err
    for name, state in read_connectors(tmp_path / "whole").items():
        for key, tensor in state.items():
            assert torch.equal(read_connectors(tmp_path / "killed")[name][key], tensor), name
    assert_equal_to_rounding(tmp_path / "whole", tmp_path / "killed")

    process = torchrun("train_grid.py", "--resume", "--split", "rows", "--out", "rows", processes=3)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and out.count("best connector") == out.count("resumed: rows") == 1, err
    assert_equal_to_rounding(tmp_path / "whole", tmp_path / "rows")


MLP = ("--generator", "mlp", "--width", "8", "--connector", "mlp0", "--pairs-per-step", "3")
FACTORED = ("--connector", "mlp1", "--pairs-per-step", "3", "--refine-steps", "2")


@pytest.mark.parametrize("flags, splits", [(FACTORED, ("pairs", "rows")), (MLP, ("rows", "pairs"))])
def test_a_search_that_a_signal_ends_goes_on_with_the_other_split(run, torchrun, planted, tmp_path, flags, splits):
    """Three pairs a step: of two ranks the first has two of them, of three each has one; 128 rows are 43, 43 and 42."""
    flags = (*flags, *FLAGS, "--pairs", "*:minilm_l6", "--epochs", "24")  # so many have a validation half way
    assert run("train_hyma.py", "--data", planted, *flags, "--out", "whole").code == 0
    process = torchrun("train_hyma.py", *flags, "--split", splits[0], "--out", "x")
    after_validations(tmp_path / "x", 1)
    os.kill(workers(process)[1], signal.SIGTERM)  # a rank that prints nothing
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "SIGTERM: saved" in err, err
    assert own_lines(err, "train_hyma.py") == ["train_hyma.py: SIGTERM: saved; run the same command again to resume"]
    process = torchrun("train_hyma.py", *flags, "--split", splits[1], "--out", "x", processes=3)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and out.count("resumed: x at step") == 1, err
    assert_equal_to_rounding(tmp_path / "whole", tmp_path / "x")


def test_more_processes_than_pairs_end_in_one_line(torchrun):
    process = torchrun("train_grid.py", "--pairs", "efflite0:mpnet", "--out", "x", *FLAGS)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and out.count("data: ") <= 1
    (line,) = own_lines(err, "train_grid.py")
    assert "2 processes for 1 pairs" in line and "--split rows" in line


def test_processes_with_other_embeddings_end_in_one_line(planted, tmp_path):
    for rank in ("0", "1"):
        shutil.copytree(planted, tmp_path / rank / "data")
    torch.save(torch.load(planted / "mpnet.pt", weights_only=True).flip(0), tmp_path / "1" / "data" / "mpnet.pt")
    line = f"cd {tmp_path}/$RANK && exec {sys.executable} {ROOT}/train_hyma.py --data data --out x {' '.join(FLAGS)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*command, "sh", "-c", line], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0 and not (tmp_path / "0" / "x").exists()
    assert own_lines(done.stderr, "train_hyma.py") == [
        "train_hyma.py: process 1 has other embeddings than process 0; all must have the same"
    ]
