"""What is loaded is what the files hold: every weight, all of them numbers, and no file that is not one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from palimpsest.files import UserError
from palimpsest.models.loading import (
    fingerprint,
    load_asr,
    load_encoder,
    load_language_model,
    load_speech_lm,
    load_text_model,
    resolve,
)
from palimpsest.models.trained_adaptor import read_adaptor
from tiny import save_tiny_models, tiny_llama, tiny_speech_lm, tiny_tokenizer

Weights = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save_tiny_models(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def save_speech_lm(folder: Path) -> Path:
    model, processor = tiny_speech_lm()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def without(pattern: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if pattern not in key}


def plus(key: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, key: torch.ones(shape)}


def renamed(weights: Weights) -> Weights:
    return {f"module.{key}": tensor for key, tensor in weights.items()}


# -- names -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            renamed,
            r"it lacks 2\d of the model's weights .*it has 20 that the model does not have \(module\.model\.embed",
        ),
        (without("layers.1."), r"it lacks 9 of the model's weights \(model\.layers\.1\.input_layernorm\.weight, "),
        (plus("model.layers.0.self_attn.q_proj.bias", 32), r"1 that .*\(model\.layers\.0\.self_attn\.q_proj\.bias\)"),
        (plus("model.layers.2.self_attn.q_proj.weight", 32, 32), r"1 that the model does not have \(model\.layers\.2"),
        (plus("model.norm.weight", 31), r"1 have another shape \(model\.norm\.weight\)"),
    ],
)
def test_weights_that_are_not_the_model_s_are_refused(models: Path, change: Any, said: str, device: str) -> None:
    rewrite(models / "llm", change)
    with pytest.raises(UserError, match=rf"is no checkpoint of LlamaForCausalLM .*{said}"):
        load_language_model(str(models / "llm"), device=device)


def test_a_head_tied_to_the_embedding_and_parts_of_other_models_may_differ(models: Path) -> None:
    before = load_language_model(str(models / "llm"))[0].state_dict()
    assert "lm_head.weight" not in load_file(models / "llm" / "model.safetensors")
    extra = ["score.weight", "v_head.summary.weight", "model.vision_tower.layers.0.weight", "audio_tower.conv1.weight"]
    extra += ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.weight"]
    for key in extra:
        rewrite(models / "llm", plus(key, 2, 2))
    after = load_language_model(str(models / "llm"))[0].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("change", "said"),
    [(renamed, "lacks 3"), (without("encoder.layers.1."), "lacks 15"), (without("conv2"), "lacks 2")],
)
def test_an_encoder_without_its_weights_is_refused(models: Path, change: Any, said: str) -> None:
    rewrite(models / "whisper", change)
    with pytest.raises(UserError, match=f"no checkpoint of WhisperModel as its config describes it: it {said}"):
        load_encoder(str(models / "whisper"))


def test_of_whisper_only_the_encoder_is_asked_for(models: Path) -> None:
    before = load_encoder(str(models / "whisper"))[0].state_dict()
    rewrite(models / "whisper", without("decoder."))
    after = load_encoder(str(models / "whisper"))[0].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(UserError, match=r"WhisperForConditionalGeneration .*lacks .*decoder\."):
        load_asr(str(models / "whisper"))


def test_a_speech_lm_without_its_adaptor_is_refused(tmp_path: Path) -> None:
    folder = save_speech_lm(tmp_path / "model")
    rewrite(folder, without("adaptor.linear"))
    with pytest.raises(UserError, match=r"no checkpoint of SpeechLM .*lacks 4 of .*\(adaptor\.linear1\.bias, "):
        load_speech_lm(folder)


# -- numbers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(models: Path, tmp_path: Path, value: float) -> None:
    def spoil(name: str) -> Callable[[Weights], Weights]:
        def change(weights: Weights) -> Weights:
            weights[name].view(-1)[3] = value
            return weights

        return change

    rewrite(models / "llm", spoil("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite \(1 of 1,536 numbers"):
        load_language_model(str(models / "llm"))
    rewrite(models / "whisper", spoil("encoder.conv1.weight"))
    with pytest.raises(UserError, match=r"conv1\.weight is not finite"):
        load_encoder(str(models / "whisper"))
    folder = save_speech_lm(tmp_path / "model")
    rewrite(folder, spoil("adaptor.input_scale"))
    for load in (load_speech_lm, read_adaptor):
        with pytest.raises(UserError, match=r"input_scale is not finite"):
            load(str(folder))


def test_large_numbers_are_numbers(models: Path) -> None:
    """A sum beyond float32, of numbers that are not."""
    rewrite(models / "llm", lambda weights: {**weights, "model.norm.weight": torch.full((32,), 3e38)})
    assert load_language_model(str(models / "llm"))[0].model.norm.weight[0] > 2e38


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_no_file(models: Path, name: str) -> None:
    (models / "llm" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=rf"{name} is only the pointer that git-lfs leaves; run `git lfs pull`"):
        resolve(str(models / "llm"))


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_is_refused(models: Path, kept: int) -> None:
    file = models / "llm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is cut short or damaged \((its header|[\d,]+ bytes)"):
        resolve(str(models / "llm"))


def test_a_shard_that_is_not_there_is_named(models: Path) -> None:
    model, _ = load_language_model(str(models / "llm"))
    (models / "llm" / "model.safetensors").unlink()
    model.save_pretrained(models / "llm", max_shard_size="20KB")
    assert load_language_model(str(models / "llm"))[0].state_dict().keys() == model.state_dict().keys()
    last = sorted((models / "llm").glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=rf"lacks {last.name}, which model.safetensors.index.json names \(1 in all\)"):
        resolve(str(models / "llm"))


def test_quantised_weights_are_refused(models: Path) -> None:
    file = models / "llm" / "config.json"
    config = json.loads(file.read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(UserError, match=r"holds quantised weights \(bitsandbytes\), which can be neither measured nor"):
        load_language_model(str(models / "llm"))


# -- what a fingerprint covers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_every_file_that_can_change_a_result_changes_the_fingerprint(models: Path, name: str) -> None:
    file = models / "llm" / name
    before = fingerprint(str(models / "llm"))
    file.write_bytes(file.read_bytes() + b" ")
    assert fingerprint(str(models / "llm")) != before


def test_so_does_the_processor_and_what_a_light_folder_stands_on(models: Path, tmp_path: Path) -> None:
    from palimpsest.models.light import write_light

    before = fingerprint(str(models / "whisper"))
    (models / "whisper" / "preprocessor_config.json").write_text("{}")
    assert fingerprint(str(models / "whisper")) != before

    save_tiny_models(models)
    model, processor = tiny_speech_lm()
    llm, whisper = str(models / "llm"), str(models / "whisper")
    language_model, encoder = load_language_model(llm)[0], load_encoder(whisper)[0]
    model.language_model.load_state_dict(language_model.state_dict())
    model.encoder.load_state_dict(encoder.state_dict())
    folder = tmp_path / "light"
    folder.mkdir()
    about: Any = {"language_model": (llm, language_model), "encoder": (whisper, encoder)}
    write_light(folder, model, processor, adapter=None, trained={}, **about)
    before = fingerprint(str(folder))
    template = models / "llm" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<end>", "<end> "))
    assert fingerprint(str(folder)) != before


def test_records_of_training_and_texts_about_a_model_do_not(models: Path) -> None:
    before = fingerprint(str(models / "llm"))
    for name in ("README.md", "step.json", "files.json", "training.json", ".DS_Store.json"):
        (models / "llm" / name).write_text("seconds: 3")
    assert fingerprint(str(models / "llm")) == before


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "vocab_size", "many"),
        ("config.json", "hidden_size", [None]),
        ("tokenizer.json", "decoder", {"type": "none"}),
        ("tokenizer.json", "model", 7),
        ("tokenizer_config.json", "added_tokens_decoder", 7),
        ("tokenizer_config.json", "model_max_length", "long"),
    ],
)
def test_a_damaged_config_or_tokenizer_is_one_sentence(models: Path, name: str, key: str, value: Any) -> None:
    file = models / "llm" / name
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=f"{models / 'llm'} (could not be loaded as Auto|is damaged)"):
        load_text_model(str(models / "llm"))


@pytest.mark.parametrize("value", ["</s>", True, [3, None], 2.5])
def test_an_end_that_is_no_token_id_is_one_sentence(models: Path, value: Any) -> None:
    file = models / "llm" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation settings name .* as eos_token_id"):
        load_text_model(str(models / "llm"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["7", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_json_that_is_no_object_is_one_sentence(models: Path, name: str, content: str) -> None:
    (models / "llm" / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged|could not be loaded"):
        load_text_model(str(models / "llm"))


def test_a_mistyped_folder_is_named_where_the_hub_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^There is no folder mine/modle, and the hub, .* is switched off .*; correct"):
        load_text_model("mine/modle")


HUB = """
import sys
from pathlib import Path
from palimpsest.models.loading import fingerprint, load_language_model
cache = Path(sys.argv[1])
before = fingerprint("ada/mine")
(cache / "models--ada--mine" / "refs" / "main").write_text("b" * 40)  # somebody uploads another version
model, _ = load_language_model("ada/mine")
print(int(model.model.norm.weight[0]), fingerprint("ada/mine") == before)
"""


def test_the_version_of_a_hub_model_that_was_fingerprinted_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    stored = tmp_path / "models--ada--mine"
    for commit, value in (("a" * 40, 1.0), ("b" * 40, 2.0)):
        model = tiny_llama(eos_token_id=3)
        torch.nn.init.constant_(model.model.norm.weight, value)
        model.save_pretrained(stored / "snapshots" / commit)
        tiny_tokenizer().save_pretrained(stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("a" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True"], done.stderr
