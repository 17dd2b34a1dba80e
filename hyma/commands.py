"""The commands of an installed Hyma: hyma-search is `python search.py`, and so on."""

import runpy


def run(script):
    """Runs a flat script as `python` does."""
    runpy.run_module(script, run_name="__main__", alter_sys=True)


def embed():
    run("embed")


def train():
    run("train_hyma")


def evaluate():
    run("evaluate")


def search():
    run("search")
