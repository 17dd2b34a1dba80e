"""The encoders that made an embedding folder, opened again: they must be the very same ones. `--weights`, and all that are
missing named in one line."""

import functools
import json
from typing import NamedTuple

import vlm
from vlm import BadInput, Encoder


class OtherWeights(BadInput):
    """The weights on the hub are not those that the embeddings were made with; the message says what to pass."""


class RecordedEncoder(NamedTuple):
    """An encoder as the manifest of its embeddings records it."""

    encoder: Encoder
    weights_sha256: str | None  # None: not recorded
    settings: str  # what its vectors depend on beside the weights, as JSON


def recorded_encoder(name, *folders):
    """The RecordedEncoder of the first of the embedding folders that has one of this name, else as the registry knows it."""
    for data in folders:
        if data and name in data.encoders:
            record = data.record(name)
            settings = json.dumps(record.get("transform", {}))
            return RecordedEncoder(data.encoders[name], record.get("weights_sha256"), settings)
    return RecordedEncoder(vlm.find_encoder(name), None, "{}")


def open_recorded(recorded, weights, device):
    """The ImageEncoder or TextEncoder. weights: a file or folder, None for the hub's. Raises vlm.MissingWeights; BadInput if its
    width, weights or settings are not those of the embeddings."""
    encoder = recorded.encoder
    model = vlm.build_encoder(encoder, device, weights)
    if encoder.dim not in (None, model.embed_dim):
        raise BadInput(f"{encoder.name}: gives vectors of width {model.embed_dim}; its embeddings have {encoder.dim}")
    digest = recorded.weights_sha256
    if digest and vlm.weights_digest(model.model) != digest:
        if weights is None:
            raise OtherWeights(
                f"{encoder.name}: the weights on the hub are not those that the embeddings were made with; pass those: "
                f"--weights {encoder.name}=PATH"
            )
        raise BadInput(f"--weights {encoder.name}={weights}: not the weights that the embeddings were made with")
    difference = vlm.first_difference(json.loads(recorded.settings), json.loads(json.dumps(model.config)))
    if difference:
        setting, then, now = difference
        raise BadInput(
            f"{encoder.name}: its embeddings were made with {setting} {then}, and it has {setting} {now} here; "
            "embed the data again, or install the versions that its manifest.json names"
        )
    return model


def why_not_opened(error):
    """The reason, for a line about an encoder that is passed over as it does not open. error: a BadInput."""
    return error.in_short if isinstance(error, vlm.MissingWeights) else str(error)


def open_encoders(data, names, weights, device):
    """{name: ImageEncoder or TextEncoder} of encoders of an embedding folder, with the weights that made it.

    weights: {name: file or folder}, instead of the hub. Raises BadInput; if weights are missing, one line that names all of
    them and the commands that bring them.
    """
    builders = []
    for name in names:
        builders.append(functools.partial(open_recorded, recorded_encoder(name, data), weights.get(name), device))
    return dict(zip(names, vlm.build_all(builders)))


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


def check_names(weights, names):
    """Raises BadInput for a name in --weights that is no encoder of `names`: with a typing error it would be passed over."""
    for name in weights:
        if name not in names:
            raise BadInput(f"--weights {name}: is none of the encoders here, which are {', '.join(names)}")
