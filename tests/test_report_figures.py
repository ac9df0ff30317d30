"""The figures: all drawn from a whole run, the same bytes twice, none from an empty one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from palimpsest.files import UserError, write_json
from palimpsest.report.charts import _paper_like
from palimpsest.report.figures import FIGURES, draw, may_lack, why_not, write_figure, write_figures
from palimpsest.report.heatmaps import _representative, short_name
from palimpsest.report.inputs import Inputs, read_inputs
from palimpsest.report.page import write_report
from palimpsest.report.style import _LOOKS, _OTHERS, WIDTH, look, model_legend, style, to_inline_svg, to_svg
from report_fixture import accuracy_row, invented_results, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), n_questions=1)


@pytest.fixture(scope="module")
def inputs(run: Path) -> Inputs:
    return read_inputs(run)


def test_every_figure_is_written_as_svg_and_png(run: Path) -> None:
    paths = write_figures(run)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")]
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_bytes(run: Path) -> None:
    first = [path.read_bytes() for path in write_figure(run, "figure2")]
    second = [path.read_bytes() for path in write_figure(run, "figure2")]
    assert first == second
    assert b"<dc:date>" not in first[0]


def test_files_and_page_share_a_drawing_and_other_results_have_their_own(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Inputs] = []
    made = FIGURES["figure2"]
    monkeypatch.setitem(FIGURES, "figure2", lambda inputs: (seen.append(inputs), made(inputs))[1])
    given = read_inputs(run)
    write_figures(run, given)
    write_report(run, inputs=given)
    assert len(seen) == 1
    drawing = draw("figure2", given)
    assert drawing is not None
    assert drawing.svg == (run / "figures" / "figure2.svg").read_text()
    without = replace(given, results={**given.results, "layers": []})
    assert draw("figure2", without) is None
    assert len(seen) == 2


def test_without_data_there_is_no_figure_and_an_old_one_goes(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "training.svg").write_text("of an earlier state of the run")
    assert write_figures(tmp_path) == []
    assert not (tmp_path / "figures" / "training.svg").exists()


def test_a_file_in_the_place_of_their_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("somebody's notes")
    for write in (write_figures, lambda run: write_figure(run, "training")):
        with pytest.raises(UserError, match=r"figures is a file, .*; move the file away"):
            write(tmp_path)
    assert (tmp_path / "figures").read_text() == "somebody's notes"


def test_where_nothing_was_asked_in_speech_the_plane_is_not_missing(inputs: Inputs) -> None:
    typed = [row for row in inputs.results["qa"] if row["modality"] == "text"]
    for qa, lacking in ((typed, True), ([], False), (inputs.results["qa"], False)):
        given = replace(inputs, results={**inputs.results, "qa": qa})
        assert may_lack("t2t_s2t", given) == lacking
        assert (why_not("t2t_s2t", given) == "Nothing was asked in speech in this run.") == lacking


def test_where_no_method_is_called_full_its_figure_is_not_missing(inputs: Inputs) -> None:
    for methods, lacking in (({"theirs": {"kind": "given"}}, True), ({"full": {}, "x": {}}, False), (None, False)):
        assert may_lack("figure2", replace(inputs, config={**inputs.config, "methods": methods})) == lacking


def test_an_unknown_name_lists_the_known_ones(run: Path) -> None:
    with pytest.raises(UserError, match="figure1, figure2"):
        write_figure(run, "figure9")


def test_the_plane_has_intervals_in_both_directions_and_the_base_as_reference(tmp_path: Path) -> None:
    rows = [
        accuracy_row("base", "facts", "text", 120),
        accuracy_row("base", "facts", "cascade", 90),
        accuracy_row("full", "facts", "text", 60),
        accuracy_row("full", "facts", "speech", 0),
    ]
    write_json(tmp_path / "results.json", {"schema": 1, "qa": rows})
    drawing = draw("t2t_s2t", read_inputs(tmp_path))
    assert drawing is not None
    (axis,) = drawing.figure.axes
    cascade, full = (bars.lines[2] for bars in axis.containers)  # (horizontal, vertical) spans
    for bars, x, y in ((cascade, rows[0], rows[1]), (full, rows[2], rows[3])):
        spans = [np.abs(bar.get_segments()[0]).round(6).tolist() for bar in bars]
        ends = [[round(100 * record[key], 6) for key in ("ci_low", "ci_high")] for record in (x, y)]
        at = [round(100 * record["accuracy"], 6) for record in (x, y)]
        assert spans == [[[ends[0][0], at[1]], [ends[0][1], at[1]]], [[at[0], ends[1][0]], [at[0], ends[1][1]]]]
    assert axis.get_ylim()[0] < 0  # a mark at zero is not cut
    assert "facts, Base: T2T 40.0 % (34.6 to 45.6)" in drawing.tips.values()


@pytest.mark.parametrize("name", ["figure2", "deactivation"])
def test_tips_carry_the_values(inputs: Inputs, name: str) -> None:
    drawing = draw(name, inputs)
    assert drawing is not None
    svg = to_svg(drawing)
    assert drawing.tips
    for tip in drawing.tips.values():
        assert f"<title>{tip}</title>" in svg


def test_figure_2_names_its_peaks(inputs: Inputs) -> None:
    drawing = draw("figure2", inputs)
    assert drawing is not None
    assert "Base 12, Full-FT 3" in drawing.caption
    assert "Base, layer 12: " in "".join(drawing.tips.values())


@pytest.mark.parametrize(
    ("models", "title", "shares"),
    [
        (("full", "layer_lr", "lora"), "with Layer-LR and LoRA", True),
        (("tuned",), "with tuned", False),  # a diagnosis has no Figure 2
        (("m1", "m2", "m3", "m4"), "with 4 methods", False),
    ],
)
def test_figure_3_names_what_it_shows(tmp_path: Path, models: tuple[str, ...], title: str, shares: bool) -> None:
    base = [row for row in invented_results()["layers"] if row["model"] == "base"]
    layers = [{**row, "model": model} for model in ("base", *models) for row in base]
    write_json(tmp_path / "results.json", {"schema": 1, "layers": layers})
    drawing = draw("figure3", read_inputs(tmp_path))
    assert drawing is not None
    assert drawing.title == f"Figure 3. Textual importance by layer {title}"
    assert ("Figures 2 and 3 share their scales" in drawing.caption) == shares


def test_inline_figures_take_the_colours_of_the_page(inputs: Inputs) -> None:
    drawing = draw("figure2", inputs)
    assert drawing is not None
    svg = to_inline_svg(drawing)
    assert svg.startswith('<svg class="drawing" role="img" aria-label="Two line charts')
    assert "currentColor" in svg
    assert "#1c1e21" not in svg
    assert "#ffffff" not in svg
    assert "<metadata" not in svg
    assert "<style" not in svg
    identifiers = [part.split('"')[0] for part in svg.split('id="')[1:]]
    assert all(identifier.startswith("figure2-") for identifier in identifiers)
    assert len(set(identifiers)) == len(identifiers)


def test_hostile_names_stay_text_and_dollars_are_not_mathematics(tmp_path: Path) -> None:
    results = invented_results()
    hostile = "<script>alert(1)</script> $\\frac{$"
    for table in ("layers", "training"):
        for row in results[table]:
            for key in ("model", "method"):
                if row.get(key) == "lora":
                    row[key] = hostile
    write_json(tmp_path / "results.json", {"schema": 1, **results})
    for name in ("figure3", "training"):
        drawing = draw(name, read_inputs(tmp_path))
        assert drawing is not None
        svg = to_inline_svg(drawing)
        assert "<script" not in svg
        assert "$\\frac{$" in svg


def test_a_perplexity_beyond_float_range_is_shown_as_infinite(tmp_path: Path) -> None:
    results = invented_results()
    for row in results["deactivation"]:
        if row["condition"] == "top":
            row["perplexity"] = row["loss"] = None
    write_json(tmp_path / "results.json", {"schema": 1, **results})
    drawing = draw("deactivation", read_inputs(tmp_path))
    assert drawing is not None
    assert "Base, text, top removed: not finite" in drawing.alt
    assert "∞" in to_svg(drawing)


def test_maps_of_zeros_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = np.zeros((8, 8), np.float32)
    np.savez(tmp_path / "maps" / "delta.npz", **{f"full|{name}": zeros, f"lora|{name}": zeros + np.nan})
    np.savez(tmp_path / "maps" / "importance.npz", **{f"base|{name}": zeros})
    inputs = read_inputs(tmp_path)
    for figure in ("figure1", "figure4"):
        drawing = draw(figure, inputs)
        assert drawing is not None
        assert "<image" in to_svg(drawing)


def test_equal_maps_have_no_id_twice(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    same = np.arange(64, dtype=np.float32).reshape(8, 8) + 1
    maps = {f"{method}|model.layers.0.mlp.up_proj.weight": same for method in ("full", "lora")}
    np.savez(tmp_path / "maps" / "delta.npz", **maps)  # type: ignore[arg-type]
    drawing = draw("figure4", read_inputs(tmp_path))
    assert drawing is not None
    svg = to_svg(drawing)
    assert svg.count("<image") >= 2
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(set(ids)) == len(ids)


def test_the_deactivation_figure_shows_the_ratio_nearest_the_papers_in_every_scope() -> None:
    rows = invented_results()["deactivation"]
    others = [row | {"scope": "per_layer"} for row in rows] + [row | {"ratio": 0.01} for row in rows]
    chosen = _paper_like([row for row in [*others, *rows] if row["condition"] != "base"])  # type: ignore[list-item]
    assert list(chosen) == ["global", "per_layer"]
    for scope, of_scope in chosen.items():
        assert {(row["ratio"], row["scope"]) for row in of_scope} == {(0.03, scope)}


def test_scopes_have_panels_of_their_own_in_the_deactivation_figure(tmp_path: Path) -> None:
    results = invented_results()
    rows: Any = results["deactivation"]
    fewer = {"scope": "per_matrix", "perplexity": 77.0}  # what every condition of the second scope has here
    results["deactivation"] = [*rows, *(row | (fewer if row["ratio"] else {"scope": "per_matrix"}) for row in rows)]
    write_json(tmp_path / "results.json", {"schema": 1, **results})
    drawing = draw("deactivation", read_inputs(tmp_path))
    assert drawing is not None
    titles = [axis.get_title() or axis.get_title("left") for axis in drawing.figure.axes]
    assert titles == [
        f"{modality} input, {scope}" for scope in ("global", "per_matrix") for modality in ("Text", "Speech")
    ]
    # 4 whole; 30,000 times that without the top 3 % of all weights, 77 without those of each matrix.
    tips = list(drawing.tips.values())
    for said in (
        "Base, text, global, whole: 4.00",
        "Base, text, per_matrix, whole: 4.00",
        "Base, text, global, top removed: 1.20e5",
        "Base, text, per_matrix, top removed: 77.0",
    ):
        assert tips.count(said) == 1
    assert "(scope global and per_matrix, scores per_batch_abs)" in drawing.caption
    assert "median over 3 masks" in drawing.caption  # of one scope, not of both together


def test_matrices_are_chosen_by_kind_near_the_middle() -> None:
    names = [
        f"model.layers.{layer}.{kind}.weight"
        for layer in range(11)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    ]
    assert _representative(names) == [
        "model.layers.5.self_attn.q_proj.weight",
        "model.layers.5.mlp.down_proj.weight",
        "model.layers.5.self_attn.k_proj.weight",
        "model.layers.4.mlp.down_proj.weight",
    ]
    assert _representative([]) == []
    assert short_name(names[0]) == "layer 0, q_proj"
    assert short_name("transformer.h.0.attn") == "transformer.h.0.attn"


def test_a_legend_of_many_long_names_stays_within_the_figure() -> None:
    models = ["base", "full", "layer_lr", "lora", "lora_r24", "layer_lr_inverted", "layer_lr_shuffled", "full_text"]
    for shown in (models, models[:4]):
        with style():
            figure = Figure(figsize=(WIDTH, 3), layout="constrained")
            figure.subplots().plot([0, 1])
            model_legend(figure, shown, models)
            FigureCanvasAgg(figure).draw()
        box = figure.legends[0].get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [*_LOOKS.values(), *_OTHERS]
    for part in ("color", "marker", "line"):
        assert len({getattr(one, part) for one in looks}) == len(looks)
    methods = ["base", "full", "x", "y"]
    assert look("x", methods) != look("y", methods)
    assert look("full", methods) == look("full", ["full"])
