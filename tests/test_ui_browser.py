"""The UI in a real browser, on a small run of tiny models."""

from __future__ import annotations

import http.client
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from browser import axe, chromium, foreign, overflow, tab_through, visit
from palimpsest.ui import asking
from ui_fixture import make_ui_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
HOSTILE = '<script>window.hacked=1</script>"><img src=x onerror=window.hacked=1> ${window.hacked=1} {{window.hacked=1}}'
OF_GRADIO = {"Method not implemented."}  # what its waveform says of every recording
LONG = 60_000  # ms, for what loads a model or draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    make_ui_run(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    pytest.importorskip("gradio", reason="Gradio is not installed (extra ui)")
    from palimpsest.ui.server import served

    with served(folder / "run") as page:
        assert page.server_name == "127.0.0.1"
        assert page.share_url is None
        yield page.local_url


@pytest.fixture(scope="module")
def browser(folder: Path, address: str) -> Iterator[Browser]:
    """With a device that plays a file where a microphone would be."""
    fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with chromium(*fake, f"--use-file-for-fake-audio-capture={folder / 'question.wav'}") as running:
        yield running


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with visit(browser, address) as (page, log):
        page.set_default_timeout(LONG)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        yield page
        assert set(log.problems) <= OF_GRADIO
        assert foreign(log, address) == []


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("localhost", 200), ("evil.example", 400)])
def test_a_request_for_another_host_is_refused(address: str, host: str, status: int) -> None:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", parts.port or 80, timeout=30)
    connection.request("GET", "/", headers={"Host": f"{host}:{parts.port}"})
    assert connection.getresponse().status == status


def ask(page: Page) -> None:
    page.get_by_role("button", name="Ask", exact=True).click()
    said = page.get_by_label("Status")
    page.wait_for_function("box => box.value === 'Done.'", arg=said.element_handle())


def box(page: Page, key: str) -> str:
    return page.locator(f"#{key} textarea").input_value()


def test_a_typed_question_is_answered_by_every_model(page: Page, folder: Path) -> None:
    page.get_by_label("Question as text").fill("What is it?")
    ask(page)
    *_, last = asking.ask_everyone(asking.open_panel(folder / "run"), text="What is it?")
    assert box(page, "text-base") == last.answers["base", "text"]
    assert box(page, "text-full") == last.answers["full", "text"]
    assert "is not there" in box(page, "text-lora")


def test_a_recording_from_a_file_is_answered_by_who_can_hear(page: Page, folder: Path) -> None:
    page.get_by_label("Upload file").click()
    page.locator("input[type=file]").first.set_input_files(folder / "question.wav")
    page.locator("audio, .waveform-container, #waveform").first.wait_for(state="attached")
    page.wait_for_timeout(2000)  # the upload
    ask(page)
    *_, last = asking.ask_everyone(asking.open_panel(folder / "run"), audio=folder / "question.wav")
    assert box(page, "speech-full") == last.answers["full", "speech"]
    assert "takes no speech" in box(page, "speech-base")


def test_a_hostile_answer_stays_text(browser: Browser, folder: Path, address: str) -> None:
    from palimpsest.ui.server import served

    def answers(**question: Any) -> Iterator[asking.State]:
        yield asking.State("Done.", {("full", "text"): HOSTILE}, {("base", "text"): HOSTILE})

    with served(folder / "run", ask=answers) as other, visit(browser, other.local_url) as (page, log):
        page.set_default_timeout(LONG)
        page.get_by_label("Question as text").fill(HOSTILE)
        ask(page)
        assert box(page, "text-full") == box(page, "text-base") == HOSTILE
        assert page.evaluate("window.hacked") is None
        assert page.locator("img[src=x]").count() == 0
    assert set(log.problems) <= OF_GRADIO


def test_only_the_chosen_models_are_shown_and_asked(page: Page) -> None:
    page.get_by_role("checkbox", name="Base", exact=True).uncheck()
    page.locator("#text-base").wait_for(state="hidden")
    page.get_by_label("Question as text").fill("What is it?")
    ask(page)
    assert box(page, "text-full")
    page.get_by_role("checkbox", name="Base", exact=True).check()
    page.locator("#text-base textarea").wait_for()
    assert box(page, "text-base") == ""  # it was not asked


def test_after_a_kill_the_page_says_so_and_answers_the_next_question(browser: Browser, folder: Path) -> None:
    from palimpsest.ui.server import served
    from palimpsest.ui.worker import Worker

    with closing(Worker(asking.open_panel(folder / "run"))) as worker:

        def killed_at_first(**question: Any) -> Iterator[asking.State]:
            for state in worker.ask(**question):
                if not killed and state.status.startswith("Loading") and worker.pid is not None:
                    killed.append(worker.pid)
                    os.kill(worker.pid, signal.SIGKILL)
                yield state

        killed: list[int] = []
        with served(folder / "run", ask=killed_at_first) as other, visit(browser, other.local_url) as (page, _):
            page.set_default_timeout(LONG)
            page.get_by_label("Question as text").fill("What is it?")
            page.get_by_role("button", name="Ask", exact=True).click()
            said = page.get_by_label("Status")
            page.wait_for_function("box => box.value.includes('killed by signal 9')", arg=said.element_handle())
            ask(page)
            assert box(page, "text-full")


def test_a_recording_of_the_microphone_is_answered(page: Page) -> None:
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(2000)  # of sound
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator("audio, .waveform-container, #waveform").first.wait_for(state="attached")
    page.wait_for_timeout(2000)  # the upload
    ask(page)
    assert box(page, "speech-full")
    assert "Could not answer" not in box(page, "speech-full")


def test_the_explorer_shows_its_figures(page: Page) -> None:
    page.get_by_role("tab", name="Importance").click()
    for part in ("grids", "matrices"):
        figure = page.locator(f"#{part} img")
        figure.wait_for()
        size = figure.bounding_box()
        assert size is not None
        assert min(size["width"], size["height"]) > 100
    assert "top 5 %" in box(page, "notes")
    assert "maps/importance.npz is not there" in box(page, "missing")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 320), ("dark", 320)])
def test_axe_finds_nothing_serious_and_nothing_needs_sideways_scrolling(
    browser: Browser, address: str, scheme: Any, width: int
) -> None:
    with visit(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800}) as (page, _):
        page.get_by_role("button", name="Ask", exact=True).wait_for(timeout=LONG)
        page.wait_for_timeout(1000)  # colours fade in
        assert overflow(page) == 0
        found = axe(page)
        page.get_by_role("tab", name="Importance").click()
        page.locator("#matrices img").wait_for(timeout=LONG)
        assert overflow(page) == 0
        assert found + axe(page) == []


def test_tab_goes_through_the_page_in_order_and_shows_where_it_is(browser: Browser, address: str) -> None:
    with visit(browser, address) as (page, _):
        for tab in ("Ask", "Importance"):
            page.get_by_role("tab", name=tab).click(timeout=LONG)
            last = (
                page.locator("#matrices img")
                if tab == "Importance"
                else page.get_by_role("button", name=tab, exact=True)
            )
            last.wait_for(timeout=LONG)
            page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            stops = tab_through(page)
            places = [stop.at for stop in stops]
            assert places == sorted(places)
            assert len(set(places)) >= 4
            assert [stop.html for stop in stops if not stop.is_seen] == []
