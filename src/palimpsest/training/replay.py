"""Replay: batches of text between those of the questions, as one function of the seed and the epoch.

The batches of the questions, and their order, are those of a training without replay. A row of text is used once before
any is used again: a shuffled round of all rows is cut into batches, then the next round, and each epoch goes on where
the one before it ended.

Shapes: batch = rows of a batch, seq = tokens of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError
from palimpsest.training.remedies import REPLAYED

if TYPE_CHECKING:
    from palimpsest.data.collate import Collator
    from palimpsest.training.batching import EpochBatches


@dataclass(frozen=True)
class TextRow:
    """Tokens that are read, then tokens that are learned too. Neither is empty."""

    id: str
    context: tuple[int, ...]
    tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.tokens)


def fitting(rows: Sequence[TextRow], batch_size: int, max_tokens: int | None) -> list[TextRow]:
    """The rows, the end of what is longer than the budget cut off; one that then teaches nothing is left out.

    Raises UserError where those that are left do not make one batch.
    """
    if max_tokens is None:
        require_batch(len(rows), batch_size)
        return list(rows)
    cut = (TextRow(row.id, row.context, row.tokens[: max(0, max_tokens - len(row.context))]) for row in rows)
    kept = [row for row in cut if row.tokens]
    if sum(map(len, kept)) < max_tokens:  # fewer tokens than a batch may have
        require_batch(len(kept), batch_size)
    return kept


def require_batch(n_rows: int, batch_size: int) -> None:
    """Raise UserError for fewer rows of text than a batch has: each batch would hold some of them twice."""
    if n_rows < batch_size:
        raise UserError(
            f"replay has {n_rows} rows of text and training.batch_size is {batch_size}, so they do not make one batch; "
            "give more text, or more texts of the base's own (replay.n_texts)."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Which rows, and when
# ---------------------------------------------------------------------------------------------------------------------
def text_batches(
    lengths: Sequence[int], batch_size: int, seed: int, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Batches of rows of these lengths without an end, as indices: round after round, each in an order of its own.

    max_tokens: most tokens of a batch, padding counted; `batch_size` then limits its rows.
    """
    batch: list[int] = []
    for row in chain.from_iterable(_round(len(lengths), seed, number) for number in count()):
        longest = max(lengths[i] for i in (*batch, row))
        too_long = max_tokens is not None and (len(batch) + 1) * longest > max_tokens
        if batch and (len(batch) == batch_size or too_long):
            yield batch
            batch = []
        batch.append(row)


def _round(n: int, seed: int, number: int) -> list[int]:
    return random.Random(f"{seed}/replay/{number}").sample(range(n), n)


def places(n_questions: int, n_text: int) -> set[int]:
    """Where the batches of text stand among all of an epoch: evenly, each in the middle of its part.

    >>> sorted(places(8, 2))
    [2, 7]
    """
    total = n_questions + n_text
    return {(2 * number + 1) * total // (2 * n_text) for number in range(n_text)}


@dataclass
class MixedBatches:
    """Batches of questions and of text, in the form of `EpochBatches`. Row i of text has the index n_questions + i."""

    questions: EpochBatches
    n_text: int  # batches of text in each epoch
    lengths: Sequence[int]  # of the rows of text, tokens

    def set_epoch(self, epoch: int) -> None:
        self.questions.set_epoch(epoch)

    def batches(self, epoch: int) -> list[list[int]]:
        of = self.questions
        stream = text_batches(self.lengths, of.batch_size, of.seed, of.max_tokens)
        text = islice(stream, epoch * self.n_text, (epoch + 1) * self.n_text)
        asked = of.batches(epoch)
        spoken, between = iter(asked), places(len(asked), self.n_text)
        return [
            [of.n_examples + row for row in next(text)] if place in between else next(spoken)
            for place in range(len(asked) + self.n_text)
        ]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.questions.epoch))

    def __len__(self) -> int:
        return len(self.questions) + self.n_text


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MixedCollator:
    """Callable: examples, or rows of text, → batch."""

    questions: Collator

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return collate_text(rows) if isinstance(rows[0], TextRow) else self.questions(rows)


def collate_text(rows: Sequence[TextRow]) -> dict[str, Any]:
    """Right-padded: input_ids, attention_mask, labels (batch, seq), ids; and the mark of a replayed batch."""
    import torch

    from palimpsest.models.loss import IGNORED

    width = max(map(len, rows))

    def padded(values: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values])

    return {
        "input_ids": padded([row.context + row.tokens for row in rows], 0),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "labels": padded([(IGNORED,) * len(row.context) + row.tokens for row in rows], IGNORED),
        "ids": [row.id for row in rows],
        REPLAYED: True,
    }
