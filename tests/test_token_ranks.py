"""Speech tokens in two gloo processes on the CPU: replicas and a model in parts train as one process, and read the
same ids."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from palimpsest import parallel as processes
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.models.tokens import Quantiser
from palimpsest.training.methods import Method
from palimpsest.training.remedies import Distill, Replay
from palimpsest.training.replay import TextRow
from palimpsest.training.settings import AdaptorFirst, Align, Settings
from palimpsest.training.train import train
from ranks import find_each_other, written_by_ranks
from spoken import spoken_tokens, token_speech_lm
from test_training_distributed import WORLD, assert_same, stop_at_5

K, RATE = 7, 1e-2  # rows that two ranks cannot share evenly
SETTINGS = Settings(epochs=2, batch_size=3, accumulation=2, warmup_ratio=0.0, weight_decay=0.01, seed=1)
CUT = replace(SETTINGS, accumulation=1, checkpoint_every=2)
TEXT = [TextRow(f"text {i}", (1, 5 + i), (9 + i, 10, 11 + i)) for i in range(5)]
FULL = Method("full", RATE, adaptor_learning_rate=RATE / 2, speech="tokens")
REMEDIES = replace(FULL, replay=Replay(0.5), distill=Distill(labels=0.5))  # batches of text alone reach no row
PHASES = replace(SETTINGS, align=Align(1, warmup_steps=1, batch_size=4), adaptor_first=AdaptorFirst(1, RATE))
CASES = {
    "full": (FULL, SETTINGS),
    "rows": (replace(FULL, kind="adaptor"), SETTINGS),
    "bf16": (FULL, replace(SETTINGS, compute="bfloat16")),
}
MORE = {
    "remedies": (REMEDIES, SETTINGS),
    "lora": (Method("lora", RATE, rank=2, speech="tokens"), SETTINGS),
    "phases": (replace(FULL, learning_rate=1e-3, adaptor_learning_rate=None), PHASES),
    "centroids": (replace(FULL, speech="centroids"), SETTINGS),
}
LAYOUTS = ("replicas", "sharded")


def run(inputs: Path, folder: Path, method: Method, settings: Settings, **more: Any) -> tuple[SpeechLM, list[Any]]:
    examples, collator, tokenizer = spoken_tokens(inputs, K)
    if method.speech == "centroids":
        old = collator.processor
        processor = type(old)(old.tokenizer, old.feature_extractor, stack_factor=5)
        collator = replace(collator, processor=processor)
    model = token_speech_lm(tokenizer, reads=method.speech)
    folder.mkdir(parents=True, exist_ok=True)
    replayed = TEXT if method.replay is not None else ()
    return model, train(model, examples[:7], collator, method, settings, folder, name="m", replay=replayed, **more)


def work(rank: int, port: int, inputs: str, out: str, more: bool) -> None:
    find_each_other(rank, port, WORLD)
    os.environ["LOCAL_RANK"] = str(rank)
    seen = watched_ids()
    with processes.joined():
        for layout in LAYOUTS:
            for name, (method, settings) in (MORE if more else CASES).items():
                seen.clear()
                folder = Path(out) / f"{layout}-{name}"
                model, records = run(Path(inputs) / str(rank), folder / "run", method, settings,
                                     sharded=layout == "sharded")  # fmt: skip
                dist.barrier()
                torch.save((model.state_dict(), records, sorted(seen)), folder / f"{rank}.pt")
        if more:
            interrupted(Path(inputs) / str(rank), Path(out))


def watched_ids() -> set[tuple[int | str, ...]]:
    """What the quantiser is given of each utterance, hashed, and reads in it, in this process and from now on."""
    seen: set[tuple[int | str, ...]] = set()
    plain = Quantiser.ids

    def ids(self: Quantiser, frames: torch.Tensor) -> torch.Tensor:
        found = plain(self, frames)
        there = (frames != 0).any(-1)
        for utterance, row, n in zip(frames, found, there.sum(1).tolist(), strict=True):
            given = hashlib.sha256(utterance[:n].float().numpy().tobytes()).hexdigest()
            seen.add((given, *row[: n // self.pool].tolist()))
        return found

    Quantiser.ids = ids  # type: ignore[method-assign]
    return seen


def interrupted(inputs: Path, out: Path) -> None:
    whole, cut = out / "whole", out / "cut"
    expected, records = run(inputs, whole, FULL, CUT, sharded=True)
    with contextlib.suppress(KeyboardInterrupt):
        run(inputs, cut, FULL, CUT, sharded=True, progress=stop_at_5)
    dist.barrier()
    steps: list[int] = []
    resumed, again = run(inputs, cut, FULL, CUT, sharded=True, progress=lambda done, _: steps.append(done))
    assert steps == [5, 6]
    assert again == records
    assert_same(expected, resumed, 0.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each rank, and one for this process."""
    folder = tmp_path_factory.mktemp("audio")
    for name in (*map(str, range(WORLD)), "alone"):
        (folder / name).mkdir()
    return folder


out = written_by_ranks(work, False, world=WORLD)
more_out = written_by_ranks(work, True, world=WORLD)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(
    inputs: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, case: str
) -> None:
    compare(inputs, out, tmp_path, monkeypatch, layout, case, *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MORE)
def test_with_remedies_phases_and_other_kinds(
    inputs: Path, more_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, case: str
) -> None:
    compare(inputs, more_out, tmp_path, monkeypatch, layout, case, *MORE[case])


def compare(
    inputs: Path, out: Path, folder: Path, patch: pytest.MonkeyPatch, layout: str, case: str, method: Method,
    settings: Settings,
) -> None:  # fmt: skip
    patch.setattr(Quantiser, "ids", Quantiser.ids)  # put back at the end
    seen = watched_ids()
    # The Trainer has no bf16 in one process on a CPU: compared with float32, roughly.
    model, expected = run(inputs / "alone", folder, method, replace(settings, compute="float32"))
    loose = settings.compute == "bfloat16"
    found = [torch.load(out / f"{layout}-{case}" / f"{rank}.pt") for rank in range(WORLD)]
    for state, records, _ in found:
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in expected], abs=0.1 if loose else 1e-4)
        if not loose:
            assert_same(model, state, 2e-3)  # AdamW divides by gradients near 0
    # In whatever arithmetic and layout: every utterance is given to the last bit, and read as the same ids.
    assert {tuple(ids) for *_, read in found for ids in read} == seen
    assert len(seen) > 1
