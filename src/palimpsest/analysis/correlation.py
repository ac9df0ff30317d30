"""Over tuned models: does more shift of importance go with more loss of text accuracy?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from palimpsest.schema import CorrelationRecord

MEASURES = ("jensen_shannon", "wasserstein_1")
MIN_MODELS = 3
Row = Mapping[str, Any]


def correlation_records(
    shift: Sequence[Row], qa: Sequence[Row], *, metric: str, base: str = "base"
) -> list[CorrelationRecord]:
    """Kendall's τ_b between a model's shift from the base and its loss of text accuracy, exact two-sided p.

    shift, qa: tables of results.json. The loss is the base's accuracy from text minus the model's, pooled over tasks by
    number of questions. Models are methods, and seeds of methods where there are several: these are not independent of
    each other, so p is a guide. With `MIN_MODELS` models the smallest possible p is 1/3, with 5 models 1/60.
    """
    loss = _text_loss(qa, metric, base)
    by_measure: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in shift:
        if row["reference"] == base and row["measure"] in MEASURES and row["model"] in loss:
            by_measure[row["measure"], row["reduction"]][row["model"]] = row["value"]
    records: list[CorrelationRecord] = []
    for (measure, reduction), values in by_measure.items():
        models = sorted(values)
        tau: float | None = None
        p: float | None = None
        note = ""
        if len(models) < MIN_MODELS:
            note = f"needs at least {MIN_MODELS} tuned models with shift and text accuracy, there are {len(models)}"
        else:
            result = stats.kendalltau([values[m] for m in models], [loss[m] for m in models])
            if np.isfinite(result.statistic):
                tau, p = float(result.statistic), float(result.pvalue)
            else:
                note = "all models lost the same, or shifted the same"
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
