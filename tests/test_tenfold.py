"""The benchmark against grid search: its encoders, its captions, the score on the emoji, the comparison, the whole script."""

import io
import json
import shutil
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file

import vlm
from hyma.embeddings import hash_keys
from hyma.files import read_jsonl, save_tensors, sha256_file, write_json, write_jsonl
from hyma.metrics import Retrieval

sys.path.insert(0, str(ROOT / "benchmarks"))

import corpus
import emoji_retrieval
import graded_encoders
import tenfold
import training_runs


def test_an_earlier_stage_is_the_pooled_map(weights):
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    whole.load_state_dict(load_file(weights["efflite0"]))
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    options = {"pretrained_cfg_overlay": {"file": str(weights["efflite0"])}, "num_classes": 0}
    for blocks, build in ((3, "efflite0_stage2"), (5, "efflite0_stage4"), (7, "efflite0_stage6")):
        model = timm.create_model(build, pretrained=True, **options).eval()
        with torch.no_grad():
            x = whole.eval().bn1(whole.conv_stem(pixels))
            for block in whole.blocks[:blocks]:
                x = block(x)
            torch.testing.assert_close(model(pixels), x.mean((2, 3)), atol=1e-4, rtol=1e-4)
        assert model.head_hidden_size == x.shape[1]


def test_half_and_grey(weights, tmp_path):
    """Half: the config asks for 112 pixels. Grey: colours with the same luminance are the same picture."""
    graded_encoders.write_half(tmp_path / "half", {"efflite0": weights["efflite0"]})
    half = vlm.ImageEncoder(f"half=local-dir:{tmp_path / 'half'}", "cpu")
    assert list(half.config["input_size"]) == [3, 112, 112] and half.embed_dim == 1280

    fresh = timm.create_model("tf_efficientnet_lite1", pretrained=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in fresh.items()}, tmp_path / "efflite1.safetensors")
    graded_encoders.write_grey(tmp_path / "grey", {"efflite1": tmp_path / "efflite1.safetensors"})
    model = vlm.ImageEncoder(f"grey=local-dir:{tmp_path / 'grey'}", "cpu")
    pixels = torch.rand(1, 3, 240, 240, generator=torch.Generator().manual_seed(0)) * 2 - 1
    luminance = (
        (pixels * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    )
    torch.testing.assert_close(
        model.encode_image(pixels), model.encode_image(luminance.contiguous()), atol=1e-4, rtol=0
    )
    plain = timm.create_model("tf_efficientnet_lite1", pretrained=False, num_classes=0).eval()
    plain.load_state_dict({k: v for k, v in fresh.items() if not k.startswith("classifier")})
    with torch.no_grad():
        expected = F.normalize(plain(luminance.contiguous()), dim=1)
    torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-4, rtol=0)


def test_a_vendors_emoji_are_rows_to_report_on(tmp_path):
    """The emoji that it has drawn, with all their names; no other vendor's archive is read."""
    records = [
        {
            "image": "1f600.png",
            "name": "GRINNING FACE",
            "short_name": "grinning",
            "short_names": ["grinning", "big_smile"],
        },
        {"image": "1f601.png", "name": None, "short_name": "beaming", "short_names": ["beaming"]},
    ]
    files = {"package/emoji.json": json.dumps(records).encode(), "package/img/apple/64/1f600.png": b"drawn"}
    with tarfile.open(tmp_path / "emoji-datasource-apple-16.0.0.tgz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    rows = corpus.emoji_rows(tmp_path, "apple")
    assert rows == [{"image": "emoji-apple/1f600.png", "caption": "grinning face, big smile", "split": "test"}]
    assert (tmp_path / rows[0]["image"]).read_bytes() == b"drawn"


def test_recall_in_galleries():
    """Galleries against the product's own retrieval; a tie counts against the match."""
    random = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(400, 16, generator=random), dim=1)
    texts = F.normalize(images + 1.2 * torch.randn(400, 16, generator=random), dim=1)
    data = type("data", (), {"rows": None})
    found = []
    for k in range(4):
        six = Retrieval(data, torch.arange(100), torch.device("cpu")).recalls(texts[k::4], images[k::4])
        found.append((six[2] + six[5]) / 2)
    galleries = [torch.arange(400)[k::4] for k in range(4)]
    assert emoji_retrieval.hits_in_ten(texts, images, galleries).mean() == pytest.approx(sum(found) / 4)
    assert emoji_retrieval.hits_in_ten(torch.ones(400, 16), images, galleries).mean() < 0.12


def finished_run(order, validation, test, curve=(0.1,)):
    return tenfold.FinishedRun(order, validation, list(curve), None, test, flops=0, seconds=0)


def test_the_comparison_by_hand():
    best_first = ["a:t", "b:t", "c:t"]
    grids = [
        finished_run(
            best_first,
            validation={"a:t": 50.0, "b:t": 51.0, "c:t": 9.0},
            test={"a:t": 30.0, "b:t": 20.0, "c:t": 10.0},
        ),
        finished_run(
            best_first,
            validation={"a:t": 50.0, "b:t": 49.0, "c:t": 9.0},
            test={"a:t": 28.0, "b:t": 24.0, "c:t": 10.0},
        ),
    ]
    run = finished_run(
        ["b:t", "a:t", "c:t"],
        validation={"a:t": 49.0, "b:t": 52.0, "c:t": 8.0},
        test={"a:t": 29.0, "b:t": 23.0, "c:t": 7.0},
        curve=(0.5, 0.2),
    )
    found = tenfold.compare(run, grids)
    assert found.chosen == "b:t" and found.best_gap == 0 and found.collapsed
    assert found.regret == found.regret_by_validation == pytest.approx(29 - 22)
    assert found.delivered == 23 - 29
    assert found.mean_gap == found.top9_gap == pytest.approx((0 + 1 - 3) / 3)
    assert found.spearman == found.spearman_by_validation == pytest.approx(0.5)
    assert found.validation_top9_gap == pytest.approx((-1 + 2 - 1) / 3)


def test_how_sure_an_excess_of_regret_is():
    """A pair a little worse is within the noise of the pictures; one far worse is not."""
    emoji = np.arange(1000)
    hits = np.array([[emoji < 500, emoji >= 510, emoji < 300]] * 3) * 1.0  # of a, b and c
    grids = [["a", "b", "c"]] * 3
    found = training_runs.excess_intervals([["b", "a", "c"]] * 3, grids, hits)
    assert found == {"regret": [-5.5, 7.3], "spearman": [-0.5, 0.5]}
    found = training_runs.excess_intervals([["c", "a", "b"]] * 3, grids, hits)
    assert found["regret"] == [17.6, 22.5] and found["spearman"][1] < 0
    assert training_runs.excess_intervals(grids, grids, hits) == {"regret": [0, 0], "spearman": [0, 0]}


def test_the_whole_script(run, tmp_path, monkeypatch):
    """Trains, reads, compares and writes the keys of the committed results, on a few rows of the sample."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so few rows gain nothing from threads
    write_part_of_sample(tmp_path / "work" / "embeddings")
    shutil.copytree(tmp_path / "work" / "embeddings", tmp_path / "work" / "others")
    for table in ("captions.csv", "others.csv"):
        (tmp_path / "work" / table).touch()
    command = ["--work", tmp_path / "work", "--json", tmp_path / "results.json", "--seeds", 2, "--search-only"]
    result = run("benchmarks/tenfold.py", *command, "--connectors", "mlp0")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "results.json").read_text())
    committed = json.loads((ROOT / "benchmarks" / "twelve_seeds.json").read_text())
    assert list(found["mlp0"]) == list(committed["mlp0"]) and list(found["about"]) == list(committed["about"])
    assert list(found["mlp0"]["acceptance"]) == list(committed["mlp0"]["acceptance"])
    assert all(ratio > 0 for ratio in found["mlp0"]["cost_ratio_flops"])
    assert "control" not in " ".join(found["mlp0"]["chosen"])

    result = run("benchmarks/tenfold.py", *command[:-1], "--score", tmp_path / "work" / "runs" / "mlp0-hyma-s0")
    assert f"regret               {found['mlp0']['regret'][0]:.3f} " in result.out


def write_part_of_sample(out):
    """An embedding folder of every twelfth row of the sample, by two image encoders and a text encoder."""
    out.mkdir(parents=True)
    sample = ROOT / "sample" / "embeddings"
    rows = read_jsonl(sample / "rows.jsonl")[::12]
    write_jsonl(out / "rows.jsonl", rows)
    manifest = vlm.read_json(sample / "manifest.json")
    manifest["rows"] = len(rows)
    manifest["keys_sha256"] = hash_keys(rows)
    records = {}
    for name in ("efflite1", "control", "minilm_l6"):
        save_tensors(vlm.load_tensors(sample / f"{name}.pt")[::12].clone(), out / f"{name}.pt")
        changed = {"rows": len(rows), "keys_sha256": hash_keys(rows), "file_sha256": sha256_file(out / f"{name}.pt")}
        records[name] = manifest["encoders"][name] | changed
    manifest["encoders"] = records
    write_json(out / "manifest.json", manifest)


def test_the_committed_results_are_whole():
    """What the README's claim rests on: every number over three seeds for three depths, and over twelve for two."""
    asked = "cost_ratio_flops cost_ratio_seconds regret regret_noise top9_gap best_gap spearman"
    for name, depths, seeds in (("tenfold", ("mlp0", "mlp1", "mlp2"), 3), ("twelve_seeds", ("mlp0", "mlp1"), 12)):
        results = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        for depth in depths:
            assert all(len(results[depth][key]) == seeds for key in asked.split()), (name, depth)
            assert seeds == 3 or all(results[depth]["acceptance"].values()), (name, depth)
