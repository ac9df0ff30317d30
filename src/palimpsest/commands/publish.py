"""palimpsest publish: runs as a folder that can be passed on, and where a token is there, on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import Doc

from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.export.publish import Kind


@dataclass(frozen=True)
class Options:
    """Pages and records of runs as a folder without weights or paths of the machine; sends nothing by itself.

    Example: palimpsest publish runs/demo --out runs/demo-public --to me/palimpsest-demo --push
    """

    what: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…"),
        Doc("Run directories; or one folder that `palimpsest export` wrote, with --to."),
    ]
    out: Annotated[Path | None, Doc("New folder for the pages and records of the runs.")] = None
    samples: Annotated[bool, Doc("Put questions, answers and recordings into the pages.")] = False
    to: Annotated[str | None, Doc("Place on the hub, USER/NAME: a dataset, or a model for an exported folder.")] = None
    space: Annotated[bool, Doc("A static Space, which shows the pages, instead of a dataset.")] = False
    private: Annotated[bool, Doc("Not open to others; for a place that is not there yet.")] = False
    push: Annotated[bool, Doc("Send it. Without, it is said what would be sent.")] = False


def run(options: Options) -> Iterator[str]:
    from palimpsest.comparison.pairs import pair_runs
    from palimpsest.export import publish

    if options.push and options.to is None:
        raise UserError("--push needs a place; give --to USER/NAME.")
    if options.to is not None:
        publish.require_place(options.to)
    first, kind = options.what[0], _kind(options)
    if kind == "model":
        if len(options.what) > 1 or options.out is not None or options.space:
            raise UserError(f"{first} is the folder of a model, which is sent as it is; give it alone, with --to.")
        if not (first / "README.md").is_file():
            raise UserError(f"{first} has no model card (README.md); write the folder with palimpsest export.")
        folder = first
    elif options.out is None:
        raise UserError("Give a new folder for the pages and records with --out.")
    else:
        folder = publish.publish(options.what, options.out, pair_runs, kind=kind, samples=options.samples)
        yield f"{folder}: open {folder / 'index.html'}"
    yield from publish.listing(folder)
    found = list(publish.leaks(folder))
    for leak in found:
        yield f"  look at {leak.file}: it says {leak.what!r}"
    if not found:
        known, common = publish.names_here()
        names = f", and not {' or '.join(known)}," if known else ""
        yield f"  No path of this machine{names} in the files' names, and in those of them that are text."
        if common:
            yield f"  Not looked for, being too short or too common: {', '.join(common)}."
    if options.to is None:
        return
    if options.push:
        yield f"Sent: {publish.push(folder, options.to, kind, private=options.private)}"
    else:
        yield f"Would go to {options.to} ({kind}); give --push to send it."


def _kind(options: Options) -> Kind:
    first = options.what[0]
    if (first / "config.json").is_file() or (first / "adapter_config.json").is_file():
        return "model"
    return "space" if options.space else "dataset"
