"""Any tuner of peft as a method (`kind: peft`): its config from the recipe's keys, and what is refused before the work.

A method ends as a plain language model, so only tuners that peft can merge into the weights are taken, and those that
need nothing but a loss: no calls between the steps, no ids of a task.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError

if TYPE_CHECKING:
    from palimpsest.training.methods import Method

TYPE = "peft_type"
# Of a config, what is not the recipe's to say.
MANAGED = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
# Tuners that are about other places than the linear maps of layers; peft knows which, by the kind of model.
OWN_PLACES = ("IA3", "LN_TUNING", "TRAINABLE_TOKENS")
REFUSED = {
    "ADALORA": "its ranks are dealt out anew between the steps",
    "XLORA": "it mixes adapters that are there already",
    "POLY": "it takes the id of a task with every question",
    "FROD": "it starts from a decomposition of the weights, which a check without weights cannot follow",
    **dict.fromkeys(("BEFT", "LILY", "SHADOW"), "it is not to be had as a change of the weights"),
}
PLAIN_STARTS = (True, "gaussian", "orthogonal")  # of LoRA's matrices; the others change the base's weights too


def tuner_config(method: Method, targets: Sequence[str]) -> Any:
    """peft's config of a method; `targets` are its modules where the recipe names none.

    Raises UserError for a type or key that peft does not have, and values that it does not take.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from palimpsest.options import nearest

    keys = dict(method.peft or {})
    known: Mapping[str, Any] = {str(getattr(it, "value", it)): made for it, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(keys.pop(TYPE, ""))
    if kind not in known:
        raise UserError(
            f"peft has no {TYPE} {kind!r}; the nearest that it has is {nearest(kind.upper(), list(known))!r}, all are "
            f"{', '.join(sorted(known))}."
        )
    if kind in REFUSED:
        raise UserError(f"{TYPE} {kind} cannot be trained here: {REFUSED[kind]}; use another.")
    made = known[kind]
    options = [it.name for it in fields(made) if it.init and it.name not in (TYPE, *MANAGED)]
    if (unknown := next((key for key in keys if key not in options), None)) is not None:
        raise UserError(f"{kind} of peft has no key {unknown!r}; the nearest is {nearest(unknown, options)!r}.")
    if kind == "LORA" and keys.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise UserError(
            f"init_lora_weights {keys['init_lora_weights']!r} changes the weights of the base, on which the adapter "
            "that is saved would not stand; leave it out, or give gaussian or orthogonal."
        )
    if method.targets is not None and "target_modules" in keys:
        raise UserError("targets and peft.target_modules name the same thing; remove one.")
    if method.targets is not None and "target_modules" not in options:
        raise UserError(f"{kind} of peft takes no targets; remove them.")
    places = "target_modules" in options and "target_modules" not in keys
    if places and (method.targets is not None or kind not in OWN_PLACES):
        keys["target_modules"] = list(targets)
    try:
        config = made(task_type="CAUSAL_LM", **keys)
    except (TypeError, ValueError, AssertionError, AttributeError, ImportError) as error:
        raise UserError(f"{kind} of peft does not take these options ({' '.join(str(error).split())}).") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise _unmergeable(kind)
    return config


def require_merging(adapted: Any) -> None:
    """Raise UserError for a tuner that peft cannot make a part of the weights.

    `adapted` may be without weights; where they are there, a copy of one layer of each class is merged as a trial.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = adapted.peft_config["default"]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    layers = {type(module): module for module in adapted.modules() if isinstance(module, BaseTunerLayer)}
    if not layers or any(of.merge is BaseTunerLayer.merge for of in layers):
        raise _unmergeable(kind)
    for layer in layers.values():
        if all(parameter.device.type != "meta" for parameter in layer.parameters()):
            try:
                copy.deepcopy(layer).merge()
            except (NotImplementedError, ValueError, RuntimeError) as error:
                raise _unmergeable(kind) from error


def _unmergeable(kind: str) -> UserError:
    return UserError(
        f"{TYPE} {kind} cannot become part of the weights, so its model could not be measured; use one that can, such "
        "as LORA, OFT, BOFT, HRA, VERA or IA3."
    )
