"""Clustered differences, retention and losses: by hand, against each other, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from palimpsest.files import UserError
from palimpsest.intervals import clustered_difference, loss_difference, mcnemar_exact, retention


# -- several seeds -------------------------------------------------------------------------------------------
def test_one_seed_a_side_is_the_paired_t_test() -> None:
    random = np.random.default_rng(0)
    a, b = random.random(60) < 0.4, random.random(60) < 0.6
    effect = clustered_difference(a, b)
    expected = stats.ttest_rel(b.astype(float), a.astype(float))
    low, high = expected.confidence_interval()
    assert effect.p_value == pytest.approx(expected.pvalue)
    assert (effect.value, effect.low, effect.high) == pytest.approx((b.mean() - a.mean(), low, high))


def test_two_seeds_by_hand() -> None:
    """Base 0 0 0 0. Seeds 1 1 0 0 and 1 1 1 1: means 0.5 and 1, mean over seeds 1 1 .5 .5."""
    effect = clustered_difference([0, 0, 0, 0], [[1, 1, 0, 0], [1, 1, 1, 1]])
    questions = (4 * 0.25**2 / 3) / 4
    seeds = (2 * 0.25**2 / 1) / 2
    df = (questions + seeds) ** 2 / (questions**2 / 3 + seeds**2 / 1)
    half = stats.t.ppf(0.975, df) * np.sqrt(questions + seeds)
    assert effect.value == pytest.approx(0.75)
    assert effect.high - effect.value == pytest.approx(half)
    assert effect.p_value == pytest.approx(2 * stats.t.sf(0.75 / np.sqrt(questions + seeds), df))
    assert effect.detectable == pytest.approx(half + stats.t.ppf(0.8, df) * np.sqrt(questions + seeds))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_turning_the_sides_round_turns_the_interval_round(seeds_a: int, seeds_b: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.random((seeds_a, 12)) < 0.5, random.random((seeds_b, 12)) < 0.5
    forth, back = clustered_difference(a, b), clustered_difference(b, a)
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert forth.p_value == pytest.approx(back.p_value)
    shuffled = random.permutation(12)
    again = clustered_difference(a[::-1, shuffled], b[:, shuffled])
    assert (again.low, again.high) == pytest.approx((forth.low, forth.high))


def test_where_nothing_varies_the_sign_test_decides() -> None:
    assert clustered_difference([1, 0, 1], [1, 0, 1]).p_value == 1
    constant = clustered_difference(np.zeros((2, 3)), np.ones((2, 3)))
    assert (constant.low, constant.high, constant.p_value) == (1, 1, 2 * 0.5**3)


@pytest.mark.parametrize(("a", "b"), [([1, 0], [1, 0, 1]), ([1], [0]), ([], []), ([[[1, 0]]], [1, 0])])
def test_what_is_not_paired_is_refused(a: list, b: list) -> None:
    with pytest.raises(UserError, match=r"same questions|\(seeds, questions\)"):
        clustered_difference(a, b)


def invented(random: np.random.Generator, seeds: int, seed_sd: float, n: int = 300) -> list[np.ndarray]:
    """Two equally good methods: one difficulty for both, own luck per question, and a shift per training seed."""
    difficulty = 3 * random.standard_normal(n) - 1
    lucky = [difficulty + 0.5 * random.standard_normal(n) for _ in range(2)]
    return [expit(x + seed_sd * random.standard_normal((seeds, 1))) > random.random((seeds, n)) for x in lucky]


@pytest.mark.parametrize("seed_sd", [0.0, 0.15, 0.4])
def test_equal_methods_are_rarely_called_different_over_three_seeds(seed_sd: float) -> None:
    """1000 draws; 0.05 plus two standard errors of the simulation."""
    random = np.random.default_rng(3)
    found = np.mean([clustered_difference(*invented(random, 3, seed_sd)).p_value <= 0.05 for _ in range(1000)])
    assert found <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 1000)


def test_one_seed_cannot_stand_for_its_method() -> None:
    """Why seeds are clustered: McNemar on one seed a side takes the seed's luck for the method's."""
    random = np.random.default_rng(4)
    rejected = 0
    for _ in range(300):
        (a,), (b,) = invented(random, 1, 0.4)
        rejected += mcnemar_exact(int(np.sum(a & ~b)), int(np.sum(b & ~a))) <= 0.05
    assert rejected / 300 > 0.2


def test_a_real_difference_is_found_over_seeds() -> None:
    random = np.random.default_rng(5)
    skill = random.random(300)
    a, b = (random.random((3, 300)) < skill + shift for shift in (0.0, 0.15))
    effect = clustered_difference(a, b)
    assert effect.p_value < 0.01
    assert effect.detectable is not None
    assert 0 < effect.detectable < 0.15


# -- retention -----------------------------------------------------------------------------------------------
def test_retention_solves_its_own_equation() -> None:
    """At each bound the paired t test of tuned − R·base has p = 0.05."""
    random = np.random.default_rng(0)
    skill = random.random(200)
    base, tuned = (random.random(200) < skill).astype(float), (random.random(200) < 0.8 * skill).astype(float)
    ratio = retention(base, tuned)
    assert ratio.value == pytest.approx(tuned.mean() / base.mean())
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < ratio.value < ratio.high
    for bound in (ratio.low, ratio.high):
        assert stats.ttest_1samp(tuned - bound * base, 0).pvalue == pytest.approx(0.05, abs=1e-6)


def test_retention_of_the_same_answers_is_exactly_one() -> None:
    ratio = retention([1, 0, 1, 1] * 5, [1, 0, 1, 1] * 5)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1, 1, 1))


def test_retention_without_anything_to_retain() -> None:
    with pytest.raises(UserError, match="nothing right"):
        retention([0, 0, 0], [1, 0, 1])
    unbounded = retention([1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0])
    assert (unbounded.value, unbounded.low, unbounded.high) == (2, None, None)


@pytest.mark.parametrize("n", [100, 300])
def test_retention_s_interval_holds_the_truth(n: int) -> None:
    """A base at 50 %, a tuned model that keeps 80 % of what the base knows and learns nothing: R = 0.8."""
    random = np.random.default_rng(n)
    hits = 0
    for _ in range(1000):
        skill = random.random(n)
        base, tuned = random.random(n) < skill, random.random(n) < 0.8 * skill
        ratio = retention(base, tuned)
        hits += ratio.low is not None and ratio.high is not None and ratio.low <= 0.8 <= ratio.high
    assert hits / 1000 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 1000))


# -- losses --------------------------------------------------------------------------------------------------
def test_losses_weigh_tokens_not_answers() -> None:
    effect = loss_difference([1.0, 9.0], [2.0, 9.0], [1, 9])
    assert effect.value == pytest.approx(0.1)  # one nat over ten tokens; a mean over answers would give 0.5


def test_losses_of_equal_length_are_the_paired_t_test() -> None:
    random = np.random.default_rng(1)
    a, b = random.random(30), random.random(30) + 0.2
    effect = loss_difference(7 * a, 7 * b, [7] * 30)
    expected = stats.ttest_rel(b, a)
    assert effect.p_value == pytest.approx(expected.pvalue)
    assert (effect.low, effect.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_losses_interval_holds_the_truth() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(1000):
        tokens = random.integers(2, 41, 200)
        a, b = (tokens * random.lognormal(0.5, 0.3, 200) for _ in range(2))
        effect = loss_difference(a, b + 0.1 * tokens, tokens)
        hits += effect.low <= 0.1 <= effect.high
    assert hits / 1000 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 1000))


@pytest.mark.parametrize(("a", "b", "tokens"), [([1.0], [1.0], [1]), ([1.0, 2.0], [1.0], [1, 1]), ([], [], [])])
def test_losses_that_are_not_paired_are_refused(a: list, b: list, tokens: list) -> None:
    with pytest.raises(UserError, match="same two or more examples"):
        loss_difference(a, b, tokens)
