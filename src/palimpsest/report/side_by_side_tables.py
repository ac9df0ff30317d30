"""Tables of several runs: a column per run, and the differences between runs that answered the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from palimpsest.records import ClaimRecord, LossPairRecord, PairRecord
from palimpsest.report.inputs import (
    MODALITY_NAMES,
    Inputs,
    flat,
    main_reduction,
    method_key,
    method_name,
    modality_key,
    task_name,
)
from palimpsest.report.table import (
    DASH,
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
from palimpsest.report.tables import VERDICTS

MAX_VALUE = 120  # characters of one value of a configuration or provenance
UNCOMMON = ("steps.", "started", "finished", "seconds")  # provenance that differs between any two runs


@dataclass(frozen=True)
class Run:
    label: str
    inputs: Inputs


Key = tuple[Any, ...]
Cells = Mapping[Key, Cell]  # the cells of one run by what identifies a row


def tables_of(runs: Sequence[Run], paired: Mapping[str, Any]) -> list[Table]:
    """Every table of the page, also those without a row."""
    metric = paired["metric"]
    return [
        _claims(runs),
        _side_by_side(
            runs,
            "accuracy",
            "Accuracy by run",
            ("Task", "Input", "Method"),
            lambda run: _accuracies(run, metric),
            f"Percent of the questions, scoring rule {metric}; in brackets the 95 % Wilson interval, the questions, "
            "the version of the rule. Other versions are other measurements.",
        ),
        _pairs(paired["accuracy"]),
        _loss_pairs(paired["perplexity"]),
        _side_by_side(
            runs,
            "perplexity",
            "Perplexity of the held-out answers by run",
            ("Method", "Input"),
            _perplexities,
            "In brackets the number of tokens; other numbers of tokens are other answers or another tokenizer.",
        ),
        _side_by_side(
            runs,
            "shift",
            "Shift of the text importance over the layers by run (Jensen–Shannon divergence, bits)",
            ("Method",),
            _shifts,
            "From the base of the same run; in brackets the 95 % interval, and what two halves of the data differ by.",
        ),
        _side_by_side(
            runs,
            "deactivation",
            "Perplexity with weights set to zero, by run",
            ("Model", "Input", "Removed", "Removed %", "Scope"),
            _deactivations,
            "Random: mean over seeds. In brackets the number of tokens and the scores that chose the weights.",
        ),
        _side_by_side(runs, "differences", "What the recipes differ in", ("Key",), _config, "", _differs),
        _side_by_side(
            runs, "provenance", "Versions, hardware, models, data of each run", ("Key",), _provenance, "", _always
        ),
    ]


# ----------------------------------------------------------------------------------------------------------
# Tables with a column per run
# ----------------------------------------------------------------------------------------------------------
def _always(cells: Sequence[Cell]) -> bool:
    return True


def _differs(cells: Sequence[Cell]) -> bool:
    return len({cell.text for cell in cells}) > 1


def _side_by_side(
    runs: Sequence[Run],
    name: str,
    title: str,
    heads: Sequence[str],
    of: Callable[[Inputs], Cells],
    note: str,
    keep: Callable[[Sequence[Cell]], bool] = _always,
) -> Table:
    """A row per key that any run has, in the order of the first run that has it; a dash where a run has none."""
    columns = [of(run.inputs) for run in runs]
    lines = [(key, [cells.get(key, EMPTY) for cells in columns]) for key in _merged([list(cells) for cells in columns])]
    prose = name in ("differences", "provenance")
    return Table(
        name,
        title,
        (
            *(Column(head) for head in heads),
            *(Column(run.label, numeric=not prose, prose=prose) for run in runs),
        ),
        tuple((*(text(str(part)) for part in key), *cells) for key, cells in lines if keep(cells)),
        note,
    )


def _merged(orders: Sequence[Sequence[Key]]) -> list[Key]:
    """Every key once: those of the first run in its order, keys of later runs after the one they follow there."""
    merged = list(orders[0])
    for order in orders[1:]:
        place = 0
        for key in order:
            if key in merged:
                place = merged.index(key) + 1
            else:
                merged.insert(place, key)
                place += 1
    return merged


def _accuracies(inputs: Inputs, metric: str) -> Cells:
    rows = [row for row in inputs.results["qa"] if row["metric"] == metric]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    rows.sort(key=lambda row: (tasks.index(row["task"]), modality_key(row["modality"]), method_key(row["method"])))
    return {
        (
            task_name(row["task"]),
            MODALITY_NAMES.get(row["modality"], row["modality"]),
            method_name(row["method"]),
        ): Cell(
            percent(row["accuracy"]),
            f"{interval(row['ci_low'], row['ci_high'])}; n {row['n']}; version {row['metric_version']}",
            row["accuracy"],
        )
        for row in rows
    }


def _perplexities(inputs: Inputs) -> Cells:
    rows = sorted(
        inputs.results["perplexity"], key=lambda row: (method_key(row["method"]), modality_key(row["modality"]))
    )
    return {
        (method_name(row["method"]), row["modality"]): _perplexity([row["perplexity"]], f"{row['n_tokens']} tokens")
        for row in rows
    }


def _perplexity(values: Sequence[float | None], detail: str) -> Cell:
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return Cell(NOT_FINITE, detail, float("inf"))
    return number(fmean(finite), detail=detail)


def _shifts(inputs: Inputs) -> Cells:
    wanted = ("base", "text", main_reduction(inputs.results), "jensen_shannon")
    cells: dict[Key, Cell] = {}
    for row in sorted(inputs.results["shift"], key=lambda row: method_key(row["model"])):
        if (row["reference"], row["modality"], row["reduction"], row["measure"]) == wanted:
            parts = [interval(row["ci_low"], row["ci_high"], "significant")]
            parts += [f"noise {significant(row['noise_floor'])}" if row["noise_floor"] is not None else ""]
            cells[(method_name(row["model"]),)] = number(row["value"], detail="; ".join(filter(None, parts)))
    return cells


def _deactivations(inputs: Inputs) -> Cells:
    groups: dict[Key, list[Any]] = {}
    order = lambda row: (method_key(row["model"]), modality_key(row["modality"]), row["ratio"])  # noqa: E731
    for row in sorted(inputs.results["deactivation"], key=order):
        scope = DASH if row["condition"] == "base" else row["scope"]
        removed = {"base": "nothing"}.get(row["condition"], row["condition"])
        key = (method_name(row["model"]), row["modality"], removed, f"{100 * row['ratio']:g}", scope)
        groups.setdefault(key, []).append(row)
    return {
        key: _perplexity(
            [row["perplexity"] for row in rows],
            f"{rows[0]['n_tokens']} tokens" + (f"; {rows[0]['reduction']}" if key[2] != "nothing" else ""),
        )
        for key, rows in groups.items()
    }


def _config(inputs: Inputs) -> Cells:
    return {(key,): text(value) for key, value in flat(inputs.config, MAX_VALUE)}


def _provenance(inputs: Inputs) -> Cells:
    return {(key,): text(value) for key, value in flat(inputs.provenance, MAX_VALUE) if not key.startswith(UNCOMMON)}


def _verdict(row: ClaimRecord) -> Cell:
    value = "" if row["value"] is None else significant(row["value"])
    spread = interval(row["ci_low"], row["ci_high"], "significant")
    written = VERDICTS.get(row["verdict"], row["verdict"])
    return Cell(written, "; ".join(filter(None, (value, spread))), written)


def _claims(runs: Sequence[Run]) -> Table:
    """A row per claim: its statement and each run's verdict with the value it rests on."""
    statements: dict[int, str] = {}
    for run in runs:
        for row in run.inputs.results["claims"]:
            statements.setdefault(row["claim"], row["statement"])
    verdicts = [{row["claim"]: row for row in run.inputs.results["claims"]} for run in runs]
    rows = []
    for claim, statement in sorted(statements.items()):
        cells = [_verdict(of[claim]) if claim in of else EMPTY for of in verdicts]
        rows.append((count(claim), text(statement), *cells))
    return Table(
        "claims",
        "The paper's claims: verdict by run",
        (Column("Claim", numeric=True), Column("Statement", prose=True), *(Column(run.label) for run in runs)),
        tuple(rows),
        "In brackets the value the verdict rests on and its 95 % interval; each run's own report names the measure.",
    )


# ----------------------------------------------------------------------------------------------------------
# Differences
# ----------------------------------------------------------------------------------------------------------
def _pairs(records: Sequence[PairRecord]) -> Table:
    columns = (
        *(Column(name) for name in ("Task", "Input", "A", "B")),
        *(Column(name, numeric=True) for name in ("n", "A %", "B %", "B − A, points", "p", "p, Holm")),
        Column("Verdict on B"),
    )
    rows = tuple(
        (
            text(task_name(row["task"])),
            text(row["modality"]),
            text(row["method_a"]),
            text(row["method_b"]),
            count(row["n"]),
            number(row["accuracy_a"], percent(row["accuracy_a"])),
            number(row["accuracy_b"], percent(row["accuracy_b"])),
            number(row["difference"], points(row["difference"]), interval(row["ci_low"], row["ci_high"], "points")),
            number(row["p_value"], p_value(row["p_value"])),
            number(row["p_holm"], p_value(row["p_holm"])),
            text(row["verdict"]),
        )
        for row in records
    )
    return Table(
        "pairs",
        "The same method in two runs, on the same questions",
        columns,
        rows,
        "Brackets: 95 % interval, paired bootstrap. p: exact McNemar test; Holm: corrected for all rows of this table.",
    )


def _loss_pairs(records: Sequence[LossPairRecord]) -> Table:
    columns = (
        *(Column(name) for name in ("Data", "Input", "A", "B")),
        *(Column(name, numeric=True) for name in ("n", "Loss A", "Loss B", "B − A", "p", "p, Holm")),
        Column("Verdict on B"),
    )
    rows = tuple(
        (
            text(task_name(row["task"])),
            text(row["modality"]),
            text(row["method_a"]),
            text(row["method_b"]),
            count(row["n"]),
            number(row["loss_a"], f"{row['loss_a']:.4f}"),
            number(row["loss_b"], f"{row['loss_b']:.4f}"),
            number(
                row["difference"],
                f"{row['difference']:+.4f}".replace("-", "−"),
                f"{row['ci_low']:+.4f} to {row['ci_high']:+.4f}".replace("-", "−"),
            ),
            number(row["p_value"], p_value(row["p_value"])),
            number(row["p_holm"], p_value(row["p_holm"])),
            text(row["verdict"]),
        )
        for row in records
    )
    return Table(
        "loss_pairs",
        "The same method in two runs: loss on the same answers",
        columns,
        rows,
        "Nats per supervised token; lower is better. Brackets: 95 % interval, paired by answer. Holm: over this table.",
    )
