"""Pairs that a plan named: Holm over them alone, a turned pair, drift read by its logarithm; and their page."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from palimpsest.files import read_json
from script_files import load_script

ROOT = Path(__file__).parent.parent
ASKED = {"text": ["drift"], "pairs": [["full", "slow"]]}
PAIRS = sorted((ROOT / "results").glob("*/pairs.json"))  # the plan; committed before there are results
PUBLISHED = [file for file in PAIRS if (file.parent / "results.json").is_file() and "pairs" in read_json(file)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("primary_pairs")


def pair(a: str, b: str, difference: float | None, low: float, high: float, p: float, text: str = "drift") -> Any:
    return {
        "text_measure": text, "hearing_measure": "speech_loss", "position": "best", "method_a": a, "method_b": b,
        "hearing": 1.5, "text_a": 0.2, "text_b": None if difference is None else 0.2 + difference,
        "overlap": 0.9, "difference": difference, "ci_low": low, "ci_high": high,
        "p_value": None if difference is None else p,
    }  # fmt: skip


def point(curve: str, varied: float | None, hearing: float, text: float) -> Any:
    of = {"curve": curve, "point": varied, "text_measure": "drift", "hearing_measure": "speech_loss"}
    return {**of, "hearing": hearing, "text": text}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_holm_is_over_the_named_pairs_and_a_pair_may_be_turned(script: ModuleType) -> None:
    """p 0.01, 0.03 and one without hearing in common: 0.01·3, 0.03·2 and 1. The fourth row is not asked."""
    found = {
        "equal_hearing": [
            pair("lora", "full", 0.1, 0.05, 0.15, 0.01, "general_text"),
            pair("full", "slow", -0.1, -0.15, -0.05, 0.03, "general_text"),
            pair("full", "gate", None, 0, 0, 0, "general_text"),
            pair("full", "other", 0.1, 0.05, 0.15, 1e-6, "general_text"),
        ],
        "frontier": [],
    }
    asked = {"text": ["general_text"], "pairs": [["full", "lora"], ["full", "slow"], ["full", "gate"]]}
    lora, slow, gate = map(cells, script.table(found, asked)[2:])
    assert lora[1:3] == ["Full-FT", "LoRA"]
    assert lora[4:] == ["0.3", "0.2", "−0.1 \\[−0.15 to −0.05\\]", "0.010", "0.030", "better", "–"]
    assert slow[7:10] == ["0.030", "0.060", "no difference shown"]
    assert gate[8:10] == ["1.000", "not comparable"]
    asked["pairs"][1] = ["full", "pull"]  # left out of the study: no value, and a test all the same
    lora, pull, gate = map(cells, script.table(found, asked)[2:])
    assert lora[8] == "0.030"
    assert pull[3:] == ["–", "–", "–", "–", "–", "1.000", "not comparable", "–"]


def test_too_few_draws_in_common_decide_nothing(script: ModuleType) -> None:
    """The pair has a hearing in common in 90 % of the draws; its own p stays."""
    found = {"equal_hearing": [pair("full", "slow", 0.1, 0.05, 0.15, 0.001, "general_text")], "frontier": []}
    asked = {"text": ["general_text"], "pairs": [["full", "slow"]]}
    said = {least: cells(script.table(found, {**asked, "least_in_common": least})[2])[7:10] for least in (0.9, 0.97)}
    assert said == {0.9: ["0.001", "0.001", "worse"], 0.97: ["0.001", "1.000", "no difference shown"]}


@pytest.mark.parametrize(("chord_b", "verdict"), [(0.3, "worse"), (0.1, "no difference shown")])
def test_drift_is_read_by_its_logarithm_too(script: ModuleType, chord_b: float, verdict: str) -> None:
    """Half-way between 0.04 and 0.36 lies 0.2 on the line and √(0.04·0.36) = 0.12 by the logarithm."""
    found = {
        "equal_hearing": [pair("full", "slow", 0.1, 0.05, 0.15, 0.01)],
        "frontier": [point("full", 2e-4, 1.0, 0.36), point("full", 1e-4, 2.0, 0.04), point("slow", None, 1.5, chord_b)],
    }
    row = cells(script.table(found, ASKED)[2])
    assert row[9] == verdict
    assert float(row[10].replace("−", "-")) == pytest.approx(chord_b - math.sqrt(0.04 * 0.36), rel=1e-2)


def test_what_contradicts_a_difference_withholds_it(script: ModuleType) -> None:
    """Shown as it stands; not with an estimate outside its interval, nor in drift where no logarithm can be taken."""
    line = [point("full", 1e-4, 2.0, 0.1), point("full", 2e-4, 1.0, 0.3), point("slow", None, 1.5, 0.1)]

    def verdict(row: Any, frontier: Any) -> str:
        table = script.table({"equal_hearing": [row], "frontier": frontier}, ASKED)
        return str(cells(table[2])[9])

    less = pair("slow", "full", 0.1, 0.05, 0.15, 0.01)  # turned: the plan writes full first
    assert verdict(less, line) == "better"
    assert verdict(pair("slow", "full", 0.1, 0.2, 0.3, 0.01), line) == "no difference shown"
    assert verdict(less, [*line[:2], point("slow", None, 1.5, 0.0)]) == "no difference shown"
    assert verdict(less, [*line[:2], point("slow", None, 0.5, 0.1)]) == "no difference shown"
    assert verdict(pair("full", "slow", -0.1, -0.15, -0.05, 0.06), line) == "no difference shown"


def test_a_curve_that_turns_back_is_marked(script: ModuleType) -> None:
    """Three points out of order, one without hearing: 2.0, 1.0 and 1.2 at rising rates."""
    of = [point("full", 4e-4, 1.2, 0.4), point("full", 1e-4, 2.0, 0.1), point("full", 2e-4, 1.0, 0.3)]
    none = {**point("full", 8e-4, 0.0, 0.0), "hearing": None}
    found = {"equal_hearing": [pair("full", "slow", -0.1, -0.15, -0.05, 0.01)], "frontier": [*of, none]}
    assert cells(script.table(found, ASKED)[2])[1:3] == ["Full-FT (turns back)", "slow"]
    found["frontier"] = of[1:]
    assert cells(script.table(found, ASKED)[2])[1] == "Full-FT"


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_a_results_page_has_the_table_of_its_pairs(script: ModuleType, file: Path) -> None:
    page = ROOT / "docs" / f"results-{file.parent.name}.md"
    table = script.table(read_json(file.parent / "results.json"), read_json(file))
    assert "\n".join(table) in page.read_text(encoding="utf-8")
