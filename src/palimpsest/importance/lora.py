"""Adapters of peft (LoRA and its relatives) as part of the weights, for a while, without any loss.

peft's own merge and unmerge add the update and subtract it again, which in floating point does not give the
old weights back. Here the merge happens in copies; the original storage is set aside untouched. Weights sharded
by fully_shard are gathered from the storage that FSDP knows, so there the copy is set aside and put back.

The sum is formed in float32. Rounded to a model's bfloat16 it keeps eight bits, and a small update is mostly gone:
what is then scored would not be the adapted model, so that is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from palimpsest.files import UserError
from palimpsest.models.adapters import unmerged_adapters
from palimpsest.parallel import is_sharded, local, reshard

if TYPE_CHECKING:
    from torch import Tensor, nn


MOST_LOST = 0.05  # of an update, by norm, that rounding the merged weights may take


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block, the active adapters of `model` are part of its weights; afterwards all is as before.

    Weights come back bit for bit, in the same storage, also if the block raises; adapters that were merged or
    disabled before stay so. Meanwhile the adapted matrices exist twice. Does nothing to a model without peft.
    With a sharded model every rank must enter and leave. Updates are added in float32 and rounded once to the
    weights' own type.

    Raises UserError, with everything as before, if peft cannot merge an adapter (quantised weights, or a kind of
    adapter that has no merged form), and if rounding would take more than MOST_LOST of an update (bfloat16 weights).
    """
    layers = unmerged_adapters(model)
    if layers:
        reshard(model)  # the parts, not what a forward left gathered
    originals: dict[int, tuple[nn.Parameter, Tensor]] = {}  # id → (parameter, its own storage; sharded: a copy)
    try:
        for layer in layers:
            for parameter in layer.get_base_layer().parameters(recurse=False):
                if id(parameter) not in originals:
                    half = parameter.dtype in (torch.bfloat16, torch.float16)
                    if is_sharded(parameter):
                        if half:
                            raise UserError(
                                f"LoRA adapters cannot be merged in float32 into sharded {parameter.dtype} weights, "
                                "and in fewer bits most of a small update is lost; load the model in float32."
                            )
                        originals[id(parameter)] = (parameter, local(parameter).clone())
                    else:
                        originals[id(parameter)] = (parameter, parameter.data)
                        parameter.data = parameter.data.float() if half else parameter.data.clone()
        for layer in layers:
            try:
                with torch.no_grad():
                    layer.merge()
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"The adapter in {type(layer).__name__} could not be merged for scoring ({error}); "
                    "call the model's merge_and_unload() or disable the adapter first."
                ) from error
        for parameter, original in originals.values():
            if parameter.dtype != original.dtype:
                parameter.data = _rounded(parameter.data, original)
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        if layers:
            reshard(model)
        for parameter, original in originals.values():
            if is_sharded(parameter):
                local(parameter).copy_(original)
            else:
                parameter.data = original


def _rounded(merged: Tensor, original: Tensor) -> Tensor:
    """Merged float32 weights in the type of the original ones. Raises UserError if that takes much of the update."""
    rounded = merged.to(original.dtype)
    update = float((merged - original.float()).norm())
    lost = float((rounded.float() - merged).norm()) / update if update else 0.0
    if lost > MOST_LOST:
        raise UserError(
            f"Merged into {str(original.dtype).removeprefix('torch.')} weights, {lost:.0%} of a LoRA update would be "
            "lost to rounding; load the model in float32."
        )
    return rounded
