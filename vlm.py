"""The stitched model: two frozen encoders, the connector between them, and the files that hold it.

    from vlm import get_vlm_from_checkpoint
    vlm = get_vlm_from_checkpoint("runs/hyma/connectors/vit_l16_mlp1_mpnet.pt")
    image = vlm.encode_image(vlm.transform(picture)[None])            # [1, 1024], unit length
    text = vlm.encode_text(["a photo of a dog", "a photo of a cat"])  # [2, 1024], unit length, same space
    scores = image @ text.T                                           # cosines

A connector maps the text encoder's space to the image encoder's: C hidden layers of 1024 with ReLU, C = 0, 1 or 2
(arXiv 2507.10015, section 3). File names, state-dict keys and the embedding files are the published ones, so
published connectors and published embeddings work as they are.

This file works alone: copy it beside a connector. It needs torch, and timm or sentence-transformers when an encoder
is built; until then `import vlm` costs what `import torch` costs.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import socket
import stat
import sys
import tempfile
import urllib.parse
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

HIDDEN_DIM = 1024  # of every hidden layer of a connector
MAX_ASPECT_RATIO = 50  # of a picture: encoders scale its shorter side to theirs, and a thin one would fill the memory
MAPPED_AT_ONCE = 8192  # texts that go through a connector at a time, to bound the memory


class BadInput(ValueError):
    """Something the user can fix. The message is one line: which file, row or flag, and what to do next."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))  # a value that is quoted in it may hold several


def reason_of(error):
    """The first line of an error that another library has raised, or its type's name: for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class MissingWeights(BadInput):
    """The weights of encoders are neither here nor to be had from the hub. The message has the commands that bring
    them; `in_short` has none."""

    def __init__(self, encoders, reason):
        names = " and ".join(encoder.name for encoder in encoders)
        self.in_short = f"the weights of {names} are missing ({reason}).{''.join(map(did_you_mean, encoders))}"
        super().__init__(f"{self.in_short} {how_to_bring(encoders)}")
        self.encoders = encoders
        self.reason = reason


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


def is_encoder_name(name):
    """Whether a short name can stand in file names and in pairs, IMAGE:TEXT."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)) and not re.search(r"_mlp\d_", name)


def find_encoder(text: str) -> Encoder:
    """A short name of the registry, `NAME=SPEC`, or a bare SPEC, which gets a short name made from it.

    SPEC is an image encoder if it is a timm model name or starts with `timm:`, `hf-hub:`, `local-dir:` (a folder with
    config.json and weights) or `random:` (a timm architecture with random weights: a control); anything else is a
    sentence-transformers name or folder. The hub's own spellings of timm's models (`timm/NAME`, `hf_hub:timm/NAME`, a
    page's address) are theirs. Raises BadInput for a name that cannot be part of a file name.
    """
    if text in ENCODERS:
        return ENCODERS[text]
    name, equals, spec = text.partition("=")
    spec = without_hub_spelling(spec if equals else text)
    if not equals:
        text = spec
        name = re.sub(r"[^\w.]+", "-", Path(text.rstrip("/")).name.rpartition(":")[2], flags=re.ASCII).strip("-._")
    if not spec or not is_encoder_name(name):
        raise BadInput(f"encoder {text!r}: give a short name of letters, digits, '.', '_' and '-', as NAME=SPEC")
    if spec in ENCODERS:  # a second name for a registered encoder
        return ENCODERS[spec]._replace(name=name)
    if spec.startswith(IMAGE_PREFIXES):
        return Encoder(name, "image", spec, None)
    import timm

    if timm.is_model(spec):
        return Encoder(name, "image", spec, None)
    if Path(spec).is_file():
        raise BadInput(
            f"encoder {text!r}: is a file; say what model it holds, and give the file to --weights (in Python: weights=)"
        )
    return Encoder(name, "text", spec, None)


def without_hub_spelling(spec):
    """A SPEC without the ways in which the hub writes it: a page's address, `hf_hub:`, `timm/` before a timm model."""
    spec = re.sub(r"^(https?://)?(huggingface\.co|hf\.co)/", "", spec)
    spec = re.sub(r"^hf_hub:", "hf-hub:", spec)
    return re.sub(r"^timm/", "timm:", spec)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or by default the GPU where there is one."""
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise BadInput(f"--device {device}: torch knows no such device; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {device}: use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {device}: torch sees no GPU here; use --device cpu")
    return device


def open_image(source):
    """Any picture as upright RGB on white. `source` is a path or a file; returns a PIL image [H, W, 3].

    The bytes tell the format and not the name: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF where this Pillow reads it, HEIC
    where pillow-heif is installed. Refuses, before decoding, what Pillow calls a decompression bomb (over 89 million
    pixels) and very thin pictures. Raises whatever Pillow raises for an unreadable file.
    """
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused just below
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of metadata
    with Image.open(source, formats=read_formats()) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(
                f"{image.width} x {image.height} pixels: more than {MAX_ASPECT_RATIO} times as long as wide"
            )
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels: a decompression bomb?")
        image.load()
        if image.mode == "I" and image.format != "PNG":  # which has 16 bits at most
            raise ValueError("pixels are 32-bit integers, whose black and white are not known")
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers, whose black and white are not known")
        return upright_on_white(image)


def upright_on_white(image):
    """An image as Pillow has opened it, as upright RGB on white."""
    from PIL import Image, ImageOps

    with contextlib.suppress(Exception):  # broken metadata of a picture whose pixels are whole
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys: PIL's own conversion clips them to white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@functools.cache
def read_formats():
    """The formats of pictures that are read, by Pillow's names."""
    from PIL import Image, PngImagePlugin

    Image.init()
    # a picture is not refused for the sake of a long text or colour profile in it, as long as these are bounded
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF") if name in Image.OPEN)


class ImageEncoder(nn.Module):
    """A frozen timm model and its own preprocessing.

    model_name: as for `find_encoder`. weights: a local file (.safetensors, .pth) or folder to use instead of the hub.
    `transform` takes a PIL image to pixels [3, H, W]; `embed_dim` is the width D.
    Raises BadInput, one line, if the weights cannot be had.
    """

    def __init__(self, model_name, device=None, weights=None):
        super().__init__()
        self.model_name = model_name
        encoder = find_encoder(model_name)
        if encoder.kind != "image":
            raise BadInput(f"{model_name} is a text encoder; an image encoder is needed here")
        self.model = create_image_model(encoder, weights)
        # channels_last: twice as fast on a CPU, for convolutions
        self.model.to(pick_device(device), memory_format=torch.channels_last).eval().requires_grad_(False)
        self.embed_dim = self.model.head_hidden_size  # not num_features: some models widen after pooling
        self.full_name = full_image_name(encoder, self.model)

        import timm

        self.config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**self.config, is_training=False)

    @property
    def device(self):
        """Where the weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def encode_image(self, image):
        """Pixels [B, 3, H, W] to unit vectors [B, D], float32 whatever the weights are."""
        dtype = next(self.parameters()).dtype if image.is_floating_point() else image.dtype
        pixels = image.to(self.device, dtype, memory_format=torch.channels_last)
        return F.normalize(self.model(pixels).float(), dim=-1)

    forward = encode_image


class Tokens(dict):
    """Tokenised sentences: what `TextEncoder.encode_text` takes in their place."""

    def to(self, device):
        """The same on a device."""
        return Tokens({name: part.to(device) if torch.is_tensor(part) else part for name, part in self.items()})


class TextEncoder(nn.Module):
    """A frozen sentence-transformers model. Arguments and errors as for `ImageEncoder`."""

    def __init__(self, model_name, device=None, weights=None):
        super().__init__()
        self.model_name = model_name
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
            with recorded_pretrained() as loaded:
                self.model = SentenceTransformer(str(weights or encoder.spec), device=str(pick_device(device)))
        except Exception as error:  # as in create_image_model
            raise cannot_load(encoder, weights, error) from None
        for missing in loaded:
            missing = [key for key in missing if "pooler" not in key]  # a pooler is not used
            check_filled(encoder, weights, missing, ())
        check_finite(encoder, weights, self.model)
        check_size(encoder, weights, self.model)
        without_connector(self.model)  # of a folder that `save_pretrained` wrote
        self.model.eval().requires_grad_(False)
        dimension = getattr(self.model, "get_embedding_dimension", None)  # the name from version 6 on
        self.embed_dim = (dimension or self.model.get_sentence_embedding_dimension)()
        self.full_name = encoder.spec
        self.config = describe_text_model(self.model)

    @property
    def device(self):
        """Where the weights are; a bag of words has none."""
        return self.model.device

    @torch.no_grad()
    def encode_text(self, sentences, batch_size=32):
        """A sentence to a unit vector [D]; a list of B sentences, or their Tokens, to unit vectors [B, D], float32."""
        if isinstance(sentences, Tokens):
            features = self.model(sentences.to(self.device))["sentence_embedding"]
        elif len(sentences) == 0 and not isinstance(sentences, str):
            return torch.zeros(0, self.embed_dim, device=self.device)
        else:
            options = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
            features = self.model.encode(self.as_text(sentences), **options)
        return F.normalize(features.to(self.device).float(), dim=-1)

    forward = encode_text

    def tokenizer(self, sentences):
        """The Tokens of a sentence or of a list of sentences, for tools that call a tokenizer themselves, as open_clip's do."""
        sentences = [sentences] if isinstance(sentences, str) else list(sentences)
        prompt = self.model.prompts.get(self.model.default_prompt_name)
        return Tokens(self.model.preprocess(self.as_text(sentences), prompt=prompt))

    def as_text(self, sentences):
        """Sentences as a multimodal model takes them for text: it would fetch one that is a picture's address, and open one
        that is a picture's path."""
        if list(getattr(self.model, "modalities", ["text"])) == ["text"]:
            return sentences
        if isinstance(sentences, str):
            return {"text": sentences}
        return [{"text": sentence} for sentence in sentences]


def build_encoder(encoder: Encoder, device=None, weights=None):
    """The ImageEncoder or TextEncoder of an Encoder; arguments and errors as theirs."""
    build = ImageEncoder if encoder.kind == "image" else TextEncoder
    return build(f"{encoder.name}={encoder.spec}", device, weights)


# (layers, width) of the registered text encoders: a folder says itself what it holds, and loads whatever that is.
TEXT_SIZES = {
    "all-MiniLM-L12-v2": (12, 384),
    "all-mpnet-base-v2": (12, 768),
    "all-roberta-large-v1": (24, 1024),
    "all-MiniLM-L6-v2": (6, 384),
}


def check_size(encoder, weights, model):
    """Raises BadInput if a sentence-transformers model has another size than the registered one it is loaded for."""
    expected = TEXT_SIZES.get(encoder.spec)
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    found = (getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None))
    if expected not in (None, found):
        raise BadInput(
            f"{weights_of(encoder, weights)} are not those of {encoder.spec}: {found[0]} layers of width {found[1]}, and it "
            f"has {expected[0]} of width {expected[1]}"
        )


def describe_text_model(model):
    """What of a sentence-transformers model its vectors depend on beside its weights."""
    modules = {}
    for module in model:
        settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        modules[type(module).__name__] = {name: value for name, value in settings.items() if "path" not in name}
    return {
        "max_seq_length": model.max_seq_length,
        "prompts": getattr(model, "prompts", {}),
        "default_prompt_name": getattr(model, "default_prompt_name", None),
        "modules": modules,
    }


def create_image_model(encoder, weights):
    """The timm model of an image Encoder without its head. weights: as for `ImageEncoder`.

    Raises BadInput unless the weights fill every tensor of the model and nothing but a head is left over: timm loads a
    model without its head from whatever fits, and the rest would stay random.
    """
    untrained = encoder.spec.startswith("random:")
    if untrained and weights is not None:
        raise BadInput(f"--weights {encoder.name}={weights}: {encoder.spec} has random weights and takes none")
    if weights is None and not untrained and not encoder.spec.startswith("local-dir:"):
        go_offline_without_hub()
    import timm

    name = re.sub(r"^(timm|random):", "", encoder.spec)
    options = {"pretrained": not untrained, "num_classes": 0}
    try:
        with torch.random.fork_rng(devices=[]), recorded_loading() as loaded:
            torch.manual_seed(0)  # a control is the same network every time
            if weights is not None:
                source = find_image_weights(encoder, Path(weights))
                if source.is_dir():
                    check_architecture(encoder, source)
                    name = f"local-dir:{source}"
                else:
                    state = read_image_weights(encoder, source, name)
                    options["pretrained_cfg_overlay"] = {"state_dict": state}
            model = timm.create_model(name, **options)
    except BadInput:
        raise
    except Exception as error:  # timm, the hub and the file readers raise a dozen unrelated types
        raise cannot_load(encoder, weights, error) from None
    for keys in loaded:
        left_over = [key for key in keys.unexpected_keys if not re.match(HEADS, key)]
        check_filled(encoder, weights, keys.missing_keys, left_over)
    check_finite(encoder, weights, model)
    model.pretrained_cfg.pop("state_dict", None)
    return model


HEADS = r"(head|fc|classifier|aux|projector)"  # what the names of a head's tensors begin with
# What the names of a whole model's tensors begin with where it was wrapped in another when it was saved.
WRAPPERS = ("module.", "model.", "backbone.", "encoder.", "student.", "teacher.", "_orig_mod.")


def read_image_weights(encoder, path, name):
    """The tensors of a weights file under timm's names. Prefixes that are not the model's own are taken off."""
    import timm

    source = f"--weights {encoder.name}={path}"
    try:
        state = timm.models.load_state_dict(str(path))
    except (AttributeError, IndexError):  # of a list, of one tensor, of names that are none, of what is no torch file
        raise BadInput(f"{source}: holds no tensors under names, as a file of weights does") from None
    if not any(map(torch.is_tensor, state.values())):
        raise BadInput(f"{source}: holds no tensors")
    for key, tensor in state.items():
        if key.endswith(("weight", "bias")) and not is_plain_tensor(tensor):
            raise BadInput(f"{source}: {key} is no plain tensor of floating-point numbers")
    if not unwrap(state):
        return state
    own = timm.create_model(name, num_classes=0).state_dict().keys()
    while not own & state.keys() and (inner := unwrap(state)):
        state = inner
    return state


def unwrap(state):
    """The tensors below the first of WRAPPERS that there is, {} if there is none. A head beside it is not asked for."""
    for prefix in WRAPPERS:
        inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        if inner:
            return inner
    return {}


@contextlib.contextmanager
def recorded_loading():
    """A list of what `load_state_dict` found missing and left over, of each module that is loaded within."""
    load = nn.Module.load_state_dict
    found = []

    def load_and_record(module, *arguments, **options):
        keys = load(module, *arguments, **options)
        found.append(keys)
        return keys

    nn.Module.load_state_dict = load_and_record
    logging.disable(logging.WARNING)  # timm's own list of every key
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def recorded_pretrained():
    """A list of the names of tensors that weights did not hold, of each transformers model that is loaded within."""
    from transformers import PreTrainedModel

    load = PreTrainedModel.__dict__["from_pretrained"]
    found = []

    def load_and_record(model_class, *arguments, **options):
        model, info = load.__func__(model_class, *arguments, **options | {"output_loading_info": True})
        mismatched = [str(mismatch[0]) for mismatch in info["mismatched_keys"]]
        found.append([*info["missing_keys"], *mismatched])
        return (model, info) if options.get("output_loading_info") else model

    PreTrainedModel.from_pretrained = classmethod(load_and_record)
    logging.disable(logging.WARNING)  # transformers' own table of every key
    try:
        yield found
    finally:
        PreTrainedModel.from_pretrained = load
        logging.disable(logging.NOTSET)


def weights_of(encoder, weights):
    """What a message calls the weights of an Encoder."""
    return f"the weights of {encoder.name}" + (f" in {weights}" if weights is not None else "")


def check_filled(encoder, weights, missing, left_over):
    """Raises BadInput if weights left tensors of a model unfilled, or hold tensors that it has not."""
    source = weights_of(encoder, weights)
    for keys, problem in ((missing, "lack"), (left_over, "have, and the model has not,")):
        if keys:
            names = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise BadInput(f"{source} {problem} {len(keys)} tensors ({names}): they are not those of {encoder.spec}")


def check_finite(encoder, weights, model):
    """Raises BadInput if a model has weights that are NaN or infinite: so would its vectors be."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            raise BadInput(f"{weights_of(encoder, weights)} are not sound: {key} holds numbers that are not finite")


def check_architecture(encoder, folder):
    """Raises BadInput if the config.json of a folder of weights is not that of the timm model that is asked for."""
    import timm

    config = read_json(folder / "config.json")
    found = config.get("architecture")
    if not isinstance(found, str) or not timm.is_model(found):
        raise BadInput(f"--weights {encoder.name}={folder}: its config.json names no architecture that timm knows")
    asked, _, tag = re.sub(r"^timm:|^hf-hub:timm/", "", encoder.spec).partition(".")
    details = config.get("pretrained_cfg")
    found_tag = details.get("tag") if isinstance(details, dict) else None
    if timm.is_model(asked) and (found.partition(".")[0] != asked or tag and found_tag and found_tag != tag):
        found = f"{found}.{found_tag}" if found_tag else found
        raise BadInput(
            f"--weights {encoder.name}={folder}: its config.json says {found}, and {encoder.spec} is asked for"
        )


def find_image_weights(encoder, weights):
    """The file of weights, or the folder if it says itself what model it holds (config.json)."""
    source = f"--weights {encoder.name}={weights}"
    if not weights.exists():
        raise BadInput(f"{source}: no such file or folder")
    if not weights.is_dir():
        check_regular(weights)
        return weights
    if (weights / "config.json").is_file():
        return weights
    files = sorted(weights.glob("*.safetensors")) or sorted(weights.glob("*.pth"))
    if not files:
        raise BadInput(f"{source}: holds no .safetensors or .pth file")
    if len(files) > 1:
        raise BadInput(f"{source}: holds {len(files)} files of weights, {files[0].name} and others; name one")
    return files[0]


def full_image_name(encoder, model):
    """The model's name with its tag: a bare name has become a tagged one when it was built."""
    if encoder.spec.startswith("random:"):
        return encoder.spec
    found = model.pretrained_cfg
    architecture = found.get("architecture", re.sub(r"^timm:", "", encoder.spec))
    return f"{architecture}.{found['tag']}" if found.get("tag") else architecture


def go_offline_without_hub():
    """Spares a machine without a network the hub client's minutes of retries: what it has cached is still found."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
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
    digests = []
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digests.append(hashlib.sha256(data.numpy()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def cannot_load(encoder: Encoder, weights, error: Exception) -> BadInput:
    """The error of a model whose weights are not to be had, or do not fit. error: what timm or the hub's client raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:160].rstrip(".")
    if weights is not None:
        return BadInput(f"--weights {encoder.name}={weights}: cannot be loaded into {encoder.spec}: {reason}")
    if hub_name(encoder) is None:
        return BadInput(f"cannot load {encoder.name} from {encoder.spec.removeprefix('local-dir:')}: {reason}")
    return MissingWeights([encoder], reason)


def how_to_bring(encoders):
    """The commands that bring the weights of encoders, and what takes them then."""
    folders = {encoder.name: f"weights/{encoder.name}" for encoder in encoders}
    commands, flags = [], []
    for encoder in encoders:
        commands.append(f"hf download {hub_name(encoder)} --local-dir {folders[encoder.name]}")
        flags.append(f"{encoder.name}={folders[encoder.name]}")
    bring = f"Where there is a network: {' && '.join(commands)}"
    return f"{bring}; then add --weights {' '.join(flags)} (in Python: weights={folders})"


def build_all(builders):
    """[what each function of `builders` makes]. Raises MissingWeights that names all whose weights are missing, at once."""
    built, missing = [], []
    for build in builders:
        try:
            built.append(build())
        except MissingWeights as error:
            missing.append(error)
    if missing:
        raise join_missing(missing)
    return built


def join_missing(errors):
    """One MissingWeights for several."""
    encoders = []
    for error in errors:
        encoders += error.encoders
    return MissingWeights(encoders, errors[0].reason)


def hub_name(encoder: Encoder):
    """OWNER/REPO of an encoder's weights on the hub, None of one that is a local folder or has no weights."""
    if is_local(encoder.spec) or encoder.spec.startswith("random:"):
        return None
    source = re.sub(r"^(timm|hf-hub):", "", encoder.spec)
    if "/" in source:
        return source
    return ("timm/" if encoder.kind == "image" else "sentence-transformers/") + source


def did_you_mean(encoder):
    """A question that names a known encoder or timm model which is spelt much like this one, or nothing."""
    import difflib

    import timm

    asked = re.sub(r"^timm:", "", encoder.spec)
    known = {name.lower(): name for name in [*timm.list_models(), *timm.list_pretrained(), *ENCODERS]}
    if "/" in asked or asked in known.values():
        return ""
    for name in (asked, encoder.name):
        for guess in difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75):
            return "" if known[guess] == encoder.name else f" Did you mean {known[guess]}?"
    return ""


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
    """The file name of a pair's connector, as published."""
    return f"{image}_mlp{hidden_layers}_{text}.pt"


def connector_layers(connector):
    """Its Linear layers, in order."""
    return [layer for layer in connector.modules() if isinstance(layer, nn.Linear)]


def connector_keys(hidden_layers):
    """The state-dict key of every layer, up to its last part: `` for one layer, `0.`, `2.`, `4.` for several."""
    if hidden_layers == 0:
        return [""]
    return [f"{2 * layer}." for layer in range(hidden_layers + 1)]


def read_connector(path, image_dim=None, text_dim=None):
    """Reads `{image}_mlp{C}_{text}.pt`, or .safetensors, strictly. Returns (image name, C, text name, state dict on the CPU).

    Raises BadInput naming the file and what was expected, if the name does not parse, the file is damaged, a key is
    missing or a shape is wrong. The widths of registered encoders are known; others are given, or taken as found.
    """
    path = Path(path)
    parsed = re.fullmatch(r"(.+)_mlp([012])_(.+)\.(pt|safetensors)", path.name)
    if not parsed:
        raise BadInput(f"{path}: expected a name like vit_l16_mlp1_mpnet.pt: <image>_mlp<0|1|2>_<text>.pt")
    image, hidden_layers, text = parsed[1], int(parsed[2]), parsed[3]
    state = load_safetensors(path) if parsed[4] == "safetensors" else load_tensors(path)

    layers = connector_keys(hidden_layers)
    keys = []
    for layer in layers:
        keys += [layer + "weight", layer + "bias"]
    if not isinstance(state, dict) or set(state) != set(keys):
        found = " ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise BadInput(f"{path}: expected the keys {' '.join(keys)}; found {found[:160] or 'none'}")
    for key, tensor in state.items():
        if not is_plain_tensor(tensor):
            raise BadInput(f"{path}: expected tensors of floating-point numbers under the keys {' '.join(keys)}")
        if not tensor.float().isfinite().all():  # of 8 bits, torch cannot tell
            raise BadInput(f"{path}: {key} holds numbers that are not finite: the connector cannot be used")

    first, last = state[layers[0] + "weight"], state[layers[-1] + "weight"]
    text_dim = text_dim or named_dim(path, "text", text, first.shape[1] if first.dim() == 2 else 0)
    image_dim = image_dim or named_dim(path, "image", image, last.shape[0] if last.dim() == 2 else 0)
    dims = [text_dim] + [HIDDEN_DIM] * hidden_layers + [image_dim]
    for layer, wide, narrow in zip(layers, dims, dims[1:]):
        for key, shape in ((layer + "weight", (narrow, wide)), (layer + "bias", (narrow,))):
            if tuple(state[key].shape) != shape:
                raise BadInput(f"{path}: {key} has shape {tuple(state[key].shape)}; expected {shape}")
    return image, hidden_layers, text, state


def is_plain_tensor(value):
    """Whether it is a dense tensor of floating-point numbers that are there: not sparse, quantised or without data."""
    if not torch.is_tensor(value) or value.is_meta or value.is_quantized:
        return False
    if value.layout != torch.strided or not value.is_floating_point():
        return False
    # A view can have any number of elements over a file of a few bytes.
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def named_dim(path, kind, name, found):
    """The width of the encoder that a connector's file is named after: the registry's, or that which was found where
    the name is of no registered encoder, or where the card beside the file means another one by it."""
    known = registered_dim(name)
    if known in (None, found):
        return found
    spec = read_card(path).get(f"{kind}_encoder")
    return found if isinstance(spec, str) and spec != ENCODERS[name].spec else known


def registered_dim(name):
    """The width of a registered encoder, or None."""
    return ENCODERS[name].dim if name in ENCODERS else None


def load_connector(path, image_dim=None, text_dim=None):
    """The connector of a file, [B, D_t] -> [B, D_i], frozen, float32, on the CPU. Errors as for `read_connector`."""
    _, hidden_layers, _, state = read_connector(path, image_dim, text_dim)
    keys = connector_keys(hidden_layers)
    text_dim, image_dim = state[keys[0] + "weight"].shape[1], state[keys[-1] + "weight"].shape[0]
    connector = init_modality_connector(text_dim, [HIDDEN_DIM] * hidden_layers, image_dim)
    connector.load_state_dict(state)
    return connector.float().eval().requires_grad_(False)


@torch.no_grad()
def map_text(connector, features):
    """Unit vectors [N, D_t] of texts through a connector: unit vectors [N, D_i] in the image encoder's space.

    Raises BadInput if the connector's outputs are not finite: no comparison holds for a NaN, so nothing would seem
    nearer to a picture than the right text.
    """
    parts = []
    for part in features.split(MAPPED_AT_ONCE):
        parts.append(F.normalize(connector(part).float(), dim=1))  # [n, D_i]; autocast gives fewer bits
    mapped = torch.cat(parts)
    if not mapped.isfinite().all():
        raise BadInput("the connector gives vectors that are not finite: it cannot be used")
    return mapped


class CustomVLM(nn.Module):
    """An image encoder and a text encoder whose vectors live in the image encoder's space.

    connector_args: (text width, [hidden widths], image width), or None for encoders that share a space already.
    weights: {encoder name: local file or folder}, instead of the hub.

    Tools written for open_clip's models hold it in the same way: `vlm, vlm.preprocess, vlm.tokenizer`.
    """

    def __init__(self, image_encoder_name, text_encoder_name, connector_args=None, device=None, weights=None):
        super().__init__()
        image_names = [find_encoder(image_encoder_name).name, image_encoder_name]
        text_names = [find_encoder(text_encoder_name).name, text_encoder_name]
        image_weights, text_weights = weights_given(weights, image_names, text_names)
        self.image_encoder, self.text_encoder = build_all(
            [
                lambda: ImageEncoder(image_encoder_name, device, image_weights),
                lambda: TextEncoder(text_encoder_name, device, text_weights),
            ]
        )
        self.connector = None
        if connector_args is not None:
            self.connector = init_modality_connector(*connector_args).to(self.device).eval().requires_grad_(False)
        # of the connector's file, and what the card beside it records
        self.connector_name, self.connector_sha256, self.card = None, None, {}

    @property
    def device(self):
        """Where the weights are."""
        return self.image_encoder.device

    @property
    def transform(self):
        """PIL image -> pixels [3, H, W]: what `encode_image` expects, stacked to [B, 3, H, W]."""
        return self.image_encoder.transform

    preprocess = transform

    @property
    def tokenizer(self):
        """Sentences -> Tokens, which `encode_text` takes as it takes sentences."""
        return self.text_encoder.tokenizer

    def load_connector_checkpoint(self, path):
        """Loads a connector file strictly, building the connector if there is none yet."""
        found = load_connector(path, self.image_encoder.embed_dim, self.text_encoder.embed_dim)
        self.connector_name, self.card = Path(path).stem, read_card(path)
        self.connector_sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if self.connector is None:
            self.connector = found.to(self.device)
            return
        try:
            self.connector.load_state_dict(found.state_dict())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise BadInput(f"{path}: does not fit this model's connector: {reason}") from None

    def encode_image(self, pixels):
        """Pixels [B, 3, H, W] to unit vectors [B, D]."""
        return self.image_encoder.encode_image(pixels)

    @torch.no_grad()
    def encode_text(self, sentences):
        """B sentences, or their Tokens, to unit vectors [B, D] in the image encoder's space (one sentence: [D])."""
        features = self.text_encoder.encode_text(sentences)
        if self.connector is None:
            return features
        features = features.to(next(self.connector.parameters()).dtype)
        mapped = map_text(self.connector, features.view(-1, features.shape[-1]))
        return mapped.view(*features.shape[:-1], mapped.shape[-1])

    def forward(self, pixels, sentences):
        """(vectors of pixels [B, D], vectors of sentences [B, D])."""
        return self.encode_image(pixels), self.encode_text(sentences)

    def save_pretrained(self, folder, licence="other", report=None):
        """Writes a new folder that shares the pair: encoders, connector, and README.md, its model card.

        report: a folder of `evaluate.py`, whose scores of this connector the card then has.
        sentence-transformers loads the folder as a text encoder into the space of the pictures, and the pair through its
        Router; README.md has the lines. `get_vlm_from_checkpoint` takes the folder too. This alone needs Hyma's other files.
        """
        try:
            from hyma.sharing import save_pair
        except ImportError as error:
            raise BadInput(f"save_pretrained: needs Hyma's folder hyma/ beside vlm.py ({error})") from None
        save_pair(self, Path(folder), licence, report)

    def push_to_hub(self, repo_id, private=False, licence="other", report=None):
        """Uploads what `save_pretrained` writes to huggingface.co/REPO_ID, which is made if it is not there."""
        from huggingface_hub import HfApi

        hub = HfApi()
        hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "pair", licence, report)
            return hub.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "pair")


def weights_given(weights, image_names, text_names):
    """[file or folder of the image encoder, that of the text encoder] by `weights=`, None for the hub's.

    image_names, text_names: the names that each may be given under. Raises BadInput for a name of neither that is not
    registered: with a typing error, the weights on the hub would be taken instead of those that are meant.
    """
    expected = "expected {encoder name: file or folder}, such as {'efflite0': 'efflite0.safetensors'}"
    weights = {} if weights is None else weights
    if not isinstance(weights, dict):
        raise BadInput(f"weights: {expected}")
    for name, path in weights.items():
        if not isinstance(path, str | os.PathLike | None):
            raise BadInput(f"weights: {name!r} is given a {type(path).__name__}; {expected}")
        if name not in {*image_names, *text_names, *ENCODERS}:
            raise BadInput(
                f"weights: {name!r} is none of the encoders here, which are {image_names[0]} and {text_names[0]}"
            )
    found = []
    for names in (image_names, text_names):
        found.append(next((weights[name] for name in names if name in weights), None))
    return found


def get_vlm_from_checkpoint(path, device=None, image_encoder=None, text_encoder=None, weights=None):
    """The stitched model of a connector file (.pt or .safetensors), with nothing else present, or of a folder that
    `save_pretrained` wrote. `hf-hub:OWNER/REPO/FILE` is a connector of the hub, `hf-hub:OWNER/REPO` such a folder there.

    The encoders are those of the file's name; encoders outside the registry are named by the `.json` card beside
    the file. `image_encoder` and `text_encoder` replace them, with a local folder for example; weights, {encoder name:
    file or folder}, takes what `embed.py --weights` takes. Raises BadInput, one line, if the weights are not those that
    the connector was trained on, as far as the card says which those were.
    """
    if str(path).startswith("hf-hub:"):
        path = fetch_from_hub(str(path))
    if Path(path).is_dir():
        folder, path = Path(path), find_shared_connector(path)
        image, _, text, _ = read_connector(path)
        image_encoder = image_encoder or f"{image}=local-dir:{folder / IMAGE_FOLDER}"
        text_encoder = text_encoder or f"{text}={folder}"
    image, _, text, _ = read_connector(path)
    image_encoder = image_encoder or encoder_of_connector(path, "image", image)
    text_encoder = text_encoder or encoder_of_connector(path, "text", text)
    image_names = [image, find_encoder(image_encoder).name]
    text_names = [text, find_encoder(text_encoder).name]
    image_weights, text_weights = weights_given(weights, image_names, text_names)
    given = {image_encoder: image_weights, text_encoder: text_weights}
    vlm = CustomVLM(image_encoder, text_encoder, device=device, weights=given)
    check_trained_on(path, image, vlm.image_encoder)
    check_trained_on(path, text, vlm.text_encoder)
    vlm.load_connector_checkpoint(path)
    return vlm


def encoder_of_connector(path, kind, name):
    """What `find_encoder` takes for an encoder of a connector file's name: named by the file's card, or registered."""
    spec = read_card(path).get(f"{kind}_encoder")
    if name in ENCODERS and (not isinstance(spec, str) or spec == ENCODERS[name].spec or is_local(spec)):
        return name
    if spec is not None and not isinstance(spec, str):
        raise BadInput(f"{path}: its card has no name for the {kind} encoder; pass {kind}_encoder={name}=SPEC")
    if spec is not None and is_local(spec):
        raise BadInput(
            f"{path}: its card names a local {kind} encoder, {spec}; if you trust it, pass {kind}_encoder={name}={spec}"
        )
    if spec is None:
        known = ", ".join(encoder.name for encoder in ENCODERS.values() if encoder.kind == kind)
        raise BadInput(
            f"{path}: unknown {kind} encoder {name!r}: no card beside the file names it, and the known ones are {known}"
        )
    return f"{name}={spec}"


def is_local(spec):
    """Whether an encoder's SPEC is a folder of this machine: loading one may run what is in it, so that a card, which a
    stranger may have written, is no authority for it."""
    path = re.sub(r"^((timm|hf-hub|hf_hub|random):)+", "", spec)
    return path.startswith(("local-dir:", "/", ".", "~")) or Path(path).exists()


def read_card(path):
    """The `.json` card beside a connector, {} where there is none."""
    card = Path(path).with_suffix(".json")
    return read_json(card) if card.is_file() else {}


def trained_on(path, name):
    """(sha256 of the weights, settings) of the encoder whose vectors a connector was trained on, by its card; None
    where that says nothing."""
    digests, settings = [read_card(path).get(part) for part in ("weights_sha256", "settings")]
    digest = digests.get(name) if isinstance(digests, dict) else None
    return digest if isinstance(digest, str) else None, settings.get(name) if isinstance(settings, dict) else None


def check_trained_on(path, name, encoder):
    """Raises BadInput if the card of a connector says that it was trained on other weights or settings than `encoder` has."""
    digest, settings = trained_on(path, name)
    if digest and weights_digest(encoder.model) != digest:
        raise BadInput(
            f"{path}: was trained on other weights of {name} than those loaded here (sha256 {digest[:12]}..., see its card)"
        )
    difference = first_difference(settings, json.loads(json.dumps(encoder.config)))  # as the card has them
    if difference:
        setting, then, now = difference
        raise BadInput(
            f"{path}: was trained on vectors that {name} made with {setting} {then} (see its card), and it has {setting} "
            f"{now} here"
        )


def first_difference(settings, others):
    """(name, value, other value) of the first setting that both have and that differs, or None.

    A setting that one of them lacks is no difference: later versions of the libraries record more of them.
    """
    if not isinstance(settings, dict) or not isinstance(others, dict):
        return None
    for name, value in settings.items():
        if name not in others:
            continue
        other = others[name]
        if isinstance(value, dict) and isinstance(other, dict):
            inner = first_difference(value, other)
            if inner:
                return (f"{name} {inner[0]}", *inner[1:])
        elif value != other:
            return name, value, other
    return None


# ------------------------------------------------------------------------------------------------ a shared pair

# What `save_pretrained` writes is laid out in hyma/sharing.py.
IMAGE_FOLDER = "image"


def without_connector(model):
    """Takes the modules that `hyma.sharing.save_text_modules` has added off a sentence-transformers model."""
    for name in [name for name in model._modules if name.startswith("connector")]:
        del model._modules[name]


def find_shared_connector(folder):
    """The connector of a folder that `save_pretrained` wrote."""
    found = sorted(Path(folder).glob("*_mlp?_*.safetensors"))
    if len(found) != 1 or not (Path(folder) / IMAGE_FOLDER).is_dir():
        message = "name a connector file, or a folder that save_pretrained wrote"
        raise BadInput(f"{folder}: holds {len(found)} connectors and is not such a folder; {message}")
    return found[0]


def fetch_from_hub(address):
    """The local copy of `hf-hub:OWNER/REPO/FILE`, its card beside it, or of the folder `hf-hub:OWNER/REPO`."""
    import huggingface_hub

    owner, _, rest = address.removeprefix("hf-hub:").partition("/")
    repo, _, file = rest.partition("/")
    if not owner or not repo:
        raise BadInput(f"{address}: expected hf-hub:OWNER/REPO/FILE")
    go_offline_without_hub()
    try:
        if not file:
            return huggingface_hub.snapshot_download(f"{owner}/{repo}")
        path = huggingface_hub.hf_hub_download(f"{owner}/{repo}", file)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise BadInput(f"{address}: cannot be fetched from the hub: {reason_of(error)}") from None
    with contextlib.suppress(Exception):  # published connectors have no card
        huggingface_hub.hf_hub_download(f"{owner}/{repo}", str(Path(file).with_suffix(".json")))
    return path


# ----------------------------------------------------------------------------------------- the embedding folder


class EmbeddingDataset(torch.utils.data.Dataset):
    """One embedding file, `[rows, embed_dim]`, read lazily; items are float32 vectors [embed_dim]."""

    def __init__(self, filepath):
        self.embeddings = load_tensors(filepath, mmap=True)
        if not is_plain_tensor(self.embeddings) or self.embeddings.dim() != 2:
            raise BadInput(f"{filepath}: expected one floating-point tensor [rows, dim]")
        self.embed_dim = self.embeddings.shape[1]

    def __len__(self):
        return len(self.embeddings)

    def __getitem__(self, index):
        return self.embeddings[index].float()


# -------------------------------------------------------------------------------------------------- safe readers


def check_regular(path):
    """Raises BadInput for what is no regular file: a pipe would be waited for without end."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path}: is no regular file")


def read_json(path):
    """The object of a JSON file. Raises BadInput, one line, if it cannot be read or is none."""
    try:
        check_regular(path)
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_tensors(path, mmap=False):
    """torch.load of tensors alone: never runs code from the file. With mmap=False every byte is checked (CRC)."""
    try:
        check_regular(path)
        if zipfile.is_zipfile(path):
            check_archive(path, checksums=not mmap)
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except BadInput:
        raise
    except Exception as error:  # a cut or foreign file raises any of half a dozen types
        raise BadInput(f"{path}: cannot be read as a torch file of plain tensors: {reason_of(error)}") from None


def load_safetensors(path):
    """The tensors of a .safetensors file. Raises BadInput, one line, if it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_regular(path)
        return load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be read as safetensors: {str(error)[:160]}") from None


def check_archive(path, checksums):
    """Raises BadInput for a torch file that is damaged, or whose members are compressed: torch never writes such ones, and
    a small one can take any amount of memory."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise BadInput(f"{path}: is compressed, as no torch file is; it is not opened")
        damaged = archive.testzip() if checksums else None
    if damaged:
        raise BadInput(f"{path}: is damaged (checksum of {damaged}); copy or make it again")
