"""The embedding folder as it is made: an unfinished manifest, the files of the encoders, and the seal.

embeddings/<dataset>/manifest.partial.json    written with rows.jsonl, once every picture was read; gets a record for
                                              each encoder that is finished
                     manifest.json            manifest.partial.json, renamed last: the seal

So a folder with a manifest.json alone is always complete. To add encoders to a sealed folder, a new manifest.partial.json
starts from the old manifest.json. Who writes holds the folder's lock. What there is before is in `hyma/pass_shards.py`.
"""

import os

import torch

from hyma.files import lock_folder, save_tensors, sha256_file, write_json
from vlm import read_json

# ------------------------------------------------------------------------------------------------------ the manifest


def read_manifest(folder):
    """The unfinished manifest, else the one that seals the folder, else None."""
    for name in ("manifest.partial.json", "manifest.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return None


def write_manifest(folder, manifest):
    """Writes the unfinished manifest."""
    write_json(folder / "manifest.partial.json", manifest)


def add_to_manifest(folder, name, record):
    """Adds the record of a finished encoder to the unfinished manifest."""
    manifest = read_manifest(folder)
    manifest["encoders"][name] = record
    write_manifest(folder, manifest)


def seal_folder(folder):
    """Makes the unfinished manifest the folder's manifest. There is none if another process has sealed the folder."""
    if not (folder / "manifest.partial.json").is_file():
        return
    manifest = read_manifest(folder)
    for name in [name for name, record in manifest["encoders"].items() if record is None]:  # see `sound_record`
        print(f"{folder}: its {name} was damaged and is not embedded again: it is there no more")
        del manifest["encoders"][name]
        write_manifest(folder, manifest)
    os.replace(folder / "manifest.partial.json", folder / "manifest.json")


# ------------------------------------------------------------------------------------------------- from shards to a file


def place_items(shards):
    """{path of a picture, or caption: (number of its shard, number of its vector there)}.

    Of a picture that several rows name differently, the first counts.
    """
    places = {}
    for shard_number, shard in enumerate(shards):
        vector_number = 0
        for item in shard.items:
            if shard.kind == "pictures":
                picture = shard.found[item]
                if picture.reason:
                    continue
                places.setdefault(item, (shard_number, vector_number))  # as the rows of an adopted folder name it
                item = picture.image
            places.setdefault(item, (shard_number, vector_number))
            vector_number += 1
    return places


def join_shards(name, vector_format, shards, places, path):
    """Writes the vectors of all rows, [rows, dim], to `path`. places: of each row, (shard, vector).

    They are brought together in a file, so that memory does not grow with the rows.
    """
    together = shards[0].folder / name / "together"
    rows = len(places)
    with open(together, "wb") as file:
        file.truncate(rows * vector_format.row_bytes)
    vectors = torch.from_file(str(together), shared=True, size=rows * vector_format.dim, dtype=vector_format.dtype)
    vectors = vectors.view(rows, vector_format.dim)
    shard_of_row, vector_of_row = torch.tensor(places).T  # [rows] each
    counts = torch.bincount(shard_of_row, minlength=len(shards)).tolist()
    for shard, of_shard in zip(shards, shard_of_row.argsort(stable=True).split(counts)):  # row numbers, in order
        if len(of_shard):
            vectors[of_shard] = shard.vectors(name, vector_format)[vector_of_row[of_shard]]
    save_tensors(vectors, path)
    together.unlink()


def sound_record(out, name):
    """The manifest's record of an encoder that is done, None if it has none or if its file is not what was recorded."""
    with lock_folder(out, wait=True):
        manifest = read_manifest(out)
        record = manifest["encoders"].get(name)  # by now another process may have made it
        if record is None:
            return None
        path = out / f"{name}.pt"
        if path.is_file() and sha256_file(path) == record["file_sha256"]:
            return record
        print(f"{path}: is missing or is not what was embedded (sha256); embedding it again")
        manifest["encoders"][name] = None  # its place among the others is kept
        write_manifest(out, manifest)
        return None
