"""Tables of how importance and change are arranged inside the matrices, and what goes with it."""

from __future__ import annotations

from collections.abc import Sequence

from palimpsest.records import ClusteringSummaryRecord, CorrelationRecord, MaskOverlapRecord
from palimpsest.report.inputs import method_key, method_name
from palimpsest.report.table import Cell, Column, Table, count, interval, number, p_value, percent, text

OF = {"importance": "importance", "mask": "top mask", "delta": "change"}
ORDER = ("importance", "mask", "delta")


def clustering_summary(records: Sequence[ClusteringSummaryRecord]) -> Table:
    """One row per model and what was measured: typical ratios of the measures to their shuffled null."""
    rows_of = [row for row in records if row["kind"] == "all"]
    measures = list(dict.fromkeys(row["measure"] for row in rows_of if row["ratio"] is not None))
    cells = {(row["of"], row["model"], row["measure"]): row for row in rows_of}
    lines = sorted(
        {(row["of"], row["model"]) for row in rows_of},
        key=lambda key: (ORDER.index(key[0]) if key[0] in ORDER else len(ORDER), key[0], method_key(key[1])),
    )
    rows: list[tuple[Cell, ...]] = []
    for of, model in lines:
        line = [text(_of(of)), text(method_name(model))]
        for measure in measures:
            row = cells.get((of, model, measure))
            detail = "" if row is None else interval(row["ci_low"], row["ci_high"], "significant")
            line.append(number(row["ratio"] if row else None, detail=detail))
        rows.append(tuple(line))
    return Table(
        "clustering_summary",
        "Rank clustering of whole models: measure over its value for shuffled entries",
        (Column("Of"), Column("Model"), *(Column(measure, numeric=True) for measure in measures)),
        tuple(rows),
        "Geometric mean over the matrices, 95 % interval over the matrices. 1: no clustering; above 1 for shares and "
        "Gini, below 1 for the effective rank: clustered. Change of rank r: the change cut to its r largest singular "
        "directions, over random directions.",
    )


def _of(of: str) -> str:
    rank = of.removeprefix("delta_rank")
    return f"change of rank {rank}" if rank != of else OF.get(of, of)


def mask_overlap(records: Sequence[MaskOverlapRecord]) -> Table:
    """One row per model and module kind would be long; over all matrices, with what other data alone change."""
    rows = [
        (
            text(method_name(row["model"])),
            text(method_name(row["reference"])),
            number(row["ratio"], percent(row["ratio"], 0)),
            number(row["overlap"], percent(row["overlap"]), interval(row["ci_low"], row["ci_high"])),
            number(row["noise_floor"], percent(row["noise_floor"])),
            number(row["overlap_by_chance"], percent(row["overlap_by_chance"])),
        )
        for row in sorted(records, key=lambda row: method_key(row["model"]))
        if row["kind"] == "all"
    ]
    columns = ("Weights, %", "Shared, %", "Same model, other data, %", "By chance, %")
    return Table(
        "mask_overlap",
        "Most important weights that stay the most important ones",
        (Column("Model"), Column("Reference"), *(Column(name, numeric=True) for name in columns)),
        tuple(rows),
        "Mean over the matrices of the share of a model's top weights that are the reference's too; 95 % interval over "
        "the matrices.",
    )


def correlations(records: Sequence[CorrelationRecord]) -> Table:
    """Shift of importance against loss of text accuracy, over the tuned models."""
    rows = [
        (
            text(row["measure"]),
            text(row["reduction"]),
            count(row["n_models"]),
            number(row["kendall_tau"]),
            number(row["p_value"], p_value(row["p_value"])),
            text(row["note"]),
        )
        for row in records
    ]
    columns = (
        Column("Shift"),
        Column("Scores"),
        Column("Models", numeric=True),
        Column("Kendall τ", numeric=True),
        Column("p", numeric=True),
        Column("Note"),
    )
    return Table(
        "correlations",
        "Does more shift go with more loss of text accuracy?",
        columns,
        tuple(rows),
        "Over the tuned models; exact two-sided p. Three models cannot give a p below 0.33.",
    )
