"""Audio in and out: reading recordings, writing FLAC, and speaking questions with a text-to-speech voice.

All audio inside palimpsest is mono, float32 in [-1, 1], at 16 kHz. Spoken questions are files named by a hash
of everything that determines their samples, so speaking is resumable and runs share what they have in common.

>>> spoken = speak(examples, Path("runs/demo/data/audio"))     # doctest: +SKIP

Legend: samples = audio samples at 16 kHz.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import soundfile
import soxr

from palimpsest.data.records import MAX_AUDIO_SECONDS, Example, audio_problem
from palimpsest.rundir import UserError, hash_value

if TYPE_CHECKING:
    from jaxtyping import Float32
    from numpy import ndarray

SAMPLE_RATE = 16_000  # Hz, what Whisper encoders take
ENCODING = "flac-16bit-16kHz"  # part of the file names: change it when the samples change for the same voice
SPEED = 1.0  # the voice's own pace

Speaker: TypeAlias = "Callable[[str, float, int], tuple[Float32[ndarray, 'samples'], int]]"
"""text, speed, seed → mono audio in [-1, 1] and its sample rate in Hz; equal arguments give equal samples."""


# ------------------------------------------------------------------------------------------------------------
# Voices
# ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Voice:
    """A text-to-speech voice. `load` runs once in every worker process: an importable function, no lambda."""

    name: str
    version: Callable[[], str]  # raises UserError where the voice is not installed
    load: Callable[[], Speaker]


def _hibari_version() -> str:
    try:
        return metadata.version("hibari-tts")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "The voice hibari is not installed; run `pip install --no-deps -r requirements/embedded.txt`."
        ) from error


def _load_hibari() -> Speaker:
    try:
        from hibari import SAMPLE_RATE as RATE
        from hibari import Hibari
    except ImportError as error:
        raise UserError(
            f"The voice hibari cannot be loaded ({error}); run `pip install onnxruntime` and "
            "`pip install --no-deps -r requirements/embedded.txt`."
        ) from error
    synthesizer = Hibari()  # one thread: the workers are the parallelism
    return lambda text, speed, seed: (synthesizer(text, speed=speed, seed=seed), RATE)


VOICES = {"hibari": Voice("hibari", _hibari_version, _load_hibari)}


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------
def read_audio(path: Path) -> Float32[ndarray, " samples"]:
    """Read any format libsndfile knows; channels are averaged, other rates resampled to 16 kHz.

    Raises:
        UserError: naming the file: missing, unreadable, empty, longer than MAX_AUDIO_SECONDS, or not finite.
    """
    problem = audio_problem(path)
    if problem is not None:
        raise UserError(problem[0].upper() + problem[1:])
    try:
        frames, rate = soundfile.read(str(path), dtype="float32", always_2d=True)  # (frames, channels)
    except soundfile.SoundFileError as error:
        raise UserError(f"The audio file {path} cannot be decoded ({error}); convert it again.") from error
    audio = _to_16_khz(frames.mean(axis=1), rate)
    if len(audio) == 0:
        raise UserError(f"The audio file {path} is empty; record it again or remove it.")
    if not np.isfinite(audio).all():
        raise UserError(f"The audio file {path} holds values that are no numbers; record it again.")
    return audio


def write_flac(path: Path, audio: Float32[ndarray, " samples"]) -> None:
    """Write 16 kHz mono audio as 16-bit FLAC, under a temporary name first; values beyond ±1 are clipped."""
    if audio.ndim != 1 or len(audio) == 0 or not np.isfinite(audio).all():
        raise ValueError(f"write_flac takes finite, non-empty mono audio, not shape {audio.shape} for {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        with temporary.open("wb") as file:
            pcm = np.round(np.clip(audio * 32768, -32768, 32767)).astype(np.int16)  # inverse of reading
            soundfile.write(file, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _to_16_khz(audio: Float32[ndarray, " frames"], rate: int) -> Float32[ndarray, " samples"]:
    resampled = audio if rate == SAMPLE_RATE else soxr.resample(audio, rate, SAMPLE_RATE)
    return np.ascontiguousarray(resampled, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------
# Speaking
# ------------------------------------------------------------------------------------------------------------
def speak(
    examples: Sequence[Example],
    folder: Path,
    voice: str | Voice = "hibari",
    workers: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Have every question without audio spoken into a FLAC file in `folder`; examples with audio keep it.

    Files that exist are not spoken again: a killed run continues where it was. Equal questions share a file.
    Measured with hibari on two CPU cores: 75 questions a second, 0.005 seconds for a second of speech.

    Args:
        voice: a name in VOICES, or a Voice of your own.
        workers: processes; with 1 it all happens in this one.
        seed: of the voice's noise; the same text with the same seed gives the same bytes.
        progress: called as progress(files done, files in all), first with those that were there already.

    Raises:
        UserError: the voice is unknown or not installed, or it cannot speak some questions within
            MAX_AUDIO_SECONDS (told once, after all others are done).
    """
    chosen = _find_voice(voice)
    version = chosen.version()
    spoken: list[Example] = []
    texts: dict[Path, str] = {}  # file → what is said in it
    for example in examples:
        if example.audio is not None:
            spoken.append(example)
            continue
        key = [ENCODING, chosen.name, version, SPEED, seed, example.question]
        path = folder / f"{hash_value(key)[:32]}.flac"
        texts[path] = example.question
        spoken.append(replace(example, audio=path, voice=chosen.name))

    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(path, text, seed) for path, text in texts.items() if not path.exists()]
    done, problems = len(texts) - len(jobs), []
    if progress is not None:
        progress(done, len(texts))
    for problem in _run(jobs, chosen, workers):
        done += 1
        if problem is not None:
            problems.append(problem)
        if progress is not None:
            progress(done, len(texts))
    if problems:
        raise UserError(
            f"{len(problems)} of {len(texts)} questions cannot be spoken by the voice {chosen.name}, "
            f"the first because {problems[0]}; change or remove these, or give them audio."
        )
    return spoken


def _find_voice(voice: str | Voice) -> Voice:
    if isinstance(voice, Voice):
        return voice
    if voice not in VOICES:
        raise UserError(f"There is no voice {voice!r}; use one of: {', '.join(VOICES)}.")
    return VOICES[voice]


_Job: TypeAlias = tuple[Path, str, int]  # file, text, seed


def _run(jobs: list[_Job], voice: Voice, workers: int) -> Iterator[str | None]:
    """Speak the jobs in their order; yields for each what `_speak_job` returns."""
    if not jobs:
        return
    if workers <= 1:
        _load_speaker(voice)
        yield from map(_speak_job, jobs)
        return
    # Spawned, not forked: a fork would copy the locks of torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_load_speaker, initargs=(voice,))
    try:
        yield from pool.map(_speak_job, jobs, chunksize=4)
    except BrokenProcessPool as error:
        raise UserError(
            "The speech workers stopped: memory may be short, or a script calls speak outside "
            '`if __name__ == "__main__":`; correct that, or use one worker.'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_speakers: list[Speaker] = []  # of this process: the one last loaded


def _load_speaker(voice: Voice) -> None:
    _speakers[:] = [voice.load()]


def _speak_job(job: _Job) -> str | None:
    """Speak one file; returns why it could not be spoken, None if all went well."""
    path, text, seed = job
    audio, rate = _speakers[0](text, SPEED, seed)
    if len(audio) == 0:
        return f"nothing in {text!r} can be pronounced"
    if len(audio) > MAX_AUDIO_SECONDS * rate:
        return f"{text[:80]!r} takes {len(audio) / rate:.1f} s, longer than {MAX_AUDIO_SECONDS:.0f} s"
    write_flac(path, _to_16_khz(audio, rate))
    return None
