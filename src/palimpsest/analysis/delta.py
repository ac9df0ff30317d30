"""The parameter change of training, ΔW = W_tuned − W_base: how large, and does it hit what the text needs?

An unchanged matrix (frozen, or below the resolution of the stored dtype) has relative norm 0 and no largest
changes: its overlap is nan, written as null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh

from palimpsest.analysis.clustering import gram, rank_of_gram
from palimpsest.analysis.layers import in_layers
from palimpsest.data.cores import one_core_each
from palimpsest.files import UserError
from palimpsest.records import DeltaRecord, EmbeddingRecord

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from palimpsest.models.paired_weights import PairedWeights

    Tensors = Mapping[str, Float[Tensor, "*shape"]]  # by canonical name

ENERGY_RANKS = (1, 8, 24)


class Change(Mapping[str, "Float[Tensor, '*shape']"]):
    """W_tuned − W_base in float32 by name, computed on access.

    Raises UserError on access if a parameter is missing from one model or differs in shape.
    """

    def __init__(self, base: Tensors, tuned: Tensors) -> None:
        self._base, self._tuned = base, tuned

    def __getitem__(self, name: str) -> Float[Tensor, "*shape"]:
        before, after = _pair(name, self._base, self._tuned)
        return after - before

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class AbsoluteChange(Change):
    """|W_tuned − W_base|: what clustering and maps take as "delta"."""

    def __getitem__(self, name: str) -> Float[Tensor, "*shape"]:
        return super().__getitem__(name).abs()


def largest(values: NDArray[Any], ratio: float) -> NDArray[np.bool_]:
    """Mask of the largest `ratio` of the entries, at least one; of equal ones the first by position.

    Zeros are never among the largest, so the mask may hold fewer: a ranking of equal zeros would be one of
    positions. A mask, an array of booleans, is given back as it is: its largest entries have been found.
    """
    if values.dtype == np.bool_:
        return values
    flat = values.reshape(-1)
    count = max(1, int(ratio * flat.size + 0.5))
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    mask = flat > threshold
    if threshold > 0:
        ties = np.flatnonzero(flat == threshold)
        mask[ties[: count - int(mask.sum())]] = True
    shaped: NDArray[np.bool_] = mask.reshape(values.shape)
    return shaped


def share_in(mask: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Share of `mask` that is in `reference`; nan if it is empty."""
    count = int(mask.sum())
    return float((mask & reference).sum()) / count if count else float("nan")


def delta_records(
    base: Tensors, tuned: Tensors, importance: Tensors, *, method: str, ratio: float = 0.03
) -> list[DeltaRecord]:
    """One row per scored parameter of the layers: size of its change, and where its largest changes lie.

    base, tuned: weights by canonical name; importance: non-negative scores of the base model, or their masks by the
    same ratio (`overlap.most_important`), which set the parameters that are compared. `overlap_with_importance` is the
    share of the largest `ratio` of |ΔW| that falls on the most important `ratio` of weights, both within the matrix;
    `overlap_by_chance` is the share of weights that count as most important (`ratio` up to rounding), which is what
    changes at random places would hit.

    Raises UserError if a parameter is missing, or differs in shape, in one of the three.
    """
    if not 0 < ratio < 1:
        raise UserError(f"The ratio of largest changes is {ratio}; give a number between 0 and 1, such as 0.03.")

    def of_matrix(place: Mapping[str, Any]) -> Any:
        name = place["name"]
        before, after = _pair(name, base, tuned)
        scores = importance[name]
        if scores.shape != before.shape:
            raise UserError(
                f"Importance of {name} has shape {tuple(scores.shape)}, the weight {tuple(before.shape)}; "
                "score the base model that was tuned."
            )
        change = after - before
        important = largest(scores.numpy(), ratio)
        return {
            "method": method,
            **place,
            "relative_norm": _relative_norm(change, before),
            "overlap_with_importance": share_in(largest(change.abs().numpy(), ratio), important),
            "overlap_by_chance": float(important.mean()),
            **_spectrum(change),
        }

    return list(one_core_each(of_matrix, in_layers(importance)))


def embedding_records(method: str, pairs: PairedWeights) -> list[EmbeddingRecord]:
    """A row for the embedding and one for a head of its own: the change of the rows that both models have."""
    records: list[EmbeddingRecord] = []
    for part, name in (("embedding", pairs.embedding), ("head", pairs.head)):
        if name is None:
            continue
        before, after = pairs.base[name].float(), pairs.tuned[name].float()
        change = after - before
        records.append(
            {
                "method": method,
                "name": name,
                "part": part,
                "rows_base": pairs.rows[0],
                "rows_tuned": pairs.rows[1],
                "rows": len(change),
                "rows_changed": int((change != 0).any(dim=1).sum()),
                "relative_norm": _relative_norm(change, before),
            }
        )
    return records


def _spectrum(change: Float[Tensor, "*shape"]) -> dict[str, float]:
    """Effective rank, and shares of ‖ΔW‖² in the largest singular directions; nan where no change, or no matrix."""
    product = gram(change.numpy()) if change.ndim == 2 else None
    found = {"effective_rank": rank_of_gram(product)} | {f"energy_top{rank}": float("nan") for rank in ENERGY_RANKS}
    if product is None:
        return found
    n = len(product)
    largest = eigh(product, eigvals_only=True, subset_by_index=(max(0, n - max(ENERGY_RANKS)), n - 1))[::-1]
    total = float(np.trace(product, dtype=np.float64))
    return found | {f"energy_top{rank}": min(1.0, float(largest[:rank].sum()) / total) for rank in ENERGY_RANKS}


def _pair(name: str, base: Tensors, tuned: Tensors) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    for which, weights in (("base", base), ("tuned", tuned)):
        if name not in weights:
            raise UserError(f"{name} is missing from the {which} model; compare a model with its own base.")
    before, after = base[name].float(), tuned[name].float()
    if before.shape != after.shape:
        raise UserError(
            f"{name} has shape {tuple(before.shape)} in the base, {tuple(after.shape)} in the tuned model; "
            "compare a model with its own base."
        )
    return before, after


def _relative_norm(change: Float[Tensor, "*shape"], before: Float[Tensor, "*shape"]) -> float:
    """‖ΔW‖ / ‖W‖, Frobenius, summed in float64; nan if W is all zero and changed."""
    change_norm, norm = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (change, before))
    if change_norm == 0:
        return 0.0
    return change_norm / norm if norm > 0 else float("nan")
