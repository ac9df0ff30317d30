"""palimpsest data inspect: what is in a source, and what the filters would leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer
from annotated_types import Ge
from typing_extensions import Doc


@dataclass(frozen=True)
class Options:
    """Say what a source holds: counts, hours, lengths, voices, kinds, and what the filters drop and why.

    Example: palimpsest data inspect facts --split heldout
    """

    source: Annotated[
        str, typer.Argument(), Doc("A hub name, PREFIX:PATH, a manifest, table or folder; docs/data.md lists them.")
    ]
    split: Annotated[str, Doc("Split of the source; a single file is one split of any name.")] = "train"
    limit: Annotated[int | None, Ge(1), Doc("Only the first rows.")] = None
    strict: Annotated[bool, Doc("A faulty row is an error instead of being dropped.")] = False
    filters: Annotated[
        list[str],
        typer.Option("--filter"),
        Doc("KEY=VALUE of a filter, e.g. max_answer_words=300; repeatable."),
    ] = field(default_factory=list)


def run(options: Options) -> Iterator[str]:
    from palimpsest.data.filters import parse_filters
    from palimpsest.data.inspection import inspect_data

    yield from inspect_data(
        options.source,
        split=options.split,
        limit=options.limit,
        strict=options.strict,
        filters=parse_filters(options.filters),
    )
