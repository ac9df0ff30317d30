"""How well an estimate ranks weights, judged by exact ablation of a stratified sample of them.

Most weights of a model matter next to nothing, so a plain random sample would hardly meet one that does. Strata are
module kind × importance; within a stratum weights are drawn at random, all strata get about the same number, and each
drawn weight stands for N_h / n_h weights of the model. With these sampling weights every number here estimates the
value for *all* scored weights, not for the sample; intervals come from resampling within the strata.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from palimpsest.files import UserError
from palimpsest.models.anatomy import module_kind

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64, Int64

    from palimpsest.ablation.exact import Position
    from palimpsest.importance.scores import Scores

# Lower edges of the strata of a kind: shares of its weights, counted from the most important one.
EDGES = (0.001, 0.01, 0.03, 0.1, 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Sample
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """positions: (parameter name, row-major index), in random order. kinds, strata, weights: one per position.

    strata: 0, 1, … over kinds and, within a kind, from the most important weights to the least.
    weights: how many weights of the model a drawn one stands for, N_h / n_h of its stratum.
    """

    positions: list[Position]
    kinds: list[str]
    strata: Int64[np.ndarray, " positions"]
    weights: Float64[np.ndarray, " positions"]


def sample_weights(scores: Scores, n: int, seed: int = 0) -> Sample:
    """Draw about `n` weights: as many from every stratum, or all of a stratum that has fewer.

    Importance is, for this purpose, the largest of a weight's scores over the reductions, each in units of its own
    mean: what any reduction puts on top is in the upper strata, so that none is favoured.
    """
    names: dict[str, list[str]] = {}
    for name in scores.names:
        names.setdefault(module_kind(name) or "other", []).append(name)
    n_strata = len(names) * (len(EDGES) + 1)
    if n < n_strata:
        raise UserError(f"A sample of {n} weights cannot cover {n_strata} strata; ask for at least {n_strata} weights.")
    generator = np.random.default_rng(seed)
    means = {
        reduction: sum(float(t.double().sum()) for t in scores.tensors(reduction).values())
        / sum(t.numel() for t in scores.tensors(reduction).values())
        for reduction in scores.reductions
    }
    drawn: list[tuple[Position, str, int, float]] = []
    for number, (kind, members) in enumerate(names.items()):
        values = np.concatenate([_largest(scores, name, means) for name in members])
        ends = np.cumsum([scores.tensors(scores.reductions[0])[name].numel() for name in members])
        ranks = [max(0, round(edge * len(values)) - 1) for edge in EDGES]
        thresholds = -np.partition(-values, ranks)[ranks]  # score of the last weight inside each upper stratum
        level = np.zeros(len(values), dtype=np.int8)
        for threshold in thresholds:
            level += values < threshold
        for h in range(len(EDGES) + 1):
            inside = np.flatnonzero(level == h)
            stratum = number * (len(EDGES) + 1) + h
            quota = n // n_strata + (stratum < n % n_strata)
            chosen = generator.choice(inside, min(quota, len(inside)), replace=False)
            for flat in chosen.tolist():
                at = int(np.searchsorted(ends, flat, side="right"))
                index = flat - int(ends[at - 1] if at else 0)
                drawn.append(((members[at], index), kind, stratum, len(inside) / len(chosen)))
    order = generator.permutation(len(drawn))
    positions, kinds, strata, weights = zip(*(drawn[i] for i in order), strict=True)
    return Sample(list(positions), list(kinds), np.array(strata), np.array(weights))


def scores_at(scores: Scores, reduction: str, positions: Sequence[Position]) -> Float64[np.ndarray, " positions"]:
    """The scores of single weights, each tensor loaded once."""
    rows: dict[str, list[int]] = {}
    for row, (name, _) in enumerate(positions):
        rows.setdefault(name, []).append(row)
    values = np.zeros(len(positions))
    tensors = scores.tensors(reduction)
    for name, members in rows.items():
        flat = tensors[name].detach().cpu().reshape(-1)
        values[members] = flat[[positions[row][1] for row in members]].double().numpy()
    return values


def _largest(scores: Scores, name: str, means: Mapping[str, float]) -> Any:
    """Largest of the scores in units of their means, (weights of the tensor,) float32."""
    tensors = ((scores.tensors(reduction)[name], mean) for reduction, mean in means.items())
    in_means = (tensor.detach().cpu().reshape(-1).numpy() / np.float32(mean or 1) for tensor, mean in tensors)
    return functools.reduce(np.maximum, in_means)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Design(TypedDict, total=False):
    """weights, strata: as in `Sample`; by default a plain random sample."""

    weights: Float64[np.ndarray, " positions"] | None
    strata: Int64[np.ndarray, " positions"] | None
    seed: int
    resamples: int


@dataclass(frozen=True)
class Agreement:
    """How well an approximation ranks weights, estimated for all weights the sample stands for.

    spearman, kendall (tau-b): rank correlation with the exact importance.
    top_precision: of the `share` of the weights that exact ablation puts first, the part that the approximation puts
        among its own first; chance gives `share`.
    """

    n: int
    share: float
    spearman: Estimate
    kendall: Estimate
    top_precision: Estimate


def agreement(
    exact: Float64[np.ndarray, " positions"],
    approximate: Float64[np.ndarray, " positions"],
    *,
    share: float = 0.03,
    **design: Unpack[Design],
) -> Agreement:
    """Rank agreement of two importances of the same sampled weights; higher means more important in both."""
    exact, approximate = np.asarray(exact, dtype=np.float64), np.asarray(approximate, dtype=np.float64)
    if exact.shape != approximate.shape or len(exact) < 2:
        raise UserError(
            f"Agreement needs two importances of the same two or more weights, not {exact.shape} and "
            f"{approximate.shape}."
        )
    replicates = resampled_weights(len(exact), **design)
    return Agreement(
        n=len(exact),
        share=share,
        spearman=_estimate(_spearman(exact, approximate, replicates)),
        kendall=_estimate(_kendall(exact, approximate, replicates)),
        top_precision=_estimate(_top_precision(exact, approximate, replicates, share)),
    )


def advantage(
    exact: Float64[np.ndarray, " positions"],
    approximate: Float64[np.ndarray, " positions"],
    reference: Float64[np.ndarray, " positions"],
    *,
    share: float = 0.03,
    **design: Unpack[Design],
) -> tuple[Estimate, Estimate]:
    """How much better than `reference` an approximation agrees: differences of Spearman and of top precision.

    Paired: both are judged on the same resampled weights, so the interval is narrower than two separate ones suggest.
    """
    replicates = resampled_weights(len(exact), **design)
    spearman = _spearman(exact, approximate, replicates) - _spearman(exact, reference, replicates)
    precision = _top_precision(exact, approximate, replicates, share)
    precision = precision - _top_precision(exact, reference, replicates, share)
    return _estimate(spearman), _estimate(precision)


def sign_agreement(
    changes: Float64[np.ndarray, " positions"],
    predicted: Float64[np.ndarray, " positions"],
    *,
    share: float = 1.0,
    **design: Unpack[Design],
) -> Estimate:
    """Share of the weights for which ablation raises the loss exactly when `predicted` says so; chance gives ½.

    share: only among this share of the weights, those whose exact change is largest.
    """
    replicates = resampled_weights(len(changes), **design)
    inside = replicates * _membership(np.abs(changes), replicates, share)
    same = np.sign(changes) == np.sign(predicted)
    return _estimate((inside * same).sum(axis=1) / inside.sum(axis=1))


def resampled_weights(
    n: int,
    *,
    weights: Float64[np.ndarray, " positions"] | None = None,
    strata: Int64[np.ndarray, " positions"] | None = None,
    seed: int = 0,
    resamples: int = 500,
) -> Float64[np.ndarray, "replicates positions"]:
    """Row 0: the weights themselves. Other rows: times how often each was drawn, n_h out of its stratum's n_h."""
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    strata = np.zeros(n, dtype=np.int64) if strata is None else np.asarray(strata)
    generator = np.random.default_rng(seed)
    replicates = np.tile(weights / weights.sum(), (1 + resamples, 1))
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        counts = generator.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), size=resamples)
        replicates[1:, inside] *= counts
    return replicates


def _estimate(values: Float64[np.ndarray, " replicates"]) -> Estimate:
    resampled = values[1:][np.isfinite(values[1:])]  # a replicate of all-equal values has no correlation
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))


def _spearman(x: Any, y: Any, replicates: Any) -> Any:
    ranks = [_ranks(values, replicates) for values in (x, y)]
    a, b = (r - (replicates * r).sum(axis=1, keepdims=True) / replicates.sum(axis=1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore"):
        return (replicates * a * b).sum(axis=1) / np.sqrt(
            (replicates * a * a).sum(axis=1) * (replicates * b * b).sum(axis=1)
        )


def _ranks(values: Any, replicates: Any) -> Any:
    """Weighted mid-ranks: the weight below a value plus half the weight at it; (replicates, positions)."""
    _, group = np.unique(values, return_inverse=True)
    at = np.zeros((group.max() + 1, len(replicates)))
    np.add.at(at, group, replicates.T)
    below = np.cumsum(at, axis=0) - at
    return (below + at / 2)[group].T


def _kendall(x: Any, y: Any, replicates: Any) -> Any:
    """tau-b, a pair counting as often as the product of its weights."""
    a, b = (np.sign(values[:, None] - values[None, :]) for values in (x, y))

    def pairs(matrix: Any) -> Any:
        return ((replicates @ matrix) * replicates).sum(axis=1)

    with np.errstate(invalid="ignore"):
        return pairs(a * b) / np.sqrt(pairs(a * a) * pairs(b * b))


def _top_precision(x: Any, y: Any, replicates: Any, share: float) -> Any:
    first = [_membership(values, replicates, share) for values in (x, y)]
    both = replicates * np.minimum(*first)
    return both.sum(axis=1) / (share * replicates.sum(axis=1))


def _membership(values: Any, replicates: Any, share: float) -> Bool[np.ndarray, "replicates positions"] | Any:
    """How much of each weight is among the first `share` of all, by value: 1, 0, or a part at the edge."""
    order = np.argsort(-values, kind="stable")
    ordered = replicates[:, order]
    before = np.cumsum(ordered, axis=1) - ordered
    room = share * replicates.sum(axis=1, keepdims=True) - before
    parts = np.empty_like(replicates)
    parts[:, order] = np.clip(room / np.where(ordered > 0, ordered, 1), 0, 1)
    return parts
