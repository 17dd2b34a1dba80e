"""Prompts: the texts that name a class or an answer, and their embeddings, kept in prompts/ of an embedding folder."""

import functools
import hashlib
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import vlm
from hyma.embeddings import has_unit_rows
from hyma.files import make_folder, save_tensors
from hyma.weights import RecordedEncoder, open_recorded
from vlm import BadInput

PROMPTS_AT_ONCE = 1024


# ---------------------------------------------------------------------------------------------------------- templates


def eighty_templates():
    """The 80 prompts of ImageNet that CLIP's authors published: 38 with "a" and with "the" for @, and four more."""
    photos = "bad good bright dark cropped close-up blurry pixelated jpeg_corrupted low_resolution black_and_white"
    adjectives = "hard_to_see clean dirty large small nice weird cool"
    works = "a_sculpture a_rendering graffiti a_tattoo a_drawing a_painting a_doodle a_sketch a_rendition art itap"
    materials = "plastic origami cartoon embroidered plushie toy"
    frames = ["a photo of @ {}.", "@ {} in a video game."]
    frames += [f"a {photo} photo of @ {{}}." for photo in photos.split()]
    frames += [f"a photo of @ {adjective} {{}}." for adjective in adjectives.split()]
    frames += [f"{work} of @ {{}}." for work in works.split()]
    frames += [f"@ {material} {{}}." for material in materials.split()]
    templates = []
    for frame in frames:
        words = frame.replace("_", " ")
        templates += [words.replace("@", "a"), words.replace("@", "the")]
    templates += ["a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."]
    return tuple(templates)


TEMPLATES = {"1": ("a photo of a {}",), "80": eighty_templates()}  # {} is the class


def read_templates(source):
    """The prompts of a class, with {} for its name. source: a key of TEMPLATES or a text file, one prompt per line."""
    if source in TEMPLATES:
        return TEMPLATES[source]
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--templates {source}: expected 1, 80 or a text file: {error}") from None
    templates = []
    for line in text.splitlines():
        line = line.strip()
        if not line:
            continue
        if line.count("{}") != 1:
            raise BadInput(f"--templates {source}: each line needs one {{}} for the class name; found {line[:60]!r}")
        templates.append(line)
    if not templates:
        raise BadInput(f"--templates {source}: has no lines")
    return tuple(templates)


# --------------------------------------------------------------------------------------------------------- embeddings


@functools.cache
def load_prompts(folder, recorded: RecordedEncoder, texts, weights, device, model=None):
    """The prompts' unit vectors [texts, D_t], float16, from prompts/ in the data's folder or, once, from the encoder.

    model: the encoder, if it is there already; else it is opened.

    The file is named after the encoder's weights and the texts in order, so that another's are never taken for these.
    """
    encoder = recorded.encoder
    identity = json.dumps([recorded.weights_sha256 or encoder.spec, *texts])
    path = folder / "prompts" / f"{encoder.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        return read_prompts(path, len(texts), encoder.dim)
    vectors = embed_prompts(model or open_text_encoder(recorded, weights, device), recorded.encoder.name, texts)
    try:
        make_folder(path.parent)
        save_tensors(vectors, path)
    except OSError as error:  # a folder that others share: the prompts are embedded again next time
        print(f"{path}: not saved: {error.strerror}", file=sys.stderr)
    return vectors


def prompt_files(folder, name):
    """The files of an encoder's prompts; not those of another whose name begins alike."""
    return list((folder / "prompts").glob(f"{name}-{'[0-9a-f]' * 16}.pt"))


def read_prompts(path, count, dim):
    """Unit vectors [count, dim]; dim None is any width. Raises BadInput if the file holds something else."""
    vectors = vlm.load_tensors(path)
    is_matrix = torch.is_tensor(vectors) and vectors.dim() == 2
    if not is_matrix or not has_unit_rows(vectors, (count, dim or vectors.shape[1])):
        raise BadInput(f"{path}: expected {count} unit vectors of width {dim}; delete it")
    return vectors


def embed_prompts(model, name, texts):
    """Unit vectors [texts, D_t], float16, by the text encoder."""
    starts = range(0, len(texts), PROMPTS_AT_ONCE)
    vectors = []
    for start in tqdm(starts, desc=f"{name}: prompts, {PROMPTS_AT_ONCE} at a time", disable=len(starts) < 2):
        part = list(texts[start : start + PROMPTS_AT_ONCE])
        vectors.append(model.encode_text(part).half().cpu())
    return torch.cat(vectors)


open_text_encoder = functools.lru_cache(maxsize=1)(open_recorded)  # the prompts of several tasks follow one another
