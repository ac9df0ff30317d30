"""Spoken questions in the page: what is embedded is the recording, what is not has a sentence."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from palimpsest.cli import app
from palimpsest.files import write_jsonl, write_text
from palimpsest.report import page as page_module
from palimpsest.report import recordings
from palimpsest.report.inputs import read_inputs
from palimpsest.report.page import write_report
from palimpsest.report.recordings import Recordings, read_recordings, to_uri
from palimpsest.report.samples import samples_of


def tone(seconds: float = 0.5, rate: int = 16000, hertz: float = 440.0) -> Any:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def make(path: Path, manifest: list[dict[str, Any]] | None, modality: str = "speech", n: int = 2) -> Path:
    """A run with answers to `n` questions and the manifest of their task."""
    rows = [{"id": f"q{i}", "question": f"Why {i}?", "response": "So.", "n_new_tokens": 1} for i in range(n)]
    write_jsonl(path / "methods" / "full" / "samples" / f"facts-{modality}" / "samples.jsonl", rows)
    (path / "data").mkdir(exist_ok=True)
    soundfile.write(path / "data" / "a.wav", tone(), 16000)
    if manifest is not None:
        write_jsonl(path / "data" / "task-facts.jsonl", manifest)
    return path


def read(path: Path, **options: Any) -> Recordings:
    inputs = read_inputs(path)
    return read_recordings(inputs, samples_of(inputs), **options)


def decoded(uri: str) -> tuple[Any, int]:
    return soundfile.read(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def loudest_hertz(samples: Any, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_opus_keeps_length_and_pitch(rate: int) -> None:
    uri = to_uri(tone(rate=rate), rate)
    assert uri.startswith("data:audio/ogg;base64,")
    samples, back = decoded(uri)  # libogg drops pages whose checksum is wrong
    assert len(samples) / back == pytest.approx(0.5, abs=0.03)
    assert loudest_hertz(samples, back) == pytest.approx(440, abs=4)
    assert samples.std() == pytest.approx(0.5 / np.sqrt(2), abs=0.03)


def test_rates_that_opus_has_not_are_kept_exactly_as_flac() -> None:
    uri = to_uri(tone(rate=22050), 22050)
    assert uri.startswith("data:audio/flac;base64,")
    samples, rate = decoded(uri)
    assert rate == 22050
    np.testing.assert_allclose(samples, tone(rate=22050), atol=2**-15)


def test_without_opus_in_libsndfile_it_is_flac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfile, "available_subtypes", lambda _: {"VORBIS": "Vorbis"})
    assert to_uri(tone(), 16000).startswith("data:audio/flac;base64,")


def test_the_same_samples_give_the_same_bytes() -> None:
    assert to_uri(tone(), 16000) == to_uri(tone(), 16000)
    raw = io.BytesIO()
    soundfile.write(raw, tone(), 16000, format="OGG", subtype="OPUS")
    assert base64.b64decode(to_uri(tone(), 16000).split(",")[1])[14:18] == bytes(4) != raw.getvalue()[14:18]


def test_half_a_minute_is_small() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * 16000).astype(np.float32)
    assert len(to_uri(noise, 16000)) < 300_000
    assert len(decoded(to_uri(noise, 16000))[0]) == pytest.approx(30 * 16000, rel=0.01)


def test_both_channels_are_heard(tmp_path: Path) -> None:
    make(tmp_path, [{"id": "q0", "audio": "stereo.flac"}])
    soundfile.write(tmp_path / "data" / "stereo.flac", np.stack([tone(), 0 * tone()], axis=1), 16000)
    samples, rate = decoded(read(tmp_path).by_question["facts", "q0"].uri)
    assert samples.ndim == 1
    assert loudest_hertz(samples, rate) == pytest.approx(440, abs=4)


def test_the_page_says_which_recordings_it_holds(tmp_path: Path) -> None:
    make(tmp_path, [{"id": f"q{i}", "audio": "a.wav", "voice": "invented"} for i in range(2)])
    write_text(
        tmp_path / "study.yaml", "evaluation: {tasks: [{name: facts, source: 'llama_questions:/home/someone/lq'}]}"
    )
    found = read(tmp_path)
    assert found.embedded == ("2 of facts (source llama_questions:lq; voice invented)",)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert found.embedded[0] in page
    assert page.count("<audio ") == 2
    assert 'aria-label="Spoken question: Why 1?"' in page
    assert "0.5 s, voice invented, <code>data/a.wav</code>" in page
    assert "/home/someone" not in page.split("Configuration (study.yaml)")[0]


def test_what_cannot_be_played_has_a_sentence_and_the_rest_is_played(tmp_path: Path) -> None:
    make(
        tmp_path,
        [
            {"id": "q0", "audio": "gone.wav"},
            {"id": "q1", "audio": "text.wav"},
            {"id": "q2"},
            {"id": "q3", "audio": "long.wav"},
            {"id": "q4", "audio": "a.wav"},
        ],
        n=6,
    )
    write_text(tmp_path / "data" / "text.wav", "no sound")
    soundfile.write(tmp_path / "data" / "long.wav", np.zeros(61 * 8000, np.float32), 8000)
    found = read(tmp_path).by_question
    reasons = [found["facts", f"q{i}"].why_not for i in range(6)]
    assert reasons[0] == "the file is not there"
    assert reasons[1].startswith("the file cannot be read (")
    assert reasons[2] == reasons[5] == "the run's data name no recording of this question"
    assert reasons[3] == "longer than 60 s"
    assert reasons[4] == ""
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<audio ") == 1
    assert re.search(r"data/gone.wav</code>: not in this page, the file is not there", page)


def test_the_budget_is_kept_and_the_rest_says_where_the_file_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, [{"id": f"q{i}", "audio": "a.wav"} for i in range(4)], n=4)
    one = len(to_uri(tone(), 16000))
    monkeypatch.setattr(recordings, "MAX_BYTES", 2 * one + one // 2)
    found = read(tmp_path).by_question
    assert [bool(found["facts", f"q{i}"].uri) for i in range(4)] == [True, True, False, False]
    assert "share 0.0 MB of this page" in found["facts", "q3"].why_not
    assert found["facts", "q3"].where == "data/a.wav"


@pytest.mark.parametrize(("too_large_by", "inside"), [(0, 4), (0.5, 3), (1.5, 2), (1000, 0)])
def test_a_large_page_has_less_room_for_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, too_large_by: float, inside: int
) -> None:
    """too_large_by: in recordings, all of which have the same size; up to 1 kB more is left free."""
    make(tmp_path, [{"id": f"q{i}", "audio": "a.wav"} for i in range(4)], n=4)
    one = len(to_uri(tone(), 16000))
    assert one > 2 * page_module.ROOM_TO_SAY_SO
    whole = write_report(tmp_path).stat().st_size
    limit = int(whole - too_large_by * one)
    monkeypatch.setattr(page_module, "MAX_PAGE", limit)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<audio ") == inside
    assert (len(page.encode()) <= limit) == (inside > 0)  # without any it is as large as it is
    assert (f"Recordings without room in this page: {4 - inside}; the others share" in page) == (inside < 4)
    assert page.count("not in this page, the recordings of a task share") == 4 - inside


def test_a_file_elsewhere_is_played_and_its_folder_not_told(tmp_path: Path) -> None:
    elsewhere = tmp_path / "secret" / "b.wav"
    elsewhere.parent.mkdir()
    soundfile.write(elsewhere, tone(), 16000)
    found = read(make(tmp_path / "run", [{"id": "q0", "audio": str(elsewhere)}])).by_question["facts", "q0"]
    assert found.uri
    assert found.where == "b.wav, outside the run directory"


@pytest.mark.parametrize("manifest", [None, "{"])
def test_a_manifest_that_is_gone_or_damaged_is_named(tmp_path: Path, manifest: str | None) -> None:
    make(tmp_path, None)
    if manifest is not None:
        write_text(tmp_path / "data" / "task-facts.jsonl", manifest)
    (line,) = read(tmp_path).missing
    assert line.startswith("data/task-facts.jsonl ")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "data/task-facts.jsonl" in page
    assert "<audio " not in page


def test_a_run_that_was_never_asked_in_speech_needs_no_recordings(tmp_path: Path) -> None:
    assert read(make(tmp_path, None, modality="text")) == Recordings({}, (), ())


def test_no_audio_leaves_them_out_and_says_so(tmp_path: Path) -> None:
    make(tmp_path, [{"id": "q0", "audio": "a.wav"}])
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--no-audio"]).exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<audio" not in page
    assert "made without the recordings" in page


def test_no_samples_leaves_out_questions_answers_and_recordings(tmp_path: Path) -> None:
    make(tmp_path, [{"id": "q0", "audio": "a.wav"}])
    whole = write_report(tmp_path, tmp_path / "whole.html").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--no-samples"]).exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("Why 0?", 'class="response"', "<audio "):
        assert part in whole
        assert part not in page
    assert "made without questions and answers" in page
    assert "--no-samples" in page


def test_a_hostile_manifest_stays_text(tmp_path: Path) -> None:
    hostile = '"><img src=x onerror=alert(1)>'
    make(tmp_path, [{"id": "q0", "audio": f"{hostile}.wav", "voice": hostile}, {"id": "q1", "audio": ["a"]}])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<img" not in page
    assert "&lt;img" in page
