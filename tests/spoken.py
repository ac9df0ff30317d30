"""A few spoken examples for the tiny SpeechLM: noise of different lengths, encoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from tiny import tiny_speech_lm


def spoken(folder: Path, n: int = 8) -> tuple[list[Example], Collator]:
    """`n` examples of 0.5 s and more, and the collator that puts them as speech."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(n):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, 8_000 + 1_600 * i), 16_000)
        examples.append(Example(f"e{i}", f"Question {i}?", (f"A{i}",), f"Answer A{i}.", folder / f"{i}.wav"))
    model, processor = tiny_speech_lm()
    compute_features(model.encoder, processor, examples, folder / "features")
    return examples, Collator(processor, "speech", Features(folder / "features"))
