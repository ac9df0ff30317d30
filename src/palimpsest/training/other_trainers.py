"""Eq. 3's learning rates in the forms in which other trainers read them.

Formats are those that these trainers have; how each reads its own was looked up in its source:

    json       ours: the rules, of which the first whose pattern `re.search` finds decides
    automodel  NeMo AutoModel's optimizer.param_group_overrides: patterns with lr_mult, read in the same way
    axolotl    Axolotl's lr_groups: a rate for the decayed weights whose names contain a text; norms have the base rate
    python     a module without imports of palimpsest, for whatever takes optimizer groups of torch

LLaMA-Factory has one rate for all layers, and DeepSpeed's configuration too (its `initialize` takes an optimizer).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from palimpsest.files import UserError
from palimpsest.models.anatomy import layer_index
from palimpsest.training.rules import NO_DECAY, layer_rules

WITHOUT = {
    "llamafactory": "LLaMA-Factory has one learning rate for all layers, so it has no form for Eq. 3",
    "deepspeed": "DeepSpeed's configuration has one learning rate, and deepspeed.initialize takes an optimizer",
}
PYTHON = '''"""Learning rates by layer: Eq. 3 of the importance {origin}, λ {lambda_:g}.

    optimizer = torch.optim.AdamW(parameter_groups(model, {lr:g}, weight_decay=0.01))
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))            # transformers, TRL
    deepspeed.initialize(model=model, optimizer=optimizer, config=config_without_optimizer)
"""

import re

# Scale of the learning rate by the parameter's name: the first pattern that is found decides.
RULES = [
{rules}
]
NOT_DECAYED = re.compile(r"{no_decay}")


def parameter_groups(model, lr={lr:g}, weight_decay=0.0):
    """Optimizer groups of the parameters that require a gradient; scale 1 for what no pattern finds."""
    groups = {{}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((scale for pattern, scale in RULES if re.search(pattern, name)), 1.0)
            decay = 0.0 if NOT_DECAYED.search(name) else weight_decay
            group = groups.setdefault((scale, decay), {{"params": [], "lr": scale * lr, "weight_decay": decay}})
            group["params"].append(parameter)
    return list(groups.values())
'''


def written_for(
    trainer: str, scales: Mapping[int, float], names: Iterable[str], *, lr: float, lambda_: float, origin: str
) -> str:
    """The text of a file that `trainer` reads.

    Args:
        scales: layer → scale. names: of the parameters that were scored, which say what a layer is called.
        lr: the base learning rate. lambda_, origin: what the scales were made of, for whoever reads the file.

    Raises UserError for a trainer that has no such form, naming those that do.
    """
    require_form(trainer)
    rules = [(pattern, float(scale)) for pattern, scale in layer_rules(scales)[:-1] if scale is not None]
    about = {"lr": lr, "lambda_": lambda_, "origin": origin}
    return FORMATS[trainer](rules, prefixes(scales, names), about)


def require_form(trainer: str) -> None:
    """Raise UserError for a trainer without a form for rates by layer."""
    if trainer not in FORMATS:
        why = WITHOUT.get(trainer, f"There is no form {trainer!r}")
        raise UserError(f"{why}; --as python writes optimizer groups of torch (forms: {', '.join(FORMATS)}).")


def prefixes(scales: Mapping[int, float], names: Iterable[str]) -> dict[str, float]:
    """What stands at the beginning of the names of a layer's parameters, to the dot after its number → scale."""
    found: dict[str, float] = {}
    for name in names:
        layer = layer_index(name)
        if layer is not None and layer in scales:
            mark = f".{layer}."
            found[name[: name.index(mark) + len(mark)]] = float(scales[layer])
    return found


Rules = list[tuple[str, float]]


def _json(rules: Rules, layers: Mapping[str, float], about: Mapping[str, Any]) -> str:
    made = {
        "schema": 1,
        "equation": "scale = 1 - lambda * (I - min I) / (max I - min I), I the importance of a layer",
        "lambda": about["lambda_"],
        "importance": about["origin"],
        "lr": about["lr"],
        "rules": [{"pattern": pattern, "scale": scale, "lr": scale * about["lr"]} for pattern, scale in rules],
        "else": {"scale": 1.0, "lr": about["lr"]},
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _automodel(rules: Rules, layers: Mapping[str, float], about: Mapping[str, Any]) -> str:
    overrides = [{"pattern": pattern, "lr_mult": scale} for pattern, scale in rules]
    return _head(about) + yaml.safe_dump(
        {"optimizer": {"lr": about["lr"], "param_group_overrides": overrides}}, sort_keys=False
    )


def _axolotl(rules: Rules, layers: Mapping[str, float], about: Mapping[str, Any]) -> str:
    groups = [
        {"name": prefix.rstrip(".").replace(".", "_"), "modules": [prefix], "lr": scale * about["lr"]}
        for prefix, scale in layers.items()
    ]
    note = "# Norms and biases train at the base rate: Axolotl's groups are of the weights that are decayed.\n"
    return _head(about) + note + yaml.safe_dump({"learning_rate": about["lr"], "lr_groups": groups}, sort_keys=False)


def _python(rules: Rules, layers: Mapping[str, float], about: Mapping[str, Any]) -> str:
    lines = "\n".join(f'    (r"{pattern}", {scale!r}),' for pattern, scale in rules)
    return PYTHON.format(rules=lines, no_decay=NO_DECAY.pattern, **about)


def _head(about: Mapping[str, Any]) -> str:
    return f"# Learning rates by layer: Eq. 3 of the importance {about['origin']}, λ {about['lambda_']:g}.\n"


FORMATS: dict[str, Callable[[Rules, Mapping[str, float], Mapping[str, Any]], str]] = {
    "json": _json,
    "automodel": _automodel,
    "axolotl": _axolotl,
    "python": _python,
}
