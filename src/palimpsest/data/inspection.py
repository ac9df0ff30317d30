"""`palimpsest data inspect`: what is in a source, and what the filters would leave out; nothing is written."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from palimpsest.data.filters import Dropped, Filters, Problem, decode, require_some, take
from palimpsest.data.rows import Names, Row
from palimpsest.data.sources import open_table
from palimpsest.files import read_jsonl
from palimpsest.progress import Reporter

QUANTILES = (0, 5, 50, 95, 100)  # percent
MOST = 12  # voices and kinds shown
SHOWN = 3  # dropped rows of each reason


@dataclass
class Findings:
    """Counts and lengths of the rows seen so far; a few bytes a row."""

    n_rows: int = 0
    question_words: array[int] = field(default_factory=lambda: array("L"))
    answer_words: array[int] = field(default_factory=lambda: array("L"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    voices: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: dict[str, list[Dropped]] = field(default_factory=dict)  # the first few of each reason

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
            self.dropped[found.reason] += 1
            if self.dropped[found.reason] <= SHOWN:
                self.examples.setdefault(found.reason, []).append(found)
            return
        self.question_words.append(len(row.question.split()))
        self.answer_words.append(len(row.answer.split()))
        self.seconds.extend(seconds)
        if seconds:
            self.voices[row.voice or "not named"] += 1
        if row.kind is not None:
            self.kinds[row.kind] += 1


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
    names, found = Names(table), Findings()
    limits = filters or Filters()
    n_rows = table.count()
    total = limit if n_rows is None else min(n_rows, limit or n_rows)
    with Reporter(1).step(f"reading {source}, split {split}") as advance:
        for row in islice(table.read(0, None, True), limit):
            found.add(row, names(row), limits, table.where if strict else None)
            advance(found.n_rows, total or found.n_rows)
    require_some(found.n_kept, dict(found.dropped), table.where)
    yield from _lines(found)
    yield from _dropped_before(Path(source), split)


def _lines(found: Findings) -> Iterator[str]:
    yield f"rows            {found.n_rows}: {found.n_kept} usable, {found.dropped.total()} to be dropped"
    for reason, n in found.dropped.most_common():
        yield f"  {reason:<22} {n}"
        yield from (f"      {item.id}: {item.detail}" for item in found.examples[reason])
    n_silent = found.n_kept - len(found.seconds)
    yield f"recordings      {len(found.seconds)}, {sum(found.seconds) / 3600:.2f} hours; {n_silent} rows without"
    percents = "  ".join("min" if q == 0 else "max" if q == 100 else f"{q} %" for q in QUANTILES)
    yield f"{'':<15} {percents}"
    yield f"question words  {_quantiles(found.question_words, 0)}"
    yield f"answer words    {_quantiles(found.answer_words, 0)}"
    if found.seconds:
        yield f"seconds         {_quantiles(found.seconds, 2)}"
    for title, counter in (("voices", found.voices), ("kinds", found.kinds)):
        if counter:
            shown = ", ".join(f"{name} {n}" for name, n in counter.most_common(MOST))
            yield f"{title:<15} {shown}{f' and {len(counter) - MOST} more' if len(counter) > MOST else ''}"


def _quantiles(values: array[int] | array[float], digits: int) -> str:
    return "  ".join(f"{value:.{digits}f}" for value in np.percentile(values, QUANTILES))


def _dropped_before(folder: Path, split: str) -> Iterator[str]:
    """Of a folder made by `palimpsest data prepare`: what that left out."""
    file = folder / "dropped" / f"{split}.jsonl"
    if file.is_file():
        reasons = Counter(row["reason"] for row in read_jsonl(file))
        yield f"dropped before  {sum(reasons.values())}, when it was prepared"
        yield from (f"  {reason:<22} {n}" for reason, n in reasons.most_common())
