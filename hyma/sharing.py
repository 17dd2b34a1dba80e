"""A pair to share: a CustomVLM as a folder that sentence-transformers and `vlm.get_vlm_from_checkpoint` load."""

import inspect
import json
import re
from collections import OrderedDict

import torch
import torch.nn as nn

from hyma.records import Records
from vlm import IMAGE_FOLDER, BadInput, connector_layers, upright_on_white, weights_digest

# FOLDER/modules.json          the text encoder and the connector, [text] -> the image encoder's space: plain
#                              sentence-transformers reads it, and runs no code of ours
#        0_Transformer/ ...    its modules; the connector's layers are Dense modules, named connector0, connector1, ...
#        image/                the image encoder, as timm writes it
#        router_config.json    both of them as the routes "text" and "image" of sentence-transformers' Router
#        timm_image.py         the Router's module for pictures
#        IMAGE_mlpC_TEXT.safetensors, .json      the connector and its card, as in a run folder
#        README.md             the model card

# Pictures become what vlm.open_image makes of them, by the same lines: vectors and connector were trained on these.
IMAGE_MODULE = f'''"""The image encoder of a stitched pair as a module of sentence-transformers: a timm model and its own preprocessing."""

import contextlib

import timm
import torch
from sentence_transformers.base.modules import InputModule


{inspect.getsource(upright_on_white)}
'''
IMAGE_MODULE += '''
class TimmImage(InputModule):
    modalities = ["image"]

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    def preprocess(self, inputs, prompt=None, **options):
        return {"pixels": torch.stack([self.transform(upright_on_white(image)) for image in inputs])}

    def forward(self, features, **options):
        vectors = self.model(features["pixels"]).float()
        return features | {"sentence_embedding": torch.nn.functional.normalize(vectors, dim=-1)}

    def get_embedding_dimension(self):
        return self.model.head_hidden_size

    def save(self, output_path, **options):
        timm.models.save_for_hf(self.model, output_path, safe_serialization=True)

    @classmethod
    def load(cls, model_name_or_path, subfolder="", token=None, cache_folder=None, revision=None, local_files_only=False, **options):
        hub = {"token": token, "cache_folder": cache_folder, "revision": revision, "local_files_only": local_files_only}
        folder = cls.load_dir_path(model_name_or_path, subfolder=subfolder, **hub)
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        return cls(model.eval().requires_grad_(False))
'''


def save_pair(vlm, folder, licence, report=None):
    """Writes a CustomVLM into a new folder, as above. README.md comes last: a folder without it is not whole.

    report: a folder of evaluate.py, None for no scores of its in README.md.
    """
    from safetensors.torch import save_file

    if vlm.connector is None or not vlm.connector_name:
        raise BadInput("save_pretrained: this model has no connector from a file; load one: load_connector_checkpoint")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"{folder}: is there already and not empty; choose a new folder")
    scores = reported_scores(vlm, report) if report else []
    folder.mkdir(parents=True, exist_ok=True)
    save_text_modules(vlm, folder)
    save_image_encoder(vlm, folder)
    (folder / "timm_image.py").write_text(IMAGE_MODULE, encoding="utf-8")
    write_router(folder)
    state = {name: tensor.float().cpu().contiguous() for name, tensor in vlm.connector.state_dict().items()}
    save_file(state, folder / f"{vlm.connector_name}.safetensors")
    image, text = re.fullmatch(r"(.+)_mlp[012]_(.+)", vlm.connector_name).groups()
    models = {image: vlm.image_encoder.model, text: vlm.text_encoder.model}
    card = vlm.card | {"weights_sha256": {name: weights_digest(model) for name, model in models.items()}}
    (folder / f"{vlm.connector_name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(vlm, card, image, text, licence, scores), encoding="utf-8")


def save_text_modules(vlm, folder):
    """Writes the text encoder and, after it, the connector, as one sentence-transformers model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize

    model = vlm.text_encoder.model
    modules = dict(model.named_children())
    if not isinstance(list(modules.values())[-1], Normalize):
        modules["connector-in"] = Normalize()  # a connector is made for unit vectors
    layers = connector_layers(vlm.connector)
    for number, layer in enumerate(layers):
        activation = nn.Identity() if layer is layers[-1] else nn.ReLU()
        dense = Dense(layer.in_features, layer.out_features, activation_function=activation)
        dense.linear.load_state_dict(layer.state_dict())
        modules[f"connector{number}"] = dense.to(vlm.device)
    modules["connector-out"] = Normalize()
    first = next(iter(modules.values()))
    first.save_in_root = False  # a folder of its own, which the Router can name
    try:
        prompts = {"prompts": model.prompts, "default_prompt_name": model.default_prompt_name}
        whole = SentenceTransformer(modules=OrderedDict(modules), device=str(vlm.device), **prompts)
        whole.save_pretrained(str(folder), create_model_card=False)
    finally:
        del first.save_in_root


def save_image_encoder(vlm, folder):
    """Writes the image encoder as timm does."""
    import timm

    model = vlm.image_encoder.model.to(memory_format=torch.contiguous_format)  # safetensors writes no other
    timm.models.save_for_hf(model, folder / IMAGE_FOLDER, safe_serialization=True)
    model.to(memory_format=torch.channels_last)


def write_router(folder):
    """Writes router_config.json: the modules of modules.json as the route "text", and the pictures'."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    types = {module["path"]: module["type"] for module in modules}
    router = {
        "types": types | {IMAGE_FOLDER: "timm_image.TimmImage"},
        "structure": {"text": list(types), "image": [IMAGE_FOLDER]},
        "parameters": {"default_route": "text", "allow_empty_key": True, "route_mappings": {}},
    }
    (folder / "router_config.json").write_text(json.dumps(router, indent=2) + "\n", encoding="utf-8")


def reported_scores(vlm, report):
    """The records that a report has of this very connector. Raises BadInput if there are none, or the report is damaged."""
    found = []
    for record in Records(report).results["results"]:
        if record.get("connector_sha256") == vlm.connector_sha256:
            found.append(record)
    if not found:
        raise BadInput(f"{report}: has no scores of this {vlm.connector_name}; run evaluate.py on its run")
    return found


def describe_scores(scores, card):
    """What a connector scores, as the model card has it: Markdown. scores: a report's records; card: the connector's own."""
    lines = []
    if scores:
        lines += ["By `evaluate.py`, in the names of CLIP_benchmark:", ""]
        lines += ["| data | task | metric | score |", "|---|---|---|---|"]
    for record in scores:
        for name, value in record["metrics"].items():
            shown = f"{value:g}" if name.endswith("rank") else f"{100 * value:.1f} %"
            lines.append(f"| {record['dataset']} | {record['task']} | {name} | {shown} |")
    for record in scores:
        lines += ["", f"{record['dataset']}, {record['task']}: {record['protocol']}."]
    if scores:
        lines.append("")

    trained_on = card.get("val_candidates", 0) - card.get("val_rows", 0)
    candidates = f" among {card['val_candidates']} candidates, {trained_on} of them trained on" if trained_on else ""
    recalls = {key: card.get(f"val_recall{key}") for key in (1, 5, 10)}
    if any(isinstance(value, float) for value in recalls.values()):
        lines += [f"| validation rows, which chose it{candidates}, mean of both directions | % |", "|---|---|"]
    for key, value in recalls.items():
        if isinstance(value, float):
            lines.append(f"| R@{key} | {100 * value:.1f} |")
    return "\n".join(lines) or "Not recorded."


def model_card(vlm, card, image, text, licence, scores):
    """The README.md of a pair to share: how to use it, what it scores, what it was made of."""
    image_licence = vlm.image_encoder.model.pretrained_cfg.get("license") or "see its page"
    text_licence = getattr(getattr(vlm.text_encoder.model, "model_card_data", None), "license", None) or "see its page"
    digests = card["weights_sha256"]
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
license: {licence}
tags: [sentence-transformers, timm, hyma, image-text-retrieval, zero-shot-image-classification]
---

# {image} and {text}, stitched

The image encoder {image} and the text encoder {text}, both frozen, and a connector that maps texts into the space of
the pictures: pictures are found by words. Width {vlm.image_encoder.embed_dim}.

## Use it

Texts into the space of the pictures, with plain sentence-transformers:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER or OWNER/REPO")
vectors = model.encode(["a dog", "a red car"])
```

Pictures too, through its Router. `timm_image.py` in this repository is run for it; read it first, it is short:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

pair = SentenceTransformer(modules=[Router.load("FOLDER or OWNER/REPO", trust_remote_code=True)])
scores = pair.similarity(pair.encode(["a dog"]), pair.encode([Image.open("dog.jpg")]))
```

Or with `vlm.py` of [Hyma](https://arxiv.org/abs/2507.10015), in the way of open_clip:
`vlm = get_vlm_from_checkpoint("FOLDER")`, `vlm.preprocess`, `vlm.tokenizer`, `vlm.encode_image`, `vlm.encode_text`.

## What it scores

{describe_scores(scores, card)}

## What it is made of

- Data: {card.get("dataset", "not recorded")}. {card.get("maps", "")}
- Image encoder: {vlm.image_encoder.full_name}; licence: {image_licence}; sha256 of its weights: {digests[image]}
- Text encoder: {card.get("text_encoder", vlm.text_encoder.full_name)}; licence: {text_licence}; sha256 of its weights: {digests[text]}
- Connector: {vlm.connector_name}, {len(connector_layers(vlm.connector))} layers; licence: {licence}. All that its card records: {vlm.connector_name}.json
"""
