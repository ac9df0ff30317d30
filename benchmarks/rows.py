"""Time, memory and files of data with very many rows: a synthetic parquet set prepared, killed and resumed, and read.

    python benchmarks/rows.py FOLDER                   # 500,000 rows: about 2.5 GB for the set, 5 GB for what is made
    python benchmarks/rows.py FOLDER --rows 5000

Each row has a question, an answer and a tone of 0.25 s of its own as FLAC; the set is four parquet files with row
groups of 1,000 rows, as the published sets have. On it run, each in a process of its own:

    prepare      palimpsest data prepare, all rows
    killed       the same into another folder, killed (SIGKILL) when half of the rows are done
    resumed      the same command again; what it leaves must be what `prepare` left, byte for byte. With --only and
                 without prepare nothing is compared, and the study reads this folder
    study        `palimpsest study` on the prepared folder: 10 steps of training tiny models on --limit rows, which are
                 chosen at random; with everything else that a study does, as small as a recipe makes it
    again        the same command: nothing is left to do
    direct       the data of the study alone, from the parquet files instead of the prepared folder

Memory is the peak of the process and of its children, each for itself. Models are random, from tests/tiny.py.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml

ROOT = Path(__file__).parent.parent
FILES, GROUP = 4, 1000
RATE, SECONDS = 16_000, 0.25
AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # as the hub stores recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the set and all that is made of it")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--limit", type=int, default=1000, help="rows that the study trains on, chosen at random")
    parser.add_argument("--workers", type=int, help="of data prepare; its default where left out")
    parser.add_argument("--only", nargs="+", choices=("prepare", "resume", "study", "direct"))
    parser.add_argument("--json", type=Path, help="the figures, for other programs")
    options = parser.parse_args()
    parts = options.only or ["prepare", "resume", "study", "direct"]
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    source = make_set(folder / f"rows-{options.rows}", options.rows)
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{options.rows:,} rows, {size(source) / 1e9:.2f} GB; {machine}", flush=True)

    found: dict[str, Any] = {}
    workers = ["--workers", str(options.workers)] if options.workers else []
    command = ["data", "prepare", str(source), "--split", "train", "--voice", "none", *workers]
    whole, killed = folder / "whole", folder / "killed"
    if "prepare" in parts:
        shutil.rmtree(whole, ignore_errors=True)
        found["prepare"] = run([*command, "--out", str(whole)]) | files(whole)
        show("prepare", found)
    if "resume" in parts:
        shutil.rmtree(killed, ignore_errors=True)
        found["killed"] = run([*command, "--out", str(killed)], until=lambda: rows_done(killed) >= options.rows / 2)
        found["killed"]["rows"] = rows_done(killed)
        show("killed", found)
        found["resumed"] = run([*command, "--out", str(killed)]) | files(killed)
        if "prepare" in parts:
            found["resumed"]["same"] = content(killed) == content(whole)
            shutil.rmtree(killed)
        else:
            shutil.rmtree(whole, ignore_errors=True)
            killed.rename(whole)
        show("resumed", found)
    for name, data in (("study", whole), ("direct", source)):
        if name not in parts:
            continue
        made = folder / name
        shutil.rmtree(made, ignore_errors=True)
        path = write_recipe(folder, name, data, options.limit)
        study = ["study", str(path), "--out", str(made)]
        found[name] = run(
            study, until=None if name == "study" else lambda made=made: (made / "data/step.json").exists()
        )
        found[name] |= files(made)
        show(name, found)
        if name == "study":
            found["again"] = run(study)
            show("again", found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def make_set(folder: Path, n: int) -> Path:
    """The set, unless it is there: `n` rows whose recordings all differ."""
    done = folder / ".made"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bounds = [n * i // FILES for i in range(FILES + 1)]
    moments = np.arange(round(RATE * SECONDS)) / RATE
    schema = pa.schema({"question": pa.string(), "answer": pa.string(), "audio": AUDIO})
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        with pq.ParquetWriter(folder / f"train-{number:05}-of-{FILES:05}.parquet", schema) as writer:
            for first in range(start, stop, GROUP):
                rows = range(first, min(first + GROUP, stop))
                cells = []
                for i in rows:
                    buffer = io.BytesIO()
                    wave = 0.4 * np.sin(2 * np.pi * (150 + i * 1e-3) * moments)
                    soundfile.write(buffer, wave, RATE, format="FLAC", subtype="PCM_16")
                    cells.append({"bytes": buffer.getvalue(), "path": f"{i}.flac"})
                texts = [f"What is number {i} in the row?" for i in rows], [f"It is the number {i}." for i in rows]
                arrays = [*map(pa.array, texts), pa.array(cells, AUDIO)]
                writer.write_table(pa.table(arrays, schema=schema), row_group_size=GROUP)
    done.touch()
    return folder


def run(command: list[str], until: Any = None) -> dict[str, Any]:
    """Seconds and peak memory of a palimpsest command, which is killed when `until()` is true."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "palimpsest.cli", *command], env=environment, stdout=subprocess.DEVNULL
    )
    killed = False
    while True:
        pid, status, usage = os.wait4(process.pid, 0 if until is None else os.WNOHANG)
        if pid:
            break
        if not killed and until():
            process.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-signal.SIGKILL if killed else 0):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def rows_done(out: Path) -> int:
    state = out / "prepared" / ".train.state.json"
    try:
        return int(json.loads(state.read_text())["n_rows"])
    except (FileNotFoundError, ValueError):
        return 0


def content(out: Path) -> dict[str, str]:
    found = {}
    for path in out.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def files(folder: Path) -> dict[str, int]:
    """How many there are, and how many names the longest listing of a folder has."""
    listings = [len(folders) + len(names) for _, folders, names in os.walk(folder)]
    n_files = sum(len(names) for _, _, names in os.walk(folder))
    return {"files": n_files, "longest_listing": max(listings, default=0)}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_recipe(folder: Path, name: str, data: Path, limit: int) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import save_tiny_models

    save_tiny_models(folder / "models")
    recipe = {
        "name": name,
        "models": {"language_model": str(folder / "models/llm"), "encoder": str(folder / "models/whisper")},
        "data": {"train": {"source": str(data), "split": "train", "limit": limit}, "heldout_examples": 20},
        "methods": {"full": {"kind": "full", "learning_rate": 1e-3}},
        "training": {"epochs": 1, "batch_size": -(-limit // 10)},
        "importance": {"n_examples": 8, "batch_size": 4},
        "deactivation": {"random_seeds": 2},
        "analysis": {"shuffles": 1, "bootstrap": 100},
        "evaluation": {
            "tasks": [{"name": "facts", "source": "facts", "split": "heldout", "limit": 2}],
            "max_new_tokens": 4,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def show(name: str, found: dict[str, Any]) -> None:
    figures = found[name]
    rest = "; ".join(f"{key} {value}" for key, value in figures.items() if not key.endswith(("seconds", "bytes")))
    print(
        f"{name:<9}{figures['seconds']:>8.1f} s {figures['cpu_seconds']:>8.1f} s CPU"
        f" {figures['peak_bytes'] / 1e9:>6.2f} GB  {rest}",
        flush=True,
    )


if __name__ == "__main__":
    main()
