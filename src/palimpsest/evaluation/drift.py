"""Drift: how far a tuned model's next-token distributions are from its base's, on text that the base wrote itself.

For every token x_t of a text (own_text.py), with p the base's distribution given what stands before it and q the tuned
model's, both over the whole vocabulary and exact:

    kl           Σ_v p(v)·(log p(v) − log q(v))      what the tuned model lost of what the base would have written
    reverse_kl   Σ_v q(v)·(log q(v) − log p(v))      what it would write that the base would not
    agreement    do both have the same most likely token?
    loss         −log p(x_t) and −log q(x_t); as x_t was drawn from p, their mean difference estimates kl

Where one vocabulary has more rows than the other, both distributions are those of the rows in common, renormalised,
and what the tuned model gives to the others is reported as `new_tokens_share`.

Shapes: tokens = of the texts of a batch, vocabulary = rows in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from palimpsest.evaluation.finite import not_finite
from palimpsest.evaluation.own_text import OwnText
from palimpsest.files import UserError, read_jsonl, write_jsonl
from palimpsest.intervals import bootstrap_ratio
from palimpsest.models.anatomy import unwrap
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.models.given import differing_tokens
from palimpsest.models.loss import IGNORED, supervised_logits
from palimpsest.parallel import by_ranks, world_size
from palimpsest.records import DriftRecord

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64
    from torch import Tensor, nn
    from transformers import PreTrainedModel

AT_ONCE, ON_CPU = 64, 4  # tokens whose distributions are held in float64; on a CPU what stays in its cores' caches
MEASURES = ("kl", "reverse_kl", "agreement", "loss_base", "loss", "new_tokens_share")
ALL = "all"  # the class of every token
BUCKETS = ((1, 1), (2, 8), (9, 32), (33, None))  # positions in a text


class VocabularyError(UserError):
    """The two models' tokens are not the same, so that their distributions cannot be compared."""


@dataclass(frozen=True)
class TextDrift:
    """One text: a number for every token of it, in order."""

    id: str
    kl: tuple[float, ...]
    reverse_kl: tuple[float, ...]
    agreement: tuple[float, ...]  # 1 or 0
    loss_base: tuple[float, ...]
    loss: tuple[float, ...]
    new_tokens_share: tuple[float, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
def measure_drift(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    texts: Sequence[OwnText],
    *,
    batch_size: int = 8,
    compute: Arithmetic = "float32",
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
    passes: BasePasses | None = None,
) -> list[TextDrift]:
    """The drift of every text, in their order. Both models are causal language models in eval mode, on one device.

    Only the tokens that were sampled count, never a prompt or padding. In float32 the numbers do not depend on
    `batch_size` beyond rounding; a model against itself gives exactly 0. progress(texts done, texts).
    passes: of this base in this arithmetic, kept between calls: the next tuned model's drift takes less time.
    distributed: every rank calls with replicas of both, measures its share of the batches and has the drift of all.

    Raises UserError for NaN or infinite logits, and for a text with a token that one of the models does not have.
    """
    highest = max(id for text in texts for id in (*text.prompt_ids, *text.ids))
    if highest >= (n_ids := len(tuned.get_input_embeddings().weight)):
        raise VocabularyError(f"a text has the token {highest}, and the tuned model has {n_ids}; it cannot read that.")
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].prompt_ids) - len(texts[i].ids), i))
    done, ranks = 0, world_size() if distributed else 1
    of_base = supervised_logits if passes is None else passes.logits

    def measured(start: int) -> list[tuple[int, TextDrift]]:
        nonlocal done
        chosen = order[start : start + batch_size]
        batch = batch_of([texts[i] for i in chosen], next(base.parameters()).device)
        logits_base, targets, rows = of_base(base, batch)
        logits, _, _ = supervised_logits(tuned, batch)
        columns = _compare(logits_base, logits, targets)
        for measure in ("loss_base", "loss"):
            if not bool(torch.isfinite(columns[measure]).all()):
                raise not_finite(base if measure == "loss_base" else tuned, f"a text of {batch['ids']}")
        done += len(chosen) * ranks
        if progress is not None:
            progress(min(done, len(texts)), len(texts))
        own = [
            {name: tuple(column[rows.cpu() == row].tolist()) for name, column in columns.items()}
            for row in range(len(chosen))
        ]
        return [(i, TextDrift(texts[i].id, **values)) for i, values in zip(chosen, own, strict=True)]

    with torch.inference_mode(), many_forwards(base, compute), many_forwards(tuned, compute):
        parts = by_ranks(measured, range(0, len(order), batch_size), distributed=distributed)
    found = dict(itertools.chain.from_iterable(parts))
    return [found[i] for i in range(len(texts))]


class BasePasses:
    """What the base's last layer gave at the sampled tokens of each batch, on the CPU: the base is run once a batch.

    The second time its own forward gets that in place of what its layers would give, so that head, scaling and soft
    caps stay whatever the architecture makes of them, and logits are the same to the bit. A base whose layers give
    more than hidden states is run every time. Of one base with unchanged weights, in one arithmetic.
    """

    def __init__(self) -> None:
        self._hidden: dict[bytes, tuple[type, Tensor]] = {}

    def logits(
        self, base: nn.Module, batch: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "supervised vocabulary"], Int64[Tensor, " supervised"], Int64[Tensor, " supervised"]]:
        """`supervised_logits` of the base; the batch is one of `batch_of`."""
        inner = unwrap(base)
        layers: nn.Module | None = getattr(inner, getattr(inner, "base_model_prefix", "") or "-", None)
        if layers is None:
            return supervised_logits(base, batch)
        key = b"".join(batch[name].cpu().numpy().tobytes() for name in ("input_ids", "labels"))
        places = (batch["labels"] != IGNORED).roll(-1, dims=1)  # of the tokens that predict one that was sampled
        if key in self._hidden:
            with _gives(layers, *self._hidden[key], places):
                return supervised_logits(base, batch)
        outputs: list[Any] = []
        hook = layers.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            found = supervised_logits(base, batch)
        finally:
            hook.remove()
        if len(outputs) == 1 and (hidden := _hidden_alone(outputs[0])) is not None:
            self._hidden[key] = type(outputs[0]), hidden[places].cpu()
        return found


def _hidden_alone(output: Any) -> Float[Tensor, "batch seq hidden"] | None:
    """The hidden states, if the layers gave nothing else: no losses of routers, no states of a recurrence."""
    from transformers.utils import ModelOutput  # here: whoever only reads drifts need not wait for it

    there = [key for key, value in output.items() if value is not None] if isinstance(output, ModelOutput) else []
    return output["last_hidden_state"] if there == ["last_hidden_state"] else None


@contextmanager
def _gives(
    layers: nn.Module, output: type, hidden: Float[Tensor, "supervised hidden"], places: Bool[Tensor, "batch seq"]
) -> Iterator[None]:
    """Within the block `layers` compute nothing and give these hidden states, 0 at the places that nobody asks for."""
    full = torch.zeros(*places.shape, hidden.shape[1], dtype=hidden.dtype, device=places.device)
    full[places] = hidden.to(places.device)
    own = layers.__dict__.get("forward")  # accelerate may have set one
    layers.forward = lambda *_args, **_inputs: output(last_hidden_state=full)
    try:
        yield
    finally:
        layers.__dict__.pop("forward")
        if own is not None:
            layers.forward = own


def batch_of(texts: Sequence[OwnText], device: torch.device | str) -> dict[str, Any]:
    """The texts as rows, padded on the right; labels are the sampled tokens alone."""
    width = max(len(text.prompt_ids) + len(text.ids) for text in texts)

    def rows(make: Callable[[OwnText], list[int]], fill: int) -> Tensor:
        return torch.tensor([(row := make(text)) + [fill] * (width - len(row)) for text in texts], device=device)

    return {
        "input_ids": rows(lambda text: [*text.prompt_ids, *text.ids], 0),
        "attention_mask": rows(lambda text: [1] * (len(text.prompt_ids) + len(text.ids)), 0),
        "labels": rows(lambda text: [IGNORED] * len(text.prompt_ids) + list(text.ids), IGNORED),
        "ids": [text.id for text in texts],
    }


def _compare(
    base: Float[Tensor, "tokens vocabulary_base"],
    tuned: Float[Tensor, "tokens vocabulary_tuned"],
    targets: Int64[Tensor, " tokens"],
) -> dict[str, Float[Tensor, " tokens"]]:
    """Every measure of every token, float64 on the CPU."""
    common = min(base.shape[1], tuned.shape[1])
    n_parts = -(-len(targets) // (ON_CPU if base.device.type == "cpu" else AT_ONCE))
    # In parts of about the same size: torch adds up a row that is alone in another order.
    each = zip(*(rows.tensor_split(n_parts) for rows in (base, tuned, targets)), strict=True)
    parts = [_divergences(_wide(p), _wide(q), at, common) for p, q, at in each]
    return {name: torch.cat([part[name] for part in parts]) for name in MEASURES}


def _divergences(
    base: Float[Tensor, "tokens vocabulary_base"],
    tuned: Float[Tensor, "tokens vocabulary_tuned"],
    targets: Int64[Tensor, " tokens"],
    common: int,
) -> dict[str, Float[Tensor, " tokens"]]:
    log_p, log_q = base[:, :common].log_softmax(-1), tuned[:, :common].log_softmax(-1)
    at = targets.to(log_p.device)[:, None]
    new = torch.zeros(len(tuned), dtype=tuned.dtype, device=tuned.device)
    if tuned.shape[1] > common:
        new = tuned.softmax(-1)[:, common:].sum(-1)
    measures = {
        "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).to(log_p.dtype),
        "loss_base": -log_p.gather(1, at).squeeze(1),
        "loss": -log_q.gather(1, at).squeeze(1),
        "new_tokens_share": new,
    }
    gap = log_p - log_q
    measures["kl"] = log_p.exp_().mul_(gap).sum(-1)  # in place, from here on they are p and q
    measures["reverse_kl"] = -log_q.exp_().mul_(gap).sum(-1)
    return {name: column.cpu() for name, column in measures.items()}


def _wide(logits: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


# ---------------------------------------------------------------------------------------------------------------------
# Are the tokens the same?
# ---------------------------------------------------------------------------------------------------------------------
def require_same_tokens(base: Any, tuned: Any) -> None:
    """Raise VocabularyError unless each id that both tokenizers have is the same token in both, or an added one."""
    if found := differing_tokens(base, tuned):
        id, (ours, theirs) = next(iter(found.items()))
        raise VocabularyError(
            f"its tokens are not the base's ({len(found)} differ, the first is {id}: {theirs!r} instead of {ours!r}), "
            "so the distributions cannot be compared; compare the loss of general text per byte."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Classes of tokens, and means with intervals
# ---------------------------------------------------------------------------------------------------------------------
def token_classes(tokenizer: Any, text: OwnText) -> dict[str, list[bool]]:
    """Which of the text's tokens are in which class: all, a bucket of positions, a kind of word."""
    n = len(text.ids)
    classes = {ALL: [True] * n}
    for first, last in BUCKETS:
        name = f"token {first}" if first == last else f"tokens {first}-{last or ''}"
        classes[name] = [first <= position <= (last or n) for position in range(1, n + 1)]
    marked = _in_marked_words(tokenizer, text.ids)
    classes["words with a capital or digit"] = marked
    classes["other words"] = [not it for it in marked]
    return classes


def _in_marked_words(tokenizer: Any, ids: Sequence[int]) -> list[bool]:
    """Whether each token is part of a word, between blanks, with a capital letter or a digit."""
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    marked = [False] * len(whole)
    start = 0
    for i in range(len(whole) + 1):
        if i == len(whole) or whole[i].isspace():
            word = whole[start:i]
            marked[start:i] = [any(c.isupper() or c.isdigit() for c in word)] * len(word)
            start = i + 1
    starts = [0, *ends[:-1]]
    return [any(marked[a:b]) for a, b in zip(starts, ends, strict=True)]


def summarise_drift(
    drifts: Sequence[TextDrift],
    texts: Sequence[OwnText],
    classes: Sequence[Mapping[str, Sequence[bool]]],
    *,
    model: str,
    base: str,
    seed: int,
) -> list[DriftRecord]:
    """A record for each kind of text and class of tokens that at least two texts have.

    classes: of each text, `token_classes`. seed: of the bootstrap over texts.
    """
    if [drift.id for drift in drifts] != [text.id for text in texts]:
        raise UserError("The drift is of other texts; measure it again.")
    records: list[DriftRecord] = []
    for kind in dict.fromkeys(text.kind for text in texts):
        of = [i for i, text in enumerate(texts) if text.kind == kind]
        for name in classes[of[0]]:
            totals, counts = [], []
            for i in of:
                inside = np.asarray(classes[i][name], dtype=bool)
                if inside.any():
                    totals.append([float(np.asarray(getattr(drifts[i], m))[inside].sum()) for m in MEASURES])
                    counts.append(int(inside.sum()))
            if len(counts) > 1:
                records.append(_record(np.array(totals), np.array(counts), model, base, kind, name, seed))
    return records


def _record(totals: Any, counts: Any, model: str, base: str, kind: str, name: str, seed: int) -> DriftRecord:
    """totals: (texts, measures), sums over each text's tokens of the class; counts: (texts,)."""
    difference = totals[:, MEASURES.index("loss")] - totals[:, MEASURES.index("loss_base")]
    every = np.column_stack([totals, difference])
    value = dict(zip((*MEASURES, "loss_difference"), (every.sum(axis=0) / counts.sum()).tolist(), strict=True))
    bounds = bootstrap_ratio(every, counts, seed)
    low, high = (dict(zip(value, row.tolist(), strict=True)) for row in bounds)
    return {
        "model": model,
        "base": base,
        "text": kind,
        "tokens": name,
        "n_texts": len(counts),
        "n_tokens": int(counts.sum()),
        "kl": value["kl"],
        "kl_ci_low": low["kl"],
        "kl_ci_high": high["kl"],
        "reverse_kl": value["reverse_kl"],
        "reverse_kl_ci_low": low["reverse_kl"],
        "reverse_kl_ci_high": high["reverse_kl"],
        "agreement": value["agreement"],
        "agreement_ci_low": low["agreement"],
        "agreement_ci_high": high["agreement"],
        "loss_base": value["loss_base"],
        "loss": value["loss"],
        "loss_difference": value["loss_difference"],
        "loss_difference_ci_low": low["loss_difference"],
        "loss_difference_ci_high": high["loss_difference"],
        "new_tokens_share": value["new_tokens_share"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------
def write_drift(file: Path, drifts: Sequence[TextDrift]) -> None:
    write_jsonl(file, map(asdict, drifts))


def read_drift(file: Path) -> list[TextDrift]:
    try:
        rows = read_jsonl(file)
        return [TextDrift(row["id"], **{name: tuple(map(float, row[name])) for name in MEASURES}) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it and measure again.") from error
