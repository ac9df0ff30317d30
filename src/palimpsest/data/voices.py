"""Text-to-speech voices: hibari, espeak-ng with its variants, and any Python callable.

| name | what |
|---|---|
| `hibari` | neural, one English voice, from a PyPI wheel |
| `espeak-ng` | formant synthesis, through the program of that name; speaks `en-us` |
| `espeak-ng:LANGUAGE`, `espeak-ng:LANGUAGE+VARIANT` | e.g. `espeak-ng:en-gb+f3`; see `espeak-ng --voices=variant` |
| `NAME@SPEED` | any of them faster or slower, e.g. `hibari@1.2` |

A voice of your own is a `Voice`; put into `VOICES`, it has a name that recipes can use.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from palimpsest.files import UserError, hash_value

if TYPE_CHECKING:
    from jaxtyping import Float32
    from numpy import ndarray

SPEED = 1.0  # the voice's own pace
SPEEDS = (0.5, 2.0)  # slower or faster than this is hardly speech
ESPEAK = "espeak-ng"
ESPEAK_LANGUAGE = "en-us"
ESPEAK_WORDS_PER_MINUTE = 175  # espeak-ng's own pace
WAV_HEADER = 44  # bytes; espeak-ng cannot know the length when it writes one to a pipe

Speaker: TypeAlias = "Callable[[str, float, int], tuple[Float32[ndarray, 'samples'], int]]"
"""text, speed, seed → mono audio in [-1, 1] and its sample rate in Hz; equal arguments give equal samples."""


class Unspeakable(ValueError):
    """Raised by a Speaker for a text that it could say only in part: what it would leave out, as a phrase."""


@dataclass(frozen=True)
class Voice:
    """A text-to-speech voice.

    Args:
        name: part of the audio's file names, and recorded with every example.
        version: called before anything is spoken; what changes when the samples change for the same text. Raises
            UserError where the voice is not installed.
        load: gives the callable that speaks. Runs once in every worker process: an importable function, no lambda.
        speed: of the speech, 1.0 being the voice's own pace; handed to the callable.
    """

    name: str
    version: Callable[[], str]
    load: Callable[[], Speaker]
    speed: float = SPEED

    @property
    def label(self) -> str:
        """The name, with the speed if it is not the voice's own."""
        return self.name if self.speed == SPEED else f"{self.name}@{self.speed:g}"


Voices: TypeAlias = str | Voice | Sequence[str | Voice]


def find_voices(voices: Voices) -> list[Voice]:
    """The voices behind names, in order. Raises UserError for a name that is unknown, a speed out of range, or none."""
    several = [voices] if isinstance(voices, (str, Voice)) else list(voices)
    if not several:
        raise UserError("The list of voices is empty; name at least one.")
    return [voice if isinstance(voice, Voice) else _find(voice) for voice in several]


def choose_voice(voices: Sequence[Voice], example_id: str) -> Voice:
    """The voice of an example, by a stable hash of its id.

    It does not depend on the order of the voices nor on the other examples; a voice added later takes its share from
    the others and leaves the rest as it was.
    """
    return min(voices, key=lambda voice: hash_value([example_id, voice.label]))


def _find(name: str) -> Voice:
    base, at, pace = name.partition("@")
    if base in VOICES:
        voice = VOICES[base]
    elif base.startswith(f"{ESPEAK}:"):
        voice = _espeak_voice(base, base.removeprefix(f"{ESPEAK}:"))
    else:
        raise UserError(
            f"There is no voice {name!r}; use one of: {', '.join(VOICES)}, {ESPEAK}:LANGUAGE+VARIANT, "
            "with @SPEED behind it if you like."
        )
    if not at:
        return voice
    with suppress(ValueError):
        if SPEEDS[0] <= float(pace) <= SPEEDS[1]:
            return replace(voice, speed=float(pace))
    raise UserError(
        f"The voice {name!r} has the speed {pace!r}; give a number from {SPEEDS[0]} to {SPEEDS[1]} behind the @."
    )


def _hibari_version() -> str:
    try:
        return metadata.version("hibari-tts")
    except metadata.PackageNotFoundError as error:
        raise UserError("The voice hibari is not installed; run: palimpsest setup") from error


def _load_hibari() -> Speaker:
    try:
        from hibari import SAMPLE_RATE as RATE
        from hibari import Hibari
    except ImportError as error:
        raise UserError(f"The voice hibari cannot be loaded ({error}); run: palimpsest setup") from error
    synthesizer = Hibari()  # one thread: the workers are the parallelism

    @cache
    def is_silent(text: str) -> bool:
        try:
            return not synthesizer.phonemize(text)
        except ValueError:  # of a number in a circle, for one
            return True

    def say(text: str, speed: float, seed: int) -> tuple[Float32[ndarray, " samples"], int]:
        require_sayable(text, is_silent)
        return synthesizer(text, speed=speed, seed=seed), RATE

    return say


BEFORE_NUMBER = re.compile(r"[£€](?=\d)")  # "£5" is said, "5 £" is not
SILENT_MARKS = "™®©"  # nobody says them
TIMES = re.compile(r"(?<=[\d)])\s*\*\s*(?=[\d(])")  # elsewhere an asterisk is an ornament


def require_sayable(text: str, is_silent: Callable[[str], bool]) -> None:
    """Raises Unspeakable for characters of meaning that an English voice leaves out: other scripts, pictures, symbols.

    `is_silent` says whether the voice makes nothing of a character by itself. Punctuation is not looked at, nor are
    Latin letters, with or without accents: they are part of a word.
    """
    left_out: dict[str, None] = {"*": None} if TIMES.search(text) else {}
    for character in BEFORE_NUMBER.sub("", text):
        kind, name = unicodedata.category(character), unicodedata.name(character, "")
        has_meaning = kind[0] in "LNS" and kind not in ("Sk", "Lm") and character not in SILENT_MARKS
        if character.isascii() or "LATIN" in name or not has_meaning:
            continue
        # Of another alphabet the voice reads some letters by their names, which is not the word; α and µ are names.
        if (kind[0] == "L" and not name.startswith(("GREEK", "MICRO"))) or is_silent(character):
            left_out[character] = None
    if left_out:
        raise Unspeakable(f"the voice leaves out {', '.join(map(repr, left_out))}")


def _espeak_voice(name: str, language: str) -> Voice:
    return Voice(name, partial(_espeak_version, language), partial(_load_espeak, language))


def _espeak_version(voice: str) -> str:
    """The program's version, after a check that it has the language and the variant: it takes any other silently."""
    found = re.search(r"text-to-speech: (\S+)", _espeak("--version").decode())
    if found is None:
        raise UserError(f"`{ESPEAK} --version` reports no version; install the program {ESPEAK} again.")
    language, plus, variant = voice.partition("+")
    # Columns: priority, language, age and sex, name, file, other languages. MBROLA's voices need another program.
    rows = [line.split() for line in _espeak("--voices").decode().splitlines()[1:]]
    languages = {row[1] for row in rows if not any(cell.startswith("mb/") for cell in row)}
    if language not in languages:
        raise UserError(f"{ESPEAK} has no language {language!r}; `{ESPEAK} --voices` lists those it has.")
    variants = re.findall(r"!v/(.+?)\s*$", _espeak("--voices=variant").decode(), re.MULTILINE)
    if plus and variant not in variants:
        raise UserError(f"{ESPEAK} has no variant {variant!r}; `{ESPEAK} --voices=variant` lists those it has.")
    return found[1]


def _load_espeak(voice: str) -> Speaker:
    def say(text: str, speed: float, seed: int) -> tuple[Float32[ndarray, " samples"], int]:
        # Through stdin: a question that begins with a dash is no option. "[[" would begin phonemes.
        words_per_minute = round(ESPEAK_WORDS_PER_MINUTE * speed)
        arguments = ("-v", voice, "-s", str(words_per_minute), "-b", "1", "--stdin", "--stdout")
        wav = _espeak(*arguments, text=text.replace("[[", "[ ["))
        if len(wav) <= WAV_HEADER:
            return np.zeros(0, np.float32), 1
        rate = int.from_bytes(wav[24:28], "little")
        return np.frombuffer(wav[WAV_HEADER:], "<i2").astype(np.float32) / 32768, rate

    return say


def _espeak(*arguments: str, text: str = "") -> bytes:
    """What the program writes to stdout. Raises UserError where it is not installed or fails."""
    program = shutil.which(ESPEAK)
    if program is None:
        raise UserError(f"The voice {ESPEAK} needs the program of that name; install it, e.g. `apt install {ESPEAK}`.")
    result = subprocess.run([program, *arguments], input=text.encode(), capture_output=True, check=False)
    if result.returncode != 0:
        message = result.stderr.decode(errors="replace").strip() or f"exit code {result.returncode}"
        raise UserError(f"`{ESPEAK} {' '.join(arguments)}` failed ({message}); check the name of the voice.")
    return result.stdout


VOICES = {
    "hibari": Voice("hibari", _hibari_version, _load_hibari),
    ESPEAK: _espeak_voice(ESPEAK, ESPEAK_LANGUAGE),
}
