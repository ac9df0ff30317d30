"""One question to one model, as speech or as text."""

from __future__ import annotations

from pathlib import Path

from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError
from palimpsest.models.loading import is_speech_lm, load_speech_lm, load_text_model, resolve


def answer(model: str, *, audio: Path | None = None, text: str | None = None, max_new_tokens: int = 64) -> str:
    """The greedy answer. Speech needs a SpeechLM's folder; text goes to any causal LM, or to the one inside.

    Raises UserError unless exactly one of `audio` and `text` is given, and for audio that cannot be read.
    """
    if (audio is None) == (text is None):
        raise UserError("Ask either with --audio FILE or with --text QUESTION.")
    if text is not None:
        if not text.strip():
            raise UserError("The question given with --text is empty.")
        from palimpsest.evaluation.answers import text_answerer

        language_model, processor = load_text_model(model)
        example = Example(id="question", question=text, answers=("",), answer="")
        asked = text_answerer(language_model, processor.tokenizer, max_new_tokens, processor.style.system)
        return asked([example], "text")[0].response

    assert audio is not None
    wave = read_audio(audio)  # before the model is loaded: a bad file is known at once
    if not is_speech_lm(resolve(model)):
        raise UserError(f"{model} is no speech LLM, so it cannot hear; give a methods/NAME/checkpoint folder of a run.")
    from palimpsest.evaluation.answers import GREEDY, decode_new, end_ids

    speech_lm, processor = load_speech_lm(model)
    end = end_ids(speech_lm.language_model, processor.tokenizer)
    new = speech_lm.generate(
        **processor(audio=wave),
        **GREEDY,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end[0],
    )
    return decode_new(processor.tokenizer, new, end)[0][0]
