"""The fused loss: the same sum and the same gradients as the plain one; heads it does not know are refused.

Liger's kernel itself needs CUDA (marked gpu); here a kernel of plain torch operations stands in for it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from palimpsest.files import UserError
from palimpsest.models.fused_loss import choose_kernel, fused_loss, liger_kernel, require_same_loss
from palimpsest.models.loss import supervised_losses
from palimpsest.training.methods import Method, add_lora
from tiny import tiny_llama, tiny_speech_lm

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip


def torch_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return cross_entropy(logits.float(), targets, reduction="sum")


def text_batch() -> dict[str, Any]:
    input_ids = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "ids": ["a", "b", "c"]}


def speech_batch() -> dict[str, Any]:
    batch = text_batch()
    batch["input_ids"][:, 1:3] = -200  # two positions of five frames
    frames = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(1))
    return {**batch, "encoder_frames": frames, "frame_counts": torch.tensor([10, 10, 10])}


def speech_lm(lora: bool) -> nn.Module:
    model, _ = tiny_speech_lm()
    if lora:
        torch.manual_seed(0)
        add_lora(model, Method("lora", rank=2))
    return model


MODELS = {
    "tied": (lambda: tiny_llama(), text_batch),
    "untied": (lambda: tiny_llama(tied=False), text_batch),
    "soft cap": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)).eval(), text_batch),
    "speech": (lambda: speech_lm(False), speech_batch),
    "speech, LoRA": (lambda: speech_lm(True), speech_batch),
}


@pytest.mark.parametrize("name", MODELS)
def test_sum_and_gradients_are_those_of_the_plain_loss(name: str) -> None:
    make, make_batch = MODELS[name]
    model, batch = make(), make_batch()
    losses, _ = supervised_losses(model, batch)
    losses.sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert expected
    model.zero_grad()
    total, n_tokens = fused_loss(model, batch, torch_kernel)
    total.backward()
    assert n_tokens == len(losses)
    torch.testing.assert_close(total, losses.sum())
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-4)
    require_same_loss(model, batch, torch_kernel)


def test_no_logits_are_made() -> None:
    model = tiny_llama()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel()))
    fused_loss(model, text_batch(), torch_kernel)
    assert rows == [0]


def test_a_head_that_scales_its_logits_is_found_out() -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)).eval()
    with pytest.raises(UserError, match=r"set training\.liger to false"):
        require_same_loss(model, text_batch(), torch_kernel)


def test_a_head_that_is_more_than_linear_is_refused() -> None:
    model = tiny_llama()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="not one plain linear layer"):
        fused_loss(model, text_batch(), torch_kernel)


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(yes: bool) -> None:
        monkeypatch.setattr("palimpsest.models.fused_loss.find_spec", lambda name: object() if yes else None)

    installed(False)
    assert choose_kernel(False, "cuda") is None
    assert choose_kernel("auto", "cuda") is None
    with pytest.raises(UserError, match=r"install palimpsest-llm\[liger\]"):
        choose_kernel(True, "cuda")
    installed(True)
    assert choose_kernel("auto", "cpu") is None
    assert choose_kernel("auto", "cuda:1") is liger_kernel
    assert choose_kernel(True, "cuda") is liger_kernel
    with pytest.raises(UserError, match="train on a GPU"):
        choose_kernel(True, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_gives_the_plain_loss_and_gradients(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    model = tiny_llama(tied=False).to("cuda", dtype)
    batch = {key: value.cuda() if isinstance(value, Tensor) else value for key, value in text_batch().items()}
    losses, _ = supervised_losses(model, batch)
    losses.sum().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    total, _ = fused_loss(model, batch, liger_kernel)
    total.backward()
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(total.float(), losses.sum().float(), rtol=tolerance, atol=tolerance)
    for key, parameter in model.named_parameters():
        error = (parameter.grad - expected[key]).float().norm() / expected[key].float().norm()
        assert error < tolerance, key
