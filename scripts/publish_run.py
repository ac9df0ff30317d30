"""The small part of a run directory that can be passed on: records, provenance, figures, report.

    python scripts/publish_run.py runs/smollm2-135m-cpu results/smollm2-135m-cpu

Left out are weights, scores, audio, questions and answers (the report is made with `--no-samples`), and of results.json
the table with a row per matrix and measure, as OUT/README.md says; `clustering_summary` has its means over matrices.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from palimpsest.files import read_json, write_tables, write_text
from palimpsest.report.page import write_report

LONG = ("clustering",)  # tables of tens of megabytes


def main() -> None:
    arguments = parse_arguments()
    run, out = arguments.run, arguments.out
    (out / "figures").mkdir(parents=True, exist_ok=True)
    results = read_json(run / "results.json")
    left_out = {table: len(results[table]) for table in LONG}
    write_tables(out / "results.json", results | {table: [] for table in LONG})
    for name in ("provenance.json", "study.yaml"):
        shutil.copyfile(run / name, out / name)
    for figure in sorted((run / "figures").glob("*.svg")):
        shutil.copyfile(figure, out / "figures" / figure.name)
    write_report(run, out / "report.html", samples=False)
    rows = "; ".join(f"`{table}` ({n} rows, one per matrix and measure)" for table, n in left_out.items())
    write_text(
        out / "README.md",
        f"The records of a run of `{results_name(run)}`, written by `scripts/publish_run.py`. Left out: weights,\n"
        f"importance scores, audio, questions and answers, and of `results.json` the table {rows}.\n",
    )


def results_name(run: Path) -> str:
    return str(read_json(run / "provenance.json")["study"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a finished study")
    parser.add_argument("out", type=Path, help="folder to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
