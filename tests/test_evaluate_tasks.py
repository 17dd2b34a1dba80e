"""evaluate.py's tasks: metrics against scikit-learn, scipy and cases worked by hand; protocols; the standard sets."""

import argparse
import collections
import hashlib
import itertools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SAMPLE, write_csv
from scipy.stats import rankdata
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import vlm
from hyma.datasets import draw_distractors
from hyma.embeddings import Embeddings, hash_keys, split_rows
from hyma.files import read_jsonl, save_tensors, sha256_file, write_json, write_jsonl
from hyma.tasks import TEMPLATES, image_inputs, load_prompts, map_texts, open_tasks, score, text_inputs

FLAGS = argparse.Namespace(templates="1", device="cpu")
TINY = ("--encoder", "tiny=random:test_vit", "--device", "cpu")
PRETRAINED = ("efflite0", "efflite1", "efflite2")
EIGHTY = "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"


def folder_of(folder, rows, protocol=None, **vectors):
    """A sealed embedding folder with these rows, and float16 unit vectors of registered encoders."""
    folder.mkdir()
    rows = [{"key": f"{k}", "image": f"{k}.png", "caption": f"caption {k}"} | row for k, row in enumerate(rows)]
    manifest = {"format_version": 1, "dataset": folder.name, "rows": len(rows), "keys_sha256": hash_keys(rows)}
    manifest |= {"encoders": {}} | ({"protocol": protocol} if protocol else {})
    for name, tensor in vectors.items():
        save_tensors(F.normalize(tensor.float(), dim=1).half(), folder / f"{name}.pt")
        encoder = vlm.ENCODERS[name]
        manifest["encoders"][name] = {"kind": encoder.kind, "spec": encoder.spec, "dim": tensor.shape[1]}
        manifest["encoders"][name] |= {"rows": len(rows), "keys_sha256": manifest["keys_sha256"]}
        manifest["encoders"][name] |= {"file_sha256": sha256_file(folder / f"{name}.pt")}
    write_jsonl(folder / "rows.jsonl", rows)
    write_json(folder / "manifest.json", manifest)
    return folder


def tasks_of(folder, flags=FLAGS, run_seed=None):
    return {task.kind: task for task in open_tasks(None, folder, flags, run_seed)}


def random_connector(seed, *dims):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vlm.init_modality_connector(dims[0], list(dims[1:-1]), dims[-1])


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def ridge(tmp_path_factory):
    """A run on the sample that takes no training."""
    out = tmp_path_factory.mktemp("runs") / "ridge"
    command = [sys.executable, ROOT / "train_grid.py", "--closed-form", "ridge", "--connector", "mlp0", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    return out


# --------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("templates", [1, 3])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # the one class is meant
def test_zeroshot_against_sklearn(templates, tmp_path):
    """Twelve classes of which one is never asked for; scores by the formula written out."""
    flags = argparse.Namespace(templates=str(tmp_path / "templates.txt"), device="cpu")
    (tmp_path / "templates.txt").write_text("".join(f"{k} {{}}\n" for k in range(templates)))
    rows = [{"label": f"class_{k % 12:02}", "split": "train" if k % 12 == 7 else "test"} for k in range(400)]
    task = tasks_of(folder_of(tmp_path / "e", rows), flags)["zeroshot"]
    assert len(task.rows) == 367 and len(task.texts) == 12 * templates
    assert task.texts[:templates] == tuple(f"{k} class 00" for k in range(templates))  # a class's follow each other
    texts, connector = unit(12 * templates, 20), random_connector(1, 20, 24, 16)
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
    task = tasks_of(folder_of(tmp_path / "e", [{"label": "x"}, {"label": "y"}]), flags)["zeroshot"]
    texts = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])

    def connector(batch):  # lengths that the mean of unit vectors must not feel
        return batch * torch.tensor([1.0, 100, 1])

    found = map_texts(texts, connector, task.templates)
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
    task = tasks_of(folder_of(tmp_path / "e", rows))["retrieval"]
    pictures = max(picture) + 1
    assert f"{pictures} pictures, 119 different captions, 1 to 5 a picture" in task.protocol
    images = unit(pictures, 16)[picture]
    texts = images + 2.5 * unit(120, 16, seed=1)
    texts[40] = texts[3]
    found = score(task, texts, images, torch.nn.Identity())
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
    task = tasks_of(folder_of(tmp_path / "e", rows))["retrieval"]
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


def test_vqa_by_hand(tmp_path):
    """The nearest of a row's own choices counts, whatever other rows offer; a tie is no answer."""
    asked = [
        {"question": "what is it", "answer": "a", "choices": ["a", "b"]},
        {"question": "what is it", "answer": "b", "choices": ["a", "b", "c"]},
        {"question": "and now", "answer": "c", "choices": ["c", "d"]},
        {"question": "and now", "answer": "d", "choices": ["d", "c", "d"]},
    ]
    found = tasks_of(folder_of(tmp_path / "e", asked))
    assert list(found) == ["vqa"]  # a question is no caption
    task = found["vqa"]
    assert task.texts == ("and now c", "and now d", "what is it a", "what is it b", "what is it c")
    assert "4 questions, 2 to 3 choices" in task.protocol
    assert task.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    texts = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [1, 0], [0, 1]])  # the first two cannot be told apart
    images = torch.tensor(
        [[0.1, 1], [0.1, 1], [1, 0], [1, 0]]
    )  # nearest to both first ones is c, which one may not say
    assert score(task, texts, images, torch.nn.Identity()).units.tolist() == [1, 0, 0, 0]
    images[1] = torch.tensor([1.0, 0])
    result = score(task, texts, images, torch.nn.Identity())
    assert result.units.tolist() == [1, 1, 0, 0] and result.metrics == {"acc": 0.5} and result.value == 0.5


@pytest.mark.parametrize("kind", ["retrieval", "zeroshot", "vqa"])
def test_a_collapsed_connector_scores_nothing(kind, tmp_path):
    task = tasks_of(folder_of(tmp_path / "e", [{"label": f"{k % 10}"} for k in range(60)]))[kind]
    texts = unit(len(task.texts) or 60, 8)
    found = score(task, texts, unit(60, 12), lambda batch: torch.eye(12)[:1].expand(len(batch), -1))
    assert found.metrics.get("image_retrieval_recall@1", 0) <= 1 / 60  # the nearest text of all equal ones: none
    assert found.metrics.get("text_retrieval_recall@10", 0) == found.metrics.get("acc", 0) == 0
    assert found.metrics.get("acc1", 0) == found.metrics.get("acc5", 0) == 0
    with pytest.raises(vlm.BadInput, match="not finite"):
        score(task, texts, unit(60, 12), lambda batch: torch.full((len(batch), 12), torch.nan))


def test_shuffled_captions_score_at_chance(tmp_path):
    """Each kind finds everything where pictures and texts belong together, and what guessing finds where they do not."""
    rows = [{"label": f"{k % 10}", "split": "test"} for k in range(2000)]
    tasks = tasks_of(folder_of(tmp_path / "e", rows))
    shuffled = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    latent = unit(2000, 64)
    for kind, task in tasks.items():
        if kind == "retrieval":
            texts, images = latent, latent + 0.01 * unit(2000, 64, seed=1)
        else:
            texts = unit(len(task.texts), 64)
            images = texts[task.right] + 0.3 * unit(2000, 64, seed=1)
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
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, vlm, evaluate
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
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


# ----------------------------------------------------------------------------------------------- rows and protocol


def test_the_sample_without_any_weights(run, ridge):
    """The shipped prompts are all that it takes, and they rank pretrained encoders above chance and the control."""
    result = run("evaluate.py", ridge)
    assert result.code == 0, result.err
    tasks = tasks_of(SAMPLE / "embeddings")
    assert list(tasks) == ["retrieval", "zeroshot", "vqa"]
    data = tasks["vqa"].data
    for task in tasks.values():
        assert "test split" in task.protocol and {data.rows[i]["split"] for i in task.rows.tolist()} == {"test"}
        assert len(task.rows) == 384
        values = {}
        for path in (ridge / "connectors").glob("*.pt"):
            image, _, text, state = vlm.read_connector(path)
            connector = vlm.init_modality_connector(state["weight"].shape[1], [], state["weight"].shape[0])
            connector.load_state_dict(state)
            texts = text_inputs(task, text)
            values[image, text] = score(task, texts, image_inputs(task, image), connector).value
        control = max(value for (image, _), value in values.items() if image == "control")
        assert min(value for (image, _), value in values.items() if image in PRETRAINED) > 1.3 * control > task.chance
    shipped = [path for path in (SAMPLE / "embeddings" / "prompts").iterdir()]
    asked = {(name, task.texts) for task in tasks.values() if task.texts for name in ("minilm_l6", "mpnet")}
    assert len(shipped) >= len(asked) == 4 and sum(path.stat().st_size for path in sorted(shipped)[:4]) < 5e5


def test_which_rows(tmp_path):
    rows = [{"label": f"{k % 3}", "split": ("train", "val")[k % 4 == 0]} for k in range(40)]
    folder = folder_of(tmp_path / "own", rows)
    own = tasks_of(folder, run_seed=0)["zeroshot"]
    assert own.rows.tolist() == list(range(0, 40, 4)) and "also chose the connectors" in own.protocol
    foreign = tasks_of(folder)["zeroshot"]
    assert foreign.rows.tolist() == list(range(40)) and "all rows" in foreign.protocol
    bare = folder_of(tmp_path / "bare", [{}] * 40)
    for seed in (0, 1):
        expected = split_rows(Embeddings(bare), seed)[1]
        assert torch.equal(tasks_of(bare, run_seed=seed)["retrieval"].rows, expected)
    marked = folder_of(tmp_path / "set", [{"split": "test"}] * 40, protocol="COCO as it was read")
    assert tasks_of(marked, run_seed=0)["retrieval"].protocol.startswith("COCO as it was read; 40 pictures, 40 ")


def test_pictures_with_several_captions_are_classified_once(tmp_path):
    rows = [{"image": f"{k // 2}", "label": f"{k // 2 % 4}"} for k in range(40)]
    tasks = tasks_of(folder_of(tmp_path / "e", rows))
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


def test_the_eighty_templates():
    """The sha256 of the published list in alphabetical order, one a line."""
    lines = sorted(TEMPLATES["80"])
    assert len(set(lines)) == 80 and TEMPLATES["1"] == ("a photo of a {}",)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == EIGHTY


# -------------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_embedded_once(tmp_path, weights, monkeypatch):
    folder = folder_of(tmp_path / "e", [{"label": "red_fox"}, {"label": "teapot"}], minilm_l6=unit(2, 384))
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


def test_prompts_of_other_weights_are_refused(tmp_path, weights):
    folder = folder_of(tmp_path / "e", [{"label": "a"}, {"label": "b"}], minilm_l6=unit(2, 384))
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


# -------------------------------------------------------------------------------------------------- the standard sets


@pytest.fixture
def files(pictures, tmp_path):
    """files("val2017/7.jpg", ...) puts real pictures there; files({"a.json": ...}) writes JSON or text. All in set/."""
    source = itertools.cycle(sorted(pictures[0].glob("*.webp")))

    def files(*names):
        for name in names:
            for path, content in name.items() if isinstance(name, dict) else [(name, None)]:
                path = tmp_path / "set" / path
                path.parent.mkdir(parents=True, exist_ok=True)
                if content is None:
                    path.write_bytes(next(source).read_bytes())
                else:
                    path.write_text(content if isinstance(content, str) else json.dumps(content))

    (tmp_path / "set").mkdir()
    return files


@pytest.fixture
def embed(run, tmp_path):
    """embed("coco") embeds set/ by the command line: its rows, and the task of each kind."""

    def embed(name):
        result = run("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'set'}")
        assert result.code == 0, result.err
        assert f"evaluate.py RUN --task {name}=embeddings/{name}" in result.out
        folder = tmp_path / "embeddings" / name
        rows = read_jsonl(folder / "rows.jsonl")
        assert {row["split"] for row in rows} == {"test"}
        return rows, tasks_of(folder)

    return embed


def test_coco(files, embed):
    notes = [{"id": 100 - k, "image_id": k % 3, "caption": f"caption, {k}"} for k in range(18)]
    images = [{"id": k, "file_name": f"{k:012}.jpg"} for k in range(3)]
    files({"annotations/captions_val2017.json": {"images": images, "annotations": notes}})
    files(*(f"val2017/{k:012}.jpg" for k in range(3)))
    rows, tasks = embed("coco")
    assert [row["caption"] for row in rows if row["image"] == "000000000000.jpg"] == [
        f"caption, {k}" for k in (15, 12, 9, 6, 3)
    ]
    assert list(tasks) == ["retrieval"]
    assert (
        "val2017, the first 5 captions of a picture; 3 pictures, 15 different captions, 5 a picture"
        in tasks["retrieval"].protocol
    )


KARPATHY = {
    "images": [
        {"filename": f"{k}.jpg", "split": split, "sentences": [{"raw": f"a dog, a cat {k} {j}"} for j in range(5)]}
        for k, split in enumerate(["train", "test", "val", "test"])
    ]
}


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k"])
def test_flickr_by_karpathys_split(files, embed, name):
    files({f"dataset_{name}.json": KARPATHY, "captions.txt": "image,caption\n"}, *(f"Images/{k}.jpg" for k in range(4)))
    rows, tasks = embed(name)
    assert [(r["image"], r["caption"]) for r in rows] == [
        (f"{k}.jpg", f"a dog, a cat {k} {j}") for k in (1, 3) for j in range(5)
    ]
    assert f"{name}, Karpathy's test split; 2 pictures, 10 different" in tasks["retrieval"].protocol


def test_flickr_quoted_commas(files, embed, tmp_path):
    """A header, commas and quotes within captions, and a row that was not quoted: it is cut and so set aside."""
    table = 'image,caption\n0.jpg,"A dog , a ""cat"" , and a bird ."\n0.jpg,A plain one .\n1.jpg,Half , a caption .\n2.jpg,Two\n'
    files({"captions.txt": table}, *(f"Images/{k}.jpg" for k in range(3)))
    rows, tasks = embed("flickr8k")
    assert [row["caption"] for row in rows] == ['A dog , a "cat" , and a bird .', "A plain one .", "Two"]
    (bad,) = read_jsonl(tmp_path / "embeddings/flickr8k/quarantine.jsonl")
    assert bad["key"] == "1.jpg"
    assert "full set and NOT Karpathy's" in tasks["retrieval"].protocol


def test_flickr30k_tables(files, embed, run, tmp_path):
    bars = 'image_name| comment_number| comment\n0.jpg| 0| "A" dog , one\n0.jpg| 1| Two\n1.jpg| 4   No bar .\n1.jpg| 1| Three\n'
    files({"results.csv": bars}, "flickr30k-images/0.jpg", "flickr30k-images/1.jpg")
    rows, tasks = embed("flickr30k")
    assert [(r["image"], r["caption"]) for r in rows] == [
        ("0.jpg", '"A" dog , one'),
        ("0.jpg", "Two"),
        ("1.jpg", "Three"),
    ]
    assert "NOT Karpathy's" in tasks["retrieval"].protocol
    records = [
        {"raw": json.dumps([f"a, {k}", f"b {k}"]), "sentids": "[]", "split": split, "filename": f"{k}.jpg", "img_id": k}
        for k, split in enumerate(("train", "test"))
    ]
    write_csv(tmp_path / "set" / "flickr_annotations_30k.csv", records)
    result = run("embed.py", *TINY, "--data", f"flickr30k:{tmp_path / 'set'}", "--out", "e")
    assert result.code == 0, result.err
    assert [r["caption"] for r in read_jsonl(tmp_path / "e" / "rows.jsonl")] == ["a, 1", "b 1"]


def vqa_questions(kinds=("what", "what", "how", "how"), count=6):
    """Questions of two first words; the majority answer is never the first one given."""
    return [
        (10 * k, k, f"{kinds[k % 4].capitalize()} is {k}?", ["rare", f"{kinds[k % 4]}{k}", f"{kinds[k % 4]}{k}"])
        for k in range(4 * count)
    ]


def check_choices(rows, tasks):
    for k, row in enumerate(rows):
        kind = ("what", "what", "how", "how")[k % 4]
        assert row["answer"] == f"{kind}{k}" and row["question"] == f"{kind.capitalize()} is {k}?"
        assert len(set(row["choices"])) == 4 and row["answer"] in row["choices"]
        assert all(choice.startswith(kind) for choice in row["choices"])  # the same first word, and nobody's "rare"
    assert len({tuple(row["choices"]) for row in rows}) == len(rows) and list(tasks) == ["vqa"]
    places = {row["choices"].index(row["answer"]) for row in rows}
    assert len(places) > 2  # the right one does not stand at a fixed place
    assert f"{len(rows)} questions, 4 choices, question and answer as text" in tasks["vqa"].protocol
    assert tasks["vqa"].chance == 0.25 and any(text.startswith("What is 0? ") for text in tasks["vqa"].texts)


def test_okvqa(files, embed):
    asked = vqa_questions()
    questions = [{"question_id": i, "image_id": image, "question": question} for i, image, question, _ in asked]
    answers = [
        {"question_id": i, "image_id": image, "answers": [{"answer": a, "raw_answer": "x"} for a in answers]}
        for i, image, _, answers in reversed(asked)
    ]
    files({"OpenEnded_mscoco_val2014_questions.json": {"questions": questions}})
    files({"mscoco_val2014_annotations.json": {"annotations": answers}})
    files(*(f"val2014/COCO_val2014_{k:012}.jpg" for k in range(24)))
    rows, tasks = embed("okvqa")
    check_choices(rows, tasks)
    assert "OK-VQA val2014" in tasks["vqa"].protocol and "first word" in tasks["vqa"].protocol


def test_textvqa(files, embed):
    notes = [
        {"question_id": i, "image_id": f"0a{image}", "question": question, "answers": answers, "set_name": "val"}
        for i, image, question, answers in vqa_questions()
    ]
    files({"TextVQA_0.5.1_val.json": {"data": notes}}, *(f"train_images/0a{k}.jpg" for k in range(24)))
    check_choices(*embed("textvqa"))


@pytest.mark.parametrize("below", ["val/", ""])
def test_imagenet(files, embed, below):
    files(
        *(
            f"{below}{wnid}/ILSVRC2012_val_{k}.JPEG"
            for k in range(2)
            for wnid in ("n02012849", "n03126707", "n01440764")
        )
    )
    rows, tasks = embed("imagenet1k")
    assert [row["label"] for row in rows] == ["tench"] * 2 + ["crane bird"] * 2 + [
        "crane"
    ] * 2  # n...: fish, bird, machine
    assert tasks["zeroshot"].texts == ("a photo of a crane", "a photo of a crane bird", "a photo of a tench")
    assert (
        "retrieval" not in tasks
        and "ImageNet-1k validation, torchvision's class names; 6 pic" in tasks["zeroshot"].protocol
    )


def test_imagenet_names_belong_to_their_ids():
    """torchvision's list is in the order of timm's ids: nearly every name is found in WordNet's words for the id."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    info, names = ImageNetInfo(), ResNet50_Weights.DEFAULT.meta["categories"]
    alike = [
        bool(
            set(name.lower().replace("-", " ").split())
            & set(info.index_to_description(k).lower().replace(",", "").replace("-", " ").split())
        )
        for k, name in enumerate(names)
    ]
    assert len(names) == 1000 == len(set(names)) and sum(alike) > 900


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(run, embed, monkeypatch, tmp_path, name):
    """Files of the published form, six pictures long, whose sums stand in for the published ones."""
    from torchvision import datasets

    kind = getattr(datasets, name.upper())
    folder, labels = tmp_path / "set" / kind.base_folder, {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    folder.mkdir(parents=True)
    classes = ["aquarium_fish"] + [f"class{k}" for k in range(9)]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)

    def write(file, value):
        (folder / file).write_bytes(pickle.dumps(value))
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    batch = {"data": pixels, labels: [0, 1, 2, 0, 1, 2]}
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [write(file, batch) for file, _ in getattr(kind, part)])
    file, total = write(kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": total})
    rows, tasks = embed(name)
    assert [row["label"] for row in rows] == ["aquarium_fish", "class0", "class1"] * 2
    picture = np.asarray(vlm.open_image(tmp_path / "embeddings" / name / "images" / rows[4]["image"]))
    assert np.array_equal(picture, pixels[4].reshape(3, 32, 32).transpose(1, 2, 0))
    assert tasks["zeroshot"].texts[0] == "a photo of a aquarium fish"
    assert tasks["zeroshot"].protocol.startswith(f"CIFAR-{name[5:]} test; 6 pictures, 3 classes")
    (folder / kind.meta["filename"]).write_bytes(b"other")  # what is not as published is never unpickled
    again = run("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'set'}", "--out", "e")
    assert again.code == 1 and "expected cifar-10" in again.err and "Traceback" not in again.err


def test_questions_of_your_own(run, pictures):
    """A table with questions needs no captions; a question is part of what seals the folder."""
    folder, rows = pictures
    table = [
        {"image": r["image"], "question": "what, then?", "answer": "a", "choices": '["a", "b, c"]'} for r in rows[:4]
    ]
    table[3]["choices"] = "a|b"
    write_csv(folder / "captions.csv", table)
    assert run("embed.py", *TINY, "--data", folder, "--out", "e").code == 0
    out = folder.parent / "e"
    found = read_jsonl(out / "rows.jsonl")
    assert [row["choices"] for row in found] == [["a", "b, c"]] * 3 and found[0]["caption"] == "what, then? a"
    assert [row["key"] for row in read_jsonl(out / "quarantine.jsonl")] == ["3.webp"]
    assert tasks_of(out)["vqa"].texts == ("what, then? a", "what, then? b, c")
    found[1]["answer"] = "b, c"
    write_jsonl(out / "rows.jsonl", found)
    with pytest.raises(vlm.BadInput, match="have changed since the folder was sealed"):
        Embeddings(out)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name, says",
    [
        ("imagenet1k", "val/n01440764/*.JPEG"),
        ("cifar10", "cifar-10-batches-py/"),
        ("cifar100", "cifar-100-python/"),
        ("coco", "annotations/captions_val2017.json"),
        ("flickr8k", "dataset_flickr8k.json or flickr_annotations_8k.csv or captions.txt"),
        ("flickr30k", "dataset_flickr30k.json or flickr_annotations_30k.csv"),
        ("okvqa", "OpenEnded_mscoco_val2014_questions.json"),
        ("textvqa", "TextVQA_0.5.1_val.json"),
    ],
)
def test_a_set_without_its_files(refused, tmp_path, name, says):
    refused("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'none'}", says="no such folder")
    (tmp_path / "set").mkdir()
    refused("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'set'}", says=["expected", says, str(tmp_path / "set")])


def test_a_set_in_another_form(refused, files, tmp_path):
    files({"annotations/captions_val2017.json": {"images": []}})
    refused("embed.py", *TINY, "--data", f"coco:{tmp_path / 'set'}", says=["coco:", "not as published", "annotations"])
    files({"dataset_flickr8k.json": {"images": []}}, "Images/0.jpg")
    refused("embed.py", *TINY, "--data", f"flickr8k:{tmp_path / 'set'}", says=["flickr8k:", "hold no row"])


def test_nothing_to_evaluate(refused, ridge, tmp_path):
    one = folder_of(tmp_path / "one", [{"label": "dog", "caption": "dog"}] * 30)
    line = refused("evaluate.py", ridge, "--task", f"one={one}", says=["--task one=", "captions are the labels"])
    assert "one class (dog)" in line.err
    refused("evaluate.py", ridge, "--task", f"one={tmp_path / 'none'}", says="no such embedding folder")
    single = folder_of(tmp_path / "single", [{"image": "a.png"}] * 3)
    refused("evaluate.py", ridge, "--task", f"x={single}", says="1 pictures and 3 captions leave nothing to find")


def test_bad_choices_and_templates(refused, ridge, tmp_path):
    for k, choices in enumerate(([], ["b", "c"], ["a", "a"], "a")):
        folder = folder_of(tmp_path / f"{k}", [{"question": "q", "answer": "a", "choices": choices}])
        refused("evaluate.py", ridge, "--task", f"x={folder}", says=["rows.jsonl: row 0", "choices"])
    for text, says in (("a photo", "one {}"), ("{} {}", "one {}"), ("", "no lines")):
        (tmp_path / "t.txt").write_text(text)
        refused("evaluate.py", ridge, "--templates", tmp_path / "t.txt", says=["--templates", says])
    refused("evaluate.py", ridge, "--templates", "79", says=["--templates 79", "1, 80 or a text file"])


def test_a_task_without_the_runs_encoder(refused, ridge, tmp_path):
    folder = folder_of(tmp_path / "e", [{}] * 20, efflite0=unit(20, 1280), minilm_l6=unit(20, 384))
    refused(
        "evaluate.py", ridge, "--task", f"x={folder}", says=["has efflite0, minilm_l6 but not ", "embed.py --encoder"]
    )


def test_missing_weights_of_a_prompts_encoder(refused, ridge, tmp_path, weights):
    """80 prompts of the sample are not shipped: the line says which encoder's weights to give."""
    copy = tmp_path / "sample"
    copy.mkdir()
    for path in (SAMPLE / "embeddings").iterdir():
        if path.is_file():
            (copy / path.name).symlink_to(path)
    line = refused("evaluate.py", ridge, "--task", f"x={copy}", "--templates", "80", says="--weights ")
    assert "cannot load the weights of m" in line.err.splitlines()[-1]
    refused("evaluate.py", ridge, "--task", f"x={copy}", "--weights", f"minilm_l6={weights['efflite0']}", says="folder")
