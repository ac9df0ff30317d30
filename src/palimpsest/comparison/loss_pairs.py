"""Losses of methods that were trained several times, method against method: `seed_losses` of results.json.

What `seed_comparisons` says of accuracies, of the measures in nats per token that the frontier has: drift, general text
and the held-out answers to spoken questions. Units are the same for all models, and run i of one method has the seeds
of run i of another, the order of the same examples among them, so both are paired: `loss_difference_over_runs` in
intervals.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from palimpsest.comparison.families import ALIKE, corrected, of_points, pairs_of
from palimpsest.comparison.frontier import DRIFT, GENERAL_TEXT, SPEECH_LOSS, Measure
from palimpsest.intervals import loss_difference, loss_difference_over_runs
from palimpsest.records import BASE, SeedLossRecord

LOSSES = {DRIFT: "drift", GENERAL_TEXT: "general text", SPEECH_LOSS: "speech loss"}


def seed_losses(
    measures: Sequence[Measure],
    methods: Sequence[str],
    same: Mapping[str, str] | None = None,
    points: Collection[str] = (),
) -> list[SeedLossRecord]:
    """Every pair of the base and the methods, a family for each measure. same, points: as `corrected`, `pairs_of`.

    Drift is a distance to the base, never below 0, so in it methods that can differ from the base are compared with
    each other alone.
    """
    same = same or {}
    records: list[SeedLossRecord] = []
    for measure in (measure for measure in measures if measure.name in LOSSES):
        pairs = list(pairs_of((BASE, *methods), points))
        if measure.name == DRIFT:
            pairs = [(a, b) for a, b in pairs if BASE not in (same.get(a, a), same.get(b, b))]
        rows = [row for a, b in pairs if (row := loss_pair(measure, a, b, points)) is not None]
        records += corrected(rows, None if measure.name == SPEECH_LOSS else same, better=-1)
    return records


def loss_pair(
    measure: Measure, a: str, b: str, points: Collection[str] = (), *, of_one_run: bool = False
) -> SeedLossRecord | None:
    """b against a; None where one was not measured, or both in one training run alone. No correction yet.

    of_one_run: these too, by `loss_difference`, over units alone.
    """
    runs = {method: sorted(measure.totals.get(method, {})) for method in (a, b)}
    both = [number for number in runs[a] if number in runs[b]]
    first, second = (
        np.array([measure.totals[method][number] for number in (runs[method] if BASE in (a, b) else both)])
        for method in (a, b)
    )
    single = len(first) == len(second) == 1
    if not len(first) or not len(second) or (single and not of_one_run):
        return None
    if single:
        effect = loss_difference(first[0], second[0], measure.counts)
    else:
        effect = loss_difference_over_runs(first, second, measure.counts)
    tokens = measure.counts.sum()
    against = "the base" if BASE in (a, b) else "each other"
    return {
        "measure": measure.name,
        "method_a": a,
        "method_b": b,
        "n": len(measure.units),
        "seeds_a": len(first),
        "seeds_b": len(second),
        "loss_a": float(first.sum() / len(first) / tokens),
        "loss_b": float(second.sum() / len(second) / tokens),
        "difference": effect.value,
        "values": ((second - first).sum(axis=1) / tokens).tolist(),
        "ci_low": effect.low,
        "ci_high": effect.high,
        "p_value": effect.p_value,
        "p_holm": effect.p_value,
        "verdict": ALIKE,
        "family": of_points(f"{LOSSES[measure.name]} over runs, against {against}", a in points or b in points),
    }
