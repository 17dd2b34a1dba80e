"""The ladder's encoders of graded quality on icons of 128 pixels, nine of images and three of text; and their embeddings.

lite0, lite1, lite2      EfficientNet-Lite 0, 1 and 2 at 128 pixels
lite0_96, lite0_64       EfficientNet-Lite 0 on smaller pictures
grey1                    EfficientNet-Lite 1 on grey pictures
stage4, stage6           EfficientNet-Lite 0 cut after 5 and 7 groups of blocks
control                  ResNet-18 with random weights, at 64 pixels
mpnet, minilm_l6         all-mpnet-base-v2, all-MiniLM-L6-v2
minilm_cut               all-MiniLM-L6-v2 cut after 2 of its 6 layers

`MANY` are thirty of images and ten of text (many_pairs.py): these and the same weights at other sizes, stages and depths.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sample"))

import build  # the sample's builder: weights from packages
import graded_encoders  # registers the earlier stages with timm

ROOT = Path(__file__).resolve().parent.parent


class Encoders(NamedTuple):
    """What `embed` embeds with, beside the control, mpnet and minilm_l6."""

    images: dict[str, tuple[str, str, int]]  # of each: its architecture, the weights that it takes, its pixels
    cut_texts: dict[str, tuple[str, int]]  # of each: the model that is cut, its layers that are kept


FEW = Encoders(
    {
        "lite0": ("tf_efficientnet_lite0", "efflite0", 128),
        "lite1": ("tf_efficientnet_lite1", "efflite1", 128),
        "lite2": ("tf_efficientnet_lite2", "efflite2", 128),
        "lite0_96": ("tf_efficientnet_lite0", "efflite0", 96),
        "lite0_64": ("tf_efficientnet_lite0", "efflite0", 64),
        "grey1": ("tf_efficientnet_lite1", "efflite1", 128),
        "stage4": ("efflite0_stage4", "efflite0", 128),
        "stage6": ("efflite0_stage6", "efflite0", 128),
    },
    {"minilm_cut": ("minilm_l6", 2)},
)


def many_encoders():
    """Thirty encoders of images and ten of text, `FEW` among them."""
    images = dict(FEW.images)
    for k in range(3):
        architecture, weights = f"tf_efficientnet_lite{k}", f"efflite{k}"
        for size in (112, 96, 80, 64, 48):
            images[f"lite{k}_{size}"] = architecture, weights, size
        images[f"grey{k}"] = architecture, weights, 128
        images[f"grey{k}_64"] = architecture, weights, 64
    for stage, size in ((2, 128), (4, 64), (6, 64)):
        name = f"stage{stage}" if size == 128 else f"stage{stage}_{size}"
        images[name] = f"efflite0_stage{stage}", "efflite0", size
    texts = dict(FEW.cut_texts)
    for layers in (1, 3, 4, 5):
        texts[f"minilm_{layers}"] = "minilm_l6", layers
    for layers in (2, 4, 8):
        texts[f"mpnet_{layers}"] = "mpnet", layers
    return Encoders(images, texts)


MANY = many_encoders()


def embed(table, out, weights_folder, encoders=FEW):
    """Embeds the rows of a table with all encoders, through embed.py. weights_folder: their weights, made if missing."""
    weights = build.packaged_weights(weights_folder)
    specs = ["mpnet", "minilm_l6"]
    for name, (source, layers) in encoders.cut_texts.items():
        folder = build.make(
            weights_folder / name,
            lambda path, parts=(weights[source], layers): graded_encoders.write_cut(path, *parts),
        )
        specs.append(f"{name}={folder}")
    for name, (architecture, source, size) in encoders.images.items():
        folder = build.make(
            weights_folder / f"ladder-{name}",
            lambda path, parts=(name, architecture, weights[source], size): write_image_encoder(path, *parts),
        )
        specs.append(f"{name}=local-dir:{folder}")
    command = ["embed.py", "--data", table, "--out", out, "--encoder", *specs, "control"]
    command += ["--weights", *(f"{name}={weights[name]}" for name in ("mpnet", "minilm_l6"))]
    sys.argv = [str(part) for part in command]
    runpy.run_path(str(ROOT / "embed.py"), run_name="__main__")  # in this process, where the stages are registered


def write_image_encoder(path, name, architecture, weights, size):
    """Writes a folder that timm reads: an architecture, weights and the whole picture at `size` pixels."""
    path.mkdir()
    state = load_file(weights)
    if name.startswith("grey"):
        luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        state["conv_stem.weight"] = (state["conv_stem.weight"].sum(1, keepdim=True) * luminance).contiguous()
    save_file(state, path / "model.safetensors")
    pretrained = {
        "input_size": [3, size, size],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,  # an icon fills its picture
        "num_classes": 1000,
        "classifier": "classifier",
        "first_conv": "conv_stem",
    }
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": pretrained}
    (path / "config.json").write_text(json.dumps(config))
