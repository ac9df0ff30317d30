"""Deactivation: set chosen weights to zero, look at the model, put them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from palimpsest.models.anatomy import find_language_model, named_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from palimpsest.importance.mask import Mask


@contextmanager
def deactivate(model: nn.Module, mask: Mask, parameters: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Within the block, the masked weights of `model` (or of the language model in it) are 0.

    Works in place and keeps only the removed values. Afterwards, also if the block raises, they are back
    bit for bit. `parameters`: what the names of the mask stand for; default: the language model's parameters.

    Raises UserError, before anything is changed, if the mask does not fit the model.

    >>> with deactivate(model, select(scores.tensors("signed_sum"), 0.03)):  # doctest: +SKIP
    ...     losses, _ = supervised_losses(model, batch)
    """
    if parameters is None:
        parameters = named_parameters(find_language_model(model))
    mask.check_shapes({name: tuple(p.shape) for name, p in parameters.items()}, "the model")

    removed: dict[str, Tensor] = {}  # name → values at the masked positions, row-major
    try:
        with torch.no_grad():
            for name in mask.names:
                weight = parameters[name]
                flags = mask.tensor(name).to(weight.device)
                removed[name] = weight[flags]  # a copy
                weight.masked_fill_(flags, 0)
        yield
    finally:
        with torch.no_grad():
            for name, values in removed.items():
                weight = parameters[name]
                weight.masked_scatter_(mask.tensor(name).to(weight.device), values)
