"""Loss on general text, per token and per byte, of one model; two models are compared on the same texts.

A text is tokenised as the one text it is and cut into windows of at most `window` tokens, none left out: the first
window is predicted from what a text begins with, each further one from the last token of the window before it, as in
the rolling windows of lm-evaluation-harness. So every token is predicted exactly once, and the nats per byte of models
with other tokenizers are of the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from palimpsest.data.texts import Text, windows
from palimpsest.evaluation.own_text import beginning
from palimpsest.evaluation.perplexity import perplexity
from palimpsest.files import UserError, read_jsonl, write_jsonl
from palimpsest.intervals import bootstrap_ratio
from palimpsest.models.compute import Arithmetic
from palimpsest.models.loss import IGNORED
from palimpsest.models.prompts import encode
from palimpsest.parallel import my_share
from palimpsest.records import GeneralTextRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TextLoss:
    """The loss of a text: summed, in nats, over its `n_tokens`, which stand for `n_bytes` of UTF-8."""

    id: str
    document: str
    loss: float
    n_tokens: int
    n_bytes: int
    n_windows: int


def text_losses(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    window: int = 512,
    batch_size: int = 8,
    compute: Arithmetic = "float32",
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
) -> list[TextLoss]:
    """The loss of every text, in order, by a causal language model in eval mode. progress(windows done, windows).

    distributed: every rank calls with its replica of the model, measures its share of the batches and has all losses.

    Raises UserError for a window that the model has no positions for, and for losses that are not finite.
    """
    require_positions(model.config, window)
    cut = {text.id: list(windows(encode(tokenizer, text.text), beginning(tokenizer), window)) for text in texts}
    if empty := next((text for text in texts if not cut[text.id]), None):
        raise UserError(f"The tokenizer has no token for the text {empty.text[:40]!r}; leave it out.")
    rows = [(f"{name}/{number}", *row) for name, of in cut.items() for number, row in enumerate(of)]
    rows.sort(key=lambda row: (-len(row[1]) - len(row[2]), row[0]))

    def batches() -> Iterator[dict[str, Any]]:
        starts = range(0, len(rows), batch_size)
        for start in my_share(starts) if distributed else starts:
            if progress is not None:
                progress(start, len(rows))
            yield _batch(rows[start : start + batch_size], model.device)

    losses = perplexity(model, batches(), compute=compute, distributed=distributed).samples
    return [
        TextLoss(
            text.id,
            text.document,
            sum(losses[f"{text.id}/{number}"].loss for number in range(len(cut[text.id]))),
            sum(len(tokens) for _, tokens in cut[text.id]),
            len(text.text.encode()),
            len(cut[text.id]),
        )
        for text in texts
    ]


def require_positions(config: Any, window: int) -> None:
    """Raise UserError for a window that a model of this config has no positions for."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and window + 1 > longest:
        raise UserError(
            f"The model has {longest} positions, too few for windows of {window} tokens; give --window {longest - 1} "
            f"(in a recipe drift.general_text.window: {longest - 1})."
        )


def _batch(rows: Sequence[tuple[str, list[int], list[int]]], device: torch.device) -> dict[str, Any]:
    width = max(len(context) + len(tokens) for _, context, tokens in rows)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    made = {
        "input_ids": [padded(context + tokens, 0) for _, context, tokens in rows],
        "attention_mask": [padded([1] * (len(context) + len(tokens)), 0) for _, context, tokens in rows],
        "labels": [padded([IGNORED] * len(context) + tokens, IGNORED) for _, context, tokens in rows],
    }
    return {**{key: torch.tensor(value, device=device) for key, value in made.items()}, "ids": [row[0] for row in rows]}


# ---------------------------------------------------------------------------------------------------------------------
# Means with intervals, over documents
# ---------------------------------------------------------------------------------------------------------------------
def summarise_text(losses: Sequence[TextLoss], model: str, text: str, seed: int) -> GeneralTextRecord:
    """text: its name; seed: of the bootstrap over documents."""
    sums, tokens, n_bytes = by_document(losses)
    per_token, per_byte = sums.sum() / tokens.sum(), sums.sum() / n_bytes.sum()
    (token_low,), (token_high,) = bootstrap_ratio(sums[:, None], tokens, seed)
    (byte_low,), (byte_high,) = bootstrap_ratio(sums[:, None], n_bytes, seed)
    return {
        "model": model,
        "text": text,
        "n_texts": len(losses),
        "n_documents": len(sums),
        "n_windows": sum(loss.n_windows for loss in losses),
        "n_long": sum(loss.n_windows > 1 for loss in losses),
        "n_tokens": int(tokens.sum()),
        "n_bytes": int(n_bytes.sum()),
        "loss": float(per_token),
        "loss_ci_low": float(token_low),
        "loss_ci_high": float(token_high),
        "per_byte": float(per_byte),
        "per_byte_ci_low": float(byte_low),
        "per_byte_ci_high": float(byte_high),
        "perplexity": float(np.exp(per_token)),
    }


def by_document(losses: Sequence[TextLoss]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """(nats, tokens, bytes) of each document, in the order in which they first come."""
    index = {name: i for i, name in enumerate(dict.fromkeys(loss.document for loss in losses))}
    where = [index[loss.document] for loss in losses]
    sums, tokens, n_bytes = np.zeros(len(index)), np.zeros(len(index), np.int64), np.zeros(len(index), np.int64)
    np.add.at(sums, where, [loss.loss for loss in losses])
    np.add.at(tokens, where, [loss.n_tokens for loss in losses])
    np.add.at(n_bytes, where, [loss.n_bytes for loss in losses])
    return sums, tokens, n_bytes


# ---------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------
def write_text_losses(file: Path, losses: Sequence[TextLoss]) -> None:
    write_jsonl(file, map(asdict, losses))


def read_text_losses(file: Path) -> list[TextLoss]:
    try:
        return [TextLoss(**row) for row in read_jsonl(file)]
    except TypeError as error:
        raise UserError(f"{file} is damaged ({error}); delete it and measure again.") from error
