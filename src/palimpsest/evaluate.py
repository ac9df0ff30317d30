"""Evaluate one model on one task, outside a study: `palimpsest evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from palimpsest.data.sources import load_examples
from palimpsest.progress import Reporter
from palimpsest.rundir import UserError, write_json


def evaluate_model(
    model: str,
    source: str,
    out: Path,
    *,
    split: str,
    modality: Literal["text", "speech", "cascade"],
    asr: str,
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[str]:
    """Answer, score, write samples.jsonl and results.json to `out`; yields the lines of a small table.

    Raises UserError for bad input before the model is loaded.
    """
    from palimpsest.data.speech import speak
    from palimpsest.evaluation.generate import answer_questions, summarise
    from palimpsest.evaluation.tasks import Task
    from palimpsest.models.loading import fingerprint, is_speech_lm, resolve

    recordings = out / "audio" if modality != "text" else None  # of a table that holds them
    examples = load_examples(source, split, limit, audio=recordings)
    where = resolve(model)
    if modality == "speech" and not is_speech_lm(where):
        raise UserError(f"{model} is no speech LLM; evaluate it with --modality text or cascade.")
    reporter = Reporter(2 if modality != "text" else 1)
    if modality != "text" and any(example.audio is None for example in examples):
        with reporter.step("speaking the questions") as advance:
            examples = speak(examples, out / "audio", progress=advance)
    task = Task(Path(source.rpartition(":")[2]).stem, tuple(examples))
    answerer = _answerer(where, examples, modality, asr, max_new_tokens, out)
    with reporter.step(f"{task.name} from {modality}") as advance:
        rows = answer_questions(
            answerer,
            task,
            modality,
            model=fingerprint(model),
            out=out / f"samples-{modality}.jsonl",
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=advance,
        )
    records = summarise(rows, model, task, modality)
    results: dict[str, Any] = {"schema": 1, "qa": records}
    if modality == "cascade":
        from palimpsest.evaluation.cascade import word_error_rate

        results["word_error_rate"] = word_error_rate((row["question"], row["transcript"] or "") for row in rows)
    write_json(out / f"results-{modality}.json", results)
    for record in records:
        yield (
            f"{record['metric']:<24} {record['correct']:>4}/{record['n']}  {100 * record['accuracy']:5.1f} %  "
            f"[{100 * record['ci_low']:.1f}, {100 * record['ci_high']:.1f}]"
        )
    if modality == "cascade":
        yield f"word error rate          {100 * results['word_error_rate']:.1f} %"


def _answerer(where: str, examples: Any, modality: str, asr: str, max_new_tokens: int, out: Path) -> Any:
    from palimpsest.evaluation.generate import text_answerer
    from palimpsest.models.loading import load_asr, load_language_model, load_speech_lm

    if modality == "speech":
        from palimpsest.data.collate import Collator
        from palimpsest.data.features import Features, compute_features
        from palimpsest.evaluation.speech import speech_answerer

        speech_lm, processor = load_speech_lm(where)
        compute_features(speech_lm.encoder, processor, examples, out / "features")
        collator = Collator(processor, "speech", Features(out / "features"))
        return speech_answerer(speech_lm, collator, max_new_tokens)
    language_model, tokenizer = load_language_model(where)
    text = text_answerer(language_model, tokenizer, max_new_tokens)
    if modality == "text":
        return text
    from palimpsest.evaluation.cascade import cascade_answerer, transcribe

    recogniser, asr_processor = load_asr(asr)
    return cascade_answerer(lambda group: transcribe(recogniser, asr_processor, group), text)
