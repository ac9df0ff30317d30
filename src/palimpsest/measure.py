"""Importance and deactivation of one model on one question set, outside a study."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from palimpsest.data.collate import Collator, batches
from palimpsest.data.records import Example
from palimpsest.data.sources import load_examples
from palimpsest.progress import Reporter
from palimpsest.rundir import write_json


def score_model(
    model: str,
    source: str,
    out: Path,
    *,
    split: str,
    limit: int | None,
    batch_size: int,
    reductions: tuple[str, ...],
) -> Iterator[str]:
    """Score the weights of the transformer layers on `source` as text; writes the scores to `out`.

    Yields lines about the result. Raises UserError for bad input before the model is loaded.
    """
    from palimpsest.importance.estimate import estimate_importance
    from palimpsest.training.methods import layer_totals

    examples = load_examples(source, split, limit)
    language_model, collator = _text_setup(model)
    total = -(-len(examples) // batch_size)
    with Reporter(1).step(f"importance of {model}") as advance:
        scores = estimate_importance(
            language_model,
            batches(collator, examples, batch_size, language_model.device, by_length=False),
            reductions,
            metadata={"scored_model": model, "modality": "text", "source": Path(source).name},
            progress=lambda done, _: advance(done, total),
        )
        scores.save(out)
    yield f"{len(scores.names)} weight matrices, {scores.metadata['n_tokens']} supervised tokens → {out}"
    totals = layer_totals(scores, reductions[0])
    whole = sum(totals.values())
    yield f"share of each layer ({reductions[0]}):"
    yield from (f"  layer {layer:>3}  {100 * value / whole:5.2f} %" for layer, value in totals.items())


def deactivate_model(
    model: str,
    scores_folder: Path,
    source: str,
    out: Path,
    *,
    split: str,
    limit: int | None,
    ratio: float,
    scope: Any,
    reduction: str,
    random_seeds: int,
    batch_size: int,
) -> Iterator[str]:
    """Perplexity of `model` with the top, bottom and random `ratio` of its weights at zero; writes records.json.

    Yields lines of a table. Raises UserError when the scores are not this model's.
    """
    from palimpsest.evaluation.deactivation import deactivation_records
    from palimpsest.importance.scores import Scores

    examples: list[Example] = load_examples(source, split, limit)
    scores = Scores.open(scores_folder)
    tensors = scores.tensors(reduction)
    language_model, collator = _text_setup(model)
    scores.check_model(language_model)
    with Reporter(1).step(f"deactivation of {model}") as advance:
        records = deactivation_records(
            model,
            language_model,
            tensors,
            {"text": partial(batches, collator, examples, batch_size, language_model.device)},
            ratio=ratio,
            scope=scope,
            random_seeds=range(random_seeds),
            reduction=reduction,
            progress=advance,
        )
    write_json(out / "records.json", records)
    for record in records:
        label = record["condition"] + ("" if record["seed"] is None else f" (seed {record['seed']})")
        yield f"{label:<18} {record['n_removed']:>12} removed   perplexity {record['perplexity']:.4g}"


def _text_setup(model: str) -> tuple[Any, Collator]:
    """The language model and a text collator with its own prompt style; only the tokenizer matters for text."""
    from palimpsest.models.loading import load_language_model
    from palimpsest.models.processor import SpeechLMProcessor

    language_model, tokenizer = load_language_model(model)
    return language_model, Collator(SpeechLMProcessor(tokenizer, None), "text")
