"""The caption files of published sets, in their authors' own forms, to records: COCO's and Karpathy's JSON, Flickr's tokens.

Here they are data like any other, to train on too. As test sets, with their protocols, they are in `hyma/standard_sets.py`.
"""

import re
from collections import Counter, defaultdict

from vlm import BadInput

TOKEN_LINE = re.compile(r"(?P<image>[^\t]+)#(?P<number>\d+)\t(?P<caption>.*)")


def published_records(path, value):
    """(records, a note) of the object in a JSON file, None if it is of no form that is known here."""
    images, notes = value.get("images"), value.get("annotations")
    if not isinstance(images, list) or not images or not all(isinstance(image, dict) for image in images):
        return None
    if isinstance(notes, list):
        return join_coco(path, images, notes)
    if "sentences" in images[0]:
        return [karpathy_record(image) for image in images], "Karpathy's JSON"
    return None


def join_coco(path, images, notes):
    """(a record for each picture, with its captions in the order of their numbers; a note)."""
    captions = defaultdict(list)
    rejected = Counter()  # image -> its captions that count for none
    for number, note in enumerate(notes):
        if isinstance(note, dict) and note.get("is_rejected"):  # VizWiz's: that the picture shows too little
            rejected[note.get("image_id")] += 1
        elif isinstance(note, dict) and note.get("caption") is not None:
            captions[note.get("image_id")].append((note.get("id", number), note["caption"]))
    if not captions:
        raise BadInput(
            f"--data {path}: its annotations are no captions, which are in captions_train2017.json and its like; give these alone"
        )
    records = []
    for image in images:
        own = sorted(captions.pop(image.get("id"), []), key=lambda pair: pair[0])
        if not own and image.get("id") in rejected:
            continue
        record = {"image": image.get("file_name"), "caption": [caption for _, caption in own]}
        if image.get("split"):  # COCO's own has none
            record["split"] = image["split"]
        records.append(record)
    note = "COCO's captions"
    if rejected:
        note += f"; without {rejected.total():,} that it marks as rejected"
    if len(records) < len(images):
        note += f" and {len(images) - len(records):,} pictures that have no others"
    others = sum(map(len, captions.values()))
    if others:
        note += f"; {others:,} captions are of pictures that it does not list"
    return records, note


def karpathy_record(image):
    """Karpathy's record of a picture, whose path COCO's has in two parts."""
    folder, file = image.get("filepath"), image.get("filename")
    path = f"{folder}/{file}" if folder and file else file
    return {"image": path, "caption": image.get("sentences"), "split": image.get("split")}


def is_token_file(path):
    """Whether a file's name is that of Flickr's captions: Flickr8k.token.txt, results_20130124.token."""
    name = path.name.casefold()
    return name.endswith((".token", ".token.txt")) and "lemma" not in name


def token_records(text):
    """(records, {number: fault}) of lines `picture.jpg#0<tab>caption`."""
    records = []
    faults = {}
    for line in text.split("\n"):  # and not at U+2028 and its like, which stand within captions
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        found = TOKEN_LINE.fullmatch(line)
        if found is None:
            faults[len(records)] = "no line of picture.jpg#0, a tab and a caption"
            records.append({})
            continue
        records.append({"image": found["image"], "caption": found["caption"]})
    return records, faults
