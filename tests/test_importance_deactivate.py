"""Zeroing in place and bringing back, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_llama, tiny_speech_lm
from torch import Tensor, nn

from palimpsest.files import UserError
from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.mask import Mask
from palimpsest.importance.select import select
from palimpsest.models.anatomy import scored_parameters


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().flatten().view(torch.uint8) for name, p in model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(0, 1), seed=st.integers(0, 1000), half=st.booleans(), fails=st.booleans())
def test_zero_inside_and_the_same_bits_outside(ratio: float, seed: int, half: bool, fails: bool) -> None:
    model = tiny_llama(seed).to(torch.bfloat16 if half else torch.float32)
    weights = scored_parameters(model)
    with torch.no_grad():  # values a copy through arithmetic would not keep
        next(iter(weights.values())).view(-1)[:4] = torch.tensor([-0.0, float("nan"), float("inf"), 2.0**-133])
    before = bits(model)
    mask = select({name: torch.zeros(w.shape) for name, w in weights.items()}, ratio, "random", seed=seed)

    class Stop(Exception):
        pass

    def look() -> None:
        with deactivate(model, mask):
            for name, weight in weights.items():
                flags = mask.tensor(name)
                assert not weight.detach()[flags].any()
                original = before[name].view(weight.dtype).reshape(weight.shape)
                kept = torch.equal(weight.detach()[~flags].view(torch.uint8), original[~flags].view(torch.uint8))
                assert kept
            if fails:
                raise Stop

    if fails:
        with pytest.raises(Stop):
            look()
    else:
        look()
    assert same_bits(bits(model), before)


def test_blocks_can_be_nested() -> None:
    model = tiny_llama()
    before = bits(model)
    zeros = {name: torch.zeros(w.shape) for name, w in scored_parameters(model).items()}
    outer, inner = (select(zeros, 0.5, "random", seed=seed) for seed in (0, 1))
    with deactivate(model, outer):
        after_outer = bits(model)
        with deactivate(model, inner):
            assert not same_bits(bits(model), after_outer)
        assert same_bits(bits(model), after_outer)
    assert same_bits(bits(model), before)


def test_the_language_model_of_a_speech_lm() -> None:
    model, _ = tiny_speech_lm()
    name, weight = next(iter(scored_parameters(model).items()))
    with deactivate(model, Mask.from_tensors({name: torch.ones(weight.shape, dtype=torch.bool)})):
        assert not weight.any()
        assert model.adaptor.linear1.weight.any()
    assert weight.any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2).bool()}, "model.layers.9"),
        ({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2).bool()}, r"shape \(2, 2\)"),
    ],
)
def test_a_mask_of_another_model_changes_nothing(flags: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = bits(model)
    fitting = {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32).bool()}
    with pytest.raises(UserError, match=message), deactivate(model, Mask.from_tensors({**fitting, **flags})):
        pytest.fail("the block must not run")
    assert same_bits(bits(model), before)
