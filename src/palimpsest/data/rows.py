"""Rows of a source before they become examples: read one after the other, as often as needed, never all at once.

Every source opens as a `Table`: one split, whose rows are as the source has them. Strings may be empty, recordings
broken; what may be wrong with a row, and what follows, is decided in filters.py alone.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from palimpsest.files import UserError, hash_value, is_file

GOLD_SEPARATOR = "|"  # between the gold strings of one CSV cell
MOST_FLOAT = 2.0  # of a sample: decoders pass full scale, 1, a little; beyond this it is another scale
# Names of columns that hold recordings as far as anybody can see, in lower case.
LIKE_AUDIO = re.compile(
    r"audio|recording|(?<![a-z])(?:wav|wave|mp3|flac|ogg|opus)s?(?![a-z])|wav_?(?:file|path)"
    r"|^(?:speech|sound|clip|utterance)s?$|^(?:file|path)(?:[ _-]?(?:name|path))?$"
)


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
    fault: str | None = None  # of the recording, as a study found it


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
        stat = row.audio.stat() if row.audio is not None and is_file(row.audio) else None
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
                record = json.loads(line.removesuffix("\n"), object_pairs_hook=_unique)
            except CellError as error:
                raise UserError(f"{where}: {error}.") from error
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: not valid JSON ({error.msg}, column {error.colno}); write one JSON object a line."
                ) from error
            yield number, require_object(record, where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises CellError for a key that is there twice, of which Python would keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise CellError(f"the key {twice!r} is there twice; remove one of the two")
    return record


def require_object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__} instead of a JSON object; write one object a line.")
    return record


class CellError(ValueError):
    """A cell in a form that is not read: what it is, and what to do. Whoever knows file and row adds them."""


def text(value: Any, name: str = "answer") -> str:
    """A cell as text without blanks around it; nothing there, or NaN, is "". Numbers as people write them: 4.0 is "4".

    Raises CellError for anything else: what `str` makes of it would be no text that anybody says.
    """
    if value is None or value != value:  # NaN: a gap in a column of numbers
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and abs(value) != float("inf"):
        number = Decimal(str(value))
        whole = number.to_integral_value() or Decimal(0)  # not -0
        return format(whole if number == whole else number, "f")
    raise CellError(f"the {name} is {form(value)}; write it as the text that is meant")


def label(value: Any) -> str:
    """A cell that only names something: text, or whatever `str` makes of it."""
    return text(value) if value is None or isinstance(value, (str, float)) else str(value).strip()


def form(value: Any) -> str:
    """What a cell is, for an error."""
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, value)) or 'none'}"
    shown = {list: "a list", tuple: "a list", bytes: "bytes", bool: "true or false"}.get(type(value))
    return shown or f"{value!r} ({type(value).__name__})"


def golds(value: Any) -> tuple[str, ...]:
    """The gold strings of a cell, without empty ones: one text, a list, or a mapping of a known question set.

    Known are {"text": [...]} (SQuAD) and {"value": ..., "aliases": [...]} (TriviaQA), also as elements of a list, and
    each of these written out as JSON, or as Python prints it, in a cell of text. Raises CellError for any other form.
    """
    if isinstance(value, str):
        value = written_out(value)
    if isinstance(value, Mapping):
        return _golds_of_mapping(value)
    if isinstance(value, (list, tuple)):
        parts = [_golds_of_mapping(item) if isinstance(item, Mapping) else (text(item),) for item in value]
        return tuple(gold for part in parts for gold in part if gold)
    return tuple(filter(None, [text(value)]))


def _golds_of_mapping(value: Mapping[str, Any]) -> tuple[str, ...]:
    if "text" in value:
        return golds([value["text"]] if isinstance(value["text"], str) else value["text"])
    if not {"value", "aliases"} & value.keys():
        raise CellError(
            f"the answer is {form(value)}; give a text, a list of texts, "
            '{"text": [...]} or {"value": ..., "aliases": [...]}'
        )
    aliases = value.get("aliases")
    return tuple(dict.fromkeys(golds([value.get("value"), *([] if aliases is None else aliases)])))


def sentence(value: str) -> str:
    """The text of an answer that stands alone, as sentence and gold string at once.

    Raises CellError for a list of texts, or a mapping of `golds`, that is written out: no model answers with its marks.
    """
    try:
        found = written_out(value)
    except CellError:
        return value.strip()
    if isinstance(found, (list, Mapping)) and any(isinstance(item, str) for item in _items(found)):
        raise CellError(
            f"the answer {value.strip()[:60]!r} looks like a list of gold strings; call the column answers if it is "
            "one, or give the gold strings as answers beside it"
        )
    return value.strip()


def _items(found: Any) -> list[Any]:
    if isinstance(found, Mapping):
        known = [found[key] for key in ("text", "value", "aliases") if key in found]
        return [item for part in known for item in (part if isinstance(part, list) else [part])]
    return list(found)


def written_out(value: str) -> Any:
    """The list or mapping that a text is the JSON of, or what Python prints for it; any other text as it is.

    Raises CellError for a text that begins as a list of texts and is none: half of it would be read.
    """
    cell = value.strip()
    if cell[:1] + cell[-1:] not in ("[]", "{}"):
        return value
    with suppress(ValueError):
        return json.loads(cell)
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        found = ast.literal_eval(cell)
        # As written, or not at all: NumPy prints ['a' 'b'], which Python takes for the one text 'ab'.
        if repr(found) == cell:
            return found
    if re.match(r"""[\[{]\s*["']""", cell):
        raise CellError(f'{cell[:60]!r} begins as a list but is no JSON; write it as ["Paris", "City of Light"]')
    return value


def recording(cell: Any, folder: Path) -> Path | bytes | None:
    """A cell with bytes, a path from `folder`, both (the hub's Audio feature), or samples (the same, decoded).

    Raises CellError for any other form, and for a path that `located` refuses.
    """
    if isinstance(cell, Mapping):
        if cell.get("array") is not None:
            return _as_wav(cell["array"], cell.get("sampling_rate"))
        if not {"bytes", "path"} & cell.keys():
            raise CellError(f"the recording is {form(cell)}; give a path, bytes, or {{array, sampling_rate}}")
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (bytes, Path)):
        return cell or None
    if isinstance(cell, (list, tuple)):
        raise CellError("the recording is a list without its rate; give {array, sampling_rate}, bytes or a path")
    path = text(cell, "recording")
    return located(path, folder) if path else None


def located(path: str, folder: Path) -> Path:
    """A recording's path, which is relative to `folder` or absolute.

    Raises CellError for an address, and for a relative path that leaves the folder: moved or passed on, such a table
    would read whatever lies there on another machine.
    """
    if address := re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise CellError(
            f"the recording is an address ({address[0]}…); save it as a file and give the file's path instead"
        )
    if os.pardir in path and Path(os.path.normpath(path)).parts[:1] == (os.pardir,):
        raise CellError(
            f"the path {path!r} leaves the folder {folder}; move the recording below it, or give an absolute path"
        )
    return folder / path


def _as_wav(array: Any, rate: Any) -> bytes:
    """Samples of a table as a WAV file of 32-bit floats, which holds them as they are."""
    import numpy as np
    import soundfile

    try:
        samples = np.asarray(array, np.float64 if len(array) == 0 else None)
    except ValueError:  # rows of unequal length
        samples = np.zeros((0, 0))
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise CellError(
            f"the recording's array has {samples.ndim} dimensions of type {samples.dtype}; give one channel of floats "
            "in [-1, 1], or the file's bytes"
        )
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate != int(rate) or rate < 1:
        raise CellError(f"the recording's sampling_rate is {rate!r}; give the whole number of samples a second")
    if len(samples) and np.abs(samples).max() > MOST_FLOAT:
        raise CellError(
            f"the recording's array goes up to {np.abs(samples).max():g}; scale it so that 1 is full scale "
            "(16-bit samples: divide by 32768)"
        )
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), int(rate), format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@dataclass(frozen=True)
class Schema:
    """The columns of a kind of table: our names → accepted spellings in lower case, and how a row is read from them.

    The column named `audio`, where there is one, holds the recording.
    """

    required: Mapping[str, Sequence[str]]
    optional: Mapping[str, Sequence[str]]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]  # cells by our names → fields of Row
    has_audio_elsewhere: bool = False  # the recording is known without a column

    def columns(self, present: Sequence[str], where: str) -> dict[str, str]:
        """Our names → the table's columns, in any case.

        Raises UserError naming what is missing and what was found, a column that is there twice, and one that seems to
        hold the recordings although it would not be read: a voice would speak the questions in their place.
        """
        lower: dict[str, str] = {}
        used = {spelling for spellings in (*self.required.values(), *self.optional.values()) for spelling in spellings}
        for name in present:
            key = name.strip().lower()
            if key in lower and key in used:
                raise UserError(f"{where} has the column {key!r} twice; rename or remove one of the two.")
            lower[key] = name
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
        like_audio = [name for key, name in lower.items() if LIKE_AUDIO.search(key)]
        if "audio" not in found and like_audio and not self.has_audio_elsewhere:
            raise UserError(
                f"{where} has no column 'audio' but {like_audio[0]!r}, which is not read; rename it to 'audio' in a "
                "table (.csv, .parquet) if it holds the recordings, or remove it."
            )
        return found

    def cells(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The cells of a record with columns of its own."""
        return {key: record[column] for key, column in self.columns(list(record), where).items()}

    def row(self, position: int, where: str, cells: Mapping[str, Any], folder: Path) -> Row:
        """The row of the cells; a recording's path is relative to `folder`.

        Raises UserError for a cell in a form that is not read.
        """
        try:
            return Row(position, where, audio=recording(cells.get("audio"), folder), **self.fields(cells))
        except CellError as error:
            raise UserError(f"{where}: {error}.") from error


def own_fields(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Row. `answers` is whichever of answers and answer is there; with both, answer is the target."""
    given, target = cells["answers"], cells.get("answer")
    alone = "answer" in cells and (target is given or target == given)  # there is no column but answer
    if not alone and isinstance(given, str) and GOLD_SEPARATOR in given and isinstance(written_out(given), str):
        raise CellError(
            f"the answers {given.strip()[:60]!r} hold a vertical bar, which separates gold strings in CSV files alone; "
            "give a list of texts"
        )
    found = (sentence(given),) if alone and isinstance(given, str) else golds(given)
    found = tuple(filter(None, found))
    return {
        "question": text(cells["question"], "question"),
        "answers": found,
        "answer": ("" if alone else text(target)) or (found[0] if found else ""),
        **{key: label(cells.get(key)) or None for key in ("id", "voice", "kind")},
    }


def instruction_fields(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The question is what was spoken: `speech_input` where it is filled, else instruction and input, a line each."""
    parts = [text(cells["instruction"], "instruction"), text(cells.get("input"), "input")]
    written = "\n".join(filter(None, parts))
    answer = text(cells["output"], "output")
    return {
        "question": text(cells.get("speech_input"), "speech_input") or written,
        "answers": (answer,) if answer else (),
        "answer": answer,
        "voice": label(cells.get("input_speaker")) or None,
    }


def named(*keys: str) -> dict[str, tuple[str]]:
    """Columns that are called what we call them."""
    return {key: (key,) for key in keys}


REQUIRED = {"question": ("question", "questions"), "answers": ("answers", "answer")}
OPTIONAL = named("id", "answer", "voice", "kind")
TABLE = Schema(REQUIRED, {**OPTIONAL, **named("audio")}, own_fields)  # one's own
