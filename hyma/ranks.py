"""The processes that torchrun starts for one run, each with a rank: which share of the work is whose, and what they exchange.

    torchrun --nproc-per-node 4 train_grid.py ...

This is the only module that knows torch.distributed. In a process that was started by itself every function here returns
at once, so that a trainer is written for any number of ranks. The first rank writes all files and prints; the others
print nothing. Tensors of a step travel between GPUs by NCCL, all else by gloo. Tensors and values alike are read as plain
tensors, numbers and texts: nothing that a process sends is run.
"""

import contextlib
import io
import os
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hyma.files import run_script
from vlm import BadInput

# How long ranks wait for each other: longer than what the first one does alone. A rank that was killed is noticed at once.
PATIENCE = timedelta(minutes=30)
AGREE_EVERY = 8  # steps, after which the ranks ask each other for signals: within the half minute that torchrun gives them


# ------------------------------------------------------------------------------------------------ joining and leaving


def run_on_ranks(main):
    """`run_script`, on every process that torchrun has started. What ends one of them ends all, and is printed once."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        run_script(main)
        return
    store = join()
    status = 0
    try:
        run_script(main)
        leave()
    except BaseException as end:
        sys.stderr = sys.__stderr__
        was_said = isinstance(end, SystemExit) and not isinstance(end.code, str)
        status = report(end) if was_said or is_first_to_fail(store) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo may still hold tensors, and abort a process whose interpreter is at its end (pytorch, pull request 179291).
    os._exit(status)


def report(end):
    """Prints what Python prints of the exception that ends a process. Returns the process's exit status."""
    if not isinstance(end, SystemExit):
        traceback.print_exception(end)
        return 1
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return 1
    return end.code or 0


def join():
    """Makes this process one of the ranks. Returns the store that all of them share."""
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, size = next(dist.rendezvous("env://"))
    except ValueError as error:  # a variable is missing
        script = Path(sys.argv[0]).name
        sys.exit(f"{script}: WORLD_SIZE is set, but torchrun has not started this process: {error}")
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    return store


def leave():
    """Ends the exchange: from here on every rank is by itself. Returns whether this is the first, which goes on."""
    first = is_first()
    if dist.is_initialized():
        dist.destroy_process_group()
    return first


def is_first_to_fail(store):
    """Whether no other rank has failed before, which would be why this one does."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the process that holds the store is gone: better said twice than not at all
        return True


@contextlib.contextmanager
def exchange():
    """What the ranks exchange within it ends in one line where another is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0].strip()  # without the place in gloo's source
        raise BadInput(
            f"another process of this run has ended ({reason}); what was saved is kept; run the same command again to resume"
        ) from None


# ---------------------------------------------------------------------------------------------- whose share is what


def count():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number():
    """Which of them this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first():
    """Whether this is the rank that writes and prints."""
    return number() == 0


def share(items):
    """This rank's part of a list: every n-th."""
    return items[number() :: count()]


def rows_per_rank(rows):
    """How many of a step's rows a rank has; the last may have fewer."""
    return -(-rows // count())


def rank_device(device):
    """The --device of this rank: torchrun's processes have a GPU each where there are GPUs."""
    if device not in ("auto", "cuda") or "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return device
    index, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= gpus:
        raise BadInput(f"torchrun: more processes than the {gpus} GPUs here; lower --nproc-per-node")
    return f"cuda:{index}"


# ----------------------------------------------------------------------------------------------------------- values


def pack(value):
    """A value as bytes [n], as a file of torch.save has them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def unpack(content):
    """The value of such bytes [n]; tensors are on the CPU."""
    return torch.load(io.BytesIO(content.numpy()), weights_only=True, map_location="cpu")


def from_first(make):
    """What make() returns on the first rank, the only one that calls it. A value is of tensors, numbers, texts, lists, dicts."""
    if count() == 1:
        return make()
    with_value = is_first()
    content = pack(make()) if with_value else None
    size = torch.tensor([len(content) if with_value else 0])
    with exchange():
        dist.broadcast(size, 0)
        if not with_value:
            content = torch.empty(size.item(), dtype=torch.uint8)
        dist.broadcast(content, 0)
    return unpack(content)


def gather(value):
    """The values of all ranks, on the first; [] on the others."""
    if count() == 1:
        return [value]
    with exchange():
        if not is_first():
            content = pack(value)
            dist.send(torch.tensor([len(content)]), 0)
            dist.send(content, 0)
            return []
        values = [value]
        for rank in range(1, count()):
            size = torch.empty(1, dtype=torch.int64)
            dist.recv(size, rank)
            content = torch.empty(size.item(), dtype=torch.uint8)
            dist.recv(content, rank)
            values.append(unpack(content))
        return values


def check_same(values):
    """Raises BadInput if a rank has other values than the first. values: {what it is, in words: of texts, numbers,
    lists, dicts}."""
    of_first = from_first(lambda: values)
    for what, value in values.items():
        if value != of_first[what]:
            raise BadInput(f"process {number()} has other {what} than process 0; all must have the same")
    wait()  # before the first rank writes anything


def wait():
    """Returns once every rank is here."""
    if count() > 1:
        with exchange():
            dist.all_reduce(torch.zeros(1))  # a barrier of torch would be NCCL's, and keep the host busy


# ---------------------------------------------------------------------------------------------------------- tensors


def sum_over_ranks(tensor):
    """The sum over all ranks, in the tensor's own place."""
    if count() > 1:
        with exchange():
            dist.all_reduce(tensor)
    return tensor


def largest(*numbers):
    """The largest of each of these whole numbers over all ranks."""
    if count() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.int64)
    with exchange():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tuple(tensor.tolist())


def sum_gradients(parameters):
    """Makes every gradient the sum over all ranks, also where this rank has none and another has."""
    if count() == 1:
        return
    has_gradient = largest(*(parameter.grad is not None for parameter in parameters))
    gradients = []
    for parameter, some_rank_has in zip(parameters, has_gradient):
        if some_rank_has:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    whole = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, whole.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def gather_tensors(own):
    """The tensors of all ranks [ranks, ...], all of the shape of this rank's `own`."""
    if count() == 1:
        return own[None]
    whole = own.new_empty(count(), *own.shape)
    with exchange():
        dist.all_gather(list(whole), own)
    return whole


def gather_rows(own, size):
    """Rows of all ranks [ranks * size, ...], one rank's after the other's, each padded with zero rows to `size`. own
    [up to size, ...]."""
    padded = own.new_zeros(size, *own.shape[1:])
    padded[: len(own)] = own
    return gather_tensors(padded).flatten(0, 1)
