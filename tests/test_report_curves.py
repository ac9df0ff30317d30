"""Deletion curves and curves of training: the points are the records, and what is not there is not drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from palimpsest.files import UserError, write_json, write_text
from palimpsest.report.curves import why_no_retention
from palimpsest.report.figures import draw, write_figure
from palimpsest.report.inputs import Inputs, read_inputs
from palimpsest.report.page import write_report
from palimpsest.report.style import Drawing, to_svg
from report_fixture import deletion_rows, eval_row, invented_results


def _inputs(path: Path, **tables: Any) -> Inputs:
    write_json(path / "results.json", {"schema": 1, **tables})
    return read_inputs(path)


def _drawn(name: str, inputs: Inputs) -> Drawing:
    drawing = draw(name, inputs)
    assert drawing is not None
    return drawing


def _lines(figure: Figure, panel: int) -> list[list[tuple[float, float]]]:
    """Lines of more than one point, (x, y) in data units."""
    lines = [line.get_xydata().round(9).tolist() for line in figure.axes[panel].lines]
    return [[(x, y) for x, y in line] for line in lines if len(line) > 1]


SWEEP = {
    ("top", 0.01, None): 200.0,
    ("top", 0.1, None): 4000.0,
    ("random", 0.01, 1): 4.0,
    ("random", 0.01, 2): 6.0,
    ("random", 0.1, 1): 50.0,
    ("random", 0.1, 2): 70.0,
    ("bottom", 0.01, None): 4.0,
    ("bottom", 0.1, None): 4.5,
}


def test_a_deletion_curve_goes_through_the_records(tmp_path: Path) -> None:
    drawing = _drawn("deletion", _inputs(tmp_path, deactivation=deletion_rows("base", "text", 4.0, SWEEP)))
    titles = [axis.get_title() or axis.get_title("left") for axis in drawing.figure.axes]
    assert titles == ["Most important removed", "Random removed", "Least important removed"]
    (top,) = _lines(drawing.figure, 0)
    assert top == [(0.001, 4.0), (0.01, 200.0), (0.1, 4000.0)]  # 0 stands a step of ratios below 1 %
    *spans, middle = _lines(drawing.figure, 1)
    # The median of the logarithms: of two masks √(4 · 6) and √(50 · 70).
    assert middle == [(0.001, 4.0), (0.01, round(24**0.5, 9)), (0.1, round(3500**0.5, 9))]
    assert spans == [[(0.01, 4.0), (0.01, 6.0)], [(0.1, 50.0), (0.1, 70.0)]]
    labels = [label.get_text() for label in drawing.figure.axes[0].get_xticklabels()]
    assert labels == ["0", "1", "10"]
    assert "Base, text, 10 % (top) removed: 4000" in drawing.tips.values()
    assert "Base, text, 0 % (top) removed: 4.00" in drawing.tips.values()


def test_one_ratio_is_two_points_and_is_said(tmp_path: Path) -> None:
    one = {key: value for key, value in SWEEP.items() if key[1] == 0.01}
    drawing = _drawn("deletion", _inputs(tmp_path, deactivation=deletion_rows("base", "text", 4.0, one)))
    assert len(_lines(drawing.figure, 0)[0]) == 2
    assert "one ratio" in drawing.caption


def test_the_setting_with_the_most_ratios_is_shown_alone(tmp_path: Path) -> None:
    rows = deletion_rows("base", "text", 4.0, {("top", 0.03, None): 9.0})
    rows += deletion_rows("base", "text", 4.0, SWEEP, scope="per_layer")
    drawing = _drawn("deletion", _inputs(tmp_path, deactivation=rows))
    assert "scope per_layer" in drawing.caption
    assert not any("3 %" in tip for tip in drawing.tips.values())


def test_scopes_with_as_many_ratios_have_rows_of_their_own(tmp_path: Path) -> None:
    matrix = {key: 2.0 * value for key, value in SWEEP.items()}
    rows = deletion_rows("base", "text", 4.0, SWEEP)
    rows += deletion_rows("base", "text", 4.0, matrix, scope="per_matrix")
    drawing = _drawn("deletion", _inputs(tmp_path, deactivation=rows))
    assert len(drawing.figure.axes) == 6
    labels = [drawing.figure.axes[i].get_ylabel() for i in (0, 3)]
    assert labels == ["perplexity, text input,\nglobal", "perplexity, text input,\nper_matrix"]
    assert _lines(drawing.figure, 0) == [[(0.001, 4.0), (0.01, 200.0), (0.1, 4000.0)]]
    assert _lines(drawing.figure, 3) == [[(0.001, 4.0), (0.01, 400.0), (0.1, 8000.0)]]
    assert "Base, text, per_matrix, 10 % (top) removed: 8000" in drawing.tips.values()
    assert "scope global and per_matrix" in drawing.caption


def test_a_perplexity_beyond_float_range_has_a_sign_and_no_point(tmp_path: Path) -> None:
    rows = deletion_rows("base", "text", 4.0, SWEEP | {("top", 0.1, None): None})
    drawing = _drawn("deletion", _inputs(tmp_path, deactivation=rows))
    (top,) = _lines(drawing.figure, 0)
    assert top == [(0.001, 4.0), (0.01, 200.0)]
    assert "Base, text, 10 % (top) removed: not finite" in drawing.alt
    assert "∞" in to_svg(drawing)


def test_every_input_has_a_row_of_panels(tmp_path: Path) -> None:
    rows = deletion_rows("full", "text", 4.0, SWEEP) + deletion_rows("full", "speech", 9.0, SWEEP)
    drawing = _drawn("deletion", _inputs(tmp_path, deactivation=rows))
    assert len(drawing.figure.axes) == 6
    assert _lines(drawing.figure, 3)[0][0] == (0.001, 9.0)


def test_no_weights_removed_is_no_curve(tmp_path: Path) -> None:
    assert draw("deletion", _inputs(tmp_path, deactivation=deletion_rows("base", "text", 4.0, {}))) is None


def _evals(values: dict[int, float], modality: str = "text") -> list[dict[str, Any]]:
    return [eval_row("full", step, modality, value) for step, value in values.items()]


def test_retention_goes_through_the_measurements(tmp_path: Path) -> None:
    records = _evals({20: 5.0, 10: 4.0}) + _evals({10: 40.0, 20: 30.0}, "speech")
    base = {
        **{"method": "base", "task": "heldout", "modality": "text", "n_examples": 9},
        **{"n_tokens": 1234, "loss": 1.0, "perplexity": 3.0},
    }
    drawing = _drawn("retention", _inputs(tmp_path, training=records, perplexity=[base]))
    text, speech = (_lines(drawing.figure, panel) for panel in (0, 1))
    assert text[0] == [(10.0, 4.0), (20.0, 5.0)]
    assert text[1] == [(0.0, 3.0), (1.0, 3.0)]  # the base's level, across the panel
    assert speech == [[(10.0, 40.0), (20.0, 30.0)]]
    assert "Full-FT, text input, from 4.00 to 5.00" in drawing.caption
    assert "Full-FT, text input, step 20: 5.00" in drawing.tips.values()


def test_the_bases_level_is_left_out_where_it_was_measured_on_other_answers(tmp_path: Path) -> None:
    base = {
        **{"method": "base", "task": "heldout", "modality": "text", "n_examples": 9},
        **{"n_tokens": 1235, "loss": 1.0, "perplexity": 3.0},
    }
    drawing = _drawn("retention", _inputs(tmp_path, training=_evals({10: 4.0, 20: 5.0}), perplexity=[base]))
    assert len(_lines(drawing.figure, 0)) == 1
    assert "base" not in drawing.caption


def test_the_end_of_the_adaptors_phase_is_marked(tmp_path: Path) -> None:
    steps = [
        {"method": "full", "kind": "train", "phase": phase, "step": step, "epoch": 0.1, "loss": 1.0, "learning_rate": 0}
        for step, phase in ((1, "adaptor"), (2, "adaptor"), (3, "method"), (4, "method"))
    ]
    drawing = _drawn("training", _inputs(tmp_path, training=steps))
    assert [(2.5, 0.0), (2.5, 1.0)] in _lines(drawing.figure, 0)
    assert "only the adaptor" in drawing.caption


def test_one_measurement_is_no_curve_and_the_report_says_why(tmp_path: Path) -> None:
    inputs = _inputs(tmp_path, training=_evals({10: 4.0}))
    assert draw("retention", inputs) is None
    assert "no method has more than one measurement" in why_no_retention(inputs)
    with pytest.raises(UserError, match="no method has more than one measurement"):
        write_figure(tmp_path, "retention")


def test_a_run_that_measured_nothing_between_steps_says_so_where_the_figure_would_be(tmp_path: Path) -> None:
    rows = [row for row in invented_results()["training"] if row.get("kind") != "eval"]
    write_json(tmp_path / "results.json", {"schema": 1, "training": rows})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "the recipe does not set training.eval_every" in page
    assert "The figure “retention” has no data" not in page  # nothing was asked for, so nothing is missing
    write_text(tmp_path / "study.yaml", "training: {eval_every: 5}\n")
    assert "results.json has no measurement" in write_report(tmp_path).read_text(encoding="utf-8")


def test_replayed_text_is_no_part_of_the_training_loss(tmp_path: Path) -> None:
    """Steps of questions, of text, and of both: 2.8 = 0.25 · 4 + 0.75 · 2.4."""
    parts = ((3.0, 0, None), (5.0, 1, 5.0), (2.8, 0.25, 4.0))
    common = {"method": "full", "kind": "train", "epoch": 0.1, "learning_rate": 0}
    steps = [
        {**common, "step": step, "loss": loss, "replayed": share} | ({"loss_replayed": of_text} if share else {})
        for step, (loss, share, of_text) in enumerate(parts, 1)
    ]
    drawing = _drawn("training", _inputs(tmp_path, training=steps))
    assert _lines(drawing.figure, 0) == [[(1.0, 3.0), (3.0, 2.4)]]
    assert "Replayed text is left out." in drawing.caption
    plain = _drawn("training", _inputs(tmp_path, training=[{**common, "step": 1, "loss": 3.0}]))
    assert "Replayed" not in plain.caption
