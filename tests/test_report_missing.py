"""A run that lacks something: for whatever is taken away, the page is whole, names it and shows the rest.

Drawing takes most of a report's time and is tested elsewhere, so that these pages have no figures.
"""

from __future__ import annotations

import random
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from palimpsest.files import write_json, write_text
from palimpsest.records import RESULT_TABLES
from palimpsest.report import page as html
from palimpsest.report.inputs import MAY_BE_EMPTY, OF_FRONTIER, OF_SPEECH_TOKENS, SEED_LOSSES
from palimpsest.report.page import write_report
from palimpsest.rundir import RunDir
from report_fixture import invented_results, make_run

QUESTIONS = 2


class Nesting(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "link", "br", "input", "hr", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(run: Path) -> str:
    page = write_report(run).read_text(encoding="utf-8")
    assert Nesting(page).open == []
    return unescape(page)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "FIGURES", {})
    monkeypatch.setattr(html, "first_pictures", lambda _: [])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole"), n_questions=QUESTIONS)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_the_whole_run_misses_nothing(run: Path) -> None:
    assert "Missing from this run" not in page_of(run)


@pytest.mark.parametrize("table", RESULT_TABLES)
def test_every_table_taken_away_is_named(run: Path, table: str) -> None:
    write_json(run / "results.json", {"schema": 1, **invented_results(), table: []})
    if table in MAY_BE_EMPTY:
        write_text(run / "study.yaml", "seeds: 3\ndrift: {general_text: {text: a.txt}}\n")
    said = f"results.json has no records in “{table}”." in page_of(run)
    # There where a task is spoken in several voices, where a model is given, where speech, curves or tokens were asked
    # for; losses over runs not in runs of earlier versions.
    assert said == (table not in ("voices", "embeddings", SEED_LOSSES, *OF_SPEECH_TOKENS, *OF_FRONTIER))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("results.json", "results.json is not there."),
        ("provenance.json", "provenance.json is not there."),
        ("study.yaml", "study.yaml is not there."),
        ("maps", "maps/delta.npz is not there."),
        ("maps/importance.npz", "maps/importance.npz is not there."),
        ("base", "There are no sample answers of base for facts, cascade."),
        ("base/importance", "whose folder is gone, which a resumed study runs again: base/importance."),
        ("base/samples/facts-text", "There are no sample answers of base for facts, text."),
        ("methods", "There are no sample answers of layer_lr for llama_questions, speech."),
        ("methods/lora", "There are no sample answers of lora for facts, speech."),
        ("methods/full/samples/facts-speech/samples.jsonl", "There are no sample answers of full for facts, speech."),
        ("data", "data/task-facts.jsonl is not there"),
        ("data/task-llama_questions.jsonl", "data/task-llama_questions.jsonl is not there"),
        ("data/audio", "not in this page, the file is not there"),
    ],
)
def test_every_part_taken_away_is_named(run: Path, part: str, said: str) -> None:
    assert said not in page_of(run)
    (shutil.rmtree if (run / part).is_dir() else Path.unlink)(run / part)
    assert said in page_of(run)


def test_an_interrupted_step_is_named(tmp_path: Path) -> None:
    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunDir(tmp_path).step("methods/layer_lr/deactivation", {}, stop)
    page = page_of(tmp_path)
    assert "Begun and not finished: methods/layer_lr/deactivation." in page
    assert "results.json is not there." in page


def test_twenty_thousand_rows_of_clustering_stay_under_15_megabytes(run: Path) -> None:
    """As a study of 210 matrices gives them, beside every other table and the longest answers shown."""
    results = invented_results()
    of = [("base", "importance"), ("base", "mask")]
    of += [(m, kind) for m in ("full", "layer_lr", "lora") for kind in ("importance", "delta", "delta_rank8")]
    measures = ("top1_rows", "top5_rows", "top1_columns", "top5_columns", "gini_rows", "gini_columns", "rank", "x", "y")
    value = random.Random(0).random
    results["clustering"] = [
        {
            "model": model,
            "of": what,
            "name": f"model.layers.{matrix // 7}.{matrix % 7}.weight",
            "layer": matrix // 7,
            "kind": "qkvogud"[matrix % 7],
            "measure": measure,
            **{key: value() for key in ("value", "null_mean", "null_std", "z")},
        }
        for model, what in of
        for matrix in range(210)
        for measure in measures
    ]
    assert len(results["clustering"]) > 20_000
    write_json(run / "results.json", {"schema": 1, **results})
    assert len(write_report(run).read_bytes()) < 15e6
