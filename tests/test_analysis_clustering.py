"""Row and column concentration: hand-computed values, planted structure found, noise not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.analysis import nulls
from palimpsest.analysis.clustering import (
    cluster_records,
    concentration,
    effective_rank,
    log_ratios,
    null_draws,
    summary_records,
)
from palimpsest.analysis.nulls import DEALS, shuffled_within_columns, shuffled_within_rows
from palimpsest.files import UserError

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
SUMS = {f"{measure}_{axis}" for measure in ("top1", "top5", "gini") for axis in ("rows", "columns")}
MEASURES = SUMS | {"effective_rank"}


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


@settings(deadline=None)  # of a test on a busy machine, time says nothing
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
    rows = [row for seed in range(40) for row in measured(noise(seed), n_shuffles=3, rank_draws=5).values()]
    for field in ("z", "within_rows_z", "within_columns_z"):
        z = np.array([row[field] for row in rows if row[field] is not None])
        assert len(z) == 40 * (7 if field == "z" else 4)
        assert np.isfinite(z).all()
        assert abs(z.mean()) < 0.3, field
        assert 0.8 < z.std() < 1.25, field
        assert (abs(z) > 3).mean() <= 0.015, field
        assert abs(z).max() < 4.5, field


def test_deals_are_draws_of_the_full_shuffle() -> None:
    """The cheap null has the mean and the standard deviation of a full shuffle per draw."""
    matrix = noise(1, (96, 80)).numpy()
    rng = np.random.default_rng(0)
    entries = matrix.flatten()
    full: dict[str, list[float]] = {name: [] for name in SUMS}
    for _ in range(800):
        rng.shuffle(entries)
        for axis, dimension in (("rows", 1), ("columns", 0)):
            for name, value in concentration(entries.reshape(96, 80).sum(axis=dimension, dtype=np.float64)).items():
                full[f"{name}_{axis}"].append(float(value))
    dealt = null_draws(matrix, "everywhere", 40, np.random.default_rng(1))
    for name, values in full.items():
        assert abs(dealt[name].mean() - np.mean(values)) < 0.25 * np.std(values), name
        assert dealt[name].std() / np.std(values) == pytest.approx(1.0, abs=0.2), name
        within = dealt[name].reshape(40, DEALS).std(axis=1, ddof=1).mean()  # the deals of one shuffle differ, too
        assert within / np.std(values) == pytest.approx(1.0, abs=0.2), name


@pytest.mark.parametrize("null", ["everywhere", "within_rows", "within_columns"])
def test_sums_have_the_moments_that_shuffling_gives(null: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of n places drawn from N without putting back: mean n μ, variance n σ² (N − n) / (N − 1)."""
    monkeypatch.setattr(nulls, "PLACED_LEAST", 40)
    rng = np.random.default_rng(3)
    matrix = np.exp(rng.standard_normal((40, 60)) + np.linspace(0, 2, 60)).astype(np.float32)
    drawn = nulls.sums_of_shuffles(nulls.split_entries(matrix), null, 20_000, np.random.default_rng(0))
    assert set(drawn) == {"everywhere": {"rows", "columns"}, "within_rows": {"columns"}}.get(null, {"rows"})
    for axis, sums in drawn.items():
        lines = matrix if axis == "rows" else matrix.T
        n_lines = len(lines)
        # The groups within which entries move: all of them, or each line of the other axis.
        groups = lines.reshape(1, -1) if null == "everywhere" else lines.T
        n = groups.shape[1] / n_lines  # places of a line in each group
        size = groups.shape[1]
        variance = float((groups.var(axis=1, dtype=np.float64) * n * (size - n) / (size - 1)).sum())
        assert sums.shape == (20_000, n_lines)
        assert sums.sum(axis=1) == pytest.approx(float(matrix.sum(dtype=np.float64)), rel=1e-5)
        assert sums.mean() == pytest.approx(float(matrix.sum(dtype=np.float64)) / n_lines, rel=1e-5)
        assert sums.var(axis=0).mean() == pytest.approx(variance, rel=0.02)


def test_entries_of_a_column_never_meet_in_one_row() -> None:
    """A column of ones and twos has one of them for every row, however its entries are shuffled."""
    matrix = np.full((300, 200), 1e-6, dtype=np.float32)
    matrix[:, 7] = 1
    matrix[::3, 7] = 2
    sums = nulls.sums_of_shuffles(nulls.split_entries(matrix), "within_columns", 40, np.random.default_rng(0))["rows"]
    twos = np.abs(sums - 2) < 1e-3
    assert (twos | (np.abs(sums - 1) < 1e-3)).all()
    assert (twos.sum(axis=1) == 100).all()
    assert len({tuple(row) for row in twos}) == 40


def test_a_deal_keeps_every_entry() -> None:
    """Gini and shares do not show a lost entry, so look at one that must stay: a single non-zero one."""
    matrix = np.zeros((7, 37), dtype=np.float32)
    matrix[2, 5] = 4.0
    draws = null_draws(matrix, "everywhere", 2, np.random.default_rng(0))
    assert draws["top1_rows"] == pytest.approx(1.0)
    assert draws["gini_columns"] == pytest.approx(1 - 1 / 37)


def test_numbers_depend_on_seed_and_name_only() -> None:
    tensors = {Q0: noise(0, (40, 30)), Q1: noise(1, (40, 30))}
    both = cluster_records("base", "importance", tensors, rank_draws=3, seed=5)
    assert cluster_records("base", "importance", tensors, layers={1}, rank_draws=3, seed=5) == both[7:]
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


# ------------------------------------------------------------------------------------------------------------
# Effective rank, and the nulls that keep one side's sums
# ------------------------------------------------------------------------------------------------------------
def test_effective_rank_by_hand() -> None:
    assert effective_rank(np.eye(6, 9, dtype=np.float32)) == pytest.approx(6)
    assert effective_rank(np.outer([1.0, 2.0, 3.0], [4.0, 5.0]).astype(np.float32)) == pytest.approx(1)
    assert effective_rank(np.diag([2.0, 1.0]).astype(np.float32)) == pytest.approx(25 / 17)  # (4 + 1)² / (16 + 1)
    assert effective_rank(np.diag([2.0, 1.0]).astype(np.float32) * np.float32(1e-18)) == pytest.approx(25 / 17)
    assert math.isnan(effective_rank(np.zeros((3, 2), dtype=np.float32)))


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_effective_rank_is_that_of_the_singular_values(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    energy = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    assert effective_rank(matrix) == pytest.approx(energy.sum() ** 2 / (energy**2).sum(), rel=1e-4)


def test_clustering_lowers_the_effective_rank() -> None:
    matrix = noise(3)
    matrix[:6] *= 20
    row = measured(matrix, rank_draws=6)["effective_rank"]
    assert row["value"] < 0.9 * row["null_mean"]
    assert row["z"] < -3
    assert measured(matrix)["effective_rank"]["value"] == row["value"]
    assert math.isnan(measured(matrix, rank_draws=2)["effective_rank"]["z"])  # two draws have no spread worth a name


def test_shuffling_within_one_side_keeps_its_entries() -> None:
    matrix = noise(4, (9, 7)).numpy()
    rng = np.random.default_rng(0)
    for shuffle, axis in ((shuffled_within_rows, 1), (shuffled_within_columns, 0)):
        moved = shuffle(matrix, rng)
        assert not np.array_equal(moved, matrix)
        assert np.array_equal(np.sort(moved, axis=axis), np.sort(matrix, axis=axis))


def test_what_rows_explain_is_no_clustering_of_columns() -> None:
    """Equal columns on unequal rows: against entries anywhere the columns are too even, within rows they are not."""
    rows = torch.linspace(0.1, 3, 200)[:, None]
    noisy = rows * noise(5)
    columns = measured(noisy)["gini_columns"]
    assert columns["within_columns_z"] is None  # column sums stay when columns are shuffled
    assert abs(columns["within_rows_z"]) < 4
    planted = noisy.clone()
    planted[:, :4] *= 4
    assert measured(planted)["top5_columns"]["within_rows_z"] > 10
    assert measured(planted)["top5_rows"]["within_rows_z"] is None
    assert measured(planted)["top5_rows"]["within_columns_z"] > 10


def row(name: str, value: float | None, null: float | None, model: str = "base") -> dict[str, Any]:
    return {
        "model": model,
        "of": "delta",
        "measure": "top5_rows",
        "name": name,
        "kind": "q" if name in "ab" else "up",
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
    by_kind = {record["kind"]: record for record in summary_records(rows)}
    assert list(by_kind) == ["all", "q", "up"]
    one = by_kind["all"]
    assert (one["n_matrices"], one["n_undefined"]) == (2, 2)
    assert one["ratio"] == pytest.approx(4)  # geometric mean of 2 and 8
    assert (one["ci_low"], one["ci_high"]) == pytest.approx((2, 8))
    assert by_kind["q"]["ratio"] == pytest.approx(4)
    assert math.isnan(by_kind["up"]["ratio"])
    assert log_ratios(rows)["base", "delta", "top5_rows"]["a"] == pytest.approx(math.log(2))


def test_summary_keeps_models_apart_and_repeats() -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(str(i), float(np.exp(rng.normal(shift, 0.2))), 1.0, model)
        for model, shift in (("full", 0.0), ("lora", 0.5))
        for i in range(60)
    ]
    full, lora = [record for record in summary_records(rows) if record["kind"] == "all"]
    assert full["ci_low"] < 1 < full["ci_high"] < lora["ci_low"] < math.exp(0.5) < lora["ci_high"]
    assert summary_records(rows) == summary_records(rows)
    assert math.isnan(summary_records(rows[:1])[0]["ci_low"])
