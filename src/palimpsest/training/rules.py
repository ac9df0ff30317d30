"""Learning-rate rules: one ordered list of (pattern, scale) says what is trained, and how fast.

`(regex, scale)`: parameters whose name the regex finds (`re.search`) and that no earlier rule took train at
`scale` × the base learning rate; scale None freezes them. A parameter without a rule is an error, and so is a rule that
no parameter needs: both are typing mistakes more often than intentions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError
from palimpsest.models.anatomy import BEFORE_LAYER

if TYPE_CHECKING:
    from torch import nn

Rule = tuple[str, float | None]
# Norms and biases are not decayed (AdamW practice since GPT-2; transformers' Trainer does the same).
NO_DECAY = re.compile(r"(^|\.)(bias|[a-z_]*norm[a-z_0-9]*\.weight|ln_\w+\.weight)$")


def assign(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, float | None]:
    """The scale of every name: that of the first rule whose regex matches.

    Raises UserError for a name no rule covers, a rule no name needs, and a negative scale.
    """
    compiled = [(re.compile(pattern), scale) for pattern, scale in rules]
    used: set[int] = set()
    scales: dict[str, float | None] = {}
    for name in names:
        index = next((i for i, (pattern, _) in enumerate(compiled) if pattern.search(name)), None)
        if index is None:
            raise UserError(
                f"No learning-rate rule covers the parameter {name}; add a rule such as ('.*', 1.0) at the end."
            )
        used.add(index)
        scales[name] = compiled[index][1]
    for i, (pattern, scale) in enumerate(rules):
        if i not in used:
            raise UserError(f"The learning-rate rule {pattern!r} takes no parameter; correct its pattern or its place.")
        if scale is not None and scale < 0:
            raise UserError(f"The learning-rate rule {pattern!r} has the negative scale {scale}; use None to freeze.")
    return scales


def layer_rules(scales: Mapping[int, float]) -> list[Rule]:
    """One rule per layer of the language model (`layers.N.`, `h.N.`; no tower's), and scale 1 for all the rest."""
    return [*((rf"^{BEFORE_LAYER}{layer}\.", scale) for layer, scale in sorted(scales.items())), (r".*", 1.0)]


def _named_by_a_rule(name: str, rules: Sequence[Rule]) -> bool:
    """Whether the rule that takes the name is about this name, and not one that takes any."""
    pattern = next(pattern for pattern, _ in rules if re.search(pattern, name))
    return re.search(pattern, "") is None


def parameter_groups(
    model: nn.Module,
    scales: Mapping[int, float] | Sequence[Rule],
    lr: float,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups for any torch optimizer, one per (scale, decayed or not); frozen parameters get no gradient.

    Args:
        model: any module; tied parameters are one parameter, under their first name.
        scales: layer → scale, as `layer_scales` gives it (everything outside the layers trains at scale 1), or rules.
        lr: base learning rate; a group's is scale × lr, which a scheduler then multiplies.
        weight_decay: of the weights that are decayed.

    What is frozen before stays frozen unless a rule names it; one that takes any name, such as `.*`, names nothing, and
    neither do layers' scales: a tower that its model keeps frozen, or weights under LoRA adapters, stay as they are.

    Each group holds "params", "names", "lr", "weight_decay" and "scale". Sets `requires_grad` of every parameter.
    Raises UserError for rules that do not fit the parameters (see `assign`), and if nothing is left to train.
    """
    of_layers = isinstance(scales, Mapping)  # says how fast layers learn, not that they do
    rules = layer_rules(scales) if isinstance(scales, Mapping) else list(scales)
    named = dict(model.named_parameters())  # each tied parameter once
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, scale in assign(named, rules).items():
        parameter = named[name]
        if not parameter.requires_grad and (of_layers or not _named_by_a_rule(name, rules)):
            scale = None
        parameter.requires_grad_(scale is not None)
        if scale is None:
            continue
        decayed = weight_decay > 0 and not NO_DECAY.search(name)
        group = groups.setdefault(
            (scale, decayed),
            {
                "params": [],
                "names": [],
                "lr": scale * lr,
                "weight_decay": weight_decay if decayed else 0.0,
                "scale": scale,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise UserError("Every parameter is frozen by the learning-rate rules; nothing would be trained.")
    return list(groups.values())
