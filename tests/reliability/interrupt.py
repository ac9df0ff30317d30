"""Kills, power cuts, full disks: a command that was interrupted anywhere and given again ends as if nothing happened.

    python tests/reliability/interrupt.py --job study --kills 100 --cuts 100 --full-disks 20

kill        SIGKILL of the process and its children at a time drawn uniformly, sometimes in bursts while it resumes.
cut         a kill, after which every file of the folder loses a random part of what was not synced to the disk.
full disk   the folder lies on a small tmpfs (needs root) of a random size; then the disk gets larger.

Each series of interruptions ends with a run to the end, whose outcome must be that of a run nobody interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability.jobs import Job, jobs, write_inputs

CHILD = Path(__file__).with_name("child.py")
PER_SERIES = 8  # interruptions before a run is left to end
BURST = 0.3  # share of interruptions that come early, while the last one is still being made up for


@dataclass
class Figures:
    """What happened, and what went wrong, a sentence each."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Trial:
    """One job in one folder: started, interrupted, started again."""

    job: Job
    out: Path
    log: Path
    figures: Figures

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(CHILD), str(self.log), *self.job.arguments, "--out", str(self.out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def finish(self, expected: Any) -> None:
        """Run to the end and compare."""
        process = self.start()
        _, said = process.communicate()
        if process.returncode != 0:
            self.fault(f"the last run ended with {process.returncode}: {_last_lines(said)}")
        elif json.dumps(self.job.outcome(self.out)) != json.dumps(expected):
            self.fault("the outcome is another one")
        self.figures.counts["series"] += 1

    def kill(self, after: float) -> bool:
        """Whether it was still running."""
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, said = process.communicate(timeout=after)
            if process.returncode != 0:
                self.fault(f"a run after an interruption ended with {process.returncode}: {_last_lines(said)}")
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True

    def cut_power(self, rng: random.Random) -> int:
        """Every file loses a random part of what was not known to be on the disk; the number of files that did."""
        synced: dict[tuple[int, int], int] = {}
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            device, inode, size = map(int, line.split())
            synced[device, inode] = size
        n_cut = 0
        for path in sorted(path for path in self.out.rglob("*") if path.is_file() and not path.is_symlink()):
            about = path.stat()
            safe = synced.get((about.st_dev, about.st_ino), 0)
            if safe < about.st_size:
                os.truncate(path, rng.choice([safe, rng.randint(safe, about.st_size)]))
                n_cut += 1
        return n_cut

    def fault(self, what: str) -> None:
        self.figures.faults.append(f"{self.job.name}: {what}")
        print(f"  FAULT {self.job.name}: {what}", flush=True)


def _last_lines(said: str) -> str:
    return " | ".join(said.strip().splitlines()[-3:])


def _times(rng: random.Random, seconds: float) -> Iterator[float]:
    """When to interrupt, in seconds after the start."""
    while True:
        yield rng.uniform(0, 0.35 * seconds if rng.random() < BURST else seconds)


def interrupted(job: Job, folder: Path, expected: Any, seconds: float, n: int, *, cut: bool, seed: int) -> Figures:
    """`n` kills, or with `cut` as many power cuts."""
    rng, figures = random.Random(seed), Figures()
    what = "cuts" if cut else "kills"
    times = _times(rng, seconds)
    while figures.counts[what] < n and len(figures.faults) < 10:
        out = folder / f"{job.name.replace(' ', '-')}-{what}-{figures.counts['series']}"
        trial = Trial(job, out, folder / f"{out.name}.log", figures)
        for after in (next(times) for _ in range(PER_SERIES)):
            if not trial.kill(after):
                break
            figures.counts[what] += 1
            if cut:
                figures.counts["files cut"] += trial.cut_power(rng)
        trial.finish(expected)
        shutil.rmtree(out, ignore_errors=True)
        print(f"{job.name}: {dict(figures.counts)}", flush=True)
    return figures


def on_full_disks(job: Job, folder: Path, expected: Any, n_bytes: int, n: int, *, seed: int) -> Figures:
    """On disks too small by a random part; each then gets large enough."""
    rng, figures = random.Random(seed), Figures()
    for i in range(n):
        disk = folder / f"disk-{i}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={rng.randint(4096, n_bytes)}", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            trial = Trial(job, disk / "out", folder / f"disk-{i}.log", figures)
            process = trial.start()
            _, said = process.communicate()
            if process.returncode not in (0, 2) or "Traceback" in said:
                trial.fault(f"on a full disk it ended with {process.returncode}: {_last_lines(said)}")
            figures.counts["full disks"] += process.returncode != 0
            figures.counts["large enough"] += process.returncode == 0
            left = [path.name for path in disk.rglob("*.tmp")]
            if left:
                trial.fault(f"left behind: {left}")
            subprocess.run(["mount", "-o", f"remount,size={4 * n_bytes}", str(disk)], check=True)
            trial.finish(expected)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        print(f"{job.name}: {dict(figures.counts)}", flush=True)
    return figures


def uninterrupted(job: Job, folder: Path) -> tuple[Any, float, int]:
    """(outcome, seconds, bytes of its folder)"""
    out = folder / f"{job.name.replace(' ', '-')}-whole"
    trial = Trial(job, out, folder / f"{out.name}.log", Figures())
    started = time.monotonic()
    process = trial.start()
    _, said = process.communicate()
    seconds = time.monotonic() - started
    if process.returncode != 0:
        raise SystemExit(f"{job.name} does not run at all: {said}")
    return job.outcome(out), seconds, sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--job", action="append", help="study, evaluate, validate-importance, data prepare; default all"
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        known = jobs(folder)
        for name in options.job or known:
            job = known[name]
            expected, seconds, n_bytes = uninterrupted(job, folder)
            print(f"{name}: {seconds:.0f} s and {n_bytes / 1e6:.1f} MB uninterrupted", flush=True)
            series = [
                interrupted(job, folder, expected, seconds, options.kills, cut=False, seed=options.seed),
                interrupted(job, folder, expected, seconds, options.cuts, cut=True, seed=options.seed + 1),
                on_full_disks(job, folder, expected, n_bytes, options.full_disks, seed=options.seed + 2),
            ]
            total = sum((figures.counts for figures in series), Counter())
            found = [fault for figures in series for fault in figures.faults]
            faults += found
            print(f"{name}: {', '.join(f'{n} {what}' for what, n in total.items())}, {len(found)} faults", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
