"""How the figures look and how they become files: one style, deterministic SVG and PNG.

Colours are Okabe and Ito's, safe for the colour-blind; every model also has a marker and a line style of its
own, so that the figures read in grey. Ink and rules are two fixed greys, which the report swaps for its own.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from palimpsest.report.inputs import METHOD_ORDER, method_name

INK = "#1c1e21"
RULE = "#d4d7db"
GREYS = ("#f2f3f5", "#c3c7cd", "#878d96", "#3d4249")  # four steps, distinct in print too
COLOR_MAP = "cividis"  # even in lightness, hence readable in grey
WIDTH = 7.2  # inches, a two-column page
LEGEND_LINE = 0.18  # inches, of a line of a legend
LINE_HEIGHT = 2.9  # inches, of a figure with one row of line charts
MANY_LINES = 8  # models in one panel; more get a small one each,
ACROSS, PANEL_HEIGHT = 4, 1.3  # so many side by side, of so many inches
MOST_TOLD = 60  # marks that a description lists; it is read aloud in one go

_LABELS = ("axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color")
_RC = {
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.edgecolor", "hatch.color", *_LABELS), INK),
    "hatch.linewidth": 0.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "font.size": 8.5,
    "font.family": ["DejaVu Sans"],
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # names of models and parameters may hold a $
    "svg.fonttype": "none",  # text stays text: searchable, readable aloud
    "svg.hashsalt": "palimpsest",
}


@dataclass(frozen=True)
class Look:
    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


_LOOKS = {
    "base": Look(INK, "o", "solid"),
    "full": Look("#D55E00", "s", (0, (5, 2))),
    "layer_lr": Look("#0072B2", "^", (0, (6, 2, 1, 2))),
    "lora": Look("#009E73", "D", (0, (1, 1))),
}
_OTHERS = (
    Look("#CC79A7", "v", (0, (3, 1, 1, 1, 1, 1))),
    Look("#E69F00", "P", (0, (8, 2))),
    Look("#56B4E9", "X", (0, (2, 2))),
    Look(GREYS[2], "*", (0, (4, 1, 1, 1))),
)


_MORE_MARKERS = ("<", "p", "d", "1", ">", "H", "2", "x", "+")


def look(method: str, methods: Sequence[str]) -> Look:
    """The look of `method` among all `methods` of the run, the same in every figure."""
    if method in _LOOKS:
        return _LOOKS[method]
    others = [name for name in methods if name not in METHOD_ORDER]
    return _other(others.index(method))


def _other(place: int) -> Look:
    """The look of each method that has no fixed one. After the first, markers of their own; no two of 315 are alike."""
    if place < len(_OTHERS):
        return _OTHERS[place]
    place -= len(_OTHERS)
    known = (*_LOOKS.values(), *_OTHERS)
    colors, lines = [one.color for one in known[1:]], [one.line for one in known[1:6]]
    return Look(colors[place % 7], _MORE_MARKERS[place % 9], lines[place % 5])  # lengths without a common divisor


@dataclass
class Drawing:
    """A figure with what a reader who cannot see it needs; `tips` are shown when pointing at a mark."""

    name: str
    title: str
    figure: Figure
    caption: str = ""
    alt: str = ""
    tips: dict[str, str] = field(default_factory=dict)  # SVG id -> text
    svg: str | None = field(default=None, repr=False)  # once it was written, see `to_svg`

    def tip(self, artist: Artist, text: str) -> None:
        gid = f"tip{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def point(self, axis: Axes, x: float, y: float, mark: Look, text: str) -> None:
        """A mark at (x, y) with its tip."""
        (point,) = axis.plot([x], [y], mark.marker, color=mark.color)
        self.tip(point, text)

    def line(self, axis: Axes, xs: Sequence[float], ys: Sequence[float], mark: Look, texts: Sequence[str]) -> None:
        """A line with a mark and its tip at every point."""
        axis.plot(xs, ys, color=mark.color, linestyle=mark.line)
        for x, y, text in zip(xs, ys, texts, strict=True):
            self.point(axis, x, y, mark, text)

    def nothing(self, text: str) -> None:
        """What is said of a value that has no mark."""
        self.tips[f"none{len(self.tips)}"] = text

    def describe(self, kind: str) -> None:
        """The text of every tip as the description of the figure; where they are many, how many."""
        if len(self.tips) > MOST_TOLD:
            self.alt = f"{kind} of {len(self.tips)} values, which stand in the tables of this part."
        else:
            self.alt = f"{kind}: {'; '.join(self.tips.values())}."


@contextmanager
def style() -> Iterator[None]:
    """The style, for drawing and for writing; the caller's own matplotlib settings come back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def to_png(drawing: Drawing) -> bytes:
    """On white, 200 dots per inch, without date or program version."""
    return _saved(drawing, "png", ("Software",))


def _saved(drawing: Drawing, kind: str, without: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    with style():
        drawing.figure.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=dict.fromkeys(without))
        # Its parts have their places now. Finding them takes as long as drawing, so another format takes them over.
        drawing.figure.set_layout_engine(None)
    return buffer.getvalue()


def to_svg(drawing: Drawing) -> str:
    """A standalone SVG on white with a title, a description and the tips; the same bytes every time, written once."""
    if drawing.svg is not None:
        return drawing.svg
    svg = _saved(drawing, "svg", ("Date", "Creator", "Format", "Type")).decode()
    about = f"<title>{escape(drawing.title)}</title><desc>{escape(drawing.alt)}</desc>"
    svg = re.sub(r"(<svg [^>]*>)", lambda match: match[1] + about, svg, count=1)
    tips = {gid: f"<title>{escape(tip)}</title>" for gid, tip in drawing.tips.items()}
    svg = re.sub(r'<g id="(tip\d+)">', lambda match: match[0] + tips.pop(match[1], ""), svg)
    svg = re.sub(r"(?<=data:image/png;base64,)[A-Za-z0-9+/=\s]+", _few_colors, svg)
    svg = re.sub(r' id="image\w+"', "", svg)  # a hash of the map, so that equal ones had the same
    drawing.svg = svg
    return svg


def _few_colors(match: re.Match[str]) -> str:
    """A PNG in base64 as one with a palette, a third of its size: a heat map has no more than 256 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(match[0]))).convert("RGBA")
    colors, places = np.unique(np.asarray(image).reshape(-1, 4), axis=0, return_inverse=True)
    if len(colors) > 256 or (colors[:, 3] < 255).any():
        return match[0]
    small = Image.fromarray(places.reshape(image.height, image.width).astype(np.uint8), "P")
    small.putpalette(colors[:, :3].tobytes())
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def to_inline_svg(drawing: Drawing) -> str:
    """An `<svg>` element for a page: transparent, ids of its own, ink and rules in the page's colours."""
    svg = to_svg(drawing)
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<(metadata|defs)>\s*(<style.*?</style>)?\s*</\1>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<title>.*?</desc>", "", svg, count=1, flags=re.DOTALL)  # the page's alt text says it
    svg = re.sub(r'(<g id="patch_1">.*?fill: )#ffffff', r"\1none", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)(?=[A-Za-z])', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    alt = escape(drawing.alt, quote=True)
    return svg.replace("<svg ", f'<svg class="drawing" role="img" aria-label="{alt}" ', 1)


def small_panels(titles: Sequence[str], xlabel: str, *ylabels: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a small panel for each of `titles`, all on the same axes; for each of `ylabels` such a block."""
    n = len(titles)
    lines = -(-n // ACROSS)
    size = (WIDTH, (0.4 + PANEL_HEIGHT * lines) * len(ylabels))
    figure = Figure(figsize=size, layout="constrained")
    blocks = []
    for part, ylabel in zip(figure.subfigures(len(ylabels), 1, squeeze=False).flat, ylabels, strict=True):
        every = list(part.subplots(lines, ACROSS, squeeze=False, sharex=True, sharey=True).flat)
        for axis in every[n:]:
            axis.remove()
        for axis in every[max(0, n - ACROSS) : n]:  # the last of each column
            axis.tick_params(labelbottom=True)
        for axis, title in zip(every, titles, strict=False):
            axis.set_title(title, fontsize=7.5)
            axis.tick_params(labelsize=7)
        part.supxlabel(xlabel, fontsize=8.5)
        part.supylabel(ylabel, fontsize=8.5)
        blocks.append(every[:n])
    return figure, blocks


def power_of_ten() -> FuncFormatter:
    """10⁵ without mathematical markup, which is switched off."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def written(value: float, _position: object) -> str:
        if value <= 0:
            return ""
        mantissa, exponent = f"{value:.0e}".split("e")
        power = int(exponent)
        if -2 <= power <= 3:
            return f"{value:g}"
        return ("" if mantissa == "1" else f"{mantissa}·") + "10" + str(power).translate(digits)

    return FuncFormatter(written)


def log_labels(axis: Axes) -> None:
    """Powers of ten on the y axis, nothing between them."""
    axis.yaxis.set_major_formatter(power_of_ten())
    axis.yaxis.set_minor_formatter(NullFormatter())


def model_legend(figure: Figure, models: Sequence[str], methods: Sequence[str]) -> None:
    """A line under the figure: `models` by name, looks as everywhere among all `methods` of the run."""
    marks = [look(model, methods) for model in models]
    handles = [Line2D([], [], color=mark.color, marker=mark.marker, linestyle=mark.line) for mark in marks]
    names = [method_name(model) for model in models]
    legend_below(figure, handles, names, most=6, handlelength=3.5)


def legend_below(
    figure: Figure, handles: Sequence[Artist], names: Sequence[str], *, most: int, handlelength: float = 2.0
) -> None:
    """Lines under the figure, in as many columns as fit, at most `most`; the figure grows by what is more than two."""
    # inches: mark, gaps and the longest name at this font size
    column = 0.27 + 0.135 * handlelength + 0.07 * max(map(len, names))
    columns = max(1, min(len(names), most, int(figure.get_figwidth() / column)))
    n_lines = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * max(0, n_lines - 2))
    figure.legend(list(handles), list(names), loc="outside lower center", ncols=columns, handlelength=handlelength)
