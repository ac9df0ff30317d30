"""Deactivation: set chosen weights to zero, look at the model, put them back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from palimpsest.files import UserError
from palimpsest.importance.layouts import local_part_like
from palimpsest.models.adapters import unmerged_adapters
from palimpsest.models.anatomy import find_language_model, named_parameters
from palimpsest.parallel import local, reshard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from palimpsest.importance.mask import Mask


@contextmanager
def deactivate(model: nn.Module, mask: Mask, parameters: Mapping[str, nn.Parameter] | None = None) -> Iterator[None]:
    """Within the block, the masked weights of `model` (or of the language model in it) are 0.

    Works in place and keeps only the removed values. Afterwards, also if the block raises, they are back
    bit for bit. `parameters`: what the names of the mask stand for; default: the language model's parameters.
    A model sharded by `fully_shard` takes the whole mask on every rank; each rank zeroes its own part.

    Raises UserError, before anything is changed, if the mask does not fit the model, or if LoRA adapters would
    add to the zeros.

    >>> with deactivate(model, select(scores.tensors("signed_sum"), 0.03)):  # doctest: +SKIP
    ...     losses, _ = supervised_losses(model, batch)
    """
    if unmerged_adapters(model):
        raise UserError(
            "The model has active LoRA adapters, which would add to the weights set to zero; "
            "use merge_and_unload(), or open importance.lora.merged_adapters(model) around the block."
        )
    reshard(model)
    if parameters is None:
        parameters = named_parameters(find_language_model(model))
    mask.check_shapes({name: tuple(p.shape) for name, p in parameters.items()}, "the model")

    removed: dict[str, Tensor] = {}  # name → values at the masked positions (of this rank), row-major
    try:
        with torch.no_grad():
            for name in mask.names:
                if mask.packed[name].any():
                    weight, places = local(parameters[name]), _places(mask, name, parameters[name])
                    removed[name] = weight[places]  # a copy
                    weight[places] = 0
        torch.clear_autocast_cache()  # of copies from before, which an autocast around this block would go on using
        yield
    finally:
        reshard(model)
        with torch.no_grad():
            for name, values in removed.items():
                local(parameters[name])[_places(mask, name, parameters[name])] = values
        torch.clear_autocast_cache()


def _places(mask: Mask, name: str, parameter: Tensor) -> tuple[Tensor, ...]:
    """Where this rank's part of a parameter is masked, row-major: few weights, so quicker to work with than the flags.

    Not kept between the two times: a mask may have every weight.
    """
    return local_part_like(mask.tensor(name), parameter).nonzero(as_tuple=True)
