"""Sources whose pictures lie in other files, and the caption files of published sets, through embed.py's command line."""

import gzip
import json
import multiprocessing
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, write_csv
from PIL import Image

import vlm
from hyma import inflating, remote
from hyma.datasets import read_corpus
from hyma.files import read_jsonl
from hyma.packed import DamagedFile, ParquetCells, picture_bytes
from hyma.pictures import read_picture
from vlm import BadInput


@pytest.fixture
def folder(pictures):
    """A folder of 40 pictures 0.webp to 39.webp and no captions."""
    return pictures[0]


@pytest.fixture
def embed(run, tmp_path):
    """embed(data, *flags): the Result, the rows, {key: reason} and the vectors of a run into the folder `out`."""

    def embed(data, *flags, out="e"):
        result = run("embed.py", *TINY, "--data", data, "--out", out, *flags)
        assert result.code == 0, result.err
        rows = read_jsonl(tmp_path / out / "rows.jsonl")
        quarantine = {row["key"]: row["reason"] for row in read_jsonl(tmp_path / out / "quarantine.jsonl")}
        return result, rows, quarantine, vlm.load_tensors(tmp_path / out / "tiny.pt")

    return embed


def write_tar(path, members):
    """A tar of {name: bytes or text}, compressed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    method = path.suffix.removeprefix(".").replace("tgz", "gz").replace("tar", "").replace("zst", "")
    with tarfile.open(path, f"w:{method}") as archive:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    if path.suffix == ".zst":
        path.write_bytes(inflating.zstd.compress(path.read_bytes()))
    return path


def samples(folder, numbers):
    """Members as img2dataset writes them: picture, caption, and a JSON in which the caption is again."""
    members = {}
    for k in numbers:
        members[f"{k:09}.webp"] = (folder / f"{k}.webp").read_bytes()
        members[f"{k:09}.txt"] = f"caption {k}"
        members[f"{k:09}.json"] = json.dumps({"caption": f"caption {k}", "key": f"{k:09}", "url": "u", "exif": "{}"})
    return members


def captions_of(rows):
    return [row["caption"] for row in rows]


# ------------------------------------------------------------------------------------------------------- tar archives


def test_pictures_in_tars_give_the_vectors_of_their_files(folder, embed, tmp_path):
    """Shards as img2dataset writes them, with the tables and statistics that lie beside them."""
    write_csv(folder / "t.csv", [{"image": f"{k}.webp", "caption": f"caption {k}"} for k in range(6)])
    shards = tmp_path / "shards"
    for number in range(2):
        write_tar(shards / f"0000{number}.tar", samples(folder, range(3 * number, 3 * number + 3)))
        (shards / f"0000{number}_stats.json").write_text('{"successes": 3}')
        (shards / f"0000{number}.parquet").write_bytes(b"about the archive, and not read")
    result, rows, quarantine, vectors = embed(shards)
    assert "00000.tar, 00001.tar: image 'image', caption 'caption'; samples of .json .txt .webp" in result.out
    assert captions_of(rows) == [f"caption {k}" for k in range(6)] and not quarantine
    assert all(row["image"].startswith(f"0000{k // 3}.tar/00000000{k}.webp@") for k, row in enumerate(rows))
    assert vectors.equal(embed(folder / "t.csv", out="files")[3])
    assert not list((tmp_path / "e").rglob("*.webp"))  # nothing is extracted


def test_compressed_tars_are_inflated_as_they_are_read(folder, embed, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("hyma.decoding.PICTURES_PER_WORKER", 2)
    endings = ["tar.gz", "tgz", "tar.bz2", "tar.xz", *(["tar.zst"] if inflating.zstd else [])]
    for number, ending in enumerate(endings):
        write_tar(tmp_path / "in" / ending / f"00000.{ending}", samples(folder, range(6 * number, 6 * number + 6)))
    write_tar(tmp_path / "in" / "plain" / "00000.tar", samples(folder, range(30)))
    expected = embed(tmp_path / "in" / "plain")[3]
    for number, ending in enumerate(endings):
        _, rows, quarantine, vectors = embed(tmp_path / "in" / ending, "--workers", "2", out=ending)
        assert captions_of(rows) == [f"caption {k}" for k in range(6 * number, 6 * number + 6)] and not quarantine
        assert vectors.equal(expected[6 * number : 6 * number + 6])
    address = f"in/tgz/{rows_of_tar(tmp_path / 'in' / 'tgz' / '00000.tgz')[2]}"
    assert picture_bytes(tmp_path / address) == (folder / "8.webp").read_bytes()  # behind where the last one was

    whole = (tmp_path / "in" / "tar.gz" / "00000.tar.gz").read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    result, rows, _, _ = embed(cut, out="cut")
    assert "CUT OFF after" in result.out and 0 < len(rows) < 6
    cut.write_bytes(gzip.compress(b"no tar" * 200))
    refused("embed.py", *TINY, "--data", cut, says="is no tar archive")
    cut.write_bytes(gzip.compress(bytes(80 * 2**20)))
    refused("embed.py", *TINY, "--data", cut, says="inflates to more than 100 times its size")


def test_zstandards_archives_of_several_frames_and_what_reads_them(folder, tmp_path, monkeypatch):
    """Programs that compress in parallel write a frame after the other: all are read. A cut one costs its end."""
    path = tmp_path / "t.tar.zst"
    path.write_bytes(b"no archive")
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="files need a package: pip install backports.zstd"):
        patch.setitem(inflating.METHODS, ".tar.zst", None)  # as where the package is missing
        read_corpus(path)
    zstd = inflating.zstd or pytest.importorskip("backports.zstd")
    with pytest.raises(BadInput, match="is no tar archive"):
        read_corpus(path)
    plain = write_tar(tmp_path / "t.tar", samples(folder, range(6))).read_bytes()
    middle = len(plain) // 2
    path.write_bytes(zstd.compress(plain[:middle]) + zstd.compress(plain[middle:]))
    rows = read_corpus(path).rows
    assert captions_of(rows) == [f"caption {k}" for k in range(6)]
    assert picture_bytes(tmp_path / rows[5]["image"]) == (folder / "5.webp").read_bytes()
    assert picture_bytes(tmp_path / rows[1]["image"]) == (folder / "1.webp").read_bytes()  # back again
    path.write_bytes(path.read_bytes()[:-3000])
    corpus = read_corpus(path)
    assert "CUT OFF after" in corpus.notes[0] and 0 < len(corpus.rows) < 6


def rows_of_tar(path):
    """The addresses of the pictures of an archive."""
    return [row["image"] for row in read_corpus(path).rows]


def test_a_pattern_names_several_files(folder, refused, tmp_path):
    for number in range(8, 12):
        write_tar(tmp_path / "s" / f"{number:03}.tar", samples(folder, [number]))
    corpus = read_corpus(tmp_path / "s" / "{009..011}.tar")
    assert captions_of(corpus.rows) == ["caption 9", "caption 10", "caption 11"] and corpus.dataset == "s"
    assert captions_of(read_corpus(tmp_path / "s" / "{010,008}.tar").rows) == ["caption 10", "caption 8"]
    assert captions_of(read_corpus(tmp_path / "s" / "01*.tar").rows) == ["caption 10", "caption 11"]
    refused("embed.py", *TINY, "--data", tmp_path / "s" / "02*.tar", says="02*.tar: matches no file")
    refused("embed.py", *TINY, "--data", tmp_path / "s" / "{009..012}.tar", says=["012.tar: no such file", "names 4"])


def test_samples_with_a_class_and_no_caption_are_captioned_by_its_name(tmp_path, refused):
    members = {"a.jpg": b"p", "a.cls": "1", "b.jpg": b"p", "b.cls": "0\n"}
    path = write_tar(tmp_path / "0.tar", members)
    refused("embed.py", *TINY, "--data", path, says=["classes 0, 1 are", "classes.txt"])
    (tmp_path / "classes.txt").write_text("tabby_cat\ndog\n")
    corpus = read_corpus(path)
    assert [(row["caption"], row["label"]) for row in corpus.rows] == [("dog", "dog"), ("tabby cat", "tabby_cat")]
    assert "the names of the classes are the captions" in corpus.notes[0]
    words = read_corpus(write_tar(tmp_path / "1.tar", {"a.jpg": b"p", "a.cls": "red_fox"})).rows
    assert [(row["caption"], row["label"]) for row in words] == [("red fox", "red_fox")]


def test_samples_of_a_tar(folder, tmp_path):
    """Captions a line each, splits by the archive's name, samples without a part, members that are no files."""
    members = {
        "a/x.y.jpg": b"picture",  # the ending starts at the first dot
        "a/x.txt": "of another sample",
        "./b.JPG": b"picture",
        "b.txt": "one\n\ntwo\n",
        "c.txt": "no picture",
        "d.png": b"picture",
        "e.webp": b"picture",
        "e.json": '{"caption": "a\\nb", "label": "cat", "image": "/etc/passwd"}',
        "e.txt": "a\nb",
        "f.webp": b"picture",
        "f.json": "{",
        "._g.webp": b"\0\5\x16\7",
        "g.cls": "7",
    }
    write_tar(tmp_path / "in" / "cc3m-train-0000.tar", members)
    write_tar(tmp_path / "in" / "cc3m-validation-0000.tar", {"k.jpg": b"p", "k.txt": "k"})
    rows = read_corpus(tmp_path / "in").rows
    found = [(row["image"].partition("@")[0].partition("/")[2], row["caption"], row.get("fault")) for row in rows]
    assert found == [
        ("", None, "no image path"),  # x.y is no picture's ending
        ("b.JPG", "one", None),
        ("b.JPG", "two", None),
        ("", None, "no image path"),
        ("d.png", None, "empty caption"),
        ("e.webp", "a\nb", None),
        ("", None, found[6][2]),
        ("", None, "no image path"),
        ("k.jpg", "k", None),
    ]
    assert found[6][2].startswith("broken sample: /f: ") and rows[5]["label"] == "cat"
    assert {row["split"] for row in rows[:8]} == {"train"} and rows[8]["split"] == "val"


def test_a_sample_whose_files_come_twice_is_refused(tmp_path):
    """As in archives that were joined or appended to: nobody knows which of two pictures or captions is meant."""
    first = write_tar(tmp_path / "a.tar", {"0.jpg": b"p", "0.txt": "one", "1.jpg": b"q", "1.txt": "two"})
    with tarfile.open(first, "a") as archive:
        archive.addfile(tarfile.TarInfo("./1.txt"), BytesIO())
    rows = read_corpus(first).rows
    assert [(row["caption"], row.get("fault")) for row in rows] == [("one", None), (None, "broken sample: /1: the archive holds ./1.txt twice")]


def test_a_sample_of_several_pictures_is_not_guessed(tmp_path, refused):
    path = write_tar(tmp_path / "t.tar", {"a.jpg": b"p", "a.png": b"q", "a.txt": "caption"})
    refused("embed.py", *TINY, "--data", path, says=["several pictures (.jpg, .png)", "--image-column jpg"])
    (row,) = read_corpus(path, image_column="png").rows
    assert picture_bytes(tmp_path / row["image"]) == b"q"


def test_endings_of_several_parts_are_not_guessed(tmp_path, refused):
    members = {"a.image.jpg": b"p", "a.caption.txt": "one", "b.image.jpg": b"q", "b.caption.txt": "two\nthree"}
    path = write_tar(tmp_path / "t.tar", members)
    says = ["files that end with .image.jpg", "--image-column image.jpg", "--caption-column ENDING"]
    refused("embed.py", *TINY, "--data", path, says=says)
    rows = read_corpus(path, "image.jpg", "caption.txt").rows
    assert [(picture_bytes(tmp_path / row["image"]), row["caption"]) for row in rows] == [(b"p", "one"), (b"q", "two"), (b"q", "three")]
    path = write_tar(tmp_path / "l.tar", {"a.jpg": b"p", "a.json": '["one", "two"]'})
    refused("embed.py", *TINY, "--data", path, says=["no row can be read", "broken sample: /a: its .json is no object"])


def test_names_with_dots_are_not_taken_for_one_sample(tmp_path, refused):
    members = {"a.b.0.png": b"p", "a.b.0.txt": "one", "a.b.1.png": b"q", "a.b.1.txt": "two", "c.png": b"r", "c.txt": "three"}
    path = write_tar(tmp_path / "t.tar", members)
    refused("embed.py", *TINY, "--data", path, says=["a.b.0.png and a.b.1.png would be one sample", "first dot"])


@pytest.mark.parametrize("cut", ["between members", "in a header", "in a picture", "in a caption"])
def test_a_cut_archive_costs_its_end_and_says_so(folder, embed, tmp_path, cut):
    path = write_tar(tmp_path / "s" / "00000.tar", samples(folder, range(8)))
    with tarfile.open(path) as archive:
        picture, caption = archive.getmember("000000005.webp"), archive.getmember("000000005.txt")
    place = {
        "between members": picture.offset,
        "in a header": picture.offset + 100,
        "in a picture": picture.offset_data + picture.size // 2,
        "in a caption": caption.offset_data + 2,
    }[cut]
    path.write_bytes(path.read_bytes()[:place])
    (tmp_path / "s" / "00000_stats.json").write_text('{"successes": 8}')
    result, rows, quarantine, _ = embed(path, "--allow-bad", "0.2")
    assert captions_of(rows) == [f"caption {k}" for k in range(5)]
    found = 6 if cut == "in a caption" else 5
    assert f"CUT OFF after {found} of 8 samples: the rest is not there" in result.out
    assert list(quarantine.values()) == ["empty caption"] * (found - 5)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_joined_archives_are_read_to_the_end(folder, tmp_path, ending):
    """`cat a.tar b.tar > all.tar`: the first ends with empty blocks, behind which the second is."""
    parts = [write_tar(tmp_path / f"{part}.{ending}", samples(folder, numbers)) for part, numbers in (("a", range(3)), ("b", (3, 4)))]
    joined = tmp_path / f"all.{ending}"
    whole = b"".join(part.read_bytes() for part in parts)
    joined.write_bytes(whole)
    corpus = read_corpus(joined)
    assert captions_of(corpus.rows) == [f"caption {k}" for k in range(5)] and "CUT OFF" not in corpus.notes[0]
    assert [picture_bytes(tmp_path / row["image"]) for row in corpus.rows] == [(folder / f"{k}.webp").read_bytes() for k in range(5)]
    joined.write_bytes(whole[: parts[0].stat().st_size + parts[1].stat().st_size // 3])
    corpus = read_corpus(joined)
    assert captions_of(corpus.rows)[:3] == ["caption 0", "caption 1", "caption 2"] and "CUT OFF after" in corpus.notes[0]


def test_a_field_that_is_asked_for_counts_before_the_text(tmp_path):
    """Of a corpus whose captions were written anew: the first ones are in .txt, the new in the .json's field of the same name."""
    members = {"a.jpg": b"p", "a.txt": "of the web", "a.json": '{"caption": "written anew"}', "b.jpg": b"q", "b.txt": "alone"}
    path = write_tar(tmp_path / "t.tar", members)
    assert captions_of(read_corpus(path, caption_column="caption").rows) == ["written anew", "alone"]
    assert captions_of(read_corpus(path).rows) == ["of the web", "alone"]


@pytest.mark.parametrize("name", ["captions.parquet", "cc3m.tar"])
def test_a_corpus_in_a_folder_named_as_a_file(folder, tmp_path, name):
    """As Spark and Dask write them."""
    path = write_tar(tmp_path / name / "00000.tar", samples(folder, range(3)))
    rows = read_corpus(path.parent).rows
    assert [picture_bytes(path.parent / row["image"]) for row in rows] == [(folder / f"{k}.webp").read_bytes() for k in range(3)]


def test_archives_that_end_and_begin_with_one_name_are_not_mixed(folder, tmp_path):
    write_tar(tmp_path / "s" / "0.tar", {"a.webp": b"p"})
    write_tar(tmp_path / "s" / "1.tar", {"a.txt": "another"})
    rows = read_corpus(tmp_path / "s").rows
    assert [(bool(row["image"]), row.get("fault")) for row in rows] == [(True, "empty caption"), (False, "no image path")]


def test_an_address_reaches_nothing_but_its_file(tmp_path):
    """Names of members are shown and not followed; what is not in the archive is refused."""
    (tmp_path / "secret.txt").write_text("secret")
    path = write_tar(tmp_path / "t.tar", {"../../secret.webp": b"p" * 600, "x.webp": b"q", "../../secret.txt": "caption"})
    row = read_corpus(path).rows[0]
    assert row["image"].startswith("t.tar/../../secret.webp@") and picture_bytes(tmp_path / row["image"]) == b"p" * 600
    for image in ("t.tar/x@0+99999999", "t.tar/x@7", "t.tar/x@99999999999999999999+1"):
        assert "unreadable image: t.tar" in read_picture(tmp_path, image)[0].reason
    assert read_picture(tmp_path, "none.tar/x@0+1")[0].reason == "missing file"
    assert "a file of" in read_picture(tmp_path, f"t.tar/x@0+{2**40}")[0].reason
    (tmp_path / "d.tar").mkdir()
    shutil.copy(path, tmp_path / "d.tar" / "x@0+1")  # a folder of that name is a folder
    assert picture_bytes(tmp_path / "d.tar" / "x@0+1") == path.read_bytes()


# -------------------------------------------------------------------------------------------------- parquet and arrow


def save_arrow(path, table):
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def test_a_folder_that_the_datasets_library_saved(folder, embed, refused, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    cells = [{"bytes": (folder / f"{k}.webp").read_bytes(), "path": None} for k in range(6)] + [None]
    labels = [0, 1, 0, 1, 0, 1, 0]
    table = arrow.table({"image": cells, "caption": [f"caption {k}" for k in range(7)], "label": labels})
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    saved = tmp_path / "saved"
    for split, parts in {"train": [(0, 2), (2, 2)], "test": [(4, 3)]}.items():
        names = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
        for name, (start, count) in zip(names, parts):
            save_arrow(saved / split / name, table.slice(start, count))
        save_arrow(saved / split / "cache-123.arrow", table)
        (saved / split / "dataset_info.json").write_text("{}")
        (saved / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    _, rows, quarantine, _ = embed(saved, "--allow-bad", "0.2")
    assert captions_of(rows) == [f"caption {k}" for k in range(6)] and quarantine == {"row 7": "no image path"}
    assert [row["label"] for row in rows] == ["cat", "dog"] * 3
    assert rows[3]["image"] == "train/data-00001-of-00002.arrow/image@1"
    assert [row["split"] for row in rows[4:]] == ["test", "test"]
    assert [picture_bytes(saved / row["image"]) for row in rows] == [cell["bytes"] for cell in cells[:6]]
    assert len(read_corpus(saved / "test").rows) == 3  # one split by itself
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "private"]}')
    (saved / "test").rename(saved / "private")
    assert [row["split"] for row in read_corpus(saved).rows] == ["train"] * 4 + ["private"] * 3  # not trained on
    (saved / "private").rename(saved / "test")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (saved / "test" / "state.json").write_text('{"_data_files": [{"filename": "../train/x.arrow"}]}')
    refused("embed.py", *TINY, "--data", saved, says=["state.json", "no file beside it"])


def test_cells_are_read_in_any_order(tmp_path):
    """Also of row groups that are larger than what is kept in memory, with and without statistics."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    cells = [{"bytes": b"\xff%d" % k, "path": f"{k}.jpg"} for k in range(1000)]
    cells[7] = None
    cells[8] = {"bytes": None, "path": "8.jpg"}
    table = arrow.table({"image": cells, "text": [str(k) for k in range(1000)]})
    for statistics in (True, False):
        parquet.write_table(table, tmp_path / "t.parquet", row_group_size=600, write_statistics=statistics)
        rows = read_corpus(tmp_path / "t.parquet").rows
        assert rows[7]["fault"] == "no image path" and rows[8]["image"] == "8.jpg"
        for k in (*range(9, 1000), 999, 9, 650, 10, 599, 600):
            assert picture_bytes(tmp_path / rows[k]["image"]) == b"\xff%d" % k
    assert "has no row 1000" in read_picture(tmp_path, "t.parquet/image@1000")[0].reason
    assert "unreadable image: t.parquet" in read_picture(tmp_path, "t.parquet/nothing@1")[0].reason


# ------------------------------------------------------------------------------------------------------ behind a URL


@pytest.fixture
def bucket():
    """A bucket of fsspec's own file system in memory, and nothing that earlier tests have opened."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    remote.ROOTS.clear()
    yield system
    system.store.clear()
    remote.ROOTS.clear()


def test_what_lies_behind_a_url_gives_the_vectors_of_its_files(folder, embed, refused, bucket, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"image": f"{k}.webp", "caption": f"caption {k}"} for k in range(6)]
    table = write_csv(folder / "t.csv", rows)
    for row in rows:
        bucket.pipe(f"/b/files/{row['image']}", (folder / row["image"]).read_bytes())
    bucket.pipe("/b/files/t.csv", table.read_bytes())
    for number in range(2):
        part = samples(folder, range(3 * number, 3 * number + 3))
        bucket.pipe(f"/b/tars/0000{number}.tar", write_tar(tmp_path / "t.tar", part).read_bytes())
    cells = [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in rows]
    parquet.write_table(arrow.table({"image": cells, "text": [row["caption"] for row in rows]}), tmp_path / "t.parquet")
    bucket.pipe("/b/parquet/t.parquet", (tmp_path / "t.parquet").read_bytes())
    expected = embed(table, out="local")[3]
    for source in ("files/t.csv", "tars", "parquet"):
        _, found, quarantine, vectors = embed(f"memory://b/{source}", out=source.partition("/")[0])
        assert captions_of(found) == captions_of(rows) and not quarantine and vectors.equal(expected)
    for data in ("memory://b/tars/*.tar", "memory://b/tars/{00000..00001}.tar", f"file://{table}"):
        corpus = read_corpus(Path(data))
        assert captions_of(corpus.rows) == captions_of(rows)
        assert picture_bytes(corpus.root / corpus.rows[4]["image"]) == (folder / "4.webp").read_bytes()
    refused("embed.py", *TINY, "--data", "memory://b/tars/*.csv", says="*.csv: matches no file")
    refused("embed.py", *TINY, "--data", "memory://b/none", says="memory://b/none: no such file")
    refused("embed.py", *TINY, "--data", "nobody://b/none", says="nobody://b/none: cannot be reached")


def test_a_server_that_sends_no_parts_of_files_costs_no_row(folder, refused, bucket, tmp_path, monkeypatch):
    bucket.pipe("/b/t.tar", write_tar(tmp_path / "t.tar", samples(folder, range(6))).read_bytes())
    whole = bucket.cat_file("/b/t.tar")
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "cat_file", lambda *_, **__: whole)
        refused("embed.py", *TINY, "--data", "memory://b/t.tar", says="sends whole files and no parts of them")
    file = bucket.open("/b/t.tar")

    def read_no_caption(file, size=-1):
        if size == len("caption 0"):
            raise ValueError("only reading from the beginning is supported")
        return BytesIO.read(file, size)

    monkeypatch.setattr(type(file), "read", read_no_caption)
    refused("embed.py", *TINY, "--data", "memory://b/t.tar", says="memory://b/t.tar: only reading from the beginning")


def test_only_what_the_user_names_is_fetched(folder, embed, bucket, tmp_path):
    """A table of the disk may name a URL in any spelling: it is a file that is missing."""
    bucket.pipe("/b/secret.webp", (folder / "0.webp").read_bytes())
    bucket.pipe("/b/in/t.csv", b"image,caption\n../secret.webp,x\n/memory:/b/secret.webp,x\n")
    for name in ("memory://b/secret.webp", "memory:/b/secret.webp", "x/memory:/b/secret.webp"):
        assert read_picture(tmp_path, name)[0].reason == "missing file"
    corpus = read_corpus(Path("memory://b/in/t.csv"))
    assert [read_picture(corpus.root, row["image"])[0].reason for row in corpus.rows] == ["missing file"] * 2


# ---------------------------------------------------------------------------------------------------- published files


def place(folder, target, names, first=0):
    """Puts pictures, from <first>.webp on, into a folder under these names."""
    target.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names, start=first):
        shutil.copy(folder / f"{k}.webp", target / name)


def test_cocos_captions_are_data_to_train_on(folder, embed, tmp_path):
    coco = tmp_path / "coco"
    for number, split in enumerate(("train2017", "val2017")):
        names = [f"{number}{k:011}.jpg" for k in range(3)]
        place(folder, coco / split, names, 3 * number)
        images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
        notes = [{"id": 9 - k, "image_id": k % 3, "caption": f"{split} {k}"} for k in range(6)]
        notes.append({"id": 10, "image_id": 77, "caption": "of no picture"})
        (coco / "annotations").mkdir(exist_ok=True)
        table = coco / "annotations" / f"captions_{split}.json"
        table.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
        (coco / "annotations" / f"instances_{split}.json").write_text('{"images": [], "annotations": []}')
    result, rows, _, _ = embed(coco)
    assert [(row["caption"], row["split"]) for row in rows[:2]] == [("train2017 3", "train"), ("train2017 0", "train")]
    assert rows[0]["image"] == "train2017/000000000000.jpg" and len(rows) == 12
    assert "1 captions are of pictures that it does not list; pictures in train2017" in result.out
    corpus = read_corpus(coco / "annotations" / "captions_val2017.json")
    assert corpus.root.resolve() == (coco / "val2017").resolve() and len(corpus.rows) == 6


def test_karpathys_json_is_data_to_train_on(folder, embed, tmp_path):
    coco = tmp_path / "coco"
    place(folder, coco / "val2014", [f"{k}.jpg" for k in range(4)])
    images = []
    for k, split in enumerate(("train", "restval", "val", "test")):
        sentences = [{"raw": f"a {k}"}, {"raw": f"b {k}"}]
        images.append({"filepath": "val2014", "filename": f"{k}.jpg", "split": split, "sentences": sentences})
    (coco / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    _, rows, _, _ = embed(coco)
    assert captions_of(rows) == ["a 0", "b 0", "a 1", "b 1", "a 2", "b 2", "a 3", "b 3"]
    assert [row["split"] for row in rows[::2]] == ["train", "train", "val", "test"]


def test_flickrs_files_are_data_to_train_on(folder, embed, tmp_path):
    base = tmp_path / "flickr"
    place(folder, base / "Flicker8k_Dataset", [f"{k}.jpg" for k in range(4)])
    place(folder, base / "text", ())
    lines = [f"{k // 2}.jpg#{k % 2}\tA dog , {k} ." for k in range(8)]
    (base / "text" / "Flickr8k.token.txt").write_text("\n".join([*lines, "broken line"]) + "\n")
    (base / "text" / "Flickr8k.lemma.token.txt").write_text("0.jpg#0\tdog\n")
    for name, image in {"train": "0.jpg", "dev": "1.jpg", "test": "2.jpg"}.items():
        (base / "text" / f"Flickr_8k.{name}Images.txt").write_text(f"{image}\n")
    result, rows, quarantine, _ = embed(base, "--allow-bad", "0.2")
    assert captions_of(rows) == [f"A dog , {k} ." for k in range(8)]
    assert [row["split"] for row in rows[::2]] == ["train", "val", "test", "in no list"]
    assert quarantine == {"row 9": "no line of picture.jpg#0, a tab and a caption"}
    assert "Flickr's captions; splits of the lists beside it; pictures in Flicker8k_Dataset" in result.out

    (base / "results.csv").write_text("image_name| comment_number| comment\n0.jpg| 0| A dog , one .\n1.jpg| 0| Two\n")
    assert captions_of(embed(base / "results.csv", out="results")[1]) == ["A dog , one .", "Two"]
    (base / "results.csv").unlink()
    (base / "captions.txt").write_text('image,caption\n0.jpg,"A dog , one ."\n1.jpg,Two\n')
    assert captions_of(embed(base, out="kaggle")[1]) == ["A dog , one .", "Two"]


def test_pictures_that_may_lie_in_several_folders_are_not_guessed(folder, tmp_path):
    for name in ("a", "b"):
        place(folder, tmp_path / "in" / name, ["0.jpg"])
    write_csv(tmp_path / "in" / "captions.csv", [{"image": "0.jpg", "caption": "x"}])
    with pytest.raises(BadInput, match="its pictures may be those of .*in/a, .*in/b"):
        read_corpus(tmp_path / "in")


# ----------------------------------------------------------------------------- cells: forks, damage, texts that are bytes


def write_cells(path, folder, count, rows_in_group=64):
    """A parquet file of `count` pictures in cells, and the bytes of each: PNGs of noise, of about 3 kB, in pages of 32 kB."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = []
    for k in range(count):
        png = BytesIO()
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        Image.fromarray(pixels.numpy()).save(png, "PNG")
        data.append(png.getvalue())
    table = arrow.table({"image": [{"bytes": png, "path": None} for png in data], "text": [f"caption {k}" for k in range(count)]})
    parquet.write_table(table, path, row_group_size=rows_in_group, data_page_size=2**15, compression="NONE", use_dictionary=False)
    return data


def read_after_fork(addresses):
    return [picture_bytes(address) for address in addresses]


def test_cells_that_were_read_before_a_fork_are_read_right_after_it(folder, tmp_path):
    """Two processes that shared an open file would read on from one place in it."""
    path = tmp_path / "t.parquet"
    data = write_cells(path, folder, 400)
    addresses = [f"{path}/image@{k}" for k in range(400)]
    assert picture_bytes(addresses[0]) == data[0]
    with multiprocessing.get_context("fork").Pool(4) as pool:
        parts = pool.map(read_after_fork, [addresses[start : start + 10] for start in range(0, 400, 10)], chunksize=1)
    assert [cell for part in parts for cell in part] == data


def test_a_damaged_page_costs_its_own_rows(folder, tmp_path):
    """And those behind it in its group, as nothing says where they begin; never the whole pass."""
    path = tmp_path / "t.parquet"
    data = write_cells(path, folder, 192)
    whole = path.read_bytes()
    place = whole.index(data[90])
    path.write_bytes(whole[: place - 40_000] + bytes(90_000) + whole[place + 50_000 :])
    found = []
    for k in [*range(192), 0, 191]:
        try:
            if picture_bytes(f"{path}/image@{k}") in data:  # else it is no picture any more
                found.append(k)
        except DamagedFile as error:
            assert "t.parquet: " in str(error)
    assert set(range(60)) <= set(found) and found[-1] == 191 and 90 not in found


def test_a_machine_s_fault_damages_no_page(folder, tmp_path, monkeypatch):
    """What the network or the memory refuses now can be read later: no row is lost for it."""
    path = tmp_path / "t.parquet"
    data = write_cells(path, folder, 40)
    cells = ParquetCells(path, "image")
    with monkeypatch.context() as patch:
        patch.setattr(cells, "file", SimpleNamespace(iter_batches=lambda *_, **__: broken_batches()))
        with pytest.raises(OSError, match="network down"):
            cells.read(3)
    assert cells.read(3)["bytes"] == data[3]


def broken_batches():
    raise OSError(5, "network down")
    yield


def test_bytes_in_a_column_of_captions_are_a_text(folder, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = arrow.table({"image": ["0.webp", "1.webp"], "caption": [b"a caf\xc3\xa9", b"a caf\xe9"]})
    parquet.write_table(table, folder / "t.parquet")
    rows = read_corpus(folder / "t.parquet").rows
    assert captions_of(rows) == ["a café", "a caf\udce9"]  # the second is refused for its letter, and is no address


def test_a_server_that_does_not_answer_is_no_missing_file(folder, refused, bucket, monkeypatch):
    rows = [{"image": f"{k}.webp", "caption": f"caption {k}"} for k in range(6)]
    for row in rows:
        bucket.pipe(f"/b/{row['image']}", (folder / row["image"]).read_bytes())
    bucket.pipe("/b/t.csv", write_csv(folder / "t.csv", rows).read_bytes())
    info = type(bucket).info

    def busy(system, path, **options):
        if path.endswith("3.webp"):
            raise OSError("503 Slow Down")
        return info(system, path, **options)

    monkeypatch.setattr(type(bucket), "info", busy)
    refused("embed.py", *TINY, "--data", "memory://b/t.csv", says="memory://b/3.webp: 503 Slow Down")


def test_flickr_s_lists_of_splits_are_read_behind_a_url(folder, bucket):
    for k in range(3):
        bucket.pipe(f"/b/{k}.webp", (folder / f"{k}.webp").read_bytes())
    bucket.pipe("/b/Flickr8k.token.txt", b"0.webp#0\tone\n1.webp#0\ttwo\n2.webp#0\tthree\n")
    bucket.pipe("/b/Flickr_8k.trainImages.txt", b"0.webp\n")
    bucket.pipe("/b/Flickr_8k.testImages.txt", b"1.webp\n")
    corpus = read_corpus(Path("memory://b/Flickr8k.token.txt"))
    assert [row["split"] for row in corpus.rows] == ["train", "test", "in no list"]


def test_empty_parts_of_a_table_are_passed_over(folder):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = arrow.table({"image": ["0.webp"], "caption": ["one"]})
    (folder / "parts").mkdir()
    for number, part in enumerate((table, table.slice(0, 0))):
        parquet.write_table(part, folder / "parts" / f"part-{number:05}.parquet")
    corpus = read_corpus(folder / "parts")
    assert captions_of(corpus.rows) == ["one"] and "part-00001.parquet: without rows" in corpus.notes


def test_captions_that_coco_s_form_marks_as_rejected_are_left_out(tmp_path):
    """VizWiz's, of pictures that show nothing."""
    notes = [{"image_id": 1, "id": 1, "caption": "a cup", "is_rejected": False}]
    notes += [{"image_id": image, "id": 2, "caption": "Quality issues are too severe", "is_rejected": True} for image in (1, 2)]
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    (tmp_path / "train.json").write_text(json.dumps({"images": images, "annotations": notes}))
    corpus = read_corpus(tmp_path / "train.json")
    assert captions_of(corpus.rows) == ["a cup"]
    assert "without 2 that it marks as rejected and 1 pictures that have no others" in corpus.notes[0]


def test_lines_end_where_files_end_them_and_within_no_caption(folder, tmp_path):
    (tmp_path / "results.token").write_text("1.jpg#0\ta dog\u2028on grass\r\n2.jpg#0\ta\x85b\n", newline="")
    assert captions_of(read_corpus(tmp_path / "results.token").rows) == ["a dog\u2028on grass", "a\x85b"]
    (tmp_path / "mac").mkdir()
    shutil.copy(folder / "1.webp", tmp_path / "mac")
    (tmp_path / "mac" / "1.txt").write_bytes(b"one\rtwo\r")
    assert captions_of(read_corpus(tmp_path / "mac").rows) == ["one", "two"]
