"""Checkpoints of transformers' audio LLMs from config, with the processors their hub checkpoints have, made offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    AutoConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from tiny import VOCAB, tiny_tokenizer

MARKS = {"qwen2_audio": "<|AUDIO|>", "audioflamingo3": "<sound>"}
CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2_audio": (Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor),
    "audioflamingo3": (AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor),
}
# In the way of each: parts become marks, text stays; Qwen2-Audio's is the default of its processor.
PARTS_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'audio' %}<sound>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = {
    "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
AUDIO: dict[str, dict[str, Any]] = {
    "qwen2_audio": {
        "model_type": "qwen2_audio_encoder", "d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
    },
    "audioflamingo3": {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip


def tiny_audio_tokenizer(kind: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([MARKS[kind]], special_tokens=True)
    return tokenizer


def tiny_audio_llm(kind: str) -> tuple[Any, Any]:
    """(model in float32 with weights large enough to differ, processor of the kind's own class)."""
    tokenizer = tiny_audio_tokenizer(kind)
    model_class, processor_class = CLASSES[kind]
    config = AutoConfig.for_model(
        kind,
        audio_config={**AUDIO[kind], "num_mel_bins": 8, "max_source_positions": 1500},
        text_config=TEXT,
        audio_token_id=tokenizer.convert_tokens_to_ids(MARKS[kind]),
    )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.4)
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(MARKS[kind])] = (
            0  # no answer holds the mark
        )
    template = None if kind == "qwen2_audio" else PARTS_TEMPLATE
    processor = processor_class(WhisperFeatureExtractor(feature_size=8), tokenizer, chat_template=template)
    return model.eval(), processor


def save_tiny_audio_llm(kind: str, folder: Path) -> Path:
    model, processor = tiny_audio_llm(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
