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
from functools import partial
from typing import Any

import torch

from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import Answer, Answerer, decoded, names_of
from palimpsest.evaluation.finite import finite_logits
from palimpsest.evaluation.generation import generation_settings, without_own_settings
from palimpsest.evaluation.spoken import recordings
from palimpsest.files import UserError
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.models.prompts import PromptStyle, apply_template, fixed_date
from palimpsest.records import Modality

# Their encoders have no mask for padded audio: in a batch an answer would depend on its neighbours.
ALONE = frozenset({"granite_speech", "granite_speech_plus"})
# The chat template writes its own begin-of-text, so the tokenizer may add none.
TEXT = {"padding": True, "padding_side": "left", "add_special_tokens": False}
Turns = list[dict[str, Any]]


def audio_llm_answerer(
    model: Any,
    processor: Any,
    max_new_tokens: int = 64,
    system: str | None = None,
    instruction: str = PromptStyle.speech_instruction,
    compute: Arithmetic = "float32",
) -> Answerer:
    """Greedy answers of an audio LLM to questions given as text or as speech.

    With speech the user turn is the recording, then `instruction`; with text it is the question alone. Generation
    settings are those of `text_answerer`: nothing but the end ids is taken from the model's own. `compute` is the
    arithmetic.

    Raises UserError for a processor that no audio can be given to.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    settings = generation_settings(model, tokenizer, max_new_tokens)
    if "audio" in inspect.signature(processor.__call__).parameters:
        prepare = partial(_beside_the_template, processor, _content_form(processor))
    else:
        prepare = partial(_inside_the_template, processor)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def answer(examples: Sequence[Example], modality: Modality) -> list[Answer]:
        if modality not in ("text", "speech"):
            raise UserError(f"An audio LLM was asked to answer from {modality}; it can answer from text and speech.")
        spoken = modality == "speech"
        if spoken and len(examples) > 1 and model.config.model_type in ALONE:
            return [answer([example], modality)[0] for example in examples]
        prompts, inputs = prepare(examples, instruction if spoken else None, system)
        lengths = inputs["attention_mask"].sum(1).tolist()
        if longest is not None and max(lengths) + max_new_tokens > longest:
            raise UserError(
                f"A question takes {max(lengths)} tokens and with {max_new_tokens} new ones does not fit into the "
                f"model's {longest} positions; shorten it."
            )
        model.eval()
        with torch.inference_mode(), many_forwards(model, compute), without_own_settings(model):
            finite = finite_logits(model, names_of(examples))
            output = model.generate(**_on_device(inputs, model), logits_processor=finite, **settings)
        return decoded(tokenizer, output[:, inputs["input_ids"].shape[1] :], settings, prompts, lengths)

    return answer


def require_place_for_audio(processor: Any) -> None:
    """Raise UserError for a processor that no audio can be given to."""
    if "audio" in inspect.signature(processor.__call__).parameters:
        _content_form(processor)


# ---------------------------------------------------------------------------------------------------------------------
# From examples to what `generate` takes: (prompts for the record, tensors), left-padded
# ---------------------------------------------------------------------------------------------------------------------
Prepared = tuple[list[str | None], Mapping[str, Any]]


def _beside_the_template(
    processor: Any,
    content: Callable[[str, bool], Any],
    examples: Sequence[Example],
    instruction: str | None,
    system: str | None,
) -> Prepared:
    """The template writes a mark where the audio goes; the processor takes text and audio and expands the mark."""
    audio: dict[str, Any] = {}
    if instruction is None:
        contents = [content(example.question.strip(), False) for example in examples]
    else:
        contents = [content(instruction, True)] * len(examples)
        # The padding is the processor's own: encoders count on it.
        audio = {"audio": recordings(examples), "audio_kwargs": {"sampling_rate": SAMPLE_RATE}}
    prompts: list[str | None] = [_render(processor, one, system) for one in contents]
    return prompts, processor(text=prompts, text_kwargs=TEXT, return_tensors="pt", **audio)


def _inside_the_template(
    processor: Any, examples: Sequence[Example], instruction: str | None, system: str | None
) -> Prepared:
    """Voxtral: `apply_chat_template` reads the recordings and makes tokens and features; there is no prompt text."""
    contents: list[Any]
    if instruction is None:
        contents = [example.question.strip() for example in examples]
    else:
        recordings(examples)  # its errors name the file; the processor's do not
        text = {"type": "text", "text": instruction}
        contents = [[{"type": "audio", "path": str(example.audio)}, text] for example in examples]
    with fixed_date(PromptStyle()):
        inputs = processor.apply_chat_template([_turns(one, system) for one in contents], return_tensors="pt")
    return [None] * len(examples), inputs


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
        except UserError:  # a template of strings, given parts
            continue
        if rendered.count(mark) == 1 and "QUESTION" in rendered and "'type'" not in rendered:
            return form
    raise UserError(
        f"The chat template of {type(processor).__name__} does not place audio ({mark}) and text in a user turn; "
        "use a checkpoint made for conversation."
    )


def _render(processor: Any, content: Any, system: str | None) -> str:
    writer = processor if getattr(processor, "chat_template", None) is not None else processor.tokenizer
    return apply_template(writer, _turns(content, system), PromptStyle(), add_generation_prompt=True)


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
