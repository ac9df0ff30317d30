"""compare.md: the tables of `palimpsest compare` for reading, in Markdown whose columns line up as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DASH = "–"


def markdown(tables: Mapping[str, Any]) -> str:
    """The page, from the value of compare.json."""
    seeds = any(max(row["seeds_a"], row["seeds_b"]) > 1 for row in tables["accuracy"])
    interval = "clustered by question and seed" if seeds else "paired bootstrap"
    test = "t test clustered by question and seed" if seeds else "exact McNemar test"
    parts = ["# Comparison", ""]
    if tables["accuracy"]:
        parts += [f"## Accuracy ({tables['metric']})", "", *_table(_ACCURACY, map(_accuracy, tables["accuracy"])), ""]
        parts += [
            f"B − A: percentage points on the same questions, 95 % interval ({interval}). p: {test}, then Holm-"
            "corrected over this table. Detectable: the smallest true difference, in points, that so many questions "
            "find with probability 0.8, given how often the two disagree. The verdict is about B, by p (Holm) ≤ 0.05.",
            "",
        ]
    if tables["retention"]:
        parts += ["## Retention of text", "", *_table(_RETENTION, map(_retention, tables["retention"])), ""]
        parts += ["Accuracy from text as a share of the base's; Fieller's 95 % interval, paired by question.", ""]
    if tables["modality_gap"]:
        parts += ["## Modality gap", "", *_table(_GAP, map(_gap, tables["modality_gap"])), ""]
        parts += ["Accuracy from text minus accuracy from this input, percentage points on the same questions.", ""]
    if tables["perplexity"]:
        parts += ["## Loss on target answers", "", *_table(_LOSS, map(_loss, tables["perplexity"])), ""]
        parts += ["Nats per supervised token, paired by answer; ratio: perplexity of B over that of A.", ""]
    if tables["not_compared"]:
        parts += ["## Not compared", "", *(f"- {sentence}" for sentence in tables["not_compared"]), ""]
    return "\n".join(parts)


_ACCURACY = ("Task", "Input", "A", "B", "n", "A %", "B %", "B − A", "p", "p (Holm)", "Detectable", "Verdict on B")
_RETENTION = ("Task", "Base", "Method", "n", "Retention %")
_GAP = ("Task", "Method", "Input", "n", "Gap", "p", "p (Holm)")
_LOSS = ("Task", "Input", "A", "B", "n", "Loss A", "Loss B", "B − A", "Ratio", "p", "p (Holm)", "Verdict on B")


def _accuracy(row: Mapping[str, Any]) -> Sequence[str]:
    seeds = [f" ({row[key]} seeds)" if row[key] > 1 else "" for key in ("seeds_a", "seeds_b")]
    return (
        row["task"],
        row["modality"],
        row["method_a"] + seeds[0],
        row["method_b"] + seeds[1],
        str(row["n"]),
        f"{100 * row['accuracy_a']:.1f} [{100 * row['ci_low_a']:.1f}, {100 * row['ci_high_a']:.1f}]",
        f"{100 * row['accuracy_b']:.1f} [{100 * row['ci_low_b']:.1f}, {100 * row['ci_high_b']:.1f}]",
        _signed(100 * row["difference"], 100 * row["ci_low"], 100 * row["ci_high"], 1),
        _p(row["p_value"]),
        _p(row["p_holm"]),
        DASH if row["detectable"] is None else f"{100 * row['detectable']:.1f}",
        row["verdict"],
    )


def _retention(row: Mapping[str, Any]) -> Sequence[str]:
    if row["value"] is None:
        shown = "the base has no right answer"
    elif row["ci_low"] is None:
        shown = f"{100 * row['value']:.1f} [not bounded]"
    else:
        shown = f"{100 * row['value']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    return row["task"], row["base"], row["method"], str(row["n"]), shown


def _gap(row: Mapping[str, Any]) -> Sequence[str]:
    gap = _signed(100 * row["value"], 100 * row["ci_low"], 100 * row["ci_high"], 1)
    return row["task"], row["method"], row["modality"], str(row["n"]), gap, _p(row["p_value"]), _p(row["p_holm"])


def _loss(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        row["task"],
        row["modality"],
        row["method_a"],
        row["method_b"],
        str(row["n"]),
        f"{row['loss_a']:.4f}",
        f"{row['loss_b']:.4f}",
        _signed(row["difference"], row["ci_low"], row["ci_high"], 4),
        f"{row['perplexity_ratio']:.3f}",
        _p(row["p_value"]),
        _p(row["p_holm"]),
        row["verdict"],
    )


def _signed(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(head: Sequence[str], rows: Any) -> list[str]:
    cells = [head, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
