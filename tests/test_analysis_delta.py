"""Parameter change: norms and overlaps by hand, planted overlap found, chance level at noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.analysis.delta import AbsoluteChange, delta_records, largest
from palimpsest.files import UserError
from palimpsest.records import DeltaRecord

Q0 = "model.layers.0.self_attn.q_proj.weight"


def one(base: torch.Tensor, tuned: torch.Tensor, importance: torch.Tensor, ratio: float = 0.25) -> DeltaRecord:
    (record,) = delta_records({Q0: base}, {Q0: tuned}, {Q0: importance}, method="full", ratio=ratio)
    return record


def test_norm_and_overlap_by_hand() -> None:
    base = torch.tensor([[3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    tuned = base + torch.tensor([[0.0, -3.0, 0.5, 0.0], [4.0, 0.5, 0.0, 0.0]])
    importance = torch.tensor([[0.0, 9.0, 1.0, 8.0], [2.0, 0.0, 0.0, 0.0]])
    record = one(base, tuned, importance)  # largest 2 of 8: changes at (0,1), (1,0); important (0,1), (0,3)
    assert record["relative_norm"] == pytest.approx(math.sqrt(25.5) / 5)
    assert record["overlap_with_importance"] == 0.5
    assert record["overlap_by_chance"] == 0.25
    assert (record["method"], record["name"], record["layer"], record["kind"]) == ("full", Q0, 0, "q")


def test_planted_overlap_and_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    base, change, scores = (torch.randn(300, 200, generator=generator) for _ in range(3))
    at_random = one(base, base + change, scores.abs(), ratio=0.03)
    # 1800 draws hitting with probability 0.03: standard deviation 0.004.
    assert at_random["overlap_with_importance"] == pytest.approx(at_random["overlap_by_chance"], abs=0.016)
    planted = one(base, base + scores.abs() * 1e-2, scores.abs(), ratio=0.03)
    assert planted["overlap_with_importance"] > 0.99


def test_unchanged_matrix_is_explicit() -> None:
    record = one(torch.ones(4, 4), torch.ones(4, 4), torch.rand(4, 4) + 0.1)
    assert record["relative_norm"] == 0.0
    assert math.isnan(record["overlap_with_importance"])
    assert math.isnan(one(torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2))["relative_norm"])


def test_few_changes_are_not_filled_up_with_zeros() -> None:
    """One changed entry of 100, on the most important weight: all of the changes hit, not a tenth."""
    base = torch.zeros(10, 10)
    tuned, importance = base.clone(), torch.rand(10, 10)
    tuned[4, 4], importance[4, 4] = 0.1, 5.0
    assert one(base, tuned, importance, ratio=0.1)["overlap_with_importance"] == 1.0


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.sampled_from([0.03, 0.1, 0.25, 0.5]),
)
def test_largest_equals_a_stable_sort(values: list[int], ratio: float) -> None:
    array = np.array(values, dtype=np.float32)
    count = max(1, int(ratio * len(values) + 0.5))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert np.flatnonzero(largest(array, ratio)).tolist() == sorted(i for i in order if values[i] > 0)


def test_absolute_change_is_lazy_and_half_precision_is_widened() -> None:
    base = {Q0: torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)}
    change = AbsoluteChange(base, {Q0: torch.tensor([[1.5, -2.0]])})
    assert list(change) == [Q0]
    assert len(change) == 1
    assert change[Q0].tolist() == [[0.5, 4.0]]
    assert change[Q0].dtype == torch.float32


def test_models_that_do_not_belong_together_are_refused() -> None:
    ones = torch.ones(2, 2)
    with pytest.raises(UserError, match="missing from the tuned model"):
        delta_records({Q0: ones}, {}, {Q0: ones}, method="full")
    with pytest.raises(UserError, match="in the base"):
        one(ones, torch.ones(2, 3), ones)
    with pytest.raises(UserError, match="Importance of"):
        one(ones, ones, torch.ones(2, 3))
    with pytest.raises(UserError, match="between 0 and 1"):
        one(ones, ones, ones, ratio=3)


def test_embedding_is_left_out() -> None:
    tensors = {"model.embed_tokens.weight": torch.ones(2, 2)}
    assert delta_records(tensors, tensors, tensors, method="full") == []
