"""Which of two models is better, on the same questions: the tables of `palimpsest compare` and of comparison reports.

Systems come from systems.py, paired by task, version, modality and question id. One training run a side is compared by
McNemar's test and the paired bootstrap, several by the clustered difference (intervals.py); docs/evaluation.md explains
both. `compare_runs` refuses runs that do not match; `pair_runs`, for a report, names them and compares the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from palimpsest.comparison.families import ALIKE, corrected, family_of_pair, pairs_of
from palimpsest.comparison.systems import (
    Answers,
    Key,
    Losses,
    Matrix,
    System,
    matrix,
    pool_seeds,
    read_systems,
    require_methods,
    require_same,
)
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.evaluation.tasks import text_version
from palimpsest.files import UserError
from palimpsest.intervals import (
    Compared,
    Effect,
    accuracy_interval,
    clustered_difference,
    compare_accuracies,
    loss_difference,
    retention,
)
from palimpsest.records import (
    BASE,
    MODALITIES,
    Comparison,
    ComparisonRecord,
    GapRecord,
    LossPairRecord,
    Paired,
    PairRecord,
    RetentionRecord,
)

T = TypeVar("T")


def compare_runs(
    runs: Sequence[Path],
    *,
    metric: str,
    methods: Sequence[str] | None = None,
    base: str | None = None,
    seeds: bool = False,
    seed: int = 0,
) -> Comparison:
    """The value of compare.json for the systems in `runs`.

    One run: every pair of its methods. Several: every pair of systems of different runs that are the same method, or
    of which one is an evaluation folder; with `methods`, every pair of what is named. With `seeds`, the runs are the
    same study with several seeds, and every pair of methods is compared over them. One evaluation folder has no pair,
    but with two modalities a modality gap.

    Args:
        metric: a rule of evaluation.scoring, or "llm_judge".
        base: label of the system that retention refers to; None: the method `base` of each system's own run.
        seed: of the bootstrap.

    Raises:
        UserError: nothing to pair, unfinished or damaged samples, samples of different versions.
    """
    systems = read_systems(runs, metric, None if seeds else methods)
    with_losses = any(system.losses for system in systems)
    if seeds:
        pooled = pool_seeds(systems)  # by the methods' own names, not those of their runs
        require_methods(pooled, methods)
        systems = [system for system in pooled if methods is None or system.method in methods]
    every = seeds or methods is not None or len(runs) == 1
    pairs = [
        (a, b)
        for a, b in combinations(systems, 2)
        if every or (a.run != b.run and (a.method == b.method or None in (a.method, b.method)))
    ]
    tables: Comparison = {
        "schema": 1,
        "metric": metric,
        "seed": seed,
        "systems": [{"label": s.label, "run": str(s.run), "method": s.method} for s in systems],
        "accuracy": accuracy_records(pairs, metric, seed),
        "retention": retention_records(systems, metric, base),
        "modality_gap": gap_records(systems, metric, seed),
        "perplexity": loss_records(pairs),
        "not_compared": not_compared(pairs),
        "notes": [*model_notes(systems), *arithmetic_notes(pairs), *recording_notes(pairs)],
    }
    if not pairs and not tables["modality_gap"]:
        raise UserError(
            f"There are no two systems to compare in {', '.join(map(str, runs))}; give another run, or --methods."
        )
    if pairs and not tables["accuracy"] and not tables["perplexity"]:
        raise UserError("The systems have no task and modality in common; evaluate them on the same task first.")
    if seeds and with_losses:
        tables["not_compared"].append("Losses of several seeds; leave out --seeds to compare those of single runs.")
    return tables


def arithmetic_notes(pairs: Sequence[tuple[System, System]]) -> list[str]:
    """A sentence for each pair that was computed in two arithmetics, whose rounding is part of a difference."""
    return [
        f"{a.label} was computed in {' and '.join(sorted(a.arithmetic))}, {b.label} in "
        f"{' and '.join(sorted(b.arithmetic))}: differences hold that of the rounding too."
        for a, b in pairs
        if a.arithmetic != b.arithmetic
    ]


def model_notes(systems: Sequence[System]) -> list[str]:
    """A sentence for each evaluation folder that is not of one model."""
    return [
        f"{' and '.join(map(str, s.of_models[:2]))} are of two models, by their files: whatever is said of {s.label} "
        "in more than one modality, or of answers and losses together, holds the difference of the two."
        for s in systems
        if len(s.of_models) > 1
    ]


def recording_notes(pairs: Sequence[tuple[System, System]]) -> list[str]:
    """A sentence for each pair and task that heard other recordings under the same names, down to the file's bytes."""
    sentences = []
    for a, b in pairs:
        for key in sorted(a.answers.keys() & b.answers.keys()):
            one, other = a.answers[key].recordings, b.answers[key].recordings
            both = one.keys() & other.keys()
            if n := sum(one[id] != other[id] for id in both):
                sentences.append(
                    f"{key[0]} from {key[1]}: of {len(both)} recordings {n} are other files for {a.label} than for "
                    f"{b.label}: a difference holds that of what was heard too."
                )
    return sentences


def not_compared(pairs: Sequence[tuple[System, System]]) -> list[str]:
    """What only one of a pair has, a sentence each; speech of a base is not missed: it may have no adaptor."""
    sentences = []
    for a, b in pairs:
        for one, other in ((a, b), (b, a)):
            for task, modality in sorted(one.answers.keys() - other.answers.keys()):
                if modality == "text" or BASE not in (one.method, other.method):
                    sentences.append(f"{task} from {modality}: {one.label} has answers, {other.label} has none.")
    return list(dict.fromkeys(sentences))


# ------------------------------------------------------------------------------------------------------------
# Accuracy
# ------------------------------------------------------------------------------------------------------------
def accuracy_records(pairs: Sequence[tuple[System, System]], metric: str, seed: int) -> list[PairRecord]:
    """One row per pair, task and modality; Holm over the tests of a family."""
    rows: list[PairRecord] = []
    for a, b in pairs:
        for key in sorted(a.answers.keys() & b.answers.keys(), key=order):
            first, second = a.answers[key], b.answers[key]
            require_same(first, second, key)
            sides = (a.label, matrix(first.verdicts)), (b.label, matrix(second.verdicts))
            family = family_of_pair(a.method, b.method, key[1])
            rows.append(pair_record(*sides, key, metric, first.metric_version, seed, family))
    return corrected(rows, _same(pairs))


def _same(pairs: Sequence[tuple[System, System]]) -> dict[str, str]:
    """Label -> that of its run's base, of the systems whose language model is the base's."""
    systems = {system.label: system for pair in pairs for system in pair}.values()
    bases = {system.run: system.label for system in systems if system.method == BASE}
    return {s.label: bases[s.run] for s in systems if s.text_of_base and s.run in bases}


def order(key: Key) -> tuple[str, int]:
    task, modality = key
    return task, MODALITIES.index(modality) if modality in MODALITIES else len(MODALITIES)


def pair_record(
    a: tuple[str, Matrix], b: tuple[str, Matrix], key: Key, metric: str, metric_version: str, seed: int, family: str
) -> PairRecord:
    """a, b: label and verdicts (training runs, questions). `corrected` gives `p_holm`, `verdict` and what follows."""
    (label_a, first), (label_b, second) = a, b
    found = compare_accuracies(first, second, seed)
    low_a, high_a = accuracy_interval(first)
    low_b, high_b = accuracy_interval(second)
    return {
        "task": key[0],
        "modality": key[1],
        "metric": metric,
        "metric_version": metric_version,
        "method_a": label_a,
        "method_b": label_b,
        "n": found.n,
        "seeds_a": len(first),
        "seeds_b": len(second),
        "accuracy_a": float(first.mean()),
        "ci_low_a": low_a,
        "ci_high_a": high_a,
        "accuracy_b": float(second.mean()),
        "ci_low_b": low_b,
        "ci_high_b": high_b,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "difference": found.difference,
        "ci_low": found.low,
        "ci_high": found.high,
        "test": found.test,
        "p_value": found.p_value,
        "p_holm": found.p_value,
        "detectable": found.detectable,
        "verdict": ALIKE,
        "family": family,
        "n_family": 1,
        "left_out": None,
    }


def compare(
    verdicts: Mapping[str, Mapping[str, bool]],
    *,
    task: str,
    modality: str,
    metric: str,
    seed: int,
    same: Mapping[str, str] | None = None,
    points: Collection[str] = (),
) -> list[ComparisonRecord]:
    """Every pair of methods with one training run each, paired by question.

    verdicts: method -> {question id: right?}. Pairs follow the order of the methods, the earlier one being
    `method_a`, so the base model belongs first. Holm is taken over the families of this call; use `corrected`
    on the rows of several calls that are read as one table. same: as `corrected` takes it. points: as `pairs_of` does.

    Raises:
        UserError: when two methods did not answer the same questions.
    """
    records: list[ComparisonRecord] = []
    for method_a, method_b in pairs_of(list(verdicts), points):
        a, b = verdicts[method_a], verdicts[method_b]
        if a.keys() != b.keys() or not a:
            only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
            raise UserError(
                f"{method_a!r} ({len(a)} questions) and {method_b!r} ({len(b)}) cannot be paired: {only_a} are only "
                f"in the first, {only_b} only in the second; evaluate both on the same task."
            )
        found = compare_accuracies(matrix([a]), matrix([b]), seed)
        assert found.only_a is not None
        assert found.only_b is not None
        records.append(
            {
                "task": task,
                "modality": modality,
                "metric": metric,
                "method_a": method_a,
                "method_b": method_b,
                "n": found.n,
                "only_a": found.only_a,
                "only_b": found.only_b,
                "difference": (found.only_b - found.only_a) / found.n,  # to the last bit, as it has always been
                "ci_low": found.low,
                "ci_high": found.high,
                "p_value": found.p_value,
                "p_holm": found.p_value,
                "family": family_of_pair(method_a, method_b, modality, points),
                "n_family": 1,
                "left_out": None,
            }
        )
    return corrected(records, same)


# ------------------------------------------------------------------------------------------------------------
# Retention and modality gap
# ------------------------------------------------------------------------------------------------------------
def retention_records(systems: Sequence[System], metric: str, base: str | None) -> list[RetentionRecord]:
    """Accuracy from text relative to the base's, for every system that has a base."""
    by_label = {system.label: system for system in systems}
    if base is not None and base not in by_label:
        raise UserError(f"--base {base!r} is none of {', '.join(by_label)}; give one of these.")
    records: list[RetentionRecord] = []
    for system in systems:
        own = next((s for s in systems if s.run == system.run and s.method == BASE), None)
        reference = own if base is None else by_label[base]
        if reference is None or reference is system:
            continue
        for key in sorted(key for key in system.answers.keys() & reference.answers.keys() if key[1] == "text"):
            require_same(reference.answers[key], system.answers[key], key)
            below, above = (matrix(side.answers[key].verdicts) for side in (reference, system))
            effect = retention(below, above) if below.any() else None
            records.append(
                {
                    "task": key[0],
                    "modality": key[1],
                    "metric": metric,
                    "base": reference.label,
                    "method": system.label,
                    "n": below.shape[1],
                    "value": effect.value if effect else None,
                    "ci_low": effect.low if effect else None,
                    "ci_high": effect.high if effect else None,
                }
            )
    return records


def gap_records(systems: Sequence[System], metric: str, seed: int) -> list[GapRecord]:
    """T2T − S2T, and T2T − cascade, of every system that has both; Holm over each of the two."""
    records: list[GapRecord] = []
    for system in systems:
        for task, modality in sorted(system.answers, key=order):
            typed, asked = system.answers.get((task, "text")), system.answers[task, modality]
            if modality == "text" or typed is None:
                continue
            require_same(typed, replace(asked, version=text_version(asked.version)), (task, f"text and {modality}"))
            one, two = matrix(asked.verdicts), matrix(typed.verdicts)
            found: Compared | Effect
            if len(one) == 1:
                found = compare_accuracies(one, two, seed)
            else:  # the same training runs on both sides: one difference per run
                found = clustered_difference(np.zeros_like(one[0]), two - one)
            records.append(
                {
                    "task": task,
                    "modality": modality,
                    "metric": metric,
                    "method": system.label,
                    "n": one.shape[1],
                    "value": float(two.mean() - one.mean()),
                    "ci_low": found.low,
                    "ci_high": found.high,
                    "p_value": found.p_value,
                    "p_holm": found.p_value,
                    "family": f"text against {modality}",
                    "n_family": 1,
                    "left_out": None,
                }
            )
    return corrected(records)


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------
def loss_records(pairs: Sequence[tuple[System, System]]) -> list[LossPairRecord]:
    """One row per pair, task and modality for which both have per-example losses; Holm over the tests of a family."""
    rows: list[LossPairRecord] = []
    for a, b in pairs:
        for key in sorted(a.losses.keys() & b.losses.keys(), key=order):
            first, second = a.losses[key], b.losses[key]
            losses_a, losses_b, tokens = aligned(first, second)
            effect = loss_difference(losses_a, losses_b, tokens)
            rows.append(
                {
                    "task": key[0],
                    "modality": key[1],
                    "method_a": a.label,
                    "method_b": b.label,
                    "n": len(tokens),
                    "n_tokens": int(tokens.sum()),
                    "loss_a": first.result.loss,
                    "loss_b": second.result.loss,
                    "difference": effect.value,
                    "ci_low": effect.low,
                    "ci_high": effect.high,
                    "perplexity_ratio": exp(effect.value),
                    "p_value": effect.p_value,
                    "p_holm": effect.p_value,
                    "detectable": effect.detectable,
                    "verdict": ALIKE,
                    "family": family_of_pair(a.method, b.method, key[1]),
                    "n_family": 1,
                    "left_out": None,
                }
            )
    return corrected(rows, _same(pairs), better=-1)


def exp(log: float) -> float:
    """Infinite where a float cannot hold it."""
    return math.exp(log) if log < 700 else math.inf


def aligned(first: Losses, second: Losses) -> tuple[Any, Any, Any]:
    """Losses of both and the tokens, by sorted id."""
    a, b = first.result.samples, second.result.samples
    if first.data != second.data or a.keys() != b.keys():
        raise UserError(f"{first.file} and {second.file} are losses of different answers; measure both on the same.")
    ids = sorted(a)
    tokens, others = (np.array([side[i].n_tokens for i in ids]) for side in (a, b))
    if differing := np.flatnonzero(tokens != others).tolist():
        i = differing[0]
        raise UserError(
            f"{first.file} and {second.file} count {tokens[i]} and {others[i]} tokens in {ids[i]!r}: "
            "losses per token of different tokenizers cannot be compared; compare accuracies."
        )
    return np.array([a[i].loss for i in ids]), np.array([b[i].loss for i in ids]), tokens


def pair_runs(runs: Sequence[Path], metric: str = PRIMARY, seed: int = 0) -> Paired:
    """Every two of `runs` compared in the methods both have: `metric`, `accuracy`, `perplexity`, `not_compared`.

    `accuracy` and `perplexity` are PairRecords and LossPairRecords, Holm-corrected by family; `not_compared`
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
    paired = {system.label for pair in pairs for system in pair}
    sentences += [f"Only one run has {system.label}." for system in systems if system.label not in paired]
    sentences += [*not_compared(pairs), *recording_notes(pairs)]
    same = [(a, _same_answers(a, b, sentences)) for a, b in pairs]
    losses = [(a, _same_losses(a, b, sentences)) for a, b in pairs]
    return {
        "metric": metric,
        "accuracy": accuracy_records(same, metric, seed),
        "perplexity": loss_records(losses),
        "not_compared": list(dict.fromkeys(sentences)),
    }


def _same_answers(a: System, b: System, sentences: list[str]) -> System:
    """`b` with those answers that can be compared with `a`'s; why the others cannot goes to `sentences`."""
    run_a, run_b = (system.label.removesuffix(f"/{system.method}") for system in (a, b))

    def require(one: Answers, other: Answers, key: Key) -> None:
        versions = {  # alike for all methods of two runs, so that it is said once
            "task version": (one.version, other.version),
            "scoring rule's version": (one.metric_version, other.metric_version),
            "longest answer": (f"{one.max_new_tokens} tokens", f"{other.max_new_tokens} tokens"),
        }
        differing = [f"{what} {x} in {run_a}, {y} in {run_b}" for what, (x, y) in versions.items() if x != y]
        if differing:
            raise UserError(f"{key[0]} from {key[1]} is not compared: {'; '.join(differing)}.")
        require_same(one, other, key)

    return replace(b, answers=_allowed(a.answers, b.answers, require, sentences))


def _same_losses(a: System, b: System, sentences: list[str]) -> System:
    return replace(b, losses=_allowed(a.losses, b.losses, lambda one, other, _: aligned(one, other), sentences))


def _allowed(
    a: Mapping[Key, T], b: Mapping[Key, T], require: Callable[[T, T, Key], Any], sentences: list[str]
) -> dict[Key, T]:
    kept = dict(b)
    for key in sorted(a.keys() & b.keys()):
        try:
            require(a[key], b[key], key)
        except UserError as error:
            sentences.append(str(error))
            del kept[key]
    return kept
