"""Augmentation: changed copies of training utterances, for a speech LLM that is to know more than one clean voice.

Three changes, in this order: speed (soxr; pitch goes with it), reverberation (pyroomacoustics' image sources), noise
(white). Encoder frames are cached, so this happens to the audio, before the encoder. Off by default; never for
held-out or task data.

>>> train = augment(train, Path("audio"), {"copies": 2, "noise_snr_db": (10, 30)}, seed=0)     # doctest: +SKIP

Legend: samples = audio samples at 16 kHz; taps = samples of a room's impulse response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import soundfile
import soxr
from annotated_types import Ge, Le

from palimpsest.data.examples import MAX_AUDIO_SECONDS, Example
from palimpsest.data.speech import ENCODING, Call, Workers, file_of, make_files, read_audio, write_flac
from palimpsest.files import UserError, hash_file, hash_value
from palimpsest.models import SAMPLE_RATE

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64
    from numpy import ndarray

VERSION = 1  # part of the file names: change it when the samples change for the same draws
N_ROOMS = 16  # whose impulse responses are computed once; each copy is played in one of them
SMALLEST_ROOM, LARGEST_ROOM = (3.0, 3.0, 2.4), (6.0, 5.0, 3.0)  # m
WALL_DISTANCE = 0.5  # m, of speaker and microphone
NEAREST = 1.0  # m, between the two
PEAK = 0.99  # louder copies are scaled down to it, speech and noise alike


@dataclass(frozen=True)
class Augmentation:
    """Changed copies of every training utterance; each change is drawn anew from its range for each copy.

    Args:
        copies: changed versions of every utterance, beside the utterance itself.
        speed: range of the factor; a copy that would pass MAX_AUDIO_SECONDS is slowed down less.
        noise_snr_db: range of the signal-to-noise ratio, of mean powers, in dB.
        reverberation: seconds in which the sound in the room falls by 60 dB (by Sabine's formula).
    """

    copies: Annotated[int, Ge(1)] = 1
    speed: tuple[float, float] | None = None
    noise_snr_db: tuple[float, float] | None = None
    reverberation: Annotated[float, Ge(0.15), Le(0.8)] | None = None

    def __post_init__(self) -> None:
        if self.speed is None and self.noise_snr_db is None and self.reverberation is None:
            raise ValueError("augmentation changes nothing; give speed, noise_snr_db or reverberation")
        for name, least, most in (("speed", 0.5, 2), ("noise_snr_db", -10, 60)):
            bounds = getattr(self, name)
            if bounds is not None and not least <= bounds[0] <= bounds[1] <= most:
                raise ValueError(f"{name} {list(bounds)} must be a range [low, high] within {least} and {most}")


@dataclass(frozen=True)
class Draw:
    """What happens to one copy."""

    speed: float | None
    snr_db: float | None
    rt60: float | None  # seconds
    room: int  # of N_ROOMS
    seed: int  # of the noise

    def __str__(self) -> str:
        parts = {
            "speed": None if self.speed is None else f"{self.speed:.3f}",
            "rt60": None if self.rt60 is None else f"{self.rt60:g}s/room{self.room}",
            "snr": None if self.snr_db is None else f"{self.snr_db:.1f}dB",
        }
        return " ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def augment(
    examples: Sequence[Example],
    folder: Path,
    augmentation: Augmentation,
    seed: int = 0,
    workers: Workers = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Example]:
    """The examples, then their changed copies with the ids `ID~1`, `ID~2`, …, each with its `augmentation` named.

    What is drawn for a copy depends on `seed`, id and number alone. Files are named by what determines their samples;
    those that exist are not made again.

    Raises:
        UserError: an example has no audio, a copy's id is taken, or the library is not installed.
    """
    version = require_library(augmentation)
    taken = {example.id for example in examples}
    sources: dict[Path, tuple[str, float]] = {}  # audio → hash, seconds
    copies: list[Example] = []
    jobs: dict[Path, Call] = {}
    for number in range(1, augmentation.copies + 1):
        for example in examples:
            if example.audio is None:
                raise UserError(f"The example {example.id!r} has no audio to change; have it spoken first.")
            name = f"{example.id}~{number}"
            if name in taken:
                raise UserError(f"The id {name!r} is that of an augmented copy; give this example another id.")
            if example.audio not in sources:
                sources[example.audio] = hash_file(example.audio), soundfile.info(str(example.audio)).duration
            digest, seconds = sources[example.audio]
            draw = draw_changes(augmentation, name, seed)
            if draw.speed is not None:
                draw = replace(draw, speed=max(draw.speed, seconds / MAX_AUDIO_SECONDS))
            key = [ENCODING, VERSION, version, digest, [*vars(draw).values()]]
            path = file_of(folder, hash_value(key))
            jobs[path] = partial(_write_copy, example.audio, path, draw)
            copies.append(replace(example, id=name, audio=path, augmentation=str(draw)))

    make_files(folder, jobs, workers, progress)
    return [*examples, *copies]


def require_library(augmentation: Augmentation) -> str:
    """The version of what makes the reverberation, "" where none is asked for. Raises UserError without it."""
    if augmentation.reverberation is None:
        return ""
    try:
        return metadata.version("pyroomacoustics")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "speech.augmentation.reverberation needs the package pyroomacoustics; "
            "run `pip install 'palimpsest-llm[augment]'` or leave reverberation out."
        ) from error


def draw_changes(augmentation: Augmentation, copy_id: str, seed: int) -> Draw:
    """Uniform in each range, from a generator of the copy's own: other copies do not change it."""
    rng = np.random.default_rng(int(hash_value([seed, copy_id])[:16], 16))
    speed, snr = rng.uniform(), rng.uniform()  # always drawn, so that one option does not change another's draws
    room, noise = int(rng.integers(N_ROOMS)), int(rng.integers(2**31))
    speed_factor, snr_db = _within(augmentation.speed, speed), _within(augmentation.noise_snr_db, snr)
    return Draw(speed_factor, snr_db, augmentation.reverberation, room, noise)


def _within(bounds: tuple[float, float] | None, share: float) -> float | None:
    return None if bounds is None else bounds[0] + share * (bounds[1] - bounds[0])


def _write_copy(source: Path, path: Path, draw: Draw) -> None:
    write_flac(path, change(read_audio(source), draw))


def change(audio: Float32[ndarray, " samples"], draw: Draw) -> Float32[ndarray, " changed"]:
    """Speed, room, noise; scaled down where it would clip."""
    changed = audio
    if draw.speed is not None:
        # As if recorded at `speed` times the rate; resampling may round a sample beyond the limit.
        changed = soxr.resample(changed, SAMPLE_RATE * draw.speed, SAMPLE_RATE)[: int(MAX_AUDIO_SECONDS * SAMPLE_RATE)]
    if draw.rt60 is not None:
        changed = reverberate(changed, _impulse_response(draw.rt60, draw.room))
    if draw.snr_db is not None:
        changed = add_noise(changed, draw.snr_db, np.random.default_rng(draw.seed))
    peak = float(np.abs(changed).max())
    return np.asarray(changed * min(1.0, PEAK / peak) if peak > 0 else changed, np.float32)


def add_noise(
    audio: Float32[ndarray, " samples"], snr_db: float, rng: np.random.Generator
) -> Float32[ndarray, " samples"]:
    """White Gaussian noise, `snr_db` below the mean power of the audio."""
    deviation = np.sqrt(np.mean(np.square(audio, dtype=np.float64))) * 10 ** (-snr_db / 20)
    return np.asarray(audio + deviation * rng.standard_normal(len(audio)), np.float32)


def reverberate(
    audio: Float32[ndarray, " samples"], response: Float64[ndarray, " taps"]
) -> Float32[ndarray, " samples"]:
    """The audio in a room. As long as before: what the room adds after the end is left out."""
    from scipy.signal import fftconvolve

    return np.asarray(fftconvolve(audio, response)[: len(audio)], np.float32)


@cache
def _impulse_response(rt60: float, room: int) -> Float64[ndarray, " taps"]:
    """From a speaker to a microphone in one of N_ROOMS rooms; begins at the direct sound, whose height is 1."""
    import pyroomacoustics

    rng = np.random.default_rng(room)
    size = rng.uniform(SMALLEST_ROOM, LARGEST_ROOM)
    absorption, order = pyroomacoustics.inverse_sabine(rt60, size)
    shoebox = pyroomacoustics.ShoeBox(
        size, fs=SAMPLE_RATE, materials=pyroomacoustics.Material(absorption), max_order=order
    )
    speaker = microphone = size / 2
    while np.linalg.norm(speaker - microphone) < NEAREST:
        speaker, microphone = rng.uniform(WALL_DISTANCE, size - WALL_DISTANCE, (2, 3))
    shoebox.add_source(speaker)
    shoebox.add_microphone(microphone)
    shoebox.compute_rir()
    response = np.asarray(shoebox.rir[0][0])
    delay = float(np.linalg.norm(speaker - microphone)) / shoebox.c * SAMPLE_RATE
    near = int(delay) + pyroomacoustics.constants.get("frac_delay_length") // 2  # the sample before or at the peak
    first = near + int(np.argmax(response[near : near + 2]))
    direct: Float64[ndarray, " taps"] = response[first:] / response[first]
    return direct
