"""hyma/embeddings.py, splits.py, pair_names.py: the embedding folder and its faults, splits of its rows, names of pairs."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import Rows, make_embedding_folder, unit_vectors

import vlm
from hyma import embeddings
from hyma.embeddings import Embeddings, first_bad_row, hash_keys
from hyma.files import write_json
from hyma.pair_names import choose_pairs, name_of_row, pair_name, pair_of_name
from hyma.seeds import seeded_generator
from hyma.splits import split_rows
from vlm import BadInput

# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def sealed(run, pictures):
    folder, rows = pictures
    for k, row in enumerate(rows):
        (folder / f"{k}.txt").write_text(row["caption"])
    encoders = ("--encoder", "a=random:test_vit", "b=random:test_resnet", "--device", "cpu")
    result = run("embed.py", "--data", folder, "--out", "e", *encoders)
    assert result.code == 0, result.err
    return folder.parent / "e"


def test_a_sealed_folder_is_checked_byte_for_byte(sealed):
    data = Embeddings(sealed)
    assert data.row_count == 40 and data.names("image") == ["a", "b"] and data.names("text") == []
    good = data.load("a").clone()  # and not mapped to the file that is about to be spoilt
    assert good.shape == (40, data.encoders["a"].dim) and good.dtype == torch.float16
    dataset = vlm.EmbeddingDataset(sealed / "a.pt")
    assert len(dataset) == 40 and dataset.embed_dim == good.shape[1] and dataset[3].dtype == torch.float32
    torch.testing.assert_close(dataset[3].norm(), torch.tensor(1.0), atol=1e-3, rtol=0)

    faults = {
        "short": (good[:-1].clone(), "expected (40"),
        "wrong width": (good[:, :-1].clone(), "expected (40"),
        "reordered": (good.flip(0).clone(), "sha256"),
        "nan": (good.clone().index_fill_(0, torch.tensor([5]), float("nan")), "row 5"),
        "zero": (good.clone().index_fill_(0, torch.tensor([7]), 0.0), "row 7"),
        "integers": (torch.zeros(40, 64, dtype=torch.int64), "floating-point"),
        "a dict": ({"a": good}, "floating-point"),
    }
    for fault, (tensor, says) in faults.items():
        torch.save(tensor, sealed / "a.pt")
        with pytest.raises(BadInput) as caught:
            Embeddings(sealed).load("a")
        assert says in str(caught.value) and "a.pt" in str(caught.value), fault
    (sealed / "a.pt").unlink()
    with pytest.raises(BadInput, match=r"a\.pt: no such file"):
        Embeddings(sealed).load("a")


def test_faults_of_rows_and_manifest_are_named(sealed):
    rows, manifest = (sealed / "rows.jsonl").read_text(), (sealed / "manifest.json").read_text()
    lines = rows.splitlines(keepends=True)
    other = json.loads(manifest)
    other["encoders"]["b"]["keys_sha256"] = "0" * 64
    newer = json.loads(manifest) | {"format_version": 99}
    cases = [
        ("rows.jsonl", "".join(lines[::-1]), "order have changed"),
        ("rows.jsonl", "".join(lines[:-1]), "39 rows"),
        ("rows.jsonl", rows.replace("caption", "Caption"), "have changed"),
        ("rows.jsonl", rows[:-20], "cannot be read"),
        ("manifest.json", json.dumps(other), "b was embedded from other rows"),
        ("manifest.json", json.dumps(newer), "format version 99"),
        ("manifest.json", manifest[:200], "cannot be read"),
        ("manifest.json", '{"format_version": 1}', "damaged"),
    ]
    for name, text, says in cases:
        (sealed / name).write_text(text)
        with pytest.raises(BadInput, match=says):
            Embeddings(sealed)
        (sealed / "rows.jsonl").write_text(rows)
        (sealed / "manifest.json").write_text(manifest)
    (sealed / "manifest.json").unlink()
    with pytest.raises(BadInput, match="not sealed"):
        Embeddings(sealed)


def test_a_published_folder_without_a_manifest_is_opened(tmp_path, capsys):
    torch.save(F.normalize(torch.randn(50, 384), dim=1), tmp_path / "vit_s16.pt")
    torch.save(F.normalize(torch.randn(50, 768), dim=1), tmp_path / "mpnet.pt")
    data = Embeddings(tmp_path)
    assert (data.names("image"), data.names("text"), data.row_count) == (["vit_s16"], ["mpnet"], 50)
    assert "cannot be checked" in capsys.readouterr().err
    torch.save(F.normalize(torch.randn(49, 1024), dim=1), tmp_path / "roberta.pt")
    with pytest.raises(BadInput, match="mpnet.pt has 50 rows and roberta.pt has 49"):
        Embeddings(tmp_path)
    (tmp_path / "roberta.pt").rename(tmp_path / "nobody.pt")
    with pytest.raises(BadInput, match="nobody.pt"):
        Embeddings(tmp_path)


# ----------------------------------------------------------------------------------------------------- splits and pairs


def test_a_bad_row_is_found_in_any_block():
    vectors = unit_vectors(5000, 8).half()
    assert first_bad_row(vectors) is None
    for row, value in ((0, 0), (2048, torch.inf), (4999, torch.nan)):
        bad = vectors.clone()
        bad[row] = value
        assert first_bad_row(bad) == row


def test_a_file_is_hashed_once(planted, monkeypatch):
    """Without a manifest too, where every connector's card names the digests."""
    hashed = []
    sha256_file = embeddings.sha256_file
    monkeypatch.setattr(embeddings, "sha256_file", lambda path: hashed.append(path.stem) or sha256_file(path))
    data = Embeddings(planted)
    data.load("mpnet")
    digests = data.fingerprint(["mpnet", "control"])
    assert hashed == ["mpnet", "control"]
    assert data.fingerprint(["control", "mpnet"]) == digests and hashed == ["mpnet", "control"]
    assert digests["mpnet"] == sha256_file(planted / "mpnet.pt")


def test_splits_keep_the_captions_of_a_picture_together():
    data = Rows([{"image": f"{k // 5}.jpg", "caption": str(k)} for k in range(500)])
    train, validation = split_rows(data)
    assert len(train) + len(validation) == 500 and len(validation) == 50
    assert not {k // 5 for k in train.tolist()} & {k // 5 for k in validation.tolist()}
    assert torch.equal(split_rows(data)[0], train) and not torch.equal(split_rows(data, seed=1)[0], train)
    named = Rows(
        [{"image": str(k), "caption": "", "split": s} for k, s in enumerate(["train", "val", "test", "train"])]
    )
    assert [rows.tolist() for rows in split_rows(named)] == [[0, 3], [1]]
    with pytest.raises(BadInput, match="no val rows"):
        split_rows(Rows([{"image": "0", "caption": "", "split": "train"}]))


def test_a_smaller_draw_of_rows_is_part_of_a_larger_one(planted):
    """And no training row becomes a validation row."""
    data = Embeddings(planted)
    whole, some, few = (split_rows(data, 3, count) for count in (None, 400, 100))
    for part in (0, 1):
        assert set(few[part].tolist()) < set(some[part].tolist()) < set(whole[part].tolist())
    assert (len(some[0]), len(some[1]), len(few[0]), len(few[1])) == (360, 40, 90, 10)


def test_pairs_by_name_and_wildcard(planted):
    data = Embeddings(planted)
    everything = choose_pairs(data, ["all"])
    assert len(everything) == 6 and everything[0] == ("control", "minilm_l6")
    assert choose_pairs(data, ["efflite1:mpnet"]) == [("efflite1", "mpnet")]
    found = choose_pairs(data, ["efflite?:mpnet", "efflite0:*"])
    assert found == [("efflite0", "minilm_l6"), ("efflite0", "mpnet"), ("efflite1", "mpnet")]  # in the folder's order
    with pytest.raises(BadInput, match="--pairs vit_l16:mpnet: no such pair"):
        choose_pairs(data, ["all", "vit_l16:mpnet"])


def test_a_name_means_one_pair():
    pair = ("vit_s16", "all-MiniLM.v2")
    assert pair_name(pair) == "vit_s16:all-MiniLM.v2" and pair_of_name(pair_name(pair)) == pair
    assert name_of_row({"rank": 1, "image": "vit_s16", "text": "all-MiniLM.v2"}) == pair_name(pair)


def test_generators_of_other_parts_are_others():
    """torch's CPU generator takes 32 bits of a seed: parts that are packed into one number would collide."""
    parts = [("rows", seed, epoch) for seed in range(20) for epoch in range(20)]
    assert len({seeded_generator(*each).initial_seed() for each in parts}) == len(parts)
    again = [torch.rand(4, generator=seeded_generator("rows", 1, 2)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("name", ["../../outside", "/absolute", "a:b", "x/y", ""])
def test_an_encoder_of_a_manifest_has_a_name_that_can_be_a_files(planted, tmp_path, name):
    folder = make_embedding_folder(tmp_path / "e", [{} for _ in range(4)], mpnet=torch.randn(4, 768))
    manifest = vlm.read_json(folder / "manifest.json")
    manifest["encoders"][name] = manifest["encoders"].pop("mpnet")
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(BadInput, match="is no name of an encoder"):
        Embeddings(folder)


def test_names_and_captions_that_no_terminal_can_take_are_refused(tmp_path):
    """A stranger's folder: a name that would colour the terminal, and half of a character."""
    folder = make_embedding_folder(tmp_path / "a", [{}] * 4, efflite0=torch.eye(1280)[:4])
    manifest = vlm.read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {"dataset": "x\x1b[31mred"})
    with pytest.raises(BadInput, match="has control characters"):
        Embeddings(folder)
    folder = make_embedding_folder(tmp_path / "b", [{"caption": "half"}] * 4, efflite0=torch.eye(1280)[:4])
    path = folder / "rows.jsonl"
    path.write_text(path.read_text().replace('"half"', '"half \\ud83d"'))
    manifest = vlm.read_json(folder / "manifest.json")
    digest = hash_keys([json.loads(line) for line in path.read_text().splitlines()])
    for record in (manifest, *manifest["encoders"].values()):
        record["keys_sha256"] = digest
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(BadInput, match="line 1: is no row"):
        Embeddings(folder)
