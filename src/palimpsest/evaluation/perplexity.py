"""Perplexity on the target answers: exp(total loss / total tokens), never a mean of batch perplexities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.models.loss import supervised_losses
from palimpsest.rundir import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one example's answer: summed, in nats, over `n_tokens` supervised tokens."""

    loss: float
    n_tokens: int


@dataclass(frozen=True)
class Perplexity:
    """Totals over a data set, and every example's own share so that two models can be compared paired."""

    samples: Mapping[str, SampleLoss]  # by example id, in the order they came

    @property
    def total_loss(self) -> float:
        """Nats over all supervised tokens; fsum, so that the order of the samples does not matter."""
        return math.fsum(sample.loss for sample in self.samples.values())

    @property
    def n_tokens(self) -> int:
        return sum(sample.n_tokens for sample in self.samples.values())

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.total_loss / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Infinite where the mean loss is beyond what a float can exponentiate (about 709 nats)."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def perplexity(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Perplexity:
    """Perplexity of a model on batches with "labels" and "ids"; see `models.loss.supervised_losses` for both.

    Losses are added in float64, example by example, so the result does not depend on how examples were
    batched beyond the rounding of the forward pass. The model must be in eval mode and the batches on its
    device.

    Raises:
        UserError: a batch without "ids", an id that comes twice, an example without a supervised token, no
        batch.
    """
    if model.training:
        raise UserError("Perplexity was asked of a model in training mode; call model.eval() first.")
    samples: dict[str, SampleLoss] = {}
    for batch in batches:
        if "ids" not in batch:
            raise UserError('Perplexity needs the examples\' ids; put a list of strings under "ids" into every batch.')
        ids: list[str] = list(batch["ids"])
        with torch.inference_mode():
            losses, rows = supervised_losses(model, batch)
        totals = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, rows.cpu(), losses.double().cpu())
        counts = torch.bincount(rows.cpu(), minlength=len(ids))
        for id, total, count in zip(ids, totals.tolist(), counts.tolist(), strict=True):
            if id in samples:
                raise UserError(f"Example {id!r} comes twice; give every example its own id.")
            if count == 0:
                raise UserError(f"Example {id!r} has no supervised token; leave it out or check its labels.")
            samples[id] = SampleLoss(total, count)
    if not samples:
        raise UserError("Perplexity was asked of no examples at all; pass at least one batch.")
    return Perplexity(samples)
