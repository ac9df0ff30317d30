"""The options of speech tokens (tokens.py); no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

# What a model is given of its speech: the encoder's frames; ids; or frames that were replaced by their centroids, which
# an adaptor of the usual kind reads: what is lost by that is lost by quantising alone.
SpeechInput = Literal["frames", "tokens", "centroids"]


@dataclass(frozen=True)
class Tokens:
    """How a study makes tokens of speech."""

    kind: Literal["kmeans"] = "kmeans"
    k: Annotated[int, Ge(2)] = 1000
    pool: Annotated[int, Ge(1)] = 2  # encoder frames of a token, averaged: 2 are 25 tokens a second
    collapse: bool = True  # of equal tokens in a row the language model sees one
    # Of the new rows: drawn with the mean and spread of the embedding; or the mean of what the adaptor of
    # models.adaptor makes of the frames of each token.
    start: Literal["embedding", "adaptor"] = "embedding"
    fit_on: Annotated[int, Ge(2)] = 200_000  # pooled frames of the training data, a random part if there are more
