"""A PEFT adapter's folder is a model like any other: its base with the adapter merged, to the bit as PEFT does it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from palimpsest.files import UserError
from palimpsest.models.loading import (
    fingerprint,
    is_speech_lm,
    load_language_model,
    load_speech_lm,
    load_tokenizer,
    model_kind,
    require_loadable,
    resolve,
)
from tiny import save_tiny_models, tiny_llama, tiny_speech_lm, tiny_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def save_adapter(folder: Path, base: Any, config: Any, seed: int = 0) -> Path:
    """An adapter on `base` that changes it, as peft writes it."""
    adapted = get_peft_model(base, deepcopy(config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """llm, a model; lora, an adapter on it by its path."""
    save_tiny_models(tmp_path)
    save_adapter(tmp_path / "lora", AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), LORA)
    return tmp_path


def weights(name: str, **options: Any) -> dict[str, torch.Tensor]:
    return load_language_model(name, **options)[0].state_dict()


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        LoraConfig(r=2, use_dora=True, target_modules=["v_proj"], task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
)
def test_it_is_what_peft_merges_to_the_bit(tmp_path: Path, config: Any) -> None:
    tiny_llama(tied=False).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    adapter = save_adapter(tmp_path / "it", AutoModelForCausalLM.from_pretrained(tmp_path / "llm"), config)
    before = fingerprint(str(tmp_path / "llm")), fingerprint(str(adapter))
    got, expected = weights(str(adapter)), by_peft(tmp_path / "llm", adapter)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert any(not torch.equal(tensor, got[key]) for key, tensor in weights(str(tmp_path / "llm")).items())
    assert before == (fingerprint(str(tmp_path / "llm")), fingerprint(str(adapter)))  # no file was changed


def test_the_sum_is_formed_in_float32_and_rounded_once(folder: Path) -> None:
    exact = by_peft(folder / "llm", folder / "lora")
    for dtype in ("bfloat16", torch.bfloat16):
        got = weights(str(folder / "lora"), dtype=dtype)
        assert all(torch.equal(got[key], exact[key].bfloat16()) for key in got)
    assert all(tensor.dtype is torch.float32 for tensor in weights(str(folder / "lora"), dtype="auto").values())


def test_a_base_that_is_named_in_front_takes_the_place_of_its_own(folder: Path) -> None:
    (folder / "llm").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"lora is an adapter on .*llm, which is not to be had here: .*BASE \+ .*lora"):
        resolve(str(folder / "lora"))
    named = f"{folder / 'elsewhere'} + {folder / 'lora'}"
    assert resolve(named) == named == resolve(resolve(named))
    got, expected = weights(named), by_peft(folder / "elsewhere", folder / "lora")
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_an_adapter_on_an_adapter(folder: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(folder / "llm")
    first = PeftModel.from_pretrained(first, str(folder / "lora")).merge_and_unload()
    first.save_pretrained(folder / "first")
    second = save_adapter(folder / "second", AutoModelForCausalLM.from_pretrained(folder / "first"), LORA, seed=1)
    got, expected = weights(f"{folder / 'lora'} + {second}"), by_peft(folder / "first", second)
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_what_it_is_and_its_fingerprint(folder: Path) -> None:
    lora, base = str(folder / "lora"), str(folder / "llm")
    assert model_kind(resolve(lora)) == "language_model"
    require_loadable("language_model", lora)
    named = f"{base} + {lora}"
    assert len({fingerprint(lora), fingerprint(base)}) == 2
    assert fingerprint(named) == fingerprint(lora)
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, folder / "lora" / "adapter_model.safetensors")
    assert fingerprint(named) == fingerprint(lora)
    changed = fingerprint(lora)
    settings = json.loads((folder / "llm" / "generation_config.json").read_text())
    (folder / "llm" / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.5}))
    assert fingerprint(lora) != changed


def test_of_a_speech_lm(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=r"language_model\..*(q_proj|down_proj)")
    adapter = save_adapter(tmp_path / "lora", load_speech_lm(tmp_path / "base")[0], config)
    name = f"{tmp_path / 'base'} + {adapter}"
    assert is_speech_lm(resolve(name))
    merged, _ = load_speech_lm(name)
    inside, _ = load_language_model(name)
    changed = [key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, model.state_dict()[key])]
    assert changed
    assert all("q_proj" in key or "down_proj" in key for key in changed)
    for key, tensor in merged.language_model.state_dict().items():
        assert torch.equal(tensor, inside.state_dict()[key])


def test_its_own_tokenizer_and_more_rows_of_the_embedding(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "llm")
    base.resize_token_embeddings(304, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    grown = save_adapter(folder / "grown", base, config)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<audio>"])
    tokenizer.save_pretrained(grown)
    model, loaded = load_language_model(str(grown))
    stored = load_file(grown / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert len(stored) == 304
    assert torch.equal(model.get_input_embeddings().weight, stored)
    assert "<audio>" in loaded.get_vocab()
    assert "<audio>" in load_tokenizer(str(grown)).get_vocab()
    assert "<audio>" not in load_tokenizer(str(folder / "lora")).get_vocab()
    require_loadable("language_model", str(grown))


# -- what is refused, in one sentence ----------------------------------------------------------------------------------
def change_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base_model_name_or_path": None}, r"does not name its base; name it in front: 'BASE \+ .*lora'"),
        ({"revision": "v2"}, r"on the revision v2 of .*llm; download that"),
        ({"peft_type": None}, "adapter_config.json is damaged or not PEFT's"),
    ],
)
def test_a_config_that_does_not_say_it_all(folder: Path, values: dict[str, Any], said: str) -> None:
    change_config(folder / "lora", **values)
    with pytest.raises(UserError, match=said):
        resolve(str(folder / "lora"))


def test_an_adapter_without_its_weights_or_a_pointer_to_them(folder: Path) -> None:
    file = folder / "lora" / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="only the pointer that git-lfs leaves"):
        resolve(str(folder / "lora"))
    file.unlink()
    with pytest.raises(UserError, match="an adapter without its weights"):
        resolve(str(folder / "lora"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_are_missing_or_another_model_s(folder: Path, device: str) -> None:
    file = folder / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.1" not in key}, file)
    with pytest.raises(UserError, match=r"it lacks 4 weights that its config asks for \(base_model\.model\.model"):
        load_language_model(str(folder / "lora"), device=device)
    save_file({**tensors, "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, file)
    with pytest.raises(UserError, match=r"it has 1 weights that do not belong there \(base_model\.model\.model\."):
        load_language_model(str(folder / "lora"), device=device)
    save_file({key: tensor[..., :1].contiguous() for key, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=r"The adapter .*lora cannot be put on .*llm"):
        load_language_model(str(folder / "lora"), device=device)


def test_an_adapter_that_is_no_change_of_weights(folder: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    adapter = save_adapter(folder / "prefix", AutoModelForCausalLM.from_pretrained(folder / "llm"), config)
    with pytest.raises(UserError, match=r"prefix \(PREFIX_TUNING\) cannot become part of the weights"):
        load_language_model(str(adapter))


def test_an_update_that_is_not_finite(folder: Path) -> None:
    file = folder / "lora" / "adapter_model.safetensors"
    save_file({key: tensor * float("nan") for key, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"lora: the weight model\.layers\.0\.self_attn\.q_proj\.weight is not finite"):
        load_language_model(str(folder / "lora"))


@pytest.mark.parametrize("merged", [True, False])
def test_a_whole_model_with_an_adapter_beside_it_is_refused(folder: Path, merged: bool) -> None:
    """transformers puts the adapter on whatever lies there, on the merged weights a second time."""
    model = by_peft(folder / "llm", folder / "lora")
    whole = AutoModelForCausalLM.from_pretrained(folder / "llm")
    if merged:
        whole.load_state_dict(model)
    whole.save_pretrained(folder / "lora")
    tiny_tokenizer().save_pretrained(folder / "lora")
    with pytest.raises(UserError, match=r"lora holds a whole model and an adapter, and whether .* move the files ad"):
        load_language_model(str(folder / "lora"))
    for file in (folder / "lora").glob("adapter_*"):
        file.unlink()
    found = weights(str(folder / "lora"))
    expected = model if merged else weights(str(folder / "llm"))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
