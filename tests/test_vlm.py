"""vlm.py: published checkpoints, the stitched model, embedding folders, recalls."""

import io
import json
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, sample_captions
from PIL import Image

import vlm
from hyma.embeddings import Embeddings, split_rows
from hyma.files import atomic_file, lock_folder, save_tensors, write_text
from hyma.metrics import Retrieval, rank_pairs
from vlm import BadInput

IMAGES = {e.name: e.dim for e in vlm.PAPER_ENCODERS if e.kind == "image"}
TEXTS = {e.name: e.dim for e in vlm.PAPER_ENCODERS if e.kind == "text"}


def published(image_dim, hidden_layers, text_dim):
    """A state dict in the published layout, written without vlm's help."""
    dims = [text_dim] + [1024] * hidden_layers + [image_dim]
    state = {}
    for k, (into, out) in enumerate(zip(dims, dims[1:])):
        prefix = f"{2 * k}." if hidden_layers else ""
        state |= {prefix + "weight": torch.zeros(out, into), prefix + "bias": torch.zeros(out)}
    return state


def test_import_is_as_light_as_torch():
    code = "import sys, vlm; print([m for m in ('timm', 'sentence_transformers', 'triton', 'PIL') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    code = (
        "import sys, torch; print([m for m in ('timm', 'sentence_transformers', 'triton', 'PIL') if m in sys.modules])"
    )
    torch_alone = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == torch_alone.stdout


def test_scripts_do_not_import_each_other():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {"vlm"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")]:
        for line in path.read_text().splitlines():
            words = line.split()
            if words and words[0] in ("import", "from"):
                assert words[1].split(".")[0] not in scripts, f"{path.name}: {line}"
                assert path.parent.name != "kernels" or words[1].split(".")[0] != "vlm", f"{path.name}: {line}"


# ------------------------------------------------------------------------------------------------- connectors


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_all_published_names_load_strictly(tmp_path, hidden_layers):
    for image, image_dim in IMAGES.items():
        for text, text_dim in TEXTS.items():
            path = tmp_path / f"{image}_mlp{hidden_layers}_{text}.pt"
            torch.save(published(image_dim, hidden_layers, text_dim), path)
            found = vlm.read_connector(path)
            assert found[:3] == (image, hidden_layers, text)
            connector = vlm.init_modality_connector(text_dim, [1024] * hidden_layers, image_dim)
            connector.load_state_dict(found[3], strict=True)
            path.unlink()


def test_published_keys_and_shapes():
    connector = vlm.init_modality_connector(768, [1024], 1024)
    assert {k: tuple(v.shape) for k, v in connector.state_dict().items()} == {
        "0.weight": (1024, 768),
        "0.bias": (1024,),
        "2.weight": (1024, 1024),
        "2.bias": (1024,),
    }
    assert list(vlm.init_modality_connector(384, [], 768).state_dict()) == ["weight", "bias"]
    assert list(vlm.init_modality_connector(384, [1024, 1024], 768).state_dict())[-2:] == ["4.weight", "4.bias"]
    with pytest.raises(BadInput, match="tanh"):
        vlm.init_modality_connector(4, [], 4, activation="tanh")


@pytest.mark.parametrize(
    "name, spoil, says",
    [
        ("vit_l16-mpnet.pt", lambda s: s, "expected a name like"),
        ("vit_l16_mlp3_mpnet.pt", lambda s: s, "expected a name like"),
        ("nobody_mlp1_mpnet.pt", lambda s: s, "unknown image encoder 'nobody'"),
        ("vit_l16_mlp1_nobody.pt", lambda s: s, "unknown text encoder 'nobody'"),
        (
            "vit_l16_mlp1_mpnet.pt",
            lambda s: {k: v for k, v in s.items() if k != "2.bias"},
            "expected the keys 0.weight 0.bias 2.weight 2.bias",
        ),
        ("vit_l16_mlp1_mpnet.pt", lambda s: s | {"3.weight": s["2.weight"]}, "expected the keys"),
        (
            "vit_l16_mlp1_mpnet.pt",
            lambda s: s | {"0.weight": torch.zeros(1024, 384)},
            r"0.weight has shape \(1024, 384\); expected \(1024, 768\)",
        ),
        ("vit_b16_mlp1_mpnet.pt", lambda s: s, r"2.weight has shape \(1024, 1024\); expected \(768, 1024\)"),
        ("vit_l16_mlp1_mpnet.pt", lambda s: [1, 2], "expected the keys"),
    ],
)
def test_bad_checkpoints_give_one_line(tmp_path, name, spoil, says):
    path = tmp_path / name
    torch.save(spoil(published(1024, 1, 768)), path)
    with pytest.raises(BadInput, match=says) as caught:
        vlm.get_vlm_from_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_and_hostile_files(tmp_path, monkeypatch):
    path, sentinel = tmp_path / "vit_l16_mlp1_mpnet.pt", tmp_path / "executed"
    torch.save(published(1024, 1, 768), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-10], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(BadInput, match="vit_l16_mlp1_mpnet.pt"):
            vlm.read_connector(path)

    class Payload:
        def __reduce__(self):
            return open, (str(sentinel), "w")

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for attack in (pickle.dumps(Payload()), zipped({"0.weight": Payload()})):
        path.write_bytes(attack)
        with pytest.raises(BadInput):
            vlm.read_connector(path)
    assert not sentinel.exists()


def zipped(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_stitched_model(tmp_path, weights):
    """The published README's calls, with real weights: unit vectors, one space, the connector applied and normalised."""
    torch.manual_seed(0)
    connector = vlm.init_modality_connector(384, [1024], 1280)
    path = tmp_path / "efflite0_mlp1_minilm_l6.pt"
    torch.save(connector.state_dict(), path)
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "model.safetensors").symlink_to(weights["efflite0"])
    image_encoder = vlm.ImageEncoder("efflite0", "cpu", weights=weights["efflite0"])
    text_encoder = vlm.TextEncoder("minilm_l6", "cpu", weights=weights["minilm_l6"])
    model = vlm.get_vlm_from_checkpoint(
        path, "cpu", image_encoder="random:tf_efficientnet_lite0", text_encoder=f"minilm_l6={weights['minilm_l6']}"
    )
    rows = sample_captions()[:3]
    pixels = torch.stack([model.transform(vlm.open_image(ROOT / "sample" / row["image"])) for row in rows])
    captions = [row["caption"] for row in rows]
    image, text = model.encode_image(pixels), model.encode_text(captions)
    assert image.shape == text.shape == (3, 1280)
    for vectors in (image, text, image_encoder.encode_image(pixels), text_encoder.encode_text(captions)):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text, F.normalize(connector(text_encoder.encode_text(captions)), dim=1))
    torch.testing.assert_close(model.encode_text(captions[0]), text[0], atol=1e-5, rtol=1e-4)

    by_hand = vlm.CustomVLM("random:tf_efficientnet_lite0", str(weights["minilm_l6"]), (384, [1024], 1280), "cpu")
    by_hand.load_connector_checkpoint(path)
    torch.testing.assert_close(by_hand.encode_text(captions), text)
    with pytest.raises(BadInput, match="expected"):
        vlm.CustomVLM("random:resnet18", str(weights["minilm_l6"]), device="cpu").load_connector_checkpoint(path)
    with pytest.raises(BadInput, match="is a text encoder"):
        vlm.ImageEncoder("mpnet", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stitched_model_on_cuda(weights):
    models = [
        vlm.CustomVLM("random:resnet18", str(weights["minilm_l6"]), (384, [1024], 512), device)
        for device in ("cpu", "cuda")
    ]
    models[1].connector.load_state_dict(models[0].connector.state_dict())
    cpu, cuda = (model.encode_text(["a cat", "a dog"]) for model in models)
    assert cuda.is_cuda
    torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    "text, name, kind, spec",
    [
        ("vit_l16", "vit_l16", "image", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
        ("mine=vit_l16", "mine", "image", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k", "image", "resnet18.a1_in1k"),
        ("hf-hub:timm/test_vit.r160_in1k", "test_vit.r160_in1k", "image", "hf-hub:timm/test_vit.r160_in1k"),
        ("x=local-dir:/some/folder", "x", "image", "local-dir:/some/folder"),
        ("random:resnet18", "resnet18", "image", "random:resnet18"),
        ("BAAI/bge-small-en-v1.5", "bge-small-en-v1.5", "text", "BAAI/bge-small-en-v1.5"),
        ("t=/folders/my model", "t", "text", "/folders/my model"),
    ],
)
def test_encoder_names(text, name, kind, spec):
    assert vlm.find_encoder(text)[:3] == (name, kind, spec)


@pytest.mark.parametrize("text", ["a/b=resnet18", "../x=resnet18", "=resnet18", "a_mlp1_b=resnet18", "x=", ""])
def test_encoder_names_that_cannot_be_file_names(text):
    with pytest.raises(BadInput, match="NAME=SPEC"):
        vlm.find_encoder(text)


@pytest.mark.parametrize("model", ["mobilenetv3_small_050", "test_vit"])
def test_widths_are_what_the_encoder_gives(model):
    """MobileNetV3 widens after pooling: timm's num_features is not the width of its output."""
    encoder = vlm.ImageEncoder(f"random:{model}", "cpu")
    vectors = encoder.encode_image(torch.randn(2, *encoder.config["input_size"]))
    assert vectors.shape == (2, encoder.embed_dim)
    again = vlm.ImageEncoder(f"random:{model}", "cpu")  # a control is the same network every time
    assert all(torch.equal(a, b) for a, b in zip(encoder.model.parameters(), again.model.parameters()))


# --------------------------------------------------------------------------------------------------- pictures


def test_pictures_of_every_mode(tmp_path):
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    cases = {
        "clear.png": (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        "half.png": (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), (255, 127, 127)),
        "la.png": (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        "grey.png": (Image.new("L", (2, 2), 7), (7, 7, 7)),
        "bit.png": (Image.new("1", (1, 1), 1), (255, 255, 255)),
        "palette.gif": (palette, (10, 20, 30)),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
        "thin.png": (Image.new("RGB", (1, 3000), (1, 2, 3)), (1, 2, 3)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        opened = vlm.open_image(tmp_path / name)
        assert opened.mode == "RGB" and opened.getpixel((0, 0)) == expected, name
    grey16.save(tmp_path / "grey16.png")
    levels = np.asarray(vlm.open_image(tmp_path / "grey16.png"))
    assert levels.min() == 0 and levels.max() == 255 and 120 < levels.mean() < 135
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert vlm.open_image(tmp_path / "turned.jpg").size == (2, 4)
    Image.new("RGB", (4, 2)).save(tmp_path / "other.tiff")
    with pytest.raises(OSError):
        vlm.open_image(tmp_path / "other.tiff")


# ------------------------------------------------------------------------------------------- embedding folders


@pytest.fixture
def sealed(run, pictures):
    folder, rows = pictures
    for k, row in enumerate(rows):
        (folder / f"{k}.txt").write_text(row["caption"])
    result = run(
        "embed.py",
        "--data",
        folder,
        "--out",
        "e",
        "--encoder",
        "a=random:test_vit",
        "b=random:test_resnet",
        "--device",
        "cpu",
    )
    assert result.code == 0, result.err
    return folder.parent / "e"


def test_sealed_folder_and_its_faults(sealed):
    data = Embeddings(sealed)
    assert data.row_count == 40 and data.names("image") == ["a", "b"] and data.names("text") == []
    good = data.load("a").clone()  # and not mapped to the file that is about to be spoilt
    assert good.shape == (40, data.encoders["a"].dim) and good.dtype == torch.float16
    dataset = vlm.EmbeddingDataset(sealed / "a.pt")
    assert len(dataset) == 40 and dataset.embed_dim == good.shape[1] and dataset[3].dtype == torch.float32
    torch.testing.assert_close(dataset[3].norm(), torch.tensor(1.0), atol=1e-3, rtol=0)

    faults = {
        "short": (good[:-1].clone(), "expected (40"),
        "wrong width": (good[:, :-1].clone(), "expected (40"),
        "reordered": (good.flip(0).clone(), "sha256"),
        "nan": (good.clone().index_fill_(0, torch.tensor([5]), float("nan")), "row 5"),
        "zero": (good.clone().index_fill_(0, torch.tensor([7]), 0.0), "row 7"),
        "integers": (torch.zeros(40, 64, dtype=torch.int64), "floating-point"),
        "a dict": ({"a": good}, "floating-point"),
    }
    for fault, (tensor, says) in faults.items():
        torch.save(tensor, sealed / "a.pt")
        with pytest.raises(BadInput) as caught:
            Embeddings(sealed).load("a")
        assert says in str(caught.value) and "a.pt" in str(caught.value), fault
    (sealed / "a.pt").unlink()
    with pytest.raises(BadInput, match=r"a\.pt: no such file"):
        Embeddings(sealed).load("a")


def test_rows_and_manifest_faults(sealed):
    rows, manifest = (sealed / "rows.jsonl").read_text(), (sealed / "manifest.json").read_text()
    lines = rows.splitlines(keepends=True)
    other = json.loads(manifest)
    other["encoders"]["b"]["keys_sha256"] = "0" * 64
    newer = json.loads(manifest) | {"format_version": 99}
    cases = [
        ("rows.jsonl", "".join(lines[::-1]), "order have changed"),
        ("rows.jsonl", "".join(lines[:-1]), "39 rows"),
        ("rows.jsonl", rows.replace("caption", "Caption"), "have changed"),
        ("rows.jsonl", rows[:-20], "cannot be read"),
        ("manifest.json", json.dumps(other), "b was embedded from other rows"),
        ("manifest.json", json.dumps(newer), "format version 99"),
        ("manifest.json", manifest[:200], "cannot be read"),
        ("manifest.json", '{"format_version": 1}', "damaged"),
    ]
    for name, text, says in cases:
        (sealed / name).write_text(text)
        with pytest.raises(BadInput, match=says):
            Embeddings(sealed)
        (sealed / "rows.jsonl").write_text(rows)
        (sealed / "manifest.json").write_text(manifest)
    (sealed / "manifest.json").unlink()
    with pytest.raises(BadInput, match="not sealed"):
        Embeddings(sealed)


def test_published_folder_without_manifest(tmp_path, capsys):
    torch.save(F.normalize(torch.randn(50, 384), dim=1), tmp_path / "vit_s16.pt")
    torch.save(F.normalize(torch.randn(50, 768), dim=1), tmp_path / "mpnet.pt")
    data = Embeddings(tmp_path)
    assert (data.names("image"), data.names("text"), data.row_count) == (["vit_s16"], ["mpnet"], 50)
    assert "cannot be checked" in capsys.readouterr().err
    torch.save(F.normalize(torch.randn(49, 1024), dim=1), tmp_path / "roberta.pt")
    with pytest.raises(BadInput, match="mpnet.pt has 50 rows and roberta.pt has 49"):
        Embeddings(tmp_path)
    (tmp_path / "roberta.pt").rename(tmp_path / "nobody.pt")
    with pytest.raises(BadInput, match="nobody.pt"):
        Embeddings(tmp_path)


class Rows:
    """As much of an embedding folder as the splits need."""

    folder = "here"

    def __init__(self, rows):
        self.rows, self.row_count = rows, len(rows)


def test_splits_keep_the_captions_of_a_picture_together():
    data = Rows([{"image": f"{k // 5}.jpg", "caption": str(k)} for k in range(500)])
    train, validation = split_rows(data)
    assert len(train) + len(validation) == 500 and len(validation) == 50
    assert not {k // 5 for k in train.tolist()} & {k // 5 for k in validation.tolist()}
    assert torch.equal(split_rows(data)[0], train) and not torch.equal(split_rows(data, seed=1)[0], train)
    named = Rows(
        [{"image": str(k), "caption": "", "split": s} for k, s in enumerate(["train", "val", "test", "train"])]
    )
    assert [rows.tolist() for rows in split_rows(named)] == [[0, 3], [1]]
    with pytest.raises(BadInput, match="no val rows"):
        split_rows(Rows([{"image": "0", "caption": "", "split": "train"}]))


def test_recalls_against_brute_force():
    random = torch.Generator().manual_seed(0)
    rows = [{"image": str(k // 2), "caption": "the same" if k in (3, 8) else str(k)} for k in range(40)]
    data = Rows(rows)
    retrieval = Retrieval(data, torch.arange(40), torch.device("cpu"))
    image = F.normalize(torch.randn(20, 8, generator=random), dim=1).repeat_interleave(2, 0)
    text = image + 0.7 * torch.randn(40, 8, generator=random)
    text[8] = text[3]
    scores = F.normalize(text, dim=1).double() @ image.double().T
    expected = []
    for by_text in (True, False):
        query, target = ("caption", "image") if by_text else ("image", "caption")
        hits = {}
        for r, row in enumerate(rows):
            best = {}  # the score of every different candidate
            for c, candidate in enumerate(rows):
                best[candidate[target]] = (scores[r, c] if by_text else scores[c, r]).item()
            right = {candidate[target] for candidate in rows if candidate[query] == row[query]}
            order = sorted(best, key=best.get, reverse=True)
            hits[row[query]] = min(order.index(name) for name in right)
        expected += [sum(rank < k for rank in hits.values()) / len(hits) for k in (1, 5, 10)]
    assert retrieval.recalls(text, image) == pytest.approx(expected)


def test_a_collapsed_connector_scores_nothing():
    data = Rows([{"image": str(k), "caption": str(k)} for k in range(30)])
    retrieval = Retrieval(data, torch.arange(30), torch.device("cpu"))
    assert retrieval.recalls(torch.ones(30, 4), F.normalize(torch.randn(30, 4), dim=1))[3:] == [0, 0, 0]
    assert retrieval.chance == pytest.approx([1 / 30, 5 / 30, 10 / 30])
    text = F.normalize(torch.randn(30, 4), dim=1)
    assert retrieval.recalls(text, text) == [1.0] * 6


def test_ranking_shows_ties():
    recalls = {"a:t": [0.1, 0.2, 0.3] * 2, "b:t": [0.2, 0.3, 0.5] * 2, "c:t": [0.1, 0.2, 0.3] * 2, "d:t": [0.0] * 6}
    ranked = rank_pairs(recalls)
    assert [(row["image"], row["rank"]) for row in ranked] == [("b", 1), ("a", 2), ("c", 2), ("d", 4)]


# ------------------------------------------------------------------------------------------------------ files


def test_atomic_file_keeps_the_old_one(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o044


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_tensors({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, limits[1])
    )  # no file may grow beyond: a write fails as on a full disk
    try:
        with pytest.raises(OSError, match="could not be written"):
            save_tensors({"step": 2, "weights": torch.randn(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert vlm.load_tensors(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_lock_keeps_a_second_process_out(tmp_path):
    with lock_folder(tmp_path), pytest.raises(BadInput, match="another process"):
        lock_folder(tmp_path)
    lock_folder(tmp_path).close()
