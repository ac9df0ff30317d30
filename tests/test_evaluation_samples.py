"""The rules that flag an answer; reading and resuming is tested through answer_questions."""

from __future__ import annotations

import pytest

from palimpsest.evaluation.answers import is_loop, is_refusal


@pytest.mark.parametrize(
    ("response", "loop"),
    [
        ("", False),
        ("no no no", False),  # three words only
        ("no no no no no no", True),
        ("Paris, Paris, Paris, Paris, Paris, Paris", True),
        ("well well, very very very very good", False),
        ("It is Paris. It is Paris. It is Paris.", True),
        ("It is Paris. It is Paris. It is Rome.", False),
        ("The capital of France is Paris.", False),
        ("I think so. tick tock tick tock tick tock", True),
        ("tick tock tick tock tick", False),
    ],
)
def test_loop(response: str, loop: bool) -> None:
    assert is_loop(response) is loop


@pytest.mark.parametrize(
    ("response", "refusal"),
    [
        ("", False),
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry.", True),
        ("Sorry, I did not hear you.", True),
        ("I don't know.", True),
        ("I cannot answer this.", True),
        ("As an AI language model, I …", True),
        ("I do not have access to that.", True),
        ("I know: Paris.", False),
        ("The answer is Paris. I'm sorry for the delay.", False),
        ("I can tell you that it is Paris.", False),
    ],
)
def test_refusal(response: str, refusal: bool) -> None:
    assert is_refusal(response) is refusal
