"""From examples to batches: prompt, labels, padding and speech, for training, scoring and generation alike.

Only the answer and its end-of-turn token are ever supervised; prompt, speech positions and padding have label −100.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palimpsest.data.examples import Example
from palimpsest.models.loss import IGNORED, PADDING

if TYPE_CHECKING:
    from palimpsest.data.features import Features
    from palimpsest.models.processor import SpeechLMProcessor

Batch = dict[str, Any]


@dataclass(frozen=True)
class Collator:
    """Callable: examples → batch. `modality` "text" puts the question as text, "speech" as encoder frames.

    Args:
        processor: prompts and tokenizer.
        modality: how the question is put.
        features: encoder frames by example id; needed for speech.
    """

    processor: SpeechLMProcessor
    modality: Literal["text", "speech"]
    features: Features | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Right-padded: input_ids, attention_mask, labels (batch, seq), ids, and the speech tensors."""
        return self._batch(examples, answers=True)

    def prompts(self, examples: Sequence[Example]) -> Batch:
        """Left-padded prompts without labels, for generation."""
        return self._batch(examples, answers=False)

    def prompt(self, example: Example) -> list[int]:
        if self.modality == "text":
            return self.processor.text_prompt(example.question)
        return self.processor.speech_prompt(self._features.count(example.id) // self.processor.stack_factor)

    def length(self, example: Example) -> int:
        """Tokens of the whole training sequence."""
        return len(self.prompt(example)) + len(self.processor.answer(example.answer))

    @property
    def _features(self) -> Features:
        if self.features is None:
            raise ValueError("the speech modality needs features")
        return self.features

    def _batch(self, examples: Sequence[Example], *, answers: bool) -> Batch:
        prompts = [self.prompt(example) for example in examples]
        targets = [self.processor.answer(example.answer) if answers else [] for example in examples]
        pairs = list(zip(prompts, targets, strict=True))

        def padded(rows: Iterable[list[int]], value: int) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
            return pad_sequence(tensors, True, value, padding_side="right" if answers else "left")

        batch: Batch = {
            "input_ids": padded((prompt + target for prompt, target in pairs), PADDING),
            "attention_mask": padded(([1] * len(prompt + target) for prompt, target in pairs), 0),
            "ids": [example.id for example in examples],
        }
        if answers:
            labels = ([IGNORED] * len(prompt) + target for prompt, target in pairs)
            batch["labels"] = padded(labels, IGNORED)
        if self.modality == "speech":
            frames = [self._features[example.id] for example in examples]
            batch["encoder_frames"] = pad_sequence(frames, batch_first=True)
            batch["frame_counts"] = torch.tensor([len(item) for item in frames])
        return batch


def batches(
    collator: Collator,
    examples: Sequence[Example],
    batch_size: int,
    device: str | torch.device = "cpu",
    *,
    by_length: bool = True,
) -> Iterator[Batch]:
    """Batches on `device`, the same every time: similar lengths together, so that little is padding, or in order."""
    order = sorted(examples, key=collator.length) if by_length else examples
    for start in range(0, len(order), batch_size):
        yield to_device(collator(order[start : start + batch_size]), device)


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
