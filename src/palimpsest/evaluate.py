"""Evaluate one model, outside a study: `palimpsest evaluate` on one task, `palimpsest probe` without generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from palimpsest.progress import Reporter
from palimpsest.rundir import Modality, UserError, hash_value, write_json, write_jsonl


def evaluate_model(
    model: str,
    source: str,
    out: Path,
    *,
    split: str,
    modality: Modality,
    asr: str,
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
    device: str = "auto",
) -> Iterator[str]:
    """Answer, score, write samples and results to `out`; yields the lines of a small table.

    `model`: any causal LM (text, and transcripts), a SpeechLM or an audio LLM of transformers (speech too).

    Raises UserError for bad input before the model is loaded.
    """
    from palimpsest.data.speech import speak
    from palimpsest.evaluation.generate import answer_questions, summarise
    from palimpsest.evaluation.tasks import load_task
    from palimpsest.models.loading import fingerprint, model_kind, resolve

    recordings = out / "audio" if modality != "text" else None  # of a table that holds them
    task = load_task(source, split=split, limit=limit, audio=recordings)
    where = resolve(model)
    if modality == "speech" and model_kind(where) == "language_model":
        raise UserError(f"{model} takes no audio; evaluate it with --modality text or cascade.")
    heard = modality in ("cascade", "text_asr")
    unspoken = modality != "text" and any(example.audio is None for example in task.examples)
    reporter = Reporter(1 + unspoken)
    if unspoken:
        with reporter.step("speaking the questions") as advance:
            task = replace(task, examples=tuple(speak(task.examples, out / "audio", progress=advance)))
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    answerer = _answerer(where, modality, asr, max_new_tokens, device)
    with reporter.step(f"{task.name} from {modality}") as advance:
        rows = answer_questions(
            answerer,
            task,
            modality,
            model=hash_value([fingerprint(model), fingerprint(asr)]) if heard else fingerprint(model),
            out=out / f"samples-{modality}.jsonl",
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=advance,
        )
    records = summarise(rows, model, task, modality)
    results: dict[str, Any] = {"schema": 1, "qa": records}
    results["seconds_per_question"] = sum(row["seconds"] for row in rows) / len(rows)
    if heard:
        from palimpsest.evaluation.cascade import word_error_rate

        results["word_error_rate"] = word_error_rate((row["question"], row["transcript"] or "") for row in rows)
    write_json(out / f"results-{modality}.json", results)
    for record in records:
        yield (
            f"{record['metric']:<24} {record['correct']:>4}/{record['n']}  {100 * record['accuracy']:5.1f} %  "
            f"[{100 * record['ci_low']:.1f}, {100 * record['ci_high']:.1f}]"
        )
    flags = {flag: sum(bool(row[flag]) for row in rows) for flag in ("empty", "refusal", "loop", "failed")}
    yield "answers that are          " + ", ".join(f"{flag}: {count}" for flag, count in flags.items())
    for row in rows:
        if row["failed"]:
            yield f"failed: {row['id']}: {row['error']}"
    if heard:
        yield f"word error rate          {100 * results['word_error_rate']:.1f} %"
    yield f"seconds per question     {results['seconds_per_question']:.2f}"


def _answerer(where: str, modality: Modality, asr: str, max_new_tokens: int, device: str) -> Any:
    from palimpsest.evaluation.generate import text_answerer
    from palimpsest.models.loading import load_asr, load_audio_llm, load_language_model, load_speech_lm, model_kind

    kind = model_kind(where)
    if kind == "speech_lm" and modality == "speech":
        from palimpsest.evaluation.speech import recording_answerer

        return recording_answerer(*load_speech_lm(where, device=device), max_new_tokens)
    if kind == "audio_llm":
        from palimpsest.evaluation.audio_llm import audio_llm_answerer

        answer = audio_llm_answerer(*load_audio_llm(where, dtype="auto", device=device), max_new_tokens)
    else:
        answer = text_answerer(*load_language_model(where, device=device), max_new_tokens)
    if modality in ("text", "speech"):
        return answer
    from palimpsest.evaluation.cascade import cascade_answerer, transcribe

    return cascade_answerer(partial(transcribe, *load_asr(asr, device=device)), answer)


def probe_model(model: str, out: Path, *, batch_size: int) -> Iterator[str]:
    """The retention probe of one model: records.json and pairs.jsonl in `out`; yields the lines of a small table."""
    from palimpsest.evaluation.probe import load_pairs, pair_losses, pairs_version, summarise_probe
    from palimpsest.models.loading import fingerprint, load_language_model, resolve

    resolve(model)
    with Reporter(1).step("probe") as advance:
        losses = pair_losses(*load_language_model(model), load_pairs(), batch_size, progress=advance)
    records = summarise_probe(losses, model)
    write_jsonl(out / "pairs.jsonl", (loss.to_row() for loss in losses))
    write_json(out / "records.json", {"schema": 1, "pairs": pairs_version(), "model": fingerprint(model),
                                      "probe": records})  # fmt: skip
    for record in records:
        yield (
            f"{record['kind']:<14} {record['correct']:>4}/{record['n']:<4} {100 * record['accuracy']:5.1f} %  "
            f"[{100 * record['ci_low']:.1f}, {100 * record['ci_high']:.1f}]  margin {record['margin']:+.2f} nats"
        )
