from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from palimpsest.data.sources import FACTS, load_examples
from palimpsest.evaluation.scoring import score

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PALIMPSEST_TEST_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT / "scripts"))
import make_facts  # noqa: E402

SPLITS = ("train", "heldout")
EXAMPLES = {split: load_examples("facts", split) for split in SPLITS}
ALL = [example for split in SPLITS for example in EXAMPLES[split]]
COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
NUMBERS = {word: number for number, word in enumerate(COUNTED.split())}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize("split", SPLITS)
def test_the_committed_files_are_what_the_generator_makes(split: str) -> None:
    assert (FACTS / f"{split}.jsonl").read_text(encoding="utf-8") == make_facts.render(split)


def test_sizes_ids_and_kinds() -> None:
    assert len(EXAMPLES["train"]) >= 400
    assert len(EXAMPLES["heldout"]) >= 120
    assert EXAMPLES["heldout"][0].id == "facts-heldout-0001"
    assert len({example.id for example in ALL}) == len(ALL)
    kinds = {split: {example.kind for example in EXAMPLES[split]} for split in SPLITS}
    assert kinds["train"] == kinds["heldout"]
    assert len(kinds["train"]) > 20
    assert len({example.kind for example in EXAMPLES["heldout"][:60]}) > 15  # the order mixes the kinds


def test_no_entity_and_no_question_on_both_sides() -> None:
    entities: dict[str, set[str]] = {split: set() for split in SPLITS}
    for fact in make_facts.all_facts():
        entities[make_facts.split_of(fact)].add(fact.entity)
    assert not entities["train"] & entities["heldout"]
    assert not any(entity.startswith(("a ", "an ", "the ")) for group in entities.values() for entity in group)
    questions = [" ".join(words(example.question)) for example in ALL]
    assert len(set(questions)) == len(questions)

    # From the files alone: a country that is asked about on one side is no answer on the other.
    countries = {split: {e.answers[0] for e in EXAMPLES[split] if e.kind in ("city", "landmark")} for split in SPLITS}
    for split, other in (SPLITS, SPLITS[::-1]):
        asked = " ".join(e.question for e in EXAMPLES[split] if e.kind in ("capital", "continent", "currency"))
        assert not [country for country in countries[other] if re.search(rf"\b{country}\b", asked)]


def test_every_answer_scores_as_right_and_no_question_gives_it_away() -> None:
    for example in ALL:
        assert score(example.answer, example.answers, example.question)["token_sequence"], example
        assert not score(example.question, example.answers)["token_sequence"], example


def test_the_texts_are_short_sentences() -> None:
    for example in ALL:
        assert len(words(example.question)) <= 13, example  # speakable in about three seconds
        assert re.fullmatch(r"[A-Z][^{}=|;?]*\?", example.question), example
        assert re.fullmatch(r"[A-Z][^{}=|;?]*\.", example.answer), example


def test_sums_are_right() -> None:
    operations = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
    checked = 0
    for example in ALL:
        found = re.search(r"(\w+) (plus|minus|times) (\w+)\?", example.question)
        if found:
            left, operation, right = found.groups()
            assert example.answers[-1] == str(operations[operation](NUMBERS[left], NUMBERS[right]))
            checked += 1
    assert checked > 100


def test_number_words() -> None:
    assert make_facts.number_golds(7) == ["seven", "7"]
    assert make_facts.number_golds(40) == ["forty", "40"]
    assert make_facts.number_golds(88) == ["eighty-eight", "88"]
    assert make_facts.number_golds(366) == ["three hundred sixty-six", "three hundred and sixty-six", "366"]
    assert make_facts.number_golds(360)[0] == "three hundred sixty"


@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the development data is not at {SHARED}")
def test_nothing_that_llama_questions_asks_is_trained_on() -> None:
    """No question of the benchmark has the subject and the answer of a fact; nor is one word for word the same."""
    benchmark = load_examples(f"llama_questions:{SHARED / 'llama_questions'}", "test")
    asked = {" ".join(words(example.question)) for example in benchmark}
    for fact in make_facts.all_facts():
        assert " ".join(words(fact.question)) not in asked
        for example in benchmark:
            same_subject = set(words(fact.subject)) - {"a", "an", "the"} <= set(words(example.question))
            same_answer = {tuple(words(gold)) for gold in fact.golds} & {tuple(words(gold)) for gold in example.answers}
            assert not (same_subject and same_answer), (fact.question, example.question)
