"""The report's figures and page, drawn from the records that `evaluate.py` saved, and from nothing else.

    python -m hyma.report report/          # draws the figures and report.html of a folder again

The page is the template `report.html` beside this file. It shows every figure that results.json lists. To add a figure,
write two functions: in `hyma.records` one that returns its FigureData, called in `list_figures` there; here one that
draws it, with a line in `DRAW`.
"""

import argparse
import base64
import csv
import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from hyma.embeddings import unique
from hyma.files import atomic_file, run_script, write_text
from hyma.metrics import pair_name
from vlm import BadInput, read_json

# Okabe and Ito's colours, which the colour-blind can tell apart, with markers that survive a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]
GREY = "#c4c4c4"


class Records:
    """The saved records of a report. Raises BadInput for a folder that has none."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "results.json").is_file():
            raise BadInput(f"{folder}: holds no report (no results.json); make one with evaluate.py")
        self.results = read_json(self.folder / "results.json")
        if "page" not in self.results:
            raise BadInput(f"{folder}: was made by an earlier version of this program; run evaluate.py again")
        self.page = self.results["page"]
        self.method_rows = self.results["methods"]  # of selectors.csv
        self.methods = unique(row["method"] for row in self.method_rows)

    def read_table(self, name, numbers=()):
        """The rows of a CSV as dicts; `numbers` are the columns that are floats, None where a cell is empty."""
        with open(self.folder / name, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for column in numbers:
                row[column] = float(row[column]) if row[column] else None
        return rows

    def ranking(self):
        """The rows of ranking.csv on the first task: every pair, truly best first."""
        return [row for row in self.read_table("ranking.csv") if row["task"] == self.page["tasks"][0]["name"]]

    def style(self, method):
        """How a method's line is drawn, the same in every figure."""
        k = self.methods.index(method)
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        return {"color": colour, "marker": marker, "ms": 3, "lw": 1.3, "label": method}

    def pair_styles(self):
        """{pair: how its line is drawn}, in the order of drawing: grey ones, then in colour the worst and the three truly best."""
        pairs = [(row["image"], row["text"]) for row in self.ranking()]
        marked = unique([*pairs[:3], pairs[-1]])
        styles = {pair_name(pair): {"color": GREY, "lw": 0.9} for pair in pairs if pair not in marked}
        for pair in reversed(marked):
            label = ":".join(shorten(name) for name in pair)
            styles[pair_name(pair)] = {"color": COLOURS[marked.index(pair)], "lw": 2, "label": label}
        return styles


def draw_report(folder):
    """Draws every figure and report.html of a folder from its records."""
    records = Records(folder)
    figures = []
    for facts in records.page["figures"]:
        drawing, caption = DRAW[facts["kind"]].draw(records, facts)
        png = io.BytesIO()
        drawing.savefig(png, dpi=160, metadata={"Software": None})
        with atomic_file(records.folder / f"{facts['name']}.png") as file:
            file.write(png.getvalue())
        shown = {"png": as_base64(png.getvalue()), "caption": caption, "width": int(drawing.get_figwidth() * 96)}
        figures.append(facts | shown | {"section": DRAW[facts["kind"]].section})
    write_text(records.folder / "report.html", render_page(records, figures))


# ------------------------------------------------------------------------------------------------------------- page


def render_page(records, figures):
    """The page's HTML. figures: what results.json says of each, and its "png", "caption", "width" and "section"."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"format_number": format_number, "teraflop": teraflop}
    environment.globals["describe_choice"] = describe_choice
    rows_of_task = {}
    for row in records.method_rows:
        rows_of_task.setdefault(row["task"], []).append(row)
    return environment.get_template("report.html").render(
        results=records.results,
        page=records.page,
        rows_of_task=rows_of_task,
        ranking=records.ranking(),
        figures=figures,
        gallery=records.page["gallery"] and gallery_cells(records),
    )


class Tile(NamedTuple):
    """A picture of the gallery."""

    name: str
    jpeg: str | None  # base64, None for a picture that is missing
    right: bool  # whether the caption is its own


def gallery_cells(records):
    """The gallery's table: [(caption, [the Tiles of each pair])]."""
    facts = records.page["gallery"]
    jpegs = {name: as_base64((records.folder / file).read_bytes()) for name, file in facts["thumbnails"].items()}
    first_pair = facts["pairs"][0]["pair"]
    lines = []
    for row in records.read_table("gallery.csv"):
        if row["place"] == "1" and row["pair"] == first_pair:  # a new caption
            lines.append((row["caption"], []))
        cells = lines[-1][1]
        if row["place"] == "1":  # a new pair
            cells.append([])
        cells[-1].append(Tile(row["picture"], jpegs.get(row["picture"]), row["right"] == "True"))
    return lines


def as_base64(content):
    return base64.b64encode(content).decode()


def format_number(value, digits=2):
    """A number as the page shows it, – for None."""
    if value is None:
        return "–"
    return f"{round(float(value), digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def teraflop(flops):
    """FLOPs in units of 10^12, three figures; – for None."""
    if flops is None:
        return "–"
    return f"{flops / 1e12:.3g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def describe_choice(chosen, seeds):
    """The pair that a method chose, in words, or that pairs are tied, or that its seeds disagree. chosen: pairs' names."""
    if len(chosen) == 1:
        return chosen[0]
    if seeds < 2:
        return f"a tie of {len(chosen)}"
    return f"{chosen[0]} or {chosen[1]}, by seed" if len(chosen) == 2 else f"{len(chosen)} pairs, by seed"


# ---------------------------------------------------------------------------------------------------------- figures


def panels(count, across, wide, tall, **shared):
    """A figure and the axes of its `count` panels, at most `across` in a row, each of that size in inches."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(wide * across, tall * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared).flatten().tolist()
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.2)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def shorten(name):
    """A name that fits into a figure; its CSV has the whole."""
    return name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"


def legend_below(figure, axis, backwards=True):
    """Adds a legend below the figure. backwards: what is drawn last, on top, comes first."""
    handles, labels = axis.get_legend_handles_labels()
    step = -1 if backwards else 1
    place = {"loc": "outside lower center", "ncols": 2, "fontsize": 8, "frameon": False}
    figure.legend(handles[::step], labels[::step], **place)


def draw_lines(axis, rows, x, y, series, styles):
    """A line for each of `styles`, {series: how it is drawn}, through the rows of that series that have a y."""
    for name, style in styles.items():
        points = [(row[x], row[y]) for row in rows if row[series] == name and row[y] is not None]
        axis.plot(*np.array(points).reshape(-1, 2).T, **style)


def draw_cost_against_regret(records, facts):
    """Regret with its interval over FLOPs, without and, where they are known, with those of embedding."""
    numbers = ("regret", "regret_low", "regret_high", "regret_random", "flops", "flops_with_embedding")
    rows = records.read_table(f"{facts['name']}.csv", numbers)
    keys = {"search alone": "flops"}
    if all(row["flops_with_embedding"] is not None for row in rows):
        keys["with embedding"] = "flops_with_embedding"
    figure, axes = panels(len(keys), 2, 3.4 + 2.6 / len(keys), 4.2, sharey=True)
    for axis, (title, key) in zip(axes, keys.items()):
        least = min(row[key] for row in rows if row[key] > 0) / 1e12
        most = max(row[key] for row in rows) / 1e12
        for row in rows:
            draw_regret(axis, row, row[key] / 1e12, least, records.style(row["method"]))
        axis.axhline(rows[0]["regret_random"], color="grey", lw=1, ls=":", label="a random order")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if most > 30 * least else (1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"TFLOP, {title}")
    axes[0].set_ylabel("regret, points")
    axes[0].set_ylim(bottom=-0.04 * axes[0].get_ylim()[1])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    caption = (
        f"{facts['task']}: the regret of each method against its cost (log axis; down and left is better). "
        "Bars: 95 % bootstrap interval. Filled: runs; open: selectors, which train nothing."
    )
    return figure, caption


def draw_regret(axis, row, spent, least, style):
    """One method's marker and interval; one that costs nothing is left of the least cost."""
    below = max(0, row["regret"] - row["regret_low"])
    above = max(0, row["regret_high"] - row["regret"])
    style |= {"ls": "none", "ms": 8, "elinewidth": 1}
    if row["kind"] == "selector":
        style["mfc"] = "white"
    if not spent:
        style["label"] += " (no FLOPs)"
    axis.errorbar(spent or least / 4, row["regret"], [[below], [above]], capsize=2, **style)


def draw_ranks(records, facts):
    """One panel per method: the rank that it gives a pair over the pair's true rank."""
    rows = records.read_table(f"{facts['name']}.csv", ("true_rank", "rank"))
    methods = unique(row["method"] for row in rows)
    figure, axes = panels(len(methods), 4, 2.2, 2.35, sharex=True, sharey=True)
    for axis, method in zip(axes, methods):
        own = [row for row in rows if row["method"] == method]
        truth = np.array([row["true_rank"] for row in own])
        ranks = np.array([row["rank"] for row in own])
        best = ranks == ranks.min()
        axis.plot([1, len(own)], [1, len(own)], color="grey", lw=0.8, ls=":")
        axis.scatter(truth[~best], ranks[~best], s=22, color=COLOURS[0], alpha=0.7, linewidths=0)
        axis.scatter(truth[best], ranks[best], s=46, color=COLOURS[1], marker="D")
        axis.set_title(textwrap.fill(method, 26), fontsize=8)
    figure.supxlabel("true rank (1: the best)", fontsize=9)
    figure.supylabel("rank given", fontsize=9)
    caption = (
        f"{facts['task']}: the true rank of every pair and the rank that each method gives it; ties have their average "
        "rank. Diamond: the pair that the method chose."
    )
    return figure, caption


def draw_heatmap(records, facts):
    """The oracle's scores, the run's, and the difference: images down, texts across."""
    rows = records.read_table(f"{facts['name']}.csv", ("oracle", "run", "difference"))
    oracle, method = records.results["oracle"], facts["method"]
    images, texts = unique(row["image"] for row in rows), unique(row["text"] for row in rows)
    down, across = [shorten(name) for name in images], [shorten(name) for name in texts]
    longest_down, longest_across = max(map(len, down)), max(map(len, across))
    upright = longest_across > 9
    wide = 0.075 * longest_down + 3 * (0.7 * max(3, len(texts)) + 0.2)
    tall = 0.75 + 0.36 * len(images) + (0.075 * longest_across if upright else 0.2)
    figure = Figure(figsize=(wide, tall), layout="constrained")

    scores = [row[key] for row in rows for key in ("oracle", "run")]
    most = max(1e-9, max(abs(row["difference"]) for row in rows))
    of_scores = {"cmap": "cividis", "vmin": min(scores), "vmax": max(scores)}
    of_difference = {"cmap": "PuOr", "vmin": -most, "vmax": most}
    shown = (
        (f"oracle: {oracle}", "oracle", facts["best"], of_scores, "{:.1f}"),
        (method, "run", facts["chosen"], of_scores, "{:.1f}"),
        ("difference", "difference", [], of_difference, "{:+.1f}"),
    )
    for axis, (title, key, boxed, colours, form) in zip(figure.subplots(1, 3, sharey=True), shown):
        grid = np.full((len(images), len(texts)), np.nan)  # [images, texts]
        for row in rows:
            grid[images.index(row["image"]), texts.index(row["text"])] = row[key]
        cells = axis.imshow(grid, aspect="auto", **colours)
        write_cells(axis, grid, cells, form)
        for image, text in boxed:
            corner = texts.index(text) - 0.47, images.index(image) - 0.47
            axis.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=COLOURS[1], lw=2.5))
        axis.set_title(textwrap.fill(title, 9 * max(3, len(texts))), fontsize=9)
        axis.set_xticks(range(len(texts)), across, rotation=90 if upright else 0, fontsize=8)
        axis.set_yticks(range(len(images)), down, fontsize=8)
        axis.tick_params(length=0)
    caption = (
        f"{facts['task']}, score in % of every pair: {oracle} (the oracle), {method}, and the difference in points. "
        "Boxed: the oracle's best pair, and the pair that the run chose."
    )
    return figure, caption


def write_cells(axis, grid, cells, form):
    """The number in each cell, black on light colours and white on dark ones."""
    for (i, j), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        brightness = np.dot(cells.cmap(cells.norm(value))[:3], (0.3, 0.59, 0.11))
        text = form.format(round(value, 1) + 0.0)  # + 0.0: no minus before a zero
        colour = "black" if brightness > 0.5 else "white"
        axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)


def draw_ranking_over_epochs(records, facts):
    """One panel per run: the rank of every pair at each validation. Last: the regret of the leading pair."""
    ranking, regret = facts["tables"]
    rows = records.read_table(ranking, ("epoch", "rank"))
    regrets = records.read_table(regret, ("epoch", "regret"))
    methods = unique(row["method"] for row in rows)
    styles = records.pair_styles()
    figure, (*axes, last) = panels(len(methods) + 1, 3 if len(methods) > 3 else 4, 2.5, 2.7)
    for axis, method in zip(axes, methods):
        draw_lines(axis, [row for row in rows if row["method"] == method], "epoch", "rank", "pair", styles)
        axis.set_ylim(len(styles) + 0.5, 0.5)
        axis.set_title(textwrap.fill(method, 34), fontsize=8)
        axis.set_xlabel("epoch", fontsize=8)
    draw_lines(last, regrets, "epoch", "regret", "method", {method: records.style(method) for method in methods})
    axes[0].set_ylabel("rank by validation R@10", fontsize=8)
    last.set_title("regret of the leading pair, points", fontsize=8)
    last.set_xlabel("epoch", fontsize=8)
    last.legend(fontsize=6.5, frameon=False)
    legend_below(figure, axes[0])
    caption = (
        "The rank of every pair at each validation (first seed). Coloured: the three truly best pairs on "
        f"{records.page['tasks'][0]['name']}, and the worst. Last panel: the regret of stopping at that epoch."
    )
    return figure, caption


def draw_loss(records, facts):
    """Loss and validation recall, one line per run; only the first seed of a method is in the legend."""
    rows = records.read_table(f"{facts['name']}.csv", ("epoch", "loss", "val_recall10"))
    method_of = {row["run"]: row["method"] for row in rows}
    styles, labelled = {}, set()
    for run, method in method_of.items():
        styles[run] = records.style(method)
        if method in labelled:
            styles[run]["label"] = None
        labelled.add(method)
    figure, axes = panels(2, 2, 3.8, 3.2)
    titles = {"loss": "loss on training batches", "val_recall10": "mean R@10 of the pairs on validation rows"}
    for axis, (key, title) in zip(axes, titles.items()):
        draw_lines(axis, rows, "epoch", key, "run", styles)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch", fontsize=9)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    legend_below(figure, axes[1], backwards=False)
    return figure, "Loss and validation recall of every run, one line for each seed."


def draw_canonical_correlations(records, facts):
    """One line per pair over the canonical directions."""
    rows = records.read_table(f"{facts['name']}.csv", ("place", "correlation"))
    figure, (axis,) = panels(1, 1, 6.4, 3.6)
    draw_lines(axis, rows, "place", "correlation", "pair", records.pair_styles())
    axis.set_xlabel("canonical direction")
    axis.set_ylabel("correlation")
    legend_below(figure, axis)
    caption = (
        "Canonical correlations of picture and caption embeddings between their leading principal components. Coloured: "
        f"the three truly best pairs on {records.page['tasks'][0]['name']}, and the worst."
    )
    return figure, caption


class Drawing(NamedTuple):
    """How figures of a kind are drawn, and where the page shows them."""

    draw: Callable  # (Records, what results.json says of the figure) -> (matplotlib's figure, its caption)
    section: str | None = None  # heading of the page that it is under; None: that of the figure's task


DRAW = {
    "cost-regret": Drawing(draw_cost_against_regret),
    "ranks": Drawing(draw_ranks),
    "heatmap": Drawing(draw_heatmap),
    "ranking-over-epochs": Drawing(draw_ranking_over_epochs, "Over the epochs"),
    "loss": Drawing(draw_loss, "Over the epochs"),
    "canonical-correlations": Drawing(draw_canonical_correlations, "Before any training"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a report folder that evaluate.py wrote")
    folder = parser.parse_args().folder
    draw_report(folder)
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
