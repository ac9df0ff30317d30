"""Pairs of a plan at one rate: what a finished study has of them, Holm within a family, and their page."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from palimpsest.comparison.frontier import DRIFT, LOWER, S2T, SPEECH_LOSS, Measure
from palimpsest.files import UserError, read_json
from palimpsest.intervals import holm, loss_difference
from script_files import load_script

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted((ROOT / "results").glob("*/run_by_run.json"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Three models, two runs, two texts: b is 1 above a in one run and 2 in the other; c is 4 above, and not spoken."""
    module = load_script("run_by_run")
    totals = {
        "a": {0: np.array([1.0, 2.0]), 1: np.array([2.0, 1.0])},
        "b": {0: np.array([2.0, 3.0]), 1: np.array([4.0, 3.0])},
        "c": {0: np.array([5.0, 6.0]), 1: np.array([6.0, 5.0])},
    }
    spoken = {model: of for model, of in totals.items() if model != "c"}
    text, hearing, answers = (
        Measure(it, None, LOWER, ("x", "y"), ("", ""), np.ones(2), of)
        for it, of in ((DRIFT, totals), (SPEECH_LOSS, spoken), (S2T, totals))
    )
    monkeypatch.setattr(module, "load_config", lambda _: None)
    monkeypatch.setattr(module, "measures_of", lambda *_: ([text], [hearing, answers]))
    return module


def test_pairs_by_measure_and_family(script: ModuleType, tmp_path: Path) -> None:
    rows = script.records(tmp_path, [[["a", "b"], ["a", "c"]], [["b", "a"]]])
    assert [(r["measure"], r["method_a"], r["method_b"], r["n_family"]) for r in rows] == [
        *((DRIFT, *pair) for pair in (("a", "b", 2), ("a", "c", 2), ("b", "a", 1))),
        *((SPEECH_LOSS, *pair) for pair in (("a", "b", 1), ("b", "a", 1))),  # c has no speech loss
    ]
    b, c, alone = rows[:3]
    assert (b["difference"], b["values"]) == (1.5, [1.0, 2.0])
    assert c["values"] == [4.0, 4.0]
    assert c["p_value"] == 2 * 0.5**2  # both texts and both runs say the same: the sign test
    assert (alone["difference"], alone["p_holm"]) == (-1.5, alone["p_value"])
    assert [b["p_holm"], c["p_holm"]] == holm([b["p_value"], c["p_value"]])
    line = script.table(rows)[2]
    assert line.startswith("| Drift | a | b | 1.5 | 3 | +1.5 ")
    assert "| +1, +2 |" in line


def test_methods_that_were_trained_once_are_compared_over_units(script: ModuleType, tmp_path: Path) -> None:
    totals = {"a": {0: np.array([1.0, 2.0, 3.0])}, "b": {0: np.array([2.0, 2.0, 5.0])}}
    text = Measure(DRIFT, None, LOWER, ("x", "y", "z"), ("",) * 3, np.array([1.0, 2.0, 1.0]), totals)
    vars(script)["measures_of"] = lambda *_: ([text], [])
    (row,) = script.records(tmp_path, [[["a", "b"]]])
    effect = loss_difference(totals["a"][0], totals["b"][0], text.counts)
    assert (row["difference"], row["ci_low"], row["p_value"]) == (effect.value, effect.low, effect.p_value)
    assert (row["values"], row["seeds_a"]) == ([0.75], 1)


def test_a_pair_that_was_not_run(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no loss of both a and z"):
        script.records(tmp_path, [[["a", "z"]]])


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_the_page_has_the_table(file: Path) -> None:
    page = (ROOT / "docs" / f"results-{file.parent.name}.md").read_text(encoding="utf-8")
    asked = read_json(file.parent / "pairs.json")
    of: dict[str, list[dict[str, Any]]] = read_json(file)
    for key, rows in of.items():
        assert "\n".join(load_script("run_by_run").table(rows)) in page
        pairs = [pair for family in asked[key] for pair in family]
        assert [[r["method_a"], r["method_b"]] for r in rows if r["measure"] == rows[0]["measure"]] == pairs
