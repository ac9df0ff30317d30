"""What stands in a prompt, and that prompt and answer have the tokens of the one text they are."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from palimpsest.config import load_config
from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.evaluation.answers import text_answerer
from palimpsest.evaluation.generation import end_ids
from palimpsest.files import UserError
from palimpsest.models.processor import FILE, SpeechLMProcessor
from palimpsest.models.prompts import PRESETS, PromptStyle, render, written_out
from palimpsest.models.speech_lm import SPEECH_POSITION
from tiny import tiny_llama, tiny_speech_lm, tiny_tokenizer

# As in Llama 3.2, gpt-oss and Qwen 3, shortened.
DATE_STRING = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<s><system>Today Date: {{ date_string }}<end>\n"
)
STRFTIME = "<s><system>Current date: {{ strftime_now('%Y-%m-%d') }}<end>\n"
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
REASONING = (  # as DeepSeek-R1: an open turn begins with a thought, a finished one has none
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def processor_of(template: str, style: PromptStyle | None = None) -> SpeechLMProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return SpeechLMProcessor(tokenizer, WhisperFeatureExtractor(feature_size=80), style=style)


# -- the date ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("template", "said"), [(DATE_STRING, "26 Jul 2024"), (STRFTIME, "2024-07-26")])
def test_a_prompt_has_the_recipe_s_date_and_not_today_s(template: str, said: str) -> None:
    processor = processor_of(template + TURNS)
    text = processor.tokenizer.decode(processor.text_prompt("Who?"))
    assert f": {said}<end>\n<user>Who?<end>\n<assistant>" in text
    assert said in processor.tokenizer.decode([id for id in processor.speech_prompt(2) if id != SPEECH_POSITION])
    assert processor.tokenizer.decode(processor.answer("Ada.")) == "Ada.<end>"
    (given,) = text_answerer(tiny_llama(), processor.tokenizer, 1)([Example("q", "Who?", ("",), "")], "text")
    assert said in str(given.prompt)


def test_another_date_is_another_prompt_and_transformers_keeps_today_s() -> None:
    processor = processor_of(STRFTIME + TURNS, PromptStyle(date="2025-02-01"))
    assert "2025-02-01" in processor.example_prompts()["text"]
    today = datetime.now().strftime("%Y-%m-%d")
    turns = [{"role": "user", "content": "Who?"}]
    assert today in processor.tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("value", ["2024-02-30", "26 Jul 2024", ""])
def test_a_date_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="there is no date"):
        PromptStyle(date=value)


def test_a_recipe_takes_a_date_as_yaml_has_it_and_arguments(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nmodels: {language_model: a/b, encoder: c/d}\n"
        "prompt: {date: 2025-02-01, template_arguments: {a: true}}\n"
        "data: {train: {source: facts, split: train}, heldout_examples: 2}\nmethods: {full: {kind: full}}\n"
        "evaluation: {tasks: [{name: facts, source: facts, split: test}]}\n"
    )
    prompt = load_config(recipe).prompt
    assert (prompt.date, prompt.arguments["date_string"], prompt.arguments["a"]) == ("2025-02-01", "01 Feb 2025", True)
    recipe.write_text(recipe.read_text().replace("a: true", "messages: true"))
    with pytest.raises(UserError, match=r"prompt: template_arguments has 'messages', which every prompt sets itself"):
        load_config(recipe)


# -- thinking and other arguments --------------------------------------------------------------------------------------
def test_the_empty_thought_belongs_to_the_prompt() -> None:
    processor = processor_of(THINKING)
    prompt, target = processor.sequence("Who?", "Ada.")
    assert processor.tokenizer.decode(prompt) == "<user>Who?<end>\n<assistant><think></think>"
    assert processor.tokenizer.decode(target) == "Ada.<end>"
    assert processor.example_prompts()["speech"].endswith("<end>\n<assistant><think></think>")


def test_a_recipe_may_switch_thinking_on() -> None:
    processor = processor_of(THINKING, PromptStyle(template_arguments={"enable_thinking": True}))
    prompt, target = processor.sequence("Who?", "Ada.")
    assert processor.tokenizer.decode(prompt) == "<user>Who?<end>\n<assistant>"
    assert processor.tokenizer.decode(target) == "<think></think>Ada.<end>"


def test_a_finished_turn_that_is_rendered_unlike_an_open_one_gives_its_end() -> None:
    processor = processor_of(REASONING)
    prompt, target = processor.sequence("Who?", "Ada.")
    assert processor.tokenizer.decode([*prompt, *target]) == "<user>Who?<end><assistant><think>Ada.<end>"


# -- the end of an answer ----------------------------------------------------------------------------------------------
WITHOUT_END = (  # GLM's: the next turn is all that ends one
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [TURNS, THINKING, REASONING, WITHOUT_END])
@pytest.mark.parametrize("answer", ["Ada.", "Ada. ", "d", ">", "end"])  # some of which stand in <end> too
def test_every_answer_that_is_trained_ends_with_what_ends_an_answer(template: str, answer: str) -> None:
    processor = processor_of(template)
    target = processor.sequence("Who?", answer)[1]
    assert processor.tokenizer.decode(target) == f"{answer}<end>"
    assert target[-1] in end_ids(tiny_llama(), processor.tokenizer)
    assert target.count(target[-1]) == 1


def test_an_answer_that_nothing_ends_is_refused() -> None:
    processor = processor_of(WITHOUT_END)
    processor.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"Nothing ends an answer: .* give it one \(eos_token\)"):
        processor.sequence("Who?", "Ada.")


def test_an_argument_that_the_template_does_not_use_is_refused() -> None:
    processor = processor_of(TURNS, PromptStyle(template_arguments={"reasoning_effort": "low"}))
    with pytest.raises(UserError, match=r"does not use 'reasoning_effort', which prompt\.template_arguments sets"):
        processor.text_prompt("Who?")


def test_style_travels_with_the_processor(tmp_path: Path) -> None:
    style = PromptStyle("Be brief.", "Answer it.", "2025-02-01", {"enable_thinking": True})
    processor = processor_of(THINKING, style)
    processor.save_pretrained(tmp_path)
    assert SpeechLMProcessor.from_pretrained(tmp_path).style == style


@pytest.mark.parametrize("name", PRESETS)
def test_a_checkpoint_holds_the_words_of_a_preset_and_not_its_name(tmp_path: Path, name: str) -> None:
    style = PromptStyle(**written_out({"preset": name}))
    processor_of(TURNS, style).save_pretrained(tmp_path)
    file = tmp_path / FILE
    stored = json.loads(file.read_text())
    assert (stored["system"], stored["speech_instruction"]) == (style.system, style.speech_instruction)
    assert "preset" not in stored
    for key in ("date", "template_arguments"):  # of earlier versions
        del stored[key]
    file.write_text(json.dumps(stored))
    assert SpeechLMProcessor.from_pretrained(tmp_path).style == style


def test_the_words_of_a_preset_are_in_the_prompt_that_is_recorded() -> None:
    recorded = {
        name: processor_of(TURNS, PromptStyle(**written_out({"preset": name}))).example_prompts()["speech"]
        for name in PRESETS
    }
    assert len(set(recorded.values())) == 3
    assert "the user provides, and assist the user with a variety of tasks" in recorded["llama_omni"]
    assert "[speech]\nPlease directly answer the questions in the user's speech." in recorded["llama_omni"]
    assert "[speech]\nPlease answer directly the question in the speech." in recorded["llama_omni_short"]
    assert "helpful language and speech assistant" not in recorded["plain"]


# -- what a template refuses -------------------------------------------------------------------------------------------
def test_a_template_that_refuses_a_system_turn_is_one_sentence() -> None:
    gemma = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
    )
    assert "Who?" in processor_of(gemma).tokenizer.decode(processor_of(gemma).text_prompt("Who?"))
    with pytest.raises(
        UserError, match=r"refuses the prompt \(System role not supported\); leave out prompt\.system\.$"
    ):
        processor_of(gemma, PromptStyle("Be brief.")).text_prompt("Who?")


@pytest.mark.parametrize(
    ("role", "said"),
    [("user", r"the system's turn; leave out prompt\.system"), ("system", "the user's turn; use a model")],
)
def test_a_template_that_leaves_out_a_turn_is_refused(role: str, said: str) -> None:
    only = "{% for m in messages if m['role'] == 'ROLE' %}{{ m['content'] }}{% endfor %}".replace("ROLE", role)
    with pytest.raises(UserError, match=said):
        render(processor_of(only).tokenizer, "Who?", PromptStyle("Be brief."))


# -- tokens ------------------------------------------------------------------------------------------------------------
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space in front of every text, characters, bytes for a line feed, and "▁A" as one token."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", *map(chr, range(33, 127)), "▁A", "▁W"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "A"), ("▁", "W")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[I] {{ m['content'] }} [/I]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(id)) if id != SPEECH_POSITION else "…" for id in ids]


def test_prompt_and_answer_have_the_tokens_of_their_text() -> None:
    tokenizer = sentencepiece_like()
    processor = SpeechLMProcessor(tokenizer, None, style=PromptStyle(speech_instruction="Go."))
    prompt, target = processor.sequence("Who?", "Ada.")
    whole = tokenizer("<s>[I] Who? [/I] Ada.</s>", add_special_tokens=False)["input_ids"]
    assert prompt + target == whole
    assert prompt == processor.text_prompt("Who?")
    assert pieces(tokenizer, target) == ["▁A", "d", "a", ".", "</s>"]
    assert processor.answer("Ada.") == target

    spoken, after = processor.sequence(2, "Ada.")
    assert pieces(tokenizer, spoken) == [
        "<s>", "▁", "[", "I", "]", "▁", "…", "…", "<0x0A>", "G", "o", ".", "▁", "[", "/", "I", "]",
    ]  # fmt: skip
    assert spoken == processor.speech_prompt(2)
    assert after == target


def test_without_a_template_too() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = None
    prompt, target = SpeechLMProcessor(tokenizer, None).sequence("Who?", "Ada.")
    whole = tokenizer("Question: Who?\nAnswer: Ada.", add_special_tokens=False)["input_ids"]
    assert prompt + target == [*whole, tokenizer.eos_token_id]
    assert pieces(tokenizer, target)[0] == "▁A"


@pytest.mark.parametrize("modality", ["text", "speech"])
def test_an_answer_that_joins_the_prompt_is_refused(modality: str) -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("[/I]", "[/I] ").replace("{% else %} ", "{% else %}")
    processor = SpeechLMProcessor(tokenizer, None)
    question: Any = "Who?" if modality == "text" else 2
    with pytest.raises(UserError, match=r"joins the end of the prompt and the beginning of the answer 'Ada\.'"):
        processor.sequence(question, "Ada.")
    assert pieces(tokenizer, processor.sequence(question, "bet")[1]) == ["b", "e", "t", "</s>"]


# -- padding -----------------------------------------------------------------------------------------------------------
def test_a_pad_token_outside_the_embedding_is_not_used() -> None:
    """As LLaMA models are often given one: added to the tokenizer, the embedding left as it is."""
    examples = [Example("a", "Who?", ("Ada.",), "Ada."), Example("b", "Where is it?", ("In Rome.",), "In Rome.")]
    results = []
    for outside in (False, True):
        model, processor = tiny_speech_lm()
        language_model = tiny_llama(vocab_size=263, eos_token_id=3)
        if outside:
            processor.tokenizer.add_special_tokens({"pad_token": "<added>"})
            assert processor.tokenizer.pad_token_id == 263
        batch = Collator(processor, "text")(examples)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        loss = language_model(**inputs).loss
        answers = text_answerer(language_model, processor.tokenizer, 6)(examples, "text")
        prompts = processor(text=["Who?", "Where is it?"])
        logits = model(prompts["input_ids"], prompts["attention_mask"]).logits[:, -1]
        results.append((loss, answers, logits))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])
