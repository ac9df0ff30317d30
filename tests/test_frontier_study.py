"""A study with curves, of tiny models: what is measured of points, the frontier, and that the rest stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from palimpsest.config import load_config, parse_config
from palimpsest.files import read_json
from palimpsest.report import figures, page
from palimpsest.report.figures import write_figure
from palimpsest.report.inputs import read_inputs
from palimpsest.report.summary import points_of
from palimpsest.study.run import run_study
from test_study_adaptor import inputs, recipe

__all__ = ["inputs"]
ALL = figures.FIGURES
FRONTIER = ALL["frontier"]
RECIPES = Path(__file__).parent.parent / "recipes"
PLAIN = {"full": {"kind": "full", "learning_rate": 1e-2}}
CURVES = {
    "fast": {"kind": "full", "over": {"learning_rate": [1e-2, 1e-4]}},
    "lora": {"kind": "lora", "over": {"learning_rate": [1e-3, 3e-2]}},
    "mean": {"kind": "layer_lr", "importance": "mean", "learning_rate": 1e-3, "curve": "mean"},
    "back": {"kind": "blend", "of": "full", "scale": 0, "layers": [1], "curve": "back"},
}
POINTS = ["fast-0_01", "fast-1e-4", "lora-1e-3", "lora-0_03", "mean", "back"]


def with_curves(inputs: Path, methods: Any = None, **changes: Any) -> dict[str, Any]:
    section = {"own_text": {"n_texts": 4, "new_tokens": 8}, "batch_size": 4, "in_training": 0}
    return recipe(inputs, methods=methods or {**PLAIN, **CURVES}, drift=section, **changes)


@pytest.fixture(scope="module")
def both(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The study without curves, and what it becomes with them."""
    folder, before = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("before") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {})
        run_study(parse_config(with_curves(inputs, PLAIN), "test"), folder)
        shutil.copytree(folder, before)
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {"frontier": FRONTIER})
        run_study(parse_config(with_curves(inputs), "test"), folder, changed=True)
    return before, folder


def tables(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "results.json")
    return found


def test_points_are_measured_by_what_the_frontier_needs(both: tuple[Path, Path]) -> None:
    steps = sorted(path.parent.name for path in (both[1] / "methods" / "fast-1e-4").rglob("step.json"))
    assert steps == ["checkpoint", "drift", "numbers-speech", "numbers-text", "perplexity"]
    found = tables(both[1])
    assert {row["model"] for row in found["layers"]} == {"base", "full"}
    assert {row["model"] for row in found["drift"]} == {"full", *POINTS}
    assert {row["method"] for row in found["perplexity"]} == {"base", "full", *POINTS}


def test_the_frontier_has_every_method_and_agrees_with_the_other_tables(both: tuple[Path, Path]) -> None:
    found = tables(both[1])
    rows = [
        row for row in found["frontier"] if (row["text_measure"], row["hearing_measure"]) == ("drift", "speech_loss")
    ]
    assert [row["model"] for row in rows] == [
        "base", "full", "fast-1e-4", "fast-0_01", *POINTS[2:],
    ]  # fmt: skip
    drift = [row for row in found["drift"] if row["tokens"] == "all"]
    losses = {row["method"]: row["loss"] for row in found["perplexity"] if row["modality"] == "speech"}
    for row in rows:
        of = [other for other in drift if other["model"] == row["model"]]
        mean = sum(d["kl"] * d["n_tokens"] for d in of) / max(1, sum(d["n_tokens"] for d in of))
        assert row["text"] == pytest.approx(mean)
        assert row["text_ci_low"] <= row["text"] <= row["text_ci_high"]
        assert row["hearing"] == pytest.approx(losses[row["model"]])
        assert row["hearing_ci_low"] < row["hearing"] < row["hearing_ci_high"]
    base = rows[0]
    assert (base["text"], base["pareto"]) == (0, True)  # it hears through the adaptor it was given, and has no drift
    accuracies = {
        (row["method"], row["modality"]): row for row in found["qa"] if row["metric"] == "token_sequence_numbers"
    }
    for row in found["frontier"]:
        if (row["text_measure"], row["hearing_measure"]) == ("t2t", "s2t"):
            spoken, typed = (accuracies[row["model"], name] for name in ("speech", "text"))
            assert row["hearing"] == spoken["accuracy"]
            assert (row["hearing_ci_low"], row["hearing_ci_high"]) == (spoken["ci_low"], spoken["ci_high"])
            assert row["text"] == pytest.approx(typed["accuracy"] - accuracies["base", "text"]["accuracy"])


def test_curves_are_compared_with_each_other_and_with_single_methods(both: tuple[Path, Path]) -> None:
    found = tables(both[1])["equal_hearing"]
    best = [row for row in found if row["position"] == "best" and row["text_measure"] == "drift"]
    best = [row for row in best if row["hearing_measure"] == "speech_loss"]
    pairs = {(row["method_a"], row["method_b"]) for row in best}
    assert pairs == {
        *((("full", curve)) for curve in ("fast", "lora")), ("fast", "lora"), ("fast", "mean"), ("lora", "mean"),
        ("fast", "back"), ("lora", "back"),
    }  # fmt: skip
    assert {(row["points_a"], row["points_b"]) for row in best if row["method_a"] == "fast"} == {(2, 2), (2, 1)}
    for row in found:
        if row["difference"] is not None:
            assert row["difference"] == pytest.approx(row["text_b"] - row["text_a"])
            assert row["p_holm"] >= row["p_value"]
        else:
            assert row["left_out"] == "no hearing in common"
    assert any(row["difference"] is not None for row in best)


def test_curves_change_nothing_about_the_other_methods(both: tuple[Path, Path]) -> None:
    before, after = map(tables, both)
    for table, rows in before.items():
        if table in ("schema", "timings", "frontier", "equal_hearing", "restoration"):
            continue
        for row in rows:
            assert row in after[table], (table, row)
    assert before["equal_hearing"] == []
    assert before["claims"] == after["claims"]
    more = [row for row in after["comparisons"] if row not in before["comparisons"]]
    assert {row["method_a"] for row in more} == {"base"}
    assert {row["family"] for row in more if row["modality"] == "text"} == {"text, against the base, points of curves"}


def test_layers_put_back_are_compared_with_what_they_were_put_back_in(both: tuple[Path, Path]) -> None:
    before, found = map(tables, both)
    assert before["restoration"] == []
    values = {
        (row["model"], row[f"{side}_measure"]): row[side] for row in found["frontier"] for side in ("text", "hearing")
    }
    assert {row["measure"] for row in found["restoration"]} == {"drift", "t2t", "speech_loss", "s2t"}
    for row in found["restoration"]:
        assert (row["of"], row["method_a"], row["method_b"], row["layers_b"]) == ("full", "full", "back", [1])
        assert row["value_a"] == pytest.approx(values["full", row["measure"]])
        assert row["value_b"] == pytest.approx(values["back", row["measure"]])
        assert (row["returned"] is not None) == (row["measure"] == "drift")
    (drift,) = (row for row in found["restoration"] if row["measure"] == "drift")
    assert drift["returned"] == pytest.approx(1 - values["back", "drift"] / values["full", "drift"])


def test_a_study_of_curves_alone_lacks_nothing(both: tuple[Path, Path], inputs: Path, tmp_path: Path) -> None:
    """Its claims are undecided, and the page does not call missing what was not to be measured."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {n: f for n, f in ALL.items() if n in ("figure2", "figure3", "figure4")})
        folder = Path(shutil.copytree(both[1], tmp_path / "run"))
        run_study(parse_config(with_curves(inputs, {"fast": CURVES["fast"]}), "test"), folder, changed=True)
    assert {row["claim"] for row in tables(folder)["claims"] if row["verdict"] != "undecided"} <= {
        2
    }  # of the base alone
    assert "Missing from this run" not in (folder / "report.html").read_text()


def test_the_report_shows_it(both: tuple[Path, Path]) -> None:
    html = (both[1] / "report.html").read_text()
    for part in ("figure-frontier", "table-frontier", "table-equal_hearing"):
        assert f'id="{part}"' in html, part
    assert "Missing from this run" not in html
    assert [path.name for path in write_figure(both[1], "frontier")] == ["frontier.svg", "frontier.png"]
    (keeps,) = (point for point in points_of(read_inputs(both[1])) if "keeps the text" in point.question)
    assert keeps.findings[0].sentence.startswith("Drift at equal Speech loss: ")


def test_the_recipe_of_the_remedies_makes_curves_and_points() -> None:
    config = load_config(RECIPES / "keep.yaml")
    assert all(method.curve is not None for method in config.methods.values())
    assert [name for name in config.methods if name.startswith("full-")] == [
        "full-2_5e-5", "full-5e-5", "full-1e-4",
    ]  # fmt: skip
    assert not any(config.measures(run, "importance") for run in config.runs)
    assert all(config.drift_measures(run) == ["drift"] for run in config.runs)
