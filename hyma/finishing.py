"""What embed.py does once every picture is read and every vector is there: rows.jsonl, the encoders' files, prompts."""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hyma.costs import flop_counter
from hyma.embedding_work import FixedRows, with_fixed_rows
from hyma.embeddings import FORMAT_VERSION, hash_keys, unique
from hyma.files import sha256_file, write_jsonl
from hyma.prompts import load_prompts, prompt_files
from hyma.scan import check_bad, describe_quarantine, describe_rows, printable, sort_rows
from hyma.sealing import add_to_manifest, join_shards, place_items, read_manifest, write_manifest
from hyma.splits import has_test_rows
from hyma.tasks import KINDS, RETRIEVAL, TaskNotPossible, choose_rows
from hyma.weights import RecordedEncoder
from vlm import BadInput, Encoder, load_tensors

ALIKE = 0.9999  # mean cosine of vectors that say next to nothing of what they are of; a random network's is 0.93 to 0.97
CAPTIONS_AT_ONCE = 10_000  # tokenised together
COUNTED_CAPTIONS = 64  # at most, for the mean FLOPs of a caption


def finish(work, parts, encoders, flags):
    """Makes the files of the encoders whose shards are finished, and fixes the rows first. Returns the Work."""
    work = with_fixed_rows(work)
    unread = [shard for shard in parts.pictures if shard.look({})]
    if not work.fixed and unread:
        return work
    if not work.fixed:
        work = work._replace(fixed=fix_rows(work, parts, flags))
    for encoder in encoders:
        if read_manifest(work.out)["encoders"].get(encoder.name) is not None:
            continue
        shards = parts.pictures if encoder.kind == "image" else parts.captions
        unfinished = [shard for shard in shards if shard.look({encoder.name: encoder.format})]
        if unfinished:
            continue
        if encoder.kind == "text":  # before the record, which says that nothing is left to do
            keep_prompts(work, encoder, flags.templates)
        add_to_manifest(work.out, encoder.name, make_file(work, encoder, shards))
    return work


def fix_rows(work, parts, flags):
    """The rows that can be used, by what was found of their pictures. Raises BadInput if they are too few."""
    out, corpus = work.out, work.corpus
    pictures = {}
    for shard in parts.pictures:
        pictures |= shard.found
    rows, quarantine, lines = sort_rows(corpus, pictures)
    write_jsonl(out / "quarantine.jsonl", quarantine)
    check_bad(corpus, quarantine, out, flags.allow_bad)
    for line in lines:
        print(printable(f"{corpus.source}: {line}"))
    write_jsonl(out / "rows.jsonl", rows)
    manifest = new_manifest(work, rows, len(quarantine))
    write_manifest(out, manifest)
    return FixedRows(rows, manifest["keys_sha256"], len(quarantine))


def new_manifest(work, rows, quarantined):
    """The manifest of a folder whose rows are fixed and which holds no embeddings yet."""
    corpus = work.corpus
    manifest = {"format_version": FORMAT_VERSION, "dataset": corpus.dataset}
    if corpus.protocol:
        left_out = f", {quarantined:,} rows left out" if quarantined else ""
        manifest["protocol"] = corpus.protocol + left_out
    if has_test_rows(rows) and not has_test_rows(corpus.rows):
        manifest["test_set_aside"] = True
    if work.subset:
        manifest["subset"] = work.subset
    return manifest | {
        "root": os.path.relpath(corpus.root, work.out),
        "source_sha256": work.source_sha256,
        "rows": len(rows),
        "keys_sha256": hash_keys(rows),
        "quarantined": quarantined,
        "encoders": {},
    }


def make_file(work, encoder, shards):
    """Makes `<encoder>.pt` of an encoder's shards. Returns its manifest record."""
    rows = work.fixed.rows
    column = "image" if encoder.kind == "image" else "caption"
    place_of = place_items(shards)
    places = []
    for row in rows:
        if row[column] not in place_of:
            raise BadInput(f"{work.corpus.root / row['image']}: was readable before and is not now; restore it")
        places.append(place_of[row[column]])
    path = work.out / f"{encoder.name}.pt"
    join_shards(encoder.name, encoder.format, shards, places, path)
    record = encoder.plan | {"rows": len(rows), "keys_sha256": work.fixed.keys_sha256}
    flops = count_flops(encoder, rows)
    if flops is not None:
        record["flops_per_row"] = flops
    record["file_sha256"] = sha256_file(path)
    likeness = mean_cosine(load_tensors(path, mmap=True), [row[column] for row in rows])
    if likeness > ALIKE:
        record["mean_cosine"] = likeness
    if encoder.kind == "text":
        record["truncated_captions"] = count_truncated(encoder.model, rows)
    return record


def mean_cosine(vectors, items):
    """The mean cosine of different items' vectors: a thousand of them, evenly spaced, and 0 where ten are not there.

    vectors [rows, dim], rounded. items: the picture or caption of each row.
    """
    row_of = {item: row for row, item in enumerate(items)}
    rows = list(row_of.values())
    count = min(len(rows), 1000)
    if count < 10:
        return 0.0
    chosen = vectors[[rows[k * len(rows) // count] for k in range(count)]]  # [count, dim]
    return F.normalize(chosen.float(), dim=1).mean(dim=0).square().sum().item()


def count_flops(encoder, rows):
    """FLOPs of one row's forward pass, 2 a multiply-add, or None where they cannot be counted.

    An image encoder is given one picture of its input size; a text encoder's number is the mean over captions that are
    spaced evenly over the rows, each encoded alone and so without padding.
    """
    model = encoder.model
    try:
        with uncompiled(encoder), flop_counter() as counter:
            if encoder.kind == "image":
                passes = 1
                model.encode_image(torch.zeros(1, *model.config["input_size"]))
            else:
                passes = min(COUNTED_CAPTIONS, len(rows))
                for i in range(passes):
                    model.encode_text(rows[i * len(rows) // passes]["caption"])
        return round(counter.get_total_flops() / passes) or None
    except Exception as error:  # the count is a statistic: it must not cost the embeddings
        print(f"{encoder.name}: the FLOPs of a row could not be counted ({type(error).__name__})")
        return None


def uncompiled(encoder):
    """Within it, a compiled encoder runs as it was, with products that are seen."""
    if "compiled" in encoder.plan:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def count_truncated(encoder, rows):
    """How many captions are longer than the text encoder reads, None where it cannot be counted."""
    captions = [row["caption"] for row in rows]
    try:
        limit = encoder.model.max_seq_length
        if not limit:
            return 0
        count = 0
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):  # the tokens of millions would fill the memory
            part = captions[start : start + CAPTIONS_AT_ONCE]
            tokens = encoder.model.tokenizer(part, truncation=False, verbose=False)["input_ids"]
            count += sum(len(ids) > limit for ids in tokens)
        return count
    except Exception:  # models without transformers' tokenizer; a statistic must not cost the embeddings
        return None


class FolderRows(NamedTuple):
    """As much of an embedding folder as tasks need to name their prompts, before it is sealed."""

    folder: Path
    dataset: str
    manifest: dict
    rows: list[dict]
    row_count: int


def keep_prompts(work, encoder, templates):
    """Embeds the prompts of the tasks that the folder's rows allow, so that no later command needs the text encoder.

    templates: as for `--templates` of evaluate.py, several. The rows are those that evaluate.py takes by default, of the
    folder's own runs and of others.
    """
    manifest = read_manifest(work.out)
    data = FolderRows(work.out, manifest["dataset"], manifest, work.fixed.rows, len(work.fixed.rows))
    known = Encoder(encoder.name, encoder.kind, encoder.spec, encoder.model.embed_dim)
    recorded = RecordedEncoder(known, encoder.plan["weights_sha256"], json.dumps(encoder.plan["transform"]))
    for path in prompt_files(data.folder, encoder.name):  # by the settings that an earlier file of this name had
        path.unlink()
    different = []
    for source in templates:
        for run_seed in (0, None):
            with contextlib.suppress(BadInput):  # no rows to train on: these are no run's
                description, rows = choose_rows(data, run_seed)
                different += prompts_of(data, rows, description, source)
    for texts in unique(different):
        load_prompts(data.folder, recorded, texts, None, encoder.model.device, encoder.model)


def prompts_of(data, rows, description, templates):
    """The prompts of each task that these rows allow."""
    flags = argparse.Namespace(templates=templates, device="cpu")
    found = []
    for kind in KINDS.values():
        if kind is not RETRIEVAL:
            with contextlib.suppress(TaskNotPossible):
                found.append(kind.make(data.dataset, data, rows, description, flags).texts)
    return found


def describe(work, fixed):
    """Prints what the rows are."""
    out = work.out
    print(describe_rows(work.corpus.source, fixed.rows))
    if fixed.quarantined:
        print(describe_quarantine(out, len(work.corpus.rows)))
    print(f"{out}: {len(fixed.rows)} rows; {fixed.quarantined} more are in quarantine.jsonl")
    repeated = len(fixed.rows) - len({row["caption"] for row in fixed.rows})
    if repeated:
        print(f"{out}: {repeated} captions repeat an earlier one; training treats each as a mismatch of the other")


def describe_encoder(name, record):
    """A line about an encoder's file."""
    truncated = record.get("truncated_captions")
    ending = f", {truncated} captions truncated" if truncated else ""
    if "mean_cosine" in record:
        items = "pictures" if record["kind"] == "image" else "captions"
        ending += f"; gives all {items} nearly the same vector (mean cosine {record['mean_cosine']:.4f}): are its weights sound?"
    return f"{name}: {record['full_name']}, {record['rows']} x {record['dim']} {record['dtype']}{ending}"
