"""The report by the command line: one page with all inside, its files, the gallery."""

import re
import shutil
import subprocess
import sys

import torch
from helpers import ROOT, SAMPLE, make_embedding_folder, read_csv

import vlm
from hyma.files import write_json


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
