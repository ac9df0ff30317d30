"""Rank clustering: do a matrix's large entries lie on few rows and columns (the paper's Figures 1 and 4)?

Any non-negative matrix with a heavy tail looks concentrated, so every measure stands beside its nulls
(nulls.py): the same entries in random places; within their rows; within their columns. Measures, of the row
sums and of the column sums (n of them):

    top1_rows, top1_columns     share of the matrix's total held by the largest 1 % of rows (columns)
    top5_rows, top5_columns     the same for 5 %; the number of rows is rounded to the nearest, at least one
    gini_rows, gini_columns     Gini coefficient of the sums: 0 all equal, 1 − 1/n all on one row

and of the whole matrix

    effective_rank              (Σ σ²)² / Σ σ⁴ over the singular values σ: k for k equal ones. The participation
                                ratio of the spectrum's energy; needs one product of matrices, no decomposition.

Clustered entries raise the first six over their nulls and lower the effective rank under its own. Shuffling within
rows leaves the row sums alone, so row measures have no such null, and column measures none within columns: what
remains asks whether the columns are concentrated beyond what the rows' sums bring with them.

An all-zero matrix (an unchanged weight) has no shares: its rows hold nan, written as null.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from palimpsest.analysis.layers import in_layers
from palimpsest.analysis.nulls import DEALS, SHUFFLES, Entries, Matrix, Values, split_entries, sums_of_shuffles
from palimpsest.data.cores import one_core_each
from palimpsest.files import UserError
from palimpsest.records import ClusteringRecord, ClusteringSummaryRecord

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

AXES = ("rows", "columns")
EFFECTIVE_RANK = "effective_rank"
NO_DRAWS: Values = np.array([])
FEW_DRAWS = 30  # with fewer, z allows for the uncertain standard deviation
ROUNDING = 1e-5  # of 1 / effective rank: below that, differences are those of float32 products
# null → the fields of a record that hold its mean, its standard deviation and z
FIELDS = {
    "everywhere": ("null_mean", "null_std", "z"),
    "within_rows": ("within_rows_mean", "within_rows_std", "within_rows_z"),
    "within_columns": ("within_columns_mean", "within_columns_std", "within_columns_z"),
}


def concentration(sums: Values) -> dict[str, Values]:
    """`top1`, `top5` and `gini` of non-negative sums (..., n) -> (...); nan where they are all zero."""
    n = sums.shape[-1]
    ascending = np.sort(sums, axis=-1)
    total = ascending.sum(axis=-1)
    total = np.where(total > 0, total, np.nan)
    rank = np.arange(1, n + 1)
    return {
        "top1": ascending[..., -_top_count(n, 0.01) :].sum(axis=-1) / total,
        "top5": ascending[..., -_top_count(n, 0.05) :].sum(axis=-1) / total,
        "gini": (ascending @ (2.0 * rank - n - 1)) / (n * total),
    }


def _top_count(n: int, ratio: float) -> int:
    return max(1, int(n * ratio + 0.5))


def gram(matrix: Matrix) -> Matrix | None:
    """M Mᵀ or Mᵀ M, the smaller one, of the matrix over its largest entry; its eigenvalues are σ². None if all zero."""
    largest = float(np.abs(matrix).max(initial=0.0))
    if largest == 0:
        return None
    scaled = matrix / np.float32(largest)  # fourth powers of small scores would leave float32's range
    product: Matrix = scaled @ scaled.T if matrix.shape[0] <= matrix.shape[1] else scaled.T @ scaled
    return product


def effective_rank(matrix: Matrix) -> float:
    """(Σ σ²)² / Σ σ⁴ of the singular values of a matrix, from 1 to its rank; nan if it is all zero."""
    return rank_of_gram(gram(matrix))


def rank_of_gram(product: Matrix | None) -> float:
    """`effective_rank` of a matrix whose `gram` this is."""
    if product is None:
        return float("nan")
    return float(np.trace(product, dtype=np.float64)) ** 2 / float(np.square(product, dtype=np.float64).sum())


def inverse_rank_kept(matrix: Matrix, null: str) -> float:
    """What of 1 / effective_rank the shuffles of a null leave as it is; nan if the matrix is all zero.

    With m² as shares of the matrix's energy, 1 / effective_rank = Σ (shares of σ²)² is the sum of (share)² of the
    entries, of products within rows, within columns, and of the rest. Shuffling everywhere keeps the first, shuffling
    within rows the squared shares of whole rows, within columns those of whole columns.
    """
    largest = matrix.max(initial=np.float32(0))
    energy = np.square(matrix / largest) if largest > 0 else np.full_like(matrix, np.nan)
    total = float(energy.sum(dtype=np.float64))
    axis = {"everywhere": None, "within_rows": 1, "within_columns": 0}[null]
    shares = energy if axis is None else energy.sum(axis=axis, dtype=np.float64)
    return float(np.square(shares, out=shares).sum(dtype=np.float64)) / total**2


def rank_z(rank: float, draws: Values, kept: float) -> float:
    """z of an effective rank among draws of its null, taken of −ln(1 / rank − kept).

    Of heavy-tailed entries a few pairs of giants, in one row or column or not, decide the effective rank: its null
    is skewed, and z of the rank itself was below −3 for up to 8 % of noise. What is left after `kept` varies by
    factors, and its logarithm is close to normal. Negative where the rank is lower than the null's.
    """
    inverse = 1 / np.append(draws, rank)
    left = -np.log(np.maximum(inverse - kept, ROUNDING * inverse))
    return against(float(left[-1]), left[:-1])[2]


def measure_matrix(matrix: Matrix) -> dict[str, float]:
    """All measures of one non-negative matrix (rows, columns)."""
    values = axis_measures(*(matrix.sum(axis=dimension, dtype=np.float64) for dimension in (1, 0)))
    return {**values, EFFECTIVE_RANK: effective_rank(matrix)}


def axis_measures(rows: Values, columns: Values) -> dict[str, float]:
    """The measures of a matrix with these row sums and column sums."""
    return {
        f"{measure}_{axis}": float(value)
        for axis, sums in zip(AXES, (rows, columns), strict=True)
        for measure, value in concentration(sums).items()
    }


def null_draws(
    matrix: Matrix,
    null: str,
    n_shuffles: int,
    rng: np.random.Generator,
    *,
    rank_draws: int = 0,
    entries: Entries | None = None,
) -> dict[str, Values]:
    """The measures with the entries moved as `null` says.

    (n_shuffles · DEALS,) draws each of those that the null can move; (rank_draws,) of the effective rank, if any.
    entries: what `split_entries` gives of the matrix, if it is there already.
    """
    entries = split_entries(matrix) if entries is None else entries
    draws = {
        f"{measure}_{axis}": values
        for axis, sums in sums_of_shuffles(entries, null, n_shuffles * DEALS, rng).items()
        for measure, values in concentration(sums).items()
    }
    if rank_draws:
        draws[EFFECTIVE_RANK] = np.array([effective_rank(SHUFFLES[null](matrix, rng)) for _ in range(rank_draws)])
    return draws


def cluster_records(
    model: str,
    of: str,
    tensors: Mapping[str, Float[Tensor, "*shape"]],
    *,
    layers: Collection[int] | None = None,
    n_shuffles: int = 5,
    rank_draws: int = 0,
    seed: int = 0,
) -> list[ClusteringRecord]:
    """Seven rows per weight matrix of the layers, one matrix of each thread in memory at a time.

    of: what the entries are, "importance", "mask" (0 and 1) or "delta" (|ΔW|, see `delta.AbsoluteChange`).
    layers: only these; the numbers of a matrix do not depend on which others are measured.
    rank_draws: shuffles for the nulls of the effective rank, each a product of matrices for each null; with less
        than 3 it has no null (null_mean and so on are nan).

    Only two-dimensional weights of the layers are measured; norms and stacked experts are left out. Rows and
    columns are as stored: outputs and inputs in most models, inputs and outputs in GPT-2.
    `z` = (value − null_mean) / null_std; nan if the null does not vary, as for a matrix of equal entries. From fewer
    than `FEW_DRAWS` draws, it is the normal quantile as far out as Student's t puts the value. That of the effective
    rank is taken on a scale on which its null is nearly normal (`rank_z`).
    `null_*` and `z`: entries shuffled; `within_rows_*`, `within_columns_*`: shuffled there only, None where that
    moves nothing.

    Raises UserError if entries are negative or not finite, or if n_shuffles < 1.
    """
    if n_shuffles < 1:
        raise UserError(f"Clustering needs at least 1 shuffle to compare with, not {n_shuffles}; raise n_shuffles.")

    def of_matrix(place: Mapping[str, Any]) -> list[ClusteringRecord]:
        name = place["name"]
        matrix = np.ascontiguousarray(tensors[name].numpy(), dtype=np.float32)
        if matrix.ndim != 2:
            return []
        if not (np.isfinite(matrix).all() and matrix.min() >= 0):
            raise UserError(f"{name} ({of} of {model}) holds negative or non-finite entries; pass absolute values.")
        # Seeded by name, so that a subset of layers gives the same numbers, and so do threads.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        varies = bool(matrix.min() < matrix.max())  # of equal entries, rounding is all that varies
        entries, n_ranks = split_entries(matrix), rank_draws if rank_draws > 2 else 0
        draws = {
            null: null_draws(matrix, null, n_shuffles, rng, rank_draws=n_ranks, entries=entries) for null in SHUFFLES
        }
        records: list[ClusteringRecord] = []
        for measure, value in measure_matrix(matrix).items():
            record: Any = {"model": model, "of": of, **place, "measure": measure, "value": value}
            for null, fields in FIELDS.items():
                moves_nothing = measure.endswith(null.removeprefix("within"))  # top1_rows within_rows
                found_draws = draws[null].get(measure, NO_DRAWS)
                mean, std, z = against(value, found_draws)
                if measure == EFFECTIVE_RANK and len(found_draws):
                    z = rank_z(value, found_draws, inverse_rank_kept(matrix, null))
                found = (None, None, None) if moves_nothing else (mean, std, z if varies else float("nan"))
                record |= dict(zip(fields, found, strict=True))
            records.append(record)
        return records

    places = [place for place in in_layers(tensors) if layers is None or place["layer"] in layers]
    return [record for records in one_core_each(of_matrix, places) for record in records]


def against(value: float, draws: Values) -> tuple[float, float, float]:
    """(mean, standard deviation, z) of a value against draws of its null."""
    if len(draws) < 2:
        return float("nan"), float("nan"), float("nan")
    mean, std = float(draws.mean()), float(draws.std(ddof=1))
    if not std > 0:
        return mean, std, float("nan")
    if len(draws) >= FEW_DRAWS:
        return mean, std, (value - mean) / std
    t = (value - mean) / (std * (1 + 1 / len(draws)) ** 0.5)  # of one more draw
    return mean, std, float(np.sign(t) * stats.norm.isf(stats.t.sf(abs(t), len(draws) - 1)))


# ------------------------------------------------------------------------------------------------------------
# Over all matrices of a model
# ------------------------------------------------------------------------------------------------------------
def log_ratios(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """ln(value / null_mean) by (model, of, measure) and matrix name; nan where undefined.

    Takes rows read back from JSON too, where nan has become null.
    """
    table: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        value, null = row["value"], row["null_mean"]
        defined = value is not None and null is not None and value > 0 and null > 0
        ratio = float(np.log(value / null)) if defined else float("nan")
        table[row["model"], row["of"], row["measure"]][row["name"]] = ratio
    return dict(table)


def summary_records(
    rows: Iterable[ClusteringRecord], *, n_draws: int = 2000, seed: int = 0
) -> list[ClusteringSummaryRecord]:
    """The typical ratio value / null_mean (geometric mean over matrices) per model, `of`, measure and module kind.

    One row for each kind and one for "all"; 95 % percentile bootstrap interval over matrices, which says how much
    the number depends on which matrices are looked at. Matrices of one model are not independent of each other, and
    the interval knows nothing of other data or training seeds.
    """
    by_kind: dict[str, list[ClusteringRecord]] = defaultdict(list)
    for row in rows:
        by_kind["all"].append(row)
        by_kind[row["kind"]].append(row)
    records: list[ClusteringSummaryRecord] = []
    for kind, members in by_kind.items():
        for (model, of, measure), by_name in log_ratios(members).items():
            ratios = np.array(list(by_name.values()))
            defined = ratios[np.isfinite(ratios)]
            mean, low, high = (float(np.exp(x)) for x in bootstrap_mean(defined, n_draws=n_draws, seed=seed))
            records.append(
                {
                    "model": model,
                    "of": of,
                    "kind": kind,
                    "measure": measure,
                    "n_matrices": len(defined),
                    "n_undefined": len(ratios) - len(defined),
                    "ratio": mean,
                    "ci_low": low,
                    "ci_high": high,
                }
            )
    return records


def bootstrap_mean(values: Values, *, n_draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile bootstrap interval; nan bounds below two values, all nan without any."""
    if len(values) < 2:
        mean = float(values[0]) if len(values) else float("nan")
        return mean, float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(n_draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
