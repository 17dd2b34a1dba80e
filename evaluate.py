"""Which encoder pair to stitch, how sure that is, what it cost: runs and selectors judged by their own connectors.

    python evaluate.py                                             # the newest run, on its data's test rows
    python evaluate.py runs/hyma runs/halving runs/grid-s0 runs/grid-s1        # the full grid's runs are the oracle
    python evaluate.py runs/hyma --oracle runs/grid-s* --task coco=embeddings/coco --task in1k=embeddings/in1k
    python evaluate.py --demo                                      # makes runs of every kind on the sample first

It knows connectors and embeddings only: RUN may be a folder of connectors alone, as published, with --task. The true
score of a pair on a task is what the oracle's connector scores there, the mean over the oracle's seeds. Every way of
choosing a pair (a run's ranking.csv, which no test row has seen, or a selector that trains nothing) is judged by what its
choice loses against the best: regret, in points. Retrieval leads the report, as connectors are trained for it; other
tasks follow. Writes report/: report.html with every figure inside, results.json, ranking.csv, selectors.csv, and each
figure as PNG and CSV.

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
import itertools
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
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
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
    about = "runs whose connectors are the truth, a seed each (default: full grids among RUN)"
    add("--oracle", nargs="+", type=Path, default=[], metavar="RUN", help=about)
    about = "an embedding folder to score on; repeatable (default: the runs' own data, its test rows)"
    add("--task", action="append", default=[], metavar="NAME=FOLDER", help=about)
    add("--data", type=Path, metavar="FOLDER", help="the runs' embedding folder, where it has moved")
    add("--out", type=Path, default=Path("report"), help="folder of the report (default: %(default)s)")
    add("--templates", default="1", help="prompts of a class: 1, 80 or a file of lines with {} (default: %(default)s)")
    add("--weights", nargs="+", default=[], metavar="NAME=PATH", help="a text encoder's folder, instead of the hub")
    add("--bootstrap", type=int, default=1000, help="resamples behind every interval (default: %(default)s)")
    about = "training rows that selectors see; 0: no selectors (default: %(default)s)"
    add("--selector-rows", type=int, default=2000, help=about)
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
        raise BadInput("--demo: makes its own runs on the sample; RUN, --oracle, --task and --data do not go with it")
    flags.device = vlm.pick_device(flags.device)
    return flags


# ----------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """A finished run folder, or a folder of connectors alone, as published: that has no ledger and ranks no pair."""

    folder: Path
    config: dict
    ledger: dict | None
    ranks: dict  # (image, text) -> rank in ranking.csv, 1 the best; equals share a rank
    seed: int
    hidden_layers: int

    @property
    def flags(self):
        return self.config["flags"]

    def connector(self, image, text):
        """The path of a pair's connector."""
        return connectors_folder(self.folder) / vlm.connector_name(image, self.hidden_layers, text)


def connectors_folder(folder):
    return folder / "connectors" if (folder / "connectors").is_dir() else folder


def open_run(folder) -> Run:
    """Reads a run folder. Raises BadInput if it is none, is unfinished or lacks a connector."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return open_connectors(folder)
    config = vlm.read_json(folder / "config.json")
    try:
        script, seed = config["script"], config.get("seed", config["flags"].get("seed", 0))
        hidden_layers = int(config["flags"]["connector"][-1])
        config["embeddings"].items()
        if not (folder / "ledger.json").is_file():
            said = f"is not finished (no ledger.json); go on: python {script} --resume --out {folder}"
            raise BadInput(f"{folder}: {said}")
        ledger = vlm.read_json(folder / "ledger.json")
        for key in ("batch_size", "pair_samples", "flops", "logit_flops", "seconds"):
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


def open_connectors(folder) -> Run:
    """A folder of connectors and nothing else. Its pairs share a rank, as nothing says how they were chosen."""
    names = [vlm.read_connector(path)[:3] for path in sorted(connectors_folder(folder).glob("*_mlp?_*.pt"))]
    if not names:
        said = "holds no run (no config.json) and no connectors; make a run with train_hyma.py or train_grid.py"
        raise BadInput(f"{folder}: {said}")
    depths = sorted({hidden_layers for _, hidden_layers, _ in names})
    if len(depths) > 1:
        raise BadInput(f"{folder}: holds connectors of {depths} hidden layers; keep one kind a folder")
    config = {"script": None, "flags": {"connector": f"mlp{depths[0]}"}, "embeddings": {}}
    return Run(folder, config, None, {(image, text): 1 for image, _, text in names}, 0, depths[0])


def open_embeddings(runs, flags) -> vlm.Embeddings:
    """The embeddings that all the runs were trained on. Raises BadInput if they differ or have changed since."""
    homes, digests = [run.flags["data"] for run in runs if run.ledger], {}
    if not (flags.data or homes or flags.task):
        raise BadInput(f"{runs[0].folder}: holds connectors alone; say what to score them on: --task NAME=FOLDER")
    if homes and not flags.data and not Path(homes[0]).is_dir():
        raise BadInput(f"{homes[0]}: no such folder from here; say where the runs' embeddings are: --data FOLDER")
    data = vlm.Embeddings(flags.data or [*homes, *flags.task.values()][0])
    for run in runs:
        for name in unique(name for pair in run.ranks for name in pair):
            digest = run.config["embeddings"].get(name)  # None of connectors alone
            if digest and digests.setdefault(name, digest) != digest:
                said = f"was trained on another {name}.pt than the runs before it; compare runs of one"
                raise BadInput(f"{run.folder}: {said}")
            if name not in data.encoders:
                raise BadInput(f"{data.folder}: has no {name}, which {run.folder} is for; name the folder: --data")
            if digest and data.fingerprint([name])[name] != digest:
                said = f"is not what {run.folder} was trained on (sha256); train again"
                raise BadInput(f"{data.folder}/{name}.pt: {said}")
    return data


def is_full_grid(run):
    """Whether it is an oracle: every pair trained from nothing, with the whole budget, on all rows."""
    less = any(run.flags.get(name) for name in ("halving", "closed_form", "from", "rows"))
    return run.config["script"] == "train_grid.py" and run.flags.get("budget_of") == "full" and not less


# What does not make a run another method's: where it is, what it ran on, its seed.
INCIDENTAL = {"seed", "seeds", "out", "data", "device", "precision", "shard", "pairs", "pairs_per_pass", "resume"}


def recipe(run):
    """The flags that make the method; runs that share them differ in their seed alone."""
    kept = {name: value for name, value in run.flags.items() if value and name not in INCIDENTAL}
    for name in ("budget_of", "from"):
        if kept.get(name, "full") != "full":
            kept[name] = "a run"  # of several seeds' runs, each has another's
    return {"script": run.config["script"]} | kept


def label(run):
    flags = run.flags
    if not run.ledger:
        return f"connectors in {run.folder}"
    if run.config["script"] == "train_hyma.py":
        name = f"hyma {flags.get('generator')}"
    else:
        name = flags.get("closed_form") or ("halving" if flags.get("halving") else "grid")
    name += f" mlp{run.hidden_layers}"
    name += f", FLOPs of {Path(flags['budget_of']).name}" if flags.get("budget_of", "full") != "full" else ""
    name += f", from {Path(flags['from']).name}" if flags.get("from") else ""
    return name + (f", {flags['rows']} rows" if flags.get("rows") else "")


class Method(NamedTuple):
    """A way of choosing a pair: a run of one or more seeds, or a selector."""

    name: str
    orders: np.ndarray  # [S, P] a row a seed: higher is better, equals are ties
    runs: list  # [S] the seeds' runs; none of a selector
    cost: dict  # of a selector: flops, seconds, rows

    @property
    def trained(self):
        return bool(self.runs and self.runs[0].ledger)


def group_runs(runs, pairs, oracles=()):
    """Methods of the runs: those that differ only in their seed are one, but for a seed of --oracle and one beside it.
    Those of one label are told apart by their folders."""

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
    methods, labels = [], Counter(label(group[0]) for group in groups)
    for group in groups:
        name = label(group[0])
        name += f" ({group[0].folder})" if labels[name] > 1 else ""
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


# Each takes features, {encoder: [n, D], centred}, and pairs, and gives {pair: score}.


def linear_cka(features, pairs):
    """Centred kernel alignment of linear kernels (Kornblith et al., arXiv 1905.00414, eq. 4): 0 to 1."""
    own = {name: (x.T @ x).norm() for name, x in features.items()}
    return {(i, t): ((features[i].T @ features[t]).norm() ** 2 / (own[i] * own[t])).item() for i, t in pairs}


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
    return {(i, t): (hsic(features[i], features[t]) / (own[i] * own[t])).item() for i, t in pairs}


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
    shared = {(i, t): (nearest[i][:, :, None] == nearest[t][:, None]).sum().item() for i, t in pairs}
    return {(i, t): count / nearest[i].numel() for (i, t), count in shared.items()}


def canonical_correlations(features, pairs, spectra=None):
    """Mean squared canonical correlation between the leading principal components of both sides, as many on each side
    (Raghu et al., arXiv 1706.05806). spectra: a dict that gets each pair's correlations, largest first."""
    axes, count = {}, min(COMPONENTS, len(next(iter(features.values()))) // 5, *(x.shape[1] for x in features.values()))
    for name, x in features.items():
        values, vectors = torch.linalg.eigh(x.T @ x)
        kept = values[-count:] > 1e-6 * values[-1]  # of a side with fewer dimensions than that, the others are zero
        axes[name] = x @ vectors[:, -count:] * (kept / values[-count:].clamp(min=1e-12).sqrt())  # [n, count]
    found = {(i, t): torch.linalg.svdvals(axes[i].T @ axes[t]).clamp(max=1) for i, t in pairs}
    if spectra is not None:
        spectra |= {pair: values.tolist() for pair, values in found.items()}
    return {pair: values.square().mean().item() for pair, values in found.items()}


def ridge_probe(features, pairs, held_out):
    """R@10, both directions, of ridge regression from captions to pictures, on the fifth of the rows it has not seen."""
    cut, factors = len(next(iter(features.values()))) - len(held_out.rows), {}
    for text in unique(text for _, text in pairs):
        x = features[text][:cut]
        factors[text] = torch.linalg.cholesky(vlm.regularised(x.T @ x, STRENGTH))
    values = {}
    for image, text in pairs:
        weight = torch.cholesky_solve(features[text][:cut].T @ features[image][:cut], factors[text])  # [D_t, D_i]
        values[image, text] = recall10(held_out, features[text][cut:] @ weight, features[image][cut:])
    return values


def relative_representations(features, pairs, held_out):
    """R@10, both directions, of rows described by their similarities to the other rows' pictures, or captions (ASIF,
    Norelli et al., arXiv 2210.01738): the largest kept, raised to a power."""
    cut, described = len(next(iter(features.values()))) - len(held_out.rows), {}
    for name, x in features.items():
        x = F.normalize(x, dim=1)
        scores = (x[cut:] @ x[:cut].T).clamp(min=0)  # [held out, anchors]
        least = scores.topk(min(KEPT, cut), dim=1).values[:, -1:]
        described[name] = torch.where(scores >= least, scores, 0) ** POWER
    return {(i, t): recall10(held_out, described[t], described[i]) for i, t in pairs}


def recall10(held_out, texts, images):
    found = held_out.recalls(texts.cpu(), F.normalize(images.cpu(), dim=1))  # torch's own products, which are counted
    return (found[2] + found[5]) / 2


def run_selectors(data, pairs, rows, device):
    """Every selector on the same rows: [Method], {pair: canonical correlations}, and lines on encoders that are alike."""
    names = unique(name for pair in pairs for name in pair)
    store = vlm.RowStore(data, names, device)
    features = {name: store.take(name, rows) for name in names}  # [n, D]
    features = {name: x - x.mean(0) for name, x in features.items()}
    held_out = vlm.Retrieval(data, rows[len(rows) - len(rows) // 5 :], torch.device("cpu"))
    spectra, methods = {}, []
    asked = {
        "linear CKA": linear_cka,
        "debiased CKA": debiased_cka,
        "mutual k-NN": mutual_neighbours,
        "canonical correlations": functools.partial(canonical_correlations, spectra=spectra),
        "ridge probe R@10": functools.partial(ridge_probe, held_out=held_out),
        "relative representations R@10": functools.partial(relative_representations, held_out=held_out),
    }
    with vlm.flop_counter():
        torch.ones(1, 1) @ torch.ones(1, 1)  # the counter's own start takes a second, which is no selector's
    for name, selector in tqdm(asked.items(), desc="selectors"):
        started = time.perf_counter()
        with vlm.flop_counter() as counter:
            values = selector(features, pairs)
        cost = {"flops": counter.get_total_flops(), "seconds": time.perf_counter() - started, "rows": len(rows)}
        methods.append(Method(name, np.array([[values[pair] for pair in pairs]]).round(9), [], cost))
    # Parameter counts are not in the manifest; among models of a family the wider is the larger.
    widths = np.array([[data.encoders[image].dim + data.encoders[text].dim for image, text in pairs]], dtype=float)
    methods.append(Method("largest (sum of widths)", widths, [], FREE))
    return methods, spectra, find_duplicates(data, features)


FREE = {"flops": 0, "seconds": 0.0, "rows": 0}  # what it costs to look at names, or at nothing


def find_duplicates(data, features):
    """A line for every two encoders of a kind whose embeddings are the same file, or the same up to a rotation."""
    digests, lines = data.fingerprint(features), []
    for kind in ("image", "text"):
        names = [name for name in data.names(kind) if name in features]
        alike = linear_cka({name: features[name] for name in names}, list(itertools.combinations(names, 2)))
        for (one, two), cka in alike.items():
            if cka > 0.9999:
                how = (
                    f"alike up to a rotation (linear CKA {cka:.6f})"
                    if digests[one] != digests[two]
                    else "the same file"
                )
                said = "their pairs tie, and agreement looks better than it is"
                lines.append(f"{one} and {two} are duplicates: {how}; {said}")
    return lines


# ------------------------------------------------------------------------------------------- truth and its bootstrap

CLIP_BENCHMARK_TASKS = {"retrieval": "zeroshot_retrieval", "zeroshot": "zeroshot_classification", "vqa": "vqa"}
HEADLINES = {"retrieval": "mean of both directions' R@10", "zeroshot": "top-1 accuracy", "vqa": "accuracy"}


class Judged(NamedTuple):
    """The scores of every run's connectors on a task, or on the mean of several."""

    name: str
    kind: str
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
            drawn = resample(units, flags.bootstrap, task.name)
            about = f"{task.name} {task.kind}", task.kind, task.protocol, counted, task.chance
            judged.append(Judged(*about, scores, drawn))
    return judged


def score_connector(task, run, image, text, data, flags):
    texts, images = text_inputs(task, text, flags.weights, flags.device, data), image_inputs(task, image, data)
    connector = load_connector(run, image, text, data).to(flags.device)
    try:
        return score(task, texts, images, connector)
    except BadInput as error:
        raise BadInput(f"{run.connector(image, text)}: {error}") from None


def load_connector(run, image, text, data):
    """A pair's connector, [B, D_t] -> [B, D_i], on the CPU, from its file."""
    dims = data.encoders[image].dim, data.encoders[text].dim
    _, hidden_layers, _, state = vlm.read_connector(run.connector(image, text), *dims)
    connector = vlm.init_modality_connector(dims[1], [vlm.HIDDEN_DIM] * hidden_layers, dims[0])
    connector.load_state_dict(state)
    return connector


def resample(units, times, name):
    """Means of [S, P, U] over `times` draws of U units with replacement, the same ones for all: {method: [S, R, P]}.
    They follow from the task's name, so that every report on it has the same ones."""
    count, random = next(iter(units.values())).shape[-1], np.random.default_rng(list(name.encode()))
    found = {name: [] for name in units}
    for start in range(0, times, 100):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(100, times - start))  # [100, U]
        for name, values in units.items():
            found[name].append(np.einsum("ru,spu->srp", drawn, values, optimize=True) / count)
    return {name: np.concatenate(parts, axis=1).round(9) for name, parts in found.items()}


def headline_first(judged):
    """The tasks, those of the headline before the others: retrieval, which connectors are trained for, or else zeroshot,
    or vqa. Several of that kind are led by their mean; labels that also make questions never weigh twice."""
    kind = next(kind for kind in HEADLINES if any(each.kind == kind for each in judged))
    judged = sorted(judged, key=lambda each: each.kind != kind)
    leading = [each for each in judged if each.kind == kind]
    if len(leading) == 1:
        return judged
    names, counted = (" and ".join(unique(words)) for words in zip(*((one.name, one.counted) for one in leading)))
    means = [
        {name: np.mean([values[name] for values in each], axis=0).round(9) for name in each[0]}
        for each in ([one.scores for one in leading], [one.resampled for one in leading])
    ]
    chance = sum(each.chance for each in leading) / len(leading)
    return [Judged(f"the mean of {names}", kind, "each task's own, below", counted, chance, *means), *judged]


def draw_seeds(methods, times):
    """{method: [R, S]}: the weights of a method's seeds in each resample, drawn with replacement."""
    random = np.random.default_rng(1)
    counts = {method.name: max(1, len(method.runs)) for method in methods}
    return {name: random.multinomial(s, np.full(s, 1 / s), size=times) / s for name, s in counts.items()}


METRICS = {
    "regret": "regret, points", "top1": "top-1 hit", "recall3": "recall@3", "ndcg1": "NDCG@1", "ndcg3": "NDCG@3",
    "ndcg5": "NDCG@5", "ndcg": "NDCG, all", "spearman": "Spearman", "tau": "Kendall tau-b",
}  # fmt: skip


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


def truth_of(judged, oracle):
    """The true score of every pair [P], 0 to 1: the mean over the oracle's seeds."""
    return judged.scores[oracle.name].mean(0).round(9)


def truth_again(judged, oracle, drawn):
    """Its resamples, over rows and seeds: [R, P]."""
    return np.einsum("rs,srp->rp", drawn[oracle.name], judged.resampled[oracle.name]).round(9)


def at_chance(judged, oracle, drawn):
    """A line if the pairs together score no better than guessing."""
    low, high = np.percentile(truth_again(judged, oracle, drawn).mean(1), [2.5, 97.5])
    if low > judged.chance:
        return []
    said = (
        f"{judged.name}: the pairs score {low:.1%} to {high:.1%} on average, where guessing scores {judged.chance:.1%}"
    )
    return [f"{said}; do captions and pictures belong together?"]


def judge(judged, methods, oracle, drawn):
    """A row a method: every metric with its 95 % bootstrap interval over rows and seeds and its expectation under a
    random order, and, of a run, how its own connectors compare with the oracle's."""
    truth, truths = truth_of(judged, oracle), truth_again(judged, oracle, drawn)
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
        row |= dict.fromkeys(("own_score", "gap_all", "gap_top_third"))
        if method.runs:
            own = judged.scores[method.name]  # [S, P]
            gap = 100 * (own.mean(0) - truth)
            first = method.orders == method.orders.max(1, keepdims=True)  # ties for the first place share it
            row["own_score"] = 100 * (own * first / first.sum(1, keepdims=True)).sum(1).mean()
            row |= {"gap_all": gap.mean(), "gap_top_third": gap[top].mean()}
        rows.append(row)
    return rows


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
COSTS = (
    "flops", "seconds", "pair_samples", "flops_equal_batch", "flops_equal_updates", "updates_low", "updates_high",
    "batch_size", "rows_embedded", "embedding_flops", "flops_with_embedding",
)  # fmt: skip


def ledger(method, data, pairs, reference):
    """What a method cost, the mean over its seeds: FLOPs as run, at the batch size of the reference (a trained run's
    ledger), and at its updates too; seconds, pair-samples, updates of a pair, rows embedded (rows x encoders), and the
    FLOPs with those of embedding. None where it is not known: of connectors alone, or of an encoder's forward pass.

    Embedding counts rows to train on and to choose by, or a selector's few, for each encoder.
    """
    names, row = unique(name for pair in pairs for name in pair), dict.fromkeys(COSTS)
    if method.runs and not method.trained:
        return row
    if method.runs:
        first = method.runs[0]
        used = sum(len(rows) for rows in vlm.split_rows(data, first.seed, first.flags.get("rows")))
        each = [run_costs(run, data, reference) for run in method.runs]
        row |= {key: float(np.mean([costs[key] for costs in each])) for key in each[0]}
        updates = [count for run in method.runs for count in run.ledger["updates_per_pair"].values()]
        row |= {"updates_low": min(updates), "updates_high": max(updates), "batch_size": first.ledger["batch_size"]}
    else:
        spent, row["seconds"], used = method.cost.values()
        row |= dict.fromkeys(("flops", "flops_equal_batch", "flops_equal_updates"), spent)
        row |= {"pair_samples": used * len(pairs), "updates_low": 0, "updates_high": 0}
    embedding = embedding_flops(data, names, used)
    with_embedding = None if embedding is None else row["flops"] + embedding
    row |= {"rows_embedded": used * len(names), "embedding_flops": embedding, "flops_with_embedding": with_embedding}
    return row


def run_costs(run, data, reference):
    """What a run's FLOPs would be at another batch size: those of the logits go with the batch, and what the `mlp`
    generator spends on predicting goes with the steps; the rest goes with the samples."""
    costs = {key: run.ledger[key] for key in ("flops", "seconds", "pair_samples")}
    if run.flags.get("closed_form"):
        return costs | {"flops_equal_batch": costs["flops"], "flops_equal_updates": costs["flops"]}
    batches = reference["batch_size"] / run.ledger["batch_size"]
    equal_batch = costs["flops"] + run.ledger["logit_flops"] * (batches - 1)
    if run.flags.get("generator") == "mlp":
        predicting = costs["flops"] - run.ledger["logit_flops"]
        for image, text in run.ranks:
            widths = [data.encoders[text].dim] + [vlm.HIDDEN_DIM] * run.hidden_layers + [data.encoders[image].dim]
            samples = run.ledger["batch_size"] * run.ledger["updates_per_pair"][f"{image}:{text}"]
            predicting -= vlm.connector_flops(samples, list(zip(widths[1:], widths)))
        equal_batch += predicting * (1 / batches - 1)
    # At one batch size, updates go with samples; a pair that is only predicted has none, and needs none.
    samples = [
        each["pair_samples"] / sum(map(bool, each["updates_per_pair"].values())) for each in (reference, run.ledger)
    ]
    return costs | {"flops_equal_batch": equal_batch, "flops_equal_updates": equal_batch * samples[0] / samples[1]}


def embedding_flops(data, names, rows):
    """Of `rows` rows through every encoder, or None if the cost of one is not known."""
    total = 0
    for name in names:
        encoder, known = data.encoders[name], vlm.ENCODERS.get(name)
        per = (PICTURE_GFLOP if encoder.kind == "image" else TOKEN_GFLOP).get(name)
        if per is None or known.spec != encoder.spec or (encoder.kind == "text" and not data.rows):
            return None
        if encoder.kind == "text":
            words = sum(len(row["caption"].split()) for row in data.rows) / len(data.rows)
            per *= 2 + TOKENS_A_WORD * words
        total += rows * per * 1e9
    return int(total)


def times(cost, base, key):
    """How many times as much, or None where it is not known."""
    return cost[key] / base[key] if cost[key] is not None and base[key] else None


# ------------------------------------------------------------------------------------------------------- the figures

# Okabe and Ito's colours, told apart by the colour-blind, with markers that survive a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]


class Findings(NamedTuple):
    """All that the report is made of."""

    pairs: list  # (image, text)
    methods: list
    oracle: Method  # whose connectors are the truth
    primary: Method  # whose choice is advised
    chosen: int  # the number of that pair
    judged: list  # the tasks, the headline's first
    drawn: dict  # method -> [R, S] weights of the seeds
    fidelities: list  # of each in `judged`, a row a method
    costs: dict  # method -> its row of the ledger
    spectra: dict  # pair -> canonical correlations
    warnings: list

    def line(self, name):
        """How a method's line is drawn."""
        k = [method.name for method in self.methods].index(name)
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        return {"color": colour, "marker": marker, "ms": 3, "lw": 1.3, "label": name}


class Plot(NamedTuple):
    name: str  # of its .png and .csv
    caption: str
    figure: Figure
    rows: list  # of the CSV: dicts


def panels(count, across, wide, tall, **shared):
    """A figure and the axes of its `count` panels, `across` in a row, of that size in inches each."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(wide * across, tall * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared).flatten().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.2)
    return figure, axes[:count]


def short(name):
    """A name that fits into a figure; its CSV has the whole."""
    return name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"


def pair_lines(found):
    """{pair: how its line is drawn}, first drawn first: grey, and over it in colour the worst and the three truly best."""
    order = np.argsort(-truth_of(found.judged[0], found.oracle), kind="stable").tolist()
    marked = unique([*order[:3], order[-1]])
    lines = {k: {"color": "#c4c4c4", "lw": 0.9} for k in order if k not in marked}
    for k in reversed(marked):
        said = ":".join(map(short, found.pairs[k]))
        lines[k] = {"color": COLOURS[marked.index(k)], "lw": 2, "label": said}
    return {":".join(found.pairs[k]): line for k, line in lines.items()}


def legend_below(figure, axis, backwards=True):
    """backwards: drawn last, on top, is the best."""
    handles, labels = (part[:: -1 if backwards else 1] for part in axis.get_legend_handles_labels())
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def heatmaps(found, judged, method, name):
    """The oracle's scores, the run's, and the difference: images down, texts across."""
    images, texts = (unique(names) for names in zip(*found.pairs))
    place = [(images.index(image), texts.index(text)) for image, text in found.pairs]
    truth, own = (100 * judged.scores[each.name].mean(0) for each in (found.oracle, method))
    low, high, most = min(truth.min(), own.min()), max(truth.max(), own.max()), max(1e-9, np.abs(own - truth).max())
    scores, change = {"cmap": "cividis", "vmin": low, "vmax": high}, {"cmap": "PuOr", "vmin": -most, "vmax": most}
    down, across = list(map(short, images)), list(map(short, texts))
    upright = max(map(len, across)) > 9
    wide = 0.075 * max(map(len, down)) + 3 * (0.7 * max(3, len(texts)) + 0.2)
    tall = 0.75 + 0.36 * len(images) + (0.075 * max(map(len, across)) if upright else 0.2)
    figure = Figure(figsize=(wide, tall), layout="constrained")
    shown = (
        (f"oracle: {found.oracle.name}", truth, chosen_pairs(truth.round(7)), scores, "{:.1f}"),
        (method.name, own, chosen_pairs(method.orders.mean(0)), scores, "{:.1f}"),
        ("difference", own - truth, [], change, "{:+.1f}"),
    )
    for axis, (title, values, boxed, colours, form) in zip(figure.subplots(1, 3, sharey=True), shown):
        grid = np.full((len(images), len(texts)), np.nan)  # [images, texts]
        grid[tuple(zip(*place))] = values
        drawn = axis.imshow(grid, aspect="auto", **colours)
        for (row, column), value in zip(place, values):
            light = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.3, 0.59, 0.11)) > 0.5
            said = form.format(round(value, 1) + 0.0)  # + 0.0: no minus before a zero
            axis.text(column, row, said, ha="center", va="center", color="black" if light else "white", fontsize=8)
        for row, column in (place[k] for k in boxed):
            axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", lw=2.5))
        axis.set_title(textwrap.fill(title, 9 * max(3, len(texts))), fontsize=9)
        axis.set_xticks(range(len(texts)), across, rotation=90 if upright else 0, fontsize=8)
        axis.set_yticks(range(len(images)), down, fontsize=8)
        axis.tick_params(length=0)
    values = zip(found.pairs, truth.round(3).tolist(), own.round(3).tolist(), (own - truth).round(3).tolist())
    rows = [{"image": i, "text": t, "oracle": a, "run": b, "difference": c} for (i, t), a, b, c in values]
    caption = (
        f"{judged.name}, score in % of every pair: {found.oracle.name} (the oracle), {method.name}, and the difference in "
        "points. Boxed: the oracle's best on the task, and the pair that the run chose."
    )
    return Plot(name, caption, figure, rows)


def cost_against_regret(found, judged, rows, name):
    """Regret with its interval over FLOPs, without and with those of embedding. Of connectors alone they are not known."""
    rows = [row | found.costs[row["method"]] for row in rows if found.costs[row["method"]]["flops"] is not None]
    keys = {"search alone": "flops", "with embedding": "flops_with_embedding"}
    keys = {title: key for title, key in keys.items() if all(row[key] is not None for row in rows)}
    if not any(row["flops"] for row in rows):
        return None
    figure, axes = panels(len(keys), 2, 3.4 + 2.6 / len(keys), 4.2, sharey=True)
    for axis, (title, key) in zip(axes, keys.items()):
        least = min(row[key] for row in rows if row[key] > 0) / 1e12
        for row in rows:
            look, spent = found.line(row["method"]), row[key] / 1e12
            error = [[max(0, row["regret"] - row["regret_low"])], [max(0, row["regret_high"] - row["regret"])]]
            look |= {"ls": "none", "ms": 8, "elinewidth": 1} | ({"mfc": "white"} if row["kind"] == "selector" else {})
            look["label"] += "" if spent else " (no FLOPs)"
            axis.errorbar(spent or least / 4, row["regret"], error, capsize=2, **look)
        axis.axhline(rows[0]["regret_random"], color="grey", lw=1, ls=":", label="a random order")
        axis.set_xscale("log")
        few = max(row[key] for row in rows) / 1e12 > 30 * least
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"TFLOP, {title}")
    axes[0].set_ylabel("regret, points")
    axes[0].set_ylim(bottom=-0.04 * axes[0].get_ylim()[1])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    kept = ("task", "method", "kind", "regret", "regret_low", "regret_high", "regret_random", "flops")
    table = [{key: row[key] for key in (*kept, "flops_with_embedding")} for row in rows]
    caption = (
        f"{judged.name}: what each way of choosing loses against what it costs (log axis; down and left is better). "
        "Bars: 95 % bootstrap interval. Filled: runs; open: selectors that train nothing."
    )
    return Plot(name, caption, figure, table)


def rank_scatter(found, judged, name):
    """A panel a method: the rank it gives a pair over the pair's true rank."""
    truth, count = rankdata(-truth_of(judged, found.oracle)), len(found.pairs)
    shown, table = [method for method in found.methods if np.ptp(method.orders)], []
    if not shown:
        return None
    figure, axes = panels(len(shown), 4, 2.2, 2.35, sharex=True, sharey=True)
    for axis, method in zip(axes, shown):
        own = rankdata(-method.orders.mean(0))
        best = own == own.min()
        axis.plot([1, count], [1, count], color="grey", lw=0.8, ls=":")
        axis.scatter(truth[~best], own[~best], s=22, color=COLOURS[0], alpha=0.7, linewidths=0)
        axis.scatter(truth[best], own[best], s=46, color=COLOURS[1], marker="D")
        axis.set_title(textwrap.fill(method.name, 26), fontsize=8)
        for (image, text), true, rank in zip(found.pairs, truth, own):
            table.append({"method": method.name, "image": image, "text": text, "true_rank": true, "rank": rank})
    figure.supxlabel("true rank (1: the best)", fontsize=9)
    figure.supylabel("rank given", fontsize=9)
    caption = (
        f"{judged.name}: true rank of every pair and the rank each method gives it; ties at their average rank. "
        "Diamond: the pair chosen."
    )
    return Plot(name, caption, figure, table)


def draw_lines(axis, rows, x, y, series, styles):
    """A line for each of `styles`, {series: how it is drawn}, through the rows of that series that have a y."""
    for name, style in styles.items():
        points = [(row[x], row[y]) for row in rows if row[series] == name and row[y] is not None]
        axis.plot(*np.array(points).reshape(-1, 2).T, **style)


def ranking_over_epochs(found, name):
    """A panel a run: the rank of every pair at each look at the validation rows. Last: regret of the leading pair."""
    truth, names = truth_of(found.judged[0], found.oracle), [":".join(pair) for pair in found.pairs]
    looks = {m.name: vlm.read_jsonl(m.runs[0].folder / "metrics.jsonl") for m in found.methods if m.trained}
    looks = {method: each for method, each in looks.items() if len(each) > 1}  # a closed form has one
    if not looks:
        return None
    figure, (*axes, last) = panels(len(looks) + 1, 3 if len(looks) > 3 else 4, 2.5, 2.7)
    table, lost = [], []
    for axis, (method, each) in zip(axes, looks.items()):
        own = []
        for look in each:
            recalls = {pair: (six[2] + six[5]) / 2 for pair, six in look["recalls"].items() if pair in names}
            order = np.array([recalls.get(pair, -1.0) for pair in names])  # given up, in halving: behind
            regret, about = fidelity(truth[None], order)["regret"][0], {"method": method, "epoch": look["epoch"]}
            lost.append(about | {"regret": regret})
            ranks = zip(recalls, rankdata([-recall for recall in recalls.values()]))
            own += [about | {"pair": pair, "rank": rank} for pair, rank in ranks]
        draw_lines(axis, own, "epoch", "rank", "pair", pair_lines(found))
        axis.set_ylim(len(names) + 0.5, 0.5)
        axis.set_title(textwrap.fill(method, 34), fontsize=8)
        axis.set_xlabel("epoch", fontsize=8)
        table += own
    draw_lines(last, lost, "epoch", "regret", "method", {method: found.line(method) for method in looks})
    axes[0].set_ylabel("rank by validation R@10", fontsize=8)
    last.set_title("regret of the leading pair, points", fontsize=8)
    last.set_xlabel("epoch", fontsize=8)
    last.legend(fontsize=6.5, frameon=False)
    legend_below(figure, axes[0])
    caption = (
        "Rank of every pair at each look at the validation rows (first seed). Coloured: the three truly best on "
        f"{found.judged[0].name}, and the worst. Last panel: what stopping there would have cost."
    )
    return Plot(name, caption, figure, table)


def loss_curves(found, plot_name):
    table, styles = [], {}
    for name, k, run in ((m.name, k, run) for m in found.methods if m.trained for k, run in enumerate(m.runs)):
        about = {"method": name, "seed": run.seed, "run": str(run.folder)}
        styles[about["run"]] = found.line(name) | ({"label": None} if k else {})
        for line in vlm.read_jsonl(run.folder / "metrics.jsonl"):  # a closed form has no loss
            table.append(about | {key: line.get(key) for key in ("epoch", "loss", "val_recall10", "seconds")})
    if not table:
        return None
    figure, axes = panels(2, 2, 3.8, 3.2)
    titles = {"loss": "loss on training batches", "val_recall10": "mean R@10 of the pairs on validation rows"}
    for axis, (key, about) in zip(axes, titles.items()):
        draw_lines(axis, table, "epoch", key, "run", styles)
        axis.set_title(about, fontsize=9)
        axis.set_xlabel("epoch", fontsize=9)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    legend_below(figure, axes[1], backwards=False)
    return Plot(plot_name, "Loss and validation recall of every run, a line a seed.", figure, table)


def correlation_spectra(found, name):
    spectra = [(":".join(pair), n + 1, v) for pair, values in found.spectra.items() for n, v in enumerate(values)]
    table = [dict(zip(("pair", "place", "correlation"), row)) for row in spectra]
    figure, (axis,) = panels(1, 1, 6.4, 3.6)
    draw_lines(axis, table, "place", "correlation", "pair", pair_lines(found))
    axis.set_xlabel("canonical direction")
    axis.set_ylabel("correlation")
    legend_below(figure, axis)
    caption = (
        "Canonical correlations of picture and caption embeddings between their leading principal components. Coloured: "
        f"the three truly best pairs on {found.judged[0].name}, and the worst."
    )
    return Plot(name, caption, figure, table)


# ------------------------------------------------------------------------------------------------------- the gallery


def gallery(tasks, run, pairs_shown, count=6):
    """(a table as HTML, rows of its CSV): real captions and their five nearest pictures, for each of `pairs_shown`:
    {pair: why}. Says so where there are no pictures to show."""
    task = next((task for task in tasks if task.kind == "retrieval" and task.data.manifest and task.data.rows), None)
    if task is None:
        return "<p>No task here has captions and pictures to show.</p>", []
    rows = [task.data.rows[i] for i in task.rows.tolist()]
    first = {row["image"]: place for place, row in reversed(list(enumerate(rows)))}  # picture -> its first place
    pictures, root = list(first), task.data.folder / task.data.manifest.get("root", ".")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    nearest = {}  # pair -> [queries][5] numbers of pictures
    for image, text in pairs_shown:
        vectors = F.normalize(image_inputs(task, image)[list(first.values())].float(), dim=1)  # [pictures, D_i]
        with torch.no_grad():
            mapped = map_texts(text_inputs(task, text)[drawn], load_connector(run, image, text, task.data), 1)
        nearest[image, text] = (mapped @ vectors.T).topk(min(5, len(pictures)), dim=1).indices.tolist()

    thumbnail = functools.cache(lambda picture: small_jpeg(root / picture))
    lines, table = [], []
    for q, caption in enumerate(rows[place]["caption"] for place in drawn):
        line = f"<td class=caption>{html.escape(caption)}</td>"
        right = {row["image"] for row in rows if row["caption"] == caption}
        for pair in pairs_shown:
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
    heads = "".join(f"<th>{html.escape(':'.join(pair))}: {html.escape(why)}</th>" for pair, why in pairs_shown.items())
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
.named td:nth-child(2) { overflow-wrap: anywhere; min-width: 8.5rem; max-width: 13rem }
.answer { font-size: 1.15rem; border-left: .35rem solid #0072B2; padding: .3rem .9rem; background: #f3f7fa }
.warning { border-left: .35rem solid #D55E00; padding: .2rem .9rem; background: #fdf4ee }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .8rem; margin: .6rem 0 }
th, td { padding: .22rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e2e2e2 }
th:first-child, td:first-child,
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
  h2 { page-break-after: avoid } .named td:nth-child(2) { min-width: 2.6cm } .tile { width: 1.35cm; height: 1.35cm }
  .gallery td.caption { min-width: 2cm; max-width: 3cm }
  .answer, .warning, .tile { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""


def number(value, digits=2):
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def teraflop(value):
    """Three figures."""
    return "–" if value is None else f"{value / 1e12:.3g}" if value < 1e15 else f"{value / 1e12:,.0f}"


def html_table(heads, rows, classes=None, kind=""):
    """Cells are text, or (text, small print), all escaped here."""

    def cell(value):
        text, small = value if isinstance(value, tuple) else (value, "")
        return html.escape(str(text)) + (f"<small>{html.escape(small)}</small>" if small else "")

    body = "<thead><tr>" + "".join(f"<th>{cell(head)}</th>" for head in heads) + "</tr></thead>"
    for name, row in zip(classes or [""] * len(rows), rows):
        body += f'<tr class="{name}">' + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>\n"
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
        values = [
            (number(row[name]), f"{number(row[f'{name}_low'])}–{number(row[f'{name}_high'])}") for name in METRICS
        ]
        lines.append([row["method"], choice(row, pairs), *values])
    return html_table(["chosen by", "pair", *METRICS.values()], lines, kind="named")


def own_table(rows):
    """How good the connectors of each run are beside the oracle's."""
    heads = ["run", "seeds", "score of its own connector, %", "own less oracle's, all pairs", "best third"]
    keys = ("own_score", "gap_all", "gap_top_third")
    lines = [[row["method"], row["seeds"], *(number(row[key], 1) for key in keys)] for row in rows if row["seeds"]]
    return html_table(heads, lines)


def cost_table(found):
    heads = [
        "method",
        "TFLOP as run",
        "at equal batch",
        "and at equal updates",
        "with embedding",
        "x oracle, equal batch",
    ]
    heads += ["x oracle, with embedding", "seconds", "pair-samples", "updates a pair", "batch", "rows embedded"]
    base, lines = found.costs[found.oracle.name], []
    for name, cost in found.costs.items():
        updates = unique(f"{cost[key]}" for key in ("updates_low", "updates_high") if cost[key] is not None)
        line = [name, *(teraflop(cost[key]) for key in ("flops", "flops_equal_batch", "flops_equal_updates"))]
        line += [teraflop(cost["flops_with_embedding"])]
        line += [number(times(cost, base, key), 3) for key in ("flops_equal_batch", "flops_with_embedding")]
        line += [number(cost["seconds"], 1), number(cost["pair_samples"], 0), " to ".join(updates) or "–"]
        lines.append([*line, cost["batch_size"] or "–", number(cost["rows_embedded"], 0)])
    return html_table(heads, lines)


def advise(found):
    """One sentence: the pair to stitch, how sure that is, what it cost."""
    judged, oracle, primary, pairs, chosen = found.judged[0], found.oracle, found.primary, found.pairs, found.chosen
    truth, truths = truth_of(judged, oracle), truth_again(judged, oracle, found.drawn)  # [P], [R, P]
    best, top = truths == truths.max(1, keepdims=True), int(truth.argmax())
    low, high = np.percentile(truths - truths[:, [chosen]], [2.5, 97.5], axis=0)  # [P] the others to the chosen
    image, text = pairs[chosen]
    by = "the choice of" if primary.trained else "the best of"
    said = f"Stitch {image} with {text} (mlp{primary.runs[0].hidden_layers}), {by} {primary.name}"
    ties = len(chosen_pairs(primary.orders.mean(0))) - 1
    said += f" (tied with {ties} more)" if ties and primary.trained else ""
    own, seeds = judged.scores[primary.name][0, chosen], f", {len(oracle.runs)} seeds" if len(oracle.runs) > 1 else ""
    said += f": its connector scores {100 * own:.1f} % on {judged.name} ({HEADLINES[judged.kind]}); by "
    said += f"the connectors of {oracle.name}{seeds}, " if oracle is not primary else "its own connectors, "
    sure = 100 * (best[:, chosen] / best.sum(1)).mean()
    said += f"the pair is the best of {len(pairs)} in {sure:.0f} % of resamples of {judged.counted}"
    if truth[chosen] < truth[top]:
        said += f", {100 * (truth[top] - truth[chosen]):.1f} points below {':'.join(pairs[top])}"
    order = [k for k in np.argsort(-truth, kind="stable") if k != chosen]
    better, alike = [k for k in order if low[k] > 0], [k for k in order if low[k] <= 0 <= high[k]]
    for words, some in (("clearly better", better), ("within noise", alike)):
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        said += f"; {words}: {', '.join(':'.join(pairs[k]) for k in some[:3])}{more}" if some else ""
    cost = found.costs[primary.name]
    if primary.trained:
        said += f"; {teraflop(cost['flops'])} TFLOP in {cost['seconds']:.0f} s"
    ratio = times(cost, found.costs[oracle.name], "flops_equal_batch")
    return said + (f", {ratio:.2g}x of {oracle.name} at equal batch size." if ratio and oracle is not primary else ".")


def print_table(found):
    """A line a method, as the trainers print their rankings."""
    wide, base = max(len(method.name) for method in found.methods), found.costs[found.oracle.name]
    heads = "regret, points (95 %)  top-1   R@3  NDCG@3  Spearman  tau-b    TFLOP        s  x oracle  chosen"
    print(
        f"\n{found.judged[0].name}, {found.judged[0].counted}; truth: {found.oracle.name}, seeds: {len(found.oracle.runs)}"
    )
    print(f"{'':{wide}}  {heads}")
    for row in found.fidelities[0]:
        cost = found.costs[row["method"]]
        regret = f"{row['regret']:6.2f} ({row['regret_low']:.2f} to {row['regret_high']:.2f})"
        five = f"{row['top1']:7.2f}{row['recall3']:6.2f}{row['ndcg3']:8.2f}{row['spearman']:10.2f}{row['tau']:7.2f}"
        spent = f"{teraflop(cost['flops']):>9}{number(cost['seconds'], 1):>9}"
        ratio = number(times(cost, base, "flops_equal_batch"), 3)
        print(f"{row['method']:{wide}}  {regret:21}{five}{spent}{ratio:>10}  {choice(row, found.pairs)}")


def ranking_rows(found):
    """ranking.csv: a row a task and pair, truly best first: true score in points, its interval, every method's rank, and
    the score of every run's own connector."""
    table, pairs = [], found.pairs
    ranks = {f"rank by {method.name}": rankdata(-method.orders.mean(0)) for method in found.methods}
    for each in found.judged:
        truth, truths = 100 * truth_of(each, found.oracle), 100 * truth_again(each, found.oracle, found.drawn)
        columns = {"true_rank": rankdata(-truth), "true_score": truth}
        columns |= dict(zip(("low", "high"), np.percentile(truths, [2.5, 97.5], axis=0))) | ranks
        columns |= {f"score of {name}": 100 * values.mean(0) for name, values in each.scores.items()}
        for k in np.argsort(-truth, kind="stable"):
            row = {"task": each.name, "image": pairs[k][0], "text": pairs[k][1]}
            table.append(row | {name: round(values[k], 3) for name, values in columns.items()})
    return table


def ranking_table(found):
    """The first task's rows of ranking.csv: the pairs, their true scores, and the runs' ranks and scores."""
    runs, lines, classes = [method.name for method in found.methods if method.runs], [], []
    for row in ranking_rows(found)[: len(found.pairs)]:
        line = [f"{row['true_rank']:g}", row["image"], row["text"]]
        line += [(number(row["true_score"], 1), f"{row['low']:.1f} to {row['high']:.1f}")]
        lines.append(line + [(number(row[f"score of {m}"], 1), f"rank {row[f'rank by {m}']:g}") for m in runs])
        classes.append("chosen" if (row["image"], row["text"]) == found.pairs[found.chosen] else "")
    return html_table(["true rank", "image", "text", "true score, %", *runs], lines, classes, "pairs")


def compose(found, tasks, sentence, resamples):
    """(the report from top to bottom: HTML and plots; rows of the gallery's CSV)."""
    oracle, primary, pairs = found.oracle, found.primary, found.pairs
    chosen, worst = pairs[found.chosen], pairs[int(truth_of(found.judged[0], oracle).argmin())]
    body = ["<h1>Which pair to stitch</h1>", f"<p class=answer>{html.escape(sentence)}</p>"]
    body += [f"<p>Its connector: <code>{html.escape(str(primary.runs[0].connector(*chosen)))}</code></p>"]
    body += [f"<p class=warning>{html.escape(line)}</p>" for line in found.warnings]
    for place, (each, rows) in enumerate(zip(found.judged, found.fidelities)):
        about = f"Score: {HEADLINES[each.kind]}; {each.counted}. Protocol: {each.protocol}."
        body += [f"<h2>{html.escape(each.name)}</h2>", f"<p>{html.escape(about)}</p>"]
        body += [fidelity_table(rows, pairs)]
        if place == 0:
            body += [f"<p>{html.escape(READING.format(oracle.name, len(oracle.runs), resamples))}</p>"]
        body += [own_table(rows), cost_against_regret(found, each, rows, f"cost-regret-{place}")]
        if place == 0:
            body += ["<h3>Every pair</h3>", ranking_table(found), rank_scatter(found, each, f"ranks-{place}")]
        beside = [method for method in found.methods if method.runs and method is not oracle] or [oracle]
        for k, method in enumerate(beside if place == 0 else [primary]):
            body += [heatmaps(found, each, method, f"heatmap-{place}-{k}")]
    body += ["<h2>What it cost</h2>", cost_table(found), f"<p>{html.escape(READING_COSTS)}</p>"]
    epochs = [ranking_over_epochs(found, "ranking-over-epochs"), loss_curves(found, "loss")]
    body += ["<h2>Over the epochs</h2>", *epochs] if any(epochs) else []
    if found.spectra:
        body += ["<h2>Before any training</h2>", correlation_spectra(found, "canonical-correlations")]
    shown = {chosen: "the pair to stitch"} | ({worst: "the worst"} if worst != chosen else {})
    tiles, table = gallery(tasks, primary.runs[0], shown)
    body += ["<h2>What the best and the worst pair find</h2>", tiles]
    return [item for item in body if item is not None], table


READING = (
    "True score: what the connectors of the oracle ({0}, seeds: {1}) score on the task. Runs order the pairs by "
    "validation rows, the hypernetwork also, and selectors only, by training rows: no order has seen the rows that judge "
    "it, unless a warning says so. Small print: the 95 % interval over {2} resamples of the task's pictures and of the "
    "seeds; the best of many noisy scores is too high, so intervals of regret lean upwards. NDCG's gain is the true score "
    "minus the worst pair's. Ties in an order are broken at random, in expectation; the last line is a random order's."
)
READING_COSTS = (
    "As run; at the oracle's batch size (the share of the logits grows with the batch); and at its updates of each "
    "trained pair too. A run's cost is one seed's. Selectors train nothing, so theirs does not change. Rows embedded: rows "
    f"times encoders. Embedding is the forward pass of those rows, captions at {TOKENS_A_WORD} tokens a word; its seconds "
    "are not recorded. – where a cost is not known."
)


def method_rows(found):
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
    page, files = "", ["report.html", "results.json"]
    for item in body:
        if isinstance(item, Plot):
            png, said = io.BytesIO(), html.escape(item.caption, quote=True)
            item.figure.savefig(png, dpi=160, metadata={"Software": None})
            with vlm.atomic_file(out / f"{item.name}.png") as file:
                file.write(png.getvalue())
            tables |= {f"{item.name}.csv": item.rows}
            files.append(f"{item.name}.png")
            source, wide = base64.b64encode(png.getvalue()).decode(), int(item.figure.get_figwidth() * 96)
            links = f'<a href="{item.name}.png">PNG</a>, <a href="{item.name}.csv">CSV</a>'
            item = f'<figure><img width="{wide}" src="data:image/png;base64,{source}" alt="{said}">'
            item += f"<figcaption>{said} ({links})</figcaption></figure>"
        page += item
    for name, rows in tables.items():
        if rows:
            vlm.write_csv(out / name, rows)
            files.append(name)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    head += '<meta name=viewport content="width=device-width, initial-scale=1">'
    vlm.write_text(out / "report.html", f"{head}<style>{CSS}</style><body>{page}</body></html>\n")
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


def newest_run():
    finished = sorted(Path("runs").glob("*/ledger.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise BadInput("runs/ holds no finished run; make one: python train_hyma.py --pairs all, or see --demo")
    return finished[-1].parent


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
    if not primary.trained:
        return (
            primary,
            primary,
            [f"{primary.name}: nothing ranks them but the rows that judge them: their best leans upwards"],
        )
    said = f"no oracle: the truth is {primary.name}'s own connectors, which cannot show what it has missed; add the "
    return primary, primary, [said + "runs of train_grid.py with its whole budget, or name others with --oracle"]


def open_all_tasks(flags, runs, data):
    """(the tasks, lines of warning). Of the folder that the runs were trained on, only rows that none was trained on."""
    tasks, warnings, seeds = [], [], sorted({run.seed for run in runs if run.ledger})
    for name, folder in (flags.task or {None: data.folder}).items():
        own = seeds and os.path.realpath(folder) == os.path.realpath(data.folder)
        if own and not any(row.get("split") == "test" for row in data.rows or []):
            if len(seeds) > 1 and not any(row.get("split") for row in data.rows or []):
                said = f"has no split column, so that seeds {' and '.join(map(str, seeds))} set other rows aside"
                raise BadInput(f"{data.folder}: {said}; name another --task, or give runs of one seed")
            said = (
                "has no test split: the validation rows that chose the connectors also judge them; name another --task"
            )
            warnings.append(f"{data.folder} {said}")
        tasks += open_tasks(name, folder, flags, seeds[0] if own else None)
    return tasks, warnings


def main():
    flags = parse_flags()
    folders = run_demo(flags.device) if flags.demo else flags.runs or [newest_run()]
    runs = [open_run(folder) for folder in unique(os.path.normpath(folder) for folder in [*folders, *flags.oracle])]
    oracles = {os.path.normpath(folder) for folder in flags.oracle}
    data = open_embeddings(runs, flags)
    first = next((run for run in runs if str(run.folder) not in oracles), runs[0])
    pairs = [pair for pair in vlm.choose_pairs(data, ["all"]) if pair in first.ranks]
    for run in runs:
        if missing := [":".join(pair) for pair in pairs if pair not in run.ranks]:
            said = f"{run.folder}: has no {missing[0]} ({len(missing)} pairs missing of {len(pairs)})"
            raise BadInput(f"{said}; compare runs of the same pairs")
    methods = group_runs(runs, pairs, oracles)
    oracle, primary, warnings = choose_oracle(methods, oracles)
    tasks, said = open_all_tasks(flags, runs, data)
    warnings += said
    for name in (method.name for method in methods if method.runs[0].flags.get("from")):
        warnings.append(f"{name}: starts from another run's connectors, whose cost is not in its own")

    results, spectra = [], {}
    judged = headline_first(score_runs(tasks, methods, pairs, data, flags, results))
    trained = [run for method in (oracle, *methods) for run in method.runs if run.ledger]
    if flags.selector_rows and trained:
        rows = selector_rows(data, vlm.split_rows(data, trained[0].seed)[0], flags.selector_rows)
        selectors, spectra, alike = run_selectors(data, pairs, rows, flags.device)
        methods, warnings = methods + selectors, warnings + alike
    methods.append(Method("random order", np.zeros((1, len(pairs))), [], FREE))
    drawn = draw_seeds(methods, flags.bootstrap)
    warnings += [line for each in judged for line in at_chance(each, oracle, drawn)]
    fidelities = [judge(each, methods, oracle, drawn) for each in judged]
    # A closed form's one step says nothing of a batch size; connectors alone have no ledger.
    reference = next((run.ledger for run in trained if not run.flags.get("closed_form")), trained and trained[0].ledger)
    costs = {method.name: ledger(method, data, pairs, reference) for method in methods}
    chosen = chosen_pairs(primary.orders.mean(0) if primary.trained else truth_of(judged[0], oracle))[0]
    found = Findings(pairs, methods, oracle, primary, chosen, judged, drawn, fidelities, costs, spectra, warnings)

    sentence = advise(found)
    body, shown = compose(found, tasks, sentence, flags.bootstrap)
    lines = method_rows(found)
    about = {"answer": sentence, "warnings": warnings, "oracle": oracle.name, "results": results, "methods": lines}
    about |= {"runs": {str(run.folder): run.config for run in runs}, "made": vlm.provenance(flags.device)}
    tables = {"ranking.csv": ranking_rows(found), "selectors.csv": lines, "gallery.csv": shown}
    write_report(flags.out, f"Stitch {':'.join(pairs[chosen])}", body, tables, about)

    print_table(found)
    for line in warnings:
        print(f"warning: {line}")
    print(f"\n{sentence}")
    print(f"connector: {primary.runs[0].connector(*pairs[chosen])}\nreport: {flags.out / 'report.html'}")


if __name__ == "__main__":
    vlm.run_script(main)
