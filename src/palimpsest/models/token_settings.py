"""The options of speech tokens (tokens.py); no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

# What a model is given of its speech: the encoder's frames; ids; or frames that were replaced by their centroids, which
# an adaptor of the usual kind reads: what is lost by that is lost by quantising alone.
SpeechInput = Literal["frames", "tokens", "centroids"]
WITHOUT_CODEC = "reads the tokens of a codec, which is no part of it, so it cannot be given recordings"


@dataclass(frozen=True)
class Tokens:
    """How a study makes tokens of speech."""

    kind: Literal["kmeans", "codec"] = "kmeans"
    k: Annotated[int, Ge(2)] = 1000  # centroids; of a codec the size of its codebook
    pool: Annotated[int, Ge(1)] = 2  # encoder frames of a token, averaged: 2 are 25 tokens a second
    collapse: bool = True  # of equal tokens in a row the language model sees one
    # Of the new rows: drawn with the mean and spread of the embedding; or the mean of what the adaptor of
    # models.adaptor makes of the frames of each token.
    start: Literal["embedding", "adaptor"] = "embedding"
    fit_on: Annotated[int, Ge(2)] = 200_000  # pooled frames of the training data, a random part if there are more
    codec: str | None = None  # kind codec: a folder or hub name of a codec of transformers (Mimi, EnCodec, DAC …)
    codebook: Annotated[int, Ge(0)] = 0  # kind codec: which of its codebooks; of Mimi the first is the semantic one

    def __post_init__(self) -> None:
        if (self.kind == "codec") != (self.codec is not None):
            raise ValueError("kind codec needs a codec (a folder or hub name), and no other kind has one")
        if self.kind == "codec" and self.start == "adaptor":
            raise ValueError("start: adaptor needs the encoder's frames, which kind codec does not read; use embedding")

    @property
    def frames(self) -> int:
        """Of a token: encoder frames, or those of the codec."""
        return self.pool if self.kind == "kmeans" else 1
