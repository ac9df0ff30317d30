"""Replay: which batches of text stand where, what is learned of them, and that training with them is as without:
resumable to the bit, the same in several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from forked import forked
from palimpsest import parallel
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.in_loop import Recordings
from palimpsest.files import UserError
from palimpsest.models.fused_loss import Kernel
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.training import trainer
from palimpsest.training.batching import EpochBatches
from palimpsest.training.methods import Method
from palimpsest.training.phases import phases_of
from palimpsest.training.remedies import REPLAYED, Distill, Replay
from palimpsest.training.replay import MixedBatches, TextRow, collate_text, fitting, places, text_batches
from palimpsest.training.settings import AdaptorFirst, Settings
from palimpsest.training.train import train
from ranks import find_each_other, start_ranks
from spoken import spoken
from test_models_fused_loss import torch_kernel
from tiny import tiny_speech_lm

# Of five rows the first has 3 tokens, the last 15.
TEXT = [TextRow(f"t{i}", (1, 20 + i), tuple(range(30, 31 + 3 * i))) for i in range(5)]
HALF = Replay(share=0.5)
# Eight questions in batches of 3, 3 and 2, and as many batches of text: three steps of two batches.
SETTINGS = Settings(epochs=2, batch_size=3, accumulation=2, warmup_ratio=0.0, checkpoint_every=1, seed=1)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], Collator]:
    return spoken(tmp_path_factory.mktemp("audio"))


def run(
    setup: Any,
    folder: Path,
    kind: str,
    settings: Settings = SETTINGS,
    lr: float = 1e-2,
    dropout: float = 0,
    distill: Distill | None = None,
    **more: Any,
) -> Any:
    examples, collator = setup
    model, _ = tiny_speech_lm()
    folder.mkdir(parents=True, exist_ok=True)
    method = Method(kind, learning_rate=lr, rank=2, dropout=dropout, replay=HALF, distill=distill)  # type: ignore[arg-type]
    records = train(model, examples, collator, method, settings, folder, name=kind, replay=TEXT, **more)
    return model, records


def same(a: SpeechLM, b: SpeechLM, atol: float = 0.0) -> bool:
    other = b.state_dict()
    return all(torch.allclose(value, other[name], rtol=0, atol=atol) for name, value in a.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Which batches, and where
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("share", "n_questions", "n_text"),
    [(0.2, 8, 2), (0.5, 7, 7), (0.75, 4, 12), (0.1, 30, 3), (0.05, 4, 1), (0.25, 5, 2)],  # 8 / 4, …, 5 / 3 = 1.67
)
def test_the_share_is_of_all_batches_and_one_at_least(share: float, n_questions: int, n_text: int) -> None:
    assert Replay(share=share).n_batches(n_questions) == n_text


def test_text_stands_evenly_between_the_questions_whose_batches_stay() -> None:
    questions = EpochBatches(8, 2, 5)
    mixed = MixedBatches(EpochBatches(8, 2, 5), n_text=2, lengths=[4] * 7)
    assert len(mixed) == 6
    for epoch in range(3):
        mixed.set_epoch(epoch)
        batches = list(mixed)
        assert [batch[0] >= 8 for batch in batches] == [False, True, False, False, True, False]  # 6 / 4 and 18 / 4
        assert [batch for batch in batches if batch[0] < 8] == questions.batches(epoch)
    assert places(1, 3) == {0, 2, 3}  # 4/6, 12/6, 20/6


def test_every_row_is_used_once_before_any_is_used_again() -> None:
    mixed = MixedBatches(EpochBatches(6, 3, 1), n_text=2, lengths=[4] * 7)
    used = [i - 6 for epoch in range(7) for batch in mixed.batches(epoch) for i in batch if i >= 6]
    assert len(used) == 7 * 2 * 3
    rounds = [used[start : start + 7] for start in range(0, len(used), 7)]
    assert all(sorted(of) == list(range(7)) for of in rounds)
    assert len({tuple(of) for of in rounds}) > 1  # in another order each time
    other = MixedBatches(EpochBatches(6, 3, 2), n_text=2, lengths=[4] * 7)
    assert other.batches(0) != mixed.batches(0) == mixed.batches(0)


def test_a_token_budget_holds_for_text() -> None:
    lengths = [3, 9, 4, 12, 5, 8, 2]
    batches = list(islice(text_batches(lengths, 3, seed=4, max_tokens=18), 40))
    assert max(len(batch) * max(lengths[i] for i in batch) for batch in batches) <= 18
    used = [i for batch in batches for i in batch]
    assert sorted(used[:7]) == sorted(used[7:14]) == list(range(7))


def test_rows_above_the_budget_are_cut_and_too_few_are_refused() -> None:
    rows = [TextRow("a", (1, 2), (3, 4, 5)), TextRow("b", (1, 2, 3, 4), (5,)), TextRow("c", (1,), (2,))]
    kept = fitting(rows, 2, 4)
    assert [(row.context, row.tokens) for row in kept] == [((1, 2), (3, 4)), ((1,), (2,))]  # b would teach nothing
    assert fitting(rows, 3, None) == rows
    with pytest.raises(UserError, match=r"replay has 3 rows of text and training.batch_size is 4"):
        fitting(rows, 4, None)
    with pytest.raises(UserError, match="replay has 0 rows"):
        fitting([], 4, 8)


def test_options_of_the_other_kind_of_text_are_told() -> None:
    with pytest.raises(ValueError, match=r"window is of a source of text, which replay.text 'own' is not"):
        Replay(window=8)
    with pytest.raises(ValueError, match=r"n_texts is of text of the base's own"):
        Replay(text="wiki.txt", n_texts=8)


def test_what_is_read_and_what_is_learned() -> None:
    batch = collate_text([TextRow("a", (1, 5, 6), (7, 2)), TextRow("b", (1,), (8, 9))])
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 2], [1, 8, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 2], [-100, 8, 9, -100, -100]]
    assert (batch["ids"], batch[REPLAYED]) == (["a", "b"], True)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def test_a_step_of_text_moves_the_language_model_and_not_the_adaptor(setup: Any, tmp_path: Path) -> None:
    """Batches of 4: question, text, question, text."""
    examples, collator = setup
    model, _ = tiny_speech_lm()
    seen: list[dict[str, torch.Tensor]] = [{k: v.clone() for k, v in model.state_dict().items()}]

    def look(done: int, total: int) -> None:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})

    settings = dataclasses.replace(SETTINGS, accumulation=1, batch_size=4, epochs=1)
    method = Method("full", learning_rate=1e-2, replay=HALF)
    records = train(
        model, examples, collator, method, settings, tmp_path, name="m", replay=TEXT, progress=look
    )  # fmt: skip
    moved = [
        {name.partition(".")[0] for name in now if not torch.equal(now[name], before[name])}
        for before, now in pairwise(seen)
    ]
    both = {"adaptor", "language_model"}
    assert moved[:3] == [both, {"language_model"}, both]  # the rate of the fourth step is nearly 0
    assert [row["replayed"] for row in records] == [0, 1, 0, 1]
    assert [row.get("loss_replayed") for row in records] == [None, records[1]["loss"], None, records[3]["loss"]]


def test_the_loss_of_a_mixed_step_has_its_part_of_text(setup: Any, tmp_path: Path) -> None:
    examples, collator = setup
    _, records = run(setup, tmp_path, "full")
    question, text = MixedBatches(EpochBatches(8, 3, 1), 3, [len(row) for row in TEXT]).batches(0)[:2]
    model, _ = tiny_speech_lm()
    of_question, _ = supervised_losses(model, collator([examples[i] for i in question]))
    of_text, _ = supervised_losses(model, collate_text([TEXT[i - 8] for i in text]))
    first = records[0]
    assert first["replayed"] == len(of_text) / (len(of_text) + len(of_question))
    assert first["loss_replayed"] == pytest.approx(float(of_text.detach().mean()), rel=1e-5)
    whole = torch.cat([of_question, of_text]).mean()
    assert first["loss"] == pytest.approx(float(whole.detach()), rel=1e-5)
    assert [row["step"] for row in records] == [1, 2, 3, 4, 5, 6]


BUDGET = dataclasses.replace(SETTINGS, batch_size=4, max_tokens=160)
BOTH = Distill(speech=0.5, text=1.0, labels=0.5)
MIDDLE = 5  # the second step of the second epoch


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", SETTINGS),
        ("full", dataclasses.replace(BUDGET, adaptor_first=AdaptorFirst(1, 1e-2))),
        pytest.param("full", dataclasses.replace(SETTINGS, gradient_checkpointing=True), marks=pytest.mark.slow),
        pytest.param("full", BUDGET, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_gives_the_same_weights(
    setup: Any, tmp_path: Path, kind: str, settings: Settings
) -> None:
    dropout = {"dropout": 0.2 if kind == "lora" else 0.0}
    whole, whole_records = run(setup, tmp_path / "whole", kind, settings, **dropout)

    def stop(done: int, total: int) -> None:
        if done == MIDDLE:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", kind, settings, progress=stop, **dropout)
    resumed, records = run(setup, tmp_path / "cut", kind, settings, **dropout)
    assert same(whole, resumed)
    assert records == whole_records
    of_adaptor = [row for row in records if row["phase"] == "adaptor"]
    assert all("replayed" not in row for row in of_adaptor)
    assert len(of_adaptor) == (2 if settings.adaptor_first else 0)  # three batches of questions, two to a step


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on_with_the_same_weights(setup: Any, tmp_path: Path) -> None:
    """Of the base, from which is distilled, the killed process left nothing: it is taken anew."""
    whole, whole_records = run(setup, tmp_path / "whole", "full", distill=BOTH)
    (tmp_path / "setup.pickle").write_bytes(pickle.dumps(setup))
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r})\nimport test_replay\ntest_replay.killed({str(tmp_path)!r})"
    done = forked("import torch, transformers.trainer", code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps: list[int] = []
    resumed, records = run(
        setup, tmp_path / "cut", "full", distill=BOTH, progress=lambda done, _: steps.append(done)
    )  # fmt: skip
    assert steps == [MIDDLE, 6]
    assert same(whole, resumed)
    assert records == whole_records


def killed(folder: str) -> None:
    def stop(done: int, total: int) -> None:
        if done == MIDDLE:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    setup = pickle.loads((Path(folder) / "setup.pickle").read_bytes())
    run(setup, Path(folder) / "cut", "full", distill=BOTH, progress=stop)


def test_another_text_is_another_training(setup: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path, "full", progress=stop)
    examples, collator = setup
    method = Method("full", learning_rate=1e-2, rank=2, replay=HALF)
    with pytest.raises(UserError, match=r"another recipe .*replay"):
        train(tiny_speech_lm()[0], examples, collator, method, SETTINGS, tmp_path, name="full", replay=TEXT[:4])


def test_frames_made_in_the_loop_by_workers(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of text have no recordings; the processes that read these make them too."""
    examples, collator = setup
    looped = dataclasses.replace(collator, features=Recordings(collator.processor, examples))
    alone, records = run((examples, looped), tmp_path / "alone", "full")
    monkeypatch.setattr(trainer, "n_workers", lambda phase, device: 2)
    helped, same_records = run((examples, looped), tmp_path / "helped", "full")
    assert same(alone, helped)
    assert records == same_records
    (phase,) = phases_of(Method("full", replay=HALF), SETTINGS, examples, collator, None, TEXT)
    assert isinstance(phase.collate, type(pickle.loads(pickle.dumps(phase.collate))))  # where workers are not forked
    (batch,) = DataLoader(phase.rows, batch_sampler=[[8, 9]], collate_fn=phase.collate)  # type: ignore[arg-type]
    assert batch["ids"] == ["t0", "t1"]


def test_the_fused_loss_takes_text_too(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, records = run(setup, tmp_path / "plain", "full")

    def chosen(setting: Any, device: Any) -> Kernel:
        return torch_kernel

    monkeypatch.setattr("palimpsest.training.train.choose_kernel", chosen)
    fused, of_fused = run(setup, tmp_path / "fused", "full", dataclasses.replace(SETTINGS, liger=True))
    for key in ("loss", "loss_replayed"):
        assert [row[key] for row in of_fused] == pytest.approx([row[key] for row in records], rel=1e-3)
    assert same(plain, fused, 2e-3)


def test_the_adaptor_is_looked_for_only_with_text(setup: Any, tmp_path: Path) -> None:
    """DistributedDataParallel would wait for its gradients in a batch without speech."""
    for method, wanted in ((Method("full"), False), (Method("full", replay=HALF), True)):
        (phase,) = phases_of(method, SETTINGS, *setup, None, TEXT)
        given = trainer.arguments(tmp_path, phase, SETTINGS, "m", torch.device("cpu"))
        assert given.ddp_find_unused_parameters == wanted


def test_a_method_with_replay_needs_text(setup: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replay has 0 rows of text"):
        train(
            tiny_speech_lm()[0], *setup, Method("full", replay=HALF), SETTINGS, tmp_path, name="full"
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------
WORLD = 2
# The last batch of the questions has two rows, and one of text a single one: a rank has none of it.
ALONE = dataclasses.replace(SETTINGS, accumulation=1)
CASES = {
    "mixed": ("full", SETTINGS),
    "one-by-one": ("full", ALONE),
    "lora": ("lora", SETTINGS),
    "checkpointing": ("full", dataclasses.replace(SETTINGS, gradient_checkpointing=True)),
}


def work(rank: int, port: int, audio: str, out: str) -> None:
    find_each_other(rank, port, WORLD)
    os.environ["LOCAL_RANK"] = str(rank)
    with parallel.joined():
        setup = pickle.loads(Path(audio).read_bytes())
        for layout in ("replicas", "sharded"):
            for name, (kind, settings) in CASES.items():
                folder = Path(out) / "run" / f"{layout}-{name}"
                more = {"sharded": layout == "sharded"}
                model, records = run(setup, folder, kind, settings, lr=1e-3, **more)
                torch.save((model.state_dict(), records), Path(out) / f"{layout}-{name}-{rank}.pt")
                dist.barrier()
            resumed(setup, Path(out) / f"cut-{layout}", layout == "sharded")


def resumed(setup: Any, folder: Path, sharded: bool) -> None:
    def stop(done: int, total: int) -> None:
        if done == MIDDLE:
            raise KeyboardInterrupt

    whole, records = run(setup, folder / "whole", "full", sharded=sharded)
    with contextlib.suppress(KeyboardInterrupt):
        run(setup, folder / "cut", "full", sharded=sharded, progress=stop)
    dist.barrier()
    again, same_records = run(setup, folder / "cut", "full", sharded=sharded)
    assert same(whole, again)
    assert json.dumps(records) == json.dumps(same_records)
    dist.barrier()


@pytest.fixture(scope="module")
def out(setup: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "setup.pickle").write_bytes(pickle.dumps(setup))
    start_ranks(work, str(folder / "setup.pickle"), str(folder), world=WORLD)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicas", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(setup: Any, out: Path, tmp_path: Path, layout: str, case: str) -> None:
    kind, settings = CASES[case]
    model, expected = run(setup, tmp_path, kind, settings, lr=1e-3)
    for rank in range(WORLD):
        state, records = torch.load(out / f"{layout}-{case}-{rank}.pt")
        for key in ("loss", "replayed", "loss_replayed", "grad_norm"):
            found, wanted = ([row.get(key, 0.0) for row in rows] for rows in (records, expected))
            assert found == pytest.approx(wanted, rel=1e-3), key
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")
