"""LoRA that is on only where there is speech, so that a text is answered by the base, to the bit.

`SpeechLM.gated` says that its language model has such adapters. They rest switched off, so that whoever takes the
language model alone has the base; `SpeechLM.forward` and `generate` switch them on for a batch with speech, the whole
of a generation included. While training they rest switched on instead: gradient checkpointing runs layers once more
during the backward pass, when `forward` has long returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor, nn

    from palimpsest.models.speech_lm import SpeechLM


@contextmanager
def adapters_switched(language_model: nn.Module, on: bool) -> Iterator[None]:
    """Within the block the adapters are on, or off; afterwards each is as before."""
    other = [layer for layer in _adapters(language_model) if layer.disable_adapters == on]
    try:
        for layer in other:
            layer.enable_adapters(on)
        yield
    finally:
        for layer in other:
            layer.enable_adapters(not on)


def close_gate(model: SpeechLM) -> None:
    """Leave the adapters inside the language model, without peft's wrapper around it, and switched off."""
    inner: Any = model.language_model
    if hasattr(inner, "get_base_model"):
        inner = model.language_model = inner.get_base_model()
    for layer in _adapters(inner):
        layer.enable_adapters(False)
    model.gated = True


def without_adapters(language_model: nn.Module) -> Any:
    """The base under the adapters, which are taken out, in place."""
    adapters = set(map(id, _adapters(language_model)))
    found: list[tuple[str, Any]] = [(name, it) for name, it in language_model.named_modules() if id(it) in adapters]
    for name, adapter in found:
        parent, _, last = name.rpartition(".")
        setattr(language_model.get_submodule(parent), last, adapter.get_base_layer())
    return language_model


def require_one_kind(has_speech: Bool[Tensor, " batch"]) -> bool:
    """Whether the rows have speech. Raises UserError where some have and others have not."""
    found = bool(has_speech.any())
    if found and not bool(has_speech.all()):
        raise UserError(
            "A batch has rows with speech and rows without, and the LoRA of this model is on or off for a whole batch "
            "(gate: speech); give them in batches of their own."
        )
    return found


def _adapters(language_model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in language_model.modules() if isinstance(module, BaseTunerLayer)]
