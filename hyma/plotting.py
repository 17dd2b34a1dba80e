"""What the figures of a report share: colours, panels, legends, lines."""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hyma.embeddings import unique
from hyma.pair_names import pair_name

# Okabe and Ito's colours, which the colour-blind can tell apart, with markers that survive a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]
GREY = "#c4c4c4"


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
    for axis in axes[count - across : count]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
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


def label_epochs(axis, size):
    """Names the axis across, whose ticks are whole numbers. size: of the font, in points."""
    axis.set_xlabel("epoch", fontsize=size)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_lines(axis, rows, x, y, series, styles):
    """A line for each of `styles`, {series: how it is drawn}, through the rows of that series that have a y.

    rows: dicts. x, y, series: names of their columns.
    """
    for name, style in styles.items():
        across, up = [], []
        for row in rows:
            if row[series] == name and row[y] is not None:
                across.append(row[x])
                up.append(row[y])
        axis.plot(across, up, **style)


def method_style(records, method):
    """How a method's line is drawn, the same in every figure."""
    k = records.methods.index(method)
    colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
    return {"color": colour, "marker": marker, "ms": 3, "lw": 1.3, "label": method}


def pair_styles(records):
    """{pair: how its line is drawn}, in the order of drawing: grey ones, then in colour the worst and the three truly best."""
    pairs = [(row["image"], row["text"]) for row in records.ranking()]
    marked = unique([*pairs[:3], pairs[-1]])
    styles = {}
    for pair in pairs:
        if pair not in marked:
            styles[pair_name(pair)] = {"color": GREY, "lw": 0.9}
    for pair in reversed(marked):
        label = ":".join(map(shorten, pair))
        styles[pair_name(pair)] = {"color": COLOURS[marked.index(pair)], "lw": 2, "label": label}
    return styles
