"""Weights that do not fit, wherever they are loaded: never a random network under a model's name (vlm.py, embed.py)."""

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
    ):
        path = saved(tmp_path / name, tensors)
        with pytest.raises(BadInput) as error:
            vlm.ImageEncoder("efflite0", "cpu", path)
        assert problem in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


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
    """The card holds the digests of the weights that the embeddings were made with."""
    pairs = ("--pairs", "efflite0:minilm_l6", "--epochs", "1", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *pairs).code == 0
    path = tmp_path / "x" / "connectors" / "efflite0_mlp1_minilm_l6.pt"
    vlm.get_vlm_from_checkpoint(path, "cpu", weights=weights)

    other = dict(load_file(weights["efflite0"]))
    other["bn1.bias"] = other["bn1.bias"] + 1
    others = weights | {"efflite0": saved(tmp_path / "other.safetensors", other)}
    with pytest.raises(BadInput, match="trained on other weights of efflite0"):
        vlm.get_vlm_from_checkpoint(path, "cpu", weights=others)
    path.with_suffix(".json").unlink()  # as published, a connector has no card, and nothing can be compared
    vlm.get_vlm_from_checkpoint(path, "cpu", weights=others)
