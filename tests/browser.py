"""A page in a real headless Chromium, with everything noted that it says on its console or asks of a network.

    with chromium() as browser, visit(browser, url) as (page, log):
        ...
    assert log.problems == []

The browser is the system's: playwright brings the driver, and no browser is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 10_000  # ms, for anything the page should do by itself; a busy machine needs some of it
AXE = "PALIMPSEST_TEST_AXE"  # names axe.min.js of axe-core; CONTRIBUTING.md says where it comes from
OWN_SCHEMES = ("data:", "blob:", "about:")  # nothing leaves the page for these


@dataclass
class Log:
    """What one visit left behind."""

    problems: list[str] = field(default_factory=list)  # console errors, console warnings, uncaught exceptions
    requests: list[str] = field(default_factory=list)  # addresses, the page's own included


@contextmanager
def chromium(*arguments: str) -> Iterator[Browser]:
    """A running browser, given `arguments`; the test is skipped where none is installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"there is no Chromium here: none of {', '.join(NAMES)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, **options: Any) -> Iterator[tuple[Page, Log]]:
    """`url`, loaded, in a window of its own. options: of `Browser.new_context` (viewport, color_scheme …)."""
    context = browser.new_context(reduced_motion="reduce", **options)
    context.set_default_timeout(WAIT)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, log = context.new_page(), Log()
    page.on("console", lambda said: log.problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: log.problems.append(str(error)))
    page.on("request", lambda request: log.requests.append(request.url))
    try:
        page.goto(url)
        yield page, log
    finally:
        context.close()


def foreign(log: Log, origin: str) -> list[str]:
    """The requests that went anywhere but to `origin` (an address, or the start of one)."""
    return [url for url in log.requests if not url.startswith((origin, *OWN_SCHEMES))]


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than its window: what a reader would have to scroll sideways."""
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


def axe(page: Page) -> list[str]:
    """What axe-core finds serious or critical; the test is skipped where AXE does not say where it is.

    Shades behind tables are taken away: axe gives no verdict on text over a gradient.
    """
    if not (file := os.environ.get(AXE)):
        pytest.skip(f"{AXE} does not name axe.min.js")
    page.evaluate(Path(file).read_text(encoding="utf-8"))
    found: list[str] = page.evaluate(
        """async () => {
            for (const box of document.querySelectorAll('.scroll')) box.style.background = 'none';
            const { violations } = await axe.run(document, { resultTypes: ['violations'] });
            return violations.filter(({ impact }) => ['serious', 'critical'].includes(impact)).flatMap(
                ({ id, help, nodes }) => nodes.map(({ html }) => `${id}: ${help}: ${html.slice(0, 200)}`));
        }"""
    )
    return found


@dataclass(frozen=True)
class Stop:
    """Where the keyboard's focus was."""

    at: int  # of all elements of the page, in their order
    html: str
    is_seen: bool  # inside the window and with an outline


def tab_through(page: Page, most: int = 2000) -> list[Stop]:
    """Every stop of the Tab key from the top of the page until the focus leaves it."""
    stops: list[Stop] = []
    while len(stops) < most:
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
                const element = document.activeElement;
                if (!element || element === document.body) return null;
                const box = element.getBoundingClientRect();
                const { outlineStyle, outlineWidth } = getComputedStyle(element);
                return {
                    at: Array.from(document.querySelectorAll('*')).indexOf(element),
                    html: element.outerHTML.slice(0, 100),
                    is_seen: outlineStyle !== 'none' && parseFloat(outlineWidth) >= 1 &&
                        box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
                };
            }"""
        )
        if stop is None:
            return stops
        stops.append(Stop(**stop))
    raise AssertionError(f"the focus is still in the page after {most} stops: {stops[-1].html}")


def contrast(page: Page, selector: str) -> float:
    """WCAG contrast ratio (1 to 21) of the text colour of the first `selector` and what is painted behind it."""
    ink, ground = page.locator(selector).first.evaluate(
        """element => {
            let behind = element;
            const clear = (colour) => /, 0\\)$|transparent/.test(colour);
            const ground = () => getComputedStyle(behind).backgroundColor;
            while (behind.parentElement && clear(ground())) behind = behind.parentElement;
            return [getComputedStyle(element).color, ground()];
        }"""
    )
    light, dark = sorted((_luminance(ink), _luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    """Relative luminance of an `rgb(…)`, opaque (WCAG 2.2)."""
    match = re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour)
    assert match is not None, f"not an opaque colour: {colour}"
    channels = [int(value) / 255 for value in match.groups()]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
