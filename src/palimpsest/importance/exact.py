"""Importance by ablation (Eq. 1), the definition that the first-order estimate is measured against.

One evaluation of the whole data per weight: for samples of weights and small data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from palimpsest.models.anatomy import find_language_model, named_parameters
from palimpsest.models.loss import supervised_losses
from palimpsest.rundir import UserError

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import nn


def exact_importance(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    positions: Iterable[tuple[str, int]],
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> Float64[np.ndarray, " positions"]:
    """|L(θ) − L(θ with θ_j = 0)| for each position, in nats per supervised token: the unit of the estimates.

    positions: (canonical parameter name, row-major index). Losses are summed in float64, but a float32 model
    itself resolves about 1e-7 of its loss: use `model.double()` for weights that matter less.
    The model is in eval mode meanwhile; weights and modes are as before afterwards.
    """
    if parameters is None:
        parameters = named_parameters(find_language_model(model))
    modes = [(module, module.training) for module in model.modules()]
    changes = []
    try:
        model.eval()
        with torch.no_grad():
            loss = _mean_loss(model, batches)
            for name, index in positions:
                if name not in parameters or not 0 <= index < parameters[name].numel():
                    raise UserError(f"The model has no weight {index} of {name}; choose positions inside it.")
                weights = parameters[name].view(-1)
                value = weights[index].clone()
                try:
                    weights[index] = 0
                    changes.append(abs(_mean_loss(model, batches) - loss))
                finally:
                    weights[index] = value
    finally:
        for module, training in modes:
            module.training = training
    return np.array(changes, dtype=np.float64)


def _mean_loss(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    total, n_tokens = 0.0, 0
    for batch in batches:
        losses, _ = supervised_losses(model, batch)
        total += losses.double().sum().item()
        n_tokens += len(losses)
    return total / n_tokens


@dataclass(frozen=True)
class Agreement:
    """How well an approximation ranks weights.

    top_precision: share s → of the s·n weights that exact ablation puts first, the part that the
    approximation puts among its own first s·n; chance gives s.
    """

    n: int
    spearman: float
    kendall: float
    top_precision: dict[float, float]


def agreement(
    exact: Float64[np.ndarray, " weights"],
    approximate: Float64[np.ndarray, " weights"],
    shares: Sequence[float] = (0.01, 0.03, 0.1),
) -> Agreement:
    """Rank agreement of two importances of the same weights. Shares that leave no weight are left out."""
    exact, approximate = np.asarray(exact), np.asarray(approximate)
    if exact.shape != approximate.shape or len(exact) < 2:
        raise UserError(
            f"Agreement needs two importances of the same two or more weights, not {exact.shape} and "
            f"{approximate.shape}."
        )
    precision = {}
    for share in shares:
        k = round(share * len(exact))
        if k:
            first = [set(np.argsort(-values, kind="stable")[:k].tolist()) for values in (exact, approximate)]
            precision[share] = len(first[0] & first[1]) / k
    return Agreement(
        n=len(exact),
        spearman=float(stats.spearmanr(exact, approximate).statistic),
        kendall=float(stats.kendalltau(exact, approximate).statistic),
        top_precision=precision,
    )
