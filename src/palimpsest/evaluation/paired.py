"""Paired effects with their interval when a method was trained with several seeds, and ratios: the t side of stats.py.

Everything here is a mean over questions of x = b − r·a, where a and b are the values of the two sides on the same
questions, a verdict or its mean over training seeds. Its variance has up to three parts:

    questions  variance over questions of the seeds' mean of x, over the number of questions
    seeds      per side with two or more seeds: variance of the seeds' means, over the number of seeds

The interval is value ± t·√variance, with Satterthwaite's degrees of freedom (Satterthwaite 1946). A side with one
seed has no seeds part: the interval then speaks of these trained models, not of training again. The noise of
single answers is in both parts. A two-way analysis of variance would take it out of one, but simulated
beside this estimator, before it was chosen, it called equal methods different in up to 7 % of the cases with three
seeds (benchmarks/coverage.py has the chosen one alone).

Shapes: seeds = training runs of one method, questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from palimpsest.rundir import UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Effect:
    """A difference with its 95 % interval."""

    value: float
    low: float
    high: float
    p_value: float  # of no difference, two-sided
    detectable: float | None  # the true difference that would be found with probability 0.8; None: not known


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval; None where the data do not bound it."""

    value: float
    low: float | None
    high: float | None


def clustered_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95, power: float = 0.8) -> Effect:
    """mean(b) − mean(a), clustered by question and by seed.

    a, b: (seeds, questions) or (questions,), the same questions in the same order; the numbers of seeds may differ.
    Seeds are not paired, although two methods may share them: what shared seeds have in common would narrow the
    interval, and is left in it.
    """
    first, second = _matrix(a), _matrix(b)
    value = float(second.mean() - first.mean())
    variance, df = _variance(first, second, 1.0)
    return _effect(value, math.sqrt(variance), df, first.shape[1], level, power)


def retention(base: ArrayLike, tuned: ArrayLike, level: float = 0.95) -> Ratio:
    """mean(tuned) / mean(base): the share of the base's accuracy that is left, with Fieller's interval.

    The interval (Fieller 1954) is every ratio R for which mean(tuned − R·base), whose variance is that of
    `clustered_difference`, is not different from 0. Where the base's accuracy itself is not different from 0
    there are no bounds.

    Raises:
        UserError: the base has no right answer, so that there is nothing to retain.
    """
    below, above = _matrix(base), _matrix(tuned)
    if below.mean() == 0:
        raise UserError("Retention is relative to the base, which answered nothing right; compare differences.")
    value = float(above.mean() / below.mean())
    _, df = _variance(below, above, value)
    squared_t = float(stats.t.ppf((1 + level) / 2, df)) ** 2
    n = below.shape[1]
    joint = np.cov(below.mean(axis=0), above.mean(axis=0)) / n
    of_base, of_tuned = joint[0, 0] + _seeds_part(below), joint[1, 1] + _seeds_part(above)
    # (tuned − R·base)² ≤ t²·variance(R), a quadratic a·R² − 2·b·R + c ≤ 0
    a = below.mean() ** 2 - squared_t * of_base
    b = below.mean() * above.mean() - squared_t * joint[0, 1]
    c = above.mean() ** 2 - squared_t * of_tuned
    if a <= 0:
        return Ratio(value, None, None)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Ratio(value, float(max(0.0, (b - root) / a)), float((b + root) / a))


def loss_difference(a: ArrayLike, b: ArrayLike, tokens: ArrayLike, level: float = 0.95, power: float = 0.8) -> Effect:
    """Loss of b minus that of a, nats per supervised token, weighted by tokens, paired by example.

    a, b: (examples,), each example's summed loss in nats; tokens: (examples,), its supervised tokens. The value is
    Σ(b − a) / Σ tokens, a ratio of sums, whose standard error is that of the residuals (b − a) − value·tokens
    (Cochran 1977, section 6.3); t with examples − 1 degrees of freedom.
    """
    first, second, counts = (np.asarray(x, dtype=np.float64) for x in (a, b, tokens))
    if first.ndim != 1 or first.shape != second.shape or first.shape != counts.shape or len(first) < 2:
        raise UserError("A paired comparison of losses needs the same two or more examples on both sides.")
    difference = second - first
    value = float(difference.sum() / counts.sum())
    error = float(np.std(difference - value * counts, ddof=1) * math.sqrt(len(counts)) / counts.sum())
    return _effect(value, error, len(counts) - 1, len(counts), level, power)


def _effect(value: float, error: float, df: float, n: int, level: float, power: float) -> Effect:
    """From a standard error; where that is 0, every question says the same, and the sign test decides."""
    if error <= 1e-12 * abs(value):
        return Effect(value, value, value, 1.0 if value == 0 else min(1.0, 2 * 0.5**n), None)
    reach = float(stats.t.ppf((1 + level) / 2, df))
    p_value = float(2 * stats.t.sf(abs(value) / error, df))
    detectable = (reach + float(stats.t.ppf(power, df))) * error
    return Effect(value, value - reach * error, value + reach * error, p_value, detectable)


def _variance(a: NDArray[np.float64], b: NDArray[np.float64], ratio: float) -> tuple[float, float]:
    """Of mean(b − ratio·a), with its degrees of freedom."""
    if a.shape[1] != b.shape[1] or a.shape[1] < 2:
        raise UserError(
            f"A paired comparison needs the same questions on both sides, two or more, but got {a.shape[1]} and "
            f"{b.shape[1]}; pass one value per question for each method."
        )
    n = a.shape[1]
    questions = float(np.var(b.mean(axis=0) - ratio * a.mean(axis=0), ddof=1)) / n
    parts = [(questions, n - 1), (ratio**2 * _seeds_part(a), len(a) - 1), (_seeds_part(b), len(b) - 1)]
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / df for part, df in parts if part > 0)
    return total, (total**2 / spread if spread > 0 else float(n - 1))


def _seeds_part(values: NDArray[np.float64]) -> float:
    """Variance of a method's mean that comes from its training seeds; 0 for a single one."""
    seeds = len(values)
    if seeds == 1:
        return 0.0
    return float(np.var(values.mean(axis=1), ddof=1)) / seeds


def _matrix(values: ArrayLike) -> NDArray[np.float64]:
    matrix = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if matrix.ndim != 2 or not matrix.size:
        raise UserError(f"Verdicts must come as (seeds, questions), not with the shape {matrix.shape}.")
    return matrix
