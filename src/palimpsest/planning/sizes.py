"""Sizes of models from their configs, without weights, and of GPUs as their vendor publishes them.

The configs of a few models that are large, or that a hub hands out only with an account, are built in. A GPU's memory
is nominal, in 10⁹ bytes: the few per cent that the driver shows above it are left to fragmentation. Arithmetic is
dense, not sparse; float32 is without tensor cores, PyTorch's default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palimpsest.files import UserError, read_json
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loading import encoder_config, text_source
from palimpsest.planning.memory import Decoder, Encoder


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    bf16: float  # FLOP/s, dense, float32 accumulation
    float32: float  # FLOP/s
    bandwidth: float  # bytes/s


GPUS = {
    name: Gpu(name, gigabytes * 10**9, bf16 * 1e12, float32 * 1e12, bandwidth * 1e12)
    for name, gigabytes, bf16, float32, bandwidth in (  # GB, TFLOP/s, TFLOP/s, TB/s
        ("H200", 141, 989, 67, 4.8),
        ("H100", 80, 989, 67, 3.35),
        ("H100-PCIe", 80, 756, 51, 2.0),
        ("A100-80GB", 80, 312, 19.5, 2.039),
        ("A100-40GB", 40, 312, 19.5, 1.555),
        ("L40S", 48, 362, 91.6, 0.864),
        ("L4", 24, 121, 30.3, 0.3),
        ("A10", 24, 125, 31.2, 0.6),
        ("RTX-4090", 24, 165, 82.6, 1.008),
        ("RTX-3090", 24, 71, 35.6, 0.936),
    )
}


def find_gpu(name: str) -> Gpu:
    """By name, in any case. Raises UserError for a name that is not in the table."""
    found = next((gpu for key, gpu in GPUS.items() if key.lower() == name.lower()), None)
    if found is None:
        raise UserError(
            f"There is no GPU {name!r} in the table; it has {', '.join(GPUS)}. --memory GB takes any other."
        )
    return found


_DECODER_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    name: {"model_type": "llama", **dict(zip(_DECODER_KEYS, sizes, strict=True))}
    for name, sizes in {
        "llama-3.2-1b": (128_256, 2048, 8192, 16, 32, 8, 64, True, 131_072),
        "llama-3.1-8b": (128_256, 4096, 14_336, 32, 32, 8, 128, False, 131_072),
        "smollm2-135m": (49_152, 576, 1536, 30, 9, 3, 64, True, 2048),
    }.items()
}
ASSUMED_CODEC = 50.0  # tokens a second, more than most: Mimi has 12.5, EnCodec and DAC 50 to 87
_ENCODER_KEYS = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins")
ENCODERS: dict[str, dict[str, Any]] = {
    "whisper-large-v3": dict(zip(_ENCODER_KEYS, (1280, 32, 20, 5120, 128), strict=True)),
    "whisper-tiny.en": dict(zip(_ENCODER_KEYS, (384, 4, 6, 1536, 80), strict=True)),
}


def decoder_sizes(name: str, shape: str | None = None, config_file: Path | None = None) -> tuple[Decoder, str]:
    """Sizes of the causal language model `name`, and where they are from; `shape` or `config_file` in its place.

    Raises UserError for a shape that is not built in, a file that is no config, and a model whose config cannot be had.
    """
    model, origin = blank_decoder(name, shape, config_file)
    return decoder_of(model), origin


def blank_decoder(name: str, shape: str | None = None, config_file: Path | None = None) -> tuple[Any, str]:
    """The model that `decoder_sizes` takes the sizes of, on the meta device, and where its config is from."""
    from transformers import AutoModelForCausalLM

    config, origin = _decoder_config(name, shape, config_file)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), origin


def decoder_of(model: Any) -> Decoder:
    """Sizes of a causal language model, which may be on the meta device. One without attention counts one head."""
    matrices = list(scored_parameters(model).values())
    config = model.config.get_text_config(decoder=True)
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None) or 1
    return Decoder(
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrices=sum(matrix.numel() for matrix in matrices),
        lora_sides=sum(sum(matrix.shape) for matrix in matrices if matrix.ndim == 2),
    )


def encoder_sizes(name: str | None) -> tuple[Encoder, str]:
    """Sizes of the Whisper encoder `name`, and where they are from; None is no encoder.

    Raises UserError where there is no config.
    """
    if name is None:
        return Encoder(0, 0, 0), "none"
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    key = _last_part(name)
    config = WhisperConfig(**ENCODERS[key]) if key in ENCODERS else _had(encoder_config, name)
    with torch.device("meta"):
        encoder = WhisperEncoder(config)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    origin = "built-in config" if key in ENCODERS else "its config"
    return Encoder(parameters, config.d_model, config.encoder_layers), origin


def codec_tokens(name: str) -> tuple[float, str]:
    """Tokens a second of a codec's codebook, and where that is from: its config, or an assumption that says so."""
    from transformers import AutoConfig

    from palimpsest.models.codecs import codec_rate

    try:
        return codec_rate(AutoConfig.from_pretrained(name)), "its config"
    except (OSError, ValueError, AttributeError):
        return ASSUMED_CODEC, "assumed: its config cannot be had"


def _decoder_config(name: str, shape: str | None, config_file: Path | None) -> tuple[Any, str]:
    from transformers import AutoConfig

    if shape is not None and config_file is not None:
        raise UserError("Both --shape and --config are given; one of them says what the language model is.")
    if shape is not None and shape not in DECODERS:
        raise UserError(f"There is no built-in shape {shape!r}; use one of {', '.join(DECODERS)}, or --config FILE.")
    if config_file is not None:
        values = read_json(config_file / "config.json" if config_file.is_dir() else config_file)
        if not isinstance(values, dict) or "model_type" not in values:
            raise UserError(f"{config_file} is no config of a Hugging Face model: it has no model_type.")
        return AutoConfig.for_model(**values), str(config_file)
    known = shape or next((key for key in DECODERS if _last_part(name) in (key, f"{key}-instruct")), None)
    if known is not None:
        return AutoConfig.for_model(**DECODERS[known]), f"built-in shape {known}"
    return _load(name), "its config"


def _last_part(name: str) -> str:
    """`openai/whisper-large-v3` and `embedded:whisper-tiny.en` by what comes last; a local folder by its own config."""
    return "" if Path(name).is_dir() else name.replace(":", "/").rpartition("/")[2].lower()


def _load(name: str) -> Any:
    from transformers import AutoConfig

    return _had(lambda it: AutoConfig.from_pretrained(text_source(it)), name)


def _had(read: Callable[[str], Any], name: str) -> Any:
    try:
        return read(name)
    except (OSError, ValueError, UserError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"The config of {name} cannot be had ({reason}); "
            f"give --config FILE, or --shape with one of {', '.join(DECODERS)}."
        ) from error
