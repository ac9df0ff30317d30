"""Curves of a run: perplexity against the share of weights removed, and what training did step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from palimpsest.records import DeactivationRecord, TrainingRecord
from palimpsest.report.across_runs import n_runs
from palimpsest.report.inputs import (
    MAIN_REDUCTION,
    Inputs,
    at,
    having,
    in_order,
    method_key,
    method_name,
    methods_in,
    whole_models,
)
from palimpsest.report.style import (
    GREYS,
    INK,
    LINE_HEIGHT,
    MANY_LINES,
    WIDTH,
    Drawing,
    Look,
    legend_below,
    log_labels,
    look,
    model_legend,
    small_panels,
)
from palimpsest.report.table import grouped, middle, significant

REMOVED = {"top": "Most important removed", "random": "Random removed", "bottom": "Least important removed"}
INPUTS = {"text": "text input", "speech": "speech input"}
SHARE_REMOVED = "weights set to zero, % (logarithmic)"
COLORS = {"top": "#D55E00", "random": GREYS[2], "bottom": "#0072B2"}  # of many models, a panel each
LINES: dict[str, str | tuple[int, tuple[int, ...]]] = {"text": "solid", "speech": (0, (3, 2))}
MAX_CURVE_POINTS = 120
MAX_TICKS = 5
WIDE_RANGE = 30.0  # largest over smallest value from which an axis is logarithmic


# ----------------------------------------------------------------------------------------------------------
# Deletion curves
# ----------------------------------------------------------------------------------------------------------
def deletion(inputs: Inputs) -> Drawing | None:
    """Perplexity against the share of weights at zero: a row per scope and input, a column per way of choosing them."""
    by_scope = _longest(inputs.results["deactivation"])
    rows = [row for found in by_scope.values() for row in found]
    ratios = sorted({row["ratio"] for row in rows if row["condition"] != "base"})
    if not ratios:
        return None
    methods = methods_in(inputs.results)
    modalities = [name for name in INPUTS if having(rows, modality=name)]
    conditions = [name for name in REMOVED if having(rows, condition=name)]
    models = sorted({row["model"] for row in rows}, key=method_key)
    nothing = ratios[0] / (ratios[1] / ratios[0] if len(ratios) > 1 else 3.0)  # where the axis shows 0
    if len(models) > MANY_LINES:
        return _deletion_each(by_scope, models, ratios, nothing)
    lines = [(scope, modality) for scope in by_scope for modality in modalities]
    figure = Figure(figsize=(WIDTH, 0.7 + 2.0 * len(lines)), layout="constrained")
    panels = figure.subplots(len(lines), len(conditions), squeeze=False, sharex=True, sharey=True)
    drawing = Drawing("deletion", "Deletion curves", figure)
    for i, (scope, modality) in enumerate(lines):
        of_scope = f", {scope}" if len(by_scope) > 1 else ""
        for j, condition in enumerate(conditions):
            axis = panels[i, j]
            for model in models:
                curve = having(by_scope[scope], model=model, modality=modality)
                _deletion_line(drawing, axis, curve, condition, nothing, look(model, methods), of_scope)
            axis.set(xscale="log", yscale="log")
            axis.set_title(REMOVED[condition] if i == 0 else "")
        panels[i, 0].set_ylabel(f"perplexity, {INPUTS[modality]}" + of_scope.replace(", ", ",\n"))
        log_labels(panels[i, 0])
    _removed_shares(panels[0, 0], ratios, nothing, MAX_TICKS)
    panels[-1, len(conditions) // 2].set_xlabel(SHARE_REMOVED)
    model_legend(figure, models, methods)
    example = next(row for row in rows if row["condition"] != "base")
    drawing.caption = (
        "Perplexity of the held-out answers against the share of the weights set to zero (scope "
        f"{' and '.join(by_scope)}, scores {example['reduction']}), both logarithmic, one scale for "
        "all panels; at 0 nothing is removed. "
        "Random: median over the masks, the bars span the smallest and the largest."
        + (" This run has one ratio, so the lines have no points between." if len(ratios) == 1 else "")
    )
    drawing.describe("Line charts")
    return drawing


def _removed_shares(axis: Axes, ratios: Sequence[float], nothing: float, most: int) -> None:
    """The shares of removed weights on the x axis, at most so many of them, and 0 where `nothing` is."""
    shown = ratios[::-1][:: -(-len(ratios) // most)][::-1]
    axis.set_xticks([nothing, *shown], ["0", *(f"{100 * ratio:g}" for ratio in shown)])
    axis.set_xticks([], minor=True)
    axis.set_xlim(nothing / 1.4, ratios[-1] * 1.4)


def _deletion_each(
    by_scope: dict[str, list[DeactivationRecord]], models: Sequence[str], ratios: Sequence[float], nothing: float
) -> Drawing:
    """The curves of many models: a panel each, in one scope, the ways of choosing weights by colour."""
    scope, rows = next(iter(by_scope.items()))
    names = [method_name(model) for model in models]
    figure, (panels,) = small_panels(names, SHARE_REMOVED, "perplexity (logarithmic)")
    drawing = Drawing("deletion", "Deletion curves", figure)
    for axis, model in zip(panels, models, strict=True):
        for modality, line in LINES.items():
            curve = having(rows, model=model, modality=modality)
            for condition, color in COLORS.items():
                _deletion_line(drawing, axis, curve, condition, nothing, Look(color, ".", line), "")
        axis.set(xscale="log", yscale="log")
        log_labels(axis)
    _removed_shares(panels[0], ratios, nothing, MAX_TICKS - 2)
    handles = [Line2D([], [], color=color) for color in COLORS.values()]
    handles += [Line2D([], [], color=INK, linestyle=line) for line in LINES.values()]
    legend_below(figure, handles, [*REMOVED.values(), *INPUTS.values()], most=3)
    example = next(row for row in rows if row["condition"] != "base")
    others = f" The table has {' and '.join([*by_scope][1:])} too." if len(by_scope) > 1 else ""
    drawing.caption = (
        "Perplexity of the held-out answers against the share of the weights set to zero (scope "
        f"{scope}, scores {example['reduction']}), both logarithmic, one scale for all panels; at 0 nothing is "
        f"removed. Random: median over the masks, the bars span the smallest and the largest.{others}"
    )
    drawing.describe("Line charts")
    return drawing


def _longest(records: Sequence[DeactivationRecord]) -> dict[str, list[DeactivationRecord]]:
    """By scope, global first, the records of one reduction and the whole models'.

    The reduction is that of the scope with the most ratios (of several, of the paper's); then all scopes that have as
    many in it.
    """
    ratios: dict[tuple[str, str], set[float]] = {}
    for row in records:
        if row["condition"] in REMOVED:
            ratios.setdefault((row["scope"], row["reduction"]), set()).add(row["ratio"])
    if not ratios:
        return {}
    best = max(ratios, key=lambda key: (len(ratios[key]), key[0] == "global", key[1] == MAIN_REDUCTION))
    as_long = [key for key in sorted(ratios) if key[1] == best[1] and len(ratios[key]) == len(ratios[best])]
    removed = [row for row in records if row["condition"] != "base"]
    return {
        scope: [*whole_models(records, scope), *having(removed, scope=scope, reduction=reduction)]
        for scope, reduction in as_long
    }


def _deletion_line(
    drawing: Drawing,
    axis: Axes,
    rows: Sequence[DeactivationRecord],
    condition: str,
    nothing: float,
    mark: Look,
    of_scope: str,
) -> None:
    """The curve of one model; a perplexity that is not finite has no point but a sign at the upper edge."""
    removed = {group["ratio"]: group["rows"] for group in grouped(having(rows, condition=condition), "ratio")}
    if not removed:
        return
    whole = [row for row in having(rows, condition="base")[:1] if row["perplexity"] is not None]
    by_ratio = removed | ({0.0: whole} if whole else {})
    points: list[tuple[float, float]] = []
    for ratio, found in sorted(by_ratio.items()):
        removed_share = f"{100 * ratio:g} % ({condition}) removed"
        where = f"{method_name(rows[0]['model'])}, {rows[0]['modality']}{of_scope}, {removed_share}"
        x, values = ratio or nothing, [row["perplexity"] for row in found]
        center = middle(values, condition)
        if math.isinf(center):
            axis.annotate("∞", (x, 1), xycoords=("data", "axes fraction"), ha="center", va="top", color=mark.color)
            drawing.nothing(f"{where}: not finite")
            continue
        points.append((x, center))
        drawing.point(axis, *points[-1], mark, f"{where}: {significant(center)}")
        finite = [value for value in values if value is not None]
        if len(finite) > 1:
            axis.plot([x, x], [min(finite), max(finite)], color=mark.color, linewidth=1)
    if points:
        axis.plot(*zip(*points, strict=True), color=mark.color, linestyle=mark.line)


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------
def training(inputs: Inputs) -> Drawing | None:
    """Training loss by step, averaged in windows where a run has more steps than the figure can show.

    Of the questions alone: steps on replayed text would make a zigzag of two losses.
    """
    every = _of_kind(inputs, "train")
    records = [row for row in map(_without_replayed, every) if row is not None and row["loss"] is not None]
    methods = sorted({row["method"] for row in records}, key=method_key)
    if not methods:
        return None
    many, unit = len(methods) > MANY_LINES, "loss, nats per supervised token"
    if many:
        figure, (panels,) = small_panels([method_name(method) for method in methods], "step", unit)
    else:
        figure = Figure(figsize=(WIDTH, LINE_HEIGHT), layout="constrained")
        panels = [figure.subplots()] * len(methods)
        panels[0].set(xlabel="step", ylabel=unit)
    drawing = Drawing("training", "Training loss", figure)
    ends = []
    for axis, method in zip(panels, methods, strict=True):
        by_step = in_order(having(records, method=method), "step")
        curve = np.array([(row["step"], row["loss"]) for row in by_step])
        windows = np.array_split(curve, min(len(curve), MAX_CURVE_POINTS))
        steps, losses = np.array([window.mean(axis=0) for window in windows]).T
        mark = look(method, methods_in(inputs.results))
        if many:
            mark = replace(mark, marker="", line="solid")
        (line,) = axis.plot(steps, losses, color=mark.color, linestyle=mark.line, marker=mark.marker)
        line.set_markevery(max(1, len(steps) // 8))
        axis.xaxis.set_major_locator(MaxNLocator(4 if many else 10, integer=True))
        ends.append(f"{method_name(method)} from {significant(losses[0])} to {significant(losses[-1])}")
        drawing.tip(line, ends[-1])
    if not many:
        model_legend(figure, methods, methods_in(inputs.results))
    first = " First training run of each method." if n_runs(inputs.results) > 1 else ""
    replayed = " Replayed text is left out." if any(row.get("replayed") for row in every) else ""
    said = "Training loss, mean of each window of steps" + ("." if many else f": {'; '.join(ends)}.")
    drawing.caption = f"{said}{first}{replayed}{_phases([*dict.fromkeys(panels)], records)}"
    drawing.alt = f"Line chart of the training loss: {'; '.join(ends)}."
    return drawing


def _without_replayed(row: TrainingRecord) -> TrainingRecord | None:
    """The record with the loss on the questions alone; None of a step of replayed text alone."""
    share = row.get("replayed", 0.0)
    if not share or row["loss"] is None:
        return row
    return None if share == 1.0 else {**row, "loss": (row["loss"] - share * row["loss_replayed"]) / (1.0 - share)}


def retention(inputs: Inputs) -> Drawing | None:
    """Held-out perplexity by training step, a panel per input; None where no method has two measurements."""
    records = [row for row in _of_kind(inputs, "eval") if row.get("perplexity") is not None]
    curves: dict[tuple[str, str], list[TrainingRecord]] = {}
    for row in in_order(records, "step"):
        curves.setdefault((row.get("modality", "text"), row["method"]), []).append(row)
    curves = {key: rows for key, rows in curves.items() if len(rows) > 1}
    if not curves:
        return None
    modalities = [name for name in INPUTS if any(of == name for of, _ in curves)]
    drifts = in_order(_of_kind(inputs, "drift"), "step")
    methods = sorted({method for _, method in curves}, key=method_key)
    if len(methods) > MANY_LINES:
        return _retention_each(inputs, curves, drifts, methods)
    figure = Figure(figsize=(WIDTH, LINE_HEIGHT), layout="constrained")
    drawing = Drawing("retention", "Held-out perplexity during training", figure)
    panels = figure.subplots(1, len(modalities) + bool(drifts), squeeze=False)[0]
    ends, with_base = [], False
    for axis, modality in zip(panels, modalities, strict=False):
        for method in (name for name in methods if (modality, name) in curves):
            name = f"{method_name(method)}, {INPUTS[modality]}"
            steps, values = zip(*((row["step"], row["perplexity"]) for row in curves[modality, method]), strict=True)
            texts = [f"{name}, step {step}: {significant(y)}" for step, y in zip(steps, values, strict=True)]
            drawing.line(axis, steps, values, look(method, methods_in(inputs.results)), texts)
            ends.append(f"{name}, from {significant(values[0])} to {significant(values[-1])}")
        with_base |= _base_line(drawing, axis, inputs, modality, [r for r in records if r.get("modality") == modality])
        axis.set(title=f"{INPUTS[modality].capitalize()}", xlabel="step", ylabel="perplexity")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        every = [row["perplexity"] for (of, _), rows in curves.items() if of == modality for row in rows]
        if max(every) > WIDE_RANGE * min(every):
            axis.set_yscale("log")
            log_labels(axis)
    if drifts:
        ends += _drift_panel(drawing, panels[-1], drifts, methods_in(inputs.results))
    model_legend(figure, [*(["base"] if with_base else []), *methods], methods_in(inputs.results))
    drawing.caption = (
        f"Perplexity of the held-out answers between the steps of training: {'; '.join(ends)}."
        + (" Level line: the base model, before training." if with_base else "")
        + (" Drift: the loss on text that the base wrote minus the base's, an estimate of the KL." if drifts else "")
        + (" First training run of each method." if n_runs(inputs.results) > 1 else "")
        + _phases(panels[:1], records)
    )
    drawing.alt = f"Line charts of the held-out perplexity: {'; '.join(ends)}."
    return drawing


def _retention_each(
    inputs: Inputs,
    curves: dict[tuple[str, str], list[TrainingRecord]],
    drifts: Sequence[TrainingRecord],
    methods: Sequence[str],
) -> Drawing:
    """The perplexities of many methods: a panel each, text and speech by their lines; below them likewise the drift."""
    units = ("perplexity", *(("drift from the base, nats per token",) if drifts else ()))
    figure, blocks = small_panels([method_name(method) for method in methods], "step", *units)
    drawing = Drawing("retention", "Held-out perplexity during training", figure)
    every = [row["perplexity"] for rows in curves.values() for row in rows]
    for axis, method in zip(blocks[0], methods, strict=True):
        mark = look(method, methods_in(inputs.results))
        for modality, line in LINES.items():
            of = curves.get((modality, method), [])
            name = f"{method_name(method)}, {INPUTS[modality]}"
            texts = [f"{name}, step {row['step']}: {significant(row['perplexity'])}" for row in of]
            shown = replace(mark, marker=".", line=line)
            drawing.line(axis, [row["step"] for row in of], [row["perplexity"] for row in of], shown, texts)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if max(every) > WIDE_RANGE * min(every):
            axis.set_yscale("log")
            log_labels(axis)
    for axis, method in zip(blocks[-1] if drifts else (), methods, strict=bool(drifts)):
        _drift_panel(drawing, axis, having(drifts, method=method), methods_in(inputs.results))
        axis.set(title=method_name(method), xlabel="", ylabel="")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    handles = [Line2D([], [], color=INK, linestyle=line) for line in LINES.values()]
    legend_below(figure, handles, [*INPUTS.values()], most=2)
    drawing.caption = (
        "Perplexity of the held-out answers between the steps of training, a panel for each method."
        + (" Drift: the loss on text that the base wrote minus the base's, an estimate of the KL." if drifts else "")
        + (" First training run of each method." if n_runs(inputs.results) > 1 else "")
        + _phases(blocks[0], _of_kind(inputs, "eval"))
    )
    drawing.describe("Line charts")
    return drawing


def _drift_panel(drawing: Drawing, axis: Axes, records: Sequence[TrainingRecord], methods: Sequence[str]) -> list[str]:
    """The estimated drift from the base by step; returns what the caption says of it."""
    said = []
    for method in sorted({row["method"] for row in records}, key=method_key):
        name = f"{method_name(method)}, drift"
        points = [
            (row["step"], row["drift"]) for row in records if row["method"] == method and row["drift"] is not None
        ]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        texts = [f"{name}, step {step}: {significant(y)}" for step, y in points]
        drawing.line(axis, steps, values, look(method, methods), texts)
        said.append(f"{name}, from {significant(values[0])} to {significant(values[-1])}")
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set(title="Drift from the base", xlabel="step", ylabel="nats per token")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return said


def why_no_retention(inputs: Inputs) -> str:
    """The sentence that stands where the figure would."""
    why = "results.json has no measurement."
    if any(row.get("perplexity") is not None for row in _of_kind(inputs, "eval")):
        why = "no method has more than one measurement; set training.eval_every in the recipe to fewer steps."
    elif at(inputs.config, "training", "eval_every") is None:
        why = "the recipe does not set training.eval_every, the number of steps between two measurements."
    return f"There is no curve of held-out perplexity during training: {why}"


def _of_kind(inputs: Inputs, kind: str) -> list[TrainingRecord]:
    return [row for row in inputs.results["training"] if row.get("kind", "train") == kind]


def _base_line(drawing: Drawing, axis: Axes, inputs: Inputs, modality: str, records: Sequence[TrainingRecord]) -> bool:
    """The base model's perplexity, drawn only where it was measured on the same tokens as the curves."""
    tokens = {row.get("n_tokens") for row in records}
    for row in having(inputs.results["perplexity"], method="base", modality=modality, task="heldout"):
        if tokens == {row["n_tokens"]} and row["perplexity"] is not None:
            line = axis.axhline(row["perplexity"], color=INK, linewidth=1)
            drawing.tip(line, f"Base, {INPUTS[modality]}: {significant(row['perplexity'])}")
            return True
    return False


def _phases(axes: Sequence[Axes], records: Sequence[TrainingRecord]) -> str:
    """Mark where the adaptor's phase ends, where all methods agree on it; returns what the caption says of it."""
    last = {row["method"]: row["step"] for row in in_order(records, "step") if row.get("phase") == "adaptor"}
    ends = {step + 0.5 for step in last.values()}
    if len(ends) != 1:
        return ""
    for axis in axes:
        axis.axvline(*ends, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    return " Dotted upright line: before it only the adaptor is trained."
