"""A run directory with invented numbers, for the tests of the report. Nothing in it was measured."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from palimpsest.files import write_json, write_jsonl, write_text

HOSTILE = '<script>alert("palimpsest")</script>"><img src=x onerror=alert(1)>'
METHODS = ("full", "layer_lr", "lora", "lora_r8", "lora_r16")
N_LAYERS = 16
SCALE = {
    "full": 1.0,
    "layer_lr": 0.5,
    "lora": 0.3,
    "lora_r8": 0.25,
    "lora_r16": 0.3,
}  # of the invented damage
PEAK = {"base": 12.0, "full": 3.0, "layer_lr": 10.0, "lora": 11.0}


def make_run(path: Path, *, hostile: bool = False, without: Collection[str] = (), n_questions: int = 25) -> Path:
    """Write an invented run to `path`.

    without: names of files, folders or tables of results.json to leave out, e.g. {"study.yaml", "shift"}.
    """
    results = invented_results()
    for table in without:
        results.pop(table, None)
    if "results.json" not in without:
        write_json(path / "results.json", {"schema": 1, **results})
    if "provenance.json" not in without:
        write_json(path / "provenance.json", invented_provenance(hostile))
        write_json(path / "base" / "importance" / "step.json", {"step": "base/importance"})
    if "study.yaml" not in without:
        write_text(
            path / "study.yaml",
            f"name: invented\nseed: 7\nnote: {json.dumps(HOSTILE if hostile else 'none')}\n",
        )
    if "maps" not in without:
        _write_maps(path / "maps")
    if "samples" not in without:
        _write_samples(path, hostile, n_questions)
    if "data" not in without:
        _write_data(path / "data", n_questions)
    return path


def invented_provenance(hostile: bool = False) -> dict[str, Any]:
    return {
        "python": "3.11.0",
        "platform": HOSTILE if hostile else "Invented-OS 1.0",
        "versions": {"torch": "0.0-invented", "numpy": "0.0-invented"},
        "hardware": {"cpu": "Invented CPU", "cores": 2, "gpus": []},
        "code": "0123456789abcdef",
        "seed": 7,
        "steps": {"base/importance": {"fingerprint": "ab12", "skipped": False}},
        "started": "2000-01-01T00:00:00Z",
        "finished": "2000-01-01T01:00:00Z",
        "models": {"language_model": {"name": "Invented-LM-135M", "n_parameters": 134_515_008}},
        "data": {"train": {"n": 1200, "voices": ["invented"]}, "heldout": {"n": 100}},
    }


def invented_results() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    return {
        "deactivation": _deactivation(),
        "qa": _qa(),
        "qa_floors": _floors(),
        "speech_tests": [
            test
            for task in ("llama_questions", "facts")
            for method in METHODS
            for test in (
                speech_test(method, task, "unrelated", 0.03, 0.01, 0.4),
                speech_test(method, task, "text", 0.03, 0.3, 0.0001),
                speech_test(method, task, "cascade", 0.03, 0.3, 0.0001),
            )
        ],
        "perplexity": _perplexity(),
        "comparisons": _comparisons(),
        "probe": _probe(),
        "probe_comparisons": _probe_comparisons(),
        "drift": [drift_row(method, text, SCALE[method]) for method in METHODS for text in ("plain", "chat")],
        "general_text": [general_text_row(method, 1 + SCALE.get(method, 0.0) / 10) for method in ("base", *METHODS)],
        "general_text_comparisons": [general_text_comparison(method, SCALE[method] / 10) for method in METHODS],
        "frontier": [
            *[frontier_row("base", "base", None, 0.0, None, False)],
            *[frontier_row(f"full-{rate:g}", "full", rate, 300 * rate, 2 - 500 * rate, True) for rate in (5e-4, 1e-3)],
            *[frontier_row(name, name, None, SCALE[name] / 2, 2 - SCALE[name], False) for name in METHODS[1:]],
        ],
        "equal_hearing": [
            equal_hearing_row("full", "layer_lr", -0.1, 0.004),
            equal_hearing_row("full", "lora", -0.02, 0.4),
            equal_hearing_row("full", "lora_r8", None, None),
        ],
        "predictors": [predictor_row("jensen_shannon", 0.8), predictor_row("relative_change", None)],
        "restoration": [restoration_row("full", "back", None), restoration_row("back", "random", [3, 4])],
        "layers": _layers(),
        "shift": _shift(),
        "clustering": _clustering(rng),
        "clustering_summary": _clustering_summary(),
        "delta": _delta(rng),
        "mask_overlap": _mask_overlap(),
        "correlations": [
            {
                "measure": "jensen_shannon",
                "reduction": "per_batch_abs",
                "metric": "token_sequence",
                "n_models": 3,
                "models": ["full", "layer_lr", "lora"],
                "kendall_tau": 1.0,
                "p_value": 1 / 3,
                "note": "",
            }
        ],
        "training": _training(rng),
        "claims": _claims(),
        "timings": [
            {"step": "data", "seconds": 41.5, "peak_rss_bytes": 900_000_000},
            {"step": "methods/full/checkpoint", "seconds": 1405.0, "peak_rss_bytes": 3_100_000_000},
            {"step": "report", "seconds": 7405.0, "peak_rss_bytes": 3_100_000_000},
        ],
    }


def probe_row(model: str, kind: str, correct: int, n: int, margin: float) -> dict[str, Any]:
    share = correct / n
    return {
        "model": model, "kind": kind, "n": n, "correct": correct, "accuracy": share, "ci_low": share - 0.05,
        "ci_high": share + 0.05, "margin": margin, "loss_right": 2.0, "loss_wrong": 2.0 + margin,
    }  # fmt: skip


def _probe() -> list[dict[str, Any]]:
    kinds = (("all", 84), ("facts", 40), ("forms", 44))
    return [probe_row(model, kind, n - 10, n, 3.0) for model in ("base", *METHODS) for kind, n in kinds]


def _probe_comparisons() -> list[dict[str, Any]]:
    return [
        {
            "method": method, "kind": kind, "n": n, "n_seeds": 1, "accuracy_base": 0.9, "accuracy": 0.88,
            "only_base": 3, "only_method": 1, "difference": -0.02, "ci_low": -0.05, "ci_high": 0.01, "p_value": 0.625,
            "p_holm": 1.0, "margin_difference": -0.1, "margin_ci_low": -0.3, "margin_ci_high": 0.1,
            "loss_right_difference": 0.4, "loss_right_ci_low": 0.3, "loss_right_ci_high": 0.5,
        }
        for method in METHODS
        for kind, n in (("all", 84), ("facts", 40), ("forms", 44))
    ]  # fmt: skip


def drift_row(model: str, text: str, kl: float) -> dict[str, Any]:
    return {
        "model": model, "base": "base", "text": text, "tokens": "all", "n_texts": 100, "n_tokens": 6000,
        "kl": kl, "kl_ci_low": 0.9 * kl, "kl_ci_high": 1.1 * kl, "reverse_kl": 2 * kl, "reverse_kl_ci_low": 1.8 * kl,
        "reverse_kl_ci_high": 2.2 * kl, "agreement": 0.8, "agreement_ci_low": 0.78, "agreement_ci_high": 0.82,
        "loss_base": 3.0, "loss": 3.0 + kl, "loss_difference": kl, "loss_difference_ci_low": 0.8 * kl,
        "loss_difference_ci_high": 1.2 * kl, "new_tokens_share": 0.0,
    }  # fmt: skip


def general_text_row(model: str, nats: float) -> dict[str, Any]:
    return {
        "model": model, "text": "invented.txt", "n_texts": 50, "n_documents": 40, "n_windows": 60, "n_long": 10,
        "n_tokens": 4000, "n_bytes": 16_000, "loss": 4 * nats, "loss_ci_low": 3.9 * nats, "loss_ci_high": 4.1 * nats,
        "per_byte": nats, "per_byte_ci_low": 0.97 * nats, "per_byte_ci_high": 1.03 * nats, "perplexity": 54.6,
    }  # fmt: skip


def general_text_comparison(method: str, nats: float) -> dict[str, Any]:
    return {
        "method": method, "base": "base", "text": "invented.txt", "n": 40, "per_byte_base": 1.0,
        "per_byte": 1.0 + nats, "difference": nats, "ci_low": nats - 0.01, "ci_high": nats + 0.01,
        "per_token_difference": 4 * nats, "per_token_ci_low": 4 * nats - 0.04, "per_token_ci_high": 4 * nats + 0.04,
        "p_value": 0.001, "p_holm": 0.005, "detectable": 0.02, "verdict": "worse",
        "family": "general text (invented.txt), against the base", "n_family": 5, "left_out": None,
    }  # fmt: skip


def frontier_row(
    model: str, curve: str, point: float | None, kl: float, loss: float | None, pareto: bool
) -> dict[str, Any]:
    return {
        "model": model, "curve": curve, "varied": "learning_rate" if point else None, "point": point,
        "text_measure": "drift", "text_task": None, "text_better": "lower", "text": kl, "text_ci_low": 0.9 * kl,
        "text_ci_high": 1.1 * kl, "n_text": 200, "hearing_measure": "speech_loss", "hearing_task": None,
        "hearing_better": "lower", "hearing": loss, "hearing_ci_low": loss and loss - 0.1,
        "hearing_ci_high": loss and loss + 0.1, "n_hearing": 100, "n_seeds": 1,
        "pareto": None if loss is None else pareto,
    }  # fmt: skip


def equal_hearing_row(a: str, b: str, difference: float | None, p: float | None) -> dict[str, Any]:
    known = difference is not None
    return {
        "text_measure": "drift", "text_task": None, "text_better": "lower", "hearing_measure": "speech_loss",
        "hearing_task": None, "hearing_better": "lower", "position": "best", "method_a": a, "method_b": b,
        "points_a": 2, "points_b": 1, "seeds_a": 1, "seeds_b": 1, "hearing": 1.5 if known else None,
        "text_a": 0.3 if known else None, "text_b": 0.3 + difference if difference is not None else None,
        "difference": difference, "ci_low": difference - 0.05 if difference is not None else None,
        "ci_high": difference + 0.05 if difference is not None else None, "overlap": float(known),
        "test": "bootstrap_sign", "p_value": p and p / 2, "p_holm": p,
        "verdict": "not comparable" if p is None else "better" if p < 0.05 else "no difference shown",
        "family": "equal hearing, best: drift at equal speech_loss", "n_family": 2,
        "left_out": None if known else "no hearing in common",
    }  # fmt: skip


def predictor_row(predictor: str, partial: float | None) -> dict[str, Any]:
    known = partial is not None
    return {
        "text_measure": "general_text", "text_task": None, "predictor": predictor,
        "reduction": "per_batch_abs" if known else None, "at_equal": "speech_loss", "n_models": 6,
        "models": [f"m{i}" for i in range(6)], "spearman": 0.5, "partial": partial,
        "ci_low": partial and partial - 0.3, "ci_high": partial and partial + 0.1, "p_value": 0.04 if known else None,
        "p_holm": 0.08 if known else None, "n_family": 2, "beyond_change": 0.2 if known else None,
        "beyond_change_ci_low": -0.1 if known else None, "beyond_change_ci_high": 0.3 if known else None,
        "note": "" if known else "all models have the same value, or follow the speech loss alone",
    }  # fmt: skip


def restoration_row(a: str, b: str, layers_a: list[int] | None) -> dict[str, Any]:
    tuned = layers_a is None
    return {
        "of": "full", "method_a": a, "method_b": b, "layers_a": layers_a, "layers_b": [0, 1],
        "n_shared": None if tuned else 0, "measure": "drift", "task": None, "better": "lower", "n": 200,
        "value_a": 0.4, "value_b": 0.1, "difference": -0.3, "ci_low": -0.35, "ci_high": -0.25,
        "returned": 0.75 if tuned else None, "returned_ci_low": 0.7 if tuned else None,
        "returned_ci_high": 0.8 if tuned else None, "p_value": 0.0002, "p_holm": 0.0004, "verdict": "better",
        "family": "restoration of full, against the tuned model: drift", "n_family": 1, "left_out": None,
    }  # fmt: skip


def _deactivation() -> list[dict[str, Any]]:
    rows = []
    for model, factor in (("base", 1.0), ("full", 1.2), ("layer_lr", 1.1), ("lora", 1.05)):
        for modality, whole in (("text", 4.0), ("speech", 3.0)):
            if (model, modality) == ("base", "speech"):
                continue
            common = {
                "model": model,
                "modality": modality,
                "scope": "global",
                "reduction": "per_batch_abs",
                "n_examples": 100,
                "n_tokens": 4321,
            }
            for condition, times, seeds in (
                ("base", 1.0, (None,)),
                ("top", 30_000.0, (None,)),
                ("bottom", 1.05, (None,)),
                ("random", 2.0, (1, 2, 3)),
            ):
                for seed in seeds:
                    perplexity = whole * factor * times + (0.5 * (seed - 2) if seed else 0.0)
                    rows.append(
                        {
                            **common,
                            "condition": condition,
                            "ratio": 0.0 if condition == "base" else 0.03,
                            "seed": seed,
                            "n_removed": 0 if condition == "base" else 3_000_000,
                            "loss": float(np.log(perplexity)),
                            "perplexity": perplexity,
                        }
                    )
    return rows


def accuracy_row(method: str, task: str, modality: str, correct: int, n: int = 300) -> dict[str, Any]:
    """A qa record with a Wilson interval."""
    share, z = correct / n, 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {
        "method": method,
        "task": task,
        "modality": modality,
        "n": n,
        "correct": correct,
        "accuracy": share,
        "ci_low": float(max(0.0, middle - half)),
        "ci_high": float(min(1.0, middle + half)),
        "metric": "token_sequence",
        "metric_version": "1",
        "n_empty": 2,
        "n_failed": 1,
    }


def _qa() -> list[dict[str, Any]]:
    rows = []
    for task, typed in (("llama_questions", 79), ("facts", 120)):
        rows += [accuracy_row("base", task, "text", typed), accuracy_row("base", task, "cascade", typed - 14)]
        for method in METHODS:
            rows.append(accuracy_row(method, task, "text", typed - round(60 * SCALE[method])))
            rows.append(accuracy_row(method, task, "speech", round(10 - 6 * SCALE[method])))
    return rows


def speech_test(method: str, task: str, reference: str, share: float, against: float, p: float) -> dict[str, Any]:
    difference = share - against
    return {
        "method": method, "task": task, "metric": "token_sequence", "metric_version": "1", "reference": reference,
        "n": 300, "n_seeds": 1, "accuracy": share, "reference_accuracy": against, "difference": difference,
        "ci_low": difference - 0.02, "ci_high": difference + 0.02, "p_value": p / 4, "p_holm": p,
    }  # fmt: skip


def _floors() -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "task": task,
            "modality": "text",
            "metric": "token_sequence",
            "metric_version": "1",
            "floor": floor,
            "n": 300,
            "draws": 10 if floor == "unrelated" else 1,
            "value": value,
            "ci_low": value / 2,
            "ci_high": value * 2,
        }
        for task in ("llama_questions", "facts")
        for method in ("base", *METHODS)
        for floor, value in (("unrelated", 0.01), ("echo", 0.0), ("echo_in_sentence", 0.05))
    ]


def _perplexity() -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "task": "heldout",
            "modality": modality,
            "n_examples": 100,
            "n_tokens": 1234,
            "loss": 1.5,
            "perplexity": None if (method, modality) == ("full", "speech") else 4.482,
        }
        for method in ("base", *METHODS)
        for modality in ("text", "speech")
        if (method, modality) != ("base", "speech")
    ]


def comparison_row(task: str, before: str, after: str, difference: float, p: float) -> dict[str, Any]:
    return {
        "task": task,
        "modality": "text",
        "metric": "token_sequence",
        "method_a": before,
        "method_b": after,
        "n": 300,
        "only_a": 40,
        "only_b": 10,
        "difference": difference,
        "ci_low": difference - 0.05,
        "ci_high": difference + 0.05,
        "p_value": p / 4,
        "p_holm": p,
    }


def _comparisons() -> list[dict[str, Any]]:
    rows = []
    for task in ("llama_questions", "facts"):
        rows += [
            comparison_row(task, "base", "full", -0.2, 0.0001),
            comparison_row(task, "layer_lr", "base", 0.1, 0.003),  # the other way round on purpose
            comparison_row(task, "base", "lora", -0.06, 0.2),
            comparison_row(task, "full", "lora", 0.14, 0.001),
            comparison_row(task, "layer_lr", "lora", 0.04, 0.5),
        ]
    return rows


def _layers() -> list[dict[str, Any]]:
    rows = []
    for model, peak in PEAK.items():
        depth = np.arange(N_LAYERS)
        totals = 5.0 + 20.0 * np.exp(-((depth - peak) ** 2) / 12.0)
        for layer, total in enumerate(totals):
            rows.append(
                {
                    "model": model,
                    "modality": "text",
                    "reduction": "per_batch_abs",
                    "layer": layer,
                    "kind": "all",
                    "total": float(total),
                    "mean": float(total / 3_538_944),
                    "share": float(total / totals.sum()),
                    "n_parameters": 3_538_944,
                }
            )
    return rows


def _shift() -> list[dict[str, Any]]:
    return [
        {
            "model": method,
            "reference": "base",
            "modality": "text",
            "reduction": "per_batch_abs",
            "measure": measure,
            "value": 0.08 * SCALE[method] * factor,
            "ci_low": 0.07 * SCALE[method] * factor,
            "ci_high": 0.09 * SCALE[method] * factor,
            "noise_floor": 0.004 * factor,
            "n_batches": 20,
            "n_batches_other": 13,
        }
        for method in ("full", "layer_lr", "lora")
        for measure, factor in (("jensen_shannon", 1.0), ("wasserstein_1", 2.0))
    ]


def _clustering(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "of": of,
            "name": f"model.layers.{layer}.{kind}.weight",
            "layer": layer,
            "kind": kind,
            "measure": measure,
            "value": float(0.3 + 0.1 * rng.random()),
            "null_mean": 0.07,
            "null_std": 0.001,
            "z": None if layer == 15 else float(rng.normal(20, 5)),
        }
        for model, of in (("base", "importance"), ("layer_lr", "delta"), ("lora", "delta"))
        for layer in (0, 8, 15)
        for kind in ("q", "down")
        for measure in ("top5_rows", "top5_columns")
    ]


def _clustering_summary() -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "of": of,
            "kind": kind,
            "measure": measure,
            "n_matrices": 6,
            "n_undefined": 0,
            "ratio": ratio,
            "ci_low": 0.9 * ratio,
            "ci_high": 1.1 * ratio,
        }
        for model, of, ratio in (
            ("base", "importance", 5.0),
            ("layer_lr", "delta", 1.5),
            ("lora", "delta", 2.5),
            ("layer_lr", "delta_rank8", 1.2),
            ("lora", "delta_rank8", 1.4),
        )
        for kind in ("all", "q", "down")
        for measure in ("top5_rows", "top5_columns")
    ]


def _mask_overlap() -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "reference": "base",
            "name": name,
            "layer": layer,
            "kind": kind,
            "ratio": 0.03,
            "overlap": overlap,
            "overlap_by_chance": 0.03,
            "ci_low": overlap - 0.05 if layer is None else None,
            "ci_high": overlap + 0.05 if layer is None else None,
            "noise_floor": 0.6,
        }
        for model, overlap in (("full", 0.4), ("layer_lr", 0.5), ("lora", 0.55))
        for name, layer, kind in (("model.layers.0.q.weight", 0, "q"), ("all", None, "all"))
    ]


def _delta(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "name": f"model.layers.{layer}.{kind}.weight",
            "layer": layer,
            "kind": kind,
            "relative_norm": float(0.02 * SCALE[method] * (1 + rng.random())),
            "overlap_with_importance": float(0.05 + 0.01 * rng.random()),
            "overlap_by_chance": 0.03,
        }
        for method in ("full", "layer_lr", "lora")
        for layer in (0, 8, 15)
        for kind in ("q", "down")
    ]


def _training(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "step": step,
            "epoch": step / 120,
            "loss": float(2.0 + 2.5 * np.exp(-step / (60 / SCALE[method])) + 0.05 * rng.normal()),
            "learning_rate": 2e-5,
        }
        for method in ("full", "layer_lr", "lora")
        for step in range(1, 361)
    ] + [
        eval_row(method, step, modality, whole * float(1 + SCALE[method] * step / 300))
        for method in ("full", "layer_lr", "lora")
        for step in (120, 240, 360)
        for modality, whole in (("text", 4.5), ("speech", 30.0))
    ]


def eval_row(method: str, step: int, modality: str, perplexity: float) -> dict[str, Any]:
    """A training record of a measurement between steps."""
    return {
        "method": method,
        "kind": "eval",
        "step": step,
        "epoch": step / 120,
        "learning_rate": None,
        "modality": modality,
        "n_tokens": 1234,
        "loss": float(np.log(perplexity)),
        "perplexity": perplexity,
    }


def deletion_rows(
    model: str, modality: str, whole: float, of: dict[tuple[str, float, int | None], float | None], **changed: Any
) -> list[dict[str, Any]]:
    """Deactivation records: `whole` with nothing removed, `of` (condition, ratio, seed) -> perplexity."""
    common = {
        **{"model": model, "modality": modality, "scope": "global", "reduction": "per_batch_abs"},
        **{"n_examples": 100, "n_tokens": 4321, "n_removed": 1, **changed},
    }
    points = {("base", 0.0, None): whole, **of}
    return [
        {
            **common,
            "condition": condition,
            "ratio": ratio,
            "seed": seed,
            "loss": None if value is None else float(np.log(value)),
            "perplexity": value,
        }
        for (condition, ratio, seed), value in points.items()
    ]


def _claims() -> list[dict[str, Any]]:
    verdicts = ("holds", "holds", "holds", "undecided", "fails", "undecided", "holds", "undecided")
    return [
        {
            "claim": claim,
            "statement": f"An invented statement of claim {claim}, long enough to fill more than one line.",
            "measure": "an invented measure",
            "value": None if claim == 8 else 0.123 * claim,
            "ci_low": None if claim == 8 else 0.1 * claim,
            "ci_high": None if claim == 8 else 0.15 * claim,
            "verdict": verdict,
            "note": "An invented note.",
        }
        for claim, verdict in enumerate(verdicts, start=1)
    ]


def _write_maps(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    names = {
        f"model.layers.{layer}.{kind}.weight": shape
        for layer in (0, 8, 15)
        for kind, shape in (
            ("self_attn.q_proj", (96, 96)),
            ("self_attn.o_proj", (96, 96)),
            ("mlp.up_proj", (128, 96)),
            ("mlp.down_proj", (96, 128)),
        )
    }

    def banded(shape: tuple[int, int], strength: float) -> Any:
        rows, columns = (np.exp(strength * rng.normal(size=size)) for size in shape)
        return (np.outer(rows, columns) * np.abs(rng.normal(size=shape))).astype(np.float32)

    importance = {f"base|{name}": 1e-4 * banded(shape, 1.0) for name, shape in names.items()}
    delta = {
        f"{method}|{name}": np.float32(1e-4 * SCALE[method]) * banded(shape, 1.0 if method == "lora" else 0.2)
        for method in ("full", "layer_lr", "lora")
        for name, shape in names.items()
    }
    np.savez_compressed(folder / "importance.npz", **{k: v.astype(np.float32) for k, v in importance.items()})  # type: ignore[arg-type]
    np.savez_compressed(folder / "delta.npz", **{k: v.astype(np.float32) for k, v in delta.items()})  # type: ignore[arg-type]


def _write_samples(path: Path, hostile: bool, n_questions: int) -> None:
    for method in ("base", *METHODS):
        folder = path / "base" if method == "base" else path / "methods" / method
        for task in ("llama_questions", "facts"):
            for modality in ("text", "cascade") if method == "base" else ("text", "speech"):
                rows = [
                    {
                        "id": f"q{index}",
                        "question": f"Invented question {index}: what is the capital of Inventia?",
                        "response": _response(index, method, hostile),
                        "answers": ["Invent City", "the Invented City"],
                        "verdicts": {"token_sequence": index % 3 == 0, "substring": index % 2 == 0},
                        "n_new_tokens": 12,
                        "failed": index == 4,
                    }
                    for index in range(n_questions)
                ]
                write_jsonl(folder / "samples" / f"{task}-{modality}" / "samples.jsonl", rows)


def _write_data(folder: Path, n_questions: int) -> None:
    """Manifests of the tasks; every question has the same recording, a tone of a fifth of a second."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(3200) / 16000)
    soundfile.write(folder / "audio" / "tone.wav", tone.astype(np.float32), 16000)
    for task in ("llama_questions", "facts"):
        rows = [{"id": f"q{i}", "audio": "audio/tone.wav", "voice": "invented"} for i in range(n_questions)]
        write_jsonl(folder / f"task-{task}.jsonl", rows)


def _response(index: int, method: str, hostile: bool) -> str:
    if index == 0 and hostile:
        return HOSTILE
    if index == 1:
        return ""
    if index == 2:
        return "an answer that loops " * 200
    return f"The capital of Inventia is Invent City, says {method}.\n\nIt is number {index}."
