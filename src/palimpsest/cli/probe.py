"""The retention probe of one model: probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app


@app.command()
def probe(
    model: Annotated[str, typer.Option(help="Causal LM, speech LLM or audio LLM: embedded: name, folder, hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for records.json and pairs.jsonl.")],
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    """Does a model find right continuations more likely than wrong ones? Seconds, no generation; chance is 50 %.

    Example: palimpsest probe --model embedded:smollm2-135m-instruct --out runs/probe
    """
    from palimpsest.evaluate import probe_model

    for line in probe_model(model, out, batch_size=batch_size):
        typer.echo(line)
