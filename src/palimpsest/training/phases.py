"""The adaptor first: an optional phase of training in which only the adaptor learns, before the method's own.

A fresh adaptor sends noise into the language model, and the first steps of full fine-tuning then move weights to cope
with noise. Training the adaptor alone first avoids that (LLaVA's order; beyond the paper, which trains
both together). With target `repeat` the model learns in this phase to write down what is said instead of answering.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.files import UserError
from palimpsest.training.batching import EpochBatches, require_budget, sequence_lengths
from palimpsest.training.methods import Method, rules_for
from palimpsest.training.replay import MixedBatches, MixedCollator, TextRow, fitting
from palimpsest.training.rules import Rule
from palimpsest.training.settings import Settings, n_steps

if TYPE_CHECKING:
    from palimpsest.data.collate import Collator
    from palimpsest.data.examples import Example

PhaseName = Literal["adaptor", "method"]
ADAPTOR_ONLY: tuple[Rule, ...] = ((r"^encoder\.", None), (r"^adaptor\.", 1.0), (r".*", None))


@dataclass(frozen=True)
class Phase:
    """What one Trainer run needs of a phase."""

    name: PhaseName
    learning_rate: float
    rules: Sequence[Rule]
    examples: Sequence[Example]
    collator: Collator
    batches: EpochBatches | MixedBatches
    steps: int  # optimizer steps
    before: int  # those of the phase before
    text: Sequence[TextRow] = ()  # that is replayed between the examples
    keeps_frozen: bool = False  # what is frozen stays so, unless a rule names it: what is added decides what it trains

    @property
    def rows(self) -> list[Any]:
        """What the indices of `batches` mean."""
        return [*self.examples, *self.text]

    @property
    def collate(self) -> Callable[[Sequence[Any]], dict[str, Any]]:
        return MixedCollator(self.collator) if self.text else self.collator


def phases_of(
    method: Method,
    settings: Settings,
    examples: Sequence[Example],
    collator: Collator,
    scales: Mapping[int, float] | None,
    replay: Sequence[TextRow] = (),
) -> list[Phase]:
    """The phases in order: the adaptor's if there is one, then the method's, in which alone text is replayed.

    Raises UserError for an adaptor phase on questions given as text, which pass by the adaptor, for an example above
    the token budget, and for too little text to replay.
    """
    first = settings.adaptor_first
    for option, asked in (("align", settings.align), ("adaptor_first", first)):
        if asked is not None and collator.modality != "speech":
            raise UserError(f"training.{option} needs spoken questions; remove it for a method trained on text.")
    planned: list[tuple[PhaseName, float, Sequence[Rule], float, Sequence[Example], Collator]] = []
    if first is not None:
        seen = repeating(examples, collator, first.instruction) if first.target == "repeat" else (examples, collator)
        planned.append(("adaptor", first.learning_rate, ADAPTOR_ONLY, first.epochs, *seen))
    of_method = rules_for(method, scales)
    planned.append(("method", method.learning_rate, of_method, settings.epochs, examples, collator))
    phases: list[Phase] = []
    for name, learning_rate, rules, epochs, examples, collator in planned:
        lengths = None
        if settings.max_tokens is not None:
            lengths = sequence_lengths(collator, examples)
            require_budget(examples, lengths, settings.max_tokens)
        batches: EpochBatches | MixedBatches
        batches = EpochBatches(len(examples), settings.batch_size, settings.seed, lengths, settings.max_tokens)
        text: Sequence[TextRow] = ()
        if method.replay is not None and name == "method":
            text = fitting(replay, settings.batch_size, settings.max_tokens)
            batches = MixedBatches(batches, method.replay.n_batches(len(batches)), [len(row) for row in text])
        steps = n_steps(len(examples), settings, n_batches=len(batches), epochs=epochs)
        before = sum(phase.steps for phase in phases)
        keeps = name == "method" and method.kind in ("peft", "inserted")
        phases.append(Phase(name, learning_rate, rules, examples, collator, batches, steps, before, text, keeps))
    return phases


def repeating(examples: Sequence[Example], collator: Collator, instruction: str) -> tuple[list[Example], Collator]:
    """The same speech with its own words as the target, and `instruction` beside it."""
    from palimpsest.models.processor import SpeechLMProcessor

    old = collator.processor
    style = dataclasses.replace(old.style, speech_instruction=instruction)
    processor = SpeechLMProcessor(
        old.tokenizer, old.feature_extractor, old.stack_factor, old.speech_length, style, old.rounded_to
    )
    said = [dataclasses.replace(example, answer=example.question) for example in examples]
    return said, dataclasses.replace(collator, processor=processor)
