from __future__ import annotations

import errno
import os
import resource
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data import voices
from palimpsest.data.examples import Example
from palimpsest.data.speech import SAMPLE_RATE, read_audio, speak, speak_several, write_flac
from palimpsest.data.voices import VOICES, Speaker, Unspeakable, Voice, require_sayable
from palimpsest.files import UserError

needs_hibari = pytest.mark.skipif(find_spec("hibari") is None, reason="the voice hibari is not installed")


# A voice of tones: 10 ms per letter. Module-level functions, so that spawned workers can import them.
def one() -> str:
    return "1"


def load_tone() -> Speaker:
    def tone(text: str, speed: float, seed: int) -> tuple[np.ndarray, int]:
        letters = sum(character.isalpha() for character in text)
        return np.full(round(letters * 80 / speed), 0.25 + seed / 100, np.float32), 8000

    return tone


def load_wrong() -> Speaker:
    return lambda text, speed, seed: (np.zeros((10, 2), np.float32), 8000)


def absent() -> str:
    raise UserError("The voice absent is not installed.")


def die() -> Speaker:
    os._exit(1)


TONE = Voice("tone", one, load_tone)


def ask(question: str, name: str = "", audio: Path | None = None) -> Example:
    return Example(name or question, question, ("A",), "A", audio=audio)


def sine(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


# --- files -----------------------------------------------------------------------------------------------
def test_channels_are_averaged_and_the_rate_becomes_16_khz(tmp_path: Path) -> None:
    low, high = 0.5 * sine(440, 44_100), 0.5 * sine(880, 44_100)
    soundfile.write(tmp_path / "a.wav", np.stack([low, high], axis=1), 44_100, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")
    assert audio.dtype == np.float32
    assert audio.shape == (16_000,)
    spectrum = np.abs(np.fft.rfft(audio)) / 8000  # one second: bin = Hz; amplitude of each sine
    assert spectrum[440] == pytest.approx(0.25, abs=0.01)  # half of 0.5: an average, not a sum
    assert spectrum[880] == pytest.approx(0.25, abs=0.01)

    soundfile.write(tmp_path / "b.wav", np.stack([low, -low], axis=1), 44_100, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "b.wav")).max() < 1e-6


@settings(deadline=None)  # every write waits for the disk
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=50))
def test_flac_keeps_samples_to_16_bits_and_clips(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("flac") / "a.flac"
    audio = np.array(values, np.float32)
    write_flac(path, audio)
    back = read_audio(path)
    assert back.shape == audio.shape
    assert np.abs(back - np.clip(audio, -1, 32767 / 32768)).max() <= 0.5 / 32768  # half a step
    before = path.read_bytes()
    write_flac(path, back)
    assert path.read_bytes() == before  # what was read is written unchanged
    header = soundfile.info(str(path))
    assert (header.samplerate, header.channels, header.subtype) == (SAMPLE_RATE, 1, "PCM_16")


def test_bad_audio_files_are_user_errors_that_name_them(tmp_path: Path) -> None:
    def check(problem: str) -> None:
        with pytest.raises(UserError, match=problem) as caught:
            read_audio(tmp_path / "a.wav")
        assert str(tmp_path / "a.wav") in str(caught.value)

    check("does not exist")
    (tmp_path / "a.wav").write_bytes(b"RIFF, but no audio")
    check("cannot be read")
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    check("is empty")
    soundfile.write(tmp_path / "a.wav", np.zeros(31 * 8000, np.float32), 8000)
    check(r"lasts 31\.0 s, longer than the limit of 30 s")
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan], np.float32), SAMPLE_RATE, subtype="FLOAT")
    check("no numbers")


@pytest.mark.parametrize("audio", [np.zeros(0), np.zeros((2, 2)), np.array([np.inf])])
def test_write_flac_refuses_what_is_no_mono_audio(tmp_path: Path, audio: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mono"):
        write_flac(tmp_path / "a.flac", audio.astype(np.float32))


def test_a_write_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: libsndfile would say "System error." of both."""
    noise = np.random.default_rng(0).normal(0, 0.1, 20_000).astype(np.float32)
    write_flac(tmp_path / "whole.flac", noise)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_flac(tmp_path / "a.flac", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["whole.flac"]
    pcm = np.round(noise * 32768).astype(np.int16)
    soundfile.write(tmp_path / "direct.flac", pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    assert (tmp_path / "direct.flac").read_bytes() == (tmp_path / "whole.flac").read_bytes()


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flac(tmp_path / "a.flac", np.full(100, 0.5, np.float32))
    before = (tmp_path / "a.flac").read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_flac(tmp_path / "a.flac", np.zeros(100, np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["a.flac"]
    assert (tmp_path / "a.flac").read_bytes() == before


# --- speaking --------------------------------------------------------------------------------------------
def test_speak_fills_in_missing_audio_only(tmp_path: Path) -> None:
    own = tmp_path / "own.wav"
    soundfile.write(own, np.zeros(10, np.float32), SAMPLE_RATE)
    examples = [ask("abc", "1"), ask("spoken", "2", own), ask("abcdef", "3"), ask("abc", "4")]
    seen: list[tuple[int, int]] = []
    spoken = speak(
        examples, tmp_path / "audio", TONE, workers=1, progress=lambda done, total: seen.append((done, total))
    )
    assert [example.id for example in spoken] == ["1", "2", "3", "4"]
    assert spoken[1] == examples[1]
    assert spoken[0].audio == spoken[3].audio  # one file for equal questions
    assert spoken[0].voice == "tone"
    assert [len(read_audio(e.audio)) for e in (spoken[0], spoken[2]) if e.audio] == [480, 960]  # 30 and 60 ms
    assert len(list((tmp_path / "audio").iterdir())) == 2
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_speak_resumes_and_names_files_by_what_determines_them(tmp_path: Path) -> None:
    def names(voice: Voice = TONE, seed: int = 0) -> list[str]:
        spoken = speak([ask("one"), ask("two")], tmp_path, voice, workers=1, seed=seed)
        return [str(example.audio.relative_to(tmp_path)) for example in spoken if example.audio]

    first = names()
    (tmp_path / first[0]).write_bytes(b"kept")  # present, so not spoken again
    (tmp_path / first[1]).unlink()
    seen: list[tuple[int, int]] = []
    speak([ask("one"), ask("two")], tmp_path, TONE, workers=1, progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]
    assert (tmp_path / first[0]).read_bytes() == b"kept"

    others = [names(seed=1), names(Voice("tone", lambda: "2", load_tone)), names(Voice("alto", one, load_tone))]
    assert len({name for group in [first, *others] for name in group}) == 8


def test_what_cannot_be_spoken_is_told_after_all_else_is_done(tmp_path: Path) -> None:
    examples = [ask("???"), ask("fine"), ask("x" * 3001)]  # 3001 letters take 30.01 s
    with pytest.raises(UserError, match=r"2 of 3 questions .* nothing in '\?\?\?' can be pronounced"):
        speak(examples, tmp_path, TONE, workers=1)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"takes 30\.01 s, longer than 30 s"):
        speak(examples[1:], tmp_path, TONE, workers=1)


def test_unknown_and_missing_voices_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no voice 'hibary'; use one of: hibari"):
        speak([ask("one")], tmp_path, "hibary")

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(voices.metadata, "version", absent)
    with pytest.raises(UserError, match=r"The voice hibari is not installed; run: palimpsest setup"):
        speak([ask("one")], tmp_path)


def test_each_speed_has_its_own_file_and_is_recorded(tmp_path: Path) -> None:
    voices = [Voice("tone", one, load_tone, speed) for speed in (1.0, 0.5)]
    paths = [speak([ask("one")], tmp_path, voice, workers=1)[0] for voice in voices]
    assert [example.voice for example in paths] == ["tone", "tone@0.5"]
    assert [len(read_audio(example.audio)) for example in paths if example.audio] == [480, 960]


def test_groups_take_their_own_voices_and_need_none_that_nobody_uses(tmp_path: Path) -> None:
    own = tmp_path / "own.wav"
    soundfile.write(own, np.zeros(10, np.float32), SAMPLE_RATE)
    alto = Voice("alto", one, load_tone)
    recorded, missing = [ask("spoken", "1", own)], Voice("absent", absent, load_tone)
    groups = [([ask("one"), ask("two")], TONE), ([ask("one")], alto), (recorded, missing)]
    spoken = speak_several(groups, tmp_path / "audio", workers=2)
    assert [[example.voice for example in group] for group in spoken] == [["tone", "tone"], ["alto"], [None]]
    assert len(list((tmp_path / "audio").iterdir())) == 3
    with pytest.raises(UserError, match="absent is not installed"):
        speak([ask("one")], tmp_path, missing, workers=1)


def test_what_a_voice_of_ones_own_does_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The voice bad gave samples of shape \(10, 2\)"):
        speak([ask("one"), ask("two")], tmp_path, Voice("bad", one, load_wrong), workers=2)


def test_two_workers_write_what_one_writes(tmp_path: Path) -> None:
    examples = [ask("word " * n) for n in range(1, 10)]
    assert_same_bytes(examples, tmp_path, TONE)


def test_dead_workers_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers stopped"):
        speak([ask("one"), ask("two")], tmp_path, Voice("dead", one, die), workers=2)


@needs_hibari
def test_hibari_says_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    spoken = assert_same_bytes([ask("What is the capital of Norway?"), ask("Who wrote Emma?")], tmp_path, "hibari")
    for example in spoken:
        assert example.audio is not None
        audio = read_audio(example.audio)
        assert 0.7 < len(audio) / SAMPLE_RATE < 4
        assert 0.1 < np.abs(audio).max() < 1  # neither silent nor clipped


def assert_same_bytes(examples: list[Example], folder: Path, voice: str | Voice) -> list[Example]:
    speak(examples, folder / "one", voice, workers=1)
    spoken = speak(examples, folder / "two", voice, workers=2)
    one_worker, two_workers = (
        {file.name: file.read_bytes() for file in (folder / name).rglob("*.flac")} for name in ("one", "two")
    )
    assert len(one_worker) == len(examples)
    assert one_worker == two_workers
    return spoken


def load_english() -> Speaker:
    """A voice that makes nothing of a symbol by itself but ½."""

    def say(text: str, speed: float, seed: int) -> tuple[np.ndarray, int]:
        require_sayable(text, lambda character: character != "½")
        return np.full(3_000, 0.25, np.float32), 8_000

    return say


@pytest.mark.parametrize(
    ("question", "left_out"),
    [
        ("What is 你好?", "'你', '好'"),
        ("What is 😀?", "'😀'"),
        ("Что?", "'Ч', 'т', 'о'"),
        ("Is it 5 €?", "'€'"),
        ("Is 3 ≤ 4?", "'≤'"),
        ("What is 3*4?", r"'\*'"),
    ],
)
def test_a_question_that_a_voice_would_say_in_part_is_not_spoken(tmp_path: Path, question: str, left_out: str) -> None:
    voice = Voice("english", lambda: "1", load_english)
    with pytest.raises(UserError, match=f"1 of 2 .* because the voice leaves out {left_out} in '.*'; change or remove"):
        speak([ask("Fine?", "1"), ask(question, "2")], tmp_path, voice, workers=1)
    assert len(list(tmp_path.iterdir())) == 1  # the other one


def test_what_an_english_voice_says_whole_is_spoken(tmp_path: Path) -> None:
    voice = Voice("english", lambda: "1", load_english)
    questions = ["Whose café — “that” one’s…?", "Half? ½!", "**Bold** or *not*?", "Is it $5?", "e\u0301?"]
    spoken = speak([ask(question, str(i)) for i, question in enumerate(questions)], tmp_path, voice, workers=1)
    assert all(example.audio is not None for example in spoken)
    # An accent behind its letter is the same text: the same recording.
    again = speak([ask("\u00e9?", "x")], tmp_path, voice, workers=1)
    assert again[0].audio == spoken[-1].audio


@needs_hibari
@pytest.mark.parametrize("question", ["What is 你好?", "What is 😀?", "Is it 5 €?", "What is 3*4?", "⑴?"])
def test_hibari_says_all_or_nothing(question: str) -> None:
    say = VOICES["hibari"].load()
    with pytest.raises(Unspeakable, match="the voice leaves out"):
        say(question, 1.0, 0)
    for text in ("Where is Łódź?", "Is it €5 or 5 µm?", "½ of 2 × 3 °C?"):
        assert say(text, 1.0, 0)[0].any()
