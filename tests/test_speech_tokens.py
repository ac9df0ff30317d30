"""Speech tokens: ids, lengths and rows by hand; the language model around them stays what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    MimiConfig,
    MimiModel,
    MistralConfig,
    MistralForCausalLM,
)

from palimpsest.config import parse_config
from palimpsest.export import folders as export
from palimpsest.files import UserError
from palimpsest.importance.estimate import estimate_importance
from palimpsest.models.codecs import codec_ids, codec_rate, load_codec
from palimpsest.models.loading import load_encoder, load_language_model, load_speech_lm
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechAdaptor, SpeechLM
from palimpsest.models.token_settings import Tokens
from palimpsest.models.tokens import (
    Quantiser,
    SpeechTokenizer,
    TokenAdaptor,
    as_frames,
    collapsed,
    describe_tokens,
    fit_tokens,
    read_tokens,
    repeats,
    rows_heard,
    rows_like,
    write_tokens,
)
from palimpsest.models.trained_adaptor import read_adaptor
from palimpsest.training.align import align_adaptor
from palimpsest.training.methods import Method, require_language_model
from palimpsest.training.settings import Align
from test_training_align import FACTOR, planted
from tiny import VOCAB, save_tiny_models, tiny_encoder, tiny_llama, tiny_speech_lm

K, POOL, D_ENC = 6, 2, 16


def on_a_line(pool: int = 2) -> Quantiser:
    """Two dimensions, of which the first counts eight times as much; centroids at 0, 1 and 2 of it."""
    made = Quantiser(3, 2, pool)
    made.mean.copy_(torch.tensor([4.0, 0.0]))
    made.scale.copy_(torch.tensor([1.0, 0.125]))
    made.centroids.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 1.0]]))
    return made


def tokenizer(seed: int = 0) -> SpeechTokenizer:
    drawn = torch.randn(K, D_ENC, generator=torch.Generator().manual_seed(seed))
    drawn[0, 0] = 3e-6  # which float16 has but roughly
    drawn = drawn.bfloat16().float()
    return SpeechTokenizer(POOL, {"mean": torch.zeros(D_ENC), "scale": torch.ones(D_ENC), "centroids": drawn})


def token_lm(*, collapse: bool = True, tied: bool = True, seed: int = 0) -> SpeechLM:
    language_model = tiny_llama(seed, tied=tied, eos_token_id=3)
    how: dict[str, Any] = {"reads": "tokens", "tokenizer": tokenizer(), "collapse": collapse}
    return SpeechLM.from_parts(tiny_encoder(seed), language_model, seed=seed, **how).eval()


def spoken(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(frames, frame counts) that the tokenizer reads as these ids."""
    centroids = tokenizer().tensors["centroids"]
    frames = torch.zeros(len(ids), POOL * max(map(len, ids)), D_ENC)
    for row, tokens in enumerate(ids):
        frames[row, : POOL * len(tokens)] = centroids[tokens].repeat_interleave(POOL, dim=0)
    return frames, torch.tensor([POOL * len(tokens) for tokens in ids])


# ---------------------------------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------------------------------
def test_an_id_is_the_nearest_centroid_of_the_mean_of_some_frames() -> None:
    first = [4.0, 4.5, 4.8, 5.4, 6.5, 6.7, 9.0]  # means less 4: 0.25, 1.1, 2.6; one frame is left over
    second = [0.0, 0.0, 8.0, 0.0, 8.0, 0.0, 0.0]  # 0, 0.5, 0.5 in units of its spread, 0, 4, 4 without
    frames = torch.tensor([list(zip(first, second, strict=True))])
    assert on_a_line().ids(frames).tolist() == [[0, 1, 2]]
    replaced = on_a_line().replaced(frames)[0]
    assert replaced.tolist() == [[4, 0], [4, 0], [5, 0], [5, 0], [6, 8], [6, 8], [9, 0]]


def test_an_utterance_is_replaced_as_if_it_were_alone() -> None:
    """Of three frames the last is left over, however much padding a longer one in its batch puts behind it."""
    short = torch.tensor([[4.0, 1.0], [4.5, 0.0], [5.5, 2.0]])
    long = torch.tensor([[6.5, 8.0], [6.7, 0.0], [5.1, 0.5], [5.3, 0.5], [4.2, 0.0]])
    together = on_a_line().replaced(torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True))
    assert together[0].tolist() == [[4, 0], [4, 0], [5.5, 2], [0, 0], [0, 0]]
    assert torch.equal(together[0, :3], on_a_line().replaced(short[None])[0])
    assert torch.equal(together[1], on_a_line().replaced(long[None])[0])


def test_collapse_and_lengths() -> None:
    ids = torch.tensor([[3, 3, 3, 1, 1, 3], [2, 5, 2, 2, 5, 5]])
    assert repeats(ids).int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert collapsed([3, 3, 3, 1, 1, 3]) == ([3, 1, 3], [3, 2, 1])
    assert collapsed([]) == ([], [])
    said = describe_tokens(on_a_line(1), [torch.tensor([[4.0, 0], [4, 0], [5, 0], [4, 0]])])
    assert said["seconds"] == pytest.approx(0.08)
    assert said["per_second"] == pytest.approx(50)
    assert said["collapsed_per_second"] == pytest.approx(37.5)
    assert said["used"] == 2
    assert said["perplexity"] == pytest.approx(1 / (0.75**0.75 * 0.25**0.25))


def test_ids_do_not_depend_on_the_type_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    frames = torch.randn(4, 200, D_ENC, generator=generator)
    quantiser = tokenizer().quantiser()
    expected = quantiser.ids(frames)
    half = tokenizer().quantiser().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.ids(frames), expected)
        assert torch.equal(half.ids(frames.half()), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------------------------------
class Speech(dict[str, torch.Tensor]):
    def count(self, example_id: str) -> int:
        return len(self[example_id])


def clouds(n: int = 30) -> tuple[Speech, dict[str, list[int]]]:
    """Utterances of three sounds far apart, 4 frames each, and which sound is where."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.tensor([[0.0, 0, 40], [8.0, 0, 48], [0.0, 8, 48]])
    frames, sounds = Speech(), {}
    for i in range(n):
        said = torch.randint(3, (5,), generator=generator)
        frames[str(i)] = middle[said].repeat_interleave(4, dim=0) + torch.randn(20, 3, generator=generator) * 0.1
        sounds[str(i)] = said.tolist()
    return frames, sounds


def test_planted_sounds_become_tokens(tmp_path: Path) -> None:
    frames, sounds = clouds()
    options = Tokens(k=3, pool=4, fit_on=100)
    fitted = fit_tokens(list(frames), frames, options, 5, {"encoder": "some"})
    quantiser = fitted.quantiser()
    of_sound = {sound: {quantiser.ids(frames[key][None])[0, i].item() for key in frames for i, s in
                enumerate(sounds[key]) if s == sound} for sound in range(3)}  # fmt: skip
    assert sorted(token for tokens in of_sound.values() for token in tokens) == [0, 1, 2]  # one token each
    assert fitted.about["n_fitted_on"] == 100
    assert fitted.about["unexplained"] < 0.01
    again = fit_tokens(list(frames), frames, options, 5)
    for name, tensor in fitted.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
        assert torch.equal(tensor, tensor.bfloat16().float()), name

    write_tokens(fitted, tmp_path / "tokens.safetensors")
    read = read_tokens(tmp_path / "tokens.safetensors")
    assert (read.pool, read.k, read.about["encoder"], read.about["seed"]) == (4, 3, "some", 5)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in fitted.tensors.items())


def test_too_little_speech_and_a_damaged_file_are_sentences(tmp_path: Path) -> None:
    frames, _ = clouds(3)
    with pytest.raises(UserError, match=r"speech\.tokens\.k is 16 and the training speech has 15 tokens"):
        fit_tokens(list(frames), frames, Tokens(k=16, pool=4), 0)
    with pytest.raises(UserError, match="longer recordings"):
        fit_tokens(list(frames), frames, Tokens(k=2, pool=50), 0)
    save_file({"mean": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no file of speech tokens"):
        read_tokens(tmp_path / "other.safetensors")


def test_first_rows_have_the_mean_and_spread_of_the_embedding() -> None:
    embedding = torch.randn(500, 4) * torch.tensor([1.0, 2, 3, 4]) + torch.tensor([0.0, 5, 0, -5])
    rows = rows_like(embedding, 4000, seed=1)
    assert torch.allclose(rows.mean(0), embedding.mean(0), atol=0.3)
    assert torch.allclose(rows.std(0), embedding.std(0), rtol=0.05)
    assert torch.equal(rows, rows_like(embedding, 4000, seed=1))
    assert not torch.equal(rows, rows_like(embedding, 4000, seed=2))


def test_first_rows_by_hand() -> None:
    """Two tokens of text at (0, 10, −1) and (2, 10, 3): mean (1, 10, 1), standard deviation √2, 0 and √8."""
    embedding = torch.tensor([[0.0, 10, -1], [2, 10, 3]])
    rows = rows_like(embedding, 20_000, seed=3)
    assert (rows[:, 1] == 10).all()
    drawn = (rows[:, [0, 2]] - 1) / torch.tensor([2**0.5, 8**0.5])
    assert torch.allclose(drawn.mean(0), torch.zeros(2), atol=4 / 20_000**0.5)
    assert torch.allclose(drawn.std(0), torch.ones(2), atol=0.03)
    inside = (drawn.abs() < 1).float().mean(0)  # of a normal distribution 68.3 % are within one deviation
    assert torch.allclose(inside, torch.full((2,), 0.6827), atol=0.02)
    assert abs(float((drawn[:, 0] * drawn[:, 1]).mean())) < 0.03  # each dimension by itself


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_has_these_rows_and_its_own_embedding(tied: bool) -> None:
    model, base = token_lm(tied=tied, seed=4), tiny_llama(4, tied=tied, eos_token_id=3)
    embedding = base.get_input_embeddings().weight  # the input's, not the head's
    assert torch.equal(model.adaptor.get_parameter("rows.weight"), rows_like(embedding, K, 4))
    for name, value in base.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name], value), name


def test_rows_of_an_adaptor_are_its_mean_output_over_the_frames_of_each_token() -> None:
    """Tokens of 2 frames, positions of 3: of 6 frames the tokens are a a, b b, a a and the outputs x x x, y y y."""
    adaptor = SpeechAdaptor(2, 8, 4, stack_factor=3)
    frames = torch.tensor([[4.0, 0], [4, 0], [6, 8], [6, 8], [4, 0], [4, 0]])
    x, y = adaptor(frames[None])[0]
    rows, counts = rows_heard(adaptor, on_a_line(2), [frames])
    assert counts.tolist() == [4, 0, 2]
    assert torch.allclose(rows[0], (2 * x + 2 * y) / 4)
    assert torch.allclose(rows[2], (x + y) / 2)
    assert not rows[1].any()
    # Frames beyond the last whole position have no output: of five, a a and the first b have x.
    rows, counts = rows_heard(adaptor, on_a_line(2), [frames[:5]])
    assert counts.tolist() == [2, 0, 1]
    assert torch.allclose(rows[0], x)
    assert torch.allclose(rows[2], x)
    # Over utterances: of x x x y y y and x x x, a has 4 and 2 frames.
    rows, counts = rows_heard(adaptor, on_a_line(2), [frames, frames[:4]])
    assert counts.tolist() == [6, 0, 3]
    assert torch.allclose(rows[0], (4 * x + 2 * y) / 6)


def test_rows_of_an_aligned_adaptor_read_what_is_said_before_they_have_learned() -> None:
    """Each word sounds as a pattern of its own: what the adaptor of frames was taught, its mean outputs know."""
    embedding, examples, frames, tokens = planted(140)
    torch.manual_seed(0)
    adaptor = SpeechAdaptor(frames["0"].shape[1], 64, embedding.shape[1], FACTOR)
    settings = Align(epochs=30, learning_rate=1e-2, warmup_steps=5, batch_size=8)
    alignment = align_adaptor(adaptor, embedding, examples[:100], frames, tokens, settings, seed=3)
    quantiser = fit_tokens([e.id for e in examples], frames, Tokens(k=20, pool=FACTOR), 0).quantiser()

    def n_read(rows: torch.Tensor) -> int:
        of_tokens = TokenAdaptor(quantiser, embedding.shape[1], collapse=True)
        of_tokens.rows.weight.data.copy_(rows)
        read = [alignment.read(of_tokens(frames[e.id][None])[0].detach()) for e in examples[100:]]
        return sum(found == tokens[e.id] for found, e in zip(read, examples[100:], strict=True))

    rows, counts = rows_heard(adaptor, quantiser, (frames[e.id] for e in examples[:100]))
    assert (counts > 0).all()
    assert n_read(rows) >= 38  # of 40
    assert n_read(rows_like(embedding, 20, 0)) <= 4


def test_rows_of_a_16_bit_model_are_rounded_once() -> None:
    model = SpeechLM.from_parts(
        tiny_encoder().bfloat16(), tiny_llama(eos_token_id=3).bfloat16(), reads="tokens", tokenizer=tokenizer()
    )
    rows = rows_like(tiny_llama(eos_token_id=3).bfloat16().get_input_embeddings().weight, K, 0)
    assert torch.equal(model.adaptor.get_parameter("rows.weight"), rows.bfloat16())
    for name, tensor in tokenizer().tensors.items():
        assert torch.equal(model.adaptor.get_buffer(f"quantiser.{name}").float(), tensor), name


# ---------------------------------------------------------------------------------------------------------------------
# The language model around them
# ---------------------------------------------------------------------------------------------------------------------
IDS = [[1, 1, 4, 4, 4, 0], [2, 5, 5]]


def prompts(ids: list[list[int]], *, left: bool = False) -> dict[str, torch.Tensor]:
    rows = [[1, 40, *[SPEECH_POSITION] * len(tokens), 60, 61, 62] for tokens in ids]
    width = max(map(len, rows))
    padded = [[0] * (width - len(row)) + row if left else row + [0] * (width - len(row)) for row in rows]
    frames, counts = spoken(ids)
    input_ids = torch.tensor(padded)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "encoder_frames": frames,
        "frame_counts": counts,
    }


def alone(model: SpeechLM, tokens: list[int]) -> torch.Tensor:
    """Embeddings of the prompt of these tokens, laid by hand."""
    embed, rows = model.get_input_embeddings(), model.adaptor.get_parameter("rows.weight")
    text = embed(torch.tensor([1, 40, 60, 61, 62]))
    return torch.cat([text[:2], rows[tokens], text[2:]])[None]


@pytest.mark.parametrize("collapse", [True, False])
def test_the_language_model_sees_the_tokens_and_no_repetition(collapse: bool) -> None:
    model = token_lm(collapse=collapse)
    with torch.no_grad():
        logits = model(**prompts(IDS)).logits
        for row, tokens in enumerate(IDS):
            kept = collapsed(tokens)[0] if collapse else tokens
            expected = model.language_model(inputs_embeds=alone(model, kept)).logits[0, -3:]
            at = 2 + len(tokens)
            assert torch.allclose(logits[row, at : at + 3], expected, atol=1e-4)
        written = model.generate(**prompts(IDS, left=True), max_new_tokens=6, do_sample=False)
        for row, tokens in enumerate(IDS):
            kept = collapsed(tokens)[0] if collapse else tokens
            by_hand = model.language_model.generate(
                inputs_embeds=alone(model, kept), max_new_tokens=6, do_sample=False
            )[0]
            assert written[row, : len(by_hand)].tolist() == by_hand.tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_the_base_to_the_bit_and_no_speech_token_is_ever_proposed(tied: bool) -> None:
    model, base = token_lm(tied=tied), tiny_llama(tied=tied, eos_token_id=3)
    ids = torch.tensor([[1, 5, 9, 70, 4]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
        assert model(**prompts(IDS)).logits.shape[-1] == VOCAB
    assert model.language_model.config.vocab_size == VOCAB


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_a_vocabulary_that_grew_with_a_head_that_did_not(tied: bool) -> None:
    """Against transformers' own resized embedding: logits of the old tokens, gradients of the new rows."""
    ours = token_lm(collapse=False, tied=tied)
    batch = prompts(IDS[:1])
    rows = ours.adaptor.get_parameter("rows.weight")
    grown = tiny_llama(tied=tied, eos_token_id=3)
    grown.resize_token_embeddings(VOCAB + K, mean_resizing=False)
    embedding = grown.get_input_embeddings().weight
    embedding.data[VOCAB:] = rows.detach()
    theirs = torch.tensor([[1, 40, *[VOCAB + token for token in IDS[0]], 60, 61, 62]])
    targets = torch.tensor([61, 62, 7])
    logits = [ours(**batch).logits[0, -3:], grown(theirs).logits[0, -3:, :VOCAB]]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    for found in logits:
        torch.nn.functional.cross_entropy(found, targets).backward()
    assert torch.allclose(rows.grad, embedding.grad[VOCAB:], atol=1e-6)
    said = sorted(set(IDS[0]))
    assert rows.grad[said].abs().sum(1).min() > 0
    assert not rows.grad[[i for i in range(K) if i not in said]].any()  # of what was not said


def test_importance_of_new_rows_old_rows_and_layers_apart() -> None:
    model = token_lm()
    inner = model.language_model.model
    batch = {**prompts(IDS), "labels": torch.full((2, 11), -100)}
    batch["labels"][0, 9:], batch["labels"][1, 6:8] = torch.tensor([61, 62]), torch.tensor([61, 62])
    parameters = {
        "speech_tokens.weight": model.adaptor.get_parameter("rows.weight"),
        "model.embed_tokens.weight": inner.embed_tokens.weight,
        "model.layers.0.mlp.up_proj.weight": inner.layers[0].mlp.up_proj.weight,
    }
    scores = estimate_importance(model, [batch], ("signed_sum",), parameters=parameters).tensors("signed_sum")
    new = scores["speech_tokens.weight"]
    assert (new.sum(1) > 0).tolist() == [True, True, True, False, True, True]  # token 3 is not said
    assert all(scores[name].sum() > 0 for name in parameters)


def test_aligned_rows_read_what_is_said() -> None:
    """Each word sounds as a pattern of its own, so a token is a word or silence, and its row learns which."""
    embedding, examples, frames, tokens = planted(200)
    fitted = fit_tokens([e.id for e in examples], frames, Tokens(k=20, pool=FACTOR), 0)
    adaptor = TokenAdaptor(fitted.quantiser(), embedding.shape[1], collapse=True)
    adaptor.rows.weight.data.copy_(rows_like(embedding, 20, 0))
    settings = Align(epochs=30, learning_rate=3e-2, warmup_steps=5, batch_size=8)
    alignment = align_adaptor(adaptor, embedding, examples[:160], frames, tokens, settings, seed=3)
    read = [alignment.read(adaptor(frames[e.id][None])[0].detach()) for e in examples[160:]]
    assert sum(found == tokens[e.id] for found, e in zip(read, examples[160:], strict=True)) >= 36  # of 40


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_models(folder)
    return folder


@pytest.mark.parametrize("reads", ["tokens", "centroids"])
def test_a_model_of_tokens_survives_its_folders(models: Path, tmp_path: Path, reads: Any) -> None:
    language_model, text = load_language_model(str(models / "llm"))
    encoder, extractor = load_encoder(str(models / "whisper"))
    model = SpeechLM.from_parts(
        encoder, language_model, adaptor_hidden_size=24, seed=3, reads=reads, tokenizer=tokenizer()
    ).eval()
    factor = POOL if reads == "tokens" else 5
    assert model.adaptor.stack_factor == factor
    model.save_pretrained(tmp_path / "whole")
    SpeechLMProcessor(text, extractor, factor, rounded_to=5).save_pretrained(tmp_path / "whole")
    names = {"language_model": str(models / "llm"), "encoder": str(models / "whisper")}
    export.export(tmp_path / "whole", light=tmp_path / "light", **names)
    export.export(tmp_path / "whole", text_llm=tmp_path / "text")

    wave = np.random.default_rng(0).normal(0, 0.1, 9_600).astype(np.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "whole")
    batch = processor(audio=wave)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()(**batch).logits, expected)
        light, its = load_speech_lm(tmp_path / "light")
        assert (its.stack_factor, its.rounded_to) == (factor, 5)
        quantiser = light.adaptor.quantiser
        assert quantiser is not None
        assert all(torch.equal(quantiser.get_buffer(name), value) for name, value in tokenizer().tensors.items())
        assert torch.allclose(light(**batch).logits, expected, atol=2e-2)  # matrices in float16
        ids = torch.tensor([[1, 5, 9, 70, 4]])
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
        assert torch.equal(plain(ids).logits, load_language_model(str(models / "llm"))[0](ids).logits)
        assert {*load_file(tmp_path / "text/model.safetensors")} == {*load_file(models / "llm/model.safetensors")}
    with pytest.raises(UserError, match="reads speech tokens"):
        read_adaptor(str(tmp_path / "light"))


def test_checkpoints_from_before_there_were_tokens_load_as_ever(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("tokens") is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    batch = processor(audio=np.zeros(8_000, np.float32))
    with torch.no_grad():
        assert torch.equal(load_speech_lm(tmp_path)[0](**batch).logits, model(**batch).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Codecs
# ---------------------------------------------------------------------------------------------------------------------
def save_tiny_codec(folder: Path, kind: str) -> None:
    """Random, of 32 codes: the whole way of a codec without its weights."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"codebook_size": 32, "codebook_dim": 8, "num_filters": 4, "hidden_size": 16}
    if kind == "mimi":
        config = MimiConfig(
            **shared, vector_quantization_hidden_dimension=8, num_quantizers=3, num_hidden_layers=1,
            intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8, upsample_groups=16,
        )  # fmt: skip
        model: Any = MimiModel(config)
        for codebook in (it for name, it in model.named_buffers() if name.endswith("embed_sum")):
            codebook.normal_()
    else:
        config = EncodecConfig(**{**shared, "codebook_dim": 16}, num_lstm_layers=1, target_bandwidths=[1.5])
        model = EncodecModel(config)
        codebooks = [it for name, it in model.named_buffers() if name.endswith("embed")]
        with torch.no_grad():  # a random encoder gives nearly the same for all sounds, so the codes lie where that is
            codebooks[0].copy_(model.encoder(0.1 * torch.randn(1, 1, 10_240))[0].T[:32])
        codebooks[1].normal_(std=1e-3)
    model.save_pretrained(folder)
    EncodecFeatureExtractor(sampling_rate=24_000).save_pretrained(folder)


@pytest.mark.parametrize(("kind", "rate"), [("mimi", 12.5), ("encodec", 75.0)])
def test_a_codec_is_a_tokenizer_too(tmp_path: Path, kind: str, rate: float) -> None:
    save_tiny_codec(tmp_path, kind)
    options = Tokens(kind="codec", codec=str(tmp_path), k=32, codebook=1)
    codec, extractor = load_codec(str(tmp_path), options)
    assert codec_rate(codec.config) == rate
    wave = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    ids = codec_ids(codec, extractor, wave, 16_000, 1)
    assert len(ids) == pytest.approx(rate, abs=1)  # of one second
    assert len(set(ids)) > 1
    assert all(0 <= token < 32 for token in ids)
    assert ids != codec_ids(codec, extractor, wave, 16_000, 0)
    for wrong, said in (({"k": 64}, r"k is 64 and the codebooks .* have 32"), ({"codebook": 40}, "codebook is 40 and")):
        with pytest.raises(UserError, match=said):
            load_codec(str(tmp_path), replace(options, **wrong))


def test_codes_pass_as_frames_and_nothing_else_does() -> None:
    ids = [0, 1, 255, 256, 2047]
    assert as_frames(ids).half()[-1].tolist() == [7, 255]
    model = SpeechLM.from_parts(
        tiny_encoder(), tiny_llama(eos_token_id=3), reads="tokens", tokenizer=SpeechTokenizer(1, {}, codes=2048)
    )
    assert model.adaptor.stack_factor == 1
    assert torch.equal(model.adaptor(as_frames(ids)[None])[0], model.adaptor.get_parameter("rows.weight")[ids])
    with pytest.raises(UserError, match="tokens of a codec, which is no part of it"):
        model.adaptor(torch.zeros(1, 4, D_ENC))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints from before there were speech tokens
# ---------------------------------------------------------------------------------------------------------------------
def test_old_checkpoints_are_what_they_were(models: Path, tmp_path: Path) -> None:
    """Whole ones whose config, and light ones whose light.json, do not know the key."""
    model, processor = tiny_speech_lm()
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    names = {"language_model": str(models / "llm"), "encoder": str(models / "whisper")}
    export.export(tmp_path / "whole", light=tmp_path / "light", **names)
    for file in (tmp_path / "whole/config.json", tmp_path / "light/light.json"):
        values = json.loads(file.read_text())
        assert values.pop("tokens", None) is None
        file.write_text(json.dumps(values))
    assert "rounded_to" not in json.loads((tmp_path / "whole/speech_processor.json").read_text())
    batch = processor(audio=np.random.default_rng(0).normal(0, 0.1, 9_600).astype(np.float32))
    with torch.no_grad():
        expected = model(**batch).logits
        for folder, tolerance in (("whole", 0.0), ("light", 2e-2)):  # matrices in float16
            found, its = load_speech_lm(tmp_path / folder)
            assert isinstance(found.adaptor, SpeechAdaptor)
            assert (found.adaptor.quantiser, found.config.tokens) == (None, None)
            assert (its.stack_factor, its.rounded_to) == (5, 5)
            assert found.state_dict().keys() == model.state_dict().keys()
            torch.testing.assert_close(found(**batch).logits, expected, rtol=0, atol=tolerance)
    assert read_adaptor(str(tmp_path / "whole")).stack_factor == 5


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------
def test_what_a_recipe_may_not_say() -> None:
    base: dict[str, Any] = {
        "name": "x",
        "models": {"language_model": "llm", "encoder": "whisper"},
        "data": {"train": {"source": "facts", "split": "train"}, "heldout_examples": 4},
        "evaluation": {"tasks": [{"name": "facts", "source": "facts", "split": "heldout"}]},
    }
    tokens, method = {"kind": "kmeans", "k": 4}, {"kind": "full", "speech": "tokens"}
    for said, changes in {
        r"needs speech\.tokens": {"methods": {"a": method}},
        "there is none": {"methods": {"a": {"kind": "full"}}, "speech": {"tokens": tokens}},
        r"start: adaptor needs models\.adaptor": {
            "methods": {"a": method},
            "speech": {"tokens": {**tokens, "start": "adaptor"}},
        },
        "would not be heard": {"methods": {"a": {**method, "modality": "text"}}, "speech": {"tokens": tokens}},
        "kmeans": {"methods": {"a": method}, "speech": {"tokens": {"kind": "other"}}},
        "needs a codec": {"methods": {"a": method}, "speech": {"tokens": {"kind": "codec"}}},
        "needs the encoder's frames": {
            "methods": {"a": method},
            "speech": {"tokens": {"kind": "codec", "codec": "x", "start": "adaptor"}},
        },
        "reads none; remove one": {"methods": {"a": {"kind": "full", "k": 8}}},
        "kind blend trains nothing and does not use k": {"methods": {"a": {"kind": "blend", "of": "b", "k": 8}}},
        r"methods\.a\.k: a codec has the tokens": {
            "methods": {"a": {**method, "k": 8}},
            "speech": {"tokens": {"kind": "codec", "codec": "x"}},
        },
        "centroids needs": {
            "methods": {"a": {**method, "speech": "centroids"}},
            "speech": {"tokens": {"kind": "codec", "codec": "x"}},
        },
    }.items():
        with pytest.raises(UserError, match=said):
            parse_config({**base, **changes}, "test")
    methods = {"a": {"kind": "full"}, "b": method, "c": {"kind": "lora", "speech": "centroids"}}
    config = parse_config({**base, "methods": methods, "speech": {"tokens": {**tokens, "pool": 3}}}, "test")
    assert [config.stack_factor(run) for run in ("base", "a", "b", "c")] == [5, 5, 3, 5]
    assert config.collapses
    sized = {**methods, "d": {**method, "k": 9}, "e": {**method, "k": 4}, "f": {**method, "k": 9, "kind": "adaptor"}}
    config = parse_config({**base, "methods": sized, "speech": {"tokens": tokens}}, "test")
    assert [config.own_k(run) for run in ("base", *sized)] == [None, None, None, None, 9, None, 9]
    assert config.token_sizes == [None, 9]  # 4 is that of all
    assert [config.n_rows(it) for it in config.methods.values()] == [0, 4, 0, 9, 4, 9]
    over = {"a": {"kind": "full", "speech": "tokens", "over": {"k": [2, 4]}}}
    config = parse_config({**base, "methods": over, "speech": {"tokens": tokens}}, "test")
    assert ([*config.methods], config.token_sizes) == (["a-2", "a-4"], [2, None])
    for changes in ({"speech": {"tokens": {**tokens, "collapse": False}}}, {"methods": {"c": methods["c"]}}):
        given = {**base, "methods": methods, "speech": {"tokens": tokens}, **changes}
        assert not parse_config(given, "test").collapses  # centroids have no repetitions that go


def test_repetitions_stay_in_front_of_a_model_with_windows(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    MistralForCausalLM(MistralConfig(**small, vocab_size=VOCAB, sliding_window=4)).save_pretrained(tmp_path)
    methods = [Method("full", speech="tokens")]
    with pytest.raises(UserError, match=r"has windows, recurrence .*set speech\.tokens\.collapse to false"):
        require_language_model(str(tmp_path), methods, collapse=True)
    require_language_model(str(tmp_path), methods, collapse=False)
