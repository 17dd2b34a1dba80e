"""The caption files of published sets, in their authors' own forms, to records: COCO's and Karpathy's JSON, Flickr's tokens.

Here they are data like any other, to train on too. As test sets, with their protocols, they are in `hyma/standard_sets.py`.
"""

import re
from collections import Counter, defaultdict

from hyma.remote import list_folder, read_bytes
from vlm import BadInput

SPLIT_LIST = re.compile(r".*\.(?P<split>train|dev|test)Images\.txt", re.I)  # Flickr_8k.trainImages.txt, and so on
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


def token_records(path, text):
    """(records, a note) of lines `picture.jpg#0<tab>caption`, with the splits of the lists that lie beside the file."""
    split_of_image = {}
    for file in list_folder(path.parent):
        found = SPLIT_LIST.fullmatch(file.name)
        if found:
            for image in read_bytes(file).decode(errors="surrogateescape").split():
                split_of_image[image] = found["split"].lower()
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
        record = {"image": found["image"], "caption": found["caption"]}
        if split_of_image:
            # Flickr8k's authors leave some pictures out of all lists: neither to train nor to test on.
            record["split"] = split_of_image.get(found["image"], "in no list")
        records.append(record)
    note = "Flickr's captions"
    return records, faults, note + "; splits of the lists beside it" if split_of_image else note
