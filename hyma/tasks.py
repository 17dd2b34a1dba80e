"""What a connector is scored on: retrieval, zero-shot classification, multiple choice."""

import functools
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import vlm
from hyma.datasets import draw_distractors
from hyma.embeddings import Embeddings, split_rows
from hyma.files import save_tensors
from hyma.metrics import Retrieval
from kernels import true_rank
from vlm import BadInput

# The 80 prompts of ImageNet that CLIP's authors published: these with "a" and with "the" for @, and four more.
PHOTOS = "bad good bright dark cropped close-up blurry pixelated jpeg_corrupted low_resolution black_and_white"

LOOKS = "hard_to_see clean dirty large small nice weird cool"

WORKS = "a_sculpture a_rendering graffiti a_tattoo a_drawing a_painting a_doodle a_sketch a_rendition art itap"

STUFFS = "plastic origami cartoon embroidered plushie toy"

FRAMES = ["a photo of @ {}.", "@ {} in a video game."]

FRAMES += [f"a {photo} photo of @ {{}}." for photo in PHOTOS.split()]

FRAMES += [f"a photo of @ {look} {{}}." for look in LOOKS.split()]

FRAMES += [f"{work} of @ {{}}." for work in WORKS.split()]

FRAMES += [f"@ {stuff} {{}}." for stuff in STUFFS.split()]

TEMPLATES = {
    "1": ("a photo of a {}",),
    "80": tuple(frame.replace("_", " ").replace("@", article) for frame in FRAMES for article in ("a", "the"))
    + ("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
}

QUESTION = "What kind of picture is it?"  # where rows have labels and no questions

BLOCK = 8192  # texts that go through a connector at a time


class Task(NamedTuple):
    """Rows of an embedding folder and what is asked of them."""

    name: str
    kind: str  # "retrieval", "zeroshot" or "vqa"
    protocol: str  # one line: which rows, how many, captions a picture, prompts, directions, chance
    chance: float  # what guessing scores, of `Score.value`
    data: Embeddings
    rows: Tensor  # [n] row numbers
    retrieval: Retrieval | None = None
    texts: tuple = ()  # prompts: of a class one after the other, or a question with a candidate answer
    templates: int = 1  # prompts of a class
    right: Tensor | None = None  # [n] the right class (zeroshot) or text (vqa)
    choices: Tensor | None = None  # [n, K] the texts to choose from; -1 where a row has fewer than K


class Score(NamedTuple):
    metrics: dict  # CLIP_benchmark's names -> float; a median rank counts from 1
    value: float  # the headline, 0 to 1: mean of both directions' R@10; acc1; acc
    units: Tensor  # [pictures or rows] float64, whose mean is `value`: what a bootstrap draws from


def open_tasks(name, folder, flags, run_seed=None) -> list[Task]:
    """Every task that the folder's rows allow: captions give retrieval, labels zeroshot, questions (or labels) vqa.

    name: None for the folder's dataset name. flags: `templates` ("1", "80" or a file) and `device`. run_seed: the seed
    of the run that was trained on this folder, None for a folder that the run has not seen: a folder without a test
    split then counts whole. Raises BadInput if there is nothing to ask.
    """
    data = Embeddings(folder)
    name = name or (data.manifest["dataset"] if data.manifest else data.folder.name)
    where, rows = choose_rows(data, run_seed)
    tasks, reasons = [], []
    for make in (retrieval_task, zeroshot_task, vqa_task):
        try:
            tasks.append(make(name, data, where, rows, flags))
        except Unfit as reason:
            reasons.append(str(reason))
    if not tasks:
        raise BadInput(f"--task {name}={folder}: nothing to evaluate: {'; '.join(reasons)}")
    return tasks


class Unfit(Exception):
    """Why the rows of a folder allow no task of a kind."""


def choose_rows(data, run_seed):
    """What is evaluated: (which rows, in words; row numbers [n])."""
    source = (data.manifest or {}).get("protocol")  # a standard set says itself what was read
    test = [i for i, row in enumerate(data.rows or []) if row.get("split") == "test"]
    if test:
        return source or "test split", torch.tensor(test)
    if run_seed is not None:
        rows = split_rows(data, run_seed)[1]
        return "validation rows, which also chose the connectors", rows
    return source or "all rows", torch.arange(data.row_count)


def retrieval_task(name, data, where, rows, flags):
    if data.rows:
        found = [data.rows[i] for i in rows.tolist()]
        if any("question" in row for row in found):
            raise Unfit("its captions are questions")
        if all(row["caption"] == spoken(row.get("label", "")) for row in found):
            raise Unfit("its captions are the labels")
        each = torch.tensor(list(Counter(row["image"] for row in found).values()))
        captions = len({row["caption"] for row in found})
    else:
        each, captions = torch.ones(len(rows), dtype=torch.int64), len(rows)
    if min(len(each), captions) < 2:
        raise Unfit(f"{len(each)} pictures and {captions} captions leave nothing to find")
    a_picture = f"{each.min()}" if each.min() == each.max() else f"{each.min()} to {each.max()}"
    retrieval = Retrieval(data, rows, flags.device)
    protocol = (
        f"{where}; {len(each)} pictures, {captions} different captions, {a_picture} a picture; text to image and image "
        f"to text, any caption of the picture is right; chance R@10 {retrieval.chance[2]:.2%}"
    )
    return Task(name, "retrieval", protocol, retrieval.chance[2], data, rows, retrieval)


def zeroshot_task(name, data, where, rows, flags):
    classes, rows, right = labelled(data, rows)
    templates = read_templates(flags.templates)
    texts = tuple(template.replace("{}", spoken(label)) for label in classes for template in templates)
    prompts = f"prompt {templates[0]!r}" if len(templates) == 1 else f"mean of {len(templates)} prompts"
    protocol = f"{where}; {len(rows)} pictures, {len(classes)} classes, {prompts}; chance {1 / len(classes):.2%}"
    return Task(name, "zeroshot", protocol, 1 / len(classes), data, rows, None, texts, len(templates), right)


def vqa_task(name, data, where, rows, flags):
    if any("question" in row for row in data.rows or []):
        rows = torch.tensor([i for i in rows.tolist() if data.rows[i].get("question")], dtype=torch.int64)
        asked = [(row["question"], row.get("answer"), row.get("choices")) for row in map(data.rows.__getitem__, rows)]
        about = "question and answer as text"
    else:
        classes, rows, right = labelled(data, rows)
        asked = []
        for i, label in zip(rows.tolist(), right.tolist()):
            others = draw_distractors(data.rows[i]["key"], classes, {classes[label]}, 3)
            asked.append((QUESTION, spoken(classes[label]), [spoken(c) for c in [classes[label], *others]]))
        about = f"{QUESTION!r} and the label, the others drawn from {len(classes)} labels"
    if not asked:
        raise Unfit("no row has a question")
    for i, (_, answer, candidates) in zip(rows.tolist(), asked):
        if not isinstance(candidates, list) or answer not in candidates or len(set(candidates)) < 2:
            said = "its choices must be a list of two or more that holds the answer"
            raise BadInput(f"{data.folder}/rows.jsonl: row {data.rows[i]['key']}: {said}")
    texts = sorted({f"{question} {c}" for question, _, candidates in asked for c in candidates})
    number = {text: k for k, text in enumerate(texts)}
    right = torch.tensor([number[f"{question} {answer}"] for question, answer, _ in asked])  # [n]
    choices = [torch.tensor([number[f"{q} {c}"] for c in dict.fromkeys(candidates)]) for q, _, candidates in asked]
    counts = torch.tensor([len(numbers) for numbers in choices])
    chance = (1 / counts.double()).mean().item()
    choices = nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=-1)  # [n, K]
    many = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    protocol = f"{where}; {len(rows)} questions, {many} choices, {about}; nearest to the picture; chance {chance:.2%}"
    return Task(name, "vqa", protocol, chance, data, rows, None, tuple(texts), 1, right, choices)


def labelled(data, rows):
    """(classes: all labels of the folder, those of `rows` that have a label, each picture once; their classes [n])."""
    classes = sorted({row["label"] for row in data.rows or [] if row.get("label")})
    if len(classes) < 2:
        raise Unfit("its rows have no labels" if not classes else f"its labels are of one class ({classes[0]})")
    number, first = {label: k for k, label in enumerate(classes)}, {}
    for i in rows.tolist():
        if label := data.rows[i].get("label"):
            first.setdefault((data.rows[i]["image"], label), i)
    if not first:
        raise Unfit("the rows to evaluate have no labels")
    return classes, torch.tensor(list(first.values())), torch.tensor([number[label] for _, label in first])


def spoken(label):
    return label.replace("_", " ")


def read_templates(asked):
    """Templates with {} for the class name: "1", "80", or the lines of a file."""
    if asked in TEMPLATES:
        return TEMPLATES[asked]
    try:
        lines = [line.strip() for line in Path(asked).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--templates {asked}: expected 1, 80 or a text file: {error}") from None
    for line in lines:
        if line.count("{}") != 1:
            raise BadInput(f"--templates {asked}: each line needs one {{}} for the class name; found {line[:60]!r}")
    if not lines:
        raise BadInput(f"--templates {asked}: has no lines")
    return tuple(lines)


def image_inputs(task, image_name, run_data=None):
    """The pictures of the task's rows, unit vectors [n, D_i] as stored. run_data: as for `text_inputs`."""
    check_encoder(task.data, image_name, run_data)
    return load_embeddings(task.data, image_name)[task.rows]


def text_inputs(task, text_name, weights=None, device="cpu", run_data=None):
    """Unit vectors on the device: of the task's captions [n, D_t], or of its prompts [texts, D_t].

    weights: {encoder: local folder} for prompts that are not cached. run_data: the embeddings that the run was trained
    on, whose encoders these must be. Raises BadInput if they are others, or if embeddings or weights are missing.
    """
    digest = check_encoder(task.data, text_name, run_data)
    if not task.texts:
        return load_embeddings(task.data, text_name)[task.rows].to(device)
    known = (run_data.encoders if run_data else {}) | task.data.encoders
    encoder = known.get(text_name) or vlm.find_encoder(text_name)
    return load_prompts(task.data, encoder, digest, task.texts, (weights or {}).get(text_name), device).to(device)


def check_encoder(data, name, run_data):
    """The sha256 of an encoder's weights as a folder's manifest has it, or None; raises BadInput if two folders differ."""
    found = {}
    for folder in filter(None, (data, run_data)):
        if folder.manifest and name in folder.encoders:
            found[folder.manifest["encoders"][name].get("weights_sha256")] = folder.folder
    found.pop(None, None)
    if len(found) > 1:
        here, there = found.values()
        raise BadInput(f"{here}: its {name} has other weights than {there}'s; embed one of them again")
    return next(iter(found), None)


@functools.cache
def load_embeddings(data, name):
    """The embeddings of one encoder [rows, D], memory-mapped and checked once, however many pairs use them."""
    if name not in data.encoders:
        held = ", ".join(data.encoders)
        raise BadInput(f"{data.folder}: has {held} but not {name}; add it: python embed.py --encoder {name} --out ...")
    return data.load(name)


@functools.cache
def load_prompts(data, encoder, digest, texts, weights, device):
    """The prompts' unit vectors [texts, D_t], float16, from prompts/ in the data's folder or, once, from the encoder.

    The file is named after the encoder's weights and the texts in order, so that another's are never taken for these.
    """
    named = hashlib.sha256(json.dumps([digest or encoder.spec, *texts]).encode()).hexdigest()[:16]
    path = data.folder / "prompts" / f"{encoder.name}-{named}.pt"
    if path.is_file():
        vectors = vlm.load_tensors(path)
        if (
            not torch.is_tensor(vectors)
            or vectors.shape != (len(texts), encoder.dim or vectors.shape[-1])
            or not ((vectors.float().norm(dim=1) - 1).abs() < 1e-2).all()
        ):
            raise BadInput(f"{path}: expected {len(texts)} unit vectors of width {encoder.dim}; delete it")
        return vectors
    model = open_text_encoder(encoder, digest, weights, device)
    parts = tqdm(range(0, len(texts), 1024), desc=f"{encoder.name}: prompts, 1024 at a time", disable=len(texts) < 2048)
    vectors = torch.cat([model.encode_text(list(texts[start : start + 1024])).half().cpu() for start in parts])
    try:
        path.parent.mkdir(exist_ok=True)
        save_tensors(vectors, path)
    except OSError as error:  # a folder that others share: the prompts are made again next time
        print(f"{path}: not kept: {error.strerror}", file=sys.stderr)
    return vectors


@functools.lru_cache(maxsize=1)
def open_text_encoder(encoder, digest, weights, device):
    model = vlm.TextEncoder(f"{encoder.name}={encoder.spec}", device, weights)
    if encoder.dim not in (None, model.embed_dim):
        raise BadInput(f"{encoder.name}: gives vectors of width {model.embed_dim}; its embeddings have {encoder.dim}")
    if digest and vlm.weights_digest(model.model) != digest:
        raise BadInput(f"--weights {encoder.name}={weights}: not the weights that the embeddings were made with")
    return model


@torch.no_grad()
def score(task, texts, images, connector) -> Score:
    """texts: `text_inputs` on the connector's device. images: [n, D_i]. connector: [B, D_t] -> [B, D_i].

    A tie counts against what is right, so that a collapsed connector scores zero and not everything. No more than a
    block of the scores is ever held.
    """
    images = images.to(texts.device).float()  # [n, D_i]
    mapped = map_prompts(texts, connector, task.templates)  # [captions, classes or texts, D_i]
    right = task.right.to(texts.device) if task.right is not None else None
    if task.kind == "retrieval":
        return score_retrieval(task.retrieval, *task.retrieval.ranks(mapped, images))
    images = F.normalize(images, dim=1)
    if task.kind == "zeroshot":
        ranks = true_rank(images, mapped, right)  # [n] classes that score at least as high
        hits = (ranks == 0).double()
        metrics = {"acc1": hits.mean().item()}
        if len(mapped) > 5:
            metrics["acc5"] = (ranks < 5).double().mean().item()
        counts = right.bincount()
        metrics["mean_per_class_recall"] = (right.bincount(hits)[counts > 0] / counts[counts > 0]).mean().item()
        return Score(metrics, metrics["acc1"], hits.cpu())
    parts = zip(images.split(BLOCK // 8), task.choices.to(texts.device).split(BLOCK // 8), right.split(BLOCK // 8))
    hits = torch.cat([answered(*part, mapped) for part in parts]).double()
    return Score({"acc": hits.mean().item()}, hits.mean().item(), hits.cpu())


def map_prompts(texts, connector, templates):
    """Unit vectors [texts / templates, D_i]: mapped, and those of a class averaged and normalised again.

    texts [texts, D_t]: of any length, the templates of a class one after the other.
    """
    mapped = []
    for part in texts.split(templates * max(1, BLOCK // templates)):
        z = vlm.map_text(connector, F.normalize(part.float(), dim=1))  # [part, D_i]
        mapped.append(F.normalize(z.unflatten(0, (-1, templates)).mean(1), dim=1))
    return torch.cat(mapped)


def answered(images, choices, right, mapped):
    """[B] bool: is the right text nearer to its picture than every other choice? A product and a sum, and no matrix
    product, so that equal choices score exactly alike."""
    scores = (images[:, None] * mapped[choices]).sum(-1)  # [B, K]
    own = (images * mapped[right]).sum(-1)[:, None]  # [B, 1]
    return ((scores >= own) & (choices != right[:, None]) & (choices >= 0)).sum(1) == 0


def score_retrieval(retrieval, caption_ranks, picture_ranks):
    """caption_ranks: [captions] from text to image; picture_ranks: [pictures] from image to text."""
    metrics = {}
    for direction, ranks in (("image_retrieval", caption_ranks), ("text_retrieval", picture_ranks)):
        metrics |= {f"{direction}_recall@{k}": (ranks < k).double().mean().item() for k in retrieval.ks}
        metrics[f"{direction}_median_rank"] = 1 + ranks.double().quantile(0.5).item()
    # A picture's share of the captions' recall: its own captions', a caption of several pictures divided among them.
    caption, picture = retrieval.place["caption"], retrieval.place["image"]  # [n]
    shares = ((caption_ranks < 10) / caption.bincount())[caption].double()  # [n]
    owned = picture.bincount(shares) * len(picture_ranks) / len(caption_ranks)  # [pictures]
    units = ((picture_ranks < 10) + owned) / 2
    value = (metrics["image_retrieval_recall@10"] + metrics["text_retrieval_recall@10"]) / 2
    return Score(metrics, value, units.cpu())


CLIP_BENCHMARK_TASKS = {"retrieval": "zeroshot_retrieval", "zeroshot": "zeroshot_classification", "vqa": "vqa"}

HEADLINES = {"retrieval": "mean of both directions' R@10", "zeroshot": "top-1 accuracy", "vqa": "accuracy"}
