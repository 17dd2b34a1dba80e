"""What several test files use: places, flags of quick runs, readers of what the scripts write, small embedding folders."""

import argparse
import csv
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import vlm
from hyma.embeddings import hash_keys
from hyma.files import save_tensors, sha256_file, write_json, write_jsonl
from hyma.tasks import open_tasks

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample"
CPU = torch.device("cpu")

# Flags of a run that takes seconds, and of an encoder that needs no weights.
QUICK = ("--connector", "mlp0", "--epochs", "3", "--batch-size", "128", "--warmup-steps", "3", "--device", "cpu")
TINY = ("--encoder", "tiny=random:test_vit", "--device", "cpu")


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def sample_captions():
    """The rows of the sample's table."""
    return read_csv(SAMPLE / "captions.csv")


# ---------------------------------------------------------------------------------------------------------- run folders


def read_ranking(folder):
    """The rows of a run's ranking.csv, best first."""
    return read_csv(folder / "ranking.csv")


def read_ledger(folder):
    return vlm.read_json(folder / "ledger.json")


def read_connectors(folder):
    """{file name: state dict} of a run's connectors."""
    paths = sorted((folder / "connectors").glob("*.pt"))
    return {path.name: torch.load(path, weights_only=True) for path in paths}


def count_lines(path):
    """Of a file that another process writes; none before it is there."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_when(process, condition, seconds=120):
    """Kills a process as soon as the condition holds, or after that many seconds."""
    until = time.time() + seconds
    while process.poll() is None and time.time() < until and not condition():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def recall10(six):
    """The mean R@10 of both directions, of six recalls."""
    return (six[2] + six[5]) / 2


# ---------------------------------------------------------------------------------------------------- embedding folders


def unit_vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_embedding_folder(folder, rows, protocol=None, **vectors):
    """A sealed embedding folder with these rows, and float16 unit vectors of registered encoders."""
    folder.mkdir()
    rows = [{"key": f"{k}", "image": f"{k}.png", "caption": f"caption {k}"} | row for k, row in enumerate(rows)]
    keys_sha256 = hash_keys(rows)
    encoders = {}
    for name, tensor in vectors.items():
        path = folder / f"{name}.pt"
        save_tensors(F.normalize(tensor.float(), dim=1).half(), path)
        encoders[name] = {
            "kind": vlm.ENCODERS[name].kind,
            "spec": vlm.ENCODERS[name].spec,
            "dim": tensor.shape[1],
            "rows": len(rows),
            "keys_sha256": keys_sha256,
            "file_sha256": sha256_file(path),
        }
    manifest = {
        "format_version": 1,
        "dataset": folder.name,
        "rows": len(rows),
        "keys_sha256": keys_sha256,
        "encoders": encoders,
    }
    if protocol:
        manifest["protocol"] = protocol
    write_jsonl(folder / "rows.jsonl", rows)
    write_json(folder / "manifest.json", manifest)
    return folder


class Rows:
    """As much of an embedding folder as splits and retrieval need."""

    folder = "here"

    def __init__(self, rows):
        self.rows = rows
        self.row_count = len(rows)


# ---------------------------------------------------------------------------------------------------------------- tasks

TASK_FLAGS = argparse.Namespace(templates="1", device="cpu")


def tasks_of(folder, flags=TASK_FLAGS, run_seed=None):
    """{kind: task} of an embedding folder."""
    return {task.kind: task for task in open_tasks(None, folder, flags, run_seed)}
