"""Given models that are no plain copy of the base: vocabularies that grew, audio LLMs, pairs the wrong way round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from palimpsest.commands import diagnose
from palimpsest.config import parse_config
from palimpsest.data.examples import read_manifest
from palimpsest.evaluation.audio_llm import audio_llm_answerer
from palimpsest.files import UserError
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.given import require_pair, takes_speech
from palimpsest.models.loading import load_audio_llm
from palimpsest.models.paired_weights import first_difference, pair_weights
from palimpsest.models.prompts import tokenizer_for_text
from palimpsest.report import figures, page
from palimpsest.report.inputs import read_inputs
from palimpsest.report.summary import in_short
from palimpsest.study.run import Study, run_study
from report_fixture import make_run
from test_audio_llm_in_text import Processor
from test_importance_any_model import AUDIO_CLASSES, AUDIO_LLMS
from test_models_speech_layouts import save_omni
from test_study_given import given, inputs, recipe, results, saved
from tiny import VOCAB, tiny_llama, tiny_tokenizer
from tiny_audio import TEXT, save_tiny_audio_llm

__all__ = ["inputs"]  # a fixture
N_TOKENS = len(tiny_tokenizer())
NEW = [f"<audio {i}>" for i in range(8)]


@pytest.fixture(autouse=True)
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (figures, page):
        monkeypatch.setattr(module, "FIGURES", {})


def study_of(inputs: Path, base: Path, tuned: dict[str, Path], **changes: Any) -> Any:
    values = recipe(inputs, given(**tuned), encoder=False, **changes)
    values["models"]["language_model"] = str(base)
    values["analysis"]["rank_draws"], values["evaluation"]["probe"] = 0, False
    return parse_config(values, "test")


# -- a vocabulary that grew --------------------------------------------------------------------------------------------
def grown(folder: Path, **planted: float) -> Path:
    """The base's weights with eight rows more; planted: added to one number of a parameter, by its name."""
    model = tiny_llama(vocab_size=N_TOKENS, eos_token_id=3, tied=False)
    model.resize_token_embeddings(N_TOKENS + len(NEW), mean_resizing=False)
    for name, change in planted.items():
        model.get_parameter(name.replace("__", ".")).data[5, 4] += change
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(NEW)
    return saved(folder, model, tokenizer)


def test_a_vocabulary_that_grew_is_compared_in_the_rows_in_common(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(vocab_size=N_TOKENS, eos_token_id=3, tied=False)
    base = saved(tmp_path / "base", model, tiny_tokenizer())
    matrix = "model.layers.1.mlp.up_proj.weight"
    tuned = grown(tmp_path / "tuned", **{matrix.replace(".", "__"): 2.0, "model__embed_tokens__weight": 0.5})
    config = study_of(inputs, base, {"tuned": tuned}, drift={"own_text": {"n_texts": 2, "new_tokens": 8}})
    run_study(config, tmp_path / "run")
    found = results(tmp_path / "run")
    norms = {row["name"]: row["relative_norm"] for row in found["delta"]}
    expected = 2.0 / float(torch.linalg.vector_norm(model.get_parameter(matrix).detach()))
    assert norms.pop(matrix) == pytest.approx(expected, rel=1e-5)
    assert set(norms.values()) == {0.0}
    embedding, head = found["embeddings"]
    rows = {"method": "tuned", "rows_base": N_TOKENS, "rows_tuned": N_TOKENS + 8, "rows": N_TOKENS}
    norm = 0.5 / float(torch.linalg.vector_norm(model.get_input_embeddings().weight.detach()))
    assert embedding == {
        **rows,
        "name": "model.embed_tokens.weight",
        "part": "embedding",
        "rows_changed": 1,
        "relative_norm": pytest.approx(norm, rel=1e-5),
    }
    assert head == {**rows, "name": "lm_head.weight", "part": "head", "rows_changed": 0, "relative_norm": 0.0}
    assert {row["new_tokens_share"] > 0 for row in found["drift"]} == {True}
    said = "the 8 of the tuned model alone are not (<audio 0>, <audio 1>, <audio 2>, <audio 3>, <audio 4>, …)"
    assert said in capsys.readouterr().err
    (note,) = json.loads((tmp_path / "run/provenance.json").read_text())["models"]["given"]["tuned"]["notes"]
    assert said in note
    assert "&lt;audio 4&gt;" in (tmp_path / "run/report.html").read_text()


def test_a_vocabulary_without_tokens_of_the_base_is_told(inputs: Path, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", tiny_llama(vocab_size=N_TOKENS, eos_token_id=3), tiny_tokenizer())
    less = saved(tmp_path / "less", tiny_llama(vocab_size=N_TOKENS - 1, eos_token_id=3), tiny_tokenizer())
    with pytest.raises(UserError, match=f"they are {N_TOKENS}, and its embedding has {N_TOKENS - 1} rows"):
        Study(study_of(inputs, base, {"less": less}), tmp_path / "run").check()


# -- audio LLMs --------------------------------------------------------------------------------------------------------
class Deaf(Processor):
    """Has no place for audio."""

    def __call__(self, audio: Any = None) -> None: ...


def text_base(folder: Path, audio: Path) -> Path:
    """The language model of an audio LLM as a plain one, with its tokens."""
    model, processor = load_audio_llm(str(audio))
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEXT))
    plain.load_state_dict(dict(pair_weights(plain, model).tuned))
    plain.generation_config.eos_token_id = 3
    return saved(folder, plain, tokenizer_for_text(processor))


def test_an_audio_llm_against_its_text_base(inputs: Path, tmp_path: Path) -> None:
    audio = save_tiny_audio_llm("qwen2_audio", tmp_path / "audio")
    base = text_base(tmp_path / "base", audio)
    run_study(study_of(inputs, base, {"audio": audio}), tmp_path / "run")
    found = results(tmp_path / "run")
    assert {row["relative_norm"] for row in found["delta"] + found["embeddings"]} == {0.0}
    assert {row["part"] for row in found["embeddings"]} == {"embedding", "head"}
    shift = [row["value"] for row in found["shift"] if row["measure"] == "jensen_shannon"]
    assert shift == pytest.approx([0.0] * len(shift), abs=1e-6)
    asked = {(row["method"], row["modality"]) for row in found["qa"]}
    assert asked == {("base", "text"), ("audio", "text"), ("audio", "speech")}
    assert {row["modality"] for row in found["perplexity"]} == {"text"}
    about = json.loads((tmp_path / "run/provenance.json").read_text())["models"]["given"]["audio"]
    assert (about["form"], about["speech"]) == ("audio_llm", True)
    assert about["notes"][-1].startswith("audio is an audio LLM: it answers recordings")
    rows = [json.loads(line) for line in (tmp_path / "run/methods/audio/samples/numbers-speech/samples.jsonl").open()]
    answer = audio_llm_answerer(*load_audio_llm(str(audio)), max_new_tokens=4)
    questions = read_manifest(tmp_path / "run/data/task-numbers.jsonl")
    expected = {question.id: answer([question], "speech")[0].response for question in questions}
    assert {row["id"]: row["response"] for row in rows} == expected


def needs_torchaudio(*_: Any, **__: Any) -> None:
    raise ImportError("GraniteSpeechFeatureExtractor requires the torchaudio library")


@pytest.mark.parametrize(
    ("kind", "processor"), [("voxtral", lambda *_, **__: Deaf()), ("granite_speech", needs_torchaudio)]
)
def test_audio_llms_whose_processors_need_packages(
    inputs: Path, tmp_path: Path, kind: str, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"vocab_size": VOCAB, "max_position_embeddings": 512, "pad_token_id": 0}
    text = {**AUDIO_LLMS[kind]["text_config"], **changes}
    config = AutoConfig.for_model(kind, **{**AUDIO_LLMS[kind], "text_config": text})
    model = AUDIO_CLASSES[kind](config)
    audio = saved(tmp_path / "audio", model, tiny_tokenizer())
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
    plain.load_state_dict(dict(pair_weights(plain, model).tuned))
    base = saved(tmp_path / "base", plain, tiny_tokenizer())
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        scored_parameters(model)[name] *= 1.5
    model.save_pretrained(audio)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", processor)
    options = diagnose.Options(str(base), [str(audio)], tmp_path / "run", data=str(inputs / "train.jsonl"), quick=True)
    notes: list[str] = []
    study = Study(diagnose.study_of(options, notes.append), tmp_path / "run")
    study.check()
    assert [note.split(":")[0] for note in notes] == [f"{audio} is not asked in speech"]
    assert study.ws.config.asked_as("audio") == ["text"]
    assert study.ws.given_notes["audio"][-1] == "audio takes speech and is asked in text alone."
    weights = study.ws.weights("audio")
    changed = [key for key, weight in study.ws.weights("base").items() if not torch.equal(weight, weights[key])]
    assert changed == [name]


# -- layers that compute the same --------------------------------------------------------------------------------------
def test_llama_and_mistral_are_one_architecture_unless_attention_has_a_window() -> None:
    llama = tiny_llama()
    config = {key: value for key, value in llama.config.to_dict().items() if key != "model_type"}
    ids = torch.arange(3, 40)[None]
    for window, same in ((None, True), (8, False)):
        mistral = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("mistral", **{**config, "sliding_window": window})
        ).eval()
        mistral.load_state_dict(llama.state_dict())
        with torch.no_grad():
            assert torch.equal(mistral(ids).logits, llama(ids).logits) == same
        said = None if same else "its layers have the same names and shapes and compute differently"
        assert first_difference(mistral, llama) == said


# -- the wrong way round -----------------------------------------------------------------------------------------------
def test_models_that_are_swapped(inputs: Path, tmp_path: Path) -> None:
    audio = save_tiny_audio_llm("qwen2_audio", tmp_path / "audio")
    plain = text_base(tmp_path / "plain", audio)
    with pytest.raises(UserError, match=r"takes speech and .*plain does not: the two are swapped"):
        Study(study_of(inputs, audio, {"plain": plain}), tmp_path / "run").check()
    llm = inputs / "llm"
    adapted = get_peft_model(tiny_llama(eos_token_id=3), LoraConfig(r=2, target_modules=["v_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(llm)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"is an adapter on .*llm: the two are swapped"):
        Study(study_of(inputs, tmp_path / "adapter", {"llm": llm}), tmp_path / "run").check()


def test_weights_stored_in_two_dtypes_are_noted(inputs: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    tiny_llama(eos_token_id=3).to(torch.bfloat16).save_pretrained(tuned)
    tiny_tokenizer().save_pretrained(tuned)
    (note,) = require_pair(str(inputs / "llm"), str(tuned))
    assert note.startswith("Its weights are stored in BF16 and those of ")
    assert "in F32: a weight that training left alone differs by the rounding" in note
    tiny_llama(eos_token_id=3).save_pretrained(tuned)
    assert require_pair(str(inputs / "llm"), str(tuned)) == ()


def test_adapters_on_adapters(inputs: Path, tmp_path: Path) -> None:
    below = str(inputs / "llm")
    for folder in ("first", "second"):
        adapted = get_peft_model(tiny_llama(eos_token_id=3), LoraConfig(r=2, target_modules=["v_proj"]))
        adapted.peft_config["default"].base_model_name_or_path = below
        below = str(tmp_path / folder)
        adapted.save_pretrained(below)
    assert require_pair(str(inputs / "llm"), below) == ()
    config = tmp_path / "first/adapter_config.json"
    config.write_text(config.read_text().replace(str(inputs / "llm"), below))
    with pytest.raises(UserError, match="is an adapter on itself, by the base that its config names"):
        require_pair(str(inputs / "llm"), below)


def test_who_stops_a_study_is_told_that_it_continues(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(study: Study) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_study(study_of(inputs, inputs / "llm", {"same": inputs / "llm"}), tmp_path / "run")
    assert f"note: stopped; the same command continues in {tmp_path / 'run'}." in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------------
def test_slips_of_the_command(inputs: Path, tmp_path: Path) -> None:
    llm = str(inputs / "llm")
    with pytest.raises(UserError, match="is the folder of a model"):
        diagnose.study_of(diagnose.Options(llm, [llm], inputs / "llm"))
    with pytest.raises(UserError, match="is given twice"):
        diagnose.study_of(diagnose.Options(llm, [llm, f"{llm}/"], tmp_path))


def test_the_limits_of_the_command_reach_the_recipe(inputs: Path, tmp_path: Path) -> None:
    llm = str(inputs / "llm")
    made = diagnose.study_of(diagnose.Options(llm, [llm], tmp_path, limit=5, max_new_tokens=7))
    assert made.evaluation.max_new_tokens == 7
    assert made.drift is not None
    assert made.data.heldout is not None
    limits = [made.data.train.limit, made.data.heldout.limit, *(task.limit for task in made.evaluation.tasks)]
    assert {made.importance.n_examples, made.deactivation.n_examples, made.drift.own_text.n_texts, *limits} == {5}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["m/adapter", "m/merged/"], ["m-adapter", "m-merged"]),
        (["m", "m/merged", "x/m"], ["m", "m-merged", "m-2"]),
        (["base + m/adapter-5", "m/merged-5"], ["m-adapter-5", "m-merged-5"]),
        (["m/checkpoint-5", "m/checkpoint-10"], ["m-5", "m-10"]),
        (["base/merged", "base/adapter", "base"], ["base-merged", "base-adapter", "base-tuned"]),
    ],
)
def test_models_in_one_folder_have_names_that_tell_them_apart(paths: list[str], names: list[str]) -> None:
    assert diagnose.names_of(paths) == names


def test_the_speech_llm_that_comes_in_a_wheel_takes_speech() -> None:
    assert takes_speech("embedded:smollm2-135m-speech")
    assert not takes_speech("smollm2-135m-speech")
    assert not takes_speech("embedded:smollm2-135m-instruct")


def test_changes_larger_than_the_weights_are_said_to_be_of_another_base(tmp_path: Path) -> None:
    inputs = read_inputs(make_run(tmp_path, n_questions=1))
    given_one = {"models": {"given": {"lora": {"notes": ["lora: a note."]}}}}
    for norm, said in ((1.0, False), (1.4, True)):
        delta: Any = [{**row, "relative_norm": norm} for row in inputs.results["delta"]]
        lines = in_short(replace(inputs, provenance=given_one, results={**inputs.results, "delta": delta}))
        assert any("as if it had been made from another base" in line for line in lines) == said
        assert lines[-1] == "lora: a note."


def test_what_is_left_out_of_a_checkpoint_of_another_layout_is_noted(inputs: Path, tmp_path: Path) -> None:
    omni, model = save_omni(tmp_path / "omni", "llama", "omni_speech_llama")
    study = Study(
        study_of(inputs, saved(tmp_path / "base", model, tiny_tokenizer()), {"theirs": omni}), tmp_path / "run"
    )
    (note,) = study.ws.given_notes["theirs"]
    assert note.startswith("theirs is read as a checkpoint like LLaMA-Omni's")
    assert "left out: model.speech_encoder" in note
