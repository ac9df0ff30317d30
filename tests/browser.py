"""A page in a real headless Chromium, with everything noted that it says on its console or asks of a network.

    with chromium() as browser, visit(browser, url) as (page, log):
        ...
    assert log.problems == []

The browser is the system's: playwright brings the driver, and no browser is downloaded.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 10_000  # ms, for anything the page should do by itself; a busy machine needs some of it
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
