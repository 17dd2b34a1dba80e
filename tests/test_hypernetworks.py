"""hyma/hypernetworks.py: both hypernetworks where they start, what they export, what a step costs."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, recall10
from torch.utils.flop_counter import FlopCounterMode

import vlm
from hyma.hypernetworks import HYPERNETWORKS, FactoredHypernetwork, MlpHypernetwork, build_hypernetwork
from hyma.training import validation_retrieval
from hyma.training_flags import logit_scale_of
from kernels import clip_loss, connector_mlp


def generators(hidden_layers):
    images, texts = {"a": 48, "b": 32}, {"t": 24, "u": 40}
    for build in (FactoredHypernetwork, MlpHypernetwork):
        torch.manual_seed(0)
        yield build(images, texts, hidden_layers, 8)


def random_axes(generator):
    """{image: axes [D, k]}: random orthonormal ones, which the factored hypernetwork is given, or those of all dimensions."""
    if not hasattr(generator, "axes"):
        return {image: torch.eye(dim) for image, dim in generator.image_dims.items()}
    for axes, mean in zip(generator.axes, generator.means):
        axes.copy_(torch.linalg.qr(torch.randn(axes.shape)).Q)
        mean.copy_(torch.randn(mean.shape))
    return dict(zip(generator.image_names, generator.axes))


@pytest.mark.parametrize("name, kind", [("factored", FactoredHypernetwork), ("mlp", MlpHypernetwork)])
def test_the_flag_chooses_the_hypernetwork(name, kind):
    flags = argparse.Namespace(generator=name, connector="mlp2", rank=8, width=4)
    generator = build_hypernetwork(flags, {"a": 48}, {"t": 24})
    assert type(generator) is kind and generator.hidden_layers == 2
    shapes = [tuple(weight.shape) for weight, _ in generator.predict("a", "t")]
    assert shapes == [(1024, 24), (1024, 1024), (48, 1024)]


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_training_starts_at_a_linear_map_that_already_ranks(initialise, hidden_layers):
    """relu(s) - relu(-s) = s at every depth, and the planted encoder leads before any step."""
    found = initialise(hidden_layers)
    data, store, rows, val_rows, generator = found.data, found.store, found.rows, found.val_rows, found.generator
    retrieval = validation_retrieval(data, rows, val_rows, CPU)  # among as many as cross-validation has
    scores = {}
    for image in data.names("image"):
        for text in data.names("text"):
            layers = generator.predict(image, text)
            connector = vlm.init_modality_connector(store.dims[text], [1024] * hidden_layers, store.dims[image])
            tensors = [tensor for layer in layers for tensor in layer]
            connector.load_state_dict(dict(zip(connector.state_dict(), tensors)))
            with torch.no_grad():
                a, b = store.take(text, rows[:50]), store.take(text, rows[50:100])
                middle = (connector(a) + connector(b)) / 2
                tolerance = 1e-3 * middle.abs().max().item()
                torch.testing.assert_close(connector((a + b) / 2), middle, rtol=0, atol=tolerance)
                six = retrieval.recalls(connector(store.take(text, retrieval.rows)), store.take(image, retrieval.rows))
            scores[image, text] = recall10(six)
    best = sorted(scores, key=scores.get, reverse=True)
    assert {image for image, _ in best[:2]} == {"efflite1"} and scores[best[0]] > 0.8
    by_folds = sorted(scores, key=lambda pair: sum(found.cv_recalls[":".join(pair)]), reverse=True)
    assert {image for image, _ in by_folds[:2]} == {"efflite1"} and {image for image, _ in by_folds[-2:]} == {"control"}
    for axes in generator.axes:
        torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_what_is_exported_is_the_function_that_was_trained(hidden_layers):
    """The exported layers of any pair, through torch alone, against the generator's own pass over all pairs."""
    features = {"t": torch.randn(5, 24), "u": torch.randn(5, 40)}
    pairs = [("a", "u"), ("b", "t"), ("b", "u")]  # a:t is never asked for and has a connector as well
    for generator in generators(hidden_layers):
        axes = random_axes(generator)
        z, _ = connector_mlp(*generator(features, pairs))
        widths = [axes[image].shape[1] for image, _ in pairs]
        for (image, text), mapped in zip(pairs, z.split(widths, dim=1)):
            mapped = mapped @ axes[image].T
            x, layers = features[text], generator.predict(image, text)
            for k, (weight, bias) in enumerate(layers):
                x = F.linear(x, weight, bias) if k == len(layers) - 1 else F.relu(F.linear(x, weight, bias))
            torch.testing.assert_close(mapped, x, atol=1e-5, rtol=1e-4)
        assert [tuple(w.shape) for w, _ in generator.predict("a", "t")][-1][0] == 48


@pytest.mark.parametrize("frozen", [None, "text_parts", "image_parts"])  # as when an encoder is added
@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_flops_of_a_step_against_torch(hidden_layers, frozen):
    features = {"t": torch.randn(64, 24), "u": torch.randn(64, 40)}
    images = {"a": F.normalize(torch.randn(64, 48), dim=1), "b": F.normalize(torch.randn(64, 32), dim=1)}
    pairs = [("a", "u"), ("b", "t"), ("a", "t")]
    for generator in generators(hidden_layers):
        axes = random_axes(generator)
        if frozen and not hasattr(generator, frozen):
            continue
        if frozen:
            getattr(generator, frozen).requires_grad_(False)
        targets = [images[image] @ axes[image] for image in images]
        with FlopCounterMode(display=False) as counter:
            z, sumsq = connector_mlp(*generator(features, pairs))
            losses, _ = clip_loss(z, targets, [0, 1, 0], 20.0, sumsq=sumsq)
            losses.mean().backward()
            if hasattr(generator, "outer"):
                generator.outer[0].T @ generator.outer[1]
        of_samples, of_steps = generator.flops(64, pairs)
        of_logits = sum(4 * 64**2 * axes[image].shape[1] for image, _ in pairs)
        assert counter.get_total_flops() == pytest.approx(of_samples + of_steps + of_logits, rel=0.02)


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_flops_of_samples_grow_with_the_batch_and_those_of_steps_do_not(hidden_layers):
    pairs = [("a", "u"), ("b", "t")]
    for generator in generators(hidden_layers):
        (of_samples, of_steps), (twice, same) = generator.flops(64, pairs), generator.flops(128, pairs)
        assert twice == 2 * of_samples > 0 and same == of_steps
        assert (of_steps > 0) == isinstance(generator, MlpHypernetwork)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures_along_axes_have_the_products_that_training_compares(initialise, monkeypatch, dtype):
    """cos(axes @ y, x) is that of y with axes.T @ x: of the rows that a run uses, once, or of each batch where they are many,
    to the same bits. Validation takes them in float32."""
    found = initialise(0)
    rows, batch = torch.cat([found.rows, found.val_rows]), found.rows[:50]
    axes = found.generator.axes_of("efflite1")
    targets = found.generator.project_images(found.store, ["efflite1"], rows, dtype)
    exact = found.store.take("efflite1", batch) @ axes
    torch.testing.assert_close(targets.take("efflite1", batch), exact)
    rounding = {"atol": 2e-3, "rtol": 0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(targets.take("efflite1", batch, dtype), exact.to(dtype), **rounding)
    assert targets.dims["efflite1"] == 64 and targets.dims["mpnet"] == 768
    torch.testing.assert_close(targets.take("mpnet", batch), found.store.take("mpnet", batch))
    monkeypatch.setattr("hyma.projected_store.bytes_for_copies", lambda device: 1000)
    of_batches = found.generator.project_images(found.store, ["efflite1"], rows, dtype)
    assert targets.coordinates and not of_batches.coordinates and of_batches.dims == targets.dims
    assert torch.equal(of_batches.take("efflite1", batch, dtype), targets.take("efflite1", batch, dtype))
    paper = MlpHypernetwork({"efflite1": 1280}, {"mpnet": 768}, 0, 4)
    assert paper.project_images(found.store, ["efflite1"], rows, dtype) is found.store


def test_pictures_of_a_space_that_fits_whole_are_taken_as_they_are(initialise):
    found = initialise(0, rank=1280)
    assert torch.equal(found.generator.axes_of("efflite1"), torch.eye(1280))
    targets = found.generator.project_images(found.store, ["efflite1"], found.rows, torch.float32)
    assert not targets.coordinates
    assert torch.equal(targets.take("efflite1", found.rows), found.store.take("efflite1", found.rows))


@pytest.mark.parametrize(
    ("rows", "rate", "rank", "share", "scale", "images"),
    [
        (100, 7.8e-5, 256, 0.5, 20, 1 / 3),
        (2000, 3.5e-4, 256, 0.5, 20, 1 / 3),
        (8000, 7.0e-4, 384, 0.70, 40, 1 / 3),
        (40_000, 1.56e-3, 512, 1, 60, 1 / 2),
        (558_128, 2e-3, 512, 1, 60, 1 / 2),
    ],
)
def test_defaults_follow_the_training_rows(rows, rate, rank, share, scale, images):
    kind = HYPERNETWORKS["factored"]
    assert kind.defaults["lr"](rows) == pytest.approx(rate, rel=0.01)
    assert kind.defaults["rank"](rows) == rank
    for hidden_layers, of_depth in ((0, share / 2), (1, share), (2, share)):
        assert kind.share_of_epochs(rows, hidden_layers) == pytest.approx(of_depth, rel=0.01)
    assert kind.share_of_images(rows) == pytest.approx(images)
    assert logit_scale_of(rows) == scale
    assert HYPERNETWORKS["mlp"].share_of_epochs(rows, 0) == 1  # starts from random weights, as a grid search does


def test_the_paper_s_head_has_padded_rows_on_a_gpu():
    generator = MlpHypernetwork({"efflite1": 7}, {"mpnet": 6}, 0, 32)  # and a bias: 33 columns
    for device, row_length in (("cpu", 33), ("meta", 48)):  # meta: no GPU is needed to see how tensors lie
        states = [*generator.to(device).outer_moments(), generator.head]
        for state in states:
            assert state.shape == (49, 33) and state.stride() == (row_length, 1)
