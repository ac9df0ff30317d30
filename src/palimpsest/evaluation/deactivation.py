"""The deactivation experiment (Table 1): perplexity with the top, bottom or random weights set to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.evaluation.perplexity import perplexity
from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.select import select
from palimpsest.rundir import DeactivationRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

Batches = Callable[[], Iterable[Mapping[str, Any]]]
Scope = Literal["global", "per_layer", "per_matrix"]
Condition = Literal["base", "top", "bottom", "random"]


def deactivation_records(
    name: str,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Batches],
    *,
    ratio: float,
    scope: Scope,
    random_seeds: Sequence[int],
    reduction: str,
    conditions: Sequence[Condition] = ("base", "top", "bottom", "random"),
    progress: Callable[[int, int], None] | None = None,
) -> list[DeactivationRecord]:
    """One record per condition (random: per seed) and modality.

    Args:
        name: what the records call the model.
        model: in eval mode; its weights are afterwards what they were, bit for bit.
        tensors: importance by canonical name, of the `reduction` the records name.
        data: modality → function that yields the same batches at every call.
        ratio: share of the scored weights to zero, within each `scope`.
    """
    masks: list[tuple[Condition, int | None]] = []
    for condition in conditions:
        masks += [("random", seed) for seed in random_seeds] if condition == "random" else [(condition, None)]
    records: list[DeactivationRecord] = []
    for condition, seed in masks:
        removed = 0.0 if condition == "base" else ratio
        mask = select(tensors, removed, "bottom" if condition == "base" else condition, scope, seed or 0)
        with deactivate(model, mask):
            for modality, batches in data.items():
                result = perplexity(model, batches())
                records.append(
                    {
                        "model": name,
                        "modality": modality,
                        "condition": condition,
                        "ratio": removed,
                        "scope": scope,
                        "seed": seed,
                        "reduction": reduction,
                        "n_removed": mask.count,
                        "n_examples": len(result.samples),
                        "n_tokens": result.n_tokens,
                        "loss": result.loss,
                        "perplexity": result.perplexity,
                    }
                )
                if progress is not None:
                    progress(len(records), len(masks) * len(data))
    return records
