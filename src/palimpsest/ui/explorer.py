"""Where a run's importance sits: layers × kinds of a model against the base; one matrix, its rows and columns.

All from the files of the run directory; no model is loaded.

Legend: rows = outputs, columns = inputs of a weight matrix, as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from palimpsest.analysis.clustering import concentration
from palimpsest.analysis.maps import block_map
from palimpsest.files import UserError, read_json
from palimpsest.models.anatomy import layer_index
from palimpsest.records import BASE
from palimpsest.report.heatmaps import short_name
from palimpsest.report.inputs import Inputs, at, main_reduction, method_key, method_name
from palimpsest.report.style import COLOR_MAP, power_of_ten, style
from palimpsest.rundir import folder_of

N_DECADES = 5  # of a matrix's colour scale below its largest value
MEASURES = {"mean": "mean of a weight", "total": "sum over the matrices"}


@dataclass(frozen=True)
class Grid:
    """Importance of one model by layer (rows) and module kind (columns); NaN where there is no such matrix."""

    model: str
    kinds: tuple[str, ...]
    values: NDArray[np.float64]  # (layers, kinds)


@dataclass(frozen=True)
class Matrix:
    """Importance of one weight matrix: a map of it, and the sums of its rows and columns where they are known."""

    model: str
    name: str
    shape: tuple[int, int] | None
    map: NDArray[np.float32]
    rows: NDArray[np.float64] | None
    columns: NDArray[np.float64] | None
    note: str


# ----------------------------------------------------------------------------------------------------------
# What there is to choose
# ----------------------------------------------------------------------------------------------------------
def models_of(inputs: Inputs) -> list[str]:
    """Models with importance in the tables, in the maps or as score files; base first."""
    names = {row["model"] for row in inputs.results["layers"]} | {model for model, _ in inputs.importance_maps}
    names |= {folder.parent.name for folder in inputs.path.glob("methods/*/importance")}
    if (inputs.path / BASE / "importance").is_dir():
        names.add(BASE)
    return sorted(names, key=method_key)


def missing_from(inputs: Inputs) -> list[str]:
    """What the run lacks of what is shown here: results.json, its table of layers, the maps of importance."""
    return [
        line
        for line in inputs.missing
        if "“layers”" in line or "maps/importance" in line or ("results.json" in line and "“" not in line)
    ]


def reductions_of(inputs: Inputs) -> list[str]:
    """Reductions of the layer table, the one the claims are decided on first."""
    main = main_reduction(inputs.results)
    return sorted({row["reduction"] for row in inputs.results["layers"]}, key=lambda name: (name != main, name))


def matrices_of(inputs: Inputs) -> list[str]:
    """Parameter names, in the order of the model: those of the base's scores, or those there are maps of."""
    scores = inputs.path / BASE / "importance" / "scores.json"
    if scores.is_file():
        return [parameter["name"] for parameter in read_json(scores)["metadata"]["parameters"]]
    return sorted({name for _, name in inputs.importance_maps}, key=lambda name: (layer_index(name) or 0, name))


# ----------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------
def grid(inputs: Inputs, model: str, reduction: str, measure: str) -> Grid:
    """Raises UserError where results.json has no layers of that model and reduction."""
    rows = [
        row
        for row in inputs.results["layers"]
        if (row["model"], row["reduction"]) == (model, reduction) and row["kind"] != "all"
    ]
    if not rows:
        raise UserError(
            f"results.json has no layers of {method_name(model)} by {reduction}; finish the study to see them."
        )
    kinds = tuple(dict.fromkeys(row["kind"] for row in rows))
    values = np.full((1 + max(row["layer"] for row in rows), len(kinds)), np.nan)
    for row in rows:
        values[row["layer"], kinds.index(row["kind"])] = row["mean"] if measure == "mean" else row["total"]
    return Grid(model, kinds, values)


def matrix(inputs: Inputs, model: str, name: str, reduction: str) -> Matrix:
    """From the model's score files; where they are gone, from maps/importance.npz, which the note says.

    Raises UserError where neither has it.
    """
    folder = inputs.path / folder_of(model) / "importance"
    if (folder / "scores.json").is_file():
        from palimpsest.importance.scores import Scores

        scores = Scores.open(folder).tensors(reduction)
        if name not in scores:
            raise UserError(f"{folder} has no scores of {name}; choose another matrix.")
        values = scores[name].numpy()
        if values.ndim != 2:
            raise UserError(f"{name} has {values.ndim} dimensions; choose a matrix.")
        rows, columns = values.sum(1, dtype=np.float64), values.sum(0, dtype=np.float64)
        return Matrix(model, name, values.shape, block_map(values), rows, columns, _held(rows, columns))
    drawn = at(inputs.config, "importance", "reduction")
    if (model, name) in inputs.importance_maps and drawn in (None, reduction):
        note = f"{folder.relative_to(inputs.path)} is not there: from maps/importance.npz, without the exact sums."
        return Matrix(model, name, None, inputs.importance_maps[model, name], None, None, note)
    raise UserError(
        f"{folder.relative_to(inputs.path)} is not there and maps/importance.npz has no map of {short_name(name)} "
        f"by {reduction} for {method_name(model)}."
    )


def _held(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> str:
    by_row, by_column = (float(concentration(sums[None])["top5"][0]) for sums in (rows, columns))
    return f"the top 5 % of its rows hold {100 * by_row:.1f} %, of its columns {100 * by_column:.1f} %"


# ----------------------------------------------------------------------------------------------------------
# Drawing, on white
# ----------------------------------------------------------------------------------------------------------
def draw_grids(base: Grid | None, tuned: Grid | None, measure: str) -> Figure:
    """Both models on one logarithmic scale, and where the tuned one's share of its total rose or fell."""
    grids = [g for g in (base, tuned) if g is not None]
    if not grids:
        raise UserError("There is no importance by layer to draw.")
    comparable = len(grids) == 2 and len({(g.kinds, g.values.shape) for g in grids}) == 1
    n_layers = max(len(g.values) for g in grids)
    known = np.concatenate([g.values[np.isfinite(g.values) & (g.values > 0)] for g in grids])
    scale = LogNorm(float(known.min()), float(known.max())) if known.size else LogNorm(0.1, 1)
    with style():
        n_panels = len(grids) + comparable
        size = (3.4 * n_panels + 0.4, 1.2 + 0.16 * max(n_layers, 12))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots(1, n_panels, squeeze=False)[0]
        for axis, one in zip(axes, grids, strict=False):
            image = axis.imshow(np.ma.masked_invalid(one.values), cmap=COLOR_MAP, norm=scale, aspect="auto")
            _name_cells(axis, one, method_name(one.model))
        bar = figure.colorbar(image, ax=list(axes[: len(grids)]), fraction=0.05, format=power_of_ten())
        bar.ax.minorticks_off()
        bar.set_label(f"importance, {MEASURES[measure]}")
        if comparable:
            _draw_shift(figure, axes[-1], *grids)
    return figure


def _draw_shift(figure: Figure, axis: Axes, base: Grid, tuned: Grid) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2((tuned.values / np.nansum(tuned.values)) / (base.values / np.nansum(base.values)))
    change = np.where(np.isfinite(change), change, np.nan)
    most = max(0.01, float(np.nanmax(np.abs(change), initial=0.0)))
    image = axis.imshow(np.ma.masked_invalid(change), cmap="PuOr_r", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
    _name_cells(axis, tuned, "Shift of the share")
    bar = figure.colorbar(image, ax=axis, fraction=0.05)
    bar.set_label("log₂ of share after / before")


def _name_cells(axis: Axes, one: Grid, title: str) -> None:
    n_layers = len(one.values)
    step = 1 if n_layers <= 16 else 2 if n_layers <= 32 else 4
    axis.set_title(title)
    axis.set_xticks(range(len(one.kinds)), one.kinds, rotation=45)
    axis.set_yticks(range(0, n_layers, step))
    axis.set_ylabel("layer")
    axis.grid(visible=False)


def draw_matrices(matrices: Sequence[Matrix]) -> Figure:
    """Each matrix with the sums of its columns above and of its rows beside it, all on the same scales."""
    if not matrices:
        raise UserError("There is no such matrix to draw.")
    largest = max(float(one.map.max()) for one in matrices) or 1.0
    tops = [float(sums.max()) for one in matrices for sums in (one.rows, one.columns) if sums is not None]
    with style():
        figure = Figure(figsize=(5.2 * len(matrices), 4.9), layout="constrained", facecolor="white")
        image: Any = None
        for part, one in zip(figure.subfigures(1, len(matrices), squeeze=False)[0], matrices, strict=True):
            part.set_facecolor("white")
            layout = part.add_gridspec(2, 2, width_ratios=(4, 1), height_ratios=(1, 4))
            box = part.add_subplot(layout[1, 0])
            colors = colormaps[COLOR_MAP]
            image = box.imshow(
                np.ma.masked_less_equal(np.nan_to_num(one.map), 0),
                cmap=colors.with_extremes(bad=colors(0.0)),
                norm=LogNorm(largest * 10.0**-N_DECADES, largest),
                interpolation="none",
                aspect="auto",
                extent=(0, one.shape[1], one.shape[0], 0) if one.shape else None,
            )
            box.grid(visible=False)
            box.set_xlabel("input (column)")
            box.set_ylabel("output (row)")
            part.suptitle(method_name(one.model), fontweight="bold", fontsize=10)
            if one.rows is not None and one.columns is not None:
                above = part.add_subplot(layout[0, 0], sharex=box)
                above.plot(np.arange(len(one.columns)) + 0.5, one.columns, linewidth=0.7, color="#0072B2")
                above.set_ylim(0, 1.05 * (max(tops) or 1.0))
                above.tick_params(labelbottom=False)
                above.set_ylabel("column sum")
                beside = part.add_subplot(layout[1, 1], sharey=box)
                beside.plot(one.rows, np.arange(len(one.rows)) + 0.5, linewidth=0.7, color="#D55E00")
                beside.set_xlim(0, 1.05 * (max(tops) or 1.0))
                beside.tick_params(labelleft=False)
                beside.set_xlabel("row sum")
                beside.locator_params(axis="x", nbins=3)
            bar = part.colorbar(image, ax=box, location="bottom", fraction=0.04, format=power_of_ten(), extend="min")
            bar.ax.minorticks_off()
            bar.set_label("importance, largest of each block")
    return figure


def about(matrices: Sequence[Matrix]) -> str:
    """A line per matrix: what its rows and columns hold, or where it comes from."""
    return "\n".join(f"{method_name(one.model)}: {one.note}." for one in matrices).replace("..", ".")
