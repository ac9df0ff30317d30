"""What each training option does, and what is refused before training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.data.collate import Collator, to_device
from palimpsest.data.examples import Example
from palimpsest.files import UserError
from palimpsest.models.fused_loss import Kernel
from palimpsest.models.loss import supervised_losses
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.records import TrainingRecord
from palimpsest.training.batching import sequence_lengths
from palimpsest.training.methods import Method
from palimpsest.training.phases import phases_of, repeating
from palimpsest.training.train import AdaptorFirst, Settings, train
from palimpsest.training.trainer import SpeechTrainer, arguments
from spoken import spoken
from test_models_fused_loss import torch_kernel
from tiny import tiny_llama, tiny_speech_lm

CPU = torch.device("cpu")
SETTINGS = Settings(epochs=1, batch_size=3, seed=1)
Setup = tuple[list[Example], Collator]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return spoken(tmp_path_factory.mktemp("audio"))


def run(
    setup: Setup, folder: Path, settings: Settings = SETTINGS, method: Method | None = None, **more: Any
) -> tuple[SpeechLM, list[TrainingRecord]]:
    model = more.pop("model", None) or tiny_speech_lm()[0]
    method = method or Method("full", learning_rate=1e-3, rank=2)
    folder.mkdir(exist_ok=True)
    return model, train(model, *setup, method, settings, folder, name="m", **more)


def state(model: SpeechLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def close(a: SpeechLM, b: SpeechLM, atol: float) -> bool:
    first, second = state(a), state(b)
    return all(torch.allclose(first[name], second[name], atol=atol) for name in first)


def trainer(setup: Setup, folder: Path, settings: Settings) -> SpeechTrainer:
    """As `run_phase` makes it, not yet started."""
    (phase,) = phases_of(Method("full"), settings, *setup, None)
    return SpeechTrainer(
        tiny_speech_lm()[0], phase, arguments(folder, phase, settings, "m", CPU),
        kernel=None, held_out={}, max_tokens=settings.max_tokens,
    )  # fmt: skip


# -- the same training by other means ---------------------------------------------------------------------------------
def test_gradient_checkpointing_computes_the_same(setup: Setup, tmp_path: Path) -> None:
    plain, records = run(setup, tmp_path / "plain")
    calls: list[int] = []
    model, _ = tiny_speech_lm()
    model.language_model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again, same = run(setup, tmp_path / "again", replace(SETTINGS, gradient_checkpointing=True), model=model)
    assert len(calls) == 2 * 3  # three steps, each layer computed again in the backward pass
    assert [r["loss"] for r in same] == pytest.approx([r["loss"] for r in records], rel=1e-6)
    assert close(plain, again, 1e-6)
    assert not again.language_model.is_gradient_checkpointing


def test_bf16_rounds_the_computation_and_not_the_weights(setup: Setup, tmp_path: Path) -> None:
    _, records = run(setup, tmp_path / "exact")
    rounded, near = run(setup, tmp_path / "rounded", replace(SETTINGS, compute="bfloat16"))
    assert all(value.dtype == torch.float32 for value in rounded.parameters())
    assert near[0]["loss"] != records[0]["loss"]
    assert [r["loss"] for r in near] == pytest.approx([r["loss"] for r in records], rel=0.02)
    # The model that comes back computes in float32 again: as it will when it is read from disk.
    twin, _ = tiny_speech_lm()
    twin.load_state_dict(rounded.state_dict())
    batch = setup[1](setup[0][:3])
    assert torch.equal(supervised_losses(rounded, batch)[0], supervised_losses(twin, batch)[0])


def test_the_fused_loss_trains_the_same(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, records = run(setup, tmp_path / "plain")
    calls: list[int] = []

    def counting(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return torch_kernel(*arguments)

    def chosen(setting: Any, device: Any) -> Kernel:
        assert setting is True
        return counting

    monkeypatch.setattr("palimpsest.training.train.choose_kernel", chosen)
    fused, same = run(setup, tmp_path / "fused", replace(SETTINGS, liger=True))
    assert len(calls) == 1 + 3  # compared with the plain loss once, then a step each
    assert [r["loss"] for r in same] == pytest.approx([r["loss"] for r in records], rel=1e-5)
    assert close(plain, fused, 1e-4)


def test_compile_is_passed_on_and_taken_off(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    (phase,) = phases_of(Method("full"), SETTINGS, *setup, None)
    assert not arguments(tmp_path, phase, SETTINGS, "m", CPU).torch_compile
    compiled: list[Any] = []

    def compile_nothing(model: Any, **options: Any) -> Any:
        compiled.append(options["backend"])
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    run(setup, tmp_path / "run", replace(SETTINGS, compile=True))
    assert compiled == ["inductor"]
    import os

    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(setup: Setup, tmp_path: Path) -> None:
    plain, _ = run(setup, tmp_path / "plain")
    compiled, _ = run(setup, tmp_path / "compiled", replace(SETTINGS, compile=True))
    assert close(plain, compiled, 1e-4)


# -- token budget -----------------------------------------------------------------------------------------------------
def test_batches_of_a_step_weigh_by_their_tokens(setup: Setup, tmp_path: Path) -> None:
    """Batches of unequal size under a budget, accumulated to one step, are the one batch of all examples."""
    lengths = sequence_lengths(setup[1], setup[0])
    budget = 3 * max(lengths)
    whole, expected = run(setup, tmp_path / "whole", Settings(epochs=1, batch_size=8, seed=3))
    parts = Settings(epochs=1, batch_size=8, max_tokens=budget, accumulation=8, seed=3)
    pieces = trainer(setup, tmp_path / "t", parts).phase.batches
    assert sorted(len(batch) for batch in pieces) == [2, 3, 3]
    summed, found = run(setup, tmp_path / "parts", parts)
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-5)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-4)
    assert close(whole, summed, 2e-4)


def test_the_trainer_sees_the_batches_of_each_epoch(setup: Setup, tmp_path: Path) -> None:
    settings = Settings(epochs=2, batch_size=3, seed=4)
    seen: list[list[str]] = []
    examples, collator = setup

    class Recording:
        processor, modality, in_loop = collator.processor, collator.modality, False

        def __call__(self, rows: list[Example]) -> Any:
            seen.append([example.id for example in rows])
            return collator(rows)

    train(tiny_speech_lm()[0], examples, Recording(), Method("full"), settings, tmp_path, name="m")  # type: ignore[arg-type]
    batches = trainer(setup, tmp_path / "t", settings).phase.batches
    assert seen == [[examples[i].id for i in rows] for epoch in range(2) for rows in batches.batches(epoch)]


# -- two phases -------------------------------------------------------------------------------------------------------
def test_the_first_phase_trains_the_adaptor_alone(setup: Setup, tmp_path: Path) -> None:
    first = AdaptorFirst(epochs=2, learning_rate=1e-2)
    model, _ = tiny_speech_lm()
    before, after_first = state(model), {}

    def look(done: int, total: int) -> None:
        assert total == 6 + 3
        if done == 6:
            after_first.update(state(model))

    _, records = run(setup, tmp_path / "run", replace(SETTINGS, adaptor_first=first), model=model, progress=look)
    moved = {name for name in before if not torch.equal(before[name], after_first[name])}
    assert moved == {f"adaptor.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert any(not torch.equal(before[name], value) for name, value in state(model).items() if "layers" in name)
    assert [(r["phase"], r["step"]) for r in records] == [
        *[("adaptor", i) for i in range(1, 7)],
        *[("method", i) for i in range(7, 10)],
    ]
    assert max(r["learning_rate"] for r in records if r["phase"] == "adaptor") > 5e-3


def test_repeating_asks_for_the_words_of_the_question(setup: Setup) -> None:
    examples, collator = setup
    said, listener = repeating(examples, collator, "Repeat it.")
    batch = listener(said[:1])
    text = collator.processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert text == "Question 0?<end>"
    prompt = [token for token in batch["input_ids"][0].tolist() if token >= 0]
    assert "Repeat it." in collator.processor.tokenizer.decode(prompt)
    assert torch.equal(batch["encoder_frames"], collator(examples[:1])["encoder_frames"])
    assert "Answer the question" in collator.processor.style.speech_instruction


def test_a_first_phase_needs_speech(setup: Setup, tmp_path: Path) -> None:
    examples, collator = setup
    settings = replace(SETTINGS, adaptor_first=AdaptorFirst(1, 1e-3))
    with pytest.raises(UserError, match="needs spoken questions"):
        run((examples, replace(collator, modality="text")), tmp_path, settings)


# -- evaluation between steps -----------------------------------------------------------------------------------------
def test_perplexity_between_steps_is_recorded_and_changes_nothing(setup: Setup, tmp_path: Path) -> None:
    examples, collator = setup
    settings = Settings(epochs=2, batch_size=3, seed=1, eval_every=4, checkpoint_every=4)
    held_out = {"text": (replace(collator, modality="text"), examples[:5]), "speech": (collator, examples[:3])}
    without, plain = run(setup, tmp_path / "without", replace(settings, eval_every=None))
    watched, records = run(setup, tmp_path / "with", settings, held_out=held_out)
    assert all(torch.equal(value, state(without)[name]) for name, value in state(watched).items())
    assert [r for r in records if r["kind"] == "train"] == plain
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [(r["step"], r["modality"]) for r in evaluations] == [(i, m) for i in (4, 6) for m in ("speech", "text")]
    for record in evaluations[-2:]:  # the last: of the finished model
        reader, group = held_out[record["modality"]]
        losses, _ = supervised_losses(watched, reader(group))
        assert record["n_tokens"] == len(losses)
        assert record["loss"] == pytest.approx(float(losses.detach().mean()), rel=1e-5)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert json.loads(json.dumps(records)) == records

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path / "cut", settings, held_out=held_out, progress=stop)
    assert run(setup, tmp_path / "cut", settings, held_out=held_out)[1] == records


@pytest.mark.parametrize("held_out", [None, {}, {"text": (None, [])}])
def test_evaluation_needs_held_out_examples(setup: Setup, tmp_path: Path, held_out: Any) -> None:
    with pytest.raises(UserError, match="no held-out examples"):
        run(setup, tmp_path, replace(SETTINGS, eval_every=1), held_out=held_out)


# -- loggers ----------------------------------------------------------------------------------------------------------
def test_loggers_are_the_trainers_own(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    (phase,) = phases_of(Method("full"), SETTINGS, *setup, None)
    assert arguments(tmp_path, phase, SETTINGS, "m", CPU).report_to == []
    with_loggers = arguments(tmp_path, phase, replace(SETTINGS, report_to=("tensorboard", "wandb")), "m", CPU)
    assert (with_loggers.report_to, with_loggers.run_name) == (["tensorboard", "wandb"], "m")


@pytest.mark.parametrize(
    ("name", "message"), [("wandb", "not installed"), ("tensorbord", "transformers does not know")]
)
def test_a_logger_that_is_not_there_is_told_before_training(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        run(setup, tmp_path, replace(SETTINGS, report_to=(name,)))
    assert not (tmp_path / "trainer").exists()


def test_tensorboard_files_stay(setup: Setup, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(setup, tmp_path / "run", replace(SETTINGS, report_to=("tensorboard",)))
    assert list((tmp_path / "run" / "logs" / "method").rglob("events.*"))


# -- what is refused --------------------------------------------------------------------------------------------------
def test_an_example_above_the_budget_is_named_before_training(setup: Setup, tmp_path: Path) -> None:
    longest = max(sequence_lengths(setup[1], setup[0]))
    with pytest.raises(UserError, match=rf"'e7' has {longest} tokens"):  # e7 has the longest recording
        run(setup, tmp_path, replace(SETTINGS, max_tokens=longest - 1))
    assert not (tmp_path / "trainer").exists()


def test_a_gradient_that_is_not_finite_stops_with_the_names_of_the_whole_step(setup: Setup, tmp_path: Path) -> None:
    model, _ = tiny_speech_lm()
    model.adaptor.linear2.bias.register_hook(lambda gradient: gradient * float("inf"))
    settings = Settings(epochs=1, batch_size=2, accumulation=2, seed=1)
    before = state(model)
    with pytest.raises(UserError, match=r"gradient norm is (nan|inf) at step 1 \(e\d, e\d, e\d, e\d\)"):
        run(setup, tmp_path, settings, model=model)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())  # no step was made


@pytest.mark.parametrize(
    ("settings", "method", "setup_change", "difference"),
    [
        ({"epochs": 3}, {}, 0, r"settings\.epochs: 2 → 3"),
        ({"max_tokens": 500}, {}, 0, r"settings\.max_tokens: null → 500"),
        ({}, {"learning_rate": 1e-4}, 0, r"method\.learning_rate: 0\.001 → 0\.0001"),
        ({}, {}, 1, r"n_examples: 8 → 7"),
        ({"adaptor_first": AdaptorFirst(1, 1e-3)}, {}, 0, r"settings\.adaptor_first: null → "),
    ],
)
def test_an_interrupted_training_of_another_recipe_is_refused(
    setup: Setup, tmp_path: Path, settings: Any, method: Any, setup_change: int, difference: str
) -> None:
    first = Settings(epochs=2, batch_size=3, checkpoint_every=2)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path, first, progress=stop)
    files = sorted(tmp_path.rglob("*"))
    other = (setup[0][setup_change:], setup[1])
    changed = replace(Method("full", learning_rate=1e-3, rank=2), **method)
    with pytest.raises(UserError, match=f"another recipe \\({difference}.*delete the folder"):
        run(other, tmp_path, replace(first, **settings), changed)
    assert sorted(tmp_path.rglob("*")) == files
    steps: list[int] = []
    renamed = replace(
        Method("full", learning_rate=1e-3, rank=2), curve="full", in_full=True, answers="gold"
    )  # the same weights
    run(setup, tmp_path, first, renamed, progress=lambda done, _: steps.append(done))
    assert steps == [3, 4, 5, 6]


def test_without_a_checkpoint_another_recipe_may_begin(setup: Setup, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(setup, tmp_path, progress=stop)
    run(setup, tmp_path, replace(SETTINGS, batch_size=4))


# -- LoRA -------------------------------------------------------------------------------------------------------------
def test_the_saved_adapter_on_the_base_is_the_merged_model(setup: Setup, tmp_path: Path) -> None:
    from peft import PeftModel

    method = Method("lora", learning_rate=1e-2, rank=2, targets=("q_proj", "down_proj"))
    merged, _ = run(setup, tmp_path, Settings(epochs=2, batch_size=3, seed=1), method)
    base, _ = tiny_speech_lm()
    assert sorted(path.name for path in (tmp_path / "adapter").glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    adapted = PeftModel.from_pretrained(base.language_model, tmp_path / "adapter").eval()
    batch = {key: value for key, value in to_device(setup[1](setup[0][:2]), "cpu").items() if key != "ids"}
    ids = batch["input_ids"].clamp_min(0)
    with torch.no_grad():
        fresh, _ = tiny_speech_lm()
        plain = fresh.language_model(ids).logits
        expected, found = merged.language_model(ids).logits, adapted(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
    changed = {
        name.split(".")[-2]
        for name, value in merged.language_model.named_parameters()
        if not torch.equal(value, tiny_llama(eos_token_id=3).get_parameter(name))
    }
    assert changed == {"q_proj", "down_proj"}


def test_lora_targets_that_are_not_there_are_named(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(query\) are not in the language model; its layers have down_proj, "):
        run(setup, tmp_path, method=Method("lora", targets=("q_proj", "query")))
    with pytest.raises(UserError, match=r"targets \(none\)"):
        run(setup, tmp_path / "b", method=Method("lora", targets=()))
