"""RetentionCallback in a plain Trainer script: the numbers of the checkpoints, and a training that is unchanged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed

from palimpsest import RetentionCallback, estimate_importance
from palimpsest.analysis.analyse import model_layers
from palimpsest.analysis.shift import shift_records
from palimpsest.comparison import retention_callback
from palimpsest.evaluation.drift import batch_of, measure_drift, summarise_drift, token_classes
from palimpsest.evaluation.drift_settings import Sampling
from palimpsest.evaluation.own_text import sample_own_text
from palimpsest.evaluation.probe import probe
from palimpsest.files import UserError
from palimpsest.importance.scores import Scores
from palimpsest.models.loading import load_language_model
from tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent
SAMPLING = Sampling(6, 8)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """What wandb or TensorBoard would get."""

    def __init__(self) -> None:
        self.got: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.got.append({**logs, "step": state.global_step})


def trained(model: Any, folder: Path, callback: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """The script of somebody else: 4 steps on 8 sentences, a checkpoint after every second."""
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(f"Sentence {i} is about {'x' * i}.") for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=3e-3, save_steps=2,
        logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    set_seed(0)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    reporter, watching = Reporter(), None
    trainer.add_callback(reporter)
    if callback is not None:
        watching = RetentionCallback(trainer, sampling=SAMPLING, batch_size=4, **callback)
        trainer.add_callback(watching)
    trainer.train()
    return trainer, reporter, watching


def dropping(seed: int = 0) -> Any:
    return tiny_llama(seed, attention_dropout=0.2)


class OnGpu:
    """A tensor that has to be brought to the CPU before it is an array."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def cpu(self) -> torch.Tensor:
        return self.tensor


def test_the_shift_is_the_same_where_scores_lie_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu(*args: Any) -> Scores:
        scores = estimate_importance(*args)
        there = {kind: {name: OnGpu(it) for name, it in scores.tensors(kind).items()} for kind in scores.reductions}
        return Scores(scores.metadata, there, scores.batch_totals, scores.batch_tokens)  # type: ignore[arg-type]

    shift_alone = {"every": 4, "probe": False, "drift": False}
    _, _, here = trained(tiny_llama(), tmp_path / "here", shift_alone)
    monkeypatch.setattr(retention_callback, "estimate_importance", on_gpu)
    _, _, there = trained(tiny_llama(), tmp_path / "there", shift_alone)
    assert there.history[-1].shift == here.history[-1].shift != []


def test_its_curves_are_those_of_the_checkpoints(tmp_path: Path) -> None:
    _, reporter, callback = trained(dropping(), tmp_path, {"every": 2})
    assert [it.step for it in callback.history] == [0, 2, 4]
    base, tokenizer = tiny_llama(), tiny_tokenizer()
    texts = sample_own_text(base, tokenizer, SAMPLING, seed=0)
    classes = [token_classes(tokenizer, text) for text in texts]
    batches = [batch_of(texts[i : i + 4], "cpu") for i in range(0, len(texts), 4)]
    layers = {0: model_layers("base", estimate_importance(base, batches, ("per_batch_abs",)), "per_batch_abs")}
    for measured in callback.history:
        if measured.step:
            model = load_language_model(str(tmp_path / f"checkpoint-{measured.step}"))[0]
            drifts = measure_drift(base, model, texts, batch_size=4)
            assert measured.drift == summarise_drift(drifts, texts, classes, model="model", base="base", seed=0)
            assert measured.probe == probe(model, tokenizer, batch_size=16)
            found = model_layers("model", estimate_importance(model, batches, ("per_batch_abs",)), "per_batch_abs")
            assert measured.shift == shift_records(layers[0], found, modality="text", reduction="per_batch_abs")
    first, last = callback.history[0].logged(), callback.history[-1].logged()
    assert (first["retention_kl_plain"], first["retention_agreement_chat"], first["retention_jensen_shannon"]) == (
        0,
        1,
        0,
    )
    assert min(last["retention_kl_plain"], last["retention_kl_chat"], last["retention_jensen_shannon"]) > 1e-5
    seen = [row for row in reporter.got if "retention_seconds" in row]
    assert [row["step"] for row in seen] == [0, 2, 4]
    assert [{key: row[key] for key in it.logged()} for row, it in zip(seen, callback.history, strict=True)] == [
        it.logged() for it in callback.history
    ]
    assert [row["step"] for row in reporter.got if "loss" in row] == [1, 2, 3, 4]  # none is lost


@pytest.mark.parametrize("bf16", [False, True])
def test_training_is_the_same_to_the_bit(tmp_path: Path, bf16: bool) -> None:
    """With dropout, whose random numbers nobody else may draw."""
    plain, _, _ = trained(dropping(), tmp_path / "a", bf16=bf16)
    watched, _, callback = trained(dropping(), tmp_path / "b", {"every": 1}, bf16=bf16)
    for (name, one), other in zip(plain.model.state_dict().items(), watched.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    losses = [[row["loss"] for row in it.state.log_history if "loss" in row] for it in (plain, watched)]
    assert losses[0] == losses[1]
    assert callback.history[0].logged()["retention_kl_plain"] == 0
    tuned = tiny_llama()  # measured in float32, whatever training computes in
    tuned.load_state_dict(watched.model.state_dict())
    drifts = measure_drift(tiny_llama(), tuned, callback._texts, batch_size=4)[:6]
    mean = sum(sum(it.kl) for it in drifts) / sum(len(it.kl) for it in drifts)
    assert callback.history[-1].logged()["retention_kl_plain"] == pytest.approx(mean, rel=1e-9)
    assert mean > 1e-5


def test_an_adapter_is_switched_off_instead_of_a_copy(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    trainer, _, callback = trained(model, tmp_path, {"every": 4})
    texts = sample_own_text(tiny_llama(), tiny_tokenizer(), SAMPLING, seed=0)
    assert callback._texts == texts
    merged = trainer.model.merge_and_unload().eval()
    drifts = measure_drift(tiny_llama(), merged, texts, batch_size=4)
    mean = sum(sum(it.kl) for it in drifts[:6]) / sum(len(it.kl) for it in drifts[:6])
    assert mean > 1e-6
    assert callback.history[-1].logged()["retention_kl_plain"] == pytest.approx(mean, rel=1e-3)
    shift = callback.history[-1].logged()["retention_jensen_shannon"]
    batches = [batch_of(texts[i : i + 4], "cpu") for i in range(0, len(texts), 4)]
    base, tuned = (
        model_layers(name, estimate_importance(it, batches, ("per_batch_abs",)), "per_batch_abs")
        for name, it in (("base", tiny_llama()), ("model", merged))
    )
    rows = shift_records(base, tuned, modality="text", reduction="per_batch_abs")
    assert shift == pytest.approx(next(r["value"] for r in rows if r["measure"] == "jensen_shannon"), rel=1e-3)


def test_what_is_not_wanted_is_not_measured_and_needs_no_copy(tmp_path: Path) -> None:
    _, reporter, callback = trained(dropping(), tmp_path, {"every": 3, "drift": False, "shift": False})
    assert callback.base is None
    assert callback._texts == []
    keys = {"retention_probe_accuracy", "retention_probe_margin", "retention_seconds"}
    assert callback.history[-1].logged().keys() == keys
    assert [it.step for it in callback.history] == [0, 3, 4]  # and after the last
    assert json.loads(json.dumps(callback.history[-1].logged())) == callback.history[-1].logged()
    assert len(reporter.got) == 4 + 3 + 1  # losses, ours, the Trainer's summary


def test_what_it_refuses(tmp_path: Path) -> None:
    trainer, _, _ = trained(dropping(), tmp_path)
    with pytest.raises(UserError, match="every and batch_size of 1 or more"):
        RetentionCallback(trainer, every=0)
    callback = RetentionCallback(trainer, sampling=SAMPLING)
    with pytest.raises(UserError, match="continues at step 4, so its model is not the base any more; give base="):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)

    class Several:
        world_size = 2

    with pytest.raises(UserError, match="measures in one process and this training has 2"):
        callback.on_train_begin(Several(), trainer.state, trainer.control, model=trainer.model)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl; pip install trl")
def test_the_example_in_trl(tmp_path: Path) -> None:
    """examples/sft_retention.py: the numbers of the adapters that SFTTrainer saves, up to the rounding of the merge."""
    spec = importlib.util.spec_from_file_location("sft_retention", ROOT / "examples" / "sft_retention.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    base = tmp_path / "base"
    tiny_llama(eos_token_id=3).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    history = example.train(str(base), str(tmp_path / "sft"), sampling=SAMPLING).history
    assert [it.step for it in history] == [0, 4, 8]
    untuned, tokenizer = load_language_model(str(base))
    texts = sample_own_text(untuned, tokenizer, SAMPLING, seed=0)
    for measured in history[1:]:
        tuned, _ = load_language_model(str(tmp_path / "sft" / f"checkpoint-{measured.step}"))
        drifts = measure_drift(untuned, tuned, texts)[:6]
        mean = sum(sum(it.kl) for it in drifts) / sum(len(it.kl) for it in drifts)
        assert mean > 1e-6
        assert measured.logged()["retention_kl_plain"] == pytest.approx(mean, rel=1e-3)
        (every,) = [row for row in probe(tuned, tokenizer) if row["kind"] == "all"]
        assert measured.logged()["retention_probe_margin"] == pytest.approx(every["margin"], abs=1e-5)
