"""Tables of what the models can do: plain functions from lists of records to `Table` values.

Where the paper has the same table, its numbers stand below ours in rows of their own, each labelled as
published in its first cell, so that the label survives sorting and copying.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from palimpsest.records import ClaimRecord, ComparisonRecord, DeactivationRecord, QARecord
from palimpsest.report import paper
from palimpsest.report.inputs import MODALITY_NAMES, method_key, method_name, modality_key, task_name
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

OURS = "measured here"
DIGEST_NOTE = "* from a secondary digest of the paper, not checked against it."
CONDITIONS = ("base", "top", "bottom", "random")
VERDICTS = {"holds": "✓ holds", "fails": "✗ fails", "undecided": "? undecided"}


def deactivation(records: Sequence[DeactivationRecord]) -> Table:
    """Table 1: perplexity after zeroing the top, bottom or a random share of the weights.

    The random condition is the mean over its seeds, with their smallest and largest value.
    """
    columns = (
        Column("Source"),
        Column("Model"),
        Column("Input"),
        Column("Removed %", numeric=True),
        Column("Selected by"),
        *(Column(name, numeric=True) for name in ("Whole", "Top", "Bottom", "Random")),
    )
    groups: dict[tuple[str, str, float, str, str], list[DeactivationRecord]] = defaultdict(list)
    whole: dict[tuple[str, str], DeactivationRecord] = {}
    for record in records:
        if record["condition"] == "base":
            whole[record["model"], record["modality"]] = record
        else:
            key = (record["model"], record["modality"], record["ratio"], record["scope"], record["reduction"])
            groups[key].append(record)
    keys = sorted(groups, key=lambda key: (method_key(key[0]), modality_key(key[1]), *key[2:]))
    rows: list[tuple[Cell, ...]] = []
    for key in keys:
        model, modality, ratio, scope, reduction = key
        base = whole.get((model, modality))
        of = {name: [row for row in groups[key] if row["condition"] == name] for name in CONDITIONS}
        rows.append(
            (
                text(OURS),
                text(method_name(model)),
                text(modality),
                number(ratio, f"{100 * ratio:g}"),
                text(f"{scope}, {reduction}"),
                _perplexity([base] if base else []),
                *(_perplexity(of[name]) for name in CONDITIONS[1:]),
            )
        )
    n_ours = len(rows)
    for published in paper.TABLE_1:
        values = (published.base, published.top, published.bottom, published.random)
        rows.append(
            (
                text(paper.SOURCE_LABEL),
                text(f"LLaMA-Omni {published.model}"),
                text(published.modality),
                number(paper.TABLE_1_RATIO, f"{100 * paper.TABLE_1_RATIO:g}"),
                text("not stated"),
                *(_published(value, significant(value.value)) for value in values),
            )
        )
    return Table(
        "deactivation",
        "Perplexity with a share of the weights set to zero (the paper's Table 1)",
        columns,
        tuple(rows),
        f"Selected by: scope of the selection and reduction of the scores. Random: mean over seeds, with the "
        f"smallest and largest in brackets. {_tokens(records)}{DIGEST_NOTE}",
        frozenset(range(n_ours, len(rows))),
    )


def _tokens(records: Sequence[DeactivationRecord]) -> str:
    """On how much text the perplexities were measured."""
    sizes = sorted({(row["modality"], row["n_examples"], row["n_tokens"]) for row in records})
    return "".join(f"{modality}: {n} examples, {tokens} tokens. " for modality, n, tokens in sizes)


def _perplexity(records: Sequence[DeactivationRecord]) -> Cell:
    if not records:
        return EMPTY
    values = [float(record["perplexity"]) for record in records if record["perplexity"] is not None]
    if len(values) < len(records):
        return Cell(NOT_FINITE, sort=float("inf"))
    detail = f"{interval(min(values), max(values), 'significant')}; {len(values)} seeds" if len(values) > 1 else ""
    return number(fmean(values), detail=detail)


def _published(value: paper.Value | None, written: str) -> Cell:
    if value is None:
        return EMPTY
    return Cell(f"{written} *" if value.certainty == "digest" else written, sort=value.value)


def accuracy(
    records: Sequence[QARecord], metric: str, model: str = DASH, tuned_on_text: Sequence[str] = (), n_runs: int = 1
) -> Table:
    """Table 2: accuracy from text (T2T), from speech (S2T) and of the cascade, under one scoring rule.

    `tuned_on_text` names the methods that were trained on questions given as text; `n_runs` of each method are meant.
    """
    asked = {row["modality"] for row in records}
    modalities = [modality for modality in MODALITY_NAMES if modality != "text_asr" or modality in asked]
    columns = (
        Column("Source"),
        Column("Task"),
        Column("Model"),
        Column("Method"),
        *(Column(f"{MODALITY_NAMES[modality]} %", numeric=True) for modality in modalities),
    )
    cells = {
        (row["task"], row["method"], row["modality"]): _accuracy(row) for row in records if row["metric"] == metric
    }
    rows: list[tuple[Cell, ...]] = []
    published_rows: list[int] = []
    for task in _tasks(cells, paper.TABLE_2):
        rows += [
            (
                text(OURS),
                text(task_name(task)),
                text(model),
                text(method_name(method)),
                *(cells.get((task, method, modality), EMPTY) for modality in modalities),
            )
            for method in sorted({method for of, method, _ in cells if of == task}, key=method_key)
        ]
        for published in paper.TABLE_2:
            if published.task == task:
                published_at = {"text": _percent(published.t2t), "speech": _percent(published.s2t)}
                published_rows.append(len(rows))
                rows.append(
                    (
                        text(paper.SOURCE_LABEL),
                        text(task_name(task)),
                        text(f"{published.system}, {published.size}"),
                        text(method_name(published.method)) if published.method else EMPTY,
                        *(published_at.get(modality, EMPTY) for modality in modalities),
                    )
                )
    return Table(
        "accuracy",
        "Accuracy from typed (T2T) and spoken (S2T) questions (the paper's Table 2)",
        columns,
        tuple(rows),
        f"Ours: scoring rule {metric}, {_brackets(n_runs)}. The paper "
        "states neither its scoring rule nor intervals, so the two are not the same measurement."
        f"{_deaf(tuned_on_text)}{BASE_HEARD if any(key[1:] == ('base', 'speech') for key in cells) else ''}",
        frozenset(published_rows),
    )


BASE_HEARD = " The base model heard through the adaptor that the methods started from."


def _brackets(n_runs: int) -> str:
    if n_runs == 1:
        return "95 % Wilson interval and number of questions in brackets"
    return (
        f"means of {n_runs} training runs; in brackets the 95 % interval over seeds and questions (of the base, which "
        "has one, Wilson's) and the number of questions"
    )


def _deaf(tuned_on_text: Sequence[str]) -> str:
    """Why some methods have no S2T."""
    if not tuned_on_text:
        return ""
    names = ", ".join(method_name(method) for method in sorted(tuned_on_text, key=method_key))
    return (
        f" Tuned on the same questions as text, therefore without a trained adaptor and not asked in speech: {names}."
    )


def _tasks(cells: Iterable[tuple[str, Any, str]], published: Sequence[paper.AccuracyRow]) -> list[str]:
    """This run's tasks in its own order, then those that only the paper has."""
    return list(dict.fromkeys([task for task, _, _ in cells] + [row.task for row in published]))


def _accuracy(row: QARecord) -> Cell:
    detail = f"{interval(row['ci_low'], row['ci_high'])}; n {row['n']}"
    return Cell(percent(row["accuracy"]), detail, row["accuracy"])


def _percent(value: paper.Value | None) -> Cell:
    if value is None:
        return EMPTY
    cell = _published(value, f"{value.value:.1f}")
    return Cell(cell.text, sort=value.value / 100)  # ours sort by shares


def accuracy_details(records: Sequence[QARecord]) -> Table:
    """Every accuracy of the run, by scoring rule, with how many answers were empty, refused, looping or failed."""
    columns = (
        Column("Source"),
        Column("Method"),
        Column("Task"),
        Column("Input"),
        Column("Scoring rule"),
        *(
            Column(name, numeric=True)
            for name in ("n", "Correct", "Accuracy %", "Empty", "Refused", "Looping", "Failed")
        ),
    )
    key = lambda row: (row["metric"], row["task"], modality_key(row["modality"]), method_key(row["method"]))  # noqa: E731
    rows = tuple(
        (
            text(OURS if row.get("source", "measured") == "measured" else row["source"]),
            text(method_name(row["method"])),
            text(task_name(row["task"])),
            text(row["modality"]),
            text(f"{row['metric']} {row['metric_version']}"),
            count(row["n"]),
            count(row["correct"]),
            Cell(percent(row["accuracy"]), interval(row["ci_low"], row["ci_high"]), row["accuracy"]),
            count(row["n_empty"]),
            *(count(row[flag]) if flag in row else EMPTY for flag in ("n_refusal", "n_loop")),
            count(row["n_failed"]),
        )
        for row in sorted(records, key=key)
    )
    return Table(
        "accuracy_details",
        "Every accuracy, by scoring rule",
        columns,
        rows,
        "Empty and failed answers count as wrong. Refused and looping ones are scored as they are: a refusal opens "
        "with an apology or not knowing, a loop repeats a run of words three times or more, over at least six words.",
    )


def lora_rank(
    records: Sequence[QARecord], metric: str, ranks: Mapping[str, int], model: str = DASH, n_runs: int = 1
) -> Table:
    """Table 3: LoRA by rank. `ranks` gives the rank of each LoRA method of this run."""
    columns = (
        Column("Source"),
        Column("Task"),
        Column("Model"),
        Column("Rank", numeric=True),
        Column("T2T %", numeric=True),
        Column("S2T %", numeric=True),
    )
    cells = {
        (row["task"], row["method"], row["modality"]): _accuracy(row)
        for row in records
        if row["metric"] == metric and row["method"] in ranks
    }
    rows: list[tuple[Cell, ...]] = []
    published_rows: list[int] = []
    for task in _tasks(cells, paper.TABLE_3):
        rows += [
            (
                text(OURS),
                text(task_name(task)),
                text(model),
                count(ranks[method]),
                cells.get((task, method, "text"), EMPTY),
                cells.get((task, method, "speech"), EMPTY),
            )
            for method in sorted({method for of, method, _ in cells if of == task}, key=ranks.__getitem__)
        ]
        for published in paper.TABLE_3:
            if published.task == task and published.rank is not None:
                published_rows.append(len(rows))
                rows.append(
                    (
                        text(paper.SOURCE_LABEL),
                        text(task_name(task)),
                        text(f"{published.system}, {published.size}"),
                        count(published.rank),
                        _percent(published.t2t),
                        _percent(published.s2t),
                    )
                )
    return Table(
        "lora_rank",
        "LoRA by rank (the paper's Table 3)",
        columns,
        tuple(rows),
        f"Ours: scoring rule {metric}, {_brackets(n_runs)}.",
        frozenset(published_rows),
    )


def comparisons(records: Sequence[ComparisonRecord]) -> Table:
    """Two methods on the same questions."""
    columns = (
        Column("Task"),
        Column("Input"),
        Column("Scoring rule"),
        Column("A"),
        Column("B"),
        *(
            Column(name, numeric=True)
            for name in ("n", "Only A right", "Only B right", "B − A, points", "p", "p, Holm")
        ),
    )
    rows = tuple(
        (
            text(task_name(row["task"])),
            text(row["modality"]),
            text(row["metric"]),
            text(method_name(row["method_a"])),
            text(method_name(row["method_b"])),
            count(row["n"]),
            count(row["only_a"]),
            count(row["only_b"]),
            number(
                row["difference"],
                points(row["difference"]),
                interval(row["ci_low"], row["ci_high"], "points"),
            ),
            number(row["p_value"], p_value(row["p_value"])),
            number(row["p_holm"], p_value(row["p_holm"])),
        )
        for row in records
    )
    return Table(
        "comparisons",
        "Paired comparisons on the same questions",
        columns,
        rows,
        "p: exact McNemar test; Holm: corrected for all rows of this table. Brackets: 95 % interval.",
    )


def claims(records: Sequence[ClaimRecord]) -> Table:
    """The paper's claims, each with this run's measure, value, interval and verdict."""
    columns = (
        Column("Claim", numeric=True),
        Column("Statement", prose=True),
        Column("Verdict"),
        Column("Measure", prose=True),
        Column("Value", numeric=True),
        Column("Note", prose=True),
        Column("In the paper", prose=True),
    )
    references = {reference.claim: reference for reference in paper.CLAIMS}
    rows: list[tuple[Cell, ...]] = []
    for row in sorted(records, key=lambda row: row["claim"]):
        reference = references.get(row["claim"])
        rows.append(
            (
                count(row["claim"]),
                text(row["statement"]),
                text(VERDICTS.get(row["verdict"], row["verdict"])),
                text(row["measure"]),
                number(row["value"], detail=interval(row["ci_low"], row["ci_high"], "significant")),
                text(row.get("note", "")),
                text(f"{reference.where} (published): {reference.published}") if reference else EMPTY,
            )
        )
    return Table(
        "claims",
        "The paper's claims, tested on this run",
        columns,
        tuple(rows),
        "A verdict is about this run, not about the paper: the models and data differ. Brackets: 95 % interval.",
    )
