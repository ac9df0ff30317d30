"""A run directory in the browser: ui."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app


@app.command()
def ui(
    run: Annotated[Path, typer.Argument(help="Run directory of a study.")],
    port: Annotated[
        int | None, typer.Option(min=1024, max=65535, help="Of 127.0.0.1; default: the first free one from 7860.")
    ] = None,
) -> None:
    """Ask every model of a run the same question, by microphone, file or text, and look into its importance.

    Binds to this machine alone. Needs the extra: pip install 'palimpsest-llm[ui]'.

    Example: palimpsest ui runs/demo
    """
    from palimpsest.ui.server import serve

    serve(run, port, tell=typer.echo)
