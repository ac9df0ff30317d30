"""Several questions as one row with their common beginning only once: less to compute, the same losses.

Chat prompts of short questions share their system turn, often half of all tokens. A causal model computes the same
hidden states there for every question, so one row is enough: the common prefix, then each question's rest, which sees
the prefix and itself and has the positions it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from palimpsest.models.loss import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

PREFIX = 0  # the segment that all others see


class SharedPrefix(nn.Module):
    """A causal language model that reads batches made by `pack`; parameters and names are the model's own."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        input_ids: Int64[Tensor, "batch seq"],
        position_ids: Int64[Tensor, "batch seq"],
        segments: Int64[Tensor, "batch seq"],
        logits_to_keep: Int64[Tensor, " kept"],
    ) -> Any:
        """The language model's output under a mask that keeps the segments apart."""
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        own = segments[:, :, None] == segments[:, None, :]
        seen = causal & (own | (segments == PREFIX)[:, None, :])  # (batch, query, key)
        dtype = next(self.language_model.parameters()).dtype
        # Additive, because eager attention does not take a boolean mask.
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return self.language_model(
            input_ids=input_ids,
            attention_mask=mask[:, None],
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            use_cache=False,
        )


def pack(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row (1, seq) holding every row of the batches (input_ids, attention_mask, labels), without padding.

    The prefix is the longest common one that leaves each question at least the token in front of its first target.
    The supervised tokens stay in the order of the rows.
    """
    rows = [
        (ids[mask != 0], labels[mask != 0])
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    longest = min(int((labels != IGNORED).nonzero()[0]) - 1 for _, labels in rows)
    first = rows[0][0]
    n_shared = 0
    while n_shared < longest and all(bool(ids[n_shared] == first[n_shared]) for ids, _ in rows):
        n_shared += 1
    device = first.device
    parts: list[tuple[Tensor, Tensor, int, int]] = [
        (first[:n_shared], torch.full_like(first[:n_shared], IGNORED), 0, 0)
    ]
    parts += [(ids[n_shared:], labels[n_shared:], n_shared, PREFIX + 1 + i) for i, (ids, labels) in enumerate(rows)]
    return {
        "input_ids": torch.cat([ids for ids, *_ in parts])[None],
        "labels": torch.cat([labels for _, labels, *_ in parts])[None],
        "position_ids": torch.cat([torch.arange(s, s + len(ids), device=device) for ids, _, s, _ in parts])[None],
        "segments": torch.cat([torch.full_like(ids, segment) for ids, _, _, segment in parts])[None],
        "ids": [" + ".join(str(name) for batch in batches for name in batch.get("ids", ()))],
    }
