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
from palimpsest.report.tables import general_text
from report_fixture import drift_row

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
    first = {
        "method": "m0",
        "per_byte_base": 1.0,
        "difference": 9.0,
        "per_token_difference": 36.0,
        "p_holm": 0.5,
        "verdict": "better",
    }
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
    view: Any = {**results, "general_text_comparisons": [shown, kept]}
    assert "general_text_comparisons" not in of_first_runs(view)
    assert "general_text_comparisons" in of_first_runs(results)


def _read(model: str, loss: float, arm: float = 0.1, **more: Any) -> dict[str, Any]:
    of_byte = {"per_byte": loss / 4, "per_byte_ci_low": loss / 4, "per_byte_ci_high": loss / 4, "perplexity": 2.7}
    bounds = {"loss_ci_low": loss - arm, "loss_ci_high": loss + arm}
    return {"model": model, "text": "t", "loss": loss, **bounds, **of_byte, **more}


def _shown(*rows: dict[str, Any], n_runs: int = 2) -> list[dict[str, Any]]:
    return _means_over_texts({"general_text": list(rows), "seeds": [{"n_seeds": n_runs}]}, "general_text")  # type: ignore[typeddict-item]


def test_a_mean_over_runs_has_the_interval_of_texts_and_runs() -> None:
    """Runs 100 and 102: t(1) times sd / √2 is 12.706; the arms over texts, 0.3 and 0.5, are 0.4."""
    base, mean = _shown(_read("base", 5.0), _read("m", 100.0, 0.3), _read("m-seed1", 102.0, 0.5))
    assert (base["loss"], base["n_seeds"]) == (5.0, 1)
    half = math.hypot(0.4, 12.706204736432095)
    assert (mean["model"], mean["n_seeds"], mean["loss"]) == ("m", 2, 101.0)
    assert (mean["loss_ci_low"], mean["loss_ci_high"]) == pytest.approx((101 - half, 101 + half))
    assert mean["perplexity"] == pytest.approx(math.exp(101))


def test_an_interval_over_runs_is_cut_to_what_the_measure_can_be() -> None:
    (mean,) = _shown(_read("m", 1.0), _read("m-seed1", 3.0))
    assert (mean["loss_ci_low"], mean["loss_ci_high"] > 3) == (0.0, True)
    drift = [drift_row(name, "plain", kl) | {"agreement": 0.9 + kl} for name, kl in (("m", 0.01), ("m-seed1", 0.09))]
    results: Any = {"drift": drift, "seeds": [{"n_seeds": 2}]}
    (row,) = _means_over_texts(results, "drift")
    assert (row["kl"], row["kl_ci_low"], row["agreement_ci_high"]) == (pytest.approx(0.05), 0.0, 1.0)
    assert row["loss_difference_ci_low"] < 0  # which can be below
    assert row["loss"] - row["loss_base"] == pytest.approx(row["loss_difference"])


@pytest.mark.parametrize("field", ["loss", "loss_ci_low"])
@pytest.mark.parametrize("broken", [None, math.nan, math.inf])
def test_what_is_not_finite_in_one_run_has_no_mean(field: str, broken: float | None) -> None:
    (mean,) = _shown(_read("m", 1.0), _read("m-seed1", 3.0) | {field: broken})
    assert [mean[key] for key in ("loss", "loss_ci_low", "loss_ci_high", "perplexity")] == [None] * 4
    assert mean["per_byte"] == 0.5
    (large,) = _shown(_read("m", 800.0), _read("m-seed1", 900.0))
    assert (large["loss"], large["perplexity"]) == (850.0, None)


def test_a_method_without_some_run_shows_its_first() -> None:
    rows = [_read("m", 1.0), _read("m-seed2", 3.0), _read("whole", 1.0), _read("whole-seed1", 2.0)]
    first, mean = _shown(*rows, _read("whole-seed2", 3.0), n_runs=3)
    assert (first["model"], first["loss"], first["n_seeds"]) == ("m", 1.0, 1)
    assert (mean["model"], mean["loss"], mean["n_seeds"]) == ("whole", 2.0, 3)


def test_texts_and_classes_of_tokens_have_means_of_their_own() -> None:
    rows = [
        drift_row(model, text, kl + more) | {"tokens": tokens}
        for model, kl in (("m", 1.0), ("m-seed1", 2.0))
        for text, more in (("plain", 0.0), ("chat", 10.0))
        for tokens in ("all", "words")
    ]
    results: Any = {"drift": rows, "seeds": [{"n_seeds": 2}]}
    means = {(row["text"], row["tokens"]): row["kl"] for row in _means_over_texts(results, "drift")}
    assert means == {(text, tokens): kl for text, kl in (("plain", 1.5), ("chat", 11.5)) for tokens in ("all", "words")}


def test_the_tables_say_of_how_many_runs_a_row_is_and_what_intervals_are_over() -> None:
    rows = _shown(_read("m", 1.0, n_texts=2, n_bytes=4), _read("m-seed1", 3.0, n_texts=2, n_bytes=4))
    several, one = general_text(rows), general_text([_read("m", 1.0, n_texts=2, n_bytes=4)])
    assert [column.title for column in several.columns][1] == "Runs"
    assert [cell.text for cell in several.rows[0]][1] == "2"
    assert several.note.startswith("Means over")
    assert "the same for all models and training runs;" in several.note
    assert "Runs" not in [column.title for column in one.columns]
    assert "uns" not in one.note
