"""Row and column concentration: hand-computed values, planted structure found, noise not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.analysis.clustering import (
    DEALS,
    cluster_records,
    concentration,
    log_ratios,
    null_draws,
    summary,
)
from palimpsest.rundir import UserError

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
MEASURES = {f"{measure}_{axis}" for measure in ("top1", "top5", "gini") for axis in ("rows", "columns")}


def noise(seed: int, shape: tuple[int, int] = (200, 150)) -> torch.Tensor:
    """Squared normal entries: as heavy-tailed as importance scores of an unstructured matrix."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 2


def measured(matrix: torch.Tensor, **options: Any) -> dict[str, Any]:
    rows = cluster_records("base", "importance", {Q0: matrix}, **options)
    return {row["measure"]: row for row in rows}


def test_concentration_by_hand() -> None:
    # Sums 1, 2, 3, 4: mean absolute difference of all 16 pairs is 20/16; over twice the mean, 5: 0.25.
    values = concentration(np.array([3.0, 1.0, 4.0, 2.0]))
    assert values["gini"] == pytest.approx(0.25)
    assert values["top1"] == values["top5"] == pytest.approx(0.4)  # at least one of the four
    everything_on_one = concentration(np.array([0.0, 0.0, 7.0, 0.0]))
    assert everything_on_one["gini"] == pytest.approx(0.75)  # 1 − 1/n
    assert concentration(np.full(50, 0.3))["gini"] == pytest.approx(0.0, abs=1e-12)
    hundred = concentration(np.arange(1.0, 101.0))
    assert hundred["top1"] == pytest.approx(100 / 5050)
    assert hundred["top5"] == pytest.approx((100 + 99 + 98 + 97 + 96) / 5050)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=30))
def test_gini_is_the_mean_absolute_difference(sums: list[float]) -> None:
    x = np.array(sums)
    expected = np.abs(x[:, None] - x[None, :]).mean() / (2 * x.mean())
    assert concentration(x)["gini"] == pytest.approx(expected, abs=1e-9)


def test_rows_and_columns_are_told_apart() -> None:
    matrix = torch.ones(100, 60)
    matrix[[3, 50]] = 40.0  # 2 of 100 rows
    rows = measured(matrix)
    total = 98 * 60 + 2 * 40 * 60
    assert rows["top1_rows"]["value"] == pytest.approx(40 * 60 / total)
    assert rows["top5_rows"]["value"] == pytest.approx((2 * 40 + 3) * 60 / total)
    assert rows["top1_columns"]["value"] == pytest.approx(1 / 60)
    assert rows["gini_columns"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert min(rows[f"{name}_rows"]["z"] for name in ("top1", "top5", "gini")) > 15
    # All columns are equal, which is far less spread than shuffled entries have.
    assert rows["gini_columns"]["z"] < -3


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_planted_lines_in_heavy_noise_are_found(axis: str) -> None:
    matrix = noise(0)
    lines = matrix if axis == "rows" else matrix.T
    lines[:4] *= 3  # 4 lines of 200 (150), three times the rest
    rows = measured(matrix)
    other = "columns" if axis == "rows" else "rows"
    assert rows[f"top5_{axis}"]["z"] > 10
    assert abs(rows[f"top5_{other}"]["z"]) < 4


def test_noise_is_not_clustered() -> None:
    """z of 40 noise matrices: centred, of unit size, within ±3 but for the 1 % that skewed nulls allow."""
    z = np.array([[row["z"] for row in measured(noise(seed), n_shuffles=3).values()] for seed in range(40)])
    assert abs(z.mean()) < 0.3
    assert 0.8 < z.std() < 1.25
    assert (abs(z) > 3).mean() <= 0.015
    assert abs(z).max() < 4.5


def test_deals_are_draws_of_the_full_shuffle() -> None:
    """The cheap null has the mean and the standard deviation of a full shuffle per draw."""
    matrix = noise(1, (96, 80)).numpy()
    rng = np.random.default_rng(0)
    entries = matrix.flatten()
    full: dict[str, list[float]] = {name: [] for name in MEASURES}
    for _ in range(800):
        rng.shuffle(entries)
        for axis, dimension in (("rows", 1), ("columns", 0)):
            for name, value in concentration(entries.reshape(96, 80).sum(axis=dimension, dtype=np.float64)).items():
                full[f"{name}_{axis}"].append(float(value))
    dealt = null_draws(matrix, 40, np.random.default_rng(1))
    for name, values in full.items():
        assert abs(dealt[name].mean() - np.mean(values)) < 0.25 * np.std(values), name
        assert dealt[name].std() / np.std(values) == pytest.approx(1.0, abs=0.2), name
        within = dealt[name].reshape(40, DEALS).std(axis=1, ddof=1).mean()  # the deals of one shuffle differ, too
        assert within / np.std(values) == pytest.approx(1.0, abs=0.2), name


def test_a_deal_keeps_every_entry() -> None:
    """Gini and shares do not show a lost entry, so look at one that must stay: a single non-zero one."""
    matrix = np.zeros((7, 37), dtype=np.float32)
    matrix[2, 5] = 4.0
    draws = null_draws(matrix, 2, np.random.default_rng(0))
    assert draws["top1_rows"] == pytest.approx(1.0)
    assert draws["gini_columns"] == pytest.approx(1 - 1 / 37)


def test_numbers_depend_on_seed_and_name_only() -> None:
    tensors = {Q0: noise(0, (40, 30)), Q1: noise(1, (40, 30))}
    both = cluster_records("base", "importance", tensors, seed=5)
    assert cluster_records("base", "importance", tensors, layers={1}, seed=5) == both[6:]
    assert cluster_records("base", "importance", tensors, seed=6) != both
    assert {(row["name"], row["layer"], row["kind"]) for row in both} == {(Q0, 0, "q"), (Q1, 1, "q")}
    assert {row["measure"] for row in both} == MEASURES


def test_what_has_no_rows_and_columns_is_left_out() -> None:
    tensors = {
        "model.embed_tokens.weight": noise(0, (8, 4)),
        "model.layers.0.input_layernorm.weight": torch.ones(4),
        Q0: noise(0, (8, 4)),
    }
    assert {row["name"] for row in cluster_records("base", "importance", tensors)} == {Q0}


def test_unchanged_and_constant_matrices_have_no_z() -> None:
    zero = measured(torch.zeros(20, 10))
    assert all(math.isnan(row[field]) for row in zero.values() for field in ("value", "null_mean", "z"))
    constant = measured(torch.full((20, 10), 0.3))
    assert constant["top5_rows"]["value"] == pytest.approx(0.05)
    assert all(math.isnan(row["z"]) for row in constant.values())
    assert all(math.isnan(row["z"]) for name, row in measured(noise(0, (1, 50))).items() if "rows" in name)


def test_bad_entries_are_refused() -> None:
    with pytest.raises(UserError, match="q_proj"):
        measured(torch.tensor([[1.0, -1.0]]))
    with pytest.raises(UserError, match="non-finite"):
        measured(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(UserError, match="at least 1 shuffle"):
        measured(torch.ones(2, 2), n_shuffles=0)


def row(name: str, value: float | None, null: float | None, model: str = "base") -> dict[str, Any]:
    return {
        "model": model,
        "of": "delta",
        "measure": "top5_rows",
        "name": name,
        "value": value,
        "null_mean": null,
    }


def test_summary_by_hand() -> None:
    rows = [
        row("a", 0.2, 0.1),
        row("b", 0.8, 0.1),
        row("c", None, None),
        row("d", float("nan"), float("nan")),
    ]
    (one,) = summary(rows)
    assert (one.n_matrices, one.n_undefined) == (2, 2)
    assert one.mean_log_ratio == pytest.approx(math.log(4))  # geometric mean of 2 and 8
    assert (one.ci_low, one.ci_high) == pytest.approx((math.log(2), math.log(8)))
    assert log_ratios(rows)["base", "delta", "top5_rows"]["a"] == pytest.approx(math.log(2))


def test_summary_keeps_models_apart_and_repeats() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(str(i), float(np.exp(rng.normal(shift, 0.2))), 1.0, model)
        for model, shift in (("full", 0.0), ("lora", 0.5))
        for i in range(60)
    ]
    full, lora = summary(rows)
    assert full.ci_low < 0 < full.ci_high < lora.ci_low < 0.5 < lora.ci_high
    assert summary(rows) == [full, lora]
    assert math.isnan(summary(rows[:1])[0].ci_low)
