"""Several runs in one page: what each found, side by side, and how far they can be compared at all.

Numbers of a run stand in a column of their own. A difference is shown only where the same questions were answered and
scored alike in both runs; what does not match is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palimpsest.files import UserError
from palimpsest.report import summary
from palimpsest.report.inputs import Inputs, read_inputs, task_name
from palimpsest.report.page import render_page, write_page
from palimpsest.report.side_by_side_tables import Run, tables_of


def write_comparison(runs: Sequence[Path], paired: Mapping[str, Any], out: Path) -> Path:
    """Write the page that shows `runs` side by side to `out` and return its path.

    paired: what `palimpsest.pairing.pair_runs` returns: `metric`, `accuracy`, `perplexity`, `not_compared`.

    Raises:
        UserError: a run is not a folder, or is given twice; `out` is a folder.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("The same run is given twice; give each run once.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file for the page with --out.")
    names = [run.resolve().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]
    write_page(
        out, render([Run(label, read_inputs(run)) for label, run in zip(labels, runs, strict=True)], paired, out)
    )
    return out


def render(runs: Sequence[Run], paired: Mapping[str, Any], out: Path) -> str:
    """The page as text."""
    metric = paired["metric"]
    every = tables_of(runs, paired)
    return render_page(
        "comparison.html.j2",
        name=" · ".join(run.label for run in runs),
        runs=runs,
        paths=[run.inputs.path for run in runs],
        out=out,
        questions=_summaries(runs),
        scales=[(run.label, summary.scale(run.inputs)) for run in runs],
        not_compared=[*_unlike(runs, metric), *paired["not_compared"]],
        missing=[(run.label, run.inputs.missing) for run in runs if run.inputs.missing],
        tables={table.name: table for table in every if table.rows},
        metric=metric,
    )


# ----------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------
def _summaries(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, tuple[summary.Finding, ...]]]]]:
    """Each question of the summary with every run's findings."""
    of = [(run.label, summary.points_of(run.inputs)) for run in runs]
    questions = [point.question for point in of[0][1]]
    return [(question, [(label, found[i].findings) for label, found in of]) for i, question in enumerate(questions)]


def _unlike(runs: Sequence[Run], metric: str) -> Iterator[str]:
    """What stands side by side here and is not the same measurement, a sentence each, from the runs' own records."""
    for table, by in (("tasks", _tasks), ("scoring rules", _versions), ("language models", _models)):
        values = [(run.label, by(run.inputs, metric)) for run in runs]
        if len({value for _, value in values}) > 1:
            yield f"The runs have different {table}: " + "; ".join(f"{label}: {value}" for label, value in values) + "."


def _tasks(inputs: Inputs, metric: str) -> str:
    return ", ".join(sorted({f"{task_name(r['task'])} (n {r['n']})" for r in inputs.results["qa"]})) or "none"


def _versions(inputs: Inputs, metric: str) -> str:
    found = sorted({row["metric_version"] for row in inputs.results["qa"] if row["metric"] == metric})
    return f"{metric} version {', '.join(found)}" if found else f"no {metric}"


def _models(inputs: Inputs, metric: str) -> str:
    return summary.model_name(inputs) or "not named"
