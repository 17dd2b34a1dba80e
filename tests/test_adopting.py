"""Embeddings that are there already, by embed.py's command line: adopted, verified, exported, fetched."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SAMPLE, TINY, read_csv, unit_vectors, write_csv

import vlm
from hyma.embeddings import Embeddings
from hyma.files import read_jsonl
from hyma.row_order import compare_rows
from hyma.vector_files import Vectors


@pytest.fixture
def embedded(run, pictures, tmp_path):
    """(a table of 40 pictures, their vectors [40, 64] by TINY's encoder)."""
    folder, rows = pictures
    table = write_csv(folder / "captions.csv", rows)
    assert run("embed.py", *TINY, "--data", table, "--out", "whole").code == 0
    return table, vlm.load_tensors(tmp_path / "whole" / "tiny.pt")


def save_npy(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array.numpy() if torch.is_tensor(array) else array)
    return path


# ---------------------------------------------------------------------------------------------------------- adopting


def test_published_files_are_sealed_where_they_are(run, tmp_path):
    """Without pictures: numbers, widths and the order of the rows among the encoders are checked, and no more is claimed."""
    (tmp_path / "p").mkdir()
    for name in ("efflite0", "efflite1", "mpnet"):
        shutil.copy(SAMPLE / "embeddings" / f"{name}.pt", tmp_path / "p")
    result = run("embed.py", "--adopt", "p")
    assert result.code == 0, result.err
    assert "efflite1.pt: 2,650 x 1280 float16, unit length, 1 rows repeat an earlier one" in result.out
    assert "\nverified: the rows of efflite1, mpnet are those of efflite0" in result.out
    assert "NOT verified: which picture and caption each row is" in result.out
    manifest = vlm.read_json(tmp_path / "p" / "manifest.json")
    assert len(manifest["adopted"]["verified"]) == 3 and len(manifest["adopted"]["not_verified"]) == 4
    data = Embeddings(tmp_path / "p")
    assert data.rows is None and data.row_count == 2650 and data.load("mpnet").shape == (2650, 768)
    ridge = ("train_grid.py", "--closed-form", "ridge", "--connector", "mlp0", "--pairs", "efflite0:mpnet")
    assert run(*ridge, "--data", "p", "--out", "r").code == 0
    torch.save(data.load("mpnet").flip(0), tmp_path / "p" / "mpnet.pt")
    assert "sha256" in run(*ridge, "--data", "p", "--out", "s").err
    assert "sealed already" in run("embed.py", "--adopt", "p").err


def test_foreign_files_are_proven_by_their_pictures(run, refused, embedded, tmp_path):
    """clip-retrieval's layout, in parts and not of unit length, against a table; then rows out of order."""
    table, vectors = embedded
    for number in range(3):
        save_npy(tmp_path / f"f/img_emb/img_emb_{number}.npy", 3 * vectors.float()[number * 15 : number * 15 + 15])
    adopt = ("embed.py", "--adopt", "f", "--data", table, "--device", "cpu")
    refused(*adopt, says=["img_emb_0.npy", "which model made it", "--encoder img_emb=SPEC"])
    adopt += ("--encoder", "img_emb=random:test_vit")
    refused(*adopt, says=["img_emb_0.npy: is no .pt", "--out FOLDER"])
    result = run(*adopt, "--out", "g")
    assert result.code == 0, result.err
    assert "verified: img_emb is random:test_vit: 16 rows embedded again: cosine 1.0000 at least" in result.out
    stored = Embeddings(tmp_path / "g").load("img_emb")
    torch.testing.assert_close(stored, vectors.float(), atol=1e-3, rtol=0)
    rows = read_jsonl(tmp_path / "g" / "rows.jsonl")
    assert [row["image"] for row in rows] == [f"{k}.webp" for k in range(40)] and {"train", "val"} < {
        row["split"] for row in rows
    }
    verify = run("embed.py", "--verify", "g", "--device", "cpu")
    assert verify.code == 0 and "g: 40 rows, 1 files are sound" in verify.out

    order = [*range(1, 40), 0]
    save_npy(tmp_path / "h" / "tiny.npy", vectors[order])
    adopt = ("embed.py", "--adopt", "h", "--data", table, *TINY, "--out", "i")
    result = refused(*adopt, says=["tiny.npy", "is not random:test_vit", "differs: its vector is in row"])
    row, _, place = result.err.splitlines()[-1].partition("; row ")[2].partition(" differs: its vector is in row ")
    assert (int(place) + 1) % 40 == int(row) and not (tmp_path / "i" / "manifest.json").exists()
    write_csv(table, [{"image": "0.webp", "caption": "x"}])
    refused(*adopt, says=["has 1 rows", "the embeddings have 40"])


def test_an_encoder_is_added_where_the_rows_are_proven(run, refused, embedded, tmp_path):
    table, vectors = embedded
    more = ("embed.py", "--encoder", "more=random:test_resnet", "--device", "cpu", "--data", table, "--out")
    save_npy(tmp_path / "f" / "tiny.npy", vectors)
    adopt = ("embed.py", "--adopt", "f", *TINY, "--data", table, "--out", "g")
    assert run(*adopt).code == 0
    assert run(*more, "g").code == 0 and run(*more, "whole").code == 0
    data = Embeddings(tmp_path / "g")
    assert data.names("image") == ["tiny", "more"] and "adopted" in data.manifest
    assert data.load("more").equal(Embeddings(tmp_path / "whole").load("more"))

    assert run("embed.py", "--adopt", "f", *TINY, "--out", "h").code == 0
    refused(*more, "h", says=["was adopted without --data", "adopt its files again"])
    rows = read_csv(table)
    write_csv(table, [rows[1], rows[0], *rows[2:]])
    refused(*more, "g", says="was adopted with other rows")
    write_csv(table, [*rows[:-1], rows[-1] | {"caption": "another"}])
    refused(*more, "g", says="another caption in row 40")
    write_csv(table, [*rows[:-1], rows[-1] | {"caption": ""}])
    refused(*more, "g", says="row 40 cannot be used (empty caption)")


def test_rows_that_cannot_be_used_keep_their_place(run, embedded, tmp_path):
    table, vectors = embedded
    rows = [{"image": f"{k}.webp", "caption": "" if k == 7 else f"caption {k}"} for k in range(40)]
    write_csv(table, rows)
    from safetensors.torch import save_file

    (tmp_path / "s").mkdir()
    save_file({"tiny": vectors.clone(), "other": unit_vectors(40, 8)}, tmp_path / "s" / "two.safetensors")
    flags = ("--encoder", "tiny=random:test_vit", "other=hf-hub:nobody/nothing", "--device", "cpu", "--out", "t")
    result = run("embed.py", "--adopt", "s", "--data", table, *flags)
    assert result.code == 0, result.err
    assert "NOT verified: 1 rows cannot be used and are in the split 'left out'; the first: empty caption" in result.out
    assert "NOT verified: that other is hf-hub:nobody/nothing: the weights of other are missing" in result.out
    data = Embeddings(tmp_path / "t")
    assert data.rows[7]["split"] == "left out" and len(data.rows) == 40
    assert data.weights_sha256("tiny") and data.weights_sha256("other") is None


@pytest.mark.parametrize(
    "name, array, says",
    [
        ("vit_s16.npy", np.array([{}, {}], dtype=object), "cannot be read as an array of numbers"),
        ("vit_s16.npy", np.zeros((4, 384), dtype=np.int32), "holds int32"),
        ("vit_s16.npy", np.ones((4, 3, 384), dtype=np.float32), "has the shape [4, 3, 384]"),
        ("vit_s16.npy", np.ones((4, 383), dtype=np.float32), "width 383; vit_s16 gives 384"),
        ("vit_s16.npy", np.eye(4, 384, dtype=np.float32) * [[1], [1], [0], [1]], "row 2 of vit_s16 is zero"),
        ("a b.npy", np.ones((4, 384), dtype=np.float32), "is no name of an encoder"),
        ("img_emb/x_mlp1_y/img_emb_0.npy", np.ones((4, 8), dtype=np.float32), "is no name of an encoder"),
        ("text_emb/vit_s16/0.npy", np.ones((4, 384), dtype=np.float32), "lies among the text embeddings"),
        ("none.txt", np.ones((4, 8)), "holds no .pt, .npy or .safetensors"),
    ],
)
def test_files_that_are_no_vectors_are_refused(refused, tmp_path, name, array, says):
    path = save_npy((tmp_path / "f" / name).with_suffix(".npy"), array)
    if not name.endswith(".npy"):
        path.rename(path.with_suffix(".txt"))
    refused("embed.py", "--adopt", "f", "--out", "o", says=says)


def test_damaged_and_hostile_files_are_refused(refused, tmp_path):
    path = save_npy(tmp_path / "f" / "vit_s16.npy", np.ones((64, 384), dtype=np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused("embed.py", "--adopt", "f", says="vit_s16.npy: cannot be read")
    for shape in (b"(10**12, 384)", b"(999999999, 384)"):  # a header that promises more than there is, and one of no numbers
        path.write_bytes(whole[:128].replace(b"(64, 384), }" + b" " * (len(shape) - 9), shape + b", }"))
        refused("embed.py", "--adopt", "f", says="vit_s16.npy: cannot be read")
    path.rename(path.with_suffix(".safetensors"))
    refused("embed.py", "--adopt", "f", says="vit_s16.safetensors: cannot be read as safetensors")
    path.with_suffix(".safetensors").rename(path.with_suffix(".pt"))
    refused("embed.py", "--adopt", "f", says="vit_s16.pt: cannot be read as a torch file")


def test_misnamed_and_misaligned_files_are_refused(refused, tmp_path):
    (tmp_path / "p").mkdir()
    for name in ("efflite0", "mpnet"):
        shutil.copy(SAMPLE / "embeddings" / f"{name}.pt", tmp_path / "p")
    shutil.copy(tmp_path / "p" / "efflite0.pt", tmp_path / "p" / "efflite1.pt")
    refused("embed.py", "--adopt", "p", says=["efflite1.pt: holds the vectors of", "misnamed"])
    (tmp_path / "p" / "efflite1.pt").unlink()
    texts = vlm.load_tensors(tmp_path / "p" / "mpnet.pt")
    torch.save(torch.cat([texts[:1000], texts[1001:], texts[:1]]), tmp_path / "p" / "mpnet.pt")
    refused("embed.py", "--adopt", "p", says=["mpnet.pt: near row 993 ", "shifted by -1"])
    torch.save(texts[:-1].clone(), tmp_path / "p" / "mpnet.pt")
    refused("embed.py", "--adopt", "p", says=["2,650 rows of efflite0", "2,649 of mpnet"])


def as_vectors(tensor):
    vectors = Vectors("x")
    vectors.add(Path("x"), tensor, tuple(tensor.shape), "float32")
    return vectors


def test_the_order_of_rows_is_told_from_vectors_alone():
    images = vlm.load_tensors(SAMPLE / "embeddings" / "efflite0.pt").float()
    texts = vlm.load_tensors(SAMPLE / "embeddings" / "minilm_l6.pt").float()
    assert {stretch.shift for stretch in compare_rows(as_vectors(images), as_vectors(texts))} == {0}
    shuffled = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))]
    assert {stretch.shift for stretch in compare_rows(as_vectors(images), as_vectors(shuffled))} == {None}
    assert compare_rows(as_vectors(images[:30]), as_vectors(texts[:30])) == []


# --------------------------------------------------------------------------------------------- verifying and exporting


def test_what_changed_is_found(run, refused, embedded, tmp_path):
    table, vectors = embedded
    verify = ("embed.py", "--verify", "whole", "--device", "cpu")
    result = run(*verify)
    assert result.code == 0 and "16 rows embedded again: cosine 1.0000 at least" in result.out
    manifest = tmp_path / "whole" / "manifest.json"
    sealed = vlm.read_json(manifest)
    torch.save(vectors.flip(0).clone(), tmp_path / "whole" / "tiny.pt")
    refused(*verify, says=["1 of 1 encoders differ", "sha256"])
    sealed["encoders"]["tiny"]["file_sha256"] = hashlib.sha256((tmp_path / "whole/tiny.pt").read_bytes()).hexdigest()
    manifest.write_text(json.dumps(sealed))
    refused(*verify, says=["1 of 1 encoders differ", "differs: its vector is in row"])
    for path in table.parent.glob("*.webp"):
        path.unlink()
    result = run(*verify)
    assert result.code == 0 and "NOT embedded again" in result.out and "not embedded again: tiny" in result.out
    refused(*verify, "--encoder", "mpnet", says="whole has tiny")


@pytest.mark.parametrize("form", ["npy", "parquet", "safetensors"])
def test_what_is_exported_is_adopted_again(run, tmp_path, form):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    result = run("embed.py", "--export", form, "--encoder", "efflite0", "mpnet", "--out", "x")
    assert result.code == 0, result.err
    whole = Embeddings(SAMPLE / "embeddings")
    if form == "parquet":
        table = parquet.read_table(tmp_path / "x" / "mpnet" / "mpnet_0.parquet")
        assert torch.tensor(table["embedding"].to_pylist()).half().equal(whole.load("mpnet"))
        assert table["caption"].to_pylist() == [row["caption"] for row in whole.rows]
        return
    adopted = run("embed.py", "--adopt", "x", "--out", "y")
    assert adopted.code == 0, adopted.err
    again = Embeddings(tmp_path / "y")
    for name in ("efflite0", "mpnet"):
        torch.testing.assert_close(again.load(name).float(), whole.load(name).float(), atol=1e-3, rtol=0)
    assert (again.rows is not None) == (form == "npy")
    if form == "npy":
        assert [row["key"] for row in again.rows] == [row["key"] for row in whole.rows]
        assert [row["split"] for row in again.rows] == [row["split"] for row in whole.rows]
        array = np.load(tmp_path / "x" / "text_emb" / "mpnet" / "text_emb_0.npy")
        assert torch.from_numpy(array).equal(whole.load("mpnet"))


# ----------------------------------------------------------------------------------------------------------- fetching


def test_other_programs_read_what_is_exported(run, tmp_path):
    """embedding-reader, whose readers autofaiss uses, and faiss, where they are installed."""
    reader = pytest.importorskip("embedding_reader").EmbeddingReader
    faiss = pytest.importorskip("faiss")
    for form in ("npy", "parquet"):
        assert run("embed.py", "--export", form, "--encoder", "efflite0", "--out", form).code == 0
    expected = Embeddings(SAMPLE / "embeddings").load("efflite0")
    columns = ["image_path", "caption"]
    readers = (
        reader(embeddings_folder=str(tmp_path / "npy/img_emb/efflite0"), file_format="npy"),
        reader(
            embeddings_folder=str(tmp_path / "npy/img_emb/efflite0"),
            metadata_folder=str(tmp_path / "npy/metadata"),
            meta_columns=columns,
            file_format="parquet_npy",
        ),
        reader(
            embeddings_folder=str(tmp_path / "parquet/efflite0"),
            embedding_column="embedding",
            meta_columns=columns,
            file_format="parquet",
        ),
    )
    captions = [row["caption"] for row in sample_rows()]
    for opened in readers:
        assert (opened.count, opened.dimension) == tuple(expected.shape)
        for vectors, rows in opened(batch_size=1000, start=0, end=1000, show_progress=False):
            assert torch.from_numpy(vectors).float().equal(expected[:1000].float())
            if "caption" in rows:
                assert list(rows["caption"]) == captions[:1000]
    index = faiss.IndexFlatIP(expected.shape[1])
    index.add(np.load(tmp_path / "npy/img_emb/efflite0/img_emb_0.npy").astype(np.float32))
    assert index.search(expected[5:8].float().numpy(), 1)[1].ravel().tolist() == [5, 6, 7]


def sample_rows():
    return read_jsonl(SAMPLE / "embeddings" / "rows.jsonl")


def test_published_embeddings_are_fetched_and_resumed(run, refused, monkeypatch, tmp_path):
    """A hub that breaks off in the third of its four repositories, and then does not."""
    import huggingface_hub

    hub = {
        "jaisidhsingh/cc3m558k-img-embed-dim-384": ["vit_s16", "deit_s16"],
        "jaisidhsingh/cc3m558k-img-embed-dim-768": ["vit_b16"],
        "jaisidhsingh/cc3m558k-img-embed-dim-1024": ["vit_l16"],
        "jaisidhsingh/cc3m558k-txt-embed-all-dims": ["minilm", "mpnet"],
    }
    broken = ["jaisidhsingh/cc3m558k-img-embed-dim-1024"]
    asked = []

    def snapshot_download(repository, repo_type, local_dir, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository in broken:
            raise OSError("connection lost")
        assert repo_type == "dataset"
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        for name in hub[repository]:
            if any(Path(f"{name}.pt").match(pattern) for pattern in allow_patterns):
                torch.save(unit_vectors(60, vlm.ENCODERS[name].dim), Path(local_dir) / f"{name}.pt")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused("embed.py", "--fetch", "cc3m558k", says=["dim-1024", "connection lost", "run the same command again"])
    broken.clear()
    result = run("embed.py", "--fetch", "cc3m558k")
    assert result.code == 0, result.err
    following = result.out.splitlines()[-1]
    assert following.startswith("Next: python train_hyma.py --data embeddings/cc3m558k-img-embed-dim-384 embeddings/")
    folders = following.partition("--data ")[2].split()
    ridge = ("train_grid.py", "--closed-form", "ridge", "--connector", "mlp0", "--out", "r")
    assert run(*ridge, "--data", *folders).code == 0
    assert len(list((tmp_path / "r" / "connectors").glob("*.pt"))) == 8
    some = run("embed.py", "--fetch", "cc3m558k", "--encoder", "vit_*", "--out", "some")
    assert some.code == 0 and sorted(path.name for path in (tmp_path / "some").rglob("*.pt")) == [
        "vit_b16.pt",
        "vit_l16.pt",
        "vit_s16.pt",
    ]
    refused("embed.py", "--fetch", "cc3m558k", "--encoder", "clip*", "--out", "none", says=["--encoder clip*", "no such"])
    refused("embed.py", "--fetch", "laion", says="expected cc3m558k")
    refused("embed.py", says="--encoder: name the encoders")
