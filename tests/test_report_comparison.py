"""Several runs in one page: columns hold each run's own numbers, differences only where the questions are the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from palimpsest.cli import app
from palimpsest.comparison.pairs import pair_runs
from palimpsest.files import UserError, read_json, write_json, write_text
from palimpsest.report.inputs import read_inputs
from palimpsest.report.side_by_side import Run, _merged, tables_of, write_comparison
from palimpsest.report.table import Table
from report_fixture import HOSTILE, invented_results, make_run
from test_compare import losses, study

UNPAIRED: Mapping[str, Any] = {"metric": "token_sequence", "accuracy": [], "perplexity": [], "not_compared": []}
LIGHT = frozenset({"maps", "samples", "data"})


def tables(*runs: Path, paired: Mapping[str, Any] = UNPAIRED) -> dict[str, Table]:
    return {table.name: table for table in tables_of([Run(run.name, read_inputs(run)) for run in runs], paired)}


def lines(table: Table) -> list[list[str]]:
    return [[cell.plain for cell in row] for row in table.rows]


def page_of(*runs: Path, paired: Mapping[str, Any] = UNPAIRED) -> str:
    return write_comparison(runs, paired, runs[0].parent / "comparison.html").read_text(encoding="utf-8")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """The invented run, and one in which Layer-LR and the second task were left out and the base's T2T differs."""
    a, b = make_run(tmp_path / "a", without=LIGHT), make_run(tmp_path / "b", without=LIGHT)
    results = invented_results()
    results["qa"] = [r for r in results["qa"] if r["method"] != "layer_lr" and r["task"] == "llama_questions"]
    results["claims"] = [r | {"verdict": "fails"} for r in results["claims"] if r["claim"] != 8]
    results["qa"][0] |= {"accuracy": 0.5, "metric_version": "2"}
    write_json(b / "results.json", {"schema": 1, **results})
    write_text(b / "study.yaml", "name: invented\nseed: 8\nnote: none\n")
    return a, b


def test_a_column_per_run_holds_its_own_numbers(two: tuple[Path, Path]) -> None:
    every = tables(*two)
    accuracy = {tuple(line[:3]): line[3:] for line in lines(every["accuracy"])}
    assert [column.title for column in every["accuracy"].columns[3:]] == ["a", "b"]
    assert accuracy["Llama Questions", "T2T", "Base"] == [
        "26.3 [21.7 to 31.6; n 300; version 1]",
        "50.0 [21.7 to 31.6; n 300; version 2]",
    ]
    assert accuracy["Llama Questions", "T2T", "Layer-LR"][1] == "–"
    assert accuracy["facts", "S2T", "LoRA"][1] == "–"
    claims = {line[0]: line[2:] for line in lines(every["claims"])}
    assert claims["1"] == ["✓ holds [0.123; 0.100 to 0.150]", "✗ fails [0.123; 0.100 to 0.150]"]
    assert claims["8"] == ["? undecided", "–"]
    perplexity = {tuple(line[:2]): line[2] for line in lines(every["perplexity"])}
    assert perplexity["Full-FT", "speech"] == "not finite [1234 tokens]"
    removed = {tuple(line[:5]): line[5] for line in lines(every["deactivation"])}
    assert removed["Base", "text", "random", "3", "global"] == "8.00 [4321 tokens; per_batch_abs]"
    assert lines(every["shift"])[0][:2] == ["Full-FT", "0.0800 [0.0700 to 0.0900; noise 0.00400]"]


def test_only_what_differs_in_the_recipes_is_listed(two: tuple[Path, Path]) -> None:
    assert lines(tables(*two)["differences"]) == [["seed", "7", "8"]]
    assert ["seed", "7", "7"] in lines(tables(*two)["provenance"])


def test_unlike_runs_are_said_to_be_unlike(two: tuple[Path, Path]) -> None:
    page = page_of(*two)
    assert (
        "The runs have different tasks: a: Llama Questions (n 300), facts (n 300); b: Llama Questions (n 300)." in page
    )
    assert "different scoring rules: a: token_sequence version 1; b: token_sequence version 1, 2." in page
    assert "different language models" not in page
    assert "No method of one run was compared" in page


def test_a_run_like_the_other_is_not_called_unlike(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a", without=LIGHT), make_run(tmp_path / "b", without=LIGHT))
    assert "Not the same, or not compared" not in page


def test_every_run_has_its_summary_and_its_missing_parts(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    page = page_of(*two, tmp_path / "nothing")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", unescape(page)))
    assert "a. Llama Questions: the base answers 26.3 % of 300 typed" in text
    assert "b. Llama Questions: the base answers 50.0 % of 300 typed" in text
    assert "nothing. Not known: the run has no accuracy" in text
    assert "Missing from nothing (" in text


def test_keys_keep_their_order_and_new_ones_follow_their_neighbour() -> None:
    assert _merged([["a", "b", "d"], ["b", "c", "d", "e"], ["z", "a"]]) == ["z", "a", "b", "c", "d", "e"]


def test_hostile_runs_stay_text(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, hostile=True, without=LIGHT) for name in ("a", "b <script>alert(1)")]
    page = page_of(*runs)
    assert page.count("<script>") == 1
    assert HOSTILE not in page


def test_runs_with_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", without=LIGHT) for name in ("x", "y")]
    page = write_comparison(runs, UNPAIRED, tmp_path / "c.html").read_text(encoding="utf-8")
    assert [f'<th scope="col" class="number">run ({i})</th>' in page for i in (1, 2)] == [True, True]
    assert str(tmp_path) not in page


# -- pairing -------------------------------------------------------------------------------------------------
def test_the_same_method_of_two_runs_is_paired_and_what_one_run_lacks_is_said(tmp_path: Path) -> None:
    a = study(tmp_path / "a", {"base": {"text": range(20)}, "full": {"text": range(20), "speech": range(3)}})
    b = study(tmp_path / "b", {"base": {"text": range(5, 32)}, "lora": {"text": range(9)}})
    found = pair_runs([a, b])
    (row,) = found["accuracy"]
    assert (row["method_a"], row["method_b"], row["difference"]) == ("a/base", "b/base", pytest.approx(7 / 40))
    assert found["not_compared"] == ["Only one run has a/full.", "Only one run has b/lora."]
    paired = lines(tables(a, b, paired=found)["pairs"])
    assert paired[0][:8] == ["capitals", "text", "a/base", "b/base", "40", "50.0", "67.5", paired[0][7]]
    assert paired[0][7].startswith("+17.5 [")


def test_other_versions_are_said_once_and_the_rest_is_compared(tmp_path: Path) -> None:
    runs = [
        study(tmp_path / name, {m: {"text": range(9), "speech": range(9)} for m in ("full", "lora")}) for name in "ab"
    ]
    for method in ("full", "lora"):
        sidecar = tmp_path / "b" / "methods" / method / "samples" / "capitals-speech" / "samples.json"
        write_json(sidecar, read_json(sidecar) | {"metric_version": "0"})
    found = pair_runs(runs)
    assert [(r["method_a"], r["modality"]) for r in found["accuracy"]] == [("a/full", "text"), ("a/lora", "text")]
    (sentence,) = found["not_compared"]
    assert re.fullmatch(r"capitals from speech is not compared: scoring rule's version \d+ in a, 0 in b\.", sentence), (
        sentence
    )


def test_losses_of_other_answers_are_said_and_not_compared(tmp_path: Path) -> None:
    for name, data in (("a", "d"), ("b", "d"), ("c", "other")):
        losses(tmp_path / name / "base" / "perplexity", [1.0, 2.0, 3.0], [1, 2, 3], data)
    found = pair_runs([tmp_path / name for name in "abc"])
    assert [(row["method_a"], row["method_b"]) for row in found["perplexity"]] == [("a/base", "b/base")]
    assert len(found["not_compared"]) == 2
    assert all("losses of different answers" in sentence for sentence in found["not_compared"])


def test_a_run_without_answers_is_said_and_the_others_are_compared(tmp_path: Path) -> None:
    a, b = (study(tmp_path / name, {"base": {"text": range(9)}}) for name in "ab")
    (tmp_path / "c").mkdir()
    found = pair_runs([a, tmp_path / "c", b])
    assert len(found["accuracy"]) == 1
    assert found["not_compared"][0].startswith(f"{tmp_path / 'c'} holds no answers")


# -- command -------------------------------------------------------------------------------------------------
def test_the_command_writes_one_page(tmp_path: Path) -> None:
    a, b = (study(tmp_path / name, {"base": {"text": range(9)}}) for name in "ab")
    out = tmp_path / "both.html"
    result = CliRunner().invoke(app, ["report", str(a), str(b), "--out", str(out)])
    assert result.exit_code == 0, result.output
    page = out.read_text(encoding="utf-8")
    assert "The same method in two runs" in page
    assert "palimpsest report a b --out both.html" in unescape(page)  # as typed in the folder of the runs
    assert not (a / "report.html").exists()


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", without=LIGHT)
    with pytest.raises(UserError, match="given twice"):
        write_comparison([run, run], UNPAIRED, tmp_path / "c.html")
    with pytest.raises(UserError, match="is a folder"):
        write_comparison([run, tmp_path], UNPAIRED, tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        write_comparison([run, tmp_path / "b"], UNPAIRED, tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_one_run_may_have_its_page_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert CliRunner().invoke(app, ["report", str(tmp_path / "a"), "--out", str(tmp_path / "p.html")]).exit_code == 0
    assert (tmp_path / "p.html").exists()
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_diagnosis_beside_a_study_has_its_own_question(two: tuple[Path, Path]) -> None:
    provenance = read_json(two[1] / "provenance.json")
    provenance["models"]["given"] = {"full": {"notes": []}}
    write_json(two[1] / "provenance.json", provenance)
    page = page_of(*two)
    assert page.count("<dt>What is different?</dt>") == page.count("<dt>What was lost?</dt>") == 1
