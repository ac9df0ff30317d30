"""Audio in and out: reading recordings, writing FLAC, and speaking questions with text-to-speech voices.

All audio inside palimpsest is mono, float32 in [-1, 1], at 16 kHz. Spoken questions are files named by a hash
of everything that determines their samples, so speaking is resumable and runs share what they have in common.

>>> spoken = speak(examples, Path("runs/demo/data/audio"), ["hibari", "espeak-ng:en-us+m3"])     # doctest: +SKIP

Legend: samples = audio samples at 16 kHz.
"""

from __future__ import annotations

import io
import multiprocessing
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from operator import call
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from palimpsest.data.cores import cores_of_this_rank, n_cores
from palimpsest.data.examples import MAX_AUDIO_SECONDS, Example, audio_problem, beyond
from palimpsest.data.voices import Speaker, Unspeakable, Voice, Voices, choose_voice, find_voices
from palimpsest.files import UserError, hash_value, replacing
from palimpsest.models import SAMPLE_RATE
from palimpsest.parallel import dealt_back, gathered, my_share, share, world_size

if TYPE_CHECKING:
    from jaxtyping import Float32
    from numpy import ndarray

ENCODING = "flac-16bit-16kHz"  # part of the file names: change it when the samples change for the same voice

PER_WORKER = 32  # questions at least, where nobody says how many processes: to start one takes as long as some of them

Workers: TypeAlias = "int | ProcessPoolExecutor | None"  # processes; None: one for each core; or those of a `pool`
Call: TypeAlias = Callable[[], str | None]  # writes one file, in whichever process; returns what went wrong, or None


def read_audio(path: Path) -> Float32[ndarray, " samples"]:
    """Read any format libsndfile knows; channels are averaged, other rates resampled to 16 kHz.

    Raises:
        UserError: naming the file: missing, unreadable, empty, longer than MAX_AUDIO_SECONDS, or not finite.
    """
    problem = audio_problem(path)
    if problem is not None:
        raise UserError(problem[0].upper() + problem[1:])
    import soundfile

    try:
        frames, rate = soundfile.read(str(path), dtype="float32", always_2d=True)  # (frames, channels)
    except soundfile.SoundFileError as error:
        raise UserError(f"The audio file {path} cannot be decoded ({error}); convert it again.") from error
    audio = to_16_khz(frames.mean(axis=1), rate)
    if len(audio) == 0:
        raise UserError(f"The audio file {path} is empty; record it again or remove it.")
    if not np.isfinite(audio).all():
        raise UserError(f"The audio file {path} holds values that are no numbers; record it again.")
    return audio


def file_of(folder: Path, key: str) -> Path:
    """The FLAC file in `folder` with the hash `key`: below its first two digits, so that no folder gets very long."""
    return folder / key[:2] / f"{key[:32]}.flac"


def write_flac(path: Path, audio: Float32[ndarray, " samples"]) -> None:
    """Write 16 kHz mono audio as 16-bit FLAC, under a temporary name first; values beyond ±1 are clipped."""
    if audio.ndim != 1 or len(audio) == 0 or not np.isfinite(audio).all():
        raise ValueError(f"write_flac takes finite, non-empty mono audio, not shape {audio.shape} for {path}")
    import soundfile

    pcm = np.round(np.clip(audio * 32768, -32768, 32767)).astype(np.int16)  # inverse of reading
    # In memory first: what libsndfile says of a full disk is "System error.", without the number that Python's own has.
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())  # shared, not copied; a view would outlive an error (3.13)


def to_16_khz(audio: Float32[ndarray, " frames"], rate: int) -> Float32[ndarray, " samples"]:
    """Resampled where `rate` (Hz) is another."""
    if rate != SAMPLE_RATE:
        import soxr

        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    return np.ascontiguousarray(audio, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------
# Speaking
# ------------------------------------------------------------------------------------------------------------
def speak(
    examples: Sequence[Example],
    folder: Path,
    voice: Voices = "hibari",
    workers: Workers = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """Have every question without audio spoken into a FLAC file in `folder`; examples with audio keep it.

    Files that exist are not spoken again: a killed run continues where it was. Equal questions share a file.
    Measured with hibari on two CPU cores: 75 questions a second, 0.005 seconds for a second of speech.

    Args:
        voice: a name (see voices.py) or a Voice of your own; of several, each example takes one by a stable hash of
            its id (see `choose_voice`).
        workers: processes, by default one for each core; with 1 it all happens in this one.
        seed: of the voice's noise; the same text with the same seed gives the same bytes.
        progress: called as progress(files done, files in all), first with those that were there already.

    Raises:
        UserError: the voice is unknown or not installed, or it cannot speak some questions within
            MAX_AUDIO_SECONDS (one error for all, after the others are done).
    """
    return speak_several([(examples, voice)], folder, workers, seed, progress)[0]


def speak_several(
    groups: Sequence[tuple[Sequence[Example], Voices]],
    folder: Path,
    workers: Workers = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    distributed: bool = False,
) -> list[list[Example]]:
    """`speak` for several sets of examples at once, each with voices of its own; one pool of workers does it all.

    distributed: rank 0 calls, and each rank speaks its share, the others in `speak_for_rank_0`. Ranks on one machine
    divide its cores.
    """
    spoken: list[list[Example]] = []
    jobs: dict[Path, Call] = {}
    used: dict[str, None] = {}  # labels of the voices that are needed, in order
    for examples, names in groups:
        voices = find_voices(names)
        # Also for no example at all: who asks with none wants to know whether the voice is at fault.
        silent = not examples or any(example.audio is None for example in examples)
        versions = {voice: voice.version() for voice in voices} if silent else {}
        spoken.append([])
        for example in examples:
            if example.audio is not None:
                spoken[-1].append(example)
                continue
            voice = choose_voice(voices, example.id)
            # Composed: a voice may know é and not e with an accent behind it.
            question = unicodedata.normalize("NFC", example.question)
            key = [ENCODING, voice.name, versions[voice], voice.speed, seed, question]
            path = file_of(folder, hash_value(key))
            jobs[path] = partial(_speak, path, question, seed, voice)
            used[voice.label] = None
            spoken[-1].append(replace(example, audio=path, voice=voice.label))

    for voice in {voice.name: voice for _, names in groups for voice in find_voices(names)}.values():
        if voice.name in _speakers and _speakers[voice.name][0] is not voice.load:  # another of the same name
            del _speakers[voice.name]
    problems = make_files(folder, jobs, workers, progress, distributed=distributed)
    if problems:
        raise UserError(
            f"{len(problems)} of {len(jobs)} questions cannot be spoken by the voice {', '.join(used)}, "
            f"the first because {problems[0]}; change or remove these, or give them audio."
        )
    return spoken


# Of this process, by the voice's name: what loaded it, and the speaker, which takes every speed.
_speakers: dict[str, tuple[Callable[[], Speaker], Speaker]] = {}


def _speak(path: Path, text: str, seed: int, voice: Voice) -> str | None:
    """Speak one file; returns why it could not be spoken, None if all went well."""
    if voice.name not in _speakers:
        _speakers[voice.name] = voice.load, voice.load()
    try:
        audio, rate = _speakers[voice.name][1](text, voice.speed, seed)
    except Unspeakable as error:
        return f"{error} in {text[:80]!r}"
    if audio.ndim != 1 or audio.dtype.kind != "f" or not np.isfinite(audio).all():
        raise UserError(
            f"The voice {voice.label} gave samples of shape {audio.shape} and type {audio.dtype}; "
            "it must give one channel of finite floats in [-1, 1]."
        )
    if not audio.any():
        return f"nothing in {text!r} can be pronounced"
    if len(audio) > MAX_AUDIO_SECONDS * rate:
        seconds = beyond(len(audio) / rate, MAX_AUDIO_SECONDS)
        return f"{text[:80]!r} takes {seconds} s, longer than {MAX_AUDIO_SECONDS:.0f} s"
    write_flac(path, to_16_khz(audio, rate))
    return None


def make_files(
    folder: Path,
    jobs: Mapping[Path, Call],
    workers: Workers,
    progress: Callable[[int, int], None] | None,
    *,
    distributed: bool = False,
) -> list[str]:
    """Make every call whose file in `folder` is not there yet; returns what went wrong in those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [job for path, job in jobs.items() if not path.exists()]
    report = progress or (lambda done, total: None)
    n_there = len(jobs) - len(waiting)
    report(n_there, len(jobs))
    if distributed and world_size() > 1:
        share(waiting)
        results = _by_ranks(waiting, lambda done: report(min(n_there + done, len(jobs)), len(jobs)))
        return [problem for problem in results if problem is not None]
    problems = []
    for done, problem in enumerate(_run(waiting, workers), start=n_there + 1):
        if problem is not None:
            problems.append(problem)
        report(done, len(jobs))
    return problems


def speak_for_rank_0() -> None:
    """What the other ranks do while rank 0 speaks with `distributed`, until it calls `spoken_all`."""
    jobs: list[Call] | None
    while (jobs := share()) is not None:
        _by_ranks(jobs, lambda done: None)


def spoken_all() -> None:
    """Rank 0 has nothing more to be spoken: the other ranks return from `speak_for_rank_0`."""
    share(None)


def _by_ranks(jobs: Sequence[Call], report: Callable[[int], None]) -> list[str | None]:
    """Results in the order of the jobs, on rank 0; it raises the UserError of any rank, for it alone decides on it."""
    mine = list(my_share(jobs))
    done: list[str | None] = []
    failure: UserError | None = None
    try:
        for result in _run(mine, min(cores_of_this_rank(), len(mine) // PER_WORKER)):
            done.append(result)
            report(len(done) * world_size())
    except UserError as error:
        failure = error
    shares = gathered((done, failure), by_all=False)
    for _, found in shares:
        if found is not None:
            raise found
    return dealt_back([results for results, _ in shares])


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes for several calls of `speak` or `augment`; they start when there is work for them."""
    # Spawned, not forked: a fork would copy the locks of torch's threads in an unknown state.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def _run(jobs: Sequence[Call], workers: Workers) -> Iterator[str | None]:
    """Results in the order of the jobs; in this process or in others."""
    if workers is None:
        workers = min(n_cores(), len(jobs) // PER_WORKER)
    if len(jobs) <= 1 or (isinstance(workers, int) and workers <= 1):
        yield from map(call, jobs)
        return
    own = pool(min(workers, len(jobs))) if isinstance(workers, int) else None
    try:
        yield from (own or workers).map(call, jobs, chunksize=4)  # type: ignore[union-attr]
    except BrokenProcessPool as error:
        raise UserError(
            "The speech workers stopped: memory may be short, or a script works on speech outside "
            '`if __name__ == "__main__":`; correct that, or use one worker.'
        ) from error
    finally:
        if own is not None:
            own.shutdown(cancel_futures=True)
