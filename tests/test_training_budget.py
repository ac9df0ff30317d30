"""Memory and arithmetic by formula, against what autograd saves, what the FLOP counter counts, and published sizes."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from palimpsest.files import UserError
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.models.tokens import SpeechTokenizer
from palimpsest.planning.memory import (
    Batch,
    Decoder,
    Encoder,
    Setup,
    activation_bytes,
    largest_rows,
    memory,
    optimizer_traffic,
    recomputed_flops,
    step_flops,
)
from palimpsest.planning.sizes import GPUS, decoder_sizes, encoder_sizes, find_gpu
from palimpsest.training.methods import Method, add_lora, rules_for
from palimpsest.training.rules import parameter_groups
from tiny import VOCAB, tiny_encoder, tiny_llama, tiny_speech_lm

ROWS, LENGTH, ANSWER, RANK = 4, 40, 6, 4
SIZES = {"hidden_size": 64, "intermediate_size": 160}  # 4 heads of 16 on 2 key-value heads, from tiny_llama
ENCODER = Encoder(parameters=1000, dim=16, layers=2)


class Wrapped(nn.Module):
    """A language model where `add_lora` looks for it."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model


def model_and_batch(kind: str, dtype: torch.dtype, layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    wrapped = Wrapped(tiny_llama(num_hidden_layers=layers, **SIZES).to(dtype).train())
    if kind == "lora":
        add_lora(wrapped, Method("lora", rank=RANK))  # type: ignore[arg-type]
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(kind == "full" or ".lora_" in name)
    input_ids = torch.randint(5, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[0, -5:] = 0  # some padding, or attention would need no mask
    labels = torch.full_like(input_ids, -100)
    labels[:, -12:-6] = input_ids[:, -12:-6]
    return wrapped.language_model, {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@functools.cache
def decoder(layers: int) -> Decoder:
    model = tiny_llama(num_hidden_layers=layers, **SIZES)
    matrices = scored_parameters(model).values()
    return Decoder(
        layers=layers, hidden=64, heads=4, head_dim=16, intermediate=160, vocabulary=VOCAB, tied=True,
        parameters=sum(p.numel() for p in model.parameters()), matrices=sum(m.numel() for m in matrices),
        lora_sides=sum(sum(m.shape) for m in matrices),
    )  # fmt: skip


def setup(kind: str, layers: int = 2, **changes: Any) -> Setup:
    return Setup(decoder(layers), ENCODER, kind, rank=RANK, **{"modality": "text", "device": "cpu", **changes})  # type: ignore[arg-type]


BATCH = Batch(rows=ROWS, length=LENGTH, positions=0, supervised=ANSWER, columns=ANSWER)


def saved_bytes(kind: str, dtype: torch.dtype, autocast: bool, checkpointing: bool, layers: int) -> int:
    """Bytes that autograd keeps of a forward pass: each storage once, parameters not counted."""
    model, batch = model_and_batch(kind, dtype, layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor  # held, so that no other takes its address
        return tensor

    # As the adaptor's output would: gradients go all the way down, whatever is frozen.
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_(True)
    labels = batch.pop("labels")
    columns = (labels[:, 1:] != -100).any(0).nonzero().squeeze(1)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(inputs_embeds=embeddings, **batch, use_cache=False, logits_to_keep=columns)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["full", "lora", "adaptor"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_a_layer_keeps_what_the_formula_says(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    options: dict[str, Any] = {"weight_bytes": dtype.itemsize, "autocast": autocast}
    measured = [saved_bytes(kind, dtype, autocast, False, layers) for layers in (2, 4)]
    planned = [activation_bytes(setup(kind, layers, **options), BATCH) for layers in (2, 4)]
    assert planned[1] - planned[0] == measured[1] - measured[0]  # two layers, to the byte
    assert planned[0] == pytest.approx(measured[0], rel=0.02)  # and what is in no layer


def test_with_checkpointing_a_layer_keeps_its_input() -> None:
    measured = [saved_bytes("full", torch.float32, False, True, layers) for layers in (2, 4)]
    planned = [activation_bytes(setup("full", layers, checkpointing=True), BATCH) for layers in (2, 4)]
    assert planned[1] - planned[0] == measured[1] - measured[0] == 2 * ROWS * LENGTH * 64 * 4


@pytest.mark.parametrize("kind", ["adaptor", "full", "lora"])
def test_trained_parameters_are_those_of_the_rules(kind: str) -> None:
    model, _ = tiny_speech_lm()
    sides = sum(sum(m.shape) for m in scored_parameters(model).values())
    total = sum(p.numel() for p in model.language_model.parameters())
    method = Method(kind, rank=RANK)  # type: ignore[arg-type]
    if kind == "lora":
        add_lora(model, method)
    groups = parameter_groups(model, rules_for(method), lr=1.0)
    sizes = replace(decoder(2), hidden=32, parameters=total, lora_sides=sides)
    planned = Setup(sizes, ENCODER, kind, rank=RANK, adaptor_hidden=24)  # type: ignore[arg-type]
    assert planned.trainable == sum(p.numel() for group in groups for p in group["params"])


@pytest.mark.parametrize("kind", ["full", "lora", "adaptor"])
def test_flops_are_those_the_counter_counts(kind: str) -> None:
    model, batch = model_and_batch(kind, torch.float32, 2)
    model.config._attn_implementation = "eager"  # whose matrix products the counter sees
    for name, parameter in model.named_parameters():
        if "layers.0.input_layernorm" in name:
            parameter.requires_grad_(True)  # gradients must go all the way down, as to an adaptor
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(supervised_losses(model, batch)[0].sum())
    tokens, supervised = ROWS * LENGTH, ROWS * ANSWER
    planned = step_flops(setup(kind), tokens, LENGTH, 0, supervised)
    planned += 6 * 2 * 64 * LENGTH * tokens  # the eager kernel does not leave out what the causal mask hides
    assert counter.get_total_flops() == pytest.approx(planned, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "adaptor"])
def test_flops_and_parameters_of_speech_tokens(kind: str) -> None:
    """A row is looked up; what is multiplied is each position with every centroid, forward."""
    k, positions, n = 12, 6, 3
    drawn = torch.randn(k, 16, generator=torch.Generator().manual_seed(0))
    tensors = {"mean": torch.zeros(16), "scale": torch.ones(16), "centroids": drawn}
    language_model = tiny_llama(eos_token_id=3)
    model = SpeechLM.from_parts(
        tiny_encoder(), language_model, reads="tokens", tokenizer=SpeechTokenizer(2, tensors), collapse=False
    )
    language_model.config._attn_implementation = "eager"
    groups = parameter_groups(model, rules_for(Method(kind)), lr=1.0)  # type: ignore[arg-type]
    matrices = sum(m.numel() for m in scored_parameters(model).values())
    sizes = replace(
        decoder(2), hidden=32, head_dim=8, matrices=matrices, parameters=sum(p.numel() for p in
        language_model.parameters()),
    )  # fmt: skip
    planned = Setup(sizes, ENCODER, kind, stack_factor=2, speech_tokens=k)  # type: ignore[arg-type]
    assert planned.adaptor_parameters == k * 32
    assert planned.trainable == sum(p.numel() for group in groups for p in group["params"])
    length = 1 + positions + 3
    ids = torch.tensor([[1, *[-200] * positions, 5, 6, 7]] * n)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.where(ids == 7, -100),
        "encoder_frames": torch.randn(n, 2 * positions, 16), "frame_counts": torch.full((n,), 2 * positions),
    }  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(supervised_losses(model, batch)[0].sum())
    expected = step_flops(planned, n * length, length, n * positions, n) + 6 * 2 * 32 * length * n * length
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert step_flops(planned, 1, 1, 1, 0) - step_flops(planned, 1, 1, 0, 0) == 2 * k * 16


def test_published_sizes() -> None:
    small, _ = decoder_sizes("meta-llama/Llama-3.2-1B-Instruct")
    large, _ = decoder_sizes("meta-llama/Llama-3.1-8B")
    assert (small.parameters, large.parameters) == (1_235_814_400, 8_030_261_248)  # as on their model cards
    # 16 layers of q and o (2048²), k and v (2048 × 512), three of 2048 × 8192
    assert small.matrices == 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    assert small.lora_sides == 16 * (2 * 4096 + 2 * 2560 + 3 * 10_240)
    assert encoder_sizes("openai/whisper-large-v3")[0].parameters == pytest.approx(637e6, rel=0.001)


def test_bytes_by_hand() -> None:
    """A 1B full fine-tuning in float32: 16 bytes a parameter at the end of backward, without activations."""
    small, _ = decoder_sizes("meta-llama/Llama-3.2-1B")
    plan = memory(Setup(small, Encoder(0, 1280, 32), "full"), Batch(1, 2, 1, 1, 1))
    trained = 1_235_814_400 + (6400 + 1) * 2048 + (2048 + 1) * 2048
    assert (plan.weights, plan.gradients, plan.optimizer) == (4 * trained, 4 * trained, 8 * trained)
    # The tied embedding's two gradients are both there before they are added.
    assert plan.moments["backward ends"] == 4 * trained + 4 * 128_256 * 2048 + plan.activations // 16
    assert plan.peak == 12 * trained + 1_000_000_000 + max(plan.moments.values())
    assert optimizer_traffic(Setup(small, Encoder(0, 1280, 32), "full")) == 28 * trained


def test_gradients_of_accumulated_batches_come_on_top_of_activations() -> None:
    small, _ = decoder_sizes("llama-3.2-1b")
    once = Setup(small, ENCODER, "full")
    batch = Batch(8, 400, 300, 50, 100)
    one, more = memory(once, batch), memory(replace(once, accumulation=4), batch)
    assert more.peak - one.peak == one.gradients
    fused = memory(replace(once, fused_loss=True), batch)
    assert one.moments["the loss is computed"] - fused.moments["the loss is computed"] == one.logits > 0


def test_on_a_cpu_the_allocator_keeps_some_of_what_was_freed() -> None:
    gpu, cpu = (memory(setup("full", device=device), BATCH) for device in ("cuda", "cpu"))
    assert gpu.peak == gpu.in_use
    assert cpu.peak - cpu.in_use == cpu.allocator == round(0.5 * cpu.activations)
    assert memory(setup("full", device="cpu", checkpointing=True), BATCH).allocator == cpu.allocator


def test_sharding_divides_what_is_kept() -> None:
    large, _ = decoder_sizes("llama-3.1-8b")
    one = Setup(large, ENCODER, "full", autocast=True, checkpointing=True)
    batch = Batch(1, 700, 300, 100, 200)
    alone, eighth = memory(one, batch), memory(replace(one, n_gpus=8), batch)
    assert (eighth.weights, eighth.optimizer) == (-(-alone.weights // 8), -(-alone.optimizer // 8))
    assert alone.peak > 128e9 > 40e9 > eighth.peak
    # Layers are gathered in bf16, so activations are those of bf16 weights, without copies of weights.
    assert eighth.activations == memory(replace(one, n_gpus=1, weight_bytes=2), batch).activations < alone.activations
    float32 = [memory(replace(one, n_gpus=n, autocast=False), batch).activations for n in (1, 8)]
    assert float32[0] == float32[1]


@given(st.sampled_from(["full", "layer_lr", "lora", "adaptor"]), st.integers(1, 600), st.integers(1, 80), st.booleans())
def test_the_largest_batch_fits_and_one_row_more_does_not(kind: str, length: int, gb: int, checkpointing: bool) -> None:
    it = setup(kind, checkpointing=checkpointing)
    batch = replace(BATCH, length=length + 7)
    rows = largest_rows(it, batch, gb * 10**9)
    assert rows == 0 or memory(it, replace(batch, rows=rows)).peak <= gb * 10**9
    assert memory(it, replace(batch, rows=rows + 1)).peak > gb * 10**9
    assert recomputed_flops(it, 100, 10) == 0.0 or checkpointing


def test_gpus_and_shapes_by_name() -> None:
    assert find_gpu("h100") is GPUS["H100"]
    with pytest.raises(UserError, match="There is no GPU 'H900' in the table; it has H200"):
        find_gpu("H900")
    with pytest.raises(UserError, match="no built-in shape 'llama-9'"):
        decoder_sizes("x/y", shape="llama-9")


def test_a_config_file_in_place_of_a_hub_name(tmp_path: Path) -> None:
    tiny_llama(**SIZES).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        sizes, origin = decoder_sizes("owner/model", config_file=path)
        assert sizes == decoder(2)
        assert origin == str(path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no config of a Hugging Face model"):
        decoder_sizes("owner/model", config_file=tmp_path)
