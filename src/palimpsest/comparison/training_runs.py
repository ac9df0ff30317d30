"""What several training runs of every method say together: tables of results.json.

`seeds`, `seed_comparisons` by task, `pooled_comparisons` over all tasks.

The runs of a method differ in the adaptor's first weights, LoRA's, the order of the examples and dropout; they share
the base, the data and what is measured on. Accuracies are clustered by question and by seed as in `palimpsest compare
--seeds`, everything else is combined by `over_runs` (both in intervals.py); docs/evaluation.md explains them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.comparison.families import corrected, family_of_pair, pairs_of
from palimpsest.comparison.pairs import exp, order, pair_record
from palimpsest.comparison.systems import Matrix, matrix
from palimpsest.evaluation.perplexity import read_losses
from palimpsest.evaluation.scoring import METRIC_VERSION, PRIMARY
from palimpsest.files import UserError
from palimpsest.intervals import accuracy_interval, loss_difference, mean_arms, over_runs, standard_deviation
from palimpsest.records import BASE, PairRecord, SeedRecord, method_of, run_name
from palimpsest.rundir import losses_of

Verdicts = Mapping[str, Mapping[str, bool]]  # run -> {question id: right?}
Rows = Sequence[Mapping[str, Any]]


def seed_records(
    run: Path,
    methods: Sequence[str],
    n_seeds: int,
    verdicts: Mapping[tuple[str, str], Verdicts],
    tables: Mapping[str, Rows],
) -> list[SeedRecord]:
    """One row per method and measure that every run of the method has.

    verdicts: by (task, modality). tables: `perplexity`, `deactivation` and `shift` of results.json, all runs in them.
    """
    records: list[SeedRecord] = []
    for method in methods:
        runs = runs_of(method, n_seeds)
        for (task, modality), by_run in verdicts.items():
            if all(name in by_run for name in runs):
                records.append(_accuracy(method, task, modality, matrix([by_run[name] for name in runs])))
        records += _perplexities(run, method, runs, tables["perplexity"])
        records += _deactivations(method, runs, tables["deactivation"])
    return records + _shifts(methods, n_seeds, tables["shift"])


def seed_comparisons(
    methods: Sequence[str],
    n_seeds: int,
    verdicts: Mapping[tuple[str, str], Verdicts],
    seed: int,
    same: Mapping[str, str] | None = None,
    points: Collection[str] = (),
) -> list[PairRecord]:
    """Every pair of the base and the methods, each method with all its runs.

    same: as `corrected` takes it; points: as `pairs_of` does.
    """
    rows: list[PairRecord] = []
    for a, b in pairs_of((BASE, *methods), points):
        runs_a, runs_b = runs_of(a, n_seeds), runs_of(b, n_seeds)
        for key in sorted(verdicts, key=order):
            if all(name in verdicts[key] for name in (*runs_a, *runs_b)):
                right = matrix([verdicts[key][name] for name in (*runs_a, *runs_b)])
                sides = (a, right[: len(runs_a)]), (b, right[len(runs_a) :])
                family = family_of_pair(a, b, key[1], points)
                rows.append(pair_record(*sides, key, PRIMARY, METRIC_VERSION, seed, family))
    return corrected(rows, same)


def pooled_comparisons(
    methods: Sequence[str],
    n_seeds: int,
    verdicts: Mapping[tuple[str, str], Verdicts],
    seed: int,
    same: Mapping[str, str] | None = None,
    points: Collection[str] = (),
) -> list[PairRecord]:
    """As `seed_comparisons`, over the questions of all tasks of a modality at once, where there are two tasks or more.

    The same training runs answer every task, so what a seed does to one it does to the others: intervals of the tasks
    must not be combined as independent ones. Pooled per run first, each run's luck is counted once.
    """
    rows: list[PairRecord] = []
    for a, b in pairs_of((BASE, *methods), points):
        runs_a, runs_b = runs_of(a, n_seeds), runs_of(b, n_seeds)
        of_modality: dict[str, list[str]] = defaultdict(list)
        for task, modality in sorted(verdicts, key=order):
            if all(name in verdicts[task, modality] for name in (*runs_a, *runs_b)):
                of_modality[modality].append(task)
        for modality, tasks in of_modality.items():
            if len(tasks) < 2:
                continue
            by_task = [matrix([verdicts[task, modality][name] for name in (*runs_a, *runs_b)]) for task in tasks]
            right = np.concatenate(by_task, axis=1)
            sides = (a, right[: len(runs_a)]), (b, right[len(runs_a) :])
            key, family = (", ".join(tasks), modality), family_of_pair(a, b, modality, points)
            rows.append(pair_record(*sides, key, PRIMARY, METRIC_VERSION, seed, family))
    return corrected(rows, same)


def runs_of(method: str, n_seeds: int) -> list[str]:
    """The training runs of a method; the base has none and stands for itself."""
    return [BASE] if method == BASE else [run_name(method, number) for number in range(n_seeds)]


# ------------------------------------------------------------------------------------------------------------
# One measure each
# ------------------------------------------------------------------------------------------------------------
def _accuracy(method: str, task: str, modality: str, right: Matrix) -> SeedRecord:
    """right: (runs, questions)."""
    interval = (float(right.mean()), *accuracy_interval(right))
    about = {"task": task, "n": right.shape[1], "basis": PRIMARY, "over": "seeds, questions"}
    return _record(method, "accuracy", modality, right.mean(axis=1).tolist(), interval, **about)


def _perplexities(run: Path, method: str, runs: Sequence[str], table: Rows) -> list[SeedRecord]:
    """Perplexity on the held-out answers, and its ratio to the base's where the base has one."""
    records = []
    for modality in dict.fromkeys(row["modality"] for row in table if row["method"] == method):
        rows = [row for row in table if row["modality"] == modality and row["method"] in (*runs, BASE)]
        about: dict[str, Any] = {"task": rows[0]["task"], "n": rows[0]["n_examples"], "over": "seeds, answers"}
        finite = all(_is_finite(row["loss"]) for row in rows)
        measures = [("perplexity", None), ("perplexity_ratio", BASE)]
        for measure, reference in measures if any(row["method"] == BASE for row in rows) else measures[:1]:
            logs, arms = None, (0.0, 0.0)
            if finite:
                losses, tokens = _losses(run, runs, modality)
                before = _losses(run, [reference], modality)[0][0] if reference else np.zeros_like(tokens)
                logs = ((losses - before).sum(axis=1) / tokens.sum()).tolist()
                effect = loss_difference(before, losses.mean(axis=0), tokens)
                arms = (effect.value - effect.low, effect.high - effect.value)
            records.append(_geometric(method, measure, modality, logs, arms, len(runs), reference=reference, **about))
    return records


def _deactivations(method: str, runs: Sequence[str], table: Rows) -> list[SeedRecord]:
    """Perplexity without some weights over that of the same run's whole model; random: median over the masks.

    Each scope by itself: a mask over all weights and one in each matrix do not do the same.
    """
    rows = [row for row in table if row["model"] in runs]
    scopes = list(dict.fromkeys(row.get("scope") for row in rows))
    records = []
    for scope in scopes:
        of_scope = [row for row in rows if row.get("scope") == scope]
        records += _without_weights(method, runs, of_scope, scope if len(scopes) > 1 else None)
    return records


def _without_weights(method: str, runs: Sequence[str], rows: Rows, scope: str | None) -> list[SeedRecord]:
    """rows: of the method's runs, in one scope, which the records name if it is given."""
    losses: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows:
        losses[row["modality"], row["condition"], row["model"]].append(math.nan if row["loss"] is None else row["loss"])
    records = []
    for modality, condition in dict.fromkeys((row["modality"], row["condition"]) for row in rows):
        if condition == "base" or any((modality, condition, name) not in losses for name in runs):
            continue
        ratios = [np.median(losses[modality, condition, name]) - losses[modality, "base", name][0] for name in runs]
        logs = [float(ratio) for ratio in ratios] if np.isfinite(ratios).all() else None
        about = {"task": "heldout", "n": rows[0]["n_examples"], "reference": method, "over": "seeds"}
        measure = f"perplexity_ratio_{condition}"
        records.append(_geometric(method, measure, modality, logs, (0.0, 0.0), len(runs), scope=scope, **about))
    return records


def _shifts(methods: Sequence[str], n_seeds: int, table: Rows) -> list[SeedRecord]:
    """Every measure of shift, differences from Full-FT run by run; over data too where each run has an interval."""
    groups: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in table:
        method, number = method_of(row["model"])
        key = (method, method_of(row["reference"])[0], row["measure"], row["modality"], row["reduction"])
        groups[key][number] = row
    records: list[SeedRecord] = []
    for (method, reference, measure, modality, reduction), by_number in groups.items():
        if method not in methods or any(number not in by_number for number in range(n_seeds)):
            continue
        rows = [by_number[number] for number in range(n_seeds)]
        values = [row["value"] for row in rows]
        lows, highs = ([row[end] for row in rows] for end in ("ci_low", "ci_high"))
        with_data = None not in (*lows, *highs)
        interval = None
        if all(_is_finite(value) for value in values):
            interval = over_runs(values, *(mean_arms(values, lows, highs) if with_data else ()))
        about: dict[str, Any] = {
            "reference": reference,
            "basis": reduction,
            "over": "seeds, batches" if with_data else "seeds",
        }
        records.append(_record(method, measure, modality, values, interval, **about))
    return records


def _geometric(
    method: str,
    measure: str,
    modality: str,
    logs: Sequence[float] | None,
    arms: tuple[float, float],
    n_seeds: int,
    **about: Any,
) -> SeedRecord:
    """Of perplexities or their ratios, from each run's logarithm; None: not finite in some run."""
    if logs is None:
        return _record(method, measure, modality, [None] * n_seeds, None, **about)
    mean, low, high = (exp(log) for log in over_runs(logs, *arms))
    return _record(method, measure, modality, [exp(log) for log in logs], (mean, low, high), **about)


def _record(
    method: str,
    measure: str,
    modality: str,
    values: Sequence[float | None],
    interval: tuple[float, float, float] | None,
    *,
    over: str,
    task: str | None = None,
    reference: str | None = None,
    basis: str | None = None,
    n: int | None = None,
    scope: str | None = None,
) -> SeedRecord:
    mean, low, high = interval or (None, None, None)
    record: SeedRecord = {
        "method": method,
        "reference": reference,
        "measure": measure,
        "task": task,
        "modality": modality,
        "basis": basis,
        "n_seeds": len(values),
        "n": n,
        "values": list(values),
        "mean": mean,
        "std": None if interval is None else standard_deviation([v for v in values if v is not None]),
        "ci_low": low,
        "ci_high": high,
        "ci_over": over,
    }
    return record if scope is None else {**record, "scope": scope}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------------
# Runs side by side
# ------------------------------------------------------------------------------------------------------------
def _losses(run: Path, runs: Sequence[str], modality: str) -> tuple[Matrix, Matrix]:
    """((runs, answers) summed losses in nats, (answers,) tokens), answers by sorted id."""
    every = [read_losses(losses_of(run, name, modality))[1].samples for name in runs]
    ids = sorted(every[0])
    if any(samples.keys() != every[0].keys() for samples in every):
        raise UserError("The training runs of a method were not measured on the same answers; run the study again.")
    return (
        np.array([[samples[i].loss for i in ids] for samples in every], dtype=np.float64),
        np.array([every[0][i].n_tokens for i in ids], dtype=np.float64),
    )
