"""palimpsest data prepare: any source as a folder of manifest and audio that every command takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge
from typing_extensions import Doc


@dataclass(frozen=True)
class Options:
    """Filter a source, have it spoken where needed, and write a manifest folder that every command takes.

    Example: palimpsest data prepare alpaca:alpaca.json --split train --limit 1000 --out prepared/alpaca
    """

    source: Annotated[
        str, typer.Argument(), Doc("A hub name, PREFIX:PATH, a manifest, table or folder; docs/data.md lists them.")
    ]
    out: Annotated[Path, Doc("Folder for manifest and audio; started again, it continues there.")]
    split: Annotated[str, Doc("Split of the source; a single file is one split of any name.")] = "train"
    limit: Annotated[int | None, Ge(1), Doc("The first so many examples that pass the filters.")] = None
    strict: Annotated[bool, Doc("A faulty row is an error instead of being dropped.")] = False
    voice: Annotated[str, Doc("Speaks what has no recording; none leaves it as text.")] = "hibari"
    workers: Annotated[int, Ge(1), Doc("Processes that speak.")] = 2
    filters: Annotated[
        list[str],
        typer.Option("--filter"),
        Doc("KEY=VALUE of a filter, e.g. max_answer_words=300; repeatable."),
    ] = field(default_factory=list)


def run(options: Options) -> Iterator[str]:
    from palimpsest.data.filters import parse_filters
    from palimpsest.data.prepare import prepare_data

    yield from prepare_data(
        options.source,
        options.out,
        split=options.split,
        limit=options.limit,
        strict=options.strict,
        voice=options.voice,
        workers=options.workers,
        filters=parse_filters(options.filters),
    )
