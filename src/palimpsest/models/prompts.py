"""The text of a prompt and its tokens: rendered and tokenised in one place, for training, measuring and answering.

What stands in a prompt is what is recorded: templates get a fixed date in place of today's, thinking is off where a
template knows it, and the whole conversation is tokenised once and cut where the prompt ends.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, tzinfo
from typing import Any

from palimpsest.files import UserError

# Where a base model, asked without a chat template, has answered and goes on with a further turn of the plain prompt.
NEXT_TURN = re.compile(r"\n\s*(?:Question|Answer):")
SPEECH_MARK = "<speech>"  # only inside this module: where the chat template puts the speech; never tokenised
SOME_ANSWER = "ANSWER"  # stands in no end of turn, where a short answer may
# In front of a chat template that takes a turn as parts {type, text}: turns of text become turns of one part.
AS_PARTS = (
    "{%- set as_parts = namespace(turns=[]) -%}{%- for message in messages -%}"
    "{%- set part = {'type': 'text', 'text': message['content']} -%}"
    "{%- set as_parts.turns = as_parts.turns + [{'role': message['role'], 'content': [part]}] -%}"
    "{%- endfor -%}{%- set messages = as_parts.turns -%}"
)
OWN = ("messages", "add_generation_prompt", "tools", "documents", "chat_template", "tokenize")  # not for a recipe


@dataclass(frozen=True)
class PromptStyle:
    """How questions are put. `system` None leaves the system turn to the chat template; some write one of their own."""

    system: str | None = None
    speech_instruction: str = "Answer the question asked in the speech."
    date: str = "2024-07-26"  # what a template that prints today's date gets instead
    # Further variables of the chat template; enable_thinking is false unless it is given here.
    template_arguments: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"there is no date {self.date!r}; write it as year-month-day, e.g. 2024-07-26") from error
        if taken := sorted(set(OWN) & set(self.template_arguments)):
            raise ValueError(f"template_arguments has {taken[0]!r}, which every prompt sets itself; leave it out")

    @property
    def arguments(self) -> dict[str, Any]:
        """What the chat template is given besides the turns. A template that does not know a variable passes it by."""
        day = date.fromisoformat(self.date).strftime("%d %b %Y")
        return {"enable_thinking": False, "date_string": day, **self.template_arguments}


# What a recipe may name instead of writing it out. A style has no field for the name: what stands in a run directory,
# a checkpoint and a fingerprint is the text, so that a preset and its words written out are the same prompt.
PRESETS: dict[str, dict[str, str | None]] = {
    "plain": {"system": None, "speech_instruction": PromptStyle.speech_instruction},  # what holds without a preset
    # Our shortening of LLaMA-Omni's words: the first sentence of its system turn, its instruction in other words.
    "llama_omni_short": {
        "system": "You are a helpful language and speech assistant.",
        "speech_instruction": "Please answer directly the question in the speech.",
    },
    # The words of github.com/ictnlp/LLaMA-Omni: conv_llama_3 in conversation.py, and infer/examples/question.json.
    "llama_omni": {
        "system": (
            "You are a helpful language and speech assistant. You are able to understand the speech content that the "
            "user provides, and assist the user with a variety of tasks using natural language."
        ),
        "speech_instruction": "Please directly answer the questions in the user's speech.",
    },
}


def written_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe's prompt with the words of its `preset` in that key's place; keys beside it win.

    Raises ValueError for a preset that there is not.
    """
    given = {key: value for key, value in values.items() if key != "preset"}
    name = values.get("preset")
    if name is None:
        return given
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; give {', '.join(PRESETS)}, or write the keys out")
    return {**PRESETS[name], **given}


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
def messages(user: str, system: str | None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": user}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def render(tokenizer: Any, user: str, style: PromptStyle) -> tuple[str, bool]:
    """The prompt as a string, and whether a chat template made it; without one: "Question: …\\nAnswer:".

    Raises UserError for a template that refuses the turns, or leaves one of them out.
    """
    if tokenizer.chat_template is None:
        lead = "" if style.system is None else f"{style.system}\n"
        return f"{lead}Question: {user}\nAnswer:", False
    turns = messages(user, style.system)
    text = apply_template(tokenizer, turns, style, add_generation_prompt=True)
    for turn in turns:
        if turn["content"].strip() not in text:
            remedy = "; leave out prompt.system" if turn["role"] == "system" else "; use a model made for conversation"
            raise UserError(f"{_template_of(tokenizer)} leaves out the {turn['role']}'s turn{remedy}.")
    return text, True


def apply_template(writer: Any, turns: Sequence[Mapping[str, Any]], style: PromptStyle, **options: Any) -> str:
    """The turns as text by the chat template of `writer`, a tokenizer or processor, on the style's date.

    Raises UserError with what the template says where it refuses them (Gemma 2: a system turn), and for a template
    argument of the style that the template does not have.
    """
    import jinja2

    arguments = used_arguments(writer, style)
    if unknown := sorted(style.template_arguments.keys() - arguments.keys()):
        raise UserError(
            f"{_template_of(writer)} does not use {unknown[0]!r}, which prompt.template_arguments sets; leave it out."
        )
    try:
        with fixed_date(style):
            return str(writer.apply_chat_template(turns, tokenize=False, **arguments, **options))
    except (jinja2.TemplateError, TypeError) as error:
        has_system = turns[0]["role"] == "system"
        remedy = "leave out prompt.system" if has_system else "use a model made for conversation"
        reason = " ".join(str(error).split())
        raise UserError(f"{_template_of(writer)} refuses the prompt ({reason}); {remedy}.") from error


def used_arguments(writer: Any, style: PromptStyle) -> dict[str, Any]:
    """Those of the style's arguments that the chat template knows; processors warn of others."""
    template = writer.chat_template
    known = template.values() if isinstance(template, Mapping) else [template or ""]
    return {name: value for name, value in style.arguments.items() if any(name in text for text in known)}


def tokenizer_for_text(processor: Any) -> Any:
    """The tokenizer of an audio LLM's processor, which writes turns of text as that processor does.

    The template may stand in the processor alone, and may take a turn as parts. A template that takes text in neither
    form is left as it is, so that it is refused when a prompt is written.
    """
    tokenizer = processor.tokenizer
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template
    if template is None or writes_tokens(tokenizer):
        return tokenizer
    turns = [*messages("QUESTION", None), {"role": "assistant", "content": "ANSWER"}]
    for written in (AS_PARTS + template, template):
        tokenizer.chat_template = written
        try:
            text = apply_template(tokenizer, turns, PromptStyle())
        except UserError:  # a template of strings, given parts
            continue
        if "QUESTION" in text and "ANSWER" in text and "'type'" not in text:
            return tokenizer
    return tokenizer


def writes_tokens(tokenizer: Any) -> bool:
    """Whether a tokenizer writes turns as tokens, without a template: mistral-common's.

    Its control tokens are not to be had from text, so that a prompt cannot be rendered first and tokenised then.
    """
    return any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__)


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def fixed_date(style: PromptStyle) -> Iterator[None]:
    """While it is open, what chat templates know as strftime_now says the style's date.

    transformers puts no variable of ours in its place: what a template gets must be plain data.
    """
    from transformers.utils import chat_template_utils

    day = date.fromisoformat(style.date)

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Fixed:
            return cls(day.year, day.month, day.day, tzinfo=tz)

    with _ONE_AT_A_TIME:
        real = chat_template_utils.datetime
        chat_template_utils.datetime = Fixed
        try:
            yield
        finally:
            chat_template_utils.datetime = real


def _template_of(writer: Any) -> str:
    name = getattr(writer, "name_or_path", "")
    return f"The chat template of {name}" if name else "The chat template"


def _target_text(tokenizer: Any, style: PromptStyle, answer: str) -> tuple[str, bool]:
    """What follows a templated prompt: the answer and its end of turn; and whether the end is still to be added."""
    opening, _ = render(tokenizer, "q", style)
    whole = _answered(tokenizer, style, answer)
    if whole.startswith(opening):
        target = whole[len(opening) :].rstrip("\n")
        without_end = target.rstrip().endswith(answer.strip()) and not _end_of_turn(tokenizer, style).strip()
        return target, without_end
    # Templates that render a finished turn unlike an open one (reasoning models): the answer, and how they end it.
    end = _end_of_turn(tokenizer, style)
    return answer + end, not end.strip()


def _answered(tokenizer: Any, style: PromptStyle, answer: str) -> str:
    return apply_template(tokenizer, [*messages("q", style.system), {"role": "assistant", "content": answer}], style)


def _end_of_turn(tokenizer: Any, style: PromptStyle) -> str:
    """What the template writes behind an answer; nothing in some (GLM's), whose end training adds."""
    _, found, end = _answered(tokenizer, style, SOME_ANSWER).rpartition(SOME_ANSWER)
    return end.rstrip("\n") if found else ""


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------
def turn_end(tokenizer: Any) -> int | None:
    """The token by which the chat template ends an answer, such as <|im_end|>.

    None without a template, and where the template writes no token of its own there (a line feed, or nothing).
    """
    if tokenizer.chat_template is None or writes_tokens(tokenizer):
        return None
    try:
        end = _end_of_turn(tokenizer, PromptStyle())
    except UserError:  # a template that refuses the turns is refused with its reason where a prompt is written
        return None
    no_end = {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    own = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} - no_end
    return next((id for id in encode(tokenizer, end) if id in own and tokenizer.decode([id]).strip()), None)


def tokenise(
    tokenizer: Any, user: str, style: PromptStyle, *, answer: str | None = None, speech: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """(token ids of the prompt, of the answer and its end of turn): the conversation tokenised once, cut in two.

    Args:
        user: the question as text; with `speech` the instruction that follows it.
        answer: None: a prompt alone, with no ids after it.
        speech: what stands for the speech, in front of `user`; such positions are no tokens, so that the text before
            them and the text after them are tokenised apart.

    Raises UserError for a template that has no place for the turns, and where the answer's first token would take in
    the end of the prompt: what is asked and what is trained would then be other tokens.
    """
    if speech is None and writes_tokens(tokenizer):
        written = tokenizer.apply_chat_template(messages(user, style.system), tokenize=True, return_dict=True)
        end = [] if answer is None else [*encode(tokenizer, answer), tokenizer.eos_token_id]
        return list(written["input_ids"]), end
    text, templated = render(tokenizer, user if speech is None else f"{SPEECH_MARK}\n{user}", style)
    target, without_end = "", False
    if answer is not None:
        target, without_end = _target_text(tokenizer, style, answer) if templated else (f" {answer}", True)
    if speech is None:
        lead: list[int] = []
        prompt = encode(tokenizer, text, start=not templated)
        whole = encode(tokenizer, text + target, start=not templated) if target else prompt
    else:
        before, _, after = text.partition(SPEECH_MARK)
        if SPEECH_MARK in after:
            raise UserError(f"The prompt holds {SPEECH_MARK} as text, which marks the place of the speech; reword it.")
        lead = [*encode(tokenizer, before, start=not templated), *speech]
        prompt = _continuation(tokenizer, after)
        whole = _continuation(tokenizer, after + target) if target else prompt
    if whole[: len(prompt)] != prompt:
        raise UserError(
            f"The tokenizer joins the end of the prompt and the beginning of the answer {answer!r}, so that other "
            "tokens would be trained than are asked for; leave that answer out, or use another chat template."
        )
    if without_end and tokenizer.eos_token_id is None:
        raise UserError(
            "Nothing ends an answer: neither the chat template does, if there is one, nor has the tokenizer an "
            "end-of-text token; give it one (eos_token)."
        )
    end = [tokenizer.eos_token_id] if without_end else []
    return lead + prompt, whole[len(prompt) :] + end


def encode(tokenizer: Any, text: str, start: bool = False) -> list[int]:
    """Token ids. A chat template writes its own begin-of-text, so the tokenizer may add one only at a plain `start`."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if start and tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return [tokenizer.bos_token_id, *ids]
    return ids


def _continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text that continues something: without the space that some tokenizers put in front of every text."""
    first = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))[0]
    if not text or not first.startswith(("\u2581", "\u0120")):  # SentencePiece's mark of a space, and GPT-2's
        return encode(tokenizer, text)
    for anchor in ("\n", ".", "a"):  # behind one that does not merge with the text there is no such space
        lead, whole = encode(tokenizer, anchor), encode(tokenizer, anchor + text)
        if whole[: len(lead)] == lead:
            return whole[len(lead) :]
    raise UserError(f"The tokenizer has no tokens for {text!r} in the middle of a text; word the prompt otherwise.")


def pad_id(tokenizer: Any) -> int:
    """A token id for positions under the mask. A pad token that was added later may lie outside the embedding."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < tokenizer.vocab_size else 0
