"""CLIP_benchmark's own functions on the stitched model, with no glue but a data loader: the digits of evaluate.py."""

import shutil

import pytest
import torch
from helpers import SAMPLE, sample_captions, write_csv

import vlm

zeroshot_retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
zeroshot_classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")

NAME = "efflite0_mlp0_minilm_l6"


@pytest.fixture
def rows(tmp_path):
    """Ninety captioned pictures of the sample's test rows, in a table."""
    rows = [row for row in sample_captions() if row["split"] == "test"][::4][:90]
    table = [{"image": str(SAMPLE / row["image"]), "caption": row["caption"], "label": row["label"]} for row in rows]
    return write_rows(tmp_path, table)


def write_rows(folder, rows):
    write_csv(folder / "captions.csv", rows)
    return rows


def evaluated(run, weights, sample_ridge, *flags):
    """{task: metrics} of the connector that evaluate.py prints, on the table in this folder."""
    given = [f"{name}={path}" for name, path in weights.items()]
    embed = ("--encoder", "efflite0", "minilm_l6", "--weights", *given, "--device", "cpu", "--dtype", "float32")
    embedded = run("embed.py", *embed, "--data", "captions.csv", "--out", "e")
    assert embedded.code == 0, embedded.err
    shutil.copytree(sample_ridge / "connectors", "connectors", ignore=lambda _, names: set(names) - {f"{NAME}.pt"})
    text = [each for each in given if each.startswith("minilm_l6")]
    task = ("--task", "own=e", "--weights", *text, "--bootstrap", "10", "--device", "cpu")
    done = run("evaluate.py", "connectors", *task, *flags)
    assert done.code == 0, done.err
    records = vlm.read_json("report/results.json")["results"]
    return {record["task"]: record for record in records}


class Pictures(list):
    """A data set as CLIP_benchmark has them: [(path, what belongs to the picture)], and the names of its classes."""

    classes = ()


def loader(model, pictures):
    """([B, 3, H, W], what belongs to each picture: captions, or the index of its class)."""

    def collate(part):
        pixels = torch.stack([model.preprocess(vlm.open_image(path)) for path, _ in part])
        values = [value for _, value in part]
        return pixels, torch.tensor(values) if pictures.classes else values

    return torch.utils.data.DataLoader(pictures, batch_size=32, collate_fn=collate)


def recalls(model, rows):
    """CLIP_benchmark's recalls; a picture comes once, with the list of its captions."""
    captions = {}
    for row in rows:
        captions.setdefault(row["image"], []).append(row["caption"])
    pictures = loader(model, Pictures(captions.items()))
    return zeroshot_retrieval.evaluate(model, pictures, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])


def test_the_digits_are_those_of_evaluate(run, rows, weights, sample_ridge):
    """Where no caption repeats, with and without the flag."""
    ours = evaluated(run, weights, sample_ridge)
    model = vlm.get_vlm_from_checkpoint(f"connectors/{NAME}.pt", "cpu", weights=weights)
    for name, value in recalls(model, rows).items():
        assert value == pytest.approx(ours["zeroshot_retrieval"]["metrics"][name], abs=1e-6), name

    classes = sorted({row["label"] for row in rows})
    pictures = Pictures((row["image"], classes.index(row["label"])) for row in rows)
    pictures.classes = classes
    names = [label.replace("_", " ") for label in classes]
    # Its `evaluate`, less its `accuracy`, which takes no numpy from 2.4 on.
    classifier = zeroshot_classification.zero_shot_classifier(
        model, model.tokenizer, names, ["a photo of a {c}"], "cpu", amp=False
    )
    logits, labels = zeroshot_classification.run_classification(
        model, classifier, loader(model, pictures), "cpu", amp=False
    )
    best = logits.argmax(1)
    found = {
        "acc1": (best == labels).float().mean().item(),
        "mean_per_class_recall": zeroshot_classification.balanced_accuracy_score(labels, best),
    }
    for name, value in found.items():
        assert value == pytest.approx(ours["zeroshot_classification"]["metrics"][name], abs=1e-6), name


def test_repeated_captions_are_counted_apart_if_asked_for(run, rows, weights, sample_ridge, tmp_path):
    """A caption of four pictures: merged it is right for each; apart, as CLIP_benchmark counts, for one."""
    rows[1]["caption"] = rows[2]["caption"] = rows[3]["caption"] = rows[0]["caption"]
    rows.append({"image": rows[4]["image"], "caption": "a second caption of a picture", "label": rows[4]["label"]})
    write_rows(tmp_path, rows)
    merged = evaluated(run, weights, sample_ridge)["zeroshot_retrieval"]
    shutil.rmtree("connectors")
    apart = evaluated(run, weights, sample_ridge, "--clip-benchmark-protocol")["zeroshot_retrieval"]
    assert "88 different captions" in merged["protocol"]
    assert "91 captions, equal ones counted apart as in CLIP_benchmark" in apart["protocol"]

    model = vlm.get_vlm_from_checkpoint(f"connectors/{NAME}.pt", "cpu", weights=weights)
    theirs = recalls(model, rows)
    for k in (1, 5, 10):
        name = f"image_retrieval_recall@{k}"
        assert theirs[name] == pytest.approx(apart["metrics"][name], abs=1e-6), name
        name = f"text_retrieval_recall@{k}"  # four captions tie: a tie counts against the match, and theirs draws
        assert 0 <= theirs[name] - apart["metrics"][name] < 4.5 / 90, name
    assert merged["metrics"] != apart["metrics"]
