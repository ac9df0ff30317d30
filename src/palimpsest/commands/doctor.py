"""palimpsest doctor: what is on this machine, and what would run on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from typing_extensions import Doc


@dataclass(frozen=True)
class Options:
    """Report versions, device, arithmetic, disk, caches, voices and weights, and whether the demo and a 1B study fit.

    It changes nothing, fetches nothing and always ends with exit code 0: what cannot be found out says so in its line.

    Example: palimpsest doctor --json
    """

    as_json: Annotated[bool, typer.Option("--json"), Doc("One JSON array, a record for each line.")] = False


def run(options: Options) -> Iterator[str]:
    from palimpsest.planning.machine import findings

    if options.as_json:
        yield json.dumps([asdict(finding) for finding in findings()], indent=1, ensure_ascii=False)
        return
    part = None
    for finding in findings():  # each line as soon as it is known: torch alone takes a second or two
        if finding.part != part:
            part = finding.part
            yield part
        yield f"  {finding.name:<22} {finding.text}"
