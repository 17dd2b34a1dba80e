"""hyma/prediction.py and hyma/shortlist.py: which encoders are worth embedding a whole corpus with, from a part of it."""

import shutil

import numpy as np
import pytest
import torch
from helpers import CPU, Rows, make_embedding_folder, read_csv

import vlm
from hyma.embeddings import Embeddings, RowStore
from hyma.files import write_json
from hyma.merging import open_embeddings
from hyma.metrics import Retrieval
from hyma.prediction import (
    EXPONENT,
    KEPT,
    PAIR_ERROR,
    SHARED_ERROR,
    LearningCurves,
    Prediction,
    chances_of_hits,
    extrapolate,
    groups_of_rows,
    held_out_scores,
    hits_of_rows,
    learning_curves,
    logit,
    odds_to_share,
)
from hyma.shortlist import CERTAIN, CLOSE, embed_command, encoder_costs, shortlist, whole_corpus

QUICK = ("--epochs", "1", "--connector", "mlp0", "--batch-size", "128", "--warmup-steps", "1", "--device", "cpu")


@pytest.fixture
def part(graded, tmp_path):
    """A folder whose manifest says that it is a tenth of a corpus. efflite1 is best by construction."""
    shutil.copytree(graded, tmp_path / "few")
    manifest = vlm.read_json(tmp_path / "few" / "manifest.json")
    for name, flops in (("efflite1", 3), ("efflite0", 3), ("control", 12), ("minilm_l6", 1), ("mpnet", 1)):
        manifest["encoders"][name]["flops_per_row"] = flops
    options = {"--data": ["my/captions.csv"], "--weights": ["efflite1=my weights.safetensors", "control=c.safetensors"]}
    whole = {"rows": 13000, "pictures": 13000, "splits": {"train": 8000, "val": 1000, "test": 4000}}
    manifest["subset"] = {"rows": 1300, "seed": 0, "whole": whole, "options": options}
    write_json(tmp_path / "few" / "manifest.json", manifest)
    return tmp_path / "few"


def test_a_run_on_a_part_says_which_encoders_to_embed_the_whole_corpus_with(run, part, tmp_path):
    result = run("train_hyma.py", "--data", part.name, "--out", "runs/x", *QUICK)
    assert result.code == 0, result.err
    rows = read_csv(tmp_path / "runs" / "x" / "prediction.csv")
    assert len(rows) == 6 and rows[0]["image"] == "efflite1" and rows[0]["kept"] == "True"
    assert {row["kept"] for row in rows if row["image"] != "efflite1"} == {"False"}
    assert {row["image"] for row in rows[-2:]} == {"control"}
    scores = [float(row["predicted_recall10"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        assert float(row["low"]) < float(row["predicted_recall10"]) < float(row["high"])
        assert float(row["recall10_of_450_rows"]) < float(row["predicted_recall10"])  # 900 rows train or choose
    assert "prediction for 8,000 training rows" in result.out
    command = result.out.rpartition("python embed.py ")[2].splitlines()[0]
    texts = [name for name in ("minilm_l6", "mpnet") if name in command.partition("--data")[0]]
    assert command == (
        f"--encoder efflite1 {' '.join(texts)} --data my/captions.csv --weights 'efflite1=my weights.safetensors' "
        "--reuse few --out few-chosen"
    )
    saved = 100 * (15 + 2 - len(texts)) / 20
    assert f"1 image encoder (efflite1) and {len(texts)} text encoder" in result.out
    assert f"saves {saved:.0f}% of the embedding" in result.out
    of_few = run("train_hyma.py", "--data", part.name, "--rows", "500", "--out", "runs/y", *QUICK)
    assert of_few.code == 0 and "prediction for 8,000 training rows" in of_few.out  # of the whole corpus all the same


def test_a_whole_corpus_needs_no_choice(graded, part):
    assert whole_corpus(Embeddings(graded)) is None
    assert whole_corpus(Embeddings(part))["whole"]["rows"] == 13000
    manifest = vlm.read_json(part / "manifest.json")
    lost = manifest["subset"] | {"rows": 5000, "whole": manifest["subset"]["whole"] | {"rows": 1301}}
    write_json(part / "manifest.json", manifest | {"subset": lost})  # --rows was larger than the corpus, and a picture was bad
    assert whole_corpus(Embeddings(part)) is None
    manifest["subset"]["whole"]["rows"] = 1300  # --rows was larger than the corpus
    write_json(part / "manifest.json", manifest)
    assert whole_corpus(Embeddings(part)) is None


def test_the_advice_takes_over_the_vectors_of_all_folders(tmp_path):
    """Of a part whose pictures and texts are in two folders: both are named, and the weights of both."""
    subset = {"rows": 4, "seed": 0, "whole": {"rows": 40}}
    for name, encoder, dim in (("one", "efflite0", 1280), ("two", "mpnet", 768)):
        folder = make_embedding_folder(tmp_path / name, [{}] * 4, **{encoder: torch.eye(dim)[:4]})
        manifest = vlm.read_json(folder / "manifest.json")
        options = {"--data": ["t.csv"], "--weights": [f"{encoder}=w"]}
        write_json(folder / "manifest.json", manifest | {"subset": subset | {"options": options}})
    data = open_embeddings([tmp_path / "one", tmp_path / "two"])
    command = embed_command(data, data.manifest["subset"], ["efflite0", "mpnet"])
    assert f"--weights efflite0=w mpnet=w --reuse {tmp_path / 'one'} {tmp_path / 'two'} --out" in command


def test_a_power_law_is_carried_to_the_whole_corpus():
    """The odds of hits grow with the root of the rows on the part, by a factor that each pair has, and more slowly after."""
    sizes = np.array([100.0, 200.0, 400.0])
    factors = np.array([0.01, 0.02, 0.03])  # [P]
    odds = factors * np.sqrt(sizes)[:, None]  # [J, P]
    hits = np.repeat((odds / (1 + odds))[:, :, None], 50, axis=2)
    pairs = [("a", "t"), ("b", "t"), ("c", "t")]
    found = extrapolate(LearningCurves(sizes, hits, np.arange(50)), pairs, 10000, 2000)
    odds_of_all = odds[-1] * 25 ** (EXPONENT + KEPT * (0.5 - EXPONENT))
    truth = odds_of_all / (1 + odds_of_all)
    np.testing.assert_allclose(found.expected, truth)
    assert (found.interval[0] < truth).all() and (truth < found.interval[1]).all()
    # the data have no noise; what is left is that of the exponents, over ln(10000 / 400)
    widths = logit(found.interval[1]) - logit(found.interval[0])
    np.testing.assert_allclose(widths, 2 * 1.96 * np.log(25) * np.hypot(SHARED_ERROR, PAIR_ERROR), rtol=0.1)
    assert (found.best() == 2).mean() > 0.99


def test_hits_among_more_candidates_than_there_are():
    """Of 400 rows, what 4,000 of the same kind recall at 10."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(4000, 16, generator=random)
    scores = latent @ (latent + 1.5 * torch.randn(4000, 16, generator=random)).T
    rows = Rows([{"image": f"{k}", "caption": f"{k}"} for k in range(4000)])
    assert 0.05 < mean_hits_of(4000, rows, scores) < 0.9
    assert mean_hits_of(400, rows, scores) == pytest.approx(mean_hits_of(4000, rows, scores), abs=0.03)


@pytest.mark.parametrize("captions, noise", [((1,), 2), ((1,), 5), ((2,), 3), ((5,), 3), ((5,), 6), ((1, 9), 3), ((1, 9), 6)])
def test_hits_where_pictures_have_several_captions(captions, noise):
    """Of 600 rows, what a Retrieval finds among 3,000 of the same kind: their pictures are fewer, and any caption is right.
    Pictures have so many captions in turn."""
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor(captions).repeat(3000 // sum(captions))
    picture = torch.arange(len(counts)).repeat_interleave(counts)  # [rows]
    latent = torch.randn(len(counts), 16, generator=random)
    texts = latent[picture] + noise * torch.randn(3000, 16, generator=random)
    scores = texts @ latent[picture].T  # [rows, rows]
    rows = Rows([{"image": f"{image}", "caption": f"{k}"} for k, image in enumerate(picture.tolist())])
    assert mean_hits_of(600, rows, scores) == pytest.approx(real_recall(rows, scores), abs=0.03)


def test_hits_where_pictures_share_a_caption():
    """Each caption is of two pictures: there are half as many captions to find."""
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(1500, 16, generator=random).repeat_interleave(2, 0)  # [rows, 16], of captions
    scores = latent @ (latent + 2 * torch.randn(3000, 16, generator=random)).T  # [rows, rows]
    rows = Rows([{"image": f"{k}", "caption": f"{k // 2}"} for k in range(3000)])
    assert mean_hits_of(600, rows, scores) == pytest.approx(real_recall(rows, scores), abs=0.015)


def mean_hits_of(count, rows, scores):
    """What is predicted of the first rows for as many as there are."""
    few = Retrieval(rows, torch.arange(count), CPU)
    return hits_of_rows(few, scores[:count, :count], chances_of_hits(few, len(scores))).mean().item()


def real_recall(rows, scores):
    """R@10 of all rows, the mean of both directions."""
    whole = Retrieval(rows, torch.arange(len(scores)), CPU)
    of_queries = whole.ranks_of_scores(scores[whole.first["caption"]][:, whole.first["image"]])
    return sum((ranks < 10).double().mean().item() for ranks in of_queries) / 2


@pytest.mark.parametrize("captions", [(1,), (5,), (1, 9)])
def test_a_prediction_holds_what_the_whole_corpus_scores(captions, tmp_path):
    """Of 500 planted rows, for 1,000 that train and 1,000 that are held out: pictures have so many captions in turn."""
    random = torch.Generator().manual_seed(0)
    counts = torch.tensor(captions).repeat(2000 // sum(captions))
    picture = torch.arange(len(counts)).repeat_interleave(counts)  # [rows]
    latent = torch.randn(len(counts), 16, generator=random)
    images = latent @ torch.randn(16, 48, generator=random) + 6 * torch.randn(len(counts), 48, generator=random)
    texts = latent[picture] @ torch.randn(16, 48, generator=random) + 9 * torch.randn(2000, 48, generator=random)
    rows = [{"image": f"{k}.png", "split": "train"} for k in picture.tolist()]
    data = Embeddings(make_embedding_folder(tmp_path / "e", rows, efflite0=images[picture], mpnet=texts))
    store, pairs = RowStore(data, ["efflite0", "mpnet"], CPU), [("efflite0", "mpnet")]

    held_out = torch.arange(1000, 2000)
    (scores,) = held_out_scores(store, pairs, torch.arange(1000), held_out)
    retrieval = Retrieval(data, held_out, CPU)
    of_queries = retrieval.ranks_of_scores(scores[retrieval.first["caption"]][:, retrieval.first["image"]])
    real = sum((ranks < 10).double().mean().item() for ranks in of_queries) / 2
    curves = learning_curves(store, data, pairs, torch.arange(500), 0, candidates=1000)
    low, high = extrapolate(curves, pairs, 1000, 1000).interval[:, 0]
    assert low - 0.02 < real < high + 0.02


def test_rows_that_share_a_caption_are_held_out_together_where_the_splits_hold_them_apart():
    rows = [
        {"image": image, "caption": caption, "split": "train"}
        for image, caption in (("a", "cat"), ("b", "cat"), ("b", "two cats"), ("c", "two cats"), ("d", "dog"))
    ]
    everything = torch.arange(5)
    assert groups_of_rows(Rows([*rows, {"caption": "cow", "split": "val"}]), everything).tolist() == [0, 0, 0, 0, 1]
    assert groups_of_rows(Rows([*rows, {"caption": "dog", "split": "val"}]), everything).tolist() == [0, 1, 1, 2, 3]


def make_prediction(scores):
    """A Prediction of pairs of images a, b, c with texts s, t whose draws are these scores [draws, 6]."""
    pairs = [(image, text) for image in "abc" for text in "st"]
    draws = logit(np.array(scores))
    return Prediction(pairs, 1000, 2000, None, None, odds_to_share(draws.mean(0)), None, draws)


def test_a_picture_of_several_captions_is_embedded_once(part):
    data = Embeddings(part)
    pairs = [("efflite1", "mpnet"), ("control", "mpnet")]
    assert encoder_costs(data, pairs) == {"efflite1": 3 * 1300, "control": 12 * 1300, "mpnet": 1300}
    for k, row in enumerate(data.rows):
        row["image"] = f"{k // 5}.png"
    assert encoder_costs(data, pairs) == {"efflite1": 3 * 260, "control": 12 * 260, "mpnet": 1300}


def test_the_shortlist_holds_a_pair_close_to_the_best():
    costs = dict.fromkeys("abcst", 1)
    # a:s is the best of 60 draws, b:t of 40; where one is, the other is far below, and c:t just close.
    one = [0.5, 0.1, 0.1, 0.2, 0.1, 0.5 - CLOSE / 2]
    other = [0.2, 0.1, 0.1, 0.5, 0.1, 0.5 - CLOSE / 2]
    kept, probability = shortlist(make_prediction([one] * 60 + [other] * 40), costs)
    assert (kept, probability) == (["c", "t"], 1)
    one[5] = other[5] = 0.5 - 2 * CLOSE
    kept, probability = shortlist(make_prediction([one] * 60 + [other] * 40), costs)
    assert (kept, probability) == (["a", "b", "s", "t"], 1)
    kept, probability = shortlist(make_prediction([one] * 98 + [other] * 2), costs)
    assert (kept, probability) == (["a", "s"], 0.98) and probability >= CERTAIN
