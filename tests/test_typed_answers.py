"""Typed answers of several systems, over several tasks: by hand, and those that are published."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.files import UserError, read_json

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted((ROOT / "results").glob("*/answers.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("typed_answers", ROOT / "scripts" / "typed_answers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder(path: Path, verdicts: str, first: int = 0) -> Path:
    path.mkdir(parents=True)
    rows = [{"id": f"q{first + i}", "verdicts": {PRIMARY: bit == "1"}} for i, bit in enumerate(verdicts)]
    (path / "samples-text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_pair_by_hand(script: ModuleType, tmp_path: Path) -> None:
    """Ten questions, eight right against three, none gained: p is 2 / 2⁵ = 0.0625. Of the second both are alike."""
    base, tuned = folder(tmp_path / "a", "1111111100"), folder(tmp_path / "b", "1110000000")
    same = folder(tmp_path / "c", "10")
    answers = script.read_answers(["one", "two", f"base={base},{same}", f"full={tuned},{same}", f"short=,{same}"])
    assert answers["one"] == {"ids": [f"q{i}" for i in range(10)], "base": "1111111100", "full": "1110000000"}
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in script.table(answers)[2:]]
    assert [row[:4] for row in rows] == [
        ["base", "full", "one", "10"],
        ["base", "full", "two", "2"],
        ["base", "full", "all together", "12"],
        ["base", "short", "two", "2"],
        ["full", "short", "two", "2"],
    ]
    assert rows[0][4].startswith("80.0 ")
    assert rows[0][5].startswith("30.0 ")
    assert rows[0][6].startswith("−50.0 ")
    assert [row[7] for row in rows] == ["0.188", "1.000", "0.188", "1.000", "1.000"]  # Holm: three of 0.0625, 1, 0.0625
    assert rows[2][4].startswith("75.0 ")
    assert rows[2][6].startswith("−41.7 ")


def test_other_questions_and_too_few_folders_are_a_sentence(script: ModuleType, tmp_path: Path) -> None:
    first, other = folder(tmp_path / "a", "11"), folder(tmp_path / "b", "11", first=1)
    with pytest.raises(UserError, match="has other questions than the first system's folder of one"):
        script.read_answers(["one", f"base={first}", f"full={other}"])
    with pytest.raises(UserError, match="full has 1 folders and there are 2 tasks; give one for each"):
        script.read_answers(["one", "two", f"base={first},{first}", f"full={first}"])


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_a_results_page_has_the_table_of_its_answers(script: ModuleType, file: Path) -> None:
    page = (ROOT / "docs" / f"results-{file.parent.name}.md").read_text(encoding="utf-8")
    assert "\n".join(script.table(read_json(file))) in page
