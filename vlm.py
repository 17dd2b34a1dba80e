"""What the scripts share: encoders, the embedding folder, the connector, the stitched model, training, the run folder.

    from vlm import get_vlm_from_checkpoint
    vlm = get_vlm_from_checkpoint("runs/hyma/connectors/vit_l16_mlp1_mpnet.pt")
    image = vlm.encode_image(vlm.transform(picture)[None])            # [1, 1024], unit length
    text = vlm.encode_text(["a photo of a dog", "a photo of a cat"])  # [2, 1024], unit length, same space
    scores = image @ text.T                                           # cosines

A connector maps the text encoder's space to the image encoder's: C hidden layers of 1024 with ReLU, C = 0, 1 or 2
(arXiv 2507.10015, section 3). File names, state-dict keys and the embedding files are the published ones, so
published connectors and published embeddings work as they are. timm and sentence-transformers are imported only when
an encoder is built: `import vlm` costs what `import torch` costs.
"""

import contextlib
import csv
import errno
import fcntl
import fnmatch
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.parse
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import Layer, clip_loss, connector_mlp, true_rank

HIDDEN_DIM = 1024
FORMAT_VERSION = 1
PICTURE_RIDGE = 3.0  # regularisation of the pictures' Gram matrix in a whitened map, in mean eigenvalues
SAMPLE = Path(__file__).parent / "sample" / "embeddings"


class BadInput(ValueError):
    """Something the user can mend. The message is one line: which file, row or flag, and what to do next."""


# ------------------------------------------------------------------------------------------------------- encoders


class Encoder(NamedTuple):
    name: str  # short name: file names, pairs, tables
    kind: str  # "image" or "text"
    spec: str  # what timm or sentence-transformers is asked for
    dim: int | None  # None until the model has been built


# The paper's nine and three. timm tags are pinned: the bare names have changed their meaning over timm's versions.
PAPER_ENCODERS = [
    Encoder("vit_s16", "image", "vit_small_patch16_224.augreg_in21k_ft_in1k", 384),
    Encoder("deit_s16", "image", "deit_small_patch16_224.fb_in1k", 384),
    Encoder("deit3_s16", "image", "deit3_small_patch16_224.fb_in1k", 384),
    Encoder("vit_b16", "image", "vit_base_patch16_224.augreg_in21k_ft_in1k", 768),
    Encoder("deit_b16", "image", "deit_base_patch16_224.fb_in1k", 768),
    Encoder("deit3-ft_b16", "image", "deit3_base_patch16_224.fb_in22k_ft_in1k", 768),
    Encoder("vit_l16", "image", "vit_large_patch16_224.augreg_in21k_ft_in1k", 1024),
    Encoder("deit3-ft_l16", "image", "deit3_large_patch16_384.fb_in22k_ft_in1k", 1024),
    Encoder("eva2-ft_l16", "image", "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 1024),
    Encoder("minilm", "text", "all-MiniLM-L12-v2", 384),
    Encoder("mpnet", "text", "all-mpnet-base-v2", 768),
    Encoder("roberta", "text", "all-roberta-large-v1", 1024),
]
# The sample's: small networks, and a random one that every sound selection ranks last.
SAMPLE_ENCODERS = [
    Encoder("efflite0", "image", "tf_efficientnet_lite0.in1k", 1280),
    Encoder("efflite1", "image", "tf_efficientnet_lite1.in1k", 1280),
    Encoder("efflite2", "image", "tf_efficientnet_lite2.in1k", 1280),
    Encoder("control", "image", "random:resnet18", 512),
    Encoder("minilm_l6", "text", "all-MiniLM-L6-v2", 384),
]
ENCODERS = {encoder.name: encoder for encoder in PAPER_ENCODERS + SAMPLE_ENCODERS}
IMAGE_PREFIXES = ("timm:", "hf-hub:", "local-dir:", "random:")


def find_encoder(text: str) -> Encoder:
    """A short name of the registry, `NAME=SPEC`, or a bare SPEC, which gets a short name made from it.

    SPEC is an image encoder if it is a timm model name or starts with `timm:`, `hf-hub:`, `local-dir:` (a folder with
    config.json and weights) or `random:` (a timm architecture with random weights: a control); anything else is a
    sentence-transformers name or folder. Raises BadInput for a name that cannot be part of a file name.
    """
    if text in ENCODERS:
        return ENCODERS[text]
    name, equals, spec = text.partition("=")
    if not equals:
        spec = text
        name = re.sub(r"[^\w.]+", "-", Path(text.rstrip("/")).name.rpartition(":")[2], flags=re.ASCII).strip("-._")
    if not spec or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or re.search(r"_mlp\d_", name):
        raise BadInput(f"encoder {text!r}: give a short name of letters, digits, '.', '_' and '-', as NAME=SPEC")
    if spec in ENCODERS:  # a second name for a registered encoder
        return ENCODERS[spec]._replace(name=name)
    if spec.startswith(IMAGE_PREFIXES):
        return Encoder(name, "image", spec, None)
    import timm

    return Encoder(name, "image" if timm.is_model(spec) else "text", spec, None)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or by default the GPU where there is one."""
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise BadInput(f"--device {device}: torch knows no such device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {device}: torch sees no GPU here; use --device cpu")
    return device


def open_image(source):
    """Any picture as upright RGB on white. `source` is a path or a file; returns a PIL image [H, W, 3].

    Refuses, before decoding, what Pillow calls a decompression bomb (over 89 million pixels), and any format but
    JPEG, PNG, WebP, GIF and BMP. Raises whatever Pillow raises for an unreadable file.
    """
    from PIL import Image, ImageOps

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused just below
    with Image.open(source, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP")) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels: a decompression bomb?")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit greys: PIL's own conversion clips them to white
            image = image.point(lambda value: value / 256).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class ImageEncoder(nn.Module):
    """A frozen timm model and its own preprocessing.

    model_name: as for `find_encoder`. weights: a local file (.safetensors, .pth) or folder to use instead of the hub.
    `transform` takes a PIL image to pixels [3, H, W]; `embed_dim` is the width D.
    Raises BadInput, one line, if the weights cannot be had.
    """

    def __init__(self, model_name, device=None, weights=None):
        super().__init__()
        self.model_name = model_name
        self.device = pick_device(device)
        encoder = find_encoder(model_name)
        if encoder.kind != "image":
            raise BadInput(f"{model_name} is a text encoder; an image encoder is needed here")
        if weights is None and not encoder.spec.startswith(("random:", "local-dir:")):
            go_offline_without_hub()
        import timm

        name, untrained = re.sub(r"^(timm|random):", "", encoder.spec), encoder.spec.startswith("random:")
        options = {"pretrained": not untrained, "num_classes": 0}
        if weights is not None:
            weights = Path(weights)
            if not weights.exists():
                raise BadInput(f"--weights {encoder.name}={weights}: no such file or folder")
            if (weights / "config.json").is_file():
                name = f"local-dir:{weights}"
            else:
                files = [weights] if weights.is_file() else [*weights.glob("*.safetensors"), *weights.glob("*.pth")]
                if not files:
                    raise BadInput(f"--weights {encoder.name}={weights}: holds no .safetensors or .pth file")
                options["pretrained_cfg_overlay"] = {"file": str(files[0])}
        try:
            with torch.random.fork_rng(devices=[]):  # a control is the same network every time
                torch.manual_seed(0)
                self.model = timm.create_model(name, **options)
        except Exception as error:  # timm, the hub and the file readers raise a dozen unrelated types
            raise BadInput(cannot_load(encoder, error)) from None
        self.model.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)  # twice as fast
        self.embed_dim = self.model.head_hidden_size  # not num_features: some models widen after pooling
        found = self.model.pretrained_cfg  # a bare name has become a tagged one here
        tagged = ".".join(filter(None, (found.get("architecture", name), found.get("tag"))))
        self.full_name = encoder.spec if untrained else tagged
        self.config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**self.config, is_training=False)

    @torch.no_grad()
    def encode_image(self, image):
        """Pixels [B, 3, H, W] to unit vectors [B, D]."""
        return F.normalize(self.model(image.to(self.device, memory_format=torch.channels_last)).float(), dim=-1)

    forward = encode_image


class TextEncoder:
    """A frozen sentence-transformers model. Arguments and errors as for `ImageEncoder`."""

    def __init__(self, model_name, device=None, weights=None):
        self.model_name = model_name
        self.device = pick_device(device)
        encoder = find_encoder(model_name)
        if encoder.kind != "text":
            raise BadInput(f"{model_name} is an image encoder; a text encoder is needed here")
        if weights is not None and not Path(weights).is_dir():
            raise BadInput(
                f"--weights {encoder.name}={weights}: a text encoder's weights are a folder, and this is none"
            )
        if not Path(weights or encoder.spec).is_dir():
            go_offline_without_hub()
        from sentence_transformers import SentenceTransformer

        try:
            self.model = SentenceTransformer(str(weights or encoder.spec), device=str(self.device))
        except Exception as error:  # as above
            raise BadInput(cannot_load(encoder, error)) from None
        self.model.eval().requires_grad_(False)
        dimension = getattr(self.model, "get_embedding_dimension", None)  # the name from version 6 on
        self.embed_dim = (dimension or self.model.get_sentence_embedding_dimension)()
        self.full_name = encoder.spec
        self.config = {"max_seq_length": self.model.max_seq_length}

    def to(self, device):
        self.device = pick_device(device)
        self.model.to(self.device)
        return self

    @torch.no_grad()
    def encode_text(self, sentences, batch_size=32):
        """A sentence to a unit vector [D], or a list of B sentences to unit vectors [B, D]."""
        features = self.model.encode(sentences, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(features.to(self.device).float(), dim=-1)

    __call__ = encode_text


def go_offline_without_hub():
    """Spares a machine without a network the hub client's minutes of retries: what it has cached is still found."""
    if os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy")):
        return
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        if "huggingface_hub" in sys.modules:  # it has read the environment already
            sys.modules["huggingface_hub"].constants.HF_HUB_OFFLINE = True


def weights_digest(model):
    """sha256 over a model's floating-point tensors, by their bytes alone: libraries rename tensors between versions."""
    tensors = [t.detach().cpu().contiguous() for t in model.state_dict().values() if t.is_floating_point()]
    digests = sorted(hashlib.sha256(t.view(-1).view(torch.uint8).numpy()).digest() for t in tensors)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def cannot_load(encoder: Encoder, error: Exception) -> str:
    """One line for a model whose weights are not to be had: what is missing and where to put it."""
    import difflib

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    reason = reason[:120].rstrip(".")
    guess = difflib.get_close_matches(encoder.name, ENCODERS, n=1)
    hint = f" Did you mean {guess[0]}?" if guess and guess[0] != encoder.name else ""
    source = re.sub(r"^(timm|hf-hub):", "", encoder.spec)
    if encoder.spec.startswith("local-dir:"):
        return f"cannot load {encoder.name} from {source[10:]}: {reason}"
    if "/" not in source:
        source = ("timm/" if encoder.kind == "image" else "sentence-transformers/") + source
    return (
        f"cannot load the weights of {encoder.name} ({source}): {reason}.{hint} Without a network, copy the files of "
        f"huggingface.co/{source} into a folder and pass --weights {encoder.name}=FOLDER"
    )


# ----------------------------------------------------------------------------------- the stitched model (VLM)


def init_modality_connector(input_dim, hidden_dims, output_dim, activation="relu"):
    """The connector MLP [B, input_dim] -> [B, output_dim]: Linear, (activation, Linear) per hidden layer.

    No hidden layer gives a plain Linear, so that the state-dict keys are the published ones: `weight bias`,
    `0.* 2.*`, `0.* 2.* 4.*`.
    """
    activations = {"relu": nn.ReLU, "gelu": nn.GELU}
    if activation not in activations:
        raise BadInput(f"activation {activation!r}: use one of {', '.join(activations)}")
    dims = [input_dim, *hidden_dims, output_dim]
    layers = [nn.Linear(dims[0], dims[1])]
    for wide, narrow in zip(dims[1:], dims[2:]):
        layers += [activations[activation](), nn.Linear(wide, narrow)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def connector_name(image: str, hidden_layers: int, text: str) -> str:
    return f"{image}_mlp{hidden_layers}_{text}.pt"


def read_connector(path, image_dim=None, text_dim=None):
    """Reads `{image}_mlp{C}_{text}.pt` strictly. Returns (image name, C, text name, state dict on the CPU).

    Raises BadInput naming the file and what was expected, if the name does not parse, the file is damaged, a key is
    missing or a shape is wrong. The widths of registered encoders are known; others are given, or taken as found.
    """
    path = Path(path)
    parsed = re.fullmatch(r"(.+)_mlp([012])_(.+)\.pt", path.name)
    if not parsed:
        raise BadInput(f"{path}: expected a name like vit_l16_mlp1_mpnet.pt: <image>_mlp<0|1|2>_<text>.pt")
    image, hidden_layers, text = parsed[1], int(parsed[2]), parsed[3]
    state = load_tensors(path)
    layers = [""] if hidden_layers == 0 else [f"{2 * k}." for k in range(hidden_layers + 1)]
    keys = [layer + part for layer in layers for part in ("weight", "bias")]
    if not isinstance(state, dict) or sorted(state) != sorted(keys):
        found = " ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise BadInput(f"{path}: expected the keys {' '.join(keys)}; found {found or 'none'}")
    if not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise BadInput(f"{path}: expected tensors under the keys {' '.join(keys)}")
    known = {name: encoder.dim for name, encoder in ENCODERS.items()}
    first, last = state[layers[0] + "weight"], state[layers[-1] + "weight"]
    text_dim = text_dim or known.get(text) or (first.shape[1] if first.dim() == 2 else 0)
    image_dim = image_dim or known.get(image) or last.shape[0]
    dims = [text_dim] + [HIDDEN_DIM] * hidden_layers + [image_dim]
    for layer, wide, narrow in zip(layers, dims, dims[1:]):
        for key, shape in ((layer + "weight", (narrow, wide)), (layer + "bias", (narrow,))):
            if tuple(state[key].shape) != shape:
                raise BadInput(f"{path}: {key} has shape {tuple(state[key].shape)}; expected {shape}")
    return image, hidden_layers, text, state


def save_connector(out, data, layers, ranked, about):
    """Writes one pair's connector and, beside it, the `.json` card that says what made it.

    layers: [(weight [out, in], bias [out])]. ranked: the pair's row of ranking.csv. about: whatever else to record.
    """
    image, text = data.encoders[ranked["image"]], data.encoders[ranked["text"]]
    keys = [""] if len(layers) == 1 else [f"{2 * k}." for k in range(len(layers))]
    state = {}
    for key, (weight, bias) in zip(keys, layers):
        state[key + "weight"] = weight.detach().float().cpu().clone()
        state[key + "bias"] = bias.detach().float().cpu().clone()
    card = {
        "image_encoder": image.spec,
        "text_encoder": text.spec,
        "maps": f"unit vectors of {text.name} [{text.dim}] to the space of {image.name} [{image.dim}]; normalise after",
        "hidden_layers": len(layers) - 1,
        "activation": "relu",
        "dataset": data.manifest["dataset"] if data.manifest else data.folder.name,
        "embeddings_sha256": data.fingerprint([image.name, text.name]),
    }
    path = Path(out) / "connectors" / connector_name(image.name, len(layers) - 1, text.name)
    save_tensors(state, path)
    write_json(path.with_suffix(".json"), card | ranked | about)
    return path


class CustomVLM:
    """An image encoder and a text encoder whose vectors live in the image encoder's space.

    connector_args: (text width, [hidden widths], image width), or None for encoders that share a space already.
    """

    def __init__(self, image_encoder_name, text_encoder_name, connector_args=None, device=None):
        self.device = pick_device(device)
        self.image_encoder = ImageEncoder(image_encoder_name, self.device)
        self.text_encoder = TextEncoder(text_encoder_name, self.device)
        self.connector = None
        if connector_args is not None:
            self.connector = init_modality_connector(*connector_args).to(self.device).eval().requires_grad_(False)

    @property
    def transform(self):
        """PIL image -> pixels [3, H, W]: what `encode_image` expects, stacked to [B, 3, H, W]."""
        return self.image_encoder.transform

    def load_connector_checkpoint(self, path):
        """Loads a connector file strictly, building the connector if there is none yet."""
        dims = self.image_encoder.embed_dim, self.text_encoder.embed_dim
        _, hidden_layers, _, state = read_connector(path, *dims)
        connector = self.connector or init_modality_connector(dims[1], [HIDDEN_DIM] * hidden_layers, dims[0])
        try:
            connector.load_state_dict(state)
        except RuntimeError as error:
            raise BadInput(
                f"{path}: does not fit this model's connector: {str(error).splitlines()[-1].strip()}"
            ) from None
        self.connector = connector.to(self.device).float().eval().requires_grad_(False)

    def encode_image(self, pixels):
        """Pixels [B, 3, H, W] to unit vectors [B, D]."""
        return self.image_encoder.encode_image(pixels)

    @torch.no_grad()
    def encode_text(self, sentences):
        """B sentences to unit vectors [B, D] in the image encoder's space (one sentence: [D])."""
        features = self.text_encoder.encode_text(sentences)
        if self.connector is not None:
            features = self.connector(features)
        return F.normalize(features, dim=-1)


def get_vlm_from_checkpoint(path, device=None, image_encoder=None, text_encoder=None):
    """The stitched model of a connector file, with nothing else present.

    The encoders are those of the file's name; encoders outside the registry are looked up in the `.json` card beside
    the file. `image_encoder` and `text_encoder` replace them, with a local folder for example.
    """
    image, hidden_layers, text, state = read_connector(path)
    card = Path(path).with_suffix(".json")
    card = read_json(card) if card.is_file() else {}
    names = {"image": image_encoder or image, "text": text_encoder or text}
    for kind, short, given in (("image", image, image_encoder), ("text", text, text_encoder)):
        if given is None and short not in ENCODERS:
            if f"{kind}_encoder" not in card:
                known = ", ".join(name for name, encoder in ENCODERS.items() if encoder.kind == kind)
                raise BadInput(
                    f"{path}: unknown {kind} encoder {short!r}: no card beside the file names it, and the known ones are {known}"
                )
            names[kind] = f"{short}={card[f'{kind}_encoder']}"
    vlm = CustomVLM(names["image"], names["text"], device=device)
    vlm.load_connector_checkpoint(path)
    return vlm


# ----------------------------------------------------------------------------------------- the embedding folder


class EmbeddingDataset(torch.utils.data.Dataset):
    """One embedding file, `[rows, embed_dim]`, read lazily; items are float32 vectors [embed_dim]."""

    def __init__(self, filepath):
        self.embeddings = load_tensors(filepath, mmap=True)
        if (
            not torch.is_tensor(self.embeddings)
            or self.embeddings.dim() != 2
            or not self.embeddings.is_floating_point()
        ):
            raise BadInput(f"{filepath}: expected one floating-point tensor [rows, dim]")
        self.embed_dim = self.embeddings.shape[1]

    def __len__(self):
        return len(self.embeddings)

    def __getitem__(self, index):
        return self.embeddings[index].float()


class Embeddings:
    """An embedding folder, opened and checked: `<encoder>.pt` files, `manifest.json`, `rows.jsonl`.

    A folder without a manifest (the published form) is accepted if its files have equal row counts.
    `rows` is a list of {key, image, caption, label?, split?}, None where unknown. `encoders`: short name -> Encoder.
    Raises BadInput for a folder that is unsealed, or whose rows are not those it was sealed with.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise BadInput(f"{folder}: no such embedding folder; make one with: python embed.py --out {folder}")
        if (self.folder / "manifest.json").is_file():
            self._open_sealed()
        elif (self.folder / "rows.jsonl").exists() or (self.folder / "manifest.partial.json").exists():
            raise BadInput(
                f"{folder}: is not sealed (no manifest.json); run the same embed.py command again to finish it"
            )
        else:
            self._open_bare()

    def _open_sealed(self):
        where = self.folder / "manifest.json"
        self.manifest = read_json(where)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise BadInput(
                f"{where}: format version {self.manifest.get('format_version')}; this program reads {FORMAT_VERSION}"
            )
        try:
            self.encoders = {
                name: Encoder(name, record["kind"], record["spec"], record["dim"])
                for name, record in self.manifest["encoders"].items()
            }
            self.row_count, keys_sha256 = self.manifest["rows"], self.manifest["keys_sha256"]
            for name, record in self.manifest["encoders"].items():
                if (record["rows"], record["keys_sha256"]) != (self.row_count, keys_sha256):
                    raise BadInput(
                        f"{where}: {name} was embedded from other rows than the folder's; run embed.py again into a new --out"
                    )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{where}: is damaged ({error} is missing or wrong); run embed.py again into a new --out"
            ) from None
        self.rows = read_jsonl(self.folder / "rows.jsonl")
        if len(self.rows) != self.row_count:
            raise BadInput(
                f"{self.folder}/rows.jsonl: has {len(self.rows)} rows; the manifest was sealed with {self.row_count}"
            )
        if hash_keys(self.rows) != keys_sha256:
            raise BadInput(
                f"{self.folder}/rows.jsonl: the rows or their order have changed since the folder was sealed; run embed.py again into a new --out"
            )

    def _open_bare(self):
        files = {path.stem: EmbeddingDataset(path) for path in sorted(self.folder.glob("*.pt"))}
        if not files:
            raise BadInput(f"{self.folder}: holds no embeddings; make some with: python embed.py --out {self.folder}")
        unknown = [name for name in files if name not in ENCODERS]
        if unknown:
            raise BadInput(
                f"{self.folder}/{unknown[0]}.pt: without a manifest.json only registered encoders are known ({', '.join(ENCODERS)})"
            )
        counts = {name: len(file) for name, file in files.items()}
        first = next(iter(counts))
        for name, count in counts.items():
            if count != counts[first]:
                raise BadInput(
                    f"{self.folder}: {first}.pt has {counts[first]} rows and {name}.pt has {count}; they are not of the same corpus"
                )
        print(
            f"{self.folder}: no manifest.json; the row counts agree ({counts[first]}), the order of the rows cannot be checked",
            file=sys.stderr,
        )
        self.encoders = {
            name: ENCODERS[name]._replace(dim=ENCODERS[name].dim or file.embed_dim) for name, file in files.items()
        }
        self.row_count, self.rows, self.manifest = counts[first], None, None

    def names(self, kind):
        """Short names of the folder's image or text encoders, in the manifest's order."""
        return [name for name, encoder in self.encoders.items() if encoder.kind == kind]

    def load(self, name):
        """The embeddings of one encoder, [rows, dim], as stored (memory-mapped), after checking every byte."""
        path = self.folder / f"{name}.pt"
        embeddings, dim = EmbeddingDataset(path).embeddings, self.encoders[name].dim
        if tuple(embeddings.shape) != (self.row_count, dim):
            raise BadInput(f"{path}: has shape {tuple(embeddings.shape)}; expected {(self.row_count, dim)}")
        for start in range(0, self.row_count, 65536):
            norms = embeddings[start : start + 65536].float().norm(dim=1)  # [rows]; NaN and Inf survive the sum
            bad = (~(norms.isfinite() & (norms > 0))).nonzero()
            if len(bad):
                raise BadInput(
                    f"{path}: row {start + bad[0].item()} is zero, NaN or infinite; run embed.py again for {name} into a new --out"
                )
        if self.manifest and sha256_file(path) != self.manifest["encoders"][name]["file_sha256"]:
            raise BadInput(
                f"{path}: differs from the file that was sealed (sha256); run embed.py again for {name} into a new --out"
            )
        return embeddings

    def fingerprint(self, names):
        """What a run's embeddings are recognised by later: {encoder: sha256 of its file}."""
        if self.manifest is None:
            return {name: sha256_file(self.folder / f"{name}.pt") for name in names}
        return {name: self.manifest["encoders"][name]["file_sha256"] for name in names}


class RowStore:
    """The embeddings of several encoders, on the device if half its memory holds them, to take batches of rows from."""

    def __init__(self, data, names, device):
        tensors = {name: data.load(name) for name in names}
        self.dims = {name: tensor.shape[1] for name, tensor in tensors.items()}
        self.device = device
        size = sum(tensor.nbytes for tensor in tensors.values())
        moved = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2
        self.tensors = {name: tensor.to(device) if moved else tensor for name, tensor in tensors.items()}

    def take(self, name, rows):
        """Unit vectors [len(rows), dim], float32, on the device."""
        tensor = self.tensors[name]
        return F.normalize(tensor[rows.to(tensor.device)].to(self.device).float(), dim=1)


def hash_keys(rows) -> str:
    """sha256 over the ordered rows: what each row is (key) and what it says (caption, label, split, a question)."""
    digest = hashlib.sha256()
    for row in rows:
        parts = [str(row.get(part, "")) for part in ("key", "caption", "label", "split")]
        parts += [row[part] for part in ("question", "answer", "choices") if part in row]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()


def draw_distractors(key, pool, right, count):
    """`count` of the different items of the list `pool` that are not in the set `right` (all, if there are fewer),
    drawn by `key` alone: the same ones with every version of everything."""
    drawn, turn, most = {}, 0, min(count, len(pool) - len(right.intersection(pool)))
    while len(drawn) < most:
        item = pool[int.from_bytes(hashlib.sha256(f"{key}:{turn}".encode()).digest()[:8]) % len(pool)]
        if item not in right:
            drawn[item] = None
        turn += 1
    return list(drawn)


def split_rows(data: Embeddings, seed=0, count=None, fraction=0.1, most=5000):
    """Row numbers to train on and to choose by: (train [n], validation [m]).

    count: only so many rows, both kinds in proportion, drawn by the seed; a smaller draw is part of every larger one.

    A `split` column decides where there is one: train, or none, is trained on; val, valid, validation, dev choose;
    any other name (test) is left alone. Otherwise a tenth of the pictures, or `most`, is set aside, all captions of a
    picture together, so that no validation picture is trained on.
    """
    splits = [row.get("split") for row in data.rows] if data.rows else [None] * data.row_count
    if any(splits):
        validation = [i for i, split in enumerate(splits) if split in ("val", "valid", "validation", "dev")]
        train = [i for i, split in enumerate(splits) if split in ("train", "training", None, "")]
        if not validation:
            raise BadInput(
                f"{data.folder}/rows.jsonl: the split column has no val rows to choose by; it holds {sorted(set(map(str, splits)))}"
            )
    else:
        pictures = [row["image"] for row in data.rows] if data.rows else list(range(data.row_count))
        unique = list(dict.fromkeys(pictures))
        order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = {unique[i] for i in order[: min(most, max(1, round(fraction * len(unique))))]}
        validation = [i for i, picture in enumerate(pictures) if picture in held_out]
        train = [i for i, picture in enumerate(pictures) if picture not in held_out]
    parts, share = [torch.tensor(train), torch.tensor(validation)], (count or math.inf) / (len(train) + len(validation))
    if share < 1:
        random = random_of("part of the rows", seed)
        parts = [part[torch.randperm(len(part), generator=random)[: max(1, int(share * len(part)))]] for part in parts]
    return parts[0].sort().values, parts[1].sort().values


def choose_pairs(data: Embeddings, patterns):
    """The (image, text) pairs that `--pairs` asks for: `all`, `vit_l16:mpnet`, wildcards like `vit_*:*`, several."""
    pairs = [(image, text) for image in data.names("image") for text in data.names("text")]
    if not pairs:
        raise BadInput(
            f"{data.folder}: holds {len(data.names('image'))} image and {len(data.names('text'))} text encoders; one of each is needed at least"
        )
    chosen = set()
    for pattern in patterns:
        pattern = "*:*" if pattern == "all" else pattern
        matched = {pair for pair in pairs if fnmatch.fnmatchcase(":".join(pair), pattern)}
        if not matched:
            known = f"images {', '.join(data.names('image'))}; texts {', '.join(data.names('text'))}"
            raise BadInput(f"--pairs {pattern}: no such pair in {data.folder}, which has {known}")
        chosen |= matched
    return [pair for pair in pairs if pair in chosen]


class Retrieval:
    """Recall@k of caption to picture and picture to caption, on fixed rows.

    A picture with several captions stands once among the pictures, a caption of several pictures once among the
    captions; any of its own counts as found. A tie counts against the match, so that constant vectors score zero.
    `chance`: what a random order scores, for k = 1, 5, 10.
    """

    ks = (1, 5, 10)

    def __init__(self, data: Embeddings, rows, device):
        self.rows = rows  # [n]
        self.first, self.place, chances = {}, {}, []
        for part, other in (("image", "caption"), ("caption", "image")):
            names = [data.rows[i][part] for i in rows.tolist()] if data.rows else rows.tolist()
            position = {name: k for k, name in enumerate(dict.fromkeys(names))}
            place = torch.tensor([position[name] for name in names])  # [n], which picture (caption) a row has
            first = torch.full((len(position),), len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
            self.first[part], self.place[part] = first.to(device), place.to(device)
            owned = place.bincount().double()  # [queries], how many candidates are right
            count = len(rows) if not data.rows else len({data.rows[i][other] for i in rows.tolist()})
            missed = [torch.ones_like(owned)]
            for k in range(max(self.ks)):  # none right among the first k + 1 of a random order of all candidates
                missed.append(missed[-1] * ((count - owned - k) / max(1, count - k)).clamp(0, 1))
            chances.append([1 - missed[k].mean().item() for k in self.ks])
        self.chance = [sum(pair) / 2 for pair in zip(*chances)]

    def ranks(self, text, image):
        """How many candidates come before a query's first right one: of each caption among the pictures [captions], of
        each picture among the captions [pictures].

        text [n, D]: of the rows, of any length. image [n, D]: unit vectors, or their coordinates along orthonormal axes.
        """
        vectors = {"caption": F.normalize(text, dim=1), "image": image}
        own = torch.einsum("nd,nd->n", vectors["caption"], vectors["image"]).nan_to_num()  # [n]
        found = []
        for query, target in (("caption", "image"), ("image", "caption")):
            place, worst = self.place[query], torch.full_like(self.first[query], len(own))
            best = own.new_full(worst.shape, -torch.inf).scatter_reduce(0, place, own, "amax")  # [queries]
            rows = torch.arange(len(own), device=own.device).where(own == best[place], len(own))
            rows = worst.scatter_reduce(0, place, rows, "amin")  # [queries], where a query's nearest right one is
            found.append(true_rank(vectors[query][rows], vectors[target][self.first[target]], self.place[target][rows]))
        return found

    def recalls(self, text, image):
        """R@1, 5, 10 of text to image, then of image to text. Arguments as for `ranks`."""
        return [(ranks < k).double().mean().item() for ranks in self.ranks(text, image) for k in self.ks]


def rank_pairs(recalls, before=None):
    """{"image:text": six recalls} to the rows of ranking.csv, best first by R@10, R@5, R@1; equals share a rank.

    before: {"image:text": number}, what comes before the recalls: the more the better.
    """
    table = []
    for pair, six in recalls.items():
        image, _, text = pair.partition(":")
        means = [round((six[k] + six[k + 3]) / 2, 6) for k in range(3)]  # of both directions
        table.append({"image": image, "text": text} | {f"val_recall{k}": mean for k, mean in zip(Retrieval.ks, means)})

    def value(row):
        recall = row["val_recall10"], row["val_recall5"], row["val_recall1"]
        return (before or {}).get(f"{row['image']}:{row['text']}", 0), *recall

    table.sort(key=value, reverse=True)
    for row in table:
        row["rank"] = 1 + sum(value(other) > value(row) for other in table)
    return table


def print_ranking(table, recalls, retrieval):
    """The rows of `rank_pairs` as a table: recalls in per cent, both directions, against chance."""
    chance = " / ".join(f"{100 * c:.1f}" for c in retrieval.chance)
    wide, narrow = (max(len(row[part]) for row in table) for part in ("image", "text"))
    print(f"\nranking on {len(retrieval.rows)} validation rows, recall in % (chance at 1 / 5 / 10: {chance})")
    more = "expected_recall10" in table[0]
    print(f"{'':{wide + narrow + 8}}text -> image        image -> text        mean" + "  expected" * more)
    print(f"rank  {'image':{wide}}  {'text':{narrow}}" + "   R@1   R@5  R@10" * 2 + "   R@10" + "      R@10" * more)
    for row in table:
        six = "".join(f"{100 * value:6.1f}" for value in recalls[f"{row['image']}:{row['text']}"])
        six += f"{100 * row['val_recall10']:7.1f}" + (f"{100 * row['expected_recall10']:10.1f}" if more else "")
        print(f"{row['rank']:4}  {row['image']:{wide}}  {row['text']:{narrow}}{six}")


# --------------------------------------------------------------------------------------- what both trainers need


def add_training_flags(parser, name):
    """The flags that mean the same to every trainer. Runs go to runs/<name>-... by default."""
    add = parser.add_argument
    add(
        "--pairs",
        nargs="+",
        default=["all"],
        metavar="IMAGE:TEXT",
        help="all, vit_l16:mpnet, wildcards, several (default: all)",
    )
    add("--data", type=Path, help="embedding folder (default: the sample's)")
    add("--out", type=Path, help=f"run folder (default: runs/{name}-<date>-<time>)")
    add("--resume", action="store_true", help="go on with the run in --out, or with the newest; its flags are kept")
    add(
        "--connector",
        choices=["mlp0", "mlp1", "mlp2"],
        default="mlp1",
        help="hidden layers of 1024 (default: %(default)s)",
    )
    add("--epochs", type=int, help="passes over the training rows (default: 10, or what makes 100 steps)")
    add("--rows", type=int, help="choose from so many rows of the folder, drawn by the seed (default: all)")
    add("--batch-size", type=int, help="rows a step (default: 512, or all there are)")
    add("--warmup-steps", type=int, default=20, help="steps of linear warm-up; a cosine follows (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's (default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--logit-scale", type=float, default=20.0, help="factor on the cosines, 1 to 150 (default: %(default)s)")
    add(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="of the matrix products (default: tf32 on CUDA, else fp32)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")


def check_training_flags(flags, *positive):
    """Raises BadInput for a number out of its range. `positive`: further flags that must be above zero."""
    for name in ("rows", "epochs", "batch_size", "lr", "clip_norm", *positive):
        value = getattr(flags, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
    if not 1 <= flags.logit_scale <= 150:
        raise BadInput(f"--logit-scale {flags.logit_scale}: must be from 1 to 150")
    if flags.warmup_steps < 0 or flags.weight_decay < 0:
        raise BadInput("--warmup-steps and --weight-decay must not be negative")
    if flags.batch_size == 1:
        raise BadInput("--batch-size 1: a contrastive loss needs two rows at least")


def settle_training_flags(flags, name, device, row_count):
    """Puts values in the place of those flags whose default depends on data and device, so that config.json has them."""
    flags.data = flags.data or SAMPLE
    flags.batch_size = flags.batch_size or max(2, min(512, row_count))
    if row_count < flags.batch_size:
        raise BadInput(f"--batch-size {flags.batch_size}: {flags.data} has only {row_count} training rows")
    flags.out = flags.out or Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    flags.epochs = flags.epochs or max(10, math.ceil(100 / (row_count // flags.batch_size)))
    flags.precision = flags.precision or ("tf32" if device.type == "cuda" else "fp32")


def find_run(out=None):
    """The run folder to go on with: `out`, or the newest in runs/."""
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if out is None and not runs:
        raise BadInput("--resume: there is no run in runs/; name one with --out")
    return out or runs[-1].parent


def resume_flags(parser, out):
    """The flags and the configuration of the run in `out`; flags given now may not contradict them."""
    if not (out / "config.json").is_file():
        raise BadInput(f"--resume: {out} holds no run (no config.json)")
    config = read_json(out / "config.json")
    if config.get("script") != Path(sys.argv[0]).name:
        raise BadInput(f"--resume: {out} was not made by {Path(sys.argv[0]).name}")
    parser.set_defaults(**config["flags"])
    flags = parser.parse_args()  # again, so that what is given now shows against what the run was started with
    flags.data, flags.out = Path(flags.data), out
    for name, value in config["flags"].items():
        now = getattr(flags, name)
        if name != "out" and (str(now) if isinstance(now, Path) else now) != value:
            raise BadInput(f"--{name.replace('_', '-')} {now}: contradicts {out}, which was started with {value}")
    return flags, config


def open_data(flags):
    """The embedding folder and the pairs that the flags ask for."""
    data = Embeddings(flags.data or SAMPLE)
    return data, choose_pairs(data, flags.pairs)


def split_for_training(data, seed, count):
    """Row numbers to train on and to choose by (`split_rows`), and a line that says how many."""
    train_rows, val_rows = split_rows(data, seed, count)
    sample = " (the sample)" if data.folder == SAMPLE else ""
    print(
        f"data: {os.path.relpath(data.folder)}{sample}: {len(train_rows)} training and {len(val_rows)} validation rows"
    )
    return train_rows, val_rows


def open_run(flags, config, identity, device, wait=False):
    """Makes the run folder, or, for a resumed run, sees that it is of the same pairs and embeddings. Locks it."""
    out = flags.out
    if config is None:
        if (out / "config.json").exists():
            raise BadInput(f"--out {out}: holds a run already; choose another, or go on with it: --resume --out {out}")
        (out / "connectors").mkdir(parents=True, exist_ok=True)
    elif any(config[key] != value for key, value in identity.items()):
        raise BadInput(f"--resume: the embeddings in {flags.data} are no longer those that {out} was started with")
    lock = lock_folder(out, wait)
    if config is None:
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in vars(flags).items() if name != "resume"}
        about = {"script": Path(sys.argv[0]).name, "flags": plain} | identity | provenance(device)
        write_json(out / "config.json", about)
    return lock


def unique(names):
    return list(dict.fromkeys(names))


def random_of(*parts):
    """A generator for just these parts. torch seeds its CPU generator with 32 bits, so they are hashed, not packed."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]))


def draw_rows(step, seed, rows, batch_size):
    """The batch of a step, a pure function of (seed, step): each epoch deals the rows out once, the rest sits out."""
    epoch, place = divmod(step, len(rows) // batch_size)
    order = torch.randperm(len(rows), generator=random_of("rows", seed, epoch))
    return rows[order[place * batch_size : (place + 1) * batch_size]]  # [B]


def learning_rate(step, steps, peak, warmup_steps):
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def own_layers(features, pairs, weights):
    """What `connector_mlp` takes, for pairs with weights of their own: [[(weight, bias)] per layer] per pair."""
    texts, layers = list(features), []
    for depth in range(len(weights[0])):
        wiring = [(texts.index(text) if depth == 0 else p, p) for p, (_, text) in enumerate(pairs)]
        layers.append(Layer([w[depth][0] for w in weights], [w[depth][1] for w in weights], wiring))
    return list(features.values()), layers


def regularised(gram, strength):
    """A Gram matrix [D, D] with `strength` times its mean eigenvalue added to its diagonal."""
    return gram + strength * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram)


def perpendicular(weight, mean):
    """A map [D, m] without the direction of the mean [D] in its outputs: it scores pictures as if they were centred."""
    direction = F.normalize(mean, dim=0)
    return weight - direction[:, None] * (direction @ weight)


def flop_counter():
    """Entered, it counts the FLOPs of torch's own products and factorisations, 2 a multiply-add: .get_total_flops(). The
    kernels' it does not see."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    return FlopCounterMode(display=False, custom_mapping=FACTORISATIONS)


FACTORISATIONS = {  # of D x D unless said otherwise (Golub and Van Loan, sections 4.2, 5.2, 8.3 and 8.6)
    torch.ops.aten.linalg_cholesky_ex: lambda x, *_, **__: x[-1] ** 3 // 3,
    torch.ops.aten.cholesky_solve: lambda y, x, *_, **__: 2 * x[-1] ** 2 * y[-1],
    torch.ops.aten.linalg_solve_triangular: lambda x, y, *_, **__: x[-1] ** 2 * y[-1],
    torch.ops.aten.linalg_qr: lambda x, *_, **__: 4 * x[-1] ** 2 * x[-2] - 4 * x[-1] ** 3 // 3,  # n x k, forming Q
    torch.ops.aten._linalg_eigh: lambda x, *_, **__: 9 * x[-1] ** 3,
    torch.ops.aten._linalg_svd: lambda x, *_, **__: 22 * min(x) ** 3,
}


def connector_flops(batch_size, shapes):
    """Of a connector with layers [(out, in)] on a batch, forward and backward, 2 a multiply-add.

    The first layer's inputs are frozen embeddings, which get no gradient.
    """
    return batch_size * sum((4 if depth == 0 else 6) * out * into for depth, (out, into) in enumerate(shapes))


def logit_flops(batch_size, dims):
    """Of the similarities of a batch with itself, for pictures of these widths, forward and backward."""
    return sum(4 * batch_size**2 * dim for dim in dims)


def pair_losses(generator, store, rows, pairs, dtype, logit_scale):
    """Symmetric InfoNCE of each pair on a batch of rows: [P], float32."""
    texts, images = unique(text for _, text in pairs), unique(image for image, _ in pairs)
    inputs, layers = generator({text: store.take(text, rows).to(dtype) for text in texts}, pairs)
    layers = [Layer([w.to(dtype) for w in ws], [b.to(dtype) for b in bs], wiring) for ws, bs, wiring in layers]
    z, sumsq = connector_mlp(inputs, layers)  # [B, sum D_p], [P, B]
    targets = [store.take(image, rows).to(dtype) for image in images]  # each [B, D_i]
    losses, _ = clip_loss(z, targets, [images.index(image) for image, _ in pairs], logit_scale, sumsq=sumsq)
    return losses


@torch.no_grad()
def validate(generator, store, retrieval, pairs):
    """{"image:text": R@1, R@5, R@10 of text to image, then of image to text} on the validation rows."""
    recalls = {}
    for text in unique(text for _, text in pairs):  # a text encoder at a time bounds the memory
        group = [pair for pair in pairs if pair[1] == text]
        z, _ = connector_mlp(*generator({text: store.take(text, retrieval.rows)}, group))
        for (image, _), mapped in zip(group, z.split([store.dims[image] for image, _ in group], dim=1)):
            recalls[f"{image}:{text}"] = retrieval.recalls(mapped, store.take(image, retrieval.rows))
    return {":".join(pair): recalls[":".join(pair)] for pair in pairs}


def write_results(out, data, ranked, connector_of, batch_size, state):
    """Writes connectors and cards, ranking.csv and, last, ledger.json. Returns the connectors' paths, best first.

    ranked: the rows of `rank_pairs`. connector_of("image:text"): its layers and what its card is to record. state: what
    a checkpoint holds: step, updates (of each pair), flops, logit_flops, seconds, peak_bytes, trainable_parameters.
    """
    paths = []
    for row in ranked:
        layers, about = connector_of(f"{row['image']}:{row['text']}")
        paths.append(save_connector(out, data, layers, row, about))
    write_csv(out / "ranking.csv", ranked)
    ledger = {
        "pairs": sum(count > 0 for count in state["updates"].values()),  # a pair may be predicted untrained
        "steps": state["step"],
        "batch_size": batch_size,
        "pair_samples": batch_size * sum(state["updates"].values()),
        "updates_per_pair": state["updates"],
        "flops": state["flops"],
        "logit_flops": state["logit_flops"],  # of those, what grows with the batch at equal samples
        "seconds": round(state["seconds"], 3),
        "peak_bytes": state["peak_bytes"],
        "trainable_parameters": state["trainable_parameters"],
    }
    write_json(out / "ledger.json", ledger)
    return paths


def print_results(ranked, recalls, retrieval, made, state, best):
    """The ranking, what it cost, and the best connector, ready to load. made: a few words on how it was trained."""
    print_ranking(ranked, recalls, retrieval)
    if sum(row["val_recall10"] for row in ranked) < 2 * len(ranked) * retrieval.chance[2]:
        print(
            "All pairs are at chance. A lower --lr or more --epochs may help; do captions and images belong together?"
        )
    least, most = min(state["updates"].values()), max(state["updates"].values())
    cost = f"{state['flops'] / 1e12:.2f} TFLOP in {state['seconds']:.0f} s, {least} to {most} updates a pair"
    print(f"{made}: {cost}")
    print(f"\nbest connector: {best}")
    print(f"load it: from vlm import get_vlm_from_checkpoint; vlm = get_vlm_from_checkpoint({str(best)!r})")


# ------------------------------------------------------------------------------------------ files and run folders


def sha256_file(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path):
    """A file to write to: `path` holds either all of what is written or what was there before, whatever happens."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path, rows):
    """Rows: dicts with the same keys, which become the header."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def save_tensors(value, path):
    with atomic_file(path) as file:  # a file and not its path, whose name torch.save would write into the bytes
        try:
            torch.save(value, file)
        except RuntimeError as error:  # what torch makes of a write that failed
            raise OSError(
                errno.EIO, "could not be written (is the disk full?); what was there is kept", str(path)
            ) from error


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from None


def read_jsonl(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON lines: {error}") from None


def load_tensors(path, mmap=False):
    """torch.load of tensors alone: never runs code from the file. With mmap=False every byte is checked (CRC)."""
    try:
        if not mmap and zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise BadInput(f"{path}: is damaged (checksum of {damaged}); copy or make it again")
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except BadInput:
        raise
    except Exception as error:  # a cut or foreign file raises any of half a dozen types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: cannot be read as a torch file of plain tensors: {reason[:160]}") from None


def lock_folder(folder, wait=False):
    """Keeps other processes out of `folder` until the returned file is closed or this process is gone."""
    handle = open(Path(folder) / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        raise BadInput(f"{folder}: another process is writing here; wait for it, or choose another --out") from None
    return handle


def provenance(device) -> dict:
    """What a result depends on beside its flags: versions, device, commit."""
    import importlib.metadata as metadata

    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "timm", "sentence-transformers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    name = (
        torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"cpu ({os.cpu_count()} cores)"
    )
    return {
        "versions": versions,
        "device": name,
        "commit": commit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def peak_bytes(device) -> int:
    """The most memory this process has held: on the GPU, or, on a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run_script(main):
    """Runs a script's main. What the user can mend ends as one line on stderr and exit status 1."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except BadInput as error:
        sys.exit(f"{script}: {error}")
    except OSError as error:  # a full disk, a read-only folder
        sys.exit(f"{script}: {error.filename or 'output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
