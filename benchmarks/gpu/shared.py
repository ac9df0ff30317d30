"""What the scripts beside this one share: tiny shapes, a tokenizer that needs no download, the machine in words.

Importance and training run from source with torch, transformers, peft, accelerate, safetensors and numpy alone.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "liger-kernel")
BOUNDS = ("Ge", "Gt", "Le", "Lt", "MinLen", "Predicate")
TINY = {
    "decoder": {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "tie_word_embeddings": True},
    "encoder": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                "num_mel_bins": 80},
}  # fmt: skip


def _do_without_bounds() -> None:
    """Where annotated_types is not installed, options are made without it: importance and training read no recipe."""
    if find_spec("annotated_types") is not None:
        return
    print("annotated_types is not installed: bounds of options are not checked here")
    module: Any = ModuleType("annotated_types")
    for name in BOUNDS:
        setattr(module, name, lambda *bounds, **named: None)
    sys.modules["annotated_types"] = module


def require_packages(names: dict[str, str]) -> None:
    """End with a sentence where packages are absent; names: module → what to give pip."""
    absent = [package for module, package in names.items() if find_spec(module) is None]
    if absent:
        sys.exit(f"A whole study needs packages that are not installed: pip install {' '.join(absent)}")


def require_cuda(tiny: bool) -> torch.device:
    if not tiny and not torch.cuda.is_available():
        sys.exit("There is no CUDA device; use --tiny to try the script on the CPU.")
    return torch.device("cpu" if tiny else "cuda")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<s>", "</s>", "<end>", "<user>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>", pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    fast.chat_template = (
        "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def describe_machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        from palimpsest.planning.sizes import GPUS

        known = [gpu for key, gpu in GPUS.items() if key.split("-")[0] in properties.name]
        machine |= {"gpu": properties.name, "gpu_gb": properties.total_memory / 1e9}
        if known:
            machine |= {"table_entry": known[0].name, "published_bf16_flops": known[0].bf16}
    return machine


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_do_without_bounds()  # here, because the package needs it from its first import on
