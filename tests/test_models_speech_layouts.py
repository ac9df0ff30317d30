"""Language models in checkpoints of LLaMA-Omni's and Ultravox's layout: tiny files with the published names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.commands import importance
from palimpsest.files import UserError
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loading import (
    blank_language_model,
    fingerprint,
    load_language_model,
    load_text_model,
    load_tokenizer,
    model_kind,
    reading_notes,
    require_loadable,
    resolve,
)
from palimpsest.models.speech_layouts import read_layout
from test_models_adapters import save_adapter
from tiny import save_tiny_models, tiny_llama, tiny_tokenizer
from tiny_audio import TEXT

Weights = dict[str, Tensor]
# Beside the language model, in the files of each: openai-whisper's encoder and a projector; Whisper's as transformers
# names it and a projector. Names as their code makes them; shapes are small.
OMNI = {
    "model.speech_encoder.conv1.weight": (4, 8, 3),
    "model.speech_encoder.blocks.0.attn.query.weight": (4, 4),
    "model.speech_projector.linear1.weight": (8, 20),
    "model.speech_projector.linear1.bias": (8,),
    "model.speech_projector.linear2.weight": (32, 8),
    "speech_generator.layers.0.self_attn.q_proj.weight": (8, 8),
    "speech_generator.output_proj.weight": (11, 8),
}
OMNI_CONFIG = {
    "speech_encoder": "models/speech_encoder/large-v3.pt",
    "speech_encoder_ds_rate": 5,
    "speech_encoder_hidden_size": 1280,
    "speech_encoder_type": "whisper",
    "speech_generator_type": "ctc",
    "speech_projector_type": "linear",
}
VOX = {
    "audio_tower.conv1.weight": (4, 8, 3),
    "audio_tower.layers.0.self_attn.q_proj.weight": (4, 4),
    "multi_modal_projector.ln_pre.weight": (8,),
    "multi_modal_projector.linear_1.weight": (8, 8),
    "multi_modal_projector.ln_mid.weight": (4,),
    "multi_modal_projector.linear_2.weight": (32, 4),
}
VOX_CONFIG = {
    "model_type": "ultravox", "architectures": ["UltravoxModel"], "stack_factor": 8, "projector_ln_mid": True,
    "auto_map": {"AutoConfig": "ultravox_config.UltravoxConfig"},
    "audio_config": {"model_type": "whisper"}, "audio_model_id": None,
    "text_model_lora_config": {"r": 0, "lora_alpha": 8, "target_modules": ["k_proj", "q_proj"]},
}  # fmt: skip


def parts(shapes: dict[str, Any]) -> Weights:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def save(folder: Path, config: dict[str, Any], weights: Weights, *, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def plain(kind: str, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    if kind == "llama":
        return tiny_llama(seed, tied=False, eos_token_id=3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEXT)).eval()


def save_omni(folder: Path, kind: str, model_type: str) -> tuple[Path, Any]:
    model = plain(kind)
    config = {**model.config.to_dict(), **OMNI_CONFIG, "model_type": model_type, "architectures": ["OmniSpeech"]}
    if model_type.startswith("omni2"):
        config["speech_generator"] = {"model_type": "qwen2", "hidden_size": 896}
    return save(folder, config, {**model.state_dict(), **parts(OMNI)}), model


def same(model: Any, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tiny_models(tmp_path)
    return tmp_path / "llm"


# -- LLaMA-Omni --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("llama", "omni_speech_llama"), ("llama", "omni_speech2s_llama"), ("qwen2", "omni2_speech2s_qwen2")],
)
def test_llama_omni_is_its_language_model(tmp_path: Path, kind: str, model_type: str) -> None:
    folder, model = save_omni(tmp_path / "omni", kind, model_type)
    name = str(folder)
    assert (resolve(name), model_kind(name)) == (name, "language_model")
    loaded, tokenizer = load_language_model(name)
    assert type(loaded).__name__ == {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    same(loaded, model.state_dict())
    assert list(scored_parameters(loaded)) == list(scored_parameters(model))
    ids = tokenizer("Is it?", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert list(blank_language_model(name).state_dict()) == list(model.state_dict())
    require_loadable("language_model", name)
    n = len(model.state_dict())
    assert reading_notes(name) == [
        f"{name} is read as a checkpoint like LLaMA-Omni's: its language model is its own ({n} tensors); left out: "
        "model.speech_encoder (2 tensors), model.speech_projector (3 tensors), speech_generator (2 tensors)."
    ]


def test_llama_omni_in_shards_and_without_a_layer(tmp_path: Path) -> None:
    folder, model = save_omni(tmp_path / "omni", "llama", "omni_speech_llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, keys in files.items():
        save_file({key: weights[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load_language_model(str(folder))[0], model.state_dict())
    without = {name: weight for name, weight in weights.items() if not name.startswith("model.layers.1.")}
    cut = save(tmp_path / "cut", json.loads((folder / "config.json").read_text()), without)
    with pytest.raises(UserError, match=r"no checkpoint of LlamaForCausalLM .*it lacks 9 of the model's weights"):
        load_language_model(str(cut))


def test_its_scores_from_the_command_line(tmp_path: Path) -> None:
    folder, model = save_omni(tmp_path / "omni", "llama", "omni_speech_llama")
    options = importance.Options(str(folder), "facts", tmp_path / "scores", limit=4, device="cpu")
    lines = list(importance.run(options))
    assert Scores.open(tmp_path / "scores").names == tuple(scored_parameters(model))
    assert any("left out: model.speech_encoder (2 tensors)" in line for line in lines)


# -- Ultravox ----------------------------------------------------------------------------------------------------------
def prefixed(weights: Weights, prefix: str = "language_model.") -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def test_ultravox_whose_language_model_was_trained(tmp_path: Path) -> None:
    model = plain("llama")
    config = {**VOX_CONFIG, "text_model_id": None, "text_config": model.config.to_dict()}
    folder = save(tmp_path / "vox", config, {**prefixed(model.state_dict()), **parts(VOX)})
    loaded, _ = load_language_model(str(folder))
    same(loaded, model.state_dict())
    require_loadable("language_model", str(folder))
    (note,) = reading_notes(str(folder))
    assert f"its own ({len(model.state_dict())} tensors); left out: audio_tower (2 tensors), multi_modal_pr" in note


@pytest.mark.parametrize("named", [False, True])
def test_ultravox_whose_files_do_not_have_the_language_model(tmp_path: Path, base: Path, named: bool) -> None:
    config = {**VOX_CONFIG, "text_model_id": str(tmp_path / "gone" if named else base)}
    folder = save(tmp_path / "vox", config, parts(VOX), tokenizer=False)
    if named:
        with pytest.raises(UserError, match=r"vox is a checkpoint like Ultravox\'s on the language .*gone, which"):
            resolve(str(folder))
    name = f"{base} + {folder}" if named else str(folder)
    assert resolve(name) == name
    assert model_kind(name) == "language_model"
    model, processor = load_text_model(name)
    same(model, load_language_model(str(base))[0].state_dict())
    assert processor.tokenizer.get_vocab() == load_tokenizer(str(base)).get_vocab()
    assert "its language model is that of" in reading_notes(name)[0]
    assert fingerprint(name) != fingerprint(str(base))
    require_loadable("language_model", name)


@pytest.mark.parametrize("default", ["", ".default"])
def test_ultravox_with_lora_updates_equals_peft(tmp_path: Path, base: Path, default: str) -> None:
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "lora", AutoModelForCausalLM.from_pretrained(base), lora)
    expected = load_language_model(str(adapter))[0].state_dict()
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = {f"language_model.{name.replace('.weight', default + '.weight')}": t for name, t in tensors.items()}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "unfreeze_layers": None}
    config = {**VOX_CONFIG, "text_model_id": str(base), "text_model_lora_config": settings}
    folder = save(tmp_path / "vox", config, {**trained, **parts(VOX)})
    found = load_language_model(str(folder))[0].state_dict()
    assert found.keys() == expected.keys()
    changed = 0
    for name, weight in load_language_model(str(base))[0].state_dict().items():
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        changed += not torch.equal(found[name], weight)
    assert changed == 4
    assert "with 8 tensors of this checkpoint" in reading_notes(str(folder))[0]
    halved = {name: weight for name, weight in trained.items() if "layers.1.self_attn.q_proj.lora_B" not in name}
    half = save(tmp_path / "half", config, halved)
    with pytest.raises(UserError, match=r"half of a LoRA update of model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_language_model(str(half))
    unscaled = save(tmp_path / "unscaled", {**config, "text_model_lora_config": None}, trained)
    with pytest.raises(UserError, match=r"does not say how they are scaled \(text_model_lora_config"):
        load_language_model(str(unscaled), device="meta")


def test_ultravox_with_some_layers_trained(tmp_path: Path, base: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = prefixed({name: torch.full((48, 32), 0.5)})
    folder = save(tmp_path / "vox", {**VOX_CONFIG, "text_model_id": str(base)}, {**weights, **parts(VOX)})
    before, after = (load_language_model(str(where))[0].state_dict() for where in (base, folder))
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
    assert torch.equal(after[name], weights[f"language_model.{name}"])


def test_ultravox_on_another_base_or_on_none(tmp_path: Path, base: Path) -> None:
    config = {**VOX_CONFIG, "text_model_id": str(base)}
    deeper = save(tmp_path / "deeper", config, prefixed({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}))
    wider = save(tmp_path / "wider", config, prefixed({"model.layers.1.mlp.up_proj.weight": torch.ones(48, 33)}))
    for folder, said in ((deeper, "up_proj.weight, which that does not have"), (wider, r"\(48, 33\) instead of \(48,")):
        with pytest.raises(UserError, match=rf"was not trained from .*llm: it holds model\.layers\.\d\.mlp\..*{said}"):
            load_language_model(str(folder), device="meta")
    none = save(tmp_path / "none", {**VOX_CONFIG, "text_model_id": None, "text_config": {}}, parts(VOX))
    with pytest.raises(UserError, match=r"none is a checkpoint like Ultravox.s without a language model, and its conf"):
        resolve(str(none))
    with pytest.raises(UserError, match="neither an adapter nor a checkpoint without its language model"):
        resolve(f"{base} + {base}")


HUB = """
import sys
from palimpsest.models.loading import fingerprint, load_language_model, reading_notes
for name in ("ada/vox", "ada/omni"):
    print(len(fingerprint(name)), float(load_language_model(name)[0].model.norm.weight[0]), reading_notes(name)[0])
"""


def test_both_from_the_hub(tmp_path: Path) -> None:
    """From a cache as downloads leave it, without a network."""

    def stored(name: str) -> Path:
        (tmp_path / f"models--ada--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--ada--{name}" / "refs" / "main").write_text("a" * 40)
        return tmp_path / f"models--ada--{name}" / "snapshots" / ("a" * 40)

    model = plain("llama")
    torch.nn.init.constant_(model.model.norm.weight, 2.0)
    model.save_pretrained(stored("base"))
    tiny_tokenizer().save_pretrained(tmp_path / "models--ada--base" / "snapshots" / ("a" * 40))
    save(stored("vox"), {**VOX_CONFIG, "text_model_id": "ada/base"}, parts(VOX), tokenizer=False)
    config = {**model.config.to_dict(), **OMNI_CONFIG, "model_type": "omni_speech_llama"}
    save(stored("omni"), config, {**model.state_dict(), **parts(OMNI)})
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True)
    vox, omni = done.stdout.splitlines() or [done.stderr, ""]
    assert vox.startswith("64 2.0 "), done.stderr
    assert "its language model is that of ada/base; left out: audio_tower (2 tensors)" in vox
    assert omni.startswith("64 2.0 ")


# -- configs -----------------------------------------------------------------------------------------------------------
def test_other_configs_mean_no_such_layout() -> None:
    for kind in ("llama", "qwen2_audio", "palimpsest_speech_lm", "omni_speech", None, 7):
        assert read_layout({"model_type": kind}) is None
    layout = read_layout({"model_type": "omni2_speech2s_qwen2", "hidden_size": 8, "speech_generator": {}})
    assert layout is not None
    assert layout.config == {"hidden_size": 8, "model_type": "qwen2"}
