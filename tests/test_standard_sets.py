"""The standard sets, embedded by the command line from their published files; tables of one's own with questions."""

import hashlib
import itertools
import json
import pickle

import numpy as np
import pytest
from helpers import TINY, tasks_of, write_csv

import vlm
from hyma.embeddings import Embeddings
from hyma.files import read_jsonl, write_jsonl


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


# ------------------------------------------------------------------------------------------------------------ retrieval


def test_coco_has_five_captions_of_a_picture(files, embed):
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
        "val2017, the first 5 captions of a picture, NOT WHOLE: 3 of its 5,000 pictures; "
        "3 pictures, 15 different captions, 5 a picture"
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
    assert (
        f"{name}, Karpathy's test split, NOT WHOLE: 2 of its 1,000 pictures; 2 pictures, 10 different"
        in tasks["retrieval"].protocol
    )


def test_flickr8k_captions_with_quoted_commas_stay_whole(files, embed, tmp_path):
    """A header, commas and quotes within captions, and a row that was not quoted: it is cut and so set aside."""
    table = 'image,caption\n0.jpg,"A dog , a ""cat"" , and a bird ."\n0.jpg,A plain one .\n1.jpg,Half , a caption .\n2.jpg,Two\n'
    files({"captions.txt": table}, *(f"Images/{k}.jpg" for k in range(3)))
    rows, tasks = embed("flickr8k")
    assert [row["caption"] for row in rows] == ['A dog , a "cat" , and a bird .', "A plain one .", "Two"]
    (bad,) = read_jsonl(tmp_path / "embeddings/flickr8k/quarantine.jsonl")
    assert bad["key"] == "1.jpg"
    assert "full set and NOT Karpathy's" in tasks["retrieval"].protocol


def test_flickr30k_is_read_from_either_table(files, embed, run, tmp_path):
    table = 'image_name| comment_number| comment\n0.jpg| 0| "A" dog , one\n0.jpg| 1| Two\n1.jpg| 4   No bar .\n1.jpg| 1| Three\n'
    files({"results.csv": table}, "flickr30k-images/0.jpg", "flickr30k-images/1.jpg")
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


# ------------------------------------------------------------------------------------------------------ multiple choice


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


def test_okvqa_becomes_multiple_choice(files, embed):
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


def test_textvqa_becomes_multiple_choice(files, embed):
    notes = [
        {"question_id": i, "image_id": f"0a{image}", "question": question, "answers": answers, "set_name": "val"}
        for i, image, question, answers in vqa_questions()
    ]
    files({"TextVQA_0.5.1_val.json": {"data": notes}}, *(f"train_images/0a{k}.jpg" for k in range(24)))
    check_choices(*embed("textvqa"))


def test_a_table_of_your_own_may_hold_questions(run, pictures):
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


# ------------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("below", ["val/", ""])
def test_imagenet_classes_have_names_that_are_all_different(files, embed, below):
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
        and "ImageNet-1k validation, torchvision's class names but for one, NOT WHOLE: 6 of its 50,000 pictures; 6 pic"
        in tasks["zeroshot"].protocol
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
def test_cifar_is_unpickled_only_as_published(run, embed, monkeypatch, tmp_path, name):
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
    assert tasks["zeroshot"].protocol.startswith(
        f"CIFAR-{name[5:]} test, NOT WHOLE: 6 of its 10,000 pictures; 6 pictures, 3 classes"
    )
    (folder / kind.meta["filename"]).write_bytes(b"other")  # what is not as published is never unpickled
    again = run("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'set'}", "--out", "e")
    assert again.code == 1 and "expected cifar-10" in again.err and "Traceback" not in again.err


# ------------------------------------------------------------------------------------------------------------ bad input


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
def test_a_set_without_its_files_is_refused(refused, tmp_path, name, says):
    refused("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'none'}", says="no such folder")
    (tmp_path / "set").mkdir()
    refused("embed.py", *TINY, "--data", f"{name}:{tmp_path / 'set'}", says=["expected", says, str(tmp_path / "set")])


def test_a_set_in_another_form_is_refused(refused, files, tmp_path):
    files({"annotations/captions_val2017.json": {"images": []}})
    refused("embed.py", *TINY, "--data", f"coco:{tmp_path / 'set'}", says=["coco:", "not as published", "annotations"])
    files({"dataset_flickr8k.json": {"images": []}}, "Images/0.jpg")
    refused("embed.py", *TINY, "--data", f"flickr8k:{tmp_path / 'set'}", says=["flickr8k:", "hold no row"])
