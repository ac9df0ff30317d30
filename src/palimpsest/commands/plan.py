"""palimpsest plan: what a recipe needs, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Doc

from palimpsest.planning.plan import Assumptions


@dataclass(frozen=True)
class Options:
    """What a recipe needs before it runs: memory, disk and time of each method; exit code 2 if one does not fit.

    Example: palimpsest plan recipes/paper-1b.yaml --gpu H100
    """

    recipe: Annotated[Path, typer.Argument(), Doc("YAML file of the study; see recipes/.")]
    assumptions: Assumptions = field(default_factory=Assumptions)


def run(options: Options) -> Iterator[str]:
    from palimpsest.planning.plan_text import plan_recipe

    yield from plan_recipe(options.recipe, options.assumptions)
