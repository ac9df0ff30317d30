"""SpeechLM: splice, shapes, frozen encoder, and equality with the plain language model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.files import UserError
from palimpsest.models.loading import load_language_model, load_speech_lm
from palimpsest.models.speech_lm import SPEECH_POSITION, SpeechAdaptor, encode_speech
from tiny import tiny_encoder, tiny_speech_lm


def waves(*seconds: float) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, int(s * 16_000)).astype(np.float32) for s in seconds]


def speech_inputs(processor, *seconds: float) -> dict[str, torch.Tensor]:
    mels, counts = processor.features(waves(*seconds))
    rows = [processor.speech_prompt(int(n) // processor.stack_factor) for n in counts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "input_features": mels, "frame_counts": counts}


def test_without_speech_it_is_the_language_model_bit_for_bit() -> None:
    model, processor = tiny_speech_lm()
    ids = torch.tensor([processor.text_prompt("what is this?")])
    mask = torch.ones_like(ids)
    plain = model.language_model
    assert torch.equal(model(ids, mask).logits, plain(ids, attention_mask=mask).logits)
    settings = {"max_new_tokens": 7, "do_sample": False}
    generated = plain.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, mask, **settings), generated[:, ids.shape[1] :])


def test_composing_changes_neither_attention_nor_vocabulary_of_the_parts() -> None:
    from palimpsest.models.speech_lm import SpeechLM
    from tiny import tiny_llama

    language_model, encoder = tiny_llama(), tiny_encoder()
    before = language_model.config._attn_implementation, len(language_model.get_input_embeddings().weight)
    SpeechLM.from_parts(encoder, language_model)
    assert before[0] == "sdpa"
    assert (language_model.config._attn_implementation, len(language_model.get_input_embeddings().weight)) == before
    assert encoder.config._attn_implementation == "sdpa"


def test_adaptor_stacks_five_frames_and_drops_the_rest() -> None:
    adaptor = SpeechAdaptor(encoder_dim=2, hidden=3, output_dim=4, stack_factor=5)
    frames = torch.arange(13 * 2, dtype=torch.float32).reshape(1, 13, 2)
    stacked = adaptor.stack(frames)
    assert stacked.shape == (1, 2, 10)
    assert stacked[0, 1].tolist() == list(range(10, 20))  # frames 5 … 9; 10 … 12 are dropped
    expected = torch.relu(stacked @ adaptor.linear1.weight.T + adaptor.linear1.bias)
    expected = expected @ adaptor.linear2.weight.T + adaptor.linear2.bias
    assert torch.allclose(adaptor(frames), expected)  # uncalibrated: the paper's adaptor and nothing else


def test_calibrated_adaptor_starts_at_the_spread_of_the_embedding() -> None:
    torch.manual_seed(0)
    adaptor = SpeechAdaptor(encoder_dim=4, hidden=64, output_dim=32, stack_factor=5)
    frames = 3.0 + 5.0 * torch.randn(1, 400, 4)
    adaptor.calibrate(frames, target_std=0.07)
    assert float(adaptor(frames).detach().std()) == pytest.approx(0.07, rel=1e-5)
    standardised = (adaptor.stack(frames) - adaptor.input_mean) * adaptor.input_scale
    assert torch.allclose(standardised.mean((0, 1)), torch.zeros(20), atol=1e-5)
    with pytest.raises(UserError, match="calibrated"):
        adaptor.calibrate(frames[:, :5], 0.07)


def test_speech_positions_are_replaced_in_order_and_nothing_else() -> None:
    model, processor = tiny_speech_lm()
    batch = speech_inputs(processor, 0.5, 1.3)
    embeds = model.embed(batch["input_ids"], batch["input_features"], None, batch["frame_counts"])["inputs_embeds"]
    frames = encode_speech(model.encoder, batch["input_features"], batch["frame_counts"], "trim")
    for row in range(2):
        is_speech = batch["input_ids"][row] == SPEECH_POSITION
        n_positions = int(batch["frame_counts"][row]) // 5
        assert int(is_speech.sum()) == n_positions
        expected = model.adaptor(frames[row : row + 1, : n_positions * 5])[0]
        assert torch.allclose(embeds[row][is_speech], expected, atol=1e-6)
        tokens = batch["input_ids"][row][~is_speech]
        assert torch.equal(embeds[row][~is_speech], model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("speech_length", ["trim", "pad_to_30s"])
def test_speech_does_not_depend_on_the_rest_of_the_batch(speech_length: str) -> None:
    model, processor = tiny_speech_lm(speech_length=speech_length)
    together = speech_inputs(processor, 0.6, 1.7)
    alone_mels, alone_counts = processor.features(waves(0.6))
    both = encode_speech(model.encoder, together["input_features"], together["frame_counts"], speech_length)
    alone = encode_speech(model.encoder, alone_mels, alone_counts, speech_length)
    n = int(alone_counts[0])
    assert n == (30 if speech_length == "trim" else 1500)
    assert torch.allclose(both[0, :n], alone[0, :n], atol=1e-5)
    with torch.no_grad():
        logits = model(**together).logits[0, -1]
        single = model(**speech_inputs(processor, 0.6)).logits[0, -1]
    assert torch.allclose(logits, single, atol=1e-4)


def test_trimmed_encoding_of_a_full_window_is_the_encoder_itself() -> None:
    encoder = tiny_encoder()
    mels = torch.randn(1, 80, 3000)
    counts = torch.tensor([1500])
    assert torch.allclose(
        encode_speech(encoder, mels, counts, "trim"), encode_speech(encoder, mels, counts, "pad_to_30s"), atol=1e-5
    )


def test_encoder_stays_frozen_and_in_eval_mode() -> None:
    model, _ = tiny_speech_lm()
    model.train()
    assert not model.encoder.training
    assert model.language_model.training
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_gradients_reach_adaptor_and_language_model_through_the_splice() -> None:
    model, processor = tiny_speech_lm()
    model(**speech_inputs(processor, 0.4)).logits.sum().backward()
    assert model.adaptor.linear1.weight.grad.abs().sum() > 0
    assert model.language_model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.encoder.parameters())


def test_wrong_number_of_positions_and_missing_speech_are_errors() -> None:
    model, processor = tiny_speech_lm()
    batch = speech_inputs(processor, 0.5)
    with pytest.raises(ValueError, match="speech positions"):
        model(batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match="speech gives"):
        model(**{**batch, "frame_counts": batch["frame_counts"] - 5})


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model, processor = tiny_speech_lm()
    model.language_model.generation_config.eos_token_id = [3, 7]
    model.adaptor.calibrate(torch.randn(1, 50, 16), 0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, again_processor = load_speech_lm(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight  # still tied
    assert again.language_model.generation_config.eos_token_id == [3, 7]
    assert again_processor.speech_prompt(3) == processor.speech_prompt(3)
    batch = speech_inputs(processor, 0.5, 0.9)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    language_model, _ = load_language_model(str(tmp_path))
    assert torch.equal(language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_batched_generation_from_speech_equals_one_by_one() -> None:
    model, processor = tiny_speech_lm()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**speech_inputs(processor, 0.5, 1.0), **settings)
    first = model.generate(**speech_inputs(processor, 0.5), **settings)
    assert together[0, : first.shape[1]].tolist() == first[0].tolist()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        load_language_model(str(tmp_path))
    with pytest.raises(UserError, match="not a folder"):
        load_language_model(str(tmp_path / "nowhere"))
