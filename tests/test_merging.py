"""Embeddings in several folders, as the authors of the paper publish theirs, given to the trainers, evaluate.py and search.py."""

import argparse
import shutil

import pytest
import torch
from helpers import QUICK, SAMPLE, make_embedding_folder, read_connectors, unit_vectors

import vlm
from hyma.files import write_json
from hyma.merging import open_embeddings
from hyma.task_inputs import text_inputs
from hyma.tasks import open_tasks
from vlm import BadInput


@pytest.fixture
def parts(planted, tmp_path):
    """The planted embeddings in four folders: images by width, and texts."""
    names = {"dim-512": ["control"], "dim-1280": ["efflite0", "efflite1"], "minilm": ["minilm_l6"], "mpnet": ["mpnet"]}
    for folder, files in names.items():
        (tmp_path / folder).mkdir()
        for name in files:
            shutil.copy(planted / f"{name}.pt", tmp_path / folder)
    return [tmp_path / folder for folder in names]


RIDGE = ("train_grid.py", "--closed-form", "ridge", "--pairs", "efflite?:mpnet", "--connector", "mlp0")


def test_four_folders_train_as_one(run, planted, parts, tmp_path):
    whole = run(*RIDGE, "--data", planted, "--out", "whole")
    result = run(*RIDGE, "--data", *parts, "--out", "merged")
    assert whole.code == result.code == 0, result.err
    assert "4 folders merged: 900 rows, 3 image and 2 text encoders" in result.err
    connectors, others = read_connectors(tmp_path / "merged"), read_connectors(tmp_path / "whole")
    assert len(connectors) == 2
    for name, tensors in connectors.items():
        assert all(tensor.equal(others[name][key]) for key, tensor in tensors.items())
    config = vlm.read_json(tmp_path / "merged" / "config.json")
    assert config["flags"]["data"] == list(map(str, parts))
    again = run(*RIDGE, "--data", *parts, "--out", "merged")
    assert again.code == 0 and "finished" in again.out
    refined = run("train_grid.py", "--from", "merged", "--pairs", "efflite1:mpnet", *QUICK[2:], "--out", "grid")
    assert refined.code == 0, refined.err
    assert vlm.read_json(tmp_path / "grid" / "config.json")["flags"]["data"] == list(map(str, parts))
    shutil.move(parts[1], tmp_path / "moved")
    for script, *words in (("evaluate.py",), ("search.py", "words")):
        missing = run(script, "merged", *words)
        assert missing.code == 1 and f"{parts[1]}: no such folder" in missing.err and "--data" in missing.err
    data = [word for folder in (parts[0], tmp_path / "moved", *parts[2:]) for word in ("--data", folder)]
    moved = run("evaluate.py", *data, "merged", "--bootstrap", "50", "--selector-rows", "0", "--out", "report")
    assert moved.code == 0 and "ridge mlp0" in moved.out, moved.err


def test_a_run_on_merged_folders_is_scored(run, graded, tmp_path):
    for part, names in {"pictures": ("efflite1", "efflite0"), "texts": ("mpnet",)}.items():
        shutil.copytree(graded, tmp_path / part)
        manifest = vlm.read_json(tmp_path / part / "manifest.json")
        manifest["encoders"] = {name: manifest["encoders"][name] for name in names}
        write_json(tmp_path / part / "manifest.json", manifest)
    assert run(*RIDGE, "--data", "pictures", "texts", "--out", "run").code == 0
    result = run("evaluate.py", "run", "--bootstrap", "50", "--selector-rows", "0", "--out", "report")
    assert result.code == 0, result.err
    assert "e retrieval, 400 pictures" in result.out and "efflite1_mlp0_mpnet.pt" in result.out


def test_prompts_are_found_in_the_folder_of_the_texts(tmp_path):
    """Which need not be the first: no text encoder is opened for them."""
    shutil.copytree(SAMPLE / "embeddings", tmp_path / "pictures")
    shutil.copytree(SAMPLE / "embeddings", tmp_path / "texts")
    shutil.rmtree(tmp_path / "pictures" / "prompts")
    for name, kept in (("pictures", "image"), ("texts", "text")):
        manifest = vlm.read_json(tmp_path / name / "manifest.json")
        manifest["encoders"] = {key: record for key, record in manifest["encoders"].items() if record["kind"] == kept}
        write_json(tmp_path / name / "manifest.json", manifest)
    flags = argparse.Namespace(templates="1", device="cpu")
    tasks = {task.kind: task for task in open_tasks(None, [tmp_path / "pictures", tmp_path / "texts"], flags, 0)}
    assert len(text_inputs(tasks["zeroshot"], "minilm_l6")) == len(tasks["zeroshot"].texts)


def test_folders_of_other_rows_are_not_merged(parts, refused, tmp_path, capfd):
    torch.save(unit_vectors(899, 768), parts[3] / "mpnet.pt")
    says = ["dim-512 has 900 rows", "mpnet has 899", "the same rows"]
    refused("train_hyma.py", "--data", *parts, says=says)
    shutil.copy(parts[1] / "efflite1.pt", parts[2])
    with pytest.raises(BadInput, match="dim-1280 and .*minilm both hold efflite1"):
        open_embeddings([parts[1], parts[2]])
    rows = [{"caption": f"{k}"} for k in range(10)]
    one = make_embedding_folder(tmp_path / "one", rows, mpnet=unit_vectors(10, 768))
    rows[6] = {"caption": "another"}
    other = make_embedding_folder(tmp_path / "other", rows, control=unit_vectors(10, 512))
    with pytest.raises(BadInput, match="differ in the caption of row 7: '6' and 'another'"):
        open_embeddings([one, other])
    manifest = vlm.read_json(other / "manifest.json")  # as adopted, where nobody knew what the rows are
    manifest["keys_sha256"] = manifest["encoders"]["control"]["keys_sha256"] = None
    write_json(other / "manifest.json", manifest)
    (other / "rows.jsonl").unlink()
    capfd.readouterr()
    open_embeddings([one, other])
    said = capfd.readouterr().err
    assert f"{other}: has no rows.jsonl; the order of its rows cannot be checked" in said and f"{one}:" not in said
