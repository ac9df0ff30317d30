"""palimpsest drift: files, resumption to the bit, and what is left out or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from palimpsest.commands import drift
from palimpsest.evaluation.drift_settings import GeneralText, Sampling
from palimpsest.files import UserError, read_json
from palimpsest.models import loading
from test_models_adapters import save_adapter
from tiny import save_tiny_models, tiny_llama, tiny_speech_lm, tiny_tokenizer

PARAGRAPHS = "\n\n".join(f"Paragraph {i} says this and {'that ' * i}." for i in range(6))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm, the base; other, another model; lora, an adapter on the base; speech, whose language model is the base's."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    tiny_llama(1, eos_token_id=3).save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")
    base = AutoModelForCausalLM.from_pretrained(folder / "llm")
    save_adapter(folder / "lora", base, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model, processor = tiny_speech_lm()
    model.save_pretrained(folder / "speech")
    processor.save_pretrained(folder / "speech")
    (folder / "wiki.txt").write_text(PARAGRAPHS)
    return folder


def run(models: Path, out: Path, *tuned: str, **options: Any) -> list[str]:
    text = GeneralText(options.pop("text", str(models / "wiki.txt")), window=16)
    given = {"sampling": Sampling(4, 8), "general": text, **options}
    names = [str(models / name) for name in tuned]
    return list(drift.run(drift.Options(str(models / "llm"), names, out, **given)))


def stored(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were loaded, in order."""
    names: list[str] = []
    load = loading.load_text_model

    def counted(name: str, **options: Any) -> Any:
        names.append(Path(name).name)
        return load(name, **options)

    monkeypatch.setattr(loading, "load_text_model", counted)
    return names


def test_what_it_writes_and_says(models: Path, tmp_path: Path) -> None:
    lines = run(models, tmp_path, "other", "lora", "speech")
    found = read_json(tmp_path / "drift.json")
    rows = {(Path(row["model"]).name, row["text"], row["tokens"]): row for row in found["drift"]}
    assert {(name, text) for name, text, _ in rows} == {
        (name, text) for name in ("other", "lora", "speech") for text in ("plain", "chat")
    }
    assert rows["other", "plain", "all"]["kl"] > rows["lora", "plain", "all"]["kl"] > 0
    same = rows["speech", "chat", "all"]
    assert (same["kl"], same["kl_ci_high"], same["reverse_kl"], same["agreement"]) == (0, 0, 0, 1)
    assert same["loss"] == same["loss_base"]
    assert found["left_out"] == []
    assert found["compute"]["dtype"] == "float32"
    assert found["own_text"]["n_texts"] == 4
    text = read_json(tmp_path / "general_text.json")
    assert [Path(row["model"]).name for row in text["general_text"]] == ["llm", "other", "lora", "speech"]
    assert {row["n_bytes"] for row in text["general_text"]} == {sum(map(len, PARAGRAPHS.split("\n\n")))}
    comparisons = {Path(row["method"]).name: row for row in text["comparisons"]}
    assert comparisons["speech"]["left_out"] == "nothing separates them"
    assert comparisons["other"]["difference"] == pytest.approx(
        text["general_text"][1]["per_byte"] - text["general_text"][0]["per_byte"]
    )
    assert any("6 are longer than 16 tokens and were cut into windows" in line for line in lines)
    assert all((tmp_path / name).exists() for name in (*found["files"].values(), "own_text.jsonl", "own_text.json"))


def test_what_is_there_is_not_measured_again_and_the_rest_comes_to_the_same(
    models: Path, tmp_path: Path, loads: list[str]
) -> None:
    lines = run(models, tmp_path, "other", "lora")
    whole = stored(tmp_path)
    loads.clear()
    assert run(models, tmp_path, "other", "lora") == lines
    assert loads == []
    assert stored(tmp_path) == whole
    files = read_json(tmp_path / "drift.json")["files"]
    (tmp_path / files[str(models / "lora")]).unlink()
    (tmp_path / "general_text.json").unlink()
    run(models, tmp_path, "other", "lora")
    assert loads == ["llm", "lora", "llm"]  # an adapter is loaded with its base
    assert stored(tmp_path) == whole
    loads.clear()
    run(models, tmp_path, "other", "lora", "speech")  # one more model
    assert loads == ["llm", "speech"]
    run(models, tmp_path / "alone", "lora")
    assert (tmp_path / "alone" / "own_text.jsonl").read_bytes() == whole["own_text.jsonl"]
    name = files[str(models / "lora")]
    assert (tmp_path / "alone" / name).read_bytes() == whole[name]


def test_other_tokens_are_left_out_of_drift_and_stay_in_general_text(models: Path, tmp_path: Path) -> None:
    tiny_llama(1).save_pretrained(tmp_path / "foreign")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "foreign")
    file = tmp_path / "foreign" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    lines = run(models, tmp_path / "out", str(tmp_path / "foreign"), "lora")
    found = read_json(tmp_path / "out" / "drift.json")
    assert [Path(row["model"]).name for row in found["left_out"]] == ["foreign"]
    assert "its tokens are not the base's (2 differ" in found["left_out"][0]["reason"]
    assert {Path(row["model"]).name for row in found["drift"]} == {"lora"}
    assert any(line.startswith("left out: ") for line in lines)
    assert len(read_json(tmp_path / "out" / "general_text.json")["comparisons"]) == 2


def test_without_text_there_is_no_general_text(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path, "lora", text=None)
    assert not (tmp_path / "general_text.json").exists()


def test_what_is_refused_before_a_model_is_loaded(models: Path, tmp_path: Path, loads: list[str]) -> None:
    with pytest.raises(UserError, match="lora is given twice"):
        run(models, tmp_path / "a", "lora", "lora")
    with pytest.raises(UserError, match="does not exist; give a file of text"):
        run(models, tmp_path / "a", "lora", text=str(models / "none.txt"))
    with pytest.raises(UserError, match="nothing is not a folder"):
        run(models, tmp_path / "a", "nothing")
    bare = tmp_path / "bare"
    tiny_llama(1).save_pretrained(bare)
    with pytest.raises(UserError, match=r"bare has no tokenizer \(tokenizer\.json …\); copy .* into it\.$"):
        run(models, tmp_path / "a", "lora", str(bare))
    assert loads == []
    assert not (tmp_path / "a").exists()
    run(models, tmp_path / "b", "lora", text=None)
    with pytest.raises(UserError, match=r"own_text\.jsonl is another text \(seed: 0 → 1\)"):
        run(models, tmp_path / "b", "lora", seed=1)
