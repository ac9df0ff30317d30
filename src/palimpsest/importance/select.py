"""Exact selection of the top, the bottom or a random share of all weights.

The bits of non-negative float32 numbers, read as integers, are ordered like the numbers. A first pass counts
the upper 16 bits of all scores, a second the lower 16 bits of those whose upper half is the threshold's; the
threshold is then exact, and a last pass marks the weights. Nothing is sorted or gathered: memory beside the
mask does not depend on the number of weights, and lazy scores are read from disk tensor by tensor.

Of sharded scores every rank counts its own part, and the counts are summed over the ranks: the same masks as of one
process, ties included, on every rank. What is exchanged: 1 MB of counts per group, and the mask's bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from palimpsest.files import UserError
from palimpsest.importance.layouts import GatheredTensors
from palimpsest.importance.mask import Mask, Overlap, overlap
from palimpsest.models.anatomy import layer_index

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64, UInt32
    from torch import Tensor

__all__ = ["Mask", "Overlap", "overlap", "select"]

Which = Literal["top", "bottom", "random"]
Scope = Literal["global", "per_layer", "per_matrix"]
Counted = dict[tuple[str, ...], "Int64[np.ndarray, ' half']"]  # of a group of names, its scores by their upper 16 bits

PIECE = 1 << 20  # scores at a time; a multiple of 8, so that every piece begins at a byte of the mask
HALF = 1 << 16  # values that 16 bits can take
INFINITY = 0x7F80  # upper 16 bits of +inf; NaN and negative numbers lie above


def select(
    scores: Mapping[str, Float32[Tensor, "*weight"]],
    ratio: float,
    which: Which = "top",
    scope: Scope = "global",
    seed: int = 0,
    counted: Counted | None = None,
) -> Mask:
    """The mask of the k = round(ratio · N) weights with the highest or lowest scores, or of k random ones.

    N counts all weights (scope "global"), those of one layer ("per_layer"; weights outside the layers are
    one more group) or of one matrix ("per_matrix"); exact halves are rounded to even. Among equal scores the
    first are taken, by the order of names in `scores`, then by position: for "top" and for "bottom" alike.
    "random" draws without replacement, every set of k weights equally likely; the draw depends on `seed`, the
    names' order and the shapes, not on scores or device.

    counted: one dictionary, at first empty, for several selections from the same scores: the first pass over them is
        then made once.

    Scores of a sharded model (`estimate_importance(…, distributed=True)`): call it on every rank; each gets the mask.

    Raises UserError for a ratio outside [0, 1] and for a NaN, infinite or negative score, naming the tensor.
    """
    if not 0.0 <= ratio <= 1.0:
        raise UserError(f"The ratio {ratio} is not a share of the weights; choose one from 0 to 1.")
    for value, allowed in (
        (which, ("top", "bottom", "random")),
        (scope, ("global", "per_layer", "per_matrix")),
    ):
        if value not in allowed:
            raise UserError(f"{value!r} is not a way to select weights; choose among {', '.join(allowed)}.")

    about = {"which": which, "ratio": ratio, "scope": scope, "seed": seed if which == "random" else None}
    sharded = scores if isinstance(scores, GatheredTensors) else None
    mask = Mask.empty(sharded.shapes if sharded else {name: tuple(scores[name].shape) for name in scores}, about)
    generator = np.random.default_rng(seed)
    for names in _groups(mask.names, scope):
        k = round(ratio * sum(math.prod(mask.shapes[name]) for name in names))
        if which == "random":
            _mark_random(mask, names, k, generator)
        else:
            parts = sharded.parts if sharded else scores
            _mark_extreme(mask, names, k, parts, sharded, {} if counted is None else counted, top=which == "top")
    if sharded and which != "random":  # every rank has marked its own part; no bit is marked by two
        for bits in mask.packed.values():
            bits[:] = sharded.sum(bits)
    return mask


def _groups(names: tuple[str, ...], scope: Scope) -> list[list[str]]:
    """The sets of parameters within each of which k weights are selected; names in order."""
    groups: dict[object, list[str]] = {}
    for name in names:
        key = {"global": None, "per_layer": layer_index(name), "per_matrix": name}[scope]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------
# Top and bottom: radix select
# ------------------------------------------------------------------------------------------------------------
def _mark_extreme(
    mask: Mask,
    names: list[str],
    k: int,
    scores: Mapping[str, Tensor],
    sharded: GatheredTensors | None,
    counted: Counted,
    *,
    top: bool,
) -> None:
    """Mark the k highest (top) or lowest scores of the named tensors; of sharded ones, those in this rank's parts."""
    first = {name: sharded.start(name) if sharded else 0 for name in names}  # position where `scores` begins

    def total(mine: Int64[np.ndarray, " counts"]) -> Int64[np.ndarray, " counts"]:
        return sharded.sum(mine) if sharded else mine

    if tuple(names) not in counted:
        upper = np.zeros(HALF, dtype=np.int64)
        unsound = np.zeros(len(names), dtype=np.int64)
        for row, name in enumerate(names):
            counts = np.zeros(HALF, dtype=np.int64)
            for _, bits in _pieces(name, scores[name], first[name]):
                counts += np.bincount(bits >> 16, minlength=HALF)
            unsound[row] = counts[INFINITY:].sum()
            upper += counts
        for bad in np.flatnonzero(total(unsound)):
            raise UserError(
                f"The scores of {names[bad]} hold a NaN, infinite or negative number; importance is finite and "
                "not negative, so estimate it again."
            )
        counted[tuple(names)] = total(upper)
    if k == 0:
        return
    upper_half, k_inside = _bin_of_rank(counted[tuple(names)], k, top)

    lower = np.zeros(HALF, dtype=np.int64)
    for name in names:
        for _, bits in _pieces(name, scores[name], first[name]):
            inside = bits[bits >> 16 == upper_half]
            lower += np.bincount(inside & (HALF - 1), minlength=HALF)
    lower_half, n_ties = _bin_of_rank(total(lower), k_inside, top)

    threshold = np.uint32(upper_half << 16 | lower_half)
    quota = _tie_quota(names, scores, first, threshold, n_ties, sharded) if sharded else {}
    for name in names:
        n_ties = quota.get(name, n_ties)
        for start, bits in _pieces(name, scores[name], first[name]):
            flags = bits > threshold if top else bits < threshold
            if n_ties:  # of the scores equal to the threshold, the first n_ties are still to be taken
                ties = np.flatnonzero(bits == threshold)[:n_ties]
                flags[ties] = True
                n_ties -= len(ties)
            if start % 8:  # a part that begins inside a byte; the bits before belong to another rank
                flags = np.concatenate([np.zeros(start % 8, np.bool_), flags])
            mask.mark(name, start - start % 8, flags)


def _tie_quota(
    names: list[str],
    scores: Mapping[str, Tensor],
    first: Mapping[str, int],
    threshold: np.uint32,
    n_ties: int,
    sharded: GatheredTensors,
) -> dict[str, int]:
    """How many scores equal to the threshold this rank takes of each tensor.

    n_ties are taken in the order of names, then of positions; and positions go up with the ranks of the parts.
    """
    mine = np.array(
        [sum(int((bits == threshold).sum()) for _, bits in _pieces(n, scores[n], first[n])) for n in names],
        dtype=np.int64,
    )
    ties = sharded.by_rank(mine)  # (rank, name)
    before = np.cumsum(ties.T).reshape(ties.T.shape).T - ties
    allowed = np.clip(n_ties - before, 0, ties)
    rank = sharded.rank
    return {name: int(allowed[rank, i]) for i, name in enumerate(names)}


def _bin_of_rank(counts: Int64[np.ndarray, " half"], k: int, top: bool) -> tuple[int, int]:
    """The bin holding the k-th element (1-based) from the top or the bottom, and its rank within that bin."""
    ordered = counts[::-1] if top else counts
    cumulated = np.cumsum(ordered)
    position = int(np.searchsorted(cumulated, k))  # first bin with at least k elements up to and including it
    rank = k - int(cumulated[position] - ordered[position])
    return (HALF - 1 - position if top else position), rank


def _pieces(
    name: str, tensor: Float32[Tensor, "*weight"], first: int = 0
) -> Iterator[tuple[int, UInt32[np.ndarray, " piece"]]]:
    """(position of its first score, the scores' bits) of each piece, row-major; `first`: the tensor's own position.

    Positions are multiples of 8, the very first one excepted.
    """
    if tensor.dtype != torch.float32:
        raise UserError(f"The scores of {name} are {tensor.dtype}; keep importance in float32.")
    values = tensor.detach().cpu().contiguous().flatten().numpy()
    for end in range(PIECE - first % 8, len(values) + PIECE, PIECE):
        start = max(0, end - PIECE)
        if len(piece := values[start:end]):
            yield first + start, (piece + np.float32(0)).view(np.uint32)  # + 0: −0 becomes 0


# ------------------------------------------------------------------------------------------------------------
# Random
# ------------------------------------------------------------------------------------------------------------
def _mark_random(mask: Mask, names: list[str], k: int, generator: np.random.Generator) -> None:
    """Mark k weights of the named tensors, drawn uniformly: first how many in each piece, then which."""
    pieces = [
        (name, start, min(PIECE, math.prod(mask.shapes[name]) - start))
        for name in names
        for start in range(0, math.prod(mask.shapes[name]), PIECE)
    ]
    counts = _random_counts(np.array([size for *_, size in pieces], dtype=np.int64), k, generator)
    for (name, start, size), count in zip(pieces, counts, strict=True):
        flags = np.zeros(size, dtype=np.bool_)
        flags[generator.choice(size, count, replace=False, shuffle=False)] = True
        mask.mark(name, start, flags)


def _random_counts(
    sizes: Int64[np.ndarray, " pieces"], k: int, generator: np.random.Generator
) -> Int64[np.ndarray, " pieces"]:
    """How many of k uniformly drawn elements fall in each piece: multivariate hypergeometric, of any total.

    numpy's own stops at 10^9. Here elements are drawn independently, with a probability a little above k / N:
    given how many came, they are a uniform sample. What came in excess of k is taken away again uniformly.
    """
    probability = min(1.0, (k + 8 * math.sqrt(k) + 8) / max(1, int(sizes.sum())))  # 8 σ above
    counts = generator.binomial(sizes, probability)
    while counts.sum() < k:
        counts = generator.binomial(sizes, probability)
    drawn = int(counts.sum())
    excess = generator.choice(drawn, drawn - k, replace=False, shuffle=False)  # indices among the drawn
    piece = np.searchsorted(np.cumsum(counts), excess, side="right")
    result: Int64[np.ndarray, " pieces"] = counts - np.bincount(piece, minlength=len(sizes))
    return result
