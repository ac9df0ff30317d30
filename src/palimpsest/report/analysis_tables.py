"""Tables of where and how the weights differ, and of the run itself: functions from lists of records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from palimpsest.records import ClusteringRecord, DeltaRecord, LayerRecord, ProbeRecord, ShiftRecord, TimingRecord
from palimpsest.report.inputs import method_key, method_name
from palimpsest.report.table import (
    EMPTY,
    Cell,
    Column,
    Table,
    count,
    interval,
    number,
    percent,
    seconds,
    significant,
    text,
)


def probe(records: Sequence[ProbeRecord]) -> Table:
    """The retention probe: one row per kind of pairs, a column per model."""
    models = sorted({row["model"] for row in records}, key=method_key)
    cells = {(row["kind"], row["model"]): row for row in records}
    columns = [Column("Pairs"), Column("n", numeric=True)]
    for model in models:
        columns += [
            Column(f"{method_name(model)} %", numeric=True),
            Column(f"{method_name(model)}, margin", numeric=True),
        ]
    rows: list[tuple[Cell, ...]] = []
    for kind, n in dict.fromkeys((row["kind"], row["n"]) for row in records):
        line = [text(kind), count(n)]
        for model in models:
            row = cells.get((kind, model))
            if row is None:
                line += [EMPTY, EMPTY]
            else:
                share = Cell(percent(row["accuracy"]), interval(row["ci_low"], row["ci_high"]), row["accuracy"])
                line += [share, number(row["margin"])]
        rows.append(tuple(line))
    return Table(
        "probe",
        "Retention probe: right against wrong continuations, without generation",
        tuple(columns),
        tuple(rows),
        "Share of pairs whose right continuation has the lower loss, 95 % Wilson interval; chance is 50 %. Margin: "
        "mean of the wrong continuation's loss minus the right one's, nats per token.",
    )


def layers(records: Sequence[LayerRecord], modality: str, reduction: str) -> Table:
    """Importance by layer: share of the model's total, and the total."""
    rows_of = [
        row for row in records if (row["modality"], row["reduction"], row["kind"]) == (modality, reduction, "all")
    ]
    models = sorted({row["model"] for row in rows_of}, key=method_key)
    cells = {(row["layer"], row["model"]): row for row in rows_of}
    columns = [Column("Layer", numeric=True)]
    for model in models:
        columns += [
            Column(f"{method_name(model)}, %", numeric=True),
            Column(f"{method_name(model)}, sum", numeric=True),
        ]
    rows: list[tuple[Cell, ...]] = []
    for layer in sorted({row["layer"] for row in rows_of}):
        line = [count(layer)]
        for model in models:
            row = cells.get((layer, model))
            line += (
                [EMPTY, EMPTY]
                if row is None
                else [number(row["share"], percent(row["share"], 2)), number(row["total"])]
            )
        rows.append(tuple(line))
    return Table(
        f"layers_{modality}",
        f"Importance by layer, {modality} input",
        tuple(columns),
        tuple(rows),
        f"Reduction {reduction}. %: share of the model's total. Sum: over the layer's scored weights.",
    )


def shift(records: Sequence[ShiftRecord]) -> Table:
    """How far each model's layer-wise importance lies from its reference, beside the noise of the measure."""
    columns = (
        Column("Model"),
        Column("Reference"),
        Column("Input"),
        Column("Scores"),
        Column("Measure"),
        Column("Value", numeric=True),
        Column("Noise floor", numeric=True),
    )
    rows = tuple(
        (
            text(method_name(row["model"])),
            text(method_name(row["reference"])),
            text(row["modality"]),
            text(row["reduction"]),
            text(row["measure"]),
            number(row["value"], detail=interval(row["ci_low"], row["ci_high"], "significant")),
            number(row["noise_floor"]),
        )
        for row in records
    )
    return Table(
        "shift",
        "Shift of the layer-wise importance",
        columns,
        rows,
        "Noise floor: the same measure between the reference and itself scored on other data. Brackets: 95 % interval.",
    )


def clustering(records: Sequence[ClusteringRecord]) -> Table:
    """Concentration on rows and columns, summarised over the layers of each module kind."""
    columns = (
        Column("Of"),
        Column("Model"),
        Column("Kind"),
        Column("Measure"),
        *(Column(name, numeric=True) for name in ("Matrices", "Value", "Shuffled", "z", "z > 3, %")),
    )
    groups: dict[tuple[str, str, str, str], list[ClusteringRecord]] = defaultdict(list)
    for record in records:
        groups[record["of"], record["model"], record["kind"], record["measure"]].append(record)
    rows: list[tuple[Cell, ...]] = []
    for of, model, kind, measure in sorted(groups, key=lambda key: (key[0] != "importance", method_key(key[1]), key)):
        group = groups[of, model, kind, measure]
        z = _finite(row["z"] for row in group)
        clear = sum(value > 3 for value in z) / len(z) if z else None
        rows.append(
            (
                text(of),
                text(method_name(model)),
                text(kind),
                text(measure),
                count(len(group)),
                _median(row["value"] for row in group),
                _median(row["null_mean"] for row in group),
                _median(z),
                number(clear, percent(clear, 0)),
            )
        )
    return Table(
        "clustering",
        "Rank clustering: concentration on rows and columns",
        columns,
        tuple(rows),
        "Medians over the matrices of a kind. Shuffled: what the same entries give in random places; "
        "z: distance from that in its standard deviations.",
    )


def delta(records: Sequence[DeltaRecord]) -> Table:
    """How much each method changed the weights, and how often the largest changes hit important weights."""
    columns = (
        Column("Method"),
        Column("Kind"),
        *(
            Column(name, numeric=True)
            for name in (
                *("Matrices", "Relative change", "Overlap with importance %", "Overlap by chance %"),
                *("Effective rank", "Energy in 8 directions, %"),
            )
        ),
    )
    groups: dict[tuple[str, str], list[DeltaRecord]] = defaultdict(list)
    for record in records:
        groups[record["method"], record["kind"]].append(record)
    rows: list[tuple[Cell, ...]] = []
    for method, kind in sorted(groups, key=lambda key: (method_key(key[0]), key[1])):
        group = groups[method, kind]
        change = _finite(row["relative_norm"] for row in group)
        overlap = _finite(row["overlap_with_importance"] for row in group)
        chance = _finite(row["overlap_by_chance"] for row in group)
        energy = _finite(row.get("energy_top8") for row in group)
        detail = interval(min(change), max(change), "significant") if change else ""
        rows.append(
            (
                text(method_name(method)),
                text(kind),
                count(len(group)),
                Cell(significant(median(change)), detail, median(change)) if change else EMPTY,
                *(number(fmean(part), percent(fmean(part))) if part else EMPTY for part in (overlap, chance)),
                _median(row.get("effective_rank") for row in group),
                number(fmean(energy), percent(fmean(energy))) if energy else EMPTY,
            )
        )
    return Table(
        "delta",
        "Parameter change by method",
        columns,
        tuple(rows),
        "Relative change: Frobenius norm of the change over that of the base weights, median and range over "
        "the matrices. Overlap: share of the largest changes that hit the base model's most important "
        "weights, mean. Effective rank: participation ratio of the squared singular values, median.",
    )


def timings(records: Sequence[TimingRecord]) -> Table:
    columns = (Column("Step"), Column("Time", numeric=True), Column("Peak memory, GB", numeric=True))
    rows = tuple(
        (
            text(row["step"]),
            number(row["seconds"], seconds(row["seconds"])),
            number(row["peak_rss_bytes"], f"{row['peak_rss_bytes'] / 1e9:.2f}"),
        )
        for row in records
    )
    total = sum(row["seconds"] for row in records)
    return Table(
        "timings",
        "Time and memory of each step",
        columns,
        rows,
        f"{seconds(total)} in all. Peak memory: largest resident size of the process so far.",
    )


def _finite(values: Iterable[float | None]) -> list[float]:
    """Without the nulls that stand for non-finite numbers."""
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> Cell:
    finite = _finite(values)
    return number(median(finite)) if finite else EMPTY
