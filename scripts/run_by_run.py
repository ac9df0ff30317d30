"""Pairs of methods that a plan named, at one rate: run i of one against run i of the other, in text and in hearing.

    python scripts/run_by_run.py results/dose-runs --run runs/dose-runs
    python scripts/run_by_run.py results/dose-runs

FOLDER has pairs.json with what the plan says, families of pairs, each of which is corrected by itself:

    {"at_one_rate": [[["mean-1e-4", "layer_lr-1e-4"]], [["text_only-1e-4", "full-1e-4"]]]}

Pairs that were chosen when results had been seen stand under "afterwards", and in a table of their own.

With --run the finished study is read and FOLDER/run_by_run.json written, a record per measure and pair like those of
table `seed_losses`, which has no pairs of points of curves. The table that is printed is made from that file alone: the
difference (second minus first) of the means over runs in nats per token, of each run, the 95 % interval over units and
runs (of methods that were trained once over units alone), p, and Holm's over the pairs of a family in that measure.
Text is lower where more is kept, speech loss where more is heard. A measure that one of a pair lacks is passed over:
what was trained on typed questions has no speech loss. Margins within which a plan calls two methods equal are for the
reader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_cells import p_cell, plain, signed, signed_interval

from palimpsest.comparison.families import ALIKE, BETTER, WORSE
from palimpsest.comparison.loss_pairs import LOSSES, loss_pair
from palimpsest.config import load_config
from palimpsest.files import UserError, read_json, write_json
from palimpsest.intervals import holm
from palimpsest.report.inputs import method_name
from palimpsest.rundir import RunDir
from palimpsest.study.results import measures_of

LEVEL = 0.05
KEYS = ("at_one_rate", "afterwards")
TITLES = ("Measure", "A", "B", "A is at", "B is at", "B − A", "Each run", "p", "p, Holm", "B is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--run", type=Path, help="the finished study; writes FOLDER/run_by_run.json")
    arguments = parser.parse_args()
    file = arguments.folder / "run_by_run.json"
    try:
        if arguments.run is not None:
            asked = read_json(arguments.folder / "pairs.json")
            write_json(file, {key: records(arguments.run, asked[key]) for key in KEYS if key in asked})
        print("\n\n".join("\n".join(table(rows)) for rows in read_json(file).values()))
    except UserError as error:
        sys.exit(str(error))


def records(run: Path, families: Sequence[Sequence[Sequence[str]]]) -> list[dict[str, Any]]:
    """Of every measure and pair, with Holm's p over the pairs of its family."""
    text, hearing = measures_of(RunDir(run), load_config(run / "study.yaml"), {})
    found: list[dict[str, Any]] = []
    for measure in (it for it in (*text, *hearing) if it.name in LOSSES):
        for number, pairs in enumerate(families):
            found_of = (loss_pair(measure, a, b, of_one_run=True) for a, b in pairs)
            rows = [row for row in found_of if row is not None]
            corrected = holm([row["p_value"] for row in rows])
            for row, p in zip(rows, corrected, strict=True):
                verdict = ALIKE if p >= LEVEL else BETTER if row["difference"] < 0 else WORSE
                of_family = {"p_holm": float(p), "verdict": verdict, "family": str(number), "n_family": len(rows)}
                found.append({**row, **of_family})
    there = {(row["method_a"], row["method_b"]) for row in found}
    for a, b in (pair for pairs in families for pair in pairs):
        if (a, b) not in there:
            raise UserError(f"{run} has no loss of both {a} and {b}; name methods of its recipe.")
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(TITLES)} |", "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
    for row in rows:
        names = [method_name(row[side]).replace("_", r"\_") for side in ("method_a", "method_b")]
        values = [plain(row[key]) for key in ("loss_a", "loss_b")]
        bounds = signed_interval(row["difference"], row["ci_low"], row["ci_high"])
        runs = ", ".join(map(signed, row["values"]))
        tests = [p_cell(row["p_value"]), p_cell(row["p_holm"]), row["verdict"]]
        lines.append(f"| {' | '.join([LOSSES[row['measure']].capitalize(), *names, *values, bounds, runs, *tests])} |")
    return lines


if __name__ == "__main__":
    main()
