"""Several training runs of every method: their tables, and the view of a run directory that shows methods, not runs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, cast

from palimpsest.records import PairRecord, Results, SeedRecord, method_of
from palimpsest.report.inputs import Inputs, main_metric, method_key, method_name, modality_key, task_name
from palimpsest.report.table import (
    EMPTY,
    NOT_FINITE,
    Cell,
    Column,
    Table,
    count,
    interval,
    number,
    p_value,
    percent,
    points,
    significant,
    text,
)

MEASURES = {
    "accuracy": "Accuracy %",
    "perplexity": "Perplexity",
    "perplexity_ratio": "Perplexity over the base's",
    "perplexity_ratio_top": "Perplexity without the top weights, times the whole's",
    "perplexity_ratio_bottom": "Perplexity without the bottom weights, times the whole's",
    "perplexity_ratio_random": "Perplexity without random weights, times the whole's",
}


# ----------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------
def seeds(records: Sequence[SeedRecord]) -> Table:
    """Mean, standard deviation and interval of every measure over the training runs of each method."""
    columns = (
        Column("Measure"),
        Column("Task"),
        Column("Input"),
        Column("Method"),
        Column("Runs", numeric=True),
        Column("Mean", numeric=True),
        Column("Deviation", numeric=True),
        Column("Each run", prose=True),
        Column("Interval over"),
    )
    order = list(dict.fromkeys([*MEASURES, *(row["measure"] for row in records)]))
    key = lambda row: (  # noqa: E731
        order.index(row["measure"]), row["basis"] or "", row["task"] or "", modality_key(row["modality"]),
        method_key(row["method"]),
    )  # fmt: skip
    rows = tuple(
        (
            text(_measure(row)),
            text(task_name(row["task"]) if row["task"] else ""),
            text(row["modality"]),
            text(method_name(row["method"])),
            count(row["n_seeds"]),
            _mean(row),
            EMPTY if row["std"] is None else number(row["std"], _written(row, row["std"])),
            text(", ".join(NOT_FINITE if value is None else _written(row, value) for value in row["values"])),
            text(row["ci_over"]),
        )
        for row in sorted(records, key=key)
    )
    return Table(
        "seeds",
        "Several training runs of each method: mean and spread",
        columns,
        rows,
        "The runs of a method differ in their seeds: first weights of the adaptor and of LoRA, order of the examples, "
        "dropout. Brackets: 95 % interval of the mean, over what the last column names. Deviation: standard deviation "
        "of the runs. Means of perplexities and of their ratios are geometric.",
    )


def comparisons(records: Sequence[PairRecord]) -> Table:
    """Two methods on the same questions, each the mean over its runs."""
    columns = (
        Column("Task"),
        Column("Input"),
        Column("A"),
        Column("B"),
        *(Column(name, numeric=True) for name in ("n", "Runs of A", "Runs of B", "B − A, points", "p", "p, Holm")),
        Column("B is"),
    )
    rows = tuple(
        (
            text(task_name(row["task"])),
            text(row["modality"]),
            text(method_name(row["method_a"])),
            text(method_name(row["method_b"])),
            count(row["n"]),
            count(row["seeds_a"]),
            count(row["seeds_b"]),
            number(row["difference"], points(row["difference"]), interval(row["ci_low"], row["ci_high"], "points")),
            number(row["p_value"], p_value(row["p_value"])),
            number(row["p_holm"], p_value(row["p_holm"])),
            text(row["verdict"]),
        )
        for row in records
    )
    return Table(
        "seed_comparisons",
        "Paired comparisons of the methods' means over their runs",
        columns,
        rows,
        "Clustered by question and by seed; Holm: corrected for all rows of this table. Brackets: 95 % interval.",
    )


def _measure(row: SeedRecord) -> str:
    name = MEASURES.get(row["measure"], row["measure"])
    if row["measure"] in MEASURES:
        return name
    reference = "" if row["reference"] is None else f" from {method_name(row['reference'])}"
    return f"{name}{reference}, {row['basis']}"


def _written(row: SeedRecord, value: float) -> str:
    return percent(value) if row["measure"] == "accuracy" else significant(value)


def _mean(row: SeedRecord) -> Cell:
    if row["mean"] is None:  # null in results.json: some run's is not finite
        return Cell(NOT_FINITE, sort=float("inf"))
    style = () if row["measure"] == "accuracy" else ("significant",)
    return number(row["mean"], _written(row, row["mean"]), interval(row["ci_low"], row["ci_high"], *style))


# ----------------------------------------------------------------------------------------------------------
# Methods instead of runs
# ----------------------------------------------------------------------------------------------------------
def n_runs(results: Results) -> int:
    """Training runs of every method."""
    return max((row["n_seeds"] for row in results["seeds"]), default=1)


def by_method(inputs: Inputs) -> Inputs:
    """What summary, figures and main tables show where there are several runs: one entry per method.

    Accuracies by the main scoring rule and layers are means over the runs, comparisons those of the means; records of
    deactivation, clustering and change of all runs stand under their method; of everything else (and of the accuracies
    by other rules) the first run stays. With one run of each method nothing changes.
    """
    results = inputs.results
    if n_runs(results) == 1:
        return inputs
    shown: dict[str, Any] = dict(results)
    shown["qa"] = _mean_accuracies(results)
    shown["comparisons"] = [{**row, "only_a": 0, "only_b": 0} for row in results["seed_comparisons"]]
    shown["layers"] = _mean_layers(results)
    for table, field in (("deactivation", "model"), ("clustering", "model"), ("delta", "method")):
        rows: Sequence[Mapping[str, Any]] = shown[table]
        shown[table] = [{**row, field: method_of(row[field])[0]} for row in rows]
    for table in ("qa_floors", "perplexity", "probe", "shift", "clustering_summary", "mask_overlap", "training"):
        shown[table] = [row for row in shown[table] if _is_first(row)]
    samples = {key: rows for key, rows in inputs.samples.items() if method_of(key[0])[1] == 0}
    return dataclasses.replace(inputs, results=cast(Results, shown), samples=samples)


def _is_first(row: Mapping[str, Any]) -> bool:
    return method_of(str(row.get("method", row.get("model"))))[1] == 0


def _mean_accuracies(results: Results) -> list[Any]:
    metric = main_metric(results)
    means = {(r["method"], r["task"], r["modality"]): r for r in results["seeds"] if r["measure"] == "accuracy"}
    rows: list[Any] = []
    for row in results["qa"]:
        mean = means.get((row["method"], row["task"], row["modality"]))
        if not _is_first(row):
            continue
        if mean is not None and row["metric"] == metric == mean["basis"]:
            rows.append({**row, "accuracy": mean["mean"], "ci_low": mean["ci_low"], "ci_high": mean["ci_high"]})
        else:
            rows.append(row)
    return rows


def _mean_layers(results: Results) -> list[Any]:
    groups: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for row in results["layers"]:
        method = method_of(row["model"])[0]
        groups[method, row["modality"], row["reduction"], row["layer"], row["kind"]].append(row)
    fields = ("total", "mean", "share")
    return [
        {**rows[0], "model": method, **{field: fmean(row[field] for row in rows) for field in fields}}
        for (method, *_), rows in groups.items()
    ]
