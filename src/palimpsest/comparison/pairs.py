"""Which of two models is better, on the same questions: the tables of `palimpsest compare` and of comparison reports.

Systems come from systems.py, paired by task, version, modality and question id. One training run a side is compared by
McNemar's test and the paired bootstrap, several by the clustered difference (intervals.py); docs/evaluation.md explains
both. `compare_runs` refuses runs that do not match; `pair_runs`, for a report, names them and compares the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.comparison.systems import Answers, Key, Losses, System, pool_seeds, read_systems, require_same
from palimpsest.evaluation.scoring import PRIMARY
from palimpsest.evaluation.tasks import text_version
from palimpsest.files import UserError
from palimpsest.intervals import (
    accuracy_interval,
    clustered_difference,
    compare_accuracies,
    holm,
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

if TYPE_CHECKING:
    pass

LEVEL = 0.05
BETTER, WORSE, ALIKE = "better", "worse", "no difference shown"
Matrix = NDArray[np.float64]  # verdicts (training runs, questions)


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
        systems = _named(pool_seeds(systems), methods)  # by the methods' own names, not those of their runs
    pairs = _pairs(systems, every=seeds or methods is not None or len(runs) == 1)
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


def _named(systems: Sequence[System], methods: Sequence[str] | None) -> list[System]:
    absent = [method for method in methods or [] if method not in {system.method for system in systems}]
    if absent:
        raise UserError(f"No run has a method {absent[0]!r}; correct --methods.")
    return [system for system in systems if methods is None or system.method in methods]


def _pairs(systems: Sequence[System], every: bool) -> list[tuple[System, System]]:
    def comparable(a: System, b: System) -> bool:
        return every or (a.run != b.run and (a.method == b.method or None in (a.method, b.method)))

    return [(a, b) for a, b in combinations(systems, 2) if comparable(a, b)]


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
    """One row per pair, task and modality; Holm over all of them."""
    rows: list[PairRecord] = []
    for a, b in pairs:
        for key in sorted(a.answers.keys() & b.answers.keys(), key=order):
            first, second = a.answers[key], b.answers[key]
            require_same(first, second, key)
            sides = (a.label, _matrix(first)), (b.label, _matrix(second))
            rows.append(pair_record(*sides, key, metric, first.metric_version, seed))
    return corrected(rows)


def order(key: Key) -> tuple[str, int]:
    task, modality = key
    return task, MODALITIES.index(modality) if modality in MODALITIES else len(MODALITIES)


def pair_record(
    a: tuple[str, Matrix], b: tuple[str, Matrix], key: Key, metric: str, metric_version: str, seed: int
) -> PairRecord:
    """a, b: label and verdicts (training runs, questions). `p_holm` and `verdict` are those of `corrected`."""
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
    }


def corrected(rows: Sequence[Any], better: int = 1) -> list[Any]:
    """The rows of one table with Holm's correction over all, and the verdict that follows where they have one.

    better: the sign of a difference that is good for b.
    """
    made = []
    for row, p in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        verdict = ALIKE if p > LEVEL else BETTER if better * row.get("difference", 0) > 0 else WORSE
        made.append({**row, "p_holm": p, **({"verdict": verdict} if "verdict" in row else {})})
    return made


def compare(
    verdicts: Mapping[str, Mapping[str, bool]], *, task: str, modality: str, metric: str, seed: int
) -> list[ComparisonRecord]:
    """Every pair of methods with one training run each, paired by question.

    verdicts: method -> {question id: right?}. Pairs follow the order of the methods, the earlier one being
    `method_a`, so the base model belongs first. Holm is taken over the pairs of this call; use `corrected`
    on the rows of several calls that are read as one table.

    Raises:
        UserError: when two methods did not answer the same questions.
    """
    records: list[ComparisonRecord] = []
    for method_a, method_b in combinations(verdicts, 2):
        found = compare_accuracies(*_paired(method_a, verdicts[method_a], method_b, verdicts[method_b]), seed)
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
            }
        )
    return corrected(records)


def _paired(name_a: str, a: Mapping[str, bool], name_b: str, b: Mapping[str, bool]) -> tuple[Matrix, Matrix]:
    """Both methods' verdicts by sorted id, so that the bootstrap does not depend on the rows' order."""
    if a.keys() != b.keys() or not a:
        only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
        raise UserError(
            f"{name_a!r} ({len(a)} questions) and {name_b!r} ({len(b)}) cannot be paired: {only_a} are only "
            f"in the first, {only_b} only in the second; evaluate both on the same task."
        )
    ids = sorted(a)
    return np.array([a[i] for i in ids], dtype=np.float64), np.array([b[i] for i in ids], dtype=np.float64)


def _matrix(answers: Answers) -> Matrix:
    """(seeds, questions), questions by sorted id so that nothing depends on the rows' order."""
    ids = sorted(answers.verdicts[0])
    return np.array([[verdicts[i] for i in ids] for verdicts in answers.verdicts], dtype=np.float64)


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
        for key in sorted(system.answers.keys() & reference.answers.keys(), key=order):
            if key[1] != "text":
                continue
            require_same(reference.answers[key], system.answers[key], key)
            below, above = _matrix(reference.answers[key]), _matrix(system.answers[key])
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
    """T2T − S2T, and T2T − cascade, of every system that has both; Holm over all of them."""
    records: list[GapRecord] = []
    for system in systems:
        for task, modality in sorted(system.answers, key=order):
            typed, asked = system.answers.get((task, "text")), system.answers[task, modality]
            if modality == "text" or typed is None:
                continue
            spoken = Answers(
                text_version(asked.version), asked.metric_version, asked.max_new_tokens, asked.verdicts, asked.file
            )
            require_same(typed, spoken, (task, f"text and {modality}"))
            one, two = _matrix(spoken), _matrix(typed)
            if len(one) == 1:
                found = compare_accuracies(one, two, seed)
                low, high, p_value = found.low, found.high, found.p_value
            else:  # the same training runs on both sides: one difference per run
                effect = clustered_difference(np.zeros_like(one[0]), two - one)
                low, high, p_value = effect.low, effect.high, effect.p_value
            records.append(
                {
                    "task": task,
                    "modality": modality,
                    "metric": metric,
                    "method": system.label,
                    "n": one.shape[1],
                    "value": float(two.mean() - one.mean()),
                    "ci_low": low,
                    "ci_high": high,
                    "p_value": p_value,
                    "p_holm": p_value,
                }
            )
    return corrected(records)


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------
def loss_records(pairs: Sequence[tuple[System, System]]) -> list[LossPairRecord]:
    """One row per pair, task and modality for which both have per-example losses; Holm over all of them."""
    rows: list[LossPairRecord] = []
    for a, b in pairs:
        rows += [_loss(a, b, key) for key in sorted(a.losses.keys() & b.losses.keys(), key=order)]
    return corrected(rows, better=-1)


def _loss(a: System, b: System, key: Key) -> LossPairRecord:
    first, second = a.losses[key], b.losses[key]
    losses_a, losses_b, tokens = aligned(first, second)
    effect = loss_difference(losses_a, losses_b, tokens)
    return {
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
        "perplexity_ratio": math.exp(effect.value) if effect.value < 700 else math.inf,
        "p_value": effect.p_value,
        "p_holm": effect.p_value,
        "detectable": effect.detectable,
        "verdict": ALIKE,
    }


def aligned(first: Losses, second: Losses) -> tuple[Any, Any, Any]:
    """Losses of both and the tokens, by sorted id."""
    a, b = first.result.samples, second.result.samples
    if first.data != second.data or a.keys() != b.keys():
        raise UserError(f"{first.file} and {second.file} are losses of different answers; measure both on the same.")
    ids = sorted(a)
    counts: Mapping[str, tuple[int, int]] = {i: (a[i].n_tokens, b[i].n_tokens) for i in ids}
    other = next((i for i in ids if counts[i][0] != counts[i][1]), None)
    if other is not None:
        raise UserError(
            f"{first.file} and {second.file} count {counts[other][0]} and {counts[other][1]} tokens in {other!r}: "
            "losses per token of different tokenizers cannot be compared; compare accuracies."
        )
    return (
        np.array([a[i].loss for i in ids]),
        np.array([b[i].loss for i in ids]),
        np.array([a[i].n_tokens for i in ids]),
    )


def pair_runs(runs: Sequence[Path], metric: str = PRIMARY, seed: int = 0) -> Paired:
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
