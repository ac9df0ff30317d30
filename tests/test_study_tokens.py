"""Both paradigms in one study: methods that read encoder frames beside methods that read speech tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palimpsest.config import parse_config
from palimpsest.data.features import Features
from palimpsest.files import UserError
from palimpsest.models.loading import load_speech_lm
from palimpsest.models.speech_lm import SpeechAdaptor
from palimpsest.models.tokens import read_tokens, rows_heard
from palimpsest.models.trained_adaptor import read_adaptor
from palimpsest.report import figures, page
from palimpsest.study import steps
from palimpsest.study.live import name_of
from palimpsest.study.run import Study, run_study
from test_speech_tokens import save_tiny_codec
from test_study_adaptor import N_HELDOUT, N_TRAIN, inputs, recipe

__all__ = ["inputs"]  # a fixture

K = 8
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
                if (r["measure"], r["reduction"], r["reference"]) == (kind, "signed_sum", "base")
            }
            assert (row["value"], row["value_reference"]) == pytest.approx((moved["full_tokens"], moved["full"]))
    page = (finished / "report.html").read_text()
    assert "Speech as tokens against speech as encoder frames" in page
    assert {row["model"] for row in results["shift"]} >= {"full", "full_tokens"}
    for name in both(finished)["methods"]:
        samples = (finished / f"methods/{name}/samples/numbers-speech/samples.jsonl").read_text().splitlines()
        assert len(samples) == N_HELDOUT, name


def test_the_tokens_are_a_step_with_its_provenance(finished: Path) -> None:
    described = json.loads((finished / "tokens/tokens.json").read_text())
    assert (described["k"], described["pool"]) == (K, 2)
    for group in ("train", "heldout"):
        assert described["speech"][group]["per_second"] == pytest.approx(25, rel=0.05)
        assert described["speech"][group]["collapsed_per_second"] < 25
    about = json.loads((finished / "provenance.json").read_text())["models"]["tokens"]
    assert about == read_tokens(finished / "tokens/tokenizer.safetensors").about
    assert about["features"] == fingerprints(finished)["features"]


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
    from palimpsest.data.examples import read_manifest
    from palimpsest.evaluation.spoken import recording_answerer

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
    assert {name for name, reads in reading.items() if reads} == (trained - {"methods/full/checkpoint"}) | {"tokens"}
    given = {name: json.loads((finished / name / "step.json").read_text())["inputs"]["speech"] for name in trained}
    assert {name for name, of in given.items() if of["tokens"] is None} == {"methods/full/checkpoint"}


def test_a_codec_takes_the_place_of_the_frames(inputs: Path, tmp_path: Path) -> None:
    """The steps of a method that reads a codec's tokens, without those of the base."""
    save_tiny_codec(tmp_path / "codec", "mimi")
    tokens = {"kind": "codec", "codec": str(tmp_path / "codec"), "k": 32}
    written = recipe(inputs, adaptor=None, speech={"tokens": tokens})
    written["models"]["checkpoints"] = "light"
    written["methods"] = {"rows": {"kind": "adaptor", "learning_rate": 1e-2, "speech": "tokens"}}
    study = Study(parse_config(written, "test"), tmp_path / "run")
    study.check()
    for step in (steps.data, steps.features, steps.tokens):
        step(study.ws)
    for measure in (steps.train, steps.perplexity, partial(steps.answers, task="numbers", modality="speech")):
        measure(study.ws, model="rows")
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
    model, processor = load_speech_lm(tmp_path / "run/methods/rows/checkpoint")
    with pytest.raises(UserError, match="which is no part of it"):
        model(**processor(audio=np.zeros(8_000, np.float32)))
