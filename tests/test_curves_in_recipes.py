"""Curves in a recipe: what `over` and `curve` make, and what is refused because it would do nothing or mislead."""

from __future__ import annotations

from typing import Any

import pytest

from palimpsest.comparison.frontier import places_of
from palimpsest.config import SEED_MEASURES, StudyConfig, parse_config
from palimpsest.files import UserError
from palimpsest.records import BASE

FULL = {"kind": "full", "learning_rate": 1e-3}
OVER = {"kind": "full", "over": {"learning_rate": [1e-2, 1e-3]}}


def curves(methods: dict[str, Any], **changes: Any) -> dict[str, str | None]:
    return {name: method.curve for name, method in curves_of(methods, **changes).methods.items()}


def curves_of(methods: dict[str, Any], **changes: Any) -> StudyConfig:
    split = {"source": "facts", "split": "train"}
    recipe = {
        "name": "curves",
        "models": {"language_model": "llm", "encoder": "whisper"},
        "data": {"train": split, "heldout_examples": 2},
        "methods": methods,
        "evaluation": {"tasks": [{"name": "facts", **split}]},
        **changes,
    }
    return parse_config(recipe, "R")


def test_a_single_method_may_stand_on_a_curve_of_its_own_or_of_others() -> None:
    points = {"full-0_01": "full", "full-1e-3": "full"}
    assert curves({"full": OVER, "full-2": {**FULL, "curve": "full"}}) == {**points, "full-2": "full"}
    assert curves({"full": OVER, "pull": {**FULL, "curve": "pull"}}) == {**points, "pull": "pull"}


def test_a_method_on_a_curve_may_be_measured_in_full_all_the_same() -> None:
    recipe = {"full": OVER, "full-2": {**FULL, "curve": "full", "in_full": True}}
    config = curves_of(recipe, frontier={"measure": ["drift"]})
    for what in SEED_MEASURES:
        assert config.measures("full-2", what)
        assert not config.measures("full-1e-3", what)
    assert [method.is_point for method in config.methods.values()] == [True, True, False]
    every = curves_of({"full": {**OVER, "in_full": True}}).methods
    assert [(method.curve, method.is_point) for method in every.values()] == [("full", False)] * 2
    places = places_of(config.methods)  # what is measured of it does not make it another point
    assert {name: (place.curve, place.varied) for name, place in places.items() if name != BASE} == dict.fromkeys(
        config.methods, ("full", "learning_rate")
    )


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"full": OVER, "full-0_01": FULL}, "over makes a method 'full-0_01', and there is another of that name"),
        ({"full-0_01": FULL, "full": OVER}, "over makes a method 'full-0_01', and there is another of that name"),
        ({"full": {"kind": "full", "over": {"curve": ["a", "b"]}}}, "full has both over and curve"),
        ({"full": {"kind": "full", "over": {"rank": [4, 8]}}}, "full.over.rank.*kind full does not use it"),
        (
            {"full": OVER, "half": {"kind": "blend", "of": "full", "scale": 0.5}},
            r"point of it \(full-0_01, full",
        ),
        ({"full": {**FULL, "curve": "base"}}, "methods.full.curve is 'base', which is the base's own place"),
        ({"full": {**FULL, "in_full": True}}, "in_full is for a method on a curve"),
        ({"full": {**FULL, "curve": "a b"}}, "the curve name 'a b' must be letters"),
        ({"full": FULL, "slow": {**FULL, "curve": "full"}}, "'full', the name of a method that is on no curve"),
        (
            {"full": {"kind": "full", "over": {"learning_rate": [1.00000001e-4, 1.00000002e-4]}}},
            "two that are the same in a name",
        ),
    ],
)
def test_what_would_join_or_repeat_models_is_refused(methods: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        curves(methods)


@pytest.mark.parametrize("what", ["deactivation", "clustering"])
def test_points_are_not_measured_by_what_needs_their_importance_without_it(what: str) -> None:
    with pytest.raises(UserError, match=r"frontier\.measure .* need importance"):
        curves({"full": OVER}, frontier={"measure": ["drift", what]})
    curves({"full": OVER}, frontier={"measure": ["importance", what]})


def test_drift_is_not_asked_for_where_nothing_says_what_it_is_measured_on() -> None:
    with pytest.raises(UserError, match="seeds_measure names drift, and there is no section drift; add"):
        curves({"full": OVER}, seeds_measure=["drift"])
    curves({"full": OVER}, seeds_measure=["drift"], drift={})
    curves({"full": OVER})  # frontier.measure has it by default, for recipes with that section
