"""Importance on several processes (torchrun), as if on one.

Two layouts, by what the weights are:

**Replicas.** Every rank holds the whole model and gives `estimate_importance` its own batches; any number of
them. Nothing is exchanged until the end, then each accumulator is summed over the ranks once, `signed_sum`
before its absolute value is taken. Batches mean what they mean on one process, so every reduction is possible,
and if rank r took batches r, r + n, r + 2n, … of a list (`my_share`), the result is that of one process on it.

**Sharded** (FSDP2, `fully_shard`). Every rank holds a part of each weight, and autograd gives it that part of
the gradient of all ranks' losses. So "batch b" is here what all ranks had as their b-th batch, together, and
every rank must have equally many. `signed_sum` and `per_batch_abs` fold the local parts; the other reductions
need gradients of single sequences, which no rank ever sees, and are refused. FSDP averages over ranks where
importance needs a sum: the loss is multiplied by the number of ranks.

An error on one rank ends its process; it is torchrun that ends the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from palimpsest.files import UserError, hash_value
from palimpsest.importance.scores import Scores, describe_parameters
from palimpsest.parallel import local
from palimpsest.parallel import my_share as my_share  # documented here

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor, nn

Layout = Literal["one process", "replicas", "sharded"]
POSSIBLE_SHARDED = ("signed_sum", "per_batch_abs")
PIECE = 1 << 26  # elements per all-reduce of an accumulator that is not on the processes' device
T = TypeVar("T")
Integers = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass
class BatchRecord:
    """What is kept of one batch. Under FSDP, of this rank's part of it until `all_batches` puts them together."""

    totals: Float64[Tensor, " weights"]  # Σ_j |θ_j · g_bj| of every weight
    n_tokens: int
    n_sequences: int
    loss: float  # summed, nats
    digest: str  # of ids, tokens and labels
    with_gradient: set[str] = field(default_factory=set)


# ------------------------------------------------------------------------------------------------------------
# Before and during the pass
# ------------------------------------------------------------------------------------------------------------
def layout_of(model: nn.Module, weights: Mapping[str, Tensor], reductions: Iterable[str], distributed: bool) -> Layout:
    """How the processes share the work. Raises UserError where it cannot be shared, or was not asked to be."""
    if type(model).__name__ == "DistributedDataParallel":
        raise UserError(
            "The model is wrapped in DistributedDataParallel, which averages gradients itself; "
            "pass model.module and distributed=True."
        )
    sharded = [name for name, weight in weights.items() if isinstance(weight, DTensor)]
    if not distributed:
        if sharded:
            raise UserError(f"{sharded[0]} is sharded over processes; pass distributed=True on every rank.")
        return "one process"
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "distributed=True needs a process group; start with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    if not sharded:
        return "replicas"
    for name, weight in weights.items():
        if not (
            isinstance(weight, DTensor)
            and weight.device_mesh.ndim == 1
            and weight.device_mesh.size() == dist.get_world_size()
            and weight.placements[0].is_shard()
        ):
            raise UserError(
                f"{name} is not sharded over all {dist.get_world_size()} processes in one dimension; "
                "apply fully_shard with a one-dimensional mesh of all ranks, without tensor parallelism."
            )
    for reduction in reductions:
        if reduction not in POSSIBLE_SHARDED:
            raise UserError(
                f"{reduction} needs the gradients of single sequences, and FSDP gives each rank only its part of "
                f"their sum over all ranks; choose among {', '.join(POSSIBLE_SHARDED)}, or replicate the model."
            )
    return "sharded"


def in_step(batches: Iterable[T], layout: Layout, device: torch.device) -> Iterator[T]:
    """The batches; if sharded, raise UserError on every rank once some ranks have another batch and some do not."""
    if layout != "sharded":
        yield from batches
        return
    iterator = iter(batches)
    for number in itertools.count():
        batch = next(iterator, None)
        ready = torch.tensor([batch is not None], dtype=torch.int64, device=device)
        dist.all_reduce(ready)
        if ready.item() not in (0, dist.get_world_size()):
            raise UserError(
                f"Only {int(ready)} of {dist.get_world_size()} ranks have a batch {number}; "
                "with a sharded model every rank needs equally many batches."
            )
        if batch is None:
            return
        yield batch


def loss_factor(layout: Layout) -> int:
    """What the loss is multiplied by so that FSDP's mean of gradients over ranks is their sum."""
    return dist.get_world_size() if layout == "sharded" else 1


def local_part_like(whole: Tensor, weight: Tensor) -> Tensor:
    """The part of `whole`, which every rank has, that belongs to this rank's part of `weight`."""
    if not isinstance(weight, DTensor):
        return whole.to(weight.device)
    return local(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))


def describe_weights(weights: Mapping[str, Tensor], layout: Layout) -> list[dict[str, Any]]:
    """`describe_parameters` of the whole weights; sharded ones are gathered one at a time, on every rank.

    Raises UserError if replicas do not hold the same weights.
    """
    described = describe_parameters(weights)
    if layout == "replicas":
        digests: list[str] = _from_all(hash_value(described))
        for number, digest in enumerate(digests):
            if digest != digests[0]:
                raise UserError(
                    f"Rank {number} holds other weights than rank 0; load the same model in the same precision on "
                    "every rank, or fix the seed it is initialised with."
                )
    return described


# ------------------------------------------------------------------------------------------------------------
# After the pass
# ------------------------------------------------------------------------------------------------------------
def sum_over_replicas(accumulators: Iterable[Tensor], device: torch.device) -> None:
    """Sum each accumulator over the ranks, in place: the one exchange of the replicas.

    device: where the processes exchange; accumulators kept elsewhere pass through it in pieces.
    """
    for accumulator in accumulators:
        if accumulator.device == device:
            dist.all_reduce(accumulator)
            continue
        for piece in torch.split(accumulator.view(-1), PIECE):
            moved = piece.to(device)
            dist.all_reduce(moved)
            piece.copy_(moved)


def all_batches(mine: Sequence[BatchRecord], layout: Layout) -> list[BatchRecord]:
    """The batches of all ranks, the same list on each: replicas' taken in turn, parts of one batch put together."""
    if layout == "one process":
        return list(mine)
    ranks: list[list[BatchRecord]] = _from_all(list(mine))
    if layout == "replicas":
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*ranks))
        return [record for record in in_turn if record is not None]
    return [
        BatchRecord(
            totals=torch.stack([part.totals for part in parts]).sum(0),
            n_tokens=sum(part.n_tokens for part in parts),
            n_sequences=sum(part.n_sequences for part in parts),
            loss=sum(part.loss for part in parts),
            digest=hash_value([part.digest for part in parts]),
            with_gradient=set().union(*(part.with_gradient for part in parts)),
        )
        for parts in zip(*ranks, strict=True)
    ]


def _from_all(value: Any) -> list[Any]:
    """What every rank gave, by rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class GatheredTensors(Mapping[str, "Tensor"]):
    """Sharded scores: every rank keeps its part of each tensor; one that is accessed is gathered, on every rank.

    Gathering involves every rank: all must access the same names in the same order. Iterating does. `select` does
    not gather: it reads `parts` and exchanges counts.

    parts: name → this rank's part, as many rows as fully_shard gave it; on whatever device it was accumulated.
    shapes: name → shape of the whole tensor.
    """

    def __init__(self, parts: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.parts = dict(parts)
        self._weights = {
            name: weight
            for name, weight in zip(parts, weights.values(), strict=True)
            if isinstance(weight, DTensor)  # all of them, `layout_of` has seen to it
        }
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        self._mesh = next(iter(self._weights.values())).device_mesh

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        sharded = DTensor.from_local(
            self.parts[name],
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
        tensor: Tensor = sharded.full_tensor()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def rank(self) -> int:
        """Whose part this is; positions go up with it."""
        return self._mesh.get_local_rank()

    def start(self, name: str) -> int:
        """Row-major position, in the whole tensor, of the first element of this rank's part.

        Raises UserError if the part is not a run of rows.
        """
        weight = self._weights[name]
        if not weight.placements[0].is_shard(0):
            raise UserError(
                f"{name} is sharded along another dimension than the first, so its parts are no runs of positions; "
                "apply fully_shard without shard_placement_fn, or save the scores and select from the saved ones."
            )
        rows = math.ceil(weight.shape[0] / self._mesh.size())  # of every rank but the last ones
        return min(self.rank * rows, weight.shape[0]) * math.prod(weight.shape[1:])

    def sum(self, mine: Integers) -> Integers:
        """Sum over the ranks, element by element; the same on every rank."""
        moved = torch.from_numpy(mine).to(self._mesh.device_type)
        dist.all_reduce(moved, group=self._mesh.get_group())
        summed: Integers = moved.cpu().numpy()
        return summed

    def by_rank(self, mine: Integers) -> Integers:
        """What every rank gave, (rank, element): in the order of their parts."""
        gathered = np.zeros((self._mesh.size(), *mine.shape), dtype=mine.dtype)
        gathered[self.rank] = mine
        return self.sum(gathered)


def save_scores(scores: Scores, folder: Path) -> None:
    """Save from all ranks: rank 0 writes, one file's tensors in memory at a time; returns when the folder is there."""
    if dist.get_rank() == 0:
        scores.save(folder)
    else:  # take part in the gathering, in the order in which Scores.save accesses the tensors
        for reduction in scores.reductions:
            for name in scores.names:
                scores.tensors(reduction)[name]
    dist.barrier()
