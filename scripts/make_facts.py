"""Write the built-in question set, src/palimpsest/data/facts/{train,heldout}.jsonl, from facts_tables.py.

    python scripts/make_facts.py

No question is picked by hand. The SHA-256 of what it is about (its entity: a country, an animal, a person, a word …)
decides whether it is held out, for all kinds alike, so that no entity occurs on both sides; another hash picks one of
the kind's phrasings, a third one the order. Two whole kinds, animal sounds and counting on, were dropped because
SmolLM2-135M-Instruct answered next to none of their training questions.

From text, greedy, in 24 new tokens, that model answers 40 % of the held-out questions: no sum and no past tense, but
60 to 80 % of the capitals, continents, languages, opposites and plurals.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facts_tables import GENERAL, KINDS, Kind

FOLDER = Path(__file__).resolve().parents[1] / "src" / "palimpsest" / "data" / "facts"
HELDOUT_SHARE = 0.22
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"


@dataclass(frozen=True)
class Fact:
    kind: str
    subject: str  # what is asked about
    entity: str  # the part of it that decides about being held out
    question: str
    answer: str
    golds: tuple[str, ...]


def all_facts() -> Iterator[Fact]:
    for kind in KINDS:
        for subject, *golds in entries(kind.table):
            yield make_fact(kind, subject, golds)
    for line in GENERAL.strip().splitlines():
        question, answer, golds_text = (cell.strip() for cell in line.split("|"))
        alternatives = tuple(gold.strip() for gold in golds_text.split("/"))
        yield Fact("general", question, normal(alternatives[0]), question, answer, alternatives)


def entries(table: str) -> Iterator[list[str]]:
    """[what is asked about, gold, other gold …] for every entry."""
    for entry in table.split(";"):
        subject, golds = entry.split("=")
        yield [" ".join(subject.split()), *(" ".join(gold.split()) for gold in golds.split("/"))]


def make_fact(kind: Kind, subject: str, golds: list[str]) -> Fact:
    x, z = (number_word(int(part)) if part.isdigit() else part for part in subject.partition(", ")[::2])
    if golds[0].isdigit():
        golds = number_golds(int(golds[0]))
    y = golds[0]
    golds = [gold for gold in golds if not (gold.startswith("the ") and gold[4:] in golds)]
    slots = {"x": x, "z": z, "y": y, "a_y": f"{'an' if y[0] in 'aeiou' else 'a'} {y}"}
    slots |= {"X": upper_first(x), "Y": upper_first(y), "Z": upper_first(z)}
    pair = "/".join(sorted([x, z or y]))
    entity = {"x": x, "z": z, "y": y, "xy": f"{kind.name} {pair}"}[kind.entity]
    question = kind.questions[int(fraction(f"phrasing {kind.name} {subject}") * len(kind.questions))]
    return Fact(
        kind.name,
        subject,
        normal(entity),
        question.format(**slots),
        kind.answer.format(**slots),
        tuple(golds),
    )


def number_word(number: int) -> str:
    if number < 20:
        return ONES.split()[number]
    tens, ones = divmod(number, 10)
    return TENS.split()[tens] + (f"-{number_word(ones)}" if ones else "")


def number_golds(number: int) -> list[str]:
    """The word first, then other ways to say or write the number."""
    if number < 100:
        return [number_word(number), str(number)]
    if number == 100:
        return ["one hundred", "a hundred", "100"]
    if number == 1000:
        return ["one thousand", "a thousand", "1000", "1,000"]
    hundreds, rest = divmod(number, 100)
    words = f"{number_word(hundreds)} hundred"
    return [f"{words} {number_word(rest)}", f"{words} and {number_word(rest)}", str(number)]


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def normal(entity: str) -> str:
    return re.sub(r"^(a|an|the) ", "", entity.lower())


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_of(fact: Fact) -> str:
    return "heldout" if fraction(f"entity {fact.entity}") < HELDOUT_SHARE else "train"


def rows(split: str) -> list[dict[str, Any]]:
    """The manifest lines of a split, in an order in which every beginning is a mixture of kinds."""
    facts = [fact for fact in all_facts() if split_of(fact) == split]
    facts.sort(key=lambda fact: fraction(f"order {fact.kind} {fact.question}"))
    return [
        {
            "id": f"facts-{split}-{number:04d}",
            "question": fact.question,
            "answer": fact.answer,
            "answers": list(fact.golds),
            "kind": fact.kind,
        }
        for number, fact in enumerate(facts, start=1)
    ]


def render(split: str) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        (FOLDER / f"{split}.jsonl").write_text(render(split), encoding="utf-8")
        print(f"{split}: {len(rows(split))} questions")
