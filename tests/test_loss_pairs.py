"""Losses over training runs: the test by hand, how often equal methods are called different, which pairs there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from palimpsest.comparison.frontier import DRIFT, GENERAL_TEXT, LOWER, SPEECH_LOSS, T2T, Measure
from palimpsest.comparison.loss_pairs import loss_pair, seed_losses
from palimpsest.files import UserError
from palimpsest.intervals import loss_difference_over_runs
from palimpsest.records import BASE
from palimpsest.report.across_runs import _mean_general_text, _means_over_texts, of_first_runs

Array = Any


def measure(totals: Mapping[str, Array], name: str = GENERAL_TEXT, counts: Array | None = None) -> Measure:
    """totals: (runs, units) of each model."""
    n = np.shape(next(iter(totals.values())))[1]
    of = {model: dict(enumerate(np.asarray(values, dtype=float))) for model, values in totals.items()}
    units = tuple(map(str, range(n)))
    return Measure(name, None, LOWER, units, ("",) * n, np.ones(n) if counts is None else counts, of)


# ---------------------------------------------------------------------------------------------------------------------
# The test
# ---------------------------------------------------------------------------------------------------------------------
def test_by_hand() -> None:
    """Three runs, two documents of one token: differences (1, 3), (2, 4), (3, 5).

    Runs 2, 3, 4: mean 3, standard error √(1/3), 2 degrees of freedom. Documents 2 and 4: standard error 1, 1 degree.
    """
    a, b = [[0, 0], [1, 1], [2, 2]], [[1, 3], [3, 5], [5, 7]]
    found = loss_difference_over_runs(a, b, [1, 1])

    def reach(p: float) -> float:
        return math.sqrt(stats.t.ppf(1 - p / 2, 1) ** 2 + stats.t.ppf(1 - p / 2, 2) ** 2 / 3)

    assert (found.value, found.low, found.high) == pytest.approx((3, 3 - reach(0.05), 3 + reach(0.05)))
    assert reach(found.p_value) == pytest.approx(3)
    assert 0.05 < found.p_value < 1  # as the interval says, which holds 0


def test_all_say_the_same() -> None:
    """No spread over documents or runs: the sign test over documents, and p = 1 without a difference."""
    ones = np.ones((3, 4))
    assert loss_difference_over_runs(ones, 2 * ones, np.ones(4)).p_value == 2 * 0.5**4
    assert loss_difference_over_runs(ones, ones, np.ones(4)).p_value == 1
    for zero_mean in ([[1, -1], [-1, 1]], [[1, -1], [3, -3]], [[2, 0], [-1, -1]]):
        found = loss_difference_over_runs(np.zeros((2, 2)), zero_mean, np.ones(2))
        assert (found.value, found.p_value) == (0, 1)
        assert found.low <= 0 <= found.high


def test_tokens_weigh_and_runs_are_paired() -> None:
    """Documents of 1 and 3 tokens: (1 + 5) / 4. What run i has in common with run i is gone, run by run."""
    assert loss_difference_over_runs(np.zeros((2, 2)), [[1, 5], [1, 5]], [1, 3]).value == pytest.approx(1.5)
    random, tokens = np.random.default_rng(0), np.tile([1.0, 3.0], 20)
    luck = random.normal(0, 1, (3, 1)) * tokens
    b = luck + tokens + random.normal(0, 0.1, (3, 40))
    assert loss_difference_over_runs(luck, b, tokens).p_value < 1e-3
    assert loss_difference_over_runs(luck, b[[1, 2, 0]], tokens).p_value > 0.1


def test_a_single_model_stands_beside_every_run() -> None:
    b = np.array([[1.0, 3.0, 2.0], [2.0, 4.0, 9.0]])
    base = np.array([[0.5, 1.0, 1.0]])
    assert loss_difference_over_runs(base, b, [1, 1, 1]) == loss_difference_over_runs(base.repeat(2, 0), b, [1, 1, 1])


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3)])
def test_runs_that_cannot_be_paired(a: int, b: int) -> None:
    with pytest.raises(UserError, match=f"{a} and {b}"):
        loss_difference_over_runs(np.zeros((a, 4)), np.zeros((b, 4)), np.ones(4))


def test_other_units_are_refused() -> None:
    for a, n in ((np.zeros((2, 3)), 4), (np.zeros((2, 1)), 1), (np.zeros(4), 4)):
        with pytest.raises(UserError, match="same two or more examples"):
            loss_difference_over_runs(a, np.zeros((2, n)), np.ones(n))


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_equal_methods_are_seldom_called_different(spread: float) -> None:
    """Documents of shared difficulty, three runs whose luck has this deviation in all documents: 5 % is nominal."""
    random = np.random.default_rng(0)
    n, tokens, called = 400, random.integers(20, 80, 100).astype(float), 0
    for _ in range(n):
        luck = random.normal(0, spread, (2, 3, 1)) + random.normal(0, 1, (2, 1, 100)) + random.normal(0, 1, (2, 3, 100))
        called += loss_difference_over_runs(*(luck * tokens), tokens).p_value < 0.05
    assert called / n < 0.06


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def drawn(*shift: float) -> dict[str, Array]:
    """The base and m0, m1 … in three runs, each so much above it."""
    random = np.random.default_rng(1)
    of = {f"m{i}": random.normal(value, 0.1, (3, 30)) for i, value in enumerate(shift)}
    return {BASE: np.zeros((1, 30)), **of}


def test_pairs_and_families() -> None:
    """Drift with the base is no test; points of curves with the base alone; accuracies belong to another table."""
    three = drawn(0, 1, 1)
    measures = [measure(three, name) for name in (DRIFT, GENERAL_TEXT, SPEECH_LOSS, T2T)]
    rows = seed_losses(measures, ["m0", "m1", "m2"], points={"m2"})
    pairs = {name: {(r["method_a"], r["method_b"]) for r in rows if r["measure"] == name} for name in (DRIFT, T2T)}
    assert pairs == {DRIFT: {("m0", "m1")}, T2T: set()}
    text = {(r["method_a"], r["method_b"]): r for r in rows if r["measure"] == GENERAL_TEXT}
    assert set(text) == {(BASE, "m0"), (BASE, "m1"), (BASE, "m2"), ("m0", "m1")}
    assert [r["verdict"] for r in text.values()] == ["no difference shown", "worse", "worse", "worse"]
    assert (text[BASE, "m1"]["n_family"], text[BASE, "m1"]["family"]) == (2, "general text over runs, against the base")
    assert text[BASE, "m1"]["p_holm"] == pytest.approx(2 * text[BASE, "m1"]["p_value"])
    assert text[BASE, "m2"]["family"] == "general text over runs, against the base, points of curves"
    assert (text["m0", "m1"]["seeds_a"], text[BASE, "m1"]["seeds_a"], text[BASE, "m1"]["seeds_b"]) == (3, 1, 3)
    row = text["m0", "m1"]
    assert row["difference"] == pytest.approx(np.mean(row["values"])) == pytest.approx(row["loss_b"] - row["loss_a"])
    assert row["values"] == pytest.approx(((three["m1"] - three["m0"]).sum(axis=1) / 30).tolist())


def test_measured_in_the_first_run_alone_there_is_no_row() -> None:
    """seeds_measure without drift: run 0 has it, the others do not."""
    totals = drawn(0, 1)
    first = measure({model: values[:1] for model, values in totals.items()})
    assert seed_losses([first], ["m0", "m1"]) == []
    uneven = measure({**totals, "m1": totals["m1"][:2]})
    row = loss_pair(uneven, "m0", "m1")
    assert row is not None
    assert (row["seeds_a"], row["seeds_b"]) == (2, 2)
    assert loss_pair(first, "m0", "of another study") is None


def test_the_base_by_construction_is_no_test() -> None:
    totals = drawn(0, 1)
    totals["adaptor"] = np.zeros((3, 30))
    rows = seed_losses([measure(totals)], ["adaptor", "m1"], same={"adaptor": BASE})
    left = {(r["method_a"], r["method_b"]): r["left_out"] for r in rows}
    assert left[BASE, "adaptor"] == "equal by construction"
    assert left["adaptor", "m1"] == "repeats another row"
    assert left[BASE, "m1"] is None
    assert seed_losses([measure(totals, DRIFT)], ["adaptor", "m1"], same={"adaptor": BASE}) == []


def test_the_report_compares_general_text_over_runs() -> None:
    """Nats per token into nats per byte: 4 bytes a token here. A method without further runs keeps its first."""
    (row,) = seed_losses([measure(drawn(1))], ["m0"])
    first = {"method": "m0", "difference": 9.0, "per_token_difference": 36.0, "p_holm": 0.5, "verdict": "better"}
    other = {**first, "method": "m9"}
    text = [{"model": model, "n_tokens": 250, "n_bytes": 1000} for model in ("m0", "m9")]
    results: Any = {
        "seed_losses": [row, {**row, "measure": SPEECH_LOSS, "difference": 7.0}],
        "drift": [],
        "general_text": text,
        "general_text_comparisons": [first, {**first, "method": "m0-seed1"}, other],
    }
    shown, kept = _mean_general_text(results)
    assert kept == other
    assert shown["per_token_difference"] == row["difference"] == pytest.approx(4 * shown["difference"])
    assert (shown["verdict"], shown["p_holm"]) == ("worse", row["p_holm"])
    assert "general_text_comparisons" not in of_first_runs(results)
    assert "general_text_comparisons" in of_first_runs({**results, "seed_losses": []})


def _read(model: str, loss: float, arm: float, **more: Any) -> dict[str, Any]:
    return {"model": model, "text": "t", "loss": loss, "loss_ci_low": loss - arm, "loss_ci_high": loss + arm, **more}


def test_a_mean_over_runs_has_the_interval_of_texts_and_runs() -> None:
    """Runs 1 and 3: t of one degree of freedom times sd / √2 is 12.706; the arms over texts, 0.3 and 0.5, are 0.4."""
    rows = [_read("base", 5.0, 0.1), _read("m", 1.0, 0.3, perplexity=2.7), _read("m-seed1", 3.0, 0.5)]
    base, mean = _means_over_texts(rows, ("loss",), ("text",))
    assert base["loss"] == 5.0
    assert "n_seeds" not in base
    half = math.hypot(0.4, 12.706204736432095)
    assert (mean["model"], mean["n_seeds"], mean["loss"]) == ("m", 2, 2.0)
    assert (mean["loss_ci_low"], mean["loss_ci_high"]) == pytest.approx((2 - half, 2 + half))
    assert mean["perplexity"] == pytest.approx(math.exp(2))


@pytest.mark.parametrize("broken", [None, math.nan, math.inf])
def test_what_is_not_finite_in_one_run_has_no_mean(broken: float | None) -> None:
    rows = [_read("m", 1.0, 0.3, perplexity=2.7), {**_read("m-seed1", 3.0, 0.5), "loss": broken}]
    (mean,) = _means_over_texts(rows, ("loss",), ("text",))
    assert [mean[key] for key in ("loss", "loss_ci_low", "loss_ci_high", "perplexity")] == [None] * 4


def test_texts_and_classes_of_tokens_have_means_of_their_own() -> None:
    rows = [
        {**_read(model, loss, 0.1), "text": text, "tokens": tokens}
        for model, loss in (("m", 1.0), ("m-seed1", 2.0))
        for text in ("plain", "chat")
        for tokens in ("all", "words")
    ]
    assert len(_means_over_texts(rows, ("loss",), ("text", "tokens"))) == 4
