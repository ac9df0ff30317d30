"""Filters: each reason by a row made for it; applied twice they change nothing; strict reading refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_files import BROKEN, encoded, tone, wav
from palimpsest.data.examples import audio_problem, beyond
from palimpsest.data.filters import (
    Dropped,
    Filters,
    Recording,
    decode,
    normalised_question,
    parse_filters,
    require_some,
    store,
    text_problem,
    without_speaker_tag,
)
from palimpsest.data.rows import Row
from palimpsest.files import UserError

FILTERS = Filters()


def row(question: str = "What?", answer: str = "That.", later_turn: bool = False) -> Row:
    return Row(0, "here", question, (answer,) if answer else (), answer, later_turn=later_turn)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (row(), None),
        (row(later_turn=True), "later turn"),
        (row(question=""), "empty question"),
        (row(question=" ?! "), "empty question"),
        (row(answer=""), "empty answer"),
        (row(question="w " * 100), None),
        (row(question="w " * 101), "long question"),
        (row(answer="w " * 1000), None),
        (row(answer="w " * 1001), "long answer"),
        (row(answer="w" * 8000), None),
        (row(answer="w" * 8001), "long answer"),
        (row(question="什么是爱？"), None),
    ],
)
def test_text(found: Row, reason: str | None) -> None:
    problem = text_problem(found, FILTERS)
    assert (problem[0] if problem else None) == reason


def test_only_what_is_not_meant_is_no_fault() -> None:
    assert [Dropped("a", "b", reason, "c").is_fault for reason in ("later turn", "question in held-out")] == [False] * 2
    assert Dropped("a", "b", "silent audio", "c").is_fault


@pytest.mark.parametrize(
    ("question", "without"),
    [
        ("<USER>: Hello?", "Hello?"),
        (" <USER>:Hello?", "Hello?"),
        ("<USER>: <USER>: Hello?", "Hello?"),
        ("What does <USER>: mean?", "What does <USER>: mean?"),
    ],
)
def test_the_speaker_tag(question: str, without: str) -> None:
    assert without_speaker_tag(question) == without


@given(st.text(st.sampled_from(list("<USER>: ab\n")), max_size=30))
def test_taking_the_tag_away_twice_changes_nothing(question: str) -> None:
    once = without_speaker_tag(question)
    assert without_speaker_tag(once) == once


def test_questions_that_differ_in_nothing_that_matters() -> None:
    assert normalised_question("What's the  Capital of France?") == normalised_question("what s the capital of france")
    assert normalised_question("What is 2?") != normalised_question("What is 3?")
    assert normalised_question("ﬁne") == "fine"


# -- audio ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.parametrize("as_file", [True, False])
def test_faulty_recordings(tmp_path: Path, reason: str, as_file: bool) -> None:
    (tmp_path / "x.wav").write_bytes(BROKEN[reason])
    audio = tmp_path / "x.wav" if as_file else BROKEN[reason]
    found = decode(audio, FILTERS)
    assert isinstance(found, tuple)
    assert found[0] == reason
    assert store(audio, tmp_path / "out", FILTERS) == found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("audio", "reason", "detail"),
    [
        (encoded(tone(0.1)), "wrong duration", "0.10 s, at least 0.2 s"),
        (encoded(np.zeros(0)), "broken audio", "no sample"),
        (encoded(np.full(8000, np.nan), subtype="FLOAT"), "broken audio", "no numbers"),
        (encoded(tone(2, peak=0.0009)), "silent audio", "its peak is 0.0009"),
        (encoded(np.stack([tone(), -tone()], 1)), "silent audio", "its peak is 1.5e-05"),  # in mono nothing is left
        (encoded(tone(2), file_format="FLAC")[:9_000], "broken audio", "cannot be decoded"),
        (Path("none.wav"), "broken audio", "none.wav does not exist"),
        (Path("x" * 300), "broken audio", "x does not exist"),
    ],
)
def test_more_faulty_recordings(audio: bytes | Path, reason: str, detail: str) -> None:
    found = decode(audio, FILTERS)
    assert isinstance(found, tuple)
    assert found[0] == reason
    assert detail in found[1]


@pytest.mark.parametrize(
    ("file_format", "rate", "channels"),
    [
        (file_format, rate, channels)
        for file_format in ("WAV", "FLAC", "OGG", "MP3")
        for rate, channels in ((16_000, 1), (44_100, 2), (8_000, 1), (48_000, 6))
        if file_format != "MP3" or channels <= 2  # it has no more
    ],
)
def test_any_rate_and_channels_become_16_khz_mono(tmp_path: Path, file_format: str, rate: int, channels: int) -> None:
    audio = encoded(np.repeat(tone(1.0, rate)[:, None], channels, 1), rate, file_format)
    found = decode(audio, FILTERS)
    assert isinstance(found, Recording)
    assert found.seconds == pytest.approx(1.0, abs=0.1)  # MP3 pads
    assert len(found.samples) == pytest.approx(16_000 * found.seconds, abs=1)
    spectrum = np.abs(np.fft.rfft(found.samples * np.hanning(len(found.samples))))
    pitch = np.fft.rfftfreq(len(found.samples), 1 / 16_000)[spectrum.argmax()]
    assert pitch == pytest.approx(440, abs=2)
    path = store(audio, tmp_path, FILTERS)
    assert isinstance(path, Path)
    assert soundfile.info(str(path)).samplerate == 16_000
    assert soundfile.info(str(path)).channels == 1


def test_a_wav_without_sizes_as_a_pipe_writes_it_is_read() -> None:
    data = bytearray(wav(1.0))
    at = data.index(b"data") + 4
    for start, size in ((4, 0xFFFFFFFF), (at, 0xFFFFFFFF)):
        data[start : start + 4] = size.to_bytes(4, "little")
    found = decode(bytes(data), FILTERS)
    assert isinstance(found, Recording)
    assert found.seconds == pytest.approx(1.0)


PLACEHOLDERS = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2_000_000_000, 0x7FFFFFFF - 36, 0x7FFFF000, 2_000_000_000 - 44)


@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_a_length_that_a_program_writes_into_a_pipe_announces_nothing(tmp_path: Path, size: int) -> None:
    data = bytearray(wav(1.0))
    at = data.index(b"data") + 4
    data[at : at + 4] = size.to_bytes(4, "little")
    (tmp_path / "x.wav").write_bytes(data)
    for audio in (bytes(data), tmp_path / "x.wav"):
        found = decode(audio, FILTERS)
        assert isinstance(found, Recording)
        assert found.seconds == pytest.approx(1.0)


@pytest.mark.parametrize("file_format", ["WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "FLAC", "OGG", "MP3", "CAF"])
def test_a_file_that_is_cut_in_the_middle_is_no_recording(file_format: str) -> None:
    whole = encoded(tone(2.0), file_format=file_format)
    assert isinstance(decode(whole, FILTERS), Recording)
    found = decode(whole[: len(whole) // 2], FILTERS)
    assert isinstance(found, tuple)
    assert found[0] in ("wrong duration", "broken audio")


def test_a_number_beyond_its_limit_is_shown_to_be(tmp_path: Path) -> None:
    assert [beyond(v, 30) for v in (30.04, 30.0004, 31.02)] == ["30.04", "30.0004", "31.0"]
    assert beyond(0.1999, 0.2, 2) == "0.1999"
    details = {
        encoded(tone(30.01)): "30.01 s, the limit is 30 s",
        encoded(tone(0.1999)): "0.1999 s, at least 0.2 s are needed",
        encoded(tone(1.0, peak=0.0009999), subtype="FLOAT"): "its peak is 0.0009",
    }
    for audio, detail in details.items():
        found = decode(audio, FILTERS)
        assert isinstance(found, tuple)
        assert detail in found[1]
        assert "is 0.001," not in found[1]


def test_exactly_30_seconds_pass_at_any_rate_and_are_read_again(tmp_path: Path) -> None:
    for rate in (44_100, 22_050, 11_025):
        path = store(encoded(tone(30, rate), rate), tmp_path, FILTERS)
        assert isinstance(path, Path)
        assert audio_problem(path) is None


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.6), st.sampled_from([0.0, 0.0005, 0.2, 1.0]))
def test_what_was_stored_passes_again(tmp_path_factory: pytest.TempPathFactory, seconds: float, peak: float) -> None:
    folder = tmp_path_factory.mktemp("audio")
    first = store(encoded(tone(seconds, peak=peak)), folder, FILTERS)
    if isinstance(first, Path):
        again = store(first, folder, FILTERS)
        assert isinstance(again, Path)
        before, after = soundfile.read(first, dtype="int16")[0], soundfile.read(again, dtype="int16")[0]
        assert np.array_equal(before, after)


def test_a_recording_is_decoded_once_and_other_limits_ask_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(wav(), tmp_path, FILTERS)
    monkeypatch.setattr("palimpsest.data.filters.decode", lambda *_: ("broken audio", "decoded again"))
    assert store(wav(), tmp_path, FILTERS) == path
    assert store(wav(), tmp_path, Filters(silence_peak=0.9)) == ("broken audio", "decoded again")


# -- limits and errors ------------------------------------------------------------------------------------------------
def test_filters_of_the_command_line_and_of_a_recipe_are_the_same() -> None:
    assert parse_filters(["max_answer_words=300", "silence_peak = 0.01"]) == Filters(
        max_answer_words=300, silence_peak=0.01
    )
    with pytest.raises(UserError, match="no key 'max_answer_word'; the nearest known key is 'max_answer_words'"):
        parse_filters(["max_answer_word=3"])
    with pytest.raises(UserError, match="--filter: max_answer_words: Input should be a valid integer"):
        parse_filters(["max_answer_words=many"])
    with pytest.raises(UserError, match="max_audio_seconds: Input should be less than or equal to 30"):
        parse_filters(["max_audio_seconds=31"])
    with pytest.raises(UserError, match="silence_peak: Input should be greater than or equal to 0"):
        parse_filters(["silence_peak=-1"])


def test_nothing_left_says_what_dropped_how_many() -> None:
    require_some(1, {}, "x")
    with pytest.raises(UserError, match=r"Nothing is left of x \(7 silent audio, 5 empty question\)"):
        require_some(0, {"silent audio": 7, "empty question": 5}, "x")
    with pytest.raises(UserError, match="it has no rows"):
        require_some(0, {}, "x")
