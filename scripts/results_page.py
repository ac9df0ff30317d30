"""Fill the tables of a results page from the records of a run, so that no number in it was typed.

    python scripts/results_page.py results/smollm2-135m-cpu docs/results-smollm2-135m-cpu.md

In the page a comment names a table of the report, the columns and rows wanted; the table below it is replaced:

    <!-- table: seeds; columns: Task | Input | Method | Mean; Measure = Accuracy % -->

A condition `Column = value | value` keeps the rows whose cell begins with one of the values. `--check` writes nothing,
and fails where the page differs from the records.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from palimpsest.report.across_runs import by_method
from palimpsest.report.inputs import read_inputs
from palimpsest.report.page import tables_of
from palimpsest.report.table import Table, to_markdown

MARK = re.compile(r"(?P<mark><!-- table: (?P<wanted>[^\n]+?) -->\n)(?P<table>(?:\|[^\n]*\n)*)")


@dataclass(frozen=True)
class Wanted:
    """What a mark in the page asks for."""

    table: str
    columns: tuple[str, ...]  # none: all
    conditions: dict[str, tuple[str, ...]]  # column -> what a cell may begin with

    @classmethod
    def read(cls, text: str) -> Wanted:
        name, *parts = (part.strip() for part in text.split(";"))
        columns: tuple[str, ...] = ()
        conditions = {}
        for part in parts:
            if part.startswith("columns:"):
                columns = tuple(column.strip() for column in part.removeprefix("columns:").split("|"))
            else:
                column, _, values = part.partition(" = ")
                conditions[column] = tuple(value.strip() for value in values.split("|"))
        return cls(name, columns, conditions)


def main() -> None:
    arguments = parse_arguments()
    old = arguments.page.read_text(encoding="utf-8")
    new = filled(old, tables_of_run(arguments.run))
    if arguments.check:
        sys.exit(None if new == old else f"{arguments.page} differs from {arguments.run}; run this without --check.")
    arguments.page.write_text(new, encoding="utf-8")


def tables_of_run(run: Path) -> dict[str, Table]:
    """The tables of the run's report, by name."""
    inputs = read_inputs(run)
    return tables_of(by_method(inputs), inputs)


def filled(page: str, tables: dict[str, Table]) -> str:
    """`page` with the table under every mark made again. Raises SystemExit for a mark that fits no table."""
    return MARK.sub(lambda found: found["mark"] + markdown(Wanted.read(found["wanted"]), tables), page)


def markdown(wanted: Wanted, tables: dict[str, Table]) -> str:
    if wanted.table not in tables:
        sys.exit(f"There is no table {wanted.table!r}; there are: {', '.join(tables)}.")
    table = tables[wanted.table]
    titles = [column.title for column in table.columns]
    for title in (*wanted.columns, *wanted.conditions):
        if title not in titles:
            sys.exit(f"Table {wanted.table} has no column {title!r}; it has: {', '.join(titles)}.")
    places = [titles.index(title) for title in wanted.columns or titles]
    rows = [
        tuple(row[i] for i in places)
        for row in table.rows
        if all(row[titles.index(c)].plain.startswith(values) for c, values in wanted.conditions.items())
    ]
    if not rows:
        sys.exit(f"No row of table {wanted.table} meets the conditions of {wanted}.")
    chosen = Table(table.name, "", tuple(table.columns[i] for i in places), tuple(rows))
    return "".join(line + "\n" for line in to_markdown(chosen).splitlines() if line.startswith("|"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with results.json and study.yaml")
    parser.add_argument("page", type=Path, help="Markdown file to fill")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
