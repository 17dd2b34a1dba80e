"""The notebook of one's own pictures runs on the sample, cell by cell, and holds no outputs."""

import json
import os
import runpy
import time

import torch
from helpers import ROOT, SAMPLE

NOTEBOOK = ROOT / "examples" / "own_pictures.ipynb"


def test_the_notebook_has_ten_cells_and_no_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_notebook_runs_on_the_sample(weights, tmp_path, monkeypatch, capfd):
    """With the weights that are there, so for their pair; its commands run on one thread, as the tests do."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    here = {
        "PAIR = None": 'PAIR = "efflite0:minilm_l6"',
        "WEIGHTS = {}": f"WEIGHTS = { {name: str(path) for name, path in weights.items()} }",
        "next(folder for folder in (Path.cwd(), *Path.cwd().parents)": f"next(folder for folder in (Path({str(ROOT)!r}),)",
    }
    for old, new in here.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (tmp_path / "notebook.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    started = time.perf_counter()
    names = runpy.run_path(str(tmp_path / "notebook.py"))
    out, _ = capfd.readouterr()
    print(f"{time.perf_counter() - started:.0f} s")
    assert "2650 pictures" in out and "Stitch " in out and "efflite0 with minilm_l6" in out
    assert (names["REPORT"] / "report.html").is_file() and len(names["found"]) == 5
    assert (SAMPLE / names["found"][0].picture).is_file()
    assert "| sample | zeroshot_retrieval | image_retrieval_recall@10 |" in (names["MODEL"] / "README.md").read_text()
