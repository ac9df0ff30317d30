"""PEFT adapter folders as models: what an adapter is an adapter of, and both as one model.

    adapter_config.json           the kind of adapter, and the name of its base
    adapter_model.safetensors     the update

A folder is an adapter where it has that config and no config.json of a whole model. Its base is the one it names, or
the one that stands in front of it: "BASE + FOLDER". The update is merged in memory, in float32; no file is changed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
JOIN = " + "  # between a base and the adapter on it
SECOND = re.compile(r"(modules_to_save|original_module)\.")
STORED = "base_model.model."  # what PEFT writes in front of a module's name


@dataclass(frozen=True)
class Adapter:
    folder: Path
    base: str  # as for `load_language_model`

    @property
    def name(self) -> str:
        """What this adapter on this base is called, so that it is found again."""
        return f"{self.base}{JOIN}{self.folder}"


def unmerged_adapters(model: nn.Module) -> list[Any]:
    """peft's layers in `model` that add an active update to their base layer instead of having it in the weights."""
    modules: list[Any] = list(model.modules())
    return [
        module
        for module in modules
        if hasattr(module, "merged_adapters")
        and hasattr(module, "get_base_layer")
        and not (module.merged or module.disable_adapters)
        and any(len(getattr(module, part, ())) for part in module.adapter_layer_names)
    ]


def require_merged(model: nn.Module, what: str) -> None:
    """Raise UserError for a model with active adapters, which `what` reads no weights of."""
    if unmerged_adapters(model):
        raise UserError(
            f"The model has active adapters, which are no part of the weights that {what}; use merge_and_unload(), or "
            "open importance.lora.merged_adapters(model) around it."
        )


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def find_adapter(name: str) -> Adapter | None:
    """The adapter that a model's name means, None where it means another model.

    Raises UserError for a damaged or incomplete adapter folder, and one that does not say what it is an adapter of.
    """
    if is_adapter(folder := Path(name)):
        _require_end(folder)
        return Adapter(folder, _base_of(folder))
    base, joined, adapter = name.rpartition(JOIN)
    if not joined or Path(name).exists() or not is_adapter(Path(adapter)):
        return None
    _config(Path(adapter))
    return Adapter(Path(adapter), base)


def _require_end(folder: Path) -> None:
    """Raise UserError for an adapter on an adapter on … that is itself."""
    seen: list[Path] = []
    base = str(folder)
    while is_adapter(Path(base)):
        if Path(base).resolve() in seen:
            raise UserError(
                f"{folder} is an adapter on itself, by the base that its config names ({base}); name the model that it "
                f"was trained on in front: 'BASE{JOIN}{folder}'."
            )
        seen.append(Path(base).resolve())
        base = _base_of(Path(base))


def _base_of(folder: Path) -> str:
    config = _config(folder)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{folder} is an adapter that does not name its base; name it in front: 'BASE{JOIN}{folder}'.")
    if (revision := config.get("revision")) not in (None, "main"):
        raise UserError(
            f"{folder} is an adapter on the revision {revision} of {base}; download that and name it in front: "
            f"'BASE{JOIN}{folder}'."
        )
    beside = folder / base
    return str(beside) if base.startswith(".") and beside.is_dir() and not Path(base).exists() else base


def _config(folder: Path) -> Mapping[str, Any]:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{folder / CONFIG} is damaged or not PEFT's; copy or download the adapter again.")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(f"{folder} is an adapter without its weights ({WEIGHTS[0]}); copy or download it again.")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Both as one model
# ---------------------------------------------------------------------------------------------------------------------
def merge_adapter(model: Any, folder: Path) -> Any:
    """`model`, in float32, with the adapter in its weights; changes it in place. On the device "meta" nothing is added.

    An embedding that the adapter brings with more or fewer rows replaces the model's. Raises UserError for an adapter
    that is not one of this model, and for a kind that cannot become part of the weights (prompt tuning).
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    try:
        found = load_peft_weights(str(folder), device="cpu")
        _resize(model, found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which are an error below
            adapted = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # of files, shapes and names: PEFT, torch and safetensors have no common kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"The adapter {folder} cannot be put on {model.name_or_path}: {reason}") from error
    if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_and_unload"):
        kind = adapted.peft_config["default"].peft_type
        raise UserError(
            f"The adapter {folder} ({getattr(kind, 'value', kind)}) cannot become part of the weights, so it cannot be "
            "measured as a model; only kinds that change weights can, such as LoRA."
        )
    _require_same_keys(adapted, found, folder)
    if model.device.type == "meta":
        return adapted.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an embedding of its own is no longer the head, which is as it should be
        return adapted.merge_and_unload()


def _require_same_keys(adapted: Any, found: Mapping[str, Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing = sorted(expected - found.keys())
    # PEFT writes a resized embedding a second time, by the names inside its wrapper, and passes those by.
    twice = {key for key in found if SECOND.sub("", key) in expected}
    extra = sorted(found.keys() - expected - twice - adapted.state_dict().keys())
    if missing or extra:
        said, keys = ("lacks", missing) if missing else ("has", extra)
        raise UserError(
            f"The adapter {folder} is not one of {adapted.get_base_model().name_or_path}: it {said} {len(keys)} "
            f"weights that {'its config asks for' if missing else 'do not belong there'} ({', '.join(keys[:3])}); "
            "give it with the base that it was trained on."
        )


def _resize(model: Any, found: Mapping[str, Tensor]) -> None:
    """Give the embedding as many rows as the one that the adapter brings, if it brings one."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    brought = found.get(f"{STORED}{name}.weight")
    if (
        brought is not None
        and brought.shape[1:] == embedding.weight.shape[1:]
        and len(brought) != len(embedding.weight)
    ):
        model.resize_token_embeddings(len(brought), mean_resizing=False)
