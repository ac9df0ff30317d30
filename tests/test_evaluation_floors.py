"""False-positive floors against counts by hand, and their place in the records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import Answer, _row
from palimpsest.evaluation.floors import _circle, echo_floor, floor_records, unrelated_floor
from palimpsest.evaluation.scoring import METRIC_VERSION, METRICS
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError
from palimpsest.intervals import wilson


@given(st.integers(2, 40), st.randoms())
def test_a_circle_is_a_derangement(n: int, random: object) -> None:
    order = list(range(n))
    random.shuffle(order)  # type: ignore[attr-defined]
    pairs = _circle(order)
    assert sorted(i for i, _ in pairs) == sorted(j for _, j in pairs) == list(range(n))
    assert all(i != j for i, j in pairs)


def test_unrelated_by_hand() -> None:
    """Two responses: the only derangement gives each the other's gold."""
    floor = unrelated_floor(["Because it is so.", "It is Rome."], [["Paris"], ["Au"]])
    # "au" is in "because"; "paris" is nowhere in the second
    assert floor == {"token_sequence": 0, "token_sequence_numbers": 0, "substring": 0.5, "any_order": 0}
    floor = unrelated_floor(["It is 5.", "It is Rome."], [["Paris"], ["five"]])
    assert floor == {"token_sequence": 0, "token_sequence_numbers": 0.5, "substring": 0, "any_order": 0}


def test_the_mean_over_draws_nears_the_mean_over_all_pairs() -> None:
    """Response 0 holds two of the three other golds, the others none: 2 of the 12 ordered pairs."""
    answers = [["w"], ["x"], ["y"], ["z"]]
    floor = unrelated_floor(["x and y", "-", "-", "-"], answers, draws=3000)
    assert floor["token_sequence"] == pytest.approx(2 / 12, abs=0.02)
    assert floor == unrelated_floor(["x and y", "-", "-", "-"], answers, draws=3000)
    drawn = {unrelated_floor(["x", "-", "-", "-"], answers, seed, 1)["substring"] for seed in range(20)}
    assert drawn == {0, 0.25}


def test_questions_that_share_a_gold_are_no_false_positive() -> None:
    floor = unrelated_floor(["two", "2", "Rome"], [["two"], ["2"], ["Rome"]])
    assert floor == dict.fromkeys(METRICS, 0.0)


@pytest.mark.parametrize("responses", [[], ["a"], ["a", "b", "c"]])
def test_one_response_per_question(responses: list[str]) -> None:
    with pytest.raises(UserError, match="one response per question"):
        unrelated_floor(responses, [["x"], ["y"]])


def test_one_gold_shared_by_all_gives_no_floor() -> None:
    with pytest.raises(UserError, match="all share one"):
        unrelated_floor(["a", "b"], [["yes"], ["Yes", "no"]])


def test_echo_by_hand() -> None:
    questions = ["Which is larger, the sun or the moon?", "Is a knife sharp?", "Who wrote Emma?"]
    answers = [["the sun"], ["if"], ["Austen"]]
    assert echo_floor(questions, answers) == {
        "token_sequence": 0,  # a leading copy of the question is left out
        "token_sequence_numbers": 0,
        "substring": pytest.approx(2 / 3),  # "if" in "knife"
        "any_order": pytest.approx(1 / 3),
    }
    assert echo_floor(questions, answers, "You asked: ")["token_sequence_numbers"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="at least one question"):
        echo_floor([], [])


def records_of(*golds: str) -> list:
    examples = tuple(Example(f"q{i}", f"Is it {gold}?", (gold,), gold) for i, gold in enumerate(golds))
    task = Task("t", examples)
    return floor_records([_row(e, Answer(e.answer, 1), 0.0) for e in examples], "base", task, "text", 3)


def test_records() -> None:
    records = records_of("Rome", "Oslo", "Bern", "Kyiv")
    assert [(r["floor"], r["metric"]) for r in records] == [
        (floor, metric) for floor in ("unrelated", "echo", "echo_in_sentence") for metric in METRICS
    ]
    by_key = {(r["floor"], r["metric"]): r for r in records}
    echoed = by_key["echo_in_sentence", "token_sequence"]
    low, high = wilson(4, 4)
    assert echoed == {
        "method": "base",
        "task": "t",
        "modality": "text",
        "metric": "token_sequence",
        "metric_version": METRIC_VERSION,
        "floor": "echo_in_sentence",
        "n": 4,
        "draws": 1,
        "value": 1.0,
        "ci_low": pytest.approx(low),
        "ci_high": pytest.approx(high),
    }
    assert by_key["echo", "token_sequence"]["value"] == by_key["unrelated", "substring"]["value"] == 0
    assert by_key["unrelated", "substring"]["draws"] == 10


@pytest.mark.parametrize("golds", [("Rome",), ("yes", "Yes", "YES")])
def test_a_task_without_unrelated_questions_has_only_the_echo(golds: tuple[str, ...]) -> None:
    assert {r["floor"] for r in records_of(*golds)} == {"echo", "echo_in_sentence"}
