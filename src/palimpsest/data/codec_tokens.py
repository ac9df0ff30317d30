"""The tokens that a codec made of recordings, kept in place of encoder frames: a file of JSON lines, {"id", "ids"}."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError, read_jsonl, write_jsonl
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.codecs import codec_ids
from palimpsest.models.tokens import as_frames

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class CodecTokens:
    """Tokens by example id, as a collator and the alignment take frames: two numbers a token (models.tokens.Codes)."""

    in_loop: ClassVar[bool] = False

    def __init__(self, file: Path) -> None:
        self._ids = {row["id"]: np.array(row["ids"], dtype=np.int32) for row in read_jsonl(file)}

    def count(self, example_id: str) -> int:
        """Tokens of an example. Raises UserError for one without."""
        return len(self._of(example_id))

    def __getitem__(self, example_id: str) -> Float[Tensor, "time 2"]:
        return as_frames(self._of(example_id).tolist())

    def batch(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_frames` (speech, time, 2), zero past `frame_counts` (speech,)."""
        items = [self[example_id] for example_id in ids]
        counts = torch.tensor([len(item) for item in items])
        return {"encoder_frames": pad_sequence(items, batch_first=True), "frame_counts": counts}

    def _of(self, example_id: str) -> np.ndarray[Any, np.dtype[np.int32]]:
        if example_id not in self._ids:
            raise UserError(
                f"There are no speech tokens for the example {example_id!r}; it has no audio in this study's data."
            )
        return self._ids[example_id]


def write_codec_tokens(
    file: Path,
    examples: Sequence[Example],
    codec: Any,
    feature_extractor: Any,
    codebook: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Of every example without a fault; progress(recordings done). Raises UserError for one without audio."""
    rows = []
    for example in examples:
        if example.fault is not None:
            continue
        if example.audio is None:
            raise UserError(f"The example {example.id!r} has no audio to make tokens of; speak the data first.")
        wave = read_audio(example.audio)
        rows.append({"id": example.id, "ids": codec_ids(codec, feature_extractor, wave, SAMPLE_RATE, codebook)})
        if progress is not None:
            progress(len(rows))
    write_jsonl(file, rows)
