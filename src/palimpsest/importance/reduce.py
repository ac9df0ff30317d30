"""How the gradients of many batches become one importance per weight, without ever holding all gradients.

A reduction says of which unit it takes gradients (g_b: of a batch's summed token losses; g_s: of one
sequence's), what it adds to a float32 accumulator for each (`fold`), and whether the result is multiplied by
|θ|. The weights stand still, so θ is multiplied once, at the end: Σ_b |θ · g_b| = |θ| · Σ_b |g_b|. The paper
leaves open where in Eq. 2, |θ · ∂L/∂θ|, the sum over the data stands; the metadata of the scores say which
one was used.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from palimpsest.files import UserError
from palimpsest.parallel import local

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor

Unit = Literal["batch", "sequence"]
Offload = Literal["cpu"] | Path | None

# Elements folded at a time. On a CPU a piece stays in the core's cache, twice as fast as whole matrices; on
# every device this bounds the temporaries: float32 copies, absolute values, per-sequence gradients.
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}


@dataclass(frozen=True)
class Reduction:
    """`fold` works in place and element by element, so that it can be given a piece of a weight.

    `fold(total, g)` where `signed`, else `fold(total, |g|)`.
    """

    formula: str
    unit: Unit
    fold: Callable[[Float[Tensor, " piece"], Float[Tensor, " piece"]], object]
    signed: bool = False
    times_weight: bool = True


REDUCTIONS: dict[str, Reduction] = {
    # Eq. 2 with the data set as one loss. Near convergence on its own training data the sum goes to 0.
    "signed_sum": Reduction("|θ · Σ_b g_b| / n_tokens", "batch", lambda total, g: total.add_(g), signed=True),
    # Eq. 2 batch by batch. Depends on how the data are split into batches.
    "per_batch_abs": Reduction("Σ_b |θ · g_b| / n_tokens", "batch", lambda total, g: total.add_(g)),
    # Eq. 2 sequence by sequence, whatever the batches.
    "per_sequence_abs": Reduction("Σ_s |θ · g_s| / n_tokens", "sequence", lambda total, g: total.add_(g)),
    # The diagonal of the empirical Fisher information, the penalty weights of EWC (Kirkpatrick et al., 2017):
    # nats² per token and squared weight unit. Times n_tokens / n_sequences it is the mean over sequences.
    "fisher": Reduction("Σ_s g_s² / n_tokens", "sequence", lambda total, g: total.addcmul_(g, g), times_weight=False),
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


def piece_size(weight: Tensor) -> int:
    """How many elements of this weight to fold at a time."""
    return PIECE.get(weight.device.type, PIECE["cpu"])


class Accumulators:
    """One accumulator per reduction and weight, fed by autograd: float32 (float64 for a float64 weight).

    sums: reduction → name → accumulator in the shape of the weight; on the weight's device, or in host memory
        (offload "cpu"), or in memory-mapped files without a name in the folder `offload`, gone when unused.
    arriving: the units that a gradient which comes through the hook `fold` stands for.
    firings: name → how often its gradient came in the current backward. More than once means that it came in
        parts, and absolute values of parts are not the absolute value of the whole.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], reductions: Mapping[str, Reduction], offload: Offload = None
    ) -> None:
        self.reductions = reductions
        self.sums = {key: _zeros_like(weights, offload) for key in reductions}
        self.arriving: frozenset[Unit] = frozenset(("batch",))
        self.firings: Counter[str] = Counter()
        self._weights = dict(weights)
        self._row = {name: row for row, name in enumerate(weights)}
        self._magnitudes = {
            device: torch.zeros(len(weights), dtype=torch.float64, device=device)
            for device in {w.device for w in weights.values()}
        }

    @property
    def by_sequence(self) -> bool:
        """Whether any of the reductions needs the gradient of every sequence."""
        return any(reduction.unit == "sequence" for reduction in self.reductions.values())

    def fold(self, name: str, weight: Tensor) -> None:
        """Post-accumulate-grad hook: fold weight.grad, of the units `arriving`, and free it at once."""
        if weight.grad is None:
            return  # a linear layer has folded it sequence by sequence, and handed on nothing
        gradient, weight.grad = local(weight.grad).flatten(), None
        for start in range(0, gradient.numel(), piece := piece_size(weight)):
            part = gradient[start : start + piece].to(_precision(weight))
            self._fold_piece(name, start, part, self.arriving)
        self.firings[name] += 1

    def fold_sequences(self, name: str, start: int, gradients: Iterable[Float[Tensor, " piece"]]) -> None:
        """Fold one piece of the gradients of all sequences of a batch, given one after the other and overwritten.

        `start` is the row-major position of the piece. The sequences are summed up beside the accumulator, which
        may be on another device; their sum is the gradient of the batch. Count `firings` yourself.
        """
        batch_gradient: Tensor | None = None
        sums: dict[str, Tensor] = {}
        for gradient in gradients:
            gradient = gradient.to(_precision(gradient))
            if batch_gradient is None:
                batch_gradient = torch.zeros_like(gradient)
                sums = {key: torch.zeros_like(gradient) for key, r in self.reductions.items() if r.unit == "sequence"}
            batch_gradient += gradient
            gradient.abs_()  # in place: with one buffer less, all of them stay in the core's cache
            for key, total in sums.items():
                self.reductions[key].fold(total, gradient)
        assert batch_gradient is not None
        for key, total in sums.items():
            accumulator = self._piece(key, name, start, len(total))
            accumulator += total.to(accumulator.device)
        self._fold_piece(name, start, batch_gradient, frozenset(("batch",)))

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
            for name, weight in self._weights.items():
                flat = weight.detach().flatten()
                for start in range(0, flat.numel(), piece := piece_size(weight)):
                    values = flat[start : start + piece]
                    accumulator = self._piece(key, name, start, len(values)).div_(n_tokens)
                    if reduction.times_weight:
                        accumulator *= values.to(accumulator)
                    accumulator.abs_()
                self.sums[key][name] = self.sums[key][name].float()
        return self.sums

    def _fold_piece(self, name: str, start: int, gradient: Float[Tensor, " piece"], units: frozenset[Unit]) -> None:
        """`gradient` is overwritten: each buffer that is not needed leaves room in the core's cache."""
        wanted = {key: reduction for key, reduction in self.reductions.items() if reduction.unit in units}
        for signed in (True, False):
            these = {key: reduction for key, reduction in wanted.items() if reduction.signed is signed}
            if these and not signed:
                gradient.abs_()
            for key, reduction in these.items():
                accumulator = self._piece(key, name, start, len(gradient))
                reduction.fold(accumulator, gradient.to(accumulator.device))
        if "batch" in units:
            values = self._weights[name].detach().flatten()[start : start + len(gradient)]
            self._magnitudes[gradient.device][self._row[name]] += gradient.mul_(values).abs_().sum()

    def _piece(self, key: str, name: str, start: int, length: int) -> Float[Tensor, " piece"]:
        return self.sums[key][name].view(-1)[start : start + length]


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _zeros_like(weights: Mapping[str, Tensor], offload: Offload) -> dict[str, Tensor]:
    """Accumulators at 0; with a folder, in one sparse file that is already unlinked and vanishes when unused."""
    if not isinstance(offload, Path):
        return {
            name: torch.zeros(w.shape, dtype=_precision(w), device=offload or w.device) for name, w in weights.items()
        }
    offload.mkdir(parents=True, exist_ok=True)
    accumulators: dict[str, Tensor] = {}
    with tempfile.TemporaryFile(dir=offload) as file:
        for name, w in weights.items():
            numbers = np.float64 if _precision(w) == torch.float64 else np.float32
            size = math.prod(w.shape) * np.dtype(numbers).itemsize
            begin = file.seek(0, 2)
            file.truncate(begin + size)
            mapped = np.memmap(file, numbers, "r+", offset=begin, shape=tuple(w.shape))
            accumulators[name] = torch.from_numpy(mapped)
    return accumulators
