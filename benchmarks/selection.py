"""Exact selection of the top 3 % against torch.kthvalue, and from scores on disk, measured in one run.

    python benchmarks/selection.py                     # 10^8 scores in memory, 4 GB on disk
    python benchmarks/selection.py --disk-gb 1 --folder /tmp

Time: `select` (threshold and packed mask) and `torch.kthvalue` with the comparison that makes a mask of it, one
after the other in every repeat. Memory: peak resident memory, each in a process of its own. On disk: scores as
`Scores.save` writes them, opened lazily.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from palimpsest.importance.scores import Scores
from palimpsest.importance.select import select
from palimpsest.rundir import cpu_name

RATIO = 0.03
MB = 1 << 20
MATRIX = 4096 * 4096  # scores per matrix on disk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10**8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--disk-gb", type=float, default=4.0, help="0: nothing on disk")
    parser.add_argument("--folder", type=Path, default=None, help="for the file, default: the temporary folder")
    parser.add_argument("--memory-of", choices=("select", "kthvalue", "disk"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure(options)))
        return
    print(f"{cpu_name()}, {options.threads} threads; Python {platform.python_version()}, torch {version('torch')}, "
          f"numpy {version('numpy')}")  # fmt: skip
    print_times(options)
    for n in (options.n // 10, options.n):
        for way in ("select", "kthvalue"):
            print(f"{way:10} {n:>12} scores: {in_process(way, n=n)['above'] / MB:7.0f} MB above the scores")
    if options.disk_gb:
        print_disk(options)


def top_by_kthvalue(scores: torch.Tensor) -> torch.Tensor:
    k = round(RATIO * len(scores))
    return scores >= torch.kthvalue(scores, len(scores) - k + 1).values


def print_times(options: argparse.Namespace) -> None:
    scores = importance_like(options.n)
    expected = top_by_kthvalue(scores)
    mask = select({"w": scores}, RATIO)
    assert mask.count == round(RATIO * options.n)
    assert not (mask.tensor("w") & ~expected).any()  # all of ours are at or above the threshold
    ways: dict[str, Callable[[], object]] = {
        "select": lambda: select({"w": scores}, RATIO),
        "kthvalue": lambda: top_by_kthvalue(scores),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    gain = statistics.median(b / a for a, b in zip(seconds["select"], seconds["kthvalue"], strict=True))
    print(f"top {RATIO:.0%} of {options.n:.0e} scores, median of {options.repeats}: "
          + ", ".join(f"{way} {statistics.median(values):.2f} s" for way, values in seconds.items())
          + f"; select is {gain:.1f} times as fast")  # fmt: skip


def print_disk(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        write_scores(folder, int(options.disk_gb * 1e9 / 4 / MATRIX))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        result = in_process("disk", folder=folder)
        print(f"{size / 1e9:.1f} GB of scores on disk: {result['seconds']:.1f} s, {result['peak'] / MB:.0f} MB "
              f"resident at most, {result['above'] / MB:.0f} MB above the bare process")  # fmt: skip
    finally:
        shutil.rmtree(folder)


def write_scores(folder: Path, matrices: int) -> None:
    """Scores of `matrices` matrices; one matrix with different factors, so that no more is in memory."""
    base = importance_like(MATRIX).view(4096, 4096)

    class Made(dict[str, torch.Tensor]):
        def __missing__(self, name: str) -> torch.Tensor:
            return base * (1 + int(name.split(".")[2]) / 100)

    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(matrices)]
    parameters = [{"name": name, "shape": [4096, 4096], "dtype": "float32", "sha256": ""} for name in names]
    scores = Scores({"parameters": parameters}, {"signed_sum": Made()}, np.zeros((1, matrices)), np.ones(1, np.int64))
    scores.save(folder, shard_bytes=1 << 30)


def importance_like(n: int) -> torch.Tensor:
    """Products of normal numbers over many magnitudes, as importance is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator).mul_(3).exp_()


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------
def in_process(way: str, n: int = 0, folder: Path | None = None) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory-of", way, "--n", str(n)]
    command += ["--folder", str(folder)] if folder else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Peak resident bytes while selecting, and above what was resident before."""
    if options.memory_of == "disk":
        tensors: Mapping[str, torch.Tensor] = Scores.open(options.folder).tensors("signed_sum")
    else:
        tensors = {"w": importance_like(options.n)}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    result = top_by_kthvalue(tensors["w"]) if options.memory_of == "kthvalue" else select(tensors, RATIO)
    seconds = time.perf_counter() - start
    del result
    peak = resident("VmHWM")
    return {"seconds": seconds, "peak": peak, "above": peak - before}


def resident(line: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(entry.split()[1]) * 1024 for entry in status if entry.startswith(line))


if __name__ == "__main__":
    main()
