"""What a run of embed.py has to do: the rows, their pictures and captions, each once, and the shards of these."""

import math
import os
from pathlib import Path
from typing import NamedTuple

from hyma.datasets import Corpus
from hyma.embeddings import hash_keys, unique
from hyma.files import lock_folder, read_jsonl
from hyma.pass_shards import Shard, holds_vectors, make_shards, open_shard_folder, read_journal
from hyma.pictures import Picture, read_picture
from hyma.scan import count_rows, most_bad, plain_caption, row_fault
from hyma.sealing import read_manifest
from vlm import BadInput, read_json


class FixedRows(NamedTuple):
    """The rows of an embedding folder, once every picture was read: every encoder's file has these, in this order."""

    rows: list[dict]  # as in rows.jsonl
    keys_sha256: str  # of `hash_keys`: what the rows are recognised by
    quarantined: int  # rows that cannot be used


class Work(NamedTuple):
    """What is to be embedded, and where it goes."""

    out: Path  # the embedding folder
    corpus: Corpus  # the rows that are asked for
    source_sha256: str  # of all rows of the data source
    subset: dict | None  # what the manifest records of --rows
    fixed: FixedRows | None  # of an earlier run

    def images(self):
        """The paths of the pictures, each once, as the rows name them."""
        return unique(row["image"] for row in self.corpus.rows if not row_fault(row))

    def captions(self):
        """The captions, each once."""
        return unique(plain_caption(row) for row in self.corpus.rows if not row_fault(row))


def check_source(out, manifest, corpus, source_sha256, flags):
    """Raises BadInput if the folder holds embeddings of other rows than the data source has and the flags ask for."""
    if manifest and "adopted" in manifest:
        check_adopted(out, manifest, corpus, flags)
        return
    unfinished = read_plan(out / ".shards") if holds_vectors(out / ".shards") else {}
    if not manifest and not unfinished and any(out.glob("*.pt")):
        raise BadInput(f"{out}: holds embeddings without a manifest.json; choose another --out")
    if manifest and manifest.get("source_sha256") != source_sha256:
        raise BadInput(f"{out}: holds embeddings of other rows than {flags.data} has now; choose another --out")
    if not manifest and unfinished.get("source_sha256", source_sha256) != source_sha256:
        raise BadInput(
            f"{out}: holds unfinished embeddings of other rows than {flags.data} has now; choose another --out, or delete "
            f"{out}/.shards"
        )
    if not manifest and not unfinished:
        return
    drawn = (manifest or unfinished).get("subset") or {}
    held = f"--rows {drawn['rows']} --seed {drawn['seed']}" if drawn else "all rows"
    asked = f"--rows {flags.rows} --seed {flags.seed}" if flags.rows else "all rows"
    if held != asked:
        raise BadInput(
            f"{out}: holds {held}, and {asked} are asked for; ask for the same, or choose another --out"
            + (f", with --reuse {out} to take its vectors" if (out / "manifest.json").is_file() else "")
        )


def check_adopted(out, manifest, corpus, flags):
    """Raises BadInput unless it is proven that the rows of an adopted folder are those of the data source, in its order."""
    if flags.rows:
        raise BadInput(f"{out}: was adopted whole; leave --rows out, or choose another --out")
    again = f"adopt its files again with --data {flags.data} and the --weights of an encoder that is there, into another --out"
    if not manifest["keys_sha256"]:
        raise BadInput(f"{out}: was adopted without --data, so that nobody knows which picture each row is; {again}")
    if not any("weights_sha256" in record for record in manifest["encoders"].values() if record):
        raise BadInput(
            f"{out}: none of its encoders was embedded again when it was adopted, so that the order is not proven; "
            f"{again}"
        )
    rows = read_jsonl(out / "rows.jsonl")
    if [row["image"] for row in rows] != [row["image"] for row in corpus.rows]:
        raise BadInput(f"{out}: was adopted with other rows than {flags.data} has now; choose another --out")
    for number, (row, source) in enumerate(zip(rows, corpus.rows), start=1):
        if row_fault(source):
            raise BadInput(f"{out}: its row {number:,} cannot be used ({row_fault(source)}), so that no encoder can be added")
        if row["caption"] != plain_caption(source):
            raise BadInput(
                f"{out}: was adopted with another caption in row {number:,} than {flags.data} has now; "
                "choose another --out"
            )


def read_plan(folder):
    """What the unfinished shards of a folder are of, {} where there are none."""
    return read_json(folder / "plan.json") if (folder / "plan.json").is_file() else {}


def with_fixed_rows(work):
    """The Work, with its rows as another process may have fixed them by now."""
    manifest = read_manifest(work.out)
    if work.fixed or not manifest or not manifest["encoders"]:
        return work
    if "adopted" not in manifest and manifest.get("source_sha256") != work.source_sha256:
        raise BadInput(f"{work.out}: another process has embedded other rows into it by now; choose another --out")
    return work._replace(fixed=read_fixed_rows(work.out, manifest))


def read_fixed_rows(out, manifest):
    """The FixedRows of an earlier run. Raises BadInput if they are not those of its manifest."""
    rows = read_jsonl(out / "rows.jsonl")
    if hash_keys(rows) != manifest["keys_sha256"]:
        raise BadInput(f"{out}/rows.jsonl: has changed since the rows were fixed; choose another --out")
    return FixedRows(rows, manifest["keys_sha256"], manifest.get("quarantined", 0))


class Parts(NamedTuple):
    """The shards of a corpus."""

    pictures: list[Shard]
    captions: list[Shard]
    plan: dict  # what they are of, and their sizes


def divide(work, flags, batch_size):
    """The Parts, and their folder on disk: empty, unless an earlier run has made a part of the same."""
    folder = work.out / ".shards"
    drawn = work.subset and {"rows": work.subset["rows"], "seed": work.subset["seed"]}
    plan = {"source_sha256": work.source_sha256, "subset": drawn, "shard_rows": flags.shard_rows}
    with lock_folder(work.out, wait=True):
        earlier = read_plan(folder)
        if not flags.batch_size:  # all processes must cut the shards alike
            batch_size = earlier.get("batch_size", batch_size)
        plan["batch_size"] = batch_size
        if open_shard_folder(folder, plan):
            print(f"{work.out}: an earlier run made shards with other flags; starting over")
        pictures = make_shards(folder, "pictures", work.images(), flags.shard_rows, batch_size)
        captions = make_shards(folder, "captions", work.captions(), flags.shard_rows, batch_size)
        forget_mended(work, pictures)
        check_same_pictures(work, pictures)
        for shard in captions:  # texts of about the same length go through an encoder together
            shard.items.sort(key=len, reverse=True)
    return Parts(pictures, captions, plan)


def forget_mended(work, shards):
    """Begins those shards of pictures anew that hold refused pictures which can be used by now, as they were repaired."""
    mended = 0
    for shard in shards:
        for image, picture in read_journal(shard.journal).items():
            if picture.reason and not read_picture(work.corpus.root, image)[0].reason and shard.take(wait=True):
                shard.forget()
                shard.release()
                mended += 1
                break
    if mended:
        late = ", and stay out, as the rows are fixed" if work.fixed else ""
        print(f"{work.out}: pictures that were refused can be used now{late}")


def check_same_pictures(work, shards):
    """Raises BadInput if pictures that an interrupted run has embedded are others now: another copy of them, say. One
    is looked at of every shard, of 100 shards at most."""
    for shard in shards[:: math.ceil(len(shards) / 100) or 1]:
        for image, known in read_journal(shard.journal).items():
            if not known.reason:
                compare_pictures(work.corpus.root / image, read_picture(work.corpus.root, image)[0], known)
                break


def order_of(shards, flags):
    """The shards that this process may embed, in the order in which it tries them: its own first."""
    if flags.shard:
        index, count = flags.shard
        return shards[index::count]
    rank, count = int(os.environ.get("RANK", 0)), process_count(flags)
    others = [shard for number, shard in enumerate(shards) if number % count != rank]
    return shards[rank::count] + others


def process_count(flags):
    """How many processes share the work, as far as this one can know: --shard's or torchrun's."""
    return flags.shard[1] if flags.shard else int(os.environ.get("WORLD_SIZE", 1))


class PictureCheck:
    """Whether pictures are still what an earlier look has found, and whether too many of them cannot be used."""

    def __init__(self, work, allow_bad):
        self.work = work
        self.sha256 = {row["image"]: row.get("image_sha256") for row in work.fixed.rows} if work.fixed else {}
        self.rows_of_image, self.bad = count_rows(work.corpus.rows)
        self.most = len(work.corpus.rows) if work.fixed else most_bad(len(work.corpus.rows), allow_bad)

    @property
    def too_bad(self):
        """Then the pictures that are left are only read, so that all bad ones can be named."""
        return self.bad > self.most

    def take(self, batch):
        """Looks at the pictures of a batch. Raises BadInput for one that has changed."""
        for image, picture in batch.pictures:
            path = picture.image or image
            known = batch.shard.found.get(image)
            if known:
                compare_pictures(self.work.corpus.root / path, picture, known)
            if path in self.sha256:
                compare_pictures(self.work.corpus.root / path, picture, Picture(None, path, self.sha256[path]))
            if picture.reason:
                self.bad += self.rows_of_image[image]


def compare_pictures(path, picture, known):
    """Raises BadInput if a Picture is not what an earlier look, `known`, has found. path: of the picture, for the message."""
    if known.reason and not picture.reason:
        raise BadInput(f"{path}: could not be read before and can be now; run the same command again")
    if picture.reason and not known.reason:
        raise BadInput(f"{path}: was readable before and is not now ({picture.reason}); restore it")
    if known.sha256 not in (None, picture.sha256):
        raise BadInput(f"{path}: is not the picture that was read before (sha256); restore it, or choose another --out")
