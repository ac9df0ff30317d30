"""The cache of generations holds what transformers' own holds, and answers stay the same."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_llama
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from palimpsest.models import cache
from palimpsest.models.cache import generation_cache
from palimpsest.models.compute import many_forwards

IDS = torch.randint(5, 300, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("room", [1, 7, 64])
def test_generations_are_the_same_to_the_bit(compute: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any room: with 1 the tensors are made anew for every token, with 64 never."""
    monkeypatch.setattr(cache, "ROOM", room)
    model = tiny_llama().eval()
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode(), many_forwards(model, compute):
        expected = model.generate(input_ids=IDS, attention_mask=MASK, **settings)
        found = model.generate(input_ids=IDS, attention_mask=MASK, **generation_cache(model), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    for mine, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys.to(mine.keys.dtype))
        assert torch.equal(mine.values, theirs.values.to(mine.values.dtype))
        assert mine.keys.dtype == getattr(torch, compute)


def test_tokens_are_written_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROOM", 3)
    layer, own, stored = cache.GrowingLayer(), DynamicCache(), []
    for n in (5, 1, 2, 1, 1):
        keys, values = torch.randn(2, 3, n, 4), torch.randn(2, 3, n, 4)
        found, expected = layer.update(keys, values), own.update(keys, values, 0)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        stored.append(layer.keys.untyped_storage().data_ptr())
    # 5 with room for 8: 6 and 8 fit; 9 with room for 12: 10 fits.
    assert [stored[i] == stored[i - 1] for i in range(1, 5)] == [True, True, False, True]
    layer.batch_select_indices(torch.tensor([1]))
    keys, values = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    own.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.update(keys, values)[0], own.update(keys, values, 0)[0])


def test_models_that_keep_more_have_their_own_cache() -> None:
    small = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(**small, intermediate_size=32, num_key_value_heads=2, sliding_window=4))
    assert generation_cache(windowed) == {}
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=16)).eval()
    with torch.inference_mode():
        expected = opt.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)
        found = opt.generate(input_ids=IDS, attention_mask=MASK, **generation_cache(opt), **GREEDY)
    assert torch.equal(found, expected)
