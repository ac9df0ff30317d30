"""`palimpsest data inspect`: what is in a source, and what the filters would leave out; nothing is written."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from palimpsest.data.filters import Dropped, Filters, Problem, counts, decode, require_some, take
from palimpsest.data.rows import Names, Row
from palimpsest.data.sources import open_table
from palimpsest.files import read_jsonl
from palimpsest.progress import Reporter

QUANTILES = (0, 5, 50, 95, 100)  # percent
MOST = 12  # voices and kinds shown
SHOWN = 3  # dropped rows of each reason


class Findings:
    """Counts and lengths of the rows seen so far; a few bytes a row."""

    def __init__(self) -> None:
        self.n_rows = 0
        self.question_words, self.answer_words, self.seconds = array("L"), array("L"), array("d")
        self.voices, self.kinds, self.reasons = Counter[str](), Counter[str](), Counter[str]()
        self.dropped: dict[str, list[Dropped]] = defaultdict(list)  # the first few of each reason

    @property
    def n_kept(self) -> int:
        return len(self.question_words)

    def add(self, row: Row, name: str, filters: Filters, strict: str | None) -> None:
        """Count the row, and measure what of it would be kept."""
        self.n_rows += 1
        seconds: list[float] = []

        def measure(recording: Path | bytes) -> Problem | None:
            found = decode(recording, filters)
            if isinstance(found, tuple):
                return found
            seconds.append(found.seconds)
            return None

        found = take(row, name, filters, measure, strict)
        if isinstance(found, Dropped):
            self.reasons[found.reason] += 1
            if self.reasons[found.reason] <= SHOWN:
                self.dropped[found.reason].append(found)
            return
        self.question_words.append(len(row.question.split()))
        self.answer_words.append(len(row.answer.split()))
        self.seconds.extend(seconds)
        self.voices.update([row.voice or "not named"] if seconds else [])
        self.kinds.update([] if row.kind is None else [row.kind])

    def lines(self) -> Iterator[str]:
        yield f"rows            {self.n_rows}: {self.n_kept} usable, {self.reasons.total()} to be dropped"
        for reason, n in self.reasons.most_common():
            yield f"  {reason:<22} {n}"
            yield from (f"      {item.id}: {item.detail}" for item in self.dropped[reason])
        n_silent = self.n_kept - len(self.seconds)
        yield f"recordings      {len(self.seconds)}, {sum(self.seconds) / 3600:.2f} hours; {n_silent} rows without"
        percents = "  ".join("min" if q == 0 else "max" if q == 100 else f"{q} %" for q in QUANTILES)
        yield f"{'':<15} {percents}"
        lengths: dict[str, array[int] | array[float]] = {
            "question words": self.question_words,
            "answer words": self.answer_words,
            "seconds": self.seconds,
        }
        for title, values in lengths.items():
            if values:
                digits = 2 if title == "seconds" else 0
                quantiles = "  ".join(f"{value:.{digits}f}" for value in np.percentile(values, QUANTILES))
                yield f"{title:<15} {quantiles}"
        for title, counter in (("voices", self.voices), ("kinds", self.kinds)):
            if counter:
                shown = ", ".join(f"{name} {n}" for name, n in counter.most_common(MOST))
                yield f"{title:<15} {shown}{f' and {len(counter) - MOST} more' if len(counter) > MOST else ''}"


def inspect_data(
    source: str, *, split: str, limit: int | None = None, strict: bool = False, filters: Filters | None = None
) -> Iterator[str]:
    """Read every row and decode every recording; yields lines.

    Args:
        limit: only so many rows.
        strict: raise for the first faulty row.

    Raises:
        UserError: a source that cannot be read, or of which nothing would be left.
    """
    table = open_table(source, split)
    names, found, limits = Names(table), Findings(), filters or Filters()
    n_rows = table.count()
    total = limit if n_rows is None else min(n_rows, limit or n_rows)
    with Reporter(1).step(f"reading {source}, split {split}") as advance:
        for row in islice(table.read(0, None, True), limit):
            found.add(row, names(row), limits, table.where if strict else None)
            advance(found.n_rows, total or found.n_rows)
    yield from found.lines()
    before = Path(source) / "dropped" / f"{split}.jsonl"
    if before.is_file():  # of a folder that `palimpsest data prepare` made: what that left out
        reasons = counts(row["reason"] for row in read_jsonl(before))
        yield f"dropped before  {sum(reasons.values())}, when it was prepared"
        yield from (f"  {reason:<22} {n}" for reason, n in reasons.items())
    # Last: the lines above say which rows, and why.
    require_some(found.n_kept, found.reasons, table.where, "correct the rows named above, or change the filters")
