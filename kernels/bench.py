"""Check every kernel, then time it: python -m kernels.bench [--json FILE] [--quick]

One shape is P pairs of the chosen widths and a batch B; each operation runs as our kernels and as the torch
compositions of kernels/baselines.py (the "strong" one compiled), and the loss also as the published kernels that are
installed, such as memeff. "adamw_outer" runs on the paper's head: 512 hidden units and a bias, with and without
padded rows.

"forward" and "backward" are connector_mlp's, "loss" is clip_loss with its gradient, "step" is a whole training step: all of
it from float32 weights cast for the products, and fused AdamW. Every shape is checked before it is timed: a kernel whose
error is more than twice plain torch's is not timed. Inputs rotate and outgrow the cache. Times are the 20th, 50th and 80th
percentile in milliseconds of calls that wait for each other, and the median of the same call replayed as a CUDA graph;
rates are of the useful work in the shorter median, and "roof" is its share of the better of what matrix products and
copies reach on this device in this run. A row has the GPU's clocks right after it, and is in FILE as soon as it is
measured. On the CPU only the torch paths run, at small shapes.
"""

import argparse
import functools
import importlib
import itertools
import subprocess

import torch
import torch.nn.functional as F

import kernels
from kernels import Layer, baselines
from kernels.baselines import HIDDEN, SCALE
from kernels.timing import Results, clocks, own_stream, sets_beyond_cache, time_calls

WIDTHS = {  # text encoders, image encoders
    "design": ([384, 768, 1024], [384] * 3 + [768] * 3 + [1024] * 3),
    "sample": ([384, 768], [1280] * 3 + [512]),
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
HEAD_OUTPUTS = 2**19  # outputs of the published hypernetwork's last layer
HEAD_WIDTHS = {"513": (513, False), "513 padded": (513, True), "1024": (1024, False)}  # its inputs, a bias among them

OPERATIONS = ("forward", "backward", "loss", "step")


class Shape:
    """P pairs (the widths' pairs repeated or cut), B rows: sets of inputs to rotate through, and the useful work."""

    def __init__(self, pairs, batch, widths, dtype, device, generator, sets=None):
        """pairs: P. batch: B. widths: a key of WIDTHS. generator: "factored", whose pairs share layers, or "each". sets: how many
        sets of inputs; by default as many as outgrow the cache."""
        self.batch, self.dtype, self.device, self.generator = batch, dtype, device, generator
        self.texts, self.images = WIDTHS[widths]
        self.pairs = spread_pairs(len(self.texts), len(self.images), pairs)  # [P] (text, image)
        self.text_of = []  # [P] the text encoder of each pair
        self.image_of = []
        self.widths_in = []  # [P] its width
        self.widths_out = []
        for t, i in self.pairs:
            self.text_of.append(t)
            self.image_of.append(i)
            self.widths_in.append(self.texts[t])
            self.widths_out.append(self.images[i])
        widths_out = torch.tensor(self.widths_out, dtype=torch.int32, device=device)
        self.ends = widths_out.cumsum(0, dtype=torch.int32)  # [P] where each pair's columns of z end
        self.sets = [self.draw(0)]
        for seed in range(1, sets or sets_beyond_cache(device, self.set_bytes())):
            self.sets.append(self.draw(seed))
        self.flops = self.count_flops()
        self.bytes = self.count_bytes()

    def set_bytes(self):
        """Bytes of one set of inputs."""
        features, layers, images = self.sets[0]
        tensors = [*features, *flat(layers), *images]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def count_flops(self):
        """{operation: FLOPs}, 2 a multiply-add."""
        of_first = 2 * self.batch * HIDDEN * sum(self.texts if self.generator == "factored" else self.widths_in)
        of_last = 2 * self.batch * HIDDEN * sum(self.widths_out)
        flops = {
            "forward": of_first + of_last,
            "backward": 2 * (of_first + of_last) - of_first,  # the texts get no gradient
            "loss": 2 * 2 * self.batch * self.batch * sum(self.widths_out),
        }
        return flops | {"step": sum(flops.values())}

    def count_bytes(self):
        """{operation: bytes that must be read and written}."""
        size = torch.finfo(self.dtype).bits // 8
        _, layers, _ = self.sets[0]
        weights = 0
        for layer in layers:
            for weight in layer.weights:
                weights += weight.numel()
        hidden = self.batch * HIDDEN * (len(self.texts) if self.generator == "factored" else len(self.pairs))
        x = self.batch * sum(self.texts)
        y = self.batch * sum(self.images)
        z = self.batch * sum(self.widths_out)
        forward = (weights + x + hidden + z) * size
        found = {"forward": forward, "backward": 2 * forward, "loss": (2 * z + y) * size}
        # AdamW reads weight, gradient and two moments, and writes all but the gradient
        return found | {"step": sum(found.values()) + 28 * weights}

    def draw(self, seed):
        """(features, layers, images). Weights of a layer lie end to end, as a generator's output does."""
        random = torch.Generator(self.device).manual_seed(seed)
        layers = []
        for shapes, wiring in self.structure():
            weights = self.draw_weights(random, shapes)
            biases = []
            for n, _ in shapes:
                biases.append(torch.zeros(n, device=self.device, dtype=self.dtype, requires_grad=True))
            layers.append(Layer(weights, biases, wiring))
        return self.draw_rows(random, self.texts), layers, self.draw_rows(random, self.images)

    def structure(self):
        """(shapes of the weights, wiring) of both layers."""
        if self.generator == "factored":
            first = [(HIDDEN, dim) for dim in self.texts]
            last = [(dim, HIDDEN) for dim in self.images]
            own = range(len(self.texts))
            return (first, list(zip(own, own))), (last, self.pairs)
        first = [(HIDDEN, dim) for dim in self.widths_in]
        last = [(dim, HIDDEN) for dim in self.widths_out]
        own = range(len(self.pairs))
        return (first, list(zip(self.text_of, own))), (last, list(zip(own, own)))

    def draw_weights(self, random, shapes):
        """Leaves of these shapes, which are views of one flat tensor."""
        parts = []
        for n, k in shapes:
            parts.append(self.normal(random, n * k) * k**-0.5)
        sizes = [n * k for n, k in shapes]
        weights = []
        for part, shape in zip(torch.cat(parts).to(self.dtype).split(sizes), shapes):
            weights.append(part.view(shape).detach().requires_grad_())
        return weights

    def draw_rows(self, random, widths):
        """Unit vectors [B, width] of each encoder."""
        rows = []
        for width in widths:
            rows.append(F.normalize(self.normal(random, self.batch, width), dim=1).to(self.dtype))
        return rows

    def normal(self, random, *shape):
        return torch.randn(*shape, generator=random, device=self.device, dtype=torch.float32)


def spread_pairs(text_count, image_count, pair_count):
    """[(text, image)]: so many pairs. Fewer than there are are spread over all encoders, more are repeated."""
    every = []
    for image in range(image_count):
        for text in range(text_count):
            every.append((text, image))
    spaced = every[:: max(1, len(every) // pair_count)]
    return [spaced[p % len(spaced)] for p in range(pair_count)]


def ours(impl):
    def connector(shape, features, layers):
        return kernels.connector_mlp(features, layers, impl=impl)[0]

    def loss(shape, z, images):
        return kernels.clip_loss(z, images, shape.image_of, SCALE, impl=impl)[0].sum()

    return connector, loss


def roofline(device, dtype, quick):
    """FLOP/s of a large product and bytes/s of a large copy, measured here."""
    n, size = (8192, 2**30) if device == "cuda" and not quick else (4096, 2**28) if device == "cuda" else (1024, 2**26)
    a, source = torch.randn(n, n, device=device).to(dtype), torch.empty(size, dtype=torch.int8, device=device)
    into = torch.empty_like(source)
    product = time_calls(device, [lambda: a @ a], 0.5)["p20_ms"]
    copy = time_calls(device, [lambda: into.copy_(source)], 0.5)["p20_ms"]
    return 2 * n**3 / product * 1e3, 2 * size / copy * 1e3


def gradients(*args, **kwargs):
    return torch.autograd.grad(*args, **kwargs, allow_unused=True)  # few pairs leave encoders out


def flat(layers):
    """Weights, then biases, layer after layer."""
    tensors = []
    for layer in layers:
        tensors += [*layer.weights, *layer.biases]
    return tensors


def rebuilt(layers, tensors):
    """The same layers of other tensors, given in the order of `flat`."""
    rest = iter(tensors)
    found = []
    for layer in layers:
        weights = list(itertools.islice(rest, len(layer.weights)))
        biases = list(itertools.islice(rest, len(layer.biases)))
        found.append(Layer(weights, biases, layer.wiring))
    return found


def leaves_like(tensors, dtype):
    """Copies of the tensors in this dtype, which ask for a gradient."""
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def operations(shape, connector, loss):
    """name: one call for each set of inputs."""
    calls = {operation: [] for operation in OPERATIONS}
    for features, layers, images in shape.sets:
        leaves = flat(layers)
        z = connector(shape, features, layers)
        dz = torch.ones_like(z)
        leaf = z.detach().requires_grad_()
        masters = [tensor.detach().float().clone().requires_grad_() for tensor in leaves]
        adam = torch.optim.AdamW(masters, fused=True, capturable=shape.device == "cuda")

        def step(f=features, m=layers, y=images, masters=masters, adam=adam):
            cast = leaves_like(masters, shape.dtype)
            found = gradients(loss(shape, connector(shape, f, rebuilt(m, cast)), y), cast)
            for master, gradient in zip(masters, found):
                master.grad = None if gradient is None else gradient.float()
            adam.step()
            return found

        def forward(f=features, m=layers):
            with torch.no_grad():
                return connector(shape, f, m)

        calls["forward"].append(forward)
        calls["backward"].append(lambda z=z, v=leaves, dz=dz: gradients(z, v, dz, retain_graph=True))
        calls["loss"].append(lambda z=leaf, y=images: torch.autograd.grad(loss(shape, z, y), z))
        calls["step"].append(step)
    return calls


def passes(shape, impl):
    """Whether z, the loss and all gradients err at most twice as much as plain torch, against float64."""

    def run(impl, dtype):
        features, layers, images = shape.sets[0]
        features = [x.to(dtype) for x in features]
        images = [y.to(dtype) for y in images]
        leaves = leaves_like(flat(layers), dtype)
        z, sumsq = kernels.connector_mlp(features, rebuilt(layers, leaves), impl=impl)
        loss, _ = kernels.clip_loss(z, images, shape.image_of, SCALE, sumsq=sumsq, impl=impl)
        found = []
        for tensor in (z, loss, *gradients(loss.sum(), leaves)):
            if tensor is not None:  # of an encoder that is left out
                found.append(tensor.detach())
        return found

    return no_worse(run(impl, shape.dtype), run("torch", shape.dtype), run("torch", torch.float64))


def no_worse(ours, plain, truth):
    """Whether each of our tensors errs at most twice as much as plain torch's."""
    return all(map(errs_no_more, ours, plain, truth))


def errs_no_more(ours, plain, truth):
    """The same of one tensor. A NaN errs more."""
    ours, plain = ours.double(), plain.double()
    return (ours - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm() + 1e-12


def bench_rank(results, device, dtype, impl, roof, seconds, quick):
    """true_rank of as many queries as targets, against the whole matrix of scores."""
    n, width = (20000, 1024) if device == "cuda" and not quick else (1000, 768)
    targets = F.normalize(torch.randn(n, width, device=device), dim=1)
    queries = F.normalize(targets + 0.03 * torch.randn_like(targets), dim=1).to(dtype)
    targets, match = targets.to(dtype), torch.arange(n, device=device)

    def whole():
        scores = (queries @ targets.T).float()
        return (scores >= scores.diagonal()[:, None]).sum(1) - 1

    def ours():
        return kernels.true_rank(queries, targets, match, impl=impl)

    if (ours() != whole()).float().mean() > 0.01:  # scores that round alike may change places
        results.leave_out("true_rank FAILS its check and is not timed")
        return
    work = 2 * n * n * width, 2 * n * width * targets.element_size()
    for name, call in ((impl, ours), ("whole", whole)):
        record(results, row("true_rank", name, time_calls(device, [call], seconds), *work, roof, rows=n))


def bench_head(results, device, impl, roof, seconds, quick):
    """adamw_outer on the hypernetwork's last layer, against the gradient in full and fused AdamW."""
    out, rows = (HEAD_OUTPUTS if device == "cuda" and not quick else min(HEAD_OUTPUTS, 2**13)), 54
    for about, (width, padded) in HEAD_WIDTHS.items():
        if padded and impl != "triton":  # plain torch has no use for it
            continue
        dy, x = torch.randn(rows, out, device=device), torch.randn(rows, width, device=device)
        if not head_passes(dy, x, padded, impl):
            results.leave_out(f"adamw_outer of {about} inputs FAILS its check and is not timed")
            continue
        states = head_states(out, width, torch.float32, device, padded)
        parameter = torch.zeros(out, width, device=device, requires_grad=True)
        adam = torch.optim.AdamW([parameter], fused=True, capturable=device == "cuda")

        def full(parameter=parameter, adam=adam, dy=dy, x=x):
            parameter.grad = dy.T @ x
            adam.step()

        def outer(states=states, dy=dy, x=x):
            kernels.adamw_outer(*states, dy, x, step=3, lr=1e-3, impl=impl)

        work = 0, 24 * out * width
        for name, call in ((impl, outer), ("strong", full)):
            times = time_calls(device, [call], seconds)
            record(results, row("adamw_outer", name, times, *work, roof, rows=rows, outputs=out, inputs=about))
        del states, parameter, adam, full, outer


def head_states(out, width, dtype, device, padded):
    """Weight and two moments, zeros."""
    states = torch.zeros(3, out, width, dtype=dtype, device=device).unbind(0)
    return [kernels.padded_rows(state) for state in states] if padded else list(states)


def head_passes(dy, x, padded, impl):
    """Whether three steps of adamw_outer err at most twice as much as plain torch's."""

    def run(impl, dtype):
        states = head_states(dy.shape[1], x.shape[1], dtype, dy.device, padded and impl == "triton")
        for step in (1, 2, 3):
            kernels.adamw_outer(*states, (dy / step).to(dtype), x.to(dtype), step=step, lr=1e-3, impl=impl)
        return states

    return no_worse(run(impl, torch.float32), run("torch", torch.float32), run("torch", torch.float64))


def row(operation, name, times, flops, size, roof, **shape):
    """A row of the results. times: of `time_calls`. flops, size: the useful work. roof: of `roofline`."""
    shortest = min(times["p50_ms"], times["graph_p50_ms"] or times["p50_ms"])
    floor = max(flops / roof[0], size / roof[1]) * 1e3
    return {"operation": operation, "impl": name, **shape, **times, "tflops": flops / shortest / 1e9,
            "gb_per_s": size / shortest / 1e6, "roof_percent": 100 * floor / shortest}  # fmt: skip


def record(results, r):
    """Adds a row, safe from now on, and prints it."""
    results.add(r)
    where = " ".join(f"{k[0].upper()}={r[k]}" for k in ("pairs", "batch", "rows", "outputs", "inputs") if k in r)
    graph = "  no graph" if r["graph_p50_ms"] is None else f"{r['graph_p50_ms']:10.3f}"
    peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:9.0f} MiB"
    print(f"{r['operation']:12} {where:24} {r['impl']:24} {r['p20_ms']:9.3f} {r['p50_ms']:9.3f} {r['p80_ms']:9.3f} ms, graph "
          f"{graph} ms {r['tflops']:7.2f} TFLOP/s {r['gb_per_s']:7.1f} GB/s {r['roof_percent']:5.1f} % roof{peak}",
          flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--json", metavar="FILE", help="write all rows, device, versions and commit")
    parser.add_argument("--quick", action="store_true", help="one small shape, short timings")
    parser.add_argument("--pairs", type=int, nargs="+", default=[27, 3, 108] if cuda else [3])
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048, 4096, 16384] if cuda else [256])
    parser.add_argument("--widths", choices=WIDTHS, default="design")
    parser.add_argument("--generator", choices=("factored", "each"), default="factored")
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if cuda else "fp32")
    parser.add_argument("--only", choices=("head", "rank", "pairs"), help="one part of the bench")
    args = parser.parse_args()
    device, impl, dtype = ("cuda", "triton", DTYPES[args.precision]) if cuda else ("cpu", "torch", DTYPES["fp32"])
    torch.backends.cuda.matmul.fp32_precision = "tf32" if args.precision == "tf32" else "ieee"
    if args.quick:
        args.pairs, args.batch = args.pairs[:1], args.batch[:1]
    seconds = 0.1 if args.quick else 0.4
    if not cuda:
        print("no GPU: timing the torch paths alone, in float32")
    with own_stream(device):
        bench(args, device, impl, dtype, seconds)


def bench(args, device, impl, dtype, seconds):
    """The parts that the flags ask for."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    roof = roofline(device, dtype, args.quick)
    print(f"{name}, torch {torch.__version__}: {roof[0] / 1e12:.2f} TFLOP/s, {roof[1] / 1e9:.1f} GB/s", flush=True)
    results = Results(args.json, about(name, args, roof))
    if args.only in (None, "head"):
        bench_head(results, device, impl, roof, seconds, args.quick)
    if args.only in (None, "rank"):
        bench_rank(results, device, dtype, impl, roof, seconds, args.quick)
    if args.only in (None, "pairs"):
        for pairs in args.pairs:
            for batch in args.batch:
                shape = Shape(pairs, batch, args.widths, dtype, device, args.generator)
                bench_shape(results, shape, impl, roof, seconds)


def about(name, args, roof):
    """What the rows were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    triton = importlib.import_module("triton").__version__ if kernels.triton_runs() else None
    return {"device": name, "torch": torch.__version__, "triton": triton, "commit": commit, "arguments": vars(args),
            "tflops": roof[0] / 1e12, "gb_per_s": roof[1] / 1e9, "clocks": clocks()}  # fmt: skip


def contenders_for(shape, impl):
    """{name: (connector, loss)}, ours first."""
    strong = baselines.strong_connector, baselines.strong_loss
    if shape.device == "cuda":
        strong = tuple(map(functools.partial(torch.compile, dynamic=False), strong))
    found = {impl: ours(impl)}
    if shape.generator == "factored":
        found["dense"] = baselines.dense_connector, ours(impl)[1]
    return found | {
        "strong": strong,
        "padded": (baselines.padded_connector, baselines.padded_loss),
        "loop": (baselines.loop_connector, baselines.loop_loss),
    }


def bench_shape(results, shape, impl, roof, seconds):
    """Rows of every operation and contender. One that runs out of memory, or does not compile, is named and left out."""
    where = {"pairs": len(shape.pairs), "batch": shape.batch}
    label = f"P={where['pairs']} B={where['batch']}"
    if shape.device == "cuda" and not passes(shape, impl):
        results.leave_out(f"{label}: the kernels FAIL their check and are not timed")
        return

    def measure(operation, name, calls):
        times = time_calls(shape.device, calls, seconds)
        work = shape.flops[operation], shape.bytes[operation]
        record(results, row(operation, name, times, *work, roof, **where))

    def attempt(name, do):
        try:
            return do()
        except Exception as error:
            if name == "triton" and not isinstance(error, torch.OutOfMemoryError):
                raise
            results.leave_out(f"{label} {name}: {type(error).__name__}: {str(error)[:80]}")

    for name, pair in contenders_for(shape, impl).items():
        torch.compiler.reset()
        calls = attempt(name, lambda pair=pair: operations(shape, *pair)) or {}
        for operation in calls:
            if name != "dense" or operation != "loss":  # which is ours
                attempt(name, lambda o=operation, n=name, c=calls: measure(o, n, c[o]))
        del calls
    if shape.device == "cuda":
        rivals, missing = baselines.published()
        for name, why in missing.items():
            results.leave_out(f"{label} {name}: {why[:80]}")
        z = torch.randn(shape.batch, sum(shape.widths_out), device="cuda", dtype=shape.dtype, requires_grad=True)
        for name, rival in rivals.items():
            calls = []
            for _, _, images in shape.sets:
                calls.append(functools.partial(published_loss, shape, rival, z, images))
            attempt(name, lambda n=name, c=calls: measure("loss", n, c))


def published_loss(shape, rival, z, images):
    """The gradient of all pairs' loss, one pair after the other."""
    total = 0.0
    for x, i in zip(z.split(shape.widths_out, 1), shape.image_of):
        total = total + rival(F.normalize(x, dim=1), images[i])
    return torch.autograd.grad(total, z)


if __name__ == "__main__":
    main()
