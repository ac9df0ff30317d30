"""Several processes of one study, as torchrun or accelerate launch start them: who writes, who waits, whose part is it.

Every process runs the same program. Rank 0 alone reads what is finished, writes and reports; `share` gives its answer
to the others, who wait for it as long as it takes. Work is dealt item by item (`my_share`), and what came of it is put
in order again (`gathered`, `dealt_back`, or all at once `by_ranks`); an item is never cut, so its result is that of one
process. One process is rank 0, and shares with nobody. With a model in parts (FSDP2, `fully_shard`) a tensor is a
DTensor: `local` is this rank's part, `whole` gathers it.

An error on one rank ends that process, and torchrun, or the connection that breaks, ends the others; `joined` sees to
it that one of them speaks.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from palimpsest.files import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


T = TypeVar("T")
R = TypeVar("R")
FAILED = "palimpsest/failed"  # key of the processes' store: how many of them met an error
SPOKEN_AFTER = 10  # seconds in which the first process has said why all end
PATIENCE = timedelta(days=30)  # others wait while rank 0 evaluates; torchrun ends them if rank 0 fails

# What the FSDP section of an accelerate configuration must say: variable → (value, why).
_FSDP = {
    "FSDP_VERSION": ("2", "only FSDP2 is supported"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "layers are given back after their forward"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on the device"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process loads the models itself"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "the recipe's training.gradient_checkpointing decides"),
}

_sharded = False
_waiting: list[Any] = []  # [process group of all, the same ranks on gloo with PATIENCE]


def world_size() -> int:
    return int(_dist().get_world_size()) if _joined() else 1


def rank() -> int:
    return int(_dist().get_rank()) if _joined() else 0


def is_main() -> bool:
    return rank() == 0


def visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def started_first() -> bool:
    """Whether this process is the one that should speak to the user, also before and after `joined`."""
    return os.environ.get("RANK", "0") == "0"


def sharded() -> bool:
    """Whether the launch configuration asks for weights, gradients and optimizer state in parts (FSDP2)."""
    return _sharded and world_size() > 1


def share(value: T | None = None) -> T:
    """Rank 0's `value`, on every rank; all must call. Waits for rank 0 as long as it takes."""
    if world_size() > 1:
        box = [value]
        _dist().broadcast_object_list(box, src=0, group=_patient_group())
        value = box[0]
    return value  # type: ignore[return-value]


def from_rank_0(function: Callable[[], T]) -> T:
    """What `function` gives on rank 0, which alone calls it, on every rank; all must call this."""
    return share(function() if is_main() else None)


def my_share(items: Iterable[T]) -> Iterator[T]:
    """Every n-th of the items, from this rank's number on; all of them in a single process."""
    return itertools.islice(items, rank(), None, world_size())


def gathered(value: T, *, by_all: bool = True) -> list[T]:
    """Every rank's `value` in the order of the ranks, on every rank or, without `by_all`, on rank 0 (elsewhere []).

    All must call; they wait for each other as long as it takes.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    if by_all:
        _dist().all_gather_object(values, value, group=_patient_group())
        return values
    _dist().gather_object(value, values if is_main() else None, dst=0, group=_patient_group())
    return values if is_main() else []


def dealt_back(shares: Sequence[Sequence[T]]) -> list[T]:
    """One list of what each rank made of its `my_share`, an item of one thing each, in the order of the whole."""
    return [share[i] for i in range(max(map(len, shares), default=0)) for share in shares if i < len(share)]


def by_ranks(function: Callable[[T], R], items: Iterable[T], *, distributed: bool = True) -> list[R]:
    """`[function(item) for item in items]` on every rank, each item being the work of one; all must call."""
    if not distributed:
        return list(map(function, items))
    return dealt_back(gathered(list(map(function, my_share(items)))))


def wait_for_all() -> None:
    """Return when every rank has called this."""
    if world_size() > 1:
        _dist().barrier(group=_patient_group())


def require_one_process(command: str) -> None:
    """Raise UserError where torchrun or accelerate launch started several, each of which would do and write all of it.

    One of them speaks; the others end without a word, by SystemExit with code 2, and later: torchrun ends all once one
    has ended, which could be before that one has spoken.
    """
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) < 2 or "RANK" not in os.environ:
        return
    if not started_first():
        time.sleep(SPOKEN_AFTER)
        raise SystemExit(2)
    raise UserError(
        f"{command} works in one process and {started} were started; give the command without torchrun or accelerate "
        "launch (study and diagnose are what several processes share). Where they were not used, RANK and WORLD_SIZE "
        "are set in the environment; unset them."
    )


@contextmanager
def joined() -> Iterator[None]:
    """Within the block this process is one of those that torchrun or accelerate launch started; does nothing for one.

    `accelerate launch` with an FSDP section asks for `sharded()`; accelerate itself must then not shard a second time,
    so its variable is cleared. Raises UserError for what such a section asks and this project does not do.

    Of the errors that leave the block on several ranks the first stays what it is. The others only follow from it (a
    connection that broke) or say it again: those processes end without a word, by SystemExit with code 2.
    """
    global _sharded
    _require_recipes_precision()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or _joined():
        yield
        return
    wanted = _wants_sharding()
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, world = next(_dist().rendezvous("env://"))
    _dist().init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", store=store, rank=number, world_size=world)
    _sharded = wanted
    try:
        yield
    except Exception as error:
        if _failed_before(store):
            raise SystemExit(2) from error
        raise
    finally:
        _sharded = False
        _waiting.clear()
        _dist().destroy_process_group()


def _failed_before(store: Any) -> bool:
    """Whether another rank has met an error before; from now on this one has."""
    with suppress(RuntimeError):  # the store may have gone with its process
        return int(store.add(FAILED, 1)) > 1
    return False


def _require_recipes_precision() -> None:
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise UserError(
            f"The launch configuration has mixed_precision {precision}, but the recipe's models.compute decides; "
            "set mixed_precision: 'no' there."
        )


def _wants_sharding() -> bool:
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for variable, (value, why) in _FSDP.items():
        found = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else value).lower()
        if found != value:
            raise UserError(
                f"The launch configuration has {variable.lower()}: {found}, but {why}; set it to {value} there."
            )
    return True


def _patient_group() -> Any:
    dist = _dist()
    if not _waiting or _waiting[0] is not dist.group.WORLD:
        _waiting[:] = [dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE)]
    return _waiting[1]


def _joined() -> bool:
    """Asks torch only if it is imported: most commands need none."""
    if "torch" not in sys.modules:
        return False
    dist = _dist()
    return bool(dist.is_available() and dist.is_initialized())


def _dist() -> Any:
    import torch.distributed

    return torch.distributed


# ---------------------------------------------------------------------------------------------------------------------
# Tensors in parts
# ---------------------------------------------------------------------------------------------------------------------
def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which every rank holds a part."""
    return hasattr(tensor, "full_tensor")  # DTensor's module is slow to import


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory, without autograd; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    import torch

    sharded: Any = tensor
    with torch.no_grad():
        part: Tensor = sharded.to_local()
    return part


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered; every rank must call. Anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def reshard(model: nn.Module) -> None:
    """Give back what FSDP still holds gathered from the last forward: it would go stale, and hides the shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
