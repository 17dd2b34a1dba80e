"""An encoder at work: its precision, how much its memory takes at once, torch.compile, its seconds."""

import contextlib
import sys
import time

import torch

import vlm
from hyma.machine import free_bytes, keep_freed_memory
from vlm import BadInput, reason_of

CPU_BATCH = 64
GPU_BATCHES = (64, 128, 256, 512, 1024)  # tried in turn
WORTH_DOUBLING = 1.05  # a larger batch must be so much faster

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class WorkingEncoder:
    """An encoder with its weights. `plan`: all that the bytes of its vectors depend on beside the rows."""

    def __init__(self, wanted, model, precision):
        self.name, self.kind, self.spec = wanted.name, wanted.kind, wanted.spec
        self.model = model
        self.precision = precision
        self.at_once = None  # how many inputs its memory takes; None: as many as are given
        self.seconds = 0.0  # of its forward passes

    def encode(self, inputs):
        """Unit vectors [n, dim], float32 on the CPU, of pixels [n, 3, H, W] or of n captions."""
        began = time.monotonic()
        while True:
            try:
                vectors = self.encode_parts(inputs)
                break
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self.halve(len(inputs), error)
        self.seconds += time.monotonic() - began
        return vectors

    def encode_parts(self, inputs):
        """As `encode`, in as many parts as memory asks for."""
        at_once = self.at_once or len(inputs)
        vectors = []
        for start in range(0, len(inputs), at_once):
            part = inputs[start : start + at_once]
            with autocast(self.model.device, self.precision):
                vectors.append(self.encode_part(part).float().cpu())
        return torch.cat(vectors)

    def encode_part(self, part):
        if self.kind == "text":
            return self.model.encode_text(part, len(part))
        if len(part) == 1 and self.model.device.type == "cpu":
            # a single picture takes another path through oneDNN, and its bits would depend on its being alone
            return self.model.encode_image(part.expand(2, -1, -1, -1))[:1]
        return self.model.encode_image(part.to(self.model.device, non_blocking=True))

    def halve(self, count, error):
        """Goes on with half as many inputs at once if memory ran out. Raises any other error again."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error).lower()
        at_once = self.at_once or count
        if not out_of_memory or at_once == 1:
            raise error
        self.at_once = at_once // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"{self.name}: out of memory with {at_once} at once; goes on with {self.at_once}", file=sys.stderr)


def autocast(device, precision):
    """Within it, products are computed in that precision."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def check_vectors(name, vectors, keys):
    """Raises BadInput that names the first of the vectors [n, dim] which is not of unit length, NaN being none."""
    off_length = ~((vectors.float().norm(dim=1) - 1).abs() < 1e-2)  # [n]
    if off_length.any():
        bad = keys[int(off_length.nonzero()[0])]
        raise BadInput(f"{name}: the vector of {bad} is zero or not a number; are its weights sound?")


# ------------------------------------------------------------------------------------------------------- before it starts


def find_batch_size(encoders, device):
    """How many pictures go through the encoders at once: on a GPU the size beyond which it is hardly faster."""
    images = [encoder for encoder in encoders if encoder.kind == "image"]
    if device.type == "cpu" or not images:
        return CPU_BATCH
    best = GPU_BATCHES[0]
    fastest = None
    for size in GPU_BATCHES:
        seconds = 0.0
        try:
            for encoder in images:
                seconds += seconds_of(encoder.encode_parts, torch.zeros(size, *encoder.model.config["input_size"]))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        rate = size / seconds
        if fastest and rate < WORTH_DOUBLING * fastest:
            break
        best, fastest = size, rate
    return best


def seconds_of(encode, inputs):
    """The seconds of a forward pass, the second of two: the first prepares."""
    encode(inputs)
    began = time.monotonic()
    encode(inputs)
    return time.monotonic() - began


def transforms_of(encoders):
    """{transform: function} of the image encoders, each different one once."""
    return {encoder.transform: encoder.model.transform for encoder in encoders if encoder.kind == "image"}


def bottleneck(encoders, waited):
    """What the pass spends most time on: decoding, or an encoder. waited: seconds without pictures."""
    seconds = {encoder.name: encoder.seconds for encoder in encoders}
    total = waited + sum(seconds.values())
    if not total:
        return ""
    slowest = max(seconds, key=seconds.get, default=None)
    if slowest is None or waited > seconds[slowest]:
        return f"waits for decoding {waited / total:.0%}"
    return f"slowest: {slowest} {seconds[slowest] / total:.0%}"


def can_hold_more(loaded, device):
    """Whether memory is likely to take one encoder more beside those that are loaded, and what they compute."""
    if not loaded:
        return True
    largest = 0
    for encoder in loaded:
        size = sum(tensor.nbytes for tensor in encoder.model.state_dict().values())
        largest = max(largest, size)
    return free_bytes(device) > 3 * largest


def load_encoder(wanted, weights, device, precision, compiled=False):
    """The WorkingEncoder. Raises BadInput if its weights cannot be had or are another model's, or if it cannot be compiled."""
    if device.type == "cpu":
        keep_freed_memory()
    model = vlm.build_encoder(wanted, device, weights)
    if wanted.dim not in (None, model.embed_dim):
        raise BadInput(f"{wanted.name}: gives vectors of width {model.embed_dim}; the registry says {wanted.dim}")
    encoder = WorkingEncoder(wanted, model, precision)
    if compiled:
        compile_encoder(encoder)
    return encoder


def compile_encoder(encoder):
    """Has torch.compile make the encoder's network faster, and says how long that took."""
    if encoder.kind == "image":
        network = encoder.model.model
        examples = [torch.zeros(CPU_BATCH, *encoder.model.config["input_size"])]
    else:
        network = getattr(encoder.model.model[0], "auto_model", None)
        if network is None:
            raise BadInput(f"--compile: {encoder.name} is no transformer; embed it in a command without --compile")
        examples = [["a cat"] * 3, ["a cat beside a dog on a mat"] * 2]  # their lengths differ from caption to caption
    began = time.monotonic()
    # Its `forward`, as sentence-transformers calls that by its name: `network.compile()` would leave it as it is.
    network.forward = torch.compile(network.forward, dynamic=encoder.kind == "text")
    try:
        for example in examples:
            encoder.encode_parts(example)
    except Exception as error:  # the compiler's are of many types
        raise BadInput(
            f"--compile: {encoder.name} cannot be compiled ({reason_of(error)}); "
            "a CPU needs a C++ compiler (apt-get install g++), a GPU Triton and a C compiler, or leave --compile out"
        ) from None
    print(f"{encoder.name}: compiled in {time.monotonic() - began:.0f} s")
