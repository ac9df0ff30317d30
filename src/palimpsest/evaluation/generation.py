"""What transformers' `generate` is given, and what is kept from it: the same for every model and measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from palimpsest.models.prompts import turn_end

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Within the block `model` generates by what it is given, and by transformers' defaults.

    What is not given, transformers takes from a checkpoint's own generation settings: penalties, a least length, words
    that are suppressed, a time limit. With them models would answer by rules that are not the same for all.
    """
    own = model.generation_config
    model.generation_config = type(own)(bos_token_id=own.bos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def generation_settings(language_model: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Any]:
    """What `generate` is given besides the prompts: greedy, to the first of `end_ids`."""
    end = end_ids(language_model, tokenizer)
    # The pad token may have been added to the tokenizer alone: under the mask any id of the embedding will do.
    n_ids = len(language_model.get_input_embeddings().weight)
    pad = next((id for id in (tokenizer.pad_token_id, *end) if id is not None and id < n_ids), 0)
    return {**GREEDY, "max_new_tokens": max_new_tokens, "eos_token_id": end or None, "pad_token_id": pad}


def end_ids(language_model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: the tokenizer's, those of the model's generation settings, the template's.

    The last is what training teaches after an answer. A base model that ends texts otherwise may name it nowhere.
    """
    settings = language_model.generation_config.eos_token_id
    of_model = settings if isinstance(settings, list) else [settings]
    candidates = [tokenizer.eos_token_id, *of_model, turn_end(tokenizer)]
    return list(dict.fromkeys(id for id in candidates if id is not None))


def pad_left(ids: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """input_ids and attention_mask of prompts of unequal length, all ending in the last column."""
    width = max(len(prompt) for prompt in ids)
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in ids])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids])
    return input_ids, attention_mask
