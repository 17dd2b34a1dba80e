"""Arguments that are refused, and where each implementation may run. No kernel runs here."""

import subprocess
import sys

import pytest
import torch

import kernels
from kernels import Layer, Share

X, W, BIAS = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
Z, Y = torch.randn(4, 3), torch.randn(4, 3)
BAD = [
    ("features", lambda: kernels.connector_mlp([], [Layer([W], [BIAS], [(0, 0)])])),
    ("features[1]", lambda: kernels.connector_mlp([X, X[:2]], [Layer([W], [BIAS], [(0, 0)])])),
    ("features[0]", lambda: kernels.connector_mlp([X.int()], [Layer([W], [BIAS], [(0, 0)])])),
    ("layers", lambda: kernels.connector_mlp([X], [])),
    ("layers[0].weights[0]", lambda: kernels.connector_mlp([X], [Layer([W.half()], [BIAS], [(0, 0)])])),
    ("layers[0].biases[0]", lambda: kernels.connector_mlp([X], [Layer([W], [BIAS[:2]], [(0, 0)])])),
    ("layers[0].biases", lambda: kernels.connector_mlp([X], [Layer([W], [], [(0, 0)])])),
    ("layers[0].wiring[0]", lambda: kernels.connector_mlp([X], [Layer([W], [BIAS], [(0, 1)])])),
    ("layers[1].wiring[0]", lambda: kernels.connector_mlp([X], [Layer([W], [BIAS], [(0, 0)])] * 2)),
    ("z", lambda: kernels.clip_loss(Z[:, :2], [Y], [0], 20.0)),
    ("images[0]", lambda: kernels.clip_loss(Z, [Y[:2]], [0], 20.0)),
    ("images[0]", lambda: kernels.clip_loss(Z, [Y.clone().requires_grad_()], [0], 20.0)),
    ("image_of_pair", lambda: kernels.clip_loss(Z, [Y], [1], 20.0)),
    ("logit_scale", lambda: kernels.clip_loss(Z, [Y], [0], 0.5)),
    ("logit_scale", lambda: kernels.clip_loss(Z, [Y], [0], float("nan"))),
    ("sumsq", lambda: kernels.clip_loss(Z, [Y], [0], 20.0, sumsq=torch.zeros(4))),
    ("budget_bytes", lambda: kernels.clip_loss(Z, [Y], [0], 20.0, budget_bytes=0)),
    ("share", lambda: kernels.clip_loss(Z[:2], [Y], [0], 20.0, share=Share(3, torch.stack))),
    ("share", lambda: kernels.clip_loss(Z[:2], [Y], [0], 20.0, share=Share(2, torch.stack), counts=True)),
    ("share", lambda: kernels.clip_loss(Z[:2], [Y], [0], 20.0, share=Share(2, torch.stack), impl="triton")),
    ("images[1]", lambda: kernels.clip_loss(Z[:2], [Y, Y[:2]], [0], 20.0, share=Share(2, torch.stack))),
    ("exp_avg_sq", lambda: kernels.adamw_outer(W, W, W[:2], X.new_ones(2, 5), X.new_ones(2, 3), step=1, lr=1)),
    ("grad_out", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 4), X.new_ones(2, 3), step=1, lr=1)),
    ("inputs", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 5), X.new_ones(3, 3), step=1, lr=1)),
    ("step", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 5), X.new_ones(2, 3), step=0, lr=1)),
    ("step", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 5), X.new_ones(2, 3), lr=1)),
    ("numbers", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 5), X.new_ones(2, 3), lr=1, numbers=X.new_ones(5))),
    ("numbers", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 5), X.new_ones(2, 3), numbers=X.new_ones(4))),
    ("clip", lambda: kernels.adamw_outer(W, W, W, X.new_ones(2, 5), X.new_ones(2, 3), step=1, lr=1, clip=X)),
    ("targets", lambda: kernels.true_rank(Z, Y[:, :2], torch.zeros(4, dtype=torch.int64))),
    ("match", lambda: kernels.true_rank(Z, Y, torch.zeros(4))),
    ("impl", lambda: kernels.true_rank(Z, Y, torch.zeros(4, dtype=torch.int64), impl="cuda")),
]


@pytest.mark.parametrize("name, call", BAD)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(f"{name}:")


def test_impl(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    match = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="CUDA"):
        kernels.true_rank(Z, Y, match, impl="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="float64"):
        kernels.true_rank(Z.double(), Y.double(), match, impl="triton")
    with pytest.raises(ValueError, match="logit_scale"):
        kernels.clip_loss(Z, [Y], [0], torch.tensor(20.0), impl="triton")
    monkeypatch.setattr(kernels, "triton_runs", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        kernels.true_rank(Z, Y, match, impl="triton")


def test_importing_kernels_does_not_import_triton():
    code = "import sys, kernels; print(*sorted(name for name in sys.modules if name.startswith('kernels.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["kernels.dense", "kernels.reference"]  # which import torch alone


@pytest.mark.parametrize(
    "gpu, triton, says", [(False, True, "no GPU here"), (True, False, "no Triton here"), (True, True, "")]
)
def test_the_fallback_is_said_once(monkeypatch, capfd, gpu, triton, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(kernels, "triton_runs", lambda: triton)
    kernels.can_use_triton.cache_clear()
    x, match = torch.eye(3), torch.arange(3)
    for _ in range(3):
        assert kernels.true_rank(x, x, match).tolist() == [0, 0, 0]  # CPU tensors: plain torch in any case
    said = capfd.readouterr().err
    assert said.count("\n") == bool(says) and says in said
    kernels.can_use_triton.cache_clear()
