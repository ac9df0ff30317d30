"""LoRA for speech alone: text is the base's to the bit, speech the merged model's; a light folder keeps both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.models.light import LightWeights, is_gated, write_light
from palimpsest.models.loading import load_encoder, load_language_model, load_speech_lm, load_text_model
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechLM
from palimpsest.training.methods import Method
from palimpsest.training.train import Settings, train
from spoken import spoken
from tiny import save_tiny_models

SETTINGS = Settings(epochs=2, batch_size=4, warmup_ratio=0.0, checkpoint_every=2, seed=1)
LORA = Method("lora", learning_rate=1e-2, rank=2, dropout=0.2)
GATED = replace(LORA, gate="speech")
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], Collator]:
    return spoken(tmp_path_factory.mktemp("audio"))


def fresh(models: Path) -> SpeechLM:
    language_model, _ = load_language_model(str(models / "llm"))
    encoder, _ = load_encoder(str(models / "whisper"))
    return SpeechLM.from_parts(encoder, language_model, adaptor_hidden_size=24, seed=0)


def trained(
    models: Path, setup: Any, folder: Path, method: Method, settings: Settings = SETTINGS, **more: Any
) -> SpeechLM:
    examples, collator = setup
    folder.mkdir(exist_ok=True)
    model = fresh(models)
    train(model, examples, collator, method, settings, folder, name="it", **more)
    return model


@pytest.fixture(scope="module")
def gated(models: Path, setup: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpeechLM, Path]:
    folder = tmp_path_factory.mktemp("gated")
    return trained(models, setup, folder, GATED), folder


def batches(setup: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a batch put as text, one as speech), without labels."""
    examples, collator = setup
    made = [Collator(collator.processor, "text")(examples[:3]), collator(examples[:3])]
    text, speech = ({k: v for k, v in batch.items() if k not in ("labels", "ids")} for batch in made)
    return text, speech


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).logits


def test_text_is_the_base_to_the_bit(models: Path, setup: Any, gated: tuple[SpeechLM, Path]) -> None:
    model, _ = gated
    base, _ = load_language_model(str(models / "llm"))
    text, speech = batches(setup)
    updates = [p for name, p in model.language_model.named_parameters() if "lora_B" in name]
    assert updates
    assert all(bool(p.any()) for p in updates)
    for asked in (model, model.language_model):  # also to whoever takes the language model out
        assert torch.equal(logits(asked, text), logits(base, text))
    new = base.generate(**text, **GREEDY)[:, text["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**text, **GREEDY), new)
    off = fresh(models)
    off.adaptor.load_state_dict(model.adaptor.state_dict())
    assert not torch.allclose(logits(model, speech), logits(off, speech), atol=1e-3)
    assert torch.equal(logits(model, text), logits(base, text))  # and again, after speech


def test_speech_is_that_of_the_same_training_merged(
    models: Path, setup: Any, gated: tuple[SpeechLM, Path], tmp_path: Path
) -> None:
    model, _ = gated
    merged = trained(models, setup, tmp_path / "merged", LORA)
    _, speech = batches(setup)
    assert torch.allclose(logits(model, speech), logits(merged, speech), atol=1e-4)
    # Every token of an answer, not the prompt alone: as if each were asked for anew.
    answers = model.generate(**speech, **GREEDY, eos_token_id=None)
    assert torch.equal(answers, merged.generate(**speech, **GREEDY, eos_token_id=None))
    row = {key: value[:1] for key, value in speech.items()}
    row["input_ids"] = row["input_ids"][row["attention_mask"].bool()][None]
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    for token in model.generate(**row, **GREEDY, eos_token_id=None)[0]:
        assert int(logits(model, row)[0, -1].argmax()) == int(token)
        for key, value in (("input_ids", token), ("attention_mask", torch.tensor(1))):
            row[key] = torch.cat([row[key], value.view(1, 1)], dim=1)


def test_rows_with_and_without_speech_are_told(setup: Any, gated: tuple[SpeechLM, Path]) -> None:
    _, speech = batches(setup)
    positions = int((speech["input_ids"][0] == SPEECH_POSITION).sum())
    ids = speech["input_ids"][:2].clone()
    ids[1][ids[1] == SPEECH_POSITION] = 5
    kept = {key: speech[key][:1] for key in ("encoder_frames", "frame_counts")}
    assert positions
    with pytest.raises(UserError, match="rows with speech and rows without"):
        gated[0](input_ids=ids, attention_mask=speech["attention_mask"][:2], **kept)


def test_what_is_measured_between_the_steps_changes_nothing(models: Path, setup: Any, tmp_path: Path) -> None:
    examples, collator = setup
    plain = trained(models, setup, tmp_path / "plain", GATED)
    held_out = {"text": (Collator(collator.processor, "text"), examples[:3]), "speech": (collator, examples[:3])}
    watched = replace(SETTINGS, eval_every=1, gradient_checkpointing=True)
    (tmp_path / "watched").mkdir()
    model = fresh(models)
    records = train(
        model, examples, collator, GATED, watched, tmp_path / "watched", name="it", held_out=held_out
    )  # fmt: skip
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    losses = {r["loss"] for r in records if r["kind"] == "eval" and r["modality"] == "text"}
    assert len(losses) == 1  # the base's at every step


def test_interrupted_and_resumed_gives_the_same_weights(models: Path, setup: Any, tmp_path: Path) -> None:
    whole = trained(models, setup, tmp_path / "whole", GATED)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(models, setup, tmp_path / "cut", GATED, progress=stop)
    resumed = trained(models, setup, tmp_path / "cut", GATED)
    assert resumed.gated
    expected = whole.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in resumed.state_dict().items())


def test_weights_in_sixteen_bits_stay_the_bases_and_come_back_from_their_folder(
    models: Path, setup: Any, tmp_path: Path
) -> None:
    examples, collator = setup
    base, _ = load_language_model(str(models / "llm"), dtype="bfloat16")
    encoder, _ = load_encoder(str(models / "whisper"), dtype="bfloat16")
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    model = SpeechLM.from_parts(encoder, base, adaptor_hidden_size=24, seed=0)
    train(model, examples, collator, GATED, replace(SETTINGS, epochs=1), tmp_path, name="it")
    text, speech = batches(setup)
    base, _ = load_language_model(str(models / "llm"), dtype="bfloat16")
    assert all(torch.equal(value, expected[name]) for name, value in base.state_dict().items())
    assert torch.equal(logits(model, text), logits(base, text))
    heard = logits(model, speech)
    assert heard.dtype == torch.bfloat16
    updates = [p for name, p in model.language_model.named_parameters() if "lora_B" in name]
    assert all(bool(p.any()) for p in updates)
    written(model, models, setup[1].processor, tmp_path, dtype="bfloat16")
    found, _ = load_speech_lm(tmp_path, dtype="auto")
    assert torch.equal(logits(found, text), logits(base, text))
    assert torch.equal(logits(found, speech), heard)


# ---------------------------------------------------------------------------------------------------------------------
# Light folders
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def light(models: Path, setup: Any, gated: tuple[SpeechLM, Path]) -> Path:
    model, folder = gated
    return written(model, models, setup[1].processor, folder)


def written(model: SpeechLM, models: Path, processor: SpeechLMProcessor, folder: Path, dtype: str = "float32") -> Path:
    names = {key: str(models / name) for key, name in (("language_model", "llm"), ("encoder", "whisper"))}
    parts = {"language_model": load_language_model, "encoder": load_encoder}
    write_light(
        folder,
        model,
        processor,
        **{key: (names[key], load(names[key], dtype=dtype)[0]) for key, load in parts.items()},
        adapter=folder / "adapter",
        trained={},
        exact=True,
    )
    return folder


def test_a_light_folder_gives_the_model_again(
    models: Path, setup: Any, gated: tuple[SpeechLM, Path], light: Path, tmp_path: Path
) -> None:
    assert is_gated(light)
    found, processor = load_speech_lm(light)
    base, _ = load_language_model(str(models / "llm"))
    text, speech = batches(setup)
    assert torch.equal(logits(found, speech), logits(gated[0], speech))
    assert torch.equal(found.generate(**speech, **GREEDY), gated[0].generate(**speech, **GREEDY))
    assert torch.equal(logits(found, text), logits(base, text))
    asked, _ = load_text_model(str(light))
    assert asked.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in asked.state_dict().items())
    weights = LightWeights(light, base)
    assert all(torch.equal(weights[name], base.get_parameter(name)) for name in weights)
    assert isinstance(processor, SpeechLMProcessor)


def test_it_is_exported_with_its_gate_or_not_at_all(models: Path, setup: Any, light: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "methods/gated").mkdir(parents=True)
    (run / "methods/gated/checkpoint").symlink_to(light)
    for kind in ("text_llm", "speech_lm"):
        with pytest.raises(UserError, match="LoRA for speech alone"):
            export.export(run, **{kind: tmp_path / kind})
    names = {"language_model": str(models / "llm"), "encoder": str(models / "whisper")}
    export.export(run, light=tmp_path / "light", adapter=tmp_path / "adapter", **names)
    assert is_gated(tmp_path / "light")
    text, speech = batches(setup)
    base, _ = load_language_model(str(models / "llm"))
    found, _ = load_speech_lm(tmp_path / "light")
    expected, _ = load_speech_lm(light)
    assert torch.allclose(logits(found, speech), logits(expected, speech), atol=0.05)  # float16
    assert torch.equal(logits(found, text), logits(base, text))
    assert (tmp_path / "adapter/adapter_config.json").exists()
