"""What is measured in the middle of training: perplexity of held-out answers, and the drift from the base.

The drift is estimated from text that the base wrote (evaluation/own_text.py): its tokens were drawn from the base's
distributions, so that on average the tuned model's loss on them minus the base's is KL(base ‖ tuned). That needs one
number of the base, where the KL itself needs the base beside the model, or its logits on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.data.collate import to_device
from palimpsest.models.loss import supervised_losses
from palimpsest.training.batching import epoch_batches, sequence_lengths

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.data.collate import Collator
    from palimpsest.data.examples import Example


@dataclass(frozen=True)
class OwnText:
    """Batches of the base's own text, labels on the tokens that it drew, and its loss on them, nats per token."""

    batches: Sequence[Mapping[str, Any]]
    base_loss: float


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


def measure_drift_estimate(model: nn.Module, own_text: OwnText, device: str | torch.device) -> dict[str, float]:
    """`drift_loss`, `drift_loss_base` and `drift_tokens`: what a record of kind `drift` is made of."""
    loss, n_tokens = loss_of_batches(model, own_text.batches, device)
    return {"drift_loss": loss, "drift_loss_base": own_text.base_loss, "drift_tokens": n_tokens}


@torch.no_grad()
def loss_of_batches(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], device: str | torch.device
) -> tuple[float, int]:
    """(nats per supervised token, supervised tokens); leaves the model in evaluation mode."""
    model.eval()
    total, n_tokens = 0.0, 0
    for batch in batches:
        losses, _ = supervised_losses(model, to_device(dict(batch), device))
        total += float(losses.double().sum())
        n_tokens += len(losses)
    return total / n_tokens, n_tokens


def modalities_of(entry: Mapping[str, Any]) -> list[str]:
    """The modalities a log entry of the Trainer has measurements of, sorted: a checkpoint sorts the entry's keys."""
    return sorted(key.removeprefix("eval_").removesuffix("_n_tokens") for key in entry if key.endswith("_n_tokens"))
