"""False-positive floors: how often a scoring rule calls an answer right that cannot be one.

    unrelated         each response scored against the golds of another question
    echo              the question itself scored as the answer
    echo_in_sentence  the same behind "You asked: ", so that leaving out a leading copy does not help

An accuracy near its floor says nothing. The unrelated floor depends on the responses (long ones hit more
often) and so belongs to one model, task and modality; the other two belong to the task alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from palimpsest.evaluation.scoring import METRIC_VERSION, METRICS, number_words, score
from palimpsest.files import UserError
from palimpsest.intervals import wilson_share
from palimpsest.records import FloorRecord

if TYPE_CHECKING:
    from palimpsest.evaluation.answers import SampleRow
    from palimpsest.evaluation.tasks import Task

DRAWS = 10
OPENING = "You asked: "


def unrelated_floor(
    responses: Sequence[str], answers: Sequence[Sequence[str]], seed: int = 0, draws: int = DRAWS
) -> dict[str, float]:
    """How often each metric calls an answer to another question right, mean over `draws` derangements.

    In a draw every response is scored against the golds of one other question and every question is used once:
    the questions are put into a random circle and each is given its neighbour's response. Pairs of questions that
    share a gold answer are left out. The responses keep their real length, on which the floor depends.

    Raises:
        UserError: fewer than two questions, not one response per question, or one gold shared by all.
    """
    n = len(responses)
    if n < 2 or n != len(answers):
        raise UserError(
            f"A false-positive floor needs two or more questions with a response each but got {n} responses "
            f"for {len(answers)} questions; pass one response per question."
        )
    scored = _unrelated_verdicts(tuple(responses), tuple(map(tuple, answers)), seed, draws)
    if not scored:
        raise UserError("A false-positive floor needs questions with different gold answers; all share one.")
    return {name: sum(verdict[name] for _, verdict in scored) / len(scored) for name in METRICS}


def unrelated_by_question(
    responses: Sequence[str], answers: Sequence[Sequence[str]], metric: str, seed: int = 0, draws: int = DRAWS
) -> dict[int, float]:
    """How often each response is right for other questions, by its place; the draws of `unrelated_floor`.

    A response that no draw paired with a question of another gold is left out.
    """
    verdicts: dict[int, list[bool]] = {}
    for i, verdict in _unrelated_verdicts(tuple(responses), tuple(map(tuple, answers)), seed, draws):
        verdicts.setdefault(i, []).append(verdict[metric])
    return {i: sum(of) / len(of) for i, of in sorted(verdicts.items())}


@lru_cache(maxsize=1)  # a study asks for both of the above, one after the other
def _unrelated_verdicts(
    responses: tuple[str, ...], answers: tuple[tuple[str, ...], ...], seed: int, draws: int
) -> list[tuple[int, dict[str, bool]]]:
    """(place of the response, its verdicts against the golds of another question) of all draws."""
    return [(i, score(responses[i], answers[j])) for i, j in _unrelated_pairs(answers, seed, draws)]


def _unrelated_pairs(answers: Sequence[Sequence[str]], seed: int, draws: int) -> list[tuple[int, int]]:
    """(question of the response, question of the golds) of all draws, without pairs that share a gold."""
    golds = [{number_words(gold) for gold in question} for question in answers]
    random = np.random.default_rng(seed)
    circles = [_circle(random.permutation(len(answers)).tolist()) for _ in range(draws)]
    return [(i, j) for circle in circles for i, j in circle if not golds[i] & golds[j]]


def _circle(order: list[int]) -> list[tuple[int, int]]:
    """Each element with the one after it: of a random order, a random derangement of one cycle."""
    return list(zip(order, [*order[1:], order[0]], strict=True))


def echo_floor(questions: Sequence[str], answers: Sequence[Sequence[str]], opening: str = "") -> dict[str, float]:
    """How often each metric calls the question itself, behind `opening`, a right answer to it."""
    if not questions or len(questions) != len(answers):
        raise UserError("A floor of the echoed question needs at least one question, each with its gold answers.")
    verdicts = [score(opening + q, golds, q) for q, golds in zip(questions, answers, strict=True)]
    return {name: sum(verdict[name] for verdict in verdicts) / len(verdicts) for name in METRICS}


def floor_records(
    rows: Sequence[SampleRow], method: str, task: Task, modality: str, seed: int = 0
) -> list[FloorRecord]:
    """Every floor of every metric for one method's answers to a whole task.

    The interval is Wilson's for n questions. For the unrelated floor, a mean over several draws, it is wider than
    needed: it counts each response once, as if the further draws had added nothing. A task of one question, or
    one whose questions share a gold, has no unrelated floor.
    """
    questions, answers = [row["question"] for row in rows], [row["answers"] for row in rows]
    floors: dict[str, tuple[int, dict[str, float]]] = {}
    if _unrelated_pairs(answers, seed, DRAWS):
        floors["unrelated"] = DRAWS, unrelated_floor([row["response"] for row in rows], answers, seed)
    floors["echo"] = 1, echo_floor(questions, answers)
    floors["echo_in_sentence"] = 1, echo_floor(questions, answers, OPENING)
    records: list[FloorRecord] = []
    for floor, (draws, values) in floors.items():
        for metric, value in values.items():
            low, high = wilson_share(value, len(rows))
            records.append(
                {
                    "method": method,
                    "task": task.name,
                    "modality": modality,
                    "metric": metric,
                    "metric_version": METRIC_VERSION,
                    "floor": floor,
                    "n": len(rows),
                    "draws": draws,
                    "value": value,
                    "ci_low": low,
                    "ci_high": high,
                }
            )
    return records
