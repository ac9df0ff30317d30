"""A whole study on tiny models: complete tables, resumable after SIGKILL in different steps, clear errors first."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from audio_files import BROKEN, voice_assistant, wav
from forked import forked
from palimpsest.commands import compare
from palimpsest.commands import report as report_command
from palimpsest.config import parse_config
from palimpsest.export.folders import export
from palimpsest.files import UserError, locked
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.light import LightWeights
from palimpsest.models.loading import StoredLanguageModel, load_language_model, load_speech_lm
from palimpsest.planning.needs import checkpoint_bytes
from palimpsest.planning.plan import setups_of
from palimpsest.planning.sizes import decoder_of, encoder_sizes
from palimpsest.progress import Reporter
from palimpsest.records import RESULT_TABLES
from palimpsest.report import figures, page
from palimpsest.study import steps, workspace
from palimpsest.study.live import LivePage, kind_of, name_of, progress_of, tables_so_far
from palimpsest.study.run import Study, run_study, sigterm_raised, unfinished
from palimpsest.ui.asking import open_panel
from tiny_study import numbered, write_inputs

METHODS = ("full", "layer_lr", "lora")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny checkpoints and manifests with noise for speech."""
    splits = numbered(24, 6, "What is {split} {i}?", "It is {i}.")
    return write_inputs(tmp_path_factory.mktemp("inputs"), splits, lambda i: 6_400 + 800 * (i % 5))


def recipe(inputs: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "models": {"language_model": str(inputs / "llm"), "encoder": str(inputs / "whisper"), "compute": "float32"},
        "speech": {"adaptor_hidden_size": 24, "calibrate_adaptor": True},
        "data": {
            "train": {"source": str(inputs / "train.jsonl"), "split": "train"},
            "heldout": {"source": str(inputs / "heldout.jsonl"), "split": "heldout"},
        },
        "methods": {kind: {"kind": kind, "learning_rate": 1e-3, "rank": 2} for kind in METHODS},
        "training": {"epochs": 1, "batch_size": 4, "checkpoint_every": 2},
        "importance": {"n_examples": 20, "batch_size": 2},
        "deactivation": {"random_seeds": 2},
        "analysis": {"shuffles": 1, "bootstrap": 100},
        "evaluation": {
            "tasks": [{"name": "numbers", "source": str(inputs / "heldout.jsonl"), "split": "heldout"}],
            "max_new_tokens": 4,
            "batch_size": 2,
        },
        **changes,
    }


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    del found["timings"]
    return found


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_study(parse_config(recipe(inputs), "test"), folder)
    return folder


@pytest.fixture
def stopped(inputs: Path, finished: Path, tmp_path: Path) -> tuple[Study, list[str]]:
    """A copy of the finished run without what the study's end writes, and the names of its steps in their order."""
    run = tmp_path / "stopped"
    shutil.copytree(finished, run)
    for name in ("results.json", "provenance.json", "report.html"):
        (run / name).unlink()
    study = Study(parse_config(recipe(inputs), "test"), run, Reporter(1, quiet=True))
    return study, [name_of(step) for step in study.steps]


def test_the_names_of_the_steps_are_their_folders(finished: Path, stopped: tuple[Study, list[str]]) -> None:
    there = {file.parent.relative_to(finished).as_posix() for file in finished.rglob("step.json")}
    assert set(stopped[1]) == there
    assert (
        kind_of("methods/full/samples/numbers-text") == kind_of("base/samples/numbers-text") == "samples/numbers-text"
    )


def test_the_tables_on_the_way_are_those_of_the_finished_models(
    finished: Path, stopped: tuple[Study, list[str]]
) -> None:
    """After the base's importance its layers; after a model's last step all of it, as in results.json."""
    study, names = stopped
    whole = results(finished)

    def at(last: str) -> dict[str, Any]:
        done = names[: names.index(last) + 1]
        return tables_so_far(study.ws.dir, study.ws.config, study.steps, done, study.ws.seed("results"))

    first = at("base/importance")
    assert not first["qa"]
    assert {row["model"] for row in first["layers"]} == {"base"}
    shares = {(r["layer"], r["kind"]): r["share"] for r in whole["layers"]
              if (r["model"], r["reduction"]) == ("base", "per_batch_abs")}  # fmt: skip
    assert {(row["layer"], row["kind"]): row["share"] for row in first["layers"]} == pytest.approx(shares)

    one = at("methods/layer_lr/importance")  # the second method is begun
    assert {row["method"] for row in one["qa"]} == {"base", "full"}
    assert {row["model"] for row in one["layers"]} == {"base", "full", "layer_lr"}
    assert one["probe"] == [row for row in whole["probe"] if row["model"] in ("base", "full")]
    assert [row["p_value"] for row in one["comparisons"]] == [
        row["p_value"] for row in whole["comparisons"] if {row["method_a"], row["method_b"]} == {"base", "full"}
    ]
    assert at("maps")["qa"] == whole["qa"]


def test_time_left_is_what_the_like_of_the_steps_took(stopped: tuple[Study, list[str]]) -> None:
    study, names = stopped
    done = names[: names.index("methods/full/checkpoint")]
    took = {name: json.loads((study.ws.path / name / "step.json").read_text())["seconds"] for name in done}
    progress = progress_of(study.ws.dir, names, done)
    assert "methods/full/checkpoint" in progress.to_come
    assert set(progress.untimed) >= {"checkpoint", "samples/numbers-speech", "analysis", "maps"}
    known = ("importance", "deactivation", "perplexity", "probe", "samples/numbers-text")
    assert progress.seconds_left == pytest.approx(3 * sum(took[f"base/{name}"] for name in known))


def test_the_page_on_the_way_says_what_is_to_come_and_changes_no_result(
    stopped: tuple[Study, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    study, names = stopped
    before = {file: file.read_bytes() for file in study.ws.path.rglob("*.json")}
    live = LivePage(study.ws.dir, study.ws.config, study.steps, study.ws.seed("results"), Reporter(1))
    live.after(names.index("base/importance") + 1)
    assert not (study.ws.path / "report.html").exists()  # of a study of seconds
    live.started -= 60
    live.after(names.index("data") + 1)
    assert not (study.ws.path / "report.html").exists()  # nothing is measured
    live.after(names.index("base/importance") + 1)
    page = (study.ws.path / "report.html").read_text(encoding="utf-8")
    assert f"Not finished: 3 of {len(names)} steps are there" in page
    assert "while base/importance_other runs" in page
    assert "Missing from this run" not in page
    assert 'http-equiv="refresh"' not in page
    assert "In the base, layer" in capsys.readouterr().err
    live.after(len(names) - 2)
    assert (study.ws.path / "report.html").read_text(encoding="utf-8") == page  # a short time ago
    assert {file: file.read_bytes() for file in study.ws.path.rglob("*.json")} == before


def test_what_cannot_be_drawn_is_said_once_and_stops_nothing(
    stopped: tuple[Study, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, names = stopped

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room\nfor a page")

    monkeypatch.setattr(page, "write_report", fail)
    live = LivePage(study.ws.dir, study.ws.config, study.steps, 0, Reporter(1))
    for _ in range(2):
        live.started, live.written = -1e9, None
        live.after(names.index("base/importance") + 1)
    assert capsys.readouterr().err.count("cannot be drawn (MemoryError: no room); the study goes on.") == 1


def test_the_report_of_a_stopped_study_has_what_is_there(
    stopped: tuple[Study, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "FIGURES", {})  # drawing is tested elsewhere
    monkeypatch.setattr(page, "FIGURES", {})
    study, names = stopped
    for name in ("lora", "layer_lr"):
        shutil.rmtree(study.ws.path / "methods" / name / "perplexity")
    inputs, progress = unfinished(study.ws.path)
    assert {row["method"] for row in inputs.results["qa"]} == {"base", "full"}
    assert progress.to_come == ("methods/layer_lr/perplexity", "methods/lora/perplexity")
    (said,) = report_command.run(report_command.Options([study.ws.path]))
    html_page = (study.ws.path / "report.html").read_text(encoding="utf-8")
    assert said == f"Report: {study.ws.path / 'report.html'}"
    assert f"Not finished: {len(names) - 2} of {len(names)} steps are there" in html_page
    assert "This resumes the study" in html_page


def test_every_table_is_there_for_every_model(finished: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    assert found["schema"] == 1
    assert set(found) == {"schema", *RESULT_TABLES}
    assert [table for table in RESULT_TABLES if not found[table]] == [
        *("voices", "speech_inputs"),
        *("drift", "general_text", "general_text_comparisons", "frontier", "equal_hearing"),  # not asked for
        *("predictors", "restoration"),  # of studies with drift
        "embeddings",  # none is given
        "importance_parts",
        "seeds",
        "seed_comparisons",
        "seed_losses",
        "pooled_comparisons",
    ]  # one run each
    models = {"base", *METHODS}
    assert {r["model"] for r in found["deactivation"]} == models
    assert {(r["method"], r["modality"]) for r in found["qa"]} == {("base", "text")} | {
        (method, modality) for method in METHODS for modality in ("text", "speech")
    }
    assert {r["model"] for r in found["layers"]} == models
    assert [r["model"] for r in found["probe"] if r["kind"] == "all"] == ["base", *METHODS]
    assert {r["source"] for r in found["qa"]} == {"measured"}
    assert {r["model"] for r in found["shift"]} == set(METHODS)
    assert {(r["model"], r["of"]) for r in found["clustering"]} == {
        ("base", "mask"),
        *((m, "importance") for m in models),
        *((m, of) for m in METHODS for of in ("delta", "delta_rank2")),
    }
    assert {r["model"] for r in found["mask_overlap"]} == set(METHODS)
    against_base = [r for r in found["mask_overlap"] + found["shift"] if r["reference"] == "base"]
    assert {r["model"] for r in against_base} == set(METHODS)
    assert all(r["noise_floor"] is not None for r in against_base)
    assert {r["method"] for r in found["delta"]} == set(METHODS)
    assert [r["claim"] for r in found["claims"]] == list(range(1, 9))
    measured = {(r["method"], r["modality"]): r for r in found["perplexity"]}
    assert set(measured) == {("base", "text")} | {(m, modality) for m in METHODS for modality in ("text", "speech")}
    for row in found["deactivation"]:  # the same model on the same examples, measured twice
        if row["condition"] == "base":
            assert measured[row["model"], row["modality"]]["perplexity"] == pytest.approx(row["perplexity"])
    floors = {(r["method"], r["modality"], r["floor"]) for r in found["qa_floors"]}
    assert {floor for _, _, floor in floors} == {"unrelated", "echo", "echo_in_sentence"}
    conditions = [(r["condition"], r["seed"]) for r in found["deactivation"] if r["model"] == "base"]
    assert [c for c, _ in conditions] == ["base", "top", "bottom", "random", "random"]
    n_weights = sum(r["n_parameters"] for r in found["layers"] if r["kind"] == "all" and r["model"] == "base") // 2
    assert {r["n_removed"] for r in found["deactivation"] if r["condition"] != "base"} == {round(0.03 * n_weights)}


def test_the_run_directory_is_complete(finished: Path) -> None:
    for name in ("study.yaml", "provenance.json", "report.html", "data/train.jsonl", "maps/importance.npz"):
        assert (finished / name).is_file(), name
    assert list((finished / "figures").glob("*.svg"))
    assert not (finished / ".working").exists()
    assert yaml.safe_load((finished / "study.yaml").read_text())["seed"] == 0
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["data"]["train"]["n"] == 24
    assert provenance["models"]["language_model"]["n_parameters"] > 0
    assert provenance["prompts"] == {
        "text": "<s><user>What is the capital of France?<end>\n<assistant>",
        "speech": "<s><user>[speech]\nAnswer the question asked in the speech.<end>\n<assistant>",
        "answer": "Paris.<end>",
    }
    assert all(text in html.unescape((finished / "report.html").read_text()) for text in provenance["prompts"].values())
    scales = json.loads((finished / "methods/layer_lr/checkpoint/layer_scales.json").read_text())
    assert sorted(scales.values()) == pytest.approx([0.6, 1.0])


@pytest.mark.usefixtures("no_figures")
def test_a_study_that_keeps_little_has_the_same_tables_and_its_models_still_work(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    little = recipe(inputs)
    little["models"]["checkpoints"] = "light"
    little["importance"] |= {"keep": ["signed_sum"], "keep_other": "masks"}
    run = tmp_path / "run"
    run_study(parse_config(little, "test"), run)
    assert results(run) == results(finished)
    assert sorted(path.name for path in (run / "base/importance_other").glob("*.safetensors")) == ["masks.safetensors"]
    assert not list(run.rglob("per_batch_abs*"))
    light = run / "methods/lora/checkpoint"
    assert not (light / "model.safetensors").exists()
    assert (run / "methods/full/checkpoint/model.safetensors").exists()
    whole = StoredLanguageModel(finished / "methods/lora/checkpoint")
    added = LightWeights(light, load_language_model(str(inputs / "llm"))[0])
    assert list(added) == list(whole)
    assert all(torch.equal(added[name], whole[name]) for name in whole)
    base = scored_parameters(load_language_model(str(inputs / "llm"))[0])
    assert not any(torch.equal(whole[name], weight) for name, weight in base.items())
    model, _ = load_speech_lm(light)
    before = load_file(finished / "methods/lora/checkpoint/model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)
    export(run, method="lora", text_llm=tmp_path / "text", adapter=tmp_path / "adapter", light=tmp_path / "light")
    export(run, method="full", speech_lm=tmp_path / "speech")
    tensors = load_file(tmp_path / "text/model.safetensors")
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.up_proj.weight"])
    assert open_panel(run).refusals.keys() == open_panel(finished).refusals.keys()
    run_study(parse_config(little, "test"), run)  # everything is there
    assert results(run) == results(finished)


def test_where_and_how_importance_is_summed_changes_no_number(inputs: Path, tmp_path: Path) -> None:
    def scored(**options: Any) -> Scores:
        little = recipe(inputs)
        little["importance"] |= options
        study = Study(parse_config(little, "test"), tmp_path / "-".join(map(str, options.values() or ["plain"])))
        steps.data(study.ws)
        steps.importance(study.ws, "base")
        assert not [path for path in study.ws.path.rglob("*") if path.name.startswith("tmp")]
        return study.ws.scores("base")

    plain = scored()
    for options in ({"offload": "cpu"}, {"offload": "disk"}, {"gradient_checkpointing": True}):
        other = scored(**options)
        for reduction in plain.reductions:
            for name, tensor in plain.tensors(reduction).items():
                assert torch.equal(tensor, other.tensors(reduction)[name]), (options, name)
    one = scored(keep=["signed_sum"], accumulate="kept")
    assert (one.reductions, one.estimated) == (("signed_sum",), ("signed_sum", "per_batch_abs"))
    sums = [float(plain.tensors("per_batch_abs")[name].double().sum()) for name in plain.names]
    assert one.sums["per_batch_abs"] == pytest.approx(sums, rel=1e-6)
    assert plain.metadata["reductions"] == one.metadata["reductions"]


@pytest.mark.usefixtures("no_figures")
def test_a_step_that_the_disk_is_too_small_for_is_named_before_the_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(recipe(inputs), "test")
    ws = Study(config, tmp_path / "run").ws
    decoder = decoder_of(load_language_model(str(inputs / "llm"))[0])
    score = 4 * decoder.matrices
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 4 * score - 1)  # two models by two reductions
    with pytest.raises(UserError, match=r"needs .* GB by its step base/importance_other but"):
        ws.require_disk()
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 4 * score)
    with pytest.raises(UserError, match=r"by its step methods/full/checkpoint but .*Keeping less"):
        ws.require_disk()
    encoder = encoder_sizes(str(inputs / "whisper"))[0]
    whole = checkpoint_bytes(setups_of(config, decoder, encoder)["full"], light=False)  # without the Trainer's own
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 4 * score + whole)
    with pytest.raises(UserError, match=r"by its step methods/full/checkpoint but"):
        ws.require_disk()
    monkeypatch.setattr(workspace, "free_bytes", lambda folder: 4 * score + 100)
    with pytest.raises(UserError, match=r"by its step features but"):
        ws.require_disk(4 * score + 101)


def test_a_finished_study_can_be_compared(finished: Path, tmp_path: Path) -> None:
    lines = list(compare.run(compare.Options([finished], tmp_path, metric="token_sequence")))
    assert "## Loss on target answers" in lines
    tables = json.loads((tmp_path / "compare.json").read_text())
    pairs = {(r["method_a"], r["method_b"], r["modality"]) for r in tables["perplexity"]}
    assert ("base", "full", "text") in pairs
    assert ("full", "lora", "speech") in pairs
    stored = json.loads((finished / "results.json").read_text())["comparisons"]
    assert len(stored) == len(tables["accuracy"]) == 3 * 2 + 3


@pytest.mark.usefixtures("no_figures")
def test_a_second_run_skips_every_step_and_gives_the_same(finished: Path, inputs: Path) -> None:
    before = results(finished)
    steps = {path: path.stat().st_mtime_ns for path in finished.rglob("step.json")}
    run_study(parse_config(recipe(inputs), "test"), finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("step.json")} == steps
    assert results(finished) == before


@pytest.mark.usefixtures("no_figures")
def test_a_changed_method_runs_only_what_depends_on_it(finished: Path, inputs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    steps = {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")}
    changed = recipe(inputs)
    changed["methods"]["lora"]["rank"] = 3
    with pytest.raises(UserError, match=r"another recipe \(methods\.lora\.rank: 2 → 3\); give --changed"):
        run_study(parse_config(changed, "test"), copy)
    assert {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")} == steps
    run_study(parse_config(changed, "test"), copy, changed=True)
    again = {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")}
    differing = {str(path.parent) for path in steps if steps[path] != again[path]}
    assert differing == {
        "methods/lora/checkpoint",
        "methods/lora/importance",
        "methods/lora/deactivation",
        "methods/lora/perplexity",
        "methods/lora/probe",
        "methods/lora/samples/numbers-text",
        "methods/lora/samples/numbers-speech",
        "analysis",
        "maps",
    }


def test_changes_are_cut_to_the_rank_of_the_lora_that_the_claim_is_about(inputs: Path, tmp_path: Path) -> None:
    ranks = {"lora_r4": 4, "lora": 2}
    loras = {name: {"kind": "lora", "learning_rate": 1e-3, "rank": rank} for name, rank in ranks.items()}
    assert Study(parse_config(recipe(inputs, methods=loras), "test"), tmp_path / "a").ws.rank == 2
    del loras["lora"]
    assert Study(parse_config(recipe(inputs, methods=loras), "test"), tmp_path / "b").ws.rank == 4


def test_what_was_done_of_a_step_that_begins_anew_is_said_and_stays_where_there_is_room(
    stopped: tuple[Study, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ws, said = stopped[0].ws, list[str]()
    monkeypatch.setattr(ws.reporter, "note", said.append)
    left = ws.path / ".working" / f"methods__full__checkpoint-{'0' * 16}"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"0" * 1000)
    ws._say_why("methods/full/checkpoint", {"other": 1})
    assert said[0].startswith(
        "methods/full/checkpoint was begun with other inputs or other code and begins anew; the 0.00"
    )
    assert f"stay in {left} until this is finished" in said[0]
    assert left.exists()
    monkeypatch.setattr(workspace, "free_bytes", lambda path: 1999)
    ws._say_why("methods/full/checkpoint", {"other": 1})
    assert said[-1].endswith("GB that were done of it are deleted to make room.")
    assert not left.exists()


@pytest.mark.usefixtures("no_figures")
def test_the_next_start_works_on_data_that_changed_as_a_run_from_nothing_does(inputs: Path, tmp_path: Path) -> None:
    mine, run = tmp_path / "inputs", tmp_path / "run"
    shutil.copytree(inputs, mine)
    full = {"full": {"kind": "full", "learning_rate": 1e-3}}
    config = parse_config(recipe(mine, methods=full), "test")
    weights = "methods/full/checkpoint/model.safetensors"
    run_study(config, run)
    before, trained = results(run), (run / weights).read_bytes()
    for split in ("train", "heldout"):  # the ids stay; one question goes
        rows = [json.loads(line) for line in (mine / f"{split}.jsonl").read_text().splitlines()[:-1]]
        rows = [{**row, "answer": f"No: {row['answer']}"} for row in rows]
        (mine / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_study(config, run)
    run_study(config, tmp_path / "new")
    assert results(run) == results(tmp_path / "new") != before
    assert (run / weights).read_bytes() == (tmp_path / "new" / weights).read_bytes() != trained


@pytest.mark.usefixtures("no_figures")
def test_a_further_scope_stands_beside_the_first_and_changes_nothing_else(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    steps = {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")}
    both = recipe(inputs, deactivation={"random_seeds": 2, "scope": ["global", "per_matrix"]})
    run_study(parse_config(both, "test"), copy, changed=True)
    again = {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")}
    differing = {str(path.parent) for path in steps if steps[path] != again[path]}
    assert differing == {"base/deactivation", *(f"methods/{method}/deactivation" for method in METHODS)}
    before, after = results(finished), results(copy)
    assert [row for row in after["deactivation"] if row["scope"] == "global"] == before["deactivation"]
    within = [row for row in after["deactivation"] if row["scope"] == "per_matrix"]
    settings = [(row["model"], row["modality"], row["condition"], row["seed"]) for row in within]
    assert settings == [
        (row["model"], row["modality"], row["condition"], row["seed"]) for row in before["deactivation"]
    ]
    whole = {(row["model"], row["modality"]): row["loss"] for row in before["deactivation"] if not row["ratio"]}
    assert {(row["model"], row["modality"]): row["loss"] for row in within if not row["ratio"]} == whole
    assert {row["loss"] for row in within if row["ratio"]}.isdisjoint(
        row["loss"] for row in before["deactivation"] if row["condition"] == "random"
    )
    notes = [next(row["note"] for row in found["claims"] if row["claim"] == 1) for found in (before, after)]
    assert "scope" not in notes[0]
    assert notes[1].count("scope global") == notes[1].count("scope per_matrix") == 9
    for table in RESULT_TABLES:
        if table not in ("deactivation", "claims", "timings"):
            assert after[table] == before[table], table


@pytest.mark.usefixtures("no_figures")
def test_damaged_files_are_named_and_made_again_and_what_the_recipe_drops_is_set_aside(
    finished: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    samples = copy / "methods/full/samples/numbers-text/samples.jsonl"
    scores = next((copy / "base/importance").glob("*.safetensors"))
    samples.write_text(samples.read_text().replace("response", "answered", 1))
    os.truncate(scores, 100)
    less = recipe(inputs)
    del less["methods"]["lora"]
    with locked(copy), pytest.raises(UserError, match="by this process"):
        run_study(parse_config(less, "test"), copy, changed=True)
    capsys.readouterr()
    run_study(parse_config(less, "test"), copy, changed=True)
    said = capsys.readouterr().err
    assert f"{copy}/base/importance was finished before and is made again: its {scores.name} has 100 bytes" in said
    assert "methods/full/samples/numbers-text was finished before and is made again: its samples.jsonl was" in said
    assert "this recipe makes no methods/lora/checkpoint" in said
    assert not (copy / "methods/lora").exists()
    assert (copy / ".set-aside/methods/lora/checkpoint/config.json").exists()
    kept = [row for row in results(finished)["qa"] if row["method"] != "lora"]
    assert results(copy)["qa"] == kept
    assert (copy / "base/importance" / scores.name).read_bytes() == (
        finished / "base/importance" / scores.name
    ).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_the_order_of_methods_is_part_of_the_analysis(finished: Path, inputs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    other = recipe(inputs)
    other["methods"] = dict(reversed(other["methods"].items()))
    before = (copy / "analysis/step.json").read_text()
    run_study(parse_config(other, "test"), copy, changed=True)
    assert (copy / "analysis/step.json").read_text() != before


def test_controls_are_trained_and_a_model_tuned_on_text_is_not_asked_in_speech(inputs: Path, tmp_path: Path) -> None:
    methods = {
        "adaptor": {"kind": "adaptor", "learning_rate": 1e-3},
        "full_text": {"kind": "full", "learning_rate": 1e-3, "modality": "text"},
        "layer_lr_inverted": {"kind": "layer_lr", "importance": "inverted"},
    }
    small = recipe(inputs, methods=methods, importance={"n_examples": 8, "batch_size": 2})
    small["data"]["train"]["limit"] = 8
    small["training"] = {**small["training"], "eval_every": 1, "adaptor_first": {"epochs": 1, "learning_rate": 1e-3}}
    report = run_study(parse_config(small, "test"), tmp_path / "run")
    found = results(tmp_path / "run")
    asked = {(r["method"], r["modality"]) for r in found["qa"]}
    assert asked == {(m, "text") for m in ("base", *methods)} | {(m, "speech") for m in methods if m != "full_text"}
    assert {(r["model"], r["modality"]) for r in found["deactivation"]} == asked
    evaluated = {(r["method"], r["modality"]) for r in found["training"] if r["kind"] == "eval"}
    assert evaluated == {pair for pair in asked if pair[0] != "base"}
    assert {r["method"] for r in found["training"] if r["phase"] == "adaptor"} == {"adaptor", "layer_lr_inverted"}
    # The adaptor alone was trained: the language model is the base's to the last bit. Tuning on text moved it.
    assert {r["relative_norm"] for r in found["delta"] if r["method"] == "adaptor"} == {0.0}
    assert all(r["relative_norm"] > 0 for r in found["delta"] if r["method"] != "adaptor")
    scales = {m: tmp_path / "run/methods" / m / "checkpoint/layer_scales.json" for m in methods}
    assert [m for m, path in scales.items() if path.exists()] == ["layer_lr_inverted"]
    assert "not asked in speech: full_text" in report.read_text()


def appeared(folder: Path, pattern: str) -> bool:
    """Whether a file is there; the study makes and removes the folder while this looks."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_killed_in_different_steps_it_continues_and_ends_the_same(finished: Path, inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(inputs)))
    command = [sys.executable, "-m", "palimpsest.cli", "study", str(path), "--out", str(tmp_path / "run")]
    markers = [
        "base__importance-*",
        "methods__full__checkpoint-*/trainer/checkpoint-*",
        "methods__lora__samples__numbers-speech-*/samples.jsonl",
    ]
    for marker in markers:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not appeared(tmp_path / "run" / ".working", marker):
            assert process.poll() is None, f"the study ended before {marker}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "run" / "results.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert results(tmp_path / "run") == results(finished)


def test_a_study_that_is_terminated_says_that_it_continues(inputs: Path, tmp_path: Path) -> None:
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe(inputs)))
    code = f"""
import os, runpy, signal, sys
from palimpsest.study.run import Study
Study.run = lambda study: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["palimpsest", "study", {str(path)!r}, "--out", {str(run)!r}]
runpy.run_module("palimpsest.cli", run_name="__main__", alter_sys=True)
"""
    done = forked("import torch, transformers.trainer", code)
    assert done.returncode == 128 + signal.SIGTERM == 143
    assert done.stderr == f"note: stopped; the same command continues in {run}.\n"
    assert done.stdout == ""


def test_sigterm_is_left_alone_outside_a_study_in_a_thread_and_where_it_is_handled() -> None:
    def handler() -> Any:
        with sigterm_raised():
            return signal.getsignal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(handler).result() is signal.SIG_DFL
        assert handler() is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert handler() is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_data_from_a_table_held_out_by_hash_and_what_was_dropped(inputs: Path, tmp_path: Path) -> None:
    """The data step alone: recordings written out of the table, faulty rows listed and counted, done only once."""
    turns = [("1", f"Is it {i}?", f"It is {i}.", wav(pitch=200 + i)) for i in range(12)]
    turns += [("2", "And?", "A.", wav()), ("1", "Heard?", "A.", BROKEN["silent audio"])]
    source = f"voice_assistant:{voice_assistant(tmp_path / 'x.parquet', turns)}"
    data = {"train": {"source": source, "split": "train"}, "heldout_examples": 4}
    study = Study(parse_config(recipe(inputs, data=data), "test"), tmp_path / "run")
    study.ws.sources.check()
    steps.data(study.ws)
    folder = tmp_path / "run" / "data"
    groups = study.ws.groups
    assert set(groups) == {"train", "heldout", "task-numbers"}
    assert len(groups["heldout"]) + len(groups["train"]) == 12
    assert all(e.audio and e.audio.is_relative_to(folder / "audio") for e in groups["train"] + groups["heldout"])
    rows = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in rows) == ["later turn", "silent audio"]
    assert sum(study.ws.dropped.get("train", {}).values()) + sum(study.ws.dropped.get("heldout", {}).values()) == 2
    again = Study(parse_config(recipe(inputs, data=data), "test"), tmp_path / "run")
    steps.data(again.ws)
    assert again.ws.done[0].skipped
    strict = Study(parse_config(recipe(inputs, data={**data, "strict": True}), "test"), tmp_path / "run")
    with pytest.raises(UserError, match="row 14: silent audio"):
        steps.data(strict.ws)


def test_transcripts_are_asked_of_every_model_and_the_base_s_answers_to_them_are_its_cascade(
    finished: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import palimpsest.evaluation.cascade as cascade
    import palimpsest.models.loading as loading

    def hear(_: object, __: object, examples: Any, **_more: object) -> dict[str, str]:
        return {e.id: e.question.replace("is", "was") for e in examples}

    monkeypatch.setattr(cascade, "transcribe", hear)
    monkeypatch.setattr(loading, "load_asr", lambda name, device: (None, None))
    for module in (figures, page):  # the drawing that shows these modalities alone; most of the time goes into drawing
        monkeypatch.setattr(module, "FIGURES", {"t2t_s2t": figures.FIGURES["t2t_s2t"]})
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("step.json")}
    changed = recipe(inputs)
    changed["models"]["asr"] = str(inputs / "whisper")
    changed["evaluation"]["text_asr"] = True
    run_study(parse_config(changed, "test"), copy, changed=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # only steps that are new
    found = results(copy)
    transcripts = {}
    for folder in ("base/samples/numbers-cascade", *(f"methods/{m}/samples/numbers-text_asr" for m in METHODS)):
        rows = [json.loads(line) for line in (copy / folder / "samples.jsonl").read_text().splitlines()]
        transcripts[folder] = [row["transcript"] for row in rows]
        assert all(f"<user>{row['transcript']}<end>" in row["prompt"] for row in rows)
    assert set(map(tuple, transcripts.values())) == {tuple(f"What was heldout {i}?" for i in range(6))}
    asked = {(r["method"], r["modality"]) for r in found["qa"]}
    assert {("base", "cascade"), ("base", "text_asr"), ("lora", "text_asr")} <= asked
    base = [{**r, "modality": ""} for r in found["qa"] if r["method"] == "base" and r["modality"] == "cascade"]
    assert base == [{**r, "modality": ""} for r in found["qa"] if (r["method"], r["modality"]) == ("base", "text_asr")]
    assert {r["method_b"] for r in found["comparisons"] if r["modality"] == "text_asr"} == set(METHODS)


@pytest.mark.slow
def test_training_killed_in_both_phases_gives_the_same_weights(inputs: Path, tmp_path: Path) -> None:
    """Token budget, accumulation, adaptor first, LoRA with dropout, perplexities between steps; SIGKILL, resume."""
    first = {"epochs": 2, "learning_rate": 1e-3, "target": "repeat"}
    training = {
        "epochs": 2, "batch_size": 4, "max_tokens": 330, "accumulation": 2, "checkpoint_every": 1, "eval_every": 3,
        "adaptor_first": first,
    }  # fmt: skip
    methods = {"lora": {"kind": "lora", "learning_rate": 1e-3, "rank": 2, "dropout": 0.3, "targets": ["q_proj"]}}
    values = recipe(inputs, training=training, methods=methods)
    run_study(parse_config(values, "test"), tmp_path / "whole")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "palimpsest.cli", "study", str(path), "--out", str(tmp_path / "cut")]
    trainer = "methods__lora__checkpoint-*/trainer"
    for marker in ("adaptor/checkpoint-2", "adaptor/done.safetensors", "checkpoint-3"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not appeared(tmp_path / "cut" / ".working", f"{trainer}/{marker}"):
            assert process.poll() is None, f"the study ended before {marker}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    whole, cut = (tmp_path / name / "methods" / "lora" / "checkpoint" for name in ("whole", "cut"))
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    assert (whole / "training.json").read_text() == (cut / "training.json").read_text()
    records = json.loads((cut / "training.json").read_text())
    assert {(r["kind"], r["phase"], r.get("modality")) for r in records} == {
        (kind, phase, modality)
        for kind, modality in (("train", None), ("eval", "text"), ("eval", "speech"))
        for phase in ("adaptor", "method")
    }


def test_an_example_above_the_budget_is_told_before_anything_is_scored(inputs: Path, tmp_path: Path) -> None:
    values = recipe(inputs, training={"max_tokens": 20})
    with pytest.raises(
        UserError, match=r"The example 'train\d+' has \d+ tokens and the budget training\.max_tokens is 20"
    ):
        run_study(parse_config(values, "test"), tmp_path / "run")
    assert not (tmp_path / "run" / "base").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicas", "sharded"])
def test_two_processes_give_the_study_of_one(finished: Path, inputs: Path, tmp_path: Path, layout: str) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(inputs)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    study = ["-m", "palimpsest.cli", "study", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if layout == "sharded" else {}
    done = subprocess.run([*launch, *study], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Report:") == 1
    assert done.stderr.count("methods/lora/checkpoint") == 1  # one process reports
    one, two = results(finished), results(tmp_path / "run")
    for table in ("training", "layers", "deactivation"):
        assert len(one[table]) == len(two[table])
        for a, b in zip(one[table], two[table], strict=True):
            assert a == {
                key: pytest.approx(value, rel=5e-3) if isinstance(value, float) else value for key, value in b.items()
            }
    # One process finds every step done.
    steps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step.json")}
    run_study(parse_config(recipe(inputs), "test"), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step.json")} == steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"report_to": ["tensorbord"]}}, "tensorbord"),
        ({"training": {"liger": True}, "models": {"language_model": "x", "encoder": "y", "device": "cpu"}}, "liger"),
        ({"data": {key: {"source": "none.jsonl", "split": key} for key in ("train", "heldout")}}, r"none\.jsonl"),
        ({"models": {"language_model": "./nowhere", "encoder": "./nowhere"}}, "nowhere is not a folder"),
        ({"models": {"language_model": "embedded:none", "encoder": "embedded:none"}}, "no embedded model"),
        ({"prompt": {"template_arguments": {"reasoning": "low"}}}, "does not use 'reasoning'"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_the_work_starts(inputs: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_study(parse_config(recipe(inputs, **change), "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_called_figures_is_named_before_the_work_starts(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("somebody's notes")
    with pytest.raises(UserError, match=r"figures is a file, .*; move the file away"):
        run_study(parse_config(recipe(inputs), "test"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


def _rename_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({f"module.{key}": t for key, t in load_file(file).items()}, file, metadata={"format": "pt"})


def _refuse_system_turns(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    file.write_text(refusal + file.read_text())


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("llm", _rename_weights, r"llm is no checkpoint of LlamaForCausalLM .*module\.model"),
        ("whisper", _rename_weights, "whisper is no checkpoint of WhisperModel"),
        ("llm", _refuse_system_turns, r"refuses the prompt \(No system role\); leave out prompt\.system"),
        ("llm", lambda folder: (folder / "tokenizer.json").write_text("{"), "llm could not be loaded as AutoTokenizer"),
        ("whisper", lambda folder: (folder / "preprocessor_config.json").unlink(), "WhisperFeatureExtractor"),
    ],
)
def test_models_and_prompts_are_looked_at_before_the_work_starts(
    inputs: Path, tmp_path: Path, part: str, spoil: Any, message: str
) -> None:
    for name in ("llm", "whisper"):
        shutil.copytree(inputs / name, tmp_path / name)
    spoil(tmp_path / part)
    models = {"language_model": str(tmp_path / "llm"), "encoder": str(tmp_path / "whisper"), "compute": "float32"}
    with pytest.raises(UserError, match=message):
        run_study(parse_config(recipe(inputs, models=models, prompt={"system": "Be brief."}), "test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_figures")
def test_another_chat_template_is_another_study(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """Everything that is asked or trained with a prompt is made again, and nothing else."""
    copy, template = tmp_path / "run", inputs / "llm" / "chat_template.jinja"
    shutil.copytree(finished, copy)
    steps = {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")}
    before = template.read_text()
    template.write_text(before.replace("<end>", "<end> "))
    try:
        run_study(parse_config(recipe(inputs), "test"), copy)
    finally:
        template.write_text(before)
    again = {path.relative_to(copy): path.read_text() for path in copy.rglob("step.json")}
    assert {str(path.parent) for path in steps if steps[path] == again[path]} == {"data", "features"}
