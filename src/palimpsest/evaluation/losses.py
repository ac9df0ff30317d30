"""Per-example losses on disk, so that the perplexities of two models can be compared paired.

`losses-MODALITY.jsonl` has one line per example, {"id", "loss" (nats, summed over the answer), "n_tokens"};
`losses-MODALITY.json` beside it says what they were measured on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.data.collate import Batch, Collator, batches
from palimpsest.data.records import Example
from palimpsest.evaluation.perplexity import Perplexity, SampleLoss, perplexity
from palimpsest.rundir import UserError, hash_value, read_json, write_json, write_jsonl
from palimpsest.schema import PerplexityRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
) -> PerplexityRecord:
    """The perplexity of `model` on the examples' target answers; writes both files of the modality to `folder`.

    `collator` decides how the questions are put; progress is called as progress(batches done, batches).
    """
    modality = collator.modality
    made = list(batches(collator, examples, batch_size, model.device))

    def counted() -> Iterator[Batch]:
        for done, batch in enumerate(made):
            if progress is not None:
                progress(done, len(made))
            yield batch

    result = perplexity(model, counted())
    losses = [result.samples[example.id] for example in examples]
    write_jsonl(
        folder / f"losses-{modality}.jsonl",
        [{"id": e.id, "loss": s.loss, "n_tokens": s.n_tokens} for e, s in zip(examples, losses, strict=True)],
    )
    data = hash_value([[e.id, e.question, e.answer] for e in examples])[:12]
    write_json(
        folder / f"losses-{modality}.json",
        {"schema": 1, "task": task, "modality": modality, "data": data, "n": len(examples)},
    )
    return record(result, method, task, modality)


def record(result: Perplexity, method: str, task: str, modality: str) -> PerplexityRecord:
    return {
        "method": method,
        "task": task,
        "modality": modality,
        "n_examples": len(result.samples),
        "n_tokens": result.n_tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
    }


def read_losses(file: Path) -> tuple[dict[str, Any], Perplexity]:
    """What `measure_losses` wrote: the sidecar and the losses by id.

    Raises:
        UserError: a line is cut, damaged or has no finite loss, lines are missing, or an id comes twice.
    """
    binding = read_json(file.with_suffix(".json"))
    samples: dict[str, SampleLoss] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            name, sample = str(row["id"]), SampleLoss(float(row["loss"]), int(row["n_tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number} is not a line of losses; delete the file and measure again.") from error
        if name in samples:
            raise UserError(f"{file}:{number}: the id {name!r} is there a second time; measure again.")
        samples[name] = sample
    if len(samples) != binding.get("n"):
        raise UserError(f"{file} holds {len(samples)} of {binding.get('n')} losses; delete it and measure again.")
    return binding, Perplexity(samples)
