"""Run a model from one of its layers on, with the hidden states that an earlier pass had there, on stacked copies.

The model's own forward does the work: layers in front are replaced by ones that pass their input on, and the hidden
states are put in at the start layer. Masks, positions, the final norm and the head stay whatever the architecture
makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.models.loss import supervised_losses

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn


@dataclass
class Records:
    """What the base pass saw. hidden: layer → its input (rows, seq, width); tuples: layers that return a tuple, and
    its length."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    tuples: dict[int, int] = field(default_factory=dict)


def base_pass(
    model: nn.Module, batch: Mapping[str, Any], layers: Mapping[int, nn.Module], starts: set[int]
) -> tuple[Float[Tensor, " supervised"], Records]:
    records = Records()

    def see_input(number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy: some architectures write into the hidden states in place.
        records.hidden[number] = (args[0] if args else kwargs["hidden_states"]).clone()

    def see_output(number: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):
            records.tuples[number] = len(output)

    with ExitStack() as stack:
        for number, layer in layers.items():
            if number in starts:
                handle = layer.register_forward_pre_hook(partial(see_input, number), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(layer.register_forward_hook(partial(see_output, number)).remove)
        losses, _ = supervised_losses(model, batch)
    return losses, records


@contextmanager
def starting_at(start: int | None, layers: Mapping[int, nn.Module], records: Records, n_copies: int) -> Iterator[None]:
    """Layers before `start` pass their input on; `start` gets the recorded hidden states, once per copy."""
    if start is None:
        yield
        return

    def skip(n_outputs: int | None, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if n_outputs is None else (hidden, *[None] * (n_outputs - 1))

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        stacked = _repeat(records.hidden[start], n_copies)
        return ((stacked, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stacked})

    before = [(number, layer) for number, layer in layers.items() if number < start]
    own = [(layer, layer.__dict__.get("forward")) for _, layer in before]  # accelerate may have set one
    handle = layers[start].register_forward_pre_hook(substitute, with_kwargs=True)
    try:
        for number, layer in before:
            layer.forward = partial(skip, records.tuples.get(number))
        yield
    finally:
        handle.remove()
        for layer, forward in own:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def repeated(batch: Mapping[str, Any], n_copies: int) -> dict[str, Any]:
    """The batch `n_copies` times, one copy after the other along the rows."""
    return {
        key: _repeat(value, n_copies) if isinstance(value, torch.Tensor) else list(value) * n_copies
        for key, value in batch.items()
    }


def _repeat(tensor: Tensor, n_copies: int) -> Tensor:
    return tensor.repeat(n_copies, *[1] * (tensor.ndim - 1))
