"""A table as a value, made from a list of columns and the records that are its rows, and its renderings.

A column knows its title and how a record becomes its cell. The renderings: HTML, Markdown, LaTeX, CSV, plain text.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from markupsafe import Markup, escape

from palimpsest.report.inputs import having

DASH = "–"  # no such number
_LONG_WORD = re.compile(r"\S{17,}")
_PART_OF_WORD = re.compile(r"[^_/.=]{1,12}[_/.=]?|[_/.=]")  # parts end after what joins them
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


def holm_over(row: Row) -> str:
    """How many tests the row's p is corrected for, or why it is none of them; a dash in records that do not say."""
    if row.get("left_out"):
        return str(row["left_out"])
    return DASH if row.get("n_family") is None else str(row["n_family"])


def interval(low: float | None, high: float | None, write: Callable[[float], str] = percent) -> str:
    """`low to high`, written like the values they belong to; empty where there is none."""
    return "" if low is None or high is None else f"{write(low)} to {write(high)}"


def fitting(value: float, low: float, high: float, unit: float = 1.0) -> tuple[str, str, str]:
    """A value and the ends of its interval times `unit`, with a true minus and the digits that the interval carries.

    Of its half, two where they are below 30, else one. 0.04583 in 0.0330 to 0.0596 is 0.046 in 0.033 to 0.060.
    """
    scaled = (unit * value, unit * low, unit * high)
    half = (scaled[2] - scaled[1]) / 2
    digits = -math.floor(math.log10(half / 3)) if math.isfinite(half) and half > 0 else None
    if digits is None or digits > 4:
        first, second, third = (_true_minus(significant(it, 2)) for it in scaled)
    else:
        first, second, third = (_true_minus(f"{it:.{max(0, digits)}f}") for it in scaled)
    return first, second, third


def _true_minus(written: str) -> str:
    """And none before a zero."""
    sign, rest = ("−", written[1:]) if written.startswith("-") else ("", written)
    return rest if not rest.strip("0.") else sign + rest


def points_fitting(value: float, low: float, high: float) -> tuple[str, str, str]:
    """The same of a difference of shares in percentage points, always with its sign."""
    first, second, third = (
        it if it.startswith("−") or not it.strip("0.") else f"+{it}" for it in fitting(value, low, high, 100)
    )
    return first, second, third


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


def mean(values: Sequence[float | None], detail: str = "") -> Cell:
    """The mean of perplexities; None stands for one that is not finite."""
    finite = [value for value in values if value is not None]
    return number(fmean(finite), detail=detail) if len(finite) == len(values) else Cell(NOT_FINITE, detail, math.inf)


def median_log(values: Sequence[float | None], wholes: Sequence[float | None] = (1.0,)) -> tuple[float, float, float]:
    """(median, smallest, largest) of ln(value / whole), the wholes repeated as needed; None: beyond a float, so ∞.

    What random masks do varies by orders of magnitude, so a mean would be that of the worst one.
    """
    whole = [math.inf if value is None else math.log(value) for value in wholes]
    logs = [math.inf if value is None else math.log(value) for value in values]
    ratios = [log - whole[i % len(whole)] for i, log in enumerate(logs)]
    return median(ratios), min(ratios), max(ratios)


def middle(values: Sequence[float | None], condition: str) -> float:
    """Of perplexities: the mean, ∞ where one is not finite; of random masks the median, which one of many is not."""
    if condition == "random":
        return math.exp(median_log(values)[0])
    finite = [value for value in values if value is not None]
    return fmean(finite) if len(finite) == len(values) else math.inf


def median_perplexity(values: Sequence[float | None], detail: str = "") -> Cell:
    """The median (of the logarithms) of perplexities; None stands for one that is not finite."""
    log = median_log(values)[0]
    return number(math.exp(log), detail=detail) if math.isfinite(log) else Cell(NOT_FINITE, detail, math.inf)


def count(value: int) -> Cell:
    return Cell(f"{value:,}".replace(",", "\u202f"), sort=value)


EMPTY = Cell(DASH)


# ----------------------------------------------------------------------------------------------------------
# Columns: what stands at their head, and how a row of records becomes their cell
# ----------------------------------------------------------------------------------------------------------
Row = Mapping[str, Any]  # a record, or a group of records as `grouped` makes it
Rows = Sequence[Row]
Field = tuple[Column, Callable[[Row], Cell]]


def table(name: str, title: str, fields: Iterable[Field], rows: Iterable[Row], note: str = "") -> Table:
    """The table whose columns are `fields`, with a line for each of `rows`; those with `published` are marked so."""
    fields, rows = list(fields), list(rows)
    published = frozenset(index for index, row in enumerate(rows) if row.get("published"))
    lines = tuple(tuple(cell(row) for _, cell in fields) for row in rows)
    return Table(name, title, tuple(column for column, _ in fields), lines, note, published)


def words(title: str, key: str, say: Callable[[Any], str] = str, prose: bool = False) -> Field:
    return Column(title, prose=prose), lambda row: text(say(row[key]))


def counts(title: str, key: str) -> Field:
    """Whole numbers; a dash where a record has none."""
    return Column(title, numeric=True), lambda row: count(row[key]) if key in row else EMPTY


def numbers(title: str, key: str, write: Callable[[float], str] = significant) -> Field:
    """Numbers as `write` writes them; a dash for null."""
    return cells(title, lambda row: number(row[key], None if row[key] is None else write(row[key])))


def ranges(title: str, key: str, write: Callable[[float], str] = significant) -> Field:
    """Numbers with the interval from `ci_low` to `ci_high`."""
    value = numbers(title, key, write)[1]
    return cells(title, lambda row: replace(value(row), detail=interval(row["ci_low"], row["ci_high"], write)))


def cells(title: str, of: Callable[[Row], Cell]) -> Field:
    """A numeric column whose cell is `of(row)`."""
    return Column(title, numeric=True), of


def where(field: Field, **wanted: Any) -> Field:
    """`field` of the record of a group that has the `wanted` values; a dash where none has them."""
    column, cell = field
    return column, lambda group: cell(found[-1]) if (found := having(group["rows"], **wanted)) else EMPTY


def grouped(records: Iterable[Row], *keys: str) -> list[dict[str, Any]]:
    """The records that agree in `keys`, as one row of a table: these keys, and the records as `rows`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return [{**dict(zip(keys, values, strict=True)), "rows": rows} for values, rows in groups.items()]


# ----------------------------------------------------------------------------------------------------------
# Renderings
# ----------------------------------------------------------------------------------------------------------
def to_html(table: Table) -> Markup:
    """A `<table>` with caption, header scopes and sort keys; every text escaped."""
    # Strings that are put together from escaped parts: Markup.format takes minutes for the tables of many methods.
    # Several columns of sentences: in a narrow window each row is a card, whose cells say their column.
    is_cards = sum(column.prose for column in table.columns) > 1
    labels = [f' data-label="{escape(column.title)}"' if is_cards else "" for column in table.columns]
    kind = ' class="cards"' if is_cards else ""
    lines = [f'<table id="table-{escape(table.name)}"{kind}><caption>{escape(table.title)}</caption>']
    heads = [f'<th scope="col"{_class(column)}>{_breakable(column.title)}</th>' for column in table.columns]
    lines.append(f"<thead><tr>{''.join(heads)}</tr></thead><tbody>")
    tags = ['th scope="row"', *["td"] * (len(table.columns) - 1)]
    for index, row in enumerate(table.rows):
        cells = [_html_cell(*of) for of in zip(tags, row, table.columns, labels, strict=True)]
        kind = ' class="published"' if index in table.published else ""
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    lines.append("</tbody></table>")
    return Markup("\n".join(lines))


def _class(column: Column) -> str:
    return ' class="number"' if column.numeric else ' class="prose"' if column.prose else ""


def _html_cell(tag: str, cell: Cell, column: Column, label: str) -> str:
    order = "" if cell.sort is None else f' data-sort="{escape(cell.sort)}"'
    detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<{tag}{_class(column)}{order}{label}>{_breakable(cell.text)}{detail}</{tag[:2]}>"


def _breakable(text: str) -> Markup:
    """`text`, escaped; its words of more than 16 letters may go on in another line, where a cell may have lines."""
    parted = _LONG_WORD.sub(lambda word: "\0".join(_PART_OF_WORD.findall(word[0])), text)
    return Markup("<wbr>").join(parted.split("\0"))


def to_markdown(table: Table) -> str:
    head = [_markdown(column.title) for column in table.columns]
    rule = ["---:" if column.numeric else "---" for column in table.columns]
    rows = [[_markdown(cell.plain) for cell in row] for row in table.rows]
    note = f"\n\n{_markdown(table.note)}" if table.note else ""
    return f"**{_markdown(table.title)}**\n\n" + "\n".join(map(_line, (head, rule, *rows))) + note + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(value: str) -> str:
    return re.sub(r"[\\`*_|<>\[\]]", r"\\\g<0>", " ".join(_printable(value).split()))


def inline_markdown(value: str) -> str:
    """A text that stays text inside Markdown, and readable: escaped only where it would be taken for markup."""
    return re.sub(r"[\\`*|]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)|(?<=\])\(", r"\\\g<0>", _printable(value))


def _printable(value: str) -> str:
    """On one line and without control characters, of which terminals make commands."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", value)


def to_plain(table: Table) -> str:
    """Columns that line up in a terminal; without title and note, and without a head where no column has a title."""
    lines = _aligned(table, [[_printable(cell.plain) for cell in row] for row in table.rows], _printable)
    untitled = not any(column.title for column in table.columns)
    return "\n".join("  " + "  ".join(line).rstrip() for line in lines[untitled:])


def to_aligned_markdown(table: Table) -> str:
    """Markdown that lines up as plain text too; without title and note."""
    head, *rows = _aligned(
        table, [[inline_markdown(cell.plain) for cell in row] for row in table.rows], inline_markdown
    )
    rule = "|" + "|".join("-" * (len(title) + 2) for title in head) + "|"
    return "\n".join([_line(head), rule, *map(_line, rows)])


def _aligned(table: Table, rows: Sequence[Sequence[str]], title: Callable[[str], str]) -> list[list[str]]:
    """The titles and `rows`, every text as wide as its column, words to the left and numbers to the right."""
    lines = [[title(column.title) for column in table.columns], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        [
            value.rjust(width) if column.numeric else value.ljust(width)
            for value, width, column in zip(line, widths, table.columns, strict=True)
        ]
        for line in lines
    ]


def to_latex(table: Table) -> str:
    """A `table` environment; needs the package booktabs."""
    layout = "".join("r" if column.numeric else "l" for column in table.columns)
    body = [" & ".join(_latex(cell.plain) for cell in row) + r" \\" for row in table.rows]
    head = " & ".join(_latex(column.title) for column in table.columns) + r" \\"
    caption = " ".join(part for part in (f"{table.title}.", table.note) if part)
    opening = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(caption)}}}", rf"\begin{{tabular}}{{{layout}}}"]
    closing = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*opening, r"\toprule", head, r"\midrule", *body, *closing])


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "{}$&%#_"},
        "\\": r"\textbackslash{}",
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
)


def _latex(value: str) -> str:
    return " ".join(value.split()).translate(_LATEX)


def to_csv(table: Table) -> str:
    """Text, and in a column of its own the interval or range, where a column has any."""
    with_detail = [any(row[i].detail for row in table.rows) for i in range(len(table.columns))]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head = [(_csv(column.title), _csv(f"{column.title}, range")) for column in table.columns]
    for row in (head, *([(_csv(cell.text), _csv(cell.detail)) for cell in row] for row in table.rows)):
        pairs = zip(row, with_detail, strict=True)
        writer.writerow([part for of, detailed in pairs for part in of[: 1 + detailed]])
    return stream.getvalue()


def _csv(value: str) -> str:
    """Plain digits for programs: true minus, dash and thin space are for readers.

    Words that a spreadsheet would take for a formula have an apostrophe in front; numbers and ranges of them have not.
    """
    value = "" if value == DASH else value.replace("−", "-").replace("\u202f", "")
    formula = value.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBERS.fullmatch(value)
    value = value.replace("\r", " ")  # which csv does not quote before Python 3.13
    return f"'{value}" if formula else value


_NUMBERS = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?( to [+-]?[\d.]+(e[+-]?\d+)?)?")
