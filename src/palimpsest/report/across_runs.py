"""Several training runs of every method: the view of a run directory that shows methods, not runs."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from statistics import fmean
from typing import Any, cast

from palimpsest.records import BASE, Results, method_of, run_name
from palimpsest.report.inputs import Inputs, main_metric
from palimpsest.report.table import Row, Rows, grouped

OF_FIRST_RUNS = (
    *("qa_floors", "probe", "drift", "general_text", "general_text_comparisons"),
    *("clustering_summary", "mask_overlap", "training", "speech_inputs", "importance_parts"),
)
# Measures with an interval over texts and the range of what they can be, of tables with a row per model and `about`.
POSITIVE, SHARE, ANY = (0.0, math.inf), (0.0, 1.0), (-math.inf, math.inf)
OVER_TEXTS = {
    "drift": {"kl": POSITIVE, "reverse_kl": POSITIVE, "agreement": SHARE, "loss_difference": ANY},
    "general_text": {"loss": POSITIVE, "per_byte": POSITIVE},
}
ABOUT = {"drift": ("text", "tokens"), "general_text": ("text",)}
LARGEST_LOG = math.log(sys.float_info.max)


def of_first_runs(results: Results) -> set[str]:
    """The tables that show each method's first run alone, of what `by_method` gives; what has every run has means."""
    rows = cast(Mapping[str, Rows], results)
    tables = (*OVER_TEXTS, "general_text_comparisons")
    means = {table for table in tables if any(row.get("n_seeds", 1) > 1 for row in rows[table])}
    return set(OF_FIRST_RUNS) - means


def n_runs(results: Results) -> int:
    """Training runs of every method."""
    return max((row["n_seeds"] for row in results["seeds"]), default=1)


def by_method(inputs: Inputs) -> Inputs:
    """What summary, figures and main tables show where there are several runs: one entry per method.

    Accuracies by the main scoring rule, perplexities, shifts, layers, drift and general text are means over the runs,
    comparisons (of general text with the base's too) those of the means; records of deactivation, clustering and change
    of all runs stand under their method; of everything else (`of_first_runs`, accuracies by other rules, and what the
    recipe spares the further runs) the first run stays. With one run of each method nothing changes.
    """
    results = inputs.results
    if n_runs(results) == 1:
        return inputs
    shown: dict[str, Any] = dict(results)
    shown["qa"] = _mean_accuracies(results)
    shown["comparisons"] = [{**row, "only_a": 0, "only_b": 0} for row in results["seed_comparisons"]]
    shown["layers"] = _mean_layers(results)
    for table, field in (("deactivation", "model"), ("clustering", "model"), ("delta", "method")):
        shown[table] = _under_method(shown[table], field)
    shown["shift"] = _mean_shifts(results)
    shown["perplexity"] = _mean_perplexities(results)
    for table in OF_FIRST_RUNS:
        shown[table] = [row for row in shown[table] if _is_first(row)]
    for table in OVER_TEXTS:
        shown[table] = _means_over_texts(results, table)
    shown["general_text_comparisons"] = _mean_general_text(results)
    samples = {key: rows for key, rows in inputs.samples.items() if method_of(key[0])[1] == 0}
    return dataclasses.replace(inputs, results=cast(Results, shown), samples=samples)


def _under_method(rows: Rows, field: str) -> list[Row]:
    return [{**row, field: method_of(row[field])[0], "run": row[field]} for row in rows]


def _is_first(row: Row) -> bool:
    return method_of(str(row.get("method", row.get("model"))))[1] == 0


def _mean_accuracies(results: Results) -> list[Any]:
    metric = main_metric(results)
    means = {(r["method"], r["task"], r["modality"]): r for r in results["seeds"] if r["measure"] == "accuracy"}
    rows: list[Any] = []
    for row in results["qa"]:
        mean = means.get((row["method"], row["task"], row["modality"]))
        if not _is_first(row):
            continue
        if mean is not None and row["metric"] == metric == mean["basis"]:
            rows.append({**row, "accuracy": mean["mean"], "ci_low": mean["ci_low"], "ci_high": mean["ci_high"]})
        else:
            rows.append(row)
    return rows


def _mean_general_text(results: Results) -> list[Any]:
    """Of each method's runs, by table `seed_losses`; nats per byte are nats per token in another unit."""
    of_base = [row for row in results["seed_losses"] if (row["measure"], row["method_a"]) == ("general_text", BASE)]
    means = {row["method_b"]: row for row in of_base}
    tokens_per_byte = {row["model"]: row["n_tokens"] / row["n_bytes"] for row in results["general_text"]}
    rows: list[Any] = []
    for row in filter(_is_first, results["general_text_comparisons"]):
        found = means.get(row["method"])
        if found is None or row["method"] not in tokens_per_byte:
            rows.append(row)
            continue
        values = {"difference": found["difference"], "ci_low": found["ci_low"], "ci_high": found["ci_high"]}
        in_bytes = {key: value * tokens_per_byte[row["method"]] for key, value in values.items()}
        in_tokens = {f"per_token_{key}": value for key, value in values.items()}
        tests = {key: found[key] for key in ("p_value", "p_holm", "verdict", "family", "n_family", "left_out")}
        per_byte = row["per_byte_base"] + in_bytes["difference"]
        more = {"per_byte": per_byte, "detectable": None, "n_seeds": found["seeds_b"]}
        rows.append({**row, **in_bytes, **in_tokens, **tests, **more})
    return rows


def _means_over_texts(results: Results, table: str) -> list[Any]:
    """Of methods that have the measure of every run, arithmetic, with the interval over texts and runs (`over_runs`).

    Of others the first run stays; `n_seeds` says of how many a row is. The ends are cut to what the measure can be. A
    field that is not finite in some run has no mean.
    """
    every = cast(Mapping[str, Rows], results)[table]
    by_key = {(row["model"], *(row[key] for key in ABOUT[table])): row for row in every}
    means, n = list[Any](), n_runs(results)
    for row in filter(_is_first, every):
        about = [row[key] for key in ABOUT[table]]
        runs = [by_key.get((run_name(row["model"], number), *about)) for number in range(n)]
        of_all = [run for run in runs if run is not None]
        if len(of_all) < n:  # the base has one
            means.append({"n_seeds": 1, **row})  # of a view of this view it stays a mean
            continue
        mean: dict[str, Any] = {**row, "n_seeds": len(of_all)}
        for field, limits in OVER_TEXTS[table].items():
            mean.update(_mean_over_texts(of_all, field, limits))
        if table == "general_text":
            loss = mean["loss"]
            mean["perplexity"] = None if loss is None or loss > LARGEST_LOG else math.exp(loss)
        else:
            mean.update({field: fmean(run[field] for run in of_all) for field in ("loss", "new_tokens_share")})
        means.append(mean)
    return means


def _mean_over_texts(runs: Rows, field: str, limits: tuple[float, float]) -> dict[str, float | None]:
    from palimpsest.intervals import mean_arms, over_runs  # scipy's

    ends = field, f"{field}_ci_low", f"{field}_ci_high"
    values, lows, highs = ([run[end] for run in runs] for end in ends)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*values, *lows, *highs)):
        return dict.fromkeys(ends)
    mean, low, high = over_runs(values, *mean_arms(values, lows, highs))
    return dict(zip(ends, (mean, max(low, limits[0]), min(high, limits[1])), strict=True))


def _mean_shifts(results: Results) -> list[Any]:
    """Of each method's runs, by table `seeds`; a row of the first run alone says so in `n_seeds`, which is 1 there."""
    means = {(r["method"], r["reference"], r["measure"], r["modality"], r["basis"]): r for r in results["seeds"]}
    rows: list[Any] = []
    for row in filter(_is_first, results["shift"]):
        mean = means.get((row["model"], row["reference"], row["measure"], row["modality"], row["reduction"]))
        if mean is None:
            rows.append({**row, "n_seeds": 1})
        else:
            interval = {"ci_low": mean["ci_low"], "ci_high": mean["ci_high"]}
            rows.append({**row, "value": mean["mean"], **interval, "n_seeds": mean["n_seeds"]})
    return rows


def _mean_perplexities(results: Results) -> list[Any]:
    means = {(r["method"], r["modality"]): r["mean"] for r in results["seeds"] if r["measure"] == "perplexity"}
    return [
        {**row, "perplexity": means.get((row["method"], row["modality"]), row["perplexity"])}
        for row in results["perplexity"]
        if _is_first(row)
    ]


def _mean_layers(results: Results) -> list[Any]:
    rows = _under_method(results["layers"], "model")
    groups = (group["rows"] for group in grouped(rows, "model", "modality", "reduction", "layer", "kind"))
    fields = ("total", "mean", "share")
    return [{**of[0], **{field: fmean(row[field] for row in of) for field in fields}} for of in groups]
