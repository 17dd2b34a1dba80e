"""vlm.py: published checkpoints, the stitched model, encoders, pictures; alone in a folder; the one way to load and map."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import CPU, ROOT, SAMPLE, sample_captions, tasks_of
from PIL import Image

import vlm
from hyma.embeddings import Embeddings
from hyma.metrics import Retrieval
from hyma.task_inputs import image_inputs, text_inputs
from hyma.tasks import score
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


# ---------------------------------------------------------------------------------------------------------connectors


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


def test_connectors_have_the_published_keys_and_shapes():
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


def zipped(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_damaged_and_hostile_files_are_refused(tmp_path, monkeypatch):
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


# ------------------------------------------------------------------------------------------------loading and mapping


def test_a_loaded_connector_is_frozen_and_maps_to_unit_vectors(tmp_path):
    torch.manual_seed(0)
    connector = vlm.init_modality_connector(384, [1024], 1280)
    path = tmp_path / "efflite0_mlp1_minilm_l6.pt"
    torch.save(connector.half().state_dict(), path)
    found = vlm.load_connector(path)
    assert not any(parameter.requires_grad for parameter in found.parameters()) and not found.training
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    texts = F.normalize(torch.randn(20_000, 384), dim=1)  # more than go through at once
    mapped = vlm.map_text(found, texts)
    torch.testing.assert_close(mapped, F.normalize(found(texts), dim=1))
    torch.testing.assert_close(mapped.norm(dim=1), torch.ones(20_000))


def test_a_connector_that_is_not_finite_maps_nothing():
    with pytest.raises(BadInput, match="not finite"):
        vlm.map_text(lambda texts: torch.full((len(texts), 4), torch.nan), torch.ones(2, 3))


def test_what_is_reported_has_passed_through_what_is_delivered(sample_ridge, weights):
    """The test rows' captions through the stitched model, and their stored embeddings through the tasks: the same vectors,
    the same recalls."""
    path = sample_ridge / "connectors" / "efflite0_mlp0_minilm_l6.pt"
    task = tasks_of(SAMPLE / "embeddings")["retrieval"]
    texts, images = text_inputs(task, "minilm_l6"), image_inputs(task, "efflite0")
    reported = score(task, texts, images, vlm.load_connector(path))

    model = vlm.get_vlm_from_checkpoint(path, "cpu", weights=weights)
    delivered = model.encode_text([task.data.rows[row]["caption"] for row in task.rows.tolist()])
    mapped = vlm.map_text(vlm.load_connector(path), F.normalize(texts.float(), dim=1))
    assert (F.cosine_similarity(delivered, mapped) > 0.999).all()
    six = Retrieval(task.data, task.rows, CPU).recalls(delivered, images.float())
    for k, way in enumerate(("image", "text")):
        for place, count in enumerate((1, 5, 10)):
            expected = reported.metrics[f"{way}_retrieval_recall@{count}"]
            # float16 embeddings: a row or two of 384 change their place
            assert six[3 * k + place] == pytest.approx(expected, abs=0.01)


# -------------------------------------------------------------------------------------------------the stitched model


def test_the_stitched_model_puts_captions_into_the_space_of_pictures(tmp_path, weights):
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


def test_the_stitched_model_is_held_as_open_clips_models_are(sample_ridge, weights):
    """`model, preprocess, tokenizer`: tokens in place of sentences, float32 out whatever the bits inside, no sentences."""
    path = sample_ridge / "connectors" / "efflite0_mlp0_minilm_l6.pt"
    model = vlm.get_vlm_from_checkpoint(path, "cpu", weights=weights)
    rows = sample_captions()[:3]
    captions = [row["caption"] for row in rows]
    pixels = torch.stack([model.preprocess(vlm.open_image(SAMPLE / row["image"])) for row in rows])
    image, text = model(pixels, captions)
    tokens = model.tokenizer(captions).to("cpu")
    torch.testing.assert_close(model.encode_text(tokens), text)
    torch.testing.assert_close(model.encode_text(model.tokenizer(captions[0])), text[:1], atol=1e-5, rtol=1e-4)
    assert model.encode_text([]).shape == (0, 1280)
    assert isinstance(model, torch.nn.Module) and model.device == CPU and not model.eval().training
    assert {key.partition(".")[0] for key in model.state_dict()} == {"image_encoder", "text_encoder", "connector"}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(pixels, captions)
        of_tokens = model.encode_text(tokens)
    assert {part.dtype for part in (*low, of_tokens)} == {torch.float32}
    halved = model.half().to("cpu")(pixels, captions)
    for found in (low, halved):
        for vectors, expected in zip(found, (image, text)):
            assert vectors.dtype == torch.float32 and (F.cosine_similarity(vectors, expected) > 0.99).all()
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_stitched_model_on_cuda(weights):
    models = [
        vlm.CustomVLM("random:resnet18", str(weights["minilm_l6"]), (384, [1024], 512), device)
        for device in ("cpu", "cuda")
    ]
    models[1].connector.load_state_dict(models[0].connector.state_dict())
    cpu, cuda = (model.encode_text(["a cat", "a dog"]) for model in models)
    assert cuda.is_cuda
    torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-3, rtol=1e-2)


@pytest.fixture
def hub_folder(tmp_path, weights):
    """efflite0 as the hub has it: a folder with config.json and model.safetensors."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(weights["efflite0"])
    found = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").to_dict()
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": found}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ALONE = """
import json, sys
try:
    import hyma
except ImportError:
    pass
else:
    sys.exit("the repository is importable here")
import torch, vlm
name, image_encoder, text_encoder, *paths = sys.argv[1:]
model = vlm.get_vlm_from_checkpoint(name, "cpu", image_encoder, text_encoder)
pixels = torch.stack([model.transform(vlm.open_image(path)) for path in paths])
torch.save({"image": model.encode_image(pixels), "text": model.encode_text(["a dog", "a red car"])}, "vectors.pt")
ours = sorted(name for name in sys.modules if name.split(".")[0] in ("hyma", "kernels"))
print(json.dumps({"vlm": vlm.__file__, "ours": ours}))
"""


def test_vlm_works_alone_beside_a_connector(tmp_path, weights, hub_folder):
    """Copied beside a connector and its card, with the repository out of reach: it loads and encodes as it does here."""
    torch.manual_seed(0)
    name = "mine_mlp1_words.pt"  # encoders outside the registry, from folders of this machine
    card = {"image_encoder": f"local-dir:{hub_folder}", "text_encoder": str(weights["minilm_l6"])}
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(ROOT / "vlm.py", folder)
    torch.save(vlm.init_modality_connector(384, [1024], 1280).state_dict(), folder / name)
    (folder / name).with_suffix(".json").write_text(json.dumps(card))
    files = {path.name for path in folder.iterdir()}
    assert files == {"vlm.py", name, "mine_mlp1_words.json"}

    paths = [str(SAMPLE / row["image"]) for row in sample_captions()[:2]]
    # -E and -s: neither PYTHONPATH nor the user's packages; with -c, the folder itself is the first of sys.path.
    command = [sys.executable, "-E", "-s", "-c", ALONE, name, *card.values(), *paths]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert os.path.samefile(report["vlm"], folder / "vlm.py") and report["ours"] == []

    here = vlm.get_vlm_from_checkpoint(folder / name, "cpu", card["image_encoder"], card["text_encoder"])
    vectors = torch.load(folder / "vectors.pt", weights_only=True)
    pixels = torch.stack([here.transform(vlm.open_image(path)) for path in paths])
    torch.testing.assert_close(vectors["image"], here.encode_image(pixels))
    torch.testing.assert_close(vectors["text"], here.encode_text(["a dog", "a red car"]))
    stored = Embeddings(SAMPLE / "embeddings").load("efflite0")[:2].float()
    assert (F.cosine_similarity(vectors["image"], stored) > 0.999).all()


# -----------------------------------------------------------------------------------------------------------encoders


@pytest.mark.parametrize(
    "text, name, kind, spec",
    [
        ("vit_l16", "vit_l16", "image", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
        ("mine=vit_l16", "mine", "image", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k", "image", "resnet18.a1_in1k"),
        ("hf-hub:timm/test_vit.r160_in1k", "test_vit.r160_in1k", "image", "hf-hub:timm/test_vit.r160_in1k"),
        ("x=local-dir:/some/folder", "x", "image", "local-dir:/some/folder"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k", "image", "timm:resnet18.a1_in1k"),
        ("hf_hub:timm/test_vit", "test_vit", "image", "hf-hub:timm/test_vit"),
        ("https://huggingface.co/timm/resnet18", "resnet18", "image", "timm:resnet18"),
        ("https://hf.co/BAAI/bge-small-en-v1.5", "bge-small-en-v1.5", "text", "BAAI/bge-small-en-v1.5"),
        ("random:resnet18", "resnet18", "image", "random:resnet18"),
        ("BAAI/bge-small-en-v1.5", "bge-small-en-v1.5", "text", "BAAI/bge-small-en-v1.5"),
        ("t=/folders/my model", "t", "text", "/folders/my model"),
    ],
)
def test_an_encoders_name_gives_its_kind_and_model(text, name, kind, spec):
    assert vlm.find_encoder(text)[:3] == (name, kind, spec)


@pytest.mark.parametrize("text", ["a/b=resnet18", "../x=resnet18", "=resnet18", "a_mlp1_b=resnet18", "x=", ""])
def test_encoder_names_that_cannot_be_file_names_are_refused(text):
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


# -----------------------------------------------------------------------------------------------------------pictures


def test_16_bits_of_either_order_are_one_picture(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for order in "<>":
        Image.fromarray(grey.astype(f"{order}u2")).save(tmp_path / f"{order}.tif")
    little, big = (np.asarray(vlm.open_image(tmp_path / f"{order}.tif")) for order in "<>")
    assert np.array_equal(little, big) and big[0, 0, 0] == 0 and big[-1, -1, 0] == 255


def test_pictures_of_every_mode_become_upright_rgb(tmp_path):
    grey16 = Image.fromarray(np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
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
        "thin.png": (Image.new("RGB", (1, 50), (1, 2, 3)), (1, 2, 3)),
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
    Image.new("I", (4, 4), 200).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="32-bit integers"):  # it would be black if these were 16 bits, white if they were 8
        vlm.open_image(tmp_path / "deep.tif")
    Image.new("RGB", (16, 16)).save(tmp_path / "other.ico")
    with pytest.raises(OSError):
        vlm.open_image(tmp_path / "other.ico")


# ------------------------------------------------------------------------------------------- files that strangers write


def state_of(path, **changes):
    state = vlm.init_modality_connector(384, [], 512).state_dict() | changes
    torch.save(state, path)
    return path


def test_connectors_that_are_no_plain_numbers_are_refused(tmp_path):
    path = tmp_path / "control_mlp0_minilm_l6.pt"
    weight = torch.zeros(512, 384)
    for change, message in (
        ({"weight": weight + torch.nan}, "weight holds numbers that are not finite"),
        ({"weight": (weight + torch.nan).to(torch.float8_e4m3fn)}, "weight holds numbers that are not finite"),
        ({"bias": torch.full((512,), torch.inf)}, "bias holds numbers that are not finite"),
        ({"weight": weight.to_sparse()}, "expected tensors of floating-point numbers"),
        ({"weight": weight.to("meta")}, "control_mlp0_minilm_l6.pt"),
        ({"weight": weight.long()}, "expected tensors of floating-point numbers"),
        ({"weight": torch.zeros(1).expand(512, 384)}, "expected tensors of floating-point numbers"),
        ({0: weight}, "expected the keys weight bias; found weight bias 0"),
        ({f"k{k}": weight[0] for k in range(99)}, "found weight bias k0 k1 .{120,145}$"),
    ):
        state = vlm.init_modality_connector(384, [], 512).state_dict() | change
        torch.save(state, path)
        with pytest.raises(BadInput, match=message) as error:
            vlm.load_connector(path)
        assert "\n" not in str(error.value)


def test_a_compressed_archive_is_not_opened(tmp_path):
    """torch stores without compression; a member that inflates could take any amount of memory."""
    plain, small = state_of(tmp_path / "plain.pt"), tmp_path / "control_mlp0_minilm_l6.pt"
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as copy:
        for member in archive.namelist():
            copy.writestr(member, archive.read(member))
    with pytest.raises(BadInput, match="is compressed"):
        vlm.load_connector(small)


def test_a_thin_picture_is_refused_before_it_fills_the_memory(tmp_path):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "thin.png")
    with pytest.raises(ValueError, match="50 times as long as wide"):
        vlm.open_image(tmp_path / "thin.png")


def test_captions_are_text_to_a_multimodal_model(weights):
    """Such a model fetches a string that is a picture's address, and opens one that is a picture's path."""
    encoder = vlm.TextEncoder("minilm_l6", "cpu", weights["minilm_l6"])
    captions = ["a dog", "https://example.org/dog.jpg"]
    assert encoder.as_text(captions) == captions
    multimodal = SimpleNamespace(model=SimpleNamespace(modalities=["text", "image"]))
    assert vlm.TextEncoder.as_text(multimodal, captions) == [{"text": caption} for caption in captions]
    assert vlm.TextEncoder.as_text(multimodal, "a dog") == {"text": "a dog"}


@pytest.mark.parametrize(
    "name, guess",
    [
        ("resnet1800", "Did you mean resnet18"),
        ("timm:ViT_Base_Patch16_224", "Did you mean vit_base_patch16_224?"),
        ("resnet18.a1_in1", "Did you mean resnet18.a1_in1k?"),
        ("vit_s61", "Did you mean vit_s16?"),
    ],
)
def test_a_name_that_is_spelt_wrong_is_guessed(name, guess):
    with pytest.raises(BadInput, match="the weights of .* are missing") as error:
        vlm.build_encoder(vlm.find_encoder(name), "cpu")
    assert guess in str(error.value)


def test_all_missing_weights_of_a_pair_are_named_with_the_commands_that_bring_them():
    with pytest.raises(BadInput) as error:
        vlm.CustomVLM("vit_s16", "mpnet", device="cpu")
    message = str(error.value)
    assert "the weights of vit_s16 and mpnet are missing" in message
    image = "hf download timm/vit_small_patch16_224.augreg_in21k_ft_in1k --local-dir weights/vit_s16"
    text = "hf download sentence-transformers/all-mpnet-base-v2 --local-dir weights/mpnet"
    assert f"{image} && {text}; then add --weights vit_s16=weights/vit_s16 mpnet=weights/mpnet" in message
    assert "weights={'vit_s16': 'weights/vit_s16', 'mpnet': 'weights/mpnet'}" in message


def test_a_folder_that_cannot_be_loaded_is_named_as_a_folder(tmp_path):
    """Not as a repository of the hub that one could copy; and no code in it has run."""
    types = [{"idx": 0, "name": "0", "path": "", "type": "hostile.Module"}]
    (tmp_path / "modules.json").write_text(json.dumps(types))
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BadInput) as error:
        vlm.TextEncoder(f"x={tmp_path}", device="cpu")
    assert str(error.value).startswith(f"cannot load x from {tmp_path}: ") and "huggingface.co" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["a bag of words", "static"])
def test_text_models_that_are_no_transformers(tmp_path, kind):
    """They have no tokenizer of transformers, no longest sentence, and a bag of words has not even weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW, StaticEmbedding
    from tokenizers import Tokenizer, models

    if kind == "static":
        module = StaticEmbedding(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")), embedding_dim=8)
    else:
        module = BoW(vocab=["a", "of", "the"])
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "words"))
    encoder = vlm.TextEncoder(f"words={tmp_path / 'words'}", device="cpu")
    vectors = encoder.encode_text(["a house", "the end of a day"])
    assert vectors.shape == (2, encoder.embed_dim) and torch.allclose(vectors.norm(dim=1), torch.ones(2))
