"""The base's own answers: where a cut one ends, which examples are left out, and a study that trains on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest import parallel
from palimpsest.config import parse_config
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.evaluation.own_answers import learned, questions_of, to_last_sentence_end
from palimpsest.evaluation.own_text import read_own_text
from palimpsest.files import UserError, hash_value, read_json, read_jsonl
from palimpsest.models.loss import supervised_losses
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.progress import Reporter
from palimpsest.rundir import Step
from palimpsest.study import steps
from palimpsest.study.run import Study, steps_of
from palimpsest.study.workspace import Workspace
from ranks import find_each_other, start_ranks
from tiny import tiny_llama, tiny_speech_lm, tiny_tokenizer
from tiny_study import write_inputs


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It is Paris. The city lies on the", "It is Paris."),
        ("It is Paris.", "It is Paris."),
        ("Is it? Yes! And", "Is it? Yes!"),
        ('He said "no." Then', 'He said "no."'),
        ("It is 3.14 and", ""),  # no blank behind the point
        ("It is about 3.", ""),  # the text may go on with a digit
        ("It was in 1999. Then", "It was in 1999."),
        ("Three things:\n1. Bread is baked.\n2. Wi", "Three things:\n1. Bread is baked."),
        ("Three things:\n1. Bread\n2.", ""),
        ("Wait... what", "Wait..."),
        ("\u6771\u4eac\u3067\u3059\u3002\u305d\u308c", "\u6771\u4eac\u3067\u3059\u3002"),
        ("no end at all", ""),
        ("", ""),
    ],
)
def test_the_last_sentence_end(text: str, kept: str) -> None:
    assert to_last_sentence_end(text) == kept


def row(question: str, response: str, **more: Any) -> Any:
    return {"question": question, "response": response, "cut": False, "empty": not response, "failed": False, **more}


def example(name: str, question: str, **more: Any) -> Example:
    return Example(name, question, ("gold",), "The gold.", Path(f"{name}.wav"), **more)


def test_copies_share_an_answer_and_what_teaches_no_end_is_left_out() -> None:
    examples = [
        example("a", "A?"),
        example("b", "B?"),
        example("c", "C?"),
        example("d", "D?"),
        example("e", "E?"),
        Example("f", "F?", ("\u2603",), "\u2603"),  # which no rule can score
        example("a~1", "A?", augmentation="speed=1.1"),
    ]
    asked = questions_of(examples)
    assert [it.id for it in asked] == ["a", "b", "c", "d", "e"]
    assert {it.audio for it in asked} == {None}
    rows = [
        row("A?", "It is. And th", cut=True),
        row("B?", "Bee"),
        row("C?", "no end", cut=True),
        row("D?", ""),
        row("E?", "", failed=True, empty=False),
    ]
    processor = SpeechLMProcessor(tiny_tokenizer(), None)
    found = learned(examples, rows, processor)
    assert [(it.id, it.answer, it.answers) for it in found.examples] == [
        ("a", "It is.", ("gold",)),
        ("b", "Bee", ("gold",)),
        ("a~1", "It is.", ("gold",)),
    ]
    assert [it.audio for it in found.examples] == [Path(f"{name}.wav") for name in ("a", "b", "a~1")]
    left_out = {
        "cut before the end of a sentence": ["c"],
        "empty answer": ["d"],
        "not answered": ["e"],
        "no gold answer with a letter or digit": ["f"],
    }
    assert found.left_out == left_out
    assert found.to_json() == {
        "n_answers": 5,
        "n_cut": 2,
        "n_examples": 3,
        "n_left_out": dict.fromkeys(left_out, 1),
        "left_out": left_out,
    }
    assert str(found).startswith("4 of 7 examples are left out of own answers: 1 cut before the end of a sentence, ")
    with pytest.raises(UserError, match=r"leave no example to train on .*1 cut before .*or set answers to gold"):
        learned(examples[2:3], rows, processor)


# ---------------------------------------------------------------------------------------------------------------------
# A study
# ---------------------------------------------------------------------------------------------------------------------
SAYS = {"A": "Yes. Certainly", "B": "No", "C": "Nevertheless"}  # with 8 tokens, one byte each: cut, whole, cut
LEARNED = {"A": "Yes.", "B": "No"}
METHODS = ("both", "wiki", "more")
WIKI = "\n\n".join(f"Paragraph {i} says {'that ' * i}." for i in range(6))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, of which the language model has learned to say what SAYS has; noise for speech."""
    questions = [f"{kind}{i}?" for i in range(4) for kind in SAYS]
    splits = {
        split: [(question, f"It is {i}.") for i, question in enumerate(chosen)]
        for split, chosen in (("train", questions), ("heldout", ["A9?", "B9?"]))
    }
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), splits, lambda i: 6_400 + 800 * (i % 3))
    (folder / "wiki.txt").write_text(WIKI)
    model, processor = tiny_speech_lm()
    said = [Example(f"q{i}", q, ("x",), SAYS[q[0]]) for i, q in enumerate(questions)]
    batch = Collator(processor, "text")(said)
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=1e-2)
    for _ in range(60):
        supervised_losses(model.language_model, batch)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.language_model.save_pretrained(folder / "llm")
    return folder


def recipe(inputs: Path, **changes: Any) -> dict[str, Any]:
    heldout = {"source": str(inputs / "heldout.jsonl"), "split": "heldout"}
    both = {"kind": "full", "learning_rate": 1e-3}
    return {
        "name": "tiny",
        "models": {"language_model": str(inputs / "llm"), "encoder": str(inputs / "whisper"), "compute": "float32"},
        "speech": {"adaptor_hidden_size": 24},
        "data": {"train": {"source": str(inputs / "train.jsonl"), "split": "train"}, "heldout": heldout},
        "methods": {
            "both": {**both, "answers": "own", "replay": {"share": 0.5, "n_texts": 3, "new_tokens": 6}},
            "wiki": {**both, "replay": {"share": 0.25, "text": str(inputs / "wiki.txt"), "window": 12}},
            "more": {**both, "replay": {"share": 0.25, "n_texts": 2, "new_tokens": 9}},
        },
        "training": {"epochs": 1, "batch_size": 4, "warmup_ratio": 0},
        "evaluation": {"tasks": [{"name": "numbers", **heldout}], "max_new_tokens": 8, "probe": False},
        **changes,
    }


def workspace(inputs: Path, folder: Path, **changes: Any) -> Workspace:
    return Workspace(parse_config(recipe(inputs, **changes), "test"), folder, Reporter(1, quiet=True))


def trained(ws: Workspace) -> Path:
    """The study up to the models that it trains: what measures them is tested elsewhere."""
    ws.path.mkdir(exist_ok=True)
    if parallel.is_main():
        steps.check(ws)
    parallel.wait_for_all()
    for step in (steps.data, steps.features, steps.own_answers, steps.replay_text):
        step(ws)
    for name in ws.config.runs:
        steps.train(ws, name)
    return ws.path


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(workspace(inputs, tmp_path_factory.mktemp("run")))


def test_what_the_base_says_is_stored_and_learned(finished: Path, inputs: Path) -> None:
    rows = read_jsonl(finished / "base" / "own_answers" / "answers.jsonl")
    assert {line["question"][0]: (line["response"], line["cut"]) for line in rows} == {
        "A": ("Yes. Cer", True),
        "B": ("No", False),
        "C": ("Neverthe", True),
    }
    assert len(rows) == 12
    about = read_json(finished / "base" / "own_answers" / "left_out.json")
    assert (about["n_answers"], about["n_cut"], about["n_examples"]) == (12, 8, 8)
    assert about["n_left_out"] == {"cut before the end of a sentence": 4}
    ws = workspace(inputs, finished)
    own, gold = ws.training_examples("both"), ws.training_examples("wiki")
    assert {(it.question[0], it.answer) for it in own} == set(LEARNED.items())
    assert [it.answers for it in own] == [it.answers for it in gold if it.question[0] != "C"]
    assert len(gold) == 12


def test_the_rows_that_are_replayed(finished: Path, inputs: Path) -> None:
    """Of the base's own text, sampled once for both methods, each takes its number, length and kinds."""
    ws = workspace(inputs, finished)
    texts = read_own_text(finished / "base" / "replay_text" / "replay_text.jsonl")
    assert texts is not None
    assert [text.id for text in texts] == [f"{kind}-{i}" for kind in ("plain", "chat") for i in range(3)]
    assert max(len(text.ids) for text in texts) == 9
    for name, n, most in (("both", 3, 6), ("more", 2, 9)):
        replay = ws.config.methods[name].replay
        assert replay is not None
        rows = {row.id: row for row in ws.replay_rows(replay)}
        chosen = [text for text in texts if int(text.id[-1]) < n]
        assert list(rows) == [text.id for text in chosen]
        for text in chosen:
            assert (rows[text.id].context, rows[text.id].tokens) == (text.prompt_ids, text.ids[:most])
    source = ws.config.methods["wiki"].replay
    assert source is not None
    rows_of_text = ws.replay_rows(source)
    assert max(map(len, rows_of_text)) == 12
    # Every byte of every paragraph is learned once, after the end of a text or the byte before it.
    joined: dict[str, list[int]] = {}
    for found in rows_of_text:
        name = found.id.partition("/")[0]
        assert found.context == (tuple(joined[name][-1:]) if name in joined else (3,))
        joined.setdefault(name, []).extend(found.tokens)
    tokenizer = tiny_tokenizer()
    assert [tokenizer.decode(ids) for ids in joined.values()] == WIKI.split("\n\n")


def test_the_steps_are_counted_and_the_text_can_be_told(finished: Path, inputs: Path) -> None:
    curves = {name: read_json(finished / "methods" / name / "checkpoint" / "training.json") for name in METHODS}
    replayed = {name: [line["replayed"] for line in curves[name]] for name in METHODS}
    # Eight own answers and twelve gold ones in batches of four, and between them a batch of text for each, or one.
    assert replayed == {"both": [0, 1, 0, 1], "wiki": [0, 0, 1, 0], "more": [0, 0, 1, 0]}
    assert ["loss_replayed" in line for line in curves["more"]] == [False, False, True, False]
    done = [getattr(step, "func", step).__name__ for step in steps_of(parse_config(recipe(inputs), "test"))]
    assert done.index("own_answers") < done.index("replay_text") < done.index("train")


def test_other_text_or_answers_train_anew_and_nothing_else_does(
    finished: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprints(**changes: Any) -> dict[str, str]:
        """Of the steps up to training, none of which is made."""
        ws = workspace(inputs, finished, **changes)

        def look(name: str, made_by: Any, made_of: Any, write: Any, together: bool = False) -> None:
            ws.done.append(Step(name, finished / name, hash_value(made_of), skipped=True))

        monkeypatch.setattr(ws, "step", look)
        for step in (steps.data, steps.features, steps.own_answers, steps.replay_text):
            step(ws)
        for name in ws.config.runs:
            steps.train(ws, name)
        return {step.name: step.fingerprint for step in ws.done}

    def differ(**changes: Any) -> set[str]:
        return {name for name, found in fingerprints(**changes).items() if found != before[name]}

    before = fingerprints()
    assert differ() == set()
    given = recipe(inputs)
    assert differ(data={**given["data"], "answers": "own"}) == {"methods/wiki/checkpoint", "methods/more/checkpoint"}
    given["methods"]["more"]["replay"]["n_texts"] = 4
    text = {"base/replay_text", "methods/both/checkpoint", "methods/more/checkpoint"}
    assert differ(methods=given["methods"]) == text
    (inputs / "wiki.txt").write_text(WIKI + " And more.")
    assert differ() == {"methods/wiki/checkpoint"}
    (inputs / "wiki.txt").write_text(WIKI)


def test_bad_text_is_an_error_before_the_work(inputs: Path, tmp_path: Path) -> None:
    def check(**changes: Any) -> None:
        given = recipe(inputs)
        given["methods"]["wiki"]["replay"] = {"share": 0.25, **changes}
        Study(parse_config(given, "test"), tmp_path / "run", Reporter(1, quiet=True)).check()

    check(text=str(inputs / "wiki.txt"))
    with pytest.raises(UserError, match=r"The text '.*none.txt' does not exist"):
        check(text=str(inputs / "none.txt"))
    (inputs / "short.txt").write_text("One.\n\nTwo.\n\nThree.")
    with pytest.raises(UserError, match=r"replay has 3 rows of text and training.batch_size is 4"):
        check(text=str(inputs / "short.txt"))
    with pytest.raises(UserError, match=r"replay.window is 4000 tokens, and .* has 2048 positions"):
        check(text=str(inputs / "wiki.txt"), window=4000)
    tokens = parse_config(recipe(inputs, training={"batch_size": 20}), "test")
    with pytest.raises(UserError, match=r"replay has 6 rows of text and training.batch_size is 20"):
        Study(tokens, tmp_path / "run", Reporter(1, quiet=True)).check()


def test_a_base_without_an_end_leaves_nothing(inputs: Path, tmp_path: Path) -> None:
    """Random weights write without an end."""
    tiny_llama(eos_token_id=3).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    models = {**recipe(inputs)["models"], "language_model": str(tmp_path / "llm")}
    with pytest.raises(UserError, match="own answers leave no example to train on"):
        trained(workspace(inputs, tmp_path / "run", models=models))


WRITTEN = ("own_answers/learned.jsonl", "own_answers/left_out.json", "replay_text/replay_text.jsonl")


def work(rank: int, port: int, inputs: str, folder: str) -> None:
    find_each_other(rank, port, 2)
    os.environ["LOCAL_RANK"] = str(rank)
    with parallel.joined():
        trained(workspace(Path(inputs), Path(folder)))


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(finished: Path, inputs: Path, tmp_path: Path) -> None:
    start_ranks(work, str(inputs), str(tmp_path / "run"), world=2)
    for name in WRITTEN:
        assert (tmp_path / "run" / "base" / name).read_bytes() == (finished / "base" / name).read_bytes(), name
    for name in METHODS:
        ranks, one = (
            read_json(run / "methods" / name / "checkpoint" / "training.json") for run in (tmp_path / "run", finished)
        )
        assert [line["loss"] for line in ranks] == pytest.approx([line["loss"] for line in one], rel=1e-3)
