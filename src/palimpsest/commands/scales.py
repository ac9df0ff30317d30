"""palimpsest scales: Eq. 3's learning rates for other trainers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge, Le
from typing_extensions import Doc

from palimpsest.files import UserError, without_folders, write_text


@dataclass(frozen=True)
class Options:
    """Learning rates by layer from importance scores (Eq. 3), in the form that another trainer reads.

    Example: palimpsest scales runs/scores --as python --lr 2e-5 --out layer_rates.py
    """

    scores: Annotated[Path, typer.Argument(), Doc("Folder written by `palimpsest importance`, or base/importance.")]
    trainer: Annotated[str, typer.Option("--as"), Doc("json, automodel, axolotl or python.")] = "json"
    lr: Annotated[float, Doc("Base learning rate, of the least important layer.")] = 2e-5
    lambda_: Annotated[float, typer.Option("--lambda"), Ge(0), Le(1), Doc("λ of Eq. 3.")] = 0.4
    reduction: Annotated[str, Doc("Which of the scores.")] = "signed_sum"
    out: Annotated[Path | None, Doc("File to write; without it the text is printed.")] = None


def run(options: Options) -> Iterator[str]:
    """Yields the text, or the file's name. Raises UserError for a trainer without such a form, before any reading."""
    from palimpsest.importance.scores import Scores
    from palimpsest.training.methods import layer_scales
    from palimpsest.training.other_trainers import require_form, written_for

    require_form(options.trainer)
    if not options.lr > 0:
        raise UserError(f"--lr is {options.lr:g}; give a learning rate above 0.")
    scores = Scores.open(options.scores)
    text = written_for(
        options.trainer,
        layer_scales(scores, options.lambda_, options.reduction),
        scores.names,
        lr=options.lr,
        lambda_=options.lambda_,
        origin=f"{without_folders(str(options.scores))}, {options.reduction}",
    )
    if options.out is None:
        yield text.rstrip("\n")
    else:
        write_text(options.out, text)
        yield str(options.out)
