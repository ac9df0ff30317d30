"""Tables of how far to trust the accuracies: what each scoring rule gives by chance, and the held-out perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from palimpsest.records import FloorRecord, PerplexityRecord, VoiceRecord
from palimpsest.report.inputs import MODALITY_NAMES, method_key, method_name, modality_key, task_name
from palimpsest.report.table import (
    EMPTY,
    NOT_FINITE,
    Cell,
    Column,
    Table,
    count,
    interval,
    number,
    percent,
    significant,
    text,
)

FLOORS = {
    "unrelated": "Answers to other questions %",
    "echo": "Question repeated %",
    "echo_in_sentence": "Question in a sentence %",
}


def floors(records: Sequence[FloorRecord], metric: str) -> Table:
    """False-positive floors of the main scoring rule, one row per method, task and input."""
    columns = (
        Column("Method"),
        Column("Task"),
        Column("Input"),
        *(Column(title, numeric=True) for title in ("n", *FLOORS.values())),
    )
    cells = {(r["task"], r["modality"], r["method"], r["floor"]): r for r in records if r["metric"] == metric}
    tasks = list(dict.fromkeys(task for task, *_ in cells))
    keys = sorted({key[:3] for key in cells}, key=lambda k: (tasks.index(k[0]), modality_key(k[1]), method_key(k[2])))
    rows = tuple(
        (
            text(method_name(method)),
            text(task_name(task)),
            text(modality),
            count(max(cells[task, modality, method, floor]["n"] for floor in FLOORS if (*key, floor) in cells)),
            *(_floor(cells.get((task, modality, method, floor))) for floor in FLOORS),
        )
        for key in keys
        for task, modality, method in [key]
    )
    return Table(
        "floors",
        "What the scoring rule calls right that cannot be",
        columns,
        rows,
        f"Scoring rule {metric}. Answers to other questions: each answer scored against the gold answers of another "
        "question, mean over several draws. An accuracy near these numbers says nothing. Brackets: 95 % interval.",
    )


def voices(records: Sequence[VoiceRecord]) -> Table:
    """Accuracy by the voice of the question, of tasks spoken in several voices."""
    columns = (
        Column("Task"),
        Column("Input"),
        Column("Method"),
        Column("Voice"),
        Column("Trained on"),
        *(Column(title, numeric=True) for title in ("Questions", "Accuracy %", "The same as text %")),
    )
    rows = tuple(
        (
            text(task_name(row["task"])),
            text(row["modality"]),
            text(method_name(row["method"])),
            text(row["voice"]),
            text("yes" if row["trained_on"] else "no"),
            count(row["n"]),
            Cell(percent(row["accuracy"]), interval(row["ci_low"], row["ci_high"]), row["accuracy"]),
            number(row["accuracy_text"], percent(row["accuracy_text"])),
        )
        for row in sorted(
            records, key=lambda row: (row["task"], modality_key(row["modality"]), method_key(row["method"]))
        )
    )
    return Table(
        "voices",
        "Accuracy by the voice of the question",
        columns,
        rows,
        "Mean over the training runs of a method. Trained on: the voice of some of the study's training questions. The "
        "questions differ from voice to voice; the last column says how hard they are. Brackets: 95 % interval.",
    )


def _floor(record: FloorRecord | None) -> Cell:
    if record is None:
        return EMPTY
    return Cell(percent(record["value"]), interval(record["ci_low"], record["ci_high"]), record["value"])


def perplexity(records: Sequence[PerplexityRecord]) -> Table:
    """Perplexity of the unchanged models on the held-out answers, typed and spoken questions side by side."""
    modalities = sorted({row["modality"] for row in records}, key=modality_key)
    columns = (
        Column("Method"),
        *(Column(f"{MODALITY_NAMES.get(modality, modality)} perplexity", numeric=True) for modality in modalities),
    )
    cells = {(row["method"], row["modality"]): row for row in records}
    rows = tuple(
        (text(method_name(method)), *(_perplexity(cells.get((method, modality))) for modality in modalities))
        for method in sorted({row["method"] for row in records}, key=method_key)
    )
    sizes = sorted({(row["modality"], row["n_examples"], row["n_tokens"]) for row in records})
    return Table(
        "perplexity",
        "Perplexity of the held-out answers",
        columns,
        rows,
        "".join(f"{modality}: {n} answers, {tokens} tokens. " for modality, n, tokens in sizes).strip(),
    )


def _perplexity(record: PerplexityRecord | None) -> Cell:
    if record is None:
        return EMPTY
    if record["perplexity"] is None:  # null in results.json: not finite
        return Cell(NOT_FINITE, sort=float("inf"))
    return number(record["perplexity"], significant(record["perplexity"]))
