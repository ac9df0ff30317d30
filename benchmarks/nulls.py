"""The nulls of rank clustering: drawn sums against full shuffles, in time and in what they say; and z of noise.

    python benchmarks/nulls.py [--matrices 300] [--shuffles 300]

Prints, for several kinds of entries: the mean of the drawn measures, off that of full shuffles in standard deviations
of theirs; the ratio of both standard deviations; the time of 20 draws over that of one full shuffle and its sums; and
how often |z| > 3 in matrices of noise, from one shuffle's draws and from three.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from palimpsest.analysis.clustering import against, concentration, measure_matrix, null_draws
from palimpsest.analysis.nulls import DEALS

KINDS = {
    "uniform": lambda rng, shape: rng.random(shape),
    "half-normal": lambda rng, shape: np.abs(rng.standard_normal(shape)),
    "product of normals": lambda rng, shape: np.abs(rng.standard_normal(shape) * rng.standard_normal(shape)),
    "lognormal 1": lambda rng, shape: np.exp(rng.standard_normal(shape)),
    "lognormal 2": lambda rng, shape: np.exp(2 * rng.standard_normal(shape)),
    "lognormal 3": lambda rng, shape: np.exp(3 * rng.standard_normal(shape)),
    "Pareto 1.5": lambda rng, shape: rng.pareto(1.5, shape) + 1,
}
NULLS = ("everywhere", "within_rows", "within_columns")
LARGE, SMALL = (1536, 576), (120, 90)


def fully_shuffled(matrix: np.ndarray, null: str, rng: np.random.Generator) -> dict[str, float]:
    if null == "everywhere":
        moved = rng.permutation(matrix.reshape(-1)).reshape(matrix.shape)
    else:
        moved = rng.permuted(matrix, axis=1 if null == "within_rows" else 0)
    return {
        f"{measure}_{axis}": float(value)
        for axis, dimension in (("rows", 1), ("columns", 0))
        if null != f"within_{axis}"
        for measure, value in concentration(moved.sum(axis=dimension, dtype=np.float64)).items()
    }


def compare(matrix: np.ndarray, n: int) -> str:
    """Over the nulls and measures: the largest and the middle deviation, and the ratio of times."""
    off, spread, ratio = [], [], []
    for null in NULLS:
        start = time.process_time()
        full = [fully_shuffled(matrix, null, np.random.default_rng([1, i])) for i in range(n)]
        of_one = (time.process_time() - start) / n
        start = time.process_time()
        drawn = null_draws(matrix, null, n // DEALS + 1, np.random.default_rng(2))
        ratio.append((time.process_time() - start) / (n // DEALS + 1) / of_one)
        for measure, values in drawn.items():
            of_full = np.array([row[measure] for row in full])
            off.append((values.mean() - of_full.mean()) / of_full.std(ddof=1))
            spread.append(values.std(ddof=1) / of_full.std(ddof=1))
    return (
        f"mean off by {np.median(np.abs(off)):.2f}, at most {np.abs(off).max():.2f} sd; "
        f"sd {min(spread):.2f} to {max(spread):.2f} times; 20 draws take {np.mean(ratio):.2f} of one shuffle's time"
    )


def beyond_three(draw: object, n: int, n_shuffles: int) -> dict[str, float]:
    """Share of |z| > 3 in noise, by measure."""
    z: dict[str, list[float]] = {}
    for seed in range(n):
        matrix = draw(np.random.default_rng([3, seed]), SMALL).astype(np.float32)  # type: ignore[operator]
        values = measure_matrix(matrix)
        for null in NULLS:
            for measure, draws in null_draws(matrix, null, n_shuffles, np.random.default_rng([4, seed])).items():
                z.setdefault(measure.partition("_")[0], []).append(against(values[measure], draws)[2])
    return {measure: float((np.abs(found) > 3).mean()) for measure, found in z.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=300)
    parser.add_argument("--shuffles", type=int, default=300)
    asked = parser.parse_args()
    for name, draw in KINDS.items():
        matrix = draw(np.random.default_rng(0), LARGE).astype(np.float32)
        print(f"{name:<20}{compare(matrix, asked.shuffles)}", flush=True)
        for n_shuffles in (1, 3):
            rates = beyond_three(draw, asked.matrices, n_shuffles)
            said = ", ".join(f"{measure} {rate:.1%}" for measure, rate in rates.items())
            print(f"{'':<20}|z| > 3 in noise, {n_shuffles} shuffle(s): {said}", flush=True)


if __name__ == "__main__":
    main()
