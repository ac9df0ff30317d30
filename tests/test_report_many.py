"""Reports of many methods and training runs: looks that can be told apart, legends that leave room, seconds to make."""

from __future__ import annotations

import dataclasses
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from palimpsest.commands import report as command
from palimpsest.comparison.pairs import compare
from palimpsest.files import write_json, write_jsonl
from palimpsest.intervals import mcnemar_exact
from palimpsest.report import inputs as inputs_of
from palimpsest.report import tables
from palimpsest.report.figures import draw
from palimpsest.report.inputs import Inputs, read_inputs
from palimpsest.report.page import write_report
from palimpsest.report.style import look, style
from palimpsest.report.table import Cell, Column, Table, to_html
from report_fixture import invented_results, make_run, probe_row
from report_of_many import METHODS, TASKS, make_large_run

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
        below = whole.y0
        for legend in drawing.figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= whole.x0
            assert box.x1 <= whole.x1
            assert box.y0 >= whole.y0
            below = box.y1
        panels = [axis.get_window_extent() for axis in drawing.figure.axes]
        for panel in panels:
            assert panel.y0 >= below
            assert panel.height >= 0.7 * drawing.figure.dpi  # inches
        assert not any(Bbox.intersection(a, b) for a, b in combinations(panels, 2))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("figure3", 1 + 1 + 16),  # the base, the method, a mark with a tip for each of 16 layers
        ("training", 1),
    ],
)
def test_each_of_many_methods_has_a_panel(inputs: Inputs, name: str, lines: int) -> None:
    """Where a panel with all would be 20 lines on each other."""
    drawing = draw(name, inputs)
    assert drawing is not None
    titles = [axis.get_title(loc="left") for axis in drawing.figure.axes]
    shown = ["Layer-LR", "LoRA", *MANY]
    assert titles == (shown if name == "figure3" else ["Full-FT", *shown])
    assert {len(axis.lines) for axis in drawing.figure.axes} == {lines}
    assert not drawing.figure.legends


def test_names_beside_the_heat_maps_stay_in_the_figure_and_beside_their_own(inputs: Inputs) -> None:
    maps = {(method, "model.layers.0.mlp.up_proj.weight"): np.ones((4, 4), np.float32) for method in METHODS}
    drawing = draw("figure4", dataclasses.replace(inputs, delta_maps=maps))
    assert drawing is not None
    with style():
        FigureCanvasAgg(drawing.figure).draw()
        names = [axis.yaxis.label for axis in drawing.figure.axes if axis.images]
        boxes = [name.get_window_extent() for name in names]
    assert len(boxes) == len(METHODS)
    assert all(drawing.figure.bbox.y0 <= box.y0 < box.y1 <= drawing.figure.bbox.y1 for box in boxes)
    assert not any(Bbox.intersection(a, b) for a, b in combinations(boxes, 2))
    words = {word for name in names for word in name.get_text().split("\n")}
    assert {"slowed_", "important_", "weights"} <= words or {"slowed_", "important_weights"} <= words


def test_a_description_lists_few_values_and_counts_many(inputs: Inputs) -> None:
    """A screen reader reads it in one go."""
    few, many = (draw("deactivation", of) for of in (dataclasses.replace(inputs, results=_few(inputs)), inputs))
    assert few is not None
    assert many is not None
    assert all(tip in few.alt for tip in few.tips.values())
    # base: text alone; three methods and 20 like one of them: text and speech; four bars each
    assert many.alt == f"Bar chart of {4 * (1 + 2 * 23)} values, which stand in the tables of this part."


def _few(inputs: Inputs) -> Any:
    rows = [row for row in inputs.results["deactivation"] if row["model"] not in MANY]
    return {**inputs.results, "deactivation": rows}


def test_many_models_stand_below_each_other_in_the_table_of_the_probe() -> None:
    rows: Any = [probe_row(model, kind, 30, 60, 1.0) for model in ("base", *MANY) for kind in ("all", "x")]
    table = tables.probe(rows)
    assert [column.title for column in table.columns] == ["Model", "Pairs", "n", "Right %", "Margin"]
    assert len(table.rows) == 2 * 21


@pytest.mark.slow
def test_a_page_of_20_methods_and_3_runs_is_not_too_large_to_send(tmp_path: Path) -> None:
    """Also with recordings that alone would fill their share of it."""
    run = make_large_run(tmp_path / "run")
    inputs = read_inputs(run)
    noise = 0.1 * np.random.default_rng(0).normal(size=20 * 16_000)
    for task in TASKS:  # 20 s of noise: 0.2 MB, of which 20 in each of three tasks would be 12 MB
        soundfile.write(run / "data" / f"{task}.wav", noise, 16_000)
        rows = [{"id": f"q{i}", "audio": f"{task}.wav"} for i in range(20)]
        write_jsonl(run / "data" / f"task-{task}.jsonl", rows)
    page = write_report(run, inputs=inputs).read_text(encoding="utf-8")
    assert 14e6 < len(page.encode()) < 15e6
    assert 0 < page.count("<audio ") < 60
    assert f"Recordings without room in this page: {60 - page.count('<audio ')};" in page
    assert "Missing from this run" not in page


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
