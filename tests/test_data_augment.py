"""Changed copies of utterances: seeded, told, and as strong as asked for."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data import augment as module
from palimpsest.data.augment import Augmentation, Draw, add_noise, augment, change, draw_changes
from palimpsest.data.examples import Example, read_manifest, write_manifest
from palimpsest.data.speech import read_audio, write_flac
from palimpsest.files import UserError

needs_rooms = pytest.mark.skipif(find_spec("pyroomacoustics") is None, reason="pyroomacoustics is not installed")
NOTHING = Draw(None, None, None, 0, 0)


def tone(seconds: float = 1.0, frequency: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(int(16_000 * seconds)) / 16_000)).astype(np.float32)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    found = []
    for i in range(3):
        path = tmp_path / f"{i}.flac"
        write_flac(path, tone(0.5 + 0.1 * i))
        found.append(Example(f"q{i}", "Who?", ("Ada",), "Ada.", audio=path, voice="hibari"))
    return found


def bytes_of(examples: list[Example]) -> dict[str, bytes]:
    return {example.id: example.audio.read_bytes() for example in examples if example.audio is not None}


# --- each change -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_speed_changes_length_and_pitch_together(speed: float) -> None:
    changed = change(tone(), Draw(speed, None, None, 0, 0))
    assert len(changed) == pytest.approx(16_000 / speed, abs=2)
    spectrum = np.abs(np.fft.rfft(changed))
    assert np.argmax(spectrum) * 16_000 / len(changed) == pytest.approx(440 * speed, abs=2)


@settings(deadline=None, max_examples=20)
@given(st.floats(-5, 40), st.integers(0, 2**31))
def test_noise_has_the_ratio_asked_for(snr_db: float, seed: int) -> None:
    audio = tone(2.0)
    noise = add_noise(audio, snr_db, np.random.default_rng(seed)) - audio
    measured = 10 * np.log10(np.mean(audio**2) / np.mean(noise**2))
    assert measured == pytest.approx(snr_db, abs=0.2)  # 32 000 draws: the variance is known to 0.8 %


@needs_rooms
@pytest.mark.parametrize("rt60", [0.2, 0.5])
def test_the_room_decays_in_the_time_asked_for(rt60: float) -> None:
    """Schroeder's backward integral of the impulse response, −5 to −25 dB, times three."""
    for room in range(3):
        response = module._impulse_response(rt60, room)
        assert response[0] == 1.0
        energy = 10 * np.log10(np.cumsum(response[::-1] ** 2)[::-1] / np.sum(response**2))
        span = 3 * (np.argmax(energy < -25) - np.argmax(energy < -5)) / 16_000
        assert 0.6 * rt60 < span < 1.8 * rt60  # Sabine's formula is an approximation


@needs_rooms
def test_a_room_adds_its_tail_without_delay_and_keeps_the_length() -> None:
    click = np.zeros(16_000, np.float32)
    click[4000] = 0.5
    changed = change(click, Draw(None, None, 0.3, 1, 0))
    assert len(changed) == 16_000
    assert np.argmax(np.abs(changed)) == 4000
    assert np.abs(changed[4100:8000]).max() > 0.01


def test_loud_copies_are_scaled_not_clipped() -> None:
    changed = change(np.tile(np.float32([0.9, -0.9]), 8000), Draw(None, 0.0, None, 0, 1))
    assert np.abs(changed).max() == pytest.approx(0.99, abs=1e-6)
    assert np.array_equal(change(tone(), NOTHING), tone())


# --- draws -----------------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.text(max_size=10), st.integers(0, 99), st.floats(0.5, 1), st.floats(1, 2))
def test_draws_are_in_range_and_one_option_does_not_change_another(
    name: str, seed: int, low: float, high: float
) -> None:
    all_of_them = Augmentation(speed=(low, high), noise_snr_db=(10, 30), reverberation=0.3)
    draw = draw_changes(all_of_them, name, seed)
    assert draw == draw_changes(all_of_them, name, seed)
    assert low <= draw.speed <= high
    assert 10 <= draw.snr_db <= 30
    only = draw_changes(Augmentation(noise_snr_db=(10, 30)), name, seed)
    assert (only.speed, only.snr_db, only.rt60, only.seed) == (None, draw.snr_db, None, draw.seed)
    assert draw_changes(all_of_them, name, seed + 1) != draw


# --- files -----------------------------------------------------------------------------------------------
def test_copies_follow_the_originals_and_say_what_was_changed(tmp_path: Path, examples: list[Example]) -> None:
    seen: list[tuple[int, int]] = []
    options = Augmentation(copies=2, speed=(0.9, 1.1), noise_snr_db=(10, 30))
    found = augment(examples, tmp_path / "audio", options, workers=1, progress=lambda *done: seen.append(done))
    assert [e.id for e in found] == ["q0", "q1", "q2", "q0~1", "q1~1", "q2~1", "q0~2", "q1~2", "q2~2"]
    assert found[:3] == examples
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    for copy in found[3:]:
        source = next(e for e in examples if e.id == copy.id[:2])
        assert (copy.question, copy.answer, copy.voice) == (source.question, source.answer, source.voice)
        told = dict(part.split("=") for part in copy.augmentation.split())
        assert set(told) == {"speed", "snr"}
        assert len(read_audio(copy.audio)) == pytest.approx(len(read_audio(source.audio)) / float(told["speed"]), abs=9)
    assert len(set(bytes_of(found).values())) == 9
    write_manifest(tmp_path / "train.jsonl", found)
    assert read_manifest(tmp_path / "train.jsonl") == found


@needs_rooms
def test_copies_are_the_same_bytes_however_they_are_made(tmp_path: Path, examples: list[Example]) -> None:
    options = Augmentation(speed=(0.9, 1.1), noise_snr_db=(10, 30), reverberation=0.2)
    one = augment(examples, tmp_path / "one", options, seed=5, workers=1)
    two = augment(examples[::-1], tmp_path / "two", options, seed=5, workers=2)
    assert bytes_of(one) == bytes_of(two)
    other = augment(examples, tmp_path / "one", options, seed=6, workers=1)
    assert not set(bytes_of(other[3:]).values()) & set(bytes_of(one).values())

    kept = one[3].audio
    kept.write_bytes(b"kept")  # present, so not made again
    one[4].audio.unlink()
    assert augment(examples, tmp_path / "one", options, seed=5, workers=1) == one
    assert kept.read_bytes() == b"kept"
    assert one[4].audio.exists()


def test_a_copy_stays_within_the_longest_audio(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", tone(29.0), 16_000)
    example = Example("q", "Who?", ("Ada",), "Ada.", audio=tmp_path / "long.flac")
    copy = augment([example], tmp_path, Augmentation(speed=(0.5, 0.6)), workers=1)[1]
    assert copy.augmentation == "speed=0.967"  # 29 / 30
    assert 29.9 < soundfile.info(str(copy.audio)).duration <= 30.0


def test_what_cannot_be_augmented_is_a_user_error(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Augmentation(noise_snr_db=(10, 30))
    with pytest.raises(UserError, match="'q' has no audio"):
        augment([Example("q", "Who?", ("Ada",), "Ada.")], tmp_path, options)
    taken = [*examples, Example("q0~1", "Who?", ("Ada",), "Ada.", audio=examples[0].audio)]
    with pytest.raises(UserError, match="id 'q0~1' is that of an augmented copy"):
        augment(taken, tmp_path, options)

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "version", absent)
    with pytest.raises(UserError, match=r"palimpsest-llm\[augment\]"):
        augment(examples, tmp_path, Augmentation(reverberation=0.3))
    assert len(augment(examples, tmp_path, options, workers=1)) == 6  # the others need no library
