"""Draws benchmarks/ladder.png from benchmarks/ladder.json: what each method delivers and costs as the corpus grows.

    python benchmarks/ladder_figure.py

Horizontal: the rows of a rung. Vertical, from the left: R@10 and R@1 of the connector that a method delivers for the pair
that it chooses, minus those of grid search's best pair; and its FLOPs, as a share of grid search's. The mean over seeds.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
CONNECTOR = "mlp1"
# {method in the JSON: (name, colour, marker)}, Okabe and Ito's colours, which the colour-blind can tell apart.
METHODS = {
    "hyma": ("train_hyma.py", "#0072B2", "o"),
    "grid": ("grid search, another seed", "#000000", "s"),
    "equal FLOPs": ("grid search, equal FLOPs", "#D55E00", "^"),
    "halving": ("successive halving", "#009E73", "D"),
    "mordal": ("Mordal's search", "#CC79A7", "v"),
    "whitened": ("closed form, whitened", "#56B4E9", "P"),
    "unicon": ("closed form, UniCon", "#E69F00", "X"),
}
PANELS = {
    "delivered R@10": "R@10 delivered, points\nagainst grid search's best pair",
    "delivered R@1": "R@1 delivered, points\nagainst grid search's best pair",
    "flops": "FLOPs, as a share of grid search's",
}


def main():
    results = json.loads((HERE / "ladder.json").read_text())
    figure, all_axes = plt.subplots(1, len(PANELS), figsize=(11, 3.7), layout="constrained")
    for axes, (key, label) in zip(all_axes, PANELS.items()):
        for method, (name, colour, marker) in METHODS.items():
            rows, values = along_the_ladder(results, method, key)
            on_top = 3 if method == "hyma" else 2
            axes.plot(rows, values, color=colour, marker=marker, markersize=6, lw=1.3, label=name, zorder=on_top)
        axes.set_ylabel(label)
        axes.set_xlabel("rows to train on and to choose by")
        axes.set_xscale("log")
        rungs = along_the_ladder(results, "hyma", key)[0]
        axes.set_xticks(rungs, [f"{rung:,}" for rung in rungs])
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "flops":
            axes.set_yscale("log")
            axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["2 %", "5 %", "10 %", "20 %", "50 %", "100 %"])
            axes.minorticks_off()
            axes.axhline(0.1, color="black", linewidth=0.8, linestyle=":")
        else:
            axes.axhline(0, color="black", linewidth=0.8)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(HERE / "ladder.png", dpi=110, metadata={"Software": None})


def along_the_ladder(results, method, key):
    """(the rungs that have the method, its number on each), from the smallest rung on."""
    values = {}
    for name, result in results.items():
        rung, _, connector = name.partition(" ")
        number = result["summary"].get(method, {}).get(key)
        if connector == CONNECTOR and number is not None:
            values[int(rung)] = number
    rungs = sorted(values)
    return rungs, [values[rung] for rung in rungs]


if __name__ == "__main__":
    main()
