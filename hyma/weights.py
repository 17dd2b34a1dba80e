"""The encoders that made an embedding folder, opened again: `--weights`, and all that are missing named in one line."""

import functools
import json

import vlm
from hyma.prompts import open_text_encoder
from hyma.tasks import recorded_encoder
from vlm import BadInput


def named_paths(flag, items, value):
    """{name: path} of a flag's NAME=PATH items. value: the word for the path in the flag's help."""
    paths = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise BadInput(f"{flag} {name}: expected NAME={value}")
        if name in paths:
            raise BadInput(f"{flag}: a name is given twice")
        paths[name] = path
    return paths


def open_encoders(data, names, weights, device):
    """{name: ImageEncoder or TextEncoder} of encoders of an embedding folder, with the weights that made it.

    weights: {name: file or folder}, instead of the hub. Raises BadInput; if weights are missing, one line that names all of
    them and the commands that bring them.
    """
    builders = []
    for name in names:
        builders.append(functools.partial(open_encoder, data, name, weights.get(name), device))
    return dict(zip(names, vlm.build_all(builders)))


def open_encoder(data, name, weights, device):
    """The encoder. Raises BadInput if its width, weights or settings are not those of the embeddings."""
    if data.encoders[name].kind == "text":
        return open_text_encoder(recorded_encoder(name, data, None), weights, device)
    encoder = data.encoders[name]
    model = vlm.ImageEncoder(f"{name}={encoder.spec}", device, weights)
    if encoder.dim not in (None, model.embed_dim):
        raise BadInput(f"{name}: gives vectors of width {model.embed_dim}; its embeddings have {encoder.dim}")
    digest = data.weights_sha256(name)
    if digest and vlm.weights_digest(model.model) != digest:
        source = f"--weights {name}={weights}" if weights else f"{name}: the weights on the hub"
        raise BadInput(f"{source}: not the weights that the embeddings in {data.folder} were made with")
    settings = json.loads(json.dumps(model.config))  # as the manifest has them
    difference = vlm.first_difference(data.record(name).get("transform"), settings)
    if difference:
        setting, then, now = difference
        raise BadInput(f"{name}: its embeddings were made with {setting} {then}, and it has {setting} {now} here")
    return model
