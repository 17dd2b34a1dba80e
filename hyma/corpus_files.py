"""Which files a corpus is read from: its tables and shards, else its pictures."""

import glob
import os
from collections import Counter
from pathlib import Path

from hyma.annotations import is_token_file
from hyma.braces import expand_braces
from hyma.columns import is_known, named
from hyma.inflating import METHODS
from hyma.picture_folders import CAPTION_SUFFIXES
from hyma.pictures import IMAGE_SUFFIXES, OTHER_SUFFIXES, holds_picture
from hyma.remote import find_remote, list_remote, open_file, open_source
from hyma.splits import split_of_words
from hyma.tables import choose_delimiter
from vlm import BadInput

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow", ".tar")
SHARD_SUFFIXES = (".parquet", ".arrow")  # of which a corpus has many files
TAR_SUFFIXES = (".tar", *METHODS)
ARCHIVE_SUFFIXES = (".zip", ".gz", ".tgz", ".zst", ".7z", ".rar")
TABLE_STEMS = ("captions", "metadata", "chat", "blip_laion_cc_sbu_558k")  # where a folder holds several, the first
ABOUT_CORPUS = ("dataset_infos.json", "dataset_info.json")  # the datasets library's, which hold no rows
HIDDEN = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found")


def is_pattern(data):
    """Whether a path stands for several files, by braces or by a *, and is none itself."""
    return ("*" in str(data) or len(expand_braces(str(data))) > 1) and not data.exists()


def match_files(pattern):
    """The files of a folder whose names have the form of a path's name, in which * is, sorted."""
    folder = pattern.parent
    if open_source(folder):
        files = list_remote(folder, pattern)
    else:
        files = sorted(path for path in folder.glob(pattern.name) if path.is_file())
    if not files:
        raise BadInput(f"--data {pattern}: matches no file")
    return files


def list_files(root):
    """(all files below a folder, sorted; lines about what was passed over). Hidden files and folders are not there.

    Links to folders are followed, each folder once: a link that leads back is a loop and is passed over.
    """
    files = []
    links = []
    seen = set()

    def list_folder(folder):
        seen.add(os.path.realpath(folder))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name.casefold() in HIDDEN:
                continue
            path = Path(entry.path)
            is_link = entry.is_symlink()
            if not is_link and entry.is_dir():
                list_folder(path)
            elif os.path.isdir(path):
                links.append(path)
            # a link that leads nowhere is a picture that is missing
            elif os.path.isfile(path) or (is_link and path.suffix.lower() in IMAGE_SUFFIXES):
                files.append(path)

    list_folder(root)
    passed_over = []
    while links:
        link = links.pop(0)
        if os.path.realpath(link) in seen:
            passed_over.append(str(link.relative_to(root)))
        else:
            list_folder(link)
    notes = []
    if passed_over:
        notes.append(f"links to folders that are read already: {named(passed_over)}")
    return sorted(files), notes


def find_tables(root, files):
    """The tables that a folder's rows are read from, or none: its own, else those below it.

    Of several, those named in TABLE_STEMS; else those named after splits; else all parts of one table.
    """
    found = list_tables(files)
    own = []
    known = []
    for path in found:
        if path.parent == root:
            own.append(path)
        if path.stem in TABLE_STEMS or path.stem.startswith("captions_"):  # COCO's, beside its boxes
            known.append(path)
    for stem in TABLE_STEMS:
        for path in own:
            if path.stem == stem:
                return [path]
    tables = own or known or found
    if are_one_corpus(tables):
        return tables
    raise BadInput(f"--data {root}: holds several tables ({names_from(root, tables)}); name one of them")


def tables_passed_over(root, files, tables):
    """The tables of a folder that its rows are not read from: those among `files`, and those of an equal name in a folder beside
    one that is read, as Hugging Face has them for its splits."""
    passed_over = [path for path in list_tables(files) if path not in tables]
    if find_remote(root):
        return passed_over
    for table in tables:
        if table.parent == root:
            for path in sorted(root.glob(f"[!.]*/{glob.escape(table.name)}")):
                if path.is_file() and path not in passed_over and path.parent.name.casefold() not in HIDDEN:
                    passed_over.append(path)
    return passed_over


def list_tables(files):
    """The files that are tables, without those about a picture or an archive: img2dataset writes one beside each."""
    archives = set()  # without their suffixes
    described = set()  # the same, and of the pictures
    folders_of_archives = set()
    for path in files:
        if is_tar(path):
            archives.add(path.with_name(path.name[: -len(table_suffix(path))]))
            folders_of_archives.add(path.parent)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            described.add(path.with_suffix(""))
    described |= archives

    def is_about_another(path, suffix):
        plain = path.with_suffix("")
        match suffix:
            case ".json":
                return plain in described or path.parent in folders_of_archives  # webdataset's own
            case ".parquet":
                return plain in archives
            case ".csv" | ".tsv":  # captions.csv beside captions.png is a table all the same
                return plain in described and not names_captions(path)
        return False

    tables = []
    for path in files:
        suffix = path.suffix.lower()
        if is_tar(path):
            tables.append(path)
        elif path.name in ABOUT_CORPUS or path.stem.endswith("_stats") or is_about_another(path, suffix):
            continue
        elif suffix in TABLE_SUFFIXES or is_token_file(path) or is_text_list(path):
            tables.append(path)
    return tables


def table_suffix(path):
    """The ending of a file's name, small: of a compressed tar, both parts."""
    for suffix in TAR_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    return path.suffix.lower()


def is_tar(path):
    return table_suffix(path) in TAR_SUFFIXES


def is_archive(path):
    """Whether a file is an archive, of the kinds that are read or of another."""
    return is_tar(path) or path.suffix.lower() in ARCHIVE_SUFFIXES


def is_text_list(path):
    """Whether a .txt file is a table with a header, as Flickr8k's captions.txt is."""
    return path.suffix.lower() == ".txt" and path.stem in TABLE_STEMS and names_captions(path)


def names_captions(path):
    """Whether the first line of a file names columns of pictures and captions."""
    with open_file(path) as file:
        header = file.readline(2**16).decode("utf-8-sig", errors="replace")
    names = [name.strip().strip('"') for name in header.split(choose_delimiter(header, ",", is_known))]
    return any(is_known(name, "image") for name in names) and any(is_known(name, "caption") for name in names)


def are_one_corpus(tables):
    """Whether tables are read together: each in a folder of its own, all named after splits, or all shards of one kind."""
    folders = {path.parent for path in tables}
    if len(tables) < 2 or len(folders) == len(tables):
        return True
    suffixes = {table_suffix(path) for path in tables}
    if 0 < sum(map(is_tar, tables)) < len(tables):  # the archive most likely holds the pictures of the others
        return False
    if len(suffixes) == 1 and suffixes.issubset((*SHARD_SUFFIXES, *TAR_SUFFIXES)):
        return True
    return all(split_of_words(path.stem) or path.stem in TABLE_STEMS for path in tables)


def names_from(root, paths):
    """Paths as they are named from the root, for a message."""
    return named([path.relative_to(root) for path in paths])


def sort_files(root, files):
    """(a folder's pictures, lines about the files that are none). Raises BadInput if there are no pictures."""
    pictures = []
    archives = []
    others = Counter()
    for path in files:
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES or suffix in OTHER_SUFFIXES:
            pictures.append(path)
        elif suffix in CAPTION_SUFFIXES or suffix in TABLE_SUFFIXES or is_tar(path):
            continue
        elif holds_picture(path):
            pictures.append(path)
        else:
            others[suffix or "without a suffix"] += 1
        if suffix in ARCHIVE_SUFFIXES:
            archives.append(path.name)
    if not pictures and archives:
        raise BadInput(
            f"--data {root}: holds archives ({named(archives)}); unpack them, and give the folder with what was in"
        )
    if not pictures:
        raise BadInput(f"--data {root}: holds no table ({' '.join(sorted(TABLE_SUFFIXES))}) and no pictures")
    if not others:
        return pictures, []
    counts = [f"{count:,} {kind}" for kind, count in others.items()]
    return pictures, [f"passed over, no pictures: {named(counts)}"]
