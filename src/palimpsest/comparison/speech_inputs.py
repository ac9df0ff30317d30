"""Methods that read speech tokens beside their likes that read encoder frames: text kept and hearing, in pairs.

A method and its like differ in `speech`, its `k` and the rate of what stands for speech, and in nothing else.

    t2t, s2t   the comparisons of the two on the same questions (pairs.py), with their tests and families
    drift      KL to the base on the base's own text; bootstrap over texts, the same texts for both
    shift      distance of the layers' importance to the base's; bootstrap over batches, the same for both

The p of drift and shift is twice the smaller share of the bootstrap's draws on either side of 0 (frontier.sign_p),
corrected over all such pairs: each of the two measures is a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.analysis.analyse import model_layers
from palimpsest.analysis.shift import ADDITIVE_OVER_BATCHES, CONTRASTED, MEASURES, contrast_records
from palimpsest.comparison.families import corrected
from palimpsest.comparison.frontier import sign_p
from palimpsest.evaluation.drift import read_drift
from palimpsest.importance.scores import Scores
from palimpsest.intervals import resampled
from palimpsest.records import BASE, ComparisonRecord, QARecord, SpeechInputRecord
from palimpsest.rundir import folder_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from palimpsest.training.methods import Method

ACCURACIES = {"text": "t2t", "speech": "s2t"}
OWN_TESTS = ("drift", "shift")  # the others have those of the comparisons
N_DRAWS = 2000  # of batches, as in analysis.shift


def likes(methods: Mapping[str, Method]) -> list[tuple[str, str]]:
    """(method that reads tokens or centroids, the first that reads frames and is like it), of those that have one."""
    alike = {name: _but_for_speech(method) for name, method in methods.items()}
    found = []
    for name, method in methods.items():
        like = next((o for o, it in methods.items() if it.speech == "frames" and alike[o] == alike[name]), None)
        if method.speech != "frames" and like is not None:
            found.append((name, like))
    return found


def _but_for_speech(method: Method) -> Method:
    rate = 1.0 if method.kind == "adaptor" else method.learning_rate  # of kind adaptor it is the adaptor's
    return replace(method, speech="frames", k=None, learning_rate=rate, adaptor_learning_rate=None)


def speech_input_records(
    run: Path,
    methods: Mapping[str, Method],
    *,
    qa: Sequence[QARecord],
    comparisons: Sequence[ComparisonRecord],
    drifted: Sequence[str],
    scored: Sequence[str],
    reduction: str,
    seed: int,
) -> list[SpeechInputRecord]:
    """A record of each pair and measure, of the methods' first training runs.

    drifted, scored: the models whose drift, and whose importance, was measured.
    """
    records: list[SpeechInputRecord] = []
    for name, like in likes(methods):
        pair = (name, methods[name].speech, like)
        records += _accuracies(*pair, qa, comparisons)
        if not methods[name].tunes:
            continue  # to a text both answer as the base does
        if {name, like} <= {*drifted}:
            records += _drifts(*pair, run, seed)
        if {name, like} <= {*scored}:
            records += _shifts(*pair, run, reduction, seed)
    own = [i for i, row in enumerate(records) if row["measure"] in OWN_TESTS and row["p_value"] is not None]
    for i, row in zip(own, corrected([records[i] for i in own]), strict=True):
        records[i] = row
    return records


def _accuracies(
    name: str, speech: str, like: str, qa: Sequence[QARecord], comparisons: Sequence[ComparisonRecord]
) -> list[SpeechInputRecord]:
    found: list[SpeechInputRecord] = []
    for row in comparisons:
        if {row["method_a"], row["method_b"]} != {name, like} or row["modality"] not in ACCURACIES:
            continue
        value = {
            it["method"]: it["accuracy"]
            for it in qa
            if all(it[key] == row[key] for key in ("task", "modality", "metric"))
        }
        turned = row["method_a"] == name
        low, high = (-row["ci_high"], -row["ci_low"]) if turned else (row["ci_low"], row["ci_high"])
        found.append(
            {
                **_record(name, speech, like, ACCURACIES[row["modality"]], row["task"], row["n"]),
                "value_reference": value[like],
                "value": value[name],
                "difference": -row["difference"] if turned else row["difference"],
                "ci_low": low,
                "ci_high": high,
                "p_value": row["p_value"],
                "p_holm": row["p_holm"],
                "family": row.get("family"),
                "n_family": row.get("n_family"),
                "left_out": row.get("left_out"),
            }
        )
    return found


def _drifts(name: str, speech: str, like: str, run: Path, seed: int) -> list[SpeechInputRecord]:
    ours, theirs = (read_drift(run / folder_of(it) / "drift" / "tokens.jsonl") for it in (name, like))
    kinds = [text.id.partition("-")[0] for text in ours]
    found: list[SpeechInputRecord] = []
    for kind in dict.fromkeys(kinds):
        pairs = [(a, b) for a, b, it in zip(ours, theirs, kinds, strict=True) if it == kind]
        sums = np.array([[sum(b.kl), sum(a.kl), sum(a.kl) - sum(b.kl)] for a, b in pairs])
        counts = np.array([len(a.kl) for a, _ in pairs])
        before, value, difference = sums.sum(0) / counts.sum()
        times = np.concatenate([*resampled([kind] * len(pairs), seed)])
        drawn = times @ counts
        draws = (times @ sums[:, 2])[drawn > 0] / drawn[drawn > 0]
        found.append(
            {
                **_record(name, speech, like, "drift", kind, len(pairs)),
                "value_reference": float(before),
                "value": float(value),
                "difference": float(difference),
                **_tested(draws, len(pairs)),
            }
        )
    return found


def _shifts(name: str, speech: str, like: str, run: Path, reduction: str, seed: int) -> list[SpeechInputRecord]:
    scores = {it: Scores.open(run / folder_of(it) / "importance") for it in (BASE, name, like)}
    # By the reduction that adds up over batches, whose sums are kept in any case: it alone has an interval.
    additive = (kind for kind in scores[BASE].estimated if kind in ADDITIVE_OVER_BATCHES)
    reduction = next(additive, reduction)
    layers = {it: model_layers(it, of, reduction) for it, of in scores.items()}
    totals = {it: of.distribution.layer_totals for it, of in layers.items()}
    contrasts = contrast_records(
        layers[BASE], layers[name], layers[like], modality="text", reduction=reduction, n_draws=N_DRAWS, seed=seed
    )
    found: list[SpeechInputRecord] = []
    for measure, row in zip(CONTRASTED, contrasts, strict=True):
        distance = MEASURES[measure]
        found.append(
            {
                **_record(name, speech, like, "shift", measure, row.get("n_batches") or 0),
                "reduction": reduction,
                "value_reference": float(distance(totals[BASE], totals[like])),
                "value": float(distance(totals[BASE], totals[name])),
                "difference": float(row["value"] or 0.0),
            }
        )
        if row["ci_low"] is not None:
            n_batches = row.get("n_batches") or 0
            times = np.concatenate([*resampled(["batch"] * n_batches, seed, N_DRAWS)])
            base, ours, theirs = (times @ np.asarray(layers[it].batches) for it in (BASE, name, like))
            found[-1] |= _tested(distance(base, ours) - distance(base, theirs), n_batches)
    return found


def _tested(draws: NDArray[np.float64], n_units: int) -> Any:
    """Interval and p of a bootstrapped difference; n_units: texts, or batches, that were drawn."""
    low, high = np.quantile(draws, [0.025, 0.975])
    p_value = sign_p(draws, n_units)
    return {"ci_low": float(low), "ci_high": float(high), "p_value": p_value, "p_holm": p_value}


def _record(name: str, speech: str, like: str, measure: str, of: str, n: int) -> SpeechInputRecord:
    return {
        "method": name,
        "speech": speech,
        "reference": like,
        "measure": measure,
        "of": of,
        "n": n,
        "value_reference": 0.0,
        "value": 0.0,
        "difference": 0.0,
        "ci_low": None,
        "ci_high": None,
        "p_value": None,
        "p_holm": None,
        "family": f"{measure}, speech tokens against frames",
        "n_family": None,
        "left_out": None,
        "reduction": None,
    }
