"""All measures of a study, model by model: the tables `layers`, `shift`, `clustering`, `delta`, and the heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    models: Sequence[str],
    scores: Callable[[str], Scores],
    weights: Callable[[str], Weights],
    reduction: str,
    ratio: float,
    n_shuffles: int,
    n_draws: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write layers.json, shift.json, clustering.json and delta.json.

    models: "base" first. `scores` and `weights` open a model's files; they are opened for each use and dropped, since
    pages of a mapped file count as memory as long as it is open. `reduction` is the one that clustering and overlaps
    are taken of; layers and shift are given for every reduction.
    """
    tuned = [name for name in models if name != BASE]
    total, done = 1 + len(models) + 2 * len(tuned), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    layers: list[LayerRecord] = []
    shift: list[ShiftRecord] = []
    for kind in scores(BASE).reductions:
        by_model = {name: _model_layers(name, scores(name), kind) for name in models}
        options: dict[str, Any] = {"modality": "text", "reduction": kind}
        for model in by_model.values():
            layers += layer_records(model, **options)
        for name in tuned:
            shift += shift_records(by_model[BASE], by_model[name], **options, n_draws=n_draws, seed=seed)
            if name != "full" and "full" in by_model:
                shift += contrast_records(
                    by_model[BASE], by_model[name], by_model["full"], **options, n_draws=n_draws, seed=seed
                )
    advance()

    clustering: list[ClusteringRecord] = []
    for name in models:
        tensors = scores(name).tensors(reduction)
        clustering += cluster_records(name, "importance", tensors, n_shuffles=n_shuffles, seed=seed)
        del tensors
        advance()
    delta: list[DeltaRecord] = []
    for name in tuned:
        change = AbsoluteChange(weights(BASE), weights(name))
        clustering += cluster_records(name, "delta", change, n_shuffles=n_shuffles, seed=seed)
        del change
        advance()
        importance = scores(BASE).tensors(reduction)
        delta += delta_records(weights(BASE), weights(name), importance, method=name, ratio=ratio)
        del importance
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
    folder: Path,
    *,
    models: Sequence[str],
    scores: Callable[[str], Scores],
    weights: Callable[[str], Weights],
    reduction: str,
) -> None:
    """importance.npz and delta.npz: heat maps of a few matrices, early, middle and late; keys "MODEL|PARAMETER".

    Importance by the largest entry of each block; changes by the mean, since an optimizer such as Adam moves nearly
    every weight by about its learning rate, and the largest of a block says nothing then.
    """
    names = _mapped_names(list(scores(BASE).tensors(reduction)))
    importance: dict[str, Any] = {}
    change: dict[str, Any] = {}
    for model in models:
        tensors = scores(model).tensors(reduction)
        importance |= {f"{model}|{name}": block_map(tensors[name]) for name in names}
        if model != BASE:
            delta = AbsoluteChange(weights(BASE), weights(model))
            change |= {f"{model}|{name}": block_map(delta[name], reduce="mean") for name in names}
    write_maps(folder / "importance.npz", importance)
    write_maps(folder / "delta.npz", change)


def _mapped_names(names: list[str]) -> list[str]:
    n_layers = 1 + max(layer_index(name) or 0 for name in names)
    depths = sorted({n_layers // 6, n_layers // 2, n_layers - 1 - n_layers // 6})
    return [name for name in names if layer_index(name) in depths and module_kind(name) in MAP_KINDS]
