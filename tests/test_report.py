"""The report by the command line: one page with all inside, its files, the gallery."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SAMPLE, make_embedding_folder, read_csv

import vlm
from hyma.files import write_json
from hyma.records import RESULTS, Records, checksum_of_results, sha256


def test_the_page_holds_everything_and_links_to_its_files(evaluation):
    page = (evaluation.folder / "report.html").read_text()
    assert not re.search(r"<script|<link|src=\"(?!data:)|url\(|https?://", page)
    for name in re.findall(r'href="([^"]+)"', page):
        assert (evaluation.folder / name).stat().st_size > 50, name


def test_every_figure_has_the_csv_that_it_was_drawn_from(evaluation):
    names = {path.name for path in evaluation.folder.iterdir()}
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
    left = {path.name for path in out.iterdir()}
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
    assert "<script" not in page and "&lt;script&gt;alert(" in page and "pictures are missing or unreadable" in page
    assert "data:image/jpeg" not in page

    picture = sorted((SAMPLE / "images").rglob("*.webp"))[0]
    for k in range(0, 300, 3):
        shutil.copy(picture, folder / f"{k}.png")  # its bytes say what it is, not its name
    assert run("evaluate.py", "x").code == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 6 * 5 and "missing or unreadable" not in page
    found = read_csv(tmp_path / "report" / "gallery.csv")
    assert len(found) == 30 and sum(row["right"] == "True" for row in found) >= 5  # a linear map finds its own


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
    assert result.code == 0 and count_pictures(tmp_path / "report") == 30 and "left out" not in result.out


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
