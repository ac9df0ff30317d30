"""compare.md: the tables of `palimpsest compare` for reading, in Markdown whose columns line up as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from palimpsest.records import Comparison
from palimpsest.report.table import (
    Cell,
    Column,
    Field,
    Row,
    holm_over,
    inline_markdown,
    p_value,
    percent,
    table,
    text,
    to_aligned_markdown,
    words,
)


def markdown(compared: Comparison) -> str:
    """The page."""
    seeds = any(max(row["seeds_a"], row["seeds_b"]) > 1 for row in compared["accuracy"])
    interval = "clustered by question and seed" if seeds else "paired bootstrap"
    test = "t test clustered by question and seed" if seeds else "exact McNemar test"
    sections: list[tuple[str, Sequence[Field], Sequence[Row], str]] = [
        (
            f"Accuracy ({compared['metric']})",
            (
                *(TASK, INPUT, _system("a"), _system("b"), N, _accuracy("a"), _accuracy("b")),
                *(_signed("B − A", "difference", 100, 1), P, P_HOLM, OVER, DETECTABLE, VERDICT),
            ),
            compared["accuracy"],
            f"B − A: percentage points on the same questions, 95 % interval ({interval}). p: {test}, then Holm-"
            "corrected over so many tests: those of one input, against the base or against each other. Detectable: "
            "the smallest true difference, in points, that so many questions find with probability 0.8, given how "
            "often the two disagree. The verdict is about B, by p (Holm) ≤ 0.05.",
        ),
        (
            "Retention of text",
            (TASK, words("Base", "base"), METHOD, N, (Column("Retention %"), _retention)),
            compared["retention"],
            "Accuracy from text as a share of the base's; Fieller's 95 % interval, paired by question.",
        ),
        (
            "Modality gap",
            (TASK, METHOD, INPUT, N, _signed("Gap", "value", 100, 1), P, P_HOLM, OVER),
            compared["modality_gap"],
            "Accuracy from text minus accuracy from this input, percentage points on the same questions.",
        ),
        (
            "Loss on target answers",
            (TASK, INPUT, A, B, N, *LOSSES, _signed("B − A", "difference", 1, 4), RATIO, P, P_HOLM, OVER, VERDICT),
            compared["perplexity"],
            "Nats per supervised token, paired by answer; ratio: perplexity of B over that of A.",
        ),
    ]
    parts = ["# Comparison", ""]
    for title, fields, rows, note in sections:
        if rows:
            parts += [f"## {title}", "", to_aligned_markdown(table("", title, fields, rows)), "", note, ""]
    if compared["notes"]:
        parts += [*(f"**Note.** {inline_markdown(line)}" for line in compared["notes"]), ""]
    if compared["not_compared"]:
        parts += ["## Not compared", "", *(f"- {inline_markdown(line)}" for line in compared["not_compared"]), ""]
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------
# Columns; numbers as programs write them, with a hyphen for minus
# ----------------------------------------------------------------------------------------------------------
def _signed(title: str, key: str, scale: int, digits: int) -> Field:
    """Differences, always with their sign, and their intervals."""

    def cell(row: Row) -> Cell:
        value, low, high = (f"{scale * row[name]:+.{digits}f}" for name in (key, "ci_low", "ci_high"))
        return text(f"{value} [{low}, {high}]")

    return Column(title), cell


def _accuracy(side: str) -> Field:
    keys = (f"accuracy_{side}", f"ci_low_{side}", f"ci_high_{side}")
    return Column(f"{side.upper()} %"), lambda row: text("{} [{}, {}]".format(*(percent(row[key]) for key in keys)))


def _system(side: str) -> Field:
    """A method, and how many training runs of it."""

    def cell(row: Row) -> Cell:
        seeds = row[f"seeds_{side}"]
        return text(row[f"method_{side}"] + (f" ({seeds} seeds)" if seeds > 1 else ""))

    return Column(side.upper()), cell


def _retention(row: Row) -> Cell:
    if row["value"] is None:
        return text("the base has no right answer")
    bounds = "not bounded" if row["ci_low"] is None else f"{percent(row['ci_low'])}, {percent(row['ci_high'])}"
    return text(f"{percent(row['value'])} [{bounds}]")


TASK, INPUT, METHOD, N = words("Task", "task"), words("Input", "modality"), words("Method", "method"), words("n", "n")
A, B, VERDICT = words("A", "method_a"), words("B", "method_b"), words("Verdict on B", "verdict")
P, P_HOLM = words("p", "p_value", p_value), words("p (Holm)", "p_holm", p_value)
OVER = Column("Holm over"), lambda row: text(holm_over(row))
DETECTABLE = words("Detectable", "detectable", percent)
LOSSES = (words("Loss A", "loss_a", "{:.4f}".format), words("Loss B", "loss_b", "{:.4f}".format))
RATIO = words("Ratio", "perplexity_ratio", "{:.3f}".format)
