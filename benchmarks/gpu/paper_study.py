"""A whole study of a paper's recipe on random weights of its real shapes: does it run, how long, in what memory?

    PYTHONPATH=src python benchmarks/gpu/paper_study.py OUT.json                # paper-1b on CUDA, 80 GB; 60 GB of disk
    PYTHONPATH=src python benchmarks/gpu/paper_study.py OUT.json --tiny         # tiny shapes on the CPU, a minute

The recipe as it ships, but for where models and data come from and how many there are of them: language model and
encoder are drawn at random in the recipe's shapes, questions are noise with made-up answers, `--examples` of them to
train on, and there is no recogniser, so no cascade. Nothing is downloaded. Every number in its results is meaningless;
that there is one for everything is what is checked. Needs all packages that palimpsest needs. `--folder` is where
models, data and the run lie; started again with the same one, it continues. paper-8b fits one GPU of 80 GB with
`--recipe paper-8b --methods lora`, and 200 GB of disk.

Printed and written for every step: seconds, peak of the device's memory (torch.cuda.max_memory_allocated), and what
`palimpsest plan` says of it, without what lies outside PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import TINY, byte_tokenizer, describe_machine, require_cuda, require_packages
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel

NEEDED = {
    "pydantic": "pydantic", "annotated_types": "annotated-types", "soundfile": "soundfile", "soxr": "soxr",
    "scipy": "scipy", "matplotlib": "matplotlib", "jinja2": "jinja2", "rich": "rich", "yaml": "pyyaml", "peft": "peft",
    "accelerate": "accelerate",
}  # fmt: skip
RECIPES = Path(__file__).parents[2] / "src" / "palimpsest" / "recipes"
SHAPES = {"paper-1b": "llama-3.2-1b", "paper-8b": "llama-3.1-8b"}
ENCODER = "whisper-large-v3"
RATE = 16_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the measurements")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--recipe", choices=list(SHAPES), default="paper-1b")
    parser.add_argument("--examples", type=int, default=128, help="to train on")
    parser.add_argument("--methods", nargs="*", help="of the recipe; default: all")
    parser.add_argument("--folder", type=Path, help="kept; without it a temporary one")
    options = parser.parse_args()
    require_packages(NEEDED)
    device = require_cuda(options.tiny)
    machine = describe_machine(device)
    print(machine.get("gpu", "CPU, dry run"), "| torch", machine["versions"]["torch"], flush=True)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="paper-study-"))
    try:
        measured = measure(options, folder, device)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, **measured}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}, {measured['seconds']:.0f} s in all, {measured['disk_gb']:.1f} GB of disk")


def measure(options: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Any]:
    from palimpsest.planning.plan import Assumptions, make_plan
    from palimpsest.study.run import Study

    started = time.perf_counter()
    make_models(folder, options.recipe, tiny=options.tiny)
    make_data(folder, options.examples)
    config = recipe(folder, options)
    print(f"models and data made in {time.perf_counter() - started:.0f} s", flush=True)

    plan = make_plan(config, Assumptions())
    study = Study(config, folder / "run")
    study.ws.reporter = measuring_reporter(len(study.steps) + 2, device)
    study.run()

    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    require_results(results, config)
    planned = {f"methods/{method.name}/checkpoint": method.memory.peak for method in plan.methods}
    planned |= {step.name: step.peak for step in plan.steps}
    rows = [{**row, "planned_gb": planned_of(row["step"], planned, device)} for row in study.ws.reporter.rows]
    print(f"{'step':<44} {'s':>8} {'peak GB':>8} {'planned':>8}")
    for row in rows:
        peak, wanted = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("peak_gb", "planned_gb"))
        print(f"{row['step']:<44} {row['seconds']:>8.1f} {peak:>8} {wanted:>8}")
    n_bytes = sum(file.stat().st_size for file in (folder / "run").rglob("*") if file.is_file())
    return {
        "recipe": config.model_dump(mode="json"),
        "steps": rows,
        "seconds": time.perf_counter() - started,
        "disk_gb": n_bytes / 1e9,
        "planned_disk_gb": sum(step.kept for step in plan.disk) / 1e9,
        "tables": {name: len(table) for name, table in results.items() if isinstance(table, list)},
    }


def measuring_reporter(n_steps: int, device: torch.device) -> Any:
    """A reporter that remembers of every step its seconds and the peak of the device's memory."""
    from palimpsest.progress import Reporter

    class Measuring(Reporter):
        def __init__(self) -> None:
            super().__init__(n_steps)
            self.rows: list[dict[str, Any]] = []

        @contextmanager
        def step(self, name: str) -> Iterator[Any]:
            cuda = device.type == "cuda"
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with super().step(name) as advance:
                yield advance
            if cuda:
                torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
            self.rows.append({"step": name, "seconds": time.perf_counter() - start, "peak_gb": peak})

    return Measuring()


def planned_of(step: str, planned: dict[str, int], device: torch.device) -> float | None:
    """The plan's entry for a step of the run, in GB: those of trained models stand under methods/NAME there."""
    from palimpsest.planning.memory import RUNTIME_BYTES

    last = step.rpartition("/")[2]
    names = [step, step.removesuffix("_other"), f"methods/NAME/{last}", last]
    names += ["answers"] * ("/samples/" in step)
    found = next((planned[name] for name in names if name in planned), None)
    return None if found is None else (found - RUNTIME_BYTES[device.type]) / 1e9


def require_results(results: dict[str, Any], config: Any) -> None:
    """End with an error where a model has no number, or its training no finite loss."""
    for name in config.methods:
        losses = [row["loss"] for row in results["training"] if row["method"] == name]
        if not losses or not all(loss is not None and math.isfinite(loss) for loss in losses):
            raise SystemExit(f"{name} has no finite training loss: {losses}")
    for table in ("layers", "shift", "clustering", "deactivation", "qa", "perplexity", "probe", "claims"):
        if not results[table]:
            raise SystemExit(f"results.json has no {table}")


# ---------------------------------------------------------------------------------------------------------------------
# Random models, made-up data, the recipe with them
# ---------------------------------------------------------------------------------------------------------------------
def make_models(folder: Path, recipe_name: str, *, tiny: bool) -> None:
    """`folder`/llm and `folder`/whisper, as transformers writes them; Whisper's decoder is a layer that nobody runs."""
    from palimpsest.planning.sizes import DECODERS, ENCODERS

    if (folder / "whisper" / "preprocessor_config.json").exists():
        return
    torch.manual_seed(0)
    decoder = TINY["decoder"] if tiny else DECODERS[SHAPES[recipe_name]]
    encoder = TINY["encoder"] if tiny else ENCODERS[ENCODER]
    tokenizer = byte_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**decoder, **ids), dtype=torch.float32)
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    del model
    sizes = {"decoder_layers": 1, "decoder_attention_heads": encoder["encoder_attention_heads"], "decoder_ffn_dim": 64}
    WhisperModel(WhisperConfig(**encoder, **sizes)).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=encoder["num_mel_bins"]).save_pretrained(folder / "whisper")


def make_data(folder: Path, n_train: int) -> None:
    """Manifests of questions with one to eight seconds of noise as their speech."""
    import soundfile

    rng = np.random.default_rng(0)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for split, n in (("train", n_train), ("llama_questions", 16), ("web_questions", 16)):
        if (folder / f"{split}.jsonl").exists():
            continue
        rows = []
        for i in range(n):
            name = f"audio/{split}-{i}.wav"
            soundfile.write(folder / name, rng.normal(0, 0.1, int(RATE * rng.uniform(1, 8))), RATE)
            answer = " ".join(f"w{k}" for k in rng.integers(0, 1000, int(rng.integers(5, 25))))
            rows.append({"id": f"{split}{i}", "question": f"What is {i} of {split}?", "answer": answer, "audio": name})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe(folder: Path, options: argparse.Namespace) -> Any:
    import yaml

    from palimpsest.config import parse_config

    path = RECIPES / f"{options.recipe}.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    chosen = options.methods or list(values["methods"])
    values["methods"] = {name: values["methods"][name] for name in chosen}
    values["models"] |= {"language_model": str(folder / "llm"), "encoder": str(folder / "whisper"), "asr": None}
    held_out = min(16, options.examples // 4)
    values["data"] |= {"train": {"source": str(folder / "train.jsonl"), "split": "train"}, "heldout_examples": held_out}
    values["importance"]["n_examples"] = min(32, options.examples // 2)
    values["analysis"] = {"shuffles": 1, "rank_draws": 0, "bootstrap": 100}
    values["deactivation"]["random_seeds"] = 2
    for task in values["evaluation"]["tasks"]:
        task |= {"source": str(folder / f"{task['name']}.jsonl"), "split": "test"}
    if options.tiny:
        values["models"]["device"] = "cpu"
        values["speech"] |= {"adaptor_hidden_size": 24, "length": "trim"}
        values["evaluation"]["max_new_tokens"] = 4
    return parse_config(values, str(path))


if __name__ == "__main__":
    main()
