"""Down-sampled maps of matrices for figures, and the file they are kept in.

The file (`.npz`) holds one float32 array of at most (max_rows, max_cols) per matrix, its key being the
parameter's name. Readers need numpy alone: `np.load(path)[name]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palimpsest.files import replacing

Map = NDArray[np.float32]


def block_map(
    matrix: ArrayLike,
    max_rows: int = 128,
    max_cols: int = 128,
    reduce: Literal["max", "mean"] = "max",
) -> Map:
    """Shrink a matrix (rows, columns) to at most (max_rows, max_cols), block by block.

    `max`, the default, keeps a single strong row or column visible as a full line, where `mean` would dilute
    it by the height of the block; in exchange it makes noise look denser than it is. Blocks differ by at most
    one row or column in size. A matrix that is small enough comes back as it is. A torch tensor on the CPU is
    accepted.

    Raises ValueError if `matrix` is not two-dimensional or is empty.
    """
    values = np.asarray(matrix, dtype=np.float32)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"block_map needs a non-empty matrix, not an array of shape {values.shape}")
    starts = [_block_starts(size, most) for size, most in zip(values.shape, (max_rows, max_cols), strict=True)]
    combine: Any = np.maximum if reduce == "max" else np.add
    if reduce == "mean":
        values = values.astype(np.float64)
    blocks = combine.reduceat(combine.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    if reduce == "mean":
        heights, widths = (np.diff(start, append=size) for start, size in zip(starts, values.shape, strict=True))
        blocks = blocks / np.outer(heights, widths)
    return np.ascontiguousarray(blocks, dtype=np.float32)


def _block_starts(size: int, most: int) -> NDArray[np.int64]:
    n_blocks = min(size, most)
    return np.arange(n_blocks, dtype=np.int64) * size // n_blocks


def write_maps(path: Path, maps: Mapping[str, Map]) -> None:
    """Write all maps to one compressed file, under a temporary name first."""
    arrays: dict[str, Any] = {name: np.asarray(values, dtype=np.float32) for name, values in maps.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
