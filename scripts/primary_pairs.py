"""The pairs of curves that a plan named before a study ran, at equal hearing: Holm over these alone.

    python scripts/primary_pairs.py results/dose-frontier

FOLDER has results.json, and pairs.json with what the plan says:

    {"text": ["drift", "general_text"], "pairs": [["layer_lr_mean", "layer_lr"]]}

The rows are those of table `equal_hearing`, at the best speech loss that both reach, a pair being written as in
pairs.json (difference: second minus first). p is that of the table; "p, Holm" is corrected over the named pairs of one
text measure, of which one that has no hearing in common counts as 1. A pair differs if that p is below 0.05 and the
interval excludes 0. Drift grows faster than in a straight line, which is how curves are read between their points; so
of drift the sign must be the same where its logarithm is read along straight lines. The last column has the difference
found so.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.comparison.frontier import DRIFT, SPEECH_LOSS, at_equal_hearing
from palimpsest.files import UserError, read_json
from palimpsest.intervals import holm
from palimpsest.report.inputs import method_name

LEVEL = 0.05
TITLES = (
    *("Text", "A", "B", "Speech loss", "Text of A", "Text of B", "B − A", "p", "p, Holm", "B is"),
    "B − A, by logarithm",
)
NAMES = {"drift": "Drift", "general_text": "General text"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    print("\n".join(table(read_json(folder / "results.json"), read_json(folder / "pairs.json"))))


def table(results: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table. Raises UserError for a pair of which the study has no comparison."""
    lines = [f"| {' | '.join(TITLES)} |", f"| --- | --- | --- |{' ---: |' * 6} --- | ---: |"]
    for text in plan["text"]:
        rows = [_row(results["equal_hearing"], text, *pair) for pair in plan["pairs"]]
        corrected = holm([1.0 if row["p_value"] is None else row["p_value"] for row in rows])
        for row, p in zip(rows, corrected, strict=True):
            by_log = _by_logarithm(results["frontier"], row) if text == DRIFT else None
            lines.append(f"| {' | '.join(_cells(row, float(p), by_log))} |")
    return lines


def _row(records: Sequence[Mapping[str, Any]], text: str, a: str, b: str) -> dict[str, Any]:
    for row in records:
        at = (row["text_measure"], row["hearing_measure"], row["position"])
        if at == (text, SPEECH_LOSS, "best") and {row["method_a"], row["method_b"]} == {a, b}:
            return dict(row) if row["method_a"] == a else _turned(row)
    raise UserError(f"There is no comparison of {a} with {b} in {text} at equal speech loss; see table equal_hearing.")


def _turned(row: Mapping[str, Any]) -> dict[str, Any]:
    minus = {key: None if row[key] is None else -row[key] for key in ("difference", "ci_low", "ci_high")}
    return {
        **row,
        "method_a": row["method_b"],
        "method_b": row["method_a"],
        "text_a": row["text_b"],
        "text_b": row["text_a"],
        "difference": minus["difference"],
        "ci_low": minus["ci_high"],
        "ci_high": minus["ci_low"],
    }


def _by_logarithm(frontier: Sequence[Mapping[str, Any]], pair: Mapping[str, Any]) -> float | None:
    """B − A where the logarithm of drift is read along straight lines; None without hearing in common or with a 0."""
    curves = []
    for name in (pair["method_a"], pair["method_b"]):
        rows = [
            row
            for row in frontier
            if (row["curve"], row["text_measure"], row["hearing_measure"]) == (name, DRIFT, SPEECH_LOSS)
        ]
        rows = sorted(rows, key=lambda row: row["point"]) if len(rows) > 1 else rows
        points = [(row["hearing"], row["text"]) for row in rows]
        if any(text <= 0 for _, text in points):
            return None
        hearing, text = np.array(points).T
        curves.append((-hearing[None], -np.log(text)[None]))  # more is better in both
    _, a, b = at_equal_hearing(curves[0], curves[1], 1.0)
    return None if np.isnan(a[0] + b[0]) else float(np.exp(-b[0]) - np.exp(-a[0]))


def _cells(row: Mapping[str, Any], p: float, by_log: float | None) -> list[str]:
    names = [NAMES.get(row["text_measure"], row["text_measure"])]
    names += [method_name(row[key]).replace("_", r"\_") for key in ("method_a", "method_b")]
    if row["difference"] is None:
        return [*names, "–", "–", "–", "–", "–", _p(p), "not comparable", "–"]
    values = [f"{row[key]:.3g}".replace("-", "−") for key in ("hearing", "text_a", "text_b")]
    bounds = f"{_signed(row['difference'])} \\[{_signed(row['ci_low'])} to {_signed(row['ci_high'])}\\]"
    differs = p < LEVEL and (row["ci_low"] > 0 or row["ci_high"] < 0)
    if by_log is not None:
        differs = differs and (by_log > 0) == (row["difference"] > 0)
    verdict = "no difference shown" if not differs else "better" if row["difference"] < 0 else "worse"
    return [*names, *values, bounds, _p(row["p_value"]), _p(p), verdict, "–" if by_log is None else _signed(by_log)]


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _p(value: float) -> str:
    return r"\< 0.001" if value < 0.001 else f"{value:.3f}"


if __name__ == "__main__":
    main()
