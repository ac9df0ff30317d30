"""Audio LLMs of transformers answer through their own processors: tiny ones, made offline, of three classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor, WhisperFeatureExtractor

from palimpsest.commands import evaluate
from palimpsest.data.examples import Example, write_manifest
from palimpsest.data.speech import read_audio
from palimpsest.evaluation import audio_llm
from palimpsest.evaluation.answers import Answer, answer_questions
from palimpsest.evaluation.audio_llm import audio_llm_answerer
from palimpsest.evaluation.tasks import Task
from palimpsest.files import UserError, read_json, read_jsonl
from palimpsest.models.loading import load_audio_llm, load_language_model, model_kind
from tiny import VOCAB, tiny_llama, tiny_speech_lm, tiny_tokenizer
from tiny_audio import CLASSES, MARKS, PARTS_TEMPLATE, save_tiny_audio_llm, tiny_audio_llm

INSTRUCTION = "Answer the question asked in the speech."


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder, rng = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    examples = []
    for i in range(5):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.2, 6_400 + 1_600 * i), 16_000)
        question = f"What is {'very ' * i}{i}?"
        examples.append(Example(f"q{i}", question, ("x",), "x", audio=folder / f"{i}.wav"))
    return Task("spoken", tuple(examples))


@pytest.fixture(scope="module", params=CLASSES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save_tiny_audio_llm(request.param, folder)


def greedy(model: Any, inputs: dict[str, Any], n: int) -> list[int]:
    """Token by token from the logits of whole forward passes: no generate, no cache."""
    new: list[int] = []
    for _ in range(n):
        more = torch.tensor([new], dtype=torch.long)
        ids = torch.cat([inputs["input_ids"], more], dim=1)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == 3:
            break
    return new


# -- answers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CLASSES)
def test_an_answer_is_the_greedy_continuation_of_the_model_s_own_prompt(spoken: Task, kind: str) -> None:
    model, processor = tiny_audio_llm(kind)
    model.generation_config.repetition_penalty = 5.0  # a checkpoint's own taste must not leak in
    example = spoken.examples[1]
    answer = audio_llm_answerer(model, processor, max_new_tokens=6)
    (given,) = answer([example], "speech")
    # What the templates of the two kinds write, by hand.
    prompts = {
        "qwen2_audio": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1: "
        f"<|audio_bos|><|AUDIO|><|audio_eos|>\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
        "audioflamingo3": f"<user><sound>{INSTRUCTION}<end>\n<assistant>",
    }
    assert given.prompt == prompts[kind]
    inputs = dict(processor(text=[given.prompt], audio=[read_audio(example.audio)], return_tensors="pt"))
    # 0.5 s: 50 log-mel frames, 25 after the convolution, 12 after pooling by two.
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 12
    assert given.prompt_tokens == inputs["input_ids"].shape[1]
    new = greedy(model, inputs, 6)
    assert given.n_new_tokens == len(new)
    assert given.response == processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    (written,) = answer([example], "text")
    assert written.prompt is not None
    assert example.question in written.prompt
    assert MARKS[kind] not in written.prompt
    ids = processor.tokenizer(written.prompt, add_special_tokens=False, return_tensors="pt")
    assert written.n_new_tokens == len(new := greedy(model, {"input_ids": ids["input_ids"]}, 6))
    assert written.response == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("modality", ["speech", "text"])
def test_answers_do_not_depend_on_the_batch_size(saved: Path, spoken: Task, modality: Any, tmp_path: Path) -> None:
    assert model_kind(str(saved)) == "audio_llm"
    answer = audio_llm_answerer(*load_audio_llm(str(saved)), 8)
    found = []
    for size in (1, 2, 5):
        rows = answer_questions(answer, spoken, modality, model="m", out=tmp_path / f"{size}.jsonl", batch_size=size)
        found.append([{**row, "seconds": 0} for row in rows])
    assert found[0] == found[1] == found[2]
    assert len({row["response"] for row in found[0]}) > 1
    assert not any(row["failed"] for row in found[0])


def test_encoders_that_see_the_padding_are_asked_one_by_one(spoken: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_audio_llm("qwen2_audio")
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    answer = audio_llm_answerer(model, processor, 1)
    together = answer(spoken.examples, "speech")
    assert sizes == [5]
    monkeypatch.setattr(audio_llm, "ALONE", {"qwen2_audio"})
    assert answer(spoken.examples, "speech") == together
    assert sizes == [5, 1, 1, 1, 1, 1]
    answer(spoken.examples, "text")
    assert sizes[-1] == 5


# -- chat templates ----------------------------------------------------------------------------------------------------
LOOP = "{% for m in messages %}<{{ m['role'] }}>CONTENT<end>\n{% endfor %}<assistant>"


@pytest.mark.parametrize("content", ["{{ m['content'] + '' }}", "{{ m['content'] }}"])
@pytest.mark.parametrize("in_tokenizer", [False, True])
def test_templates_of_strings_get_the_mark_in_the_string(spoken: Task, content: str, in_tokenizer: bool) -> None:
    """Given parts, the first template raises and the second writes Python's list; Granite Speech is of this sort."""
    model, processor = tiny_audio_llm("audioflamingo3")
    processor.chat_template = None if in_tokenizer else LOOP.replace("CONTENT", content)
    processor.tokenizer.chat_template = LOOP.replace("CONTENT", content) if in_tokenizer else None
    (given,) = audio_llm_answerer(model, processor, 4, system="Be brief.")(spoken.examples[:1], "speech")
    assert given.prompt == f"<system>Be brief.<end>\n<user><sound>{INSTRUCTION}<end>\n<assistant>"
    processor.chat_template = PARTS_TEMPLATE
    parts = audio_llm_answerer(model, processor, 4, system="Be brief.")(spoken.examples[:1], "speech")
    assert parts == [given]


def test_an_audio_llm_is_asked_on_a_fixed_date_and_without_thinking(spoken: Task) -> None:
    model, processor = tiny_audio_llm("audioflamingo3")
    lead = "{{ strftime_now('%Y-%m-%d') }}{% if enable_thinking %}<think>{% endif %}"
    processor.chat_template = lead + PARTS_TEMPLATE
    (given,) = audio_llm_answerer(model, processor, 4)(spoken.examples[:1], "speech")
    assert given.prompt == f"2024-07-26<user><sound>{INSTRUCTION}<end>\n<assistant>"


def test_a_template_without_a_place_for_audio_is_refused() -> None:
    model, processor = tiny_audio_llm("audioflamingo3")
    processor.chat_template = LOOP.replace("CONTENT", "{{ m['content'] | length }}")
    with pytest.raises(UserError, match=r"AudioFlamingo3Processor does not place audio \(<sound>\) and text"):
        audio_llm_answerer(model, processor, 4)


# -- Voxtral: the template itself reads the recordings ----------------------------------------------------------------
class MistralStandIn(type(tiny_tokenizer())):  # type: ignore[misc]
    """Does for VoxtralProcessor what mistral-common's tokenizer does: recordings become 375 marks per 30 s."""

    def apply_chat_template(self, conversations: Sequence[Any], **options: Any) -> dict[str, Any]:
        assert options["tokenize"]
        rows, audio = [], []
        for (turn,) in conversations:
            ids: list[int] = [1]
            for part in (
                [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
            ):
                if part["type"] == "audio":
                    audio.append(read_audio(Path(part["path"])))
                    ids += [24] * 375
                else:
                    ids += self(part["text"], add_special_tokens=False)["input_ids"]
            rows.append(ids)
        width = max(map(len, rows))
        padded = {
            "input_ids": [[0] * (width - len(row)) + row for row in rows],
            "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
        }
        return {**padded, "audio": audio} if audio else padded


def test_voxtral_through_its_own_processor(spoken: Task) -> None:
    plain = tiny_tokenizer()
    tokenizer = MistralStandIn(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", eos_token="<end>")
    processor = VoxtralProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer)
    torch.manual_seed(0)
    config = VoxtralConfig(
        audio_config={
            "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_mel_bins": 8, "max_source_positions": 1500,
        },
        text_config={
            "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        },
        audio_token_id=24,
    )  # fmt: skip
    model = VoxtralForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.4)
    answer = audio_llm_answerer(model, processor, 4)
    heard: list[Any] = []
    model.register_forward_pre_hook(lambda _, __, kw: heard.append(kw.get("input_features")), with_kwargs=True)
    for modality, longer in (("speech", 375 + 1 + len(INSTRUCTION)), ("text", 1 + len(spoken.examples[0].question))):
        together = answer(spoken.examples, modality)  # type: ignore[arg-type]
        assert together[0].prompt_tokens == longer  # the tokenizer is one of bytes
        assert together == [answer([e], modality)[0] for e in spoken.examples]  # type: ignore[arg-type]
    assert heard[0].shape == (5, 8, 3000)
    assert not torch.equal(heard[0][0], heard[0][1])
    assert heard[-1] is None  # text


# -- from the command line's side -------------------------------------------------------------------------------------
def lines(model: Path, task: Path, out: Path, modality: Any, **options: Any) -> list[str]:
    options |= {"modality": modality, "asr": "none", "max_new_tokens": 4, "batch_size": 2, "device": "cpu"}
    return list(evaluate.run(evaluate.Options(str(model), str(task), out, **options)))


def test_evaluate_lists_a_recording_that_cannot_be_decoded_and_counts_it_wrong(
    saved: Path, spoken: Task, tmp_path: Path
) -> None:
    manifest = tmp_path / "spoken.jsonl"
    broken = tmp_path / "broken.flac"
    soundfile.write(broken, np.random.default_rng(1).normal(0, 0.2, 48_000), 16_000)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # the header is good, the sound is not
    broken.write_bytes(content)
    write_manifest(manifest, [*spoken.examples, Example("q9", "And?", ("x",), "x", audio=broken)])
    with pytest.raises(
        UserError, match=r"spoken\.jsonl:6: broken audio .* count it as wrong with --faulty-audio wrong"
    ):
        lines(saved, manifest, tmp_path / "out", "speech")
    printed = lines(saved, manifest, tmp_path / "out", "speech", faulty_audio="wrong")
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "out" / "samples-speech.jsonl")}
    assert [id for id, row in rows.items() if row["failed"]] == ["q9"]
    assert "broken.flac" in rows["q9"]["error"]
    assert any(line.startswith("failed: q9") and "broken.flac" in line for line in printed)
    for record in read_json(tmp_path / "out" / "results-speech.json")["qa"]:
        assert (record["n"], record["n_failed"], record["source"]) == (6, 1, "measured")


def test_a_text_model_asked_for_speech_and_a_model_without_ears(spoken: Task, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    write_manifest(tmp_path / "spoken.jsonl", spoken.examples)
    assert model_kind(str(tmp_path / "llm")) == "language_model"
    with pytest.raises(UserError, match=r"llm takes no audio; evaluate it with --modality text or cascade"):
        lines(tmp_path / "llm", tmp_path / "spoken.jsonl", tmp_path / "out", "speech")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is a llama model and takes no audio"):
        load_audio_llm(str(tmp_path / "llm"))


def test_text_through_the_same_model_and_its_language_model_for_the_other_measures(saved: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "t.jsonl", [Example("q0", "What?", ("x",), "x")])
    lines(saved, tmp_path / "t.jsonl", tmp_path / "out", "text")
    (row,) = read_jsonl(tmp_path / "out" / "samples-text.jsonl")
    answer = audio_llm_answerer(*load_audio_llm(str(saved)), 4)
    expected: Answer = answer([Example("q0", "What?", ("x",), "x")], "text")[0]
    assert (row["response"], row["prompt"]) == (expected.response, expected.prompt)
    model, tokenizer = load_language_model(str(saved))
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape[:2] == ids.shape


def test_a_speech_lm_answers_recordings_as_it_answers_the_cached_frames_of_a_study(
    spoken: Task, tmp_path: Path
) -> None:
    from palimpsest.data.collate import Collator
    from palimpsest.data.features import Features, compute_features
    from palimpsest.evaluation.spoken import recording_answerer, speech_answerer

    model, processor = tiny_speech_lm()
    compute_features(model.encoder, processor, spoken.examples, tmp_path / "features")
    cached = speech_answerer(model, Collator(processor, "speech", Features(tmp_path / "features")), 8)
    direct = recording_answerer(model, processor, 8)
    frames: list[torch.Tensor] = []
    model.adaptor.register_forward_pre_hook(lambda _, inputs: frames.append(inputs[0]))
    expected = cached(spoken.examples, "speech")
    assert direct(spoken.examples, "speech") == expected == [direct([e], "speech")[0] for e in spoken.examples]
    assert len({given.response for given in expected}) > 1
    torch.testing.assert_close(frames[1], frames[0], rtol=0, atol=2e-3)  # float16, batched otherwise
