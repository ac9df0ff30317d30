"""What every module reads and writes: the one error for users, atomic files, locks, JSON, resumable JSON lines, hashes.

A file appears under its name only when all of it is on disk. Non-finite numbers become null: the files are strict JSON.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id
from typing import IO, Any


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
    # Two processes, or two threads, may write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{get_native_id()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)  # the name too
    finally:
        temporary.unlink(missing_ok=True)


def remove_left_over(folder: Path) -> None:
    """Remove the temporary files that killed processes left of `replacing` in a folder and those below it."""
    for left in folder.rglob(".*.tmp"):
        if _abandoned(left):
            left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_folder(working: Path, target: Path) -> None:
    """Give a folder that is complete its name, when all of it is on disk. `target` must not be there, or be empty."""
    for path in [*working.rglob("*"), working]:
        sync(path)
    working.rename(target)
    sync(target.parent)


def working_folder(target: Path) -> Path:
    """A new folder beside `target` to write in; what killed processes left of theirs goes."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    working = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    working.mkdir(parents=True)
    return working


def _abandoned(temporary: Path) -> bool:
    """Whether the process that a temporary name (`.NAME.PROCESS.tmp`, `.NAME.PROCESS-THREAD.tmp`) holds has ended."""
    process = temporary.name.removesuffix(".tmp").rpartition(".")[2].partition("-")[0]
    if not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # somebody else's
    return False


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


LOCK = ".lock"  # a file in a folder while a process writes there: who, where, since when
_held: set[Path] = set()  # a process's own locks, which the system does not hold against itself


def require_unwritten(file: Path, what: str) -> None:
    """Raise UserError if `file`, the last that a command writes, is there: it may have taken long to make.

    And if it could not be written, because something that is no folder has the name of its folder.
    """
    if not (folder := existing(file.parent)).is_dir():
        raise UserError(f"{folder} is a file, and a folder belongs there; write elsewhere.")
    if file.exists():
        raise UserError(f"{file.parent} holds {what} already; delete the folder or write elsewhere.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block this process alone writes into `folder`, which is made if need be; a kill ends that too.

    Raises UserError, which says who writes there, if another process does.
    """
    path = folder.absolute() / LOCK
    if path in _held:
        raise UserError(f"{folder} is written to by this process already; give another folder with --out.")
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); give another folder with --out.") from error
    _held.add(path)
    try:
        with suppress(OSError):  # a full disk is reported by what the block writes
            file.truncate(0)
            file.write(json.dumps([os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")]).encode())
            file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: see _lock
        file.close()
        _held.discard(path)
        if not was_there:
            with suppress(OSError):
                folder.rmdir()  # only when nothing came of it, which leaves it empty


def _lock(path: Path, folder: Path) -> IO[bytes]:
    """The locked file. A record lock: it ends with the process, and its children do not inherit it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            try:
                process, host, since = json.loads(file.read())
                holder = f"process {process} on {host}, since {since}"
            except ValueError:
                holder = "just started"
            file.close()
            raise UserError(
                f"{folder} is in use by another palimpsest ({holder}); wait until it is done, stop it, "
                "or give another folder with --out."
            ) from error
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): start nothing else there.", stacklevel=3)
            return file
        # The last holder may have removed the file between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def without_folders(name: str) -> str:
    """The name of a model or of data for a page that others read: of an absolute path the last part alone.

    >>> without_folders("llama_questions:/home/ada/data/llama"), without_folders("meta-llama/Llama-3.2-1B")
    ('llama_questions:…/llama', 'meta-llama/Llama-3.2-1B')
    """
    return re.sub(r"^([a-z_]+:)?[/~].*?([^/]+)/*$", r"\1…/\2", name)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name too long for any is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or will be."""
    return shutil.disk_usage(existing(folder)).free


def require_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Raise UserError now rather than in the middle of a write."""
    free = free_bytes(folder)
    if free < n_bytes:
        raise UserError(
            f"{what} needs {n_bytes / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free; "
            "free some space or choose another folder with --out."
        )


DISK = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS
NAMES = errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP


def system_failure(error: BaseException) -> str | None:
    """A sentence for an error of the disk or of a file's name; None for any other.

    Libraries in other languages give the system's number in words only: "No space left on device (os error 28)"; torch
    says of a file that did not take all of a checkpoint where its writer stopped.
    """
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError) and re.search(
        r"inline_container\.cc.*unexpected pos|PytorchStreamWriter", str(error)
    ):
        number = errno.ENOSPC
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    file = getattr(error, "filename", None)
    if number in DISK:
        where = f"{file} cannot be written" if file else "A file cannot be written"
        return f"{where} ({os.strerror(number)}); make room there and give the same command again, it continues."
    if number in NAMES and file:
        return f"{file} cannot be used ({os.strerror(number)}); correct the name, or what may be done with the file."
    return None


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
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise UserError(f"{path} is not valid JSON ({error}); delete it and run the study again.") from error


def to_line(row: Any) -> str:
    """One line of a JSON-lines file."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(to_line, rows))  # one after the other: there may be a million


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of a finished file. Raises UserError where there is none, and for a line that is not JSON."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; run the step of the study that writes it first.")
    return [row for _, row in read_lines(path, "delete it and run again what wrote it", finished=True)]


# ---------------------------------------------------------------------------------------------------------------------
# JSON lines that grow: appended to, killed at any moment, continued
# ---------------------------------------------------------------------------------------------------------------------
def append_jsonl(path: Path, rows: Iterable[Any]) -> int:
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
        except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
            raise UserError(f"{path}:{number} is not JSON; {remedy}.") from error
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Hashes
# ---------------------------------------------------------------------------------------------------------------------
LARGE_BYTES = 16 * 2**20  # a file of so many is read once in a process, as long as nothing has changed it,
SETTLED_NS = 2 * 10**9  # if its last change was so long ago that another one must have another time
_hashes: dict[tuple[int, ...], str] = {}


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        which = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if which in _hashes:
            return _hashes[which]
        settled = stat.st_size >= LARGE_BYTES and time.time_ns() - stat.st_ctime_ns > SETTLED_NS
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if settled:
        _hashes[which] = found
    return found


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
