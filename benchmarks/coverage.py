"""How often the intervals of an evaluation hold what they claim, and equal models are called different, by simulation.

    python benchmarks/coverage.py [--draws 1000]

Every draw invents two models that answer the same questions. A question's difficulty is one for both, normal on the
logit scale with standard deviation 3; beside it each model has its own luck with a question, standard deviation 0.5.
Two such models of equal skill disagree on 23 % of the questions. Training seeds shift all questions of a
model by a normal of standard deviation `seed sd`. Intervals are nominally 95 %; the Monte-Carlo error of a share of
0.95 over 1000 draws is 0.007.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from palimpsest.intervals import (
    clustered_difference,
    loss_difference,
    loss_difference_over_runs,
    mcnemar_exact,
    mcnemar_power,
    paired_bootstrap,
    retention,
    wilson,
)

Bools = NDArray[np.bool_]
GRID, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


def mean_accuracy(logit: float, spread: float) -> float:
    """E expit(logit + spread·Z), Z standard normal, by Gauss–Hermite quadrature."""
    return float(WEIGHTS @ expit(logit + spread * GRID) / WEIGHTS.sum())


def models(
    random: np.random.Generator,
    n: int,
    logits: tuple[float, ...],
    seeds: int = 1,
    own: float = 0.5,
    seed_sd: float = 0.0,
) -> list[Bools]:
    """Verdicts (seeds, questions) of one model per entry of `logits`."""
    difficulty = 3 * random.standard_normal(n)
    out = []
    for logit in logits:
        lucky = difficulty + logit + own * random.standard_normal(n)
        out.append(expit(lucky + seed_sd * random.standard_normal((seeds, 1))) > random.random((seeds, n)))
    return out


def share(draws: int, once: Callable[[np.random.Generator], bool]) -> float:
    """In how many of `draws` draws `once` is true."""
    random = np.random.default_rng(0)
    return sum(once(random) for _ in range(draws)) / draws


def wilson_covers(random: np.random.Generator) -> bool:
    low, high = wilson(int(random.binomial(300, 0.26)), 300)
    return low <= 0.26 <= high


def mcnemar_rejects(random: np.random.Generator, n: int = 300) -> bool:
    a, b = (m[0] for m in models(random, n, (-1.0, -1.0)))
    return mcnemar_exact(int(np.sum(a & ~b)), int(np.sum(b & ~a))) <= 0.05


def bootstrap_covers(random: np.random.Generator, n: int = 300) -> bool:
    a, b = (m[0] for m in models(random, n, (-1.0, -0.5)))
    truth = mean_accuracy(-0.5, np.hypot(3, 0.5)) - mean_accuracy(-1.0, np.hypot(3, 0.5))
    low, high = paired_bootstrap(a, b, int(random.integers(2**31)), n=1000)
    return low <= truth <= high


def five_points_found(random: np.random.Generator) -> bool:
    only_a, only_b, _ = random.multinomial(300, [0.025, 0.075, 0.9])
    return mcnemar_exact(int(only_a), int(only_b)) <= 0.05


def seeds_reject(random: np.random.Generator, seeds: int, seed_sd: float) -> bool:
    a, b = models(random, 300, (-1.0, -1.0), seeds, 0.5, seed_sd)
    return clustered_difference(a, b).p_value <= 0.05


def one_seed_rejects(random: np.random.Generator, seed_sd: float) -> bool:
    """What happens when one training run a side stands for its method."""
    a, b = (m[0] for m in models(random, 300, (-1.0, -1.0), 1, 0.5, seed_sd))
    return mcnemar_exact(int(np.sum(a & ~b)), int(np.sum(b & ~a))) <= 0.05


def retention_covers(random: np.random.Generator, n: int, base: float, tuned: float, seeds: int = 1) -> bool:
    seed_sd = 0.0 if seeds == 1 else 0.15
    difficulty = 3 * random.standard_normal(n)
    below = expit(difficulty + base + 0.5 * random.standard_normal(n)) > random.random(n)
    lucky = difficulty + tuned + 0.5 * random.standard_normal(n)
    above = expit(lucky + seed_sd * random.standard_normal((seeds, 1))) > random.random((seeds, n))
    truth = mean_accuracy(tuned, np.sqrt(9.25 + seed_sd**2)) / mean_accuracy(base, np.sqrt(9.25))
    if not below.any():
        return False
    ratio = retention(below, above)
    return ratio.low is None or ratio.high is None or ratio.low <= truth <= ratio.high


def losses(random: np.random.Generator, n: int, shift: float) -> tuple[NDArray[np.float64], ...]:
    """Two models' summed losses of answers of 2 to 40 tokens; skewed, and alike from answer to answer."""
    tokens = random.integers(2, 41, n).astype(np.float64)
    hard = random.lognormal(0.5, 0.7, n)
    a, b = (tokens * hard * random.lognormal(0, 0.15, n) for _ in range(2))
    return a, b + shift * tokens, tokens


def losses_cover(random: np.random.Generator, n: int) -> bool:
    effect = loss_difference(*losses(random, n, 0.05))
    return effect.low <= 0.05 <= effect.high


def losses_over_runs_reject(random: np.random.Generator, runs: int, run_sd: float) -> bool:
    """Equal methods: luck with a document, of deviation 1, in every run and once for all; of a run, in all."""
    tokens = random.integers(20, 81, 100).astype(np.float64)
    luck = random.standard_normal((2, 1, 100)) + random.standard_normal((2, runs, 100))
    a, b = (luck + run_sd * random.standard_normal((2, runs, 1))) * tokens
    return loss_difference_over_runs(a, b, tokens).p_value <= 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    print(f"{draws} draws each; n = 300 questions where nothing else is said")
    rows: list[tuple[str, str, Callable[[np.random.Generator], bool]]] = [
        ("Wilson, accuracy 26 %", "holds the truth", wilson_covers),
        ("McNemar, no difference", "called different", mcnemar_rejects),
        ("paired bootstrap, true difference", "holds the truth", bootstrap_covers),
        (f"McNemar, 5 points (power {mcnemar_power(300, 0.10, 0.05):.3f})", "found", five_points_found),
    ]
    for sd in (0.0, 0.15, 0.4):
        name = f"one seed a side by McNemar, seed sd {sd}"
        rows += [(name, "called different", partial(one_seed_rejects, seed_sd=sd))]
        rows += [
            (f"{k} seeds a side, seed sd {sd}", "called different", partial(seeds_reject, seeds=k, seed_sd=sd))
            for k in (2, 3, 5)
        ]
    for n, base, tuned, k in ((300, -1.7, -2.2, 1), (100, -1.7, -2.2, 1), (300, 2.0, 1.5, 1), (300, -1.7, -2.2, 3)):
        name = f"retention, n {n}, base {100 * mean_accuracy(base, 3.04):.0f} %, {k} seed(s)"
        rows += [(name, "holds the truth", partial(retention_covers, n=n, base=base, tuned=tuned, seeds=k))]
    rows += [(f"loss per token, {n} answers", "holds the truth", partial(losses_cover, n=n)) for n in (100, 500)]
    rows += [
        (f"loss over {k} runs, run sd {sd}", "called different", partial(losses_over_runs_reject, runs=k, run_sd=sd))
        for k in (2, 3, 5)
        for sd in (0.0, 0.3, 1.0, 3.0)
    ]
    for name, what, once in rows:
        print(f"{name:<46} {what:<17} {share(draws, once):.3f}")


if __name__ == "__main__":
    main()
