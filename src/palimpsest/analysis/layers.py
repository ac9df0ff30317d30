"""How importance is spread over the layers of a model (the paper's Figure 2).

Sums are in float64. What compares two distributions is in shift.py. Shapes: n_layers, n_kinds, n_batches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palimpsest.files import UserError
from palimpsest.models.anatomy import layer_index, module_kind
from palimpsest.records import LayerRecord

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Vector = NDArray[np.float64]

OTHER_KIND = "other"  # parameters of a layer that are not one of its projections, such as norms


class Place(TypedDict):
    """The fields of a record that say which parameter it is about."""

    name: str
    layer: int
    kind: str


def in_layers(names: Iterable[str]) -> Iterator[Place]:
    """Of each parameter of the layers; the others have no depth."""
    for name in names:
        layer = layer_index(name)
        if layer is not None:
            yield {"name": name, "layer": layer, "kind": module_kind(name) or OTHER_KIND}


@dataclass(frozen=True)
class LayerDistribution:
    """Importance per layer and module kind."""

    kinds: tuple[str, ...]
    totals: Vector  # (n_layers, n_kinds), sums of importance
    n_parameters: NDArray[np.int64]  # (n_layers, n_kinds)

    @property
    def layer_totals(self) -> Vector:
        """(n_layers,)"""
        summed: Vector = self.totals.sum(axis=1)
        return summed


@dataclass(frozen=True)
class ModelLayers:
    """One model's distribution and, where its scores keep them, the totals of each data batch."""

    model: str
    distribution: LayerDistribution
    batches: Vector | None = None  # (n_batches, n_layers), from `layer_batches`


def layer_distribution(scores: Mapping[str, Float[Tensor, "*shape"]]) -> LayerDistribution:
    """Sum importance per layer and kind, one tensor in memory at a time.

    Parameters outside the layers (embedding, head, final norm) have no depth and are left out.

    Raises UserError if a score is negative or not finite, if all are zero, or if a layer is missing.
    """
    sums: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for place in in_layers(scores):
        name, values = place["name"], scores[place["name"]].numpy()
        # A negative score would pass as part of a sum.
        sums[name] = float(values.sum(dtype=np.float64)) if values.min(initial=0.0) >= 0 else math.nan
        sizes[name] = values.size
    return distribution_of_sums(sums, sizes)


def distribution_of_sums(sums: Mapping[str, float], sizes: Mapping[str, int]) -> LayerDistribution:
    """The same from the sum of the scores of each parameter, and the number of its weights.

    Raises UserError if a sum is negative or not finite, if all are zero, or if a layer is missing.
    """
    totals: dict[tuple[int, str], float] = defaultdict(float)
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for place in in_layers(sums):
        name, total = place["name"], sums[place["name"]]
        if not np.isfinite(total) or total < 0:
            raise UserError(
                f"The importance scores of {name} hold negative or non-finite values; score the model again."
            )
        totals[place["layer"], place["kind"]] += total
        counts[place["layer"], place["kind"]] += sizes[name]
    layers = sorted({layer for layer, _ in totals})
    if not layers or layers != list(range(len(layers))):
        raise UserError(f"The importance scores hold layers {layers}, not every layer from 0 up; score all layers.")
    kinds = tuple(dict.fromkeys(kind for _, kind in totals))
    distribution = LayerDistribution(
        kinds,
        np.array([[totals[layer, kind] for kind in kinds] for layer in layers]),
        np.array([[counts[layer, kind] for kind in kinds] for layer in layers]),
    )
    if not distribution.totals.sum() > 0:
        raise UserError("All importance scores are zero; score the model again on data with supervised tokens.")
    return distribution


def layer_batches(batch_totals: ArrayLike, names: Sequence[str]) -> Vector:
    """Sum the batch totals of parameters per layer.

    batch_totals: (n_batches, n_parameters), Σ|θ·g| of one batch over one parameter tensor; names:
    (n_parameters,). Returns (n_batches, n_layers) in float64; parameters outside the layers are left out.
    """
    values = np.asarray(batch_totals, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise UserError(
            f"batch_totals has shape {values.shape} but there are {len(names)} names; score the model again."
        )
    layers = [layer_index(name) for name in names]
    n_layers = 1 + max((layer for layer in layers if layer is not None), default=-1)
    totals = np.zeros((len(values), n_layers))
    for column, layer in enumerate(layers):
        if layer is not None:
            totals[:, layer] += values[:, column]
    return totals


def layer_records(scored: ModelLayers, *, modality: str, reduction: str) -> list[LayerRecord]:
    """A row per layer with kind "all", and one per layer and kind that has parameters."""
    dist = scored.distribution
    model_total = dist.totals.sum()
    records: list[LayerRecord] = []
    for layer in range(len(dist.totals)):
        cells = [("all", dist.totals[layer].sum(), dist.n_parameters[layer].sum())]
        cells += zip(dist.kinds, dist.totals[layer], dist.n_parameters[layer], strict=True)
        records += [
            {
                "model": scored.model,
                "modality": modality,
                "reduction": reduction,
                "layer": layer,
                "kind": kind,
                "total": float(total),
                "mean": float(total / count),
                "share": float(total / model_total),
                "n_parameters": int(count),
            }
            for kind, total, count in cells
            if count
        ]
    return records
