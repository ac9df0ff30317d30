"""What rank clustering is compared with: the same entries in other places.

    everywhere          all entries of the matrix shuffled
    within_rows         each row shuffled for itself: row sums stay, columns lose their meaning
    within_columns      each column shuffled for itself

Row and column sums of shuffled matrices are drawn without shuffling (`sums_of_shuffles`): a shuffle takes 5 to 14 ns an
entry, so only a few would be affordable, and a standard deviation from five of them would send 5 % of pure-noise z
scores beyond ±3. The largest entries, which decide where a heavy-tailed matrix is concentrated, are put in random
places one by one. The others reach a sum by hundreds: what they add to it is drawn from a gamma distribution (a normal
one where there is no skew) with the variance and the third moment that shuffling gives it. Small matrices have all
their entries placed. docs/analysis.md compares the draws with full shuffles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Values = NDArray[np.float64]

DEALS = 20  # draws of the sums that count as one shuffle
PLACED_SHARE = 256  # the largest 1/256 of the entries are placed one by one, and
PLACED_LEAST = 2048  # this many at least
CROWDED = 1 / 4  # above this share of a row (column), its placed entries must not meet in one place
NO_SKEW = 1e-2  # below this skewness a sum is drawn from a normal distribution


# ---------------------------------------------------------------------------------------------------------------------
# Whole matrices, for what depends on more than sums
# ---------------------------------------------------------------------------------------------------------------------
def shuffled(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    return shuffled_within_rows(matrix.reshape(1, -1), rng).reshape(matrix.shape)


def shuffled_within_rows(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    """Entries sorted by random keys, twice as fast as a Fisher-Yates shuffle where the processor sorts by vectors."""
    keyed = np.empty((*matrix.shape, 2), np.uint32)  # (entry, key); as one 64-bit number the key counts first
    entry, key = (0, 1) if np.little_endian else (1, 0)
    keyed[..., entry] = matrix.view(np.uint32)
    keyed[..., key] = rng.integers(1 << 32, size=matrix.shape, dtype=np.uint32)
    pairs = keyed.view(np.uint64)[..., 0]
    pairs.sort(axis=1)
    return np.ascontiguousarray(keyed[..., entry]).view(np.float32)


def shuffled_within_columns(matrix: Matrix, rng: np.random.Generator) -> Matrix:
    return shuffled_within_rows(np.ascontiguousarray(matrix.T), rng).T


SHUFFLES: dict[str, Callable[[Matrix, np.random.Generator], Matrix]] = {
    "everywhere": shuffled,
    "within_rows": shuffled_within_rows,
    "within_columns": shuffled_within_columns,
}


# ---------------------------------------------------------------------------------------------------------------------
# Their sums alone
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entries:
    """A non-negative matrix over its largest entry, in two parts: the entries to be placed, and sums of the others."""

    largest: float  # what everything else has been divided by
    shape: tuple[int, int]
    row: NDArray[np.intp]  # (placed,): where the placed entries stand
    column: NDArray[np.intp]
    value: Values  # (placed,)
    powers: tuple[tuple[Values, Values], ...]  # of the others: sums of x, x² and x³, of each row and of each column


def split_entries(matrix: Matrix) -> Entries:
    n_rows, n_columns = matrix.shape
    largest = float(matrix.max(initial=0.0)) or 1.0
    rest = (matrix / np.float32(largest)).reshape(-1)  # third powers of small scores would leave float32's range
    n_placed = min(rest.size, max(PLACED_LEAST, rest.size // PLACED_SHARE))
    if n_placed == rest.size:
        place = np.arange(rest.size)
    else:
        bound = np.partition(rest, rest.size - n_placed)[rest.size - n_placed]
        place = np.flatnonzero(rest > bound)  # of equal entries all may stay behind: as good as placed
    value = rest[place].astype(np.float64)
    rest[place] = 0
    power, powers = rest.reshape(matrix.shape), []
    for _ in range(3):
        sums = power @ np.ones(n_columns, np.float32), np.ones(n_rows, np.float32) @ power
        powers.append((sums[0].astype(np.float64), sums[1].astype(np.float64)))
        power = power * rest.reshape(matrix.shape)
    return Entries(largest, (n_rows, n_columns), place // n_columns, place % n_columns, value, tuple(powers))


def sums_of_shuffles(entries: Entries, null: str, n: int, rng: np.random.Generator) -> dict[str, Values]:
    """`n` draws of the sums that a null moves: "rows" (n, n_rows) and "columns" (n, n_columns), one or both."""
    n_rows, n_columns = entries.shape
    of_rows, of_columns = (tuple(power[axis] for power in entries.powers) for axis in (0, 1))
    everything = tuple(np.array([power.sum()]) for power in of_rows)
    nowhere = np.zeros(len(entries.value), np.intp)
    found: dict[str, Values] = {}
    if null == "everywhere":
        found["rows"] = _sums(entries, nowhere, everything, n_rows * n_columns, n_rows, n, rng)
        found["columns"] = _sums(entries, nowhere, everything, n_rows * n_columns, n_columns, n, rng)
    elif null == "within_rows":
        found["columns"] = _sums(entries, entries.row, of_rows, n_columns, n_columns, n, rng)
    else:
        found["rows"] = _sums(entries, entries.column, of_columns, n_rows, n_rows, n, rng)
    return found


def _sums(
    entries: Entries,
    group: NDArray[np.intp],
    powers: tuple[Values, ...],
    size: int,
    n_lines: int,
    n: int,
    rng: np.random.Generator,
) -> Values:
    """(n, n_lines): sums over the lines among which the entries of each group are dealt out anew.

    group: (placed,), the group of each placed entry; powers: sums of x, x² and x³ of a group's other entries; size:
    places of a group, a multiple of n_lines.

    An entry counts by its distance from the mean of its group's others, so that it does not matter how many others a
    line has. There is one place for each entry: dealt out so, they give a line a variance of
    p (1 − p) Σ (x − mean)² · size / (size − 1), p = 1 / n_lines. Where they could take a place twice, it would be
    p (1 − p) Σ distance², and `scale` makes up for that.
    """
    n_groups, share = len(powers[0]), 1 / n_lines
    n_placed = np.bincount(group, minlength=n_groups)
    total = powers[0] + np.bincount(group, entries.value, n_groups)
    middle = powers[0] / np.maximum(size - n_placed, 1)
    second = np.maximum(powers[1] - middle * powers[0], 0)
    third = powers[2] - 3 * middle * powers[1] + 2 * middle**2 * powers[0]
    distance = entries.value - middle[group]
    around_middle = second + np.bincount(group, distance**2, n_groups)
    around_mean = around_middle - size * (total / size - middle) ** 2
    ratio = np.divide(around_mean, around_middle, out=np.ones(n_groups), where=around_middle > 0)
    crowded = n_placed > size * CROWDED
    scale = np.sqrt(np.where(crowded, 1, np.maximum(ratio, 0) * size / max(size - 1, 1)))

    moved = distance * scale[group]
    line = rng.integers(n_lines, size=(n, len(moved)), dtype=np.int32)
    if crowded.any():
        inside = np.flatnonzero(crowded[group])
        line[:, inside] = _places(group[inside], size, n, rng) % n_lines
    line += np.arange(n, dtype=np.int32)[:, None] * n_lines
    placed = np.bincount(line.reshape(-1), np.tile(moved, n), n * n_lines).reshape(n, n_lines)
    variance = share * (1 - share) * float((scale**2 * second).sum())
    third_moment = share * (1 - share) * (1 - 2 * share) * float((scale**3 * third).sum())
    others = _noise(variance, third_moment, (n, n_lines), rng)
    others -= others.mean(axis=1, keepdims=True)  # what one line has more, the others have less
    others *= np.sqrt(n_lines / max(n_lines - 1, 1))
    sums: Values = share * total.sum() + (placed - share * moved.sum()) + others
    return np.maximum(sums, 0) * entries.largest


def _places(group: NDArray[np.intp], size: int, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """(n, entries): places in [0, size) at random, each entry of a group in another one."""
    _, group = np.unique(group, return_inverse=True)
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], np.arange(group.max() + 1))
    number = np.empty(len(group), np.intp)  # of an entry within its group
    number[order] = np.arange(len(group)) - first[group[order]]
    keys = rng.random((n, len(first), size), dtype=np.float32)
    found: NDArray[np.intp] = keys.argsort(axis=2)[:, group, number]
    return found


def _noise(variance: float, third: float, shape: tuple[int, int], rng: np.random.Generator) -> Values:
    """Centred draws with a variance and a third moment."""
    if variance <= 0:
        return np.zeros(shape)
    skewness = third / variance**1.5
    if abs(skewness) < NO_SKEW:
        return rng.normal(0, variance**0.5, shape)
    k = 4 / skewness**2
    noise: Values = (rng.standard_gamma(k, shape) - k) * (np.sign(skewness) * (variance / k) ** 0.5)
    return noise
