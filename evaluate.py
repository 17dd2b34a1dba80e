"""Which encoder pair to stitch, how sure that is, what it cost: runs and selectors judged by their own connectors.

    python evaluate.py                                             # the newest run, on its data's test rows
    python evaluate.py runs/hyma runs/halving runs/grid-s0 runs/grid-s1        # the full grid's runs are the oracle
    python evaluate.py runs/hyma --oracle runs/grid-s* --task coco=embeddings/coco --task in1k=embeddings/in1k
    python evaluate.py --demo                                      # makes runs of every kind on the sample first

It knows connectors and embeddings only. The true score of a pair on a task is what the oracle's connector scores
there, the mean over the oracle's seeds. Every way of choosing a pair (a run's ranking.csv, made from validation rows,
or a selector that trains nothing) is judged by what its choice loses against the best: regret, in points. Writes
report/: report.html with every figure inside, results.json, ranking.csv, selectors.csv, and each figure as PNG and CSV.

Pictures and captions of a task come from an embedding folder: `embed.py` makes one of your own data or of a standard
set. Prompts come from its prompts/, or the text encoder adds them there once.
"""

import argparse
import base64
import csv
import functools
import hashlib
import html
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm

import vlm
from kernels import true_rank
from vlm import BadInput, unique


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the newest in runs/)")
    add(
        "--oracle",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="runs whose connectors are the truth, a seed each (default: full grids among RUN)",
    )
    add(
        "--task",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="an embedding folder to score on; repeatable (default: the runs' own data, its test rows)",
    )
    add("--data", type=Path, metavar="FOLDER", help="the runs' embedding folder, where it has moved")
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: %(default)s)")
    add("--templates", default="1", help="prompts of a class: 1, 80 or a file of lines with {} (default: %(default)s)")
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help="a text encoder's folder, instead of the hub")
    add("--bootstrap", type=int, default=1000, help="resamples behind every interval (default: %(default)s)")
    help_rows = "training rows that selectors see; 0: no selectors (default: %(default)s)"
    add("--selector-rows", type=int, default=2000, help=help_rows)
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    add("--demo", action="store_true", help="make runs/demo-* on the sample, those not there yet, and report on them")
    flags = parser.parse_args()
    if flags.bootstrap < 1:
        raise BadInput(f"--bootstrap {flags.bootstrap}: one resample is the least; 1000 gives steady intervals")
    if flags.selector_rows and flags.selector_rows < 50:
        raise BadInput(f"--selector-rows {flags.selector_rows}: 50 rows are the least; 0 leaves the selectors out")
    for name in ("task", "weights"):
        items = [item.partition("=") for item in getattr(flags, name)]
        for key, equals, value in items:
            if not (key and equals and value):
                raise BadInput(f"--{name} {key}: expected NAME={'FOLDER' if name == 'task' else 'PATH'}")
        if len({key for key, _, _ in items}) < len(items):
            raise BadInput(f"--{name}: a name is given twice")
        setattr(flags, name, {key: value for key, _, value in items})
    if flags.demo and (flags.runs or flags.oracle or flags.task or flags.data):
        raise BadInput(
            "--demo: makes its own runs on the sample, so RUN, --oracle, --task and --data do not go with it"
        )
    flags.device = vlm.pick_device(flags.device)
    return flags


# ----------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """A finished run folder."""

    folder: Path
    config: dict
    ledger: dict
    ranks: dict  # (image, text) -> rank by validation rows, 1 the best; equals share a rank
    seed: int
    hidden_layers: int

    @property
    def flags(self):
        return self.config["flags"]

    def connector(self, image, text):
        """The path of a pair's connector."""
        return self.folder / "connectors" / vlm.connector_name(image, self.hidden_layers, text)


def open_run(folder) -> Run:
    """Reads a run folder. Raises BadInput if it is none, is unfinished or lacks a connector."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: holds no run (no config.json); make one with train_hyma.py or train_grid.py")
    config = vlm.read_json(folder / "config.json")
    try:
        script, seed = config["script"], config.get("seed", config["flags"].get("seed", 0))
        hidden_layers = int(config["flags"]["connector"][-1])
        config["embeddings"].items()
        if not (folder / "ledger.json").is_file():
            raise BadInput(
                f"{folder}: is not finished (no ledger.json); go on: python {script} --resume --out {folder}"
            )
        ledger = vlm.read_json(folder / "ledger.json")
        for key in ("batch_size", "pair_samples", "flops", "seconds"):
            float(ledger[key])
        with open(folder / "ranking.csv", newline="", encoding="utf-8") as file:
            ranks = {(row["image"], row["text"]): int(row["rank"]) for row in csv.DictReader(file)}
        for pair in ranks:
            ledger["updates_per_pair"][":".join(pair)]
        if not ranks:
            raise KeyError("ranking.csv ranks nothing")
    except BadInput:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder}: is damaged ({type(error).__name__}: {error}); make the run again") from None
    run = Run(folder, config, ledger, ranks, seed, hidden_layers)
    for pair in ranks:
        if not run.connector(*pair).is_file():
            raise BadInput(f"{run.connector(*pair)}: no such file, but {folder}/ranking.csv ranks {':'.join(pair)}")
    return run


def open_embeddings(runs, moved) -> vlm.Embeddings:
    """The embeddings that all the runs were trained on. Raises BadInput if they differ or have changed since."""
    first = runs[0]
    data = vlm.Embeddings(moved or first.flags["data"])
    for run in runs:
        for name, digest in run.config["embeddings"].items():
            if first.config["embeddings"].get(name, digest) != digest:
                raise BadInput(
                    f"{run.folder}: was trained on another {name}.pt than {first.folder}; compare runs of one"
                )
            if name not in data.encoders:
                raise BadInput(
                    f"{data.folder}: has no {name}, which {run.folder} was trained on; name the folder: --data"
                )
            if data.fingerprint([name])[name] != digest:
                raise BadInput(
                    f"{data.folder}/{name}.pt: is not what {run.folder} was trained on (sha256); train again"
                )
    return data


def is_full_grid(run):
    flags = run.flags
    full = flags.get("budget_of") == "full" and not flags.get("halving") and not flags.get("closed_form")
    return run.config["script"] == "train_grid.py" and full


# What does not make a run another method's: where it is, what it ran on, its seed.
INCIDENTAL = {"seed", "seeds", "out", "data", "device", "precision", "shard", "pairs", "pairs_per_pass", "resume"}


def recipe(run):
    """The flags that make the method; runs that share them differ in their seed alone."""
    kept = {name: value for name, value in run.flags.items() if name not in INCIDENTAL}
    if run.flags.get("budget_of", "full") != "full":
        kept["budget_of"] = "a run"  # of several seeds' runs, each has another's budget
    return {"script": run.config["script"]} | kept


def label(run):
    flags, connector = run.flags, f"mlp{run.hidden_layers}"
    if run.config["script"] == "train_hyma.py":
        return f"hyma {flags.get('generator')} {connector}"
    if flags.get("closed_form"):
        return f"{flags['closed_form']} {connector}"
    if flags.get("halving"):
        return f"halving {connector}"
    if flags.get("budget_of", "full") != "full":
        return f"grid {connector}, FLOPs of {Path(flags['budget_of']).name}"
    return f"grid {connector}"


class Method(NamedTuple):
    """A way of choosing a pair: a run of one or more seeds, or a selector."""

    name: str
    orders: np.ndarray  # [S, P] a row a seed: higher is better, equals are ties
    runs: list  # [S] the seeds' runs; none of a selector
    cost: dict  # of a selector: flops, seconds, rows


def group_runs(runs, pairs, oracles=()):
    """Methods of the runs: those that differ only in their seed are one, but for a seed of --oracle and one beside it.
    Labels are made unique."""

    def kind(run):
        return recipe(run), str(run.folder) in oracles

    groups = []
    for run in runs:
        for group in groups:
            if kind(group[0]) == kind(run) and run.seed not in {other.seed for other in group}:
                group.append(run)
                break
        else:
            groups.append([run])
    names = [label(group[0]) for group in groups]
    for name in {name for name in names if names.count(name) > 1}:  # say in what they differ
        same = [k for k, other in enumerate(names) if other == name]
        recipes = [recipe(groups[k][0]) for k in same]
        differing = [key for key in recipes[0] if len({str(r.get(key)) for r in recipes}) > 1]
        for k, own in zip(same, recipes):
            names[k] += "".join(f", {key} {own.get(key)}" for key in differing[:2])
    times = Counter(names)  # still alike: a seed twice, one of them the oracle, or a third flag
    names = [name if times[name] == 1 else f"{name} ({group[0].folder})" for name, group in zip(names, groups)]
    methods = []
    for name, group in zip(names, groups):
        orders = np.array([[-run.ranks[pair] for pair in pairs] for run in group], dtype=float)
        methods.append(Method(name, orders, group, {}))
    return methods


# ---------------------------------------------------------------------------------------------------------- tasks

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
    data: vlm.Embeddings
    rows: Tensor  # [n] row numbers
    retrieval: vlm.Retrieval | None = None
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
    data = vlm.Embeddings(folder)
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
        rows = vlm.split_rows(data, run_seed)[1]
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
    retrieval = vlm.Retrieval(data, rows, flags.device)
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
            others = vlm.draw_distractors(data.rows[i]["key"], classes, {classes[label]}, 3)
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


# ------------------------------------------------------------------------------------------- a task's embeddings


def image_inputs(task, image_name, run_data=None):
    """The pictures of the task's rows, unit vectors [n, D_i] as stored. run_data: as for `text_inputs`."""
    check_encoder(task.data, image_name, run_data)
    return load(task.data, image_name)[task.rows]


def text_inputs(task, text_name, weights=None, device="cpu", run_data=None):
    """Unit vectors on the device: of the task's captions [n, D_t], or of its prompts [texts, D_t].

    weights: {encoder: local folder} for prompts that are not cached. run_data: the embeddings that the run was trained
    on, whose encoders these must be. Raises BadInput if they are others, or if embeddings or weights are missing.
    """
    digest = check_encoder(task.data, text_name, run_data)
    if not task.texts:
        return load(task.data, text_name)[task.rows].to(device)
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
def load(data, name):
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
        vlm.save_tensors(vectors, path)
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


# --------------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def score(task, texts, images, connector) -> Score:
    """texts: `text_inputs` on the connector's device. images: [n, D_i]. connector: [B, D_t] -> [B, D_i].

    A tie counts against what is right, so that a collapsed connector scores zero and not everything. No more than a
    block of the scores is ever held.
    """
    images = images.to(texts.device).float()  # [n, D_i]
    mapped = map_texts(texts, connector, task.templates)  # [captions, classes or texts, D_i]
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


def map_texts(texts, connector, templates):
    """Unit vectors [texts / templates, D_i]: mapped, normalised, and those of a class averaged and normalised again."""
    parts = []
    for part in texts.split(templates * max(1, BLOCK // templates)):
        z = F.normalize(connector(F.normalize(part.float(), dim=1)), dim=1)  # [part, D_i]
        parts.append(F.normalize(z.unflatten(0, (-1, templates)).mean(1), dim=1))
    mapped = torch.cat(parts)
    if not mapped.isfinite().all():  # no comparison holds for a NaN, so that nothing would seem nearer than the match
        raise BadInput("the connector gives vectors that are not finite; its file is of no use")
    return mapped


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


# ------------------------------------------------------------------------------------- selectors that train nothing

NEIGHBOURS = 10  # of the mutual nearest neighbours
COMPONENTS = 100  # leading principal components that canonical correlations are taken between
STRENGTH = 0.1  # ridge probe's regularisation, in mean eigenvalues of the text Gram matrix
KEPT, POWER = 100, 8  # relative representations: anchors that a row keeps, and the exponent of its similarities


def selector_rows(data, rows, count):
    """`count` of the training rows in random order, each picture once: a second caption would be its own neighbour."""
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if data.rows:
        rows = torch.tensor(list({data.rows[i]["image"]: i for i in rows.tolist()}.values()))
    if len(rows) < 50:
        raise BadInput(f"{data.folder}: selectors need 50 training pictures; it has {len(rows)}; use --selector-rows 0")
    return rows[:count]


def linear_cka(features, pairs):
    """Centred kernel alignment of linear kernels (Kornblith et al., arXiv 1905.00414, eq. 4): 0 to 1."""
    own = {name: (x.T @ x).norm() for name, x in features.items()}
    values = {(i, t): ((features[i].T @ features[t]).norm() ** 2 / (own[i] * own[t])).item() for i, t in pairs}
    return values, gram_flops(features, pairs)


def debiased_cka(features, pairs):
    """The same with the unbiased estimate of HSIC (Song et al., JMLR 2012, eq. 5; Nguyen et al., arXiv 2010.15327), which
    does not grow with the widths: about 0 for unrelated sides. No [n, n] kernel is formed."""

    def hsic(x, y):
        n = len(x)
        x_diagonal, y_diagonal = x.square().sum(1), y.square().sum(1)  # [n]
        x_rows, y_rows = x @ x.sum(0) - x_diagonal, y @ y.sum(0) - y_diagonal  # [n] kernels' row sums, diagonals zero
        trace = (x.T @ y).square().sum() - x_diagonal @ y_diagonal
        rest = x_rows.sum() * y_rows.sum() / ((n - 1) * (n - 2)) - 2 * (x_rows @ y_rows) / (n - 2)
        return (trace + rest) / (n * (n - 3))

    own = {name: hsic(x, x).clamp(min=1e-30).sqrt() for name, x in features.items()}
    values = {(i, t): (hsic(features[i], features[t]) / (own[i] * own[t])).item() for i, t in pairs}
    rows = len(next(iter(features.values())))
    sums = sum(2 * rows * features[name].shape[1] for pair in pairs for name in pair)
    sums += sum(4 * rows * x.shape[1] for x in features.values())
    return values, gram_flops(features, pairs) + sums


def gram_flops(features, pairs):
    """Of the products [D, n] [n, D'] of every encoder with itself and of every pair."""
    rows = len(next(iter(features.values())))
    dims = {name: x.shape[1] for name, x in features.items()}
    return 2 * rows * (sum(dim**2 for dim in dims.values()) + sum(dims[i] * dims[t] for i, t in pairs))


def mutual_neighbours(features, pairs):
    """Share of a row's 10 nearest rows by picture that are also among its 10 nearest by caption (Huh et al., arXiv
    2405.07987, section 2), by cosine of centred vectors."""
    nearest = {}
    for name, x in features.items():
        x = F.normalize(x, dim=1)
        found = []
        for block in torch.arange(len(x), device=x.device).split(2048):
            scores = x[block] @ x.T  # [block, n]
            scores[torch.arange(len(block), device=x.device), block] = -math.inf
            found.append(scores.topk(NEIGHBOURS, dim=1).indices)
        nearest[name] = torch.cat(found)  # [n, 10]
    values = {
        (i, t): (nearest[i][:, :, None] == nearest[t][:, None]).sum().item() / nearest[i].numel() for i, t in pairs
    }
    return values, sum(2 * len(x) ** 2 * x.shape[1] for x in features.values())


def canonical_correlations(features, pairs, spectra=None):
    """Mean squared canonical correlation between the leading principal components of both sides, as many on each side
    (Raghu et al., arXiv 1706.05806). spectra: a dict that gets each pair's correlations, largest first."""
    rows, axes, flops = len(next(iter(features.values()))), {}, 0
    count = min(COMPONENTS, rows // 5, *(x.shape[1] for x in features.values()))
    for name, x in features.items():
        values, vectors = torch.linalg.eigh(x.T @ x)
        kept = values[-count:] > 1e-6 * values[-1]  # of a side with fewer dimensions than that, the others are zero
        axes[name] = x @ vectors[:, -count:] * (kept / values[-count:].clamp(min=1e-12).sqrt())  # [n, count]
        wide = x.shape[1]
        flops += 2 * rows * wide**2 + eigh_flops(wide) + 2 * rows * wide * count
    found = {(i, t): torch.linalg.svdvals(axes[i].T @ axes[t]).clamp(max=1) for i, t in pairs}
    flops += len(pairs) * (2 * rows * count**2 + 4 * count**3)  # singular values alone: 4 n^3
    if spectra is not None:
        spectra |= {pair: values.tolist() for pair, values in found.items()}
    return {pair: values.square().mean().item() for pair, values in found.items()}, flops


def eigh_flops(wide):
    return 9 * wide**3  # with vectors (Golub and Van Loan, section 8.3)


def ridge_probe(features, pairs, held_out):
    """R@10, both directions, of ridge regression from captions to pictures, on the fifth of the rows it has not seen."""
    cut, values = len(next(iter(features.values()))) - len(held_out.rows), {}
    flops = retrieval_flops(features, pairs, len(held_out.rows))
    for text in unique(text for _, text in pairs):
        x, wide = features[text][:cut], features[text].shape[1]
        gram = x.T @ x
        factor = torch.linalg.cholesky(gram + STRENGTH * gram.trace() / wide * torch.eye(wide).to(gram))
        flops += 2 * cut * wide**2 + wide**3 // 3
        for image in (image for image, other in pairs if other == text):
            y = features[image][:cut]
            weight = torch.cholesky_solve(x.T @ y, factor)  # [D_t, D_i]
            values[image, text] = recall10(held_out, features[text][cut:] @ weight, features[image][cut:])
            flops += 2 * (cut + wide + len(held_out.rows)) * wide * y.shape[1]
    return {pair: values[pair] for pair in pairs}, flops


def relative_representations(features, pairs, held_out):
    """R@10, both directions, of rows described by their similarities to the other rows' pictures, or captions (ASIF,
    Norelli et al., arXiv 2210.01738): the largest kept, raised to a power."""
    cut, described = len(next(iter(features.values()))) - len(held_out.rows), {}
    for name, x in features.items():
        x = F.normalize(x, dim=1)
        scores = (x[cut:] @ x[:cut].T).clamp(min=0)  # [held out, anchors]
        least = scores.topk(min(KEPT, cut), dim=1).values[:, -1:]
        described[name] = torch.where(scores >= least, scores, 0) ** POWER
    values = {(i, t): recall10(held_out, described[t], described[i]) for i, t in pairs}
    flops = sum(2 * len(held_out.rows) * cut * x.shape[1] for x in features.values())
    return values, flops + retrieval_flops(described, pairs, len(held_out.rows))


def recall10(held_out, texts, images):
    found = held_out.recalls(texts, images)
    return (found[2] + found[5]) / 2


def retrieval_flops(features, pairs, rows):
    """Of the scores of every caption against every picture and back."""
    return sum(4 * rows**2 * features[image].shape[1] for image, _ in pairs)


def run_selectors(data, pairs, rows, device):
    """Every selector on the same rows: [Method], {pair: canonical correlations}, and lines on encoders that are alike."""
    names = unique(name for pair in pairs for name in pair)
    store = vlm.RowStore(data, names, device)
    features = {name: store.take(name, rows) for name in names}  # [n, D]
    features = {name: x - x.mean(0) for name, x in features.items()}
    held_out = vlm.Retrieval(data, rows[len(rows) - len(rows) // 5 :], device)
    spectra = {}
    asked = {
        "linear CKA": linear_cka,
        "debiased CKA": debiased_cka,
        "mutual k-NN": mutual_neighbours,
        "canonical correlations": functools.partial(canonical_correlations, spectra=spectra),
        "ridge probe R@10": functools.partial(ridge_probe, held_out=held_out),
        "relative representations R@10": functools.partial(relative_representations, held_out=held_out),
    }
    methods = []
    for name, selector in tqdm(asked.items(), desc="selectors"):
        started = time.perf_counter()
        values, flops = selector(features, pairs)
        seconds = time.perf_counter() - started
        order = np.array([[values[pair] for pair in pairs]]).round(9)
        methods.append(Method(name, order, [], {"flops": flops, "seconds": seconds, "rows": len(rows)}))
    # Parameter counts are not in the manifest; among models of a family the wider is the larger.
    widths = np.array([[data.encoders[image].dim + data.encoders[text].dim for image, text in pairs]], dtype=float)
    methods.append(Method("largest (sum of widths)", widths, [], {"flops": 0, "seconds": 0.0, "rows": 0}))
    return methods, spectra, find_duplicates(data, features)


def find_duplicates(data, features):
    """A line for every two encoders of a kind whose embeddings are the same file, or the same up to a rotation."""
    lines = []
    for kind in ("image", "text"):
        names = [name for name in data.names(kind) if name in features]
        digests = data.fingerprint(names)
        both = [(one, two) for k, one in enumerate(names) for two in names[k + 1 :]]
        alike, _ = linear_cka({name: features[name] for name in names}, both) if both else ({}, 0)
        for (one, two), cka in alike.items():
            if digests[one] == digests[two] or cka > 0.9999:
                how = (
                    "the same file"
                    if digests[one] == digests[two]
                    else f"alike up to a rotation (linear CKA {cka:.6f})"
                )
                lines.append(
                    f"{one} and {two} are duplicates: {how}; their pairs tie, and agreement looks better than it is"
                )
    return lines


# ------------------------------------------------------------------------------------------- truth and its bootstrap


class Judged(NamedTuple):
    """The scores of every run's connectors on a task, or on the mean of several."""

    name: str
    headline: str  # what is scored, in words
    protocol: str
    counted: str  # how many pictures or questions
    chance: float
    scores: dict  # method -> [S, P], 0 to 1
    resampled: dict  # method -> [S, R, P], the same resample of the task's pictures for every pair


def score_runs(tasks, methods, pairs, data, flags, results):
    """[Judged] of every task. Appends a record with CLIP_benchmark's keys to `results` for each connector."""
    judged, jobs = [], [(method, run, pair) for method in methods for run in method.runs for pair in pairs]
    with tqdm(total=len(tasks) * len(jobs), desc="score", unit="connector") as progress:
        for task in tasks:
            units = {method.name: [] for method in methods}
            for method, run, (image, text) in jobs:
                scored = score_connector(task, run, image, text, data, flags)
                units[method.name].append(scored.units.double().numpy())
                record = {"dataset": task.name, "model": run.connector(image, text).stem}
                record |= {"pretrained": str(run.folder), "task": CLIP_BENCHMARK_TASKS[task.kind]}
                record |= {"metrics": scored.metrics, "image": image, "text": text, "method": method.name}
                results.append(record | {"seed": run.seed, "protocol": task.protocol})
                progress.update()
            count = len(scored.units)
            units = {name: np.stack(each).reshape(-1, len(pairs), count) for name, each in units.items()}  # [S, P, U]
            scores = {name: values.mean(-1).round(9) for name, values in units.items()}
            counted = f"{count} {'questions' if task.kind == 'vqa' else 'pictures'}"
            drawn = resample(units, flags.bootstrap, (task.data.manifest or {}).get("keys_sha256", task.name))
            about = HEADLINES[task.kind], task.protocol, counted, task.chance
            judged.append(Judged(f"{task.name} {task.kind}", *about, scores, drawn))
    return judged


CLIP_BENCHMARK_TASKS = {"retrieval": "zeroshot_retrieval", "zeroshot": "zeroshot_classification", "vqa": "vqa"}
HEADLINES = {"retrieval": "mean of both directions' R@10", "zeroshot": "top-1 accuracy", "vqa": "accuracy"}


def score_connector(task, run, image, text, data, flags):
    texts = text_inputs(task, text, flags.weights, flags.device, data)
    return score(task, texts, image_inputs(task, image, data), load_connector(run, image, text, data).to(flags.device))


def load_connector(run, image, text, data):
    """A pair's connector, [B, D_t] -> [B, D_i], on the CPU, from its file."""
    dims = data.encoders[image].dim, data.encoders[text].dim
    _, hidden_layers, _, state = vlm.read_connector(run.connector(image, text), *dims)
    connector = vlm.init_modality_connector(dims[1], [vlm.HIDDEN_DIM] * hidden_layers, dims[0])
    connector.load_state_dict(state)
    return connector


def resample(units, times, corpus):
    """Means of [S, P, U] over `times` draws of U units with replacement: {method: [S, R, P]}.

    Tasks on as many units of the same corpus get the same draws, so that their mean is drawn as one.
    """
    count = next(iter(units.values())).shape[-1]
    random = np.random.default_rng([count, int.from_bytes(hashlib.sha256(corpus.encode()).digest()[:4])])
    found = {name: [] for name in units}
    for start in range(0, times, 100):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(100, times - start))  # [100, U]
        for name, values in units.items():
            found[name].append(np.einsum("ru,spu->srp", drawn, values, optimize=True) / count)
    return {name: np.concatenate(parts, axis=1).round(9) for name, parts in found.items()}


def mean_of_tasks(judged):
    """The mean of every task's headline score, task by task drawn as it was."""
    names = " and ".join([", ".join(each.name for each in judged[:-1]), judged[-1].name])
    scores = {name: np.mean([each.scores[name] for each in judged], axis=0).round(9) for name in judged[0].scores}
    drawn = {name: np.mean([each.resampled[name] for each in judged], axis=0).round(9) for name in scores}
    chance = sum(each.chance for each in judged) / len(judged)
    counted = unique(each.counted for each in judged)
    return Judged(
        f"the mean of {len(judged)} tasks",
        f"mean of the scores of {names}",
        "",
        " and ".join(counted),
        chance,
        scores,
        drawn,
    )


def draw_seeds(methods, times):
    """{method: [R, S]}: the weights of a method's seeds in each resample, drawn with replacement."""
    random = np.random.default_rng(1)
    counts = {method.name: max(1, len(method.runs)) for method in methods}
    return {name: random.multinomial(s, np.full(s, 1 / s), size=times) / s for name, s in counts.items()}


METRICS = ["regret", "top1", "recall3", "ndcg1", "ndcg3", "ndcg5", "ndcg", "spearman", "tau"]


def fidelity(truth, order):
    """How well an order of P pairs finds the best by true scores. truth: [R, P], 0 to 1; order: [P], higher is better,
    equals are ties. Returns {metric: [R]}, every one the expectation over a random breaking of the order's ties:

    regret: the best true score minus that of the pair chosen, in points. top1: whether that pair is a best one.
    recall3: share of the first three that score no less than the third best. ndcg1, 3, 5 and ndcg (all): gain = true
    score minus the worst pair's, discount 1 / log2(1 + place). spearman: of average ranks. tau: Kendall's tau-b. An
    order that ties everything is a random order; its spearman and tau are 0.
    """
    count = truth.shape[1]
    before = (order > order[:, None]).sum(1)  # [P] how many come before a pair
    ties = (order == order[:, None]).sum(1)  # [P] how many share its place, itself included
    first, three = (((k - before) / ties).clip(0, 1) for k in (1, 3))  # [P] chance to be among the first k
    ranked = np.sort(truth, axis=1)[:, ::-1]
    best, third, worst = ranked[:, :1], ranked[:, [min(3, count) - 1]], ranked[:, -1:]
    found = {
        "regret": 100 * (best[:, 0] - truth @ first),
        "top1": (truth == best) @ first,
        "recall3": (truth >= third) @ three / min(3, count),
    }
    for name, k in (("ndcg1", 1), ("ndcg3", 3), ("ndcg5", 5), ("ndcg", count)):
        discounts = np.where(np.arange(count) < k, 1 / np.log2(np.arange(count) + 2), 0)
        expected = np.array([discounts[b : b + t].mean() for b, t in zip(before, ties)])  # [P]
        gained, ideal = (truth - worst) @ expected, (ranked - worst) @ discounts
        found[name] = np.where(ideal > 0, gained / np.where(ideal > 0, ideal, 1), 1.0)
    ranks, own = rankdata(truth, axis=1) - (count + 1) / 2, rankdata(order) - (count + 1) / 2
    found["spearman"] = ratio(ranks @ own, (ranks**2).sum(1) * (own**2).sum())
    own = np.sign(order - order[:, None])  # [P, P]
    taus = []
    for part in np.array_split(truth, math.ceil(truth.size * count / 1e7)):  # [R, P, P] a few at a time
        signs = np.sign(part[:, None] - part[:, :, None])
        taus.append(ratio((signs * own).sum((1, 2)), (signs**2).sum((1, 2)) * (own**2).sum()))
    return found | {"tau": np.concatenate(taus)}


def ratio(product, squares):
    return np.where(squares > 0, product / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)


def true_scores(judged, oracle, drawn):
    """The true score of every pair [P], 0 to 1, and its resamples [R, P]: the mean over the oracle's seeds."""
    truths = np.einsum("rs,srp->rp", drawn[oracle.name], judged.resampled[oracle.name])
    return judged.scores[oracle.name].mean(0).round(9), truths.round(9)


def at_chance(judged, oracle, drawn):
    """A line if the pairs together score no better than guessing."""
    _, truths = true_scores(judged, oracle, drawn)
    low, high = np.percentile(truths.mean(1), [2.5, 97.5])
    if low > judged.chance:
        return []
    said = f"{judged.name}: the pairs score {low:.1%} to {high:.1%} on average, where guessing scores {judged.chance:.1%}; "
    return [said + "do captions and pictures belong together?"]


def judge(judged, methods, oracle, drawn):
    """A row a method: every metric with its 95 % bootstrap interval over rows and seeds and its expectation under a
    random order, and, of a run, how its own connectors compare with the oracle's."""
    truth, truths = true_scores(judged, oracle, drawn)  # [P], [R, P]
    chance = fidelity(truth[None], np.zeros(len(truth)))
    top = np.argsort(-truth, kind="stable")[: math.ceil(len(truth) / 3)]
    rows = []
    for method in methods:
        point = [fidelity(truth[None], order) for order in method.orders]
        again = [fidelity(truths, order) for order in method.orders]
        row = {"task": judged.name, "method": method.name, "kind": "run" if method.runs else "selector"}
        row |= {"seeds": len(method.runs), "chosen": unique(k for order in method.orders for k in chosen_pairs(order))}
        for name in METRICS:
            values = (drawn[method.name] * np.stack([each[name] for each in again], axis=1)).sum(1)  # [R]
            low, high = np.percentile(values, [2.5, 97.5])
            row |= {name: np.mean([each[name][0] for each in point]), f"{name}_low": low, f"{name}_high": high}
            row[f"{name}_random"] = chance[name][0]
        gap = 100 * (judged.scores[method.name].mean(0) - truth) if method.runs else None  # [P]
        first = chance_chosen(method.orders)  # [S, P]
        row["own_score"] = 100 * (judged.scores[method.name] * first).sum(1).mean() if method.runs else None
        row["gap_all"] = gap.mean() if method.runs else None
        row["gap_top_third"] = gap[top].mean() if method.runs else None
        rows.append(row)
    return rows


def chance_chosen(orders):
    """The chance of each pair to be the one chosen: [S, P], equal shares among those tied for the first place."""
    first = orders == orders.max(1, keepdims=True)
    return first / first.sum(1, keepdims=True)


def chosen_pairs(order):
    """Numbers of the pairs tied for the first place."""
    return np.flatnonzero(order == order.max()).tolist()


# ------------------------------------------------------------------------------------------------------- the ledger

# Forward cost of the registered encoders in GFLOP, 2 a multiply-add: of a picture, counted by FlopCounterMode on the
# pinned timm models; of a token, twice the weights of the transformer's blocks (12 layers width^2).
PICTURE_GFLOP = {
    "vit_s16": 9.197, "deit_s16": 9.197, "deit3_s16": 9.197, "vit_b16": 35.13, "deit_b16": 35.13, "deit3-ft_b16": 35.13,
    "vit_l16": 123.1, "deit3-ft_l16": 382.1, "eva2-ft_l16": 723.5, "efflite0": 0.768, "efflite1": 1.198,
    "efflite2": 1.717, "control": 3.627,
}  # fmt: skip
TOKEN_GFLOP = {"minilm_l6": 0.0212, "minilm": 0.0425, "mpnet": 0.170, "roberta": 0.604}
TOKENS_A_WORD = 1.4


def ledger(method, data, pairs, reference):
    """What a method cost, the mean over its seeds: FLOPs as run, at the reference's batch size, and at its updates too;
    seconds, pair-samples, updates of a pair, rows embedded (rows x encoders), and the FLOPs with those of embedding.

    Embedding counts rows to train on and to choose by, or a selector's few, for each encoder; None where the cost of an
    encoder is not known.
    """
    names = unique(name for pair in pairs for name in pair)
    if method.runs:
        used = sum(
            len(rows) for rows in vlm.split_rows(data, method.runs[0].seed, method.runs[0].config["flags"].get("rows"))
        )
        each = [run_costs(run, data, reference) for run in method.runs]
        row = {key: float(np.mean([costs[key] for costs in each])) for key in each[0]}
        updates = [list(run.ledger["updates_per_pair"].values()) for run in method.runs]
        row |= {"updates_low": min(map(min, updates)), "updates_high": max(map(max, updates))}
        row |= {"batch_size": method.runs[0].ledger["batch_size"]}
    else:
        flops, used = method.cost["flops"], method.cost["rows"]
        row = {"flops": flops, "seconds": method.cost["seconds"], "pair_samples": used * len(pairs)}
        row |= {"flops_equal_batch": flops, "flops_equal_updates": flops}
        row |= {"updates_low": 0, "updates_high": 0, "batch_size": None}
    embedding = embedding_flops(data, names, used)
    with_embedding = None if embedding is None else row["flops"] + embedding
    row |= {"rows_embedded": used * len(names), "embedding_flops": embedding, "flops_with_embedding": with_embedding}
    return row


def run_costs(run, data, reference):
    """A run's FLOPs are samples x (connector + 4 B D_i for the logits), summed over pairs, and a rest: what a generator's
    parts save by being shared, which goes with the samples, or, of `mlp`, what it costs to predict, which goes with the
    steps."""
    batch, updates = run.ledger["batch_size"], run.ledger["updates_per_pair"]
    plain = at_reference = 0
    for image, text in run.ranks:
        widths = [data.encoders[text].dim] + [vlm.HIDDEN_DIM] * run.hidden_layers + [data.encoders[image].dim]
        samples, logits = batch * updates[f"{image}:{text}"], 4 * data.encoders[image].dim
        connector = vlm.connector_flops(1, list(zip(widths[1:], widths)))
        plain += samples * (connector + logits * batch)
        at_reference += samples * (connector + logits * reference["batch_size"])
    costs = {key: run.ledger[key] for key in ("flops", "seconds", "pair_samples")}
    if run.flags.get("closed_form"):
        return costs | {"flops_equal_batch": costs["flops"], "flops_equal_updates": costs["flops"]}
    steps = batch / reference["batch_size"] if run.flags.get("generator") == "mlp" else 1
    equal_batch = at_reference + (costs["flops"] - plain) * steps
    # At one batch size, updates of a pair go with its samples.
    samples = [ledger["pair_samples"] / len(ledger["updates_per_pair"]) for ledger in (reference, run.ledger)]
    return costs | {"flops_equal_batch": equal_batch, "flops_equal_updates": equal_batch * samples[0] / samples[1]}


def embedding_flops(data, names, rows):
    """Of `rows` rows through every encoder, or None if the cost of one is not known."""
    total = 0
    for name in names:
        encoder = data.encoders[name]
        known = vlm.ENCODERS.get(name)
        per = (PICTURE_GFLOP if encoder.kind == "image" else TOKEN_GFLOP).get(name)
        if per is None or known.spec != encoder.spec or (encoder.kind == "text" and not data.rows):
            return None
        if encoder.kind == "text":
            per *= 2 + TOKENS_A_WORD * words_a_caption(data)
        total += rows * per * 1e9
    return int(total)


@functools.cache
def words_a_caption(data):
    return sum(len(row["caption"].split()) for row in data.rows) / len(data.rows)


# ------------------------------------------------------------------------------------------------------- the figures

# Okabe and Ito's colours, told apart by the colour-blind, with markers that survive a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]


class Plot(NamedTuple):
    name: str  # of its .png and .csv
    caption: str
    figure: Figure
    rows: list  # of the CSV: dicts


def style_of(methods):
    """{method: (colour, marker)}: the runs filled, the selectors' colours the other way round."""
    return {method.name: (COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]) for k, method in enumerate(methods)}


def short(name):
    """A name that fits into a figure; its CSV has the whole."""
    return name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"


def heatmaps(judged, method, oracle, pairs, name):
    """The oracle's scores, the run's, and the difference: images down, texts across."""
    images, texts = unique(image for image, _ in pairs), unique(text for _, text in pairs)
    place = {pair: (images.index(pair[0]), texts.index(pair[1])) for pair in pairs}
    truth, own = (100 * judged.scores[each.name].mean(0) for each in (oracle, method))
    panels = [(f"oracle: {oracle.name}", truth), (method.name, own), ("difference", own - truth)]
    low, high = min(truth.min(), own.min()), max(truth.max(), own.max())
    down, across = list(map(short, images)), list(map(short, texts))
    upright = max(map(len, across)) > 9
    wide = 0.075 * max(map(len, down)) + 3 * (0.7 * max(3, len(texts)) + 0.2)
    tall = 0.75 + 0.36 * len(images) + (0.075 * max(map(len, across)) if upright else 0.2)
    figure = Figure(figsize=(wide, tall), layout="constrained")
    for k, (axis, (title, values)) in enumerate(zip(figure.subplots(1, 3, sharey=True), panels)):
        grid = np.full((len(images), len(texts)), np.nan)
        for pair, value in zip(pairs, values):
            grid[place[pair]] = value
        most = max(1e-9, np.abs(own - truth).max())
        limits = (
            {"cmap": "cividis", "vmin": low, "vmax": high} if k < 2 else {"cmap": "PuOr", "vmin": -most, "vmax": most}
        )
        drawn = axis.imshow(grid, aspect="auto", **limits)
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                shade = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.3, 0.59, 0.11))
                colour = "black" if shade > 0.5 else "white"
                said = f"{value:.1f}" if k < 2 else f"{round(value, 1) + 0.0:+.1f}"
                axis.text(column, row, said, ha="center", va="center", color=colour, fontsize=8)
        chosen = chosen_pairs((truth, method.orders.mean(0), truth)[k]) if k < 2 else []
        for number in chosen:
            row, column = place[pairs[number]]
            axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", lw=2.5))
        axis.set_title(textwrap.fill(title, 9 * max(3, len(texts))), fontsize=9)
        axis.set_xticks(range(len(texts)), across, rotation=90 if upright else 0, fontsize=8)
        axis.set_yticks(range(len(images)), down, fontsize=8)
        axis.tick_params(length=0)
    rows = [
        {"image": i, "text": t, "oracle": round(a, 3), "run": round(b, 3), "difference": round(b - a, 3)}
        for (i, t), a, b in zip(pairs, truth, own)
    ]
    caption = (
        f"{judged.name}, score in % of every pair: {oracle.name} (the oracle), {method.name}, and the difference in "
    )
    caption += "points. Boxed: the oracle's best on the task, and the pair that the run chose by validation rows."
    return Plot(name, caption, figure, rows)


def cost_against_regret(judged, rows, costs, styles, name):
    """Regret with its interval over FLOPs, without and with those of embedding."""
    panels = [("search alone", "flops"), ("with embedding", "flops_with_embedding")]
    panels = [(title, key) for title, key in panels if all(costs[row["method"]][key] is not None for row in rows)]
    figure = Figure(figsize=(3.4 * len(panels) + 2.6, 4.2), layout="constrained")
    for axis, (title, key) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        spent = {row["method"]: costs[row["method"]][key] / 1e12 for row in rows}
        least = min(value for value in spent.values() if value > 0)
        for row in rows:
            colour, marker = styles[row["method"]]
            free = spent[row["method"]] <= 0
            x = least / 4 if free else spent[row["method"]]
            error = [[max(0, row["regret"] - row["regret_low"])], [max(0, row["regret_high"] - row["regret"])]]
            face = colour if row["kind"] == "run" else "white"
            shown = row["method"] + (" (no FLOPs)" if free else "")
            axis.errorbar(
                x, row["regret"], error, fmt=marker, color=colour, mfc=face, ms=8, lw=1, capsize=2, label=shown
            )
        axis.axhline(rows[0]["regret_random"], color="grey", lw=1, ls=":", label="a random order")
        axis.set_xscale("log")
        few = max(spent.values()) > 30 * least
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"TFLOP, {title}")
        axis.grid(alpha=0.25)
    axis = figure.axes[0]
    axis.set_ylabel("regret, points")
    axis.set_ylim(bottom=-0.04 * axis.get_ylim()[1])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    keep = ("task", "method", "kind", "regret", "regret_low", "regret_high", "regret_random")
    table = [
        {key: row[key] for key in keep} | {key: costs[row["method"]][key] for key in ("flops", "flops_with_embedding")}
        for row in rows
    ]
    caption = (
        f"{judged.name}: what each way of choosing loses against what it costs (log axis; down and left is better). "
    )
    caption += "Bars: 95 % bootstrap interval. Filled: runs; open: selectors that train nothing."
    return Plot(name, caption, figure, table)


def rank_scatter(judged, methods, oracle, pairs, name):
    """A panel a method: the rank it gives a pair over the pair's true rank."""
    truth = rankdata(-judged.scores[oracle.name].mean(0))
    shown = [method for method in methods if np.ptp(method.orders)]
    if not shown:
        return None
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(2.15 * across + 0.4, 2.25 * down + 0.4), layout="constrained")
    axes, table = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat, []
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, method in zip(axes, shown):
        own = rankdata(-method.orders.mean(0))
        best = own == own.min()
        axis.plot([1, len(pairs)], [1, len(pairs)], color="grey", lw=0.8, ls=":")
        axis.scatter(truth[~best], own[~best], s=22, color=COLOURS[0], alpha=0.7, linewidths=0)
        axis.scatter(truth[best], own[best], s=46, color=COLOURS[1], marker="D")
        axis.set_title(textwrap.fill(method.name, 26), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.2)
        for (image, text), true, rank in zip(pairs, truth, own):
            table.append({"method": method.name, "image": image, "text": text, "true_rank": true, "rank": rank})
    figure.supxlabel("true rank (1: the best)", fontsize=9)
    figure.supylabel("rank given", fontsize=9)
    caption = f"{judged.name}: true rank of every pair and the rank each method gives it; ties at their average rank. "
    caption += "Diamond: the pair chosen."
    return Plot(name, caption, figure, table)


def looks_at(run):
    """[(epoch, {pair: R@10 on validation rows})] of a run's metrics.jsonl; one line only of a closed form."""
    lines = vlm.read_jsonl(run.folder / "metrics.jsonl")
    return [(line["epoch"], {pair: (six[2] + six[5]) / 2 for pair, six in line["recalls"].items()}) for line in lines]


def ranking_over_epochs(judged, methods, oracle, pairs, styles, name):
    """A panel a run: the rank of every pair at each look at the validation rows. Last: regret of the leading pair."""
    truth = judged.scores[oracle.name].mean(0).round(9)
    names = [":".join(pair) for pair in pairs]
    marked = [names[k] for k in np.argsort(-truth, kind="stable")[:3]] + [names[int(truth.argmin())]]
    trained = [method for method in methods if method.runs and len(looks_at(method.runs[0])) > 1]
    if not trained:
        return None
    across = len(trained) + 1 if len(trained) < 4 else 3
    down = math.ceil((len(trained) + 1) / across)
    figure = Figure(figsize=(2.5 * across, 2.6 * down + 0.5), layout="constrained")
    axes, table = list(figure.subplots(down, across, squeeze=False).flat), []
    for axis in axes[len(trained) + 1 :]:
        axis.set_visible(False)
    last = axes[len(trained)]
    for axis, method in zip(axes, trained):
        looks, lost = looks_at(method.runs[0]), []
        for epoch, recalls in looks:
            present = [pair for pair in names if pair in recalls]
            ranks = dict(zip(present, rankdata([-recalls[pair] for pair in present])))
            order = np.array([recalls.get(pair, -1.0) for pair in names])
            regret = fidelity(truth[None], order)["regret"][0]
            lost.append((epoch, regret))
            for pair, rank in ranks.items():
                table.append({"method": method.name, "epoch": epoch, "pair": pair, "rank": rank})
        for pair in [each for each in names if each not in marked] + unique(marked[::-1]):
            line = [(row["epoch"], row["rank"]) for row in table if (row["method"], row["pair"]) == (method.name, pair)]
            known = pair in marked
            colour = COLOURS[marked.index(pair)] if known else "#c4c4c4"
            axis.plot(
                *zip(*line),
                color=colour,
                lw=2 if known else 0.9,
                label=":".join(map(short, pair.split(":"))) if known else None,
            )
        axis.set_ylim(len(names) + 0.5, 0.5)
        axis.set_title(textwrap.fill(method.name, 34), fontsize=8)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=7)
        colour, _ = styles[method.name]
        last.plot(*zip(*lost), color=colour, lw=1.5, label=method.name)
    axes[0].set_ylabel("rank by validation R@10", fontsize=8)
    last.set_title("regret of the leading pair, points", fontsize=8)
    last.set_xlabel("epoch", fontsize=8)
    last.tick_params(labelsize=7)
    last.legend(fontsize=6.5, frameon=False)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = {"loc": "outside lower center", "ncols": 2, "fontsize": 8, "frameon": False}
    figure.legend(handles[::-1], labels[::-1], **legend)  # drawn last, so as to lie on top: the best
    caption = "Rank of every pair at each look at the validation rows (first seed). Coloured: the three truly best on "
    caption += f"{judged.name}, and the worst. Last panel: what stopping there would have cost."
    return Plot(name, caption, figure, table)


def loss_curves(methods, styles, name):
    figure = Figure(figsize=(7.6, 3.1), layout="constrained")
    (left, right), table = figure.subplots(1, 2), []
    for method in methods:
        for k, run in enumerate(method.runs):
            lines = vlm.read_jsonl(run.folder / "metrics.jsonl")
            colour, marker = styles[method.name]
            shown = {"color": colour, "lw": 1.3, "marker": marker, "ms": 3, "label": None if k else method.name}
            with_loss = [line for line in lines if "loss" in line]  # a closed form has none
            if with_loss:
                left.plot([line["epoch"] for line in with_loss], [line["loss"] for line in with_loss], **shown)
            right.plot([line["epoch"] for line in lines], [100 * line["val_recall10"] for line in lines], **shown)
            for line in lines:
                row = {"method": method.name, "seed": run.seed, "epoch": line["epoch"], "loss": line.get("loss")}
                table.append(row | {"val_recall10": line["val_recall10"], "seconds": line["seconds"]})
    for axis, title in ((left, "loss on training batches"), (right, "mean R@10 of the pairs on validation rows, %")):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.2)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return Plot(name, "Loss and validation recall of every run, a line a seed.", figure, table)


def correlation_spectra(judged, oracle, pairs, spectra, name):
    truth = judged.scores[oracle.name].mean(0).round(9)
    order = np.argsort(-truth, kind="stable")
    marked = list(order[:3]) + [order[-1]]
    figure = Figure(figsize=(6.4, 3.1), layout="constrained")
    axis, table = figure.subplots(), []
    for number in list(order[::-1]):
        known = number in marked
        colour = COLOURS[marked.index(number)] if known else "#c4c4c4"
        said = ":".join(map(short, pairs[number])) if known else None
        values = spectra[pairs[number]]
        axis.plot(range(1, len(values) + 1), values, color=colour, lw=1.8 if known else 0.8, label=said)
        image, text = pairs[number]
        table += [{"image": image, "text": text, "place": k + 1, "correlation": v} for k, v in enumerate(values)]
    axis.set_xlabel("canonical direction")
    axis.set_ylabel("correlation")
    axis.grid(alpha=0.2)
    axis.legend(*(part[::-1] for part in axis.get_legend_handles_labels()), fontsize=8, frameon=False)
    caption = "Canonical correlations of picture and caption embeddings between their leading principal components. "
    caption += f"Coloured: the three truly best pairs on {judged.name}, and the worst."
    return Plot(name, caption, figure, table)


# ------------------------------------------------------------------------------------------------------- the gallery


def gallery(tasks, run, pairs_shown, count=6):
    """(a table as HTML, rows of its CSV): real captions and their five nearest pictures, for each of `pairs_shown`:
    [(pair, why)]. Says so where there are no pictures to show."""
    task = next((task for task in tasks if task.kind == "retrieval" and task.data.manifest and task.data.rows), None)
    if task is None:
        return "<p>No task here has captions and pictures to show.</p>", []
    rows = [task.data.rows[i] for i in task.rows.tolist()]
    first = {}  # picture -> its first place among the rows
    for place, row in enumerate(rows):
        first.setdefault(row["image"], place)
    pictures, root = list(first), task.data.folder / task.data.manifest.get("root", ".")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    nearest = {}  # pair -> [queries][5] numbers of pictures
    for (image, text), _ in pairs_shown:
        texts = text_inputs(task, text)[drawn].float()
        vectors = F.normalize(image_inputs(task, image)[list(first.values())].float(), dim=1)  # [pictures, D_i]
        with torch.no_grad():
            mapped = map_texts(texts, load_connector(run, image, text, task.data), 1)
        nearest[image, text] = (mapped @ vectors.T).topk(min(5, len(pictures)), dim=1).indices.tolist()

    thumbnail = functools.cache(lambda picture: small_jpeg(root / picture))
    lines, table = [], []
    for q, place in enumerate(drawn):
        caption, line = rows[place]["caption"], f"<td class=caption>{html.escape(rows[place]['caption'])}</td>"
        right = {row["image"] for row in rows if row["caption"] == caption}
        for pair, _ in pairs_shown:
            line += "<td>"
            for nth, picture in enumerate(pictures[k] for k in nearest[pair][q]):
                alt, jpeg = html.escape(picture, quote=True), thumbnail(picture)
                tile = f'<img src="data:image/jpeg;base64,{jpeg}" alt="{alt}">' if jpeg else f"<small>{alt}</small>"
                line += f'<span class="tile{" right" if picture in right else ""}">{tile}</span>'
                found = {"picture": picture, "right": picture in right}
                table.append({"caption": caption, "pair": ":".join(pair), "place": nth + 1} | found)
            line += "</td>"
        lines.append(f"<tr>{line}</tr>")
    said = f"Captions of {task.name} drawn at random, and their five nearest of {len(pictures)} pictures, nearest first, by "
    body = f"<p>{html.escape(f'{said} the connectors of {run.folder}. Framed: a picture of that caption.')}</p>"
    if lost := sum(thumbnail(picture) is None for picture in {row["picture"] for row in table}):
        said = f"{lost} pictures are not to be had under {root}; their names stand for them."
        body += f"<p class=warning>{html.escape(said)}</p>"
    heads = "".join(f"<th>{html.escape(':'.join(pair))}: {html.escape(why)}</th>" for pair, why in pairs_shown)
    return body + f"<table class=gallery><tr><th>caption</th>{heads}</tr>{''.join(lines)}</table>", table


def small_jpeg(path):
    """A thumbnail as base64, or None for a picture that is missing or unreadable."""
    try:
        picture = vlm.open_image(path)
        picture.thumbnail((112, 112))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80)
    except Exception:  # Pillow's errors are of many types, and none may stop a report
        return None
    return base64.b64encode(jpeg.getvalue()).decode()


# -------------------------------------------------------------------------------------------------------- the report

CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
.named td:nth-child(2) { overflow-wrap: anywhere; max-width: 13rem }
.answer { font-size: 1.15rem; border-left: .35rem solid #0072B2; padding: .3rem .9rem; background: #f3f7fa }
.warning { border-left: .35rem solid #D55E00; padding: .2rem .9rem; background: #fdf4ee }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .8rem; margin: .6rem 0 }
th, td { padding: .22rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e2e2e2 }
th:first-child, td:first-child, .words td, .words th,
.named td:nth-child(2), .named th:nth-child(2), .pairs td:nth-child(-n + 3), .pairs th:nth-child(-n + 3) { text-align: left }
th { border-bottom: 1.5px solid #777; vertical-align: bottom }
td small { color: #555; display: block; white-space: nowrap } tr.chosen td { font-weight: 600 }
figure { margin: 1.2rem 0 } figure img { max-width: 100%; height: auto }
figcaption { font-size: .85rem; color: #333 } .gallery td, .gallery th { text-align: left }
.gallery td { white-space: nowrap }
.gallery td + td + td, .gallery th + th + th { border-left: 1.5px solid #777; padding-left: .8rem }
.gallery td.caption { white-space: normal; min-width: 6rem; max-width: 11rem; overflow-wrap: anywhere }
.tile { display: inline-block; width: 4.4rem; height: 4.4rem; margin: 2px; border: 1px solid #ddd; text-align: center;
        vertical-align: top; overflow: hidden; white-space: normal; overflow-wrap: anywhere }
.tile img { max-width: 100%; max-height: 100% } .tile.right { border: 3px solid #D55E00; border-bottom-width: 8px }
code { font-size: .9em; overflow-wrap: anywhere } a { color: #0072B2 }
@page { size: A4; margin: 14mm }
@media print { body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0 } table { font-size: 6.6pt }
  th, td { padding: .12rem .28rem } .scroll { overflow: visible } figure, tr { page-break-inside: avoid }
  figure img { max-height: 11.5cm; object-fit: contain; object-position: left }
  h2 { page-break-after: avoid } .tile { width: 1.35cm; height: 1.35cm }
  .gallery td.caption { min-width: 2cm; max-width: 3cm }
  .answer, .warning, .tile { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""
HEADS = {
    "regret": "regret, points", "top1": "top-1 hit", "recall3": "recall@3", "ndcg1": "NDCG@1", "ndcg3": "NDCG@3",
    "ndcg5": "NDCG@5", "ndcg": "NDCG, all", "spearman": "Spearman", "tau": "Kendall tau-b",
}  # fmt: skip


def number(value, digits=2):
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no minus before a zero


def flops(value):
    """In TFLOP, three figures."""
    return "–" if value is None else f"{value / 1e12:.3g}" if value < 1e15 else f"{value / 1e12:,.0f}"


def html_table(heads, rows, classes=None, kind=""):
    """Cells are text, or (text, small print), all escaped here."""

    def cell(value):
        text, small = value if isinstance(value, tuple) else (value, "")
        return html.escape(str(text)) + (f"<small>{html.escape(small)}</small>" if small else "")

    body = "<thead><tr>" + "".join(f"<th>{cell(head)}</th>" for head in heads) + "</tr></thead>"
    for k, row in enumerate(rows):
        name = f' class="{classes[k]}"' if classes and classes[k] else ""
        body += f"<tr{name}>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>\n"
    return f'<div class=scroll><table class="{kind}">{body}</table></div>'


def choice(row, pairs):
    """The pair that a method chose, in words; a tie and seeds that disagree are said."""
    names = [":".join(pairs[k]) for k in row["chosen"]]
    if row["seeds"] > 1 and len(names) > 1:
        return f"{names[0]} or {names[1]}, by seed" if len(names) == 2 else f"{len(names)} pairs, by seed"
    return names[0] if len(names) == 1 else f"a tie of {len(names)}"


def fidelity_table(rows, pairs):
    lines = []
    for row in rows:
        line = [row["method"], choice(row, pairs)]
        for name in HEADS:
            line.append((number(row[name]), f"{number(row[f'{name}_low'])}–{number(row[f'{name}_high'])}"))
        lines.append(line)
    return html_table(["chosen by", "pair", *HEADS.values()], lines, [row["kind"] for row in rows], "named")


def own_table(rows):
    """How good the connectors of each run are beside the oracle's."""
    heads = ["run", "seeds", "score of its own connector, %", "own less oracle's, all pairs", "best third"]
    keys = ("own_score", "gap_all", "gap_top_third")
    lines = [[row["method"], row["seeds"], *(number(row[key], 1) for key in keys)] for row in rows if row["seeds"]]
    return html_table(heads, lines)


def cost_table(methods, costs, oracle):
    base, lines = costs[oracle.name], []
    for method in methods:
        cost = costs[method.name]
        ways = ("flops", "flops_equal_batch", "flops_equal_updates", "flops_with_embedding")
        low, high = cost["updates_low"], cost["updates_high"]
        whole = cost["flops_with_embedding"]
        lines.append(
            {"method": method.name}
            | dict(
                zip(
                    ("TFLOP as run", "at equal batch", "and at equal updates", "with embedding"),
                    (flops(cost[w]) for w in ways),
                )
            )
            | {"x oracle, equal batch": number(cost["flops_equal_batch"] / base["flops_equal_batch"], 3)}
            | {"x oracle, with embedding": number(whole and whole / base["flops_with_embedding"], 3)}
            | {"seconds": number(cost["seconds"], 1), "pair-samples": number(cost["pair_samples"], 0)}
            | {"updates a pair": f"{low}" if low == high else f"{low} to {high}", "batch": cost["batch_size"] or "–"}
            | {"rows embedded": number(cost["rows_embedded"], 0)}
        )
    return html_table(list(lines[0]), [list(line.values()) for line in lines])


def advise(found):
    """One sentence: the pair to stitch, how sure that is, what it cost."""
    judged, oracle, primary, pairs, chosen = found.judged[0], found.oracle, found.primary, found.pairs, found.chosen
    truth, truths = true_scores(judged, oracle, found.drawn)  # [P], [R, P]
    best, top = truths == truths.max(1, keepdims=True), int(truth.argmax())
    sure = (best[:, chosen] / best.sum(1)).mean()
    low, high = np.percentile(truths - truths[:, [chosen]], [2.5, 97.5], axis=0)  # [P] the others to the chosen
    order = [k for k in np.argsort(-truth, kind="stable") if k != chosen]
    image, text = pairs[chosen]
    said = f"Stitch {image} with {text} (mlp{primary.runs[0].hidden_layers}), the choice of {primary.name}"
    ties = len(chosen_pairs(primary.orders.mean(0))) - 1
    said += f" (tied with {ties} more)" if ties else ""
    said += f": {100 * truth[chosen]:.1f} % on {judged.name}, "
    if truth[chosen] < truth[top]:
        said += f"{100 * (truth[top] - truth[chosen]):.1f} points below {':'.join(pairs[top])}; "
    seeds = f" and {len(oracle.runs)} seeds" if len(oracle.runs) > 1 else ""
    said += f"it is the best of {len(pairs)} in {100 * sure:.0f} % of resamples of {judged.counted}{seeds}"
    for words, some in (
        ("clearly better", [k for k in order if low[k] > 0]),
        ("within noise", [k for k in order if low[k] <= 0 <= high[k]]),
    ):
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        said += f"; {words}: {', '.join(':'.join(pairs[k]) for k in some[:3])}{more}" if some else ""
    cost = found.costs[primary.name]
    said += f"; {flops(cost['flops'])} TFLOP in {cost['seconds']:.0f} s"
    if oracle is not primary:
        ratio = cost["flops_equal_batch"] / found.costs[oracle.name]["flops_equal_batch"]
        said += f", {ratio:.2g}x of {oracle.name} at equal batch size"
    return said + "."


def print_table(rows, costs, oracle, pairs):
    """A line a method, as the trainers print their rankings."""
    wide = max(len(row["method"]) for row in rows)
    base = costs[oracle.name]["flops_equal_batch"]
    print(
        f"{'':{wide}}  regret, points (95 %)  top-1   R@3  NDCG@3  Spearman  tau-b    TFLOP        s  x oracle  chosen"
    )
    for row in rows:
        cost = costs[row["method"]]
        regret = f"{row['regret']:6.2f} ({row['regret_low']:.2f} to {row['regret_high']:.2f})"
        six = f"{row['top1']:7.2f}{row['recall3']:6.2f}{row['ndcg3']:8.2f}{row['spearman']:10.2f}{row['tau']:7.2f}"
        spent = f"{flops(cost['flops']):>9}{cost['seconds']:9.1f}{cost['flops_equal_batch'] / base:10.3f}"
        print(f"{row['method']:{wide}}  {regret:21}{six}{spent}  {choice(row, pairs)}")


def ranking_rows(judged, found):
    """ranking.csv: a row a task and pair, truly best first: true score in points, its interval, every method's rank, and
    the score of every run's own connector."""
    table, pairs = [], found.pairs
    for each in judged:
        truth, truths = (100 * values for values in true_scores(each, found.oracle, found.drawn))
        low, high = np.percentile(truths, [2.5, 97.5], axis=0)
        ranks = {method.name: rankdata(-method.orders.mean(0)) for method in found.methods}
        for k in np.argsort(-truth, kind="stable"):
            row = {"task": each.name, "image": pairs[k][0], "text": pairs[k][1], "true_rank": rankdata(-truth)[k]}
            row |= {"true_score": round(truth[k], 3), "low": round(low[k], 3), "high": round(high[k], 3)}
            row |= {f"rank by {name}": values[k] for name, values in ranks.items()}
            own = {name: round(100 * values.mean(0)[k], 3) for name, values in each.scores.items()}
            table.append(row | {f"score of {name}": value for name, value in own.items()})
    return table


def ranking_table(judged, found):
    runs, lines = [method for method in found.methods if method.runs], []
    table = ranking_rows([judged], found)
    for row in table:
        score_and_interval = number(row["true_score"], 1), f"{row['low']:.1f} to {row['high']:.1f}"
        line = [f"{row['true_rank']:g}", row["image"], row["text"], score_and_interval]
        lines.append(
            line + [(number(row[f"score of {m.name}"], 1), f"rank {row[f'rank by {m.name}']:g}") for m in runs]
        )
    classes = ["chosen" if (row["image"], row["text"]) == found.pairs[found.chosen] else "" for row in table]
    return html_table(["true rank", "image", "text", "true score, %", *(m.name for m in runs)], lines, classes, "pairs")


class Findings(NamedTuple):
    """All that the report is made of."""

    pairs: list  # (image, text)
    methods: list
    oracle: Method  # whose connectors are the truth
    primary: Method  # whose choice is advised
    chosen: int  # the number of that pair
    judged: list  # the mean of the tasks first, if there are several
    drawn: dict  # method -> [R, S] weights of the seeds
    fidelities: list  # of each in `judged`, a row a method
    costs: dict  # method -> its row of the ledger
    spectra: dict  # pair -> canonical correlations
    warnings: list


def compose(found, tasks, flags):
    """(the answer in a sentence; the report from top to bottom: HTML and plots; rows of the gallery's CSV)."""
    judged, methods, oracle, primary, pairs = found.judged, found.methods, found.oracle, found.primary, found.pairs
    styles, runs, sentence = style_of(methods), [method for method in methods if method.runs], advise(found)
    connector = primary.runs[0].connector(*pairs[found.chosen])
    body = ["<h1>Which pair to stitch</h1>", f"<p class=answer>{html.escape(sentence)}</p>"]
    body += [f"<p>Its connector: <code>{html.escape(str(connector))}</code></p>"]
    body += [f"<p class=warning>{html.escape(line)}</p>" for line in found.warnings]
    for place, (each, rows) in enumerate(zip(judged, found.fidelities)):
        about = f"{each.headline}; {each.counted}" + (f". Protocol: {each.protocol}" if each.protocol else "")
        body += [f"<h2>{html.escape(each.name.capitalize())}</h2>", f"<p>{html.escape(about)}.</p>"]
        body += [fidelity_table(rows, pairs)]
        if place == 0:
            body += [f"<p>{html.escape(READING.format(oracle.name, len(oracle.runs), flags.bootstrap))}</p>"]
        body += [own_table(rows), cost_against_regret(each, rows, found.costs, styles, f"cost-regret-{place}")]
        if place == 0:
            body += ["<h3>Every pair</h3>", ranking_table(each, found)]
            body += [rank_scatter(each, methods, oracle, pairs, f"ranks-{place}")]
        beside = [method for method in runs if method is not oracle] or [oracle]
        for k, method in enumerate(beside if place == 0 else [primary]):
            body += [heatmaps(each, method, oracle, pairs, f"heatmap-{place}-{k}")]
    body += ["<h2>What it cost</h2>", cost_table(methods, found.costs, oracle), f"<p>{html.escape(COSTS)}</p>"]
    body += ["<h2>Over the epochs</h2>"]
    body += [ranking_over_epochs(judged[0], methods, oracle, pairs, styles, "ranking-over-epochs")]
    body += [loss_curves(runs, styles, "loss")]
    if found.spectra:
        body += ["<h2>Before any training</h2>"]
        body += [correlation_spectra(judged[0], oracle, pairs, found.spectra, "canonical-correlations")]
    worst = pairs[int(judged[0].scores[oracle.name].mean(0).argmin())]
    shown = [(pairs[found.chosen], "the pair to stitch"), (worst, "the worst")]
    tiles, table = gallery(tasks, primary.runs[0], shown)
    heads, lines = ["run", "method", "seed", "commit", "torch", "device", "started"], []
    for method in runs:
        for run in method.runs:
            known = [run.config.get(key) or "–" for key in ("commit", "device", "started")]
            torch_version = run.config.get("versions", {}).get("torch", "–")
            lines.append([run.folder, method.name, run.seed, known[0], torch_version, *known[1:]])
    body += ["<h2>What the best and the worst pair find</h2>", tiles]
    body += ["<h2>Where it comes from</h2>", html_table(heads, lines, kind="words")]
    return sentence, [item for item in body if item is not None], table


READING = (
    "True score: what the connectors of the oracle ({0}, seeds: {1}) score on the task. Runs order the pairs by "
    "validation rows, selectors by training rows: no order has seen the rows that judge it, unless a warning says so. "
    "Small print: the 95 % interval over {2} resamples of the task's pictures and of the seeds; the best of many noisy "
    "scores is too high, so intervals of regret lean upwards. NDCG's gain is the true score minus the worst pair's. Ties "
    "in an order are broken at random, in expectation; the last line is a random order's."
)
COSTS = (
    "As run; at the oracle's batch size (the share of the logits grows with the batch); and at its updates of each pair "
    "too. A run's cost is one seed's. Selectors train nothing, so theirs does not change. Rows embedded: rows times "
    "encoders. Embedding is the forward pass of those rows, captions at "
    f"{TOKENS_A_WORD} tokens a word, and – where an encoder's cost is not known; its seconds are not recorded."
)


def selector_lines(found):
    """selectors.csv: a row a task and method, runs and selectors alike, with every metric and cost."""
    lines = []
    for row in (row for rows in found.fidelities for row in rows):
        row = row | {"chosen": " ".join(":".join(found.pairs[k]) for k in row["chosen"])} | found.costs[row["method"]]
        lines.append({key: round(float(v), 6) if isinstance(v, float) else v for key, v in row.items()})
    return lines


def write_report(out, title, body, tables, results):
    """Writes every file of the report; what an earlier report left under a name of its own goes.

    body: HTML and plots, top to bottom. tables: {file name: rows}. results: what results.json holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    earlier = vlm.read_json(out / "results.json").get("files", []) if (out / "results.json").is_file() else []
    sections, files = [], ["report.html", "results.json"]
    for item in body:
        if isinstance(item, Plot):
            png = io.BytesIO()
            item.figure.savefig(png, dpi=160, metadata={"Software": None})
            with vlm.atomic_file(out / f"{item.name}.png") as file:
                file.write(png.getvalue())
            tables |= {f"{item.name}.csv": item.rows}
            files.append(f"{item.name}.png")
            wide = int(item.figure.get_figwidth() * 96)
            source, alt = base64.b64encode(png.getvalue()).decode(), html.escape(item.caption, quote=True)
            links = f'<a href="{item.name}.png">PNG</a>, <a href="{item.name}.csv">CSV</a>'
            picture = f'<img width="{wide}" src="data:image/png;base64,{source}" alt="{alt}">'
            sections.append(
                f"<figure>{picture}<figcaption>{html.escape(item.caption[:1].upper() + item.caption[1:])} ({links})</figcaption></figure>"
            )
        else:
            sections.append(item)
    for name, rows in tables.items():
        if rows:
            vlm.write_csv(out / name, rows)
            files.append(name)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    head += '<meta name=viewport content="width=device-width, initial-scale=1">'
    vlm.write_text(out / "report.html", f"{head}<style>{CSS}</style><body>{''.join(sections)}</body></html>\n")
    vlm.write_json(out / "results.json", {"files": files} | results)
    for name in set(earlier) - set(files):
        if re.fullmatch(r"[\w-]+\.(png|csv)", name):
            (out / name).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- main

DEMO = {
    "demo-hyma": ["train_hyma.py", "--pairs", "all"],
    "demo-halving": ["train_grid.py", "--halving"],
    "demo-ridge": ["train_grid.py", "--closed-form", "ridge"],
    "demo-grid": ["train_grid.py", "--seeds", "0", "1"],
}


def run_demo(device):
    """The demo's run folders on the sample; those that are finished already are taken as they are."""
    folders = []
    for name, (script, *arguments) in DEMO.items():
        out = Path("runs") / name
        made = [out.with_name(f"{name}-s{seed}") for seed in (0, 1)] if name == "demo-grid" else [out]
        if not all((folder / "ledger.json").is_file() for folder in made):
            started = any((folder / "config.json").is_file() for folder in made)
            command = [sys.executable, str(Path(__file__).parent / script), "--out", str(out)]
            command += ["--resume"] if started else [*arguments, "--device", str(device)]
            print(f"demo: {script} {' '.join(command[2:])}", flush=True)
            if code := subprocess.run(command).returncode:
                raise BadInput(f"--demo: {script} ended with status {code}; what it said is above")
        folders += made
    return folders


def default_runs():
    """The newest finished run."""
    newest = sorted(Path("runs").glob("*/ledger.json"), key=lambda path: path.stat().st_mtime)
    if not newest:
        raise BadInput("runs/ holds no finished run; make one: python train_hyma.py --pairs all, or see --demo")
    return [newest[-1].parent]


def choose_oracle(methods, named):
    """(the method whose connectors are the truth, the method that is advised by, lines of warning).

    named: the folders of --oracle. Without, the truth is a full grid, one with connectors as deep as the first run's if
    there is one, or else the first run's own.
    """
    full = [m for m in methods if all(str(r.folder) in named if named else is_full_grid(r) for r in m.runs)]
    if len(full) > 1 and named:
        raise BadInput(f"--oracle {' '.join(sorted(named))}: must be seeds of one method, the same flags otherwise")
    primary = next((method for method in methods if method not in full), methods[0])
    if full:
        alike = [method for method in full if method.runs[0].hidden_layers == primary.runs[0].hidden_layers]
        return (alike or full)[0], primary, []
    said = f"no oracle: the truth is {primary.name}'s own connectors, which cannot show what it has missed; add the "
    return primary, primary, [said + "runs of train_grid.py with its whole budget, or name others with --oracle"]


def open_all_tasks(flags, runs, data):
    if flags.task:
        return [task for name, folder in flags.task.items() for task in open_tasks(name, folder, flags)], []
    if not any(row.get("split") == "test" for row in data.rows or []):
        seeds = sorted({run.seed for run in runs})
        if len(seeds) > 1 and not any(row.get("split") for row in data.rows or []):
            said = f"{data.folder}: has no split column, so that seeds {' and '.join(map(str, seeds))} set other rows aside"
            raise BadInput(f"{said}; name a --task, or give runs of one seed")
        said = f"{data.folder} has no test split: the validation rows that chose the connectors also judge them; name a --task"
        return open_tasks(None, data.folder, flags, runs[0].seed), [said]
    return open_tasks(None, data.folder, flags, runs[0].seed), []


def main():
    flags = parse_flags()
    folders = run_demo(flags.device) if flags.demo else flags.runs or default_runs()
    runs = [open_run(folder) for folder in unique(os.path.normpath(folder) for folder in [*folders, *flags.oracle])]
    oracles = {os.path.normpath(folder) for folder in flags.oracle}
    pairs = list(next(run for run in runs if len(oracles) == len(runs) or str(run.folder) not in oracles).ranks)
    data = open_embeddings(runs, flags.data)
    pairs = [pair for pair in vlm.choose_pairs(data, ["all"]) if pair in pairs]
    for run in runs:
        if missing := [":".join(pair) for pair in pairs if pair not in run.ranks]:
            said = f"{run.folder}: has no {missing[0]} ({len(missing)} pairs missing of {len(pairs)})"
            raise BadInput(f"{said}; compare runs of the same pairs")
    methods = group_runs(runs, pairs, oracles)
    oracle, primary, warnings = choose_oracle(methods, oracles)
    tasks, said = open_all_tasks(flags, runs, data)
    warnings += said

    results = []
    judged = score_runs(tasks, methods, pairs, data, flags, results)
    if len(judged) > 1:
        judged = [mean_of_tasks(judged), *judged]

    spectra = {}
    if flags.selector_rows:
        train_rows, _ = vlm.split_rows(data, runs[0].seed)
        rows = selector_rows(data, train_rows, flags.selector_rows)
        selectors, spectra, alike = run_selectors(data, pairs, rows, flags.device)
        methods, warnings = methods + selectors, warnings + alike
    methods.append(Method("random order", np.zeros((1, len(pairs))), [], {"flops": 0, "seconds": 0.0, "rows": 0}))
    drawn = draw_seeds(methods, flags.bootstrap)
    warnings += [line for each in judged for line in at_chance(each, oracle, drawn)]
    fidelities = [judge(each, methods, oracle, drawn) for each in judged]
    costs = {method.name: ledger(method, data, pairs, oracle.runs[0].ledger) for method in methods}
    chosen = chosen_pairs(primary.orders.mean(0))[0]
    found = Findings(pairs, methods, oracle, primary, chosen, judged, drawn, fidelities, costs, spectra, warnings)

    sentence, body, shown = compose(found, tasks, flags)
    about = {"answer": sentence, "warnings": warnings, "oracle": oracle.name, "results": results}
    lines = selector_lines(found)
    about |= {"methods": lines, "made": vlm.provenance(flags.device)}
    tables = {"ranking.csv": ranking_rows(judged, found), "selectors.csv": lines, "gallery.csv": shown}
    write_report(flags.out, f"Stitch {':'.join(pairs[chosen])}", body, tables, about)

    print(f"\n{judged[0].name}, {judged[0].counted}; truth: {oracle.name}, seeds: {len(oracle.runs)}")
    print_table(fidelities[0], costs, oracle, pairs)
    for line in warnings:
        print(f"warning: {line}")
    print(f"\n{sentence}")
    print(f"connector: {primary.runs[0].connector(*pairs[chosen])}\nreport: {flags.out / 'report.html'}")


if __name__ == "__main__":
    vlm.run_script(main)
