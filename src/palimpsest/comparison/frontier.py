"""Text kept against hearing gained: where every method stands, and which curve keeps more text at equal hearing.

A method at one learning rate says little: a lower rate keeps more text and hears less. So a method is measured at
several values of one key (`over` in a recipe), the points of its curve, and curves are compared where they hear the
same.

**Measures.** Each is Σ totals / Σ counts over units, which are what is resampled, the same units for every method:

    text     drift         KL(base ‖ model) on all of the base's own text, nats per token      texts, within their kind
             general_text  loss minus the base's, nats per token                               documents
             t2t           accuracy on a task's typed questions minus the base's               questions
    hearing  speech_loss   loss of the held-out answers to spoken questions, nats per token    answers
             s2t           accuracy on a task's spoken questions                               questions

**Text at a hearing.** The points of a curve, in the order of the value that is varied, are joined by straight lines in
the plane of hearing and text. A curve that turns back, as one does where too high a rate hurts hearing too, passes a
hearing more than once; what counts is its best text there. Nothing is extrapolated: a curve reaches the hearing from
its worst to its best point. Two curves are compared at the best hearing that both reach and at the middle of what both
reach, a single method (a curve of one point) and a curve at the method's hearing, two single methods not at all.

**Is the difference real?** With one training run of each: paired bootstrap. The units are drawn once for all methods
and measures; in every draw all points move, and the hearing that both curves reach is found anew. The interval is of
percentiles, p is twice the smaller share of draws on either side of 0 (a draw at 0 counts on both, as does one in which
the curves have no hearing in common), with one draw added to each, and not below 2 · 0.5ⁿ over n units. With several
training runs: t test, with the bootstrap's variance and for each side the jackknife's over its runs, added as in
intervals.py.

Shapes: runs = training runs of a method, units, draws, points = of a curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.comparison.families import ALIKE, corrected
from palimpsest.data.examples import Example
from palimpsest.evaluation.drift import read_drift
from palimpsest.evaluation.general_text import by_document, read_text_losses
from palimpsest.evaluation.perplexity import read_losses
from palimpsest.intervals import (
    accuracy_interval,
    clustered_difference,
    combined_effect,
    loss_difference,
    over_runs,
    paired_bootstrap,
    resampled,
)
from palimpsest.records import BASE, EqualHearingRecord, FrontierRecord
from palimpsest.rundir import folder_of, losses_of
from palimpsest.training.methods import OF_FRONTIER, Method

Array = NDArray[np.float64]
DRAWS = 10_000  # of the bootstrap: the smallest p is 2 / DRAWS, so that Holm over 200 pairs can still be below 0.05
NO_COMMON, NOT_COMPARABLE = "no hearing in common", "not comparable"
HIGHER, LOWER = "higher", "lower"
ROUNDING = 1e-5  # nats per token: a LoRA behind a gate and the same one merged hear alike, but for float32
POSITIONS = {"best": 1.0, "middle": 0.5}  # of what both curves reach, from its worst (0) to its best hearing (1)
DRIFT, GENERAL_TEXT, T2T, SPEECH_LOSS, S2T = "drift", "general_text", "t2t", "speech_loss", "s2t"


@dataclass(frozen=True)
class Place:
    """Where a method stands: on which curve, and at which value of the key that is varied along it."""

    curve: str
    varied: str | None = None
    point: float | str | None = None


@dataclass(frozen=True)
class Measure:
    """One measure of every method that has it, over the same units."""

    name: str
    task: str | None
    better: str  # higher | lower
    units: tuple[str, ...]  # their ids: measures of the same ones are resampled together
    kinds: tuple[str, ...]  # of each unit; units are drawn among those of their kind
    counts: Array  # (units,): tokens; 1 for questions
    totals: Mapping[str, Mapping[int, Array]]  # method -> number of the training run -> (units,)

    @property
    def sign(self) -> int:
        return 1 if self.better == HIGHER else -1

    @property
    def key(self) -> tuple[str, str | None]:
        return self.name, self.task


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------
def places_of(methods: Mapping[str, Method]) -> dict[str, Place]:
    """Every method's place, the base's too.

    The key that is varied along a curve is the first in which its points differ. Points stand in the order of its value
    where that is a number everywhere, else in the recipe's.
    """
    places = {BASE: Place(BASE)}
    curves: dict[str, list[str]] = {}
    for name, method in methods.items():
        curves.setdefault(method.curve or name, []).append(name)
    for curve, names in curves.items():
        options = {name: dict(_flat({**asdict(methods[name]), **dict.fromkeys(OF_FRONTIER)})) for name in names}
        keys = dict.fromkeys(key for of in options.values() for key in of)
        varied = next((key for key in keys if len({repr(of.get(key)) for of in options.values()}) > 1), None)
        values = {name: None if varied is None else _plain(options[name].get(varied)) for name in names}
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        order = sorted(names, key=numbers.__getitem__) if len(numbers) == len(names) else names
        places |= {name: Place(curve, varied, values[name]) for name in order}
    return places


def _flat(options: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _plain(value: Any) -> float | str | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Both tables
# ---------------------------------------------------------------------------------------------------------------------
def frontier_tables(
    places: Mapping[str, Place],
    text: Sequence[Measure],
    hearing: Sequence[Measure],
    seed: int,
    n_draws: int = DRAWS,
) -> tuple[list[FrontierRecord], list[EqualHearingRecord]]:
    """`frontier` and `equal_hearing` of results.json. places: of the base and the methods, points in their order."""
    drawn = draws_of([*text, *hearing], seed, n_draws)
    table: list[FrontierRecord] = []
    compared: list[EqualHearingRecord] = []
    for kept in text:
        for heard in hearing:
            plane = _Plane(kept, heard, drawn)
            table += _records(places, plane, seed)
            compared += _compared(places, plane)
    return table, compared


def draws_of(measures: Sequence[Measure], seed: int, n_draws: int) -> dict[tuple[Any, ...], Array]:
    """(measure's name, task, method, numbers of its runs) → (draws,), the mean over its runs in every draw.

    Of each method all runs together are drawn, and the first alone: what some measures have no further runs of is set
    against the first.
    """
    groups: dict[tuple[str, ...], list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.units, []).append(measure)
    values: dict[tuple[Any, ...], Array] = {}
    for number, group in enumerate(groups.values()):
        columns: dict[tuple[Any, ...], tuple[Array, Array]] = {}  # of all measures of these units: totals, counts
        for measure in group:
            for method, runs in measure.totals.items():
                for numbers in dict.fromkeys((tuple(sorted(runs)), (0,))):
                    if all(it in runs for it in numbers):
                        mean = np.mean([runs[it] for it in numbers], axis=0)
                        columns[(*measure.key, method, numbers)] = mean, measure.counts
        parts: list[Array] = []
        totals, counts = (np.stack([column[i] for column in columns.values()], axis=1) for i in (0, 1))
        for times in resampled(group[0].kinds, [seed, number], n_draws):
            with np.errstate(invalid="ignore", divide="ignore"):
                parts.append((times @ totals) / (times @ counts))
        values |= dict(zip(columns, np.concatenate(parts).T, strict=True))
    return values


class _Plane:
    """Values of one text and one hearing measure, more of either being better, and their bootstrap draws."""

    def __init__(self, text: Measure, hearing: Measure, drawn: Mapping[tuple[Any, ...], Array]) -> None:
        self.text, self.hearing, self.drawn = text, hearing, drawn

    def runs(self, method: str) -> tuple[int, ...]:
        """The numbers of the training runs that have both measures."""
        heard = self.hearing.totals.get(method, {})
        numbers = tuple(sorted(it for it in self.text.totals.get(method, {}) if it in heard))
        # Draws are made of all runs and of the first alone (draws_of).
        whole = [tuple(sorted(of.totals.get(method, {}))) for of in (self.text, self.hearing)]
        return numbers if all(numbers in (of, (0,)) for of in whole) else numbers[:1]

    def of_runs(self, measure: Measure, method: str, numbers: Sequence[int]) -> float:
        """The mean over runs, as measured."""
        totals = np.mean([measure.totals[method][it] for it in numbers], axis=0)
        return float(totals.sum() / measure.counts.sum())

    def points(self, methods: Sequence[str], without: int | None = None) -> tuple[Array, Array]:
        """(hearing, text), each (1, points): the curve, with one of its runs left out if that is named."""
        numbers = {method: [it for it in self.runs(method) if it != without] for method in methods}
        heard, kept = (
            np.array([[of.sign * self.of_runs(of, method, numbers[method]) for method in methods]])
            for of in (self.hearing, self.text)
        )
        return heard, kept

    def draws(self, methods: Sequence[str]) -> tuple[Array, Array]:
        """(hearing, text), each (draws, points)."""
        heard, kept = (
            np.stack([of.sign * self.drawn[(*of.key, method, self.runs(method))] for method in methods], axis=1)
            for of in (self.hearing, self.text)
        )
        return heard, kept


# ---------------------------------------------------------------------------------------------------------------------
# Where every method stands
# ---------------------------------------------------------------------------------------------------------------------
def _records(places: Mapping[str, Place], plane: _Plane, seed: int) -> list[FrontierRecord]:
    records: list[FrontierRecord] = []
    text, hearing = plane.text, plane.hearing
    for method, place in places.items():
        if method not in text.totals:
            continue
        both = plane.runs(method)
        numbers = both or tuple(sorted(text.totals[method]))
        value, low, high = _value(text, method, numbers, plane, seed)
        heard = _value(hearing, method, both, plane, seed) if both else (None, None, None)
        records.append(
            {
                "model": method,
                "curve": place.curve,
                "varied": place.varied,
                "point": place.point,
                "text_measure": text.name,
                "text_task": text.task,
                "text_better": text.better,
                "text": value,
                "text_ci_low": low,
                "text_ci_high": high,
                "n_text": len(text.units),
                "hearing_measure": hearing.name,
                "hearing_task": hearing.task,
                "hearing_better": hearing.better,
                "hearing": heard[0],
                "hearing_ci_low": heard[1],
                "hearing_ci_high": heard[2],
                "n_hearing": len(hearing.units),
                "n_seeds": len(numbers),
                "pareto": None,
            }
        )
    points = [(hearing.sign * r["hearing"], text.sign * r["text"]) for r in records if r["hearing"] is not None]
    for record in records:
        if record["hearing"] is not None:
            record["pareto"] = not dominated((hearing.sign * record["hearing"], text.sign * record["text"]), points)
    return records


def dominated(point: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """Whether one of `points` is at least as good in both and better in one; more is better."""
    return any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)


def _value(
    measure: Measure, method: str, numbers: Sequence[int], plane: _Plane, seed: int
) -> tuple[float, float, float]:
    """Value and 95 % interval, over units and, of several training runs, over runs too."""
    totals = np.array([measure.totals[method][it] for it in numbers])  # (runs, units)
    value, several = plane.of_runs(measure, method, numbers), len(numbers) > 1
    if measure.name == S2T:
        return value, *accuracy_interval(totals)
    if not totals.any():  # the base, or what is the base by construction
        return value, value, value
    if measure.name == T2T:
        if several:
            effect = clustered_difference(np.zeros_like(totals[0]), totals)
            return value, effect.low, effect.high
        return value, *paired_bootstrap(np.zeros_like(totals[0]), totals[0], seed)
    if measure.name == GENERAL_TEXT:
        found = loss_difference(np.zeros_like(totals[0]), totals.mean(axis=0), measure.counts)
        low, high = found.low, found.high
    else:
        low, high = np.nanquantile(plane.drawn[(*measure.key, method, tuple(numbers))], [0.025, 0.975]).tolist()
    if several:
        of_runs = (totals.sum(axis=1) / measure.counts.sum()).tolist()
        return over_runs(of_runs, max(0.0, value - low), max(0.0, high - value))
    return value, low, high


# ---------------------------------------------------------------------------------------------------------------------
# Text at equal hearing
# ---------------------------------------------------------------------------------------------------------------------
def text_at(hearing: Array, text: Array, level: Array) -> Array:
    """The best text of each curve at its level; NaN where it does not pass it, by more than rounding.

    hearing, text: (curves, points), points in the curve's order, more of either being better; level: (curves,).
    """
    inside = np.clip(level, hearing.min(axis=1), hearing.max(axis=1))
    level = np.where(np.abs(level - inside) <= ROUNDING, inside, level)
    if hearing.shape[1] == 1:
        return np.where(hearing[:, 0] == level, text[:, 0], np.nan)
    best = np.full(len(level), np.nan)
    for i in range(hearing.shape[1] - 1):
        start, end = hearing[:, i], hearing[:, i + 1]
        flat = start == end
        share = (level - start) / np.where(flat, 1.0, end - start)
        on_line = (1 - share) * text[:, i] + share * text[:, i + 1]  # exact at both ends
        value = np.where(flat, np.maximum(text[:, i], text[:, i + 1]), on_line)
        passed = (np.minimum(start, end) <= level) & (level <= np.maximum(start, end))
        best = np.fmax(best, np.where(passed, value, np.nan))
    return best


def at_equal_hearing(a: tuple[Array, Array], b: tuple[Array, Array], position: float) -> tuple[Array, Array, Array]:
    """(level, text of a, text of b), each (curves,); NaN where two curves have no hearing in common.

    a, b: (hearing, text), each (curves, points). position: 1 is the best hearing that both reach, 0 the worst.
    """
    worst = np.maximum(a[0].min(axis=1), b[0].min(axis=1))
    best = np.minimum(a[0].max(axis=1), b[0].max(axis=1))
    level = best if position == 1 else worst + position * (best - worst)
    level = np.where(worst <= best + ROUNDING, level, np.nan)
    return level, text_at(*a, level), text_at(*b, level)


def _compared(places: Mapping[str, Place], plane: _Plane) -> list[EqualHearingRecord]:
    """Every pair of curves of which one has two points or more, in families by position."""
    curves: dict[str, list[str]] = {}
    for method, place in places.items():
        if method != BASE and plane.runs(method):
            curves.setdefault(place.curve, []).append(method)
    found: list[EqualHearingRecord] = []
    for position, share in POSITIONS.items():
        tests: list[EqualHearingRecord] = []
        undefined: list[EqualHearingRecord] = []
        for a, b in combinations(curves, 2):
            least, most = sorted((len(curves[a]), len(curves[b])))
            if most > 1 and (least > 1 or position == "best"):
                record = _pair(a, curves[a], b, curves[b], plane, position, share)
                (undefined if record["difference"] is None else tests).append(record)
        corrected_tests = corrected(tests, better=plane.text.sign)
        for record in undefined:
            record["n_family"] = sum(row["left_out"] is None for row in corrected_tests)
        found += [*corrected_tests, *undefined]
    return found


def _pair(
    a: str, of_a: Sequence[str], b: str, of_b: Sequence[str], plane: _Plane, position: str, share: float
) -> EqualHearingRecord:
    text, hearing = plane.text, plane.hearing

    def difference(without_a: int | None = None, without_b: int | None = None) -> float:
        _, first, second = at_equal_hearing(plane.points(of_a, without_a), plane.points(of_b, without_b), share)
        return float(text.sign * (second - first)[0]) + 0.0  # no −0

    (level,), (text_a,), (text_b,) = at_equal_hearing(plane.points(of_a), plane.points(of_b), share)
    _, drawn_a, drawn_b = at_equal_hearing(plane.draws(of_a), plane.draws(of_b), share)
    draws = text.sign * (drawn_b - drawn_a)
    defined = draws[np.isfinite(draws)]
    seeds = [min(len(plane.runs(method)) for method in of) for of in (of_a, of_b)]
    several = max(seeds) > 1
    record: EqualHearingRecord = {
        "text_measure": text.name,
        "text_task": text.task,
        "text_better": text.better,
        "hearing_measure": hearing.name,
        "hearing_task": hearing.task,
        "hearing_better": hearing.better,
        "position": position,
        "method_a": a,
        "method_b": b,
        "points_a": len(of_a),
        "points_b": len(of_b),
        "seeds_a": seeds[0],
        "seeds_b": seeds[1],
        "hearing": None,
        "text_a": None,
        "text_b": None,
        "difference": None,
        "ci_low": None,
        "ci_high": None,
        "overlap": len(defined) / len(draws),
        "test": "jackknife_t" if several else "bootstrap_sign",
        "p_value": None,
        "p_holm": None,
        "verdict": NOT_COMPARABLE,
        "family": _family(plane, position),
        "n_family": 0,
        "left_out": NO_COMMON,
    }
    if not np.isfinite(text_a) or not np.isfinite(text_b) or len(defined) < 2:
        return record
    value = difference()
    low, high = np.quantile(defined, [0.025, 0.975]).tolist()
    n_units = min(len(text.units), len(hearing.units))
    p_value = sign_p(draws, n_units)
    if several:
        parts = [(float(np.var(defined, ddof=1)), n_units - 1.0)]
        for side, runs in ((0, seeds[0]), (1, seeds[1])):
            if runs > 1:
                without = [difference(*((it, None) if side == 0 else (None, it))) for it in range(runs)]
                if not np.isfinite(without).all():
                    return record
                parts.append((jackknife_variance(without), runs - 1.0))
        effect = combined_effect(value, parts)
        low, high, p_value = effect.low, effect.high, effect.p_value
    return {
        **record,
        "hearing": hearing.sign * float(level),
        "text_a": text.sign * float(text_a),
        "text_b": text.sign * float(text_b),
        "difference": value,
        "ci_low": low,
        "ci_high": high,
        "p_value": p_value,
        "p_holm": p_value,
        "verdict": ALIKE,
        "n_family": 1,
        "left_out": None,
    }


def sign_p(draws: Array, n_units: int) -> float:
    """Two-sided p of no difference: twice the smaller share of draws at or beyond 0; NaN counts on both sides.

    Not below that of a sign test in which all of the units that were drawn say the same: two texts are two of the same
    sign every other time, and then so are all draws of them.
    """
    undefined = int((~np.isfinite(draws)).sum())
    below, above = int((draws <= 0).sum()) + undefined, int((draws >= 0).sum()) + undefined
    return min(1.0, max(2 * 0.5**n_units, 2 * (min(below, above) + 1) / (len(draws) + 1)))


def jackknife_variance(without: Sequence[float]) -> float:
    """Of an estimate, from the values it takes without each of the runs (Efron and Stein 1981)."""
    values = np.asarray(without)
    return float((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum())


def _family(plane: _Plane, position: str) -> str:
    kept, heard = (of.name + (f" ({of.task})" if of.task else "") for of in (plane.text, plane.hearing))
    return f"equal hearing, {position}: {kept} at equal {heard}"


# ---------------------------------------------------------------------------------------------------------------------
# From the files of a study
# ---------------------------------------------------------------------------------------------------------------------
Verdicts = Mapping[str, Mapping[str, bool]]  # run -> {question id: right?}


def text_measures(
    run: Path,
    drift: Mapping[str, Sequence[str]],
    general_text: Mapping[str, Sequence[str]],
    verdicts: Mapping[tuple[str, str], Verdicts],
    runs: Mapping[str, Sequence[str]],
    asked: Mapping[str, Sequence[Example]],
) -> list[Measure]:
    """What is known of text. drift, general_text: the training runs of each method that have it, the base first.

    verdicts: by (task, modality). runs: of each method, the base's too. asked: the questions of each task.
    """
    measures: list[Measure] = []
    tuned = {method: names for method, names in drift.items() if method != BASE}
    if tuned:
        read = {name: read_drift(_in(run, name, "drift/tokens.jsonl")) for names in tuned.values() for name in names}
        first = next(iter(read.values()))
        kls = {name: np.array([sum(text.kl) for text in texts]) for name, texts in read.items()}
        totals = {method: dict(enumerate(kls[name] for name in names)) for method, names in tuned.items()}
        kinds = tuple(text.id.partition("-")[0] for text in first)
        counts = np.array([len(text.kl) for text in first], dtype=np.float64)
        of_all = {BASE: {0: np.zeros(len(first))}, **totals}
        measures.append(Measure(DRIFT, None, LOWER, tuple(f"text {t.id}" for t in first), kinds, counts, of_all))
    if BASE in general_text:
        losses = {
            name: read_text_losses(_in(run, name, "general_text/losses.jsonl"))
            for names in general_text.values()
            for name in names
        }
        sums, tokens, _ = by_document(losses[BASE])
        ids = tuple(dict.fromkeys(f"document {loss.document}" for loss in losses[BASE]))
        totals = {}
        for method, names in general_text.items():
            found = [by_document(losses[name]) for name in names]
            if all(np.array_equal(tokens, of[1]) for of in found):  # of other tokens no loss per token is comparable
                totals[method] = {number: of[0] - sums for number, of in enumerate(found)}
        measures.append(Measure(GENERAL_TEXT, None, LOWER, ids, ("",) * len(ids), tokens.astype(np.float64), totals))
    for task, examples in asked.items():
        of_task = verdicts.get((task, "text"), {})
        if BASE in of_task:
            measures.append(_accuracy(T2T, task, of_task, runs, examples, minus=of_task[BASE]))
    return measures


def hearing_measures(
    run: Path,
    spoken: Mapping[str, Sequence[str]],
    verdicts: Mapping[tuple[str, str], Verdicts],
    runs: Mapping[str, Sequence[str]],
    asked: Mapping[str, Sequence[Example]],
    heldout: Sequence[Example],
) -> list[Measure]:
    """What is known of hearing. spoken: the training runs of each method that was asked the held-out ones in speech."""
    measures: list[Measure] = []
    if spoken:
        losses = {name: read_losses(losses_of(run, name, "speech"))[1].samples for of in spoken.values() for name in of}
        questions = {example.id: example.question for example in heldout}
        ids = sorted(next(iter(losses.values())))
        totals = {
            method: {number: np.array([losses[name][i].loss for i in ids]) for number, name in enumerate(names)}
            for method, names in spoken.items()
        }
        counts = np.array([float(next(iter(losses.values()))[i].n_tokens) for i in ids])
        units = tuple(f"{i} {questions[i]}" for i in ids)
        measures.append(Measure(SPEECH_LOSS, None, LOWER, units, ("",) * len(ids), counts, totals))
    for task, examples in asked.items():
        if of_task := verdicts.get((task, "speech"), {}):
            measures.append(_accuracy(S2T, task, of_task, runs, examples))
    return measures


def _accuracy(
    name: str,
    task: str,
    verdicts: Verdicts,
    runs: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    minus: Mapping[str, bool] | None = None,
) -> Measure:
    """Verdicts as 1 and 0, of the methods all of whose runs were asked; the units are the questions, not their ids."""
    questions = {example.id: example.question for example in examples}
    ids = sorted(questions)
    below = np.array([float(minus[i]) if minus else 0.0 for i in ids])
    totals = {
        method: {n: np.array([float(verdicts[run][i]) for i in ids]) - below for n, run in enumerate(names)}
        for method, names in runs.items()
        if all(run in verdicts for run in names)
    }
    units = tuple(f"{i} {questions[i]}" for i in ids)
    return Measure(name, task, HIGHER, units, ("",) * len(ids), np.ones(len(ids)), totals)


def _in(run: Path, name: str, file: str) -> Path:
    return run / folder_of(name) / file
