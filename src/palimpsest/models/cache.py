"""Keys and values of a generation, kept where they stand and as attention takes them.

transformers' own cache is made anew for every token, in float32 where autocast rounds attention: copying and rounding
it takes as long as the products of matrices once fifty questions are answered together.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicLayer

from palimpsest.models.anatomy import unwrap

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

ROOM = 64  # tokens for which there is room whenever more is needed


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values (batch, heads, seq, size) at the beginning of tensors with room for more tokens.

    Under autocast they are rounded once, to what attention would round all of them to for every token.
    """

    def update(
        self, key_states: Float[Tensor, "batch heads new size"], value_states: Float[Tensor, "batch heads new size"],
        *args: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        self.keys: Tensor = _appended(self.keys, before, key_states)
        self.values: Tensor = _appended(self.values, before, value_states)
        return self.keys, self.values


def _appended(whole: Tensor, length: int, new: Float[Tensor, "batch heads new size"]) -> Tensor:
    """The first `length` tokens of `whole` and the new ones: in its storage, if there is room."""
    batch, heads, n_new, size = new.shape
    room = whole.untyped_storage().nbytes() // max(batch * heads * size * whole.element_size(), 1)
    if length + n_new > room:
        kept, room = whole, length + n_new + ROOM
        whole = new.new_empty(batch, heads, room, size)
        if length:
            whole[:, :, :length] = kept
    else:
        whole = whole.as_strided((batch, heads, room, size), (heads * room * size, room * size, size, 1), 0)
    whole[:, :, length : length + n_new] = new
    return whole[:, :, : length + n_new]


def generation_cache(model: nn.Module) -> dict[str, Any]:
    """What `generate` is given besides prompts and settings; nothing where a model keeps more than keys and values."""
    inner = unwrap(model)
    if "past_key_values" not in inspect.signature(inner.forward).parameters or not attends_to_everything(inner):
        return {}
    return {"past_key_values": Cache(layer_class_to_replicate=GrowingLayer)}


def attends_to_everything(model: nn.Module) -> bool:
    """Whether each layer looks at all tokens in front of one, by the model's config: no window, no recurrent state."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    if hasattr(config, "get_text_config"):  # of a multimodal model, the part that says how text is read
        config = config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not windowed and not set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
