"""palimpsest ask: one question to one model, as speech or as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from palimpsest.evaluation.tasks import NewTokensOption
from palimpsest.files import UserError
from palimpsest.models import MODEL
from palimpsest.models.compute import ComputeOption, DeviceOption, DtypeOption
from palimpsest.progress import Reporter

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import Answer


@dataclass(frozen=True)
class Options:
    """Ask a speech LLM one question, as speech or as text; any causal LM answers text.

    Without --model it is the small speech LLM that comes with palimpsest.

    Example: palimpsest ask --audio question.wav
    """

    model: Annotated[
        str, Doc(f"A speech LLM, e.g. runs/demo/methods/lora/checkpoint; with --text any model. {MODEL}")
    ] = "embedded:smollm2-135m-speech"
    audio: Annotated[Path | None, Doc("The question as a recording (wav, flac, …; up to 30 s).")] = None
    text: Annotated[str | None, Doc("The question as text.")] = None
    max_new_tokens: NewTokensOption = 64
    device: DeviceOption = "auto"
    dtype: DtypeOption = None
    compute: ComputeOption = "auto"


def run(options: Options) -> Iterator[str]:
    given = ask(options)
    yield given.response
    if given.cut:
        Reporter(1).note(f"the answer was cut at {options.max_new_tokens} new tokens; raise --max-new-tokens.")


def answer(options: Options) -> str:
    """The text of what `ask` gives."""
    return ask(options).response


def ask(options: Options) -> Answer:
    """The greedy answer. Speech needs a SpeechLM's folder; text goes to any causal LM, or to the one inside.

    Raises UserError unless exactly one of `audio` and `text` is given, for audio that cannot be read, and for a model
    that gives NaN or infinite logits.
    """
    from palimpsest.data.examples import Example
    from palimpsest.data.speech import read_audio
    from palimpsest.evaluation.answers import text_answerer
    from palimpsest.evaluation.spoken import recording_answerer
    from palimpsest.models.compute import choose_compute
    from palimpsest.models.given import require_recordings
    from palimpsest.models.loading import choose_device, is_speech_lm, load_speech_lm, load_text_model, resolve

    model, limit = options.model, options.max_new_tokens
    if (options.audio is None) == (options.text is None):
        raise UserError("Ask either with --audio FILE or with --text QUESTION.")
    device, dtype = choose_device(options.device), options.dtype or "float32"
    compute = choose_compute(options.compute, device, weights=dtype).dtype
    if options.text is not None:
        if not options.text.strip():
            raise UserError("The question given with --text is empty.")
        language_model, processor = load_text_model(model, dtype=dtype, device=device)
        asked = text_answerer(language_model, processor.tokenizer, limit, processor.style, compute=compute)
        return asked([Example("question", options.text, ("",), "")], "text")[0]

    assert options.audio is not None
    read_audio(options.audio)  # before the model is loaded: a bad file is known at once
    if not is_speech_lm(resolve(model)):
        raise UserError(
            f"{model} is no speech LLM, so it takes no speech; give a methods/NAME/checkpoint folder of a run."
        )
    require_recordings(model)
    asked = recording_answerer(*load_speech_lm(model, dtype=dtype, device=device), limit, compute)
    return asked([Example("question", "", ("",), "", audio=options.audio)], "speech")[0]
