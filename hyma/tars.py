"""Tar archives of samples, as webdataset reads and img2dataset writes them, to records: key.jpg, key.txt, key.json, key.cls.

The members of a sample have one name up to the first dot. Only headers and texts are read here; a picture becomes its
address in the archive (`hyma/packed.py`), and nothing is extracted. A compressed archive is inflated as it is read
(`hyma/inflating.py`).
"""

import json
import os
import tarfile
from pathlib import Path

from hyma.columns import CLASS_FILES, as_number, named, read_class_file, readable_label
from hyma.inflating import DAMAGE, find_ending, inflated_size, open_inflated
from hyma.packed import tar_address
from hyma.pictures import IMAGE_SUFFIXES
from hyma.remote import find_remote, open_file
from hyma.tables import Table
from vlm import BadInput, read_json

CAPTION_MEMBERS = ("txt", "text", "caption")
LARGEST_TEXT = 2**24  # bytes of a text that is read


def read_tar(path, asked) -> Table:
    """The Table of an archive: a record for each sample.

    asked: the Asked columns, which may also be endings of members: of the picture's, where a sample has several, and of the
    caption's. An archive that is cut off costs its end, which the Table's note says.
    """
    members, is_whole = list_members(path)
    samples = {}  # key -> {ending: member}
    repeated = {}  # key -> a file of its sample that comes again: nobody knows which of the two is meant
    for member in members:
        key, ending = split_name(member.name)
        if key is not None and samples.setdefault(key, {}).setdefault(ending, member) is not member:
            repeated[key] = member.name
    if not samples:
        raise BadInput(f"--data {path}: holds no files{'' if is_whole else '; it is cut off'}")
    records = []
    faults = {}
    with open_archive(path) as file:
        for key, sample in samples.items():
            try:
                if key in repeated:
                    raise ValueError(f"the archive holds {repeated[key]} twice")
                records.append(read_sample(path, file, sample, asked))
            except ValueError as error:
                if isinstance(error, BadInput):
                    raise
                faults[len(records)] = f"broken sample: {key}: {error}"
                records.append({})
    endings = sorted({ending for sample in samples.values() for ending in sample})
    note = f"samples of {' '.join('.' + ending for ending in endings[:8])}"
    if not any(has_caption(record, asked.is_known) for record in records) and any("label" in record for record in records):
        name_classes(path, records)
        note += "; the names of the classes are the captions"
    check_pictures(path, records, endings, asked)
    if not is_whole:
        note += f"; CUT OFF after {len(records):,}{expected_samples(path)} samples: the rest is not there"
    return Table(records, faults, note=note)


def open_archive(path):
    """The bytes of an archive as they are before they are compressed, as a file."""
    return open_inflated(path) if find_ending(path) else open_file(path)


def list_members(path):
    """(the files in an archive, whether it is whole). A tar has two empty blocks at its end, so that a cut one is known."""
    members = []
    start, is_whole = 0, True
    try:
        size, is_all = inflated_size(path) if find_ending(path) else (file_size(path), True)
        with open_archive(path) as file:
            while start is not None:
                start, is_whole = read_members(file, start, size, members)
    except (tarfile.ReadError, *DAMAGE) as error:
        with open_file(path) as file:
            start = file.read(6)
        if not find_ending(path) and start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise BadInput(
                f"--data {path}: is compressed, and its name does not say how; name it .tar.gz, .tar.bz2, .tar.xz or .tar.zst, or uncompress it"
            ) from None
        raise BadInput(f"--data {path}: is no tar archive, or is cut off in its first file ({error})") from None
    return members, is_whole and is_all


def read_members(file, start, size, members):
    """Adds the files of the archive that begins at a byte. Returns (where the one begins that was joined to it, as `cat` does, else
    None; whether it is whole)."""
    file.seek(start)
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  not decompressed by it: a picture is reached by its place
    except (tarfile.ReadError, *DAMAGE):
        if start == 0:
            raise
        return None, False
    with archive:
        file.seek(archive.offset)
        try:
            for member in archive:
                archive.members = []  # which would grow with the archive
                if member.isfile() and not member.issparse() and member.offset_data + member.size <= size:
                    members.append(member)
            end = archive.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return None, False
            return end_of_zeros(file, end), True
        except (tarfile.ReadError, *DAMAGE):  # cut within a member
            return None, False


def end_of_zeros(file, start):
    """Where the first block after a byte begins that is not empty, None if there is none."""
    file.seek(start)
    place = start
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return place
        place += len(block)
    return None


def file_size(path):
    with open_file(path) as file:
        return file.seek(0, os.SEEK_END)


def split_name(name):
    """(key, ending) of a member, as webdataset has them: up to and after the first dot. (None, None) for hidden files."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    key, _, ending = file.partition(".")
    if not key or not ending or key.startswith("__") or "__MACOSX" in folder:
        return None, None
    return f"{folder}/{key}", ending.lower()


def read_sample(path, file, sample, asked):
    """The record of a sample. Raises ValueError, a line, for a sample that cannot be read."""
    record = {}
    if "json" in sample:
        value = json.loads(read_text_member(file, sample["json"]))
        if not isinstance(value, dict):
            raise ValueError("its .json is no object")
        record |= {name: part for name, part in value.items() if asked.is_known(name)}
    record[asked.image or "image"] = find_picture(path, sample, asked.image)
    endings = [asked.caption]
    if not record.get(asked.caption):  # else a field of the .json is asked for
        endings += CAPTION_MEMBERS
    for ending in endings:
        if ending in sample:
            text = read_text_member(file, sample[ending])
            column = ending if ending == asked.caption else "caption"
            # img2dataset writes the caption twice: in one, a line's end stands within a caption.
            if record.get(column) != text:
                record[column] = [line for line in text.split("\n") if line.strip()] or None
            break
    record.setdefault("caption", None)
    if "cls" in sample:
        record.setdefault("label", read_text_member(file, sample["cls"]).strip())
    return record


def find_picture(path, sample, image_column):
    """The address of a sample's picture, None where it has none. Raises BadInput if it has several and none is named."""
    endings = []
    for ending in sample:
        if "." + ending in IMAGE_SUFFIXES:
            endings.append(ending)
    if image_column is not None:
        endings = [image_column.removeprefix(".")] if image_column.removeprefix(".") in sample else []
    if len(endings) > 1:
        raise BadInput(
            f"--data {path}: {sample[endings[0]].name}: its sample has several pictures (.{', .'.join(endings)}); name one "
            f"with --image-column {endings[0]}"
        )
    if not endings:
        check_dots(path, sample)
        return None
    member = sample[endings[0]]
    return f"{path.name}/{tar_address(member.name.removeprefix('./'), member.offset_data, member.size)}"


def check_pictures(path, records, endings, asked):
    """Raises BadInput if no sample has a picture and some members are pictures all the same: theirs is image.jpg, say."""
    dotted = [ending for ending in endings if Path(ending).suffix in IMAGE_SUFFIXES]
    if dotted and not any(record.get(asked.image or "image") for record in records):
        raise BadInput(
            f"--data {path}: no sample has a .jpg or the like, but files that end with .{named(dotted)}; name the ending of the "
            f"picture, --image-column {dotted[0]}, and that of the caption, --caption-column ENDING, unless it is .txt"
        )


def check_dots(path, sample):
    """Raises BadInput if a sample without a picture has several whose endings hold a dot: their names most likely do."""
    pictures = [ending for ending in sample if Path(ending).suffix in IMAGE_SUFFIXES]
    if len(pictures) > 1:
        one, other = (sample[ending].name for ending in pictures[:2])
        raise BadInput(
            f"--data {path}: {one} and {other} would be one sample, as the name of a sample ends at the first dot; rename the "
            f"files, or, if they are one, name its picture with --image-column {pictures[0]}"
        )


def read_text_member(file, member):
    """The text of a member. What is not UTF-8 costs its own row: it is kept as surrogates."""
    if member.size > LARGEST_TEXT:
        raise ValueError(f"{Path(member.name).name} is a text of {member.size:,} bytes")
    file.seek(member.offset_data)
    return file.read(member.size).decode("utf-8-sig", errors="surrogateescape")


def has_caption(record, is_known):
    """Whether a record has a caption in any column that is read as one."""
    return any(value and is_known(name, "caption") for name, value in record.items())


def name_classes(path, records):
    """Gives samples that have a class and no caption the name of their class as both. Raises BadInput if it has no name."""
    names = {} if find_remote(path) else read_class_file(path.parent) or {}
    unnamed = set()
    for record in records:
        label = record.get("label")
        number = as_number(label)
        if number is not None and number not in names:
            unnamed.add(number)
        elif label not in (None, ""):
            record["label"] = names.get(number, label)
            record["caption"] = readable_label(record["label"])
    if unnamed:
        raise BadInput(
            f"--data {path}: its samples have classes (.cls) and no captions, and what the classes {named(sorted(unnamed))} are is "
            f"not known: write their names to {CLASS_FILES[0]} beside it, a line each, counted from 0"
        )


def expected_samples(path):
    """How many samples img2dataset says that it has written to an archive, for a message: "" where it does not."""
    stats = path.with_name(f"{path.name.partition('.')[0]}_stats.json")
    if not stats.is_file():
        return ""
    return f" of {read_json(stats).get('successes', '?')}"
