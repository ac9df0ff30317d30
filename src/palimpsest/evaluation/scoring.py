"""Is an answer right? Four deterministic rules, so that an accuracy can be compared with anyone else's.

    token_sequence          the words of a gold answer stand in the response, adjacent and in order
    token_sequence_numbers  the same after number words became digits: "twenty-one" is "21" (number_words.py)
    substring               the characters of a gold answer stand in the response: "Au" is in "author"
    any_order               every word of a gold answer stands somewhere in the response

Text is first decomposed (NFKD), lower-cased, stripped of combining marks and cut into `\\w+` words. The
last two rules are how other harnesses score and look at the whole response. The first two leave out a
verbatim copy of the question at its start, so that a model that only repeats "Which is larger, the sun or
the moon?" is not right.

What none of these rules can see: negation ("not Paris"), hedging ("Paris or London"), inflection ("bee",
"bees"), aliases ("U.S.", "United States"), reordered dates. tests/evaluation_scoring_cases.jsonl lists such
cases, each with a human verdict and the rules that get it wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from palimpsest.evaluation.number_words import digits
from palimpsest.files import UserError

METRIC_VERSION = "2"  # raised whenever any verdict can change
PRIMARY = "token_sequence_numbers"

Metric = Callable[[str, str, str | None], bool]  # (response, one gold answer, question or None) -> right?


def score(response: str, answers: Sequence[str], question: str | None = None) -> dict[str, bool]:
    """The verdict of every metric: whether the response holds at least one of the gold answers.

    Raises:
        UserError: when no gold answer holds a word, because then nothing could ever be right.
    """
    golds = [gold for gold in answers if words(gold)]
    if not golds:
        raise UserError(f"No gold answer among {list(answers)!r} holds a letter or digit; give every question one.")
    return {name: any(metric(response, gold, question) for gold in golds) for name, metric in METRICS.items()}


def _token_sequence(response: str, gold: str, question: str | None) -> bool:
    return _contains(_after_echo(words(response), words(question or "")), words(gold))


def _token_sequence_numbers(response: str, gold: str, question: str | None) -> bool:
    return _contains(_after_echo(number_words(response), number_words(question or "")), number_words(gold))


def _substring(response: str, gold: str, question: str | None) -> bool:
    return " ".join(words(gold)) in " ".join(words(response))


def _any_order(response: str, gold: str, question: str | None) -> bool:
    return set(words(gold)) <= set(words(response))


METRICS: Mapping[str, Metric] = {
    "token_sequence": _token_sequence,
    "token_sequence_numbers": _token_sequence_numbers,
    "substring": _substring,
    "any_order": _any_order,
}


def _contains(haystack: Sequence[str], needle: Sequence[str]) -> bool:
    """Whether `needle`, not empty, is a contiguous run of `haystack`."""
    width = len(needle)
    return any(haystack[i : i + width] == needle for i in range(len(haystack) - width + 1))


def _after_echo(response: Sequence[str], question: Sequence[str]) -> Sequence[str]:
    return response[len(question) :] if response[: len(question)] == question else response


# Letters with a stroke or ligature that Unicode does not decompose.
_FOLDED = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"})


def normalise(text: str) -> str:
    """Compatibility-decomposed, case-folded, without accents: "Café" -> "cafe", "Straße" -> "strasse", "Ø" -> "o"."""
    # İ and a few others fold to a letter with a combining mark, and NFKD of what was folded can differ: once more.
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character)).translate(_FOLDED)


@lru_cache(maxsize=4096)  # several metrics look at the same response and golds
def words(text: str) -> tuple[str, ...]:
    """The normalised `\\w+` words of a text."""
    return tuple(re.findall(r"\w+", normalise(text)))


@lru_cache(maxsize=4096)
def number_words(text: str) -> tuple[str, ...]:
    """Like `words`, numbers in digits, a decimal number in one piece so that "3" is not found in "3.14"."""
    return tuple(re.findall(r"\d+(?:\.\d+)+|\w+", digits(normalise(text))))
