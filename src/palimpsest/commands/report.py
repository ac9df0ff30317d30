"""palimpsest report: the pages of finished runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import Doc

from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.report.inputs import Inputs
    from palimpsest.study.live import Progress


@dataclass(frozen=True)
class Options:
    """Make the figures and report.html of a run again from its results, or one page that compares several runs.

    Example: palimpsest report runs/demo
    """

    runs: Annotated[list[Path], typer.Argument(), Doc("Run directory of a study; several are compared in one page.")]
    out: Annotated[Path | None, Doc("File of the page; default RUN/report.html, of several comparison.html here.")] = (
        None
    )
    audio: Annotated[bool, Doc("Put recordings of spoken questions into the page of one run.")] = True
    samples: Annotated[bool, Doc("Show questions and answers; without, no recordings either.")] = True


def run(options: Options) -> Iterator[str]:
    from palimpsest.comparison.pairs import pair_runs
    from palimpsest.report.figures import write_figures
    from palimpsest.report.inputs import read_inputs
    from palimpsest.report.page import write_report
    from palimpsest.report.side_by_side import write_comparison

    for folder in options.runs:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a run directory; give the --out of a study.")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"{options.out} is a folder; give a file for the page with --out.")
    if len(options.runs) > 1:
        page = write_comparison(options.runs, pair_runs(options.runs), options.out or Path("comparison.html"))
    else:
        folder = options.runs[0]
        inputs, progress = _of_unfinished(folder) or (read_inputs(folder), None)  # once: 2 s for 150 MB
        write_figures(folder, inputs)
        page = write_report(
            folder, options.out, audio=options.audio, samples=options.samples, inputs=inputs, progress=progress
        )
    yield f"Report: {page}"


def _of_unfinished(run: Path) -> tuple[Inputs, Progress] | None:
    """What a study that was stopped has so far; None of any other folder, and where its steps cannot be read."""
    from palimpsest.rundir import RESULTS, STUDY

    if (run / RESULTS).exists() or not (run / STUDY).exists():
        return None
    from palimpsest.study.run import unfinished  # brings torch

    try:
        return unfinished(run)
    except UserError:
        return None
