"""SpeechLM: a frozen Whisper encoder, an adaptor, and any Hugging Face causal language model (LLaMA-Omni, stage 1).

Shapes:
    batch       sequences in a batch              speech      utterances in a batch (one per sequence, or none)
    seq         tokens of a sequence, speech positions included
    mel_time    log-mel frames, 100 per second    mels        mel bins
    time        encoder frames, 50 per second     d_enc       encoder width
    position    time // stack_factor, 10 per second           d_lm    language-model width
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from palimpsest.files import UserError
from palimpsest.models.gate import adapters_switched, require_one_kind
from palimpsest.models.token_settings import SpeechInput
from palimpsest.models.tokens import Codes, Quantiser, SpeechTokenizer, TokenAdaptor, repeats, rows_like

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers.modeling_outputs import CausalLMOutputWithPast

# Stands in `input_ids` where a speech position goes. It is no token: the vocabulary and the embedding stay as they are.
SPEECH_POSITION = -200

SpeechLength = Literal["trim", "pad_to_30s"]


class SpeechLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a `SpeechLM`.

    Args:
        text_config: the language model's own config.
        encoder_config: a Whisper config, of which the encoder is used.
        stack_factor: encoder frames stacked into one language-model position (5).
        adaptor_hidden_size: width between the adaptor's two linear layers (2048).
        speech_length: "trim" encodes the real length of the speech under a mask; "pad_to_30s" is LLaMA-Omni's layout:
            every utterance takes 1500 encoder frames, 300 positions.
        tokens: None where the adaptor reads encoder frames; else {reads, kind, k, pool, collapse, rounded_to} of speech
            tokens (tokens.py), reads being "tokens" or "centroids", rounded_to as in the processor.
    """

    model_type = "palimpsest_speech_lm"
    sub_configs = {"text_config": AutoConfig, "encoder_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        stack_factor: int = 5,
        adaptor_hidden_size: int = 2048,
        speech_length: SpeechLength = "trim",
        tokens: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens = tokens
        self.text_config = _sub_config(text_config, "llama")
        self.encoder_config = _sub_config(encoder_config, "whisper")
        self.stack_factor = stack_factor
        self.adaptor_hidden_size = adaptor_hidden_size
        self.speech_length = speech_length
        # transformers hands the outer config's choice of attention (none yet) down; the parts keep their own.
        chosen = [(part, part._attn_implementation) for part in (self.text_config, self.encoder_config)]
        super().__init__(**kwargs)
        for part, attention in chosen:
            part._attn_implementation = attention
        self.tie_word_embeddings = False  # the language model ties its own, by its own config


def _sub_config(config: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    if isinstance(config, dict):
        return AutoConfig.for_model(**{"model_type": default, **config})
    return AutoConfig.for_model(default) if config is None else config


class SpeechAdaptor(nn.Module):
    """Stack `stack_factor` frames, Linear, ReLU, Linear (LLaMA-Omni's adaptor: biases, no norm, dropout or residual).

    Three buffers, identities unless `calibrate` sets them, standardise the stacked frames and give the output the
    spread of the language model's embedding: from random weights, training then starts in the range the model knows.
    """

    collapse = False  # of tokens.TokenAdaptor: repetitions are left out
    input_mean: Tensor
    input_scale: Tensor
    output_scale: Tensor

    def __init__(
        self, encoder_dim: int, hidden: int, output_dim: int, stack_factor: int, quantiser: Quantiser | None = None
    ) -> None:
        super().__init__()
        self.stack_factor = stack_factor
        self.quantiser = quantiser  # replaces frames by their centroids first, to see what that costs
        stacked = encoder_dim * stack_factor
        self.linear1 = nn.Linear(stacked, hidden)
        self.linear2 = nn.Linear(hidden, output_dim)
        self.register_buffer("input_mean", torch.zeros(stacked))
        self.register_buffer("input_scale", torch.ones(stacked))
        self.register_buffer("output_scale", torch.ones(()))

    @property
    def frames_dtype(self) -> torch.dtype:
        """In which it takes frames."""
        return self.linear1.weight.dtype if self.quantiser is None else torch.float32

    def stack(self, frames: Float[Tensor, "speech time d_enc"]) -> Float[Tensor, "speech position stacked"]:
        """The last `time mod stack_factor` frames are dropped."""
        if self.quantiser is not None:
            frames = self.quantiser.replaced(frames).to(self.linear1.weight.dtype)
        speech, time, dim = frames.shape
        positions = time // self.stack_factor
        return frames[:, : positions * self.stack_factor].reshape(speech, positions, dim * self.stack_factor)

    def forward(self, frames: Float[Tensor, "speech time d_enc"]) -> Float[Tensor, "speech position d_lm"]:
        stacked = (self.stack(frames) - self.input_mean) * self.input_scale
        return self.linear2(torch.relu(self.linear1(stacked))) * self.output_scale  # type: ignore[no-any-return]

    @torch.no_grad()
    def calibrate(self, frames: Float[Tensor, "speech time d_enc"], target_std: float) -> None:
        """Set the three buffers from a sample of encoder frames without padding, and the embedding's spread."""
        stacked = self.stack(frames).flatten(0, 1)
        if len(stacked) < 2:
            raise UserError("The adaptor cannot be calibrated on less than 0.2 s of speech; give more or longer audio.")
        self.input_mean.copy_(stacked.mean(0))
        self.input_scale.copy_(1.0 / stacked.std(0).clamp_min(1e-5))
        self.output_scale.fill_(1.0)
        self.output_scale.fill_(target_std / float(self(frames).std()))


class SpeechLM(PreTrainedModel):  # type: ignore[misc]
    """Frozen Whisper encoder → adaptor → causal language model.

    Without speech in the batch it *is* the language model, bit for bit, with the same weights.
    With `gated`, its adapters are on where there is speech, and off without (gate.py).
    """

    config_class = SpeechLMConfig
    base_model_prefix = "speech_lm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "WhisperEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    main_input_name = "input_ids"

    def __init__(
        self,
        config: SpeechLMConfig,
        encoder: WhisperEncoder | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.encoder = WhisperEncoder(config.encoder_config) if encoder is None else encoder
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.adaptor = _blank_adaptor(config, self.language_model.get_input_embeddings().weight.shape[1])
        self.adaptor.to(self.language_model.dtype)
        self.gated = False
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        self.post_init()

    @classmethod
    def from_parts(
        cls,
        encoder: WhisperEncoder,
        language_model: PreTrainedModel,
        *,
        stack_factor: int = 5,
        adaptor_hidden_size: int = 2048,
        speech_length: SpeechLength = "trim",
        seed: int = 0,
        reads: SpeechInput = "frames",
        tokenizer: SpeechTokenizer | None = None,
        collapse: bool = True,
    ) -> SpeechLM:
        """Compose pre-trained parts; only the adaptor is new, drawn from `seed` (not the global generator).

        reads: what it is given; anything but "frames" needs the `tokenizer`. Of "tokens" a position is a token, and
        stack_factor says what trimmed speech is rounded to; `collapse`: of equal ones in a row the language model sees
        one.
        """
        tokens: dict[str, Any] | None = None
        if reads != "frames":
            assert tokenizer is not None
            tokens = {"reads": reads, "k": tokenizer.k, "pool": tokenizer.pool, "collapse": collapse}
            tokens |= {"kind": "codec" if tokenizer.codes else "kmeans", "rounded_to": stack_factor}
        config = SpeechLMConfig(
            text_config=language_model.config,
            encoder_config=encoder.config,
            stack_factor=tokenizer.pool if tokenizer is not None and reads == "tokens" else stack_factor,
            adaptor_hidden_size=adaptor_hidden_size,
            speech_length=speech_length,
            tokens=tokens,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cls(config, encoder=encoder, language_model=language_model)
            if isinstance(model.adaptor, SpeechAdaptor):
                model.adaptor.linear1.reset_parameters()
                model.adaptor.linear2.reset_parameters()
        if isinstance(model.adaptor, TokenAdaptor):
            rows = rows_like(model.get_input_embeddings().get_parameter("weight"), len(model.adaptor.rows.weight), seed)
            model.adaptor.rows.weight.data.copy_(rows)
        if tokenizer is not None and tokenizer.tensors and model.adaptor.quantiser is not None:
            model.adaptor.quantiser.load_state_dict(dict(tokenizer.tensors))
        return model

    # The language model's generation settings (end-of-turn ids above all) travel with the checkpoint.
    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        self.language_model.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> SpeechLM:
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        model.language_model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path)
        return loaded  # type: ignore[no-any-return]

    def _init_weights(self, module: nn.Module) -> None:
        # Parts bring their own weights; what from_pretrained does not find in a checkpoint must not pass silently.
        if isinstance(module, SpeechAdaptor):
            module.linear1.reset_parameters()
            module.linear2.reset_parameters()

    def train(self, mode: bool = True) -> SpeechLM:
        super().train(mode)
        self.encoder.eval()  # frozen, also in its dropout
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    # -- the main path ------------------------------------------------------------------------------------------------
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        input_features: Float[Tensor, "speech mels mel_time"] | None = None,
        encoder_frames: Float[Tensor, "speech time d_enc"] | None = None,
        frame_counts: Int[Tensor, " speech"] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Like the language model's forward, with speech.

        `input_ids` holds SPEECH_POSITION where an utterance's positions go, utterances in order. The speech comes as
        `input_features` (log-mel) or as `encoder_frames` computed before, with `frame_counts`, the number of valid
        encoder frames of each utterance. `labels` are −100 wherever nothing is supervised.
        """
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        inputs |= self.embed(input_ids, input_features, encoder_frames, frame_counts, attention_mask)
        if (
            isinstance(logits_to_keep, torch.Tensor) or logits_to_keep
        ):  # language models without it get no such argument
            kwargs["logits_to_keep"] = logits_to_keep
        with self._gate(input_ids):
            return self.language_model(**{**kwargs, **inputs}, labels=labels)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | None = None,
        input_features: Float[Tensor, "speech mels mel_time"] | None = None,
        encoder_frames: Float[Tensor, "speech time d_enc"] | None = None,
        frame_counts: Int[Tensor, " speech"] | None = None,
        **kwargs: Any,
    ) -> Int[Tensor, "batch new"]:
        """The language model's own `generate` on left-padded prompts; returns only the new tokens, always."""
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        inputs |= self.embed(input_ids, input_features, encoder_frames, frame_counts, attention_mask)
        inputs.pop("position_ids", None)  # generate counts them from the mask
        with self._gate(input_ids):
            new = self.language_model.generate(**inputs, **kwargs)
        return new if "inputs_embeds" in inputs else new[:, input_ids.shape[1] :]  # type: ignore[no-any-return]

    def _gate(self, input_ids: Int[Tensor, "batch seq"]) -> AbstractContextManager[None]:
        if not self.gated:
            return nullcontext()
        return adapters_switched(self.language_model, require_one_kind((input_ids == SPEECH_POSITION).any(dim=1)))

    def embed(
        self,
        input_ids: Int[Tensor, "batch seq"],
        input_features: Float[Tensor, "speech mels mel_time"] | None = None,
        encoder_frames: Float[Tensor, "speech time d_enc"] | None = None,
        frame_counts: Int[Tensor, " speech"] | None = None,
        attention_mask: Int[Tensor, "batch seq"] | None = None,
    ) -> dict[str, Tensor]:
        """`input_ids` untouched without speech, else `inputs_embeds` with the adaptor's output spliced in.

        Where repeated tokens collapse, also an `attention_mask` that leaves out all but the first of equal ones, and
        `position_ids` that count what is left: to the language model they are not there.
        """
        is_speech: Bool[Tensor, "batch seq"] = input_ids == SPEECH_POSITION
        if input_features is None and encoder_frames is None:
            if bool(is_speech.any()):
                raise ValueError(
                    "input_ids has speech positions but neither input_features nor encoder_frames is given"
                )
            return {"input_ids": input_ids}
        if frame_counts is None:
            raise ValueError("speech needs frame_counts, the number of valid encoder frames of each utterance")
        if encoder_frames is None:
            assert input_features is not None
            encoder_frames = encode_speech(self.encoder, input_features, frame_counts, self.config.speech_length)
        encoder_frames = encoder_frames.to(self.adaptor.frames_dtype)
        projected = self.adaptor(encoder_frames)
        counts = frame_counts.to(projected.device) // self.config.stack_factor
        valid = torch.arange(projected.shape[1], device=projected.device) < counts[:, None]
        speech = projected[valid]  # (all positions, d_lm), utterances in order
        if int(is_speech.sum()) != len(speech):
            raise ValueError(f"input_ids has {int(is_speech.sum())} speech positions, the speech gives {len(speech)}")
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_speech, 0))
        inputs = {"inputs_embeds": embeds.masked_scatter(is_speech.unsqueeze(-1), speech.to(embeds.dtype))}
        if isinstance(self.adaptor, TokenAdaptor) and self.adaptor.collapse:
            again = repeats(self.adaptor.quantiser.ids(encoder_frames))[valid]
            left_out = torch.zeros_like(is_speech).masked_scatter(is_speech, again)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            mask = mask.masked_fill(left_out, 0)
            inputs |= {"attention_mask": mask, "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}
        return inputs


def _blank_adaptor(config: SpeechLMConfig, output_dim: int) -> SpeechAdaptor | TokenAdaptor:
    dim, tokens, quantiser = config.encoder_config.d_model, config.tokens, None
    if tokens is not None and tokens["kind"] == "codec":
        return TokenAdaptor(Codes(tokens["k"]), output_dim, collapse=tokens["collapse"])
    if tokens is not None:
        quantiser = Quantiser(tokens["k"], dim, tokens["pool"])
        if tokens["reads"] == "tokens":
            return TokenAdaptor(quantiser, output_dim, collapse=tokens["collapse"])
    return SpeechAdaptor(dim, config.adaptor_hidden_size, output_dim, config.stack_factor, quantiser)


def encode_speech(
    encoder: WhisperEncoder,
    input_features: Float[Tensor, "speech mels mel_time"],
    frame_counts: Int[Tensor, " speech"],
    speech_length: SpeechLength,
) -> Float[Tensor, "speech time d_enc"]:
    """Whisper encoder output, without gradients.

    "pad_to_30s": the encoder as it is, on 3000 log-mel frames. "trim": the same layers on the real length only. Padding
    is zeroed before the convolutions, which then see what they see at the end of a recording, and masked in attention;
    so the result for one utterance does not depend on the others in its batch. Frames past `frame_counts` are zero.
    """
    dtype = encoder.conv1.weight.dtype
    with torch.no_grad():
        if speech_length == "pad_to_30s":
            return encoder(input_features.to(dtype)).last_hidden_state  # type: ignore[no-any-return]
        time = int(frame_counts.max())
        counts = frame_counts.to(input_features.device)
        mel_valid = torch.arange(2 * time, device=counts.device) < 2 * counts[:, None]
        mels = input_features[:, :, : 2 * time].to(dtype) * mel_valid[:, None]
        hidden = nn.functional.gelu(encoder.conv1(mels))
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)  # (speech, time, d_enc)
        hidden = hidden + encoder.embed_positions.weight[:time]
        valid = torch.arange(time, device=counts.device) < counts[:, None]
        mask = torch.zeros(valid.shape, dtype=dtype, device=counts.device)
        mask = mask.masked_fill(~valid, torch.finfo(dtype).min)[:, None, None, :].expand(-1, 1, time, time)
        for layer in encoder.layers:
            output = layer(hidden, mask)
            hidden = output if isinstance(output, torch.Tensor) else output[0]
        return encoder.layer_norm(hidden) * valid[:, :, None]  # type: ignore[no-any-return]


AutoConfig.register(SpeechLMConfig.model_type, SpeechLMConfig, exist_ok=True)
AutoModel.register(SpeechLMConfig, SpeechLM, exist_ok=True)
AutoModelForCausalLM.register(SpeechLMConfig, SpeechLM, exist_ok=True)
