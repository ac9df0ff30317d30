"""Batches: every example once an epoch, within the budget, the same from the same seed, little padding."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.examples import Example
from palimpsest.files import UserError
from palimpsest.training.batching import EpochBatches, epoch_batches, padding_share, require_budget
from palimpsest.training.callbacks import EpochReachesBatches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(LENGTHS, st.integers(1, 9), st.integers(60, 200), st.integers(0, 3), st.booleans())
def test_every_example_once_and_no_batch_above_the_budget(
    lengths: list[int], batch_size: int, max_tokens: int, epoch: int, budget: bool
) -> None:
    limit = max_tokens if budget else None
    batches = epoch_batches(len(lengths), batch_size, seed=5, epoch=epoch, lengths=lengths, max_tokens=limit)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    if budget:
        assert all(len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)


@given(LENGTHS, st.integers(1, 9), st.integers(60, 200), st.integers(0, 9))
def test_all_epochs_have_the_number_of_batches_the_sampler_announces(
    lengths: list[int], batch_size: int, max_tokens: int, epoch: int
) -> None:
    for limit in (None, max_tokens):
        sampler = EpochBatches(len(lengths), batch_size, 1, lengths, limit)
        announced = len(sampler)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == announced


def test_one_longer_than_the_budget_is_alone_in_its_batch() -> None:
    # by hand: 9 > 6 alone; 3 and 3 make 6; 2 alone is left
    batches = epoch_batches(4, 8, seed=0, epoch=0, lengths=[3, 9, 2, 3], max_tokens=6)
    assert sorted(sorted(batch) for batch in batches) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("budget", [None, 40])
def test_the_order_depends_on_seed_and_epoch_only(budget: int | None) -> None:
    lengths = [5 + i % 7 for i in range(50)]

    def batches(seed: int, epoch: int) -> list[list[int]]:
        random.seed(random.SystemRandom().random())  # the global generator plays no part
        return epoch_batches(50, 4, seed=seed, epoch=epoch, lengths=lengths, max_tokens=budget)

    assert batches(1, 0) == batches(1, 0)
    assert batches(1, 0) != batches(1, 1)
    assert batches(1, 0) != batches(2, 0)
    together = [{frozenset(batch) for batch in batches(1, epoch)} for epoch in range(2)]
    assert together[0] != together[1]  # not only the order of batches changes, also which examples meet


@given(st.integers(0, 10**6))
def test_grouping_pads_less_than_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [round(rng.lognormvariate(4.5, 0.4)) + 10 for _ in range(200)]
    grouped = epoch_batches(200, 8, seed=seed, epoch=0, lengths=lengths, max_tokens=10**6)
    shuffled = epoch_batches(200, 8, seed=seed, epoch=0)
    assert [len(batch) for batch in shuffled] == [8] * 25
    assert padding_share(grouped, lengths) < 0.5 * padding_share(shuffled, lengths)


def test_padding_by_hand() -> None:
    assert padding_share([[0, 1], [2]], [4, 2, 5]) == pytest.approx(2 / 13)


def test_an_example_above_the_budget_is_named() -> None:
    examples = [Example(name, "q", ("a",), "a") for name in ("short", "long", "longer")]
    require_budget(examples, [3, 5, 9], 9)
    with pytest.raises(UserError, match=r"'longer' has 9 tokens .* 4 \(2 of 3 examples"):
        require_budget(examples, [3, 5, 9], 4)


@pytest.mark.parametrize(("done", "epoch"), [(None, 0), (0, 0), (0.75, 0), (1.0, 1), (1.25, 1), (2.0, 2)])
def test_the_batches_are_of_the_epoch_that_is_gone_on_with(done: float | None, epoch: int) -> None:
    """Whatever of the Trainer's own calls reaches them; transformers 5.3's does not where it skips what was seen."""
    batches = EpochBatches(5, 2, seed=0)
    callback = EpochReachesBatches(batches.set_epoch)
    callback.on_epoch_begin(None, SimpleNamespace(epoch=done), None)
    assert list(batches) == batches.batches(epoch)
    assert batches.batches(0) != batches.batches(1)
