"""The verdict of a run: what it says of the text follows from the records, and from what they could have shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from palimpsest.files import write_json
from palimpsest.intervals import mcnemar_power
from palimpsest.report.glance import numbers_of
from palimpsest.report.inputs import read_inputs
from palimpsest.report.table import fitting, points_fitting
from palimpsest.report.verdict import headline, of_model, smallest_seen, unseen
from report_fixture import accuracy_row, comparison_row, drift_row, general_text_comparison


def _run(path: Path, **tables: Any) -> Any:
    write_json(path / "results.json", {"schema": 1, **tables})
    return read_inputs(path)


def _answered(difference: float, p: float, method: str = "full", **more: Any) -> dict[str, Any]:
    """qa and comparisons of a method against the base on 300 questions."""
    qa = [accuracy_row("base", "facts", "text", 120), accuracy_row(method, "facts", "text", 120)]
    return {"qa": qa, "comparisons": [{**comparison_row("facts", "base", method, difference, p), **more}]}


@pytest.mark.parametrize(
    ("value", "low", "high", "written"),
    [
        (0.04583, 0.0330, 0.0596, ("0.046", "0.033", "0.060")),  # half: 0.013
        (-4.1, -9.3, 1.2, ("−4", "−9", "1")),
        (-0.4, -5.0, 0.2, ("−0.4", "−5.0", "0.2")),  # half: 2.6
        (-0.2, -9.0, 9.0, ("0", "−9", "9")),  # no minus before a zero
        (0.0, 0.0, 0.0, ("0", "0", "0")),
        (6.6e-5, 4.4e-5, 9.1e-5, ("6.6e-5", "4.4e-5", "9.1e-5")),
    ],
)
def test_numbers_have_the_digits_of_their_interval(
    value: float, low: float, high: float, written: tuple[str, str, str]
) -> None:
    assert fitting(value, low, high) == written


def test_points_have_a_sign() -> None:
    assert points_fitting(0.06, -0.03, 0.15) == ("+6", "−3", "+15")
    assert points_fitting(-0.12, -0.38, 0.0) == ("−12", "−38", "0")


def test_what_could_have_been_seen_is_the_power_of_the_test() -> None:
    row = {**comparison_row("facts", "base", "full", -0.02, 1.0), "n": 100, "only_a": 12, "only_b": 10}
    seen = smallest_seen(row)
    assert seen is not None
    assert mcnemar_power(100, 0.22, seen) == pytest.approx(0.8, abs=1e-4)
    strict = smallest_seen({**row, "n_family": 3})
    assert strict is not None
    assert mcnemar_power(100, 0.22, strict, 1 - 0.05 / 3) == pytest.approx(0.8, abs=1e-4)


def test_where_few_answers_changed_a_loss_would_have_to_change_more() -> None:
    """With 2 of 100 apart no difference would be found; 9 lost of 100 would be, and 8 would not."""
    row = {**comparison_row("facts", "base", "full", -0.02, 1.0), "n": 100, "only_a": 2, "only_b": 0}
    found = smallest_seen(row)
    assert found is not None
    k = round(100 * found)
    assert mcnemar_power(100, k / 100, k / 100) >= 0.8 > mcnemar_power(100, (k - 1) / 100, (k - 1) / 100)
    assert unseen(row)[0] == f"100 questions cannot tell a loss of less than {k} points from none"


def test_questions_that_cannot_tell_and_answers_that_did_not_change() -> None:
    row = {**comparison_row("facts", "base", "full", 0.0, 1.0), "only_a": 0, "only_b": 0}
    # the rule of three: 3 / 100
    expected = ("no answer to 100 questions changed, which leaves room for a loss of up to 3 points", 0.03)
    assert unseen({**row, "n": 100}) == expected
    assert unseen({**row, "n": 3}) == ("3 questions cannot tell any loss from none", math.inf)
    assert unseen({**row, "n": 5, "only_a": 1}) == ("5 questions cannot tell any loss from none", math.inf)


def test_several_training_runs_say_themselves_what_they_could_have_seen() -> None:
    row = {**comparison_row("facts", "base", "full", 0.0, 1.0), "only_a": 0, "only_b": 0, "detectable": 0.07}
    assert unseen(row) == ("300 questions cannot tell a loss of less than 7 points from none", 0.07)


def test_a_loss_is_said_with_its_interval(tmp_path: Path) -> None:
    said = headline(_run(tmp_path, **_answered(-0.2, 0.001)))
    assert said == "Full-FT lost text: −20 points (−25 to −15) in facts."


def test_what_is_not_shown_is_not_denied(tmp_path: Path) -> None:
    said = headline(_run(tmp_path, **_answered(-0.02, 0.3)))
    assert said.startswith("Full-FT: no loss of text is shown, −2 points (−7 to +3) in facts; 300 questions of facts")
    assert "cannot tell a loss of less than 7 points from none" in said


def test_measures_that_disagree_are_both_said(tmp_path: Path) -> None:
    tables = {**_answered(0.1, 0.01), "general_text_comparisons": [general_text_comparison("full", 0.1)]}
    assert headline(_run(tmp_path, **tables)) == (
        "Full-FT lost text by one measure and gained by another: +0.100 nats a byte (0.090 to 0.110) on general text "
        "and +10 points (+5 to +15) in facts."
    )
    tables["comparisons"] = [comparison_row("facts", "base", "full", -0.02, 0.3)]
    said = headline(_run(tmp_path, **tables))
    assert said.startswith("Full-FT lost text: +0.100 nats a byte (0.090 to 0.110) on general text; 300 questions of")


def test_drift_is_in_the_verdict(tmp_path: Path) -> None:
    tables = {**_answered(-0.02, 0.3), "drift": [drift_row("full", "plain", 0.5)]}
    assert headline(_run(tmp_path, **tables)).endswith(
        "; drift from the base: 0.50 (0.45 to 0.55) nats a token on text of the base."
    )


def test_where_the_base_knows_nothing_other_measures_are_named(tmp_path: Path) -> None:
    qa = [accuracy_row("base", "facts", "text", 0), accuracy_row("full", "facts", "text", 0)]
    row = {**comparison_row("facts", "base", "full", 0.0, 1.0), "only_a": 0, "only_b": 0, "ci_low": 0.0, "ci_high": 0.0}
    said = of_model(_run(tmp_path, qa=qa, comparisons=[row]), "full")
    assert said == (
        "Full-FT: whether text was lost is not known; the base answers 0 of 300 questions of facts, where nothing can "
        "be lost; a section drift in the recipe measures what changed."
    )
    drifted = of_model(_run(tmp_path, qa=qa, comparisons=[row], drift=[drift_row("full", "plain", 0.5)]), "full")
    assert drifted.endswith("; drift from the base: 0.50 (0.45 to 0.55) nats a token on text of the base.")


def test_several_models_are_one_sentence_with_the_losses_first(tmp_path: Path) -> None:
    found = {"full": (-0.2, 0.001), "layer_lr": (-0.3, 0.001), "lora": (0.02, 0.5)}
    tables = {
        "qa": [accuracy_row(method, "facts", "text", 120) for method in ("base", *found)],
        "comparisons": [comparison_row("facts", "base", method, *of) for method, of in found.items()],
        "drift": [drift_row(method, "plain", kl) for method, kl in (("full", 0.5), ("lora", 0.1))],
    }
    assert headline(_run(tmp_path, **tables)) == (
        "Full-FT and Layer-LR lost text: most Layer-LR, −30 points (−35 to −25) in facts; no loss of text is shown "
        "for LoRA, but 300 questions of facts cannot tell a loss of less than 7 points from none; drift from the base, "
        "nats a token on text of the base: largest in Full-FT, 0.50 (0.45 to 0.55), smallest in LoRA, 0.100 (0.090 to "
        "0.110)."
    )


def test_what_is_the_base_by_construction_leaves_nothing_open(tmp_path: Path) -> None:
    """A gated LoRA answers typed questions with the base itself: no room for a loss of some points."""
    same = {"only_a": 0, "only_b": 0, "ci_low": 0.0, "ci_high": 0.0, "left_out": "equal by construction"}
    tables = _answered(0.0, 1.0, "gated", **same)
    assert of_model(_run(tmp_path, **tables), "gated") == (
        "gated lost no text, by construction; facts is answered by the base itself."
    )
    tables["qa"].append(accuracy_row("full", "facts", "text", 120))
    tables["comparisons"].append(comparison_row("facts", "base", "full", -0.2, 0.001))
    said = headline(_run(tmp_path, **tables))
    assert said == "Full-FT lost text: −20 points (−25 to −15) in facts; gated lost no text, by construction."
    assert unseen(tables["comparisons"][0]) == ("by construction both answer questions as one model", 0.0)
    (number, *_) = numbers_of(_run(tmp_path, **_answered(0.0, 1.0, "gated", **same)))
    assert (number.value, number.spread) == ("0", "the base itself answers them")


def test_twenty_models_are_counted(tmp_path: Path) -> None:
    names = [f"m{i:02d}" for i in range(20)]
    tables = {
        "qa": [accuracy_row(method, "facts", "text", 120) for method in ("base", *names)],
        "comparisons": [comparison_row("facts", "base", m, -0.2 if i < 7 else 0.0, 0.001 if i < 7 else 1.0)
                        for i, m in enumerate(names)],
    }  # fmt: skip
    said = headline(_run(tmp_path, **tables))
    assert said.startswith("7 of 20 models (m00, m01, m02 …) lost text: most m00, −20 points")
    assert "no loss of text is shown for 13 of 20 models (m07, m08, m09 …), but 300 questions" in said
    assert len(said) < 400


def test_without_models_there_is_no_verdict(tmp_path: Path) -> None:
    assert headline(_run(tmp_path)) == "No model has been compared with the base yet."


def test_a_model_far_from_its_base_is_not_opened_with_no_loss(tmp_path: Path) -> None:
    """Above 0.1 nats, lower end too; on the kind of text on which it is farthest. Below it the answers speak."""
    drifts = [drift_row("full", "plain", 0.02), drift_row("full", "chat", 1.9), drift_row("lora", "plain", 0.02)]
    inputs = _run(tmp_path, drift=drifts, **_answered(-0.02, 0.5))
    said = of_model(inputs, "full")
    assert said.startswith("Full-FT writes otherwise than its base, though no loss of answers is shown, −2 points")
    assert "drift from the base: 1.9" in said
    assert "on chats of the base" in said
    both = _answered(-0.02, 0.5)
    both["qa"].append(accuracy_row("lora", "facts", "text", 120))
    both["comparisons"].append(comparison_row("facts", "base", "lora", -0.02, 0.5))
    several = headline(_run(tmp_path, drift=drifts, **both))
    assert several.startswith("Full-FT writes otherwise than the base, though no loss of answers is shown: ")
    assert "no loss of text is shown for LoRA, but" in several
    assert "on chats of the base: largest in Full-FT" in several
    assert "smallest in LoRA on text of the base, 0.02" in several


def test_what_is_no_number_or_no_difference_is_no_loss(tmp_path: Path) -> None:
    for difference, p in ((-0.1, math.nan), (math.nan, 0.001), (0.0, 0.001)):
        tables = _answered(difference, p)
        inputs = _run(tmp_path)
        inputs.results["qa"], inputs.results["comparisons"] = tables["qa"], tables["comparisons"]
        assert " lost text" not in of_model(inputs, "full")


def test_rounding_is_not_ranked(tmp_path: Path) -> None:
    drifts = [drift_row("full", "plain", -3e-8), drift_row("lora", "plain", 2e-8)]
    assert "largest in LoRA, 0." in headline(_run(tmp_path, drift=drifts))


def test_very_small_rooms_and_one_question_are_written_right() -> None:
    row = {**comparison_row("facts", "base", "full", 0.0, 1.0), "only_a": 0, "only_b": 0}
    assert "up to 0.015 points" in unseen({**row, "n": 20_000})[0]
    assert unseen({**row, "n": 1})[0].startswith("1 question cannot tell")
