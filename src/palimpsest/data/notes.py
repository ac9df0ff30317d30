"""How far a long reading is: what became of each row so far, in a file that outlives a kill.

The first line says what is read; a file that says something else is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from palimpsest.data.examples import Example
from palimpsest.data.filters import Dropped
from palimpsest.files import append_jsonl

EVERY = 512  # rows between two notes

Found = tuple[int, Example | Dropped]  # position of the row, and what became of it


class Notes:
    """The notes of a reading of `what`, a hash, in the file `path`; paths in them are relative to its folder."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self._new = path, list[Found]()
        size = self._size_of(what)
        if size == 0:
            path.unlink(missing_ok=True)
            append_jsonl(path, [{"of": what}])
        else:
            with path.open("ab") as file:
                file.truncate(size)  # a last line that a kill cut short

    def _size_of(self, what: str) -> int:
        """Bytes up to the end of the last whole line; 0 where this is no file of `what`."""
        size = 0
        if self.path.exists():
            with self.path.open("rb") as file:
                if file.readline() == json.dumps({"of": what}).encode() + b"\n":
                    file.seek(0)
                    size = sum(len(line) for line in file if line.endswith(b"\n"))
        return size

    def __iter__(self) -> Iterator[Found]:
        """What was noted before, in order."""
        with self.path.open(encoding="utf-8", newline="\n") as file:
            next(file)
            for line in file:
                position, kept, dropped = json.loads(line)
                yield position, Dropped(**dropped) if kept is None else Example.from_row(kept, self.path.parent)

    def add(self, position: int, found: Example | Dropped) -> None:
        self._new.append((position, found))
        if len(self._new) >= EVERY:
            self.write()

    def write(self) -> None:
        """Note what was added. Its recordings are on the disk: they have their names only then."""
        rows = [
            [position, found.to_row(self.path.parent), None]
            if isinstance(found, Example)
            else [position, None, vars(found)]
            for position, found in self._new
        ]
        append_jsonl(self.path, rows)
        self._new = []
