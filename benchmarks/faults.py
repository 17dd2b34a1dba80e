"""The long run of faults: kills, signals, damaged files, the list of known faults, fuzzed inputs. Unattended, on a CPU.

    python benchmarks/faults.py                                   # everything; hours on two cores
    python benchmarks/faults.py --kills 10 --fuzz 2000            # the same, smaller
    python benchmarks/faults.py --only kills-grid fuzz            # these parts alone
    python benchmarks/faults.py --again                           # parts that are in the JSON already, too

Parts: kills-<stage> (SIGKILL at every write and at random moments), signals-<stage>, damage-run, damage-embeddings,
damage-report, list, fuzz. After each kill or signal the same command is typed again until it finishes, and the result must
equal the undisturbed run's bit for bit. A damaged file must end in one line that names it, or in an undisturbed result.
A fuzzed input must end in a value or in BadInput with one line. Nothing may hang, show a traceback or touch a file outside
its work folder. Counts of each part go to benchmarks/faults.json as soon as it is finished; a part that is there already,
of the same commit and size, is left out.

Processes are forked from a server that has imported torch already, so that a start costs milliseconds. They run the real
scripts. Everything random follows from --seed: a failure is named by its case, which alone makes it again.
"""

import argparse
import base64
import contextlib
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import vlm  # noqa: E402
from hyma.embeddings import Embeddings, choose_pairs, hash_keys, split_rows  # noqa: E402
from hyma.files import provenance, read_jsonl, sha256_file, write_json, write_jsonl  # noqa: E402
from vlm import BadInput, load_tensors, read_json  # noqa: E402

SECONDS = 90  # after which a command hangs
WARM = ["torch", "timm", "sentence_transformers", "matplotlib.pyplot", "jinja2", "scipy.stats", "PIL.Image", "tqdm"]
WARM += ["hyma.report", "hyma.tasks", "hyma.selectors", "hyma.training", "hyma.hypernetworks", "hyma.standard_sets"]


# ------------------------------------------------------------------------------------------------ a script, in a fork


class Done(NamedTuple):
    """How a command ended."""

    code: int | None  # exit status, negative for a signal, None for a hang
    out: str
    err: str
    seconds: float

    @property
    def last(self):
        """The last line on stderr."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def fork_server():
    """The context whose processes are forked from a server that has imported what the scripts import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    return context


def child(command, folder, logs, hook):
    """Runs a script as __main__ in this process, which is a fresh fork. hook: see `install_hook`."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{logs}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the machine, which a kill would leave behind
    script, *arguments = command
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    sys.path[0] = str(ROOT)
    report = install_hook(hook or {}, folder)
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    finally:
        report()
        sys.stdout.flush()
        sys.stderr.flush()


def install_hook(hook, folder):
    """Kills this process at its k-th write, or counts the writes. Returns what to call at the end.

    hook: {"kill_at": k} or {"count": file}; {"begun": file} is made once the script has begun; {"often": True} saves
    checkpoints after every step. A write is an opening of a file to write, a half-written buffer, the moments before and
    after fsync and rename, a removal, a new folder.
    """
    import hyma.embeddings
    import hyma.files
    import hyma.runs

    events = itertools.count(1)
    counted = 0

    def event():
        nonlocal counted
        counted = next(events)
        if counted == hook.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def wrapped(*arguments, **options):
            event()
            value = function(*arguments, **options)
            event()
            return value

        return wrapped

    def audit(name, arguments):
        if name == "open":
            path, _, how = arguments
            if isinstance(path, str) and how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith("/dev"):
                event()
        elif name in ("os.remove", "os.mkdir", "os.rmdir"):
            event()

    def torn_open(path, mode="r", *arguments, **options):
        """A file whose every write has a moment when half of it is written."""
        file = open(path, mode, *arguments, **options)  # noqa: SIM115
        if mode != "wb":
            return file
        whole_write = file.raw.write

        class Torn(io.RawIOBase):
            def writable(self):
                return True

            def fileno(self):
                return file.fileno()

            def write(self, data):
                half = bytes(data[: len(data) // 2])
                if half:
                    whole_write(half)
                    event()
                return len(half) + whole_write(bytes(data[len(half) :]))

        torn = io.BufferedWriter(Torn())
        torn.kept = file
        return torn

    if "kill_at" in hook or "count" in hook:
        sys.addaudithook(audit)
        os.replace, os.fsync = around(os.replace), around(os.fsync)
        hyma.files.open = torn_open
    if hook.get("often"):
        hyma.runs.CHECKPOINT_SECONDS = hyma.embeddings.CHECKPOINT_SECONDS = 0
    if "begun" in hook:
        run_script = hyma.files.run_script

        def begin(main):
            def begun_main():
                Path(hook["begun"]).touch()
                main()

            run_script(begun_main)

        hyma.files.run_script = begin

    def report():
        if "count" in hook:
            total = counted
            Path(hook["count"]).write_text(str(total))

    return report


class Runner:
    """Starts commands in folders and waits for them."""

    def __init__(self):
        self.context = fork_server()

    def start(self, command, folder, hook=None):
        logs = Path(folder).with_name(Path(folder).name + ".log")
        for name in ("out", "err"):
            Path(f"{logs}.{name}").unlink(missing_ok=True)
        process = self.context.Process(target=child, args=(list(command), str(folder), str(logs), hook))
        process.start()
        return process, logs, time.monotonic()

    def finish(self, started, seconds=SECONDS):
        process, logs, begin = started
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        texts = [Path(f"{logs}.{name}") for name in ("out", "err")]
        if code is not None and code >= 0 and not texts[1].exists():
            raise RuntimeError("a process has not even begun")
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in texts)
        return Done(code, out, err, time.monotonic() - begin)

    def run(self, command, folder, hook=None, seconds=SECONDS):
        return self.finish(self.start(command, folder, hook), seconds)

    def kill_after(self, command, folder, seconds, hook=None):
        """Starts a command and kills it after that many seconds, if it still runs."""
        started = self.start(command, folder, hook)
        started[0].join(seconds)
        if started[0].exitcode is None:
            started[0].kill()
        return self.finish(started)


# ----------------------------------------------------------------------------------------------------- planted inputs

IMAGES, TEXTS = {"i1": 24, "i2": 20, "i3": 16}, {"t1": 16, "t2": 12}


def make_inputs(folder):
    """Everything that the stages read: pictures with captions, a tiny text encoder, planted embeddings. In a child."""
    torch.set_num_threads(1)
    folder = Path(folder)
    make_pictures(folder / "pictures", 24)
    make_text_encoder(folder / "words")
    make_embeddings(folder / "embeddings")


def make_pictures(folder, count):
    from PIL import Image

    folder.mkdir(parents=True)
    draw = random.Random(0)
    lines = ["image,caption,label,split"]
    for k in range(count):
        size = (48 + k, 64)
        Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1])).save(folder / f"{k}.png")
        split = "train" if k % 3 else "val"
        lines.append(f"{k}.png,a red square number {k},{'ab'[k % 2]},{split}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def make_text_encoder(folder):
    """A one-layer BERT of 40 words as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "number", *map(str, range(30))]
    bert = folder.with_name("bert")
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(bert)
    word_model = models.Transformer(str(bert))
    SentenceTransformer(modules=[word_model, models.Pooling(16)], device="cpu").save(str(folder))


def make_embeddings(folder, rows=None):
    """A sealed folder of 260 planted rows with splits, or of the rows that are given."""
    folder.mkdir(parents=True)
    if rows is None:
        splits = ["test"] * 60 + ["val"] * 40 + ["train"] * 160
        rows = [{"key": f"{k}.png", "image": f"{k}.png", "caption": f"caption {k}"} for k in range(260)]
        rows = [row | {"split": split} for row, split in zip(rows, splits)]  # labels would ask for a text encoder
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(len(rows), 8, generator=draw)
    encoders, keys = {}, hash_keys(rows)
    for place, (name, dim) in enumerate((IMAGES | TEXTS).items()):
        vectors = latent @ torch.randn(8, dim, generator=draw) + place * torch.randn(len(rows), dim, generator=draw)
        path = folder / f"{name}.pt"
        torch.save(torch.nn.functional.normalize(vectors, dim=1).half(), path)
        kind, spec = ("image", "random:test_vit") if name in IMAGES else ("text", "nobody/words")
        encoders[name] = {"kind": kind, "spec": spec, "dim": dim, "rows": len(rows), "keys_sha256": keys}
        encoders[name]["file_sha256"] = sha256_file(path)
    manifest = {"format_version": 1, "dataset": "planted", "root": ".", "rows": len(rows), "keys_sha256": keys}
    write_jsonl(folder / "rows.jsonl", rows)
    write_json(folder / "manifest.json", manifest | {"quarantined": 0, "encoders": encoders})
    return folder


class Stage(NamedTuple):
    """Commands that are typed one after the other, and the folder of their result."""

    name: str
    commands: list
    result: str


SHORT = ("--connector", "mlp0", "--epochs", 4, "--batch-size", 32, "--warmup-steps", 2, "--device", "cpu")


def make_stages(inputs):
    """{name: Stage}. inputs: the folder that `make_inputs` has filled, and `make_runs` for evaluate."""
    data = ("--data", inputs / "embeddings")
    tiny = ("--batch-size", 4, "--shard-rows", 8, "--workers", 1, "--device", "cpu")
    encoders = ("--encoder", "tiny=random:test_vit", f"words={inputs / 'words'}")
    embed = ["embed.py", *encoders, "--data", inputs / "pictures" / "captions.csv", "--out", "e", *tiny]
    hyma = ["train_hyma.py", *data, *SHORT, "--rank", 8, "--out", "r"]
    grid = ["train_grid.py", *data, *SHORT, "--out", "r"]
    runs = [inputs / "runs" / name for name in ("hyma", "halving", "grid")]
    evaluate = ["evaluate.py", *runs, "--bootstrap", 20, "--out", "report", "--device", "cpu"]
    stages = [
        Stage("embed", [embed], "e"),
        Stage("hyma", [hyma], "r"),
        Stage("grid", [[*grid, "--pairs-per-pass", 4]], "r"),
        Stage("halving", [[*grid, "--halving"]], "r"),
        Stage("shards", [[*grid, "--shard", "0/2"], [*grid, "--shard", "1/2"]], "r"),
        Stage("closed", [["train_grid.py", *data, "--closed-form", "ridge", "--out", "r", "--device", "cpu"]], "r"),
        Stage("evaluate", [evaluate], "report"),
    ]
    return {stage.name: stage for stage in stages}


class Bench(NamedTuple):
    """What every part needs."""

    runner: Runner
    inputs: Path
    work: Path  # for folders of cases
    stages: dict
    seed: int
    workers: int  # cases at a time


def open_bench(work, seed=0, workers=2):
    """Makes the inputs, each once, in children: this process computes nothing before it forks."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the server imports the hub's client
    runner = Runner()
    inputs = work / "inputs"
    if not (inputs / "runs" / "grid" / "ledger.json").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        process = runner.context.Process(target=make_inputs, args=(str(inputs),))
        process.start()
        process.join()
        stages = make_stages(inputs)
        for name in ("hyma", "halving", "grid"):
            command = stages[name].commands[0]
            command = [inputs / "runs" / name if word == "r" else word for word in command]
            done = runner.run(command, inputs)
            if done.code != 0:
                raise RuntimeError(f"{name}: {done.err}")
    return Bench(runner, inputs, work, make_stages(inputs), seed, workers)


# ------------------------------------------------------------------------------------------ what a result is, exactly

VOLATILE = {"seconds", "started", "peak_bytes", "versions", "made"}  # of a result: what no two runs share


def snapshot(folder, without=None):
    """{path in the folder: digest of what it says, without times}. Locks and the checkpoint before the last are left out."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in (".lock", "checkpoint.previous.pt") or is_left_over(path):
            continue
        if path == without:
            continue
        if path.is_file() and not path.is_symlink():
            try:
                found[name] = hashlib.sha256(meaning(path)).hexdigest()
            except ValueError:  # what a damage has left is no JSON
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            found[name] = "link or no file"
    return found


def is_left_over(path):
    """Whether a file is of no use once a command has finished; `leftovers` looks for them."""
    return (
        path.suffix == ".tmp" or path.name in (".scan.jsonl", "checkpoint.next.pt") or path.name.endswith(".partial.pt")
    )


def meaning(path):
    """The bytes of a file, or of what it says without times."""
    if path.name == "checkpoint.pt":
        return repr(plain(load_tensors(path))).encode()
    if path.suffix == ".json":
        return json.dumps(plain(json.loads(path.read_text()))).encode()
    if path.suffix == ".jsonl":
        return "\n".join(json.dumps(plain(json.loads(line))) for line in path.read_text().splitlines()).encode()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return repr([{key: value for key, value in row.items() if "seconds" not in key} for row in rows]).encode()
    if path.suffix == ".html":  # its tables show the selectors' seconds with one decimal
        return re.sub(rb"<td>\d+\.\d</td>", b"<td></td>", path.read_bytes())
    return path.read_bytes()


def plain(value):
    """A value without what is volatile; tensors as digests."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if torch.is_tensor(value):
        return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return value


class Undisturbed(NamedTuple):
    """What a stage makes when nothing disturbs it."""

    snapshot: dict
    differs: list  # files that differ between two undisturbed runs, which nothing can be compared with
    seconds: list  # of each command
    writes: list  # of each command, how many


def undisturbed(bench, stage):
    """Runs a stage twice, and once more to count its writes."""
    snapshots, seconds, writes = [], [], []
    for turn in range(2):
        folder = fresh_folder(bench, f"{stage.name}-undisturbed-{turn}")
        for command in stage.commands:
            count = folder.with_name(folder.name + ".count")
            done = bench.runner.run(command, folder, {"count": count} if turn else None)
            if done.code != 0:
                raise RuntimeError(f"{stage.name}: {done.err}")
            if turn:
                writes.append(int(count.read_text()))
            else:
                seconds.append(done.seconds)
        snapshots.append(snapshot(folder / stage.result))
    one, other = snapshots
    differs = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return Undisturbed(one, differs, seconds, writes)


def fresh_folder(bench, name):
    folder = bench.work / "cases" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def difference(expected, folder, without=None):
    """What of a result differs from the undisturbed one, or None. without: a file that is not compared."""
    found = snapshot(folder, without)
    left_out = {*expected.differs, str(without.relative_to(folder)) if without else None}
    for name in sorted(found.keys() | expected.snapshot.keys()):
        if name not in left_out and found.get(name) != expected.snapshot.get(name):
            state = "is missing" if name not in found else "is too many" if name not in expected.snapshot else "differs"
            return f"{name} {state}"
    return None


# ------------------------------------------------------------------------------------------------- counts of a part


class Counts:
    """Of one part: how many cases were tried, held and failed, and which failed."""

    def __init__(self, asked):
        self.asked, self.tried, self.held, self.failed, self.more = asked, 0, 0, [], {}

    def add(self, case, problem, count=1):
        """Adds a case, or several alike. It held if there is no problem."""
        self.tried += count
        if problem:
            self.failed.append({"case": case, "problem": problem})
        else:
            self.held += count

    def kinds(self):
        """{problem, its numbers left out: how often}."""
        return Counter(re.sub(r"\d+", "#", failure["problem"][:160]) for failure in self.failed)

    def record(self):
        """As faults.json holds it: at most three failures of a kind, but all of them counted."""
        shown, seen = [], Counter()
        for failure in self.failed:
            kind = re.sub(r"\d+", "#", failure["problem"][:160])
            seen[kind] += 1
            if seen[kind] <= 3:
                shown.append(failure)
        counts = {"asked": self.asked, "tried": self.tried, "held": self.held, "not_held": len(self.failed)}
        return counts | self.more | {"kinds_of_failure": dict(self.kinds().most_common()), "failures": shown}


def all_cases(bench, cases, judge, counts):
    """Judges cases several at a time: judge(case) gives a problem or None, and how many kills it had."""
    killed = 0
    with ThreadPoolExecutor(bench.workers) as pool:
        for case, (problem, count) in zip(cases, pool.map(guarded(judge), cases)):
            counts.add(str(case), problem)
            killed += count
    return killed


def guarded(judge):
    """A judge whose own failure is the case's problem."""

    def judged(case):
        try:
            found = judge(case)
            return found if isinstance(found, tuple) else (found, 0)
        except Exception:
            return f"the harness failed: {traceback.format_exc().splitlines()[-1]}", 0

    return judged


# -------------------------------------------------------------------------------------------------------------- kills


def kills(bench, stage, asked, writes=None):
    """Kills a stage at every write (or at so many of them) and, `asked` times, at random moments."""
    expected = undisturbed(bench, stage)
    moments = [(place, k) for place, count in enumerate(expected.writes) for k in range(1, count + 1)]
    if writes is not None:
        moments = random.Random(bench.seed).sample(moments, min(writes, len(moments)))
    cases = [("write", *moment) for moment in moments] + [("random", k, 0) for k in range(asked)]
    counts = Counts(asked)
    counts.more = {"writes": sum(expected.writes), "not_compared": expected.differs}

    def judge(case):
        return kill_case(bench, stage, expected, case)

    counts.more["kills"] = all_cases(bench, cases, judge, counts)
    return counts


def kill_case(bench, stage, expected, case):
    """One kill, and for a random case every second time another one or two on the way. Returns a problem or None."""
    kind, place, k = case
    draw = random.Random(f"{bench.seed} {stage.name} {case}")
    folder = fresh_folder(bench, f"{stage.name}-{kind}-{place}-{k}")
    hurt = place if kind == "write" else draw.randrange(len(stage.commands))
    hook = {"often": True} if draw.random() < 0.5 else {}
    killed = 0
    for number, command in enumerate(stage.commands):
        if number == hurt and kind == "write":
            done = bench.runner.run(command, folder, {"kill_at": k})
            killed += done.code == -signal.SIGKILL
        elif number == hurt:
            for _ in range(draw.choice((1, 1, 2, 3))):
                moment = draw.uniform(0, 1.05) * expected.seconds[number]
                done = bench.runner.kill_after(command, folder, moment, hook)
                killed += done.code == -signal.SIGKILL
                if done.code not in (0, -signal.SIGKILL):
                    return f"after a kill: {done.last}", killed
        if problem := finish_command(bench, command, folder):
            return problem, killed
    problem = difference(expected, folder / stage.result) or leftovers(folder)
    if problem is None:
        shutil.rmtree(folder)
    return problem, killed


def finish_command(bench, command, folder):
    """Types a command again until it has finished. Returns a problem or None."""
    done = bench.runner.run(command, folder)
    if done.code is None:
        return f"{command[0]} typed again hangs"
    if done.code != 0 or "Traceback" in done.err:
        return f"{command[0]} typed again ends with {done.code}: {done.last[:300]}"
    return None


def leftovers(folder):
    """Files of no use that nobody has removed, or None."""
    left = [path for path in folder.rglob("*") if is_left_over(path) or path.name == ".shards" and any(path.iterdir())]
    return f"the same bits, but left over: {left[0].relative_to(folder)}" if left else None


# ------------------------------------------------------------------------------------------------------------ signals

ENDS = {"SIGTERM": 143, "SIGINT": 130, "SIGXCPU": 152, "SIGUSR1": 0}  # the exit status that a shell shows


def signals(bench, stage, asked):
    """Sends each signal `asked` times at random moments after the script has begun."""
    expected = undisturbed(bench, stage)
    cases = [(name, k) for name in ENDS for k in range(asked)]
    counts = Counts(len(cases))
    arrived = Counter()

    def judge(case):
        return signal_case(bench, stage, expected, case, arrived)

    all_cases(bench, cases, judge, counts)
    counts.more = {"ended_by": dict(arrived), "not_compared": expected.differs}
    return counts


def signal_case(bench, stage, expected, case, arrived):
    """A signal, then the same command again. Returns a problem or None."""
    name, k = case
    draw = random.Random(f"{bench.seed} {stage.name} {case}")
    folder = fresh_folder(bench, f"{stage.name}-{name}-{k}")
    hurt = draw.randrange(len(stage.commands))
    for number, command in enumerate(stage.commands):
        if number == hurt:
            begun = folder.with_name(folder.name + ".begun")
            begun.unlink(missing_ok=True)
            started = bench.runner.start(command, folder, {"begun": begun})
            while not begun.exists() and started[0].exitcode is None:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 1) * expected.seconds[number])
            if started[0].exitcode is None:
                os.kill(started[0].pid, getattr(signal, name))
            done = bench.runner.finish(started)
            if done.code is None:
                return f"{name}: hangs"
            code = done.code if done.code >= 0 else 128 - done.code
            if code not in (0, ENDS[name]):
                return f"{name}: exit status {code}, expected {ENDS[name]}: {done.last[:200]}"
            if "Traceback" in done.err:
                return f"{name}: traceback: {done.last[:200]}"
            arrived[f"{name} {code}"] += 1
        if problem := finish_command(bench, command, folder):
            return f"{name}: {problem}"
    problem = difference(expected, folder / stage.result) or leftovers(folder)
    if problem is None:
        shutil.rmtree(folder)
    return problem


# ------------------------------------------------------------------------------------------------------------- damage


def cut(share):
    def damage(path, _):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def flip(path, _):
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def replaced_by(data):
    def damage(path, _):
        path.write_bytes(data)

    return damage


def become_folder(path, _):
    path.unlink()
    path.mkdir()


def become_pipe(path, _):
    path.unlink()
    os.mkfifo(path)


def become_link(path, elsewhere):
    """The file itself lies outside, and a link is in its place."""
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def become_dangling_link(path, elsewhere):
    path.unlink()
    path.symlink_to(elsewhere / "nothing")


DAMAGES = {
    "cut to 0 %": cut(0),
    "cut to 30 %": cut(0.3),
    "cut to 90 %": cut(0.9),
    "cut to 99.9 %": cut(0.999),
    "a byte flipped": flip,
    "garbage": replaced_by(bytes(range(256)) * 8),
    "a JSON list": replaced_by(b"[1, 2]\n"),
    "an empty JSON object": replaced_by(b"{}\n"),
    "nested JSON": replaced_by(b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"\n"),
    "a folder": become_folder,
    "a pipe": become_pipe,
    "a link to elsewhere": become_link,
    "a dangling link": become_dangling_link,
    "missing": lambda path, _: path.unlink(),
}


class Reader(NamedTuple):
    """A command that reads what is damaged, and the folder of its result."""

    name: str
    command: list
    result: str | None  # None: the printed lines are all there is


class Target(NamedTuple):
    """A folder to damage, the files of it, who reads it. make(folder): fills the work folder, undamaged."""

    make: object
    files: list
    readers: list


def made(bench, name):
    """The result of an undisturbed stage, made once."""
    stage, folder = bench.stages[name], bench.work / "made" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        for command in stage.commands:
            bench.runner.run(command, folder)
    return folder / stage.result


def targets(bench):
    """{part: Target}."""
    stages, inputs = bench.stages, bench.inputs
    first = "i1_mlp0_t1"

    def with_run(folder):
        shutil.copytree(made(bench, "hyma"), folder / "r")

    def with_embeddings(folder):
        shutil.copytree(inputs / "embeddings", folder / "data")

    def with_embedded(folder):
        shutil.copytree(made(bench, "embed"), folder / "e")

    def with_report(folder):
        shutil.copytree(made(bench, "evaluate"), folder / "report")

    refine = ["train_grid.py", "--from", "r", *SHORT, "--epochs", 1, "--out", "new"]
    budget = ["train_grid.py", "--budget-of", "r", "--data", inputs / "embeddings", *SHORT, "--out", "new"]
    train = ["train_hyma.py", "--data", "data", *SHORT, "--rank", 8, "--out", "new"]
    score = [
        "evaluate.py",
        inputs / "runs" / "hyma",
        "--data",
        "data",
        "--bootstrap",
        20,
        "--out",
        "new",
        "--device",
        "cpu",
    ]
    again = stages["hyma"].commands[0]
    of_run = ["config.json", "metrics.jsonl", "checkpoint.pt", "ranking.csv", "ledger.json"]
    of_run += [f"connectors/{first}.pt", f"connectors/{first}.json"]
    return {
        "damage-run": Target(
            with_run,
            [f"r/{name}" for name in of_run],
            [
                Reader("typed again", again, "r"),
                Reader("--from", refine, "new"),
                Reader("--budget-of", budget, "new"),
                Reader("evaluate", ["evaluate.py", "r", "--bootstrap", 20, "--out", "new", "--device", "cpu"], "new"),
            ],
        ),
        "damage-embeddings": Target(
            with_embeddings,
            [f"data/{name}" for name in ("manifest.json", "rows.jsonl", "i1.pt", "t2.pt")],
            [Reader("train", train, "new"), Reader("evaluate", score, "new")],
        ),
        "damage-embedded": Target(
            with_embedded,
            [f"e/{name}" for name in ("manifest.json", "rows.jsonl", "quarantine.jsonl", "tiny.pt", "words.pt")],
            [Reader("typed again", stages["embed"].commands[0], "e")],
        ),
        "damage-report": Target(
            with_report,
            [f"report/{name}" for name in ("results.json", "ranking.csv", "selectors.csv", "loss.csv", "report.html")],
            [
                Reader("redrawn", ["hyma.report", "report"], "report"),
                Reader("evaluate", stages["evaluate"].commands[0], "report"),
            ],
        ),
    }


def damage(bench, part, limit=None):
    """Damages each file in each way, and runs every command that reads it. limit: only so many cases, drawn."""
    target = targets(bench)[part]
    expected = {reader.name: undamaged(bench, part, target, reader) for reader in target.readers}
    cases = [(file, kind, reader) for file in target.files for kind in DAMAGES for reader in target.readers]
    if limit is not None:
        cases = random.Random(bench.seed).sample(cases, min(limit, len(cases)))
    counts = Counts(len(cases))
    counts.more = {"not_compared": {name: found.differs for name, found in expected.items()}}
    ended = Counter()

    def judge(case):
        return damage_case(bench, part, target, expected, case, ended)

    names = [f"{file}, {kind}, {reader.name}" for file, kind, reader in cases]
    with ThreadPoolExecutor(bench.workers) as pool:
        for name, (problem, _) in zip(names, pool.map(guarded(judge), cases)):
            counts.add(name, problem)
    counts.more["ended"] = dict(ended)
    return counts


def undamaged(bench, part, target, reader):
    """What a reader makes of the undamaged folder, twice."""
    snapshots = []
    for turn in range(2):
        folder = fresh_folder(bench, f"{part}-{reader.name}-{turn}/work")
        target.make(folder)
        done = bench.runner.run(reader.command, folder)
        if done.code != 0:
            raise RuntimeError(f"{part}, {reader.name}: {done.err}")
        snapshots.append(snapshot(folder / reader.result))
    one, other = snapshots
    differs = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return Undisturbed(one, differs, [done.seconds], [])


def damage_case(bench, part, target, expected, case, ended):
    """One file damaged in one way, read by one command. Returns a problem or None."""
    file, kind, reader = case
    slug = hashlib.sha256(repr((file, kind, reader.name)).encode()).hexdigest()[:12]
    top = fresh_folder(bench, f"{part}-{slug}")
    folder, elsewhere = top / "work", top / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    target.make(folder)
    DAMAGES[kind](folder / file, elsewhere)
    before, damaged = everything(elsewhere), contents(folder / file)
    done = bench.runner.run(reader.command, folder, seconds=60)
    outside = everything(elsewhere) != before
    result = folder / reader.result
    # A damaged file that the command neither needs nor writes stays as it is; all others must be as undisturbed.
    untouched = folder / file if contents(folder / file) == damaged and result in (folder / file).parents else None
    problem = judge_damage(done, file, expected[reader.name], result, untouched)
    if outside:
        problem = "a file outside was changed"
    ended["one line" if done.code else "undisturbed result"] += problem is None
    if problem is None:
        shutil.rmtree(top)
    return problem


def everything(folder):
    """{path: bytes} of all that lies in a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def contents(path):
    """What is at a path: its type and bytes."""
    if path.is_symlink():
        return "link", os.readlink(path)
    if not path.exists():
        return "nothing", None
    mode = path.stat().st_mode
    return stat.S_IFMT(mode), path.read_bytes() if stat.S_ISREG(mode) else None


def judge_damage(done, file, expected, result, untouched):
    """What is wrong with how a command ended on a damaged file, or None."""
    if done.code is None:
        return "hangs"
    if "Traceback" in done.err:
        return f"traceback: {done.last[:200]}"
    if done.code == 0:
        found = difference(expected, result, untouched)
        return f"exit status 0, but {found}" if found else None
    script, _, message = done.last.partition(": ")
    if not message:
        return f"exit status {done.code}, no line: {done.last[:200]}"
    name, stem, folder = Path(file).name, Path(file).stem, Path(file).parts[0]
    if name not in message and not re.search(rf"\b({re.escape(stem)}\b|{folder}[/:])", message):
        return f"names no file: {done.last[:200]}"
    return None


# ---------------------------------------------------------------------------------------------------------- fuzzing


def odd_text(draw):
    """Text that a stranger could have written anywhere."""
    pieces = [
        "",
        " ",
        "\n",
        "\x00",
        "..",
        "/",
        "../../x",
        "/etc/passwd",
        "~",
        "a",
        "vit_l16",
        "mpnet",
        "=",
        ":",
        "*",
        "[",
        "]",
    ]
    pieces += [
        "timm:",
        "random:",
        "hf-hub:",
        "local-dir:",
        "\udc80",
        "é",
        "\u202e",
        "%s",
        "{}",
        "{",
        "0/1",
        "1/0",
        "-1",
    ]
    pieces += [
        "_mlp1_",
        ".pt",
        "nan",
        "1e999",
        "9" * 30,
        "train",
        "TEST",
        "?",
        "\\",
        '"',
        "'",
        ",",
        "\t",
        "\ufeff",
        "😀",
    ]
    return "".join(draw.choice(pieces) for _ in range(draw.choice((0, 1, 1, 2, 3, 8))))


def odd_value(draw, depth=3):
    """Any JSON value."""
    kind = draw.randrange(10 if depth else 7)
    if kind == 0:
        return draw.choice([None, True, False])
    if kind == 1:
        return draw.choice([0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 10**400])
    if kind == 2:
        return draw.choice([0.5, -0.0, float("nan"), float("inf"), float("-inf"), 1e308])
    if kind < 7:
        return odd_text(draw)
    if kind == 7:
        return [odd_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    names = [
        "image",
        "caption",
        "key",
        "label",
        "split",
        "question",
        "choices",
        "rows",
        "dim",
        "encoders",
        "flags",
        "x",
    ]
    return {draw.choice(names): odd_value(draw, depth - 1) for _ in range(draw.randrange(4))}


def mutate_value(value, draw):
    """A copy of a JSON value with one part replaced, removed or added."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return odd_value(draw)
    if isinstance(value, dict):
        key = draw.choice(list(value))
        if draw.random() < 0.2:
            return {name: part for name, part in value.items() if name != key}
        if draw.random() < 0.1:
            return value | {odd_text(draw): odd_value(draw)}
        return value | {key: mutate_value(value[key], draw)}
    place = draw.randrange(len(value))
    return [*value[:place], mutate_value(value[place], draw), *value[place + 1 :]]


def mutate_bytes(data, draw):
    """A copy of bytes, cut, flipped, repeated or with other bytes put in."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                data = data[:place]
            case 1 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 2 if place < len(data):
                data[place] = draw.choice((0, 255, 127, 128, 10, 34))
            case 3:
                data[place:place] = draw.randbytes(draw.randrange(1, 9))
            case 4:
                data[place:place] = data[place : place + draw.randrange(1, 64)]
            case 5:
                del data[place : place + draw.randrange(1, 64)]
    return bytes(data)


def odd_flag(draw):
    """Text that somebody could type as a flag: there is no NUL in it, and it is UTF-8 or was."""
    return odd_text(draw).replace("\x00", "")


class Fuzz:
    """The generated inputs. Each method is one kind: it writes one input into its folder, and reads it."""

    def __init__(self, folder, inputs):
        self.folder, self.inputs = Path(folder), Path(inputs)
        self.script = {
            name: runpy.run_path(str(ROOT / f"{name}.py"), run_name=name) for name in ("embed", "train_grid")
        }
        self.evaluate = runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")
        self.manifest = read_json(self.inputs / "embeddings" / "manifest.json")
        self.rows = read_jsonl(self.inputs / "embeddings" / "rows.jsonl")[::20]
        self.run = self.inputs / "runs" / "hyma"
        self.data = Embeddings(self.inputs / "embeddings")
        self.connector = (self.run / "connectors" / "i1_mlp0_t1.pt").read_bytes()
        self.pictures = self.make_pictures()
        self.model = torch.nn.Linear(2, 2)
        self.input = b""  # the last one, for the record
        self.small = make_embeddings(self.folder / "small", self.rows)
        self.kinds = [name for name in dir(self) if name.startswith("read_")]

    def make_pictures(self):
        from PIL import Image

        picture = Image.frombytes("RGB", (40, 32), random.Random(1).randbytes(3 * 40 * 32))
        found = []
        for mode in ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"):
            for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA"):
                file = io.BytesIO()
                with contextlib.suppress(Exception):
                    (picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)).save(file, kind)
                    found.append(file.getvalue())
        return found

    def write(self, name, data):
        """The input as a file."""
        self.input = data if isinstance(data, bytes) else data.encode(errors="surrogateescape")
        path = self.folder / name
        path.write_bytes(self.input)
        return path

    def as_json(self, value):
        return json.dumps(value).encode()

    def read_one_json(self, draw):
        data = self.as_json(mutate_value(self.manifest, draw))
        if draw.random() < 0.5:
            data = mutate_bytes(data, draw)
        read_json(self.write("x.json", data))

    def read_rows(self, draw):
        data = b"".join(self.as_json(mutate_value(row, draw)) + b"\n" for row in self.rows[:3])
        read_jsonl(self.write("x.jsonl", mutate_bytes(data, draw) if draw.random() < 0.5 else data))

    def mutated_archive(self, draw):
        """A torch file with other bytes, or with sound checksums around other contents."""
        if draw.random() < 0.4:
            return mutate_bytes(self.connector, draw)
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.connector)) as old, zipfile.ZipFile(made, "w") as new:
            for member in old.namelist():
                data = old.read(member)
                if member.endswith("data.pkl") or draw.random() < 0.1:
                    data = mutate_bytes(data, draw)
                new.writestr(member, data)
        return made.getvalue()

    def read_mutated_connector(self, draw):
        vlm.load_connector(self.write("i1_mlp0_t1.pt", self.mutated_archive(draw)))

    def read_odd_connector(self, draw):
        """Tensors of other shapes, types and names under the name of a connector."""
        tensors = [
            torch.zeros(2),
            torch.zeros(3, 2),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(0),
            torch.tensor(1.0),
        ]
        tensors += [
            torch.zeros(3, 2).to_sparse(),
            torch.zeros(2, device="meta"),
            torch.zeros(1).expand(10**12),
            None,
            1,
            "x",
        ]
        tensors += [torch.full((3, 2), float("nan")), torch.zeros(3, 2, dtype=torch.complex64), [torch.zeros(2)]]
        keys = ["weight", "bias", "0.weight", "0.bias", "2.weight", "2.bias", 0, "", "x"]
        state = {draw.choice(keys): draw.choice(tensors) for _ in range(draw.randrange(5))}
        if draw.random() < 0.5:
            state = {"weight": draw.choice(tensors), "bias": draw.choice(tensors)}
        file = io.BytesIO()
        torch.save(draw.choice([state, state, state, draw.choice(tensors)]), file)
        name = draw.choice(["a_mlp0_b.pt", "a_mlp1_b.pt", "vit_l16_mlp0_mpnet.pt", "_mlp0_.pt", "a.pt"])
        vlm.load_connector(self.write(name, file.getvalue()))

    def read_tensors(self, draw):
        path = self.write("x.pt", self.mutated_archive(draw))
        value = load_tensors(path, mmap=draw.random() < 0.5)
        if torch.is_tensor(value) and value.numel() < 10**6:
            value.float().sum()

    def read_embedding_file(self, draw):
        """A folder of plain .pt files, one of them mutated or of an odd tensor."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.inputs / "embeddings" / "i1.pt", folder / "vit_s16.pt")
        tensors = [torch.zeros(260), torch.zeros(260, 384), torch.zeros(0, 384), torch.ones(260, 384, dtype=torch.int8)]
        tensors += [
            torch.ones(1, 1).expand(260, 384),
            torch.zeros(260, 384).to_sparse(),
            torch.zeros(260, 384, device="meta"),
        ]
        file = io.BytesIO()
        torch.save(draw.choice(tensors), file)
        self.write("bare/minilm.pt", file.getvalue() if draw.random() < 0.5 else self.mutated_archive(draw))
        data = Embeddings(folder)
        data.load("minilm")

    def read_table(self, draw):
        """A table of captions: its columns, captions, labels, splits, choices."""
        from hyma.datasets import read_corpus

        suffix = draw.choice((".csv", ".tsv", ".jsonl", ".json", ".parquet"))
        columns = draw.sample(
            ["image", "file_name", "caption", "captions", "label", "split", "question", "answer", "choices"], 4
        )
        columns += ["conversations"] * (draw.random() < 0.2) + [odd_text(draw)] * (draw.random() < 0.2)
        rows = [{name: odd_value(draw, 2) for name in columns} for _ in range(draw.randrange(5))]
        rows = [row | {"image": draw.choice(["0.png", "./0.png", odd_text(draw)])} for row in rows]
        if suffix in (".csv", ".tsv"):
            comma = "," if suffix == ".csv" else "\t"
            lines = [comma.join(map(str, ["image", *columns]))]
            lines += [comma.join(str(value) for value in row.values()) for row in rows]
            data = "\n".join(lines).encode(errors="surrogateescape" if draw.random() < 0.5 else "replace")
        elif suffix == ".jsonl":
            data = b"\n".join(self.as_json(row) for row in rows)
        else:
            data = self.as_json(mutate_value(rows, draw) if draw.random() < 0.5 else rows)
        path = self.write(f"table{suffix}", mutate_bytes(data, draw) if draw.random() < 0.3 else data)
        self.scan(read_corpus(path))

    def scan(self, corpus):
        """What embed.py does with the rows of a corpus before it embeds."""
        from hyma.pictures import scan_picture
        from hyma.scan import row_fault, sort_rows

        json.dumps(corpus.rows, default=str)
        images = {row["image"] for row in corpus.rows if not row_fault(row)}
        pictures = {image: scan_picture(corpus.root, image) for image in images}
        usable, quarantine, _ = sort_rows(corpus, pictures)
        write_jsonl(self.folder / "q.jsonl", quarantine)
        write_jsonl(self.folder / "u.jsonl", usable)
        hash_keys(usable)

    def read_journal(self, draw):
        """The journal of an interrupted scan."""
        lines = self.as_json("digest") + b"\n" + b"null\n" * 3
        data = mutate_bytes(lines, draw) if draw.random() < 0.7 else lines + self.as_json(odd_value(draw)) + b"\n"
        from hyma.scan import read_journal

        read_journal(self.write(".scan.jsonl", data), "digest")

    def read_manifest(self, draw):
        """A sealed folder with another manifest."""
        value = self.small_manifest()
        for _ in range(draw.choice((1, 1, 2))):
            value = mutate_value(value, draw)
        self.write("small/manifest.json", self.as_json(value))
        self.use(Embeddings(self.small), draw)

    def small_manifest(self):
        manifest = dict(self.manifest) | {"rows": len(self.rows), "keys_sha256": hash_keys(self.rows), "encoders": {}}
        for name, record in self.manifest["encoders"].items():
            own = {"rows": len(self.rows), "keys_sha256": hash_keys(self.rows)}
            own["file_sha256"] = sha256_file(self.folder / "small" / f"{name}.pt")
            manifest["encoders"][name] = record | own
        return manifest

    def read_sealed_rows(self, draw):
        """A folder that a stranger has sealed over odd rows: every digest is right."""
        rows = list(self.rows)
        for _ in range(draw.choice((1, 1, 3))):
            place = draw.randrange(len(rows))
            changed = mutate_value(rows[place], draw)
            rows[place] = changed if isinstance(changed, dict) else {"caption": changed}
        self.input = self.as_json(rows)
        path = self.folder / "small" / "rows.jsonl"
        path.write_bytes(b"".join(self.as_json(row) + b"\n" for row in rows))
        rows = read_jsonl(path)
        keys = hash_keys(rows)
        manifest = self.small_manifest() | {"keys_sha256": keys}
        for record in manifest["encoders"].values():
            record["keys_sha256"] = keys
        write_json(self.folder / "small" / "manifest.json", manifest)
        try:
            self.use(Embeddings(self.small), draw)
        finally:
            write_jsonl(self.folder / "small" / "rows.jsonl", self.rows)

    def use(self, data, draw):
        """What trainers and evaluate.py do with a folder."""
        from hyma.metrics import Retrieval
        from hyma.tasks import open_tasks

        choose_pairs(data, ["all"])
        train, validation = split_rows(data, 0)
        Retrieval(data, validation, torch.device("cpu"))
        data.load(data.names("image")[0])
        open_tasks(None, data.folder, argparse.Namespace(templates="1", device=torch.device("cpu")))

    def read_run_folder(self, draw):
        """A run folder with one file changed."""
        from hyma.runs import read_run

        folder = self.folder / "run"
        if not folder.exists():
            shutil.copytree(self.run, folder)
        name = draw.choice(["config.json", "ledger.json", "ranking.csv"])
        original = (self.run / name).read_bytes()
        if name == "ranking.csv" or draw.random() < 0.3:
            data = mutate_bytes(original, draw)
        else:
            data = self.as_json(mutate_value(json.loads(original), draw))
        try:
            self.write(f"run/{name}", data)
            read_run(folder)
        finally:
            shutil.copy(self.run / name, folder / name)

    def read_connector_card(self, draw):
        path = self.folder / "i1_mlp0_t1.pt"
        card = read_json(self.run / "connectors" / "i1_mlp0_t1.json")
        data = self.as_json(mutate_value(card, draw))
        self.write("i1_mlp0_t1.json", mutate_bytes(data, draw) if draw.random() < 0.3 else data)
        vlm.encoder_of_connector(path, "image", "i1")
        vlm.check_weights(path, "i1", self.model)

    def read_encoder_name(self, draw):
        text = odd_text(draw)
        self.input = text.encode(errors="surrogatepass")
        encoder = vlm.find_encoder(text)
        path = self.folder / f"{encoder.name}.pt"
        if path.parent != self.folder or "/" in encoder.name or not vlm.is_encoder_name(encoder.name):
            raise AssertionError(f"the name {encoder.name!r} leads out of its folder")

    def read_pairs(self, draw):
        text = odd_flag(draw)
        self.input = text.encode(errors="surrogatepass")
        choose_pairs(self.data, [draw.choice([text, f"i1:{text}", f"{text}:t1"])])

    def read_shard_flag(self, draw):
        text = odd_flag(draw)
        self.input = text.encode(errors="surrogatepass")
        self.script["train_grid"]["shard_of"](argparse.Namespace(shard=text))
        flags = {
            "data": Path("x"),
            "batch_size": 1,
            "shard_rows": 1,
            "workers": 1,
            "encoder": ["control"],
            "weights": [],
        }
        self.script["embed"]["resolve_flags"](argparse.Namespace(**flags, shard=text, device="cpu", allow_bad=0.05))

    def read_named_flags(self, draw):
        text = odd_flag(draw)
        self.input = text.encode(errors="surrogatepass")
        if draw.random() < 0.5:
            self.script["embed"]["match_weights"]([text, f"vit_l16={text}"], [vlm.ENCODERS["vit_l16"]])
        else:
            self.evaluate["named_paths"]("--task", [text], "FOLDER")

    def read_device(self, draw):
        text = odd_flag(draw) or "cpu"
        self.input = text.encode(errors="surrogatepass")
        vlm.pick_device(text)

    def read_data_flag(self, draw):
        from hyma.datasets import read_corpus
        from hyma.standard_sets import parse_standard_set

        text = odd_flag(draw)
        self.input = text.encode(errors="surrogatepass")
        parse_standard_set(Path(text))
        if "\0" not in text and len(text) > 1 and not Path(text).is_absolute():
            read_corpus(self.folder / "none" / text)

    def read_templates(self, draw):
        from hyma.prompts import read_templates

        lines = "\n".join(draw.choice(["a photo of {}", odd_flag(draw)]) for _ in range(3))
        path = self.write("templates.txt", lines.encode(errors="surrogatepass"))
        read_templates(draw.choice([str(path), odd_flag(draw) or "1"]))

    def read_picture(self, draw):
        """A mutated picture of any format. The scan catches whatever Pillow raises, so only time and memory count."""
        path = self.write("picture", mutate_bytes(draw.choice(self.pictures), draw))
        with contextlib.suppress(Exception):
            vlm.open_image(path)


class Hang(BaseException):
    """A fuzzed input that takes too long."""


def fuzz_worker(folder, inputs, seed, numbers, place):
    """Reads the inputs of these numbers, and writes what failed to <folder>/failures.jsonl. place: the number at work."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    os.chdir(folder)
    fuzz = Fuzz(folder, inputs)
    write_json(Path(folder) / "small" / "manifest.json", fuzz.small_manifest())
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**30, resource.RLIM_INFINITY))

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    outcomes = Counter()
    with open(Path(folder) / "failures.jsonl", "w") as failures:
        for number in numbers:
            place.value = number
            draw = random.Random(f"{seed} {number}")
            kind = fuzz.kinds[number % len(fuzz.kinds)]
            signal.setitimer(signal.ITIMER_REAL, 10)
            problem = None
            try:
                getattr(fuzz, kind)(draw)
                outcomes[f"{kind} value"] += 1
            except BadInput as error:
                outcomes[f"{kind} refused"] += 1
                if len(str(error).splitlines()) != 1:
                    problem = f"{kind}: a message of several lines"
            except Hang:
                problem = f"{kind}: takes more than 10 s"
            except BaseException as error:
                frames = traceback.extract_tb(error.__traceback__)
                ours = [frame for frame in frames if str(ROOT) in frame.filename and "faults.py" not in frame.filename]
                where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "the harness"
                problem = f"{kind}: {type(error).__name__} at {where}: {str(error)[:120]}"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if problem:
                shown = base64.b64encode(fuzz.input[:3000]).decode()
                failures.write(json.dumps({"number": number, "problem": problem, "input": shown}) + "\n")
                failures.flush()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    (Path(folder) / "outcomes.json").write_text(json.dumps({"outcomes": outcomes, "peak_bytes": peak}))


def fuzz(bench, asked):
    """Reads so many generated inputs. One that ends its process is named, and the others go on without it."""
    counts = Counts(asked)
    outcomes, peaks = Counter(), []
    shares = [list(range(first, asked, bench.workers)) for first in range(bench.workers)]
    with ThreadPoolExecutor(bench.workers) as pool:
        for failures, found, tried in pool.map(lambda share: fuzz_share(bench, *share), enumerate(shares)):
            for failure in failures:
                counts.add(failure["number"], failure["problem"])
                counts.failed[-1]["input"] = failure.get("input")
            counts.add("", None, tried - len(failures))
            for each in found:
                outcomes.update(each["outcomes"])
                peaks.append(each["peak_bytes"])
    by_kind = {}
    for key, count in sorted(outcomes.items()):
        kind, outcome = key.split()
        by_kind.setdefault(kind.removeprefix("read_"), {})[outcome] = count
    counts.more = {"seed": bench.seed, "outcomes": by_kind, "peak_bytes": max(peaks, default=None)}
    return counts


def fuzz_share(bench, place, numbers):
    """(failures, outcomes, how many were tried) of one worker's numbers, in chunks that each have a process."""
    failures, outcomes, tried = [], [], 0
    chunks = [numbers[start : start + 5000] for start in range(0, len(numbers), 5000)]
    while chunks:
        chunk = chunks.pop(0)
        folder = fresh_folder(bench, f"fuzz-{place}")
        at = bench.runner.context.Value("q", -1)
        arguments = (str(folder), str(bench.inputs), bench.seed, chunk, at)
        process = bench.runner.context.Process(target=fuzz_worker, args=arguments)
        process.start()
        alive, last = True, None
        while alive:
            process.join(30)  # a reader that even the alarm cannot reach makes no progress for so long
            alive = process.exitcode is None and at.value != last
            last = at.value
        stuck = process.exitcode is None
        if stuck:
            process.kill()
            process.join()
        path = folder / "failures.jsonl"
        failures += [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if process.exitcode == 0:
            outcomes.append(json.loads((folder / "outcomes.json").read_text()))
            tried += len(chunk)
            continue
        if at.value < 0:
            raise RuntimeError(f"the fuzzing process ended with {process.exitcode} before its first input")
        ending = "hangs" if stuck else f"ends its process with {process.exitcode}"
        failures.append({"number": at.value, "problem": f"input {ending}"})
        done = chunk.index(at.value) + 1
        tried += done
        if chunk[done:]:
            chunks.insert(0, chunk[done:])
    return failures, outcomes, tried


# -------------------------------------------------------------------------------------------- the list of known faults


class Fault(NamedTuple):
    """A known kind of fault.

    shown_by: a function of (bench, folder) that gives a problem or None; names of tests, "file::test ..."; a part, "part
    kills-hyma", whose counts in the JSON show it; or "no: " and the reason why it is not tried here.
    """

    name: str
    expected: str
    shown_by: object


def refused(done, *words):
    """A problem, unless the command ended in one line with these words."""
    if done.code is None:
        return "hangs"
    if done.code == 0:
        return f"expected a refusal; it ended well: {done.out.strip().splitlines()[-1:]}"
    if "Traceback" in done.err:
        return f"traceback: {done.last[:200]}"
    if not re.match(r"\w+\.py: ", done.last):
        return f"exit status {done.code}, no line: {done.last[:200]}"
    missing = [word for word in words if word not in done.last]
    return f"the line lacks {missing}: {done.last[:200]}" if missing else None


def embed_table(bench, folder, text, name="captions.csv", pictures=24, texts=()):
    """Runs embed.py over a table beside the planted pictures. Returns (Done, rows or None, quarantine or None)."""
    data = folder / "data"
    data.mkdir()
    for k in range(pictures):
        shutil.copy(bench.inputs / "pictures" / f"{k}.png", data)
    (data / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    encoders = ("--encoder", "tiny=random:test_vit", *texts)
    command = ["embed.py", *encoders, "--data", data / name, "--out", "e", "--device", "cpu"]
    done = bench.runner.run(command, folder)
    rows, quarantine = folder / "e" / "rows.jsonl", folder / "e" / "quarantine.jsonl"
    return done, *(read_jsonl(path) if path.exists() else None for path in (rows, quarantine))


QUICK_REPORT = ("--bootstrap", 20, "--selector-rows", 0, "--device", "cpu")


def table_of(lines, header="image,caption"):
    return "\n".join([header, *lines]) + "\n"


def stray_quote(bench, folder):
    lines = [f"{k}.png,{chr(34) if k == 3 else ''}a red square {k}" for k in range(24)]
    done, rows, quarantine = embed_table(bench, folder, table_of(lines))
    if done.code != 0:
        return refused(done)
    accounted = len(rows) + len(quarantine)
    return None if accounted >= 24 else f"24 rows became {len(rows)}, and the quarantine has {len(quarantine)}"


def late_split(bench, folder):
    """JSON lines whose first record has no split."""
    rows = [{"image": f"{k}.png", "caption": f"a {k}"} | ({"split": "test"} if k else {}) for k in range(24)]
    text = "\n".join(map(json.dumps, rows))
    done, rows, _ = embed_table(bench, folder, text, "captions.jsonl")
    if done.code != 0:
        return refused(done)
    return None if sum(row.get("split") == "test" for row in rows) == 23 else "the split of the later rows is lost"


def unknown_split(bench, folder):
    lines = [f"{k}.png,a red square {k},{('train', 'restval', 'Validate')[k % 3]}" for k in range(24)]
    words = [f"words={bench.inputs / 'words'}"]
    done, rows, _ = embed_table(bench, folder, table_of(lines, "image,caption,split"), texts=words)
    if done.code != 0:
        return refused(done, "split")
    command = ["train_hyma.py", "--data", "e", *SHORT, "--batch-size", 4, "--out", "r"]
    done = bench.runner.run(command, folder)
    if "16 training and 8 validation" in done.out:
        return None
    return f"24 rows: {done.out.splitlines()[:1]} {done.last[:160]}"


def lists_of_captions(bench, folder):
    rows = [{"image": f"{k}.png", "caption": [f"a red {k}", f"a square {k}"]} for k in range(24)]
    done, rows, _ = embed_table(bench, folder, "\n".join(map(json.dumps, rows)), "captions.jsonl")
    if done.code != 0:
        return f"a list of captions is refused: {done.last[:160]}"
    return None if len(rows) == 48 else f"24 pictures of two captions became {len(rows)} rows"


def spellings_of_a_picture(bench, folder):
    names = ["0.png", "./0.png", "../data/0.png"] + [f"{k}.png" for k in range(1, 24)]
    done, rows, _ = embed_table(bench, folder, table_of(f"{name},red {k}" for k, name in enumerate(names)))
    if done.code != 0:
        return refused(done)
    different = len({row["image"] for row in rows})
    return None if different == 24 else f"24 pictures count as {different}"


def labels_of_several_types(bench, folder):
    rows = [{"image": f"{k}.png", "caption": f"a {k}", "label": [1, 1.0, float("nan"), "1"][k % 4]} for k in range(24)]
    done, rows, _ = embed_table(bench, folder, "\n".join(map(json.dumps, rows)), "captions.jsonl")
    if done.code != 0:
        return refused(done)
    labels = {row.get("label") for row in rows}
    return None if "nan" not in labels and len(labels - {None}) == 1 else f"classes: {sorted(map(str, labels))}"


def odd_labels(bench, folder):
    """A label and a split with a byte that is not UTF-8: the row is read or quarantined."""
    lines = [
        f"{k}.png,a {k},".encode() + (b"caf\xe9,train" if k == 3 else b"a,tr\xe9n" if k == 4 else b"a,train")
        for k in range(24)
    ]
    done, rows, quarantine = embed_table(bench, folder, b"image,caption,label,split\n" + b"\n".join(lines) + b"\n")
    if done.code != 0:
        return refused(done)
    return None if len(rows) + len(quarantine) == 24 else f"{len(rows)} rows and {len(quarantine)} in quarantine of 24"


def many_missing(bench, folder):
    lines = [f"{k}.png,a red square {k}" for k in range(24)]
    done, *_ = embed_table(bench, folder, table_of(lines), pictures=16)
    return refused(done)


def repaired_pictures(bench, folder):
    lines = [f"{k}.png,a red square {k}" for k in range(24)]
    embed_table(bench, folder, table_of(lines), pictures=23)
    (folder / "e" / "manifest.json").rename(folder / "e" / "manifest.partial.json")
    shutil.copy(bench.inputs / "pictures" / "23.png", folder / "data")
    command = ["embed.py", "--encoder", "tiny=random:test_vit", "--data", folder / "data" / "captions.csv"]
    bench.runner.run([*command, "--out", "e", "--device", "cpu"], folder)
    count = len(read_jsonl(folder / "e" / "rows.jsonl"))
    return None if count == 24 else f"a picture that was repaired is not looked at again: {count} rows of 24"


def odd_captions(bench, folder):
    """Empty, blank, 50,000 characters, no UTF-8, NUL, right to left: neighbours stay where they are."""
    odd = [
        b"",
        b"  ",
        b"x" * 50_000,
        b"caf\xe9",
        b"a\x00b",
        "\u05e9\u05dc\u05d5\u05dd".encode(),
        b"http://x/y.jpg",
        b"0.png",
    ]
    lines = [f"{k}.png,".encode() + (odd[k // 2] if k % 2 and k < 16 else f"plain {k}".encode()) for k in range(24)]
    done, rows, quarantine = embed_table(bench, folder, b"image,caption\n" + b"\n".join(lines) + b"\n")
    if done.code != 0:
        return refused(done)
    shifted = [
        row for row in rows if row["caption"].startswith("plain") and row["caption"][6:] + ".png" != row["image"]
    ]
    whole = len(rows) + len(quarantine) == 24
    return (
        None if whole and not shifted else f"{len(rows)} rows and {len(quarantine)} in quarantine of 24; {shifted[:1]}"
    )


def open_file_limit(bench, folder):
    """Pictures that cannot be opened because the machine has no more files for the process are no bad pictures."""
    import errno

    from hyma import datasets

    opened = datasets.open_image

    def fail(_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    datasets.open_image = fail
    try:
        reason = datasets.why_unusable(folder, {"image": "a.png", "caption": "a"})
    except OSError:
        return None
    except BadInput:
        return None
    finally:
        datasets.open_image = opened
    return f"counts as a bad picture: {reason}"


def bombs(bench, folder):
    """Headers of 100 and of 182 megapixels are refused before anything is decoded."""
    import struct
    import zlib

    def header(width, height):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    for width, height in ((10_000, 10_000), (14_000, 13_000), (1, 60_000)):
        path = folder / "bomb.png"
        path.write_bytes(header(width, height))
        try:
            vlm.open_image(path)
            return f"{width} x {height} is opened"
        except MemoryError:
            return f"{width} x {height} fills the memory"
        except Exception as error:
            if "truncated" in str(error):
                return f"{width} x {height} is decoded"
    return None


def other_formats(bench, folder):
    from PIL import Image

    for kind in ("TIFF", "ICO", "PPM", "TGA", "PCX", "SGI"):
        path = folder / f"picture.{kind.lower()}"
        Image.new("RGB", (16, 16)).save(path, kind)
        with contextlib.suppress(Exception):
            vlm.open_image(path)
            return f"{kind} is opened"
    return None


def no_folder_to_write(bench, folder):
    (folder / "file").write_text("x")
    command = [*bench.stages["hyma"].commands[0][:-1], "file/r"]
    return refused(bench.runner.run(command, folder), "file")


def odd_run_folders(bench, folder):
    """--out at the root, at the folder itself, at a folder with other files."""
    (folder / "mine.txt").write_text("x")
    for out in ("/", "."):
        command = [*bench.stages["hyma"].commands[0][:-1], out]
        if problem := refused(bench.runner.run(command, folder), "--out"):
            return f"--out {out}: {problem}"
    return None


def permissions(bench, folder):
    """Files have the mode that the umask leaves, and not that of a temporary file."""
    umask = os.umask(0o022)
    os.umask(umask)
    bench.runner.run(bench.stages["closed"].commands[0], folder)
    odd = [
        p.name for p in (folder / "r").rglob("*") if p.is_file() and stat.S_IMODE(p.stat().st_mode) != 0o666 & ~umask
    ]
    return f"other modes: {odd[:3]}" if odd else None


def two_seeds(bench, folder):
    """The same seed gives the same bytes, another seed other bytes."""
    command = bench.stages["hyma"].commands[0]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        bench.runner.run([*command[:-1], name, "--seed", seed], folder)
    one, same, other = ((folder / name / "connectors" / "i1_mlp0_t1.pt").read_bytes() for name in "abc")
    return None if one == same != other else "seeds do not decide the bytes"


def expanded_view(bench, folder):
    """An embedding file of a few bytes that says it has 10^10 rows: refused at once."""
    data = folder / "data"
    data.mkdir()
    torch.save(torch.full((1, 1), 0.05).half().expand(10**10, 384), data / "vit_s16.pt")
    torch.save(torch.full((1, 1), 0.05).half().expand(10**10, 384), data / "minilm.pt")
    command = ["train_hyma.py", "--data", "data", *SHORT, "--out", "r"]
    return refused(bench.runner.run(command, folder, seconds=20), ".pt")


def picture_elsewhere(bench, folder):
    """A stranger's folder whose rows name pictures outside it: the report shows none of them."""
    rows = read_jsonl(bench.inputs / "embeddings" / "rows.jsonl")
    secret = bench.inputs / "pictures" / "1.png"
    rows = [
        row | {"image": f"{'/' * (k % 2)}..{'/..' * 12}{secret}" if k % 3 else str(secret)}
        for k, row in enumerate(rows)
    ]
    rows = [row | {"image": f"{row['image'][:-5]}{k % 24}.png"} for k, row in enumerate(rows)]
    make_embeddings(folder / "data", rows)
    bench.runner.run(
        ["train_grid.py", "--data", "data", "--closed-form", "ridge", "--out", "r", "--device", "cpu"], folder
    )
    done = bench.runner.run(["evaluate.py", "r", *QUICK_REPORT, "--out", "report"], folder)
    shown = list((folder / "report" / "thumbnails").glob("*")) if (folder / "report" / "thumbnails").exists() else []
    if done.code != 0:
        return refused(done)
    return f"{len(shown)} pictures outside the folder are in the report" if shown else None


def prompts_without_encoder(bench, folder):
    """Labels ask for prompts, and their text encoder is not to be had: said before the scoring, or left out with a line."""
    rows = [
        row | {"label": "ab"[k % 2]} for k, row in enumerate(read_jsonl(bench.inputs / "embeddings" / "rows.jsonl"))
    ]
    make_embeddings(folder / "data", rows)
    bench.runner.run(
        ["train_grid.py", "--data", "data", "--closed-form", "ridge", "--out", "r", "--device", "cpu"], folder
    )
    done = bench.runner.run(["evaluate.py", "r", "--bootstrap", 20, "--out", "report", "--device", "cpu"], folder)
    if done.code == 0:
        return None
    return f"the report is lost after the scoring has begun: {done.last[:160]}" if "connector/s" in done.err else None


def repeated_captions(bench, folder):
    done, *_ = embed_table(bench, folder, table_of(f"{k}.png,red {k // 2}" for k in range(24)))
    return None if "12 captions repeat" in done.out else "repeated captions are not counted"


def no_rows(bench, folder):
    for k, text in enumerate(("image,caption\n", "", table_of(["none.png,a"]))):
        (folder / str(k)).mkdir()
        done, *_ = embed_table(bench, folder / str(k), text)
        if problem := refused(done):
            return problem
    return None


def linked_lock(bench, folder):
    """.lock as a link and as a pipe: neither followed nor waited for."""
    target = folder / "target"
    target.write_text("mine")
    for name in ("link", "pipe"):
        out = folder / name
        out.mkdir()
        if name == "link":
            (out / ".lock").symlink_to(target)
        else:
            os.mkfifo(out / ".lock")
        done = bench.runner.run([*bench.stages["closed"].commands[0][:-3], out, "--device", "cpu"], folder, seconds=20)
        if problem := refused(done, ".lock"):
            return f"{name}: {problem}"
    return None if target.read_text() == "mine" else "the link was followed"


def linked_folders(bench, folder):
    """A stranger's embedding folder with .shards, prompts or connectors as links: nothing is written behind them."""
    for name in (".shards", "prompts"):
        out, elsewhere = folder / f"e{name}", folder / f"elsewhere{name}"
        elsewhere.mkdir()
        out.mkdir()
        (out / name).symlink_to(elsewhere)
        command = [word if word != "e" else out for word in bench.stages["embed"].commands[0]]
        bench.runner.run(command, folder)
        if any(elsewhere.iterdir()):
            return f"{name}: written through a link"
    return None


def local_card(bench, folder):
    """A card that names a folder of this machine, in every spelling: refused, and never loaded."""
    (folder / "here").mkdir()
    path = folder / "x_mlp0_y.pt"
    for spec in ("/x", "./x", "~/x", f"{folder}/here", f"local-dir:{folder}/here", f"timm:local-dir:{folder}/here"):
        write_json(path.with_suffix(".json"), {"image_encoder": spec})
        with contextlib.suppress(BadInput):
            return f"taken: {vlm.encoder_of_connector(path, 'image', 'x')[:24]}..."
    return None


def typed_again(bench, folder):
    """A finished run typed again says that it is finished, and changes no connector."""
    command = bench.stages["hyma"].commands[0]
    bench.runner.run(command, folder)
    before = snapshot(folder / "r")
    done = bench.runner.run(command, folder)
    if done.code != 0 or "is finished" not in done.out:
        return f"{done.code}: {done.last[:100]}"
    return None if snapshot(folder / "r") == before else "the finished run has changed"


def bad_values(bench, folder):
    """Flags whose values no run can have."""
    for flags in (["--seed", 2**64], ["--weight-decay", "nan"], ["--lr", "inf"], ["--device", "meta"], ["--epochs", 0]):
        done = bench.runner.run([*bench.stages["hyma"].commands[0], *flags], folder)
        if problem := refused(done):
            return f"{flags}: {problem}"
    return None


NO_TAR = "no: no tar file is read"
KERNELS = "no: no process and no file is part of it; needs a GPU or Triton's interpreter, and has tests of its own"

# Numbers: the fifty faults of the design's reliability notes. Letters: what was found wrong before.
FAULTS = [
    Fault(
        "1 killed while training", "the same bits", "part kills-hyma kills-grid kills-halving kills-shards kills-closed"
    ),
    Fault("2 killed between write and rename", "the old file; the new one later removed", "part kills-hyma kills-grid"),
    Fault("3 killed between two renames", "never a mix", "part kills-hyma kills-grid"),
    Fault(
        "4 newest checkpoint cut",
        "the one before it",
        "tests/test_train_hyma.py::test_a_damaged_checkpoint_has_a_predecessor",
    ),
    Fault("5 a byte of a run flipped", "named, or the same result", "part damage-run"),
    Fault("6 disk full", "the old file is kept", "tests/test_files.py::test_a_full_disk_leaves_the_old_file"),
    Fault("7 no folder to write to", "one line", no_folder_to_write),
    Fault(
        "8 two processes on a folder",
        "the second is refused",
        "tests/test_files.py::test_lock_keeps_a_second_process_out "
        "tests/test_runs.py::test_a_run_folder_belongs_to_one_run_and_one_process",
    ),
    Fault(
        "9 resumed with other flags",
        "the flag is named",
        "tests/test_train_hyma.py::test_resume_of_a_finished_run_and_contradictions",
    ),
    Fault("10 resumed at the end", "trains nothing", typed_again),
    Fault(
        "11 a newer format",
        "refused by version",
        "tests/test_embeddings.py::test_faults_of_rows_and_manifest_are_named",
    ),
    Fault("12 file modes", "the umask's", permissions),
    Fault("13 two checkpoints while saving", "one can always be read", "part kills-hyma kills-grid"),
    Fault("14 killed while embedding", "the same bytes", "part kills-embed"),
    Fault("15 an unsealed folder", "refused", "tests/test_embeddings.py::test_faults_of_rows_and_manifest_are_named"),
    Fault("16 a bad shard", "made again", "tests/test_embed.py::test_a_bad_shard_is_made_again"),
    Fault(
        "17 encoders of other rows", "refused", "tests/test_embeddings.py::test_faults_of_rows_and_manifest_are_named"
    ),
    Fault("18 rows permuted", "refused", "tests/test_embeddings.py::test_a_sealed_folder_is_checked_byte_for_byte"),
    Fault("19 a few bytes that say they are many rows", "refused at once", expanded_view),
    Fault("20 zero rows", "refused", "tests/test_embeddings.py::test_a_sealed_folder_is_checked_byte_for_byte"),
    Fault(
        "21 other types and layouts",
        "refused",
        "tests/test_vlm.py::test_connectors_that_are_no_plain_numbers_are_refused",
    ),
    Fault("22 NaN in a row", "refused", "tests/test_embeddings.py::test_a_sealed_folder_is_checked_byte_for_byte"),
    Fault(
        "23 other weights than recorded",
        "refused",
        "tests/test_weights.py::test_a_connector_is_not_stitched_to_other_weights",
    ),
    Fault("24 repeated captions", "counted", repeated_captions),
    Fault("25 no rows", "one line", no_rows),
    Fault("26 one and three processes", "the same bytes", "tests/test_embed.py::test_shards_of_several_processes"),
    Fault("27 a tar that is cut", "counted", NO_TAR),
    Fault("28 a prefix over two tars", "not merged", NO_TAR),
    Fault("29 unreadable pictures", "quarantined for all encoders", "tests/test_embed.py::test_quarantine"),
    Fault(
        "30 a picture that breaks after the scan",
        "stops",
        "tests/test_embed.py::test_a_picture_that_breaks_after_the_scan_stops_the_run",
    ),
    Fault("31 pictures of 100 and 182 megapixels, and thin ones", "refused at the header", bombs),
    Fault("32 every mode", "upright RGB", "tests/test_vlm.py::test_pictures_of_every_mode_become_upright_rgb"),
    Fault("33 other formats", "not opened", other_formats),
    Fault("34 odd captions", "no row shifts", odd_captions),
    Fault(
        "35 captions that are addresses",
        "text",
        "tests/test_vlm.py::test_captions_are_text_to_a_multimodal_model",
    ),
    Fault("36 a third of the pictures missing", "stops", many_missing),
    Fault(
        "37 a loss that is not finite",
        "stops before the update",
        "tests/test_train_hyma.py::test_a_loss_that_is_not_finite_stops_before_the_update",
    ),
    Fault(
        "38 one pair's loss is not finite",
        "the pair is named",
        "tests/test_train_grid.py::test_a_loss_that_is_not_finite_stops_before_the_update",
    ),
    Fault("39 a row of length zero", "finite", KERNELS),
    Fault("40 scale at its limit, one row, equal pairs", "finite", KERNELS),
    Fault("41 seeds", "the same seed, the same bytes", two_seeds),
    Fault("42 kernels against the reference", "within the bound", KERNELS),
    Fault("43 outputs that nobody wrote", "none", KERNELS),
    Fault("44 odd shapes", "as the reference", KERNELS),
    Fault("45 wrong arguments", "named", "tests/test_kernels_arguments.py::test_bad_arguments_are_named"),
    Fault("46 no GPU, no triton", "one line", "tests/test_kernels_arguments.py::test_impl"),
    Fault(
        "47 code in a file",
        "never runs",
        "tests/test_vlm.py::test_damaged_and_hostile_files_are_refused tests/test_forbidden_calls.py",
    ),
    Fault(
        "48 names that lead elsewhere",
        "refused",
        "tests/test_embeddings.py::test_an_encoder_of_a_manifest_has_a_name_that_can_be_a_files",
    ),
    Fault("48b pictures of a stranger's rows that lie elsewhere", "not shown", picture_elsewhere),
    Fault(
        "49 signals",
        "saved; 143, 130, 152; the same bits",
        "part signals-embed signals-hyma signals-grid signals-halving signals-shards signals-closed signals-evaluate",
    ),
    Fault("50 out of memory", "the flag is named", "tests/test_files.py::test_running_out_of_memory_names_the_flags"),
    Fault(
        "A1 weights that do not fit",
        "refused",
        "tests/test_weights.py::test_weights_that_leave_tensors_random_are_refused",
    ),
    Fault(
        "A2 --from", "that run's data", "tests/test_train_grid.py::test_from_takes_the_data_and_the_split_of_its_run"
    ),
    Fault("A3 a stray quote", "no row is lost unsaid", stray_quote),
    Fault("A6 the first record lacks a column", "the others keep it", late_split),
    Fault("A7 other names of splits", "known or named", unknown_split),
    Fault("A8 several captions in a record", "a row each", lists_of_captions),
    Fault("A9 a picture under several paths", "one picture", spellings_of_a_picture),
    Fault("A11 labels of several types", "one class, NaN is none", labels_of_several_types),
    Fault("D labels and splits that are not UTF-8", "read or quarantined", odd_labels),
    Fault("A12 errors of the machine", "stop", open_file_limit),
    Fault("A13 pictures repaired after the scan", "scanned again", repaired_pictures),
    Fault(
        "A14 connectors that are not finite",
        "refused",
        "tests/test_evaluate.py::test_a_connector_that_is_not_finite_is_named",
    ),
    Fault(
        "A19 an encoder's file lost after sealing",
        "embedded again",
        "tests/test_embed.py::test_a_file_that_was_lost_or_cut_is_embedded_again",
    ),
    Fault("B1 a card that names a local folder", "refused", local_card),
    Fault("B3 .lock as a link or a pipe", "neither followed nor waited for", linked_lock),
    Fault("B3b folders as links", "nothing is written behind them", linked_folders),
    Fault(
        "B4 thin pictures", "refused", "tests/test_vlm.py::test_a_thin_picture_is_refused_before_it_fills_the_memory"
    ),
    Fault("C prompts without their encoder", "said before the scoring, or left out", prompts_without_encoder),
    Fault("D odd values of flags", "one line", bad_values),
    Fault("D odd run folders", "refused", odd_run_folders),
    Fault(
        "D degenerate data",
        "a ranking or one line",
        "tests/test_train_hyma.py::test_degenerate_data_end_with_a_ranking_or_one_line",
    ),
]


def known_faults(bench, parts=None, with_tests=True):
    """Tries every known fault. parts: counts of the other parts, as far as they have run."""
    counts = Counts(len(FAULTS))
    outcomes = tests_outcomes() if with_tests else {}
    table = {}
    for number, fault in enumerate(FAULTS):
        folder = fresh_folder(bench, f"fault-{number}")
        how = fault.shown_by
        if callable(how):
            problem, _ = guarded(lambda folder, how=how: how(bench, folder))(folder)
            outcome = "held" if problem is None else "not held"
        elif how.startswith("no: "):
            outcome, problem = "not tried", how[4:]
        elif how.startswith("part "):
            outcome, problem = outcome_of_parts(how.split()[1:], parts or {})
        else:
            outcome, problem = outcome_of_tests(how.split(), outcomes)
        table[fault.name] = {"expected": fault.expected, "outcome": outcome, "why": problem}
        if outcome in ("held", "not held"):
            counts.add(fault.name, problem if outcome == "not held" else None)
    counts.more = {"table": table}
    return counts


def outcome_of_parts(names, parts):
    """What the counts of other parts show."""
    missing = [name for name in names if name not in parts]
    if missing:
        return "not tried", f"{' '.join(missing)} not run yet"
    bad = [f"{name}: {parts[name]['not_held']} of {parts[name]['tried']}" for name in names if parts[name]["not_held"]]
    return ("not held", "; ".join(bad)) if bad else ("held", None)


def outcome_of_tests(names, outcomes):
    """What tests show. outcomes: {test without parameters: whether it passed}."""
    matching = {name: [passed for test, passed in outcomes.items() if test.startswith(name)] for name in names}
    missing = [name for name, found in matching.items() if not found]
    if missing:
        return "not tried", f"{missing[0]} was not run"
    failed = [name for name, found in matching.items() if not all(found)]
    return ("not held", f"{failed[0]} fails") if failed else ("held", None)


def tests_outcomes():
    """{test: whether it passed} of the tests that FAULTS names; a skipped one is left out."""
    import xml.etree.ElementTree as xml

    names = {name for fault in FAULTS if isinstance(fault.shown_by, str) for name in fault.shown_by.split()}
    names = sorted(name for name in names if name.startswith("tests/"))
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *names]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cases = xml.parse(results).iter("testcase") if results.exists() else []
        outcomes = {}
        for case in cases:
            children = {child.tag for child in case}
            if "skipped" not in children:
                name = f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
                outcomes[name] = not children & {"failure", "error"}
    return outcomes


# --------------------------------------------------------------------------------------------------------------- main


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100, help="of a stage, at random moments (default: %(default)s)")
    add("--signals", type=int, default=25, help="of each of four kinds, of a stage (default: %(default)s)")
    add("--fuzz", type=int, default=100_000, help="generated inputs (default: %(default)s)")
    add("--sample", type=int, help="only so many writes of a stage, and damages of a part (default: all)")
    add("--only", nargs="+", metavar="PART", help="these parts, or those that begin so (default: all)")
    add("--again", action="store_true", help="parts that the JSON holds already, too")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="cases at a time (default: %(default)s)")
    add("--work", type=Path, help="folder of inputs and of cases that failed (default: a temporary one)")
    add("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="counts (default: %(default)s)")
    return parser.parse_args()


def plan_parts(bench, flags, parts_so_far):
    """{part: (what is asked, function that makes its Counts)}. parts_so_far: what has run, which the list refers to."""
    parts = {}
    for part in targets(bench):
        parts[part] = (flags.sample, lambda part=part: damage(bench, part, flags.sample))
    parts["fuzz"] = (flags.fuzz, lambda: fuzz(bench, flags.fuzz))
    for stage in bench.stages.values():
        parts[f"signals-{stage.name}"] = (flags.signals, lambda stage=stage: signals(bench, stage, flags.signals))
    for stage in bench.stages.values():
        parts[f"kills-{stage.name}"] = (
            (flags.kills, flags.sample),
            lambda stage=stage: kills(bench, stage, flags.kills, flags.sample),
        )
    parts["list"] = (len(FAULTS), lambda: known_faults(bench, parts_so_far))
    if flags.only:
        parts = {part: found for part, found in parts.items() if part.startswith(tuple(flags.only))}
    return parts


def main():
    flags = parse_flags()
    work = flags.work or Path(tempfile.mkdtemp(prefix="faults-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = open_bench(work.resolve(), flags.seed, flags.workers)
    made = provenance("cpu")
    record = json.loads(flags.json.read_text()) if flags.json.exists() else {"parts": {}}
    for part, (asked, make) in plan_parts(bench, flags, record["parts"]).items():
        size = {
            "commit": made["commit"],
            "seed": flags.seed,
            "size": list(asked) if isinstance(asked, tuple) else asked,
        }
        earlier = record["parts"].get(part, {})
        if not flags.again and all(earlier.get(key) == value for key, value in size.items()):
            print(f"{part}: is there already")
            continue
        begin = time.monotonic()
        counts = make()
        seconds = round(time.monotonic() - begin, 1)
        record["parts"][part] = size | {"seconds": seconds} | counts.record()
        record["made"] = made
        record["counts"] = add_up(record["parts"])
        shown = json.dumps(record["parts"][part]).replace(str(bench.work), "WORK")  # no paths of this machine
        record["parts"][part] = json.loads(shown)
        write_json(flags.json, record)
        print(
            f"{part}: {counts.tried} tried, {counts.held} held, {len(counts.failed)} not, {seconds:.0f} s", flush=True
        )
        for problem, count in counts.kinds().most_common(15):
            print(f"  {count} x {problem}", flush=True)
    if flags.work is None:
        shutil.rmtree(work, ignore_errors=True)


def add_up(parts):
    """{kind of part: tried, held, not held}."""
    totals = {}
    for part, counts in parts.items():
        total = totals.setdefault(part.partition("-")[0], {})
        for key in ("tried", "held", "not_held", "kills"):
            if key in counts:
                total[key] = total.get(key, 0) + counts[key]
    return totals


if __name__ == "__main__":
    main()
