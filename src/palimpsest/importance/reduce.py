"""How the gradients of many batches become one importance per weight, without ever holding all gradients.

A reduction is a pair of steps over θ·g_b, where g_b is the gradient of batch b's summed token losses: `fold`
adds a batch to a float32 accumulator, `finish` turns the accumulator into the score. The paper leaves open
where in Eq. 2, |θ · ∂L/∂θ|, the sum over the data stands; the metadata of the scores say which one was used.

Per-sequence importance is `per_batch_abs` on batches of one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from palimpsest.rundir import UserError

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor

# Elements folded at a time. On a CPU a piece stays in the core's cache, twice as fast as whole matrices; on
# every device this bounds the float32 copy of a bfloat16 gradient.
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}


@dataclass(frozen=True)
class Reduction:
    """Both steps work in place and element by element, so that they can be given a piece of a weight."""

    formula: str
    fold: Callable[[Float[Tensor, " piece"], Float[Tensor, " piece"]], object]  # (accumulator, θ·g_b)
    finish: Callable[[Float[Tensor, "*weight"], int], object]  # (accumulator, n_tokens)


REDUCTIONS: dict[str, Reduction] = {
    # Eq. 2 with the data set as one loss. Near convergence on its own training data the sum goes to 0.
    "signed_sum": Reduction(
        formula="|θ · Σ_b g_b| / n_tokens",
        fold=lambda accumulator, product: accumulator.add_(product),
        finish=lambda accumulator, n_tokens: accumulator.abs_().div_(n_tokens),
    ),
    # Eq. 2 batch by batch. Depends on how the data are split into batches.
    "per_batch_abs": Reduction(
        formula="Σ_b |θ · g_b| / n_tokens",
        fold=lambda accumulator, product: accumulator.add_(product.abs()),
        finish=lambda accumulator, n_tokens: accumulator.div_(n_tokens),
    ),
}


def chosen_reductions(names: Iterable[str]) -> dict[str, Reduction]:
    """The named reductions, in the order given. Raises UserError for an unknown name, or none at all."""
    names = list(names)
    for name in names:
        if name not in REDUCTIONS:
            raise UserError(f"{name!r} is not a reduction; choose among {', '.join(REDUCTIONS)}.")
    if not names:
        raise UserError(f"No reduction was asked for; choose among {', '.join(REDUCTIONS)}.")
    return {name: REDUCTIONS[name] for name in names}


class Accumulators:
    """One float32 accumulator per reduction and weight, on the weight's device, fed by autograd.

    sums: reduction → name → accumulator in the shape of the weight.
    firings: name → how often its gradient came in the current batch. More than once means that g_b came in
        parts, and absolute values of parts are not the absolute value of the whole.
    """

    def __init__(self, weights: Mapping[str, Tensor], reductions: Mapping[str, Reduction]) -> None:
        self.reductions = reductions
        self.sums = {
            key: {name: torch.zeros(w.shape, dtype=torch.float32, device=w.device) for name, w in weights.items()}
            for key in reductions
        }
        self.firings: Counter[str] = Counter()
        self._row = {name: row for row, name in enumerate(weights)}
        self._magnitudes = {
            device: torch.zeros(len(weights), dtype=torch.float64, device=device)
            for device in {w.device for w in weights.values()}
        }

    def fold(self, name: str, weight: Tensor) -> None:
        """Post-accumulate-grad hook: fold weight.grad into every accumulator and free it at once."""
        assert weight.grad is not None
        gradient, weight.grad = weight.grad, None
        piece = PIECE.get(weight.device.type, PIECE["cpu"])
        weights = torch.split(weight.detach().flatten(), piece)
        gradients = torch.split(gradient.flatten(), piece)
        targets = [
            (reduction.fold, torch.split(self.sums[key][name].view(-1), piece))
            for key, reduction in self.reductions.items()
        ]
        magnitude = self._magnitudes[weight.device][self._row[name]]
        for i in range(len(weights)):
            product = weights[i].float() * gradients[i].float()
            for fold_into, accumulators in targets:
                fold_into(accumulators[i], product)
            magnitude += product.abs_().sum()
        self.firings[name] += 1

    def take_batch(self) -> tuple[Float64[Tensor, " weights"], Counter[str]]:
        """Σ_j |θ_j · g_bj| of every weight and the firings of the batch that just ended; both start anew."""
        totals = torch.zeros(len(self._row), dtype=torch.float64)
        for magnitudes in self._magnitudes.values():
            totals += magnitudes.cpu()
            magnitudes.zero_()
        firings, self.firings = self.firings, Counter()
        return totals, firings

    def finish(self, n_tokens: int) -> dict[str, dict[str, Tensor]]:
        """The scores, in place of the accumulators: reduction → name → non-negative float32."""
        for key, reduction in self.reductions.items():
            for accumulator in self.sums[key].values():
                reduction.finish(accumulator, n_tokens)
        return self.sums
