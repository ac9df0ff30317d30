"""The cascade: a speech recogniser writes the question down, a text answerer answers what it wrote.

>>> write_down = partial(transcribe, whisper, whisper_processor)  # doctest: +SKIP
>>> answer = cascade_answerer(write_down, text_answerer(language_model, tokenizer))  # doctest: +SKIP
>>> rows = answer_questions(answer, task, "cascade", model=digest, out=path)  # doctest: +SKIP
>>> word_error_rate((row["question"], row["transcript"] or "") for row in rows)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import Answer, Answerer, names_of
from palimpsest.evaluation.finite import finite_logits
from palimpsest.evaluation.scoring import number_words
from palimpsest.evaluation.spoken import recordings
from palimpsest.files import UserError
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.records import Modality

MULTILINGUAL_VOCABULARY = 51865  # of Whisper; English-only checkpoints have fewer tokens and take no language


def transcribe(
    asr_model: Any,
    asr_processor: Any,
    examples: Sequence[Example],
    batch_size: int = 16,
    compute: Arithmetic = "float32",
) -> dict[str, str]:
    """What a `WhisperForConditionalGeneration` understands of the examples' recordings, greedy: id -> English text.

    Raises:
        UserError: an example has no recording, or one that cannot be read; the recogniser gives NaN or infinite logits.
    """
    multilingual = asr_model.config.vocab_size >= MULTILINGUAL_VOCABULARY
    arguments = {"language": "en", "task": "transcribe"} if multilingual else {}
    asr_model.eval()
    written: dict[str, str] = {}
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        features = asr_processor(
            recordings(batch), sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt"
        )
        with torch.inference_mode(), many_forwards(asr_model, compute):
            ids = asr_model.generate(
                features["input_features"].to(asr_model.device, asr_model.dtype),
                attention_mask=features["attention_mask"].to(asr_model.device),
                do_sample=False,
                num_beams=1,
                logits_processor=finite_logits(asr_model, names_of(batch)),
                **arguments,
            )
        texts = asr_processor.batch_decode(ids, skip_special_tokens=True)
        written |= {example.id: text.strip() for example, text in zip(batch, texts, strict=True)}
    return written


def cascade_answerer(write_down: Callable[[Sequence[Example]], dict[str, str]], answer: Answerer) -> Answerer:
    """Transcribe each batch, then answer the transcripts as text.

    The gold question is not used. A recording in which nothing was understood is answered with nothing.
    """

    def answer_transcripts(examples: Sequence[Example], modality: Modality) -> list[Answer]:
        transcripts = write_down(examples)
        audible = [replace(e, question=transcripts[e.id]) for e in examples if transcripts[e.id].strip()]
        answers = answer(audible, "text") if audible else []
        by_id = {e.id: given for e, given in zip(audible, answers, strict=True)}
        return [by_id.get(e.id, Answer("", 0))._replace(transcript=transcripts[e.id]) for e in examples]

    return answer_transcripts


def transcribed_before(transcripts: Mapping[str, str | None]) -> Callable[[Sequence[Example]], dict[str, str]]:
    """`write_down` of `cascade_answerer` from transcripts by id; None stands for a recording that could not be read."""

    def write_down(examples: Sequence[Example]) -> dict[str, str]:
        known = {}
        for example in examples:
            text = transcripts.get(example.id)
            if text is None:
                raise UserError(f"Question {example.id!r} has no transcript: its recording could not be read.")
            known[example.id] = text
        return known

    return write_down


def word_error_rate(pairs: Iterable[tuple[str, str | None]]) -> float:
    """Substitutions, insertions and deletions over all (reference, hypothesis) pairs, per reference word.

    Without a hypothesis, of a question that failed, a pair does not count. Words are those of `scoring.number_words`:
    case, accents, punctuation and the spelling of numbers do not count.
    """
    heard = [(reference, hypothesis) for reference, hypothesis in pairs if hypothesis is not None]
    counts = [(word_errors(reference, hypothesis), len(number_words(reference))) for reference, hypothesis in heard]
    total = sum(n for _, n in counts)
    if total == 0:
        raise UserError("A word error rate needs at least one reference word; pass the questions' own text.")
    return sum(errors for errors, _ in counts) / total


def word_errors(reference: str, hypothesis: str) -> int:
    """Levenshtein distance in words."""
    wanted, found = number_words(reference), number_words(hypothesis)
    row = list(range(len(found) + 1))  # row[j]: distance from the first i wanted words to the first j found ones
    for i, word in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]
