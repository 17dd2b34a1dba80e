"""search.py by its command line, on the sample: words, pictures, classes, bad input, and the page in a real browser."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from browser import Browser, find_chromium
from helpers import ROOT, SAMPLE, make_embedding_folder, unit_vectors

import vlm
from hyma import search_index
from hyma.runs import read_run
from hyma.search_index import VectorIndex
from hyma.searching import Search, read_classes
from vlm import BadInput

PAIR = ("--pair", "efflite0:minilm_l6", "--device", "cpu")
PIG = SAMPLE / "images" / "animals" / "a_simple_pig_01.webp"


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def given(weights):
    """--weights of the two encoders whose weights are here."""
    return ("--weights", *[f"{name}={path}" for name, path in weights.items()])


def results(out):
    """[(score, the rest of the line)] of a table that was printed."""
    lines = re.findall(r"^ *\d+ +(-?\d\.\d{3})  (.*)$", out, re.MULTILINE)
    return [(float(score), rest) for score, rest in lines]


def may_not_be_built(*_, **__):
    raise AssertionError("this encoder is not needed")


# ------------------------------------------------------------------------------------------------------- what is found


def test_words_find_pictures_without_the_image_encoder(run, sample_ridge, given, weights, monkeypatch):
    monkeypatch.setattr(vlm, "ImageEncoder", may_not_be_built)
    done = run("search.py", sample_ridge, "a red car", *PAIR, *given, "--top", 5, "--out", "results.html")
    assert done.code == 0, done.err
    found = results(done.out)
    assert len(found) == 5 and found == sorted(found, key=lambda line: -line[0])
    assert "car" in found[0][1].lower() and "efflite0:minilm_l6, 2650 pictures of" in done.out

    search = Search(read_run(sample_ridge), weights=weights, device="cpu")
    pair = ("efflite0", "minilm_l6")
    text = search.encode_texts(pair, ["a red car"])
    expected = F.normalize(search.data.load("efflite0").float(), dim=1) @ text[0]
    assert [score for score, _ in found] == pytest.approx(expected.topk(5).values.tolist(), abs=6e-4)

    page = Path("results.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5 and "a red car" in page
    assert not re.search(r"""(src|href)=["']?(https?:|/)""", page)  # nothing from elsewhere


def test_a_picture_finds_captions_without_the_text_encoder(run, sample_ridge, given, monkeypatch):
    monkeypatch.setattr(vlm, "TextEncoder", may_not_be_built)
    done = run("search.py", sample_ridge, "--image", PIG, *PAIR, *given, "--top", 3)
    assert done.code == 0, done.err
    assert len(results(done.out)) == 3 and "A simple pig" in results(done.out)[0][1]


def test_classes_of_a_picture_and_of_the_corpus(run, sample_ridge, given, tmp_path):
    done = run("search.py", sample_ridge, "--image", PIG, "--classes", "cat", "pig", "red car", *PAIR, *given)
    assert done.code == 0, done.err
    assert [name for _, name in results(done.out)][0] == "pig" and len(results(done.out)) == 3
    (tmp_path / "classes.txt").write_text("pig\n\n red car\nred car\n")
    done = run("search.py", sample_ridge, "--classes", "classes.txt", *PAIR, *given, "--top", 2)
    assert done.code == 0, done.err
    counts = [int(count) for count in re.findall(r": (\d+) of 2650 pictures are nearest to it", done.out)]
    assert sum(counts) == 2650 and len(counts) == 2 and len(results(done.out)) == 4


def test_another_folder_is_searched_and_pictures_outside_of_it_are_not_shown(run, sample_ridge, given, tmp_path):
    secret = tmp_path / "secret.webp"
    shutil.copy(PIG, secret)
    rows = [{"image": str(secret)}, {"image": "../secret.webp"}, {"image": "inside.webp", "caption": "\x1b[31mred"}]
    rows.append({"image": "deleted\x1b[2J.webp"})
    vectors = {"efflite0": unit_vectors(4, 1280), "minilm_l6": unit_vectors(4, 384)}
    folder = make_embedding_folder(tmp_path / "other", rows, **vectors)
    shutil.copy(PIG, folder / "inside.webp")
    shutil.copytree(sample_ridge / "connectors", "connectors")
    arguments = ("connectors", "a pig", *PAIR, *given, "--data", folder, "--out", "results.html")
    done = run("search.py", *arguments)
    assert done.code == 0, done.err
    assert Path("results.html").read_text().count("data:image/jpeg;base64,") == 1
    assert "3 of 4 pictures are not in" in done.err and "--pictures FOLDER" in done.err
    assert len(results(done.out)) == 4 and "\x1b" not in done.out


def test_a_picture_that_is_another_by_now_is_not_shown(run, sample_ridge, given, tmp_path):
    """By its digest: --pictures may name a folder that has others of the same names."""
    digest = hashlib.sha256(PIG.read_bytes()).hexdigest()
    rows = [{"image": "pig.webp", "image_sha256": digest}, {"image": "cat.webp", "image_sha256": digest}]
    vectors = {"efflite0": unit_vectors(2, 1280), "minilm_l6": unit_vectors(2, 384)}
    folder = make_embedding_folder(tmp_path / "other", rows, **vectors)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(PIG, moved / "pig.webp")
    shutil.copy(next(path for path in PIG.parent.iterdir() if path != PIG), moved / "cat.webp")
    shutil.copytree(sample_ridge / "connectors", "connectors")
    arguments = ("connectors", "a pig", *PAIR, *given, "--data", folder, "--pictures", moved, "--out", "results.html")
    done = run("search.py", *arguments)
    assert done.code == 0, done.err
    assert "1 of 2 pictures are not in" in done.err and "as they were embedded" in done.err
    assert Path("results.html").read_text().count("data:image/jpeg;base64,") == 1


def test_faiss_finds_what_the_matrix_product_finds(monkeypatch):
    pytest.importorskip("faiss")
    vectors, queries = unit_vectors(5000, 64).half(), unit_vectors(7, 64, seed=1)
    monkeypatch.setattr(search_index, "FAISS_FROM", 1000)
    monkeypatch.setattr(search_index, "AT_ONCE", 999)
    index = VectorIndex(vectors)
    scores, places = index.nearest(queries, 10)
    assert index.faiss_index is None  # which a first question does not pay for
    again = index.nearest(queries, 10)
    assert index.faiss_index is not None
    torch.testing.assert_close(again[0], scores, atol=1e-3, rtol=0)
    assert (again[1] == places).float().mean() > 0.9
    whole = queries @ F.normalize(vectors.float(), dim=1).T
    torch.testing.assert_close(scores, whole.topk(10).values)
    assert VectorIndex(vectors[:4000]).nearest(queries, 5000)[0].shape == (7, 4000)


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_gives_one_line(refused, sample_ridge, given, tmp_path):
    refused("search.py", sample_ridge, " ", says="the words to search for are empty")
    refused("search.py", sample_ridge, says="what is to be found?")
    refused("search.py", sample_ridge, "a", "--image", PIG, says="not both")
    refused("search.py", sample_ridge, "a", "--serve", says="give none here")
    refused("search.py", sample_ridge, "a", "--top", 0, says="--top 0")
    refused("search.py", sample_ridge, "a", "--out", tmp_path, says="is a folder; name a file")
    refused("search.py", sample_ridge, "a", "--weights", "efflite0", says="expected NAME=PATH")
    refused("search.py", sample_ridge, "a", "--out", "no/x.html", says="there is no folder no that can be written to")
    refused("search.py", sample_ridge, "--classes", "gone.txt", says=("at least two", "gone.txt is one, and no file"))
    refused("search.py", sample_ridge, "--classes", "one", "one", says="there are 1")
    refused("search.py", sample_ridge, "a", "--pair", "eflite0:minilm_l6", says="Did you mean efflite0:minilm_l6?")
    refused("search.py", sample_ridge, "a", "--data", "moved", says=("moved: no such folder", "--data FOLDER"))
    refused("search.py", sample_ridge, "a", "--pictures", "moved", says="--pictures moved: no such folder")
    refused("search.py", sample_ridge, "--image", "no.webp", *PAIR, *given, says="no.webp: no such picture")
    refused("search.py", sample_ridge, "--image", ROOT / "vlm.py", *PAIR, *given, says="cannot be opened as a picture")
    refused("search.py", tmp_path / "nothing", "a", says="holds no run")
    refused("search.py", sample_ridge, "--serve", "--port", 0, says="--port 0")


def test_runs_that_cannot_be_searched_say_why(refused, sample_ridge, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(sample_ridge, copy)
    shutil.rmtree(copy / "connectors")
    refused("search.py", copy, "a", says=("no such file", "ranking.csv ranks"))
    shutil.copytree(sample_ridge / "connectors", tmp_path / "alone")
    refused("search.py", tmp_path / "alone", "a", says=("holds connectors alone", "--data FOLDER"))
    data = ("--data", SAMPLE / "embeddings")
    refused("search.py", tmp_path / "alone", "a", *data, says=("ranks no pair", "--pair"))


def test_a_connector_of_other_vectors_than_the_folder_s_is_refused(refused, sample_ridge, tmp_path):
    """By its card: of other weights, or of the same ones with another setting."""
    connectors = tmp_path / "connectors"
    for part, value, says in (
        ("weights_sha256", "0" * 64, "was trained on other weights of efflite0"),
        ("settings", {"crop_pct": 0.5}, ("that efflite0 made with crop_pct 0.5", "has them with 0.875")),
    ):
        shutil.copytree(sample_ridge / "connectors", connectors, dirs_exist_ok=True)
        path = connectors / "efflite0_mlp0_minilm_l6.json"
        card = json.loads(path.read_text())
        path.write_text(json.dumps(card | {part: card[part] | {"efflite0": value}}))
        refused("search.py", connectors, "a", *PAIR, "--data", SAMPLE / "embeddings", says=says)


def test_rows_that_cannot_be_used_and_cards_that_are_none(run, sample_ridge, given, tmp_path):
    """An adopted folder keeps rows without a caption in their place: they answer nothing. A stranger's card may hold anything."""
    rows = [{"image": "a.webp", "caption": "", "split": "left out"}, {"image": "b.webp", "caption": "a pig"}]
    vectors = {"efflite0": unit_vectors(2, 1280), "minilm_l6": unit_vectors(2, 384)}
    folder = make_embedding_folder(tmp_path / "other", rows, **vectors)
    shutil.copytree(sample_ridge / "connectors", "connectors")
    card = tmp_path / "connectors" / "efflite0_mlp0_minilm_l6.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"settings": ["x"], "weights_sha256": ["y"]}))
    done = run("search.py", "connectors", "--image", PIG, *PAIR, *given, "--data", folder)
    assert done.code == 0 and [rest.split()[-2:] for _, rest in results(done.out)] == [["a", "pig"]], done.err


def test_all_missing_weights_are_named_with_the_commands_that_bring_them(refused, sample_ridge):
    wanted = (
        "efflite1 and mpnet are missing",
        "hf download timm/tf_efficientnet_lite1.in1k --local-dir weights/efflite1",
    )
    wanted += (
        "hf download sentence-transformers/all-mpnet-base-v2",
        "add --weights efflite1=weights/efflite1 mpnet=weights/mpnet",
    )
    question = ("--image", PIG, "--classes", "cat", "dog", "--pair", "efflite1:mpnet", "--device", "cpu")
    refused("search.py", sample_ridge, *question, says=wanted)


def test_a_browser_that_is_not_there_is_no_failure(run, sample_ridge, given, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    done = run(
        "search.py", sample_ridge, *PAIR, *given, "--top", 2, "a", "red", "car"
    )  # words without quotes, after flags
    assert done.code == 0 and len(results(done.out)) == 2 and "\na red car\n" in done.out
    assert "no browser could be opened; the results are in " in done.err
    monkeypatch.setattr(webbrowser, "open", may_not_be_built)
    assert run("search.py", sample_ridge, "a red car", *PAIR, *given, "--no-open").code == 0


def test_gradio_missing_or_a_port_in_use_is_one_line(refused, sample_ridge, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused("search.py", sample_ridge, "--serve", says=("needs gradio", "pip install gradio"))
    monkeypatch.setitem(sys.modules, "gradio", object())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(
            "search.py", sample_ridge, "--serve", "--port", port, says=(f"--port {port}: is in use", "name another")
        )


def test_classes_are_words_or_lines(tmp_path):
    assert read_classes(["cat", " dog", "cat"]) == ["cat", "dog"]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInput, match="cannot be read as text"):
        read_classes([str(tmp_path / "binary")])


# ------------------------------------------------------------------------------------------------- the page of --serve

needs_browser = pytest.mark.skipif(
    not (find_chromium() and importlib.util.find_spec("gradio")), reason="needs Chromium and gradio"
)
TILES = "document.querySelectorAll('.results .tile').length"
FIELD = "#words textarea, #words input"


@pytest.fixture
def server(sample_ridge, given, tmp_path):
    """The address of a page that is served, by a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "search.py"), str(sample_ridge), *PAIR, *given, "--top", "4"]
    command += ["--serve", "--port", str(port)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith(f"http://127.0.0.1:{port} ")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(60)


def status(address):
    """The status of an answer."""
    import urllib.error
    import urllib.request

    try:
        return urllib.request.urlopen(address, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


@needs_browser
def test_the_page_in_a_browser(server, tmp_path):
    with Browser(tmp_path / "profile", server) as page:
        page.wait_for(f"!!document.querySelector('{FIELD}')")
        page.type(FIELD, "a red car")
        page.wait_for(f"{TILES} == 4 && !!document.querySelector('.results .problem')")  # the other pair has no weights
        shown = page.value("document.body.innerText")
        assert "efflite0:minilm_l6" in shown and "hf download sentence-transformers/all-mpnet-base-v2" in shown
        assert page.value("[...document.querySelectorAll('.results img')].every(image => image.naturalWidth > 0)")
        page.screenshot(tmp_path / "words.png")

        page.value("[...document.querySelectorAll('button[role=tab]')].at(-1).click()")
        page.wait_for("!!document.querySelector('input[type=file]')")
        page.choose_file("input[type=file]", PIG)
        page.wait_for("document.body.innerText.includes('A simple pig, mammal, animal')")
        page.screenshot(tmp_path / "picture.png")
        elsewhere = [address for address in page.asked if not address.startswith((server, "data:", "blob:"))]
        assert elsewhere == []

    in_its_own_folder = tmp_path / "private.txt"
    in_its_own_folder.write_text("private")
    for path in (PIG, ROOT / "README.md", in_its_own_folder, "private.txt", "/etc/passwd"):
        for route in ("gradio_api/file=", "file=", "static/"):
            assert status(f"{server}/{route}{path}") in (403, 404), path
