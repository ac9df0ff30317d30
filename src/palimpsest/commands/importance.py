"""palimpsest importance: Eq. 2 of one model on one question set, outside a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.files import UserError, existing, require_unwritten, write_json
from palimpsest.models import MODEL
from palimpsest.models.compute import ComputeOption, DeviceOption, DtypeOption
from palimpsest.progress import Reporter

if TYPE_CHECKING:
    from palimpsest.data.examples import Example
    from palimpsest.importance.scores import Scores
    from palimpsest.records import PartRecord

PARTS = "parts.json"
OUTSIDE = "outside_layers"


@dataclass(frozen=True)
class Options:
    """Score every weight of the transformer layers on questions given as text, or spoken: |θ·∂L/∂θ| (Eq. 2).

    Example: palimpsest importance --model embedded:smollm2-135m-instruct --data facts --limit 64 --out runs/scores
    """

    model: Annotated[str, Doc(MODEL)]
    data: Annotated[str, Doc("Question set with answers: facts or a manifest.")]
    out: Annotated[Path, Doc("New folder for the scores.")]
    split: Annotated[str, Doc("Split of the data.")] = "train"
    modality: Annotated[
        Literal["text", "speech"],
        Doc("speech: of a speech LLM, and also the rows of its embedding and what stands for speech, apart."),
    ] = "text"
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
    from palimpsest.data.sources import load_examples
    from palimpsest.importance.reduce import chosen_reductions
    from palimpsest.importance.scores import SCORES_FILE
    from palimpsest.models.anatomy import layer_index
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import choose_device, reading_notes
    from palimpsest.training.methods import layer_totals

    require_unwritten(options.out / SCORES_FILE, "scores")
    reductions, offload = tuple(chosen_reductions(options.reductions.split(","))), options.offload
    if offload and offload != "cpu" and not existing(Path(offload)).is_dir():
        raise UserError(f"--offload {offload} is a file, or lies under one; give cpu or a folder.")
    spoken = options.modality == "speech"
    if spoken:
        _require_speech(options.model)
    audio = options.out / "audio" if spoken else None
    examples = load_examples(options.data, options.split, options.limit, audio=audio)
    device, dtype = choose_device(options.device), options.dtype or "float32"
    compute = choose_compute(options.compute, device, weights=dtype, exact=True)
    unspoken = spoken and any(example.audio is None for example in examples)
    reporter, total = Reporter(1 + unspoken), -(-len(examples) // options.batch_size)
    if unspoken:
        from palimpsest.data.speech import speak

        with reporter.step("speaking the questions") as advance:
            examples = speak(examples, options.out / "audio", progress=advance)
    with reporter.step(f"importance of {options.model}") as advance:
        about: dict[str, Any] = {
            "reductions": reductions,
            "offload": "cpu" if offload == "cpu" else Path(offload) if offload else None,
            "metadata": {
                **{"scored_model": options.model, "modality": options.modality, "source": Path(options.data).name},
                "compute_reason": compute.reason,
            },
            "progress": lambda done, _: advance(done, total),
            "compute": compute.dtype,
        }
        scores = (_of_speech if spoken else _of_text)(options, examples, dtype, device, about)
        parts = _saved(scores, options, spoken)
    if not spoken:
        yield from reading_notes(options.model)
    n_matrices = sum(layer_index(name) is not None for name in scores.names)
    yield f"{n_matrices} weight matrices, {scores.metadata['n_tokens']} supervised tokens → {options.out}"
    yield f"computed in {compute}"
    yield from _in_words(parts, reductions[0])
    totals = layer_totals(scores, reductions[0])
    whole = sum(totals.values())
    yield f"share of each layer ({reductions[0]}):"
    yield from (f"  layer {layer:>3}  {100 * value / whole:5.2f} %" for layer, value in totals.items())


def _require_speech(model: str) -> None:
    from palimpsest.models.given import require_recordings
    from palimpsest.models.loading import model_kind, resolve

    kind = model_kind(resolve(model))
    if kind != "speech_lm":
        what = "takes no audio" if kind == "language_model" else "is no speech LLM of palimpsest"
        raise UserError(f"{model} {what}; score it with --modality text.")
    require_recordings(model)


def _of_text(
    options: Options, examples: Sequence[Example], dtype: Any, device: str, about: Mapping[str, Any]
) -> Scores:
    from palimpsest.data.collate import Collator, batches
    from palimpsest.importance.estimate import estimate_importance
    from palimpsest.models.loading import load_text_model

    language_model, processor = load_text_model(options.model, dtype=dtype, device=device)
    made = batches(Collator(processor, "text"), examples, options.batch_size, language_model.device, by_length=False)
    return estimate_importance(language_model, made, **about)


def _of_speech(
    options: Options, examples: Sequence[Example], dtype: Any, device: str, about: Mapping[str, Any]
) -> Scores:
    from palimpsest.analysis.parts import estimate_parts
    from palimpsest.data.collate import Collator, batches
    from palimpsest.data.in_loop import Recordings, encode_batch
    from palimpsest.models.loading import load_speech_lm

    model, processor = load_speech_lm(options.model, dtype=dtype, device=device)
    collator = Collator(processor, "speech", Recordings(processor, examples))
    made = batches(collator, examples, options.batch_size, device, by_length=False)
    frames = (encode_batch(it, model.encoder, processor.speech_length, about["compute"]) for it in made)
    return estimate_parts(model, frames, **about)


def _saved(scores: Scores, options: Options, spoken: bool) -> list[PartRecord]:
    """OUT has the scores of the layers, as other commands take them; OUT/outside_layers those of the rest."""
    if not spoken:
        scores.save(options.out)
        return []
    from palimpsest.analysis.parts import in_layers_alone, part_records

    parts = part_records(options.model, scores)
    write_json(options.out / PARTS, parts)
    in_layers_alone(scores, False).save(options.out / OUTSIDE)
    in_layers_alone(scores).save(options.out)
    return parts


def _in_words(parts: Sequence[PartRecord], reduction: str) -> Iterator[str]:
    rows = [part for part in parts if part["reduction"] == reduction]
    if rows:
        yield f"share of each part ({reduction}), {PARTS}:"
    for part in rows:
        reached = "" if part["n_rows"] is None else f"; {part['n_reached']:,} of {part['n_rows']:,} rows reached"
        yield (
            f"  {part['part'].replace('_', ' '):<9} {100 * part['share']:6.2f} %  {part['n_parameters']:>13,} weights, "
            f"{part['mean']:.2e} each{reached}"
        )
