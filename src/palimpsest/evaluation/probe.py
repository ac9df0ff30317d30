"""The retention probe: does a model still find the right continuation more likely than the wrong one?

No text is generated, so a probe takes seconds and can be repeated during training. Its pairs (scripts/make_probe.py)
are of several kinds; in each kind every continuation is right as often as it is wrong, so chance is one half.

>>> records = probe(model, tokenizer)  # doctest: +SKIP

A continuation's loss is the mean over its tokens, in nats. A pair is right when the right continuation's loss is
lower, ties are wrong; its margin is the wrong loss minus the right one. Prompts are plain text, without a chat
template: what is measured is the language model, not how it answers.

Shapes: batch = rows of tokens, seq = their longest, kept = positions at which some row has a target.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from palimpsest.evaluation.finite import not_finite
from palimpsest.files import UserError, hash_file, read_jsonl
from palimpsest.intervals import wilson
from palimpsest.models.anatomy import unwrap
from palimpsest.models.prompts import encode
from palimpsest.parallel import by_ranks, world_size
from palimpsest.records import ProbeRecord

if TYPE_CHECKING:
    from torch import nn

PAIRS = Path(__file__).parent.parent / "data" / "probe" / "pairs.jsonl"
ALL = "all"  # the kind of the record over all kinds


@dataclass(frozen=True)
class Pair:
    """`prompt` + `right` against `prompt` + `wrong`."""

    id: str
    kind: str
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True)
class PairLoss:
    """Mean losses of both continuations of one pair, in nats per token."""

    id: str
    kind: str
    right: float
    wrong: float

    @property
    def correct(self) -> bool:
        return self.right < self.wrong

    def to_row(self) -> dict[str, Any]:
        """For a file by which two models can be compared pair by pair."""
        return {**asdict(self), "correct": self.correct}


@cache
def load_pairs(path: Path = PAIRS) -> tuple[Pair, ...]:
    """The built-in pairs, or those of a file in their format. Raises UserError for a file that is not."""
    try:
        pairs = tuple(Pair(**row) for row in read_jsonl(path))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no file of probe pairs ({error}); see scripts/make_probe.py.") from error
    if not pairs or len({pair.id for pair in pairs}) < len(pairs):
        raise UserError(f"{path} holds no pair, or two with the same id; give every pair its own id.")
    return pairs


def pairs_version() -> str:
    """Identifies the pairs; accuracies on other pairs are not comparable."""
    return hash_file(PAIRS)[:12]


# ---------------------------------------------------------------------------------------------------------------------
# The main path
# ---------------------------------------------------------------------------------------------------------------------
def probe(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair] | None = None,
    batch_size: int = 32,
    *,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[ProbeRecord]:
    """One record per kind and one over all; usable as a callback during training.

    `model`: a causal language model, or a model that answers text with `input_ids` alone (a SpeechLM does). It is
    measured in eval mode and left in the mode it was in; no gradient is kept, no weight or random state changed.
    """
    losses = pair_losses(model, tokenizer, load_pairs() if pairs is None else pairs, batch_size, progress=progress)
    return summarise_probe(losses, name)


def pair_losses(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    batch_size: int = 32,
    *,
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
) -> list[PairLoss]:
    """The losses of every pair, in order. In float32 they do not depend on `batch_size` beyond rounding.

    Where both continuations are one token, as nearly always, one row of tokens serves both. distributed: every rank
    calls with its replica of the model, computes its share of the batches and has the losses of all.

    Raises UserError for a model that gives NaN or infinite losses.
    """
    if not pairs or batch_size < 1:
        raise UserError("The probe needs at least one pair and a batch size of 1 or more.")
    # (tokens before the last, position of the first target, targets) of right and wrong, pair by pair
    spans = [_span(tokenizer, pair, text) for pair in pairs for text in (pair.right, pair.wrong)]
    rows: dict[tuple[int, ...], list[int]] = {}  # tokens -> the continuations that are read off them
    for index, (tokens, _, _) in enumerate(spans):
        rows.setdefault(tokens, []).append(index)
    order = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
    starts = range(0, len(order), batch_size)
    ranks, done = world_size() if distributed else 1, 0

    def measured(start: int) -> list[tuple[int, float]]:
        """(continuation, its mean loss) of one batch."""
        nonlocal done
        batch = order[start : start + batch_size]
        wanted = [(row, index) for row, tokens in enumerate(batch) for index in rows[tokens]]
        means = list(_losses(model, batch, [(row, index, *spans[index][1:]) for row, index in wanted]))
        for index, mean in means:
            if not math.isfinite(mean):
                raise not_finite(model, f"pair {pairs[index // 2].id!r}")
        done += len(batch) * ranks
        if progress is not None:
            progress(min(done, len(order)), len(order))
        return means

    training = model.training
    model.eval()
    try:
        found = by_ranks(measured, starts, distributed=distributed)
    finally:
        model.train(training)
    means = dict(itertools.chain.from_iterable(found))
    return [PairLoss(p.id, p.kind, means[2 * i], means[2 * i + 1]) for i, p in enumerate(pairs)]


def summarise_probe(losses: Sequence[PairLoss], name: str) -> list[ProbeRecord]:
    """One record over all pairs, then one per kind in the pairs' order; `name` is what they call the model."""
    kinds = dict.fromkeys(loss.kind for loss in losses)
    groups = {ALL: losses} | {kind: [loss for loss in losses if loss.kind == kind] for kind in kinds}
    records: list[ProbeRecord] = []
    for kind, group in groups.items():
        correct = sum(loss.correct for loss in group)
        low, high = wilson(correct, len(group))
        records.append(
            {
                "model": name,
                "kind": kind,
                "n": len(group),
                "correct": correct,
                "accuracy": correct / len(group),
                "ci_low": low,
                "ci_high": high,
                "margin": fmean(loss.wrong - loss.right for loss in group),
                "loss_right": fmean(loss.right for loss in group),
                "loss_wrong": fmean(loss.wrong for loss in group),
            }
        )
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and losses
# ---------------------------------------------------------------------------------------------------------------------
def _span(tokenizer: Any, pair: Pair, continuation: str) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """(input tokens, position that predicts the first target, targets).

    Prompt and continuation are tokenised together, as the text they are; the continuation is what follows the tokens
    that this has in common with the prompt alone.
    """
    whole = encode(tokenizer, pair.prompt + continuation, start=True)
    prompt = encode(tokenizer, pair.prompt, start=True)
    common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    if not 0 < common < len(whole):
        raise UserError(
            f"The tokenizer leaves no token of {continuation!r} after {pair.prompt!r} (pair {pair.id}); "
            "leave this pair out."
        )
    return tuple(whole[:-1]), common - 1, tuple(whole[common:])


def _losses(
    model: nn.Module, batch: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, int, int, tuple[int, ...]]]
) -> Iterable[tuple[int, float]]:
    """(index, mean loss) of every wanted (row, index, first position, targets) of a right-padded batch."""
    device = next(model.parameters()).device
    width = max(map(len, batch))
    input_ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in batch], device=device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in batch], device=device)
    columns = sorted({first + i for _, _, first, targets in wanted for i in range(len(targets))})
    keeps = "logits_to_keep" in inspect.signature(unwrap(model).forward).parameters
    options = {"logits_to_keep": torch.tensor(columns, device=device)} if keeps else {}
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=mask, **options).logits
        kept = logits if keeps else logits[:, columns]  # (batch, kept, vocabulary)
        place = {column: i for i, column in enumerate(columns)}
        for row, index, first, targets in wanted:
            at = kept[row, [place[first + i] for i in range(len(targets))]].float()
            yield index, float(cross_entropy(at, torch.tensor(targets, device=device)))
