"""What every command does today, so that a change which must not change it can be held to that.

    python tests/goldens.py             # records tests/goldens.json, which test_goldens.py compares with

Each group runs real command lines one after the other in a folder of its own and writes down, of each: exit code,
stdout, the last line of stderr, and every file it wrote. Seconds, dates, memory, versions and the place of the
repository are left out, as they are never the same twice. Later code may add keys to JSON objects and columns to
tables; what was written down must stay.

The last bits of a result depend on the processor, the thread count and the libraries. Where these are the recorder's,
everything must be equal; elsewhere `differences` compares only what does not depend on bits.
"""

import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from conftest import ROOT, SAMPLE, real_weights, run_here, sample_captions, write_csv, write_planted

FILE = Path(__file__).with_suffix(".json")
PACKAGES = ("torch", "numpy", "timm", "sentence-transformers", "transformers", "pillow", "matplotlib")
# fmt: off
PUBLIC = [
    "ImageEncoder", "TextEncoder", "init_modality_connector", "CustomVLM", "get_vlm_from_checkpoint", "EmbeddingDataset",
    "open_image", "ENCODERS", "BadInput", "find_encoder", "read_connector", "connector_name", "HIDDEN_DIM",
]
# fmt: on

CPU = ("--device", "cpu")
PLANTED = ("--data", "planted", "--epochs", 2, "--batch-size", 128, "--warmup-steps", 2, *CPU)
SHALLOW = (*PLANTED, "--connector", "mlp0")
SAMPLED = ("--data", "sample/embeddings", *CPU)
REPORT = ("--bootstrap", 20, *CPU)


# ------------------------------------------------------------------------------------------------------ the commands


def embed(run):
    """Every kind of corpus, what is quarantined, and shards; the weights of two encoders are real."""
    pictures = take_pictures("pictures", 24)
    Path("pictures/broken.webp").write_bytes(Path("pictures/0.webp").read_bytes()[:500])
    bad = [{"image": "broken.webp", "caption": "cut"}, {"image": "gone.webp", "caption": "none"}]
    bad += [{"image": "1.webp", "caption": "  "}, {"image": "2.webp", "caption": pictures[3]["caption"]}]
    write_csv(Path("pictures/captions.csv"), pictures + [row | {"label": "", "split": ""} for row in bad])
    weights = ("--weights", "efflite0=weights/efflite0.safetensors", "minilm_l6=weights/minilm_l6")
    real = ("--encoder", "control", "minilm_l6", "efflite0", *weights, *CPU, "--batch-size", 8)
    tiny = ("--encoder", "tiny=random:test_vit", *CPU)
    table = ("embed.py", *real, "--data", "pictures/captions.csv", "--out", "e", "--shard-rows", 16, "--allow-bad", 0.2)
    run("a table", *table, writes=["e"])
    run("all is done", *table)
    more = ("--data", "pictures", "--out", "e", "--dtype", "float32")
    run("one more encoder", "embed.py", *tiny, *more, writes=["e"])

    for k, row in enumerate(pictures):
        tree = Path("tree", ("train", "val")[k % 2], ("tabby_cat", "dog")[k % 3 % 2])
        tree.mkdir(parents=True, exist_ok=True)
        Path("texts").mkdir(exist_ok=True)
        shutil.copy(f"pictures/{k}.webp", tree)
        shutil.copy(f"pictures/{k}.webp", "texts")
        Path(f"texts/{k}.txt").write_text(row["caption"])
    Path("pictures/list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pictures))
    run("folders of classes", "embed.py", *tiny, "--data", "tree", writes=["embeddings/tree"])
    run("texts beside pictures", "embed.py", *tiny, "--data", "texts", writes=["embeddings/texts"])
    run("JSON lines", "embed.py", *tiny, "--data", "pictures/list.jsonl", writes=["embeddings/list"])
    columns = ("--image-column", "image", "--caption-column", "label")
    run("named columns", "embed.py", *tiny, "--data", "pictures/list.jsonl", *columns, "--out", "c", writes=["c"])
    shards = ("embed.py", *tiny, "--data", "texts", "--out", "shards", "--batch-size", 4, "--shard-rows", 4)
    run("shard 0/2", *shards, "--shard", "0/2")
    run("shard 1/2", *shards, "--shard", "1/2", writes=["shards"])
    asked = [{"image": row["image"], "question": "What is it?", "answer": row["label"]} for row in pictures]
    for row in asked:
        row["choices"] = json.dumps(sorted({row["answer"], "flags", "food"}))
    write_csv(Path("pictures/questions.csv"), asked)
    run("questions", "embed.py", *real, "--data", "pictures/questions.csv", "--out", "questions", writes=["questions"])
    with open("pictures/captions.csv", newline="") as file:
        write_csv(Path("pictures/fewer.csv"), list(csv.DictReader(file))[:9])
    Path("flickr/Images").mkdir(parents=True)
    for k in range(4):
        shutil.copy(f"pictures/{k}.webp", "flickr/Images")
    lines = ["image,caption", *(f'{k}.webp,"{pictures[k]["caption"]}"' for k in range(4))]
    Path("flickr/captions.txt").write_text("\n".join(lines) + "\n")
    standard = ("--data", "flickr8k:flickr", "--out", "flickr8k")
    run("a standard set", "embed.py", *tiny, *standard, writes=["flickr8k"])

    run("error: no data", "embed.py", *tiny, "--data", "nowhere.csv")
    run("error: no column", "embed.py", *tiny, "--data", "pictures/list.jsonl", "--caption-column", "nope")
    run("error: several tables", "embed.py", *tiny, "--data", "flickr8k")
    run("error: other rows", "embed.py", *tiny, "--data", "pictures/fewer.csv", "--out", "e")
    run("error: one name, two encoders", "embed.py", *CPU, *tiny[:2], "tiny=random:resnet18")
    run("error: another encoder's name", "embed.py", "--encoder", "tiny=random:resnet18", *CPU, *more)
    run("error: no such encoders", "embed.py", "--encoder", "nobody_*")
    run("error: weights of none", "embed.py", *tiny, "--weights", "other=file")
    run("error: no weights", "embed.py", "--encoder", "efflite1", "--weights", "efflite1=nowhere", *CPU, *more)
    run("error: shard", "embed.py", *tiny, "--shard", "2/2")
    run("error: shard rows", "embed.py", *tiny, "--shard-rows", 10, "--batch-size", 3)
    run("error: no encoder", "embed.py", *CPU)


def hyma(run):
    """The main job as the README has it, every depth and generator, and an encoder that joins."""
    run("the main job", "train_hyma.py", "--pairs", "all", *CPU, writes=["runs/hyma-*"])
    for depth in ("mlp0", "mlp1", "mlp2"):
        flags = ("--connector", depth, "--epochs", 3, "--out", f"runs/{depth}")
        run(f"sample, {depth}", "train_hyma.py", *SAMPLED, *flags, writes=[f"runs/{depth}"])
    flags = ("--generator", "mlp", "--width", 4, "--connector", "mlp0", "--epochs", 3, "--out", "runs/paper")
    run("the paper's generator", "train_hyma.py", *SAMPLED, *flags, writes=["runs/paper"])

    def planted(name, out, *flags, mine=SHALLOW):
        run(name, "train_hyma.py", *mine, *flags, "--out", f"runs/{out}", writes=[f"runs/{out}"])

    trained = ("--pairs", "efflite?:*", "control:mpnet")
    planted("predicted pairs", "predict", *trained, "--predict", "control:*", "--pairs-per-step", 3)
    planted("few rows", "few", "--pairs", "eff*:mpnet", "--rows", 300)
    planted("another seed", "seed", "--pairs", "eff*:mpnet", "--seed", 3, mine=PLANTED)
    planted("half precision", "bf16", "--pairs", "eff*:mpnet", "--precision", "bf16", mine=PLANTED)
    planted("before a picture's encoder", "no-control", "--pairs", "eff*:*")
    joins = ("--add-encoder", "control", "--from", "runs/no-control")
    planted("a picture's encoder joins", "control-joins", *joins, mine=CPU)
    planted("before a text encoder", "no-minilm", "--pairs", "eff*:mpnet", mine=PLANTED)
    joins = ("--add-encoder", "minilm_l6", "--from", "runs/no-minilm")
    planted("a text encoder joins", "minilm-joins", *joins, mine=CPU)
    planted("a finished run goes on", "few", "--resume", mine=())

    def refused(name, *flags):
        run(f"error: {name}", "train_hyma.py", *flags)

    refused("no such pair", *SHALLOW, "--pairs", "vit_l16:mpnet")
    refused("no such folder", "--data", "nowhere", *CPU)
    refused("too few rows", *SHALLOW, "--batch-size", 900)
    refused("not positive", *SHALLOW, "--epochs", -1)
    refused("logit scale", *SHALLOW, "--logit-scale", 500)
    refused("width of factored", *SHALLOW, "--width", 4)
    refused("joins no run", *SHALLOW, "--add-encoder", "control")
    refused("joins twice", *CPU, "--add-encoder", "efflite0", "--from", "runs/no-control", "--out", "runs/z")
    refused("joins the paper's", *CPU, "--add-encoder", "efflite0", "--from", "runs/paper", "--out", "runs/z")
    refused("no part to predict by", *SHALLOW, "--pairs", "eff*:mpnet", "--predict", "control:mpnet")
    refused("a run is there", *SHALLOW, "--out", "runs/few")
    refused("resumed otherwise", "--resume", "--out", "runs/few", "--lr", 1)
    refused("nothing to resume", "--resume", "--out", "runs/z")
    refused("not a number", *SHALLOW, "--lr", 1e30, "--warmup-steps", 0, "--clip-norm", 1e9, "--out", "runs/nan")
    refused("device", *SHALLOW, "--device", "abacus")
    refused("no such depth", *SHALLOW, "--connector", "mlp9")


def grid(run):
    """Grids of several seeds, budgets, halving and the closed forms."""
    flags = ("--connector", "mlp0", "--epochs", 2, "--seeds", 0, 1, "--out", "runs/grid")
    run("sample, two seeds", "train_grid.py", *SAMPLED, *flags, writes=["runs/grid-s0", "runs/grid-s1"])
    flags = ("--connector", "mlp0", "--epochs", 3, "--halving", "--out", "runs/halving")
    run("sample, halving", "train_grid.py", *SAMPLED, *flags, writes=["runs/halving"])
    flags = ("--closed-form", "ridge", "--out", "runs/ridge")
    run("sample, ridge", "train_grid.py", *SAMPLED, *flags, writes=["runs/ridge"])
    flags = ("--closed-form", "ridge", "--pairs", "efflite0:minilm_l6", "control:minilm_l6", "--out", "runs/two")
    run("sample, two pairs", "train_grid.py", *SAMPLED, *flags, writes=["runs/two"])
    # without the control, whose random weights are not the sample's on every processor
    flags = ("--closed-form", "ridge", "--pairs", "efflite0:minilm_l6", "--out", "runs/one")
    run("sample, one pair", "train_grid.py", *SAMPLED, *flags, writes=["runs/one"])

    def planted(name, out, *flags, mine=SHALLOW, writes=None):
        writes = [f"runs/{out}"] if writes is None else writes
        run(name, "train_grid.py", *mine, *flags, "--out", f"runs/{out}", writes=writes)

    closed = ("--data", "planted", *CPU, "--pairs", "*:minilm_l6", "--closed-form")
    planted("whitened", "whitened", "whitened", mine=closed)
    planted("procrustes", "procrustes", "procrustes", mine=closed)
    planted("another run's budget", "budget", "--budget-of", "runs/seed", "--pairs", "eff*:mpnet", mine=PLANTED)
    planted("another run's connectors", "from", "--from", "runs/seed", "--pairs", "eff*:mpnet", mine=PLANTED)
    planted("a pair at a time", "passes", "--pairs-per-pass", 1, "--pairs", "eff*:mpnet")
    planted("half precision", "grid-bf16", "--precision", "bf16", "--pairs", "efflite0:mpnet", "--seeds", 2)
    planted("two hidden layers", "deep", "--connector", "mlp2", "--pairs", "control:minilm_l6", "--rows", 300)
    planted("a finished run goes on", "grid", "--resume", mine=(), writes=["runs/grid-s0"])

    def refused(name, *flags):
        run(f"error: {name}", "train_grid.py", *flags)

    refused("no such pair", *SHALLOW, "--pairs", "vit_l16:mpnet")
    refused("a seed twice", *SHALLOW, "--seeds", 1, 1)
    refused("halving in passes", *SHALLOW, "--halving", "--pairs-per-pass", 2)
    refused("halving in few steps", *SHALLOW, "--halving", "--epochs", 1)
    refused("a budget twice", *SHALLOW, "--halving", "--budget-of", "runs/seed")
    refused("no such budget", *SHALLOW, "--budget-of", "nowhere")
    refused("a closed form from a run", *SHALLOW, "--closed-form", "ridge", "--from", "runs/seed")
    refused("connectors of another depth", *SHALLOW, "--from", "runs/seed", "--pairs", "eff*:mpnet", "--out", "runs/z")
    refused("another script's run", "--resume", "--out", "runs/seed")
    refused("a run is there", *SHALLOW, "--out", "runs/passes")
    refused("not a number", *SHALLOW, "--lr", 1e30, "--warmup-steps", 0, "--clip-norm", 1e9, "--out", "runs/nans")


def evaluate(run):
    """Reports on the sample's runs, on other tasks, and on connectors alone."""

    def report(name, out, *flags, writes=()):
        run(name, "evaluate.py", *flags, *REPORT, "--out", out, writes=[out, *writes])

    os.utime("runs/passes/ledger.json", (4e9, 4e9))  # the newest, whatever was made before
    report("the newest run", "report", "--selector-rows", 0)
    several = ("runs/mlp0", "runs/paper", "runs/halving", "runs/ridge", "runs/grid-s0", "runs/grid-s1")
    report("several runs", "report-several", *several, "--selector-rows", 300)
    flags = ("runs/from", "--oracle", "runs/seed", "--selector-rows", 0)
    report("a named oracle", "report-oracle", *flags)
    weights = ("--weights", "minilm_l6=weights/minilm_l6", "--selector-rows", 0)
    tasks = ("--task", "own=e", "--task", "asked=questions")
    report("other tasks", "report-tasks", "runs/one", *tasks, *weights, writes=["e/prompts", "questions/prompts"])
    shutil.copytree("runs/two/connectors", "published", ignore=shutil.ignore_patterns("*.json"))
    report("connectors alone", "report-published", "published", "--task", "own=e", *weights)
    Path("templates.txt").write_text("a drawing of a {}\na {}, clip art\n")
    templates = ("runs/two", "--templates", "templates.txt", *weights)
    report("own templates", "report-templates", *templates, writes=["sample/embeddings/prompts"])

    def refused(name, *flags):
        run(f"error: {name}", "evaluate.py", *flags, *CPU)

    refused("no run", "nowhere")
    refused("no resample", "runs/two", "--bootstrap", 0)
    refused("few selector rows", "runs/two", "--selector-rows", 10)
    refused("no folder of a task", "runs/two", "--task", "coco")
    refused("a task twice", "runs/two", "--task", "a=b", "--task", "a=c")
    refused("a task without the encoder", "runs/two", "--task", "a=shards")
    refused("a demo of runs", "runs/two", "--demo")
    refused("connectors without a task", "published")
    refused("runs of other data", "runs/two", "runs/from")
    refused("oracles of two methods", "runs/mlp0", "--oracle", "runs/grid-s0", "runs/ridge")
    refused("other pairs", "runs/mlp0", "runs/two")
    refused("a folder that is not the runs'", "runs/two", "--data", "planted")
    refused("no templates", "runs/two", "--templates", "nowhere.txt")
    refused("no run of its own", "e")


def api(run):
    """What others import from vlm: the names, the stitched model with real weights, an embedding file's items."""
    import timm

    import vlm

    run.note("public names", {name: hasattr(vlm, name) for name in PUBLIC} | {"HIDDEN_DIM": vlm.HIDDEN_DIM})
    run.note("encoders", {name: list(encoder) for name, encoder in vlm.ENCODERS.items()})
    layers = {depth: vlm.init_modality_connector(24, [32] * depth, 40).state_dict() for depth in (0, 1, 2)}
    run.note(
        "connector keys", {f"mlp{depth}": {k: list(t.shape) for k, t in layers[depth].items()} for depth in layers}
    )
    run.note("connector name", vlm.connector_name("a", 1, "b"))

    Path("hub").mkdir()
    Path("hub/model.safetensors").symlink_to(Path("weights/efflite0.safetensors").resolve())
    found = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").to_dict()
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": found}
    Path("hub/config.json").write_text(json.dumps(config))
    path = "runs/mlp1/connectors/efflite0_mlp1_minilm_l6.pt"
    model = vlm.get_vlm_from_checkpoint(path, "cpu", image_encoder="local-dir:hub", text_encoder="weights/minilm_l6")
    rows = sample_captions()[:3]
    pixels = torch.stack([model.transform(vlm.open_image(SAMPLE / row["image"])) for row in rows])
    run.note("pixels", tensor(pixels))
    run.note("pictures", tensor(model.encode_image(pixels)))
    run.note("texts", tensor(model.encode_text([row["caption"] for row in rows])))
    run.note("one text", tensor(model.encode_text("a dog")))
    dataset = vlm.EmbeddingDataset("sample/embeddings/mpnet.pt")
    run.note("embedding file", {"rows": len(dataset), "dim": dataset.embed_dim, "item": tensor(dataset[3])})
    image, hidden_layers, text, state = vlm.read_connector(path)
    run.note("read connector", [image, hidden_layers, text, {name: tensor(t) for name, t in state.items()}])


GROUPS = {"embed": embed, "hyma": hyma, "grid": grid, "evaluate": evaluate, "api": api}
NEEDS = {"grid": ["hyma"], "evaluate": ["embed", "hyma", "grid"], "api": ["hyma"]}


def take_pictures(folder, count):
    """Real pictures as FOLDER/<k>.webp. Returns their rows."""
    Path(folder).mkdir()
    rows = [row for row in sample_captions() if row["label"]][::100][:count]
    for k, row in enumerate(rows):
        shutil.copy(SAMPLE / row["image"], f"{folder}/{k}.webp")
    return [row | {"image": f"{k}.webp", "split": ""} for k, row in enumerate(rows)]


# ------------------------------------------------------------------------------------------------------ the recorder


class Recorder:
    """Runs groups in `folder`, each once, and after those it needs. found: {group: {command's name: what it did}}."""

    def __init__(self, folder):
        self.folder, self.found = Path(folder), {}
        os.environ.pop("COLUMNS", None)  # progress bars are cut to it
        # a copy, as evaluate.py adds prompts to the embeddings that it reads
        shutil.copytree(SAMPLE / "embeddings", self.folder / "sample" / "embeddings")
        # no link, as a report shows no picture through one
        shutil.copytree(SAMPLE / "images", self.folder / "sample" / "images")
        (self.folder / "planted").mkdir()
        write_planted(self.folder / "planted")
        (self.folder / "weights").symlink_to(next(iter(real_weights().values())).parent)

    def group(self, name):
        for needed in [*NEEDS.get(name, []), name]:
            if needed not in self.found:
                self.noted = self.found[needed] = {}
                with contextlib.chdir(self.folder):
                    GROUPS[needed](self)
        return self.found[name]

    def __call__(self, name, script, *arguments, writes=()):
        """One command. writes: the folders it makes or changes, as patterns."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code, last = run_here(script, *arguments)
        lines = (err.getvalue() + last).replace("\r", "\n").split("\n")
        said = {"command": masked(" ".join(map(str, (script, *arguments)))), "code": code}
        # a bar pads its line with spaces to the longest it has been, which depends on the seconds it showed
        last = next((line.rstrip() for line in reversed(lines) if line.strip()), "")
        said |= {"out": masked(out.getvalue()).splitlines(), "err": masked(last)}
        folders = [folder for pattern in writes for folder in sorted(Path().glob(pattern))]
        self.note(name, said | {"wrote": {masked(str(folder)): contents(folder) for folder in folders}})

    def note(self, name, value):
        assert name not in self.noted, name
        self.noted[name] = json.loads(json.dumps(value))


def masked(text):
    """Text without what differs between two runs of the same command: places, dates, seconds, progress bars."""
    for place in (str(ROOT), os.path.relpath(ROOT)):
        text = text.replace(place, "REPOSITORY")
    text = re.sub(r"\b\d{8}-\d{6}\b", "DATE", text)
    text = re.sub(r"(?:\.\./?)+REPOSITORY", "REPOSITORY", text)  # from a folder that lies elsewhere
    text = re.sub(r"\bin [\d,.]+ s\b", "in SECONDS s", text)
    text = re.sub(r"\|[^|]*\| (\d+/\d+) \[[^,\]]*, *[^,\]]*", r"|BAR| \1 [TIME", text)
    # the table of evaluate.py: regret (its interval), Spearman, TFLOP, seconds
    return re.sub(r"(\d\) +(?:-?[\d.]+|nan) +[\d.,e+–-]+) +[\d.,–]+", r"\1 SECONDS", text)


def contents(folder):
    """{file: what it holds} of a folder that a command wrote."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    found = {str(path.relative_to(folder)): content(path) for path in paths}
    if "results.json" in found:  # a report lists every file; other folders may get more
        found["all files"] = [str(path.relative_to(folder)) for path in paths]
    return found


def content(path):
    if path.name.startswith("checkpoint."):
        return "is there"  # it holds seconds
    match path.suffix:
        case ".pt":
            value = torch.load(path, weights_only=True)
            return {"bytes": sha256(path.read_bytes())} | (
                {name: tensor(t) for name, t in value.items()} if isinstance(value, dict) else tensor(value)
            )
        case ".json":
            return steady(json.loads(path.read_text()))
        case ".jsonl":
            return [steady(json.loads(line)) for line in path.read_text().splitlines()]
        case ".csv":
            return {"table": table(path)}
        case ".html" | ".png" | ".jpg":
            return "is there"  # drawn from the tables beside it
    return {"bytes": sha256(path.read_bytes())}


def steady(value):
    """JSON without what differs between two runs, nor what a report says twice (`methods` is selectors.csv, `sentences`
    the answer)."""
    if isinstance(value, list):
        return [steady(item) for item in value]
    if isinstance(value, dict):
        left_out = {
            "seconds",
            "peak_bytes",
            "versions",
            "commit",
            "started",
            "made",
            "methods",
            "checksums",
            "sentences",
        }
        left_out |= {"device"} if "commit" in value else set()
        return {masked(key): steady(item) for key, item in value.items() if key not in left_out}
    return masked(value) if isinstance(value, str) else value


def table(path):
    """The lines of a CSV without its column of seconds."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = io.StringIO()
    columns = [column for column in rows[0] if column != "seconds"]
    writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue().splitlines()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tensor(value):
    """A tensor by its hash, with enough beside it to tell on another machine whether it is about the same."""
    value = value.detach().contiguous()
    digest = sha256(value.view(-1).view(torch.uint8).numpy().tobytes())
    first = [round(x, 4) for x in value.flatten()[:4].tolist()]
    return {"sha256": digest, "shape": list(value.shape), "dtype": str(value.dtype), "first": first}


def machine():
    """What the last bits of a result depend on."""
    cpu = dict(re.findall(r"(.*?)\s*: (.*)", Path("/proc/cpuinfo").read_text()))
    # a name alone may stand for several generations
    about = {name: cpu.get(name) for name in ("model name", "cpu family", "model", "stepping")}
    about |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    about |= {"python": platform.python_version()}
    return about | {package: importlib.metadata.version(package) for package in PACKAGES}


def write(value, path):
    """JSON of one line a value, and of one line a list of numbers."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[-+\d.eE,\s]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- the comparison

# Of other bits: what may differ as a whole, and how far scores may be apart, of 1 and of 100.
FREE = {"rank", "epoch", "regularisation", "refinement_steps", "refinement_share", "bytes", "sha256"}
NEAR, NEAR_PERCENT = 0.05, 5.0
NAMES = re.compile(r"efflite\d|control|minilm_l6|mpnet")


def differences(expected, found, exact, where=""):
    """What of `expected` is not so in `found`, a line each. Keys and columns that only `found` has are no difference.

    exact: every value must be equal. Otherwise hashes, ranks and the wording around them are let be, scores may be a
    little apart, and numbers in text count for nothing.
    """
    key = where.rpartition(" / ")[2]
    if not exact and key in FREE:
        return []
    if key == "table":
        expected, found = tables(expected, found, exact)
    if isinstance(expected, dict) and isinstance(found, dict):
        needed = expected if exact else expected.keys() - FREE  # whose share is there tells which state was the best
        lost = [f"{where} / {name}: is missing" for name in expected if name in needed and name not in found]
        both = [(f"{where} / {name}", value, found[name]) for name, value in expected.items() if name in found]
        return lost + [line for place, old, new in both for line in differences(old, new, exact, place)]
    if isinstance(expected, list) and isinstance(found, list):
        if not exact and all(isinstance(item, str) for item in expected + found):
            expected, found = sorted(map(loose, expected)), sorted(map(loose, found))
        lines = [] if len(expected) == len(found) else [f"{where}: {len(expected)} expected, {len(found)} found"]
        for k, (old, new) in enumerate(zip(expected, found)):
            lines += differences(old, new, exact, f"{where}[{k}]")
        return lines
    if not exact and key.endswith("median_rank") and abs(expected - found) <= max(2, NEAR * expected):
        return []  # a few similarities that are nearly equal change places
    return [] if same(expected, found, exact) else [f"{where}: expected {expected!r}, found {found!r}"]


def same(expected, found, exact):
    if isinstance(expected, float) and isinstance(found, float):
        if exact:
            return expected == found or (math.isnan(expected) and math.isnan(found))
        return abs(expected - found) <= NEAR * max(1, abs(expected))
    if isinstance(expected, str) and isinstance(found, str) and not exact:
        return loose(expected) == loose(found)
    return type(expected) is type(found) and expected == found


def loose(line):
    """A line of text without numbers, hashes, brackets, and the encoders that won; of a report's answer only the first word."""
    line = re.sub(r"^[┌│└]", " ", line)
    if line.startswith("Stitch "):
        return "Stitch"
    line = re.sub(r"\b[0-9a-f]{16,}\b", "HASH", line).replace("'", "")  # argparse's quotes depend on Python
    line = re.sub(r"[-−]?\d[\d,.]*(e-?\d+)?|\bnan\b|–", "#", NAMES.sub("@", line))
    return " ".join(line.split())


def tables(expected, found, exact):
    """Two CSVs as {row: {column: value}}: in their order, or, if their bits differ, by the pair and with scores alone."""

    def rows(lines):
        found = {}
        for k, row in enumerate(csv.DictReader(lines)):
            pair = [row[name] for name in ("task", "image", "text") if name in row]
            found[str(k) if exact or not pair else " ".join(pair)] = row if exact else scores(row)
        return {"columns": dict.fromkeys(next(csv.reader(lines)), "")} | found

    def scores(row):
        kept = {}
        for name, value in row.items():
            if re.match(r"val_|expected_recall", name):
                kept[name] = float(value)
            elif re.match(r"score of |true_score", name):
                kept[name] = float(value) * NEAR / NEAR_PERCENT
        return kept

    return rows(expected), rows(found)


def main():
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder).resolve())
        for name in GROUPS:
            recorder.group(name)
            print(f"{name}: {len(recorder.found[name])} recorded", file=sys.stderr)
    write({"machine": machine(), "groups": recorder.found}, Path(sys.argv[1]) if sys.argv[1:] else FILE)


if __name__ == "__main__":
    main()
