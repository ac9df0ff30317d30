"""Speech that is encoded in the training loop, with nothing on disk: when that is better than the cache, and how.

A batch then carries log-mel features of its recordings. On the device, just before the model's forward, the frozen
encoder makes frames of them (`encode_batch`), rounded to float16 as the cache stores them. Given the same batches, both
paths are the same numbers; in batches of another make-up the encoder rounds a little differently.

>>> choose_frames("auto", frame_bytes=2_000 * 10**9, free=500 * 10**9, reads=9).path
'loop'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import TypedDict

from palimpsest.data.examples import Example
from palimpsest.data.speech import read_audio
from palimpsest.files import UserError
from palimpsest.models import SAMPLE_RATE
from palimpsest.models.compute import Arithmetic, computing

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from palimpsest.models.processor import SpeechLMProcessor
    from palimpsest.models.speech_lm import SpeechLength

FramesPath = Literal["cache", "loop"]
FramesWanted = Literal["cache", "loop", "auto"]
SHARE = 0.5  # of the free disk that "auto" gives to frames: checkpoints, and whoever else works there, need the rest
FRAME_BYTES = 2  # of a number, float16


@dataclass(frozen=True)
class FramesChoice:
    """Where training takes the encoder frames of its recordings from, and why; as JSON it stands in the provenance."""

    path: FramesPath
    reason: str

    def __str__(self) -> str:
        where = "read from the cache" if self.path == "cache" else "computed in the training loop"
        return f"{where} ({self.reason})"


class FramesChoiceRecord(TypedDict):
    path: FramesPath
    reason: str


class FramesRecord(TypedDict):
    """The file that keeps what "auto" came to, and of what."""

    asked: dict[str, float]
    free: int
    choice: FramesChoiceRecord


def choose_frames(wanted: FramesWanted, *, frame_bytes: int, free: int, reads: float) -> FramesChoice:
    """What `speech.features` comes to.

    Args:
        frame_bytes: of all training recordings.
        free: bytes of the disk that the cache would be on.
        reads: how often training reads each recording: epochs of all methods and training runs.
    """
    if wanted != "auto":
        return FramesChoice(wanted, "asked for")
    size, room = f"{frame_bytes / 1e9:.1f} GB of frames", f"the {free / 1e9:.1f} GB that are free"
    if reads <= 1:
        return FramesChoice("loop", "training reads each recording once at most, so frames would not be used again")
    if frame_bytes > SHARE * free:
        return FramesChoice("loop", f"{size} are more than {SHARE:.0%} of {room}")
    return FramesChoice("cache", f"{size}, each read {reads:g} times, are at most {SHARE:.0%} of {room}")


def frame_bytes(examples: Sequence[Example], processor: SpeechLMProcessor, width: int) -> int:
    """Bytes that the cache of these examples takes, `width` numbers a frame; a file that several share counts once."""
    recordings = Recordings(processor, examples)
    once = {example.audio: example.id for example in examples if example.audio is not None and example.fault is None}
    return sum(map(recordings.count, once.values())) * width * FRAME_BYTES


class Recordings:
    """The speech of examples as log-mel features, read when a batch is made; the model encodes them.

    Raises UserError for an example without audio and for a recording that cannot be read.
    """

    in_loop: ClassVar[bool] = True

    def __init__(self, processor: SpeechLMProcessor, examples: Sequence[Example]) -> None:
        self.processor = processor
        self._audio = {example.id: example.audio for example in examples}
        self._counts: dict[str, int] = {}

    def count(self, example_id: str) -> int:
        """Encoder frames of one example, from the header of its file, which padded to 30 s needs no look at.

        Resampling may give a sample less than the header promises; a batch's own counts are exact.
        """
        if self.processor.speech_length == "pad_to_30s":
            return self.processor.n_frames(0)
        if example_id not in self._counts:
            import soundfile

            header = soundfile.info(str(self._path(example_id)))
            n_samples = -(-header.frames * SAMPLE_RATE // header.samplerate)
            self._counts[example_id] = self.processor.n_frames(n_samples)
        return self._counts[example_id]

    def batch(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """`input_features` (speech, mels, mel_time) and `frame_counts` (speech,)."""
        mels, counts = self.processor.features([read_audio(self._path(example_id)) for example_id in ids])
        return {"input_features": mels, "frame_counts": counts}

    def _path(self, example_id: str) -> Path:
        path = self._audio.get(example_id)
        if path is None:
            raise UserError(f"There is no recording of the example {example_id!r}; it has no audio in this data.")
        return path


def encode_batch(
    batch: Mapping[str, Any], encoder: WhisperEncoder, speech_length: SpeechLength, compute: Arithmetic
) -> dict[str, Any]:
    """The batch with float16 `encoder_frames` in the place of `input_features`; one without these as it is."""
    import torch

    from palimpsest.models.speech_lm import encode_speech

    batch = dict(batch)
    mels = batch.pop("input_features", None)
    if mels is not None:
        with computing(compute, encoder.device):
            frames = encode_speech(encoder, mels.to(encoder.device), batch["frame_counts"], speech_length)
        batch["encoder_frames"] = frames.to(torch.float16)
    return batch


class Encoded:
    """Encoder frames of recordings by example id, computed each time: for what takes few of them, or all in turn."""

    def __init__(self, recordings: Recordings, encoder: WhisperEncoder, compute: Arithmetic) -> None:
        self.recordings, self.encoder, self.compute = recordings, encoder, compute

    def __getitem__(self, example_id: str) -> Float[Tensor, "time d_enc"]:
        """float32 frames of one example, on the encoder's device."""
        length = self.recordings.processor.speech_length
        batch = encode_batch(self.recordings.batch([example_id]), self.encoder, length, self.compute)
        frames: Tensor = batch["encoder_frames"]
        return frames[0, : int(batch["frame_counts"][0])].float()

    def count(self, example_id: str) -> int:
        return self.recordings.count(example_id)
