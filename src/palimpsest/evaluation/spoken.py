"""Answers of a SpeechLM to spoken questions, from cached encoder frames or straight from the recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from palimpsest.data.collate import Batch, Collator, to_device
from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.evaluation.answers import (
    Answer,
    Answerer,
    decoded,
    further_turn,
    names_of,
)
from palimpsest.evaluation.finite import finite_logits
from palimpsest.evaluation.generation import generation_settings, pad_left, without_own_settings
from palimpsest.files import UserError
from palimpsest.models.cache import generation_cache
from palimpsest.models.compute import Arithmetic, computing, many_forwards
from palimpsest.models.prompts import pad_id

if TYPE_CHECKING:
    from jaxtyping import Float32
    from numpy import ndarray

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM


def speech_answerer(
    model: SpeechLM, collator: Collator, max_new_tokens: int = 64, compute: Arithmetic = "float32"
) -> Answerer:
    """Greedy answers to questions given as speech.

    `collator` is the speech collator whose features hold the questions' recordings. Generation settings and
    ends of an answer are those of `text_answerer`: nothing but the end ids is taken from the model's own. `compute` is
    the arithmetic.
    """
    return _answerer(model, collator.processor.tokenizer, collator.prompts, max_new_tokens, compute)


def recording_answerer(
    model: SpeechLM, processor: SpeechLMProcessor, max_new_tokens: int = 64, compute: Arithmetic = "float32"
) -> Answerer:
    """The same from the examples' recordings, read and encoded batch by batch.

    A recording that cannot be decoded fails alone. Encoder frames are rounded to float16, as the cache of a study
    stores them, so that both give the same answers.
    """
    from palimpsest.models.speech_lm import encode_speech

    def prompts(examples: Sequence[Example]) -> Batch:
        mels, counts = processor.features(recordings(examples))
        with computing(compute, model.encoder.device):
            frames = encode_speech(model.encoder, mels.to(model.encoder.device), counts, processor.speech_length)
        ids = [processor.speech_prompt(int(count) // processor.stack_factor) for count in counts]
        input_ids, attention_mask = pad_left(ids, pad_id(processor.tokenizer))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "encoder_frames": frames.half().float(),
            "frame_counts": counts,
        }

    return _answerer(model, processor.tokenizer, prompts, max_new_tokens, compute)


def recordings(examples: Sequence[Example]) -> list[Float32[ndarray, " samples"]]:
    """The spoken questions at 16 kHz. Raises UserError for one that is not there or cannot be read."""
    waves = []
    for example in examples:
        if example.audio is None:
            raise UserError(f"Question {example.id!r} has no audio; have it spoken first.")
        waves.append(read_audio(example.audio))
    return waves


def _answerer(
    model: SpeechLM,
    tokenizer: Any,
    prompts: Callable[[Sequence[Example]], Batch],
    max_new_tokens: int,
    compute: Arithmetic,
) -> Answerer:
    settings = generation_settings(model.language_model, tokenizer, max_new_tokens)

    def answer(examples: Sequence[Example], modality: Any) -> list[Answer]:
        if modality != "speech":
            raise UserError(f"A speech answerer was asked to answer from {modality}.")
        batch = prompts(examples)
        batch.pop("ids", None)
        finite = finite_logits(model, names_of(examples))
        language_model = model.language_model
        inputs = to_device(batch, language_model.device)
        with many_forwards(model, compute), without_own_settings(language_model):
            cache = generation_cache(language_model)
            new = model.generate(**inputs, logits_processor=finite, **cache, **settings).cpu()
        lengths = batch["attention_mask"].sum(1).tolist()
        return decoded(tokenizer, new, settings, [None] * len(new), lengths, further_turn(tokenizer))

    return answer
