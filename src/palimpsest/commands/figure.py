"""palimpsest figure: one figure of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Doc


@dataclass(frozen=True)
class Options:
    """Make one figure of a run again, as SVG and PNG.

    Example: palimpsest figure figure2 runs/demo
    """

    name: Annotated[str, typer.Argument(), Doc("For example figure2; a wrong name lists the right ones.")]
    run: Annotated[Path, typer.Argument(), Doc("Run directory of a study.")]


def run(options: Options) -> Iterator[str]:
    from palimpsest.report.figures import write_figure

    yield from map(str, write_figure(options.run, options.name))
