"""Is speech understood? S2T against what it must beat, on the same questions: the table `speech_tests` of results.json.

    unrelated   the same answers scored against the golds of other questions (evaluation/floors.py): chance
    text        the same model's answers to the same questions typed
    cascade     the base's answers to what a recogniser understood

An accuracy says little by itself: on a hard task 8 % can be all that a model knows, and on an easy one chance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from palimpsest.comparison.families import corrected, of_points
from palimpsest.comparison.systems import Matrix, matrix
from palimpsest.comparison.training_runs import Verdicts, runs_of
from palimpsest.evaluation.scoring import METRIC_VERSION, PRIMARY
from palimpsest.intervals import Compared, Effect, clustered_difference, compare_accuracies
from palimpsest.records import BASE, SpeechTestRecord

UNRELATED, TEXT, CASCADE = "unrelated", "text", "cascade"


def speech_tests(
    methods: Sequence[str],
    n_seeds: int,
    verdicts: Mapping[tuple[str, str], Verdicts],
    unrelated: Mapping[str, Mapping[str, Mapping[str, float]]],
    seed: int,
    points: Collection[str] = (),
) -> list[SpeechTestRecord]:
    """One row per method that answers speech (the base too), task and reference; each reference is a family.

    verdicts: by (task, modality). unrelated: task -> run -> {question id: how often its spoken answer is right for
    other questions}; the questions that some run lacks there are left out of that row. points: of curves, families of
    their own.
    """
    rows: list[SpeechTestRecord] = []
    for task in dict.fromkeys(task for task, _ in verdicts):
        spoken, typed = verdicts.get((task, "speech"), {}), verdicts.get((task, "text"), {})
        cascade = verdicts.get((task, "cascade"), {})
        for method in (BASE, *methods):
            runs = runs_of(method, n_seeds)
            if any(run not in spoken for run in runs):
                continue
            right = matrix([spoken[run] for run in runs])
            floors = unrelated.get(task, {})
            if all(run in floors for run in runs):
                ids = sorted(set.intersection(*(set(floors[run]) for run in runs)))
                if len(ids) > 1:
                    asked = np.array([[spoken[run][i] for i in ids] for run in runs], dtype=np.float64)
                    chance = np.array([[floors[run][i] for i in ids] for run in runs], dtype=np.float64)
                    found = clustered_difference(np.zeros(len(ids)), asked - chance)
                    rows.append(_row(method, task, UNRELATED, asked, chance, found))
            if right.shape[1] < 2:
                continue  # one question says nothing about others
            if all(run in typed for run in runs):
                as_text = matrix([typed[run] for run in runs])
                found_text: Compared | Effect
                if len(runs) == 1:
                    found_text = compare_accuracies(as_text, right, seed)
                else:  # the same training runs on both sides: one difference per run
                    found_text = clustered_difference(np.zeros_like(right[0]), right - as_text)
                rows.append(_row(method, task, TEXT, right, as_text, found_text))
            if BASE in cascade:
                understood = matrix([cascade[BASE]])
                rows.append(_row(method, task, CASCADE, right, understood, compare_accuracies(understood, right, seed)))
    for row in rows:
        row["family"] = of_points(row["family"], row["method"] in points)
    order = (UNRELATED, TEXT, CASCADE)
    return sorted(corrected(rows), key=lambda row: order.index(row["reference"]))


def _row(
    method: str, task: str, reference: str, right: Matrix, against: Matrix, found: Compared | Effect
) -> SpeechTestRecord:
    return {
        "method": method,
        "task": task,
        "metric": PRIMARY,
        "metric_version": METRIC_VERSION,
        "reference": reference,
        "n": right.shape[1],
        "n_seeds": len(right),
        "accuracy": float(right.mean()),
        "reference_accuracy": float(against.mean()),
        "difference": float(right.mean() - against.mean()),
        "ci_low": found.low,
        "ci_high": found.high,
        "p_value": found.p_value,
        "p_holm": found.p_value,
        "family": f"speech, against {reference}",
        "n_family": 1,
        "left_out": None,
    }
