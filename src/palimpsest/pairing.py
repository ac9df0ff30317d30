"""Two or more studies, method by method on the same questions: what the comparison report shows of `compare`.

`compare` refuses runs that do not match. A report says what does not match and compares the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from palimpsest.compare import accuracy_records, aligned, loss_records, not_compared
from palimpsest.evaluation.runs import Key, System, read_systems, require_same
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.rundir import UserError


def pair_runs(runs: Sequence[Path], metric: str = PRIMARY, seed: int = 0) -> dict[str, Any]:
    """Every two of `runs` compared in the methods both have: `metric`, `accuracy`, `perplexity`, `not_compared`.

    `accuracy` and `perplexity` are PairRecords and LossPairRecords, Holm-corrected over each table; `not_compared`
    has a sentence for whatever only one run has, or what the runs asked or scored differently.

    Args:
        metric: a rule of evaluation.scoring.
        seed: of the bootstrap.

    Raises:
        UserError: an unknown metric, or the same run twice.
    """
    readable, sentences = [], []
    for run in runs:
        try:
            read_systems([run], metric)
            readable.append(run)
        except UserError as error:
            sentences.append(str(error))
    systems = read_systems(readable, metric) if len(readable) > 1 else []
    pairs = [(a, b) for a, b in combinations(systems, 2) if a.run != b.run and a.method == b.method]
    sentences += _alone(systems, pairs) + not_compared(pairs)
    same = [(a, _same_questions(a, b, sentences)) for a, b in pairs]
    losses = [(a, _same_losses(a, b, sentences)) for a, b in pairs]
    return {
        "metric": metric,
        "accuracy": accuracy_records(same, metric, seed),
        "perplexity": loss_records(losses),
        "not_compared": list(dict.fromkeys(sentences)),
    }


def _alone(systems: Sequence[System], pairs: Sequence[tuple[System, System]]) -> list[str]:
    paired = {system.label for pair in pairs for system in pair}
    return [f"Only one run has {system.label}." for system in systems if system.label not in paired]


def _same_questions(a: System, b: System, sentences: list[str]) -> System:
    """`b` with those answers that can be compared with `a`'s; the others go to `sentences`."""
    answers = dict(b.answers)
    for key in sorted(a.answers.keys() & b.answers.keys()):
        try:
            require_same(a.answers[key], b.answers[key], key)
        except UserError as error:
            sentences.append(_versions(a, b, key) or str(error))
            del answers[key]
    return replace(b, answers=answers)


def _versions(a: System, b: System, key: Key) -> str:
    """In what versions the two answers differ; alike for all methods of two runs, so that it is said once."""
    one, other = a.answers[key], b.answers[key]
    pairs = {
        "task version": (one.version, other.version),
        "scoring rule's version": (one.metric_version, other.metric_version),
        "longest answer": (f"{one.max_new_tokens} tokens", f"{other.max_new_tokens} tokens"),
    }
    differing = [f"{what} {x} in {_run(a)}, {y} in {_run(b)}" for what, (x, y) in pairs.items() if x != y]
    return f"{key[0]} from {key[1]} is not compared: {'; '.join(differing)}." if differing else ""


def _run(system: System) -> str:
    return system.label.removesuffix(f"/{system.method}")


def _same_losses(a: System, b: System, sentences: list[str]) -> System:
    losses = dict(b.losses)
    for key in sorted(a.losses.keys() & b.losses.keys()):
        try:
            aligned(a.losses[key], b.losses[key])
        except UserError as error:
            sentences.append(str(error))
            del losses[key]
    return replace(b, losses=losses)
