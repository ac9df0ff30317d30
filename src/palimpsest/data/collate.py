"""From examples to batches: prompt, labels, padding and speech, for training, scoring and generation alike.

Only the answer and its end-of-turn token are ever supervised; prompt, speech positions and padding have label −100.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palimpsest.data.examples import Example
from palimpsest.models.loss import IGNORED
from palimpsest.models.prompts import pad_id
from palimpsest.parallel import my_share

if TYPE_CHECKING:
    from palimpsest.models.processor import SpeechLMProcessor

Batch = dict[str, Any]


class Speech(Protocol):
    """Where the speech of a batch comes from: frames of the cache (features.Features), or recordings that the model
    encodes (in_loop.Recordings)."""

    @property
    def in_loop(self) -> bool:
        """Whether the model has to encode what `batch` gives."""
        ...

    def count(self, example_id: str, /) -> int:
        """Encoder frames of an example, without reading them."""
        ...

    def batch(self, ids: Sequence[str], /) -> dict[str, Tensor]:
        """frame_counts (speech,), and encoder_frames (speech, time, d_enc) or input_features (speech, mels, time)."""
        ...


@dataclass(frozen=True)
class Collator:
    """Callable: examples → batch. `modality` "text" puts the question as text, "speech" as its recording.

    Args:
        processor: prompts and tokenizer.
        modality: how the question is put.
        features: the speech by example id; needed for the modality of that name.
    """

    processor: SpeechLMProcessor
    modality: Literal["text", "speech"]
    features: Speech | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Right-padded: input_ids, attention_mask, labels (batch, seq), ids, and the speech tensors."""
        return self._batch(examples, answers=True)

    def prompts(self, examples: Sequence[Example]) -> Batch:
        """Left-padded prompts without labels, for generation."""
        return self._batch(examples, answers=False)

    def prompt(self, example: Example) -> list[int]:
        return self._prompt(self._question(example))

    def _prompt(self, question: str | int) -> list[int]:
        if isinstance(question, str):
            return self.processor.text_prompt(question)
        return self.processor.speech_prompt(question)

    def sequence(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of (prompt, answer with its end of turn)."""
        return self.processor.sequence(self._question(example), example.answer)

    @property
    def in_loop(self) -> bool:
        """Whether the model has to encode the speech of each batch."""
        return self.modality == "speech" and self._features.in_loop

    def _question(self, example: Example) -> str | int:
        """As text, or how many positions its speech takes."""
        if self.modality == "text":
            return example.question
        return self._features.count(example.id) // self.processor.stack_factor

    def length(self, example: Example) -> int:
        """Tokens of the whole training sequence."""
        return sum(map(len, self.sequence(example)))

    @property
    def _features(self) -> Speech:
        if self.features is None:
            raise ValueError("the speech modality needs features")
        return self.features

    def _batch(self, examples: Sequence[Example], *, answers: bool) -> Batch:
        speech: dict[str, Tensor] = {}
        questions: list[str | int]
        if self.modality == "speech":
            speech = self._features.batch([example.id for example in examples])
            questions = [n_frames // self.processor.stack_factor for n_frames in speech["frame_counts"].tolist()]
        else:
            questions = [example.question for example in examples]
        asked = zip(questions, examples, strict=True)
        pairs = [
            self.processor.sequence(question, example.answer) if answers else (self._prompt(question), [])
            for question, example in asked
        ]

        def padded(rows: Iterable[list[int]], value: int) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
            return pad_sequence(tensors, True, value, padding_side="right" if answers else "left")

        batch: Batch = {
            "input_ids": padded((prompt + target for prompt, target in pairs), pad_id(self.processor.tokenizer)),
            "attention_mask": padded(([1] * len(prompt + target) for prompt, target in pairs), 0),
            "ids": [example.id for example in examples],
        }
        if answers:
            labels = ([IGNORED] * len(prompt) + target for prompt, target in pairs)
            batch["labels"] = padded(labels, IGNORED)
        return batch | speech


def batches(
    collator: Collator,
    examples: Sequence[Example],
    batch_size: int,
    device: str | torch.device = "cpu",
    *,
    by_length: bool = True,
    distributed: bool = False,
) -> Iterator[Batch]:
    """Batches on `device`, the same every time: similar lengths together, so that little is padding, or in order.

    distributed: those of this rank, every n-th of all; only they are made.
    """
    order = sorted(examples, key=collator.length) if by_length else examples
    starts = range(0, len(order), batch_size)
    for start in my_share(starts) if distributed else starts:
        yield to_device(collator(order[start : start + batch_size]), device)


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
