"""Where the language model sits inside a model, and the name, layer and kind of each of its parameters.

One rule for every architecture, in four parts:

1. **Language model**: wrappers (peft, DistributedDataParallel, torch.compile) are looked through; then the
   sub-module called `language_model` closest to the top, inside it again where it has one of its own (a multimodal
   model behind our adaptor), or, where there is none, the model itself.
2. **Canonical name**: the parameter's name as `AutoModelForCausalLM` would give it. Name parts that wrappers
   add are dropped, and a decoder without its head (as in transformers' audio LLMs) gets the usual prefix.
3. **Layer**: the number after `layers`, `h` or `blocks`, with nothing but the wrappers of a decoder in front
   of it, so that the layers of an audio encoder are never taken for layers of the language model.
4. **Kind**: the first row of `KINDS` that matches whole parts of the name.

The override is the same everywhere: functions that score or mask take `parameters`, a mapping from names of
your choice to parameters. Names that follow the rule above keep their layer and kind.

Checked on Llama, Mistral, Qwen2, Qwen3, Gemma 3, Phi-3 (fused qkv and gate_up), GPT-2 (Conv1D: weights are
stored input × output), OPT, Mixtral and Qwen3-MoE, and inside Qwen2-Audio, Voxtral, Audio Flamingo 3 and Granite
Speech (tests/test_importance_any_model.py). docs/importance.md explains the rule.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError

if TYPE_CHECKING:
    from torch import nn

# Name parts added by peft, torch.compile, FSDP1 and checkpoint wrappers.
_ADDED = re.compile(r"(?:^|(?<=\.))(?:base_layer|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What may stand in front of a layer's number, from the start of the name: the wrappers of a decoder and nothing else.
BEFORE_LAYER = r"(?:(?:language_model|base_model|model|transformer|decoder|gpt_neox|backbone)\.)*(?:layers|h|blocks)\."
_LAYER = re.compile(BEFORE_LAYER + r"(\d+)(?:\.|$)")  # used with match
# (kind, what the architectures call it). `c_proj` alone is ambiguous in GPT-2, hence its parent's name.
KINDS: tuple[tuple[str, str], ...] = (
    ("qkv", r"qkv_proj|c_attn|query_key_value"),
    ("q", r"q_proj"),
    ("k", r"k_proj"),
    ("v", r"v_proj"),
    ("o", r"o_proj|out_proj|attn\.c_proj|attention\.dense"),
    ("gate_up", r"gate_up_proj"),
    ("gate", r"gate_proj"),
    ("up", r"up_proj|fc1|mlp\.c_fc|dense_h_to_4h"),
    ("down", r"down_proj|fc2|mlp\.c_proj|dense_4h_to_h"),
    ("router", r"(?:mlp|block_sparse_moe|moe)\.gate|router|shared_expert_gate"),
)
_KINDS = tuple((kind, re.compile(rf"\.(?:{pattern})(?:\.|$)")) for kind, pattern in KINDS)


def find_language_model(model: nn.Module) -> nn.Module:
    """The language model of `model`: part 1 of the rule. A plain causal LM is its own language model.

    The result may be a decoder without a head (transformers' audio LLMs keep the head beside it); its
    parameters have canonical names all the same, see `named_parameters`.
    """
    model = unwrap(model)
    while inside := [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "language_model"]:
        model = unwrap(model.get_submodule(min(inside, key=lambda name: name.count("."))))
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """`model` without DistributedDataParallel, torch.compile and peft around it."""
    inner: Any = model
    while True:
        if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ == "DistributedDataParallel":
            inner = inner.module
        else:
            result: nn.Module = inner
            return result


def named_parameters(language_model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the language model under its canonical name (part 2), in the model's order.

    Tied parameters appear once, under the first of their names. The matrices that LoRA adds are left out:
    they are not parameters of the language model.
    """
    prefix = getattr(language_model, "base_model_prefix", "")
    headless = bool(prefix) and not hasattr(language_model, prefix)
    return {
        (f"{prefix}." if headless else "") + _ADDED.sub("", name): parameter
        for name, parameter in language_model.named_parameters()
        if ".lora_" not in name
    }


def scored_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are scored by default: the 2-D weights of the transformer layers, in model order.

    Embeddings, the head, norms and biases are left out. The experts of a mixture, which transformers stacks
    into one (expert, out, in) tensor, count as the 2-D weights they are; the router is a 2-D weight too.

    `model` is a language model or a model that contains one. Raises UserError if there is nothing to score.
    """
    parameters = {
        name: parameter
        for name, parameter in named_parameters(find_language_model(model)).items()
        if layer_index(name) is not None
        and ((parameter.ndim == 2 and name.endswith(".weight")) or (parameter.ndim == 3 and ".experts." in name))
    }
    if not parameters:
        raise UserError(
            f"{type(model).__name__} has no 2-D weights in layers with names like 'model.layers.0.'; "
            "pass the parameters to score as parameters={name: parameter}."
        )
    return parameters


def layer_index(name: str) -> int | None:
    """The layer (from 0) of a parameter or module; None for embeddings, head, final norm and an encoder.

    >>> layer_index("model.layers.11.mlp.up_proj.weight"), layer_index("encoder.layers.3.fc1.weight")
    (11, None)
    """
    match = _LAYER.match(_ADDED.sub("", name))
    return int(match.group(1)) if match else None


def module_kind(name: str) -> str | None:
    """The kind (first column of `KINDS`) of the linear map of a layer that a parameter or module belongs to.

    None for norms, everything outside the layers, and names no row covers.

    >>> module_kind("model.layers.0.self_attn.q_proj.weight"), module_kind("transformer.h.0.attn.c_proj.bias")
    ('q', 'o')
    """
    name = _ADDED.sub("", name)
    if layer_index(name) is None:
        return None
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def decoder_layers(language_model: nn.Module) -> dict[int, nn.Module]:
    """Layer number → module, e.g. "model.layers.3", in order."""
    layers = {}
    for name, module in language_model.named_modules():
        number = layer_index(name)
        if number is not None and layer_index(name.rpartition(".")[0]) is None:
            layers[number] = module
    return dict(sorted(layers.items()))
