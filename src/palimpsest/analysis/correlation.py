"""Over tuned models: does more shift of importance go with more loss of text accuracy?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from palimpsest.records import CorrelationRecord, method_of

MEASURES = ("jensen_shannon", "wasserstein_1")
MIN_MODELS = 3
ALL_ORDERS = 8  # models: with ties, p is counted over all orders of up to so many (8! = 40320)
Row = Mapping[str, Any]


def correlation_records(
    shift: Sequence[Row], qa: Sequence[Row], *, metric: str, base: str = "base"
) -> list[CorrelationRecord]:
    """Kendall's τ_b between a model's shift from the base and its loss of text accuracy, exact two-sided p.

    shift, qa: tables of results.json. The loss is the base's accuracy from text minus the model's, pooled over tasks by
    number of questions; models may lose the same (ties). A method trained several times is one model, the mean of those
    of its runs that have both: runs of one method resemble each other, and p counts every model as a new one. With
    `MIN_MODELS` models the smallest possible p is 1/3, with 5 models 1/60.
    """
    loss_of_run = _text_loss(qa, metric, base)
    by_run: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in shift:
        if row["reference"] == base and row["measure"] in MEASURES and row["model"] in loss_of_run:
            by_run[row["measure"], row["reduction"]][row["model"]] = row["value"]
    records: list[CorrelationRecord] = []
    for (measure, reduction), of_run in by_run.items():
        values, loss = means_of_methods(of_run), means_of_methods({run: loss_of_run[run] for run in of_run})
        models = sorted(values)
        enough = len(models) >= MIN_MODELS
        tau, p = _kendall([values[m] for m in models], [loss[m] for m in models]) if enough else (None, None)
        note = "" if tau is not None else "all models lost the same, or shifted the same"
        if not enough:
            note = f"needs at least {MIN_MODELS} tuned models with shift and text accuracy, there are {len(models)}"
        records.append(
            {
                "measure": measure,
                "reduction": reduction,
                "metric": metric,
                "n_models": len(models),
                "models": models,
                "kendall_tau": tau,
                "p_value": p,
                "note": note,
            }
        )
    return records


def means_of_methods(of_run: Mapping[str, float]) -> dict[str, float]:
    """Of each method, over its runs."""
    runs: dict[str, list[float]] = defaultdict(list)
    for run, value in of_run.items():
        runs[method_of(run)[0]].append(value)
    return {method: fmean(values) if len(values) > 1 else values[0] for method, values in runs.items()}


def _kendall(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """τ_b and its two-sided p; both None if one side is all equal, p None with ties among more than `ALL_ORDERS`.

    With ties scipy's p is a normal approximation, far too small for a few models; here the orders are counted.
    """
    result = stats.kendalltau(x, y)
    if not np.isfinite(result.statistic):
        return None, None
    tau = float(result.statistic)
    if len(set(x)) == len(x) and len(set(y)) == len(y):
        return tau, float(result.pvalue)
    if len(x) > ALL_ORDERS:
        return tau, None
    signs = np.sign(np.subtract.outer(x, x))
    orders = np.array(list(permutations(y)))
    agreement = (np.sign(orders[:, :, None] - orders[:, None, :]) * signs).sum(axis=(1, 2))
    return tau, float((np.abs(agreement) >= abs((np.sign(np.subtract.outer(y, y)) * signs).sum())).mean())


def _text_loss(qa: Sequence[Row], metric: str, base: str) -> dict[str, float]:
    correct: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for row in qa:
        if row["modality"] == "text" and row["metric"] == metric:
            correct[row["method"]] += row["correct"]
            asked[row["method"]] += row["n"]
    if base not in asked:
        return {}
    return {
        model: correct[base] / asked[base] - correct[model] / asked[model]
        for model in asked
        if model != base and asked[model] == asked[base]
    }
