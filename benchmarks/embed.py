"""The speed and the memory of embed.py beside what its parts take by themselves.

    python benchmarks/embed.py --weights DIR                              # every part, into benchmarks/embed.json
    python benchmarks/embed.py --weights DIR --part speed --rows 256      # one part, or with more pictures

DIR holds efflite0.safetensors, efflite1.safetensors, efflite2.safetensors, and the folders minilm_l6 and mpnet. The pictures
are the sample's, unless --data names others. The parts:

    speed        one pass for one, three and six encoders, and apart, beside the plain forward pass of timm and `encode` of
                 sentence-transformers on decoded input, and decoding alone
    processes    two processes that share a pass beside one that has it all, a thread each
    compile      encoders with and without --compile, and what compiling takes
    memory       the peak of a pass over 1,000 to 100,000 small pictures, with one and three encoders

Every round measures all things once, so that other work on the machine falls on all alike, and results are medians of the
rounds' ratios. Seconds are of the clock (`wall`) and of the processors (`cpu`, with the processes that decode), which other
work lengthens less.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from hyma.decoding import PictureReader  # noqa: E402
from hyma.files import write_json  # noqa: E402
from hyma.machine import provenance  # noqa: E402
from vlm import read_json  # noqa: E402

embed = argparse.Namespace(**runpy.run_path(str(ROOT / "embed.py")))  # the script's functions

ENCODERS = {
    "efflite0": "efflite0.safetensors",
    "minilm_l6": "minilm_l6",
    "efflite1": "efflite1.safetensors",
    "efflite2": "efflite2.safetensors",
    "control": None,
    "mpnet": "mpnet",
}
COUNTS = (1, 3, 6)  # encoders in one pass
BATCH = 64
MEMORY_RUNS = ((1_000, 1), (1_000, 3), (10_000, 1), (10_000, 3), (100_000, 1))  # pictures, encoders
TINY_ENCODERS = ("tiny=random:test_vit", "other=random:test_resnet", "third=random:test_efficientnet")


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--data", type=Path, default=embed.SAMPLE, help="table of pictures and captions (default: the sample)")
    add("--weights", type=Path, required=True, help="folder of the encoders' weights")
    add("--rows", type=int, default=128, help="rows that are embedded (default: %(default)s)")
    add("--rounds", type=int, default=7, help="of which the medians are taken (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="as embed.py's (default: %(default)s)")
    add("--json", type=Path, default=ROOT / "benchmarks" / "embed.json", help="file for the results")
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------- measuring


class Timer:
    """Seconds of the processors, for this process and its children that have ended, and of the clock."""

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


def total(several):
    """The sum of several seconds, of each clock."""
    found = {"cpu": 0.0, "wall": 0.0}
    for seconds in several:
        for clock in found:
            found[clock] = round(found[clock] + seconds[clock], 3)
    return found


def median_ratio(numerators, denominators):
    """The median over the rounds of one's seconds by the other's, of each clock."""
    ratios = {}
    for clock in ("cpu", "wall"):
        each = [above[clock] / below[clock] for above, below in zip(numerators, denominators)]
        ratios[clock] = round(statistics.median(each), 3)
    return ratios


@contextlib.contextmanager
def silence():
    """Within it, nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class OpenPass:
    """What embed.py has before its pass begins."""

    def __init__(self, flags, names, out, loaded, *more):
        """loaded: {name: encoder} of those that are in memory already; gains the others. more: flags of embed.py."""
        weights = [f"{name}={flags.weights / ENCODERS[name]}" for name in names if ENCODERS[name]]
        command = ["embed.py", "--encoder", *names, "--data", flags.data, "--rows", flags.rows, "--out", out]
        command += ["--device", "cpu", "--workers", flags.workers, "--batch-size", BATCH, *more]
        if weights:
            command += ["--weights", *weights]
        sys.argv = [str(part) for part in command]
        with silence():
            self.flags = embed.resolve_flags(embed.parse_flags())
            self.work = embed.open_folder(self.flags)
            waiting = [wanted for wanted in self.flags.encoders if wanted.name not in loaded]
            while waiting:
                for encoder in embed.load_encoders(waiting, [], self.flags):
                    loaded[encoder.name] = encoder
            self.encoders = [loaded[name] for name in names]
            self.parts = embed.divide(self.work, self.flags, BATCH)
            embed.open_encoders(self.work, self.parts, self.encoders, self.flags)

    def of_kind(self, kind):
        return [encoder for encoder in self.encoders if encoder.kind == kind]

    def run(self):
        """The pass, from the first picture to the last vector. Returns its seconds."""
        reused = embed.open_reused([], self.encoders)
        with silence(), Timer() as timer:
            if images := self.of_kind("image"):
                embed.embed_pictures(self.work, self.parts, images, reused, self.flags)
            for encoder in self.of_kind("text"):
                embed.embed_captions(self.parts, encoder, reused, self.flags)
        return timer.seconds


# -------------------------------------------------------------------------------------------------------------- speed


def measure_speed(flags):
    names = list(ENCODERS)
    loaded = {}
    time_models(flags, loaded)  # the first passes prepare
    rounds = []
    for number in range(flags.rounds):
        models = time_models(flags, loaded)
        alone = {name: time_pass(flags, [name], loaded) for name in names}
        measured = {"models": models, "alone": alone, "decoding": {}, "one_pass": {}}
        for count in COUNTS:
            measured["decoding"][count] = time_decoding(flags, names[:count], loaded)
            measured["one_pass"][count] = alone[names[0]] if count == 1 else time_pass(flags, names[:count], loaded)
        rounds.append(measured)
        print(f"round {number + 1} of {flags.rounds}: {json.dumps(measured)}", flush=True)
        table = [compare(rounds, names[:count], flags.rows) for count in COUNTS]
        yield {"rows": flags.rows, "threads": torch.get_num_threads(), "table": table, "rounds": rounds}
    for row in table:
        print(row)


def time_pass(flags, names, loaded):
    """Seconds of the pass for these encoders."""
    with tempfile.TemporaryDirectory() as folder:
        return OpenPass(flags, names, Path(folder) / "e", loaded).run()


def time_decoding(flags, names, loaded):
    """Seconds that one process takes to read, check, hash, decode and transform each picture for these encoders."""
    with tempfile.TemporaryDirectory() as folder:
        opened = OpenPass(flags, names, Path(folder) / "e", loaded)
    reader = PictureReader(opened.work.corpus.root, embed.transforms_of(opened.encoders))
    pictures = opened.work.images()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a process that decodes
    with Timer() as timer:
        for start in range(0, len(pictures), BATCH):
            reader[pictures[start : start + BATCH]]
    torch.set_num_threads(threads)
    return timer.seconds


def time_models(flags, loaded):
    """{encoder: seconds of timm's own forward pass of pixels that are there, or of sentence-transformers' `encode`}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        opened = OpenPass(flags, list(ENCODERS), Path(folder) / "e", loaded)
    reader = PictureReader(opened.work.corpus.root, embed.transforms_of(opened.encoders))
    pictures = opened.work.images()
    batches = []
    for start in range(0, len(pictures), BATCH):
        _, _, pixels = reader[pictures[start : start + BATCH]]
        batches.append({name: each.to(memory_format=torch.channels_last) for name, each in pixels.items()})
    for encoder in opened.of_kind("image"):
        with Timer() as timer, torch.no_grad():
            for pixels in batches:
                encoder.model.model(pixels[encoder.transform])
        found[encoder.name] = timer.seconds
    for encoder in opened.of_kind("text"):
        with Timer() as timer:
            encoder.model.model.encode(opened.work.captions(), batch_size=BATCH, show_progress_bar=False)
        found[encoder.name] = timer.seconds
    return found


def compare(rounds, names, rows):
    """The row of the table for these encoders: medians over the rounds."""
    count = len(names)
    one_pass = [measured["one_pass"][count] for measured in rounds]
    apart = [total(measured["alone"][name] for name in names) for measured in rounds]
    models = [total(measured["models"][name] for name in names) for measured in rounds]
    decoding = [measured["decoding"][count] for measured in rounds]
    ceiling = [total(each) for each in zip(models, decoding)]
    row = {"encoders": count}
    shown = {"pass": one_pass, "apart": apart, "models": models, "decoding": decoding}
    for clock in ("cpu", "wall"):
        for what, seconds in shown.items():
            median = statistics.median(each[clock] for each in seconds)
            row[f"{what}_rows_per_{clock}_second"] = round(rows / median, 2)
    row["pass_by_models_and_one_decoding"] = median_ratio(one_pass, ceiling)
    row["throughput_of_models_and_one_decoding"] = median_ratio(ceiling, one_pass)
    row["pass_by_passes_apart"] = median_ratio(one_pass, apart)
    return row


# ------------------------------------------------------------------------------------------------------------ compile


def measure_compile(flags):
    """Encoders with and without `--compile`, on decoded input."""
    table = []
    for name in ("efflite0", "control", "minilm_l6"):
        wanted = embed.vlm.find_encoder(name)
        weights = flags.weights / ENCODERS[name] if ENCODERS[name] else None
        encoders = {"plain": embed.load_encoder(wanted, weights, torch.device("cpu"), "float32")}
        with silence(), Timer() as timer:
            encoders["compiled"] = embed.load_encoder(wanted, weights, torch.device("cpu"), "float32", True)
        inputs = read_inputs(flags, encoders["plain"])
        rounds = {kind: [] for kind in encoders}
        for _ in range(flags.rounds):
            for kind, encoder in encoders.items():
                with Timer() as measured:
                    vectors = encoder.encode(inputs)
                rounds[kind].append(measured.seconds)
        row = {"encoder": name, "seconds_to_compile": timer.seconds}
        for kind, seconds in rounds.items():
            median = statistics.median(each["cpu"] for each in seconds)
            row[f"{kind}_rows_per_cpu_second"] = round(len(vectors) / median, 1)
        row["compiled_by_plain"] = median_ratio(rounds["compiled"], rounds["plain"])
        row["least_cosine"] = (encoders["plain"].encode(inputs) * vectors).sum(1).min().item()
        table.append(row)
        print(row, flush=True)
    yield {"rows": flags.rows, "threads": torch.get_num_threads(), "table": table}


def read_inputs(flags, encoder):
    """What an encoder takes: the pixels of the first pictures, or the first captions."""
    corpus = embed.read_corpus(flags.data)
    rows = corpus.rows[: flags.rows]
    if encoder.kind == "text":
        return [row["caption"] for row in rows]
    reader = PictureReader(corpus.root, {"pixels": encoder.model.transform})
    _, _, pixels = reader[[row["image"] for row in rows]]
    return pixels["pixels"]


# ---------------------------------------------------------------------------------------------------------- processes


def measure_processes(flags):
    """One process that embeds everything, and two that share it, in turn."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for number in range(2):
            workers.append(context.Process(target=run_rounds, args=(flags, number, Path(folder), barrier, results)))
            workers[-1].start()
        found = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
    own = {number: rounds for number, rounds in found}
    rounds = []
    for alone, first, second in zip(own[0]["alone"], own[0]["shared"], own[1]["shared"]):
        slower = {clock: max(first[clock], second[clock]) for clock in alone}
        rounds.append({"one": alone, "two": slower})
        print(rounds[-1], flush=True)
    speedup = median_ratio([each["one"] for each in rounds], [each["two"] for each in rounds])
    print({"speedup": speedup})
    yield {"rows": flags.rows, "threads": 1, "speedup_of_two": speedup, "rounds": rounds}


def run_rounds(flags, number, folder, barrier, results):
    """What each of the two processes does. In every round the first embeds alone, and then both share."""
    torch.set_num_threads(1)
    flags = argparse.Namespace(**vars(flags) | {"workers": 0})
    names = ["efflite0", "minilm_l6"]
    more = ("--shard-rows", BATCH)
    rounds = {"alone": [], "shared": []}
    loaded = {}
    OpenPass(flags, names, folder / f"warm{number}", loaded, *more).run()
    for turn in range(flags.rounds):
        if number == 0:
            opened = OpenPass(flags, names, folder / f"alone{turn}", loaded, *more)
        barrier.wait()
        if number == 0:
            rounds["alone"].append(opened.run())
        opened = OpenPass(flags, names, folder / f"shared{turn}", loaded, "--shard", f"{number}/2", *more)
        barrier.wait()
        rounds["shared"].append(opened.run())
    results.put((number, rounds))


# ------------------------------------------------------------------------------------------------------------- memory


def measure_memory(flags):
    """The most resident memory of embed.py as a process of its own, over more and more pictures."""
    peaks = []
    for rows, encoders in MEMORY_RUNS:
        with tempfile.TemporaryDirectory() as folder:
            archive = write_small_pictures(Path(folder) / "small.tar", rows)
            peaks.append(peak_memory(archive, Path(folder) / "e", TINY_ENCODERS[:encoders]))
        print(peaks[-1], flush=True)
        yield {"peaks": peaks}


def write_small_pictures(path, count):
    """A tar of so many different captioned pictures of 32 pixels, made from the sample's."""
    table = embed.read_corpus(embed.SAMPLE)
    small = []
    for row in table.rows:
        with Image.open(table.root / row["image"]) as image:
            small.append(image.convert("RGB").resize((32, 32)))
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            picture = small[number % len(small)].copy()
            picture.putpixel((0, 0), (number % 256, number // 256 % 256, number // 65536))
            data = io.BytesIO()
            picture.save(data, "PNG", compress_level=1)
            caption = f"{table.rows[number % len(small)]['caption']}, number {number}"
            for ending, content in (("png", data.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


PRINT_PEAK = """
import resource, runpy, sys, torch
sys.argv = {command!r}
runpy.run_path("embed.py", run_name="__main__")
from hyma.machine import peak_bytes
print(peak_bytes(torch.device("cpu")), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_memory(data, out, encoders):
    """The peak of embed.py and of the largest process that decodes for it, in MB, and its seconds."""
    command = ["embed.py", "--encoder", *encoders, "--data", str(data), "--out", str(out), "--device", "cpu"]
    code = PRINT_PEAK.format(command=command)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    own, workers = (round(int(peak) / 1e6) for peak in done.stdout.split()[-2:])
    rows = read_json(out / "manifest.json")["rows"]
    seconds = round(time.monotonic() - began)
    return {"rows": rows, "encoders": len(encoders), "peak_mb": own, "decoder_mb": workers, "seconds": seconds}


PARTS = {
    "speed": measure_speed,
    "compile": measure_compile,
    "processes": measure_processes,
    "memory": measure_memory,
}


def main():
    flags = parse_flags()
    for part in flags.part:
        for results in PARTS[part](flags):  # so far
            found = read_json(flags.json) if flags.json.is_file() else {}
            found[part] = {"machine": provenance("cpu")} | results
            write_json(flags.json, found)


if __name__ == "__main__":
    main()
