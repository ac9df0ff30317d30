"""Readers of files on this machine: manifests, CSV, folders of recordings, instruction sets, two published sets.

docs/data.md describes columns and layouts. Audio paths are relative to the table's folder. (Parquet: parquet.py.)
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palimpsest.data.examples import manifest_rows
from palimpsest.data.rows import (
    GOLD_SEPARATOR,
    OPTIONAL,
    REQUIRED,
    TABLE,
    CellError,
    Row,
    Schema,
    Table,
    instruction_fields,
    json_objects,
    listed,
    located,
    named,
    open_text,
    own_fields,
    require_object,
    written_out,
)
from palimpsest.files import UserError

DECODED = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aiff", ".aif", ".au", ".w64")
# The others are rows all the same, which the filters report.
AUDIO_SUFFIXES = (*DECODED, ".m4a", ".aac", ".mp4", ".webm", ".wma", ".amr", ".3gp", ".caf")
METADATA = ("metadata.csv", "metadata.jsonl")
RECORDINGS = Schema({**REQUIRED, "audio": ("file_name",)}, OPTIONAL, own_fields)  # the columns of METADATA
BESIDE = Schema(REQUIRED, OPTIONAL, own_fields, has_audio_elsewhere=True)  # of a text beside its recording
INSTRUCTIONS = Schema(named("instruction", "output"), named("input"), instruction_fields)
LLAMA_TABLE = "llama_questions_300.tsv"
LLAMA_COLUMNS = ("Questions", "Answer", "Wav Filename")
WEB_FILES = {"train": "trainmodel.json", "val": "val.json", "test": "test.json"}


def _file_of_split(path: Path, split: str, suffix: str) -> Path:
    """A file is one split, whatever its name; a folder holds SPLIT.csv, SPLIT.jsonl or SPLIT.json."""
    if not path.is_dir():
        return path
    file = path / f"{split}{suffix}"
    if not file.is_file():
        present = ", ".join(sorted(other.stem for other in path.glob(f"*{suffix}"))) or "none"
        raise UserError(f"{path} has no split {split!r}; it has: {present}.")
    return file


def _json(file: Path) -> Any:
    with open_text(file) as lines:
        try:
            return json.load(lines)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} is not valid JSON ({error}); correct it or download it again.") from error


def manifest(path: Path, split: str) -> Table:
    file = _file_of_split(path, split, ".jsonl")
    return listed("", str(file), lambda: manifest_rows(file))


def own_csv(path: Path, split: str) -> Table:
    file = _file_of_split(path, split, ".csv")
    return _csv_table("table", file, file, TABLE)


def _csv_table(name: str, where: Path, file: Path, schema: Schema) -> Table:
    next(_csv_rows(file, schema), None)  # a missing column is an error now, not in the middle of a study
    return listed(name, str(where), lambda: _csv_rows(file, schema))


def _csv_rows(file: Path, schema: Schema) -> Iterator[Row]:
    with open_text(file) as lines:
        reader = csv.reader(lines)
        try:
            header = next(reader, [])
            columns = schema.columns(header, str(file))
            place = {key: header.index(column) for key, column in columns.items()}
            # One `answer` is a sentence and stays whole.
            several = columns["answers"].strip().lower() == "answers"
            for position, line in enumerate(filter(None, reader)):  # an empty line is no row
                where = f"{file}:{reader.line_num}"
                if len(line) != len(header):
                    raise UserError(
                        f"{where}: {len(line)} cells, the first line has {len(header)}; put a cell that holds a comma "
                        "or a line feed in quotation marks, and leave none out."
                    )
                cells: dict[str, Any] = {key: line[at] for key, at in place.items()}
                for key in {"answers", "answer"} & cells.keys():
                    cells[key] = _number(cells[key])
                try:
                    if several:
                        cells["answers"] = _several(cells["answers"])
                except CellError as error:
                    raise UserError(f"{where}: {error}.") from error
                yield schema.row(position, where, cells, file.parent)
        except csv.Error as error:
            raise UserError(
                f"{file}:{reader.line_num}: not valid CSV ({error}); correct the quotation marks."
            ) from error


def _several(cell: str) -> Any:
    """The gold strings of a cell: a JSON list, or strings with GOLD_SEPARATOR between them."""
    found = written_out(cell)
    return [_number(part) for part in cell.split(GOLD_SEPARATOR)] if isinstance(found, str) else found


def _number(cell: str) -> str:
    """Without the marks of a column of numbers with gaps, which programs write as 4.0 and NaN."""
    if cell.strip() in ("NaN", "nan"):
        return ""
    return cell.removesuffix(".0") if re.fullmatch(r"-?\d+\.0", cell) else cell


def is_audio_folder(path: Path) -> bool:
    folders = [path, *(child for child in path.iterdir() if child.is_dir())] if path.is_dir() else []
    return any((folder / name).is_file() for folder in folders for name in METADATA) or any(
        _text_beside(audio) for folder in folders for audio in _recordings(folder)[:1]
    )


def audio_folder(path: Path, split: str) -> Table:
    folder = path / split if (path / split).is_dir() else path
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; check the path.")
    table, lines = (folder / name for name in METADATA)
    if table.is_file():
        return _csv_table("audio", folder, table, RECORDINGS)
    if lines.is_file():
        return listed("audio", str(folder), lambda: _metadata_rows(lines))
    if _recordings(folder):
        return listed("audio", str(folder), lambda: _pairs(folder))
    present = ", ".join(sorted(child.name for child in folder.iterdir() if child.is_dir())) or "none"
    raise UserError(
        f"{folder} holds neither {METADATA[0]} nor recordings and has no split {split!r}; its folders: {present}."
    )


def _recordings(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES)


def _text_beside(audio: Path) -> Path | None:
    return next((file for s in (".json", ".txt") if (file := audio.with_suffix(s)).is_file()), None)


def _pairs(folder: Path) -> Iterator[Row]:
    """A recording without a text is a row without a question, which the filters report."""
    for position, audio in enumerate(_recordings(folder)):
        beside = _text_beside(audio)
        cells: dict[str, Any] = {"question": "", "answers": ()}
        if beside is not None and beside.suffix == ".json":
            cells = BESIDE.cells(require_object(_json(beside), str(beside)), str(beside))
        elif beside is not None:
            with open_text(beside) as lines:
                question, _, answer = lines.read().partition("\n")
            cells = {"question": question, "answers": [" ".join(answer.split())]}  # one, whatever its marks
        yield TABLE.row(position, str(audio), {**cells, "id": audio.stem, "audio": audio}, folder)


def _metadata_rows(file: Path) -> Iterator[Row]:
    for position, (number, record) in enumerate(json_objects(file)):
        where = f"{file}:{number}"
        yield RECORDINGS.row(position, where, RECORDINGS.cells(record, where), file.parent)


def alpaca(path: Path, split: str) -> Table:
    """A JSON list of {"instruction", "input" (may be absent or empty), "output"}: text, to be spoken.

    A row with an input is kept, the input on a line of its own after the instruction; where both together are too long
    to be spoken the filters drop it.
    """
    file = _file_of_split(path, split, ".json")
    records = _json(file)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file} must hold a list of objects with instruction, input and output.")
    columns = INSTRUCTIONS.columns(sorted({key for record in records for key in record}), str(file))

    def rows() -> Iterator[Row]:
        for position, record in enumerate(records):
            cells = {key: record.get(column) for key, column in columns.items()}
            yield INSTRUCTIONS.row(position, f"{file}, record {position + 1}", cells, file.parent)

    return listed("alpaca", str(file), rows)


def llama_questions(folder: Path, split: str) -> Table:
    """The table and its recordings. Gold answers are kept as published, blanks around them dropped.

    The published table has carriage returns, trailing blanks, and one question twice with two recordings. Ids
    are made of the recordings' names, so both stay.
    """
    if split != "test":
        raise UserError(f"Llama Questions has no split {split!r}; it has: test.")
    table = folder / LLAMA_TABLE
    with open_text(table, "\n") as lines:
        # Split by hand: quotation marks are part of a question, which the csv module would take for quoting.
        header, *cells = [[cell.strip() for cell in line.split("\t")] for line in lines] or [[]]
    missing = [name for name in LLAMA_COLUMNS if name not in header]
    if missing:
        raise UserError(f"{table} has no column {missing[0]!r}; its first line must be {', '.join(LLAMA_COLUMNS)}.")
    rows: dict[str, Row] = {}
    for number, line in enumerate(cells, start=2):
        if not any(line):
            continue
        where = f"{table}:{number}"
        record = dict(zip(header, line, strict=False))
        question, answer, wav = found = [record.get(name, "") for name in LLAMA_COLUMNS]
        if not all(found) or any(line[len(header) :]):
            problem = "a cell is empty" if not all(found) else f"{len(line)} cells, the first line has {len(header)}"
            raise UserError(f"{where}: {problem}; every line needs {', '.join(LLAMA_COLUMNS)}.")
        name = f"llama_questions-{Path(wav).stem}"
        if name in rows:
            raise UserError(f"{where}: the recording {wav} is used twice; give each line its own.")
        try:
            rows[name] = Row(len(rows), where, question, (answer,), answer, name, located(wav, folder))
        except CellError as error:
            raise UserError(f"{where}: {error}.") from error
    return listed("", str(table), rows.values)


def web_questions(folder: Path, split: str) -> Table:
    """Records {"qId", "qText", "answers"}; the target sentence is the first gold answer."""
    if split not in WEB_FILES:
        raise UserError(f"WebQuestions has no split {split!r}; it has: {', '.join(WEB_FILES)}.")
    file = folder / WEB_FILES[split]
    records = _json(file)
    if not isinstance(records, list):
        raise UserError(f"{file} holds a {type(records).__name__} instead of a list of records; download it again.")
    rows: dict[str, Row] = {}
    for number, record in enumerate(records, start=1):
        where = f"{file}: record {number}"
        given = record if isinstance(record, dict) else {}
        answers = given.get("answers")
        found = [given.get("qId"), given.get("qText"), *(answers if isinstance(answers, list) else [])]
        if len(found) < 3 or not all(isinstance(item, str) and item.strip() for item in found):
            raise UserError(f"{where} lacks qId, qText or answers; correct or remove it.")
        key, question, *golds = map(str.strip, found)
        name = f"web_questions-{key}"
        if name in rows:
            raise UserError(f"{where} has the qId of another, {name}; correct or remove it.")
        rows[name] = Row(len(rows), where, question, tuple(golds), golds[0], name)
    return listed("", str(file), rows.values)
