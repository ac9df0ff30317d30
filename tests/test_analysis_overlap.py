"""Overlap of top masks, and the correlation of shift with loss: by hand, chance at noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.analysis.correlation import correlation_records
from palimpsest.analysis.delta import delta_records
from palimpsest.analysis.overlap import most_important, overlap_records
from palimpsest.files import UserError
from palimpsest.records import run_name

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))


def test_overlap_by_hand() -> None:
    base = {Q0: torch.tensor([[4.0, 3.0, 0.0, 0.0]]), Q1: torch.tensor([[4.0, 3.0, 0.0, 0.0]])}
    tuned = {Q0: torch.tensor([[9.0, 0.0, 5.0, 0.0]]), Q1: torch.tensor([[1.0, 2.0, 0.0, 0.0]])}
    other = {Q0: base[Q0] * 2, Q1: base[Q1].flip(1)}
    rows = {row["name"]: row for row in overlap_records("full", tuned, "base", base, other=other, ratio=0.5)}
    assert [rows[name]["overlap"] for name in (Q0, Q1, "all")] == [0.5, 1.0, 0.75]
    assert [rows[name]["noise_floor"] for name in (Q0, Q1, "all")] == [1.0, 0.0, 0.5]
    assert {row["overlap_by_chance"] for row in rows.values()} == {0.5}
    assert (rows["all"]["ci_low"], rows["all"]["ci_high"]) == (0.5, 1.0)
    assert rows[Q0]["ci_low"] is None
    assert rows["all"]["layer"] is None
    mask = most_important(other, 0.5)
    masks = {name: mask.tensor(name) for name in mask.names}
    assert {row["name"]: row for row in overlap_records("full", tuned, "base", base, other=masks, ratio=0.5)} == rows
    of_base = most_important(base, 0.5)
    reference = {name: of_base.tensor(name) for name in base}
    by_masks = overlap_records("full", tuned, "base", reference, other=masks, ratio=0.5)
    assert {row["name"]: row for row in by_masks} == rows
    assert delta_records(base, tuned, reference, method="full", ratio=0.5) == delta_records(
        base, tuned, base, method="full", ratio=0.5
    )


def test_overlap_of_unrelated_scores_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    base, tuned = ({Q0: torch.rand(400, 300, generator=generator)} for _ in range(2))
    row = overlap_records("full", tuned, "base", base)[0]
    assert row["overlap"] == pytest.approx(row["overlap_by_chance"], abs=0.012)  # 3600 draws at 0.03: sd 0.003
    assert row["noise_floor"] is None


def test_scores_of_other_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=f"{Q0} is missing from the scores of full"):
        overlap_records("full", {}, "base", {Q0: torch.ones(2, 2)})
    assert overlap_records("full", {}, "base", {"model.norm.weight": torch.ones(2)}) == []


def shifted(model: str, value: float, measure: str = "jensen_shannon") -> dict[str, Any]:
    return {"model": model, "reference": "base", "measure": measure, "reduction": "signed_sum", "value": value}


def answered(method: str, correct: int, task: str = "a", n: int = 100) -> dict[str, Any]:
    return {"method": method, "task": task, "modality": "text", "metric": "m", "correct": correct, "n": n}


def test_correlation_by_hand() -> None:
    shift = [shifted("full", 0.3), shifted("layer_lr", 0.2), shifted("lora", 0.1)]
    qa = [answered("base", 60), answered("full", 40), answered("layer_lr", 50), answered("lora", 55)]
    (row,) = correlation_records(shift, qa, metric="m")
    assert (row["kendall_tau"], row["p_value"]) == pytest.approx((1.0, 1 / 3))  # 2 of 3! orders are as extreme
    assert (row["n_models"], row["models"], row["note"]) == (3, ["full", "layer_lr", "lora"], "")
    reversed_qa = [answered("base", 60), answered("full", 55), answered("layer_lr", 50), answered("lora", 40)]
    assert correlation_records(shift, reversed_qa, metric="m")[0]["kendall_tau"] == pytest.approx(-1.0)


def test_correlation_with_ties_counts_orders() -> None:
    """Losses 1, 1, 2 along the shift: τ_b = 2 / √(3 · 2); of the three orders of the losses two are as extreme."""
    shift = [shifted("full", 0.3), shifted("layer_lr", 0.2), shifted("lora", 0.1)]
    qa = [answered("base", 60), answered("full", 40), answered("layer_lr", 50), answered("lora", 50)]
    (row,) = correlation_records(shift, qa, metric="m")
    assert (row["kendall_tau"], row["p_value"]) == pytest.approx((2 / 6**0.5, 2 / 3))


def test_runs_of_one_method_are_one_model() -> None:
    """Nine runs of three methods that lose in their order: p of three models, which is 1/3 at best."""
    of_method = {"full": (0.3, 40), "layer_lr": (0.2, 50), "lora": (0.1, 55)}
    runs = [(run_name(m, k), x + 0.01 * k, c - (k == 2)) for m, (x, c) in of_method.items() for k in range(3)]
    shift = [shifted(run, x) for run, x, _ in runs]
    qa = [answered("base", 60), *(answered(run, correct) for run, _, correct in runs)]
    (row,) = correlation_records(shift, qa, metric="m")
    assert row["models"] == ["full", "layer_lr", "lora"]
    assert (row["kendall_tau"], row["p_value"]) == pytest.approx((1.0, 1 / 3))


def test_correlation_pools_tasks_and_says_what_is_missing() -> None:
    shift = [shifted("full", 0.3), shifted("layer_lr", 0.2), shifted("lora", 0.1)]
    qa = [answered(m, c, t) for t in "ab" for m, c in (("base", 60), ("full", 50), ("lora", 55))]
    qa.append(answered("layer_lr", 10, "a"))  # not asked the questions of b: not comparable
    (row,) = correlation_records(shift, qa, metric="m")
    assert row["models"] == ["full", "lora"]
    assert row["kendall_tau"] is None
    assert "at least 3" in row["note"]
    assert correlation_records(shift, [], metric="m") == []


def test_tensors_are_not_changed() -> None:
    base: dict[str, Tensor] = {Q0: torch.rand(5, 4)}
    before = base[Q0].clone()
    overlap_records("full", base, "base", base)
    assert torch.equal(base[Q0], before)
