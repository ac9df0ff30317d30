"""The naming rule, on the architectures it claims to cover (tiny configs)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from palimpsest.files import UserError
from palimpsest.models.anatomy import find_language_model, layer_index, module_kind, named_parameters, scored_parameters

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEPARATE = {"q", "k", "v", "o", "gate", "up", "down"}
ARCHITECTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (SMALL, SEPARATE),
    "mistral": (SMALL, SEPARATE),
    "qwen2": (SMALL, SEPARATE),
    "qwen3": (SMALL, SEPARATE),
    "gemma3_text": (SMALL, SEPARATE),
    "phi3": (SMALL, {"qkv", "o", "gate_up", "down"}),
    "gpt2": (
        {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2},
        {"qkv", "o", "up", "down"},
    ),
    "opt": ({**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 4}, {"q", "k", "v", "o", "up", "down"}),
    "mixtral": ({**SMALL, "num_local_experts": 2}, {"q", "k", "v", "o", "gate_up", "down", "router"}),
    "qwen3_moe": (
        {**SMALL, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
        {"q", "k", "v", "o", "gate_up", "down", "router"},
    ),
}


def tiny(kind: str, auto: Any = AutoModelForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind][0]))
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scored_parameters_are_the_matrices_of_every_layer_with_their_kinds(kind: str) -> None:
    model = tiny(kind)
    scored = scored_parameters(model)
    for layer in (0, 1):
        names = [name for name in scored if layer_index(name) == layer]
        assert {module_kind(name) for name in names} == ARCHITECTURES[kind][1]
        assert len(names) == len(ARCHITECTURES[kind][1])  # each kind once
    assert {layer_index(name) for name in scored} == {0, 1}
    assert all(model.get_parameter(name) is parameter for name, parameter in scored.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_decoder_without_head_has_the_same_canonical_names(kind: str) -> None:
    with_head, without = tiny(kind), tiny(kind, AutoModel)
    assert list(scored_parameters(without)) == list(scored_parameters(with_head))


def test_the_language_model_is_found_inside_other_models() -> None:
    llama = tiny("llama")
    assert find_language_model(llama) is llama

    speech = nn.Module()
    speech.encoder = nn.Linear(2, 2)
    speech.model = nn.Module()
    speech.model.language_model = llama
    assert find_language_model(speech) is llama
    assert list(scored_parameters(speech)) == list(scored_parameters(llama))


def test_peft_and_compile_do_not_change_names_or_parameters() -> None:
    from peft import LoraConfig, get_peft_model

    llama = tiny("llama")
    before = scored_parameters(llama)
    compiled = scored_parameters(torch.compile(llama))
    assert list(compiled) == list(before)
    assert all(compiled[name] is before[name] for name in before)

    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    after = scored_parameters(adapted)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not any("lora" in name for name in named_parameters(find_language_model(adapted)))


def test_a_data_parallel_wrapper_is_looked_through() -> None:
    llama = tiny("llama")
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = llama  # without the process group that a working one needs
    assert find_language_model(wrapper) is llama


def test_tied_parameters_are_named_once() -> None:
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=True))
    names = list(named_parameters(llama))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.self_attn.q_proj.weight", "audio_tower.layers.1.fc1.weight", "model.norm.weight", "lm_head"],
)
def test_names_outside_the_layers_of_the_language_model(name: str) -> None:
    assert layer_index(name) is None
    assert module_kind(name) is None


def test_kinds_look_at_whole_parts_of_the_name() -> None:
    assert module_kind("model.layers.0.mlp.gate_up_proj.weight") == "gate_up"
    assert module_kind("model.layers.0.mlp.gate_proj.weight") == "gate"
    assert module_kind("model.layers.0.mlp.gate.weight") == "router"
    assert module_kind("transformer.h.3.mlp.c_proj.weight") == "down"
    assert module_kind("model.layers.0.self_attn.q_norm.weight") is None
    assert module_kind("language_model.model.layers.0.self_attn.q_proj.base_layer.weight") == "q"


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(UserError, match="Linear has no 2-D weights"):
        scored_parameters(nn.Linear(2, 2))
