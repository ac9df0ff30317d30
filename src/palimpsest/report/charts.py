"""Charts of a finished run: functions of its `Inputs` that return a `Drawing`, or None where the data are missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from palimpsest.records import DeactivationRecord, LayerRecord, QARecord, Results
from palimpsest.report.across_runs import n_runs, of_first_runs
from palimpsest.report.inputs import (
    MAIN_REDUCTION,
    Inputs,
    having,
    in_order,
    listed,
    main_metric,
    method_key,
    method_name,
    methods_in,
    peak_layer,
    task_name,
    text_layers,
    whole_models,
)
from palimpsest.report.style import (
    GREYS,
    INK,
    LINE_HEIGHT,
    MANY_LINES,
    WIDTH,
    Drawing,
    legend_below,
    log_labels,
    look,
    model_legend,
    small_panels,
)
from palimpsest.report.table import interval, middle, percent, significant

CONDITIONS = {"base": "whole", "bottom": "bottom removed", "random": "random removed", "top": "top removed"}
MOST_IN_TITLE = 3  # methods
MANY_MODELS = 6  # more have no room for bars side by side, names and values in half the width
HATCHES = ("", "....", "////", "")
PAPER_RATIO = 0.03
FIRST_RUN = "first training run of each method"
MEANS = "means over training runs, where a method has several, and intervals over these too"
OUTLINE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.7}


# ----------------------------------------------------------------------------------------------------------
# Figures 2 and 3: importance by layer
# ----------------------------------------------------------------------------------------------------------
def layers_before_after(inputs: Inputs) -> Drawing | None:
    """Figure 2: layer-wise textual importance of the base and after Full-FT."""
    title = "Figure 2. Textual importance by layer, before and after Full-FT"
    return _layers(inputs, "figure2", title, ("base", "full"))


def layers_mitigated(inputs: Inputs) -> Drawing | None:
    """Figure 3: the same with every method but Full-FT, on the axes of Figure 2."""
    models = [model for model in methods_in(inputs.results) if model != "full"]
    scored = {row["model"] for row in text_layers(inputs.results)}
    names = [method_name(model) for model in models if model in scored - {"base"}]
    which = f"{len(names)} methods" if len(names) > MOST_IN_TITLE else listed(names)
    return _layers(inputs, "figure3", f"Figure 3. Textual importance by layer with {which}", models)


def _layers(inputs: Inputs, name: str, title: str, models: Sequence[str]) -> Drawing | None:
    rows, methods = text_layers(inputs.results), methods_in(inputs.results)
    shown = [model for model in models if having(rows, model=model)]
    if not shown or shown == ["base"]:
        return None
    if len(shown) > MANY_LINES:
        return _layers_each(rows, methods, Drawing(name, title, Figure()), shown)
    figure = Figure(figsize=(WIDTH, LINE_HEIGHT), layout="constrained")
    share, total = figure.subplots(1, 2)
    drawing = Drawing(name, title, figure)
    for model in shown:
        of = in_order(having(rows, model=model), "layer")
        layers = [row["layer"] for row in of]
        for axis, values, unit in (
            (share, [100 * row["share"] for row in of], " %"),
            (total, [row["total"] for row in of], ""),
        ):
            names = (f"{method_name(model)}, layer {layer}" for layer in layers)
            texts = [f"{name}: {significant(value)}{unit}" for name, value in zip(names, values, strict=True)]
            drawing.line(axis, layers, values, look(model, methods), texts)
    share.set(title="Share of the model's total", xlabel="layer", ylabel="%")
    share.set_ylim(0, 105 * max(row["share"] for row in rows))  # all models, so that Figures 2 and 3 compare
    total.set(title="Sum over the layer", xlabel="layer", ylabel="importance")
    totals = [row["total"] for row in rows if row["total"] is not None and row["total"] > 0]
    if totals and max(totals) > 30 * min(totals):
        total.set_yscale("log")
        total.set_ylim(min(totals) / 1.3, max(totals) * 1.3)
        log_labels(total)
    elif totals:
        total.set_ylim(0, 1.05 * max(totals))
    model_legend(figure, shown, methods)
    peaks = [f"{method_name(model)} {peak_layer(rows, model)}" for model in shown]
    tuned = {row["model"] for row in rows} - {"base"}
    shared = "Figures 2 and 3 share their scales. " if "full" in tuned and len(tuned) > 1 else ""
    drawing.caption = (
        f"Sum of the text importance ({rows[0]['reduction']}) of each layer's weights: left as a share of "
        f"the model's total, right as it is. {shared}Largest share at layer: "
        f"{', '.join(peaks)}."
    )
    drawing.alt = f"Two line charts over the layers. Largest share at layer: {', '.join(peaks)}."
    return drawing


def _layers_each(rows: list[LayerRecord], methods: Sequence[str], drawing: Drawing, shown: Sequence[str]) -> Drawing:
    """The shares of many models: a panel each, with the base's behind."""
    tuned = [model for model in shown if model != "base"]
    drawing.figure, (panels,) = small_panels([method_name(model) for model in tuned], "layer", "% of the model's total")
    base = in_order(having(rows, model="base"), "layer")
    for axis, model in zip(panels, tuned, strict=True):
        axis.plot([row["layer"] for row in base], [100 * row["share"] for row in base], color=INK, linewidth=0.7)
        of = in_order(having(rows, model=model), "layer")
        texts = [f"{method_name(model)}, layer {row['layer']}: {significant(100 * row['share'])} %" for row in of]
        mark = replace(look(model, methods), marker=".", line="solid")
        drawing.line(axis, [row["layer"] for row in of], [100 * row["share"] for row in of], mark, texts)
        axis.set_ylim(0, 105 * max(row["share"] for row in rows))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    behind = " Thin dark line: the base." if base else ""
    drawing.caption = (
        f"Sum of the text importance ({rows[0]['reduction']}) of each layer's weights, as a share of the model's "
        f"total; the sums themselves are in the table.{behind}"
    )
    peaks = [f"{method_name(model)} {peak_layer(rows, model)}" for model in shown]
    drawing.alt = f"A line chart over the layers for each model. Largest share at layer: {', '.join(peaks)}."
    return drawing


# ----------------------------------------------------------------------------------------------------------
# Deactivation
# ----------------------------------------------------------------------------------------------------------
def deactivation(inputs: Inputs) -> Drawing | None:
    """Perplexity whole and without the bottom, a random and the top share of the weights: a row for each scope."""
    by_scope = _paper_like(inputs.results["deactivation"])
    if not by_scope:
        return None
    rows = [row for found in by_scope.values() for row in found]
    models = sorted({row["model"] for row in rows}, key=method_key)
    measured = {name: {row["model"] for row in having(rows, modality=name)} for name in ("text", "speech")}
    shown = {modality: [model for model in models if model in found] for modality, found in measured.items() if found}
    widths = [len(names) for names in shown.values()]
    many = max(widths) > MANY_MODELS  # then a panel is as wide as the figure, and the values stand in the tips alone
    if many:  # above each other, each name once
        shown = dict.fromkeys(shown, models)
    lines = len(by_scope) * (len(shown) if many else 1)
    height = 1.9 * lines + 1.2 if many else LINE_HEIGHT * lines + 0.2
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if many:
        panels = figure.subplots(lines, 1, squeeze=False, sharex=True, sharey=True)
    else:
        panels = figure.subplots(lines, len(shown), squeeze=False, sharey=True, width_ratios=widths)
    drawing = Drawing("deactivation", "Perplexity with weights set to zero", figure)
    settings = [(scope, modality) for scope in by_scope for modality in shown]
    for axis, (scope, modality) in zip(panels.flat, settings, strict=True):
        names, of_scope = shown[modality], f", {scope}" if len(by_scope) > 1 else ""
        for index, condition in enumerate(CONDITIONS):
            for position, model in enumerate(names):
                of_bar = having(by_scope[scope], model=model, modality=modality, condition=condition)
                found = [row["perplexity"] for row in of_bar]
                label = f"{method_name(model)}, {modality}{of_scope}, {CONDITIONS[condition]}"
                if found:
                    x, upright = position + (index - 1.5) * 0.2, len(names) == 1
                    _bar(drawing, axis, found, label, x, index, upright=upright, written=not many)
        axis.set(
            title=f"{modality.capitalize()} input{of_scope}", xticks=range(len(names)), xlim=(-0.5, len(names) - 0.5)
        )
        axis.set_xticklabels([method_name(model) for model in names], rotation=90 if many else 0)
        axis.set_yscale("log")
        axis.grid(visible=False, axis="x")
        axis.margins(y=0.18)
        axis.set_ylim(bottom=1)  # the least a perplexity can be
        log_labels(axis)
    for axis in panels[:, 0]:
        axis.set_ylabel("perplexity (logarithmic)")
    bars = [Patch(facecolor=grey, hatch=hatch, **OUTLINE) for grey, hatch in zip(GREYS, HATCHES, strict=True)]
    figure.legend(bars, list(CONDITIONS.values()), loc="outside lower center", ncols=4)
    example = next((row for row in rows if row["condition"] != "base"), rows[0])
    several = "" if n_runs(inputs.results) == 1 else " of all runs, the others: mean over runs"
    drawing.caption = (
        f"Perplexity of the held-out answers after setting {100 * example['ratio']:g} % of the weights to "
        f"zero (scope {' and '.join(by_scope)}, scores {example['reduction']}). "
        f"Random: median over {_n_masks(rows)} masks{several}, the line spans the smallest and the largest: what a "
        f"random mask does varies much. {example['n_examples']} examples."
    )
    drawing.describe("Bar chart")
    return drawing


def _n_masks(rows: Sequence[DeactivationRecord]) -> int:
    """Random masks of a model and input in one scope, the most that any has."""
    found = Counter((row["model"], row["modality"], row["scope"]) for row in rows if row["condition"] == "random")
    return max(found.values(), default=0)


def _paper_like(records: Sequence[DeactivationRecord]) -> dict[str, list[DeactivationRecord]]:
    """By scope, global first, the records of the one ratio and reduction nearest to the paper's: 3 %.

    The paper does not say whether its 3 % are of all weights or of each matrix, so every scope measured there is shown.
    """
    removed = [row for row in records if row["condition"] != "base"]
    if not removed:
        return {}
    settings = dict.fromkeys((row["ratio"], row["scope"], row["reduction"]) for row in removed)
    ratio, _, reduction = min(
        settings, key=lambda of: (abs(of[0] - PAPER_RATIO), of[1] != "global", of[2] != MAIN_REDUCTION)
    )
    chosen = having(removed, ratio=ratio, reduction=reduction)
    return {
        scope: [*whole_models(records, scope), *having(chosen, scope=scope)]
        for scope in sorted({row["scope"] for row in chosen})
    }


def _bar(
    drawing: Drawing,
    axis: Axes,
    found: Sequence[float | None],
    label: str,
    x: float,
    index: int,
    *,
    upright: bool,
    written: bool,
) -> None:
    """The middle of the perplexities `found` and their range, in the look of the condition number `index`."""
    above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
    center = middle(found, list(CONDITIONS)[index])
    if math.isinf(center):  # beyond float range: no bar can show it
        axis.annotate("∞", (x, 1), **above)
        drawing.nothing(f"{label}: not finite")
        return
    finite = [value for value in found if value is not None]
    bar = axis.bar([x], [center], width=0.18, color=GREYS[index], hatch=HATCHES[index], **OUTLINE)
    drawing.tip(bar.patches[0], f"{label}: {significant(center)}")
    if len(finite) > 1:
        axis.plot([x, x], [min(finite), max(finite)], color=INK, linewidth=1)
    if written:
        rotation = 0 if upright else 90
        axis.annotate(significant(center), (x, max(finite)), va="bottom", fontsize=6.5, rotation=rotation, **above)


# ----------------------------------------------------------------------------------------------------------
# Drift
# ----------------------------------------------------------------------------------------------------------
def drift(inputs: Inputs) -> Drawing | None:
    """KL to the base on its own text, a panel per kind, and the loss of general text minus the base's, per model."""
    kls, losses = having(inputs.results["drift"], tokens="all"), inputs.results["general_text_comparisons"]
    panels: list[tuple[str, str, list[tuple[str, float, float, float]]]] = [
        (f"Own text, {kind}", "KL(base ‖ model),\nnats per token", rows)
        for kind in dict.fromkeys(row["text"] for row in kls)
        if (rows := [(r["model"], r["kl"], r["kl_ci_low"], r["kl_ci_high"]) for r in kls if r["text"] == kind])
    ]
    if losses:
        rows = [(row["method"], row["difference"], row["ci_low"], row["ci_high"]) for row in losses]
        panels.append(("General text", "nats per byte − base's", rows))
    if not panels:
        return None
    models = sorted({model for _, _, rows in panels for model, *_ in rows}, key=method_key)
    methods = list(dict.fromkeys([*methods_in(inputs.results), *models]))  # a damaged run may name more
    figure = Figure(figsize=(WIDTH, 1.2 + 0.28 * len(models)), layout="constrained")
    drawing = Drawing("drift", "Drift from the base, and the loss of general text", figure)
    for axis, (title, unit, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        for model, value, low, high in rows:
            y, mark = models.index(model), look(model, methods)
            axis.plot([low, high], [y, y], color=mark.color, linewidth=1.2)
            text = f"{title}, {method_name(model)}: {significant(value)} ({interval(low, high, significant)})"
            drawing.point(axis, value, y, mark, text)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set(title=title, xlabel=unit)
        axis.set_yticks(range(len(models)), [method_name(model) for model in models])
        axis.set_ylim(len(models) - 0.5, -0.5)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    drawing.caption = (
        "How far the next-token distributions of each model are from the base's on text that the base wrote "
        "itself (0: the same)"
        + ("; on the right, how much less likely general text became (0: as likely as before)" if losses else "")
        + ". Bars: 95 % intervals over texts or documents."
        + _of_which_runs(inputs.results)
    )
    drawing.describe("Dot chart")
    return drawing


def _of_which_runs(results: Results) -> str:
    if n_runs(results) == 1:
        return ""
    first = of_first_runs(results)
    says = {}
    if results["drift"]:
        says["own text"] = FIRST_RUN if "drift" in first else MEANS
    if results["general_text_comparisons"]:
        says["general text"] = FIRST_RUN if "general_text_comparisons" in first else MEANS
    if len(set(says.values())) == 1:
        return f" {next(iter(says.values())).capitalize()}."
    return " " + "; ".join(f"{name}: {said}" for name, said in says.items()).capitalize() + "."


def why_no_drift(inputs: Inputs) -> str:
    """The sentence that stands where the figure would."""
    return (
        "There is no drift from the base, nor the loss of general text: the recipe has no section drift, which "
        "measures both."
    )


# ----------------------------------------------------------------------------------------------------------
# Accuracy
# ----------------------------------------------------------------------------------------------------------
def plane(inputs: Inputs) -> Drawing | None:
    """T2T against S2T accuracy per task, with 95 % intervals in both directions."""
    metric = main_metric(inputs.results)
    records = having(inputs.results["qa"], metric=metric)
    rows = {(row["task"], row["method"], row["modality"]): row for row in records}
    spoken = {row["task"] for row in having(records, modality="speech")}
    tasks = [task for task in dict.fromkeys(row["task"] for row in records) if task in spoken]
    if not tasks:
        return None
    many = len({method for _, method, _ in rows}) > MANY_LINES  # then a panel is as wide as the figure
    figure = Figure(figsize=(WIDTH, 3.3 * (len(tasks) if many else 1)), layout="constrained")
    drawing = Drawing("t2t_s2t", "Typed against spoken questions", figure)
    panels = list(figure.subplots(*((len(tasks), 1) if many else (1, len(tasks))), squeeze=False).flat)
    for axis, task in zip(panels, tasks, strict=True):
        plane_panel(drawing, axis, task, rows, inputs)
    handles = {label: mark for axis in panels for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend_below(figure, list(handles.values()), list(handles), most=4)
    runs = n_runs(inputs.results)
    several = f"95 % intervals over seeds and questions of {runs} training runs"
    intervals = "95 % Wilson intervals" if runs == 1 else several
    drawing.caption = (
        f"Accuracy on typed (T2T) and on spoken (S2T) questions, scoring rule {metric}, with "
        f"{intervals} in both directions. Dashed line and band: the base model's T2T accuracy "
        "and its interval; a method to its left has lost text ability. Hollow: the text model after a recogniser."
    )
    drawing.describe("Scatter chart")
    return drawing


def plane_panel(
    drawing: Drawing, axis: Axes, task: str, rows: dict[tuple[str, str, str], QARecord], inputs: Inputs
) -> None:
    methods = methods_in(inputs.results)
    many = len(methods) > MANY_LINES
    bars: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.6} if many else {"linewidth": 1.1, "capsize": 2.5}
    base = rows.get((task, "base", "text"))
    if base is not None:
        axis.axvspan(100 * base["ci_low"], 100 * base["ci_high"], color=GREYS[1], alpha=0.35, linewidth=0)
        line = axis.axvline(100 * base["accuracy"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="Base T2T")
        drawing.tip(line, f"{task_name(task)}, Base: T2T {_written(base)}")
    for method in methods:
        text = rows.get((task, method, "text"))
        for modality in ("speech", "cascade"):
            spoken = rows.get((task, method, modality))
            if text is None or spoken is None:
                continue
            name = method_name(method) + (" after a speech recogniser" if modality == "cascade" else "")
            mark = look(method, methods)
            x, y = 100 * text["accuracy"], 100 * spoken["accuracy"]
            axis.errorbar([x], [y], xerr=_arms(text), yerr=_arms(spoken), color=mark.color, **bars)
            face = "none" if modality == "cascade" else mark.color
            (point,) = axis.plot([x], [y], mark.marker, color=mark.color, linestyle="none", label=name)
            point.set(markersize=5 if many else 7, markerfacecolor=face)
            drawing.tip(point, f"{task_name(task)}, {name}: T2T {_written(text)}, spoken {_written(spoken)}")
    axis.set(title=task_name(task), xlabel="T2T accuracy, %", ylabel="S2T accuracy, %")
    for low, high, limit in ((*axis.get_xlim(), axis.set_xlim), (*axis.get_ylim(), axis.set_ylim)):
        limit(min(low, -0.03 * high), high)  # a mark at zero is seen whole


def _arms(row: QARecord) -> list[list[float]]:
    """Down and up from the accuracy to the ends of its interval, in percent; rounding makes no negative length."""
    down, up = row["accuracy"] - row["ci_low"], row["ci_high"] - row["accuracy"]
    return [[max(0.0, 100 * down)], [max(0.0, 100 * up)]]


def _written(row: QARecord) -> str:
    return f"{percent(row['accuracy'])} % ({interval(row['ci_low'], row['ci_high'])})"
