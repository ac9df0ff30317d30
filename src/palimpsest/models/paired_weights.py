"""The weights of a base and of what training made of it, paired by canonical name.

Two models are of one architecture if their language models have the same names (anatomy.py) and shapes. Only the
vocabulary may have another size: of the embedding and the head the rows in common are paired, which are those of the
same tokens where the tuned tokenizer was made from the base's by adding to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from palimpsest.files import UserError
from palimpsest.models.adapters import require_merged
from palimpsest.models.anatomy import find_language_model, named_parameters, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

# Layers that compute the same where attention has no window: Voxtral's are a "llama"'s, and its base is a Mistral.
ALIKE = frozenset({"llama", "mistral"})
HEAD = "lm_head.weight"  # what a head is called that neither model has inside its language model
MOST_NAMED = 5  # tokens of rows that only one of the models has


@dataclass(frozen=True)
class PairedWeights:
    """base, tuned: name → weight, with the same names in the base's order and the same shapes; they are not copies."""

    base: Mapping[str, Tensor]
    tuned: Mapping[str, Tensor]
    notes: tuple[str, ...]  # what is not compared, or not with its like: a sentence each
    rows: tuple[int, int]  # of the vocabulary, in the base and in the tuned model; the first of both are paired
    embedding: str  # its name, and that of the head where one of the models has one of its own
    head: str | None


@dataclass(frozen=True)
class _Weights:
    """Of one language model: everything but embedding and head by canonical name, and these two."""

    others: Mapping[str, Tensor]
    embedding_name: str
    embedding: Tensor
    head_name: str | None  # None: beside the language model
    head: Tensor
    tied: bool


def pair_weights(base: nn.Module, tuned: nn.Module, vocabulary: Mapping[str, int] | None = None) -> PairedWeights:
    """The weights of the language models in `base` and `tuned`: plain, behind an adaptor, in an audio LLM, adapted.

    On the device "meta" names and shapes are paired. vocabulary: token → id of the model with more rows, to name them.

    Where both heads are tied there is one pair of embedding and head; where one is, the head of the other is paired
    with the embedding, which is what a tied head is.

    Raises UserError with the first difference for models of different architectures.
    """
    if (what := first_difference(base, tuned)) is not None:
        raise UserError(
            f"The tuned model ({kind_of(tuned)}) is not of the base's architecture ({kind_of(base)}): {what}; give the "
            "base that it was trained from."
        )
    for model in (base, tuned):
        require_merged(model, "are compared")
    ours, theirs = _weights(base), _weights(tuned)
    notes = []
    n_base, n_tuned = len(ours.embedding), len(theirs.embedding)
    if n_base != n_tuned:
        notes.append(_rows_note(ours.embedding_name, n_base, n_tuned, vocabulary or {}))
    rows = min(n_base, n_tuned)
    pairs = {ours.embedding_name: (ours.embedding[:rows], theirs.embedding[:rows])}
    pairs |= {name: (weight, theirs.others[name]) for name, weight in ours.others.items()}
    head = None if ours.tied and theirs.tied else ours.head_name or theirs.head_name or HEAD
    if head is not None:
        if ours.tied or theirs.tied:
            which, other = ("base", "tuned model") if ours.tied else ("tuned model", "base")
            notes.append(
                f"{head} of the {which} is its embedding and that of the {other} is not; they are compared as heads."
            )
        pairs[head] = (ours.head[:rows], theirs.head[:rows])
    of_base, of_tuned = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return PairedWeights(of_base, of_tuned, tuple(notes), (n_base, n_tuned), ours.embedding_name, head)


def first_difference(base: nn.Module, tuned: nn.Module) -> str | None:
    """In what the architectures of two language models differ first, None where they are the same.

    A name, a shape or, where these are the same, what the layers compute. The vocabulary's number of rows is none.
    """
    if (what := next(_differences(_weights(base), _weights(tuned)), None)) is not None:
        return what
    kinds = {kind_of(base), kind_of(tuned)}
    windows = [getattr(_config(it), "sliding_window", None) for it in (base, tuned)]
    if len(kinds) == 1 or (kinds <= ALIKE and not any(windows)):
        return None
    return "its layers have the same names and shapes and compute differently"


def require_same_architecture(base: str, tuned: str) -> tuple[str, ...]:
    """The notes of `pair_weights` for two models by name, before a weight of them is read.

    Raises UserError as it does, and for what cannot be resolved.
    """
    from palimpsest.models.loading import blank_language_model

    return pair_weights(blank_language_model(base), blank_language_model(tuned)).notes


def _weights(model: nn.Module) -> _Weights:
    language_model: Any = find_language_model(model)
    whole: Any = unwrap(model)
    embedding = language_model.get_input_embeddings().weight
    heads = [found for part in (language_model, whole) if (found := _head(part)) is not None]
    head = heads[0] if heads else embedding
    named = named_parameters(language_model)
    special = [name for name, parameter in named.items() if parameter is embedding or parameter is head]
    return _Weights(
        {name: parameter.detach() for name, parameter in named.items() if name not in special},
        next(name for name in special if named[name] is embedding),
        embedding.detach(),
        next((name for name in special if named[name] is head and head is not embedding), None),
        head.detach(),
        head is embedding,
    )


def _head(part: Any) -> Any:
    head = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
    return None if head is None else head.weight


def _differences(base: _Weights, tuned: _Weights) -> Iterator[str]:
    """In the base's order: names that one of them lacks, then shapes."""
    if base.embedding_name != tuned.embedding_name:
        yield f"the embedding is {base.embedding_name} in the base and {tuned.embedding_name} in the tuned model"
    yield from (f"it has no {name}" for name in base.others if name not in tuned.others)
    yield from (f"{name} is not in the base" for name in tuned.others if name not in base.others)
    widths = base.embedding.shape[1:], tuned.embedding.shape[1:]
    if widths[0] != widths[1]:
        yield _shapes(base.embedding_name, base.embedding, tuned.embedding)
    for name, weight in base.others.items():
        if weight.shape != tuned.others[name].shape:
            yield _shapes(name, weight, tuned.others[name])
    if len(base.head) != len(base.embedding) or len(tuned.head) != len(tuned.embedding):
        yield _shapes(base.head_name or HEAD, base.head, tuned.head)


def _shapes(name: str, base: Tensor, tuned: Tensor) -> str:
    return f"{name} has the shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the tuned model"


def kind_of(model: nn.Module) -> str:
    """transformers' model type of the language model in `model`."""
    return str(getattr(_config(model), "model_type", type(model).__name__))


def _config(model: nn.Module) -> Any:
    return getattr(find_language_model(model), "config", None)


def _rows_note(name: str, n_base: int, n_tuned: int, vocabulary: Mapping[str, int]) -> str:
    common, most = min(n_base, n_tuned), max(n_base, n_tuned)
    of = "tuned model" if n_tuned > n_base else "base"
    tokens = [token for token, id in sorted(vocabulary.items(), key=lambda item: item[1]) if common <= id < most]
    more = ", …" if len(tokens) > MOST_NAMED else ""
    named = f" ({', '.join(tokens[:MOST_NAMED])}{more})" if tokens else ""
    return (
        f"{name} and the head have {n_base} rows in the base and {n_tuned} in the tuned model: the first {common} are "
        f"compared, the {most - common} of the {of} alone are not{named}."
    )
