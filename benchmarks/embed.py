"""The speed of embed.py: one pass for one, three and six encoders, and apart, beside what its parts take by themselves.

    python benchmarks/embed.py --weights DIR --json benchmarks/embed.json      # the sample's pictures
    python benchmarks/embed.py --weights DIR --data icons.csv --rows 500

DIR holds efflite0.safetensors, efflite1.safetensors, efflite2.safetensors, and the folders minilm_l6 and mpnet. The parts:
timm's plain forward pass of pixels that are decoded already, sentence-transformers' `encode`, and decoding alone. Every round
measures each of them once, so that other work on the machine falls on all alike; seconds are of the processor (`cpu`, workers
included) and of the clock (`wall`). Memory is measured by processes of their own, over two numbers of rows.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from hyma.decoding import PictureReader  # noqa: E402
from hyma.files import write_json  # noqa: E402
from hyma.machine import provenance  # noqa: E402

embed = argparse.Namespace(**runpy.run_path(str(ROOT / "embed.py")))  # the script's functions

ENCODERS = {
    "efflite0": "efflite0.safetensors",
    "minilm_l6": "minilm_l6",
    "efflite1": "efflite1.safetensors",
    "efflite2": "efflite2.safetensors",
    "control": None,
    "mpnet": "mpnet",
}
BATCH = 64
COUNTS = (1, 3, 6)  # encoders in one pass
MEMORY_ROWS = (500, 2500)


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=embed.SAMPLE, help="table of pictures and captions (default: the sample)")
    add("--weights", type=Path, required=True, help="folder of the encoders' weights")
    add("--rows", type=int, default=256, help="rows that are embedded (default: %(default)s)")
    add("--rounds", type=int, default=2, help="default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="as embed.py's (default: %(default)s)")
    add("--json", type=Path, help="file for the results")
    return parser.parse_args()


class Timer:
    """Seconds of the processor, of this process and its children, and of the clock."""

    def __enter__(self):
        self.began = self.now()
        return self

    def __exit__(self, *_):
        cpu, wall = self.now()
        self.seconds = {"cpu": round(cpu - self.began[0], 3), "wall": round(wall - self.began[1], 3)}

    def now(self):
        cpu = 0.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            used = resource.getrusage(who)
            cpu += used.ru_utime + used.ru_stime
        return cpu, time.monotonic()


def embed_command(flags, names, out):
    """The arguments of embed.py."""
    weights = [f"{name}={flags.weights / ENCODERS[name]}" for name in names if ENCODERS[name]]
    command = ["--encoder", *names, "--data", flags.data, "--rows", flags.rows, "--out", out, "--device", "cpu"]
    command += ["--workers", flags.workers] + (["--weights", *weights] if weights else [])
    return ["embed.py", *map(str, command)]


@contextlib.contextmanager
def silence():
    """Within it, nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def open_pass(flags, names, out, loaded):
    """What embed.py has before its pass begins: (flags, Work, Parts, encoders). loaded: {name: encoder}, loaded once."""
    sys.argv = embed_command(flags, names, out)
    own = embed.resolve_flags(embed.parse_flags())
    work = embed.open_folder(own)
    for encoder in embed.load_encoders([wanted for wanted in own.encoders if wanted.name not in loaded], [], own):
        loaded[encoder.name] = encoder
    parts = embed.divide(work, own, BATCH)
    encoders = [loaded[name] for name in names]
    embed.open_encoders(work, parts, encoders, own)
    return own, work, parts, encoders


def time_pass(flags, names, loaded):
    """Seconds of the pass for these encoders."""
    with tempfile.TemporaryDirectory() as folder, silence():
        own, work, parts, encoders = open_pass(flags, names, Path(folder) / "e", loaded)
        reused = embed.open_reused([], encoders)
        with Timer() as timer:
            images = [encoder for encoder in encoders if encoder.kind == "image"]
            if images:
                embed.embed_pictures(work, parts, images, reused, own)
            for encoder in encoders:
                if encoder.kind == "text":
                    embed.embed_captions(parts, encoder, reused, own)
    return timer.seconds


def time_parts(flags, loaded):
    """Seconds of decoding alone, for all transforms, and of each encoder on what is decoded already."""
    found = {name: {"cpu": 0.0, "wall": 0.0} for name in ["decoding", *ENCODERS]}
    with tempfile.TemporaryDirectory() as folder, silence():
        _, work, _, encoders = open_pass(flags, list(ENCODERS), Path(folder) / "e", loaded)
        reader = PictureReader(work.corpus.root, embed.transforms_of(encoders))
        pictures = work.images()
        for start in range(0, len(pictures), BATCH):
            with Timer() as timer:
                _, _, pixels = reader[pictures[start : start + BATCH]]
            add(found["decoding"], timer.seconds)
            for encoder in encoders:
                if encoder.kind == "image":
                    batch = pixels[encoder.transform].to(memory_format=torch.channels_last)
                    with Timer() as timer, torch.no_grad():
                        encoder.model.model(batch)  # timm's own forward pass
                    add(found[encoder.name], timer.seconds)
        for encoder in encoders:
            if encoder.kind == "text":
                with Timer() as timer:
                    encoder.model.model.encode(work.captions(), batch_size=BATCH, show_progress_bar=False)
                add(found[encoder.name], timer.seconds)
    return found


def add(total, seconds):
    for clock in total:
        total[clock] = round(total[clock] + seconds[clock], 3)


def peak_memory(flags, rows):
    """The largest resident memory, in MB, of embed.py as a process of its own, with the quickest encoder there is."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["embed.py", "--encoder", "tiny=random:test_vit", "--data", flags.data, "--rows", rows]
        command = [*map(str, command), "--out", folder, "--device", "cpu", "--workers", "0"]
        code = f"import runpy, sys, torch; sys.argv = {command!r}; runpy.run_path('embed.py', run_name='__main__')"
        code += "; from hyma.machine import peak_bytes; print(peak_bytes(torch.device('cpu')))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return round(int(done.stdout.split()[-1]) / 1e6)


def sum_of(seconds):
    total = {"cpu": 0.0, "wall": 0.0}
    for each in seconds:
        add(total, each)
    return total


def main():
    flags = parse_flags()
    names = list(ENCODERS)
    loaded = {}
    rounds = []
    for number in range(flags.rounds):
        measured = {"parts": time_parts(flags, loaded), "one_pass": {}, "apart": {}}
        alone = {name: time_pass(flags, [name], loaded) for name in names}
        for count in COUNTS:
            measured["one_pass"][count] = alone[names[0]] if count == 1 else time_pass(flags, names[:count], loaded)
            measured["apart"][count] = sum_of(alone[name] for name in names[:count])
        rounds.append(measured)
        print(f"round {number + 1} of {flags.rounds}: {json.dumps(measured)}", flush=True)

    table = []
    for count in COUNTS:
        seconds = {}
        for kind in ("one_pass", "apart"):
            seconds[kind] = min(measured[kind][count]["cpu"] for measured in rounds)
        parts = rounds[0]["parts"]
        for measured in rounds:
            for name, each in measured["parts"].items():
                parts[name] = min(parts[name], each, key=lambda found: found["cpu"])
        forward = sum(parts[name]["cpu"] for name in names[:count])
        decoding = parts["decoding"]["cpu"]
        table.append(
            {
                "encoders": count,
                "rows_per_cpu_second": round(flags.rows / seconds["one_pass"], 1),
                "one_pass": seconds["one_pass"],
                "apart": seconds["apart"],
                "forward_passes_alone": round(forward, 2),
                "decoding_alone": decoding,
                "pass_by_forward_and_one_decoding": round(seconds["one_pass"] / (forward + decoding), 3),
            }
        )
        print(table[-1])
    memory = {}
    for rows in MEMORY_ROWS:
        memory[rows] = peak_memory(flags, rows)
    print(memory)
    if flags.json:
        results = {
            "machine": provenance("cpu"),
            "rows": flags.rows,
            "table": table,
            "peak_mb": memory,
            "rounds": rounds,
        }
        write_json(flags.json, results)


if __name__ == "__main__":
    main()
