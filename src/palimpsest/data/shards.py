"""Shards: files of encoder frames that are written once and whole, read through the memory map, and checked.

A shard is a safetensors file: float16 frames (time, d_enc) of some utterances, each under the hash of its audio. Its
name is the hash of those hashes, so that whoever computes the same utterances writes the same file. It appears under
its name only when it is complete; the process that holds the lock on its temporary file is the one that writes it.

Legend: time = encoder frames of an utterance, d_enc = encoder width.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from palimpsest.files import UserError, hash_value, read_json, write_json

if TYPE_CHECKING:
    from jaxtyping import Float16
    from numpy import ndarray

DTYPE = np.dtype(np.float16)
SUFFIX = ".safetensors"
VERIFIED = "verified.json"
LENGTH_BYTES = 8  # in front of the header: its length, little-endian
REMEDY = "delete it and run again: only what it held is computed again"


@dataclass(frozen=True)
class Shard:
    """What the header of a shard says."""

    path: Path
    n_bytes: int
    dim: int  # d_enc
    sha256: str  # see `_checksum`
    spans: dict[str, tuple[int, int]]  # hash of the audio → byte in the file where its frames begin, and their number


def shard_name(keys: Iterable[str]) -> str:
    return hash_value(sorted(keys))[:32] + SUFFIX


def write_shard(file: IO[bytes], path: Path, frames: Mapping[str, Float16[ndarray, "time d_enc"]]) -> None:
    """Fill the claimed temporary `file` (see `claim`) and give it its name."""
    from safetensors.numpy import save

    checksum = _checksum((key, len(frames[key]), frames[key].tobytes()) for key in sorted(frames))
    file.truncate(0)
    file.write(save(dict(frames), metadata={"sha256": checksum}))
    file.flush()
    os.fsync(file.fileno())
    _temporary(path).replace(path)


def _checksum(frames: Iterable[tuple[str, int, bytes]]) -> str:
    """Of key, number of frames and frames of every utterance, ordered by key."""
    digest = hashlib.sha256()
    for key, count, content in frames:
        digest.update(f"{key} {count} ".encode() + content)
    return digest.hexdigest()


def read_shard(path: Path) -> Shard:
    """The header. Raises UserError, naming the file, where it is no shard or its size is not what the header says."""
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
            if start > n_bytes:
                raise UserError(f"The shard {path} is cut short; {REMEDY}.")
            header = json.loads(file.read(start - LENGTH_BYTES))
        sha256 = str(header.pop("__metadata__")["sha256"])
        (dim,) = {int(entry["shape"][1]) for entry in header.values()}
        spans = {key: (start + int(entry["data_offsets"][0]), int(entry["shape"][0])) for key, entry in header.items()}
        end = max(first + count * dim * DTYPE.itemsize for first, count in spans.values())
    except OSError as error:
        raise UserError(f"The shard {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"The file {path} is no shard of encoder frames, or is damaged; {REMEDY}.") from error
    if end != n_bytes:
        raise UserError(f"The shard {path} has {n_bytes} bytes instead of {end}: it is cut short; {REMEDY}.")
    return Shard(path, n_bytes, dim, sha256, spans)


def verify_shard(shard: Shard) -> None:
    """Raise UserError, naming the file, where the frames are not those that were written. Reads the whole file."""
    with shard.path.open("rb") as file:

        def content(key: str) -> tuple[str, int, bytes]:
            first, count = shard.spans[key]
            file.seek(first)
            return key, count, file.read(count * shard.dim * DTYPE.itemsize)

        checksum = _checksum(map(content, sorted(shard.spans)))
    if checksum != shard.sha256:
        raise UserError(f"The shard {shard.path} is damaged: its checksum is wrong; {REMEDY}.")


class Shards(dict[str, Shard]):
    """The shard of every utterance, by hash of its audio: those in one folder at the last `refresh`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._read: set[str] = set()  # names of files

    def refresh(self) -> None:
        """Read the headers of the shards that are new; of several with one utterance the first by name counts."""
        found = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        for name in sorted(found - self._read):  # a glob takes twenty times as long, each time
            if name.endswith(SUFFIX) and not name.startswith("."):
                self._read.add(name)
                shard = read_shard(self.folder / name)
                for key in shard.spans:
                    self.setdefault(key, shard)

    def verify(self, keys: Iterable[str]) -> None:
        """`verify_shard` for the shards of these utterances; one that was found right before is not read again.

        What was found right stands in the folder, with size and time of the file.
        """
        file = self.folder / VERIFIED
        known = read_json(file) if file.exists() else {}
        known = known if isinstance(known, dict) else {}
        found = {}
        for name, shard in {self[key].path.name: self[key] for key in keys if key in self}.items():
            found[name] = [shard.n_bytes, shard.path.stat().st_mtime_ns]
            if known.get(name) != found[name]:
                verify_shard(shard)
        if not found.items() <= known.items():
            write_json(file, known | found)


# ---------------------------------------------------------------------------------------------------------------------
# Who writes
# ---------------------------------------------------------------------------------------------------------------------
def claim(path: Path, wait: bool) -> IO[bytes] | None:
    """The temporary file of the shard `path`, open and locked: the caller is to write it, then close the file.

    None where the shard is finished, or, without `wait`, where another process is at it. The lock goes with the
    process: after a kill another one takes the file over.
    """
    temporary = _temporary(path)
    while True:
        file = os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise UserError(
                f"The folder {path.parent} has no file locks ({error.strerror}), without which two processes could "
                "spoil a shard; choose a folder on another file system."
            ) from error
        if path.exists():
            temporary.unlink(missing_ok=True)
            file.close()
            return None
        # The file that was opened may have been renamed or removed before it was locked.
        if temporary.exists() and os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
            return file
        file.close()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
