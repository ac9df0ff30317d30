"""From a row to an example: what is left out of training and held-out data, and why.

Two kinds of reasons. A row that is not meant (a later turn of a conversation, a question that stands in the held-out
data or in a task) is left out always. A row that is faulty (empty, too long, broken or silent audio) is left out and
listed, or, in strict reading, an error. Nothing is cut or repaired; applied twice the filters give what they gave once.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import numpy as np
import soundfile
from annotated_types import Ge, Gt, Le, Lt

from palimpsest.data.examples import Example, beyond
from palimpsest.data.rows import Row
from palimpsest.data.speech import ENCODING, file_of, to_16_khz, write_flac
from palimpsest.files import UserError, hash_value, is_file, replacing

if TYPE_CHECKING:
    from jaxtyping import Float32
    from numpy import ndarray

LATER_TURN, IN_HELDOUT, IN_TASK = "later turn", "question in held-out", "question in task"
NOT_MEANT = (LATER_TURN, IN_HELDOUT, IN_TASK)  # left out in strict reading too
SPEAKER_TAG = re.compile(r"^(?:\s*<USER>:)+\s*")  # VoiceAssistant-400K writes it in front of some questions
HEAD_BYTES = 65_536  # of a WAV file, in which its data chunk begins
# What programs write for the length of data into a pipe, in bytes: 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2e9, each also
# less a header. No recording that is used here is as long.
PLACEHOLDER = 1_990_000_000
DURATION_TOLERANCE = 0.1  # seconds between what a header says and what can be decoded

Problem: TypeAlias = tuple[str, str]  # reason, detail
Keep: TypeAlias = "Callable[[Path | bytes], Path | Problem | None]"  # a recording → its file, what is wrong, or none


@dataclass(frozen=True)
class Filters:
    """Limits beyond which an example is left out. The defaults keep everything that can be spoken and encoded."""

    max_question_words: Annotated[int, Ge(1)] = 100  # more cannot be said in 30 s
    max_answer_words: Annotated[int, Ge(1)] = 1000
    max_answer_characters: Annotated[int, Ge(1)] = 8000
    min_audio_seconds: Annotated[float, Ge(0)] = 0.2
    max_audio_seconds: Annotated[float, Gt(0), Le(30)] = 30.0  # what a Whisper encoder sees at once
    silence_peak: Annotated[float, Ge(0), Lt(1)] = 0.001  # of the mono mix, 1 is full scale: −60 dB


@dataclass(frozen=True)
class Dropped:
    """One row that was left out: why, and what about it."""

    id: str
    where: str
    reason: str  # one of a few words, for counting
    detail: str

    @property
    def is_fault(self) -> bool:
        return self.reason not in NOT_MEANT

    def to_row(self, split: str) -> dict[str, str]:
        return {"split": split, **asdict(self)}


def parse_filters(pairs: Sequence[str]) -> Filters:
    """Filters from "KEY=VALUE" strings. Raises UserError for an unknown key and for a value out of range."""
    from palimpsest.options import checked

    values = [pair.partition("=") for pair in pairs]
    return checked(Filters, {key.strip(): value.strip() for key, _, value in values}, "--filter")


def without_speaker_tag(question: str) -> str:
    return SPEAKER_TAG.sub("", question)


def normalised_question(question: str) -> str:
    """Letters, digits and single blanks in one case: what two questions share that differ in nothing that matters."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", question).casefold()))


def text_problem(row: Row, filters: Filters) -> Problem | None:
    """The first thing that keeps this row out, None if its text is fine."""
    question_words, answer_words = len(row.question.split()), len(row.answer.split())
    if row.later_turn:
        return LATER_TURN, "not the first turn of its conversation"
    if not normalised_question(row.question):
        return "empty question", f"the question is {row.question!r}"
    if not row.answers or not row.answer:
        return "empty answer", f"no answer to {row.question[:60]!r}"
    if question_words > filters.max_question_words:
        return "long question", f"{question_words} words, the limit is {filters.max_question_words}"
    if answer_words > filters.max_answer_words:
        return "long answer", f"{answer_words} words, the limit is {filters.max_answer_words}"
    if len(row.answer) > filters.max_answer_characters:
        return "long answer", f"{len(row.answer)} characters, the limit is {filters.max_answer_characters}"
    return None


@dataclass(frozen=True)
class Recording:
    """A decoded recording: 16 kHz mono samples, and its length as it was."""

    samples: Float32[ndarray, " samples"]
    seconds: float


def decode(audio: Path | bytes, filters: Filters) -> Recording | Problem:
    """The recording, or what is wrong with it. Any rate, any channels; nothing is cut."""
    if isinstance(audio, Path) and not is_file(audio):
        return "broken audio", f"{audio} does not exist"
    limit = f"{filters.max_audio_seconds:g} s"
    try:
        with soundfile.SoundFile(io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)) as file:
            rate, announced = file.samplerate, file.frames / file.samplerate
            if announced > filters.max_audio_seconds:
                return "long audio", f"{beyond(announced, filters.max_audio_seconds)} s, the limit is {limit}"
            frames, log = file.read(dtype="float32", always_2d=True), file.extra_info  # (time, channels)
    except soundfile.LibsndfileError as error:
        # Without the object's address, which would be another each time.
        return "broken audio", f"cannot be decoded: {error.error_string.rstrip('.')}; convert it to WAV or FLAC"
    except OSError as error:
        return "broken audio", f"cannot be read: {error.strerror}"
    seconds = len(frames) / rate
    missing = _missing_bytes(audio) or _is_cut(log)
    if len(frames) == 0 or not np.isfinite(frames).all():
        return "broken audio", "it holds no sample" if len(frames) == 0 else "it holds values that are no numbers"
    if missing or abs(announced - seconds) > DURATION_TOLERANCE:
        return "wrong duration", f"cut short: {seconds:.2f} s can be decoded, the header announces more"
    least = filters.min_audio_seconds
    if seconds < least:
        return "wrong duration", f"{beyond(seconds, least, 2)} s, at least {least:g} s are needed"
    mono = frames.mean(axis=1)
    peak = float(np.abs(mono).max())
    if peak < filters.silence_peak:
        shown = f"{peak:.2g}" if float(f"{peak:.2g}") < filters.silence_peak else f"{peak:.9g}"
        return "silent audio", f"its peak is {shown}, the threshold {filters.silence_peak:g}"
    return Recording(to_16_khz(mono, rate), seconds)


def _missing_bytes(audio: Path | bytes) -> bool:
    """Whether a WAV file ends before its data chunk does, which libsndfile does not report.

    A size of 0 or a PLACEHOLDER, which programs write that cannot seek, says nothing.
    """
    if isinstance(audio, bytes):
        data, size = audio, len(audio)
    else:
        with audio.open("rb") as file:
            data, size = file.read(HEAD_BYTES), audio.stat().st_size
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return False
    position = 12
    while position + 8 <= len(data):
        name, length = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        if name == b"data":
            return bool(0 < length < PLACEHOLDER and position + 8 + length > size)
        position += 8 + length + length % 2
    return False


def _is_cut(log: str) -> bool:
    """Whether libsndfile's log says that a file of another format (AIFF, AU, W64, RF64) ends before its data does."""
    sizes = re.findall(r"^\s*(SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", log, re.MULTILINE)
    return any(int(there) < int(announced) < PLACEHOLDER for _, announced, there in sizes)


def store(audio: Path | bytes, folder: Path, filters: Filters) -> Path | Problem:
    """Check a recording and write it to `folder` as 16 kHz mono FLAC, or say what is wrong with it.

    The file is named by content and limits: one that exists has passed and is not decoded again.
    """
    # A file is decoded first: one of hours is not read whole to be hashed.
    found = decode(audio, filters) if isinstance(audio, Path) else None
    if isinstance(found, tuple):
        return found
    content = audio if isinstance(audio, bytes) else audio.read_bytes()
    path = file_of(folder, hash_value([ENCODING, asdict(filters), hashlib.sha256(content).hexdigest()]))
    if path.exists():
        return path
    found = found or decode(audio, filters)
    if isinstance(found, tuple):
        return found
    write_flac(path, found.samples)
    return path


# ------------------------------------------------------------------------------------------------------------
# From a row to an example
# ------------------------------------------------------------------------------------------------------------
NO_LIMITS = Filters(max_question_words=10**9, max_answer_words=10**9, max_answer_characters=10**9)


def take(
    row: Row, name: str, filters: Filters, keep: Keep = lambda _: None, strict: str | None = None
) -> Example | Dropped:
    """The row as an example under the id `name`, or why it is left out.

    Args:
        keep: checks the recording of a row whose text is fine, and says which file it is from now on; left out, only
            the text is looked at.
        strict: what is read, for the error that a faulty row then is. A row that is not meant is left out all the same.
    """
    problem = text_problem(row, filters)
    kept = keep(row.audio) if problem is None and row.audio is not None else None
    if isinstance(kept, tuple):
        problem, kept = kept, None
    if problem is None:
        return Example.of(row, name, kept)
    dropped = Dropped(name, row.where, *problem)
    if strict is not None:
        refuse_fault(dropped, strict)
    return dropped


def refuse_fault(dropped: Dropped, where: str) -> None:
    """Raises the UserError of strict reading for a faulty row."""
    if dropped.is_fault:
        raise UserError(
            f"{dropped.where}: {dropped.reason} ({dropped.detail}); correct or remove it, "
            f"or read {where} without strict, which drops and lists such rows."
        )


def store_as_it_is(audio: bytes, folder: Path) -> Path:
    """A faulty recording of a table as a file, for a question that is kept although it cannot be asked."""
    path = folder / f"{hashlib.sha256(audio).hexdigest()[:32]}.faulty"
    with replacing(path) as temporary:
        temporary.write_bytes(audio)
    return path


def counts(reasons: Iterable[str]) -> dict[str, int]:
    """How many were left out for each reason, the most frequent first."""
    return dict(Counter(reasons).most_common())


INSPECT = "look at it with `palimpsest data inspect`, correct it, or change the filters"


def require_some(n_kept: int, dropped: Mapping[str, int], where: str, remedy: str = INSPECT) -> None:
    """Raises UserError for a split of which nothing is left, saying what dropped how many, and `remedy`."""
    if n_kept == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        if IN_TASK in dropped:
            remedy = "train on other questions than the tasks ask, or give data.decontaminate: false"
        raise UserError(f"Nothing is left of {where} ({reasons or 'it has no rows'}); {remedy}.")
