"""A set of weights: one packed bit each, under canonical parameter names; and how far two sets overlap."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from palimpsest.files import UserError, replacing

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8
    from torch import Tensor

Bits = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Mask:
    """Which weights of the named parameters are meant.

    shapes: name → shape of the parameter, in model order.
    packed: name → uint8 (⌈weights / 8⌉,), np.packbits of the row-major flags; the last byte is padded with 0.
    about: how the mask was made (JSON values).
    """

    shapes: Mapping[str, tuple[int, ...]]
    packed: Mapping[str, UInt8[np.ndarray, " bytes"]]
    about: dict[str, Any]

    @classmethod
    def empty(cls, shapes: Mapping[str, tuple[int, ...]], about: Mapping[str, Any] | None = None) -> Mask:
        """No weight marked yet."""
        packed = {name: np.zeros(-(-math.prod(shape) // 8), np.uint8) for name, shape in shapes.items()}
        return cls(dict(shapes), packed, dict(about or {}))

    @classmethod
    def from_tensors(cls, flags: Mapping[str, Bool[Tensor, "*weight"]], about: Mapping[str, Any] | None = None) -> Mask:
        """From boolean tensors in the shapes of the parameters."""
        mask = cls.empty({name: tuple(flag.shape) for name, flag in flags.items()}, about)
        for name, flag in flags.items():
            mask.mark(name, 0, flag.cpu().flatten().numpy())
        return mask

    def mark(self, name: str, start: int, flags: Bool[np.ndarray, " piece"]) -> None:
        """Set the flags from row-major position `start` (a multiple of 8) on; later ones stay as they are."""
        if start % 8:
            raise ValueError(f"start {start} is not a multiple of 8")
        bits = np.packbits(flags)
        self.packed[name][start // 8 : start // 8 + len(bits)] = bits

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def n_weights(self) -> int:
        """All weights, marked or not."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def counts(self) -> dict[str, int]:
        """Marked weights of each parameter."""
        return {name: int(np.bitwise_count(bits).sum(dtype=np.int64)) for name, bits in self.packed.items()}

    @property
    def shares(self) -> dict[str, float]:
        """Marked share of each parameter. Far above the ratio in a few parameters, a mask is not spread out."""
        return {name: _ratio(count, math.prod(self.shapes[name])) for name, count in self.counts.items()}

    @property
    def count(self) -> int:
        """Marked weights."""
        return sum(self.counts.values())

    def tensor(self, name: str) -> Bool[Tensor, "*weight"]:
        """The flags of one parameter, in its shape, on the CPU."""
        shape = self.shapes[name]
        flags = np.unpackbits(self.packed[name], count=math.prod(shape)).view(np.bool_)
        return torch.from_numpy(flags).reshape(shape)

    def __and__(self, other: Mask) -> Mask:
        """Marked in both."""
        return self._combine(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        """Marked in one or both."""
        return self._combine(other, np.bitwise_or)

    def __sub__(self, other: Mask) -> Mask:
        """Marked here and not in the other."""
        return self._combine(other, lambda a, b: a & ~b)

    def _combine(self, other: Mask, operation: Callable[[Bits, Bits], Bits]) -> Mask:
        self.check_shapes(other.shapes, "the other mask")
        other.check_shapes(self.shapes, "the other mask")
        packed = {name: operation(bits, other.packed[name]) for name, bits in self.packed.items()}
        return Mask(self.shapes, packed, {})

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], owner: str) -> None:
        """Raise UserError unless `shapes` has every parameter of the mask, in the same shape."""
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise UserError(f"The mask has {name}, {owner} does not; use a mask made for this model.")
            if tuple(shapes[name]) != shape:
                raise UserError(
                    f"{name} has shape {shape} in the mask and {tuple(shapes[name])} in {owner}; "
                    "use a mask made for this model."
                )

    def save(self, path: Path) -> None:
        """One safetensors file, written under a temporary name, then renamed."""
        header = {"shapes": {name: list(shape) for name, shape in self.shapes.items()}, "about": self.about}
        with replacing(Path(path)) as temporary:
            save_file(dict(self.packed), temporary, metadata={"mask": json.dumps(header)})

    @classmethod
    def open(cls, path: Path) -> Mask:
        """Read a saved mask. Raises UserError if the file is missing, damaged or no mask."""
        try:
            with safe_open(path, framework="np") as file:
                header = json.loads((file.metadata() or {})["mask"])
                shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
                packed = {name: file.get_tensor(name) for name in shapes}
        except FileNotFoundError as error:
            raise UserError(f"The mask {path} does not exist; select the weights first.") from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged or not a mask ({error}); select the weights again.") from error
        return cls(shapes, packed, header["about"])


@dataclass(frozen=True)
class Overlap:
    """How far two masks mark the same weights, beside what independent random masks of their sizes give.

    jaccard_by_chance is the Jaccard index at the expected number of shared weights, |a|·|b| / N.
    """

    shared: int
    share: float  # of a's weights that b has too; NaN if a is empty
    share_by_chance: float
    jaccard: float  # NaN if both are empty
    jaccard_by_chance: float


def overlap(a: Mask, b: Mask) -> Overlap:
    """Compare two masks of the same parameters; raises UserError if they are not."""
    shared, n_a, n_b, n = (a & b).count, a.count, b.count, a.n_weights
    expected = n_a * n_b / n if n else math.nan
    return Overlap(
        shared=shared,
        share=_ratio(shared, n_a),
        share_by_chance=_ratio(n_b, n),
        jaccard=_ratio(shared, n_a + n_b - shared),
        jaccard_by_chance=_ratio(expected, n_a + n_b - expected),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
