"""English numbers in words, written in digits: "one hundred and five" -> "105", "twenty-first" -> "21st".

Works on normalised (lower-case, decomposed) text by three regular expressions, one per kind of number.
Words are joined across blanks and hyphens only, so the list "twenty, thirty" stays two numbers.

    cardinals   "two hundred and five" 205, "a hundred" 100, "1.5 million" 1500000, "1,000" 1000, "zero" 0
    ordinals    up to ninety-ninth: "twenty-first" 21st
    years       read in pairs: "nineteen forty-five" 1945, "nineteen oh five" 1905
    signs       "minus forty" -40, "negative 40" -40; "ten minus four" stays a subtraction

Not handled: fractions, "dozen", Roman numerals, ordinals above 99, decimals in words, "below zero". "one"
becomes 1 also where it is a pronoun.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal


def digits(text: str) -> str:
    """`text`, lower-case, with its numbers in digits; all other characters stay as they are."""
    text = _GROUPED.sub(lambda match: match[0].replace(",", ""), text)
    text = _ORDINAL.sub(_ordinal_digits, text)
    text = _YEAR.sub(_year_digits, text)
    text = _CARDINAL.sub(lambda match: f"{_value(match[0]).normalize():f}", text)
    return _MINUS.sub("-", text)


def _table(words: str, first: int, step: int = 1) -> dict[str, int]:
    return {word: first + step * i for i, word in enumerate(words.split())}


_UNITS = _table("one two three four five six seven eight nine", 1)
_TEENS = _table(
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
    10,
)
_TENS = _table("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10)
_TENS["fourty"] = 40  # a common misspelling; a gold answer of Llama Questions has it
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_VALUES = {"zero": 0, "oh": 0, "o": 0, "a": 1, **_UNITS, **_TEENS, **_TENS}
_ORDINAL_UNITS = _table("first second third fourth fifth sixth seventh eighth ninth", 1)
_ORDINAL_REST = {
    **_table("tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth", 10),
    **_table("seventeenth eighteenth nineteenth", 17),
    **_table("twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth", 20, 10),
}


def _any(*tables: Mapping[str, int]) -> str:
    return "(?:" + "|".join(word for table in tables for word in table) + r")\b"


_SEP = r"(?:\s+|\s*[-\u2010]\s*)"  # NFKD turns a non-breaking hyphen into U+2010
_AND = rf"{_SEP}(?:and{_SEP})?"
_NUMERAL = r"(?<!\d\.)\d+(?:\.\d+)?\b"  # the 1.5 of "1.5 million"
_BELOW_100 = rf"(?:{_any(_TENS)}(?:{_SEP}{_any(_UNITS)})?|{_any(_TEENS, _UNITS)})"
# In "between one hundred and two hundred" the "and" joins two numbers, hence the look-ahead.
_HUNDREDS = rf"(?:(?:{_BELOW_100}|{_NUMERAL}|a){_SEP})?hundred\b(?:{_AND}{_BELOW_100}(?!{_SEP}hundred\b))?"
_BELOW_1000 = rf"(?:{_HUNDREDS}|{_BELOW_100})"
_SCALED = (
    rf"(?:(?:{_BELOW_1000}|{_NUMERAL}|a){_SEP})?{_any(_SCALES)}"
    rf"(?:{_AND}{_BELOW_1000}{_SEP}{_any(_SCALES)})*(?:{_AND}{_BELOW_1000})?"
)
_CARDINAL = re.compile(rf"\b(?:{_SCALED}|{_BELOW_1000}|zero\b)")
_CENTURY = _any({word: value for word, value in _TEENS.items() if value > 10}, {"twenty": 20})
_YEAR = re.compile(
    rf"\b(?P<century>{_CENTURY}){_SEP}"
    rf"(?P<rest>{_any(_TENS)}(?:{_SEP}{_any(_UNITS)})?|{_any(_TEENS)}|oh?{_SEP}{_any(_UNITS)})"
)
_ORDINAL = re.compile(
    rf"\b(?:(?:(?P<tens>{_any(_TENS)}){_SEP})?(?P<unit>{_any(_ORDINAL_UNITS)})|(?P<rest>{_any(_ORDINAL_REST)}))"
)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")  # "1,000", not "1,00"
_MINUS = re.compile(r"(?<!\d )\b(?:minus|negative)\s+(?=\d)")
_PART = re.compile(r"\d+(?:\.\d+)?|[a-z]+")


def _value(phrase: str) -> Decimal:
    """The value of a cardinal phrase: "hundred" multiplies what stands before it, a scale closes a group."""
    total, group = Decimal(0), Decimal(0)
    for part in _PART.findall(phrase):
        if part in _SCALES:
            total, group = total + (group or Decimal(1)) * _SCALES[part], Decimal(0)
        elif part == "hundred":
            group = (group or Decimal(1)) * 100
        elif part in _VALUES:
            group += _VALUES[part]
        elif part != "and":
            group += Decimal(part)
    return total + group


def _year_digits(match: re.Match[str]) -> str:
    return f"{_value(match['century']) * 100 + _value(match['rest'])}"


def _ordinal_digits(match: re.Match[str]) -> str:
    value = _ORDINAL_REST[match["rest"]] if match["rest"] else _ORDINAL_UNITS[match["unit"]]
    value += _TENS[match["tens"]] if match["tens"] else 0
    suffix = "th" if value in range(10, 21) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value}{suffix}"
