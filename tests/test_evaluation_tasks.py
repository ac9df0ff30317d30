from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from palimpsest.commands.evaluate import load_task, task_name
from palimpsest.data.examples import Example
from palimpsest.evaluation.tasks import Task, text_version
from palimpsest.files import UserError

PARIS = Example("q1", "What is the capital of France?", ("Paris",), "Paris")
ROME = Example("q2", "What is the capital of Italy?", ("Rome",), "Rome", audio=Path("audio/rome.flac"))


def test_a_manifest_becomes_a_task(tmp_path: Path) -> None:
    manifest = tmp_path / "capitals.jsonl"
    rows = [{"id": e.id, "question": e.question, "answers": list(e.answers)} for e in (PARIS, ROME)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(manifest))
    assert task.name == "capitals"
    assert [e.id for e in task.examples] == ["q1", "q2"]
    assert load_task(f"manifest:{manifest}").name == "capitals"
    assert load_task(str(manifest), name="mine", limit=1) == Task("mine", task.examples[:1])


def test_the_version_follows_everything_an_answer_depends_on() -> None:
    task = Task("t", (PARIS, ROME))
    others = [
        replace(task, examples=(ROME, PARIS)),
        replace(task, examples=(PARIS,)),
        replace(task, examples=(replace(PARIS, question="Capital of France?"), ROME)),
        replace(task, examples=(replace(PARIS, answers=("Paris", "Lutetia")), ROME)),
        replace(task, examples=(replace(PARIS, audio=Path("paris.flac")), ROME)),
        replace(task, instruction="Answer in one word."),
    ]
    assert len({task.version, *(other.version for other in others)}) == 7
    moved = replace(task, examples=(PARIS, replace(ROME, audio=Path("elsewhere/rome.flac"))))
    assert moved.version == task.version == replace(task, name="other").version


def test_the_text_version_does_not_know_the_recordings() -> None:
    silent, spoken = Task("t", (PARIS, replace(ROME, audio=None))), Task("t", (PARIS, ROME))
    assert silent.version != spoken.version
    assert silent.version == text_version(silent.version) == text_version(spoken.version)
    other = Task("t", (PARIS, replace(ROME, question="Capital of Italy?")))
    assert text_version(other.version) != silent.version


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ((), "no questions"),
        ((PARIS, PARIS), "two questions with the id 'q1'"),
        ((replace(PARIS, answers=()),), "no gold answer"),
        ((replace(PARIS, answers=("?",)),), "no gold answer"),
        ((replace(PARIS, question=" "),), "is empty"),
    ],
)
def test_a_task_that_could_give_a_wrong_number_is_refused(examples: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Task("t", examples)


def test_unknown_metric() -> None:
    with pytest.raises(UserError, match="unknown metric 'exact'"):
        Task("t", (PARIS,), metric="exact")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("facts", "facts"),
        ("data/my-set.jsonl", "my-set"),
        ("llama_questions:/data/llama_questions", "llama_questions"),
        ("fixie-ai/llama-questions", "llama_questions"),
        ("chiyuanhsiao/spoken-web-questions", "web_questions"),
    ],
)
def test_what_records_call_a_task(source: str, name: str) -> None:
    assert task_name(source) == name
