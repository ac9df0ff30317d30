"""How numbers are written, and that a table says the same in all its renderings."""

from __future__ import annotations

import csv
import io
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from palimpsest.report.table import (
    Cell,
    Column,
    Table,
    inline_markdown,
    interval,
    p_value,
    percent,
    points,
    seconds,
    significant,
    to_aligned_markdown,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
    to_plain,
)


class _Cells(HTMLParser):
    """The texts of a table's cells, and every tag seen."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (2.08, "2.08"),
        (3.0, "3.00"),
        (114_000.0, "1.14e5"),
        (99_999.0, "1.00e5"),
        (12_345.0, "12300"),
        (0.0123456, "0.0123"),
        (0.000123, "1.23e-4"),
        (-0.5, "-0.500"),
        (0.0, "0"),
        (None, "not finite"),
        (math.inf, "not finite"),
    ],
)
def test_three_significant_digits(value: float | None, written: str) -> None:
    assert significant(value) == written


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_significant_is_within_half_a_unit_of_the_third_digit(value: float) -> None:
    assert float(significant(value)) == pytest.approx(value, rel=0.00501)


def test_shares_differences_and_p_values() -> None:
    assert percent(0.26333) == "26.3"
    assert points(-0.2) == "−20.0"
    assert points(0.041) == "+4.1"
    assert points(-0.0001) == "0.0"
    assert (p_value(0.00099), p_value(0.05), p_value(None)) == ("< 0.001", "0.050", "–")
    assert interval(0.1, 0.25) == "10.0 to 25.0"
    assert interval(None, 0.25) == ""
    assert (seconds(3.21), seconds(200), seconds(7500)) == ("3.2 s", "3 min 20 s", "2 h 05 min")


def _table(*rows: tuple[Cell, ...]) -> Table:
    return Table("name", "Title", (Column("A|B"), Column("x %", numeric=True)), rows, "A note & more.")


@given(st.text(max_size=30))
@example('<script>x</script>"><img src=x onerror=y>')
@example("&lt; &amp;")
def test_html_shows_any_text_as_text(text: str) -> None:
    parser = _Cells()
    parser.feed(str(to_html(_table((Cell(text), Cell("1", text, 1.0))))))
    assert set(parser.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "small", "wbr"}
    if "\r" not in text and "\0" not in text:  # HTML parsers change these two
        assert parser.rows[1][0] == text


def test_html_has_caption_scopes_and_sort_keys() -> None:
    html = str(to_html(_table((Cell("a", sort="a"), Cell("1.5", "1 to 2", 1.5)))))
    assert "<caption>Title</caption>" in html
    assert html.count('scope="col"') == 2
    assert '<th scope="row" data-sort="a">a</th>' in html
    assert '<td class="number" data-sort="1.5">1.5 <small>1 to 2</small></td>' in html


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("token_sequence 1", "token_sequence 1"),  # 14 letters
        ("token_sequence_numbers 1", "token_<wbr>sequence_<wbr>numbers 1"),
        ("a methods/full/<b>/importance", "a methods/<wbr>full/<wbr>&lt;b&gt;/<wbr>importance"),
        ("a" * 30, f"{'a' * 12}<wbr>{'a' * 12}<wbr>{'a' * 6}"),
    ],
)
def test_only_long_words_may_be_parted_and_after_what_joins_them(text: str, html: str) -> None:
    cells = str(to_html(_table((Cell(text), Cell("1", sort=1.0)))))
    assert f'<th scope="row">{html}</th>' in cells


def test_markdown_keeps_its_columns() -> None:
    lines = to_markdown(_table((Cell("a|b\nc"), Cell("1", "2 to 3")))).splitlines()
    assert lines[2:5] == [r"| A\|B | x % |", "| --- | ---: |", r"| a\|b c | 1 \[2 to 3\] |"]


def test_plain_text_lines_up() -> None:
    table = _table((Cell("a|b"), Cell("1", "2 to 3")), (Cell("c"), Cell("10")))
    assert to_plain(table).split("\n") == [
        "  A|B         x %",
        "  a|b  1 [2 to 3]",
        "  c            10",
    ]
    untitled = Table("", "", (Column(""), Column("")), ((Cell("a"), Cell("b")), (Cell("cc"), Cell(""))))
    assert to_plain(untitled) == "  a   b\n  cc"
    words = Table("", "", (Column("A"), Column("B")), ((Cell("a|b"), Cell("")),))
    assert to_aligned_markdown(words).split("\n") == ["| A    | B |", "|------|---|", r"| a\|b |   |"]


def test_latex_escapes() -> None:
    latex = to_latex(_table((Cell(r"50_000 \input{x} $y$"), Cell("−3.0 %"))))
    assert r"50\_000 \textbackslash{}input\{x\} \$y\$ & $-$3.0 \% \\" in latex
    assert r"\caption{Title. A note \& more.}" in latex


def test_csv_is_read_back_with_ranges_in_their_own_column() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(_table((Cell('say "a", b'), Cell("−1.0", "−2.0 to 0.0")))))))
    assert rows == [["A|B", "x %", "x %, range"], ['say "a", b', "-1.0", "-2.0 to 0.0"]]


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\tx", "\r=x", "- 5", "−x"])
def test_a_csv_cell_is_no_formula(text: str) -> None:
    table = Table("t", "T", (Column(text),), ((Cell(text, text),),))
    rows = list(csv.reader(io.StringIO(to_csv(table))))
    shown = text.replace("−", "-").replace("\r", " ")
    assert rows == [[f"'{shown}", f"'{shown}, range"], [f"'{shown}", f"'{shown}"]]


@pytest.mark.parametrize("text", ["-1.5", "+4.1", "−20.0", "-1.2e-5", "−2.0 to 0.0", "+0.1 to +0.2", "1.14e5"])
def test_numbers_of_a_csv_stay_numbers(text: str) -> None:
    assert list(csv.reader(io.StringIO(to_csv(_table((Cell("a"), Cell(text)))))))[1] == ["a", text.replace("−", "-")]


def test_a_terminal_gets_no_commands() -> None:
    table = Table("t", "T", (Column("\x1b[2JA"),), ((Cell("\x1b]0;title\x07 x\r\x9b31mred"),),))
    for written in (to_plain(table), to_markdown(table), to_aligned_markdown(table)):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written)
    assert to_plain(table) == "   [2JA\n   ]0;title  x 31mred"


def test_text_in_markdown_is_no_markup() -> None:
    hostile = "<img src=x> `code` **bold** [x](http://y) ![i](z) _a_ a|b \\ \n# head"
    words = Table("", "", (Column("A"),), ((Cell(hostile),),))
    row = to_aligned_markdown(words).split("\n")[2]
    assert row == r"| \<img src=x> \`code\` \*\*bold\*\* [x]\(http://y) ![i]\(z) \_a\_ a\|b \\  # head |"
    assert inline_markdown("layer_lr_inverted: +4.1 [0.2, 8.0], p < 0.001") == (
        "layer_lr_inverted: +4.1 [0.2, 8.0], p < 0.001"
    )


def test_a_row_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 cells, not 2"):
        _table((Cell("a"),))
