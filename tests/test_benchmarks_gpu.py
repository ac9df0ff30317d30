"""The GPU benchmark runs from beginning to end on the CPU, and its estimates match the bare gradients."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "importance_8b.py"


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
