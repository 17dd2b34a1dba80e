"""The benchmark of a search's cost: the order that is planted in its embeddings, and a small search that is measured."""

import importlib.util
import math
import sys

import pytest
import torch
from conftest import ROOT

from hyma.embeddings import Embeddings
from vlm import read_json

sys.path.insert(0, str(ROOT / "benchmarks"))

from planted_embeddings import (
    directions_of,
    planted_encoders,
    planted_vectors,
    true_order,
    write_planted_embeddings,
)

# By its path: search.py is also the name of a script of ours.
spec = importlib.util.spec_from_file_location("search_benchmark", ROOT / "benchmarks" / "search.py")
search = importlib.util.module_from_spec(spec)
spec.loader.exec_module(search)


def test_the_planted_order_is_by_image_encoder_and_then_by_text_encoder():
    encoders = planted_encoders(3, 2)
    expected = [f"image{i}:text{t}" for i in range(3) for t in range(2)]
    assert true_order(encoders) == true_order(encoders[::-1]) == expected
    products = [a.clarity * b.clarity for a in encoders[:3] for b in encoders[3:]]
    ratios = [worse / better for better, worse in zip(products, products[1:])]
    assert max(ratios) < 1 and max(ratios) - min(ratios) < 1e-6


def test_an_encoder_reads_the_factors_as_clearly_as_planted():
    """Along its directions a factor correlates with what is read by r, and with that of another encoder by both."""
    image, _, text, other = planted_encoders(2, 2)
    readings = {}
    for encoder in (image, text, other):
        readings[encoder] = planted_vectors(encoder, 4000).float() @ directions_of(encoder).T  # [4000, 48]
    for one, two, seen in ((text, other, 1), (image, other, (2 - 2 / math.pi) ** -0.5)):  # a line sees half of u + |u|
        found = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(readings[one].T, readings[two].T)]
        assert torch.stack(found).mean() == pytest.approx(seen * one.clarity * two.clarity, abs=0.03)


def test_a_measured_search(tmp_path, monkeypatch):
    """A run of the benchmark, small: its record, and that a part which is there is not measured again."""
    small = search.Search(2, 2, 600, ("--batch-size", "128", "--epochs", "2", "--connector", "mlp0"))
    monkeypatch.setattr(search, "PARTS", {"pairs": [small]})
    flags = ["search.py", "--threads", "1", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", flags)
    search.main()
    (record,) = read_json(tmp_path / "x.json")["pairs"].values()
    assert record["pairs"] == 4 and record["rows"] == 600 and not (tmp_path / "work").exists()
    assert record["peak_bytes"] > 1e7 and 0 < record["share_of_checks"] < 1
    assert {"open", "start", "cross-validation", "validation", "steps"} <= record["parts"].keys()
    assert record["place_of_the_first"] in (0, 1) and record["spearman"] > 0.5
    monkeypatch.setattr(search, "measure", None)
    search.main()


def test_the_embeddings_are_a_sealed_folder(tmp_path):
    encoders = planted_encoders(2, 1)
    write_planted_embeddings(tmp_path / "e", encoders, 50)
    data = Embeddings(tmp_path / "e")
    assert data.names("image") == ["image0", "image1"] and data.load("text0").shape == (50, 384)
