"""Recordings and parquet files for tests, made on the spot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # how the hub's Audio feature is stored


def tone(seconds: float = 0.5, rate: int = 16_000, peak: float = 0.5, pitch: float = 440.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return peak * np.sin(2 * np.pi * pitch * time)


def encoded(samples: np.ndarray, rate: int = 16_000, file_format: str = "WAV", **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, **options)
    return buffer.getvalue()


def wav(seconds: float = 0.5, pitch: float = 440.0) -> bytes:
    return encoded(tone(seconds, pitch=pitch))


BROKEN = {
    "broken audio": b"RIFF this is no audio",
    "silent audio": encoded(np.zeros(8_000)),
    "long audio": encoded(tone(30.5)),
    "wrong duration": encoded(tone(1.0))[:16_000],  # half of it: the header announces 1 s
}


def write_parquet(path: Path, columns: dict[str, Sequence[Any]], audio: str | None = None, **options: Any) -> Path:
    """`audio` names the column that holds bytes (or None, or a path as str)."""
    arrays: dict[str, Any] = {name: pa.array(values) for name, values in columns.items() if name != audio}
    if audio is not None:
        cells = [
            None if cell is None else {"bytes": None, "path": cell} if isinstance(cell, str) else
            {"bytes": cell, "path": "x.wav"} for cell in columns[audio]
        ]  # fmt: skip
        arrays[audio] = pa.array(cells, AUDIO)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), path, **options)
    return path


def voice_assistant(path: Path, rows: Sequence[tuple[str, str, str, bytes | None]], **options: Any) -> Path:
    """Rows of (round, question, answer, audio) in the columns of gpt-omni/VoiceAssistant-400K."""
    columns = {
        "split_name": ["qa"] * len(rows),
        "index": [str(i) for i in range(len(rows))],
        "round": [row[0] for row in rows],
        "question": [row[1] for row in rows],
        "question_audio": [row[3] for row in rows],
        "answer": [row[2] for row in rows],
        "answer_snac": ["0 1 2"] * len(rows),
    }
    return write_parquet(path, columns, "question_audio", **options)
