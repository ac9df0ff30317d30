"""A light SpeechLM: only what was trained, beside the names and hashes of the models it was trained on.

    light.json            language model and encoder (name, content hash), prompt, hashes of the files below
    adaptor.safetensors   the adaptor: matrices float16, biases and the buffers of its calibration float32
    adapter/              the low-rank updates in PEFT's format, float16, of a method of kind lora
    inserted.safetensors  instead: the layers that a method of kind inserted has put between those there are

A study that keeps its checkpoints light (`models.checkpoints`) has all numbers as they were trained, not in float16.
`load_speech_lm` composes the SpeechLM again: language model, low-rank updates merged, encoder, adaptor. With a gate the
updates are not merged: they are on where there is speech (gate.py). Another language model or encoder than the one
trained on is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.files import UserError, hash_file, read_json, write_json
from palimpsest.models.anatomy import decoder_layers, named_parameters, scored_parameters
from palimpsest.models.gate import close_gate
from palimpsest.models.inserted import insert_layers, inserted_weights, numbers_of
from palimpsest.models.prompts import PromptStyle

if TYPE_CHECKING:
    from torch import Tensor

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM

FILE, ADAPTOR, INSERTED = "light.json", "adaptor.safetensors", "inserted.safetensors"
ADAPTER = Path("adapter", "adapter_model.safetensors")


@dataclass(frozen=True)
class Part:
    """A model the SpeechLM is composed of: `name` as for `load_language_model` or `load_encoder`."""

    name: str
    content: str  # content_hash of its parameters


@dataclass(frozen=True)
class Light:
    """The contents of light.json."""

    language_model: Part
    encoder: Part
    dtype: Literal["float32", "bfloat16"]  # that it was trained in
    stack_factor: int
    speech_length: Literal["trim", "pad_to_30s"]
    system: str | None  # of the prompts
    speech_instruction: str
    files: Mapping[str, str]  # name → SHA-256
    trained: Mapping[str, Any]  # method and fingerprint of the training step, where they are known
    date: str = PromptStyle.date  # of the prompts; folders of earlier versions do not name it
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    gate: Literal["none", "speech"] = "none"  # speech: the updates are for speech alone
    new_layers: int = 0  # inserted into the language model
    tokens: Mapping[str, Any] | None = None  # as in SpeechLMConfig; the quantiser is in adaptor.safetensors


def is_light(folder: Path) -> bool:
    return (folder / FILE).exists()


def is_gated(folder: Path) -> bool:
    """Whether the low-rank updates of a light folder are for speech alone."""
    return is_light(folder) and read_json(folder / FILE).get("gate", "none") != "none"


def content_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes and values rounded to bfloat16, in order of the names.

    Rounded, so that a model has one hash whether it is kept or loaded in float32 or bfloat16 (or came from float16).
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def read_light(folder: Path) -> Light:
    """light.json, after the files it names were found to be whole. Raises UserError."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        parts = {key: Part(**values[key]) for key in ("language_model", "encoder")}
        light = Light(**{**values, **parts})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / FILE} is damaged or of another version of palimpsest ({type(error).__name__}: {error}); "
            "copy the folder again."
        ) from error
    for name, expected in light.files.items():
        if not (folder / name).exists() or hash_file(folder / name) != expected:
            raise UserError(f"{folder / name} is not the file that {FILE} describes; copy the folder again.")
    return light


def compose(
    folder: Path, language_model: Any, tokenizer: Any, encoder: Any, feature_extractor: Any
) -> tuple[SpeechLM, SpeechLMProcessor]:
    """(SpeechLM, its processor) of a light folder and the models that it names, which become parts of it.

    Raises UserError for damaged files, and for a language model or encoder with other weights than trained on.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLM
    from palimpsest.models.tokens import stored_tokenizer

    light = read_light(folder)
    for what, part, here in (
        ("language model", light.language_model, language_model),
        ("encoder", light.encoder, encoder),
    ):
        if content_hash(here.named_parameters()) != part.content:
            raise UserError(f"{folder} was trained with another {what} than {part.name} is here: the weights differ.")
    if light.gate == "none" and (folder / ADAPTER).exists():
        language_model = merged(language_model, folder / ADAPTER.parent)
    if light.new_layers:
        grow(language_model, light.new_layers, load_file(folder / INSERTED))
    adaptor = load_file(folder / ADAPTOR)
    tokens = light.tokens or {
        "reads": "frames", "pool": 1, "collapse": False, "rounded_to": light.stack_factor,
    }  # fmt: skip
    model = SpeechLM.from_parts(
        encoder,
        language_model,
        stack_factor=tokens["rounded_to"],
        adaptor_hidden_size=len(adaptor.get("linear1.bias", ())) or 2048,  # of tokens there is no such layer
        speech_length=light.speech_length,
        reads=tokens["reads"],
        tokenizer=stored_tokenizer(adaptor, tokens["pool"]),
        collapse=tokens["collapse"],
    )
    model.adaptor.load_state_dict(adaptor)
    if light.gate != "none":  # not before: making a SpeechLM draws anew what transformers did not load
        model.language_model = PeftModel.from_pretrained(language_model, str(folder / ADAPTER.parent))
        close_gate(model)
    style = PromptStyle(light.system, light.speech_instruction, light.date, light.template_arguments)
    return model, SpeechLMProcessor(
        tokenizer, feature_extractor, light.stack_factor, light.speech_length, style, tokens["rounded_to"]
    )


def merged(language_model: Any, adapter: Path) -> Any:
    """The language model with the low-rank updates of a PEFT folder in its weights; changes it in place.

    The sum is formed in float32 and rounded once to the model's own type, as if the merged model had been loaded in it.
    """
    from peft import PeftModel

    dtype = language_model.dtype
    return PeftModel.from_pretrained(language_model.float(), str(adapter)).merge_and_unload().to(dtype)


def grow(language_model: Any, n_new: int, weights: Mapping[str, Tensor]) -> None:
    """Put so many layers, of these weights, into the language model, in place."""
    import torch

    numbers = insert_layers(language_model, n_new)
    there = inserted_weights(language_model, numbers)
    if there.keys() != weights.keys():
        raise UserError(f"{INSERTED} does not hold the weights of {n_new} inserted layers; copy the folder again.")
    with torch.no_grad():
        for name, weight in there.items():
            weight.copy_(weights[name])


class LightWeights(Mapping[str, "Tensor"]):
    """The scored weights of the language model that a light folder describes, by canonical name, on the CPU.

    language_model: the one that it names; its weights with the low-rank updates added, one at a time on access, as
    `merged` would have them; where there is a gate without, as for a text. Raises UserError for damaged files.
    """

    def __init__(self, folder: Path, language_model: Any) -> None:
        from safetensors.torch import load_file

        light = read_light(folder)
        written = {id(parameter): name for name, parameter in language_model.named_parameters()}
        scored = scored_parameters(language_model)
        self._module = {name: written[id(parameter)].removesuffix(".weight") for name, parameter in scored.items()}
        self._weights = {name: parameter.detach() for name, parameter in scored.items()}
        self._updates: dict[str, Tensor] = {}
        if (folder / ADAPTER).exists() and light.gate == "none":
            config = read_json(folder / ADAPTER.parent / "adapter_config.json")
            self._scaling, self._transposed = config["lora_alpha"] / config["r"], config["fan_in_fan_out"]
            self._updates = load_file(folder / ADAPTER)

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name].cpu()
        start = f"base_model.model.{self._module[name]}"
        down, up = (self._updates.get(f"{start}.lora_{side}.weight") for side in "AB")
        if down is None or up is None:
            return weight
        product = up @ down
        summed: Tensor = weight.float() + (product.T if self._transposed else product) * self._scaling
        return summed.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def write_light(
    folder: Path,
    model: SpeechLM,
    processor: SpeechLMProcessor,
    *,
    language_model: tuple[str, Any],
    encoder: tuple[str, Any],
    adapter: Path | None,
    trained: Mapping[str, Any],
    exact: bool = False,
) -> None:
    """What `model`, which is on the CPU, has learned, into `folder`, which exists.

    language_model, encoder: name and model of what it was trained on, in its dtype; the language model is changed.
    adapter: the PEFT folder of its training, if it has one; it may be the one in `folder`, which then stays as it is.
    exact: nothing is rounded to float16.
    Raises UserError unless those, with the low-rank updates merged, are the model's own.
    """
    from safetensors.torch import load_file, save_file

    name, base = language_model
    parts = {
        "language_model": Part(name, content_hash(base.named_parameters())),
        "encoder": Part(encoder[0], content_hash(encoder[1].named_parameters())),
    }
    if content_hash(model.encoder.named_parameters()) != parts["encoder"].content:
        raise UserError(f"The encoder of the checkpoint is not {encoder[0]}; name the one it was trained with.")
    n_new = 0 if model.gated else len(decoder_layers(model.language_model)) - len(decoder_layers(base))
    under, inserted = base if adapter is None or model.gated else merged(base, adapter), {}
    if n_new > 0:
        inserted = inserted_weights(model.language_model, numbers_of(len(decoder_layers(base)), n_new))
        grow(under, n_new, inserted)
    _require_made_of(model.language_model, under, name, adapter)

    stored = _as_it_is if exact else _stored
    tensors = model.adaptor.state_dict()
    fixed = {name for name, _ in model.adaptor.named_buffers()}  # calibration and centroids stay as they are
    save_file(
        {key: (_as_it_is if key in fixed else stored)(tensor).contiguous() for key, tensor in tensors.items()},
        folder / ADAPTOR,
    )
    files = [ADAPTOR]
    if inserted:
        save_file({key: stored(tensor) for key, tensor in inserted.items()}, folder / INSERTED)
        files.append(INSERTED)
    if adapter is not None:
        if adapter != folder / ADAPTER.parent:
            (folder / ADAPTER).parent.mkdir()
            updates = load_file(adapter / ADAPTER.name)
            save_file({key: stored(tensor) for key, tensor in updates.items()}, folder / ADAPTER)
        config = read_json(adapter / "adapter_config.json")
        write_json(folder / ADAPTER.parent / "adapter_config.json", {**config, "base_model_name_or_path": name})
        files.append(ADAPTER.as_posix())
    light = Light(
        **parts,
        dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        stack_factor=model.config.stack_factor,
        speech_length=model.config.speech_length,
        system=processor.style.system,
        speech_instruction=processor.style.speech_instruction,
        date=processor.style.date,
        template_arguments=dict(processor.style.template_arguments),
        gate="speech" if model.gated else "none",
        new_layers=max(n_new, 0),
        tokens=model.config.tokens,
        files={file: hash_file(folder / file) for file in files},
        trained=trained,
    )
    write_json(folder / FILE, asdict(light))


def _stored(tensor: Tensor) -> Tensor:
    """Matrices in float16. What is small stays float32: 1/σ of a feature that hardly varies is beyond float16."""
    import torch

    return tensor.detach().to("cpu", torch.float16 if tensor.ndim == 2 else torch.float32).contiguous()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _require_made_of(trained: Any, expected: Any, name: str, adapter: Path | None) -> None:
    """Raise UserError unless the weights are the same up to rounding, where merging on another machine may differ."""
    import torch

    weights = named_parameters(expected)
    for key, tensor in named_parameters(trained).items():  # without those of adapters behind a gate
        other = weights.get(key)
        if other is not None and other.shape == tensor.shape:
            step = 2 * torch.finfo(tensor.dtype).eps
            if torch.allclose(tensor, other, rtol=step, atol=step * float(other.detach().abs().max())):
                continue
        updates = "" if adapter is None else " with the low-rank updates beside the checkpoint"
        raise UserError(
            f"The language model of the checkpoint is not {name}{updates} ({key} differs), so it has no light form; "
            "only methods of kind adaptor, lora and inserted have one."
        )
