"""palimpsest data prepare: any source as a folder of manifest and audio that every command takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

from palimpsest.commands.inspect import Filters, Source, Split, Strict, arguments
from palimpsest.files import locked


@dataclass(frozen=True)
class Options:
    """Filter a source, have it spoken where needed, and write a manifest folder that every command takes.

    Example: palimpsest data prepare alpaca:alpaca.json --split train --limit 1000 --out prepared/alpaca
    """

    source: Source
    out: Annotated[Path, Doc("Folder for manifest and audio; started again, it continues there.")]
    split: Split = "train"
    limit: Annotated[int | None, Ge(1), Doc("The first so many examples that pass the filters.")] = None
    strict: Strict = False
    voice: Annotated[str, Doc("Speaks what has no recording; none leaves it as text.")] = "hibari"
    workers: Annotated[int | None, Ge(1), Doc("Cores that store and speak; all if left out.")] = None
    filters: Filters = field(default_factory=list)


def run(options: Options) -> Iterator[str]:
    with locked(options.out):
        yield from _run(options)


def _run(options: Options) -> Iterator[str]:
    from palimpsest.data.prepare import prepare_data

    yield from prepare_data(**arguments(options))
