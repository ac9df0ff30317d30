"""Codecs of transformers as tokenizers of speech: the ids of one of their codebooks (tokens.Codes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from palimpsest.files import UserError
from palimpsest.models.loading import load_any
from palimpsest.models.token_settings import Tokens

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from torch import Tensor


def codec_rate(config: Any) -> float:
    """Frames, and so tokens, a second."""
    rate = getattr(config, "frame_rate", None)
    return float(rate) if rate else config.sampling_rate / config.hop_length


@torch.no_grad()
def codec_ids(
    codec: Any, feature_extractor: Any, wave: Float[np.ndarray, " samples"], rate: int, codebook: int
) -> list[int]:
    """What a codec of transformers makes of a recording: the ids of one of its codebooks.

    wave: mono, `rate` samples a second. One recording at a time, so that others play no part.
    """
    import soxr

    wanted = codec.config.sampling_rate
    samples = soxr.resample(wave, rate, wanted) if wanted != rate else wave
    inputs = feature_extractor(raw_audio=samples, sampling_rate=wanted, return_tensors="pt")
    codes: Tensor = codec.encode(inputs["input_values"].to(codec.device)).audio_codes
    if codes.ndim == 4:  # EnCodec: (chunk, batch, codebook, frame)
        codes = codes.permute(1, 2, 0, 3).flatten(2)
    found: list[int] = codes[0, codebook].tolist()
    return found


def load_codec(name: str, options: Tokens, device: str = "cpu") -> tuple[Any, Any]:
    """(codec in eval mode, its feature extractor). Raises UserError for what is none, and for another k or codebook."""
    codec, extractor = load_any(name, device)
    sizes = [getattr(codec.config, key, None) for key in ("codebook_size", "sampling_rate")]
    if not hasattr(codec, "encode") or None in sizes:
        raise UserError(f"speech.tokens.codec: {name} is a {type(codec).__name__} and no codec of transformers.")
    if sizes[0] != options.k:
        raise UserError(f"speech.tokens.k is {options.k} and the codebooks of {name} have {sizes[0]}; set it to that.")
    n_codebooks = next(
        (it for key in ("num_quantizers", "n_codebooks") if (it := getattr(codec.config, key, None)) is not None), 1
    )
    if options.codebook >= n_codebooks:
        raise UserError(f"speech.tokens.codebook is {options.codebook} and {name} has {n_codebooks}, from 0.")
    return codec, extractor
