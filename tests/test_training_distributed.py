"""Two gloo processes on the CPU, started once: replicas and a model in parts train like one process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist

from palimpsest import parallel as processes
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.files import UserError
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.training import distributed
from palimpsest.training.batching import EpochBatches
from palimpsest.training.methods import Method
from palimpsest.training.train import AdaptorFirst, Settings, train
from ranks import find_each_other, written_by_ranks
from tiny import tiny_speech_lm

WORLD = 2
SCALES = {0: 1.0, 1: 0.6}
# Batches of 3, 3 and 1 rows in every epoch: a rank has two or one, or none; and two batches make a step.
SETTINGS = Settings(epochs=2, batch_size=3, accumulation=2, warmup_ratio=0.0, weight_decay=0.01, seed=1)
KINDS = ("full", "layer_lr", "lora")
LAYOUTS = ("replicas", "sharded")
MORE = {
    "two-phases": ("full", dataclasses.replace(SETTINGS, adaptor_first=AdaptorFirst(1, 1e-2))),
    "checkpointing": ("full", dataclasses.replace(SETTINGS, gradient_checkpointing=True)),
    "budget": ("full", dataclasses.replace(SETTINGS, max_tokens=150)),
    "evaluated": ("full", dataclasses.replace(SETTINGS, eval_every=2)),
    "bf16": ("full", dataclasses.replace(SETTINGS, compute="bfloat16")),
}
CASES = {kind: (kind, SETTINGS) for kind in KINDS}
CUTS = [("sharded", "layer_lr")]
MORE_CUTS = [("replicas", "full"), ("sharded", "full"), ("replicas", "lora"), ("sharded", "lora")]
CUT = dataclasses.replace(SETTINGS, accumulation=1, checkpoint_every=2)  # 6 steps


def make_examples(folder: Path) -> tuple[list[Example], Collator]:
    """Answers of 1 to 40 times another letter: the ranks' shares differ in their number of tokens and loss of each."""
    _, processor = tiny_speech_lm()
    examples = [
        Example(f"e{i}", f"Question {i}?", (f"A{i}",), chr(65 + 3 * i) * (1 + 13 * (i % 4)), folder / f"{i}.wav")
        for i in range(7)
    ]
    return examples, Collator(processor, "speech", Features(folder / "features"))


def run(
    inputs: Path, folder: Path, kind: str, settings: Settings = SETTINGS, *, progress: Any = None, sharded: bool = False
) -> tuple[SpeechLM, list[Any]]:
    examples, collator = make_examples(inputs)
    model, _ = tiny_speech_lm()
    folder.mkdir(parents=True, exist_ok=True)
    # The first step of AdamW is the sign of the gradient, noise where that is 0; after the first phase more of it is.
    rate = 1e-3 if settings.adaptor_first else 1e-2
    method = Method(kind, learning_rate=rate, adaptor_learning_rate=rate / 2, rank=2)  # type: ignore[arg-type]
    records = train(
        model, examples, collator, method, settings, folder,
        name=kind, scales=SCALES, sharded=sharded, progress=progress,
        held_out={"speech": (collator, examples[:3])} if settings.eval_every else None,
    )  # fmt: skip
    return model, records


def stop_at_5(done: int, total: int) -> None:
    if done == 5:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------------
# What every rank runs
# ---------------------------------------------------------------------------------------------------------------------
def work(rank: int, port: int, inputs: str, out: str, more: bool) -> None:
    find_each_other(rank, port, WORLD)
    os.environ["LOCAL_RANK"] = str(rank)
    with processes.joined():
        assert (processes.rank(), processes.world_size()) == (rank, WORLD)
        for layout in LAYOUTS:
            for name, (kind, settings) in (MORE if more else CASES).items():
                save(Path(out) / f"{layout}-{name}-{rank}.pt", run_layout(inputs, out, layout, kind, settings))
        for layout, kind in MORE_CUTS if more else CUTS:
            interrupted(Path(inputs), Path(out), layout, kind)
        refusals(Path(inputs), Path(out))


def run_layout(inputs: str, out: str, layout: str, kind: str, settings: Settings) -> Any:
    folder = Path(out) / "run" / f"{layout}-{kind}"
    result = run(Path(inputs), folder, kind, settings, sharded=layout == "sharded")
    dist.barrier()
    return result


def interrupted(inputs: Path, out: Path, layout: str, kind: str) -> None:
    """Cut at step 5, continued from the checkpoint of step 4; copies are left for another layout to continue."""
    folder, sharded = out / "cut" / f"{layout}-{kind}", layout == "sharded"
    whole = run(inputs, folder / "whole", kind, CUT, sharded=sharded)
    with contextlib.suppress(KeyboardInterrupt):
        run(inputs, folder / "cut", kind, CUT, sharded=sharded, progress=stop_at_5)
    dist.barrier()
    if processes.is_main():
        # A kill while a later checkpoint is being written leaves half of one; it must not be taken.
        (folder / "cut" / "trainer" / "checkpoint-5").mkdir()
        for name in ("other", "alone"):
            shutil.copytree(folder / "cut", folder / name)
    dist.barrier()
    steps: list[int] = []
    resumed = run(inputs, folder / "cut", kind, CUT, sharded=sharded, progress=lambda done, _: steps.append(done))
    assert steps == [5, 6]
    assert resumed[1] == whole[1]
    assert_same(whole[0], resumed[0], 0.0)
    steps.clear()
    other = run(inputs, folder / "other", kind, CUT, sharded=not sharded, progress=lambda done, _: steps.append(done))
    assert steps == [5, 6]
    assert_same(whole[0], other[0], 1e-4)
    save(folder / f"whole-{processes.rank()}.pt", whole)


def refusals(inputs: Path, out: Path) -> None:
    said = []
    for changes in ({"liger": True}, {"compile": True}):
        with pytest.raises(UserError) as error:
            run(inputs, out / "refused", "full", dataclasses.replace(SETTINGS, **changes), sharded=True)
        said.append(str(error.value))
    save(out / f"refused-{processes.rank()}.pt", (None, said))


def save(path: Path, result: Any) -> None:
    model, records = result
    torch.save((None if model is None else model.state_dict(), records), path)


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    a, b = (model.state_dict() if isinstance(model, SpeechLM) else model for model in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Compared with one process
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for i in range(7):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, 8_000 + 1_600 * i), 16_000)
    model, processor = tiny_speech_lm()
    compute_features(model.encoder, processor, make_examples_without_features(folder), folder / "features")
    return folder


def make_examples_without_features(folder: Path) -> list[Example]:
    return [Example(f"e{i}", f"Question {i}?", (f"A{i}",), "A", folder / f"{i}.wav") for i in range(7)]


out = written_by_ranks(work, False, world=WORLD)
more_out = written_by_ranks(work, True, world=WORLD)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_one_process(inputs: Path, out: Path, tmp_path: Path, layout: str, case: str) -> None:
    compare(inputs, out, tmp_path, layout, case, *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MORE)
def test_the_losses_with_other_settings(inputs: Path, more_out: Path, tmp_path: Path, layout: str, case: str) -> None:
    compare(inputs, more_out, tmp_path, layout, case, *MORE[case])


def compare(inputs: Path, out: Path, tmp_path: Path, layout: str, case: str, kind: str, settings: Settings) -> None:
    # The Trainer has no bf16 in one process on a CPU: compared with float32, roughly.
    model, expected = run(inputs, tmp_path / "run", kind, dataclasses.replace(settings, compute="float32"))
    tolerance = 0.1 if settings.compute == "bfloat16" else 1e-4
    for rank in range(WORLD):
        state, records = torch.load(out / f"{layout}-{case}-{rank}.pt")
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], abs=tolerance)
        norms = [[r["grad_norm"] for r in some if r["kind"] == "train"] for some in (records, expected)]
        assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)
        for field in ("step", "epoch", "learning_rate", "phase", "kind"):
            assert [r[field] for r in records] == [r[field] for r in expected]
        assert {value.dtype for value in state.values()} == {torch.float32}
        if settings.compute == "float32":
            assert_same(model, state, 2e-3)  # AdamW divides by gradients near 0


def test_the_mean_of_the_ranks_means_would_be_another_loss(inputs: Path) -> None:
    """What normalising by each rank's own tokens would report for the first step."""
    examples, collator = make_examples(inputs)
    model, _ = tiny_speech_lm()
    model.train()
    first = EpochBatches(7, 3, SETTINGS.seed).batches(0)[:2]
    shares = [[losses_of(model, collator, [examples[i] for i in rows[r::WORLD]]) for rows in first] for r in range(2)]
    together = torch.cat([losses for share in shares for losses in share]).mean()
    by_rank = torch.stack([torch.cat(share).mean() for share in shares]).mean()
    assert abs(float(together - by_rank)) > 1e-3  # ten times what test_the_losses_… allows


def losses_of(model: SpeechLM, collator: Collator, examples: list[Example]) -> torch.Tensor:
    return supervised_losses(model, collator(examples))[0].detach()


@pytest.mark.parametrize(("layout", "kind"), CUTS)
def test_one_process_continues_what_two_began(inputs: Path, out: Path, layout: str, kind: str) -> None:
    continue_alone(inputs, out, layout, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kind"), MORE_CUTS)
def test_one_process_continues_the_other_methods(inputs: Path, more_out: Path, layout: str, kind: str) -> None:
    continue_alone(inputs, more_out, layout, kind)


def continue_alone(inputs: Path, out: Path, layout: str, kind: str) -> None:
    folder = out / "cut" / f"{layout}-{kind}"
    steps: list[int] = []
    model, _ = run(inputs, folder / "alone", kind, CUT, progress=lambda done, _: steps.append(done))
    assert steps == [5, 6]
    assert_same(model, torch.load(folder / "whole-0.pt")[0], 1e-4)


def test_every_rank_ends_with_the_same_weights_and_rank_0_writes(out: Path) -> None:
    for layout in LAYOUTS:
        for case in KINDS:
            states = [torch.load(out / f"{layout}-{case}-{rank}.pt")[0] for rank in range(WORLD)]
            assert_same(*states, 0.0)
        assert (out / "run" / f"{layout}-lora" / "adapter" / "adapter_model.safetensors").exists()
        assert not (out / "run" / f"{layout}-full" / "trainer").exists()


def test_what_does_not_go_with_parts_is_refused(inputs: Path, out: Path, tmp_path: Path) -> None:
    for rank in range(WORLD):
        said = torch.load(out / f"refused-{rank}.pt")[1]
        assert "training.liger is true, but the fused loss takes the head's weights" in said[0]
        assert "training.compile is not supported with a sharded model" in said[1]
    with pytest.raises(UserError, match="and there is one; start with torchrun"):
        run(inputs, tmp_path, "full", sharded=True)


def test_shares_of_batches_cover_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = EpochBatches(11, 4, 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(distributed.Share(batches)))
    for number, rows in enumerate(batches.batches(0)):
        counted = [index for share in shares for index, counts in share[number] if counts]
        assert sorted(counted) == sorted(rows)
        assert all(share[number] for share in shares)
