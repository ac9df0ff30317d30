"""palimpsest compare: two or more evaluated models on the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.files import write_json, write_text


@dataclass(frozen=True)
class Options:
    """Paired comparison on the same questions: difference, interval, McNemar, Holm, retention, modality gap, loss.

    Example: palimpsest compare runs/eval-a runs/eval-b --out runs/compare
    """

    runs: Annotated[list[Path], typer.Argument(), Doc("Run directories of studies, or --out folders of evaluate.")]
    out: Annotated[Path, Doc("Folder for compare.json and compare.md.")] = Path("runs/compare")
    methods: Annotated[str | None, Doc("Only these methods of the studies, comma-separated, every pair of them.")] = (
        None
    )
    metric: Annotated[str, Doc("Scoring rule, or llm_judge.")] = "token_sequence_numbers"
    base: Annotated[str | None, Doc("What retention refers to; default: the method base of each study.")] = None
    seeds: Annotated[bool, Doc("The runs are one study with several seeds: compare methods over them.")] = False
    seed: Annotated[int, Ge(0), Doc("Of the bootstrap.")] = 0


def run(options: Options) -> Iterator[str]:
    """Writes compare.json and compare.md and yields the latter's lines."""
    from palimpsest.comparison.pairs import compare_runs
    from palimpsest.report.comparison_text import markdown

    tables = compare_runs(
        options.runs,
        metric=options.metric,
        methods=options.methods.split(",") if options.methods else None,
        base=options.base,
        seeds=options.seeds,
        seed=options.seed,
    )
    write_json(options.out / "compare.json", tables)
    page = markdown(tables)
    write_text(options.out / "compare.md", page)
    yield from page.rstrip().split("\n")
