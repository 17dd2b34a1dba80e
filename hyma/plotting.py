"""What the figures of a report share: colours, panels, legends, lines, what the pointer shows, the two files of each."""

import io
import math
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hyma.embeddings import unique
from hyma.pair_names import pair_name

# Okabe and Ito's colours, which the colour-blind can tell apart, with markers that survive a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h", "p"]
DASHES = ["-", "--", ":", "-."]
GREY = "#b8b8b8"
INK = "#1b1b1b"  # on light cells, whatever the page's own colours

# A method has the colour of the words that its name begins with, in every report. Methods with the same words differ in
# marker and dash; what has no words here, the selectors that train nothing, shares one colour.
METHOD_COLOURS = {
    "hyma factored": "#0072B2",
    "hyma mlp": "#56B4E9",
    "grid mlp": "#D55E00",
    "halving mlp": "#009E73",
    "ridge mlp": "#CC79A7",
    "whitened mlp": "#9467BD",
    "procrustes mlp": "#E69F00",
    "unicon mlp": "#8C6D31",
    "connectors in": "#A6761D",
}
SELECTOR_COLOUR = "#7A8793"


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


def shorten(name, most=22):
    """A name that fits into a figure, of so many letters; its CSV has the whole."""
    return name if len(name) <= most else f"{name[: most - 10]}…{name[-9:]}"


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
        if across:
            # A wide line that cannot be seen, which the pointer finds more easily.
            (wide,) = axis.plot(across, up, color=style["color"], lw=9, alpha=0)
            show_on_pointer(wide, f"{name}: {y} {up[0]:.4g} to {up[-1]:.4g}, {x} {across[0]:g} to {across[-1]:g}")


def method_style(records, method):
    """How a method's line is drawn, the same in every figure; its colour is the same in every report."""
    family = method_family(method)
    nth = [name for name in records.methods if method_family(name) == family].index(method)
    colour = METHOD_COLOURS.get(family, SELECTOR_COLOUR)
    marker, dash = MARKERS[nth % len(MARKERS)], DASHES[nth % len(DASHES)]
    return {"color": colour, "marker": marker, "ls": dash, "ms": 3, "lw": 1.3, "label": method}


def method_family(method):
    """The key of METHOD_COLOURS that a method's name begins with, None of a selector."""
    for family in METHOD_COLOURS:
        if method.startswith(family):
            return family
    return None


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


# ---------------------------------------------------------------------------------------------------- the two files


def show_on_pointer(artist, text):
    """On the page, this text appears where the pointer is on the artist."""
    artist.set_gid(f"tip {text}")


def to_png(figure):
    """The figure as a file: bytes that are the same each time."""
    png = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # a name may have dollar signs
        figure.savefig(png, dpi=160, metadata={"Software": None})
    return png.getvalue()


def to_svg(figure):
    """The figure as a part of the page: text in the page's colour, nothing behind it, and texts for the pointer."""
    svg = io.StringIO()
    # Text stays text; a fixed salt makes the names of clipping paths, and so the bytes, the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hyma", "text.parse_math": False}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = svg.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Matplotlib escapes what stands in an attribute, so a name cannot bring markup of its own.
    drawing = re.sub(r'<g id="tip ([^"]*)">', r'<g class="tip"><title>\1</title>', drawing)
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)
    drawing = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', drawing)
    return drawing.replace("#000000", "currentColor")
