"""Answers of a SpeechLM to spoken questions, from cached encoder frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from palimpsest.data.collate import Collator, to_device
from palimpsest.data.records import Example
from palimpsest.evaluation.generate import GREEDY, Answer, Answerer, decode_new, end_ids
from palimpsest.rundir import UserError

if TYPE_CHECKING:
    from palimpsest.models.speech_lm import SpeechLM


def speech_answerer(model: SpeechLM, collator: Collator, max_new_tokens: int = 32) -> Answerer:
    """Greedy answers to questions given as speech.

    `collator` is the speech collator whose features hold the questions' recordings. Generation settings are those of
    `text_answerer`: nothing but the end ids is taken from the model's own.
    """
    tokenizer = collator.processor.tokenizer
    end = end_ids(model.language_model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end[0]
    device = model.language_model.device

    def answer(examples: Sequence[Example], modality: Any) -> list[Answer]:
        if modality != "speech":
            raise UserError(f"A speech answerer was asked to answer from {modality}.")
        batch = collator.prompts(examples)
        lengths = batch["attention_mask"].sum(1).tolist()
        batch.pop("ids")
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
