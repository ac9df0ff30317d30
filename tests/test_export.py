"""Exported folders: loaded by transformers and peft alone, they hold the same weights and write the same text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from palimpsest.config import dump_config, parse_config
from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import text_answerer
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.export import folders as export
from palimpsest.export import model_card
from palimpsest.files import UserError
from palimpsest.models import auto
from palimpsest.models.loading import load_speech_lm
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.prompts import PromptStyle
from palimpsest.models.speech_lm import SpeechLM, SpeechLMConfig
from palimpsest.training.methods import Method, add_lora, merge_lora
from tiny import tiny_llama, tiny_speech_lm

QUESTIONS = ("what is this?", "why?", "is it green or blue", "say it", "one two three")


def save(model: SpeechLM, processor: SpeechLMProcessor, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qa(method: str, modality: str, correct: int, metric: str = PRIMARY) -> dict[str, Any]:
    row = {"method": method, "task": "facts", "modality": modality, "n": 40, "correct": correct}
    return {**row, "accuracy": correct / 40, "ci_low": 0.1, "ci_high": 0.9, "metric": metric, "metric_version": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the methods `full` and `low` (LoRA, trained a little by hand), questions and answers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    save(*tiny_speech_lm(3), folder / "methods/full/checkpoint")
    model, processor = tiny_speech_lm(4)
    base = tiny_llama(4, eos_token_id=3).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in model.language_model.state_dict().items())
    add_lora(model, Method("lora", rank=2))
    for name, parameter in model.language_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.language_model.save_pretrained(folder / "methods/low/checkpoint/adapter")
    merge_lora(model)
    save(model, processor, folder / "methods/low/checkpoint")
    config = {
        "name": "tiny",
        "models": {"language_model": "embedded:smollm2-135m-instruct", "encoder": "/home/someone/models/my-whisper"},
        "data": {"train": {"source": "facts", "split": "train"}, "heldout": {"source": "facts", "split": "heldout"}},
        "methods": {"full": {"kind": "full"}, "low": {"kind": "lora", "rank": 2}},
        "evaluation": {"tasks": [{"name": "facts", "source": "facts", "split": "heldout"}]},
    }
    (folder / "study.yaml").write_text(dump_config(parse_config(config, "test")))
    (folder / "data").mkdir()
    rows = [{"id": str(i), "question": "Q?", "answer": "A", "voice": "hibari"} for i in range(7)]
    (folder / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [qa("base", "text", 31), qa("full", "text", 22), qa("low", "text", 23), qa("low", "speech", 5)]
    table += [qa("base", "cascade", 29), qa("low", "text", 40, "any_order_words")]
    (folder / "results.json").write_text(json.dumps({"qa": table}))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The text LLM
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_the_text_llm_is_the_language_model_inside(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model, processor = tiny_speech_lm(5, tied=tied)
    if not tied:
        torch.nn.init.normal_(model.language_model.lm_head.weight)
    model.language_model.generation_config.eos_token_id = 9  # not the tokenizer's end of turn, which is 3
    source = save(model.to(dtype), processor, tmp_path / "checkpoint")
    export.export(source, text_llm=tmp_path / "text")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    inside = load_speech_lm(source, dtype="auto")[0].language_model
    assert type(plain) is type(inside)
    assert plain.dtype == dtype
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert plain.state_dict().keys() == inside.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in inside.state_dict().items())
    assert tokenizer.chat_template == processor.tokenizer.chat_template
    assert tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    assert plain.generation_config.eos_token_id == [3, 9]  # palimpsest ends answers at both

    examples = [Example(id=q, question=q, answers=("",), answer="") for q in QUESTIONS]
    expected = [text_answerer(inside, processor.tokenizer, 12)([example], "text")[0].response for example in examples]
    found = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, add_special_tokens=False
        )
        assert prompt["input_ids"][0].tolist() == processor.text_prompt(question)
        output = plain.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        new = output[0, prompt["input_ids"].shape[1] :]
        found.append(tokenizer.decode([i for i in new if i not in (3, 9)], skip_special_tokens=True).strip())
    assert found == expected
    assert len(set(found)) > 1  # the questions matter


# ---------------------------------------------------------------------------------------------------------------------
# The SpeechLM and the Auto classes
# ---------------------------------------------------------------------------------------------------------------------
def test_the_speech_llm_loads_with_auto_classes(run: Path, tmp_path: Path) -> None:
    export.export(run, method="full", speech_lm=tmp_path / "speech")
    model, processor = tiny_speech_lm(3)
    again = AutoProcessor.from_pretrained(tmp_path / "speech")
    assert isinstance(again, SpeechLMProcessor)
    wave = np.random.default_rng(0).normal(0, 0.1, 9_000).astype(np.float32)
    expected = model.generate(**processor(audio=wave), max_new_tokens=8, do_sample=False)
    for kind in (AutoModelForCausalLM, AutoModel):
        loaded = kind.from_pretrained(tmp_path / "speech")
        assert isinstance(loaded, SpeechLM)
        assert torch.equal(loaded.generate(**again(audio=wave), max_new_tokens=8, do_sample=False), expected)
    assert AutoModel.from_config(loaded.config).config.stack_factor == model.config.stack_factor


@pytest.mark.parametrize("first", ["palimpsest", "transformers"])
def test_import_palimpsest_is_enough_in_either_order(run: Path, first: str) -> None:
    imports = ["import palimpsest", "from transformers import AutoModelForCausalLM, AutoProcessor"]
    code = "\n".join(
        [
            *(imports if first == "palimpsest" else reversed(imports)),
            "import sys",
            "assert 'palimpsest.models.speech_lm' not in sys.modules",
            f"folder = {str(run / 'methods/full/checkpoint')!r}",
            "print(type(AutoProcessor.from_pretrained(folder)).__name__)",
            "print(type(AutoModelForCausalLM.from_pretrained(folder)).__name__)",
            "print(any('palimpsest.models.auto' in type(finder).__module__ for finder in sys.meta_path))",
        ]
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["SpeechLMProcessor", "SpeechLM", "False"]


def test_the_stand_in_makes_the_real_configuration() -> None:
    assert isinstance(auto.StandIn(stack_factor=3), SpeechLMConfig)
    assert auto.StandIn.from_dict({"stack_factor": 4}).stack_factor == 4


def test_a_tokenizer_from_another_processor_does_not_mislead(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    processor.tokenizer._set_processor_class("WhisperProcessor")
    export.export(save(model, processor, tmp_path / "checkpoint"), speech_lm=tmp_path / "speech")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "speech"), SpeechLMProcessor)


def test_the_processor_makes_what_generate_takes() -> None:
    model, processor = tiny_speech_lm()
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 0.1, n).astype(np.float32) for n in (5_000, 16_000)]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**processor(audio=waves), **settings)
    for row, wave in zip(together, waves, strict=True):
        alone = model.generate(**processor(audio=wave), **settings)[0]
        assert row[: len(alone)].tolist() == alone.tolist()
    batch = processor(text=["a longer question?", "short?"])
    assert batch["attention_mask"].sum(1).tolist() == [
        len(processor.text_prompt(q)) for q in ("a longer question?", "short?")
    ]
    assert batch["input_ids"][1, -len(processor.text_prompt("short?")) :].tolist() == processor.text_prompt("short?")
    for bad in (np.zeros((2, 16_000), np.float32), np.zeros(0, np.float32), np.zeros(480_001, np.float32)):
        with pytest.raises(UserError, match="mono recordings at 16 kHz"):
            processor(audio=[bad])
    with pytest.raises(UserError, match="either"):
        processor()


# ---------------------------------------------------------------------------------------------------------------------
# The adapter
# ---------------------------------------------------------------------------------------------------------------------
def test_the_adapter_alone_gives_the_merged_model(run: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    export.export(run, method="low", adapter=tmp_path / "adapter", text_llm=tmp_path / "text")
    base = tiny_llama(4, eos_token_id=3)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "text").state_dict()
    assert not torch.equal(text["model.layers.0.mlp.up_proj.weight"], tiny_llama(4).model.layers[0].mlp.up_proj.weight)
    assert all(torch.allclose(value, text[name], atol=1e-6) for name, value in merged.items())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "embedded:smollm2-135m-instruct"  # as the study names it


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------
def card_of(run: Path, kind: model_card.Kind, method: str = "low", **facts: Any) -> str:
    known = {"n_parameters": 1000, "dtype": "float32", "architecture": "X", "chat": True, "system": None, **facts}
    return model_card.model_card(kind, model_card.Facts(**known), model_card.study_of(run, method))


def test_the_card_says_what_the_run_says(run: Path) -> None:
    card = card_of(run, "speech_lm")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "palimpsest",
        "pipeline_tag": "audio-text-to-text",
        "tags": ["palimpsest"],
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
    }
    assert "7 questions of facts, split train" in body
    assert "| low | facts | text | 23 of 40 | 57.5 % | 10.0 – 90.0 % |" in body
    assert "| low | facts | speech | 5 of 40 | 12.5 % | 10.0 – 90.0 % |" in body
    assert "| base model | facts | cascade | 29 of 40 |" in body
    assert "22 of 40" not in body  # another method's
    assert "40 of 40" not in body  # another metric's
    assert "a local folder named my-whisper" in body
    assert "/home/someone" not in card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", body, flags=re.S)
    assert yaml.safe_load(recipe)["methods"]["low"]["rank"] == 2


def test_a_second_training_run_has_the_card_of_its_method(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "study.yaml").read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**config, "seeds": 2}))
    (tmp_path / "results.json").write_text(json.dumps({"qa": [qa("low", "text", 22), qa("low-seed1", "text", 23)]}))
    for name in ("low", "low-seed1", "stray"):
        (tmp_path / "methods" / name).mkdir(parents=True)
        (tmp_path / "methods" / name / "checkpoint").symlink_to(run / "methods/low/checkpoint")
    export.export(tmp_path, method="low-seed1", text_llm=tmp_path / "text")
    card = (tmp_path / "text/README.md").read_text()
    assert "# tiny: low-seed1" in card
    assert "| Method | `low`: low-rank updates" in card
    assert "; training run 2 of 2 |" in card
    assert "23 of 40" in card
    assert "22 of 40" not in card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, flags=re.S)
    assert yaml.safe_load(recipe)["methods"]["low"]["rank"] == 2
    # Of a method that is not in the recipe the run says nothing.
    assert "lies outside a run directory" in card_of(tmp_path, "text_llm", "stray")


def test_a_card_takes_no_text_for_markup_and_names_no_folder() -> None:
    study = {
        "name": "my `study`",
        "method": "low",
        "methods": {"low": {"kind": "lora", "rank": 2}},
        "models": {"language_model": "/home/ada lovelace/llm", "encoder": "~/whisper", "adaptor": None},
        "data": {"train": {"source": "/home/ada/a.jsonl + alpaca:/home/ada/b", "split": "train"}},
        "prompt": {"system": "```\n<script>"},
        "speech": {"voice": ["own:/home/ada lovelace/voice"]},
        "voices": ["own:/home/ada lovelace/voice"],
        "n_train": 7,
    }
    facts = model_card.Facts(1, "float32", "X", chat=True, system="| a <b> |\n# b")
    card = model_card.model_card("speech_lm", facts, study)
    assert "home" not in card
    assert "lovelace" not in card
    for line in (
        r"# my \`study\`: low",
        r"| System turn | \| a \<b> \| # b |",
        "| Voice of the questions | own:…/voice |",
        "7 questions of a.jsonl + alpaca:b, split train",
    ):
        assert line in card
    assert "````yaml" in card  # its own text has a fence of three


def test_the_card_of_a_language_model_claims_no_hearing(run: Path) -> None:
    card = card_of(run, "text_llm")
    assert "| low | facts | text | 23 of 40 |" in card
    assert "5 of 40" not in card
    assert "cascade" not in card


def test_the_card_of_a_checkpoint_outside_a_run_says_so(tmp_path: Path) -> None:
    export.export(save(*tiny_speech_lm(), tmp_path / "checkpoint"), speech_lm=tmp_path / "speech")
    card = (tmp_path / "speech/README.md").read_text()
    assert "outside a run directory" in card
    assert "license" not in card


@pytest.mark.parametrize("kind", ["text_llm", "speech_lm"])
@pytest.mark.parametrize("system", [None, 'Say "yes"!'])
def test_the_code_of_the_cards_runs(
    tmp_path: Path, kind: str, system: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = tiny_speech_lm()
    processor.style = PromptStyle(system)
    processor.tokenizer.chat_template = "{{ date_string }}{{ enable_thinking }}" + processor.tokenizer.chat_template
    checkpoint = save(model, processor, tmp_path / "checkpoint")
    export.export(checkpoint, **{kind: tmp_path / "out"})
    soundfile.write(tmp_path / "question.wav", np.random.default_rng(0).normal(0, 0.1, 8_000), 16_000)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), flags=re.S)
    code = code.replace('"."', repr(str(tmp_path / "out"))).replace(
        '"question.wav"', repr(str(tmp_path / "question.wav"))
    )
    names: dict[str, Any] = {}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    if kind == "text_llm":
        expected = processor.text_prompt("What is the capital of France?")
        assert names["prompt"]["input_ids"][0].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Bad input and interruptions
# ---------------------------------------------------------------------------------------------------------------------
def test_what_cannot_be_exported_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = {
        r"choose one with --method": {"source": run},
        r"no trained method 'lora'; it has full, low": {"source": run, "method": "lora"},
        r"neither a run with trained methods": {"source": tmp_path},
        r"leave out --method": {"source": run / "methods/full/checkpoint", "method": "full"},
    }
    for said, arguments in refused.items():
        with pytest.raises(UserError, match=said):
            export.export(**arguments, text_llm=out)
    with pytest.raises(UserError, match="no adapter"):
        export.export(run, method="full", adapter=out, text_llm=tmp_path / "text")
    with pytest.raises(UserError, match="--text-llm DIR"):
        export.export(run, method="full")
    with pytest.raises(UserError, match="a folder of its own"):
        export.export(run, method="full", text_llm=out, speech_lm=out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        export.export(run, method="full", text_llm=out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_and_an_interrupted_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (line,) = export.export(run, method="full", text_llm=tmp_path / "out")
    assert line.startswith("text llm: ")
    assert (tmp_path / "out/model.safetensors").exists()

    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.export(run, method="full", text_llm=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
