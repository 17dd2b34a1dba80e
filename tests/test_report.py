"""The report by the command line: the page's answer, one page with all inside, its files, the gallery."""

import argparse
import base64
import hashlib
import re
import shutil
import subprocess
import sys

import matplotlib.figure
import pytest
import torch
from browser import Browser, find_chromium
from helpers import ROOT, SAMPLE, make_embedding_folder, read_csv

import vlm
from hyma.answer import describe_comparison
from hyma.figures import draw_ranks
from hyma.files import write_json
from hyma.plotting import METHOD_COLOURS, method_style, show_on_pointer, to_svg
from hyma.records import RESULTS, Records, checksum_of_results, sha256

# ----------------------------------------------------------------------------------------------------------- the answer


def verdicts(rows):
    """{verdict: the pairs that have it} of rows of ranking.csv."""
    found = {"chosen": set(), "better": set(), "cannot be told apart": set(), "worse": set()}
    for row in rows:
        found[row["verdict"]].add((row["image"], row["text"]))
    return found


def named_pairs(words):
    """The pairs in "a, b and c with d or e, and f with g"."""
    pairs = set()
    for group in words.split(", and "):
        images, texts = group.split(" with ")
        for image in re.split(", | and ", images):
            pairs |= {(image, text) for text in re.split(", | or ", texts)}
    return pairs


def test_the_sentence_agrees_with_the_table(evaluation):
    """The sentence that leads the page names exactly the pairs that the saved table does not set apart from the choice."""
    task = vlm.read_json(evaluation.folder / "results.json")["page"]["tasks"][0]
    rows = [row for row in read_csv(evaluation.folder / "ranking.csv") if row["task"] == task["name"]]
    found = verdicts(rows)
    for row in rows:
        low, high = float(row["minus_chosen_low"]), float(row["minus_chosen_high"])
        if row["verdict"] != "chosen":
            apart = {True: "worse", False: "better"}[high < 0] if low > 0 or high < 0 else "cannot be told apart"
            assert row["verdict"] == apart, row
    sentence = vlm.read_json(evaluation.folder / "results.json")["sentences"][1]
    assert f'<p class="lead">{sentence}</p>' in (evaluation.folder / "report.html").read_text()
    assert sentence in evaluation.out and task["counted"] in sentence
    (chosen,) = found["chosen"]
    if found["better"]:
        better, rest = re.split(" (?:is|are) better on ", sentence)
        assert named_pairs(better) == found["better"] and f"{' with '.join(chosen)}, which was chosen" in rest
    elif found["cannot be told apart"]:
        alike, rest = sentence.split(" cannot be told apart on ")
        assert named_pairs(alike) == found["cannot be told apart"] | {chosen} and chosen[0] in rest
    else:
        assert sentence.startswith(f"{' with '.join(chosen)} is better than every other pair")


@pytest.mark.parametrize(
    "pairs, sentence",
    [
        ("a:x chosen", "a with x is the only pair."),
        ("a:x chosen, b:x worse", "a with x is better than every other pair on 9 pictures, and was chosen."),
        ("b:x chosen, a:x alike, c:x alike", "a, b and c with x cannot be told apart on 9 pictures; b was chosen."),
        ("a:x chosen, a:y alike, b:x alike, b:y alike",
         "a and b with x or y cannot be told apart on 9 pictures; a with x was chosen."),
        ("a:x chosen, b:y alike, c:x worse",
         "a with x, and b with y cannot be told apart on 9 pictures; a with x was chosen."),
        ("a:x chosen, b:x better, c:y alike",
         "b with x is better on 9 pictures than a with x, which was chosen; c with y cannot be told apart from it."),
        ("a:x chosen, b:x better, c:x better", "b and c with x are better on 9 pictures than a with x, which was chosen."),
    ],
)  # fmt: skip
def test_the_sentence_of_every_outcome(pairs, sentence):
    rows = []
    for each in pairs.split(", "):
        pair, verdict = each.split()
        image, text = pair.split(":")
        rows.append({"image": image, "text": text, "verdict": verdict.replace("alike", "cannot be told apart")})
    assert describe_comparison(rows, "9 pictures") == sentence


def test_so_many_pairs_are_counted_not_named():
    rows = [{"image": f"e{k}", "text": f"t{k}", "verdict": "cannot be told apart"} for k in range(26)]
    rows.append({"image": "e", "text": "t", "verdict": "chosen"})
    assert describe_comparison(rows, "9 pictures").startswith("27 of the 27 pairs cannot be told apart")


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_everything_and_links_to_its_files(evaluation):
    page = (evaluation.folder / "report.html").read_text()
    markup = re.sub(r' xmlns(:xlink)?="[^"]*"', "", page)
    assert not re.search(r"<link|src=\"(?!data:)|url\((?!#)|https?://", markup)
    assert len(page) < 2_000_000
    for name in re.findall(r'(?<!:)href="([^"#]+)"', page):
        assert (evaluation.folder / name).stat().st_size > 50, name


def test_only_the_pages_own_script_may_run(evaluation):
    page = (evaluation.folder / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
    assert f"{policy} 'sha256-{digest}'" in page.partition("<style>")[0]


def test_the_pointer_finds_every_pair_and_method_on_the_page(evaluation):
    page = (evaluation.folder / "report.html").read_text()
    shown = re.findall(r'<g class="tip"><title>(.*?)</title>', page)
    for row in read_csv(evaluation.folder / "true-scores.csv"):
        assert any(text.startswith(f"{row['image']}:{row['text']}, true score in %") for text in shown)
    for row in read_csv(evaluation.folder / "selectors.csv"):
        assert any(text.startswith(f"{row['method']}: regret") for text in shown), row["method"]


@pytest.mark.skipif(not find_chromium(), reason="needs Chromium")
def test_the_page_in_a_browser(evaluation, tmp_path):
    """Tables sort and filter, figures answer to the pointer, a phone cuts nothing off, and nothing is loaded from elsewhere."""
    with Browser(tmp_path / "profile", (evaluation.folder / "report.html").absolute().as_uri()) as page:
        page.wait_for("document.readyState == 'complete'")
        page.value("for (const part of document.querySelectorAll('details')) part.open = true")
        scores = "[...document.querySelectorAll('table.pairs tbody tr')].map(row => +row.cells[3].dataset.value)"
        best_first = page.value(scores)
        page.value("document.querySelectorAll('table.pairs th button')[3].click()")
        assert page.value(scores) == sorted(best_first) != best_first
        page.value("document.querySelectorAll('table.pairs th button')[3].click()")
        assert page.value(scores) == sorted(best_first, reverse=True)

        page.value("window.field = document.querySelector('.filter'); field.value = 'CONTROL'")
        page.value("field.dispatchEvent(new Event('input'))")
        shown = "[...document.querySelectorAll('table.pairs tbody tr')].filter(row => !row.hidden).map(row => row.cells[1].innerText)"
        assert set(page.value(shown)) == {"control"}

        page.value("window.part = document.querySelector('svg .tip'); part.scrollIntoView({block: 'center'})")
        place = page.value("(({x, y, width, height}) => [x + width / 2, y + height / 2])(part.getBoundingClientRect())")
        page.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        page.wait_for("getComputedStyle(document.querySelector('.note')).display == 'block'")
        assert re.search(r"\d", page.value("document.querySelector('.note').textContent"))

        page.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        assert page.value("document.documentElement.scrollWidth") == 390
        assert [address for address in page.asked if not address.startswith(("file:", "data:"))] == []


def test_a_name_is_never_markup_in_a_figure():
    figure = matplotlib.figure.Figure()
    (line,) = figure.subplots().plot([0, 1], label="x")
    show_on_pointer(line, 'a"><script>alert(1)</script>')
    assert "<script" not in to_svg(figure) and "&lt;script" in to_svg(figure)


def test_a_method_has_one_colour_in_every_report():
    """Whatever stands before it; methods of one kind differ in marker and dash."""
    methods = ["ridge mlp0", "grid mlp1 (runs/g2)", "grid mlp1 (runs/g1)", "ridge probe R@10", "hyma factored mlp1"]
    for order in (methods, methods[::-1]):
        records = argparse.Namespace(methods=order)
        styles = {method: method_style(records, method) for method in order}
        assert styles["hyma factored mlp1"]["color"] == METHOD_COLOURS["hyma factored"]
        first, second = styles["grid mlp1 (runs/g1)"], styles["grid mlp1 (runs/g2)"]
        assert first["color"] == second["color"] == METHOD_COLOURS["grid mlp"]
        assert first["marker"] != second["marker"] and first["ls"] != second["ls"]
        assert styles["ridge probe R@10"]["color"] != styles["ridge mlp0"]["color"]


def test_pairs_of_the_same_ranks_share_a_marker_with_their_number():
    ranks = ((1, 1), (2.5, 2.5), (2.5, 2.5), (4, 4))
    rows = [{"image": f"e{k}", "text": "t", "true_rank": true, "rank": rank} for k, (true, rank) in enumerate(ranks)]
    axis = matplotlib.figure.Figure().subplots()
    draw_ranks(axis, rows)
    assert len(axis.lines) == 3 and [text.get_text() for text in axis.texts] == ["2"]


# ------------------------------------------------------------------------------------------------------------ its files


def test_clip_benchmark_builds_a_table_of_the_scores(evaluation, tmp_path):
    """By its own `build` where the package is installed; anyway, each file has the keys that it reads."""
    files = sorted((evaluation.folder / "clip_benchmark").glob("*.json"))
    records = [vlm.read_json(path) for path in files]
    assert records == vlm.read_json(evaluation.folder / "results.json")["results"]
    for record in records:
        assert {"dataset", "model", "pretrained", "task", "metrics"} <= record.keys()
        assert not record["metrics"].keys() & record.keys()
        assert all(isinstance(value, str | int) for key, value in record.items() if key != "metrics")
    cli = pytest.importorskip("clip_benchmark.cli")
    flags = argparse.Namespace(files=[str(evaluation.folder / "clip_benchmark")], output=str(tmp_path / "all.csv"))
    cli.main_build(flags)
    rows = read_csv(tmp_path / "all.csv")
    assert len(rows) == len(records)
    found = {(row["pretrained"], row["model"]): float(row["image_retrieval_recall@5"]) for row in rows}
    for record in records:
        assert found[record["pretrained"], record["model"]] == record["metrics"]["image_retrieval_recall@5"]


def test_every_figure_has_the_csv_that_it_was_drawn_from(evaluation):
    paths = [path for path in evaluation.folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(evaluation.folder)) for path in paths}
    assert names == set(vlm.read_json(evaluation.folder / "results.json")["files"])
    figures = {name.removesuffix(".png") for name in names if name.endswith(".png")}
    tables = {name.removesuffix(".csv") for name in names if name.endswith(".csv")}
    assert len(figures) >= 7 and figures <= tables


def test_a_new_report_removes_the_old_ones_files_and_no_others(run, evaluation, runs, tmp_path):
    out = tmp_path / "report"
    shutil.copytree(evaluation.folder, out)
    (out / "mine.csv").write_text("a user's own")
    again = run("evaluate.py", runs / "hyma", "--oracle", runs / "grid", "--selector-rows", "0", "--out", "report")
    assert again.code == 0 and "hyma factored mlp0" in again.out and "CKA" not in again.out
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {*vlm.read_json(out / "results.json")["files"], "mine.csv"}
    assert "canonical-correlations.png" not in left and (evaluation.folder / "canonical-correlations.png").is_file()


def test_the_tables_are_the_results(evaluation):
    """ranking.csv and selectors.csv by their columns, which other programs read."""
    rows = read_csv(evaluation.folder / "selectors.csv")
    results = vlm.read_json(evaluation.folder / "results.json")
    assert [row["method"] for row in rows] == [row["method"] for row in results["methods"]]
    for row, record in zip(rows, results["methods"]):
        assert float(row["regret"]) == record["regret"] and row.keys() == record.keys()
    ranking = read_csv(evaluation.folder / "ranking.csv")
    scores = [float(row["true_score"]) for row in ranking]
    assert scores == sorted(scores, reverse=True) and {"image", "text"} <= ranking[0].keys()


def test_the_gallery_shows_pictures_and_never_takes_a_caption_for_markup(run, tmp_path):
    """Pictures that are there are shown; of those that are missing it says so."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 24, generator=random)
    vectors = {}
    for name, dim in (("efflite0", 1280), ("minilm_l6", 384)):
        vectors[name] = latent @ torch.randn(24, dim, generator=random)
    splits = [("test", "val", "train")[k % 3] for k in range(300)]
    rows = [{"caption": f"<script>alert({k})</script> & co", "split": split} for k, split in enumerate(splits)]
    folder = make_embedding_folder(tmp_path / "e", rows, **vectors)
    write_json(folder / "manifest.json", vlm.read_json(folder / "manifest.json") | {"root": "."})
    flags = ("--data", folder, "--closed-form", "ridge", "--batch-size", "64", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    assert run("evaluate.py", "x").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<script") == 1 and "&lt;script&gt;alert(" in page
    assert "pictures are missing or unreadable" in page
    assert "data:image/jpeg" not in page

    picture = sorted((SAMPLE / "images").rglob("*.webp"))[0]
    for k in range(0, 300, 3):
        shutil.copy(picture, folder / f"{k}.png")  # its bytes say what it is, not its name
    assert run("evaluate.py", "x").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    found = read_csv(tmp_path / "report" / "gallery.csv")
    missed = {row["caption"] for row in found if int(row["rank"]) > 5}
    assert page.count("data:image/jpeg") == 6 * 5 + len(missed) and "missing or unreadable" not in page
    assert len(found) == 30 and sum(row["right"] == "True" for row in found) >= 5  # a linear map finds its own
    for row in found:  # its own picture is among the five exactly if its place says so
        others = [other["picture"] for other in found if other["caption"] == row["caption"]]
        assert (row["own"] in others) == (int(row["rank"]) <= 5)


def test_the_report_is_drawn_from_its_records_alone(evaluation, tmp_path):
    """Redrawn from results.json, the tables and the thumbnails elsewhere, page and figures have the same bytes."""
    copy = tmp_path / "copy"
    shutil.copytree(evaluation.folder, copy)
    drawn = [path.name for path in copy.iterdir() if path.suffix in (".png", ".html")]
    assert "report.html" in drawn and len(drawn) > 5
    for name in drawn:
        (copy / name).unlink()
    command = [sys.executable, "-m", "hyma.report", str(copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in drawn:
        assert (copy / name).read_bytes() == (evaluation.folder / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ damaged records


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    place = len(data) * 2 // 3
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def drop_column(data):
    return b"\n".join(line.partition(b",")[2] for line in data.split(b"\n"))


def lengthen_row(data):
    header, row, rest = data.split(b"\n", 2)
    return b"\n".join([header, row + b",7", rest])


def write_words(data):
    return re.sub(rb"\b\d+(\.\d+)?\b", b"many", data)


def reseal(folder, name):
    """Writes the checksum that a damaged table has now: who writes results.json can do that."""
    results = vlm.read_json(folder / RESULTS)
    results["checksums"][name] = sha256((folder / name).read_bytes())
    results["checksums"][RESULTS] = checksum_of_results(results)
    write_json(folder / RESULTS, results)


@pytest.fixture
def report(evaluation, tmp_path):
    """A copy of the report, to damage."""
    shutil.copytree(evaluation.folder, tmp_path / "report")
    return tmp_path / "report"


@pytest.fixture
def redraw(run):
    """Redraws a report by its command line, which must end in one line that holds each of the given words."""

    def redraw(folder, says):
        result = run("hyma/report.py", folder)
        assert result.code == 1 and "Traceback" not in result.err, result.err
        lines = result.err.splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in says), lines

    return redraw


@pytest.mark.parametrize("damage", [cut, flip, drop_column, lengthen_row, write_words, lambda data: b""])
@pytest.mark.parametrize("name", ["ranking.csv", "selectors.csv", "heatmap-0-0.csv", "gallery.csv", "loss.csv"])
def test_a_damaged_table_is_named_and_draws_no_other_figure(report, redraw, name, damage):
    page = (report / "report.html").read_bytes()
    (report / name).write_bytes(damage((report / name).read_bytes()))
    redraw(report, [f"report/{name}: is not as evaluate.py saved it"])
    assert (report / "report.html").read_bytes() == page


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("ranking.csv", drop_column, "has no column 'task'"),
        ("heatmap-0-0.csv", lengthen_row, "row 1: expected 5 fields"),
        ("heatmap-0-0.csv", write_words, "row 1: oracle: expected a number, found 'many'"),
        ("cost-regret-0.csv", lambda data: data.split(b"\n")[0], "has no rows"),
        ("cost-regret-0.csv", lambda data: data + b"\xff", "cannot be read as CSV"),
    ],
)
def test_a_table_that_no_report_has_is_refused_whatever_its_checksum(report, redraw, name, damage, says):
    (report / name).write_bytes(damage((report / name).read_bytes()))
    reseal(report, name)
    redraw(report, [f"report/{name}: ", says])


def test_damaged_results_are_named(report, redraw):
    path = report / RESULTS
    whole = path.read_bytes()
    for data, says in (
        (cut(whole), "cannot be read as JSON"),
        (whole.replace(b'"hyma', b'"hymn'), "is not as evaluate.py saved it"),
        (b"[]", "expected a JSON object"),
        (b"{}", "run evaluate.py again"),
    ):
        path.write_bytes(data)
        redraw(report, ["results.json: ", says])
    path.unlink()
    redraw(report, ["report: holds no report"])


def test_a_missing_table_is_named(report, redraw):
    (report / "loss.csv").unlink()
    redraw(report, ["report/loss.csv: no such file"])


def test_results_cannot_name_files_elsewhere(report, redraw, tmp_path):
    """A stranger's results.json, all checksums right: nothing outside the report is read or written."""
    (tmp_path / "secret.csv").write_text("a,b\n1,2\n")
    results = vlm.read_json(report / RESULTS)
    results["page"]["figures"][0]["name"] = "../secret"
    results["checksums"][RESULTS] = checksum_of_results(results)
    write_json(report / RESULTS, results)
    redraw(report, ["results.json: names '../secret.csv', which is no file of a report"])
    assert not (tmp_path / "secret.png").exists()


def test_a_damaged_earlier_report_costs_no_new_one(run, runs, report):
    (report / RESULTS).write_bytes(cut((report / RESULTS).read_bytes()))
    flags = ("--selector-rows", "0", "--bootstrap", "10", "--out", report)
    result = run("evaluate.py", runs / "ridge", *flags)
    assert result.code == 0, result.err
    assert Records(report).page["resamples"] == 10


# ------------------------------------------------------------------------------------------------ a stranger's pictures


@pytest.fixture
def strangers_folder(run, tmp_path):
    """An embedding folder, e, whose rows name pictures in the folder private beside it, and a run on it, x."""
    (tmp_path / "private").mkdir()
    picture = sorted((SAMPLE / "images").rglob("*.webp"))[0]
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 24, generator=random)
    vectors = {}
    for name, dim in (("efflite0", 1280), ("minilm_l6", 384)):
        vectors[name] = latent @ torch.randn(24, dim, generator=random)
    rows = []
    for k in range(300):
        shutil.copy(picture, tmp_path / "private" / f"{k}.webp")
        spellings = (f"{tmp_path}/private/{k}.webp", f"../private/{k}.webp", f"link/{k}.webp")
        rows.append({"image": spellings[k // 3 % 3], "split": ("test", "val", "train")[k % 3]})
    folder = make_embedding_folder(tmp_path / "e", rows, **vectors)
    (folder / "link").symlink_to(tmp_path / "private")
    write_json(folder / "manifest.json", vlm.read_json(folder / "manifest.json") | {"root": "."})
    flags = ("--data", folder, "--closed-form", "ridge", "--batch-size", "64", "--device", "cpu", "--out", "x")
    assert run("train_grid.py", *flags).code == 0
    return folder


QUICK_REPORT = ("--bootstrap", "10", "--selector-rows", "0")


def count_pictures(folder):
    return (folder / "report.html").read_text().count("data:image/jpeg")


def test_pictures_outside_the_data_are_shown_only_if_named(run, strangers_folder, tmp_path):
    result = run("evaluate.py", "x", *QUICK_REPORT)
    assert result.code == 0 and count_pictures(tmp_path / "report") == 0, result.err
    (line,) = [line for line in result.out.splitlines() if "left out" in line]
    assert "e/rows.jsonl names them outside" in line and "--pictures FOLDER" in line
    assert not (tmp_path / "report" / "thumbnails").exists()
    result = run("evaluate.py", "x", *QUICK_REPORT, "--pictures", tmp_path / "private")
    assert result.code == 0 and count_pictures(tmp_path / "report") >= 30 and "left out" not in result.out


def test_a_manifest_that_names_another_folder_is_not_followed_in_silence(run, strangers_folder, tmp_path):
    """Rows inside of the manifest's root, and that root elsewhere: one line says whose pictures are shown."""
    moved = tmp_path / "downloads" / "e"
    moved.parent.mkdir()
    strangers_folder.rename(moved)
    write_json(moved / "manifest.json", vlm.read_json(moved / "manifest.json") | {"root": "../../private"})
    result = run("evaluate.py", "x", "--data", moved, *QUICK_REPORT)
    assert result.code == 0, result.err
    shown = count_pictures(tmp_path / "report")
    assert shown > 0 and f" of {tmp_path}/private, which {moved}/manifest.json names" in result.out
