"""The rows of a folder without a table: pictures with a text each, or in folders named after their classes."""

import re
from collections import defaultdict

from hyma.columns import caption_fault, named, readable_label
from hyma.splits import known_split, split_of_words
from hyma.tables import read_text
from vlm import BadInput

CAPTION_SUFFIXES = (".txt", ".caption")
CONTAINERS = ("images", "image", "imgs", "img", "jpg", "jpgs", "jpeg", "jpegs", "jpegimages")  # what no class is called
NO_CAPTION_FOLDERS = ("labels", "annotations")  # their texts hold boxes


def find_caption_files(files, pictures):
    """{picture: text file}: the text beside it, or, where no picture has one, the text of that name in another folder."""
    texts_of_path = defaultdict(list)
    texts_of_name = defaultdict(list)
    for path in files:
        if path.suffix.lower() not in CAPTION_SUFFIXES:
            continue
        texts_of_path[path.with_suffix("")].append(path)
        if path.parent.name.casefold() not in NO_CAPTION_FOLDERS:
            texts_of_name[path.stem].append(path)
    beside = {}
    elsewhere = {}
    for picture in pictures:
        for name in (picture.with_suffix(""), picture):  # a.txt and a.jpg.txt
            if name in texts_of_path:
                beside[picture] = only_text(picture, texts_of_path[name])
                break
    if not beside:
        for picture in pictures:
            texts = texts_of_name[picture.stem]
            # images/train/a.jpg and captions/train/a.txt
            texts = [path for path in texts if path.parent.name == picture.parent.name] or texts
            if texts:
                elsewhere[picture] = only_text(picture, texts)
    captions = beside or elsewhere
    picture_of_text = {}
    for picture, text in captions.items():
        other = picture_of_text.setdefault(text, picture)
        if other != picture:  # a.png may be the mask of a.jpg
            raise BadInput(f"--data {text}: may be the caption of {other} or of {picture}; write a table of image and caption")
    return captions


def only_text(picture, texts):
    """The one text of a picture. Raises BadInput if there are several."""
    if len(texts) > 1:
        raise BadInput(f"--data {picture}: its caption may be in {named(texts)}; leave one of them there")
    return texts[0]


def read_text_files(root, pictures, captions):
    """(rows, a line about them) of pictures and texts, a caption a line. A picture without a text has an empty caption."""
    rows = []
    level, split_of_name = find_split_level([path.relative_to(root).parent.parts for path in pictures])
    for path in pictures:
        image = path.relative_to(root)
        folders = image.parent.parts
        split = split_of_folders(folders) if level is None or not folders else split_of_name[folders[level]]
        text = read_text(captions[path]) if path in captions else ""
        lines = [line for line in re.split("[\r\n]", text) if line.strip()]  # an old Mac ends them with \r
        for line in lines or [""]:
            row = {"image": str(image), "caption": line}
            fault = caption_fault(line)
            if fault:
                row["fault"] = fault
            if split:
                row["split"] = split
            rows.append(row)
    return rows, f"{root}: {len(captions):,} text files, a caption a line"


def read_class_folders(root, pictures):
    """(rows, a line about them) of a tree <class>/a.jpg, with folders named after splits above or below the classes.

    The classes are captions and labels. Folders that hold everything and are no split are passed over.
    """
    folders = [without_repeats(path.relative_to(root).parent.parts) for path in pictures]
    level, split_of_name = find_split_level(folders)
    splits = [None] * len(folders)
    if level is not None:
        folders, splits = take_level(folders, level)
    if not any(folders):
        raise BadInput(
            f"--data {root}: its pictures lie in folders of splits and have no captions: give a.txt beside a.jpg, a table, "
            "or folders named after classes"
        )
    while all(len(parts) != 1 for parts in folders) and len({parts[0] for parts in folders if parts}) == 1:
        folders, _ = take_level(folders, 0)
    check_classes(root, folders)
    rows = []
    for path, parts, split in zip(pictures, folders, splits):
        label = parts[0] if parts else ""
        row = {"image": str(path.relative_to(root)), "caption": readable_label(label), "label": label}
        if not parts:
            row["fault"] = "in no folder of a class"
        if split is not None:
            row["split"] = split_of_name[split]
        rows.append(row)
    classes = different_names(row["label"] for row in rows)
    how = f"{root}: {len(classes):,} folders are classes ({named(classes)})"
    if level is not None:
        how += f"; folders of splits: {named(different_names(splits))}"
    return rows, how


def without_repeats(parts):
    """The folders of a path, each once where one lies in another of its name, as archives are unpacked: train/train/cat."""
    return tuple(folder for folder, around in zip(parts, (None, *parts)) if folder != around)


def check_classes(root, folders):
    """Raises BadInput if some classes are none by their names: images/, or train/cat/ beside a folder that is no split."""
    classes = {parts[0] for parts in folders if parts}
    with_folders = {parts[0] for parts in folders if len(parts) > 1}
    for name in sorted(classes):
        others = sorted(classes - {name})
        beside = f" beside {named(others)}" if others else ""
        if name.casefold() in CONTAINERS:
            raise BadInput(
                f"--data {root}: its pictures have no captions, and the folder {name}{beside} names no class: give a.txt beside "
                "a.jpg, a table, or nothing but folders named after classes"
            )
        if name in with_folders and others and known_split(name):
            raise BadInput(
                f"--data {root}: the folder {name}{beside} is named after a split and holds folders, so that the classes are not "
                f"known: give the folder {name} alone, or name the others after splits too"
            )


def take_level(folders, level):
    """(the folders without those of one level, the names of that level, one for each picture)."""
    others = []
    names = []
    for parts in folders:
        others.append(parts[:level] + parts[level + 1 :])
        names.append(parts[level] if parts else None)  # a picture in no folder
    return others, names


def different_names(names):
    """The names that are not empty, each once and sorted."""
    return sorted(set(filter(None, names)))


def find_split_level(folders):
    """(how deep the folders lie that are named after splits, {name: split of its rows}), or (None, {}). All pictures that are in
    a folder must be in such a one.

    A class may itself be called train. So a level counts if all its names are splits, or two different splits at least, or if two
    differ in nothing but a word that is a split: seg_train and seg_test.
    """
    folders = [parts for parts in folders if parts]
    for level in range(min(map(len, folders), default=0)):
        names = {parts[level] for parts in folders}
        known = set(map(known_split, names))
        if None not in known or len(known - {None}) > 1:
            return level, {name: name for name in names}
        patterns = [without_splits(name) for name in names if split_of_words(name)]
        if len(patterns) > len(set(patterns)):
            return level, {name: split_of_words(name) or name for name in names}
    return None, {}


def without_splits(name):
    """A name's words, without those that are splits."""
    return tuple(word for word in re.split("[-_. ]", name) if not known_split(word))


def split_of_folders(folders):
    """The first split that folders are named after, or None."""
    for folder in folders:
        if known_split(folder):
            return known_split(folder)
    return None
