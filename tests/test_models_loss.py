"""Losses against transformers' own, and against numbers computed by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny import tiny_llama, tiny_speech_lm
from torch import Tensor, nn

from palimpsest.files import UserError
from palimpsest.models.loss import supervised_losses


def make_batch(seed: int = 0, rows: int = 3, length: int = 9) -> dict[str, Any]:
    """Right-padded rows of different lengths; the first three tokens are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 300, (rows, length), generator=generator)
    mask = torch.ones_like(input_ids)
    for i in range(rows):
        mask[i, length - i :] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "ids": [f"q{i}" for i in range(rows)]}


class FixedLogits(nn.Module):
    """No `logits_to_keep`: always the logits of every position."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def test_equals_the_loss_of_transformers() -> None:
    model, batch = tiny_llama(), make_batch()
    losses, rows = supervised_losses(model, batch)
    inputs = {key: value for key, value in batch.items() if key != "ids"}
    torch.testing.assert_close(losses.mean(), model(**inputs).loss)
    assert losses.dtype == torch.float32
    assert rows.tolist() == [0] * 6 + [1] * 5 + [2] * 4


def test_by_hand_and_without_logits_to_keep() -> None:
    # Two rows of three positions, vocabulary 2; softmax of (ln 3, 0) is (3/4, 1/4).
    logits = torch.zeros(2, 3, 2)
    logits[0, 1, 0] = math.log(3)
    logits[1, 0, 0] = math.log(3)
    labels = torch.tensor([[-100, -100, 1], [-100, 0, 1]])
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3), "labels": labels}
    losses, rows = supervised_losses(FixedLogits(logits), batch)
    expected = torch.tensor([math.log(4), math.log(4 / 3), math.log(2)])
    torch.testing.assert_close(losses, expected)
    assert rows.tolist() == [0, 1, 1]


def test_the_head_is_computed_only_where_needed() -> None:
    model, batch = tiny_llama(), make_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    supervised_losses(model, batch)
    assert seen == [6]  # of 9 columns; the targets are in columns 3 … 8


def test_padding_never_counts() -> None:
    model, batch = tiny_llama(), make_batch()
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=7),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100),
    }
    torch.testing.assert_close(supervised_losses(model, wider)[0], supervised_losses(model, batch)[0])


def test_half_precision_logits_are_compared_in_float32_and_float64_stays() -> None:
    batch = make_batch()
    assert supervised_losses(tiny_llama().bfloat16(), batch)[0].dtype == torch.float32
    assert supervised_losses(tiny_llama().double(), batch)[0].dtype == torch.float64


def test_text_through_a_speech_lm_is_its_language_model() -> None:
    model, _ = tiny_speech_lm()
    batch = make_batch()
    assert torch.equal(supervised_losses(model, batch)[0], supervised_losses(model.language_model, batch)[0])


def test_speech_positions_are_never_supervised() -> None:
    model, processor = tiny_speech_lm()
    prompt = processor.speech_prompt(3)
    row = [*prompt, 20, 21]
    batch = {
        "input_ids": torch.tensor([row]),
        "attention_mask": torch.ones(1, len(row), dtype=torch.long),
        "labels": torch.tensor([[-100] * len(prompt) + [20, 21]]),
        "encoder_frames": torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0)),
        "frame_counts": torch.tensor([17]),
    }
    losses, _ = supervised_losses(model, batch)
    assert losses.shape == (2,)


def test_a_batch_without_labels_names_its_ids() -> None:
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 0] = 5  # has no position before it that could predict it
    with pytest.raises(UserError, match=r"\(q0, q1, q2\).*supervised"):
        supervised_losses(tiny_llama(), batch)


def test_labels_on_padding_are_refused() -> None:
    batch = make_batch()
    batch["labels"][2, -1] = 0
    with pytest.raises(UserError, match="labels on padding"):
        supervised_losses(tiny_llama(), batch)


def test_labels_must_be_as_long_as_the_sequence() -> None:
    batch = {
        "input_ids": torch.zeros(2, 3, dtype=torch.long),
        "attention_mask": torch.ones(2, 3),
        "labels": torch.tensor([[-100, 1, 1], [-100, 0, 1]]),
    }
    with pytest.raises(UserError, match="gave logits for 5 positions"):
        supervised_losses(FixedLogits(torch.zeros(2, 5, 2)), batch)
