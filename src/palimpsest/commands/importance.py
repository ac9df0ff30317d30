"""palimpsest importance: Eq. 2 of one model on one question set, outside a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.files import require_unwritten
from palimpsest.models import MODEL
from palimpsest.models.compute import ComputeOption, DeviceOption, DtypeOption
from palimpsest.progress import Reporter


@dataclass(frozen=True)
class Options:
    """Score every weight of the transformer layers on questions given as text: |θ·∂L/∂θ| (Eq. 2).

    Example: palimpsest importance --model embedded:smollm2-135m-instruct --data facts --limit 64 --out runs/scores
    """

    model: Annotated[str, Doc(MODEL)]
    data: Annotated[str, Doc("Question set with answers: facts or a manifest.")]
    out: Annotated[Path, Doc("New folder for the scores.")]
    split: Annotated[str, Doc("Split of the data.")] = "train"
    limit: Annotated[int | None, Ge(1), Doc("Only so many examples.")] = None
    batch_size: Annotated[int, Ge(1)] = 8
    reductions: Annotated[str, Doc("Comma-separated: signed_sum, per_batch_abs, per_sequence_abs, fisher.")] = (
        "signed_sum,per_batch_abs"
    )
    offload: Annotated[str | None, Doc("Keep the sums in host memory (cpu) or in a memory-mapped file (a folder).")] = (
        None
    )
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    compute: ComputeOption = "auto"


def run(options: Options) -> Iterator[str]:
    """Writes the scores and yields the layers' shares. Raises UserError for bad input before the model is loaded."""
    from palimpsest.data.collate import Collator, batches
    from palimpsest.data.sources import load_examples
    from palimpsest.importance.estimate import estimate_importance
    from palimpsest.importance.scores import SCORES_FILE
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import choose_device, load_text_model, reading_notes
    from palimpsest.training.methods import layer_totals

    require_unwritten(options.out / SCORES_FILE, "scores")
    examples = load_examples(options.data, options.split, options.limit)
    reductions, offload = tuple(options.reductions.split(",")), options.offload
    device, dtype = choose_device(options.device), options.dtype or "float32"
    compute = choose_compute(options.compute, device, weights=dtype, exact=True)
    language_model, processor = load_text_model(options.model, dtype=dtype, device=device)
    collator, size = Collator(processor, "text"), options.batch_size
    total = -(-len(examples) // size)
    with Reporter(1).step(f"importance of {options.model}") as advance:
        scores = estimate_importance(
            language_model,
            batches(collator, examples, size, language_model.device, by_length=False),
            reductions,
            offload="cpu" if offload == "cpu" else Path(offload) if offload else None,
            metadata={
                **{"scored_model": options.model, "modality": "text", "source": Path(options.data).name},
                "compute_reason": compute.reason,
            },
            progress=lambda done, _: advance(done, total),
            compute=compute.dtype,
        )
        scores.save(options.out)
    yield from reading_notes(options.model)
    yield f"{len(scores.names)} weight matrices, {scores.metadata['n_tokens']} supervised tokens → {options.out}"
    yield f"computed in {compute}"
    totals = layer_totals(scores, reductions[0])
    whole = sum(totals.values())
    yield f"share of each layer ({reductions[0]}):"
    yield from (f"  layer {layer:>3}  {100 * value / whole:5.2f} %" for layer, value in totals.items())
