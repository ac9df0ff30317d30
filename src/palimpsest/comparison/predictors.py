"""What predicts how much text a training costs: the shift of importance, the change of the weights, or drift?

Over tuned models, one value each. What was learned of speech goes along with all of them: who trains longer shifts
more, changes more and hears better. So the question is asked *at equal hearing*, by the partial rank correlation:

    predictor, text lost and speech loss are ranked over the models (ties get their mean rank)
    partial = (r_xy − r_xz·r_yz) / √((1 − r_xz²)·(1 − r_yz²))     r: Spearman's; x predictor, y text lost, z speech loss

which is the correlation of what is left of the ranks of x and y when those of z are taken out of both by a straight
line. p is by permutation (Freedman and Lane 1983): what is left of y is dealt out anew over the models, 10,000 times,
and p is the share of deals with a partial correlation as far from 0, the measured one counted among them. The interval
is a bootstrap over models, percentiles; draws in which a side is all equal, or follows the speech loss alone, are left
out. Of fewer than `MIN_INTERVAL` models the correlation itself has none: a draw of few models has fewer different ones,
and with three or four of them hardly anything is left to disagree. In simulations without any relation the intervals
of 6 models missed 0 in 26 to 50 % of studies and of 8 in 8 to 23 %, of 12 in 3 to 5 %. Those of `beyond_change` err on
the side of 0 (0 to 4 % miss an equality) and are given of any number.

Models of one curve are relatives, and neither p nor the interval knows that: both speak of models like these. What
hearing explains is taken out as a straight line in ranks: docs/frontier.md says where that is not enough.

Shapes: models, draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from palimpsest.analysis.correlation import means_of_methods
from palimpsest.comparison.frontier import DRIFT, LOWER, SPEECH_LOSS
from palimpsest.intervals import holm
from palimpsest.records import BASE, PredictorRecord

Array = NDArray[np.float64]
Row = Mapping[str, Any]
SHIFTS = ("jensen_shannon", "wasserstein_1")
CHANGE = "relative_change"  # mean over the scored matrices of ‖ΔW‖ / ‖W‖
MIN_MODELS = 6  # with fewer a partial correlation has fewer than three degrees of freedom
MIN_INTERVAL = 12  # a percentile interval of fewer is far too narrow, so none is given
DRAWS = 10_000


def predictor_records(
    shift: Sequence[Row],
    delta: Sequence[Row],
    frontier: Sequence[Row],
    *,
    reduction: str,
    seed: int,
    same: Mapping[str, str] | None = None,
    n_draws: int = DRAWS,
) -> list[PredictorRecord]:
    """`predictors` of results.json, a record per kind of text and predictor; none of fewer than `MIN_MODELS` models.

    shift, delta, frontier: tables of results.json. reduction: of the scores that the shift is taken of. same: models
    that are another one on text by construction. Those that are the base say nothing of what predicts a loss, and one
    beside the model that it is would count twice: they are left out.
    """
    predictors = _shifts(shift, reduction) | {CHANGE: _changes(delta)} | {DRIFT: _of_text(frontier, DRIFT, None)}
    predictors = {name: of for name, of in predictors.items() if of}
    heard = {
        row["model"]: row["hearing"]
        for row in frontier
        if row["hearing_measure"] == SPEECH_LOSS and row["hearing"] is not None
    }
    records: list[PredictorRecord] = []
    for measure, task in dict.fromkeys((row["text_measure"], row["text_task"]) for row in frontier):
        lost = _of_text(frontier, measure, task)
        known = {name: of for name, of in predictors.items() if name != measure}
        everywhere = (set(lost) & set(heard)).intersection(*map(set, known.values())) - {BASE}
        models = sorted(name for name in everywhere if (same or {}).get(name) not in {BASE, *everywhere})
        if CHANGE not in known or len(models) < MIN_MODELS:
            continue
        records += _records(measure, task, models, lost, heard, known, reduction, seed, n_draws)
    return records


def _records(
    measure: str,
    task: str | None,
    models: Sequence[str],
    lost: Mapping[str, float],
    heard: Mapping[str, float],
    known: Mapping[str, Mapping[str, float]],
    reduction: str,
    seed: int,
    n_draws: int,
) -> list[PredictorRecord]:
    y, z = (np.array([of[model] for model in models]) for of in (lost, heard))
    x = {name: np.array([of[model] for model in models]) for name, of in known.items()}
    values = {name: float(partial(of, y, z)) for name, of in x.items()}
    draws = np.random.default_rng(seed).integers(0, len(models), size=(n_draws, len(models)))
    drawn = {name: partial(of[draws], y[draws], z[draws]) for name, of in x.items()}
    p_values = {name: permutation_p(x[name], y, z, seed, n_draws) for name in x if np.isfinite(values[name])}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True)) if p_values else {}
    records: list[PredictorRecord] = []
    for name in x:
        note = "" if name in p_values else "all models have the same value, or follow the speech loss alone"
        above = name != CHANGE and name in p_values and CHANGE in p_values
        more, more_low, more_high = _beyond(values, drawn, name) if above else (None, None, None)
        has_interval = name in p_values and len(models) >= MIN_INTERVAL
        low, high = _quantiles(drawn[name]) if has_interval else (None, None)
        records.append(
            {
                "text_measure": measure,
                "text_task": task,
                "predictor": name,
                "reduction": reduction if name in SHIFTS else None,
                "at_equal": SPEECH_LOSS,
                "n_models": len(models),
                "models": list(models),
                "spearman": _finite(spearman(x[name], y)),
                "partial": _finite(values[name]),
                "ci_low": low,
                "ci_high": high,
                "p_value": p_values.get(name),
                "p_holm": corrected.get(name),
                "n_family": len(p_values),
                "beyond_change": more,
                "beyond_change_ci_low": more_low,
                "beyond_change_ci_high": more_high,
                "note": note,
            }
        )
    return records


def _beyond(values: Mapping[str, float], drawn: Mapping[str, Array], name: str) -> tuple[float, float, float]:
    """How much further from 0 the correlation is than that of the change of the weights, with its interval."""
    low, high = _quantiles(np.abs(drawn[name]) - np.abs(drawn[CHANGE]))
    return abs(values[name]) - abs(values[CHANGE]), low, high


def _quantiles(drawn: Array) -> tuple[float, float]:
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975]).tolist()
    return low, high


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------------
# Rank correlation
# ---------------------------------------------------------------------------------------------------------------------
def spearman(x: Array, y: Array) -> Array:
    """(…, models), (…, models) → (…); NaN where a side is all equal."""
    return _pearson(_ranks(x), _ranks(y))


def partial(x: Array, y: Array, z: Array) -> Array:
    """Spearman's correlation of x and y at equal z, (…, models) each → (…).

    NaN where x or y is all equal, or is ordered as z is (or the other way round): nothing is left to correlate.
    """
    return _partial_of_ranks(_ranks(x), _ranks(y), _ranks(z))


def permutation_p(x: Array, y: Array, z: Array, seed: int, n_draws: int = DRAWS) -> float:
    """Two-sided p of no partial correlation (Freedman and Lane 1983); the least is 1 / (draws + 1)."""
    ranks, of_y, of_z = _ranks(x), _ranks(y), _ranks(z)
    left = of_y - _on(of_y, of_z)
    dealt = np.random.default_rng([seed, 1]).permuted(np.tile(left, (n_draws, 1)), axis=1)
    found = _partial_of_ranks(ranks, _on(of_y, of_z) + dealt, of_z)
    measured = abs(float(_partial_of_ranks(ranks, of_y, of_z)))
    # Deals that give the measured value give it up to rounding.
    return (1 + int((np.abs(found) >= measured - 1e-9).sum())) / (n_draws + 1)


def _on(y: Array, z: Array) -> Array:
    """y as far as a straight line in z gives it; (models,) each."""
    centred = z - z.mean()
    square = float((centred**2).sum())
    slope = float((centred * y).sum()) / square if square else 0.0
    line: Array = y.mean() + slope * centred
    return line


def _partial_of_ranks(x: Array, y: Array, z: Array) -> Array:
    xy, xz, yz = _pearson(x, y), _pearson(x, z), _pearson(y, z)
    xz, yz = (np.where(np.isnan(of), 0.0, of) for of in (xz, yz))  # all of equal hearing: nothing to take out
    left = (1 - xz**2) * (1 - yz**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(left > 1e-12, (xy - xz * yz) / np.sqrt(left), np.nan)
    return np.clip(found, -1.0, 1.0)


def _pearson(x: Array, y: Array) -> Array:
    x, y = (of - of.mean(axis=-1, keepdims=True) for of in (x, y))
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(scale > 0, (x * y).sum(axis=-1) / scale, np.nan)
    return found


def _ranks(values: Array) -> Array:
    ranks: Array = stats.rankdata(values, axis=-1)
    return ranks


# ---------------------------------------------------------------------------------------------------------------------
# One value of each model, the mean over its training runs
# ---------------------------------------------------------------------------------------------------------------------
def _shifts(shift: Sequence[Row], reduction: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for measure in SHIFTS:
        of_run = {
            row["model"]: row["value"]
            for row in shift
            if row["reference"] == BASE and row["measure"] == measure and row["reduction"] == reduction
        }
        found[measure] = means_of_methods(of_run)
    return found


def _changes(delta: Sequence[Row]) -> dict[str, float]:
    of_run: dict[str, list[float]] = defaultdict(list)
    for row in delta:
        if row["relative_norm"] is not None:
            of_run[row["method"]].append(row["relative_norm"])
    return means_of_methods({run: float(np.mean(values)) for run, values in of_run.items()})


def _of_text(frontier: Sequence[Row], measure: str, task: str | None) -> dict[str, float]:
    """Text lost, more of it being worse."""
    return {
        row["model"]: row["text"] if row["text_better"] == LOWER else -row["text"]
        for row in frontier
        if (row["text_measure"], row["text_task"]) == (measure, task)
    }
