"""hyma/tasks.py: metrics against scikit-learn, scipy and cases worked by hand; which rows, which prompts, faults."""

import argparse
import collections
import hashlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, SAMPLE, make_embedding_folder, tasks_of, unit_vectors
from scipy.stats import rankdata
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import vlm
from hyma.distractors import draw_distractors
from hyma.embeddings import Embeddings
from hyma.files import write_json
from hyma.prompts import TEMPLATES, load_prompts
from hyma.splits import split_rows
from hyma.task_inputs import image_inputs, text_inputs
from hyma.tasks import map_prompts, score
from hyma.weights import OtherWeights

PRETRAINED = ("efflite0", "efflite1", "efflite2")
EIGHTY = "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


def random_connector(seed, *dims):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vlm.init_modality_connector(dims[0], list(dims[1:-1]), dims[-1])


# -------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("templates", [1, 3])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # the one class is meant
def test_zeroshot_against_sklearn(templates, tmp_path):
    """Twelve classes of which one is never asked for; scores by the formula written out."""
    flags = argparse.Namespace(templates=str(tmp_path / "templates.txt"), device="cpu")
    (tmp_path / "templates.txt").write_text("".join(f"{k} {{}}\n" for k in range(templates)))
    rows = [{"label": f"class_{k % 12:02}", "split": "train" if k % 12 == 7 else "test"} for k in range(400)]
    task = tasks_of(make_embedding_folder(tmp_path / "e", rows), flags)["zeroshot"]
    assert len(task.rows) == 367 and len(task.texts) == 12 * templates
    assert task.texts[:templates] == tuple(f"{k} class 00" for k in range(templates))  # a class's follow each other
    texts, connector = unit_vectors(12 * templates, 20), random_connector(1, 20, 24, 16)
    mapped = F.normalize(connector(texts), dim=1).detach().double().view(12, templates, 16).mean(1).numpy()
    right = np.array([k % 12 for k in task.rows.tolist()])
    images = torch.tensor(mapped[right]) + 0.08 * torch.randn(367, 16, generator=torch.Generator().manual_seed(2))
    found = score(task, texts, images, connector)
    scores = images.numpy() @ (mapped / np.linalg.norm(mapped, axis=1, keepdims=True)).T
    expected = {
        "acc1": top_k_accuracy_score(right, scores, k=1, labels=range(12)),
        "acc5": top_k_accuracy_score(right, scores, k=5, labels=range(12)),
        "mean_per_class_recall": balanced_accuracy_score(right, scores.argmax(1)),
    }
    assert 0.3 < expected["acc1"] < 0.95 and expected["mean_per_class_recall"] != expected["acc1"]
    assert found.metrics == pytest.approx(expected, abs=1e-12)
    assert found.value == found.metrics["acc1"]
    assert torch.equal(found.units, torch.tensor(scores.argmax(1) == right).double())


def test_templates_are_averaged_after_the_connector(tmp_path):
    """Two templates whose mean points elsewhere before the connector than after it."""
    flags = argparse.Namespace(templates=str(tmp_path / "t"), device="cpu")
    (tmp_path / "t").write_text("a {}\nb {}\n")
    task = tasks_of(make_embedding_folder(tmp_path / "e", [{"label": "x"}, {"label": "y"}]), flags)["zeroshot"]
    texts = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])

    def connector(batch):  # lengths that the mean of unit vectors must not feel
        return batch * torch.tensor([1.0, 100, 1])

    found = map_prompts(texts, connector, task.templates)
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))


def ranks_by_scipy(scores, own, names):
    """Of each query: how many different candidates come before its best own one; a tie counts against it."""
    found = []
    for line, right in zip(scores, own):
        best = {}
        for name, value in zip(names, line):
            best[name] = max(value, best.get(name, -np.inf))
        order = dict(zip(best, rankdata([-value for value in best.values()], method="max") - 1))
        found.append(min(order[name] for name in right))
    return np.array(found)


def test_retrieval_against_scipy(tmp_path):
    """120 captions of 50 pictures, from one to five a picture; one caption belongs to two pictures."""
    picture = [p for p in range(50) for _ in range(1 + p % 5)][:120]
    captions = [f"caption {k}" for k in range(120)]
    captions[40] = captions[3]
    rows = [{"image": f"{p}.png", "caption": caption} for p, caption in zip(picture, captions)]
    task = tasks_of(make_embedding_folder(tmp_path / "e", rows))["retrieval"]
    pictures = max(picture) + 1
    assert f"{pictures} pictures, 119 different captions, 1 to 5 a picture" in task.protocol
    assert "equal captions count once, in CLIP_benchmark each" in task.protocol
    images = unit_vectors(pictures, 16)[picture]
    texts = images + 2.5 * unit_vectors(120, 16, seed=1)
    texts[40] = texts[3]
    lengths = torch.arange(1, pictures + 1)[picture, None]  # as published files may have them
    found = score(task, texts, lengths * images, torch.nn.Identity())
    scores = F.normalize(texts, dim=1).double().numpy() @ F.normalize(images, dim=1).double().numpy().T
    different = list(dict.fromkeys(captions))
    first_caption = [captions.index(caption) for caption in different]
    owners = [{p for p, c in zip(picture, captions) if c == caption} for caption in different]
    to_image = ranks_by_scipy(scores[first_caption], owners, picture)
    first_picture = [picture.index(p) for p in range(pictures)]
    own = [{c for p, c in zip(picture, captions) if p == wanted} for wanted in range(pictures)]
    to_text = ranks_by_scipy(scores.T[first_picture], own, captions)
    for k in (1, 5, 10):
        assert found.metrics[f"image_retrieval_recall@{k}"] == pytest.approx((to_image < k).mean(), abs=1e-12)
        assert found.metrics[f"text_retrieval_recall@{k}"] == pytest.approx((to_text < k).mean(), abs=1e-12)
    assert found.metrics["image_retrieval_median_rank"] == 1 + np.median(to_image) > 1
    assert found.metrics["text_retrieval_median_rank"] == 1 + np.median(to_text)
    assert found.value == pytest.approx(((to_image < 10).mean() + (to_text < 10).mean()) / 2, abs=1e-12)
    assert len(found.units) == pictures and found.units.mean().item() == pytest.approx(found.value, abs=1e-12)
    assert 0.1 < found.value < 0.95


def test_retrieval_by_hand(tmp_path):
    """Three pictures on the axes and four captions: ranks that can be read off the coordinates."""
    rows = [{"image": image, "caption": f"{k}"} for k, image in enumerate("aabc")]
    task = tasks_of(make_embedding_folder(tmp_path / "e", rows))["retrieval"]
    images = torch.eye(3)[[0, 0, 1, 2]]
    texts = torch.tensor([[3.0, 2, 0], [0, 2, 1], [1, 3, 2], [0, 2, 1]])
    # Captions to pictures: the first finds a at once; the second prefers b and c; the third finds b; the fourth prefers b.
    # Pictures to captions: a finds its first; b, at cosines 0.55, 0.89, 0.80, 0.89, its own third; c, at 0, 0.45, 0.53,
    # 0.45, ties with the second caption behind the third.
    metrics = score(task, texts, images, torch.nn.Identity()).metrics
    assert metrics["image_retrieval_recall@1"] == 0.5 and metrics["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert metrics["image_retrieval_median_rank"] == 1.5  # of 1, 3, 1, 2
    assert metrics["text_retrieval_median_rank"] == 3  # of 1, 3, 3
    assert metrics["image_retrieval_recall@5"] == metrics["text_retrieval_recall@5"] == 1


def test_pictures_of_unit_length_are_ranked_as_they_are_stored(tmp_path):
    """Rounded to 16 bits they are a little longer or shorter, and normalised again a few would change places."""
    task = tasks_of(make_embedding_folder(tmp_path / "e", [{}] * 400))["retrieval"]
    images = F.normalize(torch.ones(16) + 0.01 * unit_vectors(400, 16), dim=1).half()
    texts = images + 0.01 * unit_vectors(400, 16, seed=1)
    ranks = task.retrieval.ranks(F.normalize(texts.float(), dim=1), images.float())[0]
    again = task.retrieval.ranks(F.normalize(texts.float(), dim=1), F.normalize(images.float(), dim=1))[0]
    found = score(task, texts, images, torch.nn.Identity()).metrics
    recalls = {k: (ranks < k).double().mean().item() for k in (1, 5, 10)}
    assert any((again < k).double().mean().item() != recalls[k] for k in recalls)
    assert all(found[f"image_retrieval_recall@{k}"] == recalls[k] for k in recalls)


def test_vqa_by_hand(tmp_path):
    """The nearest of a row's own choices counts, whatever other rows offer; a tie is no answer."""
    asked = [
        {"question": "what is it", "answer": "a", "choices": ["a", "b"]},
        {"question": "what is it", "answer": "b", "choices": ["a", "b", "c"]},
        {"question": "and now", "answer": "c", "choices": ["c", "d"]},
        {"question": "and now", "answer": "d", "choices": ["d", "c", "d"]},
    ]
    found = tasks_of(make_embedding_folder(tmp_path / "e", asked))
    assert list(found) == ["vqa"]  # a question is no caption
    task = found["vqa"]
    assert task.texts == ("and now c", "and now d", "what is it a", "what is it b", "what is it c")
    assert "4 questions, 2 to 3 choices" in task.protocol
    assert task.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    texts = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [1, 0], [0, 1]])  # the first two are the same
    images = torch.tensor(
        [[0.1, 1], [0.1, 1], [1, 0], [1, 0]]
    )  # nearest to both first ones is c, which is not among their choices
    assert score(task, texts, images, torch.nn.Identity()).units.tolist() == [1, 0, 0, 0]
    images[1] = torch.tensor([1.0, 0])
    result = score(task, texts, images, torch.nn.Identity())
    assert result.units.tolist() == [1, 1, 0, 0] and result.metrics == {"acc": 0.5} and result.value == 0.5


@pytest.mark.parametrize("kind", ["retrieval", "zeroshot", "vqa"])
def test_a_collapsed_connector_scores_nothing(kind, tmp_path):
    task = tasks_of(make_embedding_folder(tmp_path / "e", [{"label": f"{k % 10}"} for k in range(60)]))[kind]
    texts = unit_vectors(len(task.texts) or 60, 8)
    found = score(task, texts, unit_vectors(60, 12), lambda batch: torch.eye(12)[:1].expand(len(batch), -1))
    assert found.metrics.get("image_retrieval_recall@1", 0) <= 1 / 60  # the nearest text of all equal ones: none
    assert found.metrics.get("text_retrieval_recall@10", 0) == found.metrics.get("acc", 0) == 0
    assert found.metrics.get("acc1", 0) == found.metrics.get("acc5", 0) == 0
    with pytest.raises(vlm.BadInput, match="not finite"):
        score(task, texts, unit_vectors(60, 12), lambda batch: torch.full((len(batch), 12), torch.nan))


def test_shuffled_captions_score_at_chance(tmp_path):
    """Each kind finds everything where pictures and texts belong together, and what guessing finds where they do not."""
    rows = [{"label": f"{k % 10}", "split": "test"} for k in range(2000)]
    tasks = tasks_of(make_embedding_folder(tmp_path / "e", rows))
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    latent = unit_vectors(2000, 64)
    for kind, task in tasks.items():
        if kind == "retrieval":
            texts, images = latent, latent + 0.01 * unit_vectors(2000, 64, seed=1)
        else:
            texts = unit_vectors(len(task.texts), 64)
            images = texts[task.right] + 0.3 * unit_vectors(2000, 64, seed=1)
        whole = score(task, texts, images, torch.nn.Identity())
        found = score(task, texts, images[shuffled], torch.nn.Identity())
        error = (task.chance * (1 - task.chance) / 2000) ** 0.5
        assert whole.value > 0.99 and abs(found.value - task.chance) < 4 * error, (kind, found.value, task.chance)
        for name, value in found.metrics.items():
            if name.endswith("median_rank"):
                assert abs(value - 1000) < 150
            elif "@" in name:
                assert value < int(name.rpartition("@")[2]) / 2000 + 4 * error


def test_memory_is_bounded(tmp_path):
    """50,000 pictures by 1,000 classes and 31,000 captions by 6,200 pictures: under 2 GB beyond the embeddings."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from hyma.machine import peak_bytes
from hyma.metrics import Retrieval
from hyma.tasks import Task, score
peak = lambda: peak_bytes(torch.device("cpu"))
make = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape), dim=1).half()
connector, chosen = torch.nn.Linear(128, 128), torch.randint(1000, (50000,))
pictures, texts, prompts = make(50000, 128), make(31000, 128), make(80000, 128)
class Data: rows = [dict(image=k // 5, caption=k) for k in range(31000)]
retrieval = Task("b", "retrieval", "", 0, None, None, Retrieval(Data, torch.arange(31000), "cpu"))
start = peak()
score(Task("a", "zeroshot", "", 0, None, None, None, (), 80, chosen), prompts, pictures, connector)
found = score(retrieval, texts, pictures[: 31000], connector)
assert len(found.units) == 6200
print(peak() - start)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    used = int(done.stdout)
    # at least the pictures in float32, 26 MB; all 50,000 x 1,000 scores are 0.2 GB, 31,000 x 6,200 0.8 GB
    assert 2e7 < used < 2e9, used


# ---------------------------------------------------------------------------------------------------- rows and protocol


def test_the_sample_is_scored_without_any_weights(run, sample_ridge):
    """The shipped prompts are all that it takes, and they rank pretrained encoders above chance and the control."""
    result = run("evaluate.py", sample_ridge)
    assert result.code == 0, result.err
    tasks = tasks_of(SAMPLE / "embeddings")
    assert list(tasks) == ["retrieval", "zeroshot", "vqa"]
    data = tasks["vqa"].data
    for task in tasks.values():
        assert "test split" in task.protocol and {data.rows[i]["split"] for i in task.rows.tolist()} == {"test"}
        assert len(task.rows) == 384
        values = {}
        for path in (sample_ridge / "connectors").glob("*.pt"):
            image, _, text, _ = vlm.read_connector(path)
            connector = vlm.load_connector(path)
            texts = text_inputs(task, text)
            values[image, text] = score(task, texts, image_inputs(task, image), connector).value
        control = max(value for (image, _), value in values.items() if image == "control")
        assert min(value for (image, _), value in values.items() if image in PRETRAINED) > 1.3 * control > task.chance
    shipped = [path for path in (SAMPLE / "embeddings" / "prompts").iterdir()]
    asked = {(name, task.texts) for task in tasks.values() if task.texts for name in ("minilm_l6", "mpnet")}
    assert len(shipped) >= len(asked) == 4 and sum(path.stat().st_size for path in sorted(shipped)[:4]) < 5e5


def test_the_rows_that_are_scored_are_not_those_trained_on(tmp_path):
    rows = [{"label": f"{k % 3}", "split": ("train", "val")[k % 4 == 0]} for k in range(40)]
    folder = make_embedding_folder(tmp_path / "own", rows)
    own = tasks_of(folder, run_seed=0)["zeroshot"]
    assert own.rows.tolist() == list(range(0, 40, 4)) and "also chose the connectors" in own.protocol
    left_out = make_embedding_folder(tmp_path / "adopted", [*rows, {"caption": "", "split": "left out"}])
    assert tasks_of(left_out)["retrieval"].rows.tolist() == list(range(40))
    unknown = make_embedding_folder(tmp_path / "unknown", [*rows, {"split": "extra"}, {"split": "left out"}])
    some = tasks_of(unknown)["retrieval"]
    assert some.rows.tolist() == list(range(40)) and "all rows but 1 of splits with unknown names; 40" in some.protocol
    unnamed = tasks_of(make_embedding_folder(tmp_path / "unnamed", [{"split": "extra"}] * 4))["retrieval"]
    assert unnamed.rows.tolist() == list(range(4)) and "all rows, whose splits have unknown names; 4" in unnamed.protocol
    foreign = tasks_of(folder)["zeroshot"]
    assert foreign.rows.tolist() == list(range(40)) and "all rows" in foreign.protocol
    bare = make_embedding_folder(tmp_path / "bare", [{}] * 40)
    for seed in (0, 1):
        expected = split_rows(Embeddings(bare), seed)[1]
        assert torch.equal(tasks_of(bare, run_seed=seed)["retrieval"].rows, expected)
    marked = make_embedding_folder(tmp_path / "set", [{"split": "test"}] * 40, protocol="COCO as it was read")
    assert tasks_of(marked, run_seed=0)["retrieval"].protocol.startswith("COCO as it was read; 40 pictures, 40 ")


def test_labels_that_differ_in_spelling_alone_are_one_class(tmp_path):
    """Their prompts are the same to an encoder without capitals, and a tie counts against the right one: both would score 0."""
    labels = ["Red_fox", "red fox", "cat", "Cat", "dog"]
    rows = [{"label": label} for label in labels] + [{"image": "0.png", "label": "red fox"}]
    tasks = tasks_of(make_embedding_folder(tmp_path / "e", rows))
    zeroshot = tasks["zeroshot"]
    assert zeroshot.texts == ("a photo of a Cat", "a photo of a Red fox", "a photo of a dog")
    assert zeroshot.right.tolist() == [1, 1, 0, 0, 2]
    assert "5 pictures, 3 classes of 5 labels, some of which differ in spelling alone" in zeroshot.protocol
    assert tasks["vqa"].choices.shape == (5, 3)


def test_pictures_with_several_captions_are_classified_once(tmp_path):
    rows = [{"image": f"{k // 2}", "label": f"{k // 2 % 4}"} for k in range(40)]
    tasks = tasks_of(make_embedding_folder(tmp_path / "e", rows))
    assert tasks["zeroshot"].rows.tolist() == tasks["vqa"].rows.tolist() == list(range(0, 40, 2))
    assert len(tasks["retrieval"].rows) == 40


def test_published_embeddings_have_retrieval_alone(planted):
    tasks = tasks_of(planted)
    assert (
        list(tasks) == ["retrieval"]
        and "900 pictures, 900 different captions, 1 a picture" in tasks["retrieval"].protocol
    )


def test_distractors_depend_on_the_key_alone():
    pool = [f"{k}" for k in range(30)]
    found = draw_distractors("row 1", pool, {"3"}, 3)
    assert found == ["16", "11", "13"]
    drawn = collections.Counter(name for k in range(3000) for name in draw_distractors(k, pool, {"3", f"{k % 30}"}, 3))
    assert "3" not in drawn and len(drawn) == 29 and max(drawn.values()) < 1.4 * min(drawn.values())
    assert sorted(draw_distractors("x", ["a", "b"], {"b"}, 3)) == ["a"]


def test_the_eighty_templates_are_the_published_ones():
    """The sha256 of the published list in alphabetical order, one a line."""
    lines = sorted(TEMPLATES["80"])
    assert len(set(lines)) == 80 and TEMPLATES["1"] == ("a photo of a {}",)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == EIGHTY


# -------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_embedded_once(tmp_path, weights, monkeypatch):
    folder = make_embedding_folder(
        tmp_path / "e", [{"label": "red_fox"}, {"label": "teapot"}], minilm_l6=unit_vectors(2, 384)
    )
    task = tasks_of(folder)["zeroshot"]
    found = text_inputs(task, "minilm_l6", weights)
    expected = vlm.TextEncoder("minilm_l6", "cpu", weights["minilm_l6"]).encode_text(
        ["a photo of a red fox", "a photo of a teapot"]
    )
    torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=0)
    load_prompts.cache_clear()
    monkeypatch.setattr(vlm, "TextEncoder", None)  # from here on only the file is left
    again = text_inputs(tasks_of(folder)["zeroshot"], "minilm_l6")
    assert torch.equal(again, found) and found.dtype == torch.float16
    (path,) = (folder / "prompts").iterdir()
    for wrong in (torch.ones(3, 384), torch.zeros(2, 384), {"x": torch.ones(1)}):
        torch.save(wrong, path)
        load_prompts.cache_clear()
        with pytest.raises(vlm.BadInput, match=path.name):
            text_inputs(task, "minilm_l6")


def test_prompts_of_other_weights_are_refused(tmp_path, weights, monkeypatch):
    folder = make_embedding_folder(tmp_path / "e", [{"label": "a"}, {"label": "b"}], minilm_l6=unit_vectors(2, 384))
    manifest = vlm.read_json(folder / "manifest.json")
    manifest["encoders"]["minilm_l6"]["weights_sha256"] = "0" * 64
    write_json(folder / "manifest.json", manifest)
    task, sample = tasks_of(folder)["zeroshot"], Embeddings(SAMPLE / "embeddings")
    with pytest.raises(vlm.BadInput, match="--weights minilm_l6=.*not the weights"):
        text_inputs(task, "minilm_l6", weights)
    with pytest.raises(vlm.BadInput, match="minilm_l6 has other weights than .*sample"):
        text_inputs(task, "minilm_l6", weights, run_data=sample)
    with pytest.raises(vlm.BadInput, match="has minilm_l6 but not efflite0"):
        image_inputs(task, "efflite0", sample)
    hub = vlm.TextEncoder("minilm_l6", "cpu", weights["minilm_l6"])
    monkeypatch.setattr(vlm, "TextEncoder", lambda *_: hub)
    with pytest.raises(OtherWeights, match="on the hub are not those .* --weights minilm_l6=PATH"):
        text_inputs(task, "minilm_l6")


def copy_of_sample(folder):
    """The embedded sample in another folder, by links, with a manifest that can be changed."""
    folder.mkdir()
    for path in (SAMPLE / "embeddings").iterdir():
        if path.name == "manifest.json":
            shutil.copy(path, folder)
        elif path.is_file():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    "name, setting, value, says",
    [
        ("efflite0", "crop_pct", 0.9, "crop_pct 0.9, and .*'s with crop_pct 0.875"),
        ("efflite2", "input_size", [3, 288, 288], r"input_size \[3, 288, 288\]"),
        ("mpnet", "max_seq_length", 128, "max_seq_length 128"),
    ],
)
def test_an_encoder_with_other_settings_is_refused(refused, sample_ridge, tmp_path, name, setting, value, says):
    """The same weights with another input size, crop or length limit give other vectors."""
    copy = copy_of_sample(tmp_path / "copy")
    manifest = vlm.read_json(copy / "manifest.json")
    manifest["encoders"][name]["transform"][setting] = value
    write_json(copy / "manifest.json", manifest)
    line = refused("evaluate.py", sample_ridge, "--task", f"x={copy}", says=[f"copy: its {name} was embedded with"])
    assert re.search(says, line.err) and str(SAMPLE / "embeddings") in line.err


def test_settings_that_only_one_version_records_are_no_difference(sample_ridge, tmp_path):
    copy = copy_of_sample(tmp_path / "copy")
    manifest = vlm.read_json(copy / "manifest.json")
    manifest["encoders"]["mpnet"]["transform"] |= {"prompts": {}, "modules": {"Normalize": {}}}
    manifest["encoders"]["mpnet"]["dtype"] = "float32"
    write_json(copy / "manifest.json", manifest)
    task = tasks_of(copy)["retrieval"]
    assert len(text_inputs(task, "mpnet", run_data=Embeddings(SAMPLE / "embeddings"))) == len(task.rows)


def test_prompts_by_other_settings_are_refused(tmp_path, weights):
    folder = make_embedding_folder(tmp_path / "e", [{"label": "a"}, {"label": "b"}], minilm_l6=unit_vectors(2, 384))
    manifest = vlm.read_json(folder / "manifest.json")
    manifest["encoders"]["minilm_l6"]["transform"] = {"max_seq_length": 7}
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(vlm.BadInput, match="minilm_l6: .* max_seq_length 7, and it has max_seq_length 256 here"):
        text_inputs(tasks_of(folder)["zeroshot"], "minilm_l6", weights)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_a_folder_with_nothing_to_evaluate_is_refused(refused, sample_ridge, tmp_path):
    one = make_embedding_folder(tmp_path / "one", [{"label": "dog", "caption": "dog"}] * 30)
    line = refused("evaluate.py", sample_ridge, "--task", f"one={one}", says=["--task one=", "captions are the labels"])
    assert line.err.count("one class (dog)") == 1 and "PosixPath" not in line.err
    refused("evaluate.py", sample_ridge, "--task", f"one={tmp_path / 'none'}", says="no such embedding folder")
    single = make_embedding_folder(tmp_path / "single", [{"image": "a.png"}] * 3)
    refused(
        "evaluate.py", sample_ridge, "--task", f"x={single}", says="1 pictures and 3 captions leave nothing to find"
    )


def test_bad_choices_and_templates_are_named(refused, sample_ridge, tmp_path):
    for k, choices in enumerate(([], ["b", "c"], ["a", "a"], "a")):
        folder = make_embedding_folder(tmp_path / f"{k}", [{"question": "q", "answer": "a", "choices": choices}])
        refused("evaluate.py", sample_ridge, "--task", f"x={folder}", says=["rows.jsonl: row 0", "choices"])
    for text, says in (("a photo", "one {}"), ("{} {}", "one {}"), ("", "no lines")):
        (tmp_path / "t.txt").write_text(text)
        refused("evaluate.py", sample_ridge, "--templates", tmp_path / "t.txt", says=["--templates", says])
    refused("evaluate.py", sample_ridge, "--templates", "79", says=["--templates 79", "1, 80 or a text file"])


def test_a_task_without_the_runs_encoder_is_refused(refused, sample_ridge, tmp_path):
    folder = make_embedding_folder(
        tmp_path / "e", [{}] * 20, efflite0=unit_vectors(20, 1280), minilm_l6=unit_vectors(20, 384)
    )
    refused(
        "evaluate.py",
        sample_ridge,
        "--task",
        f"x={folder}",
        says=["has efflite0, minilm_l6 but not ", "embed.py --encoder"],
    )


def test_a_task_whose_prompts_cannot_be_embedded_is_left_out(run, refused, sample_ridge, tmp_path, weights):
    """80 prompts of the sample are not shipped: retrieval is reported, and a warning names the weights to pass. Weights that
    are passed and wrong end the report before anything is scored."""
    copy = copy_of_sample(tmp_path / "sample")
    flags = ("--task", f"x={copy}", "--templates", "80", "--bootstrap", "10", "--selector-rows", "0")
    result = run("evaluate.py", sample_ridge, *flags)
    assert result.code == 0, result.err
    (line,) = (line for line in result.out.splitlines() if "left out" in line)
    assert re.match(
        "warning: left out: x zeroshot and x vqa: the weights of (mpnet and minilm_l6|minilm_l6 and mpnet) are", line
    )
    assert "mpnet=weights/mpnet" in line and "minilm_l6=weights/minilm_l6" in line
    found = vlm.read_json(tmp_path / "report" / "results.json")
    assert {record["task"] for record in found["results"]} == {"zeroshot_retrieval"}
    assert line.removeprefix("warning: ") in found["warnings"]

    wrong = ("--weights", f"minilm_l6={weights['efflite0']}", f"mpnet={weights['efflite0']}", "--out", "never")
    line = refused("evaluate.py", sample_ridge, *flags, *wrong, says="folder")
    assert "connector/s" not in line.err and not (tmp_path / "never").exists()


def test_the_only_task_without_weights_is_refused_before_it_is_scored(run, refused, tmp_path):
    """Labels for captions: nothing but prompts can be scored, and they need an encoder."""
    rows = []
    for k in range(120):
        rows.append({"label": f"{k % 4}", "caption": f"{k % 4}", "split": ("test", "val", "train")[k % 3]})
    vectors = {"efflite0": unit_vectors(120, 1280), "minilm_l6": unit_vectors(120, 384)}
    folder = make_embedding_folder(tmp_path / "e", rows, **vectors)
    flags = ("--data", folder, "--closed-form", "ridge", "--batch-size", "16", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    line = refused("evaluate.py", "x", says=["the weights of minilm_l6 are missing", "minilm_l6=weights/minilm_l6"])
    assert "connector/s" not in line.err and not (tmp_path / "report").exists()
