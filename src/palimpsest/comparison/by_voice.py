"""Is a voice that was not trained on understood as well? The table `voices` of results.json.

Of every task whose questions are spoken in several voices: the accuracy of each method by the voice of the question,
beside its accuracy on the same questions as text, which says how hard they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product

import numpy as np

from palimpsest.comparison.training_runs import Verdicts, runs_of
from palimpsest.data.examples import Example
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.intervals import accuracy_interval
from palimpsest.records import BASE, VoiceRecord

RECORDING = "recording"  # the voice of questions that came with their audio and no name of a voice


def voice_records(
    task: str,
    examples: Sequence[Example],
    methods: Sequence[str],
    n_seeds: int,
    verdicts: Mapping[str, Verdicts],
    trained_on: Collection[str],
) -> list[VoiceRecord]:
    """One row per method, spoken modality and voice; none where the task has one voice.

    verdicts: by modality. trained_on: voices of the study's training questions. A method's accuracy is the mean over
    its training runs; with several the interval is clustered by question and by seed, else it is Wilson's.
    """
    by_voice: dict[str, list[str]] = {}
    for example in examples:
        by_voice.setdefault(example.voice or RECORDING, []).append(example.id)
    if len(by_voice) < 2:
        return []
    records: list[VoiceRecord] = []
    for modality, method in product(("speech", "cascade"), (BASE, *methods)):
        runs = runs_of(method, n_seeds)
        answered = verdicts.get(modality, {})
        if any(run not in answered for run in runs):
            continue
        for voice, ids in by_voice.items():
            right, right_as_text = (
                np.array([[of[run][i] for i in ids] for run in runs], dtype=np.float64)
                for of in (answered, verdicts["text"])
            )
            low, high = accuracy_interval(right)
            records.append(
                {
                    "method": method,
                    "task": task,
                    "modality": modality,
                    "voice": voice,
                    "trained_on": voice in trained_on,
                    "n": len(ids),
                    "n_seeds": len(runs),
                    "metric": PRIMARY,
                    "accuracy": float(right.mean()),
                    "ci_low": low,
                    "ci_high": high,
                    "accuracy_text": float(right_as_text.mean()),
                }
            )
    return records
