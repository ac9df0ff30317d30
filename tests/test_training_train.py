"""Training: the loss falls, the same seed gives the same weights, interrupted and resumed gives the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches

from palimpsest import files
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.files import UserError
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.training import callbacks
from palimpsest.training.methods import Method
from palimpsest.training.train import AdaptorFirst, Align, Settings, n_steps, train
from spoken import spoken
from tiny import tiny_speech_lm

SCALES = {0: 1.0, 1: 0.6}
SETTINGS = Settings(epochs=2, batch_size=3, warmup_ratio=0.0, checkpoint_every=2, seed=1)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], Collator]:
    return spoken(tmp_path_factory.mktemp("audio"))


def run(setup, folder: Path, kind, settings: Settings = SETTINGS, progress=None, lr: float = 1e-2, **more):
    examples, collator = setup
    model, _ = tiny_speech_lm()
    folder.mkdir(exist_ok=True)
    method = kind if isinstance(kind, Method) else Method(kind, learning_rate=lr, rank=2)
    records = train(
        model, examples, collator, method, settings, folder,
        name=method.kind, scales=SCALES, progress=progress, **more,
    )  # fmt: skip
    return model, records


def state(model: SpeechLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["full", "layer_lr", "lora"])
def test_what_is_trained_and_what_is_not(setup, tmp_path: Path, kind: str) -> None:
    fresh = state(tiny_speech_lm()[0])
    model, records = run(setup, tmp_path / "run", kind)
    after = state(model)
    moved = {name for name in fresh if not torch.equal(fresh[name], after[name])}
    assert after.keys() == fresh.keys()  # LoRA is merged: a plain model again
    assert not any(name.startswith("encoder.") for name in moved)
    assert "adaptor.linear1.weight" in moved
    assert "language_model.model.layers.0.mlp.down_proj.weight" in moved
    assert ("language_model.model.embed_tokens.weight" in moved) == (kind != "lora")
    assert [r["step"] for r in records] == list(range(1, n_steps(8, SETTINGS) + 1))
    assert records[-1]["loss"] < records[0]["loss"]
    assert (tmp_path / "run" / "adapter").exists() == (kind == "lora")
    assert not (tmp_path / "run" / "trainer").exists()


BUDGET = Settings(epochs=3, batch_size=4, max_tokens=240, accumulation=2, warmup_ratio=0.1, checkpoint_every=1, seed=1)
FIRST = AdaptorFirst(epochs=1, learning_rate=1e-2, target="repeat")


@pytest.mark.parametrize(
    ("kind", "settings", "stop_at", "again"),
    [
        ("full", SETTINGS, 5, 5),  # the checkpoint is of step 4
        ("lora", SETTINGS, 5, 5),  # with dropout, whose random state must continue too
        ("layer_lr", BUDGET, 4, 4),  # in the second epoch; the checkpoint is of step 3
        ("lora", replace(SETTINGS, adaptor_first=FIRST), 3, 3),  # in the adaptor's phase of 3 steps
        ("lora", replace(BUDGET, adaptor_first=FIRST), 3, 3),  # in the first step of the method's phase
        ("full", replace(SETTINGS, adaptor_first=FIRST), 8, 8),  # deep in the method's phase
        ("lora", replace(SETTINGS, align=Align(epochs=2), adaptor_first=FIRST), 1, 1),  # in the alignment
        ("full", replace(SETTINGS, align=Align(epochs=2)), 7, 7),  # after it
    ],
)
def test_interrupted_and_resumed_gives_the_same_weights(
    setup, tmp_path: Path, kind: str, settings: Settings, stop_at: int, again: int
) -> None:
    method = Method(kind, learning_rate=1e-2, rank=2, dropout=0.3 if kind == "lora" else 0.0)
    whole_steps: list[int] = []
    whole, whole_records = run(setup, tmp_path / "whole", method, settings, lambda done, _: whole_steps.append(done))
    assert whole_steps == list(range(1, len(whole_steps) + 1))

    def stop(done: int, total: int) -> None:
        assert total == len(whole_steps)
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", method, settings, stop)
    # A kill while a later checkpoint is being written leaves half of one; it must not be taken.
    for folder in (tmp_path / "cut" / "trainer", tmp_path / "cut" / "trainer" / "adaptor"):
        if folder.exists():
            (folder / "checkpoint-999").mkdir()
            (folder / "checkpoint-999" / "model.safetensors").write_bytes(b"half")
    steps: list[int] = []
    resumed, resumed_records = run(setup, tmp_path / "cut", method, settings, lambda done, _: steps.append(done))
    assert steps == list(range(again, len(whole_steps) + 1))
    expected = state(whole)
    assert all(torch.equal(expected[name], value) for name, value in state(resumed).items())
    assert resumed_records == whole_records


class Skipped:
    """The rest of an epoch, behind which the Trainer does not reach the batches."""

    def __init__(self, loader: Any, n: int) -> None:
        self.loader = skip_first_batches(loader, n)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def test_the_batches_of_a_resumed_epoch_do_not_depend_on_what_the_trainer_reaches(
    setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.3 sets the epoch of what skipping returns, which does not hand it on."""
    monkeypatch.setattr("transformers.trainer.skip_first_batches", Skipped)
    test_interrupted_and_resumed_gives_the_same_weights(setup, tmp_path, "full", SETTINGS, 5, 5)


def test_the_loss_is_per_supervised_token_over_the_whole_step(setup, tmp_path: Path) -> None:
    # One batch of 8 and two accumulated batches of 4 are the same step.
    big, _ = run(setup, tmp_path / "big", "full", Settings(epochs=1, batch_size=8, seed=3), lr=1e-3)
    settings = Settings(epochs=1, batch_size=4, accumulation=2, seed=3)
    small, _ = run(setup, tmp_path / "small", "full", settings, lr=1e-3)
    expected = state(big)
    for name, value in state(small).items():
        assert torch.allclose(expected[name], value, atol=2e-4), name


def test_layer_lr_with_all_scales_one_is_full(setup, tmp_path: Path) -> None:
    examples, collator = setup
    full, _ = run(setup, tmp_path / "full", "full")
    model, _ = tiny_speech_lm()
    (tmp_path / "layer").mkdir()
    train(
        model, examples, collator, Method("layer_lr", learning_rate=1e-2), SETTINGS, tmp_path / "layer",
        name="layer_lr", scales={0: 1.0, 1: 1.0},
    )  # fmt: skip
    assert all(torch.equal(state(full)[name], value) for name, value in state(model).items())


def test_a_loss_that_is_not_finite_stops_with_the_examples_names(setup, tmp_path: Path) -> None:
    examples, collator = setup
    model, _ = tiny_speech_lm()
    with torch.no_grad():
        model.adaptor.linear2.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss is nan at step 1 \(e\d"):
        train(model, examples, collator, Method("full"), SETTINGS, tmp_path, name="full")


def test_a_training_of_one_step_changes_the_weights(setup, tmp_path: Path) -> None:
    one_step = replace(SETTINGS, epochs=1, batch_size=len(setup[0]), warmup_ratio=0.03)
    model, (record,) = run(setup, tmp_path, "full", one_step)
    assert record["learning_rate"] == 1e-2
    before = state(tiny_speech_lm()[0])
    assert not torch.equal(state(model)["language_model.lm_head.weight"], before["language_model.lm_head.weight"])


def test_weights_that_the_last_step_made_infinite_are_not_kept(setup, tmp_path: Path) -> None:
    examples, collator = setup
    model, _ = tiny_speech_lm()
    one_step = replace(SETTINGS, epochs=1, batch_size=len(examples), warmup_ratio=0.0)
    with pytest.raises(UserError, match=r"full after its last training step .*: the weight .* is not finite"):
        train(model, examples, collator, Method("full", learning_rate=1e39), one_step, tmp_path, name="full")


def test_no_examples_is_said(setup, tmp_path: Path) -> None:
    model, _ = tiny_speech_lm()
    with pytest.raises(UserError, match="no training examples"):
        train(model, [], setup[1], Method("full"), SETTINGS, tmp_path, name="full")


def test_lora_on_bfloat16_weights_is_refused_before_training(setup, tmp_path: Path) -> None:
    examples, collator = setup
    model = tiny_speech_lm()[0].bfloat16()
    with pytest.raises(UserError, match=r"LoRA would be merged into bfloat16 weights.*models.dtype.*models.compute"):
        train(model, examples, collator, Method("lora"), SETTINGS, tmp_path, name="lora")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_marked_only_when_all_of_it_is_on_the_disk(
    setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, bool]] = []  # path, whether its checkpoint was marked by then
    plain = files.sync

    def noted(path: Path) -> None:
        inside = [p for p in (path, *path.parents) if p.name.startswith("checkpoint-")]
        synced.append((path, bool(inside) and (inside[0] / "complete").exists()))
        plain(path)

    monkeypatch.setattr(callbacks, "sync", noted)
    kept: dict[Path, set[Path]] = {}

    def stop(done: int, total: int) -> None:
        for folder in (tmp_path / "trainer").glob("checkpoint-*"):
            kept[folder] = set(folder.rglob("*"))

    run(setup, tmp_path, "full", progress=stop)
    (folder,) = {path for path in kept if path.name == "checkpoint-4"}
    before = {path for path, marked in synced if not marked}
    assert kept[folder] - {folder / "complete"} <= before
    assert {folder, folder.parent} <= before
    assert synced.index((folder, True)) > synced.index((folder / "complete", True))
