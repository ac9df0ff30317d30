"""Answers of a SpeechLM to spoken questions, from cached encoder frames or straight from the recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from palimpsest.data.collate import Batch, Collator, to_device
from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.evaluation.answers import GREEDY, Answer, Answerer, decode_new, end_ids, pad_left
from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM


def speech_answerer(model: SpeechLM, collator: Collator, max_new_tokens: int = 32) -> Answerer:
    """Greedy answers to questions given as speech.

    `collator` is the speech collator whose features hold the questions' recordings. Generation settings are those of
    `text_answerer`: nothing but the end ids is taken from the model's own.
    """
    return _answerer(model, collator.processor.tokenizer, collator.prompts, max_new_tokens)


def recording_answerer(model: SpeechLM, processor: SpeechLMProcessor, max_new_tokens: int = 32) -> Answerer:
    """The same from the examples' recordings, read and encoded batch by batch.

    A recording that cannot be decoded fails alone. Encoder frames are rounded to float16, as the cache of a study
    stores them, so that both give the same answers.
    """
    from palimpsest.models.speech_lm import encode_speech

    pad = processor.tokenizer.pad_token_id

    def prompts(examples: Sequence[Example]) -> Batch:
        waves = []
        for example in examples:
            if example.audio is None:
                raise UserError(f"Question {example.id!r} has no audio; have it spoken first.")
            waves.append(read_audio(example.audio))
        mels, counts = processor.features(waves)
        frames = encode_speech(model.encoder, mels.to(model.encoder.device), counts, processor.speech_length)
        ids = [processor.speech_prompt(int(count) // processor.stack_factor) for count in counts]
        input_ids, attention_mask = pad_left(ids, 0 if pad is None else pad)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "encoder_frames": frames.half().float(),
            "frame_counts": counts,
        }

    return _answerer(model, processor.tokenizer, prompts, max_new_tokens)


def _answerer(
    model: SpeechLM, tokenizer: Any, prompts: Callable[[Sequence[Example]], Batch], max_new_tokens: int
) -> Answerer:
    end = end_ids(model.language_model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0]
    device = model.language_model.device

    def answer(examples: Sequence[Example], modality: Any) -> list[Answer]:
        if modality != "speech":
            raise UserError(f"A speech answerer was asked to answer from {modality}.")
        batch = prompts(examples)
        lengths = batch["attention_mask"].sum(1).tolist()
        batch.pop("ids", None)
        new = model.generate(
            **to_device(batch, device),
            **GREEDY,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
        )
        decoded = decode_new(tokenizer, new.cpu(), end)
        return [Answer(text, n_new, None, int(length)) for (text, n_new), length in zip(decoded, lengths, strict=True)]

    return answer
