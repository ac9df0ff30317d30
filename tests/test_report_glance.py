"""The first screen of a report: three numbers with their intervals and two pictures, of what the run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palimpsest.files import write_json
from palimpsest.report.figures import first_pictures
from palimpsest.report.glance import base_importance, closing, in_focus, numbers_of, opening
from palimpsest.report.inputs import Inputs, read_inputs
from report_fixture import accuracy_row, comparison_row, drift_row, frontier_row, general_text_comparison, make_run


def _run(path: Path, **tables: Any) -> Inputs:
    write_json(path / "results.json", {"schema": 1, **tables})
    return read_inputs(path)


def _layer(model: str, layer: int, share: float) -> dict[str, Any]:
    return {
        "model": model, "modality": "text", "reduction": "per_batch_abs", "layer": layer, "kind": "all",
        "total": share, "mean": share, "share": share, "n_parameters": 10,
    }  # fmt: skip


LAYERS = [_layer("base", layer, share) for layer, share in enumerate((0.2, 0.4, 0.3, 0.1))]


def test_the_numbers_are_of_text_by_two_measures_and_of_hearing(tmp_path: Path) -> None:
    qa = [
        accuracy_row(m, "facts", put, n)
        for m, put, n in (("base", "text", 120), ("full", "text", 60), ("full", "speech", 30))
    ]
    inputs = _run(
        tmp_path,
        qa=qa,
        comparisons=[comparison_row("facts", "base", "full", -0.2, 0.001)],
        drift=[drift_row("full", "plain", 0.5)],
        general_text_comparisons=[general_text_comparison("full", 0.1)],
    )
    found = [(it.title, it.value, it.unit, it.spread) for it in numbers_of(inputs)]
    assert found == [
        ("Full-FT − base, typed questions (facts)", "−20", "points", "−25 to −15"),
        ("Drift of Full-FT on text of the base", "0.50", "nats a token", "0.45 to 0.55"),
        ("Spoken questions (facts), Full-FT", "10", "%", "7 to 14"),  # Wilson of 30 in 300: 7.1 to 13.9
    ]


@pytest.mark.parametrize(("p", "unit"), [(0.001, "nats a byte"), (0.4, "nats a token")])
def test_the_measure_by_which_text_was_lost_is_among_the_numbers(tmp_path: Path, p: float, unit: str) -> None:
    """Before the drift, where the questions show no loss: the sentence above is about it."""
    inputs = _run(
        tmp_path,
        qa=[accuracy_row(method, "facts", "text", 60) for method in ("base", "full")],
        comparisons=[comparison_row("facts", "base", "full", -0.2, 0.2)],
        drift=[drift_row("full", "plain", 0.5)],
        general_text_comparisons=[{**general_text_comparison("full", 0.1), "p_holm": p}],
    )
    assert [it.unit for it in numbers_of(inputs)][:2] == ["points", unit]


@pytest.mark.parametrize(
    ("right", "who"),
    [
        ((30, 6, 3), "Full-FT, the best"),
        ((30, 30, 3), "Full-FT and 1 more, the best"),
        ((0, 0, 0), "all 3 models alike"),
        ((0,), "Full-FT"),
    ],
)
def test_equal_answers_to_speech_have_no_best(tmp_path: Path, right: tuple[int, ...], who: str) -> None:
    names = ("full", "layer_lr", "lora")[: len(right)]
    qa = [accuracy_row(name, "facts", "speech", n) for name, n in zip(names, right, strict=True)]
    numbers = numbers_of(_run(tmp_path, qa=qa, drift=[drift_row("full", "plain", 0.5)]))
    assert numbers[-1].title == f"Spoken questions (facts), {who}"


def test_what_was_not_measured_gives_its_place_to_the_next(tmp_path: Path) -> None:
    inputs = _run(
        tmp_path,
        drift=[drift_row("full", "plain", 0.5)],
        general_text_comparisons=[general_text_comparison("full", 0.1)],
    )
    assert [it.unit for it in numbers_of(inputs)] == ["nats a byte", "nats a token"]  # the loss that is shown, first


def test_an_answer_that_did_not_change_is_no_interval_of_nothing(tmp_path: Path) -> None:
    row = {**comparison_row("facts", "base", "full", 0.0, 1.0), "only_a": 0, "only_b": 0, "ci_low": 0.0, "ci_high": 0.0}
    for right, said in (
        (120, "no answer of 300 changed: up to 1.0 points may be lost"),
        (0, "the base answers 0 of 300"),
    ):
        qa = [accuracy_row(method, "facts", "text", right) for method in ("base", "full")]
        (number,) = numbers_of(_run(tmp_path, qa=qa, comparisons=[row]))
        assert number.spread.startswith(said)


def test_the_model_in_focus_lost_most_or_drifted_most(tmp_path: Path) -> None:
    qa = [accuracy_row(method, "facts", "text", 60) for method in ("base", "full", "lora")]
    drift = [drift_row("full", "plain", 0.5), drift_row("lora", "plain", 0.1)]
    for p, model in ((0.001, "lora"), (0.4, "full")):
        comparisons = [
            comparison_row("facts", "base", "lora", -0.2, p),
            comparison_row("facts", "base", "full", -0.2, 1.0),
        ]
        assert in_focus(_run(tmp_path, qa=qa, comparisons=comparisons, drift=drift)) == model
    assert in_focus(_run(tmp_path)) is None


def test_before_a_tuned_model_the_base_speaks(tmp_path: Path) -> None:
    inputs = _run(tmp_path, layers=LAYERS, qa=[accuracy_row("base", "facts", "text", 150)])
    said = "the largest share of the importance for text, 40.0\u00a0%; the first half of the layers has 60\u00a0%."
    assert opening(inputs) == base_importance(inputs) == f"In the base, layer 1 of 0 to 3 has {said}"
    assert [(it.title, it.value) for it in numbers_of(inputs)] == [("Typed questions (facts), base", "50")]
    assert [drawing.name for drawing in first_pictures(inputs)] == ["glance-text", "glance-layers"]
    assert opening(_run(tmp_path)).startswith("Nothing of this run's models")


@pytest.mark.parametrize(
    ("tables", "title", "marks"),
    [
        (("frontier", "drift"), "Text kept against hearing gained", 3),
        (("drift",), "Distance from the base", 2),
        (("spoken",), "Text kept against hearing gained", 3),  # two models and the line of the base
        (("typed",), "Typed questions", 3),
        ((), None, 0),
    ],
)
def test_the_picture_of_text_falls_back_on_what_the_run_has(
    tmp_path: Path, tables: tuple[str, ...], title: str | None, marks: int
) -> None:
    known: dict[str, dict[str, Any]] = {
        "frontier": {
            "frontier": [
                frontier_row(m, m, None, kl, 1.0, True) for m, kl in (("base", 0.0), ("full", 0.5), ("lora", 0.1))
            ]
        },
        "drift": {"drift": [drift_row("full", "plain", 0.5), drift_row("lora", "plain", 0.1)]},
        "spoken": {
            "qa": [accuracy_row(m, "facts", put, 60) for m in ("full", "lora") for put in ("text", "speech")]
            + [accuracy_row("base", "facts", "text", 60)]
        },
        "typed": {"qa": [accuracy_row(m, "facts", "text", 60) for m in ("base", "full", "lora")]},
    }
    given: dict[str, Any] = {}
    for name in tables:
        given |= known[name]
    pictures = first_pictures(_run(tmp_path, layers=LAYERS, **given))
    assert pictures[-1].name == "glance-layers"
    assert [drawing.title for drawing in pictures[:-1]] == ([title] if title else [])
    if title:
        assert len(pictures[0].tips) == marks
        assert all(tip in pictures[0].alt for tip in pictures[0].tips.values())


def test_the_picture_of_the_layers_shows_few_models(tmp_path: Path) -> None:
    names = [f"m{i:02d}" for i in range(20)]
    rows = [_layer(model, layer, share) for model in names for layer, share in enumerate((0.1, 0.2, 0.3, 0.4))]
    shift = [
        {
            "model": model, "reference": "base", "modality": "text", "reduction": "per_batch_abs",
            "measure": "jensen_shannon", "value": i / 100, "ci_low": None, "ci_high": None, "noise_floor": None,
        }
        for i, model in enumerate(names)
    ]  # fmt: skip
    (drawing,) = first_pictures(_run(tmp_path, layers=[*LAYERS, *rows], shift=shift))
    assert "1 in Base, 3 in m16, 3 in m17, 3 in m18, 3 in m19" in drawing.alt
    assert drawing.caption.endswith("Of 20 models the 4 in which it moved most.")


def test_the_closing_is_five_lines(tmp_path: Path) -> None:
    lines = closing(read_inputs(make_run(tmp_path, without={"maps", "samples", "data"})))
    assert len(lines) == 5
    assert lines[0].startswith("All 5 models lost text: most Full-FT, −20 points (−25 to −15) in Llama Questions")
    assert (
        lines[-1] == "Importance for text: largest share at layer 12 in Base, 3 in Full-FT, 10 in Layer-LR, 11 in LoRA."
    )
