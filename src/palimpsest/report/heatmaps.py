"""Heat maps of single weight matrices: importance (Figure 1) and parameter change (Figure 4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from textwrap import fill

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter

from palimpsest.report.inputs import Inputs, at, method_key, method_name
from palimpsest.report.style import COLOR_MAP, WIDTH, Drawing, power_of_ten

SHOWN_KINDS = ("q_proj", "o_proj", "up_proj", "down_proj")  # two of attention, two of the MLP
N_DECADES = 5  # of the colour scale below the largest value
MANY_METHODS = 6  # more stand two abreast


def importance(inputs: Inputs) -> Drawing | None:
    """Figure 1: importance of a few matrices of the base model, each relative to its largest entry."""
    names = _representative([name for model, name in inputs.importance_maps if model == "base"])
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 2.1), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    image = None
    for axis, name in zip(axes, names, strict=True):
        array = inputs.importance_maps["base", name]
        # Matrices differ in size and scale; what Figure 1 shows is where in a matrix the importance sits.
        image = _show(axis, array / (float(array.max()) or 1.0), 1.0)
        axis.set_title(short_name(name), fontsize=8)
    assert image is not None
    _color_bar(figure, image, list(axes), "importance / largest")
    axes[0].set_ylabel("output (row)")
    figure.supxlabel("input (column)", fontsize=8.5)
    reduction = at(inputs.config, "importance", "reduction")
    return Drawing(
        "figure1",
        "Figure 1. Importance of single weight matrices, base model",
        figure,
        f"Text importance{f' ({reduction})' if reduction else ''} of single weight matrices of the base model, "
        "logarithmic colours, each matrix relative to its largest entry and drawn as a square. Each pixel is the "
        "largest value of its block of entries. Bright lines are rows and columns that hold much of the importance.",
        f"{len(names)} heat maps of parameter importance: {', '.join(short_name(name) for name in names)}.",
    )


def changes(inputs: Inputs) -> Drawing | None:
    """Figure 4: absolute parameter change of each method, all on one logarithmic scale."""
    maps = inputs.delta_maps
    methods = sorted({method for method, _ in maps}, key=method_key)
    common = [name for name in sorted({name for _, name in maps}) if all((method, name) in maps for method in methods)]
    names = _representative(common)[:3]
    if not names:
        return None
    largest = max(float(np.abs(maps[method, name]).max()) for method in methods for name in names)
    abreast = 1 if len(methods) <= MANY_METHODS else 2  # methods side by side
    lines = -(-len(methods) // abreast)
    height = 1.9 if abreast == 1 else 1.0
    figure = Figure(figsize=(WIDTH, 0.5 + height * lines), layout=ConstrainedLayoutEngine(w_pad=0.08))
    axes = figure.subplots(lines, abreast * len(names), squeeze=False)
    image = None
    for place, method in enumerate(methods):
        row, left = place % lines, place // lines * len(names)
        for column, name in enumerate(names, left):
            image = _show(axes[row, column], np.abs(maps[method, name]), largest)
            if row == 0:
                axes[row, column].set_title(short_name(name), fontsize=8 if abreast == 1 else 6.5)
        if abreast == 1:
            axes[row, 0].set_ylabel(method_name(method), fontweight="bold")
        else:
            axes[row, left].set_ylabel(_in_lines(method_name(method)), fontweight="bold", fontsize=6.5)
    for axis in list(axes.flat):
        if not axis.images:
            axis.remove()
    assert image is not None
    _color_bar(figure, image, figure.axes[:], "absolute change of the weight")
    return Drawing(
        "figure4",
        "Figure 4. Parameter change by method",
        figure,
        "Absolute change of the weights from the base model, one logarithmic scale for all panels. Each "
        "pixel is the largest value of its block of entries; the darkest colour also stands for no change.",
        f"Heat maps of the parameter change of {', '.join(method_name(method) for method in methods)} "
        f"in {', '.join(short_name(name) for name in names)}.",
    )


def _in_lines(name: str, width: int = 15) -> str:
    """`name` in lines of `width` characters, the height of a panel, that end at spaces, hyphens and underscores."""
    return fill(name.replace("_", "_ "), width).replace("_ ", "_")


def short_name(name: str) -> str:
    """`model.layers.14.self_attn.q_proj.weight` → `layer 14, q_proj`."""
    match = re.search(r"layers\.(\d+)\.(?:.*\.)?(\w+)\.weight$", name)
    return f"layer {match[1]}, {match[2]}" if match else name


def _representative(names: Sequence[str]) -> list[str]:
    """Up to four names: of each shown kind the one nearest the middle layer, then whatever is there."""
    layers = {name: int(match[1]) for name in names if (match := re.search(r"layers\.(\d+)\.", name))}
    middle = max(layers.values(), default=0) / 2
    by_distance = sorted(names, key=lambda name: (abs(layers.get(name, 0) - middle), name))
    of_kind = ([name for name in by_distance if f".{kind}." in name][:1] for kind in SHOWN_KINDS)
    return list(dict.fromkeys([*chain.from_iterable(of_kind), *by_distance]))[: len(SHOWN_KINDS)]


def _show(axis: Axes, array: npt.NDArray[np.float32], largest: float) -> AxesImage:
    """`array` (rows, columns), non-negative, on a logarithmic scale that ends at `largest`."""
    if largest <= 0:
        largest = 1.0  # nothing changed at all: one even panel
    colors = colormaps[COLOR_MAP]
    colors = colors.with_extremes(bad=colors(0.0))  # zero has no logarithm
    image = axis.imshow(
        np.ma.masked_less_equal(np.nan_to_num(array), 0),
        cmap=colors,
        norm=LogNorm(largest * 10.0**-N_DECADES, largest),
        interpolation="none",  # the viewer gets the map's own pixels
        aspect="auto",
    )
    axis.set_box_aspect(1)
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    return image


def _color_bar(figure: Figure, image: AxesImage, axes: list[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, format=power_of_ten(), extend="min")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label(label)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # one small image instead of 256 rectangles
