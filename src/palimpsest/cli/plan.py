"""Before anything runs: plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the study; see recipes/.")],
    gpu: Annotated[str | None, typer.Option(help="H200, H100, A100-80GB, …; without it this machine.")] = None,
    n_gpus: Annotated[int, typer.Option(min=1, help="Sharded over so many (FSDP2).")] = 1,
    memory: Annotated[float | None, typer.Option(help="GB of one device, instead of the GPU's own.")] = None,
    shape: Annotated[str | None, typer.Option(help="Built-in language model: llama-3.2-1b, llama-3.1-8b, …")] = None,
    config: Annotated[Path | None, typer.Option(help="config.json in place of the language model's.")] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the GPU's FLOP/s reached.")] = 0.4,
    examples: Annotated[int | None, typer.Option(min=1, help="Of training data that is not here.")] = None,
    question_seconds: Annotated[float, typer.Option(min=0.1, max=30, help="Likewise: mean length of speech.")] = 6.0,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Likewise: mean length of answers.")] = 100,
    longest_answer: Annotated[int, typer.Option(min=1, help="Likewise: the longest.")] = 400,
) -> None:
    """What a recipe needs before it runs: memory, disk and time of each method; exit code 2 if one does not fit.

    Example: palimpsest plan recipes/paper-1b.yaml --gpu H100
    """
    from palimpsest.planning.plan import Options
    from palimpsest.planning.plan_text import plan_recipe

    options = Options(
        gpu=gpu,
        n_gpus=n_gpus,
        memory=memory,
        shape=shape,
        config=config,
        utilisation=utilisation,
        examples=examples,
        question_seconds=question_seconds,
        answer_tokens=answer_tokens,
        longest_answer=longest_answer,
    )
    for line in plan_recipe(recipe, options):
        typer.echo(line)
