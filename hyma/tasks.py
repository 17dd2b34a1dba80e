"""What a connector is scored on: retrieval, zero-shot classification, multiple choice.

Each kind of task has a section of its own below, which ends in a `TaskKind`: how the task is made from the rows of an embedding
folder, how it is scored and what its score is called. To add a kind, write its section and add it to `KINDS`.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import vlm
from hyma.columns import readable_label
from hyma.distractors import draw_distractors
from hyma.embeddings import Embeddings, has_unit_rows, unique
from hyma.merging import open_embeddings
from hyma.metrics import Retrieval
from hyma.prompts import read_templates
from hyma.splits import LEFT_OUT, known_split, split_rows
from kernels import true_rank
from vlm import MAPPED_AT_ONCE, BadInput


class Task(NamedTuple):
    """Rows of an embedding folder and how connectors are scored on them."""

    name: str
    kind: str  # "retrieval", "zeroshot" or "vqa": a key of KINDS
    protocol: str  # one line: which rows, how many, captions per picture, prompts, directions, chance
    chance: float  # what guessing scores, of `Score.value`
    data: Embeddings
    rows: Tensor  # [n] row indices
    retrieval: Retrieval | None = None
    texts: tuple = ()  # prompts: all of a class one after the other, or a question with a candidate answer
    templates: int = 1  # how many prompts a class has
    right: Tensor | None = None  # [n] the right class (zeroshot) or text (vqa)
    choices: Tensor | None = None  # [n, K] the texts to choose from; -1 where a row has fewer than K


class Score(NamedTuple):
    """What one connector scores on a task."""

    metrics: dict  # CLIP_benchmark's names -> float; a median rank counts from 1
    value: float  # the headline, 0 to 1: mean of both directions' R@10; acc1; acc
    units: Tensor  # [pictures or rows] float64, whose mean is `value`: what a bootstrap draws from


class TaskKind(NamedTuple):
    """A kind of task."""

    name: str
    make: Callable  # (name, data, rows, rows_description, flags) -> Task; raises TaskNotPossible
    score: Callable  # (task, mapped texts [texts, D_i], images [n, D_i]) -> Score
    headline: str  # what `Score.value` is, in words
    units: str  # what `Score.units` counts, in words
    benchmark_name: str  # the "task" in CLIP_benchmark's result files


class TaskNotPossible(Exception):
    """Why the rows of a folder allow no task of a kind."""


def open_tasks(name, folder, flags, run_seed=None) -> list[Task]:
    """Every task that the folder's rows allow: captions give retrieval, labels zeroshot, questions (or labels) vqa.

    name: None for the folder's dataset name. flags: `templates` ("1", "80" or a file) and `device`. run_seed: the seed
    of the run that was trained on this folder, None for a folder that the run has not seen: all rows of a folder without
    a test split are then evaluated. Raises BadInput if the rows allow no task.
    """
    data = open_embeddings(folder)
    if name is None:
        name = data.manifest["dataset"] if data.manifest else data.folder.name
    rows_description, rows = choose_rows(data, run_seed)
    tasks = []
    reasons = []
    for kind in KINDS.values():
        try:
            tasks.append(kind.make(name, data, rows, rows_description, flags))
        except TaskNotPossible as reason:
            reasons.append(str(reason))
    if not tasks:
        raise BadInput(f"--task {name}={data.folder}: nothing to evaluate: {'; '.join(unique(reasons))}")
    return tasks


def choose_rows(data, run_seed):
    """The rows to evaluate: (which they are, in words; their indices [n]).

    Rows of the test split; else, of the folder that a run was trained on, the validation rows of its seed; else all usable ones.
    A test split that embed.py has set aside itself counts for that folder's own runs alone: others have seen none of its rows.
    """
    manifest = data.manifest or {}
    published = manifest.get("protocol")  # a standard set's own description of its rows
    test = [i for i, row in enumerate(data.rows or []) if row.get("split") == "test"]
    is_foreign = run_seed is None
    if test and not (is_foreign and manifest.get("test_set_aside")):
        return published or "test split", torch.tensor(test)
    if is_foreign:
        description, rows = usable_rows(data)
        return published or description, torch.tensor(rows, dtype=torch.int64)
    _, validation = split_rows(data, run_seed)
    return "validation rows, which also chose the connectors", validation


def usable_rows(data):
    """(which they are, in words; their indices): rows that can be used, of splits with known names if there are any."""
    if not data.rows:
        return "all rows", range(data.row_count)
    splits = [row.get("split") or "train" for row in data.rows]
    usable = [i for i, split in enumerate(splits) if split != LEFT_OUT]
    known = [i for i in usable if known_split(splits[i])]
    if len(known) == len(usable):
        return "all rows", known
    if not known:
        return "all rows, whose splits have unknown names", usable
    return f"all rows but {len(usable) - len(known):,} of splits with unknown names", known


@torch.no_grad()
def score(task, texts, images, connector) -> Score:
    """Scores a connector, [B, D_t] -> [B, D_i], on a task.

    texts: the result of `task_inputs.text_inputs`, on the connector's device. images: [n, D_i], of any length.

    A tie counts against the right answer, so that a connector whose outputs are all the same scores zero.
    """
    images = images.to(texts.device).float()  # [n, D_i]
    mapped = map_prompts(texts, connector, task.templates)  # [captions, classes or question texts; D_i]
    return KINDS[task.kind].score(task, mapped, images)


def map_prompts(texts, connector, templates):
    """Unit vectors [classes, D_i]: the mapped prompts of each class, averaged and normalised again.

    texts [classes * templates, D_t]: of any length, the prompts of a class one after the other. Where templates is 1, a
    "class" is one caption or one question text.
    """
    mapped = []
    for part in texts.split(templates * max(1, MAPPED_AT_ONCE // templates)):
        z = vlm.map_text(connector, F.normalize(part.float(), dim=1))  # [part of classes * templates, D_i]
        classes = z.unflatten(0, (-1, templates)).mean(1)  # [part of classes, D_i]
        mapped.append(F.normalize(classes, dim=1))
    return torch.cat(mapped)


def in_range(counts):
    """Counts [n] as "5", or as "1 to 5", the smallest and the largest."""
    least, most = counts.min(), counts.max()
    return f"{least}" if least == most else f"{least} to {most}"


# --------------------------------------------------------------------------------------------------------- retrieval


def make_retrieval(name, data, rows, rows_description, flags):
    """The Task of finding pictures by captions and captions by pictures; none where captions are labels or questions."""
    merge_captions = not getattr(flags, "clip_benchmark_protocol", False)
    if data.rows:
        captions_of_picture, captions = count_captions([data.rows[i] for i in rows.tolist()])
    else:
        captions_of_picture, captions = torch.ones(len(rows), dtype=torch.int64), len(rows)
    pictures = len(captions_of_picture)
    if min(pictures, captions) < 2:
        raise TaskNotPossible(f"{pictures} pictures and {captions} captions leave nothing to find")
    counted = "different captions"
    merged = "; equal captions count once, in CLIP_benchmark each" if captions < len(rows) else ""
    if not merge_captions:
        captions, counted, merged = len(rows), "captions, equal ones counted apart as in CLIP_benchmark", ""
    retrieval = Retrieval(data, rows, flags.device, merge_captions=merge_captions)
    chance = retrieval.chance[2]
    protocol = (
        f"{rows_description}; {pictures} pictures, {captions} {counted}, {in_range(captions_of_picture)} a picture; text "
        f"to image and image to text, any caption of the picture is right{merged}; chance R@10 {chance:.2%}"
    )
    return Task(name, "retrieval", protocol, chance, data, rows, retrieval)


def count_captions(rows):
    """(captions of each picture [pictures], how many different captions there are)."""
    captions_of_picture = Counter()
    captions = set()
    are_labels = True
    for row in rows:
        if "question" in row:
            raise TaskNotPossible("its captions are questions")
        captions_of_picture[row["image"]] += 1
        captions.add(row["caption"])
        are_labels &= row["caption"] == readable_label(row.get("label", ""))
    if are_labels:
        raise TaskNotPossible("its captions are the labels")
    return torch.tensor(list(captions_of_picture.values())), len(captions)


def score_retrieval(task, mapped, images):
    """R@1, 5, 10 and median rank of both directions; the headline is the mean of both directions' R@10.

    The unit of the bootstrap is a picture. Its value is the mean of two: whether a caption of its own is among its ten
    nearest, and the R@10 of its captions, where a caption of several pictures is divided among them. The mean of the units
    is the headline.
    """
    retrieval = task.retrieval
    if not has_unit_rows(images, images.shape):  # of published files; as they are stored, unit vectors keep their ranks
        images = F.normalize(images, dim=1)
    caption_ranks, picture_ranks = retrieval.ranks(mapped, images)  # [captions], [pictures]
    metrics = {}
    for direction, ranks in (("image_retrieval", caption_ranks), ("text_retrieval", picture_ranks)):
        for k in retrieval.ks:
            metrics[f"{direction}_recall@{k}"] = (ranks < k).double().mean().item()
        metrics[f"{direction}_median_rank"] = 1 + ranks.double().quantile(0.5).item()
    caption, picture = retrieval.place["caption"], retrieval.place["image"]  # [n]
    shares = ((caption_ranks < 10) / caption.bincount())[caption].double()  # [n]
    found_by_captions = picture.bincount(shares) * len(picture_ranks) / len(caption_ranks)  # [pictures]
    units = ((picture_ranks < 10) + found_by_captions) / 2
    value = (metrics["image_retrieval_recall@10"] + metrics["text_retrieval_recall@10"]) / 2
    return Score(metrics, value, units.cpu())


RETRIEVAL = TaskKind(
    name="retrieval",
    make=make_retrieval,
    score=score_retrieval,
    headline="mean of both directions' R@10",
    units="pictures",
    benchmark_name="zeroshot_retrieval",
)

# --------------------------------------------------------------------------------------------------------- zeroshot


def make_zeroshot(name, data, rows, rows_description, flags):
    """The Task of naming the class of a picture; every label of the folder is a class."""
    classes, rows, right = labelled_pictures(data, rows)
    templates = read_templates(flags.templates)
    texts = []
    for label in classes:
        texts += [template.replace("{}", readable_label(label)) for template in templates]
    chance = 1 / len(classes)
    prompts = f"prompt {templates[0]!r}" if len(templates) == 1 else f"mean of {len(templates)} prompts"
    labels = len(labels_of(data))
    spelt = f" of {labels} labels, some of which differ in spelling alone" if labels > len(classes) else ""
    protocol = (
        f"{rows_description}; {len(rows)} pictures, {len(classes)} classes{spelt}, {prompts}; chance {chance:.2%}"
    )
    return Task(
        name, "zeroshot", protocol, chance, data, rows, texts=tuple(texts), templates=len(templates), right=right
    )


def labels_of(data):
    """All labels of the folder, sorted."""
    labels = {row.get("label") for row in data.rows or []}
    return sorted(filter(None, labels))


def labelled_pictures(data, rows):
    """(the classes, sorted; the rows [n] that have a label, each picture and class once; the index of each row's class [n]).

    Labels that differ in spelling alone are a class, by its first spelling: their prompts can be the same to a text encoder,
    and a tie counts against the right one.
    """
    spelling = {}  # the words of a class -> its first label
    for label in labels_of(data):
        spelling.setdefault(plain_words(label), label)
    classes = list(spelling.values())
    if not classes:
        raise TaskNotPossible("its rows have no labels")
    if len(classes) == 1:
        raise TaskNotPossible(f"its labels are of one class ({classes[0]})")
    index = dict(zip(spelling, range(len(classes))))
    labelled = []
    right = []
    seen = set()
    for i in rows.tolist():
        picture, label = data.rows[i]["image"], data.rows[i].get("label")
        if not label:
            continue
        number = index[plain_words(label)]
        if (picture, number) not in seen:
            seen.add((picture, number))
            labelled.append(i)
            right.append(number)
    if not labelled:
        raise TaskNotPossible("the rows to evaluate have no labels")
    return classes, torch.tensor(labelled), torch.tensor(right)


def plain_words(label):
    """The words of a label, however it is spelt: of red_fox, "Red Fox" and "red  fox" they are the same."""
    return " ".join(readable_label(label).casefold().split())


def score_zeroshot(task, mapped, images):
    """Top-1 and, of more than five classes, top-5 accuracy, and recall as the mean of the classes that occur."""
    right = task.right.to(images.device)
    ranks = true_rank(F.normalize(images, dim=1), mapped, right)  # [n] classes that score at least as high
    hits = (ranks == 0).double()
    metrics = {"acc1": hits.mean().item()}
    if len(mapped) > 5:
        metrics["acc5"] = (ranks < 5).double().mean().item()
    counts = right.bincount()  # [classes]
    occurs = counts > 0
    metrics["mean_per_class_recall"] = (right.bincount(hits)[occurs] / counts[occurs]).mean().item()
    return Score(metrics, metrics["acc1"], hits.cpu())


ZEROSHOT = TaskKind(
    name="zeroshot",
    make=make_zeroshot,
    score=score_zeroshot,
    headline="top-1 accuracy",
    units="pictures",
    benchmark_name="zeroshot_classification",
)

# --------------------------------------------------------------------------------------------------- multiple choice

LABEL_QUESTION = "What kind of picture is it?"  # where rows have labels and no questions


class Question(NamedTuple):
    """The question of one row."""

    text: str
    answer: str | None
    choices: list | None  # with the answer among them

    def texts(self):
        """The question with each of its choices, no choice twice."""
        return [f"{self.text} {choice}" for choice in dict.fromkeys(self.choices)]


def make_vqa(name, data, rows, rows_description, flags):
    """The Task of choosing an answer: the folder's own questions, or some made from its labels. Its texts are question and
    choice."""
    if any("question" in row for row in data.rows or []):
        rows, questions = own_questions(data, rows)
        about = "question and answer as text"
    else:
        classes, rows, questions = label_questions(data, rows)
        about = f"{LABEL_QUESTION!r} and the label, the others drawn from {len(classes)} labels"
    if not questions:
        raise TaskNotPossible("no row has a question")
    check_questions(data, rows, questions)
    texts, right, choices = number_texts(questions)
    counts = (choices >= 0).sum(1)  # [n]
    chance = (1 / counts.double()).mean().item()
    protocol = (
        f"{rows_description}; {len(rows)} questions, {in_range(counts)} choices, {about}; nearest to the picture; "
        f"chance {chance:.2%}"
    )
    return Task(name, "vqa", protocol, chance, data, rows, texts=texts, right=right, choices=choices)


def own_questions(data, rows):
    """The rows [n] that have a question, and their Questions."""
    asked = []
    questions = []
    for i in rows.tolist():
        row = data.rows[i]
        if row.get("question"):
            asked.append(i)
            questions.append(Question(row["question"], row.get("answer"), row.get("choices")))
    return torch.tensor(asked, dtype=torch.int64), questions


def label_questions(data, rows):
    """(all classes, rows [n] with a label, their Questions): the class and three others, which the row's key draws."""
    classes, rows, right = labelled_pictures(data, rows)
    questions = []
    for i, k in zip(rows.tolist(), right.tolist()):
        label = classes[k]
        others = draw_distractors(data.rows[i]["key"], classes, {label}, 3)
        choices = [readable_label(name) for name in (label, *others)]
        questions.append(Question(LABEL_QUESTION, choices[0], choices))
    return classes, rows, questions


def check_questions(data, rows, questions):
    """Raises BadInput for a row whose choices are not a list of two or more with the answer among them."""
    for i, question in zip(rows.tolist(), questions):
        choices = question.choices
        if not isinstance(choices, list) or question.answer not in choices or len(set(choices)) < 2:
            row = f"{data.folder}/rows.jsonl: row {data.rows[i]['key']}"
            raise BadInput(f"{row}: its choices must be a list of two or more that holds the answer")


def number_texts(questions):
    """(different texts of all choices, sorted; indices of the right texts [n] and of all choices [n, K], -1 for none)."""
    texts = set()
    for question in questions:
        texts.update(question.texts())
    texts = sorted(texts)
    index = dict(zip(texts, range(len(texts))))
    right = []
    choices = []
    for question in questions:
        right.append(index[f"{question.text} {question.answer}"])
        choices.append(torch.tensor([index[text] for text in question.texts()]))
    padded = nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=-1)  # [n, K]
    return tuple(texts), torch.tensor(right), padded


def score_vqa(task, mapped, images):
    """Accuracy: the share of the rows whose right text is nearer to the picture than every other choice."""
    size = MAPPED_AT_ONCE // 8
    images = F.normalize(images, dim=1)
    choices, right = task.choices.to(images.device), task.right.to(images.device)
    hits = []
    for part in zip(images.split(size), choices.split(size), right.split(size)):
        hits.append(is_correct(*part, mapped))
    hits = torch.cat(hits).double()  # [n]
    accuracy = hits.mean().item()
    return Score({"acc": accuracy}, accuracy, hits.cpu())


def is_correct(images, choices, right, mapped):
    """[B] bool: is the right text nearer to its picture than every other choice?

    images [B, D_i]; choices [B, K] and right [B]: row indices of mapped [texts, D_i].
    """
    # Elementwise products, as a matrix product may give equal choices different last bits.
    scores = (images[:, None] * mapped[choices]).sum(-1)  # [B, K]
    own = (images * mapped[right]).sum(-1)[:, None]  # [B, 1]
    beaten = (scores >= own) & (choices != right[:, None]) & (choices >= 0)
    return beaten.sum(1) == 0


VQA = TaskKind(
    name="vqa",
    make=make_vqa,
    score=score_vqa,
    headline="accuracy",
    units="questions",
    benchmark_name="vqa",
)

# Retrieval is what connectors are trained for. A report begins with the first of these kinds that its tasks have.
KINDS = {kind.name: kind for kind in (RETRIEVAL, ZEROSHOT, VQA)}
