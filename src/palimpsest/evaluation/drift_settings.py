"""The options of drift and general text, without what measuring them needs: a command line is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

WindowOption = Annotated[int, Ge(2), Doc("Most tokens seen together; a longer text is cut, nothing is left out.")]


@dataclass(frozen=True)
class Sampling:
    """How much a base model writes, on which the drift of others is measured."""

    n_texts: Annotated[int, Ge(2), Doc("Texts of each kind, plain and chat, that the base writes.")] = 100
    new_tokens: Annotated[int, Ge(2), Doc("Most tokens of such a text.")] = 64


@dataclass(frozen=True)
class GeneralText:
    """Text that the user gives; none comes with palimpsest."""

    text: Annotated[
        str | None, Doc("General text: a file of paragraphs, .jsonl or .parquet with a column text, or a hub set.")
    ] = None
    split: Annotated[str, Doc("Split of a folder or hub set.")] = "test"
    limit: Annotated[int | None, Ge(2), Doc("Only the first general texts.")] = None
    window: WindowOption = 512


@dataclass(frozen=True)
class Drift:
    """A recipe's section `drift`."""

    own_text: Sampling = field(default_factory=Sampling)
    general_text: GeneralText = field(default_factory=GeneralText)
    batch_size: Annotated[int, Ge(1)] = 8
    in_training: Annotated[int, Ge(0)] = 8  # texts of each kind on which training.eval_every estimates the drift
