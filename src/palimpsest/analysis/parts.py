"""Importance on spoken questions, apart: the layers, the old rows of the embedding, and what stands for speech.

On written questions no row of a speech token is looked up, and its importance is 0. So the three are scored where the
question is spoken, in one pass:

    layers     the 2-D weights of the transformer layers, as everywhere
    old_rows   the input embedding, the base's rows; of a tied head with what it does there
    new_rows   the rows of the speech tokens; of a model that reads encoder frames `adaptor`, its weights

Norms, biases and a head of its own are not scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.analysis.shift import ADDITIVE_OVER_BATCHES, MIN_BATCHES
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores
from palimpsest.intervals import bootstrap_ratio
from palimpsest.models.anatomy import find_language_model, layer_index, named_parameters, scored_parameters
from palimpsest.models.gate import adapters_switched
from palimpsest.records import PartRecord

if TYPE_CHECKING:
    from torch import nn

    from palimpsest.models.speech_lm import SpeechLM

ADAPTOR = "adaptor."  # in front of the names of what stands for speech, as in the model's own
ROWS = f"{ADAPTOR}rows.weight"  # of speech tokens


def parts_of(model: SpeechLM) -> dict[str, nn.Parameter]:
    """What is scored on spoken questions, the layers first."""
    language_model: Any = find_language_model(model)
    old_rows = language_model.get_input_embeddings().weight
    name = next(name for name, it in named_parameters(language_model).items() if it is old_rows)
    beside = {f"{ADAPTOR}{own}": weight for own, weight in model.adaptor.named_parameters()}
    return {**scored_parameters(model), name: old_rows, **beside}


def estimate_parts(model: SpeechLM, batches: Iterable[Mapping[str, Any]], *args: Any, **options: Any) -> Scores:
    """`estimate_importance` of `parts_of(model)` on spoken questions; LoRA that is for speech alone counts."""
    with adapters_switched(model.language_model, True) if model.gated else nullcontext():
        return estimate_importance(model, batches, *args, parameters=parts_of(model), **options)


def in_layers_alone(scores: Scores, inside: bool = True) -> Scores:
    """The scores of the layers, or (`inside` False) of what lies outside them: folders of their own."""
    kept = [i for i, name in enumerate(scores.names) if (layer_index(name) is not None) == inside]
    names = [scores.names[i] for i in kept]
    return Scores(
        {**scores.metadata, "parameters": [scores.metadata["parameters"][i] for i in kept]},
        {key: {name: scores.tensors(key)[name] for name in names} for key in scores.reductions},
        scores.batch_totals[:, kept],
        scores.batch_tokens,
        sums={key: [sums[i] for i in kept] for key, sums in scores.sums.items()},
    )


def part_records(model: str, scores: Scores, *, seed: int = 0) -> list[PartRecord]:
    """A row for each part and reduction of `scores`, in nats as there.

    The interval is of the share, by a bootstrap over batches: of the reduction that adds up over them, from MIN_BATCHES
    batches on. A row is reached where one of its weights has a score above 0.
    """
    parts: dict[str, list[int]] = {}
    for i, name in enumerate(scores.names):
        parts.setdefault(_part(name), []).append(i)
    shapes = [parameter["shape"] for parameter in scores.metadata["parameters"]]
    n_batches = len(scores.batch_totals)
    found: list[PartRecord] = []
    for reduction in scores.estimated:
        totals = _totals(scores, reduction)
        bounds = None
        if reduction in ADDITIVE_OVER_BATCHES and n_batches >= MIN_BATCHES:
            sums = np.stack([scores.batch_totals[:, members].sum(1) for members in parts.values()], axis=1)
            bounds = bootstrap_ratio(sums, sums.sum(1), seed).tolist()
        for number, (part, members) in enumerate(parts.items()):
            total, n = math.fsum(totals[i] for i in members), sum(math.prod(shapes[i]) for i in members)
            rows = members[0] if part.endswith("rows") else None
            found.append(
                {
                    "model": model,
                    "modality": "speech",
                    "reduction": reduction,
                    "part": part,
                    "total": total,
                    "mean": total / n,
                    "share": total / math.fsum(totals),
                    "ci_low": None if bounds is None else bounds[0][number],
                    "ci_high": None if bounds is None else bounds[1][number],
                    "n_parameters": n,
                    "n_rows": None if rows is None else shapes[rows][0],
                    "n_reached": None if rows is None else _reached(scores, scores.names[rows]),
                    "n_batches": n_batches,
                }
            )
    return found


def _part(name: str) -> str:
    if layer_index(name) is not None:
        return "layers"
    return "new_rows" if name == ROWS else "adaptor" if name.startswith(ADAPTOR) else "old_rows"


def _totals(scores: Scores, reduction: str) -> list[float]:
    """Of each parameter, in float64."""
    if reduction not in scores.reductions:
        return list(scores.sums[reduction])
    tensors = scores.tensors(reduction)
    return [float(tensors[name].double().sum()) for name in scores.names]


def _reached(scores: Scores, name: str) -> int | None:
    if not scores.reductions:
        return None
    return int((scores.tensors(scores.reductions[0])[name].amax(1) > 0).sum())
