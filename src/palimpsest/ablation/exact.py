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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from palimpsest.ablation.restart import base_pass, repeated, starting_at
from palimpsest.files import UserError
from palimpsest.importance.estimate import evaluating
from palimpsest.models.adapters import require_merged
from palimpsest.models.anatomy import decoder_layers, find_language_model, named_parameters
from palimpsest.models.loss import each_batch, supervised_losses

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


def exact_changes(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    positions: Iterable[Position],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: Callable[[int, int], None] | None = None,
) -> Float64[np.ndarray, " positions"]:
    """L(θ with θ_j = 0) − L(θ) for each position, in nats per supervised token; positive where the weight helped.

    positions: (canonical parameter name, row-major index in the stored tensor).
    tokens_at_once: rows × length of a stacked batch, a bound on memory; at least one ablation runs at a time.
    progress: called with (ablations done, ablations in all), one ablation being one weight on one batch.

    Weights of `nn.Linear` and GPT-2's `Conv1D` are stacked. Any other (stacked experts, embeddings), and any
    parameter that several kinds of module share, is set to zero in place, one at a time, with the layers in front
    still skipped. Losses are subtracted token by token and summed in float64; a float32 model itself resolves about
    1e-7 of a token's loss, so use `model.double()` for weights that matter less.

    The model is in eval mode meanwhile; weights, modes and hooks are as before afterwards, also after an error.
    Raises UserError for a position outside the model, for what is no list of batches, for data without supervised
    tokens, and for a model with active adapters.
    """
    require_merged(model, "are ablated")
    positions = list(positions)
    language_model = find_language_model(model)
    parameters = named_parameters(language_model)
    for name, index in positions:
        if name not in parameters or not 0 <= index < parameters[name].numel():
            raise UserError(f"The model has no weight {index} of {name}; choose positions inside it.")
    batches = list(each_batch(batches))
    if not batches:
        raise UserError("There are no batches to measure ablations on; check the data and its filters.")
    layers = decoder_layers(language_model)
    groups = _groups(model, positions, parameters, layers)

    changes = np.zeros(len(positions))
    n_tokens, n_done, n_all = 0, 0, len(positions) * len(batches)
    with evaluating(model, {}), torch.no_grad(), Float64Throughout():
        for batch in batches:
            base, records = base_pass(model, batch, layers, {layer for layer, _ in groups if layer is not None})
            n_tokens += len(base)
            for (layer, stackable), weights in groups.items():
                copies = max(1, tokens_at_once // batch["labels"].numel()) if stackable else 1
                for first in range(0, len(weights), copies):
                    chunk = weights[first : first + copies]
                    ablation = _stacked_ablation(chunk) if stackable else _zeroed(chunk[0])
                    with starting_at(layer, layers, records, len(chunk)), ablation:
                        losses, _ = supervised_losses(model, repeated(batch, len(chunk)))
                    differences = losses.view(len(chunk), -1).double() - base.double()
                    changes[[weight.row for weight in chunk]] += differences.sum(dim=1).cpu().numpy()
                    n_done += len(chunk)
                    if progress is not None:
                        progress(n_done, n_all)
    return changes / n_tokens


def signed_products(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], positions: Iterable[Position]
) -> Float64[np.ndarray, "batches positions"]:
    """θ_j · g_bj of every batch b, not divided by tokens; g_b is the gradient of the sum of its token losses.

    −Σ_b θ_j g_bj / n_tokens is the first-order prediction of `exact_changes`, sign included. Gradients of the
    touched parameters are held all at once. The model is as before afterwards.
    """
    require_merged(model, "are multiplied")
    positions, batches = list(positions), list(each_batch(batches))
    parameters = named_parameters(find_language_model(model))
    rows: dict[str, list[int]] = defaultdict(list)
    for row, (name, _) in enumerate(positions):
        rows[name].append(row)
    touched = {name: parameters[name] for name in rows}
    products = np.zeros((len(batches), len(positions)))
    with evaluating(model, touched), Float64Throughout():
        for number, batch in enumerate(batches):
            losses, _ = supervised_losses(model, batch)
            gradients = torch.autograd.grad(losses.sum(), list(touched.values()))
            for (name, members), gradient in zip(rows.items(), gradients, strict=True):
                at = torch.tensor([positions[row][1] for row in members], device=gradient.device)
                theta = touched[name].detach().reshape(-1)[at].double()
                products[number, members] = (theta * gradient.reshape(-1)[at].double()).cpu().numpy()
    return products


# ---------------------------------------------------------------------------------------------------------------------
# Which weights run together
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Weight:
    row: int  # in `positions`
    parameter: nn.Parameter
    index: int
    modules: list[nn.Module]  # that compute with it


def _groups(
    model: nn.Module,
    positions: Sequence[Position],
    parameters: Mapping[str, nn.Parameter],
    layers: Mapping[int, nn.Module],
) -> dict[tuple[int | None, bool], list[_Weight]]:
    """The weights by (the layer they start at, whether they can be stacked); layer None: they need a whole pass."""
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)].append(module)
    layer_of: dict[int, int] = {}
    for number, block in layers.items():
        for module in block.modules():
            layer_of.setdefault(id(module), number)  # the first of the layers that share a module
    groups: dict[tuple[int | None, bool], list[_Weight]] = defaultdict(list)
    for row, (name, index) in enumerate(positions):
        modules = owners[id(parameters[name])]
        # A parameter shared by several layers starts at the first of them.
        inside = [layer_of[id(module)] for module in modules if id(module) in layer_of]
        layer = min(inside) if inside and len(inside) == len(modules) else None
        stackable = bool(modules) and all(_is_linear(module, parameters[name]) for module in modules)
        stackable &= ".experts." not in name  # a router mixes the copies' tokens before an expert sees them
        groups[layer, stackable].append(_Weight(row, parameters[name], index, modules))
    return dict(sorted(groups.items(), key=lambda group: (-1 if group[0][0] is None else group[0][0], group[0][1])))


def _is_linear(module: nn.Module, weight: nn.Parameter) -> bool:
    known = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return known and module.weight is weight


# ---------------------------------------------------------------------------------------------------------------------
# The model with ablations
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def _stacked_ablation(chunk: Sequence[_Weight]) -> Iterator[None]:
    """Hooks that subtract copy k's own w_ij · x_j from unit i of the linear map it ablates, in copy k only."""
    touched: dict[nn.Module, list[tuple[int, int, int, Tensor]]] = defaultdict(list)
    for copy, weight in enumerate(chunk):
        row, column = divmod(weight.index, weight.parameter.shape[1])
        for module in weight.modules:
            # nn.Linear stores (output, input), Conv1D (input, output)
            unit, source = (row, column) if isinstance(module, nn.Linear) else (column, row)
            touched[module].append((copy, unit, source, weight.parameter.detach()[row, column]))
    fired: set[nn.Module] = set()

    def subtract(
        module: nn.Module, args: tuple[Any, ...], output: Float[Tensor, "*rows unit"]
    ) -> Float[Tensor, "*rows unit"]:
        fired.add(module)
        copies, units, sources, values = (list(column) for column in zip(*touched[module], strict=True))
        x, y = (tensor.reshape(len(chunk), -1, tensor.shape[-1]) for tensor in (args[0], output))
        # (ablations, tokens of a copy)
        y[copies, :, units] -= torch.stack(values)[:, None] * x[copies, :, sources]
        return y.view(output.shape)

    with ExitStack() as stack:
        for module in touched:
            stack.callback(module.register_forward_hook(subtract).remove)
        yield
        # An unnoticed bypass of the module would read as "this weight does nothing".
        assert fired == set(touched), "a linear map was not called by the model's forward"


@contextmanager
def _zeroed(weight: _Weight) -> Iterator[None]:
    flat = weight.parameter.detach().view(-1)
    value = flat[weight.index].clone()
    try:
        flat[weight.index] = 0
        yield
    finally:
        flat[weight.index] = value
