"""Measures between layer distributions: hand-computed values, properties, and what the bootstrap finds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance

from palimpsest.analysis.layers import LayerDistribution, ModelLayers
from palimpsest.analysis.shift import MEASURES, contrast_records, shift_records
from palimpsest.files import UserError

DEPTH = np.linspace(0, 1, 12)
EARLY, LATE = (0.2 + np.exp(-(((DEPTH - centre) / 0.25) ** 2)) for centre in (0.3, 0.7))


def scored(name: str, batches: np.ndarray) -> ModelLayers:
    totals = batches.sum(axis=0)[:, None]
    return ModelLayers(name, LayerDistribution(("q",), totals, np.ones_like(totals, dtype=np.int64)), batches)


def noisy(
    shape: np.ndarray, n_batches: int, seed: int, common: np.ndarray | None = None, sigma: float = 0.3
) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, (n_batches, len(shape)))
    return shape * np.exp(noise + (0 if common is None else common))


def records(
    a: ModelLayers, b: ModelLayers, reduction: str = "per_batch_abs", **options: Any
) -> dict[str, dict[str, Any]]:
    return {row["measure"]: dict(row) for row in shift_records(a, b, modality="text", reduction=reduction, **options)}


def measure(name: str, reference: list[float], model: list[float]) -> float:
    return float(MEASURES[name](np.array(reference, dtype=float), np.array(model, dtype=float)))


def test_measures_by_hand() -> None:
    # Shares (1/2, 1/2, 0) and (0, 1/2, 1/2): middle (1/4, 1/2, 1/4), so ½ · ½ · log2(2) from each side.
    assert measure("jensen_shannon", [1, 1, 0], [0, 3, 3]) == pytest.approx(0.5)
    assert measure("jensen_shannon", [1, 0], [0, 1]) == pytest.approx(1.0)
    # Half the mass moves from depth 0 to depth 1 (or all of it by half the depth).
    assert measure("wasserstein_1", [1, 1, 0], [0, 3, 3]) == pytest.approx(0.5)
    assert measure("wasserstein_1", [1, 0, 0], [0, 0, 5]) == pytest.approx(1.0)
    assert measure("centre_shift", [1, 1, 0], [0, 3, 3]) == pytest.approx(0.5)
    assert measure("centre_shift", [0, 0, 1], [1, 0, 0]) == pytest.approx(-1.0)
    assert measure("peak_shift", [1, 2, 9, 3, 1], [1, 9, 2, 3, 9]) == pytest.approx(-0.25)
    assert measure("cosine", [1, 0], [1, 1]) == pytest.approx(math.sqrt(0.5))
    assert measure("spearman", [1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert measure("magnitude_ratio", [1, 1, 2], [1, 0, 1]) == pytest.approx(0.5)
    assert math.isnan(measure("spearman", [1, 1, 1], [1, 2, 3]))


positive = st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6)


@settings(deadline=None)
@given(positive, positive)
def test_measures_agree_with_scipy(a: list[float], b: list[float]) -> None:
    p, q = np.array(a) / sum(a), np.array(b) / sum(b)
    depth = np.linspace(0, 1, 6)
    assert measure("jensen_shannon", a, b) == pytest.approx(distance.jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    assert measure("wasserstein_1", a, b) == pytest.approx(stats.wasserstein_distance(depth, depth, p, q), abs=1e-9)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert measure("spearman", a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)


@settings(deadline=None)
@given(positive, st.floats(0.1, 10))
def test_a_change_of_size_alone_is_no_shift(a: list[float], factor: float) -> None:
    scaled = [factor * value for value in a]
    for name in ("jensen_shannon", "wasserstein_1", "centre_shift", "peak_shift"):
        assert measure(name, a, scaled) == pytest.approx(0.0, abs=1e-9)
    assert measure("magnitude_ratio", a, scaled) == pytest.approx(factor)


@settings(deadline=None)
@given(positive, positive)
def test_measures_work_on_stacks_of_draws(a: list[float], b: list[float]) -> None:
    stack = (np.array([a, b]), np.array([b, a]))
    for name, function in MEASURES.items():
        expected = [measure(name, a, b), measure(name, b, a)]
        assert function(*stack) == pytest.approx(expected, nan_ok=True)


def test_a_planted_shift_stands_out_and_noise_does_not() -> None:
    common = np.random.default_rng(7).normal(0, 0.3, (40, 12))
    base = scored("base", noisy(LATE, 40, 1, common, sigma=0.05))
    moved = records(base, scored("full", noisy(EARLY, 40, 2, common, sigma=0.05)))
    assert moved["jensen_shannon"]["ci_low"] > 2 * moved["jensen_shannon"]["noise_floor"]
    assert moved["centre_shift"]["ci_high"] < 0
    assert moved["peak_shift"]["value"] == pytest.approx(-4 / 11, abs=1.5 / 11)
    same = records(base, scored("lora", noisy(LATE, 40, 3, common, sigma=0.05)))
    assert same["jensen_shannon"]["ci_low"] < same["jensen_shannon"]["noise_floor"]
    assert same["centre_shift"]["ci_low"] < 0 < same["centre_shift"]["ci_high"]


def test_interval_covers_the_truth() -> None:
    """An unbiased measure: the 95 % interval should hold the true value in most of 40 draws of the data."""
    truth = float(MEASURES["centre_shift"](LATE, EARLY))
    covered = 0
    for seed in range(40):
        rows = records(
            scored("base", noisy(LATE, 30, 2 * seed)),
            scored("full", noisy(EARLY, 30, 2 * seed + 1)),
            n_draws=300,
        )
        covered += rows["centre_shift"]["ci_low"] <= truth <= rows["centre_shift"]["ci_high"]
    assert covered >= 33  # binomial(40, 0.93): fewer has probability 2 %


def test_both_models_are_resampled_together() -> None:
    """Batches ten times larger in both models cancel; unpaired resampling would give a wide interval."""
    sizes = np.geomspace(1, 10, 20)[:, None]
    row = records(scored("base", sizes * LATE), scored("full", 0.5 * sizes * LATE))["magnitude_ratio"]
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_is_reproducible_and_seeded() -> None:
    a, b = scored("base", noisy(LATE, 20, 1)), scored("full", noisy(EARLY, 20, 2))
    assert records(a, b, seed=3) == records(a, b, seed=3)
    assert records(a, b, seed=3) != records(a, b, seed=4)


def test_noise_floor_is_even_against_odd_batches() -> None:
    batches = np.tile([[1.0, 1.0, 0.0], [0.0, 3.0, 3.0]], (6, 1))
    row = records(scored("base", batches), scored("full", batches))
    assert row["jensen_shannon"]["noise_floor"] == pytest.approx(0.5)
    assert row["magnitude_ratio"]["noise_floor"] == pytest.approx(3.0)  # per batch: 6 against 2


@pytest.mark.parametrize("reduction", ["per_batch_abs", "signed_sum"])
def test_noise_floor_is_the_base_against_itself_on_other_data(reduction: str) -> None:
    """Not the halves of the base, not the model: the base's totals (1, 1, 0) against (0, 3, 3) on other questions."""
    base = scored("base", np.tile([1.0, 1.0, 0.0], (12, 1)))
    model = scored("full", np.tile([1.0, 0.0, 0.0], (12, 1)))
    other = scored("base", np.tile([0.0, 3.0, 3.0], (7, 1)))  # its batches need not match: another data set
    rows = records(base, model, reduction, other=other)
    by_hand = {
        "jensen_shannon": 0.5,
        "wasserstein_1": 0.5,
        "centre_shift": 0.5,
        "peak_shift": 0.5,  # of equal layers the first: from depth 0 to depth ½
        "cosine": 0.5,
        "spearman": -0.5,  # ranks (2.5, 2.5, 1) and (1, 2.5, 2.5)
        "magnitude_ratio": (7 * 6) / (12 * 2),
    }
    assert {name: row["noise_floor"] for name, row in rows.items()} == pytest.approx(by_hand)


@pytest.mark.parametrize("reduction", ["signed_sum", "per_sequence_abs", "fisher"])
def test_no_interval_for_what_does_not_add_up(reduction: str) -> None:
    rows = records(scored("base", noisy(LATE, 20, 1)), scored("full", noisy(EARLY, 20, 2)), reduction)
    assert all(row[field] is None for row in rows.values() for field in ("ci_low", "ci_high", "noise_floor"))


def test_no_interval_from_few_batches() -> None:
    row = records(scored("base", noisy(LATE, 9, 1)), scored("full", noisy(EARLY, 9, 2)))["jensen_shannon"]
    assert row["ci_low"] is None
    assert row["noise_floor"] is not None


def test_contrast_is_negative_for_the_model_that_stayed() -> None:
    common = np.random.default_rng(7).normal(0, 0.3, (40, 12))
    base = scored("base", noisy(LATE, 40, 1, common, sigma=0.05))
    full = scored("full", noisy(EARLY, 40, 2, common, sigma=0.05))
    lora = scored("lora", noisy(0.8 * LATE + 0.2 * EARLY, 40, 3, common, sigma=0.05))
    rows: list[Any] = [*contrast_records(base, lora, full, modality="text", reduction="per_batch_abs")]
    assert [row["measure"] for row in rows] == ["jensen_shannon_difference", "wasserstein_1_difference"]
    assert {(row["model"], row["reference"]) for row in rows} == {("lora", "full")}
    for row in rows:
        name = row["measure"].removesuffix("_difference")
        expected = records(base, lora)[name]["value"] - records(base, full)[name]["value"]
        assert row["value"] == pytest.approx(expected)
        assert row["ci_low"] < row["value"] < row["ci_high"] < 0
    back = contrast_records(base, full, lora, modality="text", reduction="per_batch_abs")
    assert back[0]["value"] == pytest.approx(-rows[0]["value"])


def test_mixed_up_inputs_are_refused() -> None:
    a = scored("base", noisy(LATE, 20, 1))
    with pytest.raises(UserError, match="12 layers but other has 6"):
        records(a, scored("other", noisy(LATE[:6], 20, 1)))
    with pytest.raises(UserError, match="same batches"):
        records(a, scored("full", noisy(LATE, 19, 1)))
    foreign = ModelLayers("full", a.distribution, noisy(EARLY, 20, 1))
    with pytest.raises(UserError, match="do not add up"):
        records(a, foreign)
