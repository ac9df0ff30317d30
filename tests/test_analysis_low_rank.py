"""The change cut to a rank: hand-computed spectra, and clustering that the rank does not explain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from palimpsest.analysis.delta import delta_records
from palimpsest.analysis.low_rank import OVERSAMPLING, POWERS, leading, low_rank_records

Q0 = "model.layers.0.self_attn.q_proj.weight"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(change: Tensor, rank: int = 4, **options: Any) -> dict[str, Any]:
    return {row["measure"]: row for row in low_rank_records("lora", {Q0: change}, rank, **options)}


def test_leading_values_are_those_of_the_full_decomposition() -> None:
    matrix = normal(60, 40) @ torch.diag(torch.linspace(3, 0.1, 40))
    u, values, v = leading(matrix, 5)
    full_u, full, full_v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, full[:5], rtol=1e-3, atol=0)
    best = full_u[:, :5] * full[:5] @ full_v[:5]
    torch.testing.assert_close((u * values) @ v.T, best, rtol=0, atol=0.02 * float(best.abs().max()))
    assert len(leading(normal(3, 7), 5)[1]) == 3


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (3, 7), (30, 30)])
def test_it_is_torchs_decomposition_to_the_bit(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = torch.svd_lowrank(matrix, q=min(4 + OVERSAMPLING, *shape), niter=POWERS)
    rank = min(4, *shape)
    u, values, v = leading(matrix, 4, seed=5)
    assert torch.equal(u, expected[0][:, :rank])
    assert torch.equal(values, expected[1][:rank])
    assert torch.equal(v, expected[2][:, :rank])


def test_it_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    leading(normal(20, 10), 3)
    assert torch.equal(torch.rand(3), expected)


def test_energy_and_effective_rank_of_a_change() -> None:
    base, change = normal(50, 40), torch.zeros(50, 40)
    change[0, 0], change[1, 1] = 2.0, 1.0
    (row,) = delta_records({Q0: base}, {Q0: base + change}, {Q0: base.abs()}, method="lora")
    assert row["effective_rank"] == pytest.approx(25 / 17, rel=1e-4)
    assert row["energy_top1"] == pytest.approx(0.8, abs=1e-4)
    assert row["energy_top8"] == pytest.approx(1.0, abs=1e-4)
    (same,) = delta_records({Q0: base}, {Q0: base}, {Q0: base.abs()}, method="lora")
    assert np.isnan([same["effective_rank"], same["energy_top1"]]).all()


def test_a_random_update_of_low_rank_is_not_clustered_beyond_its_rank() -> None:
    z = [
        row["z"]
        for seed in range(25)
        for row in measured(normal(120, 4, seed=seed) @ normal(4, 90, seed=100 + seed), n_draws=20).values()
    ]
    assert abs(np.mean(z)) < 0.8  # the factors of a Gaussian update are not exactly orthonormal
    assert np.mean(np.abs(z) > 3) < 0.1


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_planted_lines_are_found_at_any_rank(axis: str) -> None:
    left, right = normal(120, 4), normal(4, 90, seed=1)
    if axis == "rows":
        left[:5] *= 8
    else:
        right[:, :5] *= 8
    full_rank = 0.01 * normal(120, 90, seed=2)
    for change in (left @ right, left @ right + full_rank):
        rows = measured(change)
        assert rows[f"top5_{axis}"]["z"] > 4
        assert {row["of"] for row in rows.values()} == {"delta_rank4"}
        assert all(row["within_rows_z"] is None for row in rows.values())


def test_numbers_repeat_and_an_unchanged_matrix_has_none() -> None:
    change = normal(30, 20)
    assert measured(change, seed=3) == measured(change, seed=3)
    assert np.isnan([row["value"] for row in measured(torch.zeros(30, 20)).values()]).all()
    assert not low_rank_records("full", {"model.norm.weight": torch.ones(4)}, 2)
