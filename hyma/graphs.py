"""A training step as CUDA graphs: recorded once for each set of pairs, replayed from then on.

A small step is many launches, and the host may take longer to make them than the GPU to run them; a graph makes all of
them at once. A replay repeats what was recorded, with the same numbers at the same addresses. So a step that can be
recorded is a function of its pairs, of which each set has a graph of its own, and of tensors, which are written anew before
a replay. All else that it reads stays in its place (weights, moments, embeddings), and it never waits for the GPU.
"""

import warnings
from functools import partial

import torch

from hyma import ranks
from vlm import BadInput, reason_of

MOST_GRAPHS = 1000  # of a run; each keeps the list of its launches on the GPU


class Recorder:
    """How a GPU records. All graphs share one pool of memory: no two run at once, and none reads what another has left."""

    device_type = "cuda"

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function):
        """What the function returns, called on the stream that records: what a first call makes, such as compiled kernels,
        their tables and AdamW's moments, cannot be made in a recording."""
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # and is not recorded
            returned = function()
        caller.wait_stream(self.stream)
        return returned

    def record(self, function):
        """(a function that replays, what the recorded one returned: tensors that each replay writes). It runs nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.stream.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            returned = function()
        return graph.replay, returned


class RecordedSteps:
    """The same as take_step(pairs, *tensors), which returns a tensor and leaves no other behind. The first step of a set of
    pairs is an ordinary one; then it is recorded, for those that follow."""

    def __init__(self, take_step, recorder):
        self.take_step, self.recorder = take_step, recorder
        self.inputs = None  # the tensors that all graphs read
        self.recordings = {}  # of each set of pairs: (a function that replays, the losses that this writes)

    def __call__(self, pairs, *tensors):
        if self.inputs is None:
            self.inputs = [tensor.clone() for tensor in tensors]
        for into, tensor in zip(self.inputs, tensors):
            into.copy_(tensor)
        key = tuple(pairs)
        if key not in self.recordings:
            step = partial(self.take_step, pairs, *self.inputs)
            losses = self.recorder.warm_up(step)
            try:
                self.recordings[key] = self.recorder.record(step)
            except RuntimeError as error:
                raise BadInput(
                    f"--graph: this GPU cannot record a step ({reason_of(error)}); what was saved is kept; leave --graph out"
                ) from error
            return losses
        replay, losses = self.recordings[key]
        replay()
        return losses.clone()  # which the next replay writes


def check_graph(wanted, device):
    """Raises BadInput if graphs are wanted of a device that records none."""
    if wanted and device.type != Recorder.device_type:
        raise BadInput(f"--graph: only a GPU records graphs, and this run is on {device.type}; leave it out")


def record_steps(take_step, store, sets):
    """The step as graphs, or as it is where it cannot be recorded; prints which, and why. store: the RowStore that it reads.
    sets: how many sets of pairs steps can have."""
    reason = None
    if ranks.count() > 1:
        reason = "the processes of torchrun meet in the middle of a step"
    elif not store.is_resident:
        reason = "the embeddings do not fit the GPU's memory"
    elif sets > MOST_GRAPHS:
        reason = f"its pairs can be drawn in {sets} ways; more --pairs-per-step, up to all of a text encoder, are fewer ways"
    if reason:
        print(f"--graph: a step is not recorded: {reason}")
        return take_step
    print(f"--graph: {'one set' if sets == 1 else f'up to {sets} sets'} of pairs, a graph each")
    return RecordedSteps(take_step, Recorder(store.device))
