"""Two-layer models from config, in float32, seeded: small enough for every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLength, SpeechLM

VOCAB = 300
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama(seed: int = 0, *, tied: bool = True, **changes: Any) -> LlamaForCausalLM:
    """Hidden 32, 2 layers, 4 heads on 2 key-value heads, vocabulary 300, embedding and head tied."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def tiny_encoder(seed: int = 0) -> WhisperEncoder:
    """Width 16, 2 layers, 80 mel bins, 1500 positions like every Whisper."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=80, vocab_size=100,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    encoder = WhisperEncoder(config).eval()
    torch.nn.init.normal_(encoder.embed_positions.weight, std=0.1)
    return encoder


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, after the special tokens; with a chat template that writes its own begin-of-text."""
    specials = ["<pad>", "<s>", "</s>", "<end>", "<user>", "<assistant>", "<system>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.decoders import ByteLevel

    tokenizer.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<end>" if chat else "</s>",
        pad_token="<pad>",
        additional_special_tokens=["<end>", "<user>", "<assistant>", "<system>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_speech_lm(
    seed: int = 0, speech_length: SpeechLength = "trim", **changes: Any
) -> tuple[SpeechLM, SpeechLMProcessor]:
    language_model = tiny_llama(seed, eos_token_id=3, **changes)
    model = SpeechLM.from_parts(
        tiny_encoder(seed), language_model, adaptor_hidden_size=24, speech_length=speech_length, seed=seed
    )
    processor = SpeechLMProcessor(
        tiny_tokenizer(), WhisperFeatureExtractor(feature_size=80), speech_length=speech_length
    )
    return model.eval(), processor


def save_tiny_models(folder: Path) -> None:
    """What a study of tiny models loads: `folder`/llm and `folder`/whisper."""
    tiny_llama(eos_token_id=3).save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    encoder = tiny_encoder()
    whisper = WhisperModel(encoder.config)
    whisper.encoder.load_state_dict(encoder.state_dict())
    whisper.save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder / "whisper")
