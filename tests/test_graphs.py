"""hyma/graphs.py: a step that is recorded gives what an ordinary one gives, and reads and copies nothing of the host's.

Without a GPU a tape stands in for a CUDA graph (`Tape`), and torch's device "meta" for the GPU's memory.
"""

import argparse
import functools
import gc
import shutil

import pytest
import torch
from helpers import CPU, read_connectors
from torch.optim import adam
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from hyma import graphs, pairs, ranks
from hyma.files import read_jsonl
from hyma.graphs import RecordedSteps, record_steps
from hyma.hypernetworks import MlpHypernetwork
from hyma.pairs import Pairs, count_sets, draw_pairs
from hyma.training import Schedule
from train_hyma import Inputs, project_store, train_step

SCRIPTS = ("train_hyma.py", "train_grid.py")
GPU = torch.cuda.is_available()
QUICK = ("--epochs", "6", "--batch-size", "128", "--warmup-steps", "5", "--device", "cpu")


def tensors_of(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


# ------------------------------------------------------------------------------------------------ a CUDA graph on a CPU


class Tape(TorchDispatchMode):
    """All operations of torch that run within it, below autograd, with the tensors that they read and wrote. `replay` runs them
    again on these tensors, as a CUDA graph does: Python numbers are what they were, and no Python code runs."""

    def __init__(self):
        super().__init__()
        self.operations = []  # (operation, its arguments, its keyword arguments, what it returned)
        self.before = []  # (a tensor that an operation wrote into, what that held)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert operation != torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        named = dict(zip((argument.name for argument in operation._schema.arguments), args)) | kwargs
        for argument in operation._schema.arguments:
            if argument.alias_info and argument.alias_info.is_write:
                for tensor in tensors_of(named.get(argument.name)):
                    self.before.append((tensor, tensor.clone()))
        returned = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, returned))
        return returned

    def rewind(self):
        """Undoes what has been written: a recording runs nothing."""
        with torch.no_grad():
            for tensor, held in reversed(self.before):
                tensor.copy_(held)
        self.before.clear()

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, returned in self.operations:
            again = operation(*args, **kwargs)
            for into, tensor in zip(tensors_of(returned), tensors_of(again)):
                into.copy_(tensor)


class TapeRecorder(graphs.Recorder):
    """Records tapes."""

    device_type = "cpu"
    tapes = []  # of all recorders, until a test clears them

    def __init__(self, device):
        pass

    def warm_up(self, function):
        return function()

    def record(self, function):
        tape = Tape()
        with tape:
            returned = function()
        tape.rewind()
        self.tapes.append(tape)
        return tape.replay, returned


@pytest.fixture
def tapes(monkeypatch):
    """Tapes in place of CUDA graphs, and the pairs of a step in the same order with and without them."""
    monkeypatch.setattr(TapeRecorder, "tapes", [])
    monkeypatch.setattr(graphs, "Recorder", TapeRecorder)
    draw = pairs.draw_round
    monkeypatch.setattr(pairs, "draw_round", lambda *given: [sorted(of_step) for of_step in draw(*given)])
    return TapeRecorder.tapes


def test_a_tape_repeats_numbers_and_reads_tensors_anew():
    """What a step must not do is seen: a Python number that changes stays as it was at the recording, a tensor does not."""
    weight = torch.zeros(3)
    count = 0

    def step(pairs, rows):
        nonlocal count
        count += 1
        weight.add_(rows * count)
        return weight.sum()[None]

    steps = RecordedSteps(step, TapeRecorder(CPU))
    losses = [steps(["a"], torch.full([3], float(value))) for value in (1, 10, 100)]
    assert weight.tolist() == [1 + 2 * 10 + 2 * 100] * 3  # an ordinary step, a recording at 2, which runs nothing, two replays
    assert torch.cat(losses).tolist() == [3, 63, 663]  # those of earlier steps stay
    steps(["b"], torch.ones(3))
    assert len(steps.recordings) == 2 and weight[0] == 221 + 3


# ------------------------------------------------------------------------------------------------------ the whole run


def same_run(one, two):
    """Connectors to the bit, ranking and losses."""
    ours, theirs = read_connectors(one), read_connectors(two)
    assert ours and ours.keys() == theirs.keys()
    for name in ours:
        assert all(map(torch.equal, ours[name].values(), theirs[name].values())), name
    assert (one / "ranking.csv").read_bytes() == (two / "ranking.csv").read_bytes()
    for line, other in zip(read_jsonl(one / "metrics.jsonl"), read_jsonl(two / "metrics.jsonl"), strict=True):
        assert line | {"seconds": 0} == other | {"seconds": 0}


MLP = ("--generator", "mlp", "--width", "4", "--connector", "mlp0")


@pytest.mark.parametrize(
    "script, flags, sets",
    [
        ("train_hyma.py", ("--pairs-per-step", "2", "--refine-steps", "9"), [12, 1]),
        ("train_hyma.py", MLP, [2, 1]),
        ("train_grid.py", ("--halving", "--connector", "mlp0"), [4]),
    ],
)
def test_a_run_of_recorded_steps_gives_the_same_bits(run, planted, tmp_path, tapes, script, flags, sets):
    flags = ("--data", planted, *QUICK, *flags)
    assert run(script, *flags, "--out", "plain").code == 0 and not tapes
    result = run(script, *flags, "--graph", "--out", "graph")
    assert result.code == 0, result.err
    assert f"up to {sets[0]} sets of pairs" in result.out and len(tapes) <= sum(sets)
    same_run(tmp_path / "plain", tmp_path / "graph")


def test_a_run_goes_on_with_graphs_and_without(run, run_until_results, planted, tmp_path, tapes):
    """From the checkpoint before the last, either way: AdamW's own counts of steps are in it, its options are not."""
    flags = ("--data", planted, *QUICK, "--pairs-per-step", "2", "--refine-steps", "0")
    flags += ("--pairs", "*:minilm_l6", "--epochs", "30")  # so many have a validation, and so a checkpoint, half way
    assert run("train_hyma.py", *flags, "--out", "whole").code == 0
    run_until_results("train_hyma.py", *flags, "--out", "plain")
    run_until_results("train_hyma.py", *flags, "--graph", "--out", "graph")
    for out, more in (("plain", ["--graph"]), ("graph", [])):
        shutil.copy(tmp_path / out / "checkpoint.previous.pt", tmp_path / out / "checkpoint.pt")
        result = run("train_hyma.py", *flags, *more, "--out", out)
        assert result.code == 0 and "resumed: " in result.out, result.err
        same_run(tmp_path / "whole", tmp_path / out)


# ------------------------------------------------------------------------------------------ where there are no graphs


def test_graphs_need_a_gpu_one_process_and_rows_in_its_memory(refused, run, planted, tapes, monkeypatch, capfd):
    monkeypatch.setattr(graphs.Recorder, "device_type", "cuda")
    for script in SCRIPTS:
        refused(script, "--data", planted, *QUICK, "--graph", says=["--graph", "this run is on cpu", "leave it out"])

    def step(pairs, rows):
        return rows

    store = argparse.Namespace(is_resident=True, device=CPU)
    assert isinstance(record_steps(step, store, 1000), RecordedSteps) and "1000 sets" in capfd.readouterr().out
    assert record_steps(step, store, 1001) is step and "1001 ways" in capfd.readouterr().out
    store.is_resident = False
    assert record_steps(step, store, 1) is step and "do not fit" in capfd.readouterr().out
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert record_steps(step, store, 1) is step and "processes" in capfd.readouterr().out


def test_a_step_that_cannot_be_recorded_ends_in_one_line(refused, planted, tapes, monkeypatch):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(TapeRecorder, "record", record)
    says = ["--graph", "cannot record a step", "not permitted when stream is capturing", "leave --graph out"]
    refused("train_hyma.py", "--data", planted, *QUICK, "--graph", says=says)


@pytest.mark.parametrize("images, each", [(9, 3), (5, 3), (4, 4), (2, 5), (7, 1)])
def test_the_sets_of_pairs_are_counted(images, each):
    drawable = [(f"i{i}", f"t{t}") for i in range(images) for t in range(2)]
    drawn = {frozenset(draw_pairs(step, 0, drawable, each)) for step in range(3000)}
    assert len(drawn) == count_sets(drawable, each)


# --------------------------------------------------------------------------------------------- nothing of the host's


class NothingOfTheHost(TorchDispatchMode):
    """Fails where the host reads a tensor of the device, or the device one of the host. A 0-dim tensor of the host may be an
    argument: its number goes with the launch."""

    def __init__(self):
        super().__init__()
        self.known = {}  # memory of the device that was there before, or that an operation has made
        self.learn([thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)])

    def learn(self, tensors):
        for tensor in tensors:
            self.known[tensor.untyped_storage()._cdata] = tensor

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation != torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        returned = operation(*args, **kwargs or {})
        given = tensors_of((args, kwargs))
        if any(tensor.device.type == "meta" for tensor in [*given, *tensors_of(returned)]):
            is_copy = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            for tensor in given:
                is_host = tensor.device.type == "cpu"
                assert not (is_host and (tensor.dim() or is_copy)), f"{operation} reads the host's memory"
                is_known = is_host or tensor.untyped_storage()._cdata in self.known
                assert is_known, f"{operation} reads a tensor that was made of the host's numbers"
            self.learn(tensors_of(returned))
        return returned


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: x[[0, 1]],
        lambda x: x + torch.ones(3),
        lambda x: x + torch.tensor([1.0], device="meta"),
        lambda x: torch.ones(()).to("meta"),
        lambda x: torch.ones(3).to(x),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x[x > 0],
    ],
)
def test_what_crosses_between_host_and_device_is_seen(fault):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingOfTheHost():
        fault(torch.zeros(3, device="meta"))


def launch_nothing(monkeypatch):
    """Sends everything to the launchers of the Triton kernels, which run on the host, and has them launch nothing."""
    pytest.importorskip("triton")
    from kernels import launch

    launched = []
    tables = functools.cache(lambda rows, device: torch.zeros(len(rows), len(rows[0]), dtype=torch.int64, device=device))
    monkeypatch.setattr(kernels, "_use_triton", lambda impl, tensors: True)
    monkeypatch.setattr(launch, "table", tables)
    monkeypatch.setattr(launch, "chip", lambda device: "hopper")
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *args, **meta: launched.append(kernel.__name__))
    return launched


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["factored", "mlp"])
def test_a_step_reads_and_copies_nothing_of_the_host(initialise, monkeypatch, kind, impl):
    """A second step: a first one makes AdamW's moments and copies the mlp generator's indices and the kernels' tables."""
    launched = launch_nothing(monkeypatch) if impl == "triton" else []
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *given: None)  # which knows no "meta"
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_adamw_.tensor_lr", lambda *given, **options: None)  # nor does this
    flags = argparse.Namespace(
        split="pairs", logit_scale=20.0, clip_norm=1.0, weight_decay=0.01, precision="fp32", generator=kind
    )
    found = initialise(1)
    store, generator = found.store, found.generator
    images, texts = found.data.names("image"), found.data.names("text")
    of_step = [(image, texts[0]) for image in images[:2]]
    if kind == "mlp":
        dims = ({name: store.dims[name] for name in names} for names in (images, texts))
        generator = MlpHypernetwork(*dims, 1, 4)
    of_run = Pairs(of_step, [], of_step, images, texts, None)
    inputs = Inputs(found.data, of_run, found.rows, found.val_rows, store, None)
    projected = project_store(flags, inputs, generator)
    for held in (store.tensors, getattr(projected, "coordinates", {})):
        for name in held:
            held[name] = held[name].to("meta")
    store.device = projected.device = torch.device("meta")
    generator = generator.to("meta")
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True, capturable=True)
    moments = generator.outer_moments()
    rows = found.rows[:64].to("meta")
    schedule = Schedule(10, 1e-3, 2, 0.01, torch.device("meta"))
    given = generator, optimizer, moments, projected, torch.float32, flags, of_step, rows, schedule.numbers(0)
    train_step(*given)
    with NothingOfTheHost():
        losses = train_step(*given)
    assert {"clip_bwd_kernel", "logits_kernel"} <= set(launched) or impl == "torch"
    assert ("adamw_outer_kernel" in launched) == (kind == "mlp" and impl == "triton")
    assert losses.shape == (2,) and not losses.requires_grad
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(factor.requires_grad for factor in getattr(generator, "outer", []))  # nothing else outlives the step


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("flags", [("--pairs-per-step", "2", "--refine-steps", "9"), MLP])
def test_graphs_on_a_gpu_give_the_same_losses(run, planted, tmp_path, monkeypatch, flags):
    draw = pairs.draw_round
    monkeypatch.setattr(pairs, "draw_round", lambda *given: [sorted(of_step) for of_step in draw(*given)])
    flags = ("--data", planted, *QUICK[:-2], "--device", "cuda", *flags)
    for more in ((), ("--graph",)):
        result = run("train_hyma.py", *flags, *more, "--out", f"run{len(more)}")
        assert result.code == 0, result.err
    plain, graph = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run0", "run1"))
    assert [line["loss"] for line in graph] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
