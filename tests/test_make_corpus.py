"""The texts of the spoken training corpus: capitals, sentences, nothing that the tests ask."""

from __future__ import annotations

import sys
from pathlib import Path

from palimpsest.data.examples import Example

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_corpus as corpus


def test_names_get_their_capitals_from_inside_sentences_and_from_names() -> None:
    truecase = corpus.Truecaser(["Jamaican Creole", "They say that people in Paris like the Seine. People walk."])
    assert truecase("what does jamaican people speak?") == "What does Jamaican people speak?"
    assert truecase("the seine in paris") == "The Seine in Paris"
    assert truecase("who am i") == "Who am I"
    assert truecase("where is oslo") == "Where is oslo"  # never seen: left as it is


def test_the_word_that_starts_a_sentence_proves_nothing() -> None:
    truecase = corpus.Truecaser(["Apples are good for you and me. Apples are red. She said that apples grow on trees."])
    assert truecase("why are apples red") == "Why are apples red"


def test_possessives_follow_their_name() -> None:
    assert corpus.Truecaser(["Barack Obama"])("who is obama's wife") == "Who is Obama's wife"


def test_sentences_are_whole_and_plain() -> None:
    steps = (
        "1. **Boil the water** for ten minutes. Too short. Use x = y + 2 in the code.\n- Then drain it well, and serve!"
    )
    rows = [{"output": steps}]
    found = [example.question for example in corpus.sentence_examples(rows)]
    assert found == ["Boil the water for ten minutes.", "Then drain it well, and serve!"]


def test_instructions_with_input_or_markup_are_left_out() -> None:
    rows = [
        {"instruction": "Name three primary colors.", "output": "Red, blue, yellow."},
        {"instruction": "Summarise this text.", "input": "a text", "output": "b"},
        {"instruction": "Evaluate f(x) = 2x for x = 3.", "output": "6"},
        {"instruction": "Name a river.", "output": "  "},
    ]
    assert [e.question for e in corpus.instruction_examples(rows)] == ["Name three primary colors."]


def test_what_a_test_asks_is_no_training_question() -> None:
    asked = {corpus.words("what is the capital of france")}
    examples = [
        Example("1", "What is the capital of France?", ("Paris",), "Paris"),
        Example("2", "Who wrote Hamlet?", ("Shakespeare",), "Shakespeare"),
        Example("3", "who wrote hamlet", ("Shakespeare",), "Shakespeare"),
    ]
    assert [e.id for e in corpus.unique(examples, asked)] == ["2"]


def test_a_smaller_corpus_has_the_same_share_of_each_set() -> None:
    examples = [Example(str(i), f"{i}?", ("a",), "a") for i in range(100)]
    groups = [(examples[:80], ["one"]), (examples[80:], ["two"])]
    (many, _), (few, voices) = corpus.shares(groups, 25)
    assert (len(many), len(few), voices) == (20, 5, ["two"])
    assert len({example.id for example in many}) == 20
    assert {example.id for example in many} <= {example.id for example in examples[:80]}
    assert [len(found) for found, _ in corpus.shares(groups, 1000)] == [80, 20]
