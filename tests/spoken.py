"""A few spoken examples for the tiny SpeechLM: noise of different lengths, encoded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.models.token_settings import Tokens
from palimpsest.models.tokens import SpeechTokenizer, fit_tokens
from tiny import tiny_encoder, tiny_llama, tiny_speech_lm


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


def spoken_tokens(folder: Path, k: int = 6) -> tuple[list[Example], Collator, SpeechTokenizer]:
    """The same examples, a collator whose positions are tokens of 2 frames, and their tokenizer of `k` centroids.

    The last centroid is far from everything: that token is never said.
    """
    examples, collator = spoken(folder)
    assert isinstance(collator.features, Features)
    fitted = fit_tokens([example.id for example in examples], collator.features, Tokens(k=k - 1), 0)
    far = torch.full_like(fitted.tensors["centroids"][:1], 1024.0)
    tokenizer = replace(fitted, tensors={**fitted.tensors, "centroids": torch.cat([fitted.tensors["centroids"], far])})
    old = collator.processor
    processor = SpeechLMProcessor(old.tokenizer, old.feature_extractor, tokenizer.pool, rounded_to=old.stack_factor)
    return examples, replace(collator, processor=processor), tokenizer


def token_speech_lm(tokenizer: SpeechTokenizer, **changes: Any) -> SpeechLM:
    """The tiny language model behind rows of these tokens."""
    how: dict[str, Any] = {"reads": "tokens", "adaptor_hidden_size": 24, **changes}
    return SpeechLM.from_parts(tiny_encoder(), tiny_llama(eos_token_id=3), tokenizer=tokenizer, **how).eval()
