"""The stick's own parts: encoders of graded quality, the score on the emoji, the comparison with grid search."""

import io
import json
import runpy
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
from hyma.metrics import Retrieval


@pytest.fixture(scope="module")
def tenfold():
    sys.path[:0] = [str(ROOT / "sample")]
    return type("module", (), runpy.run_path(str(ROOT / "benchmarks" / "tenfold.py"), run_name="tenfold"))


def test_an_earlier_stage_is_the_pooled_map(tenfold, weights):
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


def test_half_and_grey(tenfold, weights, tmp_path):
    """Half: the config asks for 112 pixels. Grey: colours with the same luminance are the same picture."""
    tenfold.write_half(tmp_path / "half", {"efflite0": weights["efflite0"]})
    half = vlm.ImageEncoder(f"half=local-dir:{tmp_path / 'half'}", "cpu")
    assert list(half.config["input_size"]) == [3, 112, 112] and half.embed_dim == 1280

    fresh = timm.create_model("tf_efficientnet_lite1", pretrained=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in fresh.items()}, tmp_path / "efflite1.safetensors")
    tenfold.write_grey(tmp_path / "grey", {"efflite1": tmp_path / "efflite1.safetensors"})
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


def test_a_vendors_emoji_are_rows_to_report_on(tenfold, tmp_path):
    """Those that it has drawn, with all their names; another vendor's archive is not asked for."""
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
    rows = tenfold.emoji_rows(tmp_path, "apple")
    assert rows == [{"image": "emoji-apple/1f600.png", "caption": "grinning face, big smile", "split": "test"}]
    assert (tmp_path / rows[0]["image"]).read_bytes() == b"drawn"


def test_recall_in_galleries(tenfold):
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
    assert tenfold.hits_in_ten(texts, images, galleries).mean() == pytest.approx(sum(found) / 4)
    assert tenfold.hits_in_ten(torch.ones(400, 16), images, galleries).mean() < 0.12


def test_the_comparison_by_hand(tenfold):
    grids = [
        {
            "test": {"a:t": 30.0, "b:t": 20.0, "c:t": 10.0},
            "val": {"a:t": 50.0, "b:t": 51.0, "c:t": 9.0},
            "curve": [0.1],
            "order": ["a:t", "b:t", "c:t"],
        },
        {
            "test": {"a:t": 28.0, "b:t": 24.0, "c:t": 10.0},
            "val": {"a:t": 50.0, "b:t": 49.0, "c:t": 9.0},
            "curve": [0.1],
            "order": ["a:t", "b:t", "c:t"],
        },
    ]
    run = {"order": ["b:t", "a:t", "c:t"], "val": {"a:t": 49.0, "b:t": 52.0, "c:t": 8.0}, "curve": [0.5, 0.2]}
    run |= {"test": {"a:t": 29.0, "b:t": 23.0, "c:t": 7.0}}
    line = tenfold.compare(run, grids)
    assert line["chosen"] == "b:t" and line["regret"] == 29 - 22 and line["best_gap"] == 0
    assert line["mean_gap"] == pytest.approx((0 + 1 - 3) / 3) and line["spearman"] == pytest.approx(0.5)
    assert line["validation_top9_gap"] == pytest.approx((-1 + 2 - 1) / 3) and line["collapsed"]


def test_how_sure_an_excess_of_regret_is(tenfold):
    """A pair a little worse is within the noise of the pictures; one far worse is not."""
    emoji = np.arange(1000)
    hits = {"a": (emoji < 500) * 1.0, "b": (emoji >= 510) * 1.0, "c": (emoji < 300) * 1.0}
    grids = [{"order": ["a", "b", "c"], "hits": hits} for _ in range(3)]
    low, high = tenfold.excess_interval([{"order": ["b", "a", "c"]}] * 3, grids)
    assert low < 0 < high
    low, high = tenfold.excess_interval([{"order": ["c", "a", "b"]}] * 3, grids)
    assert 15 < low < 20 < high < 25
    assert tenfold.excess_interval(grids, grids) == [0, 0]


def test_the_committed_results_are_whole():
    """What the README's claim rests on: every number over three seeds for three depths, and over twelve for two."""
    asked = "cost_ratio_flops cost_ratio_seconds regret regret_noise top9_gap best_gap spearman"
    for name, depths, seeds in (("tenfold", ("mlp0", "mlp1", "mlp2"), 3), ("twelve_seeds", ("mlp0", "mlp1"), 12)):
        results = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        for depth in depths:
            assert all(len(results[depth][key]) == seeds for key in asked.split()), (name, depth)
            assert seeds == 3 or all(results[depth]["bar"].values()), (name, depth)
