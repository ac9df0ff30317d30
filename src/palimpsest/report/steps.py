"""Steps of a study that its run directory does not hold: interrupted ones, and ones whose folder is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palimpsest.report.inputs import at
from palimpsest.rundir import STEP_FILE


def missing_steps(run: Path, provenance: dict[str, Any]) -> list[str]:
    """A sentence for the steps begun and not finished, one for the finished steps that are not there any more."""
    # .working/ holds a step as STEP-FINGERPRINT with __ for /; see rundir.RunDir.step.
    begun = sorted({path.name.rpartition("-")[0].replace("__", "/") for path in run.glob(".working/*-*")})
    done = at(provenance, "steps")
    gone = [name for name in done if not (run / name / STEP_FILE).is_file()] if isinstance(done, dict) else []
    sentences = []
    if begun:
        sentences.append(f"Begun and not finished: {', '.join(begun)}.")
    if gone:
        sentences.append(f"Steps whose folder is gone, which a resumed study runs again: {', '.join(gone)}.")
    return sentences
