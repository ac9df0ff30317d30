"""Typed answers of several systems, over several tasks: by hand, and those that are published."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.files import UserError, read_json
from palimpsest.intervals import clustered_difference
from script_files import load_script

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted((ROOT / "results").glob("*/answers.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("typed_answers")


def folder(path: Path, responses: str, first: int = 0) -> Path:
    """Answers to so many questions: 1 the right word, 0 a wrong one, L the right one behind four others."""
    path.mkdir(parents=True)
    said = {"1": "Paris.", "0": "London.", "L": "It is, I think, Paris."}
    rows = [
        {
            "id": f"q{first + i}", "question": "where?", "answers": ["Paris"], "response": said[letter],
            "verdicts": {PRIMARY: letter != "0"}, "cut": letter == "L",
        }
        for i, letter in enumerate(responses)
    ]  # fmt: skip
    (path / "samples-text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(table: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table[2:]]


def test_answers_to_spoken_questions_are_those_of_their_file(script: ModuleType, tmp_path: Path) -> None:
    spoken = [f"{name}={folder(tmp_path / name, letters)}" for name, letters in (("a", "10"), ("b", "11"))]
    for name, letters in (("a", "00"), ("b", "01")):
        file = tmp_path / name / "samples-text.jsonl"
        file.rename(file.with_name("samples-speech.jsonl"))
        (folder(tmp_path / f"{name}-typed", letters) / file.name).rename(file)
    for modality, right in (("speech", ["10", "11"]), ("text", ["00", "01"])):
        task = script.read_answers(["one", *spoken], modality=modality)["tasks"]["one"]
        assert [task[name]["right"] for name in "ab"] == right


def test_a_pair_by_hand(script: ModuleType, tmp_path: Path) -> None:
    """Ten questions, eight right against three, none gained: p is 2 / 2⁵ = 0.0625. Of the second both are alike."""
    base, tuned = folder(tmp_path / "a", "1111111100"), folder(tmp_path / "b", "1110000000")
    same = folder(tmp_path / "c", "10")
    answers = script.read_answers(["one", "two", f"base={base},{same}", f"short=,{same}", f"full={tuned},{same}"])
    assert answers["tasks"]["one"] == {
        "ids": [f"q{i}" for i in range(10)],
        "base": {"right": "1111111100", "words": 1, "cut": 0},
        "full": {"right": "1110000000", "words": 1, "cut": 0},
    }
    rows = rows_of(script.table(answers))
    assert [row[:3] for row in rows] == [
        ["base", "one", "10"], ["base", "two", "2"], ["base", "all together", "12"], ["short", "two", "2"],
    ]  # fmt: skip
    assert [row[4].split()[0] for row in rows] == ["80.0", "50.0", "75.0", "50.0"]
    assert [row[5].split()[0] for row in rows] == ["30.0", "50.0", "33.3", "50.0"]
    assert [row[6].split()[0] for row in rows] == ["−50.0", "+0.0", "−41.7", "+0.0"]
    assert [row[7] for row in rows] == ["0.188", "1.000", "0.188", "1.000"]  # Holm: three of 0.0625, 1, 0.0625


def test_cut_to_the_words_of_the_tuned_model(script: ModuleType, tmp_path: Path) -> None:
    """Two of the base's answers come to the point in their fifth word; the tuned model's have one word, and five."""
    base, tuned = folder(tmp_path / "a", "L1L"), folder(tmp_path / "b", "11L")
    answers = script.read_answers(["one", f"base={base}", f"full={tuned}"], cut=True)
    assert answers["systems"] == ["base", "base, cut", "full"]
    assert answers["tasks"]["one"]["base"] == {"right": "111", "words": 5, "cut": 2}
    assert answers["tasks"]["one"]["base, cut"] == {"right": "011", "words": 1, "cut": 2}
    assert [row[:4] for row in rows_of(script.table(answers))] == [
        ["base", "one", "3", "5, 1"], ["base, cut", "one", "3", "1, 1"],
    ]  # fmt: skip


def test_training_runs_of_a_method_are_one_system(script: ModuleType, tmp_path: Path) -> None:
    """Of twelve questions the base has six right, the three runs 9, 9 and 12: 10 of 12 on average, a third more."""
    right = {
        "base": "1" * 6 + "0" * 6,
        "full": "1" * 9 + "0" * 3,
        "full-seed1": "1" * 9 + "0" * 3,
        "full-seed2": "1" * 12,
    }
    answers = script.read_answers(["one", *(f"{name}={folder(tmp_path / name, of)}" for name, of in right.items())])
    assert answers["systems"] == list(right)
    (row,) = rows_of(script.table(answers))
    runs = np.array([[int(bit) for bit in of] for of in right.values()], dtype=float)
    effect = clustered_difference(runs[0], runs[1:])
    assert row[:3] == ["base", "one", "12"]
    assert [row[i].split()[0] for i in (4, 5, 6)] == ["50.0", "83.3", "+33.3"]
    assert row[6].endswith(f"\\[{100 * effect.low:+.1f} to {100 * effect.high:+.1f}\\]".replace("-", "−"))
    assert row[7] == f"{effect.p_value:.3f}"


def test_other_questions_and_too_few_folders_are_a_sentence(script: ModuleType, tmp_path: Path) -> None:
    first, other = folder(tmp_path / "a", "11"), folder(tmp_path / "b", "11", first=1)
    with pytest.raises(UserError, match="has other questions than the first system's folder of one"):
        script.read_answers(["one", f"base={first}", f"full={other}"])
    with pytest.raises(UserError, match="full has 1 folders and there are 2 tasks; give one for each"):
        script.read_answers(["one", "two", f"base={first},{first}", f"full={first}"])
    for alone in (["one"], ["one", f"full={first}"], [f"base={first}", f"full={first}"]):
        with pytest.raises(UserError, match="Nothing to set side by side"):
            script.read_answers(alone)
    with pytest.raises(UserError, match="full, the last system, was not asked one"):
        script.read_answers(["one", f"base={first}", "full="])


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_a_results_page_has_the_table_of_its_answers(script: ModuleType, file: Path) -> None:
    page = (ROOT / "docs" / f"results-{file.parent.name}.md").read_text(encoding="utf-8")
    assert "\n".join(script.table(read_json(file))) in page
