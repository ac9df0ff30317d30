"""The GPU benchmarks run from beginning to end on the CPU; the estimates match the bare gradients."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

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
