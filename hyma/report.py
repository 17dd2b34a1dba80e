"""The report: figures and the page."""

import base64
import functools
import html
import io
import math
import re
import textwrap
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from scipy.stats import rankdata

import vlm
from hyma.costs import times
from hyma.embeddings import unique
from hyma.files import atomic_file, read_jsonl, write_csv, write_json, write_text
from hyma.metrics import METRICS, best_pairs, bootstrap_scores, fidelity, true_scores
from hyma.selectors import Method
from hyma.tasks import HEADLINES, image_inputs, text_inputs

# Okabe and Ito's colours, told apart by the colour-blind, with markers that survive a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]


class Findings(NamedTuple):
    """All that the report is made of."""

    pairs: list  # (image, text)
    methods: list
    oracle: Method  # whose connectors are the truth
    primary: Method  # whose choice is advised
    chosen: int  # the number of that pair
    judged: list  # the tasks, the headline's first
    drawn: dict  # method -> [R, S] weights of the seeds
    fidelities: list  # of each in `judged`, a row a method
    costs: dict  # method -> its row of the ledger
    spectra: dict  # pair -> canonical correlations
    warnings: list

    def line(self, name):
        """How a method's line is drawn."""
        k = [method.name for method in self.methods].index(name)
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        return {"color": colour, "marker": marker, "ms": 3, "lw": 1.3, "label": name}


class Plot(NamedTuple):
    name: str  # of its .png and .csv
    caption: str
    figure: Figure
    rows: list  # of the CSV: dicts


def panels(count, across, wide, tall, **shared):
    """A figure and the axes of its `count` panels, `across` in a row, of that size in inches each."""
    across = min(across, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(wide * across, tall * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **shared).flatten().tolist()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.2)
    return figure, axes[:count]


def short(name):
    """A name that fits into a figure; its CSV has the whole."""
    return name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"


def pair_lines(found):
    """{pair: how its line is drawn}, first drawn first: grey, and over it in colour the worst and the three truly best."""
    order = np.argsort(-true_scores(found.judged[0], found.oracle), kind="stable").tolist()
    marked = unique([*order[:3], order[-1]])
    lines = {k: {"color": "#c4c4c4", "lw": 0.9} for k in order if k not in marked}
    for k in reversed(marked):
        said = ":".join(map(short, found.pairs[k]))
        lines[k] = {"color": COLOURS[marked.index(k)], "lw": 2, "label": said}
    return {":".join(found.pairs[k]): line for k, line in lines.items()}


def legend_below(figure, axis, backwards=True):
    """backwards: drawn last, on top, is the best."""
    handles, labels = (part[:: -1 if backwards else 1] for part in axis.get_legend_handles_labels())
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def heatmaps(found, judged, method, name):
    """The oracle's scores, the run's, and the difference: images down, texts across."""
    images, texts = (unique(names) for names in zip(*found.pairs))
    place = [(images.index(image), texts.index(text)) for image, text in found.pairs]
    truth, own = (100 * judged.scores[each.name].mean(0) for each in (found.oracle, method))
    low, high, most = min(truth.min(), own.min()), max(truth.max(), own.max()), max(1e-9, np.abs(own - truth).max())
    scores, change = {"cmap": "cividis", "vmin": low, "vmax": high}, {"cmap": "PuOr", "vmin": -most, "vmax": most}
    down, across = list(map(short, images)), list(map(short, texts))
    upright = max(map(len, across)) > 9
    wide = 0.075 * max(map(len, down)) + 3 * (0.7 * max(3, len(texts)) + 0.2)
    tall = 0.75 + 0.36 * len(images) + (0.075 * max(map(len, across)) if upright else 0.2)
    figure = Figure(figsize=(wide, tall), layout="constrained")
    shown = (
        (f"oracle: {found.oracle.name}", truth, best_pairs(truth.round(7)), scores, "{:.1f}"),
        (method.name, own, best_pairs(method.orders.mean(0)), scores, "{:.1f}"),
        ("difference", own - truth, [], change, "{:+.1f}"),
    )
    for axis, (title, values, boxed, colours, form) in zip(figure.subplots(1, 3, sharey=True), shown):
        grid = np.full((len(images), len(texts)), np.nan)  # [images, texts]
        grid[tuple(zip(*place))] = values
        drawn = axis.imshow(grid, aspect="auto", **colours)
        for (row, column), value in zip(place, values):
            light = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.3, 0.59, 0.11)) > 0.5
            said = form.format(round(value, 1) + 0.0)  # + 0.0: no minus before a zero
            axis.text(column, row, said, ha="center", va="center", color="black" if light else "white", fontsize=8)
        for row, column in (place[k] for k in boxed):
            axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", lw=2.5))
        axis.set_title(textwrap.fill(title, 9 * max(3, len(texts))), fontsize=9)
        axis.set_xticks(range(len(texts)), across, rotation=90 if upright else 0, fontsize=8)
        axis.set_yticks(range(len(images)), down, fontsize=8)
        axis.tick_params(length=0)
    values = zip(found.pairs, truth.round(3).tolist(), own.round(3).tolist(), (own - truth).round(3).tolist())
    rows = [{"image": i, "text": t, "oracle": a, "run": b, "difference": c} for (i, t), a, b, c in values]
    caption = (
        f"{judged.name}, score in % of every pair: {found.oracle.name} (the oracle), {method.name}, and the difference in "
        "points. Boxed: the oracle's best on the task, and the pair that the run chose."
    )
    return Plot(name, caption, figure, rows)


def cost_against_regret(found, judged, rows, name):
    """Regret with its interval over FLOPs, without and with those of embedding. Of connectors alone they are not known."""
    rows = [row | found.costs[row["method"]]._asdict() for row in rows if found.costs[row["method"]].flops is not None]
    keys = {"search alone": "flops", "with embedding": "flops_with_embedding"}
    keys = {title: key for title, key in keys.items() if all(row[key] is not None for row in rows)}
    if not any(row["flops"] for row in rows):
        return None
    figure, axes = panels(len(keys), 2, 3.4 + 2.6 / len(keys), 4.2, sharey=True)
    for axis, (title, key) in zip(axes, keys.items()):
        least = min(row[key] for row in rows if row[key] > 0) / 1e12
        for row in rows:
            look, spent = found.line(row["method"]), row[key] / 1e12
            error = [[max(0, row["regret"] - row["regret_low"])], [max(0, row["regret_high"] - row["regret"])]]
            look |= {"ls": "none", "ms": 8, "elinewidth": 1} | ({"mfc": "white"} if row["kind"] == "selector" else {})
            look["label"] += "" if spent else " (no FLOPs)"
            axis.errorbar(spent or least / 4, row["regret"], error, capsize=2, **look)
        axis.axhline(rows[0]["regret_random"], color="grey", lw=1, ls=":", label="a random order")
        axis.set_xscale("log")
        few = max(row[key] for row in rows) / 1e12 > 30 * least
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if few else (1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"TFLOP, {title}")
    axes[0].set_ylabel("regret, points")
    axes[0].set_ylim(bottom=-0.04 * axes[0].get_ylim()[1])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    kept = ("task", "method", "kind", "regret", "regret_low", "regret_high", "regret_random", "flops")
    table = [{key: row[key] for key in (*kept, "flops_with_embedding")} for row in rows]
    caption = (
        f"{judged.name}: what each way of choosing loses against what it costs (log axis; down and left is better). "
        "Bars: 95 % bootstrap interval. Filled: runs; open: selectors that train nothing."
    )
    return Plot(name, caption, figure, table)


def rank_scatter(found, judged, name):
    """A panel a method: the rank it gives a pair over the pair's true rank."""
    truth, count = rankdata(-true_scores(judged, found.oracle)), len(found.pairs)
    shown, table = [method for method in found.methods if np.ptp(method.orders)], []
    if not shown:
        return None
    figure, axes = panels(len(shown), 4, 2.2, 2.35, sharex=True, sharey=True)
    for axis, method in zip(axes, shown):
        own = rankdata(-method.orders.mean(0))
        best = own == own.min()
        axis.plot([1, count], [1, count], color="grey", lw=0.8, ls=":")
        axis.scatter(truth[~best], own[~best], s=22, color=COLOURS[0], alpha=0.7, linewidths=0)
        axis.scatter(truth[best], own[best], s=46, color=COLOURS[1], marker="D")
        axis.set_title(textwrap.fill(method.name, 26), fontsize=8)
        for (image, text), true, rank in zip(found.pairs, truth, own):
            table.append({"method": method.name, "image": image, "text": text, "true_rank": true, "rank": rank})
    figure.supxlabel("true rank (1: the best)", fontsize=9)
    figure.supylabel("rank given", fontsize=9)
    caption = (
        f"{judged.name}: true rank of every pair and the rank each method gives it; ties at their average rank. "
        "Diamond: the pair chosen."
    )
    return Plot(name, caption, figure, table)


def draw_lines(axis, rows, x, y, series, styles):
    """A line for each of `styles`, {series: how it is drawn}, through the rows of that series that have a y."""
    for name, style in styles.items():
        points = [(row[x], row[y]) for row in rows if row[series] == name and row[y] is not None]
        axis.plot(*np.array(points).reshape(-1, 2).T, **style)


def ranking_over_epochs(found, name):
    """A panel a run: the rank of every pair at each look at the validation rows. Last: regret of the leading pair."""
    truth, names = true_scores(found.judged[0], found.oracle), [":".join(pair) for pair in found.pairs]
    looks = {m.name: read_jsonl(m.runs[0].folder / "metrics.jsonl") for m in found.methods if m.trained}
    looks = {method: each for method, each in looks.items() if len(each) > 1}  # a closed form has one
    if not looks:
        return None
    figure, (*axes, last) = panels(len(looks) + 1, 3 if len(looks) > 3 else 4, 2.5, 2.7)
    table, lost = [], []
    for axis, (method, each) in zip(axes, looks.items()):
        own = []
        for look in each:
            recalls = {pair: (six[2] + six[5]) / 2 for pair, six in look["recalls"].items() if pair in names}
            order = np.array([recalls.get(pair, -1.0) for pair in names])  # given up, in halving: behind
            regret, about = fidelity(truth[None], order)["regret"][0], {"method": method, "epoch": look["epoch"]}
            lost.append(about | {"regret": regret})
            ranks = zip(recalls, rankdata([-recall for recall in recalls.values()]))
            own += [about | {"pair": pair, "rank": rank} for pair, rank in ranks]
        draw_lines(axis, own, "epoch", "rank", "pair", pair_lines(found))
        axis.set_ylim(len(names) + 0.5, 0.5)
        axis.set_title(textwrap.fill(method, 34), fontsize=8)
        axis.set_xlabel("epoch", fontsize=8)
        table += own
    draw_lines(last, lost, "epoch", "regret", "method", {method: found.line(method) for method in looks})
    axes[0].set_ylabel("rank by validation R@10", fontsize=8)
    last.set_title("regret of the leading pair, points", fontsize=8)
    last.set_xlabel("epoch", fontsize=8)
    last.legend(fontsize=6.5, frameon=False)
    legend_below(figure, axes[0])
    caption = (
        "Rank of every pair at each look at the validation rows (first seed). Coloured: the three truly best on "
        f"{found.judged[0].name}, and the worst. Last panel: what stopping there would have cost."
    )
    return Plot(name, caption, figure, table)


def loss_curves(found, plot_name):
    table, styles = [], {}
    for name, k, run in ((m.name, k, run) for m in found.methods if m.trained for k, run in enumerate(m.runs)):
        about = {"method": name, "seed": run.seed, "run": str(run.folder)}
        styles[about["run"]] = found.line(name) | ({"label": None} if k else {})
        for line in read_jsonl(run.folder / "metrics.jsonl"):  # a closed form has no loss
            table.append(about | {key: line.get(key) for key in ("epoch", "loss", "val_recall10", "seconds")})
    if not table:
        return None
    figure, axes = panels(2, 2, 3.8, 3.2)
    titles = {"loss": "loss on training batches", "val_recall10": "mean R@10 of the pairs on validation rows"}
    for axis, (key, about) in zip(axes, titles.items()):
        draw_lines(axis, table, "epoch", key, "run", styles)
        axis.set_title(about, fontsize=9)
        axis.set_xlabel("epoch", fontsize=9)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    legend_below(figure, axes[1], backwards=False)
    return Plot(plot_name, "Loss and validation recall of every run, a line a seed.", figure, table)


def correlation_spectra(found, name):
    spectra = [(":".join(pair), n + 1, v) for pair, values in found.spectra.items() for n, v in enumerate(values)]
    table = [dict(zip(("pair", "place", "correlation"), row)) for row in spectra]
    figure, (axis,) = panels(1, 1, 6.4, 3.6)
    draw_lines(axis, table, "place", "correlation", "pair", pair_lines(found))
    axis.set_xlabel("canonical direction")
    axis.set_ylabel("correlation")
    legend_below(figure, axis)
    caption = (
        "Canonical correlations of picture and caption embeddings between their leading principal components. Coloured: "
        f"the three truly best pairs on {found.judged[0].name}, and the worst."
    )
    return Plot(name, caption, figure, table)


def gallery(tasks, run, pairs_shown, count=6):
    """(a table as HTML, rows of its CSV): real captions and their five nearest pictures, for each of `pairs_shown`:
    {pair: why}. Says so where there are no pictures to show."""
    task = next((task for task in tasks if task.kind == "retrieval" and task.data.manifest and task.data.rows), None)
    if task is None:
        return "<p>No task here has captions and pictures to show.</p>", []
    rows = [task.data.rows[i] for i in task.rows.tolist()]
    first = {row["image"]: place for place, row in reversed(list(enumerate(rows)))}  # picture -> its first place
    pictures, root = list(first), task.data.folder / task.data.manifest.get("root", ".")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
    nearest = {}  # pair -> [queries][5] numbers of pictures
    for image, text in pairs_shown:
        vectors = F.normalize(image_inputs(task, image)[list(first.values())].float(), dim=1)  # [pictures, D_i]
        with torch.no_grad():
            connector = vlm.load_connector(run.connector(image, text))
            mapped = vlm.map_text(connector, F.normalize(text_inputs(task, text)[drawn].float(), dim=1))
        nearest[image, text] = (mapped @ vectors.T).topk(min(5, len(pictures)), dim=1).indices.tolist()

    thumbnail = functools.cache(lambda picture: small_jpeg(root / picture))
    lines, table = [], []
    for q, caption in enumerate(rows[place]["caption"] for place in drawn):
        line = f"<td class=caption>{html.escape(caption)}</td>"
        right = {row["image"] for row in rows if row["caption"] == caption}
        for pair in pairs_shown:
            line += "<td>"
            for nth, picture in enumerate(pictures[k] for k in nearest[pair][q]):
                alt, jpeg = html.escape(picture, quote=True), thumbnail(picture)
                tile = f'<img src="data:image/jpeg;base64,{jpeg}" alt="{alt}">' if jpeg else f"<small>{alt}</small>"
                line += f'<span class="tile{" right" if picture in right else ""}">{tile}</span>'
                found = {"picture": picture, "right": picture in right}
                table.append({"caption": caption, "pair": ":".join(pair), "place": nth + 1} | found)
            line += "</td>"
        lines.append(f"<tr>{line}</tr>")
    said = f"Captions of {task.name} drawn at random, and their five nearest of {len(pictures)} pictures, nearest first, by "
    body = f"<p>{html.escape(f'{said} the connectors of {run.folder}. Framed: a picture of that caption.')}</p>"
    if lost := sum(thumbnail(picture) is None for picture in {row["picture"] for row in table}):
        said = f"{lost} pictures are not to be had under {root}; their names stand for them."
        body += f"<p class=warning>{html.escape(said)}</p>"
    heads = "".join(f"<th>{html.escape(':'.join(pair))}: {html.escape(why)}</th>" for pair, why in pairs_shown.items())
    return body + f"<table class=gallery><tr><th>caption</th>{heads}</tr>{''.join(lines)}</table>", table


def small_jpeg(path):
    """A thumbnail as base64, or None for a picture that is missing or unreadable."""
    try:
        picture = vlm.open_image(path)
        picture.thumbnail((112, 112))
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=80)
    except Exception:  # Pillow's errors are of many types, and none may stop a report
        return None
    return base64.b64encode(jpeg.getvalue()).decode()


CSS = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 66rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .3rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc }
.named td:nth-child(2) { overflow-wrap: anywhere; min-width: 8.5rem; max-width: 13rem }
.answer { font-size: 1.15rem; border-left: .35rem solid #0072B2; padding: .3rem .9rem; background: #f3f7fa }
.warning { border-left: .35rem solid #D55E00; padding: .2rem .9rem; background: #fdf4ee }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .8rem; margin: .6rem 0 }
th, td { padding: .22rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e2e2e2 }
th:first-child, td:first-child,
.named td:nth-child(2), .named th:nth-child(2), .pairs td:nth-child(-n + 3), .pairs th:nth-child(-n + 3) { text-align: left }
th { border-bottom: 1.5px solid #777; vertical-align: bottom }
td small { color: #555; display: block; white-space: nowrap } tr.chosen td { font-weight: 600 }
figure { margin: 1.2rem 0 } figure img { max-width: 100%; height: auto }
figcaption { font-size: .85rem; color: #333 } .gallery td, .gallery th { text-align: left }
.gallery td { white-space: nowrap }
.gallery td + td + td, .gallery th + th + th { border-left: 1.5px solid #777; padding-left: .8rem }
.gallery td.caption { white-space: normal; min-width: 6rem; max-width: 11rem; overflow-wrap: anywhere }
.tile { display: inline-block; width: 4.4rem; height: 4.4rem; margin: 2px; border: 1px solid #ddd; text-align: center;
        vertical-align: top; overflow: hidden; white-space: normal; overflow-wrap: anywhere }
.tile img { max-width: 100%; max-height: 100% } .tile.right { border: 3px solid #D55E00; border-bottom-width: 8px }
code { font-size: .9em; overflow-wrap: anywhere } a { color: #0072B2 }
@page { size: A4; margin: 14mm }
@media print { body { font-size: 9.5pt; max-width: none; margin: 0; padding: 0 } table { font-size: 6.6pt }
  th, td { padding: .12rem .28rem } .scroll { overflow: visible } figure, tr { page-break-inside: avoid }
  figure img { max-height: 11.5cm; object-fit: contain; object-position: left }
  h2 { page-break-after: avoid } .named td:nth-child(2) { min-width: 2.6cm } .tile { width: 1.35cm; height: 1.35cm }
  .gallery td.caption { min-width: 2cm; max-width: 3cm }
  .answer, .warning, .tile { -webkit-print-color-adjust: exact; print-color-adjust: exact } }
"""


def number(value, digits=2):
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no minus before a zero


def teraflop(value):
    """Three figures."""
    return "–" if value is None else f"{value / 1e12:.3g}" if value < 1e15 else f"{value / 1e12:,.0f}"


def html_table(heads, rows, classes=None, kind=""):
    """Cells are text, or (text, small print), all escaped here."""

    def cell(value):
        text, small = value if isinstance(value, tuple) else (value, "")
        return html.escape(str(text)) + (f"<small>{html.escape(small)}</small>" if small else "")

    body = "<thead><tr>" + "".join(f"<th>{cell(head)}</th>" for head in heads) + "</tr></thead>"
    for name, row in zip(classes or [""] * len(rows), rows):
        body += f'<tr class="{name}">' + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>\n"
    return f'<div class=scroll><table class="{kind}">{body}</table></div>'


def choice(row, pairs):
    """The pair that a method chose, in words; a tie and seeds that disagree are said."""
    names = [":".join(pairs[k]) for k in row["chosen"]]
    if row["seeds"] > 1 and len(names) > 1:
        return f"{names[0]} or {names[1]}, by seed" if len(names) == 2 else f"{len(names)} pairs, by seed"
    return names[0] if len(names) == 1 else f"a tie of {len(names)}"


def fidelity_table(rows, pairs):
    lines = []
    for row in rows:
        values = [
            (number(row[name]), f"{number(row[f'{name}_low'])}–{number(row[f'{name}_high'])}") for name in METRICS
        ]
        lines.append([row["method"], choice(row, pairs), *values])
    return html_table(["chosen by", "pair", *METRICS.values()], lines, kind="named")


def own_table(rows):
    """How good the connectors of each run are beside the oracle's."""
    heads = ["run", "seeds", "score of its own connector, %", "own less oracle's, all pairs", "best third"]
    keys = ("own_score", "gap_all", "gap_top_third")
    lines = [[row["method"], row["seeds"], *(number(row[key], 1) for key in keys)] for row in rows if row["seeds"]]
    return html_table(heads, lines)


def cost_table(found):
    heads = [
        "method",
        "TFLOP as run",
        "at equal batch",
        "and at equal updates",
        "with embedding",
        "x oracle, equal batch",
    ]
    heads += ["x oracle, with embedding", "seconds", "pair-samples", "updates a pair", "batch", "rows embedded"]
    base, lines = found.costs[found.oracle.name], []
    for name, cost in found.costs.items():
        updates = unique(f"{value}" for value in (cost.updates_low, cost.updates_high) if value is not None)
        line = [name, *(teraflop(value) for value in (cost.flops, cost.flops_equal_batch, cost.flops_equal_updates))]
        line += [teraflop(cost.flops_with_embedding)]
        line += [number(times(cost, base, key), 3) for key in ("flops_equal_batch", "flops_with_embedding")]
        line += [number(cost.seconds, 1), number(cost.pair_samples, 0), " to ".join(updates) or "–"]
        lines.append([*line, cost.batch_size or "–", number(cost.rows_embedded, 0)])
    return html_table(heads, lines)


def ranking_rows(found):
    """ranking.csv: a row a task and pair, truly best first: true score in points, its interval, every method's rank, and
    the score of every run's own connector."""
    table, pairs = [], found.pairs
    ranks = {f"rank by {method.name}": rankdata(-method.orders.mean(0)) for method in found.methods}
    for each in found.judged:
        truth, truths = 100 * true_scores(each, found.oracle), 100 * bootstrap_scores(each, found.oracle, found.drawn)
        columns = {"true_rank": rankdata(-truth), "true_score": truth}
        columns |= dict(zip(("low", "high"), np.percentile(truths, [2.5, 97.5], axis=0))) | ranks
        columns |= {f"score of {name}": 100 * values.mean(0) for name, values in each.scores.items()}
        for k in np.argsort(-truth, kind="stable"):
            row = {"task": each.name, "image": pairs[k][0], "text": pairs[k][1]}
            table.append(row | {name: round(values[k], 3) for name, values in columns.items()})
    return table


def ranking_table(found):
    """The first task's rows of ranking.csv: the pairs, their true scores, and the runs' ranks and scores."""
    runs, lines, classes = [method.name for method in found.methods if method.runs], [], []
    for row in ranking_rows(found)[: len(found.pairs)]:
        line = [f"{row['true_rank']:g}", row["image"], row["text"]]
        line += [(number(row["true_score"], 1), f"{row['low']:.1f} to {row['high']:.1f}")]
        lines.append(line + [(number(row[f"score of {m}"], 1), f"rank {row[f'rank by {m}']:g}") for m in runs])
        classes.append("chosen" if (row["image"], row["text"]) == found.pairs[found.chosen] else "")
    return html_table(["true rank", "image", "text", "true score, %", *runs], lines, classes, "pairs")


def compose(found, tasks, sentence, resamples):
    """(the report from top to bottom: HTML and plots; rows of the gallery's CSV)."""
    oracle, primary, pairs = found.oracle, found.primary, found.pairs
    chosen, worst = pairs[found.chosen], pairs[int(true_scores(found.judged[0], oracle).argmin())]
    body = ["<h1>Which pair to stitch</h1>", f"<p class=answer>{html.escape(sentence)}</p>"]
    body += [f"<p>Its connector: <code>{html.escape(str(primary.runs[0].connector(*chosen)))}</code></p>"]
    body += [f"<p class=warning>{html.escape(line)}</p>" for line in found.warnings]
    for place, (each, rows) in enumerate(zip(found.judged, found.fidelities)):
        about = f"Score: {HEADLINES[each.kind]}; {each.counted}. Protocol: {each.protocol}."
        body += [f"<h2>{html.escape(each.name)}</h2>", f"<p>{html.escape(about)}</p>"]
        body += [fidelity_table(rows, pairs)]
        if place == 0:
            body += [f"<p>{html.escape(READING.format(oracle.name, len(oracle.runs), resamples))}</p>"]
        body += [own_table(rows), cost_against_regret(found, each, rows, f"cost-regret-{place}")]
        if place == 0:
            body += ["<h3>Every pair</h3>", ranking_table(found), rank_scatter(found, each, f"ranks-{place}")]
        beside = [method for method in found.methods if method.runs and method is not oracle] or [oracle]
        for k, method in enumerate(beside if place == 0 else [primary]):
            body += [heatmaps(found, each, method, f"heatmap-{place}-{k}")]
    body += ["<h2>What it cost</h2>", cost_table(found), f"<p>{html.escape(READING_COSTS)}</p>"]
    epochs = [ranking_over_epochs(found, "ranking-over-epochs"), loss_curves(found, "loss")]
    body += ["<h2>Over the epochs</h2>", *epochs] if any(epochs) else []
    if found.spectra:
        body += ["<h2>Before any training</h2>", correlation_spectra(found, "canonical-correlations")]
    shown = {chosen: "the pair to stitch"} | ({worst: "the worst"} if worst != chosen else {})
    tiles, table = gallery(tasks, primary.runs[0], shown)
    body += ["<h2>What the best and the worst pair find</h2>", tiles]
    return [item for item in body if item is not None], table


READING = (
    "True score: what the connectors of the oracle ({0}, seeds: {1}) score on the task. Runs order the pairs by "
    "validation rows, the hypernetwork also, and selectors only, by training rows: no order has seen the rows that judge "
    "it, unless a warning says so. Small print: the 95 % interval over {2} resamples of the task's pictures and of the "
    "seeds; the best of many noisy scores is too high, so intervals of regret lean upwards. NDCG's gain is the true score "
    "minus the worst pair's. Ties in an order are broken at random, in expectation; the last line is a random order's."
)

READING_COSTS = (
    "As run; at the oracle's batch size (the share of the logits grows with the batch); and at its updates of each "
    "trained pair too. A run's cost is one seed's. Selectors train nothing, so theirs does not change. Rows embedded: rows "
    "times encoders. Embedding is the forward pass of those rows, as embed.py counted it; its seconds are not recorded. – where a cost is not known."
)


def method_rows(found):
    """selectors.csv: a row a task and method, runs and selectors alike, with every metric and cost."""
    lines = []
    for row in (row for rows in found.fidelities for row in rows):
        row = (
            row
            | {"chosen": " ".join(":".join(found.pairs[k]) for k in row["chosen"])}
            | found.costs[row["method"]]._asdict()
        )
        lines.append({key: round(float(v), 6) if isinstance(v, float) else v for key, v in row.items()})
    return lines


def write_report(out, title, body, tables, results):
    """Writes every file of the report; what an earlier report left under a name of its own goes.

    body: HTML and plots, top to bottom. tables: {file name: rows}. results: what results.json holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    earlier = vlm.read_json(out / "results.json").get("files", []) if (out / "results.json").is_file() else []
    page, files = "", ["report.html", "results.json"]
    for item in body:
        if isinstance(item, Plot):
            png, said = io.BytesIO(), html.escape(item.caption, quote=True)
            item.figure.savefig(png, dpi=160, metadata={"Software": None})
            with atomic_file(out / f"{item.name}.png") as file:
                file.write(png.getvalue())
            tables |= {f"{item.name}.csv": item.rows}
            files.append(f"{item.name}.png")
            source, wide = base64.b64encode(png.getvalue()).decode(), int(item.figure.get_figwidth() * 96)
            links = f'<a href="{item.name}.png">PNG</a>, <a href="{item.name}.csv">CSV</a>'
            item = f'<figure><img width="{wide}" src="data:image/png;base64,{source}" alt="{said}">'
            item += f"<figcaption>{said} ({links})</figcaption></figure>"
        page += item
    for name, rows in tables.items():
        if rows:
            write_csv(out / name, rows)
            files.append(name)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    head += '<meta name=viewport content="width=device-width, initial-scale=1">'
    write_text(out / "report.html", f"{head}<style>{CSS}</style><body>{page}</body></html>\n")
    write_json(out / "results.json", {"files": files} | results)
    for name in set(earlier) - set(files):
        if re.fullmatch(r"[\w-]+\.(png|csv)", name):
            (out / name).unlink(missing_ok=True)
