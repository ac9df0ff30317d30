"""A study with a section `drift`: its steps, tables, tests, report, and what the command says of the same models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palimpsest.commands import drift
from palimpsest.config import parse_config
from palimpsest.evaluation.drift_settings import GeneralText, Sampling
from palimpsest.files import UserError, hash_value, read_json, write_json
from palimpsest.models import loading
from palimpsest.report import figures, page
from palimpsest.report.across_runs import by_method
from palimpsest.report.figures import draw
from palimpsest.report.inputs import read_inputs
from palimpsest.rundir import checkpoint_of
from palimpsest.study.run import run_study, steps_of
from test_study_adaptor import inputs, recipe

__all__ = ["inputs"]
OWN = {"n_texts": 4, "new_tokens": 8}
PARAGRAPHS = "\n\n".join(f"Paragraph {i} says this and {'that ' * i}." for i in range(8))


def with_drift(inputs: Path, **changes: Any) -> dict[str, Any]:
    (inputs / "wiki.txt").write_text(PARAGRAPHS)
    text = {"text": str(inputs / "wiki.txt"), "window": 16}
    section = {"own_text": OWN, "general_text": text, "batch_size": 3, "in_training": 4}
    given = recipe(inputs, adaptor=None)
    return {**given, "training": {**given["training"], "eval_every": 1}, "drift": section, **changes}


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {name: figures.FIGURES[name] for name in ("drift", "retention")})
        run_study(parse_config(with_drift(inputs), "test"), folder)
    return folder


def tables(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "results.json")
    return found


def test_what_learned_nothing_has_not_drifted_and_the_rest_has(finished: Path) -> None:
    rows = {(row["model"], row["text"]): row for row in tables(finished)["drift"] if row["tokens"] == "all"}
    assert set(rows) == {(model, text) for model in ("idle", "full") for text in ("plain", "chat")}
    for text in ("plain", "chat"):
        idle, full = rows["idle", text], rows["full", text]
        assert (idle["kl"], idle["reverse_kl"], idle["agreement"], idle["loss_difference"]) == (0, 0, 1, 0)
        assert full["kl"] > full["kl_ci_low"] > 0.001
        assert {row["base"] for row in (idle, full)} == {"base"}
        assert full["n_texts"] == OWN["n_texts"]


def test_training_estimates_what_the_step_measures(finished: Path) -> None:
    """Between the steps, on as many texts as there are here: the loss on the base's text minus the base's."""
    found = tables(finished)
    rows = [row for row in found["training"] if row["kind"] == "drift"]
    assert {row["method"] for row in rows} == {"full"}  # the other leaves the language model as it is
    measured = [row for row in found["drift"] if (row["model"], row["tokens"]) == ("full", "all")]
    n_tokens = sum(row["n_tokens"] for row in measured)
    assert {row["n_tokens"] for row in rows} == {n_tokens}
    for last, whole in (("loss", "loss"), ("loss_base", "loss_base"), ("drift", "loss_difference")):
        mean = sum(row[whole] * row["n_tokens"] for row in measured) / n_tokens
        assert rows[-1][last] == pytest.approx(mean, rel=1e-4)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["drift"] != rows[1]["drift"]
    drawing = draw("retention", read_inputs(finished))
    assert drawing is not None
    assert "Full-FT, drift, step 2: " in str(drawing.tips)


def test_general_text_is_compared_with_the_base_in_one_family(finished: Path) -> None:
    found = tables(finished)
    losses = {row["model"]: row for row in found["general_text"]}
    assert list(losses) == ["base", "idle", "full"]
    assert {row["n_bytes"] for row in losses.values()} == {sum(map(len, PARAGRAPHS.split("\n\n")))}
    assert losses["idle"]["per_byte"] == losses["base"]["per_byte"] != losses["full"]["per_byte"]
    idle, full = found["general_text_comparisons"]
    assert (idle["method"], idle["left_out"], full["left_out"]) == ("idle", "equal by construction", None)
    assert full["difference"] == pytest.approx(losses["full"]["per_byte"] - losses["base"]["per_byte"])
    assert {row["n_family"] for row in (idle, full)} == {1}
    assert full["p_holm"] == full["p_value"]  # of the one test that there is
    assert {row["text"] for row in (*losses.values(), idle, full)} == {"…/wiki.txt"}


def test_the_command_finds_the_same_of_the_same_models(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """On the study's own text; the command's seed would be its own."""
    own, there = tmp_path / "own_text.jsonl", finished / "base" / "own_text"
    about = read_json(there / "own_text.json")
    own.write_bytes((there / own.name).read_bytes())
    of_base = hash_value([loading.fingerprint(str(inputs / "llm")), None])
    write_json(own.with_suffix(".json"), {**about, "model": of_base})
    full, text = str(checkpoint_of(finished, "full")), GeneralText(str(inputs / "wiki.txt"), window=16)
    given = {"general": text, "sampling": Sampling(**OWN), "seed": about["seed"], "batch_size": 3}
    list(drift.run(drift.Options(str(inputs / "llm"), [full], tmp_path, **given)))
    numbers = ("kl", "reverse_kl", "agreement", "loss", "loss_base", "n_tokens")
    ours = [[row[key] for key in numbers] for row in tables(finished)["drift"] if row["model"] == "full"]
    assert [[row[key] for key in numbers] for row in read_json(tmp_path / "drift.json")["drift"]] == ours
    of_study = [row["per_byte"] for row in tables(finished)["general_text"] if row["model"] != "idle"]
    assert [row["per_byte"] for row in read_json(tmp_path / "general_text.json")["general_text"]] == of_study


def test_the_report_shows_it(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    for part in ("table-drift", "table-general_text", "table-general_text_comparisons", "figure-drift"):
        assert f'id="{part}"' in html, part
    drawing = draw("drift", read_inputs(finished))
    assert drawing is not None
    row = next(r for r in tables(finished)["drift"] if (r["model"], r["text"], r["tokens"]) == ("full", "chat", "all"))
    assert f"Own text, chat, Full-FT: {row['kl']:.2g}"[:29] in drawing.alt
    assert "Own text, plain, idle: 0 (0 to 0)" in drawing.alt
    assert "General text, Full-FT: " in drawing.alt


@pytest.mark.usefixtures("no_figures")
def test_one_text_less_measures_general_text_alone(finished: Path, inputs: Path) -> None:
    before, given = tables(finished), with_drift(inputs)
    given["drift"]["general_text"]["limit"] = 7
    run_study(parse_config(given, "test"), finished, changed=True)
    after = tables(finished)
    assert after["drift"] == before["drift"]
    assert {row["n_texts"] for row in after["general_text"]} == {7}
    done = read_json(finished / "provenance.json")["steps"]
    measured = {f"{folder}/general_text" for folder in ("base", "methods/idle", "methods/full")}
    assert {name for name, step in done.items() if not step["skipped"]} == measured


def test_several_training_runs_are_compared_by_their_means(inputs: Path, tmp_path: Path) -> None:
    """Differences of runs are those of `general_text` and `perplexity`, made another way; the report has them."""
    methods = {name: {"kind": "full", "learning_rate": rate} for name, rate in (("full", 1e-2), ("slower", 1e-3))}
    given = with_drift(inputs, methods=methods, seeds=2, seeds_measure=["drift"])
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {"drift": figures.FIGURES["drift"]})
        run_study(parse_config(given, "test"), tmp_path)
    found = tables(tmp_path)
    rows = {(row["measure"], row["method_a"], row["method_b"]): row for row in found["seed_losses"]}
    pairs = [("base", "full"), ("base", "slower"), ("full", "slower")]
    assert list(rows) == [
        ("drift", "full", "slower"),
        *(("general_text", *pair) for pair in pairs),
        ("speech_loss", "full", "slower"),  # the base has no adaptor to hear through
    ]
    text = {row["model"]: row["loss"] for row in found["general_text"]}
    heard = {row["method"]: row["loss"] for row in found["perplexity"] if row["modality"] == "speech"}
    for (measure, a, b), row in rows.items():
        if of := {"general_text": text, "speech_loss": heard}.get(measure):
            ends = ("", "-seed1")
            each = [of[f"{b}{end}"] - of[a if a == "base" else f"{a}{end}"] for end in ends]
            assert row["values"] == pytest.approx(each, abs=1e-6), measure
        assert (row["seeds_a"], row["seeds_b"]) == (1 if a == "base" else 2, 2)
        assert row["difference"] == pytest.approx(sum(row["values"]) / 2)
    html = (tmp_path / "report.html").read_text()
    assert 'id="table-seed_losses"' in html
    drawing = draw("drift", by_method(read_inputs(tmp_path)))
    assert drawing is not None
    assert drawing.caption.endswith(
        " Means over training runs, where a method has several, and intervals over these too."
    )
    results = by_method(read_inputs(tmp_path)).results
    shown = {row["method"]: row for row in results["general_text_comparisons"]}
    assert shown["full"]["per_token_difference"] == rows["general_text", "base", "full"]["difference"]
    loss = {row["model"]: row["loss"] for row in results["general_text"]}
    assert loss["full"] == pytest.approx((text["full"] + text["full-seed1"]) / 2)
    kls = [
        [row["kl"] for row in found["drift"] if (row["model"], row["tokens"]) == (name, "all")]
        for name in ("full", "full-seed1")
    ]
    means = [row["kl"] for row in results["drift"] if (row["model"], row["tokens"]) == ("full", "all")]
    assert means == pytest.approx([(a + b) / 2 for a, b in zip(*kls, strict=True)])
    assert kls[0] != kls[1]


def test_without_the_section_there_is_no_step_of_it(inputs: Path) -> None:
    def names(config: dict[str, Any]) -> list[str]:
        made = [getattr(step, "func", step).__name__ for step in steps_of(parse_config(config, "test"))]
        return [name for name in made if name in ("own_text", "drift", "general_text")]

    assert names(with_drift(inputs, drift=None)) == names(recipe(inputs, adaptor=None)) == []
    assert names(with_drift(inputs, drift={})) == ["own_text", "drift", "drift"]
    assert names(with_drift(inputs)) == ["own_text", "general_text", *["drift", "general_text"] * 2]
    assert names(with_drift(inputs, seeds=2)) == names(with_drift(inputs))  # of first runs, unless asked for
    every = with_drift(inputs, seeds=2, seeds_measure=["drift"])
    assert names(every) == ["own_text", "general_text", *["drift", "general_text"] * 4]


def test_a_text_that_is_not_there_or_too_long_is_said_before_the_work(inputs: Path, tmp_path: Path) -> None:
    given = with_drift(inputs)
    given["drift"]["general_text"]["text"] = str(inputs / "none.txt")
    with pytest.raises(UserError, match=r"none\.txt' does not exist; give a file of text"):
        run_study(parse_config(given, "test"), tmp_path / "a")
    given = with_drift(inputs)
    given["drift"]["general_text"]["window"] = 2048
    with pytest.raises(UserError, match=r"drift\.general_text\.window: 2047"):
        run_study(parse_config(given, "test"), tmp_path / "b")
    assert not (tmp_path / "a" / "data").exists()
    assert not (tmp_path / "b" / "data").exists()
