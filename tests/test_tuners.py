"""Any tuner of peft: what it makes trainable is trained, and it ends in the weights; Eq. 3's mean as a control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from palimpsest.files import UserError
from palimpsest.training.methods import Method, add_lora, added_parameters, merge_lora, method_scales, require_mergeable
from palimpsest.training.remedies import Distill
from palimpsest.training.train import Settings, train
from palimpsest.training.tuners import require_merging, tuner_config
from spoken import spoken
from tiny import tiny_llama, tiny_speech_lm

IDS = torch.arange(10, 30)[None]
KEYS: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "HRA": {"r": 2},
    "VERA": {"r": 4},
    "IA3": {},
    "LN_TUNING": {},
    "LORA": {"r": 2, "use_dora": True},
}


def method(kind: str, **keys: Any) -> Method:
    return Method("peft", learning_rate=1e-2, peft={"peft_type": kind, **KEYS.get(kind, {}), **keys})


@torch.no_grad()
def logits(language_model: Any) -> torch.Tensor:
    return language_model(IDS).logits


@pytest.mark.parametrize("kind", [*KEYS])
def test_the_merged_model_is_the_tuned_one(kind: str) -> None:
    model, _ = tiny_speech_lm()
    before = logits(model.language_model)
    add_lora(model, method(kind))
    require_merging(model.language_model)
    trained = [it for it in model.language_model.parameters() if it.requires_grad]
    assert sum(it.numel() for it in trained) == added_parameters(tiny_llama(), method(kind)) > 0
    torch.manual_seed(0)
    for parameter in trained:
        parameter.data += 0.05 * torch.randn_like(parameter)
    tuned = logits(model.language_model.eval())
    merge_lora(model)
    assert type(model.language_model).__name__ == "LlamaForCausalLM"
    assert not torch.allclose(tuned, before, atol=1e-3)
    assert torch.allclose(logits(model.language_model), tuned, atol=2e-4)


def test_trained_is_what_peft_makes_trainable_and_the_adaptor(tmp_path: Path) -> None:
    examples, collator = spoken(tmp_path)
    model, _ = tiny_speech_lm()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    settings = Settings(epochs=1, batch_size=4, warmup_ratio=0.0, seed=1)
    # Of the matrices k_proj's alone, and beside them what ends in norm, which peft copies whole.
    tuner = method("OFT", target_modules=["k_proj"], modules_to_save=["norm"])
    train(model, examples, collator, tuner, settings, tmp_path / "run", name="oft")
    after = model.state_dict()
    assert after.keys() == fresh.keys()
    moved = {name.removeprefix("language_model.") for name in fresh if not torch.equal(fresh[name], after[name])}
    adaptor = {"adaptor.linear1.weight", "adaptor.linear1.bias", "adaptor.linear2.weight", "adaptor.linear2.bias"}
    keys = {f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)}
    assert moved == adaptor | keys | {name for name in moved if name.endswith("norm.weight")}
    assert "model.norm.weight" in moved
    again, _ = tiny_speech_lm()
    adapted = PeftModel.from_pretrained(again.language_model, str(tmp_path / "run/adapter"))
    assert torch.allclose(logits(adapted.merge_and_unload()), logits(model.language_model), atol=1e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("peft", peft={"peft_type": "FOURIERFT", "n_frequency": "many"}), "FOURIERFT"),
        (Method("peft", peft={"r": 3}), "peft has no peft_type ''"),
        (Method("peft", peft={"peft_type": "OFT", "target_modules": ["q_proj"]}, targets=("q_proj",)), "same thing"),
        (Method("peft", peft={"peft_type": "OFT"}, targets=("nothing",)), "OFT's targets .nothing. are not"),
    ],
)
def test_what_peft_does_not_take_is_told(method: Method, message: str) -> None:
    model, _ = tiny_speech_lm()
    with pytest.raises(UserError, match=message):
        add_lora(model, method)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "full", "targets": ("q_proj",)}, "targets belongs to kind lora and peft; full does not use it"),
        ({"kind": "layer_lr", "dropout": 0.1}, "dropout belongs to kind lora"),
        ({"kind": "lora", "lambda_": 0.1}, "lambda_ belongs to kind layer_lr"),
        ({"kind": "peft", "rank": 4, "peft": {"peft_type": "VERA"}}, r"options stand under the key peft"),
        (
            {"kind": "peft", "peft": {"peft_type": "LORA", "bias": "all"}, "distill": Distill()},
            "trains biases of the base",
        ),
    ],
)
def test_a_key_that_its_kind_does_not_use_is_told(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**keys)
    Method("full", rank=4)  # as in recipes that give it to every kind


def test_targets_are_those_of_lora_unless_a_tuner_is_about_others() -> None:
    assert tuner_config(method("OFT"), ["q_proj"]).target_modules == {"q_proj"}
    assert tuner_config(method("IA3"), ["q_proj"]).target_modules is None
    named = Method("peft", peft={"peft_type": "IA3", "feedforward_modules": []}, targets=("v_proj",))
    assert tuner_config(named, ["v_proj"]).target_modules == {"v_proj"}


def test_sixteen_bits_are_too_few_to_merge_into() -> None:
    model, _ = tiny_speech_lm()
    with pytest.raises(UserError, match="tuner would be merged into bfloat16"):
        require_mergeable(method("OFT"), model.bfloat16())
    require_mergeable(Method("lora", gate="speech"), model)  # is not merged


def test_the_mean_rate_of_eq_3_by_hand() -> None:
    # n = (0, 0.5, 1), λ = 0.4: scales 1, 0.8, 0.6, whose mean is 0.8.
    layer_lr = Method("layer_lr", lambda_=0.4, importance="mean")
    assert method_scales(layer_lr, {0: 1.0, 1: 2.0, 2: 3.0}) == pytest.approx({0: 0.8, 1: 0.8, 2: 0.8})
