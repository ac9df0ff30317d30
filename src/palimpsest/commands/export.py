"""palimpsest export: a trained model in the form others load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Doc


@dataclass(frozen=True)
class Options:
    """Write a trained model as plain Hugging Face folders, or as a light folder, each with a model card.

    Example: palimpsest export runs/demo --method lora --text-llm lora-text --speech-lm lora-speech
    """

    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT"),
        Doc("Run directory, or the folder of a speech LLM."),
    ]
    method: Annotated[str | None, Doc("Which of the run's methods.")] = None
    text_llm: Annotated[Path | None, Doc("New folder for the language model alone.")] = None
    speech_lm: Annotated[Path | None, Doc("New folder for the whole speech LLM.")] = None
    adapter: Annotated[Path | None, Doc("New folder for the LoRA adapter alone.")] = None
    grown_llm: Annotated[
        Path | None,
        Doc("New folder for the language model with its speech tokens in the vocabulary."),
    ] = None
    light: Annotated[
        Path | None, Doc("New folder for adaptor and LoRA, beside the names of what they were trained on.")
    ] = None
    language_model: Annotated[str | None, Doc("With --light, of a checkpoint outside a run: its language model.")] = (
        None
    )
    encoder: Annotated[str | None, Doc("Likewise its speech encoder.")] = None
    sources: Annotated[
        Path | None, Doc("JSON list of what the training data was made of, with licences, for the cards.")
    ] = None
    evaluations: Annotated[
        list[Path],
        typer.Option("--evaluation"),
        Doc("Folder of `palimpsest evaluate` whose accuracies the cards hold; repeatable."),
    ] = field(default_factory=list)
    notes: Annotated[Path | None, Doc("Markdown on how the model was made, for the cards.")] = None


def run(options: Options) -> Iterator[str]:
    from palimpsest.export.folders import export

    yield from export(**vars(options))
