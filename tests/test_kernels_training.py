"""A hundred steps of training: the kernels drift from exact arithmetic no further than plain torch does."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_kernels import DEVICE, DTYPES, RUNS, rounding, runs, tensor  # noqa: F401  rounding is a fixture

from kernels import Layer, clip_loss, connector_mlp


@pytest.mark.skipif(RUNS, reason="this is that process, or there is a GPU")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def train(impl, dtype, steps=100):
    """The factored generator's step as train_hyma.py takes it: float32 weights, cast for the products, AdamW."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(24, 6, generator=g)
    texts, images = (
        [
            F.normalize(latent @ torch.randn(6, d, generator=g) + torch.randn(24, d, generator=g), dim=1).to(DEVICE)
            for d in dims
        ]
        for dims in ((16, 20), (32, 17))
    )
    shapes = [(28, 16), (28, 20), (32, 28), (17, 28)]
    parameters = [tensor(g, *s, dtype=torch.float32, scale=s[1] ** -0.5).to(master).requires_grad_() for s in shapes]
    parameters += [torch.zeros(n, dtype=master, device=DEVICE, requires_grad=True) for n, _ in shapes]
    optimizer, losses = torch.optim.AdamW(parameters, lr=3e-3), []
    for _ in range(steps):
        cast = [p.to(dtype) for p in parameters]
        layers = [Layer(cast[:2], cast[4:6], [(0, 0), (1, 1)]), Layer(cast[2:4], cast[6:], [(0, 0), (0, 1), (1, 1)])]
        z, sumsq = connector_mlp([x.to(dtype) for x in texts], layers, impl=impl)
        loss, _ = clip_loss(z, [y.to(dtype) for y in images], [0, 1, 1], 20.0, sumsq=sumsq, impl=impl)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    return torch.tensor(losses, dtype=torch.float64), torch.cat([p.detach().flatten() for p in parameters]).double()


@runs
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_hundred_steps(dtype):
    exact, plain, ours = train("torch", torch.float64), train("torch", dtype), train("triton", dtype)
    assert exact[0][-1] < 0.2 * exact[0][0]  # it has learnt something
    for name, truth, torch_has, triton_has in zip(("losses", "weights"), exact, plain, ours):
        error, allowed = (triton_has - truth).norm().item(), (torch_has - truth).norm().item()
        assert error <= 2 * allowed + 1e-5 * truth.norm().item(), f"{name}: {error:.2e}, torch {allowed:.2e}"
