"""Statistics against textbook values, hand-derived p-values and simulation."""

from __future__ import annotations

import itertools
from functools import cache
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from palimpsest.comparison.families import corrected
from palimpsest.comparison.pairs import compare
from palimpsest.files import UserError
from palimpsest.intervals import (
    holm,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_difference,
    paired_bootstrap,
    wilson,
    wilson_share,
)


# -- Wilson --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_textbook_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_solves_its_own_equation(n: int, data: st.DataObject) -> None:
    """The bounds are the p with |p̂ − p| = z·sqrt(p(1 − p)/n), which is what defines the interval."""
    correct = data.draw(st.integers(0, n))
    for p in wilson(correct, n):
        assert (correct / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(correct: int, n: int) -> None:
    with pytest.raises(UserError, match="no proportion"):
        wilson(correct, n)


@given(st.integers(1, 500), st.data())
def test_wilson_of_a_share_agrees_with_wilson_of_a_count(n: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, n))
    assert wilson_share(correct / n, n) == pytest.approx(wilson(correct, n), abs=1e-9)


@pytest.mark.parametrize(("share", "n"), [(0.5, 0), (1.1, 3), (-0.1, 3), (float("nan"), 3)])
def test_wilson_refuses_what_is_no_share(share: float, n: int) -> None:
    with pytest.raises(UserError, match="no proportion"):
        wilson_share(share, n)


# -- McNemar -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (0, 6, 2 / 64),
        (1, 8, 2 * (1 + 9) / 2**9),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_exact(only_a, only_b) == pytest.approx(p)
    assert mcnemar_exact(only_b, only_a) == pytest.approx(p)


def test_methods_that_differ_by_chance_are_rarely_called_different() -> None:
    """1000 pairs of equally good methods at n = 300: McNemar rejects at most 5 %."""
    random = np.random.default_rng(0)
    skill = random.random(300)  # questions differ in difficulty, the same for both methods
    p_values = []
    for _ in range(1000):
        a, b = random.random(300) < skill, random.random(300) < skill
        p_values.append(mcnemar_exact(int(np.sum(a & ~b)), int(np.sum(b & ~a))))
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05


def test_a_table_of_equal_methods_has_a_false_positive_in_at_most_5_percent() -> None:
    """Six methods, 15 pairs, realistic pairing (difficulty shared, 23 % disagreement): Holm bounds the whole table."""
    random = np.random.default_rng(2)
    p_value = cache(mcnemar_exact)
    false = 0
    for _ in range(1000):
        difficulty = 3 * random.standard_normal(300) - 1
        right = expit(difficulty + 0.5 * random.standard_normal((6, 300))) > random.random((6, 300))
        pairs = itertools.combinations(right, 2)
        false += min(holm([p_value(int(np.sum(a & ~b)), int(np.sum(b & ~a))) for a, b in pairs])) <= 0.05
    assert false / 1000 <= 0.05


def test_the_bootstrap_s_interval_holds_the_truth() -> None:
    """400 draws of 300 questions, true difference 5 points."""
    random = np.random.default_rng(3)
    hits = 0
    for seed in range(400):
        skill = 0.95 * random.random(300)
        a, b = random.random(300) < skill, random.random(300) < skill + 0.05
        low, high = paired_bootstrap(a, b, seed, n=500)
        hits += low <= 0.05 <= high
    assert hits / 400 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 400))


def test_a_difference_of_five_points_is_found_with_the_stated_power() -> None:
    """n = 300, 10 % discordant, true difference 5 points: the share found matches `mcnemar_power`."""
    random = np.random.default_rng(1)
    power = mcnemar_power(300, 0.10, 0.05)
    only_a, only_b, _ = random.multinomial(300, [0.025, 0.075, 0.9], size=2000).T
    found = np.mean([mcnemar_exact(int(a), int(b)) <= 0.05 for a, b in zip(only_a, only_b, strict=True)])
    assert found == pytest.approx(power, abs=3.5 * np.sqrt(power * (1 - power) / 2000))
    assert 0.7 < power < 0.8


def test_power_by_hand() -> None:
    """n = 6, all discordant, b wins each with 0.9: only 6:0 and 0:6 reject at 5 % (p = 2/64)."""
    assert mcnemar_power(6, 1.0, 0.8) == pytest.approx(0.9**6 + 0.1**6)
    assert mcnemar_power(5, 1.0, 0.8) == 0  # 5:0 has p = 2/32


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 12), st.floats(0.02, 1.0), st.floats(0, 1))
def test_power_agrees_with_enumeration_of_the_test(n: int, discordant: float, share: float) -> None:
    difference = share * discordant
    pa, pb = (discordant - difference) / 2, (discordant + difference) / 2
    total = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        if a + b <= n and mcnemar_exact(a, b) <= 0.05:
            ways = comb(n, a) * comb(n - a, b)
            total += ways * pa**a * pb**b * max(0.0, 1 - discordant) ** (n - a - b)
    assert mcnemar_power(n, discordant, difference) == pytest.approx(total, abs=1e-9)


def test_minimum_detectable_difference() -> None:
    smallest = minimum_detectable_difference(300, 0.10)
    assert smallest is not None
    assert mcnemar_power(300, 0.10, smallest) == pytest.approx(0.8, abs=1e-3)
    more_questions = minimum_detectable_difference(1200, 0.10)
    more_noise = minimum_detectable_difference(300, 0.30)
    assert more_questions is not None
    assert more_noise is not None
    assert more_questions < smallest < more_noise
    assert minimum_detectable_difference(10, 0.1) is None


def test_power_refuses_an_impossible_difference() -> None:
    with pytest.raises(UserError, match="discordant share"):
        mcnemar_power(100, 0.1, 0.2)


# -- bootstrap -----------------------------------------------------------------------------------------------
def test_bootstrap_is_seeded_and_antisymmetric() -> None:
    random = np.random.default_rng(0)
    a, b = random.random(100), random.random(100)
    low, high = paired_bootstrap(a, b, seed=3)
    assert (low, high) == paired_bootstrap(a, b, seed=3)
    assert (low, high) != paired_bootstrap(a, b, seed=4)
    assert paired_bootstrap(b, a, seed=3) == pytest.approx((-high, -low))
    assert low < b.mean() - a.mean() < high


def test_bootstrap_is_paired() -> None:
    """A constant difference has an interval of width zero however much the questions vary."""
    a = np.arange(50.0)
    assert paired_bootstrap(a, a + 0.25, seed=0) == pytest.approx((0.25, 0.25))


def test_bootstrap_width_matches_the_standard_error() -> None:
    random = np.random.default_rng(2)
    difference = random.standard_normal(1000)
    low, high = paired_bootstrap(np.zeros(1000), difference, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * difference.std() / np.sqrt(1000), rel=0.05)


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.zeros(40), np.arange(40.0)
    whole = paired_bootstrap(a, b, seed=0, n=500)
    monkeypatch.setattr("palimpsest.intervals._CHUNK", 100)
    assert paired_bootstrap(a, b, seed=0, n=500) == whole


def test_the_bootstrap_of_verdicts_and_of_other_values_agree() -> None:
    """Verdicts are drawn by their counts, other values one by one: the same interval but for the draws."""
    random = np.random.default_rng(0)
    a, b = random.random(300) < 0.4, random.random(300) < 0.5
    by_count = paired_bootstrap(a, b, seed=0, n=20_000)
    nudged = b + 1e-9 * random.standard_normal(300)
    assert paired_bootstrap(a, nudged, seed=0, n=20_000) == pytest.approx(by_count, abs=0.004)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_bootstrap_refuses_what_is_not_paired(a: list, b: list) -> None:
    with pytest.raises(UserError, match="same questions"):
        paired_bootstrap(a, b, seed=0)


# -- Holm and tables -----------------------------------------------------------------------------------------
def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, made monotone."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(pvalues: list[float]) -> None:
    for p, adjusted in zip(pvalues, holm(pvalues), strict=True):
        assert p <= adjusted <= min(1.0, p * len(pvalues))


def test_compare_by_hand() -> None:
    """Ten questions: tuned loses three that base had and wins one."""
    base = {f"q{i}": i < 6 for i in range(10)}  # 6 right
    tuned = {f"q{i}": 3 <= i < 7 for i in reversed(range(10))}  # loses q0–q2, wins q6
    (record,) = compare({"base": base, "full": tuned}, task="t", modality="text", metric="token_sequence", seed=0)
    low, high = record.pop("ci_low"), record.pop("ci_high")
    assert record == {
        "task": "t",
        "modality": "text",
        "metric": "token_sequence",
        "method_a": "base",
        "method_b": "full",
        "n": 10,
        "only_a": 3,
        "only_b": 1,
        "difference": pytest.approx(-0.2),
        "p_value": pytest.approx(0.625),  # 2 · (1 + 4) / 2^4
        "p_holm": pytest.approx(0.625),
        "family": "text, against the base",
        "n_family": 1,
        "left_out": None,
    }
    assert -0.7 < low < -0.2 < high < 0.4


def test_compare_makes_every_pair_and_does_not_depend_on_row_order() -> None:
    random = np.random.default_rng(0)
    verdicts = {m: {f"q{i}": bool(random.random() < 0.5) for i in range(40)} for m in ("base", "full", "lora")}
    records = compare(verdicts, task="t", modality="text", metric="m", seed=0)
    assert [(r["method_a"], r["method_b"]) for r in records] == [
        ("base", "full"),
        ("base", "lora"),
        ("full", "lora"),
    ]
    p = [r["p_value"] for r in records]
    assert [r["p_holm"] for r in records] == [*holm(p[:2]), p[2]]  # against the base; against each other
    shuffled = {m: dict(reversed(rows.items())) for m, rows in verdicts.items()}
    assert compare(shuffled, task="t", modality="text", metric="m", seed=0) == records
    two = corrected([*records, *({**r, "task": "u"} for r in records)])  # a family goes over the tasks
    assert [r["p_holm"] for r in two[:2] + two[3:5]] == holm(p[:2] * 2)
    assert {r["n_family"] for r in two[2::3]} == {2}


@pytest.mark.parametrize("other", [{}, {"q1": True}, {"q1": True, "q3": False}])
def test_compare_refuses_other_questions(other: dict[str, bool]) -> None:
    with pytest.raises(UserError, match="cannot be paired"):
        compare({"base": {"q1": True, "q2": True}, "full": other}, task="t", modality="text", metric="m", seed=0)


def test_compare_refuses_no_questions_at_all() -> None:
    with pytest.raises(UserError, match="cannot be paired"):
        compare({"base": {}, "full": {}}, task="t", modality="text", metric="m", seed=0)
