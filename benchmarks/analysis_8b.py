"""Time and memory of the analysis of an 8B model's scores, from synthetic shards on disk.

    python benchmarks/analysis_8b.py --folder scores             # Llama-3.1-8B shapes, 28 GB on disk
    python benchmarks/analysis_8b.py --layers 4 --folder scores # an eighth of it

Scores are written as `Scores.save` lays them out, one layer a file, and opened lazily. Each part of the analysis then
runs in turn in a process of its own; printed are its seconds and its peak resident memory, mapped pages included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from palimpsest.analysis.clustering import cluster_records
from palimpsest.analysis.layers import layer_distribution
from palimpsest.analysis.overlap import overlap_records
from palimpsest.importance.scores import Scores
from palimpsest.importance.select import select
from palimpsest.rundir import cpu_name, write_json

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
        print(f"{'writing the scores':20} {time.perf_counter() - start:8.0f} s")
    for part in PARTS:
        command = [sys.executable, __file__, "--part", part, "--folder", str(options.folder)]
        command += ["--layers", str(options.layers), "--shuffles", str(options.shuffles)]
        command += ["--threads", str(options.threads)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{part:20} {found['seconds']:8.0f} s   {found['peak'] / GB:5.2f} GB resident at most", flush=True)


PARTS: dict[str, Callable[[Any, argparse.Namespace], Any]] = {
    "layers": lambda tensors, _: layer_distribution(tensors),
    "top mask": lambda tensors, _: select(tensors, 0.03),
    "clustering": lambda tensors, options: cluster_records("base", "importance", tensors, n_shuffles=options.shuffles),
    "mask overlap": lambda tensors, _: overlap_records("base", tensors, "base", tensors),
}


def run_part(options: argparse.Namespace) -> dict[str, float]:
    tensors = Scores.open(options.folder).tensors(REDUCTION)
    start = time.perf_counter()
    assert PARTS[options.part](tensors, options)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": time.perf_counter() - start, "peak": peak}


def write_scores(folder: Path, n_layers: int) -> None:
    """Heavy-tailed scores, a few rows and columns larger; files and scores.json as `Scores.save` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    need = 4 * n_layers * sum(rows * columns for rows, columns in SHAPES.values())
    if free < 1.1 * need:
        sys.exit(f"{folder} has {free / GB:.0f} GB free, the scores need {need / GB:.0f} GB; choose another folder.")
    rng = np.random.default_rng(0)
    files, parameters = [], []
    for layer in range(n_layers):
        tensors = {}
        for kind, (rows, columns) in SHAPES.items():
            values = rng.standard_exponential((rows, columns), dtype=np.float32)
            values[rng.integers(rows, size=rows // 100)] *= 10
            name = f"model.layers.{layer}.{kind}.weight"
            tensors[name] = torch.from_numpy(values * 1e-9)
            parameters.append({"name": name, "shape": [rows, columns], "dtype": "float32", "sha256": ""})
        path = folder / f"{REDUCTION}-{layer:05d}.safetensors"
        save_file(tensors, path)
        files.append({"file": path.name, "bytes": path.stat().st_size, "sha256": ""})
    np.savez(folder / "batches.npz", totals=np.ones((1, len(parameters))), tokens=np.ones(1, dtype=np.int64))
    batches = {"file": "batches.npz", "bytes": (folder / "batches.npz").stat().st_size, "sha256": ""}
    record = {"schema": 1, "metadata": {"parameters": parameters}, "files": {REDUCTION: files}, "batches": batches}
    write_json(folder / "scores.json", record)


if __name__ == "__main__":
    main()
