"""The pairs of curves that a plan named before a study ran, at equal hearing: Holm over these alone.

    python scripts/primary_pairs.py results/dose-frontier

FOLDER has results.json, and pairs.json with what the plan says:

    {"text": ["drift", "general_text"], "pairs": [["layer_lr_mean", "layer_lr"]]}

The rows are those of table `equal_hearing`, at the best speech loss that both reach, a pair being written as in
pairs.json (difference: second minus first). p is that of the table; "p, Holm" is corrected over the named pairs of one
text measure, of which one that has no hearing in common, or a curve that was not run, counts as 1. With
"least_in_common": 0.97 so does a pair with a hearing in common in fewer of the bootstrap's draws, which the t test over
several training runs passes over. A pair differs if that p is below 0.05 and the interval excludes 0 and holds the
difference itself, which it need not where a curve turns back: such a curve, whose speech loss at the greatest value is
not below that at the next, is marked. Drift grows faster than in a straight line, which is how curves are read between
their points; so of drift the sign must be the same where its logarithm is read along straight lines, and the last
column has the difference found so. Margins within which a plan calls two curves equal are for the reader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_cells import p_cell, plain, signed, signed_interval

from palimpsest.comparison.frontier import DRIFT, SPEECH_LOSS, at_equal_hearing
from palimpsest.files import UserError, read_json
from palimpsest.intervals import holm
from palimpsest.report.inputs import method_name

LEVEL = 0.05
TITLES = (
    *("Text", "A", "B", "Speech loss", "Text of A", "Text of B", "B − A", "p", "p, Holm", "B is"),
    "B − A, by logarithm",
)
TURNED = " (turns back)"
NAMES = {"drift": "Drift", "general_text": "General text"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    try:
        print("\n".join(table(read_json(folder / "results.json"), read_json(folder / "pairs.json"))))
    except UserError as error:
        sys.exit(str(error))


def table(results: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(TITLES)} |", f"| --- | --- | --- |{' ---: |' * 6} --- | ---: |"]
    turned = {name for pair in plan["pairs"] for name in pair if _turns_back(results["frontier"], name)}
    for text in plan["text"]:
        rows = [_row(results["equal_hearing"], text, *pair) for pair in plan["pairs"]]
        least = plan.get("least_in_common", 0.0)
        undecided = [row["p_value"] is None or row["overlap"] < least for row in rows]
        corrected = holm([1.0 if of else row["p_value"] for of, row in zip(undecided, rows, strict=True)])
        for row, p in zip(rows, corrected, strict=True):
            by_log = _by_logarithm(results["frontier"], row) if text == DRIFT else None
            lines.append(f"| {' | '.join(_cells(row, float(p), by_log, turned))} |")
    return lines


def _row(records: Sequence[Mapping[str, Any]], text: str, a: str, b: str) -> dict[str, Any]:
    """As the plan writes the pair; without values where there is none."""
    for row in records:
        at = (row["text_measure"], row["hearing_measure"], row["position"])
        if at == (text, SPEECH_LOSS, "best") and {row["method_a"], row["method_b"]} == {a, b}:
            return dict(row) if row["method_a"] == a else _turned(row)
    return {"text_measure": text, "method_a": a, "method_b": b, "difference": None, "p_value": None}


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


def _points(frontier: Sequence[Mapping[str, Any]], curve: str) -> list[tuple[float, float]]:
    """(speech loss, drift) of the points of a curve, in the order of the value that is varied."""
    of = (curve, DRIFT, SPEECH_LOSS)
    rows = [row for row in frontier if (row["curve"], row["text_measure"], row["hearing_measure"]) == of]
    rows = [row for row in rows if row["hearing"] is not None]
    rows = sorted(rows, key=lambda row: row["point"]) if len(rows) > 1 else rows
    return [(row["hearing"], row["text"]) for row in rows]


def _turns_back(frontier: Sequence[Mapping[str, Any]], curve: str) -> bool:
    losses = [loss for loss, _ in _points(frontier, curve)]
    return len(losses) > 1 and losses[-1] >= losses[-2]


def _by_logarithm(frontier: Sequence[Mapping[str, Any]], pair: Mapping[str, Any]) -> float | None:
    """B − A where the logarithm of drift is read along straight lines; None without hearing in common or with a 0."""
    curves = []
    for name in (pair["method_a"], pair["method_b"]):
        points = _points(frontier, name)
        if not points or any(text <= 0 for _, text in points):
            return None
        hearing, text = np.array(points).T
        curves.append((-hearing[None], -np.log(text)[None]))  # more is better in both
    _, a, b = at_equal_hearing(curves[0], curves[1], 1.0)
    return None if np.isnan(a[0] + b[0]) else float(np.exp(-b[0]) - np.exp(-a[0]))


def _cells(row: Mapping[str, Any], p: float, by_log: float | None, turned: Collection[str]) -> list[str]:
    of = [row["method_a"], row["method_b"]]
    names = [NAMES.get(row["text_measure"], row["text_measure"])]
    names += [method_name(name).replace("_", r"\_") + TURNED * (name in turned) for name in of]
    if row["difference"] is None:
        return [*names, "–", "–", "–", "–", "–", p_cell(p), "not comparable", "–"]
    values = [plain(row[key]) for key in ("hearing", "text_a", "text_b")]
    bounds = signed_interval(row["difference"], row["ci_low"], row["ci_high"])
    differs = p < LEVEL and (row["ci_low"] > 0 or row["ci_high"] < 0)
    differs = differs and row["ci_low"] <= row["difference"] <= row["ci_high"]
    if row["text_measure"] == DRIFT:
        differs = differs and by_log is not None and by_log * row["difference"] > 0
    verdict = "no difference shown" if not differs else "better" if row["difference"] < 0 else "worse"
    return [
        *names,
        *values,
        bounds,
        p_cell(row["p_value"]),
        p_cell(p),
        verdict,
        "–" if by_log is None else signed(by_log),
    ]


if __name__ == "__main__":
    main()
