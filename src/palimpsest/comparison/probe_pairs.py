"""The retention probe of the base against that of each method, pair by pair: table `probe_comparisons` of results.json.

Both are measured on the same pairs, so the test is paired; two accuracies side by side would hide what changed. Beside
it stand the margin and the loss of the right continuations alone: an easy pair stays right long after the text has
become less likely, and only this loss shows that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.comparison.families import corrected, of_points
from palimpsest.comparison.training_runs import runs_of
from palimpsest.files import UserError, read_jsonl
from palimpsest.intervals import clustered_difference, compare_accuracies
from palimpsest.records import BASE, ProbeComparisonRecord
from palimpsest.rundir import folder_of

ALL = "all"  # evaluation.probe.ALL: over all kinds


def probe_comparisons(
    run: Path,
    methods: Sequence[str],
    measured: Mapping[str, int],
    seed: int,
    same: Mapping[str, str] | None = None,
    points: Collection[str] = (),
) -> list[ProbeComparisonRecord]:
    """One row per method and kind of pairs; the rows of all pairs are a family, those of single kinds another.

    measured: of each method, how many of its training runs were probed. seed: of the bootstrap. same: as `corrected`
    takes it. points: of curves, families of their own.

    Raises UserError where the base and a method were probed with other pairs.
    """
    base = _read(run, BASE)
    kinds = {name: row["kind"] for name, row in base.items()}
    rows: list[ProbeComparisonRecord] = []
    for method in methods:
        runs = [_read(run, name) for name in runs_of(method, measured[method])]
        if any(of.keys() != base.keys() for of in runs):
            raise UserError(f"{method} and the base were probed with other pairs; give the study's command again.")
        for kind in (ALL, *dict.fromkeys(kinds.values())):
            ids = [name for name in base if kind in (ALL, kinds[name])]
            rows.append(_row(method, kind, [base], runs, ids, seed))
    for row in rows:
        row["family"] = of_points(row["family"], row["method"] in points)
    return corrected(rows, same)


def _read(run: Path, name: str) -> dict[str, Any]:
    return {row["id"]: row for row in read_jsonl(run / folder_of(name) / "probe" / "pairs.jsonl")}


def _row(
    method: str,
    kind: str,
    base: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    ids: Sequence[str],
    seed: int,
) -> ProbeComparisonRecord:
    def values(of: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
        return np.array([[one[name][key] for name in ids] for one in of], dtype=np.float64)

    right = values(base, "correct"), values(runs, "correct")
    found = compare_accuracies(*right, seed)
    loss_base, loss_runs = values(base, "right"), values(runs, "right")
    margin = clustered_difference(values(base, "wrong") - loss_base, values(runs, "wrong") - loss_runs)
    loss = clustered_difference(loss_base, loss_runs)
    return {
        "method": method,
        "kind": kind,
        "n": len(ids),
        "n_seeds": len(runs),
        "accuracy_base": float(right[0].mean()),
        "accuracy": float(right[1].mean()),
        "only_base": found.only_a,
        "only_method": found.only_b,
        "difference": found.difference,
        "ci_low": found.low,
        "ci_high": found.high,
        "p_value": found.p_value,
        "p_holm": found.p_value,
        "family": "probe, all pairs" if kind == ALL else "probe, single kinds",
        "n_family": 1,
        "left_out": None,
        "margin_difference": margin.value,
        "margin_ci_low": margin.low,
        "margin_ci_high": margin.high,
        "loss_right_difference": loss.value,
        "loss_right_ci_low": loss.low,
        "loss_right_ci_high": loss.high,
    }
