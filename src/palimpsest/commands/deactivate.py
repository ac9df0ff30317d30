"""palimpsest deactivate: the perplexity of one model without some of its weights, outside a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.files import UserError, require_unwritten, write_json
from palimpsest.models import MODEL
from palimpsest.models.compute import ComputeOption, DeviceOption, DtypeOption
from palimpsest.progress import Reporter

RECORDS = "records.json"


@dataclass(frozen=True)
class Options:
    """Perplexity with the top, bottom and random weights set to zero (Table 1); several ratios give a curve.

    Example: palimpsest deactivate --model MODEL --scores runs/scores --data facts --ratios 0.01,0.1 --out runs/off
    """

    model: Annotated[str, Doc(f"The model that was scored. {MODEL}")]
    scores: Annotated[Path, Doc("Folder written by `palimpsest importance`.")]
    data: Annotated[str, Doc("Question set with answers to measure perplexity on.")]
    out: Annotated[Path, Doc("New folder for records.json.")]
    split: Annotated[str, Doc("Split of the data.")] = "heldout"
    limit: Annotated[int | None, Ge(1)] = None
    ratios: Annotated[str, Doc("Shares of the weights to zero, ascending, comma-separated.")] = "0.03"
    scopes: Annotated[str, Doc("Where the shares are counted: global, per_layer, per_matrix; comma-separated.")] = (
        "global"
    )
    reduction: Annotated[str, Doc("Which of the scores.")] = "signed_sum"
    random_seeds: Annotated[int, Ge(0), Doc("Random masks; each costs as much as one look at the whole model.")] = 10
    batch_size: Annotated[int, Ge(1)] = 8
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    compute: ComputeOption = "auto"


def run(options: Options) -> Iterator[str]:
    """Writes records.json and, for two ratios or more, areas.json; yields the lines of a table.

    Raises UserError for a ratio that is no number, and when the scores are not this model's.
    """
    from palimpsest.data.collate import Collator, batches
    from palimpsest.data.sources import load_examples
    from palimpsest.evaluation.deactivation import areas, deletion_curve
    from palimpsest.importance.scores import Scores
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import choose_device, load_text_model, reading_notes

    require_unwritten(options.out / RECORDS, "a deactivation")
    try:
        ratios = [float(ratio) for ratio in options.ratios.split(",")]
    except ValueError as error:
        raise UserError(f"--ratios {options.ratios} are not numbers; give for example 0.001,0.01,0.1.") from error
    examples = load_examples(options.data, options.split, options.limit)
    scores = Scores.open(options.scores)
    tensors = scores.tensors(options.reduction)
    device, dtype = choose_device(options.device), options.dtype or "float32"
    compute = choose_compute(options.compute, device, weights=dtype, exact=True)
    language_model, processor = load_text_model(options.model, dtype=dtype, device=device)
    scores.check_model(language_model)
    text = partial(batches, Collator(processor, "text"), examples, options.batch_size, language_model.device)
    scopes: Any = options.scopes.split(",")
    with Reporter(1).step(f"deactivation of {options.model}") as advance:
        records = deletion_curve(
            options.model,
            language_model,
            tensors,
            {"text": text},
            ratios=ratios,
            scopes=scopes,
            random_seeds=range(options.random_seeds),
            reduction=options.reduction,
            progress=advance,
            compute=compute.dtype,
        )
    made_in = scores.metadata.get("compute", "float32")
    about = {"compute": {**asdict(compute), "scores": made_in}}
    write_json(options.out / RECORDS, [{**record, **about} for record in records])
    yield from reading_notes(options.model)
    for record in records:
        label = record["condition"] + ("" if record["seed"] is None else f" (seed {record['seed']})")
        share = f"{record['scope']:<10} {100 * record['ratio']:>6g} %"
        yield f"{label:<16} {share} {record['n_removed']:>12} removed   perplexity {record['perplexity']:.4g}"
    yield f"computed in {compute}" + (f"; the scores in {made_in}" if made_in != compute.dtype else "")
    curves = areas(records)
    if curves:
        write_json(options.out / "areas.json", [asdict(curve) for curve in curves])
        yield "area under the curve: rise of the loss, nats per token, mean over the logarithm of the ratio"
    for curve in curves:
        spread = f" ({curve.area_low:+.4f} to {curve.area_high:+.4f} by seed)" if curve.n_seeds > 1 else ""
        yield f"{curve.condition:<16} {curve.scope:<10} {curve.area:+.4f}{spread}"
