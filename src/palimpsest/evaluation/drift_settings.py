"""The options of drift and general text, without what measuring them needs: a command line is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from typing_extensions import Doc

WindowOption = Annotated[int, Ge(2), Doc("Most tokens seen together; a longer text is cut, nothing is left out.")]


@dataclass(frozen=True)
class Sampling:
    """How much a base model writes, on which the drift of others is measured."""

    n_texts: Annotated[int, Ge(2), Doc("Texts of each kind, plain and chat, that the base writes.")] = 100
    new_tokens: Annotated[int, Ge(2), Doc("Most tokens of such a text.")] = 64
