from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.examples import Example
from palimpsest.data.speech import write_flac
from palimpsest.evaluation.answers import Answer, answer_questions
from palimpsest.evaluation.cascade import cascade_answerer, transcribe, word_error_rate, word_errors
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError


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
        assert call == {"do_sample": False, "num_beams": 1, **language}


def test_transcribe_names_what_cannot_be_heard(spoken: list[Example], tmp_path: Path) -> None:
    silent = Example("q9", "?", ("x",), "x")
    with pytest.raises(UserError, match="'q9' has no audio"):
        transcribe(FakeWhisper(51864), FakeProcessor(), [*spoken, silent])
    (tmp_path / "2.flac").write_bytes(b"not audio")
    with pytest.raises(UserError, match=r"2\.flac"):
        transcribe(FakeWhisper(51864), FakeProcessor(), spoken)
