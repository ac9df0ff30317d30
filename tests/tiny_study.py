"""What studies of tiny models start from: the models of tiny.py, and manifests of questions with noise for speech."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from tiny import save_tiny_models


def longer_and_longer(i: int) -> int:
    return 6_400 + 800 * i


def write_inputs(
    folder: Path,
    splits: Mapping[str, Sequence[tuple[str, str]]],
    n_samples: Callable[[int], int] = longer_and_longer,
) -> Path:
    """`folder`/llm, `folder`/whisper, and of each split (question, answer) SPLIT.jsonl, with a recording of each row.

    n_samples: of the i-th recording of a split, at 16 kHz.
    """
    save_tiny_models(folder)
    rng = np.random.default_rng(0)
    for split, pairs in splits.items():
        rows = []
        for i, (question, answer) in enumerate(pairs):
            name = f"{split}{i}.wav"
            soundfile.write(folder / name, rng.normal(0, 0.1, n_samples(i)), 16_000)
            rows.append({"id": f"{split}{i}", "question": question, "answer": answer, "audio": name})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def numbered(n_train: int, n_heldout: int, question: str, answer: str) -> dict[str, list[tuple[str, str]]]:
    """Splits train and heldout of such questions and answers, in which {split} and {i} stand for themselves."""
    return {
        split: [(question.format(split=split, i=i), answer.format(i=i)) for i in range(n)]
        for split, n in (("train", n_train), ("heldout", n_heldout))
    }
