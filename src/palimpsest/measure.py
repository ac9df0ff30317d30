"""Importance and deactivation of one model on one question set, outside a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from palimpsest.data.collate import Collator, batches
from palimpsest.data.examples import Example
from palimpsest.data.sources import load_examples
from palimpsest.files import UserError, write_json
from palimpsest.progress import Reporter


def score_model(
    model: str,
    source: str,
    out: Path,
    *,
    split: str,
    limit: int | None,
    batch_size: int,
    reductions: tuple[str, ...],
    offload: Literal["cpu"] | Path | None = None,
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
            offload=offload,
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
    ratios: Sequence[str],
    scopes: Sequence[Any],
    reduction: str,
    random_seeds: int,
    batch_size: int,
) -> Iterator[str]:
    """Perplexity of `model` with the top, bottom and random `ratios` of its weights at zero.

    Writes records.json and, for two ratios or more, areas.json. Yields lines of a table. Raises UserError for a
    ratio that is no number, and when the scores are not this model's.
    """
    from palimpsest.evaluation.deactivation import areas, deletion_curve
    from palimpsest.importance.scores import Scores

    try:
        shares = [float(ratio) for ratio in ratios]
    except ValueError as error:
        raise UserError(f"--ratios {','.join(ratios)} are not numbers; give for example 0.001,0.01,0.1.") from error
    examples: list[Example] = load_examples(source, split, limit)
    scores = Scores.open(scores_folder)
    tensors = scores.tensors(reduction)
    language_model, collator = _text_setup(model)
    scores.check_model(language_model)
    with Reporter(1).step(f"deactivation of {model}") as advance:
        records = deletion_curve(
            model,
            language_model,
            tensors,
            {"text": partial(batches, collator, examples, batch_size, language_model.device)},
            ratios=shares,
            scopes=scopes,
            random_seeds=range(random_seeds),
            reduction=reduction,
            progress=advance,
        )
    write_json(out / "records.json", records)
    for record in records:
        label = record["condition"] + ("" if record["seed"] is None else f" (seed {record['seed']})")
        share = f"{record['scope']:<10} {100 * record['ratio']:>6g} %"
        yield f"{label:<16} {share} {record['n_removed']:>12} removed   perplexity {record['perplexity']:.4g}"
    curves = areas(records)
    if curves:
        write_json(out / "areas.json", [asdict(curve) for curve in curves])
        yield "area under the curve: rise of the loss, nats per token, mean over the logarithm of the ratio"
    for curve in curves:
        spread = f" ({curve.area_low:+.4f} to {curve.area_high:+.4f} by seed)" if curve.n_seeds > 1 else ""
        yield f"{curve.condition:<16} {curve.scope:<10} {curve.area:+.4f}{spread}"


def _text_setup(model: str) -> tuple[Any, Collator]:
    """The language model and a text collator that writes its prompts."""
    from palimpsest.models.loading import load_text_model

    language_model, processor = load_text_model(model)
    return language_model, Collator(processor, "text")
