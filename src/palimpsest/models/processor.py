"""Prompts and features: from questions (text or audio) to what SpeechLM takes, with the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor

from palimpsest.files import UserError, read_json, write_json
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.prompts import PromptStyle, pad_id, tokenise
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechLength, SpeechLMConfig

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor
    from transformers import BatchFeature

SAMPLES_PER_FRAME = 320  # one encoder frame, 20 ms
MAX_FRAMES = 1500  # 30 s
FILE = "speech_processor.json"


class SpeechLMProcessor:
    """Tokenizer, Whisper feature extractor and prompt style of a `SpeechLM`.

    Args:
        tokenizer: the language model's tokenizer.
        feature_extractor: Whisper's.
        stack_factor, speech_length: as in the model's config.
        style: system turn and the instruction that goes with speech.
        rounded_to: encoder frames of which trimmed speech is a multiple; None: of a position.
    """

    def __init__(
        self,
        tokenizer: Any,
        feature_extractor: Any,
        stack_factor: int = 5,
        speech_length: SpeechLength = "trim",
        style: PromptStyle | None = None,
        rounded_to: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.feature_extractor = feature_extractor
        self.stack_factor = stack_factor
        self.speech_length = speech_length
        self.style = style or PromptStyle()
        self.rounded_to = rounded_to or stack_factor

    def __call__(
        self,
        audio: npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]] | None = None,
        text: str | Sequence[str] | None = None,
    ) -> BatchFeature:
        """What `SpeechLM.generate` takes, for one question or several: prompts padded on the left, and the speech.

        Args:
            audio: recordings, (samples,), mono at 16 kHz, up to 30 s each.
            text: the same as text; exactly one of the two is given.

        Raises UserError for both or neither, and for a recording that is empty, too long or has channels.
        """
        import torch
        from transformers import BatchFeature

        if (audio is None) == (text is None):
            raise UserError("Give the processor either audio=RECORDINGS or text=QUESTIONS.")
        speech: dict[str, Tensor] = {}
        if text is not None:
            prompts = [self.text_prompt(question) for question in ([text] if isinstance(text, str) else text)]
        else:
            waves: Any = [audio] if getattr(audio, "ndim", None) == 1 else list(audio)  # type: ignore[arg-type]
            for i, wave in enumerate(waves):
                if wave.ndim != 1 or not 0 < len(wave) <= MAX_FRAMES * SAMPLES_PER_FRAME:
                    raise UserError(
                        f"Recording {i} has the shape {wave.shape}; the processor takes mono recordings at 16 kHz "
                        "of up to 30 s, one array of samples each."
                    )
            mels, counts = self.features(waves)
            speech = {"input_features": mels, "frame_counts": counts}
            prompts = [self.speech_prompt(int(count) // self.stack_factor) for count in counts]
        width = max(map(len, prompts))
        pad = pad_id(self.tokenizer)
        input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **speech})

    # -- prompts ------------------------------------------------------------------------------------------------------
    def text_prompt(self, question: str) -> list[int]:
        """Token ids of the prompt with `question` as text, up to where the answer begins."""
        return tokenise(self.tokenizer, question, self.style)[0]

    def speech_prompt(self, n_positions: int) -> list[int]:
        """The same with `n_positions` speech positions and the instruction in place of the question's text."""
        return tokenise(self.tokenizer, self.style.speech_instruction, self.style, speech=_speech(n_positions))[0]

    def sequence(self, question: str | int, answer: str) -> tuple[list[int], list[int]]:
        """(token ids of the prompt, of the answer and its end of turn), tokenised as the one text that they are.

        Args:
            question: as text, or how many speech positions it takes.

        Raises UserError where the tokenizer joins the two.
        """
        if isinstance(question, str):
            return tokenise(self.tokenizer, question, self.style, answer=answer)
        instruction, speech = self.style.speech_instruction, _speech(question)
        return tokenise(self.tokenizer, instruction, self.style, answer=answer, speech=speech)

    def answer(self, answer: str) -> list[int]:
        """Token ids of the answer and its end-of-turn token, all that is ever supervised, after a question as text."""
        return self.sequence("q", answer)[1]

    def example_prompts(self) -> dict[str, str]:
        """What a model is given, with its special tokens: a question as text, one as speech, a supervised answer."""
        text, answer = self.sequence("What is the capital of France?", "Paris.")
        speech = self.speech_prompt(1)
        at = speech.index(SPEECH_POSITION)
        before, after = self._decode(speech[:at]), self._decode(speech[at + 1 :])
        return {"text": self._decode(text), "speech": f"{before}[speech]{after}", "answer": self._decode(answer)}

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # -- speech -------------------------------------------------------------------------------------------------------
    def n_frames(self, n_samples: int) -> int:
        """Encoder frames of `n_samples` at 16 kHz: the real length rounded up to `rounded_to`, or 1500."""
        if self.speech_length == "pad_to_30s":
            return MAX_FRAMES
        step = SAMPLES_PER_FRAME * self.rounded_to
        return min(MAX_FRAMES, -(-n_samples // step) * self.rounded_to)

    def features(self, waves: Sequence[npt.NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
        """Log-mel features (speech, mels, mel_time) and frame counts (speech,) of 16 kHz mono recordings up to 30 s."""
        import torch

        counts = [self.n_frames(len(wave)) for wave in waves]
        frames = max(counts)
        # The last log-mel frame looks 200 samples ahead; silence there keeps it independent of the batch.
        margin = 0 if self.speech_length == "pad_to_30s" else 2 * SAMPLES_PER_FRAME
        output = self.feature_extractor(
            list(waves),
            sampling_rate=SAMPLE_RATE,
            padding="max_length",
            max_length=frames * SAMPLES_PER_FRAME + margin,
            truncation=True,
            return_tensors="pt",
        )
        return output["input_features"][:, :, : 2 * frames], torch.tensor(counts)

    # -- disk ---------------------------------------------------------------------------------------------------------
    def save_pretrained(self, folder: str | Path) -> None:
        folder = Path(folder)
        # A tokenizer may name the processor of the audio or vision model it came with; AutoProcessor would follow it.
        self.tokenizer._set_processor_class(None)
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        write_json(
            folder / FILE,
            {
                "stack_factor": self.stack_factor,
                **({} if self.rounded_to == self.stack_factor else {"rounded_to": self.rounded_to}),
                "speech_length": self.speech_length,
                "system": self.style.system,
                "speech_instruction": self.style.speech_instruction,
                "date": self.style.date,
                "template_arguments": dict(self.style.template_arguments),
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> SpeechLMProcessor:
        """From a local folder or a hub name; `kwargs` (revision, token …) go to transformers."""
        from transformers import AutoTokenizer, WhisperFeatureExtractor
        from transformers.utils.hub import cached_file

        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        settings = read_json(Path(cached_file(folder, FILE, **hub)))
        # Folders of earlier versions name neither date nor arguments.
        style = PromptStyle(**{key.name: settings.pop(key.name) for key in fields(PromptStyle) if key.name in settings})
        tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        return cls(tokenizer, WhisperFeatureExtractor.from_pretrained(folder, **hub), style=style, **settings)


def _speech(n_positions: int) -> list[int]:
    return [SPEECH_POSITION] * n_positions


AutoProcessor.register(SpeechLMConfig, SpeechLMProcessor, exist_ok=True)
