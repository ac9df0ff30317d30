"""An invented run as large as one gets: 20 methods of three training runs each. Nothing in it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from palimpsest.files import write_json, write_jsonl, write_text
from palimpsest.records import run_name
from report_fixture import (
    accuracy_row,
    deletion_rows,
    drift_row,
    equal_hearing_row,
    eval_row,
    frontier_row,
    general_text_comparison,
    general_text_row,
    invented_provenance,
    invented_results,
    probe_row,
    speech_test,
)

METHODS = (
    *("full", "layer_lr", "lora", "lora_r8", "lora_r64", "adaptor", "full_text", "layer_lr_inverted"),
    *("replay_10_percent", "replay_30_percent", "distillation", "pull_to_base", "own_answers"),
    *("slowed_important_weights", "gated_lora", "blend_half"),
    *(f"rate-{rate:g}" for rate in (1e-5, 2e-5, 5e-5, 1e-4)),
)
N_RUNS = 3
RUNS = tuple(run_name(method, number) for number in range(N_RUNS) for method in METHODS)
TASKS = ("facts", "llama_questions", "web_questions")
METRICS = ("token_sequence", "token_sequence_numbers", "substring", "any_order")
MAIN = METRICS[1]
N_LAYERS, N_QUESTIONS = 30, 20
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
TOKENS = ("all", "first", "end", "digits", "names", "function_words")
_PAIRS = [(a, b) for i, b in enumerate(METHODS) for a in ("base", *METHODS[:i])]


def make_large_run(path: Path) -> Path:
    """Write the run to `path`: results, recipe, maps, answers and recordings."""
    write_json(path / "results.json", {"schema": 1, **large_results()})
    write_json(path / "provenance.json", invented_provenance() | {"steps": {}})
    methods = "".join(f"  {name}: {{kind: full, curve: {curve}}}\n" for name, curve in _curves().items())
    write_text(path / "study.yaml", f"name: large\nseed: 7\nseeds: {N_RUNS}\nmethods:\n{methods}")
    rng = np.random.default_rng(3)
    (path / "maps").mkdir()
    for file, models in (("importance", ("base",)), ("delta", METHODS)):
        names = [
            f"model.layers.{at}.{kind}.weight" for at in (0, 15, 29) for kind in ("self_attn.q_proj", "mlp.up_proj")
        ]
        maps = {f"{model}|{name}": np.exp(rng.normal(size=(128, 128))) for model in models for name in names}
        np.savez(path / "maps" / f"{file}.npz", **{key: 1e-4 * of.astype(np.float32) for key, of in maps.items()})  # type: ignore[arg-type]
    (path / "data").mkdir()
    for task in TASKS:
        noise = 0.1 * rng.normal(size=(N_QUESTIONS, 48_000))
        for i in range(N_QUESTIONS):
            soundfile.write(path / "data" / f"{task}-{i}.wav", noise[i].astype(np.float32), 16_000)
        rows = [{"id": f"q{i}", "audio": f"{task}-{i}.wav", "voice": "noise"} for i in range(N_QUESTIONS)]
        write_jsonl(path / "data" / f"task-{task}.jsonl", rows)
        for model in ("base", *RUNS):
            for modality in ("text", "cascade" if model == "base" else "speech"):
                folder = path / ("base" if model == "base" else f"methods/{model}") / "samples" / f"{task}-{modality}"
                write_jsonl(folder / "samples.jsonl", [_sample(model, task, i) for i in range(N_QUESTIONS)])
    return path


def _sample(model: str, task: str, i: int) -> dict[str, Any]:
    return {
        "id": f"q{i}", "question": f"Question {i} of {task}: which city is the capital of the {i}th country?",
        "response": f"The capital of the {i}th country is Invent City, says {model}. " * 3, "answers": ["Invent City"],
        "verdicts": dict.fromkeys(METRICS, i % 2 == 0), "n_new_tokens": 12, "failed": False,
    }  # fmt: skip


def large_results() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(2)
    harm = dict(zip(METHODS, np.linspace(1.0, 0.1, len(METHODS)), strict=True))
    results: dict[str, list[dict[str, Any]]] = {table: [] for table in invented_results()}
    results["qa"] = [
        {**accuracy_row(model, task, modality, correct), "metric": metric, "n_loop": 1, "n_refusal": 2, "n_cut": 3}
        for task in TASKS
        for model in ("base", *RUNS)
        for modality in ("text", "cascade" if model == "base" else "speech")
        for metric in METRICS
        for correct in [int(150 - 80 * _harm(harm, model) + 6 * rng.normal()) - 40 * (modality == "speech")]
    ]
    results["qa_floors"] = [
        {
            "method": model, "task": task, "modality": modality, "metric": metric, "metric_version": "1", "n": 300,
            "floor": floor, "draws": 10, "value": 0.01, "ci_low": 0.005, "ci_high": 0.02,
        }
        for task in TASKS
        for model in ("base", *RUNS)
        for modality in ("text", "speech")
        for metric in METRICS
        for floor in ("unrelated", "echo", "echo_in_sentence")
    ]  # fmt: skip
    results["speech_tests"] = [
        {**speech_test(method, task, reference, 0.2, 0.3, 0.001), "n_seeds": N_RUNS, "metric": MAIN}
        for task in TASKS
        for method in METHODS
        for reference in ("unrelated", "text", "cascade")
    ]
    results["perplexity"] = [
        {
            "method": model, "task": "heldout", "modality": modality, "n_examples": 100, "n_tokens": 1234,
            "loss": 1.5, "perplexity": 4 + 2 * _harm(harm, model),
        }
        for model in ("base", *RUNS)
        for modality in ("text", "speech")
        if (model, modality) != ("base", "speech")
    ]  # fmt: skip
    results["comparisons"] = [{**invented_results()["comparisons"][0], "metric": MAIN}]
    for table, tasks in (("seed_comparisons", TASKS), ("pooled_comparisons", (", ".join(TASKS),))):
        results[table] = [
            _pair(task, modality, a, b, float(0.2 * (_harm(harm, a) - _harm(harm, b))))
            for task in tasks
            for modality in ("text", "speech")
            for a, b in _PAIRS
            if (modality, a) != ("speech", "base")
        ]
    results["seed_losses"] = [
        _loss_pair(measure, a, b, float(0.2 * (_harm(harm, b) - _harm(harm, a))))
        for measure in ("drift", "general_text", "speech_loss")
        for a, b in _PAIRS
        if (measure, a) != ("drift", "base")
    ]
    results["seeds"] = [_seed(method, *of, _harm(harm, method)) for of in _measures() for method in METHODS]
    results["probe"] = [
        probe_row(model, kind, 74, 84, 3.0 - _harm(harm, model))
        for model in ("base", *RUNS)
        for kind in ("all", "agreement", "forms", "facts", "numbers", "common_sense", "spelling", "copying")
    ]
    results["probe_comparisons"] = [
        {**row, "method": method, "n_seeds": N_RUNS, "only_base": None, "only_method": None}
        for row in invented_results()["probe_comparisons"][:3]
        for method in METHODS
    ]
    results["drift"] = [
        {**drift_row(model, text, _harm(harm, model)), "tokens": tokens}
        for model in RUNS
        for text in ("plain", "chat")
        for tokens in TOKENS
    ]
    results["general_text"] = [general_text_row(model, 1 + _harm(harm, model) / 10) for model in ("base", *RUNS)]
    results["general_text_comparisons"] = [general_text_comparison(model, _harm(harm, model) / 10) for model in RUNS]
    hearings = [("speech_loss", None, "lower"), *(("s2t", task, "higher") for task in TASKS)]
    for measure, task, better in (
        *(("drift", None, "lower"), ("general_text", None, "lower")),
        *(("t2t", task, "higher") for task in TASKS),
    ):
        for hearing, of, hears in hearings:
            plane = {
                **{"text_measure": measure, "text_task": task, "text_better": better},
                **{"hearing_measure": hearing, "hearing_task": of, "hearing_better": hears},
            }
            results["frontier"] += [
                {**frontier_row(model, curve, point, kept, heard, i % 5 == 0), **plane, "n_seeds": N_RUNS}
                for i, (model, curve, point) in enumerate(_places())
                for kept in [_harm(harm, model) * (-0.2 if better == "higher" else 1.0)]
                for heard in [0.2 + _harm(harm, model) * (0.3 if hears == "higher" else -0.1)]
            ]
            results["equal_hearing"] += [
                {**equal_hearing_row("rate", method, -0.1, 0.004), **plane, "position": position}
                for method in METHODS
                if not method.startswith("rate-")
                for position in ("best", "middle")
            ]
    results["layers"] = [row for model in ("base", *RUNS) for row in _layers(model, _harm(harm, model))]
    results["shift"] = [
        {
            "model": model, "reference": "base", "modality": "text", "reduction": reduction, "measure": measure,
            "value": 0.1 * _harm(harm, model), "ci_low": 0.05 * _harm(harm, model),
            "ci_high": 0.15 * _harm(harm, model), "noise_floor": 0.004,
        }
        for model in RUNS
        for reduction in ("signed_sum", "per_batch_abs")
        for measure in ("jensen_shannon", "wasserstein_1", "centre_shift", "peak_shift", "cosine", "spearman")
    ]  # fmt: skip
    of_models = [
        ("importance", "base"),
        *((of, m) for m in METHODS for of in ("importance", "mask", "delta", "delta_rank8")),
    ]
    ways = [f"{measure}_{way}" for measure in ("top1", "top5", "gini") for way in ("rows", "columns")]
    results["clustering"] = [
        {
            "model": model, "of": of, "name": f"model.layers.{layer}.{kind}.weight", "layer": layer, "kind": kind,
            "measure": measure, "value": 0.3, "null_mean": 0.07, "null_std": 0.001, "z": 20.0,
        }
        for of, model in of_models
        for layer in (0, 15)
        for kind in KINDS
        for measure in ways
    ]  # fmt: skip
    results["clustering_summary"] = [
        {
            "model": model, "of": of, "kind": "all", "measure": measure, "n_matrices": 210, "n_undefined": 0,
            "ratio": 1.4, "ci_low": 1.3, "ci_high": 1.5,
        }
        for of, model in of_models
        for measure in ways
    ]  # fmt: skip
    results["delta"] = [
        {
            "method": model, "name": f"model.layers.{layer}.{kind}.weight", "layer": layer, "kind": kind,
            "relative_norm": 0.02 * _harm(harm, model), "overlap_with_importance": 0.06, "overlap_by_chance": 0.03,
            "effective_rank": 20.0, "energy_top8": 0.4,
        }
        for model in RUNS
        for layer in range(N_LAYERS)
        for kind in KINDS
    ]  # fmt: skip
    results["mask_overlap"] = [
        {**invented_results()["mask_overlap"][1], "model": model, "overlap": 0.8 - 0.4 * _harm(harm, model)}
        for model in RUNS
    ]
    results["correlations"] = invented_results()["correlations"]
    results["training"] = [
        row
        for model in RUNS
        for step in range(1, 61)
        for row in (
            {
                "method": model, "step": step, "epoch": step / 30, "learning_rate": 2e-5,
                "loss": float(2 + 2.5 * np.exp(-step * _harm(harm, model) / 20) + 0.05 * rng.normal()),
            },
            *(
                eval_row(model, step, modality, 4 + _harm(harm, model) * step / 60)
                for modality in ("text", "speech")
                if step % 20 == 0
            ),
        )
    ]  # fmt: skip
    whole = {("top", 0.03, None): 1e5, ("bottom", 0.03, None): 4.2}
    results["deactivation"] = [
        row
        for model in ("base", *METHODS)
        for modality in ("text", "speech")
        if (model, modality) != ("base", "speech")
        for row in deletion_rows(
            model, modality, 4 + _harm(harm, model),
            {**whole, **{("random", 0.03, seed): 5.0 * 2**seed for seed in range(10)}},
        )
    ]  # fmt: skip
    results["claims"] = invented_results()["claims"]
    results["timings"] = [
        {"step": f"methods/{model}/{step}", "seconds": 41.5, "peak_rss_bytes": 900_000_000}
        for model in RUNS
        for step in ("checkpoint", "importance", "perplexity", "probe", "drift", *(f"samples/{t}-text" for t in TASKS))
    ]
    return results


def _harm(harm: dict[str, float], model: str) -> float:
    return 0.0 if model == "base" else float(harm[model.split("-seed")[0]])


def _curves() -> dict[str, str]:
    """The curve of every method in the recipe; null of those that are no point of one."""
    return {name: "rate" if name.startswith("rate-") else "null" for name in METHODS}


def _places() -> list[tuple[str, str, float | None]]:
    """(model, curve, point): the methods called rate-… are points of one curve."""
    points = {name: float(name.removeprefix("rate-")) for name in METHODS if name.startswith("rate-")}
    return [(name, "rate" if name in points else name, points.get(name)) for name in ("base", *METHODS)]


def _pair(task: str, modality: str, a: str, b: str, difference: float) -> dict[str, Any]:
    return {
        "task": task, "modality": modality, "metric": MAIN, "metric_version": "1", "method_a": a, "method_b": b,
        "n": 300, "seeds_a": N_RUNS, "seeds_b": N_RUNS, "accuracy_a": 0.4, "ci_low_a": 0.35, "ci_high_a": 0.45,
        "accuracy_b": 0.4 + difference, "ci_low_b": 0.3, "ci_high_b": 0.5, "only_a": None, "only_b": None,
        "difference": difference, "ci_low": difference - 0.05, "ci_high": difference + 0.05, "test": "clustered_t",
        "p_value": 0.01, "p_holm": 0.02 if abs(difference) > 0.05 else 0.8, "detectable": 0.06,
        "verdict": "no difference shown", "family": "the base", "n_family": 20, "left_out": None,
    }  # fmt: skip


def _loss_pair(measure: str, a: str, b: str, difference: float) -> dict[str, Any]:
    return {
        "measure": measure, "method_a": a, "method_b": b, "n": 200, "seeds_a": 1 if a == "base" else N_RUNS,
        "seeds_b": N_RUNS, "loss_a": 0.1, "loss_b": 0.1 + difference, "difference": difference,
        "values": [difference] * N_RUNS, "ci_low": difference - 0.05, "ci_high": difference + 0.05, "p_value": 0.01,
        "p_holm": 0.02 if abs(difference) > 0.05 else 0.8, "verdict": "no difference shown",
        "family": f"{measure} over runs", "n_family": 20, "left_out": None,
    }  # fmt: skip


def _measures() -> list[tuple[str, str | None, str, str | None]]:
    """(measure, task, modality, basis) of the table of training runs."""
    shifts = ("jensen_shannon", "wasserstein_1", "centre_shift", "peak_shift", "cosine", "spearman", "magnitude_ratio")
    return [
        *(("accuracy", task, modality, MAIN) for task in TASKS for modality in ("text", "speech")),
        *((name, "heldout", of, None) for name in ("perplexity", "perplexity_ratio") for of in ("text", "speech")),
        *((name, None, "text", basis) for name in shifts for basis in ("signed_sum", "per_batch_abs")),
    ]


def _seed(method: str, measure: str, task: str | None, modality: str, basis: str | None, harm: float) -> dict[str, Any]:
    mean = (0.45 - 0.2 * harm) * (0.6 if modality == "speech" else 1.0) * (0.5 if task == "facts" else 1.0)
    return {
        "method": method, "reference": None if measure in ("accuracy", "perplexity") else "base", "measure": measure,
        "task": task, "modality": modality, "basis": basis, "n_seeds": N_RUNS, "n": 300,
        "values": [mean - 0.01, mean, mean + 0.01], "mean": mean, "std": 0.01,
        "ci_low": mean - 0.03, "ci_high": mean + 0.03, "ci_over": "seeds, questions",
    }  # fmt: skip


def _layers(model: str, harm: float) -> list[dict[str, Any]]:
    depth = np.arange(N_LAYERS)
    totals = 5.0 + 20.0 * np.exp(-((depth - 25 + 18 * harm) ** 2) / 40.0)
    return [
        {
            "model": model, "modality": "text", "reduction": reduction, "layer": layer, "kind": "all",
            "total": float(total), "mean": float(total / 3_538_944), "share": float(total / totals.sum()),
            "n_parameters": 3_538_944,
        }
        for reduction in ("signed_sum", "per_batch_abs")
        for layer, total in enumerate(totals)
    ]  # fmt: skip
