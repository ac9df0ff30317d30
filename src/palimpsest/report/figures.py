"""The figures of a report by name, and how they are written to a run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from palimpsest.files import UserError, replacing, write_text
from palimpsest.report import charts, curves, glance, heatmaps, trade_off
from palimpsest.report.across_runs import by_method
from palimpsest.report.inputs import Inputs, at, read_inputs, trains, tuned_are_scored
from palimpsest.report.style import Drawing, style, to_png, to_svg
from palimpsest.rundir import figures_in

FIGURES: dict[str, Callable[[Inputs], Drawing | None]] = {
    "figure1": heatmaps.importance,
    "figure2": charts.layers_before_after,
    "figure3": charts.layers_mitigated,
    "figure4": heatmaps.changes,
    "deactivation": charts.deactivation,
    "deletion": curves.deletion,
    "t2t_s2t": charts.plane,
    "frontier": trade_off.frontier,
    "drift": charts.drift,
    "training": curves.training,
    "retention": curves.retention,
}
# Figures that a complete run may lack, with what is said in their place.
OPTIONAL: dict[str, Callable[[Inputs], str]] = {
    "retention": curves.why_no_retention,
    "drift": charts.why_no_drift,
    "frontier": trade_off.why_no_frontier,
}
OF_TUNED_SCORES = ("figure2", "figure3", "figure4")


def draw(name: str, inputs: Inputs) -> Drawing | None:
    """The figure called `name`, of methods rather than their runs; None where the run has no data for it.

    Drawn once for the same `inputs`.

    Raises:
        UserError: there is no such figure.
    """
    if name not in FIGURES:
        raise UserError(f"There is no figure {name!r}; choose one of {', '.join(FIGURES)}.")
    if name not in inputs.drawings:
        with style():
            inputs.drawings[name] = FIGURES[name](by_method(inputs))
    drawing: Drawing | None = inputs.drawings[name]
    return drawing


def first_pictures(inputs: Inputs) -> list[Drawing]:
    """The two pictures of the first screen, fewer where the run has no data for them; only the page has them."""
    with style():
        shown = by_method(inputs)
        return [drawing for drawing in (glance.kept(shown), glance.layers(shown)) if drawing is not None]


def why_not(name: str, inputs: Inputs) -> str:
    """Why `draw` has nothing for the figure called `name`."""
    if name == "training" and not trains(inputs.config):
        return "Nothing was trained in this run: its models were given."
    if name == "figure2" and not _has_full(inputs):
        return "No method of this run is called full; figure3 has its models."
    if name == "t2t_s2t" and _nothing_is_spoken(inputs):
        return "Nothing was asked in speech in this run."
    return OPTIONAL[name](inputs) if name in OPTIONAL else f"The figure “{name}” has no data."


def may_lack(name: str, inputs: Inputs) -> bool:
    """Whether a complete run may be without the figure called `name`."""
    return (
        name in OPTIONAL
        or (name == "training" and not trains(inputs.config))
        or (name == "figure2" and not _has_full(inputs))
        or (name == "t2t_s2t" and _nothing_is_spoken(inputs))
        or (name in OF_TUNED_SCORES and not tuned_are_scored(inputs.config))
    )


def _has_full(inputs: Inputs) -> bool:
    """Whether there can be a figure of the base before and after Full-FT; a run whose recipe is not there may have."""
    methods = at(inputs.config, "methods")
    return not isinstance(methods, dict) or "full" in methods


def _nothing_is_spoken(inputs: Inputs) -> bool:
    asked = {row["modality"] for row in inputs.results["qa"]}
    return bool(asked) and "speech" not in asked


def write_figure(run: Path, name: str) -> list[Path]:
    """Write `run`/figures/`name`.svg and .png and return their paths.

    Raises:
        UserError: there is no such figure, the run has no data for it, or `run` or its figures are not a folder.
    """
    inputs = read_inputs(run)
    paths = _write(run, name, inputs)
    if not paths:
        raise UserError(f"{run}: {why_not(name, inputs)}")
    return paths


def write_figures(run: Path, inputs: Inputs | None = None) -> list[Path]:
    """Write every figure the run has data for, as SVG and PNG, to `run`/figures; return the paths.

    inputs: what `read_inputs` gave for `run`, where that was read already.

    Raises:
        UserError: `run` or its figures are not a folder.
    """
    inputs = read_inputs(run) if inputs is None else inputs
    return [path for name in FIGURES for path in _write(run, name, inputs)]


def _write(run: Path, name: str, inputs: Inputs) -> list[Path]:
    folder = figures_in(run)
    drawing = draw(name, inputs)
    svg, png = (folder / f"{name}.{kind}" for kind in ("svg", "png"))
    if drawing is None:
        svg.unlink(missing_ok=True)  # of an earlier state of the run
        png.unlink(missing_ok=True)
        return []
    write_text(svg, to_svg(drawing))
    with replacing(png) as temporary:
        temporary.write_bytes(to_png(drawing))
    return [svg, png]
