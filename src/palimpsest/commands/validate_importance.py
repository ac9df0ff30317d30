"""palimpsest validate-importance: the scores of a model against exact ablation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.files import locked
from palimpsest.models import MODEL
from palimpsest.models.compute import Compute, DeviceOption


@dataclass(frozen=True)
class Options:
    """Ablate a stratified sample of weights exactly (Eq. 1) and say how well each reduction ranks them.

    Example: palimpsest validate-importance --model embedded:smollm2-135m-instruct --data facts --out runs/validation
    """

    model: Annotated[str, Doc(MODEL)]
    data: Annotated[str, Doc("Question set with answers: facts or a manifest.")]
    out: Annotated[Path, Doc("Folder for the measurements and records.json; started again, continues.")]
    splits: Annotated[str, Doc("Scored on the first, ablated on each; comma-separated.")] = "train,heldout"
    limit: Annotated[int, Ge(1), Doc("Questions per split to ablate on; time grows with it.")] = 8
    score_limit: Annotated[int | None, Ge(1), Doc("Also score on so many questions.")] = None
    weights: Annotated[int, Ge(1), Doc("Weights to ablate, one by one.")] = 2000
    reductions: Annotated[str, Doc("Comma-separated.")] = "signed_sum,per_batch_abs,per_sequence_abs,fisher"
    batch_size: Annotated[int, Ge(1), Doc("Of the scores; matters to per_batch_abs.")] = 4
    dtype: Annotated[Literal["float32", "float64"], Doc("Of the ablations.")] = "float32"
    seed: Annotated[int, Ge(0)] = 0
    device: DeviceOption = "auto"
    compute: Annotated[Compute, Doc("Arithmetic of the scores; of the ablations --dtype.")] = "float32"


def run(options: Options) -> Iterator[str]:
    with locked(options.out):
        yield from _run(options)


def _run(options: Options) -> Iterator[str]:
    from palimpsest.ablation.validation import table, validate_importance
    from palimpsest.models.loading import reading_notes

    records = validate_importance(
        options.model,
        options.data,
        options.out,
        splits=options.splits.split(","),
        limit=options.limit,
        score_limit=options.score_limit,
        n_weights=options.weights,
        reductions=options.reductions.split(","),
        batch_size=options.batch_size,
        dtype=options.dtype,
        seed=options.seed,
        device=options.device,
        compute=options.compute,
    )
    yield from reading_notes(options.model)
    yield from table(records)
