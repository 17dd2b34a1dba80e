"""Known faults of run folders, embedding folders, links, cards and flags. Each function gives a problem or None."""

import contextlib
import os
import stat

import torch

import vlm
from fault_injection.faults_of_data import refused
from fault_injection.inputs import PICTURES, make_embeddings
from fault_injection.results import snapshot
from fault_injection.stages import SHORT, with_out
from hyma.files import read_jsonl, write_json
from vlm import BadInput

CLOSED_FORM = ["train_grid.py", "--data", "data", "--closed-form", "ridge", "--out", "r", "--device", "cpu"]
CONNECTOR = "i1_mlp0_t1.pt"

# ---------------------------------------------------------------------------------------------------------- run folders


def no_folder_to_write(bench, folder):
    (folder / "file").write_text("x")
    command = with_out(bench.stages["hyma"].commands[0], "file/r")
    return refused(bench.runner.run(command, folder), "file")


def odd_run_folders(bench, folder):
    """--out at the root, and at the folder itself, which holds other files."""
    (folder / "mine.txt").write_text("x")
    for out in ("/", "."):
        command = with_out(bench.stages["hyma"].commands[0], out)
        if problem := refused(bench.runner.run(command, folder), "--out"):
            return f"--out {out}: {problem}"
    return None


def permissions(bench, folder):
    """Files have the mode that the umask leaves, and not that of a temporary file."""
    umask = os.umask(0o022)
    os.umask(umask)
    bench.runner.run(bench.stages["closed"].commands[0], folder)
    for path in (folder / "r").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and mode != 0o666 & ~umask:
            return f"{path.name} has mode {mode:o}"
    return None


def two_seeds(bench, folder):
    """The same seed gives the same bytes, another seed other bytes."""
    command = bench.stages["hyma"].commands[0]
    connectors = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        bench.runner.run([*with_out(command, name), "--seed", seed], folder)
        connectors.append((folder / name / "connectors" / CONNECTOR).read_bytes())
    one, same, other = connectors
    return None if one == same != other else "seeds do not decide the bytes"


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


# ---------------------------------------------------------------------------------------------- a stranger's embeddings


def planted(bench):
    return read_jsonl(bench.inputs / "embeddings" / "rows.jsonl")


def expanded_view(bench, folder):
    """An embedding file of a few bytes that says it has 10^10 rows: refused at once."""
    data = folder / "data"
    data.mkdir()
    for name in ("vit_s16", "minilm"):
        torch.save(torch.full((1, 1), 0.05).half().expand(10**10, 384), data / f"{name}.pt")
    command = ["train_hyma.py", "--data", "data", *SHORT, "--out", "r"]
    return refused(bench.runner.run(command, folder, seconds=20), ".pt")


def picture_elsewhere(bench, folder):
    """A stranger's folder whose rows name pictures outside it: the report shows none of them."""
    rows = planted(bench)
    for k, row in enumerate(rows):
        secret = bench.inputs / "pictures" / f"{k % PICTURES}.png"
        spellings = (f"{secret}", f"/..{'/..' * 12}{secret}", f"..{'/..' * 12}{secret}")
        row["image"] = spellings[k % 3]
    make_embeddings(folder / "data", rows)
    bench.runner.run(CLOSED_FORM, folder)
    report = ("--bootstrap", 20, "--selector-rows", 0, "--device", "cpu", "--out", "report")
    done = bench.runner.run(["evaluate.py", "r", *report], folder)
    if done.code != 0:
        return refused(done)
    shown = list((folder / "report").glob("thumbnails/*"))
    return f"{len(shown)} pictures outside the folder are in the report" if shown else None


def prompts_without_encoder(bench, folder):
    """Labels ask for prompts, and their text encoder is not to be had: one line before the scoring, or a warning."""
    rows = planted(bench)
    for k, row in enumerate(rows):
        row["label"] = "ab"[k % 2]
    make_embeddings(folder / "data", rows)
    bench.runner.run(CLOSED_FORM, folder)
    done = bench.runner.run(["evaluate.py", "r", "--bootstrap", 20, "--out", "report", "--device", "cpu"], folder)
    if done.code == 0:
        return None
    return f"the report is lost after the scoring has begun: {done.last[:160]}" if "connector/s" in done.err else None


# ------------------------------------------------------------------------------------------------------ links and cards


def linked_lock(bench, folder):
    """.lock as a link and as a pipe: neither followed nor waited for."""
    target = folder / "target"
    target.write_text("mine")
    link, pipe = folder / "link", folder / "pipe"
    link.mkdir()
    pipe.mkdir()
    (link / ".lock").symlink_to(target)
    os.mkfifo(pipe / ".lock")
    for out in (link, pipe):
        done = bench.runner.run(with_out(bench.stages["closed"].commands[0], out), folder, seconds=20)
        if problem := refused(done, ".lock"):
            return f"{out.name}: {problem}"
    return None if target.read_text() == "mine" else "the link was followed"


def linked_folders(bench, folder):
    """A stranger's embedding folder with .shards or prompts as links: nothing is written behind them."""
    for name in (".shards", "prompts"):
        out, elsewhere = folder / f"e{name}", folder / f"elsewhere{name}"
        elsewhere.mkdir()
        out.mkdir()
        (out / name).symlink_to(elsewhere)
        bench.runner.run(with_out(bench.stages["embed"].commands[0], out), folder)
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
