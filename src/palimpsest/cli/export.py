"""A trained model in the form others load: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palimpsest.cli.app import app


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run directory, or the folder of a speech LLM.")
    ],
    method: Annotated[str | None, typer.Option(help="Which of the run's methods.")] = None,
    text_llm: Annotated[Path | None, typer.Option(help="New folder for the language model alone.")] = None,
    speech_lm: Annotated[Path | None, typer.Option(help="New folder for the whole speech LLM.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="New folder for the LoRA adapter alone.")] = None,
    light: Annotated[
        Path | None,
        typer.Option(help="New folder for adaptor and LoRA, beside the names of what they were trained on."),
    ] = None,
    language_model: Annotated[
        str | None, typer.Option(help="With --light, of a checkpoint outside a run: its language model.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Likewise its speech encoder.")] = None,
    sources: Annotated[
        Path | None, typer.Option(help="JSON list of what the training data was made of, with licences, for the cards.")
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation", help="Folder of `palimpsest evaluate` whose accuracies the cards hold; repeatable."
        ),
    ] = None,
    notes: Annotated[Path | None, typer.Option(help="Markdown on how the model was made, for the cards.")] = None,
) -> None:
    """Write a trained model as plain Hugging Face folders, or as a light folder, each with a model card.

    Example: palimpsest export runs/demo --method lora --text-llm lora-text --speech-lm lora-speech
    """
    from palimpsest.export.folders import export as write

    for line in write(
        source,
        method=method,
        text_llm=text_llm,
        speech_lm=speech_lm,
        adapter=adapter,
        light=light,
        language_model=language_model,
        encoder=encoder,
        sources=sources,
        evaluations=evaluations or [],
        notes=notes,
    ):
        typer.echo(line)
