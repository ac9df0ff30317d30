"""Long commands on tiny models, each with its inputs and with what its finished folder comes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tiny import tiny_speech_lm
from tiny_study import numbered
from tiny_study import write_inputs as write_tiny_inputs

METHODS = ("full", "layer_lr", "lora")


@dataclass(frozen=True)
class Job:
    """A command that is started, stopped and started again in one folder."""

    name: str
    arguments: list[str]  # to which the folder comes
    outcome: Callable[[Path], Any]  # folder -> what must be the same, JSON
    option: str = "--out"  # which names the folder, …
    inside: str = ""  # … or this one in it
    done: Callable[[Path], bool] = lambda _: False  # folder -> whether it must not be started again


def write_inputs(folder: Path) -> None:
    """Tiny checkpoints and a speech LLM, manifests with noise for speech, a table of questions, and a recipe."""
    splits = numbered(24, 6, "What is {split} {i}?", "It is {i}.")
    write_tiny_inputs(folder, splits, lambda i: 64_000 + 1_600 * (i % 5))
    for part in tiny_speech_lm():
        part.save_pretrained(folder / "speech_lm")
    text = [{"id": f"t{i}", "question": f"What is {i} and {i + 1}?", "answer": f"{2 * i + 1}"} for i in range(30)]
    _write_lines(folder / "text.jsonl", text)
    recipe = {
        "name": "tiny",
        "models": {"language_model": str(folder / "llm"), "encoder": str(folder / "whisper"), "compute": "float32"},
        "speech": {"adaptor_hidden_size": 24, "calibrate_adaptor": True},
        "data": {
            "train": {"source": str(folder / "train.jsonl"), "split": "train"},
            "heldout": {"source": str(folder / "heldout.jsonl"), "split": "heldout"},
        },
        "methods": {kind: {"kind": kind, "learning_rate": 1e-3, "rank": 2} for kind in METHODS},
        "training": {
            "epochs": 2,
            "batch_size": 4,
            "checkpoint_every": 2,
            "align": {"epochs": 2, "warmup_steps": 2, "batch_size": 8},
            "adaptor_first": {"epochs": 1, "learning_rate": 1e-3},
        },
        "importance": {"n_examples": 20, "batch_size": 2},
        "deactivation": {"random_seeds": 2},
        "analysis": {"shuffles": 1, "bootstrap": 100},
        "evaluation": {
            "tasks": [{"name": "numbers", "source": str(folder / "heldout.jsonl"), "split": "heldout"}],
            "max_new_tokens": 4,
            "batch_size": 2,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def jobs(inputs: Path) -> dict[str, Job]:
    model, heldout = str(inputs / "llm"), str(inputs / "heldout.jsonl")
    found = [
        Job("study", ["study", str(inputs / "recipe.yaml")], _results),
        Job(
            "evaluate",
            [
                *("evaluate", "--model", model, "--task", heldout, "--split", "heldout", "--batch-size", "1"),
                *("--max-new-tokens", "4", "--perplexity"),
            ],
            _answers,
        ),
        Job(
            "validate-importance",
            [
                *("validate-importance", "--model", model, "--data", heldout, "--splits", "heldout"),
                *("--limit", "2", "--weights", "500"),
            ],
            lambda out: json.loads((out / "records.json").read_text()),
        ),
        Job("data prepare", ["data", "prepare", str(inputs / "text.jsonl"), "--workers", "1"], _prepared),
        Job(
            "export",
            ["export", str(inputs / "speech_lm")],
            lambda out: _digests(out / "model"),
            "--speech-lm",
            "model",
            lambda out: (out / "model").exists(),  # it writes into a folder that has nothing in it, once
        ),
    ]
    return {job.name: job for job in found}


def _results(out: Path) -> Any:
    """results.json without what is measured anew each time, and the weights that training ended with."""
    results = json.loads((out / "results.json").read_text())
    del results["timings"]
    weights = sorted(out.glob("methods/*/checkpoint/*.safetensors"))
    return [results, {path.relative_to(out).as_posix(): _digest(path) for path in weights}]


def _answers(out: Path) -> Any:
    rows = {file.name: _read_lines(file) for file in sorted(out.glob("*.jsonl"))}
    results = {file.name: json.loads(file.read_text()) for file in sorted(out.glob("results-*.json"))}
    for row in [row for file in rows.values() for row in file]:
        row.pop("seconds", None)  # of an answer
    return [rows, {name: result["qa"] for name, result in results.items()}]


def _digests(out: Path) -> Any:
    return {path.relative_to(out).as_posix(): _digest(path) for path in sorted(out.rglob("*")) if path.is_file()}


def _prepared(out: Path) -> Any:
    return [{file.name: _read_lines(file) for file in sorted(out.glob("*.jsonl"))}, _digests(out / "audio")]


def _write_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
