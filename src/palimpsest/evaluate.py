"""Evaluate one model, outside a study: `palimpsest evaluate` on one task, `palimpsest probe` without generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError, hash_value, write_json, write_jsonl
from palimpsest.progress import Advance, Reporter
from palimpsest.records import FloorRecord, Modality, PerplexityRecord

if TYPE_CHECKING:
    from palimpsest.evaluation.tasks import Task


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
    perplexity: bool = False,
    judge_url: str | None = None,
    judge_model: str | None = None,
) -> Iterator[str]:
    """Answer, score, write samples and results to `out`; yields the lines of a small table.

    `model`: any causal LM (text, and transcripts), a SpeechLM or an audio LLM of transformers (speech too).

    `perplexity` also measures the loss of every target answer; a judge's url and model add its accuracy.
    Raises UserError for bad input before the model is loaded.
    """
    from palimpsest.data.speech import speak
    from palimpsest.evaluation.answers import answer_questions, qa_record, summarise
    from palimpsest.evaluation.floors import floor_records
    from palimpsest.evaluation.judge import METRIC, Judge, judge_rows
    from palimpsest.evaluation.tasks import load_task
    from palimpsest.models.loading import fingerprint, model_kind, resolve

    if (judge_url is None) != (judge_model is None):
        raise UserError("A judge needs both --judge-url and --judge-model; give the other one too.")
    if perplexity and modality not in ("text", "speech"):
        raise UserError("A cascade has no perplexity; leave out --perplexity, or use --modality text or speech.")
    judge = Judge(judge_url, judge_model) if judge_url is not None and judge_model is not None else None
    recordings = out / "audio" if modality != "text" else None  # of a table that holds them
    task = load_task(source, split=split, limit=limit, audio=recordings)
    where = resolve(model)
    if modality == "speech" and model_kind(where) == "language_model":
        raise UserError(f"{model} takes no audio; evaluate it with --modality text or cascade.")
    if perplexity and model_kind(where) == "audio_llm":
        raise UserError(f"Perplexity of the audio LLM {model} cannot be measured yet; leave out --perplexity.")
    heard = modality in ("cascade", "text_asr")
    unspoken = modality != "text" and any(example.audio is None for example in task.examples)
    reporter = Reporter(1 + unspoken + perplexity + (judge is not None))
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
            notice=reporter.note,
        )
    records = summarise(rows, model, task, modality)
    floors = floor_records(rows, model, task, modality)
    results: dict[str, Any] = {"schema": 1, "qa": records, "qa_floors": floors}
    results["seconds_per_question"] = sum(row["seconds"] for row in rows) / len(rows)
    if perplexity:
        with reporter.step(f"perplexity from {modality}") as advance:
            measured = _perplexity(where, model, task, modality, out, batch_size, device, advance)
        results["perplexity"] = [measured]
    if judge is not None:
        with reporter.step(f"judged by {judge.model}") as advance:
            judged = judge_rows(judge, rows, out / f"samples-{modality}.judge.jsonl", advance)
        records.append(qa_record(rows, judged.verdicts, model, task, modality, METRIC, judge.version))
        results["judge"] = {"model": judge.model, "version": judge.version, "failed": judged.failed}
    if heard:
        from palimpsest.evaluation.cascade import word_error_rate

        results["word_error_rate"] = word_error_rate((row["question"], row["transcript"] or "") for row in rows)
    write_json(out / f"results-{modality}.json", results)
    by_chance = {(floor["metric"], floor["floor"]): floor for floor in floors}
    for record in records:
        measured_floors = [by_chance.get((record["metric"], kind)) for kind in ("unrelated", "echo_in_sentence")]
        yield (
            f"{record['metric']:<24} {record['correct']:>4}/{record['n']}  {100 * record['accuracy']:5.1f} %  "
            f"[{100 * record['ci_low']:.1f}, {100 * record['ci_high']:.1f}]"
            + "".join(f"  {_floor(floor)}" for floor in measured_floors if floor is not None)
        )
    if perplexity:
        yield (
            f"perplexity               {measured['perplexity']:.4g} ({measured['loss']:.4f} nats per token, "
            f"{measured['n_tokens']} tokens of {measured['n_examples']} answers)"
        )
    if judge is not None and judged.failed:
        first = next(iter(judged.failed))
        yield (
            f"not judged, counted as wrong: {len(judged.failed)} ({', '.join(list(judged.failed)[:5])}), the first "
            f"because {judged.failed[first]} Run again to ask about them again."
        )
    flags = {flag: sum(bool(row[flag]) for row in rows) for flag in ("empty", "refusal", "loop", "failed")}
    yield "answers that are          " + ", ".join(f"{flag}: {count}" for flag, count in flags.items())
    for row in rows:
        if row["failed"]:
            yield f"failed: {row['id']}: {row['error']}"
    if heard:
        yield f"word error rate          {100 * results['word_error_rate']:.1f} %"
    yield f"seconds per question     {results['seconds_per_question']:.2f}"


def _floor(floor: FloorRecord) -> str:
    name = {"unrelated": "unrelated", "echo_in_sentence": "echoed"}[floor["floor"]]
    return f"{name} {100 * floor['value']:.1f} % [{100 * floor['ci_low']:.1f}, {100 * floor['ci_high']:.1f}]"


def _perplexity(
    where: str, model: str, task: Task, modality: Modality, out: Path, batch_size: int, device: str, advance: Advance
) -> PerplexityRecord:
    """The losses of the target answers of a language model (text) or a SpeechLM (speech), loaded once more."""
    from palimpsest.data.collate import Collator
    from palimpsest.data.features import Features, compute_features
    from palimpsest.evaluation.perplexity import measure_losses
    from palimpsest.models.loading import load_speech_lm, load_text_model

    asked: Any
    if modality == "speech":
        asked, processor = load_speech_lm(where, device=device)
        compute_features(asked.encoder, processor, task.examples, out / "features")
        collator = Collator(processor, "speech", Features(out / "features"))
    else:
        asked, processor = load_text_model(where, device=device)
        collator = Collator(processor, "text")
    return measure_losses(
        asked, collator, task.examples, batch_size, out, method=model, task=task.name, progress=advance
    )


def _answerer(where: str, modality: Modality, asr: str, max_new_tokens: int, device: str) -> Any:
    from palimpsest.evaluation.answers import text_answerer
    from palimpsest.models.loading import load_asr, load_audio_llm, load_speech_lm, load_text_model, model_kind

    kind = model_kind(where)
    if kind == "speech_lm" and modality == "speech":
        from palimpsest.evaluation.spoken import recording_answerer

        return recording_answerer(*load_speech_lm(where, device=device), max_new_tokens)
    if kind == "audio_llm":
        from palimpsest.evaluation.audio_llm import audio_llm_answerer

        answer = audio_llm_answerer(*load_audio_llm(where, dtype="auto", device=device), max_new_tokens)
    else:
        language_model, processor = load_text_model(where, device=device)
        answer = text_answerer(language_model, processor.tokenizer, max_new_tokens, processor.style.system)
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
