"""The first screen of a report: three numbers with their intervals and two pictures, of what the run has.

Text before hearing before where in the layers; what a run did not measure gives its place to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from palimpsest.records import LayerRecord, QARecord
from palimpsest.report.across_runs import by_method
from palimpsest.report.charts import plane_panel
from palimpsest.report.inputs import (
    Inputs,
    having,
    in_order,
    main_metric,
    method_key,
    method_name,
    methods_in,
    peak_layer,
    task_name,
    text_layers,
    text_shifts,
)
from palimpsest.report.style import INK, Drawing, look, model_legend
from palimpsest.report.table import fitting, interval, percent, points_fitting, significant
from palimpsest.report.trade_off import frontier_panels, panel
from palimpsest.report.verdict import (
    ALL,
    accuracies,
    drift_of,
    headline,
    is_same,
    models_of,
    nothing_changed,
    of_base,
    paired,
    signs,
)

N_NUMBERS = 3
SIZE = (3.9, 2.8)  # inches, of a picture: half a page
MOST_LINES = 5  # models in the picture of the layers
MOST_IN_LEGEND = 6


@dataclass(frozen=True)
class Number:
    """A number of the first screen: what it is of, in what unit, and between which ends of a 95 % interval."""

    title: str
    value: str
    unit: str
    spread: str


def opening(inputs: Inputs) -> str:
    """The sentence that a report opens with: the verdict; before there is one, what the base's importance shows."""
    if models_of(inputs):
        return headline(inputs)
    return base_importance(inputs) or "Nothing of this run's models has been measured yet."


def base_importance(inputs: Inputs) -> str:
    """Where the text of the base lives, in a sentence; empty where the run has no importance of its."""
    rows = sorted(having(text_layers(inputs.results), model="base"), key=lambda row: row["layer"])
    if not rows:
        return ""
    depth, peak = len(rows), peak_layer(rows, "base")
    first_half = sum(row["share"] for row in rows[: depth // 2])
    return (
        f"In the base, layer {peak} of 0 to {depth - 1} has the largest share of the importance for text, "
        f"{percent(rows[peak]['share'])}\u00a0%; the first half of the layers has {percent(first_half, 0)}\u00a0%."
    )


def closing(inputs: Inputs) -> list[str]:
    """The run in five lines at most: the verdict, the numbers, and where the importance for text lies."""
    inputs = by_method(inputs)
    numbers = [f"{it.title}: {it.value} {it.unit} ({it.spread})" for it in numbers_of(inputs)]
    rows = text_layers(inputs.results)
    models = sorted({row["model"] for row in rows}, key=method_key)
    where = [f"Importance for text: largest share at layer {_peaks(rows, models)}."] if "base" in models else []
    return [opening(inputs), *numbers, *(where if models_of(inputs) else [])]


def _peaks(rows: list[LayerRecord], models: Sequence[str]) -> str:
    """The layers with the largest share: that of all, or of each by name, where they are few."""
    peaks = {model: peak_layer(rows, model) for model in models}
    if len(set(peaks.values())) == 1:
        return f"{peaks[models[0]]}{' in every model' * (len(models) > 1)}"
    said = [f"{layer} in {method_name(model)}" for model, layer in list(peaks.items())[:MOST_LINES]]
    return f"{', '.join(said)}{' …' * (len(models) > MOST_LINES)}"


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------
def in_focus(inputs: Inputs) -> str | None:
    """The model that the numbers are of: the one that lost most, else the one that drifted most, else the first."""
    models = models_of(inputs)
    lost = {model: min((it.size for it in signs(inputs, model) if it.sign < 0), default=0.0) for model in models}
    if any(lost.values()):
        return min(models, key=lambda model: lost[model])
    drifts = {model: drift.value for model in models if (drift := drift_of(inputs, model)) is not None}
    if drifts:
        return max(drifts, key=lambda model: drifts[model])
    return models[0] if models else None


def numbers_of(inputs: Inputs) -> list[Number]:
    """The first of text, of text by other measures, of hearing and of where; then what is left of them."""
    model = in_focus(inputs)
    if model is None:
        return [*_of_the_base(inputs)][:N_NUMBERS]
    drift, general, probe = [*_drifted(inputs, model)], [*_general_text(inputs, model)], [*_probed(inputs, model)]
    # Where the questions show no loss and another measure does, the verdict is about that one.
    lost = {it.measure for it in signs(inputs, model) if it.sign < 0}
    beside = [*drift, *general, *probe]
    if lost == {"probe"}:
        beside = [*probe, *drift, *general]
    elif lost and lost <= {"general text", "probe"}:
        beside = [*general, *drift, *probe]
    kinds = [
        [*_typed(inputs, model)],
        beside,
        [*_spoken(inputs), *_shifted(inputs, model)],
    ]
    first = [of[0] for of in kinds if of]
    rest = [it for of in kinds for it in of[1:]]
    chosen = [*first, *rest][:N_NUMBERS]
    return [it for of in kinds for it in of if it in chosen]


def _typed(inputs: Inputs, model: str) -> Iterator[Number]:
    """The largest loss first."""
    rows = accuracies(inputs, "text")
    pairs = [pair for row in having(rows, method=model) if (pair := paired(inputs, row["task"], "base", model))]
    for row in sorted(pairs, key=lambda row: row["difference"]):
        title = f"{method_name(model)} − base, typed questions ({task_name(row['task'])})"
        base = of_base(rows, row["task"])
        if is_same(row):
            yield Number(title, "0", "points", "the base itself answers them")
        elif base is not None and base["accuracy"] == 0 and row["difference"] == 0:
            yield Number(title, "0", "points", f"the base answers 0 of {row['n']}: nothing to lose")
        elif nothing_changed(row):
            room = f"up to {significant(300 / row['n'], 2)} points may be lost" if row["n"] > 3 else "too few to tell"
            yield Number(title, "0", "points", f"no answer of {row['n']} changed: {room}")
        else:
            value, low, high = points_fitting(row["difference"], row["ci_low"], row["ci_high"])
            yield Number(title, value, "points", f"{low} to {high}")


def _drifted(inputs: Inputs, model: str) -> Iterator[Number]:
    if drift := drift_of(inputs, model):
        value, low, high = fitting(drift.value, drift.low, drift.high)
        yield Number(f"Drift of {method_name(model)} on {drift.text}", value, "nats a token", f"{low} to {high}")


def _general_text(inputs: Inputs, model: str) -> Iterator[Number]:
    for row in having(inputs.results["general_text_comparisons"], method=model):
        value, low, high = fitting(row["difference"], row["ci_low"], row["ci_high"])
        sign = "+" * (row["difference"] > 0)
        yield Number(f"{method_name(model)} − base, general text", sign + value, "nats a byte", f"{low} to {high}")


def _probed(inputs: Inputs, model: str) -> Iterator[Number]:
    for row in having(inputs.results["probe_comparisons"], method=model, kind=ALL):
        value, low, high = points_fitting(row["difference"], row["ci_low"], row["ci_high"])
        yield Number(f"{method_name(model)} − base, pairs of the probe", value, "points", f"{low} to {high}")


def _spoken(inputs: Inputs) -> Iterator[Number]:
    """The best answers to speech of any model but the base."""
    if rows := _spoken_to(inputs):
        best = max(rows, key=lambda row: row["accuracy"])
        asked = having(rows, task=best["task"])
        alike = len(having(asked, accuracy=best["accuracy"]))
        who = method_name(best["method"]) + f" and {alike - 1} more" * (alike > 1) + ", the best" * (len(asked) > 1)
        if 1 < alike == len(asked):
            who = f"all {alike} models alike"
        yield _share(f"Spoken questions ({task_name(best['task'])}), {who}", best)


def _shifted(inputs: Inputs, model: str) -> Iterator[Number]:
    for row in having(text_shifts(inputs.results), model=model):
        if row["value"] is not None and row["ci_low"] is not None and row["ci_high"] is not None:
            value, low, high = fitting(row["value"], row["ci_low"], row["ci_high"])
            title = f"Importance for text ({row['reduction']}) of {method_name(model)}, moved over the layers"
            yield Number(title, value, "bits", f"{low} to {high}")


def _of_the_base(inputs: Inputs) -> Iterator[Number]:
    """Before a tuned model is there."""
    for modality, words in (("text", "Typed"), ("cascade", "Recognised"), ("speech", "Spoken")):
        for row in having(accuracies(inputs, modality), method="base"):
            yield _share(f"{words} questions ({task_name(row['task'])}), base", row)


def _share(title: str, row: QARecord) -> Number:
    value, low, high = fitting(row["accuracy"], row["ci_low"], row["ci_high"], 100)
    return Number(title, value, "%", f"{low} to {high}")


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------
def kept(inputs: Inputs) -> Drawing | None:
    """Text kept against hearing gained: the frontier, else typed against spoken answers, else what there is of text."""
    figure = Figure(figsize=SIZE, layout="constrained")
    drawing, axis = Drawing("glance-text", "Text kept against hearing gained", figure), figure.subplots()
    methods = methods_in(inputs.results)
    if of := _frontier(inputs):
        spoken_to = [row["curve"] for row in of["rows"] if row["hearing"] is not None]
        shown = sorted(set(spoken_to), key=method_key)
        every = list(dict.fromkeys([*methods, *shown]))
        panel(drawing, axis, of, [name for name in shown if name != "base"], every)
        drawing.caption = "Up and to the right is better; level line: the base. Ringed: Pareto. Bars: 95 % intervals."
        if len(shown) > MOST_IN_LEGEND:
            drawing.caption += " Names: in the figure of part Frontier, and on the marks."
    elif not inputs.results["drift"] and (spoken := _spoken_to(inputs)):
        task, every = spoken[0]["task"], methods
        metric = main_metric(inputs.results)
        rows = {(r["task"], r["method"], r["modality"]): r for r in having(inputs.results["qa"], metric=metric)}
        plane_panel(drawing, axis, task, rows, inputs)
        shown = [name for name in methods if (task, name, "speech") in rows]
        drawing.caption = (
            "Left of the dashed line: fewer typed answers right than the base. Hollow: after a recogniser."
        )
    elif dots := [*_dots(inputs)]:
        drawing.title = "Distance from the base" if inputs.results["drift"] else "Typed questions"
        every = list(dict.fromkeys([*methods, *(model for model, *_ in dots)]))
        shown = []
        for y, (model, value, low, high, written) in enumerate(dots):
            mark = look(model, every)
            axis.plot([low, high], [y, y], color=mark.color, linewidth=1.2)
            drawing.point(axis, value, y, mark, f"{method_name(model)}: {written}")
        axis.set_yticks(range(len(dots)), [method_name(model) for model, *_ in dots])
        axis.set_ylim(len(dots) - 0.5, -0.5)
        drift = bool(inputs.results["drift"])
        axis.set_xlabel("KL to the base, nats/token" if drift else "T2T accuracy, %")
        if drift:
            axis.axvline(0, color=INK, linewidth=0.8)
        drawing.caption = f"{'Drift from the base; 0: the same' if drift else 'Typed questions'}. Bars: 95 % intervals."
    else:
        return None
    if 0 < len(shown) <= MOST_IN_LEGEND:
        model_legend(figure, shown, every)
    drawing.describe("Chart")
    return drawing


def _spoken_to(inputs: Inputs) -> list[QARecord]:
    return [row for row in accuracies(inputs, "speech") if row["method"] != "base"]


def _frontier(inputs: Inputs) -> dict[str, Any] | None:
    """The first panel of the frontier, where it shows all models, or more than one."""
    for of in frontier_panels(inputs.results["frontier"])[:1]:
        rows = [row for row in of["rows"] if row["curve"] != "base"]
        n_heard = sum(row["hearing"] is not None for row in rows)
        return of if n_heard > 1 or n_heard == len(rows) else None
    return None


def _dots(inputs: Inputs) -> Iterator[tuple[str, float, float, float, str]]:
    """(model, value, low, high, in words): drift where it was measured, else typed accuracies."""
    drifts = [(model, drift) for model in models_of(inputs) if (drift := drift_of(inputs, model)) is not None]
    if drifts:
        for model, of in drifts:
            yield (
                model,
                of.value,
                of.low,
                of.high,
                f"{significant(of.value)} ({interval(of.low, of.high, significant)})",
            )
        return
    typed = accuracies(inputs, "text")
    for row in having(typed, task=typed[0]["task"]) if typed else ():
        value, low, high = (100 * it for it in (row["accuracy"], row["ci_low"], row["ci_high"]))
        yield (
            row["method"],
            value,
            low,
            high,
            f"{percent(row['accuracy'])} % ({interval(row['ci_low'], row['ci_high'])})",
        )


def layers(inputs: Inputs) -> Drawing | None:
    """The share of each layer in the importance for text, of the base and of the models in which it moved most."""
    rows, methods = text_layers(inputs.results), methods_in(inputs.results)
    there = sorted({row["model"] for row in rows}, key=method_key)
    if "base" not in there:
        return None
    moved = {row["model"]: row["value"] or 0.0 for row in text_shifts(inputs.results)}
    tuned = sorted((name for name in there if name != "base"), key=lambda name: -moved.get(name, 0.0))
    shown = ["base", *sorted(tuned[: MOST_LINES - 1], key=method_key)]
    figure = Figure(figsize=SIZE, layout="constrained")
    drawing, axis = Drawing("glance-layers", "Importance for text over the layers", figure), figure.subplots()
    for model in shown:
        of = in_order(having(rows, model=model), "layer")
        depths, shares = [row["layer"] for row in of], [100 * row["share"] for row in of]
        names = [f"{method_name(model)}, layer {layer}" for layer in depths]
        texts = [f"{name}: {significant(share)} %" for name, share in zip(names, shares, strict=True)]
        drawing.line(axis, depths, shares, look(model, methods), texts)
    axis.set(xlabel="layer", ylabel="share of the model's total, %")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    model_legend(figure, shown, methods)
    drawing.caption = f"By {rows[0]['reduction']}. Largest share at layer {_peaks(rows, shown)}."
    if len(tuned) >= MOST_LINES:
        drawing.caption += f" Of {len(tuned)} models the {MOST_LINES - 1} in which it moved most."
    drawing.alt = f"Line chart of the share of each layer. {drawing.caption}"
    return drawing
