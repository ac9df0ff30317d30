"""Is a difference real? Intervals of accuracies, paired effects, corrections, and several training runs as one mean.

Two methods that answer the same questions differ only where they disagree: `only_a` questions (a right, b wrong) and
`only_b`. All functions are deterministic; the bootstrap takes its seed as an argument.

**One training run a side**: Wilson, exact McNemar and its power, paired bootstrap, Holm.

**Several training runs, ratios, losses** (`Effect`, `Ratio`). Everything there is a mean over questions of x = b − r·a,
where a and b are the values of the two sides on the same questions, a verdict or its mean over training runs. Its
variance has up to three parts:

    questions  variance over questions of the runs' mean of x, over the number of questions
    seeds      per side with two or more runs: variance of the runs' means, over the number of runs

The interval is value ± t·√variance, with Satterthwaite's degrees of freedom (Satterthwaite 1946). A side with one
run has no seeds part: the interval then speaks of these trained models, not of training again. The noise of
single answers is in both parts. A two-way analysis of variance would take it out of one, but simulated
beside this estimator, before it was chosen, it called equal methods different in up to 7 % of the cases with three
runs (benchmarks/coverage.py has the chosen one alone).

**From each run's value and its interval over data to one mean** (`over_runs`). The interval covers both what the runs
share, the data, and what they do not, the training seed:

    low  = mean − √(below² + spread²)      spread = t(S − 1)·s/√S, s the standard deviation of the S runs' values
    high = mean + √(above² + spread²)      below, above = the arms of the mean's interval over data

This is the method of variance estimates recovery (Zou and Donner 2008): the arms of two independent parts add as
squares, and an asymmetric interval stays asymmetric. All runs are measured on the same data, so the arms over
data are not divided by √S. With two runs t is 12.7, with three 4.3, with five 2.8.

Shapes: seeds = training runs of one method, questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

from palimpsest.files import UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_CHUNK = 1_000_000  # resampled values the bootstrap holds at once


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), without continuity correction."""
    if n < 1 or not 0 <= correct <= n:
        raise UserError(f"{correct} of {n} is no proportion; an interval needs at least one answered question.")
    interval = stats.binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def wilson_share(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share that need not be a count over `n`, such as a mean over several draws."""
    if n < 1 or not 0 <= share <= 1:
        raise UserError(f"{share} over {n} is no proportion; an interval needs a share in [0, 1] of one or more.")
    z = stats.norm.ppf((1 + level) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: is a disagreement equally likely to favour a and b?

    Binomial with probability 1/2 over the only_a + only_b questions that separate the two; 1 if there are
    none.
    """
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, seed: int, n: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(b) − mean(a), resampling the questions `n` times with replacement.

    a, b: shape (questions,), the two methods' values of the same questions in the same order: verdicts, or
    any number such as a loss. With several training seeds pass each question's mean over the seeds; the
    interval then speaks of new questions, not of new training runs.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise UserError(
            f"A paired comparison needs the same questions on both sides but got shapes {first.shape} and "
            f"{second.shape}; pass one value per question for each method."
        )
    difference = second - first
    random = np.random.default_rng(seed)
    values, counts = np.unique(difference, return_counts=True)
    if len(values) <= 16:  # verdicts: how often each value is drawn is multinomial, which is much faster
        means = random.multinomial(difference.size, counts / difference.size, size=n) @ values / difference.size
    else:
        means = np.empty(n)
        step = max(1, _CHUNK // difference.size)
        for start in range(0, n, step):
            stop = min(start + step, n)
            drawn = random.integers(0, difference.size, size=(stop - start, difference.size))
            means[start:stop] = difference[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ratio(
    totals: ArrayLike, counts: ArrayLike, seed: int, n: int = 10_000, level: float = 0.95
) -> NDArray[np.float64]:
    """Percentile intervals of Σ totals / Σ counts, resampling the units (texts, documents) with replacement.

    totals: (units, measures), sums over each unit; counts: (units,), what they are divided by, such as tokens. Every
    measure sees the same draws. Returns (2, measures): the low ends, the high ends. Draws without any count, which a
    measure of few units can have, are left out.
    """
    sums, sizes = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if sums.ndim != 2 or sizes.shape != sums.shape[:1] or sizes.sum() <= 0 or (sizes < 0).any():
        raise UserError(f"A ratio needs totals (units, measures) and a count each, not {sums.shape} and {sizes.shape}.")
    random, units = np.random.default_rng(seed), len(sizes)
    ratios = []
    step = max(1, _CHUNK // units)
    for start in range(0, n, step):
        drawn = random.multinomial(units, np.full(units, 1 / units), size=min(step, n - start))  # (draws, units)
        divisor = drawn @ sizes
        ratios.append((drawn @ sums)[divisor > 0] / divisor[divisor > 0, None])
    bounds: NDArray[np.float64] = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return bounds


def resampled(kinds: Sequence[str], seed: int | Sequence[int], n: int = 10_000) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn, (draws, units) at a time until there were `n`; units among those of their kind."""
    random, units = np.random.default_rng(seed), len(kinds)
    of_kind = [np.flatnonzero(np.asarray(kinds) == kind) for kind in dict.fromkeys(kinds)]
    step = max(1, _CHUNK // units)
    for start in range(0, n, step):
        times = np.empty((min(step, n - start), units))
        for of in of_kind:
            times[:, of] = random.multinomial(len(of), np.full(len(of), 1 / len(of)), size=len(times))
        yield times


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979), in the order of the input."""
    corrected = [0.0] * len(pvalues)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        corrected[index] = running
    return corrected


def mcnemar_power(n: int, discordant: float, difference: float, level: float = 0.95) -> float:
    """Probability that the exact McNemar test finds a true `difference` with n paired questions.

    `discordant` is the share of questions, in (0, 1], on which the methods are expected to disagree. Exact,
    no normal approximation: the number of separating questions is Binomial(n, discordant), and b wins each
    of them with probability (1 + difference / discordant) / 2.
    """
    if n < 1 or not 0 < discordant <= 1 or abs(difference) > discordant:
        raise UserError(
            f"No power for n = {n}, a discordant share of {discordant} and a difference of {difference}; "
            "the share must be in (0, 1] and at least as large as the difference."
        )
    counts = np.arange(1, n + 1)  # separating questions; with none the test never rejects
    wins = 0.5 * (1 + difference / discordant)
    # The test rejects when the loser won at most `critical` questions: half of 1 − level on each side.
    tail = (1 - level) / 2
    critical = stats.binom.ppf(tail, counts, 0.5)
    critical -= stats.binom.cdf(critical, counts, 0.5) > tail
    rejects = stats.binom.cdf(critical, counts, wins) + stats.binom.sf(counts - critical - 1, counts, wins)
    return float(np.sum(stats.binom.pmf(counts, n, discordant) * rejects))


def minimum_detectable_difference(n: int, discordant: float, level: float = 0.95, power: float = 0.8) -> float | None:
    """The smallest true difference of accuracies that n paired questions find with probability `power`.

    `discordant` as in `mcnemar_power`, for example (only_a + only_b) / n of a pilot run: the larger it is,
    the harder a difference is to see. None when even the largest possible difference, every disagreement
    won by one side, would be found less often than `power`.
    """
    if mcnemar_power(n, discordant, discordant, level) < power:
        return None
    return float(optimize.brentq(lambda d: mcnemar_power(n, discordant, d, level) - power, 0.0, discordant, xtol=1e-6))


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


def combined_effect(value: float, parts: Sequence[tuple[float, float]], level: float = 0.95) -> Effect:
    """A difference whose variance is a sum of independent parts, (variance, degrees of freedom) each; t test."""
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / df for part, df in parts if part > 0)
    df = total**2 / spread if spread > 0 else min(df for _, df in parts)
    return _effect(value, math.sqrt(total), df, int(max(df for _, df in parts)) + 1, level, 0.8)


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
    return _effect(value, _ratio_error(difference, counts), len(counts) - 1, len(counts), level, power)


def _ratio_error(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """Standard error of Σ sums / Σ counts (Cochran 1977, section 6.3)."""
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(np.std(residuals, ddof=1) * math.sqrt(len(counts)) / counts.sum())


def loss_difference_over_runs(a: ArrayLike, b: ArrayLike, tokens: ArrayLike, level: float = 0.95) -> Effect:
    """Loss of b minus that of a, nats per token, as means over training runs: over units and over runs.

    a, b: (runs, units), each unit's summed loss in nats; tokens: (units,). With as many runs on both sides run i of a
    is paired with run i of b, which has the same seeds. One side may be a single model, (1, units). The
    interval is that of `over_runs`: arms of `loss_difference` for the mean over runs, and of a t test of the runs'
    differences, with runs − 1 degrees of freedom, added in quadrature. p is the level at which it reaches 0. (One t
    test with both variances and Satterthwaite's degrees of freedom calls equal methods different too often where few
    runs happen to agree.)

    Raises UserError for one run on both sides, or for other numbers of runs.
    """
    first, second, counts = (np.asarray(x, dtype=np.float64) for x in (a, b, tokens))
    if {first.ndim, second.ndim} != {2} or {first.shape[1], second.shape[1]} != {counts.size} or counts.size < 2:
        raise UserError("A paired comparison of losses needs the same two or more examples in every run.")
    several = {len(first), len(second)} - {1}
    if len(several) != 1:
        raise UserError(
            "Losses over training runs need two runs or more of one model, and as many or one of the other; these have "
            f"{len(first)} and {len(second)}."
        )
    differences = second - first  # (runs, units): a single model stands beside every run
    mean = differences.mean(axis=0)
    of_runs = differences.sum(axis=1) / counts.sum()
    value = float(mean.sum() / counts.sum())
    errors = _ratio_error(mean, counts), float(np.std(of_runs, ddof=1)) / math.sqrt(len(of_runs))
    if max(errors) <= 1e-12 * abs(value):
        return _effect(value, 0.0, 1, len(counts), level, 0.8)

    def reach(p_value: float) -> float:
        over_units, over_runs = stats.t.isf(p_value / 2, [len(counts) - 1, len(of_runs) - 1]) * errors
        return math.hypot(over_units, over_runs)

    least = 1e-12
    if value == 0:
        return Effect(value, -reach(1 - level), reach(1 - level), 1.0, None)
    p = least if reach(least) < abs(value) else optimize.brentq(lambda p: reach(p) - abs(value), least, 1.0)
    return Effect(value, value - reach(1 - level), value + reach(1 - level), float(p), None)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracies: one way for one training run a side and for several
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Compared:
    """Accuracy of b against that of a on the same questions, over one or several training runs of each."""

    n: int  # questions
    only_a: int | None  # questions only a has right; None where there are several runs
    only_b: int | None
    difference: float  # accuracy(b) − accuracy(a)
    low: float  # 95 %
    high: float
    test: str  # mcnemar_exact | clustered_t
    p_value: float
    effect: Effect | None  # of several runs

    @property
    def detectable(self) -> float | None:
        """The smallest true difference found with probability 0.8; None: no difference would be."""
        if self.only_a is None or self.only_b is None:
            return self.effect.detectable if self.effect else None
        apart = self.only_a + self.only_b
        return minimum_detectable_difference(self.n, apart / self.n) if apart else None


def compare_accuracies(a: ArrayLike, b: ArrayLike, seed: int) -> Compared:
    """a, b: verdicts, (seeds, questions) or (questions,), the same questions in the same order. seed: of the bootstrap.

    One run a side: exact McNemar and the paired bootstrap. Several: `clustered_difference`.
    """
    first, second = _matrix(a), _matrix(b)
    n, difference = first.shape[1], float(second.mean() - first.mean())
    if len(first) > 1 or len(second) > 1:
        effect = clustered_difference(first, second)
        return Compared(n, None, None, difference, effect.low, effect.high, "clustered_t", effect.p_value, effect)
    low, high = paired_bootstrap(first[0], second[0], seed)
    only_a, only_b = int(np.sum(first > second)), int(np.sum(second > first))
    p_value = mcnemar_exact(only_a, only_b)
    return Compared(n, only_a, only_b, difference, low, high, "mcnemar_exact", p_value, None)


def accuracy_interval(right: ArrayLike) -> tuple[float, float]:
    """Of the mean of verdicts (seeds, questions): Wilson's for one run, clustered over several."""
    values = _matrix(right)
    if len(values) == 1:
        return wilson(int(values.sum()), values.shape[1])
    if values.shape[1] == 1:
        return 0.0, 1.0  # one question says nothing about others
    effect = clustered_difference(np.zeros_like(values[0]), values)
    return max(0.0, effect.low), min(1.0, effect.high)


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


LEVEL = 0.95


def standard_deviation(values: Sequence[float]) -> float:
    """Of the runs' values, with n − 1; needs two or more."""
    return float(np.std(values, ddof=1))


def over_runs(values: Sequence[float], below: float = 0.0, above: float = 0.0) -> tuple[float, float, float]:
    """(mean, low, high) at 95 %. values: of each run, two or more; below, above: arms over data, none below 0.

    Without arms the interval is over seeds alone, on these data.
    """
    if len(values) < 2:
        raise ValueError("an interval over training runs needs two or more of them")
    mean = math.fsum(values) / len(values)
    t = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    spread = t * standard_deviation(values) / math.sqrt(len(values))
    return mean, mean - math.hypot(below, spread), mean + math.hypot(above, spread)


def mean_arms(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """(below, above): the runs' mean distance from value to either end of their intervals over the same data.

    A percentile interval of a distance can lie wholly above its value (shift.py); its lower arm then counts as 0.
    """
    below = [value - low for value, low in zip(values, lows, strict=True)]
    above = [high - value for value, high in zip(values, highs, strict=True)]
    return max(0.0, math.fsum(below) / len(below)), max(0.0, math.fsum(above) / len(above))
