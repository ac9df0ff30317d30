"""Differences of two configurations, by hand."""

from __future__ import annotations

from palimpsest.files import differences, in_words


def test_differences_by_hand() -> None:
    old = {"seed": 0, "training": {"epochs": 1, "bf16": False, "gone": None}, "same": [1]}
    new = {"seed": 0, "training": {"epochs": 2, "bf16": False, "fresh": None}, "same": [1]}
    assert differences(old, new) == [
        "training.epochs: 1 → 2",
        "training.fresh: not there → null",
        "training.gone: null → not there",
    ]
    assert differences(new, new) == []


def test_a_section_that_comes_or_goes_is_one_difference() -> None:
    assert differences({"a": None}, {"a": {"epochs": 1}}) == ['a: null → {"epochs": 1}']


def test_long_values_and_long_lists_are_cut() -> None:
    (long,) = differences({"a": "x" * 200}, {"a": "y"})
    assert long.startswith('a: "xxx')
    assert long.endswith('... → "y"')
    assert len(long) < 100
    assert in_words(["a", "b"]) == "a; b"
    assert in_words(list("abcdef")) == "a; b; c; d; and 2 more"
