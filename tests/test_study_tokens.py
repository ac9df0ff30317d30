"""Both paradigms in one study: methods that read encoder frames beside methods that read speech tokens."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from palimpsest.commands import ask, diagnose, evaluate
from palimpsest.config import parse_config
from palimpsest.data.examples import read_manifest
from palimpsest.data.features import Features
from palimpsest.evaluation.spoken import recording_answerer
from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.models.loading import load_speech_lm
from palimpsest.models.speech_lm import SpeechAdaptor
from palimpsest.models.tokens import SpeechTokenizer, read_tokens, rows_heard, rows_like, write_tokens
from palimpsest.models.trained_adaptor import read_adaptor
from palimpsest.parallel import is_main, joined, wait_for_all
from palimpsest.report import figures, page
from palimpsest.report.inputs import read_inputs
from palimpsest.report.side_by_side import Run, tables_of
from palimpsest.rundir import RECIPES
from palimpsest.study import steps
from palimpsest.study.live import name_of
from palimpsest.study.run import Study, run_study
from palimpsest.ui.asking import ask_everyone, open_panel
from ranks import find_each_other, written_by_ranks
from test_speech_tokens import save_tiny_codec
from test_study_adaptor import N_HELDOUT, N_TRAIN, inputs, recipe
from tiny import tiny_llama

__all__ = ["inputs"]  # a fixture

K, FEWER = 8, 4
IDLE = 1e-30  # a step of it changes no float32


def both(folder: Path) -> dict[str, Any]:
    tokens = {"kind": "kmeans", "k": K, "pool": 2, "start": "adaptor"}
    written = recipe(folder, speech={"adaptor_hidden_size": 24, "tokens": tokens})
    written["models"]["checkpoints"] = "light"
    written["drift"] = {"own_text": {"n_texts": 4, "new_tokens": 4}}
    written["methods"] = {
        "full": {"kind": "full", "learning_rate": 1e-2},
        "full_tokens": {"kind": "full", "learning_rate": 1e-2, "speech": "tokens"},
        # As points of a curve: asked and measured for drift, without importance.
        "lora_tokens": {
            "kind": "lora", "learning_rate": 1e-2, "adaptor_learning_rate": IDLE, "speech": "tokens", "curve": "lora",
        },
        "quantised": {"kind": "adaptor", "learning_rate": IDLE, "speech": "centroids", "curve": "quantised"},
        "fewer": {
            "kind": "lora", "learning_rate": 1e-2, "adaptor_learning_rate": IDLE, "speech": "tokens", "k": FEWER,
            "curve": "fewer",
        },
    }  # fmt: skip
    return written


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {})
        run_study(parse_config(both(inputs), "test"), folder)
    return folder


def fingerprints(folder: Path) -> dict[str, str]:
    steps = json.loads((folder / "provenance.json").read_text())["steps"]
    return {name: step["fingerprint"] for name, step in steps.items()}


def test_both_paradigms_stand_in_one_report_in_pairs(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    asked = {(row["method"], row["modality"]) for row in results["qa"]}
    assert asked == {(name, m) for name in ("base", *both(finished)["methods"]) for m in ("text", "speech")}
    pairs = {(row["method_a"], row["method_b"], row["modality"]) for row in results["comparisons"]}
    assert {("full", "full_tokens", "text"), ("full", "full_tokens", "speech")} <= pairs
    found = {(row["method"], row["reference"], row["measure"], row["of"]): row for row in results["speech_inputs"]}
    of = [("t2t", "numbers"), ("s2t", "numbers"), *(("shift", it) for it in ("jensen_shannon", "wasserstein_1"))]
    of += [("drift", kind) for kind in ("plain", "chat")]
    assert found.keys() == {("full_tokens", "full", *it) for it in of}  # the others have no like
    for (*_, measure, kind), row in found.items():
        assert row["difference"] == pytest.approx(row["value"] - row["value_reference"])
        if measure == "drift":
            kls = {r["model"]: r["kl"] for r in results["drift"] if (r["text"], r["tokens"]) == (kind, "all")}
            assert (row["value"], row["value_reference"]) == pytest.approx((kls["full_tokens"], kls["full"]))
            assert row["ci_low"] <= row["difference"] <= row["ci_high"]
        if measure == "shift":
            moved = {
                r["model"]: r["value"]
                for r in results["shift"]
                if (r["measure"], r["reduction"], r["reference"]) == (kind, "per_batch_abs", "base")
            }
            assert (row["value"], row["value_reference"]) == pytest.approx((moved["full_tokens"], moved["full"]))
    page = (finished / "report.html").read_text()
    assert "Speech as tokens against speech as encoder frames" in page
    assert {row["model"] for row in results["shift"]} >= {"full", "full_tokens"}
    for name in both(finished)["methods"]:
        samples = (finished / f"methods/{name}/samples/numbers-speech/samples.jsonl").read_text().splitlines()
        assert len(samples) == N_HELDOUT, name


def test_importance_of_layers_old_rows_and_new_rows_is_a_table(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    rows = {(row["model"], row["reduction"], row["part"]): row for row in results["importance_parts"]}
    parts = ("layers", "old_rows", "new_rows")
    assert rows.keys() == {("full_tokens", kind, part) for kind in ("signed_sum", "per_batch_abs") for part in parts}
    for kind in ("signed_sum", "per_batch_abs"):
        assert sum(rows["full_tokens", kind, part]["share"] for part in parts) == pytest.approx(1)
    new = rows["full_tokens", "signed_sum", "new_rows"]
    assert new["n_rows"] == K
    assert 1 <= new["n_reached"] <= K
    assert not (finished / "methods/full/importance_parts").exists()
    assert "Importance on spoken questions: layers, old rows and new rows" in (finished / "report.html").read_text()


def test_the_tokens_are_a_step_with_its_provenance(finished: Path) -> None:
    described = json.loads((finished / "tokens/tokens.json").read_text())
    assert (described["k"], described["pool"]) == (K, 2)
    for group in ("train", "heldout"):
        assert described["speech"][group]["per_second"] == pytest.approx(25, rel=0.05)
        assert described["speech"][group]["collapsed_per_second"] < 25
    models = json.loads((finished / "provenance.json").read_text())["models"]
    about = models["tokens"]
    assert about == read_tokens(finished / "tokens/tokenizer.safetensors").about
    assert about["features"] == fingerprints(finished)["features"]
    assert models["tokens_by_k"] == {
        str(k): read_tokens(finished / folder / "tokenizer.safetensors").about
        for k, folder in ((K, "tokens"), (FEWER, f"tokens-{FEWER}"))
    }


def test_a_method_may_have_a_k_of_its_own(finished: Path) -> None:
    fitted = read_tokens(finished / f"tokens-{FEWER}/tokenizer.safetensors")
    assert fitted.k == FEWER
    stored = load_file(finished / "methods/fewer/checkpoint/adaptor.safetensors")
    assert torch.equal(stored["quantiser.centroids"], fitted.tensors["centroids"])
    assert torch.equal(stored["rows.weight"], load_file(finished / f"tokens-{FEWER}/rows.safetensors")["rows"])
    reads = {name for name in fingerprints(finished) if fingerprints(finished)[f"tokens-{FEWER}"] in
             (finished / name / "step.json").read_text()}  # fmt: skip
    assert reads == {f"tokens-{FEWER}", "methods/fewer/checkpoint"}


def test_rows_start_from_what_the_adaptor_makes_of_their_frames(finished: Path, inputs: Path) -> None:
    trained = read_adaptor(str(inputs / "light"))
    adaptor = SpeechAdaptor(16, trained.hidden, trained.output, trained.stack_factor)
    adaptor.load_state_dict(trained.tensors)
    quantiser = read_tokens(finished / "tokens/tokenizer.safetensors").quantiser()
    frames = Features(finished / "features/train")
    expected, counts = rows_heard(adaptor, quantiser, (frames[f"train{i}"] for i in range(8)))
    assert (counts > 0).all()
    stored = load_file(finished / "methods/lora_tokens/checkpoint/adaptor.safetensors")
    assert torch.equal(stored["rows.weight"], expected)
    quantised = load_file(finished / "methods/quantised/checkpoint/adaptor.safetensors")
    assert all(torch.equal(quantised[name], tensor) for name, tensor in trained.tensors.items())
    assert torch.equal(quantised["quantiser.centroids"], quantiser.centroids)
    moved = load_file(finished / "methods/full_tokens/checkpoint/model.safetensors")["adaptor.rows.weight"] - expected
    assert (moved.abs().sum(1) > 0).all()  # every token was said in training


def test_a_checkpoint_answers_recordings_by_itself(finished: Path) -> None:
    """A processor's counts are those of all tokens; which of them are left out, the model sees."""
    model, processor = load_speech_lm(finished / "methods/full_tokens/checkpoint")
    assert (processor.stack_factor, processor.rounded_to) == (2, 5)  # as the frames of the study
    path = finished / "methods/full_tokens/samples/numbers-speech/samples.jsonl"
    expected = [json.loads(line)["response"] for line in path.read_text().splitlines()]
    asked = read_manifest(finished / "data/task-numbers.jsonl")
    assert [answer.response for answer in recording_answerer(model, processor, 4)(asked, "speech")] == expected


def test_the_report_on_the_way_knows_every_step(inputs: Path, finished: Path) -> None:
    study = Study(parse_config(both(inputs), "test"), finished)
    assert {name_of(step) for step in study.steps} == fingerprints(finished).keys()


def test_another_tokenizer_would_touch_what_reads_tokens_alone(finished: Path) -> None:
    fingerprint = fingerprints(finished)["tokens"]
    reading = {name: fingerprint in (finished / name / "step.json").read_text() for name in fingerprints(finished)}
    trained = {name for name in reading if name.endswith("/checkpoint")}
    without = {"methods/full/checkpoint", "methods/fewer/checkpoint"}
    assert {name for name, reads in reading.items() if reads} == (trained - without) | {"tokens"}
    given = {name: json.loads((finished / name / "step.json").read_text())["inputs"]["speech"] for name in trained}
    assert {name for name, of in given.items() if of["tokens"] is None} == {"methods/full/checkpoint"}


@pytest.fixture(scope="module")
def of_codec(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The steps of a method that reads a codec's tokens, without those of the base."""
    folder = tmp_path_factory.mktemp("codec")
    save_tiny_codec(folder / "codec", "mimi")
    tokens = {"kind": "codec", "codec": str(folder / "codec"), "k": 32}
    written = recipe(inputs, adaptor=None, speech={"tokens": tokens})
    written["models"]["checkpoints"] = "light"
    written["methods"] = {"rows": {"kind": "adaptor", "learning_rate": 1e-2, "speech": "tokens"}}
    written["training"]["max_tokens"] = 200
    study = Study(parse_config(written, "test"), folder / "run")
    study.check()
    for step in (steps.data, steps.features, steps.tokens):
        step(study.ws)
    written["training"]["max_tokens"] = 20
    less = Study(parse_config(written, "test"), folder / "run").ws
    for step in (steps.data, steps.features):
        step(less)
    with pytest.raises(UserError, match=r"training\.max_tokens"):  # known when the codec has read the recordings
        steps.tokens(less)
    for measure in (steps.train, steps.perplexity, partial(steps.answers, task="numbers", modality="speech")):
        measure(study.ws, model="rows")
    return study


def test_a_codec_takes_the_place_of_the_frames(of_codec: Study) -> None:
    tmp_path, study = of_codec.ws.path.parent, of_codec
    rows = [json.loads(line) for line in (tmp_path / "run/tokens/train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"train{i}" for i in range(N_TRAIN)]
    assert [len(row["ids"]) for row in rows] == [-(-(6_400 + 800 * i) // 1_280) for i in range(N_TRAIN)]  # of 0.08 s
    described = json.loads((tmp_path / "run/tokens/tokens.json").read_text())
    assert described["speech"]["train"]["per_second"] == pytest.approx(12.5)
    moved = load_file(tmp_path / "run/methods/rows/checkpoint/adaptor.safetensors")["rows.weight"]
    fresh = study.ws.new_speech_lm("rows").adaptor.get_parameter("rows.weight").detach()
    said = sorted({token for row in rows for token in row["ids"]})
    unsaid = [token for token in range(32) if token not in said]
    assert (moved[said] != fresh[said]).any(1).all()
    assert torch.equal(moved[unsaid], fresh[unsaid])
    assert len((tmp_path / "run/methods/rows/samples/numbers-speech/samples.jsonl").read_text().splitlines()) == 4


def test_without_its_codec_a_model_is_not_given_recordings(of_codec: Study, inputs: Path, tmp_path: Path) -> None:
    run, wave = of_codec.ws.path, inputs / "heldout0.wav"
    light = str(run / "methods/rows/checkpoint")
    model, processor = load_speech_lm(light)
    with pytest.raises(UserError, match="which is no part of it"):
        model(**processor(audio=np.zeros(8_000, np.float32)))
    export.export(run, speech_lm=tmp_path / "whole")
    for folder in (light, str(tmp_path / "whole")):
        with pytest.raises(UserError, match=r"reads the tokens of a codec, which is no part of it.*ask it in text"):
            ask.ask(ask.Options(folder, audio=wave))
        options: dict[str, Any] = {"task": str(inputs / "heldout.jsonl"), "out": tmp_path / "eval", "asr": ""}
        with pytest.raises(UserError, match="cannot be given recordings"):
            list(evaluate.run(evaluate.Options(folder, modality="speech", **options)))
        asked = ask.Options(folder, text="What is it?", max_new_tokens=4)
        assert ask.answer(asked) == ask.answer(ask.Options(str(inputs / "llm"), text="What is it?", max_new_tokens=4))
        notes: list[str] = []
        made = diagnose.study_of(diagnose.Options(str(inputs / "llm"), [folder], tmp_path / "d"), notes.append)
        (method,) = made.methods.values()
        assert (method.modality, made.models.encoder) == ("text", None)
        assert "is not asked in speech" in notes[0]
        given = recipe(inputs, adaptor=None, methods={"given": {"kind": "given", "checkpoint": folder}})
        given["speech"]["stack_factor"] = 1
        with pytest.raises(UserError, match="cannot be given recordings"):
            Study(parse_config(given, "test"), tmp_path / "given").check()
    assert "cannot be given recordings" in open_panel(run).refusals["rows", "speech"]
    card = (tmp_path / "whole/README.md").read_text()
    assert "The codec is not part of it" in card
    assert "soundfile" not in card


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of such a study
# ---------------------------------------------------------------------------------------------------------------------
def response(run: Path, method: str, modality: str = "speech") -> str:
    """To the first question."""
    samples = (run / f"methods/{method}/samples/numbers-{modality}/samples.jsonl").read_text()
    return str(json.loads(samples.splitlines()[0])["response"])


@pytest.mark.parametrize("method", ["full_tokens", "lora_tokens", "quantised"])
def test_a_checkpoint_is_asked_as_any_other(finished: Path, inputs: Path, tmp_path: Path, method: str) -> None:
    folder = str(finished / f"methods/{method}/checkpoint")
    first = read_manifest(finished / "data/task-numbers.jsonl")[0]
    options: dict[str, Any] = {"max_new_tokens": 4, "compute": "float32"}
    assert ask.answer(ask.Options(folder, audio=first.audio, **options)) == response(finished, method)
    assert ask.answer(ask.Options(folder, text=first.question, **options)) == response(finished, method, "text")
    asked = evaluate.Options(
        folder, str(inputs / "heldout.jsonl"), tmp_path, modality="speech", asr="", perplexity=True, **options
    )
    list(evaluate.run(asked))
    found = json.loads((tmp_path / "results-speech.json").read_text())
    table = json.loads((finished / "results.json").read_text())
    rows = [(row["method"], row["modality"]) for row in table["perplexity"]]
    expected = table["perplexity"][rows.index((method, "speech"))]
    assert found["perplexity"][0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_the_panel_of_a_run_asks_them_too(finished: Path) -> None:
    first = read_manifest(finished / "data/task-numbers.jsonl")[0]
    last = list(ask_everyone(open_panel(finished), text=first.question, audio=first.audio))[-1]
    for name in both(finished)["methods"]:
        assert last.answers[name, "speech"] == (response(finished, name) or "(empty answer)"), name
        assert last.answers[name, "text"] == (response(finished, name, "text") or "(empty answer)"), name


def test_what_is_exported_says_what_it_reads(finished: Path, inputs: Path, tmp_path: Path) -> None:
    export.export(finished, method="full_tokens", text_llm=tmp_path / "text", speech_lm=tmp_path / "speech")
    export.export(finished, method="lora_tokens", light=tmp_path / "light", adapter=tmp_path / "adapter")
    export.export(finished, method="quantised", light=tmp_path / "quantised", text_llm=tmp_path / "base")
    cards = {folder.name: (folder / "README.md").read_text() for folder in tmp_path.iterdir()}
    rows = "every 2 encoder frames are the nearest of 8 centroids, each with a row of its own in the adaptor's place"
    assert {name for name, card in cards.items() if rows in card} == {"speech", "light"}
    assert "replaced: every 2 encoder frames by the nearest of 8 centroids" in cards["quantised"]
    assert "| Method | `lora_tokens`: low-rank updates of the language model (LoRA, merged into its weights) and the " \
        "rows of the speech tokens trained |" in cards["light"]  # fmt: skip
    assert (
        "the mean output, over the frames of each token, of the adaptor of a local folder named light"
        in cards["speech"]
    )
    assert "rows of speech tokens and LoRA of rank 8 of a SpeechLM" in cards["light"]
    # Nothing of them is in a text LLM; one of a frozen language model is the base.
    text = load_file(tmp_path / "text/model.safetensors")
    assert text.keys() == load_file(inputs / "llm/model.safetensors").keys()
    inside = load_file(finished / "methods/full_tokens/checkpoint/model.safetensors")
    assert all(torch.equal(tensor, inside[f"language_model.{name}"]) for name, tensor in text.items())
    for name, tensor in load_file(tmp_path / "base/model.safetensors").items():
        assert torch.equal(tensor, load_file(inputs / "llm/model.safetensors")[name]), name
    wave = read_manifest(finished / "data/task-numbers.jsonl")[0].audio
    for folder, method in (("speech", "full_tokens"), ("light", "lora_tokens"), ("quantised", "quantised")):
        options: dict[str, Any] = {"max_new_tokens": 4, "compute": "float32"}
        found = ask.answer(ask.Options(str(tmp_path / folder), audio=wave, **options))
        if folder == "speech":  # light folders round to float16
            assert found == response(finished, method)


def test_they_are_diagnosed_in_text_and_in_speech(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """Text as in their study; speech with recordings rounded up to their own pool."""
    given = [str(finished / f"methods/{name}/checkpoint") for name in ("full_tokens", "full")]
    options = diagnose.Options(
        str(inputs / "llm"), given, tmp_path / "out", data=str(inputs / "heldout.jsonl"), quick=True,
        compute="float32", max_new_tokens=4,
    )  # fmt: skip
    notes: list[str] = []
    made = diagnose.study_of(options, notes.append)
    assert made.speech.stack_factor == 2
    assert [(name, method.modality) for name, method in made.methods.items()] == [
        ("full_tokens", "speech"), ("full", "text"),
    ]  # fmt: skip
    assert "takes speech otherwise" in notes[0]
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):
            patch.setattr(module, "FIGURES", {})
        lines = list(diagnose.run(options))
    assert lines[-1].startswith("Report: ")
    found = json.loads((tmp_path / "out/results.json").read_text())
    ours = json.loads((finished / "results.json").read_text())
    asked = {(row["method"], row["modality"]) for row in found["qa"]}
    assert asked == {(name, "text") for name in ("base", "full", "full_tokens")} | {("full_tokens", "speech")}
    moved = [
        {row["name"]: row["relative_norm"] for row in table["delta"] if row["method"] == "full_tokens"}
        for table in (found, ours)
    ]
    assert moved[0] == moved[1] != {}
    answers = [
        json.loads(line)["response"]
        for line in (tmp_path / "out/methods/full_tokens/samples/heldout-text/samples.jsonl").read_text().splitlines()
    ]
    theirs = (finished / "methods/full_tokens/samples/numbers-text/samples.jsonl").read_text().splitlines()
    assert answers == [json.loads(line)["response"] for line in theirs]


def test_runs_of_several_k_stand_side_by_side(finished: Path, tmp_path: Path) -> None:
    """Three sizes are three runs: which is which, the page says."""
    shutil.copytree(finished, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint", "importance"))
    study = (tmp_path / "other/study.yaml").read_text()
    assert study.count(f" k: {K}\n") == 1
    (tmp_path / "other/study.yaml").write_text(study.replace(f" k: {K}\n", " k: 16\n"))
    runs = [Run(name, read_inputs(folder)) for name, folder in (("a", finished), ("b", tmp_path / "other"))]
    paired: Any = {"metric": "token_sequence_numbers", "accuracy": [], "perplexity": [], "not_compared": []}
    differences = next(it for it in tables_of(runs, paired) if it.name == "differences")
    assert [[cell.text for cell in row] for row in differences.rows] == [["speech.tokens.k", str(K), "16"]]


# ---------------------------------------------------------------------------------------------------------------------
# The recipe that ships
# ---------------------------------------------------------------------------------------------------------------------
def test_a_token_without_a_frame_keeps_the_row_that_was_drawn(inputs: Path, tmp_path: Path) -> None:
    ws = Study(parse_config(both(inputs), "test"), tmp_path).ws
    tensors = {"mean": torch.zeros(16), "scale": torch.ones(16), "centroids": torch.randn(K, 16).bfloat16().float()}
    write_tokens(SpeechTokenizer(2, tensors), tmp_path / "tokens/tokenizer.safetensors")
    rows, counts = torch.randn(K, 32), torch.tensor([3, 0, 1, 2, 0, 5, 1, 1])
    save_file({"rows": rows, "counts": counts}, tmp_path / "tokens/rows.safetensors")
    found = ws.new_speech_lm("full_tokens").adaptor.get_parameter("rows.weight")
    drawn = rows_like(tiny_llama(eos_token_id=3).get_input_embeddings().weight, K, ws.seed("adaptor", "full_tokens"))
    for token, n in enumerate(counts.tolist()):
        assert torch.equal(found[token], rows[token] if n else drawn[token]), token


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------
def first_steps(inputs: Path, folder: Path) -> None:
    """Up to the training of new rows, by every process."""
    written = both(inputs)
    written["methods"] = {"rows": {"kind": "adaptor", "learning_rate": 1e-2, "speech": "tokens"}}
    study = Study(parse_config(written, "test"), folder)
    if is_main():
        study.check()
    wait_for_all()
    for step in (steps.data, steps.features, steps.tokens, partial(steps.train, model="rows")):
        step(study.ws)


def work(rank: int, port: int, inputs: str, out: str) -> None:
    find_each_other(rank, port, 2)
    os.environ["LOCAL_RANK"] = str(rank)
    with joined():
        first_steps(Path(inputs), Path(out) / "run")


by_two = written_by_ranks(work, world=2)


def test_two_processes_make_the_tokens_of_one(inputs: Path, by_two: Path, tmp_path: Path) -> None:
    first_steps(inputs, tmp_path)
    for name in ("tokenizer.safetensors", "rows.safetensors"):
        ours, theirs = load_file(by_two / "run/tokens" / name), load_file(tmp_path / "tokens" / name)
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), name
    assert (by_two / "run/tokens/tokens.json").read_text() == (tmp_path / "tokens/tokens.json").read_text()
    rows = [load_file(run / "methods/rows/checkpoint/adaptor.safetensors")["rows.weight"]
            for run in (by_two / "run", tmp_path)]  # fmt: skip
    torch.testing.assert_close(*rows, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_the_recipe_runs_on_tiny_models_to_its_report(inputs: Path, tmp_path: Path) -> None:
    """recipes/tokens-cpu.yaml, with other models, fewer questions and a smaller k, all else as it ships."""
    written = yaml.safe_load((RECIPES / "tokens-cpu.yaml").read_text())
    tiny = {"language_model": "llm", "encoder": "whisper", "adaptor": "light"}
    written["models"] |= {**{key: str(inputs / name) for key, name in tiny.items()}, "asr": None}
    written["models"]["compute"] = "float32"
    written["speech"]["adaptor_hidden_size"], written["speech"]["tokens"]["k"] = 24, 8
    written["methods"]["rows_250"]["k"], written["methods"]["rows_4000"]["k"] = 4, 12
    written["data"]["train"]["limit"], written["data"]["heldout"]["limit"] = 12, 6
    questions, llama = written["evaluation"]["tasks"]
    questions["limit"] = 4
    llama |= {"source": str(inputs / "heldout.jsonl"), "limit": 4}
    written["evaluation"]["max_new_tokens"] = 4
    written["importance"]["n_examples"], written["deactivation"]["n_examples"] = 8, 4
    written["drift"]["own_text"] = {"n_texts": 4, "new_tokens": 4}
    run_study(parse_config(written, "test"), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    methods = [*written["methods"]]
    assert {row["method"] for row in results["qa"]} == {"base", *methods}
    pairs = {(row["method"], row["reference"]) for row in results["speech_inputs"]}
    assert pairs == {
        ("rows", "adaptor"), ("rows_250", "adaptor"), ("rows_4000", "adaptor"), ("quantised", "adaptor"),
        ("full_tokens", "full"), ("layer_lr_tokens", "layer_lr"), ("lora_tokens", "lora"),
    }  # fmt: skip
    for row in results["speech_inputs"]:
        assert row["difference"] == pytest.approx(row["value"] - row["value_reference"])
    apart = {row["model"] for row in results["importance_parts"]}
    assert apart == {"rows", "rows_250", "rows_4000", "full_tokens", "layer_lr_tokens", "lora_tokens"}
    # The controls leave the language model alone: text is the base's.
    right = {(row["method"], row["task"]): row["correct"] for row in results["qa"] if row["modality"] == "text"}
    for task in ("facts", "llama_questions"):
        assert {right[name, task] for name in ("base", "adaptor", "rows", "rows_250", "rows_4000", "quantised")} == {
            right["base", task]
        }
    report = (tmp_path / "report.html").read_text()
    assert "Speech as tokens against speech as encoder frames" in report
    assert "Missing from this run" not in report
