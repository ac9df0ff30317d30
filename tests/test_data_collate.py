"""Prompts, labels and padding: only the answer and its end-of-turn token are supervised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from palimpsest.data.collate import IGNORED, Collator, batches
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features
from palimpsest.evaluation.generation import generation_settings
from palimpsest.files import UserError
from palimpsest.models.loss import supervised_losses
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.prompts import PromptStyle
from palimpsest.models.speech_lm import SPEECH_POSITION
from tiny import tiny_speech_lm, tiny_tokenizer


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    rng = np.random.default_rng(0)
    found = []
    for i, (question, answer, seconds) in enumerate([("Who?", "Ada.", 0.7), ("Where is it?", "In Rome.", 1.2)]):
        path = tmp_path / f"{i}.wav"
        soundfile.write(path, rng.normal(0, 0.1, int(seconds * 16_000)), 16_000)
        found.append(Example(id=f"q{i}", question=question, answers=(answer,), answer=answer, audio=path))
    return found


@pytest.fixture
def features(tmp_path: Path, examples: list[Example]) -> Features:
    model, processor = tiny_speech_lm()
    compute_features(model.encoder, processor, examples, tmp_path / "features")
    return Features(tmp_path / "features")


@pytest.mark.parametrize("modality", ["text", "speech"])
def test_exactly_the_answer_and_its_end_of_turn_are_supervised(examples, features, modality) -> None:
    _, processor = tiny_speech_lm()
    batch = Collator(processor, modality, features)(examples)
    for row, example in enumerate(examples):
        supervised = batch["labels"][row] != IGNORED
        assert processor.tokenizer.decode(batch["labels"][row][supervised]) == f"{example.answer}<end>"
        assert torch.equal(batch["labels"][row][supervised], batch["input_ids"][row][supervised])
        assert not (supervised & (batch["input_ids"][row] == SPEECH_POSITION)).any()
        assert not (supervised & (batch["attention_mask"][row] == 0)).any()
        # the supervised span is the end of the sequence and contiguous
        last = int(batch["attention_mask"][row].sum())
        n = int(supervised.sum())
        assert supervised[last - n : last].all()


@pytest.mark.parametrize("modality", ["text", "speech"])
def test_exactly_one_begin_of_text(examples, features, modality) -> None:
    _, processor = tiny_speech_lm()
    collator = Collator(processor, modality, features)
    bos = processor.tokenizer.bos_token_id
    for batch in (collator(examples), collator.prompts(examples)):
        assert (batch["input_ids"] == bos).sum(1).tolist() == [1, 1]


def test_one_begin_of_text_without_a_chat_template_too() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    processor = SpeechLMProcessor(tokenizer, None)
    bos = tokenizer.bos_token_id
    assert processor.text_prompt("Who?").count(bos) == 1
    assert processor.text_prompt("Who?")[0] == bos
    assert processor.speech_prompt(4).count(bos) == 1
    assert processor.answer("Ada.").count(bos) == 0
    assert processor.answer("Ada.")[-1] == tokenizer.eos_token_id


def test_the_system_turn_is_the_templates_unless_given() -> None:
    plain = SpeechLMProcessor(tiny_tokenizer(), None)
    given = SpeechLMProcessor(tiny_tokenizer(), None, style=PromptStyle(system="Be kind."))
    assert "Be kind." not in plain.tokenizer.decode(plain.text_prompt("Who?"))
    assert "<system>Be kind.<end>" in given.tokenizer.decode(given.text_prompt("Who?"))


def test_prompts_are_padded_left_and_training_right(examples, features) -> None:
    _, processor = tiny_speech_lm()
    collator = Collator(processor, "text")
    prompts, training = collator.prompts(examples), collator(examples)
    assert prompts["attention_mask"][:, -1].tolist() == [1, 1]
    assert "labels" not in prompts
    assert training["attention_mask"][:, 0].tolist() == [1, 1]


def test_features_are_what_the_encoder_gives_and_order_is_kept(examples, features) -> None:
    from palimpsest.data.speech import read_audio
    from palimpsest.models.speech_lm import encode_speech

    model, processor = tiny_speech_lm()
    for example in examples:
        mels, counts = processor.features([read_audio(example.audio)])
        expected = encode_speech(model.encoder, mels, counts, "trim")[0]
        assert features[example.id].shape == expected.shape
        assert torch.allclose(features[example.id], expected, atol=2e-3, rtol=2e-3)  # stored as float16
    assert len(features["q0"]) == 35  # 0.7 s at 50 frames per second
    with pytest.raises(UserError, match="no speech features"):
        features["unknown"]


def test_batches_hold_every_example_once(examples) -> None:
    _, processor = tiny_speech_lm()
    for by_length in (True, False):
        found = [
            i for batch in batches(Collator(processor, "text"), examples, 1, by_length=by_length) for i in batch["ids"]
        ]
        assert sorted(found) == ["q0", "q1"]


def test_a_pad_id_outside_the_embedding_reaches_no_embedding(examples, features) -> None:
    model, processor = tiny_speech_lm()
    processor.tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    processor.tokenizer.pad_token = "<a new one>"
    processor.tokenizer._tokenizer.add_special_tokens([f"<more {i}>" for i in range(300)])
    processor.tokenizer.add_special_tokens({"pad_token": "<more 299>"})
    assert processor.tokenizer.pad_token_id >= len(model.get_input_embeddings().weight)
    batch = Collator(processor, "text")(examples)
    assert int(batch["input_ids"].max()) < len(model.get_input_embeddings().weight)
    supervised_losses(model, batch)
    assert generation_settings(model.language_model, processor.tokenizer, 4)["pad_token_id"] < 300
