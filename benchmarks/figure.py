"""Draws benchmarks/tenfold.png from benchmarks/tenfold.json: what a search costs, and what its connector scores.

    python benchmarks/figure.py

A point is a search with one random seed, a shape is a connector depth. Horizontal: its FLOPs, as a share of grid search's
mean. Vertical: the score on the emoji of the connector that it chose, minus the true score of the best pair.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
MARKERS = {"mlp0": "o", "mlp1": "s", "mlp2": "^"}
# Okabe and Ito's colours, which the colour-blind can tell apart.
HYPERNETWORK = "#0072B2"
GRID = "#D55E00"


def main():
    results = json.loads((HERE / "tenfold.json").read_text())
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for connector, marker in MARKERS.items():
        result = results[connector]
        grid_share = np.array(result["grid_flops"]) / np.mean(result["grid_flops"])
        style = {"marker": marker, "s": 60, "alpha": 0.7}
        axes.scatter(result["cost_ratio_flops"], result["delivered"], color=HYPERNETWORK, **style)
        axes.scatter(grid_share, result["delivered_noise"], color=GRID, **style)
        axes.scatter([], [], color="grey", label=connector, **style)

    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0.1, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("a tenth of grid search", (0.1, -2.6), xytext=(4, 0), textcoords="offset points", fontsize=9)
    axes.annotate("train_hyma.py", (0.104, 3.0), color=HYPERNETWORK, fontsize=11)
    axes.annotate("grid search", (0.93, 0.25), color=GRID, fontsize=11, ha="right")
    axes.set_xscale("log")
    axes.set_xlim(0.04, 1.3)
    axes.set_ylim(-2.9, 4.2)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["5 %", "10 %", "20 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlabel("FLOPs, as a share of grid search's")
    axes.set_ylabel("R@10 of the chosen connector,\npoints against the best pair")
    axes.legend(title="connector", loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "tenfold.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
