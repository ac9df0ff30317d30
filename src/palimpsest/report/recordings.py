"""The spoken questions of the samples, small enough to stand inside the page.

A recording is read where the run's data/task-NAME.jsonl says it is and re-encoded as Opus (Ogg), or as FLAC where
libsndfile has no Opus or the sample rate is none of Opus's. What does not fit, or is not there, has a sentence.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from palimpsest.files import without_folders
from palimpsest.report.inputs import Inputs, at, task_name
from palimpsest.report.public import without_paths
from palimpsest.report.samples import Question

MAX_BYTES = 6 * 10**6  # of all recordings in a page, as they stand in it (base64)
MAX_SECONDS = 60.0  # of one recording
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)  # Hz
CHUNK = 16_000  # frames handed to the encoder at once; it keeps what it is given on its stack
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Recording:
    """`uri` is empty where the recording is not in the page; `why_not` then says why."""

    where: str  # the file, relative to the run directory
    about: str  # length and voice
    uri: str = ""
    why_not: str = ""
    no_room: bool = False


@dataclass(frozen=True)
class Recordings:
    """Of the questions shown. `embedded`: a line per task with recordings in the page; `missing`: for the one box."""

    by_question: Mapping[tuple[str, str], Recording]  # (task, id)
    embedded: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """What they take of the page."""
        return sum(len(recording.uri) for recording in self.by_question.values())

    @property
    def n_without_room(self) -> int:
        return sum(recording.no_room for recording in self.by_question.values())


def read_recordings(
    inputs: Inputs,
    questions: Mapping[str, Sequence[Question]],
    audio: bool = True,
    *,
    budget: int | None = None,
    encoded: dict[Path, Recording] | None = None,
) -> Recordings:
    """The recordings of `questions` (task → questions), of tasks that a model was asked in speech.

    audio: False embeds none.
    budget: bytes of all of them in the page, by default MAX_BYTES; shared evenly by the tasks.
    encoded: by file, what a call before encoded; this one adds to it.
    """
    budget, encoded = MAX_BYTES if budget is None else budget, {} if encoded is None else encoded
    spoken = {task for _, task, modality in inputs.samples if modality != "text"}
    tasks = [task for task in questions if task in spoken]
    found: dict[tuple[str, str], Recording] = {}
    embedded: list[str] = []
    missing: list[str] = []
    for task in tasks if audio else []:
        rows = _read_manifest(inputs.path / "data" / f"task-{task}.jsonl", missing)
        if rows is None:
            continue
        recordings = _of_task(inputs.path, rows, questions[task], budget // len(tasks), encoded)
        found |= {(task, identifier): recording for identifier, recording in recordings.items()}
        inside = [identifier for identifier, recording in recordings.items() if recording.uri]
        if inside:
            voices = sorted({without_folders(str(rows[i]["voice"])) for i in inside if rows[i].get("voice")})
            source = _source(inputs, task)
            details = [f"source {source}"] if source else []
            details += [f"voice {', '.join(voices)}"] if voices else []
            embedded.append(f"{len(inside)} of {task_name(task)}" + (f" ({'; '.join(details)})" if details else ""))
    return Recordings(found, tuple(embedded), tuple(missing))


def _source(inputs: Inputs, task: str) -> str:
    """What study.yaml calls the data of `task`, without folders of the machine it ran on."""
    for entry in at(inputs.config, "evaluation", "tasks") or []:
        if at(entry, "name") == task and at(entry, "source"):
            kind, separator, folder = str(entry["source"]).partition(":")
            return f"{kind}:{PurePosixPath(folder).name}" if separator else PurePosixPath(kind).name
    return ""


def _read_manifest(path: Path, missing: list[str]) -> dict[str, dict[str, Any]] | None:
    """Rows by id; None, with a line in `missing`, where the file cannot be read."""
    where = f"data/{path.name}"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        missing.append(f"{where} is not there, so the spoken questions cannot be played.")
        return None
    except (OSError, ValueError) as error:
        missing.append(f"{where} cannot be read ({_reason(error, path)}); no spoken question is played.")
        return None
    return {str(row["id"]): row for row in rows if isinstance(row, dict) and "id" in row}


def _of_task(
    run: Path,
    rows: Mapping[str, Mapping[str, Any]],
    questions: Sequence[Question],
    budget: int,
    encoded: dict[Path, Recording],
) -> dict[str, Recording]:
    """Recordings by question id; `budget`: bytes of data URIs; `encoded`: by file, which may be many questions'."""
    found: dict[str, Recording] = {}
    left = budget
    for question in questions:
        row = rows.get(question.id, {})
        audio = row.get("audio")
        if not isinstance(audio, str) or not audio:
            found[question.id] = Recording("", "", why_not="the run's data name no recording of this question")
            continue
        path = run / "data" / audio
        if path not in encoded:
            encoded[path] = _encoded(path, audio, row.get("voice"))
        recording = encoded[path]
        if len(recording.uri) > left:
            why = f"the recordings of a task share {budget / 1e6:.1f} MB of this page"
            recording = Recording(recording.where, recording.about, why_not=why, no_room=True)
        left -= len(recording.uri)
        found[question.id] = recording
    return found


def _encoded(path: Path, audio: str, voice: object) -> Recording:
    import soundfile

    outside = PurePosixPath(audio).is_absolute()
    where = f"{path.name}, outside the run directory" if outside else f"data/{audio}"
    if not path.is_file():
        return Recording(where, "", why_not="the file is not there")
    try:
        header = soundfile.info(path)
        about = f"{header.duration:.1f} s" + (f", voice {without_folders(str(voice))}" if voice else "")
        if header.duration > MAX_SECONDS:
            return Recording(where, about, why_not=f"longer than {MAX_SECONDS:.0f} s")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        return Recording(where, "", why_not=f"the file cannot be read ({_reason(error, path)})")
    return Recording(where, about, uri=to_uri(samples.mean(axis=1), rate))


def _reason(error: Exception, path: Path) -> str:
    return without_paths(" ".join(str(error).split()), path)[:80]


def to_uri(samples: npt.NDArray[np.float32], rate: int) -> str:
    """`samples` (frames,) in [-1, 1] at `rate` Hz as a data: URI; the same samples give the same bytes."""
    import soundfile

    opus = rate in OPUS_RATES and "OPUS" in soundfile.available_subtypes("OGG")
    container, subtype = ("OGG", "OPUS") if opus else ("FLAC", "PCM_16")
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, subtype=subtype, format=container) as file:
        for start in range(0, len(samples), CHUNK):
            file.write(samples[start : start + CHUNK])
    data = _without_serial(buffer.getvalue()) if opus else buffer.getvalue()
    return f"data:audio/{container.lower()};base64,{base64.b64encode(data).decode()}"


def _without_serial(ogg: bytes) -> bytes:
    """The same stream with serial number 0 in place of a random one (RFC 3533: page header of 27 bytes + lacing)."""
    pages = bytearray(ogg)
    start = 0
    while start < len(pages):
        lacing = pages[start + 27 : start + 27 + pages[start + 26]]
        end = start + 27 + len(lacing) + sum(lacing)
        pages[start + 14 : start + 18] = bytes(4)
        pages[start + 22 : start + 26] = bytes(4)  # the checksum is computed over itself as zero
        pages[start + 22 : start + 26] = _ogg_checksum(bytes(pages[start:end])).to_bytes(4, "little")
        start = end
    return bytes(pages)


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with the polynomial of zlib's, but neither mirrored nor inverted, from 0."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
