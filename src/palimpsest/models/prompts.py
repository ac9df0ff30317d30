"""The text of a prompt: one rendering, one tokenisation, for training, importance, perplexity and generation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# Where a base model, asked without a chat template, has answered and goes on with a further turn of the plain prompt.
NEXT_TURN = re.compile(r"\n\s*(?:Question|Answer):")


@dataclass(frozen=True)
class PromptStyle:
    """`system` None leaves the system turn to the chat template (some templates write one of their own)."""

    system: str | None = None
    speech_instruction: str = "Answer the question asked in the speech."


def messages(user: str, system: str | None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": user}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def render(tokenizer: Any, user: str, system: str | None) -> tuple[str, bool]:
    """The prompt as a string, and whether a chat template made it; without one: "Question: …\\nAnswer:"."""
    if tokenizer.chat_template is None:
        lead = "" if system is None else f"{system}\n"
        return f"{lead}Question: {user}\nAnswer:", False
    text = tokenizer.apply_chat_template(messages(user, system), add_generation_prompt=True, tokenize=False)
    return str(text), True


def encode(tokenizer: Any, text: str, start: bool = False) -> list[int]:
    """Token ids. A chat template writes its own begin-of-text, so the tokenizer may add one only at a plain `start`."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if start and tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return [tokenizer.bos_token_id, *ids]
    return ids
