"""What scoring a task takes from embedding folders: vectors of pictures, of captions, and of prompts, checked and loaded once."""

import functools

import vlm
from hyma.embeddings import check_same_encoder, unique
from hyma.prompts import load_prompts
from hyma.weights import recorded_encoder
from vlm import BadInput


def image_inputs(task, image_name, run_data=None):
    """The image embeddings of the task's rows [n, D_i] as stored, which embed.py makes unit vectors. run_data: as for
    `text_inputs`."""
    check_same_encoder(image_name, task.data, run_data)
    return load_embeddings(task.data, image_name)[task.rows]


def text_inputs(task, text_name, weights=None, device="cpu", run_data=None):
    """Unit vectors on the device: of the task's captions [n, D_t], or of its prompts [texts, D_t].

    weights: {encoder: local folder} for prompts that are not cached. run_data: the embeddings that the run was trained
    on, whose encoders these must be. Raises BadInput if they are others, or if embeddings or weights are missing.
    """
    check_same_encoder(text_name, task.data, run_data)
    if not task.texts:
        return load_embeddings(task.data, text_name)[task.rows].to(device)
    recorded = recorded_encoder(text_name, task.data, run_data)
    folder = (weights or {}).get(text_name)
    return load_prompts(task.data.folder_of(text_name), recorded, task.texts, folder, device).to(device)


def prepare_inputs(task, pairs, weights, device, run_data):
    """Reads and checks every embedding that scoring these pairs takes, and embeds prompts that are not cached.

    Arguments as for `text_inputs`. Raises BadInput; OtherWeights or vlm.MissingWeights, of all of the task's text encoders,
    if prompts cannot be embedded without --weights.
    """
    images, texts = zip(*pairs)
    for image in unique(images):
        image_inputs(task, image, run_data)
    readers = []
    for text in unique(texts):
        readers.append(functools.partial(text_inputs, task, text, weights, device, run_data))
    vlm.build_all(readers)


@functools.cache
def load_embeddings(data, name):
    """The embeddings of one encoder [rows, D], memory-mapped and checked once, however many pairs use them."""
    if name not in data.encoders:
        held = ", ".join(data.encoders)
        raise BadInput(
            f"{data.folder}: has {held} but not {name}; add it: python embed.py --encoder {name} --data TABLE --out {data.folder}"
        )
    return data.load(name)
