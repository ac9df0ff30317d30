"""Answers side by side: the first questions of each task with what every method wrote."""

from __future__ import annotations

from dataclasses import dataclass

from palimpsest.report.inputs import MODALITY_NAMES, Inputs, Sample, main_metric, method_key, method_name, modality_key

MAX_QUESTIONS = 20  # of a task, whose answers are shown
MAX_CHARACTERS = 600  # of one answer


@dataclass(frozen=True)
class Answer:
    """One cell of the samples: what a model wrote, and whether it counted as right."""

    response: str
    verdict: str  # right | wrong | failed | unscored
    cut: int  # characters not shown


@dataclass(frozen=True)
class Question:
    """A question with the answers of every method (rows) by input (columns); None where there is none."""

    id: str
    text: str
    gold: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Answer | None, ...]], ...]


def samples_of(inputs: Inputs) -> dict[str, list[Question]]:
    """The first questions of each task with the answers of every method, side by side."""
    metric = main_metric(inputs.results)
    asked = dict.fromkeys(row["task"] for row in inputs.results["qa"])
    answered = sorted({task for _, task, _ in inputs.samples})
    tasks = [task for task in asked if task in answered] + [task for task in answered if task not in asked]
    shown: dict[str, list[Question]] = {}
    for task in tasks:
        files = {(method, modality): rows for (method, of, modality), rows in inputs.samples.items() if of == task}
        methods = sorted({method for method, _ in files}, key=method_key)
        modalities = sorted({modality for _, modality in files}, key=modality_key)
        columns = tuple(MODALITY_NAMES.get(modality, modality) for modality in modalities)
        answers = {(*key, row["id"]): _answer(row, metric) for key, rows in files.items() for row in rows}
        first: dict[str, Sample] = {}
        for rows in files.values():
            for row in rows:
                first.setdefault(row["id"], row)
        shown[task] = []
        for identifier, sample in list(first.items())[:MAX_QUESTIONS]:
            lines = (
                (method_name(method), tuple(answers.get((method, modality, identifier)) for modality in modalities))
                for method in methods
            )
            gold = " · ".join(sample["answers"])
            shown[task].append(Question(identifier, sample["question"], gold, columns, tuple(lines)))
    return shown


def _answer(sample: Sample, metric: str) -> Answer:
    if sample["failed"]:
        verdict = "failed"
    elif metric not in sample["verdicts"]:
        verdict = "unscored"
    else:
        verdict = "right" if sample["verdicts"][metric] else "wrong"
    response = sample["response"]
    return Answer(response[:MAX_CHARACTERS], verdict, max(0, len(response) - MAX_CHARACTERS))
