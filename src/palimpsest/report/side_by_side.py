"""Several runs in one page: what each found, side by side, and how far they can be compared at all.

Numbers of a run stand in a column of their own. A difference is shown only where the same questions were answered and
scored alike in both runs; what does not match is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palimpsest.files import UserError
from palimpsest.records import ClaimRecord, Paired
from palimpsest.report import summary
from palimpsest.report.across_runs import by_method
from palimpsest.report.inputs import (
    MODALITY_NAMES,
    Inputs,
    by_task,
    flat,
    having,
    in_order,
    method_name,
    model_name,
    read_inputs,
    task_name,
    text_shifts,
)
from palimpsest.report.page import render_page, write_page
from palimpsest.report.public import without_paths
from palimpsest.report.table import (
    DASH,
    EMPTY,
    Cell,
    Column,
    Rows,
    Table,
    count,
    interval,
    mean,
    median_perplexity,
    number,
    numbers,
    percent,
    ranges,
    significant,
    table,
    text,
    words,
)
from palimpsest.report.tables import DIFFERENCE, INPUT, OVER, P_HOLM, TASK, VERDICTS, N, P, accuracy_cell
from palimpsest.rundir import run_labels

MAX_VALUE = 120  # characters of one value of a configuration or provenance
UNCOMMON = ("steps.", "started", "finished", "seconds")  # provenance that differs between any two runs
A, B, VERDICT = words("A", "method_a"), words("B", "method_b"), words("Verdict on B", "verdict")


@dataclass(frozen=True)
class Run:
    label: str
    inputs: Inputs


def write_comparison(
    runs: Sequence[Path], paired: Paired, out: Path, *, pages: Sequence[str] = (), read: Sequence[Inputs] = ()
) -> Path:
    """Write the page that shows `runs` side by side to `out` and return its path.

    paired: what `palimpsest.comparison.pairs.pair_runs` returns. pages: of each run the address of its own report.
    read: what `read_inputs` gave for each, where that was read already.

    Raises:
        UserError: a run is not a folder, or is given twice; `out` is a folder.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("The same run is given twice; give each run once.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file for the page with --out.")
    inputs = read or [read_inputs(run) for run in runs]
    named = [Run(label, of) for label, of in zip(run_labels(runs), inputs, strict=True)]
    write_page(out, render(named, paired, out, pages))
    return out


def render(runs: Sequence[Run], paired: Paired, out: Path, pages: Sequence[str] = ()) -> str:
    """The page as text."""
    return render_page(
        "comparison.html.j2",
        name=" · ".join(run.label for run in runs),
        runs=runs,
        paths=[run.inputs.path for run in runs],
        out=out,
        questions=_summaries(runs),
        scales=[(run.label, summary.scale(run.inputs)) for run in runs],
        pages=dict(zip((run.label for run in runs), pages, strict=False)),
        not_compared=[*_unlike(runs, paired["metric"]), *(_public(runs, line) for line in paired["not_compared"])],
        missing=[(run.label, run.inputs.missing) for run in runs if run.inputs.missing],
        tables={table.name: table for table in tables_of(runs, paired) if table.rows},
        metric=paired["metric"],
    )


# ----------------------------------------------------------------------------------------------------------
# Summaries, and what is not alike
# ----------------------------------------------------------------------------------------------------------
def _summaries(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, tuple[summary.Finding, ...]]]]]:
    """Each question of the summary with the findings of every run that has it: not all runs were given models."""
    found: dict[str, list[tuple[str, tuple[summary.Finding, ...]]]] = {}
    for run in sorted(runs, key=lambda run: not summary.given_models(run.inputs)):  # theirs begin with one more
        for point in summary.points_of(by_method(run.inputs)):
            found.setdefault(point.question, []).append((run.label, point.findings))
    order = {run.label: i for i, run in enumerate(runs)}
    return [(question, sorted(of, key=lambda it: order[it[0]])) for question, of in found.items()]


def _public(runs: Sequence[Run], sentence: str) -> str:
    return without_paths(sentence, *(run.inputs.path for run in runs))


def _unlike(runs: Sequence[Run], metric: str) -> Iterator[str]:
    """What stands side by side here and is not the same measurement, a sentence each, from the runs' own records."""
    said: dict[str, dict[str, str]] = {"tasks": {}, "scoring rules": {}, "language models": {}}
    for run in runs:
        asked = run.inputs.results["qa"]
        tasks = sorted({f"{task_name(row['task'])} (n {row['n']})" for row in asked})
        versions = sorted({row["metric_version"] for row in having(asked, metric=metric)})
        said["tasks"][run.label] = ", ".join(tasks) or "none"
        said["scoring rules"][run.label] = f"{metric} version {', '.join(versions)}" if versions else f"no {metric}"
        said["language models"][run.label] = model_name(run.inputs) or "not named"
    for what, values in said.items():
        if len(set(values.values())) > 1:
            yield f"The runs have different {what}: {'; '.join(f'{label}: {of}' for label, of in values.items())}."


# ----------------------------------------------------------------------------------------------------------
# Tables with a column per run
# ----------------------------------------------------------------------------------------------------------
Key = tuple[Any, ...]
Cells = Mapping[Key, Cell]  # the cells of one run by what identifies a row


def tables_of(runs: Sequence[Run], paired: Paired) -> list[Table]:
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
            "From the base of the same run; in brackets the 95 % interval, and the noise: what the base itself differs "
            "by between these questions and others.",
        ),
        _side_by_side(
            runs,
            "deactivation",
            "Perplexity with weights set to zero, by run",
            ("Model", "Input", "Removed", "Removed %", "Scope"),
            _deactivations,
            "Random: median over the masks. In brackets the number of tokens and the scores that chose the weights.",
        ),
        _side_by_side(runs, "differences", "What the recipes differ in", ("Key",), _config, "", only_different=True),
        _side_by_side(runs, "provenance", "Versions, hardware, models, data of each run", ("Key",), _provenance, ""),
    ]


def _side_by_side(
    runs: Sequence[Run],
    name: str,
    title: str,
    heads: Sequence[str],
    of: Callable[[Inputs], Cells],
    note: str,
    only_different: bool = False,
) -> Table:
    """A row per key that any run has, in the order of the first run that has it; a dash where a run has none."""
    columns = [of(run.inputs) for run in runs]
    lines = [(key, [cells.get(key, EMPTY) for cells in columns]) for key in _merged([list(cells) for cells in columns])]
    if only_different:
        lines = [(key, cells) for key, cells in lines if len({cell.text for cell in cells}) > 1]
    prose = name in ("differences", "provenance")
    return Table(
        name,
        title,
        (*map(Column, heads), *(Column(run.label, numeric=not prose, prose=prose) for run in runs)),
        tuple((*(text(str(part)) for part in key), *cells) for key, cells in lines),
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
    cells: dict[Key, Cell] = {}
    for row in by_task(having(inputs.results["qa"], metric=metric)):
        of, cell = MODALITY_NAMES.get(row["modality"], row["modality"]), accuracy_cell(row)
        detail = f"{cell.detail}; version {row['metric_version']}"
        cells[task_name(row["task"]), of, method_name(row["method"])] = replace(cell, detail=detail)
    return cells


def _perplexities(inputs: Inputs) -> Cells:
    return {
        (method_name(row["method"]), row["modality"]): mean([row["perplexity"]], f"{row['n_tokens']} tokens")
        for row in in_order(inputs.results["perplexity"], "method", "modality")
    }


def _shifts(inputs: Inputs) -> Cells:
    cells: dict[Key, Cell] = {}
    for row in in_order(text_shifts(inputs.results), "model"):
        noise = "" if row["noise_floor"] is None else f"noise {significant(row['noise_floor'])}"
        parts = filter(None, (interval(row["ci_low"], row["ci_high"], significant), noise))
        cells[(method_name(row["model"]),)] = number(row["value"], detail="; ".join(parts))
    return cells


def _deactivations(inputs: Inputs) -> Cells:
    groups: dict[Key, list[Any]] = {}
    for row in in_order(inputs.results["deactivation"], "model", "modality", "ratio"):
        whole = row["condition"] == "base"
        removed, scope = ("nothing", DASH) if whole else (row["condition"], row["scope"])
        key = (method_name(row["model"]), row["modality"], removed, f"{100 * row['ratio']:g}", scope)
        groups.setdefault(key, []).append(row)
    return {
        key: (median_perplexity if key[2] == "random" else mean)(
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
    spread = interval(row["ci_low"], row["ci_high"], significant)
    written = VERDICTS.get(row["verdict"], row["verdict"])
    return Cell(written, "; ".join(filter(None, (value, spread))), written)


def _claims(runs: Sequence[Run]) -> Table:
    """A row per claim: its statement and each run's verdict with the value it rests on."""
    verdicts = [{row["claim"]: row for row in run.inputs.results["claims"]} for run in runs]
    statements = {claim: row["statement"] for of in reversed(verdicts) for claim, row in of.items()}
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
def _pairs(records: Rows) -> Table:
    shares = (numbers("A %", "accuracy_a", percent), numbers("B %", "accuracy_b", percent))
    return table(
        "pairs",
        "The same method in two runs, on the same questions",
        (TASK, INPUT, A, B, N, *shares, DIFFERENCE, P, P_HOLM, OVER, VERDICT),
        records,
        "Brackets: 95 % interval, paired bootstrap. p: exact McNemar test; Holm over: the tests of an input.",
    )


def _loss_pairs(records: Rows) -> Table:
    losses = (numbers(f"Loss {name.upper()}", f"loss_{name}", lambda loss: f"{loss:.4f}") for name in "ab")
    difference = ranges("B − A", "difference", lambda loss: f"{loss:+.4f}".replace("-", "−"))
    return table(
        "loss_pairs",
        "The same method in two runs: loss on the same answers",
        (words("Data", "task", task_name), INPUT, A, B, N, *losses, difference, P, P_HOLM, OVER, VERDICT),
        records,
        "Nats per supervised token; lower is better. Brackets: 95 % interval, paired by answer. Holm over: the "
        "tests of an input.",
    )
