"""All measures of a study, model by model: the tables `layers`, `shift`, `clustering`, `delta`, and the heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.analysis.clustering import cluster_records
from palimpsest.analysis.delta import AbsoluteChange, delta_records
from palimpsest.analysis.layers import ModelLayers, layer_batches, layer_distribution, layer_records
from palimpsest.analysis.maps import block_map, write_maps
from palimpsest.analysis.shift import ADDITIVE_OVER_BATCHES, contrast_records, shift_records
from palimpsest.models.anatomy import layer_index, module_kind
from palimpsest.rundir import ClusteringRecord, DeltaRecord, LayerRecord, ShiftRecord, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from palimpsest.importance.scores import Scores

BASE = "base"
MAP_KINDS = ("q", "o", "up", "down")  # one attention input, one output, and both sides of the MLP
Weights = Mapping[str, "Tensor"]


def write_tables(
    folder: Path,
    *,
    scores: Mapping[str, Scores],
    weights: Mapping[str, Weights],
    reduction: str,
    ratio: float,
    n_shuffles: int,
    n_draws: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write layers.json, shift.json, clustering.json and delta.json.

    scores, weights: by model, "base" first; `reduction` is the one clustering and overlaps are taken of. Layers and
    shift are given for every reduction.
    """
    tuned = [name for name in scores if name != BASE]
    total, done = 1 + len(scores) + 2 * len(tuned), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    layers: list[LayerRecord] = []
    shift: list[ShiftRecord] = []
    for kind in scores[BASE].reductions:
        models = {name: _model_layers(name, item, kind) for name, item in scores.items()}
        options: dict[str, Any] = {"modality": "text", "reduction": kind}
        for model in models.values():
            layers += layer_records(model, **options)
        for name in tuned:
            shift += shift_records(models[BASE], models[name], **options, n_draws=n_draws, seed=seed)
            if name != "full" and "full" in models:
                shift += contrast_records(
                    models[BASE], models[name], models["full"], **options, n_draws=n_draws, seed=seed
                )
    advance()

    clustering: list[ClusteringRecord] = []
    for name, item in scores.items():
        clustering += cluster_records(name, "importance", item.tensors(reduction), n_shuffles=n_shuffles, seed=seed)
        advance()
    delta: list[DeltaRecord] = []
    for name in tuned:
        change = AbsoluteChange(weights[BASE], weights[name])
        clustering += cluster_records(name, "delta", change, n_shuffles=n_shuffles, seed=seed)
        advance()
        importance = scores[BASE].tensors(reduction)
        delta += delta_records(weights[BASE], weights[name], importance, method=name, ratio=ratio)
        advance()

    for table, records in (
        ("layers", layers),
        ("shift", shift),
        ("clustering", clustering),
        ("delta", delta),
    ):
        write_json(folder / f"{table}.json", records)


def _model_layers(name: str, scores: Scores, reduction: str) -> ModelLayers:
    batches = layer_batches(scores.batch_totals, scores.names) if reduction in ADDITIVE_OVER_BATCHES else None
    return ModelLayers(name, layer_distribution(scores.tensors(reduction)), batches)


def write_study_maps(
    folder: Path, *, scores: Mapping[str, Scores], weights: Mapping[str, Weights], reduction: str
) -> None:
    """importance.npz and delta.npz: heat maps of a few matrices, early, middle and late; keys "MODEL|PARAMETER"."""
    names = _mapped_names(list(scores[BASE].tensors(reduction)))
    importance = {
        f"{model}|{name}": block_map(item.tensors(reduction)[name]) for model, item in scores.items() for name in names
    }
    write_maps(folder / "importance.npz", importance)
    change = {
        f"{model}|{name}": block_map(AbsoluteChange(weights[BASE], weights[model])[name])
        for model in scores
        if model != BASE
        for name in names
    }
    write_maps(folder / "delta.npz", change)


def _mapped_names(names: list[str]) -> list[str]:
    n_layers = 1 + max(layer_index(name) or 0 for name in names)
    depths = sorted({n_layers // 6, n_layers // 2, n_layers - 1 - n_layers // 6})
    return [name for name in names if layer_index(name) in depths and module_kind(name) in MAP_KINDS]
