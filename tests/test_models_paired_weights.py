"""Weights of a base and a tuned model by one name: vocabularies that grew, heads tied or not, behind adaptors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from palimpsest.analysis.delta import delta_records
from palimpsest.analysis.overlap import overlap_records
from palimpsest.files import UserError
from palimpsest.models.anatomy import named_parameters, scored_parameters
from palimpsest.models.loading import load_language_model
from palimpsest.models.paired_weights import PairedWeights, pair_weights, require_same_architecture
from tiny import tiny_encoder, tiny_llama, tiny_speech_lm, tiny_tokenizer
from tiny_audio import TEXT, save_tiny_audio_llm, tiny_audio_llm


def plain_qwen2(**changes: Any) -> Any:
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TEXT, **changes})).eval()


def assert_paired(pairs: PairedWeights) -> None:
    assert list(pairs.base) == list(pairs.tuned)
    assert all(weight.shape == pairs.tuned[name].shape for name, weight in pairs.base.items())


# -- names and shapes --------------------------------------------------------------------------------------------------
def test_every_weight_of_two_plain_models_once() -> None:
    base, tuned = tiny_llama(0, tied=False), tiny_llama(1, tied=False)
    pairs = pair_weights(base, tuned)
    assert set(pairs.base) == set(named_parameters(base))
    assert all(torch.equal(weight, base.state_dict()[name]) for name, weight in pairs.base.items())
    assert all(torch.equal(weight, tuned.state_dict()[name]) for name, weight in pairs.tuned.items())
    assert pairs.notes == ()


@pytest.mark.parametrize("kind", ["qwen2_audio", "audioflamingo3"])
def test_a_language_model_inside_an_audio_llm_and_the_plain_one(kind: str) -> None:
    audio, plain = tiny_audio_llm(kind)[0], plain_qwen2()
    pairs = pair_weights(plain, audio)
    assert_paired(pairs)
    assert set(pairs.base) == set(named_parameters(plain))  # the head too, which stands beside the decoder there
    assert torch.equal(pairs.tuned["lm_head.weight"], audio.get_output_embeddings().weight)
    assert set(scored_parameters(plain)) <= set(pairs.base)
    assert pairs.notes == ()


def test_behind_an_adaptor_and_with_an_adapter() -> None:
    base = tiny_llama(eos_token_id=3)
    speech, _ = tiny_speech_lm()
    pairs = pair_weights(base, speech)
    assert all(torch.equal(weight, pairs.tuned[name]) for name, weight in pairs.base.items())
    assert "lm_head.weight" not in pairs.base  # tied in both
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_llama(eos_token_id=3), lora)
    with pytest.raises(UserError, match=r"active adapters, which are no part of the weights that are compared"):
        pair_weights(base, adapted)
    merged = pair_weights(base, adapted.merge_and_unload())
    assert list(merged.tuned) == list(pairs.base)
    changed = {name for name, weight in merged.base.items() if not torch.equal(weight, merged.tuned[name])}
    assert changed == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(2)}


def test_the_audio_llm_that_was_trained_from_a_plain_one_by_its_scores_and_its_change() -> None:
    """One weight of one matrix is planted: delta and overlap find that matrix and no other."""
    audio, _ = tiny_audio_llm("qwen2_audio")
    plain = plain_qwen2()
    plain.load_state_dict({name: weight.clone() for name, weight in pair_weights(plain, audio).tuned.items()})
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        scored_parameters(audio)[name][3, 4] += 2.0
    pairs = pair_weights(plain, audio)
    importance = {key: weight.abs() for key, weight in scored_parameters(plain).items()}
    importance = {key: weight.detach() for key, weight in importance.items()}
    rows = delta_records(pairs.base, pairs.tuned, importance, method="audio")
    norm = {row["name"]: row["relative_norm"] for row in rows}
    expected = 2.0 / float(torch.linalg.vector_norm(pairs.base[name]))
    assert norm.pop(name) == pytest.approx(expected, rel=1e-5)
    assert set(norm.values()) == {0.0}
    scores = {key: weight.detach().abs() for key, weight in scored_parameters(audio).items()}
    overlaps = {row["name"]: row["overlap"] for row in overlap_records("audio", scores, "base", importance)}
    assert {overlaps[key] for key in norm} == {1.0}


# -- vocabularies ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_rows_in_common_are_compared_and_the_others_counted_and_named(tied: bool) -> None:
    base, tuned = tiny_llama(0, tied=tied), tiny_llama(0, tied=tied)
    tuned.resize_token_embeddings(304, mean_resizing=False)
    tokenizer = tiny_tokenizer()
    known = {**tokenizer.get_vocab(), "<audio>": 300, "<end of audio>": 301}
    pairs = pair_weights(base, tuned, known)
    assert_paired(pairs)
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        assert pairs.tuned[name].shape == (300, 32)
        assert torch.equal(pairs.base[name], pairs.tuned[name])
    (note,) = pairs.notes
    assert "300 rows in the base and 304 in the tuned model: the first 300 are compared, the 4 of the tuned" in note
    assert "(<audio>, <end of audio>)" in note
    turned = pair_weights(tuned, base)
    assert_paired(turned)
    (back,) = turned.notes
    assert "304 rows in the base and 300 in the tuned model" in back
    assert "the 4 of the base alone" in back


@pytest.mark.parametrize("base_tied", [True, False])
def test_a_head_of_its_own_beside_a_tied_one(base_tied: bool) -> None:
    base, tuned = tiny_llama(0, tied=base_tied), tiny_llama(0, tied=not base_tied)
    pairs = pair_weights(base, tuned)
    assert_paired(pairs)
    tied = pairs.base if base_tied else pairs.tuned
    assert torch.equal(tied["lm_head.weight"], tied["model.embed_tokens.weight"])
    (note,) = pairs.notes
    assert f"lm_head.weight of the {'base' if base_tied else 'tuned model'} is its embedding" in note


# -- different architectures -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tuned", "said"),
    [
        (plain_qwen2, r"\(qwen2\) is not of the base's architecture \(llama\): .*\.layers\.0\.self_attn\.q_proj\.b"),
        (lambda: tiny_llama(num_hidden_layers=1), r"it has no model\.layers\.1\.self_attn\.q_proj\.weight; give the"),
        (lambda: tiny_llama(num_hidden_layers=3), r"model\.layers\.2\.self_attn\.q_proj\.weight is not in the base"),
        (lambda: tiny_llama(intermediate_size=40), r"mlp\.gate_proj\.weight has the shape \(48, 32\) in the base and"),
        (lambda: tiny_llama(hidden_size=16), r"model\.embed_tokens\.weight has the shape \(300, 32\) in the base and"),
    ],
)
def test_the_first_difference_is_said(tuned: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        pair_weights(tiny_llama(), tuned())


def test_by_name_before_a_weight_is_read(tmp_path: Path) -> None:
    audio = str(save_tiny_audio_llm("qwen2_audio", tmp_path / "audio"))
    base = plain_qwen2()
    base.resize_token_embeddings(298, mean_resizing=False)
    for name, model in (("base", base), ("llama", tiny_llama()), ("tied", plain_qwen2(tie_word_embeddings=True))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    notes = require_same_architecture(str(tmp_path / "base"), audio)
    assert notes == pair_weights(base, load_language_model(audio)[0]).notes
    assert "298 rows in the base and 300" in notes[0]
    with pytest.raises(UserError, match=r"\(llama\) is not of the base's architecture \(qwen2\)"):
        require_same_architecture(str(tmp_path / "base"), str(tmp_path / "llama"))
    assert "of the base is its embedding" in require_same_architecture(str(tmp_path / "tied"), audio)[0]


def test_a_speech_lm_is_paired_as_its_language_model() -> None:
    from palimpsest.models.speech_lm import SpeechLM

    plain = plain_qwen2()
    model = SpeechLM.from_parts(tiny_encoder(), plain, adaptor_hidden_size=24)
    assert list(pair_weights(plain, model).tuned) == list(pair_weights(plain, plain).tuned)
