"""A study that starts from a trained adaptor: every method does, and the base hears through it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.config import parse_config
from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.models.loading import load_encoder, load_language_model
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.models.trained_adaptor import read_adaptor
from palimpsest.report import figures, page
from palimpsest.rundir import RunDir
from palimpsest.study.results import collect
from palimpsest.study.run import Study, run_study
from tiny import tiny_llama, tiny_tokenizer
from tiny_study import numbered, write_inputs

N_TRAIN, N_HELDOUT = 8, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, a speech LLM of them (`whole`, and as a light folder `light`), and manifests of noise."""
    splits = numbered(N_TRAIN, N_HELDOUT, "{split} {i}?", "{i}.")
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), splits)
    language_model, tokenizer = load_language_model(str(folder / "llm"))
    encoder, extractor = load_encoder(str(folder / "whisper"))
    model = SpeechLM.from_parts(encoder, language_model, adaptor_hidden_size=24, seed=7)
    model.adaptor.calibrate(torch.randn(1, 60, 16, generator=torch.Generator().manual_seed(0)), 0.3)
    model.save_pretrained(folder / "whole")
    SpeechLMProcessor(tokenizer, extractor).save_pretrained(folder / "whole")
    names = {"language_model": str(folder / "llm"), "encoder": str(folder / "whisper")}
    export.export(folder / "whole", light=folder / "light", **names)
    return folder


def recipe(inputs: Path, adaptor: str | None = "light", **changes: Any) -> dict[str, Any]:
    heldout = {"source": str(inputs / "heldout.jsonl"), "split": "heldout"}
    models = {"language_model": str(inputs / "llm"), "encoder": str(inputs / "whisper"), "compute": "float32"}
    return {
        "name": "tiny",
        "models": models if adaptor is None else {**models, "adaptor": str(inputs / adaptor)},
        "speech": {"adaptor_hidden_size": 24},
        "data": {"train": {"source": str(inputs / "train.jsonl"), "split": "train"}, "heldout": heldout},
        # A step of 1e-30 changes no float32: this method has learned nothing.
        "methods": {
            "idle": {"kind": "adaptor", "learning_rate": 1e-30},
            "full": {"kind": "full", "learning_rate": 1e-2},
        },
        "training": {"epochs": 2, "batch_size": 8, "warmup_ratio": 0},  # two steps, the first at the full rate
        "importance": {"n_examples": 8, "batch_size": 4},
        "deactivation": {"random_seeds": 1},
        "analysis": {"shuffles": 1, "bootstrap": 100, "rank_draws": 0},
        "evaluation": {"tasks": [{"name": "numbers", **heldout}], "max_new_tokens": 4, "probe": False},
        **changes,
    }


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (figures, page):  # drawing takes most of the time, and is tested elsewhere
            patch.setattr(module, "FIGURES", {})
        run_study(parse_config(recipe(inputs), "test"), folder)
    return folder


def table(folder: Path, name: str, model: str, modality: str, key: str = "model") -> list[dict[str, Any]]:
    rows = json.loads((folder / "results.json").read_text())[name]
    return [{**row, key: ""} for row in rows if row[key] == model and row["modality"] == modality]


def test_the_base_hears_what_a_method_that_learned_nothing_hears(finished: Path) -> None:
    for modality in ("text", "speech"):
        for name, key in (("deactivation", "model"), ("perplexity", "method"), ("qa", "method")):
            base, idle, full = (table(finished, name, model, modality, key) for model in ("base", "idle", "full"))
            assert base == idle, (name, modality)
            assert base
            if name != "qa":
                assert base != full, (name, modality)
    samples = [
        (finished / folder / "samples/numbers-speech/samples.jsonl").read_text() for folder in ("base", "methods/idle")
    ]
    responses = [[json.loads(line)["response"] for line in text.splitlines()] for text in samples]
    assert len(responses[0]) == N_HELDOUT
    assert responses[0] == responses[1]
    pairs = {
        (row["method_a"], row["method_b"])
        for row in json.loads((finished / "results.json").read_text())["comparisons"]
        if row["modality"] == "speech"
    }
    assert {("base", "idle"), ("base", "full")} <= pairs
    assert (
        "base model heard through the adaptor that the methods started from" in (finished / "report.html").read_text()
    )


def test_every_method_starts_from_it_and_the_run_says_so(finished: Path, inputs: Path) -> None:
    source = load_file(inputs / "light/adaptor.safetensors")
    idle = load_file(finished / "methods/idle/checkpoint/model.safetensors")
    full = load_file(finished / "methods/full/checkpoint/model.safetensors")
    for name, tensor in source.items():
        assert torch.equal(idle[f"adaptor.{name}"], tensor.float()), name
    moved = (full["adaptor.linear1.weight"] - source["linear1.weight"].float()).abs()
    assert 0 < float(moved.max()) < 0.1  # two steps of Adam at 1e-2
    fingerprint = read_adaptor(str(inputs / "light")).fingerprint
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["models"]["adaptor"] == {"name": "…/light", "hash": fingerprint}
    for step in ("methods/full/checkpoint", "base/deactivation", "base/perplexity", "base/samples/numbers-speech"):
        assert fingerprint in (finished / step / "step.json").read_text(), step
    for step in ("base/importance", "base/samples/numbers-text"):  # what another adaptor does not change
        assert fingerprint not in (finished / step / "step.json").read_text(), step


def test_without_the_key_the_base_is_not_asked_in_speech(finished: Path, inputs: Path) -> None:
    config = parse_config(recipe(inputs, adaptor=None), "test")
    found = collect(RunDir(finished), config, [], seed=0)  # the files of the earlier recipe are still there
    assert {(row["method"], row["modality"]) for row in found["qa"]} == {
        ("base", "text"), ("idle", "text"), ("idle", "speech"), ("full", "text"), ("full", "speech"),
    }  # fmt: skip
    assert Study(config, finished).ws.adaptor_inputs == {}


def test_a_whole_folder_gives_the_same_adaptor_unrounded(inputs: Path) -> None:
    whole, small = read_adaptor(str(inputs / "whole")), read_adaptor(str(inputs / "light"))
    assert whole.encoder == small.encoder
    assert whole.tensors.keys() == small.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(small.tensors[name], tensor.half().float() if tensor.ndim == 2 else tensor), name
    assert whole.fingerprint != small.fingerprint
    assert read_adaptor(str(inputs / "light")).fingerprint == small.fingerprint


@pytest.mark.parametrize("adaptor", ["whole", "light"])
def test_what_does_not_fit_is_told_before_the_long_work(inputs: Path, tmp_path: Path, adaptor: str) -> None:
    shutil.copytree(inputs / "whisper", tmp_path / "whisper")
    tensors = load_file(tmp_path / "whisper/model.safetensors")
    tensors["encoder.layers.1.fc2.bias"][0] += 1
    save_file(tensors, tmp_path / "whisper/model.safetensors", metadata={"format": "pt"})
    tiny_llama(hidden_size=48, eos_token_id=3).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    fits = recipe(inputs, adaptor)
    wrong: dict[str, dict[str, Any]] = {
        r"speech\.stack_factor 5, the recipe has 4; set it to 5": {"speech": {**fits["speech"], "stack_factor": 4}},
        r"speech\.length trim, the recipe has pad_to_30s": {"speech": {**fits["speech"], "length": "pad_to_30s"}},
        r"speech\.adaptor_hidden_size 24, the recipe has 2048": {"speech": {}},
        r"language model of width 32, .*wide has 48": {
            "models": {**fits["models"], "language_model": str(tmp_path / "wide")}
        },
        r"another encoder than .*whisper; use that": {
            "models": {**fits["models"], "encoder": str(tmp_path / "whisper")}
        },
        r"models\.adaptor: .*llm is no speech LLM": {"models": {**fits["models"], "adaptor": str(inputs / "llm")}},
    }
    for said, changes in wrong.items():
        with pytest.raises(UserError, match=said):
            run_study(parse_config({**fits, **changes}, "test"), tmp_path / "run")
    assert not (tmp_path / "run/data").exists()
    Study(parse_config(fits, "test"), tmp_path / "run").check()


def test_calibrating_a_trained_adaptor_is_refused(inputs: Path) -> None:
    speech = {"adaptor_hidden_size": 24, "calibrate_adaptor": True}
    with pytest.raises(UserError, match="calibrate_adaptor is for a fresh adaptor"):
        parse_config(recipe(inputs, speech=speech), "test")
    with pytest.raises(UserError, match="align is for a fresh adaptor"):
        parse_config(recipe(inputs, training={"align": {"epochs": 1, "learning_rate": 1e-3}}), "test")
