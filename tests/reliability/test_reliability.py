"""A few interruptions and a few damaged inputs of every kind; the scripts beside this one do many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def shows_no_fault(script: str, *arguments: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["study", "evaluate", "validate-importance", "data prepare", "export"])
def test_what_is_interrupted_ends_as_if_nothing_happened(name: str) -> None:
    shows_no_fault("interrupt.py", "--job", name, "--kills", "4", "--cuts", "4", "--full-disks", "0")


@pytest.mark.parametrize(
    "name", ["manifest", "csv", "parquet", "wav", "flac", "recipe", "scores", "checkpoint", "template", "samples"]
)
def test_an_input_that_is_nearly_right_is_read_or_refused(name: str) -> None:
    shows_no_fault("fuzz.py", "--only", name, "--n", "8")
