"""A small run directory made by hand for the tests of the UI: tiny models, and importance whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from palimpsest.config import dump_config, parse_config
from palimpsest.files import write_json, write_text
from palimpsest.importance.scores import Scores
from tiny import save_tiny_models, tiny_speech_lm

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
BASE_Q = np.array([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]], dtype=np.float32)  # rows 4, 0; columns 1, 0, 3
FULL_Q = 2 * BASE_Q
MISSING = "lora"  # the method without a checkpoint and without scores


def make_ui_run(folder: Path) -> Path:
    """`folder`/run: the methods full (tiny, trained on nothing) and lora (missing); no recogniser."""
    save_tiny_models(folder)
    run = folder / "run"
    methods = {kind: {"kind": kind, "learning_rate": 1e-3} for kind in ("full", MISSING)}
    source = {"source": "facts", "split": "train"}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "models": {
            "language_model": str(folder / "llm"),
            "encoder": str(folder / "whisper"),
            "device": "cpu",
            "compute": "float32",
        },
        "data": {"train": source, "heldout": {"source": "facts", "split": "heldout"}},
        "methods": methods,
        "evaluation": {"tasks": [{"name": "facts", "source": "facts", "split": "heldout"}], "max_new_tokens": 4},
    }
    write_text(run / "study.yaml", dump_config(parse_config(recipe, "test")))
    model, processor = tiny_speech_lm()
    model.save_pretrained(run / "methods" / "full" / "checkpoint")
    processor.save_pretrained(run / "methods" / "full" / "checkpoint")
    write_scores(run / "base" / "importance", BASE_Q)
    write_scores(run / "methods" / "full" / "importance", FULL_Q)
    layers = [
        layer_row(model, layer, kind, mean)
        for model, times in (("base", 1.0), ("full", 2.0))
        for layer, kind, mean in ((0, "q", 1.0), (1, "up", 3.0 * times))
    ]
    write_json(run / "results.json", {"schema": 1, "layers": layers})
    soundfile.write(folder / "question.wav", 0.1 * np.random.default_rng(0).normal(size=8000), 16_000)
    return run


def write_scores(folder: Path, q: np.ndarray[Any, Any]) -> None:
    tensors = {Q: torch.from_numpy(q), UP: torch.ones(4, 3)}
    parameters = [
        {"name": name, "shape": list(t.shape), "dtype": "float32", "sha256": ""} for name, t in tensors.items()
    ]
    Scores({"parameters": parameters}, {"per_batch_abs": tensors}, np.ones((2, 2)), np.array([1, 1])).save(folder)


def layer_row(model: str, layer: int, kind: str, mean: float) -> dict[str, Any]:
    return {
        **{"model": model, "modality": "text", "reduction": "per_batch_abs", "layer": layer, "kind": kind},
        **{"total": 12 * mean, "mean": mean, "share": 0.5, "n_parameters": 12},
    }
