"""Down-sampled maps: values by hand, lines that stay visible, the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.analysis.maps import block_map, write_maps

FOUR = np.arange(16, dtype=np.float32).reshape(4, 4)


def test_blocks_by_hand() -> None:
    assert block_map(FOUR, 2, 2).tolist() == [[5, 7], [13, 15]]
    assert block_map(FOUR, 2, 2, reduce="mean").tolist() == [[2.5, 4.5], [10.5, 12.5]]
    # Five rows in two blocks: rows 0–1 and rows 2–4; the mean is over each block's own size.
    column = np.array([[1.0], [2.0], [3.0], [4.0], [8.0]])
    assert block_map(column, 2, 2).tolist() == [[2.0], [8.0]]
    assert block_map(column, 2, 2, reduce="mean").tolist() == [[1.5], [5.0]]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_shape_and_extremes(rows: int, columns: int, max_rows: int, max_cols: int) -> None:
    matrix = np.random.default_rng(rows * 41 + columns).random((rows, columns), dtype=np.float32)
    small = block_map(matrix, max_rows, max_cols)
    assert small.shape == (min(rows, max_rows), min(columns, max_cols))
    assert small.max() == matrix.max()
    assert small.min() >= matrix.min()
    if rows <= max_rows and columns <= max_cols:
        assert np.array_equal(small, matrix)


def test_one_strong_row_stays_a_full_line() -> None:
    matrix = torch.rand(1536, 576, generator=torch.Generator().manual_seed(0))
    matrix[700] += 5
    small = block_map(matrix)
    assert small.shape == (128, 128)
    assert small.dtype == np.float32
    assert np.flatnonzero(small.min(axis=1) > 5).tolist() == [700 * 128 // 1536]


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2), (0, 4)])
def test_only_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="non-empty matrix"):
        block_map(np.ones(shape))


def test_file_round_trip(tmp_path: Path) -> None:
    maps = {
        "model.layers.0.mlp.up_proj.weight": block_map(FOUR, 2, 2),
        "model.layers.1.mlp.up_proj.weight": FOUR,
    }
    write_maps(tmp_path / "maps" / "base.npz", maps)
    with np.load(tmp_path / "maps" / "base.npz") as plain:  # the documented way, without this package
        back = dict(plain)
    assert list(back) == list(maps)
    assert all(np.array_equal(back[name], maps[name]) and back[name].dtype == np.float32 for name in maps)
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["base.npz"]
