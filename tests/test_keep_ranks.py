"""What holds weights back, in two gloo processes on the CPU: replicas and a model in parts, as in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from palimpsest import parallel as processes
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.training.keep import Keep
from palimpsest.training.methods import Method
from palimpsest.training.remedies import Distill, Pull, Slow
from palimpsest.training.settings import Settings
from palimpsest.training.train import train
from ranks import find_each_other, written_by_ranks
from test_keep import scores
from test_training_distributed import CUT, SETTINGS, WORLD, assert_same, inputs, make_examples, stop_at_5
from tiny import tiny_speech_lm

__all__ = ["inputs"]
RATE = 1e-2
METHODS = {
    "full": Method("full", RATE, distill=Distill(temperature=2.0), pull=Pull(5.0, "fisher"), slow=Slow(0.1, scale=0.5)),
    "frozen": Method("full", RATE, pull=Pull(1.0), slow=Slow(0.2)),
    "lora": Method("lora", RATE, rank=2, distill=Distill()),
    "inserted": Method("inserted", RATE, new_layers=1, distill=Distill()),
    "gated": Method("lora", RATE, rank=2, gate="speech"),
    "oft": Method("peft", RATE, peft={"peft_type": "OFT", "oft_block_size": 4}),
}
LAYOUTS = ("replicas", "sharded")
CASES, MORE = ("full", "lora", "inserted"), ("frozen", "gated", "oft")


def run(
    inputs: Path, folder: Path, name: str, settings: Settings = SETTINGS, **more: Any
) -> tuple[SpeechLM, list[Any]]:
    model, _ = tiny_speech_lm()
    folder.mkdir(parents=True, exist_ok=True)
    keep = Keep(importance=scores(), fisher=scores(1))
    return model, train(model, *make_examples(inputs), METHODS[name], settings, folder, name=name, keep=keep, **more)


def work(rank: int, port: int, inputs: str, out: str, more: bool) -> None:
    find_each_other(rank, port, WORLD)
    os.environ["LOCAL_RANK"] = str(rank)
    with processes.joined():
        for layout in LAYOUTS:
            for name in MORE if more else CASES:
                folder = Path(out) / f"{layout}-{name}"
                model, records = run(Path(inputs), folder / "run", name, sharded=layout == "sharded")
                dist.barrier()
                torch.save((model.state_dict(), records), folder / f"{rank}.pt")
        if more:
            interrupted(Path(inputs), Path(out))


def interrupted(inputs: Path, out: Path) -> None:
    """In parts: what is divided anew must be the base's weights, not those of the checkpoint."""
    cut, whole = out / "cut", out / "whole"
    expected, _ = run(inputs, whole, "full", CUT, sharded=True)
    with contextlib.suppress(KeyboardInterrupt):
        run(inputs, cut, "full", CUT, sharded=True, progress=stop_at_5)
    dist.barrier()
    steps: list[int] = []
    resumed, _ = run(
        inputs, cut, "full", CUT, sharded=True, progress=lambda done, _: steps.append(done)
    )  # fmt: skip
    assert steps == [5, 6]
    assert_same(expected, resumed, 0.0)


out = written_by_ranks(work, False, world=WORLD)
more_out = written_by_ranks(work, True, world=WORLD)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(inputs: Path, out: Path, tmp_path: Path, layout: str, name: str) -> None:
    compare(inputs, out, tmp_path, layout, name)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MORE)
def test_frozen_weights_and_an_interruption(
    inputs: Path, more_out: Path, tmp_path: Path, layout: str, name: str
) -> None:
    compare(inputs, more_out, tmp_path, layout, name)


def compare(inputs: Path, out: Path, tmp_path: Path, layout: str, name: str) -> None:
    model, expected = run(inputs, tmp_path, name)
    for rank in range(WORLD):
        state, records = torch.load(out / f"{layout}-{name}" / f"{rank}.pt")
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], abs=1e-4)
        assert [r["grad_norm"] for r in records] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-3)
        assert_same(model, state, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_losses_differ_from_those_without(inputs: Path, tmp_path: Path, name: str) -> None:
    """So that the test above compares something."""
    _, with_it = run(inputs, tmp_path / "with", name)
    settings = dataclasses.replace(SETTINGS)
    model, _ = tiny_speech_lm()
    plain = dataclasses.replace(METHODS[name], distill=None, pull=None, slow=None)
    (tmp_path / "plain").mkdir()
    without = train(model, *make_examples(inputs), plain, settings, tmp_path / "plain", name=name)
    assert abs(with_it[0]["loss"] - without[0]["loss"]) > 1e-2
