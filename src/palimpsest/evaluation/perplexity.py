"""Perplexity on the target answers: exp(total loss / total tokens), never a mean of batch perplexities.

On disk every example's loss is kept, so that two models can be compared paired: `losses-MODALITY.jsonl` has a line per
example, {"id", "loss" (nats, summed over the answer), "n_tokens"}; `losses-MODALITY.json` says what was measured.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import TypedDict

from palimpsest.data.collate import Batch, Collator, batches
from palimpsest.data.examples import Example
from palimpsest.evaluation.finite import not_finite
from palimpsest.files import UserError, hash_value, read_json, write_json, write_jsonl
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.models.loss import each_batch
from palimpsest.models.packing import Losses
from palimpsest.options import require_shape
from palimpsest.parallel import dealt_back, gathered, is_main, world_size
from palimpsest.records import PerplexityRecord

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one example's answer: summed, in nats, over `n_tokens` supervised tokens."""

    loss: float
    n_tokens: int


@dataclass(frozen=True)
class Perplexity:
    """Totals over a data set, and every example's own share so that two models can be compared paired."""

    samples: Mapping[str, SampleLoss]  # by example id, in the order they came

    @property
    def total_loss(self) -> float:
        """Nats over all supervised tokens; fsum, so that the order of the samples does not matter."""
        return math.fsum(sample.loss for sample in self.samples.values())

    @property
    def n_tokens(self) -> int:
        return sum(sample.n_tokens for sample in self.samples.values())

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return self.total_loss / self.n_tokens

    @property
    def perplexity(self) -> float:
        """Infinite where the mean loss is beyond what a float can exponentiate (about 709 nats)."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def perplexity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    compute: Arithmetic = "float32",
    distributed: bool = False,
) -> Perplexity:
    """Perplexity of a model on batches with "labels" and "ids"; see `models.loss.supervised_losses` for both.

    Losses are added in float64, example by example, so the result does not depend on how examples were
    batched beyond the rounding of the forward pass. The model must be in eval mode and the batches on its
    device. `compute` is the arithmetic of the forward pass (models.compute); losses are float32 or wider.

    distributed: `batches` are this rank's share (`parallel.my_share`), with a replica of the model on every rank; all
    must call, and have the result of one process on all batches.

    Raises:
        UserError: one batch in the place of a list, a batch without labels or "ids", an id that comes twice, an
        example without a supervised token or without a finite loss, no batch.
    """
    if model.training:
        raise UserError("Perplexity was asked of a model in training mode; call model.eval() first.")
    losses_of = Losses(model)
    mine: list[list[tuple[str, SampleLoss]]] = []  # batch by batch
    with many_forwards(model, compute):
        for batch in each_batch(batches):
            if "ids" not in batch:
                raise UserError(
                    'Perplexity needs the examples\' ids; put a list of strings under "ids" into every batch.'
                )
            ids: list[str] = list(batch["ids"])
            with torch.inference_mode():
                losses, rows = losses_of(batch)
            totals = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, rows.cpu(), losses.double().cpu())
            counts = torch.bincount(rows.cpu(), minlength=len(ids))
            mine.append([])
            for id, total, count in zip(ids, totals.tolist(), counts.tolist(), strict=True):
                if count == 0:
                    raise UserError(f"Example {id!r} has no supervised token; leave it out or check its labels.")
                if not math.isfinite(total):
                    raise not_finite(model, f"example {id!r}")
                mine[-1].append((id, SampleLoss(total, count)))
    samples: dict[str, SampleLoss] = {}
    for id, sample in itertools.chain.from_iterable(dealt_back(gathered(mine)) if distributed else mine):
        if id in samples:
            raise UserError(f"Example {id!r} comes twice; give every example its own id.")
        samples[id] = sample
    if not samples:
        raise UserError("Perplexity was asked of no examples at all; pass at least one batch.")
    return Perplexity(samples)


def measure_losses(
    model: PreTrainedModel,
    collator: Collator,
    examples: Sequence[Example],
    batch_size: int,
    folder: Path,
    *,
    method: str,
    task: str,
    progress: Callable[[int, int], None] | None = None,
    compute: Arithmetic = "float32",
    distributed: bool = False,
    identity: str | None = None,
) -> PerplexityRecord:
    """The perplexity of `model` on the examples' target answers; writes both files of the modality to `folder`.

    `collator` decides how the questions are put; progress is called as progress(batches done, batches). distributed:
    every rank calls with its replica of the model and measures its share of the batches; rank 0 writes. identity: of
    the model, recorded with the losses.
    """
    modality = collator.modality
    total = -(-len(examples) // batch_size)
    ranks = world_size() if distributed else 1

    def counted() -> Iterator[Batch]:  # made as they are wanted: all of them would fill a device
        made = batches(collator, examples, batch_size, model.device, distributed=distributed)
        for done, batch in enumerate(made):
            if progress is not None:
                progress(min(total, done * ranks), total)
            yield batch

    result = perplexity(model, counted(), compute=compute, distributed=distributed)
    if is_main() or not distributed:
        of_model = {} if identity is None else {"model": identity}
        _write_losses(folder, {"task": task, "modality": modality, "compute": compute, **of_model}, examples, result)
    return {
        "method": method,
        "task": task,
        "modality": modality,
        "n_examples": len(result.samples),
        "n_tokens": result.n_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
    }


def _write_losses(folder: Path, about: Mapping[str, str], examples: Sequence[Example], result: Perplexity) -> None:
    file = folder / f"losses-{about['modality']}.jsonl"
    write_jsonl(file, [{"id": example.id, **asdict(result.samples[example.id])} for example in examples])
    data = hash_value([[e.id, e.question, e.answer] for e in examples])[:12]
    write_json(file.with_suffix(".json"), {"schema": 1, **about, "data": data, "n": len(examples)})


class Binding(TypedDict):
    """What the losses of a file are losses of; it stands beside the file."""

    schema: int
    task: str
    modality: str
    data: str  # identifies questions and answers
    n: int


def read_losses(file: Path) -> tuple[dict[str, Any], Perplexity]:
    """What `measure_losses` wrote: the sidecar and the losses by id.

    Raises:
        UserError: a line is cut, damaged or has no finite loss, lines are missing, or an id comes twice.
    """
    binding = read_json(file.with_suffix(".json"))
    require_shape(binding, Binding, str(file.with_suffix(".json")), "delete it and measure again")
    samples: dict[str, SampleLoss] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            name, sample = row["id"], SampleLoss(float(row["loss"]), row["n_tokens"])
            if type(name) is not str or type(sample.n_tokens) is not int or sample.n_tokens < 1:
                raise ValueError("no id, or no number of tokens")
            if not math.isfinite(sample.loss):
                raise ValueError("no loss")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{file}:{number} is not a line of losses; delete the file and measure again.") from error
        if name in samples:
            raise UserError(f"{file}:{number}: the id {name!r} is there a second time; measure again.")
        samples[name] = sample
    if len(samples) != binding["n"]:
        raise UserError(f"{file} holds {len(samples)} of {binding['n']} losses; delete it and measure again.")
    return binding, Perplexity(samples)
