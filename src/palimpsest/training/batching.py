"""Which examples make up which batch, as one function of the seed and the epoch.

Without a token budget: shuffled, then cut into batches of `batch_size`. With one: sorted by length (equal lengths in
random order), cut so that rows × longest ≤ `max_tokens`, then the batches shuffled; how many batches there are depends
on the lengths alone, so every epoch has the same number of steps. Nothing is drawn from the global generator: the
order after a resume needs no state but the epoch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.data.collate import Collator
    from palimpsest.data.examples import Example


def epoch_batches(
    n_examples: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    lengths: Sequence[int] | None = None,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """The batches of one epoch, each a list of indices; every index from 0 to n_examples − 1 exactly once.

    Args:
        lengths: tokens of every example; needed with `max_tokens`, otherwise unused.
        max_tokens: most tokens of a batch, padding counted; `batch_size` then limits its rows. An example longer than
            that is alone in its batch; `require_budget` refuses it before training.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(n_examples))
    rng.shuffle(order)
    if max_tokens is None:
        return [order[start : start + batch_size] for start in range(0, n_examples, batch_size)]
    if lengths is None or len(lengths) != n_examples:
        raise ValueError("a token budget needs the length of every example")
    order.sort(key=lambda i: -lengths[i])  # stable: equal lengths stay shuffled
    batches: list[list[int]] = []
    start = 0
    while start < n_examples:
        rows = max(1, min(batch_size, max_tokens // lengths[order[start]]))  # its first row is its longest
        batches.append(order[start : start + rows])
        start += rows
    rng.shuffle(batches)
    return batches


@dataclass
class EpochBatches:
    """`epoch_batches` in the form a DataLoader takes as its `batch_sampler`; the Trainer sets the epoch."""

    n_examples: int
    batch_size: int
    seed: int
    lengths: Sequence[int] | None = None
    max_tokens: int | None = None
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        return epoch_batches(
            self.n_examples,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            lengths=self.lengths,
            max_tokens=self.max_tokens,
        )

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.epoch))

    def __len__(self) -> int:
        if self.max_tokens is None:
            return math.ceil(self.n_examples / self.batch_size)
        return len(self.batches(0))


def sequence_lengths(collator: Collator, examples: Sequence[Example]) -> list[int]:
    """Tokens of every example's training sequence: prompt, speech positions, answer, end of turn."""
    return [collator.length(example) for example in examples]


def require_budget(examples: Sequence[Example], lengths: Sequence[int], max_tokens: int) -> None:
    """Raise UserError naming the longest example if it does not fit the token budget by itself."""
    longest = max(range(len(examples)), key=lambda i: lengths[i])
    if lengths[longest] > max_tokens:
        n_too_long = sum(length > max_tokens for length in lengths)
        raise UserError(
            f"The example {examples[longest].id!r} has {lengths[longest]} tokens and the budget training.max_tokens is "
            f"{max_tokens} ({n_too_long} of {len(examples)} examples are above it); raise it to {lengths[longest]} or "
            "leave these examples out."
        )


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Padding over all tokens of the batches, from 0 to 1."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1.0 - sum(lengths[i] for batch in batches for i in batch) / padded
