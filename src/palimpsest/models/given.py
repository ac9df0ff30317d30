"""Models that were trained elsewhere: can they be compared with a base at all? Decided from configs, before the work.

Compared are weights of one name and shape (paired_weights.py), and answers to one prompt. So the language models must
be of one architecture and size, and their tokens the same, as far as both have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from palimpsest.files import UserError, read_json
from palimpsest.models import embedded, light
from palimpsest.models.adapters import CONFIG, JOIN, Adapter, find_adapter
from palimpsest.models.loading import (
    blank_language_model,
    blended_from,
    encoder_config,
    fingerprint,
    is_speech_lm,
    load_encoder,
    load_language_model,
    load_tokenizer,
    model_kind,
    resolve,
    stored_dtypes,
)
from palimpsest.models.paired_weights import first_difference, kind_of, pair_weights
from palimpsest.models.prompts import writes_tokens
from palimpsest.models.token_settings import WITHOUT_CODEC

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from palimpsest.models.prompts import PromptStyle

Form = Literal["speech_lm", "light", "adapter", "audio_llm", "language_model"]


def form_of(name: str) -> Form:
    """What a model's files are: a SpeechLM's, a light one's, a PEFT adapter's, an audio LLM's, or another's."""
    if find_adapter(name) is not None:
        return "adapter"
    return "light" if light.is_light(Path(name)) else model_kind(name)


def takes_speech(name: str) -> bool:
    """Whether a given model can be asked through encoder frames: a SpeechLM, which has its encoder's adaptor."""
    key = name.removeprefix(embedded.PREFIX)
    shipped = key != name and key in embedded.SHIPPED
    return is_speech_lm(str(embedded.checkpoint(name)) if shipped else name)


def is_audio_llm(name: str) -> bool:
    """Whether a given model is an audio LLM of transformers, which takes recordings as they are."""
    return not name.startswith(embedded.PREFIX) and model_kind(name) == "audio_llm"  # none of those is embedded


def rank_of(name: str) -> int | None:
    """The rank of a LoRA adapter; None for another model."""
    adapter = find_adapter(name)
    rank = None if adapter is None else read_json(adapter.folder / CONFIG).get("r")
    return rank if isinstance(rank, int) else None


def require_pair(base: str, tuned: str) -> tuple[str, ...]:
    """What of the two is not compared, a sentence each; no weights are read.

    Raises UserError, naming the first difference, unless `tuned` can be what training made of `base`: names, shapes and
    tokens are compared, and of an adapter its base's files.
    """
    _require_this_way_round(base, tuned)
    form = form_of(resolve(tuned))
    if form == "adapter":
        _require_same_base(base, tuned)
    ours, theirs = _blank(base), _blank(tuned)
    if (what := first_difference(ours, theirs)) is not None:
        kinds = [kind_of(it) for it in (theirs, ours)]
        of = f" ({' and '.join(kinds)})" if kinds[0] != kinds[1] else ""
        raise UserError(f"{tuned} cannot be compared with {base}{of}: {what}; give the base it was made from.")
    tokenizers = [load_tokenizer(base), load_tokenizer(tuned)]
    _require_same_tokens(base, tuned, tokenizers)
    n_base, n_tuned = (len(it.get_input_embeddings().weight) for it in (ours, theirs))
    if n_tuned < min(n_base, n_tokens := len(tokenizers[0])):
        raise UserError(
            f"{tuned} cannot be asked with the tokens of {base}: they are {n_tokens:,}, and its embedding has "
            f"{n_tuned:,} rows; give the base it was made from."
        )
    notes = pair_weights(ours, theirs, tokenizers[n_tuned > n_base].get_vocab()).notes
    return (*notes, *_of_two_precisions(base, tuned))


def _of_two_precisions(base: str, tuned: str) -> Iterator[str]:
    """A sentence where the files store their weights in other dtypes: rounding is then part of every change."""
    stored = [stored_dtypes(resolve(name)) for name in (base, tuned)]
    if all(stored) and stored[0] != stored[1]:
        ours, theirs = (" and ".join(sorted(of)) for of in stored)
        yield (
            f"Its weights are stored in {theirs} and those of {base} in {ours}: a weight that training left alone "
            "differs by the rounding, so small changes, their rank and where they lie are in part the rounding's."
        )


def _require_this_way_round(base: str, tuned: str) -> None:
    """Raise UserError for a base that is known to be what training made of the other."""
    adapter = find_adapter(base)
    if adapter is not None and _is_on(adapter, tuned):
        raise UserError(f"{base}, given as the base, is an adapter on {tuned}: the two are swapped, give that first.")
    if _listens(base) and not _listens(tuned):
        raise UserError(
            f"{base}, given as the base, takes speech and {tuned} does not: the two are swapped, give the text model "
            "first."
        )


def _listens(name: str) -> bool:
    return takes_speech(name) or is_audio_llm(name)


def _blank(name: str) -> PreTrainedModel:
    """The language model on the meta device, after its files were found to be its own."""
    light_one = form_of(resolve(name)) == "light"
    return blank_language_model(name) if light_one else load_language_model(name, device="meta")[0]


def _require_same_base(base: str, tuned: str) -> None:
    adapter = find_adapter(tuned)
    if adapter is None or _is_on(adapter, base):
        return
    raise UserError(
        f"{tuned} is an adapter on {adapter.base}, whose files are not those of {base}; give that as the base, or, if "
        f"the adapter belongs on this one all the same, '{base}{JOIN}{adapter.folder}'."
    )


def _is_on(adapter: Adapter, base: str) -> bool:
    """Whether an adapter is one on the base, or on another adapter on it."""
    if adapter.base == base or fingerprint(adapter.base) == fingerprint(base):
        return True
    under = find_adapter(adapter.base)
    return under is not None and _is_on(under, base)


def _require_same_tokens(base: str, tuned: str, tokenizers: Sequence[Any]) -> None:
    if found := differing_tokens(*tokenizers):
        id, (here, there) = next(iter(found.items()))
        raise UserError(
            f"{tuned} has another tokenizer than {base}: {len(found):,} tokens differ, the first is {id}, {there!r} "
            f"instead of {here!r}; give the base it was made from, or leave it out here (`palimpsest drift {base} "
            f"{tuned} --text FILE` compares its loss on general text per byte)."
        )


def differing_tokens(base: Any, tuned: Any) -> dict[int, tuple[str, str]]:
    """The ids that two tokenizers have as different tokens: id → (the base's, the other's), in order.

    Added tokens (turns, reserved ones) may be called otherwise: models that learn a modality rename reserved tokens.
    """
    by_text = any(map(writes_tokens, (base, tuned)))  # whose names of tokens are their text
    ours, theirs = (_tokens(it, by_text) for it in (base, tuned))
    added = {id for it in (base, tuned) for id in _added(it)}
    both = sorted((ours.keys() & theirs.keys()) - added)
    return {id: (ours[id], theirs[id]) for id in both if ours[id] != theirs[id]}


def _tokens(tokenizer: Any, by_text: bool) -> dict[int, str]:
    if not by_text:
        return {id: token for token, id in tokenizer.get_vocab().items()}
    return {id: tokenizer.decode([id], skip_special_tokens=False) for id in range(len(tokenizer))}


def _added(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids if writes_tokens(tokenizer) else tokenizer.added_tokens_decoder)


def same_prompts(base: str, tuned: str) -> bool:
    """Whether both models' tokenizers write prompts by the same template."""
    ours, theirs = (getattr(load_tokenizer(name), "chat_template", None) for name in (base, tuned))
    return bool(ours == theirs)


# ---------------------------------------------------------------------------------------------------------------------
# SpeechLMs
# ---------------------------------------------------------------------------------------------------------------------
def speech_settings(name: str) -> tuple[int, str, PromptStyle]:
    """(stack factor, speech length, prompts) of a SpeechLM's folder; nothing is loaded."""
    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.prompts import PromptStyle

    where = _inside(name)
    if light.is_light(where):
        it = light.read_light(where)
        return (
            it.stack_factor,
            it.speech_length,
            PromptStyle(it.system, it.speech_instruction, it.date, it.template_arguments),
        )
    processor = SpeechLMProcessor.from_pretrained(where)
    return processor.stack_factor, processor.speech_length, processor.style


def require_recordings(name: str) -> None:
    """Raise UserError for a SpeechLM that cannot be given recordings: the codec whose tokens it reads is not in it."""
    from palimpsest.models.speech_lm import SpeechLMConfig

    where = _inside(name)
    stored = light.read_light(where) if light.is_light(where) else SpeechLMConfig.from_pretrained(where)
    if stored.tokens is not None and stored.tokens["kind"] == "codec":
        raise UserError(f"{name} {WITHOUT_CODEC}; ask it in text, or in the study that trained it.")


def encoder_of(name: str) -> str:
    """The encoder of a SpeechLM, as for `load_encoder`."""
    where = _inside(name)
    return light.read_light(where).encoder.name if light.is_light(where) else str(where)


def require_same_speech(encoder: str, stack_factor: int, length: str, tuned: str) -> None:
    """Raise UserError unless a SpeechLM hears through this encoder in this way: frames are computed once for all."""
    require_recordings(tuned)
    theirs, theirs_length, _ = speech_settings(tuned)
    if (theirs, theirs_length) != (stack_factor, length):
        raise UserError(
            f"{tuned} takes speech with stack_factor {theirs} and length {theirs_length}, and speech of the recipe has "
            f"{stack_factor} and {length}; set these, leave the model out, or ask it in text alone (modality: text)."
        )
    where = _inside(tuned)
    if encoder_of(tuned) == encoder:
        return
    if encoder_config(encoder).d_model == encoder_config(str(where)).d_model:
        own = light.read_light(where).encoder.content if light.is_light(where) else _content(str(where))
        if own == _content(encoder):
            return
    raise UserError(
        f"{tuned} has another encoder than models.encoder ({encoder}), whose frames all models of a study take; name "
        "its own, leave the model out, or ask it in text alone (modality: text)."
    )


def _content(encoder: str) -> str:
    return light.content_hash(load_encoder(encoder)[0].named_parameters())


def _inside(name: str) -> Path:
    """The SpeechLM's folder; of an adapter that of its base, of a blend the one that it takes a part of."""
    if (source := blended_from(name)) is not None:
        return _inside(source)
    adapter = find_adapter(name)
    return Path(resolve(name)) if adapter is None else _inside(adapter.base)
