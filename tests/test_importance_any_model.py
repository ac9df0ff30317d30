"""Scores equal plain autograd on every architecture the naming rule covers, and inside speech and audio LLMs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AutoConfig,
    AutoModelForCausalLM,
    GraniteSpeechForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
    VoxtralForConditionalGeneration,
)

from palimpsest.ablation.exact import exact_changes, signed_products
from palimpsest.files import UserError
from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.lora import merged_adapters
from palimpsest.importance.select import select
from palimpsest.models.anatomy import layer_index, module_kind, scored_parameters
from palimpsest.models.loading import StoredLanguageModel
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechLM
from tiny import tiny_encoder, tiny_llama, tiny_speech_lm

Batch = dict[str, Any]
VOCAB = 32
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma3_text": SMALL,
    "phi3": SMALL,
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": VOCAB, "n_positions": 128, "initializer_range": 0.4},
    "opt": {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 8, "init_std": 0.4},
    "mixtral": {**SMALL, "num_local_experts": 3},
    "qwen3_moe": {**SMALL, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind]))
    return model.eval()


def text_batches(n: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(n):
        input_ids = torch.randint(3, VOCAB, (3, 7), generator=generator)
        mask = torch.ones_like(input_ids)
        mask[1, 5:] = 0
        labels = input_ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        batches.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return batches


def assert_equal_to_autograd(model: nn.Module, batches: list[Batch], scores: Any) -> None:
    weights = scored_parameters(model)
    assert scores.names == tuple(weights)
    signed = {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in weights.items()}
    n_tokens = 0
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        losses, _ = supervised_losses(model, batch)
        n_tokens += len(losses)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient is not None:
                signed[name] += weight.detach().double() * gradient.double()
    for name, total in signed.items():
        tensor = scores.tensors("signed_sum")[name]
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor.double(), total.abs() / n_tokens, rtol=1e-4, atol=1e-8)
    assert sum(float(total.abs().sum()) for total in signed.values()) > 0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_causal_language_models(kind: str) -> None:
    model, batches = tiny(kind), text_batches()
    scores = estimate_importance(model, batches)
    assert_equal_to_autograd(model, batches, scores)
    assert {layer_index(name) for name in scores.names} == {0, 1}
    assert all(module_kind(name) for name in scores.names)
    mask = select(scores.tensors("signed_sum"), 0.1)
    weight = model.get_parameter(scores.names[0])
    with deactivate(model, mask):
        assert not weight[mask.tensor(scores.names[0])].any()


# ------------------------------------------------------------------------------------------------------------
# One name for a parameter: of the plain model, behind an adaptor, and in a checkpoint's files
# ------------------------------------------------------------------------------------------------------------
GEMMA3 = {
    "text_config": SMALL,
    "vision_config": {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
STORED: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gemma3": GEMMA3,  # the language model is a part of the language model
    # Experts in one tensor (expert, out, in), which most are written as matrices one by one.
    "mixtral": ARCHITECTURES["mixtral"],
    "qwen3_moe": ARCHITECTURES["qwen3_moe"],
    "gpt_oss": {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v3": {**SMALL, **EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
}


@pytest.mark.parametrize("kind", STORED)
def test_a_parameter_has_one_name_wherever_it_stands(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **STORED[kind])).eval()
    names = list(scored_parameters(plain))
    assert {layer_index(name) for name in names} == {0, 1}
    model = SpeechLM.from_parts(tiny_encoder(), plain, adaptor_hidden_size=24)
    assert list(scored_parameters(model)) == names
    model.save_pretrained(tmp_path)
    stored = StoredLanguageModel(tmp_path)
    assert list(stored) == names
    assert all(torch.equal(stored[name], weight) for name, weight in scored_parameters(model).items())
    mask = select({name: weight.detach().abs() for name, weight in scored_parameters(plain).items()}, 0.1)
    with deactivate(model, mask):
        assert not scored_parameters(plain)[names[0]][mask.tensor(names[0])].any()


# ------------------------------------------------------------------------------------------------------------
# Padding: where it stands must not matter, also where positions are absolute
# ------------------------------------------------------------------------------------------------------------
def padded_in_front(batch: Batch) -> Batch:
    """The same rows with their padding (of a right-padded batch) in front."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        key: torch.stack([row.roll(-n) for row, n in zip(value, lengths, strict=True)]) for key, value in batch.items()
    }


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "phi3"])
def test_padding_in_front_gives_the_scores_of_padding_behind(kind: str) -> None:
    model, batches = tiny(kind), text_batches()
    turned = [padded_in_front(batch) for batch in batches]
    assert not torch.equal(turned[0]["input_ids"], batches[0]["input_ids"])
    everywhere = ["signed_sum", "per_batch_abs", "per_sequence_abs", "fisher"]
    expected, found = (estimate_importance(model, items, everywhere) for items in (batches, turned))
    assert found.metadata["loss"] == expected.metadata["loss"]
    assert found.metadata["data"] == expected.metadata["data"]
    for reduction in everywhere:
        for name, tensor in expected.tensors(reduction).items():
            assert torch.equal(found.tensors(reduction)[name], tensor), (reduction, name)
    positions = [(name, 0) for name in expected.names[:3]]
    assert exact_changes(model, turned, positions).tolist() == exact_changes(model, batches, positions).tolist()


def test_padding_in_front_of_speech() -> None:
    model, _ = tiny_speech_lm(tied=False)
    row = [5, *[SPEECH_POSITION] * 2, 6, 7, 8]
    batch = {
        "input_ids": torch.tensor([[*row, 0, 0, 0, 0], [*row, 9, 4, 6, 7]]),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 4, [1] * 10]),
        "labels": torch.tensor([[-100] * 4 + [7, 8] + [-100] * 4, [-100] * 4 + [7, 8, 9, 4, 6, 7]]),
    }
    # As many utterances as rows and as many frames as tokens: (2, 10, …) is no reason to take frames for tokens.
    frames = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
    speech = {"encoder_frames": frames, "frame_counts": torch.tensor([10, 10])}
    expected, rows = supervised_losses(model, {**batch, **speech})
    found, found_rows = supervised_losses(model, {**padded_in_front(batch), **speech})
    assert torch.equal(found, expected)
    assert torch.equal(found_rows, rows)


def test_padding_in_front_beside_a_tensor_of_unknown_meaning_is_refused() -> None:
    batch = padded_in_front(text_batches()[0])
    batch = {**batch, "ids": ["a", "b", "c"], "segments": torch.zeros_like(batch["input_ids"])}
    with pytest.raises(UserError, match=r"\(a, b, c\) has padding in front of its tokens and a tensor 'segments'"):
        supervised_losses(tiny("gpt2"), batch)


# ------------------------------------------------------------------------------------------------------------
# What is no list of batches
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "measure",
    [
        estimate_importance,
        lambda model, batches: exact_changes(model, batches, []),
        lambda model, batches: signed_products(model, batches, []),
    ],
)
def test_what_is_no_list_of_batches_is_refused_in_one_sentence(measure: Any) -> None:
    model, batch = tiny("llama"), {**text_batches()[0], "ids": ["a", "b", "c"]}
    with pytest.raises(UserError, match=r"One batch was given in the place of a list"):
        measure(model, batch)
    with pytest.raises(UserError, match=r"A batch is a dictionary .*, not a Tensor"):
        measure(model, [batch["input_ids"]])
    with pytest.raises(UserError, match=r"\(a, b, c\) has no labels, only input_ids, attention_mask, ids"):
        measure(model, [{key: value for key, value in batch.items() if key != "labels"}])
    with pytest.raises(UserError, match=r"labels of the batch \(a, b, c\) are a list"):
        measure(model, [{**batch, "labels": batch["labels"].tolist()}])
    with pytest.raises(UserError, match=r"\(a, b, c\) has no input_ids"):
        measure(model, [{key: value for key, value in batch.items() if key != "input_ids"}])


# ------------------------------------------------------------------------------------------------------------
# Mixtures of experts: what is scored
# ------------------------------------------------------------------------------------------------------------
def test_an_expert_that_no_token_reached_scores_zero_and_the_router_is_scored() -> None:
    model = tiny("mixtral")
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert len(routers) == 2

    def never_expert_two(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        logits, *_ = output
        scores = logits.clone()
        scores[:, 2] = float("-inf")
        weights, indices = torch.topk(torch.softmax(scores.float(), dim=-1), 2, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), indices

    for router in routers:
        router.register_forward_hook(never_expert_two)
    scores = estimate_importance(model, text_batches(), ["per_batch_abs"]).tensors("per_batch_abs")
    experts = [name for name in scores if ".experts." in name]
    assert len(experts) == 4  # gate_up and down of two layers, each one tensor (expert, out, in)
    for name in experts:
        assert scores[name].shape[0] == 3
        assert scores[name][:2].any(dim=(1, 2)).all()
        assert not scores[name][2].any()
    assert all(scores[name].any() for name in scores if module_kind(name) == "router")


# ------------------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------------------
def with_lora(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(a model with random LoRA weights, the same with the update in its weights)."""
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
        return get_peft_model(tiny_llama().to(dtype), config)

    return adapted(), adapted().float().merge_and_unload().to(dtype)  # summed in float32, rounded once


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Name → (address, bytes)."""
    return {name: (p.data_ptr(), p.detach().clone().view(torch.uint8)) for name, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (pointer, values) in before.items():
        assert after[name][0] == pointer, name
        assert torch.equal(after[name][1], values), name


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_scored_on_merged_weights_and_left_as_it_was(dtype: torch.dtype, dora: bool) -> None:
    model, plain = with_lora(dtype, use_dora=dora)
    before = snapshot(model)
    scores, expected = estimate_importance(model, text_batches()), estimate_importance(plain, text_batches())
    assert scores.names == expected.names
    assert scores.metadata["model"] == expected.metadata["model"]
    for reduction in scores.reductions:
        for name, tensor in expected.tensors(reduction).items():
            assert torch.equal(scores.tensors(reduction)[name], tensor)
    assert_unchanged(model, before)
    model.disable_adapter_layers()
    unadapted = estimate_importance(model, text_batches())
    assert unadapted.metadata["model"] != scores.metadata["model"]  # a disabled adapter is not part of the weights


def test_an_update_that_bfloat16_would_round_away_is_not_scored_without_it() -> None:
    model, _ = with_lora(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.mul_(1e-3)
    before = snapshot(model)
    with pytest.raises(UserError, match=r"Merged into bfloat16 weights, \d+% of a LoRA update would be lost"):
        estimate_importance(model, text_batches())
    assert_unchanged(model, before)


def test_a_lora_inside_a_speech_lm_comes_back_when_the_block_raises() -> None:
    from palimpsest.training.methods import Method, add_lora

    model, _ = tiny_speech_lm()
    add_lora(model, Method("lora", learning_rate=1e-3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_()
    before = snapshot(model)

    def fail_inside() -> None:
        with merged_adapters(model):
            changed = [name for name, (_, v) in snapshot(model).items() if not torch.equal(v, before[name][1])]
            assert len(changed) == len(scored_parameters(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert_unchanged(model, before)


def test_zeros_under_an_active_adapter_are_refused() -> None:
    model, _ = with_lora()
    mask = select({name: torch.zeros(w.shape) for name, w in scored_parameters(model).items()}, 0.5, "random")
    with pytest.raises(UserError, match="merge_and_unload"), deactivate(model, mask):
        pytest.fail("the block must not run")
    with merged_adapters(model), deactivate(model, mask):
        name = mask.names[0]
        assert not scored_parameters(model)[name][mask.tensor(name)].any()


# ------------------------------------------------------------------------------------------------------------
# Speech and audio language models
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("speech", [False, True])
def test_the_language_model_in_a_speech_lm_from_text_and_from_speech(speech: bool) -> None:
    model, processor = tiny_speech_lm()
    prompt = processor.speech_prompt(3) if speech else [5, 6, 7, 8]
    row = torch.tensor([[*prompt, 20, 21]])
    batch: Batch = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "labels": torch.tensor([[-100] * len(prompt) + [20, 21]]),
    }
    if speech:
        batch["encoder_frames"] = torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0))
        batch["frame_counts"] = torch.tensor([17])
    scores = estimate_importance(model, [batch], ["signed_sum"])
    assert_equal_to_autograd(model, [batch], scores)
    assert scores.names == tuple(scored_parameters(model.language_model))


AUDIO = 31  # the placeholder token
LLAMA = {"model_type": "llama", **SMALL}
QWEN2 = {"model_type": "qwen2", **SMALL}
WHISPER_LIKE = {"num_mel_bins": 8, "max_source_positions": 8}  # 16 frames in, 8 after the convolution, 4 pooled
AUDIO_LLMS: dict[str, dict[str, Any]] = {
    "qwen2_audio": {
        "audio_config": {
            "model_type": "qwen2_audio_encoder", "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16, **WHISPER_LIKE,
        },
        "text_config": QWEN2,
        "audio_token_index": AUDIO,
    },
    "voxtral": {
        # the projector takes `intermediate_size` numbers at a time: 2 frames of 8
        "audio_config": {
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **WHISPER_LIKE,
        },
        "text_config": LLAMA,
        "audio_token_id": AUDIO,
    },
    "audioflamingo3": {
        "audio_config": {
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **WHISPER_LIKE,
        },
        "text_config": QWEN2,
        "audio_token_id": AUDIO,
    },
    "granite_speech": {
        "encoder_config": {
            "input_dim": 8, "num_layers": 2, "hidden_dim": 8, "num_heads": 2, "output_dim": 4, "context_size": 8,
            "max_pos_emb": 8, "conv_kernel_size": 3,
        },
        "projector_config": {
            "model_type": "blip_2_qformer", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "encoder_hidden_size": 8, "cross_attention_frequency": 1,
        },
        "text_config": {"model_type": "granite", **SMALL},
        "audio_token_index": AUDIO,
        "has_lora_adapter": False,
        "downsample_rate": 4,
        "window_size": 8,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


AUDIO_CLASSES: dict[str, Any] = {
    "qwen2_audio": Qwen2AudioForConditionalGeneration,
    "voxtral": VoxtralForConditionalGeneration,
    "audioflamingo3": AudioFlamingo3ForConditionalGeneration,
    "granite_speech": GraniteSpeechForConditionalGeneration,
}


def audio_batch(kind: str) -> Batch:
    """Two rows as the model's processor gives them: four placeholders for 16 feature frames, then text."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.tensor([[3, *[AUDIO] * 4, 9, 10, 11, 12], [4, *[AUDIO] * 4, 9, 13, 0, 0]])
    mask = torch.ones_like(rows)
    mask[1, -2:] = 0
    labels = torch.full_like(rows, -100)
    labels[0, 6:] = rows[0, 6:]
    labels[1, 6] = rows[1, 6]
    features = torch.randn(2, 8, 16, generator=generator)
    batch: Batch = {"input_ids": rows, "attention_mask": mask, "labels": labels, "ids": ["a", "b"]}
    frames = torch.ones(2, 16, dtype=torch.long)
    if kind == "granite_speech":
        valid = torch.ones(2, 4, dtype=torch.bool)
        return {**batch, "input_features": features.transpose(1, 2).contiguous(), "input_features_mask": valid}
    if kind == "qwen2_audio":
        return {**batch, "input_features": features, "feature_attention_mask": frames}
    if kind == "audioflamingo3":
        return {**batch, "input_features": features, "input_features_mask": frames}
    return {**batch, "input_features": features}


def tiny_audio_llm(kind: str) -> nn.Module:
    config = AutoConfig.for_model(kind, **AUDIO_LLMS[kind])
    torch.manual_seed(0)
    model: nn.Module = AUDIO_CLASSES[kind](config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.4)
    return model.eval()


@pytest.mark.parametrize("kind", AUDIO_LLMS)
def test_the_language_model_inside_an_audio_llm(kind: str) -> None:
    model, batch = tiny_audio_llm(kind), audio_batch(kind)
    scores = estimate_importance(model, [batch])
    assert_equal_to_autograd(model, [batch], scores)
    alone = AutoModelForCausalLM.from_config(model.config.text_config)
    assert scores.names == tuple(scored_parameters(alone))  # canonical names, nothing of the audio tower
    assert len(scores.names) == 14

    deaf = {**batch, "input_features": torch.zeros_like(batch["input_features"])}
    other = estimate_importance(model, [deaf])
    name = scores.names[0]
    assert not torch.allclose(scores.tensors("signed_sum")[name], other.tensors("signed_sum")[name])


def test_an_audio_llm_whose_placeholders_are_not_expanded_is_told_about_its_labels() -> None:
    model, batch = tiny_audio_llm("qwen2_audio"), audio_batch("qwen2_audio")
    keep = [0, 1, 5, 6, 7, 8]  # one placeholder, which the model expands itself
    short = {key: batch[key][:, keep] for key in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(UserError, match="must be as long as the model's sequence"):
        estimate_importance(model, [{**batch, **short}])
