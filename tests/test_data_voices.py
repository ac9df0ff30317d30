"""Names of voices, which example gets which, and espeak-ng."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data import voices
from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio, speak
from palimpsest.data.voices import VOICES, Voice, choose_voice, find_voices
from palimpsest.files import UserError

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed")
NAMES = ["hibari", "hibari@0.8", "espeak-ng", "espeak-ng:en-us+m3"]


def ask(question: str) -> Example:
    return Example(question, question, ("A",), "A")


# --- names -----------------------------------------------------------------------------------------------
def test_a_name_says_voice_variant_and_speed() -> None:
    found = find_voices(["hibari@1.25", "espeak-ng:en-us+f3", "espeak-ng:en-gb@0.8", "hibari@1"])
    assert [(v.name, v.speed, v.label) for v in found] == [
        ("hibari", 1.25, "hibari@1.25"),
        ("espeak-ng:en-us+f3", 1.0, "espeak-ng:en-us+f3"),
        ("espeak-ng:en-gb", 0.8, "espeak-ng:en-gb@0.8"),
        ("hibari", 1.0, "hibari"),
    ]
    assert find_voices("hibari") == [VOICES["hibari"]]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hibary", "no voice 'hibary'"),
        ("hibari@fast", "speed 'fast'; give a number from 0.5 to 2.0"),
        ("hibari@3", "speed '3'"),
        ("hibari@nan", "speed 'nan'"),
        ([], "list of voices is empty"),
    ],
)
def test_names_that_are_wrong_are_user_errors(name: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        find_voices(name)


# --- which example gets which voice ------------------------------------------------------------------------
@given(st.lists(st.text(max_size=8), max_size=20), st.permutations(NAMES))
@settings(deadline=None, max_examples=30)
def test_the_choice_depends_on_the_id_alone_and_a_new_voice_moves_only_its_own(
    ids: list[str], names: list[str]
) -> None:
    chosen = {name: choose_voice(find_voices(NAMES), name).label for name in ids}
    assert {name: choose_voice(find_voices(names), name).label for name in ids} == chosen
    fewer = {name: choose_voice(find_voices(names[:3]), name).label for name in ids}
    assert all(fewer[name] == chosen[name] for name in ids if chosen[name] != names[3])


def test_voices_share_the_examples_evenly() -> None:
    counts = Counter(choose_voice(find_voices(NAMES), f"q{i}").label for i in range(2000))
    assert set(counts) == set(NAMES)
    assert all(420 <= count <= 580 for count in counts.values())  # 500 ± 4 standard deviations of 19.4


# --- espeak-ng -------------------------------------------------------------------------------------------
@needs_espeak
def test_espeak_speaks_with_variants_and_speeds(tmp_path: Path) -> None:
    names = ["espeak-ng", "espeak-ng:en-us+f3", "espeak-ng:en-us+f3@2"]
    spoken = {}
    for name in names:
        (example,) = speak([ask("-v What is the capital of Norway?")], tmp_path, name, workers=1)
        assert example.voice == name
        assert example.audio is not None
        spoken[name] = read_audio(example.audio)
        assert 0.1 < np.abs(spoken[name]).max() < 1
    female, fast = spoken[names[1]], spoken[names[2]]
    assert len(female) != len(spoken[names[0]]) or not np.array_equal(female, spoken[names[0]])
    assert 0.4 < len(fast) / len(female) < 0.65
    assert 1.0 < len(female) / 16_000 < 4


@needs_espeak
def test_espeak_says_the_same_bytes_in_every_process_and_tells_silence(tmp_path: Path) -> None:
    examples = [ask("Who wrote Emma?"), ask("Where is Oslo?")]
    for folder, workers in (("one", 1), ("two", 2)):
        speak(examples, tmp_path / folder, "espeak-ng", workers=workers)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).rglob("*.flac")} for name in ("one", "two"))
    assert one == two
    assert len(one) == 2
    with pytest.raises(UserError, match=r"nothing in '\?\?\?' can be pronounced"):
        speak([ask("???")], tmp_path, "espeak-ng", workers=1)


@needs_espeak
@pytest.mark.parametrize(
    ("name", "problem"),
    [("en-xx", "no language 'en-xx'"), ("en-us+nope", "no variant 'nope'"), ("en-us+F3", "no variant 'F3'")],
)
def test_languages_and_variants_that_espeak_would_pass_over_are_user_errors(name: str, problem: str) -> None:
    (voice,) = find_voices(f"espeak-ng:{name}")
    with pytest.raises(UserError, match=problem):
        voice.version()


def test_without_the_program_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voices.shutil, "which", lambda program: None)
    with pytest.raises(UserError, match="apt install espeak-ng"):
        speak([ask("one")], tmp_path, "espeak-ng", workers=1)


def test_a_voice_of_ones_own_gets_a_name_for_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Voice("hum", lambda: "1", lambda: lambda text, speed, seed: (np.full(800, 0.1, np.float32), 8000))
    monkeypatch.setitem(VOICES, "hum", own)
    (example,) = speak([ask("one")], tmp_path, "hum@1.5", workers=1)
    assert example.voice == "hum@1.5"
