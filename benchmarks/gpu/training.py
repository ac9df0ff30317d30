"""Speed and memory of training at the size of real models, on one GPU, against `palimpsest plan`.

    PYTHONPATH=src python benchmarks/gpu/training.py OUT.json            # CUDA, 80 GB; about five minutes
    PYTHONPATH=src python benchmarks/gpu/training.py OUT.json --tiny     # a tiny model on the CPU

Llama-3.2-1B and Llama-3.1-8B shapes behind a Whisper large-v3 encoder, all with random weights, so nothing is
downloaded. Each case is the real `train()`, with the Trainer, our loss, our parameter groups and cached encoder frames
(random ones, of `--seconds` of speech), on sequences of about `--length` tokens. The 1B cases hold float32 weights and
compute in bf16, as recipes/paper-1b.yaml does; the 8B cases hold bf16 weights with gradient checkpointing, which is
what fits on one GPU: they measure speed and memory, not learning.

A case's time is the median of its optimizer steps after `WARM_UP`. tokens/s counts tokens without padding; MFU is
`planning.memory.step_flops` of these tokens over the GPU's published dense bf16 FLOP/s, recomputation not counted.
`peak` is torch.cuda.max_memory_allocated; `planned` the plan's peak without what lies outside PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import TINY, byte_tokenizer, describe_machine, require_cuda
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from palimpsest.data.collate import Collator
from palimpsest.data.examples import Example
from palimpsest.data.features import Features
from palimpsest.data.shards import claim, read_shard, shard_name, write_shard
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.processor import SpeechLMProcessor
from palimpsest.models.speech_lm import SpeechLM
from palimpsest.planning.memory import RUNTIME_BYTES, Batch, Decoder, Encoder, Setup, largest_rows, memory, step_flops
from palimpsest.planning.sizes import DECODERS, ENCODERS
from palimpsest.training.methods import Method
from palimpsest.training.train import Settings, train

WARM_UP = 3  # steps: allocator, kernels' own tuning


@dataclass(frozen=True)
class Case:
    shape: str
    method: str
    weights: str  # dtype
    checkpointing: bool
    rows: int


CASES = (
    Case("llama-3.2-1b", "full", "float32", False, 16),
    Case("llama-3.2-1b", "layer_lr", "float32", False, 16),
    Case("llama-3.2-1b", "lora", "float32", False, 16),
    Case("llama-3.2-1b", "full", "bfloat16", False, 16),
    Case("llama-3.1-8b", "full", "bfloat16", True, 16),
    Case("llama-3.1-8b", "layer_lr", "bfloat16", True, 16),
    Case("llama-3.1-8b", "lora", "bfloat16", True, 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the measurements")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--shapes", nargs="*", choices=sorted({case.shape for case in CASES}))
    parser.add_argument("--steps", type=int, default=12, help=f"measured, after {WARM_UP} for warming up")
    parser.add_argument("--rows", type=int, help="of a batch; default 16, or what fits")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest sequence")
    parser.add_argument("--seconds", type=float, default=6.0, help="of speech in each")
    parser.add_argument("--stop-after", type=float, default=480, help="seconds after which no further case is begun")
    options = parser.parse_args()
    started = time.perf_counter()
    device = require_cuda(options.tiny)
    machine = describe_machine(device)
    print(
        machine.get("gpu", "CPU, dry run"), "| torch", machine["versions"]["torch"], "| fused loss:", fused_loss(device)
    )
    print(f"{'shape':<14} {'method':<9} {'weights':<9} {'batch':>9} {'s/step':>8} {'tokens/s':>9} {'MFU':>6} "
          f"{'peak GB':>8} {'planned':>8} {'error':>7}")  # fmt: skip
    cases = [Case("tiny", m, "float32", False, 2) for m in ("full", "layer_lr", "lora")] if options.tiny else CASES
    rows: list[dict[str, Any]] = []
    for case in cases:
        if options.shapes and case.shape not in options.shapes:
            continue
        if time.perf_counter() - started > options.stop_after:
            row: dict[str, Any] = {**vars(case), "skipped": "out of time"}
        else:
            row = measure(case, options, device, machine)
        rows.append(row)
        show(row)
        # Written after every case: a later one that fails takes nothing away.
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}, {time.perf_counter() - started:.0f} s in all")


def measure(case: Case, options: argparse.Namespace, device: torch.device, machine: dict[str, Any]) -> dict[str, Any]:
    """One case: the model made, trained for some steps, thrown away."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = random_speech_lm(case, device)
    setup = setup_of(case, model, device)
    with tempfile.TemporaryDirectory() as folder:
        collator, make = synthetic_data(model, options, Path(folder))
        examples = make(64)
        lengths = [collator.length(example) for example in examples]
        answers = [len(collator.processor.answer(example.answer)) for example in examples]
        positions = int(options.seconds * 50) // setup.stack_factor
        batch = Batch(case.rows, max(lengths), positions, round(statistics.mean(answers)),
                      max(lengths) - min(n - a for n, a in zip(lengths, answers, strict=True)))  # fmt: skip
        if options.rows:
            batch = replace(batch, rows=options.rows)
        elif device.type == "cuda":
            capacity = torch.cuda.get_device_properties(device).total_memory
            batch = replace(batch, rows=min(batch.rows, largest_rows(setup, batch, int(0.95 * capacity))))
        if batch.rows == 0:
            return {**vars(case), "skipped": f"does not fit: {memory(setup, replace(batch, rows=1)).peak / 1e9:.1f} GB"}
        n_steps = WARM_UP + options.steps
        chosen = [replace(examples[i % 64], id=f"{i}") for i in range(n_steps * batch.rows)]
        collator = replace(collator, features=Repeated(collator.features))
        times = [time.perf_counter()]

        def tick(done: int, total: int) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        n_layers = setup.decoder.layers
        try:
            records = train(
                model, chosen, collator, Method(case.method, learning_rate=1e-5, rank=8),  # type: ignore[arg-type]
                Settings(epochs=1, batch_size=batch.rows, compute="bfloat16" if device.type == "cuda" else "float32",
                         gradient_checkpointing=case.checkpointing),
                Path(folder), name=case.method,
                scales={layer: 1.0 - 0.4 * layer / n_layers for layer in range(n_layers)}, progress=tick,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            return {**vars(case), "skipped": "out of memory", "planned_gb": memory(setup, batch).peak / 1e9}
    per_step = [b - a for a, b in itertools.pairwise(times)][WARM_UP:]
    seconds = statistics.median(per_step)
    tokens = batch.rows * statistics.mean(lengths)
    flops = step_flops(setup, tokens, statistics.mean(lengths), batch.rows * batch.positions,
                       batch.rows * statistics.mean(answers))  # fmt: skip
    planned = (memory(setup, batch).peak - RUNTIME_BYTES[setup.device]) / 1e9
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    speed = machine.get("published_bf16_flops")
    return {
        **vars(case),
        "batch": f"{batch.rows} x {batch.length}",
        "seconds_per_step": seconds,
        "all_seconds": per_step,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / speed if speed else None,
        "peak_gb": peak,
        "planned_gb": planned,
        "plan": {**vars(memory(setup, batch))},
        "loss": [records[0]["loss"], records[-1]["loss"]],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Random model, random data
# ---------------------------------------------------------------------------------------------------------------------
def random_speech_lm(case: Case, device: torch.device) -> SpeechLM:
    torch.manual_seed(0)
    dtype = getattr(torch, case.weights)
    decoder = TINY["decoder"] if case.shape == "tiny" else DECODERS[case.shape]
    encoder = TINY["encoder"] if case.shape == "tiny" else ENCODERS["whisper-large-v3"]
    config = AutoConfig.for_model(**decoder)
    with device:
        language_model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        whisper = WhisperEncoder(WhisperConfig(**encoder)).to(dtype)
    return SpeechLM.from_parts(whisper, language_model, adaptor_hidden_size=2048).to(device)


def setup_of(case: Case, model: SpeechLM, device: torch.device) -> Setup:
    config = model.language_model.config
    matrices = list(scored_parameters(model).values())
    decoder = Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        parameters=sum(p.numel() for p in model.language_model.parameters()),
        matrices=sum(matrix.numel() for matrix in matrices),
        lora_sides=sum(sum(matrix.shape) for matrix in matrices),
    )
    whisper = model.encoder.config
    encoder = Encoder(sum(p.numel() for p in model.encoder.parameters()), whisper.d_model, whisper.encoder_layers)
    return Setup(
        decoder, encoder, case.method, rank=8, weight_bytes=4 if case.weights == "float32" else 2,  # type: ignore[arg-type]
        autocast=device.type == "cuda", checkpointing=case.checkpointing, fused_loss=fused_loss(device),
        device="cuda" if device.type == "cuda" else "cpu",
    )  # fmt: skip


def fused_loss(device: torch.device) -> bool:
    """Whether training takes Liger's loss, as `training.liger: auto` does."""
    fields = Settings.__dataclass_fields__
    return "liger" in fields and device.type == "cuda" and find_spec("liger_kernel") is not None


class Repeated:
    """64 utterances stand for all: features by the number of the example."""

    def __init__(self, features: Any) -> None:
        self.features = features

    in_loop = False

    def count(self, example_id: str) -> int:
        return int(self.features.count(str(int(example_id) % 64)))

    def batch(self, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self.features.batch([str(int(example_id) % 64) for example_id in ids])
        return found


def synthetic_data(model: SpeechLM, options: argparse.Namespace, folder: Path) -> tuple[Collator, Any]:
    """A collator over random cached frames, and a function that makes so many examples: one byte is one token."""
    dim, n_frames = model.encoder.config.d_model, int(options.seconds * 50) // 5 * 5
    rng = np.random.default_rng(0)
    (folder / "features").mkdir()
    frames = {str(i): rng.standard_normal((n_frames, dim), dtype=np.float32).astype(np.float16) for i in range(64)}
    path = folder / "features" / shard_name(frames)
    file = claim(path, wait=True)
    assert file is not None  # the folder is new
    with file:
        write_shard(file, path, frames)
    shard = read_shard(path)
    spans = [[name, 0, *shard.spans[name]] for name in frames]
    index = {"dim": dim, "shards_folder": ".", "shards": [[path.name, shard.n_bytes]], "spans": spans}
    (folder / "features" / "index.json").write_text(json.dumps(index))
    processor = SpeechLMProcessor(byte_tokenizer(), WhisperFeatureExtractor(feature_size=80))
    collator = Collator(processor, "speech", Features(folder / "features"))
    prompt = len(processor.speech_prompt(n_frames // 5))
    longest = options.length - prompt - 1  # the end of the turn
    if longest < 8:
        sys.exit(f"--length {options.length} leaves no room for an answer after a prompt of {prompt} tokens.")

    def make(n: int) -> Sequence[Example]:
        # A few tokens apart, as sorting by length leaves them: padding and its mask are there, and small.
        answers = ["a" * (longest - i % 8) for i in range(n)]
        return [Example(str(i), "q", (answer,), answer) for i, answer in enumerate(answers)]

    return collator, make


def show(row: dict[str, Any]) -> None:
    start = f"{row['shape']:<14} {row['method']:<9} {row['weights']:<9}"
    if "skipped" in row:
        print(start, row["skipped"], flush=True)
        return
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
    error = "-" if row["peak_gb"] is None else f"{row['planned_gb'] / row['peak_gb'] - 1:+.1%}"
    print(f"{start} {row['batch']:>9} {row['seconds_per_step']:>8.3f} {row['tokens_per_second']:>9.0f} {mfu:>6} "
          f"{peak:>8} {row['planned_gb']:>8.2f} {error:>7}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
