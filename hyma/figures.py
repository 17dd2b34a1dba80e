"""The figures of a report, each once: the rows that it saves, and how it is drawn from the saved rows.

To add a figure, add one class to this file, with `@register`. Its `save` makes the rows of its CSV from an
EvaluationResult; its `draw` reads them back from the records, and nothing else. A figure with a section stands under that
heading of the page, or, if it is FIRST_SCREEN, beside the answer, once for the report; one without stands under each task.
The page has them in the order of this file. A figure without rows is left out. `show_on_pointer` gives a mark its text.
"""

import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from scipy.stats import rankdata

from hyma.embeddings import unique
from hyma.evaluation import ALIKE, CHOSEN, compare_pairs
from hyma.files import read_jsonl
from hyma.metrics import best_pairs, fidelity, mean_recalls
from hyma.pair_names import name_of_row, pair_name
from hyma.plotting import (
    COLOURS,
    GREY,
    INK,
    draw_lines,
    label_epochs,
    legend_below,
    method_style,
    pair_styles,
    panels,
    shorten,
    show_on_pointer,
)
from vlm import BadInput

FIRST_SCREEN = "first screen"  # the section of a figure that stands beside the answer
FIGURES = {}  # kind -> its class


def register(figure):
    FIGURES[figure.kind] = figure
    return figure


class FigureData(NamedTuple):
    """What a figure shows."""

    name: str  # of its files: <name>.csv, <name>.png
    rows: list  # of its CSV: dicts of the same keys
    details: dict = {}  # what else its drawing needs: a part of results.json
    further_tables: dict = {}  # {file name: rows}


def save_figures(result):
    """({file name: rows} of all figures that have something to show, for each what results.json says of it: its `facts`)."""
    tables = {}
    listed = []
    for kind, task, figure in list_figures(result):
        if not figure.rows:
            continue
        own = {f"{figure.name}.csv": figure.rows} | figure.further_tables
        tables |= own
        listed.append({"name": figure.name, "kind": kind, "task": task, "tables": list(own)} | figure.details)
    return tables, listed


def list_figures(result):
    """[(kind, the name of its task or None, FigureData)], in the page's order."""
    found = []
    for place, task in enumerate(result.tasks):
        for kind, figure in FIGURES.items():
            if figure.section is None:
                for data in figure.save(result, place):
                    found.append((kind, task.name, data))
    for kind, figure in FIGURES.items():
        if figure.section is not None:
            found.append((kind, None, figure.save(result)))
    return found


def draw_figure(records, facts):
    """(matplotlib's figure, its caption, the heading it stands under or None). facts: what results.json says of it."""
    figure = FIGURES.get(facts["kind"])
    if figure is None:
        raise BadInput(f"{records.folder}: has a figure of an unknown kind, {facts['kind']!r}; run evaluate.py again")
    drawing, caption = figure.draw(records, facts)
    return drawing, caption, figure.section


# ----------------------------------------------------------------------------------------------- under each task


@register
class CostAgainstRegret:
    """Regret with its interval over FLOPs, without and, where they are known, with those of embedding."""

    kind = "cost-regret"
    section = None

    @staticmethod
    def save(result, place):
        """A row per method. Connectors alone have no FLOPs; nothing is shown where no method has any."""
        rows = []
        for each in result.method_results[place]:
            cost, regret = result.costs[each.method], each.fidelity["regret"]
            if cost.flops is None:
                continue
            row = {
                "task": each.task,
                "method": each.method,
                "kind": each.kind,
                "regret": regret.value,
                "regret_low": regret.low,
                "regret_high": regret.high,
                "regret_random": regret.random,
                "flops": cost.flops,
                "flops_with_embedding": cost.flops_with_embedding,
            }
            rows.append(row)
        known = [row for row in rows if row["flops"]]
        return [FigureData(f"cost-regret-{place}", rows if known else [])]

    @staticmethod
    def draw(records, facts):
        """A line for each method, so that no two markers overlap, whatever the methods have in common."""
        numbers = ("regret", "regret_low", "regret_high", "regret_random", "flops", "flops_with_embedding")
        rows = records.read_table(f"{facts['name']}.csv", ("method", "kind"), numbers)
        rows.sort(key=lambda row: -row["regret"])  # the least regret is drawn last, at the top
        spent_of_panel = {"search alone": column(rows, "flops") / 1e12}  # TFLOP
        with_embedding = column(rows, "flops_with_embedding") / 1e12
        if not np.isnan(with_embedding).any():
            spent_of_panel["with embedding"] = with_embedding
        names = [shorten(row["method"], 34) for row in rows]
        figure = Figure(figsize=(4.6 + 2.1 * len(spent_of_panel), 0.9 + 0.27 * len(rows)), layout="constrained")
        shares = [1.5] + [1] * len(spent_of_panel)
        regrets, *costs = figure.subplots(1, len(shares), sharey=True, width_ratios=shares)

        for place, row in enumerate(rows):
            draw_regret(regrets, place, row, method_style(records, row["method"]))
        regrets.axvline(rows[0]["regret_random"], color=GREY, lw=1, ls=":")
        regrets.set_xlim(left=min(0, *column(rows, "regret_low")) - 0.02 * regrets.get_xlim()[1])
        regrets.set_xlabel("regret, points (dotted: a random order)", fontsize=8)
        regrets.set_yticks(range(len(rows)), names, fontsize=8)
        for axis, (title, spent) in zip(costs, spent_of_panel.items()):
            draw_costs(axis, rows, spent, [method_style(records, row["method"]) for row in rows])
            axis.set_xlabel(f"TFLOP, {title}", fontsize=8)
        for axis in (regrets, *costs):
            axis.tick_params(labelsize=8, left=False)
            axis.grid(axis="y", alpha=0.25)
            axis.spines[["top", "right", "left"]].set_visible(False)
        caption = (
            f"{facts['task']}: the regret of each method with its 95 % bootstrap interval, and its cost (log axes; "
            "0: no FLOPs). Filled: runs; open: selectors, which train nothing."
        )
        return figure, caption


def column(rows, name):
    """[rows] a column as an array, NaN in the empty cells."""
    return np.array([row[name] for row in rows], dtype=float)


def draw_regret(axis, place, row, style):
    """One method's marker and interval, on the line of that place."""
    axis.plot([row["regret_low"], row["regret_high"]], [place, place], color=style["color"], lw=1.6)
    marker = axis.plot(row["regret"], place, **marker_style(row, style))[0]
    interval = f"{row['regret_low']:.2f} to {row['regret_high']:.2f}"
    show_on_pointer(marker, f"{row['method']}: regret {row['regret']:.2f} points ({interval})")


def draw_costs(axis, rows, spent, styles):
    """The marker of each method at what it spent, on a log axis; a 0 at its left end for one that spent nothing."""
    for place, (row, own, style) in enumerate(zip(rows, spent, styles)):
        if own > 0:
            marker = axis.plot(own, place, **marker_style(row, style))[0]
            show_on_pointer(marker, f"{row['method']}: {own:.3g} TFLOP")
        else:
            axis.annotate("0", (0.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    least, most = spent[spent > 0].min(), spent.max()
    axis.set_xscale("log")
    axis.set_xlim(least / 3, most * 2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if most > 30 * least else (1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def marker_style(row, style):
    """A method's marker alone, open for a selector."""
    style = {key: style[key] for key in ("color", "marker")} | {"ls": "none", "ms": 7}
    return style | ({"mfc": "none"} if row["kind"] == "selector" else {})


@register
class Ranks:
    """One panel per method: the rank that it gives a pair over the pair's true rank, on the first task."""

    kind = "ranks"
    section = None

    @staticmethod
    def save(result, place):
        """A row per method and pair, of every method that does not tie them all."""
        if place > 0:
            return []
        truth = rankdata(-result.true_scores(result.headline))  # [P]
        rows = []
        for method in result.methods:
            if not np.ptp(method.preferences):
                continue
            ranks = rankdata(-method.preferences.mean(0))  # [P]
            for (image, text), true, rank in zip(result.pairs, truth, ranks):
                rows.append({"method": method.name, "image": image, "text": text, "true_rank": true, "rank": rank})
        return [FigureData(f"ranks-{place}", rows)]

    @staticmethod
    def draw(records, facts):
        rows = records.read_table(f"{facts['name']}.csv", ("method", "image", "text"), ("true_rank", "rank"))
        methods = unique(row["method"] for row in rows)
        figure, axes = panels(len(methods), 4, 2.2, 2.35, sharex=True, sharey=True)
        for axis, method in zip(axes, methods):
            own = [row for row in rows if row["method"] == method]
            axis.plot([1, len(own)], [1, len(own)], color="grey", lw=0.8, ls=":")
            draw_ranks(axis, own)
            axis.set_title(textwrap.fill(method, 26), fontsize=8)
        figure.supxlabel("true rank (1: the best)", fontsize=9)
        figure.supylabel("rank given", fontsize=9)
        caption = (
            f"{facts['task']}: the true rank of every pair and the rank that each method gives it; ties have their average "
            "rank. Diamond: the pair that the method chose. A number: so many pairs have the same two ranks."
        )
        return figure, caption


def draw_ranks(axis, rows):
    """A marker for each pair; pairs of the same two ranks share one, with their number in it."""
    pairs_at_place = {}
    for row in rows:
        pairs_at_place.setdefault((row["true_rank"], row["rank"]), []).append(name_of_row(row))
    first = min(row["rank"] for row in rows)
    for (truth, rank), pairs in pairs_at_place.items():
        style = {"marker": "D", "color": COLOURS[1]} if rank == first else {"marker": "o", "color": COLOURS[0]}
        size = 5.5 if len(pairs) == 1 else 10
        marker = axis.plot(truth, rank, ls="none", ms=size, mew=0, **style)[0]
        show_on_pointer(marker, f"{', '.join(pairs)}: true rank {truth:g}, given {rank:g}")
        if len(pairs) > 1:
            axis.text(truth, rank, len(pairs), color="white", fontsize=7, ha="center", va="center_baseline")


@register
class Heatmap:
    """The oracle's score of every pair, a run's, and the difference, in points: images down, texts across."""

    kind = "heatmap"
    section = None

    @staticmethod
    def save(result, place):
        """One for each run on the first task, and on the others one for the run whose choice is the answer."""
        methods = [result.primary]
        if place == 0:
            runs = [method for method in result.methods if method.runs and method is not result.oracle]
            methods = runs or [result.oracle]
        task = result.tasks[place]
        oracle = 100 * task.scores[result.oracle.name].mean(0)  # [P]
        figures = []
        for k, method in enumerate(methods):
            run = 100 * task.scores[method.name].mean(0)  # [P]
            values = np.stack([oracle, run, run - oracle], axis=1).round(3).tolist()  # [P, 3]
            rows = []
            for (image, text), (of_oracle, of_run, difference) in zip(result.pairs, values):
                row = {"image": image, "text": text}
                rows.append(row | {"oracle": of_oracle, "run": of_run, "difference": difference})
            details = {
                "method": method.name,
                "best": pairs_at(result, best_pairs(oracle.round(7))),
                "chosen": pairs_at(result, best_pairs(method.preferences.mean(0))),
            }
            figures.append(FigureData(f"heatmap-{place}-{k}", rows, details))
        return figures

    @staticmethod
    def draw(records, facts):
        rows = records.read_table(f"{facts['name']}.csv", ("image", "text"), ("oracle", "run", "difference"))
        oracle, method = records.results["oracle"], facts["method"]
        images = unique(row["image"] for row in rows)
        texts = unique(row["text"] for row in rows)
        grids = {}  # key -> [images, texts], NaN where a pair is missing
        for key in ("oracle", "run", "difference"):
            grids[key] = np.full((len(images), len(texts)), np.nan)
            for row in rows:
                grids[key][images.index(row["image"]), texts.index(row["text"])] = row[key]

        figure = Figure(figsize=heatmap_size(images, texts, 3), layout="constrained")
        scores = np.stack([grids["oracle"], grids["run"]])
        most = max(1e-9, np.nanmax(np.abs(grids["difference"])))
        of_scores = "cividis", Normalize(np.nanmin(scores), np.nanmax(scores))
        of_difference = "PuOr", Normalize(-most, most)
        shown = (
            (f"oracle: {oracle}", "oracle", facts["best"], of_scores, "{:.1f}"),
            (method, "run", facts["chosen"], of_scores, "{:.1f}"),
            ("difference", "difference", [], of_difference, "{:+.1f}"),
        )
        for axis, (title, key, boxed, colours, form) in zip(figure.subplots(1, 3, sharey=True), shown):
            draw_cells(axis, grids[key], images, texts, colours, form, title)
            for image, text in boxed:
                draw_box(axis, images.index(image), texts.index(text))
            axis.set_title(textwrap.fill(title, 9 * max(3, len(texts))), fontsize=9)
        caption = (
            f"{facts['task']}, score in % of every pair: {oracle} (the oracle), {method}, and the difference in points. "
            "Boxed: the oracle's best pair, and the pair that the run chose."
        )
        return figure, caption


def pairs_at(result, places):
    """The pairs as results.json has them, [image, text]."""
    return [list(result.pairs[k]) for k in places]


def heatmap_size(images, texts, across):
    """The size in inches of a figure with so many heatmaps side by side."""
    longest_down = max(map(len, map(shorten, images)))
    longest_across = max(map(len, map(shorten, texts)))
    wide = 0.075 * longest_down + across * (0.7 * max(3, len(texts)) + 0.2)
    tall = 0.75 + 0.36 * len(images) + (0.075 * longest_across if longest_across > 9 else 0.2)
    return wide, tall


def draw_cells(axis, grid, images, texts, colours, form, title):
    """A heatmap: images down, texts across, each cell with its number, black on light colours and white on dark ones.

    grid: [images, texts], NaN where a pair is missing. colours: (name of a colour map, Normalize). form: of the numbers.
    title: what the numbers are, for the pointer.
    """
    name, normalise = colours
    for (i, j), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        colour = colormaps[name](normalise(value))
        number = form.format(round(value, 1) + 0.0)  # + 0.0: no minus before a zero
        cell = axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=colour, lw=0))
        ink = INK if np.dot(colour[:3], (0.3, 0.59, 0.11)) > 0.5 else "white"
        label = axis.text(j, i, number, ha="center", va="center", color=ink, fontsize=8)
        for artist in (cell, label):
            show_on_pointer(artist, f"{images[i]}:{texts[j]}, {title}: {number}")
    axis.set_xlim(-0.5, len(texts) - 0.5)
    axis.set_ylim(len(images) - 0.5, -0.5)
    upright = max(map(len, map(shorten, texts))) > 9
    axis.set_xticks(range(len(texts)), list(map(shorten, texts)), rotation=90 if upright else 0, fontsize=8)
    axis.set_yticks(range(len(images)), list(map(shorten, images)), fontsize=8)
    axis.tick_params(length=0)


def draw_box(axis, i, j, **style):
    """A box around the cell of row i and column j."""
    style = {"edgecolor": COLOURS[1], "lw": 2.5} | style
    axis.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, **style))


# ----------------------------------------------------------------------------------------------- once for the report


@register
class TrueScores:
    """The first screen's heatmap: the true score of every pair on the first task, the choice boxed."""

    kind = "true-scores"
    section = FIRST_SCREEN

    @staticmethod
    def save(result):
        """A row per pair, in the order of the report's pairs."""
        truth = (100 * result.true_scores(result.headline)).round(3).tolist()  # [P]
        rows = []
        for (image, text), score, each in zip(result.pairs, truth, compare_pairs(result, result.headline)):
            rows.append({"image": image, "text": text, "true_score": score, "verdict": each.verdict})
        return FigureData("true-scores", rows)

    @staticmethod
    def draw(records, facts):
        rows = records.read_table(f"{facts['name']}.csv", ("image", "text", "verdict"), ("true_score",))
        images = unique(row["image"] for row in rows)
        texts = unique(row["text"] for row in rows)
        grid = np.full((len(images), len(texts)), np.nan)
        for row in rows:
            grid[images.index(row["image"]), texts.index(row["text"])] = row["true_score"]
        figure = Figure(figsize=heatmap_size(images, texts, 1), layout="constrained")
        axis = figure.subplots()
        colours = "cividis", Normalize(np.nanmin(grid), np.nanmax(grid))
        draw_cells(axis, grid, images, texts, colours, "{:.1f}", "true score in %")
        for row in rows:
            place = images.index(row["image"]), texts.index(row["text"])
            if row["verdict"] == CHOSEN:
                draw_box(axis, *place, lw=3.5)
            elif row["verdict"] == ALIKE:
                draw_box(axis, *place, lw=1.3, ls=(0, (3, 2)))
        task = records.page["tasks"][0]
        caption = (
            f"True score of every pair on {task['name']}, in %. Boxed: the choice. Dashed: cannot be told apart from it on "
            f"{task['counted']}."
        )
        return figure, caption


@register
class RankingOverEpochs:
    """One panel per run: the rank of every pair at each validation of its first seed. Last: the regret of the leading pair."""

    kind = "ranking-over-epochs"
    section = "Over the epochs"

    @staticmethod
    def save(result):
        """A row per run, validation and pair; in a second table, one per run and validation, regret in points."""
        truth = result.true_scores(result.headline)[None]  # [1, P]
        names = [pair_name(pair) for pair in result.pairs]
        ranking, regrets = [], []
        for method, validations in validations_of(result).items():
            for validation in validations:
                columns = {"method": method, "epoch": validation["epoch"]}
                recall10 = {}  # pair -> mean of both directions; a pair that successive halving has dropped is not there
                for pair, six in validation["recalls"].items():
                    if pair in names:
                        recall10[pair] = mean_recalls(six)[2]
                ranks = rankdata(-np.array(list(recall10.values())))
                for pair, rank in zip(recall10, ranks):
                    ranking.append(columns | {"pair": pair, "rank": rank})
                preference = np.array([recall10.get(name, -1.0) for name in names])  # [P], dropped pairs last
                regrets.append(columns | {"regret": fidelity(truth, preference)["regret"][0]})
        return FigureData("ranking-over-epochs", ranking, further_tables={"regret-over-epochs.csv": regrets})

    @staticmethod
    def draw(records, facts):
        ranking, regret = facts["tables"]
        rows = records.read_table(ranking, ("method", "pair"), ("epoch", "rank"))
        regrets = records.read_table(regret, ("method",), ("epoch", "regret"))
        methods = unique(row["method"] for row in rows)
        styles = pair_styles(records)
        figure, (*axes, last) = panels(len(methods) + 1, 3 if len(methods) > 3 else 4, 2.5, 2.7)
        for axis, method in zip(axes, methods):
            own = [row for row in rows if row["method"] == method]
            draw_lines(axis, own, "epoch", "rank", "pair", styles)
            axis.set_ylim(len(styles) + 0.5, 0.5)
            axis.set_title(textwrap.fill(method, 34), fontsize=8)
            label_epochs(axis, 8)
        of_methods = {method: method_style(records, method) for method in methods}
        draw_lines(last, regrets, "epoch", "regret", "method", of_methods)
        axes[0].set_ylabel("rank by validation R@10", fontsize=8)
        last.set_title("regret of the leading pair, points", fontsize=8)
        label_epochs(last, 8)
        last.legend(fontsize=6.5, frameon=False)
        legend_below(figure, axes[0])
        caption = (
            "The rank of every pair at each validation (first seed). Coloured: the three truly best pairs on "
            f"{records.page['tasks'][0]['name']}, and the worst. Last panel: the regret of stopping at that epoch."
        )
        return figure, caption


def validations_of(result):
    """{method: the lines of metrics.jsonl of its first seed}, of methods that were validated more than once."""
    validations = {}
    for method in result.methods:
        if method.trained:
            lines = read_jsonl(method.runs[0].folder / "metrics.jsonl")
            if len(lines) > 1:  # a closed form has one
                validations[method.name] = lines
    return validations


@register
class LossCurves:
    """Loss and validation recall, one line per run; only the first seed of a method is in the legend."""

    kind = "loss"
    section = "Over the epochs"

    @staticmethod
    def save(result):
        """A row per run and validation; a closed form has no loss."""
        rows = []
        for method in result.methods:
            if not method.trained:
                continue
            for run in method.runs:
                columns = {"method": method.name, "seed": run.seed, "run": str(run.folder)}
                for line in read_jsonl(run.folder / "metrics.jsonl"):
                    row = dict(columns)
                    for key in ("epoch", "loss", "val_recall10", "seconds"):
                        row[key] = line.get(key)
                    rows.append(row)
        return FigureData("loss", rows)

    @staticmethod
    def draw(records, facts):
        rows = records.read_table(f"{facts['name']}.csv", ("method", "run"), ("epoch", "loss", "val_recall10"))
        styles = {}
        labelled = set()
        for row in rows:
            run, method = row["run"], row["method"]
            if run in styles:
                continue
            styles[run] = method_style(records, method)
            if method in labelled:
                styles[run]["label"] = None
            labelled.add(method)
        figure, axes = panels(2, 2, 3.8, 3.2)
        titles = {"loss": "loss on training batches", "val_recall10": "mean R@10 of the pairs on validation rows"}
        for axis, (key, title) in zip(axes, titles.items()):
            draw_lines(axis, rows, "epoch", key, "run", styles)
            axis.set_title(title, fontsize=9)
            label_epochs(axis, 9)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1))
        legend_below(figure, axes[1], backwards=False)
        return figure, "Loss and validation recall of every run, one line for each seed."


@register
class CanonicalCorrelations:
    """One line per pair over the canonical directions, largest correlation first."""

    kind = "canonical-correlations"
    section = "Before any training"

    @staticmethod
    def save(result):
        """A row per pair and direction; none without selectors."""
        rows = []
        for pair, correlations in result.spectra.items():
            for place, correlation in enumerate(correlations, 1):
                rows.append({"pair": pair_name(pair), "place": place, "correlation": correlation})
        return FigureData("canonical-correlations", rows)

    @staticmethod
    def draw(records, facts):
        rows = records.read_table(f"{facts['name']}.csv", ("pair",), ("place", "correlation"))
        figure, (axis,) = panels(1, 1, 6.4, 3.6)
        draw_lines(axis, rows, "place", "correlation", "pair", pair_styles(records))
        axis.set_xlabel("canonical direction")
        axis.set_ylabel("correlation")
        legend_below(figure, axis)
        caption = (
            "Canonical correlations of picture and caption embeddings between their leading principal components. Coloured: "
            f"the three truly best pairs on {records.page['tasks'][0]['name']}, and the worst."
        )
        return figure, caption
