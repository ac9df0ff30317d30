"""Speed and memory of importance at the size of real models, on one GPU: Llama-3.2-1B and Llama-3.1-8B shapes.

    PYTHONPATH=src python benchmarks/gpu/importance_8b.py OUT.json          # CUDA, 80 GB for the 8B shape
    PYTHONPATH=src python benchmarks/gpu/importance_8b.py OUT.json --tiny   # a tiny model on the CPU

Weights and tokens are random, so nothing is downloaded; bfloat16 as one would load such a model. Needs torch,
transformers, safetensors and numpy. Everything that is compared is measured in one run, on the same batches:

    bare            forward + backward of the same weights, gradients kept until the backward ends
    REDUCTIONS      `estimate_importance`, between two batches; what it does once (hashing the weights, finishing
                    the scores) stands in its own column
    loop of one     per_batch_abs on batches of one sequence: per_sequence_abs without its batched backward
    study           float32 as a study scores, by the keys of its recipe: the 1B shape by both reductions, the 8B shape
                    as recipes/paper-8b.yaml (one reduction, gradient checkpointing), and with both in host memory;
                    `planned` is what `palimpsest plan` says of it, without what lies outside PyTorch's allocator

Times are medians over batches after one for warming up. TFLOP/s counts 6 · N · tokens, N the scored weights
(embedding and head are left out of N, not out of the time). `error` compares one matrix of the first estimate
with the gradients of the bare passes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from shared import describe_machine, require_cuda
from transformers import AutoModelForCausalLM, LlamaConfig

from palimpsest.importance.estimate import estimate_importance
from palimpsest.importance.scores import Scores
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loss import supervised_losses
from palimpsest.planning.memory import ACCUMULATED, RUNTIME_BYTES, Encoder, Setup, importance_parts
from palimpsest.planning.memory import Batch as Sizes
from palimpsest.planning.sizes import decoder_of

LLAMA_3 = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
}
TINY: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
}
BOTH = ["signed_sum", "per_batch_abs"]
# As a study scores these shapes: (what, reductions, gradient checkpointing, offload).
STUDIES: dict[str, list[tuple[str, list[str], bool, Any]]] = {
    "Llama-3.2-1B": [("study", BOTH, False, None)],
    "Llama-3.1-8B": [("study", ["signed_sum"], True, None), ("study, in host memory", BOTH, True, "cpu")],
    "tiny": [("study", ["signed_sum"], True, None), ("study, in host memory", BOTH, False, "cpu")],
}
Batch = dict[str, Any]


class Stopwatch:
    """Seconds between batches, with the device's work done, and the peak of its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; a batch's time ends when the next is asked for."""
        for batch in batches:
            self._tick()
            yield batch
        self._tick()

    def _tick(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def per_batch(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)][1:]

    @property
    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None


def random_batches(
    n: int, rows: int, length: int, vocabulary: int, device: torch.device, supervised: int | None = None
) -> list[Batch]:
    """supervised: tokens at the end of a row that have a loss; None: all."""
    generator = torch.Generator().manual_seed(rows * length)
    batches = []
    for number in range(n):
        input_ids = torch.randint(vocabulary, (rows, length), generator=generator).to(device)
        ids = [f"{number}/{row}" for row in range(rows)]
        mask = torch.ones_like(input_ids)
        labels = input_ids.clone()
        labels[:, : -(supervised or length)] = -100
        batches.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels, "ids": ids})
    return batches


def one_by_one(batches: Iterable[Batch]) -> list[Batch]:
    return [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in batches
        for row in range(len(batch["ids"]))
    ]


def bare(model: Any, batches: list[Batch], checked: str, watch: Stopwatch) -> torch.Tensor:
    """Forward and backward alone; returns Σ g of one matrix in float32."""
    weights = scored_parameters(model)
    scored = {id(weight) for weight in weights.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in scored)
    total = torch.zeros_like(weights[checked], dtype=torch.float32)
    for batch in watch.over(batches):
        torch.autograd.backward(supervised_losses(model, batch)[0].sum())
        gradient = weights[checked].grad
        assert gradient is not None
        total += gradient
        model.zero_grad(set_to_none=True)
    return total


class Measurements:
    """The rows of one model's table, measured one after the other and printed as they come."""

    def __init__(
        self, name: str, shape: dict[str, Any], device: torch.device, n_batches: int, dtype: torch.dtype
    ) -> None:
        self.name, self.device, self.n_batches = name, device, n_batches
        self.rows: list[dict[str, Any]] = []
        torch.manual_seed(0)
        config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)
        with device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.weights = scored_parameters(self.model)
        self.n_scored = sum(weight.numel() for weight in self.weights.values())
        self.weight_gb = sum(p.numel() * p.element_size() for p in self.model.parameters()) / 1e9

    def run(self, n_rows: int, length: int) -> None:
        """The reductions over batches, against the bare passes."""
        batches = random_batches(self.n_batches + 1, n_rows, length, self.model.config.vocab_size, self.device)
        size = (n_rows, length)
        checked = next(name for name in self.weights if name.endswith("up_proj.weight"))
        watch = Stopwatch(self.device)
        gradient = bare(self.model, batches, checked, watch)
        self._add("bare", size, watch, statistics.median(watch.per_batch), 0.0)
        scores = self._estimate("signed_sum", size, batches, ["signed_sum"])
        if scores is not None:
            expected = (self.weights[checked].detach().float() * gradient).abs() / scores.metadata["n_tokens"]
            found = scores.tensors("signed_sum")[checked]
            self.rows[-1]["error"] = float((found - expected).norm() / expected.norm())
            del scores, found, expected
        self._estimate("per_batch_abs", size, batches, ["per_batch_abs"])
        self._estimate("both", size, batches, ["signed_sum", "per_batch_abs"])
        self._estimate("both, in host memory", size, batches[:3], ["signed_sum", "per_batch_abs"], offload="cpu")

    def run_by_sequence(self, n_rows: int, length: int) -> None:
        """per_sequence_abs against the bare passes and the loop over batches of one."""
        batches = random_batches(self.n_batches + 1, n_rows, length, self.model.config.vocab_size, self.device)
        size = (n_rows, length)
        watch = Stopwatch(self.device)
        bare(self.model, batches, next(iter(self.weights)), watch)
        self._add("bare", size, watch, statistics.median(watch.per_batch), 0.0)
        self._estimate("per_sequence_abs", size, batches, ["per_sequence_abs"])
        self._estimate("loop of one", size, one_by_one(batches[:3]), ["per_batch_abs"], repeat=n_rows)

    def run_as_study(self, n_rows: int, length: int, supervised: int) -> None:
        """Float32 weights and arithmetic; without bare passes, whose gradients would not fit."""
        model = self.model
        size, vocabulary = (n_rows, length), model.config.vocab_size
        batches = random_batches(self.n_batches + 1, n_rows, length, vocabulary, self.device, supervised)
        for what, reductions, checkpointing, offload in STUDIES[self.name]:
            setup = Setup(decoder_of(model), Encoder(0, 0, 0), "full", modality="text", checkpointing=checkpointing,
                          device="cuda" if self.device.type == "cuda" else "cpu")  # fmt: skip
            sums = 0 if offload else ACCUMULATED * self.n_scored * len(reductions)
            parts = importance_parts(setup, Sizes(n_rows, length, 0, supervised, supervised), sums)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._estimate(what, size, batches[: 3 if offload else None], reductions, offload=offload)
            model.gradient_checkpointing_disable()
            self.rows[-1] |= {"planned_gb": (sum(parts.values()) - RUNTIME_BYTES[setup.device]) / 1e9, "plan": parts}
            print(f"{'':<14} planned {self.rows[-1]['planned_gb']:.1f} GB", flush=True)

    def _estimate(
        self,
        what: str,
        size: tuple[int, int],
        batches: list[Batch],
        reductions: list[str],
        repeat: int = 1,
        **options: Any,
    ) -> Scores | None:
        """Measure one estimation; `repeat`: how many of these batches are one batch of the comparison."""
        watch, start = Stopwatch(self.device), time.perf_counter()
        try:
            scores = estimate_importance(self.model, watch.over(batches), reductions, **options)
        except torch.OutOfMemoryError:
            row = {"model": self.name, "what": what, "batch": f"{size[0]} x {size[1]}", "out_of_memory": True}
            self.rows.append(row)
            print(f"{self.name:<14} {what:<22} {row['batch']:>9}   out of memory", flush=True)
            return None
        once = time.perf_counter() - start - (watch.times[-1] - watch.times[0])
        self._add(what, size, watch, repeat * statistics.median(watch.per_batch), once)
        return scores

    def _add(self, what: str, size: tuple[int, int], watch: Stopwatch, seconds: float, once: float) -> None:
        batch, tokens = f"{size[0]} x {size[1]}", size[0] * size[1]
        bare_rows = [row for row in self.rows if (row["what"], row["batch"]) == ("bare", batch)]
        bare_seconds = bare_rows[0]["seconds_per_batch"] if bare_rows else seconds if what == "bare" else None
        row = {
            "model": self.name,
            "what": what,
            "batch": batch,
            "seconds_per_batch": seconds,
            "all_seconds": watch.per_batch,
            "microseconds_per_token": 1e6 * seconds / tokens,
            "times_bare": seconds / bare_seconds if bare_seconds else None,
            "tflops": 6 * self.n_scored * tokens / seconds / 1e12,
            "peak_gb": watch.peak_gb,
            "seconds_once": once,
            "n_scored": self.n_scored,
            "weight_gb": self.weight_gb,
        }
        self.rows.append(row)
        times = "-" if row["times_bare"] is None else f"{row['times_bare']:.3f}"
        peak = "-" if watch.peak_gb is None else f"{watch.peak_gb:.1f}"
        print(
            f"{self.name:<14} {what:<22} {batch:>9} {row['microseconds_per_token']:>10.2f} {times:>7} "
            f"{row['tflops']:>9.3f} {peak:>8} {once:>8.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the measurements")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batches", type=int, default=8, help="measured batches, after one for warming up")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    settings = parser.parse_args()
    device = require_cuda(settings.tiny)
    machine = describe_machine(device)
    print(machine.get("gpu", "CPU, dry run"), "| torch", machine["versions"]["torch"])
    heads = ("batch", 9), ("µs/token", 10), ("× bare", 7), ("TFLOP/s", 9), ("peak GB", 8), ("once, s", 8)
    print(f"{'model':<14} {'what':<22}", *(f"{head:>{width}}" for head, width in heads))
    rows: list[dict[str, Any]] = []
    for name, shape in (TINY if settings.tiny else {name: SHAPES[name] for name in settings.models}).items():
        for dtype in (torch.bfloat16, torch.float32):
            measurements = Measurements(name, shape, device, settings.batches, dtype)
            if dtype == torch.bfloat16:
                measurements.run(settings.rows, settings.length)
                measurements.run_by_sequence(16, 64)
            else:
                measurements.run_as_study(8, settings.length, min(100, settings.length - 1))
            rows += measurements.rows
            # Written after every model: a later one that fails takes nothing away.
            settings.out.parent.mkdir(parents=True, exist_ok=True)
            settings.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
            del measurements
    for row in rows:
        if "error" in row:
            print(f"{row['model']}: relative difference of {row['what']} from the bare gradients {row['error']:.1e}")
    print(f"written to {settings.out}")


if __name__ == "__main__":
    main()
