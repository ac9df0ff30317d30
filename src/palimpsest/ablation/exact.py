"""Importance by ablation (Eq. 1), the definition that the first-order estimate is measured against.

Eq. 1 asks for one evaluation of the whole data per weight. Two facts make it affordable for thousands of weights:

- Layers in front of the touched one do not notice, so they are run once per batch; afterwards they are skipped,
  and the touched layer starts from the hidden states it had then.
- Zeroing weight (i, j) of a linear map changes its output by −w_ij · x_j in unit i and nowhere else. So one forward
  pass carries many ablations: the batch is stacked, and copy k has its own w_ij · x_j subtracted where its own
  linear map of the layer gives its output. Everything after that is the model's own forward on K times the rows.

This is exact, not an approximation: it is how the model computes with that weight at zero, up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from palimpsest.ablation.restart import base_pass, layers_of, repeated, starting_at
from palimpsest.files import UserError
from palimpsest.models.anatomy import find_language_model, named_parameters
from palimpsest.models.loss import supervised_losses

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor


class Float64Throughout(TorchFunctionMode):
    """Within the context, casts of a float64 tensor to float32 leave it as it is.

    RMSNorm and softmax "upcast" to float32, which is a downcast for a float64 model and costs the ablation of a
    small weight all its digits. Float32 and bfloat16 models compute as always.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if double and func is torch.Tensor.float:
            return args[0]
        if double and torch.float32 in (*args[1:], kwargs.get("dtype")):
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


Position = tuple[str, int]  # canonical parameter name, row-major index

TOKENS_AT_ONCE = 1024  # default size of a stacked batch; larger ones leave the cache and are slower on a CPU


def exact_importance(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    positions: Iterable[Position],
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> Float64[np.ndarray, " positions"]:
    """|L(θ) − L(θ with θ_j = 0)| for each position, in nats per supervised token: Eq. 1, the unit of the estimates.

    The absolute value of `exact_changes`; see there.
    """
    magnitudes: Float64[np.ndarray, " positions"] = np.abs(
        exact_changes(model, batches, positions, parameters=parameters)
    )
    return magnitudes


def exact_changes(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    positions: Iterable[Position],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> Float64[np.ndarray, " positions"]:
    """L(θ with θ_j = 0) − L(θ) for each position, in nats per supervised token; positive where the weight helped.

    positions: (canonical parameter name, row-major index in the stored tensor).
    parameters: the names' parameters; default all of the language model's.
    tokens_at_once: rows × length of a stacked batch, a bound on memory; at least one ablation runs at a time.
    progress: called with (ablations done, ablations in all), one ablation being one weight on one batch.

    Weights of `nn.Linear` and GPT-2's `Conv1D` are stacked. Any other (stacked experts, embeddings), and any
    parameter that several kinds of module share, is set to zero in place, one at a time, with the layers in front
    still skipped. Losses are subtracted token by token and summed in float64; a float32 model itself resolves about
    1e-7 of a token's loss, so use `model.double()` for weights that matter less.

    The model is in eval mode meanwhile; weights, modes and hooks are as before afterwards, also after an error.
    Raises UserError for a position outside the model and for data without supervised tokens.
    """
    positions = list(positions)
    language_model = find_language_model(model)
    parameters = named_parameters(language_model) if parameters is None else parameters
    for name, index in positions:
        if name not in parameters or not 0 <= index < parameters[name].numel():
            raise UserError(f"The model has no weight {index} of {name}; choose positions inside it.")
    if not batches:
        raise UserError("There are no batches to measure ablations on; check the data and its filters.")
    layers = layers_of(language_model)
    groups = _groups(positions, parameters, _owners(model, parameters.values()), layers)

    changes = np.zeros(len(positions))
    n_tokens, n_done, n_all = 0, 0, len(positions) * len(batches)
    with _eval_mode(model), torch.no_grad(), Float64Throughout():
        for batch in batches:
            starts = {group.layer for group in groups if group.layer is not None}
            base, records = base_pass(model, batch, layers, starts)
            n_tokens += len(base)
            for group in groups:
                copies = max(1, tokens_at_once // batch["labels"].numel()) if group.stackable else 1
                for first in range(0, len(group.members), copies):
                    chunk = group.members[first : first + copies]
                    if group.stackable:
                        ablation = _stacked_ablation(chunk, positions, parameters)
                    else:
                        ablation = _zeroed(parameters[positions[chunk[0].row][0]], positions[chunk[0].row][1])
                    with starting_at(group.layer, layers, records, len(chunk)), ablation:
                        losses, _ = supervised_losses(model, repeated(batch, len(chunk)))
                    differences = losses.view(len(chunk), -1).double() - base.double()
                    changes[[member.row for member in chunk]] += differences.sum(dim=1).cpu().numpy()
                    n_done += len(chunk)
                    if progress is not None:
                        progress(n_done, n_all)
    return changes / n_tokens


def signed_products(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    positions: Iterable[Position],
    *,
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> Float64[np.ndarray, "batches positions"]:
    """θ_j · g_bj of every batch b, not divided by tokens; g_b is the gradient of the sum of its token losses.

    −Σ_b θ_j g_bj / n_tokens is the first-order prediction of `exact_changes`, sign included. Gradients of the
    touched parameters are held all at once. The model is as before afterwards.
    """
    positions = list(positions)
    parameters = named_parameters(find_language_model(model)) if parameters is None else parameters
    rows: dict[str, list[int]] = defaultdict(list)
    for row, (name, _) in enumerate(positions):
        rows[name].append(row)
    touched = [parameters[name] for name in rows]
    flags = [(p, p.requires_grad) for p in {id(p): p for p in [*model.parameters(), *touched]}.values()]
    wanted = {id(p) for p in touched}
    products = np.zeros((len(batches), len(positions)))
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in wanted)
        with _eval_mode(model), torch.enable_grad(), Float64Throughout():
            for number, batch in enumerate(batches):
                losses, _ = supervised_losses(model, batch)
                gradients = torch.autograd.grad(losses.sum(), touched)
                for (name, members), gradient in zip(rows.items(), gradients, strict=True):
                    at = torch.tensor([positions[row][1] for row in members], device=gradient.device)
                    theta = parameters[name].detach().reshape(-1)[at].double()
                    products[number, members] = (theta * gradient.reshape(-1)[at].double()).cpu().numpy()
    finally:
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)
    return products


# ---------------------------------------------------------------------------------------------------------------------
# Which weights run together
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Member:
    row: int  # in `positions`
    modules: tuple[nn.Module, ...]  # that compute with the weight


@dataclass
class _Group:
    """Weights that start at the same layer. layer: None for weights outside the layers, which need a whole pass."""

    layer: int | None
    stackable: bool
    members: list[_Member] = field(default_factory=list)


def _groups(
    positions: Sequence[Position],
    parameters: Mapping[str, nn.Parameter],
    owners: Mapping[int, list[nn.Module]],
    layers: Mapping[int, nn.Module],
) -> list[_Group]:
    layer_of: dict[int, int] = {}
    for number, block in layers.items():
        for module in block.modules():
            layer_of.setdefault(id(module), number)  # the first of the layers that share a module
    groups: dict[tuple[int | None, bool], _Group] = {}
    for row, (name, _) in enumerate(positions):
        modules = owners.get(id(parameters[name]), [])
        places = [layer_of.get(id(module)) for module in modules]
        # A parameter shared by several layers starts at the first of them.
        inside = [place for place in places if place is not None]
        layer = min(inside) if inside and len(inside) == len(places) else None
        stackable = bool(modules) and all(_is_linear(module, parameters[name]) for module in modules)
        stackable &= ".experts." not in name  # a router mixes the copies' tokens before an expert sees them
        group = groups.setdefault((layer, stackable), _Group(layer, stackable))
        group.members.append(_Member(row, tuple(modules)))
    return sorted(groups.values(), key=lambda group: (-1 if group.layer is None else group.layer, group.stackable))


def _owners(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[int, list[nn.Module]]:
    wanted = {id(p) for p in parameters}
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) in wanted:
                owners[id(p)].append(module)
    return owners


def _is_linear(module: nn.Module, weight: nn.Parameter) -> bool:
    known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return known and module.weight is weight


# ---------------------------------------------------------------------------------------------------------------------
# The model with ablations
# ---------------------------------------------------------------------------------------------------------------------
def _stacked_ablation(
    chunk: Sequence[_Member], positions: Sequence[Position], parameters: Mapping[str, nn.Parameter]
) -> Any:
    """Hooks that subtract copy k's own w_ij · x_j from unit i of the linear map it ablates, in copy k only."""
    touched: dict[nn.Module, list[tuple[int, int, int, Tensor]]] = defaultdict(list)
    for copy, member in enumerate(chunk):
        name, index = positions[member.row]
        weight = parameters[name].detach()
        row, column = divmod(index, weight.shape[1])
        for module in member.modules:
            # nn.Linear stores (output, input), Conv1D (input, output)
            unit, source = (row, column) if isinstance(module, nn.Linear) else (column, row)
            touched[module].append((copy, unit, source, weight[row, column]))
    return _hooks(touched, len(chunk))


@contextmanager
def _hooks(touched: Mapping[nn.Module, list[tuple[int, int, int, Tensor]]], n_copies: int) -> Iterator[None]:
    fired: set[nn.Module] = set()

    def subtract(
        copies: list[int],
        units: list[int],
        sources: list[int],
        values: Float[Tensor, " ablations"],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Float[Tensor, "*rows unit"],
    ) -> Float[Tensor, "*rows unit"]:
        fired.add(module)
        x = args[0].reshape(n_copies, -1, args[0].shape[-1])
        y = output.reshape(n_copies, -1, output.shape[-1])
        y[copies, :, units] -= values[:, None] * x[copies, :, sources]  # (ablations, tokens of a copy)
        return y.view(output.shape)

    handles = []
    try:
        for module, ablations in touched.items():
            copies, units, sources, values = (list(column) for column in zip(*ablations, strict=True))
            handles.append(module.register_forward_hook(partial(subtract, copies, units, sources, torch.stack(values))))
        yield
        # An unnoticed bypass of the module would read as "this weight does nothing".
        assert fired == set(touched), "a linear map was not called by the model's forward"
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _zeroed(weight: nn.Parameter, index: int) -> Iterator[None]:
    flat = weight.detach().view(-1)
    value = flat[index].clone()
    try:
        flat[index] = 0
        yield
    finally:
        flat[index] = value


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
