"""Ablation, and the first-order estimate in the limit where it must agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.test_importance_estimate import LinearLM, make_batches
from tests.tiny import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from palimpsest.ablation.exact import Float64Throughout, exact_changes, signed_products
from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from palimpsest.models.anatomy import find_language_model, module_kind, named_parameters, scored_parameters
from palimpsest.models.loss import supervised_losses
from palimpsest.models.packing import SharedPrefix, pack


def test_by_hand() -> None:
    # Column 0 is (ln 3, 0): the loss of target 1 is ln 4, and ln 2 once the ln 3 is gone.
    weight = torch.tensor([[math.log(3), 5.0], [0.0, 7.0]])
    batch = {
        "input_ids": torch.tensor([[0, 1]]),
        "attention_mask": torch.ones(1, 2),
        "labels": torch.tensor([[-100, 1]]),
    }
    name = "layers.0.up_proj.weight"
    exact = np.abs(exact_changes(LinearLM(weight.clone()), [batch], [(name, i) for i in range(4)]))
    assert exact == pytest.approx([math.log(2), 0.0, 0.0, 0.0], abs=1e-6)


def test_first_order_estimates_agree_in_the_limit_of_small_weights() -> None:
    batches = make_batches(2)
    positions = [(name, index) for name in scored_parameters(tiny_llama()) for index in (0, 100, 411)]
    errors = []
    for scale in (1e-2, 1e-3):
        model = tiny_llama().double()
        parameters = scored_parameters(model)
        with torch.no_grad():
            for name, index in positions:
                parameters[name].view(-1)[index] *= scale
        scores = estimate_importance(model, batches, ["signed_sum"])
        tensors = scores.tensors("signed_sum")
        taylor = np.array([float(tensors[name].view(-1)[index]) for name, index in positions])
        exact = np.abs(exact_changes(model, batches, positions))
        errors.append(np.abs(taylor - exact).max() / exact.max())
    assert errors[0] < 1e-1
    assert errors[1] < 0.3 * errors[0]  # what is left out is of second order


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny_llama().train()
    batches = make_batches(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = next(iter(scored_parameters(model)))
    exact_changes(model, batches, [(name, 3), (name, 4)])
    assert model.training
    with pytest.raises(UserError, match=f"no weight 1000000 of {name}"):
        exact_changes(model, batches, [(name, 3), (name, 1_000_000)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_unit_is_nats_per_token() -> None:
    model, batches = tiny_llama().double(), make_batches(2)
    name = "model.layers.0.mlp.down_proj.weight"

    def mean_loss() -> float:
        with torch.no_grad(), Float64Throughout():
            return torch.cat([supervised_losses(model, batch)[0] for batch in batches]).double().mean().item()

    (exact,) = np.abs(exact_changes(model, batches, [(name, 7)]))
    base = mean_loss()
    with torch.no_grad():
        scored_parameters(model)[name].view(-1)[7] = 0
    assert exact == pytest.approx(abs(mean_loss() - base), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Stacked ablations against the definition, one weight at a time
# ---------------------------------------------------------------------------------------------------------------------
SIZES = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SIZES))


def tiny_opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
            max_position_embeddings=64, init_std=0.3, **SIZES,
        )
    )  # fmt: skip


def tiny_mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, experts_implementation="eager", max_position_embeddings=64, initializer_range=0.3,
            **SIZES,
        )
    )  # fmt: skip


def naive_changes(model: nn.Module, batches: list[dict[str, Any]], positions: list[tuple[str, int]]) -> list[float]:
    """Eq. 1 to the letter: the whole data once more for every weight."""
    parameters = named_parameters(find_language_model(model))

    def mean_loss() -> float:
        losses = [supervised_losses(model, batch)[0].double() for batch in batches]
        return float(torch.cat(losses).sum()) / sum(map(len, losses))

    changes = []
    with torch.no_grad(), Float64Throughout():
        base = mean_loss()
        for name, index in positions:
            flat = parameters[name].view(-1)
            value = flat[index].clone()
            flat[index] = 0
            changes.append(mean_loss() - base)
            flat[index] = value
    return changes


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_opt, pytest.param(tiny_mixtral, marks=pytest.mark.slow)])
def test_stacked_ablations_equal_one_at_a_time(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    batches = make_batches(2)
    parameters: Mapping[str, torch.Tensor] = scored_parameters(model)
    generator = torch.Generator().manual_seed(5)
    positions = [
        (name, int(torch.randint(weight.numel(), (), generator=generator)))
        for name, weight in parameters.items()
        for _ in range(3)
    ]
    expected = naive_changes(model, batches, positions)
    assert {module_kind(name) for name, _ in positions} >= {"o"}
    assert sum(abs(change) > 1e-6 for change in expected) > len(expected) / 2  # the comparison below means something
    for tokens_at_once in (1, 200, 10_000):  # one copy, some, all of a layer
        stacked = exact_changes(model, batches, positions, tokens_at_once=tokens_at_once)
        assert stacked == pytest.approx(expected, abs=1e-12)


def test_weights_outside_the_linear_maps_of_the_layers() -> None:
    model = tiny_llama().double()  # the embedding is the head as well: two kinds of module, no stacking
    positions = [("model.embed_tokens.weight", 40), ("model.norm.weight", 3), ("model.layers.1.mlp.up_proj.weight", 9)]
    positions.append(("model.layers.1.input_layernorm.weight", 3))
    batches = make_batches(2)
    assert exact_changes(model, batches, positions) == pytest.approx(
        naive_changes(model, batches, positions), abs=1e-12
    )


def test_a_matrix_shared_by_two_layers_is_ablated_in_both() -> None:
    model = tiny_llama().double()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    positions = [("model.layers.0.mlp.up_proj.weight", index) for index in (0, 77)]
    batches = make_batches(1)
    assert exact_changes(model, batches, positions) == pytest.approx(
        naive_changes(model, batches, positions), abs=1e-12
    )


def test_hooks_and_replaced_forwards_are_gone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_llama(), make_batches(1)
    calls = []

    def fail_on_the_second(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return supervised_losses(*args)

    monkeypatch.setattr("palimpsest.ablation.exact.supervised_losses", fail_on_the_second)
    positions = [("model.layers.1.mlp.up_proj.weight", i) for i in range(2)]
    with pytest.raises(RuntimeError):
        exact_changes(model, batches, positions, tokens_at_once=1)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__


def test_signed_products_predict_the_change_of_small_weights() -> None:
    model, batches = tiny_llama().double(), make_batches(2)
    positions = [(name, index) for name in scored_parameters(model) for index in (0, 100)]
    with torch.no_grad():
        for name, index in positions:
            scored_parameters(model)[name].view(-1)[index] *= 1e-4
    n_tokens = sum(len(supervised_losses(model, batch)[0]) for batch in batches)
    predicted = -signed_products(model, batches, positions).sum(axis=0) / n_tokens
    exact = exact_changes(model, batches, positions)
    assert predicted == pytest.approx(exact, rel=0.05, abs=1e-3 * np.abs(exact).max())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows
# ---------------------------------------------------------------------------------------------------------------------
def prompted_batches() -> list[dict[str, Any]]:
    """Two batches of rows that begin with the same five tokens."""
    batches = make_batches(2, length=12)
    for batch in batches:
        batch["input_ids"][:, :5] = torch.tensor([1, 9, 8, 7, 6])
        batch["labels"][:, :7] = -100
    return batches


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_same_losses_in_the_same_order(attention: str) -> None:
    model, batches = tiny_llama(attn_implementation=attention).double(), prompted_batches()
    row = pack(batches)
    n_real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert row["input_ids"].shape == (1, n_real - 5 * 7)  # eight rows, the five tokens once
    with torch.no_grad(), Float64Throughout():
        plain = torch.cat([supervised_losses(model, batch)[0] for batch in batches])
        packed, _ = supervised_losses(SharedPrefix(model), row)
    assert torch.allclose(packed, plain, atol=1e-12)


def test_packed_ablations_equal_plain_ones() -> None:
    model, batches = tiny_llama().double(), prompted_batches()
    positions = [(name, 50) for name in scored_parameters(model)]
    packed = exact_changes(SharedPrefix(model), [pack(batches)], positions)
    assert packed == pytest.approx(exact_changes(model, batches, positions), abs=1e-12)


def test_the_prefix_ends_before_the_first_prediction() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]),
        "attention_mask": torch.ones(2, 4),
        "labels": torch.tensor([[-100, -100, 3, 4], [-100, -100, 3, 5]]),
    }
    row = pack([batch])  # token 2 predicts the first target, so each question keeps its own
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 2, 3, 5]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2, 3]]
    assert row["segments"].tolist() == [[0, 1, 1, 1, 2, 2, 2]]
    assert row["labels"].tolist() == [[-100, -100, 3, 4, -100, 3, 5]]


def test_active_adapters_are_refused() -> None:
    """Their update stays where a weight below it is ablated, and the scores are of both together."""
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora)
    position = ("model.layers.0.self_attn.v_proj.weight", 0)
    for function in (exact_changes, signed_products):
        with pytest.raises(UserError, match="active adapters, which are no part of the weights that are"):
            function(model, make_batches(), [position])
    exact_changes(model.merge_and_unload(), make_batches(), [position])
