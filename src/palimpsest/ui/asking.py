"""One question to the models of a run: the base, each method and the cascade, one model in memory at a time.

>>> for state in ask_everyone(panel, text="What is the capital of France?"):  # doctest: +SKIP
...     print(state.status)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from palimpsest.config import StudyConfig, load_config
from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError
from palimpsest.models.token_settings import WITHOUT_CODEC
from palimpsest.records import BASE, method_of
from palimpsest.report.inputs import method_name
from palimpsest.rundir import checkpoint_of, has_checkpoint

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import Answerer

    Answerers = Callable[[str | None, int], dict["Input", Answerer]]  # (transcript, most tokens) → by input

Input = Literal["text", "speech", "cascade"]
Key = tuple[str, Input]  # (model, how it was asked)
EMPTY = "(empty answer)"
MOST_CHOSEN = 6  # models that are chosen at first
AS = {"text": "the typed question", "speech": "the recording", "cascade": "the transcript"}


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
        """What can be answered, base first; the cascade belongs to the base model."""
        return [(m, i) for m in self.models for i in inputs if i != "cascade" or m == BASE]

    @property
    def first_choice(self) -> tuple[str, ...]:
        """The models that are chosen at first: the base and the first training run of each method, not too many."""
        return tuple(model for model in self.models if method_of(model)[1] == 0)[:MOST_CHOSEN]


@dataclass(frozen=True)
class State:
    """How far the asking is. `answers` grows; an answer that could not be given is a sentence in `refusals`."""

    status: str
    answers: dict[Key, str]
    refusals: dict[Key, str]


class Kept:
    """The model that was asked last, so that it need not be loaded again. Before another is loaded, it goes."""

    def __init__(self) -> None:
        self._of: tuple[str, Answerers] | None = None

    def has(self, model: str) -> bool:
        return self._of is not None and self._of[0] == model

    def load(self, panel: Panel, model: str) -> Answerers:
        if self._of is None or self._of[0] != model:
            self.forget()
            self._of = (model, _load(panel, model))
        return self._of[1]

    def forget(self) -> None:
        from palimpsest.study.workspace import give_back_memory

        self._of = None
        give_back_memory()


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
    panel: Panel,
    *,
    text: str | None = None,
    audio: Path | None = None,
    max_new_tokens: int | None = None,
    models: Sequence[str] | None = None,
    kept: Kept | None = None,
) -> Iterator[State]:
    """Answers, greedy, as a study gives them: to the text, to the recording, or to both.

    Yields a state when a model starts to load, when it starts to answer and when it has answered. What keeps one model
    from answering is said in its place, and the others go on.

    Args:
        models: who is asked; default: all.
        kept: the model that is in memory already, and in the end the one that was asked last.

    Raises:
        UserError: neither text nor a recording, a recording that cannot be read, or no model; before any is loaded.
    """
    kept = kept or Kept()
    text = text if text is not None and text.strip() else ""
    if not text and audio is None:
        raise UserError("Type a question, record one, or choose a file.")
    chosen = [model for model in panel.models if models is None or model in models]
    if not chosen:
        raise UserError("Choose a model to ask.")
    if audio is not None:
        read_audio(audio)
    by_text: tuple[Input, ...] = ("text",) if text else ()
    by_speech: tuple[Input, ...] = ("speech", "cascade") if audio is not None else ()
    example = Example(id="question", question=text, answers=("",), answer="", audio=audio)
    limit = max_new_tokens or panel.config.evaluation.max_new_tokens
    keys = [key for key in panel.keys(by_text + by_speech) if key[0] in chosen]
    state = State("", {}, {key: panel.refusals[key] for key in keys if key in panel.refusals})

    transcript: str | None = None
    if (BASE, "cascade") in keys and (BASE, "cascade") not in state.refusals:
        yield (state := replace(state, status=f"Loading the recogniser {panel.config.models.asr} …"))
        kept.forget()
        try:
            transcript = _transcript(panel, example)
        except _failures() as error:
            state = replace(state, refusals={**state.refusals, (BASE, "cascade"): _sentence(error)})
    asked = list(dict.fromkeys(model for model, how in keys if (model, how) not in state.refusals))
    for number, model in enumerate(asked, 1):
        wanted = [key for key in keys if key[0] == model and key not in state.refusals]
        place = f" ({number} of {len(asked)})" if len(asked) > 1 else ""
        if not kept.has(model):
            yield (state := replace(state, status=f"Loading {method_name(model)}{place} …"))
        try:
            answerers = kept.load(panel, model)(transcript, limit)
        except _failures() as error:
            yield (state := replace(state, refusals=state.refusals | dict.fromkeys(wanted, _sentence(error))))
            continue
        for key in wanted:
            status = f"{method_name(model)} answers {AS[key[1]]}{place} …"
            yield (state := replace(state, status=status))
            try:
                (answer,) = answerers[key[1]]([example], key[1])
            except _failures() as error:
                state = replace(state, refusals={**state.refusals, key: _sentence(error)})
                continue
            heard = f"Heard: {answer.transcript or '(nothing)'}\n\n" if key[1] == "cascade" else ""
            state = replace(state, answers={**state.answers, key: heard + (answer.response or EMPTY)})
        del answerers  # they hold the model, which `kept` lets go before the next is loaded
        yield state
    yield replace(state, status="Done.")


# ----------------------------------------------------------------------------------------------------------
# One model
# ----------------------------------------------------------------------------------------------------------
def _load(panel: Panel, model: str) -> Answerers:
    """The model in memory: what makes, of a transcript of the recording and the most tokens, its answerers by input."""
    from palimpsest.evaluation.answers import text_answerer
    from palimpsest.evaluation.cascade import cascade_answerer, transcribed_before
    from palimpsest.evaluation.spoken import recording_answerer
    from palimpsest.models.loading import is_speech_lm, load_language_model, load_speech_lm, load_tokenizer
    from palimpsest.progress import Reporter
    from palimpsest.study.workspace import Workspace

    models, style = panel.config.models, panel.config.prompt
    ws = Workspace(panel.config, panel.run, Reporter(0, quiet=True))
    compute = ws.compute.dtype
    checkpoint = str(checkpoint_of(panel.run, model))
    if model == BASE:
        language_model, tokenizer = ws.base, load_tokenizer(models.language_model)
        # The recipe may put the base behind an adaptor.
        behind = None if models.adaptor is None else (ws.speech_lm(BASE), ws.processor)
    elif is_speech_lm(checkpoint):
        behind = load_speech_lm(checkpoint, dtype=models.dtype, device=ws.device)
        language_model, tokenizer = behind[0].language_model, behind[1].tokenizer
    else:  # a blend of a language model that was given
        language_model, tokenizer = load_language_model(checkpoint, dtype=models.dtype, device=ws.device)
        behind = None

    def answerers(transcript: str | None, limit: int) -> dict[Input, Answerer]:
        by_text = text_answerer(language_model, tokenizer, limit, style, compute=compute)
        found: dict[Input, Answerer] = {"text": by_text}
        if model == BASE:
            found["cascade"] = cascade_answerer(transcribed_before({"question": transcript}), by_text)
        if behind is not None:
            found["speech"] = recording_answerer(*behind, limit, compute)
        return found

    return answerers


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
