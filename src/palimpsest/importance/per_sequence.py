"""The gradient of every sequence of a batch, out of one batched backward.

For a linear map y = x Wᵀ the weight gradient of sequence s is d_sᵀ x_s: its output gradient (time, out) times
its input (time, in), which the backward has at hand anyway. So the linear layers get a backward that forms
these products instead of the one over the whole batch, as many operations in all, folds them one by one, a
piece of the matrix at a time, and hands no gradient on. Padding contributes nothing: no loss depends on it,
its rows of d are 0.

This is right only for a weight that is used by one linear layer, once. Before each backward the autograd graph
shows which are; for all others (embeddings, norms, stacked experts, tied or shared weights) the sequences go
through the model once more, one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from palimpsest.files import UserError
from palimpsest.importance.reduce import Accumulators, piece_size
from palimpsest.models.compute import Arithmetic, computing
from palimpsest.models.loss import IGNORED, describe_ids, supervised_losses

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# (gradients of all sequences for some rows of a parameter, numbers per row) → whether they were wanted
Fold = Callable[[Callable[[slice], "Iterable[Tensor]"], int], bool]

NOT_LINEAR = "not a parameter of a linear layer"
NOT_BY_ROW = "its linear layer does not see the batch as (sequence, time, feature)"


class SequenceGradients:
    """Makes the backward of a batch fold one gradient per sequence, for the weights where that can be.

    For every batch: `expect` before the forward, `settle` between forward and backward, `complete` after.

    one_by_one: name → reason, of the parameters whose sequences had to go through the model one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        accumulators: Accumulators,
        compute: Arithmetic = "float32",
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        self.one_by_one: dict[str, str] = {}
        self._weights = weights
        self._compute = compute
        self._accumulators = accumulators
        self._name_of = {id(weight): name for name, weight in weights.items()}
        self._layers = [
            module
            for module in model.modules()
            if type(module) in (nn.Linear, Conv1D)
            and "forward" not in module.__dict__  # somebody else's forward, such as accelerate's
            and any(id(p) in self._name_of for p in module.parameters(recurse=False))
        ]
        self._rows = 1
        self._uses: Counter[str] = Counter()  # name → how often the forward used the parameter
        self._split: set[str] = set()  # names whose gradients the backward is to give sequence by sequence
        self._given: set[str] = set()  # … and has

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within, the linear layers compute by `_SequenceLinear`; afterwards they are as before."""
        try:
            for layer in self._layers:
                layer.forward = partial(self._forward, layer, layer.forward)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)

    def expect(self, batch: Mapping[str, Any]) -> None:
        """Take note of the number of sequences. The gradient of a batch of one is that of its sequence."""
        self._rows = len(batch["labels"])
        self._accumulators.arriving = frozenset(("batch", "sequence") if self._rows == 1 else ("batch",))
        self._uses, self._split, self._given = Counter(), set(), set()

    def settle(self, losses: Tensor) -> None:
        """Find in the autograd graph the parameters that are used once, and by a linear layer of ours."""
        ours: Counter[str] = Counter()
        seen: set[Any] = set()
        open_nodes: list[Any] = [losses.grad_fn] if self._rows > 1 else []
        while open_nodes:
            node = open_nodes.pop()
            for following, _ in node.next_functions:
                name = self._name_of.get(id(getattr(following, "variable", None)))
                if name is not None:
                    self._uses[name] += 1
                    ours[name] += getattr(type(node), "_forward_cls", None) is _SequenceLinear
                if following is not None and following not in seen:
                    seen.add(following)
                    open_nodes.append(following)
        self._split = {name for name, uses in self._uses.items() if uses == ours[name] == 1}

    def complete(self, model: nn.Module, batch: Mapping[str, Any], arrived: Iterable[str]) -> None:
        """One by one, the sequences of a batch for those `arrived` parameters that came for all of it at once."""
        names = [name for name in arrived if name not in self._given]
        if self._rows == 1 or not names:
            return
        for name in names:
            self.one_by_one.setdefault(name, self._reason(name))
        frozen = [weight for name, weight in self._weights.items() if name not in names]
        try:
            for weight in frozen:
                weight.requires_grad_(False)
            for row in (batch["labels"][:, 1:] != IGNORED).any(dim=1).nonzero().flatten().tolist():
                one = _row_of(batch, row)
                self.expect(one)
                self._accumulators.arriving = frozenset(("sequence",))  # the batch has been counted
                with computing(self._compute, one["labels"].device):
                    losses, _ = supervised_losses(model, one)
                torch.autograd.backward(losses.sum())
                require_whole(self._accumulators.take_batch()[1])
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    def _reason(self, name: str) -> str:
        if not any(p is self._weights[name] for layer in self._layers for p in layer.parameters(recurse=False)):
            return NOT_LINEAR
        return f"used {self._uses[name]} times in one forward" if self._uses[name] > 1 else NOT_BY_ROW

    def _forward(self, layer: Any, plain: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        by_row = input.ndim == 3 and len(input) == self._rows > 1
        if not by_row:
            return plain(input)
        # Rounded inside, not before: the graph then leads from the layer to its parameters themselves (see `settle`).
        kind = input.device.type
        rounded = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        apply: Any = _SequenceLinear.apply
        transposed = not isinstance(layer, nn.Linear)
        output: Tensor = apply(input, layer.weight, layer.bias, transposed, self._folds(layer), rounded)
        return output

    def _folds(self, layer: Any) -> tuple[Fold, Fold]:
        """For the weight and the bias of a layer."""
        weight, bias = (partial(self._fold, self._name_of.get(id(p))) for p in (layer.weight, layer.bias))
        return weight, bias

    def _fold(self, name: str | None, gradients: Callable[[slice], Iterable[Tensor]], width: int) -> bool:
        """Fold the gradients of all sequences for one parameter, some of its rows (`width` numbers each) at a time.

        False, and nothing is done, if the parameter is not one whose gradient is to be split.
        """
        if name is None or name not in self._split:
            return False
        weight = self._weights[name]
        step = max(1, piece_size(weight) // width)
        for first in range(0, len(weight), step):
            self._accumulators.fold_sequences(name, first * width, gradients(slice(first, first + step)))
        self._accumulators.firings[name] += 1
        self._given.add(name)
        return True


class _SequenceLinear(torch.autograd.Function):
    """y = x Wᵀ + b, or x W + b for the transposed weight of a Conv1D; its backward gives gradients by sequence.

    `rounded`: the dtype that autocast rounds input, weight and bias to. The gradients of sequences are then formed of
    rounded factors in float32. Under gradient checkpointing the input is recomputed like that of any operation, and
    backward runs once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "sequence time in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        transposed: bool,
        folds: tuple[Fold, Fold],
        rounded: torch.dtype | None,
    ) -> Float[Tensor, "sequence time out"]:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        if rounded is not None:
            x, weight = x.to(rounded), weight.to(rounded)
            bias = None if bias is None else bias.to(rounded)
        ctx.save_for_backward(x, weight)
        # Under checkpointing the saved weight comes back as another tensor object; hence no look-up by identity.
        ctx.transposed, ctx.folds = transposed, folds
        return nn.functional.linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Float[Tensor, "sequence time out"]) -> Any:
        x, weight = ctx.saved_tensors
        fold_weight, fold_bias = ctx.folds
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        x_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (d @ (weight.T if ctx.transposed else weight)).to(x_dtype)
        # Weights of float32 have gradients of float32, also where the factors were rounded.
        x, d = x.to(weight_dtype), d.to(weight_dtype)
        left, right = (x, d) if ctx.transposed else (d, x)  # the gradient of sequence s is left[s]ᵀ right[s]
        if ctx.needs_input_grad[1] and not fold_weight(
            lambda rows: ((left[s, :, rows].T @ right[s]).flatten() for s in range(len(x))),
            right.shape[2],
        ):
            weight_gradient = left.flatten(0, 1).T @ right.flatten(0, 1)
        if ctx.needs_input_grad[2] and not fold_bias(lambda rows: (d[s, :, rows].sum(dim=0) for s in range(len(x))), 1):
            bias_gradient = d.sum(dim=(0, 1)).to(bias_dtype)
        return x_gradient, weight_gradient, bias_gradient, None, None, None


def require_whole(firings: Counter[str]) -> None:
    """Raise UserError if a gradient came in parts within one backward."""
    for name, parts in firings.items():
        if parts > 1:
            raise UserError(
                f"The gradient of {name} came in {parts} parts within one backward, so its absolute "
                "value would be wrong; use non-re-entrant gradient checkpointing (use_reentrant=False)."
            )


def _row_of(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The batch of one sequence. Raises UserError if a tensor of the batch is not made of rows."""
    rows = len(batch["labels"])
    one: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.ndim and len(value) != rows:
            raise UserError(
                f"{key!r} of the batch{describe_ids(batch)} has {len(value)} rows for {rows} sequences, so its "
                "sequences cannot be scored one by one; give batches of one sequence."
            )
        cut = key == "ids" or (isinstance(value, torch.Tensor) and value.ndim > 0)
        one[key] = value[row : row + 1] if cut else value
    return one
