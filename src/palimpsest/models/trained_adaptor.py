"""The adaptor of a trained speech LLM, for a study that starts from it (`models.adaptor`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.files import UserError, hash_value, read_json
from palimpsest.models import light
from palimpsest.models.loading import (
    blended_from,
    embedding_width,
    is_speech_lm,
    load_encoder,
    require_finite,
    resolve,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TrainedAdaptor:
    """An adaptor's weights and calibration, and what it was trained behind. Widths count numbers."""

    source: str
    tensors: dict[str, Tensor]  # by name in SpeechAdaptor, float32
    stack_factor: int
    speech_length: Literal["trim", "pad_to_30s"]
    encoder: str  # content_hash of the encoder

    @property
    def hidden(self) -> int:
        return len(self.tensors["linear1.bias"])

    @property
    def output(self) -> int:
        return len(self.tensors["linear2.bias"])

    @property
    def fingerprint(self) -> str:
        """Of the weights to the last bit, with what decides how they are used."""
        values = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in self.tensors.items()}
        return hash_value([values, self.stack_factor, self.speech_length])


def read_adaptor(source: str) -> TrainedAdaptor:
    """From a SpeechLM's folder, full or light, or an `embedded:` name. Raises UserError for anything else."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    where = resolve(source)
    folder = Path(where)
    if not is_speech_lm(where):
        raise UserError(
            f"models.adaptor: {source} is no speech LLM; give a methods/NAME/checkpoint folder of a run, a folder that "
            "`palimpsest export --light` wrote, or an embedded: name."
        )
    if (source_of := blended_from(where)) is not None:
        return read_adaptor(source_of)
    if light.is_light(folder):
        settings = light.read_light(folder)
        require_frames(source, settings.tokens)
        tensors = {name: tensor.float() for name, tensor in load_file(folder / light.ADAPTOR).items()}
        require_finite(tensors.items(), source)
        return TrainedAdaptor(source, tensors, settings.stack_factor, settings.speech_length, settings.encoder.content)
    require_frames(source, read_json(folder / "config.json").get("tokens"))
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file: Any
        with safe_open(path, framework="pt") as file:
            stored |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(("adaptor.", "encoder."))}  # noqa: SIM118
    adaptor, behind = (
        {key.removeprefix(part): tensor for key, tensor in stored.items() if key.startswith(part)}
        for part in ("adaptor.", "encoder.")
    )
    require_finite(stored.items(), source)
    config = read_json(folder / "config.json")
    return TrainedAdaptor(
        source,
        {name: tensor.float() for name, tensor in adaptor.items()},
        config["stack_factor"],
        config["speech_length"],
        light.content_hash(behind.items()),
    )


def require_frames(source: str, tokens: Mapping[str, Any] | None) -> None:
    """Raise UserError for a speech LLM of speech tokens."""
    if tokens is not None:
        raise UserError(
            f"models.adaptor: {source} reads speech tokens (or frames made of them), so it has no adaptor of frames to "
            "start from; give a speech LLM that reads frames."
        )


def require_fit(
    adaptor: TrainedAdaptor, language_model: str, encoder: str, *, stack_factor: int, length: str, hidden: int
) -> None:
    """Raise UserError, naming the recipe's key, unless the adaptor fits these models and this shape of speech."""
    source = f"models.adaptor: {adaptor.source}"
    wanted = {
        "speech.stack_factor": (stack_factor, adaptor.stack_factor),
        "speech.length": (length, adaptor.speech_length),
        "speech.adaptor_hidden_size": (hidden, adaptor.hidden),
    }
    for key, (given, trained) in wanted.items():
        if given != trained:
            raise UserError(f"{source} was trained with {key} {trained}, the recipe has {given}; set it to {trained}.")
    width = embedding_width(language_model)
    if width != adaptor.output:
        raise UserError(
            f"{source} speaks to a language model of width {adaptor.output}, {language_model} has {width}; use "
            "the language model it was trained for."
        )
    loaded, _ = load_encoder(encoder)
    if light.content_hash(loaded.named_parameters()) != adaptor.encoder:
        raise UserError(f"{source} was trained behind another encoder than {encoder}; use that one.")
