"""The deactivation experiment (Table 1): perplexity with the top, bottom or random weights set to zero.

At several ratios it gives deletion curves: how the loss grows as more and more weights are removed. A curve's area says
in one number how well a ranking separates weights that matter from weights that do not, without the choice of a ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.evaluation.perplexity import perplexity
from palimpsest.files import UserError
from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.mask import Mask
from palimpsest.importance.select import Counted, select
from palimpsest.models.compute import Arithmetic
from palimpsest.parallel import by_ranks, world_size
from palimpsest.records import DeactivationRecord, Scope

if TYPE_CHECKING:
    from torch import Tensor, nn

Batches = Callable[[], Iterable[Mapping[str, Any]]]
Condition = Literal["base", "top", "bottom", "random"]


def deletion_curve(
    name: str,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    data: Mapping[str, Batches],
    *,
    ratios: Sequence[float],
    scopes: Sequence[Scope] = ("global",),
    random_seeds: Sequence[int] = (0,),
    reduction: str,
    progress: Callable[[int, int], None] | None = None,
    compute: Arithmetic = "float32",
    distributed: bool = False,
) -> list[DeactivationRecord]:
    """One record per scope, ratio, condition (random: and seed) and modality, after the base's.

    The unchanged model is measured once; its records stand in every scope, so that each scope's rows are complete.

    Args:
        name: what the records call the model.
        model: in eval mode; its weights are afterwards what they were, bit for bit.
        tensors: importance by canonical name, of the `reduction` the records name.
        data: modality → function that yields the same batches at every call.
        ratios: shares of the scored weights to zero, within each scope.
        compute: the arithmetic of the forward passes.
        distributed: every rank calls, with a replica of the model; each takes its share of the conditions, whole, so
            that selecting their weights is divided too. Every rank has the records of all.

    Raises UserError for ratios that are not between 0 and 1 or not ascending.
    """
    if not ratios or any(not 0 < ratio <= 1 for ratio in ratios) or sorted(set(ratios)) != list(ratios):
        raise UserError(
            f"The ratios {', '.join(map(str, ratios))} are no ascending shares above 0 and up to 1; "
            "give for example 0.0001,0.001,0.01,0.1."
        )
    each: list[tuple[Condition, int | None]] = [("top", None), ("bottom", None)]
    each += [("random", seed) for seed in random_seeds]
    wanted: list[tuple[Scope, float, Condition, int | None]] = [(scopes[0], 0.0, "base", None)]
    wanted += [(scope, ratio, *condition) for scope in scopes for ratio in ratios for condition in each]
    total = len(wanted) * len(data)
    ranks, done = world_size() if distributed else 1, 0
    counted: Counted = {}

    def measure(which: tuple[Scope, float, Condition, int | None]) -> list[DeactivationRecord]:
        """A record for each modality."""
        nonlocal done
        scope, ratio, condition, seed = which
        records: list[DeactivationRecord] = []
        mask = Mask.empty({}) if condition == "base" else select(tensors, ratio, condition, scope, seed or 0, counted)
        with deactivate(model, mask):
            for modality, batches in data.items():
                result = perplexity(model, batches(), compute=compute)
                done += ranks
                if progress is not None:
                    progress(min(done, total), total)
                records.append(
                    {
                        "model": name,
                        "modality": modality,
                        "condition": condition,
                        "ratio": ratio,
                        "scope": scope,
                        "seed": seed,
                        "reduction": reduction,
                        "n_removed": mask.count,
                        "n_examples": len(result.samples),
                        "n_tokens": result.n_tokens,
                        "loss": result.loss,
                        "perplexity": result.perplexity,
                    }
                )
        return records

    base, *others = by_ranks(measure, wanted, distributed=distributed)
    records: list[DeactivationRecord] = []
    for i, scope in enumerate(scopes):
        records += [{**record, "scope": scope} for record in base]
        n = len(ratios) * len(each)
        records += itertools.chain.from_iterable(others[i * n : (i + 1) * n])
    return records


@dataclass(frozen=True)
class Area:
    """The area under one deletion curve, normalised by its width.

    area = ∫ (loss(r) − loss(0)) d log r / (log r_max − log r_min), by trapezoids between the measured ratios:
    the mean rise of the loss, in nats per supervised token, over ratios spread evenly on a logarithmic axis.
    Each decade of ratios counts the same. Loss, not perplexity, so that the largest ratio does not drown the
    others. Only areas over the same ratios can be compared.
    """

    model: str
    modality: str
    condition: str
    scope: str
    reduction: str
    area: float  # nats per supervised token
    area_low: float  # random: smallest and largest among the seeds; else both are `area`
    area_high: float
    n_seeds: int
    ratios: tuple[float, ...]


def areas(records: Sequence[DeactivationRecord]) -> list[Area]:
    """The area of every curve in `records`, random curves averaged over their seeds.

    Curves of a single ratio have none and are left out. Raises UserError for a curve without a base record.
    """
    base: dict[tuple[str, str, str, str], float] = {}
    curves: dict[tuple[tuple[str, str, str, str], str], dict[int | None, dict[float, float]]] = {}
    for r in records:
        where = (r["model"], r["modality"], r["scope"], r["reduction"])
        if r["condition"] == "base":
            base[where] = r["loss"]
        else:
            curves.setdefault((where, r["condition"]), {}).setdefault(r["seed"], {})[r["ratio"]] = r["loss"]
    result = []
    for (where, condition), seeds in curves.items():
        model, modality, scope, reduction = where
        if where not in base:
            raise UserError(
                f"The records have no base condition for {model}, {modality}, scope {scope}; "
                "measure the unchanged model too."
            )
        ratios = tuple(sorted(next(iter(seeds.values()))))
        if len(ratios) < 2:
            continue
        each = [_area({ratio: loss - base[where] for ratio, loss in curve.items()}) for curve in seeds.values()]
        area, n_seeds = math.fsum(each) / len(each), len(each) if condition == "random" else 0
        about = (model, modality, condition, scope, reduction)
        result.append(Area(*about, area, min(each), max(each), n_seeds, ratios))
    return result


def _area(rise: Mapping[float, float]) -> float:
    """Trapezoids over log ratio, divided by the width: the mean of `rise` (ratio → nats)."""
    points = sorted((math.log(ratio), value) for ratio, value in rise.items())
    trapezoids = [(x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points)]
    return math.fsum(trapezoids) / (points[-1][0] - points[0][0])
