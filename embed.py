"""Embeds captioned pictures once, in one pass for all frozen encoders: pictures + captions -> embeddings/<dataset>/.

    python embed.py --encoder vit_l16 minilm mpnet                    # the sample's pictures, registered encoders
    python embed.py --encoder all --data my/captions.csv              # your pictures, the paper's nine and three
    python embed.py --encoder dino=timm:vit_small_patch14_dinov2.lvd142m --data my/captions.csv
    python embed.py --encoder all --data coco:/data/coco              # a standard set, from its published files
    python embed.py --encoder control --out embeddings/try            # needs no network, a minute on a CPU
    python embed.py --encoder all --data my/captions.csv --rows 2000  # a random part first; --reuse takes its vectors later

Each picture is read, checked, hashed and decoded once and goes through every encoder; each caption is embedded once,
however often it repeats. A picture that cannot be read or a row without a caption goes to quarantine.jsonl with the
reason, and counts for no encoder; if many rows are bad, nothing is embedded any more (--allow-bad). What programs write
for an empty cell, such as nan or null, is no caption either. Rows without a split are split here, by their pictures'
bytes: train 80 %, val and test 10 % each, at most 5,000.

Every encoder gets a file `<encoder>.pt`, one tensor [rows, dim] of unit vectors in row order. Rerun an interrupted
command to go on at the first missing batch; the files get the same bytes. Any number of processes can be given the same
command, or be started by torchrun: they share the work, and what one leaves unfinished another takes. manifest.json is
written last and seals the folder.
"""

if __name__ == "__main__":
    from hyma import before_main  # noqa: F401  what a signal does while torch is imported

import argparse
import contextlib
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

import vlm
from hyma.datasets import read_corpus
from hyma.decoding import PictureReader, read_batches, worth_starting
from hyma.embedding_work import PictureCheck, Work, check_source, divide, order_of, with_fixed_rows
from hyma.files import lock_folder, run_script
from hyma.finishing import describe, describe_encoder, finish
from hyma.folder_jobs import add_folder_flags, run_folder_job
from hyma.forecast import announce
from hyma.pass_shards import VectorFormat, open_shard_folder, remove_shards
from hyma.prompts import read_templates
from hyma.ranks import rank_device
from hyma.reuse import fill_in, known_to_all, network_of, open_reused
from hyma.scan import describe_rows, printable
from hyma.sealing import read_manifest, seal_folder, sound_record
from hyma.signals import Signals
from hyma.standard_sets import STANDARD_SETS, parse_standard_set, read_standard_set
from hyma.subset import describe_whole, foresee, take_subset, typed_options
from hyma.weights import RecordedEncoder, open_recorded
from hyma.working_encoders import (
    DTYPES,
    bottleneck,
    can_hold_more,
    check_vectors,
    find_batch_size,
    load_encoder,
    transforms_of,
)
from vlm import BadInput

SAMPLE = Path(__file__).parent / "sample" / "captions.csv"


# ------------------------------------------------------------------------------------------------------------- flags


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--encoder",
        nargs="+",
        metavar="NAME",
        help="short names, wildcards, all | images | texts (the paper's), timm or sentence-transformers names, NAME=SPEC",
    )
    add(
        "--data",
        type=Path,
        default=SAMPLE,
        help="table of image and caption (.csv .tsv .jsonl .parquet .arrow), .tar of samples, LLaVA's, COCO's or Karpathy's "
        f".json, a folder, or NAME:FOLDER of a standard set's files: {' '.join(STANDARD_SETS)} (default: the sample)",
    )
    add("--out", type=Path, help="embedding folder (default: embeddings/<dataset>)")
    add("--image-column", help="column of the image path (default: the first known name)")
    add("--caption-column", help="column of the caption (default: the first known name)")
    add(
        "--weights",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="local file or folder of an encoder's weights, instead of the hub",
    )
    add(
        "--allow-bad",
        type=float,
        default=0.05,
        metavar="FRACTION",
        help="stop if more of the rows than this cannot be used (default: %(default)s)",
    )
    add("--rows", type=int, metavar="N", help="embed at most N random rows; fewer are part of more (default: all)")
    add("--seed", type=int, default=0, help="random seed of --rows (default: %(default)s)")
    add(
        "--reuse",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="embedding folders whose vectors of equal pictures and captions are taken over",
    )
    add(
        "--templates",
        nargs="+",
        default=["1"],
        metavar="PROMPTS",
        help="prompts per class that are embedded for evaluate.py: 1, 80 or a file of lines with {} (default: 1)",
    )
    add("--batch-size", type=int, help="pictures in a forward pass (default: 64, on a GPU the fastest)")
    add(
        "--shard-rows",
        type=int,
        default=1024,
        help="pictures in a shard, the part that a process takes at a time (default: %(default)s)",
    )
    add(
        "--shard",
        metavar="I/N",
        help="embed only shards I, I+N, I+2N, ..., and leave the others to other processes (default: what none works on)",
    )
    add(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="of the stored vectors (default: %(default)s)",
    )
    add(
        "--precision",
        choices=DTYPES,
        default="float32",
        help="of the encoders' products, by autocast (default: %(default)s)",
    )
    about = "torch.compile the encoders: takes seconds each, then 3 to 25 %% less on a CPU; recorded, as it rounds otherwise"
    add("--compile", action="store_true", help=about)
    add(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="processes that read and decode pictures ahead; 0: this one does (default: %(default)s)",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: the GPU if there is one)")
    add_folder_flags(parser)
    flags = parser.parse_args()
    flags.options = typed_options(parser, flags)
    return flags


def resolve_flags(flags):
    """A copy of the flags, checked, with what they stand for: encoders, weights, data, standard_set, shard, device."""
    standard_set, data = parse_standard_set(flags.data) or (None, flags.data)
    for name in ("batch_size", "shard_rows", "rows"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if flags.workers < 0:
        raise BadInput(f"--workers {flags.workers}: must be at least 0")
    if not 0 <= flags.allow_bad <= 1:
        raise BadInput(f"--allow-bad {flags.allow_bad}: expected a share of the rows, from 0 to 1")
    if flags.batch_size and flags.shard_rows % flags.batch_size:
        raise BadInput(f"--shard-rows {flags.shard_rows}: must be a multiple of --batch-size {flags.batch_size}")
    index, _, count = (flags.shard or "0/1").partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise BadInput(f"--shard {flags.shard}: expected I/N with 0 <= I < N, such as 0/4")
    for templates in flags.templates:
        read_templates(templates)
    if not flags.encoder:
        raise BadInput("--encoder: name the encoders to embed with, or all")
    encoders = choose_encoders(flags.encoder)
    resolved = {
        "encoders": encoders,
        "weights": match_weights(flags.weights, encoders),
        "standard_set": standard_set,
        "data": data,
        "shard": (int(index), int(count)) if flags.shard else None,
        "device": vlm.pick_device(rank_device(flags.device)),
    }
    return argparse.Namespace(**vars(flags) | resolved)


def choose_encoders(names):
    """The encoders that `--encoder` asks for, each once, in the order asked."""
    groups = {"all": vlm.PAPER_ENCODERS, "images": paper_encoders("image"), "texts": paper_encoders("text")}
    chosen = {}
    for name in names:
        found = groups.get(name) or [vlm.ENCODERS[known] for known in fnmatch.filter(vlm.ENCODERS, name)]
        if not found and "*" in name:
            raise BadInput(f"--encoder {name}: matches none of {', '.join(vlm.ENCODERS)}")
        for encoder in found or [vlm.find_encoder(name)]:
            if chosen.setdefault(encoder.name, encoder) != encoder:
                raise BadInput(f"--encoder {name}: two different encoders are named {encoder.name}; use NAME=SPEC")
    return list(chosen.values())


def paper_encoders(kind):
    """The paper's image or text encoders."""
    return [encoder for encoder in vlm.PAPER_ENCODERS if encoder.kind == kind]


def match_weights(items, encoders):
    """{short name: path} of `--weights NAME=PATH ...`."""
    names = {encoder.name for encoder in encoders}
    weights = {}
    for item in items:
        name, _, path = item.partition("=")
        if name not in names or not path:
            raise BadInput(f"--weights {name}: expected NAME=PATH, NAME being an encoder of --encoder")
        weights[name] = path
    return weights


# ---------------------------------------------------------------------------------------------- the corpus and its parts


def open_folder(flags):
    """Reads the data source and makes the embedding folder, or resumes in it: the Work."""
    if flags.standard_set:
        name = flags.standard_set
    else:
        corpus = read_corpus(flags.data, flags.image_column, flags.caption_column)
        name = corpus.dataset
    part = f"-{flags.rows}rows" if flags.rows else ""
    out = flags.out or Path("embeddings") / f"{name}{part}"
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, wait=True):
        if flags.standard_set:  # its pictures may have to be unpacked into the folder
            corpus = read_standard_set(flags.standard_set, flags.data, out)
        for note in corpus.notes:
            print(printable(note))
        source_sha256 = hashlib.sha256(json.dumps(corpus.rows, default=str).encode()).hexdigest()
        manifest = read_manifest(out)
        check_source(out, manifest, corpus, source_sha256, flags)
        subset = manifest.get("subset") if manifest else None
        if flags.rows and not manifest:
            whole = describe_whole(foresee(corpus))
            subset = {"rows": flags.rows, "seed": flags.seed, "whole": whole, "options": flags.options}
        if flags.rows:
            corpus = take_subset(corpus, flags.rows, flags.seed)
        if not manifest:
            print(f"{describe_rows(corpus.source, foresee(corpus))}, if every picture can be read")
        return with_fixed_rows(Work(out, corpus, source_sha256, subset, fixed=None))


# ---------------------------------------------------------------------------------------------------------- the one pass


def embed_pictures(work, parts, encoders, reused, flags):
    """Takes every picture through all of the image encoders. What is there already is not made again."""
    formats = {encoder.name: encoder.format for encoder in encoders}
    reader = PictureReader(work.corpus.root, transforms_of(encoders), known_to_all(reused, encoders))
    shards = order_of(parts.pictures, flags)
    workers = worth_starting(flags.workers, sum(len(shard.items) for shard in shards))
    check = PictureCheck(work, flags.allow_bad)
    with progress_bar(shards, "pictures", "picture") as progress, Signals() as signals:
        for claimed in claims(shards, formats, progress):
            pinned = flags.device.type == "cuda"
            with contextlib.closing(read_batches(reader, claimed, workers, pinned)) as batches:
                began = time.monotonic()
                waited = 0.0
                for batch in batches:
                    waited += time.monotonic() - began
                    check.take(batch)
                    for encoder in encoders:
                        if check.too_bad or encoder.name not in batch.shard.missing[batch.start]:
                            continue
                        vectors = encode_pictures(encoder, batch, reused[encoder.name])
                        batch.shard.add_vectors(encoder.name, vectors)
                    batch.shard.finish_batch(batch.start, batch.pictures)
                    progress.set_postfix_str(bottleneck(encoders, waited), refresh=False)
                    progress.update(len(batch.pictures))
                    signals.leave_if_asked()
                    began = time.monotonic()
        progress.set_postfix_str("")


def embed_captions(parts, encoder, reused, flags):
    """Takes every caption through a text encoder, however often it repeats, once."""
    formats = {encoder.name: encoder.format}
    shards = order_of(parts.captions, flags)
    with progress_bar(shards, encoder.name, "caption") as progress, Signals() as signals:
        for claimed in claims(shards, formats, progress):
            for shard in claimed:
                for start in list(shard.missing):
                    captions = shard.batch(start)
                    vectors = encode_captions(encoder, captions, reused[encoder.name])
                    shard.add_vectors(encoder.name, vectors)
                    shard.finish_batch(start)
                    progress.update(len(captions))
                    signals.leave_if_asked()


def claims(shards, formats, progress):
    """The shards in which something is to do, claimed for this process: in turn as many as are free, asked for one by one,
    and then each that another process had and has left unfinished."""
    busy = []

    def claim_free():
        for shard in shards:
            claimed = shard.claim(formats)
            if claimed is None:
                busy.append(shard)
                continue
            count_done(shard, progress)
            if claimed:
                yield shard

    yield claim_free()
    for shard in busy:
        claimed = shard.claim(formats, wait=True)
        count_done(shard, progress)
        if claimed:
            yield [shard]


def count_done(shard, progress):
    """Moves the bar by what is done of a shard already."""
    if progress.disable:
        return
    done = len(shard.items) - sum(len(shard.batch(start)) for start in shard.missing)
    progress.initial += done
    progress.n += done
    progress.refresh()


def progress_bar(shards, name, unit):
    """A bar over all items of the shards. Of torchrun's processes the first shows it."""
    total = sum(len(shard.items) for shard in shards)
    return tqdm(total=total, desc=name, unit=unit, smoothing=0, disable=int(os.environ.get("RANK", 0)) > 0)


def encode_pictures(encoder, batch, reused):
    """Unit vectors [n, dim] of the usable pictures of a batch, in order."""
    usable = batch.usable()
    if not usable:
        return torch.empty(0, encoder.format.dim)
    pixels = batch.pixels.get(encoder.transform)
    place = {digest: number for number, digest in enumerate(batch.decoded)}

    def encode(numbers):
        if len(numbers) == len(batch.decoded):
            return encoder.encode(pixels)
        return encoder.encode(pixels[[place[usable[number]] for number in numbers]])

    vectors = fill_in(reused, usable, encode)
    check_vectors(encoder.name, vectors, [image for image, picture in batch.pictures if not picture.reason])
    return vectors


def encode_captions(encoder, captions, reused):
    """Unit vectors [n, dim] of captions."""

    def encode(numbers):
        return encoder.encode([captions[number] for number in numbers])

    vectors = fill_in(reused, captions, encode)
    check_vectors(encoder.name, vectors, captions)
    return vectors


# -------------------------------------------------------------------------------------------------- before it and after


def check_embedded(out, wanted, record, flags):
    """Raises BadInput if flags ask for other vectors than an encoder has here: they would change nothing. record: its own, of
    the manifest."""
    if record["spec"] != wanted.spec:
        raise BadInput(f"{out}: {wanted.name} stands for {record['spec']} there; give {wanted.spec} another NAME")
    has = {"dtype": record.get("dtype"), "precision": record.get("precision", "float32"), "compile": record.get("compiled", False)}
    for flag in has if has["dtype"] else ():  # of adopted vectors nobody knows
        if getattr(flags, flag) == has[flag]:
            continue
        if f"--{flag}" in flags.options:
            raise BadInput(f"{out}: has {wanted.name} by another --{flag}; leave the flag out, or choose another --out")
        print(f"{wanted.name}: stays as it was embedded, with --{flag}{'' if has[flag] is True else f' {has[flag]}'}")
    weights = flags.weights.get(wanted.name)
    if weights and "weights_sha256" in record:
        recorded = RecordedEncoder(wanted, record["weights_sha256"], json.dumps(record["transform"]))
        open_recorded(recorded, weights, flags.device)  # or says what is another


def embed_missing(work, missing, flags):
    """Embeds with the encoders that the folder lacks, all in one pass if memory holds them. Returns (the FixedRows, None
    while other processes work on them; the errors of encoders that cannot be loaded)."""
    waiting = sorted(missing, key=lambda wanted: wanted.kind)  # images first
    failures = []
    parts = None
    while waiting:
        encoders = load_encoders(waiting, failures, flags)
        if not encoders:
            break
        work = with_fixed_rows(work)
        if work.fixed and all(read_manifest(work.out)["encoders"].get(encoder.name) for encoder in encoders):
            continue  # another process finished first
        if parts is None:
            batch_size = flags.batch_size or find_batch_size(encoders, flags.device)
            parts = divide(work, flags, batch_size)
        open_encoders(work, parts, encoders, flags)
        reused = open_reused(flags.reuse, encoders)
        announce(work, parts, encoders, flags)
        images = [encoder for encoder in encoders if encoder.kind == "image"]
        if images or not work.fixed:
            embed_pictures(work, parts, images, reused, flags)
        for encoder in encoders:
            if encoder.kind == "text":
                embed_captions(parts, encoder, reused, flags)
        with lock_folder(work.out, wait=True):
            work = finish(work, parts, encoders, flags)
    return work.fixed, failures


def load_encoders(waiting, failures, flags):
    """The first of the encoders that are waiting, loaded, as many as memory holds at a time. Takes them off the list."""
    encoders = []
    while waiting and can_hold_more(encoders, flags.device):
        wanted = waiting.pop(0)
        try:
            weights = flags.weights.get(wanted.name)
            encoders.append(load_encoder(wanted, weights, flags.device, flags.precision, flags.compile))
        except BadInput as error:  # the others are embedded all the same
            failures.append(error)
            print(f"{wanted.name}: left out: {error}")
    if waiting:
        print(f"memory holds {len(encoders)} encoders at a time; {len(waiting)} more follow in another pass")
    return encoders


def open_encoders(work, parts, encoders, flags):
    """Gives the encoders their plans, transforms and folders. Vectors that were made by another plan are made again."""
    manifest = read_manifest(work.out)
    networks = {}  # of the encoders that are here
    for name, record in manifest["encoders"].items() if manifest else ():
        if record and "weights_sha256" in record:
            networks[name] = network_of(record)
    for encoder in encoders:
        encoder.plan = make_plan(encoder, flags, parts.plan["batch_size"])
        encoder.transform = json.dumps(encoder.plan["transform"])  # encoders with an equal one share their pixels
        encoder.format = VectorFormat(encoder.model.embed_dim, DTYPES[flags.dtype], [parts.plan, encoder.plan])
        with lock_folder(work.out, wait=True):
            if open_shard_folder(work.out / ".shards" / encoder.name, encoder.plan):
                print(f"{encoder.name}: an earlier run made shards with other weights or flags; starting over")
        networks[encoder.name] = network_of(encoder.plan)
        twins = [name for name, network in networks.items() if network == networks[encoder.name] and name != encoder.name]
        if twins:
            print(f"{encoder.name}: has the weights of {twins[0]} ({encoder.spec}); the two are one encoder under two names")


def make_plan(encoder, flags, batch_size):
    """All that an encoder's vectors depend on beside the rows."""
    plan = {
        "kind": encoder.kind,
        "spec": encoder.spec,
        "full_name": encoder.model.full_name,
        "weights_sha256": vlm.weights_digest(encoder.model.model),
        "dim": encoder.model.embed_dim,
        "dtype": flags.dtype,
        "precision": flags.precision,
        "transform": encoder.model.config,
        "batch_size": batch_size,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "sentence-transformers")},
    }
    if flags.compile:
        plan["compiled"] = True
    return json.loads(json.dumps(plan))  # tuples become lists, as in the plan that is read back from a file


def main():
    flags = parse_flags()
    if run_folder_job(flags, None if flags.data is SAMPLE else flags.data):
        return
    flags = resolve_flags(flags)
    work = open_folder(flags)
    out = work.out
    missing = []
    for wanted in flags.encoders:
        record = sound_record(out, wanted.name) if work.fixed else None
        if record:
            check_embedded(out, wanted, record, flags)
        else:
            missing.append(wanted)
    fixed, failures = embed_missing(work, missing, flags)

    if fixed:
        describe(work, fixed)
    unfinished = []
    for wanted in flags.encoders:
        record = read_manifest(out)["encoders"].get(wanted.name) if fixed else None
        if record:
            print(describe_encoder(wanted.name, record))
        else:
            unfinished.append(wanted.name)

    if failures:
        if len(failures) == 1:
            raise failures[0]
        if all(isinstance(failure, vlm.MissingWeights) for failure in failures):
            raise vlm.join_missing(failures)
        raise BadInput(f"{len(failures)} encoders could not be loaded, for the reasons above; the first: {failures[0]}")
    if unfinished and not flags.shard:  # without it a process waits for the shards of others, or takes them over
        raise BadInput(f"{out}: not sealed: the pass of {', '.join(unfinished)} has ended too early; run the same command again")
    if unfinished:
        print(f"{out}: not sealed: other --shard processes have not finished their shards of {', '.join(unfinished)}")
        return
    with lock_folder(out, wait=True):
        seal_folder(out)
        remove_shards(out / ".shards", flags.encoders)
    if flags.standard_set:
        following = f"evaluate.py RUN --task {out.name}={out}"
    else:
        following = f"train_hyma.py --data {out} --pairs all"
    print(f"{out}: sealed. Next: python {following}")


if __name__ == "__main__":
    run_script(main)
