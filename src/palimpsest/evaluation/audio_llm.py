"""Answers of transformers' audio LLMs (Qwen2-Audio, Voxtral, Granite Speech, Audio Flamingo 3 …), from text and speech.

There is one way for all: the model's own chat template with the parts {audio, text} in the user turn, its own
processor, its own `generate`. Three differences between them are found by looking, not by name: templates that take a
string with the audio's mark in it instead of parts; processors that hand audio over inside the template (Voxtral); and
templates that stand in the tokenizer. One is listed: encoders that see the padding of a batch (`ALONE`).

>>> model, processor = load_audio_llm("Qwen/Qwen2-Audio-7B-Instruct")  # doctest: +SKIP
>>> answer = audio_llm_answerer(model, processor, max_new_tokens=32)  # doctest: +SKIP
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import torch

from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.evaluation.answers import GREEDY, Answer, Answerer, decode_new, end_ids
from palimpsest.files import UserError
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.prompts import PromptStyle
from palimpsest.records import Modality

# Their encoders have no mask for padded audio: in a batch an answer would depend on its neighbours.
ALONE = frozenset({"granite_speech", "granite_speech_plus"})
# The chat template writes its own begin-of-text, so the tokenizer may add none.
TEXT = {"padding": True, "padding_side": "left", "add_special_tokens": False}
Turns = list[dict[str, Any]]


def audio_llm_answerer(
    model: Any,
    processor: Any,
    max_new_tokens: int = 32,
    system: str | None = None,
    instruction: str = PromptStyle.speech_instruction,
) -> Answerer:
    """Greedy answers of an audio LLM to questions given as text or as speech.

    With speech the user turn is the recording, then `instruction`; with text it is the question alone. Generation
    settings are those of `text_answerer`: nothing but the end ids is taken from the model's own.

    Raises UserError for a processor that no audio can be given to.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    end = end_ids(model, tokenizer)
    pad = next((id for id in (tokenizer.pad_token_id, *end) if id is not None), 0)
    prepare = _inside_the_template if _takes_no_audio(processor) else _beside_the_template(processor)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def answer(examples: Sequence[Example], modality: Modality) -> list[Answer]:
        if modality not in ("text", "speech"):
            raise UserError(f"An audio LLM was asked to answer from {modality}; it can answer from text and speech.")
        spoken = modality == "speech"
        if spoken and len(examples) > 1 and model.config.model_type in ALONE:
            return [answer([example], modality)[0] for example in examples]
        if spoken:
            for example in examples:
                if example.audio is None:
                    raise UserError(f"Question {example.id!r} has no audio; have it spoken first.")
        prompts, inputs = prepare(processor, examples, instruction if spoken else None, system)
        lengths = inputs["attention_mask"].sum(1).tolist()
        if longest is not None and max(lengths) + max_new_tokens > longest:
            raise UserError(
                f"A question takes {max(lengths)} tokens and with {max_new_tokens} new ones does not fit into the "
                f"model's {longest} positions; shorten it."
            )
        model.eval()
        with torch.inference_mode():
            output = model.generate(
                **_on_device(inputs, model),
                max_new_tokens=max_new_tokens,
                eos_token_id=end or None,
                pad_token_id=pad,
                **GREEDY,
            )
        decoded = decode_new(tokenizer, output[:, inputs["input_ids"].shape[1] :], end)
        return [
            Answer(text, n_new, prompt, int(length))
            for (text, n_new), prompt, length in zip(decoded, prompts, lengths, strict=True)
        ]

    return answer


# ---------------------------------------------------------------------------------------------------------------------
# From examples to what `generate` takes: (prompts for the record, tensors), left-padded
# ---------------------------------------------------------------------------------------------------------------------
Prepare = Callable[[Any, Sequence[Example], str | None, str | None], tuple[list[str | None], Mapping[str, Any]]]


def _beside_the_template(processor: Any) -> Prepare:
    """The template writes a mark where the audio goes; the processor takes text and audio and expands the mark."""
    content = _content_form(processor)

    def prepare(
        processor: Any, examples: Sequence[Example], instruction: str | None, system: str | None
    ) -> tuple[list[str | None], Mapping[str, Any]]:
        prompts: list[str | None]
        if instruction is None:
            prompts = [_render(processor, content(e.question.strip(), False), system) for e in examples]
            return prompts, processor(text=prompts, text_kwargs=TEXT, return_tensors="pt")
        prompts = [_render(processor, content(instruction, True), system) for _ in examples]
        inputs = processor(
            text=prompts,
            audio=[read_audio(example.audio) for example in examples],  # type: ignore[arg-type]
            text_kwargs=TEXT,
            audio_kwargs={"sampling_rate": SAMPLE_RATE},  # and the processor's own padding: encoders count on it
            return_tensors="pt",
        )
        return prompts, inputs

    return prepare


def _inside_the_template(
    processor: Any, examples: Sequence[Example], instruction: str | None, system: str | None
) -> tuple[list[str | None], Mapping[str, Any]]:
    """Voxtral: `apply_chat_template` reads the recordings and makes tokens and features; there is no prompt text."""
    conversations: list[Turns] = []
    for example in examples:
        if instruction is None:
            parts: Any = example.question.strip()
        else:
            read_audio(example.audio)  # type: ignore[arg-type]  # its errors name the file; the processor's do not
            parts = [{"type": "audio", "path": str(example.audio)}, {"type": "text", "text": instruction}]
        conversations.append(_turns(parts, system))
    inputs = processor.apply_chat_template(conversations, return_tensors="pt")
    return [None] * len(examples), inputs


def _takes_no_audio(processor: Any) -> bool:
    return "audio" not in inspect.signature(processor.__call__).parameters


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates
# ---------------------------------------------------------------------------------------------------------------------
def _content_form(processor: Any) -> Callable[[str, bool], Any]:
    """The user turn's content from (text, with audio?) in the form that the template renders as meant."""
    mark = getattr(processor, "audio_token", None)
    if mark is None:
        raise UserError(f"{type(processor).__name__} has no audio token, so no recording can be given to it.")

    def parts(text: str, audio: bool) -> Any:
        return [*([{"type": "audio"}] if audio else []), {"type": "text", "text": text}]

    def string(text: str, audio: bool) -> Any:
        return f"{mark}{text}" if audio else text

    for form in (parts, string):
        try:
            rendered = _render(processor, form("QUESTION", True), None)
        except (TypeError, jinja2.TemplateError):  # a template of strings, given parts
            continue
        if rendered.count(mark) == 1 and "QUESTION" in rendered and "'type'" not in rendered:
            return form
    raise UserError(
        f"The chat template of {type(processor).__name__} does not place audio ({mark}) and text in a user turn; "
        "use a checkpoint made for conversation."
    )


def _render(processor: Any, content: Any, system: str | None) -> str:
    writer = processor if getattr(processor, "chat_template", None) is not None else processor.tokenizer
    return str(writer.apply_chat_template(_turns(content, system), tokenize=False, add_generation_prompt=True))


def _turns(content: Any, system: str | None) -> Turns:
    turns: Turns = [{"role": "user", "content": content}]
    if system is None:
        return turns
    turn: Any = system if isinstance(content, str) else [{"type": "text", "text": system}]
    return [{"role": "system", "content": turn}, *turns]


def _on_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Features in the model's precision; what is no tensor is left out."""
    return {
        key: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
