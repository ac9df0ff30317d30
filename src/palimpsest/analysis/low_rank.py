"""Clustering of a weight change, with its low rank accounted for.

A LoRA update has rank r by construction. The absolute values of *any* matrix of low rank vary less freely over
rows and columns than those of a full one, so its clustering cannot be compared with that of full-rank changes
as they are. Here every method's change is cut to its best approximation of rank r, the largest r singular
values with their vectors, and set against matrices with these singular values and random singular vectors: what
is left is concentration that the rank does not explain.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from palimpsest.analysis.clustering import FIELDS, against, axis_measures
from palimpsest.analysis.layers import in_layers
from palimpsest.data.cores import one_core_each
from palimpsest.records import ClusteringRecord

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

OVERSAMPLING = 16  # more directions than asked for, and POWERS iterations: errors far below 1e-3 of the energy
POWERS = 4


def leading(
    matrix: Float[Tensor, "rows columns"], rank: int, seed: int = 0
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, " rank"], Float[Tensor, "columns rank"]]:
    """The `rank` largest singular values with their vectors, by randomised subspace iteration (Halko et al., 2011).

    Fewer where the matrix has fewer rows or columns.
    """
    # As torch.svd_lowrank, which draws from torch's one global generator: threads would have to wait for each other.
    rank, is_tall = min(rank, *matrix.shape), matrix.shape[0] >= matrix.shape[1]
    tall = matrix if is_tall else matrix.mT
    n_directions = min(rank + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(tall @ torch.randn(tall.shape[1], n_directions, generator=generator))[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(tall.mT @ basis)[0]
        basis = torch.linalg.qr(tall @ basis)[0]
    inner, values, vh = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u, v = (basis @ inner, vh.mT) if is_tall else (vh.mT, basis @ inner)
    return u[:, :rank], values[:rank], v[:, :rank]


def low_rank_records(
    model: str,
    change: Mapping[str, Float[Tensor, "*shape"]],
    rank: int,
    *,
    n_draws: int = 10,
    seed: int = 0,
) -> list[ClusteringRecord]:
    """Row and column concentration of |ΔW cut to `rank`|, one matrix in memory at a time.

    change: ΔW with its signs, see `delta.Change`. Records are those of `clustering.cluster_records` with of =
    "delta_rank<rank>"; their null has random singular vectors (of the same number and singular values); unchanged
    matrices hold nan.
    """

    def of_matrix(place: Mapping[str, Any]) -> list[ClusteringRecord]:
        matrix = change[place["name"]]
        if matrix.ndim != 2:
            return []
        changed = bool(matrix.any())
        u, values, v = leading(matrix, rank, seed)
        generator = torch.Generator().manual_seed(zlib.crc32(place["name"].encode()) ^ seed)
        draws: dict[str, list[float]] = defaultdict(list)
        for _ in range(n_draws if changed else 0):
            random_u, random_v = (_orthonormal(len(side), len(values), generator) for side in (u, v))
            absolute = ((random_u * values) @ random_v.T).abs_()
            # Float32 sums, by products: of draws, the eighth digit does not matter.
            sums = absolute @ absolute.new_ones(len(v)), absolute.new_ones(len(u)) @ absolute
            for measure, value in axis_measures(*(lines.double().numpy() for lines in sums)).items():
                draws[measure].append(value)
        absolute = ((u * values) @ v.T).abs_()
        exact = (absolute.sum(dim=dimension, dtype=torch.float64).numpy() for dimension in (1, 0))
        records: list[ClusteringRecord] = []
        for measure, value in axis_measures(*exact).items():
            record: Any = {
                "model": model,
                "of": f"delta_rank{rank}",
                **place,
                "measure": measure,
                "value": value if changed else float("nan"),
                **dict.fromkeys(field for fields in FIELDS.values() for field in fields),
            }
            record |= dict(zip(FIELDS["everywhere"], against(value, np.array(draws[measure])), strict=True))
            records.append(record)
        return records

    return [record for records in one_core_each(of_matrix, in_layers(change)) for record in records]


def _orthonormal(size: int, rank: int, generator: torch.Generator) -> Float[Tensor, "size rank"]:
    q: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]
    return q
