"""A part of what training changed: W = base + scale · (tuned − base), in all of the language model or in some layers.

    blend.json   of which method, how much, in which layers; base and method by name and fingerprint

No weights are written: they are made when they are needed, of the base and of the method's own checkpoint, so that many
points of one training run cost nothing but their evaluation (WiSE-FT, Wortsman et al. 2022). The adaptor is the
method's. With scale 0 in some layers these are the base's again, and all else is as training left it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError, read_json, write_json
from palimpsest.models.anatomy import layer_index, named_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "blend.json"


@dataclass(frozen=True)
class Blend:
    """The contents of blend.json."""

    language_model: str  # the base, as for `load_language_model`
    base: str  # its fingerprint
    method: str  # the training run, or given model, whose update is taken in part
    checkpoint: str | None  # where it is, if it was given; None: METHOD/checkpoint in the same run directory
    fingerprint: str  # of that checkpoint
    scale: float
    layers: tuple[int, ...] | None = None  # those that are scaled, all else is the method's; None: everything
    norm_of: str | None = None  # the training run to whose norm the update was brought
    norms: tuple[float, float] | None = None  # ‖ΔW‖ of that one and of `method`, over the scored weights

    def scale_of(self, name: str) -> float:
        """Of a parameter, by its canonical name."""
        return self.scale if self.layers is None or layer_index(name) in self.layers else 1.0


def is_blend(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_blend(folder: Path) -> Blend:
    """Raises UserError for a damaged file."""
    values = read_json(folder / FILE)
    try:
        tuples = {key: None if values[key] is None else tuple(values[key]) for key in ("layers", "norms")}
        return Blend(**{**values, **tuples})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / FILE} is damaged or of another version of palimpsest ({type(error).__name__}: {error}); run "
            "the study again."
        ) from error


def write_blend(folder: Path, blend: Blend) -> None:
    write_json(folder / FILE, asdict(blend))


def source_of(folder: Path) -> str:
    """The model that the blend in `folder` takes a part of, as for `load_speech_lm`."""
    blend = read_blend(folder)
    return blend.checkpoint or str(folder.absolute().parents[1] / blend.method / "checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------
def mixed(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """base + scale · (tuned − base), formed in float32 and rounded once to the type of `tuned`.

    0 gives the base and 1 the tuned to the bit, which the formula in floating point would not.
    """
    import torch

    if scale == 1.0:
        return tuned
    if scale == 0.0:
        return base.to(tuned.dtype)
    wide = torch.promote_types(tuned.dtype, torch.float32)
    before = base.to(wide)
    return (before + (tuned.to(wide) - before) * scale).to(tuned.dtype)


def blend_into(tuned: nn.Module, base: nn.Module, blend: Blend) -> None:
    """Change the language model `tuned` in place into the blend of `base` and itself: every floating weight.

    Raises UserError for models that are not of the same names and shapes.
    """
    import torch

    before, after = _tensors(base), _tensors(tuned)
    differing = [name for name in {**before, **after} if _shape(before, name) != _shape(after, name)]
    if differing:
        raise UserError(
            f"{blend.method} cannot be blended with {blend.language_model}: {differing[0]} is not the same in both; "
            "name a method whose language model has the base's names and shapes."
        )
    with torch.no_grad():
        for name, tensor in after.items():
            scale = blend.scale_of(name)
            if scale != 1.0 and tensor.is_floating_point():
                tensor.copy_(mixed(before[name].to(tensor.device), tensor, scale))


def _tensors(language_model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each tied one once, and the buffers that a checkpoint has."""
    stored = language_model.state_dict().keys()
    buffers = {name: buffer for name, buffer in language_model.named_buffers() if name in stored}
    return {**named_parameters(language_model), **buffers}


def _shape(tensors: Mapping[str, Tensor], name: str) -> Any:
    return tensors[name].shape if name in tensors else None


class BlendedWeights(Mapping[str, "Tensor"]):
    """The weights that `blend_into` would give, by canonical name, each made on access."""

    def __init__(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], blend: Blend) -> None:
        self._base, self._tuned, self._blend = base, tuned, blend

    def __getitem__(self, name: str) -> Tensor:
        scale = self._blend.scale_of(name)
        if scale == 1.0:
            return self._tuned[name]
        return mixed(self._base[name], self._tuned[name], scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tuned)

    def __len__(self) -> int:
        return len(self._tuned)


def update_norm(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> float:
    """‖tuned − base‖ over all weights of `base`, summed in float64."""
    import torch

    squares = (
        float(torch.linalg.vector_norm(tuned[name].float() - base[name].float(), dtype=torch.float64)) ** 2
        for name in base
    )
    return float(sum(squares) ** 0.5)


def matching_scale(norms: tuple[float, float], norm_of: str, of: str) -> float:
    """The scale that brings an update to the norm of another; norms: of the other, and of the one that is scaled.

    Raises UserError for an update of norm 0.
    """
    wanted, own = norms
    if not own > 0:
        raise UserError(f"{of} changed no weight, so its update cannot be brought to the norm of {norm_of}'s.")
    return wanted / own
