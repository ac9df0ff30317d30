"""Time and memory of the analysis of an 8B model's scores, from synthetic shards on disk.

    python benchmarks/analysis_8b.py --folder scores             # Llama-3.1-8B shapes, 28 GB on disk
    python benchmarks/analysis_8b.py --layers 4 --folder scores # an eighth of it
    python benchmarks/analysis_8b.py --layers 4 --folder scores --parts change # of ΔW; the weights are made of scores

Scores are written as `Scores.save` lays them out, one layer a file, and opened lazily. Each part of the analysis then
runs in turn in a process of its own; printed are its seconds, those of processor time (on a shared machine the ones
to compare) and its peak resident memory, mapped pages included.
What is done is kept in the folder (layers written, parts in measured.json): started again, the rest is run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from palimpsest.analysis.clustering import cluster_records
from palimpsest.analysis.delta import AbsoluteChange, Change, delta_records
from palimpsest.analysis.layers import layer_distribution
from palimpsest.analysis.low_rank import low_rank_records
from palimpsest.analysis.overlap import overlap_records
from palimpsest.files import read_json, write_json
from palimpsest.importance.scores import Scores
from palimpsest.importance.select import select
from palimpsest.rundir import cpu_name

SHAPES = {  # (outputs, inputs) of Llama-3.1-8B
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
REDUCTION = "signed_sum"
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the scores; kept, and used again if complete")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shuffles", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", choices=("scores", "change"), default="scores")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part:
        print(json.dumps(run_part(options)))
        return
    n = options.layers * sum(rows * columns for rows, columns in SHAPES.values())
    print(f"{cpu_name()}, {options.threads} threads; {options.layers} layers, {n / 1e9:.2f}e9 scores, "
          f"{4 * n / GB:.1f} GB")  # fmt: skip
    if not (options.folder / "scores.json").exists():
        start = time.perf_counter()
        write_scores(options.folder, options.layers)
        print(f"{'writing the scores':24} {time.perf_counter() - start:6.0f} s", flush=True)
    there = len(Scores.open(options.folder).names) // len(SHAPES)
    if there != options.layers:
        sys.exit(f"{options.folder} holds {there} layers, not {options.layers}; give --layers {there} or a new folder.")
    record = options.folder / "measured.json"
    measured = read_json(record) if record.exists() else {}
    for part in [part for part in PARTS if ("ΔW" in part) == (options.parts == "change")]:
        key = f"{part}, {options.shuffles} shuffles, {options.threads} threads"
        if key not in measured:
            command = [sys.executable, __file__, "--part", part, "--folder", str(options.folder)]
            command += ["--shuffles", str(options.shuffles), "--threads", str(options.threads)]
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))  # of numpy
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
            measured[key] = json.loads(done.stdout.splitlines()[-1])
            write_json(record, measured)
        found = measured[key]
        print(f"{part:24} {found['seconds']:6.0f} s   {found['processor_seconds']:6.0f} s of processor time   "
              f"{found['peak'] / GB:5.2f} GB resident at most", flush=True)  # fmt: skip


PARTS: dict[str, Callable[[Any, argparse.Namespace], Any]] = {
    "layers": lambda tensors, _: layer_distribution(tensors),
    "top mask": lambda tensors, _: select(tensors, 0.03),
    "clustering": lambda tensors, options: cluster_records("base", "importance", tensors, n_shuffles=options.shuffles),
    "mask overlap": lambda tensors, _: overlap_records("base", tensors, "base", tensors),
    "ΔW: clustering": lambda tensors, options: cluster_records(
        "full", "delta", AbsoluteChange(tensors, NextLayer(tensors)), n_shuffles=options.shuffles
    ),
    "ΔW: clustering, rank 16": lambda tensors, _: low_rank_records("full", Change(tensors, NextLayer(tensors)), 16),
    "ΔW: size and overlap": lambda tensors, _: delta_records(tensors, NextLayer(tensors), tensors, method="full"),
}


class NextLayer(Mapping[str, Any]):
    """Stands for a tuned model's weights: each name holds the tensor of the next layer."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        names = list(tensors)
        self._tensors = tensors
        self._next = dict(zip(names, names[len(SHAPES) :] + names[: len(SHAPES)], strict=True))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._next[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def run_part(options: argparse.Namespace) -> dict[str, float]:
    tensors = Scores.open(options.folder).tensors(REDUCTION)
    start = time.perf_counter()
    assert PARTS[options.part](tensors, options)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time(), "peak": peak}


def write_scores(folder: Path, n_layers: int) -> None:
    """Heavy-tailed scores, a few rows and columns larger; files and scores.json as `Scores.save` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    missing = n_layers - len(list(folder.glob(f"{REDUCTION}-*.safetensors")))
    need = 4 * missing * sum(rows * columns for rows, columns in SHAPES.values())
    if free < 1.1 * need:
        sys.exit(f"{folder} has {free / GB:.0f} GB free, the scores need {need / GB:.0f} GB; choose another folder.")
    files, parameters = [], []
    for layer in range(n_layers):
        path = folder / f"{REDUCTION}-{layer:05d}.safetensors"
        names = {kind: f"model.layers.{layer}.{kind}.weight" for kind in SHAPES}
        parameters += [
            {"name": names[kind], "shape": list(shape), "dtype": "float32", "sha256": ""}
            for kind, shape in SHAPES.items()
        ]
        if not path.exists():
            write_layer(path, names, layer)
        files.append({"file": path.name, "bytes": path.stat().st_size, "sha256": ""})
    np.savez(folder / "batches.npz", totals=np.ones((1, len(parameters))), tokens=np.ones(1, dtype=np.int64))
    batches = {"file": "batches.npz", "bytes": (folder / "batches.npz").stat().st_size, "sha256": ""}
    record = {"schema": 1, "metadata": {"parameters": parameters}, "files": {REDUCTION: files}, "batches": batches}
    write_json(folder / "scores.json", record)


def write_layer(path: Path, names: Mapping[str, str], layer: int) -> None:
    rng = np.random.default_rng([0, layer])
    tensors = {}
    for kind, (rows, columns) in SHAPES.items():
        values = rng.standard_exponential((rows, columns), dtype=np.float32)
        values[rng.integers(rows, size=rows // 100)] *= 10
        tensors[names[kind]] = torch.from_numpy(values * np.float32(1e-9))
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


if __name__ == "__main__":
    main()
