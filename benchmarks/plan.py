"""Peak memory of training against `palimpsest plan`, on real models.

    python benchmarks/plan.py runs/plan                  # recipes/demo.yaml: SmolLM2-135M, three methods, batch 8
    python benchmarks/plan.py runs/plan --checkpointing --methods full lora

The recipe's data is made in the given folder as a study would make it (and kept there). Then each method trains in a
process of its own, on the longest example and a random choice of others, with the real train(). Measured is the peak of
the process's resident memory from the moment the model is loaded, twice: as it is, and "in use", with glibc told to map
large blocks and give them back when freed. The plan says both: with and without what the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from palimpsest.config import StudyConfig, load_config
from palimpsest.models.anatomy import scored_parameters
from palimpsest.planning.plan import Assumptions, make_plan
from palimpsest.training.remedies import OWN

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="run directory for the recipe's data")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "demo.yaml")
    parser.add_argument("--methods", nargs="*", help="default: all of the recipe")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()

    config = load_config(options.recipe)
    config = config.model_copy(update={"models": replace(config.models, device="cpu", compute=options.compute)})
    if options.checkpointing:
        training = replace(config.training, gradient_checkpointing=True)
        config = config.model_copy(update={"training": training})
    if options.measure:
        print(json.dumps(measure(config, options.folder, options.measure, options.batches)))
        return

    make_data(config, options.folder)
    plan = make_plan(config, Assumptions())
    rows = []
    print(f"{'':<12} {'peak, GB':^26}   {'in use, GB':^26}")
    print(f"{'method':<12} {'planned':>8} {'measured':>9} {'error':>7}   {'planned':>8} {'measured':>9} {'error':>7}   "
          "longest row: planned, real")  # fmt: skip
    for method in plan.methods:
        if options.methods and method.name not in options.methods:
            continue
        row: dict[str, Any] = {"method": method.name, "rows": method.batch.rows, "planned_length": method.batch.length}
        for key, planned, environment in (
            ("peak", method.memory.peak, {}),
            ("in_use", method.memory.in_use, GIVE_BACK),
        ):
            found = in_a_process(options, method.name, environment)
            row |= {f"{key}_planned": planned, f"{key}_measured": found["peak"], "length": found["longest"]}
            row[f"{key}_error"] = planned / found["peak"] - 1
        rows.append(row)
        figures = "   ".join(
            f"{row[f'{key}_planned'] / 1e9:>8.2f} {row[f'{key}_measured'] / 1e9:>9.2f} {row[f'{key}_error']:>+7.1%}"
            for key in ("peak", "in_use")
        )
        print(f"{method.name:<12} {figures}   {row['planned_length']}, {row['length']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def make_data(config: StudyConfig, folder: Path) -> None:
    """data/, features/ and tokens/ of the study, and what the base writes to be replayed; resumed if they are there."""
    from palimpsest.study import steps
    from palimpsest.study.run import Study

    study = Study(config, folder)
    steps.data(study.ws)
    steps.features(study.ws)
    if any(replay.text == OWN for replay in study.ws.replays):
        steps.replay_text(study.ws)
    if config.speech.tokens is not None:
        steps.tokens(study.ws)


def in_a_process(options: argparse.Namespace, method: str, environment: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, __file__, str(options.folder), "--recipe", str(options.recipe), "--measure", method]
    command += [
        "--batches",
        str(options.batches),
        "--compute",
        options.compute,
        *(["--checkpointing"] if options.checkpointing else []),
    ]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(config: StudyConfig, folder: Path, name: str, batches: int) -> dict[str, int]:
    """Resident bytes after loading, and at the peak of training; the longest row there was."""
    from palimpsest.progress import Reporter
    from palimpsest.study.workspace import Workspace
    from palimpsest.training.keep import Keep
    from palimpsest.training.train import Settings, train

    workspace = Workspace(config, folder, Reporter(1))
    method = config.methods[name]
    collator = workspace.collator(method.modality, "train", name)
    training = config.training
    examples = sorted(workspace.groups["train"], key=collator.length)
    chosen = [examples.pop(), *random.Random(0).sample(examples, batches * training.batch_size - 1)]
    model = workspace.new_speech_lm(name)
    n_layers = model.language_model.config.num_hidden_layers
    # Which weights are the most important makes no difference to the memory; that there are scores does.
    weighs = {by: method.weighs_by(by) for by in ("importance", "fisher")}
    scored = scored_parameters(model) if any(weighs.values()) else {}
    scores = {name: torch.rand(weight.shape) for name, weight in scored.items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            chosen,
            collator,
            method,
            Settings(
                epochs=1,
                batch_size=training.batch_size,
                accumulation=training.accumulation,
                gradient_checkpointing=training.gradient_checkpointing,
                compute=workspace.compute.dtype,
            ),
            Path(out),
            name=name,
            scales={layer: 1.0 - 0.4 * layer / n_layers for layer in range(n_layers)},
            replay=() if method.replay is None else workspace.replay_rows(method.replay),
            keep=Keep(
                importance=scores if weighs["importance"] else None,
                fisher=scores if weighs["fisher"] else None,
            ),
        )
    return {"peak": status("VmHWM"), "longest": max(map(collator.length, chosen))}


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
