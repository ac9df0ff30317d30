"""Trimmed speech: the real length in whole positions, and nothing of the batch around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import encode_speech
from tiny import tiny_encoder, tiny_tokenizer

ENCODER = tiny_encoder()


def processor(stack_factor: int = 5) -> SpeechLMProcessor:
    return SpeechLMProcessor(tiny_tokenizer(), WhisperFeatureExtractor(feature_size=80), stack_factor, "trim")


def noise(n_samples: int, loudness: float = 0.1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, loudness, n_samples).astype(np.float32)


@given(st.integers(1, 30 * 16_000), st.integers(1, 8))
@settings(deadline=None)
def test_the_length_is_the_audio_rounded_up_to_whole_positions(n_samples: int, stack_factor: int) -> None:
    n_frames = processor(stack_factor).n_frames(n_samples)
    assert n_frames == 1500 or n_frames % stack_factor == 0
    assert n_frames * 320 >= min(n_samples, 1500 * 320)
    assert n_frames == 1500 or n_frames * 320 - n_samples < 320 * stack_factor


@given(
    st.lists(
        st.tuples(st.integers(200, 24_000), st.sampled_from([1e-4, 0.1, 1.0])), min_size=2, max_size=4
    ),
    st.sampled_from(["sdpa", "eager"]),
)  # fmt: skip
@settings(deadline=None, max_examples=15)
def test_an_utterance_is_encoded_the_same_in_every_batch(waves: list[tuple[int, float]], attention: str) -> None:
    """From the samples on: neighbours that are longer, shorter, louder or softer change nothing but the rounding."""
    ENCODER.config._attn_implementation = attention
    audio = [noise(n, loudness, seed) for seed, (n, loudness) in enumerate(waves)]
    mels, counts = processor().features(audio)
    together = encode_speech(ENCODER, mels, counts, "trim")
    for row, wave in enumerate(audio):
        mels, count = processor().features([wave])
        alone = encode_speech(ENCODER, mels, count, "trim")[0]
        assert int(count[0]) == int(counts[row]) == len(alone)
        assert torch.allclose(together[row, : len(alone)], alone, atol=2e-5)
        assert not together[row, len(alone) :].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_stands_in_the_padding_has_no_influence_on_a_single_bit(attention: str) -> None:
    encoder = tiny_encoder()
    encoder.config._attn_implementation = attention
    mels, counts = processor().features([noise(8_000), noise(20_000)])
    expected = encode_speech(encoder, mels, counts, "trim")
    spoilt = mels.clone()
    spoilt[0, :, 2 * int(counts[0]) :] = 1e3 * torch.randn_like(spoilt[0, :, 2 * int(counts[0]) :])
    assert torch.equal(encode_speech(encoder, spoilt, counts, "trim"), expected)
