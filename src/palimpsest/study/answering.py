"""The steps of a study that ask a model something: its answers by modality, the cascade, and the retention probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.config import EvaluationTask
from palimpsest.files import hash_value, read_jsonl, write_json, write_jsonl
from palimpsest.progress import Advance
from palimpsest.records import BASE, Modality
from palimpsest.study.workspace import Workspace, folder_of

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import Answerer


def answers(ws: Workspace, name: str, task: EvaluationTask, modality: Modality) -> None:
    """NAME/samples/TASK-MODALITY/: an answer to every question, as text, as speech or as a transcript.

    "text_asr" takes the transcripts of the cascade, which must have been made.
    """
    cascade_step = f"{BASE}/samples/{task.name}-cascade"

    def make() -> Answerer:
        from palimpsest.evaluation.cascade import cascade_answerer, heard_before
        from palimpsest.evaluation.spoken import speech_answerer

        if modality == "speech":
            limit = ws.config.evaluation.max_new_tokens
            return speech_answerer(ws.speech_lm(name), ws.collator("speech", f"task-{task.name}"), limit)
        if modality == "text":
            return _text(ws, name)
        rows = read_jsonl(ws.dir.path / cascade_step / "samples.jsonl")
        return cascade_answerer(heard_before({row["id"]: row["transcript"] for row in rows}), _text(ws, name))

    went_in = cascade_step if modality == "text_asr" else "features"
    _answer(ws, name, task, modality, make, {went_in: ws.fingerprint(went_in)})


def cascade(ws: Workspace, task: EvaluationTask) -> None:
    """base/samples/TASK-cascade/: the recogniser's transcript answered by the base model, the reference for S2T."""

    def make() -> Answerer:
        from palimpsest.evaluation.cascade import cascade_answerer, transcribe
        from palimpsest.models.loading import load_asr

        asr, asr_processor = load_asr(str(ws.config.models.asr), device=ws.device)
        return cascade_answerer(partial(transcribe, asr, asr_processor), _text(ws, BASE))

    _answer(ws, BASE, task, "cascade", make, {"asr": ws.model_hash(str(ws.config.models.asr))})


def probe(ws: Workspace, name: str) -> None:
    """NAME/probe/: right against wrong continuations, the losses of every pair and their summary."""
    if not ws.config.evaluation.probe:
        return
    from palimpsest.evaluation.probe import pairs_version

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.probe import load_pairs, pair_losses, summarise_probe

        losses = pair_losses(ws.language_model(name), ws.processor.tokenizer, load_pairs(), progress=advance)
        write_jsonl(folder / "pairs.jsonl", (loss.to_row() for loss in losses))
        write_json(folder / "records.json", summarise_probe(losses, name))

    ws.step(f"{folder_of(name)}/probe", "probe", {"model": ws.model_inputs(name), "pairs": pairs_version()}, write)


def _text(ws: Workspace, name: str) -> Answerer:
    from palimpsest.evaluation.answers import text_answerer

    limit = ws.config.evaluation.max_new_tokens
    return text_answerer(ws.language_model(name), ws.processor.tokenizer, limit, ws.config.prompt.system)


def _answer(
    ws: Workspace,
    name: str,
    task: EvaluationTask,
    modality: Modality,
    make: Callable[[], Answerer],
    more: dict[str, Any],
) -> None:
    options = ws.config.evaluation
    inputs = {
        "model": ws.model_inputs(name, heard=modality == "speech"),
        "data": ws.fingerprint("data"),
        "task": task.name,
        "options": {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size},
        "prompt": asdict(ws.config.prompt),
        **more,
    }

    def write(folder: Path, advance: Advance) -> None:
        from palimpsest.evaluation.answers import answer_questions

        answer_questions(
            make(),
            ws.task(task),
            modality,
            model=hash_value(inputs["model"]),
            out=folder / "samples.jsonl",
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            progress=advance,
            notice=ws.reporter.note,
        )

    ws.step(f"{folder_of(name)}/samples/{task.name}-{modality}", "samples", inputs, write)
