"""Text that a language model wrote itself: sampled once, at temperature 1, and kept as token ids.

On such text a tuned model can be compared with its base without any data set, and where its training taught nothing.
Two kinds:

    plain   from the beginning of a text on (as LLM-QAT makes data, Liu et al. 2023)
    chat    the model first writes the user's turn, of which it is given the opening alone (Magpie, Xu et al. 2024),
            then answers it; the answer is what is compared. Only of a model with a chat template

Each text has its own stream of random numbers, one for each token, so that a text does not depend on how many others
are sampled; on the batch it depends by rounding alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from palimpsest.evaluation.drift_settings import Sampling
from palimpsest.evaluation.finite import finite_logits
from palimpsest.evaluation.generation import end_ids, generation_settings, pad_left, without_own_settings
from palimpsest.files import (
    UserError,
    differences,
    hash_value,
    in_words,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
)
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.models.prompts import PromptStyle, encode, render, tokenise
from palimpsest.parallel import by_ranks, world_size

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Kind = Literal["plain", "chat"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BEGINNING = "<|endoftext|>"  # what stands between texts for models whose tokenizer writes no begin-of-text
MOST_OF_A_TURN = 48  # tokens of the user's turn
BATCH = 64  # texts sampled together: no option, so that the texts are the same whatever is measured on them
MARK = "\N{LEFT CEILING}turn\N{RIGHT CEILING}"  # only inside this module: where a user's turn stands; never tokenised
REMEDY = "delete it, and it is sampled again"


@dataclass(frozen=True)
class OwnText:
    """`ids` were sampled after `prompt_ids`; the last of them is an end-of-text where the text came to its end."""

    id: str
    kind: Kind
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    prompt: str  # for readers: both as text
    text: str


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------
def sample_own_text(
    model: Any,
    tokenizer: Any,
    sampling: Sampling,
    *,
    seed: int,
    style: PromptStyle | None = None,
    compute: Arithmetic = "float32",
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
) -> list[OwnText]:
    """`sampling.n_texts` of each kind that the model can write, plain ones first.

    Args:
        model, tokenizer: a causal language model on its device, and what it is asked with.
        seed: with the same one the texts are the same.
        style: of the chat prompt.
        progress: progress(texts done, texts), counting the users' turns.
        distributed: every rank calls with its replica of the model, samples its share of the batches and has all texts.

    Raises UserError for a tokenizer without a token that a text begins with, and for NaN or infinite logits.
    """
    style = style or PromptStyle()
    n, kinds = sampling.n_texts, kinds_of(tokenizer)
    total, done = n * (1 + 2 * ("chat" in kinds)), 0
    end, ranks = end_ids(model, tokenizer), world_size() if distributed else 1

    def write(what: str, prompts: list[list[int]], most: int, ends: list[int]) -> list[list[int]]:
        def batch(start: int) -> list[list[int]]:
            nonlocal done
            numbers = range(start, min(start + BATCH, n))
            streams = [random.Random(f"{seed}/{what}/{i}") for i in numbers]
            settings = {**generation_settings(model, tokenizer, most), "eos_token_id": ends or None}
            written = _continue(model, [prompts[i] for i in numbers], streams, settings, compute)
            done += len(numbers) * ranks
            if progress is not None:
                progress(min(done, total), total)
            return written

        return list(itertools.chain.from_iterable(by_ranks(batch, range(0, n, BATCH), distributed=distributed)))

    texts: list[OwnText] = []

    def add(kind: Kind, prompts: list[list[int]], written: list[list[int]]) -> None:
        for i, (prompt, ids) in enumerate(zip(prompts, written, strict=True)):
            shown = tokenizer.decode(prompt), tokenizer.decode(ids, skip_special_tokens=True)
            texts.append(OwnText(f"{kind}-{i}", kind, tuple(prompt), tuple(ids), *shown))

    beginnings = [beginning(tokenizer)] * n
    add("plain", beginnings, write("plain", beginnings, sampling.new_tokens, end))
    if "chat" in kinds:
        before, after = user_turn(tokenizer, style)
        opening = encode(tokenizer, before)
        ends = list(dict.fromkeys([*end, *encode(tokenizer, after)[:1]]))
        turns = write("user", [opening] * n, MOST_OF_A_TURN, ends)
        asked = [
            tokenizer.decode([i for i in turn if i not in ends], skip_special_tokens=True).strip() for turn in turns
        ]
        prompts = [tokenise(tokenizer, question, style)[0] for question in asked]
        add("chat", prompts, write("chat", prompts, sampling.new_tokens, end))
    return texts


def kinds_of(tokenizer: Any) -> tuple[Kind, ...]:
    return KINDS if tokenizer.chat_template is not None else ("plain",)


def beginning(tokenizer: Any) -> list[int]:
    """What a text begins with: the tokenizer's begin-of-text, or what the model has seen between texts."""
    if own := encode(tokenizer, "", start=True):
        return own
    known = tokenizer.get_vocab()
    found = known.get(BEGINNING, tokenizer.eos_token_id)
    if found is None:
        raise UserError("The tokenizer has no token that a text begins with; nothing can be sampled from its model.")
    return [found]


def user_turn(tokenizer: Any, style: PromptStyle) -> tuple[str, str]:
    """What stands in front of the user's words in a prompt, and what follows them."""
    before, _, after = render(tokenizer, MARK, style)[0].partition(MARK)
    return before, after


def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[random.Random],
    settings: dict[str, Any],
    compute: Arithmetic,
) -> list[list[int]]:
    """A sampled continuation of each prompt, up to and with its first end id."""
    from palimpsest.models.cache import generation_cache  # here: whoever reads texts need not wait for transformers

    input_ids, attention_mask = pad_left(prompts, settings["pad_token_id"])
    processors = finite_logits(model, [f"text {i}" for i in range(len(prompts))])
    processors.append(_sampled(streams))
    model.eval()
    with torch.inference_mode(), many_forwards(model, compute), without_own_settings(model):
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            logits_processor=processors,
            **generation_cache(model),
            **settings,
        )
    ends = settings["eos_token_id"] or ()
    written = output[:, input_ids.shape[1] :].tolist()
    return [row[: next((i + 1 for i, id in enumerate(row) if id in ends), len(row))] for row in written]


def _sampled(streams: Sequence[random.Random]) -> Any:
    """A logits processor that leaves one token, drawn at temperature 1: the first whose cumulated probability exceeds
    the next number of the row's stream."""
    from transformers import LogitsProcessor

    class Sampled(LogitsProcessor):  # type: ignore[misc]
        def __call__(
            self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocabulary"]
        ) -> Float[Tensor, "batch vocabulary"]:
            # On the processor, in float64: some devices have none, and the sum of 100,000 shares needs it.
            cumulated = scores.cpu().double().softmax(-1).cumsum(-1)
            drawn = torch.tensor([[stream.random()] for stream in streams], dtype=torch.float64)
            tokens = torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True)
            chosen = tokens.clamp(max=scores.shape[1] - 1).to(scores.device)
            return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)

    return Sampled()


# ---------------------------------------------------------------------------------------------------------------------
# On disk
# ---------------------------------------------------------------------------------------------------------------------
def describe(model: str, sampling: Sampling, seed: int, compute: str) -> dict[str, Any]:
    """What the texts are texts of; it stands beside them. model: fingerprint."""
    return {"schema": 1, "model": model, **asdict(sampling), "seed": seed, "compute": compute}


def write_own_text(file: Path, texts: Sequence[OwnText], about: dict[str, Any]) -> None:
    """The texts, a JSON line each, and beside them `about` with a hash of the tokens."""
    write_jsonl(file, map(asdict, texts))
    write_json(file.with_suffix(".json"), {**about, "n": len(texts), "tokens": tokens_hash(texts)})


def read_own_text(file: Path, about: dict[str, Any] | None = None) -> list[OwnText] | None:
    """What `write_own_text` wrote; None where there is nothing.

    Raises UserError for texts that are not those of `about`, where it is given, and for damaged files.
    """
    sidecar = file.with_suffix(".json")
    if not sidecar.exists():  # written last
        return None
    found = read_json(sidecar)
    own = {key: found.get(key) for key in about} if about and isinstance(found, dict) else about
    if own != about:
        raise UserError(
            f"{file} is another text ({in_words(differences(own or {}, about or {}))}); delete it or write elsewhere."
        )
    texts = []
    for number, row in enumerate(read_jsonl(file), 1):
        try:
            texts.append(OwnText(**{**row, "prompt_ids": tuple(row["prompt_ids"]), "ids": tuple(row["ids"])}))
        except (KeyError, TypeError) as error:
            raise UserError(f"{file}:{number} is not a line of text with its tokens; {REMEDY}.") from error
    if not isinstance(found, dict) or found.get("tokens") != tokens_hash(texts):
        raise UserError(f"{file} is not what {sidecar.name} describes; {REMEDY}.")
    return texts


def tokens_hash(texts: Sequence[OwnText]) -> str:
    return hash_value([[text.id, text.prompt_ids, text.ids] for text in texts])
