"""Two gloo processes make the files of one, to the bit; an error of one ends both, and one of them says it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from palimpsest import parallel
from palimpsest.config import parse_config
from palimpsest.data import features, speech, voices
from palimpsest.data.cores import cores_of_this_rank, n_cores
from palimpsest.data.examples import Example
from palimpsest.data.voices import Voice
from palimpsest.evaluation import answers, drift, own_text
from palimpsest.evaluation.answers import Answer, answer_questions
from palimpsest.evaluation.finite import NotFiniteError
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError, append_jsonl, read_json, read_jsonl, write_json
from palimpsest.report import figures, page
from palimpsest.study.run import run_study
from ranks import find_each_other, start_ranks
from tiny import save_tiny_models
from tones import load_picky_tone, one

WORLD = 2
SMALL_SHARD = 8 << 10  # bytes: a few utterances, so that there are whole shards for every rank and one to divide
AGAIN = (
    "data",
    "features",
    "*/deactivation",
    "*/perplexity",
    "*/probe",
    "*/samples",
    "*/own_text",
    "*/drift",
    "*/general_text",
)  # what the two make again
TIMES = ("step.json", "files.json", "verified.json", "provenance.json", "report.html", "results.json")


def recipe(inputs: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "models": {"language_model": str(inputs / "llm"), "encoder": str(inputs / "whisper"), "compute": "float32"},
        "speech": {"adaptor_hidden_size": 24, "voice": "picky"},
        "data": {
            "train": {"source": str(inputs / "train.jsonl"), "split": "train"},
            "heldout": {"source": str(inputs / "heldout.jsonl"), "split": "heldout"},
        },
        "methods": {"full": {"kind": "full", "learning_rate": 1e-3}},
        "training": {"epochs": 1, "batch_size": 4},
        "importance": {"n_examples": 8, "batch_size": 2},
        "deactivation": {"random_seeds": 2, "batch_size": 2, "scope": ["global", "per_matrix"]},
        "analysis": {"shuffles": 1, "bootstrap": 100},
        "evaluation": {
            "tasks": [{"name": "numbers", "source": str(inputs / "task.jsonl"), "split": "test"}],
            "max_new_tokens": 4,
            "batch_size": 2,
        },
        "drift": {
            "own_text": {"n_texts": 5, "new_tokens": 4},
            "general_text": {"text": str(inputs / "wiki.txt"), "window": 8},
            "batch_size": 2,
        },
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_models(folder)
    (folder / "wiki.txt").write_text("".join(f"This is line {i} of {'x' * i}.\n" for i in range(5)))
    for name, n in (("train", 23), ("heldout", 7), ("task", 5)):
        rows = [{"id": f"{name}{i}", "question": f"What is {name} {'x' * i}?", "answer": "It."} for i in range(n)]
        if name == "train":
            rows[4]["question"] = "What is ☃?"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study, run by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SHARD_BYTES", SMALL_SHARD)
        patch.setattr(own_text, "BATCH", 2)
        patch.setitem(voices.VOICES, "picky", Voice("picky", one, load_picky_tone))
        run_study(parse_config(recipe(inputs), "test"), folder)
    return folder


def content(folder: Path) -> dict[str, Any]:
    """Every file of the steps in question, without times; their names are part of it."""
    files = {path for step in AGAIN for top in (folder, folder / "methods") for path in top.glob(f"{step}/**/*")}
    found: dict[str, Any] = {}
    for path in sorted(files):
        if path.is_file() and path.name not in TIMES:
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes()
            if path.name == "samples.jsonl":
                found[name] = [{**row, "seconds": 0} for row in read_jsonl(path)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What every rank runs
# ---------------------------------------------------------------------------------------------------------------------
def work(rank: int, port: int, inputs: str, folder: str, failing: int | None) -> None:
    begin(rank, port)
    seen: list[str] = []  # what this rank did
    note(features, "_encode", seen)
    note(speech, "write_flac", seen)
    note(own_text, "_continue", seen)
    note(drift, "_compare", seen)
    note(answers, "_answer_batch", seen, counts=lambda arguments: bool(arguments[1]))
    if rank == failing:

        def fail(*_: Any) -> None:
            raise UserError("The encoder has a cold; give it tea.")

        features._encode = fail  # type: ignore[assignment]
    said = ["nothing"]
    try:
        run_study(parse_config(recipe(Path(inputs)), "test"), Path(folder))
    except (UserError, SystemExit) as error:
        said = [type(error).__name__, str(error)]
    write_json(Path(folder).parent / f"said-{rank}.json", {"said": said, "did": {k: seen.count(k) for k in seen}})


def begin(rank: int, port: int) -> None:
    find_each_other(rank, port, WORLD)
    os.environ["LOCAL_RANK"] = str(rank)
    features.SHARD_BYTES = SMALL_SHARD
    own_text.BATCH = 2
    voices.VOICES["picky"] = Voice("picky", one, load_picky_tone)
    figures.FIGURES = page.FIGURES = {}  # drawings, which take most of the time


def note(module: Any, name: str, seen: list[str], counts: Any = lambda arguments: True) -> None:
    plain = getattr(module, name)

    def noted(*arguments: Any) -> Any:
        if counts(arguments):
            seen.append(name)
        return plain(*arguments)

    setattr(module, name, noted)


def in_rounds(rank: int, port: int, folder: str, failing: int | None) -> None:
    """Five questions in batches of one, of which two are answered already; on one rank the model may fall ill."""
    begin(rank, port)
    out, asked = Path(folder) / "samples.jsonl", []

    def answer(examples: Any, modality: Any) -> list[Answer]:
        asked.extend(example.id for example in examples)
        if rank == failing:
            raise NotFiniteError("The weight w of the model is NaN.")
        return [Answer(f"It is {example.id}.", 1) for example in examples]

    said = ["nothing"]
    try:
        with parallel.joined():
            rows = answer_questions(answer, questions(), "text", model="m", out=out, batch_size=1, distributed=True)
            write_json(Path(folder) / f"rows-{rank}.json", [row["id"] for row in rows])
            write_json(Path(folder) / f"cores-{rank}.json", cores_of_this_rank())
    except (UserError, SystemExit) as error:
        said = [type(error).__name__, str(error)]
    write_json(Path(folder) / f"said-{rank}.json", {"said": said, "asked": asked})


def questions() -> Task:
    return Task("t", tuple(Example(f"q{i}", "?" * (9 - i), ("1",), "1") for i in range(5)))


# ---------------------------------------------------------------------------------------------------------------------
# A study
# ---------------------------------------------------------------------------------------------------------------------
def test_two_processes_make_the_files_of_one(inputs: Path, alone: Path, tmp_path: Path) -> None:
    """All steps but those in which sums over ranks round otherwise: training and importance stay as they were."""
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    for step in AGAIN:
        for path in [*folder.glob(step), *(folder / "methods").glob(step)]:
            shutil.rmtree(path)
    start_ranks(work, str(inputs), str(folder), None, world=WORLD)
    said = [read_json(tmp_path / f"said-{rank}.json") for rank in range(WORLD)]
    assert [each["said"] for each in said] == [["nothing"]] * WORLD
    expected, found = content(alone), content(folder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert [row["id"] for row in read_jsonl(folder / "data" / "dropped.jsonl")] == ["train4"]
    of_study = [json.loads((path / "results.json").read_text()) for path in (alone, folder)]
    for result in of_study:
        del result["timings"]
    assert of_study[0] == of_study[1]
    # 3 batches of each of 3 evaluations; 24 + 7 + 5 recordings in shards of some.
    assert [each["did"]["_answer_batch"] for each in said] == [6, 3]
    # Plain texts, users' turns and answers in 3 batches each; 10 texts in 5.
    assert [[each["did"][what] for each in said] for what in ("_continue", "_compare")] == [[6, 3], [3, 2]]
    for what in ("_encode", "write_flac"):
        counts = [each["did"][what] for each in said]
        assert min(counts) > 0.3 * sum(counts), (what, counts)


@pytest.mark.parametrize("failing", range(WORLD))
def test_an_error_of_one_rank_ends_all_with_one_sentence(inputs: Path, tmp_path: Path, failing: int) -> None:
    start_ranks(work, str(inputs), str(tmp_path / "run"), failing, world=WORLD)
    said = [read_json(tmp_path / f"said-{rank}.json")["said"] for rank in range(WORLD)]
    assert said[failing] == ["UserError", "The encoder has a cold; give it tea."]
    assert said[1 - failing] == ["SystemExit", "2"]


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------
def test_answers_that_are_there_are_kept_whoever_made_them(tmp_path: Path) -> None:
    def answer(examples: Any, modality: Any) -> list[Answer]:
        return [Answer(f"It is {example.id}.", 1) for example in examples]

    plain, out = tmp_path / "plain" / "samples.jsonl", tmp_path / "samples.jsonl"
    rows = answer_questions(answer, questions(), "text", model="m", out=plain, batch_size=1)
    shutil.copy(plain.with_suffix(".json"), out.with_suffix(".json"))
    append_jsonl(out, [rows[1], rows[0]])
    with out.open("ab") as file:
        file.write(b'{"id": "q2", "cut')
    start_ranks(in_rounds, str(tmp_path), None, world=WORLD)
    assert [{**row, "seconds": 0} for row in read_jsonl(out)] == [{**row, "seconds": 0} for row in rows]
    assert [read_json(tmp_path / f"said-{rank}.json")["asked"] for rank in range(WORLD)] == [["q2", "q4"], ["q3"]]
    assert [read_json(tmp_path / f"rows-{rank}.json") for rank in range(WORLD)] == [[f"q{i}" for i in range(5)]] * 2
    # They use the same cores, each one once: of an odd number one is left.
    assert [read_json(tmp_path / f"cores-{rank}.json") for rank in range(WORLD)] == [max(1, n_cores() // 2)] * 2


@pytest.mark.parametrize("failing", range(WORLD))
def test_a_rank_that_waits_for_answers_ends_with_the_one_that_has_none(tmp_path: Path, failing: int) -> None:
    start_ranks(in_rounds, str(tmp_path), failing, world=WORLD)
    said = [read_json(tmp_path / f"said-{rank}.json")["said"] for rank in range(WORLD)]
    assert said[failing] == ["NotFiniteError", "The weight w of the model is NaN."]
    assert said[1 - failing] == ["SystemExit", "2"]


def test_shares_are_put_in_order_again() -> None:
    for n in range(8):
        shares = [list(range(n))[rank::3] for rank in range(3)]
        assert parallel.dealt_back(shares) == list(range(n))
    assert torch.distributed.is_initialized() is False
    assert parallel.by_ranks(str, [1, 2]) == ["1", "2"]
