"""Is an answer right? Four deterministic rules, so that an accuracy can be compared with anyone else's.

    token_sequence          the words of a gold answer stand in the response, adjacent and in order
    token_sequence_numbers  the same after number words became digits: "twenty-one" is "21" (number_words.py)
    substring               the characters of a gold answer stand in the response: "Au" is in "author"
    any_order               every word of a gold answer stands somewhere in the response

Text is first decomposed (NFKD), lower-cased, stripped of accents and cut into words. Scripts that are written
without blanks (Chinese, Japanese, Thai, Khmer, Lao, Burmese) are cut into characters: there each one is a word. A
minus sign belongs to its number: "-40" is not "40".

The last two rules are how other harnesses score and look at the whole response. The first two leave out a
verbatim copy of the question at its start, so that a model that only repeats "Which is larger, the sun or
the moon?" is not right.

What none of these rules can see: negation ("not Paris"), hedging ("Paris or London"), inflection ("bee",
"bees"), aliases ("U.S.", "United States"), reordered dates, what the gold stands beside ("November comes after
December"). tests/evaluation_scoring_cases.jsonl lists such
cases, each with a human verdict and the rules that get it wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from palimpsest.evaluation.number_words import digits
from palimpsest.files import UserError

METRIC_VERSION = "4"  # raised whenever any verdict can change
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
    """Characters of a script without blanks stay in their order, as the letters of a word do: 京东 is not 東京."""
    return all(_contains(words(response), words(written)) for written in _WRITTEN.findall(_signed(normalise(gold))))


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


# ---------------------------------------------------------------------------------------------------------------------
# Characters
# ---------------------------------------------------------------------------------------------------------------------
# Letters with a stroke or ligature that Unicode does not decompose.
_FOLDED = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th"})
# Scripts written without blanks between words, as the inside of a regular expression's [ ]: Chinese and Japanese, then
# Thai, Lao, Burmese, Khmer and their neighbours. Korean has blanks.
_NO_BLANKS = (
    "\u3005-\u3007\u3031-\u3035\u3041-\u309f\u30a0-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\U00020000-\U000323af"
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aad\ua9e0-\ua9fe\uaa60-\uaadf"
)
# Latin and Greek:
_ACCENTED = re.compile("[\u0000-\u03ff\u1d00-\u1dbf\u1e00-\u1fff\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f]")
_POINTED = re.compile("[\u0590-\u06ff\u0750-\u077f\u0870-\u08ff]")  # Hebrew, Arabic
_CYRILLIC = re.compile("[\u0400-\u052f\u1c80-\u1c8f\ua640-\ua69f]")
_STRESS = {"\u0300", "\u0301"}


def normalise(text: str) -> str:
    """Compatibility-decomposed, case-folded, without accents: "Café" -> "cafe", "Straße" -> "strasse", "Ø" -> "o".

    An underscore, Markdown's emphasis, is a blank. A mark that makes another letter stays (か and が, и and й, the
    vowel signs of Hindi and Thai); what has no width, such as a soft hyphen, goes.
    """
    # İ and a few others fold to a letter with a combining mark, and NFKD of what was folded can differ: once more.
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold()).replace("_", " ")
    if decomposed.isascii():
        return decomposed
    kept, base = [], ""
    for character in decomposed:
        category = unicodedata.category(character)
        if category == "Cf" and character != "\u200b":  # no width; U+200B is a blank between words
            continue
        if not category.startswith("M"):
            base = character
        elif not _makes_a_letter(base, character):
            continue
        kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept)).translate(_FOLDED)


def _makes_a_letter(base: str, mark: str) -> bool:
    """Whether base and mark are another letter than the base, and not the same with an accent or an optional vowel."""
    if not base.isalpha() or _ACCENTED.match(base) or _POINTED.match(base):
        return False
    if 0xFE00 <= ord(mark) <= 0xFE0F or 0xE0100 <= ord(mark) <= 0xE01EF:  # the same character in another shape
        return False
    if _CYRILLIC.match(base):
        return mark not in _STRESS and (base, mark) != ("е", "\u0308")  # ё is mostly written е
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------
_MARKS = "".join(chr(i) for i in range(0x300, 0xFE30) if unicodedata.category(chr(i)).startswith("M"))
_CHARACTER = rf"(?=\w)[{_NO_BLANKS}][{_MARKS}]*"  # of a script without blanks, with its marks
_LETTERS = rf"(?:(?![{_NO_BLANKS}])\w[{_MARKS}]*)+"
_SIGN = "\u2212"
_WORD = re.compile(rf"{_CHARACTER}|{_SIGN}?{_LETTERS}")
_NUMBER_OR_WORD = re.compile(rf"{_SIGN}?\d+(?:\.\d+)+|{_WORD.pattern}")
_WRITTEN = re.compile(rf"(?:{_CHARACTER})+|{_SIGN}?{_LETTERS}")  # between blanks, or as if there were some
# A sign stands at its number and behind no word, number or other dash: not in "1939-45", "5 - 3", "covid-19", "--3".
_DASH = "[-\u2010\u2012\u2013\u2212]"
_DASHES = re.compile(rf"(?P<sign>(?<![^\W{_NO_BLANKS}])(?<!{_DASH}){_DASH}[$€£¥]?(?=\d))|{_DASH}")


def _signed(text: str) -> str:
    """Minus signs as U+2212 before their number; all other dashes are blanks."""
    return _DASHES.sub(lambda match: _SIGN if match["sign"] else " ", text)


@lru_cache(maxsize=4096)  # several metrics look at the same response and golds
def words(text: str) -> tuple[str, ...]:
    """The normalised words of a text: letters and digits in a row, or one character of a script without blanks.

    A number has its sign, as U+2212.
    """
    return tuple(_WORD.findall(_signed(normalise(text))))


@lru_cache(maxsize=4096)
def number_words(text: str) -> tuple[str, ...]:
    """Like `words`, numbers in digits, a decimal number in one piece so that "3" is not found in "3.14"."""
    return tuple(_NUMBER_OR_WORD.findall(_signed(digits(normalise(text)))))
