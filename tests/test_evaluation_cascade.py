from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from palimpsest.data.examples import Example
from palimpsest.data.speech import write_flac
from palimpsest.evaluation.answers import Answer, answer_questions
from palimpsest.evaluation.cascade import cascade_answerer, transcribe, word_error_rate, word_errors
from palimpsest.evaluation.spoken import recording_answerer
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError
from tiny import tiny_speech_lm


# -- word error rate -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("the cat sat", "the cat sat", 0),
        ("the cat sat", "The cat sat!", 0),
        ("twenty-one cats", "21 cats", 0),
        ("the cat sat", "the hat sat", 1),
        ("the cat sat", "the sat", 1),
        ("the cat sat", "the fat cat sat", 1),
        ("the cat sat", "", 3),
        ("", "the cat", 2),
        ("a b c d", "b c d a", 2),
    ],
)
def test_word_errors_by_hand(reference: str, hypothesis: str, errors: int) -> None:
    assert word_errors(reference, hypothesis) == errors


WORDS = st.lists(st.sampled_from(["cat", "dog", "hen"]), max_size=6).map(" ".join)


@given(WORDS, WORDS, WORDS)
def test_word_errors_are_a_distance(a: str, b: str, c: str) -> None:
    assert word_errors(a, a) == 0
    assert word_errors(a, b) == word_errors(b, a)
    assert word_errors(a, c) <= word_errors(a, b) + word_errors(b, c)


def test_word_error_rate_weighs_words_not_sentences() -> None:
    assert word_error_rate([("one", "two"), ("the cat sat", "the cat sat")]) == pytest.approx(1 / 4)
    assert word_error_rate([("one", "two"), ("the cat sat", None)]) == 1  # a question that failed has no transcript
    assert word_error_rate([("one", "two"), ("the cat sat", "")]) == 1  # and one of which nothing was heard has
    with pytest.raises(UserError, match="at least one reference word"):
        word_error_rate([("", "the")])


# -- the cascade ---------------------------------------------------------------------------------------------
def answer_with_question(examples: Sequence[Example], modality: str) -> list[Answer]:
    assert modality == "text"
    return [Answer(f"You said: {e.question}", 4) for e in examples]


def test_the_text_model_sees_the_transcript_and_never_the_gold_question(tmp_path: Path) -> None:
    task = Task("t", tuple(Example(f"q{i}", f"gold {i}", ("heard",), "x") for i in range(3)))

    def hear(examples: Sequence[Example]) -> dict[str, str]:
        if any(e.id == "q1" for e in examples):
            raise UserError("The recording of q1 cannot be read.")
        return {e.id: "" if e.id == "q2" else f"heard {e.id}" for e in examples}

    answer = cascade_answerer(hear, answer_with_question)
    rows = answer_questions(answer, task, "cascade", model="m", out=tmp_path / "a.jsonl")
    assert [row["response"] for row in rows] == ["You said: heard q0", "", ""]
    assert [row["transcript"] for row in rows] == ["heard q0", None, ""]
    assert [row["failed"] for row in rows] == [False, True, False]
    assert [row["empty"] for row in rows] == [False, False, True]
    assert [row["question"] for row in rows] == ["gold 0", "gold 1", "gold 2"]


class FakeWhisper:
    """Hears the length of the sound in seconds; keeps the arguments it was called with."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, vocab_size: int) -> None:
        self.config = type("Config", (), {"vocab_size": vocab_size})
        self.calls: list[dict] = []

    def eval(self) -> None:
        pass

    def generate(self, features: torch.Tensor, **arguments: object) -> torch.Tensor:
        self.calls.append(arguments)
        return features.sum(dim=1, keepdim=True)


class FakeProcessor:
    def __call__(self, waves: list[np.ndarray], sampling_rate: int, **_: object) -> dict[str, torch.Tensor]:
        assert sampling_rate == 16_000
        seconds = torch.tensor([[len(wave) / 16_000] for wave in waves])
        return {"input_features": seconds, "attention_mask": torch.ones_like(seconds)}

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [f" {int(value)} s " for (value,) in ids.tolist()]


@pytest.fixture
def spoken(tmp_path: Path) -> list[Example]:
    examples = []
    for i in (1, 2, 3):
        write_flac(tmp_path / f"{i}.flac", np.zeros(16_000 * i, dtype=np.float32))
        examples.append(Example(f"q{i}", "?", ("x",), "x", audio=tmp_path / f"{i}.flac"))
    return examples


@pytest.mark.parametrize(("vocab_size", "language"), [(51864, {}), (51865, {"language": "en", "task": "transcribe"})])
def test_transcribe(spoken: list[Example], vocab_size: int, language: dict) -> None:
    whisper = FakeWhisper(vocab_size)
    assert transcribe(whisper, FakeProcessor(), spoken, batch_size=2) == {
        "q1": "1 s",
        "q2": "2 s",
        "q3": "3 s",
    }
    assert len(whisper.calls) == 2
    for call in whisper.calls:
        call.pop("attention_mask")
        assert len(call.pop("logits_processor")) == 1  # the check that they are finite
        assert call == {"do_sample": False, "num_beams": 1, **language}


def test_transcribe_names_what_cannot_be_heard(spoken: list[Example], tmp_path: Path) -> None:
    silent = Example("q9", "?", ("x",), "x")
    with pytest.raises(UserError, match="'q9' has no audio"):
        transcribe(FakeWhisper(51864), FakeProcessor(), [*spoken, silent])
    (tmp_path / "2.flac").write_bytes(b"not audio")
    with pytest.raises(UserError, match=r"2\.flac"):
        transcribe(FakeWhisper(51864), FakeProcessor(), spoken)


def test_a_speech_model_or_recogniser_that_is_not_finite_stops_the_evaluation(
    spoken: list[Example], tmp_path: Path
) -> None:
    """The error names the part: the encoder of a speech LLM, a decoder weight of Whisper."""
    model, processor = tiny_speech_lm()
    with torch.no_grad():
        model.encoder.conv1.weight[0, 0, 0] = float("nan")
    task = Task("t", tuple(spoken))
    with pytest.raises(UserError, match=r"encoder\.conv1\.weight of the model has 1 of 3840 .* question 'q1'"):
        answer_questions(recording_answerer(model, processor, 2), task, "speech", model="m", out=tmp_path / "a.jsonl")

    config = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=80, vocab_size=100, max_target_positions=8,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    asr = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        asr.model.decoder.layers[0].fc1.weight[0, 0] = float("nan")
    features = WhisperFeatureExtractor(feature_size=80)
    features.batch_decode = lambda ids, skip_special_tokens: ["" for _ in ids]
    answer = cascade_answerer(partial(transcribe, asr, features), answer_with_question)
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.fc1\.weight of the model has 1 of"):
        answer_questions(answer, task, "cascade", model="m", out=tmp_path / "b.jsonl")
