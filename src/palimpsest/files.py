"""What every module reads and writes: the one error for users, atomic files, JSON, resumable JSON lines, hashes.

A file appears under its name only when all of it is on disk. Non-finite numbers become null: the files are strict JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input in one sentence: what is wrong, where, what to do. The command line prints it, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Atomic files
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written in the block, which gets that name when all of it is on disk.

    Where the block raises, `path` stays as it was and the temporary file goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def require_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raise UserError now rather than in the middle of a write."""
    free = shutil.disk_usage(existing(folder)).free
    if free < n_bytes:
        raise UserError(
            f"{what} needs {n_bytes / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder with --out."
        )


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------
def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tables(path: Path, tables: Mapping[str, Any]) -> None:
    """A mapping of tables as JSON with one record a line, for a file that can be read and compared line by line."""

    def written(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return to_line(value)[:-1]
        return "[\n" + ",\n".join(f"  {to_line(row)[:-1]}" for row in value) + "\n ]"

    entries = ",\n".join(f" {json.dumps(key)}: {written(value)}" for key, value in tables.items())
    write_text(path, f"{{\n{entries}\n}}\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; run the step of the study that writes it first.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the study again.") from error


def to_line(row: Any) -> str:
    """One line of a JSON-lines file."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(map(to_line, rows)))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): it also splits at U+2028 and U+0085, which may stand inside a JSON string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines that grow: appended to, killed at any moment, continued
# ---------------------------------------------------------------------------------------------------------------------
def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Append the rows and flush them to disk; returns the size of the file, in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write("".join(map(to_line, rows)).encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def drop_cut_line(path: Path) -> bool:
    """Remove a last line that a kill cut short, so that appending can go on; whether there was one."""
    content = path.read_bytes() if path.exists() else b""
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        with path.open("r+b") as file:
            file.truncate(complete)
    return complete < len(content)


def read_lines(path: Path, remedy: str, *, finished: bool = False) -> list[tuple[str, Any]]:
    """(where, value) of every complete line, or with `finished` of every line; [] where there is no file.

    Raises UserError, with `remedy`, for a line that is not JSON.
    """
    content = path.read_bytes() if path.exists() else b""
    rows = []
    for number, line in enumerate(content[: None if finished else content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append((f"{path}:{number}", json.loads(line)))
        except ValueError as error:  # no JSON, or no UTF-8
            raise UserError(f"{path}:{number} is not JSON; {remedy}.") from error
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Hashes
# ---------------------------------------------------------------------------------------------------------------------
def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_value(value: Any) -> str:
    """SHA-256 of the value's canonical JSON; anything that is not JSON is an error."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What differs between two JSON mappings: a resume with other options is refused with these words
# ---------------------------------------------------------------------------------------------------------------------
MOST_SHOWN = 4


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two JSON mappings, by dotted key, in the order of `new`: ["training.epochs: 1 → 2"]."""
    found: list[str] = []
    for key in [*new, *(key for key in old if key not in new)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after or (key in old) != (key in new):
            shown = [_shown(values, key) for values in (old, new)]
            found.append(f"{prefix}{key}: {shown[0]} → {shown[1]}")
    return found


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_words(found: list[str]) -> str:
    """The first differences for an error message: "seed: 0 → 1; training.epochs: 1 → 2; and 3 more"."""
    more = f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return "; ".join(found[:MOST_SHOWN]) + more
