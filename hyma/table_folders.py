"""What the folders around a table say, and lists in them: where its pictures lie, and which split its rows are of."""

import os
import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from hyma.annotations import is_token_file
from hyma.columns import named
from hyma.corpus_files import HIDDEN, names_from
from hyma.picture_folders import split_of_folders
from hyma.pictures import find_file, why_no_path
from hyma.remote import find_remote, list_folder
from hyma.splits import SPELLINGS, known_split, split_of_pictures, split_of_words
from hyma.tables import read_text
from vlm import BadInput

ANNOTATION_FOLDER = re.compile(r"annotations?|captions?|(.*_)?text", re.I)  # in which a table lies beside its pictures

# ------------------------------------------------------------------------------------------------------------ pictures


def find_root(table, rows, root, split):
    """The folder that a table's image paths start from: where most of its pictures are.

    A folder beside it that is named after its split, test/ or images_test/ of test.csv; its own, or, as in LLaVA's layout,
    images/ beside it; the same of the folder that --data names. Where none of these has any, another folder beside the table.
    Raises BadInput if several of these have some.
    """
    few = 4 if find_remote(table) else 500  # over a network each takes a while
    some = rows[:: max(1, len(rows) // few)]
    images = [row["image"] for row in some if row["image"]]

    def count_there(folder):
        return sum(find_file(folder, image) is not None for image in images)

    beside = folders_beside(table, root)
    of_split = [folder for folder in beside if split and known_split(folder.name) == split]
    of_split = of_split or [folder for folder in beside if split and split_of_pictures(folder.name) == split]
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
    holding = [folder for folder in beside if count_there(folder)]
    holding = [folder for folder in holding if folder in of_split] or holding
    if len(holding) > 1:
        raise BadInput(
            f"--data {table}: its pictures may be those of {named(holding)}; write the folder into the paths of its pictures"
        )
    return holding[0] if holding else table.parent


class Place(NamedTuple):
    """Where a table's rows are among all rows, and its pictures on the disk."""

    table: Path
    split: str | None  # what the table is named after
    folder: Path  # that its pictures were found in
    rows: slice

    def is_of_other_split(self):
        """Whether the pictures were found in a folder beside the table that is named after another split."""
        is_found = self.split and self.folder != self.table.parent
        return is_found and split_of_pictures(self.folder.name) not in (None, self.split)


def check_not_shared(places, rows):
    """Raises BadInput if a table has most likely taken the pictures of another split for its own: train.csv and val.csv both
    say 0.jpg, and each means its own folder, of which one is not there or has a name that says nothing.

    In the folder of another split one such picture is enough, or that its table is not read. In any other folder nearly all
    must be the other table's too, with other captions: of rows that are in both, the picture is the same indeed.
    """
    if len(places) == 1 and places[0].is_of_other_split():
        raise BadInput(
            f"--data {places[0].table}: its pictures may be those of {places[0].folder}, which is named after another split; "
            "write that folder into their paths, or bring its own"
        )
    pictures_of_split = defaultdict(set)
    for place in places:
        pictures_of_split[place.split].update(row["image"] for row in rows[place.rows] if row["image"])
    if len(pictures_of_split) < 2:
        return
    for place in places:
        own = {row["image"] for row in rows[place.rows] if row["image"]}
        for split, pictures in pictures_of_split.items():
            shared = sorted(own & pictures) if split != place.split else []
            if shared and place.is_of_other_split():
                raise BadInput(
                    f"--data {place.table}: its {shared[0]} is in another table too, and {place.folder} is named after another "
                    "split; bring its own pictures, or write their folder into their paths"
                )
            if shared and len(shared) >= 0.9 * len(own) and has_other_captions(place, split, places, rows):
                raise BadInput(
                    f"--data {place.table}: {len(shared):,} of its {len(own):,} pictures, {shared[0]} for one, are in a table of "
                    "another split, or of none, too, with other captions; write the folder of its own into their paths, or name "
                    "one table"
                )


def has_other_captions(place, split, places, rows):
    """Whether most rows of a table are not among those of a split's tables."""
    others = set()
    for other in places:
        if other.split == split:
            others |= {(row["image"], row["caption"]) for row in rows[other.rows]}
    own = rows[place.rows]
    return sum((row["image"], row["caption"]) in others for row in own) < len(own) / 2


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
    """({table: the split that it is of, None where nothing says so}, lines about it).

    A word of its name counts first, then a folder that is named after a split and nothing else, then a word of a folder's name.
    Where one is named train, another that is named after no split, and stands beside those that are, has its name for one, so
    that it is not trained on. A folder that all tables are in says nothing where their names do. Of a saved DatasetDict the
    folders are the splits, whatever their names.
    """
    is_saved = (root / "dataset_dict.json").is_file()
    folders = {path: path.relative_to(root).parent.parts for path in paths}
    have_names = any(split_of_words(path.stem) for path in paths)
    shared = len(os.path.commonprefix(list(folders.values()))) if have_names and not is_saved else 0
    splits = {}
    named_otherwise = []
    for path in paths:
        own_folders = folders[path][shared:]
        of_folder = split_of_folders(own_folders)
        likeliest_first = (split_of_words(path.stem), of_folder, *map(split_of_words, own_folders))
        splits[path] = next(filter(None, likeliest_first), None)
        if of_folder not in (None, splits[path]):
            named_otherwise.append(path)
    if is_saved and any(splits.values()):
        for path in paths:
            splits[path] = splits[path] or folders[path][0]
    if "train" in splits.values():
        names = {path: (*folders[path][shared:], split_of_words(path.stem) or path.stem) for path in paths}
        beside = names_beside(names.values())
        for path in paths:
            splits[path] = splits[path] or beside.get(names[path])
    what = "of the split in the table's name, and not of that in its folder's"
    return splits, [f"{names_from(root, named_otherwise)}: {what}"] if named_otherwise else []


def split_of_each_folder(rows):
    """{row's number: the split that the folder of its picture is named after}, empty if these are not different.

    Folders that all pictures are in say nothing. A picture in a folder beside those of splits, which is none, has the folder's
    name for one, so that it is not trained on.
    """
    with_picture = [number for number, row in enumerate(rows) if row["image"] and why_no_path(row["image"]) is None]
    folders = [PurePosixPath(rows[number]["image"].replace("\\", "/")).parent.parts for number in with_picture]
    shared = len(os.path.commonprefix(folders))
    folders = [parts[shared:] for parts in folders]
    splits = [split_of_folders(parts) for parts in folders]
    if len(set(splits) - {None}) < 2:
        return {}
    beside = names_beside(set(folders))
    named_so = {number: split or beside.get(parts) for number, split, parts in zip(with_picture, splits, folders)}
    return {number: split for number, split in named_so.items() if split}


def names_beside(paths):
    """{path: the name in it that stands beside those of splits, or is one itself}, of paths as tuples of names."""
    parents = set()
    for names in paths:
        parents |= {names[:depth] for depth, name in enumerate(names) if known_split(name)}
    found = {}
    for names in paths:
        beside = [name for depth, name in enumerate(names) if names[:depth] in parents]
        if beside:
            found[names] = beside[0]
    return found


# ------------------------------------------------------------------------------------------------------ lists of splits


def split_of_lists(table, rows):
    """({row's number: the split of the lists beside the table that its picture is in}, the lists), both empty without such lists:
    trainImages.txt, val.txt, test.csv, of which half the lines at least are pictures of the table, with or without their endings.

    A picture in two lists is held out. One in no list is neither trained nor tested on, as Flickr8k's authors have it, but for
    lists of held-out pictures alone.
    """
    lists = [(path, split_of_words(path.stem)) for path in lists_beside(table) if path.suffix.lower() != ".json"]
    lists = [(path, split) for path, split in lists if split]
    if not lists:
        return {}, []
    images_of_name = defaultdict(set)
    for image in {row["image"] for row in rows if row["image"]}:
        path = PurePosixPath(image.replace("\\", "/"))
        for name in {str(path), str(path.with_suffix("")), path.name, path.stem} - {""}:
            images_of_name[name].add(image)
    split_of_image = {}
    used = []
    for path, split in sorted(lists, key=lambda pair: list(SPELLINGS).index(pair[1])):
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        found = [images_of_name[line] for line in lines if len(images_of_name.get(line, ())) == 1]
        if len(found) >= len(lines) / 2:  # a header may be among them
            split_of_image |= {image: split for (image,) in found}
            used.append(path)
    if not split_of_image:
        return {}, []
    other = "in no list" if "train" in split_of_image.values() else "train"
    return {number: split_of_image.get(row["image"], other) for number, row in enumerate(rows)}, used


def lists_beside(table):
    """The files beside a table, and in splits/ there, that may be lists of splits."""
    if find_remote(table):
        files = list_folder(table.parent) if is_token_file(table) else []  # a listing may be long
    else:
        folders = [table.parent, table.parent / "splits"]
        files = [folder / entry.name for folder in folders if folder.is_dir() for entry in os.scandir(folder)]
    return sorted(path for path in files if path != table and may_list_splits(path))


def may_list_splits(path):
    """Whether a file's name holds the word of a split: train_test_split.txt."""
    words = re.split(r"[-_.= ]", path.stem)
    return path.suffix.lower() in (".txt", ".csv", ".json") and any(known_split(word) or word == "split" for word in words)


def unread_lists(root, files, rows):
    """A line that names those of the files that may be lists of splits, where no row has a split; none without such files."""
    names = sorted({os.path.relpath(path, root) for path in files if may_list_splits(path)})
    if not names or any(row.get("split") for row in rows):
        return []
    return [f"not read, though named after splits: {named(names)}; splits are a column, or lists of pictures beside a table"]
