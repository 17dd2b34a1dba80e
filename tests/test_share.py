"""A pair that is shared: save_pretrained, plain sentence-transformers, the hub's addresses; vectors as CustomVLM gives them."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import SAMPLE, sample_captions
from PIL import Image, ImageDraw

import vlm
from vlm import BadInput

NAME = "efflite0_mlp1_minilm_l6"
CAPTIONS = ["a dog", "two boats on a very calm sea in the evening"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A connector and its card, as a run folder has them."""
    folder = tmp_path_factory.mktemp("connectors")
    torch.manual_seed(0)
    torch.save(vlm.init_modality_connector(384, [1024], 1280).state_dict(), folder / f"{NAME}.pt")
    card = {"dataset": "sample", "maps": "texts to pictures", "val_recall1": 0.172, "val_recall10": 0.547}
    card |= {"val_rows": 373, "val_candidates": 2000}
    (folder / f"{NAME}.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def model(run_folder, weights):
    return vlm.get_vlm_from_checkpoint(run_folder / f"{NAME}.pt", "cpu", weights=weights)


@pytest.fixture(scope="module")
def shared(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "pair"
    model.save_pretrained(folder, licence="mit")
    return folder


@pytest.fixture(scope="module")
def pictures():
    return [vlm.open_image(SAMPLE / row["image"]) for row in sample_captions()[:2]]


def pixels(model, pictures):
    return torch.stack([model.preprocess(picture) for picture in pictures])


def router(folder):
    """The whole pair by sentence-transformers' Router."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    return SentenceTransformer(modules=[Router.load(str(folder), trust_remote_code=True)], device="cpu")


def test_plain_sentence_transformers_loads_what_is_shared(shared, model, pictures):
    from sentence_transformers import SentenceTransformer

    options = {"convert_to_tensor": True, "show_progress_bar": False}
    texts = SentenceTransformer(str(shared), device="cpu").encode(CAPTIONS, **options)  # no code of ours
    torch.testing.assert_close(texts, model.encode_text(CAPTIONS))
    pair = router(shared)
    torch.testing.assert_close(pair.encode(CAPTIONS, **options), model.encode_text(CAPTIONS))
    torch.testing.assert_close(pair.encode(pictures, **options), model.encode_image(pixels(model, pictures)))
    # As they come from other people's phones and drawing programs.
    disc = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(disc).ellipse((8, 8, 56, 56), fill="red")
    disc.save(shared.parent / "disc.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    pictures[0].save(shared.parent / "lying.jpg", exif=exif)
    for path in (shared.parent / "disc.png", shared.parent / "lying.jpg"):
        seen = model.encode_image(pixels(model, [vlm.open_image(path)]))
        torch.testing.assert_close(pair.encode([Image.open(path)], **options), seen)


def test_the_folder_and_a_safetensors_file_load_as_the_connector_does(shared, model, weights, pictures):
    for path in (shared, shared / f"{NAME}.safetensors"):
        again = vlm.get_vlm_from_checkpoint(path, "cpu", weights=weights if path.is_file() else None)
        assert torch.equal(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
        torch.testing.assert_close(
            again.encode_image(pixels(again, pictures)), model.encode_image(pixels(model, pictures))
        )


def test_the_model_card_has_numbers_digests_licences_and_data(shared, model):
    text = (shared / "README.md").read_text()
    digests = json.loads((shared / f"{NAME}.json").read_text())["weights_sha256"]
    assert digests["minilm_l6"] == vlm.weights_digest(model.text_encoder.model)
    for word in (
        "| R@1 | 17.2 |",
        "| R@10 | 54.7 |",
        "2000 candidates, 1627 of them trained on",
        "license: mit",
        "Data: sample",
        "apache-2.0",
        *digests.values(),
    ):
        assert word in text, word


def test_the_model_card_has_the_scores_of_a_report_on_this_very_connector(evaluation, runs, graded, model, tmp_path):
    """Two runs have a connector of this name; the digest tells which one was scored."""
    with pytest.raises(BadInput, match=f"has no scores of this {NAME}; run evaluate.py"):
        model.save_pretrained(tmp_path / "never", report=evaluation.folder)
    assert not (tmp_path / "never").exists()
    with pytest.raises(BadInput, match="holds no report"):
        model.save_pretrained(tmp_path / "never", report=tmp_path)
    (path,) = (runs / "hyma" / "connectors").glob("efflite0_mlp?_minilm_l6.pt")
    path = Path(shutil.copy(path, tmp_path))  # without its card, which names the weights of planted embeddings
    scored = vlm.CustomVLM.__new__(vlm.CustomVLM)
    scored.__dict__ = dict(model.__dict__) | {"_modules": dict(model._modules) | {"connector": None}}
    scored.load_connector_checkpoint(path)
    scored.save_pretrained(tmp_path / "pair", report=evaluation.folder)
    text = (tmp_path / "pair" / "README.md").read_text()
    records = vlm.read_json(evaluation.folder / "results.json")["results"]
    own = [record for record in records if record["pretrained"].endswith("hyma") and record["model"] == path.stem]
    assert own
    for record in own:
        for name, value in record["metrics"].items():
            shown = f"{value:g}" if name.endswith("rank") else f"{100 * value:.1f} %"
            assert f"| {record['dataset']} | {record['task']} | {name} | {shown} |" in text
        assert record["protocol"] in text
    assert text.count(" image_retrieval_recall@1 ") == len(own)


def test_addresses_of_the_hub_are_fetched(shared, run_folder, model, weights, monkeypatch):
    """The hub's client is replaced by one that copies from this machine."""
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(run_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo: str(shared))
    expected = model.encode_text(CAPTIONS)
    found = vlm.get_vlm_from_checkpoint(f"hf-hub:owner/repo/{NAME}.pt", "cpu", weights=weights)
    assert torch.equal(found.encode_text(CAPTIONS), expected)
    assert asked == [("owner/repo", f"{NAME}.pt"), ("owner/repo", f"{NAME}.json")]
    whole = vlm.get_vlm_from_checkpoint("hf-hub:owner/repo", "cpu")
    assert torch.equal(whole.encode_text(CAPTIONS), expected)


def test_a_pair_is_pushed_as_it_is_saved(model, monkeypatch, tmp_path):
    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            assert (repo_id, private, exist_ok) == ("owner/repo", True, True)

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            return repo_id

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert model.push_to_hub("owner/repo", private=True) == "owner/repo"
    assert {"README.md", "modules.json", "timm_image.py"} <= {path.name for path in (tmp_path / "uploaded").iterdir()}


def test_what_cannot_be_shared_or_fetched_ends_in_one_line(model, shared, tmp_path):
    (tmp_path / "other").write_text("")
    with pytest.raises(BadInput, match="not empty; choose a new folder"):
        model.save_pretrained(tmp_path)
    without = vlm.CustomVLM.__new__(vlm.CustomVLM)
    torch.nn.Module.__init__(without)
    without.connector, without.connector_name = None, None
    with pytest.raises(BadInput, match="has no connector from a file"):
        without.save_pretrained(tmp_path / "new")
    with pytest.raises(BadInput, match="holds 0 connectors and is not such a folder"):
        vlm.get_vlm_from_checkpoint(tmp_path)
    with pytest.raises(BadInput, match="expected hf-hub:OWNER/REPO/FILE"):
        vlm.get_vlm_from_checkpoint("hf-hub:owner")
    with pytest.raises(BadInput, match="cannot be fetched from the hub") as error:
        vlm.get_vlm_from_checkpoint(f"hf-hub:owner/no-such-repository/{NAME}.pt")
    assert "\n" not in str(error.value)
    cut = tmp_path / f"{NAME}.safetensors"
    cut.write_bytes((shared / cut.name).read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        vlm.read_connector(cut)
