"""Text at equal hearing: curves of two and three points by hand, and how often equal curves are called different."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from palimpsest.comparison.families import pairs_of
from palimpsest.comparison.frontier import (
    DRIFT,
    HIGHER,
    LOWER,
    NO_COMMON,
    S2T,
    SPEECH_LOSS,
    T2T,
    Measure,
    Place,
    at_equal_hearing,
    dominated,
    frontier_tables,
    jackknife_variance,
    places_of,
    sign_p,
    text_at,
)
from palimpsest.comparison.pairs import compare
from palimpsest.intervals import combined_effect, resampled
from palimpsest.training.methods import Method
from palimpsest.training.remedies import Pull

N = 12  # units


def one(*values: float) -> Any:
    return np.array([values])


# ---------------------------------------------------------------------------------------------------------------------
# A curve at a hearing
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hearing", "text", "level", "expected"),
    [
        ((0, 1, 2), (0, -1, -3), 1.5, -2.0),  # half-way between -1 and -3
        ((0, 1, 2), (0, -1, -3), 1.0, -1.0),
        ((0, 1, 2), (0, -1, -3), 2.1, math.nan),  # nothing is extrapolated
        ((0, 2, 1), (0, -1, -5), 1.0, -0.5),  # it turns back: -0.5 on the way up, -5 on the way back
        ((0, 2, 1), (-4, -1, 0), 1.0, 0.0),  # better on the way back
        ((1, 1), (-3, -2), 1.0, -2.0),  # equal hearing: the better of both
        ((1,), (-3,), 1.0, -3.0),
        ((1,), (-3,), 1.1, math.nan),
    ],
)
def test_text_of_a_curve_at_a_hearing(
    hearing: tuple[float, ...], text: tuple[float, ...], level: float, expected: float
) -> None:
    (found,) = text_at(one(*hearing), one(*text), np.array([level]))
    assert found == pytest.approx(expected, nan_ok=True)


def test_the_hearing_that_two_curves_share() -> None:
    a, b = (one(1, 3), one(0, -2)), (one(2, 5), one(0, -3))  # 1 to 3 and 2 to 5: from 2 to 3
    assert [float(x[0]) for x in at_equal_hearing(a, b, 1.0)] == [3, -2, -1]
    assert [float(x[0]) for x in at_equal_hearing(a, b, 0.5)] == [2.5, -1.5, -0.5]
    apart = (one(4, 5), one(0, -1))
    assert all(math.isnan(x[0]) for x in at_equal_hearing(a, apart, 1.0))


@pytest.mark.parametrize("end", [1.0, 2.0])
@pytest.mark.parametrize("off", [-5e-7, 0.0, 5e-7])
def test_rounding_does_not_make_two_of_one_training_incomparable(end: float, off: float) -> None:
    """A gated LoRA hears as the merged one at the end of a curve does, up to rounding: on either side of it."""
    curve, gated = (one(1, 2), one(-1, -3)), (one(end + off), one(0))
    level, kept, own = (float(x[0]) for x in at_equal_hearing(curve, gated, 1.0))
    assert (level, kept, own) == (pytest.approx(end), pytest.approx(-1 if end == 1 else -3, abs=1e-5), 0)
    assert math.isnan(at_equal_hearing(curve, (one(2.001), one(0)), 1.0)[0][0])


def test_two_curves_that_end_in_one_model_have_its_text_there_to_the_bit() -> None:
    """The line is exact at its ends, so that what is the same model does not differ by rounding."""
    rng = np.random.default_rng(0)
    a, b, end = np.exp(rng.normal(size=(3, 1000)))
    for ends in ([a, end], [end, a]):
        heard = np.tile([1.0, 3.0] if ends[1] is end else [3.0, 1.0], (1000, 1))
        assert np.array_equal(text_at(heard, np.stack(ends, axis=1), np.full(1000, 3.0)), end)
    one_end = [(np.tile([0.0, 3.0], (1000, 1)), np.stack([of, end], axis=1)) for of in (a, b)]
    _, first, second = at_equal_hearing(*one_end, 1.0)
    assert np.array_equal(first, second)


def test_the_frontier_is_what_nothing_dominates() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (0.5, 5.0), (2.0, 4.0)]
    assert [dominated(point, points) for point in points] == [False, False, True, True, False]  # ties stay


# ---------------------------------------------------------------------------------------------------------------------
# Both tables, by hand
# ---------------------------------------------------------------------------------------------------------------------
def constant(name: str, better: str, values: dict[str, float], units: str = "text") -> Measure:
    """Every unit has one token and the same value, so that no draw changes anything."""
    totals = {method: {0: np.full(N, value)} for method, value in values.items()}
    ids = tuple(f"{units} {i}" for i in range(N))
    return Measure(name, None, better, ids, ("",) * N, np.ones(N), totals)


PLACES = {
    "base": Place("base"),
    "full-1": Place("full", "learning_rate", 1),
    "full-2": Place("full", "learning_rate", 2),
    "lora-1": Place("lora", "rank", 1),
    "lora-2": Place("lora", "rank", 2),
    "pull": Place("pull"),
    "far": Place("far"),
    "silent": Place("silent"),
}
KL = {"base": 0.0, "full-1": 0.2, "full-2": 0.6, "lora-1": 0.1, "lora-2": 0.4, "pull": 0.3, "far": 0.1, "silent": 0.5}
LOSS = {"full-1": 2.0, "full-2": 1.0, "lora-1": 2.0, "lora-2": 0.5, "pull": 1.5, "far": 9.0}


@pytest.fixture(scope="module")
def by_hand() -> tuple[list[Any], list[Any]]:
    text, heard = constant(DRIFT, LOWER, KL), constant(SPEECH_LOSS, LOWER, LOSS, "answer")
    return frontier_tables(PLACES, [text], [heard], seed=0, n_draws=999)


def test_curves_at_equal_hearing_by_hand(by_hand: tuple[list[Any], list[Any]]) -> None:
    """full goes from (loss 2, KL 0.2) to (1, 0.6), lora from (2, 0.1) to (0.5, 0.4); both reach the losses 2 to 1.

    At 1 lora is two thirds along: 0.1 + 0.3·2/3 = 0.3, against 0.6. At 1.5: a third along, 0.2, against 0.4.
    """
    rows = {(r["method_a"], r["method_b"], r["position"]): r for r in by_hand[1]}
    best, middle = rows["full", "lora", "best"], rows["full", "lora", "middle"]
    assert (best["hearing"], middle["hearing"]) == (1.0, 1.5)
    assert (best["text_a"], best["text_b"]) == pytest.approx((0.6, 0.3))
    assert [row[key] for row in (best, middle) for key in ("difference", "ci_low", "ci_high")] == pytest.approx(
        [-0.3] * 3 + [-0.2] * 3
    )
    assert best["p_value"] == 2 / 1000  # no draw of 999 on the other side, and one added
    assert best["verdict"] == "better"  # a lower KL
    pull = {a: rows[a, "pull", "best"] for a in ("full", "lora")}
    assert {a: row["difference"] for a, row in pull.items()} == pytest.approx({"full": 0.3 - 0.4, "lora": 0.3 - 0.2})
    assert [row["verdict"] for row in pull.values()] == ["better", "worse"]
    assert {row["hearing"] for row in pull.values()} == {1.5}


def test_what_shares_no_hearing_is_said_and_is_no_test(by_hand: tuple[list[Any], list[Any]]) -> None:
    rows = {(r["method_a"], r["method_b"], r["position"]): r for r in by_hand[1]}
    far = rows["full", "far", "best"]
    assert (far["difference"], far["p_holm"], far["verdict"], far["left_out"]) == (
        None, None, "not comparable", NO_COMMON,
    )  # fmt: skip
    assert far["overlap"] == 0
    assert {row["n_family"] for row in by_hand[1] if row["position"] == "best"} == {3}  # full-lora, and pull twice
    assert rows["full", "lora", "best"]["p_holm"] == 3 * 2 / 1000
    assert ("pull", "far", "best") not in rows  # two single methods
    assert ("full", "pull", "middle") not in rows
    assert not any("base" in pair or "silent" in pair for pair in rows)


def test_where_every_method_stands_by_hand(by_hand: tuple[list[Any], list[Any]]) -> None:
    rows = {row["model"]: row for row in by_hand[0]}
    assert list(rows) == list(PLACES)
    assert (rows["base"]["text"], rows["base"]["hearing"], rows["base"]["pareto"]) == (0, None, None)
    assert {name for name, row in rows.items() if row["pareto"]} == {"lora-1", "lora-2", "pull"}
    assert (rows["full-2"]["curve"], rows["full-2"]["varied"], rows["full-2"]["point"]) == ("full", "learning_rate", 2)
    assert [rows["pull"][key] for key in ("text", "text_ci_low", "text_ci_high")] == pytest.approx([0.3] * 3)


def test_more_is_better_for_accuracies() -> None:
    """The same curves as gains: what was a lower KL is a higher accuracy, and hearing is an accuracy too."""
    text = constant(T2T, HIGHER, {name: -value for name, value in KL.items()})
    right = {"full-1": 0, "full-2": 1, "lora-1": 0, "lora-2": 1}
    rows = frontier_tables(PLACES, [text], [constant(S2T, HIGHER, right, "asked")], seed=0, n_draws=999)[1]
    best = next(row for row in rows if row["position"] == "best")
    assert (best["difference"], best["verdict"]) == (pytest.approx(0.2), "better")  # -0.4 against -0.6


def test_texts_are_drawn_within_their_kind() -> None:
    """All plain texts have one KL and all chats another, so no draw changes the mean: the interval has no width."""
    drift = constant(DRIFT, LOWER, KL)
    of_kind = np.array([0.1] * 6 + [0.5] * 6)
    text = replace(drift, kinds=("plain",) * 6 + ("chat",) * 6, totals={"pull": {0: of_kind}})
    (row,) = frontier_tables(PLACES, [text], [constant(SPEECH_LOSS, LOWER, LOSS, "answer")], seed=0, n_draws=99)[0]
    assert [row[key] for key in ("text", "text_ci_low", "text_ci_high")] == pytest.approx([0.3] * 3)


def test_several_training_runs_widen_the_interval() -> None:
    """Runs whose KL differ by ±d: the jackknife of a mean gives d²/1 per side of two runs, t with its own degrees."""
    numbers = {method: {0: np.full(N, value - 0.05), 1: np.full(N, value + 0.05)} for method, value in KL.items()}
    drift = constant(DRIFT, LOWER, KL)
    text = Measure(DRIFT, None, LOWER, drift.units, drift.kinds, drift.counts, numbers)
    heard = constant(SPEECH_LOSS, LOWER, LOSS, "answer")
    both = {method: {0: of[0], 1: of[0]} for method, of in heard.totals.items()}
    heard = Measure(SPEECH_LOSS, None, LOWER, heard.units, heard.kinds, heard.counts, both)
    table, compared = frontier_tables(PLACES, [text], [heard], seed=0, n_draws=999)
    best = next(r for r in compared if (r["method_a"], r["method_b"], r["position"]) == ("full", "lora", "best"))
    assert (best["test"], best["seeds_a"], best["seeds_b"]) == ("jackknife_t", 2, 2)
    # Variance of a mean of two values ±0.05: 0.005 / 2; two sides, each with one degree of freedom: 2 together.
    error = math.sqrt(2 * 0.0025)
    assert best["difference"] == pytest.approx(-0.3)
    assert best["ci_high"] == pytest.approx(-0.3 + stats.t.ppf(0.975, 2) * error)
    assert best["p_value"] == pytest.approx(2 * stats.t.sf(0.3 / error, 2))
    pull = next(row for row in table if row["model"] == "pull")
    assert pull["text_ci_high"] == pytest.approx(0.3 + stats.t.ppf(0.975, 1) * 0.05)
    assert pull["n_seeds"] == 2


def test_the_parts_of_the_tests_by_hand() -> None:
    assert sign_p(np.array([1.0, 2.0, -1.0]), 99) == 1.0  # 2·(1 + 1)/4
    assert sign_p(np.arange(1.0, 200.0), 99) == 2 * 1 / 200
    assert sign_p(np.array([*np.arange(1.0, 199.0), math.nan]), 99) == 2 * 2 / 200  # counts on both sides
    # However many draws there are of them: three units say the same in one of four cases.
    assert sign_p(np.arange(1.0, 200.0), 3) == 0.25
    values = np.array([3.0, 5.0, 10.0])
    without = [values[values != value].mean() for value in values]
    assert jackknife_variance(without) == pytest.approx(values.var(ddof=1) / 3)
    effect = combined_effect(2.0, [(4.0, 10.0)])
    assert (effect.low, effect.p_value) == pytest.approx((2 - 2 * stats.t.ppf(0.975, 10), 2 * stats.t.sf(1, 10)))
    times = next(resampled(("a", "a", "b", "b", "b"), 0, 50))
    assert times[:, :2].sum(axis=1).tolist() == [2] * 50
    assert times[:, 2:].sum(axis=1).tolist() == [3] * 50


# ---------------------------------------------------------------------------------------------------------------------
# Simulated
# ---------------------------------------------------------------------------------------------------------------------
def simulated(random: np.random.Generator, shift: float) -> Any:
    """Two curves of three points on one line, at other places of it; `shift`: what the second keeps less.

    Texts and answers differ from each other and are as hard for every method; each method adds noise of its own.
    """
    n_texts, n_answers = 80, 60
    at = {"a-1": 0.2, "a-2": 0.5, "a-3": 0.8, "b-1": 0.1, "b-2": 0.45, "b-3": 0.9}
    hard, long = random.gamma(2, 0.5, n_texts), random.integers(5, 40, n_texts).astype(float)
    heard, tokens = random.normal(0, 0.5, n_answers), random.integers(3, 20, n_answers).astype(float)
    kl, loss = {}, {}
    for name, x in at.items():
        mean = x + (shift if name.startswith("b") else 0.0)
        kl[name] = {0: mean * hard * long * random.gamma(9, 1 / 9, n_texts)}
        loss[name] = {0: tokens * (2 - x + heard + random.normal(0, 0.2, n_answers))}
    text = Measure(DRIFT, None, LOWER, tuple(map(str, range(n_texts))), ("",) * n_texts, long, kl)
    units = tuple(f"answer {i}" for i in range(n_answers))
    hearing = Measure(SPEECH_LOSS, None, LOWER, units, ("",) * n_answers, tokens, loss)
    places = {name: Place(name[0], "rate", x) for name, x in at.items()}
    return frontier_tables(places, [text], [hearing], seed=int(random.integers(2**31)), n_draws=400)[1]


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_how_often_the_interval_holds_the_truth(shift: float) -> None:
    """300 studies. The difference is `shift` at every hearing; at 0.15 most studies find it.

    Monte-Carlo error of the 5 %: 1.3 points.
    """
    random = np.random.default_rng(3)
    missed, found = {"best": 0, "middle": 0}, {"best": 0, "middle": 0}
    for _ in range(300):
        for row in simulated(random, shift):
            missed[row["position"]] += not row["ci_low"] <= shift <= row["ci_high"]
            found[row["position"]] += row["p_value"] <= 0.05
    assert max(missed.values()) <= 0.085 * 300, missed
    if shift:
        assert min(found.values()) > 0.7 * 300, found
    else:
        assert max(found.values()) <= 0.085 * 300, found
        assert min(found.values()) > 0, found


# ---------------------------------------------------------------------------------------------------------------------
# Curves of a recipe, and the comparisons that they leave alone
# ---------------------------------------------------------------------------------------------------------------------
def test_points_stand_in_the_order_of_what_is_varied() -> None:
    places = places_of(
        {
            "full-2e-4": Method("full", 2e-4, curve="full"),
            "lora": Method("lora"),
            "full-1e-4": Method("full", 1e-4, curve="full"),
            "pull-9": Method("full", pull=Pull(9), curve="pull"),
            "pull-10": Method("full", pull=Pull(10), curve="pull"),
            "deal-b": Method("layer_lr", importance="shuffled", curve="deal"),
            "deal-a": Method("layer_lr", importance="mean", curve="deal"),
            "alone": Method("full", curve="alone"),
        }
    )
    assert list(places) == [
        "base", "full-1e-4", "full-2e-4", "lora", "pull-9", "pull-10", "deal-b", "deal-a", "alone",
    ]  # fmt: skip
    assert places["full-1e-4"] == Place("full", "learning_rate", 1e-4)
    assert places["pull-10"] == Place("pull", "pull.strength", 10)
    assert places["deal-b"] == Place("deal", "importance", "shuffled")
    assert places["lora"] == Place("lora")
    assert places["alone"] == Place("alone")


def test_points_change_no_comparison_of_other_methods() -> None:
    right = {
        name: {f"q{i}": i < first for i in range(30)} for name, first in {"base": 20, "full": 9, "lora": 14}.items()
    }
    points = {f"full-{i}": {f"q{j}": j < i for j in range(30)} for i in range(3, 9)}
    about: Any = {"task": "t", "modality": "text", "metric": "m", "seed": 0}
    before = compare(right, **about)
    after = compare({**right, **points}, **about, points=points)
    assert [row for row in after if not {row["method_a"], row["method_b"]} & set(points)] == before
    rest = [row for row in after if row not in before]
    assert [(row["method_a"], row["method_b"]) for row in rest] == [("base", name) for name in points]
    assert {(row["family"], row["n_family"]) for row in rest} == {("text, against the base, points of curves", 6)}
    assert len(list(pairs_of(["base", *right, *points][1:]))) == 36  # without curves every pair
