"""Deletion curves: which records they hold, and the area against hand-derived values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.evaluation.deactivation import areas, deletion_curve
from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from tiny import tiny_llama

Batch = dict[str, Any]


def one_batch() -> Batch:
    input_ids = torch.randint(5, 300, (4, 8), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[:, :2] = -100
    ids = [f"q{i}" for i in range(4)]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels, "ids": ids}


def record(condition: str, ratio: float, loss: float, seed: int | None = None, scope: str = "global") -> Any:
    return {
        "model": "m", "modality": "text", "condition": condition, "ratio": ratio, "scope": scope, "seed": seed,
        "reduction": "signed_sum", "n_removed": 0, "n_examples": 1, "n_tokens": 1, "loss": loss,
        "perplexity": math.exp(loss),
    }  # fmt: skip


def test_a_curve_has_every_point_once_and_agrees_with_single_measurements() -> None:
    model, batch = tiny_llama(), one_batch()
    tensors = estimate_importance(model, [batch]).tensors("per_batch_abs")
    before = [p.detach().clone() for p in model.parameters()]
    seen: list[tuple[int, int]] = []
    records = deletion_curve(
        "m",
        model,
        tensors,
        {"text": lambda: [batch]},
        ratios=(0.001, 0.01, 0.1),
        scopes=("global", "per_matrix"),
        random_seeds=(5, 6),
        reduction="per_batch_abs",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    points = [(r["scope"], r["ratio"], r["condition"], r["seed"]) for r in records]
    each = [("top", None), ("bottom", None), ("random", 5), ("random", 6)]
    assert points == [
        point
        for scope in ("global", "per_matrix")
        for point in [(scope, 0.0, "base", None), *((scope, r, c, s) for r in (0.001, 0.01, 0.1) for c, s in each)]
    ]
    assert seen == [(i + 1, 25) for i in range(25)]  # the base is measured once

    single = deletion_curve(
        "m", model, tensors, {"text": lambda: [batch]},
        ratios=(0.1,), scopes=("per_matrix",), random_seeds=[5, 6], reduction="per_batch_abs",
    )  # fmt: skip
    assert single == [records[13], *records[22:]]
    area = {(a.condition, a.scope): a.area for a in areas(records)}
    assert abs(area["top", "global"]) > 10 * abs(area["bottom", "global"])  # an untrained model: any sign


def test_area_by_hand() -> None:
    # Rises 1, 3, 5 at 0.001, 0.01, 0.1, a decade each: trapezoids 2 and 4 over two decades, so 3 on average.
    rows = [record("base", 0.0, 2.0), *(record("top", r, 2 + y) for r, y in ((0.1, 5), (0.001, 1), (0.01, 3)))]
    (area,) = areas(rows)
    assert area.area == pytest.approx(3.0)
    assert (area.area_low, area.area_high, area.n_seeds) == (area.area, area.area, 0)
    assert area.ratios == (0.001, 0.01, 0.1)
    # Uneven steps: 0.001 → 0.01 is one decade, 0.01 → 1 two. (1 · 1 + 2 · 2) / 3.
    rows = [record("base", 0.0, 0.0), *(record("top", r, y) for r, y in ((0.001, 0), (0.01, 2), (1.0, 2)))]
    assert areas(rows)[0].area == pytest.approx(5 / 3)


def test_random_areas_are_averaged_over_seeds_and_scopes_kept_apart() -> None:
    rows = [record("base", 0.0, 1.0), record("base", 0.0, 1.0, scope="per_matrix")]
    for seed, rise in ((0, 1.0), (1, 2.0), (2, 6.0)):
        rows += [record("random", ratio, 1 + rise, seed) for ratio in (0.01, 0.1)]
    rows += [record("random", ratio, 1.5, 0, "per_matrix") for ratio in (0.01, 0.1)]
    first, second = areas(rows)
    assert (first.area, first.area_low, first.area_high, first.n_seeds) == pytest.approx((3.0, 1.0, 6.0, 3))
    assert (second.scope, second.area, second.n_seeds) == ("per_matrix", 0.5, 1)


@given(
    rise=st.floats(-5, 5),
    exponents=st.lists(st.integers(-40, 0), min_size=2, max_size=8, unique=True),
)
def test_a_constant_rise_is_its_own_area_whatever_the_ratios(rise: float, exponents: list[int]) -> None:
    rows = [record("base", 0.0, 3.0), *(record("top", 10 ** (e / 10), 3 + rise) for e in exponents)]
    assert areas(rows)[0].area == pytest.approx(rise, abs=1e-12)


def test_one_ratio_has_no_area_and_a_missing_base_is_an_error() -> None:
    assert areas([record("base", 0.0, 1.0), record("top", 0.1, 2.0)]) == []
    with pytest.raises(UserError, match="no base condition for m, text, scope global"):
        areas([record("top", 0.1, 2.0), record("top", 0.2, 2.0)])


@pytest.mark.parametrize("ratios", [(), (0.0, 0.1), (0.1, 0.01), (0.1, 0.1), (0.1, 1.5)])
def test_bad_ratios(ratios: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="ascending shares"):
        deletion_curve("m", tiny_llama(), {}, {}, ratios=ratios, reduction="signed_sum")
