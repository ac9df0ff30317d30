"""palimpsest study: run or resume a whole study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import Doc

if TYPE_CHECKING:
    from palimpsest.config import StudyConfig


@dataclass(frozen=True)
class Options:
    """Run or resume a whole study: data, training, importance, deactivation, analysis, evaluation, report.

    Example: palimpsest study recipes/demo.yaml --out runs/demo
    """

    recipe: Annotated[Path, typer.Argument(), Doc("YAML file of the study; see recipes/.")]
    out: Annotated[Path, Doc("Run directory; started again, the study continues there.")]
    changed: Annotated[bool, Doc("--out holds another recipe: run again what the change touches.")] = False


def run(options: Options) -> Iterator[str]:
    from palimpsest.config import load_config

    yield from run_and_say(load_config(options.recipe), options.out, options.changed)


def run_and_say(config: StudyConfig, out: Path, changed: bool) -> Iterator[str]:
    from palimpsest.parallel import started_first
    from palimpsest.report.glance import closing
    from palimpsest.report.inputs import read_inputs
    from palimpsest.study.run import run_study

    report = run_study(config, out, changed=changed)
    if started_first():
        yield from closing(read_inputs(out))
        yield f"Report: {report}"
