"""Encoder frames computed once and reused by every method, epoch and measurement.

A folder with `frames.bin`, the frames of all utterances one after the other (float16, memory-mapped when read), and
`index.json`, where each example's frames begin and how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from palimpsest.data.records import Example
from palimpsest.data.speech import read_audio
from palimpsest.models.speech_lm import encode_speech
from palimpsest.rundir import UserError, read_json, require_disk, write_json

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from palimpsest.models.processor import SpeechLMProcessor

DTYPE = np.dtype(np.float16)


class Features:
    """Encoder frames of a set of examples, by example id."""

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / "index.json")
        self.dim: int = index["dim"]
        self._spans: dict[str, tuple[int, int]] = {key: (first, count) for key, first, count in index["spans"]}
        n_frames = sum(count for _, count in self._spans.values())
        file = folder / "frames.bin"
        if not file.exists() or file.stat().st_size != n_frames * self.dim * DTYPE.itemsize:
            raise UserError(f"{file} is missing or cut short; delete its folder and run the study again.")
        self._frames = np.memmap(file, DTYPE, mode="r", shape=(n_frames, self.dim))

    def __contains__(self, example_id: str) -> bool:
        return example_id in self._spans

    def count(self, example_id: str) -> int:
        """Encoder frames of one example, without reading them."""
        return self._span(example_id)[1]

    def _span(self, example_id: str) -> tuple[int, int]:
        if example_id not in self._spans:
            raise UserError(
                f"There are no speech features for the example {example_id!r}; it has no audio in this study's data."
            )
        return self._spans[example_id]

    def __getitem__(self, example_id: str) -> Float[Tensor, "time d_enc"]:
        """float32 frames of one example. Raises UserError for an id whose speech was never encoded."""
        first, count = self._span(example_id)
        return torch.from_numpy(np.asarray(self._frames[first : first + count], np.float32))


def compute_features(
    encoder: WhisperEncoder,
    processor: SpeechLMProcessor,
    examples: Sequence[Example],
    folder: Path,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode the audio of every example into `folder` (see `Features`).

    Raises UserError before any encoding when an example has no audio or the disk has no room.
    """
    import soundfile

    for example in examples:
        if example.audio is None:
            raise UserError(f"The example {example.id!r} has no audio to encode; speak the data first.")
    sampled = [soundfile.info(str(example.audio)).duration for example in examples]
    dim = encoder.config.d_model
    n_frames = sum(processor.n_frames(int(seconds * 16_000) + 1) for seconds in sampled)
    require_disk(folder, n_frames * dim * DTYPE.itemsize, f"Caching the speech features of {len(examples)} examples")
    folder.mkdir(parents=True, exist_ok=True)

    # Similar lengths together waste no padding; the file keeps the examples' own order.
    order = sorted(range(len(examples)), key=lambda i: sampled[i])
    frames: dict[int, Any] = {}
    device = encoder.conv1.weight.device
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        mels, counts = processor.features([read_audio(_audio(examples[i])) for i in rows])
        encoded = encode_speech(encoder, mels.to(device), counts, processor.speech_length)
        for row, i in enumerate(rows):
            frames[i] = encoded[row, : int(counts[row])].to(torch.float16).cpu().numpy()
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))

    spans: list[tuple[str, int, int]] = []
    first = 0
    with (folder / "frames.bin").open("wb") as file:
        for i, example in enumerate(examples):
            file.write(frames[i].tobytes())
            spans.append((example.id, first, len(frames[i])))
            first += len(frames[i])
    write_json(folder / "index.json", {"dim": dim, "dtype": DTYPE.name, "spans": spans})


def _audio(example: Example) -> Path:
    assert example.audio is not None  # checked before the long work
    return example.audio
