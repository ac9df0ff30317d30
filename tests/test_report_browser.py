"""The report in a real browser: it works from disk without a network, and what a model wrote runs nowhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser import axe, chromium, contrast, foreign, overflow, tab_through, visit
from palimpsest.files import read_json, read_jsonl, write_json, write_jsonl
from palimpsest.report.inputs import read_inputs
from palimpsest.report.page import tables_of, write_report
from palimpsest.report.side_by_side import write_comparison
from palimpsest.report.table import Table, to_csv, to_latex, to_markdown
from palimpsest.study.live import Progress
from report_fixture import invented_results, make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

SCRIPT = "<script>window.hacked=1</script>"
IMAGE = '"><img src=x onerror=window.hacked=1>'
# The tips that show when the pointer rests on the middle of each mark: of its box as far as it is inside the drawing,
# or of its line.
POINT_AT_MARKS = """drawing => {
    const frame = drawing.getBoundingClientRect();
    const middle = (mark) => {
        const box = mark.getBoundingClientRect();
        const between = (low, high, least, most) => (Math.max(low, least) + Math.min(high, most)) / 2;
        return [between(box.left, box.right, frame.left, frame.right),
                between(box.top, box.bottom, frame.top, frame.bottom)];
    };
    const half = (path) => {
        const point = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM());
        return [point.x, point.y];
    };
    return Array.from(drawing.querySelectorAll('g:has(> title)'), (mark) => {
        const path = mark.querySelector('path');
        const hits = [middle(mark), ...(path ? [half(path)] : [])].map((at) => document.elementFromPoint(...at));
        return hits.map((hit) => hit?.closest('g:has(> title)')).find(Boolean)?.querySelector('title').textContent;
    }).filter(Boolean);
}"""
# Whether the event came, or had come, within ten seconds; wait_for_function would need an eval, which the page forbids.
WAIT_FOR = """(audio, event) => (event === 'ended' ? audio.ended : audio.readyState > 0) || new Promise((tell) => {
    audio.addEventListener(event, () => tell(true));
    setTimeout(() => tell(false), 10000);
})"""
PAPER_WIDTH, PAPER_HEIGHT = 700, 1040  # CSS pixels, A4 between its margins
# What elements say, without the small print of a row's second line.
TEXTS = """of => Array.from(document.querySelectorAll(of), (element) => {
    const copy = element.cloneNode(true);
    for (const small of copy.querySelectorAll('small')) small.remove();
    return copy.textContent;
})"""
# Words (of letters, digits, underscores) of tables that stand in two lines.
CUT_WORDS = r"""() => Array.from(document.querySelectorAll('.table :is(th, td)')).flatMap((cell) => {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    const cut = [];
    while (walker.nextNode()) {
        for (const word of walker.currentNode.data.matchAll(/[\w.]+/g)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            const lines = Array.from(range.getClientRects(), (box) => Math.round(box.top));
            if (new Set(lines).size > 1) cut.push(word[0]);
        }
    }
    return cut;
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an invented run with hostile text wherever a model, a data set or a user can put some."""
    run = make_run(tmp_path_factory.mktemp("run"), hostile=True)
    results = read_json(run / "results.json")
    results["claims"][0]["statement"] = SCRIPT + IMAGE
    for row in results["qa"]:
        if row["method"] == "lora_r16":
            row["method"] = IMAGE
        if row["task"] == "facts":
            row["task"] = IMAGE
    write_json(run / "results.json", results)
    (run / "methods" / "lora_r16").rename(run / "methods" / IMAGE)
    for folder in [*run.glob("base/samples/facts-*"), *run.glob("methods/*/samples/facts-*")]:
        rows = read_jsonl(folder / "samples.jsonl")
        rows[0] |= {"response": SCRIPT + IMAGE, "question": SCRIPT + "why?" + IMAGE, "answers": [IMAGE, SCRIPT]}
        write_jsonl(folder / "samples.jsonl", rows)
        folder.rename(folder.with_name(f"{IMAGE}-{folder.name.rpartition('-')[2]}"))
    return write_report(run)


@pytest.fixture(scope="module")
def pages(report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report; the page of a study after its first measurement; runs side by side, as they are published."""
    folder = tmp_path_factory.mktemp("pages")
    later = {"maps", "samples", "data", *invented_results()} - {"layers"}
    progress = Progress(("data", "base/importance"), ("methods/full/checkpoint", "maps"), 200.0, ("maps",), "12:00")
    runs = [make_run(folder / name, without={"maps", "samples", "data"}) for name in "abc"]
    paired: dict[str, Any] = {"metric": "token_sequence", "accuracy": [], "perplexity": []}
    paired["not_compared"] = ["The runs have different questions."]
    links = [f"{run.name}/report.html" for run in runs]
    return {
        "report": report,
        "unfinished": write_report(make_run(folder / "unfinished", without=later), progress=progress),
        "comparison": write_comparison(runs, paired, folder / "index.html", pages=links),
    }


@pytest.fixture(scope="module")
def tables(report: Path) -> dict[str, Table]:
    return tables_of(read_inputs(report.parent))


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The open report; at the end of every test it must have kept quiet and asked for nothing."""
    with visit(browser, report.as_uri()) as (page, log):
        yield page
        assert log.problems == []
        assert foreign(log, report.as_uri()) == []


def test_hostile_text_stays_text(page: Page) -> None:
    assert page.evaluate("window.hacked") is None
    # The content security policy would stop a script that got in: so look for the elements, too.
    assert page.locator("img, iframe, object, embed").count() == 0
    assert page.locator("script").count() == 1
    assert page.evaluate(
        "Array.from(document.querySelectorAll('*')).every(e => e.getAttributeNames().every(n => !n.startsWith('on')))"
    )
    answer = page.locator(".response", has_text="window.hacked")
    assert answer.count() >= 5
    assert answer.first.text_content() == SCRIPT + IMAGE
    assert page.locator("summary bdi", has_text="why?").text_content() == SCRIPT + "why?" + IMAGE
    assert page.locator(".gold bdi", has_text="hacked").text_content() == f"{IMAGE} · {SCRIPT}"
    assert page.locator("#table-claims td", has_text="hacked").first.text_content() == SCRIPT + IMAGE
    assert page.locator("h3", has_text="hacked").text_content() == IMAGE
    assert page.locator(".answers tbody th", has_text="hacked").first.text_content() == IMAGE


@pytest.mark.parametrize(("name", "column"), [("comparisons", "p"), ("accuracy", "T2T %"), ("accuracy", "Method")])
def test_tables_sort_by_click_and_by_keyboard(page: Page, tables: dict[str, Table], name: str, column: str) -> None:
    """First ascending, then descending; what is not there comes last both times."""
    table, shown = tables[name], page.locator(f"#table-{name}")
    index = [c.title for c in table.columns].index(column)
    assert len({row[index].sort for row in table.rows}) > 2  # there is something to sort
    head = shown.locator("thead th").nth(index)

    head.get_by_role("button").click()
    ascending = _sorted(table.rows, index, descending=False)
    assert head.get_attribute("aria-sort") == "ascending"
    assert _rows(shown) == _written(ascending)

    page.keyboard.press("Enter")  # the button kept the focus
    assert head.get_attribute("aria-sort") == "descending"
    assert _rows(shown) == _written(_sorted(ascending, index, descending=True))

    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")  # the button of the column before
    assert head.get_attribute("aria-sort") is None
    before = shown.locator("thead th").nth(index - 1)
    assert before.get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("name", ["claims", "accuracy"])
def test_tables_are_copied_in_three_forms(page: Page, tables: dict[str, Table], name: str) -> None:
    block = page.locator(".table", has=page.locator(f"#table-{name}"))
    for title, write in (("Markdown", to_markdown), ("LaTeX", to_latex), ("CSV", to_csv)):
        block.get_by_role("button", name=title, exact=True).click()
        page.get_by_text(f"Copied as {title}.").wait_for(state="attached")
        assert page.evaluate("navigator.clipboard.readText()") == write(tables[name])


def test_figures_show_and_tell_their_values(page: Page) -> None:
    drawings = page.locator("svg.drawing").all()
    assert len(drawings) >= 7
    for drawing in drawings:
        drawing.scroll_into_view_if_needed()
        box = drawing.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 100
        told = drawing.evaluate(POINT_AT_MARKS)
        if drawing.locator("title").count():
            assert told, drawing.get_attribute("aria-label")
            assert all(re.search(r"\d", tip) for tip in told)
    assert page.locator("svg.drawing:has(title)").count() >= 5


def test_the_spoken_question_plays(page: Page) -> None:
    """A tone of a fifth of a second, from the page itself and by keyboard."""
    player = page.locator("audio").first
    player.scroll_into_view_if_needed()
    assert player.evaluate(WAIT_FOR, "loadedmetadata")
    assert player.evaluate("audio => audio.duration") == pytest.approx(0.2, abs=0.06)
    player.focus()
    page.keyboard.press("Space")
    assert player.evaluate(WAIT_FOR, "ended")
    assert player.evaluate("audio => audio.error") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(browser: Browser, report: Path, scheme: Any) -> None:
    with visit(browser, report.as_uri(), color_scheme=scheme) as (page, log):
        for selector in (
            "p.lede",
            ".note",
            "figcaption",
            "td small",
            ".verdict",
            "nav a",
            "svg.drawing",
            ".published td",
        ):
            assert contrast(page, selector) >= 4.5, selector  # WCAG AA
        red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert red > 200 if scheme == "light" else red < 50
        assert overflow(page) == 0
    assert log.problems == []


def test_a_narrow_window_needs_no_sideways_scrolling(browser: Browser, report: Path) -> None:
    """320 px: a page of 1280 at 400 % (WCAG 1.4.10). Wide tables have a box of their own; the claims are sentences."""
    with visit(browser, report.as_uri(), viewport={"width": 320, "height": 800}) as (page, log):
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert overflow(page) == 0
        assert page.locator("#table-accuracy").is_visible()
        box = page.locator(".scroll", has=page.locator("#table-claims"))
        assert box.evaluate("box => box.scrollWidth - box.clientWidth") == 0
        named = "cell => getComputedStyle(cell, '::before').content"
        assert box.locator("tbody tr").first.locator("td").first.evaluate(named) == '"Statement: "'
    assert log.problems == []


PAGES = ("report", "unfinished", "comparison")


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 320)])
def test_axe_finds_nothing_serious(
    browser: Browser, pages: dict[str, Path], name: str, scheme: Any, width: int
) -> None:
    window = {"width": width, "height": 800}
    with visit(browser, pages[name].as_uri(), color_scheme=scheme, viewport=window) as (page, _):
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert axe(page) == []


@pytest.mark.parametrize("name", PAGES)
def test_tab_reaches_everything_in_order_and_shows_where_it_is(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    controls = "a[href], button, summary, audio, [tabindex]"
    with visit(browser, pages[name].as_uri()) as (page, log):
        stops = tab_through(page)
        n_controls = page.evaluate(
            f"Array.from(document.querySelectorAll('{controls}')).filter(it => it.checkVisibility()).length"
        )
        places = [stop.at for stop in stops]
        assert places == sorted(places)
        assert len(set(places)) == n_controls > 10
        assert [stop.html for stop in stops if not stop.is_seen] == []
    assert log.problems == []


def test_paper_is_white_complete_and_wide_enough(browser: Browser, report: Path) -> None:
    window = {"width": PAPER_WIDTH, "height": 1000}
    with visit(browser, report.as_uri(), viewport=window, color_scheme="dark") as (page, log):
        closed = "document.querySelectorAll('details:not([open]):not(.sample)').length"
        n_closed = page.evaluate(closed)
        page.evaluate(f"addEventListener('beforeprint', () => {{ window.closedOnPaper = {closed}; }})")
        page.emulate_media(media="print")
        assert contrast(page, "body") == pytest.approx(21)
        assert not page.locator("nav").is_visible()
        assert page.locator(".copy:visible").count() == 0
        assert page.pdf().startswith(b"%PDF")
        assert page.evaluate("window.closedOnPaper") == 0
        assert page.evaluate(closed) == n_closed > 0  # and the screen is as it was
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert overflow(page) == 0
        cut = "Array.from(document.querySelectorAll('.scroll'), part => part.scrollWidth - part.clientWidth)"
        assert max(page.evaluate(cut)) <= 1  # nothing hides in a box that paper cannot scroll
    assert log.problems == []


def test_on_paper_no_word_of_a_table_is_cut_and_no_figure_is_higher_than_a_page(browser: Browser, report: Path) -> None:
    window = {"width": PAPER_WIDTH, "height": 1000}
    with visit(browser, report.as_uri(), viewport=window) as (page, log):
        page.emulate_media(media="print")
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert page.evaluate(CUT_WORDS) == []
        page.locator("svg.drawing").last.evaluate("drawing => drawing.setAttribute('height', '2000pt')")
        heights = page.locator("figure").evaluate_all("all => all.map(figure => figure.offsetHeight)")
        assert 500 < max(heights) < PAPER_HEIGHT
    assert log.problems == []


def test_pages_of_paper_begin_with_the_head_of_their_table_and_end_with_no_heading(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    """As the text of a PDF has them."""
    if (reader := shutil.which("pdftotext")) is None:
        pytest.skip("there is no pdftotext here (poppler-utils)")
    with visit(browser, report.as_uri()) as (page, log):
        page.locator("details:not(.sample)").evaluate_all("all => all.forEach(part => part.open = true)")
        headings, heads, rows = (
            {"".join(text.split()) for text in page.evaluate(TEXTS, of)} - {""}
            for of in ("h2, h3, caption, details[open] > summary, thead tr", ".table thead tr", ".table tbody tr")
        )
        page.pdf(path=tmp_path / "report.pdf", format="A4")
    read = [reader, "-layout", tmp_path / "report.pdf", "-"]
    text = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    pages = [["".join(line.split()) for line in page.split("\n") if line.strip()] for page in text.split("\f")]
    first, last = ({lines[at] for lines in pages if lines} for at in (0, -1))
    assert len(first & heads) >= 2  # of tables that are continued
    assert first & rows == set()
    assert last & headings == set()
    assert log.problems == []


def _sorted(rows: Any, index: int, descending: bool) -> list[Any]:
    there = [row for row in rows if row[index].sort is not None]
    absent = [row for row in rows if row[index].sort is None]
    return sorted(there, key=lambda row: _natural(row[index].sort), reverse=descending) + absent


def _natural(value: float | str) -> Any:
    """Numbers in texts count as numbers: rank 8 before rank 16."""
    if not isinstance(value, str):
        return value
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", value)]


def _written(rows: Any) -> list[list[str]]:
    return [[f"{cell.text} {cell.detail}".strip() for cell in row] for row in rows]


def _rows(shown: Locator) -> list[list[str]]:
    return shown.evaluate("table => Array.from(table.tBodies[0].rows, r => Array.from(r.cells, c => c.textContent))")
