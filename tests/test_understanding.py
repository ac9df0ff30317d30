"""S2T against chance, typed questions and the cascade: by hand, and how often chance is taken for understanding."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from palimpsest.comparison.understanding import speech_tests
from palimpsest.evaluation.floors import unrelated_by_question, unrelated_floor
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.intervals import mcnemar_exact

QUESTIONS = "abcdefgh"


def right(answers: str) -> dict[str, bool]:
    return {question: answer == "1" for question, answer in zip(QUESTIONS, answers, strict=True)}


def test_one_run_by_hand() -> None:
    verdicts = {
        ("facts", "text"): {"base": right("11111111"), "lora": right("11111100")},
        ("facts", "speech"): {"lora": right("11110000")},
        ("facts", "cascade"): {"base": right("00001111")},
    }
    chance = {"facts": {"lora": dict.fromkeys("abcdefg", 0.1)}}  # h shares its gold with every other question
    chance["facts"]["lora"]["a"] = 0.4
    rows = {row["reference"]: row for row in speech_tests(["lora"], 1, verdicts, chance, 0)}
    assert [rows[name]["n"] for name in ("unrelated", "text", "cascade")] == [7, 8, 8]

    differences = np.array([0.6, 0.9, 0.9, 0.9, -0.1, -0.1, -0.1])
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(7)
    half = stats.t.ppf(0.975, 6) * error
    of_chance = rows["unrelated"]
    assert of_chance["difference"] == pytest.approx(mean)
    assert (of_chance["ci_low"], of_chance["ci_high"]) == pytest.approx((mean - half, mean + half))
    assert of_chance["p_value"] == pytest.approx(2 * stats.t.sf(mean / error, 6))

    assert (rows["text"]["reference_accuracy"], rows["text"]["difference"]) == (0.75, -0.25)
    assert rows["text"]["p_value"] == mcnemar_exact(2, 0)
    assert (rows["cascade"]["difference"], rows["cascade"]["p_value"]) == (0.0, 1.0)


def test_holm_is_over_the_rows_of_a_reference() -> None:
    verdicts = {
        ("facts", modality): {"a": right("11111110"), "b": right("00000001")} for modality in ("text", "speech")
    }
    verdicts["facts", "text"] = {"a": right("10000000"), "b": right("11111111")}
    rows = [row for row in speech_tests(["a", "b"], 1, verdicts, {}, 0) if row["reference"] == "text"]
    assert [(row["p_value"], row["p_holm"]) for row in rows] == [(2 / 64, 2 / 64), (2 / 128, 4 / 128)]


def test_several_runs_are_paired_by_run() -> None:
    """Runs of 2 and 6 right from speech and as many typed: the runs differ, from speech and typed they do not."""
    runs = {"lora": right("11000000"), "lora-seed1": right("11111100")}
    rows = speech_tests(["lora"], 2, {("facts", "text"): runs, ("facts", "speech"): runs}, {}, 0)
    (row,) = rows
    assert (row["n_seeds"], row["accuracy"], row["difference"], row["ci_low"], row["ci_high"]) == (2, 0.5, 0, 0, 0)


def test_chance_is_seldom_taken_for_understanding() -> None:
    """Answers that have nothing to do with the question: right as often as for other questions. Nominally 2.5 %."""
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(200):
        often = rng.beta(0.3, 3, 150)  # some golds ("2") are in many answers
        verdicts = {("facts", "speech"): {"lora": dict(enumerate((rng.random(150) < often).tolist()))}}
        drawn = rng.binomial(10, often) / 10
        (row,) = speech_tests(["lora"], 1, verdicts, {"facts": {"lora": dict(enumerate(drawn.tolist()))}}, 0)
        above += row["p_holm"] < 0.05 and row["difference"] > 0
    assert above / 200 < 0.055


def test_unrelated_by_question_has_the_mean_of_the_floor() -> None:
    responses, golds = ["Paris", "It is 2", "2", "two"], [["Paris"], ["2"], ["two"], ["Rome"]]
    by_question = unrelated_by_question(responses, golds, PRIMARY, seed=3)
    assert by_question[0] == 0.0  # Paris answers no other question
    assert by_question[3] > 0  # "two" is the gold of 1 and of 2
    assert unrelated_by_question(responses, [["x"]] * 4, PRIMARY) == {}
    whole = unrelated_floor(["2"] * 3, [["2"], ["two", "3"], ["5"]], seed=1)[PRIMARY]
    assert 0 < whole < 1
