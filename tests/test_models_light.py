"""Light folders: the SpeechLM they give back is the one trained, and no other model passes for its parts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from palimpsest.commands import ask, deactivate, evaluate, importance
from palimpsest.export import folders as export
from palimpsest.files import UserError, hash_file
from palimpsest.models import embedded, light
from palimpsest.models.loading import (
    embedding_width,
    fingerprint,
    is_speech_lm,
    load_encoder,
    load_language_model,
    load_speech_lm,
    load_tokenizer,
    text_source,
    weight_bytes,
)
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.prompts import PromptStyle
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.models.trained_adaptor import read_adaptor
from palimpsest.training.methods import Method, add_lora, merge_lora
from tiny import save_tiny_models

SHIPPED = embedded.WEIGHTS / embedded.SHIPPED[0]
WAVE = np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def trained(models: Path, folder: Path, *, lora: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as training writes it: adaptor and, with `lora`, low-rank updates that matter, merged."""
    language_model, tokenizer = load_language_model(str(models / "llm"), dtype=dtype)
    encoder, extractor = load_encoder(str(models / "whisper"), dtype=dtype)
    model = SpeechLM.from_parts(encoder, language_model, adaptor_hidden_size=24, speech_length="pad_to_30s", seed=5)
    # A feature that never varies: 1/σ is 1e5, beyond float16.
    model.adaptor.calibrate(torch.cat([torch.randn(1, 50, 15), torch.zeros(1, 50, 1)], dim=2).to(dtype), 0.2)
    if lora:
        add_lora(model, Method("lora", rank=2))
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.language_model.save_pretrained(folder / "adapter")
        if dtype == torch.float32:
            merge_lora(model)
        else:  # training refuses it now; checkpoints that were merged in bfloat16 before can still be made light
            model.language_model = model.language_model.merge_and_unload()
    model.save_pretrained(folder)
    style = PromptStyle("Be brief.", "Answer what you hear.", "2025-02-01")
    SpeechLMProcessor(tokenizer, extractor, 5, "pad_to_30s", style).save_pretrained(folder)
    return folder


def make_light(checkpoint: Path, models: Path, out: Path) -> Path:
    export.export(checkpoint, light=out, language_model=str(models / "llm"), encoder=str(models / "whisper"))
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(models, tmp_path_factory.mktemp("trained"), lora=True)


@pytest.fixture(scope="module")
def small(checkpoint: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_light(checkpoint, models, tmp_path_factory.mktemp("light") / "out")


# ---------------------------------------------------------------------------------------------------------------------
# The same model again
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("lora", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_a_light_folder_gives_the_trained_model(tmp_path: Path, models: Path, lora: bool, dtype: torch.dtype) -> None:
    whole = trained(models, tmp_path / "whole", lora=lora, dtype=dtype)
    out = make_light(whole, models, tmp_path / "light")
    expected, processor = load_speech_lm(whole, dtype="auto")
    found, again = load_speech_lm(out, dtype="auto")
    assert found.dtype == dtype
    assert found.config.speech_length == again.speech_length == "pad_to_30s"
    assert again.style == processor.style
    assert (out / "adapter").exists() == lora
    for name, tensor in expected.state_dict().items():
        other = found.state_dict()[name]
        if name.startswith("adaptor.") and tensor.ndim == 2:
            assert torch.equal(other, tensor.half().to(dtype)), name  # rounded once
        elif name.startswith("language_model.model.layers.") and tensor.ndim == 2 and lora:
            assert torch.allclose(other.float(), tensor.float(), atol=1e-3 if dtype == torch.float32 else 0.02), name
        else:
            assert torch.equal(other, tensor), name
    assert float(found.adaptor.input_scale.max()) == pytest.approx(1e5, rel=1e-2)
    speech = processor(audio=WAVE)
    assert torch.equal(found.generate(**again(audio=WAVE), **GREEDY), expected.generate(**speech, **GREEDY))


def test_only_what_was_trained_is_kept(small: Path, checkpoint: Path) -> None:
    assert {str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()} == {
        "README.md", "adaptor.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "light.json",
    }  # fmt: skip
    whole = load_file(checkpoint / "adapter/adapter_model.safetensors")
    kept = load_file(small / "adapter/adapter_model.safetensors")
    assert whole.keys() == kept.keys()
    assert all(torch.equal(kept[name], tensor.half()) for name, tensor in whole.items())
    matrices = [t for t in load_file(small / "adaptor.safetensors").values() if t.ndim == 2]
    assert [t.dtype for t in matrices] == [torch.float16] * 2


def test_peft_alone_reads_the_updates(small: Path, models: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(models / "llm")
    merged = PeftModel.from_pretrained(base, str(small / "adapter")).merge_and_unload().state_dict()
    ours = load_language_model(str(small))[0].state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in merged.items())


def test_it_is_taken_wherever_a_speech_llm_is(small: Path, models: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "q.wav", WAVE, 16_000)
    row = {"id": "a", "question": "why?", "answer": "so.", "audio": "q.wav"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    data, name = str(tmp_path / "q.jsonl"), str(small)
    assert is_speech_lm(name)
    assert isinstance(ask.answer(ask.Options(name, audio=tmp_path / "q.wav", max_new_tokens=4)), str)
    assert isinstance(ask.answer(ask.Options(name, text="why?", max_new_tokens=4)), str)
    options: dict[str, Any] = {"split": "test", "limit": None, "batch_size": 2}
    for modality in ("text", "speech"):
        asked = evaluate.Options(
            name, data, tmp_path / modality, modality=modality, asr="", max_new_tokens=4, perplexity=True,
            device="cpu", **options,
        )  # fmt: skip
        assert [line for line in evaluate.run(asked) if "/1  " in line]
    scores = tmp_path / "scores"
    assert list(importance.run(importance.Options(name, data, scores, reductions="signed_sum", **options)))
    switched = deactivate.Options(name, scores, data, tmp_path / "off", ratios="0.1", random_seeds=1, **options)
    conditions = [line.split()[0] for line in deactivate.run(switched)]
    assert conditions == ["base", "top", "bottom", "random", "computed"]
    folders = {key: tmp_path / f"exported-{key}" for key in ("text_llm", "speech_lm", "adapter")}
    export.export(small, **folders)
    expected = load_speech_lm(small)[0].state_dict()
    found = load_speech_lm(folders["speech_lm"])[0].state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    assert text_source(name) == str(models / "llm")
    assert weight_bytes(name) == weight_bytes(str(models / "llm"))
    assert embedding_width(name) == embedding_width(str(folders["speech_lm"])) == 32
    assert len(load_tokenizer(name)) == len(load_tokenizer(str(models / "llm")))


def test_the_code_of_its_card_runs(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = (small / "README.md").read_text()
    assert "adaptor and LoRA of rank 2" in card
    assert "a local folder named llm" in card
    assert str(small.parent) not in card
    soundfile.write(tmp_path / "question.wav", WAVE, 16_000)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    code = code.replace('"."', repr(str(small))).replace('"question.wav"', repr(str(tmp_path / "question.wav")))
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_its_card_says_what_the_run_does_not(checkpoint: Path, models: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "q.wav", WAVE, 16_000)
    row = {"id": "a", "question": "why?", "answer": "so.", "audio": "q.wav"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    options: dict[str, Any] = {"split": "test", "limit": None, "max_new_tokens": 2, "batch_size": 1, "device": "cpu"}
    for model, modality in ((checkpoint, "speech"), (models / "llm", "text")):
        out, data = tmp_path / modality, str(tmp_path / "q.jsonl")
        asked = evaluate.Options(str(model), data, out, modality=modality, asr="", **options)  # type: ignore[arg-type]
        list(evaluate.run(asked))
    sources = [
        {"kind": "webquestions", "voice": "hibari", "utterances": 70, "licence": "CC-BY 4.0"},
        {"kind": "webquestions", "voice": "espeak-ng:en-us", "utterances": 30, "licence": "CC-BY 4.0"},
    ]
    (tmp_path / "sources.json").write_text(json.dumps(sources))
    (tmp_path / "notes.md").write_text("Taught to write down what is said.\n")
    told: dict[str, Any] = {
        "language_model": str(models / "llm"), "encoder": str(models / "whisper"),
        "sources": tmp_path / "sources.json", "evaluations": [tmp_path / "speech", tmp_path / "text"],
        "notes": tmp_path / "notes.md",
    }  # fmt: skip
    export.export(checkpoint, light=tmp_path / "out", **told)
    card = (tmp_path / "out/README.md").read_text()
    assert "## Training\n\nTaught to write down what is said.\n" in card
    assert re.search(r"\| this model \| q \| speech \| [01] of 1 \|", card)
    assert re.search(r"\| base model \| q \| text \| [01] of 1 \|", card)
    assert "| webquestions | espeak-ng:en-us | 30 | CC-BY 4.0 |" in card
    assert card.count("- Training data, webquestions: CC-BY 4.0") == 1
    assert str(tmp_path) not in card
    binding = json.loads((tmp_path / "text/samples-text.json").read_text())
    (tmp_path / "text/samples-text.json").write_text(json.dumps({**binding, "model": "another"}))
    with pytest.raises(UserError, match=r"results-text\.json was measured on another model"):
        export.export(checkpoint, light=tmp_path / "again", **told)
    with pytest.raises(UserError, match=r"no results-MODALITY\.json"):
        export.export(checkpoint, light=tmp_path / "again", **{**told, "evaluations": [tmp_path / "out"]})


# ---------------------------------------------------------------------------------------------------------------------
# What does not pass
# ---------------------------------------------------------------------------------------------------------------------
def changed(folder: Path, name: str, out: Path) -> Path:
    """A copy in which one weight of a model is another."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name].view(-1)[7] += 0.1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("part", "weight", "said"),
    [
        ("llm", "model.layers.1.mlp.up_proj.weight", "another language model"),
        ("whisper", "encoder.layers.0.fc1.weight", "another encoder"),
    ],
)
def test_other_weights_below_are_refused(
    small: Path, models: Path, tmp_path: Path, part: str, weight: str, said: str
) -> None:
    copy = tmp_path / "light"
    shutil.copytree(small, copy)
    settings = json.loads((copy / "light.json").read_text())
    key = {"llm": "language_model", "whisper": "encoder"}[part]
    # Moved elsewhere it is the same model; with one weight changed it is not.
    shutil.copytree(models / part, tmp_path / "moved")
    settings[key]["name"] = str(tmp_path / "moved")
    (copy / "light.json").write_text(json.dumps(settings))
    load_speech_lm(copy)
    settings[key]["name"] = str(changed(models / part, weight, tmp_path / "other"))
    (copy / "light.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=said) as error:
        load_speech_lm(copy)
    assert str(error.value).count(". ") == 0


def test_the_hash_does_not_depend_on_how_a_model_is_kept(models: Path, tmp_path: Path) -> None:
    whole = load_language_model(str(models / "llm"))[0]
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer(str(models / "llm")).save_pretrained(tmp_path / "half")
    hashes = [
        light.content_hash(load_language_model(name, dtype=dtype)[0].named_parameters())
        for name, dtype in ((str(models / "llm"), "float32"), (str(models / "llm"), "bfloat16"),
                            (str(tmp_path / "half"), "float32"))
    ]  # fmt: skip
    assert len(set(hashes)) == 1
    a = [("x", torch.tensor([[1.0, 2.0]])), ("y", torch.zeros(1))]
    assert light.content_hash(a) == light.content_hash(reversed(a))
    for other in (("x", torch.tensor([[1.0], [2.0]])), ("z", a[0][1]), ("x", torch.tensor([[2.0, 1.0]]))):
        assert light.content_hash([other, a[1]]) != light.content_hash(a)


def test_damaged_folders_are_refused(small: Path, tmp_path: Path) -> None:
    copy = tmp_path / "light"
    shutil.copytree(small, copy)
    before = fingerprint(str(copy))
    data = bytearray((copy / "adaptor.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "adaptor.safetensors").write_bytes(data)
    for use in (load_speech_lm, read_adaptor, fingerprint):
        with pytest.raises(UserError, match=r"adaptor\.safetensors is not the file that light\.json describes"):
            use(str(copy))
    shutil.copy(small / "adaptor.safetensors", copy)
    assert fingerprint(str(copy)) == before
    shutil.rmtree(copy / "adapter")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not the file"):
        load_speech_lm(copy)
    for text in ("{", "{}", "[]", '{"language_model": {}}'):
        (copy / "light.json").write_text(text)
        with pytest.raises(UserError, match="damaged or of another version"):
            load_speech_lm(copy)


def test_what_has_no_light_form_is_refused(models: Path, checkpoint: Path, small: Path, tmp_path: Path) -> None:
    names = {"language_model": str(models / "llm"), "encoder": str(models / "whisper")}
    out = tmp_path / "out"
    full = changed(checkpoint, "language_model.model.layers.0.mlp.up_proj.weight", tmp_path / "full")
    with pytest.raises(UserError, match=r"not .*llm with the low-rank updates .*up_proj\.weight differs"):
        export.export(full, light=out, **names)
    shutil.rmtree(full / "adapter")  # nothing left to explain how it came to be
    with pytest.raises(UserError, match="only methods of kind adaptor, lora and inserted"):
        export.export(full, light=out, **names)
    other = changed(models / "whisper", "encoder.layers.0.fc1.weight", tmp_path / "other")
    with pytest.raises(UserError, match=r"encoder of the checkpoint is not .*other"):
        export.export(checkpoint, light=out, **{**names, "encoder": str(other)})
    with pytest.raises(UserError, match="give --language-model NAME and --encoder NAME"):
        export.export(checkpoint, light=out, language_model=names["language_model"])
    with pytest.raises(UserError, match="light folder already"):
        export.export(small, light=out, **names)
    (tmp_path / "sources.json").write_text('[{"kind": "facts"}]')
    with pytest.raises(UserError, match="kind, utterances and licence"):
        export.export(checkpoint, light=out, **names, sources=tmp_path / "sources.json")
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The shipped one
# ---------------------------------------------------------------------------------------------------------------------
def test_ask_without_a_model_takes_the_shipped_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from palimpsest.cli import app

    soundfile.write(tmp_path / "q.flac", np.stack([WAVE, WAVE / 2], axis=1), 44_100)
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    spoken = CliRunner().invoke(app, ["ask", "--audio", str(tmp_path / "q.flac")])
    assert isinstance(spoken.exception, UserError)
    assert "embedded:smollm2-135m-speech are not in this installation" in str(spoken.exception)
    shutil.copytree(small, tmp_path / embedded.SHIPPED[0])
    for question in (["--audio", str(tmp_path / "q.flac")], ["--text", "why?"]):
        given = CliRunner().invoke(app, ["ask", *question, "--max-new-tokens", "4", "--model", str(small)])
        by_default = CliRunner().invoke(app, ["ask", *question, "--max-new-tokens", "4"])
        assert by_default.exit_code == 0
        assert by_default.stdout == given.stdout
    assert export.find_checkpoint(Path("embedded:smollm2-135m-speech")).path == tmp_path / embedded.SHIPPED[0]


@pytest.mark.skipif(not SHIPPED.exists(), reason=f"no weights in {SHIPPED.name}")
def test_the_shipped_folder_is_whole_and_public() -> None:
    files = {str(path.relative_to(SHIPPED)): path for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files.values()) <= 20e6
    assert {"README.md", "light.json", "adaptor.safetensors"} <= set(files)
    settings = light.read_light(SHIPPED)  # checks the hashes
    assert {name: hash_file(files[name]) for name in settings.files} == settings.files
    assert set(settings.files) == {name for name in files if name.endswith(".safetensors")}
    assert settings.language_model.name == "embedded:smollm2-135m-instruct"
    assert settings.encoder.name == "embedded:whisper-tiny.en"
    card = files["README.md"].read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", card, flags=re.M)
    assert {"Training data", "Measured", "How to load it", "Licences of what it was made of"} <= set(headings)
    licences = card.partition("## Licences")[2].splitlines()
    named = [line for line in licences if line.startswith("- ")]
    assert len(named) >= 3
    assert all(re.search(r": (Apache-2\.0|MIT|CC-BY|CC0|as this project)", line) for line in named), named
    for name in ("README.md", "light.json", "adapter/adapter_config.json"):
        if name in files:
            text = files[name].read_text(encoding="utf-8")
            assert not re.search(r"(?:^|[\s\"'`(=])(?:/[\w.-]+){2,}|[A-Z]:\\", text), name
    packaged = Path(embedded.__file__).parents[1]
    assert SHIPPED.is_relative_to(packaged)


def test_the_weights_are_packaged() -> None:
    """The patterns of pyproject.toml take every file of a light folder."""
    import tomllib
    from fnmatch import fnmatch

    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["palimpsest"]
    for name in ("README.md", "light.json", "adaptor.safetensors", "adapter/adapter_config.json",
                 "adapter/adapter_model.safetensors"):  # fmt: skip
        path = f"weights/{embedded.SHIPPED[0]}/{name}"
        assert any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns), path
