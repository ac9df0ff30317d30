"""The paper's eight claims as tests: one measure, one decision rule and one verdict each.

The rules and their constants stand here, before any data. Each claim is about the study at hand, at the 95 %
level.

1. Deactivation: perplexity of a model over its own whole, for the base from text and for Full-FT from text and from
   speech (the rows of the paper's Table 1 are a tuned model's). With the top 3 % removed it is at least
   `DESTROYED`, with the bottom 3 % at most `UNHARMED`; the median over the random masks lies between (not every one:
   what a random mask does varies by orders of magnitude with the few weights it happens to hit). Where the study has
   several reductions or training runs, this is asked of each, and the worst is shown. Where it has several scopes
   (3 % of all weights, 3 % of each matrix), each has parts of its own, which name it; all must hold, and the value is
   of the scope that the recipe names first. There is no interval.
2. Clustering of the base model's importance: the typical ratio (geometric mean over matrices) of the share
   held by the top 5 % of rows over that of shuffled entries exceeds `CLUSTERED`; the same for columns. The
   interval is over matrices, `MIN_MATRICES` of them.
3. Full-FT shifts importance over the layers, toward earlier ones. Size: the Jensen–Shannon divergence from the base
   exceeds `NOISE_FACTOR` times its noise floor (which is one split of the data, hence the factor). Direction: the
   centre of mass moves toward the input, by a change below 0. The paper shows this direction at 1B; at 8B the shape
   of its curves stays.
4. Layer-LR and LoRA each shift it less than Full-FT: the paired difference of divergences is below 0.
5. Text accuracy: Full-FT is below the base; Layer-LR and LoRA are each above Full-FT.
6. Speech accuracy: LoRA above Layer-LR, Layer-LR above Full-FT. Text accuracy: Layer-LR below LoRA by no more
   than `MARGIN`.
7. Clustering of the weight change: the ratio of claim 2 is larger for LoRA than for Layer-LR on the same
   matrices, for rows and for columns; and it still is when both changes are cut to LoRA's rank and set against
   random singular vectors (low_rank.py), since LoRA's change has a low rank by construction.
8. LoRA rank (methods named lora_r8, lora_r16, …, and those whose rank the recipe gives, one of each rank): the
   middle rank (of an even number, the lower of the two) is above the largest in accuracy, averaged over text and
   speech.

A part with an interval holds if all of the interval is on the claimed side, fails if all of it is on the
other, and is undecided otherwise. A claim holds if all its parts hold, fails if one fails, and is undecided
otherwise or if a result is missing; its note lists every part. The record's value and interval are those of
the first part. A claim that does not hold is thus called holding in at most 2.5 % of studies, however many parts
it has; one of k parts that each lie just on the right side is called failing in up to k times that. Nothing is
corrected for there being eight claims.

Accuracies are paired differences in the metric `METRIC`, pooled over tasks by their number of questions. With one
training run of each method the tasks' intervals, each over its own questions, are combined as those of independent
normal estimates (root of summed squares). With several they are not independent, since the same runs answer every
task: there the questions of all tasks are pooled run by run, and clustered then (table pooled_comparisons).

Where every method was trained several times (`seeds` in the recipe), claims 3 to 8 are about the methods' means over
their runs, and the intervals are over seeds and questions (claims 5, 6, 8: table seed_comparisons, and of several
tasks pooled_comparisons), over seeds and batches (3, 4: table seeds), over seeds and matrices (7); the rules and
bounds stay as they are. Not each run is judged by itself, with a vote: a run's own interval holds nothing of what
another seed would give, all runs share their questions and so err together, and a vote of three forgets how close
they were. Claim 1 asks every run of Full-FT that was measured; claim 2 is about the base, which is trained in none. A
run's number pairs it with that of another method in claims 4 and 7 (same adaptor, same order of examples); accuracies
are not paired by run, only by question. Claim 7 is about the first runs where the recipe spares the others the
measurement (`seeds_measure`), and its note says so; likewise claims 3 and 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from palimpsest.analysis.clustering import bootstrap_mean, log_ratios
from palimpsest.intervals import over_runs
from palimpsest.records import BASE, ClaimRecord, method_of, run_name

RATIO = 0.03
REDUCTION = "per_batch_abs"  # of claims 3 and 4: the one whose layer totals have an interval
METRIC = "token_sequence_numbers"  # evaluation.scoring.PRIMARY
DESTROYED = 10.0
UNHARMED = 1.10
CLUSTERED = 1.10
NOISE_FACTOR = 2.0
MARGIN = 0.01  # one point of accuracy
REMOVED_FROM = ((BASE, "text"), ("full", "text"), ("full", "speech"))  # claim 1
MIN_MATRICES = 10  # a percentile interval from fewer is far too narrow (from two it holds the truth half the time)

Row = Mapping[str, Any]
Results = Mapping[str, Sequence[Row]]


class Missing(Exception):
    """A result that a claim needs is not there; the message names it."""


@dataclass(frozen=True)
class Part:
    name: str
    value: float
    low: float | None
    high: float | None
    verdict: str

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.name} {self.value:.4g}{interval}: {self.verdict}"


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    def above(self, bound: float, name: str) -> Part:
        verdict = "holds" if self.low > bound else "fails" if self.high < bound else "undecided"
        return Part(name, self.value, self.low, self.high, verdict)

    def below(self, bound: float, name: str) -> Part:
        verdict = "holds" if self.high < bound else "fails" if self.low > bound else "undecided"
        return Part(name, self.value, self.low, self.high, verdict)


@dataclass(frozen=True)
class Claim:
    statement: str
    measure: str
    test: Callable[[Results], list[Part]]  # raises Missing; the first part is the record's value


def claim_records(results: Results, ranks: Mapping[str, int | None] | None = None) -> list[ClaimRecord]:
    """The eight claims, in order.

    results: tables of `results.json` by name (deactivation, comparisons, shift, clustering, and of several runs
    seeds, seed_comparisons and pooled_comparisons; others are ignored), as written or as read back. Methods are
    expected under the names base, full, layer_lr, lora and lora_r<rank>. A table or row that is not there makes the
    claim undecided, with a note that names it.
    ranks: of LoRA methods, where the name does not say it or says it wrongly; None: takes no part in claim 8.
    """
    of_rank = replace(CLAIMS[-1], test=partial(_moderate_rank, known=ranks or {}))
    return [_record(number, claim, results) for number, claim in enumerate((*CLAIMS[:-1], of_rank), start=1)]


def _record(number: int, claim: Claim, results: Results) -> ClaimRecord:
    first: Part | None = None
    verdict = "undecided"
    try:
        parts = claim.test(results)
    except Missing as missing:
        note = f"Missing: {missing}."
    else:
        first, verdict = parts[0], _combine(parts)
        note = "; ".join(str(part) for part in parts) + "."
    return {
        "claim": number,
        "statement": claim.statement,
        "measure": claim.measure,
        "value": first.value if first else None,
        "ci_low": first.low if first else None,
        "ci_high": first.high if first else None,
        "verdict": verdict,
        "note": note,
    }


def _combine(parts: Sequence[Part]) -> str:
    verdicts = {part.verdict for part in parts}
    if "fails" in verdicts:
        return "fails"
    return "holds" if verdicts == {"holds"} else "undecided"


# ------------------------------------------------------------------------------------------------------------
# One function per claim
# ------------------------------------------------------------------------------------------------------------
def _deactivation(results: Results) -> list[Part]:
    return [part for model, modality in REMOVED_FROM for part in _removed(results, model, modality)]


def _removed(results: Results, method: str, modality: str) -> list[Part]:
    what = f"deactivation of {'the base model' if method == BASE else method} on {modality}"
    rows = [
        row
        for row in results.get("deactivation", [])
        if method_of(row["model"])[0] == method and row["modality"] == modality
    ]
    if not rows:
        raise Missing(what)
    # A scope that was measured at other shares alone has no part; without any at this share the first says so.
    asked = dict.fromkeys(row.get("scope") for row in rows if math.isclose(row["ratio"], RATIO))
    if len(asked) < 2:
        return _removed_within(rows, what, f"{method}, {modality},")
    return [
        part
        for scope in asked
        for part in _removed_within(
            [row for row in rows if row.get("scope") == scope],
            f"{what}, scope {scope}",
            f"{method}, {modality}, scope {scope},",
        )
    ]


def _removed_within(rows: Sequence[Row], what: str, whole_of: str) -> list[Part]:
    """The parts of claim 1 about one model and input, in one scope. what, whole_of: how notes call it."""
    by_run: dict[str, list[Row]] = {}
    for row in rows:
        by_run.setdefault(row["model"], []).append(row)
    rises: dict[str, list[float]] = {"top": [], "bottom": [], "random": []}  # ln(perplexity / that of the whole model)
    medians: list[tuple[float, bool]] = []  # over random masks, of each run and reduction; lies it between?
    for of_model in by_run.values():
        whole = [row["loss"] for row in of_model if row["condition"] == "base"]
        if not whole:
            raise Missing(f"{what}, condition base")
        if any(row["loss"] is None for row in of_model):
            raise Missing(f"a finite loss in every row of the {what}")
        of_run: dict[str, dict[Any, list[float]]] = {}  # condition → reduction → rises
        for condition in rises:
            of_run[condition] = {}
            for row in of_model:
                if row["condition"] == condition and math.isclose(row["ratio"], RATIO):
                    of_run[condition].setdefault(row.get("reduction"), []).append(row["loss"] - whole[0])
            if not of_run[condition]:
                raise Missing(f"{what}, condition {condition}, ratio {RATIO}")
            rises[condition] += [rise for found in of_run[condition].values() for rise in found]
        low = max(rise for found in of_run["bottom"].values() for rise in found)
        high = min(rise for found in of_run["top"].values() for rise in found)
        middles = [float(np.median(found)) for found in of_run["random"].values()]
        medians += [(middle, low < middle < high) for middle in middles]
    top, bottom, masks = _exp(min(rises["top"])), _exp(max(rises["bottom"])), rises["random"]
    middle, between = min(medians, key=lambda found: found[1])  # one that does not lie between, if there is one
    of = f"whole {whole_of}"
    about = f"random / {of} median of {len(masks)} masks from {_exp(min(masks)):.4g} to {_exp(max(masks)):.4g}:"
    return [
        Part(f"top / {of}", top, None, None, _holds(top >= DESTROYED)),
        Part(f"bottom / {of}", bottom, None, None, _holds(bottom <= UNHARMED)),
        Part(about, _exp(middle), None, None, _holds(between)),
    ]


def _importance_clusters(results: Results) -> list[Part]:
    table = log_ratios(results.get("clustering", []))
    parts = []
    for axis in ("rows", "columns"):
        key = ("base", "importance", f"top5_{axis}")
        if key not in table:
            raise Missing(f"clustering of the base model's importance, measure {key[2]}")
        parts.append(_ratio(table[key].values(), key[2]).above(CLUSTERED, f"{axis}, times shuffled"))
    return parts


def _full_shifts(results: Results) -> list[Part]:
    row = _shift(results, "full", "base", "jensen_shannon")
    if row["noise_floor"] is None:
        raise Missing("noise floor of the shift of full (needs the scores of each batch)")
    bound = NOISE_FACTOR * row["noise_floor"]
    divergence, runs = _shifted(results, row)
    centre, centre_runs = _shifted(results, _shift(results, "full", "base", "centre_shift"))
    return [
        divergence.above(bound, f"divergence against {NOISE_FACTOR:g} × noise floor = {bound:.4g}{runs}"),
        centre.below(0.0, f"centre of mass in depth, below 0 toward the input{centre_runs}"),
    ]


def _others_shift_less(results: Results) -> list[Part]:
    parts = []
    for method in ("layer_lr", "lora"):
        difference, runs = _shifted(results, _shift(results, method, "full", "jensen_shannon_difference"))
        parts.append(difference.below(0.0, f"{method} − full{runs}"))
    return parts


def _text_retention(results: Results) -> list[Part]:
    return [
        _gain(results, "text", "base", "full").below(0.0, "text, full − base"),
        _gain(results, "text", "full", "layer_lr").above(0.0, "text, layer_lr − full"),
        _gain(results, "text", "full", "lora").above(0.0, "text, lora − full"),
    ]


def _speech_order(results: Results) -> list[Part]:
    return [
        _gain(results, "speech", "layer_lr", "lora").above(0.0, "speech, lora − layer_lr"),
        _gain(results, "speech", "full", "layer_lr").above(0.0, "speech, layer_lr − full"),
        _gain(results, "text", "lora", "layer_lr").above(-MARGIN, f"text, layer_lr − lora against −{MARGIN:g}"),
    ]


def _change_clusters(results: Results) -> list[Part]:
    table = log_ratios(results.get("clustering", []))
    cut = next((of for method, of, _ in table if method == "lora" and of.startswith("delta_rank")), "delta_rank")
    parts = []
    for of, how in (("delta", ""), (cut, f", both of rank {cut.removeprefix('delta_rank')}, over random vectors")):
        for axis in ("rows", "columns"):
            by_run: list[dict[str, float]] = []
            for number in range(_n_runs(results)):
                lora, layer_lr = (table.get((run_name(m, number), of, f"top5_{axis}")) for m in ("lora", "layer_lr"))
                if lora is not None and layer_lr is not None:
                    by_run.append({name: lora[name] - layer_lr[name] for name in lora if name in layer_lr})
                elif number == 0:
                    method = "layer_lr" if lora is not None else "lora"
                    raise Missing(f"clustering of the change of {method} ({of}), measure top5_{axis}")
            ratio = _mean_ratio(by_run, f"change of lora and layer_lr ({of}), {axis}")
            parts.append(ratio.above(1.0, f"{axis}, lora / layer_lr{how}{_means(results, len(by_run))}"))
    return parts


def _moderate_rank(results: Results, known: Mapping[str, int | None] | None = None) -> list[Part]:
    compared = {row[side] for row in results.get("comparisons", []) for side in ("method_a", "method_b")}
    named = {name: int(found[1]) for name in compared if (found := re.fullmatch(r"lora_r(\d+)", name))}
    methods: dict[int, str] = {}
    for name, rank in sorted({**named, **(known or {})}.items()):
        if name not in compared or rank is None:
            continue
        if rank in methods:
            raise Missing(f"one LoRA method of each rank ({methods[rank]} and {name} both have rank {rank})")
        methods[rank] = name
    if len(methods) < 2:
        raise Missing("comparisons of LoRA methods of at least two ranks, named lora_r<rank>")
    ranks = sorted(methods)
    moderate, largest = ranks[(len(ranks) - 1) // 2], ranks[-1]
    gains = [_gain(results, modality, methods[largest], methods[moderate]) for modality in ("text", "speech")]
    # The same questions in both modalities: averaged widths are right or too wide, whatever the correlation.
    value, low, high = (float(np.mean([getattr(gain, field) for gain in gains])) for field in ("value", "low", "high"))
    return [Interval(value, low, high).above(0.0, f"mean of text and speech, r {moderate} − r {largest}")]


# ------------------------------------------------------------------------------------------------------------
# Reading the tables
# ------------------------------------------------------------------------------------------------------------
def _holds(condition: bool) -> str:
    return "holds" if condition else "fails"


def _exp(difference: float) -> float:
    """Ratio of perplexities; a destroyed model's may be beyond float range."""
    return math.exp(min(difference, 700.0))


def _shift(results: Results, model: str, reference: str, measure: str) -> Row:
    fields = ("model", "reference", "measure", "modality", "reduction")
    for row in results.get("shift", []):
        if tuple(row[field] for field in fields) == (model, reference, measure, "text", REDUCTION):
            return row
    raise Missing(f"shift of {model} against {reference}, measure {measure}, text, reduction {REDUCTION}")


def _of(row: Row) -> Interval:
    if row["ci_low"] is None or row["ci_high"] is None:
        raise Missing(f"interval of {row['measure']} of {row['model']} (needs the scores of each batch, at least 10)")
    return Interval(row["value"], row["ci_low"], row["ci_high"])


def _n_runs(results: Results) -> int:
    """Training runs of every method."""
    return max((row["n_seeds"] for row in results.get("seeds", [])), default=1)


def _means(results: Results, n: int) -> str:
    """What a part's name says of the runs it is about; nothing where each method has one."""
    return "" if _n_runs(results) == 1 else f", mean of {n} runs" if n > 1 else ", first runs alone"


def _shifted(results: Results, row: Row) -> tuple[Interval, str]:
    """A shift, of the method's mean over its runs where there are several, and of which runs."""
    fields = ("reference", "measure", "modality")
    for pooled in results.get("seeds", []):
        same = all(pooled[field] == row[field] for field in fields)
        if same and (pooled["method"], pooled["basis"]) == (row["model"], row["reduction"]):
            if pooled["mean"] is None or "batches" not in pooled["ci_over"]:
                raise Missing(f"interval over batches of {row['measure']} of every run of {row['model']}")
            mean = Interval(pooled["mean"], pooled["ci_low"], pooled["ci_high"])
            return mean, _means(results, pooled["n_seeds"])
    return _of(row), _means(results, 1)


def _mean_ratio(by_run: Sequence[Mapping[str, float]], what: str) -> Interval:
    """exp of a mean over runs and matrices, with its interval over both."""
    if len(by_run) == 1:
        return _ratio(by_run[0].values(), what)
    shared = [name for name in by_run[0] if all(math.isfinite(run.get(name, math.nan)) for run in by_run)]
    over_matrices = _ratio([float(np.mean([run[name] for run in by_run])) for name in shared], what)
    value, low, high = (math.log(x) for x in (over_matrices.value, over_matrices.low, over_matrices.high))
    values = [float(np.mean([run[name] for name in shared])) for run in by_run]
    return Interval(*(math.exp(x) for x in over_runs(values, max(0.0, value - low), max(0.0, high - value))))


def _ratio(log_values: Any, what: str) -> Interval:
    values = np.array([value for value in log_values if math.isfinite(value)])
    if len(values) < MIN_MATRICES:
        raise Missing(f"at least {MIN_MATRICES} matrices with a defined value ({what} has {len(values)})")
    return Interval(*(math.exp(value) for value in bootstrap_mean(values)))


def _gain(results: Results, modality: str, before: str, after: str) -> Interval:
    """accuracy(after) − accuracy(before), pooled over tasks by number of questions; of several runs, their means."""
    several = _n_runs(results) > 1
    rows = _compared(results, "seed_comparisons" if several else "comparisons", modality, before, after)
    if not rows:
        raise Missing(f"comparison of {before} with {after}, {modality}, metric {METRIC}")
    if several and len(rows) > 1:
        rows = _compared(results, "pooled_comparisons", modality, before, after)
        if len(rows) != 1:
            raise Missing(f"comparison of {before} with {after} over all tasks, {modality}, metric {METRIC}")
    n = sum(row["n"] for row in rows)
    signs = [1 if row["method_a"] == before else -1 for row in rows]
    value = sum(sign * row["n"] * row["difference"] for sign, row in zip(signs, rows, strict=True)) / n
    half = math.hypot(*(row["n"] * (row["ci_high"] - row["ci_low"]) / 2 for row in rows)) / n
    return Interval(value, value - half, value + half)


def _compared(results: Results, table: str, modality: str, before: str, after: str) -> list[Row]:
    rows = [row for row in results.get(table, []) if (row["modality"], row["metric"]) == (modality, METRIC)]
    return [row for row in rows if {row["method_a"], row["method_b"]} == {before, after}]


CLAIMS = (
    Claim(
        "Without its most important 3 % of weights the model is destroyed, without the least important "
        "3 % it is unharmed, and without a random 3 % it is in between.",
        "text perplexity of the base over the unchanged base's, top 3 % removed",
        _deactivation,
    ),
    Claim(
        "Important weights gather on few rows and columns, more than the same values do in random places.",
        "share of the top 5 % of rows over that of shuffled entries",
        _importance_clusters,
    ),
    Claim(
        "Full fine-tuning on speech changes how textual importance is spread over the layers, toward earlier ones.",
        "Jensen–Shannon divergence of the layer shares from the base, bits",
        _full_shifts,
    ),
    Claim(
        "Layer-wise learning rates and LoRA change that spread less than full fine-tuning.",
        "Jensen–Shannon divergence, layer_lr minus full, bits",
        _others_shift_less,
    ),
    Claim(
        "Full fine-tuning costs text accuracy; layer-wise learning rates and LoRA cost less.",
        "text accuracy, full minus base",
        _text_retention,
    ),
    Claim(
        "From speech, LoRA answers best and full fine-tuning worst; from text, layer-wise rates do at least "
        "as well as LoRA.",
        "speech accuracy, lora minus layer_lr",
        _speech_order,
    ),
    Claim(
        "The weight change of LoRA gathers on rows and columns more than that of layer-wise rates.",
        "clustering of the change, lora over layer_lr, rows",
        _change_clusters,
    ),
    Claim(
        "A LoRA rank of middle size does better than a large one.",
        "accuracy, middle minus largest rank",
        _moderate_rank,
    ),
)
