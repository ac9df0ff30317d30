"""palimpsest data inspect: what is in a source, and what the filters would leave out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import typer
from annotated_types import Ge
from typing_extensions import Doc

# What both data commands take.
Source: TypeAlias = Annotated[
    str, typer.Argument(), Doc("A hub name, PREFIX:PATH, a manifest, table or folder; docs/data.md lists them.")
]
Split: TypeAlias = Annotated[str, Doc("Split of the source; a single file is one split of any name.")]
Strict: TypeAlias = Annotated[bool, Doc("A faulty row is an error instead of being dropped.")]
Filters: TypeAlias = Annotated[
    list[str], typer.Option("--filter"), Doc("KEY=VALUE of a filter, e.g. max_answer_words=300; repeatable.")
]


@dataclass(frozen=True)
class Options:
    """Say what a source holds: counts, hours, lengths, voices, kinds, and what the filters drop and why.

    Example: palimpsest data inspect facts --split heldout
    """

    source: Source
    split: Split = "train"
    limit: Annotated[int | None, Ge(1), Doc("Only the first rows.")] = None
    strict: Strict = False
    filters: Filters = field(default_factory=list)


def run(options: Options) -> Iterator[str]:
    from palimpsest.data.inspection import inspect_data

    yield from inspect_data(**arguments(options))


def arguments(options: Any) -> dict[str, Any]:
    """The fields by name, the filters made of their strings."""
    from palimpsest.data.filters import parse_filters

    return {**vars(options), "filters": parse_filters(options.filters)}
