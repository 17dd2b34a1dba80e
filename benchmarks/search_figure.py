"""Draws benchmarks/search.png from benchmarks/search.json: what a search costs over pairs and over rows, part by part.

    python benchmarks/search_figure.py

Vertical: CPU seconds of `train_hyma.py` with mlp1, each part on top of the others. On the left 20,000 rows, on the right
27 pairs, in float32 unless a bar says otherwise.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PAIRS, ROWS = 27, 20_000  # of the panel in which the other changes
# {part in the JSON: colour}, from the bottom of a bar on; Okabe and Ito's colours, which the colour-blind can tell apart.
PARTS = {
    "open": "#999999",
    "start": "#E69F00",
    "cross-validation": "#F0E442",
    "steps": "#0072B2",
    "validation": "#009E73",
    "refinement": "#CC79A7",
}


def main():
    results = json.loads((HERE / "search.json").read_text())
    runs = []
    for part in ("pairs", "rows", "full"):
        for name, run in results.get(part, {}).items():
            runs.append(run | {"note": "\nbfloat16" if "bf16" in name else ""})
    figure, (by_pairs, by_rows) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    draw(by_pairs, "pairs", [run for run in runs if run["rows"] == ROWS])
    by_pairs.set_title(f"{ROWS:,} rows", fontsize=10)
    draw(by_rows, "rows", [run for run in runs if run["pairs"] == PAIRS])
    by_rows.set_title(f"{PAIRS} pairs", fontsize=10)
    by_pairs.set_ylabel("CPU seconds of a search")
    handles, labels = by_rows.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.savefig(HERE / "search.png", dpi=110, metadata={"Software": None})


def draw(axes, key, runs):
    """A bar for each run, in the order of its `key`."""
    runs = sorted(runs, key=lambda run: run[key])
    bottoms = [0.0] * len(runs)
    for part, colour in PARTS.items():
        heights = [run["parts"].get(part, {"cpu_seconds": 0})["cpu_seconds"] for run in runs]
        axes.bar(range(len(runs)), heights, 0.6, bottoms, color=colour, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    for place, total in enumerate(bottoms):
        axes.annotate(f"{total:.0f}", (place, total), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(runs)), [f"{run[key]:,}{run['note']}" for run in runs])
    axes.set_xlabel(key)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
