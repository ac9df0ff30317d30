"""Do the same weights stay the most important ones after training? Per-matrix overlap of top-k masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.analysis.clustering import bootstrap_mean
from palimpsest.analysis.delta import largest, share_in
from palimpsest.analysis.layers import Place, in_layers
from palimpsest.data.cores import one_core_each
from palimpsest.files import UserError
from palimpsest.importance.mask import Mask
from palimpsest.records import MaskOverlapRecord

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Scores = Mapping[str, "Float[Tensor, '*shape']"]


def overlap_records(
    model: str,
    scores: Scores,
    reference: str,
    reference_scores: Scores,
    *,
    other: Scores | None = None,
    ratio: float = 0.03,
    seed: int = 0,
) -> list[MaskOverlapRecord]:
    """One row per parameter of the layers and one over all of them, matrices weighing the same.

    The masks hold the most important `ratio` of each matrix's weights, so that the number says where inside a matrix
    importance lies; shifts between matrices are the business of shift.py. `overlap` is the share of the model's mask
    that is also in the reference's, `overlap_by_chance` the reference mask's share of the matrix.

    other: the reference model scored on other data; gives `noise_floor`, the overlap that change of data alone leaves.

    In the place of scores their masks by the same ratio (`most_important`) do as well.

    Raises UserError if a parameter is missing from one of them.
    """

    def of_matrix(place: Place) -> MaskOverlapRecord:
        name = place["name"]
        for which, tensors in ((model, scores), (reference, other)):
            if tensors is not None and name not in tensors:
                raise UserError(f"{name} is missing from the scores of {which}; score the same parameters of both.")
        mask = largest(reference_scores[name].numpy(), ratio)
        return {
            "model": model,
            "reference": reference,
            **place,
            "ratio": ratio,
            "overlap": share_in(largest(scores[name].numpy(), ratio), mask),
            "overlap_by_chance": float(mask.mean()),
            "ci_low": None,
            "ci_high": None,
            "noise_floor": None if other is None else share_in(largest(other[name].numpy(), ratio), mask),
        }

    records = list(one_core_each(of_matrix, in_layers(reference_scores)))
    return [*records, _over_all(records, seed)] if records else []


def most_important(scores: Scores, ratio: float) -> Mask:
    """The masks that overlaps are taken of: the most important `ratio` of each parameter's weights."""
    shapes = {name: tuple(scores[name].shape) for name in scores}
    found = Mask.empty(shapes, {"ratio": ratio, "scope": "per_matrix"})

    def mark(name: str) -> None:
        found.mark(name, 0, largest(scores[name].cpu().numpy(), ratio).reshape(-1))

    for _ in one_core_each(mark, shapes):
        pass
    return found


def _over_all(records: list[MaskOverlapRecord], seed: int) -> MaskOverlapRecord:
    def column(field: str) -> np.ndarray:
        values = np.array([row[field] for row in records], dtype=np.float64)  # type: ignore[literal-required]
        return values[np.isfinite(values)]

    mean, low, high = bootstrap_mean(column("overlap"), seed=seed)
    floors = column("noise_floor")
    return {
        **records[0],
        "name": "all",
        "layer": None,
        "kind": "all",
        "overlap": mean,
        "overlap_by_chance": float(column("overlap_by_chance").mean()),
        "ci_low": low,
        "ci_high": high,
        "noise_floor": float(floors.mean()) if len(floors) else None,
    }
