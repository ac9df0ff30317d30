"""Text kept against hearing gained, in a report: the figure `frontier`, two tables, the summary's sentences.

How the numbers come about: comparison/frontier.py and docs/frontier.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from palimpsest.records import EqualHearingRecord, FrontierRecord
from palimpsest.report.inputs import Inputs, having, method_key, method_name, methods_in, task_name
from palimpsest.report.style import INK, WIDTH, Drawing, legend_below, look
from palimpsest.report.table import (
    EMPTY,
    Cell,
    Column,
    Field,
    Row,
    Rows,
    Table,
    cells,
    grouped,
    holm_over,
    interval,
    number,
    numbers,
    p_value,
    percent,
    points,
    significant,
    table,
    text,
    words,
)

LEVEL = 0.05
PANEL_HEIGHT = 2.2  # inches
MOST_COLUMNS = 3  # panels beside each other
STEPS = 24  # of the line between two points
LONGEST_TITLE = 30  # of a panel, on one line
WIDE_RANGE = 20  # drifts that differ by more are shown on a scale that is logarithmic above the smallest
TEXT = {"drift": "Drift", "general_text": "General text", "t2t": "T2T"}
HEARING = {"speech_loss": "Speech loss", "s2t": "S2T"}
UNITS = {
    "drift": "KL to the base, nats/token",
    "general_text": "loss − base's, nats/token",
    "t2t": "accuracy − base's, points",
    "speech_loss": "loss from speech, nats/token",
    "s2t": "S2T accuracy, %",
}
POSITIONS = {"best": "best both reach", "middle": "middle of both"}


def measure_name(row: Row, side: str) -> str:
    """Of `side` text or hearing: its name, with the task where there is one."""
    name, task = row[f"{side}_measure"], row[f"{side}_task"]
    return str({**TEXT, **HEARING}.get(name, name)) + (f", {task_name(task)}" if task else "")


def writer(measure: str) -> Callable[[float], str]:
    """Accuracies as percent, differences of accuracies as points, nats as they are."""
    if measure in ("t2t", "s2t"):
        return points if measure == "t2t" else percent
    return lambda value: significant(value).replace("-", "−")


def place(row: Row) -> str:
    """A curve and the point on it: Full-FT, learning_rate 2e-4."""
    if row["point"] is None:
        return method_name(row["model"] if row["varied"] is None else row["curve"])
    return f"{method_name(row['curve'])}, {row['varied']} {_written(row['point'])}"


def _written(value: float | str) -> str:
    """2e-4 for 0.0002, as it stands in the method's name."""
    if not isinstance(value, int | float):
        return value
    return re.sub(r"\.?0*e-0*", "e-", f"{value:e}") if 0 < abs(value) < 0.01 else f"{value:g}"


def frontier_panels(records: Sequence[FrontierRecord]) -> list[dict[str, Any]]:
    """The records by text and hearing measure, as they come; those that no method has both of are left out."""
    keys = ("text_measure", "text_task", "hearing_measure", "hearing_task")
    return [of for of in grouped(records, *keys) if any(row["hearing"] is not None for row in of["rows"])]


# ---------------------------------------------------------------------------------------------------------------------
# Figure
# ---------------------------------------------------------------------------------------------------------------------
def frontier(inputs: Inputs) -> Drawing | None:
    """A panel per text and hearing measure; a curve per method, up and to the right is better everywhere."""
    panels = frontier_panels(inputs.results["frontier"])
    if not panels:
        return None
    columns = min(MOST_COLUMNS, len({(of["hearing_measure"], of["hearing_task"]) for of in panels}))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * lines + 0.6), layout="constrained")
    drawing = Drawing("frontier", "Text kept against hearing gained", figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    curves = sorted({row["curve"] for of in panels for row in of["rows"]} - {"base"}, key=method_key)
    methods = list(dict.fromkeys([*methods_in(inputs.results), *curves]))
    for axis, of in zip(axes.flat, panels, strict=False):
        panel(drawing, axis, of, curves, methods)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    looks = [look(curve, methods) for curve in curves]
    handles: list[Any] = [Line2D([], [], color=m.color, marker=m.marker, linestyle=m.line) for m in looks]
    handles += [Line2D([], [], color=INK, linewidth=0.8), _ring([], [])]
    legend_below(figure, handles, [*map(method_name, curves), "Base", "Pareto"], most=5, handlelength=3.0)
    drawing.caption = (
        "Text kept (upright) against hearing gained (level), up and to the right is better; lines join the points of "
        "a method in the order of the value that is varied, bars are 95 % intervals. Ringed: no other is at least as "
        "good in both and better in one, intervals aside. Level line: the base's text."
    )
    drawing.describe("Scatter chart")
    return drawing


def why_no_frontier(inputs: Inputs) -> str:
    """The sentence that stands where the figure would."""
    return (
        "There is no frontier of text against hearing: it needs a section drift in the recipe, or methods over several "
        "values (over), and models that are asked in speech."
    )


def panel(drawing: Drawing, axis: Axes, of: dict[str, Any], curves: Sequence[str], methods: Sequence[str]) -> None:
    rows: list[FrontierRecord] = of["rows"]
    scale_x, scale_y = (100.0 if of[f"{side}_measure"] in ("t2t", "s2t") else 1.0 for side in ("hearing", "text"))
    title = f"{measure_name(of, 'text')} and {measure_name(of, 'hearing')}"
    for curve in ["base", *curves]:
        on = [row for row in rows if row["curve"] == curve and row["hearing"] is not None]
        if not on:
            continue
        mark = look(curve, methods)
        xs = [scale_x * (row["hearing"] or 0.0) for row in on]
        ys = [scale_y * row["text"] for row in on]
        axis.plot(*_line(xs, ys), color=mark.color, linestyle=mark.line, linewidth=1.1)
        for row, x, y in zip(on, xs, ys, strict=True):
            across = [scale_x * (row["hearing_ci_low"] or 0.0), scale_x * (row["hearing_ci_high"] or 0.0)]
            upright = [scale_y * row["text_ci_low"], scale_y * row["text_ci_high"]]
            axis.plot(across, [y, y], color=mark.color, linewidth=0.6, alpha=0.6)
            axis.plot([x, x], upright, color=mark.color, linewidth=0.6, alpha=0.6)
            drawing.point(axis, x, y, mark, f"{title}: {_said(row)}")
            if row["pareto"]:
                axis.add_line(_ring([x], [y]))
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.set_title(title if len(title) <= LONGEST_TITLE else title.replace(" and ", "\nand "), fontsize=7.5)
    axis.set_xlabel(UNITS[of["hearing_measure"]], fontsize=7.5)
    axis.set_ylabel(UNITS[of["text_measure"]], fontsize=7.5)
    axis.tick_params(labelsize=7)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    if of["text_measure"] == "drift":
        _wide_range(axis, [row["text"] for row in rows], max(row["text_ci_high"] for row in rows))
    if rows[0]["hearing_better"] == "lower":
        axis.invert_xaxis()
    if rows[0]["text_better"] == "lower":
        axis.invert_yaxis()


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """What joins the points, in small steps: straight in the values, as curves are compared, on any scale."""
    shares = [0.0] if len(xs) == 1 else [i / STEPS for i in range(STEPS * (len(xs) - 1) + 1)]
    line: tuple[list[float], list[float]] = [], []
    for share in shares:
        i = min(int(share), max(0, len(xs) - 2))
        for on, of in zip(line, (xs, ys), strict=True):
            on.append(of[0] if len(of) == 1 else (1 - (share - i)) * of[i] + (share - i) * of[i + 1])
    return line


def _wide_range(axis: Axes, values: Sequence[float], top: float) -> None:
    """Over a wide range logarithmic above the smallest value; 0, the base, has a place all the same."""
    above = [value for value in values if value > 0]
    if above and max(above) > WIDE_RANGE * min(above):
        axis.set_yscale("symlog", linthresh=min(above))
        ticks = [0.0, *(n * 10.0**e for e in range(-8, 3) for n in (1, 2, 5) if min(above) <= n * 10.0**e <= 1.1 * top)]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(-0.3 * min(above), 1.2 * top)


def _ring(xs: Sequence[float], ys: Sequence[float]) -> Line2D:
    return Line2D(xs, ys, color=INK, marker="o", markersize=8.5, markerfacecolor="none", markeredgewidth=0.8, ls="none")


def _said(row: FrontierRecord) -> str:
    """The point, with both values and their intervals."""
    parts = []
    for value, low, high, measure in (
        (row["text"], row["text_ci_low"], row["text_ci_high"], row["text_measure"]),
        (row["hearing"], row["hearing_ci_low"], row["hearing_ci_high"], row["hearing_measure"]),
    ):
        write = writer(measure)
        parts.append(f"{write(value or 0.0)} ({interval(low, high, write)})")
    return f"{place(row)}: {' and '.join(parts)}{', Pareto' if row['pareto'] else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
def frontier_table(records: Rows) -> Table:
    """A row per method: every hearing and text measure, and in how many of their pairs it is on the frontier."""
    heard = list(dict.fromkeys((row["hearing_measure"], row["hearing_task"]) for row in records))
    kept = list(dict.fromkeys((row["text_measure"], row["text_task"]) for row in records))
    groups = grouped(records, "model")
    order = list(dict.fromkeys(row["curve"] for row in sorted(records, key=lambda row: method_key(row["curve"]))))
    groups.sort(key=lambda of: order.index(of["rows"][0]["curve"]))  # stable: points stay in the order of their value
    return table(
        "frontier",
        "Text kept and hearing gained, by method",
        (
            (Column("Method"), lambda of: text(method_name(of["rows"][0]["curve"]))),
            (Column("At"), lambda of: _at(of["rows"][0])),
            *(_of_measure("hearing", *key) for key in heard),
            *(_of_measure("text", *key) for key in kept),
            cells("Pareto", _pareto),
        ),
        groups,
        "Drift: KL(base ‖ model) on all of the base's own text, nats per token. General text: loss minus the base's, "
        "nats per token. T2T: accuracy minus the base's, points. Speech loss: nats per token of the held-out answers "
        "to spoken questions. Pareto: in how many of the pairs of a text and a hearing measure no other method is at "
        "least as good in both and better in one, intervals aside. Brackets: 95 % interval.",
    )


def _at(row: Row) -> Cell:
    if row["point"] is None:
        return EMPTY
    return Cell(f"{row['varied']} {_written(row['point'])}", sort=row["point"])


def _of_measure(side: str, measure: str, task: str | None) -> Field:
    title = measure_name({f"{side}_measure": measure, f"{side}_task": task}, side)
    title += {"t2t": ", points", "s2t": " %"}.get(measure, "")
    write = writer(measure)

    def cell(of: Row) -> Cell:
        rows = having(of["rows"], **{f"{side}_measure": measure, f"{side}_task": task})
        if not rows or rows[0][side] is None:
            return EMPTY
        row = rows[0]
        return number(row[side], write(row[side]), interval(row[f"{side}_ci_low"], row[f"{side}_ci_high"], write))

    return cells(title, cell)


def _pareto(of: Row) -> Cell:
    known = [row["pareto"] for row in of["rows"] if row["pareto"] is not None]
    return Cell(f"{sum(known)} of {len(known)}", sort=sum(known)) if known else EMPTY


def equal_hearing_table(records: Rows) -> Table:
    """Every pair of curves at the same hearing."""

    def side(name: str) -> Field:
        def cell(row: Row) -> Cell:
            value = row[f"text_{name}"]
            return EMPTY if value is None else number(value, writer(row["text_measure"])(value))

        return cells(f"Text of {name.upper()}", cell)

    def difference(row: Row) -> Cell:
        if row["difference"] is None:
            return EMPTY
        write = signed(row["text_measure"])
        return number(row["difference"], write(row["difference"]), interval(row["ci_low"], row["ci_high"], write))

    def level(row: Row) -> Cell:
        value = row["hearing"]
        return EMPTY if value is None else number(value, writer(row["hearing_measure"])(value))

    def in_common(row: Row) -> Cell:
        return EMPTY if row["difference"] is None else number(row["overlap"], f"{100 * row['overlap']:.0f} %")

    return table(
        "equal_hearing",
        "Text kept at equal hearing",
        (
            (Column("Text"), lambda row: text(measure_name(row, "text"))),
            (Column("At equal"), lambda row: text(measure_name(row, "hearing"))),
            words("At", "position", lambda name: POSITIONS.get(name, name)),
            cells("Hearing", level),
            *(words("A", "method_a", method_name), words("B", "method_b", method_name)),
            *(side("a"), side("b"), cells("B − A", difference), cells("In common", in_common)),
            *(numbers("p", "p_value", p_value), numbers("p, Holm", "p_holm", p_value)),
            cells("Holm over", lambda row: Cell(holm_over(row), sort=row["n_family"])),
            words("B is", "verdict"),
        ),
        records,
        "The points of a method, joined by straight lines in the order of the value that is varied; its best text "
        "where the line passes the hearing. best both reach: the best hearing that both lines reach; middle of both: "
        "of what both reach. A single method is compared where a line passes its hearing. Paired: the same texts, "
        "questions and answers drawn for all, 10 000 times. In common: the share of draws in which the two hear the "
        "same somewhere, of which the interval is. p: twice the share of draws on the rarer side of 0, those without a "
        "hearing in common on both sides; with several training runs a t test with the jackknife over runs. Holm over: "
        "the pairs of one text and hearing measure at one place. Drift and general text: nats per token, lower is "
        "better; T2T: points. Brackets: 95 % interval.",
    )


def signed(measure: str) -> Callable[[float], str]:
    """Differences: of accuracies in points, of nats as they are."""
    if measure in ("t2t", "s2t"):
        return points
    return lambda value: ("+" if value > 0 else "") + significant(value).replace("-", "−")


# ---------------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------------
def keeps_most(inputs: Inputs) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(sentence, details) per text measure, at the best hearing both reach: which curve keeps most, and is that shown?

    Hearing is the loss of the held-out answers from speech where it is known, else the first task's S2T.
    """
    rows = having(inputs.results["equal_hearing"], position="best")
    for of in grouped(rows, "text_measure", "text_task"):
        first = of["rows"][0]
        heard = {key: first[key] for key in ("hearing_measure", "hearing_task")}
        same: list[EqualHearingRecord] = having(of["rows"], **heard)
        tested = [row for row in same if row["difference"] is not None]
        what = f"{measure_name(of, 'text')} at equal {measure_name(same[0], 'hearing')}"
        if not tested:
            yield f"{what}: not compared, no two curves have a hearing in common.", ()
            continue
        names = dict.fromkeys(name for row in tested for name in (row["method_a"], row["method_b"]))
        best = max(names, key=lambda name: _standing(tested, name))
        own = [row for row in tested if best in (row["method_a"], row["method_b"])]
        better = [_gain(row, best) > 0 for row in own]
        shown = [gain and (row["p_holm"] or 0.0) <= LEVEL for row, gain in zip(own, better, strict=True)]
        among = f"each of the {len(own)} that it" if all(better) else f"{sum(better)} of the {len(own)} that it"
        of_them = f"for {sum(shown)} of them"
        if len(own) == 1:
            among, of_them = "the one that it", "with an interval"
        if any(shown):
            who = f"{method_name(best)} keeps more text than {among} can be compared with, shown {of_them}"
        else:
            who = (
                f"no method is shown to keep more than another; {method_name(best)} lies above {among} is compared with"
            )
        sentence = f"{what}: {who} (p, Holm-corrected, at most 0.05)."
        yield sentence, tuple(_against(row, best) for row in own)


def _gain(row: EqualHearingRecord, name: str) -> float:
    """How much more text `name` keeps than the other, above 0 being more."""
    sign = 1 if row["text_better"] == "higher" else -1
    return sign * (1 if row["method_b"] == name else -1) * (row["difference"] or 0.0)


def _standing(rows: Sequence[EqualHearingRecord], name: str) -> tuple[float, int, float]:
    """(share of its comparisons in which a curve keeps more, how many those are, how much more on average)."""
    gains = [_gain(row, name) for row in rows if name in (row["method_a"], row["method_b"])]
    more = sum(gain > 0 for gain in gains)
    return more / len(gains), more, fmean(gains)


def _against(row: EqualHearingRecord, name: str) -> str:
    turned = row["method_b"] == name
    sign = 1 if turned else -1
    value, ends = sign * (row["difference"] or 0.0), sorted(sign * (row[end] or 0.0) for end in ("ci_low", "ci_high"))
    write = signed(row["text_measure"])
    unit = "points" if row["text_measure"] == "t2t" else "nats a token"
    p = p_value(row["p_holm"])
    return (
        f"Against {method_name(row['method_a' if turned else 'method_b'])}: {write(value)} {unit} (95 % interval "
        f"{interval(ends[0], ends[1], write)}; p {p if p.startswith('<') else f'= {p}'}, {_over(row)})."
    )


def _over(row: EqualHearingRecord) -> str:
    return row["left_out"] or f"Holm over {row['n_family']}"
