"""Planted structure is found and ranked, noise is not: over seeds, kinds of entries, measures and nulls.

How often noise may pass |z| > 3: 0.27 % if the nulls were normal and known. They are skewed and known from a few
draws, so the tests allow a true rate of `FALSE_RATE`, and counts up to what a binomial of that rate exceeds with
probability 1e-4 (the seeds are fixed, so a test that passes keeps passing).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palimpsest.analysis.clustering import cluster_records, effective_rank, inverse_rank_kept, measure_matrix, rank_z
from palimpsest.analysis.layers import LayerDistribution, ModelLayers
from palimpsest.analysis.nulls import SHUFFLES
from palimpsest.analysis.shift import MEASURES, shift_records

Q0 = "model.layers.0.self_attn.q_proj.weight"
NULLS = {"everywhere": "z", "within_rows": "within_rows_z", "within_columns": "within_columns_z"}
LINES = ("top1", "top5", "gini")
SHAPE = (80, 60)
N_SEEDS = 80

ENTRIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "uniform": lambda rng, shape: rng.random(shape),
    "half-normal": lambda rng, shape: np.abs(rng.standard_normal(shape)),
    "exponential": lambda rng, shape: rng.standard_exponential(shape),
    "lognormal": lambda rng, shape: np.exp(rng.standard_normal(shape)),
    "heavy lognormal": lambda rng, shape: np.exp(2.5 * rng.standard_normal(shape)),  # kurtosis far above importance's
}
HEAVY = "heavy lognormal"
FALSE_RATE = {name: 0.03 if name == HEAVY else 0.01 for name in ENTRIES}


def measured(matrix: np.ndarray, **options: Any) -> dict[str, Any]:
    tensors = {Q0: torch.from_numpy(matrix.astype(np.float32))}
    return {row["measure"]: row for row in cluster_records("base", "importance", tensors, **options)}


def at_most(n: int, rate: float) -> int:
    return int(stats.binom.ppf(1 - 1e-4, n, rate))


# ------------------------------------------------------------------------------------------------------------
# Noise
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def noise_z() -> dict[tuple[str, str, str], np.ndarray]:
    """z by (entries, measure, null), one per seed; rows and columns of one matrix shape."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for number, (entries, draw) in enumerate(ENTRIES.items()):
        for seed in range(N_SEEDS):
            rows = measured(draw(np.random.default_rng([number, seed]), SHAPE), n_shuffles=3, rank_draws=5, seed=seed)
            for measure, row in rows.items():
                for null, field in NULLS.items():
                    if row[field] is not None:
                        found[entries, measure, null].append(row[field])
    return {key: np.array(values) for key, values in found.items()}


def test_every_measure_and_null_is_there(noise_z: dict[tuple[str, str, str], np.ndarray]) -> None:
    """Six measures of sums with two nulls each, one of the whole with three, for each kind of entries."""
    assert len(noise_z) == (6 * 2 + 3) * len(ENTRIES)
    assert all(len(values) == N_SEEDS and np.isfinite(values).all() for values in noise_z.values())


@pytest.mark.parametrize("entries", list(ENTRIES))
def test_noise_is_beyond_three_as_rarely_as_stated(
    noise_z: dict[tuple[str, str, str], np.ndarray], entries: str
) -> None:
    for (kind, measure, null), z in noise_z.items():
        if kind == entries:
            n_beyond = int((np.abs(z) > 3).sum())
            assert n_beyond <= at_most(len(z), FALSE_RATE[entries]), (measure, null, n_beyond)
    everything = np.array([z for (kind, *_), z in noise_z.items() if kind == entries])  # (measure and null, seed)
    of_each_matrix = (np.abs(everything) > 3).mean(axis=0)  # measures of one matrix depend on each other, seeds do not
    error = of_each_matrix.std(ddof=1) / N_SEEDS**0.5
    assert of_each_matrix.mean() - 3 * error <= FALSE_RATE[entries]
    assert 0.02 < (np.abs(everything) > 2).mean() < 0.08  # 4.6 % if normal: z does not hide structure either


def test_z_of_noise_is_centred_and_of_unit_size(noise_z: dict[tuple[str, str, str], np.ndarray]) -> None:
    pooled: dict[tuple[bool, str, str], list[np.ndarray]] = defaultdict(list)
    for (kind, measure, null), z in noise_z.items():
        pooled[kind == HEAVY, measure, null].append(z)
    for key, groups in pooled.items():
        z = np.concatenate(groups)
        # Of the heavy entries, full shuffles too give means of 0.3 to 0.5, for they are skewed: by their own error.
        assert abs(z.mean()) < 0.1 + 4 * max(1, z.std()) / np.sqrt(len(z)), key
        if key[0]:  # two giants that meet on one line give a z of 10 and more, rarely: look at the bulk
            assert 0.5 < float(np.diff(np.quantile(z, [0.16, 0.84]))[0]) / 2 < 1.3, key
        else:
            assert 0.8 < z.std() < 1.25, key


def test_rank_of_heavy_noise_needs_the_scale_of_rank_z(noise_z: dict[tuple[str, str, str], np.ndarray]) -> None:
    """Noise with a few giant entries: z of the rank itself strays beyond −3, `rank_z` does not."""
    plain, scaled = [], []
    for seed in range(150):
        rng = np.random.default_rng([9, seed])
        matrix = ENTRIES[HEAVY](rng, (40, 30)).astype(np.float32)
        draws = np.array([effective_rank(SHUFFLES["within_columns"](matrix, rng)) for _ in range(30)])
        plain.append((effective_rank(matrix) - draws.mean()) / draws.std(ddof=1))
        scaled.append(rank_z(effective_rank(matrix), draws, inverse_rank_kept(matrix, "within_columns")))
    assert (np.abs(scaled) > 3).sum() <= at_most(150, 0.01)
    assert (np.abs(plain) > 3).sum() > at_most(150, 0.01)


# ------------------------------------------------------------------------------------------------------------
# Planted rows and columns
# ------------------------------------------------------------------------------------------------------------
STRENGTHS = (1.0, 1.5, 2.0, 3.0, 6.0)


def planted(entries: str, axis: str, strength: float, seed: int = 0, shape: tuple[int, int] = (160, 160)) -> np.ndarray:
    """Noise with 5 % of its rows (columns) `strength` times as large."""
    matrix = ENTRIES[entries](np.random.default_rng([5, seed]), shape)
    lines = matrix if axis == "rows" else matrix.T
    lines[: len(lines) // 20] *= strength
    return matrix


@pytest.mark.parametrize("entries", ["half-normal", "exponential", "lognormal"])
@pytest.mark.parametrize(("axis", "other"), [("rows", "columns"), ("columns", "rows")])
def test_planted_lines_are_found_and_ranked(entries: str, axis: str, other: str) -> None:
    rows = [measured(planted(entries, axis, strength), n_shuffles=3, rank_draws=5) for strength in STRENGTHS]
    for line in LINES:
        for null in ("everywhere", f"within_{other}"):  # the nulls that move these lines' entries away
            found = [row[f"{line}_{axis}"][NULLS[null]] for row in rows]
            assert min(found[1:]) > 3, (line, null, found)
            assert abs(found[0]) < 4
            assert found == sorted(found), (line, null, found)
        values = [row[f"{line}_{axis}"]["value"] for row in rows]
        assert values == sorted(values)
    for null in ("everywhere", f"within_{other}"):
        found = [row["effective_rank"][NULLS[null]] for row in rows]
        assert max(found[2:]) < -3, (null, found)  # half as large again is little of the energy
    # Larger entries change the rank wherever they lie: it is ranked against its null; z of five draws is too rough.
    ratios = [row["effective_rank"]["value"] / row["effective_rank"]["null_mean"] for row in rows]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize(("axis", "other"), [("rows", "columns"), ("columns", "rows")])
def test_planted_lines_do_not_show_on_the_other_side(axis: str, other: str) -> None:
    """Against the null that keeps the planted sums, the other side and the rank are noise; against entries anywhere
    the other side is never concentrated (it is too even, since each of its lines crosses every planted one)."""
    matrices = [planted("exponential", axis, strength, seed, SHAPE) for strength in (2.0, 6.0) for seed in range(30)]
    rows = [measured(matrix, n_shuffles=3, rank_draws=5) for matrix in matrices]
    for measure in (*(f"{line}_{other}" for line in LINES), "effective_rank"):
        z = np.array([row[measure][NULLS[f"within_{axis}"]] for row in rows])
        assert (np.abs(z) > 3).sum() <= at_most(len(z), 0.01), measure
        assert abs(z.mean()) < 0.1 + 4 / np.sqrt(len(z)), measure
    for line in LINES:
        assert (np.array([row[f"{line}_{other}"]["z"] for row in rows]) > 3).sum() <= at_most(len(rows), 0.01)


def test_rows_and_columns_planted_together_are_both_found() -> None:
    matrix = planted("exponential", "rows", 3.0)
    matrix[:, 40:48] *= 3
    rows = measured(matrix, n_shuffles=3, rank_draws=5)
    for line in LINES:
        assert rows[f"{line}_rows"]["within_columns_z"] > 3
        assert rows[f"{line}_columns"]["within_rows_z"] > 3
    assert all(rows["effective_rank"][field] < -3 for field in NULLS.values())


def test_what_a_null_keeps_of_the_rank_by_hand() -> None:
    """Squares 4, 1; 0, 3 of energy 8: entries 26/64, rows (5, 3) 34/64, columns (4, 4) 32/64."""
    matrix = np.sqrt(np.array([[4, 1], [0, 3]], dtype=np.float32))
    expected = {"everywhere": 26 / 64, "within_rows": 34 / 64, "within_columns": 32 / 64}
    assert {null: inverse_rank_kept(matrix, null) for null in SHUFFLES} == pytest.approx(expected)
    assert np.isnan(inverse_rank_kept(np.zeros((2, 2), dtype=np.float32), "everywhere"))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(sorted(SHUFFLES)))
def test_a_shuffle_leaves_what_its_null_keeps(seed: int, null: str) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_exponential((7, 5)).astype(np.float32)
    moved = SHUFFLES[null](matrix, rng)
    assert inverse_rank_kept(moved, null) == pytest.approx(inverse_rank_kept(matrix, null), rel=1e-5)
    assert 1 / effective_rank(moved) >= inverse_rank_kept(matrix, null) * (1 - 1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(2, 12), st.floats(1e-12, 1e6))
def test_size_and_order_of_lines_do_not_matter(seed: int, n_rows: int, n_columns: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_exponential((n_rows, n_columns)).astype(np.float32)
    moved = matrix[rng.permutation(n_rows)][:, rng.permutation(n_columns)] * np.float32(factor)
    assert measure_matrix(moved) == pytest.approx(measure_matrix(matrix), rel=1e-4, abs=1e-6)
    turned = {
        name.replace("rows", "c").replace("columns", "rows").replace("_c", "_columns"): value
        for name, value in measure_matrix(np.ascontiguousarray(matrix.T)).items()
    }
    assert turned == pytest.approx(measure_matrix(matrix), rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Planted shifts over the layers
# ------------------------------------------------------------------------------------------------------------
DEPTH = np.linspace(0, 1, 16)
EARLY, LATE = (0.2 + np.exp(-(((DEPTH - centre) / 0.25) ** 2)) for centre in (0.25, 0.75))
DISTANCES = ("jensen_shannon", "wasserstein_1", "centre_shift")
totals = st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5).map(np.array)


def scored(name: str, shape: np.ndarray, seed: int, n_batches: int = 20) -> ModelLayers:
    batches = shape * np.exp(np.random.default_rng(seed).normal(0, 0.3, (n_batches, len(shape))))
    summed = batches.sum(axis=0)[:, None]
    return ModelLayers(name, LayerDistribution(("q",), summed, np.ones_like(summed, dtype=np.int64)), batches)


def shift(base: ModelLayers, model: ModelLayers, other: ModelLayers) -> dict[str, Any]:
    rows = shift_records(base, model, modality="text", reduction="per_batch_abs", other=other, n_draws=200)
    return {row["measure"]: row for row in rows}


def mixed(share: float) -> np.ndarray:
    """The late distribution with `share` of its total moved to where the early one has it."""
    return (1 - share) * LATE / LATE.sum() + share * EARLY / EARLY.sum()


@settings(deadline=None)
@given(totals, totals, st.floats(0, 1))
def test_moving_a_share_moves_distance_and_centre_by_that_share(a: np.ndarray, b: np.ndarray, share: float) -> None:
    """Exact: both are linear in the shares. The divergence is convex, so at most linear."""
    p, q = a / a.sum(), b / b.sum()
    part = (1 - share) * p + share * q
    for name in ("wasserstein_1", "centre_shift"):
        assert float(MEASURES[name](p, part)) == pytest.approx(share * float(MEASURES[name](p, q)), abs=1e-12)
    assert float(MEASURES["jensen_shannon"](p, part)) <= share * float(MEASURES["jensen_shannon"](p, q)) + 1e-12


@settings(deadline=None)
@given(totals, totals, totals, st.permutations(range(5)))
def test_symmetries_of_the_shift(a: np.ndarray, b: np.ndarray, c: np.ndarray, order: list[int]) -> None:
    value = {name: lambda x, y, f=function: float(f(x, y)) for name, function in MEASURES.items()}
    for name in ("jensen_shannon", "wasserstein_1", "cosine", "spearman"):
        assert value[name](a, b) == pytest.approx(value[name](b, a), abs=1e-12, nan_ok=True)
    for name in ("jensen_shannon", "cosine", "spearman", "magnitude_ratio"):  # those that know no depth
        assert value[name](a[order], b[order]) == pytest.approx(value[name](a, b), abs=1e-9, nan_ok=True)
    for name, sign in (("wasserstein_1", 1), ("centre_shift", -1)):  # the model upside down
        assert value[name](a[::-1], b[::-1]) == pytest.approx(sign * value[name](a, b), abs=1e-12)
    assert value["wasserstein_1"](a, c) <= value["wasserstein_1"](a, b) + value["wasserstein_1"](b, c) + 1e-12
    assert abs(value["centre_shift"](a, b)) <= value["wasserstein_1"](a, b) + 1e-12


def test_planted_shifts_are_ranked_and_larger_than_the_floor() -> None:
    shares = (0.1, 0.2, 0.4, 0.8)
    base, other = scored("base", LATE, 1), scored("base", LATE, 2)
    rows = [shift(base, scored("full", mixed(share), 3), other) for share in shares]
    for name in DISTANCES:
        found = [abs(row[name]["value"]) for row in rows]
        assert found == sorted(found), name
        truth = [abs(float(MEASURES[name](LATE, mixed(share)))) for share in shares]
        assert found[-1] == pytest.approx(truth[-1], rel=0.25), name
        assert found[0] > abs(rows[0][name]["noise_floor"]), name
    for row, share in zip(rows, shares, strict=True):
        truth = float(MEASURES["centre_shift"](LATE, mixed(share)))
        assert row["centre_shift"]["ci_low"] < truth < row["centre_shift"]["ci_high"]
    assert all(row["jensen_shannon"]["ci_low"] > 2 * row["jensen_shannon"]["noise_floor"] for row in rows[1:])


def test_no_shift_is_as_far_as_the_floor() -> None:
    """Without a shift the model is one more scoring of the base: farther than the floor in half of all cases (count of
    60, outside the bounds with probability 1e-4), and claimed as a shift (claim 3: twice the floor) in hardly any."""
    farther: dict[str, int] = defaultdict(int)
    claimed = 0
    for seed in range(60):
        row = shift(*(scored(name, LATE, 3 * seed + i) for i, name in enumerate(("base", "full", "base"))))
        for name in DISTANCES:
            farther[name] += abs(row[name]["value"]) > abs(row[name]["noise_floor"])
        claimed += row["jensen_shannon"]["ci_low"] > 2 * row["jensen_shannon"]["noise_floor"]
    low, high = stats.binom.ppf([5e-5, 1 - 5e-5], 60, 0.5)
    assert all(low <= count <= high for count in farther.values()), dict(farther)
    assert claimed <= at_most(60, 0.025)
