"""Learning-rate rules: every parameter once, no rule in vain; Eq. 3 by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.files import UserError
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.training.methods import (
    Method,
    add_lora,
    layer_scales,
    merge_lora,
    method_scales,
    require_language_model,
    rules_for,
)
from palimpsest.training.rules import assign, parameter_groups
from palimpsest.training.trainer import one_gpu
from tiny import tiny_encoder, tiny_llama, tiny_speech_lm


def test_the_first_rule_that_matches_decides() -> None:
    rules = [(r"^a\.", None), (r"b$", 0.5), (r".*", 1.0)]
    assert assign(["a.b", "x.b", "x.c"], rules) == {"a.b": None, "x.b": 0.5, "x.c": 1.0}


def test_uncovered_parameters_and_idle_rules_are_errors() -> None:
    with pytest.raises(UserError, match=r"covers the parameter y"):
        assign(["x", "y"], [("^x$", 1.0)])
    with pytest.raises(UserError, match="takes no parameter"):
        assign(["x"], [("^x$", 1.0), ("^z$", 1.0)])
    with pytest.raises(UserError, match="negative"):
        assign(["x"], [("x", -1.0)])


@pytest.mark.parametrize("kind", ["full", "layer_lr", "lora"])
def test_every_parameter_is_in_exactly_one_group_or_frozen(kind: str) -> None:
    model, _ = tiny_speech_lm()
    method = Method(kind, learning_rate=1e-4, adaptor_learning_rate=1e-3)
    if kind == "lora":
        add_lora(model, method)
    groups = parameter_groups(model, rules_for(method, {0: 1.0, 1: 0.6}), lr=1e-4)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable
    by_name = {name: group["lr"] for group in groups for name in group["names"]}
    assert not any(name.startswith("encoder.") for name in by_name)
    assert all(lr == pytest.approx(1e-3) for name, lr in by_name.items() if name.startswith("adaptor."))
    if kind == "layer_lr":
        assert by_name["language_model.model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.6e-4)
        assert by_name["language_model.model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-4)
        assert by_name["language_model.model.embed_tokens.weight"] == pytest.approx(1e-4)
        assert by_name["language_model.model.norm.weight"] == pytest.approx(1e-4)
    if kind == "lora":
        assert all(".lora_" in name or name.startswith("adaptor.") for name in by_name)


def trained(method: Method) -> set[str]:
    """First parts of the names that a method trains in a tiny SpeechLM."""
    model, _ = tiny_speech_lm()
    groups = parameter_groups(model, rules_for(method), lr=method.learning_rate)
    return {name.partition(".")[0] for group in groups for name in group["names"]}


def test_adaptor_trains_the_adaptor_alone_and_text_all_but_the_adaptor() -> None:
    assert trained(Method("adaptor")) == {"adaptor"}
    assert trained(Method("full")) == {"adaptor", "language_model"}
    assert trained(Method("full", modality="text")) == {"language_model"}
    adaptor = parameter_groups(
        tiny_speech_lm()[0], rules_for(Method("adaptor", 1e-4, adaptor_learning_rate=1e-3)), lr=1e-4
    )
    assert [group["lr"] for group in adaptor] == [pytest.approx(1e-3)]


def test_a_tied_head_is_in_one_group_only() -> None:
    model = tiny_llama()
    groups = parameter_groups(model, [(".*", 1.0)], lr=1.0)
    names = [name for group in groups for name in group["names"]]
    assert "lm_head.weight" not in names
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_layer_scales_for_a_plain_model_and_decay() -> None:
    model = tiny_llama()
    groups = parameter_groups(model, {0: 0.7, 1: 1.0}, lr=2.0, weight_decay=0.1)
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name["model.layers.0.self_attn.q_proj.weight"]["lr"] == pytest.approx(1.4)
    assert by_name["model.layers.0.self_attn.q_proj.weight"]["weight_decay"] == 0.1
    assert by_name["model.layers.0.input_layernorm.weight"]["weight_decay"] == 0.0
    assert by_name["model.norm.weight"]["weight_decay"] == 0.0


def test_all_frozen_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        parameter_groups(tiny_llama(), [(".*", None)], lr=1.0)


def test_equation_3_by_hand() -> None:
    # (I − min)/(max − min) of 2, 6, 4, 10 is 0, 1/2, 1/4, 1; times 0.4, from 1
    assert layer_scales({0: 2.0, 1: 6.0, 2: 4.0, 3: 10.0}, 0.4) == pytest.approx({0: 1.0, 1: 0.8, 2: 0.9, 3: 0.6})


def test_the_inverted_control_by_hand() -> None:
    # 1 − (I − min)/(max − min) of 2, 6, 4, 10 is 1, 1/2, 3/4, 0; times 0.4, from 1
    method = Method("layer_lr", importance="inverted")
    expected = {0: 0.6, 1: 0.8, 2: 0.7, 3: 1.0}
    assert method_scales(method, {0: 2.0, 1: 6.0, 2: 4.0, 3: 10.0}) == pytest.approx(expected)
    method = Method("layer_lr", lambda_=1.0, importance="inverted")
    assert method_scales(method, {0: 0.0, 1: 5.0}) == pytest.approx({0: 0.0, 1: 1.0})


def test_the_shuffled_control_deals_the_same_scales_to_other_layers() -> None:
    totals = {layer: float(layer**2) for layer in range(12)}
    measured = method_scales(Method("layer_lr"), totals)
    assert measured == layer_scales(totals)
    control = Method("layer_lr", importance="shuffled")
    one, same, other = (method_scales(control, totals, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert list(one) == list(measured)
    assert sorted(one.values()) == sorted(measured.values())
    assert len({tuple(scales.values()) for scales in (measured, one, other)}) == 3


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=2, max_size=20).filter(lambda v: max(v) > min(v)),
    st.floats(0, 1),
)
def test_equation_3_stays_between_its_bounds_and_orders_inversely(totals: list[float], lambda_: float) -> None:
    scales = layer_scales(dict(enumerate(totals)), lambda_)
    assert max(scales.values()) == pytest.approx(1.0)
    assert min(scales.values()) == pytest.approx(1.0 - lambda_)
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    ordered = [scales[i] for i in order]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(ordered))


def test_equation_3_refuses_what_it_cannot_scale() -> None:
    with pytest.raises(UserError, match="same importance"):
        layer_scales({0: 1.0, 1: 1.0})
    with pytest.raises(UserError, match="λ"):
        layer_scales({0: 1.0, 1: 2.0}, 1.5)
    with pytest.raises(UserError, match="no layers"):
        layer_scales({})


def test_lora_covers_all_projections_and_merges_into_the_same_function() -> None:
    model, processor = tiny_speech_lm()
    add_lora(model, Method("lora", rank=4))
    config = model.language_model.peft_config["default"]
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (config.r, config.lora_alpha) == (4, 8)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([processor.text_prompt("hello")])
    with torch.no_grad():
        before = model(ids).logits
        merge_lora(model)
        after = model(ids).logits
    assert type(model.language_model).__name__ == "LlamaForCausalLM"
    assert torch.allclose(before, after, atol=1e-4)


def test_lora_on_bfloat16_weights_is_merged_in_float32_and_none_of_it_is_lost() -> None:
    model, _ = tiny_speech_lm()
    add_lora(model.bfloat16(), Method("lora", rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=1e-3)
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    expected = {n: m.weight.detach().float() + m.get_delta_weight("default") for n, m in adapted.items()}
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, weight in expected.items():
        plain = name.replace("base_model.model.", "")
        assert torch.equal(model.get_parameter(f"{plain}.weight"), weight)
    assert len(expected) == 14


# ---------------------------------------------------------------------------------------------------------------------
# Which language models can be trained, asked of their config
# ---------------------------------------------------------------------------------------------------------------------
SMALL = {
    "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LANGUAGE_MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mixtral": ({**SMALL, "num_local_experts": 3}, ATTENTION),
    "qwen3_moe": ({**SMALL, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, ATTENTION),
    "gpt_oss": ({**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}, ATTENTION),
    "mpt": (
        {"d_model": 8, "n_heads": 2, "n_layers": 2, "vocab_size": 32},
        {"Wqkv", "out_proj", "up_proj", "down_proj"},
    ),
    "mamba2": (
        {"num_heads": 4, "head_dim": 4, "n_groups": 1, "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 32,
         "state_size": 4},
        {"in_proj"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_lora_goes_on_the_linear_layers_of_any_language_model(kind: str, tmp_path: Path) -> None:
    values, expected = LANGUAGE_MODELS[kind]
    config = AutoConfig.for_model(kind, **values)
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")  # its weights are never read
    require_language_model(str(tmp_path), [Method("lora", rank=2)])
    torch.manual_seed(0)
    model = SpeechLM.from_parts(tiny_encoder(), AutoModelForCausalLM.from_config(config), adaptor_hidden_size=8).eval()
    add_lora(model, Method("lora", rank=2))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert {name.rpartition(".")[2] for name in adapted} == expected
    ids = torch.tensor([[5, 6, 7, 8]])
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_B" in name)
    merge_lora(model)
    model(ids)


def test_what_a_language_model_cannot_do_is_said_from_its_config(tmp_path: Path) -> None:
    AutoConfig.for_model("mamba2", **LANGUAGE_MODELS["mamba2"][0]).save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"LoRA cannot be put on out_proj of this language model \(.*\); name others"):
        require_language_model(str(tmp_path), [Method("lora", targets=("out_proj",))])
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoConfig.for_model("gemma3", text_config=SMALL, vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Gemma3ForConditionalGeneration, which cannot generate from embeddings"):
        require_language_model(str(tmp_path), [Method("full")])
    require_language_model(str(tmp_path), [Method("full", modality="text")])


def test_lora_stays_inside_the_language_model_of_a_multimodal_one() -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=SMALL, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    model = SpeechLM.from_parts(tiny_encoder(), AutoModelForCausalLM.from_config(config), adaptor_hidden_size=8)
    add_lora(model, Method("lora", rank=2))
    adapted = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    assert len(adapted) == 14
    assert not any("vision" in name for name in adapted)


# ---------------------------------------------------------------------------------------------------------------------
# What is frozen
# ---------------------------------------------------------------------------------------------------------------------
def test_layer_scales_leave_a_frozen_tower_frozen_and_are_of_the_language_model_alone() -> None:
    model = torch.nn.Module()
    model.audio_tower, model.language_model = torch.nn.Module(), tiny_llama()
    model.audio_tower.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    model.audio_tower.layers[0].requires_grad_(False)
    groups = parameter_groups(model, {0: 0.5, 1: 0.25}, lr=1.0)
    scale_of = {name: group["scale"] for group in groups for name in group["names"]}
    assert not any(name.startswith("audio_tower.layers.0.") for name in scale_of)
    assert not any(p.requires_grad for p in model.audio_tower.layers[0].parameters())
    assert scale_of["audio_tower.layers.1.weight"] == 1.0  # no layer of the language model
    assert scale_of["language_model.model.layers.1.mlp.up_proj.weight"] == 0.25
    # A rule that names it trains it; one that takes any name does not.
    for rules, trained in ([(".*", 1.0)], False), ([("audio_tower", 1.0), (".*", 1.0)], True):
        model.audio_tower.layers[0].requires_grad_(False)
        names = {name for group in parameter_groups(model, rules, lr=1.0) for name in group["names"]}
        assert ("audio_tower.layers.0.weight" in names) == trained


def test_layer_scales_of_a_lora_model_train_the_updates_alone() -> None:
    model, _ = tiny_speech_lm()
    add_lora(model, Method("lora", rank=2))
    groups = parameter_groups(model.language_model, {0: 0.5, 1: 0.25}, lr=1.0)
    scale_of = {name: group["scale"] for group in groups for name in group["names"]}
    assert all(".lora_" in name for name in scale_of)
    assert {scale for name, scale in scale_of.items() if ".layers.1." in name} == {0.25}


def test_one_process_trains_on_one_gpu(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert one_gpu(arguments).n_gpu == 0
    arguments._n_gpu = 2  # what the Trainer finds where two GPUs are visible
    assert one_gpu(arguments).n_gpu == 1
