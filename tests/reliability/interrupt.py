"""Kills, power cuts, full disks: a command that was interrupted anywhere and given again ends as if nothing happened.

    python tests/reliability/interrupt.py --job study --kills 100 --cuts 100 --full-disks 20

kill        SIGKILL of the process and its children at a time drawn uniformly, sometimes in bursts while it resumes.
cut         a kill, after which every file of the folder loses a random part of what was not synced to the disk.
full disk   the folder lies on a small tmpfs (needs root) of a random size; then the disk gets larger.

Each series of interruptions ends with a run to the end, whose outcome must be that of a run nobody interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork would lose its threads
sys.path.insert(0, str(Path(__file__).parents[1]))

from reliability.child import Child, start
from reliability.jobs import Job, jobs, write_inputs

PER_SERIES = 8  # interruptions before a run is left to end
BURST = 0.6  # share of interruptions that come early, while the last one is still being made up for


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

    def start(self) -> Child:
        return start(self.log, [*self.job.arguments, self.job.option, str(self.out / self.job.inside)])

    def finish(self, expected: Any) -> None:
        """Run to the end and compare."""
        self.figures.counts["series"] += 1
        if not self.job.done(self.out):
            child = self.start()
            if child.wait() != 0:
                self.fault(f"the last run ended with {child.returncode}: {_last_lines(child)}")
                return
        if json.dumps(self.job.outcome(self.out)) != json.dumps(expected):
            self.fault("the outcome is another one")

    def kill(self, after: float) -> bool:
        """Whether it was still running."""
        if self.job.done(self.out):
            return False
        child = self.start()
        ended = child.wait(after)
        child.kill()
        if ended:
            self.fault(f"a run after an interruption ended with {ended}: {_last_lines(child)}")
        return ended is None

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


def _last_lines(child: Child) -> str:
    return " | ".join(child.said.read_text().strip().splitlines()[-3:])


def _times(rng: random.Random, seconds: float) -> Iterator[float]:
    """When to interrupt, in seconds after the start."""
    while True:
        yield rng.uniform(0, 0.4 * seconds if rng.random() < BURST else seconds)


def interrupted(job: Job, folder: Path, expected: Any, seconds: float, n: int, *, cut: bool, seed: int) -> Figures:
    """`n` kills, or with `cut` as many power cuts."""
    rng, figures = random.Random(seed), Figures()
    what = "cuts" if cut else "kills"
    times = _times(rng, seconds)
    while figures.counts[what] < n and len(figures.faults) < 10:
        out = folder / f"{job.name.replace(' ', '-')}-{what}-{figures.counts['series']}"
        trial = Trial(job, out, folder / f"{out.name}.log", figures)
        for after in (next(times) for _ in range(PER_SERIES)):
            running = trial.kill(after)
            figures.counts[what] += running
            if cut:  # after its end too
                figures.counts["files cut"] += trial.cut_power(rng)
            if not running:
                break
        trial.finish(expected)
        shutil.rmtree(out, ignore_errors=True)
        print(f"{job.name}: {dict(figures.counts)}", flush=True)
    return figures


def on_full_disks(job: Job, folder: Path, expected: Any, n_bytes: int, n: int, *, seed: int) -> Figures:
    """On disks too small by a random part; each then gets large enough."""
    rng, figures = random.Random(seed), Figures()
    for i in range(n):
        disk = folder / f"{job.name.replace(' ', '-')}-disk-{i}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={rng.randint(4096, n_bytes)}", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            trial = Trial(job, disk / "out", folder / f"{disk.name}.log", figures)
            child = trial.start()
            if child.wait() not in (0, 2) or "Traceback" in child.said.read_text():
                trial.fault(f"on a full disk it ended with {child.returncode}: {_last_lines(child)}")
            figures.counts["full disks"] += child.returncode != 0
            figures.counts["large enough"] += child.returncode == 0
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
    child = trial.start()
    child.wait()
    seconds = time.monotonic() - started
    if child.returncode != 0:
        raise SystemExit(f"{job.name} does not run at all: {child.said.read_text()}")
    return job.outcome(out), seconds, sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--job", action="append", help="study, evaluate, validate-importance, data prepare, export; default all"
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
