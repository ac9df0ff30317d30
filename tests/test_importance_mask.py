"""Masks: packing, set operations, overlap and its chance level, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.files import UserError
from palimpsest.importance.mask import Mask, overlap
from palimpsest.importance.select import select


def mask_of(*flags: list[int]) -> Mask:
    return Mask.from_tensors({f"w{i}": torch.tensor(row, dtype=torch.bool) for i, row in enumerate(flags)})


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 3))
def test_packing_loses_nothing(rows: list[list[bool]], height: int) -> None:
    tensors = {f"w{i}": torch.tensor([row] * height) for i, row in enumerate(rows)}
    mask = Mask.from_tensors(tensors)
    assert all(torch.equal(mask.tensor(name), tensor) for name, tensor in tensors.items())
    assert mask.count == sum(int(tensor.sum()) for tensor in tensors.values())
    assert mask.n_weights == sum(tensor.numel() for tensor in tensors.values())


def test_set_operations_by_hand() -> None:
    a, b = mask_of([1, 1, 0], [0, 0, 1]), mask_of([1, 0, 1], [0, 0, 1])
    assert (a & b).counts == {"w0": 1, "w1": 1}
    assert (a - b).tensor("w0").tolist() == [False, True, False]
    assert (a - b).counts == {"w0": 1, "w1": 0}
    assert (a | b).count == 4
    assert a.shares == pytest.approx({"w0": 2 / 3, "w1": 1 / 3})


def test_overlap_by_hand() -> None:
    a, b = mask_of([1, 1, 1, 0, 0, 0]), mask_of([0, 1, 0, 1, 0, 0])
    result = overlap(a, b)
    assert result.shared == 1
    assert result.share == pytest.approx(1 / 3)
    assert result.share_by_chance == pytest.approx(2 / 6)
    assert result.jaccard == pytest.approx(1 / 4)
    assert result.jaccard_by_chance == pytest.approx(1 / 4)  # 3·2/6 = 1 shared expected, 4 in the union
    assert math.isnan(overlap(a - a, b).share)


def test_random_masks_overlap_by_chance() -> None:
    scores = {"a": torch.zeros(300, 300), "b": torch.zeros(10_000)}
    result = overlap(select(scores, 0.1, "random", seed=1), select(scores, 0.1, "random", seed=2))
    assert result.jaccard == pytest.approx(result.jaccard_by_chance, rel=0.1)
    assert result.share == pytest.approx(0.1, rel=0.1)


def test_masks_of_different_models_do_not_mix() -> None:
    with pytest.raises(UserError, match=r"w0 has shape \(2,\) in the mask and \(3,\)"):
        overlap(mask_of([1, 0]), mask_of([1, 0, 0]))
    with pytest.raises(UserError, match="w1"):
        overlap(mask_of([1, 0]), mask_of([1, 0], [1]))


def test_save_and_open(tmp_path: Path) -> None:
    path = tmp_path / "masks" / "top.safetensors"
    scores = {"z": torch.rand(5, 7), "a": torch.rand(11)}
    mask = select(scores, 0.3)
    mask.save(path)
    opened = Mask.open(path)
    assert opened.names == ("z", "a")
    assert opened.about == {"which": "top", "ratio": 0.3, "scope": "global", "seed": None}
    assert all(torch.equal(opened.tensor(name), mask.tensor(name)) for name in mask.names)
    assert [file.name for file in path.parent.iterdir()] == ["top.safetensors"]


def test_files_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "top.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        Mask.open(path)
    select({"a": torch.rand(100)}, 0.3).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="damaged"):
        Mask.open(path)
