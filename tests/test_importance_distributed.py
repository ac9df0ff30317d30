"""Two gloo processes on the CPU, started once: replicas and a sharded model give the scores of one process."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.distributed import my_share, save_scores
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores
from palimpsest.importance.select import Mask, select
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loss import supervised_losses
from palimpsest.rundir import UserError
from tiny import tiny_llama

Batch = dict[str, Any]
WORLD = 2
REPLICATED = ("signed_sum", "per_batch_abs", "per_sequence_abs", "fisher")
DTYPES = (torch.float32, torch.float64)
SHARDED = ("signed_sum", "per_batch_abs")
# Odd sizes: the ranks' shards differ, and with one key-value head of 8 rows they are small.
SHAPE = {"intermediate_size": 45, "num_key_value_heads": 1}


def tiny(dtype: torch.dtype) -> Any:
    return tiny_llama(**SHAPE).to(dtype)


def make_batches(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(n):
        input_ids = torch.randint(5, 300, (2, 6), generator=generator)
        mask = torch.ones_like(input_ids)
        mask[1, 6 - number % 3 :] = 0
        labels = input_ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        ids = [f"b{number}r{i}" for i in range(2)]
        batches.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels, "ids": ids})
    return batches


def joined(batches: list[Batch]) -> list[Batch]:
    """Neighbours as one batch: what two ranks of a sharded model have together."""
    pairs = zip(batches[::2], batches[1::2], strict=True)
    return [{key: a[key] + b[key] if key == "ids" else torch.cat([a[key], b[key]]) for key in a} for a, b in pairs]


def mean_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(supervised_losses(model, make_batches(1)[0])[0].mean())


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was refused"


# ------------------------------------------------------------------------------------------------------------
# What every rank runs
# ------------------------------------------------------------------------------------------------------------
def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        for dtype in DTYPES:
            replicas(Path(folder) / str(dtype), dtype)
            sharded(Path(folder) / str(dtype), dtype)
    finally:
        dist.destroy_process_group()


def replicas(folder: Path, dtype: torch.dtype) -> None:
    model = tiny(dtype)
    seen: list[int] = []
    scores = estimate_importance(
        model, my_share(make_batches(5)), REPLICATED, progress=lambda done, _: seen.append(done), distributed=True
    )  # three batches and two
    assert len(seen) == 3 - dist.get_rank()
    save_scores(scores, folder / "replicas")
    other = tiny_llama(seed=dist.get_rank())
    said = refusal(lambda: estimate_importance(other, make_batches(1), distributed=True))
    assert "Rank 1 holds other weights than rank 0" in said
    own = Scores(
        scores.metadata,
        {key: dict(scores.tensors(key)) for key in REPLICATED},
        scores.batch_totals,
        scores.batch_tokens,
    )
    own.save(folder / f"replicas-{dist.get_rank()}")


def sharded(folder: Path, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    rank = dist.get_rank()
    model = tiny(dtype)
    if dtype == torch.float32:
        for layer in model.model.layers:
            fully_shard(layer)
    fully_shard(model)
    before = mean_loss(model)  # leaves the parameters of the outermost group gathered, which must not matter
    scores = estimate_importance(model, my_share(make_batches(4)), SHARDED, distributed=True)
    save_scores(scores, folder / "sharded")

    mask = select(scores.tensors("per_batch_abs"), 0.1)
    mask.save(folder / f"sharded-mask-{rank}.safetensors")
    parts = {name: weight.to_local().clone() for name, weight in scored_parameters(model).items()}
    with deactivate(model, mask):
        inside = mean_loss(model)
    assert mean_loss(model) == before
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, weight in scored_parameters(model).items():
        assert torch.equal(weight.to_local(), parts[name])

    said = {
        "unasked": refusal(lambda: estimate_importance(model, make_batches(1))),
        "sequence": refusal(lambda: estimate_importance(model, make_batches(1), ["fisher"], distributed=True)),
        "uneven": refusal(lambda: estimate_importance(model, my_share(make_batches(3)), SHARDED, distributed=True)),
        "ddp": refusal(
            lambda: estimate_importance(
                nn.parallel.DistributedDataParallel(tiny_llama()), make_batches(1), distributed=True
            )
        ),
    }
    torch.save({"losses": (before, inside), "said": said}, folder / f"sharded-{rank}.pt")


# ------------------------------------------------------------------------------------------------------------
# Compared with one process
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # The server imports these once, for both processes.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "transformers", "tiny"])
    torch.multiprocessing.start_processes(work, (port, str(folder)), nprocs=WORLD, start_method="forkserver")
    return folder


def assert_same(scores: Scores, expected: Scores, dtype: torch.dtype) -> None:
    assert scores.names == expected.names
    for reduction in expected.reductions:
        for name, tensor in expected.tensors(reduction).items():
            close(scores.tensors(reduction)[name], tensor, dtype)
        masks = [select(s.tensors(reduction), 0.1) for s in (scores, expected)]
        assert all(torch.equal(masks[0].tensor(name), masks[1].tensor(name)) for name in expected.names)
    for key in ("n_tokens", "n_sequences", "n_batches", "model", "parameters", "without_gradient"):
        assert scores.metadata[key] == expected.metadata[key], key
    assert scores.metadata["loss"] == pytest.approx(expected.metadata["loss"], rel=1e-6)
    assert scores.batch_tokens.tolist() == expected.batch_tokens.tolist()
    assert scores.batch_totals == pytest.approx(expected.batch_totals, rel=1e-5)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Within 1e-6 of each score; of the largest for a float32 model, whose gradients cancel and have no better."""
    if dtype == torch.float64:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    else:
        assert float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_replicas_give_the_scores_of_one_process_on_every_rank(results: Path, dtype: torch.dtype) -> None:
    expected = estimate_importance(tiny(dtype), make_batches(5), REPLICATED)
    for name in ("replicas", "replicas-0", "replicas-1"):
        scores = Scores.open(results / str(dtype) / name, verify=True)
        assert_same(scores, expected, dtype)
        assert scores.metadata["data"] == expected.metadata["data"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sharded_model_gives_the_scores_of_one_process_on_the_joined_batches(
    results: Path, dtype: torch.dtype
) -> None:
    expected = estimate_importance(tiny(dtype), joined(make_batches(4)), SHARDED)
    assert_same(Scores.open(results / str(dtype) / "sharded", verify=True), expected, dtype)
    mask = select(expected.tensors("per_batch_abs"), 0.1)
    for rank in range(WORLD):
        other = Mask.open(results / str(dtype) / f"sharded-mask-{rank}.safetensors")
        assert all(torch.equal(mask.tensor(name), other.tensor(name)) for name in mask.names)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deactivation_of_a_sharded_model(results: Path, dtype: torch.dtype) -> None:
    model = tiny(dtype)
    scores = estimate_importance(model, joined(make_batches(4)), SHARDED)
    before = mean_loss(model)
    with deactivate(model, select(scores.tensors("per_batch_abs"), 0.1)):
        inside = mean_loss(model)
    assert abs(inside - before) > 0.01
    for rank in range(WORLD):
        losses = torch.load(results / str(dtype) / f"sharded-{rank}.pt")["losses"]
        assert losses == pytest.approx((before, inside), rel=1e-5)


def test_what_is_refused_says_why(results: Path) -> None:
    for rank in range(WORLD):
        said = torch.load(results / str(DTYPES[0]) / f"sharded-{rank}.pt")["said"]
        assert "is sharded over processes; pass distributed=True" in said["unasked"]
        assert "fisher needs the gradients of single sequences" in said["sequence"]
        assert "Only 1 of 2 ranks have a batch 1" in said["uneven"]
        assert "pass model.module" in said["ddp"]


def test_without_a_process_group() -> None:
    with pytest.raises(UserError, match="needs a process group; start with torchrun"):
        estimate_importance(tiny_llama(), make_batches(1), distributed=True)
