"""Audio LLMs from the command line: their language model, in text, with the prompts and the names of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from palimpsest.commands import deactivate, drift, importance, probe, validate_importance
from palimpsest.data.examples import Example
from palimpsest.evaluation.audio_llm import audio_llm_answerer
from palimpsest.evaluation.drift import VocabularyError, require_same_tokens
from palimpsest.evaluation.drift_settings import Sampling
from palimpsest.files import UserError, read_json
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loading import load_audio_llm, load_text_model, model_kind, resolve
from palimpsest.models.paired_weights import pair_weights
from palimpsest.models.prompts import PromptStyle, tokenise, tokenizer_for_text
from test_importance_any_model import tiny_audio_llm as tiny_granite
from tiny import tiny_tokenizer
from tiny_audio import CLASSES, MARKS, PARTS_TEMPLATE, TEXT, save_tiny_audio_llm, tiny_audio_llm

ONLY_PARTS = PARTS_TEMPLATE.replace("{% if m['content'] is string %}{{ m['content'] }}{% else %}", "").replace(
    "{% endfor %}{% endif %}", "{% endfor %}"
)
ONLY_STRINGS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '' }}<end>\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each class an audio LLM, and `base`: the language model of the first as a plain one with its prompts."""
    folder = tmp_path_factory.mktemp("models")
    for kind in CLASSES:
        save_tiny_audio_llm(kind, folder / kind)
    audio, processor = load_audio_llm(str(folder / "qwen2_audio"))
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TEXT))
    plain.load_state_dict(dict(pair_weights(plain, audio).tuned))
    plain.generation_config.eos_token_id = 3
    plain.save_pretrained(folder / "base")
    tokenizer = tokenizer_for_text(processor)
    tokenizer.save_pretrained(folder / "base")
    return folder


# -- prompts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("template", [None, ONLY_PARTS, ONLY_STRINGS])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_what_is_scored_is_asked_as_evaluate_asks(kind: str, template: str | None, system: str | None) -> None:
    model, processor = tiny_audio_llm(kind)
    processor.chat_template = template.replace("<sound>", MARKS[kind]) if template else processor.chat_template
    (answer,) = audio_llm_answerer(model, processor, 4, system)([Example("q", "What is it?", ("x",), "x")], "text")
    prompt, after = tokenise(tokenizer_for_text(processor), "What is it?", PromptStyle(system), answer="So.")
    tokenizer = processor.tokenizer
    assert prompt == tokenizer(answer.prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(after).startswith("So.<")


def test_a_template_that_stands_in_the_processor_alone_is_loaded(tmp_path: Path) -> None:
    model, processor = tiny_audio_llm("qwen2_audio")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, text = load_text_model(str(tmp_path))
    assert text.tokenizer.decode(text.text_prompt("Is it?")).endswith(
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_a_place_for_text_is_refused_when_it_is_used() -> None:
    _, processor = tiny_audio_llm("audioflamingo3")
    processor.chat_template = "{% for m in messages %}{{ m['content'] | length }}{% endfor %}"
    with pytest.raises(UserError, match="leaves out the user's turn"):
        tokenise(tokenizer_for_text(processor), "What is it?", PromptStyle())


class MistralCommonBackend(type(tiny_tokenizer())):  # type: ignore[misc]
    """Writes turns as mistral-common does: [INST] is a token (5, `<assistant>` here) that its text does not give."""

    def apply_chat_template(self, turns: Any, **options: Any) -> dict[str, Any]:
        assert options == {"tokenize": True, "return_dict": True}
        ids = [token for turn in turns for token in (5, *self(turn["content"], add_special_tokens=False)["input_ids"])]
        return {"input_ids": [1, *ids, 6], "attention_mask": [1] * (len(ids) + 2)}


def mistral() -> Any:
    tokenizer = MistralCommonBackend(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return tokenizer


def test_a_tokenizer_that_writes_turns_as_tokens() -> None:
    plain = tiny_tokenizer()
    prompt, answer = tokenise(mistral(), "Is it?", PromptStyle("Be brief."), answer="No.")
    words = [plain(text, add_special_tokens=False)["input_ids"] for text in ("Be brief.", "Is it?", "No.")]
    assert prompt == [1, 5, *words[0], 5, *words[1], 6]
    assert answer == [*words[2], 2]
    assert tokenise(mistral(), "Is it?", PromptStyle()) == ([1, 5, *words[1], 6], [])


def test_such_a_tokenizer_has_the_tokens_of_another_by_their_text() -> None:
    plain, other = tiny_tokenizer(), tiny_tokenizer()
    require_same_tokens(plain, mistral())
    state = other.backend_tokenizer.to_str().replace('"a":', '"?":', 1).replace('"b":', '"a":', 1)
    from tokenizers import Tokenizer

    swapped = type(other)(tokenizer_object=Tokenizer.from_str(state.replace('"?":', '"b":', 1)))
    with pytest.raises(VocabularyError, match="its tokens are not the base's"):
        require_same_tokens(swapped, mistral())


# -- commands ----------------------------------------------------------------------------------------------------------
def scored(folder: Path, out: Path) -> Scores:
    list(importance.run(importance.Options(str(folder), "facts", out, limit=6, device="cpu")))
    return Scores.open(out)


def test_its_scores_are_those_of_its_language_model_alone(folders: Path, tmp_path: Path) -> None:
    audio, plain = (scored(folders / name, tmp_path / name) for name in ("qwen2_audio", "base"))
    assert audio.names == plain.names
    assert audio.metadata["data"] == plain.metadata["data"]  # the same tokens
    assert audio.metadata["model"] == plain.metadata["model"]
    assert audio.metadata["loss"] == pytest.approx(plain.metadata["loss"], rel=1e-6)
    for name, tensor in plain.tensors("signed_sum").items():
        torch.testing.assert_close(audio.tensors("signed_sum")[name], tensor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", CLASSES)
def test_its_weights_are_taken_away_probed_and_validated(folders: Path, tmp_path: Path, kind: str) -> None:
    model = str(folders / kind)
    scored(folders / kind, tmp_path / "scores")
    lines = list(
        deactivate.run(
            deactivate.Options(
                model, tmp_path / "scores", "facts", tmp_path / "off", limit=4, random_seeds=1, device="cpu"
            )
        )
    )
    assert any(line.startswith("top ") for line in lines)
    list(probe.run(probe.Options(model, tmp_path / "probe", device="cpu")))
    assert read_json(tmp_path / "probe" / "records.json")["probe"][0]["n"] > 0
    given = {"limit": 2, "weights": 42, "reductions": "signed_sum", "device": "cpu"}
    list(validate_importance.run(validate_importance.Options(model, "facts", tmp_path / "validation", **given)))
    assert {row["n"] for row in read_json(tmp_path / "validation" / "records.json") if row["kind"] == "all"} == {42}


def test_its_drift_from_the_base(folders: Path, tmp_path: Path) -> None:
    tuned = [str(folders / name) for name in ("qwen2_audio", "audioflamingo3")]
    options = drift.Options(str(folders / "base"), tuned, tmp_path, sampling=Sampling(4, 8), device="cpu")
    list(drift.run(options))
    rows = {(Path(row["model"]).name, row["text"]): row for row in read_json(tmp_path / "drift.json")["drift"]}
    for text in ("plain", "chat"):
        assert rows["qwen2_audio", text]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows["audioflamingo3", text]["kl"] > 0


# -- Granite Speech, whose adapter is for audio ------------------------------------------------------------------------
def save_granite(folder: Path) -> Any:
    """The checkpoint as it is published: weights by their own names, the adapter beside them. Returns the model."""
    model: Any = granite()
    model.config.has_lora_adapter = True
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(str(folder))  # wraps the names
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def granite() -> Any:
    return tiny_granite("granite_speech")


class Processor:
    """Granite Speech's needs torchaudio."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.chat_template = None


def test_granite_speech_is_asked_in_text_without_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = save_granite(tmp_path)
    assert model_kind(resolve(str(tmp_path))) == "audio_llm"
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: Processor())
    loaded, _ = load_text_model(str(tmp_path))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        with_adapter, plain, found = (model(input_ids=ids).logits for model in (adapted, granite(), loaded))
    assert not torch.allclose(with_adapter, plain)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    assert list(scored_parameters(loaded)) == list(scored_parameters(granite()))


def test_weights_that_are_missing_beside_an_adapter_are_not_drawn_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_granite(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if "layers.1.mlp.up_proj" not in n}, file, metadata={"format": "pt"})
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: Processor())
    with pytest.raises(
        UserError, match=r"it lacks 1 of the model's weights \(model\.language_model\.layers\.1\.mlp\.up"
    ):
        load_audio_llm(str(tmp_path))
