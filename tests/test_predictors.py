"""What predicts the loss of text, and layers put back: against other ways to the same numbers, and by hand."""

from __future__ import annotations

import re
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palimpsest.comparison.frontier import DRIFT, GENERAL_TEXT, HIGHER, LOWER, S2T, SPEECH_LOSS, Measure
from palimpsest.comparison.predictors import CHANGE, partial, permutation_p, predictor_records, spearman
from palimpsest.comparison.restoration import Restored, restoration_records, restored_in
from palimpsest.report.mechanism import predictors, restoration
from palimpsest.report.table import to_plain
from palimpsest.training.methods import Method
from report_fixture import restoration_row

NAMES = [f"m{i}" for i in range(8)]


# ---------------------------------------------------------------------------------------------------------------------
# Rank correlation at equal hearing
# ---------------------------------------------------------------------------------------------------------------------
def residual_correlation(x: Any, y: Any, z: Any) -> float:
    """The other definition: the correlation of what least squares leaves of the ranks."""
    design = np.stack([np.ones(len(z)), stats.rankdata(z)], axis=1)
    left = [of - design @ np.linalg.lstsq(design, of, rcond=None)[0] for of in map(stats.rankdata, (x, y))]
    return float(np.corrcoef(*left)[0, 1])


@pytest.mark.filterwarnings("ignore:An input array is constant")
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=6, max_size=20))
def test_partial_is_the_correlation_of_what_the_hearing_leaves(rows: list[tuple[int, int, int]]) -> None:
    x, y, z = np.array(rows, dtype=float).T
    found = float(partial(x, y, z))
    if not np.isfinite(found):
        # Nothing is left of a side: all equal, or in the order of z, or against it.
        assert any(len(set(of)) == 1 or abs(stats.spearmanr(of, z).statistic) > 1 - 1e-9 for of in (x, y))
    else:
        assert found == pytest.approx(residual_correlation(x, y, z), abs=1e-6)


def test_spearman_is_scipys_in_every_row() -> None:
    x, y = np.random.default_rng(0).integers(0, 5, size=(2, 7, 9)).astype(float)
    assert spearman(x, y) == pytest.approx([stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])


def test_p_is_that_of_all_orders() -> None:
    """Without anything to take out, the deals are the orders of y: of 6! = 720 all are counted here."""
    x, y = np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 3, 5, 4, 6])
    measured = abs(stats.spearmanr(x, y).statistic)
    extreme = np.mean([abs(stats.spearmanr(x, order).statistic) >= measured - 1e-9 for order in permutations(y)])
    assert permutation_p(x, y, np.zeros(6), seed=0) == pytest.approx(extreme, abs=0.006)


def test_what_only_follows_the_hearing_predicts_nothing() -> None:
    """Both follow the hearing: correlated, and no longer so at equal hearing; p is below 0.05 in about 5 % of cases."""
    rng = np.random.default_rng(1)
    p_values, plain, left = [], [], []
    for i in range(200):
        z = rng.normal(size=16)
        x, y = z + rng.normal(size=(2, 16))
        p_values.append(permutation_p(x, y, z, seed=i, n_draws=400))
        plain.append(float(spearman(x, y)))
        left.append(float(partial(x, y, z)))
    assert np.mean(plain) > 0.4
    assert abs(np.mean(left)) < 0.06
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def frontier_rows(measure: str, values: Any, heard: Any, better: str = LOWER) -> list[dict[str, Any]]:
    return [
        {
            "model": name, "text_measure": measure, "text_task": None, "text_better": better, "text": float(value),
            "hearing_measure": SPEECH_LOSS, "hearing": float(hearing),
        }
        for name, value, hearing in zip(["base", *NAMES], [0, *values], [2, *heard], strict=True)
    ]  # fmt: skip


def shift_rows(values: Any) -> list[dict[str, Any]]:
    common = {"reference": "base", "measure": "jensen_shannon", "reduction": "signed_sum"}
    rows = [{**common, "model": name, "value": float(value)} for name, value in zip(NAMES, values, strict=True)]
    return [*rows, {**rows[0], "reduction": "other", "value": 99.0}, {**rows[0], "reference": "full", "value": 99.0}]


def delta_rows(values: Any) -> list[dict[str, Any]]:
    """Two matrices each, whose mean is the value, and one that does not say."""
    rows = [
        {"method": name, "relative_norm": float(value) + off}
        for name, value in zip(NAMES, values, strict=True)
        for off in (-0.5, 0.5)
    ]
    return [*rows, {"method": NAMES[0], "relative_norm": None}]


def test_the_table_of_predictors() -> None:
    rng = np.random.default_rng(2)
    heard, lost, drift, change = rng.normal(size=(4, 8))
    shift = lost**3  # the order of the loss
    rows = frontier_rows(GENERAL_TEXT, lost, heard) + frontier_rows(DRIFT, drift, heard)
    found = predictor_records(shift_rows(shift), delta_rows(change), rows, reduction="signed_sum", seed=0, n_draws=500)
    by_key = {(row["text_measure"], row["predictor"]): row for row in found}
    # Drift is predicted, and predicts, but not itself; no predictor has no values.
    assert list(by_key) == [
        *((GENERAL_TEXT, name) for name in ("jensen_shannon", CHANGE, DRIFT)),
        *((DRIFT, name) for name in ("jensen_shannon", CHANGE)),
    ]
    best = by_key[GENERAL_TEXT, "jensen_shannon"]
    assert (best["spearman"], best["partial"], best["reduction"]) == (pytest.approx(1), pytest.approx(1), "signed_sum")
    assert best["p_value"] == pytest.approx(1 / 501, abs=2e-3)
    assert best["p_holm"] == pytest.approx(3 * best["p_value"])
    weights = by_key[GENERAL_TEXT, CHANGE]
    assert weights["partial"] == pytest.approx(residual_correlation(change, lost, heard))
    assert weights["beyond_change"] is None
    assert best["beyond_change"] == pytest.approx(1 - abs(weights["partial"] or 0))
    assert best["beyond_change_ci_low"] <= best["beyond_change"] <= best["beyond_change_ci_high"] + 1e-9
    assert best["models"] == NAMES


def test_a_correlation_without_an_interval_is_written() -> None:
    rng = np.random.default_rng(6)
    rows = predictor_records(*rows_of(*rng.normal(size=(4, 8))), reduction="signed_sum", seed=0, n_draws=99)
    assert rows[0]["ci_low"] is None
    written = to_plain(predictors(rows))
    assert f"{rows[0]['partial']:.2f}".replace("-", "−") in written
    assert "None" not in written


def test_more_accuracy_is_less_lost() -> None:
    rng = np.random.default_rng(3)
    heard, accuracy, change = rng.normal(size=(3, 8))
    rows = frontier_rows("t2t", accuracy, heard, better=HIGHER)
    (_, found) = predictor_records(
        shift_rows(change), delta_rows(-accuracy), rows, reduction="signed_sum", seed=0, n_draws=99
    )
    assert (found["predictor"], found["partial"]) == (CHANGE, pytest.approx(1))


def test_models_that_are_the_base_on_text_do_not_count_and_few_are_no_table() -> None:
    rng = np.random.default_rng(4)
    heard, lost, change = rng.normal(size=(3, 8))
    tables = shift_rows(change), delta_rows(change), frontier_rows(GENERAL_TEXT, lost, heard)
    options: dict[str, Any] = {"reduction": "signed_sum", "seed": 0, "n_draws": 99}
    assert predictor_records(*tables, **options, same=dict.fromkeys(NAMES[:2], "base"))[0]["models"] == NAMES[2:]
    assert predictor_records(*tables, **options, same=dict.fromkeys(NAMES[:3], "base")) == []
    # A blend that is the whole of another model counts once, and alone where that one has no importance.
    assert predictor_records(*tables, **options, same={NAMES[0]: NAMES[1]})[0]["models"] == NAMES[1:]
    assert predictor_records(*tables, **options, same={NAMES[0]: "full"})[0]["models"] == NAMES


def rows_of(shift: Any, change: Any, lost: Any, heard: Any) -> tuple[list[dict[str, Any]], ...]:
    """The three tables of so many models as there are values."""
    names = [f"m{i:02}" for i in range(len(shift))]
    common = {"reference": "base", "measure": "jensen_shannon", "reduction": "signed_sum"}
    frontier = {"text_measure": GENERAL_TEXT, "text_task": None, "text_better": LOWER, "hearing_measure": SPEECH_LOSS}
    return (
        [{**common, "model": name, "value": float(value)} for name, value in zip(names, shift, strict=True)],
        [{"method": name, "relative_norm": float(value)} for name, value in zip(names, change, strict=True)],
        [
            {**frontier, "model": name, "text": float(text), "hearing": float(hearing)}
            for name, text, hearing in zip(names, lost, heard, strict=True)
        ],
    )


@pytest.mark.parametrize(("n_models", "relation"), [(6, 0.0), (8, 0.0), (12, 0.0), (8, 1.0), (12, 1.0)])
def test_an_interval_holds_0_where_there_is_nothing(n_models: int, relation: float) -> None:
    """Of 95 % of studies, or there is none: of 6 and 8 models the bootstrap's would miss it in 8 to 47 %."""
    rng = np.random.default_rng(n_models)
    missed = beyond = 0
    for i in range(100):
        heard = rng.normal(size=n_models)
        shift, change, lost = relation * heard + rng.normal(size=(3, n_models))
        tables = rows_of(shift, change, lost, heard)
        row = predictor_records(*tables, reduction="signed_sum", seed=i, n_draws=100)[0]
        assert row["ci_low"] is None or n_models >= 12
        missed += row["ci_low"] is not None and not row["ci_low"] <= 0 <= row["ci_high"]
        if row["beyond_change"] is not None:  # of few models one can follow the speech loss alone
            beyond += not row["beyond_change_ci_low"] <= 0 <= row["beyond_change_ci_high"]
    assert (row["ci_low"] is None) == (n_models < 12)
    assert missed <= 12
    assert beyond <= 12


def test_a_loss_in_the_order_of_the_hearing_leaves_nothing_to_predict() -> None:
    rising, change = np.arange(8.0), np.random.default_rng(5).normal(size=8)
    tables = shift_rows(change), delta_rows(change), frontier_rows(GENERAL_TEXT, rising, rising)
    (row, _) = predictor_records(*tables, reduction="signed_sum", seed=0, n_draws=99)
    assert (row["partial"], row["p_value"], row["ci_low"]) == (None, None, None)
    assert "follow the speech loss" in row["note"]


# ---------------------------------------------------------------------------------------------------------------------
# Layers put back
# ---------------------------------------------------------------------------------------------------------------------
BACK = {"shifted": Restored("full", (0, 1)), "random": Restored("full", (1, 5)), "three": Restored("full", (1, 2, 3))}


def measure(name: str, better: str, totals: dict[str, Any], units: str) -> Measure:
    of = {method: {0: np.asarray(values, dtype=float)} for method, values in totals.items()}
    n = len(next(iter(of.values()))[0])
    return Measure(name, None, better, tuple(f"{units} {i}" for i in range(n)), ("",) * n, np.ones(n), of)


def test_what_comes_back_by_hand() -> None:
    """Of a loss of 2 a text, half a one is left with the shifted layers back, 1.5 with the random ones."""
    rng = np.random.default_rng(0)
    full = 2 + 0.1 * rng.normal(size=40)
    text = measure(
        GENERAL_TEXT,
        LOWER,
        {"base": 0 * full, "full": full, "shifted": full / 4, "random": full * 3 / 4, "three": full, "lora": 9 * full},
        "text",
    )
    heard = measure(S2T, HIGHER, {"full": [1, 1, 0, 0], "shifted": [1, 0, 0, 0]}, "question")
    rows = restoration_records(BACK, [text, heard], seed=0, n_draws=999)
    by_pair = {(row["measure"], row["method_a"], row["method_b"]): row for row in rows}
    # Three layers are not set against two, and what was not asked in speech stands in no row of S2T.
    assert list(by_pair) == [
        *((GENERAL_TEXT, "full", name) for name in BACK),
        (GENERAL_TEXT, "shifted", "random"),
        (S2T, "full", "shifted"),
    ]
    shifted = by_pair[GENERAL_TEXT, "full", "shifted"]
    assert (shifted["returned"], shifted["returned_ci_low"], shifted["returned_ci_high"]) == pytest.approx((0.75,) * 3)
    assert shifted["difference"] == pytest.approx(-0.75 * full.mean())
    assert (shifted["verdict"], shifted["layers_a"], shifted["layers_b"], shifted["n_shared"]) == (
        *("better", None, [0, 1], None),
    )
    same = by_pair[GENERAL_TEXT, "full", "three"]
    assert (same["difference"], same["returned"], same["verdict"]) == (0, 0, "no difference shown")
    assert same["left_out"] == "nothing separates them"
    pair = by_pair[GENERAL_TEXT, "shifted", "random"]
    assert (pair["difference"], pair["verdict"], pair["returned"]) == (pytest.approx(full.mean() / 2), "worse", None)
    assert (pair["layers_a"], pair["layers_b"], pair["n_shared"]) == ([0, 1], [1, 5], 1)
    spoken = by_pair[S2T, "full", "shifted"]
    assert (spoken["value_a"], spoken["value_b"], spoken["returned"]) == (0.5, 0.25, None)
    assert spoken["p_value"] > 0.3


def test_nothing_returns_where_nothing_was_lost() -> None:
    """The tuned model's loss is around 0: a share of it would be noise over noise."""
    full = np.random.default_rng(1).normal(size=40)
    text = measure(GENERAL_TEXT, LOWER, {"full": full - full.mean(), "shifted": full / 2}, "text")
    (row,) = restoration_records({"shifted": BACK["shifted"]}, [text], seed=0, n_draws=999)
    assert (row["returned"], row["returned_ci_low"], row["returned_ci_high"]) == (None, None, None)


def test_a_share_has_an_interval_where_few_texts_hold_the_loss() -> None:
    """Four of 40 texts lost something: 1.5 % of the draws have none of them, of which no share can be taken."""
    full, back = np.zeros(40), np.zeros(40)
    full[:4], back[:2] = 1.0, 1.0
    text = measure(GENERAL_TEXT, LOWER, {"full": full, "shifted": back}, "text")
    (row,) = restoration_records({"shifted": BACK["shifted"]}, [text], seed=0)
    assert (row["returned"], row["returned_ci_low"], row["returned_ci_high"]) == (0.5, 0.0, 1.0)


def test_the_same_layers_under_two_names_are_one_test() -> None:
    """Otherwise the second name would make the p of both larger."""
    full = 2 + np.random.default_rng(2).normal(size=30)
    text = measure(GENERAL_TEXT, LOWER, {"full": full, "a": full / 4, "again": full / 4, "b": full / 2}, "text")
    sets = {"a": Restored("full", (0, 1)), "again": Restored("full", (1, 0)), "b": Restored("full", (2, 3))}
    rows = {(row["method_a"], row["method_b"]): row for row in restoration_records(sets, [text], seed=0, n_draws=999)}
    left_out = {pair: row["left_out"] for pair, row in rows.items() if row["left_out"]}
    assert left_out == {
        ("full", "again"): "repeats another row",
        ("a", "again"): "equal by construction",
        ("again", "b"): "repeats another row",
    }
    assert rows["full", "again"]["p_holm"] == rows["full", "a"]["p_holm"]
    assert rows["full", "a"]["n_family"] == 2
    with pytest.raises(ValueError, match="must name each layer once"):
        Method(kind="blend", of="full", scale=0.0, layers=(1, 1))


def test_few_texts_that_say_the_same_are_no_proof() -> None:
    full = np.array([1.0, 2.0, 3.0])
    text = measure(GENERAL_TEXT, LOWER, {"full": full, "shifted": full / 4}, "text")
    (row,) = restoration_records({"shifted": BACK["shifted"]}, [text], seed=0)
    assert (row["p_value"], row["verdict"]) == (0.25, "no difference shown")  # all three: 2 · 1/8


def test_which_methods_put_layers_back() -> None:
    methods = {
        "full": Method(kind="full"),
        "back": Method(kind="blend", of="full", scale=0.0, layers=(3, 1)),
        "half": Method(kind="blend", of="full", scale=0.5, layers=(3, 1)),
        "whole": Method(kind="blend", of="full", scale=0.5),
    }
    assert restored_in(methods) == {"back": Restored("full", (3, 1))}
    assert restoration_records({}, [], seed=0) == []


def test_accuracies_of_layers_put_back_are_percent_and_points() -> None:
    """28 % against 29 %: a difference of one point; two layers in common are 2."""
    row = restoration_row("back", "random", [3, 4])
    row |= {"measure": "s2t", "task": "facts", "better": "higher", "n_shared": 2, "value_a": 0.28, "value_b": 0.29}
    row |= {"difference": 0.01, "ci_low": -0.06, "ci_high": 0.08, "verdict": "no difference shown"}
    _, written = to_plain(restoration([row])).splitlines()
    assert re.split(r"  +", written.strip())[:7] == [
        "S2T, facts", "back", "random", "0, 1", "2", "28.0", "29.0",
    ]  # fmt: skip
    assert "+1.0 [−6.0 to +8.0]" in written
    assert not next(column for column in restoration([row]).columns if column.title == "Measure").numeric
