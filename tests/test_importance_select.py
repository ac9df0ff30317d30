"""Selection against a full stable sort, and the randomness of random masks."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from palimpsest.files import UserError
from palimpsest.importance import select as select_module
from palimpsest.importance.select import Counted, Mask, select

TINY, MAX = 2.0**-149, float(np.finfo(np.float32).max)  # smallest denormal, largest finite
# Few distinct values make ties; denormals, −0 and neighbours in the last bit are where bit tricks go wrong.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, TINY, 2 * TINY, 2.0**-126, 1.0, float(np.nextafter(np.float32(1), 2)), 3.0, MAX]),
    st.floats(0, MAX, width=32),
)
NAMES = ("model.layers.10.a.weight", "model.layers.2.a.weight", "model.layers.10.b.weight", "model.embed.weight")


@st.composite
def score_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    scores = {}
    for name in NAMES[: draw(st.integers(1, len(NAMES)))]:
        rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 7))
        values = draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns))
        scores[name] = torch.tensor(values, dtype=torch.float32).reshape(rows, columns)
    return scores


def by_sorting(scores: dict[str, Tensor], names: list[str], k: int, which: str) -> dict[str, list[bool]]:
    """The first k of a stable sort of the concatenated scores."""
    values = torch.cat([scores[name].flatten() for name in names]).numpy() + np.float32(0)
    order = np.argsort(-values.astype(np.float64) if which == "top" else values, kind="stable")
    flags = np.zeros(len(values), dtype=bool)
    flags[order[:k]] = True
    parts = np.split(flags, np.cumsum([scores[name].numel() for name in names])[:-1])
    return {name: part.tolist() for name, part in zip(names, parts, strict=True)}


def flags_of(mask: Mask) -> dict[str, list[bool]]:
    return {name: mask.tensor(name).flatten().tolist() for name in mask.names}


GROUPS: dict[str, list[tuple[str, ...]]] = {
    "global": [NAMES],
    "per_layer": [(NAMES[0], NAMES[2]), (NAMES[1],), (NAMES[3],)],
    "per_matrix": [(name,) for name in NAMES],
}


@settings(max_examples=200, deadline=None)
@given(
    scores=score_sets(),
    ratio=st.one_of(st.sampled_from([0.0, 0.03, 0.5, 1.0]), st.floats(0, 1)),
    which=st.sampled_from(["top", "bottom"]),
    scope=st.sampled_from(["global", "per_layer", "per_matrix"]),
    piece=st.sampled_from([8, 16, 1 << 20]),
)
def test_equals_a_full_stable_sort(scores: dict[str, Tensor], ratio: float, which: Any, scope: Any, piece: int) -> None:
    expected = {}
    for group in GROUPS[scope]:
        names = [name for name in group if name in scores]
        if names:
            k = round(ratio * sum(scores[name].numel() for name in names))
            expected |= by_sorting(scores, names, k, which)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_module, "PIECE", piece)
        mask = select(scores, ratio, which, scope)
    assert flags_of(mask) == expected
    assert mask.count == sum(map(sum, expected.values()))
    assert mask.names == tuple(scores)


def test_selections_from_the_same_scores_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {f"model.layers.{i}.w": torch.rand(9, 7, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    wanted: list[tuple[Any, Any]] = [
        ("top", "global"),
        ("bottom", "global"),
        ("top", "per_layer"),
        ("bottom", "per_layer"),
    ]
    alone = [select(scores, 0.2, which, scope).packed for which, scope in wanted]
    passes = Counter[str]()
    original = select_module._pieces
    monkeypatch.setattr(select_module, "_pieces", lambda name, *rest: passes.update([name]) or original(name, *rest))
    counted: Counted = {}
    shared = [select(scores, 0.2, which, scope, counted=counted).packed for which, scope in wanted]
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(alone, shared, strict=True) for name in scores)
    assert set(passes.values()) == {2 * (3 + 2)}  # of three the first, for each scope, once


def test_ties_go_to_the_first_name_then_the_first_position() -> None:
    scores = {"b": torch.tensor([1.0, 2.0, 1.0]), "a": torch.tensor([1.0, 1.0, 0.0])}
    assert flags_of(select(scores, 0.5, "top")) == {"b": [True, True, True], "a": [False] * 3}
    assert flags_of(select(scores, 0.5, "bottom")) == {"b": [True, False, True], "a": [False, False, True]}


def test_k_is_rounded_and_halves_to_even() -> None:
    scores = {"a": torch.arange(5.0)}
    assert [select(scores, ratio).count for ratio in (0.09, 0.1, 0.11, 0.3, 0.5)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -TINY])
def test_scores_that_are_no_importance_name_the_tensor(bad: float, which: Any) -> None:
    scores = {"good": torch.ones(3), "spoiled": torch.tensor([1.0, bad])}
    with pytest.raises(UserError, match="spoiled"):
        select(scores, 0.0, which)


def test_bad_arguments() -> None:
    scores: dict[str, Any] = {"a": torch.ones(3)}
    with pytest.raises(UserError, match="ratio 3"):
        select(scores, 3)
    with pytest.raises(UserError, match="'middle'"):
        select(scores, 0.1, "middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="'local'"):
        select(scores, 0.1, "top", "local")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a are torch\.bfloat16"):
        select({"a": torch.ones(3).bfloat16()}, 0.1)


# ------------------------------------------------------------------------------------------------------------
# Random
# ------------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    scores=score_sets(),
    ratio=st.floats(0, 1),
    scope=st.sampled_from(["global", "per_layer", "per_matrix"]),
    seed=st.integers(0, 2**32),
)
def test_random_masks_have_the_exact_size_and_ignore_the_scores(
    scores: dict[str, Tensor], ratio: float, scope: Any, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select_module, "PIECE", 8)
        mask = select(scores, ratio, "random", scope, seed)
        again = select({name: torch.zeros_like(t) for name, t in scores.items()}, ratio, "random", scope, seed)
    for group in GROUPS[scope]:
        names = [name for name in group if name in scores]
        k = round(ratio * sum(scores[name].numel() for name in names))
        assert sum(mask.counts[name] for name in names) == k
    assert flags_of(mask) == flags_of(again)


def test_every_random_subset_is_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "PIECE", 8)
    scores = {"a": torch.zeros(9), "b": torch.zeros(1)}  # pieces of 8, 1 and 1
    drawn: Counter[tuple[bool, ...]] = Counter()
    for seed in range(4500):
        flags = flags_of(select(scores, 0.2, "random", seed=seed))
        drawn[tuple(flags["a"] + flags["b"])] += 1
    assert len(drawn) == math.comb(10, 2)
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


def test_random_counts_are_hypergeometric_for_totals_beyond_numpys_limit() -> None:
    sizes = np.array([3 * 10**9, 10**9, 10**9])
    k = 5000
    generator = np.random.default_rng(0)
    counts = np.array([select_module._random_counts(sizes, k, generator) for _ in range(400)])
    assert (counts.sum(1) == k).all()
    share = sizes / sizes.sum()
    assert counts.mean(0) == pytest.approx(k * share, abs=4 * math.sqrt(k * 0.25 / 400))
    assert counts.var(0) == pytest.approx(k * share * (1 - share), rel=0.35)


def test_different_seeds_differ() -> None:
    scores = {"a": torch.zeros(1000)}
    a, b = (select(scores, 0.1, "random", seed=seed) for seed in (0, 1))
    assert flags_of(a) != flags_of(b)
    assert (a.about["seed"], b.about["seed"]) == (0, 1)
