"""Other people's corpora through embed.py's command line: what is read, what is left out and why, and how it is split."""

import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import SAMPLE, TINY, make_embedding_folder, sample_captions, tasks_of, unit_vectors, write_csv
from PIL import Image

from hyma import pictures as pictures_on_disk
from hyma.datasets import read_corpus
from hyma.embeddings import Embeddings
from hyma.files import read_jsonl
from hyma.packed import picture_bytes
from hyma.pictures import read_picture
from hyma.splits import give_splits, known_split, split_rows
from vlm import BadInput, open_image


@pytest.fixture
def folder(pictures):
    """A folder of 40 pictures 0.webp to 39.webp and no captions."""
    return pictures[0]


@pytest.fixture
def embed(run, tmp_path):
    """embed(data, *flags): the Result, the rows and {key: reason} of a run into a new folder, or of the same one again."""

    def embed(data, *flags, out="e"):
        result = run("embed.py", *TINY, "--data", data, "--out", out, *flags)
        assert "Traceback" not in result.err
        if result.code:
            return result, None, None
        quarantine = read_jsonl(tmp_path / out / "quarantine.jsonl")
        return result, read_jsonl(tmp_path / out / "rows.jsonl"), {row["key"]: row["reason"] for row in quarantine}

    return embed


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def captions_of(rows):
    return [row["caption"] for row in rows]


def picture(k):
    return {"image": f"{k}.webp", "caption": f"caption {k}"}


# --------------------------------------------------------------------------------------------------- text tables


@pytest.mark.parametrize("name, delimiter", [("t.tsv", "\t"), ("t.csv", ",")])
def test_a_stray_quote_swallows_no_row(folder, embed, name, delimiter):
    """It opens a field and no other ends it, or one ends it by chance three rows below."""
    captions = [
        "a boat",
        '"Sunset over the pier',
        "a cup",
        'a 5" nail',
        "a kite",
        '"one',
        "two",
        'the sign says "stop"',
    ]
    captions += ['"three', "four", '5"']
    lines = [f"image{delimiter}caption"] + [f"{k}.webp{delimiter}{caption}" for k, caption in enumerate(captions)]
    (folder / name).write_text("\n".join(lines) + "\n")
    _, rows, quarantine = embed(folder / name)
    assert captions_of(rows) == captions and not quarantine


@pytest.mark.parametrize("names", [("1.jpg", "2.png", "3.PNG", "4.jpg"), ("my pics/1.jpg", "my pics/2.jpg", "my pics/3.jpg", "4.jpg")])
def test_a_stray_quote_swallows_no_row_of_another_kind(tmp_path, names):
    captions = ['"Stop, she said', "a dog", 'a screen of 27"', "a cat"]
    lines = ["image\tcaption", *map("\t".join, zip(names, captions))]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    assert captions_of(read_corpus(tmp_path / "t.tsv").rows) == captions


def test_an_array_of_captions_as_numpy_prints_it(tmp_path):
    """pandas writes lists that came from parquet so: without commas, which Python reads as one text."""
    captions = [["A dog runs.", "A brown dog's ball.", "x" * 80], ["one"], ['say "no"', "yes, no"]]
    rows = [{"image": f"{k}.jpg", "captions": str(np.array(texts, dtype=object))} for k, texts in enumerate(captions)]
    rows += [{"image": "3.jpg", "captions": "['a ' 'b', 'c']"}, {"image": "4.jpg", "captions": "['red'] car [sic]"}]
    rows += [{"image": "5.jpg", "captions": "['first' ... 'last']"}]
    rows = read_corpus(write_csv(tmp_path / "t.csv", rows)).rows
    assert captions_of(rows[:-1]) == [*itertools.chain(*captions), "a b", "c", "['red'] car [sic]"]
    assert "numpy has left captions out" in rows[-1]["fault"]


def test_a_caption_of_several_lines_is_one_caption(folder, embed):
    write_csv(folder / "t.csv", [picture(0), picture(1) | {"caption": 'first, "line"\nsecond, line\n3'}, picture(2)])
    _, rows, _ = embed(folder / "t.csv")
    assert captions_of(rows) == ["caption 0", 'first, "line" second, line 3', "caption 2"]


def test_a_quote_that_cuts_a_caption_costs_its_row(folder, embed):
    table = folder / "t.csv"
    table.write_text('image,caption\n0.webp,one\n1.webp,"two, and more\n2.webp,three\n' + "3.webp,four\n" * 20)
    _, rows, quarantine = embed(table)
    assert quarantine == {"1.webp": "a quotation mark is opened and not closed"} and len(rows) == 22


@pytest.mark.parametrize("delimiter, word", [("\t", "tabs"), (";", "semicolons"), ("|", "vertical bars")])
def test_other_delimiters(folder, embed, delimiter, word):
    write_csv(folder / "t.csv", [{"FilePath": f"{k}.webp", " Title ": f"a, b; {k}"} for k in range(3)], delimiter)
    result, rows, _ = embed(folder / "t.csv")
    assert captions_of(rows) == ["a, b; 0", "a, b; 1", "a, b; 2"] and f"separated by {word}" in result.out


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_other_encodings(folder, embed, encoding):
    lines = ["Image,Description", *(f"{k}.webp,café {k}" for k in range(3))]
    (folder / "t.csv").write_bytes("\r\n".join(lines).encode(encoding))
    assert captions_of(embed(folder / "t.csv")[1]) == ["café 0", "café 1", "café 2"]


def test_bytes_that_are_not_utf8_cost_their_row(folder, embed):
    rows = "".join(f"{k}.webp,caption {k},a,train\n" for k in range(3, 40))
    text = f"image,caption,label,split\n0.webp,caf\xe9,a,train\n1.webp,x,caf\xe9,train\n2.webp,x,a,tr\xe9n\n{rows}"
    (folder / "t.csv").write_bytes(text.encode("latin-1"))
    _, rows, quarantine = embed(folder / "t.csv", "--allow-bad", "0.1")
    assert len(rows) == 37 and set(quarantine) == {"0.webp", "1.webp", "2.webp"}
    assert all("UTF-8" in reason for reason in quarantine.values())


def test_tables_that_cannot_be_read_say_what_to_do(folder, refused):
    (folder / "nohead.csv").write_text("0.webp,a cat\n1.webp,a dog\n")
    refused("embed.py", *TINY, "--data", folder / "nohead.csv", says=["first line", "0.webp", "image,caption"])
    (folder / "x.zip").write_bytes(b"0")
    refused("embed.py", *TINY, "--data", folder / "x.zip", says=["archive", "unpack"])
    (folder / "shards").mkdir()
    (folder / "shards" / "00000.zip").write_bytes(b"0")
    refused("embed.py", *TINY, "--data", folder / "shards", says=["archives (00000.zip)", "unpack"])
    (folder / "x.tar").write_bytes(b"0")
    refused("embed.py", *TINY, "--data", folder / "x.tar", says="is no tar archive")
    (folder / "x.tar").write_bytes(gzip.compress(b"0"))
    refused("embed.py", *TINY, "--data", folder / "x.tar", says="is compressed")
    os.mkfifo(folder / "pipe.csv")
    refused("embed.py", *TINY, "--data", folder / "pipe.csv", says="no regular file")
    (folder / "lists.json").write_text('{"pictures": [{"id": 1}], "texts": [{"id": 2}]}')
    refused("embed.py", *TINY, "--data", folder / "lists.json", says=["several lists", "pictures, texts"])
    (folder / "boxes.json").write_text('{"images": [{"id": 1}], "annotations": [{"id": 2, "bbox": [0, 0, 1, 1]}]}')
    refused("embed.py", *TINY, "--data", folder / "boxes.json", says=["are no captions", "captions_train2017.json"])
    (folder / "deep.json").write_text("[" * 100_000)
    refused("embed.py", *TINY, "--data", folder / "deep.json", says="deep.json")
    (folder / "broken.parquet").write_bytes(b"PAR1")
    refused("embed.py", *TINY, "--data", folder / "broken.parquet", says="broken.parquet")


# -------------------------------------------------------------------------------------------------- JSON and parquet


def test_json_in_other_shapes(folder, embed):
    (folder / "dict.json").write_text(json.dumps({str(k): picture(k) for k in range(3)}))
    (folder / "wrap.json").write_text(json.dumps({"info": "x", "data": [picture(k) for k in range(3)]}))
    write_jsonl(folder / "lines.json", [picture(k) for k in range(3)])
    (folder / "list.jsonl").write_text(json.dumps([picture(k) for k in range(3)]))
    for name in ("dict.json", "wrap.json", "lines.json", "list.jsonl"):
        assert captions_of(embed(folder / name, out=name)[1]) == ["caption 0", "caption 1", "caption 2"]


def test_a_bad_line_costs_one_row(folder, embed):
    table = write_jsonl(folder / "t.jsonl", [picture(k) for k in range(40)])
    twice = '{"image": "0.webp", "caption": "one", "caption": "another"}'
    table.write_text(table.read_text() + '{"image": "0.webp", \n[1]\n' + twice.replace("another", "one") + f"\n{twice}\n")
    _, rows, quarantine = embed(table, "--allow-bad", "0.1")
    assert len(rows) == 41 and rows[-1]["caption"] == "one"
    repeated = "a name with two values: 'caption'"
    assert quarantine == {
        "row 41": "not JSON: line 41",
        "row 42": "not an object: line 42 is a list",
        "0.webp#3": repeated,
    }
    (folder / "list.json").write_text(json.dumps([picture(k) for k in range(40)])[:-1] + f", {twice}]")
    assert embed(folder / "list.json", out="list")[2] == {"0.webp#2": repeated}


def test_a_dict_of_records_that_loses_one_is_refused(folder, refused):
    """JSON's readers keep the last of two values."""
    (folder / "dict.json").write_text(f'{{"a": {json.dumps(picture(0))}, "a": {json.dumps(picture(1))}}}')
    refused("embed.py", *TINY, "--data", folder / "dict.json", says="dict.json: a name with two values: 'a'")


def test_conversations_of_every_form(folder, embed):
    human = {"from": "human", "value": "<image>\nWhat?"}
    answered = [
        [human, {"from": "gpt", "value": "caption 0"}],
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "caption 1"}],
        [["human", "hi"], ["gpt", "caption 2"]],
        json.dumps([human, {"from": "gpt", "value": "caption 3"}]),
        [{"role": "assistant", "content": [{"type": "text", "text": "caption 4"}]}],
    ]
    bad = ["what?", {"a": 1}, 7, [None], [human], None]
    records = [{"image": [f"{k}.webp"], "conversations": turns} for k, turns in enumerate(answered + bad)]
    records[0]["image"] = "0.webp"
    text_only = [{"conversations": answered[0]}, {"image": None, "conversations": answered[0]}]
    table = write_jsonl(folder / "chat.jsonl", text_only + records)
    result, rows, quarantine = embed(table, "--allow-bad", "0.5")
    assert captions_of(rows) == [f"caption {k}" for k in range(5)]
    assert quarantine["row 1"] == quarantine["row 2"] == "conversation without a picture" and len(quarantine) == 8
    assert "conversation without a picture (2)" in result.out
    assert embed(write_jsonl(folder / "mix.jsonl", text_only + records[:5]), out="m")[0].code == 0  # by design, not bad


def test_parquet_with_pictures_in_it(folder, embed, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = [(folder / f"{k}.webp").read_bytes() for k in range(4)]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table(
        {"image": [{"bytes": d, "path": None} for d in data], "text": list("abcd"), "label": [0, 1, 1, -1]}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    (folder / "data").mkdir()
    parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(table.slice(0, 1), folder / "data" / "test-00000-of-00001.parquet")
    parquet.write_table(pa.table({"jpg": data, "caption": [b"a", b"b", b"c", b"d"]}), folder / "bytes.parquet")
    result, rows, quarantine = embed(folder / "data")
    assert captions_of(rows) == ["a", "b", "c", "d"] and [row.get("label") for row in rows] == [
        "cat",
        "dog",
        "dog",
        None,
    ]
    assert [row["split"] for row in rows].count("test") == 1 and rows[0]["split"] == "test"
    assert "in two splits" in next(iter(quarantine.values())) and "\\x" not in result.out
    _, rows, _ = embed(folder / "bytes.parquet", out="b")
    assert captions_of(rows) == ["a", "b", "c", "d"]
    assert [picture_bytes(folder / row["image"]) for row in rows] == data
    assert not (tmp_path / "b" / "images").exists()

    cells = [{"bytes": d, "path": None} for d in data]
    lists = [[cells[0]], [cells[1]], cells[2:], []]  # a list of pictures, as for models that take several
    for path, column, values in (("lists", "images", lists), ("plain", "bytes", data), ("other", "photo", data)):
        parquet.write_table(pa.table({column: values, "caption": list("abcd")}), folder / f"{path}.parquet")
    rows = read_corpus(folder / "lists.parquet").rows
    assert [row.get("fault") for row in rows] == [None, None, "several pictures in one row: 2", "no image path"]
    assert [picture_bytes(folder / row["image"]) for row in rows[:2]] == data[:2]
    assert picture_bytes(folder / read_corpus(folder / "plain.parquet").rows[3]["image"]) == data[3]
    with pytest.raises(BadInput, match="no image column among photo, caption; name it with --image-column"):
        read_corpus(folder / "other.parquet")
    parquet.write_table(pa.table({"jpg": data, "txt": list("abcd")}), folder / "txt.parquet")
    with pytest.raises(BadInput, match="no caption column among jpg, txt; name it with --caption-column"):
        read_corpus(folder / "txt.parquet")
    assert picture_bytes(folder / read_corpus(folder / "other.parquet", image_column="photo").rows[3]["image"]) == data[3]


def test_img2datasets_files(folder, embed):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    out = folder.parent / "laion"
    shard = out / "00000"
    shard.mkdir(parents=True)
    for k in range(4):
        shutil.copy(folder / f"{k}.webp", shard / f"{k:09}.webp")
        (shard / f"{k:09}.txt").write_text(f"caption {k}")
        (shard / f"{k:09}.json").write_text("{}")
    (out / "00000_stats.json").write_text('{"count": 4}')
    keys = [f"{k:09}" for k in range(4)]
    parquet.write_table(pa.table({"key": keys, "caption": [f"caption {k}" for k in range(4)]}), out / "00000.parquet")
    for number, data in enumerate((out, shard, out / "00000.parquet")):
        assert captions_of(embed(data, out=f"e{number}")[1]) == [f"caption {k}" for k in range(4)]


# ---------------------------------------------------------------------------------------------- columns and captions


def test_columns_are_chosen_over_all_records(folder, embed):
    """The first record has neither picture nor label nor split."""
    records = [{"caption": "no picture"}, picture(1), picture(2) | {"label": "cat", "split": "test"}]
    records += [picture(k) | {"split": "val"} for k in range(3, 6)]
    result, rows, quarantine = embed(write_jsonl(folder / "t.jsonl", records))
    assert quarantine == {"row 1": "no image path"} and rows[1]["label"] == "cat"
    assert [row["split"] for row in rows] == ["train", "test", "val", "val", "val"]
    assert "label 'label', split 'split'" in result.out and "1 row has no split and trains" in result.out


def test_several_captions_of_a_picture(folder, embed):
    lists = write_jsonl(
        folder / "a.jsonl", [{"image": f"{k}.webp", "captions": [f"a {k}", f"b {k}"]} for k in range(3)]
    )
    texts = [json.dumps([f"a {k}", f"b {k}"]) for k in range(2)] + [str(["a 2", "b 2"])]
    text = write_csv(folder / "b.csv", [{"filename": f"{k}.webp", "raw": texts[k]} for k in range(3)])
    columns = [{"image": f"{k}.webp", "caption_1": f"a {k}", "caption_2": f"b {k}"} for k in range(3)]
    several = write_csv(folder / "c.csv", columns)
    karpathy = [{"filename": f"{k}.webp", "sentences": [{"raw": f"a {k}"}, {"raw": f"b {k}"}]} for k in range(3)]
    dicts = write_jsonl(folder / "d.jsonl", karpathy)
    for table in (lists, text, several, dicts):
        result, rows, _ = embed(table, out=table.stem)
        assert captions_of(rows) == ["a 0", "b 0", "a 1", "b 1", "a 2", "b 2"]
        assert [row["key"] for row in rows[:2]] == ["0.webp", "0.webp#2"]
        assert "3 pictures, 6 captions (2 a picture)" in result.out


def test_captions_that_are_no_text(folder, embed):
    values = [1984, 2.5, float("nan"), None, "None", "[untitled] boat", {"a": 1}, "none"]
    table = write_jsonl(folder / "t.jsonl", [{"image": f"{k}.webp", "caption": v} for k, v in enumerate(values)])
    _, rows, quarantine = embed(table, "--allow-bad", "1")
    assert captions_of(rows) == ["1984", "2.5", "[untitled] boat", "none"]
    placeholder = "placeholder for a missing caption: None"
    assert [quarantine[f"{k}.webp"] for k in (2, 3, 4, 6)] == [
        "empty caption",
        "empty caption",
        placeholder,
        "empty caption",
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "txt"])
def test_placeholders_for_missing_captions(folder, embed, kind):
    """What programs write for an empty cell is no caption, in whatever kind of file it stands; a word like it is one."""
    words = ["None", "nan", "NaN", "null", "NULL", "<NA>", "  null ", "", "  "]
    records = [picture(k) for k in range(20)]
    for k, word in enumerate(words):
        records[k]["caption"] = word
    records[10]["caption"], records[11]["caption"] = "none", "null and void"
    table = folder / f"t.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(table, records, "," if kind == "csv" else "\t")
    elif kind == "jsonl":
        write_jsonl(table, records)
    elif kind == "json":
        table.write_text(json.dumps(records))
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.Table.from_pylist(records), table)
    else:
        table = folder
        for k in range(40):
            caption = records[k]["caption"] if k < 20 else "more"
            (folder / f"{k}.txt").write_text(caption)
    result, rows, quarantine = embed(table, "--allow-bad", "0.5")
    assert captions_of(rows)[:3] == ["caption 9", "none", "null and void"] or kind == "txt"
    assert len(quarantine) == 9 and quarantine["6.webp"] == "placeholder for a missing caption: null"
    assert quarantine["7.webp"] == quarantine["8.webp"] == "empty caption"
    assert "placeholder for a missing caption (7), empty caption (2)" in result.out


def test_a_class_may_have_any_name(folder, embed):
    for k, label in enumerate(("None", "nan", "cat")):
        (folder / "tree" / label).mkdir(parents=True)
        (folder / f"{k}.webp").rename(folder / "tree" / label / "a.webp")
    _, rows, quarantine = embed(folder / "tree")
    assert captions_of(rows) == ["None", "cat", "nan"] and not quarantine


def test_questions_that_lack_a_part(folder, embed):
    good = {"question": "what?", "answer": "none", "choices": ["none", "b"]}
    wrong = [{"question": None}, {"answer": None}, {"choices": None}, {"choices": "a|b"}, {"answer": "z"}]
    records = [{"image": f"{k}.webp"} | good | change for k, change in enumerate([{}, *wrong])]
    _, rows, quarantine = embed(write_jsonl(folder / "q.jsonl", records), "--allow-bad", "1")
    assert captions_of(rows) == ["what? none"]
    reasons = [quarantine[f"{k}.webp"] for k in range(1, 6)]
    assert reasons[:2] == ["no question", "no answer"] and "not among the choices" in reasons[4]


def test_labels_are_typed(folder, embed):
    labels = [0, 1, 1.0, float("nan"), "red_fox", None, "", "3", True, ["a", "b"], 0.5, " 2.75"]
    records = [picture(k) | {"label": labels[k % 12]} for k in range(40)]
    table = write_jsonl(folder / "t.jsonl", records)
    result, rows, quarantine = embed(table)
    assert not quarantine and {row.get("label") for row in rows} == {None, "red_fox"}
    assert "labels are numbers without names" in result.out and "labels are lists" in result.out
    assert "6 labels are fractions, which name no class, and are left out: 0.5, 2.75" in result.out
    (folder / "classes.txt").write_text("cat\ndog\nbird\nhorse\n")
    _, rows, _ = embed(table, out="named")
    named = ["cat", "dog", "dog", None, "red_fox", None, None, "horse", "dog"]
    assert [row.get("label") for row in rows[:12]] == [*named, None, None, None]


# ------------------------------------------------------------------------------------------------ folders and layouts


def test_tables_below_the_folder(folder, embed):
    """Hugging Face's layout: a table beside the pictures of each split."""
    for k in range(40):
        place = folder / "in" / ("train", "validation", "test")[k % 3]
        place.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.webp").rename(place / f"{k}.webp")
    for split in ("train", "validation", "test"):
        names = sorted(path.name for path in (folder / "in" / split).iterdir())
        write_jsonl(folder / "in" / split / "metadata.jsonl", [{"file_name": n, "text": f"text {n}"} for n in names])
    result, rows, _ = embed(folder / "in")
    assert all(row["caption"] == f"text {Path(row['image']).name}" for row in rows) and len(rows) == 40
    assert {(Path(row["image"]).parent.name, row["split"]) for row in rows} == {
        ("train", "train"),
        ("validation", "val"),
        ("test", "test"),
    }
    tables = "test/metadata.jsonl, train/metadata.jsonl, validation/metadata.jsonl"
    says = f"{tables}: 40 pictures, 40 captions (1 a picture), splits train 14, val 13, test 13, labels none"
    assert says in result.out


def test_a_table_of_each_split_and_one_in_a_folder_of_its_own(folder, embed):
    """train.csv and dev.csv beside the pictures; and annotations/ beside images/."""
    write_csv(folder / "train.csv", [picture(k) for k in range(6)])
    write_csv(folder / "dev.csv", [picture(k) for k in range(6, 9)])
    result, rows, _ = embed(folder)
    assert [row["split"] for row in rows].count("val") == 3 and "dev.csv, train.csv: 9 pictures" in result.out
    base = folder.parent / "set"
    (base / "annotations").mkdir(parents=True)
    (folder / "train.csv").rename(base / "annotations" / "all.csv")
    (folder / "dev.csv").unlink()
    folder.rename(base / "images")
    _, rows, _ = embed(base, out="set_out")
    assert captions_of(rows) == [f"caption {k}" for k in range(6)]


def test_a_table_s_own_name_counts_before_its_folder_s(folder):
    """train/val.json is no training table, and a folder that all tables are in says nothing."""
    for place, tables in {"own": ("train/train.csv", "train/val.csv", "test/test.csv"), "all": ("dev/train.csv", "dev/val.csv")}.items():
        for k, table in enumerate(tables):
            (folder / place / table).parent.mkdir(parents=True, exist_ok=True)
            write_csv(folder / place / table, [{"image": f"../../{k}.webp", "caption": f"caption {k}"}])
    corpus = read_corpus(folder / "own")
    assert {row["caption"]: row["split"] for row in corpus.rows} == {"caption 0": "train", "caption 1": "val", "caption 2": "test"}
    assert "train/val.csv: of the split in the table's name, and not of that in its folder's" in corpus.notes
    assert [row["split"] for row in read_corpus(folder / "all").rows] == ["train", "val"]


@pytest.mark.parametrize(
    "tables, expected",
    [
        (("train", "testmini", "evaluation"), ("train", "test", "test")),
        (("train_val", "test_dev", "minival"), ("train", "test", "val")),
        (("train", "extra", "val"), ("train", "extra", "val")),  # read_names knows no extra: it is not trained on
        (("coco/train", "vg/all"), ("train", None)),  # another source
        (("all", "test"), (None, "test")),  # nothing else trains
    ],
)
def test_tables_that_are_held_out_by_their_names_are_not_trained_on(folder, tables, expected):
    for k, table in enumerate(tables):
        place = folder / "in" / table / "more" / "t.csv"
        place.parent.mkdir(parents=True)
        write_csv(place, [{"image": str(folder / f"{k}.webp"), "caption": f"caption {k}"}])
    rows = sorted(read_corpus(folder / "in").rows, key=lambda row: row["caption"])
    assert tuple(row.get("split") for row in rows) == expected


def test_a_table_does_not_take_the_pictures_of_another_split(folder, embed):
    """train.csv and val.csv both say 0.webp: each means its own folder, and where that is missing, none."""
    tables = {"train": range(6), "val": range(6, 9)}
    for split, numbers in tables.items():
        (folder / split).mkdir()
        for place, k in enumerate(numbers):
            (folder / f"{k}.webp").rename(folder / split / f"{place}.WEBP")
        write_csv(folder / f"{split}.csv", [picture(place) | {"caption": f"{split} {place}"} for place in range(len(numbers))])
    _, rows, _ = embed(folder)
    assert [row["image"] for row in rows if row["caption"].startswith("val")] == [f"val/{k}.WEBP" for k in range(3)]
    shutil.rmtree(folder / "val")
    result, _, _ = embed(folder, out="without")
    assert result.code == 1 and "val.csv: its train/0.webp is in another table too" in result.err
    result, _, _ = embed(folder / "val.csv", out="alone")
    assert result.code == 1 and "val.csv: its pictures may be those of" in result.err and "named after another split" in result.err
    write_csv(folder / "train.csv", [picture(k) for k in range(4)])
    write_csv(folder / "val.csv", [picture(k) for k in (4, 5)])  # all are of train/, divided by the user
    _, rows, _ = embed(folder, out="divided")
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] * 2


@pytest.mark.parametrize("train, test", [("images", "images_test"), ("train_img", "test_img"), ("images_train", "images_test")])
def test_a_table_of_a_split_takes_the_folder_of_its_pictures(folder, train, test):
    """Both tables say 0.webp, and only the word in a folder's name tells which is meant."""
    tables = {"train": (train, range(6)), "test": (test, range(6, 9))}
    for split, (name, numbers) in tables.items():
        (folder / name).mkdir()
        for place, k in enumerate(numbers):
            (folder / f"{k}.webp").rename(folder / name / f"{place}.webp")
        write_csv(folder / f"{split}.csv", [picture(place) | {"caption": f"{split} {place}"} for place in range(len(numbers))])
    rows = read_corpus(folder).rows
    assert {(Path(row["image"]).parts[0], row["split"]) for row in rows} == {(train, "train"), (test, "test")}


def test_equal_paths_in_two_splits_with_other_captions_are_refused(folder):
    """images/0.webp is the picture of train.csv alone; that of test.csv is not there. Rows that are in both tables are the same."""
    (folder / "images").mkdir()
    for k in range(6):
        (folder / f"{k}.webp").rename(folder / "images" / f"{k}.webp")
    write_csv(folder / "train.csv", [picture(k) for k in range(6)])
    write_csv(folder / "test.csv", [picture(k) for k in range(3)])
    assert len(read_corpus(folder).rows) == 9
    write_csv(folder / "test.csv", [picture(k) | {"caption": f"another {k}"} for k in range(3)])
    with pytest.raises(BadInput, match="test.csv: 3 of its 3 pictures, images/0.webp for one, are in a table of another split, or of none, too"):
        read_corpus(folder)


@pytest.mark.parametrize("image", ["caf\u0065\u0301.webp", "sub\\0.webp", "0.WEBP", " 0.webp"])
@pytest.mark.parametrize("place", ["", "images"])
def test_spellings_of_paths_count_in_the_folder_of_pictures_too(folder, tmp_path, image, place):
    there = tmp_path / "in" / place
    (there / "sub").mkdir(parents=True)
    for name in ("caf\u00e9.webp", "sub/0.webp", "0.webp"):
        shutil.copy(folder / "0.webp", there / name)
    corpus = read_corpus(write_csv(tmp_path / "in" / "t.csv", [{"image": image, "caption": "one"}]))
    assert corpus.root == there and read_picture(corpus.root, corpus.rows[0]["image"])[0].reason is None


def test_captions_in_another_folder(folder, embed):
    (folder / "in" / "images").mkdir(parents=True)
    (folder / "in" / "captions").mkdir()
    for k in range(3):
        (folder / f"{k}.webp").rename(folder / "in" / "images" / f"{k}.webp")
        (folder / "in" / "captions" / f"{k}.TXT").write_text(f"one {k}\ntwo {k}\n")
    result, rows, _ = embed(folder / "in")
    assert captions_of(rows) == ["one 0", "two 0", "one 1", "two 1", "one 2", "two 2"]
    assert "3 text files, a caption a line" in result.out


def test_texts_that_may_be_of_several_pictures_are_not_guessed(tmp_path):
    """Equal names in train and val: the folder's name says which. Where nothing does, nothing is taken."""
    for split in ("train", "val"):
        for folder in ("images", "captions"):
            (tmp_path / folder / split).mkdir(parents=True)
        (tmp_path / "images" / split / "0.jpg").write_bytes(b"\xff\xd8\xff")
        (tmp_path / "captions" / split / "0.txt").write_text(f"of {split}")
    rows = read_corpus(tmp_path).rows
    assert [(row["image"], row["caption"]) for row in rows] == [("images/train/0.jpg", "of train"), ("images/val/0.jpg", "of val")]
    (tmp_path / "captions" / "val" / "0.txt").unlink()
    with pytest.raises(BadInput, match="0.txt: may be the caption of .*train/0.jpg or of .*val/0.jpg"):
        read_corpus(tmp_path)
    (tmp_path / "images" / "val" / "0.txt").write_text("one")
    (tmp_path / "images" / "val" / "0.caption").write_text("two")
    with pytest.raises(BadInput, match="0.jpg: its caption may be in .*0.caption, .*0.txt"):
        read_corpus(tmp_path)


def test_a_mask_beside_a_picture_does_not_get_its_caption(tmp_path):
    """a.jpg and a.png with one a.txt: nothing says which is meant, beside them or in another folder. a.jpg.txt says it."""
    for place in ("beside", "elsewhere/images", "elsewhere/texts"):
        (tmp_path / place).mkdir(parents=True)
    for pictures, texts in (("beside", "beside"), ("elsewhere/images", "elsewhere/texts")):
        for name in ("a.jpg", "a.png"):
            (tmp_path / pictures / name).write_bytes(b"\xff\xd8\xff")
        (tmp_path / texts / "a.txt").write_text("a dog")
        with pytest.raises(BadInput, match="a.txt: may be the caption of .*a.jpg or of .*a.png; write a table"):
            read_corpus(tmp_path / texts.partition("/")[0])
    (tmp_path / "beside" / "a.txt").rename(tmp_path / "beside" / "a.jpg.txt")
    rows = read_corpus(tmp_path / "beside").rows
    assert [(row["image"], row["caption"]) for row in rows if "fault" not in row] == [("a.jpg", "a dog")]


@pytest.mark.parametrize("split", ["{}", "data/{}", "a/b/{}"])
@pytest.mark.parametrize("train, val", [("Train", "Val"), ("training", "validation"), ("train2017", "val2017")])
def test_folders_of_splits_are_no_classes(folder, embed, split, train, val):
    for k in range(40):
        place = folder / "in" / split.format((train, val)[k % 2]) / ("tabby_cat", "dog")[k % 3 % 2]
        place.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.webp").rename(place / f"{k}.webp")
    result, rows, _ = embed(folder / "in")
    assert {(row["label"], row["caption"]) for row in rows} == {("tabby_cat", "tabby cat"), ("dog", "dog")}
    assert sum(row["split"] == "val" for row in rows) == 20 and "labels 2 (dog, tabby_cat)" in result.out


def test_a_folder_around_the_classes_is_no_class(folder, embed):
    for k in range(6):
        place = folder / "in" / "dataset" / ("cat", "train")[k % 2]  # a class may be called train
        place.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.webp").rename(place / f"{k}.webp")
    result, rows, _ = embed(folder / "in")
    assert {row["label"] for row in rows} == {"cat", "train"} and "2 folders are classes (cat, train)" in result.out


def test_pictures_in_folders_of_splits_need_captions(folder, refused):
    for k in range(4):
        place = folder / "in" / ("train", "test")[k % 2]
        place.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.webp").rename(place / f"{k}.webp")
    refused("embed.py", *TINY, "--data", folder / "in", says=["folders of splits", "no captions"])


def test_hidden_files_links_and_other_formats(folder, embed):
    base = folder / "in"
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX/cat", "cat/@eaDir"):
        (base / name).mkdir(parents=True)
        shutil.copy(folder / f"{len(name)}.webp", base / name / f"{len(name)}.webp")
    (base / "cat" / "._0.webp").write_bytes(b"\0\5\x16\7")
    (base / "cat" / "Thumbs.db").write_bytes(b"0")
    (base / "cat" / "notes.xml").write_text("<a/>")
    shutil.copytree(base / "dog", folder / "elsewhere")
    Image.open(folder / "20.webp").convert("RGB").save(folder / "elsewhere" / "a.jfif", "JPEG")
    Image.open(folder / "21.webp").save(folder / "elsewhere" / "b.tif")
    Image.open(folder / "22.webp").save(folder / "elsewhere" / "named_otherwise", "PNG")
    (base / "owl").symlink_to(folder / "elsewhere")
    (base / "cat" / "loop").symlink_to(base)
    (base / "owl" / "drawing.svg").write_text("<svg></svg>")
    (base / "owl" / "itself.xml").symlink_to("itself.xml")
    (base / "owl" / "nowhere.txt").symlink_to("gone.txt")
    os.mkfifo(base / "owl" / "pipe.webp")
    result, rows, quarantine = embed(base)
    assert {row["label"] for row in rows} == {"cat", "dog", "owl"}
    names = {Path(row["image"]).name for row in rows if row["label"] == "owl"}
    assert {"a.jfif", "b.tif", "named_otherwise"} <= names
    assert quarantine == {"owl/drawing.svg": "unreadable image: SVG is not a format that is read"}
    assert "links to folders that are read already: cat/loop" in result.out and "1 .xml" in result.out


def test_a_row_is_bound_to_its_picture(folder, embed, tmp_path):
    """rows.jsonl holds the digest of each picture's bytes, and the folder's hash covers it and the path."""
    embed(write_jsonl(folder / "t.jsonl", [picture(k) for k in range(4)]))
    path = tmp_path / "e" / "rows.jsonl"
    rows = read_jsonl(path)
    assert rows[0]["image_sha256"] == hashlib.sha256((folder / "0.webp").read_bytes()).hexdigest()
    for change in ({"image": "9.webp"}, {"image_sha256": "0" * 64}):
        write_jsonl(path, [rows[0] | change, *rows[1:]])
        with pytest.raises(BadInput, match="have changed since"):
            Embeddings(tmp_path / "e")


# ------------------------------------------------------------------------------------------------------- picture paths


def test_paths_as_other_machines_write_them(folder, embed):
    (folder / "sub dir").mkdir()
    (folder / "0.webp").rename(folder / "sub dir" / "0 #1 50%.webp")
    (folder / "1.webp").rename(folder / unicodedata.normalize("NFD", "café.webp"))
    good = ["sub dir\\0 #1 50%.webp", "sub%20dir/0%20%231%2050%25.webp", f"file://{folder}/2.webp", " 3.webp "]
    good += [unicodedata.normalize("NFC", "café.webp"), "4.WEBP", str(folder / "5.webp"), "./6.webp"]
    bad = {
        "https://example.org/" + "a" * 300 + ".jpg": "web address",
        "i" * 300: "missing file",
        "nul\0.png": "missing file",
        "sub dir": "missing file",
        "data:image/png;base64,AAAA": "data URI",
    }
    names = [*good[:4], *bad, *good[4:]]
    table = write_jsonl(folder / "t.jsonl", [{"image": name, "caption": name} for name in names])
    _, rows, quarantine = embed(table, "--allow-bad", "0.5")
    assert captions_of(rows) == [" ".join(name.split()) for name in good]
    assert rows[0]["image"] == rows[1]["image"] == "sub dir/0 #1 50%.webp"
    assert [reason.partition(":")[0] for reason in quarantine.values()] == list(bad.values())


def test_one_picture_is_known_by_its_content(folder, embed, tmp_path):
    """Under three spellings and as a copy: it is never trained on and chosen by."""
    records = []
    for k in range(40):
        shutil.copy(folder / f"{k}.webp", folder / f"copy{k}.webp")
        names = [f"{k}.webp", f"./{k}.webp", str(folder / f"{k}.webp"), f"copy{k}.webp"]
        records += [{"image": name, "caption": f"caption {k} {name[:3]}"} for name in names]
    result, rows, _ = embed(write_jsonl(folder / "t.jsonl", records))
    assert "40 pictures, 160 captions (4 a picture)" in result.out
    assert len({row["image"] for row in rows}) == 40 == len({row["image_sha256"] for row in rows})
    train, validation = split_rows(Embeddings(tmp_path / "e"))
    assert not {rows[i]["image"] for i in train.tolist()} & {rows[i]["image"] for i in validation.tolist()}
    assert len({row["key"] for row in rows}) == 160


# --------------------------------------------------------------------------------------- bad rows, and a bad machine


def test_more_than_a_few_bad_rows_stop_the_corpus(folder, embed, run, tmp_path):
    table = write_jsonl(folder / "t.jsonl", [picture(k) for k in range(40)])
    for k in range(3):
        (folder / f"{k}.webp").rename(tmp_path / f"{k}.webp")
    result, _, _ = embed(table)
    says = "3 of 40 rows (7.5%) cannot be used: missing file (3);"
    assert result.code == 1 and says in result.err and "--allow-bad 0.08" in result.err
    assert len(read_jsonl(tmp_path / "e" / "quarantine.jsonl")) == 3
    assert not (tmp_path / "e" / "manifest.json").exists()
    assert embed(table, "--allow-bad", "0.08", out="allowed")[0].code == 0

    (tmp_path / "0.webp").rename(folder / "0.webp")  # mended: the same command looks at it again
    (tmp_path / "1.webp").rename(folder / "1.webp")
    result, rows, quarantine = embed(table)
    assert result.code == 0 and len(rows) == 39 and quarantine == {"2.webp": "missing file"}
    assert "left out: 1 of 40 rows: missing file (1)" in result.out


def test_pictures_mended_before_an_encoder_is_finished_are_taken(folder, embed, run, tmp_path):
    table = write_jsonl(folder / "t.jsonl", [picture(k) for k in range(40)])
    whole = (folder / "7.webp").read_bytes()
    (folder / "7.webp").write_bytes(whole[:50])
    shard = ("--shard", "0/2", "--shard-rows", "16", "--batch-size", "4")
    for _ in range(2):  # the other shards are left to another process, so that the rows are not fixed
        result = run("embed.py", *TINY, "--data", table, "--out", "e", *shard)
        assert result.code == 0 and "can be used now" not in result.out
    (folder / "7.webp").write_bytes(whole)
    result = run("embed.py", *TINY, "--data", table, "--out", "e", *shard[2:])
    assert "can be used now" in result.out and "0 more are in quarantine" in result.out
    run("embed.py", *TINY, "--data", table, "--out", "whole", *shard[2:])
    assert (tmp_path / "e" / "tiny.pt").read_bytes() == (tmp_path / "whole" / "tiny.pt").read_bytes()


def test_another_copy_of_the_pictures_does_not_finish_a_pass(folder, refused, run, tmp_path):
    """Equal tables; the pictures of the second were made smaller."""
    table = write_jsonl(folder / "t.jsonl", [picture(k) for k in range(40)])
    shards = ("--shard-rows", "8", "--batch-size", "8", "--out", "e")
    assert run("embed.py", *TINY, "--data", table, *shards, "--shard", "0/2").code == 0
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in other.glob("*.webp"):
        with Image.open(path) as large:
            large.resize((32, 32)).save(path)
    refused("embed.py", *TINY, "--data", other / "t.jsonl", *shards, says=["other/0.webp", "is not the picture that was read"])
    moved = folder.rename(tmp_path / "moved")  # the same pictures in another place
    assert run("embed.py", *TINY, "--data", moved / "t.jsonl", *shards).code == 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENOMEM, errno.EACCES])
def test_a_fault_of_the_machine_stops_and_costs_no_row(folder, embed, monkeypatch, number):
    table = write_jsonl(folder / "t.jsonl", [picture(k) for k in range(40)])
    sound = Path.read_bytes

    def read_bytes(path):
        if path.name == "30.webp":
            raise OSError(number, os.strerror(number), str(path))
        return sound(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    result, _, _ = embed(table)
    assert result.code == 1 and os.strerror(number) in result.err and "30.webp" in result.err
    monkeypatch.setattr(Path, "read_bytes", sound)
    _, rows, quarantine = embed(table)
    assert len(rows) == 40 and not quarantine


def test_a_journal_of_garbage_is_made_again(folder, embed, run, tmp_path):
    table = write_jsonl(folder / "t.jsonl", [picture(k) for k in range(4)])
    shards = (*TINY, "--data", table, "--shard-rows", "2", "--batch-size", "1")
    assert run("embed.py", *shards, "--out", "whole").code == 0
    for number, garbage in enumerate((b"\xff\0garbage\n{\n", b"{}\n[[1]]\n", b"")):
        out = tmp_path / f"e{number}"
        assert run("embed.py", *shards, "--out", out, "--shard", "0/2").code == 0
        (out / ".shards" / ".pictures" / "000000000.jsonl").write_bytes(garbage)
        assert run("embed.py", *shards, "--out", out).code == 0
        assert (out / "tiny.pt").read_bytes() == (tmp_path / "whole" / "tiny.pt").read_bytes()


def test_a_picture_is_decoded_once(folder, embed, monkeypatch):
    table = write_jsonl(folder / "t.jsonl", [picture(k % 4) | {"caption": str(k)} for k in range(20)])
    seen = []
    monkeypatch.setattr(pictures_on_disk, "open_image", lambda file: seen.append(file) or open_image(file))
    embed(table)
    assert len(seen) == 4


# ------------------------------------------------------------------------------------------------------------- splits


def numbered_pictures(folder, count):
    """Small pictures that all differ. Returns their rows."""
    folder.mkdir()
    for k in range(count):
        Image.new("RGB", (8, 8), (k % 256, k // 256, 0)).save(folder / f"{k}.png")
    return [{"image": f"{k}.png", "caption": f"caption {k}"} for k in range(count)]


def test_own_data_is_split_once_by_picture_content(embed, tmp_path):
    records = numbered_pictures(tmp_path / "many", 600)
    result, rows, _ = embed(write_csv(tmp_path / "many" / "t.csv", records[:500]))
    split_of = {row["image"]: row["split"] for row in rows}
    counts = [list(split_of.values()).count(split) for split in ("train", "val", "test")]
    assert 370 < counts[0] < 430 and 30 < counts[1] < 70 and 30 < counts[2] < 70
    assert "set aside by picture content from 500 training pictures" in result.out
    _, more, _ = embed(write_csv(tmp_path / "many" / "more.csv", records[::-1]), out="more")
    assert all(split_of.get(row["image"], row["split"]) == row["split"] for row in more)  # added and reordered
    data = Embeddings(tmp_path / "e")
    assert [part.tolist() for part in split_rows(data, 0)] == [part.tolist() for part in split_rows(data, 1)]


@pytest.mark.parametrize("count, splits", [(1, ["train"]), (2, ["train", "val"]), (5, ["test", "train", "val"])])
def test_tiny_corpora(embed, refused, tmp_path, count, splits):
    records = numbered_pictures(tmp_path / "few", count)
    _, rows, _ = embed(write_csv(tmp_path / "few" / "t.csv", records))
    assert sorted({row["split"] for row in rows}) == splits
    if count == 1:
        folder = make_embedding_folder(tmp_path / "one", rows, control=unit_vectors(1, 512), mpnet=unit_vectors(1, 768))
        refused("train_hyma.py", "--data", folder, "--device", "cpu", says=["no val rows to choose by", "train 1"])


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train", "restval", "restval", "val", "test"], {"train": 24, "val": 8, "test": 8}),
        (["Train", "Training ", "TRAIN", "Valid", "Testing"], {"train": 24, "val": 8, "test": 8}),
        (["train", "train", "train", "validate", "test"], {"train": 24, "val": 8, "test": 8}),
        (["train", "train", "train", "train", "test"], {"test": 8}),
        (["test"] * 5, {"test": 40}),
    ],
)
def test_splits_that_come_with_the_data_are_kept(folder, embed, names, expected):
    records = [picture(k) | {"split": names[k % 5]} for k in range(40)]
    result, rows, _ = embed(write_jsonl(folder / "t.jsonl", records))
    splits = [row["split"] for row in rows]
    assert {split: splits.count(split) for split in expected} == expected and len(rows) == 40
    if names.count("test") == 1 and "val" not in expected:  # test but no val: some of train chooses
        assert splits.count("val") > 0 and "set aside by picture content from 32" in result.out


def place_by_split(folder, names):
    """Moves twenty pictures into a folder of each name."""
    for number, name in enumerate(names):
        (folder / name).mkdir()
        for k in range(20 * number, 20 * number + 20):
            (folder / f"{k}.webp").rename(folder / name / f"{k}.webp")


@pytest.mark.parametrize(
    "names", [("flickr_train", "flickr_test"), ("split=train", "split=test"), ("train_sft", "test_unseen"), ("trainval", "testA")]
)
@pytest.mark.parametrize("of", ["tables", "paths"])
def test_no_picture_of_a_test_folder_is_trained_on(folder, embed, names, of):
    """Of two tables the folders' words count; of one table's pictures folders of a split's name alone."""
    place_by_split(folder, names)
    rows = [{"image": f"{names[k // 20]}/{k}.webp", "caption": f"caption {k}"} for k in range(40)]
    if of == "paths":
        write_csv(folder / "metadata.csv", rows)
    else:
        for number, name in enumerate(names):
            of_table = [row | {"image": Path(row["image"]).name} for row in rows[20 * number : 20 * number + 20]]
            write_csv(folder / name / "metadata.csv", of_table)
    result, rows, _ = embed(folder)
    splits = [row["split"] for row in sorted(rows, key=lambda row: int(row["caption"].split()[1]))]
    if of == "paths" and names[0] != "trainval":
        assert "set aside by picture content from 40 training pictures" in result.out
        return
    assert set(splits[:20]) == {"train", "val"} and set(splits[20:]) == {"test"}
    assert ("splits of its pictures' folders" in result.out) == (of == "paths")


def test_a_folder_beside_those_of_splits_is_none_that_trains(folder, embed):
    """a.webp with a.txt: what is in extra/ is named and not used, as a split of that name in a column is."""
    place_by_split(folder, ("train", "test"))
    (folder / "extra").mkdir()
    for name, k in (("train", 0), ("train", 1), ("test", 20), ("extra", 19)):
        if name == "extra":
            (folder / "train" / f"{k}.webp").rename(folder / name / f"{k}.webp")
        (folder / name / f"{k}.txt").write_text(f"caption {k}")
    result, rows, _ = embed(folder, "--allow-bad", "1")
    assert {row["caption"]: row["split"] for row in rows}["caption 19"] == "extra" and "'extra' (1 rows)" in result.out


def test_unknown_splits_are_named(folder, embed):
    records = [picture(k) | {"split": ["train", "val", "test", "extra"][k % 4]} for k in range(40)]
    result, rows, _ = embed(write_jsonl(folder / "t.jsonl", records))
    assert "'extra' (10 rows)" in result.out and len(rows) == 40
    records = [picture(k) | {"split": f"fold{k % 2}"} for k in range(40)]
    result, _, _ = embed(write_jsonl(folder / "u.jsonl", records), out="u")
    assert result.code == 1 and "'fold0' (20 rows), 'fold1' (20 rows)" in result.err and "rename" in result.err


def test_a_held_out_picture_is_not_trained_on(folder, embed):
    records = [picture(k) | {"split": ["train", "val", "test"][k % 3]} for k in range(30)]
    shutil.copy(folder / "2.webp", folder / "copy.webp")
    records += [{"image": "copy.webp", "caption": "again", "split": "train"}]
    result, rows, quarantine = embed(write_jsonl(folder / "t.jsonl", records))
    assert quarantine == {"2.webp#2": "in two splits: the same picture is in test, and this row is in train"}
    assert len(rows) == 30 and "in two splits (1)" in result.out


def test_other_runs_are_scored_on_all_rows_of_a_folder_that_embed_split(embed, tmp_path):
    records = numbered_pictures(tmp_path / "many", 40)
    embed(write_csv(tmp_path / "many" / "t.csv", records))
    own = tasks_of(tmp_path / "e", run_seed=0)["retrieval"]
    others = tasks_of(tmp_path / "e")["retrieval"]
    assert len(others.rows) == 40 and 0 < len(own.rows) < 20 and own.protocol.startswith("test split")


# ------------------------------------------------------------------------------------------------------ standard sets


def test_answers_are_normalised_and_bad_questions_cost_one_row(folder, embed):
    answers = [
        ["NIKE", "nike", "Nike"],
        ["unanswerable"] * 3,
        ["nike"] * 3,
        ["12"] * 3,
        ["The red car."] * 3,
        [" 12"] * 3,
    ]
    questions = [
        {"question_id": k, "image_id": f"i{k}", "question": f"what is {k}?", "answers": given}
        for k, given in enumerate(answers)
    ]
    questions.append({"question_id": 6, "image_id": "i6", "question": "  ", "answers": ["x"]})
    questions.append({"question_id": 7, "image_id": "i7", "question": "what is 7?", "answers": []})
    base = folder.parent / "set"
    (base / "train_images").mkdir(parents=True)
    for k in range(8):
        Image.open(folder / f"{k}.webp").convert("RGB").save(base / "train_images" / f"i{k}.jpg")
    (base / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": questions}))
    result, rows, quarantine = embed(f"textvqa:{base}", "--allow-bad", "0.3")
    assert [row["answer"] for row in rows] == ["nike", "unanswerable", "nike", "12", "red car", "12"]
    assert all(len({choice.lower() for choice in row["choices"]}) == 4 for row in rows)
    assert quarantine == {"i6.jpg": "question without text: number 6", "i7.jpg": "question without answers: number 7"}
    manifest = json.loads((folder.parent / "e" / "manifest.json").read_text())
    assert "NOT WHOLE: 8 of its 5,000 questions, 2 rows left out" in manifest["protocol"]


def test_the_sample_keeps_one_of_two_equal_pictures(tmp_path):
    from sample.build import write_sample

    rows = []
    for k, shade in enumerate(("red", "red", "blue")):
        path = tmp_path / f"{k}.png"
        image = Image.new("RGB", (64, 64), "white")
        image.paste(shade, (8, 8, 40, 40))
        image.save(path)
        rows.append({"picture": path, "caption": f"caption {k}", "label": "food", "split": "test"})
    write_sample(rows, tmp_path / "out", 64, 80)
    table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "captions.csv").read_text())))
    assert [row["caption"] for row in table] == ["caption 0", "caption 2"]
    assert len(list((tmp_path / "out" / "images").rglob("*.webp"))) == 2


def test_no_picture_of_the_sample_is_in_two_splits():
    """One picture is there twice, under two labels: both copies are test rows."""
    splits_of_picture = {}
    for row in sample_captions():
        digest = hashlib.sha256((SAMPLE / row["image"]).read_bytes()).hexdigest()
        splits_of_picture.setdefault(digest, set()).add(row["split"])
    assert len(splits_of_picture) == 2649
    assert all(len(splits) == 1 for splits in splits_of_picture.values())


def test_data_that_come_with_train_and_val_keep_just_these():
    """Nothing is taken from what somebody wants to train on; evaluate.py warns that no test rows are left."""
    rows = [{"image": f"{k}.png", "split": "train" if k % 4 else "val"} for k in range(100)]
    digests = [hashlib.sha256(row["image"].encode()).hexdigest() for row in rows]
    lines, refused = give_splits(rows, digests, "rows")
    assert [row["split"] for row in rows] == ["train" if k % 4 else "val" for k in range(100)]
    assert lines == [] and refused == {}


# ----------------------------------------------------------------------------------------- splits and captions in silence


def table_of_splits(folder, image):
    """A table of 20 rows whose pictures' paths are image(split, k), a tenth of them val and a tenth test; the pictures exist."""
    rows = []
    for k in range(20):
        split = {0: "val", 1: "test"}.get(k % 10, "train")
        row = {"image": image(split, k), "caption": f"caption {k}"}
        path = folder / row["image"].replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{k}.webp", path)
        rows.append(row)
    return rows


@pytest.mark.parametrize("case", ["backslashes", "absolute", "one elsewhere"])
def test_splits_of_the_pictures_folders_are_read(folder, case):
    """Whatever the paths look like: from Windows, from the root of the disk, or with a row whose picture is in no such folder."""
    image = {
        "backslashes": lambda split, k: f"{split}\\{k}.webp",
        "absolute": lambda split, k: f"{folder}/dev/birds/{split}/{k}.webp",
        "one elsewhere": lambda split, k: f"{split if k != 5 else 'extra'}/{k}.webp",
    }[case]
    rows = table_of_splits(folder, image)
    corpus = read_corpus(write_csv(folder / "t.csv", rows))
    splits = [row.get("split") for row in corpus.rows]
    expected = [{0: "val", 1: "test"}.get(k % 10, "train") for k in range(20)]
    if case == "one elsewhere":
        expected[5] = "extra"  # no split, so that it is not trained on
    assert splits == expected and any("splits of its pictures' folders" in note for note in corpus.notes)


@pytest.mark.parametrize("form", ["{}Images.txt", "Flickr_8k.{}Images.txt", "splits/{}.txt", "{}.csv"])
def test_lists_of_splits_beside_a_table_are_read(folder, form):
    """Of names, and of names without their endings. trainval.txt has the training and the validation pictures together."""
    write_csv(folder / "captions.csv", [picture(k) for k in range(8)])
    for split, numbers in {"train": range(4), "val": (4, 5), "trainval": range(6), "test": (6,)}.items():
        path = folder / form.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text("image\r\n" * (path.suffix == ".csv") + "".join(f"{k}{'.webp' if k % 2 else ''}\r\n" for k in numbers))
    corpus = read_corpus(folder)
    assert [row["split"] for row in corpus.rows] == ["train"] * 4 + ["val"] * 2 + ["test", "in no list"]
    assert any("splits of the lists beside it" in note for note in corpus.notes)
    for split in ("train", "trainval"):
        (folder / form.format(split)).unlink()
    assert [row["split"] for row in read_corpus(folder).rows] == ["train"] * 4 + ["val"] * 2 + ["test", "train"]


def test_lists_of_splits_that_are_not_read_are_named(folder):
    """Of another form, beside a table and beside pictures with texts; a picture's own text is none."""
    (folder / "pictures").mkdir()
    for k in range(3):
        (folder / f"{k}.webp").rename(folder / "pictures" / f"train_{k}.webp")
    table = write_csv(folder / "captions.csv", [{"image": f"train_{k}.webp", "caption": f"caption {k}"} for k in range(3)])
    (folder / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    line = "not read, though named after splits: train_test_split.txt; splits are a column, or lists of pictures beside a table"
    assert line in read_corpus(folder).notes and line in read_corpus(table).notes
    table.unlink()
    for k in range(3):
        (folder / "pictures" / f"train_{k}.txt").write_text(f"caption {k}")
        (folder / f"{k + 3}.webp").rename(folder / "pictures" / f"other_{k}.webp")
    assert line in read_corpus(folder).notes


@pytest.mark.parametrize("several", [False, True])
def test_a_table_named_after_a_split_is_not_divided_by_folders(folder, several):
    """As Karpathy's training table, which has pictures of COCO's val2014/."""
    write_csv(folder / "coco_train.csv", [{"image": f"{('train', 'val')[k % 2]}2014/{k}.webp", "caption": f"caption {k}"} for k in range(6)])
    if several:
        write_csv(folder / "coco_val.csv", [{"image": "val2014/7.webp", "caption": "caption 7"}])
    corpus = read_corpus(folder)
    assert [row.get("split") for row in corpus.rows] == (["train"] * 6 + ["val"] if several else [None] * 6)
    assert any("the folders of its pictures say no splits, as it is named after one" in note for note in corpus.notes)


def test_folders_of_other_sources_beside_one_with_splits_still_train(folder):
    """As in LLaVA's mix: coco/train2014 and coco/val2014 are splits, and vg/ is no third one."""
    rows = table_of_splits(folder, lambda split, k: f"coco/{split}2014/{k}.webp" if k < 12 else f"vg/images/{k}.webp")
    splits = [row.get("split") for row in read_corpus(write_csv(folder / "t.csv", rows)).rows]
    assert splits[:3] == ["val", "test", "train"] and splits[12:] == [None] * 8


def test_a_table_of_a_split_takes_the_pictures_of_that_split(folder):
    """test.csv with test/0.webp, where images/0.webp is there, too, and another picture."""
    (folder / "images").mkdir()
    (folder / "test").mkdir()
    for k in range(6):
        shutil.copy(folder / f"{k}.webp", folder / "images" / f"{k}.webp")
        shutil.move(folder / f"{k}.webp", folder / "test" / f"{5 - k}.webp")
    for name, count in (("train", 6), ("test", 4)):
        write_csv(folder / f"{name}.csv", [picture(k) for k in range(count)])
    corpus = read_corpus(folder)
    assert sorted(Path(row["image"]).parts[0] for row in corpus.rows) == ["images"] * 6 + ["test"] * 4


def test_splits_in_columns_of_other_names_or_of_none(folder):
    rows = [picture(k) | {"partition": ("train", "test", "val")[k % 3]} for k in range(6)]
    assert [row["split"] for row in read_corpus(write_csv(folder / "a.csv", rows)).rows] == ["train", "test", "val"] * 2
    rows = [picture(k) | {"partition": ("train", "test", "unused")[k % 3]} for k in range(6)]  # what is of no known name is left alone
    found = [row["split"] for row in read_corpus(write_csv(folder / "d.csv", rows)).rows]
    assert found == ["train", "test", "unused"] * 2
    (folder / "parts").mkdir()
    for number, split in enumerate(("train", "test")):  # a part of a corpus may have the rows of one split
        rows = [{"image": f"../../{k}.webp", "caption": "x", "partition": split} for k in range(3)]
        (folder / "parts" / f"part-{number}").mkdir()
        write_csv(folder / "parts" / f"part-{number}" / "t.csv", rows)
    rows = read_corpus(folder / "parts").rows
    assert sorted({row["split"] for row in rows}) == ["test", "train"]
    rows = [picture(k) | {"set": f"set {k % 2}"} for k in range(6)]  # no splits: nobody's rows are left alone for it
    assert not any("split" in row for row in read_corpus(write_csv(folder / "b.csv", rows)).rows)
    both = folder / "both"
    both.mkdir()
    for name in ("train", "test"):  # an empty column does not hide what the table's name says
        write_csv(both / f"{name}.csv", [{"image": f"../{k}.webp", "caption": "x", "split": ""} for k in range(3)])
    assert [row["split"] for row in read_corpus(both).rows] == ["test"] * 3 + ["train"] * 3
    images = [{"id": k, "file_name": f"{k}.webp", "split": ("train", "test")[k % 2]} for k in range(4)]
    notes = [{"image_id": k, "caption": f"caption {k}"} for k in range(4)]
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    assert [row["split"] for row in read_corpus(folder / "c.json").rows] == ["train", "test"] * 2


@pytest.mark.parametrize(
    "column, values",
    [
        ("phase", ("train", "val", "test")),
        ("Data Set", ("train", "unused", "test")),
        ("usage", ("Training", "", "PrivateTest")),
        ("evaluation_status", ("train_val", "val", "test")),
        ("is_train", ("True", "1", "false")),
        ("is_test", (0, 0, 1)),
    ],
)
def test_a_column_of_nothing_but_splits_is_read_whatever_its_name(folder, column, values):
    rows = [picture(k) | {column: values[k % 3]} for k in range(6)]
    corpus = read_corpus(write_csv(folder / "t.csv", rows))
    expected = {"is_train": ["train", "train", "test"], "is_test": ["train", "train", "test"]}.get(column, list(values))
    assert [row["split"] for row in corpus.rows] == expected * 2 and f"split {column!r}" in corpus.notes[0]


def test_columns_of_splits_that_differ_are_not_guessed(folder):
    """Nor does one beat a table's own name, as the split that a picture once had in another set."""
    values = ("train", "test")
    rows = [picture(k) | {"phase": values[k % 2], "mode": values[k // 2 % 2]} for k in range(6)]
    with pytest.raises(BadInput, match="'phase' and 'mode' both name splits and differ .test, train.; name the one that counts split"):
        read_corpus(write_csv(folder / "t.csv", rows))
    rows = [row | {"mode": row["phase"]} for row in rows]
    assert [row["split"] for row in read_corpus(write_csv(folder / "t.csv", rows)).rows] == ["train", "test"] * 3
    for name in ("train", "test"):
        write_csv(folder / f"{name}.csv", [picture(k) | {"coco_split": values[k % 2]} for k in range(2)])
    (folder / "t.csv").unlink()
    assert [row["split"] for row in read_corpus(folder).rows] == ["test"] * 2 + ["train"] * 2


def test_a_column_of_splits_of_another_name_in_parquet_and_arrow(folder):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    splits = ["train", None, "test", "val"]
    columns = {"image": [f"{k}.webp" for k in range(4)], "caption": list("abcd"), "phase": splits, "url": ["test", "x", "y", "train"]}
    table = arrow.table(columns)
    parquet.write_table(table, folder / "t.parquet")
    with arrow.ipc.new_stream(folder / "t.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("t.parquet", "t.arrow"):
        assert [row["split"] for row in read_corpus(folder / name).rows] == ["train", "", "test", "val"]


def test_a_list_of_captions_with_an_empty_item_is_a_list(folder):
    cells = ("['a dog', None]", '["a cat", null]', "['a cow', nan, 'an ox']", "('a hen', 'a hare')")
    rows = [{"image": f"{k}.webp", "caption": cell} for k, cell in enumerate(cells)]
    found = captions_of(read_corpus(write_csv(folder / "t.csv", rows)).rows)
    assert found == ["a dog", "a cat", "a cow", "an ox", "a hen", "a hare"]
    rows = [{"image": "0.webp", "caption": "[{'raw': 'curry with nan bread'}]"}, {"image": "1.webp", "caption": "['my nan cooks', None]"}]
    rows += [{"image": "2.webp", "caption": "[]"}, {"image": "3.webp", "caption": "('rice and nan bread', nan)"}]
    found = read_corpus(write_csv(folder / "v.csv", rows)).rows
    assert captions_of(found) == ["curry with nan bread", "my nan cooks", None, "rice and nan bread"] and found[2]["fault"] == "empty caption"
    rows = [{"image": "0.webp", "caption": "(a dog in the sun)"}, {"image": "1.webp", "caption": "[2019] a cat, nan"}]
    assert captions_of(read_corpus(write_csv(folder / "u.csv", rows)).rows) == ["(a dog in the sun)", "[2019] a cat, nan"]


def test_a_line_for_excel_is_no_header(folder):
    (folder / "t.csv").write_text("sep=;\nimage;Caption\n0.webp;one\n1.webp;two\n")
    assert captions_of(read_corpus(folder / "t.csv").rows) == ["one", "two"]


def test_labels_that_are_names_count_before_numbers(folder):
    rows = [picture(k) | {"label": k, "class_name": f"kind {k}"} for k in range(3)]
    assert [row["label"] for row in read_corpus(write_csv(folder / "t.csv", rows)).rows] == ["kind 0", "kind 1", "kind 2"]


def test_a_stray_picture_beside_folders_of_splits_and_classes(folder, tmp_path):
    tree = tmp_path / "tree"
    for k, split in enumerate(("train", "train", "test")):
        (tree / split / "cat").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"{k}.webp", tree / split / "cat" / f"{k}.webp")
    shutil.copy(folder / "3.webp", tree / "cover.webp")
    rows = read_corpus(tree).rows
    assert [(row["caption"], row.get("split"), row.get("fault")) for row in rows] == [
        ("", None, "in no folder of a class"),
        ("cat", "test", None),
        ("cat", "train", None),
        ("cat", "train", None),
    ]
    (tree / "test" / "cat" / "2.webp.txt").write_text("a cat on a mat")  # as some tools name the captions
    assert "a cat on a mat" in captions_of(read_corpus(tree).rows)


def test_texts_beside_class_folders_that_no_picture_has_are_named(folder, tmp_path):
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    shutil.copy(folder / "0.webp", tmp_path / "tree" / "cat" / "0.webp")
    (tmp_path / "tree" / "cat" / "other.txt").write_text("a cat")
    assert any("not read, as they are named after no picture: 1 .txt" in note for note in read_corpus(tmp_path / "tree").notes)


# ------------------------------------------------------------------------------------- what could be taken in two ways


def test_a_table_that_is_passed_over_is_named_and_has_no_captions_of_other_pictures(folder, tmp_path):
    write_csv(folder / "metadata.csv", [picture(k) for k in range(3)])
    write_csv(folder / "same.csv", [picture(k) for k in range(2)])
    write_csv(folder / "sizes.csv", [{"image": "9.webp", "width": 3}])
    write_csv(folder / "gone.csv", [picture(99)])
    (folder / "dataset_infos.json").write_text("{}")
    corpus = read_corpus(folder)
    assert len(corpus.rows) == 3 and corpus.notes[-1] == "not read: gone.csv, same.csv, sizes.csv"
    write_csv(folder / "metadata_test.csv", [picture(3)])
    with pytest.raises(BadInput, match=r"may mean metadata.csv or metadata_test.csv, .* of other pictures \(3.webp\)"):
        read_corpus(folder)
    (folder / "metadata_test.csv").unlink()
    (folder / "test").mkdir()
    (folder / "4.webp").rename(folder / "test" / "4.webp")
    write_csv(folder / "test" / "metadata.csv", [picture(4)])
    with pytest.raises(BadInput, match="may mean metadata.csv or test/metadata.csv"):
        read_corpus(folder)


def test_a_table_beside_a_picture_or_an_archive_of_its_name_is_a_table(folder, tmp_path):
    (folder / "images").mkdir()
    for k in range(3):
        (folder / f"{k}.webp").rename(folder / "images" / f"{k}.webp")
    write_csv(folder / "39.csv", [picture(k) for k in range(3)])
    assert captions_of(read_corpus(folder).rows) == [f"caption {k}" for k in range(3)]
    write_csv(folder / "39.csv", [{"x": 1, "y": 2}])  # about the picture
    (folder / "39.txt").write_text("caption 39")
    assert "caption 39" in captions_of(read_corpus(folder).rows)
    write_csv(folder / "train.csv", [picture(0)])
    (folder / "train.tar").touch()
    with pytest.raises(BadInput, match=r"several tables \(train.csv, train.tar\)"):
        read_corpus(folder)


def put(folder, root, places):
    """Moves pictures 0, 1, ... of the folder to these places in another."""
    for k, place in enumerate(places):
        (root / place).mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.webp").rename(root / place / f"{k}.webp")
    return root


@pytest.mark.parametrize(
    "places, says",
    [
        (("images", "images"), "the folder images names no class"),
        (("annotations/masks", "JPEGImages"), "the folder JPEGImages beside annotations names no class"),
        (("train/a/images", "train/b/images", "val/images"), "the folder images beside a, b names no class"),
        (("train/cat", "train/dog", "extra/cat"), "the folder train beside extra is named after a split"),
        (("train/cat", "train/dog", "unlabeled"), "the folder train beside unlabeled is named after a split"),
    ],
)
def test_folders_that_name_no_class_are_no_classes(folder, tmp_path, places, says):
    with pytest.raises(BadInput, match=says):
        read_corpus(put(folder, tmp_path / "tree", places))


@pytest.mark.parametrize("train, test", [("seg_train", "seg_test"), ("training_set", "test_set")])
def test_folders_of_splits_in_folders_of_their_names(folder, tmp_path, train, test):
    tree = put(folder, tmp_path / "tree", [f"{train}/{train}/cat", f"{train}/{train}/dog", f"{test}/{test}/cat"])
    rows = read_corpus(tree).rows
    assert {(row["image"][-6:], row["label"], known_split(row["split"])) for row in rows} == {
        ("0.webp", "cat", "train"),
        ("1.webp", "dog", "train"),
        ("2.webp", "cat", "test"),
    }


def test_classes_that_hold_the_word_of_a_split_are_classes(folder, tmp_path):
    rows = read_corpus(put(folder, tmp_path / "tree", ["train_station", "crash_test", "train"])).rows
    assert {row["label"] for row in rows} == {"train_station", "crash_test", "train"} and "split" not in rows[0]


def test_a_json_beside_each_picture_holds_its_caption(folder, tmp_path):
    """As img2dataset writes them, where its texts are not there."""
    tree = put(folder, tmp_path / "tree", ["00000", "00000", "00001", "00001"])
    for path, text in zip(sorted(tree.rglob("*.webp")), ('{"caption": "one", "url": "u"}', '{"caption": "two"}', "[]")):
        path.with_suffix(".json").write_text(text)
    rows = read_corpus(tree).rows
    assert [(row["image"], row["caption"]) for row in rows[:2]] == [("00000/0.webp", "one"), ("00000/1.webp", "two")]
    assert [row["fault"] for row in rows[2:]] == ["its .json is no object", "empty caption"]
    for path in tree.rglob("*.json"):
        path.write_text('{"shapes": []}')  # no captions, so that the folders are classes
    assert {row["caption"] for row in read_corpus(tree).rows} == {"00000", "00001"}


def test_boxes_are_no_captions(folder, tmp_path):
    tree = put(folder, tmp_path / "tree", ["a", "a"])
    for k in range(2):
        (tree / "a" / f"{k}.txt").write_text(f"{k} 0.5 0.5 0.25 1e-3\n1 0.1 .1 0.1 0.1\n")
    with pytest.raises(BadInput, match=r"nothing but numbers, as those of boxes are \(0 0.5 0.5 0.25 1e-3\)"):
        read_corpus(tree)
    rows = [picture(0) | {"caption": "[1, 2, 3, 4]"}, picture(1) | {"caption": "1, 2, 3, 4"}]
    assert len(read_corpus(write_csv(folder / "t.csv", [rows[0], rows[1] | {"caption": "9 9 of 12"}])).rows) == 2
    with pytest.raises(BadInput, match="nothing but numbers"):
        read_corpus(write_csv(folder / "t.csv", rows[1:]))
    assert len(read_corpus(write_csv(folder / "t.csv", [picture(0) | {"caption": "7"}])).rows) == 1


def test_a_dict_of_pictures_and_one_of_splits(folder):
    """The names in a JSON object may be the pictures, or the splits of its lists."""
    for value in ("a dog", ["a dog"], {"caption": "a dog", "tags": "x"}):
        (folder / "meta.json").write_text(json.dumps({"0.webp": value, "1.webp": value}))
        rows = read_corpus(folder / "meta.json").rows
        assert [(row["image"], row["caption"]) for row in rows] == [("0.webp", "a dog"), ("1.webp", "a dog")]
    (folder / "meta.json").write_text(json.dumps({"train": [picture(0), picture(1)], "val": [picture(2)]}))
    rows = read_corpus(folder / "meta.json").rows
    assert captions_of(rows) == ["caption 0", "caption 1", "caption 2"]
    assert [row["split"] for row in rows] == ["train", "train", "val"]


def test_messages_say_what_is_in_a_table_and_what_to_do(folder, refused):
    (folder / "nohead.tsv").write_text("a dog\thttp://x.com/1.jpg?size=3\na cat\thttp://x.com/2.jpg\n")
    refused("embed.py", *TINY, "--data", folder / "nohead.tsv", says=["first line", "http://x.com/1.jpg", "image,caption"])
    (folder / "utf16.csv").write_bytes("image,caption\n0.webp,a dog\n".encode("utf-16-le"))
    refused("embed.py", *TINY, "--data", folder / "utf16.csv", says=["utf16.csv", "save it as UTF-8"])
    (folder / "set").mkdir()
    (folder / "set" / "train.json").write_text(json.dumps([picture(0)]))
    (folder / "set" / "test.json").write_text(json.dumps([{"file_name": "1.webp", "id": 1}]))
    says = ["test.json: no caption column among file_name, id", "take it out of the folder"]
    refused("embed.py", *TINY, "--data", folder / "set", says=says)


def test_a_column_of_addresses_is_not_read_where_another_holds_paths(folder):
    rows = [{"image": f"https://x/{k}.jpg", "file_name": f"{k}.webp", "caption": "a dog"} for k in range(2)]
    assert [row["image"] for row in read_corpus(write_csv(folder / "t.csv", rows)).rows] == ["0.webp", "1.webp"]


def test_a_picture_named_without_its_ending(folder):
    rows = [{"ID": str(k), "caption": f"caption {k}"} for k in range(3)]
    (folder / "2.jpg").write_bytes(b"")  # it may be this or 2.webp
    corpus = read_corpus(write_csv(folder / "t.csv", rows), image_column="ID")
    found = [read_picture(corpus.root, row["image"])[0] for row in corpus.rows]
    assert [(picture.image, picture.reason) for picture in found] == [
        ("0.webp", None),
        ("1.webp", None),
        (None, "missing file"),
    ]


def test_pictures_in_folders_of_splits_within_images(folder, tmp_path):
    """COCO's, and tables of splits that number their pictures alike."""
    tree = put(folder, tmp_path / "tree", ["images/train", "images/val"])
    (tree / "images" / "val" / "1.webp").rename(tree / "images" / "val" / "0.webp")
    for split in ("train", "val"):
        write_csv(tree / f"{split}.csv", [picture(0) | {"caption": split}])
    rows = read_corpus(tree).rows
    assert {(row["image"], row["caption"]) for row in rows} == {("images/train/0.webp", "train"), ("images/val/0.webp", "val")}


def test_where_missing_pictures_may_be(folder, refused):
    (folder / "set").mkdir()
    write_csv(folder / "set" / "train.csv", [picture(0)])
    says = "missing file; write the folder that it is in into its path"
    refused("embed.py", *TINY, "--data", folder / "set", says=says)
    (folder / "set" / "images.zip").touch()
    refused("embed.py", *TINY, "--data", folder / "set", says="missing file; the pictures may be in images.zip: unpack it")
