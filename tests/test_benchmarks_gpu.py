"""The GPU benchmarks run from beginning to end on the CPU; the estimates match the bare gradients."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from palimpsest.report.figures import FIGURES
from palimpsest.rundir import read_jsonl, write_jsonl
from tiny import save_tiny_models

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"
SCRIPT = FOLDER / "importance_8b.py"


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.json"
    options = ["--dry-run", "--rows", "2", "--length", "16", "--batches", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(out), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {row["what"] for row in result["rows"]} >= {"bare", "signed_sum", "per_sequence_abs", "loop of one"}
    assert all(row["microseconds_per_token"] > 0 and len(row["all_seconds"]) >= 2 for row in result["rows"])
    (error,) = [row["error"] for row in result["rows"] if "error" in row]
    assert error < 1e-5
    assert {"versions", "device", "python"} <= result["machine"].keys()
    assert "per_sequence_abs" in capsys.readouterr().out


def test_training_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.json"
    script = str(FOLDER / "training.py")
    monkeypatch.setattr(sys, "argv", [script, str(out), "--tiny", "--steps", "2", "--length", "96", "--seconds", "1"])
    runpy.run_path(script, run_name="__main__")
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["full", "layer_lr", "lora"]
    for row in rows:
        assert row["batch"] == "2 x 96"
        assert len(row["all_seconds"]) == 2
        assert row["tokens_per_second"] > 0
        assert row["planned_gb"] > 0
    full, layer_lr, lora = rows
    assert full["planned_gb"] > lora["planned_gb"]
    work = [row["tflops"] * row["seconds_per_step"] for row in (full, layer_lr)]
    assert work[0] == pytest.approx(work[1])  # the rates differ, not the arithmetic
    assert "tokens/s" in capsys.readouterr().out


STUDY = FOLDER / "study.py"


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> None:
    """benchmarks/gpu/study.py in `folder`, in this process; what it changes is changed back after the test."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(STUDY), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PALIMPSEST_CACHE", str(folder / "cache"))
    runpy.run_path(str(STUDY), run_name="__main__")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save_tiny_models(tmp_path)
    rng = np.random.default_rng(0)
    for split, n in (("train", 22), ("heldout", 2)):
        rows = []
        for i in range(n):
            soundfile.write(tmp_path / f"{split}{i}.wav", rng.normal(0, 0.1, 6_400), 16_000)
            rows.append({"id": f"{split}{i}", "question": f"What is {i}?", "answer": "It.", "audio": f"{split}{i}.wav"})
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    source = {split: {"source": f"{split}.jsonl", "split": split} for split in ("train", "heldout")}
    values = {
        "name": "tiny",
        "seeds": 2,
        "seeds_measure": ["importance"],
        "models": {"language_model": "./llm", "encoder": "./whisper"},
        "speech": {"adaptor_hidden_size": 24},
        "data": source,
        "methods": {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 2}},
        "training": {"epochs": 1, "batch_size": 11},
        "importance": {"n_examples": 4, "batch_size": 2},
        "deactivation": {"random_seeds": 1},
        "analysis": {"shuffles": 1, "bootstrap": 100, "rank_draws": 0},
        "evaluation": {"tasks": [{"name": "numbers", **source["heldout"]}], "max_new_tokens": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_a_study_travels_in_parts_runs_in_stages_and_comes_back(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    for name in list(FIGURES):  # most of the time, and tested elsewhere
        monkeypatch.delitem(FIGURES, name)
    call(
        monkeypatch, tmp_path, here, "--pack", "parts", "--recipe", "recipe.yaml", "--part-mb", "0.1",
        "--set", "evaluation.batch_size=2", "evaluation.probe=false",
    )  # fmt: skip
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    assert max(file.stat().st_size for file in (tmp_path / "parts").rglob("*.bin")) <= 100_000

    # In any order; a damaged part is refused, nothing runs before all are there.
    for part in reversed(parts[1:]):
        call(monkeypatch, there, "work", "--unpack", part)
    damaged = parts[0] / f"{parts[0].name}.bin"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-1] + b"?")
    with pytest.raises(SystemExit, match="damaged or of another packing"):
        call(monkeypatch, there, "work", "--unpack", parts[0])
    with pytest.raises(SystemExit, match="no inputs"):
        call(monkeypatch, there, "work", "--cpu")
    damaged.write_bytes(good)
    call(monkeypatch, there, "work", "--unpack", parts[0])
    assert f"all {len(parts)} parts are here" in capsys.readouterr().out
    packed = yaml.safe_load((there / "work/inputs/recipe.yaml").read_text())
    assert (packed["evaluation"]["batch_size"], packed["data"]["train"]["source"]) == (2, "inputs/data/train.jsonl")
    rows = read_jsonl(there / "work/inputs/data/train.jsonl")
    assert {row["id"] for row in rows} == {f"train{i}" for i in range(2, 22)}  # the first two are asked in the task
    sent, rate = soundfile.read(there / "work/inputs/data" / rows[0]["audio"])
    assert (rows[0]["audio"][-5:], len(sent), rate) == (".opus", 6_400, 16_000)

    # No time: nothing is lost and nothing pretended. Then on, with weights for whoever ships them.
    run = ("work", "--cpu", "--workers", "0", "--first", "full", "--results", there / "out", "--keep", "lora")
    call(monkeypatch, there, *run, "--minutes", "0")
    assert "time is up" in capsys.readouterr().out
    assert not (there / "work/run/results.json").exists()
    clock = Stopwatch(monkeypatch, there / "work/run/methods/lora/checkpoint")
    call(monkeypatch, there, *run, "--minutes", "10")
    monkeypatch.setattr("time.monotonic", clock.real)
    assert "time is up" in capsys.readouterr().out
    # Cut in the second stage: the results and study.yaml are those of the first.
    found = json.loads((there / "work/run/results.json").read_text())
    assert {r["method"] for r in found["qa"]} == {"base", "full"}
    assert list(yaml.safe_load((there / "work/run/study.yaml").read_text())["methods"]) == ["full"]
    call(monkeypatch, there, *run, "--minutes", "100")
    assert "the study is finished" in capsys.readouterr().out

    call(monkeypatch, tmp_path, "back", "--read", there / "out")
    found = json.loads((tmp_path / "back/results.json").read_text())
    assert {r["method"] for r in found["qa"]} == {"base", "full", "lora", "full-seed1", "lora-seed1"}
    assert {r["n_seeds"] for r in found["seeds"]} == {2}
    assert found == json.loads((there / "work/run/results.json").read_text())
    assert (tmp_path / "back/report.html").exists()
    names = {file.name for file in (tmp_path / "back").rglob("*")}
    assert {"adaptor-lora.safetensors", "adapter_model.safetensors"} <= names
    assert not names & {"model.safetensors", "tokenizer.json", "audio"}
    assert [file.name for file in (tmp_path / "back/features").rglob("*")] == [
        "step.json"
    ]  # that it was made, not what


class Stopwatch:
    """time.monotonic, from a moment on far ahead: as soon as `file` is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        self.real, self.file = time.monotonic, file
        monkeypatch.setattr("time.monotonic", lambda: self.real() + 3_000 * self.file.exists())


@pytest.mark.slow
def test_training_runs_of_a_study_side_by_side(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, recipe, "here", "--pack", "parts", "--recipe", "recipe.yaml", "--set", "evaluation.probe=false")
    call(monkeypatch, recipe, "work", "--unpack", "parts/part-00")
    call(monkeypatch, recipe, "work", "--cpu", "--workers", "2")
    assert len(list((recipe / "work/logs").glob("*.txt"))) == 4
    assert not (recipe / "work/run/.working").exists()
    found = json.loads((recipe / "work/run/results.json").read_text())
    assert {r["method"] for r in found["training"]} == {"full", "lora", "full-seed1", "lora-seed1"}
