"""Examples and manifests: the one form in which questions, answers and audio travel through a study.

A manifest is a UTF-8 file of JSON lines, one example each:

    {"id": "q1", "question": "What is the capital of France?", "answer": "The capital of France is Paris.",
     "answers": ["Paris"], "audio": "audio/q1.flac", "voice": "hibari", "kind": "capital"}

`id`, `question` and one of `answer` (the sentence to train on) and `answers` (the gold strings to score with)
are required. A missing `answers` is [`answer`]; a missing `answer` is the first of `answers`. `audio` is
absolute, or relative to the manifest's folder and inside it. Leading and trailing blanks of every string are dropped.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.data.rows import CellError, Row, json_objects, located, sentence
from palimpsest.files import UserError, is_file, write_jsonl

KEYS = ("id", "question", "answer", "answers", "audio", "voice", "kind", "augmentation", "fault")
MAX_AUDIO_SECONDS = 30.0  # what a Whisper encoder sees at once; nothing is cut silently, longer audio is an error


@dataclass(frozen=True)
class Example:
    """One question with its answer, and its spoken form where there is one."""

    id: str  # unique within a manifest
    question: str
    answers: tuple[str, ...]  # gold strings, at least one; an answer that contains any of them is correct
    answer: str  # the target sentence of training and perplexity
    audio: Path | None = None  # the spoken question
    voice: str | None = None  # whose voice it is
    kind: str | None = None  # group for break-downs, e.g. "capital"
    augmentation: str | None = None  # of a changed copy of another example's audio: what was changed
    fault: str | None = None  # of a task's recording, where it is kept as it is: cannot be asked, counts as wrong

    @classmethod
    def of(cls, row: Row, name: str, audio: Path | bytes | None) -> Example:
        """The row under the id `name`, spoken in the file `audio`."""
        assert not isinstance(audio, bytes)
        texts = (row.question, row.answers, row.answer)
        return cls(name, *texts, audio, row.voice, row.kind, row.augmentation, row.fault)

    def to_row(self, folder: Path) -> dict[str, Any]:
        """The manifest line of this example for a manifest in `folder`.

        Audio below `folder` is written relative to it, so that the folder can be moved as a whole; audio
        elsewhere is written as an absolute path: a relative one would break when the folder is renamed.
        """
        row = {key: getattr(self, key) for key in KEYS if getattr(self, key) is not None}
        if self.audio is not None:
            audio, root = Path(os.path.abspath(self.audio)), Path(os.path.abspath(folder))  # noqa: PTH100 (no symlinks)
            row["audio"] = (audio.relative_to(root) if audio.is_relative_to(root) else audio).as_posix()
        return {**row, "answers": list(self.answers)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], folder: Path) -> Example:
        """What `to_row` was made of; nothing is checked."""
        audio = None if row.get("audio") is None else folder / row["audio"]
        return cls(**{**row, "answers": tuple(row["answers"]), "audio": audio})


def write_manifest(path: Path, examples: Iterable[Example]) -> None:
    """Write the examples atomically, in order; see `Example.to_row` for the audio paths."""
    write_jsonl(path, (example.to_row(path.parent) for example in examples))


def read_manifest(
    path: Path, require_audio: bool = False, limit: int | None = None, *, check: bool = True
) -> list[Example]:
    """Read a manifest and check all of it, before anything long starts.

    Every line is checked even where `limit` keeps only the first ones. The audio headers of the examples that
    are returned are opened (see `require_good_audio`), unless `check` is False.

    Raises:
        UserError: naming file and line: no JSON, a missing, unknown, empty or wrongly typed field, an id used
            twice, audio that is missing (or not given, with `require_audio`), unreadable, empty or too long.
    """
    require_limit(limit, path)
    examples: list[tuple[str, Example]] = []  # with file and line
    for row in manifest_rows(path):
        assert row.id is not None
        if require_audio and row.audio is None:
            raise UserError(
                f'{row.where}: example {row.id!r} has no "audio"; '
                "add the path of its recording, or have it spoken first."
            )
        examples.append((row.where, Example.of(row, row.id, row.audio)))
    for where, example in examples[:limit] if check else ():
        require_good_audio(example, where)
    return [example for _, example in examples[:limit]]


def require_limit(limit: int | None, source: str | Path) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples was asked of {source}; use a limit of 1 or more, or none.")


def require_good_audio(example: Example, where: str) -> None:
    """Open the header of the example's audio file, if it has one and is not known to be faulty.

    Raises:
        UserError: at `where`, for a file that is missing, unreadable, empty or longer than MAX_AUDIO_SECONDS.
    """
    if example.audio is not None and example.fault is None and (problem := audio_problem(example.audio)) is not None:
        raise UserError(f"{where}: {problem}")


def audio_problem(path: Path) -> str | None:
    """What a file's header says is wrong with it, as a sentence with its remedy; None if all is well."""
    if not is_file(path):
        return f"the audio file {path} does not exist; correct its path or restore the file."
    import soundfile

    try:
        header = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        return f"the audio file {path} cannot be read ({error}); convert it to WAV or FLAC."
    if header.frames == 0:
        return f"the audio file {path} is empty; record it again or remove it."
    if header.duration > MAX_AUDIO_SECONDS:
        return (
            f"the audio file {path} lasts {beyond(header.duration, MAX_AUDIO_SECONDS)} s, longer than the limit of "
            f"{MAX_AUDIO_SECONDS:.0f} s; shorten or remove it."
        )
    return None


def beyond(value: float, limit: float, digits: int = 1) -> str:
    """A value on the wrong side of a limit, with as many digits as it takes to see that: "30.02", not "30.0"."""
    for n in range(digits, 9):
        shown = f"{value:.{n}f}"
        if float(shown) != limit and (float(shown) > limit) == (value > limit):
            return shown
    return str(value)


def manifest_rows(path: Path) -> Iterator[Row]:
    """A row for every line. Raises UserError for a line that is no example, an id used twice, and an empty file."""
    lines: dict[str, int] = {}  # id → number of its line
    for number, record in json_objects(path):
        where = f"{path}:{number}"
        row = _manifest_row(record, len(lines), path.parent, where)
        assert row.id is not None
        if row.id in lines:
            raise UserError(
                f"{where}: the id {row.id!r} is already used on line {lines[row.id]}; give every line its own id."
            )
        lines[row.id] = number
        yield row
    if not lines:
        raise UserError(f"{path} holds no example; write one JSON object a line into it.")


def _manifest_row(record: dict[str, Any], position: int, folder: Path, where: str) -> Row:
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"use {', '.join(KEYS)} or remove it."
            raise UserError(f'{where}: unknown key "{key}"; {hint}')
    texts: dict[str, Any] = {key: _string(record, key, where) for key in KEYS if key != "answers"}
    for key in ("id", "question"):
        if texts[key] is None:
            raise UserError(f'{where}: "{key}" is missing; every line needs one.')
    audio, answer = texts.pop("audio"), texts.pop("answer")
    golds = _golds(record, where)
    if not golds and not answer:
        raise UserError(f'{where}: neither "answer" nor "answers"; add at least one of them.')
    try:
        golds = golds or (sentence(answer),)
        texts |= {"answer": answer or golds[0], "audio": None if audio is None else located(audio, folder)}
    except CellError as error:
        raise UserError(f"{where}: {error}.") from error
    return Row(position, where, answers=golds, **texts)


def _string(row: dict[str, Any], key: str, where: str) -> str | None:
    """The stripped string under `key`, None where the key is absent or null."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f'{where}: "{key}" is {value!r} but must be a string; put it in quotes.')
    if not value.strip():
        raise UserError(f'{where}: "{key}" is empty; fill it in or remove it.')
    return value.strip()


def _golds(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The stripped gold strings, () where the key is absent or null."""
    value = row.get("answers")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(gold, str) for gold in value):
        raise UserError(f'{where}: "answers" is {value!r} but must be a list of strings, such as ["Paris"].')
    if not value or not all(gold.strip() for gold in value):
        raise UserError(f'{where}: "answers" is empty or holds an empty string; give at least one gold string.')
    return tuple(gold.strip() for gold in value)
