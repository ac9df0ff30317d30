"""Two or more evaluated models on the same questions: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories of studies, or --out folders of evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.md.")] = Path("runs/compare"),
    methods: Annotated[
        str | None, typer.Option(help="Only these methods of the studies, comma-separated, every pair of them.")
    ] = None,
    metric: Annotated[str, typer.Option(help="Scoring rule, or llm_judge.")] = "token_sequence_numbers",
    base: Annotated[
        str | None, typer.Option(help="What retention refers to; default: the method base of each study.")
    ] = None,
    seeds: Annotated[
        bool, typer.Option("--seeds", help="The runs are one study with several seeds: compare methods over them.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Paired comparison on the same questions: difference, interval, McNemar, Holm, retention, modality gap, loss.

    Example: palimpsest compare runs/eval-a runs/eval-b --out runs/compare
    """
    from palimpsest.comparison.pairs import compare_runs

    for line in compare_runs(
        runs,
        out,
        metric=metric,
        methods=methods.split(",") if methods else None,
        base=base,
        seeds=seeds,
        seed=seed,
    ):
        typer.echo(line)
