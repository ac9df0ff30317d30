"""Is the difference real? Intervals of accuracies, and paired comparisons of methods on the same questions.

Two methods that answer the same questions differ only where they disagree: `only_a` questions (a right, b
wrong) and `only_b`. All functions are deterministic; the bootstrap takes its seed as an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

from palimpsest.rundir import ComparisonRecord, UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

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


def compare(
    verdicts: Mapping[str, Mapping[str, bool]],
    *,
    task: str,
    modality: str,
    metric: str,
    seed: int,
    level: float = 0.95,
) -> list[ComparisonRecord]:
    """Every pair of methods, paired by question: difference, bootstrap interval, McNemar and Holm.

    verdicts: method -> {question id: right?}. Pairs follow the order of the methods, the earlier one being
    `method_a`, so the base model belongs first. Holm is taken over the pairs of this call; use `with_holm`
    on the rows of several calls that are read as one table.

    Raises:
        UserError: when two methods did not answer the same questions.
    """
    records: list[ComparisonRecord] = []
    for method_a, method_b in combinations(verdicts, 2):
        right_a, right_b = _paired(method_a, verdicts[method_a], method_b, verdicts[method_b])
        only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
        low, high = paired_bootstrap(right_a, right_b, seed, level=level)
        p_value = mcnemar_exact(only_a, only_b)
        records.append(
            {
                "task": task,
                "modality": modality,
                "metric": metric,
                "method_a": method_a,
                "method_b": method_b,
                "n": len(right_a),
                "only_a": only_a,
                "only_b": only_b,
                "difference": (only_b - only_a) / len(right_a),
                "ci_low": low,
                "ci_high": high,
                "p_value": p_value,
                "p_holm": p_value,
            }
        )
    return with_holm(records)


def with_holm(records: Sequence[ComparisonRecord]) -> list[ComparisonRecord]:
    """The records with `p_holm` taken over all of them."""
    corrected = holm([record["p_value"] for record in records])
    return [{**record, "p_holm": p} for record, p in zip(records, corrected, strict=True)]


def _paired(
    name_a: str, a: Mapping[str, bool], name_b: str, b: Mapping[str, bool]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Both methods' verdicts by sorted id, so that the bootstrap does not depend on the rows' order."""
    if a.keys() != b.keys() or not a:
        only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
        raise UserError(
            f"{name_a!r} ({len(a)} questions) and {name_b!r} ({len(b)}) cannot be paired: {only_a} are only "
            f"in the first, {only_b} only in the second; evaluate both on the same task."
        )
    ids = sorted(a)
    return np.array([a[i] for i in ids], dtype=np.bool_), np.array([b[i] for i in ids], dtype=np.bool_)
