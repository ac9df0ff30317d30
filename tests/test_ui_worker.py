"""The process behind the page: it may end at any moment, and no model is needed to see what happens then."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from palimpsest.config import parse_config
from palimpsest.files import UserError
from palimpsest.ui import asking
from palimpsest.ui.worker import Worker


@pytest.fixture
def panel(tmp_path: Path) -> asking.Panel:
    source = {"source": "facts", "split": "heldout"}
    recipe: dict[str, Any] = {
        "name": "none",
        "models": {"language_model": "none", "encoder": "none"},
        "data": {"train": {**source, "split": "train"}, "heldout": source},
        "methods": {"full": {"kind": "full", "learning_rate": 1e-3}},
        "evaluation": {"tasks": [{"name": "facts", **source}]},
    }
    return asking.Panel(tmp_path, parse_config(recipe, "test"), {})


def test_a_killed_process_is_one_sentence_and_the_next_question_is_answered(panel: asking.Panel) -> None:
    with closing(Worker(panel, echo)) as worker:
        states = worker.ask(text="slow")
        assert any(state.status == "Loading Base …" for state in states)
        assert re.fullmatch(r"Loading Base … \d+ s", next(states).status)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        *_, last = states
        assert last.status == (
            "The process that holds the models was killed by signal 9, most often because the memory ran out "
            "(at: Loading Base). Ask again: it starts anew."
        )
        assert last.answers == {("full", "text"): "before"}
        assert [state.answers for state in worker.ask(text="quick")][-1] == {("base", "text"): "quick"}
        first = worker.pid
        assert [state.answers for state in worker.ask(text="quick")][-1] == {("base", "text"): "quick"}
        assert worker.pid == first  # the same process
        with pytest.raises(UserError, match="no question"):
            list(worker.ask(text=""))
        assert worker.pid == first
        *_, last = worker.ask(text="broken")
        assert "ended with exit code 1; the terminal says why (at: Loading Base)" in last.status


def test_a_page_that_is_left_stops_the_process(panel: asking.Panel) -> None:
    with closing(Worker(panel, echo)) as worker:
        states = worker.ask(text="slow")
        next(states)
        states.close()  # type: ignore[attr-defined]
        assert worker.pid is None
        assert [state.answers for state in worker.ask(text="quick")][-1] == {("base", "text"): "quick"}
    assert worker.pid is None


def echo(pipe: Connection, panel: asking.Panel) -> None:
    """What a process does without models: it says that it loads one, and gives the question back."""
    while True:
        text = pipe.recv()["text"]
        if not text:
            pipe.send(UserError("There is no question."))
            continue
        pipe.send(asking.State("Loading Base …", {("full", "text"): "before"}, {}))
        if text == "slow":
            time.sleep(60)
        if text == "broken":
            sys.stderr.close()  # what is printed is not looked at here
            raise RuntimeError("broken")
        pipe.send(asking.State("Done.", {("base", "text"): text}, {}))
        pipe.send(None)
