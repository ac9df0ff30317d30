"""Checkpoints of speech LLMs that transformers does not know: where their language model is, from config and names.

LLaMA-Omni (github.com/ictnlp/LLaMA-Omni and LLaMA-Omni2) is a Llama or Qwen2 with more beside it:

    model.embed_tokens, model.layers.…, model.norm, lm_head     the language model, by its own names
    model.speech_encoder.*, model.speech_projector.*            left out
    speech_generator.*                                          left out
    config.json   that of the language model, with another model_type and keys speech_*

Ultravox (github.com/fixie-ai/ultravox) keeps what was trained:

    language_model.*                                all of the language model, some of it, LoRA updates, or nothing
    multi_modal_projector.*, audio_tower.*          left out
    config.json   text_model_id, where what the files do not have comes from, or else text_config

Only the language model is read; no code of theirs is run. The base can be named in front, as an adapter's is:
"BASE + FOLDER".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from palimpsest.files import UserError

if TYPE_CHECKING:
    from torch import Tensor

LLAMA_OMNI = re.compile(r"omni2?_speech(2s)?_(llama|qwen2?)")
OMNI_KINDS = {"llama": "llama", "qwen": "qwen2", "qwen2": "qwen2"}
ULTRAVOX = "ultravox"
WRAPPED = re.compile(r"^(base_model\.model\.)|(?<=\.)base_layer\.")  # what peft adds to names
LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


@dataclass(frozen=True)
class Layout:
    name: str
    prefix: str  # of the language model's names in the files
    config: Mapping[str, Any] | None  # transformers' config of the language model; None: that of `base`
    base: str | None = None  # where the weights come from that the files do not have, as for `load_language_model`
    lora_scale: float | None = None  # of LoRA updates among the weights


def read_layout(config: Mapping[str, Any]) -> Layout | None:
    """The layout that a checkpoint's config.json means; None for those of transformers."""
    kind = config.get("model_type")
    if isinstance(kind, str) and (match := LLAMA_OMNI.fullmatch(kind)):
        return llama_omni(config, OMNI_KINDS[match[2]])
    return ultravox(config) if kind == ULTRAVOX else None


def llama_omni(config: Mapping[str, Any], model_type: str) -> Layout:
    left = {"model_type", "architectures", "auto_map"}
    kept = {key: value for key, value in config.items() if key not in left and not key.startswith("speech_")}
    return Layout("LLaMA-Omni", "", {**kept, "model_type": model_type})


def ultravox(config: Mapping[str, Any]) -> Layout:
    lora = config.get("text_model_lora_config") or {}
    rank, alpha = (lora.get(key) if isinstance(lora, Mapping) else None for key in ("r", "lora_alpha"))
    scale = alpha / rank if isinstance(alpha, (int, float)) and isinstance(rank, int) and rank > 0 else None
    base, text = config.get("text_model_id"), config.get("text_config")
    own = {"model_type": "llama", **text} if isinstance(text, Mapping) and not base else None
    return Layout("Ultravox", "language_model.", own, base if isinstance(base, str) and base else None, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def stored_names(folder: Path) -> list[str]:
    """Every name in the safetensors files. Raises UserError where there are none, or one cannot be read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors, the only files that are read of a checkpoint of this layout.")
    return [name for file in files for name in _open(file).keys()]  # noqa: SIM118, it is no mapping


def has_language_model(layout: Layout, folder: Path) -> bool:
    """Whether the files hold weights of the language model that are no updates of others."""
    own = [name for name in stored_names(folder) if name.startswith(layout.prefix)]
    return any(LORA.fullmatch(name) is None for name in own)


def own_weights(layout: Layout, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name inside the language model, weight), one at a time; LoRA's under the names of their modules."""
    for path in sorted(folder.glob("*.safetensors")):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if name.startswith(layout.prefix):
                yield WRAPPED.sub("", name.removeprefix(layout.prefix)), file.get_tensor(name)


def what_is_read(layout: Layout, folder: Path) -> str:
    """A sentence: what of the checkpoint is read, and what is left out, with the number of tensors of each part."""
    counts: Counter[str] = Counter()
    for name in stored_names(folder):
        part = _part(name)
        counts["language model" if part is None else part] += 1
    own = counts.pop("language model", 0)
    source = f"that of {layout.base}" if layout.base else "its own"
    changed = f" with {own} tensors of this checkpoint" if layout.base and own else ""
    rest = ", ".join(f"{part} ({n} tensors)" for part, n in sorted(counts.items()))
    return (
        f"{folder} is read as a checkpoint like {layout.name}'s: its language model is {source}{changed}"
        f"{'' if layout.base else f' ({own} tensors)'}; left out: {rest or 'nothing'}."
    )


def _part(name: str) -> str | None:
    """What a tensor belongs to, None for the language model."""
    parts = name.split(".")
    if parts[0] == "model" and parts[1].startswith("speech_"):
        return ".".join(parts[:2])
    return None if parts[0] in ("model", "lm_head", "language_model") else parts[0]


def _open(path: Path) -> Any:
    try:
        opened: Any = safe_open(path, framework="pt")
        return opened
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy or download it again.") from error


# ---------------------------------------------------------------------------------------------------------------------
# A base with the checkpoint's own weights
# ---------------------------------------------------------------------------------------------------------------------
def put_own_weights(model: Any, layout: Layout, folder: Path) -> None:
    """Put the checkpoint's weights of the language model into its base, `model`, in float32; LoRA updates are added.

    On the device "meta" names and shapes are checked and nothing is changed. Raises UserError for weights that the base
    does not have, of another shape, and for updates that are no pair or without the config's r and lora_alpha.
    """
    import torch

    places = dict(model.named_parameters(remove_duplicate=False))
    updates: dict[str, dict[str, Tensor]] = defaultdict(dict)
    with torch.no_grad():
        for name, tensor in own_weights(layout, folder):
            if match := LORA.fullmatch(name):
                updates[f"{match['module']}.weight"][match["side"]] = tensor
                continue
            _require_place(places, name, tuple(tensor.shape), layout, folder)
            if places[name].device.type != "meta":
                places[name].copy_(tensor)
        if updates and layout.lora_scale is None:
            raise UserError(
                f"{folder} holds LoRA updates of its language model, and its config does not say how they are scaled "
                "(text_model_lora_config with r and lora_alpha); merge them before saving."
            )
        for name, sides in updates.items():
            if sides.keys() != {"A", "B"}:
                raise UserError(f"{folder} has half of a LoRA update of {name}; copy or download it again.")
            _require_place(places, name, (sides["B"].shape[0], sides["A"].shape[1]), layout, folder)
            if places[name].device.type != "meta":
                places[name].add_(sides["B"].float() @ sides["A"].float(), alpha=layout.lora_scale or 0.0)


def _require_place(places: Mapping[str, Tensor], name: str, shape: Sequence[int], layout: Layout, folder: Path) -> None:
    here = tuple(places[name].shape) if name in places else None
    if here != tuple(shape):
        what = "which that does not have" if here is None else f"{tuple(shape)} instead of {here}"
        raise UserError(
            f"{folder} was not trained from {layout.base}: it holds {name}, {what}; name its base in front: "
            f"'BASE + {folder}'."
        )
