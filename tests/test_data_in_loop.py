"""Speech encoded in the training loop: the same numbers as cached frames, and the choice between the two."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import test_study
from palimpsest import parallel as processes
from palimpsest.config import parse_config
from palimpsest.data import in_loop
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.data.in_loop import Encoded, Recordings, choose_frames, encode_batch, frame_bytes
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError
from palimpsest.models.compute import Arithmetic, computing
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SpeechLength, SpeechLM, encode_speech
from palimpsest.study import workspace
from palimpsest.study.run import run_study
from palimpsest.training import trainer
from palimpsest.training.methods import Method
from palimpsest.training.train import AdaptorFirst, Align, Settings, train
from ranks import find_each_other, start_ranks
from spoken import spoken
from test_study import recipe
from test_study_data import begin
from tiny import tiny_speech_lm

inputs = test_study.inputs  # the fixture
SETTINGS = Settings(epochs=2, batch_size=3, warmup_ratio=0.0, checkpoint_every=2, seed=1)
WORLD = 2


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], Collator]:
    return spoken(tmp_path_factory.mktemp("audio"))


def looped(examples: list[Example], cached: Collator) -> Collator:
    return replace(cached, features=Recordings(cached.processor, examples))


def run(
    examples: list[Example], collator: Collator, folder: Path, settings: Settings, kind: str = "full", **more: Any
) -> tuple[SpeechLM, list[Any]]:
    model, _ = tiny_speech_lm()
    folder.mkdir(parents=True, exist_ok=True)
    method = Method(kind, learning_rate=1e-3, rank=2, dropout=0.3 if kind == "lora" else 0.0)  # type: ignore[arg-type]
    return model, train(model, examples, collator, method, settings, folder, name=kind, **more)


def same(a: SpeechLM, b: SpeechLM, atol: float = 0.0) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=atol) for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", ["trim", "pad_to_30s"])
def test_the_same_batch_has_the_same_frames_and_losses_by_both_paths(
    tmp_path: Path, length: SpeechLength, compute: Arithmetic
) -> None:
    examples, _ = spoken(tmp_path, 4)
    model, processor = tiny_speech_lm(speech_length=length)
    compute_features(model.encoder, processor, examples, tmp_path / "frames", compute=compute)
    kept = Collator(processor, "speech", Features(tmp_path / "frames"))(examples)
    made = encode_batch(looped(examples, Collator(processor, "speech"))(examples), model.encoder, length, compute)
    assert kept.keys() == made.keys()
    assert all(torch.equal(kept[key], made[key]) for key in kept if key != "ids")
    assert (kept["encoder_frames"].dtype, made["encoder_frames"].dtype) == (torch.float16, torch.float16)
    assert made["frame_counts"].tolist() == ([25, 30, 35, 40] if length == "trim" else [1500] * 4)  # 0.5 s, 0.6 s …
    assert torch.equal(supervised_losses(model, kept)[0], supervised_losses(model, made)[0])

    # By hand: what the encoder gives, rounded once; without the rounding the loss differs by no more than that.
    mels, counts = processor.features([read_audio(example.audio) for example in examples if example.audio])
    with computing(compute, "cpu"):
        frames = encode_speech(model.encoder, mels, counts, length).float()
    assert torch.equal(kept["encoder_frames"].float(), frames.half().float())
    exact = supervised_losses(model, {**kept, "encoder_frames": frames})[0]
    assert torch.allclose(supervised_losses(model, made)[0], exact, atol=2e-2)


def test_cached_frames_travel_in_float16_and_are_the_same_numbers(setup: Any) -> None:
    examples, collator = setup
    model, _ = tiny_speech_lm()
    batch = collator(examples[::-1])
    frames = [collator.features[example.id] for example in examples[::-1]]
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    assert (batch["encoder_frames"].dtype, padded.dtype) == (torch.float16, torch.float32)
    assert torch.equal(batch["encoder_frames"].float(), padded)
    expected = supervised_losses(model, {**batch, "encoder_frames": padded})[0]
    assert torch.equal(supervised_losses(model, batch)[0], expected)


def test_training_is_the_same_by_both_paths(setup: Any, tmp_path: Path) -> None:
    examples, cached = setup
    kept, records = run(examples, cached, tmp_path / "kept", SETTINGS)
    made, found = run(examples, looped(examples, cached), tmp_path / "made", SETTINGS)
    # Frames of other batches: in the last bit of float16, 5e-4 of a number, here and there.
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in records], rel=1e-3)
    assert same(kept, made, 1e-3)
    assert same(tiny_speech_lm()[0].encoder, made.encoder)  # type: ignore[arg-type]


def test_training_in_bfloat16_encodes_in_bfloat16(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, cached = setup
    seen = []
    plain = in_loop.computing

    def computing_in(dtype: Arithmetic, device: Any) -> Any:
        seen.append(dtype)
        return plain(dtype, device)

    monkeypatch.setattr(in_loop, "computing", computing_in)
    run(examples, looped(examples, cached), tmp_path, replace(SETTINGS, compute="bfloat16", epochs=1))
    assert seen == ["bfloat16"] * 3  # three batches


@pytest.mark.parametrize(
    ("kind", "settings", "stop_at"),
    [
        ("full", SETTINGS, 5),  # in the second epoch; the checkpoint is of step 4
        ("lora", replace(SETTINGS, align=Align(epochs=1), adaptor_first=AdaptorFirst(1, 1e-2, "repeat")), 3),
    ],
)
def test_interrupted_and_resumed_gives_the_same_weights_with_worker_processes_too(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: Settings, stop_at: int
) -> None:
    examples, cached = setup
    collator = looped(examples, cached)
    whole, records = run(examples, collator, tmp_path / "whole", settings, kind)
    monkeypatch.setattr(trainer, "n_workers", lambda phase, device: 2)

    def stop(done: int, total: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(examples, collator, tmp_path / "cut", settings, kind, progress=stop)
    with pytest.raises(UserError, match=r"interrupted training of another recipe .*features"):
        run(examples, cached, tmp_path / "cut", settings, kind)
    resumed, again = run(examples, collator, tmp_path / "cut", settings, kind)
    assert same(whole, resumed)
    assert again == records


def test_worker_processes_are_for_gpus_recordings_and_enough_of_them(
    setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def workers(n: int, *, loop: bool = True, device: str = "cuda") -> int:
        phase: Any = SimpleNamespace(collator=SimpleNamespace(in_loop=loop), examples=range(n))
        return trainer.n_workers(phase, torch.device(device))

    assert [workers(n) for n in (8, 256, 600, 100_000)] == [0, 1, 2, 7]  # 16 cores of two processes, one of them theirs
    assert (workers(10**6, loop=False), workers(10**6, device="cpu")) == (0, 0)


def test_a_recording_that_goes_missing_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, cached = spoken(tmp_path)
    (tmp_path / "3.wav").unlink()
    for workers in (0, 1):
        monkeypatch.setattr(trainer, "n_workers", lambda phase, device, n=workers: n)
        with pytest.raises(UserError) as error:
            run(examples, looped(examples, cached), tmp_path / str(workers), SETTINGS)
        assert "3.wav" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no recording of the example 'unknown'"):
        Recordings(cached.processor, examples).batch(["unknown"])


def test_frames_one_by_one_and_their_bytes(setup: Any) -> None:
    examples, cached = setup
    model, processor = tiny_speech_lm()
    frames = Encoded(Recordings(processor, examples), model.encoder, "float32")
    for example in examples:
        assert frames.count(example.id) == cached.features.count(example.id) == len(frames[example.id])
        assert torch.allclose(frames[example.id], cached.features[example.id], atol=1e-3, rtol=1e-3)
    # 0.5 s and 0.1 s more each: 25, 30 … 60 frames of 16 numbers of two bytes; two examples with one file are one
    assert frame_bytes([*examples, replace(examples[0], id="again")], processor, 16) == sum(range(25, 65, 5)) * 16 * 2


# -- several processes ------------------------------------------------------------------------------------------------
def work(rank: int, port: int, audio: str, out: str) -> None:
    find_each_other(rank, port, WORLD)
    os.environ["LOCAL_RANK"] = str(rank)
    examples = [
        Example(f"e{i}", f"Question {i}?", (f"A{i}",), f"Answer A{i}.", Path(audio) / f"{i}.wav") for i in range(7)
    ]
    _, processor = tiny_speech_lm()
    collator = Collator(processor, "speech", Recordings(processor, examples))
    with processes.joined():
        for layout in ("replicas", "sharded"):
            model, records = run(examples, collator, Path(out) / layout, SETTINGS, sharded=layout == "sharded")
            dist.barrier()
            if rank == 0:
                torch.save((model.state_dict(), records), Path(out) / f"{layout}.pt")


def test_replicas_and_parts_encode_as_one_process_does(setup: Any, tmp_path: Path) -> None:
    examples, cached = setup[0][:7], setup[1]
    start_ranks(work, str(examples[0].audio.parent), str(tmp_path), world=WORLD)
    model, expected = run(examples, looped(examples, cached), tmp_path / "alone", SETTINGS)
    for layout in ("replicas", "sharded"):
        state, records = torch.load(tmp_path / f"{layout}.pt")
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], abs=1e-4)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=2e-3)
            assert not name.startswith("encoder.") or torch.equal(state[name], value)


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("frames", "free", "reads", "path", "why"),
    [
        (10, 100, 9, "cache", "10.0 GB of frames, each read 9 times, are at most 50% of the 100.0 GB that are free"),
        (50, 100, 2, "cache", "at most 50%"),  # half of the disk, just so
        (51, 100, 9, "loop", "51.0 GB of frames are more than 50% of the 100.0 GB that are free"),
        (2000, 1000, 9, "loop", "more than"),  # the paper's recipes
        (1, 100, 1, "loop", "training reads each recording once at most"),
        (1, 100, 0, "loop", "once at most"),  # every method is trained on text
        (1, 100, 1.5, "cache", "each read 1.5 times"),
        (0, 0, 9, "cache", "0.0 GB"),
    ],
)  # fmt: skip
def test_auto_caches_what_the_disk_and_the_epochs_justify(
    frames: float, free: float, reads: float, path: str, why: str
) -> None:
    found = choose_frames("auto", frame_bytes=int(frames * 1e9), free=int(free * 1e9), reads=reads)
    assert found.path == path
    assert why in found.reason
    for asked in ("cache", "loop"):  # what is asked for is what happens
        chosen = choose_frames(asked, frame_bytes=int(frames * 1e9), free=int(free * 1e9), reads=reads)  # type: ignore[arg-type]
        assert (chosen.path, chosen.reason) == (asked, "asked for")


def test_how_often_a_recipe_reads_its_recordings(inputs: Path) -> None:
    def reads(**changes: Any) -> float:
        return parse_config(recipe(inputs, **changes), "test").speech_reads

    assert reads() == 3  # three methods, an epoch
    methods = {"full": {"kind": "full"}, "text": {"kind": "full", "modality": "text"}}
    phases = {"align": {"epochs": 4}, "adaptor_first": {"epochs": 2, "learning_rate": 1e-3}}
    speech = {"adaptor_hidden_size": 24}
    assert reads(methods=methods, training={"epochs": 1.5, **phases}, speech=speech, seeds=2) == 2 * (1.5 + 4 + 2)


def test_another_value_of_the_key_is_refused_in_one_sentence(inputs: Path) -> None:
    with pytest.raises(UserError, match=r"speech\.features.*'cache', 'loop' or 'auto'") as error:
        parse_config(recipe(inputs, speech={"features": "disk"}), "test")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# In a study
# ---------------------------------------------------------------------------------------------------------------------
def test_a_study_in_the_loop_keeps_no_frames_of_its_training_data(
    inputs: Path,
    tmp_path: Path,
    no_figures: None,
) -> None:
    changes = {"methods": {"full": {"kind": "full", "learning_rate": 1e-3}}, "seed": 3}
    speech = {"adaptor_hidden_size": 24, "calibrate_adaptor": True}
    for path in ("cache", "loop"):
        values = recipe(inputs, **changes, speech={**speech, "features": path})
        run_study(parse_config(values, "test"), tmp_path / path)
    assert {p.name for p in (tmp_path / "cache" / "features").iterdir() if p.is_dir()} - {"cache"} == {
        "train", "heldout", "task-numbers",
    }  # fmt: skip
    assert not (tmp_path / "loop" / "features" / "train").exists()
    assert (tmp_path / "loop" / "features" / "heldout" / "index.json").exists()
    found = {path: json.loads((tmp_path / path / "results.json").read_text()) for path in ("cache", "loop")}
    losses = {path: [r["loss"] for r in found[path]["training"]] for path in found}
    assert losses["loop"] == pytest.approx(losses["cache"], rel=2e-3)
    for path in found:
        step = json.loads((tmp_path / path / "methods" / "full" / "checkpoint" / "step.json").read_text())
        assert step["inputs"]["speech"]["features"] == path
        assert json.loads((tmp_path / path / "features" / "step.json").read_text())["inputs"]["train"] == path
        said = json.loads((tmp_path / path / "provenance.json").read_text())["features"]
        assert said == {"wanted": path, "path": path, "reason": "asked for"}


def test_what_auto_came_to_stays_when_the_disk_has_filled(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = recipe(inputs, speech={"adaptor_hidden_size": 24, "features": "auto"})
    study = begin(values, tmp_path / "run")
    assert study.ws.frames.path == "cache"
    before = (tmp_path / "run" / "features" / "step.json").read_text()
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(workspace.Workspace, "require_disk", lambda ws, frames=0: None)
    again = begin(values, tmp_path / "run")
    assert again.ws.frames == study.ws.frames
    assert (tmp_path / "run" / "features" / "step.json").read_text() == before
    full = begin(values, tmp_path / "full")
    assert full.ws.frames.path == "loop"
    assert not (tmp_path / "full" / "features" / "train").exists()
    file = tmp_path / "run" / "frames.json"
    kept = file.read_text()
    for damaged in ("[1, 2]", "{}", kept.replace('"choice"', '"chosen"'), kept.replace('"cache"', '"cash"')):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"frames\.json is damaged"):
            begin(values, tmp_path / "run")
    file.write_text(kept)
    # Another question is asked anew: one method, once.
    once = begin({**values, "methods": {"full": {"kind": "full"}}}, tmp_path / "run")
    assert "once at most" in once.ws.frames.reason


def test_the_disk_must_hold_the_frames_too(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin(recipe(inputs), tmp_path / "run")
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 100)  # without frames it would be of the next step
    with pytest.raises(UserError, match=r"The study tiny needs .* GB by its step base/importance but"):
        begin(recipe(inputs), tmp_path / "short")
