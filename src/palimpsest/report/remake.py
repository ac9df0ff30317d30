"""The commands that make each part of a page again, as they are typed where the report was made.

A run outside that folder stands with its name alone, as it is typed in the folder that holds it: a page that others
read does not say where on a machine it lay.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

# Section of the page -> the folders of the steps whose results stand in it; METHODS is every folder of methods/.
METHODS = "methods/*"
STEPS: dict[str, tuple[str, ...]] = {
    "accuracy": (
        "base/samples",
        f"{METHODS}/samples",
        "base/perplexity",
        f"{METHODS}/perplexity",
        f"{METHODS}/drift",
        "base/general_text",
        f"{METHODS}/general_text",
    ),
    "layers": ("base/importance", "base/importance_other", f"{METHODS}/importance", "analysis"),
    "deactivation": ("base/deactivation", f"{METHODS}/deactivation"),
    "weights": ("analysis", "maps"),
    "training": (f"{METHODS}/checkpoint",),
    "samples": ("base/samples", f"{METHODS}/samples"),
}


def shown(run: Path) -> str:
    """`run` as one word of a shell: below the working folder relative to it, else its name alone."""
    here, path = Path.cwd(), run.absolute()
    return shlex.quote(str(path.relative_to(here)) if path.is_relative_to(here) else run.resolve().name)


def report(run: Path, audio: bool = True, samples: bool = True) -> str:
    left_out = " --no-samples" if not samples else " --no-audio" if not audio else ""
    return f"palimpsest report {shown(run)}{left_out}"


def comparison(runs: Sequence[Path], out: Path) -> str:
    return f"palimpsest report {' '.join(map(shown, runs))} --out {shown(out)}"


def figure(name: str, run: Path) -> str:
    return f"palimpsest figure {name} {shown(run)}"


def study(run: Path) -> str:
    """Resumes the study: every step that is absent or whose inputs changed."""
    return f"palimpsest study {shown(run)}/study.yaml --out {shown(run)}"


def again(run: Path, steps: Sequence[str]) -> str:
    """Measures `steps` again, whatever they hold; those the run does not have are left out of the command."""
    there = [step for step in steps if any(run.glob(step))]
    folders = " ".join(f"{shown(run)}/{step}" for step in there)
    return f"rm -r {folders} && {study(run)}" if there else study(run)
