"""The first steps of a study: voices of splits, augmented copies of the training data, a cache that studies share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audio_files import voice_assistant, wav
from palimpsest import rundir
from palimpsest.config import Importance, parse_config
from palimpsest.data import splits
from palimpsest.data.examples import Example
from palimpsest.data.features import Features
from palimpsest.data.voices import VOICES, Voice
from palimpsest.files import UserError
from palimpsest.study import steps
from palimpsest.study.run import Study
from tiny import save_tiny_models
from tones import load_tone, one


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Eight training questions to be spoken, two of the heldout ones recorded."""
    monkeypatch.setitem(VOICES, "low", Voice("low", one, load_tone))
    monkeypatch.setitem(VOICES, "high", Voice("high", one, load_tone))
    save_tiny_models(tmp_path)
    soundfile.write(tmp_path / "own.wav", np.full(6_000, 0.1), 16_000)
    rows = {
        "train": [{"id": f"t{i}", "question": f"What is {i}?", "answer": "It."} for i in range(8)],
        "heldout": [{"id": f"h{i}", "question": f"Who is {i}?", "answer": "I.", "audio": "own.wav"} for i in range(2)],
        "task": [{"id": f"k{i}", "question": f"Where is {i}?", "answer": "There."} for i in range(2)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "name": "tiny",
        "models": {"language_model": str(tmp_path / "llm"), "encoder": str(tmp_path / "whisper"), "compute": "float32"},
        "speech": {"voice": ["low", "high@1.5"]},
        "data": {
            "train": {"source": str(tmp_path / "train.jsonl"), "split": "train"},
            "heldout": {"source": str(tmp_path / "heldout.jsonl"), "split": "heldout", "voice": "low"},
        },
        "methods": {"full": {"kind": "full"}},
        "evaluation": {
            "tasks": [{"name": "where", "source": str(tmp_path / "task.jsonl"), "split": "test", "voice": "low@0.5"}]
        },
    }


def begin(recipe: dict[str, Any], folder: Path) -> Study:
    study = Study(parse_config(recipe, "test"), folder)
    study.check()
    steps.data(study.ws)
    steps.features(study.ws)
    return study


def test_voices_and_augmented_copies_go_where_they_belong(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["speech"]["augmentation"] = {"copies": 2, "speed": [0.8, 1.2], "noise_snr_db": [10, 30]}
    study = begin(recipe, tmp_path / "run")
    groups = study.ws.groups
    assert [e.id for e in groups["train"][8:]] == [f"t{i}~{copy}" for copy in (1, 2) for i in range(8)]
    assert {e.voice for e in groups["train"]} == {"low", "high@1.5"}
    assert {e.voice for e in groups["heldout"]} == {None}
    assert {e.voice for e in groups["task-where"]} == {"low@0.5"}
    assert not any(e.augmentation for group in ("heldout", "task-where") for e in groups[group])
    assert all((e.augmentation is None) == (i < 8) for i, e in enumerate(groups["train"]))
    frames = Features(tmp_path / "run" / "features" / "train")
    assert not torch.equal(frames["t0~1"][:10], frames["t0"][:10])
    step = json.loads((tmp_path / "run" / "data" / "step.json").read_text())
    assert step["inputs"]["voices"] == {
        "train": [["low", "1"], ["high@1.5", "1"]],
        "heldout": [["low", "1"]],
        "task-where": [["low@0.5", "1"]],
    }
    assert step["inputs"]["augmentation"][0]["copies"] == 2


def test_studies_share_a_cache_and_are_not_run_again_because_of_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    begin(recipe, tmp_path / "own")
    shared = {**recipe, "speech": {**recipe["speech"], "feature_cache": str(tmp_path / "cache")}}
    begin(shared, tmp_path / "one")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    begin(shared, tmp_path / "two")
    assert shards
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == shards
    assert not list((tmp_path / "two" / "features").rglob("*.safetensors"))
    own, two = (Features(tmp_path / name / "features" / "train") for name in ("own", "two"))
    assert all(torch.equal(own[f"t{i}"], two[f"t{i}"]) for i in range(8))
    before = (tmp_path / "own" / "features" / "step.json").read_text()
    begin(shared, tmp_path / "own")
    assert (tmp_path / "own" / "features" / "step.json").read_text() == before


def test_a_task_s_faulty_recording_stops_the_study_or_is_kept_unasked(recipe: dict[str, Any], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(6_000), 16_000)
    rows = [{"id": f"k{i}", "question": f"Where is {i}?", "answer": "There."} for i in range(2)]
    rows[1]["audio"] = "silent.wav"
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"task\.jsonl:2: silent audio .*in a recipe: faulty_audio: wrong"):
        begin(recipe, tmp_path / "run")
    recipe["evaluation"]["tasks"][0]["faulty_audio"] = "wrong"
    study = begin(recipe, tmp_path / "kept")
    spoken, silent = study.ws.groups["task-where"]
    assert (spoken.fault, silent.audio) == (None, tmp_path / "silent.wav")
    assert str(silent.fault).startswith("silent audio")
    frames = Features(tmp_path / "kept" / "features" / "task-where")
    assert ("k0" in frames, "k1" in frames) == (True, False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"voice": ["low", "loud"]}, "no voice 'loud'"),
        ({"voice": []}, "list of voices is empty"),
        ({"augmentation": {"copies": 2}}, "speech.augmentation: augmentation changes nothing"),
        ({"augmentation": {"speed": [1.1, 0.9]}}, r"speed \[1.1, 0.9\] must be a range"),
        ({"augmentation": {"reverberation": 3}}, "speech.augmentation.reverberation"),
    ],
)
def test_wrong_voices_and_augmentations_are_told_first(
    recipe: dict[str, Any], tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        begin({**recipe, "speech": section}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_importance_is_measured_on_the_questions_that_the_recipe_names() -> None:
    def example(group: str, i: int) -> Example:
        return Example(id=f"{group}{i}", question="What?", answers=("It",), answer="It.")

    groups = {"train": [example("t", i) for i in range(10)], "heldout": [example("h", i) for i in range(6)]}

    def ids(other: bool = False, **options: Any) -> list[str]:
        return [example.id for example in steps.importance_questions(groups, Importance(**options), 0, other=other)]

    assert {name[0] for name in ids(n_examples=4)} == {"t"}
    assert {name[0] for name in ids(n_examples=4, questions="heldout")} == {"h"}
    assert len(ids(questions="heldout")) == len(ids()) == 2  # at least two; else 1/30 of the training data
    for questions, n, others in (("train", 4, ["t"] * 4), ("train", 8, ["h"] * 6), ("heldout", 4, ["t"] * 4)):
        chosen, other = (ids(which, n_examples=n, questions=questions) for which in (False, True))
        assert [name[0] for name in other] == others
        assert not set(chosen) & set(other)


def test_a_second_start_reads_no_recording_to_compare_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(recipe, tmp_path / "run")
    hashed: list[str] = []
    for module in (splits, rundir):
        original = module.hash_file
        monkeypatch.setattr(module, "hash_file", lambda path, of=original: hashed.append(path.name) or of(path))
    study = begin(recipe, tmp_path / "run")
    assert all(step.skipped for step in study.ws.done)
    assert not [name for name in hashed if name.endswith((".wav", ".flac"))]

    soundfile.write(tmp_path / "own.wav", np.full(6_000, 0.2), 16_000)  # as long as before
    changed = begin(recipe, tmp_path / "run")
    assert "own.wav" in hashed
    assert not any(step.skipped for step in changed.ws.done)

    spoken = next((tmp_path / "run" / "data" / "audio").rglob("*.flac"))
    content = bytearray(spoken.read_bytes())
    content[-1] ^= 1
    spoken.write_bytes(content)
    assert changed.ws.dir.damage("data") is None  # looked at once in a process
    name = spoken.relative_to(tmp_path / "run" / "data").as_posix()
    assert rundir.RunDir(tmp_path / "run").damage("data") == f"{name} was changed"


def test_an_interrupted_data_step_reads_no_row_again_and_leaves_nothing_of_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palimpsest.data.notes.EVERY", 4)
    turns = [("1", f"Question {i}?", f"Answer {i}.", wav(pitch=200 + i)) for i in range(12)]
    table = voice_assistant(tmp_path / "set.parquet", turns, row_group_size=4)
    recipe["data"] = {"train": {"source": f"voice_assistant:{table}", "split": "train"}, "heldout_examples": 2}

    def data_step(folder: Path) -> Study:
        study = Study(parse_config(recipe, "test"), folder)
        study.check()
        steps.data(study.ws)
        return study

    whole = data_step(tmp_path / "whole")
    stored: list[int] = []
    original = splits.store

    def store(*arguments: Any) -> Any:
        stored.append(1)
        if len(stored) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr("palimpsest.data.cores.MORE", 0)
    monkeypatch.setattr("palimpsest.data.cores.n_cores", lambda: 1)  # one thread: the seventh row is the seventh call
    with monkeypatch.context() as patch:
        patch.setattr(splits, "store", store)
        with pytest.raises(KeyboardInterrupt):
            data_step(tmp_path / "run")
        stored[:] = [1] * 7
        continued = data_step(tmp_path / "run")
    assert len(stored) == 7 + 12 - 4  # of the first four it was noted what became of them

    def files(study: Study) -> dict[str, bytes]:
        folder = study.ws.path / "data"
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ("step.json", "files.json")
        }

    assert files(continued) == files(whole)
