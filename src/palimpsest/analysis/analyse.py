"""All measures of a study, model by model: and the heat maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.analysis.clustering import cluster_records, summary_records
from palimpsest.analysis.delta import AbsoluteChange, Change, delta_records, embedding_records
from palimpsest.analysis.layers import (
    ModelLayers,
    distribution_of_sums,
    layer_batches,
    layer_distribution,
    layer_records,
)
from palimpsest.analysis.low_rank import low_rank_records
from palimpsest.analysis.maps import block_map, write_maps
from palimpsest.analysis.overlap import most_important, overlap_records
from palimpsest.analysis.shift import ADDITIVE_OVER_BATCHES, contrast_records, shift_records
from palimpsest.files import write_json
from palimpsest.importance.mask import Mask
from palimpsest.importance.select import select
from palimpsest.models.anatomy import layer_index, module_kind
from palimpsest.records import BASE, method_of, run_name

if TYPE_CHECKING:
    from torch import Tensor

    from palimpsest.importance.scores import Scores
    from palimpsest.models.paired_weights import PairedWeights

MAP_KINDS = ("q", "o", "up", "down")  # one attention input, one output, and both sides of the MLP
Weights = Mapping[str, "Tensor"]


TABLES = ("layers", "shift", "clustering", "clustering_summary", "delta", "embeddings", "mask_overlap")


def write_tables(
    folder: Path,
    *,
    models: Sequence[str],
    clustered: Sequence[str] | None = None,
    scores: Callable[[str], Scores],
    weights: Callable[[str], Weights],
    paired: Mapping[str, Callable[[], PairedWeights]] | None = None,
    other: Callable[[], Scores] | None = None,
    other_mask: Callable[[], Mask] | None = None,
    reduction: str,
    ratio: float,
    rank: int = 8,
    n_shuffles: int,
    rank_draws: int = 0,
    n_draws: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write TABLE.json for each of `TABLES`.

    models: "base" first. clustered: those whose clustering, change and overlap are computed too; None: all. `scores`,
    `weights` and `other` open a model's files; they are opened for each use and dropped, since pages of a mapped file
    count as memory as long as it is open. other: the base's scores on other data, for noise floors; other_mask:
    which of its weights are among the most important `ratio` of their matrix, where the scores of single weights were
    not kept. paired: of given models all weights beside the base's, for embedding and head. `reduction` is the
    one that clustering and overlaps are taken of; layers and shift are given for every reduction. rank: to which
    changes are cut for the clustering that low rank does not explain.
    """
    clustered = models if clustered is None else clustered
    changed = [name for name in clustered if name != BASE]
    done, total = itertools.count(1), 1 + len(clustered) + 3 * len(changed)

    def advance() -> None:
        progress(next(done), total)

    tables: dict[str, list[Any]] = {name: [] for name in TABLES}
    for kind in scores(BASE).estimated:
        by_model = {name: model_layers(name, scores(name), kind) for name in models}
        elsewhere = model_layers(BASE, other(), kind) if other else None
        options: dict[str, Any] = {"modality": "text", "reduction": kind}
        draws: dict[str, Any] = {"n_draws": n_draws, "seed": seed}
        for model in by_model.values():
            tables["layers"] += layer_records(model, **options)
        for name in [name for name in models if name != BASE]:
            tables["shift"] += shift_records(by_model[BASE], by_model[name], **options, **draws, other=elsewhere)
            full = _full_of(name, models)
            if full is not None:
                tables["shift"] += contrast_records(by_model[BASE], by_model[name], by_model[full], **options, **draws)
    advance()

    cluster: dict[str, Any] = {"n_shuffles": n_shuffles, "rank_draws": rank_draws, "seed": seed}
    clustering = tables["clustering"]
    for name in clustered:
        tensors = scores(name).tensors(reduction)
        clustering += cluster_records(name, "importance", tensors, **cluster)
        if name == BASE:  # where the other models' masks lie is the business of mask_overlap
            clustering += cluster_records(name, "mask", _Unpacked(select(tensors, ratio)), **cluster)
        del tensors
        advance()
    reference = _Flags(most_important(scores(BASE).tensors(reduction), ratio)) if changed else None
    of_changes: dict[str, list[Any]] = {name: [] for name in ("clustering", "delta", "embeddings", "mask_overlap")}
    for name in reversed(changed):  # of models that are given the last is in memory still
        assert reference is not None
        found: dict[str, list[Any]] = {}
        found["clustering"] = cluster_records(name, "delta", AbsoluteChange(weights(BASE), weights(name)), **cluster)
        advance()
        found["clustering"] += low_rank_records(name, Change(weights(BASE), weights(name)), rank, seed=seed)
        advance()
        found["delta"] = delta_records(weights(BASE), weights(name), reference, method=name, ratio=ratio)
        if paired and name in paired:
            found["embeddings"] = embedding_records(name, paired[name]())
        found["mask_overlap"] = overlap_records(
            name,
            scores(name).tensors(reduction),
            BASE,
            reference,
            other=_Flags(other_mask()) if other_mask else other().tensors(reduction) if other else None,
            ratio=ratio,
            seed=seed,
        )
        of_changes = {table: [*found.get(table, ()), *records] for table, records in of_changes.items()}
        advance()
    for table, records in of_changes.items():
        tables[table] += records

    tables["clustering_summary"] = summary_records(clustering, seed=seed)
    for table, records in tables.items():
        write_json(folder / f"{table}.json", records)


def _full_of(name: str, models: Sequence[str]) -> str | None:
    """The full fine-tuning that a model is set against: of several training runs the one of the same number."""
    same = run_name("full", method_of(name)[1])
    full = same if same in models else "full"
    return full if full in models and full != name else None


class _Flags(Mapping[str, "Tensor"]):
    """The matrices of a mask as booleans, unpacked on access."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def __getitem__(self, name: str) -> Tensor:
        return self._mask.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._mask.names)

    def __len__(self) -> int:
        return len(self._mask.names)


class _Unpacked(_Flags):
    """The same as float32 zeros and ones."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).float()


def model_layers(name: str, scores: Scores, reduction: str) -> ModelLayers:
    """What shift compares, of a model's scores."""
    batches = layer_batches(scores.batch_totals, scores.names) if reduction in ADDITIVE_OVER_BATCHES else None
    if reduction in scores.reductions:
        return ModelLayers(name, layer_distribution(scores.tensors(reduction)), batches)
    sums = dict(zip(scores.names, scores.sums[reduction], strict=True))
    sizes = {parameter["name"]: math.prod(parameter["shape"]) for parameter in scores.metadata["parameters"]}
    return ModelLayers(name, distribution_of_sums(sums, sizes), batches)


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
    shapes = {parameter["name"]: parameter["shape"] for parameter in scores(BASE).metadata["parameters"]}
    names = _mapped_names([name for name, shape in shapes.items() if len(shape) == 2])  # stacked experts have no map
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
