"""Weights that do not fit, wherever they are loaded: never a random network under a model's name (vlm.py, embed.py)."""

import json
import shutil

import pytest
import torch
from conftest import write_csv
from safetensors.torch import load_file, save_file

import vlm
from vlm import BadInput


@pytest.fixture
def state(weights):
    return load_file(weights["efflite0"])


def saved(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "encoder.", "_orig_mod.", "model.backbone."])
def test_prefixes_of_wrapped_models_come_off(state, weights, tmp_path, prefix):
    wrapped = {prefix + key: tensor for key, tensor in state.items() if not key.startswith("classifier")}
    wrapped["head.projection"] = torch.zeros(2)  # a head beside the wrapped model is not asked for
    path = saved(tmp_path / "w.pth", {"state_dict": wrapped})
    loaded = vlm.ImageEncoder("efflite0", "cpu", path).model
    right = vlm.ImageEncoder("efflite0", "cpu", weights["efflite0"]).model
    assert vlm.weights_digest(loaded) == vlm.weights_digest(right)


def test_weights_that_leave_tensors_random_are_refused(state, tmp_path):
    half = {key: tensor for place, (key, tensor) in enumerate(state.items()) if place % 2}
    renamed = {key.replace("blocks", "_blocks"): tensor for key, tensor in state.items()}
    deeper = state | {"blocks.9.0.conv.weight": torch.zeros(2)}
    batch_norm_missing = {key: tensor for key, tensor in state.items() if "bn1" not in key}  # starts at 1, not random
    for name, tensors, problem in (
        ("half.safetensors", half, "lack 122 tensors"),
        ("renamed.pth", renamed, "lack"),
        ("deeper.safetensors", deeper, "and the model has not, 1 tensors (blocks.9.0.conv.weight)"),
        ("bn.safetensors", batch_norm_missing, "lack"),
        ("empty.pth", {}, "holds no tensors"),
        ("odd.pth", {"encoder": state}, "holds no tensors"),
        ("list.pth", [torch.zeros(2)], "holds no tensors under names"),
        ("tensor.pth", torch.zeros(2), "holds no tensors under names"),
        ("numbers.pth", {1: torch.zeros(2)}, "holds no tensors under names"),
    ):
        path = saved(tmp_path / name, tensors)
        with pytest.raises(BadInput) as error:
            vlm.ImageEncoder("efflite0", "cpu", path)
        assert problem in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_no_sound_numbers_are_refused(state, tmp_path):
    """All of these would be copied into the model without a word."""
    stem = state["conv_stem.weight"]
    for name, tensor, problem in (
        ("nan", stem / 0, "conv_stem.weight holds numbers that are not finite"),
        ("integers", stem.long(), "conv_stem.weight is no plain tensor"),
        ("complex", stem.to(torch.complex64), "conv_stem.weight is no plain tensor"),
        ("expanded", torch.zeros(1).expand(stem.shape), "conv_stem.weight is no plain tensor"),
        ("sparse", stem.to_sparse(), "conv_stem.weight is no plain tensor"),
    ):
        path = saved(tmp_path / f"{name}.pth", state | {"conv_stem.weight": tensor})
        with pytest.raises(BadInput, match=problem) as error:
            vlm.ImageEncoder("efflite0", "cpu", path)
        assert path.name in str(error.value)


def test_a_folder_of_another_model_is_refused(weights, tmp_path):
    """A folder says itself what it holds, and would be loaded under any name."""
    folder = tmp_path / "image"
    folder.mkdir()
    shutil.copy(weights["efflite0"], folder / "model.safetensors")
    details = {"tag": "in1k", "input_size": [3, 224, 224], "num_classes": 1000, "classifier": "classifier"}
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": details}
    (folder / "config.json").write_text(json.dumps(config))
    assert vlm.ImageEncoder("efflite0", "cpu", folder).full_name == "tf_efficientnet_lite0.in1k"
    for asked, message in (
        ("efflite1", "says tf_efficientnet_lite0.in1k, and tf_efficientnet_lite1.in1k is asked for"),
        ("x=timm:tf_efficientnet_lite0.other", "says tf_efficientnet_lite0.in1k, and timm:tf_efficientnet_lite0.other"),
    ):
        with pytest.raises(BadInput, match=message):
            vlm.ImageEncoder(asked, "cpu", folder)
    with pytest.raises(BadInput, match="names no architecture that timm knows"):
        vlm.ImageEncoder("efflite0", "cpu", weights["minilm_l6"])
    with pytest.raises(BadInput, match="6 layers of width 384, and it has 12 of width 384"):
        vlm.TextEncoder("minilm", "cpu", weights["minilm_l6"])
    with pytest.raises(BadInput, match="6 layers of width 384, and it has 12 of width 768"):
        vlm.TextEncoder("mpnet", "cpu", weights["minilm_l6"])


def test_a_folder_with_several_files_is_not_guessed_at(weights, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(weights["efflite0"], tmp_path / name)
    with pytest.raises(BadInput, match="holds 2 files of weights, a.safetensors and others; name one"):
        vlm.ImageEncoder("efflite0", "cpu", tmp_path)


def test_weights_in_python_are_given_by_names_that_are_known(weights, tmp_path):
    """With a typing error, the weights on the hub would be taken in silence."""
    path = tmp_path / "efflite1_mlp0_minilm_l6.pt"
    torch.save(vlm.init_modality_connector(384, [], 1280).state_dict(), path)
    right = {"minilm_l6": weights["minilm_l6"]}
    for given, image_encoder, message in (
        (str(tmp_path), None, "expected {encoder name: file or folder}"),
        ({"efflite1": {}}, None, "'efflite1' is given a dict"),
        (right | {"eflite1": "x"}, None, "'eflite1' is none of the encoders here"),
        (right | {"efflite1": weights["efflite0"]}, None, "lack 75 tensors"),
        (right | {"control": weights["efflite0"]}, "control", "has random weights and takes none"),
        (right, weights["efflite0"], "is a file; say what model it holds, and give the file to --weights"),
    ):
        with pytest.raises(BadInput) as error:
            vlm.get_vlm_from_checkpoint(path, "cpu", image_encoder=image_encoder and str(image_encoder), weights=given)
        assert message in str(error.value)
    for name in ("efflite0", "efflite1"):  # of the encoder that is asked for, or of the one that the file names
        given = right | {name: weights["efflite0"]}
        model = vlm.get_vlm_from_checkpoint(path, "cpu", image_encoder="efflite0", weights=given)
        assert model.image_encoder.full_name == "tf_efficientnet_lite0.in1k"


def test_another_architecture_is_refused_in_one_line(weights):
    with pytest.raises(BadInput, match="efflite0.safetensors") as error:
        vlm.ImageEncoder("efflite1", "cpu", weights["efflite0"])
    assert "\n" not in str(error.value)


def test_a_text_folder_under_other_keys_is_refused(weights, tmp_path, capfd):
    folder = tmp_path / "prefixed"
    shutil.copytree(weights["minilm_l6"], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {f"student.{key}": t for key, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(BadInput, match="lack .* tensors") as error:
        vlm.TextEncoder("minilm_l6", "cpu", folder)
    assert "prefixed" in str(error.value) and "LOAD REPORT" not in "".join(capfd.readouterr())


def test_embed_seals_nothing_made_with_such_weights(refused, pictures, state, tmp_path):
    folder, rows = pictures
    write_csv(folder / "captions.csv", rows[:4])
    path = saved(tmp_path / "half.safetensors", dict(list(state.items())[::2]))
    flags = ("--data", folder / "captions.csv", "--out", "e", "--weights", f"efflite0={path}")
    result = refused("embed.py", "--encoder", "efflite0", *flags, says=["efflite0", "half.safetensors", "lack"])
    assert not (tmp_path / "e" / "manifest.json").exists() and "Unexpected keys" not in result.err


def test_a_connector_is_not_stitched_to_other_weights(run, weights, tmp_path):
    """The card holds the digests of the weights that the embeddings were made with, and the encoders' settings."""
    pairs = ("--pairs", "efflite0:minilm_l6", "--epochs", "1", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *pairs).code == 0
    path = tmp_path / "x" / "connectors" / "efflite0_mlp1_minilm_l6.pt"
    vlm.get_vlm_from_checkpoint(path, "cpu", weights=weights)

    other = dict(load_file(weights["efflite0"]))
    other["bn1.bias"] = other["bn1.bias"] + 1
    others = weights | {"efflite0": saved(tmp_path / "other.safetensors", other)}
    with pytest.raises(BadInput, match="trained on other weights of efflite0"):
        vlm.get_vlm_from_checkpoint(path, "cpu", weights=others)
    short = tmp_path / "short"  # the same weights, which give other vectors
    shutil.copytree(weights["minilm_l6"], short)
    settings = short / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_seq_length": 128}))
    with pytest.raises(BadInput, match="with max_seq_length 256 .see its card., and it has max_seq_length 128 here"):
        vlm.get_vlm_from_checkpoint(path, "cpu", weights=weights | {"minilm_l6": short})
    path.with_suffix(".json").unlink()  # as published, a connector has no card, and nothing can be compared
    vlm.get_vlm_from_checkpoint(path, "cpu", weights=others)
