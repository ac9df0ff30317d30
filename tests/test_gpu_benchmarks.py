"""The scripts for a GPU run on tiny models; importance and training without packages that such a machine may lack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "gpu"
ABSENT = (
    "pydantic",
    "annotated_types",
    "soundfile",
    "soxr",
    "scipy",
    "pandas",
    "jaxtyping",
    "matplotlib",
    "typer",
    "datasets",
    "sklearn",
)
WITHOUT = """
import runpy, sys
script, absent, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent.split(",")))
sys.path.insert(0, script.rpartition("/")[0])
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def run(script: str, out: Path, *arguments: str, absent: tuple[str, ...] = ABSENT) -> Any:
    command = [sys.executable, "-c", WITHOUT, str(FOLDER / script), ",".join(absent), str(out), "--tiny", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_importance(tmp_path: Path) -> None:
    found = run("importance_8b.py", tmp_path / "out.json", "--batches", "2", "--length", "32")
    assert {"torch", "transformers"} <= found["machine"]["versions"].keys()
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["signed_sum"]["error"] < 1e-2
    # One reduction in float32 on the device; then none.
    assert rows["study"]["plan"]["accumulators"] == 4 * rows["study"]["n_scored"]
    assert rows["study, in host memory"]["plan"]["accumulators"] == 0
    assert all(row["seconds_per_batch"] > 0 for row in found["rows"])


def test_training(tmp_path: Path) -> None:
    found = run("training.py", tmp_path / "out.json", "--length", "96", "--seconds", "1", "--steps", "2")
    assert [row["method"] for row in found["rows"]] == ["full", "layer_lr", "lora"]
    assert all(row["tokens_per_second"] > 0 and row["mfu"] is None for row in found["rows"])


@pytest.mark.slow
def test_a_whole_study_of_the_paper(tmp_path: Path) -> None:
    arguments = ("--examples", "12", "--methods", "lora", "--folder", str(tmp_path / "kept"))
    found = run("paper_study.py", tmp_path / "out.json", *arguments, absent=("typer",))
    steps = [row["step"] for row in found["steps"]]
    assert steps[0] == "models"
    assert steps[-1] == "report"
    assert "methods/lora/importance" in steps
    assert found["recipe"]["importance"]["keep"] == ["signed_sum"]  # as the recipe ships
    planned = {row["step"]: row["planned_gb"] for row in found["steps"]}
    assert planned["methods/lora/importance"] > planned["base/importance"] > 0
    assert found["tables"]["layers"] > 0
    kept = sum(file.stat().st_size for file in (tmp_path / "kept" / "run" / "methods").rglob("*.safetensors"))
    base = sum(file.stat().st_size for file in (tmp_path / "kept" / "run" / "base").rglob("*.safetensors"))
    assert (kept + base) / 1e9 == pytest.approx(found["planned_disk_gb"], rel=0.15)  # headers weigh, of tiny tensors


def test_packages_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"A whole study needs .*pip install pydantic soxr"):
        run("paper_study.py", tmp_path / "out.json", absent=("pydantic", "soxr"))
