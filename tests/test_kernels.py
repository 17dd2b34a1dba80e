"""Every kernel against float64 on the same rounded inputs: at most twice the error of plain torch at that dtype.

On a GPU the kernels run for real. Without one they run in Triton's interpreter, in a process of their own so that no
other test sees its environment variable: test_in_the_interpreter starts it, and everything else here is skipped.
"""

import functools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import Layer, dense, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS = GPU or kernels.interpreted()
runs = pytest.mark.skipif(not RUNS, reason="run by test_in_the_interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(RUNS, reason="this is that process, or there is a GPU")
def test_in_the_interpreter():
    triton = pytest.importorskip("triton")
    if triton.__version__.startswith("3.6") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """Triton's interpreter truncates to bfloat16; this adds what makes truncation round to nearest even, as GPUs do."""
    if kernels.interpreted():
        from triton import language as tl
        from triton.runtime import interpreter

        def rounded(data, source, target, *rest, convert=interpreter._convert_float):
            if (source, target) == (tl.float32, tl.bfloat16):
                bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
                data = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
            return convert(data, source, target, *rest)

        monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a kernel forgets to write is NaN (or 77 where there is no NaN)."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(torch.nan if t.is_floating_point() else 77)

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def check(name, ours, plain, truth):
    """The rule, in the Frobenius norm."""
    assert ours.shape == truth.shape and ours.dtype == plain.dtype, name
    error, allowed = ((t.double() - truth).norm().item() for t in (ours, plain))
    assert error <= 2 * allowed + 1e-6 * truth.norm().item() + 1e-12, f"{name}: {error:.2e}, torch {allowed:.2e}"


def twice(function, *args):
    """Two runs on a GPU, which has an order to get wrong; the interpreter runs one program after the other."""
    first = function(*args)
    return first, function(*args) if GPU else first


def tensor(generator, *shape, dtype, scale=1.0):
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


# ------------------------------------------------------------------------------------------------ connector_mlp


def connector(dtype, batch, texts, hidden, images, wiring_kind):
    """Features and layers of all pairs of texts and images, per pair or factored."""
    g = torch.Generator().manual_seed(0)
    pairs = [(t, i) for i in range(len(images)) for t in range(len(texts))]
    features = [tensor(g, batch, d, dtype=dtype) for d in texts]
    shared = wiring_kind == "factored"
    widths, layers = list(texts), []
    for depth, width in enumerate([*hidden, None]):
        if width is None:  # the last layer
            if shared and hidden:
                outs, wiring = [(d, widths[0]) for d in images], pairs
            else:
                outs = [(images[i], widths[p] if hidden else texts[t]) for p, (t, i) in enumerate(pairs)]
                wiring = [(p if hidden else t, p) for p, (t, i) in enumerate(pairs)]
        elif depth == 0 and not shared:
            outs, wiring = [(width, texts[t]) for t, _ in pairs], [(t, p) for p, (t, _) in enumerate(pairs)]
        else:
            outs, wiring = [(width, d) for d in widths], [(i, i) for i in range(len(widths))]
        weights = [tensor(g, n, k, dtype=dtype, scale=k**-0.5) for n, k in outs]
        layers.append(Layer(weights, [tensor(g, n, dtype=dtype) for n, _ in outs], wiring))
        widths = [outs[k][0] for _, k in wiring]
    return features, layers


def leaves(features, layers, dtype, needs=lambda i: True):
    """The same problem on fresh leaves of another dtype, and the leaves that ask for a gradient."""
    flat = [*features, *(t for layer in layers for t in (*layer.weights, *layer.biases))]
    flat = [t.detach().to(dtype).requires_grad_(needs(i)) for i, t in enumerate(flat)]
    rest, built = flat[len(features) :], []
    for layer in layers:
        n = len(layer.weights)
        built.append(Layer(rest[:n], rest[n : 2 * n], layer.wiring))
        rest = rest[2 * n :]
    return flat[: len(features)], built, [t for t in flat if t.requires_grad]


def run_connector(impl, features, layers, dtype, needs=lambda i: True):
    features, layers, inputs = leaves(features, layers, dtype, needs)
    z, _ = kernels.connector_mlp(features, layers, impl=impl)
    return [z.detach(), *gradients_of(z, inputs)]


def gradients_of(z, inputs):
    dz = torch.cos(torch.arange(z.numel(), device=DEVICE)).view_as(z).to(z.dtype)
    return torch.autograd.grad(z, inputs, dz)


CONNECTORS = [
    (1, [5], [], [7], "each"),
    (63, [63, 123], [], [1, 48], "each"),
    (33, [1280], [], [17], "each"),
    (37, [63, 1], [70], [16, 507], "each"),
    (65, [48, 16, 32], [80], [32, 64], "factored"),
    (34, [16, 33], [48, 40], [9, 65], "each"),
    (9, [16, 32], [16] * 2, [32] * 3, "factored"),
    (17, [16] * 3, [16], [16] * 20, "factored"),  # 60 pairs
]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONNECTORS)
def test_connector(case, dtype):
    problem = connector(dtype, *case)
    ours, again = twice(run_connector, "triton", *problem, dtype)
    plain = run_connector("torch", *problem, dtype)
    truth = run_connector("torch", *problem, torch.float64)
    for i, (a, b, p, t) in enumerate(zip(ours, again, plain, truth)):
        assert torch.equal(a, b), f"output {i} differs between two runs"
        check(f"output {i}", a, p, t)


@runs
def test_connector_gradients_one_at_a_time():
    problem = connector(torch.float32, 17, [20, 33], [40], [16, 9], "factored")
    every = run_connector("triton", *problem, torch.float32)[1:]
    for i, grad in enumerate(every):
        (alone,) = run_connector("triton", *problem, torch.float32, needs=lambda j, i=i: i == j)[1:]
        assert torch.equal(alone, grad), i


@runs
def test_connector_takes_any_strides_and_packs_only_what_is_scattered():
    from kernels import launch

    features, layers = connector(torch.float32, 35, [20, 33], [40], [16, 9], "each")
    strided = [torch.stack([x, x], 2)[..., 0] for x in features]
    turned = [layer._replace(weights=[w.T.contiguous().T for w in layer.weights]) for layer in layers]
    assert not strided[0].is_contiguous() and not turned[0].weights[0].is_contiguous()
    z, _ = kernels.connector_mlp(features, layers, impl="triton")
    assert torch.equal(z, kernels.connector_mlp(strided, turned, impl="triton")[0])

    flat = torch.randn(30, device=DEVICE)
    assert launch.end_to_end([flat[5:15].view(2, 5), flat[15:30].view(5, 3)]).data_ptr() == flat[5:].data_ptr()
    assert torch.equal(launch.end_to_end([flat[5:15], flat[16:30]]), torch.cat([flat[5:15], flat[16:30]]))


@pytest.mark.parametrize("case", [*CONNECTORS, (5, [6, 4], [7, 3], [8, 9], "factored")])
def test_dense_products_are_the_reference(case):
    features, layers, inputs = leaves(*connector(torch.float64, *case), torch.float64)
    z, _ = dense.connector_mlp(features, layers)
    truth, _ = reference.connector_mlp(features, layers)
    torch.testing.assert_close((z, *gradients_of(z, inputs)), (truth, *gradients_of(truth, inputs)))


def test_dense_products_are_chosen_where_a_layer_has_few_inputs(monkeypatch):
    """On a GPU: what belongs to encoders, and a single pair, and nothing else unless Triton is asked for."""
    monkeypatch.setattr(kernels, "_use_triton", lambda impl, tensors: True)
    monkeypatch.setattr(dense, "connector_mlp", lambda features, layers: "dense")
    monkeypatch.setitem(sys.modules, "kernels.connector", SimpleNamespace(connector_mlp=lambda *problem: "ragged"))

    def chosen(texts, images, kind, impl=None):
        return kernels.connector_mlp(*connector(torch.float32, 3, texts, [6], images, kind), impl=impl)

    assert chosen([4, 5], [7, 8, 9], "factored") == "dense"
    assert chosen([4, 5], [7, 8, 9], "factored", "triton") == "ragged"
    assert chosen([4, 5], [7, 8, 9], "each") == "ragged"
    assert chosen([4], [7], "each") == "dense"


# ------------------------------------------------------------------------------------------------ clip_loss


def contrast(dtype, batch, widths, image_of_pair, regime):
    g = torch.Generator().manual_seed(1)
    images = [F.normalize(tensor(g, batch, d, dtype=torch.float32) + 0.3, dim=1).to(dtype) for d in widths]
    noise = [tensor(g, batch, widths[i], dtype=torch.float32) for i in image_of_pair]
    matched = [images[i].float() for i in image_of_pair]
    if regime == "collapsed":  # all logits are as large as they can be
        for y in images:
            y[:] = y[:1].clone()
        blocks = [images[i].float() for i in image_of_pair]
    elif regime == "converged":
        blocks = [3 * y + 0.1 * n for y, n in zip(matched, noise)]
    elif regime == "opposed":  # the first rows point away from all images, the rest have converged
        away = (torch.arange(batch, device=DEVICE) < batch // 3)[:, None]
        blocks = [torch.where(away, -y.mean(0), y) + 0.01 * n for y, n in zip(matched, noise)]
    elif regime == "averse":  # each row points away from its own image, and is far from the others
        blocks = [0.01 * n - y for y, n in zip(matched, noise)]
    else:
        blocks = noise
    if regime == "duplicates":
        for t in (*images, *blocks):
            t[1::2] = t[: batch - 1 : 2].clone()
    if regime == "zeros":
        for t in blocks:
            t[::3] = 0
    return torch.cat(blocks, 1).to(dtype), images


def run_clip(impl, z, images, dtype, image_of_pair, scale, budget, sumsq=None):
    z = z.detach().to(dtype).requires_grad_()
    images = [y.to(dtype) for y in images]
    loss, correct = kernels.clip_loss(
        z, images, image_of_pair, scale, sumsq=sumsq, counts=True, budget_bytes=budget, impl=impl
    )
    weights = torch.linspace(0.5, 2, len(image_of_pair), device=DEVICE, dtype=loss.dtype)
    return loss.detach(), correct, torch.autograd.grad((loss * weights).sum(), z)[0]


CONTRASTS = [
    (1, [7], [0], 20.0, "untrained", 2**30),
    (63, [16, 63], [0, 1, 1], 1.0, "untrained", 2**30),
    (123, [16, 48], [1, 0], 100.0, "untrained", 2**30),
    (123, [48], [0], 100.0, "converged", 2**30),
    (67, [32], [0], 150.0, "untrained", 2**30),
    (67, [32], [0], 150.0, "converged", 2**30),
    (67, [32], [0], 150.0, "opposed", 2**30),
    (67, [32], [0], 80.0, "opposed", 2**30),
    (66, [32, 5], [0, 1], 50.0, "duplicates", 2**30),
    (66, [32, 5], [0, 1], 50.0, "zeros", 2**30),
    (123, [16], [0, 0, 0], 20.0, "untrained", 20000),  # less than one pair: blocks
    (65, [16], [0, 0, 0], 20.0, "untrained", 60000),  # one or two pairs at a time
    (33, [507, 1280], [1, 0], 14.0, "untrained", 2**30),
    (64, [256], [0], 150.0, "averse", 2**30),  # r' is close to 0, and far from s_ii and from r - s_ii
    (100, [128], [0], 1.0, "averse", 2**30),  # nearly all of du is radial
    (40, [64], [0], 82.0, "averse", 2**30),  # exp(logit) from 2^-118 to 2^118: about all that goes without a shift
    (40, [64], [0], 82.0, "collapsed", 2**30),
    (40, [64], [0], 84.0, "averse", 2**30),  # and just beyond
]


SIXTY_PAIRS = (17, [16, 32, 16], [0, 1, 2] * 20, 30.0, "untrained", 2**30)


@runs
@pytest.mark.parametrize("case, dtype", [*product(CONTRASTS, DTYPES), (SIXTY_PAIRS, torch.bfloat16)])
def test_clip_loss(case, dtype):
    batch, widths, image_of_pair, scale, regime, budget = case
    z, images = contrast(dtype, batch, widths, image_of_pair, regime)
    args = image_of_pair, scale, budget
    ours, again = twice(run_clip, "triton", z, images, dtype, *args)
    plain = run_clip("torch", z, images, dtype, *args)
    truth = run_clip("torch", z, images, torch.float64, *args)
    assert all(torch.equal(a, b) for a, b in zip(ours, again)), "two runs differ"
    check("loss", ours[0], plain[0], truth[0])
    check("dz", ours[2], plain[2], truth[2])
    assert ours[1].dtype == torch.int64
    if regime not in ("duplicates", "opposed"):  # where rivals are equal, rounding decides
        assert (ours[1] - truth[1]).abs().max() <= (plain[1] - truth[1]).abs().max() + 1
    if regime == "zeros":
        assert ours[2][::3].abs().max() == 0


@runs
def test_clip_loss_takes_sums_of_squares_and_views_and_needs_no_gradient():
    z, images = contrast(torch.float32, 37, [20, 9], [0, 1], "untrained")
    args = [0, 1], 20.0, 2**30
    loss, correct, dz = run_clip("triton", z, images, torch.float32, *args)
    squares = torch.stack([x.square().sum(1) for x in z.split([20, 9], 1)])
    given = run_clip("triton", z, images, torch.float32, *args, sumsq=squares)
    torch.testing.assert_close((loss, dz), (given[0], given[2]))
    views = torch.stack([z, z], 2)[..., 0], [torch.stack([y, y], 2)[..., 0] for y in images]
    assert torch.equal(run_clip("triton", *views, torch.float32, *args)[2], dz)
    for counts in (False, True):
        alone = kernels.clip_loss(z, images, *args[:2], counts=counts, impl="triton")
        assert torch.equal(alone[0], loss)
        assert torch.equal(alone[1], correct) if counts else alone[1] is None


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs)])
def test_a_second_derivative_is_refused(impl):
    """It would be a constant in silence."""
    z, images = contrast(torch.float32, 9, [5], [0], "untrained")
    z.requires_grad_()
    loss, _ = kernels.clip_loss(z, images, [0], 20.0, impl=impl)
    with pytest.raises(RuntimeError, match="clip_loss: .*create_graph"):
        torch.autograd.grad(loss.sum(), z, create_graph=True)


@runs
def test_a_second_derivative_of_ragged_connectors_is_refused():
    features, layers, inputs = leaves(*connector(torch.float32, 9, [5], [6], [7, 8], "each"), torch.float32)
    z, _ = kernels.connector_mlp(features, layers, impl="triton")
    with pytest.raises(RuntimeError, match="connector_mlp: .*create_graph"):
        torch.autograd.grad(z.sum(), inputs, create_graph=True)


@runs
def test_partials_of_more_tiles_than_reduce_takes_at_once(monkeypatch):
    from kernels import contrastive

    z, images = contrast(torch.float32, 123, [16, 16], [0, 1], "untrained")  # four tiles high, two wide
    at_once = run_clip("triton", z, images, torch.float32, [0, 1], 20.0, 2**30)
    monkeypatch.setattr(contrastive, "REDUCE", contrastive.REDUCE._replace(n=1))
    for one_by_one, together in zip(run_clip("triton", z, images, torch.float32, [0, 1], 20.0, 2**30), at_once):
        torch.testing.assert_close(one_by_one, together)


@runs
def test_launches_whose_tiles_do_not_fit_are_refused(monkeypatch):
    from kernels import launch

    z, images = contrast(torch.bfloat16, 9, [5], [0], "untrained")
    for other in (launch.INTERPRETER._replace(m=64), launch.INTERPRETER._replace(k=128)):
        choices = {"gradient_stored": other}
        monkeypatch.setattr(launch, "choose", lambda name, x, c=choices: c.get(name, launch.INTERPRETER))
        with pytest.raises(AssertionError):
            kernels.clip_loss(z.requires_grad_(), images, [0], 20.0, impl="triton")


@runs
def test_tables_are_uploaded_before_a_graph_is_captured_and_kept_for_it(monkeypatch):
    from kernels import launch

    monkeypatch.setattr(launch, "captured_tables", {})
    z, images = contrast(torch.float32, 9, [5, 6], [1, 0], "untrained")
    launch.table.cache_clear()
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run the same step once"):
        kernels.clip_loss(z, images, [1, 0], 20.0, impl="triton")
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    kernels.clip_loss(z, images, [1, 0], 20.0, impl="triton")
    assert not launch.captured_tables
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    kernels.clip_loss(z, images, [1, 0], 20.0, impl="triton")
    assert len(launch.captured_tables) == 1

    features, layers = [torch.zeros(3, 4)], [Layer([torch.zeros(5, 4)], [torch.zeros(5)], [(0, 0)])]
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    kernels.connector_mlp(features, layers, impl="triton")
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    kernels.connector_mlp(features, layers, impl="triton")  # whose plan has its tables ready
    assert len(launch.captured_tables) == 2


@runs
def test_torch_compile_leaves_the_launches_alone():
    z, images = contrast(torch.float32, 9, [5], [0], "untrained")
    z.requires_grad_()

    def doubled(z):
        return 2 * kernels.clip_loss(z, images, [0], 20.0, impl="triton")[0]

    compiled = torch.compile(doubled, backend="eager")
    ours, plain = compiled(z), doubled(z)
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, plain)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime, scale, budget", [("untrained", 20.0, 2**30), ("averse", 150.0, 2**30), ("zeros", 50.0, 9000)])
def test_the_shares_of_a_batch_make_the_loss_of_the_batch(dtype, regime, scale, budget):
    """Three processes, here threads, of 15, 15 and 11 of 41 rows."""
    z, images = contrast(dtype, 41, [12, 7], [0, 1, 1], regime)
    plain = share_losses([41], z, images, dtype, scale, budget)
    truth = share_losses([41], z, images, torch.float64, scale, budget)
    ours = share_losses([15, 15, 11], z, images, dtype, scale, budget)
    check("loss", ours[0], plain[0], truth[0])
    check("dz", ours[1], plain[1], truth[1])


def share_losses(sizes, z, images, dtype, scale, budget):
    """(the sum over the processes of their losses [P], their gradients one below the other [B, sum D]). sizes: rows of each."""
    meeting, sent = threading.Barrier(len(sizes)), [None] * len(sizes)

    def gather(place, tensor):
        sent[place] = tensor
        meeting.wait()
        whole = torch.stack(sent)
        meeting.wait()  # before anyone sends again
        return whole

    def run(place):
        first = sum(sizes[:place])
        share = kernels.Share(first, functools.partial(gather, place)) if len(sizes) > 1 else None
        own = z[first : first + sizes[place]].to(dtype).requires_grad_()
        args = own, [y.to(dtype) for y in images], [0, 1, 1], scale
        loss, _ = kernels.clip_loss(*args, share=share, budget_bytes=budget, impl="torch")
        return loss.detach(), torch.autograd.grad(loss.sum(), own)[0]

    with ThreadPoolExecutor(len(sizes)) as threads:
        losses, grads = zip(*threads.map(run, range(len(sizes))))
    return sum(losses), torch.cat(grads)


def test_reference_clip_loss_is_the_textbook_one():
    z, images = contrast(torch.float32, 41, [12, 7], [0, 1, 1], "untrained")
    z, images = z.double().requires_grad_(), [y.double() for y in images]
    for scale, budget in ((1.0, 2**30), (100.0, 2**30), (100.0, 41 * 8 * 4 * 10)):
        scale = torch.tensor(scale, dtype=torch.float64, device=DEVICE, requires_grad=True)
        ours, correct = kernels.clip_loss(z, images, [0, 1, 1], scale, counts=True, budget_bytes=budget, impl="torch")
        losses, counts, rows = [], [], torch.arange(41, device=DEVICE)
        for x, i in zip(z.split([12, 7, 7], 1), [0, 1, 1]):
            s = scale * F.normalize(x, dim=1) @ images[i].T
            losses.append((F.cross_entropy(s, rows) + F.cross_entropy(s.T, rows)) / 2)
            counts.append([int((s.argmax(d) == rows).sum()) for d in (1, 0)])
        assert correct.tolist() == counts
        weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
        grads = [torch.autograd.grad(weights @ t, (z, scale)) for t in (ours, torch.stack(losses))]
        torch.testing.assert_close((ours, *grads[0]), (torch.stack(losses), *grads[1]))


# ------------------------------------------------------------------------------------------------ adamw_outer, true_rank


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs)])
@pytest.mark.parametrize("rows, shape", [(1, (1, 7)), (54, (63, 123)), (70, (33, 507))])
def test_adamw_outer_follows_torch(impl, rows, shape):
    g = torch.Generator().manual_seed(2)
    weight = tensor(g, *shape, dtype=torch.float32)
    truth = weight.double().requires_grad_()
    theirs = weight.clone().requires_grad_()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    adams = [torch.optim.AdamW([p], **options) for p in (truth, theirs)]
    states = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        a, b = (tensor(g, n, rows, dtype=torch.float32).T for n in shape)  # columns first: any strides
        clip = torch.tensor(0.3, device=DEVICE) if step % 2 else None
        for p, adam in zip((truth, theirs), adams):
            p.grad = (a.to(p.dtype).T @ b.to(p.dtype)) * (1 if clip is None else clip)
            adam.step()
        kernels.adamw_outer(weight, *states, a, b, step=step, clip=clip, impl=impl, **options)
        norm = kernels.outer_grad_norm_sq(a, b)
        torch.testing.assert_close(norm, (a.double().T @ b.double()).square().sum())
    check("weight", weight, theirs.detach(), truth.detach())
    for state, name in zip(states, ("exp_avg", "exp_avg_sq")):
        check(name, state, adams[1].state[theirs][name], adams[0].state[truth][name])


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs)])
@pytest.mark.parametrize("columns", [65, 513])
def test_adamw_outer_takes_its_numbers_from_a_tensor(impl, columns):
    """One tensor that is written before each step, as before each replay of a CUDA graph: the bits are those of step and lr."""
    g = torch.Generator().manual_seed(6)
    options = {"betas": (0.8, 0.95), "weight_decay": 0.1}
    states = [tensor(g, 37, columns, dtype=torch.float32).abs() for _ in range(3)]
    states = [kernels.padded_rows(state) for state in states] if impl == "triton" else states
    twins = [kernels.padded_rows(state.clone()) if impl == "triton" else state.clone() for state in states]
    numbers = torch.zeros(5, dtype=torch.float32 if impl == "triton" else torch.float64, device=DEVICE)
    for step, lr in ((1, 0.1), (2, 0.05), (1000, 0.01)):
        a, b = tensor(g, 30, 37, dtype=torch.float32), tensor(g, 30, columns, dtype=torch.float32)
        kernels.adamw_outer(*states, a, b, step=step, lr=lr, impl=impl, **options)
        numbers.copy_(torch.tensor(kernels.adamw_numbers(step, lr, **options), dtype=torch.float64))
        kernels.adamw_outer(*twins, a, b, numbers=numbers, impl=impl, **options)
        for ours, theirs in zip(states, twins):
            assert torch.equal(ours, theirs)


@runs
@pytest.mark.parametrize("columns", [33, 65, 513])
def test_adamw_outer_leaves_the_padding_of_rows_alone(columns):
    """Rows that begin on multiples of 16 numbers, as those of the paper's head with its 513 columns do on a GPU."""
    g = torch.Generator().manual_seed(5)
    a, b = tensor(g, 30, 37, dtype=torch.float32), tensor(g, 30, columns, dtype=torch.float32)
    plain = [tensor(g, 37, columns, dtype=torch.float32).abs() for _ in range(3)]
    padded = [kernels.padded_rows(state) for state in plain]
    assert padded[0].shape == plain[0].shape and padded[0].stride(0) % 16 == 0
    between = [state.as_strided((37, state.stride(0) - columns), state.stride(), columns) for state in padded]
    for numbers in between:
        assert not numbers.any()
        numbers.fill_(7)
    for impl, states in (("torch", plain), ("triton", padded)):
        kernels.adamw_outer(*states, a, b, step=2, lr=0.1, weight_decay=0.5, impl=impl)
    for ours, theirs in zip(padded, plain):
        torch.testing.assert_close(ours, theirs)
    for numbers in between:
        assert (numbers == 7).all()
    with pytest.raises(ValueError, match="exp_avg: .*padded_rows"):
        kernels.adamw_outer(plain[0], *padded[1:], a, b, step=3, lr=0.1, impl="triton")


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_outer_takes_short_factors(dtype):
    g = torch.Generator().manual_seed(3)
    a, b = tensor(g, 40, 63, dtype=dtype), tensor(g, 40, 65, dtype=dtype)
    results = []
    for impl, t in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        state = torch.float64 if t == torch.float64 else torch.float32
        w, m, v = (torch.zeros(63, 65, dtype=state, device=DEVICE) for _ in range(3))
        kernels.adamw_outer(w, m, v, a.to(t), b.to(t), step=1, lr=0.1, impl=impl)
        results.append((w, m, v))
    for ours, plain, truth in zip(*results):
        check("state", ours, plain, truth)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs)])
@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (77, 123, 33), (40, 507, 16)])
def test_true_rank(impl, n, m, d):
    g = torch.Generator().manual_seed(4)
    queries, targets = (torch.randint(-3, 4, (rows, d), generator=g).float().to(DEVICE) for rows in (n, m))  # exact
    match = torch.randint(0, m, (n,), generator=g).to(DEVICE)
    scores = queries @ targets.T
    rank = (scores >= scores.gather(1, match[:, None])).sum(1) - 1
    assert torch.equal(kernels.true_rank(queries, targets, match, impl=impl), rank)
    assert torch.equal(kernels.true_rank(queries, targets, match, block_bytes=5 * m, impl=impl), rank)
    collapsed = targets[:1].expand(m, d)
    assert (kernels.true_rank(queries, collapsed, match, impl=impl) == m - 1).all()
    broken = torch.full_like(targets, torch.nan)  # a NaN is no lower than anything
    assert (kernels.true_rank(queries, broken, match, impl=impl) == m - 1).all()
    broken = targets.clone()
    broken[0] = torch.nan
    ahead = (match != 0).long()  # in the way of every query but its own, which it takes to the last place
    expected = torch.where(match == 0, m - 1, kernels.true_rank(queries, targets, match) + ahead)
    was_ahead = (scores[:, 0] >= scores.gather(1, match[:, None])[:, 0]).long() * ahead
    assert torch.equal(kernels.true_rank(queries, broken, match, impl=impl), expected - was_ahead)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_offsets_beyond_two_to_the_31():
    batch, width = 2**17 + 3, 2**14 + 16  # 2.1e9 numbers in the output
    x = [torch.randn(batch, 16, device="cuda", dtype=torch.bfloat16)]
    layer = Layer([torch.randn(width, 16, device="cuda", dtype=torch.bfloat16)],
                  [torch.zeros(width, device="cuda", dtype=torch.bfloat16)], [(0, 0)])  # fmt: skip
    z, _ = kernels.connector_mlp(x, [layer], impl="triton")
    expected, _ = reference.connector_mlp([x[0][-5:]], [layer])
    torch.testing.assert_close(z[-5:], expected)
