"""Reports of many methods and training runs: looks that can be told apart, legends that leave room, seconds to make."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from palimpsest.commands import report as command
from palimpsest.comparison.pairs import compare
from palimpsest.files import write_json
from palimpsest.intervals import mcnemar_exact
from palimpsest.report import inputs as inputs_of
from palimpsest.report.figures import draw
from palimpsest.report.inputs import Inputs, read_inputs
from palimpsest.report.style import look, style
from palimpsest.report.table import Cell, Column, Table, to_html
from report_fixture import invented_results, make_run

MANY = [f"method_number_{i:02d}" for i in range(20)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    results: dict[str, list[dict[str, Any]]] = invented_results()
    for table, key in (("layers", "model"), ("qa", "method"), ("deactivation", "model"), ("training", "method")):
        of_lora = [row for row in results[table] if row[key] == "lora"]
        results[table] += [{**row, key: name} for name in MANY for row in of_lora]
    run = make_run(tmp_path_factory.mktemp("many"), without={"maps", "samples"})
    write_json(run / "results.json", {"schema": 1, **results})
    return read_inputs(run)


def test_no_two_methods_look_alike() -> None:
    methods = ["base", "full", "layer_lr", "lora", *(f"m{i}" for i in range(60))]
    looks = [look(method, methods) for method in methods]
    assert len({(one.color, one.marker) for one in looks}) == len(methods)
    assert look("m3", methods).marker == "*"  # the first four are what they were


@pytest.mark.parametrize("name", ["figure3", "deactivation", "deletion", "t2t_s2t", "training", "retention"])
def test_legends_stay_in_the_figure_and_beside_the_axes(inputs: Inputs, name: str) -> None:
    drawing = draw(name, inputs)
    assert drawing is not None
    with style():
        canvas = FigureCanvasAgg(drawing.figure)
        canvas.draw()
        whole = drawing.figure.bbox
        (legend,) = drawing.figure.legends
        box = legend.get_window_extent()
        assert box.x0 >= whole.x0
        assert box.x1 <= whole.x1
        assert box.y0 >= whole.y0
        for axis in drawing.figure.axes:
            assert axis.get_window_extent().y0 >= box.y1  # above it
            assert axis.get_window_extent().height >= 0.9 * drawing.figure.dpi  # inches


def test_a_large_table_is_made_in_seconds() -> None:
    rows = tuple(tuple(Cell(f"{i} <b>", "1 to 2", float(i)) for _ in range(8)) for i in range(10_000))
    started = time.process_time()
    page = to_html(Table("t", "T", tuple(Column(f"c{i}", numeric=True) for i in range(8)), rows))
    assert time.process_time() - started < 2  # six times as long with Markup.format
    assert page.count("&lt;b&gt;") == 80_000


def test_a_model_that_cannot_differ_makes_no_other_row_weaker() -> None:
    """The adaptor alone leaves the text as it was: its row against the base is no test."""
    base = {f"q{i}": i < 10 for i in range(20)}
    full = {f"q{i}": i < 3 for i in range(20)}
    verdicts = {"base": base, "adaptor": base, "full": full}
    rows = compare(verdicts, task="x", modality="text", metric="m", seed=0, same={"adaptor": "base"})
    found = {(row["method_a"], row["method_b"]): row for row in rows}
    assert found["base", "adaptor"]["p_holm"] == 1.0
    assert found["base", "full"]["p_holm"] == mcnemar_exact(7, 0)  # of one test, not of three


@pytest.mark.slow
def test_a_report_reads_its_results_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", without={"maps", "samples", "data"})
    read: list[Path] = []
    whole = inputs_of._read_results
    monkeypatch.setattr(inputs_of, "_read_results", lambda path, missing: read.append(path) or whole(path, missing))
    assert len(list(command.run(command.Options([run])))) == 1
    assert read == [run / "results.json"]
    assert (run / "report.html").exists()
    assert list((run / "figures").glob("*.svg"))
