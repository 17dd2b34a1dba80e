"""The connector that is handed over, trained further by itself: its steps, its best state, its cost, its resume."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import CPU, QUICK, read_connectors, read_ledger, read_ranking

import vlm
from hyma import refinement
from hyma.embeddings import Embeddings, RowStore
from hyma.free_connectors import FreeConnectors
from hyma.grid_state import new_state
from hyma.pair_names import name_of_row
from hyma.ranking import recall_columns
from hyma.refinement import refine, refinement_steps, try_weights_between
from hyma.splits import split_rows
from hyma.training import validate, validation_retrieval
from vlm import BadInput

PAIR = ("efflite1", "mpnet")


def test_only_the_chosen_pair_is_refined_and_its_cost_is_in_the_ledger(run, planted, tmp_path):
    flags = ("--data", planted, *QUICK, "--lr", "1e-3", "--logit-scale", "5")
    assert run("train_hyma.py", *flags, "--refine-steps", "0", "--out", "plain").code == 0
    result = run("train_hyma.py", *flags, "--refine-steps", "12", "--out", "refined")
    assert result.code == 0 and "refined: " in result.out, result.err
    plain, refined = read_connectors(tmp_path / "plain"), read_connectors(tmp_path / "refined")
    chosen = read_ranking(tmp_path / "refined")[0]
    assert chosen == read_ranking(tmp_path / "plain")[0]
    file = vlm.connector_name(chosen["image"], 0, chosen["text"])
    card = vlm.read_json((tmp_path / "refined" / "connectors" / file).with_suffix(".json"))
    for name in plain:
        same = all(map(torch.equal, plain[name].values(), refined[name].values()))
        assert same == (name != file or card["refinement_steps"] == 0)

    retrieval = validation_retrieval(Embeddings(planted), *split_rows(Embeddings(planted)), CPU)
    assert (card["val_rows"], card["val_candidates"]) == (90, 900) == (retrieval.query_rows, len(retrieval.rows))
    store = RowStore(Embeddings(planted), [chosen["image"], chosen["text"]], CPU)
    connector = vlm.load_connector(tmp_path / "refined" / "connectors" / file, *map(store.dims.get, store.dims))
    mapped = vlm.map_text(connector, store.take(chosen["text"], retrieval.rows))
    six = retrieval.recalls(mapped, store.take(chosen["image"], retrieval.rows))
    assert recall_columns(six)["val_recall10"] == pytest.approx(card["val_recall10"], abs=0.01)

    before, after = read_ledger(tmp_path / "plain"), read_ledger(tmp_path / "refined")
    name = name_of_row(chosen)
    assert after["updates_per_pair"][name] == before["updates_per_pair"][name] + 12 == card["updates"]
    assert after["steps"] == before["steps"] + 12 and after["flops"] > before["flops"]
    assert after["logit_flops"] > before["logit_flops"]
    projected = 2 * 900 * store.dims[chosen["image"]] * vlm.read_json(tmp_path / "refined" / "config.json")["flags"]["rank"]
    assert after["start_flops"] == before["start_flops"] + projected  # the chosen encoder's pictures along its axes, once more


def test_an_added_encoder_leaves_the_refined_connector_as_it_is(run, planted, tmp_path, monkeypatch):
    turn = itertools.count()
    keep_the_last = functools.partial(refinement.keep_best, key=lambda six: -next(turn))
    monkeypatch.setattr(refinement, "keep_best", lambda *given, key: keep_the_last(*given))
    flags = ("--data", planted, *QUICK, "--pairs", "efflite0:*", "control:*", "--epochs", "1", "--lr", "3e-3")
    assert run("train_hyma.py", *flags, "--refine-steps", "30", "--out", "x").code == 0
    chosen = read_ranking(tmp_path / "x")[0]
    card = tmp_path / "x" / "connectors" / vlm.connector_name(chosen["image"], 0, chosen["text"])
    assert vlm.read_json(card.with_suffix(".json"))["refinement_steps"] > 0
    result = run("train_hyma.py", "--add-encoder", "efflite1", "--from", "x", "--out", "y")
    assert result.code == 0, result.err
    before, after = read_connectors(tmp_path / "x"), read_connectors(tmp_path / "y")
    for name in before:
        assert all(map(torch.equal, before[name].values(), after[name].values())), name


def test_the_best_state_by_validation_is_kept_and_a_resume_gives_the_same_bits(initialise):
    found = initialise(1)
    flags = SimpleNamespace(
        seed=0, batch_size=128, refine_steps=12, warmup_steps=2, lr=1e-3, weight_decay=0.01, clip_norm=1.0,
        logit_scale=20.0, precision="fp32", split="pairs", graph=False,
    )  # fmt: skip
    retrieval = validation_retrieval(found.data, found.rows, found.val_rows, CPU)
    predicted = found.generator.predict(*PAIR)
    recalls = [0.0] * 6  # any state is better
    saved, forced = [], []

    def keep(state, force):
        saved.append(torch.load(to_file(state), weights_only=True))
        forced.append(force)

    def run(earlier):
        parts = found.generator, recalls, found.store, retrieval, found.rows
        return refine(flags, PAIR, *parts, earlier, keep)

    whole = run(None)
    assert forced == [False] * 12 + [True]  # a validation of one pair is not worth writing the state of all
    best = whole["best"]["efflite1:mpnet"]
    assert saved[0]["connectors"]["layers.0.1.weight"].shape == (64, 1024)  # along the axes
    assert best["layers"][1][0].shape == (1280, 1024)
    assert whole["step"] == 12 and whole["updates"] == {"efflite1:mpnet": 12} and best["about"]["refinement_steps"] > 0
    again = run(saved[4])
    assert again["updates"] == whole["updates"] and again["flops"] == whole["flops"]
    for ours, theirs in zip(best["layers"], again["best"]["efflite1:mpnet"]["layers"]):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])

    recalls = [0.0] * 6
    again = run(torch.load(to_file(saved[-1]), weights_only=True))  # a finished one, run again
    assert all(
        torch.equal(ours[0], theirs[0])
        for ours, theirs in zip(best["layers"], again["best"]["efflite1:mpnet"]["layers"])
    )

    wide = torch.load(to_file(saved[4]), weights_only=True)  # of the image encoder's whole space, as earlier versions had it
    wide["connectors"]["layers.0.1.weight"] = torch.zeros(1280, 1024)
    flags.out = "x"
    with pytest.raises(BadInput, match="x was started by an earlier version"):
        run(wide)

    recalls = [1.0] * 6  # nothing is better than the predicted connector
    kept = run(None)["best"]["efflite1:mpnet"]
    assert kept["about"]["refinement_steps"] == 0 and torch.equal(kept["layers"][1][0], predicted[1][0])


def test_weights_between_the_predicted_and_the_last_ones_are_tried(initialise):
    """Those are kept that score best, and the connectors are as before."""
    found = initialise(1)
    retrieval = validation_retrieval(found.data, found.rows, found.val_rows, CPU)
    store = found.generator.project_images(found.store, [PAIR[0]], retrieval.rows, torch.float32)
    good = found.generator.predict_projected(*PAIR)
    connectors = FreeConnectors([PAIR], store.dims, len(good) - 1, 0)
    far, last = [], []  # so that a quarter of the way from one to the other is the good ones
    for weight, bias in good:
        noise = 10 * torch.randn_like(weight) * weight.std()
        far.append((weight - noise, bias))
        last.append((weight + 3 * noise, bias))
    connectors.load(PAIR, last)
    state = new_state([PAIR])
    lift = found.generator.lift
    predicting_far = SimpleNamespace(predict_projected=lambda *pair: far, lift=lift)
    try_weights_between(state, connectors, PAIR, predicting_far, store, retrieval)
    best = state["best"]["efflite1:mpnet"]
    assert best["about"]["refinement_share"] == 0.25
    for (weight, bias), (ours, our_bias) in zip(best["layers"], lift(PAIR[0], good)):
        assert torch.allclose(weight, ours, atol=1e-5) and torch.allclose(bias, our_bias)
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(connectors.predict(*PAIR), last))


def to_file(value):
    """A saved value, to be read back as a checkpoint is."""
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("pairs, expected", [(27, 50), (300, 50), (8, 16), (1, 2)])
def test_few_pairs_are_refined_for_fewer_steps(pairs, expected):
    """A grid of 8 pairs trains for 800 steps in all, of which 16 are a fiftieth."""
    assert refinement_steps(100, pairs, 1000) == expected
    assert refinement_steps(100, pairs, 32767) == expected
    assert refinement_steps(100, pairs, 32768) == min(expected, 33)


def test_no_training_row_is_a_right_answer_of_a_validation_row(initialise):
    """Captions that repeat: the trained picture of a validation caption would be found, and count."""
    found = initialise(1)
    data, val = found.data, set(found.val_rows.tolist())
    data.rows = [{"image": f"picture {k}", "caption": f"caption {k % 300}"} for k in range(data.row_count)]
    retrieval = validation_retrieval(data, found.rows, found.val_rows, CPU)
    captions = {data.rows[k]["caption"] for k in val}
    distractors = retrieval.rows[len(val) :].tolist()
    assert len(distractors) > 300 and not any(data.rows[k]["caption"] in captions for k in distractors)
    whole = data.row_count - sum(data.rows[k]["caption"] in captions for k in found.rows.tolist())
    assert len(retrieval.rows) == whole


def test_the_validation_gallery_is_filled_with_training_rows(initialise):
    """The queries stay the validation rows; more candidates make a recall smaller, never larger."""
    found = initialise(1)
    alone = validation_retrieval(found.data, found.rows[:0], found.val_rows, CPU)
    filled = validation_retrieval(found.data, found.rows, found.val_rows, CPU)
    assert len(alone.rows) == 90 and len(filled.rows) == 900 and filled.query_rows == 90
    assert filled.chance[2] == pytest.approx(10 / 900)
    store = found.generator.project_images(found.store, [PAIR[0]], filled.rows, torch.float32)
    few = validate(found.generator, store, alone, [PAIR])["efflite1:mpnet"]
    many = validate(found.generator, store, filled, [PAIR])["efflite1:mpnet"]
    assert all(b <= a for a, b in zip(few, many)) and many[2] > 0
