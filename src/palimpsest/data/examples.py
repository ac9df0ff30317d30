"""Examples and manifests: the one form in which questions, answers and audio travel through a study.

A manifest is a UTF-8 file of JSON lines, one example each:

    {"id": "q1", "question": "What is the capital of France?", "answer": "The capital of France is Paris.",
     "answers": ["Paris"], "audio": "audio/q1.flac", "voice": "hibari", "kind": "capital"}

`id`, `question` and one of `answer` (the sentence to train on) and `answers` (the gold strings to score with)
are required. A missing `answers` is [`answer`]; a missing `answer` is the first of `answers`. `audio` is
relative to the manifest's folder. Leading and trailing blanks of every string are dropped.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from palimpsest.files import UserError, write_jsonl

KEYS = ("id", "question", "answer", "answers", "audio", "voice", "kind", "augmentation")
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

    def to_row(self, folder: Path) -> dict[str, Any]:
        """The manifest line of this example for a manifest in `folder`.

        Audio below `folder` is written relative to it, so that the folder can be moved as a whole; audio
        elsewhere is written as an absolute path: a relative one would break when the folder is renamed.
        """
        row: dict[str, Any] = {"id": self.id, "question": self.question, "answer": self.answer}
        row["answers"] = list(self.answers)
        if self.audio is not None:
            audio, root = Path(os.path.abspath(self.audio)), Path(os.path.abspath(folder))  # noqa: PTH100 (no symlinks)
            row["audio"] = (audio.relative_to(root) if audio.is_relative_to(root) else audio).as_posix()
        if self.voice is not None:
            row["voice"] = self.voice
        if self.kind is not None:
            row["kind"] = self.kind
        if self.augmentation is not None:
            row["augmentation"] = self.augmentation
        return row


def write_manifest(path: Path, examples: Iterable[Example]) -> None:
    """Write the examples atomically, in order; see `Example.to_row` for the audio paths."""
    write_jsonl(path, (example.to_row(path.parent) for example in examples))


def read_manifest(
    path: Path, require_audio: bool = False, limit: int | None = None, *, check: bool = True
) -> list[Example]:
    """Read a manifest and check all of it, before anything long starts.

    Every line is checked even where `limit` keeps only the first ones. The audio headers of the examples that
    are returned are opened (see `check_audio`), unless `check` is False: filters.py then drops broken ones.

    Raises:
        UserError: naming file and line: no JSON, a missing, unknown, empty or wrongly typed field, an id used
            twice, audio that is missing (or not given, with `require_audio`), unreadable, empty or too long.
    """
    if limit is not None and limit < 1:
        raise UserError(f"A limit of {limit} examples was asked of {path}; use a limit of 1 or more, or none.")
    examples: list[Example] = []
    lines: dict[str, int] = {}  # id -> line number
    for number, text in _numbered_lines(path):
        where = f"{path}:{number}"
        example = _parse(text, path.parent, where)
        if example.id in lines:
            raise UserError(
                f"{where}: the id {example.id!r} is already used on line {lines[example.id]}; "
                "give every line its own id."
            )
        if require_audio and example.audio is None:
            raise UserError(
                f'{where}: example {example.id!r} has no "audio"; '
                "add the path of its recording, or have it spoken first."
            )
        lines[example.id] = number
        examples.append(example)
    if not examples:
        raise UserError(f"{path} holds no example; write one JSON object a line into it.")
    examples = examples[:limit]
    for example in examples if check else ():
        _require_good_audio(example, f"{path}:{lines[example.id]}")
    return examples


def check_audio(examples: Iterable[Example]) -> None:
    """Open the header of every example's audio file; examples without audio pass.

    Raises:
        UserError: for the first file that is missing, unreadable, empty or longer than MAX_AUDIO_SECONDS.
    """
    for example in examples:
        _require_good_audio(example, f"Example {example.id!r}")


def _require_good_audio(example: Example, where: str) -> None:
    problem = None if example.audio is None else audio_problem(example.audio)
    if problem is not None:
        raise UserError(f"{where}: {problem}")


def audio_problem(path: Path) -> str | None:
    """What a file's header says is wrong with it, as a sentence with its remedy; None if all is well."""
    if not path.is_file():
        return f"the audio file {path} does not exist; correct its path or restore the file."
    try:
        header = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        return f"the audio file {path} cannot be read ({error}); convert it to WAV or FLAC."
    if header.frames == 0:
        return f"the audio file {path} is empty; record it again or remove it."
    if header.duration > MAX_AUDIO_SECONDS:
        return (
            f"the audio file {path} lasts {header.duration:.1f} s, longer than the limit of "
            f"{MAX_AUDIO_SECONDS:.0f} s; shorten or remove it."
        )
    return None


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The non-blank lines with their numbers from 1.

    Split at line feeds only: `str.splitlines` also splits at U+2028 and U+0085, legal inside JSON strings.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"The manifest {path} does not exist; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The manifest {path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"The manifest {path} cannot be read ({error.strerror}); check the path.") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _parse(text: str, folder: Path, where: str) -> Example:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}); write one JSON object a line."
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__} instead of a JSON object; write one object a line.")
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"use {', '.join(KEYS)} or remove it."
            raise UserError(f'{where}: unknown key "{key}"; {hint}')
    audio = _string(row, "audio", where)
    golds = _golds(row, where)
    answer = _string(row, "answer", where) or (golds[0] if golds else None)
    if answer is None:
        raise UserError(f'{where}: neither "answer" nor "answers"; add at least one of them.')
    return Example(
        id=_required(row, "id", where),
        question=_required(row, "question", where),
        answers=golds or (answer,),
        answer=answer,
        audio=None if audio is None else folder / audio,
        voice=_string(row, "voice", where),
        kind=_string(row, "kind", where),
        augmentation=_string(row, "augmentation", where),
    )


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


def _required(row: dict[str, Any], key: str, where: str) -> str:
    value = _string(row, key, where)
    if value is None:
        raise UserError(f'{where}: "{key}" is missing; every line needs one.')
    return value


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
