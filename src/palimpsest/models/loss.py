"""The loss of the project: cross-entropy per token, in nats, at supervised positions, never averaged here.

Sums and divisions are the caller's, made once and in the open: a mean per batch would weigh short sequences
more than long ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from palimpsest.files import UserError
from palimpsest.models.anatomy import unwrap

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor, nn

IGNORED = -100  # the label of a position without a loss
# The tensors of a batch that have one entry per token, (batch, seq, …).
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids", "token_type_ids")


def supervised_losses(
    model: nn.Module, batch: Mapping[str, Any]
) -> tuple[Float[Tensor, " supervised"], Int64[Tensor, " supervised"]]:
    """Cross-entropy of every supervised token of the batch, and the row of the batch each belongs to.

    `model`: causal LM or SpeechLM; its forward(input_ids, attention_mask, …) gives an object with `.logits`.
    `batch` holds input_ids, attention_mask and labels (batch, seq), any other tensors that forward takes, and
    optionally "ids", the names of the rows. labels[:, t + 1] is the target of position t; −100 is ignored.
    Everything must be on the model's device already: nothing is moved, no mode or gradient flag changed.
    On which side a row is padded makes no difference: see `right_padded`.

    Returns (losses, row), ordered by row, then position: losses in nats, float32 (float64 for a float64
    model); row int64 in [0, batch). Where forward has `logits_to_keep`, the head is computed only at the
    columns in which some row has a target.

    Raises UserError for what is no batch or has no labels, for a batch without any supervised label, for a label where
    attention_mask is 0, and for a model whose sequence is not as long as the labels.
    """
    logits, targets, rows = supervised_logits(model, batch)
    return token_losses(logits, targets), rows


def supervised_logits(
    model: nn.Module, batch: Mapping[str, Any]
) -> tuple[Float[Tensor, "supervised vocabulary"], Int64[Tensor, " supervised"], Int64[Tensor, " supervised"]]:
    """(logits that predict every supervised token, these tokens, their rows): what `supervised_losses` is made of."""
    batch = right_padded(batch)
    labels: Tensor = batch["labels"]
    supervised = supervised_positions(batch)
    columns = supervised.any(dim=0).nonzero().squeeze(1)  # (kept,), ascending

    inputs, accepted = forward_inputs(model, batch)
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = columns
    logits: Float[Tensor, "batch kept vocabulary"] = model(**inputs).logits
    if "logits_to_keep" not in accepted and logits.shape[1] == labels.shape[1]:
        logits = logits[:, columns]
    if logits.shape[1] != len(columns):
        raise UserError(
            f"{type(unwrap(model)).__name__} gave logits for {logits.shape[1]} positions instead of "
            f"{len(columns)}; the labels ({labels.shape[1]} here) must be as long as the model's sequence."
        )

    wanted = supervised[:, columns]  # (batch, kept)
    rows = wanted.nonzero()[:, 0]
    targets = labels[:, 1:][:, columns][wanted]
    # index_select, not logits[wanted]: its backward is a plain copy instead of a scatter with accumulation.
    logits = logits.flatten(0, 1).index_select(0, wanted.flatten().nonzero().squeeze(1))
    return logits, targets, rows


def token_losses(
    logits: Float[Tensor, "supervised vocabulary"], targets: Int64[Tensor, " supervised"]
) -> Float[Tensor, " supervised"]:
    """Cross-entropy in nats, float32 or wider."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    return cross_entropy(logits.to(precision), targets, reduction="none")


def supervised_positions(batch: Mapping[str, Any]) -> Bool[Tensor, "batch seq_minus_1"]:
    """Where position t has a target. Raises UserError if none has, and for a target where attention_mask is 0."""
    require_labels(batch)
    labels: Tensor = batch["labels"]
    mask: Tensor | None = batch.get("attention_mask")
    supervised = labels[:, 1:] != IGNORED
    if not supervised.any():
        raise UserError(
            f"No label of the batch{describe_ids(batch)} is supervised, all are {IGNORED}; "
            "check how the labels are masked or leave these examples out."
        )
    if mask is not None and bool((supervised & (mask[:, 1:] == 0)).any()):
        raise UserError(
            f"The batch{describe_ids(batch)} has labels on padding, where attention_mask is 0; "
            f"set these labels to {IGNORED}."
        )
    return supervised


def right_padded(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with the tokens of every row at its beginning, in their order; as it is where they are there already.

    Without positions of its own, a batch is counted from its first column. With padding in front a model with absolute
    positions (GPT-2) would see every token in another place than the text has it, and so would one whose positions are
    scaled by the longest row. Moved are the tensors of `PER_TOKEN`.

    Raises UserError for a batch that has to be moved and holds another tensor (batch, seq).
    """
    require_labels(batch)
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None or not bool(((mask[:, 1:] != 0) & (mask[:, :-1] == 0)).any()):
        return batch
    order = (mask == 0).to(torch.int8).argsort(dim=1, stable=True)  # (batch, seq): real tokens first

    def moved(key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape[:2] != mask.shape:
            return value
        if key in PER_TOKEN:
            index = order.view(*order.shape, *[1] * (value.ndim - 2)).expand_as(value)
            return value.gather(1, index)
        if value.ndim == 2:
            raise UserError(
                f"The batch{describe_ids(batch)} has padding in front of its tokens and a tensor {key!r} that may be "
                "one entry per token; pad it on the right."
            )
        return value

    return {key: moved(key, value) for key, value in batch.items()}


def require_labels(batch: Mapping[str, Any]) -> None:
    """Raise UserError unless `batch` is a dictionary with labels (batch, seq)."""
    if not isinstance(batch, Mapping):
        raise UserError(
            f"A batch is a dictionary with input_ids, attention_mask and labels, not a {type(batch).__name__}; "
            "give a list of such dictionaries."
        )
    labels = batch.get("labels")
    if labels is None:
        raise UserError(
            f"The batch{describe_ids(batch)} has no labels, only {', '.join(map(str, batch)) or 'nothing'}; add labels "
            f"(batch, seq): the token ids, {IGNORED} where no loss is wanted."
        )
    if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
        shape = f"a tensor {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else f"a {type(labels).__name__}"
        raise UserError(f"The labels of the batch{describe_ids(batch)} are {shape}; give a tensor (batch, seq).")


def each_batch(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches one after the other, each with input_ids and labels, padded on the right.

    Raises UserError for one batch in the place of a list of them, and for what is no batch.
    """
    if isinstance(batches, Mapping):
        raise UserError("One batch was given in the place of a list of batches; put it into a list: [batch].")
    for batch in batches:
        require_labels(batch)
        if not isinstance(batch.get("input_ids"), torch.Tensor):
            raise UserError(f"The batch{describe_ids(batch)} has no input_ids; add a tensor (batch, seq) of token ids.")
        yield right_padded(batch)


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Set[str]]:
    """What forward gets of a batch, without labels and without a cache, and the names of what it takes."""
    inputs: dict[str, Any] = {
        key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and key != "labels"
    }
    accepted = inspect.signature(unwrap(model).forward).parameters
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    return inputs, accepted.keys()


def describe_ids(batch: Mapping[str, Any]) -> str:
    """The rows' names for an error message, at most eight: " (q1, q2)"; empty if the batch has no "ids"."""
    ids = [str(name) for name in batch.get("ids", ())]
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return f" ({', '.join(ids[:8])}{more})" if ids else ""
