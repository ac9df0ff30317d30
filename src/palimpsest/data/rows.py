"""Rows of a source before they become examples: read one after the other, as often as needed, never all at once.

Every source opens as a `Table`: one split, whose rows are as the source has them. Strings may be empty, recordings
broken; what may be wrong with a row, and what follows, is decided in filters.py alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from palimpsest.files import UserError, hash_value


@dataclass(frozen=True)
class Row:
    """One row as found. A recording is a file, or the bytes of one that stands inside a table."""

    position: int  # in its split, from 0
    where: str  # for messages: file and line, or data set and row
    question: str
    answers: tuple[str, ...]  # without empty strings; () where there is no answer
    answer: str  # the target sentence; "" where there is no answer
    id: str | None = None  # as the source gives it; None: made from the content
    audio: Path | bytes | None = None
    later_turn: bool = False  # of a conversation that began in another row
    voice: str | None = None
    kind: str | None = None
    augmentation: str | None = None


Read = Callable[[int, "Collection[int] | None", bool], Iterator[Row]]


@dataclass(frozen=True)
class Table:
    """One split of a source.

    `read(start, only, audio)` yields the rows from position `start` on, those in `only` where it is given, in order;
    recordings that stand inside a table are read only with `audio`, otherwise they are None.
    """

    name: str  # begins the ids that are made from content; "": every row has one of its own
    where: str  # for messages
    read: Read
    identity: Any = None  # JSON that stands for the content where hashing all of it would take long; None: hash it
    count: Callable[[], int | None] = lambda: None  # rows, where that is known without much reading


def listed(name: str, where: str, rows: Callable[[], Iterable[Row]]) -> Table:
    """A table whose recordings are files: everything else is read each time, up to the last row asked for."""

    def read(start: int, only: Collection[int] | None, audio: bool) -> Iterator[Row]:
        last = None if only is None else max(only, default=-1)
        for row in rows() if last != -1 else ():
            if row.position >= start and (only is None or row.position in only):
                yield row
            if row.position == last:
                return

    return Table(name, where, read, count=lambda: sum(1 for _ in rows()))


def joined(tables: Sequence[Table]) -> Table:
    """The rows of several tables, one table after the other; positions count on. Ids begin with all their names."""

    def n_rows(table: Table) -> int:
        known = table.count()
        return sum(1 for _ in table.read(0, None, False)) if known is None else known

    def read(start: int, only: Collection[int] | None, audio: bool) -> Iterator[Row]:
        first = 0
        for table in tables:
            end = first + n_rows(table)
            if start < end:
                wanted = None if only is None else {p - first for p in only if first <= p < end}
                for row in table.read(max(0, start - first), wanted, audio):
                    yield replace(row, position=first + row.position)
            first = end

    def count() -> int | None:
        counts = [table.count() for table in tables]
        return None if None in counts else sum(n for n in counts if n is not None)

    return Table(
        "+".join(dict.fromkeys(table.name for table in tables)),
        " + ".join(table.where for table in tables),
        read,
        # None: all rows are hashed by whoever asks. A table with an identity of its own is not read for that.
        None if all(table.identity is None for table in tables) else [identity_of(table) for table in tables],
        count,
    )


def identity_of(table: Table) -> Any:
    """What stands for the content: the table's own identity, or a hash of all rows; recordings by path, size, time."""
    if table.identity is not None:
        return table.identity
    digest = hashlib.sha256()
    for row in table.read(0, None, False):
        assert not isinstance(row.audio, bytes)
        stat = row.audio.stat() if row.audio is not None and row.audio.is_file() else None
        recording = [str(row.audio), stat and [stat.st_size, stat.st_mtime_ns]]
        digest.update(
            hash_value([row.id, row.question, row.answers, row.answer, row.voice, row.kind, recording]).encode()
        )
    return digest.hexdigest()


CONTENT_ID = re.compile(r"^(?P<base>.+-[0-9a-f]{16})(?:-(?P<count>\d+))?$")


class Names:
    """Gives every row its id: the source's own, or one made from question and answers.

    An id from content does not depend on the order of the rows or on other rows; equal rows are counted: X, X-2, X-3.
    `taken` are ids given before, by a reading that was interrupted.
    """

    def __init__(self, table: Table, taken: Iterable[str] = ()) -> None:
        self._table = table.name
        self._counts: dict[str, int] = {}
        for name in taken:
            match = CONTENT_ID.match(name)
            base, count = (match["base"], int(match["count"] or 1)) if match else (name, 1)
            self._counts[base] = max(count, self._counts.get(base, 0))

    def __call__(self, row: Row) -> str:
        """Raises UserError for an id of the source's own that stands there twice."""
        if row.id is not None:
            if row.id in self._counts:
                raise UserError(f"{row.where}: the id {row.id!r} is used twice; give every row its own.")
            self._counts[row.id] = 1
            return row.id
        base = f"{self._table}-{hash_value([row.question, list(row.answers), row.answer])[:16]}"
        count = self._counts[base] = self._counts.get(base, 0) + 1
        return base if count == 1 else f"{base}-{count}"


# ------------------------------------------------------------------------------------------------------------
# Files, columns and cells
# ------------------------------------------------------------------------------------------------------------
def open_text(path: Path, newline: str = "") -> IO[str]:
    """The file as text; one that is missing or not UTF-8 is an error now, not in the middle."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as check:
            for _ in check:
                pass
        return path.open(encoding="utf-8-sig", newline=newline)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of every line that is not blank; a faulty line is a UserError.

    Lines end at line feeds only: elsewhere Python also ends them at U+2028 and U+0085, legal inside JSON strings.
    """
    with open_text(path, "\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.removesuffix("\n"))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not valid JSON ({error.msg}, column {error.colno}); write one JSON object a line."
                ) from error
            yield number, require_object(record, where)


def require_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__} instead of a JSON object; write one object a line.")
    return record


def text(value: Any) -> str:
    """A cell as text without blanks around it; nothing there is "". Numbers are written out."""
    return "" if value is None else str(value).strip()


def texts(value: Any) -> tuple[str, ...]:
    """A cell with one string or a list of them, without empty ones."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(item for item in map(text, items) if item)


def recording(cell: Any, folder: Path) -> Path | bytes | None:
    """A cell with bytes, with a path from `folder`, or with both, as in the hub's Audio feature."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (bytes, Path)):
        return cell or None
    return folder / text(cell) if text(cell) else None


@dataclass(frozen=True)
class Schema:
    """The columns of a kind of table: our names → accepted spellings in lower case, and how a row is read from them.

    The column named `audio`, where there is one, holds the recording.
    """

    required: Mapping[str, Sequence[str]]
    optional: Mapping[str, Sequence[str]]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]  # cells by our names → fields of Row

    def columns(self, present: Sequence[str], where: str) -> dict[str, str]:
        """Our names → the table's columns, in any case. Raises UserError naming what is missing and what was found."""
        lower = {name.strip().lower(): name for name in present}
        found = {}
        for key, spellings in {**self.required, **self.optional}.items():
            if (spelling := next((s for s in spellings if s in lower), None)) is not None:
                found[key] = lower[spelling]
        missing = [" or ".join(map(repr, self.required[key])) for key in self.required if key not in found]
        if missing:
            noun = "column" if len(missing) == 1 else "columns"
            raise UserError(
                f"{where} has no {noun} {', '.join(missing)}; found: {', '.join(present) or 'none'}; "
                "rename the columns or choose the reader that fits."
            )
        return found

    def cells(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The cells of a record with columns of its own."""
        return {key: record[column] for key, column in self.columns(list(record), where).items()}

    def row(self, position: int, where: str, cells: Mapping[str, Any], folder: Path) -> Row:
        """The row of the cells; a recording's path is relative to `folder`."""
        return Row(position, where, audio=recording(cells.get("audio"), folder), **self.fields(cells))


def own_fields(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Row. `answers` is whichever of answers and answer is there; with both, answer is the target."""
    golds = texts(cells["answers"])
    return {
        "question": text(cells["question"]),
        "answers": golds,
        "answer": text(cells.get("answer")) or (golds[0] if golds else ""),
        **{key: text(cells.get(key)) or None for key in ("id", "voice", "kind")},
    }


def instruction_fields(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The question is what was spoken: `speech_input` where it is filled, else instruction and input, a line each."""
    written = "\n".join(part for part in (text(cells["instruction"]), text(cells.get("input"))) if part)
    return {
        "question": text(cells.get("speech_input")) or written,
        "answers": texts(cells["output"]),
        "answer": text(cells["output"]),
        "voice": text(cells.get("input_speaker")) or None,
    }


def named(*keys: str) -> dict[str, tuple[str]]:
    """Columns that are called what we call them."""
    return {key: (key,) for key in keys}


REQUIRED = {"question": ("question", "questions"), "answers": ("answers", "answer")}
OPTIONAL = named("id", "answer", "voice", "kind")
TABLE = Schema(REQUIRED, {**OPTIONAL, **named("audio")}, own_fields)  # one's own
