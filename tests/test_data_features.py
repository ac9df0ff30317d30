"""The feature cache: what an address depends on, resuming after a kill, several processes, damaged shards."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from palimpsest.data import features as module
from palimpsest.data import shards as shards_module
from palimpsest.data.examples import Example
from palimpsest.data.features import Features, compute_features, describe_encoding
from palimpsest.data.shards import VERIFIED, Shards, claim, read_shard, shard_name, verify_shard, write_shard
from palimpsest.files import UserError, hash_value
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import encode_speech
from tiny import tiny_encoder, tiny_tokenizer

GOLDEN_TRIM = (1.7389, 1.1023, 1.1597, -1.2604, -1.3439, 2.1316, 1.3457, -0.4452, 1.6216, -1.4271, 0.5802, -1.1864)
GOLDEN_PAD = (1.7449, 1.1108, 1.1684, -1.2554, -1.3388, 2.1473, 1.3521, -0.4388, 1.6294, -1.4471, 0.6138, -1.2028)
SMALL_SHARD = 4_000  # bytes; a second of speech of the tiny encoder takes 1600


def processor(speech_length: Any = "trim", stack_factor: int = 5, **settings: Any) -> SpeechLMProcessor:
    extractor = WhisperFeatureExtractor(feature_size=80, **settings)
    return SpeechLMProcessor(tiny_tokenizer(), extractor, stack_factor, speech_length)


def write_audio(folder: Path, n: int = 12) -> list[Example]:
    """Noise of 0.3 to 0.8 seconds."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    examples = []
    for i in range(n):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.normal(0, 0.1, 4_800 + 800 * (i % 11)), 16_000)
        examples.append(Example(f"q{i}", "Who?", ("Ada",), "Ada.", audio=path))
    return examples


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    return write_audio(tmp_path / "audio")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many utterances each call of the encoder had, from now on."""
    seen: list[int] = []

    def counted(encoder: Any, mels: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(mels))
        return encode_speech(encoder, mels, *rest)

    monkeypatch.setattr(module, "encode_speech", counted)
    monkeypatch.setattr(module, "SHARD_BYTES", SMALL_SHARD)
    return seen


def shards_of(cache: Path) -> dict[str, bytes]:
    """Every file of the cache by its path in it; temporary files too."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != VERIFIED  # holds times
    }


# --- addresses -------------------------------------------------------------------------------------------
def test_ids_and_paths_are_no_part_of_the_address(tmp_path: Path, examples: list[Example], encoded: list[int]) -> None:
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "a", cache=tmp_path / "cache")
    before = shards_of(tmp_path / "cache")
    assert sum(encoded) == len(examples)
    moved = []
    for i, example in enumerate(examples):
        path = tmp_path / f"moved{i}.wav"
        shutil.copy(example.audio, path)
        moved.append(replace(example, id=f"other{i}", audio=path))
    twice = [*moved[::-1], replace(moved[0], id="twice")]
    seen: list[tuple[int, int]] = []
    compute_features(
        tiny_encoder(),
        processor(),
        twice,
        tmp_path / "b",
        cache=tmp_path / "cache",
        progress=lambda *done: seen.append(done),
    )
    assert sum(encoded) == len(examples)  # nothing was encoded again
    assert shards_of(tmp_path / "cache") == before
    assert seen[0] == seen[-1] == (12, 12)
    one, two = Features(tmp_path / "a"), Features(tmp_path / "b")
    assert all(torch.equal(one[f"q{i}"], two[f"other{i}"]) for i in range(12))
    assert torch.equal(two["twice"], two["other0"])


def test_a_changed_sample_is_another_address(tmp_path: Path, examples: list[Example], encoded: list[int]) -> None:
    cache = tmp_path / "cache"
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "a", cache=cache)
    audio, _ = soundfile.read(examples[3].audio, dtype="int16")
    audio[100] += 1
    soundfile.write(examples[3].audio, audio, 16_000)
    del encoded[:]
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "b", cache=cache)
    assert encoded == [1]


def test_the_address_changes_with_all_that_changes_the_frames_and_nothing_else() -> None:
    def address(encoder: Any = None, **changes: Any) -> str:
        return hash_value(describe_encoding(encoder or tiny_encoder(), processor(**changes)))

    nudged, heads, activation = tiny_encoder(), tiny_encoder(), tiny_encoder()
    with torch.no_grad():
        nudged.layers[1].fc2.bias[3] += 1e-6
    heads.config.encoder_attention_heads = 4
    activation.config.activation_function = "relu"
    different = [
        address(),
        address(nudged),
        address(heads),
        address(activation),
        address(tiny_encoder().to(torch.bfloat16)),
        address(speech_length="pad_to_30s"),
        address(stack_factor=4),
        address(dither=0.1),
    ]
    assert len(set(different)) == len(different)
    assert address() == address(tiny_encoder())
    assert address(speech_length="pad_to_30s", stack_factor=4) == address(speech_length="pad_to_30s")


def test_version_changes_when_the_frames_do() -> None:
    """If this fails, and the change is meant, raise VERSION in data/features.py: old caches hold the old frames."""
    wave = np.sin(np.arange(8_000) ** 1.2 / 40).astype(np.float32)
    for length, expected in (("trim", GOLDEN_TRIM), ("pad_to_30s", GOLDEN_PAD)):
        mels, counts = processor(length).features([wave])
        frames = encode_speech(tiny_encoder(), mels, counts, length)[0, :25]
        assert torch.allclose(frames[::8, :3].flatten(), torch.tensor(expected), atol=2e-3)
    assert module.VERSION == 1


# --- resuming, sharing -----------------------------------------------------------------------------------
SCRIPT = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
from palimpsest.data import features
from test_data_features import SMALL_SHARD, processor, write_audio
from tiny import tiny_encoder

def work(name, seconds):
    plain, n = features.encode_speech, 0
    def slow(encoder, mels, *rest):
        nonlocal n
        n += len(mels)
        time.sleep(seconds)
        return plain(encoder, mels, *rest)
    features.encode_speech, features.SHARD_BYTES = slow, SMALL_SHARD
    examples = write_audio(root / ("audio-" + name))
    features.compute_features(tiny_encoder(), processor(), examples, root / name, cache=root / "cache", batch_size=2)
    (root / (name + ".count")).write_text(str(n))

root = Path(sys.argv[1])
fork = multiprocessing.get_context("fork")  # before torch has threads
killed = fork.Process(target=work, args=("a", 0.2))
killed.start()
while len(list((root / "cache").rglob("*"))) < 4:  # folder, encoding.json, a shard, one in progress
    assert killed.is_alive(), "it ended before it could be killed"
    time.sleep(0.002)
os.kill(killed.pid, signal.SIGKILL)
killed.join()
print(*sorted(path.name for path in (root / "cache").rglob("*") if path.is_file()))
two = [fork.Process(target=work, args=(name, 0.05)) for name in "ab"]
for process in two:
    process.start()
for process in two:
    process.join()
    assert process.exitcode == 0
"""


def test_killed_and_resumed_by_two_processes_at_once_the_shards_are_the_same_bytes(
    tmp_path: Path, encoded: list[int]
) -> None:
    examples = write_audio(tmp_path / "audio")
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "one", cache=tmp_path / "plain", batch_size=2)
    plain = shards_of(tmp_path / "plain")
    assert len(plain) >= 4  # several shards and encoding.json

    root = tmp_path / "run"
    root.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(root)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=120)
    left = printed.stdout.split()  # after the kill
    assert any(name.endswith(".tmp") for name in left)
    done = [name for name in left if name.endswith(".safetensors") and not name.startswith(".")]
    assert 1 <= len(done) < len(plain) - 1

    assert shards_of(root / "cache") == plain
    n_before = sum(len(read_shard(path).spans) for path in (tmp_path / "plain").rglob("*") if path.name in done)
    n_after = [int((root / f"{name}.count").read_text()) for name in "ab"]
    assert sum(n_after) == len(examples) - n_before  # each utterance was encoded once, by one of the two
    expected = Features(tmp_path / "one")
    for name in "ab":
        found = Features(root / name)
        assert all(torch.equal(found[example.id], expected[example.id]) for example in examples)


def test_what_another_study_left_changes_no_more_than_the_rounding(
    tmp_path: Path, examples: list[Example], encoded: list[int]
) -> None:
    cache = tmp_path / "cache"
    compute_features(tiny_encoder(), processor(), examples[::3], tmp_path / "first", cache=cache, batch_size=4)
    del encoded[:]
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "second", cache=cache)
    assert sum(encoded) == 8  # of 12, the 4 others were there
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "alone", batch_size=1)
    mixed, alone = Features(tmp_path / "second"), Features(tmp_path / "alone")
    for example in examples:
        difference = (mixed[example.id] - alone[example.id]).abs()
        assert bool((difference <= 2.0**-10 * alone[example.id].abs().clamp_min(2.0**-4)).all())  # one step of float16


def test_memory_is_bounded_by_a_shard(
    tmp_path: Path, examples: list[Example], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(file: Any, path: Path, frames: Any) -> None:
        sizes.append(sum(value.nbytes for value in frames.values()))
        write_shard(file, path, frames)

    monkeypatch.setattr(module, "write_shard", measured)
    compute_features(tiny_encoder(), processor(), examples, tmp_path / "a", batch_size=3)
    assert sum(sizes) == sum(Features(tmp_path / "a").count(e.id) for e in examples) * 16 * 2
    assert max(sizes) <= SMALL_SHARD
    assert len(sizes) > 2


# --- reading ---------------------------------------------------------------------------------------------
def test_frames_are_found_after_a_move_and_in_other_processes(
    tmp_path: Path, examples: list[Example], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    working = tmp_path / "working"
    compute_features(tiny_encoder(), processor(), examples, working / "train", cache=working / "cache")
    compute_features(tiny_encoder(), processor(), examples, working / "shared", cache=tmp_path / "elsewhere")
    working.rename(tmp_path / "features")
    for name in ("train", "shared"):
        found = Features(tmp_path / "features" / name)
        frames = {e.id: found[e.id] for e in examples}
        assert len(found._maps) == 2
        copy = pickle.loads(pickle.dumps(found))
        assert len(pickle.dumps(found)) < 5_000
        for example in examples:
            assert torch.equal(copy[example.id], frames[example.id])
            assert found.count(example.id) == len(frames[example.id])
            assert frames[example.id].dtype == torch.float32
    assert "q0" in found
    assert "none" not in found


# --- damage ----------------------------------------------------------------------------------------------
def test_damaged_shards_are_named_and_only_their_utterances_are_encoded_again(
    tmp_path: Path, examples: list[Example], encoded: list[int]
) -> None:
    def compute() -> None:
        compute_features(tiny_encoder(), processor(), examples, tmp_path / "a")

    compute()
    before = shards_of(tmp_path / "a")
    files = sorted((tmp_path / "a").rglob("*.safetensors"))
    victim = files[1]
    content = victim.read_bytes()
    n_held = len(read_shard(victim).spans)
    del encoded[:]

    victim.write_bytes(content[:-10])
    with pytest.raises(UserError, match="missing or cut short") as caught:
        Features(tmp_path / "a")
    assert str(victim) in str(caught.value)
    with pytest.raises(UserError, match="cut short") as caught:
        compute()
    assert str(victim) in str(caught.value)
    victim.write_bytes(content[:-10] + b"0123456789")  # the right size
    with pytest.raises(UserError, match="checksum") as caught:
        compute()
    assert str(victim) in str(caught.value)
    assert encoded == []
    victim.unlink()
    compute()
    assert sum(encoded) == n_held < len(examples)
    assert shards_of(tmp_path / "a") == before


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_changed_byte_of_a_shard_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("shard")
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    rng = np.random.default_rng(0)
    frames = {f"{i:064x}": rng.normal(size=(n, 2)).astype(np.float16) for i, n in enumerate(counts)}
    path = folder / shard_name(frames)
    file = claim(path, wait=False)
    assert file is not None
    with file:
        write_shard(file, path, frames)
    shard = read_shard(path)
    verify_shard(shard)
    content = path.read_bytes()
    for key, (first, count) in shard.spans.items():
        assert np.array_equal(np.frombuffer(content, np.float16, count * 2, first).reshape(count, 2), frames[key])
    at = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != content[at]))
    path.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
    with contextlib.suppress(UserError):
        damaged = read_shard(path)
        verify_shard(damaged)
        # Not found: a place that says nothing about the frames, such as the name of their type.
        assert (damaged.spans, damaged.dim) == (shard.spans, shard.dim)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError):
        verify_shard(read_shard(path))


def test_a_shard_that_was_found_right_is_read_again_only_when_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a", "b"):
        path = tmp_path / shard_name([key])
        file = claim(path, wait=False)
        assert file is not None
        with file:
            write_shard(file, path, {key: np.zeros((1, 2), np.float16)})
    read: list[str] = []
    verified = shards_module.verify_shard
    monkeypatch.setattr(shards_module, "verify_shard", lambda shard: (read.append(shard.path.name), verified(shard)))

    def start(keys: list[str]) -> list[str]:
        read.clear()
        shards = Shards(tmp_path)
        shards.refresh()
        shards.verify(keys)
        return list(read)

    a, b = (shard_name([key]) for key in ("a", "b"))
    assert [start(["a"]), start(["a", "b", "none"]), start(["a", "b"])] == [[a], [b], []]
    os.utime(tmp_path / a, ns=(0, 0))
    assert start(["a", "b"]) == [a]
    content = (tmp_path / b).read_bytes()
    (tmp_path / b).write_bytes(content[:-1] + b"\1")
    with pytest.raises(UserError, match=f"{b} is damaged"):
        start(["a", "b"])


def test_one_process_writes_a_shard(tmp_path: Path) -> None:
    path = tmp_path / shard_name(["a"])
    file = claim(path, wait=False)
    assert file is not None
    assert claim(path, wait=False) is None  # somebody is at it
    with file:
        write_shard(file, path, {"a": np.zeros((1, 2), np.float16)})
    assert claim(path, wait=True) is None  # it is finished
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    shards = Shards(tmp_path)
    assert "a" not in shards
    shards.refresh()
    assert shards["a"].path == path


# --- what is told before the work --------------------------------------------------------------------------
def test_bad_input_is_told_before_encoding(
    tmp_path: Path, examples: list[Example], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="'q1' has no audio"):
        compute_features(tiny_encoder(), processor(), [examples[0], replace(examples[1], audio=None)], tmp_path / "a")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1, 1, 10))
    with pytest.raises(UserError, match=r"12 utterances needs .* GB free"):
        compute_features(tiny_encoder(), processor(), examples, tmp_path / "b")
    assert encoded == []
    assert not (tmp_path / "b").exists()


def test_frames_beyond_float16_are_a_user_error(tmp_path: Path, examples: list[Example]) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.layer_norm.weight.fill_(1e6)
    with pytest.raises(UserError, match=r"no finite float16 frames for .*\.wav"):
        compute_features(encoder, processor(), examples[:2], tmp_path / "a")
