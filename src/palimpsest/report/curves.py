"""Curves of a run: perplexity against the share of weights removed, and what training did step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from palimpsest.records import DeactivationRecord, TrainingRecord
from palimpsest.report.inputs import MAIN_REDUCTION, Inputs, at, method_key, method_name, methods_in
from palimpsest.report.style import INK, LINE_HEIGHT, WIDTH, Drawing, log_labels, look, model_legend
from palimpsest.report.table import median_log, significant

REMOVED = {"top": "Most important removed", "random": "Random removed", "bottom": "Least important removed"}
INPUTS = {"text": "text input", "speech": "speech input"}
MAX_CURVE_POINTS = 120
MAX_TICKS = 5
WIDE_RANGE = 30.0  # largest over smallest value from which an axis is logarithmic


# ----------------------------------------------------------------------------------------------------------
# Deletion curves
# ----------------------------------------------------------------------------------------------------------
def deletion(inputs: Inputs) -> Drawing | None:
    """Perplexity against the share of weights at zero: a row per input, a column per way of choosing them."""
    rows = _one_setting(inputs.results["deactivation"])
    ratios = sorted({row["ratio"] for row in rows if row["condition"] != "base"})
    if not ratios:
        return None
    modalities = [name for name in INPUTS if any(row["modality"] == name for row in rows)]
    conditions = [name for name in REMOVED if any(row["condition"] == name for row in rows)]
    models = sorted({row["model"] for row in rows}, key=method_key)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.0 * len(modalities)), layout="constrained")
    panels = figure.subplots(len(modalities), len(conditions), squeeze=False, sharex=True, sharey=True)
    drawing = Drawing("deletion", "Deletion curves", "", "", figure)
    nothing = ratios[0] / (ratios[1] / ratios[0] if len(ratios) > 1 else 3.0)  # where the axis shows 0
    for i, modality in enumerate(modalities):
        for j, condition in enumerate(conditions):
            axis = panels[i, j]
            for model in models:
                curve = [r for r in rows if (r["model"], r["modality"]) == (model, modality)]
                _deletion_line(drawing, axis, curve, model, condition, nothing, methods_in(inputs.results))
            axis.set(xscale="log", yscale="log")
            axis.set_title(REMOVED[condition] if i == 0 else "")
        panels[i, 0].set_ylabel(f"perplexity, {INPUTS[modality]}")
        log_labels(panels[i, 0])
    step = -(-len(ratios) // MAX_TICKS)
    shown = ratios[::-1][::step][::-1]
    panels[0, 0].set_xticks([nothing, *shown], ["0", *(f"{100 * ratio:g}" for ratio in shown)])
    panels[0, 0].set_xticks([], minor=True)
    panels[0, 0].set_xlim(nothing / 1.4, ratios[-1] * 1.4)
    panels[-1, len(conditions) // 2].set_xlabel("weights set to zero, % (logarithmic)")
    model_legend(figure, models, methods_in(inputs.results))
    example = next(row for row in rows if row["condition"] != "base")
    drawing.caption = (
        f"Perplexity of the held-out answers against the share of the weights set to zero (scope {example['scope']}, "
        f"scores {example['reduction']}), both logarithmic, one scale for all panels; at 0 nothing is removed. "
        "Random: median over the masks, the bars span the smallest and the largest."
        + (" This run has one ratio, so the lines have no points between." if len(ratios) == 1 else "")
    )
    drawing.alt = "Line charts: " + "; ".join(drawing.tips.values()) + "."
    return drawing


def _one_setting(records: Sequence[DeactivationRecord]) -> list[DeactivationRecord]:
    """The records of one scope and reduction: those with the most ratios, then the paper's; and the whole models."""
    ratios: dict[tuple[str, str], set[float]] = {}
    for row in records:
        if row["condition"] in REMOVED:
            ratios.setdefault((row["scope"], row["reduction"]), set()).add(row["ratio"])
    if not ratios:
        return []
    best = max(ratios, key=lambda key: (len(ratios[key]), key[0] == "global", key[1] == MAIN_REDUCTION))
    return [row for row in records if row["condition"] == "base" or (row["scope"], row["reduction"]) == best]


def _deletion_line(
    drawing: Drawing,
    axis: Axes,
    rows: Sequence[DeactivationRecord],
    model: str,
    condition: str,
    nothing: float,
    methods: Sequence[str],
) -> None:
    """The curve of one model; a perplexity that is not finite has no point but a sign at the upper edge."""
    by_ratio: dict[float, list[float | None]] = {}
    for row in rows:
        if row["condition"] == condition:
            by_ratio.setdefault(row["ratio"], []).append(row["perplexity"])
    if not by_ratio:
        return
    whole = next((row["perplexity"] for row in rows if row["condition"] == "base"), None)
    if whole is not None:
        by_ratio[0.0] = [whole]
    mark = look(model, methods)
    points: list[tuple[float, float]] = []
    for ratio in sorted(by_ratio):
        where = f"{method_name(model)}, {rows[0]['modality']}, {100 * ratio:g} % ({condition}) removed"
        x, values = ratio or nothing, by_ratio[ratio]
        middle = math.inf
        if condition == "random":  # one mask that is not finite does not hide the others
            middle = math.exp(median_log(values)[0])
        elif None not in values:
            middle = fmean(cast(list[float], values))
        if math.isinf(middle):
            axis.annotate("∞", (x, 1), xycoords=("data", "axes fraction"), ha="center", va="top", color=mark.color)
            drawing.tips[f"none{len(drawing.tips)}"] = f"{where}: not finite"
            continue
        finite = [value for value in values if value is not None]
        points.append((x, middle))
        (point,) = axis.plot([x], [points[-1][1]], mark.marker, color=mark.color)
        drawing.tip(point, f"{where}: {significant(points[-1][1])}")
        if len(finite) > 1:
            axis.plot([x, x], [min(finite), max(finite)], color=mark.color, linewidth=1)
    if points:
        axis.plot(*zip(*points, strict=True), color=mark.color, linestyle=mark.line)


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------
def training(inputs: Inputs) -> Drawing | None:
    """Training loss by step, averaged in windows where a run has more steps than the figure can show."""
    records = [row for row in _of_kind(inputs, "train") if row["loss"] is not None]
    methods = sorted({row["method"] for row in records}, key=method_key)
    if not methods:
        return None
    figure = Figure(figsize=(WIDTH, LINE_HEIGHT), layout="constrained")
    axis = figure.subplots()
    drawing = Drawing("training", "Training loss", "", "", figure)
    ends = []
    for method in methods:
        rows = sorted((row for row in records if row["method"] == method), key=lambda row: row["step"])
        windows = np.array_split(
            np.array([(row["step"], row["loss"]) for row in rows]), min(len(rows), MAX_CURVE_POINTS)
        )
        steps, losses = np.array([window.mean(axis=0) for window in windows]).T
        mark = look(method, methods_in(inputs.results))
        (line,) = axis.plot(
            steps,
            losses,
            color=mark.color,
            linestyle=mark.line,
            marker=mark.marker,
            markevery=max(1, len(steps) // 8),
        )
        ends.append(f"{method_name(method)} from {significant(losses[0])} to {significant(losses[-1])}")
        drawing.tip(line, ends[-1])
    axis.set(xlabel="step", ylabel="loss, nats per supervised token")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    model_legend(figure, methods, methods_in(inputs.results))
    drawing.caption = f"Training loss, mean of each window of steps: {'; '.join(ends)}.{_phases(axis, records)}"
    drawing.alt = f"Line chart of the training loss: {'; '.join(ends)}."
    return drawing


def retention(inputs: Inputs) -> Drawing | None:
    """Held-out perplexity by training step, a panel per input; None where no method has two measurements."""
    records = [row for row in _of_kind(inputs, "eval") if row.get("perplexity") is not None]
    curves: dict[tuple[str, str], list[TrainingRecord]] = {}
    for row in sorted(records, key=lambda row: row["step"]):
        curves.setdefault((row.get("modality", "text"), row["method"]), []).append(row)
    curves = {key: rows for key, rows in curves.items() if len(rows) > 1}
    if not curves:
        return None
    modalities = [name for name in INPUTS if any(of == name for of, _ in curves)]
    figure = Figure(figsize=(WIDTH, LINE_HEIGHT), layout="constrained")
    drawing = Drawing("retention", "Held-out perplexity during training", "", "", figure)
    panels = figure.subplots(1, len(modalities), squeeze=False)[0]
    methods = sorted({method for _, method in curves}, key=method_key)
    ends, with_base = [], False
    for axis, modality in zip(panels, modalities, strict=True):
        for method in (name for name in methods if (modality, name) in curves):
            rows = curves[modality, method]
            _retention_line(drawing, axis, rows, method, modality, methods_in(inputs.results))
            first, last = (significant(row["perplexity"]) for row in (rows[0], rows[-1]))
            ends.append(f"{method_name(method)}, {INPUTS[modality]}, from {first} to {last}")
        with_base |= _base_line(drawing, axis, inputs, modality, [r for r in records if r.get("modality") == modality])
        axis.set(title=f"{INPUTS[modality].capitalize()}", xlabel="step", ylabel="perplexity")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        values = [row["perplexity"] for (of, _), rows in curves.items() if of == modality for row in rows]
        if max(values) > WIDE_RANGE * min(values):
            axis.set_yscale("log")
            log_labels(axis)
    model_legend(figure, [*(["base"] if with_base else []), *methods], methods_in(inputs.results))
    drawing.caption = (
        f"Perplexity of the held-out answers between the steps of training: {'; '.join(ends)}."
        + (" Level line: the base model, before training." if with_base else "")
        + _phases(panels[0], records)
    )
    drawing.alt = f"Line charts of the held-out perplexity: {'; '.join(ends)}."
    return drawing


def why_no_retention(inputs: Inputs) -> str:
    """The sentence that stands where the figure would."""
    if not any(row.get("perplexity") is not None for row in _of_kind(inputs, "eval")):
        if at(inputs.config, "training", "eval_every") is None:
            return (
                "There is no curve of held-out perplexity during training: the recipe does not set "
                "training.eval_every, the number of steps between two measurements."
            )
        return "There is no curve of held-out perplexity during training: results.json has no measurement."
    return (
        "There is no curve of held-out perplexity during training: no method has more than one measurement; set "
        "training.eval_every in the recipe to fewer steps."
    )


def _of_kind(inputs: Inputs, kind: str) -> list[TrainingRecord]:
    return [row for row in inputs.results["training"] if row.get("kind", "train") == kind]


def _retention_line(
    drawing: Drawing, axis: Axes, rows: Sequence[TrainingRecord], method: str, modality: str, methods: Sequence[str]
) -> None:
    mark = look(method, methods)
    steps, values = [row["step"] for row in rows], [row["perplexity"] for row in rows]
    axis.plot(steps, values, color=mark.color, linestyle=mark.line)
    for step, value in zip(steps, values, strict=True):
        (point,) = axis.plot([step], [value], mark.marker, color=mark.color)
        drawing.tip(point, f"{method_name(method)}, {INPUTS[modality]}, step {step}: {significant(value)}")


def _base_line(drawing: Drawing, axis: Axes, inputs: Inputs, modality: str, records: Sequence[TrainingRecord]) -> bool:
    """The base model's perplexity, drawn only where it was measured on the same tokens as the curves."""
    tokens = {row.get("n_tokens") for row in records}
    for row in inputs.results["perplexity"]:
        of = (row["method"], row["modality"], row["task"])
        if of == ("base", modality, "heldout") and tokens == {row["n_tokens"]} and row["perplexity"] is not None:
            line = axis.axhline(row["perplexity"], color=INK, linewidth=1)
            drawing.tip(line, f"Base, {INPUTS[modality]}: {significant(row['perplexity'])}")
            return True
    return False


def _phases(axis: Axes, records: Sequence[TrainingRecord]) -> str:
    """Mark where the adaptor's phase ends, where all methods agree on it; returns what the caption says of it."""
    last: dict[str, int] = {}
    for row in records:
        if row.get("phase") == "adaptor":
            last[row["method"]] = max(row["step"], last.get(row["method"], 0))
    ends = set(last.values())
    if len(ends) != 1:
        return ""
    axis.axvline(ends.pop() + 0.5, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    return " Dotted upright line: before it only the adaptor is trained."
