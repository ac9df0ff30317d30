"""Accuracy by the voice of the question, by hand and in a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from palimpsest.comparison.by_voice import voice_records
from palimpsest.data.examples import Example
from palimpsest.files import write_json
from palimpsest.intervals import wilson
from palimpsest.report.inputs import read_inputs
from palimpsest.report.page import tables_of
from palimpsest.report.tables import voices
from report_fixture import invented_results, make_run

VOICES = {"a": "near", "b": "near", "c": "far", "d": "far", "e": "far", "f": None}
EXAMPLES = [Example(name, "?", ("!",), "!", voice=voice) for name, voice in VOICES.items()]
Right = dict[str, dict[str, bool]]


def right(**runs: str) -> Right:
    """Run -> the ids it answers rightly."""
    return {run.replace("_seed", "-seed"): {i: i in ids for i in VOICES} for run, ids in runs.items()}


def test_each_voice_by_hand() -> None:
    verdicts = {"text": right(base="abcdef", m="abc", m_seed1="ac"), "speech": right(m="ac", m_seed1="abc")}
    records = voice_records("facts", EXAMPLES, ["m"], 2, verdicts, {"near"})
    assert [(r["voice"], r["n"], r["trained_on"], r["n_seeds"]) for r in records] == [
        ("near", 2, True, 2),
        ("far", 3, False, 2),
        ("recording", 1, False, 2),
    ]
    assert [r["accuracy"] for r in records] == pytest.approx([3 / 4, 2 / 6, 0])
    assert [r["accuracy_text"] for r in records] == pytest.approx([3 / 4, 2 / 6, 0])
    assert all(0 <= r["ci_low"] <= r["accuracy"] <= r["ci_high"] <= 1 for r in records)
    assert {(r["method"], r["task"], r["modality"]) for r in records} == {("m", "facts", "speech")}


def test_one_run_has_wilsons_interval_and_the_cascade_is_the_bases() -> None:
    verdicts = {"text": right(base="abd", m="a"), "speech": right(base="", m="ae"), "cascade": right(base="ac")}
    records = voice_records("facts", EXAMPLES, ["m"], 1, verdicts, {"near", "far"})
    assert [(r["method"], r["modality"]) for r in records[::3]] == [
        ("base", "speech"),
        ("m", "speech"),
        ("base", "cascade"),
    ]
    far = next(r for r in records if (r["modality"], r["voice"]) == ("cascade", "far"))
    assert (far["accuracy"], far["ci_low"], far["ci_high"]) == pytest.approx((1 / 3, *wilson(1, 3)))
    assert far["accuracy_text"] == pytest.approx(1 / 3)


def test_a_task_of_one_voice_has_none() -> None:
    verdicts = {"text": right(base="ab"), "speech": right(base="a")}
    assert voice_records("facts", EXAMPLES[:2], [], 1, verdicts, {"near"}) == []
    assert voices([]).rows == ()


def test_the_table_of_the_report(tmp_path: Path) -> None:
    verdicts = {"text": right(base="abcdef", m="abc"), "speech": right(m="acd")}
    records = voice_records("facts", EXAMPLES, ["m"], 1, verdicts, {"near"})
    write_json(make_run(tmp_path) / "results.json", {"schema": 1, **invented_results(), "voices": records})
    inputs = read_inputs(tmp_path)
    assert inputs.missing == ()
    table = tables_of(inputs)["voices"]
    assert [cell.plain for cell in table.rows[1]] == [
        *("facts", "speech", "m", "far", "no", "3", "66.7 [20.8 to 93.9]", "33.3"),
    ]
