"""Perplexity on held-out examples in the middle of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.data.collate import to_device
from palimpsest.models.loss import supervised_losses
from palimpsest.training.batching import epoch_batches, sequence_lengths

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.data.collate import Collator
    from palimpsest.data.examples import Example

HeldOut = Mapping[str, tuple["Collator", Sequence["Example"]]]  # by modality


@torch.no_grad()
def measure(
    model: nn.Module, held_out: HeldOut, batch_size: int, max_tokens: int | None, device: str | torch.device
) -> dict[str, float]:
    """For every modality `eval_M_loss` (nats per token), `eval_M_perplexity` and `eval_M_n_tokens`.

    Totals are divided once, in float64. Similar lengths stand together, under the token budget if there is one; an
    example above it is alone in its batch. Uses no random numbers; leaves the model in evaluation mode.
    """
    model.eval()
    found: dict[str, float] = {}
    for modality, (collator, examples) in held_out.items():
        lengths = sequence_lengths(collator, examples)
        budget = batch_size * max(lengths) if max_tokens is None else max_tokens
        total, n_tokens = 0.0, 0
        for rows in epoch_batches(len(examples), batch_size, seed=0, epoch=0, lengths=lengths, max_tokens=budget):
            losses, _ = supervised_losses(model, to_device(collator([examples[i] for i in rows]), device))
            total += float(losses.double().sum())
            n_tokens += len(losses)
        found[f"eval_{modality}_loss"] = total / n_tokens
        found[f"eval_{modality}_perplexity"] = math.exp(min(total / n_tokens, 700.0))  # what a float can hold
        found[f"eval_{modality}_n_tokens"] = n_tokens
    return found


def modalities_of(entry: Mapping[str, Any]) -> list[str]:
    """The modalities a log entry of the Trainer has measurements of, sorted: a checkpoint sorts the entry's keys."""
    return sorted(key.removeprefix("eval_").removesuffix("_n_tokens") for key in entry if key.endswith("_n_tokens"))
