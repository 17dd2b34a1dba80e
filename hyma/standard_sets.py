"""Standard test sets as rows, from their published files: `--data NAME:FOLDER`.

To add a set, write a reader and enter it in STANDARD_SETS. A reader takes the folder with the set's files and the
embedding folder, in which it may unpack pictures. It returns a `Source`. Rows are as in `hyma/datasets.py`.
"""

import functools
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from hyma.columns import is_known, readable_label
from hyma.datasets import Corpus
from hyma.distractors import draw_distractors
from hyma.files import make_folder
from hyma.pictures import IMAGE_SUFFIXES
from hyma.tables import read_text, read_text_table
from vlm import BadInput, read_json

CHOICES = "most frequent answer among 3 such answers to other questions with the same first word"
# Pictures, or of the sets with questions the rows, of each set: what has fewer is reported as a part of it.
WHOLE = {
    "imagenet1k": 50_000,
    "cifar10": 10_000,
    "cifar100": 10_000,
    "coco": 5_000,
    "flickr8k": 1_000,
    "flickr30k": 1_000,
    "okvqa": 5_046,
    "textvqa": 5_000,
}


class Source(NamedTuple):
    """What a reader found."""

    root: Path  # the folder that image paths start from
    rows: list[dict]
    protocol: str  # which files were read, and how: reported with every score on the set


class Question(NamedTuple):
    """An open question about a picture."""

    number: int | str  # the set's own number of it
    image: str
    text: str
    answers: list[str]  # of all who were asked


def parse_standard_set(data):
    """(name, folder) of `NAME:FOLDER`, or None if `data` does not start with a standard set's name."""
    name, _, folder = str(data).partition(":")
    if name not in STANDARD_SETS or not folder:
        return None
    if not Path(folder).is_dir():
        raise BadInput(f"--data {name}:{folder}: no such folder")
    return name, Path(folder)


def read_standard_set(name, data, out):
    """The Corpus of a standard set. Raises BadInput for a file that is missing or is not the published one."""
    try:
        source = STANDARD_SETS[name](data, out)
    except BadInput:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise BadInput(f"--data {name}:{data}: not as published: {type(error).__name__}: {error}") from None
    if not source.rows:
        raise BadInput(f"--data {name}:{data}: its files hold no row of this set")
    # All rows are test rows, so that nothing is ever trained on them.
    rows = [row | {"split": "test"} for row in source.rows]
    return Corpus(source.root, name, rows, source.protocol + not_whole(name, rows), f"{name}:{data}")


def not_whole(name, rows):
    """What a protocol adds for a set of which a part is missing: nothing for a whole one."""
    has_questions = any("question" in row for row in rows)
    counted = "questions" if has_questions else "pictures"
    count = len(rows) if has_questions else len({row["image"] for row in rows})
    return f", NOT WHOLE: {count:,} of its {WHOLE[name]:,} {counted}" if count < WHOLE[name] else ""


def published(data, *names):
    """The first of these files or folders that is in the set's folder."""
    for name in names:
        if (data / name).exists():
            return data / name
    raise BadInput(f"--data {data}: expected {' or '.join(names)} there")


# ---------------------------------------------------------------------------------------------------- classification


def read_imagenet(data, out):
    """val/<WordNet id>/*.JPEG, or those folders themselves. Class names: torchvision's, but for a dog and a jacket that
    differ there by a capital alone, and so not to a text encoder."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    names = dict(zip(ImageNetInfo().label_names(), ResNet50_Weights.DEFAULT.meta["categories"]))
    names["n02113186"] = "Cardigan Welsh corgi"
    root = data / "val" if (data / "val").is_dir() else data
    folders = sorted(folder for folder in root.glob("n*") if folder.name in names)
    if not folders:
        raise BadInput(f"--data {data}: expected the validation pictures there, as val/n01440764/*.JPEG and so on")
    rows = []
    for folder in folders:
        label = names[folder.name]
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                rows.append({"image": f"{folder.name}/{path.name}", "caption": label, "label": label})
    return Source(root, rows, "ImageNet-1k validation, torchvision's class names but for one")


def read_cifar(data, out, name):
    """The Python version's batches; torchvision checks their MD5 before it unpickles. The pictures become PNG files."""
    from torchvision import datasets

    try:
        published_set = getattr(datasets, name)(data, train=False, download=False)
    except RuntimeError:
        files = "cifar-10-batches-py" if name == "CIFAR10" else "cifar-100-python"
        raise BadInput(f"--data {data}: expected {files}/ there, whole, as unpacked from the published file") from None
    root = out / "images"
    unfinished = out / ".images"  # renamed when all pictures are there
    if not root.is_dir():
        make_folder(unfinished)
        for k, (image, _) in enumerate(published_set):
            target = unfinished / f"{k:05d}.png"
            target.unlink(missing_ok=True)  # cut by a kill, or somebody's link
            image.save(target)
        os.replace(unfinished, root)
    rows = []
    for k, target in enumerate(published_set.targets):
        label = published_set.classes[target]
        rows.append({"image": f"{k:05d}.png", "caption": readable_label(label), "label": label})
    return Source(root, rows, f"CIFAR-{name[5:]} test")


# --------------------------------------------------------------------------------------------------------- retrieval


def read_coco(data, out):
    """annotations/captions_val2017.json and val2017/. Some pictures have six or seven captions: the first five count."""
    table = read_json(published(data, "annotations/captions_val2017.json"))
    captions = defaultdict(list)
    for note in sorted(table["annotations"], key=lambda note: note["id"]):
        captions[note["image_id"]].append(note["caption"])
    rows = []
    for image in table["images"]:
        for caption in captions[image["id"]][:5]:
            rows.append({"image": image["file_name"], "caption": caption})
    return Source(published(data, "val2017"), rows, "MSCOCO captions val2017, the first 5 captions of a picture")


def read_flickr(data, out, name):
    """Karpathy's dataset_<name>.json, else a table of captions, which has his split only if there is a split column."""
    annotations = name.replace("flickr", "flickr_annotations_")
    table = published(data, f"dataset_{name}.json", f"{annotations}.csv", "captions.txt", "results.csv")
    folders = "Images", "images", "Flicker8k_Dataset", "flickr30k-images", "flickr30k_images", "Flickr8k_Dataset"
    root = published(data, *folders)
    match table.name:
        case "captions.txt":
            rows = flickr_captions(table)
        case "results.csv":
            rows = flickr_results(table)
        case _:
            rows = flickr_json(table) if table.suffix == ".json" else flickr_annotations(table)
            return Source(root, rows, f"{name}, Karpathy's test split")
    protocol = f"{name}, the full set and NOT Karpathy's 1,000 test pictures ({table.name} has no split)"
    return Source(root, rows, protocol)


def flickr_json(table):
    """Rows of the test split in Karpathy's JSON."""
    rows = []
    for image in read_json(table)["images"]:
        if image["split"] == "test":
            for sentence in image["sentences"]:
                rows.append({"image": image["filename"], "caption": sentence["raw"]})
    return rows


def flickr_annotations(table):
    """Rows of the test split in a table with one picture a line, its captions as a JSON list."""
    rows = []
    for record in read_text_table(table, is_known).records:
        if record["split"] == "test":
            for caption in json.loads(record["raw"]):
                rows.append({"image": record["filename"], "caption": caption})
    return rows


def flickr_captions(table):
    """Rows of `image,caption`. A caption with a comma is quoted; one that was not is cut, and cannot be used."""
    found = read_text_table(table, is_known)
    rows = []
    for number, record in enumerate(found.records):
        row = {"image": record["image"], "caption": record.get("caption")}
        if number in found.faults:
            row["fault"] = found.faults[number]
        rows.append(row)
    return rows


def flickr_results(table):
    """Rows of `image_name| comment_number| comment`. The caption is None where a `|` is missing."""
    rows = []
    for line in read_text(table).splitlines()[1:]:
        image, _, numbered = line.partition("|")
        _, _, caption = numbered.partition("|")
        rows.append({"image": image.strip(), "caption": caption.strip() or None})
    return rows


# --------------------------------------------------------------------------------------------------- multiple choice


def read_okvqa(data, out):
    """The v1.1 questions and annotations of val2014, and the pictures in val2014/."""
    table = read_json(published(data, "OpenEnded_mscoco_val2014_questions.json"))
    notes = read_json(published(data, "mscoco_val2014_annotations.json"))
    answers = {}
    for note in notes["annotations"]:
        answers[note["question_id"]] = [answer["answer"] for answer in note["answers"]]
    questions = []
    for asked in table["questions"]:
        image = f"COCO_val2014_{asked['image_id']:012d}.jpg"
        number = asked["question_id"]
        questions.append(Question(number, image, asked["question"], answers.get(number, [])))
    return Source(published(data, "val2014"), multiple_choice(questions), f"OK-VQA val2014, {CHOICES}")


def read_textvqa(data, out):
    """TextVQA_0.5.1_val.json, and the pictures in train_images/, where its validation pictures are too."""
    table = read_json(published(data, "TextVQA_0.5.1_val.json"))
    questions = []
    for asked in table["data"]:
        image = f"{asked['image_id']}.jpg"
        questions.append(Question(asked["question_id"], image, asked["question"], asked["answers"]))
    return Source(published(data, "train_images"), multiple_choice(questions), f"TextVQA 0.5.1 val, {CHOICES}")


def multiple_choice(questions):
    """Rows of open questions, each with four choices: its most frequent answer and three distractors.

    The distractors are the most frequent answers to other questions that begin with the same word (to any question,
    where those are too few). None of them was given to this question. The question's number alone seeds the draw.
    Answers are compared and shown as the VQA evaluation normalises them. A question without a text or an answer is a row
    with a fault.
    """
    answers = [[normalise_answer(str(answer)) for answer in question.answers] for question in questions]
    best = []  # the most frequent answer to each question, None where it cannot be asked
    pool_of_word = defaultdict(dict)  # first word -> its answers; dicts keep the order of the questions
    pool_of_all = {}
    for question, given in zip(questions, answers):
        answer = Counter(given).most_common(1)[0][0] if given and question.text.strip() else None
        best.append(answer)
        if answer is not None:
            pool_of_word[first_word(question)][answer] = None
            pool_of_all[answer] = None
    rows = []
    for question, answer, given in zip(questions, best, answers):
        if answer is None:
            lacks = "answers" if question.text.strip() else "text"
            fault = f"question without {lacks}: number {question.number}"
            rows.append({"image": question.image, "caption": None, "fault": fault})
            continue
        pool = pool_of_word[first_word(question)]
        if len(pool.keys() - given) < 3:
            pool = pool_of_all
        distractors = draw_distractors(question.number, list(pool), set(given), 3)
        rows.append(
            {
                "image": question.image,
                "caption": f"{question.text} {answer}",
                "question": question.text,
                "answer": answer,
                "choices": sorted([answer, *distractors]),
            }
        )
    return rows


def first_word(question):
    return question.text.lower().split()[0]


NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
    )
)


def normalise_answer(answer):
    """An answer as the VQA evaluation compares it: small letters, no articles and punctuation, numbers as digits.

    Its list of contractions (dont for don't) is not needed: apostrophes stay. What would be empty stays as it is.
    """
    plain = " ".join(answer.lower().split())
    plain = re.sub(r"(?<=\d),(?=\d)", "", plain)
    plain = re.sub(r"(?<!\d)\.|\.(?!\d)", "", plain)
    plain = re.sub(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]", " ", plain)
    words = [NUMBERS.get(word, word) for word in plain.split() if word not in ("a", "an", "the")]
    return " ".join(words) or answer.strip().lower()


STANDARD_SETS = {
    "imagenet1k": read_imagenet,
    "cifar10": functools.partial(read_cifar, name="CIFAR10"),
    "cifar100": functools.partial(read_cifar, name="CIFAR100"),
    "coco": read_coco,
    "flickr8k": functools.partial(read_flickr, name="flickr8k"),
    "flickr30k": functools.partial(read_flickr, name="flickr30k"),
    "okvqa": read_okvqa,
    "textvqa": read_textvqa,
}
