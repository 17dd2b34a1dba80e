"""The stages whose commands are disturbed, and the bench on which that is done."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from fault_injection.inputs import make_inputs
from fault_injection.processes import Runner

SHORT = ("--connector", "mlp0", "--epochs", 2, "--batch-size", 32, "--warmup-steps", 2, "--device", "cpu")


class Stage(NamedTuple):
    """Commands that are typed one after the other, and the folder of their result."""

    name: str
    commands: list
    result: str


class Bench(NamedTuple):
    """What every part of the long run needs."""

    runner: Runner
    inputs: Path
    work: Path  # for folders of cases
    stages: dict[str, Stage]
    seed: int
    workers: int  # cases at a time

    def fresh_folder(self, name):
        """An empty folder for a case."""
        folder = self.work / "cases" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def open_bench(work, seed=0, workers=2):
    """Makes the inputs, each once, in children: this process computes nothing before it forks."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the server imports the hub's client
    runner = Runner()
    inputs = work / "inputs"
    stages = make_stages(inputs)
    if not (inputs / "runs" / "grid" / "ledger.json").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        if runner.exit_status(runner.fork(make_inputs, (str(inputs),)), seconds=None) != 0:
            raise RuntimeError("the inputs could not be made")
        for name in ("hyma", "halving", "grid"):
            done = runner.run(with_out(stages[name].commands[0], inputs / "runs" / name), inputs)
            if done.code != 0:
                raise RuntimeError(f"{name}: {done.err}")
    return Bench(runner, inputs, work, stages, seed, workers)


def make_stages(inputs):
    """{name: Stage}. inputs: the folder that `open_bench` fills."""
    data = ("--data", inputs / "embeddings")
    pictures = ("--data", inputs / "pictures" / "captions.csv")
    encoders = ("--encoder", "tiny=random:test_vit", f"words={inputs / 'words'}")
    small_shards = ("--batch-size", 4, "--shard-rows", 8, "--workers", 1)
    embed = ["embed.py", *encoders, *pictures, *small_shards, "--device", "cpu", "--out", "e"]
    hyma = ["train_hyma.py", *data, *SHORT, "--rank", 8, "--out", "r"]
    grid = ["train_grid.py", *data, *SHORT, "--out", "r"]
    closed = ["train_grid.py", *data, "--closed-form", "ridge", "--device", "cpu", "--out", "r"]
    runs = [inputs / "runs" / name for name in ("hyma", "halving", "grid")]
    evaluate = ["evaluate.py", *runs, "--bootstrap", 20, "--device", "cpu", "--out", "report"]
    stages = [
        Stage("embed", [embed], "e"),
        Stage("hyma", [hyma], "r"),
        Stage("grid", [[*grid, "--pairs-per-pass", 2]], "r"),
        Stage("halving", [[*grid, "--halving"]], "r"),
        Stage("closed", [closed], "r"),
        Stage("evaluate", [evaluate], "report"),
    ]
    return {stage.name: stage for stage in stages}


def with_out(command, out):
    """A stage's command with another --out."""
    place = command.index("--out") + 1
    return [*command[:place], out, *command[place + 1 :]]
