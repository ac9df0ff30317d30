"""A task: questions with gold answers, how they are put to a model, and the rule that scores the answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.data.examples import Example
from palimpsest.evaluation.scoring import METRIC_VERSION, METRICS, PRIMARY, words
from palimpsest.files import UserError, hash_value

NewTokensOption = Annotated[int, Ge(1), Doc("Most new tokens of an answer; a longer one is cut.")]

TASK_VERSION = "1"  # raised whenever the same examples would be put to a model in another way


@dataclass(frozen=True)
class Task:
    """What is asked and how it is judged; everything an accuracy depends on except the model.

    `instruction` is a text put in front of every question given as text (None: the question alone, as the
    paper's T2T most likely has it). With speech the instruction belongs to the model's processor.
    """

    name: str
    examples: tuple[Example, ...]
    instruction: str | None = None
    metric: str = PRIMARY  # the one that is reported first; all metrics are recorded

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            known = ", ".join(METRICS)
            raise UserError(f"{self.name} asks for the unknown metric {self.metric!r}; use one of {known}.")
        if not self.examples:
            raise UserError(f"{self.name} has no questions; check the file and the limit it was read with.")
        repeated = [id for id, count in Counter(e.id for e in self.examples).items() if count > 1]
        if repeated:
            raise UserError(
                f"{self.name} has two questions with the id {repeated[0]!r}; give every question its own id."
            )
        for example in self.examples:
            if not example.question.strip():
                raise UserError(f"Question {example.id!r} of {self.name} is empty; write it out or leave it out.")
            if not any(words(gold) for gold in example.answers):
                raise UserError(
                    f"Question {example.id!r} of {self.name} has no gold answer with a letter or digit; "
                    "give it one or leave it out."
                )

    @property
    def version(self) -> str:
        """Changes with the questions, golds, instruction and scoring rules; behind a +, with the recordings' names.

        Answers to the written questions are comparable where the part before the + is the same (`text_version`).
        """
        content = [[e.id, e.question, list(e.answers)] for e in self.examples]
        version = f"{TASK_VERSION}.{METRIC_VERSION}-{hash_value([content, self.instruction, self.metric])[:12]}"
        recordings = [None if e.audio is None else e.audio.name for e in self.examples]
        return version if not any(recordings) else f"{version}+{hash_value(recordings)[:8]}"


def text_version(version: str) -> str:
    """The part of a task's version that answers to written questions depend on."""
    return version.partition("+")[0]
