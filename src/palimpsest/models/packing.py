"""Several questions as one row with their common beginning only once: less to compute, the same losses.

Chat prompts of short questions share their system turn, often half of all tokens. A causal model computes the same
hidden states there for every question, so one row is enough: the common prefix, then each question's rest, which sees
the prefix and itself and has the positions it had. Nothing is padding.

`Losses` does so where it pays and the model gives the same losses; `SharedPrefix` and `pack` are for callers who want
such rows themselves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from palimpsest.models.anatomy import unwrap
from palimpsest.models.cache import attends_to_everything
from palimpsest.models.loss import IGNORED, right_padded, supervised_losses, supervised_positions, token_losses

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

PREFIX = 0  # the segment that all others see
PAYS = 0.8  # a packed row must cost at most this share of the padded batch
# Mean difference of a token's loss, nats, up to which packed rows count as the same; more, and the model cannot do it.
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 5e-2  # in 32 bits or more; in 16
TRIED_ROWS = 4
PACKABLE = {"input_ids", "attention_mask", "labels", "position_ids"}
SPEECH = {"input_features", "encoder_frames", "frame_counts"}  # of a SpeechLM, which places them before rows are packed


class Losses:
    """`supervised_losses` of one model, faster where rows share their beginning; the values differ by rounding alone.

    Whether the model takes packed rows is tried on the first batch for which they pay, and remembered for the model:
    architectures that know no mask of their own, windows or recurrence, go on with padded batches.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.n_packed = 0  # batches

    def __call__(self, batch: Mapping[str, Any]) -> tuple[Float[Tensor, " supervised"], Int64[Tensor, " supervised"]]:
        supervised = supervised_positions(batch := right_padded(batch))
        packed = _pack_batch(batch, supervised) if _may_pack(self.model, batch) else None
        if packed is None or not packed.pays(_hidden_size(self.model)) or not _can_pack(self.model, batch):
            return supervised_losses(self.model, batch)
        self.n_packed += 1
        n_parts = packed.parts(_hidden_size(self.model))
        if n_parts == 1 or torch.is_grad_enabled() or not _divides(batch):  # a backward gives a gradient once
            return _packed_losses(self.model, batch, packed)
        found = [self._part(batch, rows) for rows in torch.arange(packed.shape[0]).chunk(n_parts)]
        return torch.cat([losses for losses, _ in found]), torch.cat([rows for _, rows in found])

    def _part(
        self, batch: Mapping[str, Any], rows: Int64[Tensor, " row"]
    ) -> tuple[Float[Tensor, " supervised"], Int64[Tensor, " supervised"]]:
        """Of some rows of a batch that packs."""
        part = _rows_of(batch, slice(int(rows[0]), int(rows[-1]) + 1))
        packed = _pack_batch(part, supervised_positions(part))
        losses, of = supervised_losses(self.model, part) if packed is None else _packed_losses(self.model, part, packed)
        return losses, of + int(rows[0])


@dataclass(frozen=True)
class Packed:
    """Where the tokens of a batch (batch, seq) go in one packed row."""

    shape: tuple[int, int]
    place: Int64[Tensor, " seq"]  # of each token of the row in the flattened batch
    position_ids: Int64[Tensor, "1 seq"]
    segments: Int64[Tensor, "1 seq"]
    kept: Int64[Tensor, " supervised"]  # columns of the row that predict a supervised token, by row, then position
    rows: Int64[Tensor, " supervised"]

    def pays(self, hidden: int) -> bool:
        n_rows, length = self.shape
        return _cost(len(self.place), hidden) < PAYS * n_rows * _cost(length, hidden)

    def parts(self, hidden: int) -> int:
        """Into how many packed rows: in a long one every token is compared with those of all other questions."""
        n_rows, shared = self.shape[0], int((self.segments == PREFIX).sum())
        own = len(self.place) - shared
        return min(range(1, n_rows // 2 + 1), key=lambda n: n * _cost(shared + own / n, hidden), default=1)


def _cost(length: float, hidden: int) -> float:
    """Of a row, in operations: those of products grow with its tokens, those of attention with their square."""
    return length * (1 + length / (6 * hidden))


def _divides(batch: Mapping[str, Any]) -> bool:
    """Whether it has its speech row by row; a question of several utterances does not."""
    return len(batch.get("frame_counts", batch["input_ids"])) == len(batch["input_ids"])


def _rows_of(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a batch, with the speech of these alone."""
    n_rows = len(batch["input_ids"])
    return {
        key: value[rows] if isinstance(value, torch.Tensor | list) and len(value) == n_rows else value
        for key, value in batch.items()
    }


def _pack_batch(batch: Mapping[str, Any], supervised: Bool[Tensor, "batch seq_minus_1"]) -> Packed | None:
    """None if there is one row, or rows have nothing in common. The batch is padded on the right."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    n_rows, length = ids.shape
    columns = torch.arange(length, device=ids.device)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    # The prefix leaves each question at least the token that predicts its first target, and speech is no one's prefix.
    first = torch.where(supervised, columns[:-1], length).amin(dim=1)
    same = (ids == ids[:1]).all(dim=0) & (ids >= 0).all(dim=0) & real.all(dim=0) & (columns < first.min())
    n_shared = int(same.long().cumprod(0).sum())
    if n_rows < 2 or n_shared == 0:
        return None
    own = real & (columns >= n_shared)
    prefix = torch.arange(n_shared, device=ids.device)
    place = torch.cat([prefix, own.flatten().nonzero().squeeze(1)])
    # Where the tokens of the batch have gone; those of the other rows' prefixes, to nowhere.
    column_of = torch.full((n_rows * length,), -1, device=ids.device)
    column_of[place] = torch.arange(len(place), device=ids.device)
    at = torch.nn.functional.pad(supervised, (0, 1)).flatten().nonzero().squeeze(1)
    segments = torch.where(torch.arange(len(place), device=ids.device) < n_shared, PREFIX, place // length + PREFIX + 1)
    positions = batch["position_ids"].flatten()[place] if "position_ids" in batch else place % length
    return Packed((n_rows, length), place, positions[None], segments[None], column_of[at], at // length)


def _packed_losses(
    model: nn.Module, batch: Mapping[str, Any], packed: Packed
) -> tuple[Float[Tensor, " supervised"], Int64[Tensor, " supervised"]]:
    inputs: dict[str, Tensor] = {"input_ids": batch["input_ids"]}
    inner: Any = unwrap(model)
    if "frame_counts" in batch:
        inputs = inner.embed(**{key: value for key, value in batch.items() if key in {"input_ids", *SPEECH}})
        model = inner.language_model
    row = {key: value.flatten(0, 1)[packed.place][None] for key, value in inputs.items()}
    logits = SharedPrefix(model)(
        **row, position_ids=packed.position_ids, segments=packed.segments, logits_to_keep=packed.kept
    ).logits[0]
    following = batch["labels"][:, 1:]
    return token_losses(logits, following[following != IGNORED]), packed.rows


# ---------------------------------------------------------------------------------------------------------------------
# Which models take packed rows
# ---------------------------------------------------------------------------------------------------------------------
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _may_pack(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """What can be said without running it: full attention under a mask and positions that are given."""
    inner: Any = unwrap(model)
    if hasattr(inner, "encoder") and hasattr(inner, "embed"):  # a SpeechLM, in speech or not
        if "frame_counts" in batch and inner.adaptor.collapse:
            return False  # which positions are left out is known only when the speech is read
        inner = inner.language_model
        allowed = PACKABLE | SPEECH
    else:
        allowed = PACKABLE
    if any(isinstance(value, torch.Tensor) and key not in allowed for key, value in batch.items()):
        return False
    return (
        takes_places(inner)
        and attends_to_everything(inner)
        and getattr(inner.config, "_attn_implementation", None) in ("sdpa", "eager")
    )


def takes_places(language_model: nn.Module) -> bool:
    """Whether forward takes what packed rows need; that of some audio LLMs (Qwen2-Audio) gives no logits of places."""
    taken = inspect.signature(language_model.forward).parameters
    return {"attention_mask", "position_ids", "logits_to_keep"} <= taken.keys()


def _hidden_size(model: nn.Module) -> int:
    inner: Any = unwrap(model)
    return int(inner.get_input_embeddings().weight.shape[1])


def _can_pack(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Tried once for a model, on a few rows, without gradients."""
    inner = unwrap(model)
    if inner not in _TRIED:
        tried = _rows_of(batch, slice(0, TRIED_ROWS if _divides(batch) else None))
        packed = _pack_batch(tried, supervised_positions(tried))
        if packed is None:
            return False
        with torch.no_grad():
            plain, _ = supervised_losses(model, tried)
            found, _ = _packed_losses(model, tried, packed)
        difference = float((found.double() - plain.double()).abs().mean())
        if not math.isfinite(difference):
            return False  # the plain way says of what
        rounded = torch.is_autocast_enabled(plain.device.type) or next(inner.parameters()).dtype.itemsize < 4
        _TRIED[inner] = difference < (ROUNDED_TOLERANCE if rounded else TOLERANCE)
    return _TRIED[inner]


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows themselves
# ---------------------------------------------------------------------------------------------------------------------
class SharedPrefix(nn.Module):
    """A causal language model that reads packed rows; parameters and names are the model's own."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        input_ids: Int64[Tensor, "batch seq"] | None = None,
        *,
        position_ids: Int64[Tensor, "batch seq"],
        segments: Int64[Tensor, "batch seq"],
        logits_to_keep: Int64[Tensor, " kept"],
        inputs_embeds: Float[Tensor, "batch seq d"] | None = None,
    ) -> Any:
        """The language model's output under a mask that keeps the segments apart."""
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        own = segments[:, :, None] == segments[:, None, :]
        seen = causal & (own | (segments == PREFIX)[:, None, :])  # (batch, query, key)
        dtype = next(self.language_model.parameters()).dtype
        # Additive, because eager attention does not take a boolean mask.
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        given = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        return self.language_model(
            **given,
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
