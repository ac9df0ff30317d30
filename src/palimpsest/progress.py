"""Progress of long work: bars with an estimate of the time left on a terminal, one line per step in a log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, int], None]  # (done, total)
LOG_EVERY = 15.0  # seconds between lines of one step where there is no terminal
# What a terminal obeys instead of showing it: control characters but line feed and tab, and orders to write backwards;
# and half characters (surrogates), which cannot be printed at all.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""`text` as it may be printed on a terminal, whoever wrote it: an escape character as the four characters \x1b."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Reporter:
    """Shows the steps of a study, one after the other, and how far the present one is."""

    def __init__(self, n_steps: int, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.n_steps = n_steps
        self.n_done = 0

    @contextmanager
    def step(self, name: str) -> Iterator[Advance]:
        """Yields the step's `advance(done, total)`; prints one line at its end."""
        self.n_done += 1
        label = printable(f"[{self.n_done:>2}/{self.n_steps}] {name}")
        started = time.monotonic()
        if self.console.is_terminal:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            ) as bars:
                task = bars.add_task(label.replace("[", r"\["), total=None)
                yield lambda done, total: bars.update(task, completed=done, total=total)
        else:
            yield self._log(label, started)
        self.console.print(f"{label}  {time.monotonic() - started:.1f} s", markup=False, highlight=False)

    def note(self, sentence: str) -> None:
        """Something the user should know that stops nothing."""
        self.console.print(printable(f"note: {sentence}"), markup=False, highlight=False, soft_wrap=True)

    def skipped(self, name: str) -> None:
        self.n_done += 1
        line = printable(f"[{self.n_done:>2}/{self.n_steps}] {name}  done before")
        self.console.print(line, markup=False, highlight=False)

    def _log(self, label: str, started: float) -> Advance:
        last, first = started, (0, started)

        def advance(done: int, total: int) -> None:
            nonlocal last, first
            now = time.monotonic()
            n, since = done - first[0], now - first[1]
            if first[0] == 0:
                first = done, now  # what an earlier start did took no time of this one
            if now - last >= LOG_EVERY and n > 0:
                last = now
                left = since / n * (total - done)
                self.console.print(f"{label}  {done}/{total}, about {left:.0f} s left", markup=False, highlight=False)

        return advance
