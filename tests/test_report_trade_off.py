"""The frontier in a report: what the figure, the tables and the summary say follows from the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.lines import Line2D

from palimpsest.files import write_json
from palimpsest.report.figures import draw
from palimpsest.report.inputs import read_inputs
from palimpsest.report.style import to_png
from palimpsest.report.summary import points_of
from palimpsest.report.tables import tables_of
from report_fixture import equal_hearing_row, frontier_row, make_run


def inputs_of(path: Path, **tables: Any) -> Any:
    write_json(path / "results.json", {"schema": 1, **tables})
    return read_inputs(path)


def keeps(path: Path, *rows: dict[str, Any]) -> list[str]:
    inputs = inputs_of(path, equal_hearing=list(rows))
    (point,) = (point for point in points_of(inputs) if "keeps the text" in point.question)
    return [line for finding in point.findings for line in (finding.sentence, *finding.details)]


def test_the_summary_says_who_keeps_most_and_whether_it_is_shown(tmp_path: Path) -> None:
    said = keeps(
        tmp_path,
        equal_hearing_row("full", "lora", -0.1, 0.004),
        equal_hearing_row("lora", "pull", 0.02, 0.4),  # pull has the larger drift
        equal_hearing_row("full", "pull", -0.08, 0.004),
    )
    assert said[0] == (
        "Drift at equal Speech loss: LoRA keeps more text than each of the 2 that it can be compared with, shown for 1 "
        "of them (p, Holm-corrected, at most 0.05)."
    )
    assert said[1:] == [
        "Against Full-FT: −0.100 nats a token (95 % interval −0.150 to −0.0500; p = 0.004, Holm over 2).",
        "Against pull: −0.0200 nats a token (95 % interval −0.0700 to +0.0300; p = 0.400, Holm over 2).",
    ]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    said = keeps(tmp_path, equal_hearing_row("full", "lora", None, None))
    assert said == ["Drift at equal Speech loss: not compared, no two curves have a hearing in common."]
    table = tables_of(inputs_of(tmp_path, equal_hearing=[equal_hearing_row("full", "lora", None, None)]))[
        "equal_hearing"
    ]
    assert [cell.text for cell in table.rows[0][-2:]] == ["no hearing in common", "not comparable"]
    assert [cell.text for cell in table.rows[0][6:11]] == ["–"] * 5


def test_the_table_of_the_frontier_by_hand(tmp_path: Path) -> None:
    table = tables_of(read_inputs(make_run(tmp_path)))["frontier"]
    assert [column.title for column in table.columns] == ["Method", "At", "Speech loss", "Drift", "Pareto"]
    assert [cell.plain for cell in table.rows[0]] == ["Base", "–", "–", "0 [0 to 0]", "–"]
    assert [cell.plain for cell in table.rows[1]] == [
        "Full-FT", "learning_rate 5e-4", "1.75 [1.65 to 1.85]", "0.150 [0.135 to 0.165]", "1 of 1",
    ]  # fmt: skip


def test_the_figure_draws_better_up_and_right_and_rings_the_frontier(tmp_path: Path) -> None:
    drawing = draw("frontier", read_inputs(make_run(tmp_path)))
    assert drawing is not None
    (axis,) = drawing.figure.axes
    assert axis.xaxis_inverted()
    assert axis.yaxis_inverted()
    rings = [line for line in axis.lines if line.get_markerfacecolor() == "none"]
    assert sorted(float(line.get_xdata()[0]) for line in rings) == pytest.approx([1.5, 1.75])
    said = "Drift and Speech loss: Full-FT, learning_rate 1e-3: 0.300 (0.270 to 0.330) and 1.50 (1.40 to 1.60), Pareto"
    assert said in drawing.tips.values()
    assert not any("Base" in tip for tip in drawing.tips.values())  # it was not asked in speech: its line alone


def test_lines_are_straight_in_nats_where_the_scale_is_logarithmic(tmp_path: Path) -> None:
    """As curves are compared: a method that the table calls better must not lie below the drawn line."""
    rows = [frontier_row("a-1", "a", 1.0, 0.01, 3.0, True), frontier_row("a-2", "a", 2.0, 1.01, 1.0, True)]
    drawing = draw("frontier", inputs_of(tmp_path, frontier=rows))
    assert drawing is not None
    (axis,) = drawing.figure.axes
    assert axis.get_yscale() == "symlog"
    (line,) = (line for line in axis.lines if len(line.get_xdata()) > 2)
    drawn = dict(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
    assert (drawn[3.0], drawn[1.0]) == (0.01, 1.01)
    assert drawn[2.0] == pytest.approx(0.51)


def test_twenty_curves_have_twenty_looks_and_a_wide_range_has_room(tmp_path: Path) -> None:
    rows = [
        frontier_row(f"m{i:02}-{j}", f"m{i:02}", float(j), 0.001 * 3**j * (1 + i / 20), 2 - 0.1 * j - i / 50, i == 3)
        for i in range(20)
        for j in range(1, 7)
    ]
    drawing = draw("frontier", inputs_of(tmp_path, frontier=rows))
    assert drawing is not None
    (axis,) = drawing.figure.axes
    assert axis.get_yscale() == "symlog"
    legend = drawing.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()][-2:] == ["Base", "Pareto"]
    marks = {(str(of.get_color()), str(of.get_marker())) for of in legend.legend_handles if isinstance(of, Line2D)}
    assert len(marks) == len(legend.get_texts()) == 22
    assert to_png(drawing).startswith(b"\x89PNG")
