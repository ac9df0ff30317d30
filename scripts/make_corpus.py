"""Make the spoken training corpus of the shipped speech LLM.

    python scripts/make_corpus.py --web-questions FOLDER --instructions FOLDER --out corpus

| set | text from | licence | spoken |
|---|---|---|---|
| questions | WebQuestions, train and val: FOLDER/trainmodel.json, val.json | CC-BY 4.0 | twice, two voices |
| questions | facts, train (built in, written for this project) | as this project | twice, two voices |
| questions | instructions without input: FOLDER/alpaca_en_demo.json, alpaca_eval_gpt4.json | Apache-2.0 | once |
| sentences | sentences of the answers in the same two files: to be repeated, not answered | Apache-2.0 | once |

WebQuestions is written in lower case; names get their capitals back from the answers and the instructions
(`Truecaser`), so that a word has one spelling. Questions that Llama Questions or the tests of WebQuestions and facts
also ask are left out. OUT holds `questions.jsonl` and `sentences.jsonl` (manifests), `audio/` (FLAC) and `sources.json`
(counts, licences).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palimpsest.data.examples import Example, write_manifest
from palimpsest.data.sources import load_examples
from palimpsest.data.speech import speak_several
from palimpsest.files import write_json

NEURAL = ["hibari", "hibari@0.9", "hibari@1.15", "hibari@1.3"]
FORMANT = [
    "espeak-ng:en-us",
    "espeak-ng:en-us+m3",
    "espeak-ng:en-us+f2",
    "espeak-ng:en-us+m7@0.85",
    "espeak-ng:en-us@1.2",
]
MIXED = [*NEURAL, *FORMANT[1:3]]
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9' ,;:?!.-]*[.?!]?")  # what every voice reads as written
INSTRUCTION_WORDS = range(3, 26)
SENTENCE_WORDS = range(4, 19)


def main() -> None:
    arguments = parse_arguments()
    instructions = [
        row
        for name in ("alpaca_en_demo.json", "alpaca_eval_gpt4.json")
        for row in json.loads((arguments.instructions / name).read_text(encoding="utf-8"))
    ]
    web = {
        split: json.loads((arguments.web_questions / f"{split}.json").read_text(encoding="utf-8"))
        for split in ("trainmodel", "val", "test")
    }
    truecaser = Truecaser(
        [row["output"] for row in instructions]
        + [answer for rows in web.values() for row in rows for answer in row["answers"]]
    )
    asked_in_tests = {words(question) for question in test_questions(web["test"], arguments.llama_questions)}

    questions = [
        *unique(web_examples([*web["trainmodel"], *web["val"]], truecaser), asked_in_tests),
        *unique(load_examples("facts", "train"), asked_in_tests),
    ]
    asked = unique(instruction_examples(instructions), asked_in_tests | {words(e.question) for e in questions})
    sentences = unique(sentence_examples(instructions), asked_in_tests)

    twice = [[replace(e, id=f"{e.id}-{mark}") for e in questions] for mark in ("a", "b")]
    groups = [(twice[0], NEURAL), (twice[1], FORMANT), (asked, MIXED), (sentences, MIXED)]
    if arguments.limit is not None:
        groups = shares(groups, arguments.limit)
    spoken = speak_several(groups, arguments.out / "audio", workers=arguments.workers, progress=show)
    write_manifest(arguments.out / "questions.jsonl", [e for group in spoken[:3] for e in group])
    write_manifest(arguments.out / "sentences.jsonl", spoken[3])
    write_json(arguments.out / "sources.json", describe([e for group in spoken for e in group]))
    print(f"\n{sum(map(len, spoken))} utterances in {arguments.out}")


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------
def web_examples(rows: Iterable[dict[str, Any]], truecaser: Truecaser) -> Iterator[Example]:
    for row in rows:
        answers = tuple(answer.strip() for answer in row["answers"] if answer.strip())
        if answers:
            yield Example(row["qId"], truecaser(row["qText"]), answers, answers[0], kind="webquestions")


def instruction_examples(rows: Iterable[dict[str, Any]]) -> Iterator[Example]:
    for i, row in enumerate(rows):
        text = " ".join(row["instruction"].split())
        if row.get("input") or len(text.split()) not in INSTRUCTION_WORDS or not PLAIN.fullmatch(text):
            continue
        answer = row["output"].strip()
        if answer:
            yield Example(f"instruction-{i:04d}", text, (answer,), answer, kind="instructions")


def sentence_examples(rows: Iterable[dict[str, Any]]) -> Iterator[Example]:
    """Sentences of the answers, without list marks; the sentence is question and answer alike: it is to be repeated."""
    n = 0
    for row in rows:
        for line in row["output"].replace("’", "'").replace("*", "").splitlines():
            text = re.sub(r"^\s*(\d+[.)]|[-•]|[A-Za-z]\))\s*", "", line).strip()
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
                if len(sentence.split()) in SENTENCE_WORDS and PLAIN.fullmatch(sentence) and sentence[-1] in ".!?":
                    yield Example(f"sentence-{n:05d}", sentence, (sentence,), sentence, kind="sentences")
                    n += 1


def test_questions(web_test: Iterable[dict[str, Any]], llama_questions: Path | None) -> Iterator[str]:
    yield from (row["qText"] for row in web_test)
    yield from (example.question for example in load_examples("facts", "heldout"))
    if llama_questions is not None:
        with llama_questions.open(encoding="utf-8", newline="") as file:
            yield from (row["Questions"] for row in csv.DictReader(file, delimiter="\t"))


def unique(examples: Iterable[Example], taken: Iterable[tuple[str, ...]]) -> list[Example]:
    """Examples whose words, case and punctuation aside, are not among `taken` nor come twice."""
    seen, kept = set(taken), []
    for example in examples:
        key = words(example.question)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


class Truecaser:
    """Each word in the spelling that `texts` have for it most often inside a sentence; unknown words as they are."""

    def __init__(self, texts: Iterable[str]) -> None:
        spellings: dict[str, Counter[str]] = {}
        for text in texts:
            # An answer of a few words is a name: its first word counts too. In a sentence it proves nothing.
            found = re.findall(r"[A-Za-z][A-Za-z']*|[.!?\n]", text)
            start = len(found) > 6
            for token in found:
                if token in ".!?\n":
                    start = True
                    continue
                if not start:
                    spellings.setdefault(token.lower(), Counter())[token] += 1
                start = False
        self._best = {word: counts.most_common(1)[0][0] for word, counts in spellings.items()}
        self._best["i"] = "I"

    def __call__(self, text: str) -> str:
        cased = re.sub(r"[A-Za-z][A-Za-z']*", lambda found: self._word(found[0]), text.strip())
        return cased[:1].upper() + cased[1:]

    def _word(self, word: str) -> str:
        stem, apostrophe, rest = word.partition("'")
        return self._best.get(word.lower()) or self._best.get(stem.lower(), stem) + apostrophe + rest


# ---------------------------------------------------------------------------------------------------------------------
def shares(groups: Sequence[tuple[list[Example], list[str]]], limit: int) -> list[tuple[list[Example], list[str]]]:
    """About `limit` examples in all, of each group the same share, at random."""
    share = min(1.0, limit / sum(len(examples) for examples, _ in groups))
    return [(random.Random(0).sample(examples, round(share * len(examples))), voices) for examples, voices in groups]


def describe(examples: Iterable[Example]) -> list[dict[str, Any]]:
    """How many utterances of each kind in each voice."""
    licences = {"webquestions": "CC-BY 4.0", "instructions": "Apache-2.0", "sentences": "Apache-2.0"}
    counts = Counter((example.kind if example.kind in licences else "facts", example.voice) for example in examples)
    return [
        {"kind": kind, "voice": voice, "utterances": n, "licence": licences.get(str(kind), "as this project")}
        for (kind, voice), n in sorted(counts.items(), key=str)
    ]


def show(done: int, total: int) -> None:
    print(f"\r{done}/{total} spoken", end="", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--web-questions", type=Path, required=True, help="folder of trainmodel.json, val.json, test.json"
    )
    parser.add_argument("--instructions", type=Path, required=True, help="folder of the two instruction files")
    parser.add_argument("--llama-questions", type=Path, help="the benchmark's .tsv: its questions are left out")
    parser.add_argument("--limit", type=int, help="about so many utterances, the same share of each set at random")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
