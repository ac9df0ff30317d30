"""One's own data: a CSV or parquet table, a folder of recordings with their texts, or an instruction set.

Columns of a table: `question`, `answer` or `answers`, and optionally `id`, `audio`, `voice`, `kind`. `answers` holds
several gold strings: in CSV separated by "|", in parquet a list. Audio paths are relative to the table's folder.

A folder of recordings has either a `metadata.csv` or `metadata.jsonl` with the column `file_name` beside those above
(the hub's AudioFolder layout), or beside each `x.wav` (or .flac, .ogg, .mp3) a text of the same name: `x.json` with
`question` and `answer` or `answers`; or `x.txt`, whose first line is the question and whose other lines are the answer.
The split is a sub-folder of that name, or the folder itself.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from palimpsest.data.parquet import Schema, local_count, local_files, local_identity, parquet_table
from palimpsest.data.published import joined
from palimpsest.data.rows import Row, Table, find_columns, listed, text, texts
from palimpsest.files import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff")
METADATA = ("metadata.csv", "metadata.jsonl")
REQUIRED = {"question": ("question", "questions"), "answers": ("answers", "answer")}
OPTIONAL = {key: (key,) for key in ("id", "answer", "audio", "voice", "kind")}
GOLD_SEPARATOR = "|"  # between the gold strings of one CSV cell


def _fields(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Row. `answers` is whichever of answers and answer is there; with both, answer is the target."""
    golds = texts(cells["answers"])
    return {
        "question": text(cells["question"]),
        "answers": golds,
        "answer": text(cells.get("answer")) or (golds[0] if golds else ""),
        "id": text(cells.get("id")) or None,
        "voice": text(cells.get("voice")) or None,
        "kind": text(cells.get("kind")) or None,
    }


OWN_SCHEMA = Schema(required=REQUIRED, read=_fields, optional={k: v for k, v in OPTIONAL.items() if k != "audio"})


def own_parquet(path: Path, split: str) -> Table:
    files = local_files(path, split)
    identity, count = local_identity(files), lambda: local_count(files)
    return parquet_table("table", str(path), OWN_SCHEMA, lambda: files, identity=identity, count=count)


# ------------------------------------------------------------------------------------------------------------
# CSV
# ------------------------------------------------------------------------------------------------------------
def own_csv(path: Path, split: str) -> Table:
    """A file is one split, whatever its name; a folder holds SPLIT.csv."""
    file = _file_of_split(path, split, ".csv")
    _csv_columns(file, "audio")  # told now, not in the middle of a study
    return listed("table", str(file), lambda: _csv_rows(file, "audio"))


def _csv_rows(file: Path, audio_column: str) -> Iterator[Row]:
    columns = _csv_columns(file, audio_column)
    with _opened(file) as lines:
        reader = csv.DictReader(lines)
        try:
            for position, record in enumerate(reader):
                cells: dict[str, Any] = {key: record[column] or "" for key, column in columns.items()}
                if columns["answers"].strip().lower() == "answers":  # one `answer` is a sentence and stays whole
                    cells["answers"] = cells["answers"].split(GOLD_SEPARATOR)
                audio = text(cells.pop("audio", None))
                where = f"{file}:{reader.line_num}"
                yield Row(position, where, audio=file.parent / audio if audio else None, **_fields(cells))
        except csv.Error as error:
            raise UserError(
                f"{file}:{reader.line_num}: not valid CSV ({error}); correct the quotation marks."
            ) from error


def _csv_columns(file: Path, audio_column: str) -> dict[str, str]:
    with _opened(file) as lines:
        header = next(csv.reader(lines), [])
    required = REQUIRED if audio_column == "audio" else {**REQUIRED, "audio": (audio_column,)}
    return find_columns(header, required, {**OPTIONAL, "audio": (audio_column,)}, str(file))


def _opened(file: Path) -> Any:
    """The file as text; a wrong encoding is told at once, not in the middle."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as check:
            for _ in check:
                pass
        return file.open(encoding="utf-8-sig", newline="")
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the path.") from error


def _file_of_split(path: Path, split: str, suffix: str) -> Path:
    if not path.is_dir():
        return path
    file = path / f"{split}{suffix}"
    if not file.is_file():
        present = ", ".join(sorted(other.stem for other in path.glob(f"*{suffix}"))) or "none"
        raise UserError(f"{path} has no split {split!r}; it has: {present}.")
    return file


# ------------------------------------------------------------------------------------------------------------
# A folder of recordings
# ------------------------------------------------------------------------------------------------------------
def is_audio_folder(path: Path) -> bool:
    folders = [path, *(child for child in path.iterdir() if child.is_dir())] if path.is_dir() else []
    return any((folder / name).is_file() for folder in folders for name in METADATA) or any(
        _text_beside(audio) for folder in folders for audio in _recordings(folder)[:1]
    )


def audio_folder(path: Path, split: str) -> Table:
    folder = path / split if (path / split).is_dir() else path
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; check the path.")
    rows: Callable[[], Iterator[Row]]
    if (folder / METADATA[0]).is_file():
        _csv_columns(folder / METADATA[0], "file_name")
        rows = lambda: _csv_rows(folder / METADATA[0], "file_name")  # noqa: E731
    elif (folder / METADATA[1]).is_file():
        rows = lambda: _metadata_rows(folder / METADATA[1])  # noqa: E731
    elif _recordings(folder):
        rows = lambda: _pairs(folder)  # noqa: E731
    else:
        present = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir())) or "none"
        raise UserError(
            f"{folder} holds neither {METADATA[0]} nor recordings and has no split {split!r}; its folders: {present}."
        )
    return listed("audio", str(folder), rows)


def _recordings(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES)


def _text_beside(audio: Path) -> Path | None:
    return next((file for s in (".json", ".txt") if (file := audio.with_suffix(s)).is_file()), None)


def _pairs(folder: Path) -> Iterator[Row]:
    """A recording without a text is a row without a question, for the filters to tell."""
    for position, audio in enumerate(_recordings(folder)):
        beside = _text_beside(audio)
        cells: dict[str, Any] = {"question": "", "answers": ()}
        if beside is not None and beside.suffix == ".json":
            cells = _checked(_json(beside), str(beside))
        elif beside is not None:
            with _opened(beside) as lines:
                question, _, answer = lines.read().partition("\n")
            cells = {"question": question, "answers": " ".join(answer.split())}
        cells["id"] = audio.stem
        yield Row(position, str(audio), audio=audio, **_fields(cells))


def _metadata_rows(file: Path) -> Iterator[Row]:
    with _opened(file) as lines:
        position = 0
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg}); write one object a line.") from error
            cells = _checked(record, where, "file_name")
            audio = text(cells.pop("audio"))
            yield Row(position, where, audio=file.parent / audio if audio else None, **_fields(cells))
            position += 1


def _checked(record: Any, where: str, audio: str | None = None) -> dict[str, Any]:
    """The cells of one JSON object by our names."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__} instead of a JSON object; write one object.")
    required = {**REQUIRED, "audio": (audio,)} if audio else REQUIRED
    columns = find_columns(list(record), required, OPTIONAL if not audio else {**OPTIONAL, "audio": (audio,)}, where)
    return {key: record[column] for key, column in columns.items()}


# ------------------------------------------------------------------------------------------------------------
# Instruction sets
# ------------------------------------------------------------------------------------------------------------
def alpaca(path: Path, split: str) -> Table:
    """A JSON list of {"instruction", "input" (may be absent or empty), "output"}: text, to be spoken.

    A row with an input is kept, the input on a line of its own after the instruction; where both together are too long
    to be spoken the filters drop it.
    """
    file = _file_of_split(path, split, ".json")
    records = _json(file)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file} must hold a list of objects with instruction, input and output.")
    required = {"instruction": ("instruction",), "output": ("output",)}
    find_columns(sorted({key for record in records for key in record}), required, {}, str(file))

    def rows() -> Iterator[Row]:
        for position, record in enumerate(records):
            question = joined(record.get("instruction"), record.get("input"))
            answer = text(record.get("output"))
            yield Row(position, f"{file}, record {position + 1}", question, texts(answer), answer)

    return listed("alpaca", str(file), rows)


def _json(file: Path) -> Any:
    with _opened(file) as lines:
        try:
            return json.load(lines)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} is not valid JSON ({error}); correct it or download it again.") from error
