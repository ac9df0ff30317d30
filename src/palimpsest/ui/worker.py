"""The process that holds the models. It may be killed, for want of memory too: the page stays, and the next question
starts another one.

>>> for state in Worker(panel).ask(text="What is the capital of France?"):  # doctest: +SKIP
...     print(state.status)
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from palimpsest.files import UserError
from palimpsest.ui.asking import Kept, Panel, State, ask_everyone

TICK = 1.0  # s between two signs of life while a model loads or answers
STOPPING = 5.0  # s that a process has to end by itself


class Worker:
    """Asks the models of a panel in a process of its own, one question at a time."""

    def __init__(self, panel: Panel, work: Callable[[Connection, Panel], None] | None = None) -> None:
        """work: what the process does; default: it answers by the models."""
        self.panel, self._work = panel, work or _work
        self._running: tuple[BaseProcess, Connection] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._running is None else self._running[0].pid

    def ask(self, **question: Any) -> Iterator[State]:
        """The states of `ask_everyone`, and every second the last one with the time that it has taken.

        Where the process ends in the midst of it, the last state says so and has the answers so far. Where the states
        are not taken to the end, the process is stopped.

        Raises:
            UserError: as `ask_everyone`.
        """
        process, pipe = self._started()
        state, since, done = State("Starting …", {}, {}), time.monotonic(), False
        error: UserError | None = None
        try:
            pipe.send(question)
            while True:
                while not pipe.poll(TICK):
                    yield replace(state, status=f"{state.status} {time.monotonic() - since:.0f} s")
                message = pipe.recv()
                if not isinstance(message, State):
                    error, done = message, True
                    break
                state, since = message, time.monotonic()
                yield state
        except (EOFError, OSError):
            process.join(STOPPING)
            yield replace(state, status=_ended(process.exitcode, state.status))
        finally:
            if not done:
                self.close()
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process, if there is one."""
        if self._running is not None:
            (process, pipe), self._running = self._running, None
            pipe.close()
            process.terminate()
            process.join(STOPPING)
            if process.is_alive():
                process.kill()
                process.join()

    def _started(self) -> tuple[BaseProcess, Connection]:
        if self._running is None or not self._running[0].is_alive():
            self.close()
            context = multiprocessing.get_context("spawn")  # a fork would share the page's threads and their locks
            here, there = context.Pipe()
            process = context.Process(
                target=self._work, args=(there, self.panel), daemon=True, name="palimpsest-models"
            )
            process.start()
            there.close()  # so that the end of the process ends what is read here
            self._running = process, here
        return self._running


def _work(pipe: Connection, panel: Panel) -> None:
    """In the process: answer what comes, a state at a time; then None, or the UserError that there is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the page's, which then ends this process
    kept = Kept()
    with suppress(EOFError, BrokenPipeError):  # the page is gone
        while True:
            question = pipe.recv()
            try:
                for state in ask_everyone(panel, kept=kept, **question):
                    pipe.send(state)
                pipe.send(None)
            except UserError as error:
                pipe.send(error)


def _ended(code: int | None, status: str) -> str:
    """Why there is no further answer, in a sentence."""
    how = f"ended with exit code {code}; the terminal says why"
    if code is not None and code < 0:
        how = f"was killed by signal {-code}"
        if -code == signal.SIGKILL:
            how += ", most often because the memory ran out"
    return f"The process that holds the models {how} (at: {status.removesuffix(' …')}). Ask again: it starts anew."
