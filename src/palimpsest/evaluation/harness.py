"""lm-evaluation-harness on any model that palimpsest takes, in text and, where the model takes it, in speech.

    python -m palimpsest.evaluation.harness --model palimpsest --model_args pretrained=MODEL --tasks TASKS

is `lm_eval` with one model class more; in Python `import palimpsest.evaluation.harness` registers it. Requests of text
are the harness's own (`HFLM`) on the language model. A document with `doc_to_audio` is asked as `palimpsest evaluate`
asks it: the recording, then the context as the instruction.

lm_eval does not come with palimpsest, and nothing else imports this module.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import Answerer
from palimpsest.evaluation.audio_llm import audio_llm_answerer
from palimpsest.evaluation.spoken import recording_answerer
from palimpsest.files import UserError
from palimpsest.models.loading import (
    choose_device,
    load_audio_llm,
    load_language_model,
    load_speech_lm,
    model_kind,
    resolve,
)
from palimpsest.models.prompts import PromptStyle

PLACEHOLDER = "<audio>"  # where the harness's tasks say that audio goes


@register_model("palimpsest")
class PalimpsestLM(HFLM):  # type: ignore[misc]
    """The model class. Options besides HFLM's (batch_size, max_length, add_bos_token …):

    Args:
        pretrained: a causal LM, PEFT adapter, speech LLM or audio LLM: embedded: name, folder or hub name.
        device: auto, cpu, cuda, cuda:1 …
        dtype: of the weights; None: float32, of an audio LLM that of its checkpoint.
    """

    MULTIMODAL = True

    def __init__(self, pretrained: str, device: str | None = None, dtype: str | None = None, **options: Any) -> None:
        where, place = resolve(pretrained), choose_device(device or "auto")
        kind, dtype = model_kind(where), None if dtype == "auto" else dtype
        self.hears: tuple[Any, Any] | None = None  # the model and processor that take speech
        if kind == "audio_llm":
            self.hears = load_audio_llm(where, dtype=dtype or "auto", device=place)
            language_model, tokenizer = self.hears[0], self.hears[1].tokenizer
        elif kind == "speech_lm":
            self.hears = load_speech_lm(where, dtype=dtype or "float32", device=place)
            language_model, tokenizer = self.hears[0].language_model, self.hears[1].tokenizer
        else:
            language_model, tokenizer = load_language_model(where, dtype=dtype or "float32", device=place)
        self.kind = kind
        longest = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
        options = {"max_length": longest, **options}
        super().__init__(pretrained=language_model, tokenizer=tokenizer, backend="causal", **options)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The harness gives the requests of all tasks together, with and without audio."""
        spoken = {i: request.args for i, request in enumerate(requests) if _recordings(request.args)}
        said = self._said_to_speech(spoken) if spoken else {}
        typed = [i for i in range(len(requests)) if i not in spoken]
        if typed:
            self._in_text()
            answers = super().generate_until([requests[i] for i in typed], disable_tqdm)
            said |= dict(zip(typed, answers, strict=True))
        return [said[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        _require_no_audio(requests)
        self._in_text()
        return list(super().loglikelihood(requests, disable_tqdm))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        _require_no_audio(requests)
        self._in_text()
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Of a question with audio the instruction alone: `evaluate`'s way of asking applies the template."""
        if not any(PLACEHOLDER in str(turn["content"]) for turn in chat_history):
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        if len(chat_history) != 1:
            raise UserError("A document with audio has further turns; leave out few-shot examples and system turns.")
        return str(chat_history[0]["content"])

    def _said_to_speech(self, asked: Mapping[int, tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> dict[int, str]:
        """Greedy answers, in batches of one instruction and the same settings."""
        if self.hears is None:
            raise UserError("The model takes no audio; give a speech LLM or an audio LLM, or tasks of text.")
        if not str(self.batch_size).isdecimal():
            raise UserError(f"Documents with audio have no batch size {self.batch_size!r}; give a number.")
        size, said = int(self.batch_size), {}
        groups: dict[tuple[str, int, tuple[str, ...]], list[Example]] = defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            for i, (context, settings, further) in asked.items():
                if context.count(PLACEHOLDER) > 1:
                    raise UserError("A document with audio has several places for it; leave out few-shot examples.")
                instruction = context.replace(PLACEHOLDER, "").strip() or PromptStyle.speech_instruction
                audio = _file(further["audio"], Path(folder) / f"{i}.wav")
                groups[instruction, *_greedy(settings, self.max_gen_toks)].append(Example(str(i), "", (), "", audio))
            for (instruction, limit, stops), examples in groups.items():
                answer = self._answerer(instruction, limit)
                for start in range(0, len(examples), size):
                    batch = examples[start : start + size]
                    for example, given in zip(batch, answer(batch, "speech"), strict=True):
                        said[int(example.id)] = _until(given.response, stops)
        return said

    def _answerer(self, instruction: str, limit: int) -> Answerer:
        assert self.hears is not None
        model, processor = self.hears
        if self.kind == "audio_llm":
            return audio_llm_answerer(model, processor, limit, instruction=instruction)
        processor.style = replace(processor.style, speech_instruction=instruction)
        return recording_answerer(model, processor, limit)

    def _in_text(self) -> None:
        """Granite Speech's adapter is for audio; answering a recording switches it on."""
        if getattr(self.config, "has_lora_adapter", False) and getattr(self.model, "_hf_peft_config_loaded", False):
            self.model.disable_adapters()


def _recordings(arguments: Sequence[Any]) -> Sequence[Any]:
    """Of a request's arguments: context, settings or continuation, and where there is more, that."""
    further = arguments[2] if len(arguments) > 2 else None
    return further.get("audio") or () if isinstance(further, Mapping) else ()


def _require_no_audio(requests: Sequence[Any]) -> None:
    if any(_recordings(request.args) for request in requests):
        raise UserError("Log-likelihoods after audio are not measured; make the task one of generate_until.")


def _greedy(settings: Mapping[str, Any], limit: int) -> tuple[int, tuple[str, ...]]:
    """(most new tokens, what ends an answer). Raises UserError for settings that are not greedy."""
    if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams", 1) != 1:
        raise UserError("Documents with audio are answered greedily; leave out do_sample, temperature and num_beams.")
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return int(settings.get("max_gen_toks", limit)), stops


def _until(text: str, stops: Sequence[str]) -> str:
    """Up to the first of `stops`."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def _file(audio: Sequence[Any], path: Path) -> Path:
    """The one recording of a document as a file: a path, or datasets' {"bytes"}, {"path"}, {"array", "sampling_rate"}.

    Raises UserError where it is none of these, or not one.
    """
    if len(audio) != 1:
        raise UserError(f"A document has {len(audio)} recordings; the models here take one.")
    (recording,) = audio
    if isinstance(recording, str | Path):
        return Path(recording)
    if isinstance(recording, Mapping) and recording.get("bytes"):
        path.write_bytes(recording["bytes"])
        return path
    if isinstance(recording, Mapping) and "array" not in recording and recording.get("path"):
        return Path(recording["path"])
    import soundfile

    try:  # a decoder of datasets gives these too
        samples, rate = recording["array"], recording["sampling_rate"]
    except (KeyError, TypeError) as error:
        kind = type(recording).__name__
        raise UserError(f"doc_to_audio gave a {kind}, which is no recording; name a column of paths.") from error
    soundfile.write(path, samples, int(rate), subtype="FLOAT")
    return path


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
