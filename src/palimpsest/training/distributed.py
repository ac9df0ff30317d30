"""Training on several processes as if on one: the same batches, divided; the same loss; checkpoints without a layout.

**Batches.** A batch is that of one process; rank r of n takes its rows r, r + n, r + 2n, … So neither the number of
steps nor what stands in one depends on the number of processes.

**Loss.** Summed over a rank's tokens, divided by the supervised tokens of all ranks in the optimizer step, times the
number of ranks, because both layouts average gradients over ranks where the sum is meant.

**Layouts.** Replicas: DistributedDataParallel, by the Trainer. Parts: torch's fully_shard (FSDP2) on a twin of the
model. accelerate's FSDP2 is not used: it does not exist on CPUs, where the tests run, and its checkpoints can only be
read by FSDP. Ours are the ones of a single process, so training can go on with another layout or number of processes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from palimpsest.files import UserError
from palimpsest.models.anatomy import decoder_layers, find_language_model
from palimpsest.models.loss import IGNORED
from palimpsest.parallel import is_main, rank, reshard, whole, world_size

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    from palimpsest.training.batching import EpochBatches
    from palimpsest.training.replay import MixedBatches
    from palimpsest.training.settings import Settings

Batch = dict[str, Any]
FILLER = "filler"  # key of a batch that stands in for an empty share: it is computed and weighs nothing
M = TypeVar("M", bound=nn.Module)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Share:
    """This rank's rows of every batch, as (index, whether it counts), in the form a DataLoader takes.

    A batch of fewer rows than ranks leaves some without any. They compute its first row, without weight, because all
    ranks must take part in every exchange.
    """

    batch_sampler: EpochBatches | MixedBatches  # under this name the Trainer finds it to set the epoch

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        for rows in self.batch_sampler:
            mine = [(row, True) for row in rows[rank() :: world_size()]]
            yield mine or [(rows[0], False)]

    def __len__(self) -> int:
        return len(self.batch_sampler)


@dataclass(frozen=True)
class _Rows:
    examples: Sequence[Any]

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Any, bool]:
        index, counts = key
        return self.examples[index], counts

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class _Collated:
    """No inner function: a worker process that is not forked gets it pickled."""

    collate: Callable[[Sequence[Any]], Batch]

    def __call__(self, rows: Sequence[tuple[Any, bool]]) -> Batch:
        batch = self.collate([example for example, _ in rows])
        return batch if rows[0][1] else {**batch, FILLER: True}


def share_loader(
    examples: Sequence[Any],
    batches: EpochBatches | MixedBatches,
    collate: Callable[[Sequence[Any]], Batch],
    pin_memory: bool,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Loader of this rank's share of the batches; with nothing drawn from the global generator."""
    from torch.utils.data import DataLoader

    dataset: Any = _Rows(examples)
    return DataLoader(
        dataset,
        batch_sampler=Share(batches),
        collate_fn=_Collated(collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------
def tokens_of_step(batches: Sequence[Batch], device: torch.device) -> Tensor:
    """Supervised tokens of an optimizer step: of these batches, on all ranks. The first position has no prediction."""
    counted = [batch["labels"][:, 1:] for batch in batches if FILLER not in batch]
    total = torch.tensor(sum(int((labels != IGNORED).sum()) for labels in counted), device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def loss_of_rank(total: Tensor, n_tokens: Tensor | int, batch: Mapping[str, Any]) -> Tensor:
    """What a rank calls backward on, so that the mean over ranks is the loss per token of the whole step."""
    return total * (0.0 if FILLER in batch else world_size()) / n_tokens


def mean_over_ranks(loss: Tensor) -> Tensor:
    """Of `loss_of_rank` the loss of the step; every rank must call."""
    loss = loss.clone()
    if world_size() > 1:
        dist.all_reduce(loss)
    return loss / world_size()


# ---------------------------------------------------------------------------------------------------------------------
# Parts (FSDP2)
# ---------------------------------------------------------------------------------------------------------------------
def allowed_options(settings: Settings) -> Settings:
    """The settings, without the fused loss if it is "auto". Raises UserError for what does not go with parts."""
    if world_size() < 2:
        raise UserError("sharded=True divides a model over processes, and there is one; start with torchrun.")
    if settings.liger is True:
        raise UserError(
            "training.liger is true, but the fused loss takes the head's weights outside of forward, where a sharded "
            'model does not have them; set it to "auto".'
        )
    if settings.compile:
        raise UserError("training.compile is not supported with a sharded model; set it to false or use replicas.")
    return dataclasses.replace(settings, liger=False)


def twin_of(model: M) -> M:
    """A second module tree around the same parameters and buffers: fully_shard changes it for good, `model` stays."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def shard(twin: nn.Module, *, bf16: bool = False, whole_encoder: bool = False, device: str | None = None) -> None:
    """Divide the parameters of `twin` over the ranks, by rows; those of the model it was made from become empty.

    Each decoder layer is gathered when it runs; the encoder, which does not run in training, never; all the rest
    (embedding, head, adaptor) from the start of a forward to the end of its backward. bf16: as the Trainer does it,
    float32 weights and autocast, but gathered in bfloat16. whole_encoder: it encodes every batch, so it stays whole and
    as it is on every rank. device: where the parts go, if not where the whole is; then a layer at a time is there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    parameters = list(twin.parameters())
    device = device or parameters[0].device.type
    options: dict[str, Any] = {"mesh": init_device_mesh(device, (world_size(),))}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        twin.forward = torch.autocast(device, dtype=torch.bfloat16)(twin.forward)
    for layer in decoder_layers(find_language_model(twin)).values():
        fully_shard(layer, **options)
    encoder = getattr(twin, "encoder", None)
    kept: set[nn.Parameter] = set()
    if isinstance(encoder, nn.Module):
        if whole_encoder:
            kept = set(encoder.parameters())
            options["ignored_params"] = kept
        else:
            fully_shard(encoder, **options)
    if bf16:  # frames stay as they came: a speech token is found in float32; autocast rounds what is multiplied
        options["mp_policy"] = dataclasses.replace(options["mp_policy"], cast_forward_inputs=False)
    fully_shard(twin, **options)
    for parameter in parameters:
        if parameter not in kept:
            parameter.data = parameter.new_empty(0)


def gather(twin: nn.Module, model: nn.Module) -> None:
    """Give `model` back its parameters, whole and trained, on every rank; one is gathered at a time."""
    reshard(twin)
    trained = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = whole(trained[name].detach())
        parameter.requires_grad_(trained[name].requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of a model in parts, in the Trainer's format for one process
# ---------------------------------------------------------------------------------------------------------------------
def save_weights(model: nn.Module, path: Path) -> None:
    """Rank 0 writes the whole model, each tied weight once; every rank must call."""
    from safetensors.torch import save_file

    once = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name not in tied:
            gathered = whole(value.detach())
            if is_main():
                tensors[name] = gathered.cpu().contiguous()
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` as one process would have it, on the CPU of rank 0; every rank must call."""
    state: dict[str, Any] = optimizer.state_dict()
    all_values: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        gathered = {key: whole(value) for key, value in values.items()}
        if is_main():
            all_values[number] = {key: v.cpu() if isinstance(v, torch.Tensor) else v for key, v in gathered.items()}
    return {**state, "state": all_values}


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Each rank takes its parts of a state that `whole_optimizer_state` or a single process has given."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        parameter = parameters[number]
        assert isinstance(parameter, DTensor)
        mine[number] = {
            key: distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            else value
            for key, value in values.items()
        }
    optimizer.load_state_dict({**state, "state": mine})
