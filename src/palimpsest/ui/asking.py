"""One question to every model of a run: the base, each method and the cascade, one model in memory at a time.

>>> for state in ask_everyone(panel, text="What is the capital of France?"):  # doctest: +SKIP
...     print(state.status)
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from palimpsest.config import StudyConfig, load_config
from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError
from palimpsest.models.token_settings import WITHOUT_CODEC
from palimpsest.records import BASE
from palimpsest.report.inputs import method_name
from palimpsest.rundir import checkpoint_of, has_checkpoint

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import Answerer

Input = Literal["text", "speech", "cascade"]
Key = tuple[str, Input]  # (model, how it was asked)
EMPTY = "(empty answer)"


@dataclass(frozen=True)
class Panel:
    """Who can be asked in a run, and why the others cannot."""

    run: Path
    config: StudyConfig
    refusals: dict[Key, str]  # a sentence each

    @property
    def models(self) -> tuple[str, ...]:
        return (BASE, *self.config.runs)

    def keys(self, inputs: tuple[Input, ...]) -> list[Key]:
        """What is to be answered, base first; the cascade belongs to the base model."""
        return [(m, i) for m in self.models for i in inputs if i != "cascade" or m == BASE]


@dataclass(frozen=True)
class State:
    """How far the asking is. `answers` grows; an answer that could not be given is a sentence in `refusals`."""

    status: str
    answers: dict[Key, str]
    refusals: dict[Key, str]


def open_panel(run: Path) -> Panel:
    """Read study.yaml and see which checkpoints are there; nothing is loaded.

    Raises:
        UserError: no study.yaml, or a damaged one.
    """
    if not (run / "study.yaml").is_file():
        raise UserError(f"{run} holds no study.yaml; give the run directory of a study.")
    config = load_config(run / "study.yaml")
    refusals: dict[Key, str] = {}
    if config.models.adaptor is None:
        refusals[BASE, "speech"] = "The base model takes no speech: ask it by text, or see the cascade."
    if config.models.asr is None:
        refusals[BASE, "cascade"] = "The study names no recogniser (models.asr), so there is no cascade."
    tokens = config.speech.tokens
    for name, method in config.runs.items():
        if config.runs[config.origin_of(name)].modality == "text":
            refusals[name, "speech"] = f"{method_name(name)} was tuned on text alone and takes no speech."
        if tokens is not None and tokens.kind == "codec" and config.speech_of(name) == "tokens":
            refusals[name, "speech"] = f"{method_name(name)} {WITHOUT_CODEC}; ask it by text."
        if not has_checkpoint(run, name):
            absent = f"methods/{name}/checkpoint is not there: the study has not trained {method_name(name)} yet."
            if method.checkpoint is not None:
                absent = f"{method_name(name)} was given and is not in the run; palimpsest ask --model asks it."
            refusals |= {(name, "text"): absent, (name, "speech"): absent}
    return Panel(run, config, refusals)


def ask_everyone(
    panel: Panel, *, text: str | None = None, audio: Path | None = None, max_new_tokens: int | None = None
) -> Iterator[State]:
    """Answers, greedy, as a study gives them: to the text, to the recording, or to both.

    Yields a state when a model starts to load and when it has answered. What keeps one model from answering is said
    in its place, and the others go on.

    Raises:
        UserError: neither text nor a recording, or a recording that cannot be read; before any model is loaded.
    """
    text = text if text is not None and text.strip() else ""
    if not text and audio is None:
        raise UserError("Type a question, record one, or choose a file.")
    if audio is not None:
        read_audio(audio)
    by_text: tuple[Input, ...] = ("text",) if text else ()
    by_speech: tuple[Input, ...] = ("speech", "cascade") if audio is not None else ()
    example = Example(id="question", question=text, answers=("",), answer="", audio=audio)
    limit = max_new_tokens or panel.config.evaluation.max_new_tokens
    keys = panel.keys(by_text + by_speech)
    state = State("", {}, {key: panel.refusals[key] for key in keys if key in panel.refusals})

    transcript: str | None = None
    if (BASE, "cascade") in keys and (BASE, "cascade") not in state.refusals:
        yield (state := replace(state, status=f"Loading the recogniser {panel.config.models.asr} …"))
        try:
            transcript = _transcript(panel, example)
        except _failures() as error:
            state = replace(state, refusals={**state.refusals, (BASE, "cascade"): _sentence(error)})
    for model in panel.models:
        wanted = [key for key in keys if key[0] == model and key not in state.refusals]
        if not wanted:
            continue
        yield (state := replace(state, status=f"Loading {method_name(model)} …"))
        answers, refusals = _answers(panel, wanted, example, transcript, limit)
        state = State(state.status, {**state.answers, **answers}, {**state.refusals, **refusals})
        gc.collect()  # the room is needed by the next model
        yield state
    yield replace(state, status="Done.")


# ----------------------------------------------------------------------------------------------------------
# One model
# ----------------------------------------------------------------------------------------------------------
def _answers(
    panel: Panel, wanted: list[Key], example: Example, transcript: str | None, limit: int
) -> tuple[dict[Key, str], dict[Key, str]]:
    """What one model answers, and why it does not."""
    try:
        answerers = _load(panel, wanted[0][0], transcript, limit)
    except _failures() as error:
        return {}, dict.fromkeys(wanted, _sentence(error))
    answers: dict[Key, str] = {}
    refusals: dict[Key, str] = {}
    for key in wanted:
        how = key[1]
        try:
            (answer,) = answerers[how]([example], how)
        except _failures() as error:
            refusals[key] = _sentence(error)
            continue
        heard = f"Heard: {answer.transcript or '(nothing)'}\n\n" if how == "cascade" else ""
        answers[key] = heard + (answer.response or EMPTY)
    return answers, refusals


def _load(panel: Panel, model: str, transcript: str | None, limit: int) -> dict[Input, Answerer]:
    from palimpsest.evaluation.answers import text_answerer
    from palimpsest.evaluation.cascade import cascade_answerer, transcribed_before
    from palimpsest.evaluation.spoken import recording_answerer
    from palimpsest.models.loading import is_speech_lm, load_language_model, load_speech_lm, load_tokenizer
    from palimpsest.progress import Reporter
    from palimpsest.study.workspace import Workspace

    models, style = panel.config.models, panel.config.prompt
    ws = Workspace(panel.config, panel.run, Reporter(0, quiet=True))
    compute = ws.compute.dtype
    answerers: dict[Input, Answerer] = {}
    if model == BASE:
        by_text = text_answerer(ws.base, load_tokenizer(models.language_model), limit, style, compute=compute)
        answerers["cascade"] = cascade_answerer(transcribed_before({"question": transcript}), by_text)
        if models.adaptor is not None:  # the recipe puts the base behind this adaptor
            answerers["speech"] = recording_answerer(ws.speech_lm(BASE), ws.processor, limit, compute)
    else:
        checkpoint = str(checkpoint_of(panel.run, model))
        if not is_speech_lm(checkpoint):  # a blend of a language model that was given
            loaded = load_language_model(checkpoint, dtype=models.dtype, device=ws.device)
            return {"text": text_answerer(*loaded, limit, style, compute=compute)}
        speech_lm, processor = load_speech_lm(checkpoint, dtype=models.dtype, device=ws.device)
        by_text = text_answerer(speech_lm.language_model, processor.tokenizer, limit, style, compute=compute)
        answerers["speech"] = recording_answerer(speech_lm, processor, limit, compute)
    return {"text": by_text, **answerers}


def _transcript(panel: Panel, example: Example) -> str:
    from palimpsest.evaluation.cascade import transcribe
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.loading import choose_device, load_asr

    models = panel.config.models
    device = choose_device(models.device)
    compute = choose_compute(models.compute, device, weights=models.dtype).dtype
    return transcribe(*load_asr(str(models.asr), device=device), [example], compute=compute)[example.id]


def _failures() -> tuple[type[Exception], ...]:
    """What is one model's trouble and not a defect: its files, its limits, the memory."""
    import torch

    return (UserError, OSError, ValueError, MemoryError, torch.OutOfMemoryError)


def _sentence(error: Exception) -> str:
    return f"Could not answer: {' '.join(str(error).split()) or type(error).__name__}"
