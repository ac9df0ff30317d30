"""Inserted layers: copies between a language model's own, at first without effect (LLaMA Pro, Wu et al. 2024).

Behind some layers stands a copy of them whose output projections, of attention and of the MLP, are zero. It adds zero
to what runs through it, so the model says what it said before, to the bit. Trained are the copies alone; all else stays
as it is, and without the copies the model is the base again.

The grown model is one of its class with more layers: its config says how many, its layers are numbered through, and it
is saved and loaded as any other.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError
from palimpsest.models.anatomy import decoder_layers, layer_index, module_kind

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

OUTPUTS = ("o", "down")  # kinds of linear maps (anatomy.py) whose result is added to the residual stream
NUMBERS = ("layer_idx", "layer_id", "idx")  # what modules of a layer call its number, by which the cache finds theirs
MODES = ("training", "gradient_checkpointing")  # attributes that follow from no config


def places_of(n_layers: int, n_new: int) -> tuple[int, ...]:
    """The layers behind each of which a copy stands: the last of each of `n_new` groups as equal as can be.

    >>> places_of(30, 4)
    (7, 14, 22, 29)
    """
    return tuple(-(-(group + 1) * n_layers // n_new) - 1 for group in range(n_new))


def numbers_of(n_layers: int, n_new: int) -> tuple[int, ...]:
    """The numbers that the copies have in the grown model of `n_layers` layers and they.

    >>> numbers_of(30, 4)
    (8, 16, 25, 33)
    """
    return tuple(place + 1 + before for before, place in enumerate(places_of(n_layers, n_new)))


def insert_layers(language_model: PreTrainedModel, n_new: int) -> tuple[int, ...]:
    """Grow `language_model` in place, freeze it, and leave the new layers trainable; returns their numbers.

    On the device "meta" nothing but names and shapes changes.

    Raises UserError for more new layers than there are, and for a model whose layers cannot be copied in this way.
    """
    layers = decoder_layers(language_model)
    n_layers, what = len(layers), type(language_model).__name__
    if n_new > n_layers:
        raise UserError(f"{n_new} layers cannot be inserted into the {n_layers} of {what}; give as many at most.")
    stack, prefix = _stack_of(language_model, layers)
    config = language_model.config.get_text_config(decoder=True)
    language_model.requires_grad_(False)
    numbers = numbers_of(n_layers, n_new)
    for number, place in zip(numbers, places_of(n_layers, n_new), strict=True):
        new = copy.deepcopy(layers[place], {id(config): config}).requires_grad_(True)
        kinds = {name: module_kind(f"{prefix}.0.{name}") for name, _ in new.named_parameters()}
        if OUTPUTS[0] not in kinds.values():
            raise UserError(
                f"The layers of {what} have no output projection of a known name, so a copy would not be without "
                "effect; use another kind of method with this model."
            )
        for name, parameter in new.named_parameters():
            if kinds[name] in OUTPUTS:
                parameter.data.zero_()
        stack.insert(number, new)
    _grow(config, n_layers, places_of(n_layers, n_new))
    for number, layer in enumerate(stack):
        for module in layer.modules():
            for name in NUMBERS:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)
    _require_as_configured(language_model, stack)
    return numbers


def inserted_weights(language_model: nn.Module, numbers: tuple[int, ...]) -> dict[str, Tensor]:
    """The weights of the layers of these numbers, by their names in `language_model`."""
    return {name: value for name, value in language_model.state_dict().items() if layer_index(name) in numbers}


def _stack_of(language_model: nn.Module, layers: dict[int, nn.Module]) -> tuple[Any, str]:
    """The list that holds the layers, and its name."""
    from torch import nn

    for name, module in language_model.named_modules():
        if isinstance(module, nn.ModuleList) and [*module] == [*layers.values()]:
            return module, name
    raise UserError(
        f"The layers of {type(language_model).__name__} do not stand in one list, so none can be inserted; use another "
        "kind of method with this model."
    )


def _grow(config: Any, n_layers: int, places: tuple[int, ...]) -> None:
    """The number of layers, and the lists that say something of each (attention with a window or without, …)."""
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == n_layers:
            repeated = [item for number, item in enumerate(value) for item in [item] * (1 + places.count(number))]
            setattr(config, key, type(value)(repeated))
    config.num_hidden_layers = n_layers + len(places)


def _require_as_configured(language_model: PreTrainedModel, stack: nn.ModuleList) -> None:
    """Raise UserError unless the config, as it is saved, makes these layers: by number some are of another kind."""
    import torch

    with torch.device("meta"):
        try:
            made: Any = type(language_model)(copy.deepcopy(language_model.config))
        except Exception as error:  # of transformers' configs, which have no common kind
            raise _of_another_kind(language_model) from error
    expected, _ = _stack_of(made, decoder_layers(made))
    if _described(expected) != _described(stack):
        raise _of_another_kind(language_model)


def _described(stack: nn.ModuleList) -> list[Any]:
    """Of every module its class, plain attributes and shapes of weights."""
    return [
        (
            name,
            type(module),
            {key: value for key, value in vars(module).items() if _is_plain(value) and _says_something(key)},
            {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)},
        )
        for name, module in stack.named_modules()
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _says_something(key: str) -> bool:
    return not key.startswith("_") and key not in MODES


def _of_another_kind(language_model: PreTrainedModel) -> UserError:
    return UserError(
        f"{type(language_model).__name__} makes layers of different kinds by their number, and with more layers its "
        "config would make others; use another kind of method with this model."
    )
