"""Time and memory of the importance estimation, as ratios measured in one run.

    python benchmarks/importance.py                    # SmolLM2-135M, 8 × 64 and 16 × 64 tokens, 2 threads
    python benchmarks/importance.py --repeats 3 --skip-memory

Time: seconds from batch to batch, over a bare forward + backward on the same batches, for the same weights,
gradients thrown away after each batch. Every variant runs between two bare passes over the batches; a batch's ratio
is to the mean of the two, then the median over batches and repeats. "Once" is what a call of `estimate_importance`
takes besides its batches, however many they are: hashing the weights, making and finishing the accumulators.

Memory: peak resident memory of a process that only does this, above one whose gradients are freed as they
come (weights + activations). "keep all" holds the gradients of all weights and adds their absolute products
into a copy after each batch; "zeroed" keeps the gradients' memory between batches, "freed" gives it back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from palimpsest.importance.estimate import estimate_importance
from palimpsest.models.anatomy import scored_parameters
from palimpsest.models.loading import load_language_model
from palimpsest.models.loss import supervised_losses
from palimpsest.rundir import cpu_name

Batch = dict[str, Any]
MEMORY_VARIANTS = ("freed as they come", "keep all, zeroed", "keep all, freed", "per_batch_abs", "per_sequence_abs")
ONE_BY_ONE = "per_sequence_abs, batches of one"
MB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="per sequence, all supervised (a quarter for memory)")
    parser.add_argument("--batches", type=int, default=3, help="per call")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: with --threads 1, on a busy machine"
    )
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory-of", choices=MEMORY_VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(peak_of(options)))
        return
    print(f"{cpu_name()}, {options.threads} threads, {platform.system()}; Python {platform.python_version()}, "
          f"torch {version('torch')}, transformers {version('transformers')}")  # fmt: skip
    model = load_language_model(options.model)[0].eval()
    for rows in options.rows:
        print_times(model, rows, options)
    del model
    if not options.skip_memory:
        for checkpointing in (False, True):
            print_memory(options, checkpointing)


# ------------------------------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------------------------------
def print_times(model: Any, rows: int, options: argparse.Namespace) -> None:
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    data = make_batches(model, rows, options.tokens, options.batches)
    variants: dict[str, list[str]] = {
        "signed_sum": ["signed_sum"],
        "per_batch_abs": ["per_batch_abs"],
        "signed_sum, per_batch_abs": ["signed_sum", "per_batch_abs"],
        "per_sequence_abs": ["per_sequence_abs"],
        "all four": ["signed_sum", "per_batch_abs", "per_sequence_abs", "fisher"],
        ONE_BY_ONE: ["per_sequence_abs"],
    }
    times: dict[str, list[float]] = {name: [] for name in variants}  # seconds of every batch of every repeat
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    once: dict[str, list[float]] = {name: [] for name in variants}

    def seconds(name: str | None) -> list[float]:
        """Of each batch; with None, of the bare passes."""
        marks: list[float] = []
        start = clock()
        batches = marked(data, marks, clock, split=name == ONE_BY_ONE)
        if name is None:
            bare(model, batches)
        else:
            estimate_importance(model, batches, variants[name])
            once[name].append(clock() - start - (marks[-1] - marks[0]))
        return [b - a for a, b in itertools.pairwise(marks)]

    bare(model, data[:1])  # warm up
    reference = [seconds(None)]
    for _ in range(options.repeats):
        for name in variants:
            mine = seconds(name)
            before, after = reference[-1], seconds(None)
            reference.append(after)
            times[name] += mine
            ratios[name] += [2 * m / (b + a) for m, b, a in zip(mine, before, after, strict=True)]
    plain = [value for values in reference for value in values]
    print(f"\n{rows} × {options.tokens} tokens, {options.repeats} × {options.batches} batches, {options.clock} time")
    print(f"{'':34} {'s per batch':>11} {'over bare':>9}  {'quartiles':14} {'once, s':>8}")
    print(f"{'bare forward + backward':34} {statistics.median(plain):11.2f}")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        print(f"{name:34} {statistics.median(values):11.2f} {middle:8.2f}×  "
              f"{low:.2f} to {high:.2f}   {statistics.median(once[name]):8.2f}")  # fmt: skip
    gain = statistics.median(ratios[ONE_BY_ONE]) / statistics.median(ratios["per_sequence_abs"])
    print(f"{ONE_BY_ONE} over per_sequence_abs: {gain:.2f}×")


def marked(data: list[Batch], marks: list[float], clock: Callable[[], float], split: bool) -> Iterator[Batch]:
    """The batches, or their rows one by one; the time when each batch begins, and when the last one ends."""
    for batch in data:
        marks.append(clock())
        rows = len(batch["labels"])
        yield from ({key: value[i : i + 1] for key, value in batch.items()} for i in range(rows)) if split else [batch]
    marks.append(clock())


def bare(model: Any, data: Iterable[Batch], free: bool = False) -> None:
    """Forward and backward for the scored weights; gradients thrown away after each batch, or as they come."""
    weights: list[Any] = list(scored_parameters(model).values())
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    handles = [w.register_post_accumulate_grad_hook(throw_away) for w in weights] if free else []
    for batch in data:
        torch.autograd.backward(supervised_losses(model, batch)[0].sum())
        for weight in weights:
            weight.grad = None
    for handle in handles:
        handle.remove()


def throw_away(weight: torch.Tensor) -> None:
    weight.grad = None


def make_batches(model: Any, rows: int, tokens: int, n: int, supervised: int | None = None) -> list[Batch]:
    """Random tokens, the last `supervised` of each sequence with a loss (default: all)."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(n):
        input_ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
        labels = input_ids.clone()
        labels[:, : tokens - (supervised or tokens)] = -100
        data.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels})
    return data


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------
def print_memory(options: argparse.Namespace, checkpointing: bool) -> None:
    """One process per variant: what one has allocated before cannot hide what the next one needs."""
    rows = options.rows[0]
    print(f"\nPeak memory, {rows} × {options.tokens} tokens, a quarter supervised, "
          f"{'with' if checkpointing else 'without'} gradient checkpointing")  # fmt: skip
    peaks = {}
    for variant in MEMORY_VARIANTS:
        command = [sys.executable, __file__, "--memory-of", variant, "--model", options.model, "--rows", str(rows)]
        command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
        command += ["--checkpointing"] if checkpointing else []
        # Large blocks are mapped and given back to the system when freed, so resident means in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        peaks[variant] = json.loads(output.splitlines()[-1])
    base = peaks["freed as they come"]
    naive = peaks["keep all, zeroed"]["peak"] - base["peak"]
    print(f"scored weights {base['weights'] / MB:.0f} MB; weights + activations {base['peak'] / MB:.0f} MB resident")
    for variant in MEMORY_VARIANTS[1:]:
        extra = peaks[variant]["peak"] - base["peak"]
        print(f"{variant:34} {extra / MB:8.0f} MB above, {extra / naive:5.2f} of keep all, zeroed")


def peak_of(options: argparse.Namespace) -> dict[str, int]:
    """Peak resident bytes from here on, two batches."""
    model: Any = load_language_model(options.model)[0].eval()
    data = make_batches(model, options.rows[0], options.tokens, 2, supervised=options.tokens // 4)
    weights = scored_parameters(model)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if options.memory_of in ("per_batch_abs", "per_sequence_abs"):
        scores = estimate_importance(model, data, [options.memory_of])
        assert scores.metadata["n_batches"] == len(data)
    elif options.memory_of == "freed as they come":
        with checkpointing_as_scored(model):
            bare(model, data, free=True)
    else:
        with checkpointing_as_scored(model):
            keep_all(model, data, set_to_none=options.memory_of == "keep all, freed")
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"peak": peak, "weights": sum(4 * w.numel() for w in weights.values())}


def checkpointing_as_scored(model: Any) -> Any:
    """transformers checkpoints in training mode only; the estimation also does so in eval mode, so must we."""
    from palimpsest.importance.estimate import _checkpointing_in_eval_mode

    return _checkpointing_in_eval_mode(model)


def keep_all(model: Any, data: list[Batch], set_to_none: bool) -> dict[str, torch.Tensor]:
    """The usual way: all gradients of a batch, then |θ · g| added into a copy, matrix by matrix."""
    weights = scored_parameters(model)
    model.requires_grad_(False)
    copies = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in data:
        torch.autograd.backward(supervised_losses(model, batch)[0].sum())
        for name, weight in weights.items():
            assert weight.grad is not None
            copies[name] += (weight.detach() * weight.grad).abs()
        model.zero_grad(set_to_none=set_to_none)
    return copies


if __name__ == "__main__":
    main()
