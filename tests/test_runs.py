"""hyma/runs.py: the run folder and its connectors, written and read back."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CPU, read_ledger, read_ranking

import vlm
from hyma.embeddings import Embeddings
from hyma.files import write_json
from hyma.runs import (
    create_run,
    find_run,
    interrupted_run,
    newest_finished_run,
    read_run,
    reopen_run,
    run_of_same_command,
    save_connector,
    write_results,
)
from vlm import BadInput

IDENTITY = {"pairs": ["efflite1:mpnet"], "embeddings": {"efflite1": "1", "mpnet": "2"}}
ABOUT = {
    "method": "grid mlp0",
    "recipe": {"script": "train_grid.py", "lr": 0.1},
    "full_grid": True,
    "hidden_layers": 0,
    "rows": {"train": 810, "val": 90},
    "starts_from": None,
    "seed": 3,
}


def create(out, data="planted"):
    return create_run(out, {"data": str(data), "lr": 0.1}, {"lr": 0.1}, IDENTITY, ABOUT, CPU)


def finish(out, data):
    """Writes the results of two pairs, of which one was only predicted: the connectors' paths."""
    ranking = [
        {"image": "efflite1", "text": "mpnet", "val_recall1": 0.1, "val_recall5": 0.5, "val_recall10": 0.9, "rank": 1},
        {"image": "control", "text": "mpnet", "val_recall1": 0.0, "val_recall5": 0.0, "val_recall10": 0.1, "rank": 2},
    ]
    state = {
        "step": 20,
        "updates": {"efflite1:mpnet": 20, "control:mpnet": 0},
        "flops": 1000,
        "start_flops": 10,
        "step_flops": 20,
        "logit_flops": 30,
        "seconds": 1.23456,
        "peak_bytes": 7,
        "trainable_parameters": 9,
    }

    def connector_of(pair):
        image, text = pair.split(":")
        dims = data.encoders[image].dim, data.encoders[text].dim
        return [(torch.full(dims, 0.5), torch.ones(dims[0]))], {"updates": state["updates"][pair]}

    return write_results(out, data, ranking, connector_of, 64, state)


def test_a_run_is_read_as_it_was_written(planted, tmp_path):
    out = tmp_path / "x"
    lock = create(out, planted)
    with pytest.raises(BadInput, match="is not finished .no ledger.json.; rerun to resume: python .* --resume --out"):
        read_run(out)
    paths = finish(out, Embeddings(planted))
    lock.close()
    run = read_run(out)
    assert (run.method, run.recipe, run.seed, run.hidden_layers) == ("grid mlp0", ABOUT["recipe"], 3, 0)
    assert run.ranks == {("efflite1", "mpnet"): 1, ("control", "mpnet"): 2}
    assert run.rows == 900 and run.full_grid and run.starts_from is None and run.data == str(planted)
    assert run.embeddings == IDENTITY["embeddings"] and run.config["flags"]["lr"] == 0.1
    assert [run.connector(*pair) for pair in run.ranks] == paths

    ledger = read_ledger(out)
    assert run.ledger == ledger and ledger["pairs"] == 1  # the other was only predicted
    assert ledger["pair_samples"] == 64 * 20 and ledger["seconds"] == 1.235
    assert (ledger["start_flops"], ledger["step_flops"], ledger["logit_flops"]) == (10, 20, 30)
    assert vlm.read_json(out / "config.json").keys() >= {"versions", "device", "commit", "script", "flags", "rows"}


def test_a_connector_and_its_card(planted, tmp_path):
    (tmp_path / "connectors").mkdir()
    layers = [(torch.ones(1024, 768).half(), torch.ones(1024)), (torch.ones(512, 1024), torch.zeros(512))]
    row = {"image": "control", "text": "mpnet", "val_recall10": 0.25}
    path = save_connector(tmp_path, Embeddings(planted), layers, row, {"seed": 4})
    assert path == tmp_path / "connectors" / "control_mlp1_mpnet.pt"
    state = vlm.read_connector(path)[3]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    card = vlm.read_json(path.with_suffix(".json"))
    assert card["image_encoder"] == "random:resnet18" and card["text_encoder"] == "all-mpnet-base-v2"
    assert card["val_recall10"] == 0.25 and card["seed"] == 4 and card["hidden_layers"] == 1
    assert card["embeddings_sha256"] == Embeddings(planted).fingerprint(["control", "mpnet"])


def test_a_run_folder_belongs_to_one_run_and_one_process(tmp_path):
    out = tmp_path / "x"
    lock = create(out)
    with pytest.raises(BadInput, match="holds a run already"):
        create(out)
    config = vlm.read_json(out / "config.json")
    with pytest.raises(BadInput, match="another process is writing here"):
        reopen_run(out, config, IDENTITY)
    lock.close()
    reopen_run(out, config, IDENTITY).close()
    with pytest.raises(BadInput, match="the embeddings in planted are no longer those"):
        reopen_run(out, config, IDENTITY | {"embeddings": {"efflite1": "1", "mpnet": "another"}})
    with pytest.raises(BadInput, match="made with --lr 0.1 and not 1.0; choose another"):
        run_of_same_command(out, {"lr": 1.0})
    write_json(out / "config.json", config | {"typed": {"lr": None}})
    with pytest.raises(BadInput, match="made without --lr; choose another"):
        run_of_same_command(out, {"lr": 1.0})


def test_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no run in runs/"):
        find_run()
    with pytest.raises(BadInput, match="holds no finished run"):
        newest_finished_run()
    for age, name in enumerate(("newest", "older", "oldest")):
        folder = tmp_path / "runs" / name
        create(folder).close()
        if name != "newest":
            write_json(folder / "ledger.json", {})
        for file in folder.glob("*.json"):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert find_run().name == "newest" and newest_finished_run().name == "older"
    assert find_run(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_a_damaged_configuration_stops_no_other_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    create(tmp_path / "runs" / "x").close()
    (tmp_path / "runs" / "cut").mkdir()
    (tmp_path / "runs" / "cut" / "config.json").write_text("{")
    assert interrupted_run({"lr": 0.1}) == Path("runs/x")
    assert "runs/cut/config.json: cannot be read as JSON" in capfd.readouterr().err


def test_connectors_alone_are_read_as_a_run_that_ranks_nothing(runs, tmp_path):
    for path in (runs / "grid" / "connectors").glob("*.pt"):
        shutil.copy(path, tmp_path)
    run, grid = read_run(tmp_path), read_run(runs / "grid")
    assert run.ranks == dict.fromkeys(grid.ranks, 1)
    assert run.ledger is None and not run.full_grid and run.hidden_layers == 0 and run.embeddings == {}
    assert run.connector("efflite1", "mpnet") == tmp_path / "efflite1_mlp0_mpnet.pt"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: holds no run .no config.json. and no connectors"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("config.json", lambda config: config.pop("method"), "was made by an earlier version"),
        ("config.json", lambda config: config.pop("rows"), "is damaged .KeyError: 'rows'.; make the run again"),
        ("ledger.json", lambda ledger: ledger.pop("step_flops"), "is damaged .KeyError: 'step_flops'."),
        ("ledger.json", lambda ledger: ledger.update(flops="many"), "is damaged .ValueError"),
        (
            "ledger.json",
            lambda ledger: ledger.update(seconds=float("nan")),
            "is damaged .ValueError: seconds of ledger",
        ),
        (
            "ledger.json",
            lambda ledger: ledger.update(flops=1e300),
            "is damaged .ValueError: flops of ledger.json is 1e",
        ),
        ("ledger.json", lambda ledger: ledger["updates_per_pair"].popitem(), "is damaged .KeyError"),
    ],
)
def test_a_damaged_run_is_refused(runs, tmp_path, file, change, message):
    folder = tmp_path / "x"
    shutil.copytree(runs / "ridge", folder)
    record = vlm.read_json(folder / file)
    change(record)
    write_json(folder / file, record)
    with pytest.raises(BadInput, match=f"x: {message}"):
        read_run(folder)


def test_a_ranked_pair_needs_its_connector(runs, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(runs / "ridge", folder)
    pair = read_ranking(folder)[0]
    name = f"{pair['image']}_mlp0_{pair['text']}.pt"
    (folder / "connectors" / name).unlink()
    with pytest.raises(BadInput, match=f"{name}: no such file, but .*ranking.csv ranks {pair['image']}:{pair['text']}"):
        read_run(folder)
    (folder / "ranking.csv").write_text("image,text,val_recall1,val_recall5,val_recall10,rank\n")
    with pytest.raises(BadInput, match="ranking.csv ranks nothing"):
        read_run(folder)
