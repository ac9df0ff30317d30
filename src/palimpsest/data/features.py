"""Encoder frames computed once and reused by every method, epoch, measurement and, with a shared cache, every study.

    CACHE/ENCODING/*.safetensors    shards of float16 frames by hash of the audio file (shards.py)
    CACHE/ENCODING/encoding.json    what ENCODING, a hash, stands for: encoder, length mode, log-mel settings
    FOLDER/index.json               where the frames of each example of one set are

The address of an utterance's frames is the hash of all that determines them; ids and paths are no part of it. Shards
are planned from the whole list of utterances, so a run that was killed ends with the same bytes as one that was not.
Frames that another study left in a shared cache may differ from those computed here in the last bit of float16: the
encoder rounds a little differently in batches of other sizes, and differs in nothing else (see `encode_speech`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from palimpsest.data.examples import Example
from palimpsest.data.shards import DTYPE, Shards, claim, shard_name, write_shard
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError, hash_file, hash_value, read_json, require_disk, write_json
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.compute import Arithmetic, many_forwards
from palimpsest.models.speech_lm import encode_speech
from palimpsest.parallel import from_rank_0, gathered, is_main, my_share, world_size

if TYPE_CHECKING:
    from jaxtyping import Float, Float16
    from numpy import ndarray
    from torch import Tensor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from palimpsest.models.processor import SpeechLMProcessor

VERSION = 1  # part of the encoding: change it when the frames change for the same audio and encoder
SHARD_BYTES = 64 << 20  # about; memory while encoding, and the work that a kill can lose
OPEN_SHARDS = 64  # memory-mapped at a time; each takes a file descriptor
LOG_MEL = ("feature_size", "sampling_rate", "hop_length", "n_fft", "dither")  # what a feature extractor can set


class Features:
    """Encoder frames of a set of examples, by example id, as `compute_features` left them in `folder`.

    Raises UserError, naming the file, where a shard is missing or cut short.
    """

    in_loop: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / "index.json")
        self.dim: int = index["dim"]
        shards = folder / index["shards_folder"]  # an absolute path stays as it is
        self._shards = [shards / name for name, _ in index["shards"]]
        for path, (_, n_bytes) in zip(self._shards, index["shards"], strict=True):
            if not path.exists() or path.stat().st_size != n_bytes:
                raise UserError(
                    f"The shard {path} is missing or cut short; delete it and {folder.parent}, then run again."
                )
        self._spans: dict[str, tuple[int, int, int]] = {key: (n, at, count) for key, n, at, count in index["spans"]}
        self._maps: dict[int, np.memmap[Any, Any]] = {}

    def __contains__(self, example_id: str) -> bool:
        return example_id in self._spans

    def __getitem__(self, example_id: str) -> Float[Tensor, "time d_enc"]:
        """float32 frames of one example. Raises UserError for an id whose speech was never encoded."""
        return torch.from_numpy(self._stored(example_id).astype(np.float32))

    def batch(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_frames` (speech, time, d_enc), zero past `frame_counts` (speech,).

        float16, as they are stored: half the bytes to move, and the device converts them faster than this process.
        """
        counts = [self.count(example_id) for example_id in ids]
        frames = np.zeros((len(ids), max(counts), self.dim), DTYPE)
        for row, (example_id, count) in enumerate(zip(ids, counts, strict=True)):
            frames[row, :count] = self._stored(example_id)
        return {"encoder_frames": torch.from_numpy(frames), "frame_counts": torch.tensor(counts)}

    def _stored(self, example_id: str) -> Float16[ndarray, "time d_enc"]:
        """The frames where they are in the memory map."""
        shard, first, count = self._span(example_id)
        if shard not in self._maps:
            if len(self._maps) >= OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]
            self._maps[shard] = np.memmap(self._shards[shard], np.uint8, mode="r")
        data = self._maps[shard][first : first + count * self.dim * DTYPE.itemsize]
        return data.view(DTYPE).reshape(count, self.dim)

    def count(self, example_id: str) -> int:
        """Encoder frames of one example, without reading them."""
        return self._span(example_id)[2]

    def _span(self, example_id: str) -> tuple[int, int, int]:
        if example_id not in self._spans:
            raise UserError(
                f"There are no speech features for the example {example_id!r}; it has no audio in this study's data."
            )
        return self._spans[example_id]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a memory map would be pickled as the data themselves


def compute_features(
    encoder: WhisperEncoder,
    processor: SpeechLMProcessor,
    examples: Sequence[Example],
    folder: Path,
    *,
    cache: Path | None = None,
    batch_size: int = 8,
    compute: Arithmetic = "float32",
    progress: Callable[[int, int], None] | None = None,
    distributed: bool = False,
) -> None:
    """Encode the audio of every example without a fault, so that `Features(folder)` finds its frames.

    What is in the cache is not encoded again. Several processes may work on one cache at once: they share the work
    where they have the same utterances to do, and never spoil each other's. Equal audio files are encoded once.

    Args:
        folder: gets `index.json`.
        cache: where the shards are; None: `folder/cache`. A cache inside the folder above `folder` is found again
            after both have moved together, another one by its absolute path.
        batch_size: utterances encoded at once.
        compute: the arithmetic of the encoder; frames of one are never taken for those of another.
        progress: called as progress(utterances encoded, utterances in all), first with those that were there already.
        distributed: every rank calls, with a replica of the encoder; shards and batches, and so the files, are those of
            one process. As many whole shards as go round are dealt to the ranks, which write them; of the rest, no more
            than there are ranks, each encodes every n-th batch, and rank 0 writes.

    Raises:
        UserError: before any encoding when an example has no audio, the disk has no room, or a shard is damaged.
    """
    examples = [example for example in examples if example.fault is None]
    encoding = describe_encoding(encoder, processor, compute)
    shards = Shards((cache or folder / "cache") / hash_value(encoding)[:16])

    def look() -> _Work:
        found = _look(examples, processor, encoder.config.d_model, shards)
        shards.folder.mkdir(parents=True, exist_ok=True)
        write_json(shards.folder / "encoding.json", encoding)
        return found

    work = from_rank_0(look) if distributed else look()
    ranks, audio, total = world_size() if distributed else 1, work.audio, len(work.audio)
    done = total - sum(map(len, work.parts))
    report = progress or (lambda done, total: None)
    report(done, total)

    def encoded(batch: Sequence[str]) -> dict[str, Float16[ndarray, "time d_enc"]]:
        nonlocal done
        frames = _encode(encoder, processor, {key: audio[key] for key in batch}, compute)
        done += len(batch) * ranks
        report(min(done, total), total)
        return frames

    # The last shard is smaller than the others, so it is never one of a round.
    n_whole = len(work.parts) if ranks == 1 else max(0, len(work.parts) - 1) // ranks * ranks
    waiting: list[list[str]] = list(my_share(work.parts[:n_whole])) if distributed else work.parts
    for wait in (False, True):  # first what no other process is at, then what the others have not finished
        taken, waiting = waiting, []
        for part in taken:
            shards.refresh()
            todo = [key for key in part if key not in shards]
            if not todo:
                done += len(part) * ranks
                continue
            path = shards.folder / shard_name(todo)
            file = claim(path, wait)
            if file is None:
                waiting.append(part)
                continue
            with file:
                frames: dict[str, Float16[ndarray, "time d_enc"]] = {}
                for batch in _in_batches(todo, batch_size):
                    frames |= encoded(batch)
                write_shard(file, path, frames)
    if distributed:
        rest = work.parts[n_whole:]
        pieces = gathered(
            [encoded(batch) for batch in my_share(batch for part in rest for batch in _in_batches(part, batch_size))],
            by_all=False,
        )
        if not is_main():
            return
        together = {key: frames for share in pieces for batch in share for key, frames in batch.items()}
        for part in rest:
            path = shards.folder / shard_name(part)
            if (file := claim(path, wait=True)) is not None:
                with file:
                    write_shard(file, path, {key: together[key] for key in part})
    shards.refresh()
    report(total, total)
    _write_index(folder, examples, work.keys, shards, encoder.config.d_model)


class _Work(NamedTuple):
    keys: list[str]  # hash of the audio of each example
    audio: dict[str, Path]  # by that hash
    parts: list[list[str]]  # what is missing, by the shard that it belongs to


def _look(examples: Sequence[Example], processor: SpeechLMProcessor, dim: int, shards: Shards) -> _Work:
    """What is to be encoded. Raises UserError for an example without audio, a damaged shard and a disk without room."""
    audio: dict[str, Path] = {}
    keys: list[str] = []
    for example in examples:
        if example.audio is None:
            raise UserError(f"The example {example.id!r} has no audio to encode; speak the data first.")
        keys.append(hash_file(example.audio))
        audio.setdefault(keys[-1], example.audio)
    import soundfile

    headers = {key: soundfile.info(str(path)) for key, path in audio.items()}
    n_frames = {
        key: processor.n_frames(-(-header.frames * SAMPLE_RATE // header.samplerate))  # samples at 16 kHz
        for key, header in headers.items()
    }
    n_bytes = {key: n * dim * DTYPE.itemsize for key, n in n_frames.items()}
    # Similar lengths together waste no padding; by hash among equals, so that the order of the examples plays no part.
    order = sorted(audio, key=lambda key: (n_frames[key], key))
    shards.refresh()
    shards.verify(order)
    missing = audio.keys() - shards.keys()
    room = sum(n_bytes[key] for key in missing)
    require_disk(shards.folder, room, f"Caching the speech features of {len(missing)} utterances")
    parts = ([key for key in part if key in missing] for part in _plan(order, n_bytes))
    return _Work(keys, audio, [part for part in parts if part])


def _in_batches(part: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (part[start : start + size] for start in range(0, len(part), size))


def describe_encoding(
    encoder: WhisperEncoder, processor: SpeechLMProcessor, compute: Arithmetic = "float32"
) -> dict[str, Any]:
    """All that determines the frames of an utterance beside its audio, as JSON."""
    weights = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        weights.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    described = {
        "version": VERSION,
        "weights": weights.hexdigest(),
        "heads": encoder.config.encoder_attention_heads,
        "activation": encoder.config.activation_function,
        "log_mel": {name: getattr(processor.feature_extractor, name, None) for name in LOG_MEL},
        "speech_length": processor.speech_length,
        "dtype": DTYPE.name,
    }
    if processor.speech_length == "trim":
        described["stack_factor"] = processor.rounded_to  # the length is rounded up to it
    if compute != "float32":  # so that what was made before there was a choice keeps its address
        described["compute"] = compute
    return described


def _plan(order: Sequence[str], n_bytes: Mapping[str, int]) -> list[list[str]]:
    """The utterances of each shard, by the whole list alone: not by what is in the cache, nor by who asks."""
    parts: list[list[str]] = []
    size = 0
    for key in order:
        if not parts or size + n_bytes[key] > SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(key)
        size += n_bytes[key]
    return parts


def _encode(
    encoder: WhisperEncoder, processor: SpeechLMProcessor, audio: Mapping[str, Path], compute: Arithmetic
) -> dict[str, Float16[ndarray, "time d_enc"]]:
    mels, counts = processor.features([read_audio(path) for path in audio.values()])
    mels = mels.to(encoder.conv1.weight.device)
    with many_forwards(encoder, compute):
        encoded = encode_speech(encoder, mels, counts, processor.speech_length)
    frames = {}
    for row, (key, path) in enumerate(audio.items()):
        frames[key] = encoded[row, : int(counts[row])].to(torch.float16).cpu().numpy()
        if not np.isfinite(frames[key]).all():
            raise UserError(f"The encoder gives no finite float16 frames for {path}; check the audio and the encoder.")
    return frames


def _write_index(folder: Path, examples: Sequence[Example], keys: Sequence[str], shards: Shards, dim: int) -> None:
    used = {shards[key].path.name: shards[key] for key in keys}
    numbers = {name: number for number, name in enumerate(used)}
    spans = [
        [example.id, numbers[shards[key].path.name], *shards[key].spans[key]]
        for example, key in zip(examples, keys, strict=True)
    ]
    inside = shards.folder.is_relative_to(folder.parent)
    write_json(
        folder / "index.json",
        {
            "dim": dim,
            "dtype": DTYPE.name,
            "shards_folder": os.path.relpath(shards.folder, folder) if inside else str(shards.folder.absolute()),
            "shards": [[name, shard.n_bytes] for name, shard in used.items()],
            "spans": spans,  # id, number of the shard, first byte in it, frames
        },
    )
