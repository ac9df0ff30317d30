"""A table as a value, how its numbers are written, and its four renderings: HTML, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

DASH = "–"  # no such number
NOT_FINITE = "not finite"  # results.json stores null for it


@dataclass(frozen=True)
class Cell:
    """What a reader sees (`text`, with a smaller `detail`) and what the column sorts by."""

    text: str
    detail: str = ""
    sort: float | str | None = None

    @property
    def plain(self) -> str:
        return f"{self.text} [{self.detail}]" if self.detail else self.text


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = False
    prose: bool = False  # may break into lines


@dataclass(frozen=True)
class Table:
    """`published` marks the rows that show the paper's numbers; such rows also say so in their first cell."""

    name: str  # a short identifier: letters, digits, underscores
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    published: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name}: a row has {len(row)} cells, not {len(self.columns)}")


# ----------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------
def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, no exponent below 100 000: 2.08, 114000 → 1.14e5, 0.000123 → 1.23e-4."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -3 <= power < 5:
        return f"{float(f'{mantissa}e{power}'):.{max(0, digits - 1 - power)}f}"
    return f"{mantissa}e{power}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as percent, without the sign: the column says it."""
    return DASH if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, always with its sign (a true minus)."""
    if value is None:
        return DASH
    written = f"{100 * value:+.1f}"
    return "0.0" if float(written) == 0 else written.replace("-", "−")


def p_value(value: float | None) -> str:
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: float | None, high: float | None, number: str = "percent") -> str:
    """`low to high`, written like the values they belong to; empty where there is none."""
    if low is None or high is None:
        return ""
    write = {"percent": percent, "points": points, "significant": significant}[number]
    return f"{write(low)} to {write(high)}"


def seconds(value: float) -> str:
    """1.2 s, 3 min 20 s, 2 h 05 min."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def text(value: str) -> Cell:
    return Cell(value, sort=value.casefold())


def number(value: float | None, written: str | None = None, detail: str = "") -> Cell:
    """A numeric cell; None sorts last and shows as a dash unless `written` says otherwise."""
    return Cell(written if written is not None else (DASH if value is None else significant(value)), detail, value)


def count(value: int) -> Cell:
    return Cell(f"{value:,}".replace(",", "\u202f"), sort=value)


EMPTY = Cell(DASH)


# ----------------------------------------------------------------------------------------------------------
# Renderings
# ----------------------------------------------------------------------------------------------------------
def to_html(table: Table) -> Markup:
    """A `<table>` with caption, header scopes and sort keys; every text escaped."""
    lines = [Markup('<table id="table-{}"><caption>{}</caption>').format(table.name, table.title)]
    heads = [Markup('<th scope="col"{}>{}</th>').format(_class(column), column.title) for column in table.columns]
    lines.append(Markup("<thead><tr>{}</tr></thead><tbody>").format(Markup("").join(heads)))
    for index, row in enumerate(table.rows):
        cells = [
            _html_cell(cell, column, first=i == 0)
            for i, (cell, column) in enumerate(zip(row, table.columns, strict=True))
        ]
        kind = Markup(' class="published"') if index in table.published else ""
        lines.append(Markup("<tr{}>{}</tr>").format(kind, Markup("").join(cells)))
    lines.append(Markup("</tbody></table>"))
    return Markup("\n").join(lines)


def _class(column: Column) -> Markup:
    return Markup(' class="number"' if column.numeric else ' class="prose"' if column.prose else "")


def _html_cell(cell: Cell, column: Column, first: bool) -> Markup:
    attributes = _class(column)
    if cell.sort is not None:
        attributes += Markup(' data-sort="{}"').format(cell.sort)
    inner = escape(cell.text)
    if cell.detail:
        inner += Markup(" <small>{}</small>").format(cell.detail)
    if first:
        return Markup('<th scope="row"{}>{}</th>').format(attributes, inner)
    return Markup("<td{}>{}</td>").format(attributes, inner)


def to_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if column.numeric else "---" for column in table.columns]
    rows = [line([_markdown(cell.plain) for cell in row]) for row in table.rows]
    head = line([_markdown(column.title) for column in table.columns])
    note = f"\n\n{_markdown(table.note)}" if table.note else ""
    return f"**{_markdown(table.title)}**\n\n" + "\n".join([head, line(rule), *rows]) + note + "\n"


def _markdown(value: str) -> str:
    value = " ".join(value.split())
    for character in "\\`*_|<>[]":
        value = value.replace(character, "\\" + character)
    return value


def to_latex(table: Table) -> str:
    """A `table` environment; needs the package booktabs."""
    layout = "".join("r" if column.numeric else "l" for column in table.columns)
    body = [" & ".join(_latex(cell.plain) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(_latex(column.title) for column in table.columns) + r" \\"
    caption = " ".join(part for part in (f"{table.title}.", table.note) if part)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(caption)}}}",
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "\u202f": r"\,",
    "≥": r"$\geq$",
    "∞": r"$\infty$",
    "λ": r"$\lambda$",
    "Δ": r"$\Delta$",
}


def _latex(value: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(value.split()))


def to_csv(table: Table) -> str:
    """Text, and in a column of its own the interval or range, where a column has any."""
    with_detail = [any(row[i].detail for row in table.rows) for i in range(len(table.columns))]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head: list[str] = []
    for column, detailed in zip(table.columns, with_detail, strict=True):
        head += [column.title, f"{column.title}, range"] if detailed else [column.title]
    writer.writerow(head)
    for row in table.rows:
        line: list[str] = []
        for cell, detailed in zip(row, with_detail, strict=True):
            value = _csv(cell.text)
            line += [value, _csv(cell.detail)] if detailed else [value]
        writer.writerow(line)
    return stream.getvalue()


def _csv(value: str) -> str:
    """Plain digits for programs: true minus, dash and thin space are for readers."""
    return "" if value == DASH else value.replace("−", "-").replace("\u202f", "")
