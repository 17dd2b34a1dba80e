"""What the folders around a table say: where its pictures lie, and which split its rows are of."""

import os
import re
from pathlib import PurePosixPath

from hyma.columns import named
from hyma.corpus_files import HIDDEN
from hyma.picture_folders import split_of_folders
from hyma.pictures import find_file, why_no_path
from hyma.remote import find_remote
from hyma.splits import known_split, split_of_words
from vlm import BadInput

ANNOTATION_FOLDER = re.compile(r"annotations?|captions?|(.*_)?text", re.I)  # in which a table lies beside its pictures

# ------------------------------------------------------------------------------------------------------------ pictures


def find_root(table, rows, root):
    """The folder that a table's image paths start from: where most of its pictures are.

    A folder beside it that is named after the table's split, test/ of test.csv; its own, or, as in LLaVA's layout, images/ beside
    it; the same of the folder that --data names. Where none of these has any, another folder beside the table. Raises BadInput if
    several of these have some.
    """
    few = 4 if find_remote(table) else 500  # over a network each takes a while
    some = rows[:: max(1, len(rows) // few)]
    images = [row["image"] for row in some if row["image"]]

    def count_there(folder):
        return sum(find_file(folder, image) is not None for image in images)

    split = split_of_path(table.relative_to(root))
    of_split = [folder for folder in folders_beside(table, root) if known_split(folder.name) == split] if split else []
    usual = of_split[:1] if len(of_split) == 1 else []
    for base in (table.parent, root):
        usual += [base, base / "images", base / "Images"]
    best, most = None, 0
    for folder in usual:
        count = count_there(folder)
        if count > most:
            best, most = folder, count
        if most == len(images):
            break
    if best:
        return best
    holding = [folder for folder in folders_beside(table, root) if count_there(folder)]
    holding = [folder for folder in holding if folder in of_split] or holding
    if len(holding) > 1:
        raise BadInput(
            f"--data {table}: its pictures may be those of {named(holding)}; write the folder into the paths of its pictures"
        )
    return holding[0] if holding else table.parent


def check_not_shared(table, rows, folder, start, end):
    """Raises BadInput if another table has a picture of a table whose own were found in the folder of another split: 0.jpg of val.csv
    in train/, which train.csv means. rows: of all tables; the table's are those from start to end."""
    others = {row["image"] for row in rows[:start] + rows[end:]}
    for row in rows[start:end]:
        if row["image"] in others:
            raise BadInput(
                f"--data {table}: its {row['image']} is in another table too, and {folder} is named after another split; bring its own "
                "pictures, or write their folder into their paths"
            )


def folders_beside(table, root):
    """The folders, at most 100, in which the pictures of a table may be: in its own, in that around annotations/, in images/."""
    around = {table.parent, root}
    if ANNOTATION_FOLDER.fullmatch(table.parent.name):
        around.add(table.parent.parent)
    around |= {base / "images" for base in around if (base / "images").is_dir()}
    folders = []
    for base in [] if find_remote(table) else sorted(around):
        inside = [entry.name for entry in os.scandir(base) if entry.is_dir()]  # no look at each of its pictures
        folders += [base / name for name in sorted(inside) if not name.startswith(".") and name.casefold() not in HIDDEN]
    return folders[:100]


def prefix_images(rows, folder):
    """Lets the paths of a table below the corpus's root start from the root."""
    for row in rows:
        image = row["image"]
        if folder != "." and image and not re.match(r"[A-Za-z]+:|~|/", image):
            row["image"] = f"{folder}/{image}"


# -------------------------------------------------------------------------------------------------------------- splits


def splits_of_tables(root, paths):
    """{table: the split that its folders or its name say it is of, None where they do not}.

    Of a saved DatasetDict the folders are the splits, whatever their names: rows of an unknown split are not trained on.
    """
    splits = {path: split_of_path(path.relative_to(root)) for path in paths}
    if any(splits.values()) and (root / "dataset_dict.json").is_file():
        for path in paths:
            splits[path] = splits[path] or path.relative_to(root).parts[0]
    return splits


def split_of_path(path):
    """The split that a table's path says it is of, None if it does not. A folder that is named after a split and nothing else
    counts first, then a word of the table's name, then one of a folder's."""
    folders = path.parent.parts
    for split in (split_of_folders(folders), split_of_words(path.stem), *map(split_of_words, folders)):
        if split:
            return split
    return None


def split_by_folders(rows):
    """Gives rows the split that the folder of their picture is named after, if these are different. Folders that all pictures are
    in say nothing. A picture in a folder beside those of splits, which is none, has the folder's name for one, so that it is not
    trained on. Returns whether there are such splits."""
    with_picture = [row for row in rows if row["image"] and why_no_path(row["image"]) is None]
    folders = [PurePosixPath(row["image"].replace("\\", "/")).parent.parts for row in with_picture]
    shared = len(os.path.commonprefix(folders))
    folders = [parts[shared:] for parts in folders]
    splits = [split_of_folders(parts) for parts in folders]
    if len(set(splits) - {None}) < 2:
        return False
    parents = set()  # of the folders of splits
    for parts in set(folders):
        parents |= {parts[:depth] for depth, folder in enumerate(parts) if known_split(folder)}
    for row, split, parts in zip(with_picture, splits, folders):
        beside = [folder for depth, folder in enumerate(parts) if parts[:depth] in parents]
        if split or beside:
            row["split"] = split or beside[0]
    return True
