"""Two gloo processes on the CPU, started once: replicas and a sharded model give the scores of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from palimpsest.files import UserError
from palimpsest.importance import select as select_module
from palimpsest.importance.deactivate import deactivate
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.layouts import GatheredTensors, my_share, save_scores
from palimpsest.importance.scores import Scores, model_digest
from palimpsest.importance.select import Mask, select
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loss import supervised_losses
from ranks import find_each_other, start_ranks
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
    find_each_other(rank, port, WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        for dtype in DTYPES:
            replicas(Path(folder) / str(dtype), dtype)
            sharded(Path(folder) / str(dtype), dtype)
        selection(Path(folder))
        adapters(Path(folder))
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
    with torch.no_grad():
        model(input_ids=make_batches(1)[0]["input_ids"])  # leaves parameters gathered again
    Scores.open(folder / "sharded").check_model(model)
    assert model_digest(model) == model_digest(tiny(dtype))

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
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight.to_local()
        weight[rank - 1, 0] += float(rank)  # of rank 1's part only
    said["changed"] = refusal(lambda: Scores.open(folder / "sharded").check_model(model))
    assert model_digest(model) != model_digest(tiny(dtype))
    torch.save({"losses": (before, inside), "said": said}, folder / f"sharded-{rank}.pt")


def selection(folder: Path) -> None:
    """Masks from parts, of scores with many ties, in tensors that divide unevenly or not at all."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))

    def parts_of(whole: dict[str, Tensor], placement: Shard = Shard(0)) -> GatheredTensors:  # noqa: B008
        weights = {name: distribute_tensor(tensor, mesh, [placement]) for name, tensor in whole.items()}
        return GatheredTensors({name: weight.to_local() for name, weight in weights.items()}, weights)

    gather = GatheredTensors.__getitem__
    GatheredTensors.__getitem__ = None  # type: ignore[assignment]
    select_module.PIECE = PIECE
    for seed in range(3):
        whole = tied_scores(seed)
        for which, scope, ratio in SELECTIONS:
            mask = select(parts_of(whole), ratio, which, scope, seed)
            mask.save(folder / f"mask-{seed}-{which}-{scope}-{ratio}-{dist.get_rank()}")
    broken = tied_scores(0)
    broken[NAMES[1]][-1, 2] = torch.nan  # in the last rank's part
    said = {
        "unsound": refusal(lambda: select(parts_of(broken), 0.5)),
        "columns": refusal(lambda: select(parts_of(whole, Shard(1)), 0.5)),
    }
    torch.save(said, folder / f"selection-{dist.get_rank()}.pt")
    GatheredTensors.__getitem__ = gather  # type: ignore[method-assign]


def adapters(folder: Path) -> None:
    """A LoRA model, sharded: scored on merged weights, and left as it was."""
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    mean_loss(model)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    save_scores(estimate_importance(model, my_share(make_batches(4)), SHARDED, distributed=True), folder / "adapted")
    for name, p in model.named_parameters():
        assert torch.equal(p.to_local(), before[name]), name
        assert p.requires_grad == flags[name], name
    torch.save(mean_loss(model), folder / f"adapted-loss-{dist.get_rank()}.pt")


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(**SHAPE), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


PIECE = 16  # scores at a time, so that these small tensors are read in several pieces
NAMES = ("model.layers.0.a.weight", "model.layers.1.a.weight", "model.layers.0.b.weight", "model.layers.1.c.weight")
SELECTIONS = [
    (which, scope, ratio)
    for which in ("top", "bottom", "random")
    for scope in ("global", "per_layer", "per_matrix")
    for ratio in (0.0, 0.1, 0.5, 1.0)
]


def tied_scores(seed: int) -> dict[str, Tensor]:
    """Scores of which many are equal. One row, so that a rank has none; rows that end inside a byte of the mask."""
    generator = np.random.default_rng(seed)
    shapes = [(1, 9), (5, 7), (6, 11), (2, 3)]
    return {
        name: torch.from_numpy(generator.choice(np.float32([0, 1, 1, 1, 2.5, 2.0**-149]), shape))
        for name, shape in zip(NAMES, shapes, strict=True)
    }


# ------------------------------------------------------------------------------------------------------------
# Compared with one process
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, str(folder), world=WORLD)
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
        assert "belong to another model: the weights of model.layers.1.mlp.up_proj.weight differ" in said["changed"]
        selection = torch.load(results / f"selection-{rank}.pt")
        assert f"The scores of {NAMES[1]} hold a NaN" in selection["unsound"]
        assert "is sharded along another dimension than the first" in selection["columns"]


def test_masks_from_parts_are_those_of_whole_scores_ties_included(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_module, "PIECE", PIECE)
    for seed in range(3):
        whole = tied_scores(seed)
        for which, scope, ratio in SELECTIONS:
            expected = select(whole, ratio, which, scope, seed)  # type: ignore[arg-type]
            for rank in range(WORLD):
                mask = Mask.open(results / f"mask-{seed}-{which}-{scope}-{ratio}-{rank}")
                for name in NAMES:
                    assert torch.equal(mask.tensor(name), expected.tensor(name)), (which, scope, ratio, name)


def test_a_sharded_lora_model_is_scored_on_its_merged_weights(results: Path) -> None:
    model = adapted()
    expected = estimate_importance(model, joined(make_batches(4)), SHARDED)
    scores = Scores.open(results / "adapted", verify=True)
    for reduction in SHARDED:
        for name, tensor in expected.tensors(reduction).items():
            close(scores.tensors(reduction)[name], tensor, torch.float32)
    plain = estimate_importance(tiny_llama(**SHAPE), joined(make_batches(4)), SHARDED)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(plain.tensors("signed_sum")[name], expected.tensors("signed_sum")[name], rtol=1e-2)
    for rank in range(WORLD):
        assert torch.load(results / f"adapted-loss-{rank}.pt") == pytest.approx(mean_loss(model), rel=1e-6)


def test_without_a_process_group() -> None:
    with pytest.raises(UserError, match="needs a process group; start with torchrun"):
        estimate_importance(tiny_llama(), make_batches(1), distributed=True)


SCRIPT = """
import sys
from pathlib import Path

from torch.distributed.fsdp import fully_shard

from palimpsest.importance.layouts import my_share, save_scores
from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.select import select
from palimpsest.parallel import is_main, joined
from test_importance_distributed import SHAPE, make_batches, tiny_llama

folder = Path(sys.argv[1])
with joined():
    replica = estimate_importance(tiny_llama(**SHAPE), my_share(make_batches(4)), distributed=True)
    save_scores(replica, folder / "replicas")
    model = tiny_llama(**SHAPE)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    scores = estimate_importance(model, my_share(make_batches(4)), distributed=True)
    save_scores(scores, folder / "sharded")
    mask = select(scores.tensors("signed_sum"), 0.05)
    if is_main():
        mask.save(folder / "mask")
"""


@pytest.mark.slow
def test_a_script_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    replicas = estimate_importance(tiny_llama(**SHAPE), make_batches(4))
    sharded = estimate_importance(tiny_llama(**SHAPE), joined(make_batches(4)))
    for name, expected in (("replicas", replicas), ("sharded", sharded)):
        scores = Scores.open(tmp_path / name, verify=True)
        for reduction in SHARDED:
            for key, tensor in expected.tensors(reduction).items():
                close(scores.tensors(reduction)[key], tensor, torch.float32)
    expected_mask = select(sharded.tensors("signed_sum"), 0.05)
    mask = Mask.open(tmp_path / "mask")
    assert all(torch.equal(mask.tensor(key), expected_mask.tensor(key)) for key in mask.names)
