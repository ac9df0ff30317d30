"""Ablation, and the first-order estimate in the limit where it must agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.test_importance_estimate import LinearLM, make_batches
from tests.tiny import tiny_llama

from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.exact import agreement, exact_importance
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loss import supervised_losses
from palimpsest.rundir import UserError


def test_by_hand() -> None:
    # Column 0 is (ln 3, 0): the loss of target 1 is ln 4, and ln 2 once the ln 3 is gone.
    weight = torch.tensor([[math.log(3), 5.0], [0.0, 7.0]])
    batch = {
        "input_ids": torch.tensor([[0, 1]]),
        "attention_mask": torch.ones(1, 2),
        "labels": torch.tensor([[-100, 1]]),
    }
    name = "layers.0.up_proj.weight"
    exact = exact_importance(LinearLM(weight.clone()), [batch], [(name, i) for i in range(4)])
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
        exact = exact_importance(model, batches, positions)
        errors.append(np.abs(taylor - exact).max() / exact.max())
    assert errors[0] < 1e-1
    assert errors[1] < 0.3 * errors[0]  # what is left out is of second order


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny_llama().train()
    batches = make_batches(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = next(iter(scored_parameters(model)))
    exact_importance(model, batches, [(name, 3), (name, 4)])
    assert model.training
    with pytest.raises(UserError, match=f"no weight 1000000 of {name}"):
        exact_importance(model, batches, [(name, 3), (name, 1_000_000)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_unit_is_nats_per_token() -> None:
    model, batches = tiny_llama(), make_batches(2)
    name = "model.layers.0.mlp.down_proj.weight"

    def mean_loss() -> float:
        with torch.no_grad():
            return torch.cat([supervised_losses(model, batch)[0] for batch in batches]).double().mean().item()

    (exact,) = exact_importance(model, batches, [(name, 7)])
    base = mean_loss()
    with torch.no_grad():
        scored_parameters(model)[name].view(-1)[7] = 0
    assert exact == pytest.approx(abs(mean_loss() - base), abs=1e-9)


def test_agreement_by_hand() -> None:
    exact = np.arange(10.0)
    same = agreement(exact, exact**2, [0.2, 0.01])
    assert (same.n, same.spearman, same.kendall) == (10, pytest.approx(1), pytest.approx(1))
    assert same.top_precision == {0.2: 1.0}
    swapped = exact.copy()
    swapped[[7, 8]] = swapped[[8, 7]]  # first two by exact: 9, 8; by the other: 9, 7
    result = agreement(exact, swapped, [0.2])
    assert result.top_precision == {0.2: 0.5}
    assert result.kendall == pytest.approx(1 - 2 / 45)
    assert result.spearman == pytest.approx(1 - 6 * 2 / (10 * 99))
    with pytest.raises(UserError, match="same two or more"):
        agreement(exact, exact[:3])
