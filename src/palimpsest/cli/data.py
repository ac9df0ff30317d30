"""Getting data in: data prepare, data inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app

data = typer.Typer(help="Get data in: prepare, inspect.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

SourceArgument = Annotated[
    str, typer.Argument(help="A hub name, PREFIX:PATH, a manifest, table or folder; docs/data.md lists them.")
]
SplitOption = Annotated[str, typer.Option(help="Split of the source; a single file is one split of any name.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="A faulty row is an error instead of being dropped.")]
FilterOption = Annotated[
    list[str], typer.Option("--filter", help="KEY=VALUE of a filter, e.g. max_answer_words=300; repeatable.")
]


@data.command()
def prepare(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="Folder for manifest and audio; started again, it continues there.")],
    split: SplitOption = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many examples that pass the filters.")] = None,
    strict: StrictOption = False,
    voice: Annotated[str, typer.Option(help="Speaks what has no recording; none leaves it as text.")] = "hibari",
    workers: Annotated[int, typer.Option(min=1, help="Processes that speak.")] = 2,
    filters: FilterOption = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Filter a source, have it spoken where needed, and write a manifest folder that every command takes.

    Example: palimpsest data prepare alpaca:alpaca.json --split train --limit 1000 --out prepared/alpaca
    """
    from palimpsest.data.filters import parse_filters
    from palimpsest.data.prepare import prepare_data

    lines = prepare_data(
        source,
        out,
        split=split,
        limit=limit,
        strict=strict,
        voice=voice,
        workers=workers,
        filters=parse_filters(filters),
    )
    for line in lines:
        typer.echo(line)


@data.command()
def inspect(
    source: SourceArgument,
    split: SplitOption = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    strict: StrictOption = False,
    filters: FilterOption = [],  # noqa: B006
) -> None:
    """Say what a source holds: counts, hours, lengths, voices, kinds, and what the filters drop and why.

    Example: palimpsest data inspect facts --split heldout
    """
    from palimpsest.data.filters import parse_filters
    from palimpsest.data.inspection import inspect_data

    lines = inspect_data(source, split=split, limit=limit, strict=strict, filters=parse_filters(filters))
    for line in lines:
        typer.echo(line)
