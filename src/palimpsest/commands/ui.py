"""palimpsest ui: a run directory in the browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge, Le
from typing_extensions import Doc


@dataclass(frozen=True)
class Options:
    """Ask every model of a run the same question, by microphone, file or text, and look into its importance.

    Binds to this machine alone. Needs the extra: pip install 'palimpsest-llm[ui]'.

    Example: palimpsest ui runs/demo
    """

    run: Annotated[Path, typer.Argument(), Doc("Run directory of a study.")]
    port: Annotated[int | None, Ge(1024), Le(65535), Doc("Of 127.0.0.1; default: the first free one from 7860.")] = None


def run(options: Options) -> Iterator[str]:
    from palimpsest.ui.server import serve

    yield from serve(options.run, options.port)
