"""Rows that share their beginning, computed once: the same losses, rows and gradients as padded batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_models_speech_lm import speech_inputs
from tests.tiny import tiny_llama, tiny_speech_lm
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from palimpsest.ablation.exact import Float64Throughout
from palimpsest.importance.estimate import estimate_importance
from palimpsest.models import packing
from palimpsest.models.loss import IGNORED, supervised_losses
from palimpsest.models.packing import Losses


def batch_of(lengths: list[int], answers: list[int], shared: int, seed: int = 0) -> dict[str, Any]:
    """Right-padded rows of `lengths` tokens, of which the first `shared` are the same and the last are the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (len(lengths), max(lengths)), generator=generator)
    ids[:, :shared] = ids[0, :shared].clone()
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    first = torch.tensor(lengths) - torch.tensor(answers)
    labels = ids.masked_fill((mask == 0) | (torch.arange(max(lengths)) < first[:, None]), IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "ids": [f"q{i}" for i in range(len(lengths))]}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_losses_and_rows_are_those_of_padded_batches(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 5))
    answers = [data.draw(st.integers(1, 4)) for _ in range(n)]
    lengths = [count + data.draw(st.integers(2, 9)) for count in answers]
    batch = batch_of(lengths, answers, data.draw(st.integers(1, min(lengths))), data.draw(st.integers(0, 99)))
    model = tiny_llama().double()
    packed = packing._pack_batch(batch, batch["labels"][:, 1:] != IGNORED)
    assert packed is not None
    with torch.no_grad(), Float64Throughout():
        found, rows = packing._packed_losses(model, batch, packed)
        expected, expected_rows = supervised_losses(model, batch)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.equal(rows, expected_rows)


def test_one_row_holds_the_prefix_once_and_no_padding() -> None:
    batch = batch_of([9, 7, 8], [2, 2, 3], 4)
    packed = packing._pack_batch(batch, batch["labels"][:, 1:] != IGNORED)
    assert packed is not None
    assert len(packed.place) == 4 + 5 + 3 + 4
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 4, 5, 6, 7]
    assert packed.segments[0].tolist() == [0] * 4 + [1] * 5 + [2] * 3 + [3] * 4
    assert packed.kept.tolist() == [6, 7, 9, 10, 12, 13, 14]  # the columns in front of the answers' tokens
    assert packed.rows.tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_importance_is_that_of_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch_of([12, 13, 14, 12], [3, 4, 2, 3], 8, seed) for seed in range(3)]
    model = tiny_llama().double()
    with Float64Throughout():
        packed = estimate_importance(model, batches)
        monkeypatch.setattr(packing, "_may_pack", lambda *_: False)
        plain = estimate_importance(model, batches)
    assert (packed.metadata["packed"], plain.metadata["packed"]) == (True, False)
    for key in ("data", "n_sequences", "n_tokens", "n_batches"):
        assert packed.metadata[key] == plain.metadata[key]
    for reduction in packed.reductions:
        for name, expected in plain.tensors(reduction).items():
            torch.testing.assert_close(packed.tensors(reduction)[name], expected, rtol=1e-6, atol=1e-12)


def test_speech_is_packed_behind_the_prompt_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PAYS", 2)  # the prompt is short here
    model, processor = tiny_speech_lm()
    model = model.eval()
    inputs = speech_inputs(processor, 0.5, 0.6, 0.5, 0.6)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -1] = inputs["input_ids"][:, -1]
    of_batch = Losses(model)
    with torch.no_grad():
        found, rows = of_batch({**inputs, "labels": labels})
        expected, _ = supervised_losses(model, {**inputs, "labels": labels})
    assert of_batch.n_packed == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows.tolist() == [0, 1, 2, 3]


def test_a_long_row_is_divided_where_comparing_every_token_with_every_other_costs_more_than_the_prefix_again() -> None:
    """40 rows of 100 shared tokens and 60 of their own; n rows of 100 + 2400/n tokens cost n·(L + L²/600) at width 100.

    n = 1: 2500 + 10417; 4: 2800 + 3267; 8: 3200 + 2133 = 5333; 9: 3300 + 2017 = 5317; 10: 3400 + 1927 = 5327.
    """
    batch = batch_of([160] * 40, [2] * 40, 100)
    packed = packing._pack_batch(batch, batch["labels"][:, 1:] != IGNORED)
    assert packed is not None
    assert packed.parts(100) == 9
    assert packed.parts(10_000_000) == 1


@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_divided_rows_have_the_losses_of_padded_batches(monkeypatch: pytest.MonkeyPatch, n_parts: int) -> None:
    monkeypatch.setattr(packing.Packed, "parts", lambda *_: n_parts)
    monkeypatch.setattr(packing, "PAYS", 2)
    text = (tiny_llama(), batch_of([12, 13, 14, 12, 9, 10, 11], [3, 4, 2, 3, 1, 2, 2], 6))
    model, processor = tiny_speech_lm()
    inputs = speech_inputs(processor, 0.5, 0.6, 0.5, 0.6, 0.4)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    for asked, batch in (text, (model.eval(), {**inputs, "labels": labels})):
        of_batch = Losses(asked)
        with torch.no_grad():
            found, rows = of_batch(batch)
            expected, expected_rows = supervised_losses(asked, batch)
        assert of_batch.n_packed == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(rows, expected_rows)


class BlindToMasks(nn.Module):
    """Takes a mask and positions and looks at neither: every token counts the tokens in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.embedding = nn.Embedding(300, 300)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        hidden = self.embedding(input_ids).cumsum(dim=1)
        return SimpleNamespace(logits=hidden if logits_to_keep is None else hidden[:, logits_to_keep])


def test_models_that_cannot_are_asked_as_before() -> None:
    batch = batch_of([12, 13, 14, 12], [3, 4, 2, 3], 8)
    windowed = MistralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    for model in (BlindToMasks(), MistralForCausalLM(windowed)):
        of_batch = Losses(model)
        for _ in range(2):
            assert torch.equal(of_batch(batch)[0], supervised_losses(model, batch)[0])
        assert of_batch.n_packed == 0


def test_batches_that_share_too_little_stay_as_they_are() -> None:
    of_batch = Losses(tiny_llama())
    for batch in (batch_of([12, 12, 12], [2, 2, 2], 1), batch_of([12], [2], 8), batch_of([12, 12], [2, 2], 0, seed=3)):
        of_batch(batch)
    assert of_batch.n_packed == 0
