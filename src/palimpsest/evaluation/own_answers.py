"""What a base says to the training questions, as answers to train on: self-generated targets.

A model that learns to say from speech what its base says to the same words learns to listen, and not another way to
answer (AudioChatLlama, Fathullah et al. 2024; DeSTA2, Lu et al. 2024). The base is asked as a task of text is
(answers.py); here is what its answers become. Examples that ask the same question, such as changed copies of a
recording, share one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from palimpsest.data.examples import Example
from palimpsest.evaluation.scoring import words
from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import SampleRow
    from palimpsest.models.processor import SpeechLMProcessor

# A sentence ends with one of these, and the quotes and brackets that it closes, in front of a blank or the end of the
# text. Marks of scripts without blanks need none.
SENTENCE_END = re.compile(
    r"[.!?\u2026\u061f\u06d4\u0964]+[\"'\u2019\u201d\u00bb)\]]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019\uff09]*"
)
LIST_NUMBER = re.compile(r"\s*\W*\d+")  # what stands in front of the stop of "2." on its line
GOLD, FAILED, EMPTY, NO_END, JOINED = (
    "no gold answer with a letter or digit",
    "not answered",
    "empty answer",
    "cut before the end of a sentence",
    "joined with the prompt by the tokenizer",
)


@dataclass(frozen=True)
class Learned:
    """The examples with the base's answers, and the ids of those left out, by reason."""

    examples: list[Example]
    left_out: dict[str, list[str]]
    n_answers: int  # of different questions
    n_cut: int  # of these: stopped at the limit of tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "n_answers": self.n_answers,
            "n_cut": self.n_cut,
            "n_examples": len(self.examples),
            "n_left_out": {reason: len(ids) for reason, ids in self.left_out.items()},
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        """For a note; "" where nothing was left out."""
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in self.left_out.items())
        n = sum(map(len, self.left_out.values()))
        return f"{n} of {n + len(self.examples)} examples are left out of own answers: {reasons}." if n else ""


def questions_of(examples: Iterable[Example]) -> list[Example]:
    """One example of every question, without its recording: what the base is asked.

    None whose gold answers no rule could score (`Task` refuses them).
    """
    found: dict[str, Example] = {}
    for example in examples:
        if example.question not in found and any(map(words, example.answers)):
            found[example.question] = replace(example, audio=None, voice=None, augmentation=None, fault=None)
    return list(found.values())


def learned(examples: Sequence[Example], rows: Iterable[SampleRow], processor: SpeechLMProcessor) -> Learned:
    """The examples with what the base answered to their questions as `answer`; their gold `answers` stay.

    Training adds an end of turn, so that an answer which stopped at the limit is shortened to its last sentence end.

    Raises UserError where no example is left.
    """
    by_question = {row["question"]: row for row in rows}
    kept: list[Example] = []
    left_out: dict[str, list[str]] = {}
    for example in examples:
        answer, reason = _answer_or_reason(by_question.get(example.question))
        if answer is not None and not _can_follow(processor, example.question, answer):
            answer, reason = None, JOINED
        if answer is None:
            left_out.setdefault(reason, []).append(example.id)
        else:
            kept.append(replace(example, answer=answer))
    found = Learned(kept, left_out, len(by_question), sum(row.get("cut", False) for row in by_question.values()))
    if not kept:
        raise UserError(
            f"The base's own answers leave no example to train on ({str(found).removesuffix('.')}); give "
            "evaluation.max_new_tokens more room, or set answers to gold, and start again with --changed."
        )
    return found


def _answer_or_reason(row: SampleRow | None) -> tuple[str | None, str]:
    if row is None:
        return None, GOLD
    if row["failed"]:
        return None, FAILED
    if row["empty"]:
        return None, EMPTY
    if not row.get("cut", False):
        return row["response"], ""
    whole = to_last_sentence_end(row["response"])
    return (whole, "") if words(whole) else (None, NO_END)


def to_last_sentence_end(text: str) -> str:
    """The text up to and with its last sentence end; "" where there is none.

    The number of a list ("2.") ends no sentence, nor does a stop behind a digit that the text breaks off after: it may
    be the point of 3.14.
    """
    for end in reversed(list(SENTENCE_END.finditer(text))):
        before = text[: end.start()]
        number = LIST_NUMBER.fullmatch(before.rpartition("\n")[2]) is not None
        broken_off = end.end() == len(text) and end.group() == "." and before[-1:].isdigit()
        if not number and not broken_off:
            return text[: end.end()]
    return ""


def _can_follow(processor: SpeechLMProcessor, question: str, answer: str) -> bool:
    """Whether the answer can be trained on: some tokenizers join its beginning with the end of the prompt."""
    try:
        processor.sequence(question, answer)
    except UserError:
        return False
    return True
